"""The engine starts without reporting to its makers, and one process has one runner."""

from __future__ import annotations

import os

import pytest

from openemu3.curation.engine import start_engine
from openemu3.records import InputError


def test_daft_is_opted_out_of_its_telemetry_by_its_own_word() -> None:
    start_engine()
    from daft.scarf_telemetry import opted_out, track_import_on_scarf

    assert opted_out()
    assert track_import_on_scarf()[0] is None  # no thread that sends
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_starting_again_is_the_same_engine() -> None:
    assert start_engine() is start_engine("native")


def test_no_other_module_of_the_package_imports_daft_or_ray() -> None:
    from pathlib import Path

    import openemu3

    folder = Path(openemu3.__file__).parent
    users = [
        path.name
        for path in folder.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("import daft", "from daft", "import ray", "from ray"))
    ]
    assert set(users) == {"engine.py"}


def test_a_runner_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="runner is ray, which is not installed"):
        start_engine("ray")
