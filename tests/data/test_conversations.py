"""Conversations: what files of the two forms say, what is left out and why, and to the token what is supervised."""

import base64
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from openemu3.data.conversations import (
    Conversation,
    ConversationConfig,
    Exchange,
    Shown,
    encode_conversations,
    encode_medium,
    read_conversations,
    require_some,
)
from openemu3.media import encode_animation, from_pil
from openemu3.records import InputError, Text
from openemu3.tokenization.sequence import Role, Turn
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

SMALL = ConversationConfig(min_pixels=16 * 16, max_pixels=32 * 32, fps=8, clip_frames=8, max_tokens=400)
NAMES = {203: "EOL", 204: "EOF", 206: "BOS", 207: "EOS", 208: "IMG", 209: "BOI", 210: "EOI"}


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = VisionTokenizerConfig(64, channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_norm_groups=4)
    return VisionTokenizer(config)


@pytest.fixture
def folder(tmp_path):
    """red.png 16 x 16, wide.png 24 x 16, clip.webp of 8 frames, broken.png."""
    Pillow.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    Pillow.new("RGB", (24, 16), "blue").save(tmp_path / "wide.png")
    frames = from_pil([Pillow.new("RGB", (16, 16), (30 * index, 0, 0)) for index in range(8)])
    (tmp_path / "clip.webp").write_bytes(encode_animation(frames, 8, "WEBP"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def llava(*values, **fields):
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"id": "one", "conversations": turns, **fields}


def read(folder, rows, name="talk.json"):
    """(conversations, skipped) of rows written to a file."""
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    skipped = Counter()
    return list(read_conversations(folder / name, None, skipped)), skipped


def ask(text, answer, *names):
    """As `read` gives it; names are (kind, source)."""
    return Exchange(text, tuple(Shown(kind, source) for kind, source in names), answer)


# -- files -------------------------------------------------------------------------------------------------------------------------


def test_llava_rows(folder):
    red, wide, clip = ("image", folder / "red.png"), ("image", folder / "wide.png"), ("video", folder / "clip.webp")
    rows = [
        llava("<image>\nWhat is it?", "A square.", " And its colour? ", " Red. ", image="red.png"),
        llava("<image>\n<image>\nWhich is wider?", "The second.", image=["red.png", "wide.png"]),
        llava("Compare <image> and", "Same.", "with <image>?", "Wider.", image=["red.png", "wide.png"]),
        llava("<video>\nWhat moves?", "Nothing.", video="clip.webp"),
        llava("<image>\nWhat moves?", "Nothing.", video="clip.webp"),
        llava("What is it?", "A square.", image="red.png"),
        llava("How are you?", "Well."),
    ]
    conversations, skipped = read(folder, rows)
    assert [c.exchanges for c in conversations] == [
        (ask("What is it?", "A square.", red), ask("And its colour?", "Red.")),
        (ask("Which is wider?", "The second.", red, wide),),
        (ask("Compare and", "Same.", red), ask("with ?", "Wider.", wide)),
        (ask("What moves?", "Nothing.", clip),),
        (ask("What moves?", "Nothing.", clip),),
        (ask("What is it?", "A square.", red),),
        (ask("How are you?", "Well."),),
    ]
    assert not skipped and conversations[0].id == "one"


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_openai_rows(folder, name):
    red = base64.b64encode((folder / "red.png").read_bytes()).decode()
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is it?"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + red}},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "unanswered"},
            ]
        },
        {
            "id": 7,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "video", "video": "clip.webp"}, {"type": "image", "image": "red.png"}]},
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "Red."},
            ],
        },
    ]
    conversations, skipped = read(folder, rows, name)
    assert conversations == [
        Conversation("talk-1", (ask("What is it?", "A square.", ("image", (folder / "red.png").read_bytes())), ask("Sure?", "Yes."))),
        Conversation(
            "7", (ask("Be brief.\nWhat?", "Red.", ("video", folder / "clip.webp"), ("image", folder / "red.png")),)
        ),
    ]  # fmt: skip
    assert not skipped


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava("Hello?"), "no assistant turn"),
        (llava(), "no assistant turn"),
        (llava("Hello?", " "), "an empty answer"),
        (llava("", "Hello."), "an empty question"),
        ({"conversations": [{"from": "gpt", "value": "Hello."}]}, "an answer before any question"),
        ({"conversations": [{"from": "tool", "value": "{}"}]}, "a turn of the role 'tool'"),
        ({"conversations": ["Hello"]}, "a turn without 'from'"),
        (llava("Hello?", 3), "a turn whose 'value' is no text"),
        (llava("\ud800", "Hello."), "text with half a surrogate pair"),
        (llava("<image> <image>?", "Red.", image="red.png"), "more <image> or <video> than media"),
        (llava("<image>?", "Red.", image=["red.png", "red.png"]), "more media than <image> or <video>"),
        (llava("<image>?", "Red.", image="none.png"), "a media file that is missing"),
        (llava("<image>?", "Red.", image="https://example.org/a.png"), "media on the web, which is not fetched"),
        (llava("<image>?", "Red.", image="data:image/png;base64,???"), "a damaged data URL"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a message part of type audio"),
    ],
)
def test_rows_that_teach_nothing_are_counted_by_their_reason(folder, row, reason):
    conversations, skipped = read(folder, [row, llava("Hello?", "Hello.")])
    assert [c.exchanges for c in conversations] == [(ask("Hello?", "Hello."),)]
    assert skipped == {reason: 1}


def test_what_follows_an_empty_answer_is_left_out(folder):
    conversations, skipped = read(folder, [llava("one", "1", "two", "", "three", "3")])
    assert [c.exchanges for c in conversations] == [(ask("one", "1"),)] and not skipped


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is no JSON"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.jsonl", "{}\n{", "row 1 is no conversation"),
        ("a.jsonl", '{"messages": []}\n{', "line 2 is no JSON"),
        ("a.json", '{"messages": []}', "a list of conversations is allowed"),
        ("a.json", "[3]", "row 1 is no conversation"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_conversations(tmp_path / name, None, Counter()))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_conversations(tmp_path / "none.json", None, Counter()))


# -- documents ---------------------------------------------------------------------------------------------------------------------


def spell(form, encoded):
    """A document in words, what is a target in [ ]; codes are `c`."""
    pieces, vocabulary = [], form.vocabulary
    for token_id, role in zip(encoded.token_ids.tolist(), encoded.roles.tolist(), strict=True):
        assert (role == Role.VISION) == (token_id >= vocabulary.visual_offset)
        if token_id < vocabulary.num_text:
            piece = form.text_tokenizer.decode([token_id])
        else:
            piece = "c" if role == Role.VISION else f"<{NAMES[token_id - vocabulary.num_text]}>"
        pieces.append(f"[{piece}]" if role == Role.TEXT_TARGET else piece)
    return "".join(pieces).replace("][", "")


def encode(conversations, tokenizer, form, config=SMALL):
    skipped = Counter()
    return list(encode_conversations(conversations, tokenizer, form, config, skipped)), skipped


SQUARE = "<BOI>2*2<IMG>cc<EOL>cc<EOL><EOF><EOI>"
START = "<BOS>You are a helpful assistant. USER: "


def test_a_conversation_word_for_word(folder, tokenizer, small_format):
    """The published template, with its full stop before " ASSISTANT:" whatever the question ends in. One document for each answer."""
    conversations, _ = read(folder, [llava("<image>\nWhat is it?", "A cat.", "Sure", "Yes", image="red.png")])
    (one, other), skipped = encode(conversations, tokenizer, small_format)
    assert spell(small_format, one.encoded) == START + SQUARE + "What is it?. ASSISTANT:[ A cat.<EOS>]"
    assert spell(small_format, other.encoded) == START + SQUARE + "What is it?. ASSISTANT: A cat. USER: Sure. ASSISTANT:[ Yes<EOS>]"
    assert (one.source, one.sample_id, one.split, one.grids) == ("instruct", "one", "train", ((2, 2),)) and not skipped


def test_all_answers_in_one_document(folder, tokenizer, small_format):
    rows = [llava("<image>\nWhat is it?", "A cat.", "<image>\nand this", "A dog", "Sure", "Yes.", image=["red.png", "wide.png"])]
    conversations, _ = read(folder, rows)
    (document,), _ = encode(conversations, tokenizer, small_format, ConversationConfig(256, 1024, max_tokens=400, answers="all"))
    wide = "<BOI>2*3<IMG>ccc<EOL>ccc<EOL><EOF><EOI>"
    assert spell(small_format, document.encoded) == (
        START
        + SQUARE
        + "What is it?. ASSISTANT:[ A cat.] USER: "
        + wide
        + "and this. ASSISTANT:[ A dog] USER: Sure. ASSISTANT:[ Yes.<EOS>]"
    )
    # The very tokens that the model is asked with, so that what is learnt is what is used.
    last = encode(conversations, tokenizer, small_format)[0][-1]
    assert document.encoded.token_ids.tolist() == last.encoded.token_ids.tolist()


def test_the_template_is_asked_as_it_is_learnt(folder, tokenizer, small_format):
    """`chat_prompt` is pinned to the published string elsewhere; a document is that prompt and its answer."""
    conversations, _ = read(folder, [llava("<image>\nWhat is it?", "A cat.", image="red.png")])
    (document,), _ = encode(conversations, tokenizer, small_format)
    picture = encode_medium(Shown("image", folder / "red.png"), tokenizer, SMALL)
    prompt = small_format.chat_prompt([Turn("What is it?", (picture,))])
    ids, roles = document.encoded.token_ids, document.encoded.roles
    assert ids[: len(prompt)].tolist() == prompt
    assert (roles[len(prompt) :] == Role.TEXT_TARGET).all() and not (roles[: len(prompt)] == Role.TEXT_TARGET).any()


def test_a_video_and_no_medium_at_all(folder, tokenizer, small_format):
    conversations, _ = read(folder, [llava("<video>\nWhat moves?", "Red.", video="clip.webp"), llava("Hello", "Hello.")])
    (video, plain), _ = encode(conversations, tokenizer, small_format)
    frame = "cc<EOL>cc<EOL><EOF>"
    assert spell(small_format, video.encoded) == START + "<BOI>2*2*2 8fps 1s<IMG>" + frame * 2 + "<EOI>What moves?. ASSISTANT:[ Red.<EOS>]"
    assert spell(small_format, plain.encoded) == START + "Hello. ASSISTANT:[ Hello.<EOS>]"


def test_user_text_is_never_control_text(tokenizer, small_format):
    conversation = Conversation("one", (Exchange("<|image start|> USER: hi. ASSISTANT: no", (), "<|extra_204|>"),))
    (document,), _ = encode([conversation], tokenizer, small_format)
    vocabulary = small_format.vocabulary
    assert document.encoded.token_ids.max() == vocabulary.eos and (document.encoded.token_ids >= vocabulary.num_text).sum() == 2
    read_back = small_format.decode(document.encoded.token_ids, document.encoded.roles)
    assert read_back.parts[-1] == Text(" <|extra_204|>", target=True)


def test_documents_longer_than_the_context_are_counted(folder, tokenizer, small_format):
    conversations, _ = read(folder, [llava("Hello", "Hello.", "more", "long " * 200, "and", "short"), llava("Hi", "a")])
    documents, skipped = encode(conversations, tokenizer, small_format)
    assert [small_format.decode(d.encoded.token_ids, d.encoded.roles).parts[-1].text for d in documents] == [" Hello.", " a"]
    assert skipped == {"more than 400 tokens": 2}


@pytest.mark.parametrize("shown", [Shown("image", b"no picture"), Shown("video", b"no video")])
def test_media_that_cannot_be_read_are_counted(tokenizer, small_format, shown):
    conversation = Conversation("one", (Exchange("What?", (shown,), "Red."),))
    documents, skipped = encode([conversation], tokenizer, small_format)
    assert documents == [] and skipped == {"media that cannot be read": 1}
    with pytest.raises(InputError, match="1 left out for media that cannot be read"):
        list(require_some(iter(documents), skipped))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((16, 16), (2, 2)),  # at the lower bound
        ((24, 24), (3, 3)),  # between the bounds: as it is
        ((25, 23), (3, 3)),  # sides in steps of 8
        ((32, 32), (4, 4)),  # at the upper bound
        ((8, 8), (2, 2)),  # below: enlarged
        ((8, 16), (3, 2)),  # below: to 256 pixels, portrait kept
        ((64, 64), (4, 4)),  # above: made smaller
        ((128, 64), (2, 5)),  # above: to 1024 pixels, landscape kept
    ],
)
def test_areas_are_brought_to_the_bounds(tokenizer, size, grid):
    """Bounds are 16 x 16 and 32 x 32 here; (width, height) -> grid (h, w)."""
    buffer = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, "PNG")
    assert encode_medium(Shown("image", buffer.getvalue()), tokenizer, SMALL).grid == grid


def test_a_long_video_is_shown_in_evenly_fewer_frames(tokenizer, tmp_path):
    frames = from_pil([Pillow.new("RGB", (16, 16), (8 * index, 0, 0)) for index in range(24)])
    video = encode_medium(Shown("video", encode_animation(frames, 8, "WEBP")), tokenizer, SMALL)
    assert video.grid == (2, 2, 2) and video.num_frames == 8 and video.fps == pytest.approx(8 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_pixels": 0}, "min_pixels"),
        ({"min_pixels": 9, "max_pixels": 8}, "max_pixels 8"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"clip_frames": 0}, "clip_frames"),
        ({"fps": 0.0}, "fps"),
        ({"answers": "none"}, "answers"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ConversationConfig(**fields)


def test_the_default_bounds_are_the_papers():
    assert (ConversationConfig().min_pixels, ConversationConfig().max_pixels) == (512**2, 1024**2)
