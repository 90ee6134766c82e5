"""How rows are dealt to ranks, and attention of a part of a row against all of it. With many ranks: tests/distributed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openemu3.model.attention import PackedAttention, PieceAttention
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.transformer import TransformerConfig
from openemu3.records import InputError

CONFIG = TransformerConfig(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=8)


def make_split(size: int, width: int, num_tensor_ranks: int = 1) -> ContextSplit:
    """The deal of a mesh that is not there."""
    split = ContextSplit(CONFIG, None)
    split.size, split.width, split.num_groups, split.num_tensor_ranks = size, width, size // width, num_tensor_ranks
    return split


def test_one_process_has_whole_rows() -> None:
    split, rows = ContextSplit(CONFIG, None), torch.arange(10).view(2, 5)
    assert split.split(rows) is rows
    assert isinstance(split.build_attention(rows), PackedAttention)


def test_places_worked_by_hand() -> None:
    assert make_split(4, 4).list_places(8).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Two groups of two ranks: the first group has the first and the last quarter of the row, the second what is between.
    assert make_split(4, 2).list_places(16).tolist() == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(("size", "width", "num_tensor_ranks", "multiple"), [(4, 4, 1, 4), (4, 4, 2, 8), (4, 2, 1, 8), (2, 1, 2, 8)])
def test_rows_that_cannot_be_dealt(size: int, width: int, num_tensor_ranks: int, multiple: int) -> None:
    split = make_split(size, width, num_tensor_ranks)
    split.check_length(3 * multiple)
    with pytest.raises(InputError, match=f"context length {multiple + 1} cannot be dealt .* a multiple of {multiple} is allowed"):
        split.check_length(multiple + 1)


def make_heads(num_rows: int, num_tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_rows, heads, num_tokens, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]


@settings(max_examples=30)
@given(lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=2), num_groups=st.integers(1, 3))
def test_pieces_together_are_the_whole_row(lengths: list[list[int]], num_groups: int) -> None:
    num_tokens = -(-max(map(sum, lengths)) // (2 * num_groups)) * 2 * num_groups
    documents = torch.full((len(lengths), num_tokens), 99)
    for row, row_lengths in enumerate(lengths):
        ids = torch.arange(len(row_lengths)).repeat_interleave(torch.tensor(row_lengths))
        documents[row, : len(ids)] = ids
    queries, keys, values = make_heads(len(lengths), num_tokens)
    expected = PackedAttention(documents)(0, queries, keys, values)
    length = num_tokens // (2 * num_groups)
    for group in range(num_groups):
        starts = [group * length, (2 * num_groups - 1 - group) * length]
        places = torch.cat([torch.arange(start, start + length) for start in starts])
        found = PieceAttention(documents, starts, length)(0, queries[:, :, places], keys, values)
        torch.testing.assert_close(found, expected[:, :, places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_the_plan_for_a_kernel_of_variable_lengths(in_pieces: bool) -> None:
    """That kernel runs on GPUs alone. Here its arguments are followed by the letter: of each segment, the last query sees the last key."""
    documents = torch.tensor([[0] * 5 + [1] * 20 + [2] * 7, [0] * 32])
    queries, keys, values = make_heads(2, 32)
    expected = PackedAttention(documents)(0, queries, keys, values)
    attention: PackedAttention | PieceAttention = PackedAttention(documents)
    places = torch.arange(32)
    if in_pieces:
        attention = PieceAttention(documents, [8, 16], 8)
        places = torch.arange(8, 24)
    plan = attention._segments.varlen
    q, k, v = (heads.transpose(1, 2).flatten(0, 1) for heads in (queries[:, :, places], keys, values))
    if plan.key_sources is not None:
        k, v = k[plan.key_sources], v[plan.key_sources]
    assert (plan.key_sources is not None) == in_pieces
    assert plan.query_bounds[-1] == len(q) and plan.key_bounds[-1] == len(k)
    outputs = []
    for number in range(len(plan.query_bounds) - 1):
        (q_start, q_end), (k_start, k_end) = (bounds[number : number + 2].tolist() for bounds in (plan.query_bounds, plan.key_bounds))
        assert q_end - q_start <= plan.max_queries and k_end - k_start <= plan.max_keys
        scores = torch.einsum("qhc,khc->hqk", q[q_start:q_end], k[k_start:k_end].repeat_interleave(2, dim=1)) / 8**0.5
        future = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.bool).triu(k_end - k_start - (q_end - q_start) + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khc->qhc", weights, v[k_start:k_end].repeat_interleave(2, dim=1)))
    found = torch.cat(outputs).unflatten(0, (2, len(places))).transpose(1, 2)
    torch.testing.assert_close(found, expected[:, :, places], rtol=1e-5, atol=1e-6)


def test_gradients_of_pieces_reach_queries_keys_and_values() -> None:
    documents = torch.tensor([[0] * 9 + [1] * 23])
    whole, parts = make_heads(1, 32), make_heads(1, 32)
    upstream = torch.randn(1, 4, 32, 8, generator=torch.Generator().manual_seed(1))
    PackedAttention(documents)(0, *whole).backward(upstream)
    for starts in ([0, 24], [8, 16]):
        places = torch.cat([torch.arange(start, start + 8) for start in starts])
        found = PieceAttention(documents, starts, 8)(0, parts[0][:, :, places], parts[1], parts[2])
        found.backward(upstream[:, :, places])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
