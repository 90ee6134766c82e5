"""The same database on a real PostgreSQL server, which the test starts in a folder of its own."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from made_up_votes import FINGERPRINT, Client, fill, key_of, make_prompt

from openemu3.preferences.store import RemovedCandidate, UnknownThing, UnknownToken, Vote, VoteRecord, open_store
from openemu3.records import InputError


def find_program(name):
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(installed[-1]) if installed else shutil.which(name)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_program("initdb") is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)"),
]


@pytest.fixture(scope="module")
def server():
    """The URL of a server without a database."""
    as_user = {}
    with tempfile.TemporaryDirectory(prefix="openemu3-postgresql-") as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)

        def run(name, *arguments):
            command = [find_program(name), "-D", f"{folder}/data", *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)

        run("initdb", "-U", "emu3", "-A", "trust", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-w", "-t", "120", "-o", options, "-l", f"{folder}/log", "start")
        yield f"postgresql://emu3@127.0.0.1:{port}"
        run("pg_ctl", "-m", "immediate", "-t", "120", "stop")


@pytest.fixture
def url(server, request):
    """A new, empty database."""
    name = f"votes_{abs(hash(request.node.name))}"
    address = server.removeprefix("postgresql://emu3@").split(":")
    subprocess.run([find_program("createdb"), "-h", address[0], "-p", address[1], "-U", "emu3", name], check=True)
    return f"{server}/{name}"


def test_everything_that_sqlite_does(url, serve):
    with pytest.raises(InputError, match="holds no preferences"):
        open_store(url)
    with open_store(url, create=True, fingerprint=FINGERPRINT) as store:
        fill(store)
        fill(store)  # twice is once
        port = serve(store)
        ann = Client(port, store.invite("Ann"))
        assert len(ann.get("/api/tasks").json["tasks"]) == 2
        assert ann.vote(key_of(0), appeal=4, alignment=2).status == 200
        assert ann.vote(key_of(0), appeal=5).json["appeal"] == 5
        assert ann.ask("POST", "/api/undo").json["undone"] == {
            "prompt": make_prompt().key, "candidate": key_of(0), "appeal": 4, "alignment": 2,
        }  # fmt: skip
        assert ann.get(f"/api/media/{key_of(2)}").body == store.read_media(key_of(2))[1]
        store.remove_candidate(key_of(1))
        assert ann.vote(key_of(1), appeal=1).status == 410 and ann.vote("\0", appeal=1).status == 404
        voter = store.find_voter(store.invite("Zoë 一"))
        with pytest.raises(RemovedCandidate):
            store.vote(voter, key_of(1), Vote(1, 1))
        with pytest.raises(UnknownThing):
            store.vote(voter, "\ud800", Vote(1, 1))
        with pytest.raises(UnknownToken):
            store.find_voter("\0.\0")
        assert store.import_votes([VoteRecord(key_of(2), "Bea", Vote(3, None), "")]).added == 1
        with pytest.raises(UnknownThing):
            store.import_votes([VoteRecord(key_of(3), "Cid", Vote(3, 3), ""), VoteRecord(key_of(99), "Cid", Vote(3, 3), "")])
        assert [(record.voter, record.vote) for record in store.read_votes()] == [("Ann", Vote(4, 2)), ("Bea", Vote(3, None))]
        first, second = store.read_ballots()
        assert [candidate.key for candidate in first.candidates] == [key_of(0), key_of(2), key_of(3)]
        assert second.candidates[0].token_ids.tolist() == [110, 7, 9] and second.candidates[0].token_ids.dtype == np.uint32
    with open_store(url) as store:
        assert len(list(store.read_votes())) == 2
    with pytest.raises(InputError, match="other tokenizers"):
        open_store(url, fingerprint="f" * 32)


def test_threads_lose_no_vote(url):
    """Eight voters at once, each in two windows; the database is made by all of them at once too."""
    wrong = []

    def click(name, window):
        try:
            with open_store(url, create=True, fingerprint=FINGERPRINT) as store:
                fill(store)
                token = tokens.get(name) or store.invite(name)
                voter = store.find_voter(token)
                for key in np.random.default_rng(window).permutation(4):
                    store.vote(voter, key_of(int(key)), Vote(appeal=int(key) + 1))
                    store.vote(voter, key_of(int(key)), Vote(alignment=5 - int(key)))
        except Exception as error:  # noqa: BLE001 - told to the test
            wrong.append(error)

    tokens = {}
    run_all([threading.Thread(target=click, args=(f"first {number}", number)) for number in range(6)])
    assert not wrong
    with open_store(url) as store:
        tokens = {f"voter {number}": store.invite(f"voter {number}") for number in range(8)}
    run_all([threading.Thread(target=click, args=(name, window)) for name in tokens for window in range(2)])
    assert not wrong
    with open_store(url) as store:
        assert len(list(store.read_ballots())) == 2
        records = list(store.read_votes())
        assert len(records) == 4 * 14
        assert all(record.vote == Vote(int(record.candidate, 16) + 1, 5 - int(record.candidate, 16)) for record in records)
        voter = store.find_voter(tokens["voter 0"])
        undone = 0
        while store.undo(voter):
            undone += 1
        assert undone == 8 and len(list(store.read_votes())) == 4 * 13


def run_all(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
