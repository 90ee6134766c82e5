"""Two hundred and more damaged files: each is decided or refused with a reason, and none ends the process or hangs it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
REASONS = {None, "unreadable", "empty", "moving", "too large"}


def encode(picture: Image.Image, form: str, animated: bool) -> bytes:
    buffer = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": [picture.rotate(180)], "duration": 50} if animated else {}
    picture.save(buffer, form, **more)
    return buffer.getvalue()


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """One to eight changes: bytes overwritten, cut out, repeated, or the end cut off; often near the beginning, where sizes are."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        if not changed:
            break
        place = int(min(random.integers(0, len(changed)), random.integers(0, len(changed))))
        length = int(random.integers(1, 40))
        match int(random.integers(0, 5)):
            case 0:
                changed[place : place + length] = random.integers(0, 256, length, np.uint8).tobytes()
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length] * int(random.integers(1, 30))
            case 3:
                changed[place] = int(random.choice([0, 1, 127, 128, 255]))
            case 4:
                del changed[place + len(changed) // 2 :]
    return bytes(changed)


def test_mutated_pictures_never_end_the_process_nor_hang_it(
    inspect: Callable[..., dict[str, Any]], draw_scene: Callable[..., Image.Image], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    seeds = [encode(draw_scene(number, 48, 40), form, animated=False) for number, form in enumerate(FORMATS)]
    seeds += [encode(draw_scene(20), form, animated=True) for form in ("GIF", "WEBP", "PNG")]
    decided: Counter[str | None] = Counter()
    for number in range(225):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(mutate(seeds[number % len(seeds)], random))
        row = inspect(path, working_side=32, thumbnail_side=16)  # a crash or a time limit would raise
        reason = row.get("reason")
        assert reason in REASONS, row
        assert (row["width"] > 0 and len(row["pixels"]) > 0) if reason is None else row["detail"]
        decided[reason] += 1
    # The test would be empty if all were refused, or none.
    assert decided[None] > 20 and decided["unreadable"] > 60, decided


def test_mutated_films_never_end_the_process_nor_hang_it(tmp_path: Path) -> None:
    import av

    from openemu3.curation.guard import Crashed, Guard
    from openemu3.records import InputError

    seeds = []
    for suffix, codec in ((".mp4", "libx264"), (".avi", "mpeg4")):
        path = tmp_path / f"seed{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for index in range(6):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index * 30, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        seeds.append(path.read_bytes())
    guard = Guard("openemu3.curation.films:inspect_video", 60.0, "openemu3.curation.inspection:load_detector")
    random = np.random.default_rng(1)
    refused = rows = 0
    for number in range(40):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(mutate(seeds[number % 2], random))
        item = {"id": path.name, "uri": path.as_uri()}
        arguments = {"item": item, "max_bytes": 1 << 20, "working_side": 64, "thumbnail_side": 16, "text": True, "keep_pixels": True}
        try:
            answer, _ = guard.call(arguments)
        except Crashed:  # a decoder may; what counts is that the next file is looked at
            refused += 1
            continue
        except InputError as error:
            raise AssertionError(f"{path.name} was not decided: {error}") from error
        assert answer["rows"]
        refused += sum("reason" in row for row in answer["rows"])
        rows += sum("motion" in row for row in answer["rows"])
    guard.close()
    assert refused > 5 and rows > 3
