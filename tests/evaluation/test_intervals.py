"""Means and their intervals."""

import numpy as np
import pytest

from openemu3.evaluation.intervals import estimate_mean
from openemu3.records import InputError


def test_interval_of_shares_is_near_the_textbook_one() -> None:
    values = [1.0] * 60 + [0.0] * 140
    estimate = estimate_mean(values)
    assert estimate.mean == pytest.approx(0.3) and estimate.count == 200
    half_width = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert estimate.low == pytest.approx(0.3 - half_width, abs=0.01)
    assert estimate.high == pytest.approx(0.3 + half_width, abs=0.01)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        estimate = estimate_mean(list(random.normal(2.0, 1.0, 40)))
        covered += estimate.low <= 2.0 <= estimate.high
    assert 88 <= covered <= 99


def test_groups_widen_the_interval_of_repeated_values() -> None:
    values = list(np.random.default_rng(1).normal(size=20))
    alone = estimate_mean(values)
    names = [str(i) for i in range(20)]
    repeated = estimate_mean(values * 9)
    grouped = estimate_mean(values * 9, names * 9)
    assert grouped.mean == pytest.approx(alone.mean)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert repeated.high - repeated.low < 0.5 * (grouped.high - grouped.low)


def test_same_values_same_interval_and_no_values_no_mean() -> None:
    assert estimate_mean([1.0, 2.0, 5.0]) == estimate_mean([1.0, 2.0, 5.0])
    with pytest.raises(InputError, match="there are none"):
        estimate_mean([])
    assert estimate_mean([0.25]).format(1, 100, " %") == "25.0 % (25.0 to 25.0)"
