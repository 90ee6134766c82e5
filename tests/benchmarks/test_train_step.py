"""The benchmark of the training step runs: both sides compute the same first step of the same documents, and ratios come out."""

import importlib.util
import sys
from pathlib import Path

import pytest

from openemu3.tokenization.sequence import Vocabulary

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)  # what the benchmarks share is found beside them
    spec = importlib.util.spec_from_file_location("benchmark_train_step", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_both_sides_train_the_same(benchmark):
    result = benchmark.run_setting(benchmark.Setting("mixed", 64, 96, 4, (3, 6, 4)), rounds=1)
    first = result["first_step"]
    assert first["openemu3"]["loss"] == pytest.approx(first["transformers"]["loss"], rel=1e-3)
    assert result["tokens"] > 4 * 20 and result["fill_rate"]["openemu3"] > result["fill_rate"]["transformers"]
    assert result["speed_ratio"] > 0 and result["cpu_ratio"] > 0
    assert result["flops"]["transformers"] > 1.2 * result["flops"]["openemu3"]  # nothing is computed for padding
    assert min(result["peak_bytes"].values()) > 16 * 184_622 * 64 * 2  # the states alone
    assert "met" in benchmark.format_result(result) or "missed" in benchmark.format_result(result)


def test_sides_that_disagree_are_refused(benchmark):
    first = {"openemu3": {"loss": 12.0, "grad_norm": 1.0}, "transformers": {"loss": 12.0, "grad_norm": 1.02}}
    with pytest.raises(RuntimeError, match="grad_norm of the first step is 1.0 here and 1.02"):
        benchmark.check_agreement(first)


def test_documents_fit_their_rows(benchmark):
    """Of "mixed" documents some are far shorter than a row; of "full" ones each fills one."""
    for setting in (*benchmark.choose_settings(quick=False), *benchmark.choose_settings(quick=True)):
        trainer = object.__new__(benchmark.Trainer)
        trainer.setting, trainer.vocabulary = setting, Vocabulary()
        lengths = [len(ids) for ids, roles in trainer.build_documents() if len(ids) == len(roles)]
        assert len(lengths) == setting.num_documents and max(lengths) <= setting.context
        assert (set(lengths) == {setting.context}) == (setting.name == "full")
