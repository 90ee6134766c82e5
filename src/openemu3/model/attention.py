"""Ways for the tokens of a training or prefill batch to attend to each other.

`CausalAttention` is for rows of one sequence each, `PackedAttention` for rows that hold several documents.
Both are made per batch, outside the network, and called by every layer with rotated queries and keys.
The surprising thing: right padding needs no mask at all, since no real token looks to its right.

Attention with a cache lives in `generation/kv_cache.py`. Shapes: B rows, S tokens, H query heads, KV key/value heads, K head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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
        if documents.dim() != 2 or not documents.numel() or documents.is_floating_point():
            raise ValueError(f"documents is {documents.dtype} of shape {tuple(documents.shape)}; whole numbers [rows, tokens] are allowed")
        self.dropout = dropout
        ids = documents.cpu()
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        # Documents never cross rows, so the batch is one long line of documents.
        starts = begins.flatten().nonzero().flatten()
        lengths = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
        within = torch.arange(ids.numel()) - starts.repeat_interleave(lengths)
        self.positions = within.view_as(ids).to(documents.device)  # int64 [B, S]
        self._bundles, self._places = _bundle_documents(starts, lengths, documents.device)

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

    @torch.compiler.disable  # the bundles differ from batch to batch: traced, every batch would compile anew
    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_rows, _, num_tokens, _ = queries.shape
        lines = [heads.transpose(1, 2).flatten(0, 1) for heads in (queries, keys, values)]  # [B*S, heads, K]
        outputs = []
        for bundle in self._bundles:
            shape = (bundle.num_documents, bundle.num_tokens)
            q, k, v = (line.index_select(0, bundle.sources).unflatten(0, shape).transpose(1, 2) for line in lines)
            mixed = _attend(q, k, v, None, self.dropout)  # [documents, H, tokens, K]
            outputs.append(mixed.transpose(1, 2).flatten(0, 1))
        line = torch.cat(outputs).index_select(0, self._places)  # [B*S, H, K]
        return line.unflatten(0, (num_rows, num_tokens)).transpose(1, 2)


def positions_from_padding(padding: Tensor) -> Tensor:
    """Padding bool [B, S] (True where there is no token) -> int64 [B, S]: real tokens count from 0."""
    return ((~padding).cumsum(dim=-1) - 1).clamp(min=0)


class _Bundle(NamedTuple):
    """Documents of similar length, padded on the right to the longest; right padding needs no mask."""

    num_documents: int
    num_tokens: int
    sources: Tensor  # int64 [num_documents * num_tokens]: which token of the line stands at each place


def _bundle_documents(starts: Tensor, lengths: Tensor, device: torch.device) -> tuple[list[_Bundle], Tensor]:
    """Documents of a line -> bundles, and for each token of the line its place in the concatenated bundles.

    At most a fifth of a bundle is padding: many short documents in one call are up to twice as fast as one by one.
    """
    bundles: list[_Bundle] = []
    places = torch.empty(int(lengths.sum()), dtype=torch.int64)
    num_placed = 0
    by_length = lengths.argsort(descending=True, stable=True)
    while len(by_length):
        longest = int(lengths[by_length[0]])
        num_documents = int((lengths[by_length] * 5 >= longest * 4).sum())
        chosen, by_length = by_length[:num_documents], by_length[num_documents:]
        within = torch.arange(longest).expand(num_documents, -1)
        last = lengths[chosen, None] - 1
        sources = starts[chosen, None] + within.minimum(last)  # padding repeats the last token; nobody reads it
        slots = num_placed + torch.arange(num_documents * longest).view(num_documents, longest)
        places[sources[within <= last]] = slots[within <= last]
        bundles.append(_Bundle(num_documents, longest, sources.flatten().to(device)))
        num_placed += num_documents * longest
    return bundles, places.to(device)


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
