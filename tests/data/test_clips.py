"""Batches of pixels: batch n depends on n alone, every sample comes once an epoch, and what augmentation may do."""

import io
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from openemu3.data.clips import PixelBatches, PixelBatchesConfig, augment, draw_without_repeats
from openemu3.records import InputError, Sample

SIDE = 16


def encode(frames):
    buffer = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    if len(pictures) == 1:
        pictures[0].save(buffer, "PNG")
    else:
        pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=125, lossless=True)
    return buffer.getvalue()


def make_frame(level):
    """One colour all over, but for a dark left column."""
    frame = np.full((SIDE, SIDE, 3), level, np.uint8)
    frame[:, 0] = 0
    return frame


def make_still(number):
    return Sample(f"still-{number}", "image", encode([make_frame(100 + number)]), {}, {}, "train")


def make_clip(number, num_frames=12, attributes=None):
    frames = [make_frame(20 * number + 5 + frame) for frame in range(num_frames)]
    return Sample(f"clip-{number}", "video", encode(frames), {}, attributes or {}, "train")


def read_levels(pixels):
    """The colour of every frame of [3, T, H, W], in 0 ... 255, from its middle."""
    return ((pixels[0, :, SIDE // 2, SIDE // 2] + 1) * 127.5).round().int().tolist()


@pytest.fixture(scope="module")
def samples():
    return [*(make_still(number) for number in range(7)), *(make_clip(number) for number in range(3))]


CONFIG = PixelBatchesConfig(images_per_batch=3, clips_per_batch=2, clip_frames=4, video_every=3, max_shift=2, seed=5)


def test_kinds_take_turns_and_shapes_are_as_told(samples):
    batches = list(islice(PixelBatches(samples, CONFIG)(0), 7))
    assert [batch.kind for batch in batches] == ["image", "image", "video", "image", "image", "video", "image"]
    for batch in batches:
        assert batch.pixels.shape == ((3, 3, 1, SIDE, SIDE) if batch.kind == "image" else (2, 3, 4, SIDE, SIDE))
        assert batch.pixels.dtype == torch.float32 and batch.pixels.abs().max() <= 1


def test_a_batch_depends_on_its_number_alone(samples):
    whole = list(islice(PixelBatches(samples, CONFIG)(0), 12))
    for position in (1, 2, 5, 11):
        (found,) = islice(PixelBatches(samples, CONFIG)(position), 1)
        assert found.kind == whole[position].kind and found.pixels.equal(whole[position].pixels)
    other = PixelBatches(samples, PixelBatchesConfig(**{**CONFIG.__dict__, "seed": 6})).build(0)
    assert not other.pixels.equal(whole[0].pixels)


def test_every_still_and_every_clip_comes_once_an_epoch(samples):
    stills, clips = [], []
    for batch in islice(PixelBatches(samples, CONFIG)(0), 21):  # 14 of stills, 7 of clips
        for item in batch.pixels:
            levels = read_levels(item)
            if batch.kind == "image":
                stills.append(levels[0])
            else:
                clips.append(levels[0] // 20)
                assert levels == list(range(levels[0], levels[0] + 4))  # frames in a row, none left out
    for drawn, number, name in ((stills, 7, "stills"), (clips, 3, "clips")):
        epochs = [drawn[first : first + number] for first in range(0, len(drawn) - number + 1, number)]
        assert all(len(set(epoch)) == number for epoch in epochs), name
        assert len({tuple(epoch) for epoch in epochs}) > 1, name  # not in the same order each time


def test_no_clips_when_none_are_wanted(samples):
    batches = PixelBatches(samples, PixelBatchesConfig(images_per_batch=7, video_every=0, max_shift=0))
    drawn = [level for batch in islice(batches(0), 4) for item in batch.pixels for level in read_levels(item)]
    assert Counter(drawn) == {100 + number: 4 for number in range(7)}


def test_clips_start_anywhere_and_short_ones_are_held():
    config = PixelBatchesConfig(images_per_batch=1, clips_per_batch=1, clip_frames=8, video_every=1, max_shift=0)
    starts = {read_levels(batch.pixels[0])[0] for batch in islice(PixelBatches([make_still(0), make_clip(0)], config)(0), 40)}
    assert starts == {5, 6, 7, 8, 9}  # of twelve frames
    short = PixelBatches([make_still(0), make_clip(1, num_frames=3)], config).build(0)
    assert read_levels(short.pixels[0]) == [25, 26, 27, 27, 27, 27, 27, 27]


def test_a_clip_is_read_at_the_rate_it_was_given():
    """Equal neighbours are one long frame in the file."""
    frames = [make_frame(level) for level in (50, 50, 50, 60, 60, 60)]
    clip = Sample("clip", "video", encode(frames), {}, {"fps": "8"}, "train")
    config = PixelBatchesConfig(images_per_batch=1, clips_per_batch=1, clip_frames=6, video_every=1, max_shift=0)
    assert read_levels(PixelBatches([make_still(0), clip], config).build(0).pixels[0]) == [50, 50, 50, 60, 60, 60]


def test_pictures_are_flipped_and_moved_and_nothing_else():
    """Without augmentation the dark column is at the left; the white that moves in has level 255."""
    pixels = torch.from_numpy(make_frame(100)).permute(2, 0, 1).unsqueeze(1) / 127.5 - 1  # [3, 1, H, W]
    seen = set()
    for number in range(300):
        moved = augment(pixels, np.random.default_rng(number), max_shift=2)
        assert moved.shape == pixels.shape
        row = moved[0, 0, SIDE // 2]
        dark = (row == -1).nonzero().flatten().tolist()
        white = (row == 1).nonzero().flatten().tolist()
        top, bottom = (moved[0, 0, edge, SIDE // 2].item() == 1 for edge in (0, SIDE - 1))
        assert not (top and bottom)
        seen.add((tuple(dark), tuple(white)))
    # Flipped or not, moved by -2 ... 2; the dark column may have left the picture.
    expected = set()
    for shift in range(-2, 3):
        for column in (0, SIDE - 1):
            place = column + shift
            white = tuple(range(shift)) if shift > 0 else tuple(range(SIDE + shift, SIDE))
            expected.add(((place,) if 0 <= place < SIDE else (), white))
    assert seen == expected


def test_frames_of_a_clip_move_together(samples):
    config = PixelBatchesConfig(images_per_batch=1, clips_per_batch=1, clip_frames=4, video_every=1, max_shift=4)
    for number in range(10):
        (clip,) = PixelBatches(samples, config).build(number).pixels
        dark = (clip[0] == -1).any(1)  # [T, W]
        white = (clip[0] == 1).any(1)
        assert dark.eq(dark[:1]).all() and white.eq(white[:1]).all()


def test_epochs_are_permutations():
    items = list("abcdefg")
    drawn = [draw_without_repeats(items, index, 3) for index in range(70)]
    epochs = ["".join(drawn[first : first + 7]) for first in range(0, 70, 7)]
    assert all(sorted(epoch) == items for epoch in epochs) and len(set(epochs)) > 5


def test_what_cannot_be(samples):
    with pytest.raises(InputError, match="no image samples"):
        PixelBatches([make_clip(0)], CONFIG)
    with pytest.raises(InputError, match="video_every is 3 but there are no video samples"):
        PixelBatches([make_still(0)], CONFIG)
    for name in ("images_per_batch", "clips_per_batch", "clip_frames"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            PixelBatchesConfig(**{name: 0})
    for name in ("video_every", "max_shift"):
        with pytest.raises(InputError, match=f"{name} is -1"):
            PixelBatchesConfig(**{name: -1})


def test_sizes_that_differ_are_told(samples):
    wide = Sample("wide", "image", encode([np.zeros((SIDE, 2 * SIDE, 3), np.uint8)]), {}, {}, "train")
    batches = PixelBatches([samples[0], wide], PixelBatchesConfig(images_per_batch=2, video_every=0))
    with pytest.raises(InputError, match="16 x (16|32) pixels and '(wide|still-0)' 16 x (16|32); all must be of one size"):
        batches.build(0)


def test_a_damaged_picture_is_told_when_its_turn_comes(samples):
    broken = Sample("broken", "image", b"nothing", {}, {}, "train")
    with pytest.raises(InputError):
        list(islice(PixelBatches([broken], PixelBatchesConfig(images_per_batch=1, video_every=0))(0), 2))
