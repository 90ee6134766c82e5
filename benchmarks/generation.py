"""Guided pictures on a CPU: this repository's engine beside transformers' `generate`, same random weights, both in bf16.

    python benchmarks/generation.py            about five minutes on two quiet cores
    python benchmarks/generation.py --quick    about one minute: 16x16 alone, one round, and a few rows of the rest

The model is small (512 wide, 8 layers) with the full vocabulary of 184,622 ids. transformers runs the recipe of its documentation:
guidance_scale, negative prompt, prefix_allowed_tokens_fn that returns the list of visual ids, sampling with top_k 2048.

Each side is a process of its own, so that its peak memory (resident set, reset before every case) is its own. Cases are interleaved,
round by round, and medians are printed. Pictures of 16x16 tokens are timed whole. Of pictures of 32x32 tokens, and of 16x16 in a
batch of 8, two rows are timed at the beginning, in the middle and at the end (with the rows before given, their reading not timed),
and the seconds of a picture are rows x the mean of the three.
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

TARGETS = {1: 3.0, 8: 5.0}
SIDES = ("openemu3", "transformers")


@dataclass(frozen=True)
class Case:
    """Rows first_row ... first_row + num_rows - 1 of `batch` pictures of side x side tokens; whole pictures where that is all rows."""

    side: int
    batch: int
    first_row: int
    num_rows: int

    @property
    def is_whole(self) -> bool:
        return self.num_rows == self.side


def choose_cases(quick: bool) -> dict[tuple[int, int], list[Case]]:
    """(side, batch) -> what is timed of it."""

    def stretches(side: int, batch: int) -> list[Case]:
        num_rows = 1 if quick else 2
        return [Case(side, batch, first, num_rows) for first in (0, (side - num_rows) // 2, side - num_rows)]

    whole = [Case(16, 1, 0, 16)]
    return {(16, 1): whole, (32, 1): stretches(32, 1), (16, 8): stretches(16, 8), (32, 8): stretches(32, 8)}


# ---- one side, in its own process


class Drawer:
    """The network of one side, and how it draws."""

    def __init__(self, name: str) -> None:
        import torch

        from openemu3.model.transformer import TransformerConfig, build_transformer
        from openemu3.tokenization.sequence import Vocabulary

        torch.manual_seed(0)
        self.vocabulary = Vocabulary()
        config = TransformerConfig(
            vocab_size=self.vocabulary.size, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=2,
            head_dim=64, max_positions=4096,
        )  # fmt: skip
        self.transformer = build_transformer(config, torch.Generator().manual_seed(0), torch.bfloat16).eval()
        if name == "transformers":
            self.theirs = self._convert(config)
        self.draw = self.draw_theirs if name == "transformers" else self.draw_ours

    def _convert(self, config: Any) -> Any:
        """Their module over the same memory."""
        import torch
        from transformers import Emu3ForCausalLM, Emu3TextConfig

        with torch.device("meta"):
            theirs = Emu3ForCausalLM(
                Emu3TextConfig(
                    vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
                    max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps,
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                )
            )  # fmt: skip
        theirs.load_state_dict(self.transformer.state_dict(), strict=True, assign=True)
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=theirs.config)  # its buffers are not in the state
        return theirs.eval()

    def build_prompts(self, case: Case) -> tuple[list[list[int]], list[list[int]], Any]:
        """Conditional and unconditional prompts with the given rows, and the layout of the rows to draw."""
        import numpy as np

        vocabulary = self.vocabulary
        rng = np.random.default_rng(case.side)
        row = [-1] * case.side + [vocabulary.eol]
        layout = np.array(row * case.side + [vocabulary.eof, vocabulary.eoi, vocabulary.eos])
        cut = case.first_row * len(row)
        digits = [15 + int(digit) for digit in str(case.side)]  # published ids of the digits; 9 is "*"
        conditional, unconditional = [], []
        for _ in range(case.batch):
            given = np.where(
                layout[:cut] < 0, vocabulary.visual_offset + rng.integers(vocabulary.num_codes, size=cut), layout[:cut]
            ).tolist()
            for prompts, length in ((conditional, 20), (unconditional, 40)):
                words = rng.integers(1000, 100_000, length).tolist()
                prompts.append([vocabulary.bos, *words, vocabulary.boi, *digits, 9, *digits, vocabulary.img, *given])
        end = len(layout) if case.first_row + case.num_rows == case.side else cut + case.num_rows * len(row)
        return conditional, unconditional, layout[cut:end]

    def draw_ours(self, case: Case, seed: int) -> float:
        from openemu3.generation.engine import Engine, Request
        from openemu3.generation.sampling import SamplingSettings

        conditional, unconditional, layout = self.build_prompts(case)
        requests = [
            Request(prompt, layout, negative, settings=SamplingSettings(seed=seed), stream=index)
            for index, (prompt, negative) in enumerate(zip(conditional, unconditional, strict=True))
        ]
        marks = [time.perf_counter()]
        done = Engine(self.transformer, self.vocabulary).generate(requests, lambda *_: marks.append(time.perf_counter()))
        assert all(len(completion.token_ids) == len(layout) for completion in done)
        return time.perf_counter() - marks[0 if case.is_whole else 1]

    def draw_theirs(self, case: Case, seed: int) -> float:
        import torch

        vocabulary, theirs = self.vocabulary, self.theirs
        conditional, unconditional, layout = self.build_prompts(case)
        visual_ids = list(range(vocabulary.visual_offset, vocabulary.size))
        height = width = case.side
        marks = [time.perf_counter()]

        def allow(batch_index: int, ids: Any) -> Any:
            """As in the documentation of transformers' Emu3."""
            position = torch.nonzero(ids == vocabulary.img, as_tuple=True)[0][0]
            offset = ids.shape[0] - position
            if offset % (width + 1) == 0:
                return (vocabulary.eol,)
            if offset == (width + 1) * height + 1:
                return (vocabulary.eof,)
            if offset == (width + 1) * height + 2:
                return (vocabulary.eoi,)
            if offset == (width + 1) * height + 3:
                return (vocabulary.eos,)
            if offset > (width + 1) * height + 3:
                return (vocabulary.pad,)
            return visual_ids

        def mark(ids: Any, scores: Any) -> Any:
            marks.append(time.perf_counter())
            return scores

        torch.manual_seed(seed)
        ids = theirs.generate(
            torch.tensor(conditional),
            attention_mask=torch.ones(case.batch, len(conditional[0]), dtype=torch.int64),
            negative_prompt_ids=torch.tensor(unconditional),
            negative_prompt_attention_mask=torch.ones(case.batch, len(unconditional[0]), dtype=torch.int64),
            guidance_scale=3.0,
            prefix_allowed_tokens_fn=allow,
            logits_processor=[mark],
            do_sample=True,
            top_k=2048,
            max_new_tokens=len(layout),
            eos_token_id=None,
            pad_token_id=vocabulary.pad,
        )
        assert ids.shape[1] == len(conditional[0]) + len(layout)
        return time.perf_counter() - marks[0 if case.is_whole else 1]

    def work(self, case: dict[str, int], seed: int) -> dict[str, Any]:
        return {"seconds": self.draw(Case(**case), seed)}


# ---- both sides


class Side(Worker):
    """A worker process."""

    def __init__(self, name: str) -> None:
        super().__init__(__file__, ["--worker", name])

    def measure(self, case: Case, seed: int) -> dict[str, Any]:
        return self.ask(case=asdict(case), seed=seed)


def run(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """One result for every (side, batch): seconds of a picture (of the whole batch) and peak bytes on both sides, and their ratio."""
    workers = {name: Side(name) for name in SIDES}
    try:
        for worker in workers.values():
            worker.measure(Case(8, 1, 0, 8), seed=0)  # first calls pay for what is set up once
        results = []
        for (side, batch), cases in choose_cases(quick).items():
            seconds: dict[str, dict[Case, list[float]]] = {name: {case: [] for case in cases} for name in SIDES}
            peaks = dict.fromkeys(SIDES, 0)
            for round_index in range(rounds):
                for case in cases:
                    for name in SIDES if round_index % 2 == 0 else reversed(SIDES):
                        measured = workers[name].measure(case, seed=round_index)
                        seconds[name][case].append(measured["seconds"])
                        peaks[name] = max(peaks[name], measured["peak"])
            picture = {
                name: side * statistics.mean(statistics.median(times) / case.num_rows for case, times in seconds[name].items())
                for name in SIDES
            }
            result = {
                "side": side,
                "batch": batch,
                "whole": cases[0].is_whole,
                "rounds": rounds,
                "seconds": picture,
                "peak_bytes": peaks,
                "ratio": picture["transformers"] / picture["openemu3"],
                "target": TARGETS[batch],
            }
            results.append(result)
            print(format_result(result), flush=True)
        return results
    finally:
        for worker in workers.values():
            worker.close()


def format_result(result: dict[str, Any]) -> str:
    ours, theirs = result["seconds"]["openemu3"], result["seconds"]["transformers"]
    peaks = [result["peak_bytes"][name] / 2**20 for name in SIDES]
    verdict = "met" if result["ratio"] >= result["target"] else "missed"
    return (
        f"{result['side']:>3} x {result['side']:<3} batch {result['batch']}   openemu3 {ours:8.2f} s   transformers {theirs:8.2f} s   "
        f"{result['ratio']:5.2f}x (target {result['target']:g}x: {verdict})   peak {peaks[0]:,.0f} / {peaks[1]:,.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round and fewer rows")
    parser.add_argument("--rounds", type=int, help="measurements of every case (default 3; quick: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(Drawer(arguments.worker).work)
        return
    began = time.perf_counter()
    print(f"guided pictures, 512 wide, 8 layers, 184,622 ids, bf16; {platform.processor() or platform.machine()}; seconds for the batch")
    results = run(arguments.quick, arguments.rounds or (1 if arguments.quick else 3))
    print(f"in {time.perf_counter() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
