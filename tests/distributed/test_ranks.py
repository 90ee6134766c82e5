"""Many ranks compute what one computes, to rounding: losses, gradients, checkpoints. And when one of them is lost, all of them end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RANKS = Path(__file__).with_name("ranks.py")


def run(folder: Path, *arguments: str, seconds: float = 900) -> tuple[list[int], str]:
    """(exit codes of all ranks, what they said)."""
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(RANKS), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout), done.stderr


def list_errors(said: str) -> str:
    """The last lines of all ranks' tracebacks."""
    return "\n".join(line for line in said.splitlines() if "Error" in line)


def check_equal(folder: Path, *cases: str) -> None:
    """Losses and gradient norms of five steps, and every gradient of the first; sums in another order are all that may differ."""
    codes, said = run(folder, "equal", *cases)
    assert not any(codes), list_errors(said)
    for case in cases:
        single = "single-kv1" if case == "cp2_gathered" else "single-kv2" if case == "cp4_mixed" else "single-kv4"
        found, expected = (json.loads((folder / f"{stem}.json").read_text()) for stem in (case, single))
        assert len(found["loss"]) == 5 and expected["loss"][-1] < expected["loss"][0]
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), (case, name)
        gradients, expected_gradients = (load_file(folder / f"{stem}.safetensors") for stem in (case, single))
        assert gradients.keys() == expected_gradients.keys()
        assert len(gradients) == 3 + 2 * 9  # embedding, last norm and head; seven matrices and two norms in each of two layers
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, (case, name)
            assert (gradient - expected_gradients[name]).norm() < 1e-5 * expected_gradients[name].norm(), (case, name)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    check_equal(tmp_path, "dp2", "tp2", "cp2", "cp2_gathered")


def test_four_ranks_equal_one(tmp_path: Path) -> None:
    check_equal(tmp_path, "dp2_tp2", "dp2_cp2", "cp4_mixed")


@pytest.mark.slow
def test_more_meshes_equal_one_rank(tmp_path: Path) -> None:
    check_equal(tmp_path, "tp2_full", "cp2_selective", "tp2_compiled", "cp2_tp2", "dp4_replicate2")


@pytest.mark.slow
def test_eight_ranks_equal_one(tmp_path: Path) -> None:
    check_equal(tmp_path, "dp2_cp2_tp2", "cp4_tp2_mixed", "dp4_tp2_replicate2")


def test_checkpoints_pass_between_meshes_and_the_parted_head_has_the_loss_of_the_whole_one(tmp_path: Path) -> None:
    codes, said = run(tmp_path, "pieces")
    assert codes == [0] * (4 + 1 + 2 + 2), list_errors(said)
    copies = load_file(tmp_path / "copies.safetensors")
    assert len(copies) == 21 * 4  # weights, two moments and the number of updates
    assert all(bool(torch.isfinite(tensor).all()) for tensor in copies.values())


def test_when_a_rank_is_lost_all_end(tmp_path: Path) -> None:
    codes, said = run(tmp_path, "lost")
    assert codes == [1, -9, 1] + [1, -9, 1, 1]
    for rank in (0, 2):
        assert f"RankError: rank {rank} of 3 lost another rank, or waited 300 seconds" in said  # it was killed
    for rank in (0, 2, 3):
        assert f"RankError: rank {rank} of 4 lost another rank, or waited 2 seconds" in said  # it stood still
