"""One film, looked at in the guarded child process: its scenes, and for each the text, the motion and three frames.

In: where an item lies. Out: one row of measures for each clip. The surprising thing: clips are cut twice, once to measure them and once
more for those that are kept, because most are not, and all clips of a data set would fill its disk again.

What is held of a film: one clip, and for each clip its row and thumbnail (5 kB); where CLIP models are asked, also three frames as a JPEG
(0.1 MB). The film itself is held only where it is not a file of its own.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from openemu3.curation.clips import Clip, cut_clips
from openemu3.curation.guard import Alive, Guard
from openemu3.curation.inspection import encode_thumbnail, get_detector, hash_picture, measure_colours
from openemu3.curation.motion import score_clip
from openemu3.curation.scenes import Scene, find_scenes
from openemu3.curation.sources import Item, open_item
from openemu3.media import Source, detect_kind, probe_video
from openemu3.records import InputError

# Colours and hash are measured on a copy of this size, as for pictures.
_COPY_SIDE = 128


def inspect_video(arguments: dict[str, Any], payload: bytes, alive: Alive) -> tuple[dict[str, Any], list[bytes]]:
    """Reads one film, finds its scenes and measures each. Called by `guard.Guard`.

    arguments  as for `inspection.inspect_image`.
    Answers with {"rows": [...]}, one for each clip, or one with {"reason", "detail"}; each clip's part of the payload is its three frames
    (a JPEG of one above the other, pixels_height x pixels_width each; none unless keep_pixels) and then a thumbnail (WebP).
    """
    item = Item(**arguments["item"])
    began = time.perf_counter()
    whole: dict[str, Any] = {}
    rows, parts = [], []
    try:
        with open_item(item, arguments["max_bytes"]) as source:
            whole |= _measure_file(source)
            whole |= {"seconds_read": time.perf_counter() - began}
            if not whole["num_bytes"]:
                return _refuse(whole, "empty", "it has 0 bytes"), []
            after_read = time.perf_counter()
            if detect_kind(source) == "image":
                return _refuse(whole, "still", "it is a picture that does not move; emu3 curate images takes those"), []
            info, scenes = probe_video(source), find_scenes(source, alive=alive)
            seconds = time.perf_counter() - after_read  # of finding the scenes; counted once, for the first clip
            for clip in cut_clips(source, scenes, alive=alive):
                decoded = time.perf_counter()
                row, frames, thumbnail = _inspect_clip(clip, info.fps, arguments)
                alive()
                row |= whole | {"seconds_decode": seconds, "seconds_measure": time.perf_counter() - decoded - row["seconds_text"]}
                rows.append(row | {"pixels_length": len(frames), "thumbnail_length": len(thumbnail)})
                parts += [frames, thumbnail]
                whole, seconds = {**whole, "seconds_read": None}, 0.0
    except InputError as error:
        reason = "too large" if "too large" in str(error) else "unreadable" if "num_bytes" in whole else "missing"
        return _refuse(whole, reason, _name_item(str(error), item)), []
    return {"rows": rows}, parts


def _measure_file(source: Source) -> dict[str, Any]:
    if isinstance(source, bytes):
        return {"num_bytes": len(source), "sha256": hashlib.sha256(source).hexdigest()}
    with open(source, "rb") as file:
        status = os.fstat(file.fileno())
    digest = _digest_file(str(source), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return {"num_bytes": status.st_size, "sha256": digest}


@lru_cache(maxsize=1)
def _digest_file(path: str, device: int, node: int, size: int, changed: int) -> str:
    """SHA-256 of a file; remembered for the next clips of the same film, by what changes when the file does."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_item(message: str, item: Item) -> str:
    """A message with the item's name where the path of the open file stands."""
    head, _, rest = message.partition("'/dev/fd/")
    return head + repr(item.id) + rest.partition("'")[2] if rest else message


def _refuse(measures: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    return {"rows": [measures | {"reason": reason, "detail": detail}]}


def _inspect_clip(clip: Clip, fps: float, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytes, bytes]:
    scored = score_clip(clip, get_detector() if arguments["text"] else None)
    frames = [Image.fromarray(frame) for frame in scored.frames]
    middle = frames[len(frames) // 2]
    small = middle.copy()
    small.thumbnail((_COPY_SIDE, _COPY_SIDE), Image.Resampling.BOX)
    row = {
        "start": clip.scene.start,
        "seconds": clip.seconds,
        "fps": fps,
        "start_frame": clip.scene.start_frame,
        "end_frame": clip.scene.end_frame,
        "width": clip.width,
        "height": clip.height,
        "hash": f"{hash_picture(small):016x}",
        "motion": scored.motion,
        "text_coverage": None if np.isnan(scored.text_coverage) else scored.text_coverage,
        "seconds_text": scored.text_seconds,
        "num_pictures": len(frames),
        "pixels_height": middle.height,
        "pixels_width": middle.width,
        **measure_colours(np.asarray(small)),
    }
    encoded = io.BytesIO()
    if arguments["keep_pixels"]:
        strip = Image.fromarray(scored.frames.reshape(-1, *scored.frames.shape[2:]))  # [3 * H, W, 3]
        strip.save(encoded, "JPEG", quality=95, subsampling=0)
    return row, encoded.getvalue(), encode_thumbnail(middle, arguments["thumbnail_side"])


# --------------------------------------------------------------------------------------------------------------------------- cutting again


class ClipCutter:
    """Cuts clips that were kept out of their films, in a guarded child process."""

    def __init__(self, seconds_per_file: float, max_bytes: int) -> None:
        self._guard = Guard("openemu3.curation.films:cut_some", 10 * seconds_per_file)
        self._max_bytes = max_bytes

    def __call__(self, item: dict[str, Any], sha256: str, scenes: Sequence[Scene]) -> list[bytes]:
        """Fields of an `Item`, what its bytes were when it was scored, and scenes in order -> the clips' bytes.

        Raises InputError as `cut_clips` does, and if the film has changed.
        """
        spans = [vars(scene) for scene in scenes]
        answer, payload = self._guard.call({"item": item, "max_bytes": self._max_bytes, "sha256": sha256, "scenes": spans})
        ends = np.cumsum([0, *answer["lengths"]]).tolist()
        return [bytes(payload[begin:end]) for begin, end in zip(ends, ends[1:], strict=False)]

    def close(self) -> None:
        self._guard.close()


def cut_some(arguments: dict[str, Any], payload: bytes, alive: Alive) -> tuple[dict[str, Any], list[bytes]]:
    item = Item(**arguments["item"])
    with open_item(item, arguments["max_bytes"]) as source:
        if _measure_file(source)["sha256"] != arguments["sha256"]:
            raise InputError(f"item {item.id!r} has changed since it was scored")
        scenes = [Scene(**scene) for scene in arguments["scenes"]]
        clips = [clip.media for clip in cut_clips(source, scenes, alive=alive)]
    return {"lengths": list(map(len, clips))}, clips
