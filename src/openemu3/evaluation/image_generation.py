"""Do drawn pictures show what was asked for? Retrieval among real pictures, and style and skin tone by independent classifiers.

In: a model that draws, and samples (pictures with captions and the attributes concept, style, tone). Out: shares with intervals.
Retrieval is defined like this: a picture is drawn from the caption of a held-out or training sample; among 50 real pictures, the
sample's own and 49 of other concepts *in the same style and tone*, the drawn one must be nearest, by LPIPS (VGG), to its own.
Chance is 1 in 50. The judge never saw the model: it is an ImageNet network with weights learnt from people's judgements (and it is not
the AlexNet that the mini model's vision tokenizer was trained with).
"version" turns it around: among the real pictures of the *same* concept, in every style and tone there is, the drawn one must be
nearest to the one that was asked for. Style and tone are also judged by small classifiers trained on real pictures.
The surprising thing: every share stands beside a ceiling, the same measure on the tokenizer's reconstruction of the right real picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
class Judges:
    """Who judges drawn pictures: LPIPS for the concept, classifiers of real pictures for style and skin tone."""

    lpips: LPIPS
    style: PixelClassifier
    tone: PixelClassifier


def choose_pool(samples: Sequence[Sample], style: str, tone: str, size: int, seed: int = 0) -> list[int]:
    """Up to `size` samples (by index) of one style, those of the tone first, each part in the order of a hash of seed and id."""
    members = [index for index, sample in enumerate(samples) if sample.attributes["style"] == style]
    return sorted(members, key=lambda index: (samples[index].attributes["tone"] != tone, _hash(seed, samples[index].id)))[:size]


def choose_candidates(sample: Sample, samples: Sequence[Sample], pool: Sequence[int], num_candidates: int, seed: int = 0) -> list[int]:
    """`num_candidates` - 1 samples of the pool (places in it) that show other concepts than the sample, of its own tone as far as they go.

    The draw depends on the pool, the seed and the sample's id alone. Raises InputError if there are not so many.
    """
    others = [place for place, index in enumerate(pool) if not is_version(samples[index], sample)]
    if len(others) < num_candidates - 1:
        raise InputError(f"sample {sample.id!r} has {len(others)} others of its style; {num_candidates - 1} are needed as candidates")
    random = np.random.default_rng(int.from_bytes(_hash(seed, sample.id)[:8]))
    lottery = [others[place] for place in random.permutation(len(others))]
    return sorted(lottery, key=lambda place: samples[pool[place]].attributes["tone"] != sample.attributes["tone"])[: num_candidates - 1]


def is_version(one: Sample, other: Sample) -> bool:
    """Whether two samples show the same concept, in whatever style and tone."""
    return one.attributes["concept"] == other.attributes["concept"]


def draw_samples(painter: Painter, samples: Sequence[Sample], language: str = "en", seed: int = 0) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] of one picture drawn from each sample's caption."""
    drawn = painter.draw([sample.captions[language] for sample in samples], seed=seed)
    return torch.cat([from_pil(pictures[0]) for pictures in drawn], dim=1).transpose(0, 1)


def judge_drawings(
    shown: Mapping[str, Tensor],
    wanted: Sequence[int],
    samples: Sequence[Sample],
    pixels: Tensor,
    judges: Judges,
    num_candidates: int = 50,
    seed: int = 0,
) -> dict[str, dict[str, dict[int, bool]]]:
    """Which pictures are recognised: measure -> source -> place among the wanted samples -> whether it is right.

    shown: pictures of the M wanted samples (by index) from every source, [M, 3, H, W] in [-1, 1].
    samples, pixels: all real pictures there are, [N, 3, H, W].
    Measures are "retrieval", "version" (only at places whose concept has other versions), "style" and, at places whose samples have
    tones, "tone" and "tone_within_one", which also counts the neighbouring of the five tones as right; without such places they are
    missing. Memory holds the vectors of one style and tone's candidates (twice `num_candidates` of them).
    """
    verdicts: dict[str, dict[str, dict[int, bool]]] = {}

    def record(measure: str, source: str, place: int, is_right: bool) -> None:
        verdicts.setdefault(measure, {}).setdefault(source, {})[place] = is_right

    groups: dict[tuple[str, str], list[int]] = {}
    for place, index in enumerate(wanted):
        groups.setdefault((samples[index].attributes["style"], samples[index].attributes["tone"]), []).append(place)
    for (style, tone), places in groups.items():
        pool = choose_pool(samples, style, tone, 2 * num_candidates, seed)
        pool_vectors = embed_pictures(judges.lpips, pixels[pool])
        for place in places:
            index = wanted[place]
            versions = [index, *(i for i, other in enumerate(samples) if i != index and is_version(other, samples[index]))]
            version_vectors = embed_pictures(judges.lpips, pixels[versions])  # the right one first
            others = pool_vectors[choose_candidates(samples[index], samples, pool, num_candidates, seed)]
            for source, pictures in shown.items():
                vector = embed_pictures(judges.lpips, pictures[place : place + 1])[0]
                # With the right one last: a tie, such as between equal files, counts as wrong.
                record("retrieval", source, place, find_nearest(vector, torch.cat([others, version_vectors[:1]])) == len(others))
                if len(versions) > 1:
                    record("version", source, place, find_nearest(vector, version_vectors) == 0)
    toned = [place for place, index in enumerate(wanted) if samples[index].attributes["tone"]]
    for source, pictures in shown.items():
        for place, found in enumerate(judges.style.classify(pictures)):
            record("style", source, place, found == samples[wanted[place]].attributes["style"])
        if toned:
            for place, found in zip(toned, judges.tone.classify(pictures[toned]), strict=True):
                asked = samples[wanted[place]].attributes["tone"]
                record("tone", source, place, found == asked)
                record("tone_within_one", source, place, abs(TONES.index(found) - TONES.index(asked)) <= 1)
    return verdicts


def score_drawings(verdicts: Mapping[str, Mapping[str, Mapping[int, bool]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of what `judge_drawings` found: measure -> source -> share of right pictures, with its interval."""
    return {
        measure: {source: estimate_mean([float(right) for right in found.values()]).to_dict() for source, found in by_source.items()}
        for measure, by_source in verdicts.items()
    }


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
