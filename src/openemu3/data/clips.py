"""Pixels for training the vision tokenizer: stills and clips from samples, in an endless, seeded, resumable order.

In: Parquet files of samples. Out: PixelBatch. The surprising thing: batch number n is a pure function of (samples, seed, n), so
a run resumes by asking for the next number; nothing else is saved. Media stay compressed in memory and are decoded when drawn.

Shapes: B items, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openemu3.media import read_image
from openemu3.records import InputError, Sample
from openemu3.tokenization.encode import read_clip


@dataclass(frozen=True)
class PixelBatch:
    """pixels [B, 3, T, H, W] in [-1, 1]; T is 1 for stills."""

    kind: Literal["image", "video"]
    pixels: Tensor


@dataclass(frozen=True)
class PixelBatchesConfig:
    images_per_batch: int = 24
    clips_per_batch: int = 1
    clip_frames: int = 8
    video_every: int = 4  # every n-th batch is one of clips; 0: stills alone
    max_shift: int = 4  # pixels of random translation, filled with white; a flip left to right in half of the cases
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("images_per_batch", 1), ("clips_per_batch", 1), ("clip_frames", 1), ("video_every", 0), ("max_shift", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class PixelBatches:
    """Calling it with a position yields the batches from that number on."""

    def __init__(self, samples: Sequence[Sample], config: PixelBatchesConfig) -> None:
        self.config = config
        self.images = [s for s in samples if s.kind == "image"]
        self.videos = [s for s in samples if s.kind == "video"]
        if not self.images:
            raise InputError("no image samples to train on; the vision tokenizer needs at least one")
        if config.video_every and not self.videos:
            raise InputError(f"video_every is {config.video_every} but there are no video samples; set it to 0")

    def __call__(self, position: int) -> Iterator[PixelBatch]:
        # One batch is decoded ahead in a thread while the network computes.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.build, position)
            while True:
                position += 1
                batch, ahead = ahead.result(), pool.submit(self.build, position)
                yield batch

    def build(self, number: int) -> PixelBatch:
        """Batch `number`, counted from 0."""
        config = self.config
        random = np.random.default_rng((config.seed, number))
        every = config.video_every
        num_videos = number // every + (number % every == every - 1) if every else 0
        if every and number % every == every - 1:
            first = (num_videos - 1) * config.clips_per_batch
            chosen = [draw_without_repeats(self.videos, first + i, config.seed + 1) for i in range(config.clips_per_batch)]
            return PixelBatch("video", stack(chosen, [augment(self._read_clip(s, random), random, config.max_shift) for s in chosen]))
        first = (number - num_videos) * config.images_per_batch
        chosen = [draw_without_repeats(self.images, first + i, config.seed) for i in range(config.images_per_batch)]
        return PixelBatch("image", stack(chosen, [augment(read_image(s.media), random, config.max_shift) for s in chosen]))

    def _read_clip(self, sample: Sample, random: np.random.Generator) -> Tensor:
        frames, _ = read_clip(sample)
        missing = self.config.clip_frames - frames.shape[1]
        if missing > 0:
            return torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        start = int(random.integers(0, frames.shape[1] - self.config.clip_frames + 1))
        return frames[:, start : start + self.config.clip_frames]


def stack(samples: Sequence[Sample], pixels: Sequence[Tensor]) -> Tensor:
    """[B, 3, T, H, W] of B times [3, T, H, W]. Raises InputError for sizes that differ."""
    for sample, one in zip(samples, pixels, strict=True):
        if one.shape != pixels[0].shape:
            sizes = " x ".join(map(str, pixels[0].shape[2:])), " x ".join(map(str, one.shape[2:]))
            raise InputError(f"sample {samples[0].id!r} has {sizes[0]} pixels and {sample.id!r} {sizes[1]}; all must be of one size")
    return torch.stack(list(pixels))


def draw_without_repeats(items: Sequence[Sample], index: int, seed: int) -> Sample:
    """Item `index` of the endless sequence of epochs, each a fresh permutation of all items."""
    epoch, offset = divmod(index, len(items))
    return items[int(np.random.default_rng((seed, epoch)).permutation(len(items))[offset])]


def augment(pixels: Tensor, random: np.random.Generator, max_shift: int) -> Tensor:
    """A random flip left to right and a random translation, the same for all frames of [3, T, H, W]."""
    if random.random() < 0.5:
        pixels = pixels.flip(-1)
    if not max_shift:
        return pixels
    left, top = (int(v) for v in random.integers(0, 2 * max_shift + 1, size=2))
    padded = F.pad(pixels, (max_shift,) * 4, value=1.0)  # white
    return padded[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]]
