"""Which pictures are kept from training, and how: whole concepts, or only a combination whose parts training does see.

In: the pictures there are, as (concept, group, style, tone) keys. Out: a split name for every key.
Seeded and independent of the order of the input: a concept's place in the lottery is a hash of (seed, purpose, concept).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from emoji_table import TONES

from openemu3.records import InputError

TRAIN = "train"
HELDOUT_PICTURE = "heldout_picture"
HELDOUT_COMBINATION = "heldout_combination"
HELDOUT_VIDEO = "heldout_video"


@dataclass(frozen=True, order=True)
class PictureKey:
    """concept: name without style and tone; style: "3D", "flat", "line" or "animated"; tone: "" or one of the five."""

    concept: str
    group: str
    style: str
    tone: str


@dataclass(frozen=True)
class SplitSizes:
    """How many concepts each way of holding out takes.

    pictures: concepts held out in every style and tone, and in motion.
    styles: concepts whose flat pictures are held out while their 3D ones are trained on.
    tones: (concept, tone) pairs held out in 3D while the concept's other tones are trained on.
    videos: concepts whose animation is held out while their still 3D picture is trained on.
    """

    pictures: int = 60
    styles: int = 120
    tones: int = 100
    videos: int = 60


def split_pictures(keys: Collection[PictureKey], sizes: SplitSizes, seed: int) -> dict[PictureKey, str]:
    """A split for every still picture. The three kinds of held-out concepts do not overlap, so that each measures one thing."""
    groups = {key.concept: key.group for key in keys}
    tones_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for key in keys:
        tones_of[key.concept, key.style].add(key.tone)
    in_both_styles = {concept for concept in groups if "" in tones_of[concept, "3D"] and "" in tones_of[concept, "flat"]}
    in_all_tones = {concept for concept in groups if set(TONES) <= tones_of[concept, "3D"]}

    pictures = _draw(in_both_styles, groups, sizes.pictures, seed, "pictures")
    styles = _draw(in_both_styles - set(pictures), groups, sizes.styles, seed, "styles")
    toned = _draw(in_all_tones - set(pictures) - set(styles), groups, sizes.tones, seed, "tones")
    tones = {concept: TONES[place % len(TONES)] for place, concept in enumerate(toned)}

    def choose(key: PictureKey) -> str:
        if key.concept in pictures:
            return HELDOUT_PICTURE
        if key.style == "flat" and key.concept in styles:
            return HELDOUT_COMBINATION
        if key.style == "3D" and key.tone and tones.get(key.concept) == key.tone:
            return HELDOUT_COMBINATION
        return TRAIN

    return {key: choose(key) for key in keys}


def split_videos(
    keys: Collection[PictureKey], picture_splits: dict[PictureKey, str], sizes: SplitSizes, seed: int
) -> dict[PictureKey, str]:
    """A split for every clip, given those of the pictures: a concept whose pictures are held out is held out in motion too."""
    groups = {key.concept: key.group for key in keys}
    unseen = {key.concept for key, split in picture_splits.items() if split == HELDOUT_PICTURE}
    seen_still = {key.concept for key, split in picture_splits.items() if split == TRAIN and key.style == "3D" and not key.tone}
    videos = set(_draw(seen_still & set(groups), groups, sizes.videos, seed, "videos"))

    def choose(key: PictureKey) -> str:
        if key.concept in unseen:
            return HELDOUT_PICTURE
        return HELDOUT_VIDEO if key.concept in videos else TRAIN

    return {key: choose(key) for key in keys}


def _draw(candidates: Collection[str], groups: dict[str, str], number: int, seed: int, purpose: str) -> list[str]:
    """`number` candidates in lottery order, each group in proportion to its size (largest remainders).

    Raises InputError if there are not as many candidates.
    """
    if number > len(candidates):
        raise InputError(f"sizes.{purpose} is {number}; only {len(candidates)} concepts can be held out this way")

    def rank(concept: str) -> bytes:
        return hashlib.sha256(f"{seed}/{purpose}/{concept}".encode()).digest()

    members: dict[str, list[str]] = defaultdict(list)
    for concept in sorted(candidates, key=rank):
        members[groups[concept]].append(concept)
    shares = {group: number * len(concepts) / len(candidates) for group, concepts in members.items()}
    quota = {group: int(share) for group, share in shares.items()}
    by_remainder = sorted(shares, key=lambda group: (quota[group] - shares[group], group))
    for group in by_remainder[: number - sum(quota.values())]:
        quota[group] += 1
    return sorted((concept for group, concepts in members.items() for concept in concepts[: quota[group]]), key=rank)
