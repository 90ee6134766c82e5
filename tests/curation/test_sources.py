"""Every kind of source gives its items with their captions, in an order that does not change; names that lead elsewhere are refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openemu3.curation.sources import Item, SourceConfig, list_items, read_item
from openemu3.data.samples import write_samples
from openemu3.records import InputError, Sample

CONFIG = SourceConfig()


def read_all(source: Path, config: SourceConfig = CONFIG) -> dict[str, tuple[bytes | str, dict[str, str]]]:
    """id -> (bytes, or the reason it was refused), captions."""
    items = list(list_items([str(source)], config))
    assert items == list(list_items([str(source)], config))
    found = {item.id: (item.refused or read_item(item, 1 << 20), item.captions) for item in items}
    assert len(found) == len(items), "ids are not unique"
    return found


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_a_folder_gives_its_files_with_the_captions_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.jpg").write_bytes(b"B")
    (folder / "b.txt").write_text(" a cat \n")
    (folder / "b-1.jpg").write_bytes(b"B1")
    (folder / "sub" / "a.PNG").write_bytes(b"A")
    (folder / "sub" / "a.json").write_text(json.dumps({"caption": "ein Hund", "captions": {"de": "ein Hund", "en": "a dog"}}))
    (folder / "notes.md").write_text("no picture")
    (folder / ".hidden.jpg").write_bytes(b"no")
    (folder / "film.mp4").write_bytes(b"F")
    assert read_all(folder) == {
        "photos/b-1.jpg": (b"B1", {}),
        "photos/b.jpg": (b"B", {"en": "a cat"}),
        "photos/sub/a.PNG": (b"A", {"de": "ein Hund", "en": "a dog"}),
    }
    assert list(read_all(folder, SourceConfig(kind="video"))) == ["photos/film.mp4"]


def test_no_file_is_lost_beside_folders_and_names_that_are_alike(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "a.parts").mkdir(parents=True)  # between a.jpg and a.txt, where all were sorted by name
    (folder / "a.parts" / "0.jpg").write_bytes(b"0")
    (folder / "a.jpg").write_bytes(b"a")
    (folder / "a.txt").write_text("a caption")
    (folder / "a.JPG").write_bytes(b"A")
    caption = {"en": "a caption"}
    assert read_all(folder) == {"photos/a.JPG": (b"A", caption), "photos/a.jpg": (b"a", caption), "photos/a.parts/0.jpg": (b"0", {})}
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in (("1.left.jpg", b"L"), ("1.right.JPG", b"R"), ("1.txt", b"two eyes"), ("2.jpg", b"2"), ("2.jpg", b"two")):
            add_member(tar, name, data)
    eyes = {"en": "two eyes"}
    assert read_all(tmp_path / "set.tar") == {
        "set.tar#0/1.left.jpg": (b"L", eyes),
        "set.tar#1/1.right.JPG": (b"R", eyes),
        "set.tar#2/2.jpg": (b"2", {}),
        "set.tar#3/2.jpg": (b"two", {}),
    }


def test_links_and_pipes_are_refused_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"SECRET")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "caption.jpg").write_bytes(b"C")
    (folder / "caption.txt").symlink_to(secret)
    assert read_all(folder) == {
        "photos/caption.jpg": (b"C", {}),
        "photos/link.jpg": ("symlink", {}),
        "photos/pipe.jpg": ("not a file", {}),
    }
    with pytest.raises(InputError, match="cannot be read"):  # a link that came after the listing
        read_item(Item("x", (folder / "link.jpg").as_uri()), 100)


def test_names_that_are_no_utf8_are_read_and_stay_apart(tmp_path: Path) -> None:
    for name, data in ((b"\xff.jpg", b"1"), (b"\xfe.jpg", b"2")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(data)
    found = read_all(tmp_path)
    assert sorted(data for data, _ in found.values()) == [b"1", b"2"]
    for identity in found:
        identity.encode("utf-8")


def test_a_webdataset_tar_gives_items_by_key_and_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        add_member(tar, "000.jpg", b"ZERO")
        add_member(tar, "000.txt", b"nought")
        add_member(tar, "d/001.json", json.dumps({"caption": "one", "key": "001"}).encode())
        add_member(tar, "d/001.PNG", b"ONE")
        add_member(tar, "000.jpg", b"AGAIN")
    pq.write_table(pa.table({"key": ["000"], "caption": ["nought"], "url": ["https://example.com/0"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = read_all(tmp_path)  # img2dataset's layout
    name = tmp_path.name
    assert found == {
        f"{name}/00000.tar#0/000.jpg": (b"ZERO", {"en": "nought"}),
        f"{name}/00000.tar#1/d/001.PNG": (b"ONE", {"en": "one"}),
        f"{name}/00000.tar#2/000.jpg": (b"AGAIN", {}),
    }


def test_tar_members_that_escape_or_link_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        add_member(tar, "../../evil.jpg", b"E")
        add_member(tar, "/abs.jpg", b"E")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add_member(tar, "good.jpg", b"G")
    assert [data for data, _ in read_all(path).values()] == ["name leads out of the source"] * 2 + ["symlink", b"G"]


def test_a_tar_that_ends_early_or_is_compressed_is_refused_without_ending_the_run(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "0.jpg", b"Z" * 2000)
        add_member(tar, "1.jpg", b"O" * 2000)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:3000])
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        add_member(tar, "0.jpg", b"Z")
    (tmp_path / "c.jpg").write_bytes(b"C")
    found = {item.id.split("/", 1)[1]: item.refused for item in list_items([str(tmp_path)], CONFIG)}
    assert found["c.jpg"] == ""
    assert found["b.tar#rest"].startswith("unreadable container: it is compressed")
    assert found["a.tar#0/0.jpg"] == ""


@pytest.mark.parametrize("layout", ["bytes", "struct", "path"])
def test_a_table_holds_bytes_or_names_files(tmp_path: Path, layout: str) -> None:
    blobs = [bytes([65 + number]) * 5 for number in range(10)]
    captions = [f"caption {number}" for number in range(10)]
    if layout == "path":
        for number, blob in enumerate(blobs):
            (tmp_path / f"{number}.bin").write_bytes(blob)
        media = pa.array([f"{number}.bin" for number in range(10)])
        table = pa.table({"path": media, "text": captions, "key": [f"k{number}" for number in range(10)]})
    elif layout == "struct":
        media = pa.array([{"bytes": blob, "path": "x.jpg"} for blob in blobs])
        table = pa.table({"image": media, "caption": captions})
    else:
        table = pa.table({"jpg": pa.array(blobs, pa.binary()), "caption": captions, "id": range(10)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    found = read_all(tmp_path / "t.parquet")
    assert [data for data, _ in found.values()] == blobs
    assert [caption for _, caption in found.values()] == [{"en": text} for text in captions]


def test_our_own_samples_are_a_source_again(tmp_path: Path) -> None:
    samples = [
        Sample(f"s{number}", kind, b"M%d" % number, {"en": "a", "zh": "b"}, {}, "train", {"aesthetic": 6.5})
        for number, kind in enumerate(("image", "video", "image"))
    ]
    write_samples(tmp_path / "s.parquet", samples)
    assert read_all(tmp_path / "s.parquet") == {
        "s.parquet#0/s0": (b"M0", {"en": "a", "zh": "b"}),
        "s.parquet#2/s2": (b"M2", {"en": "a", "zh": "b"}),
    }


def test_a_list_names_files_below_its_folder_and_below_roots_alone(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (home / "in.jpg").write_bytes(b"IN")
    (other / "out.jpg").write_bytes(b"OUT")
    (home / "sly.jpg").symlink_to(other / "out.jpg")
    rows = [
        {"path": "in.jpg", "caption": "inside"},
        {"path": "../other/out.jpg"},
        {"path": str(other / "out.jpg"), "id": "absolute"},
        {"path": "sly.jpg"},
        {"caption": "names nothing"},
        {"path": "gopher://x/y.jpg"},
        {"image_path": "in.jpg", "captions": {"en": "half \ud800 pair", "zh": " "}},
    ]
    (home / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n" + "[" * 100_000)
    escaped = "name leads out of the source"
    expected = [b"IN", escaped, escaped, escaped, "names no file", "a URL that is not read here", b"IN", *2 * ["not a JSON object"]]
    found = read_all(home / "list.jsonl")
    assert [data for data, _ in found.values()] == expected
    assert list(found.values())[6][1] == {"en": "half ? pair"}
    allowed = read_all(home / "list.jsonl", SourceConfig(roots=(str(other),)))
    assert [data for data, _ in allowed.values()] == [b"IN", b"OUT", b"OUT", b"OUT", *expected[4:]]


def test_an_item_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 101)
    item = next(list_items([str(tmp_path)], CONFIG))
    with pytest.raises(InputError, match="too large"):
        read_item(item, 100)
    assert len(read_item(item, 101)) == 101


@pytest.mark.parametrize(("name", "message"), [("missing", "is not there"), ("page.html", "no file that is read here")])
def test_a_source_that_is_none_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "page.html").write_text("x")
    with pytest.raises(InputError, match=message):
        list(list_items([str(tmp_path / name)], CONFIG))


def test_two_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in "ab":
        (tmp_path / parent / "photos").mkdir(parents=True)
        (tmp_path / parent / "photos" / "0.jpg").write_bytes(b"x")
    ids = [item.id for item in list_items([str(tmp_path / parent / "photos") for parent in "ab"], CONFIG)]
    assert ids == ["photos/0.jpg", "photos-2/0.jpg"]


def test_listing_a_large_table_does_not_hold_it(tmp_path: Path) -> None:
    rows = 30_000
    table = pa.table({"jpg": pa.array([b"x"] * rows, pa.binary()), "caption": [f"{number} " * 40 for number in range(rows)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2000)
    tracemalloc.start()
    assert sum(1 for _ in list_items([str(tmp_path / "t.parquet")], CONFIG)) == rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < table.nbytes / 2
