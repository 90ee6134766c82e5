"""The loader: packed batches of a mixture of documents, in an endless order that a seed fixes.

In: a DocumentStore. Out: for every global batch this rank's micro-batches, as TokenBatch.
An epoch is the mixture's documents in random order, cut into windows of some ten thousand documents. A window is packed into rows by
its lengths alone, the rows are shuffled, and all windows of all epochs one after another are one endless sequence of rows; global
batch n is its rows n x rows_per_batch on. Ranks take equal parts of it. So which rows a batch has depends on the seed and on n, never
on the number of ranks, and a rank reads the tokens of its own rows only.
The surprising thing: there is no worker process and no buffer whose contents must be saved. A position is four numbers, and a run goes
on from it anywhere, with any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openemu3.data.mixture import MixtureConfig, compute_rates, compute_shares, draw_epoch
from openemu3.data.packing import Packing, PackingReport, Row, TokenBatch, Tokens, build_rows, pack
from openemu3.data.shards import DocumentStore, spread_evenly
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role

GENERATING = ("draw", "film")  # sources whose context may be dropped, for guidance
DESCRIBING = ("describe", "describe_video")  # sources whose codes may be no targets
MAX_EXAMPLES = 5  # samples that a report names


@dataclass(frozen=True)
class LoaderConfig:
    context_length: int = 5120  # tokens of a row
    rows_per_batch: int = 8  # of one global batch: of all ranks and all micro-batches together
    rows_per_micro_batch: int = 1
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    null_prompt_share: float = 0.1  # of the drawings and films; their caption is left out
    # Whether the codes of understanding documents are targets too, as in the paper's pre-training; its image-to-text stage ignores them.
    learn_described_codes: bool = True
    plain: bool = False  # the paper's packing: the documents of a row see each other
    window_documents: int = 32768  # packed together; more fill the rows better
    prefetch: int = 2  # batches that are made ahead of time; 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {"context_length": 2, "rows_per_batch": 1, "rows_per_micro_batch": 1, "window_documents": 1, "prefetch": 0, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.null_prompt_share <= 1:
            raise InputError(f"null_prompt_share is {self.null_prompt_share}; it must be between 0 and 1")
        if self.rows_per_batch % self.rows_per_micro_batch:
            raise InputError(
                f"rows_per_batch is {self.rows_per_batch}; it must be a multiple of rows_per_micro_batch, {self.rows_per_micro_batch}"
            )


class Place(NamedTuple):
    """A row of the endless sequence."""

    epoch: int
    window: int
    row: int


@dataclass(frozen=True)
class Window:
    """Documents that are packed together: document [n] of the store, without_prompt bool [n]; the rows' pieces count within them."""

    documents: NDArray[np.int64]
    without_prompt: NDArray[np.bool_]
    packing: Packing


class TokenLoader:
    """Iterating gives, for one global batch after the other, this rank's micro-batches.

    Args:
        pad_id: what stands where a row is not full.
        dp: number of data-parallel ranks; rank: which of them this one is. rows_per_batch must be a multiple of
            dp x rows_per_micro_batch.

    Attributes:
        position: number of the next global batch.
    """

    def __init__(self, store: DocumentStore, config: LoaderConfig, pad_id: int, dp: int = 1, rank: int = 0) -> None:
        if not 0 <= rank < dp:
            raise InputError(f"rank is {rank}; with dp {dp} it must be 0 to {dp - 1}")
        if config.rows_per_batch % (dp * config.rows_per_micro_batch):
            raise InputError(
                f"rows_per_batch is {config.rows_per_batch}; it must be a multiple of dp x rows_per_micro_batch, "
                f"{dp} x {config.rows_per_micro_batch}"
            )
        self.store, self.config, self.pad_id, self.dp, self.rank = store, config, pad_id, dp, rank
        self.position = 0
        self.place = Place(0, 0, 0)
        self._generates = _have_source(store, GENERATING)
        self._describes = _have_source(store, DESCRIBING)
        self._rates = compute_rates(config.mixture, store)
        self.refused = find_refused(store, config.context_length) & (self._rates > 0)
        self._rates[self.refused] = 0
        if not self._rates.any():
            raise InputError(
                f"context_length is {config.context_length}; every document of the mixture holds vision, which is not cut, and is longer"
            )
        self._draw_epoch = lru_cache(maxsize=2)(self._draw_epoch_uncached)
        self.pack_window = lru_cache(maxsize=4)(self._pack_window_uncached)

    # ---- the position

    def __call__(self, position: int) -> Iterator[list[TokenBatch]]:
        """Goes to global batch `position` and iterates from there. Packs all windows before it, by their lengths alone."""
        rows = position * self.config.rows_per_batch
        place = Place(0, 0, 0)
        while rows:
            there = len(self.pack_window(place.epoch, place.window).packing.rows)
            if rows < there:
                place = place._replace(row=rows)
                break
            rows -= there
            place = self._next_window(place)
        self.position, self.place = position, place
        return iter(self)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain values."""
        return {"position": self.position, **self.place._asdict(), "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes there, also from a state of another number of ranks or of another batch size. Raises InputError for a state of other
        documents, or of settings under which the rows are others."""
        if state.get("order") != self._order:
            raise InputError(
                f"the data position was saved for the order {state.get('order')!r}, but these documents and settings give {self._order!r}; "
                "go on with the same documents, mixture, context length and seed"
            )
        self.position = int(state["position"])
        self.place = Place(int(state["epoch"]), int(state["window"]), int(state["row"]))

    @property
    def _order(self) -> str:
        config = self.config
        names = ("context_length", "null_prompt_share", "window_documents", "seed")
        key = [
            self.store.digest,
            *(getattr(config, name) for name in names),
            sorted(config.mixture.rates.items()),
            sorted(config.mixture.shares.items()),
        ]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    # ---- the batches

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        """From the position on. The position moves as batches are taken, not as they are made."""
        made = self._make(self.place)
        ahead = run_ahead(made, self.config.prefetch) if self.config.prefetch else made
        try:
            for batches, place in ahead:
                self.position, self.place = self.position + 1, place
                yield batches
        finally:
            ahead.close()

    def _make(self, place: Place) -> Generator[tuple[list[TokenBatch], Place], None, None]:
        config = self.config
        per_rank = config.rows_per_batch // self.dp
        while True:
            rows: list[list[Tokens]] = []
            for number in range(config.rows_per_batch):
                while place.row >= len(self.pack_window(place.epoch, place.window).packing.rows):
                    place = self._next_window(place)
                if number // per_rank == self.rank:
                    rows.append(self._read_row(place))
                place = place._replace(row=place.row + 1)
            step = config.rows_per_micro_batch
            parts = (rows[first : first + step] for first in range(0, per_rank, step))
            yield [build_rows(part, config.context_length, self.pad_id, config.plain) for part in parts], place

    def _read_row(self, place: Place) -> list[Tokens]:
        window = self.pack_window(place.epoch, place.window)
        return [
            self._read(int(window.documents[piece.document]), bool(window.without_prompt[piece.document]), piece.start, piece.stop)
            for piece in window.packing.rows[place.row]
        ]

    def _read(self, document: int, without_prompt: bool, start: int, stop: int) -> Tokens:
        ids, roles = self.store.read(document)
        if without_prompt:
            kept = roles != Role.TEXT_CONTEXT
            ids, roles = ids[kept], roles[kept]
        if self._describes[document] and not self.config.learn_described_codes:
            roles = np.where(roles == Role.VISION, np.uint8(Role.PADDING), roles)  # no target, like padding
        return Tokens(ids[start:stop], roles[start:stop], self.store.read_sample_id(document))

    # ---- epochs and windows

    def _next_window(self, place: Place) -> Place:
        num_windows = len(self._draw_epoch(place.epoch)[0])
        return Place(place.epoch, place.window + 1, 0) if place.window + 1 < num_windows else Place(place.epoch + 1, 0, 0)

    def _draw_epoch_uncached(self, epoch: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.bool_]]]:
        """The documents of each window of an epoch, and which of them lose their prompt. An epoch may be empty by chance."""
        random = np.random.default_rng((self.config.seed, epoch))
        documents = draw_epoch(self._rates, random)
        without_prompt = self._generates[documents] & (random.random(len(documents)) < self.config.null_prompt_share)
        num_windows = max(1, round(len(documents) / self.config.window_documents))
        return np.array_split(documents, num_windows), np.array_split(without_prompt, num_windows)

    def _pack_window_uncached(self, epoch: int, number: int) -> Window:
        windows = self._draw_epoch(epoch)
        documents, without_prompt = windows[0][number], windows[1][number]
        lengths = self.store.lengths[documents] - np.where(without_prompt, self.store.num_context[documents], 0)
        packing = pack(lengths, self.store.num_vision[documents] == 0, self.config.context_length)
        # Packing has put the longest first, in the rows and in every row.
        random = np.random.default_rng((self.config.seed, epoch, number))
        packing.rows = [_shuffle(packing.rows[index], random) for index in random.permutation(len(packing.rows))]
        return Window(documents, without_prompt, packing)

    # ---- the report

    @property
    def report(self) -> PackingReport:
        """How the first window of the first epoch packs, and which documents are left out."""
        window = self.pack_window(0, 0)
        packing = window.packing
        reason = f"of more than {self.config.context_length:,} tokens that hold vision, which is not cut"
        left_out = np.flatnonzero(self.refused)
        return PackingReport(
            context_length=packing.context_length,
            num_rows=len(packing.rows),
            num_documents=len(window.documents),
            num_tokens=packing.num_tokens,
            num_long=packing.num_long,
            num_cut=packing.num_cut,
            num_pieces=packing.num_pieces,
            shares=compute_shares(self._rates, self.store),
            refused={reason: (len(left_out), _name_some(self.store, left_out))} if len(left_out) else {},
        )


def find_refused(store: DocumentStore, context_length: int) -> NDArray[np.bool_]:
    """Which documents no row can hold."""
    return (store.num_vision > 0) & (store.lengths > context_length)


def _name_some(store: DocumentStore, documents: NDArray[np.int64]) -> tuple[str, ...]:
    """Up to MAX_EXAMPLES different samples that the documents are of."""
    names = dict.fromkeys(store.read_sample_id(index) for index in documents[: 8 * MAX_EXAMPLES].tolist())
    return tuple(names)[:MAX_EXAMPLES]


def read_held_out(
    store: DocumentStore, context_length: int, pad_id: int, max_documents: int, rows_per_micro_batch: int = 1, dp: int = 1, rank: int = 0
) -> Iterator[TokenBatch]:
    """Up to `max_documents` documents, spread evenly over the store, once each and as they are: what a model is measured on.

    Every rank gets the same number of batches, so that ranks that reduce together do; rows that are left over are empty. Documents
    that no row can hold are left out, as in training.
    """
    chosen = np.array(spread_evenly(len(store), max_documents))
    chosen = chosen[~find_refused(store, context_length)[chosen]]
    packing = pack(store.lengths[chosen], store.num_vision[chosen] == 0, context_length)
    together = dp * rows_per_micro_batch
    for first in range(0, len(packing.rows), together):
        start = first + rank * rows_per_micro_batch
        rows = [
            [_cut(store, int(chosen[piece.document]), piece.start, piece.stop) for piece in row]
            for row in packing.rows[start : start + rows_per_micro_batch]
        ]
        rows += [[] for _ in range(rows_per_micro_batch - len(rows))] if dp > 1 else []
        yield build_rows(rows, context_length, pad_id)


def _cut(store: DocumentStore, index: int, start: int, stop: int) -> Tokens:
    ids, roles = store.read(index)
    return Tokens(ids[start:stop], roles[start:stop], store.read_sample_id(index))


def run_ahead(items: Iterator[Any], most: int) -> Generator[Any, None, None]:
    """The items, up to `most` of them made ahead of time in a thread; an exception there is raised here."""
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(most)
    stopped = threading.Event()

    def put(result: tuple[Any, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                results.put(result, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except Exception as error:  # noqa: BLE001 - it is raised where the item would have been taken
            put((None, error))

    thread = threading.Thread(target=work, name="token-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()


def _have_source(store: DocumentStore, sources: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which documents are of one of these sources."""
    return np.isin(store.source_of, [index for index, name in enumerate(store.sources) if name in sources])


def _shuffle(row: Row, random: np.random.Generator) -> Row:
    return [row[index] for index in random.permutation(len(row))] if len(row) > 1 else row
