"""Commands that measure: `emu3 evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from tyro.conf import Positional, subcommand

from openemu3.cli.options import (
    Json,
    ModelOptions,
    print_tables,
    show_progress,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the tokenizer. bfloat16 is faster and gives other codes."""
    channels_last: bool = False
    """Lay its weights out with channels last: the same numbers, at another speed."""
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
            dtype=self.dtype,
            channels_last=self.channels_last,
        )
        tokenizer = reconstruction.load_tokenizer(self.model, self.device)
        with show_progress("measuring") as move:
            report = reconstruction.run_reconstruction(tokenizer, config, move)
        print_tables(self.json, report, [reconstruction.build_reconstruction_table(report)])


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
        print_tables(self.json, numbers, report.build_report_tables(numbers))


@dataclass(frozen=True)
class Evaluate:
    """Measure: the vision tokenizer on any pictures and films, or the mini model on its recipe's samples."""

    what: Annotated[EvaluateReconstruction, subcommand("reconstruction")] | Annotated[EvaluateMini, subcommand("mini")]

    def run(self) -> None:
        self.what.run()
