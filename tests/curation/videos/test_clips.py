"""clips.py: each clip's frames against the source's, exactly for copies, closely enough to tell neighbours apart for the others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openemu3 import media
from openemu3.curation.clips import ClipConfig, cut_clips, describe_clip
from openemu3.curation.scenes import Scene, SceneConfig, find_scenes
from openemu3.records import InputError


def read(source):
    """uint8 [T, H, W, 3] and the times in seconds."""
    frames = list(media.stream_frames(source))
    return np.stack([frame.array for frame in frames]), [float(frame.time) for frame in frames]


def spans(boundaries, fps=24):
    return [Scene(first, last, first / fps, last / fps) for first, last in zip(boundaries, boundaries[1:], strict=False)]


def check(clip, source, times=None):
    """The clip shows the source's frames of its scene and no others, at their times."""
    frames, shown_at = read(clip.media)
    first, last = clip.scene.start_frame, clip.scene.end_frame
    assert len(frames) == last - first == clip.num_frames
    assert frames.shape[1:3] == (clip.height, clip.width)
    if clip.copied:
        assert np.array_equal(frames, source[first:last])
    else:
        for number, frame in enumerate(frames.astype(np.int16), first):  # nearest to its own frame among the five around it
            around = range(max(0, number - 2), min(len(source), number + 3))
            distances = [np.abs(frame - source[place]).mean() for place in around]
            assert around[int(np.argmin(distances))] == number and min(distances) < 8
    if times is not None:
        assert shown_at == pytest.approx([time - times[first] for time in times[first:last]], abs=2e-3)


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts"])
def test_scenes_on_key_frames_are_copied(draw_frames, encode_film, format):
    film = encode_film(draw_frames([30, 25, 40]), keys={0, 30, 55}, format=format)
    source, times = read(film)
    clips = list(cut_clips(film, find_scenes(film)))
    assert [clip.scene.start_frame for clip in clips] == [0, 30, 55]
    assert all(clip.copied for clip in clips)
    for clip in clips:
        check(clip, source, times)
    assert sum(len(clip.media) for clip in clips) < len(film) * 1.5 + 3000


def test_other_scenes_are_encoded_anew_frame_by_frame(draw_frames, encode_film):
    film = encode_film(draw_frames([60]), keys={0})
    source, times = read(film)
    clips = list(cut_clips(film, spans([5, 20, 21, 40, 60])))
    assert [clip.copied for clip in clips] == [False] * 4
    for clip in clips:
        check(clip, source, times)


def test_copies_and_new_encodings_in_one_film(draw_frames, encode_film):
    film = encode_film(draw_frames([20, 20, 20, 20]), keys={0, 40, 60})
    source, times = read(film)
    clips = list(cut_clips(film, spans([0, 20, 40, 60, 80])))
    assert [clip.copied for clip in clips][1:] == [False, True, True]
    for clip in clips:
        check(clip, source, times)
    assert not any(clip.copied for clip in cut_clips(film, spans([0, 20, 40, 60, 80]), ClipConfig(copy=False)))


@settings(max_examples=25, deadline=None)
@given(
    boundaries=st.sets(st.integers(0, 48), min_size=2, max_size=4).map(sorted), kind=st.sampled_from(["closed", "open", "plain", "hevc"])
)
def test_whatever_is_copied_is_exact(films, boundaries, kind):
    """Key frames every 12, with reordered frames or without, with groups that lean on their predecessor (open) or not."""
    film, source, times = films[kind]
    for clip in cut_clips(film, spans(boundaries)):
        check(clip, source, times)


@pytest.fixture(scope="module")
def films(draw_frames, encode_film):
    frames = draw_frames([16, 20, 12])
    made = {
        "closed": encode_film(frames, options={"g": "12", "bf": "3", "scenecut": "0"}),
        "open": encode_film(frames, options={"g": "12", "bf": "3", "scenecut": "0", "x264-params": "open-gop=1"}, format="matroska"),
        "plain": encode_film(frames, options={"g": "12", "bf": "0", "scenecut": "0"}),
        "hevc": encode_film(frames, codec="libx265", options={"x265-params": "keyint=12:scenecut=0:open-gop=1:bframes=3:log-level=none"}),
    }
    return {kind: (film, *read(film)) for kind, film in made.items()}


def test_copies_are_made_where_they_can_be(films):
    """The property above would also hold if nothing were ever copied."""
    copied = {kind: [clip.copied for clip in cut_clips(film, spans([0, 12, 24, 36, 48]))] for kind, (film, _, _) in films.items()}
    assert copied["closed"] == copied["plain"] == [True] * 4
    assert copied["open"] != [True] * 4
    assert [clip.copied for clip in cut_clips(films["plain"][0], spans([0, 7, 12, 17, 30]))] == [True, False, True, False]


@pytest.mark.parametrize("copied", [True, False])
def test_variable_rate_stays_as_it_is(draw_frames, encode_film, copied):
    times = [100 * n for n in range(15)] + [1500 + 40 * n for n in range(20)]
    film = encode_film(draw_frames([15, 20]), times=times, format="matroska", keys={0, 15} if copied else {0})
    source, shown_at = read(film)
    clips = list(cut_clips(film, find_scenes(film)))
    assert [clip.scene.num_frames for clip in clips] == [15, 20]
    assert clips[1].copied == copied
    for clip in clips:
        check(clip, source, shown_at)


@pytest.mark.parametrize("keys", [{0, 20}, {0}])
def test_turned_films_stay_upright(draw_frames, encode_film, keys):
    film = encode_film(draw_frames([20, 20]), rotation=-90, keys=keys)
    source, _ = read(film)
    assert source.shape[1:3] == (72, 48)
    for clip in cut_clips(film, spans([0, 20, 40])):
        assert (clip.height, clip.width) == (72, 48)
        check(clip, source)


def test_odd_sides_are_kept(draw_frames, encode_film):
    film = encode_film(draw_frames([12], size=(49, 71)), codec="ffv1", format="matroska", pix_fmt="bgr0")
    source, _ = read(film)
    (clip,) = cut_clips(film, spans([2, 9]))
    check(clip, source)
    assert (clip.height, clip.width) == (49, 71)


@pytest.mark.parametrize(
    "codec, format, pix_fmt, copied",
    [
        ("libx264", "mp4", "yuv420p10le", True),
        ("libx264rgb", "matroska", "rgb24", True),
        ("libvpx", "webm", "yuv420p", True),
        ("libvpx-vp9", "webm", "yuv420p", True),
        ("libsvtav1", "mp4", "yuv420p", False),
        ("mpeg4", "mp4", "yuv420p", True),
        ("prores_ks", "mov", "yuv422p10le", False),
        ("mjpeg", "mov", "yuvj420p", False),
    ],
)
def test_other_codecs(draw_frames, encode_film, codec, format, pix_fmt, copied):
    """A whole film is a copy where its codec is copied; a scene that begins between key frames never is."""
    quality = {"crf": "10", "g": "10", "qscale": "2", "b": "4M"}
    grey = draw_frames([14], size=(64, 96))[..., 1:2].repeat(3, axis=-1)
    film = encode_film(grey, codec=codec, format=format, pix_fmt=pix_fmt, options={"crf": "10"} if codec == "libsvtav1" else quality)
    source, times = read(film)
    (whole,) = cut_clips(film, spans([0, 14]))
    assert whole.copied == copied
    check(whole, source, times)
    (part,) = cut_clips(film, spans([3, 9]))
    assert not part.copied
    check(part, source, times)


@pytest.mark.parametrize("format", ["avi", "h264"])
def test_films_without_times_are_never_copied(draw_frames, encode_film, format):
    film = encode_film(draw_frames([20, 20]), format=format, keys={0, 20})
    source, _ = read(film)
    clips = list(cut_clips(film, find_scenes(film)))
    assert [(clip.scene.num_frames, clip.copied) for clip in clips] == [(20, False), (20, False)]
    for clip in clips:
        check(clip, source)


def test_animations_are_cut_too(draw_frames):
    pixels = torch.from_numpy(draw_frames([10, 10])).permute(3, 0, 1, 2) / 127.5 - 1
    animation = media.encode_animation(pixels, 10, "WEBP")
    source, times = read(animation)
    clips = list(cut_clips(animation, find_scenes(animation)))
    assert len(clips) == 2
    for clip in clips:
        check(clip, source, times)


def test_sound_is_left_out(draw_frames, encode_film):
    film = encode_film(draw_frames([20]), sound=True)
    for copy in (True, False):
        (clip,) = cut_clips(film, find_scenes(film), ClipConfig(copy=copy))
        with media.open_video(clip.media) as container:
            assert [stream.type for stream in container.streams] == ["video"]


def test_the_same_cut_gives_the_same_bytes(draw_frames, encode_film):
    film = encode_film(draw_frames([30]), keys={0, 10})
    scenes = spans([0, 10, 17, 30])
    assert [clip.media for clip in cut_clips(film, scenes)] == [clip.media for clip in cut_clips(film, scenes)]


@pytest.mark.parametrize("kind", ["closed", "open", "plain", "hevc"])
def test_scenes_cut_one_by_one_are_the_same(films, kind):
    """Whether decoding begins with the film or by a leap into its middle."""
    film, scenes = films[kind][0], spans([0, 5, 14, 30, 47])
    together = [clip.media for clip in cut_clips(film, scenes, ClipConfig(copy=False))]
    assert together == [next(cut_clips(film, [scene], ClipConfig(copy=False))).media for scene in scenes]


def test_frames_whose_times_do_not_lead_to_them_are_counted(draw_frames, encode_film):
    """A scene that states another time than its first frame has: the number counts."""
    film = encode_film(draw_frames([30]))
    source, _ = read(film)
    (clip,) = cut_clips(film, [Scene(7, 12, 7.4 / 24, 12 / 24)])
    assert not clip.copied
    check(clip, source)


def test_quality_is_what_was_asked_for(draw_frames, encode_film):
    grey = draw_frames([24])[..., :1].repeat(3, axis=-1)  # colours are stored at half resolution, whatever the quality
    film = encode_film(grey, options={"crf": "4"})
    source, _ = read(film)
    errors = []
    for crf in (0, 16, 45):
        (clip,) = cut_clips(film, spans([3, 24]), ClipConfig(crf=crf))
        errors.append(np.square(read(clip.media)[0].astype(float) - source[3:]).mean())
    assert errors[0] < errors[1] < errors[2] and errors[0] < 1
    with pytest.raises(InputError, match="crf is 52"):
        ClipConfig(crf=52)


def test_a_clip_that_is_one_already(draw_frames, encode_film):
    film = encode_film(draw_frames([30]), fps=12, rotation=90)
    clip = describe_clip(film)
    assert (clip.media, clip.num_frames, clip.height, clip.width) == (film, 30, 72, 48)
    assert clip.seconds == pytest.approx(2.5)


def test_scenes_that_do_not_fit(draw_frames, encode_film):
    film = encode_film(draw_frames([20]))
    assert list(cut_clips(film, [])) == []
    for scenes, words in (
        (spans([0, 30]), "ends before frame 29"),
        ([Scene(0, 10, 0, 10 / 24), Scene(9, 20, 9 / 24, 20 / 24)], "must not overlap"),
        ([Scene(10, 20, 10 / 24, 20 / 24), Scene(0, 10, 0, 10 / 24)], "must not overlap"),
        ([Scene(4, 4, 4 / 24, 4 / 24)], "no frames"),
    ):
        with pytest.raises(InputError, match=words):
            list(cut_clips(film, scenes))


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_real_clips_are_copied(find_real_video, name):
    path = find_real_video(name)
    frames, times = read(path)
    (clip,) = cut_clips(path, find_scenes(path)[-1:])
    assert clip.copied
    check(clip, frames, times)


def test_a_real_clip_of_another_codec_is_encoded_anew(find_real_video):
    """MPEG-1, 405 rows: frames 20 to 27."""
    path = find_real_video("cityCC0.mpg")
    frames = np.stack([frame.array for frame in media.stream_frames(path, max_frames=32)])
    (clip,) = cut_clips(path, [Scene(20, 28, 20 / 25, 28 / 25)])
    assert not clip.copied
    check(clip, frames)


def test_scenes_split_for_their_length_are_cut_in_between(draw_frames, encode_film):
    film = encode_film(draw_frames([48]), keys={0})
    source, times = read(film)
    clips = list(cut_clips(film, find_scenes(film, SceneConfig(max_seconds=1.0))))
    assert [clip.num_frames for clip in clips] == [24, 24]
    for clip in clips:
        check(clip, source, times)
