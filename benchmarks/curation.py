"""How fast pictures are curated: each step, the whole pipeline, and the same steps by Data-Juicer's operators, in one run.

    python benchmarks/curation.py [--pictures FOLDER] [--data-juicer VENV/bin/python] [--repeats 3]

In: a folder of pictures; without one, 120 JPEGs of 1024 x 768 and as many PNGs of 512 x 512 are made. Out: a table of pictures per second
of one core, the share of time in decoding, and the ratio to Data-Juicer. The surprising thing: what is counted is processor time of the
process and its children, not the clock, so that a busy machine gives the same figures; the clock's are printed beside it.

Data-Juicer (PyPI: py-data-juicer) pins other versions than this project, so it lives in a virtual environment of its own:

    python -m venv dj && dj/bin/pip install py-data-juicer aiohttp av opencv-python-headless torch
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openemu3.curation.inspection import encode_thumbnail, hash_picture, measure_colours
from openemu3.curation.pipeline import Run, RunConfig, ScoreConfig, score_items, write_manifest
from openemu3.curation.text import TextDetector
from openemu3.media import open_image

PEER = r"""
import json, os, resource, sys, time
os.environ["HF_DATASETS_CACHE"] = sys.argv[2]
from loguru import logger
logger.remove()
from data_juicer.core.data import NestedDataset
from data_juicer.ops.filter.image_shape_filter import ImageShapeFilter
from data_juicer.ops.filter.image_aspect_ratio_filter import ImageAspectRatioFilter
from data_juicer.ops.filter.image_size_filter import ImageSizeFilter
paths = sorted(os.path.join(sys.argv[1], name) for name in os.listdir(sys.argv[1]))
def spend():
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
rounds = []
for repeat in range(int(sys.argv[3])):
    data = NestedDataset.from_list([{"text": "", "images": [path], "round": repeat} for path in paths])
    before, clock = spend(), time.perf_counter()
    for op in (ImageShapeFilter(min_width=8, min_height=8, num_proc=1), ImageAspectRatioFilter(num_proc=1), ImageSizeFilter(num_proc=1)):
        data = op.run(data)
    rounds.append((spend() - before, time.perf_counter() - clock, len(data)))
print("ROUNDS", json.dumps(rounds))
"""


def spend() -> float:
    """Processor seconds of this process and of its children, those that are still there as well."""
    total = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


@contextmanager
def measured(into: list[tuple[float, float]]) -> Iterator[None]:
    """Appends (processor seconds, seconds by the clock)."""
    before, clock = spend(), time.perf_counter()
    yield
    into.append((spend() - before, time.perf_counter() - clock))


def make_pictures(folder: Path) -> None:
    """Colourful, noisy pictures: JPEGs of 1024 x 768, PNGs of 512 x 512."""
    random = np.random.default_rng(0)
    for number in range(240):
        size = (1024, 768) if number % 2 else (512, 512)
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(small, np.int16) + random.integers(-8, 9, (size[1], size[0], 3), np.int16)
        picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:03}{'.jpg' if number % 2 else '.png'}", quality=90)


def time_steps(paths: list[Path], repeats: int) -> dict[str, float]:
    """Step -> processor seconds for one picture, the median over the repeats. In this process, one thread, nothing else around it."""
    detector = TextDetector(640)
    files = [path.read_bytes() for path in paths]
    pictures = [open_image(data) for data in files]
    small = []
    for picture in pictures:
        copy = picture.copy()
        copy.thumbnail((640, 640), Image.Resampling.BOX)
        small.append(copy)
    steps: dict[str, Callable[[], Any]] = {
        "read": lambda: [path.read_bytes() for path in paths],
        "decode": lambda: [open_image(data) for data in files],
        "shrink": lambda: [picture.copy().thumbnail((640, 640), Image.Resampling.BOX) for picture in pictures],
        "colours": lambda: [measure_colours(np.asarray(picture.resize((128, 96)))) for picture in small],
        "perceptual hash": lambda: [hash_picture(picture) for picture in small],
        "thumbnail": lambda: [encode_thumbnail(picture, 128) for picture in small],
        "text": lambda: [detector.measure(np.asarray(picture)) for picture in small[: max(8, len(small) // 8)]],
    }
    costs: dict[str, float] = {}
    for name, step in steps.items():
        spent: list[tuple[float, float]] = []
        count = max(8, len(small) // 8) if name == "text" else len(paths)
        for _ in range(repeats):
            with measured(spent):
                step()
        costs[name] = statistics.median(processor for processor, _ in spent) / count
    return costs


def time_pipeline(folder: Path, text: bool) -> tuple[float, float]:
    """The whole run on Daft, with the guarded processes, in a process of its own: processor seconds and seconds by the clock."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--pictures", str(folder), "--only-pipeline", scratch, *([] if text else ["--no-text"])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        processor, clock = json.loads(output.strip().splitlines()[-1])
        return processor, clock


def run_pipeline(folder: Path, scratch: Path, text: bool) -> None:
    """In the process of its own: from listing to scores. Imports are made before; starting the guarded process counts."""
    warm = Run.open(scratch / "warm", RunConfig((str(sorted(folder.iterdir())[0]),), score=ScoreConfig(text=text)))
    write_manifest(warm)
    score_items(warm)
    run = Run.open(scratch / "run", RunConfig((str(folder),), score=ScoreConfig(text=text), rows_per_part=64))
    before, clock = spend(), time.perf_counter()
    write_manifest(run)
    score_items(run)
    print(json.dumps((spend() - before, time.perf_counter() - clock)))


def time_peer(python: Path, folder: Path, repeats: int) -> tuple[float, float]:
    """Data-Juicer's filters for shape, aspect ratio and size of file: median processor seconds and seconds by the clock, all pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": scratch}
        command = [str(python), "-c", PEER, str(folder), scratch, str(repeats)]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [line for line in finished.stdout.splitlines() if line.startswith("ROUNDS")]
        if not lines:
            raise SystemExit(f"Data-Juicer did not run: {finished.stderr.strip().splitlines()[-1:]}")
        rounds = json.loads(lines[0].removeprefix("ROUNDS"))
        return statistics.median(row[0] for row in rounds), statistics.median(row[1] for row in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures per second of curation, step by step, and against Data-Juicer.")
    parser.add_argument("--pictures", type=Path, help="folder of pictures; otherwise some are made")
    parser.add_argument("--data-juicer", type=Path, help="python of the virtual environment that has py-data-juicer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--only-pipeline", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-text", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_pipeline:
        run_pipeline(arguments.pictures, arguments.only_pipeline, not arguments.no_text)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.pictures or Path(made)
        if arguments.pictures is None:
            make_pictures(folder)
        paths = sorted(folder.iterdir())
        arguments.repeats = 1 if arguments.quick else arguments.repeats
        costs = time_steps(paths, arguments.repeats)
        whole = sum(costs.values())
        print(f"{len(paths)} pictures; processor time of one core")
        for name, cost in costs.items():
            print(f"  {name:16} {1 / cost if cost else float('inf'):9.1f} pictures/s  {cost / whole:6.1%}")
        print(f"  {'all steps':16} {1 / whole:9.1f} pictures/s; decoding is {costs['decode'] / whole:.1%}")
        print(f"  {'all but text':16} {1 / (whole - costs['text']):9.1f} pictures/s; of these decoding is ", end="")
        print(f"{costs['decode'] / (whole - costs['text']):.1%}")
        results: dict[str, Any] = {"pictures": len(paths), "pictures_per_second": {name: 1 / cost for name, cost in costs.items()}}
        results["decoding_share"] = costs["decode"] / whole
        for text in (False, True):
            processor, clock = time_pipeline(folder, text)
            name = "pipeline" if text else "without text"
            results[name] = {"processor": len(paths) / processor, "clock": len(paths) / clock}
            print(f"  {name:16} {len(paths) / processor:9.1f} pictures/s, {len(paths) / clock:.1f} by the clock; on Daft, guarded")
        if arguments.data_juicer:
            theirs, their_clock = time_peer(arguments.data_juicer, folder, arguments.repeats)
            results["data_juicer"] = {"processor": len(paths) / theirs, "clock": len(paths) / their_clock}
            results["ratio"] = results["without text"]["processor"] / results["data_juicer"]["processor"]
            print(
                "Data-Juicer, its filters of shape, aspect ratio and file size (ours find these, colours, hashes and thumbnails besides):"
            )
            print(f"  {'Data-Juicer':16} {len(paths) / theirs:9.1f} pictures/s, {len(paths) / their_clock:.1f} by the clock")
            print(f"  ratio            {results['ratio']:9.2f} x processor time")
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
