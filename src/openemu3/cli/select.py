"""Samples to the best of them: `emu3 select`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from openemu3.cli.options import Files, Json, check_files, check_outputs, print_answer


@dataclass(frozen=True)
class Select:
    """Choose the best samples for quality tuning, by the mean of their scores. Writes a report (JSON) beside the samples.

    Every score is put on a common scale first: its percentile rank, or z-score, among the samples of the same kind.
    """

    samples: Positional[Files]
    """Parquet files of samples with scores, as `emu3 curate` writes them; at least one."""
    output: Path
    """File of samples to write, .parquet."""
    scores: tuple[str, ...] = ("hps", "mps", "aesthetic")
    """Names of the scores whose mean decides: HPSv2.1, MPS and LAION aesthetics, as `emu3 curate` calls them."""
    scale: Literal["percentile", "zscore"] = "percentile"
    """How scores of different units are made comparable."""
    image_share: float = 0.5
    """How many of the pictures are kept, the best."""
    image_min_pixels: int = 720 * 720
    """Smallest area of a picture, height times width."""
    video_share: float = 0.25
    """How many of the videos are kept, the best."""
    video_min_pixels: int = 720 * 720
    """Smallest area of a video's frames."""
    flow: str = "motion"
    """Name of the score that says how much a video moves."""
    flow_range: tuple[float, float] = (0.1, 0.95)
    """Lowest and highest percentile rank of that score: what hardly moves and what moves most is left out. 0 1 for no limits."""
    splits: tuple[str, ...] = field(default=("train",))
    """Samples of other splits are held out: they are neither ranked nor dropped."""
    json: Json = False

    def run(self) -> None:
        from openemu3.data.selection import KindRule, SelectionConfig, select_samples

        check_files("samples", self.samples)
        check_outputs([self.output], [".parquet"])
        began = time.monotonic()
        limits = None if tuple(self.flow_range) == (0, 1) else self.flow_range
        config = SelectionConfig(
            self.scores,
            self.flow,
            self.scale,
            KindRule(self.image_share, self.image_min_pixels),
            KindRule(self.video_share, self.video_min_pixels, limits),
            self.splits,
        )
        report = select_samples(self.samples, self.output, config).to_report(config)
        beside = self.output.with_suffix(".json")
        beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        answer = {"file": str(self.output), "report": str(beside), **report, "seconds": round(time.monotonic() - began, 3)}
        print_answer(self.json, describe_selection(self.output, report), answer)


def describe_selection(path: Path, report: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Counts, and a histogram of the means: a bar for all that were ranked, darker where they are kept."""
    lines = [f"{path}:"]
    for kind, counts in report["counts"].items():
        lines.append(f"  {kind}s: " + ", ".join(f"{number:,} {reason}" for reason, number in counts.items()))
        if kind not in report["histograms"]:
            continue
        histogram = report["histograms"][kind]
        most = max(histogram["ranked"])
        for low, high, ranked, kept in zip(
            histogram["edges"][:-1], histogram["edges"][1:], histogram["ranked"], histogram["kept"], strict=True
        ):
            bar = "█" * round(40 * kept / most)
            lines.append(f"    {low:6.3f} to {high:6.3f}  {bar.ljust(round(40 * ranked / most), '░')} {ranked:g}")
    return "\n".join(lines)
