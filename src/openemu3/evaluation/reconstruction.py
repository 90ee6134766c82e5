"""How well the vision tokenizer gives back what it was shown: PSNR, SSIM, LPIPS and rFID on pictures, and the paper's protocol on videos.

In: a vision tokenizer and files. Out: a report, a plain dict of numbers with the settings that made them.
All numbers are taken on 8-bit values, clipped and rounded as a viewer would see them, on both sides. Pictures and frames go by one
after another: memory grows neither with their number nor with the length of a video.
The surprising thing: SSIM has two definitions in use that differ by a few hundredths; both are here, and a report says which it used.

Shapes: B pictures, T frames, H rows, W columns; pixels [B, 3, H, W] in [-1, 1] unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from openemu3.evaluation.frechet import FeatureStatistics, Inception, compute_frechet_distance
from openemu3.media import preprocess_image, probe_video, read_image, resize, stream_video
from openemu3.model.weights import load_into, read_config
from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig, apply_channels_last

Window = Literal["gaussian", "uniform"]
Progress = Callable[[int, int, str], None]  # (done, of how many, what is being done)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".gif", ".webp")


class Tokenizer(Protocol):
    """What is measured: `tokenization.vision.VisionTokenizer` or anything that codes and decodes like it."""

    def encode_image(self, pixels: Tensor) -> Tensor: ...

    def decode_image(self, codes: Tensor) -> Tensor: ...

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]: ...

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]: ...


# ---------------------------------------------------------------------------------------------------------------------------- the measures


def compute_psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [B], of 8-bit pictures [B, 3, H, W] in 0...255; infinite for equal pictures.

    10 log10(255² / mean squared error over all colours and pixels), as scikit-image's peak_signal_noise_ratio with data_range 255.
    """
    error = (x.double() - y.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error)


def compute_ssim(x: Tensor, y: Tensor, window: Window = "gaussian") -> Tensor:
    """Structural similarity, float64 [B], of 8-bit pictures [B, C, H, W] in 0...255, averaged over colours (Wang et al. 2004).

    Equal to scikit-image's structural_similarity(x, y, data_range=255, channel_axis=...), K1 = 0.01, K2 = 0.03, with
    window "gaussian": gaussian_weights=True, sigma=1.5, use_sample_covariance=False (11 x 11; the original paper's), or
    window "uniform":  its defaults (7 x 7, sample covariance).
    Only positions whose window lies inside the picture count. Raises InputError if the window does not fit.
    """
    weights = _build_window(window)
    size = len(weights)
    if min(x.shape[-2:]) < size:
        raise InputError(f"SSIM with a {size}x{size} window needs pictures at least as large, not {x.shape[-2]}x{x.shape[-1]}")
    batch, channels = x.shape[:2]
    x, y = x.double(), y.double()
    moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2).unsqueeze(1)  # [5*B*C, 1, H, W]
    moments = F.conv2d(moments, weights.view(1, 1, -1, 1))
    moments = F.conv2d(moments, weights.view(1, 1, 1, -1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments.view(5, batch, channels, *moments.shape[-2:])
    # The sample covariance divides by one less than the number of pixels in the window.
    correction = size**2 / (size**2 - 1) if window == "uniform" else 1.0
    var_x = correction * (mean_xx - mean_x * mean_x)
    var_y = correction * (mean_yy - mean_y * mean_y)
    covariance = correction * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(dim=1)


def round_to_levels(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> float32 levels 0, 1 ... 255, clipped and rounded as a picture file would hold them."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255)


class ReconstructionScores:
    """Gathers PSNR, SSIM, LPIPS (AlexNet) and, if asked, rFID over pairs of original and reconstruction, pair by pair."""

    def __init__(self, lpips: LPIPS, inception: Inception | None = None, window: Window = "gaussian") -> None:
        self.lpips = lpips
        self.inception = inception
        self.window = window
        self.running = {name: RunningMean() for name in ("psnr", "ssim", "lpips")}
        self.originals, self.reconstructions = FeatureStatistics(), FeatureStatistics()

    @torch.inference_mode()
    def add(self, original: Tensor, reconstruction: Tensor) -> None:
        """Add pairs [B, 3, H, W] in [-1, 1]; the reconstruction may exceed the range and is clipped."""
        x, y = round_to_levels(original).cpu(), round_to_levels(reconstruction).cpu()
        self.running["psnr"].add(compute_psnr(x, y))
        self.running["ssim"].add(compute_ssim(x, y, self.window))
        self.running["lpips"].add(self.lpips(x / 127.5 - 1, y / 127.5 - 1))
        if self.inception is not None:
            self.originals.add(self.inception.compute_features(x / 127.5 - 1))
            self.reconstructions.add(self.inception.compute_features(y / 127.5 - 1))

    def summarize(self) -> dict[str, Any]:
        """{"psnr": ..., "ssim": ..., "lpips": ...} with mean, standard error and count, and "rfid" if an Inception was given."""
        scores: dict[str, Any] = {name: mean.summarize() for name, mean in self.running.items()}
        if self.inception is not None:
            scores["rfid"] = compute_frechet_distance(self.originals, self.reconstructions)
        return scores


class RunningMean:
    """Mean and standard error of numbers that come in batches (Welford's method); infinite ones are counted apart."""

    def __init__(self) -> None:
        self.count = 0
        self.num_infinite = 0
        self.mean = 0.0
        self.squares = 0.0

    def add(self, values: Tensor) -> None:
        for value in values.double().tolist():
            if math.isinf(value):
                self.num_infinite += 1
                continue
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.squares += delta * (value - self.mean)

    def summarize(self) -> dict[str, float | int | None]:
        """mean (None if there was no finite number), standard_error, count, and num_infinite where there were any."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        summary: dict[str, float | int | None] = {
            "mean": self.mean if self.count else None,
            "standard_error": math.sqrt(variance / self.count) if self.count else None,
            "count": self.count,
        }
        return summary | ({"num_infinite": self.num_infinite} if self.num_infinite else {})


class CodeUsage:
    """Which codes were used how often: of a book of 32,768, Emu3's own pictures use only the first half."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Add codes of any shape."""
        counts = torch.bincount(codes.flatten().cpu())
        grown = torch.zeros(max(len(counts), len(self.counts)), dtype=torch.int64)
        grown[: len(self.counts)] += self.counts
        grown[: len(counts)] += counts
        self.counts = grown

    def summarize(self) -> dict[str, float | int]:
        """num_used different codes, the largest one seen, and the perplexity 2^entropy: how many codes' worth of information each is."""
        shares = self.counts[self.counts > 0].double() / self.counts.sum()
        perplexity = float(torch.exp(-(shares * shares.log()).sum()))
        return {"num_used": len(shares), "largest": len(self.counts) - 1, "perplexity": perplexity}


# ---------------------------------------------------------------------------------------------------------------------------- the pictures


@torch.inference_mode()
def score_images(
    tokenizer: Tokenizer, images: Iterable[Tensor], scores: ReconstructionScores, batch_size: int = 8, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Encode and decode pictures [3, 1, H, W] in [-1, 1] and score them; neighbours of one size go in batches.

    Returns the scores and the use of codes. Raises InputError if there are no pictures.
    """
    usage = CodeUsage()
    for batch in _batch_by_size(images, batch_size):
        codes = tokenizer.encode_image(batch.to(device))
        usage.add(codes)
        scores.add(batch, tokenizer.decode_image(codes).float())
    if scores.running["ssim"].count == 0:
        raise InputError("there are no pictures to measure; at least one is needed")
    return scores.summarize() | {"codes": usage.summarize()}


def fit_square(pixels: Tensor, side: int) -> Tensor:
    """[3, T, H, W] -> [3, T, side, side]: the short side resized (bicubic), the middle of the long one kept."""
    return crop_middle(fit_short_side(pixels, side), side, side)


def fit_short_side(pixels: Tensor, side: int) -> Tensor:
    """[3, T, H, W] resized (bicubic) so that its short side is `side`; the aspect ratio stays, to the nearest pixel."""
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    return pixels if size == (height, width) else resize(pixels, size)


def crop_middle(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle [..., height, width] of [..., H, W]."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


# ------------------------------------------------------------------------------------------------------------------------------ the videos


@dataclass(frozen=True)
class VideoProtocol:
    """The paper's video measurement (Table 2): 5 s at the native aspect ratio, short side resized and the middle kept, 8 frames at 12 FPS.

    The paper says no more than that, so these choices are ours. The clip is resampled to 12 frames a second and resized to the short
    side. The tokenizer sees it as a whole at its own aspect ratio (long side cut to a multiple of 8), and the middle square is compared
    (crop "after"); "before" cuts the square out first. The 8 compared frames lie evenly over the 5 s (sampling "spread");
    "consecutive" codes and compares the first 8 frames alone.

    Attributes:
        sides: short sides in pixels, each measured by itself; multiples of 8.
        seconds: length of the clip from the beginning of the file; shorter files are taken as they are.
        fps: frames per second that files are resampled to.
        num_frames: frames that are compared; a file with fewer is refused.
        sampling: "spread" over the clip, or "consecutive" from its beginning.
        crop: the square is cut out "after" the tokenizer or "before" it.
    """

    sides: tuple[int, ...] = (128, 256, 512, 720)
    seconds: float = 5.0
    fps: float = 12.0
    num_frames: int = 8
    sampling: Literal["spread", "consecutive"] = "spread"
    crop: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if not self.sides or any(side < 32 or side % 8 for side in self.sides):
            raise InputError(f"sides are {self.sides}: multiples of 8 from 32 on are allowed")
        if self.seconds <= 0 or self.fps <= 0 or self.num_frames < 1:
            raise InputError(f"seconds {self.seconds}, fps {self.fps} and num_frames {self.num_frames} must all be above 0")

    @property
    def max_frames(self) -> int:
        """Frames that go through the tokenizer."""
        return self.num_frames if self.sampling == "consecutive" else max(self.num_frames, round(self.seconds * self.fps))

    def choose_frames(self, num_available: int) -> list[int]:
        """Indices of the compared frames: the middles of `num_frames` equal parts of the clip."""
        return [math.floor((index + 0.5) * num_available / self.num_frames) for index in range(self.num_frames)]


@torch.inference_mode()
def score_video(
    tokenizer: Tokenizer,
    path: Path,
    side: int,
    protocol: VideoProtocol,
    scores: ReconstructionScores,
    usage: CodeUsage,
    device: torch.device | str = "cpu",
    chunk_frames: int = 4,
) -> None:
    """Score one video at one size. Neither the video, nor its reconstruction, nor its codes are ever in memory as a whole."""
    num_frames = _count_frames(path, protocol)
    chosen = set(protocol.choose_frames(num_frames))
    originals: dict[int, Tensor] = {}

    def read() -> Iterator[Tensor]:
        index = 0
        for chunk in stream_video(path, fps=protocol.fps, chunk_frames=chunk_frames, max_frames=num_frames):
            frames = fit_short_side(chunk, side)
            height, width = (size - size % 8 if protocol.crop == "after" else side for size in frames.shape[-2:])
            frames = crop_middle(frames, height, width)
            for offset in range(frames.shape[1]):
                if index + offset in chosen:
                    originals[index + offset] = crop_middle(frames[:, offset], side, side).clone()
            index += frames.shape[1]
            yield frames.unsqueeze(0).to(device)

    def encode() -> Iterator[Tensor]:
        for codes in tokenizer.encode_stream(read()):
            usage.add(codes)
            yield codes

    index = 0
    for decoded in tokenizer.decode_stream(encode()):
        for offset in range(decoded.shape[2]):
            original = originals.pop(index + offset, None)  # frames that fill the last group of four are never chosen
            if original is not None:
                scores.add(original.unsqueeze(0), crop_middle(decoded[:, :, offset], side, side).float())
        index += decoded.shape[2]
    if originals:
        raise InputError(f"{path} gave {index} reconstructed frames; frame {min(originals)} is missing")


# ----------------------------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class ReconstructionConfig:
    """What `emu3 evaluate reconstruction` measures.

    Attributes:
        media: a file, or a folder that is searched for picture and video files.
        kind: "image" (PSNR, SSIM, LPIPS, rFID) or "video" (the paper's protocol).
        side: pictures: short side resized to this many pixels and the middle kept; None: sizes as published (512² to 1024² pixels).
        protocol: videos: sizes, length, rate, compared frames.
        rfid: pictures: also the Fréchet distance; with fewer than some thousands of pictures it says little.
        ssim_window: "gaussian" (11 x 11, as in the SSIM paper) or "uniform" (7 x 7, scikit-image's default).
        max_items: stop after so many files, taken in the order of their names.
        batch_size: pictures at a time.
        device, dtype: where and in what precision the tokenizer runs. bfloat16 gives other codes than float32.
        channels_last: the layout of its weights in memory; the numbers stay, the speed does not.
    """

    media: Path
    kind: Literal["image", "video"] = "image"
    side: int | None = 256
    protocol: VideoProtocol = VideoProtocol()
    rfid: bool = True
    ssim_window: Window = "gaussian"
    max_items: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False


def load_tokenizer(folder: Path | str = "mini", device: str = "cpu") -> VisionTokenizer:
    """The vision tokenizer of a folder of weights (ours, official or transformers' layout), or "mini", the one in this package; fp32.

    Raises InputError for a folder that is missing, damaged or foreign, or holds no vision tokenizer.
    """
    path = Path(str(resources.files("openemu3") / "assets" / "mini")) if folder == "mini" else Path(folder)
    sizes = read_config(path).vision_tokenizer
    if sizes is None:
        raise InputError(f"{path} holds no vision tokenizer; name the folder of one (Emu3-VisionTokenizer)")
    with torch.device("meta"):
        tokenizer = VisionTokenizer(VisionTokenizerConfig(**sizes))
    load_into(tokenizer, path, "vision_tokenizer", device, torch.float32)
    return tokenizer


def run_reconstruction(tokenizer: VisionTokenizer, config: ReconstructionConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a `VisionTokenizer`; `progress` hears how many files are done.

    Returns {"kind", "settings", and "scores" for pictures or "sizes": [{"side", ...}] for videos}.
    Raises InputError for missing or damaged media, and for missing LPIPS or Inception weights.
    """
    dtype = getattr(torch, config.dtype)
    tokenizer = tokenizer.to(config.device, dtype)
    if config.channels_last:
        apply_channels_last(tokenizer)
    cast = _CastTokenizer(tokenizer, dtype)
    files = find_media(config.media, config.kind, config.max_items)
    lpips = LPIPS("alex")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    report: dict[str, Any] = {"kind": config.kind, "num_files": len(files), "settings": settings}
    if config.kind == "image":
        scores = ReconstructionScores(lpips, Inception() if config.rfid else None, config.ssim_window)
        images = (_read_sized(path, config.side) for path in _track(files, "pictures", progress))
        return report | {"scores": score_images(cast, images, scores, config.batch_size, config.device)}
    sizes = []
    for side in config.protocol.sides:
        scores, usage = ReconstructionScores(lpips, None, config.ssim_window), CodeUsage()
        num_enlarged = 0
        for path in _track(files, f"videos at {side}²", progress):
            info = probe_video(path)
            num_enlarged += min(info.height, info.width) < side
            score_video(cast, path, side, config.protocol, scores, usage, config.device)
        sizes.append({"side": side, "num_enlarged": num_enlarged} | scores.summarize() | {"codes": usage.summarize()})
    return report | {"sizes": sizes}


def build_reconstruction_table(report: dict[str, Any]) -> Table:
    """A report of `run_reconstruction` as a table for the terminal."""
    table = Table(title=f"reconstruction of {report['num_files']} {report['kind']} files")
    rows = [("", report["scores"])] if report["kind"] == "image" else [(f"{row['side']}²", row) for row in report["sizes"]]
    for heading in ("size", "PSNR dB ↑", "SSIM ↑", "LPIPS ↓", "rFID ↓", "codes used", "perplexity"):
        table.add_column(heading, justify="right")
    for size, row in rows:
        cells = [_format_mean(row[name], digits) for name, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3))]
        rfid = f"{row['rfid']:.2f}" if "rfid" in row else "-"
        table.add_row(size, *cells, rfid, str(row["codes"]["num_used"]), f"{row['codes']['perplexity']:.0f}")
    return table


def find_media(source: Path, kind: Literal["image", "video"], max_items: int | None = None) -> list[Path]:
    """The file itself, or the picture or video files below a folder, sorted by name. Raises InputError if there are none."""
    if source.is_file():
        return [source]
    suffixes = IMAGE_SUFFIXES if kind == "image" else VIDEO_SUFFIXES
    if not source.is_dir():
        raise InputError(f"{source} does not exist; a file or a folder of {kind} files is needed")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise InputError(f"{source} holds no {kind} file ({', '.join(suffixes)})")
    return found[:max_items]


# --------------------------------------------------------------------------------------------------------------------------------- details


class _CastTokenizer:
    """A tokenizer that takes float32 pixels whatever its own type."""

    def __init__(self, tokenizer: Any, dtype: torch.dtype) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tokenizer.encode_image(pixels.to(self.dtype))

    def decode_image(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode_image(codes)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.tokenizer.encode_stream(chunk.to(self.dtype) for chunk in chunks)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.tokenizer.decode_stream(chunks)


def _build_window(window: Window) -> Tensor:
    """One side of the separable window, float64, summing to 1."""
    if window == "uniform":
        return torch.full((7,), 1 / 7, dtype=torch.float64)
    if window == "gaussian":
        offsets = torch.arange(-5, 6, dtype=torch.float64)  # truncated at 3.5 sigma
        weights = torch.exp(-0.5 * (offsets / 1.5) ** 2)
        return weights / weights.sum()
    raise InputError(f"SSIM window {window!r} is unknown; 'gaussian' and 'uniform' are allowed")


def _batch_by_size(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Pictures [3, 1, H, W] -> batches [B, 3, H, W] of neighbours of one size."""
    waiting: list[Tensor] = []
    for image in images:
        if waiting and (len(waiting) == batch_size or waiting[0].shape != image.shape):
            yield torch.cat(waiting, dim=1).transpose(0, 1)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.cat(waiting, dim=1).transpose(0, 1)


def _read_sized(path: Path, side: int | None) -> Tensor:
    return preprocess_image(path) if side is None else fit_square(read_image(path), side)


def _count_frames(path: Path, protocol: VideoProtocol) -> int:
    """Frames of the clip after resampling; decoding once more is cheap beside the network, and headers are often wrong."""
    chunks = stream_video(path, fps=protocol.fps, chunk_frames=4, max_frames=protocol.max_frames)
    num_frames = sum(chunk.shape[1] for chunk in chunks)
    if num_frames < protocol.num_frames:
        raise InputError(f"{path} has {num_frames} frames at {protocol.fps:g} FPS; the protocol compares {protocol.num_frames}")
    return num_frames


def _track(items: Sequence[Path], what: str, progress: Progress | None) -> Iterator[Path]:
    for index, item in enumerate(items):
        if progress is not None:
            progress(index, len(items), what)
        yield item


def _format_mean(summary: dict[str, Any], digits: int) -> str:
    if summary["mean"] is None:
        return "∞"
    return f"{summary['mean']:.{digits}f} ± {summary['standard_error']:.{digits}f}"
