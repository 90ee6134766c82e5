"""What a training run needs and how long it takes, before anybody pays for it: memory of every GPU, FLOPs, bytes sent, tokens/s, days.

In: sizes of a transformer, GPUs, a mesh dp x cp x tp, a context, and how states are kept. Out: a `Plan`, with the reason where it does not
fit, and what would. The surprising thing: nothing is allocated and nothing runs; weights, gradients and optimizer states are exact
all the same (they follow from the shapes and from how torch cuts them), activations follow from what autograd keeps, and the
throughput is only as good as the utilisation that is handed in. docs/planning.md has every formula with its source.

Letters: D hidden size, F feed-forward, Q = heads x head dim, KV = key/value heads x head dim, V vocabulary, L layers, S context.
Bytes are bytes; GiB are 2**30 of them, as GPUs are sold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from openemu3.distributed import ParallelConfig
from openemu3.model.transformer import TransformerConfig
from openemu3.records import InputError
from openemu3.training.lora import ATTENTION, FEED_FORWARD, LoraConfig
from openemu3.training.objectives import CHUNK, CPU_TILE, GPU_TILE, VOCABULARY_SLICE
from openemu3.training.optimizer import SLICE

GIB = 2**30

Checkpointing = Literal["none", "selective", "full"]
Precision = Literal["mixed", "bf16", "fp32"]
MATRICES = ATTENTION + FEED_FORWARD  # of a block, in the order of a forward pass
OUTSIDE_BLOCKS = ("embed_tokens", "norm", "lm_head")


@dataclass(frozen=True)
class PlanConfig:
    """A training run on paper.

    Args:
        gpu_memory: GiB of one GPU.
        headroom: share of it that stays free for the CUDA context, NCCL and what the allocator cannot reuse.
        context: tokens of a packed row.
        micro_batch: rows that one data-parallel rank computes at once; micro_batches of them make one update.
        document_length: tokens of a document in the rows; None: a document fills its row.
        precision: as of `LanguageLearnerConfig`: mixed keeps fp32 weights, gradients and optimizer states and computes in bf16; the others
            keep and compute in one format.
        lora: train adapters alone, always in fp32; frozen weights are bf16 with precision bf16, else fp32.
        utilisation: share of the GPUs' `peak_flops` (each) that model FLOPs reach, recomputation not counted.
    """

    transformer: TransformerConfig
    num_gpus: int = 1
    gpu_memory: float = 80.0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    context: int = 5120
    micro_batch: int = 1
    micro_batches: int = 1
    document_length: int | None = None
    precision: Precision = "mixed"
    lora: LoraConfig | None = None
    headroom: float = 0.08
    peak_flops: float = 989e12
    utilisation: float = 0.4
    token_budget: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_gpus", "context", "micro_batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; a whole number of at least 1 is allowed")
        for name in ("gpu_memory", "peak_flops"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; a number above 0 is allowed")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"utilisation is {self.utilisation}; above 0 and at most 1 is allowed")
        if not 0 <= self.headroom < 1:
            raise InputError(f"headroom is {self.headroom}; at least 0 and below 1 is allowed")
        if self.token_budget is not None and not 0 < self.token_budget < math.inf:
            raise InputError(f"token_budget is {self.token_budget}; a number above 0 is allowed")
        if self.document_length is not None and not 1 <= self.document_length <= self.context:
            raise InputError(f"document_length is {self.document_length}; 1 to the context, {self.context}, is allowed")
        self._check_mesh()

    def _check_mesh(self) -> None:
        model, mesh = self.transformer, self.parallel
        sizes = {"heads": model.num_heads, "key/value heads": model.num_kv_heads, "intermediate size": model.intermediate_size}
        for name, size in sizes.items():
            if size % mesh.tp:
                raise InputError(f"tp is {mesh.tp}; a divisor of the {name}, {size}, is allowed")
        if mesh.num_ranks != self.num_gpus:
            raise InputError(
                f"the mesh dp {mesh.dp} x cp {mesh.cp} x tp {mesh.tp} has {mesh.num_ranks} ranks; as many as GPUs, {self.num_gpus}, "
                "are allowed"
            )
        # Both cut rows into tokens; where context-parallel groups gather, each has a piece from the front and one from the back.
        pieces = mesh.cp * mesh.tp * (2 if self.gathering_groups > 1 else 1)
        if self.context % pieces:
            raise InputError(f"context is {self.context}; a multiple of {pieces} is allowed with cp {mesh.cp} and tp {mesh.tp}")
        if self.context > model.max_positions:
            raise InputError(f"context is {self.context}; at most the model's max_positions, {model.max_positions}, is allowed")
        if self.lora is not None and mesh.tp > 1:
            raise InputError(f"tp is {mesh.tp} with LoRA; LoRA is planned with tp 1")

    @property
    def checkpointing(self) -> Checkpointing:
        return self.parallel.activation_checkpointing

    @property
    def exchange_width(self) -> int:
        """Context-parallel ranks that swap heads for tokens: as many as there are key/value heads for; the rest gather."""
        return math.gcd(self.parallel.cp, self.transformer.num_kv_heads // self.parallel.tp)

    @property
    def gathering_groups(self) -> int:
        return self.parallel.cp // self.exchange_width

    @property
    def num_shards(self) -> int:
        """Ranks over which FSDP spreads weights and states: data-parallel and context-parallel ones alike."""
        return self.parallel.dp // self.parallel.replicate * self.parallel.cp

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one micro-batch whose hidden states lie on one rank (a tensor-parallel group counted as one)."""
        return self.micro_batch * self.context // self.parallel.cp

    @property
    def tokens_per_step(self) -> int:
        return self.parallel.dp * self.micro_batches * self.micro_batch * self.context

    @property
    def compute_bytes(self) -> int:
        """Of one number in a matrix product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def state_bytes(self) -> int:
        """Of one trained weight, gradient, or one of Adam's two moments."""
        return 2 if self.precision == "bf16" and self.lora is None else 4

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP is at work, and gathers weights in the format of products. A single process keeps them and casts them (autocast)."""
        return self.num_gpus > 1

    @property
    def is_autocast(self) -> bool:
        """Whether autocast makes bf16 copies of fp32 weights; the residual stream stays fp32 then."""
        return not self.is_sharded and self.precision == "mixed"

    @property
    def residual_bytes(self) -> int:
        """Of one number in the residual stream."""
        return 4 if self.is_autocast else self.compute_bytes


@dataclass(frozen=True)
class Parameters:
    """How many there are, and how many of them the fullest rank holds."""

    total: int
    trained: int
    total_per_gpu: int
    trained_per_gpu: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one token, a multiply-add counted as two. Attention is causal: half of the square.

    attention: of the documents given; attention_full: if one document filled the row. backward and recomputed are with `attention`.
    """

    matrices: float
    attention: float
    attention_full: float
    backward: float
    recomputed: float

    @property
    def forward(self) -> float:
        return self.matrices + self.attention

    @property
    def model(self) -> float:
        """Forward and backward, which utilisation is measured in."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU.

    moments: name of a moment in a step -> component -> bytes there. The peak is the fullest moment; usable is what a GPU has for us.
    """

    weights: int
    gradients: int
    optimizer: int
    moments: dict[str, dict[str, int]]
    usable: int

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.moments[self.peak_moment].values())


@dataclass(frozen=True)
class Plan:
    """What `build_plan` works out. communication: kind -> bytes that one GPU receives during one step.

    reason: one sentence, where it does not fit. alternatives: what to change so that it does, least change first.
    """

    config: PlanConfig
    parameters: Parameters
    flops: Flops
    memory: Memory
    communication: dict[str, int]
    tokens_per_second: float
    seconds_per_step: float
    days: float | None
    reason: str | None
    alternatives: tuple[str, ...]


def build_plan(config: PlanConfig) -> Plan:
    flops = count_flops(config)
    memory = count_memory(config)
    tokens_per_second = config.num_gpus * config.peak_flops * config.utilisation / flops.model
    reason: str | None = None
    alternatives: tuple[str, ...] = ()
    if memory.peak > memory.usable:
        reason = (
            f"one GPU would need {memory.peak / GIB:.1f} GiB ({memory.peak_moment}), "
            f"and of its {config.gpu_memory:g} GiB {memory.usable / GIB:.1f} are usable"
        )
        alternatives = tuple(suggest_alternatives(config))
    return Plan(
        config=config,
        parameters=count_parameters(config),
        flops=flops,
        memory=memory,
        communication=count_communication(config),
        tokens_per_second=tokens_per_second,
        seconds_per_step=config.tokens_per_step / tokens_per_second,
        days=None if config.token_budget is None else config.token_budget / tokens_per_second / 86400,
        reason=reason,
        alternatives=alternatives,
    )


# -------------------------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Weight:
    """One kind of parameter: rows x columns (a vector has one column), `count` times in the network.

    split: which of both tensor parallelism cuts; None: every tensor-parallel rank has all of it.
    """

    name: str
    rows: int
    columns: int
    split: Literal["rows", "columns"] | None
    count: int
    trained: bool = True

    @property
    def numel(self) -> int:
        """Of all of them."""
        return self.rows * self.columns * self.count

    def count_local(self, tp: int, num_shards: int) -> int:
        """Numbers of all of them on the fullest rank. torch cuts into chunks of ceil(size / ranks), and FSDP cuts rows."""
        rows = math.ceil(self.rows / tp) if self.split == "rows" else self.rows
        columns = math.ceil(self.columns / tp) if self.split == "columns" else self.columns
        return math.ceil(rows / num_shards) * columns * self.count


def list_weights(model: TransformerConfig, lora: LoraConfig | None = None) -> list[Weight]:
    """Every parameter of the network, LoRA's included, in the order of a forward pass."""
    hidden, num_layers, trained = model.hidden_size, model.num_layers, lora is None
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = [
        Weight("embed_tokens", model.vocab_size, hidden, "rows", 1, trained),
        Weight("q_proj", queries, hidden, "rows", num_layers, trained),
        Weight("k_proj", keys, hidden, "rows", num_layers, trained),
        Weight("v_proj", keys, hidden, "rows", num_layers, trained),
        Weight("o_proj", hidden, queries, "columns", num_layers, trained),
        Weight("gate_proj", model.intermediate_size, hidden, "rows", num_layers, trained),
        Weight("up_proj", model.intermediate_size, hidden, "rows", num_layers, trained),
        Weight("down_proj", hidden, model.intermediate_size, "columns", num_layers, trained),
        Weight("input_layernorm", hidden, 1, None, num_layers, trained),
        Weight("post_attention_layernorm", hidden, 1, None, num_layers, trained),
        Weight("norm", hidden, 1, None, 1, trained),
        Weight("lm_head", model.vocab_size, hidden, "rows", 1, trained),
    ]
    if lora is not None:
        for weight in [weight for weight in weights if weight.name in lora.targets]:
            weights.append(Weight(f"{weight.name}.lora_a", lora.rank, weight.columns, None, num_layers))
            weights.append(Weight(f"{weight.name}.lora_b", weight.rows, lora.rank, None, num_layers))
    return weights


def count_parameters(config: PlanConfig) -> Parameters:
    weights = list_weights(config.transformer, config.lora)
    local = {weight: weight.count_local(config.parallel.tp, config.num_shards) for weight in weights}
    return Parameters(
        total=sum(weight.numel for weight in weights),
        trained=sum(weight.numel for weight in weights if weight.trained),
        total_per_gpu=sum(local.values()),
        trained_per_gpu=sum(number for weight, number in local.items() if weight.trained),
    )


# ------------------------------------------------------------------------------------------------------------------------------- FLOPs


def count_flops(config: PlanConfig) -> Flops:
    """All tokens are taken to count in the loss: the head runs on those alone, so fewer targets are a little cheaper."""
    model = config.transformer
    weights = list_weights(model, config.lora)
    matrices = [weight for weight in weights if weight.columns > 1 and weight.name != "embed_tokens"]
    products = 2.0 * sum(weight.numel for weight in matrices)
    attention = count_attention_flops(model, config.document_length or config.context)
    # A matrix that is trained has two products in the backward pass (for its input and for itself), a frozen one has the first.
    backward = products + 2.0 * sum(weight.numel for weight in matrices if weight.trained) + 2 * attention
    in_blocks = {weight.name: 2.0 * weight.numel for weight in matrices if weight.name != "lm_head"}
    recomputed = 0.0
    if config.checkpointing == "full":
        recomputed = sum(in_blocks.values()) + attention
        if not model.dropout:  # torch stops as soon as it has what it wants, and nobody wants a block's output unless it was dropped out
            recomputed -= in_blocks["down_proj"]
    elif config.checkpointing == "selective":
        recomputed = sum(in_blocks[name] for name in REMADE_PRODUCTS)
    return Flops(products, attention, count_attention_flops(model, config.context), backward, recomputed)


def count_attention_flops(model: TransformerConfig, document_length: int) -> float:
    """Of all layers, forward, for one token of a document of that length: it sees (length + 1) / 2 keys on average.

    Two products, queries with keys and weights with values, each 2 x Q for every key.
    """
    return model.num_layers * 4.0 * model.num_heads * model.head_dim * (document_length + 1) / 2


# ------------------------------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Kept:
    """A tensor that autograd keeps in one block from forward to backward: bytes for one token of the rank.

    selective: selective checkpointing keeps it, too.
    """

    name: str
    bytes_per_token: float
    selective: bool = False


# Selective checkpointing keeps what attention and every other matrix product give, counted from the first in the order of a forward pass.
KEPT_PRODUCTS, REMADE_PRODUCTS = MATRICES[0::2], MATRICES[1::2]


def list_kept(config: PlanConfig, gpu: bool = True) -> list[Kept]:
    """What a block keeps without checkpointing.

    gpu: norms are one kernel, and so is attention within documents unless it drops out. Elsewhere norms keep a normalised copy, too, both
    in fp32; and attention gathers documents and puts its results back in order, and so keeps them twice.
    """
    model, tp, size = config.transformer, config.parallel.tp, config.compute_bytes
    hidden, feed_forward = model.hidden_size, model.intermediate_size // tp
    heads, queries, keys = model.num_heads // tp, model.num_heads * model.head_dim // tp, model.num_kv_heads * model.head_dim // tp
    # Sequence parallelism cuts the residual stream; what it feeds into the matrices is gathered again.
    norm = hidden / tp * (config.residual_bytes if gpu else 8 if config.lora is None else 4) + 4 / tp
    # Autocast rounds an input anew for every matrix that reads it, and so does peft for every adapter; a frozen matrix keeps no input.
    targets = MATRICES if config.lora is None else config.lora.targets
    num_reading = sum(name in targets for name in ("q_proj", "k_proj", "v_proj"))
    num_reading_second = sum(name in targets for name in ("gate_proj", "up_proj"))
    if not config.is_autocast and (config.lora is None or config.precision == "fp32"):
        num_reading, num_reading_second = min(num_reading, 1), min(num_reading_second, 1)
    fed = 4 if config.lora is not None and not config.is_autocast else size  # bytes of a number that an adapted, or a trained, matrix reads
    is_copied = not gpu or model.dropout > 0 or config.parallel.cp > 1 or fed != size
    kept = [
        Kept("input, for its norm", norm),
        Kept("normalised", hidden * fed * num_reading),
        Kept("queries", queries * size, selective=True),
        Kept("keys", keys * size * config.gathering_groups),
        Kept("values", keys * size * config.gathering_groups, selective=True),
        Kept("attended", queries * size + 4 * heads, selective=True),  # and the softmax's normaliser, fp32
        Kept("attended, for the output", queries * fed if "o_proj" in targets and is_copied else 0),
        Kept("input of the feed-forward, for its norm", norm),
        Kept("normalised for the feed-forward", hidden * fed * num_reading_second),
        Kept("gate", feed_forward * size, selective=True),
        Kept("up", feed_forward * size),
        Kept("silu(gate)", feed_forward * size),
        Kept("silu(gate) x up", feed_forward * fed if "down_proj" in targets else 0),
        Kept("dropout masks", 2 * hidden / tp if model.dropout else 0),
    ]
    if config.lora is not None:
        kept.append(Kept("between LoRA's two", len(targets) * config.lora.rank * fed))
    return kept


def count_block_activations(config: PlanConfig, gpu: bool = True) -> tuple[float, float]:
    """Bytes of one block for one token of the rank: (kept until the backward pass, made again there)."""
    kept = list_kept(config, gpu)
    everything = sum(tensor.bytes_per_token for tensor in kept)
    if config.checkpointing == "none":
        return everything, 0.0
    entry = config.transformer.hidden_size / config.parallel.tp * config.residual_bytes
    if config.checkpointing == "full":
        return entry, everything
    # Of the queries it is those before their rotation: as large, and rotated again.
    selected = sum(tensor.bytes_per_token for tensor in kept if tensor.selective)
    # The seventh product, of down_proj, is kept though nobody needs it; and so is what tensor parallelism scattered.
    output = config.transformer.hidden_size * config.compute_bytes
    scattered = 2 * output / config.parallel.tp if config.parallel.tp > 1 else 0
    return entry + selected + output + scattered, everything - selected


def count_activations(config: PlanConfig, gpu: bool = True) -> int:
    """Bytes kept from forward to backward by all blocks, the last norm and the rotary tables of one micro-batch."""
    model, tokens = config.transformer, config.tokens_per_rank
    kept, _ = count_block_activations(config, gpu)
    last_norm = model.hidden_size / config.parallel.tp * (config.residual_bytes if gpu else 8) + 4 / config.parallel.tp
    positions = 2 * 4 * model.head_dim + 8  # cosine, sine and the token's id
    mask = model.hidden_size / config.parallel.tp if model.dropout else 0  # of the embeddings
    return round(tokens * (model.num_layers * kept + last_norm + positions + mask))


# ------------------------------------------------------------------------------------------------------------------------------ memory


def count_memory(config: PlanConfig, gpu: bool = True) -> Memory:
    """Weights, gradients and optimizer states are exact; the rest is what lives at the moments at which a step can be fullest."""
    parameters = count_parameters(config)
    frozen = parameters.total_per_gpu - parameters.trained_per_gpu
    states = {
        "weights": parameters.trained_per_gpu * config.state_bytes + frozen * (2 if config.precision == "bf16" else 4),
        "optimizer": 2 * parameters.trained_per_gpu * config.state_bytes,
    }
    gradients = parameters.trained_per_gpu * config.state_bytes
    model, tokens, size = config.transformer, config.tokens_per_rank, config.compute_bytes
    block, head = count_group(config, "block"), count_group(config, "lm_head")
    # Autocast's copies live as long as its context, the forward pass; afterwards those that autograd keeps, or of a block made again.
    copies = 2 * block * model.num_layers if config.is_autocast else 0
    copies_kept = copies if config.checkpointing == "none" else copies // model.num_layers
    activations = count_activations(config, gpu)
    kept, again = count_block_activations(config, gpu)
    feed_forward = model.intermediate_size // config.parallel.tp
    in_backward = {
        "made again": round(tokens * again),
        "gradients of activations": round(tokens * (feed_forward * size + 2 * model.hidden_size * config.residual_bytes)),
    }
    # FSDP keeps embedding, norm and head gathered from the forward pass to the end of the backward pass, with their gradients whole, and
    # beside them a block and the one it fetches ahead. Gradients are summed in fp32, from a buffer of their own.
    root, is_trained = count_group(config, "root"), config.lora is None
    gathered = (root + 2 * block) * size if config.is_sharded else 0
    reduced = block * (size + 4) if config.is_sharded and is_trained else 0
    reduced_at_end = root * (size + 4) if config.is_sharded and is_trained else 0
    head_gradient = head * (size if config.is_sharded else config.state_bytes) if is_trained else 0
    earlier = 0  # gradients of the micro-batches before this one
    if config.micro_batches > 1:
        whole = sum(weight.count_local(config.parallel.tp, 1) for weight in list_weights(model, config.lora) if weight.trained)
        earlier = 4 * whole if config.is_sharded else gradients  # summed over ranks after the last one, and whole until then
        reduced_at_end += 4 * root if config.is_sharded and is_trained else 0
    moments = {
        "at the end of the forward pass": {
            **states,
            "bf16 copies of weights": copies,
            "gradients": earlier,
            "activations": activations,
            "communication buffers": gathered,
        },
        "at the loss": {
            **states,
            "bf16 copies of weights": copies_kept,
            "gradients": earlier,
            "activations": activations,
            "loss": count_loss_bytes(config, gpu),
            "communication buffers": gathered,
        },
        "in the last block's backward pass": {
            **states,
            "bf16 copies of weights": copies_kept,
            "gradients": earlier + head_gradient,
            "activations": activations,
            **in_backward,
            "communication buffers": gathered + reduced,
        },
        "at the end of the backward pass": {
            **states,
            "gradients": gradients,
            "activations": round(tokens * kept),
            **in_backward,
            "communication buffers": max(
                gathered + head_gradient * config.is_sharded + reduced, root * size * config.is_sharded + reduced_at_end
            ),
        },
        "at the update": {**states, "gradients": gradients, "update in fp32": count_update_bytes(config)},
    }
    usable = int(config.gpu_memory * GIB * (1 - config.headroom))
    return Memory(states["weights"], gradients, states["optimizer"], moments, usable)


def count_group(config: PlanConfig, name: str) -> int:
    """Numbers that FSDP gathers at once, of one block or of the root (all that is outside of blocks), or of one weight by its name."""
    weights = list_weights(config.transformer, config.lora)
    if name in ("block", "root"):
        chosen = [weight for weight in weights if (weight.name in OUTSIDE_BLOCKS) == (name == "root")]
    else:
        chosen = [weight for weight in weights if weight.name == name]
    return sum(weight.count_local(config.parallel.tp, 1) // weight.count for weight in chosen)


def count_update_bytes(config: PlanConfig) -> int:
    """Of the optimizer, while it updates. bf16 states it updates slice by slice in fp32: six numbers for each, noise, and their sum."""
    if config.state_bytes == 4:
        return 0  # one kernel, in place
    weights = [weight for weight in list_weights(config.transformer, config.lora) if weight.trained]
    largest = max(weight.count_local(config.parallel.tp, config.num_shards) // weight.count for weight in weights)
    return 30 * min(largest, SLICE)


def count_loss_bytes(config: PlanConfig, gpu: bool) -> int:
    """What `compute_cross_entropy` holds at most: hidden states and their gradient, the head's gradient, and logits of a chunk."""
    model, size = config.transformer, config.compute_bytes
    vocabulary = math.ceil(model.vocab_size / config.parallel.tp)
    head, chunk = vocabulary * model.hidden_size, vocabulary * min(CHUNK, config.tokens_per_rank)
    hidden = config.tokens_per_rank * model.hidden_size * (config.residual_bytes + 2 * size)
    # Logits, and of some of them an fp32 copy; later their gradient in their place, and a slice of the head's.
    tile = 4 * min(chunk, max(vocabulary, GPU_TILE if gpu else CPU_TILE))
    if config.lora is not None:
        return hidden + size * chunk + tile
    product = min(vocabulary, VOCABULARY_SLICE) * model.hidden_size * size
    copies = size * head if config.is_autocast else 0
    return hidden + copies + 4 * head + size * chunk + max(tile, product)


# ----------------------------------------------------------------------------------------------------------------------- communication


def count_communication(config: PlanConfig) -> dict[str, int]:
    """Kind -> bytes that one GPU receives during one step, with algorithms that send nothing twice (rings)."""
    model, size, tokens, shards, replicas = (
        config.transformer, config.compute_bytes, config.tokens_per_rank, config.num_shards, config.parallel.replicate,
    )  # fmt: skip
    tp_share, other_shards = (config.parallel.tp - 1) / config.parallel.tp, shards - 1
    local = {weight: weight.count_local(config.parallel.tp, shards) for weight in list_weights(model, config.lora)}
    trained = sum(number for weight, number in local.items() if weight.trained)
    # Blocks are gathered for either pass, but the last one only once, and so is what lies outside of blocks.
    in_blocks = sum(number for weight, number in local.items() if weight.name not in OUTSIDE_BLOCKS)
    num_gathered = sum(local.values()) + in_blocks * (1 - 1 / model.num_layers)
    # Every block gathers tokens twice and scatters them twice, forward and backward. What is computed again is gathered again, and
    # scattered again if that was not kept and something reads it. Embedding and last norm do so once. The loss sums a gradient, which
    # costs as much as both.
    exchanges = {"none": 8, "selective": 10, "full": 11 + (model.dropout > 0)}[config.checkpointing]
    activations = (model.num_layers * exchanges + 5) * tokens * model.hidden_size * size * tp_share
    small = 2 * tp_share * (3 * 4 * tokens + (2 * model.num_layers + 1) * model.hidden_size * size)  # loss terms, gradients of norms
    attends = model.num_layers * (3 if config.checkpointing == "full" else 2)
    queries, keys = (tokens * heads * model.head_dim // config.parallel.tp * size for heads in (model.num_heads, model.num_kv_heads))
    exchanged = attends * (2 * queries + 2 * keys) * (config.exchange_width - 1) / config.exchange_width
    kinds = {
        "weights, gathered by FSDP": config.micro_batches * other_shards * num_gathered * size,
        "gradients, reduced by FSDP": other_shards * trained * 4,
        "gradients, summed over replicas": 2 * (replicas - 1) / replicas * trained * 4,
        "activations, by tensor parallelism": config.micro_batches * (activations + small),
        "heads for tokens, by context parallelism": config.micro_batches * exchanged,
        "keys and values, by context parallelism": config.micro_batches * attends * 2 * keys * (config.gathering_groups - 1),
    }
    return {kind: round(number) for kind, number in kinds.items() if number}


# ------------------------------------------------------------------------------------------------------------------------ alternatives


MOST_GPUS = 1024


def suggest_alternatives(config: PlanConfig) -> list[str]:
    """What to change so that it fits, the kinds of change that alter least; one sentence that says so where nothing does."""
    for changes in (list_small_changes(config), list_large_changes(config)):
        fitting = [words for words, changed in changes if fits(changed)]
        if fitting:
            return fitting
    return [f"nothing tried, up to full checkpointing, one row at a time and {MOST_GPUS:,} GPUs: it needs GPUs with more memory"]


def fits(config: PlanConfig) -> bool:
    memory = count_memory(config)
    return memory.peak <= memory.usable


def list_small_changes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """(words, changed configuration): on the same mesh, with the same numbers coming out."""
    modes: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for mode in modes[modes.index(config.checkpointing) + 1 :]:
        yield f"{mode} checkpointing", replace(config, parallel=replace(config.parallel, activation_checkpointing=mode))
    if config.micro_batch > 1:
        by_row = replace(config, micro_batch=1, micro_batches=config.micro_batches * config.micro_batch)
        yield f"{by_row.micro_batches} micro-batches of 1 row", by_row


def list_large_changes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """(words, changed configuration): all that saves memory at once, and then another mesh, bf16 states, more GPUs, or LoRA."""
    lean = make_lean(config)
    rows = f"{lean.micro_batch} row{'s' if lean.micro_batch > 1 else ''} at a time"
    words = f"full checkpointing with {rows}"
    yield words, lean
    other_mesh = next((mesh for mesh in list_meshes(lean, config.num_gpus) if fits(mesh)), None)
    if other_mesh is not None:
        yield f"{words} and {describe_mesh(other_mesh)}", other_mesh
    if config.state_bytes == 4 and config.lora is None:
        yield f"{words} and bf16 states", replace(lean, precision="bf16")
    sizes = (config.num_gpus << power for power in range(1, MOST_GPUS.bit_length()) if config.num_gpus << power <= MOST_GPUS)
    more_gpus = next((mesh for size in sizes for mesh in list_meshes(lean, size) if fits(mesh)), None)
    if more_gpus is not None:
        yield f"{words} and {more_gpus.num_gpus} GPUs, {describe_mesh(more_gpus)}", more_gpus
    if config.lora is None:
        alone = replace(lean.parallel, dp=config.num_gpus, cp=1, tp=1)
        yield (
            f"{words}, LoRA of rank {LoraConfig().rank} and bf16 weights",
            replace(lean, parallel=alone, lora=LoraConfig(), precision="bf16"),
        )


def make_lean(config: PlanConfig) -> PlanConfig:
    """The same update in the least memory on this mesh: one row at a time or, where that costs more for gradients, all rows at once."""
    parallel = replace(config.parallel, activation_checkpointing="full", replicate=1)
    num_rows = config.micro_batches * config.micro_batch
    ways = [replace(config, parallel=parallel, micro_batch=size, micro_batches=num_rows // size) for size in (1, num_rows)]
    return min(ways, key=lambda plan: count_memory(plan).peak)


def list_meshes(config: PlanConfig, num_gpus: int) -> list[PlanConfig]:
    """Every mesh of so many GPUs that the model and the context allow, the least tensor and context parallelism first."""
    meshes = []
    for tp in list_divisors(num_gpus):
        for cp in list_divisors(num_gpus // tp):
            try:
                parallel = replace(config.parallel, dp=num_gpus // tp // cp, cp=cp, tp=tp)
                meshes.append(replace(config, num_gpus=num_gpus, parallel=parallel))
            except InputError:  # heads, context: this mesh is not possible
                continue
    return sorted(meshes, key=lambda mesh: (mesh.parallel.tp * mesh.parallel.cp, mesh.parallel.cp))


def list_divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def describe_mesh(config: PlanConfig) -> str:
    return f"dp {config.parallel.dp} x cp {config.parallel.cp} x tp {config.parallel.tp}"
