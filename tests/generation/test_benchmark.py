"""The benchmark runs: both sides draw a tiny picture from the same weights and report seconds and memory."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "generation.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openemu3", "transformers"])
def test_both_sides_of_the_benchmark_draw(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)  # what the benchmarks share is found beside them
    spec = importlib.util.spec_from_file_location("benchmark_generation", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    worker = module.Side(name)
    try:
        for case in (module.Case(3, 2, 0, 3), module.Case(3, 1, 1, 1)):
            measured = worker.measure(case, seed=0)
            assert 0 < measured["seconds"] < 60
            assert measured["peak"] > 400 * 2**20  # the weights alone
    finally:
        worker.close()
        del sys.modules[spec.name]
