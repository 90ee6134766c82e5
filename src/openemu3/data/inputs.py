"""What `emu3 tokenize` reads: samples, folders, tars, Hugging Face datasets and texts, each as a numbered stream of items.

In: paths. Out: `Input` objects, whose items can be counted and read from any number on, without the ones before:

    samples      our own Parquet, as curation writes it
    folder       pictures and films with NAME.txt or NAME.json beside them; .txt files with no medium beside them are texts
    tar          WebDataset: neighbouring files of one key are one sample (.tar, .tar.gz)
    datasets     a folder of `datasets.save_to_disk`: a column of pictures, films or neither, and one of text
    texts        .jsonl (.gz), .parquet or .txt (.gz)

Nothing is unpacked to disk, and nothing outside a folder is read because something inside it says so (links, paths in tables).
What is wrong with one sample is a Refusal in the stream; what is wrong with a whole input is an InputError.
The surprising thing: counting a text or tar leaves the byte offset of every n-th item, so that a shard in the middle of a file of many
gigabytes is read without reading what comes before it.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from openemu3.data.samples import SAMPLES_SCHEMA, count_samples, read_rows
from openemu3.media import detect_kind
from openemu3.records import InputError, Sample
from openemu3.tokenization.encode import ANY_LANGUAGE, Item, Refusal, draw_lot

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"})
FILMS = frozenset({".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv", ".flv"})
EITHER = frozenset({".gif", ".webp"})  # one frame or several
MEDIA = PICTURES | FILMS | EITHER
TARS = (".tar", ".tar.gz", ".tgz")
LINES = (".jsonl", ".jsonl.gz")
PLAIN = (".txt", ".txt.gz")
MAX_TEXT_BYTES = 64 * 2**20  # of one text; longer ones are no one document
MAX_MEDIA_BYTES = 2**31  # of one medium in a tar

TextUnit = Literal["file", "paragraph", "line"]


@dataclass(frozen=True)
class InputConfig:
    """How inputs are read.

    Args:
        dataset: name of the data set, for mixtures; None: that of the file or folder.
        text_column: of texts and of captions in tables; None: "text" or "caption", whichever is there.
        text_unit: what is one document of a .txt file: all of it, what stands between empty lines, or a line.
        validation_share: part of the items that get the split "validation", where the input says nothing of splits.
    """

    dataset: str | None = None
    text_column: str | None = None
    text_unit: TextUnit = "file"
    validation_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise InputError(f"validation_share is {self.validation_share}; it must be at least 0 and below 1")


class Input(Protocol):
    """A numbered stream of items.

    Attributes:
        path: the file or folder.
        part: which part of it, where one path gives several inputs (the splits of a `datasets` folder); "" otherwise.
        stamp: what tells it from another of its name.
    """

    @property
    def path(self) -> Path: ...

    @property
    def part(self) -> str: ...

    @property
    def stamp(self) -> str: ...

    def count(self, every: int) -> tuple[int, list[int]]:
        """(how many items, byte offset of each `every`-th or [] where items are found without)."""

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        """Items start ... stop - 1; `offset` is the one that `count` gave for `start`."""


def open_inputs(paths: Iterable[Path], config: InputConfig) -> list[Input]:
    """The inputs of the paths, always in the same order. Raises InputError for a path that is none, or that holds nothing to read."""
    inputs: list[Input] = []
    for path in paths:
        found = list(_open(path, config))
        if not found:
            raise InputError(f"{path} holds nothing that can be tokenised: {_ALLOWED}")
        inputs += found
    return inputs


_ALLOWED = "allowed are files of samples, pictures and films with captions, .tar, .jsonl, .parquet and .txt, and folders of them"


def _open(path: Path, config: InputConfig) -> Iterator[Input]:
    if not path.exists():
        raise InputError(f"{path} is not there; {_ALLOWED}")
    reading = _Reading(config, spell_out(config.dataset if config.dataset is not None else _name(path)))
    if not path.is_dir():
        yield _open_file(path, reading)
    elif any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        yield from _open_datasets(path, reading)
    else:
        files = _list_files(path)
        containers = [name for name in files if name.endswith((*TARS, *LINES, ".parquet")) or _has_units(name, files, config)]
        for name in containers:
            yield _open_file(path / name, reading)
        folder = MediaFolder(path, files, reading)
        if folder.entries:
            yield folder


def _open_file(path: Path, reading: _Reading) -> Input:
    name = path.name.lower()
    if name.endswith(TARS):
        return Tar(path, reading)
    if name.endswith((*LINES, *PLAIN)):
        return TextFile(path, reading)
    if name.endswith(".parquet"):
        columns = _read_columns(path)
        if {"id", "kind", "media", "captions"} <= set(columns):
            return SamplesTable(path, reading)
        return TextTable(path, reading, _choose_column(path, columns, reading.config))
    raise InputError(f"{path} cannot be tokenised: {_ALLOWED}")


@dataclass(frozen=True)
class _Reading:
    """What all inputs need to make an item."""

    config: InputConfig
    dataset: str

    def choose_split(self, item_id: str) -> str:
        return "validation" if draw_lot("split", self.dataset, item_id) < self.config.validation_share else "train"

    def make_text(self, item_id: str, text: object) -> Item | Refusal:
        item_id = spell_out(item_id)
        if not isinstance(text, str) or not text.strip():
            return Refusal(item_id, "its text is empty" if isinstance(text, str) or text is None else f"its text is {type(text).__name__}")
        return Item(item_id, "text", None, {ANY_LANGUAGE: text}, self.choose_split(item_id), dataset=self.dataset)

    def make_medium(self, item_id: str, suffix: str, media: bytes | Path, facts: Mapping[str, Any]) -> Item | Refusal:
        """facts: "captions" (language -> caption), and where known "split" and "fps"."""
        item_id = spell_out(item_id)
        try:
            kind = "image" if suffix in PICTURES else "video" if suffix in FILMS else detect_kind(media)
            split, fps = spell_out(str(facts.get("split") or self.choose_split(item_id))), facts.get("fps")
            return Item(item_id, kind, media, facts["captions"], split, None if fps is None else float(fps), self.dataset)
        except (ValueError, TypeError, OSError) as error:
            return Refusal(item_id, str(error))


def spell_out(name: str) -> str:
    """A name that can be written as UTF-8: what cannot, in file names of another encoding and in JSON's "\\ud800", is spelled out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class _File:
    """What inputs that are one file have in common."""

    path: Path
    reading: _Reading
    part = ""

    @property
    def stamp(self) -> str:
        return f"{self.path.stat().st_size} bytes"


def _count(offsets: Iterable[int], every: int) -> tuple[int, list[int]]:
    """How many there are, and each `every`-th."""
    count, kept = 0, []
    for offset in offsets:
        if count % every == 0:
            kept.append(offset)
        count += 1
    return count, kept


# ---- our own samples


class SamplesTable(_File):
    def count(self, every: int) -> tuple[int, list[int]]:
        return count_samples(self.path), []

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        for number, row in enumerate(read_rows(self.path, start, stop), start):
            try:
                yield Item.from_sample(Sample(**row), self.reading.dataset)
            except (InputError, TypeError) as error:
                yield Refusal(str(row.get("id") or f"{self.path.name}:{number}"), str(error))


# ---- folders


class MediaFolder:
    """Pictures and films in a folder and the folders in it, in the order of their names; the id is the path within the folder."""

    part = ""

    def __init__(self, path: Path, files: list[str], reading: _Reading) -> None:
        self.path, self.reading = path, reading
        self.files = set(files)
        with_media = {_strip(name) for name in files if PurePosixPath(name).suffix.lower() in MEDIA}
        self.entries = [
            name
            for name in files
            if PurePosixPath(name).suffix.lower() in MEDIA
            or (reading.config.text_unit == "file" and name.lower().endswith(PLAIN) and _strip(name) not in with_media)
        ]

    @property
    def stamp(self) -> str:
        return f"{len(self.entries)} files, {hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()[:16]}"

    def count(self, every: int) -> tuple[int, list[int]]:
        return len(self.entries), []

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        for name in self.entries[start:stop]:
            try:
                yield self._read(name)
            except (ValueError, OSError) as error:
                yield Refusal(name, str(error))

    def _read(self, name: str) -> Item | Refusal:
        file = self.path / name
        if not file.resolve().is_relative_to(self.path.resolve()):
            return Refusal(name, "it is a link that leads out of the folder")
        if name.lower().endswith(PLAIN):
            return self.reading.make_text(name, _read_whole_text(file))
        stem = name[: -len(PurePosixPath(name).suffix)]
        facts: dict[str, Any] | None = None
        if f"{stem}.json" in self.files:
            facts = _read_facts(_read_within(self.path, f"{stem}.json"), self.reading.config)
        if f"{stem}.txt" in self.files and not (facts and facts["captions"]):
            caption = _read_within(self.path, f"{stem}.txt").decode("utf-8").strip()
            facts = (facts or {}) | {"captions": {ANY_LANGUAGE: caption}}
        if facts is None:
            return Refusal(name, f"it has no caption: neither {PurePosixPath(stem).name}.txt nor .json is beside it")
        return self.reading.make_medium(name, file.suffix.lower(), file, facts)


def _list_files(folder: Path) -> list[str]:
    """Files in a folder and in those within it, by their paths in it; hidden ones and links to folders are passed over."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _has_units(name: str, files: list[str], config: InputConfig) -> bool:
    """Whether it is a text of several documents."""
    return config.text_unit != "file" and name.lower().endswith(PLAIN) and not any(_strip(name) + suffix in files for suffix in MEDIA)


def _read_within(folder: Path, name: str) -> bytes:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{name} is a link that leads out of the folder")
    with file.open("rb") as opened:
        contents = opened.read(MAX_TEXT_BYTES + 1)
    if len(contents) > MAX_TEXT_BYTES:
        raise InputError(f"{name} has more than {MAX_TEXT_BYTES} bytes, which is no caption")
    return contents


def _read_whole_text(path: Path) -> str:
    with _open_bytes(path) as file:
        contents = file.read(MAX_TEXT_BYTES + 1)
    if len(contents) > MAX_TEXT_BYTES:
        raise InputError(f"it has more than {MAX_TEXT_BYTES} bytes as one document; a text unit of paragraph or line makes several")
    return contents.decode("utf-8")


def _read_facts(contents: bytes, config: InputConfig) -> dict[str, Any]:
    """What the JSON beside a medium says: {"captions": ..., "split": ..., "fps": ...}."""
    try:
        raw = json.loads(contents)
    except RecursionError as error:
        raise InputError("the JSON beside it is nested too deeply") from error
    if not isinstance(raw, dict):
        raise InputError(f"the JSON beside it is a {type(raw).__name__}; it must be an object with its caption")
    names = ["captions", "caption", "text"] if config.text_column is None else [config.text_column]
    captions = next((raw[name] for name in names if raw.get(name)), None)
    return {"captions": _read_captions(captions), "split": raw.get("split"), "fps": raw.get("fps")}


def _read_captions(value: object) -> dict[str, str]:
    """A caption, or several by their language."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {ANY_LANGUAGE: value.strip()}
    if isinstance(value, dict) and all(isinstance(text, str | None) for text in value.values()):
        return {str(language): text.strip() for language, text in value.items() if text}
    raise InputError(f"its caption is a {type(value).__name__}; it must be a text, or texts by their language")


# ---- tars


class Tar(_File):
    """Samples of a WebDataset tar; the id is the tar's name and the key."""

    def count(self, every: int) -> tuple[int, list[int]]:
        with self._open(0) as tar:
            return _count((next(members).offset for _, members in _group_members(tar)), every)

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        with self._open(offset or 0) as tar:
            for key, members in itertools.islice(_group_members(tar), stop - start):
                item_id = f"{_strip(self.path.name)}/{key}"
                try:
                    yield self._read(tar, item_id, members)
                except (ValueError, OSError) as error:
                    yield Refusal(item_id, str(error))

    @contextmanager
    def _open(self, offset: int) -> Iterator[tarfile.TarFile]:
        with _open_bytes(self.path) as file:
            try:
                file.seek(offset)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    yield tar
            except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
                raise InputError(f"{self.path} is no tar, is damaged or was cut off ({error})") from error

    def _read(self, tar: tarfile.TarFile, item_id: str, members: Iterator[tarfile.TarInfo]) -> Item | Refusal:
        media: tuple[str, bytes] | None = None
        facts: dict[str, Any] = {"captions": {}}
        for member in members:
            suffix = "." + member.name.rsplit(".", 1)[-1].lower()
            if suffix not in (*MEDIA, ".txt", ".json"):
                continue
            if member.size > (MAX_MEDIA_BYTES if suffix in MEDIA else MAX_TEXT_BYTES):
                return Refusal(item_id, f"{member.name} has {member.size} bytes, which is more than is read")
            opened = tar.extractfile(member)
            assert opened is not None  # a regular file
            contents = opened.read()
            if suffix in MEDIA:
                media = suffix, contents
            elif suffix == ".json":
                found = _read_facts(contents, self.reading.config)
                facts = found | {"captions": found["captions"] or facts["captions"]}
            elif not facts["captions"]:
                facts["captions"] = {ANY_LANGUAGE: contents.decode("utf-8").strip()}
        if media is None:
            return Refusal(item_id, "it has no picture and no film")
        return self.reading.make_medium(item_id, *media, facts)


def _group_members(tar: tarfile.TarFile) -> Iterator[tuple[str, Iterator[tarfile.TarInfo]]]:
    """The regular files of a tar by their key: the path up to the first dot of the name."""

    def read() -> Iterator[tarfile.TarInfo]:
        while (member := tar.next()) is not None:
            if member.isreg():
                yield member
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header

    def get_key(member: tarfile.TarInfo) -> str:
        folder, _, name = member.name.rpartition("/")
        return "/".join(part for part in (folder, name.split(".", 1)[0]) if part)

    return itertools.groupby(read(), get_key)


# ---- Hugging Face datasets


class DatasetsSplit:
    """One split of a folder that `datasets.save_to_disk` wrote."""

    def __init__(self, path: Path, part: str, table: Any, reading: _Reading) -> None:
        import datasets

        self.path, self.part, self.reading = path, part, reading
        media = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image | datasets.Video)]
        self.media = media[0] if media else None
        for name in media:
            table = table.cast_column(name, type(table.features[name])(decode=False))
        self.text = _choose_column(path, table.column_names, reading.config, ("caption", "captions", "text"))
        self.table = table.select_columns([name for name in (self.media, self.text, *_optional(table.column_names)) if name])

    @property
    def stamp(self) -> str:
        return f"{len(self.table)} rows"

    def count(self, every: int) -> tuple[int, list[int]]:
        return len(self.table), []

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        for number in range(start, stop):
            item_id = "/".join(filter(None, (self.part, str(number))))
            try:
                row = self.table[number]
                item_id = str(row.get("id") or item_id)
                yield self._read(item_id, row)
            except (ValueError, OSError, pa.ArrowException) as error:
                yield Refusal(item_id, str(error))

    def _read(self, item_id: str, row: dict[str, Any]) -> Item | Refusal:
        split = row.get("split") or ("train" if self.part == "train" else self.part or self.reading.choose_split(item_id))
        if self.media is None:
            item = self.reading.make_text(item_id, row[self.text])
            return item if isinstance(item, Refusal) else Item(item.id, "text", None, item.captions, split, dataset=item.dataset)
        cell = row[self.media] or {}
        media: bytes | Path | None = cell.get("bytes")
        if media is None and cell.get("path"):
            media = file = self.path / cell["path"]
            if not file.resolve().is_relative_to(self.path.resolve()):
                return Refusal(item_id, f"its file {cell['path']!r} lies outside of the data set's folder")
        if media is None:
            return Refusal(item_id, f"its column {self.media!r} is empty")
        return self.reading.make_medium(
            item_id, "", media, {"captions": _read_captions(row[self.text]), "split": split, "fps": row.get("fps")}
        )


def _optional(columns: Iterable[str]) -> list[str]:
    return [name for name in ("id", "split", "fps") if name in columns]


def _open_datasets(path: Path, reading: _Reading) -> Iterator[Input]:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it reads local files, and nobody need know
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path} is a folder of Hugging Face datasets; to read it: pip install 'openemu3[data]'") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as a data set of Hugging Face ({error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        for name in sorted(loaded):
            yield DatasetsSplit(path, name, loaded[name], reading)
    else:
        yield DatasetsSplit(path, "", loaded, reading)


# ---- texts


@dataclass(frozen=True)
class TextTable(_File):
    """A Parquet file with a column of texts, and perhaps "id"."""

    column: str

    def count(self, every: int) -> tuple[int, list[int]]:
        return int(pq.read_metadata(self.path).num_rows), []

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        with pq.ParquetFile(self.path) as file:
            columns = [self.column, *_optional(file.schema_arrow.names)]
            first = 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if first < stop and end > start:
                    try:
                        rows = file.read_row_group(group, columns=columns)
                    except (pa.ArrowException, OSError) as error:
                        raise InputError(f"{self.path} is damaged in row group {group} ({error})") from error
                    for number in range(max(start, first), min(stop, end)):
                        row = {name: rows[name][number - first].as_py() for name in columns}
                        item_id = str(row.get("id") or f"{_strip(self.path.name)}:{number}")
                        yield self.reading.make_text(item_id, row[self.column])
                first = end


class TextFile(_File):
    """A file of texts: objects of JSON line by line, or plain text in lines or paragraphs, or as a whole."""

    def count(self, every: int) -> tuple[int, list[int]]:
        if self._is_whole:
            return 1, [0]
        return _count((offset for offset, _ in self._read_units(0)), every)

    def read(self, start: int, stop: int, offset: int | None) -> Iterator[Item | Refusal]:
        name = _strip(self.path.name)
        if self._is_whole:
            yield self._convert(name, None)
            return
        for number, (_, unit) in enumerate(itertools.islice(self._read_units(offset or 0), stop - start), start):
            yield self._convert(f"{name}:{number}", unit)

    @property
    def _is_lines(self) -> bool:
        return self.path.name.lower().endswith(LINES)

    @property
    def _is_whole(self) -> bool:
        return not self._is_lines and self.reading.config.text_unit == "file"

    def _convert(self, item_id: str, unit: bytes | None) -> Item | Refusal:
        try:
            if self._is_whole:
                return self.reading.make_text(item_id, _read_whole_text(self.path))
            if unit is None:
                return Refusal(item_id, f"it has more than {MAX_TEXT_BYTES} bytes")
            if not self._is_lines:
                return self.reading.make_text(item_id, unit.decode("utf-8").strip())
            row = json.loads(unit)
            if not isinstance(row, dict):
                return Refusal(item_id, f"it is a {type(row).__name__}; it must be an object with its text")
            column = _choose_column(self.path, row, self.reading.config)
            return self.reading.make_text(str(row.get("id") or item_id), row[column])
        except (ValueError, RecursionError, OSError) as error:
            return Refusal(item_id, str(error))

    def _read_units(self, offset: int) -> Iterator[tuple[int, bytes | None]]:
        """(byte offset, contents) of each unit that is not empty; contents None: longer than MAX_TEXT_BYTES."""
        by_line = self._is_lines or self.reading.config.text_unit == "line"
        start, size, lines = offset, 0, list[bytes]()
        with _open_bytes(self.path) as file:
            file.seek(offset)
            for length, line in _read_lines(file, self.path):
                if line.strip():
                    start = start if size else offset
                    size += length
                    lines = [*lines, line] if size <= MAX_TEXT_BYTES else []
                if size and (by_line or not line.strip()):
                    yield start, b"".join(lines) if size <= MAX_TEXT_BYTES else None
                    size, lines = 0, []
                offset += length
        if size:
            yield start, b"".join(lines) if size <= MAX_TEXT_BYTES else None


def _read_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """(length in bytes, contents) of each line; of one longer than MAX_TEXT_BYTES the contents are its beginning."""
    try:
        while line := file.readline(MAX_TEXT_BYTES + 1):
            length, part = len(line), line
            while part and not part.endswith(b"\n"):
                part = file.readline(MAX_TEXT_BYTES)
                length += len(part)
            yield length, line
    except (OSError, EOFError) as error:
        raise InputError(f"{path} is damaged or cut off ({error})") from error


# ---- details


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith((".gz", ".tgz")) else path.open("rb")  # type: ignore[return-value]


def _strip(name: str) -> str:
    """A path without the suffixes of its last part that say what it is."""
    lower = name.lower()
    suffix = next((one for one in (*TARS, *LINES, *PLAIN, ".parquet") if lower.endswith(one)), PurePosixPath(name).suffix)
    return name[: -len(suffix)] if suffix else name


def _name(path: Path) -> str:
    name = path.resolve().name
    return name if path.is_dir() else _strip(name)


def _read_columns(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error})") from error


def _choose_column(path: Path, columns: Iterable[str], config: InputConfig, usual: tuple[str, ...] = ("text", "caption")) -> str:
    names = usual if config.text_column is None else (config.text_column,)
    found = next((name for name in names if name in columns), None)
    if found is None:
        samples = f", nor those of samples ({', '.join(SAMPLES_SCHEMA.names)})" if path.suffix == ".parquet" else ""
        raise InputError(f"{path} has the columns {', '.join(map(str, columns))}; {' or '.join(names)} is not among them{samples}")
    return found
