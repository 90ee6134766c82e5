"""Samples to documents: media through the vision tokenizer, captions into words, both orders of the paper.

In: records.Sample (media bytes of one size per batch, captions by language). Out: (source, sample id, Encoded) triples. The same
grammar writes both orders: caption -> vision ("draw", "film"), where the caption is context, and vision -> caption ("describe"),
where the caption is the target. Null prompts are not written: the loader makes them by dropping context text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from openemu3.media import read_image, read_video
from openemu3.records import Document, Image, InputError, Sample, Text, Video
from openemu3.tokenization.sequence import Encoded, SequenceFormat
from openemu3.tokenization.vision import VisionTokenizer


@dataclass(frozen=True)
class EncodeConfig:
    """What documents to write of a sample."""

    languages: tuple[str, ...] = ("en", "zh")
    batch_size: int = 16  # stills tokenised together
    clip_frames: int = 16  # frames of one video document; a longer video gives several
    clip_stride: int = 8  # frames between the starts of two of them; what is left after the last whole one is in no document

    def __post_init__(self) -> None:
        for name in ("batch_size", "clip_frames", "clip_stride"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.languages:
            raise InputError("languages is empty; name at least one, such as 'en'")


@dataclass(frozen=True)
class EncodedDocument:
    """One document, where it comes from ("draw", "film", "describe", "describe_video") and of which sample."""

    source: str
    sample_id: str
    split: str
    encoded: Encoded


def encode_samples(
    samples: Iterable[Sample], tokenizer: VisionTokenizer, sequence_format: SequenceFormat, config: EncodeConfig
) -> Iterator[EncodedDocument]:
    """All documents of the samples, in their order."""
    device = next(tokenizer.parameters()).device
    for kind, run in groupby(samples, key=lambda sample: sample.kind):
        if kind == "video":
            for sample in run:
                yield from _encode_video(sample, tokenizer, sequence_format, config, device)
            continue
        batch: list[tuple[Sample, Tensor]] = []
        for sample in run:
            pixels = read_image(sample.media)  # [3, 1, H, W]
            if batch and (len(batch) == config.batch_size or batch[0][1].shape != pixels.shape):
                yield from _encode_images(batch, tokenizer, sequence_format, config, device)
                batch = []
            batch.append((sample, pixels))
        if batch:
            yield from _encode_images(batch, tokenizer, sequence_format, config, device)


def _encode_images(
    batch: list[tuple[Sample, Tensor]], tokenizer: VisionTokenizer, form: SequenceFormat, config: EncodeConfig, device: torch.device
) -> Iterator[EncodedDocument]:
    codes = tokenizer.encode_image(torch.cat([pixels.transpose(0, 1) for _, pixels in batch]).to(device)).cpu().numpy()
    for (sample, _), grid in zip(batch, codes, strict=True):
        yield from _write_both_orders(sample, Image(grid.astype(np.int32)), ("draw", "describe"), form, config)


def _encode_video(
    sample: Sample, tokenizer: VisionTokenizer, form: SequenceFormat, config: EncodeConfig, device: torch.device
) -> Iterator[EncodedDocument]:
    frames, fps = read_clip(sample)  # [3, T, H, W]
    last_start = max(0, frames.shape[1] - config.clip_frames)
    for start in range(0, last_start + 1, config.clip_stride):
        clip = frames[:, start : start + config.clip_frames]
        codes = tokenizer.encode_video(clip.unsqueeze(0).to(device))[0].cpu().numpy()
        video = Video(codes.astype(np.int32), fps, clip.shape[1])
        yield from _write_both_orders(sample, video, ("film", "describe_video"), form, config)


def read_clip(sample: Sample) -> tuple[Tensor, float]:
    """All frames of a video sample, [3, T, H, W] in [-1, 1], and their rate: that of the attribute "fps" if it has one.

    A file may store equal neighbours as one long frame; at the rate that curation gave the clip they come apart again.
    """
    rate = sample.attributes.get("fps")
    try:
        return read_video(sample.media, fps=None if rate is None else float(rate))
    except ValueError as error:
        raise InputError(f"video sample {sample.id!r} of rate {rate} cannot be read: {error}") from error


def _write_both_orders(
    sample: Sample, part: Image | Video, sources: tuple[str, str], form: SequenceFormat, config: EncodeConfig
) -> Iterator[EncodedDocument]:
    for language in config.languages:
        caption = sample.captions.get(language)
        if not caption:
            continue
        first, second = sources
        yield EncodedDocument(first, sample.id, sample.split, form.encode(Document((Text(caption), part))))
        yield EncodedDocument(second, sample.id, sample.split, form.encode(Document((part, Text(caption, target=True)))))
