"""Optimizers and learning-rate schedules.

AdamW's betas, weight decay and clipping are unpublished for Emu3; Emu3.5's 0.9/0.95, 0.1 and 5 are the closest proxy (arXiv 2510.26583).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openemu3.records import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then annealing to `final_share` of the peak at `num_steps`."""

    learning_rate: float = 5e-5
    num_steps: int = 1000
    warmup_steps: int = 100
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    eps: float = 1e-8
    max_grad_norm: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise InputError(f"warmup_steps is {self.warmup_steps}; it must be between 0 and num_steps {self.num_steps}")


def compute_learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate of update number `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_share + (1 - config.final_share) * share)


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.AdamW:
    """AdamW in which matrices decay and vectors (norms, biases) do not."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def apply_update(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> Tensor:
    """Clip, set the rate of this step, update and clear the gradients; the gradient norm before clipping [].

    A gradient that is not finite changes nothing: the caller sees it in the norm.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = compute_learning_rate(config, step)
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
