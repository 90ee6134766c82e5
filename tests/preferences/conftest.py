"""A database with made-up candidates, and a real server over it."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from openemu3.preferences.store import Store, open_store
from openemu3.preferences.voting import build_app

sys.path.insert(0, str(Path(__file__).parent))  # made_up_votes

from made_up_votes import FINGERPRINT, fill


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Two prompts: candidates 0 ... 3 of "a red apple" and 10 ... 12 of "a blue wave"."""
    with open_store(tmp_path / "votes.sqlite", create=True, fingerprint=FINGERPRINT) as opened:
        fill(opened)
        yield opened


Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function (store) -> port of a uvicorn server over it, which runs in a thread until the test ends."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(store: Store, voters_per_prompt: int = 3) -> int:
        app = build_app(store, voters_per_prompt)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, server_header=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return server.servers[0].sockets[0].getsockname()[1]

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()
