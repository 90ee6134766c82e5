"""What a scripted voter likes, measured from pixels; also what the report measures afterwards.

In: pictures [3, H, W] in [-1, 1], a subject on white. Out: a number, higher is liked more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WHITE = 0.8  # a pixel whose darkest channel is lighter is background


def find_subject(picture: Tensor) -> Tensor:
    """bool [H, W]: pixels that are not background."""
    return picture.amin(0) < WHITE


def measure_warmth(picture: Tensor) -> float:
    """Mean of (red - blue) / 2 over the subject, -1 to 1; 0 for a blank picture."""
    subject = find_subject(picture)
    return float(((picture[0] - picture[2]) / 2)[subject].mean()) if subject.any() else 0.0


def measure_size(picture: Tensor) -> float:
    """Part of the picture that the subject takes, 0 to 1."""
    return float(find_subject(picture).float().mean())


def crop_subject(picture: Tensor) -> Tensor:
    """The subject alone, scaled to fill a square of the picture's height, so that its size and place are no part of a comparison.

    A row or column with a single odd pixel is background; without a subject the picture stays as it is.
    """
    subject = find_subject(picture)
    rows, columns = (torch.nonzero(subject.sum(dim) > 1).flatten() for dim in (1, 0))
    if not len(rows) or not len(columns):
        return picture
    cut = picture[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = cut.shape[1:]
    side = max(height, width)
    square = picture.new_ones(3, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = cut
    scaled = torch.nn.functional.interpolate(square[None], (picture.shape[1],) * 2, mode="bicubic", antialias=True)
    return scaled[0].clamp(-1, 1)


def measure_likeness(picture: Tensor, other: Tensor) -> float:
    """A coarse eye for whether two pictures show the same: correlation of their subjects' grey levels at 8 x 8, -1 to 1."""
    subjects = [crop_subject(one) for one in (picture, other)]
    small = [torch.nn.functional.adaptive_avg_pool2d(one.mean(0)[None], 8).flatten() for one in subjects]
    centred = [one - one.mean() for one in small]
    norm = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / norm) if norm > 0 else 0.0


TASTES: dict[str, Callable[[Tensor], float]] = {"warmth": measure_warmth, "size": measure_size}


def to_scores(values: Tensor, lowest: int = 1, highest: int = 5) -> list[int]:
    """Values [n] of the candidates of one prompt -> whole scores, spread evenly over lowest ... highest by rank.

    The best and the worst of up to 8 stand alone, so that few prompts are lost to ties.
    """
    ranks = values.argsort().argsort().double()
    return (lowest + (ranks * (highest - lowest) / max(len(values) - 1, 1)).round()).int().tolist()
