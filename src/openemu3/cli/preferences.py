"""Preferences: `emu3 preferences sample | invite | serve | pairs | export | import | remove`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from openemu3.cli.options import (
    DrawingOptions,
    Json,
    ModelOptions,
    SizeOptions,
    check_outputs,
    print_answer,
    show_progress,
)
from openemu3.records import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from openemu3.preferences.selection import PairsReport
    from openemu3.preferences.store import Store

Database = Annotated[str, arg(help="Path of a SQLite file, or a PostgreSQL URL: postgresql://user:password@host/name.")]
DATABASE = "outputs/preferences.sqlite"


def open_database(where: str, fingerprint: str | None = None, create: bool = False) -> Store:
    with explain_missing():
        from openemu3.preferences.store import open_store
    return open_store(where, create=create, fingerprint=fingerprint)


@contextmanager
def explain_missing() -> Iterator[None]:
    """Around imports: what is not installed becomes InputError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"package {error.name} is not installed; preferences need: pip install 'openemu3[preferences]'") from error


@dataclass(frozen=True)
class SamplePreferences:
    """Draw several candidates of each prompt and keep them, with the very tokens that were drawn.

    A run that was interrupted goes on where it was; running it again with more candidates or prompts adds those.
    """

    prompts: Positional[Path]
    """File of prompts: one on each line, or .jsonl with {"prompt": ..., "kind": "image" or "video"}."""
    database: Database = DATABASE
    num_candidates: int = 8
    """Candidates of each prompt; the paper has 8 to 10."""
    kind: Literal["image", "video"] = "image"
    """What to make of prompts that do not say."""
    seconds: float | None = None
    """Length of clips; at most, and otherwise, one clip of the model."""
    fps: float | None = None
    """Frames per second of clips; otherwise as the model was trained."""
    json: Json = False
    size: SizeOptions = field(default_factory=SizeOptions)
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        with explain_missing():
            from openemu3.preferences.sampling import CandidatesConfig, read_prompts, sample_candidates
        from openemu3.generation.tasks import find_model_folder
        from openemu3.training.export import compute_fingerprint

        config = CandidatesConfig(
            num_candidates=self.num_candidates,
            kind=self.kind,
            seconds=self.seconds,
            fps=self.fps,
            **asdict(self.size),
            **asdict(self.drawing),
        )
        prompts = read_prompts(self.prompts, self.kind)
        tokenizers = find_model_folder(self.model.model) if self.model.tokenizer is None else self.model.tokenizer
        fingerprint = compute_fingerprint(tokenizers)
        with open_database(self.database, fingerprint, create=True) as store:
            emu3 = self.model.load()
            began = time.monotonic()
            with show_progress("drawing") as move:

                def report(index: int, done: int, total: int) -> None:
                    # Tokens of a prompt that is being drawn count as a part of it.
                    move(1000 * index + 1000 * done // max(total, 1), 1000 * len(prompts), f"prompt {index + 1} of {len(prompts)}")

                counts = sample_candidates(emu3, prompts, store, config, self.model.model, report)
        text = f"{self.database}: {counts.num_candidates} candidates of {counts.num_prompts} prompts, {counts.num_drawn} of them new"
        answer = {"database": self.database, **asdict(counts), "seconds": round(time.monotonic() - began, 3)}
        print_answer(self.json, text, answer)


@dataclass(frozen=True)
class InviteVoter:
    """Let somebody vote: prints a link with an access token, which is shown this once and is theirs alone."""

    name: Positional[str]
    """Who it is for; the name stands in the exported votes."""
    database: Database = DATABASE
    renew: bool = False
    """A new token for somebody who has one; the old one is void, the votes stay."""
    address: str = "http://127.0.0.1:8765/"
    """Where voters reach the page."""
    json: Json = False

    def run(self) -> None:
        with open_database(self.database) as store:
            token = store.invite(self.name, self.renew)
        link = f"{self.address.rstrip('/')}/#{token}"
        print_answer(self.json, link, {"voter": self.name, "token": token, "link": link})


@dataclass(frozen=True)
class ServePreferences:
    """Serve the page on which invited voters rate the candidates. Ctrl-C ends it; votes are in the database at once."""

    database: Database = DATABASE
    host: str = "127.0.0.1"
    """Address to listen on; other machines reach 0.0.0.0, and should only through something that adds HTTPS."""
    port: int = 8765
    """Port to listen on; 0 takes a free one."""
    voters_per_prompt: int = 3
    """A prompt that so many voters have rated comes last for the others."""

    def run(self) -> None:
        import sys

        with explain_missing():
            import uvicorn

            from openemu3.preferences.voting import build_app
        if not 0 <= self.port < 65536:
            raise InputError(f"port is {self.port}; 0 to 65535 is allowed")
        with open_database(self.database) as store:
            app = build_app(store, self.voters_per_prompt)
            config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5)
            listening = _listen(self.host, self.port)
            host = f"[{self.host}]" if ":" in self.host else self.host
            print(
                f"voting at http://{host}:{listening.getsockname()[1]}/ (links: emu3 preferences invite NAME)", file=sys.stderr, flush=True
            )
            uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> Any:
    """A listening socket. Raises InputError for an address that cannot be had."""
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port") from error


@dataclass(frozen=True)
class WritePairs:
    """Turn votes into pairs to train on: of each prompt the best-liked candidate and the least-liked one."""

    output: Positional[Path]
    """File to write, .parquet."""
    database: Database = DATABASE
    min_voters: int = 3
    """How many voters must have rated all candidates of a prompt, at least."""
    min_agreement: float = 0.0
    """Krippendorff's alpha among them, at least: 1 is perfect agreement, 0 is chance."""
    keep_ties: bool = False
    """Where several candidates share the score of one that would be chosen or rejected, take one of them instead of dropping the pair."""
    pairs_per_prompt: int = 1
    """At most: 2 pairs the second best with the second worst, too, and so on."""
    json: Json = False

    def run(self) -> None:
        check_outputs([self.output], [".parquet"])
        with open_database(self.database) as store:
            with explain_missing():
                from openemu3.preferences.selection import PairsConfig, select_pairs
            config = PairsConfig(self.min_voters, self.min_agreement, self.keep_ties, self.pairs_per_prompt)
            report = select_pairs(self.output, store, config)
        if self.json:
            print_answer(True, "", {"file": str(self.output), **asdict(report)})
            return
        from rich.console import Console

        console = Console()
        for table in _build_tables(report):
            console.print(table)
        console.print(f"{self.output}: {report.num_pairs} pairs of {report.num_prompts} prompts", markup=False, highlight=False)


def _build_tables(report: PairsReport) -> list[Table]:
    from rich.table import Table

    prompts = Table("prompts", "number", title="What became of the prompts", title_justify="left")
    prompts.add_row("pairs", str(report.num_pairs) + (f" ({report.num_ties_kept} with a tie broken)" if report.num_ties_kept else ""))
    for reason, number in report.dropped.items():
        prompts.add_row(f"dropped: {reason}", str(number))
    votes = Table("votes", "number", title="Votes", title_justify="left")
    votes.add_row("with both scores", str(report.num_votes))
    votes.add_row("with one of them (not counted)", str(report.num_incomplete_votes))
    votes.add_row("voters", str(len(report.voters)))
    for aspect, alpha in report.agreement.items():
        votes.add_row(f"agreement on {aspect} (Krippendorff's alpha)", "not defined" if alpha is None else f"{alpha:.3f}")
    return [prompts, votes]


@dataclass(frozen=True)
class ExportVotes:
    """Write all votes as JSONL, and if wanted the media for rating elsewhere."""

    output: Positional[Path]
    """File to write, .jsonl: candidate, prompt, kind, voter, appeal, alignment, at."""
    database: Database = DATABASE
    media: Path | None = None
    """Folder for every candidate's picture or clip, and candidates.jsonl that says what each is."""
    json: Json = False

    def run(self) -> None:
        check_outputs([self.output], [".jsonl"])
        with open_database(self.database) as store:
            with explain_missing():
                from openemu3.preferences.selection import export_media, export_votes
            num_votes = export_votes(self.output, store)
            num_files = 0 if self.media is None else export_media(self.media, store)
        text = f"{self.output}: {num_votes} votes" + ("" if self.media is None else f"\n{self.media}: {num_files} candidates")
        print_answer(self.json, text, {"file": str(self.output), "votes": num_votes, "media": num_files})


@dataclass(frozen=True)
class ImportVotes:
    """Take in votes that were collected elsewhere: all lines of the file, or none."""

    votes: Positional[Path]
    """JSONL as `emu3 preferences export` writes it; voters who are not known are added, without an access token."""
    database: Database = DATABASE
    replace: bool = False
    """Where the same voter rated the same candidate differently here, the file is right; otherwise the database is."""
    json: Json = False

    def run(self) -> None:
        with open_database(self.database) as store:
            with explain_missing():
                from openemu3.preferences.selection import read_vote_lines
            counts = store.import_votes(read_vote_lines(self.votes), self.replace)
        text = ", ".join(f"{number} {name}" for name, number in asdict(counts).items())
        print_answer(self.json, f"{self.database}: {text}", {"database": self.database, **asdict(counts)})


@dataclass(frozen=True)
class RemoveCandidates:
    """Take candidates out of voting and pairs, such as broken or offensive ones. Votes for them no longer count."""

    candidates: Positional[tuple[str, ...]]
    """Keys of the candidates, as `emu3 preferences export` shows them."""
    database: Database = DATABASE
    json: Json = False

    def run(self) -> None:
        if not self.candidates:
            raise InputError("no candidate was named; at least one key is needed")
        with open_database(self.database) as store:
            for key in self.candidates:
                store.remove_candidate(key)
        print_answer(self.json, f"{self.database}: {len(self.candidates)} removed", {"removed": list(self.candidates)})


@dataclass(frozen=True)
class Preferences:
    """Collect what people like: draw candidates, let people vote, turn votes into pairs for preference alignment (DPO)."""

    what: (
        Annotated[SamplePreferences, subcommand("sample")]
        | Annotated[InviteVoter, subcommand("invite")]
        | Annotated[ServePreferences, subcommand("serve")]
        | Annotated[WritePairs, subcommand("pairs")]
        | Annotated[ExportVotes, subcommand("export")]
        | Annotated[ImportVotes, subcommand("import")]
        | Annotated[RemoveCandidates, subcommand("remove")]
    )

    def run(self) -> None:
        self.what.run()
