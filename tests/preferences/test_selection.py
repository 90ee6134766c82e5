"""Pairs and agreement, worked out by hand; import and export."""

import json
from fractions import Fraction

import numpy as np
import pytest
from made_up_votes import FINGERPRINT, fill, key_of, make_candidate, make_prompt

from openemu3.data.pairs import read_pairs
from openemu3.preferences.selection import (
    PairsConfig,
    compute_agreement,
    count_scores,
    export_media,
    export_votes,
    read_vote_lines,
    select_pairs,
)
from openemu3.preferences.store import Vote, VoteRecord, open_store
from openemu3.records import InputError

N = None
# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), his example C: four observers, twelve units, with gaps. He gives
# 0.815 for ordinal data.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


def count(table):
    """[raters][units] -> [units, 5] counts."""
    return np.array([[sum(row[unit] == score for row in table) for score in range(1, 6)] for unit in range(len(table[0]))])


def alpha_by_definition(counts):
    """1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck over pairs of values c < k, in fractions, straight from the 2011 paper."""
    units = [[int(number) for number in row] for row in counts if sum(row) > 1]
    size = len(units[0])
    together = [[Fraction(0)] * size for _ in range(size)]
    for row in units:
        for c in range(size):
            for k in range(size):
                together[c][k] += Fraction(row[c] * (row[k] - (c == k)), sum(row) - 1)
    n = [sum(row) for row in together]

    def distance(c, k):
        return (sum(n[c : k + 1]) - (n[c] + n[k]) / 2) ** 2

    pairs = [(c, k) for c in range(size) for k in range(c + 1, size)]
    seen = sum(together[c][k] * distance(c, k) for c, k in pairs)
    expected = sum(n[c] * n[k] * distance(c, k) for c, k in pairs)
    return 1 - (sum(n) - 1) * seen / expected


def test_agreement_on_the_published_table():
    assert compute_agreement(count(PUBLISHED)) == pytest.approx(0.815, abs=5e-4)


def test_agreement_by_hand():
    """Two raters, three units: (1, 1), (2, 2), (1, 2).

    Coincidences: o11 = 2, o22 = 2, o12 = o21 = 1; so n1 = n2 = 3, n = 6. d12 = (3 + 3 - (3 + 3) / 2)^2 = 9.
    alpha = 1 - (6 - 1) * (1 * 9) / (3 * 3 * 9) = 1 - 5 / 9 = 4 / 9.
    """
    counts = count([[1, 2, 1], [1, 2, 2]])
    assert alpha_by_definition(counts) == Fraction(4, 9)
    assert compute_agreement(counts) == pytest.approx(4 / 9, abs=1e-12)


def test_agreement_is_the_definition_on_random_tables():
    random = np.random.default_rng(0)
    for _ in range(20):
        table = [[int(score) if score else None for score in random.integers(0, 6, 9)] for _ in range(int(random.integers(2, 6)))]
        counts = count(table)
        assert compute_agreement(counts) == pytest.approx(float(alpha_by_definition(counts)), abs=1e-9)


def test_agreement_that_is_not_defined():
    for table in ([[3, 3], [3, 3]], [[1, 2, 3]], [[1, N], [N, 2]]):
        assert compute_agreement(count(table)) is None
    assert compute_agreement(np.zeros((0, 5), np.int64)) is None
    assert compute_agreement(count([[1, 5], [5, 1]])) < 0  # worse than chance


# ---- pairs


def vote(store, name, first, *scores):
    """`name` gives candidates first, first + 1, ... the (appeal, alignment) of scores; None: no vote."""
    store.import_votes(VoteRecord(key_of(first + n), name, Vote(*score), "") for n, score in enumerate(scores) if score is not None)


def test_the_best_and_the_worst_become_a_pair(store, tmp_path):
    """Means of (appeal + alignment) / 2 by hand: candidate 0: (4 + 4.5 + 3) / 3 = 23/6, 1: (1 + 2 + 1.5) / 3 = 1.5,
    2: (5 + 4 + 5) / 3 = 14/3, 3: (2.5 + 2 + 3) / 3 = 2.5."""
    vote(store, "Ann", 0, (4, 4), (1, 1), (5, 5), (2, 3))
    vote(store, "Bea", 0, (5, 4), (2, 2), (4, 4), (2, 2))
    vote(store, "Cid", 0, (3, 3), (1, 2), (5, 5), (3, 3))
    vote(store, "Dan", 0, (1, 1), (5, 5), (1, 1), None)  # not whole, so his contrary taste does not count
    report = select_pairs(tmp_path / "pairs.parquet", store)
    (pair,) = read_pairs(tmp_path / "pairs.parquet", FINGERPRINT)
    assert pair.prompt == "a red apple" and pair.kind == "image"
    assert pair.prompt_ids.tolist() == [1, 2, 3]
    assert pair.chosen_ids.tolist() == [102, 7, 9] and pair.rejected_ids.tolist() == [101, 7, 9]
    assert (pair.chosen_score, pair.rejected_score) == (pytest.approx(14 / 3), pytest.approx(1.5))
    assert (report.num_prompts, report.num_pairs) == (2, 1)
    assert report.dropped == {
        "one candidate": 0, "too few voters": 1, "all alike": 0, "low agreement": 0, "tie": 0, "same tokens": 0,
    }  # fmt: skip
    assert report.dropped_prompts == [{"prompt": "a blue wave", "kind": "image", "reason": "too few voters"}]
    assert (report.num_votes, report.num_incomplete_votes) == (15, 0) and report.voters == {"Ann": 4, "Bea": 4, "Cid": 4, "Dan": 3}
    # Agreement is over all that was given, Dan's too: units 0 ... 3 of the apple.
    appeal = count([[4, 1, 5, 2], [5, 2, 4, 2], [3, 1, 5, 3], [1, 5, 1, N]])
    assert report.agreement["appeal"] == pytest.approx(float(alpha_by_definition(appeal)))
    ballot = next(store.read_ballots())
    assert count_scores(ballot, "appeal").tolist() == appeal.tolist()


def test_every_reason_to_drop_a_prompt(store, tmp_path):
    same = [make_candidate(key, key, ids=[1, 2]) for key in (20, 21)]
    store.add_candidates(make_prompt("same tokens"), same)
    store.add_candidates(make_prompt("alone"), [make_candidate(30)])
    store.add_candidates(make_prompt("liked alike"), [make_candidate(40), make_candidate(41)])
    store.add_candidates(make_prompt("disputed"), [make_candidate(50), make_candidate(51), make_candidate(52)])
    store.add_candidates(make_prompt("few"), [make_candidate(60), make_candidate(61)])
    for name in ("Ann", "Bea", "Cid"):
        vote(store, name, 0, (5, 5), (1, 1), (2, 2), (3, 3))  # a pair
        vote(store, name, 10, (5, 5), (5, 5), (1, 1))  # two share the highest
        vote(store, name, 20, (5, 5), (1, 1))
        vote(store, name, 30, (5, 5))
        vote(store, name, 40, (4, 3), (3, 4))
    for name, scores in {"Ann": [(5, 5), (1, 1), (3, 3)], "Bea": [(1, 1), (5, 5), (3, 3)], "Cid": [(3, 3), (1, 1), (5, 5)]}.items():
        vote(store, name, 50, *scores)
    vote(store, "Ann", 60, (5, 5), (1, 1))
    path = tmp_path / "pairs.parquet"
    report = select_pairs(path, store)
    reasons = {dropped["prompt"]: dropped["reason"] for dropped in report.dropped_prompts}
    assert reasons == {
        "a blue wave": "tie", "same tokens": "same tokens", "alone": "one candidate", "liked alike": "all alike",
        "disputed": "low agreement", "few": "too few voters",
    }  # fmt: skip
    assert all(number == 1 for number in report.dropped.values()) and report.num_pairs == 1 and report.num_prompts == 7
    # Looser rules let three of them through; the tie gives one of the two that share the first place.
    report = select_pairs(path, store, PairsConfig(min_voters=1, min_agreement=-1, keep_ties=True))
    pairs = {pair.prompt: pair for pair in read_pairs(path)}
    assert set(pairs) == {"a red apple", "a blue wave", "disputed", "few"} and report.num_ties_kept == 1
    assert pairs["a blue wave"].chosen_ids[0] == 110 and pairs["a blue wave"].rejected_ids[0] == 112
    # disputed: 50 has 9 points, 51 has 7, 52 has 11, of three voters
    assert (pairs["disputed"].chosen_ids[0], pairs["disputed"].rejected_ids[0]) == (152, 151)
    assert (pairs["disputed"].chosen_score, pairs["disputed"].rejected_score) == (pytest.approx(11 / 3), pytest.approx(7 / 3))


def test_more_pairs_of_one_prompt(store, tmp_path):
    """Second best and second worst, and so on inwards, as long as one is liked more than the other."""
    store.add_candidates(make_prompt("six"), [make_candidate(key) for key in range(70, 76)])
    for name in ("Ann", "Bea", "Cid"):
        vote(store, name, 70, (5, 5), (1, 2), (3, 3), (4, 5), (1, 1), (3, 3))
    path = tmp_path / "pairs.parquet"

    def select(number, keep_ties):
        report = select_pairs(path, store, PairsConfig(min_agreement=-1, keep_ties=keep_ties, pairs_per_prompt=number))
        assert report.num_prompts == 3 and sum(report.dropped.values()) == 2 and report.num_ties_kept == 0
        pairs = read_pairs(path)
        assert report.num_pairs == len(pairs)
        return [(pair.chosen_ids[0], pair.rejected_ids[0], pair.chosen_score, pair.rejected_score) for pair in pairs]

    assert select(1, False) == [(170, 174, 5, 1)]
    two = [(170, 174, 5, 1), (173, 171, 4.5, 1.5)]
    assert select(2, False) == two
    assert select(9, False) == two and select(9, True) == two  # the two in the middle are liked alike


def test_ties_among_several_pairs(store, tmp_path):
    """Each pair is dropped, or its tie broken by the keys, for itself; nobody is on both sides."""
    store.add_candidates(make_prompt("tied"), [make_candidate(key) for key in range(70, 76)])
    for name in ("Ann", "Bea", "Cid"):
        vote(store, name, 70, (4, 4), (5, 5), (2, 2), (4, 4), (1, 1), (1, 1))
    path = tmp_path / "pairs.parquet"
    report = select_pairs(path, store, PairsConfig(keep_ties=True, pairs_per_prompt=3))
    assert [(pair.chosen_ids[0], pair.rejected_ids[0]) for pair in read_pairs(path)] == [(171, 174), (170, 175), (173, 172)]
    assert (report.num_pairs, report.num_ties_kept) == (3, 3)
    with pytest.raises(InputError, match="1 tie"):
        select_pairs(path, store, PairsConfig(pairs_per_prompt=3))


def test_a_removed_candidate_is_in_no_pair(store, tmp_path):
    for name in ("Ann", "Bea", "Cid"):
        vote(store, name, 0, (5, 5), (1, 1), (2, 2), (3, 3))
    store.remove_candidate(key_of(0))
    select_pairs(tmp_path / "pairs.parquet", store)
    (pair,) = read_pairs(tmp_path / "pairs.parquet")
    assert pair.chosen_ids[0] == 103 and pair.rejected_ids[0] == 101


def test_no_pair_at_all_is_an_error_and_no_file(store, tmp_path):
    with pytest.raises(InputError, match=r"none of 2 prompts gives a pair \(2 too few voters\)"):
        select_pairs(tmp_path / "pairs.parquet", store)
    assert not [path for path in tmp_path.iterdir() if "pairs" in path.name]


@pytest.mark.parametrize("wrong", [{"min_voters": 0}, {"min_agreement": 2.0}, {"min_agreement": float("nan")}, {"pairs_per_prompt": 0}])
def test_rules_that_are_none(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        PairsConfig(**wrong)


# ---- import and export


def test_votes_travel_between_databases(store, tmp_path):
    vote(store, "Zoë", 0, (5, 4), (1, None))
    vote(store, "Bea", 10, (2, 3))
    assert export_votes(tmp_path / "votes.jsonl", store) == 3
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "candidate": key_of(0), "prompt": "a red apple", "kind": "image", "voter": "Zoë", "appeal": 5, "alignment": 4, "at": "",
    }  # fmt: skip
    with open_store(tmp_path / "other.sqlite", create=True, fingerprint=FINGERPRINT) as other:
        fill(other)
        assert other.import_votes(read_vote_lines(tmp_path / "votes.jsonl")).added == 3
        assert list(other.read_votes()) == list(store.read_votes())


def test_media_for_rating_elsewhere(store, tmp_path):
    store.remove_candidate(key_of(1))
    assert export_media(tmp_path / "media", store) == 6
    lines = [json.loads(line) for line in (tmp_path / "media" / "candidates.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0] == {"candidate": key_of(0), "file": f"{key_of(0)}.webp", "prompt": "a red apple", "kind": "image"}
    for line in lines:
        assert (tmp_path / "media" / line["file"]).read_bytes() == store.read_media(line["candidate"])[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ("[]", "an object is needed"),
        ('{"candidate": "a"}', "voter is None"),
        ('{"candidate": "a", "voter": "b", "appeal": 9}', "appeal is 9"),
        ('{"candidate": "a", "voter": "b", "apeal": 3}', "'apeal'"),
        ('{"candidate": "a", "voter": "b", "appeal": 3, "at": "soon"}', "at is 'soon'"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    path = tmp_path / "votes.jsonl"
    path.write_text(f'{{"candidate": "{key_of(0)}", "voter": "Ann", "appeal": 3}}\n{line}\n')
    with pytest.raises(InputError, match="line 2 is no vote") as caught:
        list(read_vote_lines(path))
    assert words in str(caught.value)
