"""Sampling into a database with a tiny random model: which tokens are kept, and that a killed run ends like any other."""

import base64
import io
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_votes import FINGERPRINT
from PIL import Image

from openemu3 import media
from openemu3.generation.tasks import Emu3, TaskDefaults
from openemu3.model.transformer import TransformerConfig, build_transformer
from openemu3.preferences.sampling import CandidatesConfig, compute_weights_digest, read_prompts, sample_candidates
from openemu3.preferences.store import open_store
from openemu3.records import InputError
from openemu3.tokenization.sequence import Vocabulary
from openemu3.tokenization.text import TextTokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

PROMPTS = [("one", "image"), ("two", "video"), ("three, a longer one", "image")]
CONFIG = CandidatesConfig(num_candidates=3, seconds=1.0)


def build_model(seed=0):
    """32 x 32 pixels, clips of 16 frames."""
    vocabulary = Vocabulary(num_text=256, num_codes=64)
    language = TransformerConfig(
        vocab_size=vocabulary.size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        init_std=0.3, max_positions=256,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = VisionTokenizer(
        VisionTokenizerConfig(codebook_size=64, channels=8, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1, num_norm_groups=4)
    )
    with torch.no_grad():
        vision.quantize.embedding.weight.normal_(0, 0.3)
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    defaults = TaskDefaults("!", "blurry", top_k=20, question=None, fps=8.0, clip_frames=16, min_pixels=1024, max_pixels=1024)
    transformer = build_transformer(language, torch.Generator().manual_seed(seed), torch.float32).eval()
    return Emu3(transformer, vision, TextTokenizer.from_bytes(ranks), vocabulary, defaults, image_area=1024)


@pytest.fixture(scope="module")
def emu3():
    return build_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "votes.sqlite"


def open_new(path):
    return open_store(path, create=True, fingerprint=FINGERPRINT)


def read_all(path):
    """Everything that sampling writes, in comparable form."""
    with open_store(path) as store:
        return [
            (ballot.prompt.text, ballot.prompt.kind, ballot.prompt.token_ids.tolist(), candidate.key, candidate.number,
             candidate.settings, candidate.token_ids.tolist(), store.read_media(candidate.key))
            for ballot in store.read_ballots() for candidate in ballot.candidates
        ]  # fmt: skip


def test_the_drawn_tokens_are_kept_and_give_the_medium(emu3, path):
    with open_new(path) as store:
        counts = sample_candidates(emu3, PROMPTS, store, CONFIG, "toy")
    assert (counts.num_prompts, counts.num_candidates, counts.num_drawn) == (3, 9, 9)
    rows = read_all(path)
    assert [(row[0], row[4]) for row in rows] == [(text, number) for text, _ in PROMPTS for number in range(3)]
    assert len({tuple(row[6]) for row in rows}) == 9
    pictures = emu3.draw("one", num_images=3)
    for text, kind, prompt_ids, _, number, settings, token_ids, (media_type, encoded) in rows:
        asked, medium = emu3.format.decode([*prompt_ids, *token_ids]).parts
        assert asked.text == text + "!" and token_ids[-1] == emu3.format.vocabulary.eos
        assert settings["seed"] == 0 and settings["top_k"] == 20 and settings["model"] == "toy" and settings["negative_prompt"] == "blurry"
        codes = torch.from_numpy(medium.codes.astype(np.int64))[None]
        if kind == "image":
            assert media_type == "image/webp"
            shown = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
            decoded = np.asarray(media.to_pil(emu3.vision_tokenizer.decode_image(codes)[0])[0])
            assert np.abs(shown - decoded).max() <= 1
            if text == "one":
                assert np.abs(shown - np.asarray(pictures[number])).max() <= 1  # number i is picture i of `emu3 generate image`
        else:
            assert media_type == "video/mp4" and medium.num_frames == 8 and (settings["fps"], settings["num_frames"]) == (8, 8)
            frames, fps = media.read_video(encoded)
            assert fps == 8 and frames.shape == (3, 8, 32, 32)


def test_a_second_run_draws_only_what_is_new(emu3, path):
    with open_new(path) as store:
        sample_candidates(emu3, PROMPTS[:1], store, CONFIG)
        first = read_all(path)
        assert sample_candidates(emu3, PROMPTS[:1], store, CONFIG).num_drawn == 0
        more = sample_candidates(emu3, PROMPTS[:1], store, replace(CONFIG, num_candidates=5))
        assert more.num_drawn == 2
        assert read_all(path)[:3] == first and [row[4] for row in read_all(path)] == [0, 1, 2, 3, 4]
        store.remove_candidate(first[0][3])
        assert sample_candidates(emu3, PROMPTS[:1], store, CONFIG).num_drawn == 0  # removed is not missing
        for other in ({"seed": 1}, {"temperature": 0.5}, {"height": 24, "width": 16}):
            assert sample_candidates(emu3, PROMPTS[:1], store, replace(CONFIG, **other)).num_drawn == 3


def test_other_weights_draw_their_own(emu3, path):
    other = build_model(seed=1)
    assert compute_weights_digest(build_model()) == compute_weights_digest(emu3) != compute_weights_digest(other)
    with torch.no_grad():
        other.engine.transformer.load_state_dict(emu3.engine.transformer.state_dict())
        assert compute_weights_digest(other) == compute_weights_digest(emu3)
        other.engine.transformer.lm_head.weight[3, 3] += 1e-3
    assert compute_weights_digest(other) != compute_weights_digest(emu3)
    with open_new(path) as store:
        sample_candidates(emu3, PROMPTS[:1], store, CONFIG)
        assert sample_candidates(other, PROMPTS[:1], store, CONFIG).num_drawn == 3
        (ballot,) = store.read_ballots()  # candidates of two models, compared blindly
        assert len(ballot.candidates) == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_run_that_is_killed_ends_like_any_other(emu3, path, tmp_path):
    """SIGKILL in the middle of the first prompt, then of the second, then of the third."""

    def run(database, kill_at):
        def report(prompt, done, total):
            if prompt == kill_at and done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        with open_new(database) as store:
            sample_candidates(emu3, PROMPTS, store, CONFIG, "toy", report)

    for kill_at in (0, 1, 2, None):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                run(path, kill_at)
            except BaseException:  # noqa: BLE001 - the parent is told by the exit code, and pytest must not run on in the child
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == (0 if kill_at is None else signal.SIGKILL)
        if kill_at is not None:
            assert len(read_all(path)) == 3 * kill_at  # a prompt is there whole or not at all
    run(tmp_path / "undisturbed.sqlite", None)
    assert read_all(path) == read_all(tmp_path / "undisturbed.sqlite")


def test_progress_goes_from_the_first_prompt_to_the_last(emu3, path):
    seen = []
    with open_new(path) as store:
        sample_candidates(emu3, PROMPTS, store, CONFIG, report=lambda *args: seen.append(args))
    assert [prompt for prompt, _, _ in seen] == sorted(prompt for prompt, _, _ in seen)
    assert {prompt for prompt, _, _ in seen} == {0, 1, 2, 3}
    for prompt in range(3):
        done = [(done, total) for number, done, total in seen if number == prompt]
        assert done[-1][0] == done[-1][1] and all(0 < one <= total for one, total in done)


def test_a_prompt_that_cannot_be_drawn_is_named(emu3, path):
    with open_new(path) as store:
        with pytest.raises(InputError, match="prompt 'long long.*' cannot be drawn: .*context holds 256"):
            sample_candidates(emu3, [("one", "image"), ("long " * 100, "image")], store, CONFIG)
        with pytest.raises(InputError, match="at most 16 frames"):
            sample_candidates(emu3, [("one", "video")], store, replace(CONFIG, seconds=3.0))
    assert len(read_all(path)) == 3
    with pytest.raises(InputError, match="at least 2"):
        CandidatesConfig(num_candidates=1)


# ---- files of prompts


def test_prompts_from_lines_and_json(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_bytes("\ufeffa red apple\r\n\n  一个红苹果  \na red apple\n".encode())
    assert read_prompts(lines) == [("a red apple", "image"), ("一个红苹果", "image")]
    assert read_prompts(lines, "video")[0] == ("a red apple", "video")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "a wave", "kind": "video"}\n\n{"prompt": "a cat"}\n')
    assert read_prompts(objects) == [("a wave", "video"), ("a cat", "image")]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", "has no prompts"),
        ("a.txt", b"good\n\xff\xfe\n", "line 2 is no prompt"),
        ("a.txt", b"good\na\0b\n", "line 2 is no prompt: prompt is 'a"),
        ("a.txt", b"a" * 200_000, "line 1 is longer than"),
        ("a.jsonl", b"{", "line 1 is no prompt"),
        ("a.jsonl", b'"words"', "an object with"),
        ("a.jsonl", b'{"prompt": 3}', "an object with"),
        ("a.jsonl", b'{"prompt": "a", "kind": "sound"}', "'sound'"),
        ("a.jsonl", b'{"prompt": "a", "seed": 3}', "it has 'seed'"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "surrogate"),
        ("a.jsonl", b"[" * 90_000, "line 1 is no prompt"),
    ],
)
def test_bad_prompts_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_prompts(tmp_path / name)
    assert words in str(caught.value)
