"""How sure a mean is. In: one number per picture, clip or answer. Out: its mean with a 95 % interval, ready for a report.

The surprising thing: intervals are percentile bootstraps (Efron 1979) over the items with a fixed seed, so a report repeats exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from openemu3.records import InputError

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` items and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def format(self, digits: int = 3, scale: float = 1.0, unit: str = "") -> str:
        """For a table: `0.512 (0.480 to 0.544)`; scale 100 and unit " %" for shares."""
        mean, low, high = (f"{value * scale:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{unit} ({low} to {high})"


def estimate_mean(values: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """The mean of `values` with its 95 % bootstrap interval.

    groups: one name per value; values of one name are drawn together (several clips of one animation are not independent).
    Raises InputError if there are no values.
    """
    if len(values) == 0:
        raise InputError("a mean needs at least one value; there are none")
    array = np.asarray(values, dtype=np.float64)
    names = np.arange(len(array)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(names, weights=array)
    counts = np.bincount(names)
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high), len(array))
