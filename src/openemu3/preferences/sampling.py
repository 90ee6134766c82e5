"""Fills a database with candidates: several pictures or clips of each prompt, with the very tokens that were drawn.

In: a loaded model, prompts, a database. Out: rows in the database, a prompt's candidates all at once or not at all. The surprising
thing: there is no state to resume from. A candidate's key says which weights drew it, with which settings, seed and number, so what is
missing is what the database does not have; and since the same seed draws the same tokens, a run that was killed ends where an undisturbed
one does.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as Picture

from openemu3.generation.engine import Progress
from openemu3.generation.tasks import Drawn, Emu3, Film
from openemu3.preferences.store import Candidate, Kind, Prompt, Store
from openemu3.records import InputError

MAX_PROMPT_BYTES = 100_000  # of one line

Report = Callable[[int, int, int], None]  # (prompt number from 0, tokens drawn of it so far, its tokens)


@dataclass(frozen=True)
class CandidatesConfig:
    """How candidates are drawn. None: as the model wants it.

    Args:
        num_candidates: of each prompt; the paper has 8 to 10. At least 2, or there is nothing to prefer.
        kind: "image" or "video", for prompts that do not say.
        seconds: length of clips; at most one clip of the model, which is the default.
        The others are those of `Emu3.draw`.
    """

    num_candidates: int = 8
    kind: Kind = "image"
    seed: int = 0
    seconds: float | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    aspect_ratio: str = "1:1"
    resolution: int | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.num_candidates < 2:
            raise InputError(f"num_candidates is {self.num_candidates}; at least 2 are needed, so that one can be better")


@dataclass(frozen=True)
class SampleCounts:
    """Prompts and candidates that were asked for, and how many of the candidates were drawn now (the others were there)."""

    num_prompts: int
    num_candidates: int
    num_drawn: int


def read_prompts(path: Path, kind: Kind = "image") -> list[tuple[str, Kind]]:
    """(text, kind) of every prompt of a file: lines, or .jsonl with {"prompt": ..., "kind": "image" or "video"} on each.

    Empty lines are passed over, and a prompt that comes twice counts once. Raises InputError, which names the line.
    """
    found: dict[tuple[str, Kind], None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_PROMPT_BYTES + 1), b""), 1):
            if len(line) > MAX_PROMPT_BYTES:
                raise InputError(f"{path}, line {number} is longer than the {MAX_PROMPT_BYTES} bytes that are allowed")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                prompt = _read_json_prompt(text, kind) if path.suffix.lower() == ".jsonl" else (text, kind)
                Prompt(*prompt, token_ids=np.zeros(0, np.uint32))  # checks them
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number} is no prompt: {error}") from error
            found[prompt] = None
    if not found:
        raise InputError(f"{path} has no prompts; one on each line is needed")
    return list(found)


def sample_candidates(
    emu3: Emu3,
    prompts: Sequence[tuple[str, Kind]],
    store: Store,
    config: CandidatesConfig,
    model: str = "",
    report: Report | None = None,
) -> SampleCounts:
    """Draws what the database does not have yet. Interrupted at any point, it goes on with the prompt it was at.

    model: its name, kept beside the candidates for people; what tells models apart is a digest of the weights.
    """
    weights = compute_weights_digest(emu3)
    num_drawn = 0
    for index, (text, kind) in enumerate(prompts):

        def move(done: int, total: int, index: int = index) -> None:
            if report is not None:
                report(index, done, total)

        num_drawn += _sample_prompt(emu3, text, kind, store, config, model, weights, move)
    if report is not None:
        report(len(prompts), 0, 1)
    return SampleCounts(len(prompts), len(prompts) * config.num_candidates, num_drawn)


def compute_weights_digest(emu3: Emu3) -> str:
    """16 hex digits that change when any weight of the language model does: sums of the tensors' bits, exact on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(emu3.engine.transformer.state_dict().items()):
        bits = tensor.detach().contiguous().view(torch.int16)  # fp32 gives two numbers an element
        digest.update(f"{name} {tensor.dtype} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()[:16]


def _sample_prompt(
    emu3: Emu3, text: str, kind: Kind, store: Store, config: CandidatesConfig, model: str, weights: str, progress: Progress
) -> int:
    """Draws the missing candidates of one prompt and stores them in one transaction; how many there were."""
    asked: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "seed",
            "height",
            "width",
            "aspect_ratio",
            "resolution",
            "negative_prompt",
            "guidance",
            "temperature",
            "top_k",
            "top_p",
        )
    }
    if kind == "video":
        asked |= {"seconds": config.seconds, "fps": config.fps}
    # What the model's own defaults are can change with its config.json, without a change of weights.
    wish = {"text": text, "kind": kind, "weights": weights, "defaults": repr(emu3.defaults), "area": emu3.image_area, **asked}
    keys = [_make_key(wish, number) for number in range(config.num_candidates)]
    there = store.list_candidates(keys)
    missing = [number for number, key in enumerate(keys) if key not in there]
    if not missing:
        return 0
    drawn: list[Drawn[Picture]] | list[Drawn[Film]]
    try:
        if kind == "image":
            (drawn,) = emu3.draw_with_tokens([text], missing, **asked, progress=progress)
        else:
            (drawn,) = emu3.film_with_tokens([text], missing, **asked, progress=progress)
    except InputError as error:
        raise InputError(f"prompt {text[:80]!r} cannot be drawn: {error}") from error
    negative = emu3.defaults.negative_prompt if config.negative_prompt is None else config.negative_prompt
    made_by = {"model": model, "weights": weights, "negative_prompt": negative}
    candidates = [_as_candidate(one, keys[one.stream], made_by) for one in drawn]
    return store.add_candidates(Prompt(text, kind, drawn[0].prompt_ids.astype(np.uint32)), candidates)


def _as_candidate(drawn: Drawn[Picture] | Drawn[Film], key: str, made_by: dict[str, Any]) -> Candidate:
    settings = dict(made_by)
    for name in ("seed", "guidance", "temperature", "top_k", "top_p"):
        settings[name] = getattr(drawn.settings, name)  # as they were in fact, defaults filled in
    if isinstance(drawn.medium, Film):
        height, width = drawn.medium.pixels.shape[2:]
        media_type, media = "video/mp4", _encode_clip(drawn.medium)
        settings |= {"fps": drawn.medium.fps, "num_frames": drawn.medium.num_frames}
    else:
        width, height = drawn.medium.size
        buffer = io.BytesIO()
        drawn.medium.save(buffer, "WEBP", lossless=True)
        media_type, media = "image/webp", buffer.getvalue()
    return Candidate(key, drawn.stream, settings, drawn.token_ids.astype(np.uint32), media_type, media, width, height)


def _encode_clip(film: Film) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        film.save(path)
        return path.read_bytes()


def _make_key(wish: dict[str, Any], number: int) -> str:
    return hashlib.sha256(json.dumps([wish, number], sort_keys=True).encode()).hexdigest()[:32]


def _read_json_prompt(line: str, kind: Kind) -> tuple[str, Kind]:
    raw = json.loads(line)
    if not isinstance(raw, dict) or not isinstance(raw.get("prompt"), str):
        raise InputError('an object with "prompt", a text, is needed')
    unknown = sorted(set(raw) - {"prompt", "kind"})
    if unknown:
        raise InputError(f'it has {unknown[0]!r}; "prompt" and "kind" are allowed')
    return raw["prompt"].strip(), raw.get("kind", kind)
