"""Samples become documents: their words, their codes, both orders, clips with strides and groups of frames that aren't full."""

import io
import itertools
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from openemu3.media import preprocess_image, read_image, read_video, resize, write_video
from openemu3.records import Document, Image, InputError, Sample, Text, Video
from openemu3.tokenization import encode as encode_module
from openemu3.tokenization.encode import (
    CHUNK_FRAMES,
    GROUP_BATCHES,
    READ_AHEAD,
    EncodeConfig,
    Item,
    Refusal,
    encode_clips,
    encode_items,
    encode_samples,
    read_clip,
)
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


def encode_all(items, tokenizer, form, **config):
    """(documents, refusals)."""
    refusals = []
    return list(encode_items(items, tokenizer, form, EncodeConfig(**config), refusals.append)), refusals


def test_languages_are_those_wanted_and_those_there_are(tokenizer, small_format):
    items = [Item.from_sample(sample) for sample in (make_still(1), make_clip(2, 4))]
    documents, refusals = encode_all(items, tokenizer, small_format, languages=("de",))
    assert [(d.source, d.sample_id) for d in documents] == [("draw", "still-1"), ("describe", "still-1")]
    assert read(small_format, documents[0]).parts[0] == Text("ein Apfel")
    assert refusals == [Refusal("clip-2", "it has no caption in de; the languages of its captions: en")]


def test_a_caption_of_no_stated_language_is_always_used(tokenizer, small_format):
    item = Item("a", "image", make_still(1).media, {"und": "a cat"}, dataset="pets")
    documents, refusals = encode_all([item], tokenizer, small_format, languages=("zh",))
    assert [(d.source, d.dataset, d.split, d.grids) for d in documents] == [
        ("draw", "pets", "train", ((2, 3),)),
        ("describe", "pets", "train", ((2, 3),)),
    ]
    assert not refusals


def test_texts_alone_are_targets(tokenizer, small_format):
    items = [
        Item("1", "text", None, {"und": "the smiling cat"}),
        Item("2", "text", None, {"und": "一个红苹果"}),
        Item("3", "text", None, {"und": ""}),
    ]
    documents, refusals = encode_all(items, tokenizer, small_format)
    assert [read(small_format, d) for d in documents] == [
        Document((Text(text, target=True),)) for text in ("the smiling cat", "一个红苹果")
    ]
    assert [(d.source, d.grids) for d in documents] == [("text", ())] * 2
    assert [refusal.sample_id for refusal in refusals] == ["3"] and "empty" in refusals[0].reason


@pytest.mark.parametrize(("generation", "understanding"), [(0.7, 0.3), (1.0, 0.25), (0.0, 1.0), (0.3, 0.3)])
def test_shares_of_the_two_orders(tokenizer, small_format, generation, understanding):
    """Where they add up to 1, each caption is written one way; where they exceed it, some are written both ways."""
    media = make_still(1).media
    items = [Item(f"{number}", "image", media, {"en": "a", "zh": "b"}) for number in range(150)]
    shares = {"generation_share": generation, "understanding_share": understanding}
    documents, _ = encode_all(items, tokenizer, small_format, **shares)
    drawn, described = (
        {(d.sample_id, read(small_format, d).parts[place].text) for d in documents if d.source == source}
        for source, place in (("draw", 0), ("describe", 1))
    )
    for found, share in ((drawn, generation), (described, understanding)):
        assert abs(len(found) - 300 * share) <= 4 * (300 * share * (1 - share)) ** 0.5
    both = generation + understanding - 1
    assert bool(drawn & described) is (both > 0)
    assert (len(drawn | described) == 300) is (both >= 0)
    again, _ = encode_all(items[70:], tokenizer, small_format, **shares)  # it depends on the sample, not on its place
    assert [(d.source, d.sample_id) for d in again] == [(d.source, d.sample_id) for d in documents if int(d.sample_id) >= 70]


def test_batches_change_nothing_and_the_order_is_the_samples(tokenizer, small_format):
    """Stills of two sizes with a clip among them; a picture has 6 codes."""
    samples = [make_still(0), make_still(1), make_still(2, (24, 16)), make_clip(3, 8), make_still(4, (24, 16)), make_still(5)]
    whole = encode(samples, tokenizer, small_format)
    assert [name for name, _ in groupby(document.sample_id for document in whole)] == [sample.id for sample in samples]
    for batch_tokens in (1, 12, 18):
        found = encode(samples, tokenizer, small_format, batch_tokens=batch_tokens)
        assert [read(small_format, d) for d in found] == [read(small_format, d) for d in whole]
    assert {d.split for d in whole if d.sample_id == "still-0"} == {"heldout"}


def test_samples_are_taken_as_a_stream(tokenizer, small_format):
    taken = []

    def stream():
        for number in range(100):
            taken.append(number)
            yield make_still(number)

    documents = encode_samples(stream(), tokenizer, small_format, EncodeConfig(batch_tokens=6))
    next(documents)
    assert len(taken) <= GROUP_BATCHES + READ_AHEAD + 1
    taken.clear()
    next(itertools.islice(documents, 4 * GROUP_BATCHES, None))  # a picture gives four documents
    assert len(taken) <= GROUP_BATCHES + 1


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


def test_samples_that_cannot_be_read_are_told_and_the_others_go_on(tokenizer, small_format):
    good = [Item.from_sample(sample) for sample in (make_still(0), make_clip(3, 8), make_still(1))]
    bad = {
        "broken": (Item("broken", "image", b"nothing", {"en": "a"}), "the picture of 7 bytes"),
        "odd": (Item("odd", "image", make_odd(), {"en": "a"}), "it has 16 x 17 pixels; both sides must be multiples of 8"),
        "silent": (Item("silent", "image", make_still(1).media, {"en": ""}), "it has no caption in en or zh; .* none"),
        "no film": (Item("no film", "video", b"nothing", {"en": "a"}, fps=8.0), "video"),
        "half": (Item("half", "video", make_clip(1, 8).media[:-40], {"en": "a"}, fps=8.0), "."),
        "gone": (Item("gone", "image", Path("nowhere.png"), {"en": "a"}), "nowhere.png"),
    }
    items = [good[0], *(item for item, _ in bad.values()), *good[1:]]
    documents, refusals = encode_all(items, tokenizer, small_format)
    assert [name for name, _ in groupby(d.sample_id for d in documents)] == ["still-0", "clip-3", "still-1"]
    assert sorted(refusal.sample_id for refusal in refusals) == sorted(bad)
    for refusal in refusals:
        assert re.search(bad[refusal.sample_id][1], refusal.reason), refusal


def test_one_bad_sample_ends_an_encoding_that_wants_them_all(tokenizer, small_format):
    with pytest.raises(InputError, match="sample 'odd' gives no document: it has 16 x 17 pixels"):
        encode([make_still(1), Sample("odd", "image", make_odd(), {"en": "a"}, {}, "train")], tokenizer, small_format)


def test_a_resolution_to_fit_everything_to(tokenizer, small_format):
    """Pictures as the published preprocessing makes them, frames likewise."""
    items = [Item("odd", "image", make_odd(40, 30), {"en": "a"}), Item.from_sample(make_clip(1, 8))]
    documents, refusals = encode_all(items, tokenizer, small_format, resolution=32)
    assert not refusals
    pixels = preprocess_image(make_odd(40, 30), 32 * 32, 32 * 32)
    assert np.array_equal(read(small_format, documents[0]).parts[1].codes, tokenizer.encode_image(pixels.transpose(0, 1))[0].numpy())
    frames = resize(read_video(make_clip(1, 8).media, fps=8)[0], (32, 32))
    assert np.array_equal(read(small_format, documents[2]).parts[1].codes, tokenizer.encode_video(frames[None])[0].numpy())
    assert documents[2].grids == ((2, 4, 4),)


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (12, 12), (8, 20), (20, 3), (None, 8)])
def test_clips_of_a_stream_are_those_of_the_whole_video(tokenizer, small_format, length, stride):
    sample = make_clip(1, 61)
    documents, _ = encode_all([Item.from_sample(sample)], tokenizer, small_format, clip_frames=length, clip_stride=stride)
    frames, _ = read_clip(sample)
    starts = [0] if length is None else range(0, 61 - length + 1, stride)
    assert len(documents) == 2 * len(starts)
    for start, document in zip(starts, documents[::2], strict=True):
        clip = frames[:, start : None if length is None else start + length]
        video = read(small_format, document).parts[1]
        assert np.array_equal(video.codes, tokenizer.encode_video(clip[None])[0].numpy()) and video.num_frames == clip.shape[1]


def test_a_long_video_takes_no_more_memory_than_a_short_one(tokenizer, tmp_path, monkeypatch):
    """No more frames are held than a clip, and the chunk that the decoder gives beyond it."""
    reach, held = encode_module._FrameWindow.reach, []

    def watch(self, stop):
        found = reach(self, stop)
        held.append(len(self.held))
        return found

    monkeypatch.setattr(encode_module._FrameWindow, "reach", watch)
    most = {}
    for seconds in (4, 24):
        path = tmp_path / f"{seconds}.mp4"
        write_video(path, (torch.rand(3, 8, 32, 32) * 2 - 1 for _ in range(seconds)), fps=8)
        for length, stride in ((16, 8), (16, 16), (None, 1)):
            held.clear()
            config = EncodeConfig(clip_frames=length, clip_stride=stride)
            num_clips = sum(1 for _ in encode_clips(Item("a", "video", path, {"en": "a"}), tokenizer, config))
            assert num_clips == (1 if length is None else 1 + (8 * seconds - length) // stride)
            most[seconds, length, stride] = max(held)
    for (_, length, stride), frames in most.items():
        assert frames <= (16 if length is None or stride >= length else length + CHUNK_FRAMES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"clip_frames": 0}, "clip_frames is 0"),
        ({"clip_stride": 0}, "clip_stride is 0"),
        ({"resolution": 0}, "resolution is 0"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"generation_share": 1.5}, "generation_share is 1.5"),
        ({"understanding_share": -0.1}, "understanding_share is -0.1"),
        ({"languages": ()}, "languages is empty"),
    ],
)
def test_impossible_settings(config, message):
    with pytest.raises(InputError, match=message):
        EncodeConfig(**config)


def make_odd(width=17, height=16):
    buffer = io.BytesIO()
    Pillow.linear_gradient("L").resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()
