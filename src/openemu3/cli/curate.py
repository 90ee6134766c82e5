"""`emu3 curate`: raw pictures and films -> filtered samples, and a page that says what was dropped and why.

The steps are those of the Emu3 paper, section 2.1. Scoring is the long part and can be stopped at any time; thresholds come after it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from openemu3.cli.options import Device, Files, Json, MoveBar, check_files, choose_device, print_answer, show_progress
from openemu3.records import InputError

if TYPE_CHECKING:
    from openemu3.curation.captions import Captioner
    from openemu3.curation.endpoint import DescribingModel, Endpoint
    from openemu3.curation.filters import Thresholds
    from openemu3.curation.pipeline import Run
    from openemu3.records import Sample

Sources = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CurateSource:
    """What is read, and where it goes; the same for pictures and films."""

    sources: Positional[Sources]
    """Folders (searched through), single files, .tar, .parquet or .jsonl files, or object-store URLs of these, such as s3://bucket/folder."""
    output: Path
    """Run folder: samples/, report.html and what was measured. The same command again goes on where the last one stopped."""


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Thresholds of pictures. They come before the shared flags in the help, since they are what most people set."""

    min_width: int = 512
    """Narrowest picture, in pixels."""
    min_height: int = 512
    """Lowest picture, in pixels."""
    min_aesthetic: float = 5.5
    """LAION's score, 1 to 10. Pictures below it are kept all the same if they have colours and little text."""
    max_text_coverage: float = 0.05
    """Largest share of a picture under text, for pictures below min-aesthetic; 0.05 is 5 percent."""
    min_colour_spread: float = 3.0
    """Spread of colours in 8-bit levels, for the same pictures; grey, sepia and flat ones have about 0, photographs 10 to 40."""
    max_hash_distance: int = 2
    """How different pictures may be and count as duplicates: bits of 64 of their perceptual hashes, 0 to 8; -1 keeps near-duplicates."""
    embed: bool = False
    """Keep CLIP's features in the scores, which `emu3 curate representatives` chooses by."""


@dataclass(frozen=True, kw_only=True)
class VideoFlags:
    """Thresholds of clips."""

    min_seconds: float = 1.0
    """Shortest clip."""
    min_short_edge: int = 256
    """Least number of pixels of a clip's shorter side."""
    min_aesthetic: float = 5.0
    """LAION's score, 1 to 10, of the worst of three frames."""
    max_text_coverage: float = 0.05
    """Largest share of the frames under text; 0.05 is 5 percent."""
    min_motion: float = 0.001
    """Mean optical flow in an eighth of a second, as a share of the shorter side; below it nothing happens."""
    max_motion: float = 0.05
    """The same; above it the picture flickers or jumps."""
    max_hash_distance: int = 2
    """How different clips may be and count as duplicates: bits of 64 of the hash of the middle frame, 0 to 8; -1 keeps near-duplicates."""


@dataclass(frozen=True, kw_only=True)
class SharedFlags:
    """How is read and measured; the same for pictures and films."""

    no_aesthetic: bool = False
    """Leave the aesthetic step out, which needs CLIP's weights: all go through the steps after it."""
    no_text: bool = False
    """Leave the text step out: it takes nine tenths of the time of a run without CLIP models."""
    aesthetic_clip: Path | None = None
    """Folder of CLIP ViT-L/14 (openai/clip-vit-large-patch14 in safetensors)."""
    aesthetic_head: Path | None = None
    """LAION's improved aesthetic predictor, sac+logos+ava1-l14-linearMSE, as safetensors (recipes/convert_score_weights.py)."""
    hps_clip: Path | None = None
    """Folder of CLIP ViT-H/14 with its tokenizer, for HPSv2.1 and MPS (laion/CLIP-ViT-H-14-laion2B-s32B-b79K)."""
    hps_weights: Path | None = None
    """HPSv2.1 as safetensors: one more column, for choosing quality-tuning data."""
    mps_weights: Path | None = None
    """MPS as safetensors: one more column, for choosing quality-tuning data."""
    language: str = "en"
    """Language of captions that do not name theirs."""
    caption_column: str | None = None
    """Column of the captions in tables and lists; otherwise captions, caption, text, txt or prompt."""
    media_column: str | None = None
    """Column of the media or their paths in tables and lists; otherwise one of the usual names, such as image, video, path or url."""
    id_column: str | None = None
    """Column of the ids in tables and lists; otherwise id, key or uid."""
    root: tuple[Path, ...] = ()
    """Folders that tables and lists may name files in, beside their own."""
    validation_share: float = 0.0
    """Part of the samples that goes into the split "validation", chosen by their ids; 0.01 is one in a hundred."""
    source_name: str = "curated"
    """What the samples say about where they are from; mixtures of training data can be made by it."""
    seconds_per_file: float = 30.0
    """Longest time for decoding and measuring one picture. A film may take as long as it needs, but stand still for ten times that."""
    max_megabytes: int = 512
    """Largest file that is read. Films that are files of their own are streams and may be larger."""
    rows_per_part: int = 256
    """Files that are done or not done together, when a run is stopped."""
    runner: Literal["native", "ray"] = "native"
    """native: this machine; ray: a Ray cluster."""
    ray_address: str | None = None
    """A running cluster, such as ray://host:10001 or auto; otherwise ray starts one on this machine."""
    workers: int | None = None
    """Processes that decode and measure, on the cluster for each step; otherwise one for each core, on the cluster one."""
    device: Device = "auto"
    """Where CLIP models compute."""
    json: Json = False


# The last base's flags come first.
@dataclass(frozen=True, kw_only=True)
class CurateImages(SharedFlags, ImageFlags, CurateSource):
    """Pictures -> samples, with a report of what was dropped and why.

    Steps: decode, resolution, aesthetic score, for those below it text and colours, duplicates. For a first look, without models to fetch:
    emu3 curate images PHOTOS --output RUN --no-aesthetic
    """

    def run(self) -> None:
        from openemu3.curation.filters import ImageThresholds

        thresholds = ImageThresholds(
            self.min_width,
            self.min_height,
            None if self.no_aesthetic else self.min_aesthetic,
            1.0 if self.no_text else self.max_text_coverage,
            self.min_colour_spread,
            self.max_hash_distance,
        )
        _curate(self, "image", thresholds, self.embed)


@dataclass(frozen=True, kw_only=True)
class CurateVideos(SharedFlags, VideoFlags, CurateSource):
    """Films -> samples, one for each clip, with a report of what was dropped and why.

    Steps: scenes, length and resolution, text, motion, aesthetic score, duplicates. For a first look, without models to fetch:
    emu3 curate videos FILMS --output RUN --no-aesthetic
    """

    def run(self) -> None:
        from openemu3.curation.filters import VideoThresholds

        thresholds = VideoThresholds(
            self.min_seconds,
            self.min_short_edge,
            1.0 if self.no_text else self.max_text_coverage,
            self.min_motion,
            self.max_motion,
            None if self.no_aesthetic else self.min_aesthetic,
            self.max_hash_distance,
        )
        _curate(self, "video", thresholds, False)


@dataclass(frozen=True)
class CurateReport:
    """Write the report of a run anew; with thresholds, decide anew first, from the scores that are there, without opening a file.

    emu3 curate report RUN --min-width 256 --min-height 256 --samples
    """

    run_folder: Positional[Path]
    """Run folder of `emu3 curate images` or `videos`."""
    min_width: int | None = None
    """Narrowest picture, in pixels; like all thresholds here as in the run, unless given."""
    min_height: int | None = None
    """Lowest picture, in pixels."""
    min_short_edge: int | None = None
    """Least number of pixels of a clip's shorter side."""
    min_seconds: float | None = None
    """Shortest clip."""
    min_aesthetic: float | None = None
    """LAION's score, 1 to 10."""
    no_aesthetic: bool = False
    """Leave the aesthetic step out."""
    max_text_coverage: float | None = None
    """Largest share under text; 1 leaves the text step out."""
    min_colour_spread: float | None = None
    """Spread of colours in 8-bit levels, of pictures."""
    min_motion: float | None = None
    """Least motion of clips, as a share of the shorter side."""
    max_motion: float | None = None
    """Most motion of clips."""
    max_hash_distance: int | None = None
    """Bits of 64 in which the hashes of near-duplicates differ, 0 to 8; -1 keeps near-duplicates."""
    samples: bool = False
    """Write the samples of the new decisions, too; this reads the files that are kept."""
    validation_share: float = 0.0
    """Part of the samples that goes into the split "validation"."""
    source_name: str = "curated"
    """What the samples say about where they are from."""
    json: Json = False

    def run(self) -> None:
        from dataclasses import fields, replace

        from openemu3.curation.pipeline import Run, decide_all, read_thresholds

        began = time.monotonic()
        run = Run.load(self.run_folder)
        thresholds = read_thresholds(run)
        known = {field.name for field in fields(thresholds)}
        given = {
            name: getattr(self, name)
            for name in (*(field.name for field in fields(self) if field.name.startswith(("min_", "max_"))),)
            if getattr(self, name) is not None
        }
        strange = sorted(set(given) - known)
        if strange:
            allowed = ", ".join(sorted(known))
            raise InputError(f"{strange[0]} is no threshold of {run.config.source.kind}s; allowed are {allowed}")
        if self.no_aesthetic:
            given["min_aesthetic"] = None
        if given:
            thresholds = replace(thresholds, **given)
        decide_all(run, thresholds)
        _finish(run, self.samples, self.validation_share, self.source_name, self.json, began)


@dataclass(frozen=True)
class CurateCaptions:
    """Write captions into samples: asked of an OpenAI-compatible endpoint (vLLM, for example), or of a model of this project.

    emu3 curate captions RUN/samples/*.parquet --output CAPTIONED --base-url http://localhost:8000/v1 --endpoint-model NAME
    The same command again goes on where the last one stopped: answers are kept beside the output.
    """

    samples: Positional[Files]
    """Parquet files of samples, as `emu3 curate images` or `videos` writes them."""
    output: Path
    """Folder for the samples with captions, one file for each, and for the answers."""
    base_url: str | None = None
    """Address of the endpoint, such as http://localhost:8000/v1. Its key is read from the variable OPENAI_API_KEY."""
    endpoint_model: str | None = None
    """The model's name at the endpoint."""
    model: str | None = None
    """Instead of an endpoint: a model folder, or "mini"."""
    language: str = "en"
    """Of the captions: en, zh, ja, ko, de, fr, es. A caption in this language that a sample already has is replaced."""
    only_missing: bool = False
    """Leave samples alone that have a caption in this language."""
    purpose: Literal["caption", "label"] = "caption"
    """caption: clips by 12 frames, longer ones than 20 s in parts; label: by 8 frames, for training a captioner."""
    templates: Path | None = None
    """Folder with prompts of your own: image.txt, video.txt, video_label.txt, video_merge.txt."""
    concurrency: int = 8
    """Questions outstanding at a time."""
    requests_per_minute: float | None = None
    """At most so many questions a minute."""
    price_in: float = 0.0
    """Price of a million tokens of question."""
    price_out: float = 0.0
    """Price of a million tokens of answer."""
    max_cost: float | None = None
    """Stop when so much was spent."""
    ask_again: bool = False
    """Ask again where the kept answer was a refusal or nonsense."""
    drop_uncaptioned: bool = False
    """Leave samples out that got no caption; otherwise they stay as they were."""
    device: Device = "auto"
    """Where a model of this project computes."""
    json: Json = False

    def run(self) -> None:
        from openemu3.curation.captions import AnswerCache, CaptionConfig, Captioner

        began = time.monotonic()
        check_files("samples", self.samples)
        if (self.base_url is None) == (self.model is None) or (self.base_url is None) != (self.endpoint_model is None):
            raise InputError(
                "captions come from an endpoint (--base-url and --endpoint-model) or from a model (--model); name one of the two"
            )
        config = CaptionConfig(
            language=self.language,
            purpose=self.purpose,
            templates=self.templates,
            concurrency=self.concurrency,
            ask_again=self.ask_again,
        )
        counts: dict[str, int] = {"captioned": 0, "left": 0}
        spent = {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
        files = []
        with contextlib.ExitStack() as open_things, show_progress("asking") as move:
            ask = self._open_model() if self.base_url is None else open_things.enter_context(self._open_endpoint(self.base_url))
            captioner = Captioner(ask, open_things.enter_context(AnswerCache(self.output / "answers.sqlite")), config)
            for path in self.samples:
                target = self.output / path.name
                if target in files or target.resolve() == path.resolve():
                    raise InputError(f"{target} would be written over; name samples of different names and another folder")
                files.append(target)
                write_captioned(path, target, captioner, self.only_missing, self.drop_uncaptioned, counts, spent, move)
        reasons = "".join(f"\n  {count:>8}  {reason}" for reason, count in sorted(counts.items()) if reason not in ("captioned", "left"))
        cost = (
            f"; {spent['prompt_tokens']} + {spent['completion_tokens']} tokens, cost {spent['cost']:.4f}" if spent["prompt_tokens"] else ""
        )
        text = f"{counts['captioned']} captioned, {counts['left']} left as they were{cost}{reasons}\n" + "\n".join(map(str, files))
        seconds = round(time.monotonic() - began, 3)
        print_answer(self.json, text, {"files": [str(path) for path in files], "counts": counts, **spent, "seconds": seconds})

    def _open_endpoint(self, base_url: str) -> Endpoint:
        from openemu3.curation.endpoint import Endpoint, EndpointConfig

        return Endpoint(
            EndpointConfig(
                base_url,
                self.endpoint_model or "",
                requests_per_minute=self.requests_per_minute,
                price_in=self.price_in,
                price_out=self.price_out,
                max_cost=self.max_cost,
            )
        )

    def _open_model(self) -> DescribingModel:
        from openemu3.curation.endpoint import DescribingModel
        from openemu3.generation.tasks import Emu3, Film
        from openemu3.media import from_pil

        name = self.model or ""
        emu3 = Emu3.load(name, device=choose_device(self.device))

        def describe(frames: list[Any], fps: float) -> str:
            return emu3.describe(frames[0] if len(frames) == 1 else Film(from_pil(frames), fps), max_new_tokens=256)

        return DescribingModel(describe, name)


@dataclass(frozen=True)
class CurateRepresentatives:
    """Choose pictures to learn understanding from, as DenseFusion does: by category (charts, tables, ...), a few of each cluster.

    For a run of `emu3 curate images --embed`. They are chosen from all pictures that can be read and are large enough, and written apart.
    """

    run_folder: Positional[Path]
    """Run folder; the samples go into its folder understanding/."""
    pictures_per_cluster: int = 50
    """Pictures that make one cluster, on average."""
    per_cluster: int = 5
    """Representatives of each cluster."""
    seed: int = 0
    """The same seed gives the same pictures."""
    source_name: str = "understanding"
    """What the samples say about where they are from."""
    json: Json = False

    def run(self) -> None:
        from openemu3.curation.categories import CATEGORIES, CategoryConfig, assign_categories, choose_representatives
        from openemu3.curation.clip_scores import Clip
        from openemu3.curation.pipeline import Run, SampleConfig, read_features, write_representatives
        from openemu3.data.samples import write_samples

        run = Run.load(self.run_folder)
        rows, features = read_features(run)
        clip = Clip.load(run.config.score.aesthetic_clip or "")
        prompts = {name: clip.embed_texts(texts).numpy() for name, texts in CATEGORIES.items()}
        categories = assign_categories(features, prompts)
        config = CategoryConfig(self.pictures_per_cluster, per_cluster=self.per_cluster, seed=self.seed)
        chosen = choose_representatives(rows, features, categories, config)
        files = write_representatives(run, chosen, SampleConfig(source=self.source_name), write_samples)
        counts = {name: sum(one.category == name for one in chosen) for name in CATEGORIES}
        lines = [f"{len(chosen)} of {len(rows)} pictures", *(f"  {count:>8}  {name}" for name, count in counts.items()), *map(str, files)]
        print_answer(
            self.json, "\n".join(lines), {"chosen": len(chosen), "of": len(rows), "counts": counts, "files": list(map(str, files))}
        )


def write_captioned(
    source: Path,
    target: Path,
    captioner: Captioner,
    only_missing: bool,
    drop_uncaptioned: bool,
    counts: dict[str, int],
    spent: dict[str, Any],
    move: MoveBar,
) -> None:
    """One file of samples -> one with captions. `counts` and `spent` grow; reasons are counted by their first words."""
    from collections import deque
    from dataclasses import replace

    from openemu3.curation.captions import CaptionItem
    from openemu3.data.samples import read_samples, write_samples

    language = captioner.config.language
    waiting: deque[Sample] = deque()

    def list_questions() -> Iterator[CaptionItem]:
        for sample in read_samples(source):
            waiting.append(sample)
            if not (only_missing and sample.captions.get(language)):
                yield CaptionItem(sample.id, sample.kind, sample.media)

    def list_answered() -> Iterator[Sample]:
        for caption in captioner.caption(list_questions()):
            yield from list_left(caption.id)
            sample = waiting.popleft()
            for name in spent:
                spent[name] += getattr(caption, name)
            move(counts["captioned"] + counts["left"], 0, "asking")
            if caption.text is not None:
                counts["captioned"] += 1
                yield replace(sample, captions={**sample.captions, language: caption.text})
                continue
            reason = caption.reason.split(":")[0]
            counts[reason] = counts.get(reason, 0) + 1
            if not drop_uncaptioned:
                yield sample
        yield from list_left(None)

    def list_left(until: str | None) -> Iterator[Sample]:
        while waiting and waiting[0].id != until:
            counts["left"] += 1
            yield waiting.popleft()

    write_samples(target, list_answered())


def _curate(options: CurateImages | CurateVideos, kind: Literal["image", "video"], thresholds: Thresholds, embed: bool) -> None:
    from openemu3.curation.pipeline import Run, RunConfig, ScoreConfig, decide_all, score_items, write_manifest
    from openemu3.curation.sources import SourceConfig

    began = time.monotonic()
    if not options.sources:
        raise InputError("no source was given; name at least one folder, file or URL")
    if not options.no_aesthetic and not (options.aesthetic_clip and options.aesthetic_head):
        from openemu3.curation.clip_scores import AESTHETIC_CLIP, AESTHETIC_HEAD

        raise InputError(
            f"the aesthetic step needs two models: fetch {AESTHETIC_CLIP} and name its folder with --aesthetic-clip; fetch "
            f"{AESTHETIC_HEAD}, convert it with recipes/convert_score_weights.py and name it with --aesthetic-head; "
            "or leave the step out with --no-aesthetic"
        )
    score = ScoreConfig(
        aesthetic_clip=None if options.no_aesthetic else _to_text(options.aesthetic_clip),
        aesthetic_head=None if options.no_aesthetic else _to_text(options.aesthetic_head),
        hps_clip=_to_text(options.hps_clip),
        hps_weights=_to_text(options.hps_weights),
        mps_weights=_to_text(options.mps_weights),
        text=not options.no_text,
        embed=embed,
        max_bytes=options.max_megabytes << 20,
        seconds_per_file=options.seconds_per_file,
        device=choose_device(options.device),
    )
    source = SourceConfig(
        kind=kind,
        language=options.language,
        roots=tuple(str(root) for root in options.root),
        caption_column=options.caption_column,
        media_column=options.media_column,
        id_column=options.id_column,
    )
    run = Run.open(options.output, RunConfig(options.sources, source, score, options.rows_per_part))
    with show_progress("listing") as move:
        report = _make_mover(move)
        if write_manifest(run, report) == 0:
            raise InputError(f"there are no {kind}s in {', '.join(options.sources)}")
        score_items(run, options.runner, options.ray_address, options.workers, report)
    decide_all(run, thresholds)
    _finish(run, True, options.validation_share, options.source_name, options.json, began)


def _finish(run: Run, with_samples: bool, validation_share: float, source_name: str, as_json: bool, began: float) -> None:
    """Samples and report, and a line for each step."""
    from openemu3.curation.pipeline import SampleConfig, count_samples, write_samples
    from openemu3.curation.report import write_report
    from openemu3.data.samples import write_samples as write_file

    files: list[Path] = []
    if with_samples:
        with show_progress("writing samples") as move:
            config = SampleConfig(validation_share=validation_share, source=source_name)
            files = write_samples(run, config, write_file, _make_mover(move))
    report = write_report(run)
    lines = [f"{report['kept']} of {report['rows']} kept; {run.folder / 'report.html'}"]
    for step in report["funnel"]:
        for reason, count in step["dropped"].items():
            lines.append(f"  {count:>8}  {step['step']}: {reason}")
    lines.extend(str(path) for path in files)
    left_out = report["kept"] - count_samples(files) if with_samples else 0
    if left_out:
        lines.append(
            f"{left_out} of those kept are not among the samples: their files have changed or cannot be read since they were scored; "
            f"to try again, remove {run.folder / 'samples'} and give emu3 curate report {run.folder} --samples"
        )
    answer: dict[str, Any] = {
        "folder": str(run.folder),
        "kept": report["kept"],
        "rows": report["rows"],
        "funnel": report["funnel"],
        "files": [str(path) for path in files],
        "left_out": left_out,
        "report": str(run.folder / "report.html"),
        "seconds": round(time.monotonic() - began, 3),
    }
    print_answer(as_json, "\n".join(lines), answer)


def _make_mover(move: MoveBar) -> Any:
    return lambda done, total, title: move(done, total or done, title)


def _to_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@dataclass(frozen=True)
class Curate:
    """Filter pictures and films as the paper does, into samples for `emu3 tokenize`, with a report of what was dropped and why."""

    what: (
        Annotated[CurateImages, subcommand("images")]
        | Annotated[CurateVideos, subcommand("videos")]
        | Annotated[CurateCaptions, subcommand("captions")]
        | Annotated[CurateRepresentatives, subcommand("representatives")]
        | Annotated[CurateReport, subcommand("report")]
    )

    def run(self) -> None:
        self.what.run()
