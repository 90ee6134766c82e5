"""Selection for quality tuning: the common scale against SciPy's, limits, shares, what is written, and the command."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openemu3.cli import main
from openemu3.data.samples import SAMPLES_SCHEMA
from openemu3.data.selection import SCORES_TYPE, KindRule, SelectionConfig, choose_samples, scale_scores, select_samples
from openemu3.media import encode_animation, from_pil
from openemu3.records import InputError

NAMES = ("hps", "mps", "aesthetic")
ANY_SIZE = KindRule(0.5)
SCHEMA = pa.schema([*(f for f in SAMPLES_SCHEMA if f.name != "scores"), pa.field("scores", SCORES_TYPE)])


def make_picture(width=8, height=8):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def make_clip():
    return encode_animation(from_pil([Image.new("RGB", (8, 8), (60 * index, 0, 0)) for index in range(4)]), 8, "WEBP")


def make_row(name, scores, kind="image", split="train", media=None):
    media = media or (make_clip() if kind == "video" else make_picture())
    captions, attributes = [("en", name)], [("style", "3D")]
    row = {"id": name, "kind": kind, "media": media, "captions": captions, "attributes": attributes, "split": split}
    return row | {"scores": None if scores is None else sorted(scores.items())}


def score(a, b=None, c=None, **more):
    return {"hps": a, "mps": a if b is None else b, "aesthetic": a if c is None else c, **more}


def write(path, rows, rows_per_group=3):
    rows = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=rows_per_group)
    return path


def choose(tmp_path, rows, **config):
    """Ids of what is kept, and the selection."""
    config = {"images": ANY_SIZE, "videos": ANY_SIZE} | config
    selection = choose_samples([write(tmp_path / "samples.parquet", rows)], SelectionConfig(**config))
    return [row["id"] for row, keep in zip(rows, selection.keep, strict=True) if keep], selection


# -- the common scale --------------------------------------------------------------------------------------------------------------


def test_percentile_ranks_by_hand():
    assert scale_scores(np.array([3.0, 1.0, 2.0, 2.0]), "percentile").tolist() == [0.875, 0.125, 0.5, 0.5]
    assert scale_scores(np.array([7.0]), "percentile").tolist() == [0.5]
    assert scale_scores(np.array([1.0, 3.0]), "zscore").tolist() == [-1.0, 1.0]
    assert scale_scores(np.array([2.0, 2.0]), "zscore").tolist() == [0.0, 0.0]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40))
def test_scales_are_scipys(values):
    array = np.array(values, dtype=np.float64)
    np.testing.assert_allclose(scale_scores(array, "percentile"), (scipy.stats.rankdata(array) - 0.5) / len(array))
    if len(set(values)) > 1:
        np.testing.assert_allclose(scale_scores(array, "zscore"), scipy.stats.zscore(array), atol=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20, unique=True))
def test_percentile_ranks_depend_on_order_alone(values):
    array = np.array(values)
    np.testing.assert_array_equal(scale_scores(array, "percentile"), scale_scores(np.argsort(np.argsort(array)) ** 3.0, "percentile"))


# -- choosing ----------------------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_scaled_scores_decides(tmp_path):
    """Ranks of a: 1 2 3 4; of b: 4 3 2 1; of c, in other units: 1 2 4 3. Means of the ranks: 2, 7/3, 3, 8/3."""
    rows = [make_row(f"s{i}", score(*values)) for i, values in enumerate([(1, 9, 10), (2, 8, 200), (3, 7, 4000), (4, 6, 3000)])]
    kept, selection = choose(tmp_path, rows)
    assert kept == ["s2", "s3"]
    np.testing.assert_allclose(selection.quality, (np.array([2, 7 / 3, 3, 8 / 3]) - 0.5) / 4)
    assert selection.counts == {"image": {"read": 4, "held out": 0, "kept": 2, "below the share": 2}}
    histogram = selection.histograms["image"]
    assert sum(histogram["ranked"]) == 4 and sum(histogram["kept"]) == 2 and len(histogram["edges"]) == len(histogram["kept"]) + 1


def test_an_outlier_decides_by_z_score_and_not_by_rank(tmp_path):
    rows = [make_row("steady", score(2, 2, 2)), make_row("outlier", score(1000, 1, 1)), make_row("low", score(0, 0, 0))]
    rows += [make_row(f"filler-{i}", score(1, 1.5, 1.5)) for i in range(3)]
    one = KindRule(1 / 6)
    assert choose(tmp_path, rows, images=one)[0] == ["steady"]
    assert choose(tmp_path, rows, images=one, scale="zscore")[0] == ["steady"]
    assert choose(tmp_path, rows, images=one, scale="zscore", scores=("hps",))[0] == ["outlier"]


def test_kinds_are_ranked_apart_and_have_limits_of_their_own(tmp_path):
    rows = [make_row(f"i{i}", score(i)) for i in range(4)]
    rows += [make_row(f"v{i}", score(100 + i, motion=float(i)), kind="video") for i in range(10)]
    kept, selection = choose(tmp_path, rows, images=KindRule(0.25), videos=KindRule(0.5, flow=(0.2, 0.9)))
    # Flow ranks are 0.05, 0.15, ... 0.95: v2 ... v8 are inside; of these seven the best four.
    assert kept == ["i3", "v5", "v6", "v7", "v8"]
    assert selection.counts["video"] == {"read": 10, "outside the range of flow": 3, "held out": 0, "kept": 4, "below the share": 3}


def test_resolutions_are_those_of_the_files(tmp_path):
    rows = [make_row("small", score(9), media=make_picture(8, 8)), make_row("large", score(1), media=make_picture(16, 8))]
    kept, selection = choose(tmp_path, rows, images=KindRule(1.0, min_pixels=128))
    assert kept == ["large"] and selection.counts["image"]["below the resolution"] == 1
    clips = [make_row("clip", score(1, motion=1.0), kind="video")]
    with pytest.raises(InputError, match="below the resolution': 1"):
        choose(tmp_path, clips, videos=KindRule(1.0, min_pixels=65))
    assert choose(tmp_path, clips, videos=KindRule(1.0, min_pixels=64))[0] == ["clip"]


def test_samples_without_a_score_are_counted(tmp_path):
    rows = [
        make_row("all", score(1)),
        make_row("nan", score(1, np.nan)),
        make_row("none", None),
        make_row("two", {"hps": 1.0, "mps": 1.0}),
    ]
    kept, selection = choose(tmp_path, rows)
    assert kept == ["all"] and np.isnan(selection.quality[1:]).all()
    count = selection.counts["image"]
    assert (count["without score mps"], count["without score hps"], count["without score aesthetic"]) == (1, 1, 1)


def test_held_out_samples_are_neither_ranked_nor_dropped(tmp_path):
    rows = [make_row("one", score(1)), make_row("two", score(2)), make_row("held", None, split="validation")]
    kept, selection = choose(tmp_path, rows)
    assert kept == ["two", "held"] and selection.counts["image"]["held out"] == 1 and np.isnan(selection.quality[2])


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([make_row("a", score(1))], {"scores": ("beauty",)}, "no score 'beauty'; its samples have aesthetic, hps, mps"),
        ([make_row("a", None)], {}, "its samples have none"),
        ([make_row("a", score(1), split="held")], {}, "nothing is left"),
        ([make_row("a", score(1), media=b"no picture")], {"images": KindRule(0.5, 1)}, "'a' has media that cannot be read"),
    ],
)
def test_nothing_to_choose_from(tmp_path, rows, config, message):
    with pytest.raises(InputError, match=message):
        choose(tmp_path, rows, **config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KindRule(0), "share is 0"),
        (lambda: KindRule(1.5), "share is 1.5"),
        (lambda: KindRule(0.5, -1), "min_pixels is -1"),
        (lambda: KindRule(0.5, 0, (0.9, 0.1)), "flow is"),
        (lambda: SelectionConfig(scores=()), "scores are"),
        (lambda: SelectionConfig(scores=("quality",)), "scores are"),
        (lambda: SelectionConfig(scale="log"), "scale is 'log'"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# -- writing -----------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_read_with_its_quality(tmp_path):
    rows = [make_row(f"s{i}", score(i % 5, extra=7.0)) for i in range(8)] + [make_row("held", None, split="validation")]
    paths = [write(tmp_path / "one.parquet", rows[:5], 2), write(tmp_path / "two.parquet", rows[5:], 2)]
    selection = select_samples(paths, tmp_path / "best.parquet", SelectionConfig(images=KindRule(0.5)))
    written = pq.read_table(tmp_path / "best.parquet")
    assert written.schema.equals(SCHEMA)
    kept = [row for row, keep in zip(rows, selection.keep, strict=True) if keep]
    assert written["id"].to_pylist() == [row["id"] for row in kept] == ["s2", "s3", "s4", "s7", "held"]
    assert written["media"].to_pylist() == [row["media"] for row in kept]
    scores = written["scores"].to_pylist(maps_as_pydicts="strict")
    assert scores[0] == score(2, extra=7.0) | {"quality": selection.quality[2]} and scores[-1] == {}
    assert not list(tmp_path.glob(".*"))


def test_files_without_scores_are_refused(tmp_path):
    schema = pa.schema([f for f in SCHEMA if f.name != "scores"])
    pq.write_table(pa.Table.from_pylist([{k: v for k, v in make_row("a", None).items() if k != "scores"}], schema), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    for name, message in (("a", "no column scores"), ("x", "no column id"), ("missing", "cannot be read")):
        with pytest.raises(InputError, match=message):
            choose_samples([tmp_path / f"{name}.parquet"], SelectionConfig())
    with pytest.raises(InputError, match="no file of samples"):
        choose_samples([], SelectionConfig())


def test_the_command_writes_samples_and_a_report(tmp_path, capsys):
    path = write(tmp_path / "samples.parquet", [make_row(f"s{i}", score(i)) for i in range(10)])
    arguments = ["select", str(path), "--output", str(tmp_path / "best.parquet"), "--image-share", "0.3", "--image-min-pixels", "0"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "best.json").read_text())
    assert answer["counts"] == report["counts"] == {"image": {"read": 10, "held out": 0, "kept": 3, "below the share": 7}}
    assert pq.read_table(tmp_path / "best.parquet")["id"].to_pylist() == ["s7", "s8", "s9"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "10 read" in text and "3 kept" in text and "█" in text and "░" in text
    assert main([*arguments, "--scores", "beauty"]) == 2
    assert "no score 'beauty'" in capsys.readouterr().err
