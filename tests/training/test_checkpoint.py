"""Checkpoints come back as they were, and are there whole or not at all, wherever the process dies while saving."""

import itertools
import json
import os
import pickle  # noqa: TID251 - to see that nobody uses it
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from openemu3.records import InputError
from openemu3.training import checkpoint
from openemu3.training.checkpoint import (
    CheckpointWriter,
    add_prefix,
    list_checkpoints,
    list_optimizer_tensors,
    load_checkpoint,
    load_into,
    load_optimizer_tensors,
    name_parameters,
    save_checkpoint,
    take_prefix,
)


def make_tensors(step):
    return {"weights/a": torch.full((3, 2), float(step)), "weights/b": torch.tensor([step]), "other/a": torch.arange(4).bfloat16()}


def test_round_trip(tmp_path):
    tensors = make_tensors(7) | {"view": torch.arange(12.0).view(3, 4).t()}
    state = {"step": 7, "learner": {"losses": {"image": {"l2": 0.1}}, "none": None}}
    path = save_checkpoint(tmp_path, 7, tensors, state)
    assert path.name == "step-00000007" and list_checkpoints(tmp_path) == [path]
    found, found_state = load_checkpoint(path)
    assert found_state == state and found.keys() == tensors.keys()
    assert all(found[name].equal(tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert take_prefix("weights", found).keys() == {"a", "b"}
    assert add_prefix("weights", take_prefix("weights", found)).keys() == {"weights/a", "weights/b"}


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 11):
        save_checkpoint(tmp_path, step, make_tensors(step), {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000011", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000011", "step-00000100"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_step_is_saved_once(tmp_path):
    save_checkpoint(tmp_path, 5, make_tensors(5), {})
    with pytest.raises(FileExistsError, match="step-00000005"):
        save_checkpoint(tmp_path, 5, make_tensors(6), {})
    assert load_checkpoint(tmp_path / "step-00000005")[0]["weights/b"].item() == 5


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_killed_at_any_moment_of_saving(tmp_path, monkeypatch):
    """Every call that touches the disk, in turn, is the last one; it dies before its work, in the middle of it, or after it."""
    calls: list[str] = []
    deadly, moment = -1, "before"
    writing = False  # torch's own writer is at work, whose calls are not ours

    def guard(name, real):
        def call(*arguments, **keywords):
            nonlocal writing
            if writing:
                return real(*arguments, **keywords)
            calls.append(name)
            writing = name == "write_shards"
            try:
                return die_or_do(*arguments, **keywords)
            finally:
                writing = False

        def die_or_do(*arguments, **keywords):
            if len(calls) - 1 != deadly:
                return real(*arguments, **keywords)
            if moment == "after":
                real(*arguments, **keywords)
            elif moment == "amid" and name == "rmtree":
                next(path for path in Path(arguments[0]).iterdir()).unlink()
            elif moment == "amid" and name == "write_shards":
                (arguments[0] / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
            elif moment == "amid" and name == "write_text":
                arguments[0].write_bytes(b"half")
            raise Killed

        return call

    monkeypatch.setattr(checkpoint, "write_shards", guard("write_shards", checkpoint.write_shards))
    monkeypatch.setattr(os, "fsync", guard("fsync", os.fsync))
    monkeypatch.setattr(shutil, "rmtree", guard("rmtree", shutil.rmtree))
    for name in ("write_text", "rename", "mkdir"):
        monkeypatch.setattr(Path, name, guard(name, getattr(Path, name)))

    def save_three(folder):
        for step in (1, 2, 3):
            save_checkpoint(folder, step, make_tensors(step), {"step": step}, keep=1)

    save_three(tmp_path / "whole")
    num_calls = len(calls)
    assert {"write_shards", "fsync", "rmtree", "write_text", "rename", "mkdir"} == set(calls) and num_calls > 20
    seen = set()
    for death in itertools.product(range(num_calls), ("before", "amid", "after")):
        deadly, moment = death
        folder = tmp_path / f"{deadly}-{moment}"
        calls.clear()
        with pytest.raises(Killed):
            save_three(folder)
        found = [load_checkpoint(path) for path in list_checkpoints(folder)]  # all that have a name are whole
        for tensors, state in found:
            assert all(tensor.equal(make_tensors(state["step"])[name]) for name, tensor in tensors.items())
        seen.add(found[-1][1]["step"] if found else 0)
        # The next save works, and clears up.
        deadly = -1
        save_checkpoint(folder, 4, make_tensors(4), {"step": 4}, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("most", [0, 200, 20_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, most):
    """The system refuses to write more than so many bytes into any file, as a full disk does."""
    tensors = make_tensors(2) | {"large": torch.zeros(10_000)}
    save_checkpoint(tmp_path, 1, tensors, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(InputError, match="step-00000002 cannot be written .*File too large"):
            save_checkpoint(tmp_path, 2, tensors, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001")[1] == {"step": 1}


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damage_is_told(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, 1, make_tensors(1), {"step": 1})
    if damage == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:-5])
    else:
        (path / name).unlink()
    with pytest.raises(InputError, match="step-00000001 cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_of_something_else_is_told_before_anything_is_changed(tmp_path):
    path = save_checkpoint(tmp_path, 1, make_tensors(1), {})
    same = {name: torch.zeros_like(tensor) for name, tensor in make_tensors(1).items()}
    for change, words in (
        ({"weights/c": torch.zeros(1)}, "1 tensors differ, first weights/c: absent there, float32 .1. here"),
        ({"weights/a": torch.zeros(3, 3)}, r"first weights/a: float32 \[3, 2\] there, float32 \[3, 3\] here"),
        ({"other/a": torch.zeros(4)}, r"first other/a: bfloat16 \[4\] there, float32 \[4\] here"),
    ):
        with pytest.raises(InputError, match=words):
            load_into(path, same | change)
    assert not any(tensor.any() for tensor in same.values())
    load_into(path, same)
    assert all(tensor.equal(make_tensors(1)[name]) for name, tensor in same.items())


def test_one_part_alone_can_be_read(tmp_path):
    path = save_checkpoint(tmp_path, 1, make_tensors(1), {})
    assert load_checkpoint(path, "weights")[0].keys() == {"weights/a", "weights/b"}


def test_checkpoints_of_the_first_format_are_read(tmp_path):
    """One file of plain tensors and a state.json without a list of files."""
    path = tmp_path / "step-00000003"
    path.mkdir()
    save_file(make_tensors(3), path / "tensors.safetensors")
    (path / "state.json").write_text(json.dumps({"step": 3}))
    tensors, state = load_checkpoint(path)
    assert state == {"step": 3} and all(tensors[name].equal(tensor) for name, tensor in make_tensors(3).items())


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a pickle was made or read")

    for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")), (torch, ("save", "load"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    path = save_checkpoint(tmp_path, 1, make_tensors(1), {"step": 1})
    assert load_checkpoint(path)[0].keys() == make_tensors(1).keys()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


# ---- in the background


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path, monkeypatch):
    """The write is held back until the tensors and the state have been changed."""
    changed = threading.Event()
    real = checkpoint.write_shards

    def wait_and_write(*arguments):
        assert changed.wait(30)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "write_shards", wait_and_write)
    writer, tensors, state = CheckpointWriter(tmp_path), make_tensors(1), {"seen": [1]}
    writer.save(1, tensors, state)
    for tensor in tensors.values():
        tensor.zero_()
    state["seen"].append(2)
    assert list_checkpoints(tmp_path) == [] and writer.find_newest() is None
    changed.set()
    writer.wait()
    assert writer.find_newest() == tmp_path / "step-00000001"
    found, found_state = load_checkpoint(tmp_path / "step-00000001")
    assert found_state == {"seen": [1]} and all(found[name].equal(tensor) for name, tensor in make_tensors(1).items())


def test_a_save_that_failed_in_the_background_is_told_at_the_next_call(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, make_tensors(1), {})
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shards", fail)
        writer.save(2, make_tensors(2), {})
        with pytest.raises(InputError, match="step-00000002 cannot be written .*No space left"):
            writer.wait()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_optimizers_state_goes_on_as_if_it_had_not_been_away(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(5, 4)

    def build():
        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        return module, torch.optim.AdamW(module.parameters(), 0.1, fused=True)

    def update(module, optimizer):
        module(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, first = build()
    update(one, first)
    tensors = add_prefix("w", one.state_dict()) | add_prefix("o", list_optimizer_tensors(first, name_parameters(one)))
    save_checkpoint(tmp_path, 1, tensors, {})
    update(one, first)
    other, second = build()
    tensors, _ = load_checkpoint(tmp_path / "step-00000001")
    other.load_state_dict(take_prefix("w", tensors))
    load_optimizer_tensors(second, name_parameters(other), take_prefix("o", tensors))
    update(other, second)
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
