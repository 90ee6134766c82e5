"""LPIPS against a case worked by hand and against torchmetrics' network, on random weights."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import lpips as oracle_file

from openemu3.records import InputError
from openemu3.tokenization.lpips import LAYOUTS, LPIPS, compute_layer_distance


def write_random_weights(net: str, path: Path) -> Path:
    """A file of the right names and shapes with random values, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for index, c in enumerate(LAYOUTS[net].convolutions):
        fan_in = c.in_channels * c.kernel**2
        shape = (c.out_channels, c.in_channels, c.kernel, c.kernel)
        tensors[f"convolutions.{index}.weight"] = torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in)
        tensors[f"convolutions.{index}.bias"] = torch.randn(c.out_channels, generator=generator) * 0.1
    for index, c in enumerate([c for c in LAYOUTS[net].convolutions if c.is_tap]):
        tensors[f"heads.{index}"] = torch.rand(c.out_channels, generator=generator)
    save_file(tensors, path)
    return path


def build_torchvision_features(net: str, path: Path) -> nn.Sequential:
    """The backbone laid out as torchvision's `features`, which is what torchmetrics slices up."""
    weights = load_file(path)
    modules: list[nn.Module] = []
    pools_before = {"vgg": (2, 4, 7, 10), "alex": (1, 2)}[net]
    for index, c in enumerate(LAYOUTS[net].convolutions):
        if index in pools_before:
            modules.append(nn.MaxPool2d(2, 2) if net == "vgg" else nn.MaxPool2d(3, 2))
        convolution = nn.Conv2d(c.in_channels, c.out_channels, c.kernel, c.stride, c.padding)
        convolution.load_state_dict({k: weights[f"convolutions.{index}.{k}"] for k in ("weight", "bias")})
        modules += [convolution, nn.ReLU()]
    return nn.Sequential(*modules)


def make_pair(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    return x, y


def test_layer_distance_by_hand() -> None:
    # Two channels, one row of two positions. Position 0: (3, 4) against (4, 3) -> (0.6, 0.8) and (0.8, 0.6), squares 0.04 and 0.04.
    # Position 1: (5, 0) against (0, 2) -> (1, 0) and (0, 1), squares 1 and 1. Heads 2 and 3.
    x = torch.tensor([[[[3.0, 5.0]], [[4.0, 0.0]]]])
    y = torch.tensor([[[[4.0, 0.0]], [[3.0, 2.0]]]])
    expected = ((2 * 0.04 + 3 * 0.04) + (2 * 1 + 3 * 1)) / 2
    assert compute_layer_distance(x, y, torch.tensor([2.0, 3.0])).tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("net", ["vgg", "alex"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_equals_torchmetrics(net: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_random_weights(net, tmp_path / "weights.safetensors")
    monkeypatch.setattr(oracle_file, "_get_tv_model_features", lambda *_: build_torchvision_features(net, path))
    oracle = oracle_file._LPIPS(pretrained=False, net=net)
    for lin, head in zip(oracle.lins, [v for k, v in sorted(load_file(path).items()) if k.startswith("heads")], strict=True):
        lin.model[-1].weight.data = head.view(1, -1, 1, 1)
    x, y = make_pair(2, *size)
    # torchmetrics puts 1e-8 inside the square root where the published code adds 1e-10 outside it: hence 1e-5 and not 1e-7.
    torch.testing.assert_close(LPIPS(net, path)(x, y), oracle(x, y).flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_zero_for_equal_pictures_symmetric_and_growing(net: str, tmp_path: Path) -> None:
    metric = LPIPS(net, write_random_weights(net, tmp_path / "weights.safetensors"))
    x, y = make_pair(2, 64, 64)
    half = (x + y) / 2
    assert metric(x, x).tolist() == [0.0, 0.0]
    torch.testing.assert_close(metric(x, y), metric(y, x))
    assert (metric(x, half) < metric(x, y)).all()


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_embeddings_are_as_far_apart_as_their_pictures(net: str, tmp_path: Path) -> None:
    metric = LPIPS(net, write_random_weights(net, tmp_path / "weights.safetensors"))
    x, y = make_pair(2, 40, 48)
    with torch.no_grad():
        torch.testing.assert_close((metric.embed(x) - metric.embed(y)).square().sum(1), metric(x, y), rtol=1e-4, atol=0)


def test_gradient_reaches_pixels_only_and_is_finite_where_activations_are_dead(tmp_path: Path) -> None:
    path = write_random_weights("alex", tmp_path / "weights.safetensors")
    tensors = load_file(path)
    tensors["convolutions.0.bias"] -= 100.0  # every activation of the first tap is 0, so is its norm
    save_file(tensors, path)
    metric = LPIPS("alex", path)
    x, y = make_pair(1, 40, 40)
    x.requires_grad_(True)
    metric(x, y).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert all(not p.requires_grad and p.grad is None for p in metric.parameters())


def test_gradient_moves_a_picture_towards_the_other(tmp_path: Path) -> None:
    metric = LPIPS("alex", write_random_weights("alex", tmp_path / "weights.safetensors"))
    x, y = make_pair(1, 40, 40)
    x.requires_grad_(True)
    before = metric(x, y)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    assert metric((x - 1e-2 * gradient / gradient.norm()).detach(), y) < before


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    path = write_random_weights("alex", tmp_path / "weights.safetensors")
    x, y = make_pair(2, 64, 64)
    low = LPIPS("alex", path).to(torch.bfloat16)(x, y)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, LPIPS("alex", path)(x, y), rtol=0.05, atol=0)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipes/fetch_weights.py"):
        LPIPS("vgg", tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="squeeze"):
        LPIPS("squeeze", tmp_path / "none.safetensors")  # type: ignore[arg-type]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a weights file")
    with pytest.raises(InputError, match="cannot be read"):
        LPIPS("alex", broken)
    path = write_random_weights("alex", tmp_path / "alex.safetensors")
    with pytest.raises(InputError, match="do not fit"):
        LPIPS("vgg", path)
    metric = LPIPS("alex", path)
    with pytest.raises(InputError, match="one shape"):
        metric(torch.zeros(1, 3, 64, 64), torch.zeros(2, 3, 64, 64))
    with pytest.raises(InputError, match="at least 31"):
        metric(torch.zeros(1, 3, 24, 64), torch.zeros(1, 3, 24, 64))
    metric(torch.zeros(1, 3, 31, 31), torch.zeros(1, 3, 31, 31))  # the minimum itself works


def test_the_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENEMU3_CACHE", str(tmp_path))
    write_random_weights("alex", tmp_path / "lpips_alex.safetensors")
    assert LPIPS("alex").net == "alex"
