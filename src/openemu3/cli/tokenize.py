"""Samples, folders, tars, data sets and texts to token documents: `emu3 tokenize`; and how they will pack: `emu3 pack`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from openemu3.cli.options import Device, Files, Json, check_files, choose_device, print_answer, show_progress

if TYPE_CHECKING:
    from openemu3.data.corpus import CorpusSummary, Progress

LINE_EVERY = 60.0  # seconds between two lines of progress where nobody sees a bar


@dataclass(frozen=True)
class Tokenize:
    """Turn pictures, films and texts into token documents, which a language model learns from.

    Takes Parquet files of samples, folders of pictures and films with .txt or .json captions beside them, WebDataset tars, folders of
    Hugging Face datasets, and texts (.jsonl, .parquet, .txt). A run that was stopped goes on when the same command is given again.
    """

    samples: Positional[Files]
    """Files and folders, at least one."""
    tokenizers: Path
    """Folder with the vision tokenizer and the text vocabulary, as `emu3 export tokenizers` writes it."""
    output: Path
    """Folder of documents to write."""
    languages: tuple[str, ...] = ("en", "zh")
    """Captions to use, by their language; those that state none are always used."""
    generation_share: float = 1.0
    """Part of the captions written before their medium, to draw or film. Where both shares make at most 1, none is written both ways."""
    understanding_share: float = 1.0
    """Part of the captions written after their medium, to describe."""
    resolution: int | None = None
    """Side of the square to whose area pictures and frames are fitted; otherwise they stay as they are, in multiples of 8 pixels."""
    fps: float | None = None
    """Frames a second to take of films that do not say; otherwise all that are stored."""
    clip_frames: int = 16
    """Frames of one document of a film; a longer film gives several. 0: the whole film is one."""
    clip_stride: int = 8
    """Frames between the starts of two of them."""
    batch_tokens: int = 4096
    """Codes that are made together: one picture of 512 x 512, or 64 of 64 x 64."""
    dataset: str | None = None
    """Name of the data set, for mixtures; otherwise that of the file or folder."""
    text_column: str | None = None
    """Column of texts and captions in tables and JSON; otherwise text or caption."""
    text_unit: Literal["file", "paragraph", "line"] = "file"
    """What is one document of a .txt file."""
    validation_share: float = 0.0
    """Part held out as split "validation", where the input says nothing of splits."""
    samples_per_shard: int = 1024
    """Samples whose documents are one file."""
    worker: int = 0
    """Which of several workers this is; each takes every n-th shard."""
    num_workers: int = 1
    """How many workers there are."""
    seed: int = 0
    """Of the lottery of the shares."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    json: Json = False

    def run(self) -> None:
        from dataclasses import asdict

        from openemu3.data.corpus import write_corpus
        from openemu3.data.inputs import InputConfig, open_inputs
        from openemu3.tokenization.encode import EncodeConfig
        from openemu3.training.export import compute_fingerprint, load_tokenizers

        check_files("samples", self.samples)
        config = EncodeConfig(
            languages=self.languages,
            generation_share=self.generation_share,
            understanding_share=self.understanding_share,
            batch_tokens=self.batch_tokens,
            resolution=self.resolution,
            fps=self.fps,
            clip_frames=self.clip_frames or None,
            clip_stride=self.clip_stride,
            seed=self.seed,
        )
        reading = InputConfig(self.dataset, self.text_column, self.text_unit, self.validation_share)
        began = time.monotonic()
        inputs = open_inputs(self.samples, reading)
        vision_tokenizer, sequence_format = load_tokenizers(self.tokenizers, choose_device(self.device))
        with _show_speed() as progress:
            summary = write_corpus(
                self.output,
                inputs,
                vision_tokenizer,
                sequence_format,
                config,
                compute_fingerprint(self.tokenizers),
                samples_per_shard=self.samples_per_shard,
                settings=asdict(reading),
                worker=self.worker,
                num_workers=self.num_workers,
                progress=progress,
            )
        answer = {"folder": str(self.output), **asdict(summary), "seconds": round(time.monotonic() - began, 3)}
        print_answer(self.json, f"{self.output}: {_describe(summary)}", answer)


@dataclass(frozen=True)
class Pack:
    """Show how documents will pack into rows of a context length: how full, how many texts are cut, what is left out and why."""

    documents: Positional[Files]
    """Folders of `emu3 tokenize`, or files of documents."""
    context_length: int = 5120
    """Tokens of a row."""
    split: str = "train"
    """Which part of them."""
    mixture: dict[str, float] | None = None
    """How often a document of each source or data set comes in an epoch, in pairs such as draw 1 describe 0.25; 1 for what is not named."""
    shares: dict[str, float] | None = None
    """Instead: which part of the tokens each has, in pairs such as text 0.2 draw 0.8; what is not named is left out."""
    seed: int = 0
    """Of the order of the documents."""
    json: Json = False

    def run(self) -> None:
        from dataclasses import asdict

        from openemu3.data.loader import LoaderConfig, TokenLoader
        from openemu3.data.mixture import MixtureConfig
        from openemu3.data.shards import DocumentStore

        check_files("documents", self.documents)
        store = DocumentStore(self.documents, {self.split})
        mixture = MixtureConfig(self.mixture or {}, self.shares or {})
        report = TokenLoader(store, LoaderConfig(self.context_length, mixture=mixture, prefetch=0, seed=self.seed), pad_id=0).report
        print_answer(self.json, report.describe(), asdict(report) | {"fill_rate": report.fill_rate})


def _describe(summary: CorpusSummary) -> str:
    sources = ", ".join(f"{count:,} {source}" for source, count in summary.sources.items())
    text = f"{summary.num_documents:,} documents ({sources}), {summary.num_tokens:,} tokens, of {summary.num_items:,} samples"
    if summary.num_refused:
        where = "refused.jsonl says why" if summary.complete else "the shards' .json files say why"
        text += f"; {summary.num_refused:,} could not be read, {where}"
    return text if summary.complete else text + "; other workers' shards are still missing"


@contextmanager
def _show_speed() -> Iterator[Callable[[Progress], None]]:
    """A bar with samples and tokens a second and the time left; where stderr is a file or a pipe, a line a minute."""
    first: Progress | None = None
    began = last = time.monotonic()
    with show_progress("tokenizing") as move:

        def show(progress: Progress) -> None:
            nonlocal first, began, last
            now = time.monotonic()
            if first is None:
                first, began = progress, now  # what an earlier run did says nothing about this one's speed
            seconds = max(now - began, 1e-9)
            samples, tokens = (progress.num_items - first.num_items) / seconds, (progress.num_tokens - first.num_tokens) / seconds
            title = f"{samples:,.1f} samples/s, {tokens:,.0f} tokens/s" + (
                f", {progress.num_refused:,} refused" * bool(progress.num_refused)
            )
            move(progress.num_items, progress.total_items, title)
            if now - last >= LINE_EVERY and not sys.stderr.isatty():
                left = (progress.total_items - progress.num_items) / samples if samples else float("inf")
                print(f"{progress.num_items:,} of {progress.total_items:,} samples, {title}, {left / 60:,.0f} min left", file=sys.stderr)
                last = now

        yield show
