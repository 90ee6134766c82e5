"""What the benchmarks that compare two programs share: each side in a process of its own, asked by JSON lines, with its own peak memory.

In the worker process: `serve(work)`, where `work` turns one command into one answer. In the benchmark: `Worker(script, arguments)`,
whose `ask` sends a command and waits for the answer. The surprising thing: peaks are of the resident set and reset before every command,
so that each belongs to what was asked, weights included.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def serve(work: Callable[..., dict[str, Any]]) -> None:
    """Answer commands until stdin ends. A command is the keyword arguments of `work`; its answer gets the peak in bytes, if it has none."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
        answer = work(**command)
        answer.setdefault("peak", read_peak())
        print(json.dumps(answer), flush=True)


def read_peak() -> int:
    """Highest resident set in bytes since the last reset."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


class Worker:
    """A process that runs `script` with `arguments` and serves. Ready to be asked once it is made."""

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen([sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate()
