"""Does the model say what a picture shows? Its words against the caption, exactly, and name, style and tone apart.

In: a model that describes, and samples. Out: shares with intervals.
The surprising thing: nothing here knows how captions are worded. The words around the names are learnt from the samples themselves
(every caption contains its concept), so a text is taken apart in whichever language it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL.Image import Image as Picture
from torch import Tensor

from openemu3.evaluation.intervals import estimate_mean
from openemu3.media import to_pil
from openemu3.records import InputError, Sample


class Describer(Protocol):
    """What describes: `generation.tasks.Emu3` or anything with such a method."""

    def describe(self, media: tuple[Picture, ...], *, max_new_tokens: int = 64) -> list[str]: ...


@dataclass(frozen=True)
class ParsedCaption:
    """A text taken apart: the words before the name (style), the name, and the words after it (tone)."""

    before: str
    name: str
    after: str


class CaptionParser:
    """Takes texts apart with the words that surround the names in the given samples' captions."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        surroundings: set[tuple[str, str]] = set()
        self.names: set[str] = set()
        for sample in samples:
            for language, caption in sample.captions.items():
                name = get_name(sample, language)
                before, found, after = caption.rpartition(name)  # the last one: a name may also be one of the words of its style
                if not found:
                    raise InputError(f"sample {sample.id!r} has the caption {caption!r}, which does not contain its concept {name!r}")
                surroundings.add((before, after))
                self.names.add(name)
        # The longest first: "", "medium" and "medium-light" may all end one text.
        self.befores = sorted({before for before, _ in surroundings}, key=len, reverse=True)
        self.afters = sorted({after for _, after in surroundings}, key=len, reverse=True)

    def parse(self, text: str) -> ParsedCaption:
        """The parts of a text; with unknown words around it the whole text is the name."""
        text = text.strip()
        before = next((words for words in self.befores if text.startswith(words)), "")
        after = next((words for words in self.afters if words and text.endswith(words)), "")
        return ParsedCaption(before, text[len(before) : len(text) - len(after)], after)


def get_name(sample: Sample, language: str) -> str:
    """The concept in one language: attribute "concept" for English, "concept_xx" for the others."""
    key = "concept" if language == "en" else f"concept_{language}"
    if key not in sample.attributes:
        raise InputError(f"sample {sample.id!r} has a caption in {language!r} and no attribute {key!r}")
    return sample.attributes[key]


def describe_pictures(describer: Describer, pixels: Tensor) -> list[str]:
    """A text for each of the pictures [N, 3, H, W] in [-1, 1]."""
    return describer.describe(tuple(to_pil(picture)[0] for picture in pixels), max_new_tokens=64)


def score_descriptions(texts: Sequence[str], samples: Sequence[Sample], parser: CaptionParser) -> dict[str, Any]:
    """How many texts are right, in any of the sample's languages.

    Returns num_pictures and estimates of "caption" (the whole caption, exactly), "name", "style" (the words before the name),
    "tone" (the words after it; samples with a tone alone) and "real_name" (the name of anything in the samples at all).
    """
    verdicts: dict[str, list[float]] = {"caption": [], "name": [], "style": [], "tone": [], "real_name": []}
    for text, sample in zip(texts, samples, strict=True):
        parsed = parser.parse(text)
        wanted = [parser.parse(caption) for caption in sample.captions.values()]
        verdicts["caption"].append(float(text.strip() in sample.captions.values()))
        verdicts["name"].append(float(parsed.name in [one.name for one in wanted]))
        verdicts["style"].append(float(parsed.before in [one.before for one in wanted]))
        verdicts["real_name"].append(float(parsed.name in parser.names))
        if sample.attributes.get("tone"):
            verdicts["tone"].append(float(parsed.after in [one.after for one in wanted]))
    estimates = {measure: estimate_mean(values).to_dict() for measure, values in verdicts.items() if values}
    return {"num_pictures": len(samples)} | estimates


def stack_pictures(pictures: Iterable[Tensor]) -> Tensor:
    """Pictures [3, 1, H, W] of one size -> [N, 3, H, W]."""
    return torch.cat(list(pictures), dim=1).transpose(0, 1)
