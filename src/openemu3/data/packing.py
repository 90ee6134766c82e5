"""Packing: documents of many lengths into rows of exactly the context length.

In: the lengths of documents, and which of them hold vision. Out: a `Packing`, which says what lies in each row; and `build_rows`,
which makes the TokenBatch of it that training takes.
An image or a sequence of frames is never cut: a document that holds vision stays whole. A text may be cut, but as few are as it takes
to fill the rows: whole documents are placed first, each into the fullest row that still has room (best fit, longest first); only what
fits nowhere whole is cut into the gaps that are left. Source: best-fit packing, arXiv 2404.10830; the cutting is ours.
The surprising thing: padding at the end of a row counts as a document of its own, so that attention needs no second mask.

Shapes: B rows, S tokens of a row (the context length).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openemu3.records import InputError
from openemu3.tokenization.sequence import Role


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows. The target of position s is the token at s + 1 where documents[s] == documents[s + 1]; elsewhere there is none.

    Args:
        token_ids: int64 [B, S].
        roles: uint8 [B, S], values of `Role`; a token of role PADDING is never a target.
        documents: int32 [B, S], the number of the document within its row (0, 1, 2, ...); padding is one more document, the last. In
            plain packing all documents of a row have number 0.
        sample_ids: of each row, the samples that its documents are of, in their order.
    """

    token_ids: Tensor
    roles: Tensor
    documents: Tensor
    sample_ids: tuple[tuple[str, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. (Codes that are no target have role PADDING, too, but no row's documents end with a code.)"""
        is_padded = self.roles[:, -1:] == Role.PADDING
        return int(self.token_ids.numel() - (is_padded & (self.documents == self.documents[:, -1:])).sum())


class Piece(NamedTuple):
    """Tokens start ... stop - 1 of a document."""

    document: int
    start: int
    stop: int


Row = list[Piece]


@dataclass
class Packing:
    """What lies in each row.

    Attributes:
        rows: the pieces of each row, at most `context_length` tokens of them.
        num_long: texts that are longer than a row, which no packing could leave whole.
        num_cut: other texts that were cut, to fill gaps.
        num_pieces: pieces of all texts that were cut.
    """

    context_length: int
    rows: list[Row] = field(default_factory=list)
    num_long: int = 0
    num_cut: int = 0
    num_pieces: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(piece.stop - piece.start for row in self.rows for piece in row)

    @property
    def fill_rate(self) -> float:
        """Part of all positions that is not padding."""
        return self.num_tokens / (len(self.rows) * self.context_length) if self.rows else 1.0


def pack(lengths: Sequence[int] | NDArray[np.int64], may_cut: Sequence[bool] | NDArray[np.bool_], context_length: int) -> Packing:
    """Rows for documents of these lengths, every token of them in exactly one row.

    may_cut: whether a document is text alone. Raises InputError for one that may not be cut and is longer than a row.
    Gaps smaller than 1/256 of a row are left as padding rather than filled with crumbs.
    """
    lengths, may_cut = np.asarray(lengths, np.int64), np.asarray(may_cut, np.bool_)
    too_long = np.flatnonzero(~may_cut & (lengths > context_length))
    if len(too_long):
        raise InputError(
            f"document {too_long[0]} holds vision and has {lengths[too_long[0]]} tokens; a row has {context_length}, and vision is not cut"
        )
    packing = Packing(context_length)
    gaps = _Gaps(packing.rows, context_length)
    longest_first = np.argsort(-lengths, kind="stable")
    for document in longest_first[~may_cut[longest_first]].tolist():
        piece = Piece(document, 0, int(lengths[document]))
        if not gaps.place(piece):
            gaps.open_row()
            gaps.place(piece)
    _pack_texts([Piece(document, 0, int(lengths[document])) for document in longest_first[may_cut[longest_first]].tolist()], packing, gaps)
    pieces = Counter(piece.document for row in packing.rows for piece in row)
    cut = [document for document, count in pieces.items() if count > 1]
    packing.num_long = int((lengths[cut] > context_length).sum())
    packing.num_cut = len(cut) - packing.num_long
    packing.num_pieces = sum(pieces[document] for document in cut)
    return packing


def _pack_texts(texts: list[Piece], packing: Packing, gaps: _Gaps) -> None:
    """texts: longest first."""
    context_length = packing.context_length
    crumb = max(1, context_length // 256)
    rest: list[Piece] = []
    for piece in texts:
        while piece.stop - piece.start > context_length:
            packing.rows.append([Piece(piece.document, piece.start, piece.start + context_length)])
            piece = Piece(piece.document, piece.start + context_length, piece.stop)
        if piece.stop > piece.start:
            rest.append(piece)
    rest.sort(key=lambda piece: (piece.start - piece.stop, piece.document))
    missing = sum(piece.stop - piece.start for piece in rest) - gaps.total
    for _ in range(-(-missing // context_length)):  # as many new rows as the texts would fill to the last token
        gaps.open_row()
    rest = [piece for piece in rest if not gaps.place(piece)]
    for piece in rest:  # none of them fits anywhere whole
        while piece.stop > piece.start:
            length, gap = piece.stop - piece.start, gaps.largest
            taken = min(length, gap)
            if 0 < length - taken < crumb:  # leave something worth a place of its own
                taken = length - crumb
            if gap < crumb or taken < crumb <= length:
                gaps.open_row()
                continue
            gaps.place_in_largest(Piece(piece.document, piece.start, piece.start + taken))
            piece = Piece(piece.document, piece.start + taken, piece.stop)
    packing.rows[:] = [row for row in packing.rows if row]


class _Gaps:
    """The rows with room left, by how much: (room, row number), ascending."""

    def __init__(self, rows: list[Row], context_length: int) -> None:
        self.rows, self.context_length = rows, context_length
        self.sorted: list[tuple[int, int]] = []
        self.total = 0

    @property
    def largest(self) -> int:
        return self.sorted[-1][0] if self.sorted else 0

    def open_row(self) -> None:
        self.rows.append([])
        self._add(self.context_length, len(self.rows) - 1)

    def place(self, piece: Piece) -> bool:
        """Into the smallest gap that holds it; whether there is one."""
        index = bisect.bisect_left(self.sorted, (piece.stop - piece.start, -1))
        if index == len(self.sorted):
            return False
        self._fill(index, piece)
        return True

    def place_in_largest(self, piece: Piece) -> None:
        self._fill(len(self.sorted) - 1, piece)

    def _fill(self, index: int, piece: Piece) -> None:
        room, row = self.sorted.pop(index)
        self.total -= room
        self.rows[row].append(piece)
        self._add(room - (piece.stop - piece.start), row)

    def _add(self, room: int, row: int) -> None:
        if room:
            bisect.insort(self.sorted, (room, row))
            self.total += room


@dataclass(frozen=True)
class Tokens:
    """What `build_rows` puts into a row for a piece: token_ids [n] and roles uint8 [n], and of which sample they are."""

    token_ids: NDArray[np.integer]
    roles: NDArray[np.uint8]
    sample_id: str


def build_rows(rows: Sequence[Sequence[Tokens]], context_length: int, pad_id: int, plain: bool = False) -> TokenBatch:
    """The batch of these rows, each padded to the context length.

    plain: the paper's packing, in which the documents of a row see each other.
    """
    token_ids = np.full((len(rows), context_length), pad_id, np.int64)
    roles = np.full((len(rows), context_length), Role.PADDING, np.uint8)
    documents = np.zeros((len(rows), context_length), np.int32)
    for index, row in enumerate(rows):
        end = 0
        for number, tokens in enumerate(row):
            start, end = end, end + len(tokens.token_ids)
            token_ids[index, start:end] = tokens.token_ids
            roles[index, start:end] = tokens.roles
            documents[index, start:end] = 0 if plain else number
        documents[index, end:] = (1 if plain else len(row)) if row else 0
    sample_ids = tuple(tuple(tokens.sample_id for tokens in row) for row in rows)
    return TokenBatch(torch.from_numpy(token_ids), torch.from_numpy(roles), torch.from_numpy(documents), sample_ids)


@dataclass(frozen=True)
class PackingReport:
    """How well documents pack, and which of them no row can hold.

    shares: "data set/source" -> its part of an epoch's tokens. refused: reason -> (how many, the samples of the first few).
    """

    context_length: int
    num_rows: int
    num_documents: int
    num_tokens: int
    num_long: int
    num_cut: int
    num_pieces: int
    shares: dict[str, float]
    refused: dict[str, tuple[int, tuple[str, ...]]]

    @property
    def fill_rate(self) -> float:
        return self.num_tokens / (self.num_rows * self.context_length) if self.num_rows else 1.0

    def describe(self) -> str:
        lines = [
            f"{self.num_documents:,} documents in {self.num_rows:,} rows of {self.context_length:,} tokens: {self.fill_rate:.2%} full",
            f"texts cut: {self.num_long:,} longer than a row and {self.num_cut:,} to fill gaps, into {self.num_pieces:,} pieces",
        ]
        lines.append("tokens: " + ", ".join(f"{share:.1%} {name}" for name, share in self.shares.items()))
        for reason, (count, examples) in self.refused.items():
            more = ", ..." if count > len(examples) else ""
            lines.append(f"left out: {count:,} {reason} (samples {', '.join(examples)}{more})")
        return "\n".join(lines)
