"""LPIPS, the learnt perceptual distance between two pictures (Zhang et al. 2018, arXiv 1801.03924, version 0.1).

In: two batches of pixels [B, 3, H, W] in [-1, 1]. Out: one distance per pair [B], 0 for equal pictures, larger for more different ones.
Tokenizer training uses the VGG16 variant as a loss, evaluation the AlexNet variant as a number (as the paper's Table 2 does).
The surprising thing: torchvision is not needed. Both backbones are a handful of convolutions, and their weights come once from a
safetensors file written by `recipes/fetch_weights.py`; there is no version of this network with made-up weights.

Shapes: B pairs, C channels of a layer, H W pixels, h w positions of a layer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from openemu3.records import InputError

Net = Literal["vgg", "alex"]

# Per-channel statistics of ImageNet, stated for pixels in [-1, 1] (the published scaling layer).
CHANNEL_SHIFT = (-0.030, -0.088, -0.188)
CHANNEL_SCALE = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10


class LPIPS(nn.Module):
    """The frozen network: scaled pixels → backbone features → unit-normalised squared differences → weighted sum → spatial mean.

    Args:
        net: "vgg" (VGG16, five stages, for training) or "alex" (AlexNet, five stages, for reported numbers).
        weights: safetensors file; by default `lpips_{net}.safetensors` in `cache_folder()`.

    Raises:
        InputError: unknown `net`, a missing file (the message says what to run), or a file of something else.

    Parameters never require gradients; gradients flow to the pixels. The backbone runs in the dtype of its weights
    (float32 unless moved with `.to`), while distances are always taken in float32.
    """

    def __init__(self, net: Net = "vgg", weights: Path | str | None = None) -> None:
        super().__init__()
        if net not in LAYOUTS:
            raise InputError(f"LPIPS net {net!r} is unknown; allowed: {', '.join(LAYOUTS)}.")
        self.net = net
        self.layout = LAYOUTS[net]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c.in_channels, c.out_channels, c.kernel, c.stride, c.padding, device="meta") for c in self.layout.convolutions
        )
        self.heads = nn.ParameterList(
            nn.Parameter(torch.empty(c.out_channels, device="meta")) for c in self.layout.convolutions if c.is_tap
        )
        path = Path(weights) if weights is not None else weights_path(net)
        self.load_state_dict(_read_weights(path, self), strict=True, assign=True)
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of pairs.

        Args:
            x, y: pixels [B, 3, H, W] in [-1, 1], of one shape.

        Returns:
            float32 [B].

        Raises:
            InputError: other shapes, or sides below the backbone's minimum (16 for VGG, 31 for AlexNet).
        """
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] != 3:
            raise InputError(f"LPIPS compares two batches [B, 3, H, W] of one shape, not {list(x.shape)} and {list(y.shape)}.")
        if min(x.shape[2:]) < self.layout.min_side:
            raise InputError(f"LPIPS {self.net} needs sides of at least {self.layout.min_side} pixels, not {x.shape[2]}x{x.shape[3]}.")
        distance = torch.zeros(x.shape[0], device=x.device)
        for features_x, features_y, head in zip(self.compute_features(x), self.compute_features(y), self.heads, strict=True):
            distance = distance + compute_layer_distance(features_x, features_y, head)
        return distance  # [B]

    def embed(self, pixels: Tensor) -> Tensor:
        """One vector per picture, float32 [B, D]; the squared Euclidean distance of two vectors is the LPIPS of their pictures.

        For many comparisons of few pictures: each goes through the network once. D is 31,872 for AlexNet at 64 x 64 pixels.
        """
        parts = []
        for features, head in zip(self.compute_features(pixels), self.heads, strict=True):
            x = features.float()
            x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPS)
            weights = (head.float() / (x.shape[2] * x.shape[3])).sqrt()
            parts.append((x * weights.view(1, -1, 1, 1)).flatten(1))
        return torch.cat(parts, dim=1)

    def compute_features(self, pixels: Tensor) -> list[Tensor]:
        """The five tapped activations [B, C, h, w] of pixels [B, 3, H, W] in [-1, 1], shallow to deep."""
        pixels = pixels.float()
        shift = pixels.new_tensor(CHANNEL_SHIFT).view(1, 3, 1, 1)
        scale = pixels.new_tensor(CHANNEL_SCALE).view(1, 3, 1, 1)
        x = ((pixels - shift) / scale).to(self.heads[0].dtype)
        taps = []
        for convolution, spec in zip(self.convolutions, self.layout.convolutions, strict=True):
            if spec.pool:
                x = F.max_pool2d(x, kernel_size=spec.pool, stride=2)
            x = F.relu(convolution(x))
            if spec.is_tap:
                taps.append(x)
        return taps


def compute_layer_distance(features_x: Tensor, features_y: Tensor, head: Tensor) -> Tensor:
    """One layer's share of the distance: mean over positions of sum_c head_c * (x̂_c - ŷ_c)², x̂ = x / (|x|_2 + 1e-10) over channels.

    Args:
        features_x, features_y: activations [B, C, h, w].
        head: non-negative channel weights [C].

    Returns:
        float32 [B].
    """
    # A position where every channel is 0 has norm 0; vector_norm's gradient there is 0, where sqrt(sum of squares) would give NaN.
    x = features_x.float()
    y = features_y.float()
    x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPS)
    y = y / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + NORM_EPS)
    return torch.einsum("bchw,c->bhw", (x - y).square(), head.float()).mean(dim=(1, 2))


def cache_folder() -> Path:
    """Where fetched weights live: the folder named by the environment variable OPENEMU3_CACHE, else `~/.cache/openemu3`."""
    named = os.environ.get("OPENEMU3_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "openemu3"


def weights_path(net: Net) -> Path:
    """The default weights file of one variant."""
    return cache_folder() / f"lpips_{net}.safetensors"


@dataclass(frozen=True)
class Convolution:
    """One convolution followed by a ReLU; `pool` is the window of the stride-2 max pooling before it (0: none)."""

    in_channels: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    is_tap: bool = False


@dataclass(frozen=True)
class Layout:
    """A backbone up to its last tapped convolution."""

    convolutions: tuple[Convolution, ...]
    min_side: int


LAYOUTS: dict[str, Layout] = {
    "vgg": Layout(
        (
            Convolution(3, 64),
            Convolution(64, 64, is_tap=True),
            Convolution(64, 128, pool=2),
            Convolution(128, 128, is_tap=True),
            Convolution(128, 256, pool=2),
            Convolution(256, 256),
            Convolution(256, 256, is_tap=True),
            Convolution(256, 512, pool=2),
            Convolution(512, 512),
            Convolution(512, 512, is_tap=True),
            Convolution(512, 512, pool=2),
            Convolution(512, 512),
            Convolution(512, 512, is_tap=True),
        ),
        min_side=16,
    ),
    "alex": Layout(
        (
            Convolution(3, 64, kernel=11, stride=4, padding=2, is_tap=True),
            Convolution(64, 192, kernel=5, padding=2, pool=3, is_tap=True),
            Convolution(192, 384, pool=3, is_tap=True),
            Convolution(384, 256, is_tap=True),
            Convolution(256, 256, is_tap=True),
        ),
        min_side=31,
    ),
}


def _read_weights(path: Path, module: nn.Module) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"LPIPS weights {path} do not exist; run: python recipes/fetch_weights.py")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"LPIPS weights {path} cannot be read as safetensors ({error}).") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise InputError(f"LPIPS weights {path} do not fit this network: {len(differing)} tensors differ, first {differing[0]!r}.")
    return tensors
