"""Text is found where it is, by the detector's real weights; what is round and large is no text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from openemu3.curation.text import TextDetector, TextMeasure
from openemu3.records import InputError


@pytest.fixture(scope="module")
def detector() -> TextDetector:
    return TextDetector(640)


def test_lines_of_text_are_counted_and_their_area_is_about_right(detector: TextDetector, draw_text: Callable[..., Image.Image]) -> None:
    picture = np.asarray(draw_text())
    measure = detector.measure(picture)
    assert measure.boxes == 5
    # Five lines of about 290 x 30 pixels in 320 x 240; the detector's boxes are a little larger than the letters.
    assert 0.3 < measure.coverage < 0.8
    halved = detector.measure(np.concatenate([picture, np.full_like(picture, 255)]))
    assert halved.coverage == pytest.approx(measure.coverage / 2, rel=0.2)


def test_a_picture_without_text_has_none(detector: TextDetector) -> None:
    assert detector.measure(np.full((200, 300, 3), 255, np.uint8)) == TextMeasure(0.0, 0)


def test_a_photograph_of_a_cup_has_no_text(detector: TextDetector) -> None:
    data = pytest.importorskip("skimage").data
    assert detector.measure(data.coffee()).coverage == 0  # its saucer is found as one "8" over three quarters of the picture
    assert detector.measure(np.repeat(data.page()[..., None], 3, 2)).boxes >= 6


def test_other_shapes_are_refused(detector: TextDetector) -> None:
    with pytest.raises(InputError, match="text is found in uint8"):
        detector.measure(np.zeros((8, 8), np.uint8))
