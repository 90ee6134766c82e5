"""Documents of all kinds, and a corpus of them on disk."""

from pathlib import Path

import numpy as np
import pytest

from openemu3.data.shards import write_documents
from openemu3.records import Document, Image, Text, Video
from openemu3.tokenization.encode import EncodedDocument

FINGERPRINT = "abc"


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
