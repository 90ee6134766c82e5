"""The document format against the published strings, ids and decoding rule, and against itself under random documents and damage."""

import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from openemu3.records import Document, Image, InputError, Text, Video
from openemu3.tokenization.sequence import Meta, Role, SequenceFormat, Turn, Vocabulary, read_meta, write_meta

BOS, EOS, EOL, EOF = "<|extra_203|>", "<|extra_204|>", "<|extra_200|>", "<|extra_201|>"
BOI, IMG, EOI = "<|image start|>", "<|image token|>", "<|image end|>"
CONTROL_STRINGS = ["<|endoftext|>", "<|im_start|>", BOS, EOS, EOL, EOF, BOI, IMG, EOI, "<|visual token 000007|>"]
CODES = np.array([[1, 32767, 3], [40, 500, 6000]])
CLIP = np.arange(12).reshape(2, 2, 3)


# -- ids ---------------------------------------------------------------------------------------------------------------------------


def test_published_ids():
    v = Vocabulary()
    assert (v.pad, v.eol, v.eof, v.bos, v.eos) == (151643, 151846, 151847, 151849, 151850)
    assert (v.img, v.boi, v.eoi, v.visual_offset, v.size) == (151851, 151852, 151853, 151854, 184622)


def test_mini_ids():
    v = Vocabulary(num_text=2048, num_codes=4096)
    assert (v.pad, v.eol, v.eof, v.bos, v.eos) == (2048, 2251, 2252, 2254, 2255)
    assert (v.img, v.boi, v.eoi, v.visual_offset, v.size) == (2256, 2257, 2258, 2259, 6355)


def test_the_text_tokenizer_must_fit_the_vocabulary(qwen_tokenizer):
    with pytest.raises(InputError, match="text tokenizer has 151643 tokens; the vocabulary wants 2048"):
        SequenceFormat(qwen_tokenizer, Vocabulary(num_text=2048))


# -- the published strings, tokenised as a whole by Qwen's code with Emu3's special tokens -----------------------------------------


@pytest.fixture(scope="module")
def published_encoding(qwen_oracle):
    """Emu3's released tokenizer, as its fact sheet describes it: Qwen's, with three more control strings and the visual tokens."""
    qwen = qwen_oracle._tokenizer
    specials = {qwen.decode([token_id]): token_id for token_id in range(151643, 151851)}
    specials |= {IMG: 151851, BOI: 151852, EOI: 151853}
    specials |= {f"<|visual token {code:06d}|>": 151854 + code for code in (*range(16), 40, 500, 6000, 32767)}
    return tiktoken.Encoding("emu3", pat_str=qwen._pat_str, mergeable_ranks=qwen._mergeable_ranks, special_tokens=specials)


def visual(*codes):
    return "".join(f"<|visual token {code:06d}|>" for code in codes)


IMAGE_STRING = BOI + "2*3" + IMG + visual(1, 32767, 3) + EOL + visual(40, 500, 6000) + EOL + EOF + EOI
CLIP_STRING = (
    *(BOI, "2*2*3 8fps 0.9s", IMG),
    *(visual(0, 1, 2), EOL, visual(3, 4, 5), EOL, EOF),
    *(visual(6, 7, 8), EOL, visual(9, 10, 11), EOL, EOF, EOI),
)
CLIP_STRING = "".join(CLIP_STRING)
IMAGE, VIDEO = Image(CODES), Video(CLIP, 8, 7)


@pytest.mark.parametrize(
    ("parts", "string"),
    [
        ((Text("a portrait of young girl. "), IMAGE), "a portrait of young girl. " + IMAGE_STRING),
        ((IMAGE,), IMAGE_STRING),
        ((IMAGE, Text("两只猫\n\n")), IMAGE_STRING + "两只猫\n\n"),
        ((Text("a"), VIDEO), "a" + CLIP_STRING),
        ((Text("a  "), IMAGE, IMAGE, Text(" b "), VIDEO, Text("\nc")), "a  " + IMAGE_STRING * 2 + " b " + CLIP_STRING + "\nc"),
    ],
)
def test_documents_are_their_published_strings(parts, string, published_format, published_encoding):
    expected = published_encoding.encode(BOS + string + EOS, allowed_special="all")
    assert published_format.encode(Document(parts)).token_ids.tolist() == expected


SYSTEM = "You are a helpful assistant. USER: "


@pytest.mark.parametrize(
    ("turns", "string"),
    [
        # published: one turn, one image
        ([Turn("Please describe the image", (IMAGE,))], SYSTEM + IMAGE_STRING + "Please describe the image. ASSISTANT:"),
        ([Turn("图中有什么？", (IMAGE,))], SYSTEM + IMAGE_STRING + "图中有什么？. ASSISTANT:"),
        ([Turn("", (IMAGE,))], SYSTEM + IMAGE_STRING + ". ASSISTANT:"),
        # our generalisation
        ([Turn("hello")], SYSTEM + "hello. ASSISTANT:"),
        ([Turn("compare", (IMAGE, IMAGE))], SYSTEM + IMAGE_STRING * 2 + "compare. ASSISTANT:"),
        ([Turn("what moves", (VIDEO,))], SYSTEM + CLIP_STRING + "what moves. ASSISTANT:"),
        (
            [Turn("what is it", (IMAGE,), "A cat."), Turn("and this", (IMAGE,), "A dog."), Turn("sure")],
            SYSTEM
            + IMAGE_STRING
            + "what is it. ASSISTANT: A cat. USER: "
            + IMAGE_STRING
            + "and this. ASSISTANT: A dog. USER: sure. ASSISTANT:",
        ),
    ],
)
def test_chat_prompts_are_their_published_strings(turns, string, published_format, published_encoding):
    assert published_format.chat_prompt(turns) == published_encoding.encode(BOS + string, allowed_special="all")


def test_other_prompts_are_their_published_strings(published_format, published_encoding):
    def ids(string):
        return published_encoding.encode(BOS + string, allowed_special="all")

    assert published_format.image_prompt("a cat", (90, 90)) == ids("a cat" + BOI + "90*90" + IMG)
    assert published_format.image_prompt("", (48, 85)) == ids(BOI + "48*85" + IMG)
    assert published_format.understanding_prompt([IMAGE], "Describe.") == ids(IMAGE_STRING + "Describe.")
    assert published_format.understanding_prompt([IMAGE, VIDEO], "") == ids(IMAGE_STRING + CLIP_STRING)
    assert published_format.video_prompt("a cat", (30, 64, 64), 24) == ids("a cat" + BOI + "30*64*64 24fps 5s" + IMG)
    assert published_format.video_prompt("", (2, 4, 4), 8, num_frames=7) == ids(BOI + "2*4*4 8fps 0.9s" + IMG)


@pytest.mark.parametrize("num_seen", [1, 2])
def test_a_continuation_prompt_is_a_document_cut_after_a_frame(num_seen, published_format):
    codes = np.arange(3 * 2 * 5).reshape(3, 2, 5)
    document = published_format.encode(Document((Text("a cat"), Video(codes, 8)))).token_ids.tolist()
    cuts = [i for i, token_id in enumerate(document) if token_id == published_format.vocabulary.eof]
    assert published_format.continuation_prompt("a cat", codes[:num_seen], 3, 8) == document[: cuts[num_seen - 1] + 1]


# -- roles -------------------------------------------------------------------------------------------------------------------------


def test_roles(published_format):
    encoded = published_format.encode(Document((Text("0"), IMAGE, Text("1"), Text("23", target=True))))
    expected = (
        "S" + "C" + "S SSS S" + "VVVS VVVS SS" + "C" + "TT" + "T"  # BOS 0 BOI 2*3 IMG rows EOF EOI 1 23 EOS
    ).replace(" ", "")
    letters = {Role.STRUCTURE: "S", Role.TEXT_CONTEXT: "C", Role.TEXT_TARGET: "T", Role.VISION: "V"}
    assert "".join(letters[Role(role)] for role in encoded.roles) == expected
    assert (encoded.token_ids.dtype, encoded.roles.dtype) == (np.int64, np.uint8)


@pytest.mark.parametrize("parts", [(Text("a"),), (Text("a", target=True), IMAGE), (IMAGE,)])
def test_eos_is_structure_unless_it_ends_an_answer(parts, published_format):
    assert published_format.encode(Document(parts)).roles[-1] == Role.STRUCTURE


def test_a_chat_document_is_its_prompt_and_the_answer(published_format):
    asked = [Turn("what is it", (IMAGE,), "A cat."), Turn("sure", (), None)]
    answered = [asked[0], Turn("sure", (), "Yes.")]
    encoded = published_format.encode(published_format.chat_document(answered))
    prompt = published_format.chat_prompt(asked)
    assert encoded.token_ids[: len(prompt)].tolist() == prompt
    assert set(encoded.roles[len(prompt) :]) == {Role.TEXT_TARGET}
    assert Role.TEXT_TARGET not in encoded.roles[: len(prompt)]
    assert published_format.text_tokenizer.decode(encoded.token_ids[len(prompt) : -1].tolist()) == " Yes."


# -- the published decoding rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (2, 3), (48, 85)])
def test_an_images_layout_is_the_published_decoding_rule(height, width, published_format):
    v = published_format.vocabulary
    expected = []
    for offset in range(1, height * (width + 1) + 4):  # counted from IMG, as the released code counts
        if offset % (width + 1) == 0:
            expected.append(v.eol)
        elif offset > (width + 1) * height:
            expected.append({1: v.eof, 2: v.eoi, 3: v.eos}[offset - (width + 1) * height])
        else:
            expected.append(-1)
    if width == 1:  # the released rule tests "end of line" first, which goes wrong past the last row of a one-column image only
        expected[2 * height + 1] = v.eoi
    assert published_format.vision_layout((height, width)).tolist() == expected


def test_a_videos_layout(published_format):
    v = published_format.vocabulary
    frame = [-1, -1, -1, v.eol, -1, -1, -1, v.eol, v.eof]
    assert published_format.vision_layout((3, 2, 3)).tolist() == frame * 3 + [v.eoi, v.eos]
    assert len(published_format.vision_layout((30, 64, 64))) == 30 * (64 * 65 + 1) + 2


@pytest.mark.parametrize("grid", [(0, 4), (4,), (4, -1), (10000, 1), (1, 1, 1, 1), (9999, 9999, 9999)])
def test_an_impossible_grid(grid, published_format):
    for attempt in (published_format.vision_layout, lambda grid: published_format.image_prompt("a", grid)):
        with pytest.raises(InputError, match="grid is"):
            attempt(grid)


# -- meta text ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        (Meta((64, 64)), "64*64"),
        (Meta((1, 9999)), "1*9999"),
        (Meta((30, 64, 64), 24.0, 120), "30*64*64 24fps 5s"),
        (Meta((4, 8, 8), 8.0, 16), "4*8*8 8fps 2s"),
        (Meta((5, 8, 8), 8.0, 17), "5*8*8 8fps 2.1s"),
        (Meta((5, 8, 8), 8.0, 18), "5*8*8 8fps 2.2s"),
        (Meta((1, 2, 3), 24.0, 1), "1*2*3 24fps 0.04s"),
        (Meta((1, 2, 3), 100.0, 1), "1*2*3 100fps 0.01s"),
        (Meta((1, 2, 3), 29.97, 4), "1*2*3 29.97fps 0.13s"),
        (Meta((1, 2, 3), 0.001, 1), "1*2*3 0.001fps 1000s"),
        (Meta((1, 2, 3), 999.999, 1), "1*2*3 999.999fps 0.001s"),
    ],
)
def test_meta_texts(meta, text):
    assert write_meta(meta) == text
    assert read_meta(text) == meta


@given(num_frames=st.integers(1, 39996), thousandths=st.integers(1, 999_999))
def test_every_rate_and_length_can_be_read_back(num_frames, thousandths):
    meta = Meta((-(-num_frames // 4), 3, 2), thousandths / 1000, num_frames)
    assert read_meta(write_meta(meta)) == meta


@pytest.mark.parametrize(
    "text",
    [
        *["", "64", "64*", "*64", "64*064", "0*64", "64x64", "64*64 ", " 64*64", "64*64*64", "10000*1", "６４*64", "64 * 64", "-1*2"],
        *["4*8*8 8fps", "4*8*8 8fps 2", "4*8*8 8 fps 2s", "4*8*8 8fps  2s", "4*8*8 8.0fps 2s", "4*8*8 08fps 2s", "4*8*8 0fps 2s"],
        *["4*8*8 8fps 2.0s", "4*8*8 8fps 2.01s", "4*8*8 8fps 3s", "4*8*8 8fps 1s", "4*8*8 0.fps 2s", "4*8*8 8.1234fps 2s", "8*8 8fps 2s"],
    ],
)
def test_what_is_no_meta_text(text):
    assert read_meta(text) is None


@pytest.mark.parametrize("meta", [Meta((2, 3), 8.0, 4), Meta((1, 2, 3)), Meta((2, 2, 3), 8.0, 4), Meta((2, 2, 3), 8.0, 9)])
def test_meta_texts_that_cannot_be(meta):
    with pytest.raises(InputError):
        write_meta(meta)


# -- any document ------------------------------------------------------------------------------------------------------------------

texts = st.one_of(st.text(min_size=1, max_size=12), st.sampled_from(CONTROL_STRINGS), st.sampled_from(["3*4", " 8fps 2s", "0", "e\u0301"]))
sides = st.integers(1, 4)


@st.composite
def media(draw):
    def codes(*shape):
        return draw(numpy_st.arrays(np.int32, shape, elements=st.integers(0, 63)))

    if draw(st.booleans()):
        return Image(codes(draw(sides), draw(sides)))
    clip = codes(draw(sides), draw(sides), draw(sides))
    fps = draw(st.one_of(st.sampled_from([8, 24, 24000 / 1001, 30000 / 1001, 12.5]), st.floats(0.001, 999)))
    return Video(clip, fps, 4 * len(clip) - draw(st.integers(0, 3)))


@st.composite
def documents(draw):
    parts = []
    for part in draw(st.lists(st.one_of(st.builds(Text, texts, st.booleans()), media()), min_size=1, max_size=5)):
        follows_its_like = parts and isinstance(part, Text) and isinstance(parts[-1], Text) and parts[-1].target == part.target
        if not follows_its_like:
            parts.append(part)
    return Document(tuple(parts))


@settings(max_examples=200)
@given(document=documents())
def test_decode_undoes_encode(document, small_format):
    encoded = small_format.encode(document)
    assert small_format.decode(encoded.token_ids, encoded.roles) == document
    assert small_format.decode(encoded.token_ids.tolist() + [small_format.vocabulary.pad] * 3, [*encoded.roles, 0, 0, 0]) == document


@given(document=documents())
def test_without_roles_all_text_is_context_and_joined(document, small_format):
    runs = []
    for part in document.parts:
        if isinstance(part, Text) and runs and isinstance(runs[-1], Text):
            runs[-1] = Text(runs[-1].text + part.text)
        else:
            runs.append(Text(part.text) if isinstance(part, Text) else part)
    assert small_format.decode(small_format.encode(document).token_ids) == Document(tuple(runs))


@settings(max_examples=60)
@given(document=documents())
def test_the_grammar_allows_every_document_at_every_prefix(document, small_format):
    ids = small_format.encode(document).token_ids.tolist()
    reader = small_format.reader()
    for position, token_id in enumerate(ids):
        legal = reader.legal()
        assert token_id in legal
        assert legal == small_format.legal_next(ids[:position])
        assert all(before.stop <= after.start for before, after in pairwise(legal.ranges))
        assert legal.forced in (None, token_id)
        assert legal.codes == (token_id >= small_format.vocabulary.visual_offset)
        assert not reader.is_complete
        reader.read([token_id])
    assert reader.is_complete
    assert reader.legal().forced == small_format.vocabulary.pad


@given(document=documents(), data=st.data())
def test_a_reader_does_not_care_how_its_input_is_cut(document, data, small_format):
    ids = small_format.encode(document).token_ids
    whole, cut = small_format.reader(), small_format.reader()
    whole.read(ids)
    edges = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    for start, stop in pairwise([0, *edges, len(ids)]):
        cut.read(ids[start:stop])
    assert (cut.position, cut.spans, cut.is_complete) == (whole.position, whole.spans, whole.is_complete)


def babble(form, draw, max_tokens):
    """What a model that knows nothing writes under legal_next; media and numbers are kept short, as far as they may be."""
    reader, ids = form.reader(), []
    digits = {form.text_tokenizer.encode(digit)[0] for digit in "0123456789"}
    while not reader.is_complete and len(ids) < max_tokens:
        legal = reader.legal()
        single = [ids_.start for ids_ in legal.ranges if len(ids_) == 1]
        shortening = [token_id for token_id in single if token_id not in digits]
        if shortening and draw.random() < 0.7:
            token_id = draw.choice(shortening)
        else:
            token_id = draw.choice(single if single and draw.random() < 0.5 else draw.choice(legal.ranges))
        ids.append(token_id)
        reader.read([token_id])
    return ids if reader.is_complete else None


def test_whatever_the_grammar_allows_can_be_read(small_format):
    draw, seen = random.Random(0), []
    while len(seen) < 60:
        ids = babble(small_format, draw, max_tokens=400)
        if ids is not None:
            document = small_format.decode(ids)
            again = small_format.encode(document)
            assert small_format.decode(again.token_ids, again.roles) == document
            seen += document.parts
    # the walk has been everywhere
    assert {type(part) for part in seen} == {Text, Image, Video}
    videos = [part for part in seen if isinstance(part, Video)]
    assert any(video.fps % 1 for video in videos) and any(video.num_frames % 4 for video in videos)


# -- text is never control ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("string", [*CONTROL_STRINGS, BOS + "x" + EOS, BOI + "2*3" + IMG])
def test_control_strings_in_text_give_text_ids(string, published_format):
    v = published_format.vocabulary
    for ids, num_specials in [
        (published_format.encode(Document((Text(string), Text(string, target=True)))).token_ids.tolist(), 2),
        (published_format.image_prompt(string, (2, 3)), 3),
        (published_format.video_prompt(string, (1, 2, 3), 8), 3),
        (published_format.continuation_prompt(string, CLIP[:1] * 0, 2, 8), 3 + 6 + 2 + 1),
        (published_format.understanding_prompt([Image(CODES * 0)], string), 1 + 2 + 6 + 2 + 2),
        (published_format.chat_prompt([Turn(string, (), string), Turn(string)]), 1),
    ]:
        assert sum(token_id >= v.num_text for token_id in ids) == num_specials


@given(text=st.text(min_size=1))
def test_no_text_gives_a_control_id(text, published_format):
    ids = published_format.encode(Document((Text(text),))).token_ids
    assert ids[1:-1].max() < published_format.vocabulary.num_text
    assert published_format.decode(ids) == Document((Text(unicodedata.normalize("NFC", text)),))


# -- damage ------------------------------------------------------------------------------------------------------------------------

DAMAGED = Document((Text("a"), Image(np.arange(6).reshape(2, 3)), Text("b"), Video(np.arange(8).reshape(2, 2, 2), 24, 7), Text("c", True)))


def test_any_changed_structure_token_is_noticed(small_format):
    encoded = small_format.encode(DAMAGED)
    v = small_format.vocabulary
    specials = np.flatnonzero((encoded.token_ids >= v.num_text) & (encoded.token_ids < v.visual_offset))
    assert len(specials) == 2 + (3 + 2 + 1) + (3 + 2 * (2 + 1))
    others = [-1, 0, *range(48, 52), v.pad, v.eol, v.eof, v.bos, v.eos, v.img, v.boi, v.eoi, v.visual_offset, v.size - 1, v.size]
    for position in specials:
        for other in others:
            if other != encoded.token_ids[position]:
                damaged = encoded.token_ids.copy()
                damaged[position] = other
                with pytest.raises(InputError, match="position|document has no parts"):
                    small_format.decode(damaged)


def test_any_changed_code_is_noticed_or_another_code(small_format):
    encoded = small_format.encode(DAMAGED)
    v = small_format.vocabulary
    for position in np.flatnonzero(encoded.roles == Role.VISION):
        for other in (0, 299, v.pad, v.eol, v.eof, v.bos, v.eos, v.img, v.boi, v.eoi, v.size, -1):
            damaged = encoded.token_ids.copy()
            damaged[position] = other
            with pytest.raises(InputError, match=f"position {position}: expected a code, found"):
                small_format.decode(damaged)


def test_a_changed_meta_text_is_noticed_or_says_something_else(small_format):
    encoded = small_format.encode(DAMAGED)
    v = small_format.vocabulary
    is_meta = (encoded.roles == Role.STRUCTURE) & (encoded.token_ids < v.num_text)
    num_accepted = 0
    for position in np.flatnonzero(is_meta):
        for other in range(v.num_text):
            damaged = encoded.token_ids.copy()
            damaged[position] = other
            try:
                document = small_format.decode(damaged, encoded.roles)
            except InputError as error:
                assert "position" in str(error)
            else:
                assert (document == DAMAGED) == (other == encoded.token_ids[position])
                image, video = document.parts[1], document.parts[3]
                assert (image, video.grid) == (DAMAGED.parts[1], DAMAGED.parts[3].grid)
                num_accepted += 1
    # Only the rate or the duration can be changed by one token into another true text ("24fps 0.3s" -> "25fps 0.3s").
    assert is_meta.sum() <= num_accepted < 2 * is_meta.sum()


def test_a_lost_or_doubled_token_is_noticed(small_format):
    encoded = small_format.encode(DAMAGED)
    ids = encoded.token_ids.tolist()
    for position in np.flatnonzero(encoded.token_ids >= small_format.vocabulary.num_text):
        for damaged in (ids[:position] + ids[position + 1 :], ids[: position + 1] + ids[position:]):
            with pytest.raises(InputError, match="position"):
                small_format.decode(damaged)
    for length in range(len(ids)):
        with pytest.raises(InputError, match=f"sequence ends at position {length}, expected"):
            small_format.decode(ids[:length])


@settings(max_examples=300)
@given(ids=st.lists(st.one_of(st.integers(-3, 600), st.sampled_from([506, 507, 508, 509, 510, 24, 9, 15])), max_size=20))
def test_arbitrary_ids_raise_nothing_but_input_errors(ids, small_format):
    try:
        document = small_format.decode([small_format.vocabulary.bos, *ids])
    except InputError:
        return
    assert document.parts


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("", "sequence ends at position 0, expected BOS"),
        ("a" + EOS, "position 0: expected BOS, found text id 64"),
        (BOS + EOS, "position 1: expected text or BOI, found EOS"),
        (BOS + "a" + EOS + "a", "position 3: expected PAD, found text id 64"),
        (BOS + "a" + EOI, "position 2: expected text or EOS or BOI, found EOI"),
        (BOS + BOI + IMG, r"position 2: expected text id 16 or .* \(meta text so far: ''\), found IMG"),
        (BOS + BOI + "2*" + IMG, r"position 4: expected text id .* \(meta text so far: '2\*'\), found IMG"),
        (BOS + BOI + "2*1 24fps", r"position 5: expected text id .*IMG \(meta text so far: '2\*1'\), found text id 220"),
        (BOS + BOI + "1*2" + IMG + visual(1) + EOL, "position 7: expected a code, found EOL"),
        (BOS + BOI + "1*2" + IMG + visual(1, 2, 3), "position 8: expected EOL, found code 3"),
        (BOS + BOI + "1*2" + IMG + visual(1, 2) + EOL + EOI, "position 9: expected EOF, found EOI"),
        (BOS + BOI + "1*2" + IMG + visual(1, 2) + EOL + EOF + EOS, "position 10: expected EOI, found EOS"),
        (BOS + "<|im_start|>", "position 1: expected text or BOI, found unused special id 151644"),
    ],
)
def test_messages_name_the_position_and_what_was_expected(string, message, published_format, published_encoding):
    with pytest.raises(InputError, match=message):
        published_format.decode(published_encoding.encode(string, allowed_special="all"))


def test_ids_outside_the_vocabulary(published_format):
    with pytest.raises(InputError, match=r"position 1: .* found id 184622 \(the vocabulary has 0 to 184621\)"):
        published_format.decode([151849, 184622])


def test_a_huge_grid_in_a_sequence_costs_no_memory(small_format):
    v = small_format.vocabulary
    prompt = [v.bos, v.boi, *small_format.text_tokenizer.encode("9999*9999*9999 8fps 4999.5s"), v.img]
    assert small_format.legal_next(prompt).codes
    with pytest.raises(InputError, match="expected a code, found EOI"):
        small_format.decode([*prompt, v.visual_offset, v.eoi])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda f: f.encode(Document((Image(np.full((2, 2), 64)),))), "image holds the code 64; allowed is 0 to 63"),
        (lambda f: f.decode([[1, 2]]), "token ids have shape"),
        (lambda f: f.decode([1.5]), "token ids have shape .* float64"),
        (lambda f: f.decode([f.vocabulary.bos, 1, f.vocabulary.eos], [4, 1]), "3 ids and 2 roles"),
        (lambda f: f.decode([f.vocabulary.bos, 1, f.vocabulary.eos], [4, 3, 4]), "position 1: expected a text role, found role 3"),
        (lambda f: f.continuation_prompt("a", CLIP, 2, 8), "num_latent_frames is 2; to continue 2 latent frames it must be larger"),
        (lambda f: f.video_prompt("a", (2, 3, 3), 8, num_frames=9), "num_frames is 9; 2 latent frames stand for 5 to 8"),
        (lambda f: f.video_prompt("a", (2, 3, 3), -1), "fps is -1"),
        (lambda f: f.understanding_prompt([], "a"), "no media"),
        (lambda f: f.chat_prompt([]), "must end with a turn whose answer is None"),
        (lambda f: f.chat_prompt([Turn("a", (), "b")]), "must end with a turn whose answer is None"),
        (lambda f: f.chat_prompt([Turn("a"), Turn("b")]), "chat turn 0 has no answer"),
        (lambda f: f.chat_document([Turn("a")]), "must end with a turn that has an answer"),
        (lambda _: Turn(""), "neither text nor media"),
        (lambda _: Turn("a", (), ""), "empty answer"),
        (lambda _: Vocabulary(num_text=10), "num_text 10"),
    ],
)
def test_refusals(attempt, message, small_format):
    with pytest.raises(InputError, match=message):
        attempt(small_format)
