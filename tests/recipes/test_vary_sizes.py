"""Pictures at several sizes, and voters and judges that look at subjects whatever their size."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from prepare_samples import encode_picture
from tastes import crop_subject, find_subject, measure_likeness, measure_size
from vary_sizes import VarySizes, shrink, vary_sizes

from openemu3.media import from_pil, read_image
from openemu3.records import InputError, Sample


def make_picture(side: int = 64, blot: int = 0) -> Image.Image:
    """A subject of half the side, dark above and pink below, in the middle; `blot`: one odd pixel in a corner."""
    pixels = np.full((side, side, 3), 255, np.uint8)
    quarter = side // 4
    pixels[quarter : 2 * quarter, quarter : 3 * quarter] = 20
    pixels[2 * quarter : 3 * quarter, quarter : 3 * quarter] = (250, 150, 150)
    pixels[:blot, :blot] = 0
    return Image.fromarray(pixels)


def find_box(picture: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not nearly white."""
    rows, columns = np.nonzero(np.asarray(picture).min(2) < 230)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return from_pil(picture)[:, 0]


def make_sample(**changes) -> Sample:
    media = encode_picture(np.asarray(make_picture()))
    return replace(Sample("3D/1F600", "image", media, {"en": "3D grinning face"}, {"concept": "grinning face"}, "train"), **changes)


def test_training_pictures_are_there_at_every_size_and_nothing_else_changes():
    kept = [make_sample(id="3D/1F601", split="heldout_picture"), make_sample(id="animated/1F600", kind="video")]
    varied = list(vary_sizes([make_sample(), *kept], (1.0, 0.75, 0.5)))
    assert varied[3:] == kept
    assert [one.id for one in varied[:3]] == ["3D/1F600 1", "3D/1F600 0.75", "3D/1F600 0.5"]
    assert [replace(one, id="3D/1F600", media=b"-") for one in varied[:3]] == [make_sample(media=b"-")] * 3
    shares = [measure_size(read_image(one.media)[:, 0]) for one in varied[:3]]
    # The subject takes a quarter of the picture: 32, 24 and 16 of 64 pixels, and a softened edge of at most a pixel on each side.
    for share, side in zip(shares, (32, 24, 16), strict=True):
        assert (side / 64) ** 2 <= share <= ((side + 2) / 64) ** 2


@pytest.mark.parametrize("side", [64, 63])
@pytest.mark.parametrize("factor", [1.0, 0.83, 0.5, 0.001])
def test_a_smaller_picture_stays_in_the_middle_of_white(side, factor):
    picture = make_picture(side)
    small = shrink(picture, factor)
    assert small.size == picture.size
    if factor == 1:
        assert np.array_equal(np.asarray(small), np.asarray(picture))
    (left, top, right, bottom), (small_left, small_top, small_right, small_bottom) = (find_box(one) for one in (picture, small))
    for low, high, small_low, small_high in ((left, right, small_left, small_right), (top, bottom, small_top, small_bottom)):
        middle = side / 2 + ((low + high) / 2 - side / 2) * factor
        assert abs((small_low + small_high) / 2 - middle) <= 1
        assert abs((small_high - small_low) - (high - low) * factor) <= 3


def test_a_subject_cut_out_is_the_same_at_every_size():
    picture = make_picture()
    whole = crop_subject(to_tensor(picture))
    assert whole.shape == (3, 64, 64) and float(find_subject(whole).float().mean()) > 0.95
    for factor in (0.9, 0.6):
        small = to_tensor(shrink(picture, factor))
        assert float((crop_subject(small) - whole)[:, 8:-8, 8:-8].abs().mean()) < 0.1  # edges soften
        assert measure_likeness(small, to_tensor(picture)) > 0.95
    blotted = crop_subject(to_tensor(make_picture(blot=1)))
    torch.testing.assert_close(blotted, whole)  # one odd pixel is no subject
    assert float((crop_subject(to_tensor(make_picture(blot=3))) - whole).abs().mean()) > 0.3  # nine are
    upside_down = torch.flip(to_tensor(picture), (1,))
    assert measure_likeness(upside_down, to_tensor(picture)) < 0


def test_a_wide_subject_keeps_its_shape_and_a_blank_picture_stays():
    wide = torch.ones(3, 64, 64)
    wide[:, 30:40, 10:50] = -1  # 10 by 40: cut out, a quarter of a square
    cut = crop_subject(wide)
    assert measure_size(cut) == pytest.approx(0.25, abs=0.04)
    assert bool((cut[:, :20] > 0.9).all()) and bool((cut[:, 30:34] < -0.9).all())
    blank = torch.ones(3, 64, 64)
    assert torch.equal(crop_subject(blank), blank) and measure_likeness(blank, wide) == 0


@pytest.mark.parametrize("sizes", [(), (1.0, 1.0), (0.0,), (0.5, 1.5), (float("nan"),)])
def test_sizes_out_of_range_are_named(tmp_path, sizes):
    with pytest.raises(InputError, match=re.escape(f"--sizes are {sizes}")):
        VarySizes(tmp_path / "a", tmp_path / "b", sizes)


def test_a_file_that_is_missing_is_named_and_nothing_is_written(tmp_path):
    script = [sys.executable, sys.modules["vary_sizes"].__file__, "nowhere.parquet", "sizes.parquet"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: samples file 'nowhere.parquet' is missing; it must be a Parquet file\n"
    assert list(tmp_path.iterdir()) == []
