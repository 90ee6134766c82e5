"""A video -> its scenes, by PySceneDetect's detectors for cuts (ContentDetector) and for fades (ThresholdDetector) together.

In: a file. Out: spans of frames and seconds that cover the whole video, in order. The surprising thing: of a video only one small frame
is held, whatever its length, and 8 bytes a frame for its time (0.7 MB an hour), because a fade is found at its end and lies in its middle.

Source: section 2.1 of arXiv 2409.18869, video data, step 1.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from openemu3.media import MAX_FRAME_SECONDS, Source, probe_video, stream_frames
from openemu3.records import InputError

# Shorter side of the frames that the detectors see. PySceneDetect shrinks to a width of 256, which is the same for 16:9.
_SHORT_EDGE = 144


@dataclass(frozen=True)
class SceneConfig:
    """What counts as a new scene."""

    content_threshold: float = 27.0
    """Change of hue, saturation and brightness between neighbouring frames, 0 to 255, that makes a cut (PySceneDetect's default)."""
    fade_threshold: float = 12.0
    """Mean brightness, 0 to 255, under which the picture counts as faded out (PySceneDetect's default)."""
    min_seconds: float = 0.6
    """Cuts of one detector are at least so far apart (PySceneDetect's default)."""
    max_seconds: float = 60.0
    """Longer scenes are split evenly, because a clip is held in memory as a whole."""

    def __post_init__(self) -> None:
        for name, least in (("content_threshold", 0.0), ("fade_threshold", 0.0), ("min_seconds", 0.0), ("max_seconds", 0.1)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise InputError(f"{name} is {value}; it must be a number of at least {least:g}")


@dataclass(frozen=True)
class Scene:
    """Frames start_frame ... end_frame - 1, shown from `start` to `end`, in seconds from the video's first frame."""

    start_frame: int
    end_frame: int
    start: float
    end: float

    @property
    def num_frames(self) -> int:
        return self.end_frame - self.start_frame

    @property
    def seconds(self) -> float:
        return self.end - self.start


def find_scenes(source: Source, config: SceneConfig | None = None, alive: Callable[[], None] | None = None) -> tuple[Scene, ...]:
    """The scenes of a video or animation; the first begins with its first frame and the last ends with its last.

    Frames are counted as they are decoded, so a wrong or missing index plays no part; times are those stored, so a variable rate does not
    shift them. `alive` is called after each frame. Raises InputError as `media.stream_frames` does: for no video stream, no frames, damage
    that stops the decoder; and for a frame that stands for longer than MAX_FRAME_SECONDS. InputError also where PySceneDetect is not
    installed.
    """
    config = config or SceneConfig()
    detectors, make_timecode = _build_detectors(config, probe_video(source).fps)
    times = array("d")
    cuts: set[int] = set()
    end = Fraction(0)
    for frame in stream_frames(source, short_edge=_SHORT_EDGE):
        gap = frame.time - Fraction(times[-1]) if times else Fraction(0)
        if max(gap, frame.duration) > MAX_FRAME_SECONDS:
            raise InputError(
                f"frame {len(times)} at {float(frame.time):.2f} s follows or stands for {float(max(gap, frame.duration)):.0f} s: "
                f"at most {MAX_FRAME_SECONDS} are allowed"
            )
        times.append(float(frame.time))
        end = frame.time + frame.duration
        timecode = make_timecode(frame.time)
        picture = np.ascontiguousarray(frame.array[:, :, ::-1])  # BGR, as OpenCV counts colours
        for detector in detectors:
            cuts.update(_find_nearest(times, cut.seconds) for cut in detector.process_frame(timecode, picture))
        if alive is not None:
            alive()
    return tuple(_build_scenes(times, float(end), sorted(cuts - {0}), config.max_seconds))


def _build_detectors(config: SceneConfig, rate: float) -> tuple[tuple[Any, Any], Callable[[Fraction], Any]]:
    """Both detectors, and a function that makes their kind of time from seconds."""
    try:
        from scenedetect import ContentDetector, FrameTimecode, ThresholdDetector
        from scenedetect.common import Timecode
    except ImportError as error:
        raise InputError("scenes need PySceneDetect, which is not installed; install it with: pip install 'openemu3[curation]'") from error

    def make_timecode(time: Fraction) -> Any:
        return FrameTimecode(Timecode(pts=round(time * 1_000_000), time_base=Fraction(1, 1_000_000)), fps=float(rate))

    content = ContentDetector(threshold=config.content_threshold, min_scene_len=float(config.min_seconds))
    fade = ThresholdDetector(threshold=config.fade_threshold, min_scene_len=float(config.min_seconds))
    return (content, fade), make_timecode


def _find_nearest(times: array[float], time: float) -> int:
    """The frame that appears nearest to a time; ties go to the earlier one."""
    after = bisect_left(times, time)
    if after == len(times):
        return after - 1
    if after > 0 and time - times[after - 1] <= times[after] - time:
        return after - 1
    return after


def _build_scenes(times: array[float], end: float, cuts: Iterable[int], max_seconds: float) -> Iterator[Scene]:
    """The spans between cuts, each split evenly into pieces of at most `max_seconds`, as far as there are frames to split at."""
    first = 0
    for last in (*cuts, len(times)):
        start, until = times[first], end if last == len(times) else times[last]
        pieces = math.ceil(round((until - start) / max_seconds, 6))  # 60.0000001 s are 60 s
        inner = {_find_nearest(times, start + (until - start) * piece / pieces) for piece in range(1, pieces)}
        for boundary in (*sorted(place for place in inner if first < place < last), last):
            yield Scene(first, boundary, times[first], until if boundary == last else times[boundary])
            first = boundary
