"""Questions about the mini set's pictures, with answers from what is known of them: conversations in LLaVA's form.

In: images.parquet of the mini core (attributes concept, group, style, tone). Out: train.json and heldout.json, and the pictures as files.
A picture is on one side only. Yes/no questions are balanced: each is asked once with the right and once with a wrong name.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tastes import find_subject
from torch import Tensor

from openemu3.data.samples import read_samples
from openemu3.media import read_image
from openemu3.records import Sample

KINDS = {
    "smileys-emotion": "an emotion",
    "people-body": "people",
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "travel",
}
COLOURS = {  # of the middle of each, red green blue in [-1, 1]
    "red": (0.7, -0.6, -0.6), "orange": (0.9, 0.2, -0.6), "yellow": (0.95, 0.7, -0.4), "green": (-0.3, 0.4, -0.4),
    "blue": (-0.4, 0.1, 0.8), "purple": (0.3, -0.3, 0.7), "pink": (0.9, 0.1, 0.4), "brown": (0.1, -0.25, -0.5),
    "black": (-0.75, -0.75, -0.75), "grey": (0.1, 0.1, 0.15), "white": (0.75, 0.75, 0.8),
}  # fmt: skip


@dataclass(frozen=True)
class AskQuestions:
    """Flags of this script."""

    samples: Path
    """Parquet file of samples."""
    output: Path
    """Folder to write to."""
    max_pictures: int | None = None
    """Take so many pictures of each side; all otherwise."""
    seed: int = 0

    def run(self) -> None:
        lottery = random.Random(self.seed)
        samples = list(read_samples(self.samples, kind="image"))
        names = sorted({sample.attributes["concept"] for sample in samples})
        for side, members in (
            ("train", [sample for sample in samples if sample.split == "train"]),
            ("heldout", [sample for sample in samples if sample.split != "train"]),
        ):
            lottery.shuffle(members)
            rows: list[dict[str, Any]] = []
            for sample in members[: self.max_pictures]:
                file = self.output / "pictures" / f"{sample.id.replace('/', '-')}.webp"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(sample.media)
                for kind, question, answer in ask_about(sample, names, lottery):
                    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                    name = f"{sample.id}#{kind}-{len(rows)}"
                    rows.append({"id": name, "kind": kind, "image": f"pictures/{file.name}", "conversations": turns})
            lottery.shuffle(rows)
            (self.output / f"{side}.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
            print(f"{self.output / side}.json: {len(rows)} questions about {len(members[: self.max_pictures])} pictures")


def ask_about(sample: Sample, names: list[str], lottery: random.Random) -> list[tuple[str, str, str]]:
    """(kind of question, question, answer) of one picture."""
    attributes = sample.attributes
    other = lottery.choice([name for name in names if name != attributes["concept"]])
    styles = ["3D", "flat"] if attributes["style"] == "3D" else ["flat", "3D"]
    asked = [
        ("what", "What is it?", attributes["concept"]),
        ("kind", "What is it about?", KINDS[attributes["group"]]),
        ("style", "Which style is it?", attributes["style"]),
        ("colour", "Which colour is it?", name_colour(read_image(sample.media)[:, 0])),
        ("is it", f"Is it {attributes['concept']}?", "yes"),
        ("is it", f"Is it {other}?", "no"),
        ("is the style", f"Is it {styles[0]}?", "yes"),
        ("is the style", f"Is it {styles[1]}?", "no"),
    ]
    if attributes["tone"]:
        asked.append(("tone", "Which skin tone is it?", attributes["tone"]))
    return asked


def name_colour(picture: Tensor) -> str:
    """The colour that most pixels of the subject are nearest to."""
    pixels = picture[:, find_subject(picture)]
    if not pixels.shape[1]:
        return "white"
    distances = torch.cdist(pixels.t(), torch.tensor(list(COLOURS.values())))
    return list(COLOURS)[int(distances.argmin(1).bincount(minlength=len(COLOURS)).argmax())]


if __name__ == "__main__":
    tyro.cli(AskQuestions).run()
