"""Commands that train, and that write what was trained as a folder to use: `emu3 train` and `emu3 export`."""

from __future__ import annotations

import json
import math
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

    from openemu3.data.loader import LoaderConfig
    from openemu3.distributed import ParallelConfig
    from openemu3.training.stages import LanguageRun, VisionTokenizerRun
    from openemu3.training.trainer import Trainer

    Config = TypeVar("Config", bound=DataclassInstance)
    Run = TypeVar("Run", VisionTokenizerRun, LanguageRun)


@dataclass(frozen=True)
class TrainingOptions:
    """How long, how often and where; what is not given is as the preset says."""

    num_steps: int | None = None
    """How long; the learning rate's schedule stretches with it."""
    learning_rate: float | None = None
    """Highest learning rate."""
    warmup_steps: int | None = None
    """Steps in which the learning rate climbs to it."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """How it falls after that, to zero at the last step, or not at all."""
    validation_split: str | None = None
    """What to measure on, by its split; what is of the split "train" is learnt."""
    max_validation: int | None = None
    """Pictures to measure on, at most, and an eighth as many clips; or documents."""
    log_every: int | None = None
    """Steps between two rows of metrics."""
    validate_every: int | None = None
    """Steps between two measurements, after which pictures are drawn, too, if any are."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    wandb: str = ""
    """Project of Weights & Biases to log to, besides metrics.jsonl and TensorBoard."""
    seed: int = 0
    """The same seed gives the same weights."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""

    def count_steps(self) -> dict[str, int]:
        """The argument for building a preset."""
        return {} if self.num_steps is None else {"num_steps": self.num_steps}

    def apply(self, run: Run) -> Run:
        """The run as these options want it."""
        cadences = {"validate_every": self.validate_every, "sample_every": self.validate_every, "save_every": self.save_every}
        if not run.trainer.sample_every:
            del cadences["sample_every"]
        schedule = {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps, "schedule": self.schedule}
        changed = replace(
            run,
            trainer=_change(run.trainer, seed=self.seed, wandb=self.wandb, log_every=self.log_every, **cadences),
            learner=_change(run.learner, optimizer=_change(run.learner.optimizer, **schedule)),
            seed=self.seed,
            device=choose_device(self.device),
        )
        return _change(changed, validation_split=self.validation_split, max_validation=self.max_validation)


@dataclass(frozen=True)
class TrainVisionTokenizer:
    """Train a vision tokenizer on pictures and clips. A run that was stopped goes on when the same command is given again."""

    samples: Positional[Files]
    """Parquet files of samples, all of one size in pixels."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files, and pictures to look at."""
    preset: Literal["mini", "mini-decoder"] = "mini"
    """What to train and how. mini-decoder: the decoder alone, codes frozen, of the run that --init-from names."""
    images_per_batch: int | None = None
    """Pictures in a batch of pictures."""
    clips_per_batch: int | None = None
    """Clips in a batch of clips."""
    video_every: int | None = None
    """Every n-th batch is one of clips; 0 for pictures alone."""
    init_from: Path | None = None
    """Run folder whose averaged weights this run begins with; otherwise it begins with nothing."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets

        check_files("samples", self.samples)
        steps, seed = self.training.count_steps(), self.training.seed
        if self.preset == "mini":
            run = replace(presets.build_mini_vision_run(self.samples, self.output, **steps), init_from=self.init_from)
        elif self.init_from is None:
            raise InputError("init-from is missing; the preset mini-decoder goes on from another run, whose folder it names")
        else:
            run = presets.build_mini_decoder_run(self.samples, self.output, self.init_from, **steps)
        run = self.training.apply(run)
        batches = {"images_per_batch": self.images_per_batch, "clips_per_batch": self.clips_per_batch, "video_every": self.video_every}
        run = replace(run, learner=_change(run.learner, seed=seed), batches=_change(run.batches, seed=run.batches.seed + seed, **batches))
        _report_training(self.json, self.output, run.run)


@dataclass(frozen=True)
class ParallelOptions:
    """How a training is spread over the processes that torchrun starts, and what each of them recomputes and compiles."""

    dp: int | None = None
    """Data parallel groups, over which the weights are sharded; otherwise as many as there are processes for."""
    replicate: int = 1
    """Of these groups, how many keep a whole copy of the weights each."""
    cp: int = 1
    """Context parallel ranks, which share the tokens of a row."""
    tp: int = 1
    """Tensor parallel ranks, which share the heads, channels and vocabulary of every layer."""
    checkpointing: Literal["none", "selective", "full"] | None = None
    """What the backward pass computes a second time to save memory; otherwise as the preset says."""
    compile: bool = False
    """Compile every layer with torch.compile; the 8B presets do in any case."""

    def apply(self, config: ParallelConfig) -> ParallelConfig:
        from openemu3.distributed import read_whole_number

        num_processes = read_whole_number("WORLD_SIZE", 1)
        dp = max(1, num_processes // max(1, self.cp * self.tp)) if self.dp is None else self.dp
        return _change(
            config, dp=dp, replicate=self.replicate, cp=self.cp, tp=self.tp,
            activation_checkpointing=self.checkpointing, compile=self.compile or None,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainLanguage:
    """Train a language model on token documents, alone or under torchrun.

    A run that was stopped goes on when the same command is given again.
    """

    documents: Positional[Files]
    """Folders or Parquet files of documents, as `emu3 tokenize` writes them."""
    tokenizers: Path
    """Folder of the tokenizers that the documents were written with."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files, and sheets of drawn pictures."""
    preset: Literal["mini", "mini-stage1", "mini-stage2", "emu3-8b-stage1", "emu3-8b-stage2"] = "mini"
    """What to train and how; what follows changes it. The stages are the paper's: 1 with pictures, 2 from its weights (--init-from) with
    longer rows and films."""
    init_from: Path | None = None
    """Weights to begin with: a model folder, or the run folder of another training; otherwise it begins with nothing."""
    context_length: int | None = None
    """Tokens of a row, into which documents are packed."""
    rows_per_batch: int | None = None
    """Rows that make one step, on all ranks together."""
    rows_per_micro_batch: int | None = None
    """Rows that go through the network together, on one rank; any number that fits gives the same update."""
    tokens_per_batch: int | None = None
    """The same as --rows-per-batch, in tokens: a multiple of the context length."""
    mixture: dict[str, float] = field(default_factory=dict)
    """How often a document of each source is seen in an epoch, in pairs such as draw 1 describe 0.25; 1 for a source that is not named."""
    shares: dict[str, float] = field(default_factory=dict)
    """Instead of --mixture: part of the tokens for each source, in pairs such as text 0.2 draw 0.8."""
    null_prompt_share: float | None = None
    """Part of the drawings and films whose caption is left out, for guidance."""
    plain_packing: bool = False
    """As in the paper, documents of one row see each other."""
    role_weights: dict[str, float] = field(default_factory=dict)
    """How much targets count by their role, in pairs such as vision 0.5 structure 1; the others are text_context and text_target."""
    dropout: float | None = None
    """Probability of dropping, at the published places."""
    precision: Literal["fp32", "mixed", "bf16"] | None = None
    """mixed: weights in fp32, computing in bf16. bf16: weights and optimizer in bf16, too, which takes half the memory."""
    peak_tflops: float | None = None
    """What one device could do, in 10^12 operations a second, for MFU; otherwise it is measured."""
    prompts: tuple[str, ...] = ()
    """What to draw after every measurement, one sentence or several."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets

        check_files("documents", self.documents)
        preset = presets.LANGUAGE_PRESETS[self.preset]
        run = self.training.apply(preset.build(self.tokenizers, self.documents, self.output, **self.training.count_steps()))
        role_weights = run.learner.role_weights
        unknown = self.role_weights.keys() - asdict(role_weights).keys()
        if unknown:
            raise InputError(f"role-weights names {sorted(unknown)}; allowed are {', '.join(asdict(role_weights))}")
        run = replace(
            run,
            transformer=_change(run.transformer, dropout=self.dropout),
            trainer=_change(run.trainer, peak_flops=None if self.peak_tflops is None else self.peak_tflops * 1e12),
            learner=_change(run.learner, precision=self.precision, role_weights=replace(role_weights, **self.role_weights)),
            batches=self._build_batches(run.batches),
            parallel=self.parallel.apply(run.parallel),
            init_from=self.init_from,
        )
        draw, prompts = None, self.prompts or preset.prompts
        if prompts and run.parallel.num_ranks == 1:
            draw = presets.build_sheet_drawer(self.tokenizers, prompts, preset.defaults, preset.image_area, run.device, self.training.seed)
        _report_training(self.json, self.output, lambda: run.run(draw))

    def _build_batches(self, config: LoaderConfig) -> LoaderConfig:
        rows = self.rows_per_batch
        context = self.context_length or config.context_length
        if self.tokens_per_batch is not None:
            if rows is not None or self.tokens_per_batch < 1 or self.tokens_per_batch % context:
                raise InputError(
                    f"tokens-per-batch is {self.tokens_per_batch}; a multiple of the context length ({context}) is allowed, "
                    "without rows-per-batch"
                )
            rows = self.tokens_per_batch // context
        micro = self.rows_per_micro_batch
        if micro is None and rows is not None:
            micro = math.gcd(rows, config.rows_per_micro_batch)
        mixture = None
        if self.mixture or self.shares:
            mixture = replace(config.mixture, rates=self.mixture, shares=self.shares)
        return _change(
            config, context_length=self.context_length, rows_per_batch=rows, rows_per_micro_batch=micro, mixture=mixture,
            null_prompt_share=self.null_prompt_share, plain=self.plain_packing or None, seed=self.training.seed,
        )  # fmt: skip


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


def _report_training(as_json: bool, folder: Path, train: Callable[[], Trainer]) -> None:
    """Train, and say where it ended. A run that was stopped raises KeyboardInterrupt: what follows it in a script must not begin."""
    from openemu3.distributed import read_whole_number

    began = time.monotonic()
    trainer = train()
    if read_whole_number("RANK", 0):  # the first rank speaks for all
        return
    steps = trainer.config.num_steps
    if not trainer.is_complete:
        print(f"{folder}: saved at step {trainer.step} of {steps}; the same command goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {name: value for name, value in rows[-1].items() if name.startswith("validation/")}
    numbers = ", ".join(f"{name.removeprefix('validation/')} {value}" for name, value in measured.items())
    answer = {"folder": str(folder), "steps": trainer.step, **measured, "seconds": round(time.monotonic() - began, 3)}
    print_answer(as_json, f"{folder}: {trainer.step} steps; held out: {numbers}", answer)
