"""From checkpoints to folders that can be used: tokenizers first, then the whole model.

In: run folders of the vision tokenizer and of the language model, a text ranks file. Out: a model folder (config.json, safetensors,
text.tiktoken), each file written aside and renamed, config.json last. What surprises: weights are stored in bf16, and the vision
tokenizer is rounded to it *before* the documents are tokenised, so that the codes a user gets are those the language model was
trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from openemu3.model.layouts import ModelConfig, format_config
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.model.weights import load_into, load_state, read_config, save_state
from openemu3.records import InputError
from openemu3.tokenization.sequence import SequenceFormat, Vocabulary
from openemu3.tokenization.text import TextTokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig
from openemu3.training.checkpoint import list_checkpoints, load_checkpoint, take_prefix
from openemu3.training.lora import LoraConfig, has_adapters, merge_state
from openemu3.training.trainer import DESCRIPTION_FILE

TEXT_RANKS = "text.tiktoken"
VISION_WEIGHTS = "vision_tokenizer.safetensors"


def export_tokenizers(run: Path, config: VisionTokenizerConfig | None, text_ranks: Path, folder: Path) -> None:
    """Write a folder with the averaged vision tokenizer of the newest checkpoint, in bf16, and the text ranks.

    config: None takes it from the run's own `run.json`. Raises InputError where the run holds something else.
    """
    if config is None:
        config = VisionTokenizerConfig(**read_description(run, "vision_tokenizer")["tokenizer"])
    num_text = TextTokenizer.from_file(text_ranks).num_tokens
    with torch.device("meta"):
        module = VisionTokenizer(config)
    state = check_state(run, load_newest(run, "average"), module)
    save_state(folder, state, "vision_tokenizer", torch.bfloat16)
    copy_file(text_ranks, folder / TEXT_RANKS)
    write_config(folder, ModelConfig(vision_tokenizer=asdict(config), num_text=num_text, num_codes=config.codebook_size))


def export_model(
    run: Path,
    config: TransformerConfig | None,
    tokenizers: Path,
    folder: Path,
    image_area: int,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole model folder: the newest checkpoint's transformer in bf16, with the tokenizers it was trained on.

    config: None takes it from the run's own `run.json`. generation: how the model wants to be asked (the fields of
    generation.tasks.TaskDefaults), kept under that key of config.json. Raises InputError where the parts do not fit together.
    """
    if config is None:
        description = read_description(run, "language")
        config = TransformerConfig(**description["transformer"])
        if description["fingerprint"] != compute_fingerprint(tokenizers):
            raise InputError(f"{run} was trained on documents of other tokenizers than those in {tokenizers}")
    vision, vocabulary = read_config(tokenizers), read_vocabulary(tokenizers)
    if vocabulary.size != config.vocab_size:
        raise InputError(f"{run} has a vocabulary of {config.vocab_size}; the tokenizers in {tokenizers} have {vocabulary.size}")
    state = check_state(run, load_weights(run), Transformer(config))
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizers.resolve() != folder.resolve():
        for name in (TEXT_RANKS, VISION_WEIGHTS):
            copy_file(tokenizers / name, folder / name)
    save_state(folder, state, "model", torch.bfloat16)
    write_config(folder, ModelConfig(config, vision.vision_tokenizer, vision.num_text, vision.num_codes, image_area), generation)


def check_state(run: Path, state: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """The state, if it is the module's (which may lie on the meta device). Raises InputError otherwise."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    differing = sorted(name for name in expected.keys() | state.keys() if name not in state or expected.get(name) != state[name].shape)
    if differing:
        what = type(module).__name__
        raise InputError(f"{run} holds no {what} of this configuration: {len(differing)} tensors differ, first {differing[0]}")
    return state


def write_config(folder: Path, config: ModelConfig, generation: Mapping[str, Any] | None = None) -> None:
    """config.json, written last: a folder without it is no model yet."""
    raw = format_config(config) | ({} if generation is None else {"generation": dict(generation)})
    partial = folder / ".config.json.partial"
    partial.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "config.json")


def copy_file(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_description(run: Path, kind: Literal["vision_tokenizer", "language"]) -> dict[str, Any]:
    """What `run.json` says of a run of this kind. Raises InputError for another one."""
    path = run / DESCRIPTION_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); it must be the folder of a training run") from error
    found = raw.get("kind") if isinstance(raw, dict) else None
    if found != kind:
        raise InputError(f"{run} is a run of kind {found!r}; one of kind {kind!r} is needed")
    return raw


def load_newest(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors `prefix/...` of a run's newest checkpoint, whole, without the prefix."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise InputError(f"{run} holds no checkpoint; name the folder of a training run")
    return take_prefix(prefix, load_checkpoint(checkpoints[-1], prefix)[0])


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    """The transformer of a run's newest checkpoint by its published names, with adapters, if the run trained such, merged in."""
    state = load_newest(run, "transformer")
    if not has_adapters(state):
        return state
    lora = LoraConfig.parse(read_description(run, "language")["lora"])
    return merge_state(state, lora.alpha / lora.rank)


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
