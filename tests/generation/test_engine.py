"""The engine against a naive loop and against transformers, and what it promises: batch or solo, few passes, clear refusals.

The naive loop does the published thing the long way: a full pass over the whole sequence for every token, one for each branch, over
the full vocabulary, with the published rule of which id may stand where.
"""

import math

import numpy as np
import pytest
import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

from openemu3.generation.engine import Engine, Request
from openemu3.generation.sampling import SamplingSettings
from openemu3.model.attention import CausalAttention
from openemu3.records import InputError
from openemu3.tokenization.sequence import SequenceFormat
from openemu3.tokenization.text import TextTokenizer

GREEDY = SamplingSettings(temperature=0.0, guidance=3.0)


@pytest.fixture(scope="module")
def form(vocabulary):
    """The format over a text vocabulary of single bytes."""
    import base64

    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    return SequenceFormat(TextTokenizer.from_bytes(ranks), vocabulary)


def published_legal(vocabulary, grid, offset):
    """Legal ids at `offset` tokens after IMG (1 for the first), by the published rule; videos repeat an image's rows and EOF."""
    height, width = grid[-2:]
    frames = grid[0] if len(grid) == 3 else 1
    per_frame = height * (width + 1) + 1
    if offset == frames * per_frame + 1:
        return [vocabulary.eoi]
    if offset == frames * per_frame + 2:
        return [vocabulary.eos]
    within = (offset - 1) % per_frame + 1
    if within == per_frame:
        return [vocabulary.eof]
    if within % (width + 1) == 0:
        return [vocabulary.eol]
    return range(vocabulary.visual_offset, vocabulary.size)


@torch.inference_mode()
def naive_greedy(transformer, vocabulary, prompt, negative, grid, guidance, length):
    new = []
    for offset in range(1, length + 1):

        def log_softmax(ids, new=new):
            tokens = torch.tensor([[*ids, *new]])
            return transformer.compute_logits(transformer(tokens, CausalAttention())[0, -1]).float().log_softmax(-1)

        scores = log_softmax(prompt)
        if negative is not None:
            unconditional = log_softmax(negative)
            scores = unconditional + guidance * (scores - unconditional)
        mask = torch.full_like(scores, -math.inf)
        mask[list(published_legal(vocabulary, grid, offset))] = 0
        new.append(int((scores + mask).argmax()))
    return new


def make_request(form, text, grid, settings=GREEDY, negative="blurry", **fields):
    def prompt(text):
        return form.image_prompt(text, grid) if len(grid) == 2 else form.video_prompt(text, grid, fps=8)

    return Request(
        prompt=prompt(text),
        layout=form.vision_layout(grid),
        negative_prompt=None if negative is None else prompt(negative),
        settings=settings,
        **fields,
    )


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 1), (2, 3, 2), (3, 1, 4)])
@pytest.mark.parametrize("negative", [None, "a much longer unconditional prompt"])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_the_naive_loop(make_transformer, vocabulary, form, grid, negative, seed):
    transformer = make_transformer(seed)
    request = make_request(form, "red apple", grid, negative=negative)
    (completion,) = Engine(transformer, vocabulary).generate([request])
    expected = naive_greedy(transformer, vocabulary, request.prompt, request.negative_prompt, grid, 3.0, len(request.layout))
    assert completion.token_ids.tolist() == expected
    assert completion.stopped


def test_greedy_equals_the_naive_loop_over_many_keys(make_transformer, vocabulary, form):
    test_greedy_equals_the_naive_loop(make_transformer, vocabulary, form, (9, 11), "a longer unconditional prompt", seed=2)


@torch.no_grad()
def as_transformers(transformer):
    """transformers' Emu3 language model with the same weights; its `generate` is the oracle."""
    config = transformer.config
    theirs = Emu3ForCausalLM(
        Emu3TextConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps, max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=0, bos_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip
    theirs.load_state_dict(transformer.state_dict(), strict=True)
    return theirs.eval()


@pytest.mark.parametrize("seed", range(3))
def test_guided_greedy_equals_transformers_generate(make_transformer, vocabulary, form, seed):
    """The documented recipe: guidance_scale, negative prompt, prefix_allowed_tokens_fn."""
    transformer = make_transformer(seed)
    grid = (3, 4)
    request = make_request(form, "waving hand", grid)
    start = len(request.prompt)

    def allowed(_, ids):
        return list(published_legal(vocabulary, grid, len(ids) - start + 1))

    ids = as_transformers(transformer).generate(
        torch.tensor([request.prompt]),
        attention_mask=torch.ones(1, start, dtype=torch.int64),
        negative_prompt_ids=torch.tensor([request.negative_prompt]),
        negative_prompt_attention_mask=torch.ones(1, len(request.negative_prompt), dtype=torch.int64),
        guidance_scale=3.0,
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=len(request.layout),
        do_sample=False,
        pad_token_id=vocabulary.pad,
    )
    (completion,) = Engine(transformer, vocabulary).generate([request])
    assert completion.token_ids.tolist() == ids[0, start:].tolist()


def test_text_equals_transformers_generate_and_stops_at_eos(make_transformer, vocabulary, form):
    transformer = make_transformer(4)
    theirs = as_transformers(transformer)
    legal = [*range(vocabulary.num_text), vocabulary.eos]
    stopped = []
    for start in range(6):
        prompt = form.image_prompt(f"prompt {start}", (2, 2))
        ids = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=40, do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids: legal, eos_token_id=vocabulary.eos, pad_token_id=vocabulary.pad,
        )  # fmt: skip
        request = Request(prompt=prompt, max_new_tokens=40, settings=SamplingSettings(temperature=0.0))
        (completion,) = Engine(transformer, vocabulary).generate([request])
        assert completion.token_ids.tolist() == ids[0, len(prompt) :].tolist()
        assert completion.stopped == (completion.token_ids[-1] == vocabulary.eos)
        stopped.append(completion.stopped)
    # Greedy text of a random model loops; sampling meets EOS at some point, and nothing comes after it.
    settings = [SamplingSettings(top_k=0, temperature=3.0, seed=seed) for seed in range(8)]
    sampled = Engine(transformer, vocabulary).generate([Request(prompt=[3], max_new_tokens=400, settings=s) for s in settings])
    assert any(completion.stopped for completion in sampled)
    for completion in sampled:
        ids = completion.token_ids
        assert completion.stopped == (ids[-1] == vocabulary.eos) and not (ids[:-1] >= vocabulary.num_text).any()
        assert completion.stopped or len(ids) == 400


def mixed_requests(form):
    settings = [
        SamplingSettings(seed=1), SamplingSettings(seed=2, top_k=5), SamplingSettings(temperature=0.0), SamplingSettings(seed=1, top_p=0.8),
        SamplingSettings(seed=4, top_k=0, temperature=1.4, guidance=6.0),
    ]  # fmt: skip
    requests = [
        make_request(form, "one", (4, 5), settings[0]),
        make_request(form, "a second, longer prompt", (2, 7), settings[1], negative="also longer than the other"),
        make_request(form, "three", (2, 3, 3), settings[2]),
        make_request(form, "", (6, 2), settings[3], negative=None),
        make_request(form, "five", (4, 5), settings[4], stream=3),
    ]
    texts = [
        Request(prompt=form.image_prompt("describe", (3, 3)), max_new_tokens=30, settings=SamplingSettings(temperature=0.0)),
        Request(prompt=[vocabulary_id for vocabulary_id in range(50, 90)], max_new_tokens=25, settings=SamplingSettings(seed=8, top_k=9)),
    ]
    return [requests[0], texts[0], *requests[1:4], texts[1], requests[4], make_request(form, "last", (1, 9), settings[0])]


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_the_same_alone_in_a_batch_and_after_others(make_transformer, vocabulary, form, seed):
    """Different prompts, lengths, grids, settings and kinds in one batch of eight; with fewer rows the rest wait their turn."""
    transformer = make_transformer(seed)
    requests = mixed_requests(form)
    engine = Engine(transformer, vocabulary)
    alone = [engine.generate([request])[0].token_ids.tolist() for request in requests]
    for max_rows, order in [(16, range(8)), (3, range(8)), (5, range(7, -1, -1)), (2, range(8))]:
        chosen = list(order)
        together = Engine(transformer, vocabulary, max_rows=max_rows, max_prefill_tokens=7).generate([requests[i] for i in chosen])
        for place, index in enumerate(chosen):
            assert together[place].token_ids.tolist() == alone[index]


def test_seed_and_stream_decide_the_picture(make_transformer, vocabulary, form):
    engine = Engine(make_transformer(0), vocabulary)

    def draw(seed, stream=0):
        return engine.generate([make_request(form, "x", (6, 6), SamplingSettings(seed=seed), stream=stream)])[0].token_ids.tolist()

    assert draw(0) == draw(0)
    assert len({tuple(draw(seed, stream)) for seed in range(4) for stream in range(4)}) == 16


def test_resuming_in_the_middle_gives_the_same_tokens(make_transformer, vocabulary, form):
    engine = Engine(make_transformer(3), vocabulary)
    whole = make_request(form, "resumed", (4, 4), SamplingSettings(seed=11))
    expected = engine.generate([whole])[0].token_ids
    for cut in (1, 4, 5, 7, len(expected) - 4):
        rest = Request(
            prompt=[*whole.prompt, *expected[:cut]],
            negative_prompt=[*whole.negative_prompt, *expected[:cut]],
            layout=whole.layout[cut:],
            settings=whole.settings,
            first_position=cut,
        )
        assert engine.generate([rest])[0].token_ids.tolist() == expected[cut:].tolist()


@pytest.mark.parametrize(("grid", "passes"), [((4, 5), 20), ((2, 3, 2), 12), ((1, 1), 1)])
def test_forced_tokens_cost_no_pass_and_both_branches_share_one(make_transformer, vocabulary, form, grid, passes):
    transformer = make_transformer(0)
    calls = []
    handle = transformer.model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    request = make_request(form, "count", grid)
    Engine(transformer, vocabulary).generate([request])
    handle.remove()
    assert len(calls) == passes  # one for the prompt, one for each code but the last
    # Each branch is fed everything up to the last code but that code itself; a pass of two tokens is filled up to four.
    prompts, *steps = [shape[0] * shape[1] for shape in calls]
    assert prompts == len(request.prompt) + len(request.negative_prompt)
    between = np.diff(np.flatnonzero(request.layout < 0))
    assert steps == [max(4, 2 * count) for count in between]


def test_only_the_legal_rows_of_the_head_are_computed(make_transformer, vocabulary, form, monkeypatch):
    transformer = make_transformer(0)
    widths = []
    compute = transformer.compute_logits

    def watch(hidden, vocab_slice=None):
        logits = compute(hidden, vocab_slice)
        widths.append(logits.shape)
        return logits

    monkeypatch.setattr(transformer, "compute_logits", watch)
    Engine(transformer, vocabulary).generate([make_request(form, "narrow", (3, 3))])
    assert set(widths) == {torch.Size((4, vocabulary.num_codes))}


def test_guidance_one_and_no_negative_prompt_run_one_branch(make_transformer, vocabulary, form):
    transformer = make_transformer(0)
    rows = set()
    handle = transformer.model.layers[0].self_attn.register_forward_hook(
        lambda module, inputs, output: rows.add(getattr(inputs[2], "num_rows", 1))
    )
    settings = SamplingSettings(guidance=1.0, seed=5)
    one = Engine(transformer, vocabulary).generate([make_request(form, "x", (1, 6), settings)])[0].token_ids
    other = Engine(transformer, vocabulary).generate([make_request(form, "x", (1, 6), settings, negative=None)])[0].token_ids
    handle.remove()
    assert one.tolist() == other.tolist()
    assert rows == {1}


def test_progress_counts_to_the_end(make_transformer, vocabulary, form):
    seen = []
    requests = [make_request(form, "a", (2, 2)), make_request(form, "b", (3, 3)), Request(prompt=[1], max_new_tokens=12)]
    Engine(make_transformer(0), vocabulary, max_rows=2).generate(requests, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {4 + 9 + 12}
    dones = [done for done, _ in seen]
    assert dones == sorted(dones) and dones[-1] == 25


def test_the_cache_is_as_small_as_the_requests_allow(make_transformer, vocabulary, form, monkeypatch):
    from openemu3.generation import engine as module

    made = []

    class Watched(module.KeyValueCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append((self.num_rows, self.capacity))

    monkeypatch.setattr(module, "KeyValueCache", Watched)
    request = make_request(form, "ab", (2, 3), negative="c")
    Engine(make_transformer(0), vocabulary, max_rows=4).generate([request] * 5)
    last_code = len(request.layout) - 5  # EOL EOF EOI EOS follow it, and it is never fed itself
    assert made == [(4, len(request.prompt) + last_code)]


def test_no_requests_and_layouts_without_codes(make_transformer, vocabulary):
    engine = Engine(make_transformer(0), vocabulary)
    assert engine.generate([]) == []
    forced = np.array([vocabulary.eoi, vocabulary.eos])
    assert engine.generate([Request(prompt=[1], layout=forced)])[0].token_ids.tolist() == forced.tolist()


def test_bfloat16_runs_and_is_reproducible(make_transformer, vocabulary, form):
    engine = Engine(make_transformer(0, dtype=torch.bfloat16), vocabulary)
    requests = mixed_requests(form)
    once, again = engine.generate(requests), engine.generate(requests)
    for one, other, request in zip(once, again, requests, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        if request.layout is not None:
            forced = request.layout >= 0
            assert (one.token_ids[forced] == request.layout[forced]).all()
            assert (one.token_ids[~forced] >= vocabulary.visual_offset).all() and (one.token_ids < vocabulary.size).all()


def test_requests_that_cannot_be_are_refused(make_transformer, vocabulary, form):
    engine = Engine(make_transformer(0, max_positions=40), vocabulary)
    layout = form.vision_layout((2, 2))
    bad = {
        "takes 38 prompt tokens and 9 new ones; the context holds 40": Request(prompt=[1] * 38, layout=layout),
        "takes 39 prompt tokens": Request(prompt=[1], negative_prompt=[1] * 39, layout=layout),
        "has 40 tokens; the context holds 40, answer included": Request(prompt=[1] * 40),
        "prompt of request 0 has shape \\[0\\]": Request(prompt=[], layout=layout),
        "prompt of request 0 holds something": Request(prompt=[vocabulary.size], layout=layout),
        "negative prompt of request 0 holds something": Request(prompt=[1], negative_prompt=[-1], layout=layout),
        "prompt of request 0 holds": Request(prompt=[0.5], layout=layout),
        "layout of request 0": Request(prompt=[1], layout=np.array([-2])),
        "layout of request 0 must be one row": Request(prompt=[1], layout=np.array([[-1]])),
        "max_new_tokens is 0": Request(prompt=[1], max_new_tokens=0),
    }
    for message, request in bad.items():
        with pytest.raises(InputError, match=message):
            engine.generate([request])
    # The context's end limits text; what fits exactly is fine.
    (completion,) = engine.generate([Request(prompt=[1] * 35, max_new_tokens=100, settings=SamplingSettings(temperature=0.0))])
    assert len(completion.token_ids) == 5 or completion.stopped
    engine.generate([Request(prompt=[1] * (40 - len(layout)), layout=layout)])


def test_engines_that_cannot_be_are_refused(make_transformer, vocabulary):
    transformer = make_transformer(0)
    with pytest.raises(InputError, match="max_rows is 1"):
        Engine(transformer, vocabulary, max_rows=1)
    with pytest.raises(InputError, match="max_prefill_tokens is 0"):
        Engine(transformer, vocabulary, max_prefill_tokens=0)
    with pytest.raises(InputError, match="vocabulary has 531 ids; the transformer has 600"):
        Engine(make_transformer(0, vocab_size=600), vocabulary)
    with pytest.raises(ValueError, match="training mode"):
        Engine(make_transformer(0).train(), vocabulary).generate([Request(prompt=[1])])


def test_broken_weights_are_noticed(make_transformer, vocabulary, form):
    transformer = make_transformer(0)
    with torch.no_grad():
        transformer.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite numbers; its weights are broken"):
        Engine(transformer, vocabulary).generate([make_request(form, "x", (2, 2))])
