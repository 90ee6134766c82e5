"""The tasks on a tiny random model: what goes to the engine, what comes back, and one clear sentence for bad input."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from openemu3 import media
from openemu3.generation.engine import Request
from openemu3.generation.tasks import Emu3, Exchange, Film, TaskDefaults, choose_grid
from openemu3.model.layouts import ModelConfig
from openemu3.model.weights import save_config, save_state, save_transformer
from openemu3.records import Image, InputError, Video
from openemu3.tokenization.sequence import Turn
from openemu3.tokenization.text import TextTokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

DEFAULTS = TaskDefaults(
    prompt_suffix="!", negative_prompt="blurry", top_k=20, question=None, fps=8.0, clip_frames=16, min_pixels=256, max_pixels=256
)
AREA = 256  # 16 x 16 pixels, 2 x 2 tokens


@pytest.fixture(scope="module")
def parts(make_transformer, vocabulary):
    torch.manual_seed(0)
    vision_tokenizer = VisionTokenizer(
        VisionTokenizerConfig(codebook_size=64, channels=8, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1, num_norm_groups=4)
    )
    with torch.no_grad():
        vision_tokenizer.quantize.embedding.weight.normal_(0, 0.3)
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    return {
        "transformer": make_transformer(0),
        "vision_tokenizer": vision_tokenizer,
        "text_tokenizer": TextTokenizer.from_bytes(ranks),
        "vocabulary": vocabulary,
        "ranks": ranks,
    }


@pytest.fixture
def emu3(parts):
    given = {name: part for name, part in parts.items() if name != "ranks"}
    return Emu3(**given, defaults=DEFAULTS, image_area=AREA)


@pytest.fixture
def asked(emu3, monkeypatch):
    """The requests that reach the engine, in calls."""
    calls = []
    generate = emu3.engine.generate

    def watch(requests, progress=None):
        calls.append(list(requests))
        return generate(requests, progress)

    monkeypatch.setattr(emu3.engine, "generate", watch)
    return calls


def as_arrays(pictures):
    return [np.asarray(picture) for picture in pictures]


def moving_film(num_frames, size=(16, 16), fps=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Film(torch.rand(3, num_frames, *size, generator=generator) * 2 - 1, fps)


# ---- drawing


def test_draw_decodes_the_codes_of_its_requests(emu3, asked):
    pictures = emu3.draw("red apple", num_images=3, height=24, width=16, seed=5)
    (requests,) = asked
    form = emu3.format
    assert [request.prompt for request in requests] == [form.image_prompt("red apple!", (3, 2))] * 3
    assert [request.negative_prompt for request in requests] == [form.image_prompt("blurry", (3, 2))] * 3
    assert [request.stream for request in requests] == [0, 1, 2]
    assert {request.settings.seed for request in requests} == {5} and {request.settings.top_k for request in requests} == {20}
    for picture, completion in zip(pictures, emu3.engine.generate(requests), strict=True):
        document = form.decode([form.vocabulary.bos, *requests[0].prompt[1:], *completion.token_ids])
        (image,) = [part for part in document.parts if isinstance(part, Image)]
        pixels = emu3.vision_tokenizer.decode_image(torch.from_numpy(image.codes.astype(np.int64))[None])
        # Decoded in another batch, a value may round to the neighbouring one.
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(media.to_pil(pixels[0])[0])).max() <= 1
        assert picture.size == (16, 24) and picture.mode == "RGB"


def test_same_seed_same_pictures_alone_or_in_a_batch(emu3):
    prompts = ["one", "a second prompt, which is longer", "three"]
    together = emu3.draw(prompts, num_images=2, seed=3, height=40, width=40)
    assert [len(pictures) for pictures in together] == [2, 2, 2]
    for prompt, pictures in zip(prompts, together, strict=True):
        for alone, batched in zip(
            as_arrays(emu3.draw(prompt, num_images=2, seed=3, height=40, width=40)), as_arrays(pictures), strict=True
        ):
            assert np.abs(alone.astype(int) - batched).max() <= 1
    other_seed = emu3.draw(prompts, num_images=2, seed=4, height=40, width=40)
    flat = [array.tobytes() for pictures in together + other_seed for array in as_arrays(pictures)]
    assert len(set(flat)) == 12


# height x width in tokens, from the published rule's table.
@pytest.mark.parametrize(
    ("ratio", "side", "grid"),
    [
        ("1:1", 512, (64, 64)), ("4:3", 512, (55, 74)), ("3:4", 512, (74, 55)), ("16:9", 512, (48, 85)), ("9:16", 512, (85, 48)),
        ("3:2", 512, (52, 78)), ("21:9", 512, (42, 98)), ("1:1", 720, (90, 90)), ("4:3", 720, (78, 104)), ("16:9", 720, (68, 120)),
        ("2:3", 720, (110, 73)), ("21:9", 720, (59, 137)), ("16:9", 1024, (96, 171)), ("21:9", 1024, (84, 196)), ("1:1", 64, (8, 8)),
    ],
)  # fmt: skip
def test_grids_follow_the_published_rule(ratio, side, grid):
    assert choose_grid(ratio, side * side) == grid


def test_sizes_of_pictures(emu3):
    assert emu3.draw("x")[0].size == (16, 16)
    assert emu3.draw("x", aspect_ratio="4:1", resolution=32)[0].size == (64, 16)
    assert emu3.draw("x", height=8, width=40)[0].size == (40, 8)


def test_explicit_options_win_over_defaults(emu3, asked):
    emu3.draw("x", guidance=1.5, temperature=0.5, top_k=3, top_p=0.7, seed=9, negative_prompt="")
    (request,) = asked[0]
    assert (request.settings.guidance, request.settings.temperature, request.settings.top_k) == (1.5, 0.5, 3)
    assert (request.settings.top_p, request.settings.seed) == (0.7, 9)
    assert request.negative_prompt == emu3.format.image_prompt("", (2, 2))


def test_drawing_hands_out_its_tokens(emu3, asked):
    pictures = emu3.draw(["red", "a blue wave"], num_images=3, height=24, width=16, seed=5)
    drawn = emu3.draw_with_tokens(["red", "a blue wave"], (1, 2), height=24, width=16, seed=5)
    form = emu3.format
    for text, group, given in zip(["red", "a blue wave"], drawn, pictures, strict=True):
        assert [one.stream for one in group] == [1, 2]
        for one in group:
            assert one.settings.seed == 5 and one.settings.top_k == 20
            assert one.prompt_ids.tolist() == form.image_prompt(text + "!", (3, 2))
            assert np.abs(np.asarray(one.medium).astype(int) - np.asarray(given[one.stream])).max() <= 1
            # The whole document: what was asked, the picture's codes, EOS. Its codes decode to the picture.
            prompt, image = form.decode([*one.prompt_ids, *one.token_ids]).parts
            assert prompt.text == text + "!" and one.token_ids[-1] == form.vocabulary.eos
            pixels = emu3.vision_tokenizer.decode_image(torch.from_numpy(image.codes.astype(np.int64))[None])
            assert np.abs(np.asarray(one.medium).astype(int) - np.asarray(media.to_pil(pixels[0])[0])).max() <= 1
    requests = [request for call in asked[:1] for request in call]
    kept = [done.token_ids for request, done in zip(requests, emu3.engine.generate(requests), strict=True) if request.stream]
    assert [one.token_ids.tolist() for group in drawn for one in group] == [ids.tolist() for ids in kept]


# ---- films


def test_filming_hands_out_its_tokens(emu3):
    ((first, other),) = emu3.film_with_tokens(["wave"], (0, 3), 1.375, seed=2)
    assert (first.stream, other.stream) == (0, 3) and first.token_ids.tolist() != other.token_ids.tolist()
    assert torch.equal(first.medium.pixels, emu3.film("wave", 1.375, seed=2).pixels) and first.medium.num_frames == 11
    prompt, video = emu3.format.decode([*other.prompt_ids, *other.token_ids]).parts
    assert prompt.text == "wave!" and video.num_frames == 11 and video.fps == 8
    codes = torch.from_numpy(video.codes.astype(np.int64))[None]
    assert torch.allclose(other.medium.pixels, emu3.vision_tokenizer.decode_video(codes, 11)[0].clamp(-1, 1), atol=1e-5)
    assert emu3.film_with_tokens(["wave"], [0])[0][0].medium.num_frames == 16  # one clip of the model
    with pytest.raises(InputError, match="at most 16 frames"):
        emu3.film_with_tokens(["wave"], [0], 2.125)


@pytest.mark.parametrize(("seconds", "frames", "latents"), [(2, 16, 4), (1, 8, 2), (0.5, 4, 1), (1.375, 11, 3), (0.125, 1, 1)])
def test_film_has_the_frames_that_were_asked_for(emu3, asked, seconds, frames, latents):
    film = emu3.film("waving hand", seconds)
    assert film.pixels.shape == (3, frames, 16, 16) and film.fps == 8.0 and film.seconds == pytest.approx(seconds)
    assert film.pixels.abs().max() <= 1
    assert len(film.frames) == frames and film.frames[0].size == (16, 16)
    ((request,),) = asked
    assert request.prompt == emu3.format.video_prompt("waving hand!", (latents, 2, 2), 8.0, frames)
    assert request.negative_prompt == emu3.format.video_prompt("blurry", (latents, 2, 2), 8.0, frames)


def test_a_long_film_is_its_first_clip_continued(emu3):
    whole = emu3.film("long", seconds=4, seed=2)
    first = emu3.film("long", seconds=2, seed=2)
    continued = emu3.continue_film(first, 2, "long", seed=2)
    assert whole.num_frames == continued.num_frames == 32
    assert torch.equal(whole.pixels, continued.pixels)
    assert torch.equal(whole.pixels[:, :16], first.pixels)


def test_several_films_equal_each_alone(emu3):
    prompts = ["one", "another one"]
    for alone, batched in zip([emu3.film(prompt, 3) for prompt in prompts], emu3.film(prompts, 3), strict=True):
        assert torch.allclose(alone.pixels, batched.pixels, atol=1e-4)
    films = [moving_film(8), moving_film(5, seed=1), moving_film(8, fps=4.0, seed=2), moving_film(20, size=(8, 16), seed=3)]
    texts = ["a", "", "c", "d"]
    together = emu3.continue_film(films, 1.5, texts)
    for film, text, batched in zip(films, texts, together, strict=True):
        alone = emu3.continue_film(film, 1.5, text)
        assert alone.fps == batched.fps == film.fps
        assert alone.num_frames == film.num_frames + round(1.5 * film.fps)
        assert torch.allclose(alone.pixels, batched.pixels, atol=1e-4)


def test_the_window_slides_over_the_new_end(emu3, asked):
    film = moving_film(22)
    longer = emu3.continue_film(film, 2.5, "ball", seed=4)
    assert longer.num_frames == 42 and torch.equal(longer.pixels[:, :22], film.pixels)
    assert len(asked) == 3  # 8 + 8 + 4 frames
    form = emu3.format
    for window, (request,) in enumerate(list(asked)):
        end = 22 + 8 * window
        codes = emu3.vision_tokenizer.encode_video(longer.pixels[None, :, end - 8 : end])[0].numpy()
        assert request.prompt == form.continuation_prompt("ball!", codes, 4, 8.0)
        assert request.negative_prompt == form.continuation_prompt("blurry", codes, 4, 8.0)
        assert request.stream == window + 1
        whole = form.vision_layout((4, 2, 2))
        num_latents = [2, 2, 1][window]
        assert request.layout.tolist() == whole[14 : 14 + 7 * num_latents].tolist()
        # What comes back is the new half of the decoded clip.
        (done,) = emu3.engine.generate([request])
        drawn = done.token_ids[request.layout < 0].reshape(num_latents, 2, 2) - form.vocabulary.visual_offset
        clip = emu3.vision_tokenizer.decode_video(torch.from_numpy(np.concatenate((codes, drawn)))[None])[0].clamp(-1, 1)
        assert torch.equal(longer.pixels[:, end : end + 4 * num_latents], clip[:, 8:])


@pytest.mark.parametrize("num_frames", [1, 3, 4, 6, 7])
def test_films_shorter_than_half_a_clip_are_continued_too(emu3, asked, num_frames):
    film = moving_film(num_frames)
    longer = emu3.continue_film(film, 1.0)
    assert longer.num_frames == num_frames + 8
    ((request,),) = asked
    assert request.negative_prompt is None  # no prompt: nothing to guide towards
    if num_frames < 4:
        seen = torch.cat([film.pixels[:, :1]] * (4 - num_frames) + [film.pixels], dim=1)
    else:
        seen = film.pixels[:, -4:]
    codes = emu3.vision_tokenizer.encode_video(seen[None])[0].numpy()
    assert request.prompt == emu3.format.continuation_prompt("", codes, 4, 8.0)


def test_films_are_fitted_and_files_are_read_at_the_rate_of_the_model(emu3, tmp_path):
    assert emu3.continue_film(moving_film(4, size=(30, 30)), 0.5).pixels.shape == (3, 8, 16, 16)
    moving_film(12, fps=4.0).save(tmp_path / "in.gif")
    longer = emu3.continue_film(tmp_path / "in.gif", 1.0)
    assert longer.fps == 8.0 and longer.num_frames == 24 + 8


def test_films_are_saved_and_read_back(emu3, tmp_path):
    film = moving_film(8)
    for suffix in ("gif", "webp", "mp4"):
        film.save(tmp_path / f"film.{suffix}")
        again = Film.read(tmp_path / f"film.{suffix}")
        assert again.num_frames == 8 and again.fps == pytest.approx(8, rel=0.05)
    with pytest.raises(InputError):
        film.save(tmp_path / "film.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"film.gif", "film.webp", "film.mp4"}


# ---- words


def picture(size=(16, 16), seed=0):
    return PIL.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def codes_of(emu3, pil):
    return Image(emu3.vision_tokenizer.encode_image(media.from_pil(pil)[None, :, 0])[0].numpy())


def test_describe_puts_nothing_but_the_picture_before_the_caption(emu3, asked):
    text = emu3.describe(picture(), max_new_tokens=12)
    ((request,),) = asked
    assert request.prompt == emu3.format.understanding_prompt([codes_of(emu3, picture())], "")
    assert request.layout is None and request.settings.temperature == 0 and request.max_new_tokens == 12
    (done,) = emu3.engine.generate([request])
    ids = done.token_ids[: -1 if done.stopped else None].tolist()
    assert text == emu3.format.text_tokenizer.decode(ids).strip()


def test_describe_many_equals_one_by_one_and_any_source_will_do(emu3, tmp_path):
    pictures = [picture(seed=seed) for seed in range(3)]
    one_by_one = [emu3.describe(one, max_new_tokens=10) for one in pictures]
    assert emu3.describe(pictures, max_new_tokens=10) == one_by_one
    pictures[0].save(tmp_path / "picture.png")
    data = io.BytesIO()
    pictures[0].save(data, "PNG")
    for source in (tmp_path / "picture.png", str(tmp_path / "picture.png"), data.getvalue()):
        assert emu3.describe(source, max_new_tokens=10) == one_by_one[0]
    assert emu3.describe([]) == []


def test_describe_with_a_question_uses_the_chat_template(parts, monkeypatch):
    given = {name: part for name, part in parts.items() if name != "ranks"}
    model = Emu3(**given, defaults=TaskDefaults(min_pixels=256, max_pixels=256), image_area=AREA)
    seen = []
    generate = model.engine.generate
    monkeypatch.setattr(model.engine, "generate", lambda requests, progress=None: seen.extend(requests) or generate(requests))
    model.describe(picture(), max_new_tokens=3)
    assert seen[0].prompt == model.format.chat_prompt([Turn("Please describe the image", (codes_of(model, picture()),))])


def test_films_are_described_at_the_rate_of_the_model_or_thinned(emu3, asked, tmp_path):
    short, long = moving_film(16), moving_film(64)
    emu3.describe([short, long], max_new_tokens=2)
    codes = emu3.vision_tokenizer.encode_video(short.pixels[None])[0].numpy()
    assert asked[0][0].prompt == emu3.format.understanding_prompt([Video(codes, 8.0)], "")
    chosen = torch.linspace(0, 63, 16).round().long()
    codes = emu3.vision_tokenizer.encode_video(long.pixels[:, chosen][None])[0].numpy()
    assert asked[0][1].prompt == emu3.format.understanding_prompt([Video(codes, 2.0)], "")
    long.save(tmp_path / "long.gif")
    emu3.describe(tmp_path / "long.gif", max_new_tokens=2)
    document = emu3.format.decode([*asked[1][0].prompt, emu3.format.vocabulary.eos])
    (video,) = document.parts
    assert video.codes.shape == (4, 2, 2) and video.fps == 2.0


def test_chat_has_turns_with_several_pictures_or_none(emu3, asked):
    first, second = picture(seed=1), picture(seed=2)
    emu3.chat([Exchange("Who?", (first, second), "a cat"), Exchange("Why?")], max_new_tokens=4)
    codes = [codes_of(emu3, one) for one in (first, second)]
    assert asked[0][0].prompt == emu3.format.chat_prompt([Turn("Who?", tuple(codes), "a cat"), Turn("Why?")])
    emu3.answer([first, second], "Who?", max_new_tokens=4)
    assert asked[1][0].prompt == emu3.format.chat_prompt([Turn("Who?", tuple(codes))])
    emu3.answer([], "Who?", max_new_tokens=4)
    assert asked[2][0].prompt == emu3.format.chat_prompt([Turn("Who?")])
    assert emu3.answer(first, "Who?", max_new_tokens=4) == emu3.answer([first], "Who?", max_new_tokens=4)


def test_text_can_be_sampled_by_seed(emu3):
    texts = {emu3.describe(picture(), max_new_tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)}
    assert len(texts) == 3


def test_progress_reaches_the_caller(emu3):
    seen = []
    emu3.draw("x", num_images=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)


def test_typed_control_tokens_are_plain_text(emu3, asked):
    emu3.draw("<|image start|>2*2<|image token|>")
    specials = [token_id for token_id in asked[0][0].prompt if token_id >= emu3.format.vocabulary.num_text]
    assert specials == [emu3.format.vocabulary.bos, emu3.format.vocabulary.boi, emu3.format.vocabulary.img]


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.draw(""), "prompt is empty"),
        (lambda m: m.draw(" \n"), "prompt is empty"),
        (lambda m: m.draw([]), "there is no prompt"),
        (lambda m: m.draw(["x", 3]), "prompt is int"),
        (lambda m: m.draw("x" * 2000), "takes 2007 prompt tokens and 9 new ones; the context holds 1024"),
        (lambda m: m.draw("x" * 1_000_001), "prompt has 1000001 characters"),
        (lambda m: m.draw("x", num_images=0), "num_images is 0"),
        (lambda m: m.draw("x", height=12, width=16), "height is 12; a multiple of 8"),
        (lambda m: m.draw("x", height=0, width=16), "height is 0"),
        (lambda m: m.draw("x", height=16), "width is missing"),
        (lambda m: m.draw("x", height=8.0, width=8), "height is 8.0"),
        (lambda m: m.draw("x", height=800_000, width=8), "grid is"),
        (lambda m: m.draw("x", height=8000, width=80), "the context holds 1024"),
        (lambda m: m.draw("x", aspect_ratio="16x9"), "aspect_ratio is '16x9'"),
        (lambda m: m.draw("x", aspect_ratio="0:1"), "aspect_ratio is '0:1'"),
        (lambda m: m.draw("x", aspect_ratio="1:500"), "leaves no tokens for one side"),
        (lambda m: m.draw("x", aspect_ratio=1.5), "aspect_ratio is 1.5"),
        (lambda m: m.draw("x", resolution=0), "resolution is 0"),
        (lambda m: m.draw("x", resolution=3), "leaves no tokens"),
        (lambda m: m.draw("x", temperature=-1), "temperature is -1"),
        (lambda m: m.draw("x", seed=-1), "seed is -1"),
        (lambda m: m.draw("x", top_p=0), "top_p is 0"),
        (lambda m: m.draw("\ud800"), "surrogate"),
        (lambda m: m.film("x", 0), "seconds is 0"),
        (lambda m: m.film("x", float("nan")), "seconds is nan"),
        (lambda m: m.film("x", -1), "seconds is -1"),
        (lambda m: m.film("x", "1"), "seconds is '1'"),
        (lambda m: m.film("x", 1, fps=0), "fps is 0"),
        (lambda m: m.film("", 1), "prompt is empty"),
        (lambda m: m.continue_film(moving_film(4), 0), "seconds is 0"),
        (lambda m: m.continue_film([moving_film(4)], 1, ["a", "b"]), "2 prompts were given for 1 films"),
        (lambda m: m.continue_film(moving_film(4, size=(4, 4)), 1), "too small"),
        (lambda m: m.continue_film("nowhere.mp4", 1), "nowhere.mp4"),
        (lambda m: m.continue_film(b"not a video", 1), "video"),
        (lambda m: m.describe(b""), "file"),
        (lambda m: m.describe("nowhere.png"), "nowhere.png"),
        (lambda m: m.describe(picture((1, 1))), "too small"),
        (lambda m: m.describe(picture((8, 800))), "too long"),
        (lambda m: m.describe(picture(), max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: m.answer(picture(), ""), "text of turn 0 is empty"),
        (lambda m: m.chat([]), "chat prompt must end with a turn"),
        (lambda m: m.chat([Exchange("a", answer="b")]), "chat prompt must end with a turn"),
        (lambda m: m.chat([Exchange("a"), Exchange("b")]), "turn 0 has no answer"),
        (lambda m: Film(torch.zeros(3, 0, 8, 8), 8), "film has pixels of shape"),
        (lambda m: Film(torch.zeros(3, 1, 8, 8), 0), "fps is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(emu3, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(emu3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "generation is"),
        ({"suffix": ""}, "generation has a field 'suffix'"),
        ({"clip_frames": 12}, "clip_frames is 12; a multiple of 8"),
        ({"fps": -1}, "fps is -1"),
        ({"prompt_suffix": 3}, "prompt_suffix is 3"),
        ({"question": ""}, "question is ''"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_pixels": 0}, "min_pixels is 0"),
    ],
)
def test_bad_defaults_are_refused(raw, message):
    with pytest.raises(InputError, match=message):
        TaskDefaults.parse(raw)


# ---- loading


@pytest.fixture
def folder(parts, tmp_path):
    folder = tmp_path / "model"
    vision = vars(parts["vision_tokenizer"].config)
    config = ModelConfig(parts["transformer"].config, vision, parts["vocabulary"].num_text, parts["vocabulary"].num_codes, AREA)
    save_config(folder, config)
    raw = json.loads((folder / "config.json").read_text())
    raw["generation"] = vars(DEFAULTS)
    (folder / "config.json").write_text(json.dumps(raw))
    save_transformer(folder, parts["transformer"], torch.float32)
    save_state(folder, parts["vision_tokenizer"].state_dict(), "vision_tokenizer")
    (folder / "text.tiktoken").write_bytes(parts["ranks"])
    return folder


def test_a_saved_model_loads_and_draws_the_same(emu3, folder):
    loaded = Emu3.load(folder, device="cpu", dtype=torch.float32)
    assert loaded.defaults == DEFAULTS and loaded.image_area == AREA
    assert as_arrays(loaded.draw("x"))[0].tobytes() == as_arrays(emu3.draw("x"))[0].tobytes()
    assert loaded.describe(picture(), max_new_tokens=8) == emu3.describe(picture(), max_new_tokens=8)
    assert Emu3.load(folder).engine.transformer.lm_head.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in Emu3.load(folder).vision_tokenizer.parameters()} == {torch.float32}


def test_a_published_checkpoint_has_its_tokenizer_elsewhere(emu3, folder, parts, tmp_path):
    """Official layout: model_type Emu3 with emu3.tiktoken, and the vision tokenizer in a folder of its own; published defaults."""
    config = parts["transformer"].config
    official = {
        "model_type": "Emu3", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "rope_theta": config.rope_theta,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "max_position_embeddings": config.max_positions, "image_area": AREA,
        "pad_token_id": 256, "rms_norm_eps": config.norm_eps,
    }  # fmt: skip
    for name in ("config.json", "vision_tokenizer.safetensors"):
        (folder / name).rename(tmp_path / name)
    (folder / "config.json").write_text(json.dumps(official))
    (folder / "text.tiktoken").rename(folder / "emu3.tiktoken")
    with pytest.raises(InputError, match="holds no vision tokenizer; name the folder of one"):
        Emu3.load(folder)
    loaded = Emu3.load(folder, tokenizer_folder=tmp_path, dtype=torch.float32)
    assert loaded.defaults == TaskDefaults()
    assert loaded.defaults.prompt_suffix == " masterpiece, film grained, best quality."
    same = loaded.draw("x!"[:1], negative_prompt="blurry", top_k=20)
    assert same[0].size == (16, 16)


def test_folders_that_are_no_models_are_refused(folder, tmp_path):
    def check(message):
        with pytest.raises(InputError, match=message) as caught:
            Emu3.load(folder)
        assert "\n" not in str(caught.value)

    with pytest.raises(InputError, match="does not exist"):
        Emu3.load(tmp_path / "nothing")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "generation": {"fps": 0}}))
    check(r"config.json cannot be used: fps is 0")
    (folder / "config.json").write_text(json.dumps({**raw, "vocabulary": {"num_text": 257, "num_codes": 64}}))
    check("text tokenizer has 256 tokens; the vocabulary wants")
    (folder / "config.json").write_text(json.dumps({**raw, "vocabulary": {"num_text": 256, "num_codes": 63}}))
    check("vision tokenizer has 64 codes; the language model has 63")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "text.tiktoken").write_bytes(b"not ranks")
    check("text.tiktoken|ranks|vocabulary")
    (folder / "text.tiktoken").unlink()
    check("has no text vocabulary; a ranks file text.tiktoken or emu3.tiktoken or qwen.tiktoken is needed")
    (folder / "vision_tokenizer.safetensors").write_bytes(b"")
    (folder / "text.tiktoken").write_bytes(b"")
    check("text.tiktoken|ranks|vocabulary")


def test_requests_carry_plain_values():
    """A request's own defaults are the published sampling settings."""
    request = Request(prompt=[1])
    assert (request.settings.top_k, request.settings.guidance, request.settings.temperature, request.settings.top_p) == (
        2048,
        3.0,
        1.0,
        1.0,
    )
