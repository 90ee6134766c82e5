"""How the language model learns from preferences: DPO with next-token cross-entropy on the chosen completion (paper, section 2.5.1).

In: pairs of sampled completions (token ids) with their log-probabilities under the reference, the model that the run starts from.
Out: trained Transformer weights. What surprises: the gradient is made by the memory-bounded cross-entropy of `objectives.py`. DPO's loss
depends on the network only through one log-probability per completion, a sum over its tokens; so its gradient is that of a
cross-entropy in which every token of a completion weighs the derivative of the loss by that sum. The hidden states are computed once.

With s(y) = log p_policy(y | prompt) - log p_reference(y | prompt), summed over the tokens that count, a pair's loss is
    -log sigmoid(beta (s(chosen) - s(rejected))) + weight * (-log p_policy(chosen | prompt) / number of its tokens).

Shapes: P pairs, 2P rows (the chosen completions, then the rejected ones), S tokens, D model width, N tokens that count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openemu3.data.pairs import PreferencePair, with_reference
from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import Transformer
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
from openemu3.training.optimizer import OptimizerConfig, apply_update, build_optimizer
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

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise InputError(f"beta is {self.beta}; a number above 0 is allowed")
        if not 0 <= self.cross_entropy_weight < float("inf"):
            raise InputError(f"cross_entropy_weight is {self.cross_entropy_weight}; 0 or more is allowed")


class PreferenceLoss(NamedTuple):
    """loss: sum over pairs []; weight: number of pairs; rewards [2, P]: beta times log-ratio; cross_entropy [P]: of chosen, per token."""

    loss: Tensor
    weight: float
    rewards: Tensor
    cross_entropy: Tensor


def compute_preference_loss(policy: Tensor, reference: Tensor, lengths: Tensor, config: PreferenceObjectiveConfig) -> PreferenceLoss:
    """DPO and next-token cross-entropy on the chosen completion, as sums over pairs.

    Args:
        policy, reference: [2, P], log-probability of each completion in nats, summed over its tokens; row 0 chosen, row 1 rejected.
        lengths: [2, P], how many tokens those sums are over, each at least 1.
    """
    log_ratios = policy - reference
    if config.length_normalised:
        log_ratios = log_ratios / lengths
    rewards = config.beta * log_ratios
    cross_entropy = -policy[0] / lengths[0]
    losses = -F.logsigmoid(rewards[0] - rewards[1]) + config.cross_entropy_weight * cross_entropy
    return PreferenceLoss(losses.sum(), float(policy.shape[1]), rewards.detach(), cross_entropy.detach())


# -- batches -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch:
    """P pairs as 2P rows, chosen completions first.

    token_ids: int64 [2P, S], prompt and completion, padded on the right. counted: bool [2P, S], tokens whose log-probability counts.
    reference: float64 [2, P], sums of log-probabilities under the reference; NaN where they have not been computed.
    """

    token_ids: Tensor
    counted: Tensor
    reference: Tensor


class PairBatches:
    """Calling it with a position yields batches of pairs from that number on, endlessly; every epoch has an order of its own.

    learn_structure: whether EOL, EOF, EOI and EOS of a completion count beside its codes. Decoding forces them, so that there they tell
    nothing about what a model prefers.
    """

    def __init__(
        self, pairs: Sequence[PreferencePair], vocabulary: Vocabulary, pairs_per_batch: int, learn_structure: bool = False, seed: int = 0
    ) -> None:
        if pairs_per_batch < 1:
            raise InputError(f"pairs_per_batch is {pairs_per_batch}; it must be at least 1")
        if not pairs:
            raise InputError("there are no preference pairs to learn from; at least one is needed")
        self.pairs, self.vocabulary, self.learn_structure, self.seed = pairs, vocabulary, learn_structure, seed
        self.pairs_per_batch = min(pairs_per_batch, len(pairs))

    def __call__(self, position: int) -> Iterator[PairBatch]:
        per_epoch = len(self.pairs) // self.pairs_per_batch  # what is left over comes first in another epoch's order
        while True:
            epoch, number = divmod(position, per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))
            for first in range(number * self.pairs_per_batch, per_epoch * self.pairs_per_batch, self.pairs_per_batch):
                chosen = [self.pairs[index] for index in order[first : first + self.pairs_per_batch]]
                yield stack_pairs(chosen, self.vocabulary, self.learn_structure)
                position += 1

    def read_in_order(self) -> Iterator[PairBatch]:
        """Every pair once."""
        for first in range(0, len(self.pairs), self.pairs_per_batch):
            yield stack_pairs(self.pairs[first : first + self.pairs_per_batch], self.vocabulary, self.learn_structure)


def stack_pairs(pairs: Sequence[PreferencePair], vocabulary: Vocabulary, learn_structure: bool = False) -> PairBatch:
    """One batch of these pairs. Raises InputError for ids outside the vocabulary and for a completion in which no token counts."""
    completions = [(pair, pair.chosen_ids) for pair in pairs] + [(pair, pair.rejected_ids) for pair in pairs]
    longest = max(len(pair.prompt_ids) + len(ids) for pair, ids in completions)
    token_ids = torch.full((len(completions), longest), vocabulary.pad, dtype=torch.int64)
    counted = torch.zeros((len(completions), longest), dtype=torch.bool)
    for row, (pair, ids) in enumerate(completions):
        line = np.concatenate((pair.prompt_ids, ids)).astype(np.int64)
        if line.max() >= vocabulary.size:
            raise InputError(f"pair of prompt {pair.prompt!r} holds the id {line.max()}; the vocabulary has 0 to {vocabulary.size - 1}")
        counts = np.ones(len(ids), bool) if learn_structure else ids >= vocabulary.visual_offset
        if not counts.any():
            raise InputError(f"pair of prompt {pair.prompt!r} has a completion without visual tokens; there is nothing to compare")
        token_ids[row, : len(line)] = torch.from_numpy(line)
        counted[row, len(pair.prompt_ids) : len(line)] = torch.from_numpy(counts)
    values = [[pair.reference_chosen for pair in pairs], [pair.reference_rejected for pair in pairs]]
    reference = torch.tensor([[float("nan") if value is None else value for value in row] for row in values], dtype=torch.float64)
    return PairBatch(token_ids, counted, reference)


# -- log-probabilities -------------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """The tokens that count, in one line: hidden states before them [N, D], ids [N], row of each [N], and how many each row has [2, P]."""

    hidden: Tensor
    targets: Tensor
    rows: Tensor
    lengths: Tensor


def compute_hidden(transformer: Transformer, batch: PairBatch, autocast_bf16: bool) -> Counted:
    device = next(transformer.parameters()).device
    token_ids, counted = batch.token_ids.to(device), batch.counted.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast_bf16):
        hidden = transformer(token_ids[:, :-1], CausalAttention())  # [2P, S-1, D]; padding is on the right: no mask needed
    kept = counted[:, 1:].flatten().nonzero().flatten()
    compute_dtype = torch.bfloat16 if autocast_bf16 else hidden.dtype
    rows = torch.arange(len(token_ids), device=device).repeat_interleave(counted[:, 1:].sum(1))
    lengths = counted[:, 1:].sum(1).view(2, -1)
    return Counted(hidden.flatten(0, 1)[kept].to(compute_dtype), token_ids[:, 1:].flatten()[kept], rows, lengths)


@torch.no_grad()
def sum_log_probabilities(transformer: Transformer, counted: Counted) -> Tensor:
    """float64 [2, P]: each completion's log-probability."""
    ones = torch.ones(len(counted.targets), device=counted.targets.device)
    _, losses = compute_cross_entropy(counted.hidden.detach(), transformer.lm_head.weight, counted.targets, ones)
    sums = torch.zeros(counted.lengths.numel(), dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, counted.rows, -losses.double()).view(2, -1)


@torch.no_grad()
def compute_reference(
    transformer: Transformer,
    pairs: Sequence[PreferencePair],
    vocabulary: Vocabulary,
    pairs_per_batch: int = 8,
    learn_structure: bool = False,
    autocast_bf16: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[PreferencePair]:
    """The pairs with their log-probabilities under this transformer, which is the reference; in evaluation mode, as in training."""
    was_training = transformer.training
    transformer.eval()
    done: list[PreferencePair] = []
    for batch in PairBatches(pairs, vocabulary, pairs_per_batch, learn_structure).read_in_order():
        sums = sum_log_probabilities(transformer, compute_hidden(transformer, batch, autocast_bf16)).cpu()
        part = pairs[len(done) : len(done) + sums.shape[1]]
        done += [with_reference(pair, *sums[:, column].tolist()) for column, pair in enumerate(part)]
        if progress is not None:
            progress(len(done), len(pairs))
    transformer.train(was_training)
    return done


def compare_references(stored: Sequence[PreferencePair], computed: Sequence[PreferencePair]) -> float:
    """The largest difference between two computations of the same log-probabilities, in nats; NaN or missing ones give infinity."""
    largest = 0.0
    for one, other in zip(stored, computed, strict=True):
        for a, b in ((one.reference_chosen, other.reference_chosen), (one.reference_rejected, other.reference_rejected)):
            difference = float("inf") if a is None or b is None else abs(a - b)
            largest = max(largest, difference if difference == difference else float("inf"))
    return largest


def digest_reference(transformer: Transformer, learn_structure: bool, autocast_bf16: bool) -> str:
    """Which reference made log-probabilities: its weights, and what else they depend on."""
    digest = hashlib.sha256(json.dumps([asdict(transformer.config), learn_structure, autocast_bf16]).encode())
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


# -- the learner -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceLearnerConfig:
    """Learning rate: unpublished; 1e-5 is a third party's DPO of Emu3, five times below the paper's pre-training."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(1e-5, schedule="linear", weight_decay=0.0))
    objective: PreferenceObjectiveConfig = field(default_factory=PreferenceObjectiveConfig)
    autocast_bf16: bool = True


class PreferenceLearner:
    """Learner of a Transformer that starts as its own reference. Dropout is off: at step 0 every reward is 0.

    Args:
        validation: yields batches of held-out pairs; called at every validation.
        sample: called with (transformer, folder, step) to draw something to look at.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: PreferenceLearnerConfig,
        validation: Callable[[], Iterator[PairBatch]],
        sample: Callable[[Transformer, Path, int], None] | None = None,
    ) -> None:
        self.transformer, self.config, self.validation, self.sample = transformer, config, validation, sample
        self.optimizer = build_optimizer(config.optimizer, transformer)
        transformer.eval()

    def learn(self, step: int, batches: Sequence[PairBatch]) -> Metrics:
        sums = PreferenceSums()
        for batch in batches:
            counted = compute_hidden(self.transformer, batch, self.config.autocast_bf16)
            policy = sum_log_probabilities(self.transformer, counted).requires_grad_()
            result = compute_preference_loss(policy, batch.reference.to(policy.device), counted.lengths, self.config.objective)
            sums.add(result, policy.detach(), batch.reference.to(policy.device), counted.lengths)
            (slopes,) = torch.autograd.grad(result.loss, policy)  # of the loss by each completion's log-probability
            weights = -slopes.flatten()[counted.rows].float()  # a token's cross-entropy is minus its log-probability
            surrogate, _ = compute_cross_entropy(counted.hidden, self.transformer.lm_head.weight, counted.targets, weights)
            surrogate.backward()
        for parameter in self.transformer.parameters():
            if parameter.grad is not None:
                parameter.grad /= sums.weight
        norm = apply_update(self.optimizer, self.config.optimizer, step)
        return {**sums.to_means(), "grad_norm": float(norm), "tokens": float(sums.num_tokens)}

    @torch.no_grad()
    def validate(self) -> Metrics:
        sums = PreferenceSums()
        for batch in self.validation():
            counted = compute_hidden(self.transformer, batch, self.config.autocast_bf16)
            policy = sum_log_probabilities(self.transformer, counted)
            reference = batch.reference.to(policy.device)
            sums.add(compute_preference_loss(policy, reference, counted.lengths, self.config.objective), policy, reference, counted.lengths)
        return sums.to_means() if sums.weight else {}

    def write_samples(self, folder: Path, step: int) -> None:
        if self.sample is not None:
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
    """Sums over pairs, for logs."""

    def __init__(self) -> None:
        self.sums = torch.zeros(7, dtype=torch.float64)
        self.weight = 0.0
        self.num_tokens = 0

    def add(self, result: PreferenceLoss, policy: Tensor, reference: Tensor, lengths: Tensor) -> None:
        chosen, rejected = result.rewards
        per_pair = (
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).double(),
            ((reference - policy) / lengths).mean(0),
            result.cross_entropy,
        )
        self.sums += torch.stack([result.loss.detach(), *(values.sum() for values in per_pair)]).double().cpu()
        self.weight += result.weight
        self.num_tokens += int(lengths.sum())

    def to_means(self) -> Metrics:
        """Per pair. `kl`: mean of log p_reference - log p_policy per token over both completions, an estimate of KL(reference || policy)
        that is biased by having chosen the best and the worst of the samples. `accuracy`: share of pairs with a positive margin."""
        names = ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "kl", "cross_entropy")
        return dict(zip(names, (self.sums / self.weight).tolist(), strict=True))
