"""The document format: writes a document as one id sequence, reads ids back into a document, and says which ids are legal next.

In: documents of text, images and videos (records.py). Out: token ids with a role for each. docs/sequence_format.md has it in prose.
The surprising thing: reading, legality and constrained decoding are one state machine (`SequenceReader`), and writing uses the same
layout arithmetic, so no second place knows where an EOL goes.

Shapes: n = tokens of a sequence, t = latent frames, h, w = token grid (height first, as everywhere in Emu3).
Source: image string, ids and prompts as published with Emu3 (arXiv 2409.18869, section 3, and its released code); the meta text of
videos was never published and is defined here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import NDArray

from openemu3.records import FRAMES_PER_LATENT, Document, Image, InputError, Text, Video, round_fps
from openemu3.tokenization.text import TextTokenizer

Grid = tuple[int, int] | tuple[int, int, int]  # (h, w) of an image, (t, h, w) of a video, in token units

NUM_SPECIALS = 211
MAX_SIDE = 9999  # of each of t, h, w: four digits in the meta text
MAX_CODES = 10**8  # of one medium that is written: a bound on memory, hundreds of contexts long


class Role(IntEnum):
    """What a token is, for choosing its loss weight: a training stage is a table role -> weight."""

    PADDING = 0
    TEXT_CONTEXT = 1
    TEXT_TARGET = 2
    VISION = 3
    STRUCTURE = 4


@dataclass(frozen=True)
class Vocabulary:
    """The transformer's ids: text ranks, then 211 specials, then one id for each visual code. Defaults are the published sizes."""

    num_text: int = 151643
    num_codes: int = 32768

    def __post_init__(self) -> None:
        if self.num_text < 256 or self.num_codes < 1:
            raise InputError(f"vocabulary has num_text {self.num_text} and num_codes {self.num_codes}; at least 256 and 1 are needed")

    @property
    def pad(self) -> int:
        return self.num_text

    @property
    def eol(self) -> int:
        return self.num_text + 203

    @property
    def eof(self) -> int:
        return self.num_text + 204

    @property
    def bos(self) -> int:
        return self.num_text + 206

    @property
    def eos(self) -> int:
        return self.num_text + 207

    @property
    def img(self) -> int:
        return self.num_text + 208

    @property
    def boi(self) -> int:
        return self.num_text + 209

    @property
    def eoi(self) -> int:
        return self.num_text + 210

    @property
    def visual_offset(self) -> int:
        """Code c has the id visual_offset + c."""
        return self.num_text + NUM_SPECIALS

    @property
    def size(self) -> int:
        return self.visual_offset + self.num_codes

    def describe(self, token_id: int) -> str:
        """The id in words, for messages."""
        for name in ("pad", "eol", "eof", "bos", "eos", "img", "boi", "eoi"):
            if token_id == getattr(self, name):
                return name.upper()
        if 0 <= token_id < self.num_text:
            return f"text id {token_id}"
        if self.num_text <= token_id < self.visual_offset:
            return f"unused special id {token_id}"
        if self.visual_offset <= token_id < self.size:
            return f"code {token_id - self.visual_offset}"
        return f"id {token_id} (the vocabulary has 0 to {self.size - 1})"


@dataclass(frozen=True)
class Encoded:
    """A document as tokens: token_ids int64 [n], roles uint8 [n] (values of Role)."""

    token_ids: NDArray[np.int64]
    roles: NDArray[np.uint8]


@dataclass(frozen=True)
class Legal:
    """The ids that may come next, as ascending disjoint ranges. One of: a single `forced` id; every code (`codes`, and nothing else);
    or a mixture of text ids and specials."""

    ranges: tuple[range, ...]
    codes: bool = False

    @property
    def forced(self) -> int | None:
        """The only legal id, if there is only one: no model pass is needed to choose it."""
        return self.ranges[0].start if len(self.ranges) == 1 and len(self.ranges[0]) == 1 else None

    def __contains__(self, token_id: int) -> bool:
        return any(token_id in ids for ids in self.ranges)


@dataclass(frozen=True)
class Turn:
    """One exchange of a chat: media first, then the question, as Emu3-Chat was tuned; `answer` is None while it is awaited."""

    text: str
    media: tuple[Image | Video, ...] = ()
    answer: str | None = None

    def __post_init__(self) -> None:
        if not self.text and not self.media:
            raise InputError("chat turn has neither text nor media; it needs one of them")
        if self.answer == "":
            raise InputError("chat turn has an empty answer; use None for an answer that is awaited")


@dataclass(frozen=True)
class Meta:
    """What the meta text between BOI and IMG says. Images: fps and num_frames are None."""

    grid: Grid
    fps: float | None = None
    num_frames: int | None = None


class SequenceFormat:
    """The format for one vocabulary. Stateless: every method depends on its arguments alone.

    Args:
        text_tokenizer: turns text into ids below vocabulary.num_text.
        vocabulary: where specials and codes lie. Raises InputError unless the two agree about num_text.
    """

    def __init__(self, text_tokenizer: TextTokenizer, vocabulary: Vocabulary) -> None:
        if text_tokenizer.num_tokens != vocabulary.num_text:
            raise InputError(f"text tokenizer has {text_tokenizer.num_tokens} tokens; the vocabulary wants {vocabulary.num_text}")
        self.text_tokenizer = text_tokenizer
        self.vocabulary = vocabulary
        self.meta_pieces = {piece: tuple(text_tokenizer.encode(piece)) for piece in _META_PIECES}

    # -- documents -----------------------------------------------------------------------------------------------------------------

    def encode(self, document: Document) -> Encoded:
        """BOS, the parts, EOS. Raises InputError for a code outside the codebook or a grid too large to write."""
        vocabulary = self.vocabulary
        pieces = [self._piece([vocabulary.bos], Role.STRUCTURE)]
        for part in document.parts:
            if isinstance(part, Text):
                role = Role.TEXT_TARGET if part.target else Role.TEXT_CONTEXT
                pieces.append(self._piece(self.text_tokenizer.encode(part.text), role))
            else:
                pieces.append(self._piece(self._media_header(_meta_of(part)), Role.STRUCTURE))
                pieces.append(self._media_body(part))
        last = document.parts[-1]
        # After an answer, EOS is what teaches a model to stop answering.
        stops_answer = isinstance(last, Text) and last.target
        pieces.append(self._piece([vocabulary.eos], Role.TEXT_TARGET if stops_answer else Role.STRUCTURE))
        return Encoded(np.concatenate([p.token_ids for p in pieces]), np.concatenate([p.roles for p in pieces]))

    def decode(self, token_ids: Iterable[int], roles: Sequence[int] | NDArray[np.uint8] | None = None) -> Document:
        """The document that the ids stand for: decode(encode(d).token_ids, encode(d).roles) == d.

        Args:
            token_ids: [n], BOS ... EOS, then any number of PAD.
            roles: [n]; they alone know which text is a target. Without them every text is context, and neighbouring texts are one.
        Raises:
            InputError: the sequence is malformed or ends early; the message names the position and what was expected there.
        """
        ids = _as_ids(token_ids)
        reader = self.reader()
        reader.read(ids)
        if not reader.is_complete:
            raise InputError(f"sequence ends at position {reader.position}, expected {reader.describe_legal()}")
        if roles is not None and len(roles) != len(ids):
            raise InputError(f"sequence has {len(ids)} ids and {len(roles)} roles; there must be one role for each id")
        parts: list[Text | Image | Video] = []
        for span in reader.spans:
            if span.meta is None:
                parts.extend(self._decode_text(ids, roles, span))
            else:
                parts.append(self._decode_media(ids, span, span.meta))
        return Document(tuple(parts))

    def reader(self) -> "SequenceReader":
        """A fresh reader at the start of a sequence: the incremental form of `legal_next`."""
        return SequenceReader(self)

    def legal_next(self, prefix: Iterable[int]) -> Legal:
        """The ids that may follow `prefix` in a well-formed sequence. Raises InputError where the prefix itself is malformed."""
        reader = self.reader()
        reader.read(prefix)
        return reader.legal()

    def vision_layout(self, grid: Grid) -> NDArray[np.int64]:
        """Everything after IMG for a medium that ends its document, EOI and EOS included: -1 where any code may stand, else the
        forced id. Length t (h (w + 1) + 1) + 2, with t = 1 for an image."""
        _check_grid(grid)
        return self.layout_at(grid, np.arange(_body_length(grid) + 1))

    def layout_at(self, grid: Grid, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """`vision_layout(grid)[offsets]` by arithmetic, at a cost that depends on the number of offsets alone."""
        vocabulary = self.vocabulary
        height, width = grid[-2:]
        in_frame = offsets % (height * (width + 1) + 1)
        layout = np.where(in_frame % (width + 1) == width, vocabulary.eol, -1)
        layout[in_frame == height * (width + 1)] = vocabulary.eof
        end = _body_length(grid) - 1
        layout[offsets == end] = vocabulary.eoi
        layout[offsets > end] = vocabulary.eos
        return layout

    # -- prompts -------------------------------------------------------------------------------------------------------------------

    def image_prompt(self, text: str, grid: tuple[int, int]) -> list[int]:
        """BOS + text + BOI + "h*w" + IMG, the published generation prompt; the next token is the first code. `text` may be empty."""
        return [self.vocabulary.bos, *self.text_tokenizer.encode(text), *self._media_header(Meta(grid))]

    def video_prompt(self, text: str, grid: tuple[int, int, int], fps: float, num_frames: int | None = None) -> list[int]:
        """The same for a video of grid (t, h, w) at `fps`; num_frames defaults to 4 t (see records.Video)."""
        meta = Meta(grid, round_fps(fps), FRAMES_PER_LATENT * grid[0] if num_frames is None else num_frames)
        return [self.vocabulary.bos, *self.text_tokenizer.encode(text), *self._media_header(meta)]

    def continuation_prompt(self, text: str, codes: NDArray[np.integer], num_latent_frames: int, fps: float) -> list[int]:
        """The document of a video of `num_latent_frames` in all, cut after the EOF of its first t0 latent frames.

        Args:
            codes: integers [t0, h, w], t0 < num_latent_frames; what has been seen.
        """
        beginning = Video(codes, fps)
        frames, height, width = beginning.grid
        if not frames < num_latent_frames:
            raise InputError(f"num_latent_frames is {num_latent_frames}; to continue {frames} latent frames it must be larger")
        body = self._media_body(beginning).token_ids[:-1]  # the last is EOI
        return [*self.video_prompt(text, (num_latent_frames, height, width), fps), *body.tolist()]

    def understanding_prompt(self, media: Sequence[Image | Video], text: str) -> list[int]:
        """BOS + media + text, as published for Emu3-Stage1 (there with one image); the next token begins the answer."""
        if not media:
            raise InputError("understanding prompt has no media; it needs at least one image or video")
        return self._prompt([*media, text])

    def chat_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The published Emu3-Chat prompt, for one turn with one image to the character:
        BOS + "You are a helpful assistant. USER: " + image + text + ". ASSISTANT:" (the full stop is part of it).

        Generalised: several media stand one after another where the image stands; without media the text follows "USER: " at once;
        every earlier turn is followed by " " + answer + " USER: " and the next turn. The last turn must await its answer.
        """
        if not turns or turns[-1].answer is not None:
            raise InputError("chat prompt must end with a turn whose answer is None, the one to be answered")
        return self._prompt(_chat_runs(turns))

    def chat_document(self, turns: Sequence[Turn]) -> Document:
        """What to train on for `chat_prompt`: its text as context, then " " + the last turn's answer as the target. Earlier answers
        are context, since only EOS teaches a model to stop; train on each of them as a document of its own."""
        if not turns or turns[-1].answer is None:
            raise InputError("chat document must end with a turn that has an answer")
        runs = _chat_runs([*turns[:-1], Turn(turns[-1].text, turns[-1].media)])
        return Document((*_as_parts(runs), Text(" " + turns[-1].answer, target=True)))

    # -- pieces --------------------------------------------------------------------------------------------------------------------

    def _prompt(self, runs: Sequence[str | Image | Video]) -> list[int]:
        ids: list[int] = self.encode(Document(_as_parts(runs))).token_ids[:-1].tolist()
        return ids

    def _piece(self, ids: Sequence[int], role: Role) -> Encoded:
        return Encoded(np.array(ids, dtype=np.int64), np.full(len(ids), role, dtype=np.uint8))

    def _media_header(self, meta: Meta) -> list[int]:
        return [self.vocabulary.boi, *self.text_tokenizer.encode(write_meta(meta)), self.vocabulary.img]

    def _media_body(self, part: Image | Video) -> Encoded:
        largest = int(part.codes.max())
        if largest >= self.vocabulary.num_codes:
            raise InputError(f"{type(part).__name__.lower()} holds the code {largest}; allowed is 0 to {self.vocabulary.num_codes - 1}")
        token_ids = self.vision_layout(part.grid)[:-1]
        is_code = token_ids < 0
        token_ids[is_code] = part.codes.reshape(-1).astype(np.int64) + self.vocabulary.visual_offset
        return Encoded(token_ids, np.where(is_code, Role.VISION, Role.STRUCTURE).astype(np.uint8))

    def _decode_text(self, ids: NDArray[np.int64], roles: Sequence[int] | NDArray[np.uint8] | None, span: "Span") -> list[Text]:
        if roles is None:
            return [Text(self.text_tokenizer.decode(ids[span.start : span.stop].tolist()))]
        run = np.asarray(roles)[span.start : span.stop]
        is_target = run == Role.TEXT_TARGET
        wrong = np.flatnonzero(~is_target & (run != Role.TEXT_CONTEXT))
        if len(wrong):
            raise InputError(f"position {span.start + wrong[0]}: expected a text role, found role {run[wrong[0]]}")
        edges = [0, *(np.flatnonzero(is_target[1:] != is_target[:-1]) + 1).tolist(), len(run)]
        return [
            Text(self.text_tokenizer.decode(ids[span.start + start : span.start + stop].tolist()), bool(is_target[start]))
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]

    def _decode_media(self, ids: NDArray[np.int64], span: "Span", meta: Meta) -> Image | Video:
        body = ids[span.start : span.stop]
        visual_ids = body[body >= self.vocabulary.visual_offset]
        codes = (visual_ids - self.vocabulary.visual_offset).astype(np.int32).reshape(meta.grid)
        return Image(codes) if meta.fps is None else Video(codes, meta.fps, meta.num_frames)


@dataclass(frozen=True)
class Span:
    """Tokens start ... stop - 1: a run of text (meta is None), or what follows IMG of a medium up to and with EOI."""

    start: int
    stop: int
    meta: Meta | None = None


class SequenceReader:
    """Follows a sequence from its BOS on, and knows at any point which ids are legal next.

    Reading n ids costs O(n), however they are divided into calls; whole rows of codes and runs of text are compared at once.

    Attributes:
        position: ids read so far, and the position of the next one.
        spans: the texts and finished media read so far.
        is_complete: EOS has been read; only PAD may follow.
    """

    def __init__(self, form: SequenceFormat) -> None:
        self.form = form
        self.position = 0
        self.spans: list[Span] = []
        self.is_complete = False
        self._meta_text: str | None = None  # between BOI and IMG: what has been written there
        self._unfinished: tuple[int, ...] = ()  # the rest of a piece of meta text that takes several ids
        self._meta: Meta | None = None  # between IMG and EOI: what the medium is
        self._body_start = 0  # position after IMG

    def read(self, token_ids: Iterable[int]) -> None:
        """Takes the next ids. Raises InputError at the first illegal one, with everything before it taken."""
        ids = _as_ids(token_ids)
        while len(ids):
            taken = self._read_body(ids) or self._read_text(ids) or self._read_one(int(ids[0]))
            ids = ids[taken:]

    def legal(self) -> Legal:
        """The ids that may come next."""
        vocabulary = self.form.vocabulary
        if self.position == 0:
            return _legal_ids([vocabulary.bos])
        if self.is_complete:
            return _legal_ids([vocabulary.pad])
        if self._meta is not None:
            offset = np.array([self.position - self._body_start])
            forced = int(self.form.layout_at(self._meta.grid, offset)[0])
            return Legal((range(vocabulary.visual_offset, vocabulary.size),), codes=True) if forced < 0 else _legal_ids([forced])
        if self._meta_text is not None:
            return self._legal_in_meta(self._meta_text)
        ends = [vocabulary.eos, vocabulary.boi] if self.spans else [vocabulary.boi]  # a document has at least one part
        return Legal((range(vocabulary.num_text), *_legal_ids(ends).ranges))

    def describe_legal(self) -> str:
        """What may come next in words, for messages."""
        legal, vocabulary = self.legal(), self.form.vocabulary
        if legal.codes:
            return "a code"
        words = ["text"] if range(vocabulary.num_text) in legal.ranges else []
        words += [vocabulary.describe(ids.start) for ids in legal.ranges if len(ids) == 1]
        place = f" (meta text so far: {self._meta_text!r})" if self._meta_text is not None else ""
        return " or ".join(words) + place

    def _legal_in_meta(self, text: str) -> Legal:
        if self._unfinished:
            return _legal_ids([self._unfinished[0]])
        ids = [piece_ids[0] for piece, piece_ids in self.form.meta_pieces.items() if _can_begin_meta(text + piece)]
        return _legal_ids([*ids, self.form.vocabulary.img] if read_meta(text) else ids)

    def _read_body(self, ids: NDArray[np.int64]) -> int:
        """Takes what of `ids` fits the rest of the current medium; returns how many."""
        if self._meta is None:
            return 0
        vocabulary = self.form.vocabulary
        first = self.position - self._body_start
        end = _body_length(self._meta.grid)
        ids = ids[: end - first]
        layout = self.form.layout_at(self._meta.grid, np.arange(first, first + len(ids)))
        is_code = (ids >= vocabulary.visual_offset) & (ids < vocabulary.size)
        taken = _count_leading(np.where(layout < 0, is_code, ids == layout))
        self.position += taken
        if first + taken == end:
            self.spans.append(Span(self._body_start, self.position, self._meta))
            self._meta = None
        return taken

    def _read_text(self, ids: NDArray[np.int64]) -> int:
        """Takes the run of text that `ids` begin with, where text is allowed; returns its length."""
        if self.position == 0 or self.is_complete or self._meta is not None or self._meta_text is not None:
            return 0
        taken = _count_leading((ids >= 0) & (ids < self.form.vocabulary.num_text))
        if taken:
            start = self.position
            if self.spans and self.spans[-1].meta is None:
                start = self.spans.pop().start
            self.position += taken
            self.spans.append(Span(start, self.position))
        return taken

    def _read_one(self, token_id: int) -> int:
        """Takes one id that is neither text nor inside a medium."""
        vocabulary = self.form.vocabulary
        if token_id not in self.legal():
            raise InputError(f"position {self.position}: expected {self.describe_legal()}, found {vocabulary.describe(token_id)}")
        self.position += 1
        if token_id == vocabulary.boi:
            self._meta_text = ""
        elif token_id == vocabulary.eos:
            self.is_complete = True
        elif self._meta_text is not None:
            self._read_meta_id(token_id, self._meta_text)
        return 1

    def _read_meta_id(self, token_id: int, text: str) -> None:
        if token_id == self.form.vocabulary.img:
            self._meta, self._meta_text, self._body_start = read_meta(text), None, self.position
        elif self._unfinished:
            self._unfinished = self._unfinished[1:]
        else:
            piece, piece_ids = next((p, ids) for p, ids in self.form.meta_pieces.items() if ids[0] == token_id)
            self._meta_text, self._unfinished = text + piece, piece_ids[1:]


# -- meta text ---------------------------------------------------------------------------------------------------------------------
# Images "h*w" (published). Videos "t*h*w FPSfps SECONDSs": grid in tokens, frame rate with at most three decimals, duration.
# Each piece is one pre-token for Qwen's pattern, so that a text's ids are its pieces' ids.

_META_PIECES = (*"0123456789", "*", ".", " ", "fps", "s")
_SIDE = r"([1-9]\d{0,3})"
_RATE = r"((?:[1-9]\d{0,2}|0(?=\.))(?:\.\d{0,2}[1-9])?)"
_RATE_BEGUN = r"(?:[1-9]\d{0,2}|0)(?:\.\d{0,2})?"
_VIDEO_STEPS = (_SIDE, r"\*", _SIDE, r"\*", _SIDE, " ", _RATE, "fps", " ")
_IMAGE = re.compile(rf"{_SIDE}\*{_SIDE}", re.ASCII)
_VIDEO_BEFORE_SECONDS = re.compile("".join(_VIDEO_STEPS), re.ASCII)
_VIDEO = re.compile("".join(_VIDEO_STEPS) + r"(\d+(?:\.\d+)?)s", re.ASCII)
_BEGUN = re.compile(
    "|".join(["".join(_VIDEO_STEPS[:steps]) for steps in range(1, len(_VIDEO_STEPS))] + ["".join(_VIDEO_STEPS[:6]) + _RATE_BEGUN]), re.ASCII
)


def write_meta(meta: Meta) -> str:
    """The meta text: "64*64" for an image, "30*64*64 24fps 5s" for a video.

    The duration has as few decimals as it takes for seconds x fps to be nearest to num_frames, so that 17 frames at 8 fps (2.125 s)
    are "2.1s". Raises InputError for a grid or a number of frames that can't be.
    """
    _check_grid(meta.grid)
    sides = "*".join(str(side) for side in meta.grid)
    if len(meta.grid) == 2 and meta.fps is None and meta.num_frames is None:
        return sides
    if len(meta.grid) != 3 or meta.fps is None or meta.num_frames is None:
        raise InputError(f"meta text for {meta} isn't defined; images have (h, w) alone, videos (t, h, w), fps and num_frames")
    if -(-meta.num_frames // FRAMES_PER_LATENT) != meta.grid[0]:
        most = FRAMES_PER_LATENT * meta.grid[0]
        raise InputError(f"num_frames is {meta.num_frames}; {meta.grid[0]} latent frames stand for {most - 3} to {most} pixel frames")
    rate = Decimal(round(meta.fps * 1000)).scaleb(-3).normalize()
    return f"{sides} {rate:f}fps {_write_seconds(meta.num_frames, Fraction(rate))}s"


def read_meta(text: str) -> Meta | None:
    """What a meta text says; None unless it is exactly what `write_meta` would write."""
    if image := _IMAGE.fullmatch(text):
        height, width = image.groups()
        return Meta((int(height), int(width)))
    if video := _VIDEO.fullmatch(text):
        *sides, rate, seconds = video.groups()
        frames, height, width = (int(side) for side in sides)
        num_frames = round(Fraction(seconds) * Fraction(rate))
        if -(-num_frames // FRAMES_PER_LATENT) == frames and _write_seconds(num_frames, Fraction(rate)) == seconds:
            return Meta((frames, height, width), float(rate), num_frames)
    return None


@lru_cache(maxsize=4096)  # a corpus has few different meta texts
def _can_begin_meta(text: str) -> bool:
    """Whether some meta text begins with `text`."""
    if begun := _VIDEO_BEFORE_SECONDS.match(text):
        frames, rate = int(begun[1]), Fraction(begun[4])
        possible = range(FRAMES_PER_LATENT * (frames - 1) + 1, FRAMES_PER_LATENT * frames + 1)
        return any((begun[0] + _write_seconds(num_frames, rate) + "s").startswith(text) for num_frames in possible)
    return _BEGUN.fullmatch(text) is not None


def _write_seconds(num_frames: int, rate: Fraction) -> str:
    for decimals in count():
        scaled = round(num_frames / rate * 10**decimals)
        if abs(scaled * rate - num_frames * 10**decimals) * 2 < 10**decimals:
            break
    return f"{Decimal(scaled).scaleb(-decimals):f}"


# -- details -----------------------------------------------------------------------------------------------------------------------


def _meta_of(part: Image | Video) -> Meta:
    return Meta(part.grid) if isinstance(part, Image) else Meta(part.grid, part.fps, part.num_frames)


def _body_length(grid: Grid) -> int:
    """Tokens after IMG up to and with EOI."""
    height, width = grid[-2:]
    frames = grid[0] if len(grid) == 3 else 1
    return frames * (height * (width + 1) + 1) + 1


def _check_grid(grid: Grid) -> None:
    sides_fit = len(grid) in (2, 3) and all(1 <= side <= MAX_SIDE for side in grid)
    if not sides_fit or np.prod(grid, dtype=object) > MAX_CODES:
        raise InputError(f"grid is {tuple(grid)}; it must be (h, w) or (t, h, w), each 1 to {MAX_SIDE}, with at most {MAX_CODES} codes")


def _chat_runs(turns: Sequence[Turn]) -> list[str | Image | Video]:
    runs: list[str | Image | Video] = ["You are a helpful assistant. USER: "]
    for index, turn in enumerate(turns):
        runs += [*turn.media, turn.text + ". ASSISTANT:"]
        if index < len(turns) - 1:
            if turn.answer is None:
                raise InputError(f"chat turn {index} has no answer; only the last of {len(turns)} turns may be without")
            runs.append(f" {turn.answer} USER: ")
    return runs


def _as_parts(runs: Sequence[str | Image | Video]) -> tuple[Text | Image | Video, ...]:
    """Context parts of the runs: neighbouring strings are joined before they are tokenised, empty ones left out."""
    parts: list[Text | Image | Video] = []
    for run in runs:
        if not isinstance(run, str):
            parts.append(run)
        elif run and parts and isinstance(before := parts[-1], Text):
            parts[-1] = Text(before.text + run)
        elif run:
            parts.append(Text(run))
    return tuple(parts)


def _as_ids(token_ids: Iterable[int]) -> NDArray[np.int64]:
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids))
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise InputError(f"token ids have shape {list(ids.shape)} and type {ids.dtype}; they must be one row of integers")
    return ids.astype(np.int64)


def _legal_ids(ids: Iterable[int]) -> Legal:
    return Legal(tuple(range(token_id, token_id + 1) for token_id in sorted(set(ids))))


def _count_leading(flags: NDArray[np.bool_]) -> int:
    """How many of `flags` are true before the first false one."""
    return len(flags) if flags.all() else int(np.argmin(flags))
