"""The core of the emoji set: what a CPU can teach a small model within an hour. Writes images.parquet and videos.parquet anew.

In: the files of prepare_samples.py. Out: files of the same form with fewer rows. The surprising thing: nothing is moved between
splits. A picture that was held out stays held out, so that models trained on the core and on everything are measured alike.

Kept: faces, animals, flowers, fruit and sweets, hands, hearts, weather, cars and trains. Left out: tools, clothes and buildings,
professions, variants of one concept by gender, symbols and flags; and clips of anything but faces, animals, hearts and vehicles.
A quarter of the training samples keep their Chinese caption.

    python recipes/mini/select_core.py --data .cache/mini --output .cache/mini_core
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from openemu3.data.samples import read_samples, write_samples
from openemu3.records import Sample

GENDER_VARIANT = re.compile(r"^(man|woman|men|women|boy|girl|deaf man|deaf woman|family|kiss|couple|people)\b.+")
CLIP_SUBGROUPS = frozenset(
    "face-smiling face-affection face-tongue face-unwell cat-face monkey-face heart animal-mammal animal-bird animal-bug animal-marine "
    "transport-ground".split()
)
STILL_SUBGROUPS = CLIP_SUBGROUPS | frozenset(
    "face-concerned face-costume face-glasses face-hand face-hat face-negative face-neutral-skeptical face-sleepy "
    "animal-reptile animal-amphibian food-fruit food-vegetable food-sweet drink plant-flower "
    "hand-fingers-closed hand-fingers-open hand-single-finger sky-weather".split()
)
FILES = ("images.parquet", "videos.parquet")


@dataclass(frozen=True)
class SelectCore:
    """Flags of this script."""

    data: Path = Path(".cache/mini")
    """Folder with the whole set."""
    output: Path = Path(".cache/mini_core")
    """Folder to write the core to."""

    def run(self) -> None:
        for name in FILES:
            splits: Counter[str] = Counter()
            count = write_samples(self.output / name, select_core(read_samples(self.data / name), splits))
            print(f"{self.output / name}: {count} samples, {dict(splits)}")


def select_core(samples: Iterator[Sample], splits: Counter[str]) -> Iterator[Sample]:
    """The samples of the core, in order; `splits` counts them."""
    for sample in samples:
        attributes = sample.attributes
        kept = CLIP_SUBGROUPS if sample.kind == "video" else STILL_SUBGROUPS
        if GENDER_VARIANT.match(attributes["concept"]) or attributes["subgroup"] not in kept:
            continue
        splits[sample.split] += 1
        if sample.split == "train" and not keeps_chinese(sample):
            sample = replace(sample, captions={"en": sample.captions["en"]})
        yield sample


def keeps_chinese(sample: Sample) -> bool:
    """A lottery by hash: a quarter of the samples."""
    return hashlib.sha256(sample.id.encode()).digest()[0] < 64


if __name__ == "__main__":
    tyro.cli(SelectCore).run()
