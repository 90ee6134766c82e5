"""How the language model learns: predict the next token, each weighted by its role.

In: LanguageBatch (token ids and roles). Out: trained Transformer weights. A stage is nothing but a table role -> weight, a mixture and
a schedule: the paper's pre-training weighs vision tokens 0.5 (section 2.4), quality tuning supervises vision alone, understanding
the answers alone (section 2.5).

Shapes: B documents, S tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from openemu3.data.documents import LanguageBatch
from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import Transformer
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role
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
class RoleWeights:
    """How much a token of each role counts as a target. The defaults are the paper's pre-training (section 2.4)."""

    text_context: float = 1.0
    text_target: float = 1.0
    vision: float = 0.5
    structure: float = 1.0

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
    autocast_bf16: bool = True
    # Share of the codes that the network reads with another code in their place; what it must predict stays as it is. A small model on few
    # pictures otherwise learns them by heart from their own first codes, hardly reads the caption, and is lost after the first
    # code it draws wrong. 0: none, as in the paper.
    vision_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.vision_noise < 1:
            raise InputError(f"vision_noise is {self.vision_noise}; it must be at least 0 and below 1")


class LanguageLearner:
    """Learner of a Transformer.

    Args:
        validation: yields held-out batches; called at every validation.
        sample: called with (transformer, folder, step) to draw something to look at.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: LanguageLearnerConfig,
        validation: Callable[[], Iterator[LanguageBatch]],
        sample: Callable[[Transformer, Path, int], None] | None = None,
    ) -> None:
        self.transformer, self.config, self.validation, self.sample = transformer, config, validation, sample
        self.device = next(transformer.parameters()).device
        self.role_weights = config.role_weights.to_table().to(self.device)
        self.optimizer = build_optimizer(config.optimizer, transformer)
        transformer.train()

    def learn(self, step: int, batches: Sequence[LanguageBatch]) -> Metrics:
        total_loss, total_weight = 0.0, 0.0
        by_role = RoleSums()
        num_tokens = 0
        for number, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(step * len(batches) + number)  # the same noise after a resume
            loss, weight = self._compute_loss(batch, by_role, generator)
            loss.backward()
            total_loss += loss.item()
            total_weight += weight
            num_tokens += int((batch.roles != Role.PADDING).sum())
        if not total_weight:  # nothing in these documents counts: no update, not even weight decay
            self.optimizer.zero_grad(set_to_none=True)
            return {"loss": 0.0, **by_role.to_means(), "grad_norm": 0.0, "tokens": float(num_tokens)}
        # Gradients are of sums; one division by the weight of all micro-batches makes any split give the same update.
        for parameter in self.transformer.parameters():
            if parameter.grad is not None:
                parameter.grad /= total_weight
        norm = apply_update(self.optimizer, self.config.optimizer, step)
        return {"loss": total_loss / total_weight, **by_role.to_means(), "grad_norm": float(norm), "tokens": float(num_tokens)}

    def _compute_loss(self, batch: LanguageBatch, by_role: RoleSums, noise: torch.Generator | None = None) -> tuple[Tensor, float]:
        """(weighted sum of losses [], sum of weights) of one micro-batch; `noise` draws the vision noise, None: there is none."""
        token_ids, roles = batch.token_ids.to(self.device), batch.roles.to(self.device)
        inputs = batch.token_ids[:, :-1]
        if noise is not None and self.config.vision_noise:
            inputs = replace_codes(inputs, batch.roles[:, :-1] == Role.VISION, self.config.vision_noise, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast_bf16):
            attention = CausalAttention(dropout=self.transformer.attention_dropout)  # padding is on the right: no mask needed
            hidden = self.transformer(inputs.to(self.device), attention)  # [B, S-1, D]
        target_roles = roles[:, 1:].flatten().long()
        weights = self.role_weights[target_roles]
        kept = weights.nonzero().flatten()  # the head runs on what counts alone
        compute_dtype = torch.bfloat16 if self.config.autocast_bf16 else hidden.dtype
        loss, losses = compute_cross_entropy(
            hidden.flatten(0, 1)[kept].to(compute_dtype),
            self.transformer.lm_head.weight,
            token_ids[:, 1:].flatten()[kept],
            weights[kept],
        )
        by_role.add(losses, target_roles[kept])
        return loss, float(weights.sum())

    @torch.no_grad()
    def validate(self) -> Metrics:
        self.transformer.eval()
        by_role = RoleSums()
        loss, weight = 0.0, 0.0
        for batch in self.validation():
            batch_loss, batch_weight = self._compute_loss(batch, by_role)
            loss, weight = loss + float(batch_loss), weight + batch_weight
        self.transformer.train()
        return {"loss": loss / weight if weight else 0.0, **by_role.to_means()}

    def write_samples(self, folder: Path, step: int) -> None:
        if self.sample is not None:
            self.transformer.eval()
            self.sample(self.transformer, folder, step)
            self.transformer.train()

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


def replace_codes(token_ids: Tensor, is_code: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """token_ids [B, S] in which a share of the codes (is_code, bool [B, S]) are codes drawn from all over the batch."""
    pool = token_ids[is_code]
    if not len(pool):
        return token_ids
    chosen = is_code & (torch.rand(token_ids.shape, generator=generator) < share)
    return torch.where(chosen, pool[torch.randint(len(pool), token_ids.shape, generator=generator)], token_ids)


class RoleSums:
    """Unweighted losses, summed apart by role."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(Role), dtype=torch.float64)
        self.counts = torch.zeros(len(Role), dtype=torch.float64)

    def add(self, losses: Tensor, roles: Tensor) -> None:
        self.sums.index_add_(0, roles.cpu(), losses.double().cpu())
        self.counts.index_add_(0, roles.cpu(), torch.ones(len(roles), dtype=torch.float64))

    def to_means(self) -> Metrics:
        """Mean loss in nats per token of each role seen: `loss_vision` and so on."""
        return {f"loss_{role.name.lower()}": float(self.sums[role] / self.counts[role]) for role in Role if self.counts[role]}
