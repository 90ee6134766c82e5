"""What the language model minimises: next-token cross-entropy, weighted by the role of the token to be predicted.

In: hidden states [N, D], the head's weight [V, D], targets [N], weights [N]. Out: the weighted *sum* of losses; dividing by the sum of
weights is left to whoever knows all micro-batches and ranks, so that any split gives the same number. What surprises: logits exist
for one chunk of tokens at a time and gradients are made in the forward pass, so memory does not grow with tokens x vocabulary
(9,216 tokens x 184,622 ids in fp32 would take 6.8 GB).

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

CHUNK = 512  # tokens whose logits exist at a time: 0.5 GiB in fp32 with the published vocabulary
VOCABULARY_SLICE = 16_384


def compute_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(sum of weight * -log p(target) [], the same per token and unweighted [N], without gradient), both fp32."""
    if isinstance(head, DTensor):
        return compute_vocabulary_parallel_cross_entropy(hidden, head, targets, weights, chunk)
    return LinearCrossEntropy.apply(hidden, head, targets, weights, chunk, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int, make_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        head_cast = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        learns_head = make_gradients and ctx.needs_input_grad[1]  # a frozen head, as under LoRA, needs no memory for its gradient
        grad_head = torch.zeros_like(head, dtype=torch.float32) if learns_head else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ head_cast.t()).float()  # [n, V]
            log_normaliser = logits.logsumexp(1)
            target = targets[part].unsqueeze(1)
            losses[part] = log_normaliser - logits.gather(1, target).squeeze(1)
            if not make_gradients:  # measuring alone: two of the three products are not needed
                del logits
                continue
            # d loss / d logits = weight * (softmax - one-hot)
            grad = logits.sub_(log_normaliser.unsqueeze(1)).exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.mul_(weights[part].unsqueeze(1)).to(hidden.dtype)
            grad_hidden[part] = grad @ head_cast
            if grad_head is not None:
                add_head_gradient(grad_head, grad, hidden[part])
            del logits, grad  # or they would live while the next ones are made
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors  # changed in place: they are used once, and the head's is as large as the head
        return grad_hidden.mul_(grad_sum), None if grad_head is None else grad_head.mul_(grad_sum), None, None, None, None


def add_head_gradient(grad_head: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """grad_head [V, D] fp32 += grad [n, V] transposed x hidden [n, D], some rows at a time: the whole product would be as large again."""
    for first in range(0, len(grad_head), VOCABULARY_SLICE):
        rows = slice(first, first + VOCABULARY_SLICE)
        grad_head[rows] += grad[:, rows].t() @ hidden


def compute_vocabulary_parallel_cross_entropy(
    hidden: Tensor, head: DTensor, targets: Tensor, weights: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`compute_cross_entropy` for a head whose rows lie on several ranks (tensor parallelism; mesh of one dimension).

    hidden, targets and weights are whole and the same on all of these ranks, and so are the results and the gradient of hidden.
    A rank has logits for its rows of the vocabulary alone; per token, three numbers are exchanged.
    """
    group, rows_per_rank = head.device_mesh.get_group(), -(-head.shape[0] // head.device_mesh.size())  # the last may have fewer
    first_id = head.device_mesh.get_local_rank() * rows_per_rank
    return VocabularyParallelCrossEntropy.apply(hidden, head.to_local(), targets, weights, first_id, group, chunk, torch.is_grad_enabled())


class VocabularyParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        first_id: int,
        group: dist.ProcessGroup,
        chunk: int,
        make_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        head_cast = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        learns_head = make_gradients and ctx.needs_input_grad[1]  # a frozen head, as under LoRA, needs no memory for its gradient
        grad_head = torch.zeros_like(head, dtype=torch.float32) if learns_head else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        sums_under_way = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ head_cast.t()).float()  # [n, V / ranks]
            highest = logits.amax(1)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            logits -= highest.unsqueeze(1)
            target = (targets[part] - first_id).unsqueeze(1)
            is_here = (target >= 0) & (target < len(head))
            target = target.clamp(0, len(head) - 1)
            target_logit = logits.gather(1, target).mul_(is_here).squeeze(1)
            grad = logits.exp_()
            both = torch.stack((grad.sum(1), target_logit))  # [2, n]: normaliser and logit of the target
            dist.all_reduce(both, group=group)
            losses[part] = both[0].log() - both[1]
            if not make_gradients:
                del logits, grad
                continue
            # d loss / d logits = weight * (softmax - one-hot)
            grad /= both[0].unsqueeze(1)
            grad.scatter_add_(1, target, -is_here.to(grad.dtype))
            grad = grad.mul_(weights[part].unsqueeze(1)).to(hidden.dtype)
            grad_hidden[part] = grad @ head_cast  # of this rank's rows alone; summed while the next chunk is computed
            sums_under_way.append(dist.all_reduce(grad_hidden[part], group=group, async_op=True))
            if grad_head is not None:
                add_head_gradient(grad_head, grad, hidden[part])
            del logits, grad  # or they would live while the next ones are made
        for work in sums_under_way:
            work.wait()
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors  # changed in place: they are used once, and the head's is as large as the head
        return grad_hidden.mul_(grad_sum), None if grad_head is None else grad_head.mul_(grad_sum), None, None, None, None, None, None
