"""Conversations about pictures and videos: from the files that people share to documents in which the answers alone are targets.

In: LLaVA or LLaVA-OneVision JSON, or OpenAI messages (JSON or JSON Lines). Out: EncodedDocument records of the source "instruct".
The surprising thing: the published chat template shows media before words, so a picture mentioned within a question moves to the front
of that turn. What cannot be learnt from (no answer, a damaged picture, more tokens than the context) is left out and counted by its reason.

Shapes: H, W pixels.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from openemu3 import media
from openemu3.records import Document, Image, InputError, Text, Video
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.sequence import SequenceFormat, Turn
from openemu3.tokenization.vision import VisionTokenizer

PLACEHOLDER = re.compile(r"[ \t]*<(image|video)>[ \t]*\n?")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PUBLISHED_SYSTEM = "You are a helpful assistant."  # the template says it already


@dataclass(frozen=True)
class Shown:
    """A picture or video of a turn: a file, or its bytes."""

    kind: Literal["image", "video"]
    source: Path | bytes


@dataclass(frozen=True)
class Exchange:
    """What was asked, about which media, and what was answered; not empty, without white space at its ends."""

    text: str
    shown: tuple[Shown, ...]
    answer: str


@dataclass(frozen=True)
class Conversation:
    id: str
    exchanges: tuple[Exchange, ...]  # at least one


@dataclass(frozen=True)
class ConversationConfig:
    """How conversations become documents.

    Args:
        min_pixels, max_pixels: a picture whose area is smaller or larger is brought to the bound, its aspect ratio kept; what is between
            stays as it is, but for sides in steps of 8 (paper, section 2.5.2: from 512 x 512 to 1024 x 1024).
        fps, clip_frames: of videos; one that is longer than a clip is shown in as many frames, evenly spread.
        max_tokens: the context; a document that is longer is left out.
        answers: "each" writes one document for every answer, with the ones before as context: only the end of a document says that an
            answer is over, so every answer is seen to end. "all" writes one document in which all answers are targets, which costs the
            tokens of the media once; then only the last answer is seen to end.
    """

    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024
    fps: float = 2.0
    clip_frames: int = 32
    max_tokens: int = 131072
    answers: Literal["each", "all"] = "each"

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise InputError(f"min_pixels is {self.min_pixels} and max_pixels {self.max_pixels}; 0 < min_pixels <= max_pixels is allowed")
        for name in ("clip_frames", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.fps < float("inf"):
            raise InputError(f"fps is {self.fps}; a number above 0 is allowed")
        if self.answers not in ("each", "all"):
            raise InputError(f"answers is {self.answers!r}; allowed are 'each' and 'all'")


# -- reading -----------------------------------------------------------------------------------------------------------------------


class Unusable(Exception):
    """Of one row; the message is the reason it is counted under."""


def read_conversations(path: Path | str, media_folder: Path | None, skipped: Counter[str]) -> Iterator[Conversation]:
    """The conversations of a file, in order; those that cannot be learnt from are counted in `skipped` by their reason.

    Rows are objects with "conversations" (LLaVA: from/value, media named by "image" or "video") or "messages" (OpenAI: role/content).
    media_folder: where relative names of media begin; None: the file's own folder.
    Raises InputError for a file that is no JSON or holds something else than a list or lines of such objects.
    """
    path = Path(path)
    folder = path.parent if media_folder is None else media_folder
    for number, row in enumerate(_read_rows(path), 1):
        if not isinstance(row, dict) or ("conversations" not in row and "messages" not in row):
            raise InputError(f'{path}: row {number} is no conversation; it must be an object with "conversations" or "messages"')
        try:
            exchanges = _read_llava(row, folder) if "conversations" in row else _read_openai(row, folder)
            if not exchanges:
                raise Unusable("no assistant turn")
        except Unusable as error:
            skipped[str(error)] += 1
            continue
        yield Conversation(str(row.get("id", f"{path.stem}-{number}")), tuple(exchanges))


def _read_rows(path: Path) -> Iterator[Any]:
    """JSON Lines are read line by line; a JSON list is in memory at once, as its form demands."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parse_json(line, f"{path}: line {number}")
                return
            rows = _parse_json(file.read(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as conversations ({error})") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} holds {type(rows).__name__}; a list of conversations is allowed, or a .jsonl file with one a line")
    yield from rows


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON ({error})") from error


def _read_llava(row: Mapping[str, Any], folder: Path) -> list[Exchange]:
    """Media come one by one where a question says <image> or <video>; where none says so, they belong to the first question."""
    named = {kind: [Shown(kind, _find(name, folder)) for name in _list(row.get(kind))] for kind in ("image", "video")}
    messages: list[tuple[str, str, list[Shown]]] = []
    texts = [_get_text(turn, "from", "value") for turn in _list(row["conversations"])]
    has_placeholders = any(role == "user" and PLACEHOLDER.search(text) for role, text in texts)
    for role, text in texts:
        shown: list[Shown] = []
        if role == "user" and has_placeholders:
            for mark in PLACEHOLDER.finditer(text):
                # Data sets write <image> for a video, too.
                kind = mark[1] if named[mark[1]] or mark[1] == "video" else "video"
                if not named[kind]:
                    raise Unusable("more <image> or <video> than media")
                shown.append(named[kind].pop(0))
            text = PLACEHOLDER.sub(" ", text)
        elif role == "user" and not any(earlier == "user" for earlier, _, _ in messages):
            shown = [*named["image"], *named["video"]]
        messages.append((role, text, shown))
    if has_placeholders and any(named.values()):
        raise Unusable("more media than <image> or <video>")
    return _pair_up(messages)


def _read_openai(row: Mapping[str, Any], folder: Path) -> list[Exchange]:
    messages = []
    for turn in _list(row["messages"]):
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, list):
            role, text = _get_text(turn, "role", "content")
            messages.append((role, text, list[Shown]()))
            continue
        words: list[str] = []
        shown = []
        for part in content:
            if not isinstance(part, dict):
                raise Unusable("a message part that is no object")
            kind = str(part.get("type"))
            if kind in ("text", "input_text"):
                words.append(str(part.get("text", "")))
            elif kind in ("image", "image_url", "input_image", "video", "video_url"):
                value = part.get(kind, part.get("image_url"))
                shown.append(Shown("video" if kind.startswith("video") else "image", _find(_unwrap(value), folder)))
            else:
                raise Unusable(f"a message part of type {kind}")
        role, _ = _get_text(turn | {"content": ""}, "role", "content")
        messages.append((role, "\n".join(words), shown))
    return _pair_up(messages)


def _get_text(turn: Any, role_key: str, text_key: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or role_key not in turn:
        raise Unusable(f"a turn without {role_key!r}")
    role, text = turn[role_key], turn.get(text_key)
    if role not in ROLES:
        raise Unusable(f"a turn of the role {role!r}")
    if text is not None and not isinstance(text, str):
        raise Unusable(f"a turn whose {text_key!r} is no text")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise Unusable("text with half a surrogate pair") from None
    return ROLES[role], text or ""


def _pair_up(messages: Sequence[tuple[str, str, list[Shown]]]) -> list[Exchange]:
    """Questions with their answers. What follows an empty answer is left out: it refers to something that was not said."""
    exchanges: list[Exchange] = []
    system, words, shown = "", list[str](), list[Shown]()
    asked = False
    for role, text, media_of_turn in messages:
        if role == "system":
            system = text.strip()
        elif role == "user":
            asked = True
            words.append(text.strip())
            shown += media_of_turn
        else:
            answer = text.strip()
            if not asked:
                raise Unusable("an answer before any question")
            if not answer:
                if not exchanges:
                    raise Unusable("an empty answer")
                break
            if media_of_turn:
                raise Unusable("media in an answer")
            if system and system != PUBLISHED_SYSTEM and not exchanges:
                words.insert(0, system)
            question = "\n".join(word for word in words if word)
            if not question and not shown:
                raise Unusable("an empty question")
            exchanges.append(Exchange(question, tuple(shown), answer))
            words, shown, asked = [], [], False
    return exchanges


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _unwrap(value: Any) -> Any:
    return value.get("url") if isinstance(value, dict) else value


def _find(name: Any, folder: Path) -> Path | bytes:
    if not isinstance(name, str) or not name:
        raise Unusable("media without a name")
    if name.startswith("data:"):
        try:
            return base64.b64decode(name.partition(",")[2], validate=True)
        except binascii.Error:
            raise Unusable("a damaged data URL") from None
    if name.startswith(("http://", "https://")):
        raise Unusable("media on the web, which is not fetched")
    path = folder / name.removeprefix("file://")
    if not path.is_file():
        raise Unusable("a media file that is missing")
    return path


# -- encoding ----------------------------------------------------------------------------------------------------------------------


def encode_conversations(
    conversations: Iterable[Conversation],
    tokenizer: VisionTokenizer,
    form: SequenceFormat,
    config: ConversationConfig,
    skipped: Counter[str],
    split: str = "train",
    source: str = "instruct",
) -> Iterator[EncodedDocument]:
    """The documents of the conversations, in order; what is left out is counted in `skipped` by its reason."""
    for conversation in conversations:
        try:
            turns = [
                Turn(exchange.text, tuple(encode_medium(shown, tokenizer, config) for shown in exchange.shown), exchange.answer)
                for exchange in conversation.exchanges
            ]
        except InputError:
            skipped["media that cannot be read"] += 1
            continue
        grids = tuple(part.grid for turn in turns for part in turn.media)
        for document in write_documents_of(turns, form, config.answers):
            encoded = form.encode(document)
            if len(encoded.token_ids) > config.max_tokens:
                skipped[f"more than {config.max_tokens} tokens"] += 1
                continue
            yield EncodedDocument(source, conversation.id, split, encoded, grids=grids)


def write_documents_of(turns: Sequence[Turn], form: SequenceFormat, answers: Literal["each", "all"]) -> list[Document]:
    """Chat documents of finished turns: one for each answer, or one in which all answers are targets. The tokens are those of
    `SequenceFormat.chat_prompt`, with its answer: all that differs is which of them are targets."""
    if answers == "each":
        return [form.chat_document(turns[: end + 1]) for end in range(len(turns))]
    parts: list[Text | Image | Video] = []
    for index, turn in enumerate(turns):
        assert turn.answer is not None
        document = form.chat_document([Turn(turn.text, turn.media, turn.answer)])
        opening, *rest = document.parts
        assert isinstance(opening, Text)
        if index:  # what stands before the first "USER: " is said once
            opening = Text(" " + opening.text[opening.text.index("USER: ") :])
        parts += [opening, *rest]
    return [Document(tuple(parts))]


def encode_medium(shown: Shown, tokenizer: VisionTokenizer, config: ConversationConfig) -> Image | Video:
    """The codes of one picture or video. Raises InputError where it cannot be read, and as `media.fit_size` does."""
    device = tokenizer.quantize.embedding.weight.device
    factor = tokenizer.config.spatial_factor
    with torch.inference_mode():
        if shown.kind == "image":
            pixels = media.preprocess_image(shown.source, config.min_pixels, config.max_pixels, factor)  # [3, 1, H, W]
            return Image(tokenizer.encode_image(pixels[:, 0][None].to(device))[0].cpu().numpy())
        seconds = media.probe_video(shown.source).seconds
        rate = config.fps if not seconds else min(config.fps, max(0.001, config.clip_frames / seconds))
        frames, rate = media.read_video(shown.source, fps=rate, max_frames=config.clip_frames)  # [3, T, H, W]
        height, width = frames.shape[2:]
        fitted = media.fit_size(height, width, config.min_pixels, config.max_pixels, factor)
        pixels = frames if fitted == (height, width) else media.resize(frames, fitted)
        codes = tokenizer.encode_video(pixels[None].to(device))[0].cpu().numpy()
    return Video(codes, rate, frames.shape[1])


def require_some(documents: Iterable[EncodedDocument], skipped: Mapping[str, int]) -> Iterator[EncodedDocument]:
    """The documents as they come. Raises InputError if there are none, and says why; `skipped` is read once they have run out."""
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        reasons = ", ".join(f"{count} left out for {reason}" for reason, count in skipped.items()) or "the files are empty"
        raise InputError(f"no conversation is left to learn from: {reasons}")
