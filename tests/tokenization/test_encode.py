"""Samples become documents: their words, their codes, both orders, clips with strides and groups of frames that aren't full."""

import io
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from openemu3.media import read_image
from openemu3.records import Document, Image, InputError, Sample, Text, Video
from openemu3.tokenization.encode import EncodeConfig, encode_samples, read_clip
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = VisionTokenizerConfig(64, channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_norm_groups=4)
    tokenizer = VisionTokenizer(config)
    with torch.no_grad():  # codes that lie among the latents, so that different pictures have different ones
        latents = tokenizer.encode_latents(torch.rand(2, 3, 16, 32, 32) * 2 - 1).movedim(1, -1).flatten(0, -2)  # [128, 4]
        tokenizer.quantize.embedding.weight.copy_(latents[::2])
    return tokenizer


def make_still(number, size=(16, 24)):
    array = np.random.default_rng(number).integers(0, 255, (size[0] // 8, size[1] // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(array).resize((size[1], size[0]), Pillow.Resampling.NEAREST).save(buffer, "PNG")
    captions = {"en": f"apple number {number}", "zh": "一个红苹果", "de": "ein Apfel"}
    return Sample(f"still-{number}", "image", buffer.getvalue(), captions, {}, "train" if number % 2 else "heldout")


def make_clip(number, num_frames, repeat=1):
    levels = np.random.default_rng(number).integers(0, 255, num_frames)
    frames = [Pillow.new("RGB", (16, 16), (int(level), 30 * (index // repeat) % 255, 99)) for index, level in enumerate(levels)]
    if repeat > 1:
        frames = [frames[index // repeat * repeat] for index in range(num_frames)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    return Sample(f"clip-{number}", "video", buffer.getvalue(), {"en": f"clip number {number}"}, {"fps": "8"}, "train")


def encode(samples, tokenizer, form, **config):
    return list(encode_samples(samples, tokenizer, form, EncodeConfig(**config)))


def read(form, document):
    return form.decode(document.encoded.token_ids, document.encoded.roles)


def test_a_still_gives_both_orders_in_each_language(tokenizer, small_format):
    sample = make_still(3)
    documents = encode([sample], tokenizer, small_format)
    codes = tokenizer.encode_image(read_image(sample.media).transpose(0, 1))[0].numpy()
    assert codes.shape == (2, 3) and len(np.unique(codes)) > 3
    picture = Image(codes)
    expected = []
    for words in ("apple number 3", "一个红苹果"):
        expected += [("draw", Document((Text(words), picture))), ("describe", Document((picture, Text(words, target=True))))]
    assert [(document.source, read(small_format, document)) for document in documents] == expected
    assert {(document.sample_id, document.split) for document in documents} == {("still-3", "train")}


def test_languages_are_those_wanted_and_those_there_are(tokenizer, small_format):
    samples = [make_still(1), make_clip(2, 4)]
    documents = encode(samples, tokenizer, small_format, languages=("de",))
    assert [(d.source, d.sample_id) for d in documents] == [("draw", "still-1"), ("describe", "still-1")]
    assert read(small_format, documents[0]).parts[0] == Text("ein Apfel")


def test_batches_change_nothing_and_the_order_is_the_samples(tokenizer, small_format):
    """Stills of two sizes with a clip among them."""
    samples = [make_still(0), make_still(1), make_still(2, (24, 16)), make_clip(3, 8), make_still(4, (24, 16)), make_still(5)]
    whole = encode(samples, tokenizer, small_format, batch_size=16)
    assert [name for name, _ in groupby(document.sample_id for document in whole)] == [sample.id for sample in samples]
    for batch_size in (1, 2):
        found = encode(samples, tokenizer, small_format, batch_size=batch_size)
        assert [read(small_format, d) for d in found] == [read(small_format, d) for d in whole]
    assert {d.split for d in whole if d.sample_id == "still-0"} == {"heldout"}


def test_samples_are_taken_as_a_stream(tokenizer, small_format):
    taken = []

    def stream():
        for number in range(100):
            taken.append(number)
            yield make_still(number)

    documents = encode_samples(stream(), tokenizer, small_format, EncodeConfig(batch_size=4))
    next(documents)
    assert len(taken) <= 5


@pytest.mark.parametrize(
    ("num_frames", "starts"),
    [(16, [0]), (23, [0]), (24, [0, 8]), (31, [0, 8]), (40, [0, 8, 16, 24])],
)
def test_clips_of_a_video(tokenizer, small_format, num_frames, starts):
    """Clips of 16 frames, every eighth frame; what is left after the last whole one is in no document."""
    sample = make_clip(1, num_frames)
    documents = encode([sample], tokenizer, small_format)
    frames, fps = read_clip(sample)
    assert fps == 8 and frames.shape[1] == num_frames
    assert [d.source for d in documents] == ["film", "describe_video"] * len(starts)
    for start, drawn, described in zip(starts, documents[::2], documents[1::2], strict=True):
        codes = tokenizer.encode_video(frames[None, :, start : start + 16])[0].numpy()
        video = Video(codes, 8, 16)
        assert codes.shape == (4, 2, 2) and len(np.unique(codes)) > 3
        assert read(small_format, drawn) == Document((Text("clip number 1"), video))
        assert read(small_format, described) == Document((video, Text("clip number 1", target=True)))


@pytest.mark.parametrize(("num_frames", "latents"), [(1, 1), (3, 1), (4, 1), (5, 2), (10, 3)])
def test_a_group_that_is_not_full_is_filled_and_says_so(tokenizer, small_format, num_frames, latents):
    sample = make_clip(2, num_frames + 1)  # one frame alone would be a still picture in a WebP
    frames, _ = read_clip(sample)
    documents = encode([sample], tokenizer, small_format, clip_frames=num_frames, clip_stride=99)
    video = read(small_format, documents[0]).parts[1]
    assert video.grid == (latents, 2, 2) and video.num_frames == num_frames
    filled = torch.cat([frames[:, :num_frames], frames[:, num_frames - 1 : num_frames].expand(-1, -num_frames % 4, -1, -1)], 1)
    assert np.array_equal(video.codes, tokenizer.encode_video(filled[None])[0].numpy())


def test_frames_that_stand_still_count_at_the_samples_rate(tokenizer, small_format):
    """The file holds five long frames; at 8 a second they are ten."""
    sample = make_clip(4, 10, repeat=2)
    assert read_clip(sample)[0].shape[1] == 10
    video = read(small_format, encode([sample], tokenizer, small_format)[0]).parts[1]
    assert (video.num_frames, video.fps) == (10, 8)
    plain = Sample(sample.id, "video", sample.media, sample.captions, {}, "train")
    assert read_clip(plain)[0].shape[1] == 5


@pytest.mark.parametrize("rate", ["fast", "nan", "0", "-8"])
def test_a_rate_that_is_none_is_told(rate):
    sample = make_clip(5, 4)
    broken = Sample(sample.id, "video", sample.media, sample.captions, {"fps": rate}, "train")
    with pytest.raises(InputError, match=f"video sample 'clip-5' of rate {rate} cannot be read"):
        read_clip(broken)


def test_a_sample_without_captions_gives_no_document(tokenizer, small_format):
    sample = make_still(1)
    silent = Sample(sample.id, "image", sample.media, {"en": ""}, {}, "train")
    assert encode([silent], tokenizer, small_format) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"clip_frames": 0}, "clip_frames is 0"),
        ({"clip_stride": 0}, "clip_stride is 0"),
        ({"languages": ()}, "languages is empty"),
    ],
)
def test_impossible_settings(config, message):
    with pytest.raises(InputError, match=message):
        EncodeConfig(**config)


def test_pictures_that_are_none_are_told(tokenizer, small_format):
    with pytest.raises(InputError):
        encode([Sample("broken", "image", b"nothing", {"en": "a"}, {}, "train")], tokenizer, small_format)
    with pytest.raises(InputError, match="multiples of 8"):
        encode([make_still(1, (16, 16)), make_odd()], tokenizer, small_format)


def make_odd():
    buffer = io.BytesIO()
    Pillow.new("RGB", (17, 16)).save(buffer, "PNG")
    return Sample("odd", "image", buffer.getvalue(), {"en": "a"}, {}, "train")
