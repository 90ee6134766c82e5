"""Token documents: Parquet files of encoded sequences, and their batches for training a language model.

In: EncodedDocument records. Out: LanguageBatch, in an endless, seeded order of which any part can be asked for by number, so that
a run resumes exactly. Documents of similar length share a batch, padded on the right; a batch holds about `tokens_per_batch`
tokens. The surprising thing: a null prompt (for classifier-free guidance) is a document whose context text was dropped as the
batch is built; the roles alone say what to drop.

Shapes: B documents, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from openemu3.data.shards import DOCUMENTS_SCHEMA, _open_parquet, encode_runs, list_shards, write_documents
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role


class DocumentTable:
    """The documents of some files, in memory as flat arrays: 5 bytes a token."""

    def __init__(self, paths: Iterable[Path | str], splits: Iterable[str], fingerprint: str | None = None) -> None:
        wanted = set(splits)
        self.sources: list[str] = []
        self.sample_ids: list[str] = []
        ids: list[NDArray[np.uint32]] = []
        roles: list[NDArray[np.uint8]] = []
        for path in list_shards(paths):
            with _open_parquet(path, fingerprint) as file:
                for group in range(file.num_row_groups):
                    for row in _read_group(file, group, path):
                        if row["split"] not in wanted:
                            continue
                        self.sources.append(row["source"])
                        self.sample_ids.append(row["sample_id"])
                        ids.append(np.asarray(row["token_ids"], dtype=np.uint32))
                        roles.append(np.repeat(np.asarray(row["role_values"], np.uint8), row["role_lengths"]))
        if not ids:
            raise InputError(f"no documents of split {sorted(wanted)} in {[str(p) for p in paths]}")
        self.lengths = np.array([len(x) for x in ids])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.token_ids, self.roles = np.concatenate(ids), np.concatenate(roles)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """(token ids, roles) of one document."""
        part = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self.token_ids[part], self.roles[part]


def _read_group(file: pq.ParquetFile, group: int, path: Path | str) -> list[dict[str, Any]]:
    try:
        return file.read_row_group(group).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged in row group {group} ({error})") from error


__all__ = ["DOCUMENTS_SCHEMA", "DocumentBatches", "DocumentTable", "encode_runs", "write_documents"]  # until training takes TokenBatch


@dataclass(frozen=True)
class LanguageBatch:
    """token_ids int64 [B, S] and roles uint8 [B, S]; Role.PADDING on the right of shorter documents."""

    token_ids: Tensor
    roles: Tensor


@dataclass(frozen=True)
class DocumentBatchesConfig:
    tokens_per_batch: int = 4096
    mixture: dict[str, float] = field(default_factory=dict)  # source -> how often a document of it is seen per epoch; default once
    null_prompt_share: float = 0.1  # of the generation documents
    # Whether the codes of understanding documents are targets too, as in the paper's pre-training; its image-to-text stage ignores them.
    learn_described_codes: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.null_prompt_share <= 1:
            raise InputError(f"null_prompt_share is {self.null_prompt_share}; it must be between 0 and 1")
        if self.tokens_per_batch < 1:
            raise InputError(f"tokens_per_batch is {self.tokens_per_batch}; it must be at least 1")
        for source, rate in self.mixture.items():
            if not 0 <= rate < math.inf:
                raise InputError(f"mixture has {rate} for {source!r}; it must be 0 (leave out) or more")


class DocumentBatches:
    """Calling it with a position yields the batches from that number on."""

    def __init__(self, table: DocumentTable, config: DocumentBatchesConfig, pad_id: int) -> None:
        self.table, self.config, self.pad_id = table, config, pad_id
        self.generates = np.array([source in ("draw", "film") for source in table.sources])
        unknown = set(config.mixture) - set(table.sources)
        if unknown:
            raise InputError(f"mixture names {sorted(unknown)}; the documents have {sorted(set(table.sources))}")
        if not any(config.mixture.get(source, 1.0) for source in set(table.sources)):
            raise InputError(f"mixture {config.mixture} leaves out every document; give one source more than 0")
        self._plan_epoch = lru_cache(maxsize=2)(self._plan_epoch_uncached)

    def __call__(self, position: int) -> Iterator[LanguageBatch]:
        epoch = 0
        while position >= len(self._plan_epoch(epoch)):
            position -= len(self._plan_epoch(epoch))
            epoch += 1
        while True:
            for number in range(position, len(self._plan_epoch(epoch))):
                yield self._build(epoch, self._plan_epoch(epoch)[number])
            epoch, position = epoch + 1, 0

    def _plan_epoch_uncached(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of one epoch as arrays of document numbers."""
        random = np.random.default_rng((self.config.seed, epoch))
        rates = np.array([self.config.mixture.get(source, 1.0) for source in self.table.sources])
        copies = np.floor(rates + random.random(len(rates))).astype(np.int64)  # 2.3 means two copies, and a third in 30 % of epochs
        drawn = random.permutation(np.repeat(np.arange(len(rates)), copies))
        batches: list[NDArray[np.int64]] = []
        window = 256 * max(1, self.config.tokens_per_batch // 256)  # documents sorted by length together: little padding, much mixing
        for first in range(0, len(drawn), window):
            part = drawn[first : first + window]
            part = part[np.argsort(self.table.lengths[part], kind="stable")]
            start = 0
            for end in range(1, len(part) + 1):
                longest_next = self.table.lengths[part[end]] if end < len(part) else 0
                if end == len(part) or (end + 1 - start) * longest_next > self.config.tokens_per_batch:
                    batches.append(part[start:end])
                    start = end
        return [batches[i] for i in random.permutation(len(batches))]

    def _build(self, epoch: int, documents: NDArray[np.int64]) -> LanguageBatch:
        rows = []
        for document in documents:
            ids, roles = self.table.read(int(document))
            if self.generates[document]:
                draw = np.random.default_rng((self.config.seed, epoch, int(document))).random()
                if draw < self.config.null_prompt_share:
                    kept = roles != Role.TEXT_CONTEXT
                    ids, roles = ids[kept], roles[kept]
            elif not self.config.learn_described_codes:
                roles = np.where(roles == Role.VISION, np.uint8(Role.PADDING), roles)  # no target, like padding
            rows.append((ids, roles))
        return pad_documents(rows, self.pad_id)


def pad_documents(rows: list[tuple[NDArray[np.uint32], NDArray[np.uint8]]], pad_id: int) -> LanguageBatch:
    longest = max(len(ids) for ids, _ in rows)
    token_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    all_roles = torch.full((len(rows), longest), int(Role.PADDING), dtype=torch.uint8)
    for index, (ids, roles) in enumerate(rows):
        token_ids[index, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        all_roles[index, : len(roles)] = torch.from_numpy(roles.copy())
    return LanguageBatch(token_ids, all_roles)
