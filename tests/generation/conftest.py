"""Small random transformers and vocabularies for the tests of generation."""

from collections.abc import Callable

import pytest
import torch

from openemu3.model.transformer import Transformer, TransformerConfig, build_transformer
from openemu3.tokenization.sequence import Vocabulary


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """256 text ids, 211 specials, 64 codes."""
    return Vocabulary(num_text=256, num_codes=64)


@pytest.fixture(scope="session")
def make_transformer(vocabulary: Vocabulary) -> Callable[..., Transformer]:
    """A function (seed, **sizes) -> random transformer in eval mode; weights are large, so that predictions are far from uniform."""

    def make(seed: int, *, dtype: torch.dtype = torch.float32, num_heads: int = 4, num_kv_heads: int = 2, **sizes: int) -> Transformer:
        config = TransformerConfig(
            vocab_size=sizes.pop("vocab_size", vocabulary.size),
            hidden_size=sizes.pop("hidden_size", 32),
            intermediate_size=sizes.pop("intermediate_size", 64),
            num_layers=sizes.pop("num_layers", 2),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=8,
            init_std=0.3,
            max_positions=sizes.pop("max_positions", 1024),
        )
        assert not sizes
        return build_transformer(config, torch.Generator().manual_seed(seed), dtype).eval()

    return make
