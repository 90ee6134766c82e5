"""What post-training did to the mini model, in numbers and pictures: report.json and report.html, which needs nothing beside it.

In: the model folders of the recipe (before, and after each stage), its prompts and questions. Out: the report. Everything is measured
on sentences that gave no pair and on pictures and questions that no stage has learnt, in the same way before and after:

* quality tuning: the mean percentile rank of drawings among the scored pictures, by the scores that chose them
* preferences: how often the drawing after DPO pleases the taste more than the one before it, same prompt, same seed (a tie is half a win);
  and, by judges that never saw a vote, whether drawings still show what was asked. They look at subjects cut out and scaled alike, so that
  a size that pleases neither helps nor harms; "as drawn" is the right picture without that
* image-to-text: exact descriptions
* instruction tuning: right answers, against always giving the most frequent answer of the training questions of that kind
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from ask_questions import KINDS
from numpy.typing import NDArray
from PIL import Image
from score_samples import SCORES, score_picture
from tastes import TASTES, crop_subject
from torch import Tensor

from openemu3.data.conversations import ConversationConfig, Shown, encode_medium
from openemu3.data.samples import read_columns
from openemu3.evaluation.image_generation import judge_drawings
from openemu3.evaluation.intervals import Estimate, estimate_mean
from openemu3.evaluation.report import read_pictures, reconstruct, train_judges
from openemu3.evaluation.understanding import CaptionParser, describe_pictures, score_descriptions
from openemu3.generation.engine import Request
from openemu3.generation.sampling import SamplingSettings
from openemu3.generation.tasks import Emu3
from openemu3.media import from_pil, to_pil
from openemu3.tokenization.lpips import LPIPS
from openemu3.tokenization.sequence import Turn

ALIGNMENT = ("retrieval", "as drawn", "style", "tone")
ANSWERS = ("majority", "before", "after image-to-text", "after")
MAX_SHOWN = 60  # prompts whose pictures are in the report


@dataclass(frozen=True)
class Report:
    """Flags of this script."""

    work: Path
    """The recipe's work folder."""
    samples: Path
    """Parquet file of all real pictures."""
    base: str = "mini"
    """The model that the recipe began with."""
    taste: Literal["warmth", "size"] = "size"
    """What the voters like."""
    num_seeds: int = 3
    """Pictures drawn of each prompt, for the win rate."""
    temperature: float = 1.0
    """Of these drawings, as of the candidates that were voted on."""
    prompts: Literal["heldout", "tuning"] = "heldout"
    """Which of the prompts that gave no pair; settings are chosen by those for tuning alone."""
    max_prompts: int | None = None
    """Of these prompts; all otherwise."""
    max_questions: int | None = None
    """Of the held-out questions; all otherwise."""
    num_candidates: int = 50
    """Real pictures that a drawing is told apart among."""
    classifier_steps: int = 400
    """Training steps of the judges of style and tone."""

    def run(self) -> None:
        torch.set_grad_enabled(False)
        samples, pixels = read_pictures(self.samples)
        lines = (self.work / "preferences" / f"{self.prompts}.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line) for line in lines][: self.max_prompts]
        places = {sample.id: index for index, sample in enumerate(samples)}
        wanted = [places[one["id"]] for one in asked]
        prompts = [one["prompt"] for one in asked]

        models = {"before": self.base, "after quality tuning": self.work / "qft_model", "after DPO": self.work / "dpo_model"}
        drawings: dict[str, Tensor] = {}  # [seeds, N, 3, H, W]
        shown: list[Tensor] = []  # [N, 3, H, W], as a user gets them
        rebuilt = None
        for name, folder in models.items():
            print(f"drawing {len(prompts)} prompts: {name}", flush=True)
            emu3 = Emu3.load(folder)
            drawings[name] = torch.stack([draw(emu3, prompts, seed, self.temperature) for seed in range(self.num_seeds)])
            shown.append(draw(emu3, prompts[:MAX_SHOWN], 0, emu3.defaults.temperature))
            rebuilt = reconstruct(emu3, pixels[wanted]) if rebuilt is None else rebuilt
        assert rebuilt is not None
        print("judging", flush=True)
        subjects = crop_subjects(pixels)
        with torch.enable_grad():
            judges = train_judges(samples, subjects, LPIPS("vgg"), self.classifier_steps)
        sources = {f"{name} {seed}": pictures for name, seeds in drawings.items() for seed, pictures in enumerate(seeds)}
        sources["ceiling"] = rebuilt
        cut = {name: crop_subjects(pictures) for name, pictures in sources.items()}
        verdicts = judge_drawings(cut, wanted, samples, subjects, judges, self.num_candidates)
        as_drawn = judge_drawings(sources, wanted, samples, pixels, judges, self.num_candidates)
        verdicts["as drawn"] = as_drawn["retrieval"]
        liked = {name: np.array([[TASTES[self.taste](picture) for picture in seed] for seed in seeds]) for name, seeds in drawings.items()}
        report: dict[str, Any] = {
            "settings": {field: str(value) if isinstance(value, Path) else value for field, value in vars(self).items()},
            "quality tuning": self._measure_quality(drawings),
            "preferences": self._measure_taste(liked, prompts),
            "alignment": self._measure_alignment(verdicts, prompts, list(drawings)),
            "by picture": self._measure_by_picture(liked, verdicts, asked),
            "image-to-text": self._measure_descriptions(samples, pixels),
            "instruction": self._measure_answers(),
        }
        suffix = "" if self.prompts == "heldout" else f"_{self.prompts}"  # so that neither report takes the other's place
        (self.work / f"report{suffix}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        sheet = make_sheet([pixels[wanted[:MAX_SHOWN]], *shown])
        (self.work / f"report{suffix}.html").write_text(write_html(report, prompts, list(drawings), sheet), encoding="utf-8")
        sheet.save(self.work / f"before_after{suffix}.png")
        print(self.work / f"report{suffix}.html")
        win = Estimate(**report["preferences"]["win rate"])
        print(f"win rate after DPO: {win.format(1, 100, ' %')}")

    def _measure_quality(self, drawings: dict[str, Tensor]) -> dict[str, Any]:
        """The mean percentile rank among the scored pictures of the training split."""
        rows = read_columns(self.work / "scored.parquet", ["scores"], splits={"train"})
        columns = list(zip(*([row["scores"][name] for name in SCORES] for row in rows), strict=True))
        ranked = [np.sort(np.array(column)) for column in columns]
        report = {}
        for name in ("before", "after quality tuning"):
            ranks = []
            for picture in drawings[name].flatten(0, 1):
                found = score_picture(picture)
                below = [np.searchsorted(column, found[score]) / len(column) for column, score in zip(ranked, SCORES, strict=True)]
                ranks.append(float(np.mean(below)))
            report[name] = estimate_mean(ranks).to_dict()
        return report

    def _measure_taste(self, liked: Mapping[str, NDArray[np.float64]], prompts: Sequence[str]) -> dict[str, Any]:
        """Against the model after quality tuning, which is where DPO began; intervals over prompts. liked: how much, [seeds, N]."""
        groups = list(prompts) * self.num_seeds
        return {
            "taste": self.taste,
            "win rate": estimate_mean(find_wins(liked["after DPO"], liked["after quality tuning"]).ravel().tolist(), groups).to_dict(),
            "mean": {name: estimate_mean(values.ravel().tolist(), groups).to_dict() for name, values in liked.items()},
        }

    def _measure_by_picture(
        self,
        liked: Mapping[str, NDArray[np.float64]],
        verdicts: Mapping[str, Mapping[str, Mapping[int, bool]]],
        asked: Sequence[Mapping[str, str]],
    ) -> dict[str, Any]:
        """What DPO did to sentences of pictures that pre-training has shown, which the model knows best, and of those it has not.

        Retrieval alone: it is the one measure of alignment that every sentence has and that having seen the picture raises.
        """
        wins = find_wins(liked["after DPO"], liked["after quality tuning"])
        found = {}
        for name in ("after quality tuning", "after DPO"):
            rows = [verdicts["retrieval"][f"{name} {seed}"] for seed in range(len(wins))]
            found[name] = np.array([[row[place] for place in range(len(asked))] for row in rows], dtype=np.float64)
        report = {}
        for name, is_shown in (("shown in pre-training", True), ("never shown", False)):
            places = [place for place, one in enumerate(asked) if (one["split"] == "train") == is_shown]
            if not places:
                continue
            groups = [asked[place]["prompt"] for place in places] * len(wins)
            values = {"win rate": wins, **found, "change": found["after DPO"] - found["after quality tuning"]}
            report[name] = {key: estimate_mean(value[:, places].ravel().tolist(), groups).to_dict() for key, value in values.items()}
        return report

    def _measure_alignment(
        self, verdicts: Mapping[str, Mapping[str, Mapping[int, bool]]], prompts: Sequence[str], names: Sequence[str]
    ) -> dict[str, Any]:
        """Measure -> model -> share of right drawings, and "change", what DPO did to it: of the same sentences and seeds, so that the
        interval of the change is narrower than those of the shares."""
        report: dict[str, Any] = {}
        for measure in ALIGNMENT:
            by_source = verdicts.get(measure)
            if by_source is None:
                continue
            places = list(by_source["ceiling"])
            groups = [prompts[place] for place in places] * self.num_seeds
            right = {
                name: np.array([float(by_source[f"{name} {seed}"][place]) for seed in range(self.num_seeds) for place in places])
                for name in names
            }
            report[measure] = {name: estimate_mean(values.tolist(), groups).to_dict() for name, values in right.items()} | {
                "change": estimate_mean((right["after DPO"] - right["after quality tuning"]).tolist(), groups).to_dict(),
                "ceiling": estimate_mean([float(is_right) for is_right in by_source["ceiling"].values()]).to_dict(),
            }
        return report

    def _measure_descriptions(self, samples: Sequence[Any], pixels: Tensor) -> dict[str, Any]:
        held_out = [index for index, sample in enumerate(samples) if sample.split != "train"][: self.max_prompts]
        parser = CaptionParser(samples)
        report = {}
        for name, folder in (("before", self.base), ("after", self.work / "image_to_text_model")):
            print(f"describing {len(held_out)} pictures: {name}", flush=True)
            texts = describe_pictures(Emu3.load(folder), pixels[held_out])
            report[name] = score_descriptions(texts, [samples[index] for index in held_out], parser)
        return report

    def _measure_answers(self) -> dict[str, Any]:
        """kind of question -> {"majority", "before", "after image-to-text", "after"}: shares of right answers, intervals over pictures."""
        folder = self.work / "questions"
        learnt, asked = (json.loads((folder / f"{side}.json").read_text(encoding="utf-8")) for side in ("train", "heldout"))
        asked = asked[: self.max_questions]
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for row in learnt:
            answers[row["kind"]][row["conversations"][1]["value"]] += 1
        said = {"majority": [answers[row["kind"]].most_common(1)[0][0] for row in asked]}
        models = {"before": self.base, "after image-to-text": self.work / "image_to_text_model", "after": self.work / "instruct_model"}
        for name, model in models.items():
            print(f"answering {len(asked)} questions: {name}", flush=True)
            said[name] = answer(Emu3.load(model), asked, folder)
        kinds = sorted({row["kind"] for row in asked})
        report = {}
        for kind in ["all", *kinds]:
            chosen = [index for index, row in enumerate(asked) if kind in ("all", row["kind"])]
            pictures = [asked[index]["image"] for index in chosen]
            report[kind] = {
                name: estimate_mean(
                    [float(texts[index] == asked[index]["conversations"][1]["value"]) for index in chosen], pictures
                ).to_dict()
                for name, texts in said.items()
            }
        return report


def draw(emu3: Emu3, prompts: list[str], seed: int, temperature: float) -> Tensor:
    """[N, 3, H, W] in [-1, 1], one picture of each prompt."""
    drawn = emu3.draw(prompts, seed=seed, temperature=temperature)
    return torch.cat([from_pil(pictures[0]) for pictures in drawn], dim=1).transpose(0, 1)


def crop_subjects(pictures: Tensor) -> Tensor:
    """[N, 3, H, W] -> the same of `crop_subject`."""
    return torch.stack([crop_subject(picture) for picture in pictures])


def find_wins(after: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where a drawing pleases more than the one before, 0 where less, a half where they please alike."""
    return np.where(after == before, 0.5, after > before)


def answer(emu3: Emu3, rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """The answers, all pictures and questions together."""
    defaults = emu3.defaults
    config = ConversationConfig(defaults.min_pixels, defaults.max_pixels)
    parts = {row["image"]: None for row in rows}
    shown = {name: encode_medium(Shown("image", folder / name), emu3.vision_tokenizer, config) for name in parts}
    prompts = []
    for row in rows:
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        prompts.append(emu3.format.chat_prompt([Turn(question, (shown[row["image"]],))]))
    settings = SamplingSettings(0.0, 0, 1.0, 1.0)
    texts = []
    for done in emu3.engine.generate([Request(prompt, max_new_tokens=24, settings=settings) for prompt in prompts]):
        ids = done.token_ids[:-1] if done.stopped else done.token_ids
        texts.append(emu3.format.text_tokenizer.decode(ids.tolist()).strip())
    return texts


def make_sheet(kinds: Sequence[Tensor], columns: int = 20) -> Image.Image:
    """Pictures of several kinds [N, 3, H, W], one kind a row, `columns` to a line, with a gap between the lines."""
    height, width = kinds[0].shape[2:]
    number = len(kinds[0])
    columns = min(columns, number)
    lines = -(-number // columns)
    sheet = Image.new("RGB", (columns * width, lines * (len(kinds) * height + 8)), "white")
    for index in range(number):
        line, column = divmod(index, columns)
        for row, pictures in enumerate(kinds):
            sheet.paste(
                to_pil(pictures[index].clamp(-1, 1).unsqueeze(1))[0], (column * width, line * (len(kinds) * height + 8) + row * height)
            )
    return sheet


def write_html(report: dict[str, Any], prompts: Sequence[str], names: Sequence[str], sheet: Image.Image) -> str:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    picture = base64.b64encode(buffer.getvalue()).decode("ascii")

    def show(estimate: dict[str, float] | None) -> str:
        return "-" if estimate is None else Estimate(**estimate).format(1, 100, " %")  # type: ignore[arg-type]

    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><tr>{cells}</tr>{body}</table>"

    preferences = report["preferences"]
    alignment = report["alignment"]
    taste = [[name, Estimate(**value).format(3)] for name, value in preferences["mean"].items()]
    rows = [*names, "change", "ceiling"]
    aligned = [[name, *(show(alignment.get(key, {}).get(name)) for key in ALIGNMENT)] for name in rows]
    columns = ("win rate", "after quality tuning", "after DPO", "change")
    by_picture = [
        [name, str(scores["win rate"]["count"]), *(show(scores[column]) for column in columns)]
        for name, scores in report["by picture"].items()
    ]
    described = [
        [name, *(show(scores.get(key)) for key in ("caption", "name", "style", "tone"))] for name, scores in report["image-to-text"].items()
    ]
    answered = [
        [kind, str(scores["majority"]["count"]), *(show(scores[name]) for name in ANSWERS)]
        for kind, scores in report["instruction"].items()
    ]
    quality = [[name, show(value)] for name, value in report["quality tuning"].items()]
    style = (
        "body{font:16px sans-serif;max-width:80em;margin:2em auto}td,th{padding:.2em .8em;text-align:left}img{image-rendering:pixelated}"
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Post-training of the mini model</title><style>{style}</style>
<h1>Post-training of the mini model</h1>
<p>Shares with 95 % bootstrap intervals; sentences that gave no pair, pictures and questions that no stage has learnt.</p>
<h2>Quality tuning</h2><p>Mean percentile rank of drawings among the scored pictures ({", ".join(SCORES)}).</p>
{table(["model", "rank"], quality)}
<h2>Preferences</h2><p>Drawings after DPO against those before it, judged by {html.escape(preferences["taste"])}:
<b>{show(preferences["win rate"])}</b> are preferred.</p>{table(["model", preferences["taste"]], taste)}
<p>Do they still show what was asked? Of all drawings: the right picture among {report["settings"]["num_candidates"]} by LPIPS;
style and tone by classifiers of real pictures. Judges see the subjects cut out and scaled alike; "as drawn" is the right picture
without that. Change: what DPO did, on the same sentences and seeds.
Ceiling: the right pictures themselves, through the vision tokenizer.</p>{table(["model", *ALIGNMENT], aligned)}
<p>The same by whether pre-training has shown the sentence's picture.</p>
{table(["picture", "drawings", "preferred", "right picture before DPO", "after DPO", "change"], by_picture)}
<p>From above: the real picture, then {html.escape(", then ".join(names))}, at the model's own temperature;
the measures are of drawings at {report["settings"]["temperature"]}.</p><img src="data:image/png;base64,{picture}" alt="drawings">
<details><summary>Prompts</summary><ol>{"".join(f"<li>{html.escape(prompt)}</li>" for prompt in prompts[:MAX_SHOWN])}</ol></details>
<h2>Image-to-text</h2><p>Exact descriptions of held-out pictures.</p>{table(["model", "caption", "name", "style", "tone"], described)}
<h2>Instruction tuning</h2><p>Right answers about held-out pictures. Subjects are one of {html.escape(", ".join(KINDS.values()))}.</p>
{table(["question", "number", *ANSWERS], answered)}
</html>
"""


if __name__ == "__main__":
    tyro.cli(Report).run()
