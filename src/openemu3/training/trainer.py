"""The one training loop: take batches, let the learner learn, log, validate, save, stop and resume.

In: a Learner (what one step does) and a batch source (`batches(position)` yields batches from a position on). Out: a run folder
with checkpoints, `metrics.jsonl` and TensorBoard files. A run that was killed, started again with the same command, goes on from its
newest checkpoint and takes the same batches that it would have taken.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from openemu3.records import InputError
from openemu3.training.checkpoint import State, list_checkpoints, load_checkpoint, save_checkpoint

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
    """When to do what. Cadences are in steps; 0 means never."""

    folder: Path
    num_steps: int = 1000
    micro_batches: int = 1  # accumulated into one step
    log_every: int = 10
    validate_every: int = 250
    sample_every: int = 250
    save_every: int = 250
    keep_checkpoints: int = 2
    max_bad_steps: int = 10  # consecutive steps that were not finite, before the run gives up


class Trainer:
    def __init__(self, config: TrainerConfig, learner: Learner, batches: Callable[[int], Iterator[Any]]) -> None:
        """batches(position) yields micro-batches from number `position` of the run's endless sequence on."""
        self.config = config
        self.learner = learner
        self.batches = batches
        self.step = 0
        self.stopping = False

    def run(self) -> int:
        """Train to the last step, or until SIGTERM/SIGINT, which save first. Returns the number of steps done in all."""
        config = self.config
        self._resume()
        if self.step >= config.num_steps:
            return self.step
        handlers = {sig: signal.signal(sig, self._stop) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            with MetricsLog(config.folder) as log, build_progress() as progress:
                self._loop(log, progress)
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)
        return self.step

    def _loop(self, log: MetricsLog, progress: Progress) -> None:
        config, learner = self.config, self.learner
        bar = progress.add_task(config.folder.name, total=config.num_steps, completed=self.step, status="")
        source = self.batches(self.step * config.micro_batches)
        bad_steps, since, first = 0, time.perf_counter(), self.step
        while self.step < config.num_steps and not self.stopping:
            metrics = learner.learn(self.step, [next(source) for _ in range(config.micro_batches)])
            self.step += 1
            bad_steps = 0 if all(math.isfinite(value) for value in metrics.values()) else bad_steps + 1
            if bad_steps:
                log.write(self.step, {"skipped_not_finite": float(bad_steps), **metrics})
                if bad_steps >= config.max_bad_steps:
                    raise InputError(
                        f"{bad_steps} steps in a row gave a loss or gradient that is not finite; the last good checkpoint is kept"
                    )
            if due(self.step, config.log_every):
                now = time.perf_counter()
                metrics["steps_per_second"] = (self.step - first) / (now - since)
                since, first = now, self.step
                log.write(self.step, metrics)
                status = " ".join(f"{name} {metrics[name]:.4g}" for name in list(metrics)[:4])
                progress.update(bar, completed=self.step, status=status)
            if due(self.step, config.validate_every) or self.step == config.num_steps:
                log.write(self.step, {f"validation/{name}": value for name, value in learner.validate().items()})
            if due(self.step, config.sample_every) or self.step == config.num_steps:
                learner.write_samples(config.folder / "samples", self.step)
            if due(self.step, config.save_every) or self.step == config.num_steps or self.stopping:
                self._save()
        if self.stopping:
            self._save()

    def _save(self) -> None:
        state = {"step": self.step, "learner": self.learner.list_state()}
        save_checkpoint(self.config.folder / "checkpoints", self.step, self.learner.list_tensors(), state, self.config.keep_checkpoints)

    def _resume(self) -> None:
        checkpoints = list_checkpoints(self.config.folder / "checkpoints")
        if checkpoints:
            tensors, state = load_checkpoint(checkpoints[-1])
            self.learner.load(tensors, state["learner"])
            self.step = state["step"]

    def _stop(self, signal_number: int, frame: FrameType | None) -> None:
        self.stopping = True


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class MetricsLog:
    """`metrics.jsonl` (one object a line) and TensorBoard event files, side by side in the run's folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def __enter__(self) -> MetricsLog:
        from torch.utils.tensorboard import SummaryWriter  # a slow import that only training needs

        self._file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, metrics: Metrics) -> None:
        row = {"step": step, "time": round(time.time(), 3), **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)


def build_progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[status]}"), refresh_per_second=1)
