"""The one training loop: take batches, let the learner learn, log, validate, save, stop and resume.

In: a Learner (what one step does) and a batch source (`batches(position)` yields batches from a position on). Out: a run folder
with checkpoints, `run.json` (what is trained), `metrics.jsonl` and TensorBoard files. A run that was killed, started again with the
same command, goes on from its newest checkpoint and ends as if nothing had happened, bit for bit: batches and random numbers are
functions of the step's number, and what was logged after that checkpoint is forgotten, since those steps are made again.

In a run of many ranks all of them go through the same loop; the first alone logs. Checkpoints are written while the loop goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from openemu3.distributed import any_rank, is_first
from openemu3.records import InputError
from openemu3.training.checkpoint import CheckpointWriter, State, load_into

DESCRIPTION_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

Metrics = dict[str, float]


class Learner(Protocol):
    """One thing that learns: how a step goes, what must be saved, how it is measured."""

    def learn(self, step: int, batches: list[Any]) -> Metrics:
        """One update from its micro-batches. A loss or gradient that is not finite must leave the weights alone and show as such.

        Of the metrics, `tokens` and `flops` are those of this step on all ranks; the loop makes rates of them.
        """

    def validate(self) -> Metrics: ...

    def write_samples(self, folder: Path, step: int) -> None:
        """Leave something to look at (pictures) under `folder`."""

    def list_tensors(self) -> dict[str, Tensor]:
        """All that is learnt and remembered, from the beginning: a checkpoint is read into these very tensors."""

    def list_state(self) -> State: ...

    def load(self, tensors: dict[str, Tensor], state: State) -> None:
        """Take over `tensors`, which are those of `list_tensors`, filled, and what `list_state` gave."""


class Stateful(Protocol):
    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


@dataclass(frozen=True)
class TrainerConfig:
    """When to do what. Cadences are in steps; 0 means never, but the last step always validates, samples and saves."""

    folder: Path
    num_steps: int = 1000
    micro_batches: int = 1  # accumulated into one step
    log_every: int = 10
    validate_every: int = 250
    sample_every: int = 250
    save_every: int = 250
    keep_checkpoints: int = 2
    max_bad_steps: int = 10  # consecutive steps that were not finite, before the run gives up
    seed: int = 0  # of dropout; torch's global generator is set anew from it and the step's number before every step
    validate_first: bool = False  # measure before the first step, too
    peak_flops: float | None = None  # what one device can do in a second, for MFU; 0: MFU is not reported; None: a language run measures it
    wandb: str = ""  # project to log to as well; "": none

    def __post_init__(self) -> None:
        for name in ("num_steps", "micro_batches", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("log_every", "validate_every", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, which means never")
        if self.peak_flops is not None and not 0 <= self.peak_flops < math.inf:
            raise InputError(f"peak_flops is {self.peak_flops}; a finite number of at least 0 is allowed")


class Trainer:
    """One run: at most one command at a time may train in a run folder.

    Args:
        batches: batches(position) yields micro-batches from number `position` of the run's endless sequence on.
        description: what is trained on what, in plain values; kept as `run.json` in the run folder, where exporting finds it.
        mesh: of the run's ranks; None for a single process.
        name_samples: what a micro-batch was made of, to be logged when its step has to be skipped.
        loader: what the batches come from, if it has a state that finds a position faster, and knows data that are not the same.
    """

    def __init__(
        self,
        config: TrainerConfig,
        learner: Learner,
        batches: Callable[[int], Iterator[Any]],
        description: Mapping[str, Any] | None = None,
        mesh: DeviceMesh | None = None,
        name_samples: Callable[[Any], Iterable[str]] | None = None,
        loader: Stateful | None = None,
    ) -> None:
        self.config = config
        self.learner = learner
        self.batches = batches
        self.description = description
        self.mesh = mesh
        self.name_samples = name_samples
        self.loader = loader
        self.step = 0  # steps done
        self.saved_step = 0  # those in the newest checkpoint, or in the one that is being written
        self.stopping = False

    def run(self) -> int:
        """Train to the last step, or until `stop`. Returns the number of steps done in all.

        In the main thread SIGTERM and SIGINT (Ctrl-C) call `stop`; a second Ctrl-C ends the run at once, without saving.
        Raises InputError for a folder in which another process is training, a checkpoint that is damaged or of another
        configuration, and a training that has diverged.
        """
        config = self.config
        with ExitStack() as stack:
            if is_first(self.mesh):
                config.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(config.folder))
            stack.enter_context(self._handle_signals())
            checkpoints = CheckpointWriter(config.folder / "checkpoints", config.keep_checkpoints)
            self._resume(checkpoints)
            if self.step < config.num_steps and not any_rank(self.mesh, self.stopping):
                log = None
                if is_first(self.mesh):
                    self._write_description()
                    log = stack.enter_context(MetricsLog(config.folder, self.step, config.wandb))
                stack.callback(checkpoints.wait)  # also when the loop ends with an error: what was begun is finished
                self._loop(log, checkpoints, stack.enter_context(build_progress(is_first(self.mesh))))
        return self.step

    def stop(self) -> None:
        """Have the run save and return as soon as the step under way is done. Safe from any thread."""
        self.stopping = True

    @property
    def is_complete(self) -> bool:
        return self.step >= self.config.num_steps

    def _loop(self, log: MetricsLog | None, checkpoints: CheckpointWriter, progress: Progress) -> None:
        config, learner = self.config, self.learner
        bar = progress.add_task(config.folder.name, total=config.num_steps, completed=self.step, status="")
        source = self.batches(self.step * config.micro_batches)
        if config.validate_first and self.step == 0:
            self._validate(log)
        bad_steps, rates = 0, Rates(self.mesh, config.peak_flops or 0.0)
        while not self.is_complete and not any_rank(self.mesh, self.stopping):
            seed_step(config.seed, self.step, self.mesh)
            with rates.waiting():
                batches = [next(source) for _ in range(config.micro_batches)]
            metrics = learner.learn(self.step, batches)
            self.step += 1
            rates.add(metrics)
            bad_steps = 0 if all(math.isfinite(value) for value in metrics.values()) else bad_steps + 1
            if bad_steps:
                self._report_bad_step(log, bad_steps, metrics, batches)
            progress.update(bar, completed=self.step)
            if due(self.step, config.log_every):
                metrics |= {"position": float(self.step * config.micro_batches), **rates.take()}
                if log is not None:
                    log.write(self.step, metrics)
                progress.update(bar, status=format_status(metrics))
            if due(self.step, config.validate_every) or self.is_complete:
                self._validate(log)
            if due(self.step, config.sample_every) or self.is_complete:
                learner.write_samples(config.folder / "samples", self.step)
            if due(self.step, config.save_every) or self.is_complete:
                self._save(checkpoints)
        if self.step > self.saved_step:  # stopped
            self._save(checkpoints)

    def _validate(self, log: MetricsLog | None) -> None:
        metrics = {f"validation/{name}": value for name, value in self.learner.validate().items()}
        if log is not None:
            log.write(self.step, metrics)

    def _report_bad_step(self, log: MetricsLog | None, bad_steps: int, metrics: Metrics, batches: list[Any]) -> None:
        """Log a step that was skipped and what was in it; InputError when there were too many in a row."""
        samples = []
        if self.name_samples is not None:
            samples = gather(self.mesh, [name for batch in batches for name in self.name_samples(batch)])
        if log is not None:
            log.write(self.step, {"skipped_not_finite": float(bad_steps), **metrics}, skipped_samples=samples)
        if bad_steps >= self.config.max_bad_steps:
            raise InputError(
                f"{self.config.folder}: {bad_steps} steps in a row, up to step {self.step}, gave a loss or gradient that is not finite "
                "and changed nothing; try a lower learning rate, in a new run folder"
            )

    def _save(self, checkpoints: CheckpointWriter) -> None:
        state = {"step": self.step, "learner": self.learner.list_state()}
        if self.loader is not None:
            state["loader"] = self.loader.state_dict()
        checkpoints.save(self.step, self.learner.list_tensors(), state)
        self.saved_step = self.step

    def _resume(self, checkpoints: CheckpointWriter) -> None:
        newest = checkpoints.find_newest()
        if newest is None:
            return
        tensors = self.learner.list_tensors()
        state = load_into(newest, tensors, checkpoints.group)
        try:
            self.learner.load(tensors, state["learner"])
        except (RuntimeError, KeyError) as error:  # what torch raises for missing names and other shapes
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"checkpoint {newest} is of another configuration ({reason}); name another run folder") from error
        if self.loader is not None and "loader" in state:
            self.loader.load_state_dict(state["loader"])
        self.step = self.saved_step = state["step"]

    def _write_description(self) -> None:
        if self.description is None:
            return
        partial = self.config.folder / ".run.json.partial"
        partial.write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.config.folder / DESCRIPTION_FILE)

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets the main thread alone set handlers; whoever trains elsewhere calls `stop`
            return
        handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        if self.stopping and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def seed_step(seed: int, step: int, mesh: DeviceMesh | None) -> None:
    """Make torch's global generator a function of the step; every rank draws other numbers, since each has other tokens or heads."""
    ranks = () if mesh is None else tuple(mesh[name].get_local_rank() for name in ("dp", "cp", "tp"))
    # Hashed, because torch's CPU generator looks at the lowest 32 bits of a seed alone.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, *ranks)).generate_state(1)[0]))


def gather(mesh: DeviceMesh | None, names: list[str]) -> list[str]:
    """The names of all ranks, each once."""
    parts: list[list[str]] = [names]
    if mesh is not None:
        parts = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, names)
    return list(dict.fromkeys(name for part in parts for name in part))


class Rates:
    """What the steps since the last log took: per second, of the devices' peak, waiting for data, and memory."""

    def __init__(self, mesh: DeviceMesh | None, peak_flops: float) -> None:
        self.num_devices = 1 if mesh is None else mesh.size()
        self.peak_flops = peak_flops
        self._begin()

    def _begin(self) -> None:
        self.since, self.steps, self.waited, self.tokens, self.flops = time.perf_counter(), 0, 0.0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, metrics: Metrics) -> None:
        self.steps += 1
        self.tokens += metrics.get("tokens", 0.0)
        self.flops += metrics.pop("flops", 0.0)

    def take(self) -> Metrics:
        """`memory_gb` is the peak of this process so far: allocated on its GPU, or resident on a CPU."""
        seconds = time.perf_counter() - self.since
        rates = {"steps_per_second": self.steps / seconds, "data_wait": self.waited / seconds, "memory_gb": measure_memory() / 1e9}
        if self.tokens:
            rates["tokens_per_second"] = self.tokens / seconds
        if self.flops and self.peak_flops:
            rates["mfu"] = self.flops / seconds / (self.peak_flops * self.num_devices)
        self._begin()
        return rates


def measure_memory() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def format_status(metrics: Metrics) -> str:
    """What of a row is worth a look while it moves."""
    shown = [f"{name} {metrics[name]:.4g}" for name in ("loss", "grad_norm", "tokens_per_second") if name in metrics]
    shown += [f"{title} {metrics[name]:.1%}" for name, title in (("mfu", "MFU"), ("fill_rate", "full")) if name in metrics]
    return " ".join(shown or [f"{name} {value:.4g}" for name, value in list(metrics.items())[:4]])


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however it ends. InputError if another one holds it."""
    import fcntl  # of Unix alone; nothing else in this package asks for Unix

    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is training in {folder}; wait for it, or name another run folder") from error
        yield


class MetricsLog:
    """`metrics.jsonl` (one object a line) and TensorBoard event files, side by side in the run's folder; Weights & Biases when asked.

    last_step: of the checkpoint that the run goes on from. Later rows are of steps that were lost and come again; they are removed.
    wandb: its project to log to; "": none. A number that is not finite is null in JSON.
    """

    def __init__(self, folder: Path, last_step: int, wandb: str = "") -> None:
        self.folder, self.last_step, self.project = folder, last_step, wandb
        self._wandb = None if not wandb else import_wandb()  # before anything is written

    def __enter__(self) -> MetricsLog:
        from torch.utils.tensorboard import SummaryWriter  # a slow import that only training needs

        path = self.folder / METRICS_FILE
        cut_metrics(path, self.last_step)
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.last_step + 1)
        if self._wandb is not None:
            identity = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]  # the same run when it goes on
            # Numbers alone: nothing about the machine, its files or its code.
            settings = self._wandb.Settings(x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True, console="off")
            self._wandb.init(
                project=self.project, name=self.folder.name, id=identity, resume="allow", dir=str(self.folder), settings=settings
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, metrics: Metrics, **facts: Any) -> None:
        """facts: what is no number, for `metrics.jsonl` alone."""
        values = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "time": round(time.time(), 3), **values, **facts}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)


def import_wandb() -> Any:
    try:
        import wandb  # of the people who ask for it
    except ImportError as error:
        raise InputError("wandb is asked for, but not installed; install it with: pip install 'openemu3[wandb]'") from error
    return wandb


def cut_metrics(path: Path, last_step: int) -> None:
    """Remove the rows of later steps from a metrics file, and a row that a killed process left half written."""
    if not path.exists():
        return
    kept, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and row["step"] <= last_step:
            kept.append(line)
    if len(kept) < len(lines):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)


def build_progress(is_shown: bool = True) -> Progress:
    """A bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), console=Console(stderr=True), refresh_per_second=1, disable=not is_shown)
