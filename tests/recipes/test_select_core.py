"""The core of the emoji set: which samples stay, that none changes its split, and who keeps a Chinese caption."""

from collections import Counter

import pytest
from select_core import select_core

from openemu3.records import Sample


def make_sample(name, subgroup, concept="bear", kind="image", split="train"):
    attributes = {"concept": concept, "subgroup": subgroup}
    return Sample(name, kind, b"picture", {"en": f"3D {concept}", "zh": "立体 熊"}, attributes, split)


@pytest.mark.parametrize(
    ("subgroup", "concept", "kind", "stays"),
    [
        ("animal-mammal", "bear", "image", True),
        ("animal-mammal", "bear", "video", True),
        ("hand-fingers-open", "waving hand", "image", True),
        ("hand-fingers-open", "waving hand", "video", False),  # of clips, fewer kinds
        ("tool", "hammer", "image", False),
        ("flag", "flag", "image", False),
        ("heart", "couple with heart", "image", False),  # a variant of people
    ],
)
def test_what_stays(subgroup, concept, kind, stays):
    assert bool(list(select_core(iter([make_sample("a", subgroup, concept, kind)]), Counter()))) == stays


def test_splits_stay_and_a_quarter_of_training_keeps_its_chinese_caption():
    splits = ("train", "heldout_combination", "heldout_picture")
    samples = [make_sample(f"{split}/{index}", "animal-bird", split=split) for split in splits for index in range(400)]
    counted = Counter()
    chosen = list(select_core(iter(samples), counted))
    assert counted == dict.fromkeys(splits, 400)
    assert [(one.id, one.split, one.captions["en"]) for one in chosen] == [(one.id, one.split, one.captions["en"]) for one in samples]
    chinese = Counter(one.split for one in chosen if "zh" in one.captions)
    assert 70 < chinese["train"] < 130 and chinese["heldout_combination"] == chinese["heldout_picture"] == 400
    assert chosen == list(select_core(iter(samples), Counter()))
