"""Every kind of input as a numbered stream of items: written by other programs where there are any, read from any number on."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from openemu3.data import inputs as inputs_module
from openemu3.data.inputs import InputConfig, TextFile, open_inputs
from openemu3.data.samples import write_samples
from openemu3.records import InputError, Sample
from openemu3.tokenization.encode import Item, Refusal

TEXTS = ["the first text", "第二个文本，没有空格", "third\nwith a line break", "x" * 5000, "last 😀"]


def make_picture(number, format="PNG", frames=1):
    pictures = [Pillow.new("RGB", (16, 16), (number % 256, 40 * index % 256, 9)) for index in range(frames)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format, **({"save_all": True, "append_images": pictures[1:], "duration": 100} if frames > 1 else {}))
    return buffer.getvalue()


def read_all(path, every=2, **config):
    """The items of all inputs of a path; every way of reading parts of it gives the same."""
    found = []
    for one in open_inputs([path], InputConfig(**config)):
        count, offsets = one.count(every)
        whole = list(one.read(0, count, offsets[0] if offsets else None))
        assert len(whole) == count
        parts = []
        for part, start in reversed(list(enumerate(range(0, count, every)))):
            offset = offsets[part] if offsets else None
            parts = list(one.read(start, min(start + every, count), offset)) + parts
        assert parts == whole
        found += whole
    return found


def only_items(found):
    assert all(isinstance(item, Item) for item in found), found
    return found


# ---- texts


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lines_of_json(tmp_path):
    path = write_lines(tmp_path / "corpus.v2.jsonl", [{"text": text} for text in TEXTS])
    items = only_items(read_all(path))
    assert [item.captions for item in items] == [{"und": text} for text in TEXTS]
    assert [item.id for item in items] == [f"corpus.v2:{number}" for number in range(5)]
    assert {(item.kind, item.media, item.split, item.dataset) for item in items} == {("text", None, "train", "corpus.v2")}


def test_lines_of_json_in_other_words(tmp_path):
    rows = [{"id": f"a{number}", "body": text, "text": "no"} for number, text in enumerate(TEXTS)]
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(write_lines(tmp_path / "c.jsonl", rows).read_bytes()))
    items = only_items(read_all(path, text_column="body", dataset="books"))
    assert [(item.id, item.captions["und"], item.dataset) for item in items] == [
        (f"a{number}", text, "books") for number, text in enumerate(TEXTS)
    ]


def test_bad_lines_are_refused_one_by_one(tmp_path):
    path = tmp_path / "c.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n\n  \n[1]\n{"text": ""}\n{"text": 3}\n{"body": "a"}\n\xff\xfe\n' + deep + b'\n{"text": "also good"}'
    )
    found = read_all(path)
    assert [item.captions["und"] for item in found if isinstance(item, Item)] == ["good", "also good"]
    reasons = {refusal.sample_id: refusal.reason for refusal in found if isinstance(refusal, Refusal)}
    assert list(reasons) == [f"c:{number}" for number in range(1, 8)]  # empty lines are no items
    for number, words in {1: "Expecting value", 2: "it is a list", 3: "its text is empty", 4: "its text is int", 5: "columns body"}.items():
        assert words in reasons[f"c:{number}"]
    assert "decode" in reasons["c:6"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["one\ntwo\n\n\n三\n \nfour"]),
        ("paragraph", ["one\ntwo", "三", "four"]),
        ("line", ["one", "two", "三", "four"]),
    ],
)
@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_plain_text(tmp_path, unit, expected, name):
    contents = "\n \none\ntwo\n\n\n三\n \nfour".encode()
    (tmp_path / name).write_bytes(gzip.compress(contents) if name.endswith("gz") else contents)
    texts = [item.captions["und"].strip() for item in only_items(read_all(tmp_path / name, every=1, text_unit=unit))]
    assert texts == expected


@given(st.lists(st.sampled_from([b"a", b"b c", b"", b" ", b"\xe4\xb8\x89", b"ddd"]), max_size=20), st.booleans(), st.integers(1, 4))
def test_units_of_plain_text_are_what_splitting_gives(tmp_path_factory, lines, ends, every):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    contents = b"\n".join(lines) + b"\n" * ends
    path.write_bytes(contents)
    text = contents.decode()
    paragraphs, current = [], []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            current.append(line)
        elif current:
            paragraphs, current = [*paragraphs, "\n".join(current).strip()], []
    for unit, expected in (("line", [line.strip() for line in text.split("\n") if line.strip()]), ("paragraph", paragraphs)):
        (one,) = open_inputs([path], InputConfig(text_unit=unit))
        count, offsets = one.count(every)
        found = [
            item.captions["und"]
            for part, start in enumerate(range(0, count, every))
            for item in one.read(start, min(start + every, count), offsets[part])
        ]
        assert found == expected


def test_texts_that_are_too_long_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs_module, "MAX_TEXT_BYTES", 100)
    path = write_lines(tmp_path / "c.jsonl", [{"text": "a"}, {"text": "b" * 1000}, {"text": "c"}])
    found = read_all(path, every=1)
    assert [type(item) for item in found] == [Item, Refusal, Item] and found[1].reason == "it has more than 100 bytes"
    (tmp_path / "book.txt").write_text("a word " * 100)
    (refusal,) = read_all(tmp_path / "book.txt")
    assert "more than 100 bytes as one document; a text unit of paragraph or line makes several" in refusal.reason


def test_tables_of_texts(tmp_path):
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": range(6)}), tmp_path / "t.parquet", row_group_size=2)
    found = read_all(tmp_path / "t.parquet", every=4)
    assert [item.captions["und"] for item in only_items(found[:5])] == TEXTS
    assert found[5] == Refusal("t:5", "its text is empty")
    with pytest.raises(InputError, match=r"t.parquet has the columns text, n; body is not among them, nor those of samples"):
        open_inputs([tmp_path / "t.parquet"], InputConfig(text_column="body"))


def test_validation_is_drawn_by_the_item_alone(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"text": "a", "id": str(number)} for number in range(2000)])
    held_out = {item.id for item in read_all(path, every=700, validation_share=0.1) if item.split == "validation"}
    assert abs(len(held_out) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    shorter = write_lines(tmp_path / "c.jsonl", [{"text": "b", "id": str(number)} for number in range(1999, 1000, -1)])
    again = {item.id for item in read_all(shorter, every=700, validation_share=0.1) if item.split == "validation"}
    assert again == {name for name in held_out if int(name) > 1000}


# ---- samples


def test_samples(tmp_path):
    samples = [Sample(f"s{n}", "image", make_picture(n), {"en": f"{n}"}, {"fps": "8"}, "train" if n % 2 else "test") for n in range(150)]
    write_samples(tmp_path / "s.parquet", samples)
    items = only_items(read_all(tmp_path / "s.parquet", every=70))
    assert items == [Item(s.id, "image", s.media, s.captions, s.split, 8.0, "s") for s in samples]


def test_rows_that_are_no_samples_are_refused(tmp_path):
    write_samples(tmp_path / "s.parquet", [Sample(f"s{n}", "image", b"media", {"en": "a"}, {}, "train") for n in range(3)])
    table = pq.read_table(tmp_path / "s.parquet")
    table = table.set_column(2, table.schema.field("media"), pa.array([b"media", b"", b"media"]))
    pq.write_table(table, tmp_path / "s.parquet")
    found = read_all(tmp_path / "s.parquet")
    assert [type(item) for item in found] == [Item, Refusal, Item]
    assert found[1] == Refusal("s1", "sample 's1' has no media bytes; it needs an encoded image")


# ---- folders


def test_a_folder_of_everything(tmp_path):
    folder = tmp_path / "pets"
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.png").write_bytes(make_picture(1))
    (folder / "a.txt").write_text(" a cat\n")
    (folder / "b.JPG").write_bytes(make_picture(2, "JPEG"))
    (folder / "b.json").write_text(json.dumps({"captions": {"en": "a dog", "zh": "狗", "de": None}, "split": "test"}))
    (folder / "more" / "c.gif").write_bytes(make_picture(3, "GIF", frames=3))
    (folder / "more" / "c.json").write_text(json.dumps({"caption": "a bird", "fps": 10}))
    (folder / "more" / "d.webp").write_bytes(make_picture(4, "WEBP"))
    (folder / "more" / "d.json").write_text(json.dumps({"author": "me"}))
    (folder / "more" / "d.txt").write_text("a fish")
    (folder / "more" / "deep" / "alone.png").write_bytes(make_picture(5))
    (folder / "more" / "deep" / "wrong.png").write_bytes(make_picture(5))
    (folder / "more" / "deep" / "wrong.json").write_text("{")
    (folder / "story.txt").write_text("once upon a time", encoding="utf-8")
    (folder / "notes.md").write_text("no")
    (folder / ".hidden" / "x.png").write_bytes(make_picture(6))
    found = {(item.id if isinstance(item, Item) else item.sample_id): item for item in read_all(folder)}
    assert list(found) == ["a.png", "b.JPG", "more/c.gif", "more/d.webp", "more/deep/alone.png", "more/deep/wrong.png", "story.txt"]
    expected = {
        "a.png": ("image", {"und": "a cat"}, "train", None),
        "b.JPG": ("image", {"en": "a dog", "zh": "狗"}, "test", None),
        "more/c.gif": ("video", {"und": "a bird"}, "train", 10.0),
        "more/d.webp": ("image", {"und": "a fish"}, "train", None),
    }
    for name, facts in expected.items():
        item = found[name]
        assert (item.kind, item.captions, item.split, item.fps) == facts and item.media == folder / name and item.dataset == "pets"
    assert (found["story.txt"].kind, found["story.txt"].captions) == ("text", {"und": "once upon a time"})
    assert found["more/deep/alone.png"].reason == "it has no caption: neither alone.txt nor .json is beside it"
    assert isinstance(found["more/deep/wrong.png"], Refusal)


def test_nothing_outside_of_a_folder_is_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(make_picture(1))
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(tmp_path / "secret.png", folder / "a.png")
    (folder / "a.txt").write_text("a")
    (folder / "b.png").write_bytes(make_picture(1))
    os.symlink(tmp_path / "secret.txt", folder / "b.txt")
    os.symlink(tmp_path / "secret.txt", folder / "c.txt")
    os.symlink(tmp_path, folder / "up")
    found = read_all(folder)
    assert [refusal.sample_id for refusal in found] == ["a.png", "b.png", "c.txt"]
    assert all("link that leads out of the folder" in refusal.reason for refusal in found)


def test_a_folder_of_containers(tmp_path):
    """Each is an input of its own; a .txt is one, too, where it holds several documents."""
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("two\nthree\n")
    (tmp_path / "c.png").write_bytes(make_picture(1))
    (tmp_path / "c.txt").write_text("a caption\nin two lines")
    found = only_items(read_all(tmp_path, text_unit="line"))
    assert [(item.kind, item.captions["und"]) for item in found] == [
        ("text", "one"), ("text", "two"), ("text", "three"), ("image", "a caption\nin two lines"),
    ]  # fmt: skip
    assert {item.dataset for item in found} == {tmp_path.name}


# ---- tars


def write_tar(path, number=5, long_names=False):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(path), compress=str(path).endswith("gz")) as sink:
        for index in range(number):
            key = f"{'folder/' * 30 if long_names else ''}{index:06d}"
            sample = {"__key__": key, "png": make_picture(index), "txt": f"picture {index}", "cls": str(index)}
            if index % 2:
                sample["json"] = {"captions": {"en": f"english {index}", "zh": f"中文 {index}"}}
            sink.write(sample)
    return path


@pytest.mark.parametrize("name", ["pets.tar", "pets.tar.gz"])
@pytest.mark.parametrize("long_names", [False, True])
def test_tars_of_webdataset(tmp_path, name, long_names):
    items = only_items(read_all(write_tar(tmp_path / name, 7, long_names), every=3))
    assert [item.id[-6:] for item in items] == [f"{index:06d}" for index in range(7)] and items[0].id.startswith("pets/")
    assert [item.media for item in items] == [make_picture(index) for index in range(7)]
    for index, item in enumerate(items):
        expected = {"en": f"english {index}", "zh": f"中文 {index}"} if index % 2 else {"und": f"picture {index}"}
        assert (item.kind, item.captions, item.dataset) == ("image", expected, "pets")


def test_what_is_wrong_in_a_tar(tmp_path):
    def add(tar, name, contents=b"", **facts):
        info = tarfile.TarInfo(name)
        info.size = len(contents)
        for key, value in facts.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(contents))

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "../../etc/0.png", make_picture(0))  # names are never used to write
        add(tar, "../../etc/0.txt", b"zero")
        add(tar, "1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "1.txt", b"one")
        add(tar, "2.png", make_picture(2))
        add(tar, "2.json", b"{")
        add(tar, "3.gif", b"no picture")
        add(tar, "3.txt", b"three")
        add(tar, "4.png", make_picture(4))
        add(tar, "4.txt", b"\xff\xff")
    found = read_all(tmp_path / "a.tar", every=1)
    assert isinstance(found[0], Item) and found[0].id == "a/../../etc/0"
    assert [type(item) for item in found[1:]] == [Refusal] * 4
    assert found[1].reason == "it has no picture and no film"
    assert "Expecting property name" in found[2].reason and "decode" in found[4].reason


def test_a_tar_that_was_cut_off_is_told(tmp_path):
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    for length in (len(whole) // 3 * 2, 700, 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut.tar is no tar, is damaged or was cut off"):
            read_all(tmp_path / "cut.tar")
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-300])
    with pytest.raises(InputError, match=r"cut.tar.gz is no tar, is damaged or was cut off"):
        read_all(tmp_path / "cut.tar.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000))[:-20])
    with pytest.raises(InputError, match=r"cut.jsonl.gz is damaged or cut off"):
        read_all(tmp_path / "cut.jsonl.gz")


# ---- Hugging Face datasets


def test_a_data_set_with_pictures_and_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Pillow.open(io.BytesIO(make_picture(index))) for index in range(5)]
    table = datasets.Dataset.from_dict({"image": pictures, "caption": [f"picture {index}" for index in range(5)], "n": list(range(5))})
    datasets.DatasetDict({"train": table.select(range(3)), "test": table.select([3, 4])}).save_to_disk(str(tmp_path / "pets"))
    items = only_items(read_all(tmp_path / "pets"))
    assert [(item.id, item.split, item.captions["und"]) for item in items] == [
        ("test/0", "test", "picture 3"), ("test/1", "test", "picture 4"),
        ("train/0", "train", "picture 0"), ("train/1", "train", "picture 1"), ("train/2", "train", "picture 2"),
    ]  # fmt: skip
    assert all(
        np.array_equal(np.asarray(Pillow.open(io.BytesIO(item.media))), np.asarray(pictures[int(item.captions["und"][-1])]))
        for item in items
    )


def test_a_data_set_of_texts_and_one_with_paths(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS, "id": list("abcde")}).save_to_disk(str(tmp_path / "words"))
    assert [(item.id, item.kind, item.captions["und"]) for item in only_items(read_all(tmp_path / "words"))] == [
        (name, "text", text) for name, text in zip("abcde", TEXTS, strict=True)
    ]
    (tmp_path / "secret.png").write_bytes(make_picture(1))
    cells = [
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        None,
        {"bytes": make_picture(2), "path": "x.png"},
    ]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b", "c"]}, features=features)
    with pytest.MonkeyPatch.context() as patch:  # the paths stay paths
        patch.setattr(datasets.Image, "embed_storage", lambda self, storage, **_: storage)
        table.save_to_disk(str(tmp_path / "paths"))
    found = read_all(tmp_path / "paths")
    assert [type(item) for item in found] == [Refusal, Refusal, Item]
    assert "lies outside of the data set's folder" in found[0].reason and "column 'image' is empty" in found[1].reason
    with pytest.raises(InputError, match="has the columns text, id; words is not among them"):
        open_inputs([tmp_path / "words"], InputConfig(text_column="words"))


# ---- what is none


def test_paths_that_are_no_inputs(tmp_path):
    with pytest.raises(InputError, match="nowhere is not there; allowed are files of samples"):
        open_inputs([tmp_path / "nowhere"], InputConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds nothing that can be tokenised"):
        open_inputs([tmp_path / "empty"], InputConfig())
    (tmp_path / "a.pkl").write_bytes(b"no")
    with pytest.raises(InputError, match="a.pkl cannot be tokenised"):
        open_inputs([tmp_path / "a.pkl"], InputConfig())
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match="a.parquet cannot be read as Parquet"):
        open_inputs([tmp_path / "a.parquet"], InputConfig())
    with pytest.raises(InputError, match="validation_share is 1"):
        InputConfig(validation_share=1.0)


def test_inputs_know_when_they_are_others(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"text": "a"}])
    (one,) = open_inputs([path], InputConfig())
    assert isinstance(one, TextFile)
    before = one.stamp
    write_lines(path, [{"text": "a"}, {"text": "b"}])
    assert one.stamp != before
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(make_picture(1))
    (folder,) = open_inputs([tmp_path / "f"], InputConfig())
    (tmp_path / "f" / "a.png").rename(tmp_path / "f" / "b.png")
    assert open_inputs([tmp_path / "f"], InputConfig())[0].stamp != folder.stamp


# ---- what strangers put into samples


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    """It once ended the whole run with a RecursionError."""
    (tmp_path / "a.png").write_bytes(make_picture(0))
    (tmp_path / "a.json").write_text("[" * 100_000)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("a.png", "a.json"):
            tar.add(tmp_path / name, name)
    for found in (read_all(tmp_path / "b.tar"), read_all(tmp_path)):  # the folder holds the tar, too
        assert {item.reason for item in found} == {"the JSON beside it is nested too deeply"}


def test_names_that_are_no_unicode_are_spelled_out(tmp_path):
    """Half a surrogate pair in JSON, and file names of another encoding: neither can be written to a shard."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "a\\ud800", "text": "one"}\n')
    (item,) = read_all(path)
    assert item.id == "a\\ud800"
    folder = tmp_path / os.fsdecode("表".encode("gbk"))
    folder.mkdir()
    (folder / os.fsdecode("情.png".encode("gbk"))).write_bytes(make_picture(0))
    (folder / os.fsdecode("情.json".encode("gbk"))).write_text('{"caption": "a face", "split": "x\\udc00"}')
    (item,) = read_all(folder)
    assert (item.id, item.dataset, item.split) == ("\\udcc7\\udce9.png", "\\udcb1\\udced", "x\\udc00")
    assert item.captions == {"und": "a face"} and item.media.exists()
