"""Prompts, candidates, voters and votes in one database: a SQLite file, or PostgreSQL by its URL.

In: what a model drew, who may vote, and votes. Out: the same, as records. Nobody's vote is lost or doubled however many vote at once:
each change is one transaction, a voter's changes come one after another (a lock on the voter's row; on SQLite, on the file), and a
unique constraint stands behind that. The surprising thing: a candidate is removed by a mark. Its row stays, so that a late vote can be
told that it is gone, and sampling does not draw it again.

Scores are whole numbers from 1 (poor) to 5 (excellent), one for each aspect; a vote may still lack one of the two.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import URL, Connection, Engine, Row

from openemu3.records import InputError, check_unicode

VERSION = 1
ASPECTS = ("appeal", "alignment")
MIN_SCORE, MAX_SCORE = 1, 5
MAX_NAME = 100
MAX_TOKEN = 200
LOCK_SECONDS = 30  # how long a writer waits for another one before it gives up

Kind = Literal["image", "video"]
AnyRow = Row[*tuple[Any, ...]]


class UnknownToken(InputError):
    """An access token that nobody has."""


class UnknownThing(InputError):
    """A prompt or candidate that is not in the database."""


class RemovedCandidate(InputError):
    """A candidate that was in the database and has been removed."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What was asked for.

    Args:
        text: in words. kind: "image" or "video".
        token_ids: uint32 [n], the ids that the model read, BOS ... IMG; they say the size too.
    """

    text: str
    kind: Kind
    token_ids: NDArray[np.uint32]

    def __post_init__(self) -> None:
        if self.kind not in ("image", "video"):
            raise InputError(f"prompt has kind {self.kind!r}; 'image' and 'video' are allowed")
        check_unicode(self.text)
        if not self.text.strip() or "\0" in self.text:
            raise InputError(f"prompt is {self.text[:80]!r}; words without NUL characters are needed")

    @property
    def key(self) -> str:
        """32 hex digits that stand for text, kind and ids; the same in every database."""
        return _digest(self.kind.encode(), self.text.encode(), _pack(self.token_ids))


@dataclass(frozen=True, eq=False)
class Candidate:
    """One picture or clip drawn for a prompt.

    Args:
        key: names it in every database; says nothing about how it was made to those who see it.
        number: which one of its prompt, from 0; the stream of its randomness.
        settings: how it was drawn: model, seed, guidance and the like; anything that JSON can hold.
        token_ids: uint32 [m], exactly as drawn, up to EOS. Empty where it was read without them.
        media_type: "image/webp" or "video/mp4". media: the encoded file; empty where it was read without it.
        width, height: pixels.
    """

    key: str
    number: int
    settings: Mapping[str, Any]
    token_ids: NDArray[np.uint32]
    media_type: str
    media: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Voter:
    """A person who may vote. `handle` is the public half of the access token; it also seeds the order in which candidates are shown."""

    id: int
    name: str
    handle: str


@dataclass(frozen=True)
class Vote:
    """Scores from MIN_SCORE to MAX_SCORE; None: not given (yet)."""

    appeal: int | None = None
    alignment: int | None = None

    def __post_init__(self) -> None:
        for aspect in ASPECTS:
            score = getattr(self, aspect)
            if score is None:
                continue
            if isinstance(score, bool) or not isinstance(score, int) or not MIN_SCORE <= score <= MAX_SCORE:
                raise InputError(f"{aspect} is {score!r}; a whole number from {MIN_SCORE} to {MAX_SCORE} is allowed")

    @property
    def is_complete(self) -> bool:
        return self.appeal is not None and self.alignment is not None

    @property
    def is_empty(self) -> bool:
        return self.appeal is None and self.alignment is None


@dataclass(frozen=True)
class Task:
    """One prompt in a voter's list: candidates to rate, how many this voter has rated whole, and how many voters have rated all."""

    prompt: str
    kind: Kind
    num_candidates: int
    num_rated: int
    num_voters: int


@dataclass(frozen=True)
class Ballot:
    """A prompt with its candidates (without media), and who gave them what: votes[voter name][candidate key]."""

    prompt: Prompt
    candidates: Sequence[Candidate]
    votes: Mapping[str, Mapping[str, Vote]]


@dataclass(frozen=True)
class VoteRecord:
    """A vote by names that mean the same in every database.

    at: when, ISO 8601, UTC. prompt, kind: for people who read it; importing needs none.
    """

    candidate: str
    voter: str
    vote: Vote
    at: str
    prompt: str = ""
    kind: str = ""


@dataclass(frozen=True)
class ImportCounts:
    """What became of imported votes: new ones, ones that were there already, and different ones, kept or replaced."""

    added: int
    equal: int
    kept: int
    replaced: int


_METADATA = sa.MetaData()
_ABOUT = sa.Table(
    "emu3_preferences",
    _METADATA,
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False),  # of the tokenizers that made the ids
)
_PROMPTS = sa.Table(
    "prompts",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(32), nullable=False, unique=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("token_ids", sa.LargeBinary, nullable=False),  # uint32, little-endian
)
_CANDIDATES = sa.Table(
    "candidates",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("prompt_id", sa.ForeignKey("prompts.id"), nullable=False, index=True),
    sa.Column("key", sa.String(32), nullable=False, unique=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),  # JSON
    sa.Column("token_ids", sa.LargeBinary, nullable=False),
    sa.Column("media_type", sa.String(32), nullable=False),
    sa.Column("media", sa.LargeBinary, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("removed", sa.Boolean, nullable=False, default=False),
)
_VOTERS = sa.Table(
    "voters",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(MAX_NAME), nullable=False, unique=True),
    sa.Column("handle", sa.String(32), nullable=False, unique=True),
    sa.Column("token_hash", sa.String(64)),  # null: votes were imported, nobody was invited
)
_VOTES = sa.Table(
    "votes",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("voter_id", sa.ForeignKey("voters.id"), nullable=False),
    sa.Column("candidate_id", sa.ForeignKey("candidates.id"), nullable=False, index=True),
    sa.Column("appeal", sa.Integer),
    sa.Column("alignment", sa.Integer),
    sa.Column("at", sa.String(32), nullable=False),
    sa.UniqueConstraint("voter_id", "candidate_id"),
    *(sa.CheckConstraint(f"{aspect} BETWEEN {MIN_SCORE} AND {MAX_SCORE}") for aspect in ASPECTS),
    sa.CheckConstraint("appeal IS NOT NULL OR alignment IS NOT NULL"),
)
# What each change replaced; undo takes the voter's last row back.
_CHANGES = sa.Table(
    "changes",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("voter_id", sa.ForeignKey("voters.id"), nullable=False, index=True),
    sa.Column("candidate_id", sa.ForeignKey("candidates.id"), nullable=False),
    sa.Column("appeal", sa.Integer),
    sa.Column("alignment", sa.Integer),
)
_LIVE = sa.not_(_CANDIDATES.c.removed)
_COMPLETE = sa.and_(_VOTES.c.appeal.is_not(None), _VOTES.c.alignment.is_not(None))
# A candidate's row without its bulk.
_BRIEF = [column for column in _CANDIDATES.c if column.name not in ("media", "token_ids")]


def open_store(where: str | Path, *, create: bool = False, fingerprint: str | None = None) -> Store:
    """The database at a path (SQLite) or URL (postgresql://user:password@host/name).

    Args:
        create: make it if it is not there; `fingerprint` (of the tokenizers) is needed then.
        fingerprint: if given, that of the database must be the same.
    Raises:
        InputError: nothing there, no connection, a database of something else, of another version, or of other tokenizers.
    """
    url = _parse_url(where)
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise InputError(f"database {str(where)!r} is no file; a path is needed, since voters come over several connections")
        if not create and not Path(url.database).is_file():
            raise InputError(f"database {url.database} is not there; `emu3 preferences sample` makes one")
    try:
        engine = _build_engine(url)
        with engine.connect() as connection:
            found = set(sa.inspect(connection).get_table_names())
        name = url.render_as_string(hide_password=True)
        if _ABOUT.name not in found:
            foreign = sorted(found & set(_METADATA.tables))
            if foreign:
                raise InputError(f"database {name} holds a table {foreign[0]!r} of something else; an empty database is needed")
            if not create or fingerprint is None:
                raise InputError(f"database {name} holds no preferences; `emu3 preferences sample` begins them")
            _create_tables(engine, fingerprint)
        with engine.connect() as connection:
            about = connection.execute(sa.select(_ABOUT.c.version, _ABOUT.c.fingerprint)).one()
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise InputError(f"database {url.render_as_string(hide_password=True)} cannot be opened: {reason}") from error
    if about.version != VERSION:
        raise InputError(f"database {name} has version {about.version}; this openemu3 reads version {VERSION}")
    if fingerprint is not None and fingerprint != about.fingerprint:
        raise InputError(f"database {name} holds tokens of other tokenizers than this model's; use one database for each set of tokenizers")
    return Store(engine, about.fingerprint)


class Store:
    """An open database of preferences. Every method is one transaction; any number of threads may call them."""

    def __init__(self, engine: Engine, fingerprint: str) -> None:
        self._engine = engine
        self.fingerprint = fingerprint

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- prompts and candidates

    def add_candidates(self, prompt: Prompt, candidates: Sequence[Candidate]) -> int:
        """Adds a prompt and its candidates, all or none; what is there already (by its key) is left as it is. Returns how many were new."""
        with self._write() as connection:
            _lock_all(connection)
            prompt_id = connection.scalar(sa.select(_PROMPTS.c.id).where(_PROMPTS.c.key == prompt.key))
            if prompt_id is None:
                values: dict[str, Any] = {"key": prompt.key, "text": prompt.text, "kind": prompt.kind}
                prompt_id = _insert(connection, _PROMPTS, values | {"token_ids": _pack(prompt.token_ids)})
            keys = [candidate.key for candidate in candidates]
            there = set(connection.scalars(sa.select(_CANDIDATES.c.key).where(_CANDIDATES.c.key.in_(keys))))
            new = [candidate for candidate in candidates if candidate.key not in there]
            for candidate in new:
                values = {
                    "prompt_id": prompt_id,
                    "key": candidate.key,
                    "number": candidate.number,
                    "settings": json.dumps(candidate.settings, sort_keys=True),
                    "token_ids": _pack(candidate.token_ids),
                    "media_type": candidate.media_type,
                    "media": candidate.media,
                    "width": candidate.width,
                    "height": candidate.height,
                }
                _insert(connection, _CANDIDATES, values)
        return len(new)

    def list_candidates(self, keys: Iterable[str]) -> set[str]:
        """Which of these candidates are in the database, removed ones included."""
        with self._read() as connection:
            return set(connection.scalars(sa.select(_CANDIDATES.c.key).where(_CANDIDATES.c.key.in_(list(keys)))))

    def remove_candidate(self, key: str) -> None:
        """Takes a candidate out of tasks and pairs; votes for it stay in the database and no longer count. Raises UnknownThing."""
        with self._write() as connection:
            done = connection.execute(sa.update(_CANDIDATES).where(_CANDIDATES.c.key == _check_hex(key)).values(removed=True))
            if not done.rowcount:
                raise UnknownThing(f"candidate {key[:80]!r} is not in the database; name one by the key that exports show")

    def read_media(self, key: str) -> tuple[str, bytes]:
        """(media type, encoded file) of a candidate. Raises UnknownThing or RemovedCandidate."""
        with self._read() as connection:
            query = sa.select(_CANDIDATES.c.media_type, _CANDIDATES.c.media, _CANDIDATES.c.removed).where(
                _CANDIDATES.c.key == _check_hex(key)
            )
            row = _check_candidate(connection.execute(query).one_or_none(), key)
        return row.media_type, row.media

    # ---- voters

    def invite(self, name: str, renew: bool = False) -> str:
        """A new voter's access token. It is shown this once: the database keeps only its hash.

        renew: give a voter who is there a new token; the old one is void. Without it InputError is raised for a name that is taken.
        """
        name = _check_name(name)
        secret = secrets.token_urlsafe(32)
        with self._write() as connection:
            _lock_all(connection)
            row = connection.execute(sa.select(_VOTERS).where(_VOTERS.c.name == name)).one_or_none()
            if row is None:
                handle = secrets.token_hex(8)
                _insert(connection, _VOTERS, {"name": name, "handle": handle, "token_hash": _hash_secret(secret)})
            elif row.token_hash is None or renew:
                handle = row.handle
                connection.execute(sa.update(_VOTERS).where(_VOTERS.c.id == row.id).values(token_hash=_hash_secret(secret)))
            else:
                raise InputError(f"voter {name!r} has been invited before; choose another name, or renew, which voids the old token")
        return f"{handle}.{secret}"

    def find_voter(self, token: str) -> Voter:
        """Who has this access token. Raises UnknownToken; how long it takes does not tell how much of a token was right."""
        handle, _, secret = token[:MAX_TOKEN].partition(".")
        with self._read() as connection:
            row = connection.execute(sa.select(_VOTERS).where(_VOTERS.c.handle == _check_hex(handle))).one_or_none()
        expected = "-" * 64 if row is None or row.token_hash is None else row.token_hash
        if not hmac.compare_digest(_hash_secret(secret), expected) or row is None:
            raise UnknownToken("access token is not known; ask for a new link")
        return Voter(row.id, row.name, row.handle)

    # ---- voting

    def list_tasks(self, voter: Voter) -> list[Task]:
        """Every prompt with at least two candidates, in this voter's own order."""
        candidate = _CANDIDATES.c
        rated = (
            sa.select(candidate.prompt_id, _VOTES.c.voter_id, sa.func.count().label("num"))
            .join_from(_VOTES, _CANDIDATES)
            .where(_LIVE, _COMPLETE)
            .group_by(candidate.prompt_id, _VOTES.c.voter_id)
        )
        sizes = (
            sa.select(_PROMPTS.c.id, _PROMPTS.c.key, _PROMPTS.c.kind, sa.func.count().label("num"))
            .join_from(_PROMPTS, _CANDIDATES)
            .where(_LIVE)
            .group_by(_PROMPTS.c.id, _PROMPTS.c.key, _PROMPTS.c.kind)
        )
        with self._read() as connection:
            counts: dict[int, dict[int, int]] = defaultdict(dict)
            for row in connection.execute(rated):
                counts[row.prompt_id][row.voter_id] = row.num
            tasks = []
            for row in connection.execute(sizes):
                voters = counts[row.id]
                whole = sum(number == row.num for number in voters.values())
                if row.num > 1:
                    tasks.append(Task(row.key, row.kind, row.num, voters.get(voter.id, 0), whole))
        return sorted(tasks, key=lambda task: _shuffle(voter, task.prompt))

    def read_task(self, voter: Voter, prompt_key: str) -> tuple[Prompt, list[tuple[Candidate, Vote]]]:
        """A prompt and its candidates (no media, no tokens) with this voter's votes, in this voter's own order. Raises UnknownThing."""
        with self._read() as connection:
            row = connection.execute(sa.select(_PROMPTS).where(_PROMPTS.c.key == _check_hex(prompt_key))).one_or_none()
            if row is None:
                raise UnknownThing(f"prompt {prompt_key[:80]!r} is not in the database")
            own = sa.and_(_VOTES.c.candidate_id == _CANDIDATES.c.id, _VOTES.c.voter_id == voter.id)
            query = (
                sa.select(*_BRIEF, _VOTES.c.appeal, _VOTES.c.alignment)
                .join_from(_CANDIDATES, _VOTES, own, isouter=True)
                .where(_CANDIDATES.c.prompt_id == row.id, _LIVE)
            )
            pairs = [(_as_candidate(found), Vote(found.appeal, found.alignment)) for found in connection.execute(query)]
        return _as_prompt(row), sorted(pairs, key=lambda pair: _shuffle(voter, pair[0].key))

    def vote(self, voter: Voter, candidate: str, vote: Vote) -> Vote:
        """Sets the scores that `vote` has and leaves the other one; returns what the voter's vote is now.

        Raises InputError for a vote without a score, UnknownThing or RemovedCandidate for its candidate.
        """
        if vote.is_empty:
            raise InputError("vote has no score; appeal, alignment or both are needed")
        with self._write() as connection:
            _lock_voter(connection, voter.id)
            candidate_id = _find_candidate(connection, candidate)
            before = _read_vote(connection, voter.id, candidate_id)
            after = Vote(
                before.appeal if vote.appeal is None else vote.appeal,
                before.alignment if vote.alignment is None else vote.alignment,
            )
            if after != before:
                _put_vote(connection, voter.id, candidate_id, after, _now())
                _insert(
                    connection,
                    _CHANGES,
                    {"voter_id": voter.id, "candidate_id": candidate_id, "appeal": before.appeal, "alignment": before.alignment},
                )
        return after

    def undo(self, voter: Voter) -> tuple[str, str, Vote] | None:
        """Takes back the voter's last change: (prompt key, candidate key, the vote as it is again); None if there is nothing left.

        Changes of candidates that have been removed since are passed over.
        """
        with self._write() as connection:
            _lock_voter(connection, voter.id)
            newest = (
                sa.select(_CHANGES, _CANDIDATES.c.key, _PROMPTS.c.key.label("prompt"))
                .join_from(_CHANGES, _CANDIDATES)
                .join(_PROMPTS)
                .where(_CHANGES.c.voter_id == voter.id, _LIVE)
                .order_by(_CHANGES.c.id.desc())
                .limit(1)
            )
            row = connection.execute(newest).one_or_none()
            if row is None:
                return None
            before = Vote(row.appeal, row.alignment)
            _put_vote(connection, voter.id, row.candidate_id, before, _now())
            connection.execute(sa.delete(_CHANGES).where(_CHANGES.c.id == row.id))
        return row.prompt, row.key, before

    # ---- all of it

    def read_ballots(self) -> Iterator[Ballot]:
        """Every prompt with its candidates that are not removed, in the order in which they were added; one prompt in memory."""
        with self._read() as connection:
            prompt_ids = list(connection.scalars(sa.select(_PROMPTS.c.id).order_by(_PROMPTS.c.id)))
        of_prompt = sa.select(*_BRIEF, _CANDIDATES.c.token_ids).where(_LIVE).order_by(_CANDIDATES.c.number, _CANDIDATES.c.id)
        votes_of = (
            sa.select(_VOTERS.c.name, _CANDIDATES.c.key, _VOTES.c.appeal, _VOTES.c.alignment)
            .join_from(_VOTES, _VOTERS)
            .join(_CANDIDATES)
            .where(_LIVE)
            .order_by(_VOTERS.c.name, _CANDIDATES.c.id)
        )
        for prompt_id in prompt_ids:
            with self._read() as connection:
                prompt = _as_prompt(connection.execute(sa.select(_PROMPTS).where(_PROMPTS.c.id == prompt_id)).one())
                candidates = [_as_candidate(row) for row in connection.execute(of_prompt.where(_CANDIDATES.c.prompt_id == prompt_id))]
                votes: dict[str, dict[str, Vote]] = defaultdict(dict)
                for row in connection.execute(votes_of.where(_CANDIDATES.c.prompt_id == prompt_id)):
                    votes[row.name][row.key] = Vote(row.appeal, row.alignment)
            yield Ballot(prompt, candidates, dict(votes))

    def read_votes(self) -> Iterator[VoteRecord]:
        """Every vote for a candidate that is not removed, by candidate and voter; a bounded number of them in memory."""
        query = (
            sa.select(_CANDIDATES.c.key, _VOTERS.c.name, _VOTES.c.appeal, _VOTES.c.alignment, _VOTES.c.at, _PROMPTS.c.text, _PROMPTS.c.kind)
            .join_from(_VOTES, _VOTERS)
            .join(_CANDIDATES)
            .join(_PROMPTS)
            .where(_LIVE)
            .order_by(_CANDIDATES.c.id, _VOTERS.c.name)
        )
        with self._read() as connection:
            for row in connection.execution_options(yield_per=1000).execute(query):
                yield VoteRecord(row.key, row.name, Vote(row.appeal, row.alignment), row.at, row.text, row.kind)

    def import_votes(self, records: Iterable[VoteRecord], replace: bool = False) -> ImportCounts:
        """Takes votes from elsewhere, all or none; voters who are not there are added without an access token.

        replace: what becomes of a vote that is here with other scores: False keeps it, True takes the imported one.
        Raises UnknownThing or RemovedCandidate for a vote whose candidate is not here.
        """
        counts = {"added": 0, "equal": 0, "kept": 0, "replaced": 0}
        with self._write() as connection:
            _lock_all(connection)
            voters = {row.name: row.id for row in connection.execute(sa.select(_VOTERS.c.name, _VOTERS.c.id))}
            for record in records:
                name = _check_name(record.voter)
                if name not in voters:
                    voters[name] = _insert(connection, _VOTERS, {"name": name, "handle": secrets.token_hex(8)})
                if record.vote.is_empty:
                    raise InputError(f"vote of {name!r} for {record.candidate!r} has no score; appeal, alignment or both are needed")
                _lock_voter(connection, voters[name])
                candidate_id = _find_candidate(connection, record.candidate)
                before = _read_vote(connection, voters[name], candidate_id)
                if before == record.vote:
                    counts["equal"] += 1
                elif before.is_empty or replace:
                    counts["added" if before.is_empty else "replaced"] += 1
                    _put_vote(connection, voters[name], candidate_id, record.vote, record.at)
                else:
                    counts["kept"] += 1
        return ImportCounts(**counts)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection


# ------------------------------------------------------------------------------------------------------------------------ the database


def _parse_url(where: str | Path) -> URL:
    text = str(where)
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise InputError("database URL cannot be read; a path, or postgresql://user:password@host/name, is allowed") from error
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise InputError(f"database is of kind {url.get_backend_name()!r}; a SQLite file or PostgreSQL is allowed")
    return url


def _build_engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    assert url.database is not None
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": LOCK_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
        connection.execute("PRAGMA synchronous = FULL")  # a vote that was answered survives a power cut
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at the start: one that reads first and then asks for the lock can be refused.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _create_tables(engine: Engine, fingerprint: str) -> None:
    """Makes the tables, unless another process was faster."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x656D7533)))
        if not sa.inspect(connection).has_table(_ABOUT.name):
            _METADATA.create_all(connection)
            connection.execute(sa.insert(_ABOUT).values(version=VERSION, fingerprint=fingerprint))


def _lock_all(connection: Connection) -> None:
    """One such writer at a time. On SQLite BEGIN IMMEDIATE has seen to that, and FOR UPDATE is left out of the statement."""
    connection.execute(sa.select(_ABOUT.c.version).with_for_update()).one()


def _lock_voter(connection: Connection, voter_id: int) -> None:
    """One change of this voter at a time, in whichever window it was made."""
    connection.execute(sa.select(_VOTERS.c.id).where(_VOTERS.c.id == voter_id).with_for_update()).one()


def _insert(connection: Connection, table: sa.Table, values: Mapping[str, Any]) -> int:
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _find_candidate(connection: Connection, key: str) -> int:
    row = connection.execute(sa.select(_CANDIDATES.c.id, _CANDIDATES.c.removed).where(_CANDIDATES.c.key == _check_hex(key))).one_or_none()
    return int(_check_candidate(row, key).id)


def _check_candidate(row: AnyRow | None, key: str) -> AnyRow:
    if row is None:
        raise UnknownThing(f"candidate {key[:80]!r} is not in the database")
    if row.removed:
        raise RemovedCandidate(f"candidate {key!r} has been removed; it can be rated no longer")
    return row


def _read_vote(connection: Connection, voter_id: int, candidate_id: int) -> Vote:
    query = sa.select(_VOTES.c.appeal, _VOTES.c.alignment).where(_VOTES.c.voter_id == voter_id, _VOTES.c.candidate_id == candidate_id)
    row = connection.execute(query).one_or_none()
    return Vote() if row is None else Vote(row.appeal, row.alignment)


def _put_vote(connection: Connection, voter_id: int, candidate_id: int, vote: Vote, at: str) -> None:
    """Makes the vote what it is to be; an empty one is none. The caller holds the voter's lock."""
    own = sa.and_(_VOTES.c.voter_id == voter_id, _VOTES.c.candidate_id == candidate_id)
    if vote.is_empty:
        connection.execute(sa.delete(_VOTES).where(own))
        return
    scores = {"appeal": vote.appeal, "alignment": vote.alignment, "at": at}
    if not connection.execute(sa.update(_VOTES).where(own).values(**scores)).rowcount:
        _insert(connection, _VOTES, {"voter_id": voter_id, "candidate_id": candidate_id, **scores})


# ----------------------------------------------------------------------------------------------------------------------------- details


def _as_prompt(row: AnyRow) -> Prompt:
    return Prompt(row.text, row.kind, _unpack(row.token_ids))


def _as_candidate(row: AnyRow) -> Candidate:
    """From a brief row, with token ids if it has them."""
    token_ids = _unpack(row._mapping.get("token_ids", b""))
    return Candidate(row.key, row.number, json.loads(row.settings), token_ids, row.media_type, b"", row.width, row.height)


def _shuffle(voter: Voter, key: str) -> str:
    """Sorting by it is a random order of the voter's own, the same at every look."""
    return _digest(voter.handle.encode(), key.encode())


def _digest(*parts: bytes) -> str:
    """32 hex digits; parts are told apart by their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _hash_secret(secret: str) -> str:
    """SHA-256 is enough for 32 random bytes: there are too many of them to try."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _check_hex(text: str) -> str:
    """A key or handle as it is; "" (which nothing has) for what can be none, some of which a database would not even compare."""
    return text if re.fullmatch("[0-9a-f]{1,32}", text) else ""


def _check_name(name: str) -> str:
    if not isinstance(name, str):
        raise InputError(f"voter is {name!r}; a name is needed")
    check_unicode(name)
    name = unicodedata.normalize("NFC", name).strip()
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise InputError(f"voter's name is {name[:MAX_NAME]!r}; 1 to {MAX_NAME} printable characters are allowed")
    return name


def _pack(token_ids: NDArray[np.integer] | Sequence[int]) -> bytes:
    return np.asarray(token_ids).astype("<u4").tobytes()


def _unpack(data: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(data, dtype="<u4").astype(np.uint32)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
