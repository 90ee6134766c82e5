"""A curation run in a folder: list what there is, score it, decide, and hand out the samples that are kept.

In: sources and configurations. Out, each step from the files of the one before it, each file written aside and renamed:

    run.json                      what was asked; another run in the same folder is refused
    manifest/part-NNNNN.parquet   items (sources.MANIFEST_SCHEMA), then complete.json
    scores/part-NNNNN.parquet     one row for each picture or clip of that part of the manifest (SCORES_SCHEMA)
    decisions.parquet             one row for each of those, in their order: refused by which step and why, or kept
    samples/, understanding/      samples-NNNNN.parquet of what is kept, and of representatives for understanding

The surprising thing: a run needs no notes about how far it came. A part that is there is done, whatever happened to the process that
wrote it; so `kill -9` costs the parts that were being worked on, and the next run does exactly these.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openemu3.curation import filters
from openemu3.curation.categories import Representative
from openemu3.curation.engine import Runner, start_engine
from openemu3.curation.filters import ImageThresholds, Thresholds, VideoThresholds
from openemu3.curation.scenes import Scene
from openemu3.curation.sources import MANIFEST_SCHEMA, Item, SourceConfig, list_items, read_item
from openemu3.media import write_aside
from openemu3.records import InputError, Sample

if TYPE_CHECKING:
    from openemu3.curation.films import ClipCutter

Progress = Callable[[int, int, str], None]

SCORES = ("aesthetic", "text_coverage", "colour_spread", "contrast", "motion", "hps", "mps")
TIMES = ("read", "decode", "measure", "text", "clip")
SCORES_SCHEMA = pa.schema(
    [
        *MANIFEST_SCHEMA,
        pa.field("start", pa.float64()),  # seconds; of clips alone, like the next four
        pa.field("seconds", pa.float64()),
        pa.field("fps", pa.float64()),
        pa.field("start_frame", pa.int64()),
        pa.field("end_frame", pa.int64()),
        pa.field("reason", pa.string()),  # why it could not be decoded; "" if it could
        pa.field("detail", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("hash", pa.uint64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        *(pa.field(name, pa.float64()) for name in SCORES),
        pa.field("embedding", pa.list_(pa.float32())),
        pa.field("thumbnail", pa.binary()),
        *(pa.field(f"seconds_{name}", pa.float64()) for name in TIMES),
    ]
)
DECISIONS_SCHEMA = pa.schema(
    [pa.field("id", pa.string()), pa.field("step", pa.string()), pa.field("reason", pa.string()), pa.field("duplicate_of", pa.int64())]
)


@dataclass(frozen=True)
class ScoreConfig:
    """What is measured, and with which models. A path that is None leaves that score out.

    Args:
        aesthetic_clip, aesthetic_head: folder of CLIP ViT-L/14 and file of LAION's predictor; both or neither.
        hps_clip, hps_weights: folder of CLIP ViT-H/14 with its tokenizer, and HPSv2.1. Scores items that have a caption.
        mps_weights: MPS, with the same folder.
        text: whether to look for text.
        embed: keep CLIP's features (of aesthetic_clip), for choosing representatives.
        max_bytes: of one item that is held in memory: all but films that are files of their own.
        seconds_per_file: longest time for reading, decoding and measuring one picture; of a film ten times that without a sign of progress,
            which is every decoded frame.
        working_side, thumbnail_side: longest sides in pixels of what the models see, and of what the report shows.
        device: of the CLIP models.
    """

    aesthetic_clip: str | None = None
    aesthetic_head: str | None = None
    hps_clip: str | None = None
    hps_weights: str | None = None
    mps_weights: str | None = None
    text: bool = True
    embed: bool = False
    max_bytes: int = 512 << 20
    seconds_per_file: float = 30.0
    working_side: int = 640
    thumbnail_side: int = 128
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.aesthetic_clip is None) != (self.aesthetic_head is None):
            raise InputError("the aesthetic predictor needs both its CLIP folder and its head; one of the two is not given")
        if (self.hps_weights or self.mps_weights) and not self.hps_clip:
            raise InputError("HPS and MPS need the folder of CLIP ViT-H/14, which is not given")
        if self.embed and not self.aesthetic_clip:
            raise InputError("features are CLIP's, whose folder is not given")
        for name in ("max_bytes", "seconds_per_file", "working_side", "thumbnail_side"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be more than 0")


@dataclass(frozen=True)
class RunConfig:
    """One run: what to read and how to score it.

    Args:
        sources: folders, files and URLs.
        rows_per_part: items that are done or not done together.
    """

    sources: tuple[str, ...]
    source: SourceConfig = field(default_factory=SourceConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    rows_per_part: int = 256

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("no source was given; name at least one folder, file or URL")
        if self.rows_per_part < 1:
            raise InputError(f"rows_per_part is {self.rows_per_part}; it must be at least 1")


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path
    config: RunConfig

    @classmethod
    def open(cls, folder: Path | str, config: RunConfig) -> Run:
        """Begins a run, or goes on with the same one. Raises InputError if the folder holds another."""
        folder = Path(folder)
        described = json.dumps(asdict(config), indent=2, sort_keys=True)
        path = folder / "run.json"
        if path.exists():
            if path.read_text(encoding="utf-8") != described:
                raise InputError(f"folder {str(folder)!r} holds a run with other sources or scores; name another folder, or remove it")
        else:
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"folder {str(folder)!r} is not empty and holds no curation run; name another one")
            with write_aside(path) as partial:
                partial.write_text(described, encoding="utf-8")
        return cls(folder, config)

    @classmethod
    def load(cls, folder: Path | str) -> Run:
        """The run that a folder holds. Raises InputError if it holds none."""
        path = Path(folder) / "run.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            source = SourceConfig(**{**stored["source"], "roots": tuple(stored["source"]["roots"])})
            config = RunConfig(tuple(stored["sources"]), source, ScoreConfig(**stored["score"]), stored["rows_per_part"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"folder {str(folder)!r} holds no curation run: run.json is missing or unreadable") from error
        return cls(Path(folder), config)

    def manifest_part(self, number: int) -> Path:
        return self.folder / "manifest" / f"part-{number:05}.parquet"

    def scores_part(self, number: int) -> Path:
        return self.folder / "scores" / f"part-{number:05}.parquet"

    @property
    def num_parts(self) -> int:
        """Raises InputError if the manifest is not complete."""
        return int(self._read_manifest_mark()["parts"])

    @property
    def num_items(self) -> int:
        return int(self._read_manifest_mark()["items"])

    def _read_manifest_mark(self) -> dict[str, Any]:
        try:
            mark: dict[str, Any] = json.loads((self.folder / "manifest" / "complete.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the manifest in {str(self.folder)!r} is not complete; run emu3 curate images or videos to the end"
            ) from error
        return mark

    def list_missing_parts(self) -> list[int]:
        return [number for number in range(self.num_parts) if not self.scores_part(number).exists()]


# ----------------------------------------------------------------------------------------------------------------------------- the manifest


def write_manifest(run: Run, progress: Progress | None = None) -> int:
    """Lists all items, unless that was done before; returns how many there are. Held: one part."""
    mark = run.folder / "manifest" / "complete.json"
    if mark.exists():
        return run.num_items
    rows: list[dict[str, Any]] = []
    number = total = 0

    def flush() -> None:
        nonlocal rows, number
        write_table(run.manifest_part(number), pa.Table.from_pylist(rows, _MANIFEST_PART_SCHEMA))
        rows, number = [], number + 1

    for item in list_items(run.config.sources, run.config.source):
        row = {**{f.name: getattr(item, f.name) for f in fields(Item)}, "captions": sorted(item.captions.items())}
        rows.append({**row, "part": number, "index": len(rows)})
        total += 1
        if len(rows) == run.config.rows_per_part:
            flush()
            if progress is not None:
                progress(total, 0, "listing")
    if rows:
        flush()
    with write_aside(mark) as partial:
        partial.write_text(json.dumps({"parts": number, "items": total}), encoding="utf-8")
    return total


_MANIFEST_PART_SCHEMA = pa.schema([*MANIFEST_SCHEMA, pa.field("part", pa.int64()), pa.field("index", pa.int64())])


def write_table(path: Path, table: pa.Table) -> None:
    with write_aside(path) as partial:
        pq.write_table(table, partial, compression="zstd")


# ----------------------------------------------------------------------------------------------------------------------------------- scores


def score_items(
    run: Run, runner: Runner = "native", address: str | None = None, workers: int | None = None, progress: Progress | None = None
) -> float:
    """Scores all parts that are not done; returns the seconds it took.

    runner, address  as `engine.start_engine` takes them.
    workers          processes that look at files, on the cluster for each step; None: natively one for each core, on the cluster one.
    Held: the items that are being worked on, and finished rows of parts that are not complete yet.
    """
    from openemu3.curation.scoring import add_scores

    began = time.perf_counter()
    missing = run.list_missing_parts()
    if not missing:
        return 0.0
    daft = start_engine(runner, address)
    sizes = {number: pq.read_metadata(run.manifest_part(number)).num_rows for number in missing}
    frame = daft.read_parquet([str(run.manifest_part(number)) for number in missing])
    frame = add_scores(daft, frame, run.config, runner, workers)
    waiting = {number: _UnfinishedPart() for number in missing}
    finished, total = run.num_items - sum(sizes.values()), run.num_items
    for batch in frame.to_arrow_iter(results_buffer_size=2):
        for row in batch.to_pylist():
            number = row["part"]
            part = waiting[number]
            part.add(row)
            if part.is_complete(sizes[number]):
                write_table(run.scores_part(number), part.to_table())
                finished += sizes.pop(number)
                del waiting[number]
                if progress is not None:
                    progress(finished, total, "scoring")
    if sizes:
        raise RuntimeError(f"the engine lost rows of the parts {sorted(sizes)}; nothing of these was written, so run it again")
    return time.perf_counter() - began


class _UnfinishedPart:
    """Rows of a part as they come, in any order. A film has several, each of which says how many."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.items: dict[int, int] = {}  # index of an item -> its rows

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.items[row["index"]] = row["num_rows"]

    def is_complete(self, num_items: int) -> bool:
        return len(self.items) == num_items and len(self.rows) == sum(self.items.values())

    def to_table(self) -> pa.Table:
        rows = sorted(self.rows, key=lambda row: (row["index"], row["start"] or 0.0))
        for row in rows:
            row["hash"] = int(row["hash"] or "0", 16)
            row["captions"] = [tuple(pair) for pair in row["captions"] or []]
        return pa.Table.from_pylist(rows, SCORES_SCHEMA)


# -------------------------------------------------------------------------------------------------------------------------------- decisions

_DECIDING = ("reason", "width", "height", "seconds", "start_frame", "hash", "sha256", *SCORES)


def read_parts(run: Run, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The scores, part by part. Raises InputError if some are not scored yet."""
    missing = run.list_missing_parts()
    if missing:
        raise InputError(f"{len(missing)} of {run.num_parts} parts in {str(run.folder)!r} are not scored yet; give the same command again")
    for number in range(run.num_parts):
        yield read_part(run, number, columns)


def read_part(run: Run, number: int, columns: Sequence[str]) -> pa.Table:
    with pq.ParquetFile(run.scores_part(number)) as file:  # a third of the time of pq.read_table, which looks for a data set
        return file.read(columns=list(columns), use_threads=False)


def to_rows(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Columns as numpy: numbers with NaN for what is missing, text with ""."""
    rows: dict[str, NDArray[Any]] = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_string(column.type):
            rows[name] = np.array([value or "" for value in column.to_pylist()], object)
        elif pa.types.is_uint64(column.type):
            rows[name] = column.fill_null(0).to_numpy(zero_copy_only=False)
        else:
            rows[name] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return rows


def decide_all(run: Run, thresholds: Thresholds) -> dict[str, int]:
    """Applies thresholds to the scores and writes decisions.parquet; returns how many items each (step: reason) refused, and "kept".

    The scores are read as a stream, two or three times. Held: 17 bytes for each row that passes all steps, about 200 for each of those that
    resemble another one, and a fixed number of rows that are being worked on.
    """
    is_image = isinstance(thresholds, ImageThresholds)
    if is_image != (run.config.source.kind == "image"):
        raise InputError(f"the run in {str(run.folder)!r} is one of {run.config.source.kind}s; these thresholds are for the other kind")
    digests, hashes = array("Q"), array("Q")
    scored = dict.fromkeys(SCORES, 0)
    decodable = 0
    for table in read_parts(run, _DECIDING):
        rows = to_rows(table)
        for name in SCORES:
            scored[name] += int(np.count_nonzero(~np.isnan(rows[name])))
        decodable += int(np.count_nonzero(rows["reason"] == ""))
        alive = np.flatnonzero(filters.decide(rows, thresholds)[0] == "")
        digests.frombytes(_digest_rows(rows, alive).tobytes())
        hashes.frombytes(rows["hash"][alive].astype(np.uint64).tobytes())
    if decodable:
        filters.check_scores(scored, thresholds)
    repeated = _find_repeated(run, thresholds, np.frombuffer(digests, np.uint64), np.frombuffer(hashes, np.uint64))
    return _write_decisions(run, thresholds, repeated)


@dataclass(frozen=True, eq=False)
class _Repeated:
    """Rows that duplicate another one, ascending: their numbers, those of the rows they duplicate, and whether the files are the same."""

    rows: NDArray[np.int64]
    originals: NDArray[np.int64]
    exact: NDArray[np.bool_]


def _digest_rows(rows: filters.Rows, which: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits that say which bytes a row is of. Clips of one film share its file, so that their first frame is part of it."""
    digests = np.array([int(value[:16] or "0", 16) for value in rows["sha256"][which]], np.uint64)
    first = np.nan_to_num(rows["start_frame"][which], nan=-1.0).astype(np.int64).astype(np.uint64) + np.uint64(1)
    return digests ^ (first * np.uint64(0x9E3779B97F4A7C15))  # 0 for pictures; wraps around


def _find_repeated(run: Run, thresholds: Thresholds, digests: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> _Repeated:
    """The duplicates among rows that pass all steps. What says which of like rows is best is read again, for those alone: few are."""
    alike = filters.find_alike(digests, hashes, thresholds.max_hash_distance)
    numbers, ranks = [np.empty(0, np.int64)], [np.empty(0)]
    offset = seen = 0
    for table in read_parts(run, [*_DECIDING, "captions"]) if alike.any() else ():
        rows = to_rows(table.select(list(_DECIDING)))
        alive = np.flatnonzero(filters.decide(rows, thresholds)[0] == "")
        wanted = alive[alike[seen : seen + len(alive)]]
        # Of duplicates one that has a caption is kept; of these the largest, and of these the one that pleases most.
        pleasing = np.nan_to_num(rows["aesthetic"][wanted], nan=0.0)
        captioned = np.diff(table.column("captions").combine_chunks().offsets.to_numpy())[wanted] > 0
        ranks.append(-(captioned * 1e12 + rows["width"][wanted] * rows["height"][wanted] + pleasing / 100))
        numbers.append(wanted + offset)
        offset, seen = offset + table.num_rows, seen + len(alive)
    number, digest = np.concatenate(numbers), digests[alike]
    duplicates = filters.find_duplicates(digest, hashes[alike], np.concatenate(ranks), thresholds.max_hash_distance)
    repeated = np.flatnonzero(duplicates >= 0)
    originals = duplicates[repeated]
    return _Repeated(number[repeated], number[originals], digest[repeated] == digest[originals])


def _write_decisions(run: Run, thresholds: Thresholds, repeated: _Repeated) -> dict[str, int]:
    """Decides once more, with the duplicates, into the file; returns the counts of `decide_all`."""
    described = {"kind": run.config.source.kind, **asdict(thresholds)}
    schema = DECISIONS_SCHEMA.with_metadata({b"openemu3.thresholds": json.dumps(described, sort_keys=True).encode()})
    counts: Counter[str] = Counter(kept=0)
    offset, waiting = 0, list[pa.Table]()
    with write_aside(run.folder / "decisions.parquet") as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for table in read_parts(run, [*_DECIDING, "id"]):
            step, reason = filters.decide(to_rows(table.select(list(_DECIDING))), thresholds)
            duplicate_of = np.full(len(step), -1, np.int64)
            stretch = slice(*np.searchsorted(repeated.rows, (offset, offset + len(step))))
            places = repeated.rows[stretch] - offset
            step[places], duplicate_of[places] = filters.DUPLICATES, repeated.originals[stretch]
            reason[places] = np.where(repeated.exact[stretch], filters.EXACT_DUPLICATE, filters.NEAR_DUPLICATE).astype(object)
            counts.update(f"{one}: {why}" if one else "kept" for one, why in zip(step, reason, strict=True))
            columns = [table.column("id"), pa.array(step, pa.string()), pa.array(reason, pa.string()), pa.array(duplicate_of)]
            waiting.append(pa.table(columns, schema=schema))
            offset += len(step)
            if sum(table.num_rows for table in waiting) >= _DECISIONS_AT_ONCE:  # parts may be small, and small groups of rows are slow
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return dict(counts)


_DECISIONS_AT_ONCE = 1 << 15


def read_thresholds(run: Run) -> Thresholds:
    """What the decisions were made with. Raises InputError if there are none."""
    path = run.folder / "decisions.parquet"
    if not path.exists():
        raise InputError(f"nothing has been decided in {str(run.folder)!r}; run emu3 curate images or videos to the end")
    described = json.loads((pq.read_schema(path).metadata or {})[b"openemu3.thresholds"])
    kind = described.pop("kind")
    return ImageThresholds(**described) if kind == "image" else VideoThresholds(**described)


def stream_decisions(run: Run, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The decisions on the rows of each part of the scores, part by part. Raises InputError if they are of other scores."""
    left = DECISIONS_SCHEMA.empty_table().select(list(columns))
    with pq.ParquetFile(run.folder / "decisions.parquet") as file:
        batches = file.iter_batches(_DECISIONS_AT_ONCE, columns=list(columns))
        for number in range(run.num_parts):
            rows = pq.read_metadata(run.scores_part(number)).num_rows
            while left.num_rows < rows:
                batch = next(batches, None)
                if batch is None:
                    raise InputError(f"the decisions in {str(run.folder)!r} are of other scores; give the command that made the run again")
                left = pa.concat_tables([left, pa.Table.from_batches([batch]).replace_schema_metadata(None)])
            yield left.slice(0, rows)
            left = left.slice(rows)


def list_kept(run: Run, dropped_by: Collection[str] = ()) -> NDArray[np.int64]:
    """Numbers of the rows that were kept, or dropped by one of these steps; ascending. Held: 8 bytes for each."""
    offset, kept = 0, array("q")
    for table in stream_decisions(run, ["step"]):
        wanted = pc.is_in(table.column("step"), value_set=pa.array(["", *dropped_by], pa.string()))
        kept.frombytes((np.flatnonzero(wanted.to_numpy(zero_copy_only=False)).astype(np.int64) + offset).tobytes())
        offset += table.num_rows
    return np.frombuffer(kept, np.int64)


# ---------------------------------------------------------------------------------------------------------------------------------- samples

WriteSamples = Callable[[Path, Iterator[Sample]], int]


@dataclass(frozen=True)
class SampleConfig:
    """How samples are written.

    Args:
        per_file: samples in one Parquet file.
        validation_share: part of the samples in the split "validation", chosen by their ids; the others are in "train".
        source: what the samples' attribute "source" says.
    """

    per_file: int = 1024
    validation_share: float = 0.0
    source: str = "curated"

    def __post_init__(self) -> None:
        if self.per_file < 1:
            raise InputError(f"per_file is {self.per_file}; it must be at least 1")
        if not 0 <= self.validation_share < 1:
            raise InputError(f"validation_share is {self.validation_share}; allowed is 0 up to, but not including, 1")


def write_samples(run: Run, config: SampleConfig, write: WriteSamples, progress: Progress | None = None) -> list[Path]:
    """Writes what was kept to samples/samples-NNNNN.parquet and returns the files. `write` writes one file whole or not at all.

    Files that an earlier, interrupted run with the same decisions wrote are left alone; those of other decisions are removed first.
    """
    wanted = {"decisions": _digest_decisions(run.folder / "decisions.parquet"), **asdict(config)}
    return _write_files(run, "samples", wanted, list_kept(run), {}, config, write, progress)


def write_representatives(
    run: Run, chosen: Sequence[Representative], config: SampleConfig, write: WriteSamples, progress: Progress | None = None
) -> list[Path]:
    """Writes chosen pictures to understanding/samples-NNNNN.parquet; their attributes name the category and the cluster."""
    more = {one.row: {"category": one.category, "cluster": str(one.cluster)} for one in chosen}
    rows = np.array(sorted(more), np.int64)
    wanted = {"chosen": hashlib.sha256(json.dumps(sorted(more.items())).encode()).hexdigest(), **asdict(config)}
    return _write_files(run, "understanding", wanted, rows, more, config, write, progress)


def read_features(run: Run) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows [B] that have CLIP features, could be read, are large enough and are no duplicates; and their features [B, D].

    Raises InputError if there are none. Held: the features, 3 kB for a picture of CLIP ViT-L/14.
    """
    usable = list_kept(run, [name for name, _ in filters.IMAGE_STEPS if name not in ("decode", "resolution")])
    rows: list[NDArray[np.int64]] = []
    features: list[NDArray[np.float32]] = []
    offset = 0
    for part in read_parts(run, ["embedding"]):
        column = part.column("embedding").combine_chunks()
        here = usable[slice(*np.searchsorted(usable, (offset, offset + len(column))))] - offset
        there = here[column.is_valid().to_numpy(zero_copy_only=False)[here]]
        rows.append(there + offset)
        if len(there):
            features.append(np.stack([np.asarray(column[int(index)].values, np.float32) for index in there]))
        offset += len(column)
    if not features:
        raise InputError(f"no picture in {str(run.folder)!r} has CLIP's features; score with embed, which needs the aesthetic predictor")
    return np.concatenate(rows), np.concatenate(features)


def _write_files(
    run: Run,
    name: str,
    wanted: dict[str, Any],
    rows: NDArray[np.int64],
    more: Mapping[int, Mapping[str, str]],
    config: SampleConfig,
    write: WriteSamples,
    progress: Progress | None,
) -> list[Path]:
    """`wanted` tells these files from those of other choices, which are removed before the first is written."""
    folder, mark = run.folder / name, run.folder / name / "choice.json"
    stored = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else None
    if stored != wanted:
        if folder.exists():
            shutil.rmtree(folder)
        with write_aside(mark) as partial:
            partial.write_text(json.dumps(wanted, sort_keys=True), encoding="utf-8")
    files, offsets = [], find_offsets(run)
    for number, first in enumerate(range(0, len(rows), config.per_file)):
        path = folder / f"samples-{number:05}.parquet"
        files.append(path)
        if not path.exists():
            write(path, iterate_samples(run, config, rows[first : first + config.per_file], offsets, more))
        if progress is not None:
            progress(min(first + config.per_file, len(rows)), len(rows), "writing samples")
    return files


def _digest_decisions(path: Path) -> str:
    """Of what was decided, not of the file's bytes, in which a library leaves its version."""
    digest = hashlib.sha256()
    for batch in pq.ParquetFile(path).iter_batches(65536, columns=["id", "step"]):
        for column in batch.columns:
            digest.update("\0".join(column.to_pylist()).encode())
    return digest.hexdigest()


def iterate_samples(
    run: Run, config: SampleConfig, kept: NDArray[np.int64], offsets: NDArray[np.int64], more: Mapping[int, Mapping[str, str]] | None = None
) -> Iterator[Sample]:
    """The samples of rows of the scores, given by their ascending numbers. A file that changed since it was scored is left out.

    offsets  [parts + 1]: number of the first row of each part, as `find_offsets` makes it.
    more     row -> further attributes of its sample.
    Held: one picture, or the clips of _SECONDS_AT_ONCE of a film, which is opened once for them.
    """
    columns = [name for name in SCORES_SCHEMA.names if name not in ("thumbnail", "embedding")]
    cut = None
    if run.config.source.kind == "video":
        from openemu3.curation.films import ClipCutter  # brings the detectors of scenes with it

        cut = ClipCutter(run.config.score.seconds_per_file, run.config.score.max_bytes)
    try:
        part_of = np.searchsorted(offsets, kept, side="right") - 1
        for number in np.unique(part_of):
            table = read_part(run, int(number), columns)
            numbered = (
                (row, table.slice(row - int(offsets[number]), 1).to_pylist(maps_as_pydicts="strict")[0])
                for row in kept[part_of == number].tolist()
            )
            for group in _group_clips(numbered):
                media = _read_media(run, [row for _, row in group], cut)
                for (row_number, row), data in zip(group, media, strict=True):
                    if data is not None:
                        yield _make_sample(run, config, row, data, (more or {}).get(row_number, {}))
    finally:
        if cut is not None:
            cut.close()


_SECONDS_AT_ONCE = 120.0
_NumberedRow = tuple[int, dict[str, Any]]


def _group_clips(rows: Iterator[_NumberedRow]) -> Iterator[list[_NumberedRow]]:
    """Neighbouring clips of one film together, of at most _SECONDS_AT_ONCE; pictures alone."""
    group: list[_NumberedRow] = []
    for numbered in rows:
        row = numbered[1]
        if group and (
            row["start"] is None
            or row["id"] != group[0][1]["id"]
            or sum(other["seconds"] for _, other in group) + row["seconds"] > _SECONDS_AT_ONCE
        ):
            yield group
            group = []
        group.append(numbered)
    if group:
        yield group


def _read_media(run: Run, rows: list[dict[str, Any]], cut: ClipCutter | None) -> Sequence[bytes | None]:
    """The bytes of a picture, or of some clips of one film; None for what cannot be read any more or has changed."""
    fields_of_item = {f.name: rows[0][f.name] for f in fields(Item)}
    try:
        if cut is None:
            media = read_item(Item(**fields_of_item), run.config.score.max_bytes)
            return [media if hashlib.sha256(media).hexdigest() == rows[0]["sha256"] else None]
        spans = [Scene(row["start_frame"], row["end_frame"], row["start"], row["start"] + row["seconds"]) for row in rows]
        return cut({**fields_of_item, "captions": {}}, rows[0]["sha256"], spans)
    except InputError:
        return [None] * len(rows)


def count_samples(files: Sequence[Path]) -> int:
    """How many samples are in the files; fewer than were kept where files of the source have changed or gone since they were scored."""
    return sum(pq.read_metadata(path).num_rows for path in files)


def find_offsets(run: Run) -> NDArray[np.int64]:
    """[parts + 1]: number of the first row of each part of the scores, and how many there are in all."""
    return np.cumsum([0, *(pq.read_metadata(run.scores_part(number)).num_rows for number in range(run.num_parts))])


def _make_sample(run: Run, config: SampleConfig, row: dict[str, Any], media: bytes, more: Mapping[str, str]) -> Sample:
    attributes, identity = {"source": config.source, "width": str(row["width"]), "height": str(row["height"]), **more}, row["id"]
    if row["fps"] is not None:
        identity = f"{row['id']}@{row['start_frame']}-{row['end_frame']}"
        attributes |= {"fps": repr(row["fps"]), "start": repr(row["start"]), "seconds": repr(row["seconds"])}
    captions = {language: caption for language, caption in (row["captions"] or {}).items() if caption}
    scores = {name: row[name] for name in SCORES if row[name] is not None}
    share = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big") / 2**64
    split = "validation" if share < config.validation_share else "train"
    return Sample(identity, run.config.source.kind, media, captions, attributes, split, scores)
