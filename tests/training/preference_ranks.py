"""DPO in small on many ranks, and on one. Not a test: test_preference_ranks.py starts it as a process.

    python preference_ranks.py OUTPUT CASE ...     CASE.json: the reference's log-probabilities, and the metrics of each step

Prints the exit codes of all ranks as JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from ranks import MODEL, run_ranks

from openemu3.data.pairs import PreferencePair
from openemu3.distributed import ParallelConfig, data_rank, distributed_run, is_first
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.parallelize import fill_weights, parallelize
from openemu3.model.transformer import Transformer
from openemu3.tokenization.sequence import Vocabulary
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.preference_learner import (
    PairBatches,
    PreferenceLearner,
    PreferenceLearnerConfig,
    PreferenceObjectiveConfig,
    Scorer,
    compute_reference,
)

VOCABULARY = Vocabulary(300, 64)
CASES = {
    "one": ParallelConfig(),
    "dp2": ParallelConfig(dp=2),
    "cp2": ParallelConfig(cp=2),
    "tp2": ParallelConfig(tp=2),
    "dp2_cp2": ParallelConfig(dp=2, cp=2),
    "dp2_tp2": ParallelConfig(dp=2, tp=2),
}


def make_pairs() -> list[PreferencePair]:
    """Nine, so that no number of ranks divides them, of prompts of several lengths."""
    random = np.random.default_rng(0)
    pairs = []
    for number in range(9):
        prompt = np.array([VOCABULARY.bos, *random.integers(0, 300, 2 + 3 * number), VOCABULARY.boi, VOCABULARY.img])
        chosen, rejected = VOCABULARY.visual_offset + random.integers(0, 64, (2, 12))
        pairs.append(PreferencePair(f"prompt {number}", prompt, chosen, rejected[: 12 - number], "image", 2.0, 1.0))
    return pairs


def train(folder: Path, case: str) -> None:
    parallel = CASES[case]
    with distributed_run(parallel) as mesh:
        transformer = Transformer(MODEL)
        parallelize(transformer, mesh, parallel)
        fill_weights(transformer, torch.Generator().manual_seed(5))
        scorer = Scorer(transformer, "fp32", ContextSplit(MODEL, mesh), mesh)
        pairs = compute_reference(scorer, make_pairs(), VOCABULARY, pairs_per_rank=2, multiple=8)
        rank, dp = data_rank(mesh)
        replay = [np.concatenate((pair.prompt_ids, pair.chosen_ids)) for pair in pairs[::2]]
        batches = PairBatches(pairs, VOCABULARY, 2, multiple=8, dp=dp, rank=rank, replay=replay)
        held_out = PairBatches(pairs[:4], VOCABULARY, 4, multiple=8, dp=dp, rank=rank)
        optimizer = OptimizerConfig(3e-3, 10, 0, schedule="constant", weight_decay=0.0, eps=1e-4)
        config = PreferenceLearnerConfig(optimizer, PreferenceObjectiveConfig(0.2, 0.5), "fp32")
        learner = PreferenceLearner(transformer, config, held_out.read_in_order, mesh=mesh)
        source = batches(0)
        rows = [learner.learn(step, [next(source), next(source)]) for step in range(3)]
        rows.append(learner.validate())
        if is_first(mesh):
            references = [[pair.reference_chosen, pair.reference_rejected] for pair in pairs]
            (folder / f"{case}.json").write_text(json.dumps({"references": references, "steps": rows}))


if __name__ == "__main__":
    output, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    codes = [code for name in names for code in run_ranks(CASES[name].num_ranks, [partial(train, output, name)])]
    json.dump(codes, sys.stdout)
