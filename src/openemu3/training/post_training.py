"""The stages after pre-training (paper, section 2.5) as configurations: quality tuning, preferences, image-to-text, instruction tuning.

In: a model folder (or the run folder of an earlier stage) and documents or pairs. Out: runs, which train. The surprising thing: three of
the four are one LanguageRun with another table of role weights and another schedule; only preferences have an objective of their own.

Published for Emu3: which tokens count in each stage, and that quality tuning's learning rate falls linearly to zero. The rest is not; the
defaults here are those of the authors' released fine-tuning script: 1e-5, 30 steps of warm-up, weight decay 0.1, clipping at 5, a null
prompt for 5 % of the drawings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from openemu3.data.loader import GENERATING, LoaderConfig
from openemu3.data.mixture import MixtureConfig
from openemu3.data.pairs import PreferencePair, read_pairs, read_reference, split_pairs, write_pairs
from openemu3.data.shards import DocumentStore
from openemu3.distributed import ParallelConfig, data_rank, distributed_run, is_first
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.model.weights import read_config
from openemu3.records import InputError
from openemu3.tokenization.sequence import Vocabulary
from openemu3.training.export import compute_fingerprint, read_description, read_vocabulary
from openemu3.training.language_learner import LanguageLearnerConfig, RoleWeights
from openemu3.training.lora import LoraConfig
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.preference_learner import (
    PairBatch,
    PairBatches,
    PreferenceLearner,
    PreferenceLearnerConfig,
    Scorer,
    compare_references,
    compute_reference,
    digest_reference,
)
from openemu3.training.stages import LanguageRun, build_network, describe_run, open_weights
from openemu3.training.trainer import DESCRIPTION_FILE, Trainer, TrainerConfig

# Quality tuning learns codes alone; understanding, in both of its stages, learns what is to be answered and the EOS after it.
QUALITY_WEIGHTS = RoleWeights(text_context=0.0, text_target=0.0, vision=1.0, structure=0.0)
UNDERSTANDING_WEIGHTS = RoleWeights(text_context=0.0, text_target=1.0, vision=0.0, structure=0.0)

PAIRS_FILE = "pairs.parquet"
MAX_DIFFERENCE = (
    0.01  # nats per token between stored and recomputed log-probabilities; bf16 in batches of another make-up gives about 0.001
)


def read_transformer_config(folder: Path) -> TransformerConfig:
    """The network of a model folder, or of the run folder of a language model. Raises InputError for another folder."""
    if (folder / DESCRIPTION_FILE).exists():
        return TransformerConfig(**read_description(folder, "language")["transformer"])
    config = read_config(folder).transformer
    if config is None:
        raise InputError(f"{folder} holds no language model; name a model folder, or the run folder of a language model")
    return config


def build_quality_run(
    init_from: Path, tokenizers: Path, documents: tuple[Path, ...], folder: Path, num_steps: int = 1000, context_length: int = 10240
) -> LanguageRun:
    """Quality tuning (QFT): next-token cross-entropy on codes alone, at a learning rate that falls linearly to zero.

    documents: drawings and films of the samples that `emu3 select` chose, tokenised at 720 x 720. Codes that are described are no targets.
    """
    run = _build_run(init_from, tokenizers, documents, folder, num_steps, context_length, QUALITY_WEIGHTS)
    return replace(run, batches=replace(run.batches, null_prompt_share=0.05, learn_described_codes=False))


def build_image_to_text_run(
    init_from: Path,
    tokenizers: Path,
    documents: tuple[Path, ...],
    folder: Path,
    num_steps: int = 1000,
    context_length: int = 10240,
    text_share: float = 0.2,
    video_share: float = 0.0,
) -> LanguageRun:
    """Understanding, stage 1: vision first, text after, loss on text alone; mixed with pure language.

    text_share, video_share: part of the tokens that are of documents of text alone, and of films; the rest is of pictures. The paper mixes
    language in and does not say how much.
    """
    if not (0 <= text_share and 0 <= video_share and text_share + video_share <= 1):
        raise InputError(f"text_share is {text_share} and video_share {video_share}; 0 or more, and at most 1 together, are allowed")
    run = _build_run(init_from, tokenizers, documents, folder, num_steps, context_length, UNDERSTANDING_WEIGHTS)
    shares = {"describe": 1 - text_share - video_share, "describe_video": video_share, "text": text_share}
    return replace(run, batches=replace(run.batches, mixture=MixtureConfig(shares={key: part for key, part in shares.items() if part > 0})))


def build_instruction_run(
    init_from: Path, tokenizers: Path, documents: tuple[Path, ...], folder: Path, num_steps: int = 1000, context_length: int = 20480
) -> LanguageRun:
    """Understanding, stage 2: conversations in the published chat template, loss on the answers alone."""
    return _build_run(init_from, tokenizers, documents, folder, num_steps, context_length, UNDERSTANDING_WEIGHTS)


def _build_run(
    init_from: Path,
    tokenizers: Path,
    documents: tuple[Path, ...],
    folder: Path,
    num_steps: int,
    context_length: int,
    weights: RoleWeights,
) -> LanguageRun:
    transformer = read_transformer_config(init_from)
    optimizer = OptimizerConfig(1e-5, num_steps, min(30, num_steps // 10), schedule="linear", final_share=0.0, weight_decay=0.1)
    return LanguageRun(
        tokenizers=tokenizers,
        documents=documents,
        transformer=transformer,
        trainer=TrainerConfig(folder, num_steps, sample_every=0, validate_first=True),
        learner=LanguageLearnerConfig(optimizer=optimizer, role_weights=weights),
        batches=LoaderConfig(context_length=min(context_length, transformer.max_positions), null_prompt_share=0.0),
        init_from=init_from,
        validation_split="validation",
    )


class Replay(Sequence[NDArray[np.uint32]]):
    """Token ids of those documents of a store that draw or film and fit a row of `max_tokens`."""

    def __init__(self, store: DocumentStore, max_tokens: int) -> None:
        generating = [index for index, source in enumerate(store.sources) if source in GENERATING]
        self.store = store
        self.documents = np.flatnonzero(np.isin(store.source_of, generating) & (store.num_vision > 0) & (store.lengths <= max_tokens))

    @classmethod
    def open(cls, paths: tuple[Path, ...], fingerprint: str, max_tokens: int) -> Replay:
        """Documents of the training split. Raises InputError if none can be replayed."""
        found = cls(DocumentStore(paths, {"train"}, fingerprint), max_tokens)
        if not len(found):
            raise InputError(
                f"{', '.join(map(str, paths))} has nothing to replay; documents that draw or film in at most {max_tokens} tokens are needed"
            )
        return found

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: Any) -> Any:
        return self.store.read(int(self.documents[number]))[0]


@dataclass(frozen=True)
class PreferenceRun:
    """DPO on preference pairs, from a model that is its own reference.

    Args:
        init_from: model folder, or run folder of an earlier stage; the reference, too. The paper takes the model after quality tuning.
        pairs: file that `emu3 preferences pairs` writes. If it carries log-probabilities of this very reference they are used; otherwise
            they are computed first and kept as columns of `pairs.parquet` in the run folder.
        pairs_per_batch: of one micro-batch, on all ranks together.
        held_out_share: part of the prompts that are measured on instead of learnt.
        learn_structure: see PairBatches.
        check_reference: compute the stored log-probabilities again, and refuse to train where they differ.
        replay: documents of an earlier stage; as many of those that draw or film as there are pairs are learnt beside them in every step,
            so that the model keeps what it knew (Ouyang et al. 2022, section 3.5, mix pre-training in for the same reason).
    """

    tokenizers: Path
    init_from: Path
    transformer: TransformerConfig
    pairs: Path
    trainer: TrainerConfig
    learner: PreferenceLearnerConfig = field(default_factory=PreferenceLearnerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pairs_per_batch: int = 4
    held_out_share: float = 0.1
    learn_structure: bool = False
    check_reference: bool = False
    replay: tuple[Path, ...] = ()
    lora: LoraConfig | None = None
    seed: int = 0
    device: str = "cpu"

    def run(self, sample: Callable[[Transformer, Path, int], None] | None = None) -> Trainer:
        """Train; a run that was stopped says so by `is_complete`, and goes on when it is called again. sample: as in PreferenceLearner.

        To be called by every process that `torchrun` starts, as many as `parallel` wants.
        """
        vocabulary = read_vocabulary(self.tokenizers)
        fingerprint = compute_fingerprint(self.tokenizers)
        pairs = read_pairs(self.pairs, fingerprint)
        self._check_lengths(pairs)
        replay = Replay.open(self.replay, fingerprint, self.transformer.max_positions) if self.replay else ()
        with distributed_run(self.parallel, self.device) as mesh:
            weights = open_weights(self.init_from, fingerprint)
            precision = self.learner.precision
            transformer = build_network(self.transformer, precision, weights, self.lora, self.seed, self.device, self.parallel, mesh)
            digest = digest_reference(weights, self.transformer, pairs, self.learn_structure, precision)
            pairs = self._add_reference(pairs, digest, transformer, vocabulary, fingerprint, mesh)
            learnt, held_out = split_pairs(pairs, self.held_out_share)
            rank, dp = data_rank(mesh)
            options: dict[str, Any] = {"multiple": self._multiple, "dp": dp, "rank": rank}
            batches = PairBatches(learnt, vocabulary, self.pairs_per_batch, self.learn_structure, self.seed, replay=replay, **options)

            def validate() -> Iterator[PairBatch]:
                per_batch = min(self.pairs_per_batch, len(held_out) // dp * dp)
                if not per_batch:
                    return iter(())
                return PairBatches(held_out, vocabulary, per_batch, self.learn_structure, **options).read_in_order()

            learner = PreferenceLearner(transformer, self.learner, validate, sample, mesh)
            trainer = Trainer(self.trainer, learner, batches, describe_run("language", self) | {"fingerprint": fingerprint}, mesh)
            trainer.run()
        return trainer

    @property
    def _multiple(self) -> int:
        return 2 * self.parallel.cp * self.parallel.tp

    def _check_lengths(self, pairs: list[PreferencePair]) -> None:
        for pair in pairs:
            longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
            if longest > self.transformer.max_positions:
                raise InputError(
                    f"pair of prompt {pair.prompt!r} has {longest} tokens; the model's positions allow {self.transformer.max_positions}"
                )

    def _add_reference(
        self,
        pairs: list[PreferencePair],
        digest: str,
        transformer: Transformer,
        vocabulary: Vocabulary,
        fingerprint: str,
        mesh: DeviceMesh | None,
    ) -> list[PreferencePair]:
        """The pairs with log-probabilities of the reference, which the transformer still is: stored ones, or computed and stored now."""
        kept = self.trainer.folder / PAIRS_FILE
        stored = next((path for path in (self.pairs, kept) if path.exists() and read_reference(path) == digest), None)
        if stored is not None:
            found = read_pairs(stored, fingerprint)
            if not self.check_reference:
                return found
        console = Console(stderr=True, quiet=not is_first(mesh))
        console.print(f"log-probabilities of {len(pairs)} pairs under the reference", highlight=False)
        scorer = Scorer(transformer, self.learner.precision, ContextSplit(self.transformer, mesh), mesh)
        computed = compute_reference(scorer, pairs, vocabulary, self.learn_structure, multiple=self._multiple)
        if stored is None:
            if is_first(mesh):
                write_pairs(kept, computed, fingerprint, digest)
            return computed
        difference = compare_references(found, computed)
        if not difference <= MAX_DIFFERENCE:
            raise InputError(
                f"{stored} holds log-probabilities that differ from those of {self.init_from} by {difference:.3g} nats per token; "
                f"at most {MAX_DIFFERENCE} is allowed"
            )
        console.print(
            f"stored log-probabilities are those of {self.init_from}: largest difference {difference:.3g} nats per token", highlight=False
        )
        return found


def build_preference_run(init_from: Path, tokenizers: Path, pairs: Path, folder: Path, num_steps: int = 500) -> PreferenceRun:
    optimizer = OptimizerConfig(1e-5, num_steps, min(30, num_steps // 10), schedule="linear", weight_decay=0.0, max_grad_norm=5.0)
    return PreferenceRun(
        tokenizers=tokenizers,
        init_from=init_from,
        transformer=read_transformer_config(init_from),
        pairs=pairs,
        trainer=TrainerConfig(folder, num_steps, sample_every=0, validate_first=True),
        learner=PreferenceLearnerConfig(optimizer),
    )
