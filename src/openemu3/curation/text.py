"""How much of a picture is text: PP-OCR's detector, whose ONNX weights come with the package rapidocr.

In: uint8 [H, W, 3] RGB. Out: the share of the picture under detected text. The surprising things: nothing is read, only found, since
reading takes several times as long; and what is as tall as half the picture is not text but something round (a saucer, a wheel), which
reading would not have told apart either: the recogniser is sure that a saucer is an 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openemu3.records import InputError

# Longest side, in pixels, of the pictures that text is looked for in.
TEXT_SIDE = 640
# Tallest line of text, as a share of the picture's shorter edge.
MAX_LINE_HEIGHT = 0.5


@dataclass(frozen=True)
class TextMeasure:
    """coverage: area of the picture under text, 0 to 1, overlaps counted once; boxes: how many pieces of text."""

    coverage: float
    boxes: int


class TextDetector:
    """PP-OCR's text detection on one picture at a time. One instance is for one thread.

    longest_side  pixels; larger pictures are made smaller for detection. Nothing is enlarged: what is too small to be found at this
                  size hardly covers the picture.
    num_threads   of ONNX Runtime; pictures are worked on side by side, so that one is enough for each.
    Raises InputError where rapidocr is not installed.
    """

    def __init__(self, longest_side: int = TEXT_SIDE, num_threads: int = 1) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise InputError(
                "text detection needs rapidocr, which is not installed; install it: pip install 'openemu3[curation]'"
            ) from error
        parameters: dict[str, Any] = {
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Global.use_rec": False,
            "Global.max_side_len": longest_side,
            "Det.limit_type": "max",
            "Det.limit_side_len": longest_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        self._ocr = RapidOCR(params=parameters)

    def measure(self, picture: NDArray[np.uint8]) -> TextMeasure:
        """uint8 [H, W, 3] RGB -> how much text there is. Raises InputError for another shape."""
        import cv2

        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise InputError(f"picture is {picture.dtype} {list(picture.shape)}; text is found in uint8 [H, W, 3]")
        # OpenCV's order of colours, which RapidOCR takes of an array.
        found = self._ocr(np.ascontiguousarray(picture[:, :, ::-1]), use_det=True, use_cls=False, use_rec=False)
        boxes = getattr(found, "boxes", None)
        if boxes is None or len(boxes) == 0:
            return TextMeasure(0.0, 0)
        covered, num_lines = np.zeros(picture.shape[:2], np.uint8), 0
        for corners in boxes:  # [4, 2] (x, y), clockwise
            sides = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)  # [4]
            if min(sides[0] + sides[2], sides[1] + sides[3]) / 2 > MAX_LINE_HEIGHT * min(picture.shape[:2]):
                continue
            num_lines += 1
            cv2.fillPoly(covered, [np.round(corners).astype(np.int32)], 1)
        return TextMeasure(float(covered.mean()), num_lines)
