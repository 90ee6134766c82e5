"""Commands that train, and that write what was trained as a folder to use: `emu3 train` and `emu3 export`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import Positional, subcommand

from openemu3.cli.options import (
    Device,
    Files,
    Json,
    check_files,
    choose_device,
    print_answer,
    report_folder,
)
from openemu3.records import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from openemu3.training.trainer import Trainer

    Config = TypeVar("Config", bound=DataclassInstance)


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

        check_files("samples", self.samples)
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

        check_files("documents", self.documents)
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
        report_folder(self.json, self.output)


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
        report_folder(self.json, self.output)


@dataclass(frozen=True)
class Export:
    """Write what was trained as a folder to use."""

    what: Annotated[ExportTokenizers, subcommand("tokenizers")] | Annotated[ExportModel, subcommand("model")]

    def run(self) -> None:
        self.what.run()


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
