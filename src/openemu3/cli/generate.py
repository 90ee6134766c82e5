"""Commands that ask a model: `emu3 generate`, `describe`, `answer`, `chat` and `demo`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from tyro.conf import Positional, subcommand

from openemu3.cli.options import (
    DrawingOptions,
    Files,
    Json,
    ModelOptions,
    SizeOptions,
    TextOptions,
    check_outputs,
    print_answer,
    report_files,
    show_progress,
)
from openemu3.records import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)


@dataclass(frozen=True)
class GenerateImage:
    """Draw pictures of a sentence."""

    prompt: Positional[str]
    """What to draw."""
    output: Path = Path("outputs/picture.png")
    """File to write: .png, .jpg or .webp. Several pictures get -0, -1, ... at the end of the name."""
    num_images: int = 1
    """How many pictures."""
    json: Json = False
    size: SizeOptions = field(default_factory=SizeOptions)
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        from openemu3 import media

        if self.num_images < 1:
            raise InputError(f"num-images is {self.num_images}; at least 1 is allowed")
        several = self.num_images > 1
        paths = [self.output.with_stem(f"{self.output.stem}-{index}") if several else self.output for index in range(self.num_images)]
        check_outputs(paths, list(media.IMAGE_SUFFIXES))
        emu3 = self.model.load()
        began = time.monotonic()
        with show_progress("drawing") as move:
            pictures = emu3.draw(self.prompt, num_images=self.num_images, progress=move, **asdict(self.size), **asdict(self.drawing))
        for path, picture in zip(paths, pictures, strict=True):
            media.write_image(path, media.from_pil(picture))
        report_files(
            self.json, paths, began, prompt=self.prompt, seed=self.drawing.seed, height=pictures[0].height, width=pictures[0].width
        )


@dataclass(frozen=True)
class GenerateVideo:
    """Make a film of a sentence."""

    prompt: Positional[str]
    """What happens in it."""
    output: Path = Path("outputs/film.mp4")
    """File to write: .mp4, .gif or .webp."""
    seconds: float = 2.0
    """Length; what is longer than the model's own clips is continued piece by piece."""
    fps: float | None = None
    """Frames per second; otherwise as the model was trained."""
    json: Json = False
    size: SizeOptions = field(default_factory=SizeOptions)
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        check_outputs([self.output], _list_film_suffixes())
        emu3 = self.model.load()
        began = time.monotonic()
        with show_progress("filming") as move:
            film = emu3.film(self.prompt, self.seconds, self.fps, progress=move, **asdict(self.size), **asdict(self.drawing))
        film.save(self.output)
        facts = {"fps": film.fps, "num_frames": film.num_frames, "height": film.pixels.shape[2], "width": film.pixels.shape[3]}
        report_files(self.json, [self.output], began, prompt=self.prompt, seed=self.drawing.seed, **facts)


@dataclass(frozen=True)
class GenerateContinue:
    """Continue a film past its end. The new file holds the given frames and the new ones."""

    film: Positional[Path]
    """Video file, animated GIF or animated WebP."""
    output: Path = Path("outputs/continued.mp4")
    """File to write: .mp4, .gif or .webp."""
    seconds: float = 2.0
    """How much longer it becomes."""
    prompt: str = ""
    """What happens in it, if there is something to say."""
    json: Json = False
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        from openemu3 import media

        check_outputs([self.output], _list_film_suffixes())
        media.probe_video(self.film)  # a bad file is told before the model is loaded
        emu3 = self.model.load()
        began = time.monotonic()
        with show_progress("continuing") as move:
            film = emu3.continue_film(self.film, self.seconds, self.prompt, progress=move, **asdict(self.drawing))
        film.save(self.output)
        report_files(self.json, [self.output], began, seed=self.drawing.seed, fps=film.fps, num_frames=film.num_frames)


@dataclass(frozen=True)
class Generate:
    """Draw pictures, make films, continue films."""

    task: (
        Annotated[GenerateImage, subcommand("image")]
        | Annotated[GenerateVideo, subcommand("video")]
        | Annotated[GenerateContinue, subcommand("continue")]
    )

    def run(self) -> None:
        self.task.run()


def _list_film_suffixes() -> list[str]:
    from openemu3 import media

    return [*media.VIDEO_SUFFIXES, *media.ANIMATION_SUFFIXES]


@dataclass(frozen=True)
class Describe:
    """Say what pictures and films show, each by itself."""

    media: Positional[Files]
    """Picture and video files, at least one."""
    json: Json = False
    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        if not self.media:
            raise InputError("no file was given; at least one picture or film is needed")
        check_media(self.media)
        emu3 = self.model.load()
        with show_progress("reading") as move:
            texts = emu3.describe(list(self.media), progress=move, **asdict(self.text))
        lines = texts if len(texts) == 1 else [f"{path}: {text}" for path, text in zip(self.media, texts, strict=True)]
        answer = [{"file": str(path), "text": text} for path, text in zip(self.media, texts, strict=True)]
        print_answer(self.json, "\n".join(lines), {"descriptions": answer})


@dataclass(frozen=True)
class Answer:
    """Answer a question, about pictures and films or about nothing. The mini model was not trained for this."""

    question: Positional[str]
    """What you want to know."""
    media: Positional[Files] = ()
    """Picture and video files that the question is about."""
    json: Json = False
    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        check_media(self.media)
        emu3 = self.model.load()
        with show_progress("answering") as move:
            text = emu3.answer(list(self.media), self.question, progress=move, **asdict(self.text))
        print_answer(self.json, text, {"question": self.question, "files": [str(path) for path in self.media], "text": text})


@dataclass(frozen=True)
class Chat:
    """Talk with the model: type a line, get an answer. The mini model was not trained for this.

    "/show FILE" shows a picture or film together with your next line; an empty line ends the talk.
    """

    json: Json = False
    """Print each answer as one JSON object on one line."""
    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        emu3 = self.model.load()
        from openemu3.generation.tasks import Exchange

        turns: list[Exchange] = []
        shown: list[Path] = []
        for line in _read_lines():
            try:
                if line.startswith("/show "):
                    path = Path(line.removeprefix("/show ").strip()).expanduser()
                    check_media([path])
                    shown.append(path)
                    continue
                turn = Exchange(line, tuple(shown))
                with show_progress("answering") as move:
                    text = emu3.chat([*turns, turn], progress=move, **asdict(self.text))
            except InputError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"emu3: {error}", file=sys.stderr)  # a slip of the hand does not end a talk
                continue
            turns.append(Exchange(turn.text, turn.media, text))
            shown = []
            print_answer(self.json, text, {"text": text})
            sys.stdout.flush()


def _read_lines() -> Iterator[str]:
    """Lines typed or piped in, up to the first empty one."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def check_media(paths: Sequence[Path]) -> None:
    """A bad file is told before the model is loaded."""
    from openemu3 import media

    for path in paths:
        media.detect_kind(path)


@dataclass(frozen=True)
class Demo:
    """Make a page of pictures, readings and films by the model, and a gallery: index.html and gallery.png."""

    output: Path = Path("outputs/demo")
    """Folder to write to."""
    seed: int = 0
    """The same seed gives the same pictures."""
    json: Json = False
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        from openemu3 import demo

        began = time.monotonic()
        samples = demo.read_demo_samples(self.model.model)
        check_outputs([self.output / "index.html", self.output / "gallery.png"], [".html", ".png"])
        emu3 = self.model.load()
        with show_progress("starting") as move:
            made = demo.make_demo(emu3, self.model.model, samples, self.seed, lambda part, done, total: move(done, total, part))
        report_files(self.json, demo.write_demo(made, self.output), began, seed=self.seed)
