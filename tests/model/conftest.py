"""The oracle of these tests: transformers' Emu3, small, with random weights that leave no parameter at its default."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Emu3Config, Emu3ForConditionalGeneration

# A vocabulary in the published arrangement, only smaller: 40 text ids, 211 special ones, 64 codes.
NUM_TEXT, NUM_CODES = 40, 64
EOL, VISUAL_OFFSET = NUM_TEXT + 203, NUM_TEXT + 211
IMAGE_PLACEHOLDER = NUM_TEXT + 3


def randomize(module: nn.Module, seed: int) -> None:
    """Weights large enough for logits of a few units, norms and BatchNorm statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var") or ("norm" in name and name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() < 2:
                tensor.uniform_(-0.3, 0.3, generator=generator)
            elif "quantize" in name:
                tensor.normal_(0.0, 0.3, generator=generator)
            elif "embed" in name:
                tensor.normal_(0.0, 1.0, generator=generator)
            else:
                tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=generator)


@pytest.fixture(scope="session")
def build_oracle() -> Callable[..., Any]:
    """build_oracle(seed, **text_config) -> Emu3ForConditionalGeneration in evaluation mode, fp32."""

    def build(seed: int = 0, **text: Any) -> Any:
        vocabulary = {f"<|visual token {code:06d}|>": VISUAL_OFFSET + code for code in range(NUM_CODES)}
        vocabulary |= {"<image>": IMAGE_PLACEHOLDER, "<|extra_200|>": EOL}
        special = {"pad_token_id": NUM_TEXT, "bos_token_id": NUM_TEXT + 206, "eos_token_id": NUM_TEXT + 207}
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        text = {"vocab_size": VISUAL_OFFSET + NUM_CODES, "max_position_embeddings": 512} | special | sizes | text
        vision = {
            "codebook_size": NUM_CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 64,
        }
        oracle = Emu3ForConditionalGeneration(Emu3Config(vq_config=vision, text_config=text, vocabulary_map=vocabulary))
        randomize(oracle, seed)
        return oracle.eval()

    return build
