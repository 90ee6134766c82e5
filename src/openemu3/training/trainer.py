"""The one training loop: take batches, let the learner learn, log, validate, save, stop and resume.

In: a Learner (what one step does) and a batch source (`batches(position)` yields batches from a position on). Out: a run folder
with checkpoints, `run.json` (what is trained), `metrics.jsonl` and TensorBoard files. A run that was killed, started again with the
same command, goes on from its newest checkpoint and ends as if nothing had happened, bit for bit: batches and random numbers are
functions of the step's number, and what was logged after that checkpoint is forgotten, since those steps are made again.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from openemu3.records import InputError
from openemu3.training.checkpoint import State, list_checkpoints, load_checkpoint, save_checkpoint

DESCRIPTION_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

Metrics = dict[str, float]


class Learner(Protocol):
    """One thing that learns: how a step goes, what must be saved, how it is measured."""

    def learn(self, step: int, batches: list[Any]) -> Metrics:
        """One update from its micro-batches. A loss or gradient that is not finite must leave the weights alone and show as such."""

    def validate(self) -> Metrics: ...

    def write_samples(self, folder: Path, step: int) -> None:
        """Leave something to look at (pictures) under `folder`."""

    def list_tensors(self) -> dict[str, Tensor]: ...

    def list_state(self) -> State: ...

    def load(self, tensors: dict[str, Tensor], state: State) -> None: ...


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

    def __post_init__(self) -> None:
        for name in ("num_steps", "micro_batches", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


class Trainer:
    """One run: at most one process at a time may train in a run folder.

    Args:
        batches: batches(position) yields micro-batches from number `position` of the run's endless sequence on.
        description: what is trained on what, in plain values; kept as `run.json` in the run folder, where exporting finds it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        learner: Learner,
        batches: Callable[[int], Iterator[Any]],
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.learner = learner
        self.batches = batches
        self.description = description
        self.step = 0  # steps done
        self.saved_step = 0  # those in the newest checkpoint
        self.stopping = False

    def run(self) -> int:
        """Train to the last step, or until `stop`. Returns the number of steps done in all.

        In the main thread SIGTERM and SIGINT (Ctrl-C) call `stop`; a second Ctrl-C ends the run at once, without saving.
        Raises InputError for a folder in which another process is training, a checkpoint that is damaged or of another
        configuration, and a training that has diverged.
        """
        config = self.config
        config.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(config.folder), self._handle_signals():
            self._resume()
            if self.step < config.num_steps and not self.stopping:
                self._write_description()
                with MetricsLog(config.folder, self.step) as log, build_progress() as progress:
                    self._loop(log, progress)
        return self.step

    def stop(self) -> None:
        """Have the run save and return as soon as the step under way is done. Safe from any thread."""
        self.stopping = True

    @property
    def is_complete(self) -> bool:
        return self.step >= self.config.num_steps

    def _loop(self, log: MetricsLog, progress: Progress) -> None:
        config, learner = self.config, self.learner
        bar = progress.add_task(config.folder.name, total=config.num_steps, completed=self.step, status="")
        source = self.batches(self.step * config.micro_batches)
        bad_steps, since, first = 0, time.perf_counter(), self.step
        while not self.is_complete and not self.stopping:
            # Hashed, because torch's CPU generator looks at the lowest 32 bits of a seed alone.
            torch.manual_seed(int(np.random.SeedSequence((config.seed, self.step)).generate_state(1)[0]))
            metrics = learner.learn(self.step, [next(source) for _ in range(config.micro_batches)])
            self.step += 1
            bad_steps = 0 if all(math.isfinite(value) for value in metrics.values()) else bad_steps + 1
            if bad_steps:
                log.write(self.step, {"skipped_not_finite": float(bad_steps), **metrics})
                if bad_steps >= config.max_bad_steps:
                    raise InputError(
                        f"{config.folder}: {bad_steps} steps in a row, up to step {self.step}, gave a loss or gradient that is not finite "
                        "and changed nothing; try a lower learning rate, in a new run folder"
                    )
            progress.update(bar, completed=self.step)
            if due(self.step, config.log_every):
                now = time.perf_counter()
                metrics["steps_per_second"] = (self.step - first) / (now - since)
                since, first = now, self.step
                log.write(self.step, metrics)
                progress.update(bar, status=" ".join(f"{name} {metrics[name]:.4g}" for name in list(metrics)[:4]))
            if due(self.step, config.validate_every) or self.is_complete:
                log.write(self.step, {f"validation/{name}": value for name, value in learner.validate().items()})
            if due(self.step, config.sample_every) or self.is_complete:
                learner.write_samples(config.folder / "samples", self.step)
            if due(self.step, config.save_every) or self.is_complete:
                self._save()
        if self.step > self.saved_step:  # stopped
            self._save()

    def _save(self) -> None:
        state = {"step": self.step, "learner": self.learner.list_state()}
        save_checkpoint(self.config.folder / "checkpoints", self.step, self.learner.list_tensors(), state, self.config.keep_checkpoints)
        self.saved_step = self.step

    def _resume(self) -> None:
        checkpoints = list_checkpoints(self.config.folder / "checkpoints")
        if not checkpoints:
            return
        tensors, state = load_checkpoint(checkpoints[-1])
        try:
            self.learner.load(tensors, state["learner"])
        except (RuntimeError, KeyError) as error:  # what torch raises for missing names and other shapes
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"checkpoint {checkpoints[-1]} is of another configuration ({reason}); name another run folder") from error
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
    """`metrics.jsonl` (one object a line) and TensorBoard event files, side by side in the run's folder.

    last_step: of the checkpoint that the run goes on from. Later rows are of steps that were lost and come again; they are removed.
    A number that is not finite is null in JSON.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self.folder, self.last_step = folder, last_step

    def __enter__(self) -> MetricsLog:
        from torch.utils.tensorboard import SummaryWriter  # a slow import that only training needs

        path = self.folder / METRICS_FILE
        cut_metrics(path, self.last_step)
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.last_step + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, metrics: Metrics) -> None:
        values = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)


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


def build_progress() -> Progress:
    """A bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), console=Console(stderr=True), refresh_per_second=1)
