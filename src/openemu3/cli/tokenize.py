"""Samples to token documents: `emu3 tokenize`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tyro.conf import Positional

from openemu3.cli.options import (
    Device,
    Files,
    Json,
    check_files,
    check_outputs,
    choose_device,
    print_answer,
    show_progress,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)


@dataclass(frozen=True)
class Tokenize:
    """Turn samples (pictures and clips with captions) into token documents, which a language model learns from.

    Each caption gives documents in both orders: caption before medium, to draw or film, and medium before caption, to describe.
    """

    samples: Positional[Files]
    """Parquet files of samples, at least one."""
    tokenizers: Path
    """Folder with the vision tokenizer and the text vocabulary, as `emu3 export tokenizers` writes it."""
    output: Path
    """File of documents to write, .parquet."""
    languages: tuple[str, ...] = ("en", "zh")
    """Captions to use, by their language."""
    batch_size: int = 16
    """Pictures that are encoded together."""
    clip_frames: int = 16
    """Frames of one document of a film; a longer film gives several."""
    clip_stride: int = 8
    """Frames between the starts of two of them."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    json: Json = False

    def run(self) -> None:
        from collections import Counter
        from itertools import chain

        from openemu3.data.documents import write_documents
        from openemu3.data.samples import read_columns, read_samples
        from openemu3.records import Sample
        from openemu3.tokenization.encode import EncodeConfig, EncodedDocument, encode_samples
        from openemu3.training.export import compute_fingerprint, load_tokenizers

        config = EncodeConfig(
            languages=self.languages, batch_tokens=self.batch_size * 64, clip_frames=self.clip_frames, clip_stride=self.clip_stride
        )
        check_files("samples", self.samples)
        check_outputs([self.output], [".parquet"])
        began = time.monotonic()
        num_samples = sum(1 for path in self.samples for _ in read_columns(path, ["id"]))
        vision_tokenizer, sequence_format = load_tokenizers(self.tokenizers, choose_device(self.device))
        counts: Counter[str] = Counter()
        with show_progress("tokenizing") as move:

            def read() -> Iterator[Sample]:
                for number, sample in enumerate(chain.from_iterable(map(read_samples, self.samples)), 1):
                    yield sample
                    move(number, num_samples, f"{counts.total():,} documents")

            def count(documents: Iterator[EncodedDocument]) -> Iterator[EncodedDocument]:
                for document in documents:
                    counts[document.source] += 1
                    yield document

            documents = count(encode_samples(read(), vision_tokenizer, sequence_format, config))
            number = write_documents(self.output, documents, compute_fingerprint(self.tokenizers))
        sources = ", ".join(f"{count:,} {source}" for source, count in counts.items())
        answer = {"file": str(self.output), "documents": number, "samples": num_samples, "sources": dict(counts)}
        text = f"{self.output}: {number:,} documents of {num_samples:,} samples ({sources})"
        print_answer(self.json, text, answer | {"seconds": round(time.monotonic() - began, 3)})
