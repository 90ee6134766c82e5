"""Documents on disk, read through memory maps; what is damaged or foreign is named."""

import os
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openemu3.data.shards import CACHE_FOLDER, DOCUMENTS_SCHEMA, DocumentStore, encode_runs, list_shards, spread_evenly, write_documents
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role


def test_documents_come_back(documents, shard):
    for splits in ({"train"}, {"heldout"}, {"train", "heldout"}):
        store = DocumentStore([shard], splits, "abc")
        wanted = [document for document in documents if document.split in splits]
        assert len(store) == len(wanted)
        for index, document in enumerate(wanted):
            ids, roles = store.read(index)
            assert ids.tolist() == document.encoded.token_ids.tolist() and roles.tolist() == document.encoded.roles.tolist()
            assert store.read_sample_id(index) == document.sample_id
            assert store.sources[store.source_of[index]] == document.source
            assert store.datasets[store.dataset_of[index]] == document.dataset
            assert store.lengths[index] == len(ids)
            assert store.num_context[index] == (roles == Role.TEXT_CONTEXT).sum()
            assert store.num_vision[index] == (roles == Role.VISION).sum()


def test_another_reader_reads_them(documents, shard, tmp_path):
    """Hugging Face datasets, of which we wrote no line."""
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset("parquet", data_files=str(shard), split="train", cache_dir=str(tmp_path))
    assert table.num_rows == len(documents)
    for row, document in zip(table, documents, strict=True):
        assert row["token_ids"] == document.encoded.token_ids.tolist() and row["source"] == document.source
        assert np.repeat(row["role_values"], row["role_lengths"]).tolist() == document.encoded.roles.tolist()
        assert row["num_tokens"] == len(row["token_ids"]) and row["grids"] == [list(grid) for grid in document.grids]


def test_several_files_are_one_store(documents, shard, tmp_path):
    write_documents(tmp_path / "more.parquet", documents[:3], "abc")
    store = DocumentStore([shard, tmp_path / "more.parquet"], {"train"}, "abc")
    assert len(store) == len(DocumentStore([shard], {"train"})) + 3
    assert store.read(len(store) - 3)[0].tolist() == documents[0].encoded.token_ids.tolist()
    assert store.digest != DocumentStore([shard], {"train"}).digest == DocumentStore([shard], {"train"}).digest


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_runs_of_roles_come_back(roles):
    values, lengths = encode_runs(np.array(roles, np.uint8))
    assert np.repeat(values, lengths).tolist() == roles
    assert all(a != b for a, b in zip(values, values[1:], strict=False))


def test_groups_are_bounded_by_rows_and_by_tokens(documents, tmp_path):
    for name, limits, most in (("rows", {"rows_per_group": 7}, 7), ("tokens", {"tokens_per_group": 1}, 1)):
        path = tmp_path / "new" / f"{name}.parquet"
        assert write_documents(path, iter(documents * 2), "abc", **limits) == 2 * len(documents)
        file = pq.ParquetFile(path)
        assert max(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)) == most
        assert len(DocumentStore([path], {"train", "heldout"})) == 2 * len(documents)


def test_the_same_documents_give_the_same_bytes(documents, tmp_path):
    for name in ("a", "b"):
        write_documents(tmp_path / name, documents, "abc")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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


# ---- the Arrow copies


def test_a_shard_is_copied_once_and_again_when_it_changes(documents, tmp_path):
    path = tmp_path / "documents.parquet"
    write_documents(path, documents[:4], "abc")
    DocumentStore([path], {"train"})
    (copy,) = (tmp_path / CACHE_FOLDER).glob("*.arrow")
    written = copy.stat().st_mtime_ns
    DocumentStore([path], {"train"})
    assert copy.stat().st_mtime_ns == written
    write_documents(path, documents[4:7], "abc")
    assert DocumentStore([path], {"train"}).read(0)[0].tolist() == documents[4].encoded.token_ids.tolist()
    assert len(list((tmp_path / CACHE_FOLDER).glob("*.arrow"))) == 1 and not copy.exists()


def test_copies_go_elsewhere_when_asked(shard, tmp_path):
    other = shutil.copy(shard, tmp_path / "documents.parquet")
    store = DocumentStore([other], {"train"}, cache=tmp_path / "cache")
    assert not (tmp_path / CACHE_FOLDER).exists() and len(list((tmp_path / "cache").glob("*.arrow"))) == 1 and len(store)


def test_ranks_that_begin_together_copy_once(shard, tmp_path):
    other, found = shutil.copy(shard, tmp_path / "documents.parquet"), []
    threads = [threading.Thread(target=lambda: found.append(len(DocumentStore([other], {"train"})))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert [path.suffix for path in sorted((tmp_path / CACHE_FOLDER).iterdir())] == [".arrow", ".lock"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_told(shard, tmp_path):
    other = shutil.copy(shard, tmp_path / "documents.parquet")
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="the Arrow copy of .* cannot be written"):
        DocumentStore([other], {"train"})
    tmp_path.chmod(0o700)


# ---- what is refused


def test_documents_of_other_tokenizers_are_refused(shard):
    with pytest.raises(InputError, match="documents.parquet was tokenised by 'abc', but the model's tokenizers are 'xyz'; tokenise again"):
        DocumentStore([shard], {"train"}, "xyz")


def test_foreign_and_truncated_files_are_named(shard, tmp_path):
    for name, contents in {"missing.parquet": None, "words.parquet": b"words", "cut.parquet": shard.read_bytes()[:-20]}.items():
        if contents is not None:
            (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=f"{name} cannot be read as token documents"):
            DocumentStore([tmp_path / name], {"train"})
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    pq.write_table(DOCUMENTS_SCHEMA.empty_table(), tmp_path / "anonymous.parquet")  # of no known tokenizer
    for name in ("other.parquet", "anonymous.parquet"):
        with pytest.raises(InputError, match=f"{name} does not hold token documents of this version"):
            DocumentStore([tmp_path / name], {"train"})


def test_any_damage_to_the_data_is_found(shard, tmp_path):
    """A bit turned anywhere in a page, also where the decompressor would not mind."""
    whole = shard.read_bytes()
    metadata = pq.read_metadata(shard)
    random = np.random.default_rng(0)
    for number in range(20):
        column = metadata.row_group(number % metadata.num_row_groups).column(metadata.num_columns - 1 - number % 3)
        end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
        place = int(random.integers(end - 20, end))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path = tmp_path / f"damaged-{number}.parquet"
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"damaged-{number}.parquet is damaged in row group"):
            DocumentStore([path], {"train"})
        assert not list((tmp_path / CACHE_FOLDER).glob(f"damaged-{number}*.arrow"))


def test_a_split_without_documents_is_told(shard):
    with pytest.raises(InputError, match=r"no documents of split 'nowhere' in .*parquet; their splits are 'heldout', 'train'$"):
        DocumentStore([shard], {"nowhere"})


def test_a_folder_is_taken_when_it_is_complete(shard, tmp_path):
    with pytest.raises(InputError, match="does not hold token documents; `emu3 tokenize` writes them"):
        list_shards([tmp_path])
    shutil.copy(shard, tmp_path / "documents-00000.parquet")
    with pytest.raises(InputError, match="is not complete: its manifest.json is missing; the same `emu3 tokenize` goes on with it"):
        list_shards([tmp_path])
    size = shard.stat().st_size
    (tmp_path / "manifest.json").write_text(f'{{"shards": {{"documents-00000.parquet": {size}, "documents-00001.parquet": {size}}}}}')
    with pytest.raises(InputError, match="documents-00001.parquet is missing; delete it, and the same"):
        list_shards([tmp_path])
    (tmp_path / "documents-00001.parquet").write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"documents-00001.parquet is damaged: it has {size - 1} bytes and was written with {size}"):
        list_shards([tmp_path])
    (tmp_path / "documents-00001.parquet").write_bytes(shard.read_bytes())
    assert [path.name for path in list_shards([tmp_path])] == ["documents-00000.parquet", "documents-00001.parquet"]
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        list_shards([tmp_path])


@pytest.mark.parametrize(("count", "most"), [(10, 20), (3938, 64), (1000, 999), (7, 1)])
def test_spread_evenly_meets_every_part_and_both_parities(count, most):
    chosen = list(spread_evenly(count, most))
    assert chosen == sorted(set(chosen)) and 0 <= chosen[0] and chosen[-1] < count
    assert min(count, most) * 0.7 <= len(chosen) <= most or chosen == list(range(count))
    gaps = [after - before for before, after in zip([0, *chosen], [*chosen, count], strict=True)]
    assert max(gaps) <= 3 * count / min(count, most) + 1
    if most >= 16:
        odd = sum(number % 2 for number in chosen)
        assert 0.3 < odd / len(chosen) < 0.7
