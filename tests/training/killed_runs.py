"""Train a tiny run that is killed again and again, and the same run undisturbed. Not a test: test_resume.py starts it as a process.

    python killed_runs.py vision|language DATA OUTPUT

Each attempt is a forked child that builds everything from files, as a restarted command would. The children get SIGKILL and SIGTERM at
random moments of the time that the undisturbed run took. Prints one JSON object: how each attempt ended.
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
from openemu3.data.documents import DocumentBatchesConfig
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
        trainer=TrainerConfig(folder, num_steps=30, micro_batches=2, log_every=1, validate_every=7, save_every=3),
        learner=LanguageLearnerConfig(OptimizerConfig(3e-3, 30, 3), vision_noise=0.2),
        batches=DocumentBatchesConfig(tokens_per_batch=256, mixture={"draw": 1.5}),
        validation_split="heldout",
    )


def attempt(kind: str, data: Path, folder: Path, number: int | None, delay: float) -> str:
    """Fork, train, send the signal after `delay` seconds; how the child ended."""
    child = os.fork()
    if not child:
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
        run = (build_vision_run if kind == "vision" else build_language_run)(data, folder)
        os._exit(0 if run.run().is_complete else 3)  # an exception ends the child with its traceback and 1
    if number is not None:
        time.sleep(delay)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return {0: "complete", 3: "stopped"}.get(os.WEXITSTATUS(status), "failed")


def main() -> None:
    kind, data, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    began = time.monotonic()
    whole = attempt(kind, data, output / "whole", None, 0)
    seconds = time.monotonic() - began
    moments = random.Random()
    ends = []
    while not ends or ends[-1] != "complete":
        number = SIGNALS[len(ends)] if len(ends) < len(SIGNALS) else None
        ends.append(attempt(kind, data, output / "killed", number, moments.uniform(0.1, 0.5) * seconds))
    json.dump({"whole": whole, "killed": ends}, sys.stdout)


if __name__ == "__main__":
    main()
