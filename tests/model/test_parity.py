"""The network against transformers' Emu3, which we did not write: the same weights must give the same logits and tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import Transformer
from openemu3.model.weights import load_transformer

NUM_TEXT, NUM_CODES = 40, 64
EOL, VISUAL_OFFSET, IMAGE_PLACEHOLDER = NUM_TEXT + 203, NUM_TEXT + 211, NUM_TEXT + 3

SHAPES: list[dict[str, Any]] = [
    {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64},
    {"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "rms_norm_eps": 1e-3},
    {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 200},
    {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
]


@pytest.fixture(scope="module", params=range(len(SHAPES)))
def pair(request: pytest.FixtureRequest, build_oracle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(oracle, ours) with the same weights, handed over through files."""
    oracle = build_oracle(seed=request.param, **SHAPES[request.param])
    folder: Path = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(folder)
    return oracle, load_transformer(folder, dtype=torch.float32)


def draw_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, VISUAL_OFFSET + NUM_CODES, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(ids == IMAGE_PLACEHOLDER, 1)


def compute_logits(ours: Transformer, ids: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    attention = CausalAttention(padding)
    return ours.compute_logits(ours(ids, attention, attention.positions))


def continue_greedily(ours: Transformer, ids: torch.Tensor, padding: torch.Tensor, num_new: int) -> torch.Tensor:
    for _ in range(num_new):
        best = compute_logits(ours, ids, padding)[:, -1].argmax(-1, keepdim=True)
        ids, padding = torch.cat([ids, best], 1), torch.cat([padding, torch.zeros_like(best, dtype=torch.bool)], 1)
    return ids


@torch.no_grad()
def test_logits(pair: tuple[Any, Transformer]) -> None:
    oracle, ours = pair
    ids = draw_ids(2, 70)
    expected = oracle(input_ids=ids).logits
    assert expected.std() > 0.5  # or a bound of 1e-4 would mean little
    torch.testing.assert_close(compute_logits(ours, ids), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_with_left_padding(pair: tuple[Any, Transformer]) -> None:
    oracle, ours = pair
    ids, padding = draw_ids(3, 40), torch.zeros(3, 40, dtype=torch.bool)
    padding[1, :13] = padding[2, :39] = True
    positions = CausalAttention(padding).positions
    expected = oracle(input_ids=ids, attention_mask=(~padding).long(), position_ids=positions).logits
    torch.testing.assert_close(compute_logits(ours, ids, padding)[~padding], expected[~padding], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_continuation_of_a_left_padded_batch(pair: tuple[Any, Transformer]) -> None:
    oracle, ours = pair
    ids, padding = draw_ids(3, 20, seed=2), torch.zeros(3, 20, dtype=torch.bool)
    padding[0, :9] = padding[2, :15] = True
    ids[padding] = NUM_TEXT  # the padding token
    expected = oracle.generate(
        input_ids=ids, attention_mask=(~padding).long(), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=NUM_TEXT
    )
    assert expected.shape == (3, 44)
    assert len(set(expected[:, 20:].flatten().tolist())) > 10  # not one token again and again
    assert torch.equal(continue_greedily(ours, ids, padding, 24), expected)


@torch.no_grad()
def test_images_enter_as_visual_ids(pair: tuple[Any, Transformer]) -> None:
    """The oracle takes pixels and turns them into tokens inside; ours takes those tokens: id = offset + code, an EOL after each row."""
    oracle, ours = pair
    pixels = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = torch.tensor([[8, 12], [8, 12]])
    vision = oracle.model.vqmodel
    hidden = vision.encoder(pixels.unsqueeze(1).repeat(1, 4, 1, 1, 1)).transpose(1, 2)
    latents = vision.quant_conv(hidden)  # [2, 4 channels, 1, 4, 6]
    vision.quantize.embedding.weight[:48] = latents.movedim(1, -1).flatten(0, -2)  # a codebook that tells these pictures' cells apart
    codes = vision.encode(pixels, sizes).image_tokens  # 2 x [4, 6]
    with_eol = [torch.cat([image.long() + VISUAL_OFFSET, torch.full((4, 1), EOL)], dim=1).flatten() for image in codes]  # 4 rows of 6 + 1
    before, after = draw_ids(2, 25).split([5, 20], dim=1)
    mine = torch.cat([before, torch.stack(with_eol), after], dim=1)
    theirs = torch.cat([before, torch.full((2, 28), IMAGE_PLACEHOLDER), after], dim=1)
    assert len(set(mine[:, 5:33].flatten().tolist())) > 40
    expected = oracle(input_ids=theirs, pixel_values=pixels, image_sizes=sizes).logits
    torch.testing.assert_close(compute_logits(ours, mine), expected, atol=1e-4, rtol=0)
    without = oracle(input_ids=theirs).logits  # placeholders left as they are: the oracle did look at the pixels
    assert (without - expected).abs().max() > 0.1

    continued = oracle.generate(
        input_ids=theirs, pixel_values=pixels, image_sizes=sizes, attention_mask=torch.ones_like(theirs), max_new_tokens=12,
        do_sample=False, eos_token_id=None, pad_token_id=NUM_TEXT,
    )  # fmt: skip
    no_padding = torch.zeros_like(mine, dtype=torch.bool)
    assert torch.equal(continue_greedily(ours, mine, no_padding, 12)[:, mine.shape[1] :], continued[:, theirs.shape[1] :])
