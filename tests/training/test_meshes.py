"""One run on several meshes, changed on the way, ends where a single process ends; and what it says of itself is said once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openemu3.training.checkpoint import list_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """runs(name) -> (folder of the runs, how the ranks of each ended); the run `alone` is always there."""
    folder, told = tmp_path_factory.mktemp("meshes"), {}

    def start(*names):
        script = Path(__file__).with_name("mesh_runs.py")
        missing = [name for name in ("alone", *names) if name not in told]
        if not missing:
            return folder, told
        command = [sys.executable, script, data, folder, *missing]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.update(json.loads(done.stdout))
        return folder, told

    return start


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_log(folder):
    return folder.with_suffix(".log").read_text()[-3000:]


@pytest.mark.parametrize(("name", "shards"), [("dp_then_tp", 2), pytest.param("cp_then_alone", 1, marks=pytest.mark.slow)])
def test_a_run_that_changes_its_mesh_ends_where_one_process_ends(runs, name, shards):
    folder, told = runs(name)
    assert told["alone"] == [[0]] and set(sum(told[name], [])) == {0}, read_log(folder / name)
    newest = list_checkpoints(folder / name / "checkpoints")[-1]
    assert newest.name == "step-00000006" and len(list(newest.glob("*.safetensors"))) == shards
    whole, parted = (load_checkpoint(list_checkpoints(folder / run / "checkpoints")[-1])[0] for run in ("alone", name))
    assert whole.keys() == parted.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(parted[key], tensor, rtol=1e-3, atol=2e-6, msg=key)
    rows, expected = ([row for row in read_rows(folder / run) if row["step"] != 3 or "loss" in row] for run in (name, "alone"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]  # each row once, by the first rank
    same = {"loss", "grad_norm", "tokens", "fill_rate", "image/loss_vision", "validation/loss", "validation/video/loss_vision"}
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert {key: row[key] for key in row.keys() & same} == {key: pytest.approx(other[key], rel=1e-5) for key in other.keys() & same}


@pytest.mark.parametrize(("name", "ends"), [("stopped", [3, 3]), ("killed", [1, -9])])
def test_a_signal_to_one_rank_loses_nothing(runs, name, ends):
    """SIGTERM to the second rank: all save and stop. SIGKILL: the first rank notices and ends. Gone on with, both end like a run that was
    left alone on that mesh, to the bit."""
    folder, told = runs("dp", "stopped", "killed", "wrong")  # one process for three tests
    assert told[name] == [ends, [0, 0]], read_log(folder / name)
    if name == "killed":
        assert "lost another rank" in read_log(folder / name) or "cannot be written" in read_log(folder / name)
    assert [row["step"] for row in read_rows(folder / name) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    whole, other = (load_checkpoint(list_checkpoints(folder / run / "checkpoints")[-1])[0] for run in ("dp", name))
    assert whole.keys() == other.keys() and all(tensor.equal(other[key]) for key, tensor in whole.items())


def test_a_mesh_that_does_not_fit_the_processes_is_told_by_all(runs):
    folder, told = runs("dp", "stopped", "killed", "wrong")
    assert told["wrong"] == [[1, 1]]
    assert (
        read_log(folder / "wrong").count("has 4 ranks, but the number of processes is 2") == 2
        and not (folder / "wrong" / "checkpoints").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("mixed", torch.float32), ("bf16", torch.bfloat16)])
def test_other_precisions_on_a_mesh(runs, precision, dtype):
    folder, told = runs(precision)
    assert told[precision] == [[0, 0]], read_log(folder / precision)
    tensors = load_checkpoint(list_checkpoints(folder / precision / "checkpoints")[-1])[0]
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".step")} == {dtype}
    losses, expected = ([row["loss"] for row in read_rows(folder / name) if "loss" in row] for name in (precision, "alone"))
    assert losses == pytest.approx(expected[:2], rel=0.02)
