"""Samples to documents: media through the vision tokenizer, captions into words, both orders of the paper.

In: Items (a picture, a video or a text, with captions by language). Out: EncodedDocument records, in the order of the items. The same
grammar writes both orders: caption -> vision ("draw", "film"), where the caption is context, and vision -> caption ("describe",
"describe_video"), where the caption is the target; a text alone ("text") is a target, too. Null prompts are not written: the loader
makes them by dropping context text.
The surprising thing: which pictures share a batch depends on the items alone, never on time, so that the same items give the same
documents, to the last code, when a tokenisation that was killed is done again.

Shapes: T frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openemu3.media import fit_size, preprocess_image, probe_video, read_image, read_video, resize, stream_video
from openemu3.records import MAX_FPS, Document, Image, InputError, Sample, Text, Video
from openemu3.tokenization.sequence import Encoded, Grid, SequenceFormat
from openemu3.tokenization.vision import VisionTokenizer

ANY_LANGUAGE = "und"  # of a caption whose language nobody stated (BCP 47: undetermined); such captions are always used
READ_AHEAD = 32  # pictures that are decoded while others are encoded
READ_THREADS = 4
GROUP_BATCHES = 16  # as many batches of pictures are in memory, so that enough of them have one size
CHUNK_FRAMES = 16  # of a video, in memory at a time


@dataclass(frozen=True)
class EncodeConfig:
    """What documents to write of a sample."""

    languages: tuple[str, ...] = ("en", "zh")
    # Parts of the captions that are written as caption -> medium and as medium -> caption. Where the two add up to at most 1, no
    # caption is written both ways; 1 and 1 write each both ways.
    generation_share: float = 1.0
    understanding_share: float = 1.0
    batch_tokens: int = 4096  # codes that are made together: one picture of 512 x 512, or 64 of 64 x 64
    resolution: int | None = None  # side of the square of whose area pictures and frames are made; None: as they are
    fps: float | None = None  # frames per second of videos that do not say their own rate; None: as they are stored
    clip_frames: int | None = 16  # frames of one video document; a longer video gives several; None: the whole video is one
    clip_stride: int = 8  # frames between the starts of two of them; what is left after the last whole one is in no document
    seed: int = 0  # of the lottery that the two shares are

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "clip_frames", "clip_stride", "resolution"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("generation_share", "understanding_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise InputError(f"fps is {self.fps}; it must be more than 0 and at most {MAX_FPS}")
        if not self.languages:
            raise InputError("languages is empty; name at least one, such as 'en'")


@dataclass(frozen=True)
class Item:
    """What becomes documents: a picture or a video with captions, or a text alone.

    Args:
        media: the encoded file, or where it lies; None for a text.
        captions: language -> caption; ANY_LANGUAGE where none is stated. Of a text: itself.
        fps: frames per second to take of a video; None: see EncodeConfig.
        dataset: name of the data set it comes from.
    """

    id: str
    kind: Literal["image", "video", "text"]
    media: bytes | Path | None
    captions: Mapping[str, str]
    split: str = "train"
    fps: float | None = None
    dataset: str = ""

    @classmethod
    def from_sample(cls, sample: Sample, dataset: str = "") -> Item:
        """Raises InputError for an attribute "fps" that is no number."""
        return cls(sample.id, sample.kind, sample.media, sample.captions, sample.split, _read_rate(sample), dataset)


@dataclass(frozen=True)
class Refusal:
    """A sample of which there is no document, and why."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class EncodedDocument:
    """One document, what it is ("draw", "film", "describe", "describe_video", "text", ...), of which sample of which data set, and the
    grids of its media in token units."""

    source: str
    sample_id: str
    split: str
    encoded: Encoded
    dataset: str = ""
    grids: tuple[Grid, ...] = ()


def encode_samples(
    samples: Iterable[Sample], tokenizer: VisionTokenizer, sequence_format: SequenceFormat, config: EncodeConfig
) -> Iterator[EncodedDocument]:
    """All documents of the samples, in their order. Raises InputError at the first sample that cannot be read."""

    def fail(refusal: Refusal) -> None:
        raise InputError(f"sample {refusal.sample_id!r} gives no document: {refusal.reason}")

    return encode_items(map(Item.from_sample, samples), tokenizer, sequence_format, config, fail)


def encode_items(
    items: Iterable[Item],
    tokenizer: VisionTokenizer,
    sequence_format: SequenceFormat,
    config: EncodeConfig,
    refuse: Callable[[Refusal], None],
) -> Iterator[EncodedDocument]:
    """All documents of the items, in their order; `refuse` is told of every item that cannot be read, and why.

    Pictures of one size are encoded together. No more than a few batches of pictures are in memory, and of a video no more than a
    chunk and, where clips overlap, one clip.
    """
    device = next(tokenizer.parameters()).device
    for group in _gather(_decode_ahead(items, tokenizer, config), tokenizer, config.batch_tokens):
        codes = _encode_pictures([pixels for _, pixels in group], tokenizer, config.batch_tokens, device)
        for (item, found), grid in zip(group, codes, strict=True):
            try:
                if isinstance(found, InputError):
                    raise found
                if grid is not None:
                    yield from write_both_orders(item, Image(grid), sequence_format, config)
                elif item.kind == "text":
                    yield write_text(item, sequence_format)
                else:
                    for video in encode_clips(item, tokenizer, config):
                        yield from write_both_orders(item, video, sequence_format, config)
            except InputError as error:
                refuse(Refusal(item.id, str(error)))


Decoded = tuple[Item, Tensor | InputError | None]  # of a picture its pixels [3, 1, H, W] or what is wrong with it; None: not a picture


def _decode_ahead(items: Iterable[Item], tokenizer: VisionTokenizer, config: EncodeConfig) -> Iterator[Decoded]:
    """The items in their order, pictures decoded in threads a little ahead of time."""
    waiting: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for item in items:
            waiting.append(pool.submit(_decode, item, tokenizer.config.spatial_factor, config.resolution))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode(item: Item, factor: int, resolution: int | None) -> Decoded:
    if item.kind != "image" or item.media is None:
        return item, None
    try:
        if resolution is not None:
            return item, preprocess_image(item.media, resolution**2, resolution**2, factor)
        pixels = read_image(item.media)
        _check_sides(pixels, factor)
        return item, pixels
    except (InputError, OSError) as error:
        return item, InputError(str(error))


def _check_sides(pixels: Tensor, factor: int) -> None:
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise InputError(
            f"it has {height} x {width} pixels; both sides must be multiples of {factor}, unless a resolution is given to fit it to"
        )


def _gather(decoded: Iterable[Decoded], tokenizer: VisionTokenizer, batch_tokens: int) -> Iterator[list[Decoded]]:
    """Runs of items with up to GROUP_BATCHES batches of pictures; a video ends its run."""
    group: list[Decoded] = []
    num_codes = 0
    for item, found in decoded:
        group.append((item, found))
        num_codes += found[0].numel() // tokenizer.config.spatial_factor**2 if isinstance(found, Tensor) else 1
        if item.kind == "video" or num_codes >= GROUP_BATCHES * batch_tokens:
            yield group
            group, num_codes = [], 0
    if group:
        yield group


def _encode_pictures(
    pictures: list[Tensor | InputError | None], tokenizer: VisionTokenizer, batch_tokens: int, device: torch.device
) -> list[NDArray[np.int32] | None]:
    """Codes [h, w] of each picture, None where there is none. Pictures of one size are encoded together."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, pixels in enumerate(pictures):
        if isinstance(pixels, Tensor):
            by_size.setdefault((pixels.shape[-2], pixels.shape[-1]), []).append(index)
    codes: list[NDArray[np.int32] | None] = [None] * len(pictures)
    factor = tokenizer.config.spatial_factor
    for (height, width), indices in by_size.items():
        at_once = max(1, batch_tokens // (height // factor * (width // factor)))
        for first in range(0, len(indices), at_once):
            chosen = indices[first : first + at_once]
            pixels = torch.cat([pictures[index].transpose(0, 1) for index in chosen])  # type: ignore[union-attr]  # [B, 3, H, W]
            for index, grid in zip(chosen, tokenizer.encode_image(pixels.to(device)).cpu().numpy(), strict=True):
                codes[index] = grid.astype(np.int32)
    return codes


def encode_clips(item: Item, tokenizer: VisionTokenizer, config: EncodeConfig) -> Iterator[Video]:
    """The clips of a video, `clip_stride` frames apart: as much of a video as is shorter than one, else whole ones alone.

    Raises InputError for a video that cannot be read; what came before the damage has been given by then.
    """
    assert item.media is not None
    device, factor = next(tokenizer.parameters()).device, tokenizer.config.spatial_factor
    rate = item.fps if item.fps is not None else config.fps
    fps = rate if rate is not None else probe_video(item.media).fps
    frames = _FrameWindow(_fit(chunk, config.resolution, factor) for chunk in stream_video(item.media, rate, CHUNK_FRAMES))
    length, stride = config.clip_frames, config.clip_stride
    start = 0
    while frames.reach(start + 1):
        # Frames that the next clip shares are in memory anyway, and show whether this one will be whole before it is encoded.
        if start and length is not None and stride < length and not frames.reach(start + length):
            return
        chunks = frames.stream(start, None if length is None else start + length, start + stride)
        codes = torch.cat(list(tokenizer.encode_stream(chunk.unsqueeze(0).to(device) for chunk in chunks)), dim=1)
        num_frames = frames.position - start
        if start and num_frames != length:
            return
        yield Video(codes[0].cpu().numpy().astype(np.int32), fps, num_frames)
        if length is None:
            return
        start += stride
        frames.forget(start)


class _FrameWindow:
    """The frames of a video, by their numbers, read when they are asked for and held until they are forgotten."""

    def __init__(self, chunks: Iterator[Tensor]) -> None:
        self.chunks = chunks
        self.position = 0  # frame after the last one that `stream` gave
        self.first = 0  # held[0]
        self.wanted = 0  # what comes before is forgotten as soon as it is read
        self.held: deque[Tensor] = deque()  # [3, H, W] each

    def reach(self, stop: int) -> bool:
        """Reads on until the frame before `stop` is there; whether it is."""
        while self.first + len(self.held) < stop:
            chunk = next(self.chunks, None)
            if chunk is None:
                return False
            self.held.extend(frame.clone() for frame in chunk.unbind(1))  # a view would keep the whole chunk alive
            self.forget(self.wanted)
        return True

    def stream(self, start: int, stop: int | None, keep_from: int) -> Iterator[Tensor]:
        """Chunks [3, up to CHUNK_FRAMES, H, W] from `start` up to `stop` or the video's end; frames before `keep_from` are forgotten."""
        self.position = start
        while stop is None or self.position < stop:
            end = self.position + CHUNK_FRAMES if stop is None else min(self.position + CHUNK_FRAMES, stop)
            self.reach(end)
            chunk = list(itertools.islice(self.held, self.position - self.first, end - self.first))
            if not chunk:
                return
            self.position += len(chunk)
            self.forget(self.position if stop is None else min(self.position, keep_from))
            yield torch.stack(chunk, dim=1)

    def forget(self, before: int) -> None:
        self.wanted = max(self.wanted, before)
        while self.held and self.first < self.wanted:
            self.held.popleft()
            self.first += 1


def _fit(pixels: Tensor, resolution: int | None, factor: int) -> Tensor:
    if resolution is None:
        _check_sides(pixels, factor)
        return pixels
    size = fit_size(pixels.shape[-2], pixels.shape[-1], resolution**2, resolution**2, factor)
    return pixels if size == tuple(pixels.shape[-2:]) else resize(pixels, size)


def read_clip(sample: Sample) -> tuple[Tensor, float]:
    """All frames of a video sample, [3, T, H, W] in [-1, 1], and their rate: that of the attribute "fps" if it has one.

    A file may store equal neighbours as one long frame; at the rate that curation gave the clip they come apart again.
    """
    rate = _read_rate(sample)
    try:
        return read_video(sample.media, fps=rate)
    except ValueError as error:
        raise InputError(f"video sample {sample.id!r} of rate {sample.attributes.get('fps')} cannot be read: {error}") from error


def _read_rate(sample: Sample) -> float | None:
    rate = sample.attributes.get("fps")
    try:
        return None if rate is None else float(rate)
    except ValueError as error:
        raise InputError(f"video sample {sample.id!r} of rate {rate} cannot be read: {error}") from error


def write_text(item: Item, form: SequenceFormat) -> EncodedDocument:
    """The document of a text alone. Raises InputError for one that is empty or no valid Unicode."""
    text = next(iter(item.captions.values()), "")
    return EncodedDocument("text", item.id, item.split, form.encode(Document((Text(text, target=True),))), item.dataset)


def write_both_orders(item: Item, part: Image | Video, form: SequenceFormat, config: EncodeConfig) -> Iterator[EncodedDocument]:
    """The documents of one medium: for each caption the orders that the lottery gives it. Raises InputError if there is no caption."""
    captions = [(name, item.captions[name]) for name in (*config.languages, ANY_LANGUAGE) if item.captions.get(name)]
    if not captions:
        found = ", ".join(sorted(name for name, text in item.captions.items() if text)) or "none"
        raise InputError(f"it has no caption in {' or '.join(config.languages)}; the languages of its captions: {found}")
    first, second = ("draw", "describe") if isinstance(part, Image) else ("film", "describe_video")
    for language, caption in captions:
        drawn = draw_lot(config.seed, item.dataset, item.id, language)
        if drawn < config.generation_share:
            encoded = form.encode(Document((Text(caption), part)))
            yield EncodedDocument(first, item.id, item.split, encoded, item.dataset, (part.grid,))
        if drawn >= 1 - config.understanding_share:
            encoded = form.encode(Document((part, Text(caption, target=True))))
            yield EncodedDocument(second, item.id, item.split, encoded, item.dataset, (part.grid,))


def draw_lot(*key: object) -> float:
    """In [0, 1), from the key alone."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
