"""Ways for the tokens of a training or prefill batch to attend to each other.

`CausalAttention` is for rows of one sequence each, `PackedAttention` for rows that hold several documents, `PieceAttention` for a part
of such rows where several ranks share them (`context_parallel.py`). They are made per batch, outside the network, and called by every
layer with rotated queries and keys.
The surprising thing: right padding needs no mask at all, since no real token looks to its right.

Attention with a cache lives in `generation/kv_cache.py`. Shapes: B rows, S tokens, H query heads, KV key/value heads, K head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


class CausalAttention:
    """Every token sees itself and all earlier tokens of its row.

    padding: bool [B, S], True where there is no token; needed for left padding only. Hand `positions` on to the network then.
    dropout: probability of dropping an attention weight; pass `transformer.attention_dropout`, which is 0 outside training.
    What comes out at a padded place is finite and means nothing.
    """

    def __init__(self, padding: Tensor | None = None, dropout: float = 0.0) -> None:
        self.dropout = dropout
        self.positions: Tensor | None = None  # int64 [B, S]; None: 0 .. S-1 in every row
        self.mask: Tensor | None = None  # bool [B, 1, S, S], True where a query (row) may look at a key (column)
        if padding is None:
            return
        if padding.dtype != torch.bool or padding.dim() != 2:
            raise ValueError(f"padding is {padding.dtype} of shape {tuple(padding.shape)}; bool of shape [rows, tokens] is allowed")
        self.positions = positions_from_padding(padding)
        if bool((padding[:, :-1] & ~padding[:, 1:]).any()):  # a token to the right of padding would see it
            num_tokens = padding.shape[1]
            causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=padding.device).tril()
            itself = torch.eye(num_tokens, dtype=torch.bool, device=padding.device)
            # A padded query may look at itself, so that no softmax runs over nothing (NaN on some backends).
            self.mask = ((causal & ~padding[:, None, :]) | itself).unsqueeze(1)

    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _attend(queries, keys, values, self.mask, self.dropout)


class PackedAttention:
    """Several documents per row: every token sees itself and the earlier tokens of its own document.

    documents: whole numbers [B, S]; equal neighbours belong to one document, so padding is simply one more document.
    dropout: as in `CausalAttention`. Hand `positions`, which restart in every document, on to the network.
    """

    def __init__(self, documents: Tensor, dropout: float = 0.0) -> None:
        self.dropout = dropout
        self.positions = self.count_positions(documents)  # int64 [B, S]
        # Documents never cross rows, so the batch is one long line of documents.
        starts = (self.positions.cpu().flatten() == 0).nonzero().flatten()
        lengths = torch.diff(starts, append=starts.new_tensor([documents.numel()]))
        self._segments = _Segments(starts, lengths, starts, torch.zeros_like(starts), documents.device)

    @staticmethod
    def count_positions(documents: Tensor) -> Tensor:
        """Documents [B, S] -> int64 [B, S]: how far into its document each token stands."""
        if documents.dim() != 2 or not documents.numel() or documents.is_floating_point():
            raise ValueError(f"documents is {documents.dtype} of shape {tuple(documents.shape)}; whole numbers [rows, tokens] are allowed")
        places = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return places - (places * begins).cummax(dim=1).values

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[Sequence[int]], num_tokens: int, dropout: float = 0.0, device: torch.device | str = "cpu"
    ) -> "PackedAttention":
        """From the documents' lengths in every row; what is missing to `num_tokens` is padding."""
        documents = torch.zeros(len(lengths), num_tokens, dtype=torch.int64)
        for row, row_lengths in enumerate(lengths):
            if min(row_lengths, default=1) < 1 or sum(row_lengths) > num_tokens:
                raise ValueError(f"row {row} has document lengths {list(row_lengths)}; 1 or more each and {num_tokens} in all is allowed")
            ids = torch.arange(1, len(row_lengths) + 1).repeat_interleave(torch.tensor(row_lengths, dtype=torch.int64))
            documents[row, : len(ids)] = ids
        return cls(documents.to(device), dropout)

    @torch.compiler.disable  # the segments differ from batch to batch: traced, every batch would compile anew
    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self._segments.attend(queries, keys, values, self.dropout)


class PieceAttention:
    """A part of every packed row as queries, against the keys and values of whole rows: for rows that several ranks share.

    documents: as in `PackedAttention`, of the whole rows [B, S]. The queries are pieces of `length` tokens, one after the other, that begin
    at the places `starts` of the row: [B, H, pieces * length, K]. Keys and values are whole: [B, KV, S, K].
    """

    def __init__(self, documents: Tensor, starts: Sequence[int], length: int, dropout: float = 0.0) -> None:
        self.dropout = dropout
        num_rows, num_tokens = documents.shape
        positions = PackedAttention.count_positions(documents).cpu()
        places = torch.cat([torch.arange(start, start + length) for start in starts])  # [pieces * length]
        begins = positions[:, places] == 0
        begins[:, ::length] = True  # where a piece begins inside a document, the rest of that document is a segment
        firsts = begins.flatten().nonzero().flatten()
        prefixes = positions[:, places].flatten()[firsts]
        key_starts = (torch.arange(num_rows)[:, None] * num_tokens + places).flatten()[firsts] - prefixes
        lengths = torch.diff(firsts, append=firsts.new_tensor([begins.numel()]))
        self._segments = _Segments(firsts, lengths, key_starts, prefixes, documents.device)

    @torch.compiler.disable  # as in PackedAttention
    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self._segments.attend(queries, keys, values, self.dropout)


def positions_from_padding(padding: Tensor) -> Tensor:
    """Padding bool [B, S] (True where there is no token) -> int64 [B, S]: real tokens count from 0."""
    return ((~padding).cumsum(dim=-1) - 1).clamp(min=0)


class _Segments:
    """Stretches of queries that lie one after the other in a line, each against the tokens of its document up to and with itself.

    The line of queries is [B * S] flattened, and so is that of keys. On a GPU one kernel takes all segments at once, if nothing is
    dropped out; otherwise documents that begin here go in bundles, and rests of documents that began before, which are few, one by one.

    Args:
        starts: where each segment begins in the line of queries, in order, without gaps.
        lengths: its number of tokens.
        key_starts: where its document begins in the line of keys.
        prefixes: how many tokens of its document come before it.
    """

    def __init__(self, starts: Tensor, lengths: Tensor, key_starts: Tensor, prefixes: Tensor, device: torch.device) -> None:
        self._lengths, self._key_starts, self._key_lengths, self._device = lengths, key_starts, prefixes + lengths, device
        self._keys_in_order = torch.equal(starts, key_starts) and not prefixes.any()
        self._varlen: _Varlen | None = None
        places = torch.empty(int(lengths.sum()), dtype=torch.int64)
        fresh = prefixes == 0
        self._bundles = _bundle_documents(starts[fresh], lengths[fresh], key_starts[fresh], places, device)
        num_placed = sum(len(bundle.sources) for bundle in self._bundles)
        self._rests: list[_Rest] = []
        for start, length, key_start, prefix in zip(*(x[~fresh].tolist() for x in (starts, lengths, key_starts, prefixes)), strict=True):
            self._rests.append(_Rest(slice(start, start + length), slice(key_start, key_start + prefix + length)))
            places[start : start + length] = torch.arange(num_placed, num_placed + length)
            num_placed += length
        self._places = places.to(device)  # int64 [B * S]: where each query is found in the concatenated results

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        """queries [B, H, S, K], keys and values [B, KV, S', K] -> [B, H, S, K]."""
        num_rows, _, num_tokens, _ = queries.shape
        q_line, k_line, v_line = (heads.transpose(1, 2).flatten(0, 1) for heads in (queries, keys, values))  # [B*S, heads, K]
        if queries.is_cuda and not dropout and queries.dtype in (torch.bfloat16, torch.float16):
            line = self._attend_at_once(q_line, k_line, v_line)
        else:
            line = self._attend_in_bundles(q_line, k_line, v_line, dropout)
        return line.unflatten(0, (num_rows, num_tokens)).transpose(1, 2)

    def _attend_in_bundles(self, queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        outputs = []
        for bundle in self._bundles:
            shape = (bundle.num_documents, bundle.num_tokens)
            q = queries.index_select(0, bundle.sources).unflatten(0, shape).transpose(1, 2)
            k, v = (line.index_select(0, bundle.key_sources).unflatten(0, shape).transpose(1, 2) for line in (keys, values))
            mixed = _attend(q, k, v, None, dropout)  # [documents, H, tokens, K]
            outputs.append(mixed.transpose(1, 2).flatten(0, 1))
        for rest in self._rests:
            q, k, v = (line[part].transpose(0, 1)[None] for line, part in ((queries, rest.queries), (keys, rest.keys), (values, rest.keys)))
            if k.shape[1] != q.shape[1]:  # causal_lower_right knows nothing of grouped heads
                k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
            # The last query sees the last key. A GPU has kernels for it; elsewhere this becomes a mask of this segment.
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]), dropout_p=dropout)
            outputs.append(mixed[0].transpose(0, 1))
        return torch.cat(outputs).index_select(0, self._places)  # [B*S, H, K]

    def _attend_at_once(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # registers operators of the GPU's kernel on import

        plan = self.varlen
        if plan.key_sources is not None:
            keys, values = keys.index_select(0, plan.key_sources), values.index_select(0, plan.key_sources)
        line = varlen_attn(
            queries, keys, values, plan.query_bounds, plan.key_bounds, plan.max_queries, plan.max_keys,
            window_size=(-1, 0), enable_gqa=queries.shape[1] != keys.shape[1],
        )  # fmt: skip
        assert isinstance(line, Tensor)  # a pair only where auxiliary results are asked for
        return line

    @property
    def varlen(self) -> "_Varlen":
        """The same segments as that kernel wants them: made once a batch, if at all."""
        if self._varlen is None:
            ends = (x.cumsum(0) for x in (self._lengths, self._key_lengths))
            bounds, key_bounds = (F.pad(x, (1, 0)).to(torch.int32).to(self._device) for x in ends)
            sources = None
            if not self._keys_in_order:
                firsts = self._key_lengths.cumsum(0) - self._key_lengths
                steps = torch.arange(int(self._key_lengths.sum())) - firsts.repeat_interleave(self._key_lengths)
                sources = (self._key_starts.repeat_interleave(self._key_lengths) + steps).to(self._device)
            self._varlen = _Varlen(bounds, key_bounds, int(self._lengths.max()), int(self._key_lengths.max()), sources)
        return self._varlen


class _Varlen(NamedTuple):
    """Segments for a kernel of variable lengths. It takes the last query of a segment to see its last key, as we do."""

    query_bounds: Tensor  # int32 [segments + 1]
    key_bounds: Tensor  # int32 [segments + 1]
    max_queries: int
    max_keys: int
    key_sources: Tensor | None  # int64: which tokens of the line of keys to lay out; None: the line as it is


class _Rest(NamedTuple):
    """A segment whose document began before it: its stretch of the line of queries, and that of keys."""

    queries: slice
    keys: slice


class _Bundle(NamedTuple):
    """Documents of similar length, padded on the right to the longest; right padding needs no mask."""

    num_documents: int
    num_tokens: int
    sources: Tensor  # int64 [num_documents * num_tokens]: which token of the line of queries stands at each place
    key_sources: Tensor  # the same for the line of keys


def _bundle_documents(starts: Tensor, lengths: Tensor, key_starts: Tensor, places: Tensor, device: torch.device) -> list[_Bundle]:
    """Documents of a line -> bundles. Writes into `places`, for each token of the line, its place in the concatenated bundles.

    At most a fifth of a bundle is padding: many short documents in one call are up to twice as fast as one by one.
    """
    bundles: list[_Bundle] = []
    num_placed = 0
    by_length = lengths.argsort(descending=True, stable=True)
    while len(by_length):
        longest = int(lengths[by_length[0]])
        num_documents = int((lengths[by_length] * 5 >= longest * 4).sum())
        chosen, by_length = by_length[:num_documents], by_length[num_documents:]
        within = torch.arange(longest).expand(num_documents, -1)
        last = lengths[chosen, None] - 1
        clipped = within.minimum(last)  # padding repeats the last token; nobody reads it
        sources, key_sources = ((first[chosen, None] + clipped).flatten().to(device) for first in (starts, key_starts))
        slots = num_placed + torch.arange(num_documents * longest).view(num_documents, longest)
        places[(starts[chosen, None] + clipped)[within <= last]] = slots[within <= last]
        bundles.append(_Bundle(num_documents, longest, sources, key_sources))
        num_placed += num_documents * longest
    return bundles


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention, causal or under `mask` [B, 1, S, S]; heads [B, H | KV, S, K] -> [B, H, S, K]."""
    short_on_cpu = queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and queries.shape[2] <= 512
    if short_on_cpu and queries.requires_grad and mask is None:
        return _attend_in_products(queries, keys, values, dropout)
    # With grouped heads, enable_gqa measured as fast as repeating keys and values, or faster, and copies nothing.
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )  # fmt: skip


def _attend_in_products(queries: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
    """Causal attention as two plain matrix products, query heads of one key head stacked: no GQA copy.

    For bf16 training on a CPU, where the backward pass of torch's fused kernel is slow: 4.7 times as fast at 64 tokens,
    3 at 128, 2 at 512 and slower from 1,024. Scores are rounded to bf16 before the softmax, which the fused kernel avoids.
    """
    num_rows, num_heads, num_tokens, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    future = torch.full((num_tokens, num_tokens), float("-inf"), dtype=queries.dtype, device=queries.device).triu(1)
    stacked = queries.unflatten(1, (num_kv_heads, group)).flatten(2, 3).flatten(0, 1)  # [B*KV, group*S, K]
    scores = torch.baddbmm(future.repeat(group, 1), stacked, keys.flatten(0, 1).transpose(1, 2), alpha=head_dim**-0.5)
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # [B*KV, group*S, S]
    mixed = torch.bmm(weights, values.flatten(0, 1)).unflatten(0, (num_rows, num_kv_heads))
    return mixed.unflatten(2, (group, num_tokens)).flatten(1, 2)  # [B, H, S, K]
