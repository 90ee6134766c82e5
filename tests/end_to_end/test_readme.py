"""Every command and the Python of the README, run in their order, on a folder of random weights in place of the named models."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from openemu3 import media

ROOT = Path(__file__).parents[2]
MODELS = ("mini", "Emu3-Gen", "Emu3-Chat", "Emu3-VisionTokenizer")


def list_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def list_commands(program):
    lines = [shlex.split(line, comments=True) for block in list_blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def test_the_readme_has_nothing_that_is_not_tested_here():
    assert len(list_commands("make")) + len(list_commands("emu3")) == sum(len(block.splitlines()) for block in list_blocks("sh"))
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("```") == 2 * len(list_blocks("sh") + list_blocks("python"))


def test_commands(emu3_command, model_folder, tmp_path):
    commands = list_commands("emu3")
    assert {command[0] for command in commands} >= {"generate", "describe", "answer"}
    for command in commands:
        named = "--model" in command
        words = [str(model_folder) if word in MODELS else word for word in command] + ([] if named else ["--model", str(model_folder)])
        done = emu3_command(*words, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout
    assert media.detect_kind(tmp_path / "apple.png") == "image"
    assert media.probe_video(tmp_path / "longer.mp4").seconds > media.probe_video(tmp_path / "clapping.mp4").seconds


def test_python(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = list_blocks("python")
    assert 'Emu3.load("mini")' in source
    exec(compile(source.replace('"mini"', repr(str(model_folder))), "README.md", "exec"), {})
    assert media.detect_kind(tmp_path / "apple.png") == "image"
    assert media.detect_kind(tmp_path / "longer.mp4") == "video"


@pytest.mark.parametrize("target", sorted({command[0] for command in list_commands("make")} | {"check", "test-all"}))
def test_make_targets_exist(target):
    """Dry run: every rule and file that the target needs is there."""
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
