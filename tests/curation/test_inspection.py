"""What is measured of a picture, and what each odd file becomes: decided correctly, or refused with its reason."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from openemu3.curation.inspection import hash_picture, measure_colours

Look = Callable[..., dict[str, Any]]
Draw = Callable[..., Image.Image]


def make_colourful(width: int = 80, height: int = 60) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 4 % 256, columns * 3 % 256, (rows + columns) * 2 % 256], -1)
    return Image.fromarray(picture.astype(np.uint8))


def test_a_sound_picture_gives_its_measures(inspect: Look, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    make_colourful(800, 600).save(path)
    row = inspect(path)
    assert (row["width"], row["height"]) == (800, 600)
    assert (row["pixels_width"], row["pixels_height"]) == (640, 480) and len(row["pixels"]) == 640 * 480 * 3
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and row["num_bytes"] == path.stat().st_size
    assert row["colour_spread"] > 20 and row["contrast"] > 20 and "reason" not in row


def test_grey_sepia_and_flat_pictures_have_no_spread_of_colours() -> None:
    grey = np.arange(0, 250, dtype=np.uint8)[:, None, None].repeat(20, 1).repeat(3, 2)
    sepia = (grey * np.array([1.0, 0.84, 0.66])).astype(np.uint8)
    flat = np.full((20, 20, 3), (200, 30, 30), np.uint8)
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert measure_colours(grey)["colour_spread"] < 1e-3
    assert measure_colours(sepia)["colour_spread"] < 1
    assert measure_colours(flat) == {"colour_spread": 0.0, "contrast": pytest.approx(0, abs=1e-9)}
    # Three independent uniform channels: each axis has a variance of 256² / 12, and two of them are not the main one.
    assert measure_colours(random)["colour_spread"] == pytest.approx(np.sqrt(2 * 256**2 / 12), rel=0.03)


def test_the_hash_keeps_through_scaling_and_compression_and_tells_pictures_apart(draw_scene: Draw, tmp_path: Path) -> None:
    one, other = draw_scene(1, 200, 160), draw_scene(2, 200, 160)
    one.save(tmp_path / "one.jpg", quality=60)
    again = Image.open(tmp_path / "one.jpg").resize((100, 80))
    assert (hash_picture(one) ^ hash_picture(again)).bit_count() <= 4
    assert (hash_picture(one) ^ hash_picture(other)).bit_count() > 12


def write_bomb(path: Path) -> None:
    """A PNG of 30000 x 30000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def test_odd_files_are_refused_with_their_reason(inspect: Look, tmp_path: Path) -> None:
    picture = make_colourful()
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:600])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is not a picture")
    picture.save(tmp_path / "moves.gif", save_all=True, append_images=[picture.rotate(180)], duration=100)
    write_bomb(tmp_path / "bomb.png")
    expected = {"cut.jpg": "unreadable", "empty.png": "empty", "text.jpg": "unreadable", "moves.gif": "moving", "bomb.png": "too large"}
    assert {name: inspect(tmp_path / name).get("reason") for name in expected} == expected
    assert inspect(tmp_path / "gone.jpg")["reason"] == "missing"
    assert inspect(tmp_path / "whole.jpg", max_bytes=100)["reason"] == "too large"


def test_unusual_but_sound_pictures_are_decoded(inspect: Look, tmp_path: Path) -> None:
    picture = make_colourful()
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray((np.arange(4800).reshape(60, 80) * 13).astype(np.uint16)).save(tmp_path / "deep.png")
    picture.convert("P").save(tmp_path / "palette.png")
    picture.save(tmp_path / "really_png.jpg", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    for name in ("cmyk.jpg", "deep.png", "palette.png", "really_png.jpg"):
        row = inspect(tmp_path / name)
        assert (row.get("reason"), row.get("width"), row.get("height")) == (None, 80, 60), name
    assert inspect(tmp_path / "deep.png")["colour_spread"] == 0
    turned = inspect(tmp_path / "turned.jpg")
    assert (turned["width"], turned["height"]) == (60, 80)


def test_the_hash_tells_one_shape_in_two_colours_apart() -> None:
    def paint(colour: tuple[int, int, int]) -> Image.Image:
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((10, 14, 54, 50), fill=colour)
        return picture

    blue, violet, pink = (hash_picture(paint(colour)) for colour in ((60, 110, 240), (150, 60, 220), (250, 120, 170)))
    nearly_blue = hash_picture(paint((66, 112, 236)))
    assert (blue ^ nearly_blue).bit_count() <= 2
    assert min((blue ^ violet).bit_count(), (blue ^ pink).bit_count(), (violet ^ pink).bit_count()) >= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_measured_as_the_same_picture_in_png(
    inspect: Callable[..., dict[str, Any]], draw_scene: Callable[..., Image.Image], tmp_path: Path, mode: str, orientation: int
) -> None:
    """It is decoded at a part of its size; its stated size, colours and hash are of the whole."""
    picture = draw_scene(3, 1500, 1100).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "large.jpg", quality=95, subsampling=0, exif=exif)
    upright = picture.convert("RGB").transpose(Image.Transpose.ROTATE_270) if orientation == 6 else picture.convert("RGB")
    upright.save(tmp_path / "large.png")
    one, other = (inspect(tmp_path / name, keep_pixels=False) for name in ("large.jpg", "large.png"))
    assert (one["width"], one["height"]) == (other["width"], other["height"]) == ((1100, 1500) if orientation == 6 else (1500, 1100))
    assert one["colour_spread"] == pytest.approx(other["colour_spread"], abs=0.7)
    assert one["contrast"] == pytest.approx(other["contrast"], rel=0.02)
    assert (int(one["hash"], 16) ^ int(other["hash"], 16)).bit_count() <= 2
    assert inspect(tmp_path / "large.jpg", keep_pixels=False, working_side=100)["pixels"] == b""


def test_a_large_jpeg_that_is_cut_off_is_unreadable_also_at_a_part_of_its_size(
    inspect: Callable[..., dict[str, Any]], draw_scene: Callable[..., Image.Image], tmp_path: Path
) -> None:
    path = tmp_path / "cut.jpg"
    draw_scene(4, 2400, 1800).save(path, quality=90)
    path.write_bytes(path.read_bytes()[:-2000])
    assert inspect(path, keep_pixels=False)["reason"] == "unreadable"


def test_threads_look_at_files_in_processes_of_their_own(draw_scene: Callable[..., Image.Image], tmp_path: Path) -> None:
    """Or a second worker would wait for the first one."""
    from concurrent.futures import ThreadPoolExecutor

    from openemu3.curation.pipeline import ScoreConfig
    from openemu3.curation.scoring import FileInspector

    items = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        draw_scene(number).save(path)
        item = {"id": path.name, "uri": path.as_uri(), "offset": None, "length": None, "row": -1, "column": "", "refused": ""}
        items.append(item)
    for workers, expected in ((None, 2), (1, 1)):
        look = FileInspector(ScoreConfig(text=False), "image", workers)
        with ThreadPoolExecutor(2) as pool:
            rows = list(pool.map(look, items))
        assert [row["width"] for (row,) in rows] == [96] * 8
        assert look.num_processes == expected
