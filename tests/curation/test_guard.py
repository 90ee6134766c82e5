"""The guarded process: answers, refusals, and what hangs, crashes or asks for all memory; none of it stops the one that asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openemu3.curation.guard import Crashed, Guard, TookTooLong
from openemu3.records import InputError

STRANGER = """
import os, time
from openemu3.records import InputError

def act(arguments, payload, alive):
    what = arguments["what"]
    if what == "double":
        print("noise on standard output", flush=True)
        return {"length": len(payload)}, [payload, payload]
    if what == "refuse":
        raise InputError("not this one")
    if what == "work":
        for _ in range(10):
            time.sleep(0.25)
            alive()
    if what == "hang":
        time.sleep(3600)
    if what == "crash":
        os.abort()
    if what == "memory":
        bytearray(1 << 45)
    return {"pid": os.getpid()}, []
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "stranger.py").write_text(STRANGER)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    guard = Guard("stranger:act", 30.0)
    yield guard
    guard.close()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_answers_come_back_with_large_payloads(guard: Guard) -> None:
    payload = os.urandom(3_000_001)
    answer, returned = guard.call({"what": "double"}, payload)
    assert answer == {"length": 3_000_001} and returned == payload * 2


@pytest.mark.parametrize("what", ["refuse", "memory"])
def test_a_refusal_leaves_the_child_alive(guard: Guard, what: str) -> None:
    pid = guard.call({"what": "pid"})[0]
    with pytest.raises(InputError, match="not this one|memory"):
        guard.call({"what": what})
    assert guard.call({"what": "pid"})[0] == pid


def test_what_hangs_is_killed_in_time_and_the_next_call_works(guard: Guard) -> None:
    guard.call({"what": "pid"})
    began = time.monotonic()
    with pytest.raises(TookTooLong, match="took longer than 0.5 s"):
        guard.call({"what": "hang"}, seconds=0.5)
    assert time.monotonic() - began < 10
    assert guard.call({"what": "double"}, b"x")[1] == b"xx"


def test_what_takes_long_but_goes_on_is_let_go_on(guard: Guard) -> None:
    guard.call({"what": "pid"})
    assert "pid" in guard.call({"what": "work"}, seconds=1.5)[0]  # 2.5 s in all
    with pytest.raises(TookTooLong):
        guard.call({"what": "hang"}, seconds=0.5)


def test_a_crash_is_told_and_the_next_call_works(guard: Guard) -> None:
    with pytest.raises(Crashed, match="crashed"):
        guard.call({"what": "crash"})
    assert guard.call({"what": "double"}, b"x")[1] == b"xx"


def test_a_child_that_was_killed_from_outside_is_replaced(guard: Guard) -> None:
    pid = guard.call({"what": "pid"})[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert guard.call({"what": "pid"})[0]["pid"] != pid


def test_a_child_that_hangs_ends_itself_when_its_parent_is_killed(guard: Guard) -> None:
    code = (
        "from openemu3.curation.guard import Guard\n"
        "guard = Guard('stranger:act', 30.0)\n"
        "print(guard.call({'what': 'pid'})[0]['pid'], flush=True)\n"
        "guard.call({'what': 'hang'}, seconds=1.5)\n"
    )
    # The child has 5 s more than its limit; the parent is killed before it could end the child.
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.1)


def test_a_time_limit_must_be_one() -> None:
    with pytest.raises(InputError, match="time limit is 0"):
        Guard("stranger:act", 0)
