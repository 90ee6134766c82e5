"""Samples on disk: what is written comes back, as a stream, and a file is there whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openemu3.data.samples import ROWS_PER_GROUP, SAMPLES_SCHEMA, read_columns, read_samples, write_samples
from openemu3.records import InputError, Sample

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)


def make_sample(number: int, split: str = "train", kind: str = "image", size: int = 10) -> Sample:
    media = number.to_bytes(4) * size
    return Sample(f"sample/{number}", kind, media, {"en": f"caption {number}", "zh": f"说明 {number}"}, {"style": "3D"}, split)


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    ids = draw(st.lists(names, unique=True, max_size=8))
    maps = st.dictionaries(names, texts, max_size=3)
    return [
        Sample(id, draw(st.sampled_from(["image", "video"])), draw(st.binary(min_size=1)), draw(maps), draw(maps), draw(names))
        for id in ids
    ]


@given(samples())
def test_samples_come_back_equal_and_in_order(tmp_path_factory: pytest.TempPathFactory, written: list[Sample]) -> None:
    path = tmp_path_factory.mktemp("samples") / "samples.parquet"
    assert write_samples(path, written) == len(written)
    assert list(read_samples(path)) == written


def test_reading_by_split_and_kind(tmp_path: Path) -> None:
    splits = ["train", "heldout_picture", "heldout_video"]
    written = [make_sample(i, splits[i % 3], "video" if i % 2 else "image") for i in range(3 * ROWS_PER_GROUP + 5)]
    write_samples(tmp_path / "s.parquet", written)
    chosen = list(read_samples(tmp_path / "s.parquet", splits=["train", "heldout_video"], kind="video"))
    assert chosen == [sample for sample in written if sample.split != "heldout_picture" and sample.kind == "video"]
    assert list(read_samples(tmp_path / "s.parquet", splits=["no such split"])) == []
    assert list(read_samples(tmp_path / "s.parquet", splits=[])) == []


def test_columns_are_read_without_the_media(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    write_samples(path, [make_sample(1), make_sample(2, "heldout_picture")])
    rows = list(read_columns(path, ["captions", "id"], splits=["heldout_picture"]))
    assert rows == [{"captions": {"en": "caption 2", "zh": "说明 2"}, "id": "sample/2"}]
    with pytest.raises(InputError, match="column 'pixels' is not a field of a sample"):
        list(read_columns(path, ["pixels"]))


def test_reading_holds_one_row_group(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    size = 100_000
    write_samples(path, (make_sample(i, size=size // 4) for i in range(4 * ROWS_PER_GROUP)))
    held_before = pa.total_allocated_bytes()
    most = count = 0
    for sample in read_samples(path):
        count += 1
        assert len(sample.media) == size
        most = max(most, pa.total_allocated_bytes() - held_before)
    assert count == 4 * ROWS_PER_GROUP
    assert most < 2.5 * ROWS_PER_GROUP * size  # the file is 4 groups; one, and its filtered copy


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    forwards = Sample("a", "image", b"x", {"en": "one", "zh": "一"}, {"b": "2", "a": "1"}, "train")
    backwards = Sample("a", "image", b"x", {"zh": "一", "en": "one"}, {"a": "1", "b": "2"}, "train")
    write_samples(tmp_path / "one.parquet", [forwards])
    write_samples(tmp_path / "two.parquet", [backwards])
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    write_samples(path, [make_sample(1)])

    def breaking() -> Iterator[Sample]:
        yield from (make_sample(i) for i in range(2 * ROWS_PER_GROUP))
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_samples(path, breaking())
    with pytest.raises(InputError, match="sample id 'sample/7' comes twice"):
        write_samples(path, [make_sample(7), make_sample(7)])
    assert list(read_samples(path)) == [make_sample(1)]
    assert os.listdir(tmp_path) == ["s.parquet"]


def test_files_that_hold_no_samples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        list(read_samples(tmp_path / "none.parquet"))
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(read_samples(tmp_path / "empty.parquet"))
    write_samples(tmp_path / "cut.parquet", [make_sample(1)])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(read_samples(tmp_path / "cut.parquet"))
    write_samples(tmp_path / "damaged.parquet", [make_sample(1, size=10_000)])
    contents = bytearray((tmp_path / "damaged.parquet").read_bytes())
    contents[8:80] = bytes(72)
    (tmp_path / "damaged.parquet").write_bytes(contents)
    with pytest.raises(InputError, match="is damaged in row group 0"):
        list(read_samples(tmp_path / "damaged.parquet"))
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(InputError, match=r"has the columns \(id: string\)"):
        list(read_samples(tmp_path / "foreign.parquet"))


def test_the_schema_is_the_records_fields() -> None:
    assert SAMPLES_SCHEMA.names == list(Sample.__dataclass_fields__)
