"""One run on several meshes, changed on the way, ends where a single process ends; and what it says of itself is said once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openemu3.training.checkpoint import list_checkpoints, load_checkpoint
from openemu3.training.export import load_newest


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


def test_a_signal_to_one_rank_stops_all_and_loses_nothing(runs):
    folder, told = runs("stopped", "wrong")
    assert told["stopped"] == [[3, 3], [0, 0]], read_log(folder / "stopped")
    assert [row["step"] for row in read_rows(folder / "stopped") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    whole, stopped = (load_newest(folder / name, "transformer") for name in ("alone", "stopped"))
    for key, tensor in whole.items():
        torch.testing.assert_close(stopped[key], tensor, rtol=1e-3, atol=2e-6, msg=key)


def test_a_mesh_that_does_not_fit_the_processes_is_told_by_all(runs):
    folder, told = runs("stopped", "wrong")  # one process for both tests
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
