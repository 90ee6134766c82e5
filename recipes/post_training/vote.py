"""Scripted voters: they look at the pictures through the voting server's HTTP interface, as the page does, and rate every one.

In: a database of candidates, a server on it, the real pictures. Out: votes in that database. Appeal follows a taste measured from pixels;
alignment a coarse likeness of the subject to the real one, whatever its size. Each voter sees a little differently, so voters disagree.
The surprising thing: nothing here touches the database; tokens come from `emu3 preferences invite`, and everything else is HTTP.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tastes import TASTES, measure_likeness, to_scores
from torch import Tensor

from openemu3.data.samples import read_columns
from openemu3.media import read_image


@dataclass(frozen=True)
class Vote:
    """Flags of this script."""

    address: str
    """Where the server is, such as http://127.0.0.1:8765/."""
    database: Path
    """The database that it serves; only to invite voters."""
    samples: Path
    """Parquet file of the real pictures; a prompt is one of their captions."""
    taste: Literal["warmth", "size"] = "size"
    """What they like."""
    num_voters: int = 3
    noise: float = 0.25
    """Of a voter's eye, in standard deviations among the candidates of a prompt."""

    def run(self) -> None:
        real = read_real(self.samples)
        for number in range(self.num_voters):
            name = f"voter-{number}"
            # A voter who is there from a run that was stopped gets a new token; the votes stay.
            arguments = ["invite", name, "--database", str(self.database), "--json"]
            invited = run_emu3(arguments) or run_emu3([*arguments, "--renew"])
            if invited is None:
                sys.exit(f"{name} cannot be invited to {self.database}")
            server = Server(self.address, invited["token"])
            num_rated = self._rate_all(server, random.Random(number), real)
            print(f"{name}: {num_rated} pictures rated")

    def _rate_all(self, server: Server, eye: random.Random, real: dict[str, Tensor]) -> int:
        num_rated = 0
        # The server shuffles for every voter anew; in an order of our own, the same pictures always get the same votes.
        for task in sorted(server.ask("/api/tasks")["tasks"], key=lambda task: task["prompt"]):
            if task["rated"] == task["candidates"]:
                continue
            shown = server.ask(f"/api/tasks/{task['prompt']}")
            candidates = sorted(shown["candidates"], key=lambda one: one["candidate"])
            pictures = [read_image(server.read(f"/api/media/{one['candidate']}"))[:, 0] for one in candidates]
            appeal = self._see([TASTES[self.taste](picture) for picture in pictures], eye)
            alignment = self._see([measure_likeness(picture, real[shown["text"]]) for picture in pictures], eye)
            # Both count alike. Where taste moved more than alignment, DPO made large subjects that showed less of what was asked.
            scores = zip(candidates, to_scores(appeal), to_scores(alignment), strict=True)
            for one, liked, aligned in scores:
                server.ask("/api/votes", {"candidate": one["candidate"], "appeal": liked, "alignment": aligned})
                num_rated += 1
        return num_rated

    def _see(self, values: list[float], eye: random.Random) -> Tensor:
        measured = torch.tensor(values, dtype=torch.float64)
        spread = float(measured.std()) if len(values) > 1 else 0.0
        return measured + torch.tensor([eye.gauss(0, self.noise * spread) for _ in values])


@dataclass(frozen=True)
class Server:
    address: str
    token: str

    def read(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.address.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return json.loads(self.read(path, body))


def run_emu3(arguments: list[str]) -> Any:
    """What `emu3 preferences ... --json` says; None if it refuses."""
    done = subprocess.run(["emu3", "preferences", *arguments], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def read_real(path: Path) -> dict[str, Tensor]:
    """Caption -> its picture [3, H, W]."""
    rows = read_columns(path, ["media", "captions"], kind="image")
    return {row["captions"]["en"]: read_image(row["media"])[:, 0] for row in rows if "en" in row["captions"]}


if __name__ == "__main__":
    tyro.cli(Vote).run()
