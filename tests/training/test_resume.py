"""Resuming equals never having stopped, bit for bit, for both learners, wherever the process was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openemu3.training.checkpoint import list_checkpoints, load_checkpoint


def read_rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("time", "steps_per_second", "tokens_per_second", "data_wait", "memory_gb")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_killed_runs_end_as_if_nothing_had_happened(data, tmp_path, kind):
    script = Path(__file__).with_name("killed_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, kind, data, tmp_path], env=environment, capture_output=True, text=True)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    told = json.loads(done.stdout)
    assert told["whole"] == told["killed"][-1] == "complete", logs
    # "SIGTERM": before the run could take signals. "stopped": it saved and returned.
    assert told["killed"][:-1] and set(told["killed"][:-1]) <= {"SIGKILL", "SIGTERM", "stopped"}, logs

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (path, other_path) = (list_checkpoints(folder / "checkpoints")[-1] for folder in (whole, killed))
    assert path.name == other_path.name
    tensors, state = load_checkpoint(path)
    other_tensors, other_state = load_checkpoint(other_path)
    assert state == other_state and tensors.keys() == other_tensors.keys()
    differing = [name for name, tensor in tensors.items() if not tensor.equal(other_tensors[name])]
    assert not differing
    assert read_rows(whole) == read_rows(killed)
    assert not [path.name for path in (killed / "checkpoints").glob(".*")]
    assert {path.name for path in (killed / "samples").glob("step*")} == {path.name for path in (whole / "samples").glob("step*")}
