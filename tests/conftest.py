"""Fixtures that several rooms use: Qwen's real vocabulary with Qwen's own code as the oracle, and the formats built on it."""

import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from openemu3.tokenization.sequence import SequenceFormat, Vocabulary
from openemu3.tokenization.text import TextTokenizer, train_text_tokenizer

CACHE = Path(__file__).parents[1] / ".cache"
DASHSCOPE = "dashscope==2.0.2"
DASHSCOPE_FILES = (
    "dashscope/resources/qwen.tiktoken",
    "dashscope/tokenizers/qwen_tokenizer.py",
    "dashscope/tokenizers/tokenizer_base.py",
)

# A busy machine must not fail a test, and a failure must be the same one for everybody.
settings.register_profile("openemu3", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("openemu3")


@pytest.fixture(scope="session")
def dashscope_folder() -> Path:
    """Qwen's vocabulary and tokenizer code, taken once from the dashscope wheel into the ignored .cache/ folder."""
    folder = CACHE / "dashscope-2.0.2"
    if all((folder / name).exists() for name in DASHSCOPE_FILES):
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch, DASHSCOPE],
            check=True,
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in DASHSCOPE_FILES:
                partial = Path(archive.extract(name, scratch))
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, folder / name)  # atomic: another test process may be doing the same
    return folder


@pytest.fixture(scope="session")
def qwen_ranks_path(dashscope_folder: Path) -> Path:
    """The published 151,643 ranks (tiktoken file)."""
    return dashscope_folder / DASHSCOPE_FILES[0]


@pytest.fixture(scope="session")
def qwen_oracle(dashscope_folder: Path):
    """Qwen's own tokenizer, as its makers ship it."""
    sys.path.insert(0, str(dashscope_folder))
    try:
        module = importlib.import_module("dashscope.tokenizers.qwen_tokenizer")
    finally:
        sys.path.remove(str(dashscope_folder))
    return module.QwenTokenizer(str(dashscope_folder / DASHSCOPE_FILES[0]))


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen_ranks_path: Path) -> TextTokenizer:
    return TextTokenizer.from_file(qwen_ranks_path)


@pytest.fixture(scope="session")
def published_format(qwen_tokenizer: TextTokenizer) -> SequenceFormat:
    """The format with the published vocabulary of 184,622 ids."""
    return SequenceFormat(qwen_tokenizer, Vocabulary())


@pytest.fixture(scope="session")
def small_format() -> SequenceFormat:
    """The format with a vocabulary of 300 text ids and 64 codes, trained here; "fps" takes several ids in it."""
    texts = ["a red apple on a table", "the smiling cat", "ein Haus am See", "一个红苹果", "smiling face with heart eyes"] * 3
    return SequenceFormat(TextTokenizer.from_bytes(train_text_tokenizer(texts, 300)), Vocabulary(num_text=300, num_codes=64))


@pytest.fixture(scope="session")
def lpips_weights() -> Path:
    """The folder with lpips_vgg.safetensors and lpips_alex.safetensors, fetched once into the ignored .cache/ folder."""
    folder = CACHE / "weights"
    if not all((folder / f"lpips_{net}.safetensors").is_file() for net in ("vgg", "alex")):
        script = Path(__file__).parents[1] / "recipes" / "fetch_weights.py"
        subprocess.run([sys.executable, str(script), "--cache", str(folder), "--only", "lpips"], check=True, capture_output=True)
    return folder
