"""The commands `emu3 tokenize` and `emu3 pack` as somebody uses them who has a folder of pictures, a tar and some texts."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image as Pillow

from openemu3 import cli
from openemu3.cli import tokenize as command
from openemu3.data.shards import DocumentStore


def make_picture(number, side=16):
    buffer = io.BytesIO()
    small = np.random.default_rng(number).integers(0, 255, (2, 2, 3), np.uint8)
    Pillow.fromarray(small).resize((side, side), Pillow.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    (folder / "pictures").mkdir()
    for number in range(30):
        (folder / "pictures" / f"{number}.png").write_bytes(make_picture(number, 16 + number % 3))  # 17 and 18 must be fitted
        (folder / "pictures" / f"{number}.txt").write_text("一个红苹果" if number % 2 else "the smiling cat", encoding="utf-8")
    (folder / "pictures" / "alone.png").write_bytes(make_picture(1))
    with tarfile.open(folder / "more.tar", "w") as tar:
        for number in range(5):
            for suffix, contents in (("png", make_picture(100 + number)), ("txt", b"ein Haus am See")):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))
    (folder / "poems.txt").write_text("a red apple\non a table\n\nsmiling face\n\n一个红苹果\n", encoding="utf-8")
    return folder


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_a_tar_and_texts(raw, tokenizers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "LINE_EVERY", 0.0)  # a line each time, as a log has one a minute
    monkeypatch.chdir(raw)
    flags = ["--tokenizers", tokenizers, "--output", tmp_path / "out", "--resolution", 16, "--text-unit", "paragraph"]
    flags += ["--generation-share", 0.5, "--understanding-share", 0.5, "--validation-share", 0.2, "--samples-per-shard", 8]
    code, out, err = run(capsys, "tokenize", "pictures", "more.tar", "poems.txt", *flags)
    assert code == 0, err
    assert (
        f"{tmp_path / 'out'}: 38 documents (" in out
        and "3 text), " in out
        and "of 39 samples; 1 could not be read, refused.jsonl says why" in out
    )
    lines = [line for line in err.splitlines() if " of 39 samples, " in line]
    assert lines and all("samples/s" in line and "tokens/s" in line and "min left" in line for line in lines)
    assert lines[-1].startswith("39 of 39 samples") and "1 refused" in lines[-1]
    (refused,) = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert refused["sample_id"] == "alone.png" and "no caption" in refused["reason"]
    stores = [DocumentStore([tmp_path / "out"], {split}) for split in ("train", "validation")]
    assert sum(map(len, stores)) == 38 and len(stores[1]) > 1
    assert {name for store in stores for name in store.datasets} == {"pictures", "more", "poems"}
    drawn, described = (sum((store.source_of == store.sources.index(name)).sum() for store in stores) for name in ("draw", "describe"))
    assert drawn + described == 35 and min(drawn, described) > 8


def test_packing_is_shown_before_training(raw, tokenizers, tmp_path, capsys):
    flags = ["--tokenizers", tokenizers, "--output", tmp_path / "out", "--text-unit", "line", "--dataset", "verse", "--json"]
    code, out, err = run(capsys, "tokenize", raw / "poems.txt", raw / "more.tar", *flags)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["complete"] and answer["sources"] == {"describe": 5, "draw": 5, "text": 4} and answer["num_refused"] == 0
    code, out, err = run(capsys, "pack", tmp_path / "out", "--context-length", 64)
    assert code == 0 and out.startswith("14 documents in ") and " rows of 64 tokens: " in out and "texts cut: 0 longer" in out, err
    code, out, err = run(capsys, "pack", tmp_path / "out", "--context-length", 64, "--shares", "verse/text", 1, "--json")
    assert code == 0 and json.loads(out)["num_documents"] == 4
    for arguments, words in (
        (["--context-length", 64, "--mixture", "paint", 1], "mixture names 'paint'"),
        (["--context-length", 1], "context_length is 1"),
        (["--split", "nowhere"], "no documents of split 'nowhere' in "),
    ):
        code, out, err = run(capsys, "pack", tmp_path / "out", *arguments)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_shard_that_was_damaged_is_named(raw, tokenizers, tmp_path, capsys):
    flags = ["--tokenizers", tokenizers, "--output", tmp_path / "out", "--text-unit", "line"]
    assert run(capsys, "tokenize", raw / "poems.txt", *flags)[0] == 0
    path = tmp_path / "out" / "documents-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    code, _, err = run(capsys, "pack", tmp_path / "out")
    assert code == 2 and f"{path} is damaged: it has {len(whole) - 7} bytes and was written with {len(whole)}" in err
    assert run(capsys, "tokenize", raw / "poems.txt", *flags)[0] == 0  # makes it again
    assert path.read_bytes() == whole and run(capsys, "pack", tmp_path / "out", "--context-length", 64)[0] == 0
