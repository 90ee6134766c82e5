"""What a clip is measured by: how much moves, how much text there is, and three frames for the judges of beauty.

In: one clip. Out: numbers and frames; decisions are taken afterwards, in `filters`. The surprising thing: all of it comes from one walk
through the clip at 8 small frames per second, so that memory is one frame, and a second of film costs the same at every stored rate.

Source: section 2.1 of arXiv 2409.18869, video data, steps 2 to 4. The paper gives the definition of the flow score, the rate and size for
text, and the number of frames for the aesthetic score; which rate its flow is taken at it does not say, nor its bounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openemu3.curation.clips import Clip
from openemu3.curation.text import TextDetector
from openemu3.media import stream_frames
from openemu3.records import InputError

NUM_JUDGED_FRAMES = 3
# Farneback's pyramid: five levels of half the size each find movements of about a quarter of the shorter edge.
_FARNEBACK = {"pyr_scale": 0.5, "levels": 5, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}


@dataclass(frozen=True)
class MotionConfig:
    """At which rates and sizes clips are measured."""

    frames_per_second: int = 8
    """Optical flow is taken between neighbours at this rate."""
    text_every: int = 4
    """Every so many of these frames text is looked for: 2 per second, as in the paper."""
    short_edge: int = 256
    """Pixels of the shorter side for text, as in the paper, and for the judged frames."""
    flow_short_edge: int = 128
    """Pixels of the shorter side for the flow; the score is a share of it, so that the size changes its precision, not its value."""

    def __post_init__(self) -> None:
        for name, least in (("frames_per_second", 1), ("text_every", 1), ("short_edge", 32), ("flow_short_edge", 32)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True, eq=False)
class ClipScores:
    """Measures of one clip.

    motion         mean length of the optical flow over all pixels and pairs of frames, divided by the shorter edge; with the default rate
                   the share of the shorter edge that things move by in an eighth of a second. 0 for a single frame.
    text_coverage  mean share of the frames under text, 0 to 1; nan where no detector was given.
    text_coverage_max  the largest share among the frames; nan likewise.
    frames         uint8 [3, H, W, 3]: in the middle of each third of the clip, shorter side at most `short_edge`.
    text_seconds   that the detector took, for the report.
    """

    motion: float
    text_coverage: float
    text_coverage_max: float
    frames: NDArray[np.uint8]
    text_seconds: float


def score_clip(clip: Clip, detector: TextDetector | None, config: MotionConfig | None = None) -> ClipScores:
    """Measure a clip of `cut_clips` or `describe_clip`. Raises InputError as `media.stream_frames` does."""
    config = config or MotionConfig()
    rate = config.frames_per_second
    wanted = [int(clip.seconds * (2 * third + 1) / (2 * NUM_JUDGED_FRAMES) * rate) for third in range(NUM_JUDGED_FRAMES)]
    judged: list[NDArray[np.uint8]] = []
    coverages: list[float] = []
    text_seconds = 0.0

    def look_at_frames() -> Iterator[NDArray[np.uint8]]:
        nonlocal text_seconds
        array: NDArray[np.uint8] | None = None
        for number, frame in enumerate(stream_frames(clip.media, fps=rate, short_edge=config.short_edge)):
            array = frame.array
            judged.extend([array] * wanted.count(number))
            if detector is not None and number % config.text_every == 0:
                began = time.perf_counter()
                coverages.append(detector.measure(array).coverage)
                text_seconds += time.perf_counter() - began
            yield array
        # The file may end a frame before its stated length.
        judged.extend([array] * (NUM_JUDGED_FRAMES - len(judged)) if array is not None else [])

    motion = measure_motion(look_at_frames(), config.flow_short_edge)
    mean, most = (float(np.mean(coverages)), max(coverages)) if coverages else (float("nan"), float("nan"))
    return ClipScores(motion, mean, most, np.stack(judged), text_seconds)


def measure_motion(frames: Iterable[NDArray[np.uint8]], short_edge: int = 128) -> float:
    """Mean length of Farneback's optical flow between neighbours, divided by the shorter edge.

    frames  uint8 [H, W, 3] RGB each, all of one size; they are made smaller to `short_edge` if they are larger.
    Returns 0 for fewer than two frames.
    """
    import cv2

    before: NDArray[np.uint8] | None = None
    shown: NDArray[np.uint8] | None = None
    lengths: list[float] = []
    for frame in frames:
        if frame is shown:  # the same stored frame on screen for longer than one step
            lengths.append(0.0)
            continue
        shown = frame
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
        if min(height, width) > short_edge:
            scale = short_edge / min(height, width)
            grey = cv2.resize(grey, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        if before is not None:
            flow = cv2.calcOpticalFlowFarneback(before, grey, None, **_FARNEBACK)  # type: ignore[call-overload]  # [H, W, (x, y)] pixels
            lengths.append(float(np.hypot(flow[..., 0], flow[..., 1]).mean()) / min(grey.shape))
        before = grey  # type: ignore[assignment]  # OpenCV's stubs do not state the type of its arrays
    return float(np.mean(lengths)) if lengths else 0.0
