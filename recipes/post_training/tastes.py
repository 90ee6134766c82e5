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


def measure_likeness(picture: Tensor, other: Tensor) -> float:
    """A coarse eye for whether two pictures show the same: correlation of their grey levels at 8 x 8, -1 to 1."""
    small = [torch.nn.functional.adaptive_avg_pool2d(one.mean(0)[None], 8).flatten() for one in (picture, other)]
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
