"""Folders of weights: every layout in, ours out, one copy in memory, and one clear sentence for whatever is wrong."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3ForCausalLM, Emu3ForConditionalGeneration

from openemu3.model.attention import CausalAttention
from openemu3.model.layouts import ModelConfig, to_transformers
from openemu3.model.transformer import Transformer, TransformerConfig, build_transformer
from openemu3.model.weights import (
    convert_to_transformers,
    load_into,
    load_state,
    load_transformer,
    open_state,
    read_config,
    save_config,
    save_state,
    save_transformer,
)
from openemu3.records import InputError
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

TINY = TransformerConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def make_tiny(seed: int = 0) -> Transformer:
    return build_transformer(TINY, torch.Generator().manual_seed(seed)).eval()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    save_config(tmp_path, ModelConfig(TINY))
    save_transformer(tmp_path, make_tiny(), torch.float32)
    return tmp_path


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- from and to transformers


@pytest.mark.parametrize("layout", ["on disk", "sharded", "in memory", "language model alone"])
def test_weights_of_transformers(build_oracle: Callable[..., Any], tmp_path: Path, layout: str) -> None:
    oracle = build_oracle(seed=3, num_hidden_layers=3)
    if layout == "on disk":  # what transformers 5 writes: the prefixes of 4.48 to 4.51
        oracle.save_pretrained(tmp_path)
        assert "text_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")
    elif layout == "sharded":
        oracle.save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 5
    elif layout == "in memory":  # the prefixes of 4.52 to 4.57
        oracle.config.save_pretrained(tmp_path)
        save_file(dict(oracle.state_dict()), tmp_path / "model.safetensors")
    else:
        alone = Emu3ForCausalLM(oracle.config.text_config).eval()
        alone.model.load_state_dict(oracle.model.text_model.state_dict())
        alone.lm_head.load_state_dict(oracle.lm_head.state_dict())
        alone.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path, dtype=torch.float32)
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    ids = torch.arange(60)[None] + 45
    with torch.no_grad():
        logits = ours.compute_logits(ours(ids, CausalAttention()))
        torch.testing.assert_close(logits, oracle(input_ids=ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["with the language model", "alone"])
def test_vision_tokenizer_of_transformers(build_oracle: Callable[..., Any], tmp_path: Path, layout: str) -> None:
    oracle = build_oracle(seed=4)
    theirs = oracle.model.vqmodel
    (oracle if layout == "with the language model" else theirs).save_pretrained(tmp_path)
    config = read_config(tmp_path).vision_tokenizer
    assert config is not None
    with torch.device("meta"):
        ours = VisionTokenizer(VisionTokenizerConfig(**config))
    load_into(ours, tmp_path, "vision_tokenizer")
    codes = torch.randint(0, 64, (1, 4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.decode_image(codes), theirs.decode(codes), atol=1e-5, rtol=1e-5)
    assert ours.encoder.time_res_stack[0].norm1.num_batches_tracked.item() == 7
    assert ours.encoder.time_res_stack[0].norm1.num_batches_tracked.dtype == torch.int64


def test_transformers_loads_what_we_save(build_oracle: Callable[..., Any], tmp_path: Path) -> None:
    oracle, other = build_oracle(seed=5), build_oracle(seed=6)
    oracle.save_pretrained(tmp_path / "theirs")
    transformer = load_transformer(tmp_path / "theirs", dtype=torch.float32)
    state = to_transformers("transformer", transformer.state_dict())
    state |= to_transformers("vision_tokenizer", dict(load_state(tmp_path / "theirs", "vision_tokenizer")))
    save_state(tmp_path / "ours", state, "model", max_shard_bytes=300_000)
    other.config.save_pretrained(tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    back = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert same_state(back, oracle)
    assert not same_state(back, other)
    ids = torch.arange(20)[None] + 50
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, oracle(input_ids=ids).logits)


# ---- our own layout


def test_what_we_save_comes_back(tiny_folder: Path) -> None:
    assert read_config(tiny_folder) == ModelConfig(TINY)
    assert sorted(path.name for path in tiny_folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same_state(load_transformer(tiny_folder, dtype=torch.float32), make_tiny())


def test_weights_are_cast_as_asked(tiny_folder: Path) -> None:
    loaded = load_transformer(tiny_folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same_state(loaded, make_tiny().to(torch.bfloat16))
    module = Transformer(TINY)
    load_into(module, tiny_folder, "transformer")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}  # as stored


def test_loading_into_a_frozen_module_keeps_it_frozen(tiny_folder: Path) -> None:
    module = make_tiny(seed=1).requires_grad_(False)
    load_into(module, tiny_folder, "transformer", dtype=torch.float32)
    assert same_state(module, make_tiny())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_both_parts_in_one_folder_of_ours(tiny_folder: Path) -> None:
    vision = {"codebook_size": 32, "channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "attention_levels": [1],
              "num_norm_groups": 4}  # fmt: skip
    save_config(tiny_folder, ModelConfig(TINY, vision, 10, 32, 64))
    first, second = (VisionTokenizer(VisionTokenizerConfig(**vision)) for _ in range(2))
    torch.nn.init.normal_(first.quantize.embedding.weight)
    save_state(tiny_folder, first.state_dict(), "vision_tokenizer")
    load_into(second, tiny_folder, "vision_tokenizer", dtype=torch.float32)
    assert same_state(first, second)
    assert same_state(load_transformer(tiny_folder, dtype=torch.float32), make_tiny())
    config = read_config(tiny_folder)
    assert (config.vision_tokenizer, config.num_text, config.num_codes, config.image_area) == (vision, 10, 32, 64)


def test_shards_and_single_files_replace_each_other(tiny_folder: Path) -> None:
    for seed, max_shard_bytes, num_files in ((1, 9_000, 12), (2, 20_000, 4), (3, 10**9, 1), (4, 9_000, 12)):
        save_state(tiny_folder, make_tiny(seed).state_dict(), "model", max_shard_bytes=max_shard_bytes)
        assert len(list(tiny_folder.glob("*.safetensors"))) == num_files
        assert (tiny_folder / "model.safetensors.index.json").exists() == (num_files > 1)
        assert not list(tiny_folder.glob(".partial*"))
        assert same_state(load_transformer(tiny_folder, dtype=torch.float32), make_tiny(seed))


def test_a_slice_of_another_tensor_is_saved_alone(tmp_path: Path) -> None:
    whole = torch.arange(1000.0).view(10, 100)
    save_state(tmp_path, {"lm_head.weight": whole[2:4], "model.norm.weight": whole[:, 3]}, "model")
    assert (tmp_path / "model.safetensors").stat().st_size < 2000
    loaded = dict(load_state(tmp_path, "transformer"))
    assert torch.equal(loaded["lm_head.weight"], whole[2:4]) and torch.equal(loaded["model.norm.weight"], whole[:, 3])


# ---- memory

PEAK_MEMORY = """
import gc, re, sys, torch
from openemu3.model.weights import load_transformer
def read(field):
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\\s+(\\d+)", file.read())[1]) * 1024
large, small = sys.argv[1:]
load_transformer(small)  # what is imported on the way is not the weights
for dtype in (torch.float32, torch.bfloat16):
    gc.collect()
    before = read("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    transformer = load_transformer(large, dtype=dtype)
    size = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
    print(size, (read("VmHWM") - before) / size)
    del transformer
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure peak memory")
def test_loading_takes_the_memory_of_one_copy(tmp_path: Path, tiny_folder: Path) -> None:
    config = TransformerConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2304, num_layers=6, num_heads=6, num_kv_heads=2, head_dim=128
    )
    transformer = Transformer(config).to_empty(device="cpu")
    for parameter in transformer.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    save_config(tmp_path / "large", ModelConfig(config))
    save_state(tmp_path / "large", transformer.state_dict(), "model", max_shard_bytes=120 * 10**6)
    del transformer
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "large"), str(tiny_folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    measured = [tuple(map(float, line.split())) for line in lines]
    assert [size for size, _ in measured] == [215_522_304, 107_761_152]
    for _, ratio in measured:
        assert 0.95 < ratio < 1.35


# ---- what goes wrong


def damage_config(text: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "config.json").write_bytes(text)

    return damage


def damage_file(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def damage_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")

    return damage


def replace_by_index(index: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return damage


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def replace_by_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights; model.safetensors is needed"),
        (replace_by_pickle, r"as a pickle \(pytorch_model-00001-of-00002.bin\), which is never opened; convert"),
        (replace_by_folder, "is not a whole safetensors file"),
        (damage_config(b""), "config.json is not readable JSON"),
        (damage_config(b"\xff\xfe{"), "config.json is not readable JSON"),
        (damage_config(b"[" * 100_000), "config.json is not readable JSON"),
        (damage_config(b'{"model_type": "qwen2"}'), "model_type is 'qwen2'"),
        (damage_config(json.dumps({"transformer": {"num_layers": 10**6}}).encode()), "weights of 2 layers; its config.json says 1000000"),
        (damage_config(b'{"vision_tokenizer": {}}'), "holds a vision tokenizer without a language model"),
        (
            damage_config(json.dumps({"transformer": {"num_layers": 2}}).encode()),
            r"of shape \[50, 32\]; by its config.json \[184622, 4096\]",
        ),
        (damage_file(lambda data: b""), r"\(0 bytes\) is not a whole safetensors file"),
        (damage_file(lambda data: data[:5]), "is not a whole safetensors file"),
        (damage_file(lambda data: data[:-1]), "is not a whole safetensors file"),
        (damage_file(lambda data: data[: len(data) // 2]), "is not a whole safetensors file"),
        (damage_file(lambda data: b"\xff" * 16 + data[16:]), "is not a whole safetensors file"),
        (damage_file(lambda data: b"PK\x03\x04" + data), "is not a whole safetensors file"),
        (damage_state(lambda state: state.pop(UP)), f"is not this transformer: it lacks {UP}$"),
        (damage_state(lambda state: state.update({"model.extra": torch.ones(1)})), "has model.extra that do not belong to it"),
        (damage_state(lambda state: state.update({"visual.conv": torch.ones(1)})), "has visual.conv that do not belong to it"),
        (damage_state(lambda state: state.update({UP: torch.ones(3, 3)})), rf"holds {UP} of shape \[3, 3\]; .* \[48, 32\] is needed"),
        (damage_state(lambda state: state.update({UP: state[UP].to(torch.int8)})), f"holds {UP} as whole numbers"),
        (
            damage_state(lambda state: state.update({"text_model.model.norm.weight": torch.ones(32)})),
            r"holds (text_model.)?model.norm.weight, which model.safetensors holds too",
        ),
        (
            damage_state(lambda state: (lambda kept: (state.clear(), state.update(kept)))({"encoder.conv_in.weight": torch.ones(1)})),
            "holds no weights of a transformer",
        ),
        (replace_by_index("nonsense"), "index.json is not readable JSON"),
        (replace_by_index([]), "is no index of safetensors shards"),
        (replace_by_index({"weight_map": {}}), "is no index of safetensors shards"),
        (replace_by_index({"weight_map": {"a": "../model-00001-of-00001.safetensors"}}), "names a shard '../model"),
        (replace_by_index({"weight_map": {"a": "/etc/passwd"}}), "names a shard '/etc/passwd'; .* of the same folder is allowed"),
        (replace_by_index({"weight_map": {"a": "..\\x.safetensors"}}), "names a shard"),
        (replace_by_index({"weight_map": {"a": "model.bin"}}), "names a shard 'model.bin'"),
        (replace_by_index({"weight_map": {"a": 3}}), "names a shard '3'"),
        (replace_by_index({"weight_map": {"a": "model-00002-of-00002.safetensors"}}), "names a shard model-00002.*, which is missing"),
    ],
)
def test_broken_folders_are_refused_in_one_sentence(tiny_folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(tiny_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_transformer(tiny_folder)
    assert "\n" not in str(caught.value)


def test_many_differences_are_counted_and_the_first_few_named(tiny_folder: Path) -> None:
    module = build_transformer(TINY, torch.Generator().manual_seed(9))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save_state(tiny_folder, {"model.foreign": torch.ones(2)}, "model")
    with pytest.raises(InputError, match=r"lacks .*weight, .*weight, .*weight and 18 more and has model.foreign"):
        load_into(module, tiny_folder, "transformer")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("folder", ["nowhere", "a_file"])
def test_a_folder_that_is_none(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a_file").write_text("hello")
    with pytest.raises(InputError, match="a model folder is needed"):
        load_transformer(tmp_path / folder)
    with pytest.raises(InputError, match="a model folder is needed"):
        read_config(tmp_path / folder)


@pytest.fixture
def little_space() -> Iterator[None]:
    """No file may grow beyond 8 KiB, as on a full disk: writing fails midway with an error of the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_full_disk_leaves_what_was_there(tiny_folder: Path, little_space: None, max_shard_bytes: int) -> None:
    with pytest.raises(InputError, match="cannot be written") as caught:
        save_state(tiny_folder, make_tiny(seed=1).state_dict(), "model", max_shard_bytes=max_shard_bytes)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tiny_folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same_state(load_transformer(tiny_folder, dtype=torch.float32), make_tiny())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_config(tmp_path / "file" / "folder", ModelConfig(TINY))


# ---- writing transformers' layout


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of both parts in our own layout, with no parameter at its default."""
    folder = tmp_path_factory.mktemp("whole")
    vision = VisionTokenizerConfig(
        64, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), num_temporal_res_blocks=1
    )
    text = TransformerConfig(
        vocab_size=300 + 211 + 64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        rope_theta=5000.0, norm_eps=1e-4, init_std=0.3, max_positions=77,
    )  # fmt: skip
    save_config(folder, ModelConfig(text, asdict(vision), 300, 64, 64 * 64))
    transformer, tokenizer = build_transformer(text, torch.Generator().manual_seed(1)), VisionTokenizer(vision)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*transformer.parameters(), *tokenizer.parameters()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        for name, buffer in tokenizer.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    save_transformer(folder, transformer, torch.float32)
    save_state(folder, tokenizer.state_dict(), "vision_tokenizer")
    return folder


@torch.no_grad()
def test_transformers_runs_what_was_written_for_it(whole_folder: Path, tmp_path: Path) -> None:
    convert_to_transformers(whole_folder, tmp_path)
    theirs, info = Emu3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs.eval()
    ours = load_transformer(whole_folder, dtype=torch.float32)
    ids = torch.randint(0, 575, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[ids == 303] = 1  # their placeholder for a picture
    logits = ours.compute_logits(ours(ids, CausalAttention()))
    torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    tokenizer = VisionTokenizer(VisionTokenizerConfig(**read_config(whole_folder).vision_tokenizer))  # type: ignore[arg-type]
    load_into(tokenizer, whole_folder, "vision_tokenizer")
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = theirs.model.vqmodel.encode(pixels, torch.tensor([[16, 24]])).image_tokens
    assert torch.cat([c.flatten() for c in codes]).equal(tokenizer.encode_image(pixels).flatten())
    # And back: it reads as the same model.
    assert read_config(tmp_path).transformer == read_config(whole_folder).transformer
    assert same_state(load_transformer(tmp_path, dtype=torch.float32), ours)


@torch.no_grad()
def test_the_language_model_alone_for_transformers(whole_folder: Path, tmp_path: Path) -> None:
    convert_to_transformers(whole_folder, tmp_path, text_only=True)
    theirs, info = Emu3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(30)[None]
    ours = load_transformer(whole_folder, dtype=torch.float32)
    torch.testing.assert_close(theirs.eval()(input_ids=ids).logits, ours.compute_logits(ours(ids, CausalAttention())), rtol=1e-4, atol=1e-4)


def test_what_transformers_has_no_model_for(whole_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not say the sizes of a transformer and of its vocabulary"):
        convert_to_transformers(tiny_folder, tmp_path / "out")
    config = read_config(whole_folder)
    for name, value in (("num_norm_groups", 8), ("num_temporal_res_blocks", 2)):
        save_config(tmp_path / name, replace(config, vision_tokenizer={**(config.vision_tokenizer or {}), name: value}))
        with pytest.raises(InputError, match=f"{name} {value}; transformers knows .* the language model can be written"):
            convert_to_transformers(tmp_path / name, tmp_path / "out")
    save_config(tmp_path / "alone", replace(config, vision_tokenizer=None))
    with pytest.raises(InputError, match="holds no vision tokenizer"):
        convert_to_transformers(tmp_path / "alone", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_can_be_read_one_by_one(whole_folder: Path) -> None:
    state = open_state(whole_folder, "transformer")
    assert {name: tensor.sum().item() for name, tensor in state.items()} == {
        name: tensor.sum().item() for name, tensor in load_state(whole_folder, "transformer")
    }
    assert len(state) == 2 * 9 + 3 and "lm_head.weight" in state and "encoder.conv_in.weight" not in state
