"""PSNR and SSIM against scikit-image; the streaming of pictures and videos with a real (tiny, random) tokenizer and real files."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from openemu3.evaluation.frechet import FeatureStatistics
from openemu3.evaluation.reconstruction import (
    CodeUsage,
    ReconstructionConfig,
    ReconstructionScores,
    RunningMean,
    VideoProtocol,
    build_reconstruction_table,
    compute_psnr,
    compute_ssim,
    find_media,
    fit_square,
    load_tokenizer,
    round_to_levels,
    run_reconstruction,
    score_video,
)
from openemu3.media import read_image, read_video, write_image, write_video
from openemu3.model.layouts import ModelConfig
from openemu3.model.weights import save_config, save_state
from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

TINY = VisionTokenizerConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1)


def make_levels(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph's crop and a damaged copy, uint8 [H, W, 3]."""
    random = np.random.default_rng(seed)
    photo = skimage.data.astronaut()
    top, left = random.integers(0, 512 - height), random.integers(0, 512 - width)
    x = photo[top : top + height, left : left + width]
    noisy = x.astype(float) * random.uniform(0.7, 1.0) + random.normal(0, 12, x.shape)
    return x, noisy.round().clip(0, 255).astype(np.uint8)


def to_levels(*pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_psnr_equals_scikit_image(size: tuple[int, int]) -> None:
    pairs = [make_levels(*size, seed) for seed in range(3)]
    ours = compute_psnr(to_levels(*[x for x, _ in pairs]), to_levels(*[y for _, y in pairs]))
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs]
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [(64, 64), (40, 96), (11, 12)])
@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_ssim_equals_scikit_image(size: tuple[int, int], window: str) -> None:
    settings = {"gaussian": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}, "uniform": {}}[window]
    pairs = [make_levels(*size, seed) for seed in range(3)]
    ours = compute_ssim(to_levels(*[x for x, _ in pairs]), to_levels(*[y for _, y in pairs]), window)
    expected = [structural_similarity(x, y, channel_axis=2, data_range=255, **settings) for x, y in pairs]
    assert ours.tolist() == pytest.approx(expected, rel=1e-9)


def test_equal_pictures_and_pictures_too_small() -> None:
    x, _ = make_levels(32, 32, 0)
    assert compute_psnr(to_levels(x), to_levels(x)).tolist() == [float("inf")]
    assert compute_ssim(to_levels(x), to_levels(x)).tolist() == pytest.approx([1.0])
    with pytest.raises(InputError, match="11x11"):
        compute_ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))
    with pytest.raises(InputError, match="'square'"):
        compute_ssim(torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 20), "square")  # type: ignore[arg-type]


def test_levels_are_clipped_and_rounded() -> None:
    assert round_to_levels(torch.tensor([-3.0, -1.0, 0.0, 0.003, 1.0, 7.0])).tolist() == [0, 0, 128, 128, 255, 255]


def test_running_mean() -> None:
    running = RunningMean()
    values = [3.0, 5.0, 10.0, 2.0]
    running.add(torch.tensor(values[:3]))
    running.add(torch.tensor(values[3:] + [float("inf")]))
    summary = running.summarize()
    assert summary["mean"] == pytest.approx(5.0) and summary["count"] == 4 and summary["num_infinite"] == 1
    assert summary["standard_error"] == pytest.approx(np.std(values, ddof=1) / 2)


def test_code_usage() -> None:
    usage = CodeUsage()
    usage.add(torch.tensor([[0, 0], [3, 3]]))
    usage.add(torch.tensor([9, 9, 9, 9]))
    assert usage.summarize() == {"num_used": 3, "largest": 9, "perplexity": pytest.approx(2**1.5)}  # shares 1/4, 1/4, 1/2


def test_fit_square_keeps_the_middle() -> None:
    # A wide picture whose thirds are -1, 0 and 1: what is left of it is the middle third.
    wide = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(64).expand(3, 1, 64, 192)
    square = fit_square(wide, 32)
    assert square.shape == (3, 1, 32, 32)
    assert square[..., 2:-2].abs().max() < 1e-6
    assert fit_square(wide.transpose(-1, -2), 32).shape == (3, 1, 32, 32)


@pytest.fixture(scope="module")
def tokenizer() -> VisionTokenizer:
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(TINY)
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.1)
    return tokenizer


def test_images_in_batches_give_the_numbers_of_one_by_one(tokenizer: VisionTokenizer, tmp_path: Path, measuring_cache: Path) -> None:
    for index, size in enumerate([(64, 64), (64, 64), (48, 96), (64, 64), (96, 48)]):
        write_image(tmp_path / f"{index}.png", torch.from_numpy(make_levels(*size, index)[0]).permute(2, 0, 1).unsqueeze(1) / 127.5 - 1)
    (tmp_path / "notes.txt").write_text("not a picture")
    config = ReconstructionConfig(tmp_path, side=48, rfid=False, batch_size=2)
    report = run_reconstruction(tokenizer, config)
    scores = report["scores"]
    assert report["num_files"] == 5 and scores["ssim"]["count"] == 5 and "rfid" not in scores
    lpips = LPIPS("alex")
    expected: dict[str, list[float]] = {"psnr": [], "ssim": [], "lpips": []}
    for path in sorted(tmp_path.glob("*.png")):
        x = fit_square(read_image(path), 48).transpose(0, 1)
        y = tokenizer.decode_image(tokenizer.encode_image(x))
        x8, y8 = (p.add(1).mul(127.5).round().clamp(0, 255)[0].permute(1, 2, 0).numpy().astype(np.uint8) for p in (x, y))
        expected["psnr"].append(peak_signal_noise_ratio(x8, y8, data_range=255))
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected["ssim"].append(structural_similarity(x8, y8, channel_axis=2, data_range=255, **settings))
        expected["lpips"].append(float(lpips(*(torch.from_numpy(p).permute(2, 0, 1)[None] / 127.5 - 1 for p in (x8, y8)))))
    for name, values in expected.items():
        assert scores[name]["mean"] == pytest.approx(np.mean(values), rel=2e-3)  # a pixel on the edge may round otherwise in a batch
    json.dumps(report, allow_nan=False)
    Console(quiet=True).print(build_reconstruction_table(report))


def test_rfid_compares_originals_with_reconstructions(measuring_cache: Path) -> None:
    class Colours:
        """Stands in for Inception, which takes a third of a second per picture: mean colour as a feature."""

        def compute_features(self, pixels: Tensor) -> Tensor:
            return pixels.mean(dim=(2, 3))

    scores = ReconstructionScores(LPIPS("alex"), Colours())  # type: ignore[arg-type]
    scores.originals, scores.reconstructions = FeatureStatistics(3), FeatureStatistics(3)
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    scores.add(x, x + 51 / 127.5)  # every colour 0.4 brighter, and nothing else
    assert scores.summarize()["rfid"] == pytest.approx(3 * 0.4**2, rel=1e-3)


def write_clip(path: Path, num_frames: int, height: int, width: int, fps: float) -> None:
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1) / 127.5 - 1
    frames = [photo[:, 100 + index : 100 + index + height, 2 * index : 2 * index + width] for index in range(num_frames)]
    write_video(path, torch.stack(frames, dim=1), fps)


@pytest.mark.parametrize("crop", ["after", "before"])
@pytest.mark.parametrize("sampling", ["spread", "consecutive"])
def test_video_protocol(tokenizer: VisionTokenizer, tmp_path: Path, measuring_cache: Path, sampling: str, crop: str) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, 60, 64, 104, 24)
    protocol = VideoProtocol(sides=(32,), seconds=1.5, num_frames=8, sampling=sampling, crop=crop)  # type: ignore[arg-type]
    scores, usage = ReconstructionScores(LPIPS("alex")), CodeUsage()
    score_video(tokenizer, path, 32, protocol, scores, usage)

    clip, _ = read_video(path, fps=12, max_frames=8 if sampling == "consecutive" else 18)
    assert clip.shape[1] == (8 if sampling == "consecutive" else 18)
    frames = torch.nn.functional.interpolate(clip.transpose(0, 1), size=(32, 52), mode="bicubic", antialias=True).clamp(-1, 1)
    frames = (frames[..., 2:50] if crop == "after" else frames[..., 10:42]).transpose(0, 1).unsqueeze(0)
    decoded = tokenizer.decode_video(tokenizer.encode_video(frames), num_frames=clip.shape[1])
    chosen = [0, 1, 2, 3, 4, 5, 6, 7] if sampling == "consecutive" else [1, 3, 5, 7, 10, 12, 14, 16]
    x, y = (p[0][:, chosen].transpose(0, 1) for p in (frames, decoded))
    if crop == "after":
        x, y = x[..., 8:40], y[..., 8:40]
    x, y = round_to_levels(x), round_to_levels(y)
    summary = scores.summarize()
    assert summary["psnr"]["count"] == 8
    assert summary["psnr"]["mean"] == pytest.approx(compute_psnr(x, y).mean().item(), rel=1e-3)
    assert summary["ssim"]["mean"] == pytest.approx(compute_ssim(x, y).mean().item(), rel=1e-3)
    latents = -(-clip.shape[1] // 4)
    assert usage.counts.sum() == latents * 4 * (6 if crop == "after" else 4)


def test_run_on_videos(tokenizer: VisionTokenizer, tmp_path: Path, measuring_cache: Path) -> None:
    write_clip(tmp_path / "a.mp4", 40, 64, 80, 24)
    write_clip(tmp_path / "b.mp4", 48, 80, 64, 12)
    config = ReconstructionConfig(tmp_path, kind="video", protocol=VideoProtocol(sides=(32, 72), seconds=1))
    report = run_reconstruction(tokenizer, config)
    assert [row["side"] for row in report["sizes"]] == [32, 72]
    assert [row["num_enlarged"] for row in report["sizes"]] == [0, 2]
    assert all(row["psnr"]["count"] == 16 for row in report["sizes"])
    json.dumps(report, allow_nan=False)
    Console(quiet=True).print(build_reconstruction_table(report))


def test_tokenizer_from_a_folder(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    save_config(tmp_path, ModelConfig(vision_tokenizer=asdict(TINY)))
    save_state(tmp_path, tokenizer.state_dict(), "vision_tokenizer", torch.float32)
    loaded = load_tokenizer(tmp_path)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode_image(pixels), tokenizer.encode_image(pixels))
    (tmp_path / "config.json").write_text('{"vocabulary": {"num_text": 300, "num_codes": 64}, "transformer": {}}')
    with pytest.raises(InputError, match="no vision tokenizer"):
        load_tokenizer(tmp_path)


def test_bad_input_is_named(tokenizer: VisionTokenizer, tmp_path: Path, measuring_cache: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_media(tmp_path / "none", "image")
    with pytest.raises(InputError, match="holds no video file"):
        find_media(tmp_path, "video")
    with pytest.raises(InputError, match="multiples of 8"):
        VideoProtocol(sides=(100,))
    write_clip(tmp_path / "short.mp4", 6, 64, 64, 12)
    with pytest.raises(InputError, match="has 6 frames at 12 FPS"):
        run_reconstruction(tokenizer, ReconstructionConfig(tmp_path, kind="video", protocol=VideoProtocol(sides=(32,))))
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match="empty.png"):
        run_reconstruction(tokenizer, ReconstructionConfig(tmp_path, rfid=False))
