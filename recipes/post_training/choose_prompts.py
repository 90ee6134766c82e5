"""Prompts to collect preferences on, and others to measure on: no caption is in both.

In: images.parquet of the mini core. Out: prompts.txt (captions of the training split) and heldout.jsonl ({"id", "prompt"}): captions of
held-out combinations of concept and style or tone, and as many of the training split that are not in prompts.txt.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from openemu3.data.samples import read_columns


@dataclass(frozen=True)
class ChoosePrompts:
    """Flags of this script."""

    samples: Path
    """Parquet file of samples."""
    output: Path
    """Folder to write to."""
    num_prompts: int = 160
    """Prompts to collect preferences on."""
    num_heldout: int = 120
    """Prompts to measure on, at most."""
    seed: int = 0

    def run(self) -> None:
        rows = [row for row in read_columns(self.samples, ["id", "captions", "split"], kind="image") if "en" in row["captions"]]
        lottery = random.Random(self.seed)
        seen = [row for row in rows if row["split"] == "train"]
        new = [row for row in rows if row["split"] == "heldout_combination"]
        lottery.shuffle(seen), lottery.shuffle(new)
        asked = list(dict.fromkeys(row["captions"]["en"] for row in seen))[: self.num_prompts]
        unused = [row for row in seen if row["captions"]["en"] not in set(asked)]
        new = [row for row in new if row["captions"]["en"] not in set(asked)][: self.num_heldout // 2]
        measured = [*new, *unused[: self.num_heldout - len(new)]]
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "prompts.txt").write_text("".join(prompt + "\n" for prompt in asked), encoding="utf-8")
        lines = [json.dumps({"id": row["id"], "prompt": row["captions"]["en"], "split": row["split"]}) + "\n" for row in measured]
        (self.output / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{self.output}: {len(asked)} prompts, {len(measured)} held out ({len(new)} of them new combinations)")


if __name__ == "__main__":
    tyro.cli(ChoosePrompts).run()
