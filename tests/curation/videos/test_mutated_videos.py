"""Damaged films through everything: scenes, clips, measures. Only InputError may come of them, and each within its time."""

import signal

import numpy as np
import pytest
import torch

from openemu3 import media
from openemu3.curation.clips import cut_clips
from openemu3.curation.motion import score_clip
from openemu3.curation.scenes import SceneConfig, find_scenes
from openemu3.records import InputError

SECONDS_PER_FILE = 30


def damage(data, random):
    """One to three wounds: bytes changed, a stretch zeroed, taken out, doubled or moved to the end, the rest cut off."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        start = int(random.integers(0, len(data)))
        stretch = int(random.integers(1, max(2, len(data) // 8)))
        match random.integers(0, 6):
            case 0:
                for place in random.integers(0, len(data), 12):
                    data[place] = int(random.integers(0, 256))
            case 1:
                data[start : start + stretch] = bytes(len(data[start : start + stretch]))
            case 2:
                del data[start : start + stretch]
            case 3:
                data[start:start] = data[start : start + stretch]
            case 4:
                data += data[start : start + stretch]
                del data[start : start + stretch]
            case 5:
                del data[max(1, start) :]
        if len(data) < 2:
            break
    return bytes(data)


def run_everything(data):
    scenes = find_scenes(data, SceneConfig(min_seconds=0.2))
    assert scenes[0].start_frame == 0 and all(scene.num_frames > 0 for scene in scenes)
    assert all(one.end_frame == other.start_frame for one, other in zip(scenes, scenes[1:], strict=False))
    num_clips = 0
    for clip in cut_clips(data, scenes):
        scores = score_clip(clip, None)
        assert np.isfinite(scores.motion) and scores.frames.shape[0] == 3
        num_clips += 1
    assert num_clips == len(scenes)


@pytest.fixture(scope="module")
def films(draw_frames, encode_film):
    frames = draw_frames([10, 8, 12], size=(32, 48))
    pixels = torch.from_numpy(frames[:16]).permute(3, 0, 1, 2) / 127.5 - 1
    return [
        encode_film(frames),
        encode_film(frames, options={"bf": "3"}, format="matroska", sound=False),
        encode_film(frames, codec="mpeg4", format="avi"),
        encode_film(frames, format="mpegts"),
        encode_film(frames, format="mp4", sound=True, options={"movflags": "frag_keyframe+empty_moov"}),
        media.encode_animation(pixels, 10, "WEBP"),
        media.encode_animation(pixels, 10, "GIF"),
    ]


@pytest.mark.parametrize("first, count", [(0, 21), pytest.param(21, 210, marks=pytest.mark.slow)])
def test_damaged_films_are_decided_or_refused(films, first, count):
    outcomes = {"decided": 0, "refused": 0}

    def give_up(*_):
        raise AssertionError(f"a damaged film took more than {SECONDS_PER_FILE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        for seed in range(first, first + count):
            data = damage(films[seed % len(films)], np.random.default_rng(seed))
            signal.alarm(SECONDS_PER_FILE)
            try:
                run_everything(data)
                outcomes["decided"] += 1
            except InputError as error:
                assert str(error) and "\n" not in str(error), seed
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"film {seed} raised {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert min(outcomes.values()) > count // 10, outcomes  # neither are all harmless nor all hopeless
