"""A child process for what may hang or crash on strangers' files: it is given one file at a time, and killed when it takes too long.

In: the name of a function (arguments: dict, payload: bytes, alive) -> (answer: dict, payloads: list of bytes), and what to call it with.
Out: its answer, or InputError with the reason: what the function raised, "took longer than ...", or "crashed". The surprising things: the
time limit is for work without a sign of progress, which the function gives by calling `alive`, so that a film of hours may take hours and
is still noticed when it hangs; and the child also ends itself, by a timer below Python, so that none is left behind when this process is
killed.

One message is: length of the JSON, length of the payload (two unsigned 64-bit numbers), the JSON, the payload.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from openemu3.records import InputError

Alive = Callable[[], None]
Function = Callable[[dict[str, Any], bytes, Alive], tuple[dict[str, Any], Sequence[bytes]]]

_HEADER = struct.Struct("<QQ")
# A child that decodes may not take more; damaged headers ask for anything. Address space, so generous.
MAX_MEMORY = 12 << 30
START_SECONDS = 120.0
# Signs of progress are passed on no more often than that.
_SIGN_SECONDS = 0.2


class TookTooLong(InputError):
    """The time limit was reached."""


class Crashed(InputError):
    """The child ended in the middle of its work."""


class Guard:
    """One child process, started at the first call and again after each time that it had to be killed.

    function  "package.module:name"; imported in the child alone.
    seconds   longest time for one call without a sign of progress.
    prepare   "package.module:name" of a function that the child calls before its first work, outside of the time limit: it loads models.
    """

    def __init__(self, function: str, seconds: float, prepare: str = "") -> None:
        self._child: subprocess.Popen[bytes] | None = None
        if not 0 < seconds < 1e6:
            raise InputError(f"time limit is {seconds}; allowed are more than 0 and fewer than 1000000 seconds")
        self.function, self.seconds, self.prepare = function, seconds, prepare
        self._lock = threading.Lock()

    def call(self, arguments: dict[str, Any], payload: bytes = b"", seconds: float | None = None) -> tuple[dict[str, Any], memoryview]:
        """The function's answer, and its payloads one after the other. Raises InputError as the function does, TookTooLong or Crashed."""
        limit = self.seconds if seconds is None else seconds
        with self._lock:
            for attempt in range(2):
                child = self._start()
                try:
                    assert child.stdin is not None and child.stdout is not None
                    _send(child.stdin, {"seconds": limit, "arguments": arguments}, [payload])
                except OSError:  # it ended while it had nothing to do
                    self.close()
                    if attempt:
                        raise
                    continue
                break
            try:
                assert child.stdout is not None  # a pipe was asked for
                answer, returned = _receive(child.stdout, time.monotonic() + limit)
                while answer == _SIGN:
                    answer, returned = _receive(child.stdout, time.monotonic() + limit)
            except TimeoutError:
                self.close()
                raise TookTooLong(f"took longer than {limit:g} s") from None
            except EOFError:
                status = child.wait()
                self.close()
                raise Crashed(f"crashed: the decoder's process ended with status {status}") from None
        if "refused" in answer:
            raise InputError(str(answer["refused"]))
        return answer, returned

    def close(self) -> None:
        """Ends the child. It starts again with the next call."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "openemu3.curation.guard", self.function, self.prepare]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment)
        assert child.stdout is not None
        try:
            _receive(child.stdout, time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError) as error:
            child.kill()
            raise RuntimeError(f"the process for {self.function} did not start") from error
        self._child = child
        return child

    def __del__(self) -> None:
        self.close()


def _send(pipe: IO[bytes], message: dict[str, Any], payloads: Sequence[bytes]) -> None:
    text = json.dumps(message).encode()
    for data in (_HEADER.pack(len(text), sum(map(len, payloads))), text, *payloads):
        view = memoryview(data)
        while view:
            view = view[pipe.write(view) :]


def _receive(pipe: IO[bytes], deadline: float | None) -> tuple[dict[str, Any], memoryview]:
    """Raises EOFError when the other side is gone, TimeoutError at the deadline."""
    text_length, payload_length = _HEADER.unpack(_read_exactly(pipe, _HEADER.size, deadline))
    text = _read_exactly(pipe, text_length, deadline)
    return json.loads(bytes(text)), memoryview(_read_exactly(pipe, payload_length, deadline))


def _read_exactly(pipe: IO[bytes], size: int, deadline: float | None) -> bytearray:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        if deadline is not None and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        count = os.readv(pipe.fileno(), [view[filled : filled + (1 << 20)]])
        if count == 0:
            raise EOFError
        filled += count
    return buffer


_SIGN = {"alive": True}


def _serve(name: str, prepare: str) -> None:
    """The child's life: calls, one after the other, until its input ends."""
    # Standard output belongs to the messages; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    calls = os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    devnull = open(os.devnull, "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    function: Function = _find(name)
    if prepare:
        _find(prepare)()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(answers, {"ready": True}, [])
    while True:
        try:
            message, payload = _receive(calls, None)
        except EOFError:
            return
        limit, told = message["seconds"], time.monotonic()

        def give_sign(limit: float = limit) -> None:
            nonlocal told
            if time.monotonic() - told > _SIGN_SECONDS:
                with contextlib.suppress(BrokenPipeError):
                    _send(answers, _SIGN, [])
                faulthandler.dump_traceback_later(limit + 5, exit=True, file=devnull)
                told = time.monotonic()

        faulthandler.dump_traceback_later(limit + 5, exit=True, file=devnull)
        try:
            answer, returned = function(message["arguments"], bytes(payload), give_sign)
        except (InputError, MemoryError) as error:
            answer, returned = {"refused": str(error) or "not enough memory to decode it"}, []
        finally:
            faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(BrokenPipeError):  # whoever asked is gone; the next call ends this
            _send(answers, answer, returned)


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
