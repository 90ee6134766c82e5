"""What parallelising does within one process, and what it refuses. With many ranks: tests/distributed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openemu3.distributed import ParallelConfig
from openemu3.model.attention import PackedAttention
from openemu3.model.parallelize import check_sizes, fill_weights, load_full_weights, parallelize
from openemu3.model.transformer import Transformer, TransformerConfig, build_transformer
from openemu3.records import InputError

CONFIG = TransformerConfig(
    vocab_size=90, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dropout=0.5, init_std=0.1
)
IDS = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 15 + [1] * 25, [0] * 40])


def run(config: ParallelConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """(hidden states, gradients, bytes that the backward pass needs kept)."""
    transformer = Transformer(CONFIG)
    parallelize(transformer, None, config)
    fill_weights(transformer, torch.Generator().manual_seed(0))
    transformer.train()
    torch.manual_seed(0)  # dropout is on: what is computed again must drop out the same
    attention = PackedAttention(DOCUMENTS, transformer.attention_dropout)
    weights, kept = {parameter.data_ptr() for parameter in transformer.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = transformer(IDS, attention, attention.positions)
    hidden.square().sum().backward()
    return hidden.detach(), {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_number(mode: str) -> None:
    hidden, gradients, _ = run(ParallelConfig())
    same_hidden, same_gradients, _ = run(ParallelConfig(activation_checkpointing=mode))
    assert torch.equal(hidden, same_hidden)
    assert len(gradients) == 20 and gradients.keys() == same_gradients.keys()  # all but the head
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


def test_whole_layers_computed_again_keep_little() -> None:
    kept = {mode: run(ParallelConfig(activation_checkpointing=mode))[2] for mode in ("none", "full")}
    assert kept["full"] < kept["none"] / 4


class Products(TorchDispatchMode):
    """How many matrix products there were."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_matrix_products_made_again() -> None:
    """Seven in each of two layers, and two more each for their gradients; then again all seven, or the second, fourth and sixth."""
    counts = {}
    for mode in ("none", "selective", "full"):
        with Products() as seen:
            run(ParallelConfig(activation_checkpointing=mode))  # type: ignore[arg-type]
        counts[mode] = seen.count
    assert counts == {"none": 42, "selective": 42 + 2 * 3, "full": 42 + 2 * 7}


def test_fresh_weights_are_those_of_build_transformer() -> None:
    built, filled = build_transformer(CONFIG, torch.Generator().manual_seed(3)), Transformer(CONFIG)
    parallelize(filled, None, ParallelConfig())
    fill_weights(filled, torch.Generator().manual_seed(3))
    for (name, one), other in zip(built.named_parameters(), filled.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_whole_weights_are_taken_and_others_refused() -> None:
    source, target = build_transformer(CONFIG, torch.Generator().manual_seed(3)), Transformer(CONFIG)
    tensors = {name: parameter.detach() for name, parameter in source.named_parameters()}
    load_full_weights(target, tensors, "cpu")
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in target.named_parameters())
    with pytest.raises(InputError, match="weights differ from the model in 1 names, 'lm_head.weight' among them"):
        load_full_weights(target, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(InputError, match=r"weight model.norm.weight has shape \(3,\); the model needs \(48,\)"):
        load_full_weights(target, tensors | {"model.norm.weight": torch.ones(3)})


@pytest.mark.parametrize(
    ("tp", "said"),
    [
        (3, r"tp is 3; a divisor of num_heads \(4\) is allowed"),
        (4, r"tp is 4; a divisor of num_kv_heads \(2\) is allowed"),
    ],
)
def test_sizes_that_tensor_parallelism_cannot_divide(tp: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_sizes(CONFIG, ParallelConfig(tp=tp))
