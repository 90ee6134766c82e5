"""Judges that are not the model: a small convolutional classifier trained on real pictures, and nearest real pictures by LPIPS.

In: pixels [B, 3, H, W] in [-1, 1] and labels. Out: predicted labels, or which of several real pictures a drawn one is closest to.
The surprising thing: the classifier is trained on pictures that are shifted, blurred and noisy, because a drawn picture has been
through a vision tokenizer; how well it judges reconstructions of real held-out pictures is always reported beside its verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS

WIDTHS = (24, 48, 96)


class PixelClassifier(nn.Module):
    """Three strided convolutions, the mean over the picture, one linear layer. Made by `train_classifier`."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        layers: list[nn.Module] = []
        for channels, width in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], len(self.labels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, L] of pixels [B, 3, H, W]."""
        return self.head(self.trunk(pixels).mean(dim=(2, 3)))

    @torch.inference_mode()
    def classify(self, pixels: Tensor) -> list[str]:
        """The most likely label of each picture."""
        indices = torch.cat([self(part).argmax(dim=1) for part in pixels.split(256)])
        return [self.labels[index] for index in indices.tolist()]


def train_classifier(pixels: Tensor, labels: Sequence[str], num_steps: int = 400, batch_size: int = 64, seed: int = 0) -> PixelClassifier:
    """A classifier of real pictures; the same arguments give the same classifier.

    pixels: [N, 3, H, W]; labels: one per picture, at least two different ones. Every label is drawn equally often.
    Raises InputError for fewer than two labels or another number of labels than pictures.
    """
    names = sorted(set(labels))
    if len(names) < 2 or len(labels) != len(pixels):
        raise InputError(
            f"a classifier needs a label for each of {len(pixels)} pictures and two different ones, not {len(labels)}, {names}"
        )
    members = [torch.tensor([index for index, label in enumerate(labels) if label == name]) for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = PixelClassifier(names).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=num_steps)
        for _ in range(num_steps):
            targets = torch.randint(len(names), (batch_size,))
            chosen = torch.stack([members[target][torch.randint(len(members[target]), ())] for target in targets.tolist()])
            loss = F.cross_entropy(classifier(_disturb(pixels[chosen])), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.inference_mode()
def embed_pictures(lpips: LPIPS, pixels: Tensor, batch_size: int = 32) -> Tensor:
    """LPIPS vectors float32 [N, D] of pixels [N, 3, H, W]; 2 MB each for VGG at 64 x 64."""
    return torch.cat([lpips.embed(part) for part in pixels.split(batch_size)])


def find_nearest(query: Tensor, candidates: Tensor) -> int:
    """Which of the candidates [K, D] is nearest to the query [D]: the first of the smallest distance."""
    return int((candidates.square().sum(dim=1) - 2 * (candidates @ query)).argmin())


def _disturb(pixels: Tensor) -> Tensor:
    """The batch mirrored at random, moved by up to 4 pixels on white, blurred by a random amount, with a little noise."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (4, 4, 4, 4), value=1.0)
    top, left = torch.randint(9, (2,)).tolist()
    moved = padded[:, :, top : top + height, left : left + width]
    moved = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, moved, moved.flip(3))
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(batch, 1, 1, 1)
    return amount * blurred + (1 - amount) * moved + 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(moved)
