"""Pictures of known content, small, made here; and a guard that inspects them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("daft", reason="curation is an extra")

from openemu3.curation.guard import Guard


def _draw_scene(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A colourful picture that is like no other seed's: blots of colour on a slope of colour."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.zeros((height, width, 3))
    for _ in range(6):
        y, x, size = random.uniform(0, height), random.uniform(0, width), random.uniform(0.1, 0.3) * width
        blot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / size**2)
        picture += blot[..., None] * random.uniform(-200, 200, 3)
    picture = 128 + picture / 1.5
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _draw_text(width: int = 320, height: int = 240) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for line in range(5):
        pen.text((12, 10 + line * 46), f"WORDS AND WORDS {line}", fill="navy", font_size=30)
    return picture


@pytest.fixture(scope="session")
def inspect() -> Iterator[Callable[..., dict[str, Any]]]:
    """Looks at one file in the guarded process: the row of its measures, the working copy's bytes under "pixels"."""
    guard = Guard("openemu3.curation.inspection:inspect_image", 60.0)

    def look(path: Path, **limits: int) -> dict[str, Any]:
        item = {"id": path.name, "uri": path.as_uri()}
        answer, payload = guard.call({"item": item, **({"max_bytes": 1 << 26, "working_side": 640, "thumbnail_side": 64} | limits)})
        row: dict[str, Any] = answer["rows"][0]
        return row | {"pixels": payload[: row["pixels_length"]]}

    yield look
    guard.close()


@pytest.fixture(scope="session")
def draw_scene() -> Callable[..., Image.Image]:
    return _draw_scene


@pytest.fixture(scope="session")
def draw_text() -> Callable[..., Image.Image]:
    return _draw_text
