"""Pure language for the image-to-text stage: what the emoji names say of each other, without any picture.

In: images.parquet of the mini core. Out: JSON Lines of {"text"}, one for each concept of the training split: its name and where it belongs.
A stand-in for a language corpus, as small as the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from openemu3.data.samples import read_columns


@dataclass(frozen=True)
class WriteTexts:
    """Flags of this script."""

    samples: Path
    """Parquet file of samples."""
    output: Path
    """File to write, .jsonl."""

    def run(self) -> None:
        texts: dict[str, None] = {}
        for row in read_columns(self.samples, ["attributes"], splits={"train"}, kind="image"):
            attributes = row["attributes"]
            place = attributes["subgroup"].replace("-", " ")
            texts[f"{attributes['concept']}: {place}"] = None
            if attributes.get("concept_zh"):
                texts[f"{attributes['concept']}: {attributes['concept_zh']}"] = None
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
        print(f"{self.output}: {len(texts)} texts")


if __name__ == "__main__":
    tyro.cli(WriteTexts).run()
