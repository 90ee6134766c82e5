"""A corpus is the same bytes, whoever made it, in however many attempts; what it could not read is written down."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image as Pillow

from openemu3.data.corpus import MANIFEST_FILE, Progress, write_corpus
from openemu3.data.inputs import InputConfig, open_inputs
from openemu3.data.samples import write_samples
from openemu3.data.shards import DocumentStore
from openemu3.records import InputError, Sample
from openemu3.tokenization.encode import EncodeConfig
from openemu3.tokenization.sequence import Role
from openemu3.training.export import compute_fingerprint, load_tokenizers


@pytest.fixture(scope="module")
def loaded(tokenizers):
    return load_tokenizers(tokenizers)


def make_still(number, size=(16, 16)):
    buffer = io.BytesIO()
    array = np.random.default_rng(number).integers(0, 255, (size[0] // 8, size[1] // 8, 3), np.uint8)
    Pillow.fromarray(array).resize(size[::-1], Pillow.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def make_clip(number):
    frames = [Pillow.new("RGB", (16, 16), (10 * index, number % 255, 99)) for index in range(8)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Samples of two sizes, clips and broken ones among them, and texts in two languages."""
    folder = tmp_path_factory.mktemp("raw")
    samples = []
    for number in range(60):
        captions = {"en": f"a red apple {number}", "zh": "一个红苹果"}
        if number % 10 == 3:
            samples.append(Sample(f"clip-{number}", "video", make_clip(number), {"en": "smiling cat"}, {"fps": "8"}, "train"))
        elif number % 10 == 7:
            samples.append(Sample(f"broken-{number}", "image", b"no picture", captions, {}, "train"))
        else:
            size = (16, 16) if number % 3 else (16, 24)
            samples.append(Sample(f"still-{number}", "image", make_still(number, size), captions, {}, "train" if number % 5 else "heldout"))
    write_samples(folder / "samples.parquet", samples)
    lines = [json.dumps({"text": text * (1 + number % 7)}) for number in range(25) for text in ("smiling cat ", "红苹果")]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n{\n", encoding="utf-8")
    return folder


def make_corpus(folder, raw, tokenizers, loaded, **changes):
    settings = {"samples_per_shard": 16, **changes}
    config = settings.pop("config", EncodeConfig(clip_frames=8, batch_tokens=16))
    inputs = open_inputs([raw / "samples.parquet", raw / "texts.jsonl"], InputConfig())
    return write_corpus(folder, inputs, *loaded, config, compute_fingerprint(tokenizers), **settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, raw, tokenizers, loaded):
    folder = tmp_path_factory.mktemp("corpus") / "documents"
    return folder, make_corpus(folder, raw, tokenizers, loaded)


def read_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- what is in it


def test_a_corpus_holds_every_document(corpus, loaded):
    folder, summary = corpus
    stills, clips, texts = 48, 6, 50
    assert summary.complete and summary.num_shards == 4 + 4 and summary.num_items == 60 + 51
    assert summary.sources == {"draw": 2 * stills, "describe": 2 * stills, "film": clips, "describe_video": clips, "text": texts}
    assert summary.num_documents == sum(summary.sources.values()) and summary.num_refused == 6 + 1
    store = DocumentStore([folder], {"train", "heldout"})
    assert len(store) == summary.num_documents and store.lengths.sum() == summary.num_tokens == sum(summary.tokens.values())
    roles = np.concatenate([store.read(index)[1] for index in range(len(store))])
    assert {role.name.lower(): int((roles == role).sum()) for role in Role if role} == summary.tokens
    assert set(store.datasets) == {"samples", "texts"} and sorted(store.sources) == sorted(summary.sources)
    for index in range(0, len(store), 17):
        loaded[1].decode(store.read(index)[0])  # well-formed, every one


def test_what_gave_no_document_is_written_down(corpus):
    folder, _ = corpus
    rows = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [*(f"broken-{number}" for number in range(7, 60, 10)), "texts:50"]
    assert all("picture" in row["reason"] for row in rows[:-1]) and "Expecting property name" in rows[-1]["reason"]
    assert rows[0]["shard"] == "documents-00000"


def test_the_manifest_names_every_shard(corpus):
    folder, summary = corpus
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["shards"] == {path.name: path.stat().st_size for path in sorted(folder.glob("*.parquet"))}
    assert manifest["num_tokens"] == summary.num_tokens and manifest["complete"] is True
    assert not list(folder.glob(".*.partial"))


# ---- the same bytes


def test_workers_share_the_shards(corpus, raw, tokenizers, loaded, tmp_path):
    first = make_corpus(tmp_path / "c", raw, tokenizers, loaded, worker=0, num_workers=3)
    assert not first.complete and first.num_shards == 3 and not (tmp_path / "c" / MANIFEST_FILE).exists()
    with pytest.raises(InputError, match="c is not complete: its manifest.json is missing"):
        DocumentStore([tmp_path / "c"], {"train"})
    make_corpus(tmp_path / "c", raw, tokenizers, loaded, worker=2, num_workers=3)
    last = make_corpus(tmp_path / "c", raw, tokenizers, loaded, worker=1, num_workers=3)
    assert last == corpus[1] and read_bytes(tmp_path / "c") == read_bytes(corpus[0])


def test_what_is_missing_is_made_again_and_nothing_else(corpus, raw, tokenizers, loaded, tmp_path):
    """Each file alone may be lost, cut off, or left half-written."""
    expected = read_bytes(corpus[0])
    folder = tmp_path / "c"
    make_corpus(folder, raw, tokenizers, loaded)
    for damage in (
        lambda: (folder / "documents-00002.parquet").unlink(),
        lambda: (folder / "documents-00006.json").unlink(),
        lambda: (folder / "documents-00001.parquet").write_bytes(expected["documents-00001.parquet"][:-1]),
        lambda: (folder / "documents-00003.json").write_text("{"),
        lambda: (folder / MANIFEST_FILE).unlink(),
        lambda: (folder / ".documents-00003.parquet.99999.partial").write_bytes(b"left by a kill"),
    ):
        damage()
        before = {path: path.stat().st_mtime_ns for path in folder.glob("documents-*")}
        steps = []
        make_corpus(folder, raw, tokenizers, loaded, progress=steps.append)
        assert read_bytes(folder) == expected
        written = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
        assert len(written) <= 2 and len({name.split(".")[0] for name in written}) <= 1
        assert steps[0].num_items >= 111 - 16 and steps[-1] == Progress(111, 111, corpus[1].num_documents, corpus[1].num_tokens, 7)


def test_an_error_in_the_middle_leaves_whole_shards(corpus, raw, tokenizers, loaded, tmp_path):
    class Stop(Exception):
        pass

    def stop_in_the_third(progress):
        if progress.num_items > 40:
            raise Stop

    with pytest.raises(Stop):
        make_corpus(tmp_path / "c", raw, tokenizers, loaded, progress=stop_in_the_third)
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"plan.json", *(f"documents-0000{n}.{suffix}" for n in range(2) for suffix in ("json", "parquet"))}
    make_corpus(tmp_path / "c", raw, tokenizers, loaded)
    assert read_bytes(tmp_path / "c") == read_bytes(corpus[0])


def kill_while_it_works(command, folder, num_shards):
    """Starts the command and kills it once so many shards are complete; how many there were then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list(folder.glob("documents-*.json"))) < num_shards:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[1] is not None and process.returncode == -signal.SIGKILL
    return len(list(folder.glob("documents-*.json")))


def build_command(raw, tokenizers, folder):
    flags = ["--tokenizers", tokenizers, "--output", folder, "--clip-frames", 8, "--batch-tokens", 16, "--samples-per-shard", 2]
    return [sys.executable, "-m", "openemu3.cli", "tokenize", *map(str, [raw / "samples.parquet", raw / "texts.jsonl", *flags])]


def check_killed_runs(raw, tokenizers, loaded, tmp_path, kills):
    """Kills the command as often, and finishes what it began; all bytes are those of a run that was left alone."""
    how = {"samples_per_shard": 2, "settings": asdict(InputConfig())}
    make_corpus(tmp_path / "whole", raw, tokenizers, loaded, **how)
    folder = tmp_path / "killed"
    for num_shards in kills:
        assert num_shards <= kill_while_it_works(build_command(raw, tokenizers, folder), folder, num_shards) < 56
    made = {path: path.stat().st_mtime_ns for path in folder.glob("documents-*.json")}
    assert make_corpus(folder, raw, tokenizers, loaded, **how).complete
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert read_bytes(folder) == read_bytes(tmp_path / "whole")


def test_a_killed_run_goes_on_with_the_same_bytes(raw, tokenizers, loaded, tmp_path):
    check_killed_runs(raw, tokenizers, loaded, tmp_path, [3])


@pytest.mark.slow
def test_runs_killed_again_and_again(raw, tokenizers, loaded, tmp_path):
    check_killed_runs(raw, tokenizers, loaded, tmp_path, [0, 1, 5, 11, 20, 21, 40, 50])


# ---- what is refused


def test_other_settings_need_another_folder(corpus, raw, tokenizers, loaded, tmp_path):
    folder, _ = corpus
    changes = {
        '"seed": 0': {"config": EncodeConfig(clip_frames=8, batch_tokens=16, seed=1)},
        "samples_per_shard 16, not 8": {"samples_per_shard": 8},
        "settings": {"settings": {"text_unit": "line"}},
    }
    before = read_bytes(folder)
    for words, change in changes.items():
        with pytest.raises(InputError, match=f"was begun with .*{words}.*; choose another folder"):
            make_corpus(folder, raw, tokenizers, loaded, **change)
    with pytest.raises(InputError, match='was begun with fingerprint "[0-9a-f]+", not "other"'):
        inputs = open_inputs([raw / "samples.parquet", raw / "texts.jsonl"], InputConfig())
        write_corpus(folder, inputs, *loaded, EncodeConfig(clip_frames=8, batch_tokens=16), "other", samples_per_shard=16)
    assert read_bytes(folder) == before
    smaller = make_corpus(folder, raw, tokenizers, loaded, config=EncodeConfig(clip_frames=8, batch_tokens=4))  # for want of memory
    assert smaller.complete and read_bytes(folder) == before
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "documents-00000.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="c holds documents but no plan.json; choose another folder"):
        make_corpus(tmp_path / "c", raw, tokenizers, loaded)


def test_inputs_that_change_are_told(raw, tokenizers, loaded, tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("samples.parquet", "texts.jsonl"):
        (tmp_path / "raw" / name).write_bytes((raw / name).read_bytes())
    make_corpus(tmp_path / "c", tmp_path / "raw", tokenizers, loaded, worker=0, num_workers=2)
    with (tmp_path / "raw" / "texts.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match="c was begun with inputs .* bytes.*; choose another folder"):
        make_corpus(tmp_path / "c", tmp_path / "raw", tokenizers, loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"worker": 2, "num_workers": 2}, "worker is 2; of 2 workers it must be 0 to 1"),
    ],
)
def test_impossible_settings(raw, tokenizers, loaded, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        make_corpus(tmp_path / "c", raw, tokenizers, loaded, **change)


def test_nothing_to_tokenise_is_told(tokenizers, loaded, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="empty.jsonl: there is nothing in them to tokenise"):
        write_corpus(tmp_path / "c", open_inputs([tmp_path / "empty.jsonl"], InputConfig()), *loaded, EncodeConfig(), "abc")
