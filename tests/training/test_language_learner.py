"""The language learner: the table of weights, splits that make no difference, skipped steps, and learning a few documents by heart."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openemu3.data.documents import DocumentTable, LanguageBatch, pad_documents
from openemu3.model.attention import CausalAttention
from openemu3.model.transformer import build_transformer
from openemu3.tokenization.sequence import Role
from openemu3.training.language_learner import LanguageLearner, LanguageLearnerConfig, RoleWeights, replace_codes
from openemu3.training.optimizer import OptimizerConfig

WEIGHTS = RoleWeights(text_context=0.25, text_target=2.0, vision=0.5, structure=1.0)


def make_learner(transformer_config, weights=WEIGHTS, rate=1e-2, autocast=False, dropout=0.0, **optimizer):
    config = copy.copy(transformer_config)
    object.__setattr__(config, "dropout", dropout)
    transformer = build_transformer(config, torch.Generator().manual_seed(3))
    learner_config = LanguageLearnerConfig(OptimizerConfig(rate, 1000, 0, schedule="constant", **optimizer), weights, autocast)
    return LanguageLearner(transformer, learner_config, lambda: iter(()))


@pytest.fixture(scope="module")
def table(data):
    return DocumentTable([data / "documents.parquet"], {"train"})


def choose(table, *indices, padding=0):
    """A batch of these documents, with `padding` more columns of padding than they need."""
    batch = pad_documents([table.read(index) for index in indices], 0)
    if not padding:
        return batch
    ids = F.pad(batch.token_ids, (0, padding), value=0)
    return LanguageBatch(ids, F.pad(batch.roles, (0, padding), value=int(Role.PADDING)))


def list_weights(learner):
    return [p.detach().clone() for p in learner.transformer.parameters()]


def test_roles_weigh_as_the_table_says():
    assert RoleWeights().to_table().tolist() == [0, 1, 1, 0.5, 1]  # the paper's pre-training; padding counts nothing
    assert WEIGHTS.to_table().tolist() == [0, 0.25, 2, 0.5, 1]


def test_loss_is_the_weighted_mean_over_the_tokens_to_be_predicted(transformer_config, table):
    learner = make_learner(transformer_config)
    batch = choose(table, 0, 1, 5)
    with torch.no_grad():
        hidden = learner.transformer(batch.token_ids, CausalAttention())
        logits = learner.transformer.compute_logits(hidden)[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch.token_ids[:, 1:], reduction="none")
    roles = batch.roles[:, 1:].long()
    weights = torch.tensor([0, 0.25, 2, 0.5, 1])[roles]
    metrics = learner.learn(0, [batch])
    assert metrics["loss"] == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-5)
    for role in (Role.TEXT_CONTEXT, Role.TEXT_TARGET, Role.VISION, Role.STRUCTURE):  # unweighted, each by itself
        assert metrics[f"loss_{role.name.lower()}"] == pytest.approx(losses[roles == role].mean().item(), rel=1e-5)
    assert "loss_padding" not in metrics
    assert metrics["tokens"] == sum(len(table.read(index)[0]) for index in (0, 1, 5))


@pytest.mark.parametrize(
    "split",
    [
        lambda table, film: [choose(table, 0, 1), choose(table, 2, film)],
        lambda table, film: [choose(table, film), choose(table, 0, padding=3), choose(table, 2, 1)],
        lambda table, film: [choose(table, 0, 1, 2, film, padding=11)],
        lambda table, film: [choose(table, film, 2, 1, 0)],
    ],
    ids=["two and two", "one, one padded, two", "more padding", "other order"],
)
def test_a_split_into_micro_batches_makes_no_difference(transformer_config, table, split):
    whole = make_learner(transformer_config, eps=1e-3)  # AdamW's first step is +-rate for the tiniest gradient unless eps damps it
    parts = make_learner(transformer_config, eps=1e-3)
    film = table.sources.index("film")
    assert len({len(table.read(index)[0]) for index in (0, 1, 2, film)}) > 2  # of several lengths
    for step in range(2):
        one = whole.learn(step, [choose(table, 0, 1, 2, film)])
        other = parts.learn(step, split(table, film))
        assert {name: pytest.approx(value, rel=1e-5) for name, value in one.items()} == other
    for a, b in zip(list_weights(whole), list_weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_weighs_nothing_is_not_learnt(transformer_config, table):
    """Describing, with only the answers counted: the gradient is that of the answers alone."""
    documents = [index for index, source in enumerate(table.sources) if source == "describe"][:3]
    learner = make_learner(transformer_config, RoleWeights(0, 1, 0, 0))
    batch = choose(table, *documents)
    metrics = learner.learn(0, [batch])
    assert metrics["loss"] == pytest.approx(metrics["loss_text_target"])
    assert metrics.keys() == {"loss", "loss_text_target", "grad_norm", "tokens"}


def test_a_step_in_which_nothing_counts_changes_nothing(transformer_config, table):
    learner = make_learner(transformer_config, RoleWeights(0, 1, 0, 0))
    drawing = table.sources.index("draw")
    learner.learn(0, [choose(table, table.sources.index("describe"))])
    before = {name: tensor.clone() for name, tensor in learner.list_tensors().items()}
    metrics = learner.learn(1, [choose(table, drawing)])
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    after = learner.list_tensors()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_a_step_that_is_not_finite_changes_nothing(transformer_config, table):
    """One weight is made infinite for one step, as an overflow would."""
    learner = make_learner(transformer_config)
    learner.learn(0, [choose(table, 0, 1)])
    weight = learner.transformer.model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.inf
    before = {name: tensor.clone() for name, tensor in learner.list_tensors().items()}
    assert not math.isfinite(learner.learn(1, [choose(table, 0, 1)])["grad_norm"])
    after = learner.list_tensors()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    with torch.no_grad():
        weight[0, 0] = kept
    assert math.isfinite(learner.learn(2, [choose(table, 0, 1)])["loss"])


def test_validation_measures_without_dropout_and_learns_nothing(transformer_config, table):
    learner = make_learner(transformer_config, dropout=0.5)
    learner.validation = lambda: iter([choose(table, 0, 1), choose(table, 7)])
    before = list_weights(learner)
    one, other = learner.validate(), learner.validate()
    assert one == other and one.keys() >= {"loss", "loss_vision", "loss_text_context"}
    assert learner.transformer.training
    assert all(a.equal(b) for a, b in zip(before, list_weights(learner), strict=True))
    reference = make_learner(transformer_config)
    assert one["loss"] == pytest.approx(reference.learn(0, [choose(table, 0, 1, 7)])["loss"], rel=1e-5)


def test_samples_are_drawn_in_evaluation_mode(transformer_config, tmp_path):
    seen = []
    learner = make_learner(transformer_config, dropout=0.5)
    learner.sample = lambda transformer, folder, step: seen.append((transformer.training, folder, step))
    learner.write_samples(tmp_path, 7)
    assert seen == [(False, tmp_path, 7)] and learner.transformer.training


@pytest.mark.parametrize("autocast", [False, True])
def test_a_few_documents_are_learnt_by_heart(transformer_config, table, autocast):
    learner = make_learner(transformer_config, RoleWeights(0.1, 1, 1, 1), rate=1e-2, autocast=autocast, weight_decay=0.0)
    batch = choose(table, 0, 4)
    losses = [learner.learn(step, [batch])["loss_vision"] for step in range(120)]
    assert losses[0] == pytest.approx(math.log(transformer_config.vocab_size), rel=0.05)  # knows nothing
    assert losses[-1] < 0.05
    with torch.no_grad():
        logits = learner.transformer.eval().compute_logits(learner.transformer(batch.token_ids, CausalAttention()))
    codes = batch.roles[:, 1:] == Role.VISION
    assert logits[:, :-1].argmax(-1)[codes].equal(batch.token_ids[:, 1:][codes])


def test_state_comes_back(transformer_config, table):
    one, other = make_learner(transformer_config), make_learner(transformer_config, rate=1e-2)
    one.learn(0, [choose(table, 0)])
    tensors = {name: tensor.clone() for name, tensor in one.list_tensors().items()}
    state = one.list_state()
    one.learn(1, [choose(table, 1)])
    other.load(tensors, state)
    other.learn(1, [choose(table, 1)])
    assert all(a.equal(b) for a, b in zip(list_weights(one), list_weights(other), strict=True))
    assert np.isfinite(one.learn(2, [choose(table, 2)])["loss"])


def test_noise_replaces_a_share_of_the_codes_and_nothing_else():
    ids = torch.arange(4000).reshape(4, 1000)
    is_code = (ids % 4) != 0
    noisy = replace_codes(ids, is_code, 0.25, torch.Generator().manual_seed(1))
    assert noisy[~is_code].equal(ids[~is_code])
    assert set(noisy[is_code].tolist()) <= set(ids[is_code].tolist())  # codes of the batch, none invented
    assert (noisy != ids)[is_code].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert noisy.equal(replace_codes(ids, is_code, 0.25, torch.Generator().manual_seed(1)))
    assert replace_codes(ids, torch.zeros_like(is_code), 0.25, torch.Generator()).equal(ids)


def test_noise_is_read_but_never_a_target(transformer_config, table):
    """With noise the loss of a step differs, the weights of its targets do not, and a repeated step is the same."""
    batch = choose(table, 0, 1, 5)
    losses = {}
    for noise in (0.0, 0.5, 0.5):
        learner = make_learner(transformer_config)
        object.__setattr__(learner.config, "vision_noise", noise)
        losses.setdefault(noise, []).append(learner.learn(3, [batch])["loss"])
    assert losses[0.5][0] == losses[0.5][1] != losses[0.0][0]
    with pytest.raises(ValueError, match="vision_noise is 1"):
        LanguageLearnerConfig(vision_noise=1.0)
