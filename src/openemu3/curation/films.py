"""One film, looked at in the guarded child process: its scenes, and for each the text, the motion and three frames.

In: where an item lies. Out: one row of measures for each clip. The surprising thing: clips are cut twice, once to measure them and once
more for those that are kept, because most are not, and all clips of a data set would fill its disk again.
"""

from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from openemu3.curation.clips import Clip, cut_clips
from openemu3.curation.guard import Guard
from openemu3.curation.inspection import encode_thumbnail, hash_picture, measure_colours
from openemu3.curation.motion import score_clip
from openemu3.curation.scenes import Scene, find_scenes
from openemu3.curation.sources import Item, read_item
from openemu3.curation.text import TextDetector
from openemu3.media import detect_kind, probe_video
from openemu3.records import InputError


def inspect_video(arguments: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Reads one film, finds its scenes and measures each. Called by `guard.Guard`.

    arguments  item: fields of `Item`; max_bytes; working_side and thumbnail_side: longest sides of frames in pixels.
    Answers with {"rows": [...]}, one for each clip, or one with {"reason", "detail"}; each clip's part of the payload is its three frames
    (uint8 RGB, pixels_height x pixels_width each) and then a thumbnail (WebP).
    """
    began = time.perf_counter()
    try:
        data = read_item(Item(**arguments["item"]), arguments["max_bytes"])
    except InputError as error:
        return _refuse({}, "too large" if "too large" in str(error) else "missing", str(error)), b""
    after_read = time.perf_counter()
    whole = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "seconds_read": after_read - began}
    if not data:
        return _refuse(whole, "empty", "it has 0 bytes"), b""
    rows, parts = [], []
    try:
        if detect_kind(data) == "image":
            return _refuse(whole, "still", "it is a picture that does not move; emu3 curate images takes those"), b""
        info, scenes = probe_video(data), find_scenes(data)
        seconds = time.perf_counter() - after_read  # of finding the scenes; counted once, for the first clip
        for clip in cut_clips(data, scenes):
            decoded = time.perf_counter()
            row, pixels, thumbnail = _inspect_clip(clip, info.fps, arguments)
            row |= whole | {"seconds_decode": seconds, "seconds_measure": time.perf_counter() - decoded - row["clip_seconds_text"]}
            rows.append(row | {"pixels_length": len(pixels), "thumbnail_length": len(thumbnail)})
            parts += [pixels, thumbnail]
            whole, seconds = {**whole, "seconds_read": None}, 0.0
    except InputError as error:
        return _refuse(whole, "too large" if "too large" in str(error) else "unreadable", str(error)), b""
    return {"rows": rows}, b"".join(parts)


def _refuse(measures: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    return {"rows": [measures | {"reason": reason, "detail": detail}]}


def _inspect_clip(clip: Clip, fps: float, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes, bytes]:
    detector = _get_detector(arguments["working_side"])
    scored = score_clip(clip, detector)
    frames = [Image.fromarray(frame) for frame in scored.frames]
    for frame in frames:
        frame.thumbnail((arguments["working_side"], arguments["working_side"]), Image.Resampling.BOX)
    middle = frames[len(frames) // 2]
    small = middle.copy()
    small.thumbnail((128, 128), Image.Resampling.BOX)
    row = {
        "start": clip.scene.start,
        "seconds": clip.seconds,
        "fps": fps,
        "start_frame": clip.scene.start_frame,
        "end_frame": clip.scene.end_frame,
        "width": clip.width,
        "height": clip.height,
        "hash": f"{hash_picture(middle):016x}",
        "motion": scored.motion,
        "clip_text_coverage": scored.text_coverage,
        "clip_seconds_text": scored.text_seconds,
        "num_pictures": len(frames),
        "pixels_height": middle.height,
        "pixels_width": middle.width,
        **measure_colours(np.asarray(small)),
    }
    return row, b"".join(frame.tobytes() for frame in frames), encode_thumbnail(middle, arguments["thumbnail_side"])


@lru_cache(maxsize=1)
def _get_detector(longest_side: int) -> TextDetector:
    return TextDetector(longest_side)


# --------------------------------------------------------------------------------------------------------------------------- cutting again


class ClipCutter:
    """Cuts clips that were kept out of their films, in a guarded child process."""

    def __init__(self, seconds_per_file: float) -> None:
        self._guard = Guard("openemu3.curation.films:cut_one", 10 * seconds_per_file)

    def __call__(self, media: bytes, start_frame: int, end_frame: int, start: float, end: float) -> bytes:
        """A film's bytes and a scene -> the clip's bytes. Raises InputError as `cut_clips` does."""
        scene = {"start_frame": start_frame, "end_frame": end_frame, "start": start, "end": end}
        return self._guard.call({"scene": scene}, media)[1]

    def close(self) -> None:
        self._guard.close()


def cut_one(arguments: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    return {}, next(cut_clips(payload, [Scene(**arguments["scene"])])).media
