"""scenes.py on films whose cuts are known, on real clips against PySceneDetect's own program, and on files that are no good."""

import io
import subprocess
import sys
import textwrap

import av
import numpy as np
import pytest
import torch

from openemu3 import media
from openemu3.curation.scenes import Scene, SceneConfig, find_scenes
from openemu3.records import InputError


def list_spans(scenes):
    return [(scene.start_frame, scene.end_frame) for scene in scenes]


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mpegts", "h264"])
def test_cuts_lie_where_the_pictures_change(draw_frames, encode_film, format):
    scenes = find_scenes(encode_film(draw_frames([30, 40, 25]), fps=25, format=format))
    assert list_spans(scenes) == [(0, 30), (30, 70), (70, 95)]
    assert [(scene.start, scene.end) for scene in scenes] == [pytest.approx(span) for span in [(0, 1.2), (1.2, 2.8), (2.8, 3.8)]]
    assert [scene.seconds for scene in scenes] == pytest.approx([1.2, 1.6, 1.0])


def test_a_fade_is_cut_in_the_middle_of_the_dark(draw_frames, encode_film):
    """Forty frames that darken evenly, ten black ones, forty that brighten; cuts apart, which the hues of near-black frames make too."""
    frames = draw_frames([90])
    brightness = np.concatenate([np.linspace(1, 0, 40), np.zeros(10), np.linspace(0, 1, 40)])
    frames = (frames * brightness[:, None, None, None]).astype(np.uint8)
    dark = np.flatnonzero(frames.mean(axis=(1, 2, 3)) < 12)
    scenes = find_scenes(encode_film(frames, options={"crf": "4"}), SceneConfig(content_threshold=255))
    middle = (dark[0] + dark[-1] + 1) / 2
    assert len(scenes) == 2 and abs(scenes[0].end_frame - middle) <= 1
    assert len(find_scenes(encode_film(frames), SceneConfig(content_threshold=255, fade_threshold=0))) == 1  # never dark enough


def test_thresholds_and_shortest_scenes_are_those_asked_for(draw_frames, encode_film):
    film = encode_film(draw_frames([30, 10, 30]))
    assert list_spans(find_scenes(film, SceneConfig(min_seconds=0.2))) == [(0, 30), (30, 40), (40, 70)]
    assert len(find_scenes(film, SceneConfig(min_seconds=0.6))) == 2
    assert len(find_scenes(film, SceneConfig(content_threshold=250))) == 1


@pytest.mark.parametrize("max_seconds, expected", [(4.0, [0, 96]), (1.5, [0, 32, 64, 96]), (0.9, [0, 19, 38, 58, 77, 96])])
def test_long_scenes_are_split_evenly(draw_frames, encode_film, max_seconds, expected):
    scenes = find_scenes(encode_film(draw_frames([96]), fps=24), SceneConfig(max_seconds=max_seconds))
    assert list_spans(scenes) == list(zip(expected, expected[1:], strict=False))
    assert all(scene.seconds <= max_seconds + 0.5 / 24 for scene in scenes)
    assert [one.end for one in scenes[:-1]] == [one.start for one in scenes[1:]]


def test_variable_rate_keeps_its_times(draw_frames, encode_film):
    """Twenty frames of 100 ms and thirty of 40 ms: an average rate would put the cut elsewhere."""
    times = [100 * n for n in range(20)] + [2000 + 40 * n for n in range(30)]
    scenes = find_scenes(encode_film(draw_frames([20, 30]), times=times, format="matroska"))
    assert list_spans(scenes) == [(0, 20), (20, 50)]
    assert (scenes[0].end, scenes[1].start) == (2.0, 2.0)
    assert scenes[1].end == pytest.approx(3.2, abs=0.05)  # the last frame's own length is the file's guess


def test_a_fade_in_variable_rate_is_cut_in_the_middle_by_time(encode_film):
    """Dark from 1 s to 3 s: ten frames of 100 ms before, then two dark ones of a second each, then ten bright ones."""
    frames = np.full((22, 48, 72, 3), 200, np.uint8)
    frames[10:12] = 0
    times = [100 * n for n in range(10)] + [1000, 2000] + [3000 + 100 * n for n in range(10)]
    starts = [scene.start for scene in find_scenes(encode_film(frames, times=times, format="matroska"), SceneConfig(content_threshold=255))]
    assert starts == [0.0, 2.0]


@pytest.mark.parametrize("rotation", [90, 180])
def test_rotation_changes_nothing(draw_frames, encode_film, rotation):
    assert list_spans(find_scenes(encode_film(draw_frames([30, 30]), rotation=rotation))) == [(0, 30), (30, 60)]


def test_sound_beside_the_pictures_changes_nothing(draw_frames, encode_film):
    assert list_spans(find_scenes(encode_film(draw_frames([30, 30]), sound=True))) == [(0, 30), (30, 60)]


def test_an_animated_picture_has_scenes(draw_frames):
    pixels = torch.from_numpy(draw_frames([20, 20])).permute(3, 0, 1, 2) / 127.5 - 1
    scenes = find_scenes(media.encode_animation(pixels, 10, "WEBP"))
    assert list_spans(scenes) == [(0, 20), (20, 40)] and scenes[-1].end == 4.0


def test_a_single_frame_is_a_scene(draw_frames, encode_film):
    assert find_scenes(encode_film(draw_frames([1]), fps=25)) == (Scene(0, 1, 0.0, 0.04),)


# ------------------------------------------------------------------------------------------------------------- against the original


def run_pyscenedetect(path):
    from scenedetect import ContentDetector, SceneManager, ThresholdDetector, open_video

    manager = SceneManager()
    manager.add_detector(ContentDetector(min_scene_len=0.6))
    manager.add_detector(ThresholdDetector(min_scene_len=0.6))
    manager.detect_scenes(open_video(str(path)))
    return [(start.frame_num, end.frame_num) for start, end in manager.get_scene_list(start_in_scene=True)]


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_real_clips_against_pyscenedetect(find_real_video, name):
    """Its own program on the same file: other decoder, other shrinking."""
    path = find_real_video(name)
    assert list_spans(find_scenes(path)) == run_pyscenedetect(path)


def test_many_cuts_against_pyscenedetect(draw_frames, encode_film, tmp_path):
    path = tmp_path / "film.mp4"
    frames = draw_frames([17, 30, 5, 40, 8, 8, 25, 60], seed=3)
    frames[100:130] = (frames[100:130] * np.abs(np.linspace(-1, 1, 30))[:, None, None, None] ** 2).astype(np.uint8)
    path.write_bytes(encode_film(frames))
    assert list_spans(find_scenes(path)) == run_pyscenedetect(path)


# --------------------------------------------------------------------------------------------------------------- files from strangers


def test_no_good_files_say_why(encode_sound, draw_frames, encode_film, tmp_path):
    film = encode_film(draw_frames([30]), sound=True)
    still = io.BytesIO()
    media.to_pil(torch.zeros(3, 1, 8, 8))[0].save(still, "PNG")
    for data, words in (
        (encode_sound(), "no pictures in it"),
        (b"", "0 bytes"),
        (b"just text, no film" * 100, "not a video"),
        (still.getvalue(), "still picture"),
        (film[: len(film) // 2], "not a video"),  # MP4 keeps its index at the end
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a video"),
    ):
        with pytest.raises(InputError, match=words):
            find_scenes(data)
    with pytest.raises(InputError, match="No such file"):
        find_scenes(tmp_path / "missing.mp4")


def test_a_film_without_frames(encode_film, draw_frames):
    """A container whose track is there and empty."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 72, "yuv420p"
        container.start_encoding()
    with pytest.raises(InputError):
        find_scenes(buffer.getvalue())


def test_a_broken_index_changes_nothing(draw_frames, encode_film):
    """AVI keeps its index in the chunk idx1 at the end: cut off, and filled with nonsense."""
    film = encode_film(draw_frames([30, 30]), format="avi")
    index = film.rindex(b"idx1")
    nonsense = film[: index + 8] + b"\xff" * (len(film) - index - 8)
    assert (
        list_spans(find_scenes(film)) == list_spans(find_scenes(film[:index])) == list_spans(find_scenes(nonsense)) == [(0, 30), (30, 60)]
    )


def test_a_film_that_breaks_off_has_the_scenes_up_to_there(draw_frames, encode_film):
    film = encode_film(draw_frames([30, 30, 30]), format="matroska", options={"crf": "1"})
    scenes = find_scenes(film[: len(film) * 55 // 90])
    assert list_spans(scenes)[0] == (0, 30) and 30 < scenes[-1].end_frame < 90


def test_a_frame_that_stands_for_an_hour_is_refused(draw_frames, encode_film):
    times = [40 * n for n in range(5)] + [3_600_000 + 40 * n for n in range(5)]
    with pytest.raises(InputError, match="3600 s: at most 600"):
        find_scenes(encode_film(draw_frames([10]), times=times, format="matroska"))


@pytest.mark.parametrize(
    "field, value", [("content_threshold", -1.0), ("fade_threshold", float("nan")), ("min_seconds", -0.1), ("max_seconds", 0.0)]
)
def test_impossible_settings(field, value):
    with pytest.raises(InputError, match=field):
        SceneConfig(**{field: value})


@pytest.mark.slow
def test_memory_is_flat_in_the_length_of_a_video(draw_frames, encode_film, tmp_path):
    """Peak memory of a process that finds the scenes of an hour may be at most 8 MB above one of five minutes."""
    peaks = {}
    one_minute = draw_frames([1] * 5, size=(32, 48)).repeat(120, axis=0)  # 60 s at 10 fps, five stills
    for minutes in (5, 60):
        path = tmp_path / f"{minutes}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            for _ in range(minutes):
                for array in one_minute:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
        code = f"""
            import resource
            from openemu3.curation.scenes import find_scenes
            scenes = find_scenes({str(path)!r})
            print(len(scenes), scenes[-1].end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
        output = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout.split()
        assert int(output[0]) == minutes * 5 and float(output[1]) == pytest.approx(minutes * 60, abs=0.2), output
        peaks[minutes] = int(output[2])  # KiB
    assert peaks[60] - peaks[5] < 8 * 1024, peaks
