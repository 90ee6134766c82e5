"""A whole run: the same set of samples whatever happened on the way, decisions after scores, and nothing that ends it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openemu3.curation import pipeline
from openemu3.curation.filters import ImageThresholds
from openemu3.curation.pipeline import (
    SCORES_SCHEMA,
    Run,
    RunConfig,
    SampleConfig,
    ScoreConfig,
    decide_all,
    list_kept,
    read_thresholds,
    score_items,
    write_manifest,
    write_samples,
)
from openemu3.curation.report import write_report
from openemu3.data.samples import read_samples
from openemu3.data.samples import write_samples as write_file
from openemu3.records import InputError

Draw = Callable[..., Image.Image]
THRESHOLDS = ImageThresholds(min_width=64, min_height=64, min_aesthetic=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draw_scene: Draw, draw_text: Draw) -> Path:
    """12 files, of which 4 are good and different."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        draw_scene(number).save(folder / f"good{number}.png")
        (folder / f"good{number}.txt").write_text(f"scene {number} <|image start|>")
    draw_scene(0).save(folder / "same_pixels.png", compress_level=1)
    (folder / "same_file.png").write_bytes((folder / "good1.png").read_bytes())
    draw_scene(9).convert("L").save(folder / "grey.png")
    draw_scene(8, 40, 40).save(folder / "small.png")
    draw_text().save(folder / "words.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "link.jpg").symlink_to("/etc/hostname")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.open(tmp_path_factory.mktemp("out") / "run", RunConfig((str(folder),), rows_per_part=5))
    assert write_manifest(run) == 12
    score_items(run)
    decide_all(run, THRESHOLDS)
    write_samples(run, SampleConfig(per_file=3), write_file)
    return run


def read_all(run: Run) -> list[str]:
    return [sample.id.split("/")[-1] for path in sorted((run.folder / "samples").glob("*.parquet")) for sample in read_samples(path)]


def test_every_file_is_kept_or_has_its_reason(finished: Run) -> None:
    table = pq.read_table(finished.folder / "decisions.parquet")
    decided = {row["id"].split("/")[-1]: (row["step"], row["reason"]) for row in table.to_pylist()}
    assert read_thresholds(finished) == THRESHOLDS
    assert decided == {
        "good0.png": ("", ""),
        "good1.png": ("", ""),
        "good2.png": ("", ""),
        "good3.png": ("", ""),
        "same_file.png": ("duplicates", "the same file"),
        "same_pixels.png": ("duplicates", "nearly the same"),
        "grey.png": ("colours, if not aesthetic", "monochrome"),
        "small.png": ("resolution", "below 64 x 64 pixels"),
        "words.png": ("text, if not aesthetic", "text on more than 5.0%"),
        "broken.jpg": ("decode", "unreadable"),
        "empty.jpg": ("decode", "empty"),
        "link.jpg": ("decode", "symlink"),
    }
    assert read_all(finished) == [f"good{number}.png" for number in range(4)]


def test_samples_carry_the_file_its_caption_and_its_scores(finished: Run, folder: Path) -> None:
    sample = next(read_samples(finished.folder / "samples" / "samples-00000.parquet"))
    assert sample.media == (folder / "good0.png").read_bytes()
    assert sample.captions == {"en": "scene 0 <|image start|>"}
    assert set(sample.scores) == {"text_coverage", "colour_spread", "contrast"}
    assert sample.attributes == {"source": "curated", "width": "96", "height": "80"}


def test_new_thresholds_are_applied_without_opening_a_file(finished: Run, folder: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "copy", finished.config)
    subprocess.run(["cp", "-r", finished.folder, run.folder], check=True)
    os.rename(folder, folder.with_name("away"))
    try:
        counts = decide_all(run, ImageThresholds(min_width=97, min_height=8, min_aesthetic=None, max_text_coverage=1.0))
        assert counts["kept"] == 0 and counts["resolution: below 97 x 8 pixels"] == 8  # only "words" is wider, and has no colours
        report = write_report(run)
        assert report["kept"] == counts["kept"]
    finally:
        os.rename(folder.with_name("away"), folder)
    files = write_samples(run, SampleConfig(), write_file)
    assert sum(1 for path in files for _ in read_samples(path)) == counts["kept"]
    assert sorted((run.folder / "samples").glob("*.parquet")) == files  # those of the earlier decisions are gone


def test_the_report_counts_what_was_decided_and_needs_nothing_else(finished: Run) -> None:
    report = write_report(finished)
    assert report["kept"] == 4 and report["rows"] == 12
    entered = 12
    for step in report["funnel"]:
        assert step["entered"] == entered
        entered = step["passed"]
    assert entered == 4
    histogram = report["histograms"]["text_coverage"]
    assert sum(histogram["kept"]) == 4 and sum(histogram["dropped"]) == 5
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "4 of 12 pictures kept" in page and page.count("data:image/webp;base64,") == 9 + 2
    # Two are duplicates, which stand beside what they duplicate.
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert json.loads((finished.folder / "report.json").read_text(encoding="utf-8")) == report


def test_a_folder_belongs_to_one_run(finished: Run, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="other sources or scores"):
        Run.open(finished.folder, RunConfig((str(folder),), rows_per_part=6))
    assert Run.open(finished.folder, finished.config) == Run.load(finished.folder) == finished
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no curation run"):
        Run.open(tmp_path, finished.config)
    with pytest.raises(InputError, match="holds no curation run"):
        Run.load(tmp_path)


def test_a_file_that_changed_since_it_was_scored_is_left_out(finished: Run, folder: Path, tmp_path: Path, draw_scene: Draw) -> None:
    path = folder / "good2.png"
    before = path.read_bytes()
    draw_scene(77).save(path)
    try:
        kept = list_kept(finished)
        offsets = pipeline.find_offsets(finished)
        samples = list(pipeline.iterate_samples(finished, SampleConfig(), kept, offsets))
    finally:
        path.write_bytes(before)
    assert [sample.id.split("/")[-1] for sample in samples] == ["good0.png", "good1.png", "good3.png"]


def start(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "openemu3.cli", "curate", "images", str(folder), "--output", str(output), "--no-aesthetic"]
    flags = ["--rows-per-part", "2", "--min-width", "64", "--min-height", "64"]
    return subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def check_killed_runs(folder: Path, output: Path, kills: int, expected: list[str]) -> None:
    """Runs that are killed when so many more parts are there, and one that is not."""
    draw = random.Random(0)
    for _ in range(kills):
        process = start(folder, output)
        parts = len(list(output.glob("scores/*.parquet"))) + draw.choice([0, 1])
        delay = draw.uniform(0, 0.3)
        while process.poll() is None and len(list(output.glob("scores/*.parquet"))) <= parts and not list(output.glob("samples/*")):
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folder, output).wait() == 0
    names = [sample.id.split("/")[-1] for path in sorted(output.glob("samples/*.parquet")) for sample in read_samples(path)]
    assert names == expected


def test_a_run_that_was_killed_gives_the_same_samples(finished: Run, folder: Path, tmp_path: Path) -> None:
    check_killed_runs(folder, tmp_path / "run", 1, read_all(finished))


@pytest.mark.slow
def test_a_run_that_was_killed_ten_times_gives_the_same_samples(finished: Run, folder: Path, tmp_path: Path) -> None:
    check_killed_runs(folder, tmp_path / "run", 10, read_all(finished))


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_scores(finished: Run, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "openemu3.cli", "curate", "images", str(folder), "--output", str(tmp_path / "run"), "--no-aesthetic"]
    flags = ["--runner", "ray", "--rows-per-part", "5", "--min-width", "64", "--min-height", "64"]
    subprocess.run([*command, *flags], check=True, timeout=400)
    columns = [name for name in SCORES_SCHEMA.names if not name.startswith("seconds_")]
    for number in range(finished.num_parts):
        one, other = (pq.read_table(run.scores_part(number), columns=columns) for run in (finished, Run.load(tmp_path / "run")))
        assert one.equals(other)


@pytest.mark.slow
def test_deciding_over_a_million_rows_takes_seconds_and_little_memory(tmp_path: Path) -> None:
    """Real columns, made-up values, in a process of its own; memory is compared with a tenth of the rows."""
    peaks = []
    for rows in (100_000, 1_000_000):
        folder = tmp_path / str(rows)
        make_scores(folder, rows)
        code = (
            "import sys, time\n"
            "read_peak = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
            "from openemu3.curation.pipeline import Run, decide_all\n"
            "from openemu3.curation.report import write_report\n"
            "from openemu3.curation.filters import ImageThresholds\n"
            "run = Run.load(sys.argv[1]); began = time.time()\n"
            "before = read_peak()\n"
            "counts = decide_all(run, ImageThresholds(min_aesthetic=5.5)); write_report(run)\n"
            "print(read_peak() - before, time.time() - began, counts['kept'])\n"
        )
        output = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True).stdout.split()
        peaks.append(int(output[0]) / 1024)
        assert 0 < int(output[2]) < rows
    assert peaks[1] - peaks[0] < 40, f"{peaks} MB above the start"  # 17 bytes for each row that passes all thresholds, 11 MB here
    assert float(output[1]) < 120, f"{output[1]} s for a million rows"


@pytest.mark.slow
def test_a_film_of_two_hours_takes_no_more_memory_than_one_of_ten_minutes(tmp_path: Path) -> None:
    """Looked at as in the guarded process: of each clip a row and a thumbnail is held, not the film."""
    peaks = []
    for minutes in (10, 120):
        path = tmp_path / f"{minutes}.mkv"
        write_long_film(path, minutes)
        code = (
            "import sys\n"
            "from pathlib import Path\n"
            "from openemu3.curation.films import inspect_video\n"
            "item = {'id': 'film', 'uri': Path(sys.argv[1]).as_uri()}\n"
            "limits = {'max_bytes': 1, 'working_side': 640, 'thumbnail_side': 128, 'text': False, 'keep_pixels': False}\n"
            "answer, parts = inspect_video({'item': item, **limits}, b'', lambda: None)\n"
            "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
            "print(peak, len(answer['rows']), sum(map(len, parts)), answer['rows'][0]['num_bytes'])\n"
        )
        output = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True).stdout.split()
        peaks.append([int(output[0]) // 1024, int(output[1]), int(output[2]) >> 20, int(output[3]) >> 20])
    told = f"(MB at most, clips, MB of thumbnails, MB of film): {peaks}"
    (tmp_path / "peaks.txt").write_text(told)
    assert peaks[1][1] == 12 * peaks[0][1] >= 12 * 60, told
    assert peaks[1][0] - peaks[0][0] < 60 < peaks[1][3], told


def write_long_film(path: Path, minutes: int) -> None:
    """320 x 180 at 2 frames a second; another scene every 10 s."""
    import av

    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt, stream.options = 320, 180, "yuv420p", {"preset": "ultrafast", "crf": "10"}
        for scene in range(minutes * 6):
            texture = np.repeat(np.repeat(random.integers(0, 256, (48, 80, 3), np.uint8), 4, 0), 4, 1) // 2 + 127 * (scene % 2)
            for index in range(20):
                array = np.ascontiguousarray(texture[index % 12 : index % 12 + 180, :320].astype(np.uint8))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def make_scores(folder: Path, rows: int, per_part: int = 10_000) -> None:
    run = Run.open(folder, RunConfig(("made up",), score=ScoreConfig(), rows_per_part=per_part))
    draw = np.random.default_rng(0)
    for number in range(rows // per_part):
        columns = {
            "id": [f"made/{number}/{index}.jpg" for index in range(per_part)],
            "captions": pa.array([[("en", "a caption")]] * per_part, pa.map_(pa.string(), pa.string())),
            "reason": [""] * per_part,
            "sha256": [f"{value:016x}" for value in draw.integers(0, 2**63, per_part)],
            "hash": draw.integers(0, 2**64, per_part, dtype=np.uint64),
            "width": draw.integers(300, 2000, per_part, dtype=np.int32),
            "height": draw.integers(300, 2000, per_part, dtype=np.int32),
            "aesthetic": draw.normal(5.2, 0.8, per_part),
            "text_coverage": draw.exponential(0.02, per_part),
            "colour_spread": draw.exponential(15, per_part),
        }
        table = pa.table({field.name: columns.get(field.name, pa.nulls(per_part, field.type)) for field in SCORES_SCHEMA}).cast(
            SCORES_SCHEMA
        )
        for path in (run.manifest_part(number), run.scores_part(number)):
            pipeline.write_table(path, table)
    (folder / "manifest" / "complete.json").write_text(json.dumps({"parts": rows // per_part, "items": rows}))
