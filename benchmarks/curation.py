"""How fast pictures and clips are curated, step by step, and the same steps by Data-Juicer's operators, in one run.

    python benchmarks/curation.py [--pictures FOLDER] [--videos FOLDER] [--data-juicer VENV/bin/python] [--repeats 3]

In: a folder of pictures (without one, 240 JPEGs of 1024 x 768 and as many PNGs of 512 x 512 are made) and one of films (those that
recipes/fetch_videos.py fetches; the first 10 s of each). Out: tables of items per second of processor time, the share of decoding, and for
each step that both have, and for all of them in a row, the ratio to Data-Juicer. The surprising thing: what is compared is processor time
of a process and its children, not the clock, so that a busy machine gives the same figures; the clock's are printed beside it.

The two take turns, each in a process of its own that has been warmed up, on one thread and one worker. What is the same and what is not:

    resolution     ImageShapeFilter reads the header; ours decodes the file, since one that is damaged is to be found
    look-alikes    ImageDeduplicator(phash) and ours: decode, hash, compare (ours also those that differ in two bits, and by colour)
    all, pictures  both operators; ours: list, guard, decode, size, SHA-256, colours, hash, thumbnail, decide
    size, length   VideoResolutionFilter, VideoDurationFilter; ours: probe_video, which decodes a frame
    scenes         VideoSplitBySceneMapper (ContentDetector, clips encoded by ffmpeg); ours: both detectors, clips copied where exact
    motion         VideoMotionScoreFilter at our rate and size (8 per second, 128 pixels), Farneback both
    motion, its    the same operator as it comes: 2 per second at full size; ours as above
    same film      VideoDeduplicator (MD5 of the packets); ours: SHA-256 of the file
    all, films     these in a row; ours: list, guard, scenes, clips, motion, hash, colours, decide, cut again, write samples

Not compared: text (VideoOcrAreaRatioFilter wants EasyOCR's weights, which are in no package) and aesthetics (its weights are on a hub).

Data-Juicer (PyPI: py-data-juicer) pins other versions than this project, so it lives in a virtual environment of its own; it needs ffmpeg:

    python -m venv dj && dj/bin/pip install py-data-juicer aiohttp 'av<14' opencv-python-headless torch imagededup scenedetect
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from openemu3.curation.clips import Clip, cut_clips
from openemu3.curation.filters import ImageThresholds, VideoThresholds, find_duplicates
from openemu3.curation.inspection import encode_thumbnail, hash_picture, measure_colours, open_reduced
from openemu3.curation.motion import score_clip
from openemu3.curation.pipeline import Run, RunConfig, SampleConfig, ScoreConfig, decide_all, score_items, write_manifest, write_samples
from openemu3.curation.scenes import Scene, find_scenes
from openemu3.curation.sources import SourceConfig
from openemu3.curation.text import TEXT_SIDE, TextDetector
from openemu3.data.samples import write_samples as write_file
from openemu3.media import detect_kind, probe_video

REPOSITORY = Path(__file__).resolve().parents[1]


def spend() -> float:
    """Processor seconds of this process and of its children, those that are still there as well. The peer's process has it, too."""
    total = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


PEER = r"""
import json, os, resource, sys, time
from pathlib import Path
SPEND
scratch = sys.argv[1]
os.environ["HF_DATASETS_CACHE"] = scratch + "/cache"
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import cv2
cv2.setNumThreads(1)
from loguru import logger
logger.remove()
from data_juicer.core.data import NestedDataset
from data_juicer.ops.filter.image_shape_filter import ImageShapeFilter
from data_juicer.ops.deduplicator.image_deduplicator import ImageDeduplicator
from data_juicer.ops.filter.video_resolution_filter import VideoResolutionFilter
from data_juicer.ops.filter.video_duration_filter import VideoDurationFilter
from data_juicer.ops.filter.video_motion_score_filter import VideoMotionScoreFilter
from data_juicer.ops.mapper.video_split_by_scene_mapper import VideoSplitBySceneMapper
from data_juicer.ops.deduplicator.video_deduplicator import VideoDeduplicator
def build(case, n, save):
    shape = lambda: ImageShapeFilter(min_width=8, min_height=8, num_proc=n)
    alike = lambda: ImageDeduplicator(method="phash", num_proc=n)
    size = lambda: [VideoResolutionFilter(min_width=8, min_height=8, num_proc=n), VideoDurationFilter(min_duration=0, num_proc=n)]
    scenes = lambda: VideoSplitBySceneMapper(save_dir=save, num_proc=n)
    motion = lambda **more: VideoMotionScoreFilter(min_score=0, num_proc=n, **more)
    same = lambda: VideoDeduplicator(num_proc=n)
    return {
        "resolution": lambda: [shape()],
        "look-alikes": lambda: [alike()],
        "all, pictures": lambda: [shape(), alike()],
        "size, length": size,
        "scenes": lambda: [scenes()],
        "motion": lambda: [motion(sampling_fps=8, size=128, relative=True)],
        "motion, its": lambda: [motion()],
        "same film": lambda: [same()],
        "all, films": lambda: [*size(), scenes(), motion(sampling_fps=8, size=128, relative=True), same()],
    }[case]()
number = 0
for line in sys.stdin:
    asked = json.loads(line)
    number += 1  # in the rows, or the results of the round before would be taken from a cache
    key, text = ("images", "") if asked["kind"] == "image" else ("videos", "<__dj__video>")
    data = NestedDataset.from_list([{"text": text, key: [path], "round": number} for path in asked["paths"]])
    ops = build(asked["case"], asked["workers"], f"{scratch}/clips-{number}")
    before, clock = spend(), time.perf_counter()
    for op in ops:
        data = op.run(data)
    print(json.dumps((spend() - before, time.perf_counter() - clock)), file=answers, flush=True)
"""
PICTURE_CASES = ("resolution", "look-alikes", "all, pictures")
_SECONDS = 10.0  # of each film
FILM_CASES = ("size, length", "scenes", "motion", "motion, its", "same film", "all, films")


def make_pictures(folder: Path) -> None:
    """Colourful, noisy pictures, half of them JPEGs of 1024 x 768, half PNGs of 512 x 512."""
    random = np.random.default_rng(0)
    for number in range(480):
        size = (1024, 768) if number % 2 else (512, 512)
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(small, np.int16) + random.integers(-8, 9, (size[1], size[0], 3), np.int16)
        picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:03}{'.jpg' if number % 2 else '.png'}", quality=90)


def take_first_seconds(film: Path, target: Path) -> None:
    """The packets of a film's pictures up to _SECONDS."""
    with av.open(str(film)) as source, av.open(str(target), "w") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        origin = None
        for packet in source.demux(stream):
            if packet.dts is None or packet.time_base is None:
                continue
            origin = packet.dts if origin is None else origin
            if float((packet.dts - origin) * packet.time_base) >= _SECONDS:
                break
            packet.stream = copy
            output.mux(packet)


# --------------------------------------------------------------------------------------------------------------------------------- our side


def do_case(case: str, paths: Sequence[Path], workers: int, scratch: Path) -> None:
    """The work of one case, by this project."""
    if case == "resolution":
        sizes = [open_reduced(path.read_bytes(), 256) for path in paths]
        assert all(sizes)
    elif case == "look-alikes":
        hashes = [hash_picture(opened[0]) for path in paths if (opened := open_reduced(path.read_bytes(), 256)) is not None]
        _compare(hashes)
    elif case == "size, length":
        for path in paths:
            probe_video(path)
    elif case == "scenes":
        for path in paths:
            for number, clip in enumerate(cut_clips(path, find_scenes(path))):
                (scratch / f"{path.stem}-{number}.mp4").write_bytes(clip.media)
    elif case in ("motion", "motion, its"):
        for path in paths:
            info = probe_video(path)
            score_clip(Clip(path.read_bytes(), Scene(0, 1, 0.0, info.seconds or 1.0), False, info.height, info.width), None)
    elif case == "same film":
        _compare([int(hashlib.sha256(path.read_bytes()).hexdigest()[:16], 16) for path in paths])
    else:
        run_pipeline(paths, workers, scratch, text=False)


def _compare(hashes: Sequence[int]) -> None:
    keys = np.array(hashes, np.uint64)
    find_duplicates(np.arange(len(keys), dtype=np.uint64), keys, np.zeros(len(keys)), 2)


def run_pipeline(paths: Sequence[Path], workers: int, scratch: Path, text: bool) -> None:
    """From listing to decisions, and for films to samples."""
    image = paths[0].suffix in (".jpg", ".png", ".webp")
    source = SourceConfig(kind="image" if image else "video")
    run = Run.open(scratch / "run", RunConfig(tuple(map(str, paths)), source, ScoreConfig(text=text), rows_per_part=64))
    write_manifest(run)
    score_items(run, workers=workers)
    if image:
        decide_all(run, ImageThresholds(min_width=8, min_height=8, min_aesthetic=None, max_text_coverage=1.0))
    else:
        decide_all(run, VideoThresholds(min_seconds=0.0, min_short_edge=8, min_motion=0.0, max_motion=1e6, min_aesthetic=None))
        write_samples(run, SampleConfig(), write_file)


def serve(scratch: Path) -> None:
    """Our process: cases from standard input, (processor seconds, seconds by the clock) to standard output."""
    import cv2

    cv2.setNumThreads(1)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        folder = scratch / str(number)
        folder.mkdir()
        before, clock = spend(), time.perf_counter()
        if asked["case"] == "with text":
            run_pipeline([Path(path) for path in asked["paths"]], asked["workers"], folder, text=True)
        else:
            do_case(asked["case"], [Path(path) for path in asked["paths"]], asked["workers"], folder)
        print(json.dumps((spend() - before, time.perf_counter() - clock)), flush=True)


class Side:
    """One of the two processes; it is asked for a case and answers with what that cost."""

    def __init__(self, command: Sequence[str], scratch: Path) -> None:
        scratch.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hub")}
        self._errors = open(scratch / "errors", "w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [*command, str(scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def ask(self, case: str, paths: Sequence[Path], workers: int = 1) -> tuple[float, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        kind = "image" if case in PICTURE_CASES else "video"
        self._process.stdin.write(json.dumps({"case": case, "kind": kind, "paths": list(map(str, paths)), "workers": workers}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"case {case!r} failed: {self._errors.read().strip().splitlines()[-1:]}")
        processor, clock = json.loads(line)
        return processor, clock

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


# ----------------------------------------------------------------------------------------------------------------------------- step by step


def time_steps(paths: list[Path], repeats: int) -> dict[str, float]:
    """Step -> processor seconds for one picture, the median over the repeats. In this process, one thread, nothing else around it."""
    detector = TextDetector()
    some = paths[: max(8, len(paths) // 16)]  # for the text, which takes long
    files = [path.read_bytes() for path in paths]
    small = [opened[0] for data in files if (opened := open_reduced(data, TEXT_SIDE)) is not None]
    tiny = [picture.resize((128, 96), Image.Resampling.BOX) for picture in small]
    steps: dict[str, tuple[Callable[[], Any], int]] = {
        "read": (lambda: [path.read_bytes() for path in paths], len(paths)),
        "SHA-256": (lambda: [hashlib.sha256(data).hexdigest() for data in files], len(paths)),
        "decode to 640": (lambda: [open_reduced(data, TEXT_SIDE) for data in files], len(paths)),
        "colours": (lambda: [measure_colours(np.asarray(picture)) for picture in tiny], len(tiny)),
        "perceptual hash": (lambda: [hash_picture(picture) for picture in tiny], len(tiny)),
        "thumbnail": (lambda: [encode_thumbnail(picture, 128) for picture in small], len(small)),
        "text": (lambda: [detector.measure(np.asarray(picture)) for picture in small[: len(some)]], len(some)),
    }
    costs: dict[str, float] = {}
    for name, (step, count) in steps.items():
        step()
        spent = []
        for _ in range(repeats):
            before = spend()
            step()
            spent.append(spend() - before)
        costs[name] = statistics.median(spent) / count
    return costs


def compare(ours: Side, theirs: Side | None, cases: Sequence[str], paths: Sequence[Path], repeats: int) -> dict[str, Any]:
    """Case -> items per second of both, and the ratio of processor times. The two take turns."""
    results: dict[str, Any] = {}
    for case in cases:
        spent: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for name, side in (("ours", ours), ("theirs", theirs)):
                if side is not None:
                    spent[name].append(side.ask(case, paths))
        row: dict[str, Any] = {}
        for name, rounds in spent.items():
            if rounds:
                row[name], row[f"{name}, clock"] = (len(paths) / statistics.median(column) for column in zip(*rounds, strict=True))
        if "theirs" in row:
            row["ratio"] = row["ours"] / row["theirs"]
        results[case] = row
        beside = f"{row['theirs']:9.1f} {row['ratio']:7.2f} x" if "theirs" in row else ""
        clocks = f"   by the clock {row['ours, clock']:.1f}" + (f" and {row['theirs, clock']:.1f}" if "theirs" in row else "")
        print(f"  {case:16} {row['ours']:9.1f} {beside}{clocks}", flush=True)
    return results


def time_workers(side: Side, case: str, paths: Sequence[Path], repeats: int) -> dict[str, float]:
    """What a second worker brings by the clock: with the start of the workers, and without it (the time for two items is taken off).

    Also what two cost in processor time over one, and how many cores two were given; below 2 the machine had other work.
    """
    spent: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for workers in (1, 2):
            for some in (paths[:2], paths):
                spent.setdefault((workers, len(some)), []).append(side.ask(case, some, workers))
    processor, clock = ({key: statistics.median(row[index] for row in rows) for key, rows in spent.items()} for index in (0, 1))
    few, many = 2, len(paths)
    return {
        "speed-up": clock[1, many] / clock[2, many],
        "after the start": (clock[1, many] - clock[1, few]) / (clock[2, many] - clock[2, few]),
        "processor": processor[2, many] / processor[1, many],
        "cores": processor[2, many] / clock[2, many],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures and films per second of curation, step by step, and against Data-Juicer.")
    parser.add_argument("--pictures", type=Path, help="folder of pictures; otherwise some are made")
    parser.add_argument("--videos", type=Path, default=REPOSITORY / ".cache" / "videos", help="folder of films (default: %(default)s)")
    parser.add_argument("--data-juicer", type=Path, help="python of the virtual environment that has py-data-juicer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, few pictures, no workers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    repeats = 1 if arguments.quick else arguments.repeats
    results: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        (scratch / "pictures").mkdir()
        (scratch / "films").mkdir()
        if arguments.pictures is None:
            make_pictures(scratch / "pictures")
        pictures = sorted(path for path in (arguments.pictures or scratch / "pictures").iterdir() if is_still(path))
        pictures = pictures[:32] if arguments.quick else pictures
        for film in sorted(arguments.videos.iterdir()) if arguments.videos.is_dir() else []:
            take_first_seconds(film, scratch / "films" / film.name)
        films = sorted((scratch / "films").iterdir())
        seconds = sum(probe_video(film).seconds or 0.0 for film in films)

        costs = time_steps(pictures, repeats)
        whole = sum(costs.values())
        print(f"{len(pictures)} pictures; processor time of one core, steps by themselves")
        for name, cost in costs.items():
            print(f"  {name:16} {1 / cost if cost else float('inf'):9.1f} pictures/s  {cost / whole:6.1%}")
        print(f"  {'all steps':16} {1 / whole:9.1f} pictures/s; decoding is {costs['decode to 640'] / whole:.1%}", end="")
        print(f", without text {costs['decode to 640'] / (whole - costs['text']):.1%}", flush=True)
        results["steps"] = {name: 1 / cost for name, cost in costs.items() if cost}

        ours = Side([sys.executable, __file__, "--serve"], scratch / "ours")
        code = PEER.replace("SPEND", inspect.getsource(spend))
        theirs = Side([str(arguments.data_juicer), "-c", code], scratch / "theirs") if arguments.data_juicer else None
        for side in (ours, theirs):  # imports, and what is set up once
            if side is not None:
                side.ask("all, pictures", pictures[:2])
        print("ours, Data-Juicer: pictures per second of processor time")
        results["pictures"] = compare(ours, theirs, PICTURE_CASES, pictures, repeats)
        some = pictures[: max(8, len(pictures) // 8)]
        print("ours, with the search for text, which Data-Juicer's operators cannot do here")
        results["with text"] = compare(ours, None, ["with text"], some, repeats)
        if films:
            print(f"ours, Data-Juicer: films per second of processor time; {len(films)} films of {seconds:.0f} s in all")
            results["films"] = compare(ours, theirs, FILM_CASES, films, repeats)
            rate = seconds / len(films) * results["films"]["all, films"]["ours"]
            print(f"  {'all, films':16} {rate:9.1f} seconds of film per second of processor time, without text")
            results["film seconds"] = {"per second": rate, "seconds": seconds, "films": len(films)}
        if not arguments.quick:
            print("a second worker: speed by the clock, the same after the start, processor time, and how many cores two had")
            results["workers"] = {}
            for name, side in (("ours", ours), ("Data-Juicer", theirs)):
                if side is not None:
                    row = results["workers"][name] = time_workers(side, "all, pictures", pictures, repeats)
                    speeds = f"{row['speed-up']:9.2f} x  {row['after the start']:.2f} x"
                    print(f"  {name:16} {speeds}  {row['processor']:.2f} x  {row['cores']:.2f} cores", flush=True)
        for side in (ours, theirs):
            if side is not None:
                side.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def is_still(path: Path) -> bool:
    """Whether both sides can open it: a picture that does not move."""
    return path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and detect_kind(path) == "image"


if __name__ == "__main__":
    main()
