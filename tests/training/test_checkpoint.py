"""Checkpoints come back as they were, and are there whole or not at all, wherever the process dies while saving."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from openemu3.records import InputError
from openemu3.training import checkpoint
from openemu3.training.checkpoint import (
    add_prefix,
    list_checkpoints,
    list_optimizer_tensors,
    load_checkpoint,
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

    def guard(name, real):
        def call(*arguments, **keywords):
            calls.append(name)
            if len(calls) - 1 != deadly:
                return real(*arguments, **keywords)
            if moment == "after":
                real(*arguments, **keywords)
            elif moment == "amid" and name == "rmtree":
                next(path for path in Path(arguments[0]).iterdir()).unlink()
            elif moment == "amid" and name in ("save_file", "write_text"):
                Path(arguments[name == "save_file"]).write_bytes(b"half")
            raise Killed

        return call

    monkeypatch.setattr(checkpoint, "save_file", guard("save_file", checkpoint.save_file))
    monkeypatch.setattr(os, "fsync", guard("fsync", os.fsync))
    monkeypatch.setattr(shutil, "rmtree", guard("rmtree", shutil.rmtree))
    for name in ("write_text", "rename", "mkdir"):
        monkeypatch.setattr(Path, name, guard(name, getattr(Path, name)))

    def save_three(folder):
        for step in (1, 2, 3):
            save_checkpoint(folder, step, make_tensors(step), {"step": step}, keep=1)

    save_three(tmp_path / "whole")
    num_calls = len(calls)
    assert {"save_file", "fsync", "rmtree", "write_text", "rename", "mkdir"} == set(calls) and num_calls > 20
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


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, make_tensors(1), {})

    def fail(*arguments):
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(InputError, match="step-00000002 cannot be written .*No space left"):
        save_checkpoint(tmp_path, 2, make_tensors(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damage_is_told(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, 1, make_tensors(1), {"step": 1})
    if damage == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:-5])
    else:
        (path / name).unlink()
    with pytest.raises(InputError, match="step-00000001 cannot be read"):
        load_checkpoint(path)


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
