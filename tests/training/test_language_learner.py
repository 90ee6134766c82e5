"""The language learner: packed rows against transformers, the table of weights, splits that make no difference, skipped steps, and
learning a few documents by heart."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Emu3TextConfig
from transformers.models.emu3.modeling_emu3 import Emu3ForCausalLM

from openemu3.data.packing import Tokens, build_rows
from openemu3.data.shards import DocumentStore
from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import build_transformer
from openemu3.records import InputError
from openemu3.tokenization.sequence import Role, Vocabulary
from openemu3.training.language_learner import (
    Kind,
    LanguageLearner,
    LanguageLearnerConfig,
    LossSums,
    RoleWeights,
    find_padding,
    replace_codes,
    sum_squared_lengths,
)
from openemu3.training.optimizer import OptimizerConfig

WEIGHTS = RoleWeights(text_context=0.25, text_target=2.0, vision=0.5, structure=1.0)
TABLE = torch.tensor([0, 0.25, 2, 0.5, 1])
VOCABULARY = Vocabulary(300, 64)
SIZES = ("grad_norm", "learning_rate", "tokens", "fill_rate", "flops")


def make_learner(transformer_config, weights=WEIGHTS, rate=1e-2, precision="fp32", dropout=0.0, noise=0.0, **optimizer):
    config = copy.copy(transformer_config)
    object.__setattr__(config, "dropout", dropout)
    learner_config = LanguageLearnerConfig(OptimizerConfig(rate, 1000, 0, schedule="constant", **optimizer), weights, precision, noise)
    transformer = build_transformer(config, torch.Generator().manual_seed(3), learner_config.weight_dtype)
    return LanguageLearner(transformer, learner_config, VOCABULARY, lambda: iter(()))


@pytest.fixture(scope="module")
def store(data):
    return DocumentStore([data / "documents.parquet"], {"train"})


def find(store, source, number=0):
    """The index of a document of this source."""
    return [index for index in range(len(store)) if store.sources[store.source_of[index]] == source][number]


def pack(store, *rows, context=160, plain=False):
    """A batch of rows of these documents."""
    tokens = [[Tokens(*store.read(index), store.read_sample_id(index)) for index in row] for row in rows]
    return build_rows(tokens, context, VOCABULARY.pad, plain)


def compute_alone(learner, store, index):
    """(cross-entropy of every token of one document but its first, by itself and by torch; their roles)."""
    ids, roles = (torch.from_numpy(part.astype(np.int64)) for part in store.read(index))
    with torch.no_grad():
        logits = learner.transformer.compute_logits(learner.transformer(ids[None], CausalAttention()))[0, :-1]
    return F.cross_entropy(logits, ids[1:], reduction="none"), roles[1:]


def list_weights(learner):
    return [p.detach().clone() for p in learner.transformer.parameters()]


def test_roles_weigh_as_the_table_says():
    assert RoleWeights().to_table().tolist() == [0, 1, 1, 0.5, 1]  # the paper's pre-training; padding counts nothing
    for weight in (-1.0, math.nan, math.inf):  # once accepted, and every step of the run was skipped
        with pytest.raises(InputError, match=f"role weight vision is {weight}; a finite number of at least 0"):
            RoleWeights(vision=weight)
    assert WEIGHTS.to_table().tolist() == [0, 0.25, 2, 0.5, 1]


def test_loss_is_the_weighted_mean_over_the_tokens_to_be_predicted(transformer_config, store):
    """Of packed rows, against every document alone: no token sees another document, and none predicts the next document's first token."""
    learner = make_learner(transformer_config)
    documents = [find(store, "draw"), find(store, "film"), find(store, "describe")]
    alone = [compute_alone(learner, store, index) for index in documents]
    losses, roles = (torch.cat(parts) for parts in zip(*alone, strict=True))
    metrics = learner.learn(0, [pack(store, documents[:2], documents[2:])])
    assert metrics["loss"] == pytest.approx(((losses * TABLE[roles]).sum() / TABLE[roles].sum()).item(), rel=1e-5)
    for role in (Role.TEXT_CONTEXT, Role.TEXT_TARGET, Role.VISION, Role.STRUCTURE):  # unweighted, each by itself
        assert metrics[f"loss_{role.name.lower()}"] == pytest.approx(losses[roles == role].mean().item(), rel=1e-5)
    for name, part in (("video", alone[1:2]), ("image", [alone[0], alone[2]])):
        losses, roles = (torch.cat(parts) for parts in zip(*part, strict=True))
        assert metrics[f"{name}/loss_vision"] == pytest.approx(losses[roles == Role.VISION].mean().item(), rel=1e-5)
    assert "loss_padding" not in metrics and not any(name.startswith("text/") for name in metrics)
    assert metrics["tokens"] == sum(store.lengths[documents]) and metrics["fill_rate"] == pytest.approx(metrics["tokens"] / 320)


def test_loss_and_gradients_are_those_of_transformers(transformer_config, store):
    """Packed rows in transformers' Emu3, which tells documents apart by positions that restart (and without a mask or a cache alone)."""
    config = transformer_config
    oracle = Emu3ForCausalLM(
        Emu3TextConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps, attention_dropout=0.0, use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=VOCABULARY.pad, bos_token_id=VOCABULARY.bos, eos_token_id=VOCABULARY.eos,
        )
    )  # fmt: skip
    learner = make_learner(transformer_config)
    with torch.no_grad():
        for parameter in learner.transformer.parameters():  # norms away from 1
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    oracle.load_state_dict(learner.transformer.state_dict())
    batch = pack(
        store, [find(store, "draw"), find(store, "film")], [find(store, "describe"), find(store, "draw", 1), find(store, "draw", 2)]
    )
    ids, documents = batch.token_ids, batch.documents.long()
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    positions = places - torch.where(begins, places, 0).cummax(1).values
    logits = torch.cat(  # row by row: it tells packed rows by their positions in a batch of one
        [oracle(input_ids=ids[r : r + 1], position_ids=positions[r : r + 1], attention_mask=None, use_cache=False).logits for r in (0, 1)]
    )
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected = (losses * TABLE[batch.roles[:, 1:].long()] * (documents[:, 1:] == documents[:, :-1])).sum()
    expected.backward()
    loss = learner._compute_loss(batch, LossSums(torch.device("cpu")))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(oracle.named_parameters())
    for name, parameter in learner.transformer.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "split",
    [
        lambda store, film: [pack(store, [0, 1]), pack(store, [2, film])],
        lambda store, film: [pack(store, [film], context=100), pack(store, [0], context=90), pack(store, [2, 1])],
        lambda store, film: [pack(store, [0], [1, 2], [film], context=131)],
        lambda store, film: [pack(store, [film, 2, 1, 0], context=300)],
    ],
    ids=["two and two", "one, one, two", "more padding", "one row in another order"],
)
def test_a_split_into_micro_batches_makes_no_difference(transformer_config, store, split):
    whole = make_learner(transformer_config, eps=1e-3)  # AdamW's first step is +-rate for the tiniest gradient unless eps damps it
    parts = make_learner(transformer_config, eps=1e-3)
    film = find(store, "film")
    assert len({store.lengths[index] for index in (0, 1, 2, film)}) > 2  # of several lengths
    for step in range(2):
        one = whole.learn(step, [pack(store, [0, 1], [2, film])])
        other = parts.learn(step, split(store, film))
        del one["fill_rate"], other["fill_rate"]
        assert {name: pytest.approx(value, rel=1e-5) for name, value in one.items()} == other
    for a, b in zip(list_weights(whole), list_weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_in_plain_packing_documents_see_each_other(transformer_config, store):
    """The paper's: one long sequence, in which the end of a document predicts the beginning of the next."""
    learner = make_learner(transformer_config)
    batch = pack(store, [0, find(store, "film")], plain=True)
    num_tokens = int((~find_padding(batch)).sum())
    with torch.no_grad():
        hidden = learner.transformer(batch.token_ids[:, :num_tokens], CausalAttention())
        logits = learner.transformer.compute_logits(hidden)[0, :-1]
    losses = F.cross_entropy(logits, batch.token_ids[0, 1:num_tokens], reduction="none")
    weights = TABLE[batch.roles[0, 1:num_tokens].long()]
    assert batch.token_ids[0, store.lengths[0]] == VOCABULARY.bos and weights[store.lengths[0] - 1] == 1  # a target
    metrics = learner.learn(0, [batch])
    assert metrics["loss"] == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-5)
    assert metrics["loss"] != pytest.approx(
        make_learner(transformer_config).learn(0, [pack(store, [0, find(store, "film")])])["loss"], rel=1e-4
    )


@pytest.mark.parametrize("plain", [False, True])
def test_documents_are_told_apart_by_what_they_show(transformer_config, store, plain):
    learner = make_learner(transformer_config)
    text = Tokens(np.array([VOCABULARY.bos, 5, 6, 7, VOCABULARY.eos]), np.full(5, Role.TEXT_TARGET, np.uint8), "text")
    film, draw = (Tokens(*store.read(find(store, source)), source) for source in ("film", "draw"))
    batch = build_rows([[text, film, draw, text], [draw, film]], 160, VOCABULARY.pad, plain)
    kinds = learner._find_kinds(batch)
    expected = [(Kind.TEXT, 5), (Kind.VIDEO, len(film.token_ids)), (Kind.IMAGE, len(draw.token_ids)), (Kind.TEXT, 5)]
    for row, parts in ((0, expected), (1, [expected[2], expected[1]])):
        line = [int(kind) for kind, length in parts for _ in range(length)]
        assert kinds[row, : len(line)].tolist() == line


def test_lengths_and_padding(store):
    batch = pack(store, [0, 1], [2], [], context=120)
    a, b, c = store.lengths[:3]
    assert (~find_padding(batch)).sum(1).tolist() == [a + b, c, 0]
    assert sum_squared_lengths(batch) == a**2 + b**2 + c**2
    assert sum_squared_lengths(pack(store, [0, 1], context=120, plain=True)) == (a + b) ** 2


def test_what_weighs_nothing_is_not_learnt(transformer_config, store):
    """Describing, with only the answers counted: the gradient is that of the answers alone."""
    learner = make_learner(transformer_config, RoleWeights(0, 1, 0, 0))
    metrics = learner.learn(0, [pack(store, [find(store, "describe", number) for number in range(3)])])
    assert metrics["loss"] == pytest.approx(metrics["loss_text_target"])
    assert metrics.keys() == {"loss", "loss_text_target", "image/loss_text_target", *SIZES}


def test_a_step_in_which_nothing_counts_changes_nothing(transformer_config, store):
    learner = make_learner(transformer_config, RoleWeights(0, 1, 0, 0))
    learner.learn(0, [pack(store, [find(store, "describe")])])
    before = {name: tensor.clone() for name, tensor in learner.list_tensors().items()}
    metrics = learner.learn(1, [pack(store, [find(store, "draw")])])
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    after = learner.list_tensors()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_a_step_that_is_not_finite_changes_nothing(transformer_config, store):
    """One weight is made infinite for one step, as an overflow would."""
    learner = make_learner(transformer_config)
    learner.learn(0, [pack(store, [0, 1])])
    weight = learner.transformer.model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.inf
    before = {name: tensor.clone() for name, tensor in learner.list_tensors().items()}
    assert not math.isfinite(learner.learn(1, [pack(store, [0, 1])])["grad_norm"])
    after = learner.list_tensors()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    with torch.no_grad():
        weight[0, 0] = kept
    assert math.isfinite(learner.learn(2, [pack(store, [0, 1])])["loss"])


def test_validation_measures_without_dropout_and_learns_nothing(transformer_config, store):
    learner = make_learner(transformer_config, dropout=0.5)
    learner.validation = lambda: iter([pack(store, [0, 1]), pack(store, [7])])
    before = list_weights(learner)
    one, other = learner.validate(), learner.validate()
    assert one == other and one.keys() >= {"loss", "loss_vision", "loss_text_context"}
    assert learner.transformer.training
    assert all(a.equal(b) for a, b in zip(before, list_weights(learner), strict=True))
    reference = make_learner(transformer_config)
    assert one["loss"] == pytest.approx(reference.learn(0, [pack(store, [0, 1, 7])])["loss"], rel=1e-5)


def test_samples_are_drawn_in_evaluation_mode(transformer_config, tmp_path):
    seen = []
    learner = make_learner(transformer_config, dropout=0.5)
    learner.sample = lambda transformer, folder, step: seen.append((transformer.training, folder, step))
    learner.write_samples(tmp_path, 7)
    assert seen == [(False, tmp_path, 7)] and learner.transformer.training


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_a_few_documents_are_learnt_by_heart(transformer_config, store, precision):
    learner = make_learner(transformer_config, RoleWeights(0.1, 1, 1, 1), rate=1e-2, precision=precision, weight_decay=0.0)
    assert {p.dtype for p in learner.transformer.parameters()} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    batch = pack(store, [0], [4], context=64)
    losses = [learner.learn(step, [batch])["loss_vision"] for step in range(120)]
    assert losses[0] == pytest.approx(math.log(transformer_config.vocab_size), rel=0.05)  # knows nothing
    assert losses[-1] < 0.05
    with torch.no_grad():
        logits = learner.transformer.eval().compute_logits(learner.transformer(batch.token_ids, CausalAttention()))
    codes = batch.roles[:, 1:] == Role.VISION
    assert logits[:, :-1].argmax(-1)[codes].equal(batch.token_ids[:, 1:][codes])


def test_state_comes_back(transformer_config, store):
    one, other = make_learner(transformer_config), make_learner(transformer_config, rate=1e-2)
    one.learn(0, [pack(store, [0])])
    tensors = {name: tensor.clone() for name, tensor in one.list_tensors().items()}
    state = one.list_state()
    one.learn(1, [pack(store, [1])])
    other.load(tensors, state)
    other.learn(1, [pack(store, [1])])
    assert all(a.equal(b) for a, b in zip(list_weights(one), list_weights(other), strict=True))
    assert np.isfinite(one.learn(2, [pack(store, [2])])["loss"])


def test_noise_replaces_a_share_of_the_codes_and_nothing_else():
    ids = torch.arange(4000).reshape(4, 1000)
    is_code = (ids % 4) != 0
    noisy = replace_codes(ids, is_code, 0.25, torch.Generator().manual_seed(1))
    assert noisy[~is_code].equal(ids[~is_code])
    assert set(noisy[is_code].tolist()) <= set(ids[is_code].tolist())  # codes of the batch, none invented
    assert (noisy != ids)[is_code].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert noisy.equal(replace_codes(ids, is_code, 0.25, torch.Generator().manual_seed(1)))
    assert replace_codes(ids, torch.zeros_like(is_code), 0.25, torch.Generator()).equal(ids)


def test_noise_is_read_but_never_a_target(transformer_config, store):
    """With noise the loss of a step differs, the weights of its targets do not, and a repeated step is the same."""
    batch = pack(store, [0, 1, 5])
    losses = {}
    for noise in (0.0, 0.5, 0.5):
        learner = make_learner(transformer_config, noise=noise)
        losses.setdefault(noise, []).append(learner.learn(3, [batch])["loss"])
    assert losses[0.5][0] == losses[0.5][1] != losses[0.0][0]
    with pytest.raises(InputError, match="vision_noise is 1"):
        LanguageLearnerConfig(vision_noise=1.0)
    with pytest.raises(InputError, match="precision is 'fp8'; fp32, mixed or bf16 is allowed"):
        LanguageLearnerConfig(precision="fp8")


def test_a_loss_that_overflows_while_its_gradient_does_not_changes_nothing(transformer_config, store):
    """The sum of losses is infinite in fp32."""
    learner = make_learner(transformer_config, RoleWeights(3e38, 3e38, 3e38, 3e38))
    before = list_weights(learner)
    assert not math.isfinite(learner.learn(0, [pack(store, [0, 1])])["loss"])
    assert all(a.equal(b) for a, b in zip(before, list_weights(learner), strict=True))
