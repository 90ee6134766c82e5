"""The vision tokenizer's losses, each worked by hand, and the discriminator's shape."""

import math

import pytest
import torch
from torch import nn

from openemu3.tokenization.vision_losses import (
    PatchDiscriminator,
    compute_adaptive_weight,
    compute_adversarial_loss,
    compute_codebook_statistics,
    compute_hinge_loss,
    compute_quantizer_losses,
    pass_straight_through,
)


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    # real: 0, 0.5, 2; fake: 0, 1
    assert compute_hinge_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 0.5))


def test_hinge_loss_pushes_real_up_and_fake_down_up_to_the_margin():
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
    compute_hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25] and fake.grad.tolist() == [0.0, 0.25]


def test_adversarial_loss_pulls_fake_scores_up():
    scores = torch.tensor([3.0, -1.0], requires_grad=True)
    loss = compute_adversarial_loss(scores)
    loss.backward()
    assert loss.item() == -1 and scores.grad.tolist() == [-0.5, -0.5]


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    reconstruction = (weight * torch.tensor([3.0, 4.0])).sum()  # gradient of length 5
    adversarial = (weight * torch.tensor([0.0, 2.0])).sum()  # of length 2
    found = compute_adaptive_weight(reconstruction, adversarial, weight)
    assert found.item() == pytest.approx(5 / (2 + 1e-4)) and not found.requires_grad
    assert weight.grad is None  # nothing is left behind, and the graph can still be used
    (reconstruction + adversarial).backward()
    assert weight.grad.tolist() == [3.0, 6.0]


def test_adaptive_weight_is_bounded():
    weight = nn.Parameter(torch.tensor([1.0]))
    assert compute_adaptive_weight(5 * weight.sum(), 0 * weight.sum(), weight).item() == 1e4  # 5 / 1e-4, cut off


def test_quantizer_losses_pull_each_at_its_own_side():
    latents = torch.tensor([1.0, 2.0], requires_grad=True)
    quantized = torch.tensor([2.0, 0.0], requires_grad=True)
    codebook, commitment = compute_quantizer_losses(latents, quantized)
    assert codebook.item() == commitment.item() == pytest.approx((1 + 4) / 2)
    codebook.backward(retain_graph=True)
    assert quantized.grad.tolist() == [1.0, -2.0] and latents.grad is None  # 2 (zq - z) / 2
    quantized.grad = None
    commitment.backward()
    assert latents.grad.tolist() == [-1.0, 2.0] and quantized.grad is None


def test_straight_through():
    latents = torch.tensor([0.4, 1.2], requires_grad=True)
    quantized = torch.tensor([0.0, 1.0], requires_grad=True)
    passed = pass_straight_through(latents, quantized)
    torch.testing.assert_close(passed, quantized.detach(), rtol=0, atol=1e-6)
    (passed * torch.tensor([3.0, -2.0])).sum().backward()
    assert latents.grad.tolist() == [3.0, -2.0] and quantized.grad is None


def test_codebook_statistics():
    # Four of eight codes, of shares 1/2, 1/4, 1/8, 1/8: entropy 1.75 bits.
    found = compute_codebook_statistics(torch.tensor([4, 2, 1, 1, 0, 0, 0, 0]))
    assert found == {"usage": 0.5, "perplexity": pytest.approx(2**1.75)}
    assert compute_codebook_statistics(torch.tensor([5, 5, 5])) == {"usage": 1.0, "perplexity": pytest.approx(3)}
    assert compute_codebook_statistics(torch.tensor([0, 0])) == {"usage": 0.0, "perplexity": 0.0}


@pytest.mark.parametrize(("side", "scores"), [(32, 6), (64, 14)])
def test_discriminator_scores_overlapping_patches(side, scores):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8)
    pixels = torch.randn(2, 3, side, side, requires_grad=True)
    found = discriminator(pixels)
    assert found.shape == (2, 1, scores, scores)
    # 4 4 stride 2, one 4 stride 1, one 4 stride 1: 34 pixels see the middle score, but GroupNorm's statistics see them all
    found[0, 0, 0, 0].backward()
    assert pixels.grad[0].any() and not pixels.grad[1].any()


def test_discriminator_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    rows = torch.arange(32) % 2 * 2.0 - 1
    stripes = rows.view(1, 1, 1, 32).expand(4, 3, 32, 32) + 0.1 * torch.randn(4, 3, 32, 32)
    losses = []
    for _ in range(20):
        loss = compute_hinge_loss(discriminator(stripes), discriminator(stripes.transpose(2, 3)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.3) and losses[-1] < 0.2 and math.isfinite(losses[-1])
