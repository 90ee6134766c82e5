"""`emu3 preferences`: candidates, voters over HTTP, pairs, all through the command line, on a folder of random weights."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from openemu3 import cli
from openemu3.data.pairs import read_pairs
from openemu3.training.export import compute_fingerprint

PROMPTS = '{"prompt": "red apple"}\n{"prompt": "blue wave", "kind": "video"}\n'


def read_answer(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def work(tmp_path, emu3_command, model_folder):
    """A folder with a database of two prompts, three candidates each."""
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    sample = ["preferences", "sample", "prompts.jsonl", "--model", model_folder, "--database", "v.sqlite"]
    sample += ["--num-candidates", 3, "--seed", 4, "--seconds", 0.5, "--json"]
    answer = read_answer(emu3_command(*sample, cwd=tmp_path))
    assert (answer["num_prompts"], answer["num_candidates"], answer["num_drawn"]) == (2, 6, 6)
    assert read_answer(emu3_command(*sample, cwd=tmp_path))["num_drawn"] == 0
    return tmp_path


def vote_by_script(base, token):
    """What a scripted voter does: lists its tasks, looks at each, votes; all over HTTP with its token. Returns key -> scores."""

    def call(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data, {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    given = {}
    for task in json.loads(call("/api/tasks"))["tasks"]:
        for one in json.loads(call(f"/api/tasks/{task['prompt']}"))["candidates"]:
            key = one["candidate"]
            assert call(f"/api/media/{key}")[:4] == b"RIFF" if task["kind"] == "image" else True
            given[key] = {"appeal": 1 + int(key, 16) % 5, "alignment": 1 + int(key, 16) // 5 % 5}
            call("/api/votes", {"candidate": key, **given[key]})
    return given


def test_from_prompts_to_pairs(work, emu3_command, model_folder):
    links = [read_answer(emu3_command("preferences", "invite", name, "--database", "v.sqlite", "--json", cwd=work)) for name in "ABC"]
    assert all(link["link"] == f"http://127.0.0.1:8765/#{link['token']}" for link in links)
    command = [sys.executable, "-m", "openemu3.cli", "preferences", "serve", "--database", "v.sqlite", "--port", "0"]
    server = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        said = server.stderr.readline()
        assert said.startswith("voting at http://127.0.0.1:"), said
        base = said.split()[2].rstrip("/")
        given = [vote_by_script(base, link["token"]) for link in links]
    finally:
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[1]
    assert "Traceback" not in rest and len(given[0]) == 6

    done = emu3_command("preferences", "export", "votes.jsonl", "--database", "v.sqlite", "--media", "media", "--json", cwd=work)
    assert read_answer(done) == {"file": "votes.jsonl", "votes": 18, "media": 6}
    lines = [json.loads(line) for line in (work / "votes.jsonl").read_text().splitlines()]
    assert all(line["appeal"] == given[0][line["candidate"]]["appeal"] for line in lines)
    assert {path.suffix for path in (work / "media").iterdir()} == {".webp", ".mp4", ".jsonl"}

    answer = read_answer(emu3_command("preferences", "pairs", "p.parquet", "--database", "v.sqlite", "--keep-ties", "--json", cwd=work))
    assert answer["num_prompts"] == 2 and answer["num_pairs"] + sum(answer["dropped"].values()) == 2
    assert answer["agreement"] == {"appeal": 1.0, "alignment": 1.0} and answer["voters"] == {"A": 6, "B": 6, "C": 6}
    pairs = read_pairs(work / "p.parquet", compute_fingerprint(model_folder))
    assert len(pairs) == answer["num_pairs"] > 0
    sums = {key: score["appeal"] + score["alignment"] for key, score in given[0].items()}
    for pair in pairs:
        keys = [line["candidate"] for line in lines if line["prompt"] == pair.prompt]
        assert pair.chosen_score == max(sums[key] for key in keys) / 2 and pair.rejected_score == min(sums[key] for key in keys) / 2
    text = emu3_command("preferences", "pairs", "p.parquet", "--database", "v.sqlite", "--keep-ties", cwd=work).stdout
    assert "Krippendorff" in text and f"p.parquet: {len(pairs)} pairs of 2 prompts" in text

    # Votes of an imported file, after one candidate was removed, do not fit: all or nothing.
    gone = lines[0]["candidate"]
    assert read_answer(emu3_command("preferences", "remove", gone, "--database", "v.sqlite", "--json", cwd=work)) == {"removed": [gone]}
    done = emu3_command("preferences", "import", "votes.jsonl", "--database", "v.sqlite", cwd=work)
    assert done.returncode == 2 and "has been removed" in done.stderr and done.stderr.count("\n") == 1
    (work / "few.jsonl").write_text(
        "".join(json.dumps(line | {"voter": "D"}) + "\n" for line in lines if line["voter"] == "A" and line["candidate"] != gone)
    )
    done = emu3_command("preferences", "import", "few.jsonl", "--database", "v.sqlite", cwd=work)
    assert done.stdout == "v.sqlite: 5 added, 0 equal, 0 kept, 0 replaced\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "nothing.txt"], "nothing.txt"),
        (["sample", "prompts.jsonl", "--num-candidates", 1], "num_candidates is 1"),
        (["sample", "prompts.jsonl", "--model", "nowhere"], "nowhere"),
        (["invite", "Ann", "--database", "none.sqlite"], "none.sqlite is not there"),
        (["serve", "--database", "none.sqlite"], "none.sqlite is not there"),
        (["serve", "--database", "v.sqlite", "--port", 99999], "port is 99999"),
        (["serve", "--database", "v.sqlite", "--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        (["pairs", "p.txt", "--database", "v.sqlite"], "the name must end in .parquet"),
        (["pairs", "p.parquet", "--database", "v.sqlite"], "none of 2 prompts gives a pair"),
        (["pairs", "p.parquet", "--database", "v.sqlite", "--min-voters", 0], "min_voters is 0"),
        (["import", "nothing.jsonl", "--database", "v.sqlite"], "nothing.jsonl"),
        (["remove", "--database", "v.sqlite"], "no candidate was named"),
        (["remove", "abc", "--database", "v.sqlite"], "is not in the database"),
    ],
)
def test_bad_input_is_one_line(shared, emu3_command, arguments, words):
    done = emu3_command("preferences", *arguments, cwd=shared)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert done.stderr.startswith("emu3: ") and done.stderr.count("\n") == 1 and words in done.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory, emu3_command, model_folder):
    folder = tmp_path_factory.mktemp("preferences")
    (folder / "prompts.jsonl").write_text(PROMPTS)
    sample = ["preferences", "sample", "prompts.jsonl", "--model", model_folder, "--database", "v.sqlite", "--num-candidates", 2]
    done = emu3_command(*sample, "--seconds", 0.5, cwd=folder)
    assert done.stdout == "v.sqlite: 4 candidates of 2 prompts, 4 of them new\n", done.stderr
    return folder


@pytest.mark.parametrize("name", ["sample", "invite", "serve", "pairs", "export", "import", "remove"])
def test_every_flag_is_explained(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["preferences", name, "--help"])
    text = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out.partition("message and exit")[2])
    flags = re.findall(r"--([a-z][\w-]*)(.*?)(?:\(default|\(required)", text, re.DOTALL)
    assert "database" in dict(flags)
    for flag, words in flags:
        assert len(re.findall("[a-z]{2,}", words)) >= 3, flag
