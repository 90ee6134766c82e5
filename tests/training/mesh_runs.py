"""A tiny language run on one process and on meshes of two, begun on one mesh and gone on with on another. Not a test: test_meshes.py does.

    python mesh_runs.py DATA OUTPUT NAME ...

Ranks are forked children. Prints one JSON object: how the ranks of every run ended.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.utils.tensorboard

from openemu3.data.loader import LoaderConfig
from openemu3.distributed import ParallelConfig
from openemu3.model.transformer import TransformerConfig
from openemu3.training.language_learner import LanguageLearnerConfig
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.stages import LanguageRun
from openemu3.training.trainer import TrainerConfig

# What the second rank gets in the first leg, before its fourth step.
SIGNALS = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}
# Run folder -> the legs of it: (steps to go to, mesh, precision).
RUNS = {
    "alone": [(6, ParallelConfig())],
    "dp_then_tp": [(3, ParallelConfig(dp=2)), (6, ParallelConfig(tp=2))],
    "cp_then_alone": [(3, ParallelConfig(cp=2, activation_checkpointing="full")), (6, ParallelConfig())],
    "dp": [(6, ParallelConfig(dp=2))],
    "stopped": [(6, ParallelConfig(dp=2)), (6, ParallelConfig(dp=2))],
    "killed": [(6, ParallelConfig(dp=2)), (6, ParallelConfig(dp=2))],
    "wrong": [(6, ParallelConfig(dp=2, tp=2))],
    "mixed": [(2, ParallelConfig(dp=2))],
    "bf16": [(2, ParallelConfig(dp=2))],
}


def build_run(data: Path, folder: Path, num_steps: int, parallel: ParallelConfig) -> LanguageRun:
    precision = folder.name if folder.name in ("mixed", "bf16") else "fp32"
    run = LanguageRun(
        tokenizers=data / "tokenizers",
        documents=(data / "documents.parquet",),
        transformer=TransformerConfig(
            vocab_size=300 + 211 + 64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            dropout=0.0, max_positions=256,
        ),
        trainer=TrainerConfig(folder, num_steps, log_every=1, validate_every=2, sample_every=0, save_every=1, peak_flops=1e12),
        # The schedule of all six steps, so that a leg is a part of the whole.
        learner=LanguageLearnerConfig(OptimizerConfig(1e-3, 6, 1, eps=1e-4), precision=precision),
        batches=LoaderConfig(128, rows_per_batch=4, rows_per_micro_batch=1),
        validation_split="heldout",
        parallel=parallel,
    )  # fmt: skip
    return replace(run, parallel=replace(parallel, timeout_seconds=300.0))


def train(data: Path, folder: Path, num_steps: int, parallel: ParallelConfig, number: signal.Signals | None) -> int:
    """What a rank does; its exit code."""
    run = build_run(data, folder, num_steps, parallel)
    if number is not None:
        from openemu3.training.language_learner import LanguageLearner

        learn = LanguageLearner.learn

        def learn_and_signal(self, step, batches):
            if step == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), number)
            return learn(self, step, batches)

        LanguageLearner.learn = learn_and_signal
    return 0 if run.run().is_complete else 3


def start(data: Path, folder: Path, num_steps: int, parallel: ParallelConfig, number: signal.Signals | None, num_ranks: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if not child:
            os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
            if num_ranks > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
                os.environ.update({"MASTER_ADDR": "localhost", **{name: str(value) for name, value in names.items()}})
            try:
                os._exit(train(data, folder, num_steps, parallel, number))
            except BaseException as error:  # noqa: BLE001 - told by exit code and log
                sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
                os._exit(1)  # forked: what pytest's parent process would do at its end is not for this one
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    data, output = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    told = {}
    for name in sys.argv[3:]:
        told[name] = []
        for leg, (num_steps, parallel) in enumerate(RUNS[name]):
            number = None if leg else SIGNALS.get(name)
            num_ranks = 2 if name == "wrong" else parallel.num_ranks
            told[name].append(start(data, output / name, num_steps, parallel, number, num_ranks))
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
