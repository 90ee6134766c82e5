"""DPO on many ranks is DPO on one, to rounding: references, losses, rewards and gradient norms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("preference_ranks.py")


def check_equal(folder: Path, *cases: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(SCRIPT), str(folder), "one", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and not any(json.loads(done.stdout)), done.stderr[-4000:]
    expected = json.loads((folder / "one.json").read_text())
    assert len(expected["references"]) == 9 and expected["steps"][-1]["margin"] > 0.05  # something was learnt
    del expected["steps"][0]["accuracy"]  # of margins that are 0, but for rounding
    for case in cases:
        found = json.loads((folder / f"{case}.json").read_text())
        for one, other in zip(found["references"], expected["references"], strict=True):
            assert one == pytest.approx(other, rel=1e-5), case
        del found["steps"][0]["accuracy"]
        for one, other in zip(found["steps"], expected["steps"], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5), case


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    check_equal(tmp_path, "dp2", "cp2", "tp2")


@pytest.mark.slow
def test_four_ranks_equal_one(tmp_path: Path) -> None:
    check_equal(tmp_path, "dp2_cp2", "dp2_tp2")
