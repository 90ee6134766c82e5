"""emu3 curate as people use it, on to emu3 tokenize: pictures with a tiny CLIP, films, captions, new thresholds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import openemu3
from openemu3.cli import main
from openemu3.curation.clip_scores import AestheticPredictor, build_aesthetic_head
from openemu3.curation.clips import cut_clips
from openemu3.curation.motion import score_clip
from openemu3.curation.pipeline import Run, SampleConfig, find_offsets, iterate_samples, list_kept
from openemu3.curation.scenes import find_scenes
from openemu3.data.samples import read_samples

Draw = Callable[..., Image.Image]
MINI = Path(openemu3.__file__).parent / "assets" / "mini"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return answer


def test_pictures_become_samples_that_tokenize_takes(
    clip_folder: Path, draw_scene: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        draw_scene(number, 72, 64).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"scene number {number}")
    draw_scene(5, 72, 64).convert("L").save(folder / "grey.png")
    save_file({f"layers.{name}": value for name, value in build_aesthetic_head(64).state_dict().items()}, tmp_path / "head.safetensors")
    models = ["--aesthetic-clip", clip_folder, "--aesthetic-head", tmp_path / "head.safetensors", "--embed"]
    sizes = ["--min-width", 64, "--min-height", 64]
    answer = run(capsys, "curate", "images", folder, "--output", out, *models, *sizes)
    assert (answer["kept"], answer["rows"]) == (4, 5)  # a random head gives scores below 5.5, so that all are rescued but the grey one
    samples = list(read_samples(answer["files"][0]))
    assert all("aesthetic" in sample.scores for sample in samples)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["below_aesthetic"], report["rescued"]) == (5, 4)

    chosen = run(capsys, "curate", "representatives", out, "--pictures-per-cluster", 2, "--per-cluster", 1)
    assert chosen["of"] == 5 and 2 <= chosen["chosen"] < 5 and sum(chosen["counts"].values()) == chosen["chosen"]
    written = [sample for path in chosen["files"] for sample in read_samples(path)]
    assert len(written) == chosen["chosen"]
    assert all({"category", "cluster"} <= sample.attributes.keys() and sample.attributes["source"] == "understanding" for sample in written)

    assert run(capsys, "curate", "report", out, "--min-aesthetic", -100)["kept"] == 5  # even grey is beautiful enough now
    assert run(capsys, "curate", "report", out, "--min-width", 73, "--samples")["files"] == []


def test_the_chain_from_a_film_to_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "films", tmp_path / "out"
    folder.mkdir()
    write_film(folder / "film.mp4")
    (folder / "film.txt").write_text("squares that wander")
    (folder / "same.mp4").write_bytes((folder / "film.mp4").read_bytes())
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 nothing more")
    flags = ["--no-aesthetic", "--min-short-edge", 48, "--max-motion", 1, "--max-hash-distance", -1, "--max-text-coverage", 1]
    answer = run(capsys, "curate", "videos", folder, "--output", out, *flags)
    assert answer["kept"] == 2 and answer["funnel"][0]["dropped"] == {"unreadable": 1}
    assert answer["funnel"][-1]["dropped"] == {"the same file": 2}
    samples = list(read_samples(answer["files"][0]))
    assert [sample.attributes["start"] for sample in samples] == ["0.0", "1.6"]
    assert [sample.id for sample in samples] == ["films/film.mp4@0-16", "films/film.mp4@16-32"]
    # A film that is a file of its own is read as a stream, so that no limit on what is held concerns it; its clips are cut in one call.
    small = Run.load(out)
    small = replace(small, config=replace(small.config, score=replace(small.config.score, max_bytes=100)))
    again = list(iterate_samples(small, SampleConfig(), list_kept(small), find_offsets(small)))
    assert again == samples
    for sample in samples:
        frames, _ = openemu3.media.read_video(sample.media)
        assert frames.shape[1] == 16 and sample.scores["motion"] > 0
    flags = ["--tokenizers", MINI, "--output", tmp_path / "documents", "--resolution", 64, "--languages", "en"]
    assert main([*map(str, ["tokenize", *answer["files"], *flags])]) == 0
    assert list((tmp_path / "documents").glob("**/*.parquet"))
    (folder / "film.mp4").write_bytes((folder / "film.mp4").read_bytes() + b"more")
    gone = run(capsys, "curate", "report", out, "--samples", "--min-seconds", 0.9)
    assert gone["left_out"] == 0 and gone["kept"] == 2  # written already
    gone = run(capsys, "curate", "report", out, "--samples", "--source-name", "again")
    assert gone["left_out"] == gone["kept"] == 2


def test_a_clips_beauty_is_that_of_its_worst_frame(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames go to the models as JPEG; the score is nearly that of the frames themselves."""
    film, head = tmp_path / "film.mp4", tmp_path / "head.safetensors"
    write_film(film)
    save_file({f"layers.{name}": value for name, value in build_aesthetic_head(64).state_dict().items()}, head)
    models = ["--aesthetic-clip", clip_folder, "--aesthetic-head", head, "--no-text"]
    flags = ["--min-short-edge", 48, "--max-motion", 1, "--min-aesthetic", -100, "--max-hash-distance", -1]
    answer = run(capsys, "curate", "videos", film, "--output", tmp_path / "out", *models, *flags)
    assert answer["kept"] == 2
    predictor = AestheticPredictor.load(str(clip_folder), str(head), "cpu")
    for clip, sample in zip(cut_clips(film, find_scenes(film)), read_samples(answer["files"][0]), strict=True):
        frames = [Image.fromarray(frame) for frame in score_clip(clip, None).frames]
        scores = predictor.score_embeddings(predictor.clip.embed_pictures(frames))
        assert sample.scores["aesthetic"] == pytest.approx(min(scores), abs=0.02)
        assert len(scores) == 3 and max(scores) - min(scores) > 0


def write_film(path: Path) -> None:
    """Two scenes of 16 frames at 10 a second: textured squares that move over a bright and a dark ground."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for ground in (220, 30):
            texture = random.integers(0, 256, (24, 24, 3), np.uint8)
            for index in range(16):
                array = np.full((64, 96, 3), ground, np.uint8)
                array[20:44, 10 + 3 * index : 34 + 3 * index] = texture
                for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_captions_of_our_own_model(draw_scene: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from openemu3.data.samples import write_samples
    from openemu3.records import Sample

    samples = []
    for number in range(2):
        draw_scene(number, 64, 64).save(tmp_path / "x.png")
        captions = {"en": "there already"} if number else {}
        samples.append(Sample(str(number), "image", (tmp_path / "x.png").read_bytes(), captions, {}, "train", {"aesthetic": 5.0}))
    write_samples(tmp_path / "in.parquet", samples)
    answer = run(capsys, "curate", "captions", tmp_path / "in.parquet", "--model", "mini", "--output", tmp_path / "out", "--only-missing")
    assert answer["counts"]["left"] == 1 and sum(answer["counts"].values()) == 2
    written = list(read_samples(answer["files"][0]))
    assert [sample.id for sample in written] == ["0", "1"] and written[1].captions == {"en": "there already"}
    assert written[0].media == samples[0].media and written[0].scores == {"aesthetic": 5.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "FOLDER", "--output", "OUT"], "the aesthetic step needs two models: fetch openai/clip-vit-large-patch14"),
        (["images", "FOLDER", "--output", "OUT", "--no-aesthetic"], "there are no images in"),
        (["images", "FOLDER/none", "--output", "OUT", "--no-aesthetic"], "is not there"),
        (["report", "FOLDER"], "holds no curation run"),
        (["captions", "x.parquet", "--output", "OUT"], "captions come from an endpoint"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    places = {"FOLDER": str(tmp_path / "in"), "FOLDER/none": str(tmp_path / "in" / "none"), "OUT": str(tmp_path / "out")}
    assert main(["curate", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
