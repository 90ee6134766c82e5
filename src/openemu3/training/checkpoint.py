"""Checkpoints one can resume from, on the same mesh or another: tensors as safetensors, everything else as JSON, whole or not at all.

A checkpoint is a folder `step-00001234` with one `shard-...safetensors` for each rank that had something to write, and `state.json`.
torch's distributed checkpoints (DCP) decide who writes and who reads what. Their usual `.metadata` file is a pickle and their usual
shards are made by torch.save; here they go through DCP's safetensors storage instead, whose shards say in their own headers which part
of which tensor they hold, so nothing is ever unpickled. The folder is written under another name, synced and renamed: a name that
reads `step-...` is always complete, whenever the process is killed. `state.json`, written last, lists the shards and their sizes.

Checkpoints of one file `tensors.safetensors`, as written before, are read in the same way.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from openemu3.records import InputError

State = dict[str, Any]
STATE_FILE = "state.json"
SAVE_TIMEOUT = timedelta(minutes=30)  # how long ranks wait for the slowest one's disk


# ---- saving


class CheckpointWriter:
    """Saves below `folder`, in the background and one at a time, and keeps the newest `keep` (at least 1).

    In a run of many ranks all of them must make one, and call it alike: it has a gloo group of its own, so that its traffic never
    meets that of the training. A save that failed raises its InputError at the next call.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: State) -> None:
        """Copy the tensors to the CPU, then write the copies while the caller goes on. Waits for the save before this one."""
        self.wait()
        staged: Any = DefaultStager(StagingOptions(False, False, False, False)).stage(dict(tensors))  # at once, since no option is on
        self._pending = self._thread.submit(save_checkpoint, self.folder, step, staged, copy.deepcopy(state), self.keep, self.group)

    def wait(self) -> None:
        """Until what was begun is on the disk, or has failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def find_newest(self) -> Path | None:
        """The newest checkpoint as the first rank sees it; the same for all ranks."""
        newest = next(reversed(list_checkpoints(self.folder)), None)
        if self.group is None:
            return newest
        step = torch.tensor(-1 if newest is None else int(newest.name.removeprefix("step-")))
        dist.broadcast(step, src=0, group=self.group)
        return None if step < 0 else self.folder / f"step-{int(step):08d}"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: State, keep: int = 2, group: dist.ProcessGroup | None = None
) -> Path:
    """Write a checkpoint below `folder`, remove all but the newest `keep` (at least 1), and return its path.

    tensors: plain ones, the same on every rank, or DTensors. group: a gloo group of all ranks; None for a single process.
    What a killed save left behind (`.step-...`) is removed. A step is saved once: FileExistsError if its checkpoint is there.
    Raises InputError where it cannot be written; the checkpoints before it are then as they were.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if final.exists():
        raise FileExistsError(f"checkpoint {final} exists already; a step is saved once")
    is_first = group is None or dist.get_rank(group) == 0
    try:
        if is_first:
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover)
        partial.mkdir(parents=True, exist_ok=True)
        write_shards(partial, tensors, group)  # returns when all ranks have written and synced their files
        if is_first:
            files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            (partial / STATE_FILE).write_text(json.dumps({"files": files, **state}), encoding="utf-8")
            for path in (partial / STATE_FILE, partial):
                sync(path)
            partial.rename(final)
            sync(folder)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"checkpoint {final} cannot be written ({find_reason(error)})") from error
    if is_first:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(folder / f".{old.name}.removed"))  # renamed first, so that it is never seen half deleted
    return final


def write_shards(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Every rank writes and syncs the file of what it alone has, or has first."""
    contiguous = {name: tensor if tensor.is_contiguous() else tensor.contiguous() for name, tensor in tensors.items()}
    silence_single_process()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(contiguous, storage_writer=writer, process_group=group, no_dist=group is None)


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


# ---- loading


def load_checkpoint(path: Path, prefix: str | None = None) -> tuple[dict[str, Tensor], State]:
    """(tensors, state) of one checkpoint, whole and on the CPU, whatever mesh wrote it. Raises InputError where it is damaged.

    prefix: read only the tensors named `prefix/...`; a model is a third of what a checkpoint holds.
    """
    state = read_state(path)
    stored = read_headers(path)
    chosen = {name: header for name, header in stored.items() if prefix is None or name.startswith(f"{prefix}/")}
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in chosen.items()}
    read_shards(path, tensors, None)
    return tensors, state


def load_into(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> State:
    """Fill `tensors` in place, each rank with its part, and return the state. Raises InputError for a checkpoint of something else."""
    state = read_state(path)
    stored = read_headers(path)
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        raise InputError(
            f"checkpoint {path} is of another configuration ({len(differing)} tensors differ, first {differing[0]}: "
            f"{describe(stored.get(differing[0]))} there, {describe(wanted.get(differing[0]))} here); name another run folder"
        )
    read_shards(path, tensors, group)
    return state


def read_state(path: Path) -> State:
    """state.json, once all shards that it lists are there in full length."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, size in state.pop("files", {}).items():
            found = (path / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    return state


def read_headers(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """(shape, dtype) of every tensor, from the shards' headers."""
    try:
        metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, error) from error
    headers = metadata.state_dict_metadata.items()
    return {name: (entry.size, entry.properties.dtype) for name, entry in headers if isinstance(entry, TensorStorageMetadata)}


def read_shards(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    silence_single_process()
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), process_group=group, no_dist=group is None)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"checkpoint {path} cannot be read ({find_reason(error)}); remove it to resume from the one before")


def describe(header: tuple[torch.Size, torch.dtype] | None) -> str:
    return "absent" if header is None else f"{str(header[1]).removeprefix('torch.')} {list(header[0])}"


def find_reason(error: BaseException) -> str:
    """What went wrong in one line; DCP wraps the errors of all ranks, with their stacks, into one."""
    if isinstance(error, dcp.api.CheckpointException):
        return "; ".join(dict.fromkeys(str(failure) for failure, _ in error.failures.values()))
    return str(error)


def silence_single_process() -> None:
    """DCP warns that it works in one process, which is what is meant here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# ---- names


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
