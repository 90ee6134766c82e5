"""Preference pairs on disk: for one prompt the completion that people liked best and the one they liked least, as token ids.

In: what voting chose. Out: Parquet rows that training reads. The ids are those that were sampled (paper, section 2.5.1): pixels are never
tokenised again. The surprising thing: two more columns may stand beside a pair, the log-probabilities that the reference model gives
its completions; they are computed once, so that no second model is in memory while training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from openemu3.records import InputError

PAIRS_SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.uint32()), nullable=False),  # BOS ... IMG
        pa.field("chosen_ids", pa.list_(pa.uint32()), nullable=False),  # what follows, up to and with EOS
        pa.field("rejected_ids", pa.list_(pa.uint32()), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # "image" or "video"
        pa.field("chosen_score", pa.float64(), nullable=False),
        pa.field("rejected_score", pa.float64(), nullable=False),
    ]
)
REFERENCE_COLUMNS = ("reference_chosen", "reference_rejected")  # float64, sums of natural log-probabilities
FINGERPRINT_KEY, REFERENCE_KEY = b"openemu3.fingerprint", b"openemu3.reference"
ROWS_PER_GROUP = 256


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """One prompt and two completions of it.

    Args:
        prompt_ids, chosen_ids, rejected_ids: uint32 [n], none empty.
        kind: "image" or "video".
        chosen_score, rejected_score: what the voters gave; the first must be higher.
        reference_chosen, reference_rejected: log-probability of each completion under the reference model, in nats; None: not computed.
    """

    prompt: str
    prompt_ids: NDArray[np.uint32]
    chosen_ids: NDArray[np.uint32]
    rejected_ids: NDArray[np.uint32]
    kind: str
    chosen_score: float
    rejected_score: float
    reference_chosen: float | None = None
    reference_rejected: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = np.asarray(getattr(self, name))
            if ids.ndim != 1 or not len(ids):
                raise InputError(
                    f"pair of prompt {self.prompt!r} has {name} of shape {list(ids.shape)}; one row of at least one id is needed"
                )
            object.__setattr__(self, name, ids.astype(np.uint32))
        if self.kind not in ("image", "video"):
            raise InputError(f"pair of prompt {self.prompt!r} has kind {self.kind!r}; allowed are 'image' and 'video'")
        if not self.chosen_score > self.rejected_score:
            raise InputError(
                f"pair of prompt {self.prompt!r} has the scores {self.chosen_score} (chosen) and {self.rejected_score} (rejected); "
                "the chosen one must be higher"
            )
        if np.array_equal(self.chosen_ids, self.rejected_ids):
            raise InputError(f"pair of prompt {self.prompt!r} has one completion twice; chosen and rejected must differ")


def write_pairs(path: Path | str, pairs: Iterable[PreferencePair], fingerprint: str, reference: str | None = None) -> int:
    """Write pairs to one Parquet file, which appears only when complete; the number written.

    fingerprint: of the tokenizers that the ids belong to (`training.export.compute_fingerprint`).
    reference: digest of the model whose log-probabilities the pairs carry; None writes no such columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    schema, metadata = PAIRS_SCHEMA, {FINGERPRINT_KEY: fingerprint.encode()}
    if reference is not None:
        for name in REFERENCE_COLUMNS:
            schema = schema.append(pa.field(name, pa.float64(), nullable=False))
        metadata[REFERENCE_KEY] = reference.encode()
    schema = schema.with_metadata(metadata)
    count = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            rows: list[dict[str, Any]] = []
            for pair in pairs:
                rows.append({name: getattr(pair, name) for name in schema.names})
                count += 1
                if len(rows) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_pairs(path: Path | str, fingerprint: str | None = None) -> list[PreferencePair]:
    """All pairs of a file, with their reference log-probabilities where the file has them.

    fingerprint: of the model's tokenizers; InputError if the ids were made by others, and for a file that holds no pairs.
    """
    table = _read_table(path)
    found = (table.schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
    if fingerprint is not None and found != fingerprint:
        raise InputError(f"{path} holds token ids of the tokenizers {found!r}, but the model's are {fingerprint!r}; sample with this model")
    if not len(table):
        raise InputError(f"{path} holds no preference pair; at least one is needed")
    references = [table[name].to_pylist() if name in table.schema.names else [None] * len(table) for name in REFERENCE_COLUMNS]
    pairs = []
    for row, chosen, rejected in zip(range(len(table)), *references, strict=True):
        values = {name: table[name][row].as_py() for name in PAIRS_SCHEMA.names}
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            values[name] = np.array(values[name], dtype=np.uint32)
        pairs.append(PreferencePair(**values, reference_chosen=chosen, reference_rejected=rejected))
    return pairs


def read_reference(path: Path | str) -> str | None:
    """The digest of the model whose log-probabilities the file carries; None if it carries none."""
    value = (_read_schema(path).metadata or {}).get(REFERENCE_KEY)
    return None if value is None else value.decode()


def split_pairs(pairs: Sequence[PreferencePair], held_out_share: float) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(to learn from, held out). A lottery by the prompt's hash, so that all pairs of a prompt are on one side."""
    if not 0 <= held_out_share < 1:
        raise InputError(f"held_out_share is {held_out_share}; it must be at least 0 and below 1")

    def is_held_out(pair: PreferencePair) -> bool:
        return int.from_bytes(hashlib.sha256(pair.prompt.encode()).digest()[:4]) < held_out_share * 2**32

    return [pair for pair in pairs if not is_held_out(pair)], [pair for pair in pairs if is_held_out(pair)]


def with_reference(pair: PreferencePair, chosen: float, rejected: float) -> PreferencePair:
    return replace(pair, reference_chosen=chosen, reference_rejected=rejected)


def _read_schema(path: Path | str) -> pa.Schema:
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as preference pairs ({error})") from error
    for field in PAIRS_SCHEMA:
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise InputError(f"{path} has no column {field.name} of type {field.type}; `emu3 preferences pairs` writes such files")
    return schema


def _read_table(path: Path | str) -> pa.Table:
    _read_schema(path)
    try:
        return pq.read_table(path, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged ({error})") from error
