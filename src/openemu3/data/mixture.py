"""Mixture: how often the documents of each source and data set are seen.

In: a DocumentStore and what the mixture says. Out: for each epoch the documents of it, in a random order that depends on the seed and
the epoch alone. The surprising thing: a rate of 2.3 means that every document comes twice, and a third time in 30 % of the epochs, each
document by a lottery of its own.

A key names a source ("draw", "text"), a data set ("laion"), or a source of a data set ("laion/draw").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from openemu3.data.shards import DocumentStore
from openemu3.records import InputError

WITH_VISION = ("draw", "describe", "film", "describe_video")  # sources that `emu3 tokenize` makes of pictures and films


@dataclass(frozen=True)
class MixtureConfig:
    """Either rates or shares, or neither: every document once an epoch."""

    # Key -> how often a document is seen per epoch. A document that several keys name gets their product, one that none names 1. Of the
    # sources in WITH_VISION some may be missing: a preset's rates serve those who have pictures alone, too.
    rates: dict[str, float] = field(default_factory=dict)
    # Key -> part of the tokens (of all shares together). Documents that no key names are left out; an epoch has as many tokens as the
    # documents that are named.
    shares: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rates and self.shares:
            raise InputError("mixture has both rates and shares; give one of them")
        for key, value in (self.rates | self.shares).items():
            if not 0 <= value < math.inf:
                raise InputError(f"mixture has {value} for {key!r}; it must be 0 (leave out) or more")
        if self.shares and not any(self.shares.values()):
            raise InputError("mixture has no share above 0; give one key more than 0")


def compute_rates(config: MixtureConfig, store: DocumentStore) -> NDArray[np.float64]:
    """Of each document how often it is seen per epoch, [n]. Raises InputError for a key that names nothing, or where nothing is left."""
    rates = np.ones(len(store))
    if config.shares:
        masks = {key: _find(key, store) for key in config.shares}
        named = np.sum([mask for mask in masks.values()], axis=0)
        if (named > 1).any():
            both = [key for key, mask in masks.items() if mask[np.argmax(named > 1)]]
            raise InputError(f"mixture shares {both} name the same documents; every document may have one share")
        total, sum_of_shares = store.lengths[named > 0].sum(), sum(config.shares.values())
        rates = np.zeros(len(store))
        for key, mask in masks.items():
            rates[mask] = config.shares[key] / sum_of_shares * total / store.lengths[mask].sum()
    for key, rate in config.rates.items():
        if key in store.sources or key not in WITH_VISION:
            rates[_find(key, store)] *= rate
    if not rates.any():
        raise InputError(f"mixture {config.rates} leaves out every document; give one source more than 0")
    return rates


def _find(key: str, store: DocumentStore) -> NDArray[np.bool_]:
    """Which documents a key names."""
    dataset, _, source = key.rpartition("/")
    found = np.zeros(len(store), np.bool_)
    for index, name in enumerate(store.sources):
        if name == key:
            found |= store.source_of == index
    for index, name in enumerate(store.datasets):
        if name == key:
            found |= store.dataset_of == index
        if name == dataset and dataset and source in store.sources:
            found |= (store.dataset_of == index) & (store.source_of == store.sources.index(source))
    if not found.any():
        names = sorted({*store.sources, *filter(None, store.datasets)})
        raise InputError(f"mixture names {key!r}, which no document is of; the documents are of {names}")
    return found


def compute_shares(rates: NDArray[np.float64], store: DocumentStore) -> dict[str, float]:
    """Which part of an epoch's tokens each source of each data set has, "data set/source" -> share, the largest first."""
    tokens = rates * store.lengths
    keys = store.dataset_of.astype(np.int64) * len(store.sources) + store.source_of
    sums = np.bincount(keys, weights=tokens) / tokens.sum()
    names = {
        "/".join(filter(None, (dataset, source))): index for index, (dataset, source) in enumerate(product(store.datasets, store.sources))
    }
    shares = {name: float(sums[index]) for name, index in names.items() if index < len(sums) and sums[index]}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def draw_epoch(rates: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """The documents of one epoch in their order."""
    copies = np.floor(rates + random.random(len(rates))).astype(np.int64)
    return random.permutation(np.repeat(np.arange(len(rates)), copies))
