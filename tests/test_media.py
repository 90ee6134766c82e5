"""media.py on real files made here by PIL and PyAV, on hostile mutations of them, and against PIL and the published preprocessing."""

import io
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from openemu3 import media
from openemu3.records import InputError


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def make_picture(height=40, width=56, seed=0):
    """A smooth colour picture whose four corners differ, so that any wrong turn shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = rows * 255 / max(height - 1, 1), columns * 255 / max(width - 1, 1)
    blue = np.random.default_rng(seed).integers(0, 256) * np.ones_like(red)
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def make_video(num_frames=16, fps=8, height=64, width=96, times=None, format="mp4", rotation=0):
    """A file whose frame i is all grey level 12 * i; `times` are presentation times in milliseconds."""
    buffer = io.BytesIO()
    container = av.open(buffer, "w", format=format)
    stream = container.add_stream("libx264", rate=Fraction(fps))
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    clock = 1 / Fraction(fps) if times is None else Fraction(1, 1000)
    stream.codec_context.time_base = clock
    if rotation:
        stream.set_display_rotation(rotation)
    for index in range(num_frames):
        frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 12 * index % 252, np.uint8), format="rgb24")
        frame.pts = index if times is None else times[index]
        frame.time_base = clock
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
    container.close()
    return buffer.getvalue()


def read_levels(pixels):
    """Which frame of `make_video` each frame is."""
    return [round(float(level)) for level in (pixels.mean(dim=(0, 2, 3)) + 1) * 127.5 / 12]


def as_bytes(pixels):
    return np.stack([np.array(frame) for frame in media.to_pil(pixels)])


# ------------------------------------------------------------------------------------------------------------------------ reading pictures


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_pictures_come_back_exactly(format, tmp_path):
    picture = make_picture()
    path = tmp_path / "picture"
    path.write_bytes(encode(picture, format))
    for source in (path, str(path), path.read_bytes()):
        pixels = media.read_image(source)
        assert pixels.shape == (3, 1, 40, 56) and pixels.dtype == torch.float32
        assert np.array_equal(as_bytes(pixels)[0], np.array(picture))
        assert -1 <= pixels.min() and pixels.max() <= 1


@pytest.mark.parametrize(("format", "tolerance"), [("JPEG", 6), ("WEBP", 8), ("AVIF", 6)])
def test_lossy_pictures_come_back_closely(format, tolerance):
    picture = make_picture()
    options = {"subsampling": 0} if format == "JPEG" else {}
    difference = as_bytes(media.read_image(encode(picture, format, quality=95, **options))).astype(int) - np.array(picture)
    assert np.abs(difference).mean() < tolerance


def test_black_and_white_are_the_ends_of_the_range():
    assert media.read_image(encode(Image.new("RGB", (2, 2), "black"), "PNG")).unique().tolist() == [-1.0]
    assert media.read_image(encode(Image.new("RGB", (2, 2), "white"), "PNG")).unique().tolist() == [1.0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    # What the viewer must see, and what a camera stores for each value (Exif 2.32: where row 0 and column 0 of the stored picture are).
    upright = np.array(make_picture(32, 48))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif.tobytes() if format != "TIFF" else exif, **options)
    pixels = as_bytes(media.read_image(data))[0]
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (6 if format == "JPEG" else 0)


def test_cmyk():
    for name, ink in {"red": (0, 255, 255, 0), "white": (0, 0, 0, 0), "black": (0, 0, 0, 255)}.items():
        pixels = as_bytes(media.read_image(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)))[0]
        expected = {"red": (255, 0, 0), "white": (255, 255, 255), "black": (0, 0, 0)}[name]
        assert np.abs(pixels.reshape(-1, 3).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits(format):
    values = np.array([[0, 257 * 10], [32768, 65535]], np.uint16)
    pixels = as_bytes(media.read_image(encode(Image.fromarray(values), format)))[0]
    assert pixels[..., 0].tolist() == [[0, 10], [128, 255]]
    assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])


def test_float_pictures_are_read_between_zero_and_one_only():
    pixels = as_bytes(media.read_image(encode(Image.fromarray(np.array([[0, 0.2], [0.6, 1.0]], np.float32)), "TIFF")))[0]
    assert pixels[..., 0].tolist() == [[0, 51], [153, 255]]
    for value in (1.5, -0.1, math.nan):
        with pytest.raises(InputError, match="allowed is 0 to 1"):
            media.read_image(encode(Image.fromarray(np.full((2, 2), value, np.float32)), "TIFF"))


def test_transparency_is_composited_on_white():
    rgba = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    for format in ("PNG", "TIFF"):
        pixels = as_bytes(media.read_image(encode(rgba, format)))[0]
        assert pixels[0, 0].tolist() == [255, 0, 0]
        assert pixels[0, 1].tolist() == [127, 127, 127]
        assert pixels[3, 3].tolist() == [255, 255, 255]


def test_transparent_palette_and_colour_key_are_white():
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 128, 0])
    palette.putpixel((0, 0), 0)
    pixels = as_bytes(media.read_image(encode(palette, "PNG", transparency=0)))[0]
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [0, 128, 0]
    grey = Image.fromarray(np.array([[0, 80], [80, 160]], np.uint8))
    assert as_bytes(media.read_image(encode(grey, "PNG", transparency=80)))[0, ..., 0].tolist() == [[0, 255], [255, 160]]
    deep = Image.fromarray(np.array([[0, 257], [257, 65535]], np.uint16))
    assert as_bytes(media.read_image(encode(deep, "PNG", transparency=257)))[0, ..., 0].tolist() == [[0, 255], [255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA"])
def test_few_colours(mode):
    pixels = as_bytes(media.read_image(encode(Image.new("L", (9, 5), 255).convert(mode), "PNG")))[0]
    assert pixels.shape == (5, 9, 3) and pixels.min() == 255


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(
        frames[0], format, save_all=True, append_images=frames[1:], duration=100, **({"lossless": True} if format == "WEBP" else {})
    )
    assert as_bytes(media.read_image(data))[0, 4, 4].tolist() == [255, 0, 0]


def test_one_pixel():
    pixels = media.read_image(encode(Image.new("RGB", (1, 1), (255, 0, 255)), "PNG"))
    assert pixels.flatten().tolist() == [1, -1, 1]


# ----------------------------------------------------------------------------------------------------------------------------- bad pictures


def make_png_header(width, height):
    """A PNG that states a size and holds nearly nothing: what a decompression bomb looks like before it goes off."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x\x9c")
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty: it has 0 bytes"),
        (b"hello, I am not a picture", "is not a picture that can be read: allowed are PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is not a picture"),
        (encode(make_picture(200, 200), "PNG")[:300], "damaged"),
        (encode(make_picture(200, 200), "JPEG")[:700], "damaged"),
        (encode(make_picture(200, 200), "WEBP")[:60], "damaged"),
        (make_png_header(9000, 9000), "too large: 9000x9000 pixels, at most 64000000"),
        (make_png_header(2_000_000, 2_000_000), "too large"),
        (make_png_header(64, 64), "damaged"),
    ],
)
def test_bad_pictures_are_one_sentence(data, words, tmp_path):
    path = tmp_path / "odd name.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        media.read_image(path)
    assert "odd name.png" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=words):
        media.read_image(data)


def test_sources_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        media.read_image(tmp_path / "missing.png")
    with pytest.raises(InputError, match="not a file"):
        media.read_image(tmp_path)
    with pytest.raises(InputError, match="not a file"):
        media.read_image("/dev/zero")
    with pytest.raises(InputError, match="null byte"):
        media.read_image("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        media.read_image(tmp_path / "pipe")


SEEDS = {
    "png": encode(make_picture(), "PNG"),
    "jpeg": encode(make_picture(), "JPEG", exif=(lambda exif: exif.__setitem__(0x0112, 6) or exif)(Image.Exif())),
    "webp": encode(make_picture(), "WEBP"),
    "gif": encode(make_picture(), "GIF", save_all=True, append_images=[make_picture(seed=1)], duration=100),
    "tiff": encode(make_picture(), "TIFF", compression="tiff_lzw"),
    "avif": encode(make_picture(), "AVIF"),
    "palette": encode(make_picture().convert("P"), "PNG", transparency=3),
    "bmp": encode(make_picture(), "BMP"),
    "mp4": make_video(8, height=32, width=32),
    "mkv": make_video(8, height=32, width=32, format="matroska"),
    "animated": encode(make_picture(), "WEBP", save_all=True, append_images=[make_picture(seed=1)], duration=100),
}


@st.composite
def damaged_files(draw):
    data = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(0, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    if draw(st.booleans()):
        position = draw(st.integers(0, len(data)))
        data[position:position] = draw(st.binary(max_size=20))
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=250, deadline=60_000)
@given(damaged_files())
def test_damaged_files_raise_only_input_error_and_never_hang(data):
    for read in (media.read_image, media.detect_kind, lambda data: media.read_video(data, fps=8, max_frames=20)[0]):
        try:
            result = read(data)
        except InputError as error:
            assert str(error) and "\n" not in str(error)
        else:
            if isinstance(result, torch.Tensor):
                assert result.shape[0] == 3 and torch.isfinite(result).all()


# -------------------------------------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),  # inside the bounds: only rounded to eights
        ((600, 604), (600, 608)),  # 604 / 8 = 75.5 rounds to the even 76
        ((2000, 2000), (1024, 1024)),  # shrunk by sqrt(4e6 / 2^20), rounded down
        ((100, 100), (512, 512)),  # grown by sqrt(2^18 / 1e4), rounded up
        ((720, 1280), (720, 1280)),
        ((100, 500), (232, 1152)),  # 5:1 is the longest allowed: 228.97.. and 1144.8.., up to eights
    ],
)
def test_fit_size_by_hand(size, expected):
    assert media.fit_size(*size) == expected


@given(
    st.integers(8, 5000), st.floats(1, 5), st.booleans(), st.sampled_from([(512 * 512, 1024 * 1024), (4096, 4096 * 4), (518400, 518400)])
)
def test_fit_size_properties(short, ratio, tall, bounds):
    size = (math.floor(short * ratio), short) if tall else (short, math.floor(short * ratio))
    height, width = media.fit_size(*size, *bounds)
    assert height % 8 == width % 8 == 0
    # Rounding up while growing may pass max_pixels only where the bounds leave no room, so the area is checked against the looser bound.
    assert height * width <= max(bounds[1], bounds[0] + 8 * (height + width))
    assert height * width >= min(bounds[0], bounds[1] - 8 * (height + width) - 64)
    assert abs(math.log((height / width) / (size[0] / size[1]))) < math.log(1 + 8 / min(height, width)) + 0.4 / (min(size) / 8)


@pytest.mark.parametrize(
    ("size", "words"), [((7, 30), "at least 8"), ((8, 41), "at most 5"), ((100, 10000), "at most 5"), ((1, 1), "at least 8")]
)
def test_fit_size_refuses(size, words):
    for height, width in (size, size[::-1]):
        with pytest.raises(InputError, match=words) as caught:
            media.fit_size(height, width)
        assert f"{width}x{height}" in str(caught.value)


def test_fit_size_refuses_impossible_bounds():
    with pytest.raises(InputError, match="min_pixels is 10 and max_pixels 5"):
        media.fit_size(64, 64, 10, 5)
    with pytest.raises(InputError, match="does not fit into max_pixels=60"):
        media.fit_size(64, 64, 1, 60)


@pytest.mark.parametrize("size", [(333, 500), (100, 120), (1500, 900), (512, 512)])
def test_preprocessing_equals_transformers(size):
    """The oracle differs in two of its settings from the published preprocessing (mean and std), which are given to it."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    oracle = Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    expected = torch.as_tensor(oracle(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"])
    pixels = media.preprocess_image(encode(picture, "PNG"))
    height, width = pixels.shape[2:]
    assert pixels.shape[1] == 1 and expected.shape[-2] >= height and expected.shape[-1] >= width
    assert torch.allclose(pixels[:, 0], expected.reshape(3, *expected.shape[-2:])[:, :height, :width], atol=1e-6)
    assert torch.equal(pixels, media.preprocess_image(picture))


@pytest.mark.parametrize("target", [(64, 64), (17, 91), (128, 160), (1, 1)])
def test_resize_equals_pil(target):
    source = torch.rand(3, 2, 80, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized = media.resize(source, target)
    assert resized.shape == (3, 2, *target)
    for channel in range(3):
        for frame in range(2):
            picture = Image.fromarray(source[channel, frame].numpy()).resize(target[::-1], Image.Resampling.BICUBIC)
            assert np.allclose(resized[channel, frame].numpy(), np.clip(np.array(picture), -1, 1), atol=1e-5)


def test_resize_keeps_the_range_and_refuses_nothing():
    sharp = torch.ones(3, 1, 8, 8)
    sharp[..., 4:] = -1
    assert media.resize(sharp, (64, 64)).abs().max() <= 1
    with pytest.raises(InputError, match="at least 1"):
        media.resize(sharp, (0, 8))


def test_pil_round_trip_is_exact_for_every_level():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert np.array_equal(np.array(media.to_pil(media.from_pil(levels))[0]), np.array(levels))
    assert media.from_pil([levels, levels]).shape == (3, 2, 16, 16)
    with pytest.raises(InputError, match="different sizes"):
        media.from_pil([levels, levels.resize((8, 8))])
    with pytest.raises(InputError, match=r"\[4, 1, 2, 2\]"):
        media.to_pil(torch.zeros(4, 1, 2, 2))


def test_values_out_of_range_are_clipped():
    assert np.array(media.to_pil(torch.full((3, 1, 1), 7.0))[0]).tolist() == [[[255, 255, 255]]]
    assert np.array(media.to_pil(torch.full((3, 1, 1), -7.0))[0]).tolist() == [[[0, 0, 0]]]


# ------------------------------------------------------------------------------------------------------------------------- reading videos


def test_read_video_gives_every_frame():
    pixels, fps = media.read_video(make_video())
    assert pixels.shape == (3, 16, 64, 96) and fps == 8
    assert read_levels(pixels) == list(range(16))


def test_probe_video():
    info = media.probe_video(make_video())
    assert (info.height, info.width, info.fps, info.seconds) == (64, 96, 8, 2)
    info = media.probe_video(make_video(format="matroska", rotation=90))
    assert (info.height, info.width) == (64, 96) or (info.height, info.width) == (96, 64)


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mpegts"])
@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [(8, 4, [0, 2, 4, 6, 8, 10, 12, 14]), (8, 16, [i // 2 for i in range(32)]), (15, 15, list(range(16)))],
)
def test_resampling_by_timestamps(format, source_fps, fps, expected):
    assert read_levels(media.read_video(make_video(fps=source_fps, format=format), fps=fps)[0]) == expected


def test_odd_rates_neither_drop_nor_repeat():
    """30000/1001 per second in milliseconds, in Matroska and in an MP4 made from it: rounding must not show a frame twice."""
    times = [round(index * 1001 / 30) for index in range(20)]
    for video in (
        make_video(20, fps=Fraction(30000, 1001), format="matroska"),
        make_video(20, fps=Fraction(30000, 1001), times=times, format="mp4"),
    ):
        assert read_levels(media.read_video(video, fps=30000 / 1001)[0]) == list(range(20))


def test_variable_rate_becomes_even():
    """Frames at 0, 100, 200, 700 and 800 ms, at 10 per second: frame 2 stands for half a second."""
    video = make_video(5, fps=10, times=[0, 100, 200, 700, 800], format="matroska")
    assert read_levels(media.read_video(video, fps=10)[0])[:9] == [0, 1, 2, 2, 2, 2, 2, 3, 4]
    assert read_levels(media.read_video(video)[0]) == [0, 1, 2, 3, 4]


def test_start_and_max_frames():
    video = make_video(20, fps=8)
    assert read_levels(media.read_video(video, start=1.0, max_frames=4)[0]) == [8, 9, 10, 11]
    assert read_levels(media.read_video(video, start=1.0, fps=4, max_frames=3)[0]) == [8, 10, 12]
    assert read_levels(media.read_video(video, start=1.06)[0])[0] == 8
    with pytest.raises(InputError, match="no frame at 9.0 s"):
        media.read_video(video, start=9.0)


def test_seeking_gives_what_decoding_from_the_beginning_gives(tmp_path):
    """Three hundred frames, key frames every 250: the start lies past the second one."""
    path = tmp_path / "long.mp4"
    noise = (
        torch.rand(3, 300, 8, 8, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    media.write_video(path, noise, 30)
    everything, _ = media.read_video(path)
    assert everything.shape[1] == 300
    for start in (0.5, 8.5, 9.9):
        assert torch.equal(media.read_video(path, start=start)[0], everything[:, round(start * 30) :])


def test_frames_come_with_their_times():
    video = make_video(5, fps=10, times=[0, 100, 200, 700, 800], format="matroska")
    frames = list(media.stream_frames(video))
    assert [float(frame.time) for frame in frames] == [0, 0.1, 0.2, 0.7, 0.8]
    assert np.array_equal(np.stack([frame.array for frame in frames]), as_bytes(media.read_video(video)[0]))
    evenly = list(media.stream_frames(video, fps=10, start=0.2, max_frames=4))
    assert [float(frame.time) for frame in evenly] == pytest.approx([0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("rotation", [0, 90])
def test_frames_shrink_while_they_are_decoded(rotation):
    """Against the mean over blocks, computed from the full frames; grey, so that half-resolution colours play no part."""
    video = make_video(3, height=64, width=96, rotation=rotation)
    small = [frame.array for frame in media.stream_frames(video, short_edge=16)]
    full = as_bytes(media.read_video(video)[0]).astype(float)
    blocks = full.reshape(3, full.shape[1] // 4, 4, full.shape[2] // 4, 4, 3).mean(axis=(2, 4))
    assert small[0].shape == ((16, 24, 3) if rotation == 0 else (24, 16, 3))
    assert np.abs(np.stack(small) - blocks).max() <= 2
    assert [frame.array.shape for frame in media.stream_frames(video, short_edge=999)] == [full.shape[1:]] * 3
    with pytest.raises(InputError, match="short_edge is 0"):
        next(media.stream_frames(video, short_edge=0))


def test_frames_of_an_animation_shrink_too():
    animation = media.encode_animation(torch.rand(3, 4, 32, 48, generator=torch.Generator().manual_seed(0)).mul(2).sub(1), 8, "WEBP")
    small = [frame.array for frame in media.stream_frames(animation, short_edge=8)]
    full = as_bytes(media.read_video(animation)[0]).astype(float)
    assert np.abs(np.stack(small) - full.reshape(4, 8, 4, 12, 4, 3).mean(axis=(2, 4))).max() <= 1


def test_streams_without_timestamps_run_at_the_stated_rate():
    raw = make_video(10, fps=25, format="h264")
    assert read_levels(media.read_video(raw)[0]) == list(range(10))
    assert read_levels(media.read_video(raw, start=0.16, max_frames=2)[0]) == [4, 5]


@pytest.mark.parametrize("format", ["mp4", "mov"])
def test_rotation(format):
    """A stored picture whose left half is white, turned a quarter clockwise, has its top half white; counter-clockwise, its bottom half."""
    frames = torch.full((3, 4, 32, 64), -1.0)
    frames[..., :32] = 1
    for degrees, expected in ((-90, "top"), (90, "bottom"), (180, "right")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=format) as container:
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
            stream.set_display_rotation(degrees)
            for frame in as_bytes(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        pixels, _ = media.read_video(buffer.getvalue())
        height, width = pixels.shape[2:]
        bright = {
            "top": pixels[:, :, : height // 2],
            "bottom": pixels[:, :, height // 2 :],
            "left": pixels[..., : width // 2],
            "right": pixels[..., width // 2 :],
        }
        assert (height, width) == ((32, 64) if degrees == 180 else (64, 32))
        assert max(bright, key=lambda side: bright[side].mean()) == expected, degrees
        assert media.probe_video(buffer.getvalue()).height == height


def test_rotation_by_the_matrix_of_the_mp4_itself():
    """The matrix phones write for a portrait film, (0 1; -1 0): stored x goes down and stored y goes left, so left becomes top."""
    frames = torch.full((3, 4, 32, 64), -1.0)
    frames[..., :32] = 1
    data = bytearray(make_bytes_of_video(frames))
    header = data.index(b"tkhd") + 4
    matrix = header + 4 + 8 + 4 + 4 + 4 + 8 + 2 + 2 + 2 + 2  # version 0: flags, times, id, reserved, duration, reserved, layer ... volume
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    pixels, _ = media.read_video(bytes(data))
    assert pixels.shape[2:] == (64, 32)
    assert pixels[:, :, :32].mean() > 0.9 and pixels[:, :, 32:].mean() < -0.9


def make_bytes_of_video(frames):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        for frame in as_bytes(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_are_videos(format):
    frames = [Image.new("RGB", (10, 6), (level, level, level)) for level in (0, 24, 48, 96)]
    durations = [100, 100, 200, 100]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)
    assert media.detect_kind(data) == "video"
    assert media.probe_video(data) == media.VideoInfo(6, 10, 8.0, 0.5)
    assert read_levels(media.read_video(data, fps=10)[0]) == [0, 2, 4, 4, 8]
    assert read_levels(media.read_video(data)[0]) == [0, 2, 4, 8]
    assert read_levels(media.read_video(data, fps=10, start=0.2)[0]) == [4, 4, 8]


def test_stream_equals_whole_and_chunks_are_bounded():
    video = make_video(20)
    chunks = list(media.stream_video(video, chunk_frames=6))
    assert [chunk.shape[1] for chunk in chunks] == [6, 6, 6, 2]
    assert torch.equal(torch.cat(chunks, 1), media.read_video(video)[0])


MEASURE_PEAK = """
    import resource, sys
    from openemu3 import media
    total = sum(chunk.shape[1] for chunk in media.stream_video(sys.argv[1], chunk_frames=4))
    print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks = []
    for num_frames in (24, 240):
        path = tmp_path / f"{num_frames}.mp4"
        media.write_video(path, (torch.full((3, 8, 240, 320), chunk % 2 - 0.5) for chunk in range(num_frames // 8)), 24)
        output = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURE_PEAK), str(path)], capture_output=True, text=True, check=True
        )
        total, peak = map(int, output.stdout.split())
        assert total == num_frames
        peaks.append(peak / 1024)
    # All 240 frames at once would be 221 MB as float32.
    assert peaks[1] - peaks[0] < 40


def test_detect_kind():
    assert media.detect_kind(SEEDS["png"]) == "image"
    assert media.detect_kind(SEEDS["mp4"]) == "video"
    with pytest.raises(InputError, match="not a video that can be read"):
        media.detect_kind(b"neither the one nor the other")


def test_detect_kind_of_a_file_whose_name_is_wrong(tmp_path):
    path = tmp_path / "notes.PNG"
    path.write_text("no picture")
    with pytest.raises(InputError, match="'.*notes.PNG' is not a picture that can be read, though its name says so"):
        media.detect_kind(path)
    path.write_bytes(SEEDS["jpeg"])
    assert media.detect_kind(path) == "image"


def make_sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"no video at all, only words", "not a video that can be read"),
        (make_video()[:600], "not a video|damaged|no frames"),
        (make_sound(), "no pictures in it"),
        (encode(make_picture(), "PNG"), "is a still picture"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n", "not a video that can be read"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "not a video that can be read"),
    ],
)
def test_bad_videos_are_one_sentence(data, words, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    for read in (media.read_video, media.probe_video):
        with pytest.raises(InputError, match=words) as caught:
            read(path)
        assert "clip.mp4" in str(caught.value) and "\n" not in str(caught.value)


def test_video_that_states_frames_and_has_none():
    """A real MP4 whose samples were cut out of the middle: the index promises sixteen frames, the data are gone."""
    data = make_video(format="matroska", num_frames=1)
    cluster = data.index(b"\x1f\x43\xb6\x75")
    with pytest.raises(InputError, match="no frames|not a video|damaged"):
        media.read_video(data[:cluster], fps=8)


def test_bad_arguments():
    video = make_video(4)
    for fps in (0, -1, math.nan, math.inf, 5000):
        with pytest.raises(InputError, match="fps is"):
            media.read_video(video, fps=fps)
    for start in (-1, math.nan, math.inf):
        with pytest.raises(InputError, match="start is"):
            media.read_video(video, start=start)
    with pytest.raises(InputError, match="at least 1"):
        media.read_video(video, max_frames=0)


def test_a_timestamp_far_away_is_refused_not_waited_for():
    video = make_video(3, fps=10, times=[0, 100, 10_000_000], format="matroska")
    began = time.monotonic()
    with pytest.raises(InputError, match="timestamps .* jump from 0.10 s to 10000.00 s"):
        media.read_video(video, fps=10)
    assert time.monotonic() - began < 5


def test_too_long_to_read_at_once(monkeypatch):
    monkeypatch.setattr(media, "MAX_CLIP_PIXELS", 64 * 96 * 10)
    with pytest.raises(InputError, match="stream_video"):
        media.read_video(make_video(32))
    assert media.read_video(make_video(32), max_frames=10)[0].shape[1] == 10


# ---------------------------------------------------------------------------------------------------------------------------------- writing


def make_clip(num_frames=12, height=32, width=48):
    """A bright square that moves to the right."""
    clip = torch.full((3, num_frames, height, width), -0.6)
    for index in range(num_frames):
        clip[0, index, 8:24, 2 + 2 * index : 18 + 2 * index] = 0.9
    return clip


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".PNG"])
def test_write_image(suffix, tmp_path):
    path = tmp_path / "new" / f"picture{suffix}"
    pixels = media.from_pil(make_picture())
    media.write_image(path, pixels)
    assert (media.read_image(path) - pixels).abs().mean() < (1e-6 if suffix.lower() == ".png" else 0.05)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("suffix", "fps"), [(".gif", 8), (".gif", 24), (".webp", 8), (".webp", 30)])
def test_write_animation(suffix, fps, tmp_path):
    path, clip = tmp_path / f"clip{suffix}", make_clip()
    media.write_animation(path, clip, fps)
    pixels, _ = media.read_video(path)
    assert pixels.shape == clip.shape
    assert (pixels - clip).abs().mean() < 0.06
    # GIF counts in hundredths of a second and WebP in thousandths; the whole clip still has its true length to one such unit.
    assert media.probe_video(path).seconds == pytest.approx(12 / fps, abs=0.0051)
    with Image.open(path) as image:
        assert image.info["loop"] == 0


def test_write_animation_of_one_frame_or_too_fast(tmp_path):
    media.write_animation(tmp_path / "one.webp", make_clip(1), 8)
    assert media.read_image(tmp_path / "one.webp").shape == (3, 1, 32, 48)
    with pytest.raises(InputError, match="60 frames per second are not possible in GIF: .* at most 50"):
        media.write_animation(tmp_path / "fast.gif", make_clip(), 60)
    assert not (tmp_path / "fast.gif").exists()


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47), (1, 1)])
def test_write_video(height, width, tmp_path):
    path, clip = tmp_path / "clip.mp4", media.resize(make_clip(), (height, width))
    media.write_video(path, clip, 12)
    pixels, fps = media.read_video(path)
    assert fps == 12 and pixels.shape == (3, 12, height + height % 2, width + width % 2)
    assert (pixels[:, :, :height, :width] - clip).abs().mean() < 0.12
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1  # BT.709, as it was converted


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 64, 200)])
def test_video_keeps_colours(colour, tmp_path):
    media.write_video(tmp_path / "colour.mp4", media.from_pil([Image.new("RGB", (64, 64), colour)] * 3), 8)
    pixels, _ = media.read_video(tmp_path / "colour.mp4")
    assert np.abs(as_bytes(pixels).reshape(-1, 3).astype(int) - colour).max() <= 4


def test_write_video_streams_chunks(tmp_path):
    clip = make_clip(12)
    media.write_video(tmp_path / "whole.mp4", clip, 8)
    media.write_video(tmp_path / "chunks.mp4", iter(clip.split(5, dim=1)), 8)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "chunks.mp4").read_bytes()


def test_refused_writes_leave_what_was_there(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"before")
    with pytest.raises(InputError, match="there are no frames"):
        media.write_video(path, iter([]), 8)
    with pytest.raises(InputError, match="follow frames of"):
        media.write_video(path, iter([make_clip(), make_clip(height=64)]), 8)

    def fail():
        yield make_clip()
        raise RuntimeError("the model stopped")

    with pytest.raises(RuntimeError, match="the model stopped"):
        media.write_video(path, fail(), 8)
    with pytest.raises(InputError, match=r"must end in \.mp4"):
        media.write_video(tmp_path / "clip.avi", make_clip(), 8)
    with pytest.raises(InputError, match="must end in .png or"):
        media.write_image(tmp_path / "picture.tga", make_clip(1))
    with pytest.raises(InputError, match="12 frames"):
        media.write_image(tmp_path / "picture.png", make_clip())
    with pytest.raises(InputError, match="frames per second"):
        media.write_video(path, make_clip(), 0)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["clip.mp4"]


FILL_THE_DISK = """
    import resource, signal, sys, torch
    from pathlib import Path
    from openemu3 import media
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # past the limit, a write fails with its reason, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    noise = torch.rand(3, 8, 128, 128) * 2 - 1
    for name, write in {
        "p.png": lambda path: media.write_image(path, noise[:, :1]),
        "p.webp": lambda path: media.write_animation(path, noise, 8),
        "p.gif": lambda path: media.write_animation(path, noise, 8),
        "p.mp4": lambda path: media.write_video(path, noise, 8),
    }.items():
        try:
            write(Path(sys.argv[1]) / name)
        except OSError as error:
            print(error)
        else:
            print("written")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no file size limits to test with")
def test_no_space_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(FILL_THE_DISK), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ["p.png", "p.webp", "p.gif", "p.mp4"]
    assert output.splitlines() == [f"cannot write {tmp_path / name}: File too large; nothing was left behind" for name in names]
    assert os.listdir(tmp_path) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write .*picture.png"):
        media.write_image(tmp_path / "file" / "picture.png", make_clip(1))
