"""What is kept and why the rest is not: thresholds on the columns of scores, applied after scoring, so that another threshold costs
seconds.

In: rows of scores (numpy columns). Out: for each row the step that refused it and its reason, "" and "" for what is kept. A step is a
function (rows, thresholds) -> (reason, mask) pairs. The surprising thing: a picture below the aesthetic threshold is not lost. The paper
drops of those only what has much text or no colours; the ordinary pictures of the world stay.

Source: arXiv 2409.18869, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openemu3.records import InputError

Rows = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ImageThresholds:
    """What a picture must be.

    Args:
        min_width, min_height: pixels, as displayed.
        min_aesthetic: LAION's predictor, 1 to 10; None leaves the aesthetic step out, and all pictures go through the two that follow.
        max_text_coverage: share of the picture under text, for pictures below min_aesthetic; 1 leaves the text step out.
        min_colour_spread: 8-bit levels, for the same pictures; below it is grey, sepia or flat.
        max_hash_distance: bits of 64 in which the perceptual hashes of near-duplicates differ, 0 to 8; -1 keeps near-duplicates.
    """

    min_width: int = 512
    min_height: int = 512
    min_aesthetic: float | None = 5.5
    max_text_coverage: float = 0.05
    min_colour_spread: float = 3.0
    max_hash_distance: int = 2

    def __post_init__(self) -> None:
        if min(self.min_width, self.min_height) < 1:
            raise InputError(f"min_width is {self.min_width} and min_height {self.min_height}; each must be at least 1")
        _check_shared(self.max_text_coverage, self.max_hash_distance)


@dataclass(frozen=True)
class VideoThresholds:
    """What a clip must be.

    Args:
        min_seconds: shortest clip.
        min_short_edge: pixels.
        max_text_coverage: mean share of the sampled frames under text; 1 leaves the text step out.
        min_motion, max_motion: mean length of the optical flow per frame, divided by the shorter edge.
        min_aesthetic: LAION's predictor on three frames, the lowest of them; None leaves the step out.
        max_hash_distance: as for pictures, of the middle frame.
    """

    min_seconds: float = 1.0
    min_short_edge: int = 256
    max_text_coverage: float = 0.05
    min_motion: float = 0.001
    max_motion: float = 0.05
    min_aesthetic: float | None = 5.0
    max_hash_distance: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.min_motion <= self.max_motion:
            raise InputError(f"min_motion is {self.min_motion} and max_motion {self.max_motion}; allowed is 0 <= min_motion <= max_motion")
        _check_shared(self.max_text_coverage, self.max_hash_distance)


Thresholds = ImageThresholds | VideoThresholds
Step = Callable[[Rows, Any], Iterator[tuple[str, Mask]]]


def _check_shared(max_text_coverage: float, max_hash_distance: int) -> None:
    if not 0 <= max_text_coverage <= 1:
        raise InputError(f"max_text_coverage is {max_text_coverage}; it is a share, 0 to 1")
    if not -1 <= max_hash_distance <= 8:
        raise InputError(f"max_hash_distance is {max_hash_distance}; allowed are 0 to 8 bits, and -1 for not looking")


# --------------------------------------------------------------------------------------------------------------------------- steps for both


def refuse_undecodable(rows: Rows, thresholds: Thresholds) -> Iterator[tuple[str, Mask]]:
    """What could not be read or decoded, with the reason that was found then."""
    reasons = rows["reason"]
    for reason in sorted({str(reason) for reason in reasons if reason}):
        yield reason, reasons == reason


# --------------------------------------------------------------------------------------------------------------------------------- pictures


def refuse_small(rows: Rows, thresholds: ImageThresholds) -> Iterator[tuple[str, Mask]]:
    small = (rows["width"] < thresholds.min_width) | (rows["height"] < thresholds.min_height)
    yield f"below {thresholds.min_width} x {thresholds.min_height} pixels", small


def refuse_text(rows: Rows, thresholds: ImageThresholds) -> Iterator[tuple[str, Mask]]:
    """Of the pictures that the aesthetic predictor does not like."""
    covered = rows["text_coverage"]
    if thresholds.max_text_coverage < 1:
        yield "text not measured", is_below_aesthetic(rows, thresholds) & np.isnan(covered)
    yield (
        f"text on more than {thresholds.max_text_coverage:.1%}",
        is_below_aesthetic(rows, thresholds) & (covered > thresholds.max_text_coverage),
    )


def refuse_monochrome(rows: Rows, thresholds: ImageThresholds) -> Iterator[tuple[str, Mask]]:
    """Of the pictures that the aesthetic predictor does not like."""
    yield "monochrome", is_below_aesthetic(rows, thresholds) & (rows["colour_spread"] < thresholds.min_colour_spread)


def is_below_aesthetic(rows: Rows, thresholds: ImageThresholds) -> Mask:
    if thresholds.min_aesthetic is None:
        return np.ones(len(rows["aesthetic"]), bool)
    below: Mask = ~(rows["aesthetic"] >= thresholds.min_aesthetic)  # one without a score, too
    return below


# ------------------------------------------------------------------------------------------------------------------------------------ clips


def refuse_short(rows: Rows, thresholds: VideoThresholds) -> Iterator[tuple[str, Mask]]:
    yield f"shorter than {thresholds.min_seconds:g} s", rows["seconds"] < thresholds.min_seconds
    edge = np.minimum(rows["width"], rows["height"])
    yield f"shorter edge below {thresholds.min_short_edge} pixels", edge < thresholds.min_short_edge


def refuse_text_in_clip(rows: Rows, thresholds: VideoThresholds) -> Iterator[tuple[str, Mask]]:
    if thresholds.max_text_coverage < 1:
        yield "text not measured", np.isnan(rows["text_coverage"])
    yield f"text on more than {thresholds.max_text_coverage:.1%}", rows["text_coverage"] > thresholds.max_text_coverage


def refuse_motion(rows: Rows, thresholds: VideoThresholds) -> Iterator[tuple[str, Mask]]:
    yield "hardly moves", ~(rows["motion"] >= thresholds.min_motion)
    yield "moves too much", rows["motion"] > thresholds.max_motion


def refuse_ugly_clip(rows: Rows, thresholds: VideoThresholds) -> Iterator[tuple[str, Mask]]:
    if thresholds.min_aesthetic is not None:
        yield f"aesthetic score below {thresholds.min_aesthetic:g}", ~(rows["aesthetic"] >= thresholds.min_aesthetic)


IMAGE_STEPS: tuple[tuple[str, Step], ...] = (
    ("decode", refuse_undecodable),
    ("resolution", refuse_small),
    ("text, if not aesthetic", refuse_text),
    ("colours, if not aesthetic", refuse_monochrome),
)
VIDEO_STEPS: tuple[tuple[str, Step], ...] = (
    ("decode", refuse_undecodable),
    ("length and resolution", refuse_short),
    ("text", refuse_text_in_clip),
    ("motion", refuse_motion),
    ("aesthetic", refuse_ugly_clip),
)
DUPLICATES = "duplicates"
EXACT_DUPLICATE, NEAR_DUPLICATE = "the same file", "nearly the same"


def get_steps(thresholds: Thresholds) -> tuple[tuple[str, Step], ...]:
    return IMAGE_STEPS if isinstance(thresholds, ImageThresholds) else VIDEO_STEPS


def decide(rows: Rows, thresholds: Thresholds) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """(step, reason) that refused each row, "" for those that pass all steps; duplicates are found afterwards, over all rows."""
    count = len(rows["reason"])
    refused_by, reasons = np.full(count, "", object), np.full(count, "", object)
    alive = np.ones(count, bool)
    for name, step in get_steps(thresholds):
        for reason, mask in step(rows, thresholds):
            hit = alive & mask
            refused_by[hit], reasons[hit] = name, reason
            alive &= ~hit
    return refused_by, reasons


def check_scores(counts: Mapping[str, int], thresholds: Thresholds) -> None:
    """Raises InputError for a threshold on a score that the run never computed. counts: rows of each score."""
    if thresholds.min_aesthetic is not None and not counts["aesthetic"]:
        raise InputError(
            f"min_aesthetic is {thresholds.min_aesthetic}, but no item has an aesthetic score; score again with the predictor's weights, "
            "or leave the aesthetic step out"
        )


# ------------------------------------------------------------------------------------------------------------------------------- duplicates


def find_alike(digests: NDArray[np.uint64], hashes: NDArray[np.uint64], max_distance: int) -> NDArray[np.bool_]:
    """Which rows have another one with the same digest, or a hash that differs in at most `max_distance` bits (-1: are not looked at).

    Only these can be duplicates; see `find_duplicates`. Rows are looked at in blocks that share some bits, so that what is held beside the
    arguments and the answer (1 byte a row) does not grow with the rows.
    """
    alike = np.zeros(len(hashes), bool)
    for rows in _split_rows(digests, 0, 64):
        alike[rows[_is_repeated(digests[rows])]] = True
    if max_distance < 0:
        return alike
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in zip(edges, edges[1:], strict=False):
        for rows in _split_rows(hashes, int(low), int(high)):
            for one, other in _iterate_pairs(hashes[rows], int(low), int(high), max_distance):
                alike[rows[one]] = alike[rows[other]] = True
    return alike


_ROWS_AT_ONCE = 1 << 16


def _split_rows(keys: NDArray[np.uint64], low: int, high: int) -> Iterator[NDArray[np.int64]]:
    """Rows in blocks of about _ROWS_AT_ONCE, if their bits low ... high - 1 differ enough; rows with the same bits are in one block."""
    bits = max(0, (len(keys) // _ROWS_AT_ONCE).bit_length())
    for block in range(1 << bits):
        found = []
        for first in range(0, len(keys), _ROWS_AT_ONCE):
            stretch = _take_bits(keys[first : first + _ROWS_AT_ONCE], low, high)
            # Multiplied by the golden ratio, so that blocks are even where the bits are not.
            blocks = (stretch * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(63 - bits) >> np.uint64(1)
            found.append(np.flatnonzero(blocks == block) + first)
        if found:
            yield np.concatenate(found)


def _take_bits(keys: NDArray[np.uint64], low: int, high: int) -> NDArray[np.uint64]:
    taken: NDArray[np.uint64] = (keys >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
    return taken


def _is_repeated(keys: NDArray[np.uint64]) -> Mask:
    order = np.argsort(keys)
    same = np.concatenate([keys[order[1:]] == keys[order[:-1]], [False]])
    repeated = np.zeros(len(keys), bool)
    repeated[order] = same | np.roll(same, 1)
    return repeated


def find_duplicates(digests: NDArray[np.uint64], hashes: NDArray[np.uint64], ranks: NDArray[Any], max_distance: int) -> NDArray[np.int64]:
    """For each row the row that it duplicates, or -1 for itself the one to keep.

    digests       of the files' bytes; equal ones are the same file.
    hashes        perceptual hashes.
    ranks         lower is better; the best of a group is kept, and of equal ranks the first.
    max_distance  bits in which hashes of near-duplicates differ at most; -1 for exact duplicates alone.

    Rows are taken from the best to the worst, and each is compared with those that were kept, so that a chain of small changes does not
    make one group. Pairs within the distance share one of max_distance + 1 stretches of bits (they cannot differ in all), so that only
    rows with an equal stretch are compared. Memory grows with the rows: about 100 bytes each.
    """
    count = len(hashes)
    duplicate_of = np.full(count, -1, np.int64)
    order = np.lexsort((np.arange(count), ranks))  # best first
    _collapse(digests, order, duplicate_of)
    if max_distance < 0:
        return duplicate_of
    left = order[duplicate_of[order] == -1]
    _collapse(hashes, left, duplicate_of)
    left = left[duplicate_of[left] == -1]
    if max_distance > 0 and len(left) > 1:
        firsts, seconds = _find_pairs(hashes[left], max_distance)  # positions in `left`, first < second
        for index in np.lexsort((firsts, seconds)):
            better, worse = left[firsts[index]], left[seconds[index]]
            if duplicate_of[better] == -1 and duplicate_of[worse] == -1:
                duplicate_of[worse] = better
    # What duplicated a row that has meanwhile become a duplicate itself is a duplicate of the same one.
    while True:
        parents = np.where(duplicate_of >= 0, duplicate_of[duplicate_of], -1)
        if not (parents >= 0).any():
            return duplicate_of
        duplicate_of = np.where(parents >= 0, parents, duplicate_of)


def _collapse(keys: NDArray[np.uint64], rows: NDArray[np.int64], duplicate_of: NDArray[np.int64]) -> None:
    """Marks all but the first of `rows` with the same key as duplicates of the first."""
    _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    keeper = first[inverse]
    repeated = keeper != np.arange(len(rows))
    duplicate_of[rows[repeated]] = rows[keeper[repeated]]


def _find_pairs(hashes: NDArray[np.uint64], max_distance: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs (i < j) of hashes that differ in at most so many bits."""
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    found: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for low, high in zip(edges, edges[1:], strict=False):
        for one, other in _iterate_pairs(hashes, int(low), int(high), max_distance):
            found.append(np.minimum(one, other) * len(hashes) + np.maximum(one, other))
    pairs = np.unique(np.concatenate(found))
    return pairs // len(hashes), pairs % len(hashes)


def _iterate_pairs(
    hashes: NDArray[np.uint64], low: int, high: int, max_distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of rows with the same bits low ... high - 1 that differ in at most so many bits, some at a time."""
    stretch = _take_bits(hashes, low, high)
    order = np.argsort(stretch, kind="stable")
    ordered, in_order = stretch[order], hashes[order]
    starts, shift = np.arange(len(order) - 1), 1
    while len(starts):  # neighbours at growing distance, for as long as any two there share the stretch
        starts = starts[starts + shift < len(order)]
        starts = starts[ordered[starts] == ordered[starts + shift]]
        near = starts[np.bitwise_count(in_order[starts] ^ in_order[starts + shift]) <= max_distance]
        yield order[near], order[near + shift]
        shift += 1
