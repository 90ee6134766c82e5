"""Names and configurations of the published layouts, against the published lists and transformers' own classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Emu3ForConditionalGeneration, Emu3VQVAE, Emu3VQVAEConfig

from openemu3.model.layouts import ModelConfig, format_config, parse_config, to_published_name, to_published_shape, to_transformers
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.records import InputError
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

DATA = Path(__file__).parent / "data"


def read_keys(layout: str) -> dict[str, tuple[int, ...]]:
    """Published list of names and shapes: one `name (shape)` a line."""
    keys = {}
    for line in (DATA / f"vision-tokenizer-keys-{layout}.txt").read_text().splitlines():
        name, _, shape = line.partition(" ")
        keys[name] = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
    assert len(keys) == 495
    return keys


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_official_to_transformers_matches_the_published_list() -> None:
    official = {name: torch.empty(shape, device="meta") for name, shape in read_keys("official").items()}
    renamed = {
        name.removeprefix("model.vqmodel."): shape for name, shape in shapes_of(to_transformers("vision_tokenizer", official)).items()
    }
    assert renamed == read_keys("transformers")


@pytest.mark.parametrize("prefix", ["", "vqmodel.", "model.vqmodel."])
def test_transformers_to_official_matches_the_published_list(prefix: str) -> None:
    renamed = {}
    for name, shape in read_keys("transformers").items():
        published = to_published_name(prefix + name)
        assert published is not None and published[0] == "vision_tokenizer"
        renamed[published[1]] = to_published_shape(published[1], shape)
    assert renamed == read_keys("official")


def test_official_names_stay_as_they_are() -> None:
    for name, shape in read_keys("official").items():
        assert to_published_name(name) == ("vision_tokenizer", name)
        assert to_published_shape(name, shape) == shape


def test_the_lists_are_those_of_the_real_classes() -> None:
    with torch.device("meta"):
        ours, theirs = VisionTokenizer(VisionTokenizerConfig()), Emu3VQVAE(Emu3VQVAEConfig())
    assert shapes_of(ours.state_dict()) == read_keys("official")
    assert shapes_of(theirs.state_dict()) == read_keys("transformers")


def test_the_whole_published_model_in_transformers_layout(build_oracle: Any) -> None:
    oracle = build_oracle(num_hidden_layers=2)
    assert isinstance(oracle, Emu3ForConditionalGeneration)
    state = oracle.state_dict()
    parts: dict[str, dict[str, torch.Tensor]] = {"transformer": {}, "vision_tokenizer": {}}
    for name, tensor in state.items():
        published = to_published_name(name)
        assert published is not None
        parts[published[0]][published[1]] = tensor.reshape(to_published_shape(published[1], tensor.shape))
    config = parse_config(oracle.config.to_dict()).transformer
    assert config is not None
    assert shapes_of(Transformer(config).state_dict()) == shapes_of(parts["transformer"])
    back = to_transformers("transformer", parts["transformer"]) | to_transformers("vision_tokenizer", parts["vision_tokenizer"])  # type: ignore[arg-type]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("text_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),  # transformers <= 4.51, and 5 on disk
        ("text_model.lm_head.weight", "lm_head.weight"),
        ("model.text_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),  # transformers >= 4.52
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_the_language_model(name: str, published: str) -> None:
    assert to_published_name(name) == ("transformer", published)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "visual.conv1.weight", "vqmodel.discriminator.0.weight", ""])
def test_foreign_names_are_no_ones(name: str) -> None:
    assert to_published_name(name) is None


# ---- config.json

# As in the released folders, shortened by fields that say nothing about the network.
EMU3_GEN = {
    "architectures": ["Emu3ForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 151849, "eos_token_id": 151850, "hidden_act": "silu",
    "hidden_size": 4096, "image_area": 518400, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 9216,
    "model_type": "Emu3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 151643,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    "use_cache": True, "vocab_size": 184622,
}  # fmt: skip
EMU3_VISION = {
    "model_type": "Emu3VisionVQ", "attn_resolutions": [3], "ch": 256, "ch_mult": [1, 2, 2, 4], "codebook_size": 32768, "double_z": False,
    "dropout": 0.0, "embed_dim": 4, "in_channels": 3, "num_res_blocks": 2, "out_channels": 3, "temporal_downsample_factor": 4,
    "z_channels": 4,
}  # fmt: skip


def test_official_language_model_config() -> None:
    config = parse_config(EMU3_GEN)
    assert config == ModelConfig(TransformerConfig(max_positions=9216), None, 151643, 32768, 518400)


def test_official_vision_tokenizer_config() -> None:
    config = parse_config(EMU3_VISION)
    assert config.transformer is None and config.vision_tokenizer is not None
    assert VisionTokenizerConfig(**config.vision_tokenizer) == VisionTokenizerConfig()


@pytest.mark.parametrize("part", ["whole", "text", "vision"])
def test_transformers_config(build_oracle: Any, part: str) -> None:
    whole = build_oracle(num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-6).config
    config = parse_config({"whole": whole, "text": whole.text_config, "vision": whole.vq_config}[part].to_dict())
    if part != "vision":
        assert config.transformer == TransformerConfig(
            vocab_size=315, hidden_size=64, intermediate_size=96, num_layers=5, num_heads=8, num_kv_heads=2, head_dim=8,
            norm_eps=1e-6, max_positions=512,
        )  # fmt: skip
        assert (config.num_text, config.num_codes) == (40, 64)
    if part != "text":
        assert config.vision_tokenizer is not None
        expected = VisionTokenizerConfig(
            codebook_size=64, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), num_temporal_res_blocks=1
        )
        assert VisionTokenizerConfig(**config.vision_tokenizer) == expected


def test_our_config_comes_back() -> None:
    vision = parse_config(EMU3_VISION).vision_tokenizer
    config = ModelConfig(TransformerConfig(num_layers=3, rope_theta=5e3, dropout=0.0), vision, 2048, 4096, 4096)
    raw = format_config(config)
    assert set(raw) == {"transformer", "vision_tokenizer", "vocabulary", "image_area"}
    assert parse_config(raw) == config
    assert parse_config(format_config(ModelConfig(TransformerConfig()))) == ModelConfig(TransformerConfig())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "no JSON object"),
        ({}, "model_type is None; Emu3"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        (EMU3_GEN | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        (EMU3_GEN | {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (EMU3_GEN | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .* only None"),
        (EMU3_GEN | {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; only 'default'"),
        (EMU3_GEN | {"num_hidden_layers": "32"}, "num_hidden_layers is '32'; a whole number"),
        (EMU3_GEN | {"hidden_size": 10**18}, "hidden_size is 1000000000000000000; a whole number"),
        (EMU3_GEN | {"hidden_size": 4097}, "hidden_size is 4097; a multiple of num_attention_heads"),
        (EMU3_GEN | {"num_key_value_heads": 5}, "num_heads is 32; a multiple of num_kv_heads"),
        (EMU3_GEN | {"rms_norm_eps": "small"}, "norm_eps is 'small'"),
        (EMU3_GEN | {"image_area": -1}, "image_area is -1"),
        (EMU3_VISION | {"ch_mult": "1224"}, "ch_mult is '1224'; a list"),
        (EMU3_VISION | {"double_z": True}, "double_z is True; only False"),
        ({"model_type": "emu3", "text_config": 3}, "text_config is 3; an object"),
        ({"model_type": "emu3", "text_config": {}, "vq_config": {}, "vocabulary_map": {"a": 1}}, "visual token 0 as None"),
        (
            {"model_type": "emu3", "text_config": {}, "vq_config": {},
             "vocabulary_map": {"<|visual token 000000|>": 300, "<|visual token 000001|>": 302}},
            "visual token 1 as 302; 301",
        ),
        ({"transformer": {"hidden": 3}}, "transformer has a field 'hidden'"),
        ({"transformer": {"num_layers": 2**40}}, "num_layers is 1099511627776"),
        ({"vision_tokenizer": {"channels": 1.5}}, "channels is 1.5"),
        ({"vision_tokenizer": {}, "vocabulary": {"num_text": 5}}, "num_codes is None"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_used_say_why(raw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(raw)
