"""motion.py against movements whose flow is known, against OpenCV called directly, and with the real text detector."""

import math

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from openemu3.curation.clips import cut_clips, describe_clip
from openemu3.curation.motion import MotionConfig, measure_motion, score_clip
from openemu3.curation.scenes import find_scenes
from openemu3.curation.text import TextDetector
from openemu3.records import InputError


def make_texture(size, seed=0):
    """A smooth random picture uint8 [size, size, 3]: noise blurred to blobs of some ten pixels, stretched to all of 0 to 255."""
    blurred = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32), (0, 0), 4)
    return np.repeat(cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)[..., None], 3, axis=2)


def film_of(warps, height=128, width=160, texture=None):
    """Frames uint8 [H, W, 3] of a picture seen through 2 x 3 matrices that map the frame's pixels to the picture's."""
    texture = make_texture(512) if texture is None else texture
    return [cv2.warpAffine(texture, np.float32(warp), (width, height), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP) for warp in warps]


def pan(dx, dy, num_frames=5, start=200):
    return [[[1, 0, start - dx * number], [0, 1, start - dy * number]] for number in range(num_frames)]


@pytest.mark.parametrize("dx, dy", [(1, 0), (0, 3), (-2, 2), (0.5, 0), (9, 0)])
def test_translations(dx, dy):
    assert measure_motion(film_of(pan(dx, dy))) == pytest.approx(math.hypot(dx, dy) / 128, rel=0.12)


def test_what_is_too_fast_to_follow_still_counts_as_fast():
    """An eighth of the shorter edge at once: Farneback finds two thirds of it, which is beyond any sensible bound all the same."""
    assert 0.06 < measure_motion(film_of(pan(0, -16))) < 0.13


def test_standing_still_is_zero():
    assert measure_motion(film_of(pan(0, 0))) < 1e-4
    assert measure_motion(film_of(pan(1, 0, num_frames=1))) == 0
    assert measure_motion([]) == 0


def test_a_turn_about_the_middle():
    """A point at distance r from the middle moves by 2 r sin(angle / 2)."""
    angle, middle = math.radians(2), (159 / 2, 127 / 2)
    warps = []
    for number in range(4):
        cosine, sine = math.cos(number * angle), math.sin(number * angle)
        warps.append(
            [[cosine, -sine, 256 - cosine * middle[0] + sine * middle[1]], [sine, cosine, 256 - sine * middle[0] - cosine * middle[1]]]
        )
    rows, columns = np.mgrid[0:128, 0:160]
    expected = (np.hypot(rows - middle[1], columns - middle[0]) * 2 * math.sin(angle / 2)).mean() / 128
    assert measure_motion(film_of(warps)) == pytest.approx(expected, rel=0.1)


def test_the_score_is_a_share_whatever_the_size():
    small = film_of(pan(4, 0))
    large = [cv2.resize(frame, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC) for frame in small]
    upright = [np.ascontiguousarray(np.rot90(frame)) for frame in small]
    assert measure_motion(large) == pytest.approx(measure_motion(small), rel=0.05)
    assert measure_motion(upright) == pytest.approx(measure_motion(small), rel=0.05)


def test_against_opencv_called_directly():
    """All pixels and pairs count alike; half of the picture moves, and not at all times."""
    moving, still = film_of(pan(3, 1)), film_of(pan(0, 0), texture=make_texture(512, seed=1))
    frames = [np.concatenate([one, other], axis=1) for one, other in zip(moving, still, strict=True)]
    frames.append(frames[-1].copy())
    lengths = []
    for one, other in zip(frames, frames[1:], strict=False):
        flow = cv2.calcOpticalFlowFarneback(one[..., 0], other[..., 0], None, 0.5, 5, 15, 3, 5, 1.2, 0)
        lengths.append(np.sqrt(np.square(flow).sum(axis=-1)))
    assert measure_motion(frames) == pytest.approx(float(np.mean(lengths)) / 128, rel=1e-5)
    assert measure_motion([*frames, frames[-1]]) == pytest.approx(float(np.mean(lengths)) / 128 * 5 / 6, rel=1e-5)  # shown once more


@pytest.mark.parametrize("fps, pixels_per_frame", [(24, 1), (12, 2), (8, 3), (4, 6)])
def test_speed_counts_not_the_stored_rate(encode_film, fps, pixels_per_frame):
    """24 pixels a second, 3 in each eighth of it; at 4 frames a second half of the eighths show nothing new."""
    frames = np.stack(film_of(pan(pixels_per_frame, 0, num_frames=2 * fps)))
    scores = score_clip(describe_clip(encode_film(frames, fps=fps, options={"crf": "10"})), None)
    assert scores.motion == pytest.approx(3 / 128, rel=0.15)
    assert math.isnan(scores.text_coverage) and math.isnan(scores.text_coverage_max) and scores.text_seconds == 0


def test_judged_frames_are_in_the_middle_of_each_third(encode_film):
    """Grey level n at n / 24 of three seconds: the frames of 0.5, 1.5 and 2.5 s."""
    frames = np.full((72, 32, 48, 3), 0, np.uint8) + (3 * np.arange(72, dtype=np.uint8))[:, None, None, None]
    scores = score_clip(describe_clip(encode_film(frames, fps=24, options={"crf": "1"})), None)
    assert [round(float(frame.mean()) / 3) for frame in scores.frames] == [12, 36, 60]
    assert scores.frames.shape == (3, 32, 48, 3) and scores.frames.dtype == np.uint8


@pytest.mark.parametrize("num_frames", [1, 2])
def test_shortest_clips_have_three_frames_too(encode_film, num_frames):
    scores = score_clip(describe_clip(encode_film(np.stack(film_of(pan(0, 0, num_frames))), fps=25)), None)
    assert (scores.motion, scores.frames.shape) == (0, (3, 128, 160, 3))


def test_frames_are_shrunk_for_measuring(encode_film):
    clip = describe_clip(encode_film(np.stack(film_of(pan(2, 0, 8), height=320, width=400)), fps=8))
    assert score_clip(clip, None).frames.shape == (3, 256, 320, 3)
    assert score_clip(clip, None, MotionConfig(short_edge=64)).frames.shape == (3, 64, 80, 3)


class CountingDetector(TextDetector):
    """The real one; it remembers which shapes it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def measure(self, picture):
        self.shown.append(picture.shape)
        return super().measure(picture)


@pytest.fixture(scope="module")
def detector():
    return CountingDetector()


def write_title(lines):
    picture = np.full((256, 400, 3), 240, np.uint8)
    for number in range(lines):
        cv2.putText(picture, "OPEN SOURCE FILM", (20, 50 + 48 * number), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (20, 20, 20), 3)
    return picture


def test_text_in_part_of_a_clip(encode_film, detector):
    """Two seconds of titles and two of plain picture: looked at twice a second, half of the looks see text."""
    detector.shown.clear()
    titled, plain = write_title(4), np.full((256, 400, 3), 240, np.uint8)
    clip = describe_clip(encode_film(np.stack([titled] * 24 + [plain] * 24), fps=12))
    scores = score_clip(clip, detector)
    assert detector.shown == [(256, 400, 3)] * 8
    assert scores.text_coverage == pytest.approx(scores.text_coverage_max / 2, rel=0.1)
    (width, height), _ = cv2.getTextSize("OPEN SOURCE FILM", cv2.FONT_HERSHEY_SIMPLEX, 1.1, 3)
    assert 0.8 < scores.text_coverage_max / (4 * width * height / (256 * 400)) < 2.2  # boxes have a margin
    assert scores.text_seconds > 0 and scores.motion < 0.005


def test_more_text_covers_more(encode_film, detector):
    few, many = (score_clip(describe_clip(encode_film(np.stack([write_title(n)] * 4), fps=8)), detector).text_coverage for n in (1, 4))
    assert 0 < few < many / 2


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_real_clips_move_within_bounds(find_real_video, name):
    path = find_real_video(name)
    clip = next(cut_clips(path, find_scenes(path)[-1:]))
    scores = score_clip(clip, None)
    assert 0.003 < scores.motion < 0.05


def test_real_animations(pytestconfig):
    """Emoji that move, as the mini model has them: each has a score, and a held frame of one has none."""
    path = pytestconfig.rootpath / ".cache" / "mini_core2" / "videos.parquet"
    if not path.is_file():
        pytest.skip("the mini model's clips have not been prepared")
    media = pq.ParquetFile(path).read_row_group(0, columns=["media"]).column("media").to_pylist()[:3]
    scores = [score_clip(describe_clip(data), None) for data in media]
    assert all(0 < score.motion < 0.2 and score.frames.shape == (3, 64, 64, 3) for score in scores)


@pytest.mark.parametrize("field", ["frames_per_second", "text_every", "short_edge", "flow_short_edge"])
def test_impossible_settings(field):
    with pytest.raises(InputError, match=field):
        MotionConfig(**{field: 0})
