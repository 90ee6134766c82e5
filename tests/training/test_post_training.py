"""The stages after pre-training: which tokens each supervises, written out; runs from weights; references kept, checked and reused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from openemu3.cli import main
from openemu3.data.loader import LoaderConfig
from openemu3.data.pairs import PreferencePair, read_pairs, read_reference, write_pairs
from openemu3.data.samples import read_samples
from openemu3.data.shards import write_documents
from openemu3.distributed import ParallelConfig
from openemu3.generation.tasks import Emu3, TaskDefaults, read_defaults
from openemu3.model.weights import load_state
from openemu3.records import Document, Image, InputError, Text, Video
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.sequence import Turn
from openemu3.training.export import compute_fingerprint, export_model, load_tokenizers, load_weights, read_vocabulary
from openemu3.training.language_learner import RoleWeights
from openemu3.training.lora import LoraConfig, load_adapter, save_adapter
from openemu3.training.post_training import (
    QUALITY_WEIGHTS,
    UNDERSTANDING_WEIGHTS,
    Replay,
    build_image_to_text_run,
    build_instruction_run,
    build_preference_run,
    build_quality_run,
    read_transformer_config,
)
from openemu3.training.stages import LanguageRun
from openemu3.training.trainer import TrainerConfig

DEFAULTS = TaskDefaults(
    prompt_suffix="", negative_prompt="", question=None, fps=8, clip_frames=8, min_pixels=1024, max_pixels=1024, top_k=0
)
NAMES = {203: "EOL", 204: "EOF", 206: "BOS", 207: "EOS", 208: "IMG", 209: "BOI", 210: "EOI"}
PICTURE, CLIP = Image(np.array([[1, 2], [3, 4]])), Video(np.arange(8).reshape(2, 2, 2), 8)
SQUARE, FRAME = "<BOI>2*2<IMG>cc<EOL>cc<EOL><EOF><EOI>", "cc<EOL>cc<EOL><EOF>"
LEARNT = "<BOI>2*2<IMG>[cc]<EOL>[cc]<EOL><EOF><EOI>"


def spell(form, document, weights):
    """A document in words, what has a weight in [ ]; codes are `c`. A token is the target of the one before it, so BOS never is one."""
    encoded, vocabulary = form.encode(document), form.vocabulary
    table = weights.to_table()
    pieces = []
    for token_id, role in zip(encoded.token_ids.tolist(), encoded.roles.tolist(), strict=True):
        if token_id < vocabulary.num_text:
            piece = form.text_tokenizer.decode([token_id])
        else:
            piece = "c" if token_id >= vocabulary.visual_offset else f"<{NAMES[token_id - vocabulary.num_text]}>"
        pieces.append(f"[{piece}]" if table[role] else piece)
    return "".join(pieces).replace("][", "")


@pytest.mark.parametrize(
    ("document", "weights", "expected"),
    [
        # quality tuning: codes alone, in drawings and films
        (Document((Text("red cat"), PICTURE)), QUALITY_WEIGHTS, "<BOS>red cat" + LEARNT + "<EOS>"),
        (
            Document((Text("red cat"), CLIP)),
            QUALITY_WEIGHTS,
            "<BOS>red cat<BOI>2*2*2 8fps 1s<IMG>" + "[cc]<EOL>[cc]<EOL><EOF>" * 2 + "<EOI><EOS>",
        ),
        # image-to-text: words and the EOS after them, never codes; all of a text
        (Document((PICTURE, Text("red cat", target=True))), UNDERSTANDING_WEIGHTS, "<BOS>" + SQUARE + "[red cat<EOS>]"),
        (
            Document((CLIP, Text("red cat", target=True))),
            UNDERSTANDING_WEIGHTS,
            "<BOS><BOI>2*2*2 8fps 1s<IMG>" + FRAME * 2 + "<EOI>[red cat<EOS>]",
        ),
        (Document((Text("red cat", target=True),)), UNDERSTANDING_WEIGHTS, "<BOS>[red cat<EOS>]"),
        # and what these stages are not shown teaches them nothing
        (Document((Text("red cat"), PICTURE)), UNDERSTANDING_WEIGHTS, "<BOS>red cat" + SQUARE + "<EOS>"),
        (Document((Text("red cat", target=True),)), QUALITY_WEIGHTS, "<BOS>red cat<EOS>"),
        # pre-training: everything
        (Document((Text("red cat"), PICTURE)), RoleWeights(), "[<BOS>red cat" + SQUARE + "<EOS>]"),
    ],
)
def test_what_each_stage_supervises(small_format, document, weights, expected):
    assert spell(small_format, document, weights) == expected


def test_instruction_tuning_supervises_the_answer_alone(small_format):
    turns = [Turn("What is it?", (PICTURE,), "A cat."), Turn("Sure", (), "Yes")]
    spelt = [spell(small_format, small_format.chat_document(turns[:end]), UNDERSTANDING_WEIGHTS) for end in (1, 2)]
    opening = "<BOS>You are a helpful assistant. USER: " + SQUARE + "What is it?. ASSISTANT:"
    assert spelt == [opening + "[ A cat.<EOS>]", opening + " A cat. USER: Sure. ASSISTANT:[ Yes<EOS>]"]


# -- runs --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(data, transformer_config, tmp_path_factory):
    """A model folder, hardly trained."""
    folder = tmp_path_factory.mktemp("post")
    LanguageRun(
        tokenizers=data / "tokenizers",
        documents=(data / "documents.parquet",),
        transformer=dataclasses.replace(transformer_config, dropout=0.0),
        trainer=TrainerConfig(folder / "run", 2, sample_every=0, peak_flops=0.0),
        batches=LoaderConfig(128, 2, 2, prefetch=0),
        validation_split="heldout",
    ).run()
    export_model(folder / "run", None, data / "tokenizers", folder / "model", 32 * 32, dataclasses.asdict(DEFAULTS))
    return folder / "model"


def shorten(run, num_steps=3, rate=1e-2, **changes):
    """The run in small: few steps, fp32, short rows."""
    optimizer = dataclasses.replace(run.learner.optimizer, learning_rate=rate, num_steps=num_steps, warmup_steps=0)
    trainer = dataclasses.replace(run.trainer, num_steps=num_steps, log_every=1, save_every=0, peak_flops=0.0)
    learner = dataclasses.replace(run.learner, optimizer=optimizer, precision="fp32")
    if isinstance(run, LanguageRun):
        batches = dataclasses.replace(run.batches, context_length=128, rows_per_batch=2, rows_per_micro_batch=2, prefetch=0)
        changes = {"batches": batches, "validation_split": "heldout"} | changes
    return dataclasses.replace(run, trainer=trainer, learner=learner, **changes)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_quality_tuning_learns_codes_at_a_rate_that_falls_to_zero(model, data, tmp_path):
    run = build_quality_run(model, model, (data / "documents.parquet",), tmp_path / "qft", num_steps=100)
    assert run.learner.role_weights == QUALITY_WEIGHTS and run.batches.null_prompt_share == 0.05
    assert run.transformer == read_transformer_config(model) and run.batches.context_length == 256  # what its positions allow
    optimizer = run.learner.optimizer
    assert (optimizer.schedule, optimizer.final_share, optimizer.learning_rate) == ("linear", 0.0, 1e-5)
    shorten(run, 4).run()
    rows = [row for row in read_rows(tmp_path / "qft") if "learning_rate" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert "loss_vision" in rows[0] and not {"loss_text_context", "loss_text_target", "loss_structure"} & rows[0].keys()
    assert read_transformer_config(tmp_path / "qft") == run.transformer


def test_image_to_text_mixes_descriptions_and_texts_by_their_tokens(model, data, tmp_path):
    _, form = load_tokenizers(model)
    texts = [EncodedDocument("text", f"text-{i}", "train", form.encode(Document((Text("a red disc" * 3, target=True),)))) for i in range(9)]
    write_documents(tmp_path / "texts.parquet", texts, compute_fingerprint(model))
    paths = (data / "documents.parquet", tmp_path / "texts.parquet")
    run = build_image_to_text_run(model, model, paths, tmp_path / "run", text_share=0.25)
    assert run.batches.mixture.shares == {"describe": 0.75, "text": 0.25} and run.learner.role_weights == UNDERSTANDING_WEIGHTS
    shorten(run).run()
    rows = read_rows(tmp_path / "run")
    learnt = [row for row in rows if "learning_rate" in row]
    assert all("loss_text_target" in row and "loss_vision" not in row for row in learnt)
    assert rows[-1]["validation/loss"] < rows[0]["validation/loss"]
    with pytest.raises(InputError, match="text_share is 1.5"):
        build_image_to_text_run(model, model, paths, tmp_path / "run", text_share=1.5)


def test_adapters_are_trained_saved_apart_and_merged(model, data, tmp_path):
    run = build_quality_run(model, model, (data / "documents.parquet",), tmp_path / "lora")
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    trainer = shorten(run, lora=lora).run()
    base = dict(load_state(model, "transformer"))
    merged = load_weights(tmp_path / "lora")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name].bfloat16(), base[name])}
    assert changed == {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    export_model(tmp_path / "lora", None, model, tmp_path / "merged", 32 * 32, dataclasses.asdict(DEFAULTS))
    save_adapter(trainer.learner.transformer.state_dict(), lora, tmp_path / "adapter")
    loaded, exported = Emu3.load(model, dtype=torch.float32), Emu3.load(tmp_path / "merged", dtype=torch.float32)
    load_adapter(loaded.engine.transformer, tmp_path / "adapter")
    for one, other in zip(loaded.engine.transformer.parameters(), exported.engine.transformer.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)  # exported in bf16
    assert exported.draw("a red disc")[0].size == (32, 32)
    # An earlier stage's run is what the next begins with, its adapters merged.
    following = shorten(build_quality_run(tmp_path / "lora", model, (data / "documents.parquet",), tmp_path / "next"), 1, 1e-8).run()
    for name, tensor in following.learner.transformer.state_dict().items():
        torch.testing.assert_close(tensor, merged[name].float(), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="adapters need weights"):
        dataclasses.replace(shorten(run, lora=lora, init_from=None), trainer=TrainerConfig(tmp_path / "none", 1, peak_flops=0.0)).run()


def test_instruction_tuning_begins_with_another_run(model, data, tmp_path):
    _, form = load_tokenizers(model)
    turns = [Turn("What is it?", (PICTURE,), "a red disc")]
    rows = [
        EncodedDocument("instruct", f"{i}", split, form.encode(form.chat_document(turns)))
        for i in range(3)
        for split in ("train", "heldout")
    ]
    write_documents(tmp_path / "talk.parquet", rows, compute_fingerprint(model))
    run = build_instruction_run(model, model, (tmp_path / "talk.parquet",), tmp_path / "instruct")
    shorten(run, 12).run()
    rows = read_rows(tmp_path / "instruct")
    assert rows[-1]["validation/loss"] < 0.7 * rows[0]["validation/loss"]


# -- preferences -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    """What the model drew of twelve prompts; the one with the higher first code is preferred."""
    emu3 = Emu3.load(model, dtype=torch.float32)
    rows = []
    for number in range(12):
        one, other = emu3.draw_with_tokens([f"a red disc {number}"], [0, 1], temperature=1.0)[0]
        best, worst = sorted((one, other), key=lambda drawn: -int(drawn.token_ids[0]))
        rows.append(PreferencePair(f"prompt {number}", one.prompt_ids, best.token_ids, worst.token_ids, "image", 4.0, 2.0))
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_pairs(path, rows, compute_fingerprint(model))
    return path


def make_run(model, pairs, folder, num_steps=6, **changes):
    return shorten(build_preference_run(model, model, pairs, folder), num_steps, 3e-3, pairs_per_batch=3, held_out_share=0.3, **changes)


def test_preferences_are_learnt_from_a_model_that_is_its_own_reference(model, pairs, tmp_path):
    trainer = make_run(model, pairs, tmp_path / "dpo", 12).run()
    assert trainer.is_complete
    rows = read_rows(tmp_path / "dpo")
    first, last = rows[0], rows[-1]
    assert first["validation/margin"] == pytest.approx(0, abs=1e-4) and first["validation/kl"] == pytest.approx(0, abs=1e-4)
    learnt = [row for row in rows if "grad_norm" in row]
    assert learnt[-1]["margin"] > 0.05 > abs(learnt[0]["margin"]) and learnt[-1]["loss"] < learnt[0]["loss"]
    assert {"reward_chosen", "reward_rejected", "accuracy", "cross_entropy"} <= learnt[0].keys() and "validation/accuracy" in last
    export_model(tmp_path / "dpo", None, model, tmp_path / "out", 32 * 32, dataclasses.asdict(DEFAULTS))
    assert Emu3.load(tmp_path / "out").draw("a red disc")[0].size == (32, 32)


def test_references_are_computed_once_kept_and_checked(model, pairs, tmp_path, capsys):
    make_run(model, pairs, tmp_path / "one", 1).run()
    kept = tmp_path / "one" / "pairs.parquet"
    digest = read_reference(kept)
    assert digest is not None and read_reference(pairs) is None
    assert "12 pairs under the reference" in capsys.readouterr().err
    make_run(model, kept, tmp_path / "two", 1).run()  # they come with the pairs
    assert "under the reference" not in capsys.readouterr().err and not (tmp_path / "two" / "pairs.parquet").exists()
    make_run(model, kept, tmp_path / "three", 1, check_reference=True).run()
    assert "largest difference 0 nats" in " ".join(capsys.readouterr().err.split())  # the same passes: bit for bit
    wrong = [dataclasses.replace(pair, reference_chosen=pair.reference_chosen - 1) for pair in read_pairs(kept)]
    write_pairs(tmp_path / "wrong.parquet", wrong, compute_fingerprint(model), digest)
    with pytest.raises(InputError, match="differ from those of"):
        make_run(model, tmp_path / "wrong.parquet", tmp_path / "four", 1, check_reference=True).run()
    # Of another reference they are computed anew.
    make_run(model, kept, tmp_path / "five", 1, learn_structure=True).run()
    assert read_reference(tmp_path / "five" / "pairs.parquet") not in (None, digest)


def test_documents_are_replayed_beside_the_pairs(model, data, pairs, tmp_path):
    make_run(model, pairs, tmp_path / "dpo", 12, replay=(data / "documents.parquet",)).run()
    rows = read_rows(tmp_path / "dpo")
    learnt = [row["replay_cross_entropy"] for row in rows if "grad_norm" in row]
    assert min(learnt[-3:]) < learnt[0] and "validation/replay_cross_entropy" not in rows[-1]
    replay = Replay.open((data / "documents.parquet",), compute_fingerprint(model), 128)
    vocabulary = read_vocabulary(model)
    for ids in replay:  # prompts first: nothing that is described
        assert ids[0] == vocabulary.bos and ids[1] != vocabulary.boi and ids[-1] == vocabulary.eos
    shortest = min(map(len, replay))
    assert {len(ids) for ids in Replay.open((data / "documents.parquet",), compute_fingerprint(model), shortest)} == {shortest}
    with pytest.raises(InputError, match=f"has nothing to replay; documents that draw or film in at most {shortest - 1} tokens are needed"):
        Replay.open((data / "documents.parquet",), compute_fingerprint(model), shortest - 1)


@pytest.mark.parametrize("replays", [False, True])
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(model, data, pairs, tmp_path, replays):
    replay = (data / "documents.parquet",) if replays else ()
    whole = make_run(model, pairs, tmp_path / "whole", 6, replay=replay).run()
    run = make_run(model, pairs, tmp_path / "parts", 6, replay=replay)
    half = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, num_steps=3))
    half.run()
    resumed = run.run()
    for one, other in zip(whole.learner.transformer.parameters(), resumed.learner.transformer.parameters(), strict=True):
        assert one.equal(other)


def test_adapters_learn_preferences_too(model, pairs, tmp_path):
    trainer = make_run(model, pairs, tmp_path / "dpo", 8, lora=LoraConfig(rank=4)).run()
    assert [row for row in read_rows(tmp_path / "dpo") if "grad_norm" in row][-1]["margin"] > 0
    assert all("lora_" in name for name, parameter in trainer.learner.transformer.named_parameters() if parameter.requires_grad)


def test_pairs_that_do_not_fit_the_model_are_refused(model, pairs, tmp_path):
    short = dataclasses.replace(read_transformer_config(model), max_positions=8)
    with pytest.raises(InputError, match="the model's positions allow 8"):
        make_run(model, pairs, tmp_path / "run", transformer=short).run()
    write_pairs(tmp_path / "other.parquet", read_pairs(pairs), "other tokenizers")
    with pytest.raises(InputError, match="sample with this model"):
        make_run(model, tmp_path / "other.parquet", tmp_path / "run").run()
    with pytest.raises(InputError, match="has 8 ranks, but the number of processes is 1"):
        make_run(model, pairs, tmp_path / "run", parallel=ParallelConfig(dp=8)).run()


# -- commands ----------------------------------------------------------------------------------------------------------------------


def run_command(capsys, *arguments):
    """What the command says, as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


SMALL = ("--num-steps", 2, "--log-every", 1, "--precision", "fp32", "--device", "cpu")


def test_conversations_become_documents_answers_and_an_adapter(model, data, tmp_path, capsys):
    picture = next(read_samples(data / "samples.parquet", kind="image"))
    (tmp_path / "disc.png").write_bytes(picture.media)
    asked = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red disc"}]
    rows = [{"id": str(index), "image": "disc.png", "conversations": asked} for index in range(3)]
    (tmp_path / "talk.json").write_text(json.dumps([*rows, {"conversations": asked[:1], "image": "disc.png"}]))
    (tmp_path / "held.json").write_text(json.dumps(rows[:1]))
    documents = tmp_path / "talk.parquet"
    tokenize = (
        "tokenize-conversations",
        tmp_path / "talk.json",
        "--validation",
        tmp_path / "held.json",
        "--model",
        model,
        "--output",
        documents,
    )
    answer = run_command(capsys, *tokenize)
    assert answer["splits"] == {"train": 3, "validation": 1} and answer["left_out"] == {"no assistant turn": 1}
    instruct = (
        "train",
        "instruct",
        documents,
        "--model",
        model,
        "--output",
        tmp_path / "run",
        "--lora-rank",
        2,
        "--rows-per-batch",
        1,
        *SMALL,
    )
    answer = run_command(capsys, *instruct)
    assert answer["steps"] == 2 and answer["validation/loss_text_target"] > 0
    run_command(capsys, "export", "adapter", tmp_path / "run", "--output", tmp_path / "adapter")
    run_command(capsys, "export", "model", tmp_path / "run", "--tokenizers", model, "--output", tmp_path / "out")
    assert read_defaults(tmp_path / "out") == DEFAULTS  # it is asked as the model that it was made of
    asked = ("answer", "What is it?", tmp_path / "disc.png", "--max-new-tokens", 2, "--device", "cpu", "--dtype", "float32")
    with_adapter = run_command(capsys, *asked, "--model", model, "--adapter", tmp_path / "adapter")
    assert isinstance(with_adapter["text"], str)
    assert main(["describe", str(tmp_path / "disc.png"), "--model", str(model), "--adapter", str(tmp_path)]) == 2
    assert "cannot be read as an adapter" in capsys.readouterr().err


def test_pairs_are_learnt_by_the_command(model, pairs, tmp_path, capsys):
    output = tmp_path / "dpo"
    dpo = f"train dpo {pairs} --model {model} --output {output} --pairs-per-batch 2 --beta 0.5 --held-out-share 0.3".split()
    answer = run_command(capsys, *dpo, *SMALL)
    assert answer["steps"] == 2 and 0 <= answer["validation/accuracy"] <= 1
    described = json.loads((output / "run.json").read_text())
    assert described["learner"]["objective"] == {"beta": 0.5, "cross_entropy_weight": 1.0, "length_normalised": False, "replay_weight": 1.0}
    for wrong, message in (
        (("--beta", "0"), "beta is 0"),
        (("--validation-split", "x"), "pairs have no splits"),
        (("--pairs-per-batch", "99"), "pairs_per_batch is 99"),
        (("--replay", str(tmp_path / "nowhere")), "nowhere"),
    ):
        assert main([*map(str, dpo), *map(str, SMALL), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_quality_tuning_and_image_to_text_by_their_commands(model, data, tmp_path, capsys):
    held_out = ("--validation-split", "heldout", "--rows-per-batch", 2, "--context-length", 128)
    documents = data / "documents.parquet"
    answer = run_command(capsys, "train", "qft", documents, "--model", model, "--output", tmp_path / "qft", *held_out, *SMALL)
    assert "validation/loss_vision" in answer and "validation/loss_text_target" not in answer
    shares = ("--text-share", 0, "--video-share", 0.3)
    answer = run_command(
        capsys, "train", "image-to-text", documents, "--model", model, "--output", tmp_path / "i2t", *shares, *held_out, *SMALL
    )
    assert "validation/loss_text_target" in answer and "validation/loss_vision" not in answer
