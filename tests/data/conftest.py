"""Documents of all kinds, and a corpus of them on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from openemu3.data.shards import write_documents
from openemu3.model.layouts import ModelConfig
from openemu3.model.weights import save_config, save_state
from openemu3.records import Document, Image, Text, Video
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.text import train_text_tokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

FINGERPRINT = "abc"
WORDS = ["a red apple on a table", "the smiling cat", "ein Haus am See", "一个红苹果", "smiling face with heart eyes"]
VISION = {"codebook_size": 64, "channels": 8, "channel_multipliers": (1, 1, 2, 2), "num_res_blocks": 1, "num_norm_groups": 4}


def make_documents(form, number=10, seed=0):
    """Of each of `number` samples: a drawing, its description, of every third a film, of every second a text of another data set; the
    last two are held out."""
    random = np.random.default_rng(seed)
    documents = []
    for index in range(number):
        split = "train" if index < number - 2 else "heldout"
        picture = Image(random.integers(0, 64, (2, 2 + index % 3)))
        caption = f"a red apple on a table {index}"[: 5 + index % 20]
        parts = {"draw": (Text(caption), picture), "describe": (picture, Text(caption, target=True))}
        if index % 3 == 0:
            parts["film"] = (Text(caption), Video(random.integers(0, 64, (2, 2, 2)), 8))
        if index % 2 == 0:
            parts["text"] = (Text(f"the smiling cat {index} " * int(random.integers(1, 12)), target=True),)
        for source, pieces in parts.items():
            dataset = "words" if source == "text" else "pictures"
            grids = tuple(piece.grid for piece in pieces if not isinstance(piece, Text))
            documents.append(EncodedDocument(source, f"sample-{index}", split, form.encode(Document(pieces)), dataset, grids))
    return documents


@pytest.fixture(scope="session")
def documents(small_format):
    return make_documents(small_format, 60)


@pytest.fixture(scope="session")
def shard(documents, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.parquet"
    write_documents(path, documents, FINGERPRINT, rows_per_group=16)
    return path


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """A folder with both tokenizers, as exporting writes it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    tokenizer = VisionTokenizer(VisionTokenizerConfig(**VISION))
    with torch.no_grad():
        latents = tokenizer.encode_latents(torch.rand(2, 3, 16, 32, 32) * 2 - 1).movedim(1, -1).flatten(0, -2)
        tokenizer.quantize.embedding.weight.copy_(latents[::2])
    save_state(folder, tokenizer.state_dict(), "vision_tokenizer")
    (folder / "text.tiktoken").write_bytes(train_text_tokenizer(WORDS * 3, 300))
    save_config(folder, ModelConfig(vision_tokenizer=VISION, num_text=300, num_codes=64))
    return folder
