"""The command `emu3`: one dataclass per subcommand, whose fields are its flags and whose `run` does the work.

In: the command line. Out: files, or text on stdout; progress and errors on stderr. Exit code 0, 2 for bad input (one sentence, no
traceback), 130 for Ctrl-C. The surprising thing: rooms are imported inside `run`, so that `emu3 --help` does not wait for torch.

To add a subcommand: write a frozen dataclass with a docstring (its help) and a `run` method, and name it in `COMMANDS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import tyro
from tyro.conf import Positional, arg, subcommand

from openemu3 import __version__
from openemu3.records import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from openemu3.generation.tasks import Emu3
    from openemu3.training.trainer import Trainer

    Config = TypeVar("Config", bound=DataclassInstance)

# --seed, not --drawing.seed; --json without --no-json; --height INT, not {None}|INT; PROMPT, not STR.
TYRO_MARKERS = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)
BAD_INPUT = 2
INTERRUPTED = 130


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
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the language model; the vision tokenizer is always float32."""

    def load(self) -> Emu3:
        with show_progress(f"loading {self.model}"):
            import torch

            from openemu3.generation.tasks import Emu3

            device, dtype = choose_device(self.device), getattr(torch, self.dtype)
            return Emu3.load(self.model, tokenizer_folder=self.tokenizer, device=device, dtype=dtype)


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
        _report(self.json, paths, began, prompt=self.prompt, seed=self.drawing.seed, height=pictures[0].height, width=pictures[0].width)


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
        _report(self.json, [self.output], began, prompt=self.prompt, seed=self.drawing.seed, **facts)


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
        _report(self.json, [self.output], began, seed=self.drawing.seed, fps=film.fps, num_frames=film.num_frames)


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


def _report(as_json: bool, paths: Sequence[Path], began: float, **facts: object) -> None:
    """Says which files were written."""
    names = [str(path) for path in paths]
    print_answer(as_json, "\n".join(names), {"files": names, "seconds": round(time.monotonic() - began, 3), **facts})


# ------------------------------------------------------------------------------------------------------------------------ understanding


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
        _check_media(self.media)
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
        _check_media(self.media)
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
                    _check_media([path])
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


def _check_media(paths: Sequence[Path]) -> None:
    """A bad file is told before the model is loaded."""
    from openemu3 import media

    for path in paths:
        media.detect_kind(path)


# ---------------------------------------------------------------------------------------------------------------------------------- demo


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
        _report(self.json, demo.write_demo(made, self.output), began, seed=self.seed)


# ------------------------------------------------------------------------------------------------------------------------------ evaluate


@dataclass(frozen=True)
class EvaluateReconstruction:
    """How well the vision tokenizer keeps pictures (PSNR, SSIM, LPIPS, rFID) or films (the paper's protocol)."""

    media: Positional[Path]
    """A file, or a folder that is searched."""
    kind: Literal["image", "video"] = "image"
    """What to measure on."""
    side: int | None = 256
    """Pictures: the short side is resized to it and the middle kept. Films: at 128, 256, 512 and 720 always."""
    sides: tuple[int, ...] = (128, 256, 512, 720)
    """Films: the sizes to measure at."""
    max_items: int | None = None
    """Stop after so many files."""
    no_rfid: bool = False
    """Pictures: leave out the Frechet distance."""
    ssim_window: Literal["gaussian", "uniform"] = "gaussian"
    """11 x 11 as in the SSIM paper, or 7 x 7."""
    model: str = "mini"
    """Folder that holds a vision tokenizer, or "mini"."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    json: Json = False

    def run(self) -> None:
        from openemu3.evaluation import reconstruction

        config = reconstruction.ReconstructionConfig(
            media=self.media,
            kind=self.kind,
            side=self.side,
            protocol=reconstruction.VideoProtocol(sides=self.sides),
            rfid=not self.no_rfid,
            ssim_window=self.ssim_window,
            max_items=self.max_items,
            device=self.device,
        )
        tokenizer = reconstruction.load_tokenizer(self.model, self.device)
        with show_progress("measuring") as move:
            report = reconstruction.run_reconstruction(tokenizer, config, move)
        _print_tables(self.json, report, [reconstruction.build_reconstruction_table(report)])


@dataclass(frozen=True)
class EvaluateMini:
    """The whole report on a model of the emoji recipe: what it was trained on, and what was held out."""

    samples: Path = Path(".cache/mini")
    """Folder with images.parquet and videos.parquet, as recipes/mini/prepare_samples.py writes them."""
    max_pictures: int | None = 100
    """At most so many samples of each set."""
    num_candidates: int = 50
    """Real pictures that a drawing is told apart among."""
    seed: int = 0
    """Of the choice of samples, the drawings and the classifiers."""
    language: Literal["en", "zh"] = "en"
    """Of the captions that are drawn from."""
    sheets: Path | None = None
    """Folder for PNG sheets of real pictures above drawn ones."""
    json: Json = False
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        from openemu3.evaluation import report

        config = report.ReportConfig(
            samples=self.samples,
            max_pictures=self.max_pictures,
            num_candidates=self.num_candidates,
            seed=self.seed,
            language=self.language,
            sheets=self.sheets,
        )
        emu3 = self.model.load()
        with show_progress("measuring") as move:
            numbers = report.run_report(emu3, config, move)
        _print_tables(self.json, numbers, report.build_report_tables(numbers))


@dataclass(frozen=True)
class Evaluate:
    """Measure: the vision tokenizer on any pictures and films, or the mini model on its recipe's samples."""

    what: Annotated[EvaluateReconstruction, subcommand("reconstruction")] | Annotated[EvaluateMini, subcommand("mini")]

    def run(self) -> None:
        self.what.run()


def _print_tables(as_json: bool, report: dict[str, Any], tables: Sequence[Any]) -> None:
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)


# ------------------------------------------------------------------------------------------------------------------ tokenize, train, export


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

        config = EncodeConfig(self.languages, self.batch_size, self.clip_frames, self.clip_stride)
        _check_files("samples", self.samples)
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


@dataclass(frozen=True)
class TrainVisionTokenizer:
    """Train a vision tokenizer on pictures and clips. A run that was stopped goes on when the same command is given again."""

    samples: Positional[Files]
    """Parquet files of samples, all of one size in pixels."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files, and pictures to look at."""
    preset: Literal["mini", "mini-decoder"] = "mini"
    """What to train and how. mini-decoder: the decoder alone, codes frozen, of the run that --init-from names."""
    num_steps: int | None = None
    """How long; the learning rate's schedule stretches with it. Otherwise as the preset says, like what follows."""
    learning_rate: float | None = None
    """Highest learning rate."""
    images_per_batch: int | None = None
    """Pictures in a batch of pictures."""
    clips_per_batch: int | None = None
    """Clips in a batch of clips."""
    video_every: int | None = None
    """Every n-th batch is one of clips; 0 for pictures alone."""
    init_from: Path | None = None
    """Run folder whose averaged weights this run begins with; otherwise it begins with nothing."""
    validation_split: str | None = None
    """Samples to measure on; those of the split "train" are learnt."""
    max_validation: int | None = None
    """Pictures to measure on, at most; and an eighth as many clips."""
    validate_every: int | None = None
    """Steps between two measurements, after which reconstructions are drawn, too."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    seed: int = 0
    """The same seed gives the same weights."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets

        _check_files("samples", self.samples)
        steps = {} if self.num_steps is None else {"num_steps": self.num_steps}
        if self.preset == "mini":
            plan = replace(presets.build_mini_vision_run(self.samples, self.output, **steps), init_from=self.init_from)
        elif self.init_from is None:
            raise InputError("init-from is missing; the preset mini-decoder goes on from another run, whose folder it names")
        else:
            plan = presets.build_mini_decoder_run(self.samples, self.output, self.init_from, **steps)
        batches = {"images_per_batch": self.images_per_batch, "clips_per_batch": self.clips_per_batch, "video_every": self.video_every}
        plan = replace(
            plan,
            trainer=_change(plan.trainer, seed=self.seed, **_list_cadences(self.validate_every, self.save_every)),
            learner=_change(plan.learner, seed=self.seed, optimizer=_change(plan.learner.optimizer, learning_rate=self.learning_rate)),
            batches=_change(plan.batches, seed=plan.batches.seed + self.seed, **batches),
            seed=self.seed,
            device=choose_device(self.device),
        )
        plan = _change(plan, validation_split=self.validation_split, max_validation=self.max_validation)
        _report_training(self.json, self.output, plan.run)


@dataclass(frozen=True)
class TrainLanguage:
    """Train a language model on token documents. A run that was stopped goes on when the same command is given again."""

    documents: Positional[Files]
    """Parquet files of documents, as `emu3 tokenize` writes them."""
    tokenizers: Path
    """Folder of the tokenizers that the documents were written with."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files, and sheets of drawn pictures."""
    preset: Literal["mini"] = "mini"
    """What to train and how."""
    num_steps: int | None = None
    """How long; the learning rate's schedule stretches with it. Otherwise as the preset says, like what follows."""
    learning_rate: float | None = None
    """Highest learning rate."""
    tokens_per_batch: int | None = None
    """Tokens of one batch, padding included."""
    micro_batches: int | None = None
    """Batches that make one step together."""
    mixture: dict[str, float] = field(default_factory=dict)
    """How often a document of each source is seen in an epoch, in pairs such as draw 1 describe 0.25; 1 for a source that is not named."""
    null_prompt_share: float | None = None
    """Part of the drawings and films whose caption is left out, for guidance."""
    prompts: tuple[str, ...] = ()
    """What to draw after every measurement, one sentence or several."""
    validation_split: str | None = None
    """Documents to measure on; those of the split "train" are learnt."""
    max_validation: int | None = None
    """Documents to measure on, at most."""
    validate_every: int | None = None
    """Steps between two measurements, after which pictures are drawn, too."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    seed: int = 0
    """The same seed gives the same weights."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets

        _check_files("documents", self.documents)
        steps = {} if self.num_steps is None else {"num_steps": self.num_steps}
        plan = presets.build_mini_language_run(self.tokenizers, self.documents, self.output, **steps)
        batches = {"tokens_per_batch": self.tokens_per_batch, "mixture": self.mixture or None, "null_prompt_share": self.null_prompt_share}
        cadences = _list_cadences(self.validate_every, self.save_every)
        plan = replace(
            plan,
            trainer=_change(plan.trainer, seed=self.seed, micro_batches=self.micro_batches, **cadences),
            learner=_change(plan.learner, optimizer=_change(plan.learner.optimizer, learning_rate=self.learning_rate)),
            batches=_change(plan.batches, seed=self.seed, **batches),
            seed=self.seed,
            device=choose_device(self.device),
        )
        plan = _change(plan, validation_split=self.validation_split, max_validation=self.max_validation)
        prompts = self.prompts or presets.MINI_PROMPTS
        draw = presets.build_sheet_drawer(self.tokenizers, prompts, presets.MINI_DEFAULTS, presets.MINI_IMAGE_AREA, plan.device, self.seed)
        _report_training(self.json, self.output, lambda: plan.run(draw))


@dataclass(frozen=True)
class Train:
    """Train a vision tokenizer, or a language model on what it makes of pictures."""

    what: Annotated[TrainVisionTokenizer, subcommand("vision-tokenizer")] | Annotated[TrainLanguage, subcommand("language")]

    def run(self) -> None:
        self.what.run()


@dataclass(frozen=True)
class ExportTokenizers:
    """Write a folder with the trained vision tokenizer and the text vocabulary: what `emu3 tokenize` needs."""

    run_folder: Positional[Path]
    """Run folder of `emu3 train vision-tokenizer`; its newest checkpoint is taken."""
    text: Path
    """Ranks file of the text vocabulary, .tiktoken."""
    output: Path
    """Folder to write."""
    preset: Literal["mini"] = "mini"
    """What the run is, if its folder has no run.json that says so."""
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets
        from openemu3.training.export import DESCRIPTION_FILE, export_tokenizers

        described = (self.run_folder / DESCRIPTION_FILE).exists()
        export_tokenizers(self.run_folder, None if described else presets.MINI_VISION_TOKENIZER, self.text, self.output)
        _report_folder(self.json, self.output)


@dataclass(frozen=True)
class ExportModel:
    """Write a folder with the whole model, which every other command takes as --model."""

    run_folder: Positional[Path]
    """Run folder of `emu3 train language`; its newest checkpoint is taken."""
    tokenizers: Path
    """Folder of the tokenizers, as `emu3 export tokenizers` writes it; the vision decoder may have been trained on since."""
    output: Path
    """Folder to write."""
    preset: Literal["mini"] = "mini"
    """The size of its pictures and how it wants to be asked; and what the run is, if its folder has no run.json that says so."""
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets
        from openemu3.training.export import DESCRIPTION_FILE, export_model

        config = None if (self.run_folder / DESCRIPTION_FILE).exists() else presets.MINI_TRANSFORMER
        generation = asdict(presets.MINI_DEFAULTS)
        export_model(self.run_folder, config, self.tokenizers, self.output, presets.MINI_IMAGE_AREA, generation)
        _report_folder(self.json, self.output)


@dataclass(frozen=True)
class Export:
    """Write what was trained as a folder to use."""

    what: Annotated[ExportTokenizers, subcommand("tokenizers")] | Annotated[ExportModel, subcommand("model")]

    def run(self) -> None:
        self.what.run()


def _check_files(name: str, paths: Sequence[Path]) -> None:
    if not paths:
        raise InputError(f"no file of {name} was given; at least one is needed")


def _change(config: Config, **changes: Any) -> Config:
    """The configuration with those fields changed that are not None."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def _list_cadences(validate_every: int | None, save_every: int | None) -> dict[str, int | None]:
    return {"validate_every": validate_every, "sample_every": validate_every, "save_every": save_every}


def _report_training(as_json: bool, folder: Path, train: Callable[[], Trainer]) -> None:
    """Train, and say where it ended. A run that was stopped raises KeyboardInterrupt: what follows it in a script must not begin."""
    began = time.monotonic()
    trainer = train()
    steps = trainer.config.num_steps
    if not trainer.is_complete:
        print(f"{folder}: saved at step {trainer.step} of {steps}; the same command goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {name: value for name, value in rows[-1].items() if name.startswith("validation/")}
    numbers = ", ".join(f"{name.removeprefix('validation/')} {value}" for name, value in measured.items())
    answer = {"folder": str(folder), "steps": trainer.step, **measured, "seconds": round(time.monotonic() - began, 3)}
    print_answer(as_json, f"{folder}: {trainer.step} steps; held out: {numbers}", answer)


def _report_folder(as_json: bool, folder: Path) -> None:
    """Says what a folder holds."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = f"{folder}: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    print_answer(as_json, text, {"folder": str(folder), "files": sizes})


# ---------------------------------------------------------------------------------------------------------------------------------- main

COMMANDS: dict[str, Callable[..., Command]] = {
    "generate": Generate,
    "describe": Describe,
    "answer": Answer,
    "chat": Chat,
    "evaluate": Evaluate,
    "demo": Demo,
    "tokenize": Tokenize,
    "train": Train,
    "export": Export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. `tyro` itself exits, with 0 after --help and 2 for flags that do not exist."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments == ["--version"]:
            print(f"emu3 {__version__}", flush=True)
            return 0
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="emu3",
            description="Draw, film, continue films and talk about pictures, with one transformer that predicts the next token.",
            args=arguments or ["--help"],
            config=TYRO_MARKERS,
        )
        command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # `emu3 ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        print("emu3: " + " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("emu3: stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
