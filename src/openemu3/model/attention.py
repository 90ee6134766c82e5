"""Ways for the tokens of a training or prefill batch to attend to each other.

`CausalAttention` is for rows of one sequence each, `PackedAttention` for rows that hold several documents.
Both are made per batch, outside the network, and called by every layer with rotated queries and keys.
The surprising thing: right padding needs no mask at all, since no real token looks to its right.

Attention with a cache lives in `generation/kv_cache.py`. Shapes: B rows, S tokens, H query heads, KV key/value heads, K head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def positions_from_padding(padding: Tensor) -> Tensor:
    """Padding bool [B, S] (True where there is no token) -> int64 [B, S]: real tokens count from 0, padding holds 0."""
    return ((~padding).cumsum(dim=-1) - 1).clamp(min=0)


class CausalAttention:
    """Every token sees itself and all earlier tokens of its row.

    padding: bool [B, S], True where there is no token; needed for left padding only. Hand `positions` on to the network then.
    dropout: probability of dropping an attention weight; pass `transformer.attention_dropout`, which is 0 outside training.
    What comes out at a padded place is finite and means nothing.
    """

    def __init__(self, padding: Tensor | None = None, dropout: float = 0.0) -> None:
        self.dropout = dropout
        self.positions: Tensor | None = None  # [B, S]; None: 0 .. S-1 in every row
        self.mask: Tensor | None = None  # bool [B, 1, S, S], True where a query (row) may look at a key (column)
        if padding is None:
            return
        if padding.dtype != torch.bool or padding.dim() != 2:
            raise ValueError(f"padding is {padding.dtype} of shape {tuple(padding.shape)}; bool of shape [rows, tokens] is allowed")
        self.positions = positions_from_padding(padding)
        followed_by_token = padding[:, :-1] & ~padding[:, 1:]
        if bool(followed_by_token.any()):
            num_tokens = padding.shape[1]
            causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=padding.device).tril()
            itself = torch.eye(num_tokens, dtype=torch.bool, device=padding.device)
            # A padded query may look at itself, so that no softmax runs over nothing (NaN on some backends).
            self.mask = ((causal & ~padding[:, None, :]) | itself).unsqueeze(1)

    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _attend(queries, keys, values, mask=self.mask, dropout=self.dropout)


class PackedAttention:
    """Several documents per row: every token sees itself and the earlier tokens of its own document.

    documents: int [B, S]; equal neighbours belong to one document, so padding is simply one more document at the end.
    dropout: as in `CausalAttention`. Hand `positions`, which restart in every document, on to the network.
    """

    def __init__(self, documents: Tensor, dropout: float = 0.0) -> None:
        if documents.dim() != 2 or documents.is_floating_point() or not documents.numel():
            raise ValueError(f"documents is {documents.dtype} of shape {tuple(documents.shape)}; whole numbers of shape [rows, tokens] are allowed")
        self.dropout = dropout
        num_rows, num_tokens = documents.shape
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        places = torch.arange(num_tokens, device=documents.device).expand(num_rows, -1)
        self.positions = places - torch.where(begins, places, 0).cummax(dim=-1).values  # [B, S]
        # Documents never cross rows, so the batch is one long line of documents: only their lengths matter.
        starts = begins.flatten().nonzero().flatten()
        self.lengths: list[int] = torch.diff(starts, append=starts.new_tensor([documents.numel()])).tolist()

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], num_tokens: int, dropout: float = 0.0) -> "PackedAttention":
        """From the documents' lengths in every row; what is missing to `num_tokens` is padding."""
        documents = torch.zeros(len(lengths), num_tokens, dtype=torch.int64)
        for row, row_lengths in enumerate(lengths):
            if min(row_lengths, default=1) < 1 or sum(row_lengths) > num_tokens:
                raise ValueError(f"row {row} has document lengths {list(row_lengths)}; positive ones of at most {num_tokens} in sum are allowed")
            ids = torch.arange(1, len(row_lengths) + 1).repeat_interleave(torch.tensor(row_lengths, dtype=torch.int64))
            documents[row, : len(ids)] = ids
        return cls(documents, dropout)

    @torch.compiler.disable  # the lengths differ from batch to batch: traced, every batch would compile anew
    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_rows, _, num_tokens, _ = queries.shape
        # One split of the line of documents, since its gradient is one concatenation; slices would each be padded to full size.
        lines = [heads.transpose(1, 2).flatten(0, 1).split(self.lengths) for heads in (queries, keys, values)]
        outputs = [
            _attend(*(piece.transpose(0, 1).unsqueeze(0) for piece in pieces), mask=None, dropout=self.dropout)
            .squeeze(0)
            .transpose(0, 1)
            for pieces in zip(*lines, strict=True)
        ]  # each [length, H, K]
        return torch.cat(outputs).unflatten(0, (num_rows, num_tokens)).transpose(1, 2)  # [B, H, S, K]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Causal softmax attention, or under `mask` [B, 1, S, S]; heads [B, H | KV, S, K] -> [B, H, S, K]."""
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )  # fmt: skip
