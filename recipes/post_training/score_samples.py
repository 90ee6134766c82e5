"""Give the mini set score columns to choose by, so that `emu3 select` has something to rank.

HPSv2.1, MPS and the LAION aesthetic head cannot be had inside package registries, so three measures of pixels stand in for them here; they
are named as what they are. In: images.parquet of the mini core. Out: the pictures of it with three scores more.

    python recipes/post_training/score_samples.py --samples .cache/mini_core/images.parquet --output runs/post_training/scored.parquet
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from openemu3.data.samples import read_samples, write_samples
from openemu3.data.shards import spread_evenly
from openemu3.media import read_image

SCORES = ("contrast", "colourfulness", "sharpness")


@dataclass(frozen=True)
class ScoreSamples:
    """Flags of this script."""

    samples: Path
    """Parquet file of samples."""
    output: Path
    """File to write."""
    max_samples: int | None = None
    """Take so many, evenly spread; all otherwise."""

    def run(self) -> None:
        samples = list(read_samples(self.samples, kind="image"))
        if self.max_samples is not None and len(samples) > self.max_samples:
            samples = [samples[index] for index in spread_evenly(len(samples), self.max_samples)]  # a stride would meet one skin tone alone
        scored = (replace(sample, scores={**sample.scores, **score_picture(read_image(sample.media)[:, 0])}) for sample in samples)
        print(f"{self.output}: {write_samples(self.output, scored)} samples with {', '.join(SCORES)}")


def score_picture(picture: Tensor) -> dict[str, float]:
    """Three measures of a picture [3, H, W] in [-1, 1].

    contrast: standard deviation of luma. colourfulness: Hasler and Suesstrunk 2003. sharpness: mean magnitude of the luma's Laplacian.
    """
    red, green, blue = (picture + 1) * 127.5
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    one, other = red - green, (red + green) / 2 - blue
    colourfulness = torch.hypot(one.std(), other.std()) + 0.3 * torch.hypot(one.mean(), other.mean())
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    return {"contrast": float(luma.std()), "colourfulness": float(colourfulness), "sharpness": float(laplacian.abs().mean())}


if __name__ == "__main__":
    tyro.cli(ScoreSamples).run()
