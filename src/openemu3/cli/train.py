"""Commands that train, and that write what was trained as a folder to use: `emu3 train` and `emu3 export`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, subcommand

from openemu3.cli.options import Files, Json, check_files, report_folder
from openemu3.cli.post_training import ExportAdapter, TrainImageToText, TrainInstruct, TrainPreferences, TrainQuality
from openemu3.cli.training_options import ParallelOptions, TrainingOptions, change, report_training
from openemu3.records import InputError

if TYPE_CHECKING:
    from openemu3.data.loader import LoaderConfig


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
        run = replace(run, learner=change(run.learner, seed=seed), batches=change(run.batches, seed=run.batches.seed + seed, **batches))
        report_training(self.json, self.output, run.run)


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
    """What to draw after every measurement, one sentence or several; in a run of one process."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets

        check_files("documents", self.documents)
        preset = presets.LANGUAGE_PRESETS[self.preset]
        run = self.training.apply(preset.build(self.tokenizers, self.documents, self.output, **self.training.count_steps()))
        role_weights, parallel = run.learner.role_weights, self.parallel.apply(run.parallel)
        unknown = self.role_weights.keys() - asdict(role_weights).keys()
        if unknown:
            raise InputError(f"role-weights names {sorted(unknown)}; allowed are {', '.join(asdict(role_weights))}")
        run = replace(
            run,
            transformer=change(run.transformer, dropout=self.dropout),
            trainer=change(run.trainer, peak_flops=None if self.peak_tflops is None else self.peak_tflops * 1e12),
            learner=change(run.learner, precision=self.precision, role_weights=replace(role_weights, **self.role_weights)),
            batches=self._build_batches(run.batches, parallel.dp),
            parallel=parallel,
            init_from=self.init_from,
        )
        if self.prompts and run.parallel.num_ranks > 1:
            raise InputError(
                f"prompts are drawn in a run of one process, where all weights lie, and this one has {run.parallel.num_ranks}; "
                "leave them out, and draw with what `emu3 export model` makes of a checkpoint"
            )
        draw, prompts = None, self.prompts or preset.prompts
        if prompts and run.parallel.num_ranks == 1:
            draw = presets.build_sheet_drawer(self.tokenizers, prompts, preset.defaults, preset.image_area, run.device, self.training.seed)
        report_training(self.json, self.output, lambda: run.run(draw))

    def _build_batches(self, config: LoaderConfig, dp: int) -> LoaderConfig:
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
        if micro is None:  # the preset's, or what of it divides a rank's share of the batch
            micro = math.gcd(max(1, (rows or config.rows_per_batch) // dp), config.rows_per_micro_batch)
        mixture = None
        if self.mixture or self.shares:
            mixture = replace(config.mixture, rates=self.mixture, shares=self.shares)
        return change(
            config, context_length=self.context_length, rows_per_batch=rows, rows_per_micro_batch=micro, mixture=mixture,
            null_prompt_share=self.null_prompt_share, plain=self.plain_packing or None, seed=self.training.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Train:
    """Train a vision tokenizer, a language model on what it makes of pictures, and the stages after that."""

    what: (
        Annotated[TrainVisionTokenizer, subcommand("vision-tokenizer")]
        | Annotated[TrainLanguage, subcommand("language")]
        | Annotated[TrainQuality, subcommand("qft")]
        | Annotated[TrainPreferences, subcommand("dpo")]
        | Annotated[TrainImageToText, subcommand("image-to-text")]
        | Annotated[TrainInstruct, subcommand("instruct")]
    )

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
    preset: Literal["mini", "emu3-8b-stage1"] = "mini"
    """The size of its pictures and how it wants to be asked; and what the run is, if its folder has no run.json that says so."""
    json: Json = False

    def run(self) -> None:
        from openemu3 import presets
        from openemu3.training.export import DESCRIPTION_FILE, export_model

        preset = presets.LANGUAGE_PRESETS[self.preset]
        config = None if (self.run_folder / DESCRIPTION_FILE).exists() else presets.MINI_TRANSFORMER
        generation, image_area = asdict(preset.defaults), preset.image_area
        before = json.loads((self.tokenizers / "config.json").read_text(encoding="utf-8"))
        if "generation" in before:  # the tokenizers are those of a whole model, which was trained on: it is asked as it was
            generation, image_area = before["generation"], before.get("image_area", image_area)
        export_model(self.run_folder, config, self.tokenizers, self.output, image_area, generation)
        report_folder(self.json, self.output)


@dataclass(frozen=True)
class ExportTransformers:
    """Write a model folder once more in the layout of Hugging Face's transformers: weights and config.json, no text tokenizer."""

    model: Positional[Path]
    """Model folder, as `emu3 export model` writes it."""
    output: Path
    """Folder to write."""
    text_only: bool = False
    """The language model alone, for Emu3ForCausalLM; otherwise both parts, for Emu3ForConditionalGeneration."""
    json: Json = False

    def run(self) -> None:
        from openemu3.model.weights import convert_to_transformers

        convert_to_transformers(self.model, self.output, self.text_only)
        report_folder(self.json, self.output)


@dataclass(frozen=True)
class Export:
    """Write what was trained as a folder to use."""

    what: (
        Annotated[ExportTokenizers, subcommand("tokenizers")]
        | Annotated[ExportModel, subcommand("model")]
        | Annotated[ExportTransformers, subcommand("transformers")]
        | Annotated[ExportAdapter, subcommand("adapter")]
    )

    def run(self) -> None:
        self.what.run()
