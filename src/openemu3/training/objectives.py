"""What the language model minimises: next-token cross-entropy, weighted by the role of the token to be predicted.

In: hidden states [N, D], the head's weight [V, D], targets [N], weights [N]. Out: the weighted *sum* of losses; dividing by the sum of
weights is left to whoever knows all micro-batches and ranks, so that any split gives the same number. What surprises: logits exist
for one chunk of tokens at a time and gradients are made in the forward pass, so memory does not grow with tokens x vocabulary
(9,216 tokens x 184,622 ids in fp32 would take 6.8 GB). In fp32 they exist for a few tokens only.

Shapes: N tokens, D model width, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

CHUNK = 512  # tokens whose logits exist at a time: 0.18 GiB in bf16 with the published vocabulary
VOCABULARY_SLICE = 4096  # rows of the head whose gradient exists twice
# Logits that exist in fp32 at a time. On a CPU they stay in its cache then, and all that is done to them takes a quarter of the time that
# it takes for a whole chunk, whose memory every operation fetches anew from the system. On a GPU each operation must be worth starting.
CPU_TILE, GPU_TILE = 2**20, 2**25


def compute_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(sum of weight * -log p(target) [], the same per token and unweighted [N], without gradient), both fp32.

    head: whole, or a DTensor whose rows lie on several ranks (tensor parallelism; mesh of one dimension). hidden, targets and weights are
    then whole and the same on all of these ranks, and so are the results and the gradient of hidden. A rank has logits for its
    rows of the vocabulary alone; per token, three numbers are exchanged.
    """
    rows = HeadRows(0, None)
    if isinstance(head, DTensor):
        rows_per_rank = -(-head.shape[0] // head.device_mesh.size())  # the last may have fewer
        rows = HeadRows(head.device_mesh.get_local_rank() * rows_per_rank, head.device_mesh.get_group())
        head = head.to_local()
    return LinearCrossEntropy.apply(hidden, head, targets, weights, rows, chunk, torch.is_grad_enabled())


class HeadRows(NamedTuple):
    """Which rows of the head a rank has: those from id `first` on. group: the ranks that have all of them; None: this one does."""

    first: int
    group: dist.ProcessGroup | None


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, rows: HeadRows, chunk: int, make_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        head_cast = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        learns_head = make_gradients and ctx.needs_input_grad[1]  # a frozen head, as under LoRA, needs no memory for its gradient
        grad_head = torch.zeros_like(head, dtype=torch.float32) if learns_head else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        memory = hidden.new_empty(min(chunk, len(targets)), len(head))  # of all chunks: new memory is slow to come by on a CPU
        sums_under_way = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(hidden[part], head_cast.t(), out=memory[: len(targets[part])])  # [n, V], or this rank's rows of it
            target = (targets[part] - rows.first).unsqueeze(1)
            is_here = (target >= 0) & (target < len(head))
            target = target.clamp(0, len(head) - 1)
            log_normaliser, target_logit = normalise(logits, target, is_here, rows.group)
            losses[part] = log_normaliser - target_logit
            if not make_gradients:  # measuring alone: two of the three products are not needed
                continue
            grad = differentiate_in_place(logits, log_normaliser, target, is_here, weights[part])
            grad_hidden[part] = grad @ head_cast
            if rows.group is not None:  # of this rank's rows alone; summed while the next chunk is computed
                sums_under_way.append(dist.all_reduce(grad_hidden[part], group=rows.group, async_op=True))
            if grad_head is not None:
                add_head_gradient(grad_head, grad, hidden[part])
        for work in sums_under_way:
            work.wait()
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors  # changed in place: they are used once, and the head's is as large as the head
        return grad_hidden.mul_(grad_sum), None if grad_head is None else grad_head.mul_(grad_sum), None, None, None, None, None


def normalise(logits: Tensor, target: Tensor, is_here: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, logit of the target), both fp32 [n], over all rows of the head.

    logits [n, V] of this rank's rows; target [n, 1] a row of them; is_here [n, 1]: whether that is the target, and not another rank's.
    """
    log_normaliser = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for tile in list_tiles(logits):
        # torch.logsumexp, but in one copy where that takes another.
        copy = logits[tile].to(torch.float32, copy=True)
        highest = copy.amax(1)
        log_normaliser[tile] = copy.sub_(highest.unsqueeze(1)).exp_().sum(1).log_().add_(highest)
    target_logit = logits.gather(1, target).float().mul_(is_here).squeeze(1)
    if group is not None:
        highest = log_normaliser.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        both = torch.stack(((log_normaliser - highest).exp_(), target_logit))  # [2, n]
        dist.all_reduce(both, group=group)
        log_normaliser, target_logit = highest + both[0].log(), both[1]
    return log_normaliser, target_logit


def differentiate_in_place(logits: Tensor, log_normaliser: Tensor, target: Tensor, is_here: Tensor, weights: Tensor) -> Tensor:
    """Logits [n, V] -> their gradient, weight * (softmax - one-hot), in the same memory."""
    for tile in list_tiles(logits):
        grad = logits[tile].float().sub_(log_normaliser[tile].unsqueeze(1)).exp_()
        grad.scatter_add_(1, target[tile], -is_here[tile].to(grad.dtype))
        logits[tile] = grad.mul_(weights[tile].unsqueeze(1))
    return logits


def list_tiles(logits: Tensor) -> Iterator[slice]:
    """A few rows at a time: as many as may exist in fp32."""
    rows = max(1, (CPU_TILE if logits.device.type == "cpu" else GPU_TILE) // max(1, logits.shape[1]))
    return (slice(first, first + rows) for first in range(0, len(logits), rows))


def add_head_gradient(grad_head: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """grad_head [V, D] fp32 += grad [n, V] transposed x hidden [n, D], some rows at a time: the whole product would be as large again."""
    for first in range(0, len(grad_head), VOCABULARY_SLICE):
        rows = slice(first, first + VOCABULARY_SLICE)
        grad_head[rows] += grad[:, rows].t() @ hidden
