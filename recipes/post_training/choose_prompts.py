"""Prompts to collect preferences on, others to choose settings by, and others again to measure on: no caption is in two of them.

In: images.parquet of the mini core. Out: prompts.txt (captions of the training split), tuning.jsonl and heldout.jsonl
({"id", "prompt", "split"}): captions of the training split, and for tuning those of held-out combinations of concept and style or tone, for
measuring those of held-out concepts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from openemu3.data.samples import read_columns


@dataclass(frozen=True)
class ChoosePrompts:
    """Flags of this script."""

    samples: Path
    """Parquet file of samples."""
    output: Path
    """Folder to write to."""
    num_prompts: int = 640
    """Prompts to collect preferences on."""
    num_tuning: int = 96
    """Prompts to choose settings by: at most half of them are of new combinations."""
    num_heldout: int = 160
    """Prompts to measure on, at most half of them of new concepts."""
    seed: int = 0

    def run(self) -> None:
        splits: dict[str, list[dict[str, Any]]] = {"train": [], "heldout_combination": [], "heldout_picture": []}
        for row in read_columns(self.samples, ["id", "captions", "split"], kind="image"):
            if "en" in row["captions"] and row["split"] in splits:
                splits[row["split"]].append(row)
        lottery = random.Random(self.seed)
        for rows in splits.values():
            lottery.shuffle(rows)
        seen = splits["train"]
        asked = list(dict.fromkeys(row["captions"]["en"] for row in seen))[: self.num_prompts]
        used = set(asked)

        def take(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
            """The first rows whose captions have not been used; from now on they have."""
            taken: dict[str, dict[str, Any]] = {}
            for row in rows:
                caption = row["captions"]["en"]
                if len(taken) < most and caption not in used:
                    taken.setdefault(caption, row)
            used.update(taken)
            return list(taken.values())

        tuning = take(splits["heldout_combination"], self.num_tuning // 2)
        tuning += take(seen, self.num_tuning - len(tuning))
        heldout = take(splits["heldout_picture"], self.num_heldout // 2)
        heldout += take(seen, self.num_heldout - len(heldout))
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "prompts.txt").write_text("".join(prompt + "\n" for prompt in asked), encoding="utf-8")
        for name, chosen in (("tuning", tuning), ("heldout", heldout)):
            lines = [json.dumps({"id": row["id"], "prompt": row["captions"]["en"], "split": row["split"]}) + "\n" for row in chosen]
            (self.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{self.output}: {len(asked)} prompts, {len(tuning)} to choose settings by, {len(heldout)} to measure on")


if __name__ == "__main__":
    tyro.cli(ChoosePrompts).run()
