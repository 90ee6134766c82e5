"""Two ranks of a real transformer, sharded and trained for one step. Not a test: test_planning.py starts it as a process.

    python planning_ranks.py OUTPUT '[[2, 1, 1, 2, "none"], [1, 1, 2, 2, "full"]]'

Takes cases [dp, cp, tp, key/value heads, checkpointing], all on the same two forked ranks (torch is imported once), and leaves
OUTPUT/RANK.json: for each case the bytes of weights, gradients and optimizer states, and those received, by the kind of collective.
"""

import json
import os
import socket
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from openemu3.distributed import ParallelConfig
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.parallelize import fill_weights, parallelize
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.training.objectives import compute_cross_entropy
from openemu3.training.optimizer import OptimizerConfig, build_optimizer, to_local

TOY = TransformerConfig(
    vocab_size=101, hidden_size=32, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, dropout=0.0
)  # fmt: skip
CONTEXT = 64


# What a rank receives of the tensor that comes out, where there are two.
SHARES = {"gather": 0.5, "reduce_scatter": 1.0, "all_reduce": 1.0, "all_to_all": 0.5}
OTHER_NAMES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


class ReceivedBytes(TorchDispatchMode):
    """Adds up what collectives bring from the other rank of two: kind -> bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(SHARES, 0)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.name().split("::")[1].split(".")[0]
        if function.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            name = OTHER_NAMES.get(name, name)
            (kind,) = [kind for kind in SHARES if kind in name]
            out = result if function.namespace == "_c10d_functional" else arguments[0]
            out = out[0] if isinstance(out, list) else out
            self.bytes[kind] += int(out.numel() * out.element_size() * SHARES[kind])
        return result


def count_bytes(tensors):
    return sum(to_local(tensor).numel() * to_local(tensor).element_size() for tensor in tensors)


def measure(sizes, num_kv_heads, checkpointing):
    toy = replace(TOY, num_kv_heads=num_kv_heads)
    mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=("dp", "cp", "tp"))
    config = ParallelConfig(*sizes, activation_checkpointing=checkpointing)
    transformer = Transformer(toy)
    parallelize(transformer, mesh, config, torch.bfloat16)
    fill_weights(transformer, torch.Generator().manual_seed(0))
    optimizer = build_optimizer(OptimizerConfig(), transformer)
    split = ContextSplit(toy, mesh)
    token_ids = torch.arange(CONTEXT)[None]
    received = ReceivedBytes()
    with received:
        attention = split.build_attention(token_ids // 16)  # documents end where pieces do: torch's CausalBias and modes do not mix
        hidden = transformer(split.split(token_ids), attention, attention.positions).flatten(0, 1)
        targets = split.split(token_ids).flatten()
        loss, _ = compute_cross_entropy(hidden, transformer.lm_head.weight, targets, torch.ones(len(targets)), 16)
        loss.backward()
    optimizer.step()
    parameters = list(transformer.parameters())
    return {
        "weights": count_bytes(parameters),
        "gradients": count_bytes(parameter.grad for parameter in parameters),
        "optimizer": count_bytes(state for parameter in parameters for state in optimizer.state[parameter].values() if state.ndim),
        "received": received.bytes,
    }


def run(rank, port, cases, output):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = [measure(case[:3], *case[3:]) for case in cases]
    dist.destroy_process_group()
    (output / f"{rank}.json").write_text(json.dumps(results))


def main():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()
    if not child:
        run(1, port, json.loads(sys.argv[2]), Path(sys.argv[1]))
        os._exit(0)
    run(0, port, json.loads(sys.argv[2]), Path(sys.argv[1]))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
