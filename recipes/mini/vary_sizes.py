"""Training pictures at several sizes: what is shown at one size alone is learnt by heart, and no other size can be preferred.

In: a file of samples. Out: the same with every training picture at each of the --sizes, parts of its own, in the middle of white;
captions are the same. Clips and what is held out stay as they are.
The surprising thing: no picture is enlarged, so the largest that a subject gets is what it was.

    python recipes/mini/vary_sizes.py .cache/mini_core/images.parquet sizes.parquet
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageOps
from prepare_samples import encode_picture

from openemu3.data.samples import read_samples, write_samples
from openemu3.media import read_image, to_pil
from openemu3.records import InputError, Sample


@dataclass(frozen=True)
class VarySizes:
    """Flags of this script."""

    samples: tyro.conf.Positional[Path]
    """Parquet file of samples."""
    output: tyro.conf.Positional[Path]
    """Parquet file to write."""
    sizes: tuple[float, ...] = (1.0, 0.85, 0.7)
    """What to multiply width and height by, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if not self.sizes or len(set(self.sizes)) < len(self.sizes) or not all(0 < size <= 1 for size in self.sizes):
            raise InputError(f"--sizes are {self.sizes}; they must be different numbers above 0 and at most 1, at least one")

    def run(self) -> None:
        count = write_samples(self.output, vary_sizes(read_samples(self.samples), self.sizes))
        print(f"{self.output}: {count} samples")


def vary_sizes(samples: Iterable[Sample], sizes: Sequence[float]) -> Iterator[Sample]:
    """In order; the id tells a picture's sizes apart ("3D/1F600 0.85")."""
    for sample in samples:
        if sample.split != "train" or sample.kind != "image":
            yield sample
            continue
        picture = to_pil(read_image(sample.media))[0]
        for size in sizes:
            yield replace(sample, id=f"{sample.id} {size:g}", media=encode_picture(np.asarray(shrink(picture, size))))


def shrink(picture: Image.Image, factor: float) -> Image.Image:
    """The picture smaller by the factor, in the middle of a white one of its own size; the sides stay even or odd, as they are."""
    across, down = (max(0, side // 2 - max(1, round(side * factor / 2))) for side in picture.size)
    small = picture.resize((picture.width - 2 * across, picture.height - 2 * down), Image.Resampling.LANCZOS)
    return ImageOps.expand(small, (across, down), "white")


if __name__ == "__main__":
    try:
        tyro.cli(VarySizes).run()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
