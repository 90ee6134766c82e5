"""Pictures of known content, small, made here; and a guard that inspects them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("daft", reason="curation is an extra")

from openemu3.curation.guard import Guard


def _draw_scene(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A colourful picture that is like no other seed's: blots of colour on a slope of colour."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.zeros((height, width, 3))
    for _ in range(6):
        y, x, size = random.uniform(0, height), random.uniform(0, width), random.uniform(0.1, 0.3) * width
        blot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / size**2)
        picture += blot[..., None] * random.uniform(-200, 200, 3)
    picture = 128 + picture / 1.5
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _draw_text(width: int = 320, height: int = 240) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for line in range(5):
        pen.text((12, 10 + line * 46), f"WORDS AND WORDS {line}", fill="navy", font_size=30)
    return picture


@pytest.fixture(scope="session")
def inspect() -> Iterator[Callable[..., dict[str, Any]]]:
    """Looks at one file in the guarded process: the row of its measures, the working copy's bytes under "pixels"."""
    guard = Guard("openemu3.curation.inspection:inspect_image", 60.0)

    def look(path: Path, **limits: int) -> dict[str, Any]:
        item = {"id": path.name, "uri": path.as_uri()}
        usual = {"max_bytes": 1 << 26, "working_side": 640, "thumbnail_side": 64, "text": False, "keep_pixels": True}
        answer, payload = guard.call({"item": item, **(usual | limits)})
        row: dict[str, Any] = answer["rows"][0]
        return row | {"pixels": bytes(payload[: row["pixels_length"]])}

    yield look
    guard.close()


@pytest.fixture(scope="session")
def draw_scene() -> Callable[..., Image.Image]:
    return _draw_scene


@pytest.fixture(scope="session")
def draw_text() -> Callable[..., Image.Image]:
    return _draw_text


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP as transformers saves it, with a byte-level vocabulary."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    width, layers, side, tokens = 64, 2, 32, 16
    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4, "projection_dim": width}
    letters = [chr(number) for number in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": tokens,
            "eos_token_id": len(vocabulary) - 1,
            "bos_token_id": len(vocabulary) - 2,
            "pad_token_id": len(vocabulary) - 1,
        },
        vision_config={**tower, "image_size": side, "patch_size": 8},
        projection_dim=width,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": tokens,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    return folder
