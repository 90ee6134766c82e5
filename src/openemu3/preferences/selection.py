"""From votes to pairs: the best-liked candidate of each prompt becomes "chosen", the least-liked one "rejected"; the second best and the
second worst may make another pair, and so on inwards.

In: the database of candidates and votes. Out: a Parquet file of pairs with the sampled token ids, and a report of what was dropped and
why. The surprising thing: only voters who rated every candidate of a prompt on both aspects count for it. A mean over other voters for
each candidate would mix taste with who is strict.

score(candidate) = mean over those voters of (appeal + alignment) / 2, from 1 to 5
agreement        = Krippendorff's alpha for ordinal values: 1 is perfect, 0 what chance gives, below 0 systematic dissent
Source: the paper, section 2.5.2 (three voters, visual appeal and prompt alignment, highest and lowest); the rest of the rules are ours.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import krippendorff
import numpy as np
from numpy.typing import NDArray

from openemu3.data.pairs import PreferencePair, write_pairs
from openemu3.preferences.store import (
    ASPECTS,
    MAX_SCORE,
    MIN_SCORE,
    Ballot,
    Store,
    Vote,
    VoteRecord,
)
from openemu3.records import InputError

MAX_LINE_BYTES = 1_000_000  # of an imported vote
Reason = Literal["one candidate", "too few voters", "all alike", "low agreement", "tie", "same tokens"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class PairsConfig:
    """Which prompts give a pair.

    Args:
        min_voters: who must have rated all its candidates, at least.
        min_agreement: Krippendorff's alpha among them on the sum of both aspects, at least. Not asked of a single voter.
        keep_ties: where another candidate has the score of one that would be chosen or rejected, take one of them (by its key, which
            says nothing about it) instead of dropping the pair.
        pairs_per_prompt: at most. The paper's is 1: the highest and the lowest score.
    """

    min_voters: int = 3
    min_agreement: float = 0.0
    keep_ties: bool = False
    pairs_per_prompt: int = 1

    def __post_init__(self) -> None:
        if self.min_voters < 1:
            raise InputError(f"min_voters is {self.min_voters}; at least 1 is allowed")
        if not -1 <= self.min_agreement <= 1:
            raise InputError(f"min_agreement is {self.min_agreement}; -1 to 1 is allowed")
        if self.pairs_per_prompt < 1:
            raise InputError(f"pairs_per_prompt is {self.pairs_per_prompt}; at least 1 is allowed")


@dataclass(frozen=True)
class PairsReport:
    """What became of the prompts: num_prompts = those that give pairs + sum(dropped).

    Args:
        num_pairs: of all prompts; as many as prompts that give pairs if each gives one.
        dropped: how many prompts give no pair, for each of REASONS.
        dropped_prompts: {"prompt", "kind", "reason"} of each of them.
        num_ties_kept: pairs that keep_ties let through.
        num_votes, num_incomplete_votes: votes with both scores, and with one of them.
        agreement: Krippendorff's alpha of each aspect over all candidates and whoever rated them; None: too little to tell.
        voters: candidates that each voter rated on both aspects.
    """

    num_prompts: int
    num_pairs: int
    dropped: Mapping[str, int]
    dropped_prompts: Sequence[Mapping[str, str]]
    num_ties_kept: int
    num_votes: int
    num_incomplete_votes: int
    agreement: Mapping[str, float | None]
    voters: Mapping[str, int]


def select_pairs(path: Path, store: Store, config: PairsConfig = PairsConfig()) -> PairsReport:
    """Writes the pairs of all prompts to one Parquet file, which appears only when complete; one prompt in memory.

    Raises InputError if not a single pair can be made: an empty file would only fail later.
    """
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    dropped_prompts: list[dict[str, str]] = []
    voters: Counter[str] = Counter()
    tables: dict[str, list[NDArray[np.int64]]] = {aspect: [] for aspect in ASPECTS}

    def select() -> Iterator[PreferencePair]:
        for ballot in store.read_ballots():
            counts["prompts"] += 1
            for name, votes in ballot.votes.items():
                complete = sum(vote.is_complete for vote in votes.values())
                counts["votes"] += complete
                counts["incomplete"] += len(votes) - complete
                voters[name] += complete
            for aspect in ASPECTS:
                tables[aspect].append(count_scores(ballot, aspect))
            found = choose_pairs(ballot, config)
            if isinstance(found, str):
                dropped[found] += 1
                dropped_prompts.append({"prompt": ballot.prompt.text, "kind": ballot.prompt.kind, "reason": found})
                continue
            for pair, was_tie in found:
                counts["ties"] += was_tie
                yield pair
        if len(dropped_prompts) == counts["prompts"]:
            reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "the database is empty"
            raise InputError(f"none of {counts['prompts']} prompts gives a pair ({reasons}); more votes, or looser rules, are needed")

    num_pairs = write_pairs(path, select(), store.fingerprint)
    return PairsReport(
        num_prompts=counts["prompts"],
        num_pairs=num_pairs,
        dropped={reason: dropped[reason] for reason in REASONS},
        dropped_prompts=dropped_prompts,
        num_ties_kept=counts["ties"],
        num_votes=counts["votes"],
        num_incomplete_votes=counts["incomplete"],
        agreement={aspect: compute_agreement(np.concatenate(table)) for aspect, table in tables.items()},
        voters=dict(sorted(voters.items())),
    )


def choose_pairs(ballot: Ballot, config: PairsConfig) -> list[tuple[PreferencePair, bool]] | Reason:
    """The pairs of one prompt, and whether a tie was broken for each; or why there is none, which is what the first of them failed by."""
    keys = [candidate.key for candidate in ballot.candidates]
    if len(keys) < 2:
        return "one candidate"
    sums = np.array([row for votes in ballot.votes.values() if (row := _sum_aspects(votes, keys)) is not None])  # [voters, candidates]
    if len(sums) < config.min_voters:
        return "too few voters"
    totals = sums.sum(axis=0).tolist()  # whole numbers, so that equal means are equal
    if min(totals) == max(totals):
        return "all alike"
    agreement = compute_agreement(_count_values(sums, 2 * MIN_SCORE, 2 * MAX_SCORE))
    if agreement is not None and agreement < config.min_agreement:
        return "low agreement"
    best = sorted(range(len(keys)), key=lambda index: (-totals[index], keys[index]))
    worst = sorted(range(len(keys)), key=lambda index: (totals[index], keys[index]))
    scale = len(ASPECTS) * len(sums)
    prompt = ballot.prompt
    pairs: list[tuple[PreferencePair, bool]] = []
    reasons: list[Reason] = []
    for chosen, rejected in list(zip(best, worst, strict=True))[: config.pairs_per_prompt]:
        if totals[chosen] <= totals[rejected]:
            break  # the middle is reached; until here no candidate can have been on both sides
        is_tie = totals.count(totals[chosen]) > 1 or totals.count(totals[rejected]) > 1
        chosen_ids, rejected_ids = (ballot.candidates[index].token_ids for index in (chosen, rejected))
        if is_tie and not config.keep_ties:
            reasons.append("tie")
        elif np.array_equal(chosen_ids, rejected_ids):
            reasons.append("same tokens")
        else:
            scores = totals[chosen] / scale, totals[rejected] / scale
            pairs.append((PreferencePair(prompt.text, prompt.token_ids, chosen_ids, rejected_ids, prompt.kind, *scores), is_tie))
    return pairs or reasons[0]


def count_scores(ballot: Ballot, aspect: str) -> NDArray[np.int64]:
    """[candidates, scores]: how many voters gave each candidate each score."""
    rows = {candidate.key: row for row, candidate in enumerate(ballot.candidates)}
    counts = np.zeros((len(rows), MAX_SCORE - MIN_SCORE + 1), np.int64)
    for votes in ballot.votes.values():
        for key, vote in votes.items():
            score = getattr(vote, aspect)
            if score is not None:
                counts[rows[key], score - MIN_SCORE] += 1
    return counts


def compute_agreement(counts: NDArray[np.int64]) -> float | None:
    """Krippendorff's alpha, ordinal, of [units, values] counts of raters.

    None where it is not defined: no unit has two ratings, or all the ratings that can be compared are the same.
    """
    comparable = counts[counts.sum(axis=1) > 1]
    if (comparable.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=comparable, level_of_measurement="ordinal"))


def export_votes(path: Path, store: Store) -> int:
    """Writes every vote as one line of JSON: candidate, prompt, kind, voter, appeal, alignment, at. Returns how many."""
    return _write_lines(
        path,
        (
            {"candidate": one.candidate, "prompt": one.prompt, "kind": one.kind, "voter": one.voter, **asdict(one.vote), "at": one.at}
            for one in store.read_votes()
        ),
    )


def export_media(folder: Path, store: Store) -> int:
    """Writes every candidate's picture or clip as KEY.webp or KEY.mp4, and candidates.jsonl, which says the prompt of each file.

    For rating elsewhere: the names say nothing about how a candidate was made. Returns how many files.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write_files() -> Iterator[Mapping[str, str]]:
        for ballot in store.read_ballots():
            for candidate in ballot.candidates:
                media_type, media = store.read_media(candidate.key)
                name = f"{candidate.key}.{media_type.partition('/')[2]}"
                (folder / name).write_bytes(media)
                yield {"candidate": candidate.key, "file": name, "prompt": ballot.prompt.text, "kind": ballot.prompt.kind}

    return _write_lines(folder / "candidates.jsonl", write_files())


def read_vote_lines(path: Path) -> Iterator[VoteRecord]:
    """Votes of a JSONL file: {"candidate", "voter", "appeal", "alignment"} and, if known, "at"; "prompt" and "kind" are passed over.

    Raises InputError, which names the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"it is longer than the {MAX_LINE_BYTES} bytes that are allowed")
                if line.strip():
                    yield _as_record(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number} is no vote: {error}") from error


def _as_record(raw: Any) -> VoteRecord:
    if not isinstance(raw, dict):
        raise InputError("an object is needed")
    unknown = sorted(set(raw) - {"candidate", "voter", "prompt", "kind", "at", *ASPECTS})
    if unknown:
        raise InputError(f"it has {unknown[0]!r}, which a vote does not have")
    for name in ("candidate", "voter"):
        if not isinstance(raw.get(name), str):
            raise InputError(f"{name} is {raw.get(name)!r}; a text is needed")
    at = raw.get("at", "")
    if not isinstance(at, str) or not re.fullmatch(r"[0-9T:.+Z-]{0,32}", at):
        raise InputError(f"at is {at!r}; a time such as 2026-01-31T12:00:00+00:00 is needed")
    return VoteRecord(raw["candidate"], raw["voter"], Vote(raw.get("appeal"), raw.get("alignment")), at)


def _sum_aspects(votes: Mapping[str, Vote], keys: Sequence[str]) -> list[int] | None:
    """appeal + alignment for each candidate; None where the voter has not rated all of them on both."""
    sums = []
    for key in keys:
        vote = votes.get(key, Vote())
        if vote.appeal is None or vote.alignment is None:
            return None
        sums.append(vote.appeal + vote.alignment)
    return sums


def _count_values(table: NDArray[np.int64], low: int, high: int) -> NDArray[np.int64]:
    """[voters, units] of values low ... high -> [units, values] counts."""
    return np.stack([(table == value).sum(axis=0) for value in range(low, high + 1)], axis=1)


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """One JSON object on each line; whole or not at all. Returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count
