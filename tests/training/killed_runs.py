"""Train a tiny run that is killed again and again, and the same run undisturbed. Not a test: test_resume.py starts it as a process.

    python killed_runs.py vision|language DATA OUTPUT

Each attempt is a forked child that builds everything from files, as a restarted command would. The children get SIGKILL or SIGTERM at
a random moment: after 0 to 3 more rows in their metrics, and up to a step's time later. Prints one JSON object: how each attempt ended.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard  # slow, so here once instead of in every child

from openemu3.data.clips import PixelBatchesConfig
from openemu3.data.loader import LoaderConfig
from openemu3.data.mixture import MixtureConfig
from openemu3.model.transformer import TransformerConfig
from openemu3.tokenization.vision import VisionTokenizerConfig
from openemu3.training.language_learner import LanguageLearnerConfig
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.stages import LanguageRun, VisionTokenizerRun
from openemu3.training.trainer import TrainerConfig
from openemu3.training.vision_learner import VisionLearnerConfig

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)  # of the attempts; the next ones are left alone


def build_vision_run(data: Path, folder: Path) -> VisionTokenizerRun:
    """Everything that has a state is on: filling the codebook, restarts, the adversary, the average."""
    optimizer = OptimizerConfig(2e-3, 12, 2, weight_decay=0.0, betas=(0.5, 0.9))
    return VisionTokenizerRun(
        samples=(data / "samples.parquet",),
        trainer=TrainerConfig(folder, num_steps=12, log_every=1, validate_every=5, sample_every=8, save_every=2),
        validation_split="heldout",
        tokenizer=VisionTokenizerConfig(64, channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_norm_groups=4),
        learner=VisionLearnerConfig(
            optimizer,
            optimizer,
            lpips_net="alex",
            adversarial_start=6,
            continuous_steps=3,
            restart_every=5,
            ema_decay=0.9,
            discriminator_channels=8,
        ),
        batches=PixelBatchesConfig(images_per_batch=4, clip_frames=4, video_every=3, max_shift=2),
    )


def build_language_run(data: Path, folder: Path) -> LanguageRun:
    """With dropout, noise, two micro-batches a step and bf16."""
    return LanguageRun(
        tokenizers=data / "tokenizers",
        documents=(data / "documents.parquet",),
        transformer=TransformerConfig(
            vocab_size=300 + 211 + 64,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            dropout=0.1,
            max_positions=256,
        ),
        trainer=TrainerConfig(folder, num_steps=30, log_every=1, peak_flops=0, validate_every=7, save_every=3),
        learner=LanguageLearnerConfig(OptimizerConfig(3e-3, 30, 3), vision_noise=0.2),
        batches=LoaderConfig(128, rows_per_batch=2, mixture=MixtureConfig(rates={"draw": 1.5})),
        validation_split="heldout",
    )


def attempt(kind: str, data: Path, folder: Path, number: int | None, num_rows: int, delay: float) -> str:
    """Fork and train; where there is a signal, send it `delay` seconds after `num_rows` new rows. Returns how the child ended."""
    metrics = folder / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    child = os.fork()
    if not child:
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
        run = (build_vision_run if kind == "vision" else build_language_run)(data, folder)
        os._exit(0 if run.run().is_complete else 3)  # an exception ends the child with its traceback and 1
    ended, status = 0, 0
    if number is not None:
        while not ended and num_rows and not (metrics.exists() and count_rows(metrics, size) >= num_rows):
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(delay)
            os.kill(child, number)
    if not ended:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return {0: "complete", 3: "stopped"}.get(os.WEXITSTATUS(status), "failed")


def count_rows(metrics: Path, size: int) -> int:
    """Rows that came after the file had `size` bytes; resuming makes it shorter, by the rows that were lost."""
    lines = metrics.read_bytes()
    return lines[min(size, len(lines)) :].count(b"\n")


def main() -> None:
    kind, data, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    began = time.monotonic()
    whole = attempt(kind, data, output / "whole", None, 0, 0)
    step_seconds = (time.monotonic() - began) / 12
    moments = random.Random()
    ends: list[str] = []
    while not ends or ends[-1] not in ("complete", "failed"):
        number = SIGNALS[len(ends)] if len(ends) < len(SIGNALS) else None
        num_rows = moments.randrange(4) if ends else moments.randrange(1, 4)
        ends.append(attempt(kind, data, output / "killed", number, num_rows, moments.uniform(0, step_seconds)))
    json.dump({"whole": whole, "killed": ends}, sys.stdout)


if __name__ == "__main__":
    main()
