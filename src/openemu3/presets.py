"""Full named configurations. `mini` is our own small model, which a laptop trains and the package ships; the others are published sizes.

The surprising thing: a preset is a value, not a mode. Whatever it says can be changed with `dataclasses.replace` or a flag.
"""

from __future__ import annotations

from pathlib import Path

from openemu3.data.clips import PixelBatchesConfig
from openemu3.data.documents import DocumentBatchesConfig
from openemu3.generation.tasks import TaskDefaults
from openemu3.model.transformer import TransformerConfig
from openemu3.tokenization.encode import EncodeConfig
from openemu3.tokenization.vision import MINI_VISION_TOKENIZER
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
MINI_ENCODE = EncodeConfig()
MINI_DEFAULTS = TaskDefaults(
    prompt_suffix="",
    negative_prompt="",
    guidance=3.0,
    temperature=1.0,
    top_k=2048,
    question=None,
    fps=8,
    clip_frames=16,
    min_pixels=MINI_IMAGE_AREA,
    max_pixels=MINI_IMAGE_AREA,
)


def build_mini_vision_run(samples: tuple[Path, ...], folder: Path, num_steps: int = 1600) -> VisionTokenizerRun:
    """Stills and clips of 64 x 64; about half an hour on one core.

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
            continuous_steps=100,
            restart_every=50,
            restart_until=num_steps * 3 // 4,
            adversarial_start=num_steps + 1,
            ema_decay=0.995,
            autocast_bf16=True,
        ),
        batches=PixelBatchesConfig(images_per_batch=16, video_every=4, max_shift=3),
    )


def build_mini_language_run(tokenizers: Path, documents: tuple[Path, ...], folder: Path, num_steps: int = 3000) -> LanguageRun:
    """Drawing, filming and describing together, from nothing; about an hour on two cores.

    Unlike the paper's pre-training, vision counts 1.0 and captions as context next to nothing: the mini model is to learn to draw, and
    has too few captions to learn a language from.
    """
    return LanguageRun(
        tokenizers=tokenizers,
        documents=documents,
        transformer=MINI_TRANSFORMER,
        trainer=TrainerConfig(folder, num_steps, validate_every=250, sample_every=250, save_every=100),
        learner=LanguageLearnerConfig(
            optimizer=OptimizerConfig(1.5e-3, num_steps, min(100, num_steps), weight_decay=0.1, max_grad_norm=1.0),
            role_weights=RoleWeights(text_context=0.05, text_target=1.0, vision=1.0, structure=0.05),
        ),
        batches=DocumentBatchesConfig(
            tokens_per_batch=4096, mixture={"draw": 1.0, "describe": 0.25, "film": 0.4, "describe_video": 0.05}, null_prompt_share=0.03
        ),
    )
