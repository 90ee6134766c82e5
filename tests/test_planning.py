"""Plans against what they plan: shapes of the real model, real shards on two ranks, torch's counters of FLOPs and memory, and by hand."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from openemu3 import cli
from openemu3.distributed import ParallelConfig
from openemu3.model.attention import CausalAttention, PackedAttention
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.parallelize import fill_weights, parallelize, set_last_micro_batch
from openemu3.model.transformer import Transformer, TransformerConfig, build_rotation, build_transformer
from openemu3.planning import (
    GIB,
    PlanConfig,
    build_plan,
    count_activations,
    count_block_activations,
    count_communication,
    count_flops,
    count_memory,
    count_parameters,
    fits,
    list_meshes,
    list_weights,
    make_lean,
)
from openemu3.presets import EMU3_8B, MINI_TRANSFORMER
from openemu3.records import InputError
from openemu3.training.lora import ATTENTION, FEED_FORWARD, LoraConfig, apply_lora
from openemu3.training.objectives import compute_cross_entropy
from openemu3.training.optimizer import OptimizerConfig, build_optimizer, to_local
from openemu3.training.throughput import count_step_flops

TOY = TransformerConfig(
    vocab_size=101, hidden_size=32, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, dropout=0.0
)  # fmt: skip
MODES = ("none", "selective", "full")


def plan_8b(**changes):
    mesh = {name: changes.pop(name) for name in ("dp", "cp", "tp", "replicate") if name in changes}
    mode = changes.pop("checkpointing", "none")
    parallel = ParallelConfig(**mesh, activation_checkpointing=mode)
    return PlanConfig(EMU3_8B, parallel.num_ranks, parallel=parallel, **changes)


# ---- parameters


@pytest.mark.parametrize("config", [EMU3_8B, MINI_TRANSFORMER, TOY])
def test_weights_are_those_of_the_model(config):
    real = {}
    for name, parameter in Transformer(config).named_parameters():
        shape = (*parameter.shape, 1)[:2]
        real.setdefault(name.split(".")[-2], []).append(tuple(shape))
    planned = {weight.name: [(weight.rows, weight.columns)] * weight.count for weight in list_weights(config)}
    assert planned == real


def test_the_published_model_has_the_published_number_of_parameters():
    assert count_parameters(plan_8b()).total == 8_492_011_520


def test_loras_parameters():
    # By hand: rank x (rows + columns) of every matrix, 32 times.
    per_layer = {"q_proj": 8192, "k_proj": 5120, "v_proj": 5120, "o_proj": 8192, "gate_proj": 18432, "up_proj": 18432, "down_proj": 18432}
    assert count_parameters(plan_8b(lora=LoraConfig(16))).trained == 32 * 16 * sum(per_layer.values()) == 41_943_040
    chosen = count_parameters(plan_8b(lora=LoraConfig(8, targets=("q_proj", "v_proj"))))
    assert chosen.trained == 32 * 8 * (8192 + 5120)
    assert chosen.total == 8_492_011_520 + chosen.trained


# ---- what every rank holds and receives


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Cases (dp, cp, tp, key/value heads, checkpointing), and for both ranks what each of them measured."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [(2, 1, 1, 2, "none"), (1, 2, 1, 2, "full"), (1, 2, 1, 1, "none"), *((1, 1, 2, 2, mode) for mode in MODES)]
    script = Path(__file__).with_name("planning_ranks.py")
    done = subprocess.run([sys.executable, script, folder, json.dumps(cases)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return cases, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_states_and_traffic_of_real_ranks(two_ranks):
    """A toy whose odd vocabulary two ranks cannot halve, in fp32 with bf16 products, one step of 64 tokens."""
    cases, ranks = two_ranks
    for number, (dp, cp, tp, num_kv_heads, mode) in enumerate(cases):
        parallel = ParallelConfig(dp, cp, tp, activation_checkpointing=mode)
        config = PlanConfig(replace(TOY, num_kv_heads=num_kv_heads), 2, parallel=parallel, context=64)
        memory, received = count_memory(config), count_communication(config)
        for kind in ("weights", "gradients", "optimizer"):
            assert getattr(memory, kind) == max(rank[number][kind] for rank in ranks), (parallel, kind)
        keys_and_values = received.pop("keys and values, by context parallelism", 0)  # gathered forward, reduced backward
        assert (keys_and_values > 0) == (cp > num_kv_heads)
        for rank in ranks:
            measured = rank[number]["received"]
            if tp == 1:
                assert received.get("weights, gathered by FSDP") == measured["gather"] - keys_and_values / 2
                assert received.get("gradients, reduced by FSDP") == measured["reduce_scatter"] - keys_and_values / 2
                assert received.get("heads for tokens, by context parallelism", 0) == measured["all_to_all"]
            else:
                assert received == {"activations, by tensor parallelism": sum(measured.values())}


@pytest.fixture
def fake_ranks():
    """Rank 0 of 16 that talk to nobody: shards are real, collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(16, 1, 1), (2, 2, 4), (4, 4, 1), (2, 1, 8)])
def test_shards_of_the_published_model(fake_ranks, sizes):
    """184,622 rows are twice an odd number: no mesh but 2 divides them."""
    parallel = ParallelConfig(*sizes)
    config = replace(EMU3_8B, num_layers=2)
    transformer = Transformer(config)
    parallelize(transformer, init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "cp", "tp")), parallel)
    planned = count_parameters(PlanConfig(config, 16, parallel=parallel, context=4096))
    assert planned.total_per_gpu == sum(to_local(parameter).numel() for parameter in transformer.parameters())


def test_replicas_hold_whole_copies():
    """8 ranks in 2 replicas of 4 hold what 4 ranks hold, and sum their gradients beside."""
    memory, traffic = count_memory(plan_8b(dp=8, replicate=2)), count_communication(plan_8b(dp=8, replicate=2))
    alone = count_communication(plan_8b(dp=4))
    assert memory.weights == count_memory(plan_8b(dp=4)).weights == 4 * count_parameters(plan_8b(dp=4)).total_per_gpu
    assert traffic.pop("gradients, summed over replicas") == 4 * count_parameters(plan_8b(dp=4)).total_per_gpu
    assert traffic == alone


# ---- FLOPs


def count_real_flops(config, mode, attention, num_tokens):
    transformer = build_transformer(config, torch.Generator().manual_seed(0)).train()
    parallelize(transformer, None, ParallelConfig(activation_checkpointing=mode))
    token_ids = torch.arange(num_tokens)[None] % config.vocab_size
    with FlopCounterMode(display=False) as counter:
        hidden = transformer(token_ids, attention)
        loss, _ = compute_cross_entropy(hidden[0], transformer.lm_head.weight, token_ids[0], torch.ones(num_tokens), 16)
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", MODES)
def test_flops_of_matrices(mode):
    """torch counts no attention by the CPU's kernel, so that leaves the matrices, and of them exactly what is computed."""
    flops = count_flops(PlanConfig(TOY, 1, parallel=ParallelConfig(activation_checkpointing=mode), context=64))
    recomputed = flops.recomputed - (flops.attention if mode == "full" else 0)
    assert count_real_flops(TOY, mode, CausalAttention(), 64) == 64 * (3 * flops.matrices + recomputed)
    assert (recomputed > 0) == (mode != "none")


def test_flops_of_attention():
    """As plain products the square is computed in full: 2 x length / (length + 1) of the half that is needed."""
    flops = count_flops(PlanConfig(TOY, 1, context=64))
    with sdpa_kernel(SDPBackend.MATH):
        counted = count_real_flops(TOY, "none", CausalAttention(), 64)
    assert counted == pytest.approx(64 * (flops.model - 3 * flops.attention * (1 - 128 / 65)), rel=1e-12)


def test_flops_of_the_published_model():
    """The fact sheet's 15.5 GFLOP a token forward; attention by hand: 32 layers x 4 x 4096 x half the document."""
    flops = count_flops(plan_8b(context=131072, document_length=5119))
    assert flops.matrices == 2 * (8_492_011_520 - 756_211_712 - 65 * 4096)
    assert flops.attention == 32 * 4 * 4096 * 2560
    assert flops.attention_full == pytest.approx(32 * 4 * 4096 * 65536, rel=1e-4)
    assert flops.backward == 2 * flops.forward and flops.recomputed == 0


def test_flops_that_training_reports():
    """Utilisation means the same in a plan and in a training's metrics, but for length / (length + 1) in attention."""
    config = plan_8b(context=4096, document_length=1024)
    reported = count_step_flops(EMU3_8B, 4096, 4096, 4 * 1024**2)
    assert 4096 * count_flops(config).model == pytest.approx(reported, rel=1e-4)


def test_flops_of_lora():
    """A frozen matrix has one product in the backward pass, so it costs two thirds; LoRA itself is small."""
    whole, lora = count_flops(plan_8b()), count_flops(plan_8b(lora=LoraConfig(16)))
    thin = count_parameters(plan_8b(lora=LoraConfig(16))).trained
    assert lora.model == pytest.approx(whole.model - whole.matrices + 6 * thin)


# ---- memory


WIDE = TransformerConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=192, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16, dropout=0.0
)  # fmt: skip


def read_bytes(tracker, moment="current"):
    return tracker.get_tracker_snapshot(moment)[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_memory_of_a_real_step(precision, mode):
    """Activations within 2 %, the fullest moment within 10 %, against torch's tracker of every storage on a CPU.

    Documents of 520 tokens: up to 512, attention in bf16 takes another way on a CPU.
    """
    num_tokens = 1040
    parallel = ParallelConfig(activation_checkpointing=mode)
    config = PlanConfig(WIDE, 1, parallel=parallel, context=num_tokens, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    transformer = build_transformer(WIDE, torch.Generator().manual_seed(0), dtype).train()
    parallelize(transformer, None, parallel)
    optimizer = build_optimizer(OptimizerConfig(), transformer)
    token_ids = torch.arange(num_tokens)[None] % WIDE.vocab_size
    attention = PackedAttention(torch.arange(num_tokens)[None] // 520)
    tracker = MemTracker()
    tracker.track_external(transformer, optimizer)
    with tracker:
        states = read_bytes(tracker)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            hidden = transformer(token_ids, attention, attention.positions)
        kept = read_bytes(tracker) - states - hidden.untyped_storage().nbytes()
        hidden = hidden.flatten(0, 1).to(torch.float32 if precision == "fp32" else torch.bfloat16)
        loss, _ = compute_cross_entropy(hidden, transformer.lm_head.weight, token_ids[0], torch.ones(num_tokens))
        loss.backward()
        peak = read_bytes(tracker, "peak")
    memory = count_memory(config, gpu=False)
    assert states == pytest.approx(memory.weights + memory.optimizer, rel=1e-3)  # torch's step counts are not planned
    copies = 2 * (count_parameters(config).total - 1000 * 64) if precision == "mixed" and mode == "none" else 0
    assert kept - copies == pytest.approx(count_activations(config, gpu=False), rel=0.02)
    assert peak == pytest.approx(memory.peak, rel=0.10)


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(("sizes", "micro_batches"), [((16, 1, 1), 1), ((16, 1, 1), 2), ((8, 1, 2), 1), ((8, 2, 1), 1)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_memory_of_a_real_step_of_many_ranks(fake_ranks, sizes, micro_batches, mode):
    """The fullest moment within 10 %, with what FSDP gathers and reduces, on rank 0 of 16. Collectives do nothing, but take memory."""
    model = WIDE
    num_tokens, parallel = 1040, ParallelConfig(*sizes, activation_checkpointing=mode)
    config = PlanConfig(model, 16, parallel=parallel, context=num_tokens, micro_batches=micro_batches)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "cp", "tp"))
    transformer = Transformer(model)
    parallelize(transformer, mesh, parallel, torch.bfloat16)
    fill_weights(transformer, torch.Generator().manual_seed(0))
    optimizer = build_optimizer(OptimizerConfig(), transformer)
    split, token_ids = ContextSplit(model, mesh), torch.arange(num_tokens)[None] % model.vocab_size
    tracker = MemTracker()
    tracker.track_external(transformer, optimizer)
    with tracker:
        for number in range(micro_batches):
            tracker.reset_mod_stats()
            set_last_micro_batch(transformer, number == micro_batches - 1)
            attention = split.build_attention(torch.arange(num_tokens)[None] // 520)
            hidden = transformer(split.split(token_ids), attention, attention.positions).flatten(0, 1)
            targets = split.split(token_ids)[0]
            loss, losses = compute_cross_entropy(hidden, transformer.lm_head.weight, targets, torch.ones(len(targets)))
            loss.backward()
            del hidden, loss, losses
    assert read_bytes(tracker, "peak") == pytest.approx(count_memory(config, gpu=False).peak, rel=0.10)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj"), ATTENTION + FEED_FORWARD])
def test_activations_of_a_block(precision, targets):
    """Every storage that autograd keeps, of one block as it is (None) and with adapters by peft."""
    lora = None if targets is None else LoraConfig(4, targets=targets)
    config = PlanConfig(TOY, 1, context=520, precision=precision, lora=lora)
    transformer = build_transformer(TOY, torch.Generator().manual_seed(0), torch.bfloat16 if precision == "bf16" else torch.float32).train()
    if lora is not None:
        pytest.importorskip("peft")
        apply_lora(transformer, lora)
    attention = PackedAttention(torch.zeros(1, 520, dtype=torch.int64))
    rotation = build_rotation(attention.positions, TOY.head_dim, TOY.rope_theta)
    block = transformer.model.layers[1]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *rotation)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype != torch.int64:
            kept[storage.data_ptr()] = tensor
        return tensor

    x = torch.randn(1, 520, TOY.hidden_size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            block(x, rotation, attention, 1)
    per_token = [tensor for tensor in kept.values() if tensor.numel() % 520 == 0]  # without autocast's copies of weights
    assert sum(tensor.untyped_storage().nbytes() for tensor in per_token) == 520 * count_block_activations(config, gpu=False)[0]


def test_memory_of_an_update_in_bf16():
    """The update computes a slice of one parameter at a time in fp32, here all of the embeddings."""
    config = PlanConfig(WIDE, 1, precision="bf16", context=64)
    transformer = build_transformer(WIDE, torch.Generator().manual_seed(0), torch.bfloat16)
    optimizer = build_optimizer(OptimizerConfig(), transformer)
    for parameter in transformer.parameters():
        parameter.grad = torch.ones_like(parameter)
    tracker = MemTracker()
    tracker.track_external(transformer, optimizer)
    with tracker:
        optimizer.step()
    planned = sum(count_memory(config).moments["at the update"].values())
    assert read_bytes(tracker, "peak") == pytest.approx(planned, rel=0.02)


def test_what_parallelism_divides():
    """Tensor and context parallelism divide what a rank keeps; dropout costs a byte a number three times in a block and once outside."""
    whole = count_activations(plan_8b(dp=4, context=8192, checkpointing="full"))
    assert count_activations(plan_8b(cp=4, context=8192, checkpointing="full")) == whole / 4
    dry = replace(EMU3_8B, dropout=0.0)
    ours, theirs = (
        count_activations(PlanConfig(config, 2, parallel=ParallelConfig(2, activation_checkpointing="full"), context=4096))
        for config in (EMU3_8B, dry)
    )
    assert ours - theirs == 4096 * 4096
    kept, split = (count_activations(PlanConfig(dry, 8, parallel=parallel)) for parallel in (ParallelConfig(8), ParallelConfig(1, 1, 8)))
    assert kept / 8 < split < kept / 4  # normalised inputs are gathered, and kept whole


def test_micro_batches_cost_whole_gradients_and_save_traffic():
    """Ranks add up gradients by themselves until the last micro-batch."""
    one, four = plan_8b(dp=8), plan_8b(dp=8, micro_batches=4)
    assert count_memory(four).moments["at the loss"]["gradients"] == 4 * 8_492_011_520
    assert count_memory(one).moments["at the loss"]["gradients"] == 0
    reduced = "gradients, reduced by FSDP"
    assert count_communication(four)[reduced] == count_communication(one)[reduced]
    gathered = "weights, gathered by FSDP"
    assert count_communication(four)[gathered] == 4 * count_communication(one)[gathered]


# ---- the whole plan


def test_throughput_by_hand():
    plan = build_plan(plan_8b(dp=8, peak_flops=1e15, utilisation=0.5, token_budget=1e11, micro_batches=2, context=4096))
    assert plan.tokens_per_second == pytest.approx(8 * 1e15 * 0.5 / plan.flops.model)
    assert plan.seconds_per_step == pytest.approx(8 * 2 * 4096 / plan.tokens_per_second)
    assert plan.days == pytest.approx(1e11 / plan.tokens_per_second / 86400)


def test_what_fits_is_offered_least_change_first():
    config = plan_8b(dp=8, micro_batch=2, context=10240)
    plan = build_plan(config)
    assert plan.reason is not None and f"{plan.memory.peak / GIB:.1f} GiB" in plan.reason and "73.6 are usable" in plan.reason
    assert "full checkpointing" in plan.alternatives
    assert fits(plan_8b(dp=8, micro_batch=2, context=10240, checkpointing="full")) and not fits(config)


def test_large_changes_are_offered_where_small_ones_do_not_help():
    plan = build_plan(plan_8b(gpu_memory=24.0))
    words = "full checkpointing with 1 row at a time"
    assert plan.alternatives[0].startswith(f"{words} and 8 GPUs") or plan.alternatives[0].startswith(f"{words} and 16 GPUs")
    assert plan.alternatives[1] == f"{words}, LoRA of rank 16 and bf16 weights"
    assert "nothing tried" in build_plan(plan_8b(gpu_memory=0.5)).alternatives[0]


def test_rows_are_computed_at_once_where_that_is_leaner():
    """Two micro-batches on eight ranks would keep all gradients whole (31.6 GiB); two rows at once keep two of everything else."""
    assert make_lean(plan_8b(dp=8, micro_batches=2)).micro_batch == 2
    assert make_lean(plan_8b(dp=8, micro_batch=64)).micro_batch == 1
    alternatives = build_plan(plan_8b(dp=8, micro_batch=2, gpu_memory=24.0)).alternatives
    assert alternatives[0].startswith("full checkpointing with 2 rows at a time and")


def test_every_mesh_offered_is_one_that_works():
    meshes = [mesh.parallel for mesh in list_meshes(plan_8b(context=5120), 16)]
    assert ParallelConfig(2, 1, 8) in meshes and ParallelConfig(1, 1, 16) not in meshes
    assert all(mesh.num_ranks == 16 and 8 % mesh.tp == 0 for mesh in meshes)
    assert len(meshes) == len(set(meshes)) == 14


def test_a_plan_that_fits_says_nothing_of_others():
    plan = build_plan(plan_8b(dp=8))
    assert plan.reason is None and plan.alternatives == () and plan.days is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_gpus": 16}, "has 8 ranks; as many as GPUs, 16, are allowed"),
        ({"parallel": ParallelConfig(tp=16), "num_gpus": 16}, "tp is 16; a divisor of the key/value heads, 8, is allowed"),
        ({"context": 5121, "parallel": ParallelConfig(1, 2, 4)}, "context is 5121; a multiple of 8 is allowed with cp 2 and tp 4"),
        ({"context": 5128, "parallel": ParallelConfig(1, 2, 4), "transformer": replace(EMU3_8B, num_kv_heads=4)}, "a multiple of 16"),
        ({"context": 131073}, "context is 131073; at most the model's max_positions, 131072, is allowed"),
        ({"document_length": 6000}, "document_length is 6000; 1 to the context, 5120, is allowed"),
        ({"lora": LoraConfig(), "parallel": ParallelConfig(4, 1, 2)}, "tp is 2 with LoRA"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"gpu_memory": float("nan")}, "gpu_memory is nan"),
        ({"utilisation": 1.5}, "utilisation is 1.5; above 0 and at most 1 is allowed"),
        ({"headroom": 1.0}, "headroom is 1.0"),
        ({"token_budget": -1.0}, "token_budget is -1.0"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        PlanConfig(**{"transformer": EMU3_8B, "num_gpus": 8, "parallel": ParallelConfig(8)} | changes)


# ---- the command


def run(capsys, *arguments):
    code = cli.main(["plan", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_command_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, text, errors = run(capsys, "--gpus", "8", "--tokens", "1e11")
    plan = build_plan(plan_8b(dp=8, token_budget=1e11))
    assert code == 0 and not errors
    for words in ("8,492,011,520", f"{plan.days:,.1f} days", f"{plan.memory.peak / GIB:,.2f}", "weights, gathered by FSDP"):
        assert words in text


def test_the_command_for_programs(capsys):
    code, text, _ = run(capsys, "--preset", "mini", "--gpus", "2", "--context", "512", "--num-layers", "3", "--json")
    answer = json.loads(text)
    config = PlanConfig(replace(MINI_TRANSFORMER, num_layers=3), 2, parallel=ParallelConfig(2), context=512)
    assert code == 0 and answer["fits"] is True and answer["alternatives"] == []
    assert answer["parameters"]["total"] == count_parameters(config).total
    assert answer["memory"]["peak"] == count_memory(config).peak
    assert answer["flops"]["model"] == count_flops(config).model


def test_the_command_says_what_does_not_fit(capsys):
    code, text, errors = run(capsys, "--gpus", "1", "--gpu-memory", "24", "--json")
    answer = json.loads(text)
    assert code == 2 and answer["fits"] is False and answer["alternatives"]
    assert errors.startswith("emu3: this does not fit: one GPU would need ") and answer["alternatives"][0] in errors


PAGE = (Path(__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^    emu3 (plan .*?)(?: *#.*)?$", PAGE, re.MULTILINE))
def test_commands_of_the_page(capsys, line):
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(("flags", "peak", "received"), re.findall(r"^\|.*\| `(--.*?)` \| ([\d.]+) \| (\d+) \|$", PAGE, re.MULTILINE))
def test_examples_of_the_page(capsys, flags, peak, received):
    code, text, _ = run(capsys, *flags.split(), "--json")
    answer = json.loads(text)
    assert code == 0 and answer["fits"]
    assert f"{answer['memory']['peak'] / GIB:.1f}" == peak
    assert f"{sum(answer['communication'].values()) / 1e9:.0f}" == received


def test_the_page_has_examples():
    assert PAGE.count("| `--gpus") == 7 and PAGE.count("    emu3 plan") == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "12", "--tp", "4", "--dp", "2"], "has 8 ranks; as many as GPUs, 12"),
        (["--tp", "3"], "tp is 3; a divisor of the heads, 32"),
        (["--lora-targets", "q_proj"], "lora-rank is 0; at least 1 is allowed where lora-targets are named"),
        (["--gpus", "1", "--lora-rank", "4", "--lora-targets", "head"], "targets are"),
        (["--num-kv-heads", "5"], "num_heads is 32"),
    ],
)
def test_bad_flags(capsys, arguments, words):
    code, text, errors = run(capsys, *arguments)
    assert code == 2 and not text and words in errors and errors.count("\n") == 1
