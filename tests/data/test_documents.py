"""Documents on disk and their batches: an endless sequence of which any part can be asked for by number."""

from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openemu3.data.documents import (
    DOCUMENTS_SCHEMA,
    DocumentBatches,
    DocumentBatchesConfig,
    DocumentTable,
    encode_runs,
    pad_documents,
    write_documents,
)
from openemu3.records import Document, Image, InputError, Text, Video
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.sequence import Role

PAD = 300  # of `small_format`


def make_documents(form, number=10):
    """Of each of `number` samples: a drawing, its description and, of every third, a film; the last two are held out."""
    random = np.random.default_rng(0)
    documents = []
    for index in range(number):
        split = "train" if index < number - 2 else "heldout"
        picture = Image(random.integers(0, 64, (2, 2 + index % 3)))
        caption = "a red apple on a table"[: 5 + index]
        parts = {"draw": (Text(caption), picture), "describe": (picture, Text(caption, target=True))}
        if index % 3 == 0:
            parts["film"] = (Text(caption), Video(random.integers(0, 64, (2, 2, 2)), 8))
        for source, pieces in parts.items():
            documents.append(EncodedDocument(source, f"sample-{index}", split, form.encode(Document(pieces))))
    return documents


@pytest.fixture(scope="module")
def documents(small_format):
    return make_documents(small_format)


@pytest.fixture(scope="module")
def path(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "documents.parquet"
    write_documents(path, documents, "abc")
    return path


@pytest.fixture(scope="module")
def table(path):
    return DocumentTable([path], {"train"}, "abc")


def make_batches(table, **config):
    return DocumentBatches(table, DocumentBatchesConfig(**{"tokens_per_batch": 64, "null_prompt_share": 0.0, **config}), PAD)


def list_rows(batch):
    """(ids, roles) of each document of a batch, without padding."""
    rows = []
    for ids, roles in zip(batch.token_ids.numpy(), batch.roles.numpy(), strict=True):
        length = int((roles != Role.PADDING).sum())
        assert (ids[length:] == PAD).all() and (roles[length:] == Role.PADDING).all()  # all padding is on the right
        rows.append((tuple(ids[:length].tolist()), tuple(roles[:length].tolist())))
    return rows


def name_rows(table, batches):
    """Which document of the table each row is."""
    names = {tuple(table.read(index)[0].tolist()): index for index in range(len(table))}
    assert len(names) == len(table)
    return [names[ids] for batch in batches for ids, _ in list_rows(batch)]


# ---- on disk


def test_documents_come_back(documents, path):
    for splits in ({"train"}, {"heldout"}, {"train", "heldout"}):
        table = DocumentTable([path], splits, "abc")
        wanted = [document for document in documents if document.split in splits]
        assert len(table) == len(wanted)
        assert (table.sources, table.sample_ids) == ([d.source for d in wanted], [d.sample_id for d in wanted])
        for index, document in enumerate(wanted):
            ids, roles = table.read(index)
            assert ids.tolist() == document.encoded.token_ids.tolist() and roles.tolist() == document.encoded.roles.tolist()
            assert table.lengths[index] == len(ids)


def test_several_files_are_one_table(documents, path, tmp_path):
    write_documents(tmp_path / "more.parquet", documents[:3], "abc")
    table = DocumentTable([path, tmp_path / "more.parquet"], {"train"}, "abc")
    assert table.sources[-3:] == [d.source for d in documents[:3]] and len(table) == len(DocumentTable([path], {"train"})) + 3


def test_memory_is_five_bytes_a_token(table):
    assert table.token_ids.nbytes + table.roles.nbytes == 5 * table.lengths.sum()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_runs_of_roles_come_back(roles):
    values, lengths = encode_runs(np.array(roles, np.uint8))
    assert np.repeat(values, lengths).tolist() == roles
    assert all(a != b for a, b in zip(values, values[1:], strict=False))


def test_many_documents_go_through_in_groups(documents, tmp_path):
    path = tmp_path / "new" / "many.parquet"
    assert write_documents(path, (document for document in documents * 3), "abc", rows_per_group=7) == 3 * len(documents)
    file = pq.ParquetFile(path)
    assert max(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)) == 7
    assert len(DocumentTable([path], {"train", "heldout"})) == 3 * len(documents)


def test_a_file_is_there_whole_or_not_at_all(documents, tmp_path):
    def fail():
        yield documents[0]
        raise RuntimeError("the tokenizer broke")

    path = tmp_path / "documents.parquet"
    write_documents(path, documents[:2], "abc")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="broke"):
        write_documents(path, fail(), "abc")
    assert path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == ["documents.parquet"]


def test_documents_of_other_tokenizers_are_refused(path):
    with pytest.raises(InputError, match="tokenised by 'abc', but the model's tokenizers are 'xyz'"):
        DocumentTable([path], {"train"}, "xyz")


def test_foreign_and_damaged_files_are_told(path, tmp_path):
    cases = {"missing.parquet": None, "words.parquet": b"words", "cut.parquet": path.read_bytes()[:-20]}
    whole = bytearray(path.read_bytes())
    whole[20:400] = bytes(380)
    cases["spoilt.parquet"] = bytes(whole)
    for name, contents in cases.items():
        if contents is not None:
            (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=name):
            DocumentTable([tmp_path / name], {"train"})
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="other.parquet does not hold token documents of this version; `emu3 tokenize` writes them"):
        DocumentTable([tmp_path / "other.parquet"], {"train"})
    pq.write_table(DOCUMENTS_SCHEMA.empty_table(), tmp_path / "anonymous.parquet")  # of no known tokenizer
    with pytest.raises(InputError, match="anonymous.parquet does not hold token documents"):
        DocumentTable([tmp_path / "anonymous.parquet"], {"train"})


def test_a_split_without_documents_is_told(path):
    with pytest.raises(InputError, match=r"no documents of split \['nowhere'\]"):
        DocumentTable([path], {"nowhere"})


# ---- batches


def test_every_document_comes_once_an_epoch_in_another_order_each_time(table):
    batches = make_batches(table)
    epochs, position = [], 0
    for epoch in range(4):
        per_epoch = len(batches._plan_epoch(epoch))
        epochs.append(name_rows(table, islice(batches(position), per_epoch)))
        position += per_epoch
    assert all(sorted(epoch) == list(range(len(table))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_from_a_position_on_equals_skipping_to_it(table, share):
    whole = list(islice(make_batches(table, null_prompt_share=share)(0), 40))
    for position in (1, 7, 20, 39):
        for expected, found in zip(whole[position:], make_batches(table, null_prompt_share=share)(position), strict=False):
            assert expected.token_ids.equal(found.token_ids) and expected.roles.equal(found.roles)
    other = list(islice(make_batches(table, null_prompt_share=share, seed=1)(0), 40))
    assert any(a.token_ids.shape != b.token_ids.shape or not a.token_ids.equal(b.token_ids) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("budget", [1, 40, 64, 200, 100_000])
def test_batches_keep_to_their_tokens(table, budget):
    longest = int(table.lengths.max())
    batches = make_batches(table, tokens_per_batch=budget)
    for batch in islice(batches(0), 30):
        num_documents, length = batch.token_ids.shape
        assert num_documents * length <= budget or num_documents == 1  # a document longer than the budget comes alone
        assert length <= longest
    if budget == 100_000:
        assert len(batches._plan_epoch(0)) == 1
    if budget == 1:
        assert len(batches._plan_epoch(0)) == len(table)


def test_documents_of_a_batch_are_of_similar_length(table):
    """Little padding: no other document of the epoch would fit between two of a batch."""
    batches = make_batches(table)
    spans = sorted((min(table.lengths[plan]), max(table.lengths[plan])) for plan in batches._plan_epoch(0))
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_the_mixture_says_how_often_a_source_comes(table):
    mixture = {"draw": 2.0, "describe": 0.3, "film": 0.0}
    batches = make_batches(table, mixture=mixture, tokens_per_batch=10_000)
    num_epochs = 60
    counts = Counter(table.sources[index] for index in name_rows(table, islice(batches(0), num_epochs)))
    sources = Counter(table.sources)
    assert counts["draw"] == 2 * num_epochs * sources["draw"] and counts["film"] == 0
    expected = 0.3 * num_epochs * sources["describe"]
    assert abs(counts["describe"] - expected) < 4 * (expected * 0.7) ** 0.5  # four standard deviations of a fair lottery


def test_null_prompts_drop_the_context_text_and_nothing_else(table, small_format):
    batches = make_batches(table, null_prompt_share=1.0)
    plain = {index: table.read(index) for index in range(len(table))}
    without = {index: tuple(ids[roles != Role.TEXT_CONTEXT].tolist()) for index, (ids, roles) in plain.items()}
    seen = Counter()
    for batch, plan in zip(batches(0), batches._plan_epoch(0), strict=False):
        for (ids, roles), index in zip(list_rows(batch), plan.tolist(), strict=True):
            source = table.sources[index]
            seen[source] += 1
            if source == "describe":  # a null prompt is for what is drawn
                assert ids == tuple(plain[index][0].tolist())
                continue
            assert ids == without[index] and Role.TEXT_CONTEXT not in roles
            document = small_format.decode(np.array(ids))
            (medium,) = document.parts
            original = small_format.decode(plain[index][0]).parts[1]
            assert medium == original
            # It begins as the unconditional branch of guidance does.
            empty = (
                small_format.image_prompt("", medium.grid)
                if isinstance(medium, Image)
                else small_format.video_prompt("", medium.grid, medium.fps)
            )
            assert list(ids[: len(empty)]) == empty
    assert set(seen) == {"draw", "describe", "film"}


def test_null_prompts_are_drawn_anew_in_every_epoch(table):
    batches = make_batches(table, null_prompt_share=0.25, tokens_per_batch=10_000)
    num_draws = sum(source != "describe" for source in table.sources)
    dropped, kinds = 0, set()
    for batch in islice(batches(0), 60):
        missing = [Role.TEXT_CONTEXT not in roles and Role.TEXT_TARGET not in roles for _, roles in list_rows(batch)]
        dropped += sum(missing)
        kinds.add(tuple(sorted(len(ids) for (ids, _), gone in zip(list_rows(batch), missing, strict=True) if gone)))
    expected = 0.25 * 60 * num_draws
    assert abs(dropped - expected) < 4 * (expected * 0.75) ** 0.5 and len(kinds) > 5


def test_padding():
    batch = pad_documents(
        [(np.array([5, 6, 7], np.uint32), np.array([4, 3, 4], np.uint8)), (np.array([8], np.uint32), np.array([1], np.uint8))], 9
    )
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 9, 9]] and batch.token_ids.dtype == torch.int64
    assert batch.roles.tolist() == [[4, 3, 4], [1, 0, 0]] and batch.roles.dtype == torch.uint8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"null_prompt_share": 1.5}, "null_prompt_share is 1.5"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"mixture": {"draw": -1.0}}, "mixture has -1.0 for 'draw'"),
        ({"mixture": {"draw": float("inf")}}, "mixture has inf for 'draw'"),
        ({"mixture": {"paint": 1.0}}, r"mixture names \['paint'\]; the documents have \['describe', 'draw', 'film'\]"),
        ({"mixture": {"draw": 0.0, "describe": 0.0, "film": 0.0}}, "leaves out every document"),
    ],
)
def test_impossible_settings(table, config, message):
    with pytest.raises(InputError, match=message):
        make_batches(table, **config)


def test_an_epoch_may_be_empty_by_chance(documents, tmp_path):
    """One document at a rate of 0.2 is in one epoch of five: the others are passed over."""
    write_documents(tmp_path / "one.parquet", documents[:1], "abc")
    table = DocumentTable([tmp_path / "one.parquet"], {"train"})
    batches = make_batches(table, mixture={"draw": 0.2})
    plans = [len(batches._plan_epoch(epoch)) for epoch in range(40)]
    assert 2 < sum(plans) < 20
    found = list(islice(batches(0), 3))
    assert name_rows(table, found) == [0, 0, 0]
    assert name_rows(table, islice(batches(2), 1)) == [0]


def test_described_codes_are_no_targets_when_asked(table):
    both = [list(islice(make_batches(table, learn_described_codes=learn)(0), 20)) for learn in (True, False)]
    changed = 0
    for kept, dropped in zip(*both, strict=True):
        assert kept.token_ids.equal(dropped.token_ids)
        differs = kept.roles != dropped.roles
        assert (kept.roles[differs] == Role.VISION).all() and (dropped.roles[differs] == Role.PADDING).all()
        for before, after in zip(kept.roles, dropped.roles, strict=True):
            describes = bool((before == Role.TEXT_TARGET).any())
            assert bool((after == Role.VISION).any()) is not describes
            changed += describes
    assert changed
