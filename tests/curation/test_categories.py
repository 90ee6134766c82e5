"""Representatives: each category and cluster is there, those nearest to the centre are taken, the same ones every time."""

from __future__ import annotations

import numpy as np

from openemu3.curation.categories import CategoryConfig, assign_categories, choose_representatives


def test_pictures_go_to_the_category_whose_prompts_they_resemble() -> None:
    axes = np.eye(3, dtype=np.float32)
    prompts = {"chart": axes[[0]], "table": axes[[1, 1]], "other": axes[[2]]}
    features = np.array([[0.9, 0.1, 0], [0.1, 0.2, 0.9], [0, 1, 0.5]], np.float32)
    assert assign_categories(features, prompts).tolist() == ["chart", "other", "table"]


def test_a_few_of_each_planted_cluster_are_chosen_and_they_are_central() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(6, dtype=np.float32)
    planted = np.repeat(np.arange(6), 40)
    radius = np.tile(np.linspace(0.001, 0.2, 40), 6)
    away = random.normal(size=(240, 6))
    features = (centres[planted] + radius[:, None] * away / np.linalg.norm(away, axis=1, keepdims=True)).astype(np.float32)
    categories = np.where(planted < 4, "chart", "table")
    rows = np.arange(240) * 10
    config = CategoryConfig(pictures_per_cluster=40, per_cluster=3)
    chosen = choose_representatives(rows, features, categories, config)
    assert chosen == choose_representatives(rows, features, categories, config)
    assert [one.row for one in chosen] == sorted(one.row for one in chosen)
    by_plant = {plant: [one.row // 10 for one in chosen if planted[one.row // 10] == plant] for plant in range(6)}
    for plant, members in by_plant.items():
        assert len(members) == 3
        assert radius[members].max() < 0.1, plant  # the inner half
    assert {one.category for one in chosen} == {"chart", "table"}


def test_fewer_pictures_than_clusters_are_all_taken() -> None:
    features = np.eye(2, dtype=np.float32)
    chosen = choose_representatives(np.array([4, 7]), features, ["a", "a"], CategoryConfig(pictures_per_cluster=1, per_cluster=5))
    assert [one.row for one in chosen] == [4, 7]
