"""The code of docs/video_curation.md runs as it stands, but for the film's place and the server's address."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[3] / "docs" / "video_curation.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), flags=re.DOTALL)


def run_block(code, replacements, capsys):
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, str(DOCUMENT), "exec"), {})
    return capsys.readouterr().out


def test_there_are_two():
    assert len(BLOCKS) == 2


def test_clips_are_measured(draw_frames, encode_film, tmp_path, capsys):
    film = tmp_path / "film.mp4"
    film.write_bytes(encode_film(draw_frames([30, 30]), keys={0, 30}))
    lines = run_block(BLOCKS[0], {".cache/videos/bikes.mp4": str(film)}, capsys).splitlines()
    assert [re.sub(r"motion.*", "", line) for line in lines] == [
        " 0.00 s  30 frames  copied True  ",
        " 1.25 s  30 frames  copied True  ",
    ]


def test_a_clip_is_captioned(draw_frames, encode_film, tmp_path, capsys, serve, chat, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.mp4").write_bytes(encode_film(draw_frames([30])))
    server = serve()
    output = run_block(BLOCKS[1], {".cache/videos/bikes.mp4": "film.mp4", "http://localhost:8000/v1": server.url}, capsys)
    assert output.startswith(f"bikes {chat.GOOD} Usage(requests=1")


@pytest.mark.slow
def test_the_real_clip_of_the_document(find_real_video, capsys):
    output = run_block(BLOCKS[0], {".cache/videos/bikes.mp4": str(find_real_video("bikes.mp4"))}, capsys)
    assert output.count("copied True") == 6
