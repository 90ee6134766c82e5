"""One training step on a CPU: packed rows and a chunked loss beside transformers on padded documents, same weights, same documents.

    python benchmarks/train_step.py            about a quarter of an hour on two quiet cores, 15 GB of memory
    python benchmarks/train_step.py --quick    about two minutes, 10 GB: a narrower network, a quarter of the documents, two rounds

The network is small (512 wide, 8 layers; quick: 256) with the full vocabulary of 184,622 ids, weights and AdamW in fp32, computing in
bf16. A step learns the visual tokens of 16 documents (quick: 4), a caption and a picture each, and ends with one update.

transformers (`Emu3ForCausalLM`, the text model with its head) does what the published fine-tuning script does: every document a row of its
own, padded to the greatest length that is allowed, two rows at a time, all logits at once; without activation checkpointing and with it,
as that script has it. The faster of the two is what we are compared with in tokens/s, the leaner of the two in memory. Ours: the same
documents packed into rows of that length, two rows at a time, through `LanguageLearner`.

Each side is a process of its own, so that its peak memory (resident set, reset before every step) is its own. Steps are interleaved,
round by round, and medians are printed. Tokens are those that are not padding. Before anything is timed, both sides' loss and gradient
norm of the first step are compared.

Everything is a tenth as long as in that script, which pads to 10,240 tokens. "mixed" documents are of many lengths, as pictures of 200
to 760 pixels a side make them; of "full" ones each fills a row, so that packing saves nothing: what is left is the rest. That script's own
data, pictures of one area (720 x 720 pixels: 8,190 tokens, four fifths of a row), lie between the two.

Speed is given by the clock and by processor time. Other programs on the same cores change the first at will, the second a little, by what
they take from the caches. FLOPs are of the arithmetic that each side does: what of the ratio packing must give, whatever the machine.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from side_by_side import Worker, serve

OURS, THEIRS, THEIRS_LEAN = "openemu3", "transformers", "transformers checkpointed"
SIDES = (OURS, THEIRS, THEIRS_LEAN)
TARGET_SPEED, TARGET_MEMORY = 2.0, 0.5
ROWS_AT_ONCE = 2
MAX_DIFFERENCE = 0.01  # of loss and gradient norm, relative; both sides round products to bf16


@dataclass(frozen=True)
class Setting:
    """A network and the documents of a step. sides: of the documents' pictures, in tokens, one after the other and again."""

    name: str
    hidden_size: int
    context: int
    num_documents: int
    sides: tuple[int, ...]


def choose_settings(quick: bool) -> list[Setting]:
    if quick:
        return [Setting("mixed", 256, 1024, 4, (8, 14, 20, 29))]
    mixed = (8, 12, 16, 20, 24, 30, 10, 28)
    return [Setting("mixed", 512, 1024, 16, mixed), Setting("full", 512, 1024, 16, (30,))]


# ---- one side, in its own process


class Trainer:
    """The network of one program, and its step."""

    def __init__(self, program: str, setting: Setting) -> None:
        import torch

        from openemu3.model.transformer import TransformerConfig, build_transformer
        from openemu3.tokenization.sequence import Vocabulary

        self.setting, self.vocabulary = setting, Vocabulary()
        width = setting.hidden_size
        self.config = TransformerConfig(
            vocab_size=self.vocabulary.size, hidden_size=width, intermediate_size=width * 11 // 4, num_layers=8, num_heads=width // 64,
            num_kv_heads=max(1, width // 256), head_dim=64, dropout=0.0, max_positions=setting.context,
        )  # fmt: skip
        self.transformer = build_transformer(self.config, torch.Generator().manual_seed(0))
        self.documents = self.build_documents()
        if program == OURS:
            self.prepare_ours()
        else:
            self.prepare_theirs()
        self.flops = self.count_flops(program)

    def count_flops(self, program: str) -> float:
        """Of a step of this program, without what checkpointing computes again."""
        from openemu3.tokenization.sequence import Role
        from openemu3.training.throughput import count_step_flops

        lengths = [len(ids) for ids, _ in self.documents]
        num_targets = sum(role == Role.VISION for _, roles in self.documents for role in roles)
        if program == OURS:
            return count_step_flops(self.config, sum(lengths), num_targets, sum(length**2 for length in lengths))
        num_places = len(lengths) * self.setting.context
        return count_step_flops(self.config, num_places, num_places, num_places * self.setting.context)

    def build_documents(self) -> list[tuple[list[int], list[int]]]:
        """(ids, roles) of each document: BOS, a caption, a picture as published, EOS. A picture that nearly fills the row fills it."""
        import numpy as np

        from openemu3.tokenization.sequence import Role

        vocabulary, rng, documents = self.vocabulary, np.random.default_rng(0), []
        for number in range(self.setting.num_documents):
            side = self.setting.sides[number % len(self.setting.sides)]
            digits = [15 + int(digit) for digit in str(side)]  # published ids of the digits; 9 is "*"
            meta = [vocabulary.boi, *digits, 9, *digits, vocabulary.img]
            rows = [[*rng.integers(vocabulary.visual_offset, vocabulary.size, side).tolist(), vocabulary.eol] for _ in range(side)]
            picture = [*meta, *(token for row in rows for token in row), vocabulary.eof, vocabulary.eoi, vocabulary.eos]
            room = self.setting.context - len(picture) - 1
            caption = rng.integers(1000, 100_000, room if len(self.setting.sides) == 1 else min(room, int(rng.integers(8, 60)))).tolist()
            ids = [vocabulary.bos, *caption, *picture]
            is_code = [token >= vocabulary.visual_offset for token in ids]
            documents.append((ids, [int(Role.VISION if code else Role.STRUCTURE) for code in is_code]))
        return documents

    def prepare_ours(self) -> None:
        from openemu3.training.language_learner import LanguageLearner, LanguageLearnerConfig, RoleWeights
        from openemu3.training.optimizer import OptimizerConfig

        config = LanguageLearnerConfig(
            OptimizerConfig(learning_rate=1e-5, warmup_steps=0, schedule="constant"),
            RoleWeights(text_context=0.0, text_target=0.0, vision=1.0, structure=0.0),
            precision="mixed",
        )
        learner = LanguageLearner(self.transformer, config, self.vocabulary, lambda: iter(()))
        batches = self.pack_documents()

        def step(number: int, lean: bool) -> tuple[float, float]:
            metrics = learner.learn(number, batches)
            return metrics["loss"], metrics["grad_norm"]

        self.step = step

    def pack_documents(self) -> list[Any]:
        import numpy as np

        from openemu3.data.packing import Tokens, build_rows, pack

        packing = pack([len(ids) for ids, _ in self.documents], [False] * len(self.documents), self.setting.context)
        documents = [Tokens(np.array(ids), np.array(roles, np.uint8), "") for ids, roles in self.documents]
        rows = [[documents[piece.document] for piece in row] for row in packing.rows]
        self.fill_rate = packing.fill_rate
        return [
            build_rows(rows[first : first + ROWS_AT_ONCE], self.setting.context, self.vocabulary.pad)
            for first in range(0, len(rows), ROWS_AT_ONCE)
        ]

    def prepare_theirs(self) -> None:
        import torch
        from transformers import Emu3ForCausalLM, Emu3TextConfig

        config, vocabulary, context = self.config, self.vocabulary, self.setting.context
        with torch.device("meta"):
            theirs = Emu3ForCausalLM(
                Emu3TextConfig(
                    vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                    max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps, attention_dropout=0.0,
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, use_cache=False,
                )
            )  # fmt: skip
        theirs.load_state_dict(self.transformer.state_dict(), strict=True, assign=True)
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=theirs.config)  # its buffers are not in the state
        theirs.requires_grad_(True).train()
        matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), eps=1e-8, fused=True)

        ids = torch.full((len(self.documents), context), vocabulary.pad)
        for row, (document, _) in zip(ids, self.documents, strict=True):
            row[: len(document)] = torch.tensor(document)
        mask = torch.zeros_like(ids)
        for row, (document, _) in zip(mask, self.documents, strict=True):
            row[: len(document)] = 1
        labels = torch.where(ids >= vocabulary.visual_offset, ids, -100)
        num_targets = (labels != -100).sum()
        self.fill_rate = float(mask.float().mean())

        def step(number: int, lean: bool) -> tuple[float, float]:
            if lean:
                theirs.activation_checkpointing_enable()
            else:
                theirs.activation_checkpointing_disable()
            loss = 0.0
            for first in range(0, len(ids), ROWS_AT_ONCE):
                part = slice(first, first + ROWS_AT_ONCE)
                with torch.autocast("cpu", torch.bfloat16):
                    out = theirs(input_ids=ids[part], attention_mask=mask[part], labels=labels[part], num_items_in_batch=num_targets)
                out.loss.backward()
                loss += out.loss.item()
                del out
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss, float(norm)

        self.step = step

    def work(self, number: int, lean: bool = False) -> dict[str, Any]:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        loss, norm = self.step(number, lean)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
        num_tokens = sum(len(ids) for ids, _ in self.documents)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "loss": loss,
            "grad_norm": norm,
            "tokens": num_tokens,
            "fill_rate": self.fill_rate,
            "flops": self.flops,
        }


# ---- all sides


def run_setting(setting: Setting, rounds: int) -> dict[str, Any]:
    """Tokens/s and peak bytes of every side, and the two ratios. The first step is not timed: it warms up, and is compared."""
    workers: dict[str, Worker] = {}
    try:
        for program in (OURS, THEIRS):
            workers[program] = Worker(__file__, ["--worker", program, "--setting", json.dumps(asdict(setting))])
        first = {program: worker.ask(number=0) for program, worker in workers.items()}
        check_agreement(first)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        cpu_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        peaks = dict.fromkeys(SIDES, 0)
        for index in range(rounds):
            for side in SIDES if index % 2 == 0 else tuple(reversed(SIDES)):
                measured = workers[OURS if side == OURS else THEIRS].ask(number=index + 1, lean=side == THEIRS_LEAN)
                seconds[side].append(measured["seconds"])
                cpu_seconds[side].append(measured["cpu_seconds"])
                peaks[side] = max(peaks[side], measured["peak"])
    finally:
        for worker in workers.values():
            worker.close()
    cpu = {side: statistics.median(times) for side, times in cpu_seconds.items()}
    speeds = {side: first[OURS]["tokens"] / statistics.median(times) for side, times in seconds.items()}
    return asdict(setting) | {
        "rounds": rounds,
        "flops": {program: answer["flops"] for program, answer in first.items()},
        "tokens": first[OURS]["tokens"],
        "fill_rate": {program: answer["fill_rate"] for program, answer in first.items()},
        "first_step": {program: {name: answer[name] for name in ("loss", "grad_norm")} for program, answer in first.items()},
        "tokens_per_second": speeds,
        "cpu_seconds": cpu,
        "peak_bytes": peaks,
        "speed_ratio": speeds[OURS] / max(speeds[THEIRS], speeds[THEIRS_LEAN]),
        "cpu_ratio": min(cpu[THEIRS], cpu[THEIRS_LEAN]) / cpu[OURS],
        "memory_ratio": peaks[OURS] / min(peaks[THEIRS], peaks[THEIRS_LEAN]),
    }


def check_agreement(first: dict[str, dict[str, Any]]) -> None:
    """Both sides must have computed the same thing."""
    for name in ("loss", "grad_norm"):
        ours, theirs = first[OURS][name], first[THEIRS][name]
        if not abs(ours - theirs) <= MAX_DIFFERENCE * abs(theirs):
            raise RuntimeError(f"the {name} of the first step is {ours} here and {theirs} in transformers; at most 1 % apart is allowed")


def format_result(result: dict[str, Any]) -> str:
    lines = [
        f"{result['name']}: {result['num_documents']} documents, {result['tokens']:,} tokens, rows of {result['context']:,}; full to "
        f"{result['fill_rate'][OURS]:.0%} packed, {result['fill_rate'][THEIRS]:.0%} padded; first loss "
        + ", ".join(f"{values['loss']:.4f} (gradient norm {values['grad_norm']:.4f})" for values in result["first_step"].values())
    ]
    ours, theirs = (result["flops"][program] / 1e12 for program in (OURS, THEIRS))
    lines.append(f"  {ours:.2f} TFLOP a step packed, {theirs:.2f} padded: {theirs / ours:.2f}x by arithmetic alone")
    for side in SIDES:
        lines.append(
            f"  {side:<26}{result['tokens_per_second'][side]:8,.0f} tokens/s   {result['cpu_seconds'][side]:7.1f} s of processors"
            f"   peak {result['peak_bytes'][side] / 2**20:7,.0f} MiB"
        )
    verdicts = (
        "met" if result["speed_ratio"] >= TARGET_SPEED else "missed",
        "met" if result["memory_ratio"] <= TARGET_MEMORY else "missed",
    )
    lines.append(
        f"  {result['speed_ratio']:.2f}x the tokens/s (target {TARGET_SPEED:g}x: {verdicts[0]}), {result['cpu_ratio']:.2f}x by processor "
        f"time; {result['memory_ratio']:.2f}x the peak (target {TARGET_MEMORY:g}x: {verdicts[1]})"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrower network, mixed documents alone, two rounds")
    parser.add_argument("--rounds", type=int, help="steps of every side (default 3; quick: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--worker", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(Trainer(arguments.worker, Setting(**json.loads(arguments.setting))).work)
        return
    began = time.perf_counter()
    print(f"training step, 8 layers, 184,622 ids, fp32 weights, bf16 products; {platform.processor() or platform.machine()}")
    results = []
    for setting in choose_settings(arguments.quick):
        results.append(run_setting(setting, arguments.rounds or (2 if arguments.quick else 3)))
        print(format_result(results[-1]), flush=True)
    print(f"in {time.perf_counter() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
