"""Learn the mini model's text vocabulary from the captions it is trained on.

In: the Parquet files of prepare_samples.py. Out: a tiktoken ranks file, and the mean number of tokens a caption takes.
The surprising thing: besides the captions of the training splits (English and Chinese), the corpus holds the meta texts of the document
format and a few ways of asking, each as often as `TEMPLATE_REPEATS`, so that these common strings don't fall apart into bytes.

    python recipes/mini/train_text.py [--samples FILE ...] [--output FILE]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro

from openemu3.data.samples import read_columns
from openemu3.records import InputError
from openemu3.tokenization.text import TextTokenizer, train_text_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "mini"
TEMPLATE_TEXTS = (
    "8*8",
    "4*8*8 8fps 2s",
    "What is this?",
    "What is in the picture?",
    "Describe the picture.",
    "Please describe the image.",
    "You are a helpful assistant. USER: ",
    " ASSISTANT:",
    "这是什么？",
    "请描述这张图片。",
)
TEMPLATE_REPEATS = 100


@dataclass(frozen=True)
class TextTraining:
    """Learn a byte-level BPE from the captions of training samples.

    Args:
        samples: Parquet files of samples.
        output: the ranks file to write.
        num_tokens: tokens wanted, the 256 bytes included.
        list_texts: print the corpus, one text a line, and learn nothing.
    """

    samples: tuple[Path, ...] = (FOLDER / "images.parquet", FOLDER / "videos.parquet")
    output: Path = FOLDER / "text.tiktoken"
    num_tokens: int = 2048
    list_texts: bool = False


def list_captions(samples: tuple[Path, ...], splits: tuple[str, ...] | None = ("train",)) -> Iterator[tuple[str, str]]:
    """(language, caption) of every sample of the splits, in order; None for all splits."""
    for path in samples:
        for row in read_columns(path, ["captions"], splits):
            yield from sorted(row["captions"].items())


def list_corpus(samples: tuple[Path, ...]) -> Iterator[str]:
    """Every text the vocabulary is learnt from."""
    for _, caption in list_captions(samples):
        yield caption
    for text in TEMPLATE_TEXTS:
        yield from [text] * TEMPLATE_REPEATS


def main(training: TextTraining) -> None:
    if training.list_texts:
        for text in list_corpus(training.samples):
            print(text)
        return
    ranks = train_text_tokenizer(list_corpus(training.samples), training.num_tokens)
    training.output.parent.mkdir(parents=True, exist_ok=True)
    partial = training.output.with_name(f".{training.output.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(ranks)
        partial.replace(training.output)
    finally:
        partial.unlink(missing_ok=True)
    tokenizer = TextTokenizer.from_file(training.output)
    print(f"{training.output}: {tokenizer.num_tokens} tokens, fingerprint {tokenizer.fingerprint[:16]}")
    for name, splits in (("training", ("train",)), ("held-out", ("heldout_combination", "heldout_picture", "heldout_video"))):
        for language in ("en", "zh"):
            lengths = [len(tokenizer.encode(text)) for spoken, text in list_captions(training.samples, splits) if spoken == language]
            print(f"{name} captions, {language}: {mean(lengths):.2f} tokens on average, {max(lengths)} at most, of {len(lengths)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(TextTraining))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
