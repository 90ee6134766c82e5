"""Do drawn pictures show what was asked for? Retrieval among real pictures, and style and skin tone by independent classifiers.

In: a model that draws, and samples (pictures with captions and the attributes concept, style, tone). Out: shares with intervals.
Retrieval is defined like this: a picture is drawn from the caption of a held-out or training sample; among 50 real pictures, the
sample's own and 49 of other concepts *in the same style and tone*, the drawn one must be nearest, by LPIPS (AlexNet), to its own.
Chance is 1 in 50. The judge never saw the model: it is an ImageNet network with weights learnt from people's judgements.
"version" turns it around: among the real pictures of the *same* concept, in every style and tone there is, the drawn one must be
nearest to the one that was asked for. Style and tone are also judged by small classifiers trained on real pictures.
The surprising thing: every share stands beside a ceiling, the same measure on the tokenizer's reconstruction of the right real picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from openemu3.evaluation.classifiers import PixelClassifier, embed_pictures, find_nearest
from openemu3.evaluation.intervals import estimate_mean
from openemu3.media import from_pil
from openemu3.records import InputError, Sample
from openemu3.tokenization.lpips import LPIPS

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # values of the attribute "tone", in order; "" for none


class Painter(Protocol):
    """What draws: `generation.tasks.Emu3` or anything with such a method."""

    def draw(self, prompt: list[str], *, seed: int = 0) -> list[list[Picture]]: ...


@dataclass(frozen=True)
class RealPictures:
    """The real pictures that drawn ones are compared with.

    samples: their rows; pixels [N, 3, H, W] in [-1, 1] and LPIPS vectors [N, D] in the same order.
    """

    samples: Sequence[Sample]
    pixels: Tensor
    embeddings: Tensor

    @property
    def index_of(self) -> dict[str, int]:
        return {sample.id: index for index, sample in enumerate(self.samples)}


def choose_candidates(sample: Sample, samples: Sequence[Sample], num_candidates: int = 50, seed: int = 0) -> list[str]:
    """Ids of the sample itself and of `num_candidates` - 1 others of its style and tone and of other concepts, in a random order.

    The draw depends on the seed and the sample's id alone. Raises InputError if there are not so many.
    """
    others = [
        other
        for other in samples
        if other.attributes["style"] == sample.attributes["style"]
        and other.attributes["tone"] == sample.attributes["tone"]
        and other.attributes["concept"] != sample.attributes["concept"]
    ]
    if len(others) < num_candidates - 1:
        raise InputError(
            f"sample {sample.id!r} has {len(others)} others of its style and tone; {num_candidates - 1} are needed as candidates"
        )
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{sample.id}".encode()).digest()[:8]))
    chosen = [others[index].id for index in random.choice(len(others), num_candidates - 1, replace=False)]
    chosen.insert(int(random.integers(num_candidates)), sample.id)
    return chosen


def is_version(one: Sample, other: Sample) -> bool:
    """Whether two samples show the same concept, in whatever style and tone."""
    return one.attributes["concept"] == other.attributes["concept"]


def draw_samples(painter: Painter, samples: Sequence[Sample], language: str = "en", seed: int = 0) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] of one picture drawn from each sample's caption."""
    drawn = painter.draw([sample.captions[language] for sample in samples], seed=seed)
    return torch.cat([from_pil(pictures[0]) for pictures in drawn], dim=1).transpose(0, 1)


@dataclass(frozen=True)
class Judges:
    """Who judges drawn pictures: LPIPS for the concept, classifiers of real pictures for style and skin tone."""

    lpips: LPIPS
    style: PixelClassifier
    tone: PixelClassifier


def score_drawings(
    drawn: Tensor,
    reconstructed: Tensor,
    wanted: Sequence[Sample],
    real: RealPictures,
    judges: Judges,
    num_candidates: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """How many drawings are recognised.

    drawn, reconstructed: pixels [N, 3, H, W]: drawn from the samples' captions, and the samples' own pictures through the tokenizer.
    Returns num_pictures, chance, and for "retrieval", "version" (samples whose concept has other versions), "style" and, where samples
    have tones, "tone" and "tone_within_one": {"drawn": estimate, "ceiling": estimate}. "tone_within_one" also counts the neighbouring
    of the five tones as right.
    """
    index_of = real.index_of
    candidates = [
        torch.tensor([index_of[name] for name in choose_candidates(sample, real.samples, num_candidates, seed)]) for sample in wanted
    ]
    versions = [torch.tensor([index_of[other.id] for other in real.samples if is_version(other, sample)]) for sample in wanted]
    report: dict[str, Any] = {"num_pictures": len(wanted), "chance": 1 / num_candidates}
    verdicts: dict[str, dict[str, list[float]]] = {}
    for source, pixels in (("drawn", drawn), ("ceiling", reconstructed)):
        vectors = embed_pictures(judges.lpips, pixels)
        found = [
            float(real.samples[int(rows[find_nearest(vector, real.embeddings[rows])])].id == sample.id)
            for vector, rows, sample in zip(vectors, candidates, wanted, strict=True)
        ]
        verdicts.setdefault("retrieval", {})[source] = found
        found = [
            float(real.samples[int(rows[find_nearest(vector, real.embeddings[rows])])].id == sample.id)
            for vector, rows, sample in zip(vectors, versions, wanted, strict=True)
            if len(rows) > 1
        ]
        if found:
            verdicts.setdefault("version", {})[source] = found
        styles = judges.style.classify(pixels)
        verdicts.setdefault("style", {})[source] = [
            float(style == sample.attributes["style"]) for style, sample in zip(styles, wanted, strict=True)
        ]
        toned = [index for index, sample in enumerate(wanted) if sample.attributes["tone"]]
        if toned:
            pairs = list(zip(judges.tone.classify(pixels[toned]), (wanted[index].attributes["tone"] for index in toned), strict=True))
            verdicts.setdefault("tone", {})[source] = [float(got == asked) for got, asked in pairs]
            verdicts.setdefault("tone_within_one", {})[source] = [
                float(abs(TONES.index(got) - TONES.index(asked)) <= 1) for got, asked in pairs
            ]
    for measure, by_source in verdicts.items():
        report[measure] = {source: estimate_mean(values).to_dict() for source, values in by_source.items()}
    return report
