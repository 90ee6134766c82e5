"""Commands of the stages after pre-training: `emu3 train qft | dpo | image-to-text | instruct`, `emu3 tokenize-conversations`, and
`emu3 export adapter`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from openemu3.cli.options import Device, Files, Json, check_files, check_outputs, choose_device, print_answer, report_folder
from openemu3.cli.training_options import ParallelOptions, TrainingOptions, change, report_training
from openemu3.records import InputError

if TYPE_CHECKING:
    from openemu3.tokenization.encode import EncodedDocument
    from openemu3.training.lora import LoraConfig
    from openemu3.training.stages import LanguageRun


@dataclass(frozen=True)
class LoraOptions:
    """Train small adapters beside frozen weights (LoRA), instead of all weights."""

    lora_rank: int | None = None
    """Rank of the adapters, such as 16; without it all weights are trained."""
    lora_alpha: float | None = None
    """Their scale is alpha / rank; otherwise twice the rank."""
    lora_dropout: float = 0.0
    """Probability of dropping an adapter's input."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Matrices that get one."""

    def build(self, seed: int) -> LoraConfig | None:
        from openemu3.training.lora import LoraConfig

        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoraConfig(self.lora_rank, alpha, self.lora_dropout, self.lora_targets, seed)


@dataclass(frozen=True)
class StageOptions:
    """What a stage begins with, and how its documents become batches."""

    model: str = "mini"
    """What it begins with: a model folder, "mini", or the run folder of an earlier stage (then name --tokenizers)."""
    tokenizers: Path | None = None
    """Folder of the tokenizers that the documents were written with; otherwise the model's own."""
    context_length: int | None = None
    """Tokens of a row, into which documents are packed."""
    rows_per_batch: int | None = None
    """Rows that make one step, on all ranks together."""
    rows_per_micro_batch: int | None = None
    """Rows that go through the network together, on one rank."""
    precision: Literal["fp32", "mixed", "bf16"] | None = None
    """mixed: weights in fp32, computing in bf16. bf16: weights and optimizer in bf16, too, which takes half the memory."""

    def find_folders(self) -> tuple[Path, Path]:
        """(what to begin with, tokenizers)."""
        from openemu3.generation.tasks import find_model_folder

        folder = find_model_folder(self.model)
        return folder, folder if self.tokenizers is None else self.tokenizers

    def apply(self, run: LanguageRun, training: TrainingOptions, lora: LoraOptions, parallel: ParallelOptions) -> LanguageRun:
        run = training.apply(run)
        rows = self.rows_per_batch
        micro = self.rows_per_micro_batch
        if micro is None and rows is not None and rows % run.batches.rows_per_micro_batch:
            micro = 1
        batches = change(
            run.batches, context_length=self.context_length, rows_per_batch=rows, rows_per_micro_batch=micro, seed=training.seed
        )
        learner = change(run.learner, precision=self.precision)
        return replace(run, batches=batches, learner=learner, parallel=parallel.apply(run.parallel), lora=lora.build(training.seed))


@dataclass(frozen=True)
class TrainQuality:
    """Quality tuning (QFT): learn the codes of the best samples alone, at a learning rate that falls linearly to zero.

    `emu3 select` chooses the samples; `emu3 tokenize --understanding-share 0` makes documents of them.
    """

    documents: Positional[Files]
    """Folders or Parquet files of documents, as `emu3 tokenize` writes them."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files."""
    json: Json = False
    stage: StageOptions = field(default_factory=StageOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def run(self) -> None:
        from openemu3.training.post_training import build_quality_run

        check_files("documents", self.documents)
        init_from, tokenizers = self.stage.find_folders()
        run = build_quality_run(init_from, tokenizers, self.documents, self.output, **self.training.count_steps())
        report_training(self.json, self.output, self.stage.apply(run, self.training, self.lora, self.parallel).run)


@dataclass(frozen=True)
class TrainImageToText:
    """Understanding, stage 1: learn the words after pictures and films, mixed with text alone; codes are no targets."""

    documents: Positional[Files]
    """Folders or Parquet files of documents, as `emu3 tokenize` writes them of samples and of texts."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files."""
    text_share: float = 0.2
    """Part of the tokens that are of documents of text alone."""
    video_share: float = 0.0
    """Part of the tokens that are of films with their words."""
    json: Json = False
    stage: StageOptions = field(default_factory=StageOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def run(self) -> None:
        from openemu3.training.post_training import build_image_to_text_run

        check_files("documents", self.documents)
        init_from, tokenizers = self.stage.find_folders()
        run = build_image_to_text_run(
            init_from,
            tokenizers,
            self.documents,
            self.output,
            text_share=self.text_share,
            video_share=self.video_share,
            **self.training.count_steps(),
        )
        report_training(self.json, self.output, self.stage.apply(run, self.training, self.lora, self.parallel).run)


@dataclass(frozen=True)
class TrainInstruct:
    """Understanding, stage 2: learn the answers of conversations about pictures and films."""

    documents: Positional[Files]
    """Parquet files of documents, as `emu3 tokenize-conversations` writes them."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files."""
    json: Json = False
    stage: StageOptions = field(default_factory=StageOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def run(self) -> None:
        from openemu3.training.post_training import build_instruction_run

        check_files("documents", self.documents)
        init_from, tokenizers = self.stage.find_folders()
        run = build_instruction_run(init_from, tokenizers, self.documents, self.output, **self.training.count_steps())
        report_training(self.json, self.output, self.stage.apply(run, self.training, self.lora, self.parallel).run)


@dataclass(frozen=True)
class TrainPreferences:
    """Learn from preference pairs (DPO), with next-token cross-entropy on the chosen completions.

    The model it begins with is its own reference, whose log-probabilities are computed once and kept in the run folder.
    """

    pairs: Positional[Path]
    """Parquet file of pairs, as `emu3 preferences pairs` writes it."""
    output: Path
    """Run folder: checkpoints, metrics.jsonl, TensorBoard files, pairs.parquet."""
    beta: float = 0.1
    """How dear it is to move away from the reference."""
    cross_entropy_weight: float = 1.0
    """Weight of the next-token cross-entropy on the chosen completion, averaged over its tokens; 0 for DPO alone."""
    length_normalised: bool = False
    """Divide each completion's log-probability by its number of tokens."""
    replay: Files = ()
    """Documents to learn beside the pairs, such as those of pre-training, so that the model keeps what it knew: as many that draw or film
    as there are pairs, in every step."""
    replay_weight: float = 1.0
    """Weight of their cross-entropy, averaged over the codes of each."""
    learn_structure: bool = False
    """Count the ends of rows, frames and media, too, which decoding forces."""
    pairs_per_batch: int = 4
    """Pairs of one micro-batch, on all ranks together."""
    micro_batches: int = 1
    """Micro-batches that make one step together."""
    held_out_share: float = 0.1
    """Part of the prompts that are measured on instead of learnt."""
    check_reference: bool = False
    """Compute stored log-probabilities of the reference again, and stop where they differ."""
    model: str = "mini"
    """What it begins with: a model folder, "mini", or the run folder of quality tuning (then name --tokenizers)."""
    tokenizers: Path | None = None
    """Folder of the tokenizers; otherwise the model's own."""
    precision: Literal["fp32", "mixed", "bf16"] | None = None
    """mixed: weights in fp32, computing in bf16. bf16: weights and optimizer in bf16, too, which takes half the memory."""
    json: Json = False
    training: TrainingOptions = field(default_factory=TrainingOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def run(self) -> None:
        from openemu3.training.post_training import build_preference_run
        from openemu3.training.preference_learner import PreferenceObjectiveConfig

        for name in ("validation_split", "max_validation"):
            if getattr(self.training, name) is not None:
                raise InputError(
                    f"{name} is {getattr(self.training, name)!r}, but pairs have no splits; --held-out-share says what is held out"
                )
        init_from, tokenizers = StageOptions(self.model, self.tokenizers).find_folders()
        run = self.training.apply(build_preference_run(init_from, tokenizers, self.pairs, self.output, **self.training.count_steps()))
        objective = PreferenceObjectiveConfig(self.beta, self.cross_entropy_weight, self.length_normalised, self.replay_weight)
        run = replace(
            run,
            trainer=replace(run.trainer, micro_batches=self.micro_batches),
            learner=change(run.learner, objective=objective, precision=self.precision),
            parallel=self.parallel.apply(run.parallel),
            pairs_per_batch=self.pairs_per_batch,
            held_out_share=self.held_out_share,
            learn_structure=self.learn_structure,
            check_reference=self.check_reference,
            replay=self.replay,
            lora=self.lora.build(self.training.seed),
        )
        report_training(self.json, self.output, run.run)


@dataclass(frozen=True)
class TokenizeConversations:
    """Turn conversations about pictures and films into token documents in the chat template, for `emu3 train instruct`.

    Reads LLaVA and LLaVA-OneVision JSON, and OpenAI messages (.json or .jsonl). What cannot be learnt from is left out and counted.
    """

    conversations: Positional[Files]
    """Files of conversations, at least one."""
    output: Path
    """File of documents to write, .parquet."""
    validation: Files = ()
    """Files of conversations to measure on; their documents are of the split "validation"."""
    media: Path | None = None
    """Folder in which relative names of pictures and films begin; otherwise that of the file."""
    model: str = "mini"
    """Folder with the tokenizers, or "mini"."""
    min_pixels: int | None = None
    """Smaller pictures are brought to this area; otherwise as the model was trained, 512 x 512 for the published ones."""
    max_pixels: int | None = None
    """Larger pictures are brought to this area; otherwise as the model was trained, 1024 x 1024 for the published ones."""
    fps: float | None = None
    """Frames per second of films; otherwise as the model was trained."""
    clip_frames: int | None = None
    """A longer film is shown in so many frames; otherwise as the model was trained."""
    max_tokens: int | None = None
    """Longer documents are left out; otherwise what the model's positions allow."""
    answers: Literal["each", "all"] = "each"
    """each: one document for every answer, so that each is seen to end. all: one document of a conversation, with all answers learnt."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""
    json: Json = False

    def run(self) -> None:
        from openemu3.data.conversations import ConversationConfig, encode_conversations, read_conversations, require_some
        from openemu3.data.shards import write_documents
        from openemu3.generation.tasks import find_model_folder, read_defaults
        from openemu3.model.weights import read_config
        from openemu3.training.export import compute_fingerprint, load_tokenizers

        check_files("conversations", self.conversations)
        check_outputs([self.output], [".parquet"])
        began = time.monotonic()
        folder = find_model_folder(self.model)
        defaults, network = read_defaults(folder), read_config(folder).transformer
        max_positions = 131072 if network is None else network.max_positions
        config = change(
            ConversationConfig(defaults.min_pixels, defaults.max_pixels, defaults.fps, defaults.clip_frames, max_positions, self.answers),
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            fps=self.fps,
            clip_frames=self.clip_frames,
            max_tokens=self.max_tokens,
        )
        tokenizer, form = load_tokenizers(folder, choose_device(self.device))
        skipped: Counter[str] = Counter()
        counts: Counter[str] = Counter()

        def encode() -> Iterator[EncodedDocument]:
            for split, paths in (("train", self.conversations), ("validation", self.validation)):
                for path in paths:
                    conversations = read_conversations(path, self.media, skipped)
                    for document in encode_conversations(conversations, tokenizer, form, config, skipped, split):
                        counts[split] += 1
                        yield document

        number = write_documents(self.output, require_some(encode(), skipped), compute_fingerprint(folder))
        text = f"{self.output}: {number:,} documents" + "".join(f"; {count:,} left out for {reason}" for reason, count in skipped.items())
        answer = {"file": str(self.output), "documents": number, "splits": dict(counts), "left_out": dict(skipped)}
        print_answer(self.json, text, answer | {"seconds": round(time.monotonic() - began, 3)})


@dataclass(frozen=True)
class ExportAdapter:
    """Write the adapters of a run that was made with --lora-rank, apart from the model, in peft's format."""

    run_folder: Positional[Path]
    """Run folder; its newest checkpoint is taken."""
    output: Path
    """Folder to write, which other commands take as --adapter."""
    json: Json = False

    def run(self) -> None:
        from openemu3.training.export import load_newest, read_description
        from openemu3.training.lora import LoraConfig, save_adapter

        described = read_description(self.run_folder, "language").get("lora")
        if described is None:
            raise InputError(f"{self.run_folder} was trained without --lora-rank; it has no adapter")
        save_adapter(load_newest(self.run_folder, "transformer"), LoraConfig.parse(described), self.output)
        report_folder(self.json, self.output)
