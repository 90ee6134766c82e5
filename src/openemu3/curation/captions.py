"""Pictures and clips -> captions, by any OpenAI-compatible endpoint or by our own model; resumable, and every missing caption has a reason.

In: media with ids. Out: in the same order, a caption or why there is none. The surprising thing: answers are kept under what was asked (the
media's hash, the template, the model), not under ids, so that a run that was killed, or another data set with the same pictures, asks
nothing twice. A caption is plain text: `<|image start|>` in one is a run of ordinary characters, here and in the tokenizer.

Source: section 2.1 of arXiv 2409.18869: 8 frames where a clip is labelled, 12 for clips under 20 s, parts of 10 to 20 s for longer ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
import threading
import unicodedata
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openemu3.curation.endpoint import Answer, Ask, EndpointError, NoAnswerError, Question
from openemu3.media import open_image, stream_frames
from openemu3.records import InputError

LABELLED_FRAMES = 8
CLIP_FRAMES = 12
PART_SECONDS = 20.0
LANGUAGES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "de": "German", "fr": "French", "es": "Spanish"}
# What each template may ask to be filled in.
_PLACEHOLDERS = {
    "image": {"language"},
    "video": {"language", "num_frames", "seconds"},
    "video_label": {"language", "num_frames", "seconds"},
    "video_merge": {"language", "num_parts", "seconds", "captions"},
}


@dataclass(frozen=True)
class CaptionConfig:
    """What is asked."""

    language: str = "en"
    """Language of the captions, as a code: en, zh, ja, ko, de, fr, es."""
    purpose: Literal["caption", "label"] = "caption"
    """caption: clips by 12 frames, and longer ones than 20 s in parts; label: by 8 frames, in the detail that a captioner is trained on."""
    templates: Path | None = None
    """Folder with templates of one's own (image.txt, video.txt, video_label.txt, video_merge.txt); what is not in it is as shipped."""
    short_edge: int = 512
    """Frames are made smaller to so many pixels on the shorter side."""
    min_words: int = 5
    """Shorter answers count as no caption (characters, where a language has no spaces)."""
    max_asks: int = 2
    """How often a question is asked while the answers are empty or nonsense. Refusals are not argued with."""
    ask_again: bool = False
    """Ask again what was kept as refused or nonsense; kept captions stay."""
    concurrency: int = 8
    """Questions outstanding at a time."""

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise InputError(f"language is {self.language!r}; allowed are {', '.join(LANGUAGES)}")
        for name, least in (("short_edge", 32), ("min_words", 1), ("max_asks", 1), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class CaptionItem:
    """A picture or clip to be described; its bytes are those of the file."""

    id: str
    kind: Literal["image", "video"]
    media: bytes


@dataclass(frozen=True)
class Part:
    """The caption of a stretch of a longer clip, in seconds from its first frame."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Caption:
    """What came of one item.

    text: the caption, or None; reason: "" or why there is none, beginning with one of unreadable, refused, empty, nonsense, cut off,
    unanswered; parts: of a longer clip; tokens and cost: what this run spent, so nothing for kept answers.
    """

    id: str
    text: str | None
    reason: str
    parts: tuple[Part, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class AnswerCache:
    """Judged answers by what was asked, in a SQLite file: each is on disk before it is used, so that a killed run loses none.

    path  of the file; None keeps answers for this process alone. Several processes of one machine may share a file.
    Raises InputError for a file that is none of these.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None, timeout=60)
        try:
            # Each statement is a transaction of its own; the log beside the file survives the death of the process at any moment.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, reason TEXT NOT NULL, asked TEXT NOT NULL)"
            )
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InputError(f"the file of answers {str(path)!r} cannot be used: {error}") from error

    def get(self, key: str) -> tuple[str, str] | None:
        """The text and the reason that were kept under a key."""
        with self._lock:
            row = self._connection.execute("SELECT text, reason FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else (row[0], row[1])

    def put(self, key: str, text: str, reason: str, asked: Mapping[str, object]) -> None:
        """Keeps an answer; `asked` says in plain words what the key stands for."""
        with self._lock:
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, text, reason, json.dumps(asked)))

    def count(self) -> int:
        """How many answers are kept."""
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Captioner:
    """Describes items by asking. One instance serves one run."""

    def __init__(self, ask: Ask, cache: AnswerCache, config: CaptionConfig | None = None) -> None:
        self.config = config or CaptionConfig()
        self._ask, self._cache = ask, cache
        self._templates = {name: load_template(name, self.config.templates) for name in _PLACEHOLDERS}

    def caption(self, items: Iterable[CaptionItem]) -> Iterator[Caption]:
        """One caption per item, in the items' order. So many items are looked ahead at as there may be questions outstanding, twice.

        Raises EndpointError where the endpoint cannot be used at all; answers that came are kept by then.
        """
        waiting: deque[Future[Caption]] = deque()
        pool = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="caption")
        wait_for_outstanding = True
        try:
            for item in items:
                waiting.append(pool.submit(self.describe, item))
                if len(waiting) >= 2 * self.config.concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except KeyboardInterrupt:
            wait_for_outstanding = False  # closing the endpoint gives them up
            raise
        finally:
            pool.shutdown(wait=wait_for_outstanding, cancel_futures=True)

    def describe(self, item: CaptionItem) -> Caption:
        """The caption of one item. Raises EndpointError."""
        tally = _Tally()
        try:
            if item.kind == "image":
                return tally.conclude(item, self._describe_image(item, tally))
            text, parts = self._describe_video(item, tally)
            return tally.conclude(item, text, parts)
        except EndpointError:
            raise
        except _NoCaptionError as problem:
            return tally.conclude(item, None, reason=str(problem))
        except InputError as error:
            return tally.conclude(item, None, reason=f"unreadable: {error}")

    def _describe_image(self, item: CaptionItem, tally: _Tally) -> str:
        frame = _shrink(open_image(item.media), self.config.short_edge)
        return self._get_answer(_hash(item.media), "image", {}, (frame,), 1.0, {}, tally)

    def _describe_video(self, item: CaptionItem, tally: _Tally) -> tuple[str, tuple[Part, ...]]:
        """A clip is described by frames spread evenly over it; one longer than PART_SECONDS in parts, which are then merged."""
        times, end = _read_times(item.media)
        labelled = self.config.purpose == "label"
        num_parts = 1 if labelled else max(1, math.ceil(round(end / PART_SECONDS, 6)))
        stretches = [(end * number / num_parts, end * (number + 1) / num_parts) for number in range(num_parts)]
        chosen = [choose_frames(times, start, until, LABELLED_FRAMES if labelled else CLIP_FRAMES) for start, until in stretches]
        template, media_hash = "video_label" if labelled else "video", _hash(item.media)
        parts: list[Part] = []
        for (start, until), frames in zip(stretches, _pick_frames(item.media, chosen, self.config.short_edge), strict=True):
            words = {"num_frames": str(len(frames)), "seconds": f"{until - start:.1f}"}
            span = {"start": round(start, 3), "end": round(until, 3)}
            try:
                text = self._get_answer(media_hash, template, words, frames, len(frames) / (until - start), span, tally)
            except _NoCaptionError as problem:
                raise _NoCaptionError(f"{problem} (part {len(parts) + 1} of {num_parts})" if num_parts > 1 else str(problem)) from problem
            parts.append(Part(start, until, text))
        if len(parts) == 1:
            return parts[0].text, ()
        return self._merge(parts, end, tally), tuple(parts)

    def _merge(self, parts: list[Part], seconds: float, tally: _Tally) -> str:
        """One text from the parts' texts: by asking, or one after the other where the model reads no text."""
        if not self._ask.reads_text:
            return " ".join(part.text for part in parts)
        told = "\n".join(f"[{part.start:.0f} s to {part.end:.0f} s] {part.text}" for part in parts)
        words = {"num_parts": str(len(parts)), "seconds": f"{seconds:.1f}", "captions": told}
        return self._get_answer(_hash(told.encode()), "video_merge", words, (), 1.0, {}, tally)

    def _get_answer(
        self,
        media_hash: str,
        template: str,
        words: Mapping[str, str],
        frames: tuple[NDArray[np.uint8], ...],
        fps: float,
        span: Mapping[str, float],
        tally: _Tally,
    ) -> str:
        """A judged answer, kept or new. Raises _NoCaptionError with the reason where it is no caption, and EndpointError."""
        config, source = self.config, self._templates[template]
        asked: dict[str, object] = {
            "media": media_hash,
            "template": template,
            "template_hash": _hash(source.template.encode()),
            "model": self._ask.name,
            "language": config.language,
            "frames": len(frames),
            "short_edge": config.short_edge,
            **span,
        }
        key = _hash(json.dumps(asked, sort_keys=True).encode())
        kept = self._cache.get(key)
        if kept is not None and not (kept[1] and config.ask_again):
            text, reason = kept
        else:
            question = Question(source.substitute(words, language=LANGUAGES[config.language]), frames, fps)
            text, reason = self._ask_until_good(question, tally)
            self._cache.put(key, "" if reason else text, reason, asked)
        if reason:
            raise _NoCaptionError(reason)
        return text

    def _ask_until_good(self, question: Question, tally: _Tally) -> tuple[str, str]:
        text = reason = ""
        for _ in range(self.config.max_asks):
            try:
                answer = self._ask(question)
            except NoAnswerError as error:
                if error.final:
                    return "", f"unanswered: {error}"
                raise _NoCaptionError(f"unanswered: {error}") from error  # not kept: another day it may answer
            tally.add(answer)
            text = clean_caption(answer.text)
            reason = judge_answer(answer, text, question.prompt, self.config)
            if not reason.startswith(("empty", "nonsense")):
                break
        return text, reason


# ------------------------------------------------------------------------------------------------------------------- templates and answers


def load_template(name: str, folder: Path | None = None) -> Template:
    """A prompt template of one's own, or the shipped one. Raises InputError for placeholders that nothing fills in."""
    own = folder / f"{name}.txt" if folder is not None else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"the templates' folder {str(folder)!r} is not there")
    try:
        text = own.read_text("utf-8") if own is not None and own.is_file() else _read_shipped(name)
    except UnicodeDecodeError as error:
        raise InputError(f"template {str(own)!r} is not text in UTF-8") from error
    template = Template(text.strip())
    allowed = _PLACEHOLDERS[name]
    strange = sorted(set(template.get_identifiers()) - allowed) if template.is_valid() else ["$"]
    if strange:
        words = ", ".join(f"${word}" for word in sorted(allowed))
        raise InputError(f"template {name!r} has the placeholder {strange[0]!r}; allowed are {words}, and $$ for $")
    return template


def clean_caption(text: str) -> str:
    """One line of NFC text: white space becomes single spaces; control characters, and what a model thought aloud before it, go."""
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    return unicodedata.normalize("NFC", "".join(letter for letter in text if unicodedata.category(letter) != "Cc")).strip()


# First words of answers that refuse, or tell that no picture arrived. Only the beginning counts: a sign in a picture may say such things.
_REFUSALS = re.compile(
    r"""^\W*(
    (i['’]?m|i\ am|we['’]?re|we\ are)\ (\w+\ ){0,2}(sorry|unable|afraid|not\ able|not\ comfortable) | sorry\b | apologies\b | my\ apologies
    | (i|we)\ (\w+\ )?(can(no|['’])?\ ?t|cannot|won['’]?t|will\ not|must\ decline|do\ not|don['’]?t)\ (\w+\ ){0,2}
        (help|assist|describe|provide|comply|process|identify|view|see|create|fulfill|continue|answer|discuss|generate|access)
    | as\ an?\ (ai|artificial|large|language)\b | unfortunately,?\ (i|we)\b
    | (there\ is|i\ see|you\ have\ provided|it\ (seems|looks|appears)\ (like|that)\ \w+)?\ ?no\ (image|picture|photo|video|frame)s?\b.{0,40}
        \b(provided|attached|uploaded|visible|given|received)
    | please\ (provide|upload|share|attach|send)\b
    | 很?抱歉 | 对不起 | 对不住 | 我(无法|不能|没有办法) | 作为(一个)?(ai|人工智能|语言模型) | 申し訳 | 죄송
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_NO_SPACES = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")  # kana, Chinese characters, Korean syllables


def judge_answer(answer: Answer, text: str, prompt: str, config: CaptionConfig) -> str:
    """Why a cleaned answer is no caption, or "". The first that fits of: refused, cut off, empty, nonsense."""
    if answer.refusal or answer.finish == "content_filter":
        return f"refused: {_quote(answer.refusal) or 'held back by a content filter'}"
    if _REFUSALS.search(text):
        return f"refused: {_quote(text)}"
    if not text:
        return "empty: no text" if answer.finish != "length" else "cut off: the limit of tokens was reached before any text"
    if any(unicodedata.category(letter) in ("Cs", "Co") for letter in text) or "\ufffd" in text:
        return "nonsense: characters that are none"
    if text.startswith("<think>"):
        return (
            "nonsense: thoughts without an answer" if answer.finish != "length" else "cut off: the limit of tokens was reached in thought"
        )
    letters = sum(letter.isalpha() for letter in text)
    solid = sum(not letter.isspace() for letter in text)
    if letters < 0.6 * solid:
        return "nonsense: hardly any letters"
    encoded = text.encode()
    words = text.lower().split()
    if len(encoded) > 5 * len(zlib.compress(encoded, 9)) or (len(words) >= 12 and len(set(words)) < 0.25 * len(words) ** 0.9):
        return "nonsense: it repeats itself"
    if answer.finish == "length":
        return "cut off: the limit of tokens was reached"
    opening = clean_caption(prompt)[:60]
    if opening and opening in text:
        return "nonsense: it repeats the question"
    spaceless = len(_NO_SPACES.findall(text)) / letters
    if (config.language in ("zh", "ja", "ko")) != (spaceless > 0.3):
        return f"nonsense: not in {LANGUAGES[config.language]}"
    if (letters if spaceless > 0.3 else len(words)) < config.min_words:
        return f"nonsense: shorter than {config.min_words} words"
    return ""


def _quote(text: str) -> str:
    """The beginning of an answer, as what any file or terminal can hold."""
    return clean_caption(text)[:100].encode("utf-8", "replace").decode()


# ------------------------------------------------------------------------------------------------------------------------------ the frames


def choose_frames(times: list[float], start: float, end: float, count: int) -> tuple[int, ...]:
    """Numbers of the frames on screen in the middle of each of `count` equal stretches from start to end; fewer if there are fewer.

    times  at which the frames appear, in seconds, ascending.
    """
    middles = (start + (end - start) * (number + 0.5) / count for number in range(count))
    return tuple(sorted({max(0, bisect_right(times, middle) - 1) for middle in middles}))


def _read_times(media: bytes) -> tuple[list[float], float]:
    """When each frame appears, and when the last one ends, in seconds."""
    times, end = [], 0.0
    for frame in stream_frames(media, short_edge=16):
        times.append(float(frame.time))
        end = float(frame.time + frame.duration)
    return times, end


def _pick_frames(media: bytes, chosen: list[tuple[int, ...]], short_edge: int) -> Iterator[tuple[NDArray[np.uint8], ...]]:
    """The frames of each group of ascending numbers, in one walk through the clip; one group is held at a time."""
    frames = enumerate(stream_frames(media, short_edge=short_edge))
    last: tuple[int, NDArray[np.uint8]] | None = None
    for group in chosen:
        picked = []
        for wanted in group:
            while last is None or last[0] < wanted:
                number, frame = next(frames)
                last = number, frame.array
            picked.append(last[1])
        yield tuple(picked)


def _shrink(picture: Image.Image, short_edge: int) -> NDArray[np.uint8]:
    scale = short_edge / min(picture.size)
    if scale < 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return np.array(picture)


# ----------------------------------------------------------------------------------------------------------------------------- the details


class _NoCaptionError(Exception):
    """There is no caption; the message is the reason."""


@dataclass
class _Tally:
    """What one item cost in this run."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.cost += answer.cost

    def conclude(self, item: CaptionItem, text: str | None, parts: tuple[Part, ...] = (), reason: str = "") -> Caption:
        return Caption(item.id, text, reason, parts, self.prompt_tokens, self.completion_tokens, self.cost)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_shipped(name: str) -> str:
    return (resources.files("openemu3.curation") / "prompts" / f"{name}.txt").read_text("utf-8")
