"""The Fréchet distance against torchmetrics' formula and scipy's matrix square root, and against cases known in closed form."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from openemu3.evaluation.frechet import FeatureStatistics, compute_frechet_distance
from openemu3.records import InputError


def gather(features: Tensor, batch: int = 7) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        statistics.add(part)
    return statistics


def make_features(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    return (torch.randn(count, dim, generator=generator) @ mixing + torch.randn(dim, generator=generator)).relu()


@pytest.mark.parametrize("count", [200, 9])  # 9 vectors of 24 features: singular covariances
def test_equals_torchmetrics_and_scipy(count: int) -> None:
    a, b = make_features(count, 24, 1), make_features(count + 3, 24, 2)
    ours = compute_frechet_distance(gather(a), gather(b))
    (mean_a, cov_a), (mean_b, cov_b) = ((f.double().mean(0), f.double().T.cov()) for f in (a, b))
    # Both oracles take square roots of eigenvalues that are 0 but for rounding: 1e-8 squared is what they can agree to when singular.
    tolerance = 1e-9 if count > 24 else 1e-5
    assert ours == pytest.approx(float(_compute_fid(mean_a, cov_a, mean_b, cov_b)), rel=tolerance)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy())
    by_scipy = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root).real
    assert ours == pytest.approx(by_scipy, rel=tolerance)


def test_statistics_equal_those_of_the_whole_set() -> None:
    features = make_features(50, 6, 3)
    statistics = gather(features, batch=8)
    assert statistics.count == 50
    torch.testing.assert_close(statistics.compute_mean(), features.double().mean(0))
    torch.testing.assert_close(statistics.compute_covariance(), features.double().T.cov())


def test_one_dimension_by_hand() -> None:
    # {0, 2}: mean 1, variance 2. {3, 11}: mean 7, variance 32. (1 - 7)² + 2 + 32 - 2 sqrt(2 * 32) = 36 + 34 - 16.
    distance = compute_frechet_distance(gather(torch.tensor([[0.0], [2.0]])), gather(torch.tensor([[3.0], [11.0]])))
    assert distance == pytest.approx(54.0)


def test_zero_for_equal_sets_and_a_shift_counts_squared() -> None:
    features = make_features(80, 12, 4)
    assert compute_frechet_distance(gather(features), gather(features)) == pytest.approx(0, abs=1e-6)
    shifted = features + 0.5  # 12 features, each moved by a half
    assert compute_frechet_distance(gather(features), gather(shifted)) == pytest.approx(3.0, rel=1e-6)


def test_one_picture_is_too_few() -> None:
    with pytest.raises(InputError, match="at least 2 pictures"):
        compute_frechet_distance(gather(make_features(1, 4, 0)), gather(make_features(5, 4, 0)))
