"""Text ids against Qwen's own tokenizer on its real vocabulary, and our trained vocabularies against their own merges."""

import base64
import random
import socket
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openemu3.records import InputError
from openemu3.tokenization.text import TextTokenizer, _train_merges, train_text_tokenizer

HARD_STRINGS = [
    "a portrait of young girl.",
    "一只戴着墨镜的猫，坐在沙发上。",
    "他说：“你好，世界！”——然后走了……",
    "中文English混排，1024×768像素。",
    "日本語とカタカナ、한국어도 있어요.",
    "DON'T do it, I'LL wait; they've 'd 'S ’t it’s",
    "WE'VERY 'LLLL 'Move 'SS we'llama don'ty",  # a contraction is split off inside a word, in either case
    "f(x)=sin(x)\n\n\n  return 0;\r\n\r\n\tend",
    "one\n\ntwo\n \nthree   \n   four",
    "trailing spaces   ",
    "   leading spaces",
    " ",
    "\n",
    "\t\t a",
    "co-operate/re-enter -- well... (yes!?)",
    "3.14159 12345 １２３ Ⅷ ½ ١٢٣ 0x7fff",
    "64*64 90*90 30*64*64 24fps 5s",
    "👩🏽‍🚀 👨‍👩‍👧‍👦 🇰🇷 ❤️ 😀😀",
    "e\u0301 cafe\u0301 \u212b \u1100\u1161 ﬁ",  # NFC composes the first four, and must leave the ligature
    "q\u0323\u0307 \u0308a",
    "a\u00a0b\u3000c\u2028d\u0085e\u200bf\ufefff",
    "<|endoftext|><|im_start|>user<|im_end|><|extra_204|>",
    "<|image start|>64*64<|image token|><|visual token 000000|><|image end|>",
    "\x00\x01\x7f\ufffd\U0010ffff",
    "ا لعربية עִבְרִית ไทย हिन्दी",
    "a" * 1000 + "!" * 1000 + " " * 1000,
    "https://example.org/?q=1&r=a%20b#c_d",
]
# Worked out with Qwen's tokenizer once and kept, so that the oracle itself can't drift unseen.
PINNED_IDS = {
    "64*64": [21, 19, 9, 21, 19],
    "90*90": [24, 15, 9, 24, 15],
    "0123456789*": [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 9],
    "24fps 5s": [17, 19, 43428, 220, 20, 82],
}


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_hard_strings_get_qwens_own_ids(text, qwen_tokenizer, qwen_oracle):
    expected = qwen_oracle.encode(text, allowed_special=set())
    assert qwen_tokenizer.encode(text) == expected
    assert qwen_tokenizer.decode(expected) == unicodedata.normalize("NFC", text)


@settings(max_examples=300)
@given(text=st.text(max_size=60))
def test_any_text_gets_qwens_own_ids(text, qwen_tokenizer, qwen_oracle):
    assert qwen_tokenizer.encode(text) == qwen_oracle.encode(text, allowed_special=set())


@pytest.mark.parametrize(("text", "ids"), PINNED_IDS.items())
def test_pinned_ids(text, ids, qwen_tokenizer, qwen_oracle):
    assert qwen_tokenizer.encode(text) == ids == qwen_oracle.encode(text)


def test_the_published_vocabulary_is_what_we_think_it_is(qwen_tokenizer, qwen_ranks_path):
    assert qwen_tokenizer.num_tokens == 151643
    # sha256 of the file as Qwen publishes it
    assert qwen_tokenizer.fingerprint == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
    shuffled = qwen_ranks_path.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(shuffled)
    assert TextTokenizer.from_bytes(b"".join(shuffled)).fingerprint == qwen_tokenizer.fingerprint


def test_control_strings_are_ordinary_text(qwen_tokenizer, qwen_oracle):
    text = "<|extra_203|><|image start|><|endoftext|>"
    assert max(qwen_oracle.encode(text)) >= 151643  # the published tokenizer does let a user write control ids
    ids = qwen_tokenizer.encode(text)
    assert max(ids) < 151643
    assert qwen_tokenizer.decode(ids) == text


def test_loading_and_encoding_touch_no_network(qwen_ranks_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextTokenizer.from_file(qwen_ranks_path).encode("64*64") == [21, 19, 9, 21, 19]


def test_incomplete_characters_decode_to_the_replacement(qwen_tokenizer):
    first, *_ = qwen_tokenizer.encode("\U0010ffff")
    assert "\ufffd" in qwen_tokenizer.decode([first])


def test_empty(qwen_tokenizer):
    assert qwen_tokenizer.encode("") == []
    assert qwen_tokenizer.decode([]) == ""


@pytest.mark.parametrize("token_id", [-1, 151643, 184621])
def test_decode_refuses_ids_that_are_not_text(token_id, qwen_tokenizer):
    with pytest.raises(InputError, match=f"text id is {token_id}; allowed is 0 to 151642"):
        qwen_tokenizer.decode([5, token_id])


def test_text_that_the_regex_engine_cannot_take(qwen_tokenizer):
    assert qwen_tokenizer.decode(qwen_tokenizer.encode(" " * 100_000)) == " " * 100_000
    with pytest.raises(InputError, match="more than 100000 blanks"):
        qwen_tokenizer.encode("a" + " " * 100_001 + "b")
    with pytest.raises(InputError, match="surrogate U\\+D83D at index 2"):
        qwen_tokenizer.encode("a \ud83d")


ALL_BYTES = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "lacks 256 of the 256 single bytes, the first is 0"),
        (b"".join(ALL_BYTES[:-1]), "lacks 1 of the 256 single bytes, the first is 255"),
        (b"".join(ALL_BYTES) + b"YWI= 300\n", "ranks are not 0 to 256"),
        (b"".join(ALL_BYTES) + b"YWI= 255\n", "ranks are not 0 to 256"),
        (b"".join(ALL_BYTES) + ALL_BYTES[7], "line 257: expected base64 and a rank"),
        (b"".join(ALL_BYTES) + b"YWI=\n", "line 257: expected base64 and a rank"),
        (b"YWI= one\n", "line 1: expected base64 and a rank"),
        (b"PK\x03\x04 not a ranks file", "line 1: expected base64 and a rank"),
        (b"Y!WI= 3\n", "line 1: expected base64 and a rank"),
    ],
)
def test_a_file_that_is_no_vocabulary(contents, message, tmp_path):
    path = tmp_path / "text.tiktoken"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=message):
        TextTokenizer.from_file(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot read the text vocabulary .*nowhere.tiktoken: No such file"):
        TextTokenizer.from_file(tmp_path / "nowhere.tiktoken")


CORPUS = [
    *[
        "grinning face",
        "smiling cat with heart-eyes",
        "woman astronaut: medium skin tone",
        "flag",
        "keycap 10",
        "10 of 2024, 2024",
        "don't, won't, I'LL",
    ],
    *["笑脸", "戴墨镜的猫", "女宇航员：中等肤色", "红苹果，青苹果", "e\u0301cole", "banana bandana cabana", "aaaaaaaaaa abababababa"],
    *HARD_STRINGS,
]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return TextTokenizer.from_bytes(train_text_tokenizer(CORPUS, 640))


@pytest.fixture(scope="module")
def merges():
    """The learnt merges as the library that learnt them applies them."""
    return _train_merges(CORPUS, 640)


def test_training_gives_exactly_the_tokens_asked_for(trained):
    assert trained.num_tokens == 640
    assert trained.encode("0*") == [15, 9]  # the single bytes have Qwen's own ids


def test_training_does_not_depend_on_the_order_of_texts():
    shuffled = list(CORPUS)
    random.Random(1).shuffle(shuffled)
    assert train_text_tokenizer(CORPUS, 640) == train_text_tokenizer(shuffled, 640) == train_text_tokenizer(iter(CORPUS), 640)


def test_training_never_joins_digits(trained):
    assert trained.encode("2024 10") == [17, 15, 17, 19, trained.encode(" ")[0], 16, 15]


def test_training_learns(trained):
    assert len(trained.encode("smiling cat with heart-eyes")) < 12
    assert len(TextTokenizer.from_bytes(train_text_tokenizer(CORPUS, 256)).encode("smiling cat with heart-eyes")) == 27


@pytest.mark.parametrize("text", CORPUS)
def test_the_ranks_file_encodes_as_the_learnt_merges_do(text, trained, merges):
    assert trained.encode(text) == merges.encode(text).ids


def test_the_ranks_file_encodes_any_text_as_the_learnt_merges_do(trained, merges):
    draw = random.Random(0)
    letters = sorted(set("".join(CORPUS)))
    for _ in range(3000):
        text = "".join(draw.choices(letters, k=draw.randint(1, 12))) + draw.choice(CORPUS)[draw.randint(0, 8) :]
        assert trained.encode(text) == merges.encode(text).ids
        assert trained.decode(trained.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(("num_tokens", "message"), [(255, "at least 256"), (100_000, "this corpus only supports")])
def test_training_refuses_what_it_cannot_make(num_tokens, message):
    with pytest.raises(InputError, match=message):
        train_text_tokenizer(CORPUS, num_tokens)
