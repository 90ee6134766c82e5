"""Spans of a video -> clips of their own: copied where that is exact, else encoded anew frame by frame.

In: a video file and the spans that `scenes` found. Out: the bytes of one small file per span, without sound. The surprising thing: that a
span starts on a key frame is not enough to copy it. Frames are stored in another order than they are shown, so a copy is exact only if
the stored frames from that key frame on are the span's and no others; where a neighbour's lie between them, the span is encoded anew.
"""

from __future__ import annotations

import io
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np

from openemu3.curation.scenes import Scene
from openemu3.media import Source, TimedFrame, detect_kind, open_video, probe_video, stream_frames
from openemu3.records import InputError

# Codecs that are copied, and the container that holds them in every player. Others are encoded anew; AV1, too, because PyAV wants an
# encoder of the decoder's name (libdav1d) to copy a stream.
_COPIED_CODECS = {"h264": "mp4", "hevc": "mp4", "vp9": "mp4", "mpeg4": "mp4", "vp8": "matroska"}
# Containers whose packets say when their frame is shown. AVI has a rate only (see media._has_times).
_UNTIMED_FORMATS = ("avi", "h264", "hevc", "mpegvideo", "m4v", "mjpeg")
# Ticks per second of the clips that are encoded here; all usual rates divide it.
_CLOCK = 90_000


@dataclass(frozen=True)
class ClipConfig:
    """How clips are cut."""

    copy: bool = True
    """Copy what can be copied exactly, instead of encoding it anew: faster by far, and without loss."""
    crf: int = 16
    """x264's quality where clips are encoded anew, 0 to 51; smaller is better and larger in bytes."""
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"
    """x264's effort."""

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise InputError(f"crf is {self.crf}; it must be 0 to 51")


@dataclass(frozen=True)
class Clip:
    """One scene as a file.

    media: the file's bytes; scene: the span of the source; copied: whether as stored, not encoded anew; height, width: as displayed.
    """

    media: bytes
    scene: Scene
    copied: bool
    height: int
    width: int

    @property
    def num_frames(self) -> int:
        return self.scene.num_frames

    @property
    def seconds(self) -> float:
        return self.scene.seconds


def cut_clips(
    source: Source, scenes: Sequence[Scene], config: ClipConfig | None = None, alive: Callable[[], None] | None = None
) -> Iterator[Clip]:
    """Cut a video at the scenes of `find_scenes`, in order; one clip is in memory at a time.

    The file's packets are read once; its frames are decoded once, from the first scene that cannot be copied to the last one. Clips show
    exactly the frames of their scene at the times they have in the source, a variable rate included; a stored rotation is kept in copies
    and applied otherwise. `alive` is called after each frame. Raises InputError for scenes that overlap or are not in order, or that the
    file does not have, and as `media.stream_frames` does.
    """
    config = config or ClipConfig()
    for one, next_one in zip(scenes, scenes[1:], strict=False):
        if next_one.start_frame < one.end_frame:
            raise InputError(f"a scene from frame {next_one.start_frame} follows one up to {one.end_frame}; they must not overlap")
    if any(scene.num_frames < 1 for scene in scenes):
        raise InputError("a scene has no frames; each must have at least one")
    if not scenes:
        return
    info = probe_video(source)
    plan = _plan_copies(source, scenes) if config.copy else {}
    copies = _copy_spans(source, [plan[scene] for scene in scenes if scene in plan])
    frames = _number_frames(source, next((scene for scene in scenes if scene not in plan), scenes[0]), alive)
    for scene in scenes:
        if scene in plan:
            yield Clip(next(copies), scene, True, info.height, info.width)
        else:
            yield _encode_clip(frames, scene, info.fps, config)


def describe_clip(media: bytes) -> Clip:
    """A file that is a clip already, as `score_clip` takes it; decoded to count its frames. Raises InputError as `find_scenes` does."""
    info, num_frames, end = probe_video(media), 0, Fraction(0)
    for frame in stream_frames(media, short_edge=16):
        num_frames, end = num_frames + 1, frame.time + frame.duration
    return Clip(media, Scene(0, num_frames, 0.0, float(end)), False, info.height, info.width)


# -------------------------------------------------------------------------------------------------------------------------------- copying


@dataclass(frozen=True)
class _Span:
    """Packets first ... last of the video stream in stored order; when the first is shown, and when each is to be decoded after that."""

    first: int
    last: int
    shown_at: int
    decoded_after: tuple[int, ...]


def _plan_copies(source: Source, scenes: Sequence[Scene]) -> dict[Scene, _Span]:
    """The scenes that can be copied exactly. Reads all packets, decodes nothing; 9 bytes are kept per packet."""
    if not _is_timed(source):
        return {}
    shown_at, usable_keys = array("q"), bytearray()
    with open_video(source) as container:
        stream = container.streams.video[0]
        clock, origin = Fraction(stream.time_base or 1), stream.start_time or 0
        for packet in _read_packets(container):
            if packet.pts is None:
                return {}
            shown_at.append(packet.pts)
            usable_keys.append(packet.is_keyframe and not packet.is_discard and not packet.is_corrupt)
    if not shown_at:
        return {}
    times = np.frombuffer(shown_at, np.int64)
    order = np.argsort(times, kind="stable")  # order[k]: the packet that is shown as number k
    plan = {}
    for scene in scenes:
        start, end = (origin + round(Fraction(seconds) / clock) for seconds in (scene.start, scene.end))
        begin = int(np.searchsorted(times, start, sorter=order))
        stop = begin + scene.num_frames
        if stop > len(order) or times[order[begin]] != start or (stop < len(order) and times[order[stop]] != end):
            continue
        members, shown = order[begin:stop], times[order[begin:stop]]
        first, last = int(members[0]), int(members.max())
        if usable_keys[first] and members.min() == first and last - first + 1 == scene.num_frames and (np.diff(shown) > 0).all():
            # Not every container says when to decode, and cut ones say it wrongly; so: in order, and no frame after it is to be shown.
            delay = (shown - times[first : last + 1]).max()
            plan[scene] = _Span(first, last, start, tuple((shown - delay - start).tolist()))
    return plan


def _is_timed(source: Source) -> bool:
    """Whether this is a video file with presentation times and of a codec that is copied; not so an animated picture."""
    try:
        with open_video(source) as container:
            stream = container.streams.video[0]
            return stream.codec_context.name in _COPIED_CODECS and container.format.name not in _UNTIMED_FORMATS
    except InputError:
        if detect_kind(source) == "video":
            return False  # an animated picture: frames come from PIL, there are no packets
        raise


def _copy_spans(source: Source, spans: Sequence[_Span]) -> Iterator[bytes]:
    """One file per span, its packets as they are, in one walk through the source."""
    if not spans:
        return
    with open_video(source) as container:
        stream = container.streams.video[0]
        packets = enumerate(_read_packets(container))
        for span in spans:
            buffer = io.BytesIO()
            with av.open(buffer, "w", format=_COPIED_CODECS[stream.codec_context.name]) as output:
                copy = output.add_stream_from_template(stream)
                for number, packet in packets:
                    if number < span.first:
                        continue
                    assert packet.pts is not None  # else there were no plan
                    packet.pts, packet.dts = packet.pts - span.shown_at, span.decoded_after[number - span.first]
                    packet.stream = copy
                    output.mux(packet)
                    if number == span.last:
                        break
            yield buffer.getvalue()


def _read_packets(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """The video stream's packets in stored order, without the empty one that PyAV adds at the end."""
    return (packet for packet in container.demux(container.streams.video[0]) if packet.size or packet.pts is not None)


# --------------------------------------------------------------------------------------------------------------------------- encoding anew


def _number_frames(source: Source, first: Scene, alive: Callable[[], None] | None) -> Iterator[tuple[int, TimedFrame]]:
    """The source's frames with their numbers from the one that begins `first` on; from frame 0 on where its time does not lead to it."""
    frames = stream_frames(source, start=first.start)
    head = next(frames, None)
    if head is not None and abs(head.time - Fraction(first.start)) < 1e-6:
        numbered = enumerate(itertools.chain([head], frames), first.start_frame)
    else:
        numbered = enumerate(stream_frames(source))
    for pair in numbered:
        if alive is not None:
            alive()
        yield pair


def _encode_clip(frames: Iterator[tuple[int, TimedFrame]], scene: Scene, fps: float, config: ClipConfig) -> Clip:
    """H.264 in MP4, as every browser plays it, of the frames of one scene; earlier ones are passed over."""
    buffer = io.BytesIO()
    stream, ticks, number, height, width = None, -1, -1, 0, 0
    # Times are ticks of 1/90000 s, so no two frames may be nearer than that; damaged files repeat times.
    with av.open(buffer, "w", format="mp4") as output:
        for number, frame in frames:
            if number < scene.start_frame:
                continue
            if stream is None:
                height, width = frame.array.shape[:2]
                stream = output.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
                # Half-resolution colours need even sides; odd ones keep every pixel's colour instead of being cropped.
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p" if height % 2 or width % 2 else "yuv420p"
                # One thread and no macroblock tree: with either, x264 now and then writes other bytes for the same frames.
                stream.options = {"crf": str(config.crf), "preset": config.preset, "threads": "1", "mbtree": "0"}
                stream.codec_context.time_base = Fraction(1, _CLOCK)
                stream.codec_context.color_range, stream.codec_context.colorspace = 1, 1
                stream.codec_context.color_primaries, stream.codec_context.color_trc = 1, 1
            picture = av.VideoFrame.from_ndarray(frame.array, format="rgb24").reformat(format=stream.pix_fmt, dst_colorspace="ITU709")
            ticks = max(ticks + 1, round((frame.time - Fraction(scene.start)) * _CLOCK))
            picture.pts, picture.time_base, picture.duration = ticks, Fraction(1, _CLOCK), round(frame.duration * _CLOCK)
            output.mux(stream.encode(picture))
            if number == scene.end_frame - 1:
                break
        if stream is None or number != scene.end_frame - 1:
            raise InputError(f"the video ends before frame {scene.end_frame - 1}, the last one of a scene; find its scenes again")
        output.mux(stream.encode())
    return Clip(buffer.getvalue(), scene, False, height, width)
