"""Every command of `emu3` on a folder of random weights: files, JSON, exit codes, nothing left behind."""

import json

import pytest
from PIL import Image

from openemu3 import media


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "picture.png"
    Image.new("RGB", (40, 48), "orange").save(path)
    return path


def read_answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generate_image(emu3_command, model_folder, tmp_path):
    done = emu3_command("generate", "image", "red apple", "--model", model_folder, "--seed", 3, "--num-images", 2, "--json", cwd=tmp_path)
    answer = read_answer(done)
    assert answer["files"] == ["outputs/picture-0.png", "outputs/picture-1.png"]
    assert (answer["height"], answer["width"], answer["seed"], answer["prompt"]) == (32, 32, 3, "red apple")
    first, second = (media.read_image(tmp_path / name) for name in answer["files"])
    assert first.shape == (3, 1, 32, 32) and not first.equal(second)
    # The same seed gives the same picture, also when it is asked for alone and as text.
    done = emu3_command("generate", "image", "red apple", "--model", model_folder, "--seed", 3, "--output", "one.png", cwd=tmp_path)
    assert done.stdout == "one.png\n"
    assert media.read_image(tmp_path / "one.png").equal(first)


def test_as_a_process(emu3_process, model_folder, tmp_path):
    done = emu3_process("generate", "image", "red apple", "--model", model_folder, "--json", cwd=tmp_path)
    assert read_answer(done)["files"] == ["outputs/picture.png"] and done.stderr == ""
    assert media.read_image(tmp_path / "outputs" / "picture.png").shape == (3, 1, 32, 32)
    done = emu3_process("generate", "image", "red apple", "--model", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("emu3: ") and done.stderr.count("\n") == 1


def test_generate_image_of_a_size(emu3_command, model_folder, tmp_path):
    flags = ["--height", 24, "--width", 40, "--guidance", 1, "--top-k", 8, "--temperature", 0.7, "--negative-prompt", "", "--json"]
    done = emu3_command("generate", "image", "红苹果", "--model", model_folder, "--output", tmp_path / "a.webp", *flags)
    assert read_answer(done)["prompt"] == "红苹果"
    assert media.read_image(tmp_path / "a.webp").shape == (3, 1, 24, 40)


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_generate_video_and_continue_it(emu3_command, model_folder, tmp_path, suffix):
    film, longer = tmp_path / f"film.{suffix}", tmp_path / f"longer.{suffix}"
    done = emu3_command("generate", "video", "blue wave", "--model", model_folder, "--output", film, "--seconds", 1, "--json")
    answer = read_answer(done)
    assert (answer["fps"], answer["num_frames"], answer["height"], answer["width"]) == (8, 8, 32, 32)
    pixels, fps = media.read_video(film)
    assert fps == pytest.approx(8, rel=0.05)
    done = emu3_command("generate", "continue", film, "--model", model_folder, "--output", longer, "--seconds", 1.5, "--json")
    answer = read_answer(done)
    assert answer["num_frames"] == 8 + 12
    continued, _ = media.read_video(longer, fps=8)
    assert continued.shape[1] == 20
    assert (continued[:, :8] - pixels[:, :8]).abs().mean() < 0.2  # the given frames come first, but for the lossy format


def test_describe(emu3_command, model_folder, picture):
    answer = read_answer(emu3_command("describe", picture, picture, "--model", model_folder, "--max-new-tokens", 5, "--json"))
    first, second = answer["descriptions"]
    assert first["file"] == str(picture) and first["text"] == second["text"]
    done = emu3_command("describe", picture, "--model", model_folder, "--max-new-tokens", 5)
    assert done.stdout.strip() == first["text"].strip()


def test_answer(emu3_command, model_folder, picture):
    with_picture = read_answer(emu3_command("answer", "What is it?", picture, "--model", model_folder, "--max-new-tokens", 6, "--json"))
    assert with_picture["files"] == [str(picture)] and with_picture["question"] == "What is it?"
    without = read_answer(emu3_command("answer", "What is it?", "--model", model_folder, "--max-new-tokens", 6, "--json"))
    assert without["files"] == [] and without["text"] != with_picture["text"]


def test_chat(emu3_command, model_folder, picture):
    stdin = f"/show {picture}\nWhat is it?\nAnd now?\n\nthis is not read\n"
    done = emu3_command("chat", "--model", model_folder, "--max-new-tokens", 6, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert len([json.loads(line)["text"] for line in done.stdout.splitlines()]) == 2
    done = emu3_command("chat", "--model", model_folder, stdin="/show nothing.png\n")
    assert done.returncode == 2 and done.stderr == "emu3: cannot read the file 'nothing.png': No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "image", ""], "prompt is empty"),
        (["generate", "image", "apple " * 3000], "the context holds 1024"),
        (["generate", "image", "apple", "--height", "30", "--width", "32"], "height is 30; a multiple of 8"),
        (["generate", "image", "apple", "--height", "32"], "width is missing"),
        (["generate", "image", "apple", "--height", "4096", "--width", "4096"], "the context holds 1024"),
        (["generate", "image", "apple", "--aspect-ratio", "1:100"], "which leaves no tokens for one side"),
        (["generate", "image", "apple", "--temperature", "-1"], "temperature is -1"),
        (["generate", "video", "apple", "--seconds", "0"], "seconds is 0"),
    ],
)
def test_impossible_wishes_are_one_line(emu3_command, model_folder, tmp_path, arguments, words):
    done = emu3_command(*arguments, "--model", model_folder, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_broken_models_are_one_line(emu3_command, model_folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "empty").mkdir()
    for folder, words in ((broken, "model.safetensors"), (tmp_path / "empty", "config.json"), (tmp_path / "missing", "missing")):
        done = emu3_command("generate", "image", "apple", "--model", folder, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["zero.png", "words.png", "half.png", "long.png", "tiny.png"])
def test_bad_pictures_are_one_line(emu3_command, model_folder, tmp_path, name):
    Image.effect_noise((300, 300), 90).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    Image.new("RGB", (8, 800)).save(tmp_path / "long.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "tiny.png")
    (tmp_path / "zero.png").touch()
    (tmp_path / "words.png").write_text("these are words")
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    done = emu3_command("describe", tmp_path / name, "--model", model_folder)
    words = {"zero": "is empty", "words": "not a", "half": "damaged", "long": "at most 5 times", "tiny": "at least 8"}[name.split(".")[0]]
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr and done.stderr.count("\n") == 1
