"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through `peft`: a few trainable matrices beside frozen ones.

In: a transformer and a LoraConfig, or a folder with an adapter in peft's format (adapter_config.json, adapter_model.safetensors). Out: the
transformer with adapters that any stage trains, an adapter folder, or plain weights with the adapter merged in: W + (alpha / rank) B A.
The surprising thing: adapters change the names of parameters, so a state dict with adapters must be merged before it is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openemu3.model.transformer import Transformer
from openemu3.records import InputError

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # before every name in peft's files
BASE, DOWN, UP = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices get an adapter, and how large it is. The scale of an adapter is alpha / rank."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION + FEED_FORWARD
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; it must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"alpha is {self.alpha}; a number above 0 is allowed")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; 0 <= dropout < 1 is allowed")
        unknown = [name for name in self.targets if name not in ATTENTION + FEED_FORWARD]
        if unknown or not self.targets:
            raise InputError(f"targets are {list(self.targets)}; some of {', '.join(ATTENTION + FEED_FORWARD)} are allowed")

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> LoraConfig:
        """From the plain values that `asdict` makes of it, as a run folder keeps them."""
        return cls(**{**raw, "targets": tuple(raw["targets"])})


def apply_lora(transformer: Transformer, config: LoraConfig) -> None:
    """Freeze the transformer and give it adapters, in place. An adapter begins at zero: the transformer computes what it did before.

    Raises InputError if peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("adapters need the package peft; install openemu3[lora]") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        peft.inject_adapter_in_model(_to_peft(config), transformer)
    for name, parameter in transformer.named_parameters():
        if name.endswith((DOWN, UP)):
            parameter.data = parameter.data.float()  # of bf16 weights, too: small updates must not be rounded away


def has_adapters(state: Mapping[str, Tensor]) -> bool:
    """Whether this is the state dict of a transformer with adapters."""
    return any(name.endswith(DOWN) for name in state)


def merge_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of a transformer with adapters -> that of a plain one. scale: alpha / rank. Sums are made in fp32."""
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((DOWN, UP)):
            continue
        if not name.endswith(BASE):
            merged[name] = tensor
            continue
        module = name.removesuffix(BASE)
        delta = state[module + UP].float() @ state[module + DOWN].float()
        merged[f"{module}.weight"] = (tensor.float() + scale * delta).to(tensor.dtype)
    return merged


def save_adapter(state: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Write the adapters of a state dict as a folder in peft's format. It names no base model: peft would look for it on the web."""
    adapters = {PEFT_PREFIX + name.replace(".default.", "."): tensor for name, tensor in state.items() if name.endswith((DOWN, UP))}
    if not adapters:
        raise InputError("there is no adapter to save; the run was made without --lora-rank")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ADAPTER_WEIGHTS}.partial"
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in adapters.items()}, partial, {"format": "pt"})
    partial.replace(folder / ADAPTER_WEIGHTS)
    described = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(transformer: Transformer, folder: Path | str) -> None:
    """Merge the adapter of a folder into a plain transformer, in place; nothing slows it down then.

    Raises InputError for a folder that holds no LoRA adapter of these matrices.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as an adapter ({error}); `emu3 export adapter` writes such a folder") from error
    strange = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if raw.get(name)]
    if raw.get("peft_type") != "LORA" or strange:
        raise InputError(f"{folder} holds an adapter of type {raw.get('peft_type')} with {strange}; plain LoRA is allowed")
    scale = float(raw["lora_alpha"]) / int(raw["r"])
    modules = {name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    pairs = {name: tuple(tensors.get(f"{PEFT_PREFIX}{name}.lora_{half}.weight") for half in "BA") for name in modules}
    known = dict(transformer.named_modules())
    for name, (up, down) in pairs.items():
        layer = known.get(name)
        fits = isinstance(layer, nn.Linear) and up is not None and down is not None and up.shape[1] == down.shape[0]
        if not fits or (up.shape[0], down.shape[1]) != tuple(layer.weight.shape):  # type: ignore[union-attr]
            raise InputError(f"{folder} has an adapter for {name}, which does not fit this model")
    if not pairs or 2 * len(pairs) != len(tensors):
        raise InputError(f"{folder} holds {len(tensors)} tensors, {len(pairs)} of them complete adapters; nothing else is allowed")
    for name, (up, down) in pairs.items():
        weight = known[name].weight
        assert isinstance(weight, Tensor) and up is not None and down is not None
        delta = up.to(weight.device).float() @ down.to(weight.device).float()
        weight.copy_((weight.float() + scale * delta).to(weight.dtype))


def _to_peft(config: LoraConfig) -> Any:
    import peft

    values = asdict(config)
    return peft.LoraConfig(
        r=values["rank"], lora_alpha=values["alpha"], lora_dropout=values["dropout"], target_modules=list(config.targets), bias="none"
    )
