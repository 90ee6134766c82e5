"""What the vision tokenizer is trained to minimise: L2, LPIPS, an adversary and the quantizer's two terms.

In: pixels and reconstructions, float [N, 3, H, W] in [-1, 1] (frames of clips folded into N); latents [B, Z, t, h, w].
Out: scalars. Emu3 names the terms (paper, section 2.2) but no weights; the defaults here and their sources stand in
training/vision_learner.py. The adversary is the PatchGAN of pix2pix (arXiv 1611.07004), the losses those of VQGAN (arXiv 2012.09841).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One realness score per patch: [N, 3, H, W] in [-1, 1] -> [N, 1, h, w], higher is more real.

    GroupNorm instead of pix2pix's BatchNorm: real and reconstructed batches are scored apart, and batch statistics would tell
    the two apart by themselves.
    """

    def __init__(self, channels: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, num_layers + 1):
            previous, width = width, channels * min(2**level, 8)
            stride = 2 if level < num_layers else 1
            layers += [nn.Conv2d(previous, width, 4, stride, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def compute_hinge_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The discriminator's loss: 0.5 (mean max(0, 1 - real) + mean max(0, 1 + fake))."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def compute_adversarial_loss(fake_scores: Tensor) -> Tensor:
    """The tokenizer's loss against the discriminator: -mean fake."""
    return -fake_scores.mean()


def compute_adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, maximum: float = 1e4) -> Tensor:
    """How much to weigh the adversary so that both gradients at the decoder's last layer are of one size (VQGAN, eq. 7)."""
    reconstruction_grad = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    adversarial_grad = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0]
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0, maximum).detach()


def compute_quantizer_losses(latents: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """(codebook term, commitment term): mean (sg[z] - zq)² pulls codes to latents, mean (z - sg[zq])² latents to codes."""
    return (latents.detach() - quantized).square().mean(), (latents - quantized.detach()).square().mean()


def pass_straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The quantized values with the gradient of the continuous ones (arXiv 1711.00937)."""
    return latents + (quantized - latents).detach()


def compute_codebook_statistics(counts: Tensor) -> dict[str, float]:
    """Usage (share of codes seen at all) and perplexity (exp of the entropy, in codes) of code counts [num_codes]."""
    total = counts.sum()
    if not total:
        return {"usage": 0.0, "perplexity": 0.0}
    shares = counts.double() / total
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
    return {"usage": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}
