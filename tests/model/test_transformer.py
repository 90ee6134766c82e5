"""The network itself: sizes, names, hand-worked cases, dropout, dtypes, compilation."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import Transformer, TransformerConfig, apply_rotation, build_rotation, build_transformer
from openemu3.records import InputError

TINY = TransformerConfig(
    vocab_size=120, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dropout=0.5
)


def make_tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    return build_transformer(TINY, torch.Generator().manual_seed(seed), dtype).eval()


def make_ids(rows: int = 2, tokens: int = 10) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_the_defaults_are_the_published_model() -> None:
    transformer = Transformer(TransformerConfig())
    assert all(parameter.is_meta for parameter in transformer.parameters())
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 8_492_011_520


def test_parameters_carry_the_published_names() -> None:
    in_layer = [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
    ]  # fmt: skip
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.{layer}.{name}.weight" for layer in range(TINY.num_layers) for name in in_layer}
    assert set(Transformer(TINY).state_dict()) == expected


def test_initialisation_depends_on_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = make_tiny(seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = make_tiny(seed=5).state_dict(), make_tiny(seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_initialisation_is_normal_with_the_configured_deviation() -> None:
    for name, tensor in make_tiny().state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert abs(tensor.std().item() / TINY.init_std - 1) < 0.1, name
            assert abs(tensor.mean().item()) < 4 * TINY.init_std / math.sqrt(tensor.numel()), name


def test_rotation_against_a_case_worked_out_by_hand() -> None:
    # head_dim 4, theta 100: frequencies 1 and 0.1. At position 2 the pair (0, 2) turns by 2 rad, (1, 3) by 0.2 rad.
    rotation = build_rotation(torch.tensor([[0, 2]]), head_dim=4, theta=100.0)
    heads = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    turned = apply_rotation(heads, rotation)[0, 0]
    assert torch.equal(turned[0], heads[0, 0, 0])
    torch.testing.assert_close(turned[1], torch.tensor([-3.1440391, 1.1654558, -0.3391431, 4.3176050]), atol=1e-6, rtol=0)


def test_rotation_tells_far_positions_apart_in_bf16() -> None:
    rotation = build_rotation(torch.tensor([[131070, 131071]]), head_dim=16, theta=1e6)
    exact = 131071 * 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert rotation.cos.dtype == torch.float32
    torch.testing.assert_close(rotation.cos[0, 0, 1, :8].double(), exact.cos(), atol=2e-2, rtol=0)  # fp32 angles up to 1e5 rad
    turned = apply_rotation(torch.ones(1, 1, 2, 16, dtype=torch.bfloat16), rotation)
    assert turned.dtype == torch.bfloat16
    assert not torch.equal(turned[0, 0, 0], turned[0, 0, 1])


def test_norm_against_a_case_worked_out_by_hand() -> None:
    config = TransformerConfig(vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2)
    norm = build_transformer(config, torch.Generator().manual_seed(0)).model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # The root of the mean square of (3, 4) is sqrt(12.5); the epsilon of 1e-5 counts for (0.003, 0.004), whose mean square is 1.25e-5.
    expected = torch.tensor([[0.8485281, 2.2627417], [0.003 / math.sqrt(2.25e-5), 0.008 / math.sqrt(2.25e-5)]])
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0], [0.003, 0.004]])).detach(), expected, atol=1e-5, rtol=0)


def test_norm_computes_in_fp32_for_bf16() -> None:
    transformer = make_tiny(torch.bfloat16)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + TINY.norm_eps).sqrt()
    assert torch.equal(transformer.model.norm(x), exact.bfloat16())  # rounded once, at the end


def test_logits_of_a_slice_are_a_slice_of_the_logits() -> None:
    transformer, ids = make_tiny(), make_ids()
    hidden = transformer(ids, CausalAttention())
    assert hidden.shape == (2, 10, 48)
    whole = transformer.compute_logits(hidden)
    assert whole.shape == (2, 10, 120)
    torch.testing.assert_close(transformer.compute_logits(hidden, slice(30, 70)), whole[..., 30:70])
    torch.testing.assert_close(transformer.compute_logits(hidden[0, -1]), whole[0, -1])


def test_the_future_is_not_seen() -> None:
    transformer, ids = make_tiny(), make_ids()
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % TINY.vocab_size
    before, after = transformer(ids, CausalAttention()), transformer(changed, CausalAttention())
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@torch.no_grad()
def test_dropout_acts_at_four_places_and_only_while_training() -> None:
    transformer, ids = make_tiny(), make_ids(2, 60)
    assert torch.equal(transformer(ids, CausalAttention()), transformer(ids, CausalAttention()))
    assert transformer.attention_dropout == 0.0
    transformer.train()
    assert transformer.attention_dropout == 0.5
    block = transformer.model.layers[0]
    seen = {}
    transformer.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.update(block_in=inputs[0]))
    block.post_attention_layernorm.register_forward_pre_hook(lambda module, inputs: seen.update(between=inputs[0]))
    block.self_attn.register_forward_hook(lambda module, inputs, output: seen.update(attended=output))
    block.mlp.register_forward_hook(lambda module, inputs, output: seen.update(fed=output))
    block.register_forward_hook(lambda module, inputs, output: seen.update(block_out=output))
    transformer(ids, CausalAttention())
    for place, before, after in (
        ("embeddings", transformer.model.embed_tokens(ids), seen["block_in"]),
        ("after attention", seen["attended"], seen["between"] - seen["block_in"]),
        ("after the MLP", seen["fed"], seen["block_out"] - seen["between"]),
    ):
        dropped = after.abs() < 1e-8
        assert 0.45 < dropped.float().mean() < 0.55, place
        torch.testing.assert_close(after[~dropped], 2 * before[~dropped], atol=1e-6, rtol=1e-4)

    queries, keys = torch.zeros(1, 4, 200, 16), torch.zeros(1, 2, 200, 16)
    values = torch.ones(1, 2, 200, 16)
    assert torch.allclose(CausalAttention()(0, queries, keys, values), torch.ones(()))
    attended = CausalAttention(dropout=0.5)(0, queries, keys, values)  # row i: the kept ones of i+1 equal weights, doubled
    assert set(attended[0, :, 0, 0].tolist()) <= {0.0, 2.0}
    assert 0.9 < attended[:, :, 100:].mean() < 1.1
    assert attended[:, :, 100:].std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient(dtype: torch.dtype) -> None:
    transformer = make_tiny(dtype).train()
    hidden = transformer(make_ids(), CausalAttention(dropout=transformer.attention_dropout))
    assert hidden.dtype == dtype
    transformer.compute_logits(hidden).float().logsumexp(-1).sum().backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_autocast_computes_in_bf16_and_stays_close() -> None:
    transformer, ids = make_tiny(), make_ids()
    with torch.no_grad():
        expected = transformer(ids, CausalAttention())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = transformer(ids, CausalAttention())
        logits = transformer.compute_logits(hidden)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), expected, atol=0.05, rtol=0.05)
    logits.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in transformer.parameters())


def test_one_compiled_graph_serves_every_layer() -> None:
    config = TransformerConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_layers=12, num_heads=2, num_kv_heads=1, head_dim=8, dropout=0.0
    )
    transformer = build_transformer(config, torch.Generator().manual_seed(0)).eval()
    ids = make_ids() % 20
    expected = transformer(ids, CausalAttention())
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in transformer.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(transformer(ids, CausalAttention()), expected)
    torch.testing.assert_close(transformer(ids, CausalAttention()), expected)  # another object, the same graph
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 0), ("hidden_size", 64.0), ("vocab_size", True), ("num_kv_heads", 5), ("head_dim", 15), ("dropout", 1.0),
     ("dropout", -0.1), ("rope_theta", 0.0), ("norm_eps", float("nan")), ("init_std", "0.02")],
)  # fmt: skip
def test_impossible_sizes_are_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"(?s){field}.*allowed"):
        TransformerConfig(**{field: value})  # type: ignore[arg-type]
