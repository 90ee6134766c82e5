"""The Emu3 transformer: token ids in, hidden states out, logits on request.

Pre-norm decoder with RMSNorm, grouped-query attention, rotary positions and SwiGLU, without biases, untied head
(paper, table 3: 8,492,011,520 parameters at the defaults). Parameters carry the published state-dict names.

Who attends to whom is not decided here: `forward` takes an `Attention`, which sees rotated queries and keys.
The surprising thing: a new `Transformer` holds no memory (it lies on the meta device) until `init_weights` or
`weights.load_transformer` gives it values.

Shapes: B rows, S tokens of a row, D hidden size, H query heads, KV key/value heads, K head dim, F feed-forward, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openemu3.records import InputError


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network; the defaults are the published 8B model (paper, table 3).

    `dropout` acts at four places while training: attention probabilities, the residual after attention, the residual
    after the MLP, and the input embeddings. `max_positions` is the context trained for; nothing is allocated by it.
    """

    vocab_size: int = 184622
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    dropout: float = 0.1
    init_std: float = 0.02
    max_positions: int = 131072

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; a whole number of at least 1 is allowed")
        for name in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise InputError(f"{name} is {value!r}; a finite number above 0 is allowed")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}; 0 <= dropout < 1 is allowed")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads is {self.num_heads}; a multiple of num_kv_heads ({self.num_kv_heads}) is allowed")
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; an even number is allowed (rotary positions turn pairs)")


class Attention(Protocol):
    """How the tokens of a batch attend to each other. `layer_index` lets an implementation keep a cache per layer."""

    def __call__(self, layer_index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [B, H, S, K], keys and values [B, KV, S, K], queries and keys already rotated -> [B, H, S, K]."""
        ...


class Rotation(NamedTuple):
    """Cosine and sine of every position's rotary angles, fp32 [B, 1, S, K]; made once per forward pass.

    The first half of `sin` is negated, so that turning a head is two products and a sum.
    """

    cos: Tensor
    sin: Tensor


def build_rotation(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """Positions [B, S] (whole numbers from 0) -> the rotation of the rotate-half layout.

    Component i and component i + head_dim/2 form the pair that turns by position * theta**(-2i / head_dim).
    Angles are fp32 whatever the model's dtype: bf16 cannot tell position 257 from 258.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.to(torch.float32)[..., None] * (1.0 / theta**exponents)  # [B, S, K/2]
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)  # [B, 1, S, K/2]
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def apply_rotation(heads: Tensor, rotation: Rotation) -> Tensor:
    """Heads [B, H, S, K] turned by their positions; computed in fp32, returned in the dtype of `heads`."""
    other_half = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * rotation.cos + other_half * rotation.sin).to(heads.dtype)


class SelfAttention(nn.Module):
    """Projections around the attention argument: x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention, layer_index: int) -> Tensor:
        # Head counts are read off the projections' outputs, so that tensor parallelism may leave fewer heads here.
        queries = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, K]
        keys = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, KV, S, K]
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, KV, S, K]
        mixed = attention(layer_index, apply_rotation(queries, rotation), apply_rotation(keys, rotation), values)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


class FeedForward(nn.Module):
    """SwiGLU: x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. The unit of compilation, activation checkpointing and sharding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = FeedForward(config)
        # nn.RMSNorm computes in fp32 for bf16 input and multiplies by the weight before rounding.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Rotation, attention: Attention, layer_index: int) -> Tensor:
        # layer_index is an argument, not an attribute: one compiled graph then serves every layer.
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation, attention, layer_index))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Everything below the head; a module of its own because published names start with `model.`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_ids: Tensor, attention: Attention, rotation: Rotation) -> Tensor:
        x = self.dropout(self.embed_tokens(token_ids))  # [B, S, D]
        for layer_index, layer in enumerate(self.layers):
            x = layer(x, rotation, attention, layer_index)
        return self.norm(x)


class Transformer(nn.Module):
    """The language model. A new one lies on the meta device; `init_weights` or `load_transformer` fills it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = Decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, attention: Attention, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        token_ids [B, S], whole numbers in [0, vocab_size); positions [B, S] (or [1, S]), by default 0 .. S-1 in every row,
        which is wrong for left-padded and packed rows: hand in the positions of the attention object there.
        Returns [B, S, D] in the parameters' dtype.
        """
        if positions is None:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]  # [1, S]
        rotation = build_rotation(positions, self.config.head_dim, self.config.rope_theta)
        return self.model(token_ids, attention, rotation)

    def compute_logits(self, hidden: Tensor, vocab_slice: slice | None = None) -> Tensor:
        """Hidden [..., D] -> logits [..., V], or only the vocabulary rows of `vocab_slice` (a view of the head: no copy)."""
        if vocab_slice is None:
            return self.lm_head(hidden)
        return F.linear(hidden, self.lm_head.weight[vocab_slice])

    @property
    def attention_dropout(self) -> float:
        """What to hand an attention object as `dropout`: the configured probability in training mode, else 0."""
        return self.config.dropout if self.training else 0.0

    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices from N(0, init_std), norms at one. The generator's device is where they are made.

        Parameters still on the meta device get memory first. Values depend on the generator alone, not on global state.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            self.to_empty(device=generator.device)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                draw_parameter(name, parameter, self.config.init_std, generator)


def draw_parameter(name: str, parameter: Tensor, init_std: float, generator: torch.Generator) -> None:
    """The fresh value of one parameter, written in place; drawing all of them in the model's order gives `init_weights`."""
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, init_std, generator=generator)


def build_transformer(config: TransformerConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Transformer:
    """A transformer with fresh random weights of `dtype` on the generator's device."""
    transformer = Transformer(config).to(dtype)
    transformer.init_weights(generator)
    return transformer
