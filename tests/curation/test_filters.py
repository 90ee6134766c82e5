"""Thresholds against cases worked out by hand, the search for duplicates against comparing all with all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openemu3.curation import filters
from openemu3.curation.filters import ImageThresholds, VideoThresholds, check_scores, decide, find_alike, find_duplicates
from openemu3.records import InputError


def make_rows(count: int, **columns: Any) -> dict[str, Any]:
    """Rows that pass everything, but for the columns given."""
    rows: dict[str, Any] = {
        "reason": np.full(count, "", object),
        **{name: np.full(count, 1000.0) for name in ("width", "height")},
        "aesthetic": np.full(count, 9.0),
        "text_coverage": np.full(count, 0.0),
        "colour_spread": np.full(count, 30.0),
        "seconds": np.full(count, 5.0),
        "motion": np.full(count, 0.01),
    }
    return rows | {name: np.array(values, object if name == "reason" else float) for name, values in columns.items()}


def test_pictures_below_the_aesthetic_threshold_are_judged_by_text_and_colours() -> None:
    nan = float("nan")
    rows = make_rows(
        9,
        width=[511, 512, 900, 900, 900, 900, 900, 900, 900],
        height=[900, 512, 900, 900, 900, 900, 900, 900, 900],
        aesthetic=[9, 5.5, 9, 5.49, 5.49, 5.49, nan, 5.49, nan],
        text_coverage=[0, 0.9, 0, 0.06, 0.05, 0.0, 0.0, nan, 0],
        colour_spread=[30, 30, 0, 30, 30, 2.9, 30, 30, 30],
        reason=["", "", "", "", "", "", "", "", "empty"],
    )
    steps, reasons = decide(rows, ImageThresholds())
    assert steps.tolist() == [
        "resolution",
        "",  # beautiful, so text does not matter
        "",  # nor do colours
        "text, if not aesthetic",
        "",  # rescued
        "colours, if not aesthetic",
        "",  # one without a score is judged like one that failed
        "text, if not aesthetic",
        "decode",
    ]
    assert reasons.tolist() == [
        "below 512 x 512 pixels",
        "",
        "",
        "text on more than 5.0%",
        "",
        "monochrome",
        "",
        "text not measured",
        "empty",
    ]


def test_without_the_aesthetic_step_all_pictures_are_judged_by_text_and_colours() -> None:
    rows = make_rows(2, text_coverage=[0.06, 0.0], aesthetic=[9.0, float("nan")])
    assert decide(rows, ImageThresholds(min_aesthetic=None))[0].tolist() == ["text, if not aesthetic", ""]


def test_clips_are_judged_in_the_order_of_the_paper() -> None:
    rows = make_rows(
        8,
        seconds=[0.9, 5, 5, 5, 5, 5, 5, 5],
        height=[900, 255, 900, 900, 900, 900, 900, 900],
        text_coverage=[0, 0, 0.2, 0, 0, 0, 0, float("nan")],
        motion=[0.01, 0.01, 0, 0.0005, 0.2, 0.01, 0.01, 0.01],
        aesthetic=[9, 9, 9, 9, 1, 4.9, 5, 9],
    )
    steps, _ = decide(rows, VideoThresholds())
    expected = ["length and resolution", "length and resolution", "text", "motion", "motion", "aesthetic", "", "text"]
    assert steps.tolist() == expected


def test_text_that_was_not_measured_matters_only_where_text_does() -> None:
    rows = make_rows(2, text_coverage=[float("nan"), 0.0])
    assert decide(rows, VideoThresholds(min_aesthetic=None))[1].tolist() == ["text not measured", ""]
    assert decide(rows, VideoThresholds(min_aesthetic=None, max_text_coverage=1.0))[1].tolist() == ["", ""]
    assert decide(rows, ImageThresholds(min_aesthetic=None))[1].tolist() == ["text not measured", ""]
    assert decide(rows, ImageThresholds(min_aesthetic=None, max_text_coverage=1.0))[1].tolist() == ["", ""]


def test_a_threshold_on_a_score_that_nothing_has_is_an_error() -> None:
    with pytest.raises(InputError, match="no item has an aesthetic score"):
        check_scores({"aesthetic": 0}, ImageThresholds())
    check_scores({"aesthetic": 0}, ImageThresholds(min_aesthetic=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageThresholds(min_width=0), "min_width is 0"),
        (lambda: ImageThresholds(max_text_coverage=1.5), "it is a share"),
        (lambda: ImageThresholds(max_hash_distance=9), "max_hash_distance is 9"),
        (lambda: VideoThresholds(min_motion=0.2, max_motion=0.1), "min_motion is 0.2"),
    ],
)
def test_thresholds_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def compare_all(digests: list[int], hashes: list[int], ranks: list[int], distance: int) -> list[int]:
    """The definition, in the slowest way: from best to worst, each against those that were kept by the step before."""
    order = sorted(range(len(hashes)), key=lambda row: (ranks[row], row))
    of = [-1] * len(hashes)
    keys: tuple[list[int], ...] = (digests, hashes) if distance >= 0 else (digests,)
    for values in keys:
        kept: list[int] = []
        for row in [row for row in order if of[row] == -1]:
            match = next((other for other in kept if values[other] == values[row]), None)
            if match is None:
                kept.append(row)
            else:
                of[row] = match
        order = kept
    kept = []
    for row in order if distance > 0 else []:
        match = next((other for other in kept if (hashes[other] ^ hashes[row]).bit_count() <= distance), None)
        if match is None:
            kept.append(row)
        else:
            of[row] = match
    while any(of[row] >= 0 and of[of[row]] >= 0 for row in range(len(of))):
        of = [of[parent] if parent >= 0 and of[parent] >= 0 else parent for parent in of]
    return of


@settings(max_examples=60)
@given(st.data(), st.integers(-1, 8))
def test_duplicates_are_those_that_comparing_all_with_all_finds(data: st.DataObject, distance: int) -> None:
    bases = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    rows = data.draw(
        st.lists(
            st.tuples(st.sampled_from(bases), st.lists(st.integers(0, 63), max_size=9), st.integers(0, 5), st.integers(0, 2)), max_size=14
        )
    )
    hashes = [base ^ sum({1 << bit for bit in bits}) for base, bits, _, _ in rows]
    digests, ranks = [digest for _, _, digest, _ in rows], [rank for _, _, _, rank in rows]
    found = find_duplicates(np.array(digests, np.uint64), np.array(hashes, np.uint64), np.array(ranks), distance)
    expected = compare_all(digests, hashes, ranks, distance)
    assert [parent >= 0 for parent in found.tolist()] == [parent >= 0 for parent in expected]
    assert found.tolist() == expected


@pytest.mark.parametrize("distance", [-1, 0, 2, 8])
@pytest.mark.parametrize("rows_at_once", [16, 1 << 16])
def test_rows_that_are_alike_are_found_whatever_the_blocks(distance: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_ROWS_AT_ONCE", rows_at_once)
    random = np.random.default_rng(distance + 1)
    hashes = random.integers(0, 2**64, 300, dtype=np.uint64)
    hashes[100:200] = hashes[:100] ^ np.bitwise_or.reduce(np.uint64(1) << random.integers(0, 64, (9, 100), dtype=np.uint64))
    hashes[200:250] = hashes[50:100] ^ (np.uint64(1) << random.integers(0, 64, 50, dtype=np.uint64))
    hashes[290:] = 7
    digests = random.integers(0, 2000, 300).astype(np.uint64)
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= distance if distance >= 0 else np.zeros((300, 300), bool)
    same = near | (digests[:, None] == digests[None, :])
    np.fill_diagonal(same, False)
    expected = same.any(0)
    assert 0 < expected.sum() < 300
    assert find_alike(digests, hashes, distance).tolist() == expected.tolist()
    duplicates = find_duplicates(digests, hashes, np.arange(300), distance)
    assert not (duplicates >= 0)[~expected].any()  # so that only rows that are alike need to be looked at


def test_planted_near_duplicates_among_many_are_all_found() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 100_000, dtype=np.uint64)
    victims, copies = random.permutation(100_000)[:2000].reshape(2, -1)
    for victim, copy in zip(victims, copies, strict=True):
        flips = np.bitwise_or.reduce(np.uint64(1) << random.integers(0, 64, 3, dtype=np.uint64))
        hashes[copy] = hashes[victim] ^ flips
    ranks = np.arange(100_000)
    duplicates = find_duplicates(np.arange(100_000, dtype=np.uint64), hashes, ranks, 3)
    for victim, copy in zip(victims, copies, strict=True):
        assert duplicates[max(victim, copy)] == min(victim, copy)
    assert np.count_nonzero(duplicates >= 0) == 1000  # and none else: chance pairs at 3 bits have odds of 1e-5
