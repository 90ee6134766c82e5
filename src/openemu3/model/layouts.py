"""The layouts in which Emu3 is published: what its tensors and its config.json are called in each.

In: tensor names or the contents of a config.json in any layout. Out: the published names (the ones our modules carry) or `ModelConfig`.
  ours           config.json with "transformer", "vision_tokenizer", "vocabulary", "image_area"; published tensor names
  official       one folder for the language model (model_type "Emu3"), one for the vision tokenizer ("Emu3VisionVQ")
  transformers   both in one folder ("emu3"), or one alone ("emu3_text_model", "emu3_vqgan"); up to 4.51, and again on disk from 5,
                 the prefixes are `text_model.` and `vqmodel.`, in between `model.text_model.` and `model.vqmodel.`
The surprising thing: no name means two things, so a tensor is renamed by its name alone, whatever the layout of its neighbours.

Nothing here touches a file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor

from openemu3.model.transformer import TransformerConfig
from openemu3.records import InputError

Part = Literal["transformer", "vision_tokenizer"]

PUBLISHED_NUM_TEXT = 151643
NUM_SPECIAL = 211  # ids between the text ids and the visual ones, in every vocabulary

# Vision tokenizer, official <-> transformers; {n} is a number. Each is a run of whole name segments after the first one.
VISION_RENAMES = (
    ("down.{n}", "down_block.down.{n}"),
    ("up.{n}", "up_block.up.{n}"),
    ("mid", "middle_block"),
    ("attn.{n}.norm", "attn_norms.{n}"),
    ("attn_1.norm", "attn_norm"),
    ("q", "q_proj"),
    ("k", "k_proj"),
    ("v", "v_proj"),
    ("proj_out", "out_proj"),
)
# transformers' prefix -> ours, by part; the first match counts.
TRANSFORMER_PREFIXES = (
    ("text_model.model.", "model."),
    ("text_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."),
)
VISION_PREFIXES = ("model.vqmodel.", "vqmodel.", "")
VISION_MODULES = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class ModelConfig:
    """What a folder's config.json says, in our words.

    transformer: None where the folder holds a vision tokenizer alone.
    vision_tokenizer: arguments of `VisionTokenizerConfig`; None where the folder holds a language model alone.
    num_text, num_codes: sizes of the vocabulary (`num_text + 211 + num_codes` ids); None where the file does not tell.
    image_area: pixels of the pictures it was trained on last (518,400 for Emu3-Gen); None where the file does not tell.
    """

    transformer: TransformerConfig | None = None
    vision_tokenizer: Mapping[str, Any] | None = None
    num_text: int | None = None
    num_codes: int | None = None
    image_area: int | None = None


# ---- names


def to_published_name(name: str) -> tuple[Part, str] | None:
    """A tensor's name in any layout -> the part it belongs to and its published name; None if no layout has such a name."""
    for prefix, ours in TRANSFORMER_PREFIXES:
        if name.startswith(prefix):
            return "transformer", ours + name.removeprefix(prefix)
    for prefix in VISION_PREFIXES:
        if name.startswith(tuple(prefix + module for module in VISION_MODULES)):
            return "vision_tokenizer", _rename(name.removeprefix(prefix), _TO_OFFICIAL)
    if name.startswith(("model.", "lm_head.")):
        return "transformer", name
    return None


def to_published_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The published shape of the tensor with the published `name`: transformers' linear attention layers are 1x1 convolutions."""
    if len(shape) == 2 and _is_attention_weight(name):
        return (*shape, 1, 1)
    return tuple(shape)


def to_transformers(part: Part, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under published names -> under those of transformers' `Emu3ForConditionalGeneration` (4.52 and later)."""
    renamed = {}
    for name, tensor in state.items():
        if part == "transformer":
            renamed[name.replace("model.", "model.text_model.", 1) if name.startswith("model.") else name] = tensor
        else:
            squeezed = tensor.flatten(1) if _is_attention_weight(name) else tensor
            renamed["model.vqmodel." + _rename(name, _TO_TRANSFORMERS)] = squeezed
    return renamed


def _is_attention_weight(name: str) -> bool:
    """Whether a published name is that of an attention projection's matrix in the vision tokenizer."""
    return name.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight"))


def _rename(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def _build_rules(pairs: Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for source, target in pairs:
        pattern = re.escape(source).replace(re.escape("{n}"), r"(\d+)")
        rules.append((re.compile(rf"(?<=\.){pattern}(?=\.)"), target.replace("{n}", r"\1")))
    return rules


_TO_TRANSFORMERS = _build_rules(VISION_RENAMES)
_TO_OFFICIAL = _build_rules([(theirs, official) for official, theirs in VISION_RENAMES])


# ---- config.json


def parse_config(raw: object) -> ModelConfig:
    """The contents of a config.json of any layout; InputError if it is none of them or asks for what this network does not do."""
    if not isinstance(raw, dict):
        raise InputError("it holds no JSON object")
    if "transformer" in raw or "vision_tokenizer" in raw:
        return _parse_ours(raw)
    model_type = raw.get("model_type")
    if model_type == "Emu3":
        num_text, num_codes = _split_vocabulary(raw)
        image_area = None if raw.get("image_area") is None else _read_count(raw, "image_area")
        return ModelConfig(_parse_language_model(raw), None, num_text, num_codes, image_area)
    if model_type == "emu3_text_model":
        return ModelConfig(_parse_language_model(raw), None, *_split_vocabulary(raw))
    if model_type in ("Emu3VisionVQ", "emu3_vqgan"):
        vision = _parse_vision_tokenizer(raw)
        return ModelConfig(None, vision, None, vision["codebook_size"])
    if model_type == "emu3":
        text = _read_object(raw, "text_config")
        sizes = _split_vocabulary_map(raw) if raw.get("vocabulary_map") else _split_vocabulary(text)
        return ModelConfig(_parse_language_model(text), _parse_vision_tokenizer(_read_object(raw, "vq_config")), *sizes)
    raise InputError(f"its model_type is {model_type!r}; Emu3, Emu3VisionVQ, emu3, emu3_text_model and emu3_vqgan are allowed")


def format_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of our own config.json."""
    raw: dict[str, Any] = {}
    if config.transformer is not None:
        raw["transformer"] = asdict(config.transformer)
    if config.vision_tokenizer is not None:
        raw["vision_tokenizer"] = dict(config.vision_tokenizer)
    if config.num_text is not None and config.num_codes is not None:
        raw["vocabulary"] = {"num_text": config.num_text, "num_codes": config.num_codes}
    if config.image_area is not None:
        raw["image_area"] = config.image_area
    return raw


def format_transformers_config(config: ModelConfig, text_only: bool = False) -> dict[str, Any]:
    """The contents of transformers' config.json (version 5; 4.52 reads it, too): `Emu3ForConditionalGeneration` or `Emu3ForCausalLM`.

    InputError where transformers has no such model: its vision tokenizer has norms of 32 groups, and one number for all residual blocks.
    """
    transformer, num_text, num_codes = config.transformer, config.num_text, config.num_codes
    if transformer is None or num_text is None or num_codes is None:
        raise InputError("it does not say the sizes of a transformer and of its vocabulary; a whole model of our own layout is needed")
    text: dict[str, Any] = {
        "model_type": "emu3_text_model",
        "architectures": ["Emu3ForCausalLM"],
        "vocab_size": transformer.vocab_size,
        "hidden_size": transformer.hidden_size,
        "intermediate_size": transformer.intermediate_size,
        "num_hidden_layers": transformer.num_layers,
        "num_attention_heads": transformer.num_heads,
        "num_key_value_heads": transformer.num_kv_heads,
        "head_dim": transformer.head_dim,
        "max_position_embeddings": transformer.max_positions,
        "rms_norm_eps": transformer.norm_eps,
        "rope_theta": transformer.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": transformer.rope_theta},
        "attention_dropout": transformer.dropout,
        "initializer_range": transformer.init_std,
        "tie_word_embeddings": False,
        "pad_token_id": num_text,
        "bos_token_id": num_text + 206,
        "eos_token_id": num_text + 207,
    }
    if text_only:
        return text
    vision = dict(config.vision_tokenizer or {})
    if not vision:
        raise InputError("it holds no vision tokenizer; the language model alone can be written")
    for name, value, allowed in (
        ("num_norm_groups", vision["num_norm_groups"], 32),
        ("num_temporal_res_blocks", vision["num_temporal_res_blocks"], vision["num_res_blocks"]),
    ):
        if value != allowed:
            raise InputError(
                f"its vision tokenizer has {name} {value}; transformers knows {allowed} alone, but the language model can be written"
            )
    # Of the vocabulary, transformers asks for the visual tokens, the end of a line, and a placeholder for pictures: the id of <|extra_0|>.
    vocabulary = {f"<|visual token {code:06d}|>": num_text + NUM_SPECIAL + code for code in range(num_codes)}
    return {
        "model_type": "emu3",
        "architectures": ["Emu3ForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": text,
        "vq_config": {
            "model_type": "emu3_vqgan",
            "codebook_size": vision["codebook_size"],
            "embed_dim": vision["embed_dim"],
            "latent_channels": vision["z_channels"],
            "base_channels": vision["channels"],
            "channel_multiplier": list(vision["channel_multipliers"]),
            "num_res_blocks": vision["num_res_blocks"],
            "attn_resolutions": list(vision["attention_levels"]),
            "hidden_size": vision["channels"] * vision["channel_multipliers"][-1],
            "temporal_downsample_factor": vision["temporal_downsample_factor"],
        },
        "vocabulary_map": {"<image>": num_text + 3, "<|extra_200|>": num_text + 203, **vocabulary},
    }


def _parse_ours(raw: Mapping[str, Any]) -> ModelConfig:
    transformer = vision = num_text = num_codes = image_area = None
    if "transformer" in raw:
        sizes = _read_object(raw, "transformer")
        _check_names("transformer", sizes, [field.name for field in fields(TransformerConfig)])
        for field in fields(TransformerConfig):
            if field.type is int and field.name in sizes:
                _read_count(sizes, field.name)
        transformer = TransformerConfig(**sizes)
    if "vision_tokenizer" in raw:
        vision = _read_object(raw, "vision_tokenizer")
        _check_names("vision_tokenizer", vision, list(_VISION_FIELDS))
        vision = {name: (_read_counts if _VISION_FIELDS[name] else _read_count)(vision, name) for name in vision}
    if "vocabulary" in raw:
        vocabulary = _read_object(raw, "vocabulary")
        _check_names("vocabulary", vocabulary, ["num_text", "num_codes"])
        num_text, num_codes = _read_count(vocabulary, "num_text"), _read_count(vocabulary, "num_codes")
    if "image_area" in raw:
        image_area = _read_count(raw, "image_area")
    return ModelConfig(transformer, vision, num_text, num_codes, image_area)


# Arguments of VisionTokenizerConfig; True where the value is a list.
_VISION_FIELDS = {
    "codebook_size": False,
    "embed_dim": False,
    "z_channels": False,
    "channels": False,
    "channel_multipliers": True,
    "num_res_blocks": False,
    "attention_levels": True,
    "temporal_downsample_factor": False,
    "num_norm_groups": False,
    "num_temporal_res_blocks": False,
}


def _parse_language_model(raw: Mapping[str, Any]) -> TransformerConfig:
    """Official and transformers names; what a file leaves out has the published value, as in both of those implementations."""
    _require(raw, "hidden_act", "silu")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        _require(raw, name, False)
    _require(raw, "rope_scaling", None)
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters is {rope!r}; an object is allowed")
    _require(rope, "rope_type", "default")
    hidden_size = _read_count(raw, "hidden_size", 4096)
    num_heads = _read_count(raw, "num_attention_heads", 32)
    num_kv_heads = num_heads if raw.get("num_key_value_heads", 8) is None else _read_count(raw, "num_key_value_heads", 8)
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise InputError(f"hidden_size is {hidden_size}; a multiple of num_attention_heads ({num_heads}) is allowed")
    return TransformerConfig(
        vocab_size=_read_count(raw, "vocab_size", 184622),
        hidden_size=hidden_size,
        intermediate_size=_read_count(raw, "intermediate_size", 14336),
        num_layers=_read_count(raw, "num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads if raw.get("head_dim") is None else _read_count(raw, "head_dim"),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 1e6)),
        norm_eps=raw.get("rms_norm_eps", 1e-5),
        dropout=raw.get("attention_dropout", 0.1),
        init_std=raw.get("initializer_range", 0.02),
        max_positions=_read_count(raw, "max_position_embeddings", 9216),
    )


def _parse_vision_tokenizer(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Official names (ch, ch_mult, z_channels) and transformers' (base_channels, channel_multiplier, latent_channels)."""
    for name, published in (("double_z", False), ("double_latent", False), ("in_channels", 3), ("out_channels", 3)):
        _require(raw, name, published)
    _require(raw, "num_attention_heads", 1)
    theirs = "base_channels" in raw or raw.get("model_type") == "emu3_vqgan"
    vision: dict[str, Any] = {
        "codebook_size": _read_count(raw, "codebook_size", 32768),
        "embed_dim": _read_count(raw, "embed_dim", 4),
        "z_channels": _read_count(raw, "latent_channels" if theirs else "z_channels", 4),
        "channels": _read_count(raw, "base_channels" if theirs else "ch", 256),
        "channel_multipliers": _read_counts(raw, "channel_multiplier" if theirs else "ch_mult", (1, 2, 2, 4)),
        "num_res_blocks": _read_count(raw, "num_res_blocks", 2),
        "attention_levels": _read_counts(raw, "attn_resolutions", (3,)),
        "temporal_downsample_factor": _read_count(raw, "temporal_downsample_factor", 4),
        "num_norm_groups": 32,
    }
    vision["num_temporal_res_blocks"] = vision["num_res_blocks"]  # one number for both, in both implementations
    width = vision["channels"] * vision["channel_multipliers"][-1]
    if theirs:
        _require(raw, "hidden_size", width)  # transformers' own attention layers have this size
    return vision


def _split_vocabulary(raw: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Sizes from the place of the padding token, which is the first special one; (None, None) if that leaves no codes."""
    num_text = raw.get("pad_token_id", PUBLISHED_NUM_TEXT)
    if not isinstance(num_text, int):
        return None, None
    num_codes = _read_count(raw, "vocab_size", 184622) - num_text - NUM_SPECIAL
    return (num_text, num_codes) if num_text > 0 and num_codes > 0 else (None, None)


def _split_vocabulary_map(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Sizes from transformers' table of token strings, whose visual tokens must be numbered in the order of their codes."""
    table = _read_object(raw, "vocabulary_map")
    codes = {token: number for token, number in table.items() if token.startswith("<|visual token ")}
    first = codes.get("<|visual token 000000|>")
    if not isinstance(first, int) or first <= NUM_SPECIAL:
        raise InputError(f"its vocabulary_map numbers visual token 0 as {first!r}; a number above {NUM_SPECIAL} is allowed")
    for code in range(len(codes)):
        number = codes.get(f"<|visual token {code:06d}|>")
        if number != first + code:
            raise InputError(f"its vocabulary_map numbers visual token {code} as {number!r}; {first + code} is allowed")
    return first - NUM_SPECIAL, len(codes)


# ---- values of a config.json

_MAX_COUNT = 2**24  # no size of a network comes near; keeps a broken file from asking for absurd amounts


def _read_count(raw: Mapping[str, Any], name: str, missing: int | None = None) -> int:
    value = raw.get(name, missing)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_COUNT:
        raise InputError(f"{name} is {value!r}; a whole number from 1 to {_MAX_COUNT} is allowed")
    return value


def _read_counts(raw: Mapping[str, Any], name: str, missing: tuple[int, ...] | None = None) -> list[int]:
    values = raw.get(name, missing)
    if not isinstance(values, list | tuple) or not all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values):
        raise InputError(f"{name} is {values!r}; a list of whole numbers is allowed")
    return list(values)


def _read_object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise InputError(f"{name} is {value!r}; an object is allowed")
    return value


def _require(raw: Mapping[str, Any], name: str, allowed: object) -> None:
    value = raw.get(name, allowed)
    if value != allowed:
        raise InputError(f"{name} is {value!r}; only {allowed!r} is supported")


def _check_names(section: str, values: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for name in values:
        if name not in allowed:
            raise InputError(f"{section} has a field {name!r}; {', '.join(allowed)} are allowed")
