"""The columns of scores, as steps of a Daft dataframe: look at each file in a guarded process, ask the CLIP models.

In: a dataframe of manifest rows. Out: the same with one row for each picture or clip, and its scores. The surprising thing: nothing of a
file travels but numbers and a thumbnail, and where CLIP models are asked a small copy, so that the largest files take no more memory.

Each step is a Daft class: on a cluster an actor; natively one instance in this process, which Daft calls from a thread for each core.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
from dataclasses import asdict, fields
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from openemu3.curation.clip_scores import AestheticPredictor, HumanPreference, MultiDimensionalPreference
from openemu3.curation.engine import Runner
from openemu3.curation.guard import Crashed, Guard, TookTooLong
from openemu3.curation.sources import Item, Kind
from openemu3.records import InputError

if TYPE_CHECKING:
    from openemu3.curation.pipeline import RunConfig, ScoreConfig

_WHOLE_NUMBERS = ("num_bytes", "width", "height", "num_pictures", "pixels_height", "pixels_width", "num_rows", "start_frame", "end_frame")
# Items that go from step to step together. Small, since their pictures are in memory.
_ITEMS_AT_ONCE = 4
_PICTURES_AT_ONCE = 16


def add_scores(daft: ModuleType, frame: Any, config: RunConfig, runner: Runner, workers: int | None) -> Any:
    """frame: manifest parts. Returns it with the columns of SCORES_SCHEMA, `num_rows` (rows of the same item), part and index.

    Raises InputError for models that cannot be loaded, before anything is worked on.
    """
    load_models(config.score)
    kind = daft.DataType
    number, text, data = kind.float64(), kind.string(), kind.binary()
    looked = {
        "reason": text,
        "detail": text,
        "sha256": text,
        "hash": text,
        **dict.fromkeys(_WHOLE_NUMBERS, kind.int64()),
        **dict.fromkeys(("start", "seconds", "fps", "colour_spread", "contrast", "motion", "text_coverage"), number),
        **dict.fromkeys(("seconds_read", "seconds_decode", "seconds_measure", "seconds_text"), number),
        "pixels": data,
        "thumbnail": data,
    }
    processes = {"use_process": False} if runner == "native" else {"max_concurrency": workers or 1}

    @daft.cls(**processes)
    class Look:
        def __init__(self, score: ScoreConfig, media_kind: str) -> None:
            self.look = FileInspector(score, media_kind, workers if runner == "native" else 1)

        @daft.method.batch(return_dtype=kind.list(kind.struct(looked)), batch_size=_ITEMS_AT_ONCE)
        def __call__(self, *columns: Any) -> list[list[dict[str, Any]]]:
            return [self.look(dict(zip(_ITEM_COLUMNS, values, strict=True))) for values in zip(*map(_to_list, columns), strict=True)]

    @daft.cls(gpus=1 if config.score.device == "cuda" else 0, **processes)
    class AskClip:
        def __init__(self, score: ScoreConfig) -> None:
            self.models, self.embed, self.kind = load_models(score), score.embed, config.source.kind

        @daft.method.batch(
            return_dtype=kind.struct(
                {**dict.fromkeys(("aesthetic", "hps", "mps", "seconds_clip"), number), "embedding": kind.list(kind.float32())}
            ),
            unnest=True,
            batch_size=_PICTURES_AT_ONCE,
        )
        def __call__(self, *columns: Any) -> list[dict[str, Any]]:
            return ask_clip(self.models, self.embed, self.kind, list(zip(*map(_to_list, columns), strict=True)))

    col = daft.col
    frame = frame.with_column("looked", Look(config.score, config.source.kind)(*(col(name) for name in _ITEM_COLUMNS))).explode("looked")
    frame = frame.select(*(col(name) for name in frame.column_names if name != "looked"), daft.functions.unnest(col("looked")))
    if any(load_models(config.score)):
        asked = AskClip(config.score)(*(col(name) for name in ("pixels", "num_pictures", "pixels_height", "pixels_width", "captions")))
        frame = frame.select(*(col(name) for name in frame.column_names), asked)
    return frame.exclude("pixels", "num_pictures", "pixels_height", "pixels_width")


_ITEM_COLUMNS = tuple(f.name for f in fields(Item) if f.name != "captions")


def _to_list(series: Any) -> list[Any]:
    values: list[Any] = series.to_pylist()
    return values


class FileInspector:
    """Looks at files, each in a child process that is killed when it takes too long: one row for each picture or clip in them.

    workers  child processes at most; None: as many as there are threads that call it at the same time.
    """

    def __init__(self, score: ScoreConfig, kind: str, workers: int | None = None) -> None:
        self._function = "openemu3.curation.inspection:inspect_image" if kind == "image" else "openemu3.curation.films:inspect_video"
        self._prepare = "openemu3.curation.inspection:load_detector" if score.text else ""
        self._seconds = score.seconds_per_file * (1 if kind == "image" else 10)
        self._limits = {name: getattr(score, name) for name in ("max_bytes", "working_side", "thumbnail_side", "text")}
        self._limits["keep_pixels"] = any((score.aesthetic_clip, score.hps_weights, score.mps_weights))
        self._idle: queue.LifoQueue[Guard] = queue.LifoQueue()
        self._turns = threading.BoundedSemaphore(workers) if workers else contextlib.nullcontext()

    def __call__(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        if item["refused"]:
            # What follows the colon is different for each file, and a reason is what files are counted by.
            return [{"reason": item["refused"].partition(":")[0], "detail": f"{item['id']}: {item['refused']}", "num_rows": 1}]
        with self._turns:
            try:
                guard = self._idle.get_nowait()
            except queue.Empty:
                guard = Guard(self._function, self._seconds, self._prepare)
            try:
                return self._look(guard, item)
            finally:
                self._idle.put(guard)

    @property
    def num_processes(self) -> int:
        """Child processes that wait for the next file."""
        return self._idle.qsize()

    def _look(self, guard: Guard, item: dict[str, Any]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        try:
            answer, payload = guard.call({"item": item, **self._limits})
        except TookTooLong as error:
            return [{"reason": "time limit", "detail": str(error), "seconds_decode": time.perf_counter() - began, "num_rows": 1}]
        except Crashed as error:
            return [{"reason": "decoder crashed", "detail": str(error), "seconds_decode": time.perf_counter() - began, "num_rows": 1}]
        except InputError as error:
            return [{"reason": "unreadable", "detail": str(error), "num_rows": 1}]
        rows, view = [], payload
        for row in answer["rows"]:
            pixels, thumbnail = row.pop("pixels_length", 0), row.pop("thumbnail_length", 0)
            if thumbnail:
                row |= {"pixels": bytes(view[:pixels]) or None, "thumbnail": bytes(view[pixels : pixels + thumbnail])}
                view = view[pixels + thumbnail :]
            rows.append({"reason": "", "detail": "", **row, "num_rows": len(answer["rows"])})
        return rows


Models = tuple[AestheticPredictor | None, HumanPreference | None, MultiDimensionalPreference | None]


def load_models(score: ScoreConfig) -> Models:
    """The CLIP models that are wanted. Raises InputError as they do. Loaded once in a process."""
    return _load_models(**{name: value for name, value in asdict(score).items() if name in _MODEL_FIELDS})


_MODEL_FIELDS = ("aesthetic_clip", "aesthetic_head", "hps_clip", "hps_weights", "mps_weights", "device")


@lru_cache(maxsize=1)
def _load_models(
    aesthetic_clip: str | None,
    aesthetic_head: str | None,
    hps_clip: str | None,
    hps_weights: str | None,
    mps_weights: str | None,
    device: str,
) -> Models:
    return (
        AestheticPredictor.load(aesthetic_clip, aesthetic_head, device) if aesthetic_clip and aesthetic_head else None,
        HumanPreference.load(hps_clip, hps_weights, device) if hps_clip and hps_weights else None,
        MultiDimensionalPreference.load(hps_clip, mps_weights, device) if hps_clip and mps_weights else None,
    )


def ask_clip(models: Models, embed: bool, kind: Kind, rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """rows: (pixels, num_pictures, height, width, captions) -> the scores of each; of several pictures in a row the lowest, the mean
    feature, and for prompts the middle picture. pixels: uint8 RGB of a picture; of a clip a JPEG of its frames, one above the other."""
    aesthetic, hps, mps = models
    began = time.perf_counter()
    scores: list[dict[str, Any]] = [{} for _ in rows]
    owners, pictures = [], []
    for index, (pixels, count, height, width, _) in enumerate(rows):
        if pixels:
            frames = np.asarray(Image.open(io.BytesIO(pixels), formats=("JPEG",))) if kind == "video" else np.frombuffer(pixels, np.uint8)
            for frame in frames.reshape(count, height, width, 3):
                owners.append(index)
                pictures.append(Image.fromarray(frame))
    if aesthetic is not None and pictures:
        features = aesthetic.clip.embed_pictures(pictures)
        for owner, score in zip(owners, aesthetic.score_embeddings(features), strict=True):
            scores[owner]["aesthetic"] = min(score, scores[owner].get("aesthetic", score))
        if embed:
            for owner in set(owners):
                mean = features[[position for position, of in enumerate(owners) if of == owner]].mean(0)
                scores[owner]["embedding"] = (mean / mean.norm()).cpu().tolist()
    for name, model in (("hps", hps), ("mps", mps)):
        if model is None:
            continue
        for index, (pixels, count, _, _, captions) in enumerate(rows):
            caption = next((text for _, text in _to_pairs(captions) if text), None)
            if pixels and caption:
                middle = pictures[owners.index(index) + count // 2]
                scores[index][name] = model.score([middle], [caption])[0]
    seconds = (time.perf_counter() - began) / max(1, len(rows))
    return [{"aesthetic": None, "hps": None, "mps": None, "embedding": None, **score, "seconds_clip": seconds} for score in scores]


def _to_pairs(captions: Any) -> list[tuple[str, str]]:
    """A cell of a map column, whichever way the engine hands it out."""
    return list(captions.items()) if isinstance(captions, dict) else [(pair[0], pair[1]) for pair in captions or []]
