"""Many processes as one run: the mesh of ranks, sums over it, and an end that does not hang.

In: the environment that `torchrun` sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and a ParallelConfig. Out: a DeviceMesh
dp x cp x tp, or None for a single process, in which case nothing here does anything. The surprising thing: ranks of one tp group hold
the same data and reach the same losses, so sums run over dp and cp alone.

Neighbouring ranks differ in tp first, then in cp, then in dp: what talks most sits closest together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openemu3.records import InputError


@dataclass(frozen=True)
class ParallelConfig:
    """How a training is spread over processes, and what each of them recomputes and compiles. Processes = dp x cp x tp."""

    dp: int = 1
    """Data parallel: groups of ranks that read different rows. Weights, gradients and optimizer are sharded over them (FSDP)."""
    cp: int = 1
    """Context parallel: ranks that share the tokens of one row."""
    tp: int = 1
    """Tensor parallel: ranks that share the heads, the feed-forward and the vocabulary of every layer."""
    replicate: int = 1
    """Of dp, how many groups keep a whole copy of the weights each and shard within (HSDP); 1 shards over all of dp."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing; all but attention and every second product; whole layers."""
    compile: bool = False
    """Compile every layer with torch.compile."""
    timeout_seconds: float = 600.0
    """How long a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        for name in ("dp", "cp", "tp", "replicate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; a whole number of at least 1 is allowed")
        if self.dp % self.replicate:
            raise InputError(f"replicate is {self.replicate}; a divisor of dp ({self.dp}) is allowed")
        if self.activation_checkpointing not in ("none", "selective", "full"):
            raise InputError(f"activation_checkpointing is {self.activation_checkpointing!r}; none, selective or full is allowed")
        if not 0 < self.timeout_seconds < float("inf"):
            raise InputError(f"timeout_seconds is {self.timeout_seconds}; a finite number above 0 is allowed")

    @property
    def num_ranks(self) -> int:
        return self.dp * self.cp * self.tp


# What gloo's RuntimeErrors say where a connection broke or a time ran out; NCCL's errors have a type of their own.
LOST_CONNECTION = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


class RankError(RuntimeError):
    """Another rank ended, or did not answer in time. This rank did nothing wrong."""


@contextmanager
def distributed_run(config: ParallelConfig, device: str = "cpu") -> Iterator[DeviceMesh | None]:
    """A run on many ranks, from start to a clean end. Yields the mesh, or None for one process.

    Raises RankError where another rank has ended or stands still, and InputError where the processes do not fit the mesh.
    """
    mesh = start_distributed(config, device)
    if mesh is None:
        yield None
        return
    try:
        yield mesh
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise RankError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another rank, or waited {config.timeout_seconds:g} seconds for it; "
            "the rank that failed first says why; checkpoints are whole, and the same command goes on from the newest one"
        ) from error
    finally:
        dist.destroy_process_group()


def start_distributed(config: ParallelConfig, device: str = "cpu") -> DeviceMesh | None:
    """The mesh dp x cp x tp of this run, with collectives by gloo on a CPU and by NCCL on GPUs; None for a single process.

    device: "cpu" or "cuda"; of the GPUs, each rank takes the one that LOCAL_RANK numbers.
    """
    num_processes = read_whole_number("WORLD_SIZE", 1)
    if num_processes != config.num_ranks:
        raise InputError(
            f"the mesh dp {config.dp} x cp {config.cp} x tp {config.tp} has {config.num_ranks} ranks, but the number of processes is "
            f"{num_processes}; start as many as ranks, with torchrun --nproc-per-node"
        )
    if num_processes == 1:
        return None
    kind = torch.device(device).type
    if kind == "cuda":
        local_rank, num_devices = read_whole_number("LOCAL_RANK", 0), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise InputError(f"LOCAL_RANK is {local_rank}; this machine has {num_devices} GPUs: start at most one process for each")
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=config.timeout_seconds)
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # what torch raises where no rendezvous comes about, or its address is missing
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the {num_processes} processes did not find each other within {config.timeout_seconds:g} seconds ({reason})"
        ) from error
    return limit_waiting(init_device_mesh(kind, (config.dp, config.cp, config.tp), mesh_dim_names=("dp", "cp", "tp")))


def limit_waiting(mesh: DeviceMesh) -> DeviceMesh:
    """Give the groups of a mesh the timeout of the whole run; torch gives those that it makes half an hour. Returns the mesh."""
    assert dist.group.WORLD is not None  # a mesh exists, so the run has begun
    options = dist.group.WORLD._get_backend(torch.device(mesh.device_type)).options
    if options is not None:  # torch's fake backend, with which a plan is tried on many ranks, has none: nobody waits there
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(options._timeout, group)
    return mesh


def read_whole_number(variable: str, default: int) -> int:
    """An environment variable as a whole number of at least 0."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise InputError(f"environment variable {variable} is {text!r}; a whole number is allowed (torchrun sets it)")
    return int(text)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, dist.DistError) or any(sign in text for sign in LOST_CONNECTION):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def sum_over(mesh: DeviceMesh | None, values: Tensor) -> Tensor:
    """Values summed over all ranks that hold different data (dp x cp); the same on every rank, and unchanged where mesh is None."""
    if mesh is None:
        return values
    total = values.to(mesh.device_type)
    for name in ("cp", "dp"):
        if mesh[name].size() > 1:
            total = total.clone()
            dist.all_reduce(total, group=mesh[name].get_group())
    return total.to(values.device)


def any_rank(mesh: DeviceMesh | None, flag: bool) -> bool:
    """Whether the flag is set on any rank of the run: the same answer everywhere, so that all stop, or none."""
    if mesh is None:
        return flag
    raised = torch.tensor(float(flag), device=mesh.device_type)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(which part of every global batch this rank reads, number of parts)."""
    return (0, 1) if mesh is None else (mesh["dp"].get_local_rank(), mesh["dp"].size())


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this rank is the one that writes what is written once."""
    return mesh is None or dist.get_rank() == 0
