"""Whole trainings as configurations: what to read, what to train, where to leave it.

In: sample or document files. Out: a run folder (checkpoints, metrics, samples) and, at the end, weights ready for use.
Stages differ in data and weights, never in code: they all go through the one Trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from openemu3.data.clips import PixelBatch, PixelBatches, PixelBatchesConfig, stack
from openemu3.data.loader import LoaderConfig, TokenLoader, read_held_out
from openemu3.data.packing import TokenBatch
from openemu3.data.samples import read_samples
from openemu3.data.shards import DocumentStore, spread_evenly
from openemu3.distributed import ParallelConfig, data_rank, distributed_run, is_first
from openemu3.media import read_image
from openemu3.model.parallelize import fill_weights, load_full_weights, parallelize
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.model.weights import open_state
from openemu3.records import InputError, Sample
from openemu3.tokenization.encode import read_clip
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig
from openemu3.training.export import TEXT_RANKS, compute_fingerprint, load_newest, load_weights, read_description, read_vocabulary
from openemu3.training.language_learner import LanguageLearner, LanguageLearnerConfig, RoleWeights
from openemu3.training.lora import LoraConfig, apply_lora
from openemu3.training.throughput import measure_peak_flops
from openemu3.training.trainer import DESCRIPTION_FILE, Trainer, TrainerConfig
from openemu3.training.vision_learner import VisionLearner, VisionLearnerConfig, extend_codebook

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class VisionTokenizerRun:
    """Training a vision tokenizer on stills and clips."""

    samples: tuple[Path, ...]  # Parquet files of samples, all of one size in pixels
    trainer: TrainerConfig
    validation_split: str = "heldout_picture"
    max_validation: int = 128  # stills; an eighth as many clips
    tokenizer: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    learner: VisionLearnerConfig = field(default_factory=VisionLearnerConfig)
    batches: PixelBatchesConfig = field(default_factory=PixelBatchesConfig)
    # Another run, whose averaged weights this one starts with, its codebook extended if this one's is larger; None: from nothing.
    init_from: Path | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_validation(self.max_validation)
        group = self.tokenizer.temporal_downsample_factor
        if self.batches.clip_frames % group:
            raise InputError(f"clip_frames is {self.batches.clip_frames}; it must be a multiple of {group}, the frames of one latent frame")

    def build_learner(self) -> VisionLearner:
        held_out = [s for path in self.samples for s in read_samples(path, splits={self.validation_split})]
        if not held_out:
            raise InputError(f"no samples of split {self.validation_split!r} to validate on in {[str(p) for p in self.samples]}")
        tokenizer = VisionTokenizer(self.tokenizer)
        if self.init_from is None:
            init_vision_tokenizer(tokenizer, self.seed)
        else:
            tokenizer = extend_codebook(load_average(self.init_from, self.tokenizer), self.tokenizer.codebook_size, self.seed)
        return VisionLearner(tokenizer.to(self.device), self.learner, lambda: read_pixel_batches(held_out, self.max_validation))

    def run(self) -> Trainer:
        """Train; a run that was stopped says so by `is_complete`, and goes on when it is called again."""
        samples = [s for path in self.samples for s in read_samples(path, splits={"train"})]
        trainer = Trainer(self.trainer, self.build_learner(), PixelBatches(samples, self.batches), describe_run("vision_tokenizer", self))
        trainer.run()
        return trainer


def describe_run(kind: Literal["vision_tokenizer", "language"], run: DataclassInstance) -> dict[str, Any]:
    """A run as plain values, for `run.json`: {"kind": ..., and its fields}. `export` builds the trained network from it."""
    return {"kind": kind, **json.loads(json.dumps(asdict(run), default=str))}


def load_average(run: Path, config: VisionTokenizerConfig) -> VisionTokenizer:
    """The averaged vision tokenizer of a run, which may have fewer codes than `config`."""
    state = load_newest(run, "average")
    try:
        tokenizer = VisionTokenizer(replace(config, codebook_size=len(state["quantize.embedding.weight"])))
        tokenizer.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{run} holds no vision tokenizer of this configuration, but for the number of codes") from error
    return tokenizer


@torch.no_grad()
def init_vision_tokenizer(tokenizer: VisionTokenizer, seed: int) -> None:
    """Seeded initial weights: torch's He-uniform for the 2-D layers, the identity for the temporal ones.

    The temporal layers work on four channels with a SiLU after each; drawn at random, six of them in a row shrink the latents a
    thousandfold and the maps that condition the decoder's norms with them, and colours are learnt very late. So each starts by
    handing its input on, lifted by one to where SiLU is close to a straight line.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in tokenizer.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d):
            continue
        assert module.bias is not None  # every convolution of the tokenizer has one
        nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            if name.endswith("conv_y"):
                nn.init.ones_(module.bias)  # SpatialNorm starts around a plain GroupNorm's scale
            continue
        nn.init.zeros_(module.weight)
        if ".time_res_stack." in name:  # the second convolution stays zero: the block is the identity
            if ".conv1." in name:
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            continue
        stride = module.stride[0]
        channels, (height, width) = torch.arange(module.out_channels), (k // 2 for k in module.kernel_size[1:])
        module.weight[channels, channels, -stride:, height, width] = 1 / stride  # the mean of the frames this output stands for
        if ".time_conv." in name:
            nn.init.ones_(module.bias)
    num_codes = tokenizer.config.codebook_size
    nn.init.uniform_(tokenizer.quantize.embedding.weight, -1 / num_codes, 1 / num_codes, generator=generator)  # as published


def read_pixel_batches(samples: list[Sample], max_stills: int, batch_size: int = 16) -> Iterator[PixelBatch]:
    """Every held-out still and clip once, in order, up to the given numbers."""
    stills = [s for s in samples if s.kind == "image"][:max_stills]
    for first in range(0, len(stills), batch_size):
        chosen = stills[first : first + batch_size]
        yield PixelBatch("image", stack(chosen, [read_image(s.media) for s in chosen]))
    for clip in [s for s in samples if s.kind == "video"][: max_stills // 8]:
        yield PixelBatch("video", read_clip(clip)[0].unsqueeze(0))


@dataclass(frozen=True)
class LanguageRun:
    """Training a language model on token documents; every stage is one of these with other documents, weights and schedule."""

    tokenizers: Path  # folder with vision tokenizer and text ranks, as `export_tokenizers` writes it
    documents: tuple[Path, ...]  # folders that `emu3 tokenize` writes, or single Parquet files of documents
    transformer: TransformerConfig
    trainer: TrainerConfig
    learner: LanguageLearnerConfig = field(default_factory=LanguageLearnerConfig)
    batches: LoaderConfig = field(default_factory=LoaderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # Weights to begin with: a model folder, or the folder of another run of the same network; None: fresh ones.
    init_from: Path | None = None
    lora: LoraConfig | None = None  # adapters are trained beside frozen weights, which `init_from` must name
    validation_split: str = "heldout_combination"
    max_validation: int = 256  # documents
    validation_context: int | None = None  # tokens of a row to measure on, where longer documents are to be measured than learnt
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_validation(self.max_validation)

    def run(self, sample: Callable[[Transformer, Path, int], None] | None = None) -> Trainer:
        """Train; a run that was stopped says so by `is_complete`, and goes on when it is called again. sample: as in LanguageLearner.

        To be called by every process that `torchrun` starts, as many as `parallel` wants.
        """
        vocabulary = read_vocabulary(self.tokenizers)
        if self.transformer.vocab_size != vocabulary.size:
            raise InputError(f"vocab_size is {self.transformer.vocab_size}; the tokenizers in {self.tokenizers} need {vocabulary.size}")
        if self.batches.context_length > self.transformer.max_positions:
            raise InputError(
                f"context_length is {self.batches.context_length}; the model's positions allow at most {self.transformer.max_positions}"
            )
        fingerprint = compute_fingerprint(self.tokenizers)
        store = DocumentStore(self.documents, {"train"}, fingerprint)
        held_out = DocumentStore(self.documents, {self.validation_split}, fingerprint)
        check_targets(store, self.learner.role_weights)
        with distributed_run(self.parallel, self.device) as mesh:
            rank, dp = data_rank(mesh)
            loader = TokenLoader(store, self.batches, vocabulary.pad, dp, rank)
            transformer = self.build_transformer(mesh, fingerprint)

            def validate() -> Iterator[TokenBatch]:
                context = self.validation_context or self.batches.context_length
                rows = max(1, self.batches.rows_per_micro_batch * self.batches.context_length // context)
                return read_held_out(held_out, context, vocabulary.pad, self.max_validation, rows, dp, rank)

            learner = LanguageLearner(transformer, self.learner, vocabulary, validate, sample, mesh)
            micro_batches = self.batches.rows_per_batch // (dp * self.batches.rows_per_micro_batch)
            peak = self.trainer.peak_flops
            if peak is None:
                peak = measure_peak_flops(self.device, self.learner.compute_dtype)
            trainer = Trainer(
                replace(self.trainer, micro_batches=micro_batches, peak_flops=peak),
                learner,
                MicroBatches(loader, micro_batches, is_first(mesh)),
                # The fingerprint lets exporting refuse other tokenizers than those that the documents were written with.
                describe_run("language", self) | {"fingerprint": fingerprint},
                mesh,
                lambda batch: (name for row in batch.sample_ids for name in row),
                loader,
            )
            trainer.run()
        return trainer

    def build_transformer(self, mesh: DeviceMesh | None, fingerprint: str) -> Transformer:
        """The network with its first weights, spread over the mesh. fingerprint: of the tokenizers that made the documents."""
        weights = None if self.init_from is None else open_weights(self.init_from, fingerprint)
        return build_network(self.transformer, self.learner.precision, weights, self.lora, self.seed, self.device, self.parallel, mesh)


def build_network(
    config: TransformerConfig,
    precision: Literal["fp32", "mixed", "bf16"],
    weights: Mapping[str, Tensor] | None,
    lora: LoraConfig | None,
    seed: int,
    device: str,
    parallel: ParallelConfig,
    mesh: DeviceMesh | None,
) -> Transformer:
    """A transformer to be trained, spread over the mesh. weights: what it begins with, by published name; None: drawn from the seed.

    With adapters every rank holds all weights for a moment. Raises InputError for adapters where they cannot be.
    """
    transformer = Transformer(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    compute_dtype = None if precision == "fp32" else torch.bfloat16
    if lora is not None:
        if weights is None:
            raise InputError("adapters need weights to stand beside; name them with init_from")
        if mesh is not None and (parallel.tp > 1 or precision == "bf16"):
            raise InputError(
                f"adapters are trained with tp 1 and weights in fp32 on several ranks; tp is {parallel.tp}, precision {precision}"
            )
        load_full_weights(transformer, weights, device)
        apply_lora(transformer, lora)
        parallelize(transformer, mesh, parallel, compute_dtype)
        return transformer
    parallelize(transformer, mesh, parallel, compute_dtype)
    if weights is None:
        fill_weights(transformer, torch.Generator(device).manual_seed(seed))
    else:
        load_full_weights(transformer, weights, device)
    return transformer


def check_validation(max_validation: int) -> None:
    """Before a run begins, since it measures when it ends, and nothing would be saved."""
    if max_validation < 1:
        raise InputError(f"max_validation is {max_validation}; it must be at least 1")


class MicroBatches:
    """A TokenLoader, which gives all micro-batches of a step at once, as the loop wants them: one after the other.

    is_talking: tell on stderr how full the rows are, and what was cut or left out, when the first batch is asked for.
    """

    def __init__(self, loader: TokenLoader, per_step: int, is_talking: bool) -> None:
        self.loader, self.per_step, self.is_talking = loader, per_step, is_talking

    def __call__(self, position: int) -> Iterator[TokenBatch]:
        if self.is_talking:
            Console(stderr=True).print(self.loader.report.describe(), highlight=False)
        step = position // self.per_step
        # A loader that is there already, from its saved state, need not count its way.
        steps = iter(self.loader) if self.loader.position == step else self.loader(step)
        return chain.from_iterable(steps)


def check_targets(store: DocumentStore, weights: RoleWeights, max_documents: int = 1000) -> None:
    """InputError where no token counts in any of the documents, looked at here and there."""
    table = weights.to_table().numpy()
    if not any(table[store.read(index)[1]].any() for index in spread_evenly(len(store), max_documents)):
        raise InputError(f"role weights {weights} count no token of the documents; there is nothing to learn")


def open_weights(folder: Path, fingerprint: str) -> Mapping[str, Tensor]:
    """The transformer's weights in a model folder or in a run folder. InputError where they belong to other tokenizers."""
    if (folder / DESCRIPTION_FILE).exists():
        if read_description(folder, "language")["fingerprint"] != fingerprint:
            raise InputError(f"{folder} was trained on documents of other tokenizers; documents and first weights must belong together")
        return load_weights(folder)
    if (folder / TEXT_RANKS).exists() and compute_fingerprint(folder) != fingerprint:
        raise InputError(f"{folder} holds a model of other tokenizers; documents and first weights must belong together")
    return open_state(folder, "transformer")
