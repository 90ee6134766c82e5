"""Keys and values of the tokens seen so far, in memory that is reserved once, and the attention that reads them.

In: the number of new tokens of each row in a pass. Out: an `Attention` for that pass, to hand to the transformer.
The surprising thing: rows are not padded against each other. A pass is one flat line of new tokens, [1, N], row after row, whatever
each row's length or number of new tokens; linear layers see N tokens, and only attention knows of rows. The line must be as long as
the attention's `positions` [1, P], P = max(N, MIN_PASS_TOKENS); what comes after the N tokens is ignored.

Prefill (many new tokens a row) goes through SDPA row by row; decoding (one to a few) is two matrix products grouped by key/value
head with a softmax between, which on a CPU is several times faster than SDPA there, and never repeats keys or values.

Shapes: L layers, R rows, C capacity in tokens, H query heads, KV key/value heads, G = H / KV, K head dim, N new tokens of a pass,
M the most new tokens of a row in a pass, S the keys looked at, at least those of the longest row after the pass.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Decoding looks at the keys up to a multiple of this. On a CPU every new matrix shape in bf16 costs the compilation of a kernel and
# some 300 KB that stay; 64 steps share one.
KEY_BLOCK = 64
# A pass has at least so many tokens, filled up with dummies that nothing is kept of: matrix products of fewer rows take other paths on a
# CPU and round differently, so that a request alone would get other logits than beside others. From 4 on they are equal bit by bit.
MIN_PASS_TOKENS = 4


class KeyValueCache:
    """Room for `capacity` tokens in each of `num_rows` rows. Rows in use are 0 ... len(lengths) - 1, without gaps."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        # Zeros, not empty: masked places are multiplied by a probability of 0, and 0 * NaN would be NaN.
        self.keys = torch.zeros(num_layers, num_rows, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)  # [L, R, KV, C, K]
        self.lengths: list[int] = []  # tokens held by each row in use

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def add_row(self) -> int:
        """Takes an empty row into use and returns its index. Raises ValueError when none is left."""
        if len(self.lengths) == self.num_rows:
            raise ValueError(f"all {self.num_rows} rows of the cache are in use")
        self.lengths.append(0)
        return len(self.lengths) - 1

    def remove_row(self, row: int) -> int:
        """Gives a row back; the last row in use moves into its place. Returns the index that the moved row had (`row` if none moved)."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row != last:
            self.keys[:, row, :, :length] = self.keys[:, last, :, :length]
            self.values[:, row, :, :length] = self.values[:, last, :, :length]
            self.lengths[row] = length
        return last

    def begin_prefill(self, rows: Sequence[int], counts: Sequence[int]) -> "PrefillAttention":
        """Attention for a pass that appends counts[i] >= 1 tokens to row rows[i]; the flat line holds them in this order."""
        return PrefillAttention(self, rows, self._reserve(rows, counts), counts)

    def begin_decode(self, counts: Sequence[int]) -> "DecodeAttention":
        """Attention for a pass that appends counts[row] >= 1 tokens to every row in use, in the order of the rows."""
        rows = range(len(self.lengths))
        if len(counts) != len(rows):
            raise ValueError(f"{len(counts)} counts were given for {len(rows)} rows in use")
        return DecodeAttention(self, self._reserve(rows, counts), counts)

    def _reserve(self, rows: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Advances the lengths and returns what they were, which is where each row's new tokens go."""
        starts = [self.lengths[row] for row in rows]
        for row, start, count in zip(rows, starts, counts, strict=True):
            if count < 1 or start + count > self.capacity:
                raise ValueError(f"row {row} holds {start} of {self.capacity} tokens and cannot take {count} more")
            self.lengths[row] = start + count
        return starts


class PrefillAttention:
    """Causal attention for rows that take many tokens at once, each on its own: no padding, and no mask when a row begins here."""

    def __init__(self, cache: KeyValueCache, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.segments = list(zip(rows, starts, counts, strict=True))
        device = cache.keys.device
        places = torch.cat([torch.arange(start, start + count) for _, start, count in self.segments])
        self.num_new = len(places)
        self.positions = _fill_up(places).to(device)[None]  # [1, P]
        self.masks = [  # bool [count, start + count]; SDPA's own causal mask would start at the first key
            torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start) if start else None
            for _, start, count in self.segments
        ]

    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [1, H, P, K], keys and values [1, KV, P, K] -> [1, H, P, K]; writes the first N into the cache."""
        outputs, begin = [], 0
        for (row, start, count), mask in zip(self.segments, self.masks, strict=True):
            new = slice(begin, begin + count)
            end = start + count
            self.keys[layer_index, row, :, start:end] = keys[0, :, new]
            self.values[layer_index, row, :, start:end] = values[0, :, new]
            outputs.append(
                F.scaled_dot_product_attention(
                    queries[:, :, new],
                    self.keys[layer_index, row : row + 1, :, :end],
                    self.values[layer_index, row : row + 1, :, :end],
                    attn_mask=mask,
                    is_causal=mask is None,
                    enable_gqa=queries.shape[1] != keys.shape[1],
                )
            )
            begin += count
        outputs.append(queries.new_zeros(1, queries.shape[1], queries.shape[2] - self.num_new, queries.shape[3]))
        return torch.cat(outputs, dim=2)


class DecodeAttention:
    """Attention for all rows at once, each with one new token, or a few (a sampled code and the ids that the grammar forces after it)."""

    def __init__(self, cache: KeyValueCache, starts: Sequence[int], counts: Sequence[int]) -> None:
        device = cache.keys.device
        num_rows, most_new = len(counts), max(counts)
        self.num_rows, self.most_new = num_rows, most_new
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        self.num_keys = min(-(-longest // KEY_BLOCK) * KEY_BLOCK, cache.capacity)  # S
        self.keys, self.values = cache.keys[:, :num_rows], cache.values[:, :num_rows]
        first = torch.tensor(starts)
        if min(counts) == most_new:
            places = first[:, None] + torch.arange(most_new)  # [R, M]
            self.spread: Tensor | None = None
            self.gathered: Tensor | None = None
            rows = torch.arange(num_rows).repeat_interleave(most_new)
            flat_places = places.flatten()
        else:
            lengths = torch.tensor(counts)
            rows = torch.arange(num_rows).repeat_interleave(lengths)  # [N], the row of every new token
            offsets = lengths.cumsum(0) - lengths
            within = torch.arange(len(rows)) - offsets[rows]  # [N], its number within the row's new tokens
            flat_places = first[rows] + within
            places = first[:, None] + torch.arange(most_new)
            # Rows with fewer than M new tokens repeat their last query; its results are never read.
            spread = offsets[:, None] + torch.minimum(torch.arange(most_new), lengths[:, None] - 1)
            self.spread = spread.flatten().to(device)  # [R * M] -> new token
            self.gathered = (rows * most_new + within).to(device)  # [N] -> place in [R, M]
        self.rows = rows.to(device)
        self.places = flat_places.to(device)
        self.positions = _fill_up(flat_places).to(device)[None]  # [1, P]
        hidden = torch.arange(self.num_keys) > places[:, :, None]  # [R, M, S]
        self.hidden = hidden[:, None, None].to(device) if bool(hidden.any()) else None  # [R, 1, 1, M, S]

    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [1, H, P, K], keys and values [1, KV, P, K] -> [1, H, P, K]; writes the first N into the cache."""
        num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
        num_new, num_dummies = len(self.places), queries.shape[2] - len(self.places)
        held_keys, held_values = self.keys[layer_index], self.values[layer_index]  # [R, KV, C, K]
        held_keys[self.rows, :, self.places] = keys[0, :, :num_new].transpose(0, 1)  # [N, KV, K]
        held_values[self.rows, :, self.places] = values[0, :, :num_new].transpose(0, 1)
        seen_keys, seen_values = held_keys[:, :, : self.num_keys], held_values[:, :, : self.num_keys]  # [R, KV, S, K]

        line = queries[0, :, :num_new] if self.spread is None else queries[0, :, self.spread]  # [H, R * M, K]
        line = line.unflatten(1, (self.num_rows, self.most_new)).unflatten(0, (num_kv_heads, -1))  # [KV, G, R, M, K]
        grouped = line.permute(2, 0, 4, 1, 3).flatten(3)  # [R, KV, K, G * M]
        # Keys times queries, not queries times keys: the keys are then read as they lie, and bf16 is three times faster on a CPU.
        scores = (seen_keys @ grouped).transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)  # [R, KV, G * M, S]
        scores *= 1 / math.sqrt(head_dim)
        if self.hidden is not None:
            scores.unflatten(2, (-1, self.most_new)).masked_fill_(self.hidden, -math.inf)
        mixed = scores.softmax(dim=-1).to(queries.dtype) @ seen_values  # [R, KV, G * M, K]
        mixed = mixed.unflatten(2, (-1, self.most_new)).permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)  # [H, R * M, K]
        mixed = mixed if self.gathered is None else mixed[:, self.gathered]  # [H, N, K]
        return F.pad(mixed, (0, 0, 0, num_dummies))[None]


def _fill_up(places: Tensor) -> Tensor:
    """[N] -> [P]: dummies stand at position 0."""
    return F.pad(places, (0, max(0, MIN_PASS_TOKENS - len(places))))
