"""Records are valid once they exist, equal by value, and normalised at construction."""

import dataclasses

import numpy as np
import pytest

import openemu3
from openemu3.records import Document, Image, InputError, Sample, Text, Video

CODES = np.arange(6).reshape(2, 3)
FRAMES = np.arange(12).reshape(2, 2, 3)


def test_text_is_nfc():
    assert Text("cafe\u0301") == Text("caf\u00e9")
    assert Text("a", target=True) != Text("a")


def test_images_compare_by_value_and_convert():
    image = Image(CODES.astype(np.uint16))
    assert image.codes.dtype == np.int32
    assert image.grid == (2, 3)
    assert image == Image(CODES)
    assert image != Image(CODES + 1)
    assert image != Image(CODES.T)
    assert Document((Text("a"), image)) == Document([Text("a"), Image(CODES)])


def test_an_image_does_not_share_memory_with_an_array_of_another_type():
    codes = CODES.copy()
    image = Image(codes)
    codes[0, 0] = 99
    assert image.codes[0, 0] == 0


def test_videos_compare_by_value_and_keep_fps_to_a_thousandth():
    video = Video(FRAMES, 24000 / 1001)
    assert (video.fps, video.num_frames, video.grid) == (23.976, 8, (2, 2, 3))
    assert video == Video(FRAMES, 23.976, 8)
    assert video != Video(FRAMES, 24)
    assert video != Video(FRAMES, 23.976, 7)
    assert video != Video(FRAMES + 1, 23.976)
    assert Video(FRAMES, 8, num_frames=5).seconds == 0.625
    assert dataclasses.replace(video, fps=8).fps == 8.0
    assert video != Image(CODES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Text(""), "text is empty"),
        (lambda: Text(b"a"), "text is bytes; it must be a str"),
        (lambda: Text("ab\ud800"), "lone surrogate U\\+D800 at index 2"),
        (lambda: Image(np.zeros((0, 3), int)), r"image codes have shape \[0, 3\]; they must be \[h, w\]"),
        (lambda: Image(FRAMES), r"shape \[2, 2, 3\]; they must be \[h, w\]"),
        (lambda: Video(CODES, 8), r"video codes have shape \[2, 3\]; they must be \[t, h, w\]"),
        (lambda: Image(CODES / 2), "image codes are float64; they must be integers"),
        (lambda: Image(CODES - 1), "image codes hold -1"),
        (lambda: Image(CODES + 2**31), "image codes hold 2147483653"),
        (lambda: Video(FRAMES, 0), "fps is 0; allowed is 0.001 to 999.999"),
        (lambda: Video(FRAMES, float("nan")), "fps is nan"),
        (lambda: Video(FRAMES, float("inf")), "fps is inf"),
        (lambda: Video(FRAMES, 0.0004), "fps is 0.0004"),
        (lambda: Video(FRAMES, 1000), "fps is 1000"),
        (lambda: Video(FRAMES, 8, 4), "num_frames is 4; a video of 2 latent frames has 5 to 8 pixel frames"),
        (lambda: Video(FRAMES, 8, 9), "num_frames is 9"),
        (lambda: Video(FRAMES, 8, 6.5), "num_frames is 6.5"),
        (lambda: Document(()), "document has no parts"),
        (lambda: Document(("a",)), "document part 0 is str"),
        (lambda: Document((Image(CODES), Text("a"), Text("b"))), "parts 1 and 2 are both texts with target=False"),
    ],
)
def test_what_is_not_valid_does_not_come_to_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_neighbouring_texts_may_differ_in_target():
    assert len(Document((Text("a"), Text("b", target=True), Text("c"))).parts) == 3


SAMPLE = Sample("1f600", "image", b"RIFF", {"en": "grinning face", "zh": "嘿嘿"}, {"style": "3D"}, "train")


def test_samples_compare_by_value():
    assert dataclasses.replace(SAMPLE) == SAMPLE
    assert dataclasses.replace(SAMPLE, split="validation") != SAMPLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "sample id is empty"),
        ({"kind": "audio"}, "kind 'audio'; allowed are 'image' and 'video'"),
        ({"media": b""}, "no media bytes"),
        ({"split": ""}, "empty split"),
        ({"captions": {"en": None}}, "captions entry 'en': None"),
        ({"attributes": {"year": 2024}}, "attributes entry 'year': 2024"),
    ],
)
def test_samples_refuse(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SAMPLE, **change)


def test_the_package_offers_its_version_and_nothing_unknown():
    assert openemu3.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'Emu4'; it offers Emu3"):
        _ = openemu3.Emu4
