"""Made-up prompts and candidates, and a client that speaks plain HTTP; what the tests of this folder share."""

import http.client
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from openemu3.preferences.store import Candidate, Prompt, Store

FINGERPRINT = "0123456789abcdef0123456789abcdef"


def make_prompt(text: str = "a red apple", kind: str = "image", ids=(1, 2, 3)) -> Prompt:
    return Prompt(text, kind, np.array(ids, np.uint32))


def make_candidate(key: int, number: int = 0, ids=None) -> Candidate:
    """A picture whose colour says which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), f"hsl({key * 37 % 360}, 70%, 50%)").save(buffer, "WEBP", lossless=True)
    token_ids = np.array([100 + key, 7, 9] if ids is None else ids, np.uint32)
    return Candidate(f"{key:032x}", number, {"seed": 3, "model": "toy"}, token_ids, "image/webp", buffer.getvalue(), 16, 16)


def fill(store: Store) -> None:
    store.add_candidates(make_prompt(), [make_candidate(key, key) for key in range(4)])
    store.add_candidates(make_prompt("a blue wave"), [make_candidate(10 + key, key) for key in range(3)])


def key_of(number: int) -> str:
    return f"{number:032x}"


@dataclass
class Answer:
    status: int
    body: bytes
    headers: http.client.HTTPMessage

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection to the server, with or without an access token."""

    def __init__(self, port: int, token: str = "") -> None:
        self.port, self.token = port, token
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        sent = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        self.connection.request(method, path, data, sent | (headers or {}))
        answer = self.connection.getresponse()
        return Answer(answer.status, answer.read(), answer.headers)

    def get(self, path: str, **more: Any) -> Answer:
        return self.ask("GET", path, **more)

    def vote(self, key: str, **scores: int) -> Answer:
        return self.ask("POST", "/api/votes", {"candidate": key, **scores})
