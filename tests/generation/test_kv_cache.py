"""The cache: whatever way tokens arrive, the transformer's hidden states are those of one plain causal pass over each row."""

import pytest
import torch
from torch.nn import functional as F

from openemu3.generation.kv_cache import MIN_PASS_TOKENS, KeyValueCache
from openemu3.model.attention import CausalAttention


def make_cache(transformer, num_rows, capacity):
    config = transformer.config
    dtype = transformer.lm_head.weight.dtype
    return KeyValueCache(config.num_layers, num_rows, config.num_kv_heads, capacity, config.head_dim, dtype)


def plain(transformer, tokens):
    return transformer(tokens[None], CausalAttention())[0]


def feed(transformer, tokens, attention):
    line = torch.cat(tokens)
    missing = attention.positions.shape[1] - len(line)
    assert missing == max(0, MIN_PASS_TOKENS - len(line))
    hidden = transformer(F.pad(line, (0, missing))[None], attention, attention.positions)[0]
    return hidden[: len(line)].split([len(t) for t in tokens])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_any_mixture_of_prefill_and_decode_equals_one_plain_pass(make_transformer, num_heads, num_kv_heads, dtype, tolerance):
    transformer = make_transformer(1, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    lengths = [80, 73, 145]  # decoding crosses blocks of 64 keys
    rows = [torch.randint(transformer.config.vocab_size, (length,), generator=generator) for length in lengths]
    cache = make_cache(transformer, 4, 145)
    with torch.inference_mode():
        expected = [plain(transformer, tokens) for tokens in rows]
        for _ in rows:
            cache.add_row()
        # Rows 0 and 2 first, row 1 later; row 2 in two pieces; then one to three tokens each, different ones in one pass.
        got = [[], [], []]
        for chosen, counts in [([0, 2], [62, 117]), ([2], [3]), ([2], [3]), ([1], [60])]:
            starts = [cache.lengths[row] for row in chosen]
            pieces = [rows[row][start : start + count] for row, start, count in zip(chosen, starts, counts, strict=True)]
            for row, hidden in zip(chosen, feed(transformer, pieces, cache.begin_prefill(chosen, counts)), strict=True):
                got[row].append(hidden)
        for counts in [[1, 1, 1], [2, 1, 3], [1, 1, 1], [3, 3, 3], [2, 2, 2], [1, 2, 1], [8, 1, 1]]:
            starts = list(cache.lengths)
            pieces = [tokens[start : start + count] for tokens, start, count in zip(rows, starts, counts, strict=True)]
            for row, hidden in enumerate(feed(transformer, pieces, cache.begin_decode(counts))):
                got[row].append(hidden)
    scale = max(hidden.abs().max() for hidden in expected)
    for row, pieces in enumerate(got):
        seen = torch.cat(pieces)
        assert len(seen) == cache.lengths[row] > 10
        assert (seen - expected[row][: len(seen)]).abs().max() < tolerance * scale
    assert cache.lengths == [80, 71, 135]


def test_rows_leave_and_join_without_a_trace(make_transformer):
    transformer = make_transformer(2)
    generator = torch.Generator().manual_seed(1)
    first, second, third = (torch.randint(500, (12,), generator=generator) for _ in range(3))
    cache = make_cache(transformer, 2, 16)
    with torch.inference_mode():
        cache.add_row(), cache.add_row()
        feed(transformer, [first, second[:8]], cache.begin_prefill([0, 1], [12, 8]))
        assert cache.remove_row(0) == 1  # row 1 moved to 0
        assert cache.lengths == [8]
        assert cache.add_row() == 1
        feed(transformer, [third[:10]], cache.begin_prefill([1], [10]))
        moved, joined = feed(transformer, [second[8:10], third[10:11]], cache.begin_decode([2, 1]))
        assert torch.allclose(moved, plain(transformer, second)[8:10], atol=1e-5)
        assert torch.allclose(joined, plain(transformer, third)[10:11], atol=1e-5)
        assert cache.remove_row(1) == 1 and cache.lengths == [10]


def test_the_cache_never_grows_and_refuses_what_does_not_fit(make_transformer):
    cache = make_cache(make_transformer(0), 2, 4)
    size = cache.num_bytes
    assert size == 2 * 2 * 2 * 2 * 4 * 8 * 4  # keys and values, layers, rows, heads, capacity, head dim, fp32
    cache.add_row(), cache.add_row()
    with pytest.raises(ValueError, match="all 2 rows"):
        cache.add_row()
    cache.begin_prefill([0, 1], [4, 3])
    with pytest.raises(ValueError, match="row 0 holds 4 of 4 tokens and cannot take 1 more"):
        cache.begin_decode([1, 1])
    with pytest.raises(ValueError, match="1 counts were given for 2 rows"):
        cache.begin_decode([1])
    assert cache.num_bytes == size
