"""Shards: token documents on disk, and reading any of them without having the others in memory.

In: EncodedDocument records. Out: Parquet files with one document per row (`DOCUMENTS_SCHEMA`), and `DocumentStore`, which reads them.
A corpus is a folder of such files, `documents-*.parquet`, and a `manifest.json` that is written last (data/corpus.py); `datasets` and
every other Parquet reader open them, too.
The surprising thing: Parquet is compressed, so a single document cannot be reached in it. The first reader therefore leaves an
uncompressed Arrow copy of each shard in the folder `.arrow` beside it, checking every page's checksum on the way, and all readers map
those copies into memory: opening a corpus of any size costs a few bytes a document, and ranks on one machine share the pages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openemu3.media import write_aside
from openemu3.records import InputError
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.sequence import Role

DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # what the document is: draw, describe, film, describe_video, text, ...
        pa.field("dataset", pa.string(), nullable=False),  # the data set it comes from
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("num_context_tokens", pa.uint32(), nullable=False),  # of role TEXT_CONTEXT, which a null prompt drops
        pa.field("num_vision_tokens", pa.uint32(), nullable=False),  # of role VISION; 0: the document may be cut
        pa.field("grids", pa.list_(pa.list_(pa.uint16())), nullable=False),  # of each medium (h, w) or (t, h, w), in token units
        pa.field("role_values", pa.list_(pa.uint8()), nullable=False),  # run-length coded: the role of each run ...
        pa.field("role_lengths", pa.list_(pa.uint32()), nullable=False),  # ... and its number of tokens
        pa.field("token_ids", pa.list_(pa.uint32()), nullable=False),
    ]
)
FINGERPRINT_KEY = "openemu3.fingerprint"
SHARD_PATTERN = "documents-*.parquet"
MANIFEST_FILE = "manifest.json"  # of a folder of shards; written last
CACHE_FOLDER = ".arrow"
ROWS_PER_GROUP = 1024
TOKENS_PER_GROUP = 2**20  # a writer, and a reader's copying, hold one group


# ---- writing


def write_documents(
    path: Path | str,
    documents: Iterable[EncodedDocument],
    fingerprint: str,
    rows_per_group: int = ROWS_PER_GROUP,
    tokens_per_group: int = TOKENS_PER_GROUP,
) -> int:
    """Write documents to one Parquet file, which appears only when complete; the number written. The same documents, the same bytes.

    fingerprint names the tokenizers that made the ids; it is kept in the file's metadata and checked on reading.
    """
    schema = DOCUMENTS_SCHEMA.with_metadata({FINGERPRINT_KEY: fingerprint})
    count = 0
    with write_aside(Path(path)) as partial, pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer:
        rows: list[dict[str, Any]] = []
        num_tokens = 0
        for document in documents:
            rows.append(_as_row(document))
            count += 1
            num_tokens += rows[-1]["num_tokens"]
            if len(rows) >= rows_per_group or num_tokens >= tokens_per_group:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, num_tokens = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def _as_row(document: EncodedDocument) -> dict[str, Any]:
    token_ids, roles = document.encoded.token_ids, document.encoded.roles
    values, lengths = encode_runs(roles)
    return {
        "source": document.source,
        "dataset": document.dataset,
        "sample_id": document.sample_id,
        "split": document.split,
        "num_tokens": len(token_ids),
        "num_context_tokens": int((roles == Role.TEXT_CONTEXT).sum()),
        "num_vision_tokens": int((roles == Role.VISION).sum()),
        "grids": [list(grid) for grid in document.grids],
        "role_values": values,
        "role_lengths": lengths,
        "token_ids": token_ids,
    }


def encode_runs(roles: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """(value, length) of each run of equal roles."""
    starts = np.flatnonzero(np.diff(roles, prepend=np.uint8(255)))
    return roles[starts], np.diff(starts, append=len(roles)).astype(np.uint32)


# ---- finding and checking


def list_shards(paths: Iterable[Path | str]) -> list[Path]:
    """The files of documents that the paths name: a file itself, or all shards of a folder that is complete."""
    shards: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            shards.append(path)
            continue
        manifest = _read_manifest(path)
        for name, size in manifest["shards"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                state = "missing" if found is None else f"damaged: it has {found} bytes and was written with {size}"
                raise InputError(f"{path / name} is {state}; delete it, and the same `emu3 tokenize` makes it again")
            shards.append(path / name)
    return shards


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if any(folder.glob(SHARD_PATTERN)):
            raise InputError(
                f"{folder} is not complete: its {MANIFEST_FILE} is missing; the same `emu3 tokenize` goes on with it"
            ) from error
        raise InputError(f"{folder} does not hold token documents; `emu3 tokenize` writes them") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and the same `emu3 tokenize` writes it again") from error


def _open_parquet(path: Path, fingerprint: str | None) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as token documents ({error})") from error
    found = (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY.encode(), b"").decode()
    if not found or file.schema_arrow.names != DOCUMENTS_SCHEMA.names:
        file.close()
        raise InputError(f"{path} does not hold token documents of this version; `emu3 tokenize` writes them")
    if fingerprint is not None and found != fingerprint:
        file.close()
        raise InputError(f"{path} was tokenised by {found!r}, but the model's tokenizers are {fingerprint!r}; tokenise again")
    return file


# ---- reading


class DocumentStore:
    """The documents of some splits of some corpora, mapped into memory.

    Args:
        paths: folders of `emu3 tokenize`, or single Parquet files of documents.
        splits: which parts of the data sets.
        fingerprint: of the tokenizers that must have made the ids; None: any.
        cache: where the Arrow copies go; None: a folder `.arrow` beside each shard.

    Attributes:
        lengths, num_context, num_vision: int64 [n], tokens of each document: all, of role TEXT_CONTEXT, of role VISION.
        sources, datasets: names; source_of, dataset_of: int32 [n], their index for each document.

    Raises InputError for a file that is missing, truncated, damaged, of other tokenizers or no file of documents, and names it.
    """

    def __init__(
        self, paths: Iterable[Path | str], splits: Collection[str], fingerprint: str | None = None, cache: Path | None = None
    ) -> None:
        paths = list(paths)
        shards = list_shards(paths)
        copies = [_copy_to_arrow(shard, fingerprint, shard.parent / CACHE_FOLDER if cache is None else cache) for shard in shards]
        self._readers = [pa.ipc.open_file(pa.memory_map(str(copy))) for copy in copies]
        self._view = lru_cache(maxsize=1024)(self._open_view)
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("batch", "row", "length", "context", "vision", "source", "dataset")}
        self.sources: list[str] = []
        self.datasets: list[str] = []
        self._batches: list[tuple[int, int]] = []  # (reader, its record batch)
        wanted = pa.array(sorted(splits), pa.string())
        for index, reader in enumerate(self._readers):
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                rows = np.flatnonzero(pc.is_in(batch["split"], wanted).to_numpy(zero_copy_only=False))
                columns["batch"].append(np.full(len(rows), len(self._batches), np.int32))
                columns["row"].append(rows.astype(np.int32))
                for name, column in (("length", "num_tokens"), ("context", "num_context_tokens"), ("vision", "num_vision_tokens")):
                    columns[name].append(batch[column].to_numpy()[rows].astype(np.int64))
                columns["source"].append(_number_names(batch["source"], self.sources)[rows])
                columns["dataset"].append(_number_names(batch["dataset"], self.datasets)[rows])
                self._batches.append((index, number))
        joined = {name: np.concatenate(parts) if parts else np.zeros(0, np.int64) for name, parts in columns.items()}
        if not len(joined["row"]):
            found = sorted({name for reader in self._readers for name in pc.unique(reader.read_all()["split"]).to_pylist()})
            raise InputError(
                f"no documents of split {' or '.join(map(repr, sorted(splits)))} in {', '.join(map(str, paths))}; "
                f"their splits are {', '.join(map(repr, found[:20])) or 'none: there are no documents'}"
            )
        self._batch_of, self._row_of = joined["batch"], joined["row"]
        self.lengths, self.num_context, self.num_vision = joined["length"], joined["context"], joined["vision"]
        self.source_of, self.dataset_of = joined["source"], joined["dataset"]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """Names the documents and their order, for telling whether a saved position means the same ones."""
        digest = hashlib.sha256(json.dumps([self.sources, self.datasets]).encode())
        for array in (self.lengths, self.num_context, self.num_vision, self.source_of, self.dataset_of):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def read(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """(token ids, roles) of one document; the ids are a view of the file, not to be written to."""
        view, row = self._view(int(self._batch_of[index])), int(self._row_of[index])
        ids = view.token_ids.values[view.token_ids.offsets[row] : view.token_ids.offsets[row + 1]]
        runs = slice(view.role_values.offsets[row], view.role_values.offsets[row + 1])
        return ids, np.repeat(view.role_values.values[runs], view.role_lengths.values[runs])

    def read_sample_id(self, index: int) -> str:
        return str(self._view(int(self._batch_of[index])).sample_ids[int(self._row_of[index])])

    def _open_view(self, batch: int) -> _View:
        reader, number = self._batches[batch]
        table = self._readers[reader].get_batch(number)
        token_ids, role_values, role_lengths = (_list_values(table[name]) for name in ("token_ids", "role_values", "role_lengths"))
        return _View(token_ids, role_values, role_lengths, table["sample_id"])


class _List(NamedTuple):
    """A column of lists, without copying: list i is values[offsets[i] : offsets[i + 1]]."""

    values: NDArray[Any]
    offsets: NDArray[np.int32]


class _View(NamedTuple):
    """The columns of a record batch that reading a document needs."""

    token_ids: _List
    role_values: _List
    role_lengths: _List
    sample_ids: pa.Array


def _list_values(column: pa.Array) -> _List:
    return _List(column.values.to_numpy(), column.offsets.to_numpy())


def _number_names(column: pa.Array, names: list[str]) -> NDArray[np.int32]:
    """The index in `names` of each string; new ones are added to it."""
    encoded = column.dictionary_encode()
    for name in encoded.dictionary.to_pylist():
        if name not in names:
            names.append(name)
    numbers = np.array([names.index(name) for name in encoded.dictionary.to_pylist()], np.int32)
    return numbers[encoded.indices.to_numpy()] if len(column) else np.zeros(0, np.int32)


def _copy_to_arrow(shard: Path, fingerprint: str | None, folder: Path) -> Path:
    """The shard's Arrow copy, made if it is not there or is of another version of the shard."""
    with _open_parquet(shard, fingerprint) as file:
        state = shard.stat()
        name = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:8]
        copy = folder / f"{shard.stem}-{name}-{state.st_size}-{state.st_mtime_ns}.arrow"
        if copy.exists():
            return copy
        try:
            folder.mkdir(exist_ok=True)
            with _lock(folder / f"{shard.stem}-{name}.lock"):  # ranks of one machine: one copies, the others wait
                if not copy.exists():
                    with write_aside(copy) as partial:
                        _write_arrow(file, shard, partial)
                    for old in folder.glob(f"{shard.stem}-{name}-*.arrow"):
                        if old != copy:
                            old.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"the Arrow copy of {shard} cannot be written ({error.strerror or error}); it needs a place to write to"
            ) from error
    return copy


def _write_arrow(file: pq.ParquetFile, shard: Path, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS_SCHEMA) as writer:
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group).combine_chunks()
            except (OSError, pa.ArrowException) as error:
                raise InputError(
                    f"{shard} is damaged in row group {group} ({error}); delete it, and the same `emu3 tokenize` makes it again"
                ) from error
            writer.write_table(table.replace_schema_metadata(None).cast(DOCUMENTS_SCHEMA))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def spread_evenly(count: int, most: int) -> Sequence[int]:
    """Up to `most` of the numbers below `count`, rising and evenly spread.

    Steps of the golden ratio, not one stride: documents alternate (draw, describe, draw, ...), and a stride would meet one kind alone.
    """
    if count <= most:
        return range(count)
    golden = (5**0.5 - 1) / 2
    return sorted({int(count * (index * golden % 1)) for index in range(most)})
