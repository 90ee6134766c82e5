"""A whole model folder with random weights, written by the package's own save code, and the command `emu3` as a process."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from openemu3 import cli
from openemu3.data.samples import write_samples
from openemu3.model.layouts import ModelConfig
from openemu3.model.transformer import TransformerConfig, build_transformer
from openemu3.model.weights import save_config, save_state, save_transformer
from openemu3.records import Sample
from openemu3.tokenization.sequence import Vocabulary
from openemu3.tokenization.text import train_text_tokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

NUM_TEXT, NUM_CODES, SIDE = 300, 64, 32
WORDS = ["red apple", "blue wave", "yellow star", "green leaf", "purple door", "white cloud", "红苹果", "蓝色的浪"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 x 32 pixels, clips of 8 frames, 4,000 random weights: it draws noise, through every step that a good model takes."""
    folder = tmp_path_factory.mktemp("model")
    vision = VisionTokenizerConfig(NUM_CODES, channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_norm_groups=4)
    vocabulary = Vocabulary(NUM_TEXT, NUM_CODES)
    language = TransformerConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        init_std=0.3,
        max_positions=1024,
    )
    torch.manual_seed(0)
    save_config(folder, ModelConfig(language, dataclasses.asdict(vision), NUM_TEXT, NUM_CODES, SIDE * SIDE))
    config = json.loads((folder / "config.json").read_text())
    config["generation"] = {
        "prompt_suffix": "",
        "negative_prompt": "",
        "question": None,
        "fps": 8,
        "clip_frames": 8,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_transformer(folder, build_transformer(language, torch.Generator().manual_seed(0), torch.float32))
    vision_tokenizer = VisionTokenizer(vision)
    with torch.no_grad():
        vision_tokenizer.quantize.embedding.weight.normal_(0, 2)  # as made, all codes look alike
    save_state(folder, vision_tokenizer.state_dict(), "vision_tokenizer")
    (folder / "text.tiktoken").write_bytes(train_text_tokenizer(WORDS * 20, NUM_TEXT))
    (folder / "README.md").write_text("# A random model\n\nIt draws noise. <script>alert('no')</script>\n")
    write_samples(folder / "demo.parquet", [make_sample(index) for index in range(24)])
    return folder


def make_sample(index: int) -> Sample:
    """A disc of some colour. Every third is held out, every fourth is asked for in Chinese."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).ellipse((4, 4, 28, 28), fill=f"hsl({index * 15}, 90%, 55%)")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    uses = "draw" if index < 16 else "read" if index < 20 else "film"
    captions = {"en": f"3D {WORDS[index % 6]} & <friends>, number {index}", "zh": f"立体 {WORDS[6 + index % 2]}，{index}"}
    attributes = {"demo": uses, "demo_language": "zh" if index % 4 == 3 else "en"}
    split = "heldout_combination" if index % 3 == 2 and uses != "film" else "train"
    return Sample(f"disc-{index}", "image", buffer.getvalue(), captions, attributes, split)


RunEmu3 = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def emu3_process(tmp_path_factory: pytest.TempPathFactory) -> RunEmu3:
    """A function that runs `emu3 ARGUMENTS` as a process of its own, with an empty home."""
    home = tmp_path_factory.mktemp("home")

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "openemu3.cli", *map(str, arguments)]
        environment = os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=cwd or home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def emu3_command(tmp_path_factory: pytest.TempPathFactory) -> RunEmu3:
    """The same function without a process for each call, which would spend its time importing torch."""
    folder = tmp_path_factory.mktemp("cwd")

    def run(*arguments: object, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
        output, errors = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            patch.chdir(cwd or folder)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            code = cli.main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())

    return run
