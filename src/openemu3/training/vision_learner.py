"""How the vision tokenizer learns: one generator step and, once the adversary is on, one discriminator step.

In: PixelBatch (stills or clips). Out: trained VisionTokenizer weights and their moving average, which is what gets exported.
Nobody has published how Emu3's tokenizer was trained, only its terms: L2, LPIPS, GAN and commitment (paper, section 2.2). The weights
start from SBER-MoVQGAN's recipe, whose network this is. What surprises: the temporal BatchNorm layers keep their initial
statistics (mean 0, variance 1) while training, so that what is trained is exactly what is run later.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from openemu3.data.clips import PixelBatch
from openemu3.media import write_image
from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS
from openemu3.tokenization.vision import VisionTokenizer
from openemu3.tokenization.vision_losses import (
    PatchDiscriminator,
    compute_adaptive_weight,
    compute_adversarial_loss,
    compute_codebook_statistics,
    compute_hinge_loss,
    compute_quantizer_losses,
    pass_straight_through,
)
from openemu3.training.checkpoint import (
    State,
    add_prefix,
    list_optimizer_tensors,
    load_optimizer_tensors,
    name_parameters,
    take_prefix,
)
from openemu3.training.optimizer import OptimizerConfig, apply_update, build_optimizer
from openemu3.training.trainer import Metrics


@dataclass(frozen=True)
class VisionLearnerConfig:
    """Weights of the terms and when each starts. Sources: [S] SBER-MoVQGAN's recipe, [V] VQGAN's, [O] our own choice."""

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(1e-4, betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1.0)
    )  # [S]
    discriminator_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(1e-4, betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1.0)
    )
    reconstruction_weight: float = 1.0  # L2 on [-1, 1] [S]
    lpips_weight: float = 0.1  # [S]
    lpips_net: Literal["vgg", "alex"] = "vgg"
    adversarial_weight: float = 0.1  # times the adaptive weight [S, V]
    adversarial_start: int = 10_000  # step from which the adversary counts [O]; SBER starts at once, from a trained network
    codebook_weight: float = 1.0  # [V]
    commitment_weight: float = 0.25  # [V]
    continuous_steps: int = 0  # first steps with no quantizer; then the codebook is filled with real latents [O]
    restart_every: int = 200  # steps between restarts of codes that no latent chose; 0: never [O]
    restart_until: int = 1_000_000
    ema_decay: float = 0.999  # [S] 0.9999 over 1.3 million steps
    discriminator_channels: int = 64
    seed: int = 0  # of the discriminator's first weights
    autocast_bf16: bool = False
    # Train the decoder alone: encoder and codebook stay as they are, so that documents already tokenised stay valid while the
    # pictures that come out of them get better.
    freeze_codes: bool = False


class VisionLearner:
    """Learner of a VisionTokenizer.

    Args:
        tokenizer: trained in place.
        validation: yields batches to measure on; called at every validation.
    """

    def __init__(self, tokenizer: VisionTokenizer, config: VisionLearnerConfig, validation: Callable[[], Iterator[PixelBatch]]) -> None:
        self.tokenizer, self.config, self.validation = tokenizer, config, validation
        if config.freeze_codes:
            for module in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize):
                module.requires_grad_(False)
        self.device = next(tokenizer.parameters()).device
        self.average = copy.deepcopy(tokenizer).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = PatchDiscriminator(config.discriminator_channels).to(self.device)
        self.lpips = LPIPS(config.lpips_net).to(self.device)
        self.optimizer = build_optimizer(config.optimizer, tokenizer)
        self.discriminator_optimizer = build_optimizer(config.discriminator_optimizer, self.discriminator)
        # How often each code was chosen since the last restart, apart for stills and clips: Emu3's own images use only the
        # first half of its codes, which one total would hide.
        self.counts = {kind: torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64) for kind in ("image", "video")}
        self.last_losses: dict[str, Metrics] = {"image": {}, "video": {}}

    # ---- one step

    def learn(self, step: int, batches: Sequence[PixelBatch]) -> Metrics:
        config = self.config
        if step == config.continuous_steps and step > 0 and not config.freeze_codes:
            self._fill_codebook(batches)
        adversarial = step >= config.adversarial_start
        metrics: Metrics = {}
        # Each kind's losses stay in the row until the next batch of it, so that a log of every tenth step shows both. What is not
        # finite shows in its own step alone: the steps after it are not to blame.
        shown = dict(self.last_losses)
        pairs: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            pixels = batch.pixels.to(self.device)
            loss, losses, reconstruction = self._compute_generator_loss(batch.kind, pixels, step, adversarial)
            (loss / len(batches)).backward()
            if adversarial:
                pairs.append((fold_frames(pixels), reconstruction.detach()))
            shown[batch.kind] = losses
            if all(math.isfinite(value) for value in losses.values()):
                self.last_losses[batch.kind] = losses
        self.discriminator.zero_grad(set_to_none=True)
        norm = apply_update(self.optimizer, config.optimizer, step)
        if pairs:
            metrics["discriminator"] = self._learn_discriminator(step, pairs)
        if torch.isfinite(norm):  # a skipped step changes no weights
            self._update_average()
            if self._is_restart_due(step):
                metrics["restarted_codes"] = self._restart_dead_codes(batches)
        for kind, losses in shown.items():
            metrics |= {f"{kind}/{name}": value for name, value in losses.items()}
        return metrics | {"grad_norm": float(norm)}

    def _compute_generator_loss(self, kind: str, pixels: Tensor, step: int, adversarial: bool) -> tuple[Tensor, Metrics, Tensor]:
        config = self.config
        # Frozen codes are encoded in fp32, as they are when documents are written: bf16 would give other ones.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast_bf16 and not config.freeze_codes):
            latents = self.tokenizer.encode_latents(pixels).float()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast_bf16):
            if step < config.continuous_steps:
                quantized, passed = latents.detach(), latents
            else:
                codes = self.tokenizer.quantize.nearest(latents)
                self.counts[kind] += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts[kind]))
                quantized = self.tokenizer.quantize.lookup(codes)
                passed = pass_straight_through(latents, quantized)
            decoded = self.tokenizer.decode_latents(passed, first_frame_only=pixels.shape[2] == 1)
            real, fake = fold_frames(pixels), fold_frames(decoded)  # [N, 3, H, W]
            perceptual = self.lpips(fake, real).float().mean()
        fake = fake.float()
        squared = (fake - real).square().mean()
        reconstruction_loss = config.reconstruction_weight * squared + config.lpips_weight * perceptual
        codebook, commitment = compute_quantizer_losses(latents, quantized)
        loss = reconstruction_loss + config.codebook_weight * codebook + config.commitment_weight * commitment
        losses = {"l2": squared.item(), "lpips": perceptual.item(), "commitment": commitment.item()}
        if adversarial:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast_bf16):
                adversarial_loss = compute_adversarial_loss(self.discriminator(fake).float())
            adaptive = compute_adaptive_weight(reconstruction_loss, adversarial_loss, self.tokenizer.decoder.conv_out.weight)
            loss = loss + config.adversarial_weight * adaptive * adversarial_loss
            losses |= {"adversarial": adversarial_loss.item(), "adaptive_weight": adaptive.item()}
        return loss, losses, fake

    def _learn_discriminator(self, step: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
        total = 0.0
        for real, fake in pairs:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast_bf16):
                loss = compute_hinge_loss(self.discriminator(real).float(), self.discriminator(fake).float()) / len(pairs)
            loss.backward()
            total += loss.item()
        apply_update(self.discriminator_optimizer, self.config.discriminator_optimizer, step)
        return total

    # ---- the codebook

    def _is_restart_due(self, step: int) -> bool:
        config = self.config
        if config.freeze_codes or not config.restart_every or (step + 1) % config.restart_every:
            return False
        return config.continuous_steps < step < config.restart_until

    @torch.no_grad()
    def _collect_latents(self, batches: Sequence[PixelBatch], at_least: int) -> Tensor:
        """[N, Z] latents of these batches, jittered copies added until there are `at_least`."""
        latents = torch.cat([self.tokenizer.encode_latents(b.pixels.to(self.device)).movedim(1, -1).flatten(0, -2) for b in batches])
        repeats = -(-at_least // len(latents))
        latents = latents.repeat(repeats, 1)
        return latents + 0.05 * latents.std(0) * torch.randn(latents.shape, generator=self._generator(len(latents)), device="cpu").to(
            self.device
        )

    @torch.no_grad()
    def _fill_codebook(self, batches: Sequence[PixelBatch]) -> None:
        """Begin with codes where the latents are; from its published initialisation (all codes near 0) few would ever be used."""
        weight = self.tokenizer.quantize.embedding.weight
        latents = self._collect_latents(batches, len(weight))
        weight.copy_(latents[torch.randperm(len(latents), generator=self._generator(1))[: len(weight)].to(self.device)])
        self.average.quantize.embedding.weight.copy_(weight)

    @torch.no_grad()
    def _restart_dead_codes(self, batches: Sequence[PixelBatch]) -> int:
        """Move codes that neither stills nor clips chose since the last restart onto latents of this batch."""
        counts = self.counts["image"] + self.counts["video"]
        dead = (counts == 0).nonzero().flatten().to(self.device)
        if len(dead):
            latents = self._collect_latents(batches, len(dead))
            chosen = torch.randperm(len(latents), generator=self._generator(2))[: len(dead)].to(self.device)
            for module in (self.tokenizer, self.average):
                module.quantize.embedding.weight[dead] = latents[chosen]
            state = self.optimizer.state.get(self.tokenizer.quantize.embedding.weight, {})  # none before its first update
            for key in state.keys() & {"exp_avg", "exp_avg_sq"}:
                state[key][dead] = 0
        for kind in self.counts:
            self.counts[kind].zero_()
        return len(dead)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = self.config.ema_decay
        for average, current in zip(self.average.parameters(), self.tokenizer.parameters(), strict=True):
            average.lerp_(current, 1 - decay)

    # ---- measuring and looking

    @torch.no_grad()
    def validate(self) -> Metrics:
        """L2, PSNR (dB, peak-to-peak 2) and LPIPS of the averaged weights, with codebook usage, for stills and clips apart."""
        sums: dict[str, list[float]] = {}
        counts: dict[str, Tensor] = {}
        for batch in self.validation():
            pixels = batch.pixels.to(self.device)
            codes, decoded = reconstruct(self.average, pixels)
            counts[batch.kind] = counts.get(batch.kind, 0) + torch.bincount(
                codes.flatten().cpu(), minlength=self.tokenizer.config.codebook_size
            )
            real, fake = fold_frames(pixels), fold_frames(decoded).clamp(-1, 1)
            total = sums.setdefault(batch.kind, [0.0, 0.0, 0.0, 0.0])
            errors = (real - fake).square().flatten(1).mean(1)
            values = (
                errors.sum(),
                (10 * torch.log10(4 / errors.clamp_min(1e-10))).sum(),
                self.lpips(fake, real).sum(),
                torch.tensor(len(real)),
            )
            for index, value in enumerate(values):
                total[index] += float(value)
        metrics: Metrics = {}
        for kind, (l2, psnr, lpips, number) in sums.items():
            metrics |= {f"{kind}/l2": l2 / number, f"{kind}/psnr": psnr / number, f"{kind}/lpips": lpips / number}
            metrics |= {f"{kind}/codebook_{name}": value for name, value in compute_codebook_statistics(counts[kind]).items()}
        return metrics

    def write_samples(self, folder: Path, step: int) -> None:
        """One PNG per kind: originals above, reconstructions below."""
        written: set[str] = set()
        for batch in self.validation():
            if batch.kind in written:
                continue
            written.add(batch.kind)
            pixels = batch.pixels[:16].to(self.device)
            rows = [fold_frames(p)[:16] for p in (pixels, reconstruct(self.average, pixels)[1].clamp(-1, 1))]
            sheet = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)  # [3, 2H, 16W]
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"step-{step:08d}-{batch.kind}.png", sheet.unsqueeze(1).cpu())

    # ---- state

    def list_tensors(self) -> dict[str, Tensor]:
        tensors = add_prefix("tokenizer", self.tokenizer.state_dict()) | add_prefix("average", self.average.state_dict())
        tensors |= add_prefix("discriminator", self.discriminator.state_dict()) | add_prefix("counts", self.counts)
        for name, module, optimizer in self._optimizers():
            tensors |= add_prefix(name, list_optimizer_tensors(optimizer, name_parameters(module)))
        return tensors

    def list_state(self) -> State:
        return {"last_losses": self.last_losses}

    def load(self, tensors: dict[str, Tensor], state: State) -> None:
        self.tokenizer.load_state_dict(take_prefix("tokenizer", tensors))
        self.average.load_state_dict(take_prefix("average", tensors))
        self.discriminator.load_state_dict(take_prefix("discriminator", tensors))
        self.counts = take_prefix("counts", tensors)
        for name, module, optimizer in self._optimizers():
            load_optimizer_tensors(optimizer, name_parameters(module), take_prefix(name, tensors))
        self.last_losses = state["last_losses"]

    def _optimizers(self) -> list[tuple[str, nn.Module, torch.optim.Optimizer]]:
        return [
            ("optimizer", self.tokenizer, self.optimizer),
            ("discriminator_optimizer", self.discriminator, self.discriminator_optimizer),
        ]


def fold_frames(pixels: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B*T, 3, H, W]."""
    return pixels.transpose(1, 2).flatten(0, 1)


def reconstruct(tokenizer: VisionTokenizer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, pixels again) of stills or clips [B, 3, T, H, W]."""
    if pixels.shape[2] == 1:
        codes = tokenizer.encode_image(pixels[:, :, 0])
        return codes, tokenizer.decode_image(codes).unsqueeze(2)
    codes = tokenizer.encode_video(pixels)
    return codes, tokenizer.decode_video(codes, pixels.shape[2])


@torch.no_grad()
def extend_codebook(tokenizer: VisionTokenizer, codebook_size: int, seed: int = 0) -> VisionTokenizer:
    """The same tokenizer with a larger codebook that keeps every existing code and its number.

    Emu3 grew SBER-MoVQGAN's 16,384 codes to 32,768 (facts 1.10; how is unpublished) and its images still use the first half. The new
    codes start as existing ones moved by a tenth of the codebook's spread: close enough to be chosen, free to drift.
    """
    old = tokenizer.quantize.embedding.weight
    num_new = codebook_size - len(old)
    if num_new < 0:
        raise InputError(f"codebook_size is {codebook_size}; extending keeps all {len(old)} codes, so it must be at least that")
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(len(old), (num_new,), generator=generator).to(old.device)
    noise = torch.randn(num_new, old.shape[1], generator=generator).to(old)
    extended = VisionTokenizer(replace(tokenizer.config, codebook_size=codebook_size)).to(old)
    state = tokenizer.state_dict()
    state["quantize.embedding.weight"] = torch.cat([old, old[source] + 0.1 * old.std(0) * noise])
    extended.load_state_dict(state)
    return extended
