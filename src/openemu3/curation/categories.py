"""Understanding data in the manner of DenseFusion: pictures of each category, grouped by what they look like, a few of each group.

In: CLIP features of a run's pictures. Out: which rows to take, and their category and group. The surprising thing: these are chosen
from all pictures that could be decoded and are large enough, text-heavy ones above all, and so apart from what the filters keep for
drawing: a chart is a bad picture to draw and a good one to read.

Source: arXiv 2407.08303 (DenseFusion-1M: categories, then clusters of features, then representatives); Emu3, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openemu3.records import InputError

# Category -> what CLIP is asked; the answers of one category are averaged.
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "chart": ("a bar chart", "a line chart", "a pie chart", "a scientific plot"),
    "table": ("a table of numbers", "a spreadsheet"),
    "document": ("a page of a document", "a scanned letter", "a page of a book"),
    "text-rich": ("a poster with text", "a sign with text", "a book cover", "an advertisement"),
    "diagram": ("a diagram", "a flow chart", "a map"),
    "screenshot": ("a screenshot of a website", "a screenshot of a program"),
    "other": ("a photograph", "a painting", "an illustration"),
}


@dataclass(frozen=True)
class CategoryConfig:
    """How representatives are chosen.

    Args:
        pictures_per_cluster: pictures that make one cluster, on average; smaller means finer groups.
        max_clusters: of one category.
        per_cluster: representatives of each cluster: those nearest to its centre.
        seed: of the clustering; the same seed gives the same pictures.
    """

    pictures_per_cluster: int = 50
    max_clusters: int = 1000
    per_cluster: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pictures_per_cluster", "max_clusters", "per_cluster"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Representative:
    """A picture that was chosen: number of its row, its category and its cluster there."""

    row: int
    category: str
    cluster: int


def assign_categories(features: NDArray[np.float32], prompts: Mapping[str, NDArray[np.float32]]) -> NDArray[np.object_]:
    """features [B, D] of length 1, prompts category -> [N, D] of length 1 -> the category of each picture."""
    names = list(prompts)
    means = np.stack([prompts[name].mean(axis=0) / np.linalg.norm(prompts[name].mean(axis=0)) for name in names])  # [categories, D]
    return np.array(names, object)[(features @ means.T).argmax(axis=1)]


def choose_representatives(
    rows: NDArray[np.int64], features: NDArray[np.float32], categories: Sequence[str] | NDArray[np.object_], config: CategoryConfig
) -> list[Representative]:
    """Clusters each category's features and takes of each cluster those nearest to its centre, by ascending row.

    rows [B] their numbers, features [B, D], categories [B]. Held: the features; clustering goes through them in batches.
    """
    from sklearn.cluster import MiniBatchKMeans

    chosen: list[Representative] = []
    named = np.asarray(categories, object)
    for category in sorted(set(named.tolist())):
        members = np.flatnonzero(named == category)
        clusters = int(np.clip(round(len(members) / config.pictures_per_cluster), 1, min(config.max_clusters, len(members))))
        means = MiniBatchKMeans(clusters, random_state=config.seed, n_init=3, batch_size=4096).fit(features[members])
        distances = np.linalg.norm(features[members] - means.cluster_centers_[means.labels_], axis=1)
        for cluster in range(clusters):
            inside = np.flatnonzero(means.labels_ == cluster)
            nearest = inside[np.lexsort((rows[members[inside]], distances[inside]))[: config.per_cluster]]
            chosen.extend(Representative(int(rows[members[index]]), category, cluster) for index in nearest)
    return sorted(chosen, key=lambda one: one.row)
