"""Films whose every frame is known, written by PyAV, and the real clips where they have been fetched."""

import importlib.util
import io
import os
import sys
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

REAL_VIDEOS = Path(__file__).parents[3] / ".cache" / "videos"


def draw_frames(lengths, size=(48, 72), seed=0):
    """uint8 [sum(lengths), H, W, 3]: a random picture per scene, which moves by two pixels a frame, so that no two agree."""
    random, (height, width), frames = np.random.default_rng(seed), size, []
    for length in lengths:
        coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
        picture = coarse.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
        frames += [np.roll(picture, 2 * number, axis=1) for number in range(length)]
    return np.stack(frames)


def encode_film(
    frames, fps=24, format="mp4", codec="libx264", options=None, times=None, rotation=0, keys=None, pix_fmt="yuv420p", sound=False
):
    """The bytes of a film. `times`: milliseconds at which frames appear; `keys`: which frames are key frames (None: x264 chooses)."""
    buffer, clock = io.BytesIO(), Fraction(1, 1000) if times is not None else 1 / Fraction(fps)
    with usual_priority(), av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = clock
        stream.options = {"threads": "1"} | ({"scenecut": "0", "g": "1000"} if keys is not None else {}) | (options or {})
        voice = container.add_stream("aac", rate=8000) if sound else None
        if rotation:
            stream.set_display_rotation(rotation)
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = index if times is None else times[index], clock
            if keys is not None and index in keys:
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            container.mux(voice.encode(make_sound(len(frames) / fps)))
            container.mux(voice.encode())
    return buffer.getvalue()


@contextmanager
def usual_priority():
    """SVT-AV1, run by root, makes the thread that calls it a real-time one; with its children that would starve all other tests."""
    if sys.platform != "linux":
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def make_sound(seconds):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * seconds)), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
    return frame


def encode_sound(seconds=1.0):
    """A file with an audio track alone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        container.mux(stream.encode(make_sound(seconds)))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(name="draw_frames", scope="session")
def draw_frames_fixture():
    return draw_frames


@pytest.fixture(name="encode_film", scope="session")
def encode_film_fixture():
    return encode_film


@pytest.fixture(name="encode_sound", scope="session")
def encode_sound_fixture():
    return encode_sound


@pytest.fixture(scope="session")
def find_real_video():
    """The path of a real clip by its name; the test is skipped where it has not been fetched."""

    def find(name):
        if not (REAL_VIDEOS / name).is_file():
            pytest.skip(f"{name} is not in .cache/videos; recipes/fetch_videos.py fetches it")
        return REAL_VIDEOS / name

    return find


@pytest.fixture(scope="session")
def chat():
    """The module server.py: `ChatServer`, `completion`, `GOOD`."""
    specification = importlib.util.spec_from_file_location("chat_server", Path(__file__).with_name("server.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def serve(chat):
    """Starts servers that are closed after the test."""
    servers = []

    def start(reply=None):
        servers.append(chat.ChatServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
