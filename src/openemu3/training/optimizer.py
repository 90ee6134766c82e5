"""Optimizers and learning-rate schedules.

AdamW's betas, weight decay and clipping are unpublished for Emu3; Emu3.5's 0.9/0.95, 0.1 and 5 are the closest proxy (arXiv 2510.26583).
What surprises: an optimizer has its whole state from the beginning (zeros), since a checkpoint is read into tensors that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openemu3.records import InputError

SLICE = 2**22  # numbers that `RoundingAdamW` updates at a time


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
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be a finite number above 0")


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


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW in which matrices decay and vectors (norms, biases) do not: torch's for fp32 weights, `RoundingAdamW` for bf16 ones."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return RoundingAdamW(groups, config.learning_rate, config.betas, config.eps)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = build_state(parameter)
    return optimizer


def build_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first update, as torch itself would make it at that update."""
    moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW with weights and both moments in bf16: 8 bytes a parameter with its gradient, where fp32 takes 16.

    The update is computed in fp32. A weight of 1 has a neighbour at 1.0078, and most updates are far smaller than that: rounded to the
    nearest they would all be lost. So weights and moments are rounded up or down by chance, to their own values on average (Zamirai et al.
    2020, arXiv 2010.06192). The chance depends on the step and the parameter's number alone.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = build_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        number = 0
        for group in self.param_groups:
            beta, beta_sq = group["betas"]
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                time = int(state["step"])
                grads = to_local(parameter.grad).reshape(-1)
                kept = [to_local(tensor).view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
                generator = torch.Generator(parameter.device).manual_seed(time * 1_000_003 + number)
                # A slice at a time: in fp32 and with its noise, the embedding of the 8B model would take 21 GiB.
                for grad, weight, mean, square in zip(*(tensor.split(SLICE) for tensor in (grads, *kept)), strict=True):
                    grad = grad.float()
                    new_mean = mean.float().lerp_(grad, 1 - beta)
                    new_square = square.float().lerp_(grad.square(), 1 - beta_sq)
                    scale = (new_square / (1 - beta_sq**time)).sqrt_().add_(group["eps"])
                    new_weight = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
                    new_weight.addcdiv_(new_mean, scale, value=-group["lr"] / (1 - beta**time))
                    for old, new in ((mean, new_mean), (square, new_square), (weight, new_weight)):
                        old.copy_(round_by_chance(new, generator) if old.dtype == torch.bfloat16 else new)


def round_by_chance(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes the expectation the value itself."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, generator=generator, device=values.device)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()  # bf16 is the upper half of fp32


def to_local(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def apply_update(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, is_finite: bool = True) -> Tensor:
    """Clip, set the rate of this step, update and clear the gradients; the gradient norm before clipping [].

    A gradient that is not finite changes nothing: the caller sees it in the norm. Nor does any where the caller has found that the
    loss is not (`is_finite` False).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    for group in optimizer.param_groups:
        group["lr"] = compute_learning_rate(config, step)
    if is_finite and torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
