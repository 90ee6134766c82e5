"""The loader: an endless sequence of rows that depends on the documents, the settings and the seed alone."""

import json
import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openemu3.data.loader import LoaderConfig, TokenLoader, read_held_out, run_ahead
from openemu3.data.mixture import MixtureConfig
from openemu3.data.shards import DocumentStore, write_documents
from openemu3.records import Document, Image, InputError, Text
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.sequence import Role

PAD = 300  # of `small_format`


@pytest.fixture(scope="module")
def store(shard):
    return DocumentStore([shard], {"train"}, "abc")


def make_loader(store, dp=1, rank=0, **config):
    defaults = {"context_length": 96, "rows_per_batch": 4, "null_prompt_share": 0.0, "window_documents": 50, "prefetch": 0}
    return TokenLoader(store, LoaderConfig(**{**defaults, **config}), PAD, dp, rank)


def split_row(batch, row):
    """(sample id, ids, roles) of each document or piece of one row."""
    numbers = batch.documents[row].tolist()
    pieces = []
    for number, sample_id in enumerate(batch.sample_ids[row]):
        places = [place for place, found in enumerate(numbers) if found == number]
        assert places == list(range(places[0], places[-1] + 1))
        pieces.append((sample_id, tuple(batch.token_ids[row, places].tolist()), tuple(batch.roles[row, places].tolist())))
    end = sum(len(ids) for _, ids, _ in pieces)
    assert (batch.token_ids[row, end:] == PAD).all() and (batch.roles[row, end:] == Role.PADDING).all()
    assert (batch.documents[row, end:] == len(pieces)).all()
    return pieces


def list_pieces(batches):
    return [piece for batch in batches for row in range(len(batch.token_ids)) for piece in split_row(batch, row)]


def list_rows(batches):
    """All that is in each row, for telling rows apart."""
    return [
        (batch.sample_ids[row], *(tuple(tensor[row].tolist()) for tensor in (batch.token_ids, batch.roles, batch.documents)))
        for batch in batches
        for row in range(len(batch.token_ids))
    ]


def take(loader, number, position=0):
    """The rows of each of some global batches."""
    batches = loader(position)
    try:
        return [list_rows(next(batches)) for _ in range(number)]
    finally:
        batches.close()


def count_epoch(loader, epoch):
    """Rows of an epoch."""
    return sum(len(loader.pack_window(epoch, window).packing.rows) for window in range(len(loader._draw_epoch(epoch)[0])))


# ---- what comes


def test_every_token_comes_once_an_epoch_and_vision_is_whole(store):
    loader = make_loader(store, rows_per_batch=1)
    position, orders = 0, []
    for epoch in range(3):
        rows = count_epoch(loader, epoch)
        pieces = list_pieces(batch for batches in islice(loader(position), rows) for batch in batches)
        position += rows
        expected, texts = Counter(), {}
        for index in range(len(store)):
            ids, roles = store.read(index)
            if store.num_vision[index]:
                expected[store.read_sample_id(index), tuple(ids.tolist()), tuple(roles.tolist())] += 1
            else:
                texts[store.read_sample_id(index)] = Counter(ids.tolist())
        whole = Counter(piece for piece in pieces if Role.VISION in piece[2])
        assert whole == expected
        found = {}
        for sample_id, ids, roles in pieces:
            if Role.VISION not in roles:
                found.setdefault(sample_id, Counter()).update(ids)
        assert found == texts
        orders.append([sample_id for sample_id, _, _ in pieces])
    assert orders[0] != orders[1] != orders[2]


def test_shapes_and_types(store):
    batches = next(iter(make_loader(store, rows_per_batch=6, rows_per_micro_batch=2)))
    assert len(batches) == 3
    for batch in batches:
        assert batch.token_ids.shape == batch.roles.shape == batch.documents.shape == (2, 96)
        assert (batch.token_ids.dtype, batch.roles.dtype, batch.documents.dtype) == (torch.int64, torch.uint8, torch.int32)
        assert batch.num_tokens == sum(len(ids) for _, ids, _ in list_pieces([batch])) > 150
        assert len(batch.sample_ids) == 2


def test_plain_packing_differs_in_the_documents_alone(store):
    packed, plain = next(iter(make_loader(store))), next(iter(make_loader(store, plain=True)))
    for one, two in zip(packed, plain, strict=True):
        assert one.token_ids.equal(two.token_ids) and one.roles.equal(two.roles)
        is_padding = one.documents == torch.tensor([len(ids) for ids in one.sample_ids])[:, None]
        assert two.documents.equal(is_padding.int())


def test_the_documents_of_a_row_come_in_any_order(store):
    """Best fit puts the longest first; a model that sees across documents would learn that."""
    rows = [split_row(batch, 0) for batches in islice(iter(make_loader(store, rows_per_batch=1)), 60) for batch in batches]
    lengths = [[len(ids) for _, ids, _ in row] for row in rows if len(row) > 2]
    sorted_rows = sum(row == sorted(row, reverse=True) for row in lengths)
    assert len(lengths) > 20 and sorted_rows < len(lengths) / 2


# ---- the same order, whoever asks


@settings(max_examples=12)
@given(
    position=st.integers(0, 12),
    dp=st.sampled_from([2, 3, 6]),
    micro=st.sampled_from([1, 2]),
    share=st.sampled_from([0.0, 0.5]),
    window=st.sampled_from([7, 50, 10_000]),
)
def test_global_batches_depend_on_no_rank(store, position, dp, micro, share, window):
    config = {"rows_per_batch": 12, "null_prompt_share": share, "window_documents": window, "seed": 3}
    whole = take(make_loader(store, **config), 2, position)
    ranks = [take(make_loader(store, dp, rank, rows_per_micro_batch=micro, **config), 2, position) for rank in range(dp)]
    for number in range(2):
        assert [row for rank in ranks for row in rank[number]] == whole[number]
    assert whole == take(make_loader(store, **config), position + 2)[position:]


@settings(max_examples=15)
@given(taken=st.integers(0, 30), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]), prefetch=st.integers(0, 3))
def test_a_run_goes_on_in_the_middle_with_other_ranks(store, taken, before, after, prefetch):
    """Through JSON, as a checkpoint keeps it; what was made ahead of time but not taken is not lost."""
    config = {"rows_per_batch": 4, "null_prompt_share": 0.3, "prefetch": prefetch}
    whole = take(make_loader(store, **config), taken + 3)
    first = [make_loader(store, before, rank, **config) for rank in range(before)]
    for loader in first:
        batches = iter(loader)
        for _ in range(taken):
            next(batches)
        batches.close()
    states = {json.dumps(loader.state_dict()) for loader in first}
    assert len(states) == 1
    state = json.loads(states.pop())
    assert state["position"] == taken
    found = []
    for rank in range(after):
        loader = make_loader(store, after, rank, **config)
        loader.load_state_dict(state)
        batches = iter(loader)
        found.append([list_rows(next(batches)) for _ in range(3)])
        batches.close()
    assert [[row for rank in found for row in rank[number]] for number in range(3)] == whole[taken:]


def test_a_run_goes_on_with_another_batch_size(store):
    loader = make_loader(store, rows_per_batch=4)
    rows = [row for batch in take(loader, 10) for row in batch]
    loader = make_loader(store, rows_per_batch=4)
    batches = iter(loader)
    next(batches), next(batches)
    larger = make_loader(store, rows_per_batch=6)
    larger.load_state_dict(loader.state_dict())
    assert list_rows(next(iter(larger))) == rows[8:14]


def test_seeds_give_other_orders(store):
    assert take(make_loader(store, seed=0), 3) == take(make_loader(store, seed=0), 3) != take(make_loader(store, seed=1), 3)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"context_length": 97}, {"null_prompt_share": 0.1}, {"mixture": MixtureConfig({"draw": 2.0})}]
)
def test_a_position_of_another_order_is_refused(store, change):
    state = make_loader(store).state_dict()
    make_loader(store, rows_per_micro_batch=2, plain=True, prefetch=1, dp=2).load_state_dict(state)
    with pytest.raises(InputError, match="the data position was saved for the order '[0-9a-f]{16}', but these documents and settings give"):
        make_loader(store, **change).load_state_dict(state)


def test_a_position_of_other_documents_is_refused(store, documents, tmp_path):
    write_documents(tmp_path / "fewer.parquet", documents[1:], "abc")
    with pytest.raises(InputError, match="the data position was saved for the order"):
        make_loader(DocumentStore([tmp_path / "fewer.parquet"], {"train"})).load_state_dict(make_loader(store).state_dict())


# ---- mixtures, null prompts, roles


def test_the_mixture_says_how_often_a_source_comes(store):
    rates = {"draw": 2.0, "describe": 0.3, "film": 0.0, "text": 0.0}
    loader = make_loader(store, rows_per_batch=1, mixture=MixtureConfig(rates))
    num_epochs = 20
    rows = sum(count_epoch(loader, epoch) for epoch in range(num_epochs))
    pieces = list_pieces(batch for batches in islice(iter(loader), rows) for batch in batches)
    described = sum(Role.TEXT_TARGET in roles for _, _, roles in pieces)
    drawings = (store.source_of == store.sources.index("draw")).sum()
    assert len(pieces) - described == 2 * num_epochs * drawings
    expected = 0.3 * num_epochs * (store.source_of == store.sources.index("describe")).sum()
    assert abs(described - expected) < 4 * (expected * 0.7) ** 0.5  # four standard deviations of a fair lottery


def test_an_epoch_may_be_empty_by_chance(documents, tmp_path):
    """One document at a rate of 0.2 is in one epoch of five: the others are passed over."""
    write_documents(tmp_path / "one.parquet", documents[:1], "abc")
    loader = make_loader(DocumentStore([tmp_path / "one.parquet"], {"train"}), rows_per_batch=1, mixture=MixtureConfig({"draw": 0.2}))
    assert 2 < sum(count_epoch(loader, epoch) for epoch in range(40)) < 20
    rows = take(loader, 3)
    assert rows[0] == rows[1] == rows[2]
    assert take(loader, 1, position=2) == rows[2:]


def test_null_prompts_drop_the_context_text_and_nothing_else(store, small_format):
    loader = make_loader(store, null_prompt_share=1.0, rows_per_batch=1)
    originals = Counter()
    for index in range(len(store)):
        ids, roles = store.read(index)
        if store.sources[store.source_of[index]] in ("draw", "film"):
            ids = ids[roles != Role.TEXT_CONTEXT]
        if store.num_vision[index]:
            originals[tuple(ids.tolist())] += 1
    pieces = list_pieces(batch for batches in islice(iter(loader), count_epoch(loader, 0)) for batch in batches)
    assert Counter(ids for _, ids, roles in pieces if Role.VISION in roles) == originals
    for _, ids, roles in pieces:
        if Role.VISION in roles and Role.TEXT_TARGET not in roles:
            (medium,) = small_format.decode(np.array(ids)).parts
            prompt = small_format.image_prompt if isinstance(medium, Image) else small_format.video_prompt
            empty = prompt("", medium.grid) if isinstance(medium, Image) else prompt("", medium.grid, medium.fps)
            assert list(ids[: len(empty)]) == empty  # it begins as the unconditional branch of guidance does


def test_null_prompts_are_drawn_anew_in_every_epoch(store):
    loader = make_loader(
        store, null_prompt_share=0.25, rows_per_batch=1, mixture=MixtureConfig({"draw": 1.0, "describe": 0.0, "text": 0.0})
    )
    dropped, kinds = 0, set()
    for epoch in range(30):
        names = [loader._draw_epoch(epoch)[part] for part in (0, 1)]
        chosen = np.concatenate(names[0])[np.concatenate(names[1])]
        dropped += len(chosen)
        kinds.add(tuple(sorted(chosen.tolist())))
    expected = 0.25 * 30 * loader._generates.sum()
    assert abs(dropped - expected) < 4 * (expected * 0.75) ** 0.5 and len(kinds) == 30


def test_described_codes_are_no_targets_when_asked(store):
    both = [list(islice(iter(make_loader(store, learn_described_codes=learn)), 10)) for learn in (True, False)]
    changed = 0
    for kept, dropped in zip(*([batch for batches in found for batch in batches] for found in both), strict=True):
        assert kept.token_ids.equal(dropped.token_ids) and kept.documents.equal(dropped.documents)
        assert kept.num_tokens == dropped.num_tokens
        for row in range(len(kept.token_ids)):
            for before, after in zip(split_row(kept, row), split_row(dropped, row), strict=True):
                describes = Role.TEXT_TARGET in before[2] and Role.VISION in before[2]
                expected = tuple(Role.PADDING if describes and role == Role.VISION else role for role in before[2])
                assert after[2] == expected
                changed += describes
    assert changed


# ---- what no row holds, and the report


def test_documents_that_no_row_holds_are_reported(store):
    loader = make_loader(store, context_length=30)
    left_out = (store.num_vision > 0) & (store.lengths > 30)
    assert 0 < left_out.sum() < len(store)
    (reason,) = loader.report.refused
    assert reason == "of more than 30 tokens that hold vision, which is not cut"
    count, examples = loader.report.refused[reason]
    names = dict.fromkeys(store.read_sample_id(index) for index in np.flatnonzero(left_out).tolist())
    assert count == left_out.sum() > 5 and examples == tuple(names)[:5]
    assert f"left out: {count} of more than 30 tokens" in loader.report.describe()
    assert set(np.concatenate(loader._draw_epoch(0)[0]).tolist()) == set(np.flatnonzero(~left_out).tolist())
    with pytest.raises(InputError, match="context_length is 8; every document of the mixture holds vision"):
        make_loader(store, context_length=8, mixture=MixtureConfig({"words": 0.0}))


def test_the_report_is_what_comes(store):
    loader = make_loader(store, window_documents=10_000, rows_per_batch=1)
    report = loader.report
    batches = [batch for batches in islice(iter(loader), report.num_rows) for batch in batches]
    assert sum(batch.num_tokens for batch in batches) == report.num_tokens == store.lengths.sum()
    assert report.num_documents == len(store) and report.fill_rate > 0.98
    assert report.num_long == ((store.num_vision == 0) & (store.lengths > 96)).sum()
    assert not report.refused and sum(report.shares.values()) == pytest.approx(1.0)
    assert report.shares["words/text"] == pytest.approx(store.lengths[store.num_vision == 0].sum() / store.lengths.sum())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"null_prompt_share": 1.5}, "null_prompt_share is 1.5"),
        ({"context_length": 1}, "context_length is 1; it must be at least 2"),
        ({"rows_per_batch": 0}, "rows_per_batch is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"rows_per_batch": 6, "rows_per_micro_batch": 4}, "rows_per_batch is 6; it must be a multiple of rows_per_micro_batch, 4"),
        (
            {"rows_per_batch": 6, "dp": 2, "rows_per_micro_batch": 2},
            "rows_per_batch is 6; it must be a multiple of dp x rows_per_micro_batch, 2 x 2",
        ),
        ({"dp": 2, "rank": 2}, "rank is 2; with dp 2 it must be 0 to 1"),
        ({"mixture": MixtureConfig({"paint": 1.0})}, "mixture names 'paint'"),
    ],
)
def test_impossible_settings(store, config, message):
    with pytest.raises(InputError, match=message):
        make_loader(store, **config)


# ---- what a model is measured on


def test_held_out_documents_come_once_as_they_are(store):
    batches = list(read_held_out(store, 96, PAD, max_documents=10_000, rows_per_micro_batch=3))
    pieces = list_pieces(batches)
    assert sum(len(ids) for _, ids, _ in pieces) == store.lengths.sum()
    whole = Counter(ids for _, ids, roles in pieces if Role.VISION in roles)
    assert whole == Counter(tuple(store.read(index)[0].tolist()) for index in range(len(store)) if store.num_vision[index])
    few = Counter(ids for _, ids, _ in list_pieces(read_held_out(store, 10_000, PAD, max_documents=5)))
    everything = Counter(tuple(store.read(index)[0].tolist()) for index in range(len(store)))
    assert few.total() == 5 and few <= everything  # five of them, none twice


@pytest.mark.parametrize("dp", [2, 3, 5])
def test_ranks_share_the_held_out_documents_in_equal_steps(store, dp):
    whole = list_rows(read_held_out(store, 96, PAD, 40))
    ranks = [list(read_held_out(store, 96, PAD, 40, 2, dp, rank)) for rank in range(dp)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for step in zip(*ranks, strict=True) for row in list_rows(step)]
    assert [row for row in rows if row[0]] == whole
    assert sum(batch.num_tokens for batches in ranks for batch in batches) == sum(
        batch.num_tokens for batch in read_held_out(store, 96, PAD, 40)
    )


# ---- ahead of time


def test_what_is_made_ahead_is_bounded_and_in_order():
    made = []
    ahead = run_ahead((made.append(number) or number for number in range(100)), 3)
    assert next(ahead) == 0
    assert list(islice(ahead, 20)) == list(range(1, 21))
    ahead.close()
    assert len(made) <= 21 + 3 + 1
    assert not any(thread.name == "token-loader" for thread in threading.enumerate())
    assert list(run_ahead(iter(range(10)), 2)) == list(range(10))


def test_an_error_ahead_of_time_is_raised_where_it_belongs():
    def fail():
        yield 1
        raise InputError("a damaged page")

    ahead = run_ahead(fail(), 2)
    assert next(ahead) == 1
    with pytest.raises(InputError, match="a damaged page"):
        next(ahead)


def test_long_texts_go_through_many_rows(small_format, tmp_path):
    text = "the smiling cat and the red apple " * 100
    encoded = small_format.encode(Document((Text(text, target=True),)))
    write_documents(tmp_path / "long.parquet", [EncodedDocument("text", "book", "train", encoded, "books")], "abc")
    loader = make_loader(DocumentStore([tmp_path / "long.parquet"], {"train"}), context_length=64, rows_per_batch=1)
    rows = -(-len(encoded.token_ids) // 64)
    assert loader.report.num_long == 1 and loader.report.num_pieces == loader.report.num_rows == rows
    pieces = list_pieces(batch for batches in islice(iter(loader), rows) for batch in batches)
    assert Counter(token for _, ids, _ in pieces for token in ids) == Counter(encoded.token_ids.tolist())
