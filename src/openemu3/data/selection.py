"""Choosing the best samples for quality tuning (QFT; paper, section 2.5.1): scores on one scale, their mean, the top share.

In: Parquet files of samples with a column `scores`, a map of names to numbers. Out: one such file with the chosen samples, whose scores
have one more entry, "quality", and a report of counts and a histogram. HPSv2.1, MPS and LAION-aesthetics have different units, so each is
put on a common scale first: its percentile rank among the samples of the same kind, or its z-score there.
The surprising thing: only scores (and, for resolutions, the headers of media) are read to rank; media are copied one row group at a time.

The paper names the scores, their mean, and stricter limits of resolution and optical flow for videos; its numbers are unpublished.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from openemu3.media import probe_video
from openemu3.records import InputError

SCORES_TYPE = pa.map_(pa.string(), pa.float64())
QUALITY = "quality"
NUM_BINS = 20
KINDS = ("image", "video")


@dataclass(frozen=True)
class KindRule:
    """What samples of one kind must be.

    Args:
        share: of those that pass everything else, how many are kept, the best; above 0, at most 1.
        min_pixels: height times width of the file, at least.
        flow: lowest and highest percentile rank (0 to 1) of the score named by SelectionConfig.flow; None: no limits.
    """

    share: float = 0.5
    min_pixels: int = 0
    flow: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}; above 0 and at most 1 is allowed")
        if self.min_pixels < 0:
            raise InputError(f"min_pixels is {self.min_pixels}; 0 or more is allowed")
        if self.flow is not None and not 0 <= self.flow[0] < self.flow[1] <= 1:
            raise InputError(f"flow is {self.flow}; two percentile ranks, 0 <= lowest < highest <= 1, are allowed")


@dataclass(frozen=True)
class SelectionConfig:
    """Which scores are averaged, how they are made comparable, and what each kind must be.

    Args:
        scores: names of the entries that are averaged.
        flow: name of the entry with a video's optical flow.
        scale: "percentile": (rank - 1/2) / number, equal values sharing the mean of their ranks; it depends on order alone, so one
            outlier cannot decide. "zscore": (value - mean) / standard deviation.
        splits: samples of other splits are held out: they are neither ranked nor dropped.
    """

    scores: tuple[str, ...] = ("hps", "mps", "aesthetic")
    flow: str = "motion"
    scale: Literal["percentile", "zscore"] = "percentile"
    images: KindRule = field(default_factory=lambda: KindRule(0.5, 720 * 720))
    videos: KindRule = field(default_factory=lambda: KindRule(0.25, 720 * 720, (0.1, 0.95)))
    splits: tuple[str, ...] = ("train",)

    def __post_init__(self) -> None:
        if not self.scores or QUALITY in self.scores:
            raise InputError(f"scores are {list(self.scores)}; at least one is needed, and none may be {QUALITY!r}, which is their mean")
        if self.scale not in ("percentile", "zscore"):
            raise InputError(f"scale is {self.scale!r}; allowed are 'percentile' and 'zscore'")


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Args:
        keep: bool [n], for each sample of the files in their order.
        quality: float64 [n], NaN where a sample was not ranked.
        counts: kind -> how many were read, left out for which reason, kept.
        histograms: kind -> edges [21] of equal bins and the numbers of ranked and of kept samples in each [20].
    """

    keep: NDArray[np.bool_]
    quality: NDArray[np.float64]
    counts: dict[str, dict[str, int]]
    histograms: dict[str, dict[str, list[float]]]

    def to_report(self, config: SelectionConfig) -> dict[str, Any]:
        """Plain values, for JSON."""
        rules = {"image": vars(config.images), "video": vars(config.videos)}
        return {
            "scores": list(config.scores),
            "scale": config.scale,
            "rules": {kind: rules[kind] for kind in self.counts},
            "counts": self.counts,
            "histograms": self.histograms,
        }


def select_samples(paths: Sequence[Path], output: Path, config: SelectionConfig) -> Selection:
    """Rank the samples of some files and write those that are chosen, in order, to one file, which appears only when complete.

    Raises InputError for files without scores, for a score that no sample has, and if nothing is left of the splits.
    """
    selection = choose_samples(paths, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    schema = _open(paths[0]).schema_arrow
    place = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for path in paths:
                file = _open(path)
                if not file.schema_arrow.equals(schema):
                    raise InputError(f"{path} has other columns than {paths[0]}; select from files of one form")
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    part = slice(place, place + len(table))
                    place += len(table)
                    if selection.keep[part].any():
                        writer.write_table(_add_quality(table, selection.quality[part]).filter(pa.array(selection.keep[part])))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return selection


def choose_samples(paths: Sequence[Path], config: SelectionConfig) -> Selection:
    """Which samples are chosen, without writing any."""
    if not paths:
        raise InputError("no file of samples was given; at least one is needed")
    rows = [row for path in paths for row in _read_scores(path, config)]
    quality = np.full(len(rows), np.nan)
    keep = np.zeros(len(rows), bool)
    counts: dict[str, dict[str, int]] = {}
    histograms: dict[str, dict[str, list[float]]] = {}
    for kind, rule in (("image", config.images), ("video", config.videos)):
        members = [index for index, row in enumerate(rows) if row["kind"] == kind]
        if not members:
            continue
        count: Counter[str] = Counter({"read": len(members)})
        ranked = _pass_limits(members, rows, rule, config, count)
        for index in members:
            keep[index] = rows[index]["split"] not in config.splits
        count["held out"] = int(keep[members].sum())
        if ranked:
            scaled = [scale_scores(np.array([rows[index]["scores"][name] for index in ranked]), config.scale) for name in config.scores]
            means = np.mean(scaled, axis=0)
            quality[ranked] = means
            # Of equal means the earlier sample is kept, so that the number is exactly the share.
            best = np.argsort(-means, kind="stable")[: max(1, round(rule.share * len(ranked)))]
            keep[np.array(ranked)[best]] = True
            count["kept"], count["below the share"] = len(best), len(ranked) - len(best)
            histograms[kind] = _count_bins(means, np.isin(np.arange(len(ranked)), best))
        counts[kind] = dict(count)
    if not any(count.get("kept") for count in counts.values()):
        raise InputError(f"nothing is left to select from {[str(path) for path in paths]}: {counts}")
    return Selection(keep, quality, counts, histograms)


def scale_scores(values: NDArray[np.float64], scale: Literal["percentile", "zscore"]) -> NDArray[np.float64]:
    """Scores [n] on the common scale [n]: percentile ranks in (0, 1) with mean 1/2, or z-scores; all equal gives 1/2 or 0."""
    if scale == "zscore":
        deviation = values.std()
        return np.zeros(len(values)) if deviation == 0 else (values - values.mean()) / deviation
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    return ((below + counts / 2) / len(values))[inverse]  # the mean of ranks below + 1 ... below + counts, less a half


def _pass_limits(members: list[int], rows: list[dict[str, Any]], rule: KindRule, config: SelectionConfig, count: Counter[str]) -> list[int]:
    """Those of the samples (by index) that have all scores and keep to the rule; `count` learns why the others do not."""
    ranked = []
    limited = rule.flow is not None
    needed = [*config.scores, config.flow] if limited else list(config.scores)
    for index in members:
        row = rows[index]
        missing = [name for name in needed if not math.isfinite(row["scores"].get(name, math.nan))]
        if row["split"] not in config.splits:
            continue
        if missing:
            count[f"without score {missing[0]}"] += 1
        elif row["pixels"] is not None and row["pixels"] < rule.min_pixels:
            count["below the resolution"] += 1
        else:
            ranked.append(index)
    if not limited or not ranked:
        return ranked
    assert rule.flow is not None
    ranks = scale_scores(np.array([rows[index]["scores"][config.flow] for index in ranked]), "percentile")
    inside = (ranks >= rule.flow[0]) & (ranks <= rule.flow[1])
    count["outside the range of flow"] = int((~inside).sum())
    return [index for index, is_inside in zip(ranked, inside, strict=True) if is_inside]


def _count_bins(means: NDArray[np.float64], kept: NDArray[np.bool_]) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(means, NUM_BINS)
    return {
        "edges": edges.tolist(),
        "ranked": np.histogram(means, edges)[0].tolist(),
        "kept": np.histogram(means[kept], edges)[0].tolist(),
    }


def _read_scores(path: Path, config: SelectionConfig) -> Iterator[dict[str, Any]]:
    """kind, split, scores and, where a rule asks for it, pixels of every sample, in order."""
    file = _open(path)
    seen: set[str] = set()
    limits = {"image": config.images.min_pixels, "video": config.videos.min_pixels}
    for group in range(file.num_row_groups):
        columns = ["id", "kind", "split", "scores", *(["media"] if any(limits.values()) else [])]
        for row in file.read_row_group(group, columns=columns).to_pylist(maps_as_pydicts="strict"):
            media = row.pop("media", None)
            is_asked = limits[row["kind"]] and row["split"] in config.splits
            row["scores"] = row["scores"] or {}
            seen.update(row["scores"])
            yield row | {"pixels": _count_pixels(row["id"], row["kind"], media) if is_asked else None}
    absent = [name for name in config.scores if name not in seen]
    if absent:
        raise InputError(f"{path} has no score {absent[0]!r}; its samples have {', '.join(sorted(seen)) or 'none'}")


def _count_pixels(sample_id: str, kind: str, media: bytes) -> int:
    """Height times width, from the file's header."""
    try:
        if kind == "video":
            info = probe_video(media)
            return info.height * info.width
        with Image.open(io.BytesIO(media)) as picture:
            return picture.height * picture.width
    except (UnidentifiedImageError, OSError, InputError) as error:
        raise InputError(f"sample {sample_id!r} has media that cannot be read ({error})") from error


def _add_quality(table: pa.Table, quality: NDArray[np.float64]) -> pa.Table:
    """The rows with one more score; samples that were not ranked stay as they are."""
    scores = [
        sorted(((old or {}) | ({} if math.isnan(value) else {QUALITY: float(value)})).items())
        for old, value in zip(table["scores"].to_pylist(maps_as_pydicts="strict"), quality, strict=True)
    ]
    place = table.schema.get_field_index("scores")
    return table.set_column(place, table.schema.field(place), pa.array(scores, table.schema.field(place).type))


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as samples ({error})") from error
    for name in ("id", "kind", "media", "split"):
        if name not in file.schema_arrow.names:
            raise InputError(f"{path} has no column {name}; it must be a file of samples")
    if "scores" not in file.schema_arrow.names or file.schema_arrow.field("scores").type != SCORES_TYPE:
        raise InputError(f"{path} has no column scores of type {SCORES_TYPE}; `emu3 curate` writes it")
    return file
