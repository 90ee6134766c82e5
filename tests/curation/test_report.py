"""The report's histograms show where the values are, whatever a few far-off ones do."""

from __future__ import annotations

import numpy as np

from openemu3.curation.report import _FINENESS, _NUM_BINS, _summarize_histogram


def count(values: list[float], low: float, high: float) -> np.ndarray:
    fine = np.zeros((2, _NUM_BINS * _FINENESS), np.int64)
    places = np.clip((np.array(values) - low) / (high - low) * fine.shape[1], 0, fine.shape[1] - 1).astype(int)
    fine[0] = np.bincount(places, minlength=fine.shape[1])
    return fine


def test_a_few_far_off_values_are_in_the_last_bin() -> None:
    values = [*np.linspace(0, 0.09, 999).tolist(), 1.0]
    shown = _summarize_histogram(count(values, 0.0, 1.0), 0.0, 1.0, [0.05])
    assert 0.09 < shown["to"] < 0.13 and shown["and_more"]
    assert sum(shown["kept"]) == 1000 and shown["kept"][-1] == 1 and shown["kept"][10] > 0


def test_the_thresholds_are_shown_and_nothing_is_cut_where_values_are_spread() -> None:
    near = _summarize_histogram(count([0.001] * 100, 0.0, 1.0), 0.0, 1.0, [0.5])
    assert near["to"] > 0.5
    wide = _summarize_histogram(count(np.linspace(0, 1, 1000).tolist(), 0.0, 1.0), 0.0, 1.0, [0.05])
    assert wide["to"] > 0.98 and sum(wide["kept"]) == 1000
    flat = _summarize_histogram(count([5.0], 5.0, 6.0), 5.0, 5.0, [])
    assert sum(flat["kept"]) == 1
