"""Full named configurations. `mini` is our own small model, which a laptop trains and the package ships; the others are published sizes.

The surprising thing: a preset is a value, not a mode. Whatever it says can be changed with `dataclasses.replace` or a flag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from openemu3.data.clips import PixelBatchesConfig
from openemu3.data.loader import LoaderConfig
from openemu3.data.mixture import MixtureConfig
from openemu3.distributed import ParallelConfig
from openemu3.generation.tasks import Emu3, TaskDefaults
from openemu3.media import from_pil, write_image
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.records import InputError
from openemu3.tokenization.vision import MINI_VISION_TOKENIZER
from openemu3.training.export import load_tokenizers
from openemu3.training.language_learner import LanguageLearnerConfig, RoleWeights
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.stages import LanguageRun, VisionTokenizerRun
from openemu3.training.trainer import TrainerConfig
from openemu3.training.vision_learner import VisionLearnerConfig

EMU3_8B = TransformerConfig()  # paper, table 3

MINI_NUM_TEXT = 2048  # ranks of the mini model's own BPE
MINI_TRANSFORMER = TransformerConfig(
    vocab_size=MINI_NUM_TEXT + 211 + MINI_VISION_TOKENIZER.codebook_size,
    hidden_size=384,
    intermediate_size=1024,
    num_layers=6,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=10_000.0,
    dropout=0.0,
    max_positions=1024,
)
MINI_IMAGE_AREA = 64 * 64
MINI_PROMPTS = (  # what a language run draws again and again, so that progress can be seen
    "3D red apple",
    "flat red apple",
    "3D panda",
    "flat automobile",
    "3D waving hand, dark skin tone",
    "3D grinning face",
    "立体 枫叶",
    "扁平 臭鼬",
)
MINI_DEFAULTS = TaskDefaults(
    prompt_suffix="",
    negative_prompt="",
    guidance=1.2,
    temperature=0.2,  # it draws best close to what it is surest of; much guidance pulls it off what it has learnt
    top_k=2048,
    question=None,
    fps=8,
    clip_frames=16,
    min_pixels=MINI_IMAGE_AREA,
    max_pixels=MINI_IMAGE_AREA,
)


def build_mini_vision_run(samples: tuple[Path, ...], folder: Path, num_steps: int = 3000) -> VisionTokenizerRun:
    """Stills and clips of 64 x 64.

    L2 and LPIPS as in SBER-MoVQGAN's recipe, with a higher LPIPS weight and learning rate for a short training from nothing; LPIPS by
    AlexNet, since VGG would cost as much as the tokenizer itself. The adversary stays off: at 64 px it needs longer than this.
    """
    return VisionTokenizerRun(
        samples=samples,
        trainer=TrainerConfig(folder, num_steps, validate_every=200, sample_every=200, save_every=100),
        max_validation=64,
        tokenizer=MINI_VISION_TOKENIZER,
        learner=VisionLearnerConfig(
            optimizer=OptimizerConfig(
                1e-3, num_steps, min(100, num_steps), final_share=0.02, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0
            ),
            lpips_net="alex",
            lpips_weight=0.2,
            continuous_steps=min(100, num_steps // 10),
            restart_every=50,
            restart_until=num_steps // 2,
            adversarial_start=num_steps + 1,
            ema_decay=0.995,
            autocast_bf16=True,
        ),
        batches=PixelBatchesConfig(images_per_batch=16, video_every=4, max_shift=1),
    )


def build_mini_decoder_run(samples: tuple[Path, ...], folder: Path, init_from: Path, num_steps: int = 1000) -> VisionTokenizerRun:
    """The decoder of a trained tokenizer alone, codes frozen, so that documents stay valid; the adversary joins late."""
    return VisionTokenizerRun(
        samples=samples,
        trainer=TrainerConfig(folder, num_steps, validate_every=100, sample_every=100, save_every=50),
        max_validation=64,
        tokenizer=MINI_VISION_TOKENIZER,
        init_from=init_from,
        learner=VisionLearnerConfig(
            optimizer=OptimizerConfig(
                8e-4, num_steps, min(30, num_steps), final_share=0.02, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0
            ),
            discriminator_optimizer=OptimizerConfig(
                2e-4, num_steps, min(30, num_steps), schedule="constant", betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1.0
            ),
            discriminator_channels=32,
            lpips_net="alex",
            lpips_weight=0.3,
            restart_every=0,
            adversarial_start=num_steps * 2 // 5,
            ema_decay=0.99,
            autocast_bf16=True,
            freeze_codes=True,
        ),
        batches=PixelBatchesConfig(images_per_batch=16, video_every=5, max_shift=1, seed=7),
    )


def build_mini_language_run(tokenizers: Path, documents: tuple[Path, ...], folder: Path, num_steps: int = 4200) -> LanguageRun:
    """Drawing, filming and describing together, from nothing.

    Unlike the paper's pre-training, vision counts 1.0 and captions as context next to nothing, and codes are read with noise: the
    mini model is to learn to draw what it is told, and has too few captions to learn a language from.
    """
    return LanguageRun(
        tokenizers=tokenizers,
        documents=documents,
        transformer=MINI_TRANSFORMER,
        trainer=TrainerConfig(folder, num_steps, validate_every=500, sample_every=500, save_every=100),
        learner=LanguageLearnerConfig(
            optimizer=OptimizerConfig(1.2e-3, num_steps, min(150, num_steps), weight_decay=0.1, max_grad_norm=1.0),
            role_weights=RoleWeights(text_context=0.05, text_target=8.0, vision=1.0, structure=0.05),
            vision_noise=0.15,
        ),
        batches=LoaderConfig(
            context_length=1024,
            rows_per_batch=2,
            rows_per_micro_batch=2,
            mixture=MixtureConfig(rates={"draw": 1.0, "describe": 0.4, "film": 0.5, "describe_video": 0.05}),
            null_prompt_share=0.05,
            learn_described_codes=False,
        ),
    )


def build_mini_stage_run(
    stage: Literal[1, 2], tokenizers: Path, documents: tuple[Path, ...], folder: Path, num_steps: int = 400
) -> LanguageRun:
    """The paper's two stages in small: short rows that hold stills alone, then longer ones with films, with the paper's role weights.

    As in the paper, it is the context that keeps films out of stage 1: 288 tokens hold three stills, but no film. Both stages measure
    stills and films, before the first step and after the last.
    """
    run = build_mini_language_run(tokenizers, documents, folder, num_steps)
    context = 288 if stage == 1 else 1024
    return replace(
        run,
        trainer=TrainerConfig(
            folder, num_steps, validate_every=200, sample_every=0, save_every=100, validate_first=True, peak_flops=run.trainer.peak_flops
        ),
        learner=LanguageLearnerConfig(
            optimizer=OptimizerConfig(1.2e-3 if stage == 1 else 6e-4, num_steps, min(50, num_steps), max_grad_norm=1.0)
        ),
        batches=LoaderConfig(
            context, rows_per_batch=8 if stage == 1 else 2, rows_per_micro_batch=8 if stage == 1 else 2, null_prompt_share=0.05
        ),
        validation_split="heldout_picture",
        validation_context=1024,
    )


def build_8b_stage_run(
    stage: Literal[1, 2], tokenizers: Path, documents: tuple[Path, ...], folder: Path, num_steps: int | None = None
) -> LanguageRun:
    """The published model's pre-training (paper, section 2.4): text and images in rows of 5,120 tokens, then with video in rows of 131,072.

    Published: sizes, contexts, dropout 0.1, vision weight 0.5, learning rate 5e-5 with a cosine to zero in both stages. The number of
    steps, the batch, warm-up, betas, decay and clipping are not. Emu3.5's stand in (arXiv 2510.26583): 14.7 million tokens a batch, 700
    steps of warm-up, 0.9/0.95, 0.1 and 5, and three quarters of the steps in stage 1. `init_from` hands stage 1's weights to stage 2.
    """
    if num_steps is None:
        num_steps = 300_000 if stage == 1 else 100_000
    context, rows = (5120, 2880) if stage == 1 else (131_072, 112)
    return LanguageRun(
        tokenizers=tokenizers,
        documents=documents,
        transformer=EMU3_8B,
        trainer=TrainerConfig(folder, num_steps, validate_every=2000, sample_every=0, save_every=1000, keep_checkpoints=3),
        learner=LanguageLearnerConfig(optimizer=OptimizerConfig(5e-5, num_steps, min(700, num_steps))),
        batches=LoaderConfig(context, rows),
        parallel=ParallelConfig(activation_checkpointing="selective", compile=True),
        validation_split="validation",
        max_validation=2048,
    )


class LanguagePreset(NamedTuple):
    """A language run by name: how it is built, and for what is drawn while it goes on, its prompts ((): none) and what suits them."""

    build: Callable[..., LanguageRun]
    prompts: tuple[str, ...]
    defaults: TaskDefaults
    image_area: int


# Called with tokenizers, documents, run folder and, if it is not to be the preset's, num_steps.
LANGUAGE_PRESETS = {
    "mini": LanguagePreset(build_mini_language_run, MINI_PROMPTS, MINI_DEFAULTS, MINI_IMAGE_AREA),
    "mini-stage1": LanguagePreset(partial(build_mini_stage_run, 1), (), MINI_DEFAULTS, MINI_IMAGE_AREA),
    "mini-stage2": LanguagePreset(partial(build_mini_stage_run, 2), (), MINI_DEFAULTS, MINI_IMAGE_AREA),
    "emu3-8b-stage1": LanguagePreset(partial(build_8b_stage_run, 1), (), TaskDefaults(), 512 * 512),
    "emu3-8b-stage2": LanguagePreset(partial(build_8b_stage_run, 2), (), TaskDefaults(), 512 * 512),
}


def build_sheet_drawer(
    tokenizers: Path, prompts: Sequence[str], defaults: TaskDefaults, image_area: int, device: str = "cpu", seed: int = 0
) -> Callable[[Transformer, Path, int], None]:
    """What a language run shows of itself: a picture of every prompt, in rows from the top left, as one PNG `step-00000250.png`.

    Returns the `sample` of `LanguageRun.run`. tokenizers: folder with both, as `export_tokenizers` writes it.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError(f"prompts are {list(prompts)}; at least one is needed, and none may be empty")
    vision_tokenizer, sequence_format = load_tokenizers(tokenizers, device)

    def draw_sheet(transformer: Transformer, folder: Path, step: int) -> None:
        emu3 = Emu3(transformer, vision_tokenizer, sequence_format.text_tokenizer, sequence_format.vocabulary, defaults, image_area)
        pictures = [drawn[0] for drawn in emu3.draw(list(prompts), seed=seed)]
        width, height = pictures[0].size
        num_columns = math.ceil(math.sqrt(len(pictures)))
        sheet = Image.new("RGB", (num_columns * width, math.ceil(len(pictures) / num_columns) * height), "white")
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (index % num_columns * width, index // num_columns * height))
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder / f"step-{step:08d}.png", from_pil(sheet))

    return draw_sheet
