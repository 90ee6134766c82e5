"""What commands share: the model, sizes and drawing as flags, progress bars, answers for people and for programs.

The field names here are flags of many commands; a docstring below a field is its help.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from tyro.conf import arg

from openemu3.records import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from openemu3.generation.tasks import Emu3

    Config = TypeVar("Config", bound=DataclassInstance)


class Command(Protocol):
    def run(self) -> None: ...


class MoveBar(Protocol):
    """Moves a progress bar; a title, if given, replaces the one it has."""

    def __call__(self, done: int, total: int, title: str | None = None) -> None: ...


# ------------------------------------------------------------------------------------------------------------------ what commands share


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str = "mini"
    """Folder with the weights, as published or ours, or "mini", the small one that is part of this package."""
    tokenizer: Path | None = None
    """Folder of the vision tokenizer, where it is not in the model's (the published Emu3-VisionTokenizer)."""
    adapter: Path | None = None
    """Folder of an adapter (LoRA) to merge in, as `emu3 export adapter` writes it."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the language model; the vision tokenizer is always float32."""

    def load(self) -> Emu3:
        with show_progress(f"loading {self.model}"):
            import torch

            from openemu3.generation.tasks import Emu3

            device, dtype = choose_device(self.device), getattr(torch, self.dtype)
            emu3 = Emu3.load(self.model, tokenizer_folder=self.tokenizer, device=device, dtype=dtype)
            if self.adapter is not None:
                from openemu3.training.lora import load_adapter

                load_adapter(emu3.engine.transformer, self.adapter)
            return emu3


@dataclass(frozen=True)
class DrawingOptions:
    """How visual tokens are drawn; what is not given is as the model wants it."""

    negative_prompt: str | None = None
    """What to keep away from, in words; "" for nothing."""
    guidance: float | None = None
    """How strongly the sentence counts (classifier-free guidance); 1 is without."""
    temperature: float | None = None
    """0 takes the likeliest token each time; 1 leaves the distribution as it is."""
    top_k: int | None = None
    """Choose among the k likeliest tokens; 0 for all."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together reach this probability; 1 for all."""
    seed: int = 0
    """The same seed gives the same result."""


@dataclass(frozen=True)
class SizeOptions:
    """Size of the picture: height and width, or an aspect ratio at the resolution."""

    height: int | None = None
    """Pixels, a multiple of 8."""
    width: int | None = None
    """Pixels, a multiple of 8."""
    aspect_ratio: str = "1:1"
    """Width:height, whole numbers."""
    resolution: int | None = None
    """Side of the square of the same area; otherwise what the model was trained on."""


@dataclass(frozen=True)
class TextOptions:
    """How text is written."""

    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability; 1 for all."""
    seed: int = 0
    """The same seed gives the same answer."""


Device = Literal["auto", "cpu", "cuda"]
Json = Annotated[bool, arg(name="json", help="Print one JSON object instead of text.")]
Files = tuple[Path, ...]


def choose_device(device: Device) -> str:
    """The device that is meant, in torch's words. Raises InputError for a GPU that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no GPU here; allowed are auto and cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


@contextmanager
def show_progress(title: str) -> Iterator[MoveBar]:
    """A bar on stderr for as long as the block runs; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # In a log or a pipe there is nobody to see a bar move, and rich would leave empty lines there.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)

        def move(done: int, total: int, title: str | None = None) -> None:
            bars.update(task, completed=done, total=total, description=title)

        yield move


def print_answer(as_json: bool, text: str, answer: dict[str, Any]) -> None:
    """Text for a person, or one JSON object for a program."""
    print(json.dumps(answer, ensure_ascii=False) if as_json else text)


def check_outputs(paths: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Finds out before the work whether the files can be written: their suffix, and their folder. Raises InputError or OSError."""
    from openemu3 import media

    for path in paths:
        media.check_suffix(path, suffixes)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder, a file name is needed")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"cannot write {path}: its folder is read-only")


# ------------------------------------------------------------------------------------------------------------------------------ generate


def check_files(name: str, paths: Sequence[Path]) -> None:
    if not paths:
        raise InputError(f"no file of {name} was given; at least one is needed")


def report_files(as_json: bool, paths: Sequence[Path], began: float, **facts: object) -> None:
    """Says which files were written."""
    names = [str(path) for path in paths]
    print_answer(as_json, "\n".join(names), {"files": names, "seconds": round(time.monotonic() - began, 3), **facts})


def print_tables(as_json: bool, report: dict[str, Any], tables: Sequence[Any]) -> None:
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)


def report_folder(as_json: bool, folder: Path) -> None:
    """Says what a folder holds."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = f"{folder}: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    print_answer(as_json, text, {"folder": str(folder), "files": sizes})
