"""The vision learner with every term on, its codebook's upkeep by hand, and what must not move: statistics, averages, frozen codes."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from openemu3.data.clips import PixelBatch, PixelBatches, PixelBatchesConfig
from openemu3.data.samples import read_samples
from openemu3.media import read_image
from openemu3.records import InputError
from openemu3.tokenization.vision import VisionTokenizer
from openemu3.training.optimizer import OptimizerConfig
from openemu3.training.stages import init_vision_tokenizer
from openemu3.training.vision_learner import VisionLearner, VisionLearnerConfig, extend_codebook, fold_frames, reconstruct

OPTIMIZER = OptimizerConfig(4e-3, 1000, 0, schedule="constant", weight_decay=0.0, betas=(0.5, 0.9))
CONFIG = VisionLearnerConfig(
    OPTIMIZER,
    OPTIMIZER,
    lpips_net="alex",
    adversarial_start=1000,
    continuous_steps=0,
    restart_every=0,
    ema_decay=0.9,
    discriminator_channels=8,
)


@pytest.fixture(scope="module")
def batches(data):
    samples = list(read_samples(data / "samples.parquet", splits={"train"}))
    return PixelBatches(samples, PixelBatchesConfig(images_per_batch=4, clips_per_batch=1, clip_frames=8, video_every=3, max_shift=2))


def make_learner(vision_config, batches=None, **changes):
    tokenizer = VisionTokenizer(vision_config)
    init_vision_tokenizer(tokenizer, 1)
    validation = [] if batches is None else [batches.build(1), batches.build(2)]
    return VisionLearner(tokenizer, dataclasses.replace(CONFIG, **changes), lambda: iter(validation))


def copy_tensors(learner):
    return {name: tensor.clone() for name, tensor in learner.list_tensors().items()}


def find_differing(before, learner):
    after = learner.list_tensors()
    return {name for name in before.keys() | after.keys() if name not in before or not after[name].equal(before[name])}


# ---- learning


def test_it_learns_with_everything_on(vision_config, batches):
    """L2, LPIPS, both quantizer terms, the adversary from step 15, filling and restarts of the codebook, stills and clips."""
    learner = make_learner(vision_config, batches, continuous_steps=5, restart_every=10, adversarial_start=15)
    first = learner.validate()
    rows = [learner.learn(step, [batches.build(step)]) for step in range(45)]
    last = learner.validate()
    for kind in ("image", "video"):
        assert last[f"{kind}/l2"] < 0.5 * first[f"{kind}/l2"]
        assert last[f"{kind}/lpips"] < first[f"{kind}/lpips"]
        assert last[f"{kind}/codebook_usage"] > 2 / 64 and last[f"{kind}/codebook_perplexity"] > 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [step for step, row in enumerate(rows) if "discriminator" in row] == list(range(15, 45))
    assert [step for step, row in enumerate(rows) if "restarted_codes" in row] == [9, 19, 29, 39]
    assert rows[4]["image/commitment"] == 0 < rows[6]["image/commitment"]  # no quantizer in the first five steps
    assert rows[20].keys() == {
        *(f"{kind}/{name}" for kind in ("image", "video") for name in ("l2", "lpips", "commitment", "adversarial", "adaptive_weight")),
        *("discriminator", "grad_norm"),
    }
    assert min(row["discriminator"] for row in rows[15:]) < 0.95 * rows[15]["discriminator"]


def test_stills_and_clips_are_measured_apart(vision_config, batches):
    learner = make_learner(vision_config)
    still, clip = batches.build(0), batches.build(2)
    assert (still.kind, clip.kind) == ("image", "video")
    row = learner.learn(0, [still])
    assert not [name for name in row if name.startswith("video/")]
    assert learner.counts["image"].sum() == 4 * 4 * 4 and learner.counts["video"].sum() == 0
    other = learner.learn(1, [clip])
    assert learner.counts["image"].sum() == 4 * 4 * 4 and learner.counts["video"].sum() == 2 * 4 * 4
    assert other["image/l2"] == row["image/l2"] and "video/l2" in other  # each kind shows its newest


def test_losses_are_what_they_are_called(vision_config, batches):
    learner = make_learner(vision_config, reconstruction_weight=2.0, lpips_weight=0.5, codebook_weight=3.0, commitment_weight=0.25)
    batch = batches.build(0)
    tokenizer = learner.tokenizer
    with torch.no_grad():
        latents = tokenizer.encode_latents(batch.pixels)
        codes = tokenizer.quantize.nearest(latents)
        again = tokenizer.decode_image(codes[:, 0])
        squared = (again - batch.pixels[:, :, 0]).square().mean()
        perceptual = learner.lpips(again, batch.pixels[:, :, 0]).mean()
        distance = (latents - tokenizer.quantize.lookup(codes)).square().mean()
    loss, losses, _ = learner._compute_generator_loss("image", batch.pixels, 0, adversarial=False)
    expected = {"l2": squared.item(), "lpips": perceptual.item(), "commitment": distance.item()}
    assert losses == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert loss.item() == pytest.approx(2 * squared.item() + 0.5 * perceptual.item() + 3.25 * distance.item(), rel=1e-4)


def test_the_adversary_counts_by_its_weight_times_the_adaptive_one(vision_config, batches):
    learner = make_learner(vision_config, adversarial_weight=0.3)
    pixels = batches.build(0).pixels
    without, _, _ = learner._compute_generator_loss("image", pixels, 0, adversarial=False)
    loss, losses, fake = learner._compute_generator_loss("image", pixels, 0, adversarial=True)
    assert losses["adversarial"] == pytest.approx(-learner.discriminator(fake).mean().item(), rel=1e-4)
    assert losses["adaptive_weight"] > 0
    added = 0.3 * losses["adaptive_weight"] * losses["adversarial"]
    assert abs(added) > 1e-3 and (loss - without).item() == pytest.approx(added, rel=1e-2)
    loss.backward()
    assert learner.tokenizer.decoder.conv_out.weight.grad.any()


def test_every_part_gets_a_gradient(vision_config, batches):
    learner = make_learner(vision_config)
    before = copy_tensors(learner)
    for step in (0, 2):
        learner.learn(step, [batches.build(step)])
    changed = find_differing(before, learner)
    still = {name.removeprefix("tokenizer/") for name, _ in before.items() if name.startswith("tokenizer/")} - {
        name.removeprefix("tokenizer/") for name in changed
    }
    # What stays: BatchNorm's statistics, and convolution biases whose effect the norm right after them takes away.
    assert {name for name in still if "running" not in name and "num_batches" not in name} == set()


def test_statistics_of_batch_norm_stay_and_training_computes_what_is_run_later(vision_config, batches):
    learner = make_learner(vision_config)
    for step in range(3):
        learner.learn(step, [batches.build(step)])
    for module in (learner.tokenizer, learner.average):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]
        assert len(norms) == 8 and not any(m.training for m in module.modules())
        assert all(not m.running_mean.any() and m.running_var.eq(1).all() and not m.num_batches_tracked for m in norms)
    pixels = batches.build(0).pixels
    _, losses, fake = learner._compute_generator_loss("image", pixels, 9, adversarial=False)
    torch.testing.assert_close(fake.detach(), reconstruct(learner.tokenizer, pixels)[1][:, :, 0], rtol=1e-4, atol=1e-5)
    assert losses["l2"] == pytest.approx((reconstruct(learner.tokenizer, pixels)[1] - pixels).square().mean().item(), rel=1e-4)


def test_the_average_follows_by_its_decay(vision_config, batches):
    learner = make_learner(vision_config)
    before = learner.average.decoder.conv_out.weight.clone()
    learner.learn(0, [batches.build(0)])
    current = learner.tokenizer.decoder.conv_out.weight
    torch.testing.assert_close(learner.average.decoder.conv_out.weight, 0.9 * before + 0.1 * current.detach())


def test_micro_batches_count_alike(vision_config, batches):
    """Two micro-batches of two stills are one batch of four: terms are means, and so is the step."""
    whole, halves = (make_learner(vision_config) for _ in range(2))
    batch = batches.build(0)
    one = whole.learn(0, [batch])
    halves.learn(0, [PixelBatch("image", part) for part in batch.pixels.split(2)])
    for a, b in zip(whole.tokenizer.parameters(), halves.tokenizer.parameters(), strict=True):
        first, second = (learner.optimizer.state[p]["exp_avg"] for learner, p in ((whole, a), (halves, b)))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)
    assert one["grad_norm"] > 0


def test_the_discriminator_starts_the_same_whatever_was_drawn_before(vision_config):
    torch.manual_seed(5)
    first = make_learner(vision_config).discriminator.state_dict()
    state = torch.get_rng_state()
    second = make_learner(vision_config).discriminator.state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    other = make_learner(vision_config, seed=1).discriminator.state_dict()
    assert not first["layers.0.weight"].equal(other["layers.0.weight"])
    assert len(state) == len(torch.get_rng_state())


def test_state_comes_back(vision_config, batches):
    first, second = make_learner(vision_config, adversarial_start=0), make_learner(vision_config, adversarial_start=0, seed=1)
    for step in (0, 2):
        first.learn(step, [batches.build(step)])
    tensors, state = copy_tensors(first), first.list_state()
    assert {name.split("/")[0] for name in tensors} == {
        *("tokenizer", "average", "discriminator", "counts", "optimizer", "discriminator_optimizer")
    }  # fmt: skip
    second.load(tensors, state)
    assert find_differing(tensors, second) == set() and second.list_state() == state
    assert first.learn(3, [batches.build(3)]) == second.learn(3, [batches.build(3)])
    assert find_differing(copy_tensors(first), second) == set()


# ---- steps that are skipped


def test_a_step_that_is_not_finite_changes_no_weights_and_is_not_blamed_on_the_next(vision_config, batches):
    learner = make_learner(vision_config, adversarial_start=0, restart_every=2)
    learner.learn(0, [batches.build(0)])
    clip = batches.build(2)
    bad = PixelBatch("video", clip.pixels.clone())
    bad.pixels[0, 0, 0, 0, 0] = math.nan
    before = copy_tensors(learner)
    row = learner.learn(1, [bad])  # restarts are due at this step
    assert math.isnan(row["video/l2"]) and not math.isfinite(row["grad_norm"]) and "restarted_codes" not in row
    assert {name for name in find_differing(before, learner) if not name.startswith("counts/")} == set()
    row = learner.learn(2, [batches.build(0)])
    assert all(math.isfinite(value) for value in row.values())
    assert all(math.isfinite(value) for value in learner.learn(3, [clip]).values())


# ---- the codebook


def test_the_codebook_is_filled_with_latents(vision_config, batches):
    learner = make_learner(vision_config, continuous_steps=1)
    learner.learn(0, [batches.build(0)])
    before = learner.tokenizer.quantize.embedding.weight.detach().clone()
    batch = batches.build(1)
    latents = learner.tokenizer.encode_latents(batch.pixels).detach().movedim(1, -1).flatten(0, -2)
    learner._fill_codebook([batch])
    weight = learner.tokenizer.quantize.embedding.weight.detach()
    assert weight.equal(learner.average.quantize.embedding.weight) and not weight.equal(before)
    distances = torch.cdist(weight, latents).min(1).values
    assert distances.max() < 0.5 * latents.std(0).norm()  # each code lies at some latent, but for the jitter
    codes = learner.tokenizer.quantize.nearest(learner.tokenizer.encode_latents(batch.pixels))
    assert len(codes.unique()) > 20  # of 64


def test_only_dead_codes_move(vision_config, batches):
    learner = make_learner(vision_config)
    learner.learn(0, [batches.build(0)])
    weight = learner.tokenizer.quantize.embedding.weight
    moments = learner.optimizer.state[weight]
    moments["exp_avg"].fill_(1)
    moments["exp_avg_sq"].fill_(2)
    learner.counts = {"image": torch.ones(64, dtype=torch.int64), "video": torch.ones(64, dtype=torch.int64)}
    dead = torch.tensor([3, 5, 40])
    for kind in learner.counts:
        learner.counts[kind][dead] = 0
    learner.counts["video"][7] = 0  # alive, for stills still choose it
    learner.counts["image"][9] = 0  # and this one for clips
    before = weight.detach().clone()
    assert learner._restart_dead_codes([batches.build(1)]) == 3
    moved = (weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == dead.tolist()
    assert learner.average.quantize.embedding.weight[dead].equal(weight[dead])
    assert not moments["exp_avg"][dead].any() and moments["exp_avg"].sum() == 61 * 4 and moments["exp_avg_sq"].sum() == 2 * 61 * 4
    assert not learner.counts["image"].any() and not learner.counts["video"].any()
    assert learner._restart_dead_codes([batches.build(1)]) == 64  # nothing was counted since
    latents = learner.tokenizer.encode_latents(batches.build(1).pixels).detach().movedim(1, -1).flatten(0, -2)
    assert torch.cdist(weight, latents).min(1).values.max() < 0.5 * latents.std(0).norm()


def test_a_restart_before_the_codebooks_first_update(vision_config, batches):
    learner = make_learner(vision_config)
    assert learner._restart_dead_codes([batches.build(0)]) == 64


def test_extending_keeps_the_first_half(vision_config, batches):
    small = make_learner(vision_config).tokenizer
    large = extend_codebook(small, 128)
    assert large.config == dataclasses.replace(vision_config, codebook_size=128)
    weight, old = large.quantize.embedding.weight, small.quantize.embedding.weight
    assert weight.shape == (128, 4) and weight[:64].equal(old)
    others = {name: tensor for name, tensor in small.state_dict().items() if name != "quantize.embedding.weight"}
    assert all(large.state_dict()[name].equal(tensor) for name, tensor in others.items())
    # Pictures that the old one encoded look the same.
    codes = small.encode_image(batches.build(0).pixels[:, :, 0])
    assert small.decode_image(codes).equal(large.decode_image(codes))
    # The new codes lie near old ones, none on one.
    distances = torch.cdist(weight[64:], old).min(1).values
    assert 0 < distances.min() and distances.max() < old.std(0).norm()
    assert weight.equal(extend_codebook(small, 128).quantize.embedding.weight)
    assert not weight.equal(extend_codebook(small, 128, seed=1).quantize.embedding.weight)
    assert extend_codebook(small, 64).quantize.embedding.weight.equal(old)
    with pytest.raises(InputError, match="codebook_size is 63"):
        extend_codebook(small, 63)


def test_frozen_codes_stay_while_the_decoder_learns(vision_config, batches):
    learner = make_learner(vision_config, freeze_codes=True, restart_every=2, continuous_steps=2, autocast_bf16=True)
    before = copy_tensors(learner)
    still = batches.build(0).pixels[:, :, 0]
    codes = learner.tokenizer.encode_image(still)
    for step in range(6):
        learner.learn(step, [batches.build(step)])
    changed = {name.split(".")[0] for name in find_differing(before, learner) if name.startswith(("tokenizer/", "average/"))}
    assert changed == {f"{whose}/{part}" for whose in ("tokenizer", "average") for part in ("decoder", "post_quant_conv")}
    assert learner.tokenizer.encode_image(still).equal(codes) and learner.average.encode_image(still).equal(codes)


# ---- measuring and looking


def test_validation_measures_the_average(vision_config, batches):
    learner = make_learner(vision_config, batches)
    with torch.no_grad():
        for parameter in learner.tokenizer.parameters():
            parameter.zero_()
    found = learner.validate()
    still = batches.build(1).pixels
    codes, again = reconstruct(learner.average, still)
    errors = [(a.clamp(-1, 1) - b).square().mean().item() for a, b in zip(again, still, strict=True)]
    assert found["image/l2"] == pytest.approx(sum(errors) / 4, rel=1e-5)
    # Peak to peak 2: PSNR = 10 log10(4 / error), averaged over pictures.
    assert found["image/psnr"] == pytest.approx(sum(10 * math.log10(4 / error) for error in errors) / 4, rel=1e-5)
    assert found["image/codebook_usage"] == len(codes.unique()) / 64
    clip = batches.build(2).pixels
    _, again = reconstruct(learner.average, clip)
    real, fake = fold_frames(clip), fold_frames(again).clamp(-1, 1)
    assert found["video/lpips"] == pytest.approx(learner.lpips(fake, real).mean().item(), rel=1e-4)
    assert learner.counts["image"].sum() == 0  # measuring doesn't count as use


def test_samples_show_originals_above_reconstructions(vision_config, batches, tmp_path):
    learner = make_learner(vision_config, batches)
    learner.write_samples(tmp_path / "samples", 12)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["step-00000012-image.png", "step-00000012-video.png"]
    sheet = read_image(tmp_path / "samples" / "step-00000012-image.png")
    assert sheet.shape == (3, 1, 64, 4 * 32)
    still = batches.build(1).pixels
    torch.testing.assert_close(sheet[:, :, :32, :32], still[0], rtol=0, atol=0.005)
    again = reconstruct(learner.average, still)[1].clamp(-1, 1)
    torch.testing.assert_close(sheet[:, :, 32:, 32:64], again[1], rtol=0, atol=0.005)
    assert read_image(tmp_path / "samples" / "step-00000012-video.png").shape == (3, 1, 64, 8 * 32)


# ---- first weights


def test_first_weights_depend_on_the_seed_alone(vision_config):
    first, second, other = (VisionTokenizer(vision_config) for _ in range(3))
    for tokenizer, seed in ((first, 1), (second, 1), (other, 2)):
        torch.rand(7)
        init_vision_tokenizer(tokenizer, seed)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not first.quantize.embedding.weight.equal(other.quantize.embedding.weight)
    assert not first.encoder.conv_in.weight.equal(other.encoder.conv_in.weight)


def test_temporal_layers_start_by_handing_on_what_they_get(vision_config, batches):
    """Latents are not shrunk by the temporal layers; in a clip of equal frames they are equal once its beginning is out of sight."""
    tokenizer = VisionTokenizer(vision_config)
    init_vision_tokenizer(tokenizer, 0)
    still = batches.build(0).pixels
    with torch.no_grad():
        latents = tokenizer.encode_latents(still)
        plain = tokenizer.encoder.encode_frames(still[:, :, 0])
        clip = tokenizer.encode_latents(still.expand(-1, -1, 12, -1, -1))
    assert 0.5 < latents.std() / plain.std() < 1.5
    correlation = torch.corrcoef(torch.stack([latents[:, :, 0].flatten(), plain.flatten()]))[0, 1]
    assert correlation > 0.9
    torch.testing.assert_close(clip[:, :, -1], clip[:, :, -2])


def test_a_tokenizer_is_trained_in_place_and_copied_for_the_average(vision_config):
    tokenizer = VisionTokenizer(vision_config)
    learner = VisionLearner(tokenizer, CONFIG, lambda: iter(()))
    assert learner.tokenizer is tokenizer and learner.average is not tokenizer
    assert not any(p.requires_grad for p in learner.average.parameters()) and all(p.requires_grad for p in tokenizer.parameters())
