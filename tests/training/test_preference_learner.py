"""DPO: the loss by hand and against TRL's, its gradient against autograd, stored against recomputed references, learning a preference."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openemu3.data.pairs import PreferencePair, read_pairs, read_reference, split_pairs, with_reference, write_pairs
from openemu3.model.attention import CausalAttention
from openemu3.model.context_parallel import ContextSplit
from openemu3.model.transformer import build_transformer
from openemu3.records import InputError
from openemu3.tokenization.sequence import Vocabulary
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.preference_learner import (
    PairBatches,
    PreferenceLearner,
    PreferenceLearnerConfig,
    PreferenceObjectiveConfig,
    Scorer,
    compare_references,
    compute_preference_loss,
    compute_reference,
    digest_reference,
    stack_pairs,
)

VOCABULARY = Vocabulary(300, 64)
DEFAULT = PreferenceObjectiveConfig()
PLAIN = PreferenceObjectiveConfig(beta=0.1, cross_entropy_weight=0.0)


def make_pairs(number, codes=6, seed=0, prompts=3):
    """Completions of `codes` codes with EOL, EOF, EOI and EOS in their places, of prompts of several lengths."""
    random = np.random.default_rng(seed)

    def complete():
        rows = (VOCABULARY.visual_offset + random.integers(0, 64, codes)).reshape(2, -1)
        body = [[*row, VOCABULARY.eol] for row in rows]
        return np.array([*body[0], *body[1], VOCABULARY.eof, VOCABULARY.eoi, VOCABULARY.eos])

    pairs = []
    for index in range(number):
        prompt = [VOCABULARY.bos, *random.integers(0, 300, 1 + index % prompts), VOCABULARY.boi, VOCABULARY.img]
        pairs.append(PreferencePair(f"prompt {index}", np.array(prompt), complete(), complete(), "image", 5.0, 1.0))
    return pairs


def make_transformer(transformer_config, seed=3):
    return build_transformer(transformer_config, torch.Generator().manual_seed(seed))


def make_learner(transformer, objective=DEFAULT, rate=1e-2, autocast=False, validation=lambda: iter(())):
    optimizer = OptimizerConfig(rate, 1000, 0, schedule="constant", weight_decay=0.0, eps=1e-3)
    return PreferenceLearner(transformer, PreferenceLearnerConfig(optimizer, objective, "mixed" if autocast else "fp32"), validation)


def refer(transformer, pairs, pairs_per_rank=4, autocast=False):
    """The pairs with their log-probabilities under the transformer."""
    scorer = Scorer(transformer, "mixed" if autocast else "fp32", ContextSplit(transformer.config, None))
    return compute_reference(scorer, pairs, VOCABULARY, pairs_per_rank=pairs_per_rank)


def digest(transformer, pairs, learn_structure=False, precision="fp32"):
    return digest_reference(transformer.state_dict(), transformer.config, pairs, learn_structure, precision)


def stack(pairs, **options):
    return stack_pairs(pairs, VOCABULARY, **options)


# -- the loss ----------------------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two pairs. Log-ratios: chosen +2 and -1, rejected -3 and -1; so beta * differences are 0.5 and 0."""
    policy = torch.tensor([[-10.0, -21.0], [-13.0, -31.0]])
    reference = torch.tensor([[-12.0, -20.0], [-10.0, -30.0]])
    lengths = torch.tensor([[5, 7], [6, 10]])
    result = compute_preference_loss(policy, reference, lengths, PLAIN)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + math.log(2), rel=1e-6)
    assert result.weight == 2
    torch.testing.assert_close(result.rewards, torch.tensor([[0.2, -0.1], [-0.3, -0.1]]))
    torch.testing.assert_close(result.cross_entropy, torch.tensor([2.0, 3.0]))
    both = compute_preference_loss(policy, reference, lengths, PreferenceObjectiveConfig(0.1, cross_entropy_weight=0.5))
    assert both.loss.item() == pytest.approx(result.loss.item() + 0.5 * (2.0 + 3.0), rel=1e-6)
    averaged = compute_preference_loss(policy, reference, lengths, dataclasses.replace(PLAIN, length_normalised=True))
    differences = (2 / 5 - -3 / 6, -1 / 7 - -1 / 10)
    assert averaged.loss.item() == pytest.approx(sum(math.log1p(math.exp(-0.1 * d)) for d in differences), rel=1e-6)


def test_loss_of_replayed_documents_by_hand():
    """Beside pairs whose DPO loss is log 2, documents of 4 and 8 codes at 2 and 0.5 nats each, at weight 3."""
    policy = torch.tensor([[-10.0, -20.0], [-13.0, -31.0], [-8.0, -4.0]])
    lengths = torch.tensor([[5, 7], [6, 10], [4, 8]])
    result = compute_preference_loss(policy, policy[:2], lengths, dataclasses.replace(PLAIN, replay_weight=3.0))
    assert result.loss.item() == pytest.approx(2 * math.log(2) + 3 * (2.0 + 0.5), rel=1e-6)
    torch.testing.assert_close(result.replayed, torch.tensor([2.0, 0.5]))
    assert compute_preference_loss(policy[:2], policy[:2], lengths[:2], PLAIN).replayed.tolist() == [0, 0]
    with pytest.raises(InputError, match="replay_weight is 0"):
        PreferenceObjectiveConfig(replay_weight=0)


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_loss_and_gradient_are_those_of_trl(length_normalised, weight):
    """TRL's own loss, on a table of per-token log-probabilities. Its cross-entropy is a mean over the tokens of a batch, ours one over
    pairs of a mean over their tokens; with chosen completions of one length these are equal."""
    trainer_class = pytest.importorskip("trl").DPOTrainer
    generator = torch.Generator().manual_seed(4)
    num_pairs, num_tokens = 4, 9
    mask = torch.zeros(2 * num_pairs, num_tokens, dtype=torch.long)
    mask[:num_pairs, 3:8] = 1
    for row, end in enumerate((5, 6, 9, 8)):
        mask[num_pairs + row, 3:end] = 1
    table = -3 * torch.rand(2 * num_pairs, num_tokens - 1, generator=generator, dtype=torch.float64)
    reference = -9 * torch.rand(2, num_pairs, generator=generator, dtype=torch.float64)
    losses, weights = ["sigmoid_norm" if length_normalised else "sigmoid", "sft"], [1.0, weight]

    theirs = table.clone().requires_grad_()
    per_token = theirs * mask[:, 1:]

    def model(**inputs):
        zeros = torch.zeros_like(per_token)
        return SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    model.training = True
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))

    class Metrics(dict):
        def __missing__(self, key):
            return self.setdefault(key, [])

    trainer = SimpleNamespace(
        accelerator=accelerator, model=model, precompute_ref_logps=True, ld_alpha=None, f_divergence_type="reverse_kl", beta=0.3,
        loss_types=losses, loss_weights=weights, use_weighting=False, aux_loss_enabled=False, label_smoothing=0.0, _tp_size=1,
        _total_train_tokens=0, _metrics={"train": Metrics()},
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1],
    }  # fmt: skip
    expected = trainer_class._compute_loss(trainer, model, inputs, return_outputs=False)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)

    ours = table.clone().requires_grad_()
    policy = (ours * mask[:, 1:]).sum(1).view(2, -1)
    lengths = mask[:, 1:].sum(1).view(2, -1)
    config = PreferenceObjectiveConfig(0.3, weight, length_normalised)
    result = compute_preference_loss(policy, reference, lengths, config)
    (gradient,) = torch.autograd.grad(result.loss / result.weight, ours)
    torch.testing.assert_close(result.loss / result.weight, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    if not length_normalised:  # TRL logs rewards without normalisation
        assert trainer._metrics["train"]["rewards/margins"] == [pytest.approx((result.rewards[0] - result.rewards[1]).mean().item())]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_impossible_beta_is_refused(beta):
    with pytest.raises(InputError, match="beta is"):
        PreferenceObjectiveConfig(beta=beta)


# -- what counts -------------------------------------------------------------------------------------------------------------------


def test_exactly_the_codes_of_the_completion_count():
    pair = make_pairs(1)[0]
    batch = stack([pair])
    prompt = [False] * len(pair.prompt_ids)
    row = [True, True, True, False]  # three codes and an EOL
    assert batch.counted[0].tolist() == [*prompt, *row, *row, False, False, False]
    assert stack([pair], learn_structure=True).counted[1].tolist() == [*prompt, *[True] * 11]
    assert batch.token_ids[1].tolist() == [*pair.prompt_ids, *pair.rejected_ids]


def test_rows_of_a_batch_are_padded_and_padding_never_counts():
    pairs = make_pairs(3)
    batch = stack(pairs)
    assert batch.token_ids.shape == (6, len(pairs[2].prompt_ids) + 11)
    assert (batch.token_ids[0, -2:] == VOCABULARY.pad).all() and not batch.counted[:, -2:].any()
    assert torch.isnan(batch.reference).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_ids": [VOCABULARY.size]}, "vocabulary has 0 to"),
        ({"chosen_ids": [VOCABULARY.eos]}, "without visual tokens"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(changes, message):
    pair = dataclasses.replace(make_pairs(1)[0], **{name: np.array(ids) for name, ids in changes.items()})
    with pytest.raises(InputError, match=message):
        stack([pair])


def test_batches_visit_every_pair_once_an_epoch_and_resume_anywhere():
    pairs = make_pairs(7)
    batches = PairBatches(pairs, VOCABULARY, 2, seed=5)
    source = batches(0)
    seen = [next(source) for _ in range(7)]
    first_epoch = {tuple(row) for batch in seen[:3] for row in batch.token_ids[:2, -11:].tolist()}
    assert len(first_epoch) == 6
    resumed = batches(4)
    assert all(next(resumed).token_ids.equal(batch.token_ids) for batch in seen[4:])
    assert not seen[0].token_ids.equal(seen[3].token_ids)
    with pytest.raises(InputError, match="there are 0 preference pairs"):
        PairBatches([], VOCABULARY, 2)
    with pytest.raises(InputError, match="a multiple of 2"):
        PairBatches(pairs, VOCABULARY, 3, dp=2)


def test_ranks_divide_every_batch_among_them():
    pairs = make_pairs(7)
    whole, parts = (
        PairBatches(pairs, VOCABULARY, 4)(0),
        [PairBatches(pairs, VOCABULARY, 4, dp=2, rank=rank, multiple=8)(0) for rank in (0, 1)],
    )
    for _ in range(3):
        expected, (one, other) = next(whole), (next(part) for part in parts)
        width = expected.token_ids.shape[1]
        assert one.token_ids.shape[1] % 8 == 0

        def widen(ids, width=width):
            return F.pad(ids, (0, max(0, width - ids.shape[1])), value=VOCABULARY.pad)[:, :width]

        rows = torch.cat((widen(one.token_ids[:2]), widen(other.token_ids[:2]), widen(one.token_ids[2:]), widen(other.token_ids[2:])))
        assert rows.equal(expected.token_ids)
        assert torch.cat((one.lengths, other.lengths), 1).equal(expected.lengths)


def make_documents(number):
    """Captions of several lengths, then six codes, and what ends a picture."""
    pairs = make_pairs(number, seed=9, prompts=5)
    return [np.concatenate((pair.prompt_ids, pair.chosen_ids)).astype(np.uint32) for pair in pairs]


def test_codes_of_replayed_documents_count_and_each_has_its_turn():
    pairs, documents = make_pairs(7), make_documents(5)
    batches = PairBatches(pairs, VOCABULARY, 2, seed=5, replay=documents)
    source = batches(0)
    seen = [next(source) for _ in range(7)]
    plain = PairBatches(pairs, VOCABULARY, 2, seed=5)(0)
    numbers = {tuple(ids): number for number, ids in enumerate(documents)}
    replayed = []
    for batch in seen:
        expected = next(plain)
        width = expected.token_ids.shape[1]
        assert batch.token_ids[:4, :width].equal(expected.token_ids) and batch.lengths[:2].equal(expected.lengths)
        for row, counted in zip(batch.token_ids[4:], batch.counted[4:], strict=True):
            ids = row[row != VOCABULARY.pad]
            replayed.append(numbers[tuple(ids.tolist())])
            assert row[counted].equal(ids[ids >= VOCABULARY.visual_offset]) and counted.sum() == 6
    assert sorted(replayed[:5]) == sorted(replayed[5:10]) == list(range(5)) and replayed[:5] != replayed[5:10]
    resumed = batches(4)
    assert all(next(resumed).token_ids.equal(batch.token_ids) for batch in seen[4:])
    halves = [PairBatches(pairs, VOCABULARY, 2, seed=5, dp=2, rank=rank, replay=documents)(0) for rank in (0, 1)]
    for batch in seen[:3]:
        one, other = (next(half) for half in halves)
        assert torch.cat((one.counted[2].nonzero(), other.counted[2].nonzero())).equal(
            torch.cat((batch.counted[4].nonzero(), batch.counted[5].nonzero()))
        )


# -- the learner -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def transformer(transformer_config):
    return make_transformer(transformer_config)


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("replays", [False, True])
def test_gradient_is_that_of_the_whole_network(transformer, length_normalised, replays):
    """The learner weighs a cross-entropy; autograd here goes through log-softmax, sums, log-ratios and the loss."""
    pairs = [with_reference(pair, -30.0 - index, -29.0) for index, pair in enumerate(make_pairs(4))]
    documents = make_documents(4) if replays else []
    objective = PreferenceObjectiveConfig(0.2, 0.6, length_normalised, replay_weight=0.4)
    plain = copy.deepcopy(transformer).eval()
    batch = stack(pairs, replayed=documents)
    logits = plain.compute_logits(plain(batch.token_ids, CausalAttention()))[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, batch.token_ids[:, 1:, None]).squeeze(-1)
    policy = (tokens * batch.counted[:, 1:]).sum(1).view(-1, 4)
    log_ratios = policy[:2] - batch.reference
    lengths = batch.counted.sum(1).view(-1, 4)
    if length_normalised:
        log_ratios = log_ratios / lengths[:2]
    loss = -F.logsigmoid(0.2 * (log_ratios[0] - log_ratios[1])).mean() - 0.6 * (policy[0] / lengths[0]).mean()
    if replays:
        loss = loss - 0.4 * (policy[2] / lengths[2]).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])

    learner = make_learner(transformer, objective)
    metrics = learner.learn(0, [stack(pairs[:3], replayed=documents[:3]), stack(pairs[3:], replayed=documents[3:])])
    assert ("replay_cross_entropy" in metrics) == replays
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    optimizer.step()
    for one, other in zip(transformer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_a_split_into_micro_batches_makes_no_difference(transformer_config):
    pairs = refer(make_transformer(transformer_config, 9), make_pairs(5))
    whole, parts = make_learner(make_transformer(transformer_config)), make_learner(make_transformer(transformer_config))
    for step in range(2):
        one = whole.learn(step, [stack(pairs)])
        other = parts.learn(step, [stack(pairs[4:]), stack(pairs[:1]), stack(pairs[1:4])])
        assert {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in one.items()} == other
    for one, other in zip(whole.transformer.parameters(), parts.transformer.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_reference_itself_has_no_reward(transformer):
    """The configuration has dropout; a policy with dropout would not be its own reference."""
    pairs = refer(transformer, make_pairs(4))
    metrics = make_learner(transformer, PLAIN).learn(0, [stack(pairs)])
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("reward_chosen", "reward_rejected", "margin", "kl"):
        assert metrics[name] == pytest.approx(0, abs=1e-5)


def test_a_preference_is_learnt_and_its_logs_say_so(transformer):
    transformer.eval()
    pairs = refer(transformer, make_pairs(6))
    learner = make_learner(transformer, rate=3e-3, validation=lambda: iter([stack(pairs[:2]), stack(pairs[2:])]))
    log = [learner.learn(step, [stack(pairs)]) for step in range(12)]
    measured = learner.validate()
    assert measured["accuracy"] == 1 and measured["reward_chosen"] > 0 > measured["reward_rejected"]
    assert measured["margin"] == pytest.approx(measured["reward_chosen"] - measured["reward_rejected"])
    assert measured["loss"] < log[0]["loss"] and measured["cross_entropy"] < log[0]["cross_entropy"]
    assert measured == learner.validate()  # and measuring learns nothing
    after = refer(transformer, pairs)
    moved = [new.reference_chosen - old.reference_chosen for new, old in zip(after, pairs, strict=True)]
    assert measured["reward_chosen"] == pytest.approx(0.1 * sum(moved) / 6, rel=1e-3)


def test_state_comes_back(transformer_config):
    pairs = refer(make_transformer(transformer_config), make_pairs(4))
    one, other = make_learner(make_transformer(transformer_config)), make_learner(make_transformer(transformer_config, 5))
    one.learn(0, [stack(pairs)])
    other.load({name: tensor.clone() for name, tensor in one.list_tensors().items()}, one.list_state())
    one.learn(1, [stack(pairs)]), other.learn(1, [stack(pairs)])
    assert all(a.equal(b) for a, b in zip(one.transformer.parameters(), other.transformer.parameters(), strict=True))


def test_without_held_out_pairs_validation_says_nothing(transformer):
    assert make_learner(transformer).validate() == {}


# -- stored references -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_references_equal_the_stored_ones(transformer, tmp_path, autocast):
    pairs = make_pairs(5)
    stored = refer(transformer, pairs, 2, autocast)
    write_pairs(tmp_path / "pairs.parquet", stored, "tokenizers", digest(transformer, pairs))
    read = read_pairs(tmp_path / "pairs.parquet", "tokenizers")
    again = refer(transformer, pairs, 2, autocast)
    assert compare_references(read, again) == 0  # bit for bit: they were written as float64
    other_batches = refer(transformer, pairs, 5, autocast)
    assert compare_references(read, other_batches) < (2e-2 if autocast else 1e-5)  # nats per token
    assert compare_references(pairs, again) == math.inf  # none stored


def test_the_digest_knows_what_the_log_probabilities_depend_on(transformer, transformer_config, tmp_path):
    pairs = make_pairs(2)
    first = digest(transformer, pairs)
    assert first == digest(make_transformer(transformer_config), make_pairs(2))
    others = [
        digest(transformer, pairs, learn_structure=True),
        digest(transformer, pairs, precision="mixed"),
        digest(transformer, pairs[:1]),
    ]
    with torch.no_grad():
        transformer.lm_head.weight[3, 4] += 1e-3
    others.append(digest(transformer, pairs))
    assert len({first, *others}) == 5
    write_pairs(tmp_path / "pairs.parquet", pairs, "tokenizers")
    assert read_reference(tmp_path / "pairs.parquet") is None


# -- files -------------------------------------------------------------------------------------------------------------------------


def test_pairs_come_back_from_their_file(tmp_path):
    pairs = make_pairs(3)
    assert write_pairs(tmp_path / "pairs.parquet", pairs, "tokenizers") == 3
    for one, other in zip(pairs, read_pairs(tmp_path / "pairs.parquet", "tokenizers"), strict=True):
        for field in dataclasses.fields(PreferencePair):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
    with pytest.raises(InputError, match="sample with this model"):
        read_pairs(tmp_path / "pairs.parquet", "others")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


def test_files_that_hold_no_pairs_are_refused(tmp_path, data):
    write_pairs(tmp_path / "none.parquet", [], "tokenizers")
    for path, message in (
        (tmp_path / "none.parquet", "holds no preference pair"),
        (tmp_path / "missing.parquet", "cannot be read"),
        (data / "documents.parquet", "has no column prompt"),
    ):
        with pytest.raises(InputError, match=message):
            read_pairs(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_score": 1.0}, "must be higher"),
        ({"chosen_score": math.nan}, "must be higher"),
        ({"kind": "text"}, "kind 'text'"),
        ({"rejected_ids": []}, "rejected_ids"),
        ({"rejected_ids": make_pairs(1)[0].chosen_ids}, "must differ"),
    ],
)
def test_pairs_that_prefer_nothing_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(make_pairs(1)[0], **changes)


def test_a_prompt_is_on_one_side_of_the_split():
    pairs = [pair for pair in make_pairs(400) for _ in range(2)]
    learnt, held_out = split_pairs(pairs, 0.25)
    assert len(learnt) + len(held_out) == 800
    assert not {pair.prompt for pair in learnt} & {pair.prompt for pair in held_out}
    assert 60 <= len({pair.prompt for pair in held_out}) <= 140
    assert split_pairs(pairs, 0.0)[1] == []
    with pytest.raises(InputError, match="held_out_share"):
        split_pairs(pairs, 1.0)
