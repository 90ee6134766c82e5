"""The named configurations fit together and into the package, at any length of training."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from openemu3 import presets
from openemu3.cli.train import TrainLanguage
from openemu3.generation.tasks import TaskDefaults
from openemu3.media import read_image
from openemu3.model.layouts import ModelConfig
from openemu3.model.transformer import Transformer, TransformerConfig, build_transformer
from openemu3.model.weights import save_config, save_state
from openemu3.records import InputError
from openemu3.tokenization.encode import EncodeConfig
from openemu3.tokenization.sequence import Vocabulary
from openemu3.tokenization.text import train_text_tokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

SAMPLES, FOLDER = (Path("samples.parquet"),), Path("run")


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes():
    assert count_parameters(Transformer(presets.EMU3_8B)) == 8_492_011_520
    assert presets.EMU3_8B.vocab_size == Vocabulary().size == 184_622


def test_the_mini_models_parts_fit_together_and_into_the_package():
    vocabulary = Vocabulary(presets.MINI_NUM_TEXT, presets.MINI_VISION_TOKENIZER.codebook_size)
    assert presets.MINI_TRANSFORMER.vocab_size == vocabulary.size == 6355
    with torch.device("meta"):
        tokenizer = VisionTokenizer(presets.MINI_VISION_TOKENIZER)
    assert 2 * (count_parameters(Transformer(presets.MINI_TRANSFORMER)) + count_parameters(tokenizer)) < 39e6  # bytes of bf16
    # The longest sequence is a clip of 4 latent frames of 8 x 8: it fits, with words to spare.
    assert 4 * (8 * 9 + 1) + 60 < presets.MINI_TRANSFORMER.max_positions
    assert presets.MINI_DEFAULTS.clip_frames == EncodeConfig().clip_frames == 16
    assert presets.MINI_DEFAULTS.min_pixels == presets.MINI_DEFAULTS.max_pixels == presets.MINI_IMAGE_AREA == 64 * 64
    assert presets.MINI_DEFAULTS.question is None  # documents of the recipe have the caption right after the picture


@pytest.mark.parametrize(("stage", "context"), [(1, 5120), (2, 131_072)])
def test_the_stages_of_the_published_model(stage, context):
    """What the paper says of both stages, and a network of its size to the parameter."""
    run = presets.build_8b_stage_run(stage, Path("tokenizers"), SAMPLES, FOLDER)
    transformer = Transformer(run.transformer)
    assert count_parameters(transformer) == 8_492_011_520 and all(parameter.is_meta for parameter in transformer.parameters())
    assert run.batches.context_length == context <= run.transformer.max_positions == 131_072
    optimizer = run.learner.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.final_share) == (5e-5, "cosine", 0.0)
    assert run.transformer.dropout == 0.1 and run.learner.role_weights.vision == 0.5 and run.learner.vision_noise == 0
    assert (optimizer.betas, optimizer.weight_decay, optimizer.max_grad_norm, optimizer.warmup_steps) == ((0.9, 0.95), 0.1, 5.0, 700)
    assert run.batches.rows_per_batch * context == pytest.approx(14.7e6, rel=0.01)  # tokens a batch, as Emu3.5's
    for dp in (8, 16) if stage == 2 else (64, 480):  # of machines of eight, in stage 2 with tp and cp beside it
        assert run.batches.rows_per_batch % dp == 0
    assert presets.build_8b_stage_run(stage, Path("tokenizers"), SAMPLES, FOLDER, 10).trainer.num_steps == 10


def test_the_mini_stages_are_the_same_story_in_small():
    first, second = (presets.build_mini_stage_run(stage, Path("tokenizers"), SAMPLES, FOLDER) for stage in (1, 2))
    assert first.transformer == second.transformer == presets.MINI_TRANSFORMER
    assert (
        first.learner.role_weights
        == second.learner.role_weights
        == presets.build_8b_stage_run(1, FOLDER, SAMPLES, FOLDER).learner.role_weights
    )
    still, film = 1 + 1 + 5 + 1 + 8 * 9 + 3, 1 + 1 + 5 + 1 + 4 * (8 * 9 + 1) + 2  # BOS, BOI, meta text, IMG, rows, ends; without words
    assert 3 * (still + 10) <= first.batches.context_length < film  # three stills with a few words fit, no film does
    assert 3 * (film + 20) <= second.batches.context_length == first.validation_context == second.validation_context
    assert first.trainer.validate_first and second.trainer.validate_first


def test_language_presets_are_those_of_the_command():
    assert set(presets.LANGUAGE_PRESETS) == set(get_args(get_type_hints(TrainLanguage)["preset"]))
    for preset in presets.LANGUAGE_PRESETS.values():
        run = preset.build(Path("tokenizers"), SAMPLES, FOLDER, num_steps=3)
        assert run.trainer.num_steps == run.learner.optimizer.num_steps == 3


@pytest.mark.parametrize("num_steps", [1, 7, 20, 150, 1600])
def test_a_preset_is_whole_at_any_length(num_steps):
    """A schedule that ends with the run; a codebook that is filled before it; an adversary only where one is meant."""
    vision = presets.build_mini_vision_run(SAMPLES, FOLDER, num_steps)
    decoder = presets.build_mini_decoder_run(SAMPLES, FOLDER, Path("other"), num_steps)
    language = presets.build_mini_language_run(Path("tokenizers"), SAMPLES, FOLDER, num_steps)
    for run in (vision, decoder, language):
        assert run.trainer.num_steps == run.learner.optimizer.num_steps == num_steps and run.trainer.folder == FOLDER
    assert vision.learner.continuous_steps < num_steps < vision.learner.adversarial_start
    assert decoder.learner.adversarial_start < num_steps and decoder.learner.freeze_codes and decoder.init_from == Path("other")
    assert vision.tokenizer == decoder.tokenizer == presets.MINI_VISION_TOKENIZER and language.transformer == presets.MINI_TRANSFORMER


def test_numbers_of_the_mini_tokenizers_preset():
    vision = presets.build_mini_vision_run(SAMPLES, FOLDER)
    assert (vision.trainer.num_steps, vision.learner.continuous_steps, vision.learner.restart_until) == (3000, 100, 1500)
    assert vision.learner.optimizer.learning_rate == 1e-3 and vision.batches.images_per_batch == 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a folder of tokenizers, a transformer) of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("tokenizers")
    config = VisionTokenizerConfig(64, channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_norm_groups=4)
    torch.manual_seed(0)
    save_state(folder, VisionTokenizer(config).state_dict(), "vision_tokenizer")
    (folder / "text.tiktoken").write_bytes(train_text_tokenizer(["red apple", "blue wave", "yellow star"] * 20, 270))
    save_config(folder, ModelConfig(vision_tokenizer=dataclasses.asdict(config), num_text=270, num_codes=64))
    vocab_size = Vocabulary(270, 64).size
    language = TransformerConfig(vocab_size, 32, 64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3, max_positions=256)
    return folder, build_transformer(language, torch.Generator().manual_seed(0)).eval()


DEFAULTS = TaskDefaults(prompt_suffix="", negative_prompt="", question=None, top_k=0)


@pytest.mark.parametrize(("num_prompts", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3)])
def test_a_sheet_has_a_picture_of_every_prompt(tiny, tmp_path, num_prompts, rows, columns):
    folder, transformer = tiny
    draw = presets.build_sheet_drawer(folder, ["red apple", "blue wave", "yellow star", "wave", "apple"][:num_prompts], DEFAULTS, 32 * 32)
    draw(transformer, tmp_path / "samples", 250)
    (path,) = (tmp_path / "samples").iterdir()
    assert path.name == "step-00000250.png"
    sheet = read_image(path)
    assert sheet.shape == (3, 1, 32 * rows, 32 * columns)
    cells = [sheet[:, 0, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] for row in range(rows) for column in range(columns)]
    assert not any((cell == 1).all() for cell in cells[:num_prompts]) and all((cell == 1).all() for cell in cells[num_prompts:])
    draw(transformer, tmp_path / "again", 250)
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("prompts", [[], ["red apple", " "]])
def test_a_sheet_needs_prompts(tiny, prompts):
    with pytest.raises(InputError, match="prompts are"):
        presets.build_sheet_drawer(tiny[0], prompts, DEFAULTS, 32 * 32)
