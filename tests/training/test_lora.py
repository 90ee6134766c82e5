"""Adapters: they begin at nothing, they alone are learnt, and merged weights are what peft itself makes of the same files."""

import copy
import dataclasses
import json

import pytest
import torch

from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import build_transformer
from openemu3.records import InputError
from openemu3.training.lora import LoraConfig, apply_lora, load_adapter, merge_state, save_adapter

peft = pytest.importorskip("peft")
CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture
def plain(transformer_config):
    return build_transformer(transformer_config, torch.Generator().manual_seed(1)).eval()


@pytest.fixture
def trained(plain):
    """With adapters that are not zero."""
    transformer = copy.deepcopy(plain)
    apply_lora(transformer, CONFIG)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=generator)
    return transformer


def compute(transformer):
    with torch.no_grad():
        return transformer.compute_logits(transformer(torch.arange(24).view(2, 12), CausalAttention()))


def test_an_adapter_begins_at_nothing_and_everything_else_is_frozen(plain):
    transformer = copy.deepcopy(plain)
    state = torch.get_rng_state()
    apply_lora(transformer, CONFIG)
    assert torch.get_rng_state().equal(state)
    torch.testing.assert_close(compute(transformer), compute(plain), rtol=0, atol=0)
    learnt = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    expected = {
        f"model.layers.{layer}.{module}.lora_{half}.default.weight"
        for layer in range(2)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for half in "AB"
    }
    assert learnt == expected
    again = copy.deepcopy(plain)
    apply_lora(again, CONFIG)
    assert all(a.equal(b) for a, b in zip(again.parameters(), transformer.parameters(), strict=True))


def test_merged_weights_compute_the_same(plain, trained):
    merged = copy.deepcopy(plain)
    merged.load_state_dict(merge_state(trained.state_dict(), scale=2.0))
    assert not torch.allclose(compute(trained), compute(plain), atol=1e-3)
    torch.testing.assert_close(compute(merged), compute(trained), rtol=1e-4, atol=1e-5)


def test_an_adapter_folder_is_pefts(plain, trained, tmp_path):
    """peft's own loader reads what is written here, and what peft writes is read here."""
    save_adapter(trained.state_dict(), CONFIG, tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    torch.testing.assert_close(compute(wrapped.base_model.model), compute(trained))
    wrapped.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        merged = copy.deepcopy(plain)
        load_adapter(merged, tmp_path / folder)
        torch.testing.assert_close(compute(merged), compute(trained), rtol=1e-4, atol=1e-5)


def test_bf16_weights_are_merged_in_fp32(plain, tmp_path):
    transformer = copy.deepcopy(plain).bfloat16()
    apply_lora(transformer, CONFIG)
    assert {p.dtype for n, p in transformer.named_parameters() if "lora_" in n} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(compute(transformer)).all()
    merged = merge_state(transformer.state_dict(), 2.0)
    assert merged["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read as an adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as an adapter"),
        (lambda folder: edit(folder, use_dora=True), "plain LoRA is allowed"),
        (lambda folder: edit(folder, peft_type="IA3"), "plain LoRA is allowed"),
    ],
)
def test_folders_that_hold_no_such_adapter_are_refused(plain, trained, tmp_path, change, message):
    save_adapter(trained.state_dict(), CONFIG, tmp_path)
    change(tmp_path)
    before = compute(plain)
    with pytest.raises(InputError, match=message):
        load_adapter(plain, tmp_path)
    assert compute(plain).equal(before)


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_of_another_model_is_refused(transformer_config, trained, tmp_path):
    save_adapter(trained.state_dict(), CONFIG, tmp_path)
    smaller = build_transformer(dataclasses.replace(transformer_config, num_layers=1), torch.Generator().manual_seed(1))
    with pytest.raises(InputError, match="does not fit this model"):
        load_adapter(smaller, tmp_path)
    with pytest.raises(InputError, match="no adapter to save"):
        save_adapter(smaller.state_dict(), CONFIG, tmp_path)


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}, {"targets": ("lm_head",)}])
def test_impossible_adapters_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        LoraConfig(**fields)


def test_a_configuration_survives_json():
    assert LoraConfig.parse(json.loads(json.dumps(dataclasses.asdict(CONFIG)))) == CONFIG
