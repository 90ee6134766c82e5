"""The whole report on a small model: reconstruction, sentence to picture, picture to sentence, film to film, seen and held out.

In: a loaded `Emu3` and the recipe's samples (Parquet; attributes concept, style, tone; splits train, heldout_combination,
heldout_picture, heldout_video). Out: one dict of numbers with intervals, tables of it, and sheets of pictures to look at.
The surprising thing: what was seen in training is measured too, in the same way, because the distance between the two is the news.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from openemu3.data.samples import read_samples
from openemu3.evaluation.classifiers import train_classifier
from openemu3.evaluation.image_generation import Judges, draw_samples, judge_drawings, score_drawings
from openemu3.evaluation.intervals import Estimate
from openemu3.evaluation.reconstruction import Progress, ReconstructionScores, RunningMean
from openemu3.evaluation.understanding import CaptionParser, describe_pictures, score_descriptions, stack_pictures
from openemu3.evaluation.video_generation import score_continuations
from openemu3.generation.tasks import Emu3, Film
from openemu3.media import read_image, read_video, write_image
from openemu3.records import InputError, Sample
from openemu3.tokenization.lpips import LPIPS

IMAGES_FILE, VIDEOS_FILE = "images.parquet", "videos.parquet"


@dataclass(frozen=True)
class ReportConfig:
    """What `emu3 evaluate mini` measures.

    Attributes:
        samples: folder with images.parquet and videos.parquet.
        max_pictures: at most so many samples of each set are drawn and described, chosen by the seed; None: all of them, and as
            many of the training split as of the largest held-out set.
        num_candidates: real pictures that a drawing is told apart among.
        seed: of the choice of samples and candidates, of the drawings, and of the classifiers' training.
        classifier_steps: training steps of each of the two classifiers.
        language: of the captions that are drawn from.
        sheets: folder for PNG sheets of real pictures above drawn ones; None: none are written.
    """

    samples: Path = Path(".cache/mini")
    max_pictures: int | None = 100
    num_candidates: int = 50
    seed: int = 0
    classifier_steps: int = 400
    language: str = "en"
    sheets: Path | None = None


def run_report(emu3: Emu3, config: ReportConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a model on its recipe's samples.

    Returns {"settings", "reconstruction", "text_to_picture", "picture_to_text", "continuation", "seconds"}; every share and error is
    {"mean", "low", "high", "count"} with a 95 % bootstrap interval.
    Raises InputError for missing samples or weights, and for samples without the attributes concept, style and tone.
    """
    begun = time.monotonic()
    lpips, judge = LPIPS("alex"), LPIPS("vgg")
    samples, pixels = read_pictures(config.samples / IMAGES_FILE)
    sets = choose_sets(samples, config)
    stages = _Stages(progress, total=3 + 2 * len(sets))
    report: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    }

    stages.begin("reconstruction")
    clips = list(read_samples(config.samples / VIDEOS_FILE, splits=("heldout_video",)))
    windows, names = read_windows(clips, emu3.defaults.fps, emu3.defaults.clip_frames)
    coded = torch.stack([reconstruct_clip(emu3, clip) for clip in windows])
    report["reconstruction"] = score_reconstructions(emu3, samples, pixels, windows, coded, lpips, judge)

    stages.begin("training the classifiers")
    judges = train_judges(samples, pixels, judge, config.classifier_steps, config.seed)
    parser = CaptionParser([*samples, *clips])
    report["text_to_picture"], report["picture_to_text"] = {}, {}
    for name, indices in sets.items():
        wanted, shown = [samples[index] for index in indices], pixels[indices]
        stages.begin(f"drawing: {name}")
        drawn = draw_samples(emu3, wanted, config.language, config.seed)
        rebuilt = reconstruct(emu3, shown)
        sources = {"drawn": drawn, "ceiling": rebuilt}
        verdicts = judge_drawings(sources, indices, samples, pixels, judges, config.num_candidates, config.seed)
        report["text_to_picture"][name] = {
            "num_pictures": len(indices),
            "chance": 1 / config.num_candidates,
            **score_drawings(verdicts),
        }
        if config.sheets is not None:
            write_sheet(config.sheets / f"{name.replace(' ', '_')}.png", shown, drawn)
        stages.begin(f"describing: {name}")
        report["picture_to_text"][name] = score_descriptions(describe_pictures(emu3, shown), wanted, parser)

    stages.begin("continuing films")
    captions = {sample.id: sample.captions[config.language] for sample in clips}
    predictions, actual = continue_windows(emu3, windows, coded, [captions[name] for name in names], config.seed)
    report["continuation"] = score_continuations(predictions, actual, names, lpips)
    if config.sheets is not None:
        every_other = slice(1, None, 2)
        write_sheet(
            config.sheets / "continuation.png", *(_lay_out(frames[:8, :, every_other]) for frames in (actual, predictions["model"]))
        )
    return report | {"seconds": round(time.monotonic() - begun, 1)}


# ---- what is measured


def choose_sets(samples: Sequence[Sample], config: ReportConfig) -> dict[str, list[int]]:
    """Which samples (by index) stand for what, in the order of the file.

    "seen" are from the training split; "new style" and "new tone" are combinations whose parts were seen; "new concept" was never seen.
    """
    sets: dict[str, list[int]] = {"seen": [], "new style": [], "new tone": [], "new concept": []}
    for index, sample in enumerate(samples):
        for attribute in ("concept", "style", "tone"):
            if attribute not in sample.attributes:
                raise InputError(f"sample {sample.id!r} has no attribute {attribute!r}; this report needs concept, style and tone")
        if sample.split == "train":
            sets["seen"].append(index)
        elif sample.split == "heldout_combination":
            sets["new tone" if sample.attributes["tone"] else "new style"].append(index)
        elif sample.split == "heldout_picture":
            sets["new concept"].append(index)
    largest = max(len(indices) for name, indices in sets.items() if name != "seen")
    random = np.random.default_rng(config.seed)
    chosen = {}
    for name, indices in sets.items():
        limit = largest if config.max_pictures is None else config.max_pictures
        if len(indices) > limit:
            indices = sorted(random.choice(indices, limit, replace=False).tolist())
        if indices:
            chosen[name] = indices
    return chosen


def train_judges(samples: Sequence[Sample], pixels: Tensor, lpips: LPIPS, num_steps: int = 400, seed: int = 0) -> Judges:
    """Classifiers of style and of skin tone, trained on the real pictures of the training split."""
    seen = [index for index, sample in enumerate(samples) if sample.split == "train"]
    toned = [index for index in seen if samples[index].attributes["tone"]]
    style = train_classifier(pixels[seen], [samples[index].attributes["style"] for index in seen], num_steps, seed=seed)
    tone = train_classifier(pixels[toned], [samples[index].attributes["tone"] for index in toned], num_steps, seed=seed)
    return Judges(lpips, style, tone)


@torch.inference_mode()
def score_reconstructions(
    emu3: Emu3, samples: Sequence[Sample], pixels: Tensor, windows: Tensor, coded: Tensor, lpips: LPIPS, lpips_vgg: LPIPS
) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS of the vision tokenizer on every held-out picture, as many seen ones, and held-out clips frame by frame.

    windows, coded: clips [N, 3, T, H, W], and what the tokenizer made of them. Pictures get LPIPS by both networks: a tokenizer that
    was trained with one of them looks better to it than it should.
    """
    held_out = [index for index, sample in enumerate(samples) if sample.split != "train"]
    seen = [index for index, sample in enumerate(samples) if sample.split == "train"]
    seen = seen[:: max(1, len(seen) // len(held_out))]
    report = {}
    for name, indices in (("held-out pictures", held_out), ("seen pictures", seen)):
        scores, by_vgg = ReconstructionScores(lpips), RunningMean()
        for part in torch.tensor(indices).split(32):
            rebuilt = reconstruct(emu3, pixels[part])
            scores.add(pixels[part], rebuilt)
            by_vgg.add(lpips_vgg(pixels[part], rebuilt))
        report[name] = scores.summarize() | {"lpips_vgg": by_vgg.summarize()}
    scores = ReconstructionScores(lpips)
    for clip, rebuilt in zip(windows, coded, strict=True):
        scores.add(clip.transpose(0, 1), rebuilt.transpose(0, 1))
    return report | {"held-out clips": scores.summarize()}


@torch.inference_mode()
def continue_windows(emu3: Emu3, windows: Tensor, coded: Tensor, captions: Sequence[str], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Ways to go on after the first half of each window [N, 3, T, H, W], and the real second half; `coded` as in `score_reconstructions`.

    "model" is told the caption, "model, no words" is not; "repeat" holds the last frame, "repeat, coded" holds it as the tokenizer
    gives it back; "coded future" is the real second half through the tokenizer.
    """
    half = windows.shape[2] // 2
    context, actual = windows[:, :, :half], windows[:, :, half:]
    films = [Film(clip, emu3.defaults.fps) for clip in context]
    seconds = half / emu3.defaults.fps
    told = emu3.continue_film(films, seconds, list(captions), seed=seed)
    untold = emu3.continue_film(films, seconds, "", seed=seed)
    predictions = {
        "model": torch.stack([film.pixels[:, half:] for film in told]),
        "model, no words": torch.stack([film.pixels[:, half:] for film in untold]),
        "repeat": context[:, :, -1:].expand_as(actual),
        "repeat, coded": coded[:, :, half - 1 : half].expand_as(actual),
        "coded future": coded[:, :, half:],
    }
    return predictions, actual


# ---- reading and reconstructing


def read_pictures(path: Path) -> tuple[list[Sample], Tensor]:
    """The samples of a file, without their media, and their pixels [N, 3, H, W]; all pictures must be of one size."""
    samples, pictures = [], []
    for sample in read_samples(path, kind="image"):
        pictures.append(read_image(sample.media))
        samples.append(sample)
    if not samples:
        raise InputError(f"{path} holds no pictures")
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError(f"{path} holds pictures of several sizes; this report needs one size")
    return samples, stack_pictures(pictures)


def read_windows(clips: Sequence[Sample], fps: float, num_frames: int) -> tuple[Tensor, list[str]]:
    """Windows [N, 3, num_frames, H, W] of the clips, each starting half a window after the one before, and the clip each is from."""
    windows, names = [], []
    for clip in clips:
        frames, _ = read_video(clip.media, fps=fps)
        for start in range(0, frames.shape[1] - num_frames + 1, num_frames // 2):
            windows.append(frames[:, start : start + num_frames])
            names.append(clip.id)
    if not windows:
        raise InputError(f"no held-out clip has {num_frames} frames at {fps:g} frames per second")
    return torch.stack(windows), names


@torch.inference_mode()
def reconstruct(emu3: Emu3, pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] through the vision tokenizer and back, clipped to [-1, 1]."""
    device = next(emu3.vision_tokenizer.parameters()).device
    parts = []
    for part in pixels.split(32):
        codes = emu3.vision_tokenizer.encode_image(part.to(device))
        parts.append(emu3.vision_tokenizer.decode_image(codes).cpu().clamp(-1, 1))
    return torch.cat(parts)


@torch.inference_mode()
def reconstruct_clip(emu3: Emu3, clip: Tensor) -> Tensor:
    """A clip [3, T, H, W] through the vision tokenizer and back, clipped to [-1, 1]."""
    device = next(emu3.vision_tokenizer.parameters()).device
    codes = emu3.vision_tokenizer.encode_video(clip[None].to(device))
    return emu3.vision_tokenizer.decode_video(codes, num_frames=clip.shape[1])[0].cpu().clamp(-1, 1)


def write_sheet(path: Path, *kinds: Tensor, columns: int = 16) -> None:
    """A PNG with the pictures of several kinds [N, 3, H, W] below each other: real above drawn, say, `columns` pairs to a line."""
    lines = []
    for start in range(0, len(kinds[0]), columns):
        for pictures in kinds:
            row = pictures[start : start + columns]
            blank = row.new_ones(columns - len(row), *row.shape[1:])
            lines.append(torch.cat([row, blank]).permute(1, 2, 0, 3).flatten(2))  # [3, H, columns * W]
        lines.append(lines[-1].new_zeros(3, 4, lines[-1].shape[2]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, torch.cat(lines, dim=1).unsqueeze(1))


def _lay_out(clips: Tensor) -> Tensor:
    """Frames of clips [N, 3, T, H, W] as pictures [N*T, 3, H, W]."""
    return clips.transpose(1, 2).flatten(0, 1)


# ---- showing


def build_report_tables(report: dict[str, Any]) -> list[Table]:
    """The report for the terminal: shares in percent, with their intervals."""
    reconstruction = Table("", "PSNR dB ↑", "SSIM ↑", "LPIPS Alex ↓", "LPIPS VGG ↓", title="vision tokenizer: reconstruction")
    for name, scores in report["reconstruction"].items():
        measures = (("psnr", 2), ("ssim", 3), ("lpips", 3), ("lpips_vgg", 3))
        reconstruction.add_row(name, *(f"{scores[key]['mean']:.{digits}f}" if key in scores else "-" for key, digits in measures))
    drawing = Table(
        "sentence → picture",
        "pictures",
        "retrieval %",
        "version %",
        "style %",
        "tone %",
        "tone ± 1 %",
        title="recognised drawings (ceiling)",
    )
    for name, scores in report["text_to_picture"].items():
        drawing.add_row(
            name,
            str(scores["num_pictures"]),
            *(_show_share(scores, key) for key in ("retrieval", "version", "style", "tone", "tone_within_one")),
        )
    saying = Table("picture → sentence", "pictures", "caption %", "name %", "style %", "tone %", title="exact descriptions")
    for name, scores in report["picture_to_text"].items():
        saying.add_row(
            name, str(scores["num_pictures"]), *(_show_estimate(scores.get(key)) for key in ("caption", "name", "style", "tone"))
        )
    film = Table(
        "film → film", "MSE", "LPIPS", "MSE lower than repeating %", "LPIPS lower %", title="held-out continuations, 1st to last frame"
    )
    continuation = report["continuation"]
    for way in continuation["mse"]:
        errors = [continuation[measure][way] for measure in ("mse", "lpips")]
        cells = [f"{error['mean']['mean']:.4f} ({error['by_frame'][0]:.4f} … {error['by_frame'][-1]:.4f})" for error in errors]
        film.add_row(way, *cells, *(_show_estimate(error.get("better")) for error in errors))
    return [reconstruction, drawing, saying, film]


def _show_share(scores: dict[str, Any], key: str) -> str:
    return "-" if key not in scores else f"{_show_estimate(scores[key]['drawn'])} [{scores[key]['ceiling']['mean'] * 100:.0f}]"


def _show_estimate(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else Estimate(**estimate).format(0, 100)


class _Stages:
    """Tells the listener which of the stages has begun."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.begun = 0

    def begin(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.begun, self.total, what)
        self.begun += 1
