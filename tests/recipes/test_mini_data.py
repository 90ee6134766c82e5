"""The mini recipe's data: names are worded right, pictures are what their captions say, and nothing held out is trained on."""

import io
import itertools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import draw_sheet
import emoji_table
import fetch_data
import numpy as np
import prepare_samples
import pytest
import train_text
import tyro
from emoji_splits import HELDOUT_COMBINATION, HELDOUT_PICTURE, HELDOUT_VIDEO, TRAIN, PictureKey, SplitSizes, split_pictures, split_videos
from emoji_table import TONES, Emoji, name_concept, name_concept_zh, normalise_hexcode, read_emoji_table, write_captions
from fluent_faults import find_shown
from PIL import Image

from openemu3.data.samples import read_samples
from openemu3.media import read_video, to_pil
from openemu3.records import InputError, Sample
from openemu3.tokenization.text import TextTokenizer

SCRIPTS = Path(fetch_data.__file__).parent
SMALL = SplitSizes(pictures=1, styles=1, tones=0, videos=1)


# ------------------------------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("grinning face", "grinning face"),
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("person: beard", "person with beard"),
        ("keycap: #", "keycap #"),
        ("family: man, woman, boy", "family of man, woman and boy"),
        ("family: man, boy", "family of man and boy"),
        ("kiss: woman, man", "kiss of woman and man"),
        ("couple with heart: man, man", "couple with heart of man and man"),
        ("person running: facing right", "person running, facing right"),
        ("one o’clock", "one o'clock"),
        ("Japanese “here” button", 'Japanese "here" button'),
        ("Mrs. Claus", "Mrs. Claus"),
    ],
)
def test_english_names(label: str, words: str) -> None:
    assert name_concept(label) == words


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("嘿嘿", "嘿嘿"),
        ("男人: 红发", "红发男人"),
        ("女人: 秃顶", "秃顶女人"),
        ("按键: 5", "按键 5"),
        ("家庭: 男人女人男孩", "家庭，男人女人男孩"),
        ("跑步者: 面向右边", "跑步者，面向右边"),
    ],
)
def test_chinese_names(label: str, words: str) -> None:
    assert name_concept_zh(label) == words


@pytest.mark.parametrize(
    ("tone", "style", "english", "chinese"),
    [
        ("", "3D", "3D waving hand", "立体 挥手"),
        ("dark", "3D", "3D waving hand, dark skin tone", "立体 挥手，深肤色"),
        ("medium-light", "flat", "flat waving hand, medium-light skin tone", "扁平 挥手，中等偏浅肤色"),
        ("", "animated", "animated waving hand", "动画 挥手"),
        ("", "line", "line waving hand", "线条 挥手"),
    ],
)
def test_captions(tone: str, style: str, english: str, chinese: str) -> None:
    emoji = Emoji("1F44B", "waving hand", "waving hand", "挥手", tone, "people-body", "hand-fingers-open")
    assert write_captions(emoji, style) == {"en": english, "zh": chinese}


def test_the_table_reads_tones_and_leaves_out_flags_and_mixed_tones(excerpt_packages: Path) -> None:
    table = read_emoji_table(excerpt_packages / prepare_samples.EMOJIBASE)
    hand = [emoji.tone for emoji in table.values() if emoji.concept == "waving hand"]
    assert hand == ["", *TONES]
    assert table["1F44B-1F3FF"] == Emoji("1F44B-1F3FF", "waving hand", "waving hand", "挥手", "dark", "people-body", "hand-fingers-open")
    couple = [emoji for emoji in table.values() if emoji.concept == "woman and man holding hands"]
    assert [emoji.tone for emoji in couple] == ["", *TONES]  # 20 more in emojibase have two tones
    assert {"flag: China", "regional indicator A"}.isdisjoint(emoji.label for emoji in table.values())
    assert table["1F3C1"].concept == "chequered flag"  # drawn by Microsoft, unlike countries' flags
    assert table["0035-20E3"].concept == "keycap 5"


def test_hexcodes_of_both_spellings_meet() -> None:
    assert normalise_hexcode("35-fe0f-20e3") == normalise_hexcode("0035-20E3") == "0035-20E3"
    assert normalise_hexcode("1f9cf-200d-2640-fe0f") == "1F9CF-200D-2640"


def test_flat_file_names_find_their_emoji(excerpt_packages: Path) -> None:
    table = read_emoji_table(excerpt_packages / prepare_samples.EMOJIBASE)
    names = ["waving-hand-default", "waving-hand-medium-light", "waving-hand-light", "police-car", "police-car-light", "red-apple"]
    names += [
        "person-mage-default",
        "person-mage-dark",
        "stuffedbread-flat",
        "man-deaf-default",
        "one-oclock",
        "man-red-hair-medium",
        "no-emoji",
    ]
    assert emoji_table.find_flat_hexcodes(names, table) == {
        "waving-hand-default": "1F44B",
        "waving-hand-medium-light": "1F44B-1F3FC",
        "waving-hand-light": "1F44B-1F3FB",
        "police-car": "1F693",
        "police-car-light": "1F6A8",
        "red-apple": "1F34E",
        "person-mage-default": "1F9D9",
        "person-mage-dark": "1F9D9-1F3FF",
        "stuffedbread-flat": "1F959",
        "man-deaf-default": "1F9CF-200D-2642",
        "one-oclock": "1F550",
        "man-red-hair-medium": "1F468-1F3FD-200D-1F9B0",
    }


# --------------------------------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def prepared(excerpt_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole recipe on the excerpt."""
    output = tmp_path_factory.mktemp("prepared")
    prepare_samples.main(prepare_samples.Preparation(packages=excerpt_packages, output=output, sizes=SMALL))
    return output


def decode(sample: Sample) -> np.ndarray:
    with Image.open(io.BytesIO(sample.media)) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


@pytest.fixture(scope="module")
def pictures(prepared: Path) -> dict[str, Sample]:
    return {sample.captions["en"]: sample for sample in read_samples(prepared / "images.parquet")}


def test_images_hold_the_pictures_that_have_a_name(pictures: dict[str, Sample], prepared: Path) -> None:
    hands = {f"3D waving hand, {tone} skin tone" for tone in TONES} | {"3D waving hand", "flat waving hand"}
    others = {"3D grinning face", "3D red apple", "3D cat face", "3D keycap 5", "3D ringed planet", "3D deaf man", "3D deaf woman"}
    others |= {"flat red apple", "flat deaf man", "flat deaf woman", "flat police car", "flat police car light", "flat stuffed flatbread"}
    assert set(pictures) == hands | others | {"flat mage", "3D man technologist, medium-light skin tone"}
    extra = {sample.captions["en"] for sample in read_samples(prepared / "styles_extra.parquet")}
    assert extra == {f"flat waving hand, {tone} skin tone" for tone in TONES}


def test_a_sample_says_all_about_its_picture(pictures: dict[str, Sample]) -> None:
    sample = pictures["3D waving hand, dark skin tone"]
    assert (sample.id, sample.kind) == ("3D/1F44B-1F3FF", "image")
    assert sample.attributes == {
        "concept": "waving hand",
        "concept_zh": "挥手",
        "group": "people-body",
        "hexcode": "1F44B-1F3FF",
        "style": "3D",
        "subgroup": "hand-fingers-open",
        "tone": "dark",
    }


def test_skin_is_darker_from_tone_to_tone(pictures: dict[str, Sample], prepared: Path) -> None:
    for style in ("3D", "flat"):
        everything = {sample.captions["en"]: sample for sample in read_samples(prepared / "styles_extra.parquet")} | pictures
        brightness = [decode(everything[f"{style} waving hand, {tone} skin tone"]).mean() for tone in TONES]
        assert brightness == sorted(brightness, reverse=True), style


def test_who_is_deaf_is_the_same_person_in_both_styles(pictures: dict[str, Sample]) -> None:
    def share_of_blue(caption: str) -> float:  # the man wears blue, the woman purple
        red, green, _ = decode(pictures[caption]).astype(int).transpose(2, 0, 1)
        return float((green > red + 40).mean())

    for style in ("3D", "flat"):
        assert share_of_blue(f"{style} deaf man") > 0.1 > share_of_blue(f"{style} deaf woman"), style


def test_pictures_are_on_white_and_fill_the_square(pictures: dict[str, Sample]) -> None:
    for caption, sample in pictures.items():
        pixels = decode(sample)
        assert pixels.shape == (64, 64, 3), caption
        assert (pixels[0] == 255).all(), caption  # transparent in every source
        assert 0.1 < (pixels != 255).any(-1).mean() < 0.95, caption
    planet = (decode(pictures["3D ringed planet"]) < 240).any(-1)  # its file has eight empty rows on top
    rows, columns = np.flatnonzero(planet.any(1)), np.flatnonzero(planet.any(0))
    assert abs((rows[0] + rows[-1]) - 63) <= 2 and abs((columns[0] + columns[-1]) - 63) <= 2


def test_pictures_match_an_independent_reduction(pictures: dict[str, Sample], excerpt_packages: Path) -> None:
    """Alpha over white and an area average, in plain numpy: Lanczos may ring at edges, but not be elsewhere or another colour."""
    source = Path(__file__).parent / "emoji_excerpt" / "3d" / "1f34e.webp"
    with Image.open(source) as picture:
        rgba = np.asarray(picture.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    area = (rgba[..., :3] * alpha + 255 * (1 - alpha)).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(decode(pictures["3D red apple"]) - area).mean() < 2


def test_a_picture_of_another_shape_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (256, 264), "red").save(buffer, "WEBP", lossless=True)
    with pytest.raises(ValueError, match="a picture is 256 x 264 pixels"):
        prepare_samples.draw_picture(buffer.getvalue(), 64)


def test_pictures_are_stored_without_loss() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with Image.open(io.BytesIO(prepare_samples.encode_picture(noise))) as picture:
        assert np.array_equal(np.asarray(picture), noise)


# ------------------------------------------------------------------------------------------------------------------------------------ clips


def test_a_clip_is_every_third_frame(draw_animation) -> None:
    clip = prepare_samples.draw_clip(draw_animation([3 * step for step in range(72)]), 64, 8)
    assert clip.shape == (24, 64, 64, 3)
    assert clip[:, 0, 0, 0].tolist() == [9 * step for step in range(24)]


def test_a_short_loop_plays_again_and_a_long_one_stops_after_three_seconds(draw_animation) -> None:
    short = prepare_samples.draw_clip(draw_animation([4 * step for step in range(50)]), 64, 8)
    assert short[:, 0, 0, 0].tolist() == [4 * (3 * step % 50) for step in range(24)]
    long = prepare_samples.draw_clip(draw_animation([2 * step for step in range(96)]), 64, 8)
    assert long[:, 0, 0, 0].tolist() == [6 * step for step in range(24)]


def test_a_frame_that_stands_longer_counts_for_its_time(draw_animation) -> None:
    levels = [10] * 6 + [20, 30, 40]  # equal frames are stored as one of 252 ms
    clip = prepare_samples.draw_clip(draw_animation(levels), 64, 8)
    assert clip[:6, 0, 0, 0].tolist() == [10, 10, 20, 10, 10, 20]


def test_a_still_picture_is_no_clip() -> None:
    apple = (Path(__file__).parent / "emoji_excerpt" / "3d" / "1f34e.webp").read_bytes()
    assert prepare_samples.draw_clip(apple, 64, 8) is None


def test_clips_come_back_exactly_by_timestamps() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    frames[5:9] = frames[5]
    frames[20:] = frames[20]
    media = prepare_samples.encode_clip(frames, 8)
    pixels, fps = read_video(media, fps=8)
    assert fps == 8
    assert np.array_equal(np.stack([np.asarray(frame) for frame in to_pil(pixels)]), frames)


def test_motion_is_the_mean_difference_of_neighbours() -> None:
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1] = 200
    frames[2] = 250
    assert prepare_samples.measure_motion(frames) == 125.0


def test_videos_hold_what_moves(prepared: Path) -> None:
    clips = {sample.captions["en"]: sample for sample in read_samples(prepared / "videos.parquet")}
    assert set(clips) == {"animated grinning face", "animated waving hand", "animated mage"}  # no still, faint, toned or flag picture
    sample = clips["animated grinning face"]
    assert (sample.id, sample.kind) == ("animated/1F600", "video")
    assert {name: sample.attributes[name] for name in ("style", "tone", "fps", "num_frames")} == {
        "style": "animated",
        "tone": "",
        "fps": "8",
        "num_frames": "24",
    }
    assert read_video(sample.media, fps=8)[0].shape == (3, 24, 64, 64)
    assert float(sample.attributes["motion"]) == 150.0  # 0 and 150 in turn


# ----------------------------------------------------------------------------------------------------------------------------------- splits


def check_picture_splits(splits: dict[PictureKey, str], sizes: SplitSizes) -> None:
    of = defaultdict(set)
    for key, split in splits.items():
        of[split].add(key)
    unseen = {key.concept for key in of[HELDOUT_PICTURE]}
    assert len(unseen) == sizes.pictures
    assert unseen.isdisjoint({key.concept for key in splits if splits[key] != HELDOUT_PICTURE})
    flat = {key.concept for key in of[HELDOUT_COMBINATION] if key.style == "flat"}
    toned = [key for key in of[HELDOUT_COMBINATION] if key.style == "3D"]
    assert len(flat) == sizes.styles and len(toned) == sizes.tones == len({key.concept for key in toned})
    assert {key.style for key in of[HELDOUT_COMBINATION]} == {"3D", "flat"}
    trained = of[TRAIN]
    for concept in flat:  # the style unseen with the concept, the concept seen in the other style
        assert not any((key.concept, key.style) == (concept, "flat") for key in trained)
        assert any((key.concept, key.style, key.tone) == (concept, "3D", "") for key in trained)
    for held in toned:  # the tone unseen with the concept in 3D, all its other tones seen
        assert {key.tone for key in trained if (key.concept, key.style) == (held.concept, "3D")} == {"", *TONES} - {held.tone}
    assert set(Counter(key.tone for key in toned)) == set(TONES)
    assert max(Counter(key.tone for key in toned).values()) - min(Counter(key.tone for key in toned).values()) <= 1


def make_keys() -> list[PictureKey]:
    keys = []
    for number in range(300):
        group = ("people", "animals", "food")[number % 3]
        tones = ("", *TONES) if group == "people" else ("",)
        keys += [PictureKey(f"concept {number}", group, style, tone) for style in ("3D", "flat") for tone in tones]
    return keys


def test_held_out_pictures_and_combinations_are_not_trained_on() -> None:
    for seed in range(5):
        sizes = SplitSizes(pictures=20, styles=30, tones=25, videos=10)
        check_picture_splits(split_pictures(make_keys(), sizes, seed), sizes)


def test_groups_are_held_out_in_proportion() -> None:
    splits = split_pictures(make_keys(), SplitSizes(pictures=30, styles=60, tones=10, videos=5), seed=3)
    unseen = {key for key, split in splits.items() if split == HELDOUT_PICTURE and key.style == "flat" and not key.tone}
    assert Counter(key.group for key in unseen) == {"people": 10, "animals": 10, "food": 10}


def test_splits_depend_on_the_seed_and_not_on_the_order() -> None:
    keys, sizes = make_keys(), SplitSizes(pictures=20, styles=30, tones=25, videos=10)
    once = split_pictures(keys, sizes, seed=1)
    assert split_pictures(keys[::-1], sizes, seed=1) == once
    assert split_pictures(keys, sizes, seed=2) != once


def test_clips_follow_their_pictures() -> None:
    sizes = SplitSizes(pictures=20, styles=30, tones=25, videos=10)
    pictures = split_pictures(make_keys(), sizes, seed=1)
    clips = [PictureKey(f"concept {number}", ("people", "animals", "food")[number % 3], "animated", "") for number in range(0, 300, 2)]
    splits = split_videos(clips, pictures, sizes, seed=1)
    unseen = {key.concept for key, split in pictures.items() if split == HELDOUT_PICTURE}
    assert {key.concept for key, split in splits.items() if split == HELDOUT_PICTURE} == unseen & {key.concept for key in clips}
    held = [key for key, split in splits.items() if split == HELDOUT_VIDEO]
    assert len(held) == sizes.videos
    for key in held:  # its still picture is trained on
        assert pictures[PictureKey(key.concept, key.group, "3D", "")] == TRAIN


def test_too_much_to_hold_out_is_said() -> None:
    with pytest.raises(InputError, match="sizes.tones is 101; only 100 concepts"):
        split_pictures(make_keys(), SplitSizes(pictures=0, styles=0, tones=101, videos=0), seed=0)


def test_the_real_set(real_packages: Path) -> None:
    """Everything but the drawing: 1,598 flat names found, the counts, and the splits of the set that the mini model is trained on."""
    table = read_emoji_table(real_packages / prepare_samples.EMOJIBASE)
    dropped: Counter[str] = Counter()
    sources = prepare_samples.list_sources(real_packages, table, dropped)
    keys = [source.key for source in sources]
    assert len(keys) == len(set(keys)), "two pictures would have the same caption"
    captions = [write_captions(source.emoji, source.style)[language] for source in sources for language in ("en", "zh")]
    assert len(captions) == len(set(captions))
    assert not [caption for caption in captions if re.search(r"[:：“”’]", caption.replace("日文的“", "").replace("”按钮", ""))]
    main = [source for source in sources if prepare_samples.is_main(source)]
    assert Counter(source.style for source in main) == {"3D": 3110, "flat": 1593}
    assert dropped["flat: a country's flag, or people of two skin tones"] == 0  # every flat name was understood
    splits = split_pictures(keys, SplitSizes(), seed=0)
    check_picture_splits(splits, SplitSizes())
    counts = Counter(splits[source.key] for source in main)
    assert counts == {TRAIN: 4313, HELDOUT_COMBINATION: 220, HELDOUT_PICTURE: 170}


@pytest.mark.slow
def test_real_tones_agree_between_styles(real_packages: Path) -> None:
    """In a sample of the concepts, the 3D picture of each tone resembles the flat one of the same tone more than any other's."""
    table = read_emoji_table(real_packages / prepare_samples.EMOJIBASE)
    sources = [source for source in prepare_samples.list_sources(real_packages, table, Counter()) if source.emoji.tone]
    by_name = {(source.style, source.emoji.concept, source.emoji.tone): source for source in sources}
    both = sorted({concept for _, concept, _ in by_name if all((s, concept, t) in by_name for s in ("3D", "flat") for t in TONES)})
    concepts = ["technologist", "woman technologist", "person mountain biking", "deaf man", "deaf woman", *both[::24]]
    chosen = {(source.package, source.member) for key, source in by_name.items() if key[1] in concepts and key[0] != "line"}
    contents = prepare_samples.read_members(real_packages, chosen)

    def measure_tones(style: str, concept: str) -> np.ndarray:
        """Mean colour of each tone's picture, less that of all five: [tone, colour]."""
        drawn = [by_name[style, concept, tone] for tone in TONES]
        colours = np.stack([prepare_samples.draw_picture(contents[s.package, s.member], 64).mean((0, 1)) for s in drawn])
        return colours - colours.mean(0)

    assert len(concepts) > 15
    for concept in concepts:
        solid, flat = measure_tones("3D", concept), measure_tones("flat", concept)
        agreement = {order: float((solid[list(order)] * flat).sum()) for order in itertools.permutations(range(5))}
        assert agreement[0, 1, 2, 3, 4] >= 0.95 * max(agreement.values()), concept


def test_faults_are_of_emoji_that_exist(real_packages: Path) -> None:
    import fluent_faults

    names = {(emoji.concept, emoji.tone) for emoji in read_emoji_table(real_packages / prepare_samples.EMOJIBASE).values()}
    concepts = {concept for concept, _ in names}
    assert {(concept, tone) for _, concept, tone in fluent_faults.WRONG_PICTURES} <= names
    assert fluent_faults.FAINT_TONES | fluent_faults.RIGHTLY_TONED | set(fluent_faults.EXCHANGED_CONCEPTS) <= concepts
    two = {concept for concept in concepts if concept.startswith(fluent_faults.TWO_PEOPLE) and (concept, "dark") in names}
    assert len(two) == 12
    waving = Emoji("1F44B-1F3FC", "waving hand", "waving hand", "挥手", "medium-light", "people-body", "hand-fingers-open")
    assert find_shown(waving, "3D") == ("waving hand", "medium")
    assert find_shown(waving, "flat") == ("waving hand", "medium-light")


# ---------------------------------------------------------------------------------------------------------------------- the scripts as such


def test_the_same_run_gives_the_same_bytes(prepared: Path, excerpt_packages: Path, tmp_path: Path) -> None:
    prepare_samples.main(prepare_samples.Preparation(packages=excerpt_packages, output=tmp_path, sizes=SMALL))
    for name in ("images.parquet", "styles_extra.parquet", "videos.parquet"):
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes(), name


def test_a_missing_package_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="emojibase-data-17.0.0.tgz is not in .*; recipes/mini/fetch_data.py brings it there"):
        prepare_samples.main(prepare_samples.Preparation(("images",), packages=tmp_path, output=tmp_path))


def run_fetch(folder: Path, search_path: str) -> subprocess.CompletedProcess[str]:
    """The script as a user runs it, with the commands of `search_path` alone."""
    command = [sys.executable, str(SCRIPTS / "fetch_data.py"), "--only", "stills", "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": search_path})


def write_npm(folder: Path, script: str) -> None:
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)


def test_fetching_without_npm_is_said(tmp_path: Path) -> None:
    run = run_fetch(tmp_path, "")
    assert run.returncode == 2
    assert run.stderr.startswith("error: npm is not installed") and run.stderr.count("\n") == 1


def test_a_failing_or_lying_npm_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    commands, folder = tmp_path / "bin", tmp_path / "packages"
    commands.mkdir()
    write_npm(commands, 'echo "npm error code E404" >&2; exit 1')
    run = run_fetch(folder, f"{commands}:{os.environ['PATH']}")
    assert (run.returncode, run.stderr) == (2, "error: npm could not fetch emojibase-data@17.0.0 (exit code 1): npm error code E404\n")
    write_npm(commands, "echo other > emojibase-data-17.0.0.tgz")
    run = run_fetch(folder, f"{commands}:{os.environ['PATH']}")
    assert run.returncode == 2 and "is not the published tarball with SHA-256 d01d0e2c" in run.stderr
    assert list(folder.iterdir()) == []


def test_a_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """npm runs in a folder of its own, and recipes/mini_cpu.sh names .cache/npm."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    # What npm does with its fifth argument, the destination, and a tarball of four bytes.
    write_npm(tmp_path / "bin", 'printf 1234 > "$5/scope-some-1.0.0.tgz"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    package = fetch_data.Package("@scope/some", "1.0.0", 4, "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4")
    (path,) = fetch_data.fetch_packages((package,), Path("packages"))
    assert path.read_bytes() == b"1234" and [*(tmp_path / "packages").iterdir()] == [path]


def test_what_is_there_and_whole_is_not_fetched_again(tmp_path: Path) -> None:
    package = fetch_data.Package("@scope/some", "1.0.0", 4, "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4")
    assert package.file_name == "scope-some-1.0.0.tgz"
    (tmp_path / package.file_name).write_bytes(b"1234")
    assert fetch_data.fetch_packages((package,), tmp_path) == [tmp_path / package.file_name]
    (tmp_path / package.file_name).write_bytes(b"1235")
    assert not fetch_data.is_whole(tmp_path / package.file_name, package)


def test_a_text_vocabulary_is_learnt_from_the_training_captions(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (prepared / "images.parquet", prepared / "videos.parquet")
    train_text.main(train_text.TextTraining(samples=files, list_texts=True))
    listed = set(capsys.readouterr().out.splitlines())
    trained = [sample for path in files for sample in read_samples(path, splits=["train"])]
    held = [sample for path in files for sample in read_samples(path) if sample.split != "train"]
    assert len(trained) > 10 and len(held) >= 3
    assert {caption for sample in trained for caption in sample.captions.values()} < listed
    assert {caption for sample in held for caption in sample.captions.values()}.isdisjoint(listed)

    output = tmp_path / "text.tiktoken"
    train_text.main(train_text.TextTraining(samples=files, output=output, num_tokens=330))
    tokenizer = TextTokenizer.from_file(output)
    assert tokenizer.num_tokens == 330
    english = [len(tokenizer.encode(sample.captions["en"])) for sample in trained]
    assert f"training captions, en: {np.mean(english):.2f} tokens on average, {max(english)} at most" in capsys.readouterr().out
    assert tokenizer.decode(tokenizer.encode("a 🐙 that no caption has")) == "a 🐙 that no caption has"


def test_sheets_are_drawn(prepared: Path, tmp_path: Path) -> None:
    draw_sheet.main(draw_sheet.Sheet(prepared / "images.parquet", tmp_path / "stills.png", columns=5, number=10))
    draw_sheet.main(draw_sheet.Sheet(prepared / "videos.parquet", tmp_path / "clips.png"))
    with Image.open(tmp_path / "stills.png") as stills, Image.open(tmp_path / "clips.png") as clips:
        assert stills.size == (5 * 112, 2 * 101)
        assert clips.size == (12 * 64 + 48, 3 * 101)
        assert np.asarray(stills.convert("L")).min() < 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.png", "stills.png"]
    with pytest.raises(InputError, match="has no samples in the splits nowhere"):
        draw_sheet.main(draw_sheet.Sheet(prepared / "videos.parquet", tmp_path / "none.png", splits=("nowhere",)))


@pytest.mark.parametrize("configuration", [fetch_data.Fetching, prepare_samples.Preparation, train_text.TextTraining, draw_sheet.Sheet])
def test_help(configuration: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tyro.cli(configuration, args=["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out
