"""Whole trainings in small: pictures to tokenizers to documents to a model folder that draws; and what is refused on the way."""

import dataclasses
import json

import pytest
import torch

from openemu3.data.clips import PixelBatchesConfig
from openemu3.data.loader import LoaderConfig
from openemu3.data.samples import read_samples, write_samples
from openemu3.data.shards import write_documents
from openemu3.generation.tasks import Emu3, TaskDefaults
from openemu3.media import read_image
from openemu3.model.weights import load_state, read_config
from openemu3.presets import build_sheet_drawer
from openemu3.records import InputError
from openemu3.tokenization.encode import EncodeConfig, encode_samples
from openemu3.tokenization.vision import VisionTokenizerConfig
from openemu3.training.checkpoint import add_prefix, list_checkpoints, load_checkpoint, save_checkpoint, take_prefix
from openemu3.training.export import (
    compute_fingerprint,
    export_model,
    export_tokenizers,
    load_newest,
    load_tokenizers,
    read_description,
    read_vocabulary,
)
from openemu3.training.language_learner import LanguageLearnerConfig, RoleWeights
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.stages import LanguageRun, VisionTokenizerRun, open_weights
from openemu3.training.trainer import TrainerConfig
from openemu3.training.vision_learner import VisionLearnerConfig

DEFAULTS = TaskDefaults(
    prompt_suffix="", negative_prompt="", question=None, fps=8, clip_frames=8, min_pixels=1024, max_pixels=1024, top_k=0
)


def make_vision_run(data, folder, vision_config, **changes):
    optimizer = OptimizerConfig(2e-3, 6, 1, weight_decay=0.0)
    return VisionTokenizerRun(
        samples=(data / "samples.parquet",),
        trainer=TrainerConfig(folder, num_steps=6, log_every=2, save_every=3),
        validation_split="heldout",
        tokenizer=changes.pop("tokenizer", vision_config),
        learner=VisionLearnerConfig(optimizer, optimizer, lpips_net="alex", continuous_steps=2, adversarial_start=99),
        batches=PixelBatchesConfig(images_per_batch=4, clip_frames=4, video_every=3, max_shift=2),
        **changes,
    )


def make_language_run(tokenizers, documents, folder, transformer_config, **changes):
    return LanguageRun(
        tokenizers=tokenizers,
        documents=(documents,),
        transformer=changes.pop("transformer", transformer_config),
        trainer=TrainerConfig(folder, num_steps=4, save_every=2, log_every=1),
        learner=changes.pop("learner", LanguageLearnerConfig(OptimizerConfig(1e-3, 4, 1), precision="fp32")),
        batches=changes.pop("batches", LoaderConfig(128, rows_per_batch=2)),
        validation_split="heldout",
        **changes,
    )


@pytest.fixture(scope="module")
def vision_run(data, vision_config, tmp_path_factory, lpips_weights):
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("runs") / "vision"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENEMU3_CACHE", str(lpips_weights))
        trainer = make_vision_run(data, folder, vision_config).run()
    assert trainer.is_complete and trainer.step == 6
    return folder


def test_from_pictures_to_a_model_that_draws(data, vision_run, vision_config, transformer_config, tmp_path):
    tokenizers, model = tmp_path / "tokenizers", tmp_path / "model"
    export_tokenizers(vision_run, None, data / "text.tiktoken", tokenizers)
    vision, form = load_tokenizers(tokenizers)
    assert vision.config == vision_config and form.vocabulary == read_vocabulary(tokenizers)
    # What is exported is the average, rounded to bf16: the codes of the documents are those that a user's copy gives.
    average = take_prefix("average", load_checkpoint(list_checkpoints(vision_run / "checkpoints")[-1])[0])
    for name, tensor in vision.state_dict().items():
        expected = average[name].bfloat16().float() if tensor.is_floating_point() else average[name]
        assert tensor.equal(expected), name

    fingerprint = compute_fingerprint(tokenizers)
    documents = encode_samples(read_samples(data / "samples.parquet"), vision, form, EncodeConfig(clip_frames=8))
    write_documents(tmp_path / "documents.parquet", documents, fingerprint)
    drawer = build_sheet_drawer(tokenizers, ["a red disc", "a blue cross", "a black disc"], DEFAULTS, 32 * 32)
    run = make_language_run(tokenizers, tmp_path / "documents.parquet", tmp_path / "language", transformer_config)
    trainer = run.run(drawer)
    assert trainer.is_complete
    sheet = read_image(tmp_path / "language" / "samples" / "step-00000004.png")
    assert sheet.shape == (3, 1, 64, 64) and (sheet[:, :, 32:, 32:] == 1).all()  # three pictures in two rows of two

    export_model(tmp_path / "language", None, tokenizers, model, 32 * 32, dataclasses.asdict(DEFAULTS))
    assert sorted(path.name for path in model.iterdir()) == [
        "config.json",
        "model.safetensors",
        "text.tiktoken",
        "vision_tokenizer.safetensors",
    ]
    assert compute_fingerprint(model) == fingerprint
    emu3 = Emu3.load(model, dtype=torch.float32)
    assert emu3.defaults == DEFAULTS and emu3.image_area == 1024
    (picture,) = emu3.draw("a red disc", seed=3)
    assert picture.size == (32, 32) and isinstance(emu3.describe(picture, max_new_tokens=4), str)
    trained = trainer.learner.transformer.state_dict()
    for name, tensor in load_state(model, "transformer"):
        assert tensor.dtype == torch.bfloat16 and tensor.equal(trained[name].bfloat16()), name


def test_a_run_folder_says_what_was_trained(data, vision_run, vision_config):
    description = read_description(vision_run, "vision_tokenizer")
    assert VisionTokenizerConfig(**description["tokenizer"]) == vision_config
    assert description["samples"] == [str(data / "samples.parquet")] and description["learner"]["optimizer"]["learning_rate"] == 2e-3
    rows = [json.loads(line) for line in (vision_run / "metrics.jsonl").read_text().splitlines()]
    assert {"validation/image/psnr", "validation/video/psnr", "validation/video/codebook_perplexity"} <= rows[-1].keys()
    assert {path.name for path in (vision_run / "samples").iterdir()} == {"step-00000006-image.png", "step-00000006-video.png"}


def test_runs_of_one_seed_are_equal(data, vision_run, vision_config, tmp_path):
    torch.rand(5)
    make_vision_run(data, tmp_path / "again", vision_config).run()
    make_vision_run(data, tmp_path / "other", vision_config, seed=1).run()
    first, again, other = (
        load_checkpoint(list_checkpoints(run / "checkpoints")[-1])[0] for run in (vision_run, tmp_path / "again", tmp_path / "other")
    )
    assert all(tensor.equal(again[name]) for name, tensor in first.items())
    assert not first["tokenizer/encoder.conv_in.weight"].equal(other["tokenizer/encoder.conv_in.weight"])


def test_a_run_may_begin_where_another_ended_with_more_codes(data, vision_run, vision_config, tmp_path):
    larger = dataclasses.replace(vision_config, codebook_size=128)
    learner = make_vision_run(data, tmp_path, vision_config, tokenizer=larger, init_from=vision_run).build_learner()
    average = take_prefix("average", load_checkpoint(list_checkpoints(vision_run / "checkpoints")[-1])[0])
    found = learner.tokenizer.state_dict()
    assert found["quantize.embedding.weight"][:64].equal(average.pop("quantize.embedding.weight"))
    assert len(found["quantize.embedding.weight"]) == 128 and all(found[name].equal(tensor) for name, tensor in average.items())
    wider = dataclasses.replace(vision_config, channels=16)
    with pytest.raises(InputError, match="no vision tokenizer of this configuration"):
        make_vision_run(data, tmp_path, vision_config, tokenizer=wider, init_from=vision_run).build_learner()
    with pytest.raises(InputError, match="holds no checkpoint"):
        make_vision_run(data, tmp_path, vision_config, init_from=tmp_path / "nowhere").build_learner()


def test_a_vision_run_without_what_it_needs(data, vision_config, tmp_path):
    with pytest.raises(InputError, match="no samples of split 'nothing' to validate on"):
        dataclasses.replace(make_vision_run(data, tmp_path, vision_config), validation_split="nothing").run()
    clips = [sample for sample in read_samples(data / "samples.parquet") if sample.kind == "video"]
    write_samples(tmp_path / "clips.parquet", clips)
    with pytest.raises(InputError, match="no image samples to train on"):
        dataclasses.replace(make_vision_run(data, tmp_path, vision_config), samples=(tmp_path / "clips.parquet",)).run()
    with pytest.raises(InputError, match="clip_frames is 6; it must be a multiple of 4"):
        dataclasses.replace(make_vision_run(data, tmp_path, vision_config), batches=PixelBatchesConfig(clip_frames=6))
    assert not (tmp_path / "checkpoints").exists()


def test_a_language_run_without_what_it_needs(data, transformer_config, tmp_path):
    def start(**changes):
        make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path / "run", transformer_config, **changes).run()

    with pytest.raises(InputError, match="vocab_size is 576; the tokenizers in .* need 575"):
        start(transformer=dataclasses.replace(transformer_config, vocab_size=576))
    nothing = LanguageLearnerConfig(role_weights=RoleWeights(0, 0, 0, 0))
    with pytest.raises(InputError, match="count no token of the documents"):
        start(learner=nothing)
    with pytest.raises(InputError, match="context_length is 512; the model's positions allow at most 256"):
        start(batches=LoaderConfig(512))
    write_documents(tmp_path / "other.parquet", [], "of another tokenizer")
    run = make_language_run(data / "tokenizers", tmp_path / "other.parquet", tmp_path / "run", transformer_config)
    with pytest.raises(InputError, match="was tokenised by 'of another tokenizer'"):
        run.run()
    assert not (tmp_path / "run").exists()


def read_weights(run):
    return load_newest(run, "transformer")


@pytest.mark.parametrize("changes", [{"rows_per_micro_batch": 1}, {"prefetch": 0}])
def test_micro_batches_and_prefetching_change_nothing(data, transformer_config, tmp_path, changes):
    calm = dataclasses.replace(transformer_config, dropout=0.0)

    def train(name, **batches):
        config = LoaderConfig(128, rows_per_batch=4, **{"rows_per_micro_batch": 4, **batches})
        make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path / name, calm, batches=config).run()
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return read_weights(tmp_path / name), [row["loss"] for row in rows if "loss" in row]

    (one, losses), (other, other_losses) = train("one"), train("other", **changes)
    assert losses == pytest.approx(other_losses, rel=1e-5) and len(losses) == 4
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5)


def test_a_run_that_could_not_measure_does_not_begin(data, transformer_config, tmp_path):
    """Measuring is what a run ends with; with no documents to measure on it ended in a traceback, and nothing was saved."""
    run = make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path, transformer_config)
    with pytest.raises(InputError, match="max_validation is 0; it must be at least 1"):
        dataclasses.replace(run, max_validation=0)


def test_a_run_says_how_it_does(data, transformer_config, tmp_path, capsys):
    make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path, transformer_config).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = {"loss", "loss_vision", "image/loss_vision", "video/loss_vision", "image/loss_text_target", "grad_norm", "learning_rate"}
    wanted |= {"tokens", "tokens_per_second", "fill_rate", "mfu", "memory_gb", "data_wait", "position"}
    assert wanted <= {name for row in rows for name in row}
    assert rows[0]["mfu"] > 0 and 0.5 < rows[0]["fill_rate"] <= 1
    assert "documents in" in capsys.readouterr().err  # how full the rows are


def test_a_second_stage_goes_on_from_the_first_ones_weights(data, transformer_config, tmp_path):
    """From its run folder and from the model folder made of it, in bf16: the same to rounding, and measured before the first step."""

    def train(folder, **changes):
        run = make_language_run(data / "tokenizers", data / "documents.parquet", folder, transformer_config, **changes)
        run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, validate_first=True))
        run.run()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row["validation/loss"] for row in rows if "validation/loss" in row]

    before, after = train(tmp_path / "first")
    assert after < before
    export_model(tmp_path / "first", None, data / "tokenizers", tmp_path / "model", 1024)
    assert train(tmp_path / "second", init_from=tmp_path / "first")[0] == pytest.approx(after, rel=1e-6)
    assert train(tmp_path / "third", init_from=tmp_path / "model")[0] == pytest.approx(after, rel=1e-2)
    assert read_description(tmp_path / "second", "language")["init_from"] == str(tmp_path / "first")

    deeper = dataclasses.replace(transformer_config, num_layers=3)
    with pytest.raises(InputError, match="weights differ from the model in 9 names"):
        train(tmp_path / "fourth", init_from=tmp_path / "first", transformer=deeper)
    with pytest.raises(InputError, match="holds no checkpoint|does not exist"):
        train(tmp_path / "fourth", init_from=tmp_path / "nowhere")


def test_weights_of_other_tokenizers_are_refused(data, transformer_config, tmp_path):
    make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path / "run", transformer_config).run()
    export_model(tmp_path / "run", None, data / "tokenizers", tmp_path / "model", 1024)
    for folder in ("run", "model"):
        assert open_weights(tmp_path / folder, compute_fingerprint(data / "tokenizers"))
        with pytest.raises(InputError, match="other tokenizers; documents and first weights must belong together"):
            open_weights(tmp_path / folder, "of others")


def test_other_documents_are_noticed_when_a_run_goes_on(data, transformer_config, tmp_path):
    run = make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path, transformer_config)
    run.run()
    longer = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, num_steps=6))
    with pytest.raises(InputError, match="go on with the same documents, mixture, context length and seed"):
        dataclasses.replace(longer, batches=LoaderConfig(128, rows_per_batch=2, seed=1)).run()
    assert longer.run().step == 6


# ---- exporting what does not fit


def test_exports_refuse_what_does_not_fit(data, vision_run, vision_config, transformer_config, tmp_path):
    ranks, tokenizers = data / "text.tiktoken", data / "tokenizers"
    with pytest.raises(InputError, match="holds no checkpoint"):
        export_tokenizers(tmp_path, vision_config, ranks, tmp_path / "out")
    with pytest.raises(InputError, match="run.json cannot be read"):
        export_tokenizers(data / "run", None, ranks, tmp_path / "out")
    with pytest.raises(InputError, match="is a run of kind 'vision_tokenizer'; one of kind 'language' is needed"):
        export_model(vision_run, None, tokenizers, tmp_path / "out", 1024)
    wider = dataclasses.replace(vision_config, channels=16)
    with pytest.raises(InputError, match="holds no VisionTokenizer of this configuration"):
        export_tokenizers(vision_run, wider, ranks, tmp_path / "out")
    with pytest.raises(InputError, match="holds no Transformer of this configuration"):
        export_model(vision_run, transformer_config, tokenizers, tmp_path / "out", 1024)
    with pytest.raises(InputError, match="vocabulary of 576; the tokenizers in .* have 575"):
        export_model(vision_run, dataclasses.replace(transformer_config, vocab_size=576), tokenizers, tmp_path / "out", 1024)
    with pytest.raises(InputError):
        export_tokenizers(vision_run, None, data / "samples.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_keeps_the_tokenizers_it_was_trained_on(data, vision_run, transformer_config, tmp_path):
    run = make_language_run(data / "tokenizers", data / "documents.parquet", tmp_path / "language", transformer_config)
    run.run()
    export_tokenizers(vision_run, None, data / "text.tiktoken", tmp_path / "tokenizers")
    with pytest.raises(InputError, match="was trained on documents of other tokenizers"):
        export_model(tmp_path / "language", None, tmp_path / "tokenizers", tmp_path / "out", 1024)
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_is_of_what_makes_codes(data, vision_run, vision_config, tmp_path):
    """A decoder that was trained on leaves it alone; another codebook or vocabulary does not."""
    first = compute_fingerprint(data / "tokenizers")
    for name, changes in (("decoder.conv_in.weight", False), ("encoder.conv_in.weight", True), ("quantize.embedding.weight", True)):
        folder = tmp_path / name
        vision, _ = load_tokenizers(data / "tokenizers")
        with torch.no_grad():
            vision.get_parameter(name).mul_(-1)
        run = tmp_path / f"run-{name}"
        save_checkpoint(run / "checkpoints", 1, add_prefix("average", vision.state_dict()), {})
        export_tokenizers(run, vision_config, data / "text.tiktoken", folder)
        assert (compute_fingerprint(folder) != first) == changes
        assert read_config(folder).num_codes == 64
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="text.tiktoken cannot be read"):
        compute_fingerprint(tmp_path / "empty")
    ranks = (data / "text.tiktoken").read_bytes().splitlines(keepends=True)
    (folder / "text.tiktoken").write_bytes(b"".join(ranks[:-1]))
    assert compute_fingerprint(folder) != first
