"""From inputs to a corpus: a folder of shards of token documents, made piece by piece, by any number of workers, stoppable at any time.

In: inputs (data/inputs.py) and the tokenizers. Out: a folder with

    plan.json                 what is made of what: settings, inputs, which items each shard has; written first
    documents-00000.parquet   a shard (data/shards.py), written aside and renamed
    documents-00000.json      its marker, written after it: counts, and the items that gave no document, with the reason
    refused.jsonl             all refused items; written when all markers are there
    manifest.json             names and sizes of all shards, and totals; written last: the corpus is complete

The surprising thing: there is no state but these files. A shard without a marker is made from nothing, always with the same bytes; so a
second run after a kill does what is missing, and workers share the work by taking every n-th shard.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openemu3.data.inputs import Input, spell_out
from openemu3.data.shards import MANIFEST_FILE, write_documents
from openemu3.media import write_aside
from openemu3.records import InputError
from openemu3.tokenization.encode import EncodeConfig, EncodedDocument, Item, Refusal, encode_items
from openemu3.tokenization.sequence import Role, SequenceFormat
from openemu3.tokenization.vision import VisionTokenizer

PLAN_FILE = "plan.json"
REFUSED_FILE = "refused.jsonl"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """Items start ... stop - 1 of an input, which begin at byte `offset` where it is read by bytes."""

    name: str
    input: int
    start: int
    stop: int
    offset: int | None


@dataclass(frozen=True)
class Progress:
    """Of the shards of this worker: items and tokens that are done, those from before this run included."""

    num_items: int
    total_items: int
    num_documents: int
    num_tokens: int
    num_refused: int


@dataclass(frozen=True)
class CorpusSummary:
    """What a folder holds. complete: all shards are there, also those of other workers."""

    complete: bool
    num_shards: int
    num_items: int
    num_documents: int
    num_tokens: int
    num_refused: int
    sources: dict[str, int]
    tokens: dict[str, int]  # by role


def write_corpus(
    folder: Path,
    inputs: Sequence[Input],
    tokenizer: VisionTokenizer,
    sequence_format: SequenceFormat,
    config: EncodeConfig,
    fingerprint: str,
    *,
    samples_per_shard: int = 1024,
    settings: dict[str, Any] | None = None,
    worker: int = 0,
    num_workers: int = 1,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> CorpusSummary:
    """Make the shards of this worker that are missing, and the manifest when none is missing any more.

    settings: what else the items depend on (how the inputs are read); kept in the plan. Raises InputError for a folder that was begun
    with other inputs or settings, and for an input that is damaged as a whole.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    if not 0 <= worker < num_workers:
        raise InputError(f"worker is {worker}; of {num_workers} workers it must be 0 to {num_workers - 1}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; the corpus needs a folder of its own")
    made_of = {
        "version": VERSION,
        "fingerprint": fingerprint,
        # Without the size of batches: whom a GPU runs out of memory may go on with smaller ones, at the price of other roundings.
        "encode": {name: value for name, value in json.loads(json.dumps(asdict(config))).items() if name != "batch_tokens"},
        "samples_per_shard": samples_per_shard,
        "settings": settings or {},
        "inputs": [_identify(one) for one in inputs],
    }
    shards = _load_plan(folder, made_of, inputs)
    mine = shards[worker::num_workers]
    total = sum(shard.stop - shard.start for shard in mine)
    markers = {shard.name: marker for shard in mine if (marker := _read_marker(folder, shard)) is not None}
    done = Progress(0, total, 0, 0, 0)
    for marker in markers.values():
        done = _add(done, marker)
    progress(done)
    for shard in mine:
        if shard.name in markers:
            continue
        before = done

        def tell(items: int, documents: int, tokens: int, refused: int, before: Progress = before) -> None:
            progress(
                Progress(
                    before.num_items + items,
                    total,
                    before.num_documents + documents,
                    before.num_tokens + tokens,
                    before.num_refused + refused,
                )
            )

        marker = _write_shard(folder, shard, inputs[shard.input], tokenizer, sequence_format, config, fingerprint, tell)
        done = _add(done, marker)
        progress(done)
    return _finish(folder, shards)


# ---- the plan


def _identify(one: Input) -> dict[str, str]:
    """What must be the same for a run to go on."""
    return {"name": spell_out(one.path.name), "part": one.part, "stamp": one.stamp}


def _load_plan(folder: Path, made_of: dict[str, Any], inputs: Sequence[Input]) -> list[Shard]:
    """The shards, as they were planned when the folder was begun. Counting happens then alone."""
    path = folder / PLAN_FILE
    if path.exists():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            planned, shards = plan["made_of"], [Shard(**shard) for shard in plan["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); choose another folder") from error
        for key in made_of:
            if planned.get(key) != made_of[key]:
                began, now = _shorten(planned.get(key), made_of[key]), _shorten(made_of[key], planned.get(key))
                raise InputError(f"{folder} was begun with {key} {began}, not {now}; choose another folder")
        return shards
    if (folder / MANIFEST_FILE).exists() or any(folder.glob("documents-*")):
        raise InputError(f"{folder} holds documents but no {PLAN_FILE}; choose another folder")
    every = made_of["samples_per_shard"]
    shards = []
    for index, one in enumerate(inputs):
        count, offsets = one.count(every)
        for part, start in enumerate(range(0, count, every)):
            offset = offsets[part] if offsets else None
            shards.append(Shard(f"documents-{len(shards):05d}", index, start, min(start + every, count), offset))
    if not shards:
        raise InputError(f"{', '.join(str(one.path) for one in inputs)}: there is nothing in them to tokenise")
    _write_json(path, {"made_of": made_of, "shards": [asdict(shard) for shard in shards]})
    return shards


def _shorten(value: Any, other: Any) -> str:
    """What is different in `value`, for a message."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: found for key, found in value.items() if other.get(key) != found}
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 200 else text[:200] + " ..."


# ---- one shard


def _write_shard(
    folder: Path,
    shard: Shard,
    one: Input,
    tokenizer: VisionTokenizer,
    form: SequenceFormat,
    config: EncodeConfig,
    fingerprint: str,
    tell: Callable[[int, int, int, int], None],
) -> dict[str, Any]:
    """Writes the shard and then its marker; the marker."""
    refused: list[Refusal] = []
    sources: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    num_items = 0

    def read() -> Iterator[Item]:
        nonlocal num_items
        for item in one.read(shard.start, shard.stop, shard.offset):
            num_items += 1
            if isinstance(item, Refusal):
                refused.append(item)
            else:
                yield item

    def count(documents: Iterator[EncodedDocument]) -> Iterator[EncodedDocument]:
        for document in documents:
            sources[document.source] += 1
            for role in Role:
                roles[role.name.lower()] += int((document.encoded.roles == role).sum())
            yield document
            tell(num_items, sources.total(), roles.total(), len(refused))

    path = folder / f"{shard.name}.parquet"
    write_documents(path, count(encode_items(read(), tokenizer, form, config, refused.append)), fingerprint)
    if num_items != shard.stop - shard.start:
        raise InputError(f"{one.path} has changed since {folder / PLAN_FILE} was made: {shard.name} found {num_items} of its items")
    _sync(path)  # a marker must never outlive the bytes that it is about
    marker = {
        "bytes": path.stat().st_size,
        "items": num_items,
        "documents": sources.total(),
        "tokens": roles.total(),
        "sources": dict(sorted(sources.items())),
        "roles": {name: number for name, number in sorted(roles.items()) if number},
        "refused": sorted([spell_out(refusal.sample_id), spell_out(refusal.reason)] for refusal in refused),
    }
    _write_json(folder / f"{shard.name}.json", marker)
    return marker


def _read_marker(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """The marker of a shard that is there as it was written, else None: it is to be made again."""
    try:
        marker = json.loads((folder / f"{shard.name}.json").read_text(encoding="utf-8"))
        is_whole = (folder / f"{shard.name}.parquet").stat().st_size == marker["bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return marker if is_whole else None


def _add(progress: Progress, marker: dict[str, Any]) -> Progress:
    return replace(
        progress,
        num_items=progress.num_items + marker["items"],
        num_documents=progress.num_documents + marker["documents"],
        num_tokens=progress.num_tokens + marker["tokens"],
        num_refused=progress.num_refused + len(marker["refused"]),
    )


# ---- the end


def _finish(folder: Path, shards: Sequence[Shard]) -> CorpusSummary:
    """The manifest, if no shard is missing any more."""
    markers = {shard.name: marker for shard in shards if (marker := _read_marker(folder, shard)) is not None}
    sources, roles = Counter[str](), Counter[str]()
    for marker in markers.values():
        sources.update(marker["sources"])
        roles.update(marker["roles"])
    summary = CorpusSummary(
        complete=len(markers) == len(shards),
        num_shards=len(markers),
        num_items=sum(marker["items"] for marker in markers.values()),
        num_documents=sources.total(),
        num_tokens=roles.total(),
        num_refused=sum(len(marker["refused"]) for marker in markers.values()),
        sources=dict(sorted(sources.items())),
        tokens=dict(sorted(roles.items())),
    )
    if summary.complete:
        with write_aside(folder / REFUSED_FILE) as partial, partial.open("w", encoding="utf-8") as file:
            for name, marker in markers.items():
                for sample_id, reason in marker["refused"]:
                    file.write(json.dumps({"sample_id": sample_id, "reason": reason, "shard": name}, ensure_ascii=False) + "\n")
        sizes = {f"{name}.parquet": marker["bytes"] for name, marker in markers.items()}
        _write_json(folder / MANIFEST_FILE, {"shards": sizes, **asdict(summary)})
        for left in folder.glob(".documents-*.partial"):  # by a run that was killed
            left.unlink(missing_ok=True)
    return summary


def _write_json(path: Path, value: Any) -> None:
    with write_aside(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        _sync(partial)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
