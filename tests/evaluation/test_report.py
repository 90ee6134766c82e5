"""The report on a small world of painted shapes: who paints the right thing scores full marks, who paints anything scores chance."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from rich.console import Console
from torch import Tensor

from openemu3.data.samples import write_samples
from openemu3.evaluation.classifiers import embed_pictures, find_nearest, train_classifier
from openemu3.evaluation.image_generation import TONES, Judges, choose_candidates, choose_pool, draw_samples, judge_drawings, score_drawings
from openemu3.evaluation.report import (
    ReportConfig,
    build_report_tables,
    choose_sets,
    read_pictures,
    read_windows,
    run_report,
    train_judges,
    write_sheet,
)
from openemu3.evaluation.understanding import CaptionParser, describe_pictures, score_descriptions
from openemu3.evaluation.video_generation import compute_frame_errors, score_continuations
from openemu3.generation.tasks import Emu3, TaskDefaults
from openemu3.media import from_pil, read_image, to_pil
from openemu3.model.transformer import TransformerConfig, build_transformer
from openemu3.records import InputError, Sample
from openemu3.tokenization.lpips import LPIPS
from openemu3.tokenization.sequence import Vocabulary
from openemu3.tokenization.text import TextTokenizer, train_text_tokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

NUM_CONCEPTS = 24
SKIN = {"": 0, "light": 235, "medium-light": 200, "medium": 160, "medium-dark": 110, "dark": 60}


def paint(concept: int, style: str, tone: str, moment: float = 0.0) -> np.ndarray:
    """uint8 [64, 64, 3]: coloured blocks of the concept, plain ("flat") or shaded ("3D"), on a square of the tone."""
    random = np.random.default_rng(concept)
    blocks = random.integers(0, 256, (4, 4, 3)).repeat(8, axis=0).repeat(8, axis=1).astype(float)  # [32, 32, 3]
    if style == "3D":
        blocks *= np.linspace(1.0, 0.2, 32)[:, None, None]
    picture = np.full((64, 64, 3), 255.0)
    if tone:
        picture[8:56, 8:56] = np.array([1.0, 0.85, 0.7]) * SKIN[tone]
    left = 16 + round(8 * moment)
    picture[16:48, left : left + 32] = blocks
    return picture.round().clip(0, 255).astype(np.uint8)


def encode(frames: list[np.ndarray], fps: int = 8) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (PIL.fromarray(frame) for frame in frames)
    more = {"save_all": True, "append_images": rest, "duration": 1000 // fps} if rest else {}
    first.save(buffer, "WEBP", lossless=True, **more)
    return buffer.getvalue()


def make_sample(concept: int, style: str, tone: str, split: str) -> Sample:
    name, name_zh = f"thing {concept:02d}", f"物 {concept:02d}"
    captions = {
        "en": f"{style} {name}" + (f", {tone} skin tone" if tone else ""),
        "zh": f"{style} 的 {name_zh}" + (f"，{tone} 肤色" if tone else ""),
    }
    attributes = {"concept": name, "concept_zh": name_zh, "style": style, "tone": tone}
    if style == "animated":
        moments = np.abs(np.linspace(-1, 1, 24))
        return Sample(f"{style}/{concept}", "video", encode([paint(concept, "3D", "", m) for m in moments]), captions, attributes, split)
    return Sample(f"{style}/{concept}/{tone}", "image", encode([paint(concept, style, tone)]), captions, attributes, split)


def make_world() -> Iterator[Sample]:
    for concept in range(NUM_CONCEPTS):
        unseen = concept % 8 == 7
        yield make_sample(concept, "3D", "", "heldout_picture" if unseen else "train")
        yield make_sample(concept, "flat", "", "heldout_picture" if unseen else "heldout_combination" if concept % 8 == 3 else "train")
        if concept % 2 == 0:
            for number, tone in enumerate(TONES):
                yield make_sample(concept, "3D", tone, "heldout_combination" if number == concept // 2 % 5 else "train")


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_samples(folder / "images.parquet", make_world())
    write_samples(folder / "videos.parquet", (make_sample(c, "animated", "", "heldout_video" if c < 1 else "train") for c in range(5)))
    return folder


@pytest.fixture(scope="module")
def world(world_folder: Path) -> tuple[list[Sample], Tensor]:
    return read_pictures(world_folder / "images.parquet")


@pytest.fixture(scope="module")
def judges(world: tuple[list[Sample], Tensor], measuring_weights: Path) -> Judges:
    samples, pixels = world
    return train_judges(samples, pixels, LPIPS("alex", measuring_weights / "lpips_alex.safetensors"), num_steps=50)


class MasterPainter:
    """Paints the very picture that a caption is of, slightly moved."""

    def __init__(self, samples: list[Sample]) -> None:
        self.pictures = {caption: sample.media for sample in samples for caption in sample.captions.values()}

    def draw(self, prompt: list[str], *, seed: int = 0) -> list[list[PIL.Image]]:
        return [to_pil(read_image(self.pictures[text]).roll(1, dims=2)) for text in prompt]


class AnyPainter:
    """Paints some picture of the world, whatever was asked."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def draw(self, prompt: list[str], *, seed: int = 0) -> list[list[PIL.Image]]:
        random = np.random.default_rng(seed)
        return [to_pil(self.pixels[int(random.integers(len(self.pixels)))]) for _ in prompt]


def score(drawn: Tensor, ceiling: Tensor, *judged) -> dict:
    return score_drawings(judge_drawings({"drawn": drawn, "ceiling": ceiling}, *judged, num_candidates=5))


def test_the_right_pictures_are_recognised_and_any_pictures_are_not(world: tuple[list[Sample], Tensor], judges: Judges) -> None:
    samples, pixels = world
    wanted = [index for index, sample in enumerate(samples) if sample.split == "heldout_combination"]
    asked = [samples[index] for index in wanted]
    master = draw_samples(MasterPainter(samples), asked, language="zh")
    report = score(master, pixels[wanted], wanted, samples, pixels, judges)
    for measure in ("retrieval", "version"):
        assert report[measure]["drawn"]["mean"] == 1 and report[measure]["ceiling"]["mean"] == 1
    assert report["style"]["drawn"]["mean"] > 0.9 and report["tone"]["drawn"]["mean"] > 0.6
    assert report["tone"]["drawn"]["count"] == sum(bool(sample.attributes["tone"]) for sample in asked) < len(asked)
    assert report["tone_within_one"]["drawn"]["mean"] >= report["tone"]["drawn"]["mean"]

    anything = score(draw_samples(AnyPainter(pixels), asked), pixels[wanted], wanted, samples, pixels, judges)
    assert anything["retrieval"]["drawn"]["mean"] < 0.6 and anything["version"]["drawn"]["mean"] < 0.7
    assert anything["retrieval"]["ceiling"] == report["retrieval"]["ceiling"]


def test_the_right_concept_in_the_wrong_version_is_told_apart(world: tuple[list[Sample], Tensor], judges: Judges) -> None:
    samples, pixels = world
    flat = [index for index, sample in enumerate(samples) if sample.attributes["style"] == "flat"]
    shaded = [index - 1 for index in flat]
    assert [samples[index].attributes["concept"] for index in shaded] == [samples[index].attributes["concept"] for index in flat]
    report = score(pixels[shaded], pixels[flat], flat, samples, pixels, judges)
    assert report["version"]["drawn"]["mean"] == 0 and report["style"]["drawn"]["mean"] < 0.2
    assert report["retrieval"]["drawn"]["mean"] > 0.5 and "tone" not in report


def test_candidates_differ_from_the_sample_in_the_concept_alone(world: tuple[list[Sample], Tensor]) -> None:
    samples, _ = world
    sample = next(sample for sample in samples if sample.id == "3D/4/dark")
    pool = choose_pool(samples, "3D", "dark", 9)
    assert len(set(pool)) == 9 and pool == choose_pool(samples, "3D", "dark", 12)[:9]
    assert {(samples[index].attributes["style"], samples[index].attributes["tone"]) for index in pool} == {("3D", "dark")}
    assert pool != choose_pool(samples, "3D", "dark", 9, seed=1)
    chosen = choose_candidates(sample, samples, pool, num_candidates=6)
    concepts = [samples[pool[place]].attributes["concept"] for place in chosen]
    assert len(chosen) == len(set(concepts)) == 5 and sample.attributes["concept"] not in concepts
    assert chosen == choose_candidates(sample, samples, pool, num_candidates=6)
    assert chosen != choose_candidates(sample, samples, pool, num_candidates=6, seed=1)
    whole = choose_pool(samples, "3D", "dark", 100)
    # Twelve are dark; the rest of a larger draw comes from the other tones of the style, and never from another style.
    filled = [samples[whole[place]].attributes for place in choose_candidates(sample, samples, whole, num_candidates=16)]
    assert [attributes["tone"] for attributes in filled[:11]] == ["dark"] * 11
    assert all(attributes["tone"] != "dark" and attributes["style"] == "3D" for attributes in filled[11:])
    with pytest.raises(InputError, match="others of its style; 499 are needed"):
        choose_candidates(sample, samples, whole, num_candidates=500)


def test_nearest_is_what_lpips_calls_nearest(world: tuple[list[Sample], Tensor], judges: Judges) -> None:
    _, pixels = world
    query = pixels[5:6] * 0.9
    distances = [float(judges.lpips(query, pixels[index : index + 1])) for index in range(20)]
    assert find_nearest(embed_pictures(judges.lpips, query)[0], embed_pictures(judges.lpips, pixels[:20])) == int(np.argmin(distances))


def test_classifier_is_the_same_for_the_same_seed_and_leaves_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(40, 3, 32, 32, generator=generator) - 0.5
    pixels[::2] += 0.4
    labels = ["bright", "dark"] * 20
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = train_classifier(pixels, labels, num_steps=30, batch_size=16)
    assert torch.equal(torch.rand(3), expected)
    two = train_classifier(pixels, labels, num_steps=30, batch_size=16)
    assert torch.equal(one(pixels), two(pixels))
    assert np.mean([a == b for a, b in zip(one.classify(pixels), labels, strict=True)]) > 0.9
    with pytest.raises(InputError, match="two different ones"):
        train_classifier(pixels, ["bright"] * 40)


def test_descriptions_are_taken_apart(world: tuple[list[Sample], Tensor]) -> None:
    samples, _ = world
    parser = CaptionParser(samples)
    by_id = {sample.id: sample for sample in samples}
    asked = [by_id[name] for name in ("3D/4/dark", "3D/4/medium-dark", "flat/5/", "3D/6/", "flat/1/")]
    texts = ["3D thing 04, dark skin tone", "3D thing 04, dark skin tone", " flat 的 物 05", "flat thing 06", "flat teapot"]
    report = score_descriptions(texts, asked, parser)
    shares = {measure: report[measure]["mean"] for measure in ("caption", "name", "style", "tone", "real_name")}
    assert shares == pytest.approx({"caption": 0.4, "name": 0.8, "style": 0.8, "tone": 0.5, "real_name": 0.8})
    broken = Sample("x", "image", b"x", {"en": "3D lamp"}, {"concept": "teapot"}, "train")
    with pytest.raises(InputError, match="'teapot'"):
        CaptionParser([broken])


def test_every_caption_of_the_world_is_right(world: tuple[list[Sample], Tensor]) -> None:
    class Reader:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def describe(self, media: tuple[PIL.Image, ...], *, max_new_tokens: int = 64) -> list[str]:
            self.seen += [from_pil(picture)[:, 0] for picture in media]
            return [sample.captions["zh"] for sample in samples]

    samples, pixels = world
    reader = Reader()
    report = score_descriptions(describe_pictures(reader, pixels), samples, CaptionParser(samples))
    assert all(report[measure]["mean"] == 1 for measure in ("caption", "name", "style", "tone", "real_name"))
    assert torch.equal(torch.stack(reader.seen), pixels)


def test_sets_are_what_they_are_called(world: tuple[list[Sample], Tensor]) -> None:
    samples, _ = world
    sets = choose_sets(samples, ReportConfig(max_pictures=7, seed=3))
    assert list(sets) == ["seen", "new style", "new tone", "new concept"]
    assert [len(indices) for indices in sets.values()] == [7, 3, 7, 6]
    assert {samples[index].split for index in sets["seen"]} == {"train"}
    assert {samples[index].attributes["style"] for index in sets["new style"]} == {"flat"}
    assert all(samples[index].attributes["tone"] for index in sets["new tone"])
    assert len(choose_sets(samples, ReportConfig(max_pictures=None))["seen"]) == 12


def test_frame_errors_by_hand(judges: Judges) -> None:
    actual = torch.full((1, 3, 2, 32, 32), -1.0)
    predicted = actual.clone()
    predicted[:, :, 1] += 51 / 127.5  # 0.2 of the range of 0 to 1
    errors = compute_frame_errors(predicted, actual, judges.lpips)
    assert errors["mse"].tolist()[0] == pytest.approx([0, 0.04]) and errors["lpips"][0, 0] == 0 < errors["lpips"][0, 1]
    with pytest.raises(InputError, match="must agree"):
        compute_frame_errors(predicted[:, :, :1], actual, judges.lpips)


def test_continuations_are_compared_with_repeating(world_folder: Path, judges: Judges) -> None:
    clips = [make_sample(concept, "animated", "", "heldout_video") for concept in range(3)]
    windows, names = read_windows(clips, 8, 16)
    assert windows.shape == (6, 3, 16, 64, 64) and names == [name for clip in clips for name in (clip.id, clip.id)]
    assert torch.equal(windows[0, :, 8:], windows[1, :, :8])
    actual = windows[:, :, 8:]
    repeat = windows[:, :, 7:8].expand_as(actual)
    report = score_continuations({"repeat": repeat, "oracle": actual, "worse": -actual}, actual, names, judges.lpips)
    assert (report["num_clips"], report["num_animations"], report["num_frames"]) == (6, 3, 8)
    for measure in ("mse", "lpips"):
        oracle, worse = report[measure]["oracle"], report[measure]["worse"]
        assert oracle["mean"]["mean"] == 0 and oracle["better"]["mean"] == 1 and oracle["difference"]["high"] < 0
        assert worse["better"]["mean"] == 0 and worse["difference"]["low"] > 0
        by_frame = report[measure]["repeat"]["by_frame"]
        assert len(by_frame) == 8 and by_frame[0] < by_frame[-1]
        assert np.mean(by_frame) == pytest.approx(report[measure]["repeat"]["mean"]["mean"])
    with pytest.raises(InputError, match="'repeat'"):
        score_continuations({"oracle": actual}, actual, names, judges.lpips)
    with pytest.raises(InputError, match="no held-out clip has 32 frames"):
        read_windows(clips, 8, 32)


def test_the_whole_report_of_an_untrained_model(world_folder: Path, tmp_path: Path, measuring_cache: Path) -> None:
    torch.manual_seed(0)
    vision_tokenizer = VisionTokenizer(
        VisionTokenizerConfig(codebook_size=64, channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1)
    )
    text_tokenizer = TextTokenizer.from_bytes(train_text_tokenizer(["3D thing, dark skin tone"] * 3, 270))
    vocabulary = Vocabulary(num_text=270, num_codes=64)
    config = TransformerConfig(vocabulary.size, 32, 64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, max_positions=2048)
    transformer = build_transformer(config, torch.Generator().manual_seed(0)).eval()
    defaults = TaskDefaults(prompt_suffix="", negative_prompt="", question=None, fps=8.0, clip_frames=16, min_pixels=4096, max_pixels=4096)
    emu3 = Emu3(transformer, vision_tokenizer, text_tokenizer, vocabulary, defaults, image_area=64 * 64)
    heard: list[tuple[int, int, str]] = []
    report = run_report(
        emu3,
        ReportConfig(world_folder, max_pictures=2, num_candidates=4, sheets=tmp_path, classifier_steps=5),
        lambda done, total, what: heard.append((done, total, what)),
    )
    assert list(report["text_to_picture"]) == list(report["picture_to_text"]) == ["seen", "new style", "new tone", "new concept"]
    assert report["text_to_picture"]["new tone"]["tone"]["drawn"]["count"] == 2
    assert report["picture_to_text"]["seen"]["caption"]["mean"] == 0
    assert set(report["continuation"]["mse"]) == {"model", "model, no words", "repeat", "repeat, coded", "coded future"}
    assert report["continuation"]["num_clips"] == 2
    assert report["reconstruction"]["held-out clips"]["psnr"]["count"] == 2 * 16
    assert [done for done, _, _ in heard] == list(range(len(heard))) and {total for _, total, _ in heard} == {len(heard)}
    json.dumps(report, allow_nan=False)
    for table in build_report_tables(report):
        Console(quiet=True, width=160).print(table)
    assert {path.name for path in tmp_path.iterdir()} == {
        "seen.png",
        "new_style.png",
        "new_tone.png",
        "new_concept.png",
        "continuation.png",
    }


def test_sheet_pairs_pictures(tmp_path: Path) -> None:
    kinds = [torch.full((3, 3, 8, 8), value) for value in (-1.0, 0.0)]
    write_sheet(tmp_path / "a" / "sheet.png", *kinds, columns=2)
    sheet = read_image(tmp_path / "a" / "sheet.png")[0, 0]
    assert sheet.shape == (2 * (8 + 8 + 4), 16)
    assert sheet[0, 0] == -1 and abs(sheet[8, 0]) < 0.01 and sheet[20, 0] == -1 and sheet[20, 15] == 1
