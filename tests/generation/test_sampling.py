"""Sampling: the noise is uniform, independent and reproducible; the distribution is the one that the settings describe."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from openemu3.generation.sampling import MAX_SEED, SamplingRows, SamplingSettings, derive_keys, draw_gumbel, draw_uniform, guide, sample
from openemu3.records import InputError

CPU = torch.device("cpu")


def uniform(seeds, streams, positions, counters):
    keys = derive_keys(torch.as_tensor(seeds), torch.as_tensor(streams))
    counters = torch.as_tensor(counters)
    return draw_uniform(keys, torch.as_tensor(positions), counters.expand(len(keys), -1)).numpy().astype(np.float64)


def splitmix(x):
    """The finaliser in Python's whole numbers, written from its definition."""
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def test_hash_is_splitmix64_finaliser():
    gamma = 0x9E3779B97F4A7C15
    for seed, stream, position, counter in [(0, 0, 0, 0), (7, 3, 4096, 32767), (MAX_SEED, 12, 131071, 5)]:
        key = splitmix(splitmix(seed + gamma) + (stream + 1) * gamma)
        hashed = splitmix(splitmix(key + (position + 1) * gamma) + (counter + 1) * gamma)
        expected = ((hashed >> 12) + 0.5) / 2**52
        assert uniform([seed], [stream], [position], [counter])[0, 0] == pytest.approx(expected, rel=1e-6)


# Each of the four arguments alone must give uniform numbers, whatever the others are. The data are fixed, so the p-values are too.
@pytest.mark.parametrize("varied", ["seed", "stream", "position", "counter"])
@pytest.mark.parametrize("start", [0, 10**6])
def test_noise_is_uniform_along_every_argument(varied, start):
    count = 50_000
    span = torch.arange(start, start + count)
    fixed = torch.full_like(span, 3)
    if varied == "counter":
        values = uniform([3], [3], [3], span).ravel()
    else:
        arguments = {name: span if name == varied else fixed for name in ("seed", "stream", "position")}
        values = uniform(arguments["seed"], arguments["stream"], arguments["position"], [3]).ravel()
    assert 0 < values.min() and values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 0.001
    assert stats.chisquare(np.histogram(values, bins=256, range=(0, 1))[0]).pvalue > 0.001
    # The low bits too: fractional parts after scaling.
    assert stats.kstest((values * 4096) % 1, "uniform").pvalue > 0.001


@pytest.mark.parametrize("step", ["seed", "stream", "position", "counter"])
def test_neighbours_are_independent(step):
    even, zero = torch.arange(0, 80_000, 2), torch.zeros(40_000, dtype=torch.int64)

    def draw(values):
        if step == "counter":
            return uniform([5], [0], [0], values)[0]
        arguments = {"seed": zero, "stream": zero, "position": zero, step: values}
        return uniform(arguments["seed"], arguments["stream"], arguments["position"], [0])[:, 0]

    one, other = draw(even), draw(even + 1)
    assert abs(stats.pearsonr(one, other).statistic) < 4 / math.sqrt(len(one))
    table = np.histogram2d(one, other, bins=16, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(table.ravel()).pvalue > 0.001


def test_gumbel_noise_has_its_distribution():
    keys = derive_keys(torch.tensor([1]), torch.tensor([0]))
    noise = draw_gumbel(keys, torch.tensor([0]), torch.arange(100_000)[None]).numpy().ravel()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "gumbel_r").pvalue > 0.001


def test_noise_of_a_row_depends_on_the_row_alone():
    keys = derive_keys(torch.tensor([4, 9, 4]), torch.tensor([0, 1, 0]))
    counters = torch.tensor([[5, 9], [9, 5], [9, 5]])
    together = draw_uniform(keys, torch.tensor([2, 2, 2]), counters)
    for row in range(3):
        alone = draw_uniform(keys[row : row + 1], torch.tensor([2]), counters[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert torch.equal(together[0].flip(0), together[2])
    assert not torch.equal(together[1], together[2])


def sampled_counts(logits, settings, draws):
    rows = SamplingRows.build([settings] * draws, range(draws), CPU)
    tokens = sample(logits.expand(draws, -1).contiguous(), rows, torch.zeros(draws, dtype=torch.int64))
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 1000])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_frequencies_match_transformers_warpers(temperature, top_k, top_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(8)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    expected = scores.softmax(-1)[0].numpy().astype(np.float64)
    counts = sampled_counts(logits, SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p), 20_000)
    assert not counts[expected == 0].any()
    kept = expected > 0
    if kept.sum() > 1:
        frequent = expected[kept] / expected[kept].sum()
        assert stats.power_divergence(counts[kept] + 1e-9, frequent * counts.sum() + 1e-9, lambda_="log-likelihood").pvalue > 1e-4


def test_guidance_on_the_slice_equals_the_published_order_over_the_full_vocabulary():
    generator = torch.Generator().manual_seed(3)
    conditional, unconditional = torch.randn(2, 1, 500, generator=generator, dtype=torch.float64) * 3
    legal = slice(300, 500)
    # Published: log-softmax of both over everything, guidance, then everything that is not legal becomes -inf.
    full = unconditional.log_softmax(-1) + 3.0 * (conditional.log_softmax(-1) - unconditional.log_softmax(-1))
    mask = torch.full_like(full, -math.inf)
    mask[:, legal] = 0
    published = (full + mask).softmax(-1)[:, legal]
    ours = guide(conditional[:, legal], unconditional[:, legal], torch.tensor([[3.0]])).softmax(-1)
    assert torch.allclose(ours, published, atol=1e-12, rtol=1e-9)


def test_every_row_has_its_own_settings():
    generator = torch.Generator().manual_seed(0)
    settings = [
        SamplingSettings(temperature=0.0, seed=1),
        SamplingSettings(temperature=1.0, top_k=3, seed=2),
        SamplingSettings(temperature=0.7, top_k=0, top_p=0.5, seed=3),
        SamplingSettings(temperature=1.3, top_k=0, seed=4),
        SamplingSettings(temperature=1.0, top_k=20, top_p=0.9, seed=2),
        SamplingSettings(temperature=1.0, top_k=5000, seed=6),
    ]
    for step in range(50):
        logits = torch.randn(len(settings), 64, generator=generator) * 2
        positions = torch.full((len(settings),), step)
        together = sample(logits, SamplingRows.build(settings, range(len(settings)), CPU), positions)
        for row, setting in enumerate(settings):
            alone = sample(logits[row : row + 1], SamplingRows.build([setting], [row], CPU), positions[:1])
            assert alone.item() == together[row].item()


def test_equal_logits_are_kept_by_index_not_by_accident():
    """bf16 logits are full of equals: what top-k keeps must not depend on the other rows or on topk's inner order."""
    logits = torch.zeros(1, 1000)
    logits[0, 500:] = -0.0
    counts = sampled_counts(logits, SamplingSettings(top_k=10), 2000)
    assert np.flatnonzero(counts).tolist() == list(range(10))
    mixed = SamplingRows.build(
        [SamplingSettings(top_k=10, seed=seed) for seed in range(40)] + [SamplingSettings(top_k=900)], range(41), CPU
    )
    assert sample(logits.expand(41, -1).contiguous(), mixed, torch.arange(41))[:40].max() < 10


def test_greedy_takes_the_most_likely_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 9.0, 9.0]])
    rows = SamplingRows.build([SamplingSettings(temperature=0.0)] * 2, [0, 0], CPU)
    assert sample(logits, rows, torch.tensor([0, 1])).tolist() == [1, 0]


def test_illegal_candidates_are_never_drawn():
    logits = torch.full((1, 50), -math.inf)
    logits[0, [3, 20]] = torch.tensor([0.0, -30.0])
    for settings in (SamplingSettings(top_k=0), SamplingSettings(top_k=10), SamplingSettings(top_k=0, top_p=0.9)):
        assert np.flatnonzero(sampled_counts(logits, settings, 500)).tolist() == [3]


def test_small_changes_of_the_logits_rarely_change_the_token():
    """What Gumbel-max is for: flips are about as likely as the change in probability, however many candidates there are."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(400, 4096, generator=generator)
    moved = logits + 1e-4 * torch.randn(400, 4096, generator=generator)
    rows = SamplingRows.build([SamplingSettings(top_k=2048, seed=seed) for seed in range(400)], [0] * 400, CPU)
    positions = torch.arange(400)
    assert (sample(logits, rows, positions) != sample(moved, rows, positions)).sum() <= 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("temperature", math.inf), ("temperature", True),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
        ("guidance", math.inf), ("guidance", None), ("seed", -1), ("seed", 2**63), ("seed", 0.5),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=rf"^{field} is .*allowed is"):
        SamplingSettings(**{field: value})
