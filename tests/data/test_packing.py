"""Packing: nothing is lost or comes twice, vision is never cut, rows are as full as they can be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openemu3.data.packing import Packing, PackingReport, Piece, Tokens, build_rows, pack
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role


@st.composite
def corpora(draw):
    """(context length, lengths, may_cut): vision fits a row, texts may be many rows long."""
    context_length = draw(st.sampled_from([2, 7, 64, 1000, 5120]))
    vision = draw(st.lists(st.integers(1, context_length), max_size=40))
    texts = draw(st.lists(st.integers(1, 4 * context_length), max_size=40))
    order = draw(st.permutations(range(len(vision) + len(texts))))
    lengths, may_cut = np.array([*vision, *texts], np.int64), np.arange(len(order)) >= len(vision)
    return context_length, lengths[list(order)], may_cut[list(order)]


@given(corpora())
def test_every_token_is_in_one_row_and_vision_is_whole(corpus):
    context_length, lengths, may_cut = corpus
    packing = pack(lengths, may_cut, context_length)
    seen = [np.zeros(length, np.int64) for length in lengths]
    for row in packing.rows:
        assert 0 < sum(piece.stop - piece.start for piece in row) <= context_length
        for piece in row:
            assert piece.start < piece.stop
            seen[piece.document][piece.start : piece.stop] += 1
    assert all((counts == 1).all() for counts in seen)
    pieces = Counter(piece.document for row in packing.rows for piece in row)
    assert all(pieces[index] == 1 for index in np.flatnonzero(~may_cut))
    cut = [index for index, count in pieces.items() if count > 1]
    assert packing.num_long == sum(lengths[index] > context_length for index in cut) == (lengths > context_length).sum()
    assert packing.num_cut == len(cut) - packing.num_long and packing.num_pieces == sum(pieces[index] for index in cut)
    assert packing.num_tokens == lengths.sum()


@given(corpora())
def test_where_there_is_text_rows_are_full(corpus):
    """The tokens of the texts fill every gap but crumbs: as few rows as vision needs by best fit, or as all tokens need."""
    context_length, lengths, may_cut = corpus
    packing = pack(lengths, may_cut, context_length)
    vision_rows = len(pack(lengths[~may_cut], may_cut[~may_cut], context_length).rows)
    crumbs = len(packing.rows) * max(1, context_length // 256)
    least = -(-(int(lengths.sum())) // context_length)
    assert len(packing.rows) <= max(vision_rows, -(-(int(lengths.sum()) + crumbs) // context_length) + 1)
    assert len(packing.rows) >= least


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_no_two_rows_of_pictures_could_be_one(lengths):
    packing = pack(lengths, np.zeros(len(lengths), bool), 100)
    filled = sorted(sum(piece.stop - piece.start for piece in row) for row in packing.rows)
    assert len(filled) < 2 or filled[0] + filled[1] > 100


def test_a_case_by_hand():
    """The texts need 5 tokens more than the gaps of the pictures' rows have, so there is a third row: the text of 9 fits it alone, that
    of 3 the gap of 3 better than that of 4."""
    packing = pack([6, 9, 7, 3], [False, True, False, True], 10)
    assert packing.rows == [[Piece(2, 0, 7), Piece(3, 0, 3)], [Piece(0, 0, 6)], [Piece(1, 0, 9)]]
    assert packing.num_tokens == 25 and packing.fill_rate == 25 / 30


def test_a_text_is_cut_only_where_it_fits_nowhere():
    """Two pictures of 6 leave 4 and 4: the text of 4 is whole, that of 8 goes into one gap and a new row is not needed for it."""
    packing = pack([6, 6, 4, 4], [False, False, True, True], 10)
    assert packing.num_cut == 0 and packing.fill_rate == 1.0 and len(packing.rows) == 2
    packing = pack([6, 6, 8], [False, False, True], 10)
    assert packing.rows == [[Piece(0, 0, 6), Piece(2, 4, 8)], [Piece(1, 0, 6), Piece(2, 0, 4)]]
    assert (packing.num_cut, packing.num_long, packing.num_pieces) == (1, 0, 2)


@given(
    st.lists(st.integers(1, 300), max_size=30), st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.sampled_from([512, 1000, 2560])
)
def test_no_text_is_cut_into_crumbs(pictures, texts, context_length):
    """Texts that a row holds are cut into pieces of 1/256 of a row at least."""
    texts = [min(length, context_length) for length in texts]
    lengths, may_cut = [*pictures, *texts], [False] * len(pictures) + [True] * len(texts)
    packing = pack(lengths, may_cut, context_length)
    for row in packing.rows:
        for piece in row:
            length = piece.stop - piece.start
            assert length == lengths[piece.document] or length >= context_length // 256


def test_what_is_left_of_a_cut_text_is_worth_a_place():
    """The gaps are 1,060 each, and a crumb is less than 10: of 1,064 tokens 1,054 go first, so that not 4 but 10 are left."""
    packing = pack([1500, 1500, 1064], [False, False, True], 2560)
    assert sorted(piece.stop - piece.start for row in packing.rows for piece in row) == [10, 1054, 1500, 1500]


def test_vision_that_no_row_holds_is_told():
    with pytest.raises(InputError, match="document 1 holds vision and has 11 tokens; a row has 10, and vision is not cut"):
        pack([10, 11], [False, False], 10)


def test_a_real_mixture_fills_98_percent():
    """The paper's first stage: context 5,120, pictures of about 512 x 512 in many shapes with captions of some 60 to 150 tokens, and a
    fifth of the tokens of text with the heavy tail that texts have."""
    random = np.random.default_rng(0)
    height = random.integers(45, 91, 4000)
    width = 4096 // height
    pictures = height * (width + 1) + 10 + random.integers(60, 150, 4000)
    texts = np.minimum(random.lognormal(6, 1.2, 6000), 100_000).astype(np.int64) + 2
    lengths = np.concatenate([pictures, texts])
    may_cut = np.arange(len(lengths)) >= len(pictures)
    share = texts.sum() / lengths.sum()
    assert 0.15 < share < 0.3
    packing = pack(lengths, may_cut, 5120)
    assert packing.fill_rate > 0.995
    alone = pack(pictures, np.zeros(len(pictures), bool), 5120)
    assert alone.fill_rate < 0.85  # what pictures alone come to: no two fit a row


# ---- rows as tensors


def test_rows_by_hand():
    one = Tokens(np.array([5, 6, 7], np.uint32), np.array([4, 3, 4], np.uint8), "a")
    two = Tokens(np.array([8, 9], np.uint32), np.array([1, 2], np.uint8), "b")
    batch = build_rows([[one, two], [two]], 6, pad_id=0)
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9, 0], [8, 9, 0, 0, 0, 0]]
    assert batch.roles.tolist() == [[4, 3, 4, 1, 2, 0], [1, 2, 0, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]]
    assert batch.sample_ids == (("a", "b"), ("b",)) and batch.num_tokens == 7
    assert [str(tensor.dtype) for tensor in (batch.token_ids, batch.roles, batch.documents)] == [
        "torch.int64",
        "torch.uint8",
        "torch.int32",
    ]
    plain = build_rows([[one, two], [two]], 6, pad_id=0, plain=True)
    assert plain.documents.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]] and plain.num_tokens == 7
    assert plain.token_ids.equal(batch.token_ids)


def test_tokens_are_counted_in_full_and_in_empty_rows():
    codes = Tokens(np.array([5, 6, 7], np.uint32), np.array([Role.STRUCTURE, Role.PADDING, Role.STRUCTURE], np.uint8), "a")
    full = build_rows([[codes]], 3, pad_id=0)
    assert full.num_tokens == 3  # a code that is no target is a token
    assert build_rows([[codes], []], 4, pad_id=0).num_tokens == 3


def test_a_report_in_words():
    report = PackingReport(100, 10, 30, 985, 1, 2, 7, {"a/draw": 0.75, "text": 0.25}, {"that hold vision": (6, ("a", "b"))})
    assert report.describe().splitlines() == [
        "30 documents in 10 rows of 100 tokens: 98.50% full",
        "texts cut: 1 longer than a row and 2 to fill gaps, into 7 pieces",
        "tokens: 75.0% a/draw, 25.0% text",
        "left out: 6 that hold vision (samples a, b, ...)",
    ]
    assert Packing(10).fill_rate == 1.0
