"""The page on which people vote, and the HTTP interface below it, which scripts may use too (docs/preferences.md lists it).

In: requests with an access token. Out: one self-contained page, tasks, media, votes. The surprising thing: the page itself is public and
holds nothing; the token stands behind the # of a voter's link, which browsers do not send, and goes with each request in a header. So
there is no cookie that another site could use, and no token in a log.

Whose vote it is follows from the token alone: no request names a voter.
"""

import base64
import hashlib
import re
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openemu3.preferences.store import (
    MAX_SCORE,
    MIN_SCORE,
    RemovedCandidate,
    Store,
    UnknownThing,
    UnknownToken,
    Vote,
    Voter,
)
from openemu3.records import InputError

MAX_BODY = 4096  # bytes of a request
STATUS = {UnknownToken: 401, UnknownThing: 404, RemovedCandidate: 410}

Score = Annotated[int, Field(ge=MIN_SCORE, le=MAX_SCORE, strict=True)]


class VoteBody(BaseModel):
    """What POST /api/votes takes; what is null or left out stays as it was."""

    model_config = ConfigDict(extra="forbid")
    candidate: Annotated[str, Field(max_length=64)]
    appeal: Score | None = None
    alignment: Score | None = None


def build_app(store: Store, voters_per_prompt: int = 3) -> FastAPI:
    """The application; `store` is used by many threads.

    voters_per_prompt: a prompt that so many voters have rated whole comes last for the others.
    """
    if voters_per_prompt < 1:
        raise InputError(f"voters_per_prompt is {voters_per_prompt}; at least 1 is allowed")
    page, policy = load_page()
    app = FastAPI(
        title="openemu3 preferences",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.add_middleware(_Guard, policy=policy)

    def find_voter(request: Request) -> Voter:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise UnknownToken("access token is missing; the header 'Authorization: Bearer TOKEN' is needed")
        return store.find_voter(token.strip())

    Known = Annotated[Voter, Depends(find_voter)]

    @app.exception_handler(InputError)
    def refuse(_: Request, error: InputError) -> JSONResponse:
        status = STATUS.get(type(error), 422)
        return JSONResponse({"error": str(error)}, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)

    @app.exception_handler(RequestValidationError)
    def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return JSONResponse({"error": f"{place[:80]}: {first['msg']}"}, 422)

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> str:
        return page

    @app.get("/api/tasks")
    def list_tasks(voter: Known) -> dict[str, Any]:
        tasks = store.list_tasks(voter)
        # Prompts that need voters first; a prompt this voter has begun is theirs to finish.
        needed = [task.num_rated > 0 or task.num_voters < voters_per_prompt for task in tasks]
        ordered = sorted(zip(needed, tasks, strict=True), key=lambda pair: not pair[0])
        return {
            "voter": voter.name,
            "scores": [MIN_SCORE, MAX_SCORE],
            "tasks": [
                {"prompt": t.prompt, "kind": t.kind, "candidates": t.num_candidates, "rated": t.num_rated, "needed": n} for n, t in ordered
            ],
        }

    @app.get("/api/tasks/{prompt}")
    def show_task(prompt: str, voter: Known) -> dict[str, Any]:
        asked, candidates = store.read_task(voter, prompt)
        return {
            "prompt": prompt,
            "text": asked.text,
            "kind": asked.kind,
            "candidates": [
                {"candidate": c.key, "width": c.width, "height": c.height, "appeal": v.appeal, "alignment": v.alignment}
                for c, v in candidates
            ],
        }

    @app.get("/api/media/{candidate}")
    def show_media(candidate: str, voter: Known) -> Response:
        media_type, media = store.read_media(candidate)
        return Response(media, media_type=media_type, headers={"Cache-Control": "private, max-age=86400", "Vary": "Authorization"})

    @app.post("/api/votes")
    def vote(body: VoteBody, voter: Known) -> dict[str, Any]:
        now = store.vote(voter, body.candidate, Vote(body.appeal, body.alignment))
        return {"candidate": body.candidate, "appeal": now.appeal, "alignment": now.alignment}

    @app.post("/api/undo")
    def undo(voter: Known) -> dict[str, Any]:
        undone = store.undo(voter)
        if undone is None:
            return {"undone": None}
        prompt, candidate, now = undone
        return {"undone": {"prompt": prompt, "candidate": candidate, "appeal": now.appeal, "alignment": now.alignment}}

    return app


def load_page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run its own script and style and nothing else, by their hashes."""
    page = (resources.files("openemu3.preferences") / "page.html").read_text(encoding="utf-8")
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src blob: data:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


class _Guard:
    """Reads a body only up to MAX_BODY bytes, and puts the protective headers on every answer."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self.app = app
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in self.headers.items() if n.lower().encode() not in there]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > MAX_BODY:
                answer = JSONResponse({"error": f"body is larger than {MAX_BODY} bytes"}, 413, {"Connection": "close"})
                await answer(scope, receive, send_guarded)
                return
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        if message["type"] == "http.request":
            await self.app(scope, replay, send_guarded)
