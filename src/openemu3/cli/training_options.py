"""What the commands of `emu3 train` share: how long, on which processes, and the answer at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from openemu3.cli.options import Device, choose_device, print_answer
from openemu3.records import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from openemu3.distributed import ParallelConfig
    from openemu3.training.post_training import PreferenceRun
    from openemu3.training.stages import LanguageRun, VisionTokenizerRun
    from openemu3.training.trainer import Trainer

    Config = TypeVar("Config", bound=DataclassInstance)
    Run = TypeVar("Run", VisionTokenizerRun, LanguageRun, PreferenceRun)


@dataclass(frozen=True)
class TrainingOptions:
    """How long, how often and where; what is not given is as the preset says."""

    num_steps: int | None = None
    """How long; the learning rate's schedule stretches with it."""
    learning_rate: float | None = None
    """Highest learning rate."""
    warmup_steps: int | None = None
    """Steps in which the learning rate climbs to it."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """How it falls after that, to zero at the last step, or not at all."""
    validation_split: str | None = None
    """What to measure on, by its split; what is of the split "train" is learnt."""
    max_validation: int | None = None
    """Pictures to measure on, at most, and an eighth as many clips; or documents."""
    log_every: int | None = None
    """Steps between two rows of metrics."""
    validate_every: int | None = None
    """Steps between two measurements, after which pictures are drawn, too, if any are."""
    save_every: int | None = None
    """Steps between two checkpoints."""
    wandb: str = ""
    """Project of Weights & Biases to log to, besides metrics.jsonl and TensorBoard."""
    seed: int = 0
    """The same seed gives the same weights."""
    device: Device = "auto"
    """Where to compute: auto takes the GPU if there is one."""

    def count_steps(self) -> dict[str, int]:
        """The argument for building a preset."""
        return {} if self.num_steps is None else {"num_steps": self.num_steps}

    def apply(self, run: Run) -> Run:
        """The run as these options want it."""
        cadences = {"validate_every": self.validate_every, "sample_every": self.validate_every, "save_every": self.save_every}
        if not run.trainer.sample_every:
            del cadences["sample_every"]
        schedule = {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps, "schedule": self.schedule}
        changed = replace(
            run,
            trainer=change(run.trainer, seed=self.seed, wandb=self.wandb, log_every=self.log_every, **cadences),
            learner=change(run.learner, optimizer=change(run.learner.optimizer, **schedule)),
            seed=self.seed,
            device=choose_device(self.device),
        )
        return change(changed, validation_split=self.validation_split, max_validation=self.max_validation)


@dataclass(frozen=True)
class ParallelOptions:
    """How a training is spread over the processes that torchrun starts, and what each of them recomputes and compiles."""

    dp: int | None = None
    """Data parallel groups, over which the weights are sharded; otherwise as many as there are processes for."""
    replicate: int = 1
    """Of these groups, how many keep a whole copy of the weights each."""
    cp: int = 1
    """Context parallel ranks, which share the tokens of a row."""
    tp: int = 1
    """Tensor parallel ranks, which share the heads, channels and vocabulary of every layer."""
    checkpointing: Literal["none", "selective", "full"] | None = None
    """What the backward pass computes a second time to save memory; otherwise as the preset says."""
    compile: bool = False
    """Compile every layer with torch.compile; the 8B presets do in any case."""

    def apply(self, config: ParallelConfig) -> ParallelConfig:
        from openemu3.distributed import read_whole_number

        num_processes = read_whole_number("WORLD_SIZE", 1)
        dp = max(1, num_processes // max(1, self.cp * self.tp)) if self.dp is None else self.dp
        return change(
            config, dp=dp, replicate=self.replicate, cp=self.cp, tp=self.tp,
            activation_checkpointing=self.checkpointing, compile=self.compile or None,
        )  # fmt: skip


def change(config: Config, **changes: Any) -> Config:
    """The configuration with those fields changed that are not None."""
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def report_training(as_json: bool, folder: Path, train: Callable[[], Trainer]) -> None:
    """Train, and say where it ended. A run that was stopped raises KeyboardInterrupt: what follows it in a script must not begin."""
    from openemu3.distributed import RankError, read_whole_number

    began = time.monotonic()
    try:
        trainer = train()
    except RankError as error:
        raise InputError(str(error)) from error
    is_first, steps = read_whole_number("RANK", 0) == 0, trainer.config.num_steps  # the first rank speaks for all
    if not trainer.is_complete:
        if is_first:
            print(f"{folder}: saved at step {trainer.step} of {steps}; the same command goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    if not is_first:
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {name: value for name, value in rows[-1].items() if name.startswith("validation/")}
    numbers = ", ".join(f"{name.removeprefix('validation/')} {value}" for name, value in measured.items())
    answer = {"folder": str(folder), "steps": trainer.step, **measured, "seconds": round(time.monotonic() - began, 3)}
    print_answer(as_json, f"{folder}: {trainer.step} steps" + (f"; held out: {numbers}" if numbers else ""), answer)
