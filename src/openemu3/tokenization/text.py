"""Text to byte-pair ids and back, exactly as Qwen does it, and the training of a small vocabulary of the same kind.

In: a tiktoken ranks file (one line a token: base64 of its bytes, a space, its rank). Out: ids, which are the ranks.
The surprising thing: there are no special tokens here at all. Whatever a user types, `<|image start|>` included, is only ever bytes
to this tokenizer, so that a control id can come from the structure of a document alone (sequence.py).

Source: the split pattern and the NFC normalisation are those of the Qwen tokenizer, whose 151,643 ranks Emu3 uses.
"""

import base64
import binascii
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken

from openemu3.records import InputError, check_unicode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Contractions in any case; letters with one leading symbol; every digit by itself; symbols with one leading space and trailing line
# ends; line ends; spaces up to the one that belongs to the next word; other spaces.
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The regex engine keeps one backtracking entry per blank and gives up (a Rust panic) at a million.
MAX_BLANKS = 100_000


class TextTokenizer:
    """Byte-level BPE over a ranks file.

    Attributes:
        num_tokens: the ids are 0 ... num_tokens - 1.
        fingerprint: sha256 (hex) of the ranks in file form, so that two tokenizers agree exactly if their fingerprints do.
    """

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """Takes token bytes -> rank. Raises InputError unless the ranks are 0 ... n - 1 and all 256 single bytes are tokens."""
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise InputError(f"text vocabulary has {len(ranks)} tokens whose ranks are not 0 to {len(ranks) - 1}, each once")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise InputError(f"text vocabulary lacks {len(missing)} of the 256 single bytes, the first is {missing[0]}; it must hold all")
        self.num_tokens = len(ranks)
        self.fingerprint = hashlib.sha256(_format_ranks(ranks)).hexdigest()
        self._encoding = tiktoken.Encoding("openemu3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        """Reads a ranks file. Raises InputError where it is missing or isn't one."""
        try:
            contents = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the text vocabulary {path}: {error.strerror}") from error
        return cls(_parse_ranks(contents, str(path)))

    @classmethod
    def from_bytes(cls, contents: bytes) -> "TextTokenizer":
        """The same from the contents of a ranks file, such as `train_text_tokenizer` returns."""
        return cls(_parse_ranks(contents, "given as bytes"))

    def encode(self, text: str) -> list[int]:
        """Ids of the NFC-normalised text; empty for empty text. Raises InputError for text that is no valid Unicode or has a run
        of more than 100,000 blanks."""
        check_unicode(text)
        if len(text) > MAX_BLANKS and any(len(run[0]) > MAX_BLANKS for run in re.finditer(r"\s+", text)):
            raise InputError(f"text has a run of more than {MAX_BLANKS} blanks; at most {MAX_BLANKS} are allowed")
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that form no character become U+FFFD. Raises InputError for an id outside the vocabulary."""
        for token_id in ids:
            if not 0 <= token_id < self.num_tokens:
                raise InputError(f"text id is {token_id}; allowed is 0 to {self.num_tokens - 1}")
        return self._encoding.decode(ids, errors="replace")


def train_text_tokenizer(texts: Iterable[str], num_tokens: int) -> bytes:
    """Learns a byte-level BPE of the same kind as Qwen's.

    Args:
        texts: the corpus; the result doesn't depend on its order.
        num_tokens: tokens wanted, the 256 bytes included.
    Returns:
        a ranks file; ids are ranks, and encoding with it equals applying the learnt merges in order.
    Raises:
        InputError: fewer than 256 tokens asked for, or the corpus holds too few different pairs for as many.
    """
    if num_tokens < 256:
        raise InputError(f"num_tokens is {num_tokens}; it must be at least 256, one for each byte")
    vocabulary = _train_merges(texts, num_tokens).get_vocab()
    if len(vocabulary) != num_tokens:
        raise InputError(f"num_tokens is {num_tokens}; this corpus only supports {len(vocabulary)}, give more text or ask for fewer")
    byte_of = _bytes_by_character()
    return _format_ranks({bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()})


def _train_merges(texts: Iterable[str], num_tokens: int) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _bytes_by_character() -> dict[str, int]:
    """The printable stand-in that byte-level BPE uses for each byte, the other way round: bytes that print stand for themselves,
    the others are numbered from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _format_ranks(ranks: dict[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def _parse_ranks(contents: bytes, name: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(contents.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if token in ranks:
                raise ValueError("a token given twice")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"text vocabulary {name}, line {number}: expected base64 and a rank, found {line[:40]!r}") from error
    return ranks
