"""The database: what is kept, what is refused, and that nothing is lost or doubled when many write at once."""

import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest
from made_up_votes import FINGERPRINT, fill, key_of, make_candidate, make_prompt

from openemu3.preferences.store import (
    ImportCounts,
    RemovedCandidate,
    UnknownThing,
    UnknownToken,
    Vote,
    VoteRecord,
    open_store,
)
from openemu3.records import InputError


def get_voter(store, name="Ann"):
    return store.find_voter(store.invite(name))


# ---- opening


def test_what_is_stored_comes_back(store, tmp_path):
    ids = np.array([5, 2**32 - 1, 184621], np.uint32)
    store.add_candidates(make_prompt("一个红苹果 <b>", "video", [9, 8]), [make_candidate(20, 3, ids)])
    store.close()
    with open_store(tmp_path / "votes.sqlite") as opened:
        assert opened.fingerprint == FINGERPRINT
        ballots = list(opened.read_ballots())
        assert [ballot.prompt.text for ballot in ballots] == ["a red apple", "a blue wave", "一个红苹果 <b>"]
        assert [len(ballot.candidates) for ballot in ballots] == [4, 3, 1]
        prompt, (candidate,) = ballots[2].prompt, ballots[2].candidates
        assert prompt.kind == "video" and prompt.token_ids.tolist() == [9, 8] and prompt.token_ids.dtype == np.uint32
        assert candidate.token_ids.tolist() == ids.tolist() and candidate.settings == {"seed": 3, "model": "toy"}
        assert (candidate.number, candidate.width, candidate.height) == (3, 16, 16)
        assert opened.read_media(key_of(20)) == ("image/webp", make_candidate(20).media)


def test_adding_twice_adds_once(store):
    assert store.add_candidates(make_prompt(), [make_candidate(3), make_candidate(4)]) == 1
    fill(store)
    assert [len(ballot.candidates) for ballot in store.read_ballots()] == [5, 3]


def test_prompts_differ_by_text_kind_and_ids():
    keys = {make_prompt(*args).key for args in [("a",), ("b",), ("a", "video"), ("a", "image", (1, 2)), ("a", "image", (1, 2, 0))]}
    assert len(keys) == 5


@pytest.mark.parametrize(("text", "kind"), [("", "image"), (" \n", "image"), ("a\0b", "image"), ("\ud800", "image"), ("a", "sound")])
def test_impossible_prompts_are_refused(text, kind):
    with pytest.raises(InputError):
        make_prompt(text, kind)


def test_databases_that_cannot_be_used(store, tmp_path):
    path = tmp_path / "votes.sqlite"
    with pytest.raises(InputError, match="nowhere.sqlite is not there"):
        open_store(tmp_path / "nowhere.sqlite")
    with pytest.raises(InputError, match="other tokenizers"):
        open_store(path, fingerprint="f" * 32)
    for where in (":memory:", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(InputError, match="is no file"):
            open_store(where, create=True, fingerprint=FINGERPRINT)
    with pytest.raises(InputError, match="kind 'mysql'"):
        open_store("mysql://a:secret@b/c")
    with pytest.raises(InputError) as caught:
        open_store("postgresql://me:secret@127.0.0.1:1/none")
    assert "cannot be opened" in str(caught.value) and "secret" not in str(caught.value)
    (tmp_path / "words.sqlite").write_text("these are words, and there are more than a few of them" * 20)
    with pytest.raises(InputError, match="cannot be opened"):
        open_store(tmp_path / "words.sqlite")
    for name, statement in {"other": "CREATE TABLE voters (id INTEGER)", "empty": "CREATE TABLE something (id INTEGER)"}.items():
        with sqlite3.connect(tmp_path / f"{name}.sqlite") as connection:
            connection.execute(statement)
    with pytest.raises(InputError, match="table 'voters' of something else"):
        open_store(tmp_path / "other.sqlite", create=True, fingerprint=FINGERPRINT)
    with pytest.raises(InputError, match="holds no preferences"):
        open_store(tmp_path / "empty.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE emu3_preferences SET version = 2")
    with pytest.raises(InputError, match="has version 2; this openemu3 reads version 1"):
        open_store(path)


# ---- voters


def test_tokens_are_secrets_of_one_voter(store, tmp_path):
    ann, bea = store.invite("Ann"), store.invite("Bea")
    assert store.find_voter(ann).name == "Ann" and store.find_voter(bea).name == "Bea"
    crossed = ann.partition(".")[0] + "." + bea.partition(".")[2]
    for wrong in ("", ".", "x", ann[:-1], ann + "x", ann.upper(), crossed, "." + ann.partition(".")[2], "é.ü", "\0.\0", "a" * 10_000):
        with pytest.raises(UnknownToken):
            store.find_voter(wrong)
    held = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"Ann" in held and ann.partition(".")[2].encode() not in held  # only its hash is


def test_a_renewed_token_voids_the_old_one_and_keeps_the_votes(store):
    old = store.invite("Ann")
    store.vote(store.find_voter(old), key_of(1), Vote(4, 5))
    with pytest.raises(InputError, match="has been invited before"):
        store.invite("  Ann ")
    new = store.invite("Ann", renew=True)
    with pytest.raises(UnknownToken):
        store.find_voter(old)
    voter = store.find_voter(new)
    assert store.vote(voter, key_of(1), Vote(alignment=1)) == Vote(4, 1)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x1b[31m", "a" * 101, "\ud800"])
def test_names_that_are_none(store, name):
    with pytest.raises(InputError):
        store.invite(name)


# ---- voting


def test_a_vote_is_changed_in_place_and_one_aspect_leaves_the_other(store):
    voter = get_voter(store)
    assert store.vote(voter, key_of(1), Vote(appeal=2)) == Vote(2, None)
    assert store.vote(voter, key_of(1), Vote(alignment=5)) == Vote(2, 5)
    assert store.vote(voter, key_of(1), Vote(3, 4)) == Vote(3, 4)
    (record,) = store.read_votes()
    assert (record.candidate, record.voter, record.vote) == (key_of(1), "Ann", Vote(3, 4))


def test_undo_walks_back_through_every_change(store):
    voter, other = get_voter(store), get_voter(store, "Bea")
    store.vote(other, key_of(1), Vote(1, 1))
    store.vote(voter, key_of(1), Vote(appeal=2))
    store.vote(voter, key_of(11), Vote(3, 3))
    store.vote(voter, key_of(1), Vote(appeal=4))
    store.vote(voter, key_of(1), Vote(appeal=4))  # nothing new, so nothing to undo
    red, blue = make_prompt().key, make_prompt("a blue wave").key
    assert store.undo(voter) == (red, key_of(1), Vote(2, None))
    assert store.undo(voter) == (blue, key_of(11), Vote())
    assert store.undo(voter) == (red, key_of(1), Vote())
    assert store.undo(voter) is None
    assert [(record.voter, record.vote) for record in store.read_votes()] == [("Bea", Vote(1, 1))]


@pytest.mark.parametrize("scores", [(0, 3), (6, 3), (3, -1), (True, 3), (2.0, 3), ("4", 3)])
def test_scores_outside_one_to_five_are_refused(store, scores):
    with pytest.raises(InputError, match="whole number from 1 to 5"):
        store.vote(get_voter(store), key_of(1), Vote(*scores))


def test_the_database_itself_refuses_what_is_wrong(store, tmp_path):
    """Whatever writes to it."""
    get_voter(store)
    insert = "INSERT INTO votes (voter_id, candidate_id, appeal, alignment, at) VALUES (1, 1, {}, {}, '')"
    with sqlite3.connect(tmp_path / "votes.sqlite") as connection:
        connection.execute(insert.format(3, 3))
        for wrong in ((3, 3), (6, 3), (0, 3), ("NULL", "NULL")):
            with pytest.raises(sqlite3.IntegrityError):
                connection.execute(insert.format(*wrong))


def test_votes_for_nothing(store):
    voter = get_voter(store)
    with pytest.raises(InputError, match="no score"):
        store.vote(voter, key_of(1), Vote())
    for key in (key_of(99), "", "'; DROP TABLE votes; --", "\0", "é" * 1000):
        with pytest.raises(UnknownThing, match="is not in the database"):
            store.vote(voter, key, Vote(1, 1))
    assert list(store.read_votes()) == []


def test_a_removed_candidate_is_gone_from_everything_but_its_key(store):
    voter = get_voter(store)
    store.vote(voter, key_of(0), Vote(1, 1))
    store.vote(voter, key_of(1), Vote(5, 5))
    store.remove_candidate(key_of(1))
    with pytest.raises(RemovedCandidate, match="has been removed"):
        store.vote(voter, key_of(1), Vote(2, 2))
    with pytest.raises(RemovedCandidate):
        store.read_media(key_of(1))
    with pytest.raises(UnknownThing):
        store.remove_candidate(key_of(50))
    assert [record.candidate for record in store.read_votes()] == [key_of(0)]
    ballot = next(store.read_ballots())
    assert [candidate.key for candidate in ballot.candidates] == [key_of(0), key_of(2), key_of(3)]
    assert ballot.votes == {"Ann": {key_of(0): Vote(1, 1)}}
    assert store.list_candidates([key_of(1), key_of(77)]) == {key_of(1)}  # so that it is not drawn again
    assert store.undo(voter) == (make_prompt().key, key_of(0), Vote())  # its own change is passed over


# ---- tasks


def test_every_voter_has_an_order_of_their_own_and_keeps_it(store):
    prompt = make_prompt("many")
    store.add_candidates(prompt, [make_candidate(100 + number, number) for number in range(8)])
    orders = []
    for name in "ABCDEFGHIJ":
        voter = get_voter(store, name)
        order = [candidate.key for candidate, _ in store.read_task(voter, prompt.key)[1]]
        again = [candidate.key for candidate, _ in store.read_task(voter, prompt.key)[1]]
        assert order == again and sorted(order) == [key_of(100 + number) for number in range(8)]
        orders.append(tuple(order))
    assert len(set(orders)) == 10
    assert len({order[0] for order in orders}) > 3  # nobody's first is everybody's first
    assert len({tuple(task.prompt for task in store.list_tasks(get_voter(store, str(n)))) for n in range(12)}) > 2


def test_tasks_count_whole_votes_and_whole_voters(store):
    ann, bea = get_voter(store, "Ann"), get_voter(store, "Bea")
    store.add_candidates(make_prompt("alone"), [make_candidate(200)])  # nothing to compare, so no task
    for key in range(4):
        store.vote(ann, key_of(key), Vote(3, 3))
    store.vote(bea, key_of(0), Vote(3, 3))
    store.vote(bea, key_of(1), Vote(appeal=3))
    tasks = {task.prompt: task for task in store.list_tasks(bea)}
    red, blue = tasks[make_prompt().key], tasks[make_prompt("a blue wave").key]
    assert len(tasks) == 2
    assert (red.num_candidates, red.num_rated, red.num_voters) == (4, 1, 1)
    assert (blue.num_candidates, blue.num_rated, blue.num_voters) == (3, 0, 0)
    with pytest.raises(UnknownThing):
        store.read_task(bea, "nothing")


# ---- import


def test_imported_votes(store):
    ann = get_voter(store)
    store.vote(ann, key_of(0), Vote(1, 1))
    store.vote(ann, key_of(1), Vote(2, 2))
    records = [
        VoteRecord(key_of(0), "Ann", Vote(1, 1), "2026-01-01"),
        VoteRecord(key_of(1), "Ann", Vote(5, 5), "2026-01-01"),
        VoteRecord(key_of(2), "Zoë", Vote(4, None), "2026-01-01"),
    ]
    assert store.import_votes(records) == ImportCounts(added=1, equal=1, kept=1, replaced=0)
    assert store.import_votes(records) == ImportCounts(added=0, equal=2, kept=1, replaced=0)
    assert store.import_votes(records, replace=True) == ImportCounts(added=0, equal=2, kept=0, replaced=1)
    assert {(r.candidate, r.voter, r.vote) for r in store.read_votes()} == {(r.candidate, r.voter, r.vote) for r in records}
    assert store.undo(ann)[1:] == (key_of(1), Vote())  # imports are nobody's clicks
    assert store.find_voter(store.invite("Zoë")).name == "Zoë"  # she can be invited later


def test_an_import_is_taken_whole_or_not_at_all(store):
    good = VoteRecord(key_of(0), "Bea", Vote(1, 1), "")
    store.remove_candidate(key_of(3))
    for bad, error in [
        (VoteRecord(key_of(99), "Bea", Vote(1, 1), ""), UnknownThing),
        (VoteRecord(key_of(3), "Bea", Vote(1, 1), ""), RemovedCandidate),
        (VoteRecord(key_of(1), "Bea", Vote(), ""), InputError),
    ]:
        with pytest.raises(error):
            store.import_votes([good, bad])
        assert list(store.read_votes()) == []


# ---- many at once


def test_threads_lose_no_vote(store):
    """Eight voters at once, each of them in two windows."""
    voters = [get_voter(store, f"voter {number}") for number in range(8)]
    wrong = []

    def click(voter, seed):
        random = np.random.default_rng(seed)
        try:
            for key in random.permutation(4):
                store.vote(voter, key_of(int(key)), Vote(appeal=int(random.integers(1, 6))))
                store.vote(voter, key_of(int(key)), Vote(alignment=1 + voter.id % 5))
        except Exception as error:  # noqa: BLE001 - told to the test
            wrong.append(error)

    threads = [threading.Thread(target=click, args=(voter, 10 * voter.id + window)) for voter in voters for window in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    records = list(store.read_votes())
    assert len(records) == 8 * 4 and len({(record.candidate, record.voter) for record in records}) == 32
    for voter in voters:
        mine = [record.vote for record in records if record.voter == voter.name]
        assert all(vote.is_complete and vote.alignment == 1 + voter.id % 5 for vote in mine)
        while store.undo(voter):
            pass
    assert list(store.read_votes()) == []  # and every change was written down


def test_processes_make_one_database(tmp_path):
    code = (
        "import sys; from openemu3.preferences.store import open_store\n"
        "with open_store(sys.argv[1], create=True, fingerprint='f' * 32) as s: print(s.invite(sys.argv[2]))"
    )
    path = tmp_path / "new.sqlite"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("Ann", "Bea", "Cid")
    ]
    said = [process.communicate() for process in processes]
    assert [errors for _, errors in said] == ["", "", ""]
    with open_store(path) as store:
        assert [store.find_voter(token.strip()).name for token, _ in said] == ["Ann", "Bea", "Cid"]
