"""One picture, looked at in the guarded child process: is it sound, how large, which colours, and what it resembles.

In: where an item lies. Out: its measures, a thumbnail for the report, and, where CLIP models come after, a copy small enough for them. The
surprising thing: nothing is decided here. What cannot be decoded has a `reason`; all else is a number for the thresholds to judge later.
"""

from __future__ import annotations

import hashlib
import io
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from openemu3.curation.guard import Alive
from openemu3.curation.sources import Item, read_item
from openemu3.curation.text import TEXT_SIDE, TextDetector
from openemu3.media import MAX_FRAME_PIXELS, detect_kind, open_image
from openemu3.records import InputError

# Colours and the perceptual hash are of a copy of this size: averages of colours and low frequencies need no more.
_COPY_SIDE = 128
_HASH_SIDE = 8


def inspect_image(arguments: dict[str, Any], payload: bytes, alive: Alive) -> tuple[dict[str, Any], list[bytes]]:
    """Reads, decodes and measures one picture. Called by `guard.Guard`.

    arguments  item: fields of `Item`; max_bytes; working_side and thumbnail_side: longest sides of the copies in pixels; text: whether to
               look for it; keep_pixels: whether the working copy is wanted, for models that come later.
    Answers with {"rows": [...]}, one row: {"reason", "detail"} if it is refused, else its measures, with the lengths of the two parts of
    the payload: the working copy (uint8 RGB, pixels_height x pixels_width) and the thumbnail (WebP).
    """
    row, pixels, thumbnail = _inspect(arguments)
    return {"rows": [row | {"pixels_length": len(pixels), "thumbnail_length": len(thumbnail)}]}, [pixels, thumbnail]


def load_detector() -> None:
    """What the child does before its first picture, so that loading the text detector's weights is not counted as a picture's time."""
    get_detector()


@lru_cache(maxsize=1)
def get_detector() -> TextDetector:
    return TextDetector()


def _inspect(arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes, bytes]:
    began = time.perf_counter()
    try:
        data = read_item(Item(**arguments["item"]), arguments["max_bytes"])
    except InputError as error:
        return {"reason": "too large" if "too large" in str(error) else "missing", "detail": str(error)}, b"", b""
    after_read = time.perf_counter()
    measures: dict[str, Any] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "seconds_read": after_read - began}
    if not data:
        return measures | {"reason": "empty", "detail": "it has 0 bytes"}, b"", b""
    # No step needs more pixels than that, and JPEG can be decoded at a half, a quarter or an eighth of its size.
    side = max(
        arguments["working_side"] if arguments["keep_pixels"] else 0,
        TEXT_SIDE if arguments["text"] else 0,
        2 * max(_COPY_SIDE, arguments["thumbnail_side"]),
    )
    try:
        opened = open_reduced(data, side)
    except InputError as error:
        too_large = "too large" in str(error)
        return measures | {"reason": "too large" if too_large else "unreadable", "detail": str(error)}, b"", b""
    if opened is None:
        return measures | {"reason": "moving", "detail": "it is animated or a film; emu3 curate videos takes those"}, b"", b""
    picture, (width, height) = opened
    measures |= {"width": width, "height": height, "seconds_decode": time.perf_counter() - after_read}
    if arguments["text"]:
        before_text = time.perf_counter()
        copy = picture.copy()
        copy.thumbnail((TEXT_SIDE, TEXT_SIDE), Image.Resampling.BOX, reducing_gap=None)
        measures["text_coverage"] = get_detector().measure(np.asarray(copy)).coverage
        measures["seconds_text"] = time.perf_counter() - before_text
    before_measure = time.perf_counter()
    pixels = b""
    if arguments["keep_pixels"]:
        picture.thumbnail((arguments["working_side"],) * 2, Image.Resampling.BOX, reducing_gap=None)
        pixels = picture.tobytes()
        measures |= {"num_pictures": 1, "pixels_height": picture.height, "pixels_width": picture.width}
    thumbnail = encode_thumbnail(picture, arguments["thumbnail_side"])
    picture.thumbnail((_COPY_SIDE, _COPY_SIDE), Image.Resampling.BOX)
    measures |= measure_colours(np.asarray(picture)) | {"hash": f"{hash_picture(picture):016x}"}
    measures["seconds_measure"] = time.perf_counter() - before_measure
    return measures, pixels, thumbnail


def open_reduced(data: bytes, side: int) -> tuple[Image.Image, tuple[int, int]] | None:
    """A picture, upright, RGB, with the longer side of at most `side` pixels, and its own width and height; None for what moves.

    All of the file is decoded. Raises InputError as `media.open_image` does.
    """
    opened = _open_reduced_jpeg(data, side)
    if opened is None:
        if _moves(data):
            return None
        whole = open_image(data)
        opened = whole, whole.size
    picture, size = opened
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return picture, size


def _open_reduced_jpeg(data: bytes, side: int) -> tuple[Image.Image, tuple[int, int]] | None:
    """A JPEG, upright, at the smallest size it can be decoded at with the longer side of at least `side` pixels, and its width and height.

    None for other files, and for what is wrong in any way, of which `media.open_image` will say what. All of the file is read, as at full
    size, so that damage is found all the same.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    with suppress(Exception):  # damaged data makes PIL raise about anything
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            width, height = image.size
            if image.mode not in ("RGB", "L", "CMYK") or not 0 < width * height <= MAX_FRAME_PIXELS:
                return None
            scale = max(width, height) / side
            if scale > 1:  # the same share of both sides; draft() takes the smallest size that is not below
                image.draft(None, (max(1, int(width / scale)), max(1, int(height / scale))))
            image.load()
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            picture = ImageOps.exif_transpose(image).convert("RGB")
        return picture, (height, width) if lies else (width, height)
    return None


def _moves(data: bytes) -> bool:
    """Whether this is a film or an animation; False for what is neither, of which the picture's decoder will say what is wrong."""
    try:
        return detect_kind(data) == "video"
    except InputError:
        return False


def measure_colours(picture: NDArray[np.uint8]) -> dict[str, float]:
    """uint8 [H, W, 3] -> what its colours are like, in 8-bit levels.

    colour_spread  standard deviation of the colours away from their main axis: 0 for grey, for sepia and for one flat colour, since in each
                   of these all colours lie on one line; a colour photograph has 10 to 40.
    contrast       standard deviation of the brightness (BT.601): 0 for a flat picture.
    """
    colours = picture.reshape(-1, 3).astype(np.float64)
    variances = np.linalg.eigvalsh(np.cov(colours, rowvar=False, bias=True))  # ascending
    contrast = (colours @ np.array([0.299, 0.587, 0.114])).std()
    return {"colour_spread": float(np.sqrt(max(variances[0] + variances[1], 0.0))), "contrast": float(contrast)}


def hash_picture(picture: Image.Image) -> int:
    """The 64-bit perceptual hash, in which like pictures differ in few bits: 52 bits of shape, 12 of colour.

    Shape is the usual one, the signs of the low frequencies of brightness. It alone calls hearts of two colours the same picture, so the 12
    highest of its 64 frequencies make room for the mean colour: two thermometers of six marks, 12 levels apart, so that a slight change of
    colour moves one bit and another colour several.
    """
    import imagehash

    bits = imagehash.phash(picture, hash_size=_HASH_SIDE).hash
    shape = [bits[row, column] for row, column in _FREQUENCIES]
    means = np.asarray(picture.resize((16, 16), Image.Resampling.BOX).convert("YCbCr"), np.float64)[..., 1:].mean(axis=(0, 1)) - 128
    colour = [bool(mean > mark) for mean in means for mark in range(-30, 31, 12)]
    return int.from_bytes(np.packbits(np.array(shape + colour)).tobytes(), "big")


# (row, column) of the 52 lowest frequencies, from low to high.
_FREQUENCIES = sorted(((row, column) for row in range(_HASH_SIDE) for column in range(_HASH_SIDE)), key=sum)[: 64 - 12]


def encode_thumbnail(picture: Image.Image, side: int) -> bytes:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=70, method=2)
    return buffer.getvalue()
