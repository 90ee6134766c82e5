"""Checkpoints one can resume from: tensors as safetensors, everything else as JSON, written whole or not at all.

A checkpoint is a folder `step-00001234` with `tensors.safetensors` and `state.json`. It is written under another name, synced
and renamed, so that a name that reads `step-...` is always complete, whenever the process is killed. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openemu3.records import InputError

State = dict[str, Any]


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: State, keep: int = 2) -> Path:
    """Write a checkpoint below `folder`, remove all but the newest `keep` (at least 1), and return its path.

    What a killed save left behind (`.step-...`) is removed. A step is saved once: FileExistsError if its checkpoint is there.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if final.exists():
        raise FileExistsError(f"checkpoint {final} exists already; a step is saved once")
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    try:
        partial.mkdir(parents=True)
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"checkpoint {final} cannot be written ({error})") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.removed"))  # renamed first, so that it is never seen half deleted
    return final


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], State]:
    """(tensors, state) of one checkpoint. Raises InputError where it is damaged."""
    try:
        return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); remove it to resume from the one before") from error


def list_optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """An optimizer's per-parameter state as `name.key` -> tensor, by the parameters' own names."""
    return {f"{names[p]}.{key}": torch.as_tensor(value) for p, values in optimizer.state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Put back what `list_optimizer_tensors` gave. All of it lives with its parameter: the fused AdamW wants its step counter there too."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit(".", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device)


def name_parameters(module: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
