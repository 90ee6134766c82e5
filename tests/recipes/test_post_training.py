"""The whole story of post-training on real pictures, in small (slow), and what the recipe says about itself."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import prepare_samples
import pytest
from select_core import select_core

from openemu3.data.samples import read_samples, write_samples
from openemu3.media import read_image

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "recipes" / "post_training.sh"


def test_it_explains_itself_and_refuses_what_it_does_not_know(run_recipe, tmp_path: Path) -> None:
    explained = run_recipe("post_training.sh", "--help", cwd=tmp_path)
    assert explained.returncode == 0 and "set -euo" not in explained.stdout
    for flag in ("--smoke", "--work", "--model", "--samples"):
        assert f"\n  {flag} " in explained.stdout
    for arguments, words in ((["--fast"], "--fast is unknown"), (["--work"], "--work needs a folder")):
        refused = run_recipe("post_training.sh", *arguments, cwd=tmp_path)
        assert refused.returncode == 2 and words in refused.stderr and refused.stdout == ""
    missing = run_recipe("post_training.sh", "--smoke", "--work", "work", "--samples", "nowhere", cwd=tmp_path)
    assert missing.returncode == 2 and "nowhere/images.parquet is missing; recipes/mini_cpu.sh makes it" in missing.stderr


def test_every_script_in_it_is_there() -> None:
    text = SCRIPT.read_text()
    scripts = {word for word in text.split() if word.startswith("$parts/")}
    assert len(scripts) == 6 and all((SCRIPT.parent / "post_training" / word.removeprefix("$parts/")).is_file() for word in scripts)
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.slow
def test_from_the_mini_model_to_the_report(run_recipe, real_packages: Path, lpips_weights: Path, tmp_path: Path) -> None:
    """All ten steps: selection, pictures at several sizes, quality tuning, candidates, votes, DPO, understanding, the report."""
    prepare_samples.main(prepare_samples.Preparation(("images",), packages=real_packages, output=tmp_path / "all"))
    core = select_core(read_samples(tmp_path / "all" / "images.parquet"), Counter())
    write_samples(tmp_path / "core" / "images.parquet", core)
    environment = {"OPENEMU3_CACHE": str(lpips_weights), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = run_recipe("post_training.sh", "--smoke", "--work", "work", "--samples", "core", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]

    report = json.loads((tmp_path / "work" / "report.json").read_text())
    assert 0 <= report["preferences"]["win rate"]["mean"] <= 1
    assert {"retrieval", "as drawn", "style"} <= set(report["alignment"])
    assert set(report["alignment"]["style"]) == {"before", "after quality tuning", "after DPO", "change", "ceiling"}
    assert set(report["image-to-text"]) == {"before", "after"} and "what" in report["instruction"]
    page = (tmp_path / "work" / "report.html").read_text()
    assert "data:image/png;base64," in page and "Preferences" in page
    assert read_image(tmp_path / "work" / "before_after.png").shape[0] == 3

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("model.safetensors")}
    again = run_recipe("post_training.sh", "--smoke", "--work", "work", "--samples", "core", cwd=tmp_path, **environment)
    assert again.returncode == 0 and again.stderr.count("is there already") >= 6, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("model.safetensors")} == before
