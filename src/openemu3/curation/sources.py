"""Where raw media lie: folders, tars, tables and lists, here or in an object store -> one stream of items, none of them read yet.

In: paths or URLs. Out: `Item`s, each with its caption and with where its bytes are: a file, a stretch of a tar, or a row of a table.
Read here are files of all these kinds, wherever they lie in a folder, so that a mixture needs no setting:

    media files        picture or film, with the caption in NAME.txt or NAME.json beside it (img2dataset's "files" layout, too)
    *.tar              WebDataset and img2dataset: files of one key are one item
    *.parquet          a column of bytes (also {bytes, path}, as Hugging Face writes it), or of paths; our own samples as well
    *.jsonl            one object a line, with a path or URL

The surprising thing: names are never used to write anything, but still refused where they lead out of their source (symlinks, "..",
absolute paths), since reading other people's files into a data set is a leak. What is refused is an item, too, with the reason in it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from openemu3.curation.engine import import_daft
from openemu3.records import InputError

Kind = Literal["image", "video"]

SUFFIXES: dict[Kind, frozenset[str]] = {
    "image": frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}),
    "video": frozenset({".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".gif", ".webp"}),
}
# What Daft opens beside local files.
REMOTE_SCHEMES = frozenset({"s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "https", "http"})
MEDIA_COLUMNS = ("media", "image", "video", "bytes", "jpg", "jpeg", "png", "webp", "mp4", "content")
PATH_COLUMNS = ("path", "file", "file_name", "image_path", "video_path", "image", "video", "uri", "url")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "prompt", "TEXT")
ID_COLUMNS = ("id", "key", "uid")
MAX_CAPTION_BYTES = 1 << 20
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Item:
    """One picture or film that has not been read.

    Args:
        id: unique within a run: the source's name and the place within it; always valid Unicode.
        uri: file:// or object-store URL of the file that holds the bytes.
        offset, length: the stretch of the file that is the item; None for the whole file.
        row: number of the row in a Parquet file whose `column` holds the bytes; -1 otherwise.
        captions: language -> caption.
        refused: why the item is not to be read; "" for all others.
    """

    id: str
    uri: str
    offset: int | None = None
    length: int | None = None
    row: int = -1
    column: str = ""
    captions: dict[str, str] = field(default_factory=dict)
    refused: str = ""


MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("column", pa.string()),
        pa.field("captions", pa.map_(pa.string(), pa.string())),
        pa.field("refused", pa.string()),
    ]
)


@dataclass(frozen=True)
class SourceConfig:
    """How sources are read.

    Args:
        kind: which media to take; files of the other kind are passed over.
        language: of captions that do not say it.
        roots: further folders that lists and tables may name files in; their own folder is always allowed.
        caption_column, media_column, id_column: names in tables and lists, where they are none of the usual ones.
    """

    kind: Kind = "image"
    language: str = "en"
    roots: tuple[str, ...] = ()
    caption_column: str | None = None
    media_column: str | None = None
    id_column: str | None = None


def list_items(sources: Iterable[str], config: SourceConfig) -> Iterator[Item]:
    """All items of all sources, always in the same order.

    Held at any time: the names of one folder and its parents (of a store: its folder's files), or one batch of a table's rows. Raises
    InputError for a source that is not there or that cannot be opened; whatever is wrong within one becomes a refused item.
    """
    names: set[str] = set()
    for source in sources:
        yield from _list_source(source, _name_source(source, names), config)


def _list_source(source: str, name: str, config: SourceConfig) -> Iterator[Item]:
    if is_remote(source):
        if Path(urlsplit(source).path).suffix.lower() in _CONTAINERS | SUFFIXES[config.kind]:
            yield from _list_files([[_Entry(name, source)]], "", config, posixpath.dirname(source))
        else:
            yield from _list_files(_group_by_stem(_walk_remote(source)), name, config, source)
        return
    path = Path(source)
    if not path.exists():
        raise InputError(f"source {source!r} is not there; it must be a folder, a .tar, .parquet or .jsonl file, or a URL of one")
    path = path.resolve()
    if path.is_dir():
        yield from _list_files(_walk(path), name, config, path.as_uri())
    elif path.suffix.lower() in _CONTAINERS | SUFFIXES[config.kind]:
        yield from _list_files([[_Entry(name, path.as_uri())]], "", config, path.parent.as_uri())
    else:
        allowed = ", ".join(sorted(_CONTAINERS | SUFFIXES[config.kind]))
        raise InputError(f"source {source!r} is no file that is read here; allowed are folders and files that end in {allowed}")


# ------------------------------------------------------------------------------------------------------------------------ bytes of an item


def read_item(item: Item, max_bytes: int) -> bytes:
    """The bytes of an item. Raises InputError if they are not there, cannot be read, or are more than `max_bytes`."""
    try:
        if item.column:
            return _limit(_read_cell(item.uri, item.row, item.column), item, max_bytes)
        with open_uri(item.uri) as file:
            if item.offset is not None:
                if (item.length or 0) > max_bytes:
                    raise InputError(f"item {item.id!r} is too large: {item.length} bytes, at most {max_bytes} are allowed")
                file.seek(item.offset)
                return file.read(-1 if item.length is None else item.length)
            return _limit(file.read(max_bytes + 1), item, max_bytes)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"item {item.id!r} cannot be read: {_say(error)}") from error


def open_uri(uri: str) -> IO[bytes]:
    """A file:// URL or an object of a store, as a seekable binary file."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        path = unquote_to_bytes(parts.path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # a pipe must not block, a link not lead elsewhere
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{uri} is not a plain file")
        return open(descriptor, "rb")
    opened: IO[bytes] = import_daft().File(uri).open()
    return opened


@contextmanager
def open_item(item: Item, max_bytes: int) -> Iterator[str | bytes]:
    """An item as the functions of `media` take it: the path of a file that is the item, else its bytes.

    So a film of gigabytes is not held, unless it lies in a tar, a table or a store. The path is good within the `with` alone: it stands for
    the file that was opened, so that nobody can put a link in its place meanwhile. Raises InputError as `read_item` does.
    """
    if item.column or item.offset is not None or urlsplit(item.uri).scheme != "file":
        yield read_item(item, max_bytes)
        return
    try:
        file = open_uri(item.uri)
    except OSError as error:
        raise InputError(f"item {item.id!r} cannot be read: {_say(error)}") from error
    with file:
        yield f"/dev/fd/{file.fileno()}"


def is_remote(uri: str) -> bool:
    return urlsplit(uri).scheme in REMOTE_SCHEMES and "://" in uri


def _limit(data: bytes, item: Item, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise InputError(f"item {item.id!r} is too large: more than {max_bytes} bytes are not read")
    return data


_open_table: tuple[str, int, str, pa.Array] | None = None  # the last group of rows read: (file, its first row, column, values)


def _read_cell(uri: str, row: int, column: str) -> bytes:
    """One cell of a Parquet file. Neighbouring rows come one after the other, so that the last group of rows is kept."""
    global _open_table
    if _open_table is None or _open_table[0] != uri or _open_table[2] != column or not 0 <= row - _open_table[1] < len(_open_table[3]):
        with open_uri(uri) as handle, pq.ParquetFile(handle) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < first + rows:
                    break
                first += rows
            _open_table = (uri, first, column, file.read_row_group(group, columns=[column]).column(0).combine_chunks())
    value = _open_table[3][row - _open_table[1]].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    return bytes(data or b"")


# ---------------------------------------------------------------------------------------------------------------------------------- walking

_CONTAINERS = frozenset({".tar", ".parquet", ".jsonl"})


@dataclass(frozen=True)
class _Entry:
    """A file below a source: its path there, and its URL."""

    relative: str
    uri: str
    refused: str = ""


def _walk(folder: Path) -> Iterator[list[_Entry]]:
    """Plain files below a folder, those of one stem together, hidden ones left out; the files of a folder come before its folders.

    Links are refused, not followed. Of a folder its names alone are held, since there are folders of a million files.
    """

    def visit(path: bytes, relative: str) -> Iterator[list[_Entry]]:
        files: list[bytes] = []
        folders: list[bytes] = []
        with os.scandir(path) as found:
            for entry in found:
                if not entry.name.startswith(b"."):
                    (folders if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
        files.sort(key=posixpath.splitext)
        for _, names in itertools.groupby(files, key=lambda name: posixpath.splitext(name)[0]):
            yield [_look_at(posixpath.join(path, name), posixpath.join(relative, _decode_name(name))) for name in names]
        for name in sorted(folders):
            yield from visit(posixpath.join(path, name), posixpath.join(relative, _decode_name(name)))

    yield from visit(os.fsencode(folder), "")


def _look_at(path: bytes, relative: str) -> _Entry:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return _Entry(relative, _make_uri(path), "gone")
    return _Entry(relative, _make_uri(path), "" if stat.S_ISREG(mode) else "symlink" if stat.S_ISLNK(mode) else "not a file")


def _walk_remote(url: str) -> Iterator[_Entry]:
    """Objects below a URL, in the store's order."""
    daft = import_daft()
    base = url.rstrip("/")
    try:
        for row in daft.from_glob_path(f"{base}/**").select("path").iter_rows():
            path = str(row["path"])
            yield _Entry(path.removeprefix(base).lstrip("/"), path)
    except Exception as error:
        raise InputError(f"source {url!r} cannot be listed: {_say(error)}") from error


def _decode_name(name: bytes) -> str:
    """A file's name; one that is no UTF-8 gets a digest of its bytes, so that it stays different from others."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        stem, suffix = posixpath.splitext(name.decode("utf-8", "replace"))
        return f"{stem}~{hashlib.blake2b(name, digest_size=6).hexdigest()}{suffix}"


def _make_uri(path: bytes) -> str:
    return "file://" + quote_from_bytes(path)


def _list_files(groups: Iterable[list[_Entry]], name: str, config: SourceConfig, base: str) -> Iterator[Item]:
    """Items of the files. Files of one stem are together: a.jpg, a.json and a.txt; a.tar and its table a.parquet."""
    for group in groups:
        by_suffix = {posixpath.splitext(entry.relative)[1].lower(): entry for entry in group}
        captions: dict[str, str] | None = None
        for entry in group:  # not those of by_suffix: a.jpg and a.JPG are two files
            suffix = posixpath.splitext(entry.relative)[1].lower()
            if suffix not in _CONTAINERS | SUFFIXES[config.kind] or (suffix == ".parquet" and ".tar" in by_suffix):
                continue  # the latter is img2dataset's table of what is in the tar
            if entry.refused:
                yield Item(posixpath.join(name, entry.relative), entry.uri, refused=entry.refused)
            elif suffix in _CONTAINERS:
                read = {".tar": _list_tar, ".parquet": _list_table, ".jsonl": _list_lines}[suffix]
                yield from _refuse_damaged(
                    read(entry, posixpath.join(name, entry.relative), config, base), posixpath.join(name, entry.relative), entry.uri
                )
            else:
                captions = _read_sidecars(by_suffix, config) if captions is None else captions
                yield Item(posixpath.join(name, entry.relative), entry.uri, captions=captions)


def _group_by_stem(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """Objects of one folder whose names differ in the suffix alone, whatever the store's order."""
    folder: str | None = None
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        parent = posixpath.dirname(entry.relative)
        if parent != folder:
            yield from groups.values()
            folder, groups = parent, {}
        groups.setdefault(posixpath.splitext(entry.relative)[0], []).append(entry)
    yield from groups.values()


def _refuse_damaged(items: Iterator[Item], name: str, uri: str) -> Iterator[Item]:
    """Items of one container; damage in it ends it with a refused item, not the run."""
    try:
        yield from items
    except (InputError, OSError, tarfile.TarError, pa.ArrowException, ValueError) as error:
        yield Item(f"{name}#rest", uri, refused=f"unreadable container: {_say(error)}")


def _read_sidecars(files: dict[str, _Entry], config: SourceConfig) -> dict[str, str]:
    captions: dict[str, str] = {}
    for suffix in (".json", ".txt", ".caption"):
        if suffix in files and not files[suffix].refused:
            try:
                with open_uri(files[suffix].uri) as file:
                    captions.update(_parse_caption(file.read(MAX_CAPTION_BYTES), suffix, config))
            except (OSError, InputError):
                continue  # a picture without its caption is still a picture
    return captions


def _parse_caption(data: bytes, suffix: str, config: SourceConfig) -> dict[str, str]:
    text = data.decode("utf-8", "replace").strip()
    if suffix != ".json":
        return {config.language: text} if text else {}
    try:
        return _find_captions(json.loads(text), config)
    except (ValueError, RecursionError):
        return {}


def _find_captions(row: Any, config: SourceConfig) -> dict[str, str]:
    """The captions in a JSON object or a row of a table: a str is in the language of the configuration, a map names its languages."""
    if not isinstance(row, dict):
        return {}
    for column in [config.caption_column] if config.caption_column else CAPTION_COLUMNS:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
            value = dict(value)
        if isinstance(value, dict):
            return {str(key): clean_text(text) for key, text in value.items() if isinstance(text, str) and text.strip()}
        if isinstance(value, str) and value.strip():
            return {config.language: clean_text(value)}
    return {}


def clean_text(text: str) -> str:
    """Text that Parquet can hold: lone surrogates, as JSON may have them, become U+FFFD; zero bytes and outer spaces go."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "").strip()


# ------------------------------------------------------------------------------------------------------------------------------- containers


def _list_tar(entry: _Entry, name: str, config: SourceConfig, base: str) -> Iterator[Item]:
    """A tar's items by key, in order: members whose path up to the name's first dot is the same and that follow each other."""
    key: str | None = None
    numbers = itertools.count()
    members: list[tarfile.TarInfo] = []
    texts: dict[str, bytes] = {}

    def finish() -> Iterator[Item]:
        captions: dict[str, str] = {}
        for suffix, data in texts.items():
            captions.update(_parse_caption(data, suffix, config))
        for member in members:
            inner, number = clean_text(member.name), next(numbers)
            refused = ""
            if _escapes(member.name):
                refused = "name leads out of the source"
            elif not member.isreg():
                refused = "symlink" if member.issym() or member.islnk() else "not a file"
            yield Item(f"{name}#{number}/{inner}", entry.uri, member.offset_data, member.size, captions=captions, refused=refused)

    with open_uri(entry.uri) as file:
        if file.read(2) == b"\x1f\x8b":
            raise InputError("it is compressed, so that nothing in it can be found without unpacking it all; unpack it to a plain .tar")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep one for every file
                if member.isdir():
                    continue
                head, last = posixpath.split(member.name)
                stem, _, extension = last.partition(".")
                suffix = "." + extension.lower()
                if posixpath.join(head, stem) != key:
                    yield from finish()
                    key, members, texts = posixpath.join(head, stem), [], {}
                if posixpath.splitext(last)[1].lower() in SUFFIXES[config.kind]:  # a name may have more dots: 1.left.jpg and 1.right.jpg
                    members.append(member)
                if suffix in (".txt", ".json", ".caption") and member.isreg() and member.size <= MAX_CAPTION_BYTES:
                    extracted = tar.extractfile(member)
                    texts[suffix] = extracted.read() if extracted is not None else b""
            yield from finish()


def _list_table(entry: _Entry, name: str, config: SourceConfig, base: str) -> Iterator[Item]:
    """A Parquet file's rows; media columns are not read."""
    with open_uri(entry.uri) as handle, pq.ParquetFile(handle) as file:
        schema = file.schema_arrow
        column, has_bytes = _choose_media_column(schema, config)
        wanted = [n for n in (config.caption_column, *CAPTION_COLUMNS, config.id_column, *ID_COLUMNS, "kind") if n and n in schema.names]
        wanted = list(dict.fromkeys(wanted + ([] if has_bytes else [column])))
        if not wanted:  # a table of bytes alone: there is still one item a row
            for row in range(file.metadata.num_rows):
                yield Item(f"{name}#{row}", entry.uri, row=row, column=column)
            return
        number = -1
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
            for row_of in batch.to_pylist():
                number += 1
                if row_of.get("kind") not in (None, config.kind):
                    continue
                captions, given = _find_captions(row_of, config), _find_id(row_of, config)
                identity = f"{name}#{number}/{given}" if given else f"{name}#{number}"
                if has_bytes:
                    yield Item(identity, entry.uri, row=number, column=column, captions=captions)
                else:
                    yield _locate(row_of.get(column), identity, captions, config, base, entry.uri)


def _choose_media_column(schema: pa.Schema, config: SourceConfig) -> tuple[str, bool]:
    """(name of the column that holds the media or names it, whether it holds bytes). Raises InputError if there is none."""
    binary = (pa.types.is_binary, pa.types.is_large_binary)
    text = (pa.types.is_string, pa.types.is_large_string)
    for names, tests in ((MEDIA_COLUMNS, binary), (PATH_COLUMNS, text)):
        for column in [config.media_column] if config.media_column else names:
            if column not in schema.names:
                continue
            kind = schema.field(column).type
            if any(test(kind) for test in tests):
                return column, tests is binary
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and tests is binary:
                return column, True
    wanted = config.media_column or f"bytes in one of {', '.join(MEDIA_COLUMNS)} or a path in one of {', '.join(PATH_COLUMNS)}"
    raise InputError(f"its columns are {', '.join(schema.names)}; needed is {wanted}")


def _list_lines(entry: _Entry, name: str, config: SourceConfig, base: str) -> Iterator[Item]:
    """A JSONL file's items."""
    with open_uri(entry.uri) as handle, io.TextIOWrapper(handle, "utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                yield Item(f"{name}#{number}", entry.uri, refused="not a JSON object")
                continue
            columns = [config.media_column] if config.media_column else PATH_COLUMNS
            place = next((row[c] for c in columns if isinstance(row.get(c), str)), None)
            given = _find_id(row, config)
            identity = f"{name}#{number}/{given}" if given else f"{name}#{number}"
            yield _locate(place, identity, _find_captions(row, config), config, base, entry.uri)


def _find_id(row: dict[str, Any], config: SourceConfig) -> str:
    for column in [config.id_column] if config.id_column else ID_COLUMNS:
        if isinstance(row.get(column), str | int) and row[column] != "":
            return clean_text(str(row[column]))
    return ""


def _locate(place: object, identity: str, captions: dict[str, str], config: SourceConfig, base: str, listed_in: str) -> Item:
    """The item that a list names by path or URL: refused unless it lies below the list's folder or one of the roots."""
    if not isinstance(place, str) or not place or "\0" in place:
        return Item(identity, listed_in, captions=captions, refused="names no file")
    if is_remote(place):
        return Item(identity, place, captions=captions)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", place) and not place.startswith("file://"):
        return Item(identity, listed_in, captions=captions, refused="a URL that is not read here")
    folder = posixpath.dirname(listed_in)
    if is_remote(listed_in):
        if _escapes(place):
            return Item(identity, listed_in, captions=captions, refused="name leads out of the source")
        return Item(identity, posixpath.join(folder, place), captions=captions)
    named = os.fsdecode(unquote_to_bytes(urlsplit(place).path)) if place.startswith("file://") else place
    local = _to_path(folder)
    target = os.path.realpath(os.path.join(local, named))
    if not any(target.startswith(root) for root in _resolve_roots((local, _to_path(base), *config.roots))):
        return Item(identity, listed_in, captions=captions, refused="name leads out of the source")
    return Item(identity, _make_uri(os.fsencode(target)), captions=captions)


def _to_path(uri: str) -> str:
    return os.fsdecode(unquote_to_bytes(urlsplit(uri).path))


@lru_cache(maxsize=8)
def _resolve_roots(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Real paths, each with a slash at its end."""
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)


def _escapes(name: str) -> bool:
    normal = posixpath.normpath(name.replace("\\", "/"))
    return normal.startswith(("/", "../")) or normal == ".." or bool(re.match(r"[a-zA-Z]:/", normal))


def _name_source(source: str, taken: set[str]) -> str:
    """A source's last name, made different from the earlier ones'."""
    last = posixpath.basename(urlsplit(source).path.rstrip("/")) if is_remote(source) else Path(source).resolve().name
    first = clean_text(os.fsencode(last).decode("utf-8", "backslashreplace")) or "source"
    name, number = first, 2
    while name in taken:
        name, number = f"{first}-{number}", number + 1
    taken.add(name)
    return name


def _say(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
