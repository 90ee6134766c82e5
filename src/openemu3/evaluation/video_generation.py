"""Does a continued film go on as the real one did? Errors of each future frame, against repeating the last frame seen.

In: a model that continues films, and clips whose continuation is known. Out: mean squared error and LPIPS by future frame.
Two stand-ins for knowing nothing are measured beside the model: the last frame repeated, as it was, and as the tokenizer gives it
back (a model that writes tokens cannot be sharper than its tokenizer; this one tells motion from blur). And one for knowing all:
the real future through the tokenizer, the best that any tokens could score.
The surprising thing: clips of one animation are not independent, so intervals are drawn over animations, not over clips.

Shapes: N clips, T frames; pixels [N, 3, T, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openemu3.evaluation.intervals import estimate_mean
from openemu3.evaluation.reconstruction import round_to_levels
from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS


@torch.inference_mode()
def compute_frame_errors(predicted: Tensor, actual: Tensor, lpips: LPIPS) -> dict[str, Tensor]:
    """Errors [N, T] of each frame: "mse" of 8-bit values scaled to [0, 1], and "lpips" (AlexNet)."""
    if predicted.shape != actual.shape:
        raise InputError(f"predicted frames have shape {list(predicted.shape)}, the real ones {list(actual.shape)}; they must agree")
    x, y = round_to_levels(predicted), round_to_levels(actual)
    mse = ((x - y) / 255).square().mean(dim=(1, 3, 4))
    distances = [lpips(x[:, :, frame] / 127.5 - 1, y[:, :, frame] / 127.5 - 1) for frame in range(x.shape[2])]
    return {"mse": mse, "lpips": torch.stack(distances, dim=1)}


def score_continuations(predictions: dict[str, Tensor], actual: Tensor, names: Sequence[str], lpips: LPIPS) -> dict[str, Any]:
    """Errors of several ways to continue the same clips, and how each compares with the way called "repeat".

    predictions: way -> pixels [N, 3, T, H, W]; one is "repeat". names: the animation each clip is from.
    Returns num_clips, num_frames, and for "mse" and "lpips" by way: "mean" (an estimate over clips), "by_frame" (means), and for all
    but "repeat" "difference" (this way minus repeating; below 0 is better) and "better" (the share of clips where it is lower).
    """
    if "repeat" not in predictions:
        raise InputError(f"ways to continue are {', '.join(predictions)}; one must be called 'repeat'")
    errors = {way: compute_frame_errors(pixels, actual, lpips) for way, pixels in predictions.items()}
    report: dict[str, Any] = {"num_clips": len(actual), "num_animations": len(set(names)), "num_frames": actual.shape[2]}
    for measure in ("mse", "lpips"):
        report[measure] = {}
        repeated = errors["repeat"][measure].mean(dim=1)
        for way in predictions:
            each = errors[way][measure].mean(dim=1)  # [N]
            scores: dict[str, Any] = {
                "mean": estimate_mean(each.tolist(), names).to_dict(),
                "by_frame": errors[way][measure].mean(dim=0).tolist(),
            }
            if way != "repeat":
                scores["difference"] = estimate_mean((each - repeated).tolist(), names).to_dict()
                scores["better"] = estimate_mean((each < repeated).double().tolist(), names).to_dict()
            report[measure][way] = scores
    return report
