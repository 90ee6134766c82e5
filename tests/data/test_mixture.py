"""What a mixture says about each document, and the lottery of an epoch."""

from collections import Counter

import numpy as np
import pytest

from openemu3.data.mixture import MixtureConfig, compute_rates, compute_shares, draw_epoch
from openemu3.data.shards import DocumentStore
from openemu3.records import InputError


@pytest.fixture(scope="module")
def store(shard):
    return DocumentStore([shard], {"train"})


def list_names(store):
    return [(store.datasets[d], store.sources[s]) for d, s in zip(store.dataset_of, store.source_of, strict=True)]


def test_without_a_mixture_every_document_comes_once(store):
    assert (compute_rates(MixtureConfig(), store) == 1).all()


def test_rates_are_products_of_the_keys_that_name_a_document(store):
    config = MixtureConfig(rates={"draw": 2.0, "pictures": 0.5, "pictures/film": 3.0, "text": 0.0})
    expected = {("pictures", "draw"): 1.0, ("pictures", "describe"): 0.5, ("pictures", "film"): 1.5, ("words", "text"): 0.0}
    assert compute_rates(config, store).tolist() == [expected[name] for name in list_names(store)]


def test_rates_of_films_serve_those_who_have_none(store):
    """A preset names films; pictures alone, as most people have them, were refused for it."""
    rates = {"draw": 2.0, "describe_video": 0.5}
    expected = [2.0 if source == "draw" else 1.0 for _, source in list_names(store)]
    assert "describe_video" not in store.sources and compute_rates(MixtureConfig(rates=rates), store).tolist() == expected
    with pytest.raises(InputError, match="'describe_video', which no document is of"):
        compute_rates(MixtureConfig(shares=rates), store)


def test_shares_are_parts_of_the_tokens(store):
    shares = {"draw": 3.0, "pictures/describe": 1.0, "words": 4.0}
    rates = compute_rates(MixtureConfig(shares=shares), store)
    names = list_names(store)
    tokens = Counter()
    for name, rate, length in zip(names, rates, store.lengths, strict=True):
        tokens[name] += rate * length
    total = sum(length for name, length in zip(names, store.lengths, strict=True) if name[1] != "film")
    assert tokens[("pictures", "film")] == 0
    for name, share in ((("pictures", "draw"), 3), (("pictures", "describe"), 1), (("words", "text"), 4)):
        assert tokens[name] == pytest.approx(total * share / 8)
    found = compute_shares(rates, store)
    assert list(found) == ["words/text", "pictures/draw", "pictures/describe"]
    assert list(found.values()) == pytest.approx([4 / 8, 3 / 8, 1 / 8])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rates": {"draw": -1.0}}, "mixture has -1.0 for 'draw'"),
        ({"rates": {"draw": float("inf")}}, "mixture has inf for 'draw'"),
        ({"shares": {"draw": float("nan")}}, "mixture has nan for 'draw'"),
        ({"shares": {"draw": 0.0}}, "mixture has no share above 0"),
        ({"rates": {"draw": 1.0}, "shares": {"draw": 1.0}}, "both rates and shares"),
        (
            {"rates": {"paint": 1.0}},
            r"'paint', which no document is of; the documents are of \['describe', 'draw', 'film', 'pictures', 'text'",
        ),
        ({"rates": {"words/draw": 1.0}}, "'words/draw', which no document is of"),
        ({"rates": {"pictures": 0.0, "words": 0.0}}, "leaves out every document"),
        ({"shares": {"pictures": 1.0, "draw": 1.0}}, r"shares \['pictures', 'draw'\] name the same documents"),
    ],
)
def test_impossible_mixtures(store, config, message):
    with pytest.raises(InputError, match=message):
        compute_rates(MixtureConfig(**config), store)


def test_a_rate_of_2_3_is_two_and_sometimes_three():
    rates = np.array([2.3, 0.0, 0.25, 1.0])
    epochs = [Counter(draw_epoch(rates, np.random.default_rng(seed)).tolist()) for seed in range(400)]
    assert all(epoch[3] == 1 and epoch[1] == 0 and epoch[0] in (2, 3) and epoch[2] in (0, 1) for epoch in epochs)
    for document, share in ((0, 0.3), (2, 0.25)):
        extra = sum(epoch[document] - int(rates[document]) for epoch in epochs)
        assert abs(extra - 400 * share) < 4 * (400 * share * (1 - share)) ** 0.5
    assert len({tuple(draw_epoch(rates, np.random.default_rng(seed)).tolist()) for seed in range(40)}) > 5
