"""How the language model learns: predict the next token, each weighted by its role.

In: TokenBatch (packed rows). Out: trained Transformer weights. A stage is nothing but a table role -> weight, a mixture and a schedule:
the paper's pre-training weighs vision tokens 0.5 (section 2.4), quality tuning supervises vision alone, understanding the answers
alone (section 2.5). The surprising thing: nothing is divided until all micro-batches of all ranks have been summed, so that neither their
number nor the number of ranks changes an update.

Shapes: B rows, S tokens of a row, D model width, N tokens that are targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from openemu3.data.packing import TokenBatch
from openemu3.distributed import data_rank, sum_over
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.parallelize import reshard, set_last_micro_batch
from openemu3.model.transformer import Transformer
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role, Vocabulary
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
from openemu3.training.throughput import count_step_flops
from openemu3.training.trainer import Metrics


@dataclass(frozen=True)
class RoleWeights:
    """How much a token of each role counts as a target. The defaults are the paper's pre-training (section 2.4)."""

    text_context: float = 1.0
    text_target: float = 1.0
    vision: float = 0.5
    structure: float = 1.0

    def __post_init__(self) -> None:
        for name in ("text_context", "text_target", "vision", "structure"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"role weight {name} is {getattr(self, name)}; a finite number of at least 0 is allowed")

    def to_table(self) -> Tensor:
        """fp32 [number of roles]; padding counts 0."""
        table = torch.zeros(len(Role))
        for role in (Role.TEXT_CONTEXT, Role.TEXT_TARGET, Role.VISION, Role.STRUCTURE):
            table[role] = getattr(self, role.name.lower())
        return table


@dataclass(frozen=True)
class LanguageLearnerConfig:
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    role_weights: RoleWeights = field(default_factory=RoleWeights)
    # fp32: all of it. mixed: weights, gradients and AdamW's moments in fp32 (16 bytes a parameter), computing in bf16. bf16: all of them in
    # bf16 (8 bytes a parameter), rounded by chance; see RoundingAdamW.
    precision: Literal["fp32", "mixed", "bf16"] = "mixed"
    # Share of the codes that the network reads with another code in their place; what it must predict stays as it is. A small model on few
    # pictures otherwise learns them by heart from their own first codes, hardly reads the caption, and is lost after the first
    # code it draws wrong. 0: none, as in the paper.
    vision_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "mixed", "bf16"):
            raise InputError(f"precision is {self.precision!r}; fp32, mixed or bf16 is allowed")
        if not 0 <= self.vision_noise < 1:
            raise InputError(f"vision_noise is {self.vision_noise}; it must be at least 0 and below 1")

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


class Kind(IntEnum):
    """What a document shows, for reporting losses apart. VIDEO: more than one latent frame in a medium."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


class LanguageLearner:
    """Learner of a Transformer, whose weights have the dtype that `config.precision` says.

    Args:
        validation: yields held-out batches; called at every validation. All ranks must get the same number of them.
        sample: called with (transformer, folder, step) to draw something to look at. In a run of several ranks no rank has all weights,
            so nothing is drawn.
        mesh: of the run's ranks, for which `parallelize` has prepared the transformer; None for a single process.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: LanguageLearnerConfig,
        vocabulary: Vocabulary,
        validation: Callable[[], Iterator[TokenBatch]],
        sample: Callable[[Transformer, Path, int], None] | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.transformer, self.config, self.vocabulary, self.validation, self.sample = transformer, config, vocabulary, validation, sample
        self.mesh = mesh
        self.context = ContextSplit(transformer.config, mesh)
        self.device = next(transformer.parameters()).device
        self.role_weights = config.role_weights.to_table()
        self.optimizer = build_optimizer(config.optimizer, transformer)
        transformer.train()

    # ---- one step

    def learn(self, step: int, batches: Sequence[TokenBatch]) -> Metrics:
        sums = LossSums(self.device)
        rank, num_ranks = data_rank(self.mesh)
        for number, batch in enumerate(batches):
            if self.mesh is not None:
                set_last_micro_batch(self.transformer, number == len(batches) - 1)
            noise = torch.Generator().manual_seed((step * len(batches) + number) * num_ranks + rank)  # the same after a resume
            self._compute_loss(batch, sums, noise).backward()
        totals = sums.reduce(self.mesh)
        # Gradients are of sums; one division by the weight of all micro-batches and ranks makes any split give the same update.
        if totals.weight:
            for parameter in self.transformer.parameters():
                if parameter.grad is not None:
                    parameter.grad /= totals.weight
            norm = float(apply_update(self.optimizer, self.config.optimizer, step, math.isfinite(totals.loss)))
        else:  # nothing in these documents counts: no update, not even weight decay
            self.optimizer.zero_grad(set_to_none=True)
            norm = 0.0
        return totals.to_metrics() | {
            "grad_norm": norm,
            "learning_rate": compute_learning_rate(self.config.optimizer, step),
            "tokens": totals.num_tokens,
            "fill_rate": totals.num_tokens / totals.num_places,
            "flops": count_step_flops(self.transformer.config, totals.num_tokens, totals.num_targets, totals.squared_lengths),
        }

    def _compute_loss(self, batch: TokenBatch, sums: LossSums, noise: torch.Generator | None = None) -> Tensor:
        """Weighted sum of this rank's losses in one micro-batch []; what is measured goes into `sums`.

        noise: draws the vision noise; None: there is none.
        """
        is_padding = find_padding(batch)
        inputs = batch.token_ids
        if noise is not None and self.config.vision_noise:
            inputs = replace_codes(inputs, batch.roles == Role.VISION, self.config.vision_noise, noise)
        # The target of a place is the token after it, and belongs to it wherever context parallelism puts it.
        targets, roles = batch.token_ids.roll(-1, 1), batch.roles.roll(-1, 1).long()
        weights = self.role_weights[roles]
        weights[:, -1] = 0
        weights[:, :-1][batch.documents[:, 1:] != batch.documents[:, :-1]] = 0
        split = [self.context.split(x) for x in (inputs, targets, roles, weights, self._find_kinds(batch).roll(-1, 1), is_padding)]
        inputs, targets, roles, weights, kinds, is_padding = split  # [B, S / cp]
        kept = weights.flatten().nonzero().flatten()  # the head runs on what counts alone
        targets, roles, weights, kinds = (x.flatten()[kept].to(self.device) for x in (targets, roles, weights, kinds))

        attention = self.context.build_attention(batch.documents.to(self.device), self.transformer.attention_dropout)
        # With a mesh the weights themselves arrive in bf16.
        autocast = self.config.precision == "mixed" and self.mesh is None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            hidden = self.transformer(inputs.to(self.device), attention, attention.positions)  # [B, S / cp, D]
        hidden = hidden.flatten(0, 1)[kept.to(self.device)].to(self.config.compute_dtype)  # [N, D]
        loss, losses = compute_cross_entropy(hidden, self.transformer.lm_head.weight, targets, weights)
        sums.add(loss, weights, losses, roles, kinds)
        sums.count(is_padding, sum_squared_lengths(batch) / self.context.size)
        return loss

    def _find_kinds(self, batch: TokenBatch) -> Tensor:
        """The `Kind` of the document that each token is in, [B, S]; read off the ids, since every document begins with BOS and every frame
        ends with EOF."""
        ids, vocabulary = batch.token_ids, self.vocabulary
        begins = ids == vocabulary.bos  # in plain packing documents have no numbers of their own
        begins[:, 0] = True
        begins[:, 1:] |= batch.documents[:, 1:] != batch.documents[:, :-1]
        document = begins.flatten().cumsum(0) - 1
        medium = (ids == vocabulary.boi).flatten().cumsum(0)
        frames = torch.zeros(int(medium[-1]) + 1, dtype=torch.int64).index_add_(0, medium, (ids == vocabulary.eof).flatten().long())
        kind_of_token = torch.where((ids == vocabulary.eof).flatten(), frames[medium].clamp(max=int(Kind.VIDEO)), int(Kind.TEXT))
        kind_of_document = torch.zeros(int(document[-1]) + 1, dtype=torch.int64).scatter_reduce_(0, document, kind_of_token, "amax")
        return kind_of_document[document].view_as(ids)

    # ---- measuring and looking

    @torch.no_grad()
    def validate(self) -> Metrics:
        self.transformer.eval()
        sums = LossSums(self.device)
        for batch in self.validation():
            self._compute_loss(batch, sums)
        if self.mesh is not None:
            reshard(self.transformer)
        self.transformer.train()
        return sums.reduce(self.mesh).to_metrics()

    def write_samples(self, folder: Path, step: int) -> None:
        if self.sample is not None and self.mesh is None:
            self.transformer.eval()
            self.sample(self.transformer, folder, step)
            self.transformer.train()

    # ---- state

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


def find_padding(batch: TokenBatch) -> Tensor:
    """Places of a batch where there is no token, bool [B, S]: the last document of a row, if it is of role PADDING at its end."""
    is_last = batch.documents == batch.documents[:, -1:]
    return is_last & (batch.roles[:, -1:] == Role.PADDING)


def sum_squared_lengths(batch: TokenBatch) -> float:
    """Sum over the documents that attention keeps apart of their lengths squared, padding left out."""
    rows = torch.arange(len(batch.documents))[:, None] * (batch.documents.shape[1] + 1)
    lengths = torch.unique((batch.documents + rows)[~find_padding(batch)], return_counts=True)[1]
    return float(lengths.double().square().sum())


def replace_codes(token_ids: Tensor, is_code: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """token_ids [B, S] in which a share of the codes (is_code, bool [B, S]) are codes drawn from all over the batch."""
    pool = token_ids[is_code]
    if not len(pool):
        return token_ids
    chosen = is_code & (torch.rand(token_ids.shape, generator=generator) < share)
    return torch.where(chosen, pool[torch.randint(len(pool), token_ids.shape, generator=generator)], token_ids)


# ---- sums


@dataclass(frozen=True)
class Totals:
    """What all micro-batches of all ranks sum up to. losses, counts: [kinds, roles], unweighted, in nats and tokens."""

    loss: float
    weight: float
    num_tokens: float
    num_places: float
    squared_lengths: float
    losses: Tensor
    counts: Tensor

    @property
    def num_targets(self) -> float:
        return float(self.counts.sum())

    def to_metrics(self) -> Metrics:
        """`loss` is the weighted mean that is minimised; `loss_vision` and so on are means of one role, `image/loss_vision` of one role in
        documents of one kind, where there were any."""
        metrics = {"loss": self.loss / self.weight if self.weight else 0.0}
        for role in Role:
            if self.counts[:, role].any():
                metrics[f"loss_{role.name.lower()}"] = float(self.losses[:, role].sum() / self.counts[:, role].sum())
        for kind in Kind:
            for role in Role:
                if self.counts[kind, role]:
                    metrics[f"{kind.name.lower()}/loss_{role.name.lower()}"] = float(self.losses[kind, role] / self.counts[kind, role])
        return metrics


class LossSums:
    """Sums over micro-batches, kept on the device so that nothing waits for it before the end of the step."""

    def __init__(self, device: torch.device) -> None:
        self.weighted = torch.zeros(2, dtype=torch.float64, device=device)  # loss, weight
        self.losses = torch.zeros(len(Kind) * len(Role), dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.losses)
        self.sizes = torch.zeros(3, dtype=torch.float64)  # tokens, places, lengths squared

    def add(self, loss: Tensor, weights: Tensor, losses: Tensor, roles: Tensor, kinds: Tensor) -> None:
        """loss []; the others [N]."""
        self.weighted += torch.stack([loss.detach().double(), weights.double().sum()])
        cells = kinds * len(Role) + roles
        self.losses.index_add_(0, cells, losses.double())
        self.counts.index_add_(0, cells, torch.ones_like(losses, dtype=torch.float64))

    def count(self, is_padding: Tensor, squared_lengths: float) -> None:
        self.sizes += torch.tensor([float((~is_padding).sum()), is_padding.numel(), squared_lengths], dtype=torch.float64)

    def reduce(self, mesh: DeviceMesh | None) -> Totals:
        """Over all ranks, in one exchange."""
        local = torch.cat([self.weighted, self.sizes.to(self.weighted.device), self.losses, self.counts])
        totals = sum_over(mesh, local).cpu()
        loss, weight, num_tokens, num_places, squared_lengths = totals[:5].tolist()
        losses, counts = totals[5:].view(2, len(Kind), len(Role))
        return Totals(loss, weight, num_tokens, num_places, squared_lengths, losses, counts)
