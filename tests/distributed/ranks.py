"""Small trainings on many ranks, and the same on one. Not a test: the tests start it as a process.

    python ranks.py OUTPUT equal CASE ...     each case of CASES on its ranks and on one: CASE.json and CASE.safetensors, and single-...
    python ranks.py OUTPUT pieces             a checkpoint written by 4 ranks, read by 1 and by 2; the loss of a head in 2 parts
    python ranks.py OUTPUT lost               one of 3 ranks is killed in the middle of a training; then one of dp2 x tp2 stands still

Ranks are forked children, so that torch is imported once. Prints the exit codes of all ranks as JSON.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openemu3.data.packing import TokenBatch
from openemu3.distributed import ParallelConfig, data_rank, distributed_run, is_first, sum_over
from openemu3.model.attention import PackedAttention
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.parallelize import fill_weights, parallelize, set_last_micro_batch
from openemu3.model.transformer import Transformer, TransformerConfig
from openemu3.records import Document, Image, Text, Video
from openemu3.tokenization.sequence import Encoded, SequenceFormat, Vocabulary
from openemu3.tokenization.text import TextTokenizer, train_text_tokenizer
from openemu3.training.checkpoint import (
    add_prefix,
    list_optimizer_tensors,
    load_into,
    load_optimizer_tensors,
    name_parameters,
    save_checkpoint,
    take_prefix,
)
from openemu3.training.objectives import compute_cross_entropy
from openemu3.training.optimizer import OptimizerConfig, build_optimizer

NUM_TOKENS, ROWS_PER_STEP, NUM_STEPS = 128, 4, 5
TIMEOUT = 300.0  # a busy machine is no failure
# An odd vocabulary of 575 ids: no number of ranks divides it, as 8 does not divide the published one.
MODEL = TransformerConfig(
    vocab_size=Vocabulary(300, 64).size, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8,
    rope_theta=10_000.0, dropout=0.0, init_std=0.1, max_positions=NUM_TOKENS,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    parallel: ParallelConfig
    num_kv_heads: int = 4
    micro_batches: int = 1  # per rank


CASES = {
    "dp2": Case(ParallelConfig(dp=2), micro_batches=2),
    "tp2": Case(ParallelConfig(tp=2)),
    "cp2": Case(ParallelConfig(cp=2)),
    "cp2_gathered": Case(ParallelConfig(cp=2), num_kv_heads=1),
    "tp2_full": Case(ParallelConfig(tp=2, activation_checkpointing="full")),
    "cp2_selective": Case(ParallelConfig(cp=2, activation_checkpointing="selective")),
    "tp2_compiled": Case(ParallelConfig(tp=2, activation_checkpointing="selective", compile=True)),
    "dp2_tp2": Case(ParallelConfig(dp=2, tp=2), micro_batches=2),
    "dp2_cp2": Case(ParallelConfig(dp=2, cp=2)),
    "cp2_tp2": Case(ParallelConfig(cp=2, tp=2)),
    "cp4_mixed": Case(ParallelConfig(cp=4), num_kv_heads=2),  # two groups that gather, of two ranks each that exchange
    "dp4_replicate2": Case(ParallelConfig(dp=4, replicate=2)),
    "dp2_cp2_tp2": Case(ParallelConfig(dp=2, cp=2, tp=2), micro_batches=2),
    "cp4_tp2_mixed": Case(ParallelConfig(cp=4, tp=2)),  # two key/value heads are left to each rank of tp
    "dp4_tp2_replicate2": Case(ParallelConfig(dp=4, tp=2, replicate=2, activation_checkpointing="selective")),
}


@lru_cache
def build_format() -> SequenceFormat:
    texts = ["a red apple on a table", "the smiling cat", "ein Haus am See", "一个红苹果"] * 3
    return SequenceFormat(TextTokenizer.from_bytes(train_text_tokenizer(texts, 300)), Vocabulary(300, 64))


def make_documents(form: SequenceFormat, random: np.random.Generator) -> list[Encoded]:
    """Text, drawings, descriptions and films, of 6 to about 100 tokens."""
    documents = []
    for number in range(40):
        words = " ".join(random.choice(["red", "apple", "cat", "Haus", "See", "一个", "苹果"], random.integers(1, 9)))
        codes = random.integers(0, 64, (random.integers(1, 4), random.integers(2, 5), random.integers(2, 6)))
        parts = [
            (Text(words, target=True),),
            (Text(words), Image(codes[0])),
            (Image(codes[0]), Text(words, target=True)),
            (Text(words), Video(codes, 8.0)),
        ][number % 4]
        documents.append(form.encode(Document(parts)))
    return documents


def make_rows(seed: int, num_rows: int) -> TokenBatch:
    """Rows packed as documents come, the rest of each padding."""
    form, random = build_format(), np.random.default_rng(seed)
    token_ids = torch.full((num_rows, NUM_TOKENS), form.vocabulary.pad)
    roles, documents = torch.zeros(num_rows, NUM_TOKENS, dtype=torch.uint8), torch.zeros(num_rows, NUM_TOKENS, dtype=torch.int32)
    for row in range(num_rows):
        start = number = 0
        for document in make_documents(form, random):
            end = start + len(document.token_ids)
            if end > NUM_TOKENS:
                continue
            token_ids[row, start:end], roles[row, start:end] = torch.from_numpy(document.token_ids), torch.from_numpy(document.roles)
            documents[row, start:end] = number
            start, number = end, number + 1
        documents[row, start:] = number
    return TokenBatch(token_ids, roles, documents, tuple(() for _ in range(num_rows)))


def train(mesh: DeviceMesh | None, case: Case) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Five steps: ({"loss", "grad_norm"} of each, gradients of the first)."""
    config = replace(MODEL, num_kv_heads=case.num_kv_heads)
    transformer = Transformer(config)
    parallelize(transformer, mesh, case.parallel if mesh else ParallelConfig())
    fill_weights(transformer, torch.Generator().manual_seed(0))
    context = ContextSplit(config, mesh)
    optimizer_config = OptimizerConfig(3e-3, NUM_STEPS, 0, schedule="constant", max_grad_norm=1.0)
    optimizer = build_optimizer(optimizer_config, transformer)
    role_weights = torch.tensor([0, 1, 1, 0.5, 1])
    history: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    first_gradients: dict[str, torch.Tensor] = {}
    rank, num_parts = data_rank(mesh)
    micro_batches = case.micro_batches if mesh else 1
    for step in range(NUM_STEPS):
        rows = make_rows(step, ROWS_PER_STEP)
        sums = torch.zeros(2, dtype=torch.float64)
        mine = torch.arange(ROWS_PER_STEP)[rank::num_parts].chunk(micro_batches)
        for number, chosen in enumerate(mine):
            ids, roles, documents = rows.token_ids[chosen], rows.roles[chosen], rows.documents[chosen]
            weights = role_weights[roles.long()].roll(-1, 1) * (documents.roll(-1, 1) == documents)
            weights[:, -1] = 0
            attention = context.build_attention(documents)
            set_last_micro_batch(transformer, number == len(mine) - 1)
            hidden = transformer(context.split(ids), attention, attention.positions)
            targets, weights = context.split(ids.roll(-1, 1)).flatten(), context.split(weights).flatten()
            kept = weights.nonzero().flatten()
            loss, losses = compute_cross_entropy(hidden.flatten(0, 1)[kept], transformer.lm_head.weight, targets[kept], weights[kept], 32)
            loss.backward()
            sums += torch.stack(((losses * weights[kept]).sum(), weights.sum())).double()
        loss, weight = sum_over(mesh, sums).tolist()
        for parameter in transformer.parameters():
            parameter.grad /= weight
        if step == 0:
            first_gradients = {name: whole(parameter.grad).clone() for name, parameter in transformer.named_parameters()}
        norm = whole(nn.utils.clip_grad_norm_(transformer.parameters(), optimizer_config.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        history["loss"].append(loss / weight)
        history["grad_norm"].append(norm.item())
    return history, first_gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare_with_one(output: Path, names: list[str]) -> list[int]:
    """Leaves NAME.json {"loss": [...], "grad_norm": [...]} and NAME.safetensors (the first step's gradients), and so for one process."""

    def train_case(name: str) -> None:
        case = CASES[name]
        with distributed_run(replace(case.parallel, timeout_seconds=TIMEOUT)) as mesh:
            result = train(mesh, case)
            if is_first(mesh):
                save(name, *result)

    def save(stem: str, history: dict[str, list[float]], gradients: dict[str, torch.Tensor]) -> None:
        save_file({key: value.contiguous() for key, value in gradients.items()}, output / f"{stem}.safetensors")
        (output / f"{stem}.json").write_text(json.dumps(history))

    def train_alone(num_kv_heads: int) -> None:
        save(f"single-kv{num_kv_heads}", *train(None, Case(ParallelConfig(), num_kv_heads)))

    kinds = {CASES[name].num_kv_heads for name in names}
    codes = run_ranks(1, [partial(train_alone, num_kv_heads) for num_kv_heads in kinds])
    for name in names:  # each in processes of its own: DTensor remembers meshes, with the names that their groups had in the run before
        codes += run_ranks(CASES[name].parallel.num_ranks, [partial(train_case, name)])
    return codes


def write_and_read_checkpoint(output: Path) -> list[int]:
    """dp2 x tp2 trains, saves, and leaves whole copies of what it saved; one process and tp2 read it and compare bit for bit."""

    def list_tensors(transformer: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        names = name_parameters(transformer)
        return add_prefix("transformer", transformer.state_dict()) | add_prefix("optimizer", list_optimizer_tensors(optimizer, names))

    def write() -> None:
        with distributed_run(ParallelConfig(dp=2, tp=2, timeout_seconds=TIMEOUT)) as mesh:
            transformer, optimizer = build(mesh, ParallelConfig(dp=2, tp=2), seed=0)
            for parameter in transformer.parameters():
                parameter.grad = parameter.detach().clone()  # any gradient gives the optimizer a state worth keeping
            optimizer.step()
            tensors = list_tensors(transformer, optimizer)
            save_checkpoint(output / "checkpoints", 7, tensors, {"step": 7}, group=dist.new_group(backend="gloo"))
            copies = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
            if is_first(mesh):
                save_file(copies, output / "copies.safetensors")

    def read(parallel: ParallelConfig) -> None:
        with distributed_run(replace(parallel, timeout_seconds=TIMEOUT)) as mesh:
            transformer, optimizer = build(mesh, parallel, seed=1)
            tensors = list_tensors(transformer, optimizer)
            group = dist.new_group(backend="gloo") if mesh else None
            assert load_into(output / "checkpoints" / "step-00000007", tensors, group) == {"step": 7}
            transformer.load_state_dict(take_prefix("transformer", tensors))
            load_optimizer_tensors(optimizer, name_parameters(transformer), take_prefix("optimizer", tensors))
            expected = load_file(output / "copies.safetensors")
            found = list_tensors(transformer, optimizer)
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.equal(whole(tensor), expected[name]), name

    return run_ranks(4, [write]) + run_ranks(1, [partial(read, ParallelConfig())]) + run_ranks(2, [partial(read, ParallelConfig(tp=2))])


def build(mesh: DeviceMesh | None, parallel: ParallelConfig, seed: int) -> tuple[Transformer, torch.optim.Optimizer]:
    transformer = Transformer(MODEL)
    parallelize(transformer, mesh, parallel)
    fill_weights(transformer, torch.Generator().manual_seed(seed))
    return transformer, build_optimizer(OptimizerConfig(1e-3, 10, 0), transformer)


class Largest(TorchDispatchMode):
    """The most elements that any result has had."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def compare_cross_entropy() -> list[int]:
    """37 ids by two ranks: 19 and 18. torch's own cross-entropy is the oracle."""

    def compare() -> None:
        with distributed_run(ParallelConfig(tp=2, timeout_seconds=TIMEOUT)) as mesh:
            assert mesh is not None
            for num_tokens, chunk, scale in ((23, 4, 1.0), (23, 64, 1.0), (0, 4, 1.0), (23, 4, 1000.0)):
                generator = torch.Generator().manual_seed(0)
                hidden = (torch.randn(num_tokens, 8, generator=generator) * scale).requires_grad_()
                head = torch.randn(37, 8, generator=generator).requires_grad_()
                targets, weights = torch.randint(37, (num_tokens,), generator=generator), torch.rand(num_tokens, generator=generator)
                expected_losses = F.cross_entropy(hidden @ head.t(), targets, reduction="none")
                (3 * (expected_losses * weights).sum()).backward()
                expected = [(expected_losses * weights).sum().detach(), expected_losses.detach(), hidden.grad, head.grad]
                hidden.grad = None
                parted = nn.Parameter(distribute_tensor(head.detach(), mesh["tp"], [Shard(0)]))
                loss, losses = compute_cross_entropy(hidden, parted, targets, weights, chunk)
                (3 * loss).backward()
                assert hidden.grad is not None and parted.grad is not None and not losses.requires_grad
                for one, other in zip([loss.detach(), losses, hidden.grad, whole(parted.grad)], expected, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * scale)
                with torch.no_grad(), Largest() as seen:  # measuring
                    torch.testing.assert_close(compute_cross_entropy(hidden, parted, targets, weights, chunk)[0], loss.detach())
                assert seen.num_elements <= max(chunk * 19, 37 * 8)
                hidden.grad = None
                compute_cross_entropy(hidden, parted.detach(), targets, weights, chunk)[0].backward()  # a frozen head
                assert hidden.grad is not None
                torch.testing.assert_close(3 * hidden.grad, expected[2], rtol=1e-5, atol=1e-5 * scale)

    return run_ranks(2, [compare])


def lose_rank(signal_number: signal.Signals, parallel: ParallelConfig) -> list[int]:
    """Rank 1 gets a signal in its second step; the others are to end by themselves."""

    def train_and_fail() -> None:
        with distributed_run(parallel) as mesh:
            transformer, optimizer = build(mesh, parallel, seed=0)
            for step in range(100):
                rows = make_rows(step, 1)
                if step == 1 and dist.get_rank() == 1:
                    os.kill(os.getpid(), signal_number)
                hidden = transformer(rows.token_ids, PackedAttention(rows.documents))
                compute_cross_entropy(hidden[0], transformer.lm_head.weight, rows.token_ids[0], torch.ones(NUM_TOKENS))[0].backward()
                optimizer.step()

    return run_ranks(parallel.num_ranks, [train_and_fail])


def find_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def fork_rank(rank: int, num_ranks: int, jobs: list[tuple[int, Callable[[], None]]]) -> int:
    """A child that runs jobs, each with its own port to meet on; its process id. It exits with 1 after an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        for port, job in jobs:
            os.environ["MASTER_PORT"] = str(port)
            job()
        code = 0
    except BaseException:  # noqa: BLE001  # a forked child must not return into its parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_ranks(num_ranks: int, jobs: list[Callable[[], None]]) -> list[int]:
    """Run jobs on forked ranks, one after the other; the exit codes. One that stands still is killed last."""
    numbered = [(find_port(), job) for job in jobs]
    children = [fork_rank(rank, num_ranks, numbered) for rank in range(num_ranks)]
    codes: dict[int, int] = {}
    stopped: set[int] = set()
    while len(codes) < num_ranks:
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(child)
        else:
            codes[child] = os.waitstatus_to_exitcode(status)
        if stopped and len(codes) + len(stopped) == num_ranks:
            for left in stopped:
                os.kill(left, signal.SIGKILL)
            stopped.clear()
    return [codes[child] for child in children]


if __name__ == "__main__":
    folder, what, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    build_format()  # once, for all children
    if what == "equal":
        found = compare_with_one(folder, names)
    elif what == "pieces":
        found = write_and_read_checkpoint(folder) + compare_cross_entropy()
    else:
        found = lose_rank(signal.SIGKILL, ParallelConfig(dp=3, timeout_seconds=TIMEOUT))
        found += lose_rank(signal.SIGSTOP, ParallelConfig(dp=2, tp=2, timeout_seconds=2.0))
    json.dump(found, sys.stdout)
