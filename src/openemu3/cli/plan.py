"""What a training run would need and how long it would take: `emu3 plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from openemu3.cli.options import Json, print_tables
from openemu3.records import InputError

if TYPE_CHECKING:
    from openemu3.planning import Plan as TrainingPlan
    from openemu3.planning import PlanConfig


@dataclass(frozen=True)
class Plan:
    """Work out what a training run needs, without running it: memory of every GPU, FLOPs, bytes sent, tokens a second and days.

    Ends with exit code 2 and what would fit, where it does not fit. docs/planning.md has the formulas.
    """

    preset: Literal["emu3-8b", "mini"] = "emu3-8b"
    """Sizes of the transformer; the flags that follow it change one each."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width of the feed-forward."""
    num_layers: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Query heads of a block."""
    num_kv_heads: int | None = None
    """Key and value heads of a block."""
    head_dim: int | None = None
    """Width of one head."""
    vocab_size: int | None = None
    """Number of token ids."""
    gpus: int = 8
    """How many GPUs there are."""
    gpu_memory: float = 80.0
    """Memory of one GPU, in GiB."""
    dp: int | None = None
    """Data-parallel ranks, over which weights are sharded; otherwise all GPUs that cp and tp leave."""
    cp: int = 1
    """Context-parallel ranks, which share the tokens of a row."""
    tp: int = 1
    """Tensor-parallel ranks, which share the heads, the feed-forward and the vocabulary."""
    replicate: int = 1
    """Of dp, how many groups keep a whole copy of the weights each (HSDP)."""
    context: int | None = None
    """Tokens of a packed row; otherwise 5120, the paper's stage 1, or what the preset can take."""
    document_length: int | None = None
    """Tokens of a document in the rows, on average; otherwise one document fills a row. Attention costs by it."""
    micro_batch: int = 1
    """Rows that a data-parallel rank computes at once."""
    micro_batches: int = 1
    """Micro-batches of a rank that make one update together."""
    precision: Literal["fp32", "mixed", "bf16"] = "mixed"
    """How numbers are kept: mixed has fp32 weights and optimizer states and computes in bf16."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass instead of kept: nothing, what is cheap, or whole blocks."""
    lora_rank: int = 0
    """Train adapters of this rank, in fp32, beside frozen weights; 0 trains everything."""
    lora_targets: tuple[str, ...] = ()
    """Matrices with adapters, by the end of their names (q_proj, down_proj); otherwise all seven of a block."""
    headroom: float = 0.08
    """Share of a GPU's memory that stays free, for the CUDA context, NCCL and gaps."""
    peak_tflops: float = 989.0
    """What one GPU could do, in 10^12 operations a second; 989 is an H100 SXM in bfloat16, without sparsity."""
    mfu: float = 0.4
    """Share of it that the model's operations reach (model FLOPs utilisation); measure it, or take 0.3 to 0.5."""
    tokens: float | None = None
    """Tokens to train on, such as 1e11, for the number of days."""
    json: Json = False

    def run(self) -> None:
        from openemu3.planning import GIB, build_plan

        plan = build_plan(self.build_config())
        print_tables(self.json, describe(plan), list(draw_tables(plan)))
        if plan.reason is not None:
            alternatives = "; or ".join(plan.alternatives)
            raise InputError(
                f"this does not fit: {plan.reason}; what fits (peak of {plan.memory.usable / GIB:.1f} GiB at most): {alternatives}"
            )

    def build_config(self) -> PlanConfig:
        from openemu3 import presets
        from openemu3.distributed import ParallelConfig
        from openemu3.planning import MATRICES, PlanConfig
        from openemu3.training.lora import LoraConfig

        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        given = {name: value for name in sizes if (value := getattr(self, name)) is not None}
        if self.lora_rank < 1 and self.lora_targets:
            raise InputError(f"lora-rank is {self.lora_rank}; at least 1 is allowed where lora-targets are named")
        dp = self.gpus // max(1, self.cp * self.tp) if self.dp is None else self.dp
        transformer = replace({"emu3-8b": presets.EMU3_8B, "mini": presets.MINI_TRANSFORMER}[self.preset], **given)
        return PlanConfig(
            transformer=transformer,
            num_gpus=self.gpus,
            gpu_memory=self.gpu_memory,
            parallel=ParallelConfig(max(1, dp), self.cp, self.tp, self.replicate, self.checkpointing),
            context=min(5120, transformer.max_positions) if self.context is None else self.context,
            micro_batch=self.micro_batch,
            micro_batches=self.micro_batches,
            document_length=self.document_length,
            precision=self.precision,
            lora=LoraConfig(self.lora_rank, targets=self.lora_targets or MATRICES) if self.lora_rank else None,
            headroom=self.headroom,
            peak_flops=self.peak_tflops * 1e12,
            utilisation=self.mfu,
            token_budget=self.tokens,
        )


def describe(plan: TrainingPlan) -> dict[str, Any]:
    """The plan as plain values, for a program."""
    return asdict(plan) | {
        "fits": plan.reason is None,
        "flops": asdict(plan.flops) | {"forward": plan.flops.forward, "model": plan.flops.model},
        "memory": asdict(plan.memory) | {"peak": plan.memory.peak, "peak_moment": plan.memory.peak_moment},
        "tokens_per_step": plan.config.tokens_per_step,
    }


def draw_tables(plan: TrainingPlan) -> Iterator[Any]:
    from rich.table import Table

    from openemu3.planning import GIB

    config, parameters, flops, memory = plan.config, plan.parameters, plan.flops, plan.memory

    sums = Table(title="The run", title_justify="left", show_header=False)
    sums.add_row(
        "GPUs",
        f"{config.num_gpus} of {config.gpu_memory:g} GiB: dp {config.parallel.dp} x cp {config.parallel.cp} x tp {config.parallel.tp}",
    )
    sums.add_row("parameters", f"{parameters.total:,}, trained {parameters.trained:,}; on a GPU {parameters.total_per_gpu:,}")
    sums.add_row("tokens of a step", f"{config.tokens_per_step:,}")
    sums.add_row(
        "GFLOPs of a token",
        f"forward {flops.matrices / 1e9:,.2f} + attention {flops.attention / 1e9:,.2f} ({flops.attention_full / 1e9:,.2f} if documents "
        f"filled the context), backward {flops.backward / 1e9:,.2f}, computed again {flops.recomputed / 1e9:,.2f}",
    )
    sums.add_row(
        f"at MFU {config.utilisation:.0%} of {config.peak_flops / 1e12:,.0f} TFLOP/s",
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.seconds_per_step:,.2f} s a step"
        + ("" if plan.days is None else f", {plan.days:,.1f} days for {config.token_budget:,.0f} tokens"),
    )
    yield sums

    fullest = Table(title="Memory of a GPU in GiB, at the moments when it can be fullest", title_justify="left")
    fullest.add_column("")
    for moment in memory.moments:
        fullest.add_column(moment, justify="right")
    for component in dict.fromkeys(name for parts in memory.moments.values() for name in parts):
        parts = [moment.get(component, 0) for moment in memory.moments.values()]
        if any(parts):
            fullest.add_row(component, *(f"{size / GIB:,.2f}" for size in parts))
    fullest.add_section()
    fullest.add_row("in all", *(f"{sum(parts.values()) / GIB:,.2f}" for parts in memory.moments.values()))
    fullest.add_row("usable", *[f"{memory.usable / GIB:,.2f}"] * len(memory.moments))
    yield fullest

    if plan.communication:
        rate = sum(plan.communication.values()) / plan.seconds_per_step / 1e9
        sent = Table(title=f"What a GPU receives in a step, in GB ({rate:,.0f} GB/s, if hidden)", title_justify="left", show_header=False)
        sent.add_column()
        sent.add_column(justify="right")
        for kind, size in plan.communication.items():
            sent.add_row(kind, f"{size / 1e9:,.2f}")
        yield sent
