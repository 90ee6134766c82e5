"""`emu3 tokenize`, `train` and `export` as processes: the mini model itself, for a few steps, on drawn pictures and clips."""

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Emu3ForCausalLM

from openemu3.data.samples import write_samples
from openemu3.data.shards import DocumentStore
from openemu3.media import read_image
from openemu3.model.attention import CausalAttention
from openemu3.model.weights import load_transformer
from openemu3.records import Sample
from openemu3.tokenization.text import train_text_tokenizer

SIDE = 64
COLOURS = ("red", "green", "blue", "gold", "black", "purple")
FEW_PICTURES = ("--images-per-batch", 2, "--max-validation", 8)
TRAIN_LANGUAGE = ("train", "language", "documents", "--tokenizers", "tokenizers", "--output", "new")


def draw(colour, left):
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).ellipse((left, 16, left + 32, 48), fill=colour)
    return picture


def make_samples():
    for number, colour in enumerate(COLOURS):
        split = ("train", "train", "train", "train", "heldout_picture", "heldout_combination")[number]
        buffer = BytesIO()
        draw(colour, 16).save(buffer, "PNG")
        yield Sample(f"still-{colour}", "image", buffer.getvalue(), {"en": f"3D {colour} ball", "zh": "立体 球"}, {}, split)
        frames = [draw(colour, 2 * step) for step in range(16)]
        buffer = BytesIO()
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=125, lossless=True)
        yield Sample(f"clip-{colour}", "video", buffer.getvalue(), {"en": f"animated {colour} ball"}, {"fps": "8"}, split)


@pytest.fixture(scope="module")
def work(tmp_path_factory, emu3_command, lpips_weights):
    """A folder in which the whole chain has run: samples, runs, tokenizers, documents and a model; and what each command said."""
    folder = tmp_path_factory.mktemp("work")
    write_samples(folder / "samples.parquet", make_samples())
    words = [text for sample in make_samples() for text in sample.captions.values()]
    words += [f"{word} {number}" for word in words for number in range(1000)] + [chr(0x4E00 + code) for code in range(3000)]
    (folder / "text.tiktoken").write_bytes(train_text_tokenizer(words, 2048))
    said = {}

    def run(name, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENEMU3_CACHE", str(lpips_weights))
            patch.setenv("OMP_NUM_THREADS", "1")
            done = emu3_command(*arguments, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        said[name] = json.loads(done.stdout)

    run("vision", "train", "vision-tokenizer", "samples.parquet", "--output", "runs/vision", "--num-steps", 4, *FEW_PICTURES)
    run("tokenizers", "export", "tokenizers", "runs/vision", "--text", "text.tiktoken", "--output", "tokenizers")
    run("documents", "tokenize", "samples.parquet", "--tokenizers", "tokenizers", "--output", "documents")
    flags = ["--num-steps", 2, "--context-length", 512, "--rows-per-batch", 1, "--prompts", "3D red ball", "--max-validation", 4]
    run("language", "train", "language", "documents", "--tokenizers", "tokenizers", "--output", "runs/language", *flags)
    flags = ["--preset", "mini-decoder", "--init-from", "runs/vision", "--num-steps", 2, *FEW_PICTURES]
    run("decoder", "train", "vision-tokenizer", "samples.parquet", "--output", "runs/decoder", *flags)
    run("tuned", "export", "tokenizers", "runs/decoder", "--text", "text.tiktoken", "--output", "tuned")
    run("model", "export", "model", "runs/language", "--tokenizers", "tuned", "--output", "model")
    run("picture", "generate", "image", "3D red ball", "--model", "model", "--output", "picture.png")
    return folder, said


def test_from_pictures_to_a_picture(work):
    folder, said = work
    assert said["vision"]["steps"] == 4 and said["vision"]["validation/image/psnr"] > 0
    assert said["tokenizers"]["files"].keys() == {"config.json", "text.tiktoken", "vision_tokenizer.safetensors"}
    # 6 stills x 2 languages and 6 clips x 1, each in both orders
    sources = {"draw": 12, "describe": 12, "film": 6, "describe_video": 6}
    assert said["documents"]["sources"] == sources and said["documents"]["folder"] == "documents" and said["documents"]["complete"]
    assert (said["documents"]["num_documents"], said["documents"]["num_items"], said["documents"]["num_refused"]) == (36, 12, 0)
    assert said["language"]["steps"] == 2 and 0 < said["language"]["validation/loss"] < 20
    assert read_image(folder / "runs" / "language" / "samples" / "step-00000002.png").shape == (3, 1, 64, 64)
    assert {path.name for path in (folder / "runs" / "decoder" / "samples").iterdir()} == {
        f"step-00000002-{kind}.png" for kind in ("image", "video")
    }
    assert sum(said["model"]["files"].values()) < 40e6  # what the package may ship
    assert read_image(folder / "picture.png").shape == (3, 1, 64, 64)
    assert json.loads((folder / "model" / "config.json").read_text())["generation"]["clip_frames"] == 16


def test_documents_are_what_a_person_would_expect(work, emu3_command):
    folder, said = work
    store = DocumentStore([folder / "documents"], {"train"})
    drawn = store.lengths[store.source_of == store.sources.index("draw")]
    filmed = store.lengths[store.source_of == store.sources.index("film")]
    assert len(drawn) == 8 and len(filmed) == 4
    assert drawn.min() > 64 + 8 and filmed.min() > 4 * (64 + 8) and filmed.max() < 4 * (64 + 9) + 40
    done = emu3_command("pack", "documents", "--context-length", 512, cwd=folder)
    assert done.returncode == 0 and done.stdout.startswith("24 documents in "), done.stderr
    done = emu3_command("pack", "documents", "--context-length", 200, "--mixture", "draw", 2, "--json", cwd=folder)
    report = json.loads(done.stdout)
    assert report["num_documents"] == 2 * 8 + 8 and 0.5 < report["fill_rate"] <= 1
    (refused,) = report["refused"].items()  # the films
    assert refused[0] == "of more than 200 tokens that hold vision, which is not cut" and refused[1][0] == 8


def test_a_tokenisation_again_does_nothing(work, emu3_command):
    folder, said = work
    before = {path: path.stat().st_mtime_ns for path in (folder / "documents").glob("documents-*")}
    done = emu3_command("tokenize", "samples.parquet", "--tokenizers", "tokenizers", "--output", "documents", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("documents: 36 documents (12 describe, 6 describe_video, 12 draw, 6 film), ")
    assert {path: path.stat().st_mtime_ns for path in (folder / "documents").glob("documents-*")} == before
    flags = ["--tokenizers", "tokenizers", "--output", "documents", "--clip-frames", 8]
    done = emu3_command("tokenize", "samples.parquet", *flags, cwd=folder)
    assert done.returncode == 2 and 'was begun with encode {"clip_frames": 16}, not {"clip_frames": 8}' in done.stderr


def test_a_complete_run_is_not_trained_again(work, emu3_command, monkeypatch, lpips_weights):
    folder, said = work
    monkeypatch.setenv("OPENEMU3_CACHE", str(lpips_weights))
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "vision" / "checkpoints").rglob("*")}
    flags = ["samples.parquet", "--output", "runs/vision", "--num-steps", 4, *FEW_PICTURES]
    done = emu3_command("train", "vision-tokenizer", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs/vision: 4 steps; held out: image/l2 0.")
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs" / "vision" / "checkpoints").rglob("*")} == before


@pytest.mark.slow
def test_a_stopped_run_says_so_and_goes_on(work, tmp_path):
    """SIGTERM while it trains: it saves, says where it is, and ends with 130; the same command goes on."""
    folder, _ = work
    command = [sys.executable, "-m", "openemu3.cli", "train", "language", "documents", "--tokenizers", "tokenizers"]
    command += ["--output", str(tmp_path / "run"), "--num-steps", "1000", "--context-length", "512", "--tokens-per-batch", "512"]
    command += ["--max-validation", "4"]
    command += ["--validate-every", "0", "--prompts", "a"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 130 and output == "", errors
    assert f"{tmp_path / 'run'}: saved at step " in errors and " of 1000; the same command goes on from there" in errors
    assert errors.endswith("emu3: stopped\n") and "Traceback" not in errors
    step = int(errors.split("saved at step ")[1].split()[0])
    command[command.index("1000")] = str(step + 1)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'run'}: {step + 1} steps"), done.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1] == step + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokenize", "--tokenizers", "tokenizers", "--output", "a.parquet"], "no file of samples was given"),
        (["tokenize", "samples.parquet", "--tokenizers", "tokenizers", "--output", "text.tiktoken"], "text.tiktoken is a file"),
        (["tokenize", "nothing.parquet", "--tokenizers", "tokenizers", "--output", "a.parquet"], "nothing.parquet is not there"),
        (["tokenize", "text.tiktoken", "--tokenizers", "tokenizers", "--output", "a.parquet"], "text.tiktoken cannot be tokenised"),
        (["tokenize", "samples.parquet", "--tokenizers", "runs", "--output", "a.parquet"], "runs"),
        (["tokenize", "samples.parquet", "--tokenizers", "tokenizers", "--output", "a.parquet", "--clip-stride", "0"], "clip_stride is 0"),
        (["train", "vision-tokenizer", "--output", "new"], "no file of samples was given"),
        (["train", "vision-tokenizer", "documents/documents-00000.parquet", "--output", "new"], "has the columns"),
        (["train", "vision-tokenizer", "samples.parquet", "--output", "new", "--num-steps", "0"], "num_steps is 0"),
        (["train", "vision-tokenizer", "samples.parquet", "--output", "new", "--preset", "mini-decoder"], "init-from is missing"),
        (["train", "vision-tokenizer", "samples.parquet", "--output", "new", "--validation-split", "x"], "no samples of split 'x'"),
        (["train", "language", "samples.parquet", "--tokenizers", "tokenizers", "--output", "new"], "does not hold token documents"),
        (["train", "language", "documents", "--tokenizers", "model", "--output", "runs/vision"], "is of another configuration"),
        (["train", "language", "a.parquet", "--tokenizers", "tokenizers", "--output", "new", "--mixture", "draw", "-1"], "mixture has"),
        ([*TRAIN_LANGUAGE, "--dp", "2", "--prompts", "a"], "prompts are drawn in a run of one process"),
        ([*TRAIN_LANGUAGE, "--max-validation", "0"], "max_validation is 0"),
        (["export", "tokenizers", "nowhere", "--text", "text.tiktoken", "--output", "new"], "nowhere holds no checkpoint"),
        (["export", "tokenizers", "runs/vision", "--text", "nothing.tiktoken", "--output", "new"], "nothing.tiktoken"),
        (["export", "model", "runs/vision", "--tokenizers", "tokenizers", "--output", "new"], "one of kind 'language' is needed"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(work, emu3_command, monkeypatch, lpips_weights, arguments, words):
    folder, _ = work
    monkeypatch.setenv("OPENEMU3_CACHE", str(lpips_weights))
    before = {path for path in folder.rglob("*") if path.name not in (".lock", "__pycache__")}
    done = emu3_command(*arguments, cwd=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("emu3: ")
    assert {path for path in folder.rglob("*") if path.name not in (".lock", "__pycache__")} == before


def test_a_model_is_written_for_transformers(work, emu3_command):
    """The mini model's language model alone: its vision tokenizer has norms that transformers' has not."""
    folder, _ = work
    done = emu3_command("export", "transformers", "model", "--output", "theirs", "--text-only", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"].keys() == {"config.json", "model.safetensors"}
    theirs = Emu3ForCausalLM.from_pretrained(folder / "theirs", dtype=torch.float32).eval()
    ours = load_transformer(folder / "model", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = ours.compute_logits(ours(ids, CausalAttention()))
        torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-4)
    done = emu3_command("export", "transformers", "model", "--output", "both", cwd=folder)
    assert done.returncode == 2 and "num_norm_groups 8; transformers knows 32 alone" in done.stderr and not (folder / "both").exists()


@pytest.mark.slow
def test_the_two_stages_in_small(work, emu3_command):
    """Stage 1 cannot hold a film, stage 2 goes on from its weights with films; both tell of stills and films, before and after."""
    folder, _ = work
    flags = ["documents", "--tokenizers", "tokenizers", "--validation-split", "heldout_combination", "--validate-every", 0, "--json"]
    first = emu3_command("train", "language", *flags, "--preset", "mini-stage1", "--num-steps", 2, "--output", "runs/stage1", cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "left out:" in first.stderr and "of more than 288 tokens that hold vision" in first.stderr
    flags += ["--preset", "mini-stage2", "--init-from", "runs/stage1", "--num-steps", 2, "--checkpointing", "full"]
    second = emu3_command("train", "language", *flags, "--output", "runs/stage2", cwd=folder)
    assert second.returncode == 0, second.stderr
    told = {}
    for stage in ("stage1", "stage2"):
        rows = [json.loads(line) for line in (folder / "runs" / stage / "metrics.jsonl").read_text().splitlines()]
        told[stage] = [row for row in rows if "validation/loss" in row]
        assert [row["step"] for row in told[stage]] == [0, 2]
        assert all(row.keys() >= {"validation/image/loss_vision", "validation/video/loss_vision"} for row in told[stage])
    assert told["stage2"][0]["validation/loss"] == pytest.approx(told["stage1"][1]["validation/loss"], rel=1e-4)


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(work, tmp_path):
    """The same command under torchrun: sharded over two processes without being told, and the first one speaks for both."""
    folder, _ = work
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "openemu3.cli"]
    command += ["train", "language", "documents", "--tokenizers", "tokenizers", "--output", str(tmp_path / "run"), "--num-steps", "2"]
    command += ["--context-length", "512", "--rows-per-batch", "2", "--max-validation", "4", "--save-every", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2  # once
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert len(list(newest.glob("*.safetensors"))) == 2
    done = subprocess.run([*command, "--tp", "3"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "emu3: the mesh dp 1 x cp 1 x tp 3 has 3 ranks, but the number of processes is 2" in done.stderr
