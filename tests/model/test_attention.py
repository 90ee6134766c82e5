"""Padding and packing: a sequence comes out the same however it is put into a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openemu3.model.attention import CausalAttention, PackedAttention
from openemu3.model.transformer import Transformer, TransformerConfig, build_transformer

CONFIG = TransformerConfig(
    vocab_size=90, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dropout=0.0, init_std=0.1
)


def make_transformer(dtype: torch.dtype = torch.float32) -> Transformer:
    return build_transformer(CONFIG, torch.Generator().manual_seed(0), dtype)


def make_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 90, (rows, tokens), generator=torch.Generator().manual_seed(1))


def run_alone(transformer: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return transformer(ids[None], CausalAttention())[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    transformer, ids, lengths = make_transformer(), make_ids(3, 12), [12, 7, 1]
    batch, padding = torch.zeros_like(ids), torch.ones(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(12 - length, 12) if side == "left" else slice(0, length)
        batch[row, place], padding[row, place] = ids[row, :length], False
    attention = CausalAttention(padding)
    assert (attention.mask is None) == (side == "right")
    hidden = transformer(batch, attention, attention.positions)
    assert hidden.isfinite().all()
    for row, length in enumerate(lengths):
        torch.testing.assert_close(hidden[row][~padding[row]], run_alone(transformer, ids[row, :length]), atol=1e-5, rtol=1e-5)


def test_positions_count_real_tokens() -> None:
    padding = torch.tensor([[True, True, False, False], [False, False, False, True]])
    positions = CausalAttention(padding).positions
    assert positions is not None
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=3), spare=st.integers(0, 3))
def test_packed_documents_equal_documents_run_alone(lengths: list[list[int]], spare: int) -> None:
    num_tokens = max(1, max(map(sum, lengths)) + spare)
    transformer, ids = make_transformer(), make_ids(len(lengths), num_tokens)
    attention = PackedAttention.from_lengths(lengths, num_tokens)
    assert attention.positions.shape == ids.shape
    hidden = transformer(ids, attention, attention.positions)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            assert attention.positions[row, start : start + length].tolist() == list(range(length))
            alone = run_alone(transformer, ids[row, start : start + length])
            torch.testing.assert_close(hidden[row, start : start + length], alone, atol=1e-5, rtol=1e-5)
            start += length


def test_packed_gradients_equal_those_of_documents_run_alone() -> None:
    lengths = [[20, 3, 17], [40], [1, 2, 30]]
    ids = make_ids(3, 40)
    packed, alone = make_transformer(), make_transformer()
    attention = PackedAttention.from_lengths(lengths, 40)
    packed(ids, attention, attention.positions).square()[:, :33].sum().backward()
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in [*row_lengths, 40 - sum(row_lengths)]:
            if length:
                run_alone(alone, ids[row, start : start + length])[: max(0, 33 - start)].square().sum().backward()
            start += length
    for (name, mine), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_documents_do_not_see_each_other() -> None:
    transformer, ids = make_transformer(), make_ids(1, 30)
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 90
    attention = PackedAttention(torch.tensor([[4] * 10 + [2] * 9 + [4] * 11]))  # an id may come back: runs count
    before, after = (transformer(x, attention, attention.positions) for x in (ids, changed))
    assert torch.equal(before[0, 10:], after[0, 10:])
    assert not torch.allclose(before[0, 3:10], after[0, 3:10])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("num_tokens", [5, 64, 513])
def test_bf16_training_on_a_cpu_agrees_with_fp32(num_kv_heads: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, count, num_tokens, 16, generator=generator) for count in (6, num_kv_heads, num_kv_heads)]
    upstream = torch.randn(2, 6, num_tokens, 16, generator=generator).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [head.bfloat16().to(dtype).requires_grad_() for head in heads]
        output = CausalAttention()(0, *inputs)
        results.append((output, *torch.autograd.grad(output, inputs, upstream.to(dtype))))
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).norm() / exact.norm() < 0.012


def test_bf16_training_drops_attention_weights_too() -> None:
    inputs = [torch.zeros(1, heads, 100, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2)]
    values = torch.ones(1, 2, 100, 16, dtype=torch.bfloat16)
    first = CausalAttention(dropout=0.5)(0, *inputs, values)[0, :, 0, 0]
    assert set(first.tolist()) <= {0.0, 2.0}
    torch.testing.assert_close(CausalAttention()(0, *inputs, values).float(), torch.ones(1, 4, 100, 16), atol=0.01, rtol=0)


@pytest.mark.parametrize("lengths", [[[3, 0]], [[8, 3]], [[-1]]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="row 0 has document lengths .* allowed"):
        PackedAttention.from_lengths(lengths, 10)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="padding is torch.int64 .* allowed"):
        CausalAttention(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="documents is torch.float32 .* allowed"):
        PackedAttention(torch.zeros(2, 3))
