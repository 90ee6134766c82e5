"""From checkpoints to folders that can be used: tokenizers first, then the whole model.

In: run folders of the vision tokenizer and of the language model, a text ranks file. Out: a model folder (config.json, safetensors,
text.tiktoken), written aside and renamed, or not at all. What surprises: weights are stored in bf16, and the vision tokenizer is
rounded to it *before* the documents are tokenised, so that the codes a user gets are those the language model was trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from openemu3.model.layouts import ModelConfig
from openemu3.model.transformer import TransformerConfig
from openemu3.model.weights import load_into, load_state, read_config, save_config, save_state
from openemu3.records import InputError
from openemu3.tokenization.sequence import SequenceFormat, Vocabulary
from openemu3.tokenization.text import TextTokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig
from openemu3.training.checkpoint import list_checkpoints, load_checkpoint, take_prefix

TEXT_RANKS = "text.tiktoken"
VISION_WEIGHTS = "vision_tokenizer.safetensors"


def export_tokenizers(run: Path, config: VisionTokenizerConfig, text_ranks: Path, folder: Path) -> None:
    """Write a folder with the averaged vision tokenizer of the newest checkpoint, in bf16, and the text ranks."""
    state = take_prefix("average", load_newest(run))
    num_text = TextTokenizer.from_file(text_ranks).num_tokens
    save_state(folder, state, "vision_tokenizer", torch.bfloat16)
    shutil.copyfile(text_ranks, folder / TEXT_RANKS)
    save_config(folder, ModelConfig(vision_tokenizer=asdict(config), num_text=num_text, num_codes=config.codebook_size))


def export_model(
    run: Path, config: TransformerConfig, tokenizers: Path, folder: Path, image_area: int, generation: Mapping[str, Any] | None = None
) -> None:
    """Write a whole model folder: the newest checkpoint's transformer in bf16, with the tokenizers it was trained on.

    generation: how the model wants to be asked (generation.tasks.TaskDefaults), kept under that key of config.json.
    """
    vision = read_config(tokenizers)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TEXT_RANKS, VISION_WEIGHTS):
        if tokenizers.resolve() != folder.resolve():
            shutil.copyfile(tokenizers / name, folder / name)
    save_state(folder, take_prefix("transformer", load_newest(run)), "model", torch.bfloat16)
    save_config(folder, ModelConfig(config, vision.vision_tokenizer, vision.num_text, vision.num_codes, image_area))
    if generation is not None:
        path = folder / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8")) | {"generation": dict(generation)}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def load_newest(run: Path) -> dict[str, torch.Tensor]:
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise InputError(f"{run} holds no checkpoint; name the folder of a training run")
    return load_checkpoint(checkpoints[-1])[0]


def read_vocabulary(tokenizers: Path) -> Vocabulary:
    config = read_config(tokenizers)
    if config.num_text is None or config.num_codes is None:
        raise InputError(f"{tokenizers}/config.json does not say the sizes of the vocabulary; `emu3 export` writes such a folder")
    return Vocabulary(config.num_text, config.num_codes)


def load_tokenizers(folder: Path, device: str = "cpu") -> tuple[VisionTokenizer, SequenceFormat]:
    """The vision tokenizer (fp32) and the sequence format of a folder with both tokenizers."""
    config = read_config(folder).vision_tokenizer
    if config is None:
        raise InputError(f"{folder} holds no vision tokenizer")
    with torch.device("meta"):
        tokenizer = VisionTokenizer(VisionTokenizerConfig(**config))
    load_into(tokenizer, folder, "vision_tokenizer", device, torch.float32)
    return tokenizer, SequenceFormat(TextTokenizer.from_file(folder / TEXT_RANKS), read_vocabulary(folder))


def compute_fingerprint(tokenizers: Path) -> str:
    """Which tokenizers made a document's ids: a digest of the text ranks and of what turns pixels into codes.

    The vision decoder is left out: it may be trained on with the codes frozen, and documents stay valid.
    """
    digest = hashlib.sha256()
    try:
        digest.update((tokenizers / TEXT_RANKS).read_bytes())
    except OSError as error:
        raise InputError(f"{tokenizers / TEXT_RANKS} cannot be read ({error.strerror}); it must hold both tokenizers") from error
    for name, tensor in sorted(load_state(tokenizers, "vision_tokenizer")):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()[:32]
