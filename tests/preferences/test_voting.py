"""The HTTP interface on a real server: who may do what, what is refused, and many voters at once."""

import re
import socket
import threading
from pathlib import Path

import pytest
from made_up_votes import Client, key_of, make_candidate, make_prompt

from openemu3.preferences.store import Vote
from openemu3.preferences.voting import MAX_BODY, build_app, load_page
from openemu3.records import InputError


@pytest.fixture
def port(store, serve):
    return serve(store)


def test_a_voter_rates_and_takes_back(store, port):
    ann = Client(port, store.invite("Ann"))
    answer = ann.get("/api/tasks").json
    assert answer["voter"] == "Ann" and answer["scores"] == [1, 5]
    tasks = {task["prompt"]: task for task in answer["tasks"]}
    assert tasks[make_prompt().key] == {"prompt": make_prompt().key, "kind": "image", "candidates": 4, "rated": 0, "needed": True}
    task = ann.get(f"/api/tasks/{make_prompt().key}").json
    assert (task["text"], task["kind"], len(task["candidates"])) == ("a red apple", "image", 4)
    first = task["candidates"][0]
    assert first == {"candidate": first["candidate"], "width": 16, "height": 16, "appeal": None, "alignment": None}
    media = ann.get(f"/api/media/{first['candidate']}")
    assert media.headers["Content-Type"] == "image/webp" and media.body == make_candidate(int(first["candidate"], 16)).media

    assert ann.vote(first["candidate"], appeal=4).json == {"candidate": first["candidate"], "appeal": 4, "alignment": None}
    assert ann.vote(first["candidate"], alignment=2).json == {"candidate": first["candidate"], "appeal": 4, "alignment": 2}
    assert [(record.voter, record.vote) for record in store.read_votes()] == [("Ann", Vote(4, 2))]
    assert ann.get("/api/tasks").json["tasks"][0]["rated"] + ann.get("/api/tasks").json["tasks"][1]["rated"] == 1
    undone = {"prompt": make_prompt().key, "candidate": first["candidate"], "appeal": 4, "alignment": None}
    assert ann.ask("POST", "/api/undo").json == {"undone": undone}
    assert ann.ask("POST", "/api/undo").json["undone"]["appeal"] is None
    assert ann.ask("POST", "/api/undo").json == {"undone": None}
    assert list(store.read_votes()) == []


def test_candidates_are_blind(store, port):
    """Nothing that a voter gets says how a candidate was made or what others think of it."""
    ann, bea = Client(port, store.invite("Ann")), Client(port, store.invite("Bea"))
    bea.vote(key_of(1), appeal=5, alignment=5)
    task = ann.get(f"/api/tasks/{make_prompt().key}")
    assert set(task.json) == {"prompt", "text", "kind", "candidates"}
    assert all(set(one) == {"candidate", "width", "height", "appeal", "alignment"} for one in task.json["candidates"])
    assert all(one["appeal"] is None and one["alignment"] is None for one in task.json["candidates"])
    assert set(ann.get("/api/tasks").json["tasks"][0]) == {"prompt", "kind", "candidates", "rated", "needed"}
    assert "toy" not in str(ann.get(f"/api/media/{key_of(1)}").headers)


@pytest.mark.parametrize("path", ["/api/tasks", f"/api/tasks/{key_of(0)}", f"/api/media/{key_of(0)}", "POST /api/votes", "POST /api/undo"])
def test_without_a_token_there_is_nothing(store, port, path):
    store.invite("Ann")
    method, path = path.split() if " " in path else ("GET", path)
    body = {"candidate": key_of(0), "appeal": 3} if path.endswith("votes") else None
    for client, header in [
        (Client(port), None),
        (Client(port, "wrong.token"), None),
        (Client(port), "Basic QW5uOng="),
        (Client(port), "Bearer"),
    ]:
        answer = client.ask(method, path, body, {"Authorization": header} if header else None)
        assert answer.status == 401 and "access token" in answer.json["error"] and answer.headers["WWW-Authenticate"] == "Bearer"
    assert list(store.read_votes()) == []


def test_nobody_votes_as_another(store, port):
    ann, bea = Client(port, store.invite("Ann")), Client(port, store.invite("Bea"))
    ann.vote(key_of(0), appeal=5, alignment=5)
    assert bea.ask("POST", "/api/votes", {"candidate": key_of(0), "appeal": 1, "voter": "Ann"}).status == 422
    assert bea.ask("POST", "/api/votes?voter=Ann", {"candidate": key_of(0), "appeal": 1}).status == 200
    assert bea.ask("POST", "/api/undo").json["undone"]["appeal"] is None
    assert bea.ask("POST", "/api/undo").json["undone"] is None  # Ann's is not hers to undo
    assert [(record.voter, record.vote) for record in store.read_votes()] == [("Ann", Vote(5, 5))]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"candidate": key_of(0)}, "no score"),
        ({"candidate": key_of(0), "appeal": 6}, "appeal"),
        ({"candidate": key_of(0), "appeal": 0}, "appeal"),
        ({"candidate": key_of(0), "alignment": "3"}, "alignment"),
        ({"candidate": key_of(0), "alignment": True}, "alignment"),
        ({"candidate": key_of(0), "alignment": 2.5}, "alignment"),
        ({"appeal": 3}, "candidate"),
        ({"candidate": "x" * 100, "appeal": 3}, "candidate"),
        ([], "body"),
        (b"{", ""),
        (b"\xff\xfe", ""),
        (b"[" * 4000, ""),
    ],
)
def test_bad_votes_are_refused_in_words(store, port, body, words):
    answer = Client(port, store.invite("Ann")).ask("POST", "/api/votes", body)
    assert answer.status in (400, 422) and words in str(answer.json)
    assert list(store.read_votes()) == []


def test_candidates_that_are_not_there(store, port):
    ann = Client(port, store.invite("Ann"))
    store.remove_candidate(key_of(1))
    for path, status in [(key_of(99), 404), ("%00", 404), ("..%2f..", 404), (key_of(1), 410)]:
        assert ann.get(f"/api/media/{path}").status == status
    assert ann.vote(key_of(99), appeal=1).status == 404 and ann.vote("\0", appeal=1).status == 404
    gone = ann.vote(key_of(1), appeal=1)
    assert gone.status == 410 and "has been removed" in gone.json["error"]
    assert len(ann.get(f"/api/tasks/{make_prompt().key}").json["candidates"]) == 3
    assert ann.get("/api/tasks/zero").status == 404 and ann.get("/docs").status == 404 and ann.get("/openapi.json").status == 404


def test_bodies_are_bounded(store, port):
    ann = Client(port, store.invite("Ann"))
    assert ann.ask("POST", "/api/votes", b" " * (MAX_BODY + 1)).status == 413
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:  # a body without an end, in chunks
        raw.sendall(b"POST /api/votes HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(100_000):
                raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            pytest.fail("the server reads without end")
        except OSError:
            pass  # it hung up
    assert ann.vote(key_of(0), appeal=1).status == 200


def test_the_page_brings_everything_and_runs_nothing_else(port):
    answer = Client(port).get("/")
    page, policy = load_page()
    assert answer.status == 200 and answer.body.decode() == page and answer.headers["Content-Security-Policy"] == policy
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Referrer-Policy"] == "no-referrer"
    assert "//" not in page.replace("// ", "") and "innerHTML" not in page and " style=" not in page and " onclick" not in page
    for path in ("/api/tasks", "/nothing"):
        assert Client(port).get(path).headers["Content-Security-Policy"] == policy


def test_prompts_that_need_voters_come_first(store, serve):
    port = serve(store, voters_per_prompt=1)
    ann, bea = Client(port, store.invite("Ann")), Client(port, store.invite("Bea"))
    red = make_prompt().key
    bea.vote(key_of(0), appeal=3, alignment=3)  # begun before, so hers to finish
    for key in range(4):
        ann.vote(key_of(key), appeal=3, alignment=3)
    assert {task["prompt"]: task["needed"] for task in bea.get("/api/tasks").json["tasks"]}[red] is True
    cid = Client(port, store.invite("Cid"))
    tasks = cid.get("/api/tasks").json["tasks"]
    assert [task["needed"] for task in tasks] == [True, False] and tasks[1]["prompt"] == red
    with pytest.raises(InputError, match="at least 1"):
        build_app(store, 0)


def test_many_voters_at_once_lose_nothing(store, port):
    """Eight voters over real connections, each rating everything aspect by aspect, in two windows at once."""
    tokens = {f"voter {number}": store.invite(f"voter {number}") for number in range(8)}
    keys = [key_of(number) for number in (0, 1, 2, 3, 10, 11, 12)]
    failures = []

    def score_of(name, key, aspect):
        return 1 + hash_of(name + key + aspect) % 5

    def vote(name, aspect):
        client = Client(port, tokens[name])
        for key in keys:
            answer = client.vote(key, **{aspect: score_of(name, key, aspect)})
            if answer.status != 200:
                failures.append(answer)

    threads = [threading.Thread(target=vote, args=(name, aspect)) for name in tokens for aspect in ("appeal", "alignment")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = {(record.voter, record.candidate): record.vote for record in store.read_votes()}
    assert found == {(name, key): Vote(score_of(name, key, "appeal"), score_of(name, key, "alignment")) for name in tokens for key in keys}


def hash_of(text):
    return sum(index * byte for index, byte in enumerate(text.encode(), 1))


def test_the_voter_of_the_documentation(store, port):
    page = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8")
    (source,) = re.findall("^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(source, "docs/preferences.md", "exec"), names)
    names["vote"](f"http://127.0.0.1:{port}", store.invite("Ann"), lambda words, data: (len(words) % 5 + 1, data[-1] % 5 + 1))
    votes = {record.candidate: record.vote for record in store.read_votes()}
    assert len(votes) == 7
    assert votes[key_of(1)] == Vote(len("a red apple") % 5 + 1, make_candidate(1).media[-1] % 5 + 1)
