"""FLOPs worked by hand and counted by torch; a device's peak."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import TransformerConfig, build_transformer
from openemu3.training.throughput import count_step_flops, measure_peak_flops

CONFIG = TransformerConfig(
    vocab_size=50, hidden_size=8, intermediate_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, dropout=0.0
)


def test_worked_by_hand():
    """A layer: q 8 x 16, k and v 8 x 8 each, o 16 x 8, three of 8 x 16. Of 10 tokens, 10 x 10 / 2 pairs see each other."""
    weights = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 16
    attention = 2 * 2 * (10 * 10 / 2) * 16  # two products, two operations, of pairs and channels
    forward = 3 * (2 * weights * 10 + attention) + 2 * 8 * 50 * 7
    assert count_step_flops(CONFIG, num_tokens=10, num_targets=7, squared_lengths=100) == 3 * forward


def test_as_torch_counts_them():
    """Products with weights; torch's counter does not know the fused attention of a CPU, so that is counted as plain products, unmasked."""
    transformer = build_transformer(CONFIG, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        transformer.compute_logits(transformer(torch.arange(12)[None], CausalAttention())).sum().backward()
    assert counter.get_total_flops() == count_step_flops(CONFIG, 12, 12, 0)
    queries, keys, values = (torch.randn(4, 12, 4, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.bmm(queries, keys.transpose(1, 2)).softmax(-1), values).sum().backward()
    attention = count_step_flops(CONFIG, 0, 0, 12 * 12) / CONFIG.num_layers
    assert counter.get_total_flops() == 2 * attention  # half of the square is masked


def test_the_8b_model_needs_about_six_operations_a_parameter_and_token():
    config = TransformerConfig()
    per_token = count_step_flops(config, 5120, 5120, 5120**2) / 5120
    assert per_token == pytest.approx(6 * 7.736e9 + 6 * 32 * 4096 * 5120, rel=1e-3)  # all but the embedding; and attention


def test_a_device_can_do_something():
    assert 1e8 < measure_peak_flops("cpu", torch.float32) < 1e14
