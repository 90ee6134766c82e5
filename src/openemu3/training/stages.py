"""Whole trainings as configurations: what to read, what to train, where to leave it.

In: sample or document files. Out: a run folder (checkpoints, metrics, samples) and, at the end, weights ready for use.
Stages differ in data and weights, never in code: they all go through the one Trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from openemu3.data.clips import PixelBatch, PixelBatches, PixelBatchesConfig, stack
from openemu3.data.documents import DocumentBatches, DocumentBatchesConfig, DocumentTable, LanguageBatch, pad_documents
from openemu3.data.samples import read_samples
from openemu3.media import read_image
from openemu3.model.transformer import Transformer, TransformerConfig, build_transformer
from openemu3.records import InputError, Sample
from openemu3.tokenization.encode import read_clip
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig
from openemu3.training.export import compute_fingerprint, load_newest, read_vocabulary
from openemu3.training.language_learner import LanguageLearner, LanguageLearnerConfig
from openemu3.training.trainer import Trainer, TrainerConfig
from openemu3.training.vision_learner import VisionLearner, VisionLearnerConfig, extend_codebook


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


def describe_run(kind: Literal["vision_tokenizer", "language"], run: VisionTokenizerRun | LanguageRun) -> dict[str, Any]:
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
    documents: tuple[Path, ...]
    transformer: TransformerConfig
    trainer: TrainerConfig
    learner: LanguageLearnerConfig = field(default_factory=LanguageLearnerConfig)
    batches: DocumentBatchesConfig = field(default_factory=DocumentBatchesConfig)
    validation_split: str = "heldout_combination"
    max_validation: int = 256  # documents
    seed: int = 0
    device: str = "cpu"

    def run(self, sample: Callable[[Transformer, Path, int], None] | None = None) -> Trainer:
        """Train; a run that was stopped says so by `is_complete`, and goes on when it is called again. sample: as in LanguageLearner."""
        vocabulary = read_vocabulary(self.tokenizers)
        if self.transformer.vocab_size != vocabulary.size:
            raise InputError(f"vocab_size is {self.transformer.vocab_size}; the tokenizers in {self.tokenizers} need {vocabulary.size}")
        fingerprint = compute_fingerprint(self.tokenizers)
        table = DocumentTable(self.documents, {"train"}, fingerprint)
        held_out = DocumentTable(self.documents, {self.validation_split}, fingerprint)
        weights = self.learner.role_weights.to_table().numpy()
        if not weights[np.unique(table.roles)].any():
            raise InputError(f"role weights {self.learner.role_weights} count no token of the documents; there is nothing to learn")
        transformer = build_transformer(self.transformer, torch.Generator(self.device).manual_seed(self.seed))
        learner = LanguageLearner(transformer, self.learner, lambda: read_in_order(held_out, self.max_validation, vocabulary.pad), sample)
        batches = DocumentBatches(table, self.batches, vocabulary.pad)
        # The fingerprint lets exporting refuse other tokenizers than those that the documents were written with.
        trainer = Trainer(self.trainer, learner, batches, describe_run("language", self) | {"fingerprint": fingerprint})
        trainer.run()
        return trainer


def read_in_order(table: DocumentTable, max_documents: int, pad_id: int, batch_size: int = 16) -> Iterator[LanguageBatch]:
    """Documents spread evenly over the table, a few at a time, with nothing dropped."""
    chosen = range(0, len(table), max(1, -(-len(table) // max_documents)))
    for first in range(0, len(chosen), batch_size):
        yield pad_documents([table.read(i) for i in chosen[first : first + batch_size]], pad_id)
