"""Lay samples out on one picture with their captions under them, to be looked at by a person.

In: a Parquet file of samples. Out: a PNG; of a clip, its frames stand side by side.

    python recipes/mini/draw_sheet.py .cache/mini/images.parquet sheet.png --splits heldout_combination --number 84
"""

from __future__ import annotations

import io
import random
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageDraw, ImageFont

from openemu3.data.samples import read_columns, read_samples
from openemu3.media import read_video, to_pil
from openemu3.records import InputError, Sample

CAPTION_LINES = 3
LINE_HEIGHT = 11
FONT_SIZE = 9


@dataclass(frozen=True)
class Sheet:
    """Draw a contact sheet of samples.

    Args:
        samples: Parquet file of samples.
        output: PNG to write.
        splits: which splits to draw from; all if none is named.
        number: how many samples, drawn at random.
        columns: samples side by side.
        frames: frames of a clip side by side.
        seed: of the draw.
    """

    samples: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    splits: tuple[str, ...] = ()
    number: int = 84
    columns: int = 14
    frames: int = 12
    seed: int = 0


def draw_sheet(samples: list[Sample], columns: int, frames: int) -> Image.Image:
    """A grid of media with their English captions beneath."""
    font = ImageFont.load_default(FONT_SIZE)
    strips = [_draw_strip(sample, frames) for sample in samples]
    width = max(strip.width for strip in strips) + 48
    height = max(strip.height for strip in strips) + 4 + CAPTION_LINES * LINE_HEIGHT
    sheet = Image.new("RGB", (width * min(columns, len(strips)), height * -(-len(strips) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (sample, strip) in enumerate(zip(samples, strips, strict=True)):
        left, top = place % columns * width, place // columns * height
        sheet.paste(strip, (left + 24, top))
        lines = textwrap.wrap(sample.captions["en"], width // 6)[:CAPTION_LINES]
        pen.text((left + 4, top + strip.height + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet


def _draw_strip(sample: Sample, frames: int) -> Image.Image:
    if sample.kind == "image":
        with Image.open(io.BytesIO(sample.media)) as picture:
            return picture.convert("RGB")
    pictures = to_pil(read_video(sample.media, fps=float(sample.attributes["fps"]))[0])
    shown = pictures[:: max(1, len(pictures) // frames)][:frames]
    strip = Image.new("RGB", (sum(picture.width for picture in shown), shown[0].height))
    for place, picture in enumerate(shown):
        strip.paste(picture, (place * picture.width, 0))
    return strip


def main(sheet: Sheet) -> None:
    ids = [row["id"] for row in read_columns(sheet.samples, ["id"], sheet.splits or None)]
    if not ids:
        raise InputError(f"{str(sheet.samples)!r} has no samples in the splits {', '.join(sheet.splits)}")
    chosen = set(random.Random(sheet.seed).sample(ids, min(sheet.number, len(ids))))
    samples = [sample for sample in read_samples(sheet.samples, sheet.splits or None) if sample.id in chosen]
    partial = sheet.output.with_name(f".{sheet.output.name}.partial.png")
    try:
        draw_sheet(samples, sheet.columns if samples[0].kind == "image" else 1, sheet.frames).save(partial)
        partial.replace(sheet.output)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Sheet))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
