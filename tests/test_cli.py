"""The command line by itself: help, flags, exit codes and one-line errors. Commands on a whole model: end_to_end/test_commands.py."""

import dataclasses
import os
import re
import subprocess
import sys
import time

import pytest

from openemu3 import __version__, cli
from openemu3.cli import options
from openemu3.records import InputError


def run(capsys, *arguments):
    code = cli.main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def get_help(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys):
    text = get_help(capsys)
    for name in cli.COMMANDS:
        assert name in text
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 0 and capsys.readouterr().out == text


@pytest.mark.parametrize("name", [*cli.COMMANDS, "generate image", "generate video", "generate continue"])
def test_every_command_and_flag_is_explained(capsys, monkeypatch, name):
    """A flag without words of its own has nothing but its type and default in the help."""
    monkeypatch.setenv("COLUMNS", "200")
    text = re.sub("[│╭╮╰╯─•]", " ", get_help(capsys, *name.split()))
    usage, description, *_ = [line.strip() for line in text.splitlines() if line.strip()]
    assert usage.startswith(f"usage: emu3 {name} ") and len(description.split()) > 3
    flags = re.findall(r"--([\w-]+)(.*?)(?:\(default|\(required)", text, re.DOTALL)
    assert flags or name == "generate"
    for flag, words in flags:
        assert len(re.findall("[a-z]{2,}", words)) >= 3, flag


def test_flags_have_no_prefixes_and_defaults_are_readable(capsys):
    text = get_help(capsys, "generate", "image")
    assert "--seed INT" in text and "--height INT" in text and "--json " in text and "PROMPT" in text
    assert "--drawing" not in text and "--no-json" not in text and "{None}" not in text


def test_help_does_not_load_torch():
    code = "import sys, openemu3.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    # Measured at 0.3 s on an idle machine; the bound is wide for busy ones, where torch alone would take several seconds.
    assert time.monotonic() - began < 10


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"emu3 {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["paint"], ["generate"], ["generate", "image"], ["generate", "image", "a", "--sed", "1"], ["demo", "x"]]
)
def test_wrong_flags_exit_with_two(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "image", "a cat", "--output", "cat.tga"], "cannot write cat.tga: the name must end in .png"),
        (["generate", "image", "a cat", "--num-images", "0"], "num-images is 0"),
        (["generate", "video", "a cat", "--output", "cat.avi"], "the name must end in .mp4"),
        (["generate", "continue", "nothing.mp4"], "'nothing.mp4': No such file"),
        (["describe", "nothing.png"], "'nothing.png': No such file"),
        (["describe"], "no file was given"),
        (["answer", "What is it?", "nothing.png"], "'nothing.png': No such file"),
        (["demo", "--model", "nowhere"], "nowhere has no demo.parquet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, output, errors = run(capsys, *arguments)
    assert code == 2 and output == ""
    assert errors.startswith("emu3: ") and errors.count("\n") == 1 and words in errors


def make_command(error):
    @dataclasses.dataclass(frozen=True)
    class Fail:
        """Fails."""

        def run(self):
            raise error

    return Fail


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("it is\nblue"), 2, "emu3: it is blue\n"),
        (OSError(28, "No space left on device", "a.png"), 2, "emu3: [Errno 28] No space left on device: 'a.png'\n"),
        (KeyboardInterrupt(), 130, "emu3: stopped\n"),
    ],
)
def test_errors_become_exit_codes(capsys, monkeypatch, error, code, words):
    monkeypatch.setitem(cli.COMMANDS, "fail", make_command(error))
    assert run(capsys, "fail") == (code, "", words)


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "fail", make_command(KeyError("oops")))
    with pytest.raises(KeyError):
        cli.main(["fail"])


def test_outputs_are_checked_before_the_work(tmp_path):
    options.check_outputs([tmp_path / "new" / "a.png"], [".png"])
    assert (tmp_path / "new").is_dir()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        options.check_outputs([tmp_path / "folder.png"], [".png"])
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        options.check_outputs([tmp_path / "file" / "a.png"], [".png"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_told_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="read-only"):
        options.check_outputs([tmp_path / "a.png"], [".png"])


def test_a_reader_that_went_away_is_no_error():
    command = f"{sys.executable} -c 'import sys; from openemu3 import cli; sys.exit(cli.main([\"--version\"]))' | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
