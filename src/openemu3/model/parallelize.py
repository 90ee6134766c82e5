"""Makes one transformer out of many processes: tensor parallelism, activation checkpointing, compilation and sharding.

In: a Transformer, best on the meta device, and the mesh of `distributed.start_distributed`. Out: the same object, changed in place; it is
called as before and its parameters keep their names, but each process holds its part of them. Context parallelism changes no module: it
is an attention object (`context_parallel.py`), handed in with every batch.

The order is fixed, because each step wraps what the one before has made: tensor, (context), checkpointing, compile, FSDP.

The surprising thing: gradients are summed over the ranks of dp and cp, not averaged as torch does it, since losses here are sums.

Shapes: B rows, S tokens of a row on this rank's part of the context, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openemu3.distributed import ParallelConfig, limit_waiting
from openemu3.model.transformer import Transformer, TransformerConfig, draw_parameter
from openemu3.records import InputError


def parallelize(
    transformer: Transformer, mesh: DeviceMesh | None, config: ParallelConfig, compute_dtype: torch.dtype | None = None
) -> None:
    """Change the transformer in place, for this mesh or, where it is None, for a single process.

    On the meta device no rank ever holds the whole model; `fill_weights` or `load_full_weights` then gives it values. A transformer with
    values keeps them.

    compute_dtype: what weights are cast to for computing, e.g. bf16 with weights and optimizer in fp32, where they are sharded (a mesh is
    given); they then travel as such, too. Gradients are summed in fp32. None: as they are.
    Raises InputError for sizes that tp does not divide.
    """
    check_sizes(transformer.config, config)
    if mesh is not None and config.tp > 1:
        apply_tensor_parallelism(transformer, mesh["tp"])
    apply_activation_checkpointing(transformer, config.activation_checkpointing)
    if config.compile:
        apply_compile(transformer)
    if mesh is not None:
        sharding = build_sharding_mesh(mesh, config.replicate)
        apply_fsdp(transformer, sharding, compute_dtype)
        if config.tp > 1:
            limit_waiting(DeviceMesh._concatenate([sharding, mesh["tp"]])._flatten("all"))  # lets norms over all ranks be one collective


def check_sizes(model: TransformerConfig, config: ParallelConfig) -> None:
    """InputError where the mesh cannot divide the network."""
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(model, name) % config.tp:
            raise InputError(f"tp is {config.tp}; a divisor of {name} ({getattr(model, name)}) is allowed")


def apply_tensor_parallelism(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Every matrix in parts, one on each rank of `mesh` (1-D), and between them activations split by token (sequence parallelism).

    Inside attention and feed-forward a rank has all tokens and its share of the heads or channels; norms, residuals and dropout see its
    share of the tokens. The vocabulary is split, too: of the embedding and of the head, whose cross-entropy, too, is
    `training.objectives.compute_cross_entropy`. The hidden states handed out are whole on every rank.
    """
    outer = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "model": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(transformer, mesh, outer)
    # The output of a sharded embedding is a collective still under way. Handed to a compiled block as it is, its gradient is silently lost
    # (torch 2.13); a copy is an ordinary tensor. The decoder's output is a view of one, against which FSDP warns.
    for module in (transformer.model.embed_tokens, transformer.model):
        module.register_forward_hook(lambda module, inputs, output: output.clone())
    for layer in transformer.model.layers:
        inner = {
            "input_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_layouts=(Shard(1), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
            ),
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
            "post_attention_layernorm": SequenceParallel(),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(layer, mesh, inner)


def apply_activation_checkpointing(transformer: Transformer, mode: str) -> None:
    """Have the backward pass compute activations again instead of keeping them. mode: as in ParallelConfig.

    The layer's own `forward` is replaced instead of wrapping the layer in a module, so that parameters keep their names.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {} if mode == "full" else {"context_fn": _build_selective_contexts}
    for layer in transformer.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **options)


# Attention, by whichever kernel, is quadratic in the tokens; a reduce-scatter would be communication a second time.
_KEPT = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "_c10d_functional::reduce_scatter_tensor",
}


def _build_selective_contexts() -> Any:
    """Keep the results of attention and of every second matrix product; the cheap rest, and the other products, are made again."""
    num_products = {False: 0, True: 0}  # first time, second time

    def decide(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operator.name().split(".")[0]
        if name == "aten::mm":
            num_products[context.is_recompute] += 1
            keep = num_products[context.is_recompute] % 2 == 1
        else:
            keep = name in _KEPT
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


def apply_compile(transformer: Transformer) -> None:
    """Compile layer by layer: one compilation serves all, and torch 2.13 cannot compile a whole model with both TP and FSDP."""
    for layer in transformer.model.layers:
        layer.compile()


def build_sharding_mesh(mesh: DeviceMesh, replicate: int) -> DeviceMesh:
    """The ranks over which weights are sharded: dp x cp as one dimension, or for HSDP two, [replicate, the rest of dp x cp].

    The ranks of cp hold the same weights while computing, like those of dp, so they share in storing them.
    """
    if replicate == 1:
        return limit_waiting(mesh["dp", "cp"]._flatten("dp_cp"))
    split = mesh._unflatten("dp", (replicate, mesh["dp"].size() // replicate), ("replicate", "shard"))
    return limit_waiting(DeviceMesh._concatenate([split["replicate"], split["shard", "cp"]._flatten("shard_cp")]))


def apply_fsdp(transformer: Transformer, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """FSDP2: every rank keeps its share of weights, gradients and optimizer state; a layer's weights are gathered when it is computed.

    Embedding, last norm and head stay gathered from the forward pass to the end of the backward pass, since the loss reads the head.
    """
    # Inputs stay as they are: rotary angles are fp32, and casting them would cost precision.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = list(transformer.model.layers)
    for layer in layers:
        # The last layer is the first that the backward pass wants.
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=layer is not layers[-1])
    fully_shard(transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _list_sharded_modules(transformer):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_last_micro_batch(transformer: Transformer, is_last: bool) -> None:
    """Whether the backward pass to come ends a step. Before it, ranks may add up gradients by themselves, without communication.

    Costs the memory of unsharded gradients; without calling it, each micro-batch's gradients are summed over the ranks at once.
    """
    for module in _list_sharded_modules(transformer):
        module.set_requires_gradient_sync(is_last, recurse=False)


def reshard(transformer: Transformer) -> None:
    """Drop gathered weights. To be called where a forward pass is not followed by a backward pass, as after validation."""
    for module in _list_sharded_modules(transformer):
        module.reshard()


def _list_sharded_modules(transformer: Transformer) -> list[FSDPModule]:
    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]


def fill_weights(transformer: Transformer, generator: torch.Generator) -> None:
    """Fresh weights: on any mesh those that `build_transformer` draws in one process from the same generator.

    Every rank draws every matrix, one at a time, and keeps its part; nothing is communicated.
    """

    def draw(name: str, parameter: Tensor) -> Tensor:
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=generator.device)
        draw_parameter(name, full, transformer.config.init_std, generator)
        return full

    _fill(transformer, draw, generator.device)


def load_full_weights(transformer: Transformer, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> None:
    """Weights from whole tensors by published name; each rank copies its part of one after the other, so the mapping may read lazily.

    device: where the weights shall lie if they are on the meta device still; otherwise they stay where they are.
    Raises InputError for names and shapes that are not this model's.
    """
    expected = {name: parameter.shape for name, parameter in transformer.named_parameters()}
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        raise InputError(
            f"weights differ from the model in {len(wrong)} names, {wrong[0]!r} among them; weights of the same size are needed"
        )

    def read(name: str, parameter: Tensor) -> Tensor:
        if tensors[name].shape != parameter.shape:
            raise InputError(f"weight {name} has shape {tuple(tensors[name].shape)}; the model needs {tuple(parameter.shape)}")
        return tensors[name]

    _fill(transformer, read, device or next(transformer.parameters()).device)


@torch.no_grad()
def _fill(transformer: Transformer, make: Callable[[str, Tensor], Tensor], device: torch.device | str) -> None:
    reshard(transformer)
    if any(parameter.is_meta for parameter in transformer.parameters()):
        transformer.to_empty(device=device)
    for name, parameter in transformer.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(take_shard(make(name, parameter), parameter))


def take_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is laid out like `parameter`.

    Tensor parallelism cut first and FSDP cut its parts again, so the dimensions of the mesh are gone through from the last to the first.
    """
    if not isinstance(parameter, DTensor):
        return full
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None  # this rank is part of the mesh
    for axis in reversed(range(mesh.ndim)):
        placement = parameter.placements[axis]
        if placement.is_replicate():
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]  # of Shard and of FSDP's own kind of Shard
        parts = full.chunk(mesh.size(axis), dim)
        full = parts[coordinate[axis]] if coordinate[axis] < len(parts) else full.narrow(dim, 0, 0)
    return full
