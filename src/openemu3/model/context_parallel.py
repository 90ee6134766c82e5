"""Rows too long for one rank: how their tokens are dealt to the ranks of a context-parallel mesh, and how attention brings them together.

In: whole rows [B, S] and what this rank computes of them, [B, S/cp]. Out: an attention object behind the same call as any other. The
rest of the network works on single tokens and notices nothing.

Two ways are combined. Exchange (Ulysses, arXiv 2309.14509): before attention an all-to-all swaps "all heads, some tokens" for "some
heads, all tokens", and another one swaps back after it. It moves little, but stops at one key/value head per rank: 8 for the published
model, fewer under tensor parallelism. Gathering: beyond that, groups of exchanging ranks hold different tokens and fetch all keys and
values of their heads. cp = exchange width x number of groups; the width is the largest that the key/value heads allow.

The surprising thing: where groups gather, each holds one piece from the front of the row and one from its back. A token attends to what
is before it, so pieces from the front are little work and those from the back much; so dealt, all groups have the same.

Shapes: B rows, S tokens of a whole row, s of them on this rank, H query heads, KV key/value heads, K head dim, u exchange width.
"""

from math import gcd
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from openemu3.distributed import limit_waiting
from openemu3.model.attention import PackedAttention, PieceAttention
from openemu3.model.transformer import TransformerConfig
from openemu3.records import InputError


class ContextSplit:
    """The deal of one run. All ranks of the mesh must make it at the same point, since it makes communication groups.

    mesh: with the dimensions cp and tp, or None for a single process, where every row stays whole.
    """

    def __init__(self, config: TransformerConfig, mesh: DeviceMesh | None) -> None:
        self.size, self.num_tensor_ranks = (1, 1) if mesh is None else (mesh["cp"].size(), mesh["tp"].size())
        self.width = gcd(self.size, config.num_kv_heads // self.num_tensor_ranks)
        self.num_groups = self.size // self.width
        self.rank = 0
        self._exchange_group: dist.ProcessGroup | None = None
        self._gather_mesh: DeviceMesh | None = None
        if mesh is None or self.size == 1:
            return
        self.rank = mesh["cp"].get_local_rank()
        # Exchanging ranks are neighbours: every layer exchanges four times, forward and back.
        ranks = limit_waiting(mesh["cp"]._unflatten(0, (self.num_groups, self.width), ("gather", "exchange")))
        self._exchange_group, self._gather_mesh = ranks["exchange"].get_group(), ranks["gather"]

    def check_length(self, num_tokens: int) -> None:
        """InputError for rows that cannot be dealt evenly."""
        pieces = self.size * self.num_tensor_ranks * (2 if self.num_groups > 1 else 1)
        if num_tokens % pieces:
            raise InputError(
                f"context length {num_tokens} cannot be dealt to cp {self.size} x tp {self.num_tensor_ranks} ranks; "
                f"a multiple of {pieces} is allowed"
            )

    def list_places(self, num_tokens: int) -> Tensor:
        """int64 [cp, S/cp]: which tokens of a row each rank has, in its order."""
        places = torch.arange(num_tokens)
        if self.num_groups > 1:
            pieces = places.view(2 * self.num_groups, -1)  # group g has piece g and piece g from the end
            places = torch.cat((pieces[: self.num_groups], pieces.flip(0)[: self.num_groups]), dim=1)
        return places.view(self.size, -1)

    def split(self, tokens: Tensor) -> Tensor:
        """Something per token, [B, S] -> this rank's part [B, S/cp]."""
        if self.size == 1:
            return tokens
        self.check_length(tokens.shape[1])
        return tokens.index_select(1, self.list_places(tokens.shape[1])[self.rank].to(tokens.device))

    def build_attention(self, documents: Tensor, dropout: float = 0.0) -> "PackedAttention | ContextParallelAttention":
        """Attention within documents. documents: as in `PackedAttention`, of the whole rows [B, S]; `positions` comes out [B, S/cp]."""
        if self._exchange_group is None or self._gather_mesh is None:
            return PackedAttention(documents, dropout)
        self.check_length(documents.shape[1])
        positions = PackedAttention.count_positions(documents)
        if self.num_groups == 1:
            return ContextParallelAttention(PackedAttention(documents, dropout), self.split(positions), self._exchange_group, None)
        places = self.list_places(documents.shape[1]).view(self.num_groups, -1)  # of whole groups: [G, S/G]
        group = self.rank // self.width
        gathering = Gathering(self._gather_mesh, places.flatten().argsort().to(documents.device))
        inner = PieceAttention(documents, places[group].view(2, -1)[:, 0].tolist(), places.shape[1] // 2, dropout)
        return ContextParallelAttention(inner, self.split(positions), self._exchange_group, gathering)


class Gathering(NamedTuple):
    """Bringing together the tokens of all groups."""

    mesh: DeviceMesh
    order: Tensor  # int64 [S]: where each token of the row stands when the groups' tokens are laid one after the other


class ContextParallelAttention:
    """Attention over tokens that lie on several ranks; made by `ContextSplit.build_attention`.

    inner: attends over what an exchange brings together: whole rows, or this group's part of them against gathered keys and values.
    """

    def __init__(
        self, inner: PackedAttention | PieceAttention, positions: Tensor, exchange: dist.ProcessGroup, gathering: Gathering | None
    ) -> None:
        self.inner, self.positions = inner, positions
        self._exchange, self._gathering = exchange, gathering

    @torch.compiler.disable  # as in PackedAttention
    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        width = self._exchange.size()
        # Each rank's share of the three lies together, so that one exchange moves them all.
        shares = [heads.unflatten(1, (width, -1)) for heads in (queries, keys, values)]  # [B, u, H/u, s, K] and so on
        mixed = exchange_heads(torch.cat(shares, dim=2).flatten(1, 2), self._exchange)  # [B, (H + 2 KV)/u, s * u, K]
        queries, keys, values = mixed.split([share.shape[2] for share in shares], dim=1)
        if self._gathering is not None:
            # Every rank uses all that is gathered; the backward pass adds up what each has for a rank's tokens.
            part = DTensor.from_local(torch.stack((keys, values)), self._gathering.mesh, [Shard(3)], run_check=False)
            both = part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])  # [2, B, KV/u, S, K], group by group
            keys, values = both.index_select(3, self._gathering.order).unbind(0)
        return exchange_tokens(self.inner(layer_index, queries, keys, values), self._exchange)  # [B, H, s, K]


def exchange_heads(heads: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of some tokens -> some heads of all tokens: [B, H, s, K] -> [B, H/u, s * u, K]."""
    if group.size() == 1:
        return heads
    sent = heads.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()  # [u (to), B, H/u, s, K]
    received = all_to_all_single_autograd(sent, None, None, group)  # [u (from), B, H/u, s, K]
    return received.movedim(0, 2).flatten(2, 3)


def exchange_tokens(heads: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: [B, H/u, s * u, K] -> [B, H, s, K]."""
    if group.size() == 1:
        return heads
    sent = heads.unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous()  # [u (to), B, H/u, s, K]
    received = all_to_all_single_autograd(sent, None, None, group)  # [u (from), B, H/u, s, K]
    return received.movedim(0, 1).flatten(1, 2)
