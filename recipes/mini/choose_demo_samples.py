"""Which samples the demo asks for: 48 pictures to draw (12 of them held-out combinations), 12 to read off, 8 films.

In: images.parquet and videos.parquet as prepare_samples.py writes them. Out: demo.parquet, which ships beside the weights.
The surprising thing: nothing here looks at what a model makes of them. The choice is a lottery by hash, one sample of a subgroup
(symbols and flags left out, for nobody wants to see a page of arrows), so that the page shows how good the model is and not how
long somebody searched. A film's row holds the still picture of its concept: the animations themselves are not ours to ship.

    python recipes/mini/choose_demo_samples.py --data .cache/mini_core --output demo.parquet
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from openemu3.data.samples import read_samples, write_samples
from openemu3.records import InputError, Sample

DULL_GROUPS = ("symbols", "flags")
CHINESE_EVERY = 6  # draw samples


@dataclass(frozen=True)
class Choice:
    """Flags of this script."""

    data: Path = Path(".cache/mini")
    output: Path = Path(".cache/mini/demo.parquet")
    seed: int = 0
    min_motion: float = 8.0  # of films seen in training: mean difference of neighbouring frames, 0 to 255


def choose_samples(images: Sequence[Sample], videos: Sequence[Sample], seed: int, min_motion: float) -> list[Sample]:
    """The demo samples in the page's order. Raises InputError if there are not enough to choose from."""
    taken: set[str] = set()

    def draw(number: int, wanted: Callable[[Sample], bool], among: Iterable[Sample] = images) -> list[Sample]:
        """`number` samples in lottery order, each of another subgroup as far as there are so many, and of a concept not taken yet."""

        def rank(sample: Sample) -> bytes:
            return hashlib.sha256(f"{seed}/{sample.id}".encode()).digest()

        chosen: list[Sample] = []
        candidates = sorted((s for s in among if wanted(s) and s.attributes["group"] not in DULL_GROUPS), key=rank)
        for fresh_subgroup in (True, False):
            subgroups = {sample.attributes["subgroup"] for sample in chosen}
            for sample in candidates:
                is_new = sample.attributes["subgroup"] not in subgroups or not fresh_subgroup
                if len(chosen) < number and is_new and sample.attributes["concept"] not in taken:
                    chosen.append(sample)
                    taken.add(sample.attributes["concept"])
                    subgroups.add(sample.attributes["subgroup"])
        if len(chosen) < number:
            raise InputError(f"there are {len(chosen)} samples to choose from; {number} are needed")
        return chosen

    def is_picture(split: str, style: str, toned: bool) -> Callable[[Sample], bool]:
        return lambda s: s.split == split and s.attributes["style"] == style and bool(s.attributes["tone"]) == toned

    seen = (
        draw(24, is_picture("train", "3D", False)) + draw(6, is_picture("train", "flat", False)) + draw(6, is_picture("train", "3D", True))
    )
    unseen = draw(6, is_picture("heldout_combination", "flat", False)) + draw(6, is_picture("heldout_combination", "3D", True))
    read = draw(6, is_picture("train", "3D", False))
    read += draw(6, lambda s: s.split == "heldout_combination")
    films = draw(6, lambda s: s.split == "train" and float(s.attributes["motion"]) >= min_motion, videos)
    films += draw(2, lambda s: s.split == "heldout_video", videos)

    stills = {s.attributes["hexcode"]: s.media for s in images if s.attributes["style"] == "3D"}
    drawn = [
        # Most of the core's samples have no Chinese caption.
        _mark(s, "draw", "zh" if index % CHINESE_EVERY == CHINESE_EVERY - 1 and "zh" in s.captions else "en")
        for index, s in enumerate(seen + unseen)
    ]
    filmed = [dataclasses.replace(_mark(s, "film", "en"), kind="image", media=stills[s.attributes["hexcode"]]) for s in films]
    return drawn + [_mark(s, "read", "en") for s in read] + filmed


def _mark(sample: Sample, use: str, language: str) -> Sample:
    return dataclasses.replace(sample, attributes={**sample.attributes, "demo": use, "demo_language": language})


def main(choice: Choice) -> None:
    videos = (dataclasses.replace(sample, media=b"-") for sample in read_samples(choice.data / "videos.parquet"))  # 70 MB of frames
    samples = choose_samples(list(read_samples(choice.data / "images.parquet")), list(videos), choice.seed, choice.min_motion)
    print(f"{write_samples(choice.output, samples)} samples, {choice.output.stat().st_size} bytes: {choice.output}")


if __name__ == "__main__":
    main(tyro.cli(Choice))
