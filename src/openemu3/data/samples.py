"""Samples on disk: Parquet files whose rows are `records.Sample`, written whole or not at all, read as a stream.

In and out: Sample records; one column per field, captions and attributes as maps of strings, scores as a map of numbers.
The surprising thing: row groups are small (64 rows), because media bytes are the bulk of a row and a reader holds one group.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openemu3.records import InputError, Sample

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("media", pa.binary(), nullable=False),
        pa.field("captions", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("attributes", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
    ]
)
# Files from before there were scores are read as having none.
_SCHEMA_WITHOUT_SCORES = SAMPLES_SCHEMA.remove(SAMPLES_SCHEMA.get_field_index("scores"))
ROWS_PER_GROUP = 64


def write_samples(path: Path | str, samples: Iterable[Sample]) -> int:
    """Write samples to one Parquet file and return how many there were.

    The file appears under its name only when complete; memory holds one row group. The same samples give the same bytes.
    Raises InputError for an id that comes twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    ids: set[str] = set()
    try:
        with pq.ParquetWriter(partial, SAMPLES_SCHEMA, compression="zstd") as writer:
            group: list[dict[str, Any]] = []
            for sample in samples:
                if sample.id in ids:
                    raise InputError(f"sample id {sample.id!r} comes twice; ids must be unique in a file")
                ids.add(sample.id)
                group.append(_as_row(sample))
                if len(group) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, SAMPLES_SCHEMA))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, SAMPLES_SCHEMA))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(ids)


def read_samples(path: Path | str, splits: Collection[str] | None = None, kind: str | None = None) -> Iterator[Sample]:
    """Stream the samples of a Parquet file in order, those of `splits` and of `kind` alone where given.

    Media of row groups without a wanted row are not read. Raises InputError for a file that is missing, damaged or no file of samples.
    """
    for row in read_columns(path, SAMPLES_SCHEMA.names, splits, kind):
        yield Sample(**row)


def read_columns(
    path: Path | str, columns: Collection[str], splits: Collection[str] | None = None, kind: str | None = None
) -> Iterator[dict[str, Any]]:
    """Stream rows as dicts of the named columns, in order, without reading the others (captions without media, say).

    Maps come as dicts, media as bytes. Raises InputError for an unknown column and as `read_samples` does.
    """
    unknown = [name for name in columns if name not in SAMPLES_SCHEMA.names]
    if unknown:
        raise InputError(f"column {unknown[0]!r} is not a field of a sample; allowed are {', '.join(SAMPLES_SCHEMA.names)}")
    with _open(path) as file:
        for group in range(file.num_row_groups):
            keys = _read_group(file, group, ["kind", "split"], path)
            wanted = pa.array([True] * len(keys))
            if splits is not None:
                wanted = pc.and_(wanted, pc.is_in(keys["split"], pa.array(list(splits), pa.string())))
            if kind is not None:
                wanted = pc.and_(wanted, pc.equal(keys["kind"], kind))
            if not pc.any(wanted).as_py():
                continue
            stored = [name for name in columns if name in file.schema_arrow.names]
            for row in _read_group(file, group, stored, path).filter(wanted).to_pylist(maps_as_pydicts="strict"):
                yield {name: row[name] if name in row else {} for name in columns}


def count_samples(path: Path | str) -> int:
    """Rows of a file of samples, from its footer. Raises InputError as `read_samples` does."""
    with _open(path) as file:
        return int(file.metadata.num_rows)


def read_rows(path: Path | str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Rows start ... stop - 1 as the fields of a Sample, unchecked; row groups without any of them are not read."""
    with _open(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if first < stop and end > start:
                table = _read_group(file, group, file.schema_arrow.names, path).slice(
                    max(0, start - first), min(stop, end) - max(start, first)
                )
                yield from table.to_pylist(maps_as_pydicts="strict")
            first = end


def _open(path: Path | str) -> pq.ParquetFile:
    if not Path(path).is_file():
        raise InputError(f"samples file {str(path)!r} is missing; it must be a Parquet file")
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"samples file {str(path)!r} is not a readable Parquet file") from error
    if not (file.schema_arrow.equals(SAMPLES_SCHEMA) or file.schema_arrow.equals(_SCHEMA_WITHOUT_SCORES)):
        fields = ", ".join(f"{field.name}: {field.type}" for field in file.schema_arrow)
        file.close()
        raise InputError(f"samples file {str(path)!r} has the columns ({fields}); they must be those of SAMPLES_SCHEMA")
    return file


def _read_group(file: pq.ParquetFile, group: int, columns: list[str], path: Path | str) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"samples file {str(path)!r} is damaged in row group {group}: {error}") from error


def _as_row(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.id,
        "kind": sample.kind,
        "media": sample.media,
        "captions": sorted(sample.captions.items()),
        "attributes": sorted(sample.attributes.items()),
        "split": sample.split,
        "scores": sorted(sample.scores.items()),
    }
