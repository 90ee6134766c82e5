"""How much arithmetic a training step is, and how much a device can do: what MFU (model FLOPs utilisation) is made of.

Counted is what the mathematics needs: products with weights, and attention among the tokens of one document that may see each other,
each once forward and twice backward (PaLM, arXiv 2204.02311, appendix B, but for its attention, which is counted there as if nothing
were masked). What is computed a second time for want of memory is not counted, nor is padding, nor the head where nothing is learnt.
"""

from __future__ import annotations

import time

import torch

from openemu3.model.transformer import TransformerConfig


def count_step_flops(config: TransformerConfig, num_tokens: float, num_targets: float, squared_lengths: float) -> float:
    """Floating-point operations of one training step, forward and backward; a multiplication and an addition are two.

    num_tokens: without padding. num_targets: tokens whose loss counts. squared_lengths: sum over documents of their length squared.
    """
    heads = config.num_heads * config.head_dim
    attention_weights = config.hidden_size * (2 * heads + 2 * config.num_kv_heads * config.head_dim)  # q, o and k, v
    layer_weights = attention_weights + 3 * config.hidden_size * config.intermediate_size
    products = 2 * config.num_layers * layer_weights * num_tokens + 2 * config.hidden_size * config.vocab_size * num_targets
    # Two products of 2 n^2 heads each, queries with keys and weights with values; a causal mask leaves half of either.
    attention = 2 * config.num_layers * heads * squared_lengths
    return 3.0 * (products + attention)


def measure_peak_flops(device: str, dtype: torch.dtype) -> float:
    """What square matrix products reach on this device in a second: no more than a stand-in for the number on its data sheet.

    On a GPU it is some 10 to 30 % below that number, so that MFU comes out higher; give the sheet's where you compare with others.
    """
    # On a CPU many short trials, of which one may have the core to itself.
    size, repeats, trials = (8192, 20, 3) if torch.device(device).type == "cuda" else (512, 1, 30)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(trials):  # the first warms up
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 * repeats / best


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
