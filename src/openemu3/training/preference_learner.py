"""How the language model learns from preferences: DPO with next-token cross-entropy on the chosen completion (paper, section 2.5.1).

In: pairs of sampled completions (token ids) with their log-probabilities under the reference, the model that the run starts from.
Out: trained Transformer weights. What surprises: the gradient is made by the memory-bounded cross-entropy of `objectives.py`. DPO's loss
depends on the network only through one log-probability per completion, a sum over its tokens; so its gradient is that of a
cross-entropy in which every token of a completion weighs the derivative of the loss by that sum. The hidden states are computed once.

With s(y) = log p_policy(y | prompt) - log p_reference(y | prompt), summed over the tokens that count, a pair's loss is
    -log sigmoid(beta (s(chosen) - s(rejected))) + weight * (-log p_policy(chosen | prompt) / number of its tokens).
Beside every pair a document of an earlier stage may be replayed, with its own cross-entropy, so that the model keeps what it knew.

Shapes: P pairs, R rows (2P: the chosen completions, then the rejected ones; 3P with replayed documents after them), S tokens, D model
width, N tokens that count (of this rank's part of the rows, where context parallelism divides them).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from openemu3.data.pairs import PreferencePair, with_reference
from openemu3.distributed import data_rank, sum_over
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.parallelize import reshard, set_last_micro_batch
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.records import InputError
from openemu3.tokenization.sequence import Vocabulary
from openemu3.training.checkpoint import (
    State,
    add_prefix,
    list_optimizer_tensors,
    load_optimizer_tensors,
    name_parameters,
    take_prefix,
)
from openemu3.training.objectives import compute_cross_entropy
from openemu3.training.optimizer import OptimizerConfig, apply_update, build_optimizer, compute_learning_rate
from openemu3.training.trainer import Metrics


@dataclass(frozen=True)
class PreferenceObjectiveConfig:
    """What is minimised. Emu3's own values are unpublished; each field names the source of its default."""

    # How dear it is to move away from the reference. 0.1: Rafailov et al. 2023 (arXiv 2305.18290, appendix B), and a third party's DPO
    # of Emu3.
    beta: float = 0.1
    # Of the next-token cross-entropy on the chosen completion, averaged over its tokens. 1: Pang et al. 2024 (arXiv 2404.19733, eq. 2).
    cross_entropy_weight: float = 1.0
    # Divide each completion's log-probabilities by its number of tokens, as the third party's DPO of Emu3 does; the original DPO does not.
    length_normalised: bool = False
    # Of the cross-entropy of a replayed document, averaged over its codes, where documents are replayed. That of Ouyang et al. 2022
    # (arXiv 2203.02155, eq. 2) cannot be carried over, since their objective has another scale.
    replay_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise InputError(f"beta is {self.beta}; a number above 0 is allowed")
        if not 0 <= self.cross_entropy_weight < float("inf"):
            raise InputError(f"cross_entropy_weight is {self.cross_entropy_weight}; 0 or more is allowed")
        if not 0 < self.replay_weight < float("inf"):
            raise InputError(f"replay_weight is {self.replay_weight}; a number above 0 is allowed")


class PreferenceLoss(NamedTuple):
    """loss: sum over pairs []; weight: number of pairs; rewards [2, P]: beta times log-ratio; cross_entropy [P]: of chosen, per token;
    replayed [P]: of replayed documents, per token, 0 without them."""

    loss: Tensor
    weight: float
    rewards: Tensor
    cross_entropy: Tensor
    replayed: Tensor


def compute_preference_loss(policy: Tensor, reference: Tensor, lengths: Tensor, config: PreferenceObjectiveConfig) -> PreferenceLoss:
    """DPO and next-token cross-entropy on the chosen completion, and on replayed documents, as sums over pairs.

    Args:
        policy: [2 or 3, P], log-probability of each completion in nats, summed over its tokens; row 0 chosen, row 1 rejected, row 2, if
            there is one, the replayed documents.
        reference: [2, P], of the completions.
        lengths: as policy, how many tokens those sums are over, each at least 1.
    """
    log_ratios = policy[:2] - reference
    if config.length_normalised:
        log_ratios = log_ratios / lengths[:2]
    rewards = config.beta * log_ratios
    cross_entropy = -policy[0] / lengths[0]
    replayed = -(policy[2:] / lengths[2:]).sum(0)  # zeros if nothing is replayed
    losses = -F.logsigmoid(rewards[0] - rewards[1]) + config.cross_entropy_weight * cross_entropy + config.replay_weight * replayed
    return PreferenceLoss(losses.sum(), float(policy.shape[1]), rewards.detach(), cross_entropy.detach(), replayed.detach())


# -- batches -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch:
    """P pairs as R rows: chosen completions, rejected ones and, if there are any, P replayed documents.

    token_ids: int64 [R, S], prompt and completion, padded on the right. counted: bool [R, S], tokens whose log-probability counts.
    documents: int32 [R, S], 0 for tokens and 1 for padding. reference: float64 [2, P], sums of log-probabilities under the reference; NaN
    where they have not been computed.
    """

    token_ids: Tensor
    counted: Tensor
    documents: Tensor
    reference: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many tokens count, [2 or 3, P]."""
        return self.by_pair(self.counted.sum(1))

    def by_pair(self, values: Tensor) -> Tensor:
        """Values of the rows [R] -> [2 or 3, P]."""
        return values.view(-1, self.reference.shape[1])


@dataclass(frozen=True)
class PairBatches:
    """Calling it with a position yields micro-batches of pairs from that number on, endlessly; every epoch has an order of its own.

    Args:
        pairs_per_batch: of one micro-batch, on all ranks together; a multiple of dp.
        learn_structure: whether EOL, EOF, EOI and EOS of a completion count beside its codes. Decoding forces them, so that there they
            tell nothing about what a model prefers.
        multiple: row lengths are multiples of this, for context parallelism.
        dp, rank: this rank reads part `rank` of every micro-batch.
        replay: token ids of documents, as many of which stand beside the pairs of every micro-batch; each has its turn before any has
            another.
    """

    pairs: Sequence[PreferencePair]
    vocabulary: Vocabulary
    pairs_per_batch: int
    learn_structure: bool = False
    seed: int = 0
    multiple: int = 1
    dp: int = 1
    rank: int = 0
    replay: Sequence[NDArray[np.uint32]] = ()

    def __post_init__(self) -> None:
        if self.pairs_per_batch < 1 or self.pairs_per_batch % self.dp:
            raise InputError(f"pairs_per_batch is {self.pairs_per_batch}; a multiple of {self.dp} (dp) is allowed")
        if len(self.pairs) < self.pairs_per_batch:
            raise InputError(f"there are {len(self.pairs)} preference pairs to learn from; pairs_per_batch is {self.pairs_per_batch}")

    def __call__(self, position: int) -> Iterator[PairBatch]:
        per_epoch = len(self.pairs) // self.pairs_per_batch  # what is left over has its turn in another epoch's order
        while True:
            epoch, number = divmod(position, per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))
            for first in range(number * self.pairs_per_batch, per_epoch * self.pairs_per_batch, self.pairs_per_batch):
                yield self.stack([self.pairs[index] for index in order[first : first + self.pairs_per_batch]], self.choose_replay(position))
                position += 1

    def read_in_order(self) -> Iterator[PairBatch]:
        """Every pair once; of the last micro-batch only as many as all ranks have alike, unless there is one rank."""
        for first in range(0, len(self.pairs), self.pairs_per_batch):
            chosen = self.pairs[first : first + self.pairs_per_batch]
            chosen = chosen[: len(chosen) // self.dp * self.dp]
            if chosen:
                yield self.stack(chosen)

    def choose_replay(self, position: int) -> Sequence[NDArray[np.uint32]]:
        """The documents beside the pairs of micro-batch number `position`."""
        if not self.replay:
            return ()
        numbers = range(position * self.pairs_per_batch, (position + 1) * self.pairs_per_batch)
        places = (divmod(number, len(self.replay)) for number in numbers)
        return [self.replay[shuffle(len(self.replay), self.seed, round_)[place]] for round_, place in places]

    def stack(self, pairs: Sequence[PreferencePair], replayed: Sequence[NDArray[np.uint32]] = ()) -> PairBatch:
        """This rank's part of a micro-batch of these pairs, and of as many replayed documents or none."""
        share = len(pairs) // self.dp
        part = slice(self.rank * share, (self.rank + 1) * share)
        return stack_pairs(pairs[part], self.vocabulary, self.learn_structure, self.multiple, replayed[part])


@lru_cache(maxsize=2)  # a micro-batch lies in two rounds at most, unless there are very few documents
def shuffle(number: int, seed: int, round_: int) -> NDArray[np.int64]:
    """The order of replayed documents in one round through all of them; another one than that of the pairs."""
    return np.random.default_rng((seed, round_, 1)).permutation(number)


def stack_pairs(
    pairs: Sequence[PreferencePair],
    vocabulary: Vocabulary,
    learn_structure: bool = False,
    multiple: int = 1,
    replayed: Sequence[NDArray[np.uint32]] = (),
) -> PairBatch:
    """One batch of these pairs. Raises InputError for ids outside the vocabulary and for a completion in which no token counts.

    replayed: documents, none or one for each pair, of which the codes count; at least one in each.
    """
    completions = [(pair, pair.chosen_ids) for pair in pairs] + [(pair, pair.rejected_ids) for pair in pairs]
    longest = max([len(pair.prompt_ids) + len(ids) for pair, ids in completions] + [len(ids) for ids in replayed])
    shape = (len(completions) + len(replayed), -(-longest // multiple) * multiple)
    token_ids, counted = torch.full(shape, vocabulary.pad, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    documents = torch.ones(shape, dtype=torch.int32)
    for row, (pair, ids) in enumerate(completions):
        line = np.concatenate((pair.prompt_ids, ids)).astype(np.int64)
        if line.max() >= vocabulary.size:
            raise InputError(f"pair of prompt {pair.prompt!r} holds the id {line.max()}; the vocabulary has 0 to {vocabulary.size - 1}")
        counts = np.ones(len(ids), bool) if learn_structure else ids >= vocabulary.visual_offset
        if not counts.any():
            raise InputError(f"pair of prompt {pair.prompt!r} has a completion without visual tokens; there is nothing to compare")
        token_ids[row, : len(line)] = torch.from_numpy(line)
        documents[row, : len(line)] = 0
        counted[row, len(pair.prompt_ids) : len(line)] = torch.from_numpy(counts)
    for row, ids in enumerate(replayed, len(completions)):
        token_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        documents[row, : len(ids)] = 0
        counted[row, : len(ids)] = torch.from_numpy(ids >= vocabulary.visual_offset)
    values = [[pair.reference_chosen for pair in pairs], [pair.reference_rejected for pair in pairs]]
    reference = torch.tensor([[math.nan if value is None else value for value in row] for row in values], dtype=torch.float64)
    return PairBatch(token_ids, counted, documents, reference)


# -- log-probabilities -------------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """This rank's tokens that count, in one line: hidden states before them [N, D], their ids [N], and the row of each [N]."""

    hidden: Tensor
    targets: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of completions under a transformer, alike on every rank.

    Args:
        precision: fp32; mixed: computing in bf16 with weights in fp32; bf16: both in bf16. With a mesh, weights arrive in bf16.
        context: how the mesh divides rows; mesh: None for a single process.
    """

    transformer: Transformer
    precision: Literal["fp32", "mixed", "bf16"]
    context: ContextSplit
    mesh: DeviceMesh | None = None

    def compute_hidden(self, batch: PairBatch) -> Counted:
        device = next(self.transformer.parameters()).device
        # The target of a place is the token after it, and belongs to it wherever context parallelism puts it. BOS never counts.
        rows = torch.arange(len(batch.token_ids))[:, None].expand_as(batch.token_ids)
        parts = (batch.token_ids, batch.token_ids.roll(-1, 1), batch.counted.roll(-1, 1), rows)
        inputs, targets, counts, rows = (self.context.split(part) for part in parts)  # [2P, S / cp]
        kept = counts.flatten().nonzero().flatten()
        attention = self.context.build_attention(batch.documents.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "mixed" and self.mesh is None):
            hidden = self.transformer(inputs.to(device), attention, attention.positions)
        hidden = hidden.flatten(0, 1)[kept.to(device)]
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        return Counted(hidden.to(dtype), targets.flatten()[kept].to(device), rows.flatten()[kept].to(device))

    @torch.no_grad()
    def sum_log_probabilities(self, counted: Counted, batch: PairBatch) -> Tensor:
        """float64 [2 or 3, P]: each row's log-probability, of all its tokens wherever they lie."""
        ones = torch.ones(len(counted.targets), device=counted.targets.device)
        _, losses = compute_cross_entropy(counted.hidden.detach(), self.transformer.lm_head.weight, counted.targets, ones)
        sums = torch.zeros(len(batch.token_ids), dtype=torch.float64, device=losses.device).index_add_(0, counted.rows, -losses.double())
        if self.mesh is not None and self.context.size > 1:
            dist.all_reduce(sums, group=self.mesh["cp"].get_group())
        return batch.by_pair(sums)

    @torch.no_grad()
    def score(self, batch: PairBatch) -> Tensor:
        return self.sum_log_probabilities(self.compute_hidden(batch), batch)


@torch.no_grad()
def compute_reference(
    scorer: Scorer,
    pairs: Sequence[PreferencePair],
    vocabulary: Vocabulary,
    learn_structure: bool = False,
    pairs_per_rank: int = 4,
    multiple: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[PreferencePair]:
    """The pairs with their log-probabilities under the scorer's transformer, which is the reference; in evaluation mode, as in training."""
    was_training = scorer.transformer.training
    scorer.transformer.eval()
    rank, dp = data_rank(scorer.mesh)
    sums = torch.zeros(2, len(pairs), dtype=torch.float64)
    for first in range(0, len(pairs), dp * pairs_per_rank):
        # A rank for which nothing is left scores the last pair again, because all ranks must take part in every pass, and forgets it.
        own = range(first + rank * pairs_per_rank, min(first + (rank + 1) * pairs_per_rank, len(pairs)))
        batch = stack_pairs([pairs[index] for index in own] or pairs[-1:], vocabulary, learn_structure, multiple)
        scores = scorer.score(batch).cpu()
        if len(own):
            sums[:, own.start : own.stop] = scores
        if progress is not None:
            progress(min(first + dp * pairs_per_rank, len(pairs)), len(pairs))
    if scorer.mesh is not None:
        reshard(scorer.transformer)
        sums = sum_over(scorer.mesh, sums) / scorer.context.size  # ranks of cp have the same
    scorer.transformer.train(was_training)
    return [with_reference(pair, *sums[:, column].tolist()) for column, pair in enumerate(pairs)]


def compare_references(stored: Sequence[PreferencePair], computed: Sequence[PreferencePair]) -> float:
    """The largest difference between two computations of the same log-probabilities, in nats per token; infinite where one is missing."""
    largest = 0.0
    for one, other in zip(stored, computed, strict=True):
        sides = (
            (one.reference_chosen, other.reference_chosen, one.chosen_ids),
            (one.reference_rejected, other.reference_rejected, one.rejected_ids),
        )
        for a, b, ids in sides:
            difference = math.inf if a is None or b is None or math.isnan(a - b) else abs(a - b) / len(ids)
            largest = max(largest, difference)
    return largest


def digest_reference(
    weights: Mapping[str, Tensor], config: TransformerConfig, pairs: Sequence[PreferencePair], learn_structure: bool, precision: str
) -> str:
    """Which log-probabilities these are: 32 hex digits of the reference's weights, the pairs' tokens, and what else they depend on."""
    digest = hashlib.sha256(json.dumps([asdict(config), learn_structure, precision]).encode())
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(8) + ids.tobytes())
    return digest.hexdigest()[:32]


# -- the learner -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceLearnerConfig:
    """Learning rate: unpublished; 1e-5 is a third party's DPO of Emu3, five times below the paper's pre-training."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(1e-5, schedule="linear", weight_decay=0.0))
    objective: PreferenceObjectiveConfig = field(default_factory=PreferenceObjectiveConfig)
    precision: Literal["fp32", "mixed", "bf16"] = "mixed"  # as in LanguageLearnerConfig

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "mixed", "bf16"):
            raise InputError(f"precision is {self.precision!r}; fp32, mixed or bf16 is allowed")


class PreferenceLearner:
    """Learner of a Transformer that starts as its own reference. Dropout is off: at step 0 every reward is 0.

    Args:
        validation: yields batches of held-out pairs; called at every validation. All ranks must get the same number of them.
        sample: called with (transformer, folder, step) to draw something to look at. In a run of several ranks no rank has all weights,
            so nothing is drawn.
        mesh: of the run's ranks, for which `parallelize` has prepared the transformer; None for a single process.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: PreferenceLearnerConfig,
        validation: Callable[[], Iterator[PairBatch]],
        sample: Callable[[Transformer, Path, int], None] | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.transformer, self.config, self.validation, self.sample, self.mesh = transformer, config, validation, sample, mesh
        self.scorer = Scorer(transformer, config.precision, ContextSplit(transformer.config, mesh), mesh)
        self.optimizer = build_optimizer(config.optimizer, transformer)
        transformer.eval()

    def learn(self, step: int, batches: Sequence[PairBatch]) -> Metrics:
        sums = PreferenceSums()
        for number, batch in enumerate(batches):
            if self.mesh is not None:
                set_last_micro_batch(self.transformer, number == len(batches) - 1)
            counted = self.scorer.compute_hidden(batch)
            policy = self.scorer.sum_log_probabilities(counted, batch).requires_grad_()
            result = self._measure(policy, batch, sums)
            (slopes,) = torch.autograd.grad(result.loss, policy)  # of the loss by each completion's log-probability
            weights = -slopes.flatten()[counted.rows].float()  # a token's cross-entropy is minus its log-probability
            surrogate, _ = compute_cross_entropy(counted.hidden, self.transformer.lm_head.weight, counted.targets, weights)
            surrogate.backward()
        sums.reduce(self.mesh)
        # Gradients are of sums; one division by the pairs of all micro-batches and ranks makes any split give the same update.
        for parameter in self.transformer.parameters():
            if parameter.grad is not None:
                parameter.grad /= sums.weight
        metrics = sums.to_metrics()
        norm = apply_update(self.optimizer, self.config.optimizer, step, math.isfinite(metrics["loss"]))
        rate = compute_learning_rate(self.config.optimizer, step)
        return {**metrics, "grad_norm": float(norm), "learning_rate": rate, "tokens": sums.num_tokens}

    @torch.no_grad()
    def validate(self) -> Metrics:
        sums = PreferenceSums()
        for batch in self.validation():
            self._measure(self.scorer.score(batch), batch, sums)
        if self.mesh is not None:
            reshard(self.transformer)
        sums.reduce(self.mesh)
        return sums.to_metrics()

    def _measure(self, policy: Tensor, batch: PairBatch, sums: PreferenceSums) -> PreferenceLoss:
        reference, lengths = batch.reference.to(policy.device), batch.lengths.to(policy.device)
        result = compute_preference_loss(policy, reference, lengths, self.config.objective)
        if self.scorer.context.rank == 0:  # ranks of cp have the same pairs
            sums.add(result, policy.detach(), reference, lengths)
        return result

    def write_samples(self, folder: Path, step: int) -> None:
        if self.sample is not None and self.mesh is None:
            self.sample(self.transformer, folder, step)

    def list_tensors(self) -> dict[str, Tensor]:
        names = name_parameters(self.transformer)
        return add_prefix("transformer", self.transformer.state_dict()) | add_prefix(
            "optimizer", list_optimizer_tensors(self.optimizer, names)
        )

    def list_state(self) -> State:
        return {}

    def load(self, tensors: dict[str, Tensor], state: State) -> None:
        self.transformer.load_state_dict(take_prefix("transformer", tensors))
        load_optimizer_tensors(self.optimizer, name_parameters(self.transformer), take_prefix("optimizer", tensors))


class PreferenceSums:
    """Sums over pairs, for logs; `reduce` makes them those of all ranks."""

    NAMES = ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "kl", "cross_entropy", "replay_cross_entropy")

    def __init__(self) -> None:
        self.sums = torch.zeros(len(self.NAMES) + 2, dtype=torch.float64)  # and the number of pairs and of tokens

    @property
    def weight(self) -> float:
        return float(self.sums[-2])

    @property
    def num_tokens(self) -> float:
        return float(self.sums[-1])

    def add(self, result: PreferenceLoss, policy: Tensor, reference: Tensor, lengths: Tensor) -> None:
        chosen, rejected = result.rewards
        per_pair = (
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).double(),
            ((reference - policy[:2]) / lengths[:2]).mean(0),
            result.cross_entropy,
            result.replayed,
        )
        ends = (result.loss.detach().new_tensor(result.weight), lengths.sum())
        self.sums += torch.stack([result.loss.detach(), *(values.sum() for values in per_pair), *ends]).double().cpu()

    def reduce(self, mesh: DeviceMesh | None) -> None:
        self.sums = sum_over(mesh, self.sums)

    def to_metrics(self) -> Metrics:
        """Means per pair, nothing without pairs. `kl`: mean of log p_reference - log p_policy per token over both completions, an estimate
        of KL(reference || policy) that is biased by having chosen the best and the worst of the samples. `accuracy`: share of pairs with
        a positive margin. `replay_cross_entropy` is there only if documents are replayed."""
        if not self.weight:
            return {}
        means = dict(zip(self.NAMES, (self.sums[: len(self.NAMES)] / self.weight).tolist(), strict=True))
        if not means["replay_cross_entropy"]:
            del means["replay_cross_entropy"]
        return means
