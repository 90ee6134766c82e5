"""Starting: what does not fit is refused in one sentence; a single process needs nothing of all this."""

import pytest
import torch

from openemu3.distributed import ParallelConfig, any_rank, data_rank, distributed_run, is_first, start_distributed, sum_over
from openemu3.records import InputError


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dp": 0}, "dp is 0; a whole number of at least 1 is allowed"),
        ({"tp": 2.0}, "tp is 2.0; a whole number"),
        ({"dp": 4, "replicate": 3}, r"replicate is 3; a divisor of dp \(4\)"),
        ({"activation_checkpointing": "some"}, "activation_checkpointing is 'some'; none, selective or full"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0; a finite number above 0"),
    ],
)
def test_configurations_that_mean_nothing(fields: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ParallelConfig(**fields)


@pytest.mark.parametrize("num_processes", [1, 3, 8])
def test_a_mesh_of_another_size_than_the_number_of_processes(num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    with pytest.raises(InputError, match=f"mesh dp 2 x cp 1 x tp 2 has 4 ranks, but the number of processes is {num_processes};.*torchrun"):
        start_distributed(ParallelConfig(dp=2, tp=2))


def test_an_environment_that_torchrun_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="environment variable WORLD_SIZE is 'two'; a whole number is allowed"):
        start_distributed(ParallelConfig(dp=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="the 2 processes did not find each other"):
        start_distributed(ParallelConfig(dp=2))


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two ranks waits for the second as long as it was told to, not for ever."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="the 2 processes did not find each other within 1 seconds"):
        start_distributed(ParallelConfig(dp=2, timeout_seconds=1))


def test_one_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed_run(ParallelConfig()) as mesh:
        assert mesh is None and not torch.distributed.is_initialized()
    values = torch.tensor([1.0, 2.0])
    assert sum_over(None, values) is values
    assert data_rank(None) == (0, 1) and is_first(None)
    assert any_rank(None, True) and not any_rank(None, False)
