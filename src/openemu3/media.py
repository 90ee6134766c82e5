"""Picture and video files <-> pixels. In: paths or bytes that anyone may have made. Out: float32 tensors [3, T, H, W] in [-1, 1].

A picture is a clip with T == 1. Files come from strangers: sizes are checked from the header before anything is decoded, only plain
media containers are opened (a playlist could name other files or addresses), and whatever a decoder makes of damaged data surfaces as
one `InputError`. Videos are decoded as a stream: memory is one chunk of frames, whatever the length. Files are written aside and moved
into place, so that a reader never sees half of one.

Shapes: C = 3 colours (red, green, blue), T frames, H rows, W columns. All of it goes through 8 bits per colour, as published.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal

import av
import av.container
import numpy as np
import torch
from av.video.reformatter import Interpolation
from PIL import ExifTags, Image

from openemu3.records import InputError

Source = str | os.PathLike[str] | bytes

# Largest picture or video frame that is decoded. 64 million pixels are 192 MB at 8 bits and 768 MB as float32.
MAX_FRAME_PIXELS = 64_000_000
# Largest clip that `read_video` returns in one tensor, frames x height x width: 6 GiB of float32. Longer ones: `stream_video`.
MAX_CLIP_PIXELS = 2**29
# Longest time that one frame may stand. Damaged timestamps would otherwise ask for millions of repeated frames.
MAX_FRAME_SECONDS = 600
MAX_FPS = 999
MAX_ASPECT = 5

# What `write_image` and `Film.save` take.
IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ANIMATION_SUFFIXES = {".gif": "GIF", ".webp": "WEBP"}
VIDEO_SUFFIXES = {".mp4": "MP4"}

# Formats that hold pictures and nothing else: no PostScript, no layered documents, no old formats with unmaintained decoders.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_ANIMATION_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
# FFmpeg demuxers that read the one file they are given. Playlists and concatenation scripts (hls, dash, concat) stay out.
_VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf,h264,hevc,m4v,ivf,mjpeg,nut,yuv4mpegpipe"
# EXIF orientation -> what makes the picture upright (Exif 2.32, tag 0x0112; 1 is upright already).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says: size as displayed (rows, columns), average frames per second, seconds (None if not stated)."""

    height: int
    width: int
    fps: float
    seconds: float | None


# --------------------------------------------------------------------------------------------------------------------------------- pictures


def read_image(source: Source) -> torch.Tensor:
    """Read a picture file: upright, on white where it was transparent, the first frame if it is animated.

    Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; colour profiles are not applied.
    Returns pixels [3, 1, H, W]. Raises InputError for a file that is not there, not a picture, damaged, or larger than MAX_FRAME_PIXELS.
    """
    return from_pil(open_image(source))


def preprocess_image(
    source: Source | Image.Image, min_pixels: int = 512 * 512, max_pixels: int = 1024 * 1024, factor: int = 8
) -> torch.Tensor:
    """Make a picture ready for the vision tokenizer exactly as published: `fit_size`, bicubic on 8 bits, then scaled to [-1, 1].

    Returns pixels [3, 1, H, W] with H and W multiples of `factor`. Raises InputError as `read_image` and `fit_size` do.
    Source: the preprocessing of the published vision tokenizer (resample 3, mean 0.5, std 0.5).
    """
    picture = _convert_to_rgb(source, "the picture") if isinstance(source, Image.Image) else open_image(source)
    height, width = fit_size(picture.height, picture.width, min_pixels, max_pixels, factor)
    return from_pil(picture.resize((width, height), Image.Resampling.BICUBIC))


def open_image(source: Source) -> Image.Image:
    """`read_image`, as a PIL picture of mode RGB."""
    name = _describe_source(source, "picture")
    with _open_source(source, name) as file, _damage_is_input_error(name, "picture"):
        with Image.open(file, formats=_PICTURE_FORMATS) as image:
            _check_frame_size(name, image.height, image.width)
            image.load()
            # Read after load(): the TIFF and AVIF decoders turn the picture upright themselves and then clear the tag.
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            picture = _convert_to_rgb(image, name)
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def fit_size(height: int, width: int, min_pixels: int = 512 * 512, max_pixels: int = 1024 * 1024, factor: int = 8) -> tuple[int, int]:
    """Height and width, multiples of `factor`, near the given ones with an area between `min_pixels` and `max_pixels`.

    Raises InputError if a side is shorter than `factor`, if one side is more than 5 times the other, or if no such size is left.
    Source: smart_resize of the published vision tokenizer.
    """
    if min(height, width) < factor:
        raise InputError(f"a picture of {width}x{height} pixels is too small: each side must have at least {factor}")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"a picture of {width}x{height} pixels is too long: one side may be at most {MAX_ASPECT} times the other")
    if not 0 < min_pixels <= max_pixels:
        raise InputError(f"min_pixels is {min_pixels} and max_pixels {max_pixels}: allowed is 0 < min_pixels <= max_pixels")
    fitted_height, fitted_width = round(height / factor) * factor, round(width / factor) * factor
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height, fitted_width = (math.floor(side / shrink / factor) * factor for side in (height, width))
    elif fitted_height * fitted_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted_height, fitted_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    if min(fitted_height, fitted_width) == 0:
        raise InputError(f"a picture of {width}x{height} pixels does not fit into max_pixels={max_pixels} with sides in steps of {factor}")
    return fitted_height, fitted_width


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic with antialiasing, [..., H, W] -> [..., size[0], size[1]], clipped to [-1, 1].

    Equal to PIL's BICUBIC on float pictures (mode "F"), so without the rounding to 8 bits that `preprocess_image` makes.
    """
    if min(size) < 1:
        raise InputError(f"cannot resize to {size[1]}x{size[0]} pixels: each side must be at least 1")
    flat = pixels.reshape(-1, 1, *pixels.shape[-2:])
    resized = torch.nn.functional.interpolate(flat, size=size, mode="bicubic", antialias=True)
    return resized.clamp_(-1, 1).reshape(*pixels.shape[:-2], *size)


def from_pil(images: Image.Image | Iterable[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size, any mode -> pixels [3, T, H, W]."""
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures:
        raise InputError("there are no pictures to convert: at least one is needed")
    if len({picture.size for picture in pictures}) > 1:
        raise InputError(f"frames have different sizes {sorted({picture.size for picture in pictures})}: all must be of one size")
    return _to_pixels([np.array(_convert_to_rgb(picture, "the picture")) for picture in pictures])


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels [3, T, H, W] or [3, H, W], clipped to [-1, 1] and rounded to 8 bits -> one RGB picture per frame."""
    return [Image.fromarray(frame) for frame in _to_frames(pixels)]


# ----------------------------------------------------------------------------------------------------------------------------------- videos


def detect_kind(source: Source) -> Literal["image", "video"]:
    """Whether the file is a still picture or moves (a video, an animated GIF, WebP, PNG or AVIF). Raises InputError if it is neither."""
    name = _describe_source(source, "file")
    with _open_source(source, name) as file:
        animated = _is_animated(file, name)
    if animated is None:
        if not isinstance(source, bytes) and Path(source).suffix.lower() in IMAGE_SUFFIXES | ANIMATION_SUFFIXES:
            raise InputError(f"{name} is not a picture that can be read, though its name says so")
        probe_video(source)
        return "video"
    return "video" if animated else "image"


def probe_video(source: Source) -> VideoInfo:
    """Read the size, rate and length of a video or animation. Raises InputError as `stream_video` does."""
    name = _describe_source(source, "video")
    with _open_source(source, name) as file:
        if _check_is_animated(file, name):
            with _damage_is_input_error(name, "video"), Image.open(file, formats=_ANIMATION_FORMATS) as image:
                _check_frame_size(name, image.height, image.width)
                seconds = []
                for index in range(getattr(image, "n_frames", 1)):
                    image.seek(index)
                    image.load()  # WebP knows a frame's duration only once it is decoded
                    seconds.append(_read_frame_seconds(image))
                return VideoInfo(image.height, image.width, float(len(seconds) / sum(seconds)), float(sum(seconds)))
        with _damage_is_input_error(name, "video"), _open_container(file, name) as container:
            stream = container.streams.video[0]
            first = next(container.decode(stream), None)
            if first is None:
                raise InputError(f"{name} has no frames: at least one is needed")
            height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
            # Two ways to state a length: the stream's, in its own ticks, and the container's, in microseconds.
            duration = None
            if stream.duration is not None and stream.time_base is not None:
                duration = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                duration = container.duration / 1e6
            return VideoInfo(height, width, float(_get_rate(stream, name)), duration)


@contextmanager
def open_video(source: Source) -> Iterator[av.container.InputContainer]:
    """A video file's container, for who wants its packets, of the allowed formats alone; its first video stream is the one that counts.

    Raises InputError as `stream_video` does, also for damage that FFmpeg finds while the packets are read.
    """
    name = _describe_source(source, "video")
    with _open_source(source, name) as file, _open_container(file, name) as container:
        try:
            yield container
        except av.error.FFmpegError as error:
            raise InputError(f"{name} is not a video that can be read, or is damaged: {_summarize(error)}") from error


def read_video(source: Source, fps: float | None = None, max_frames: int | None = None, start: float = 0.0) -> tuple[torch.Tensor, float]:
    """Read a clip at once: pixels [3, T, H, W] and its frames per second. See `stream_video` for the arguments and errors.

    Raises InputError also if the clip has more than MAX_CLIP_PIXELS.
    """
    rate = fps if fps is not None else probe_video(source).fps
    chunks, total = [], 0
    for chunk in stream_video(source, fps=fps, max_frames=max_frames, start=start):
        chunks.append(chunk)
        total += chunk[0].numel()
        if total > MAX_CLIP_PIXELS:
            raise InputError(
                f"{_describe_source(source, 'video')} is too long to read at once: {total} pixels and more, at most {MAX_CLIP_PIXELS} are "
                "allowed; ask for fewer with max_frames, or read it in chunks with stream_video"
            )
    return torch.cat(chunks, dim=1), rate


def stream_video(
    source: Source, fps: float | None = None, chunk_frames: int = 16, max_frames: int | None = None, start: float = 0.0
) -> Iterator[torch.Tensor]:
    """Decode a video or animation chunk by chunk; memory does not grow with its length.

    fps         frames per second to resample to, by timestamps: output frame k is the one on screen at start + k / fps, so variable rates
                become even. None: every stored frame as it is, none left out or repeated.
    chunk_frames frames in a chunk; the last chunk may have fewer.
    max_frames  stop after so many frames.
    start       seconds from the first frame.
    Yields pixels [3, <= chunk_frames, H, W], all chunks with the same H and W. Rotation stored in the file is applied; pixels are taken
    as square. Raises InputError for a file that is missing, no video, without frames or so damaged that the decoder gives up, for a start
    past the end, and for frames that are too large, change size or stand for longer than MAX_FRAME_SECONDS.
    """
    if chunk_frames < 1:
        raise InputError(f"chunk_frames is {chunk_frames}: it must be at least 1")
    frames: list[np.ndarray] = []
    for frame in stream_frames(source, fps=fps, max_frames=max_frames, start=start):
        frames.append(frame.array)
        if len(frames) == chunk_frames:
            yield _to_pixels(frames)
            frames = []
    if frames:
        yield _to_pixels(frames)


def stream_frames(
    source: Source, fps: float | None = None, max_frames: int | None = None, start: float = 0.0, short_edge: int | None = None
) -> Iterator[TimedFrame]:
    """`stream_video` frame by frame in 8 bits, each with its time; arguments and errors are the same.

    short_edge  shrink frames, as they are decoded, so that their shorter side has so many pixels; smaller frames stay as they are.
    """
    name = _describe_source(source, "video")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise InputError(f"fps is {fps}: allowed is more than 0 and at most {MAX_FPS} frames per second")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}: it must be at least 1")
    if not 0 <= start < math.inf:
        raise InputError(f"start is {start}: allowed are 0 or more seconds")
    if short_edge is not None and short_edge < 1:
        raise InputError(f"short_edge is {short_edge}: it must be at least 1 pixel")
    with _open_source(source, name) as file, _damage_is_input_error(name, "video"):
        decode = _decode_animation if _check_is_animated(file, name) else _decode_container
        first: TimedFrame | None = None
        for number, frame in enumerate(_select_frames(decode(file, name, start, short_edge), name, fps, start), 1):
            first = first or frame
            if frame.array.shape != first.array.shape:
                raise InputError(
                    f"the frames of {name} change size from {first.array.shape[:2]} to {frame.array.shape[:2]}: all must be of one size"
                )
            yield frame
            if number == max_frames:
                return
        if first is None:
            raise InputError(f"{name} has no frame at {start} s or later" if start else f"{name} has no frames: at least one is needed")


@dataclass(frozen=True)
class TimedFrame:
    """A frame uint8 [H, W, 3], and in seconds: from the first frame to when it appears, how long it stands, and how precise that is."""

    array: np.ndarray
    time: Fraction
    duration: Fraction
    tick: Fraction


def _select_frames(frames: Iterator[TimedFrame], name: str, fps: float | None, start: float) -> Iterator[TimedFrame]:
    """The frames to show: all from `start` on, or those on screen at start + k / fps, with these times."""
    begin = Fraction(start).limit_denominator(1_000_000)
    if fps is None:
        yield from (frame for frame in frames if frame.time + frame.duration > begin + frame.tick)
        return
    step = 1 / Fraction(fps).limit_denominator(100_000)
    next_time, shown = begin, None
    for frame in frames:
        if shown is not None:
            if frame.time - shown.time > MAX_FRAME_SECONDS:
                raise InputError(
                    f"the timestamps of {name} jump from {float(shown.time):.2f} s to {float(frame.time):.2f} s: "
                    f"a frame may stand for at most {MAX_FRAME_SECONDS} s"
                )
            # A frame counts as there one tick before its stated time, or rounding would show its predecessor twice.
            while next_time + frame.tick < frame.time:
                yield replace(shown, time=next_time, duration=step)
                next_time += step
        shown = frame
    if shown is not None:
        end = shown.time + min(shown.duration, Fraction(MAX_FRAME_SECONDS))
        while next_time + shown.tick < end:
            yield replace(shown, time=next_time, duration=step)
            next_time += step


def _decode_container(file: IO[bytes], name: str, start: float, short_edge: int | None) -> Iterator[TimedFrame]:
    """Frames of a video file from the key frame before `start` on."""
    seekable = start > 0 and _lands_before(file, name, start)
    file.seek(0)
    with _open_container(file, name) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, clock = _get_rate(stream, name), stream.time_base or Fraction(1, 1000)
        origin = (stream.start_time or 0) * clock
        timed = _has_times(container)
        # Milliseconds even where the clock is finer: many files passed through Matroska. Less than a frame even where it is coarser.
        tick = min(max(clock, Fraction(1, 1000)), 1 / rate / 4)
        if seekable:
            container.seek(int((origin + Fraction(start)) / clock), stream=stream, backward=True)
        time = Fraction(0)
        for index, frame in enumerate(container.decode(stream)):
            _check_frame_size(name, frame.height, frame.width)
            # Streams without timestamps run at the stated rate. Time never runs backwards, whatever the file says.
            stated = index / rate if frame.pts is None or not timed else frame.pts * clock - origin
            time = max(time, stated)
            duration = frame.duration * clock if frame.duration else 1 / rate
            height, width = _shrink_to(short_edge, frame.height, frame.width)
            # At full size FFmpeg's own choice stands: the flag would also change how colours at half resolution are enlarged.
            method = Interpolation.AREA if (height, width) != (frame.height, frame.width) else None
            array = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=method)  # [H, W, 3]
            # FFmpeg gives the angle that turns the stored frame upright, counter-clockwise in degrees, as np.rot90 takes it in quarters.
            turned = np.rot90(array, round(frame.rotation / 90))
            yield TimedFrame(turned, time, duration, tick)


def _has_times(container: av.container.InputContainer) -> bool:
    """AVI has a rate only: what FFmpeg states as a frame's time there is wrong where frames are stored out of order."""
    return container.format.name != "avi"


def _lands_before(file: IO[bytes], name: str, start: float) -> bool:
    """Whether seeking to `start` finds a frame at or before it. Not so for files without timestamps, or with a missing or wrong index."""
    try:
        with _open_container(file, name) as container:
            stream = container.streams.video[0]
            clock = stream.time_base or Fraction(1, 1000)
            target = (stream.start_time or 0) * clock + Fraction(start)
            container.seek(int(target / clock), stream=stream, backward=True)
            landed = next(container.decode(stream), None)
            return _has_times(container) and landed is not None and landed.pts is not None and landed.pts * clock <= target
    except av.error.FFmpegError:
        return False


def _decode_animation(file: IO[bytes], name: str, start: float, short_edge: int | None) -> Iterator[TimedFrame]:
    """Frames of an animated picture, each composed from the ones before it, on white."""
    with Image.open(file, formats=_ANIMATION_FORMATS) as image:
        _check_frame_size(name, image.height, image.width)
        time, tick = Fraction(0), Fraction(1, 100 if image.format == "GIF" else 1000)
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            duration = _read_frame_seconds(image)
            picture = _convert_to_rgb(image, name)
            height, width = _shrink_to(short_edge, picture.height, picture.width)
            if (width, height) != picture.size:
                picture = picture.resize((width, height), Image.Resampling.BOX)
            yield TimedFrame(np.array(picture), time, duration, tick)
            time += duration


def _shrink_to(short_edge: int | None, height: int, width: int) -> tuple[int, int]:
    """Height and width with the shorter side of at most `short_edge` pixels."""
    if short_edge is None or min(height, width) <= short_edge:
        return height, width
    scale = short_edge / min(height, width)
    return round(height * scale), round(width * scale)


# ---------------------------------------------------------------------------------------------------------------------------------- writing


def write_image(path: str | os.PathLike[str], pixels: torch.Tensor) -> None:
    """Write pixels [3, 1, H, W] or [3, H, W] in [-1, 1] as .png, .jpg or .webp. InputError: another suffix. OSError: not written."""
    path, pictures = Path(path), to_pil(pixels)
    if len(pictures) != 1:
        raise InputError(f"cannot write {len(pictures)} frames to {path} as one picture: use write_animation or write_video")
    check_suffix(path, IMAGE_SUFFIXES)
    with write_aside(path) as partial:
        pictures[0].save(partial, format=IMAGE_SUFFIXES[path.suffix.lower()], quality=95)


def write_animation(path: str | os.PathLike[str], pixels: torch.Tensor, fps: float) -> None:
    """Write pixels [3, T, H, W] in [-1, 1] as an endless .gif or .webp. Raises InputError as `encode_animation` does, or OSError."""
    path = Path(path)
    check_suffix(path, ANIMATION_SUFFIXES)
    data = encode_animation(pixels, fps, "GIF" if path.suffix.lower() == ".gif" else "WEBP")
    with write_aside(path) as partial:
        partial.write_bytes(data)


def encode_animation(pixels: torch.Tensor, fps: float, format: Literal["GIF", "WEBP"]) -> bytes:
    """Pixels [3, T, H, W] in [-1, 1] -> the bytes of an endless animation.

    Raises InputError for a rate that is not allowed: GIF counts hundredths of a second, so that its limit is 50 frames per second.
    """
    limit, unit = (50, 10) if format == "GIF" else (MAX_FPS, 1)  # frames per second, milliseconds
    if not 0 < fps <= limit:
        raise InputError(f"{fps} frames per second are not possible in {format}: allowed is more than 0 and at most {limit}")
    first, *rest = to_pil(pixels)
    # Rounding each frame's end, not each frame's length, keeps the whole clip at its true length.
    ends = [round(index * 1000 / fps / unit) * unit for index in range(len(rest) + 2)]
    durations = [end - begin for begin, end in itertools.pairwise(ends)]
    buffer = io.BytesIO()
    duration = durations if rest else durations[0]
    first.save(buffer, format=format, save_all=True, append_images=rest, duration=duration, loop=0, quality=90, disposal=1)
    return buffer.getvalue()


def write_video(path: str | os.PathLike[str], pixels: torch.Tensor | Iterable[torch.Tensor], fps: float) -> None:
    """Write pixels [3, T, H, W] in [-1, 1], or chunks of them one after the other, as .mp4 (H.264, yuv420p, BT.709).

    Every browser plays that. It stores colours for two by two pixels, so an odd height or width gets one more row or column, a copy
    of the last.
    """
    path = Path(path)
    check_suffix(path, VIDEO_SUFFIXES)
    if not 0 < fps <= MAX_FPS:
        raise InputError(f"cannot write {path} at {fps} frames per second: allowed is more than 0 and at most {MAX_FPS}")
    chunks = [pixels] if isinstance(pixels, torch.Tensor) else pixels
    with write_aside(path) as partial:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = None
            for chunk in chunks:
                for array in _to_frames(chunk):
                    array = np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")
                    if stream is None:
                        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
                        stream.height, stream.width, stream.pix_fmt = array.shape[0], array.shape[1], "yuv420p"
                        # One thread and no macroblock tree: with either, x264 now and then writes other bytes for the same frames.
                        stream.options = {"crf": "18", "threads": "1", "mbtree": "0"}
                        stream.codec_context.color_range, stream.codec_context.colorspace = 1, 1
                        stream.codec_context.color_primaries, stream.codec_context.color_trc = 1, 1
                    elif array.shape[:2] != (stream.height, stream.width):
                        raise InputError(
                            f"cannot write {path}: frames of {array.shape[:2]} follow frames of {(stream.height, stream.width)}"
                        )
                    frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
                    for packet in stream.encode(frame):
                        container.mux(packet)
            if stream is None:
                raise InputError(f"cannot write {path}: there are no frames")
            for packet in stream.encode():
                container.mux(packet)


def check_suffix(path: Path, allowed: Collection[str]) -> None:
    """Raises InputError unless the name ends in one of the suffixes."""
    if path.suffix.lower() not in allowed:
        raise InputError(f"cannot write {path}: the name must end in {' or '.join(allowed)}")


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; moves it into place on success and removes it on failure. Makes the folder if need be.

    Raises OSError with one sentence, InputError if an encoder refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except InputError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; nothing was left behind") from error
    except (ValueError, av.error.FFmpegError) as error:  # the encoder refuses, for example a side that its format cannot state
        raise InputError(f"cannot write {path}: {error}; nothing was left behind") from error
    finally:
        with suppress(OSError):  # not there after success, nor where its folder could not be made
            partial.unlink()


# ----------------------------------------------------------------------------------------------------------------------------- the details


def _describe_source(source: Source, kind: str) -> str:
    """How messages name a source."""
    return f"the {kind} of {len(source)} bytes" if isinstance(source, bytes) else f"the {kind} {os.fspath(source)!r}"


@contextmanager
def _open_source(source: Source, name: str) -> Iterator[IO[bytes]]:
    """The source as a binary file. Raises InputError if it is missing, empty, not a plain file, or may not be read."""
    if isinstance(source, bytes):
        if not source:
            raise InputError(f"{name} is empty: it has 0 bytes")
        yield io.BytesIO(source)
        return
    try:
        status = os.stat(source)
        # A named pipe would block and a device never ends.
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"cannot read {name}: it is not a file")
        if status.st_size == 0:
            raise InputError(f"{name} is empty: it has 0 bytes")
        file = open(source, "rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name; InputError passes through below
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    with file:
        yield file


@contextmanager
def _damage_is_input_error(name: str, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises into InputError: on damaged data that is about any exception (SyntaxError, EOFError, ...)."""
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large: at most {MAX_FRAME_PIXELS} pixels are allowed") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name} is not a {kind} that can be read: allowed are {', '.join(_PICTURE_FORMATS)}") from error
    except Exception as error:
        raise InputError(f"{name} is not a {kind} that can be read, or is damaged: {_summarize(error)}") from error


def _summarize(error: Exception) -> str:
    """The first line of what a decoder said, without the addresses that PIL and PyAV put into their messages."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0].split(" <")[0]


def _check_frame_size(name: str, height: int, width: int) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise InputError(f"{name} is too large: {width}x{height} pixels, at most {MAX_FRAME_PIXELS} are allowed")
    if height * width == 0:
        raise InputError(f"{name} has no pixels: it says it is {width}x{height}")


def _convert_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode -> RGB of 8 bits, composited on white. 16-bit grey is scaled; 32-bit numbers only where their scale is known."""
    if image.mode == "F" or image.mode.startswith("I"):
        array, white = np.array(image).astype(np.float64), 1.0 if image.mode == "F" else 65535.0
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= white):
            raise InputError(f"{name} has values from {array.min():g} to {array.max():g}: allowed is 0 to {white:g} in mode {image.mode}")
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            array[array == transparent] = white
        return Image.fromarray(np.round(array / white * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _is_animated(file: IO[bytes], name: str) -> bool | None:
    """Whether the file is an animated picture (True), a still one (False) or no picture at all (None). Leaves the file at its beginning."""
    try:
        with _damage_is_input_error(name, "picture"), Image.open(file, formats=_PICTURE_FORMATS) as image:
            return image.format in _ANIMATION_FORMATS and bool(getattr(image, "is_animated", False))
    except InputError as error:
        if isinstance(error.__cause__, Image.UnidentifiedImageError):
            return None
        raise
    finally:
        file.seek(0)


def _check_is_animated(file: IO[bytes], name: str) -> bool:
    """Whether to decode with PIL (True) or FFmpeg (False). Raises InputError for a still picture."""
    animated = _is_animated(file, name)
    if animated is False:
        raise InputError(f"{name} is a still picture: a video or an animated picture is needed")
    return bool(animated)


def _read_frame_seconds(image: Image.Image) -> Fraction:
    """How long the current frame of an animation stands. Browsers show a frame that states 10 ms or less for 100 ms; so does this."""
    milliseconds = Fraction(image.info.get("duration", 0) or 0).limit_denominator(1000)
    return milliseconds / 1000 if milliseconds > 10 else Fraction(1, 10)


@contextmanager
def _open_container(file: IO[bytes], name: str) -> Iterator[av.container.InputContainer]:
    """A video file with at least one video stream of allowed size."""
    try:
        opened = av.open(file, "r", options={"format_whitelist": _VIDEO_FORMATS})
    except av.error.FFmpegError as error:
        raise InputError(f"{name} is not a video that can be read: {_summarize(error)}") from error
    with opened as container:
        if not container.streams.video:
            raise InputError(f"{name} has no pictures in it: a video stream is needed")
        context = container.streams.video[0].codec_context
        if context.width and context.height:
            _check_frame_size(name, context.height, context.width)
        yield container


def _get_rate(stream: Any, name: str) -> Fraction:
    """Frames per second as the file states them."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not 0 < rate <= MAX_FPS:
        raise InputError(f"{name} states a rate of {rate} frames per second: allowed is more than 0 and at most {MAX_FPS}")
    return Fraction(rate)


def _to_pixels(frames: list[np.ndarray]) -> torch.Tensor:
    """uint8 [H, W, 3] each -> float32 [3, T, H, W] in [-1, 1], with the published arithmetic: /255, -0.5, /0.5."""
    stacked = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)  # [C, T, H, W]
    return stacked.contiguous().to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def _to_frames(pixels: torch.Tensor) -> np.ndarray:
    """float [3, T, H, W] or [3, H, W] -> uint8 [T, H, W, 3], rounded (the published code truncates, which darkens by half a step)."""
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    if pixels.ndim != 4 or pixels.shape[0] != 3 or pixels.numel() == 0:
        raise InputError(f"pixels have shape {list(pixels.shape)}: allowed is [3, T, H, W] or [3, H, W], none of them 0")
    levels = pixels.detach().to("cpu", torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()
