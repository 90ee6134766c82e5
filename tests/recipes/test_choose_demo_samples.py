"""The demo's samples: how many of which kind, no concept twice, a choice that does not depend on the order of the input."""

import random

import pytest
from choose_demo_samples import choose_samples

from openemu3.records import InputError, Sample


def make_sample(index, style, tone="", split="train", kind="image", group="objects"):
    attributes = {
        "concept": f"{style}{tone}{split}{index}",
        "group": group,
        "subgroup": f"{group}-{index % 5}",
        "style": style,
        "tone": tone,
    }
    attributes |= {"hexcode": f"{index:04X}", "motion": str(index)}
    captions = {"en": f"{style} thing {index}", "zh": f"东西 {index}"}
    return Sample(f"{style}/{split}/{tone}/{index}", kind, b"picture %d" % index, captions, attributes, split)


@pytest.fixture
def images():
    kinds = [("3D", "", "train"), ("flat", "", "train"), ("3D", "dark", "train")]
    kinds += [("flat", "", "heldout_combination"), ("3D", "light", "heldout_combination")]
    samples = [make_sample(index, style, tone, split) for style, tone, split in kinds for index in range(40)]
    return samples + [make_sample(100 + index, "3D", group="symbols") for index in range(40)]


@pytest.fixture
def videos():
    return [make_sample(index, "animated", split=split, kind="video") for split in ("train", "heldout_video") for index in range(40)]


def test_counts_and_marks(images, videos):
    chosen = choose_samples(images, videos, seed=0, min_motion=10)
    uses = [sample.attributes["demo"] for sample in chosen]
    assert uses == ["draw"] * 48 + ["read"] * 12 + ["film"] * 8
    assert [sample.split for sample in chosen[:48]] == ["train"] * 36 + ["heldout_combination"] * 12
    assert [sample.attributes["demo_language"] for sample in chosen].count("zh") == 8
    assert len({sample.attributes["concept"] for sample in chosen}) == len(chosen)
    assert not [sample for sample in chosen if sample.attributes["group"] == "symbols"]
    assert len({sample.attributes["subgroup"] for sample in chosen[:5]}) == 5
    films = chosen[60:]
    assert [sample.split for sample in films] == ["train"] * 6 + ["heldout_video"] * 2
    assert all(float(sample.attributes["motion"]) >= 10 for sample in films[:6])
    # A film's row carries the still 3D picture of the same emoji, never frames of the animation.
    assert all(sample.kind == "image" and sample.media == b"picture %d" % int(sample.attributes["hexcode"], 16) for sample in films)


def test_the_choice_hangs_on_the_seed_alone(images, videos):
    chosen = choose_samples(images, videos, seed=0, min_motion=10)
    random.Random(0).shuffle(images)
    random.Random(1).shuffle(videos)
    assert choose_samples(images, videos, seed=0, min_motion=10) == chosen
    assert choose_samples(images, videos, seed=1, min_motion=10) != chosen


def test_too_few(images, videos):
    with pytest.raises(InputError, match="there are 0 samples to choose from; 2 are needed"):
        choose_samples(images, [video for video in videos if video.split == "train"], seed=0, min_motion=10)
