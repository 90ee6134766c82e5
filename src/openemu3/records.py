"""The nouns that flow between rooms: one curated sample, and one document of text, images and videos.

In: plain values. Out: frozen records that are valid once they exist, because construction checks them and raises InputError.
The surprising thing: construction also normalises. Text becomes NFC, as Qwen's tokenizer would make it, and a frame rate is kept to
a thousandth (24000/1001 becomes 23.976), so that what a document says and what its token sequence says are the same.

Shapes: h, w = token grid (pixels / 8), t = latent frames (4 pixel frames each).
"""

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_LATENT = 4
MAX_FPS = 999.999


class InputError(ValueError):
    """Something given from outside is not acceptable. The message is one sentence: the thing, its value, what is allowed."""


@dataclass(frozen=True)
class Text:
    """A run of text. `target` marks what a model is to answer (supervised), as opposed to what it is told.

    Args:
        text: not empty, without lone surrogates; kept NFC-normalised.
        target: True for an answer, False for context.
    """

    text: str
    target: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"text is {type(self.text).__name__}; it must be a str")
        if not self.text:
            raise InputError("text is empty; leave the part out instead")
        check_unicode(self.text)
        object.__setattr__(self, "text", unicodedata.normalize("NFC", self.text))


@dataclass(frozen=True, eq=False)
class Image:
    """A still image as vision-tokenizer codes: int32 [h, w], every code >= 0. Any integer array is accepted and converted."""

    codes: NDArray[np.int32]

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", _as_codes(self.codes, "image", ("h", "w")))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in token units."""
        height, width = self.codes.shape
        return height, width

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and np.array_equal(self.codes, other.codes)

    __hash__ = None  # type: ignore[assignment]  # equality is by array value


@dataclass(frozen=True, eq=False, init=False)
class Video:
    """A video as vision-tokenizer codes.

    Args:
        codes: int32 [t, h, w], every code >= 0; any integer array is accepted and converted.
        fps: pixel frames per second, 0.001 ... 999.999, kept to a thousandth.
        num_frames: pixel frames the codes stand for, 4 (t - 1) < num_frames <= 4 t; default 4 t. It is smaller than 4 t where the
            last group of four was filled up by the tokenizer.
    """

    codes: NDArray[np.int32]
    fps: float
    num_frames: int

    def __init__(self, codes: NDArray[Any], fps: float, num_frames: int | None = None) -> None:
        converted = _as_codes(codes, "video", ("t", "h", "w"))
        most = FRAMES_PER_LATENT * len(converted)
        least = most - FRAMES_PER_LATENT + 1
        count = most if num_frames is None else num_frames
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or not least <= count <= most:
            raise InputError(f"num_frames is {count!r}; a video of {len(converted)} latent frames has {least} to {most} pixel frames")
        object.__setattr__(self, "codes", converted)
        object.__setattr__(self, "fps", round_fps(fps))
        object.__setattr__(self, "num_frames", int(count))

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) in token units."""
        frames, height, width = self.codes.shape
        return frames, height, width

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Video)
            and (self.fps, self.num_frames) == (other.fps, other.num_frames)
            and np.array_equal(self.codes, other.codes)
        )

    __hash__ = None  # type: ignore[assignment]  # equality is by array value


@dataclass(frozen=True)
class Document:
    """One multimodal sequence: at least one part; neighbouring texts must differ in `target` (merge them otherwise)."""

    parts: tuple[Text | Image | Video, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InputError("document has no parts; it needs at least one Text, Image or Video")
        for index, part in enumerate(self.parts):
            if not isinstance(part, Text | Image | Video):
                raise InputError(f"document part {index} is {type(part).__name__}; it must be a Text, Image or Video")
        for index, (one, next_one) in enumerate(zip(self.parts, self.parts[1:], strict=False)):
            if isinstance(one, Text) and isinstance(next_one, Text) and one.target == next_one.target:
                raise InputError(f"document parts {index} and {index + 1} are both texts with target={one.target}; merge them into one")


@dataclass(frozen=True)
class Sample:
    """One curated media item with its captions; a row of the samples' Parquet files, one column per field.

    Args:
        id: unique in its data set, not empty.
        kind: "image" or "video".
        media: the encoded file (WebP, PNG, MP4, ...), not empty.
        captions: language code ("en", "zh", ...) -> caption.
        attributes: what curation knows about the item, name -> value.
        split: which part of the data set it belongs to, such as "train" or "validation"; not empty.
        scores: what curation measured, name -> finite number: "aesthetic", "text_coverage", ...
    """

    id: str
    kind: Literal["image", "video"]
    media: bytes
    captions: Mapping[str, str]
    attributes: Mapping[str, str]
    split: str
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise InputError("sample id is empty; every sample needs one")
        if self.kind not in ("image", "video"):
            raise InputError(f"sample {self.id!r} has kind {self.kind!r}; allowed are 'image' and 'video'")
        if not self.media:
            raise InputError(f"sample {self.id!r} has no media bytes; it needs an encoded {self.kind}")
        if not self.split:
            raise InputError(f"sample {self.id!r} has an empty split; name one, such as 'train'")
        for name in ("captions", "attributes"):
            for key, value in getattr(self, name).items():
                if not isinstance(key, str) or not isinstance(value, str):
                    raise InputError(f"sample {self.id!r} has {name} entry {key!r}: {value!r}; keys and values must be str")
        for key, number in self.scores.items():
            if not isinstance(key, str) or not isinstance(number, int | float) or not math.isfinite(number):
                raise InputError(f"sample {self.id!r} has the score {key!r}: {number!r}; names must be str and scores finite numbers")


def check_unicode(text: str) -> None:
    """Raises InputError for a str that no UTF-8 can hold, as JSON with half a surrogate pair makes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}; only valid Unicode is allowed"
        ) from error


def round_fps(fps: float) -> float:
    """The frame rate as documents keep it: to a thousandth. Raises InputError outside 0.001 ... 999.999."""
    rounded = round(float(fps), 3) if math.isfinite(fps) else math.nan
    if not 0.001 <= rounded <= MAX_FPS:
        raise InputError(f"fps is {fps!r}; allowed is 0.001 to {MAX_FPS}")
    return rounded


def _as_codes(array: NDArray[Any], what: str, axes: tuple[str, ...]) -> NDArray[np.int32]:
    array = np.asarray(array)
    shape = f"[{', '.join(axes)}]"
    if array.ndim != len(axes) or array.size == 0:
        raise InputError(f"{what} codes have shape {list(array.shape)}; they must be {shape} with no empty axis")
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{what} codes are {array.dtype}; they must be integers")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        bad = array.min() if array.min() < 0 else array.max()
        raise InputError(f"{what} codes hold {bad}; they must be from 0 up to the codebook's last entry")
    return np.ascontiguousarray(array, dtype=np.int32)
