"""The loader: packed tokens a second on one core, beside rows read and padded through Hugging Face `datasets`, and beside training.

    python benchmarks/loader.py            about a minute on a quiet core
    python benchmarks/loader.py --quick    some seconds

A corpus as in the paper's first stage, made of random tokens: pictures of about 512 x 512 in many shapes with their captions, both
orders, and texts with the heavy tail that texts have, a fifth of the tokens; rows of 5,120. Ours opens it from the maps that a first
reader left, packs, and makes batches, without prefetching: one core does everything. Theirs opens the same Parquet with `datasets`, and
makes one padded row of each document, cut to the context length; its tokens are counted without the padding. Both take turns.
The 8B model needs 51 GFLOP a token: an H100 at 45 % of its 989 TFLOP/s reads 8,700 tokens a second. That is what "training" says.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch

from openemu3.data.loader import LoaderConfig, TokenLoader
from openemu3.data.packing import TokenBatch
from openemu3.data.shards import DocumentStore, write_documents
from openemu3.tokenization.encode import EncodedDocument
from openemu3.tokenization.sequence import Encoded, Role

CONTEXT = 5120
PAD = 151643
TRAINING = 0.45 * 989e12 / (6 * 8.5e9)  # tokens a second


def make_documents(num_pictures: int) -> Iterator[EncodedDocument]:
    random = np.random.default_rng(0)
    for index in range(num_pictures):
        height = int(random.integers(45, 91))
        vision = height * (4096 // height + 1) + 2
        caption = int(random.integers(60, 150))
        for source, parts in (
            ("draw", ((Role.STRUCTURE, 1), (Role.TEXT_CONTEXT, caption), (Role.STRUCTURE, 6), (Role.VISION, vision), (Role.STRUCTURE, 3))),
            ("describe", ((Role.STRUCTURE, 7), (Role.VISION, vision), (Role.STRUCTURE, 2), (Role.TEXT_TARGET, caption + 1))),
        ):
            yield make_document(source, index, parts, random)
        for number in range(3):
            length = int(min(random.lognormal(6, 1.2), 100_000)) + 1
            yield make_document("text", 3 * index + number, ((Role.STRUCTURE, 1), (Role.TEXT_TARGET, length)), random)


def make_document(source: str, number: int, parts: tuple[tuple[Role, int], ...], random: np.random.Generator) -> EncodedDocument:
    roles = np.repeat(np.array([role for role, _ in parts], np.uint8), [length for _, length in parts])
    return EncodedDocument(source, f"{source}-{number}", "train", Encoded(random.integers(0, 184_622, len(roles)), roles), "synthetic")


def read_ours(path: Path) -> Iterator[TokenBatch]:
    config = LoaderConfig(CONTEXT, rows_per_batch=8, rows_per_micro_batch=8, prefetch=0)
    for batches in TokenLoader(DocumentStore([path], {"train"}), config, PAD):
        yield from batches


def read_theirs(table: datasets.Dataset) -> Iterator[int]:
    """Batches of 8 padded documents in random order; the tokens of each that are not padding."""
    order = np.random.default_rng(0).permutation(len(table))
    table = table.with_format("numpy", columns=["token_ids", "role_values", "role_lengths"])
    while True:
        for first in range(0, len(order), 8):
            rows = [table[int(index)] for index in order[first : first + 8]]
            token_ids = np.full((len(rows), CONTEXT), PAD, np.int64)
            roles = np.zeros((len(rows), CONTEXT), np.uint8)
            for place, row in enumerate(rows):
                length = min(CONTEXT, len(row["token_ids"]))
                token_ids[place, :length] = row["token_ids"][:length]
                roles[place, :length] = np.repeat(row["role_values"], row["role_lengths"])[:length]
            torch.from_numpy(token_ids), torch.from_numpy(roles)
            yield int((roles > 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller corpus, fewer batches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    num_pictures, num_batches, rounds = (400, 40, 3) if arguments.quick else (4000, 200, 5)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.parquet"
        write_documents(path, make_documents(num_pictures), "benchmark")
        began = time.perf_counter()
        store = DocumentStore([path], {"train"})
        copied = time.perf_counter() - began
        report = TokenLoader(store, LoaderConfig(CONTEXT), PAD).report
        began = time.perf_counter()
        loader = TokenLoader(DocumentStore([path], {"train"}), LoaderConfig(CONTEXT), PAD)
        loader.pack_window(0, 0)
        opened = time.perf_counter() - began
        print(
            f"{len(store):,} documents, {store.lengths.sum():,} tokens; opened for the first time (copy, checksums) in {copied:.1f} s, "
            f"then and packed in {opened:.2f} s"
        )
        print(report.describe())
        ours, theirs = (
            read_ours(path),
            read_theirs(datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=scratch)),
        )
        next(ours), next(theirs)
        speeds: dict[str, list[float]] = {"openemu3": [], "datasets": []}
        for _ in range(rounds):
            began = time.process_time()
            num_tokens = sum(batch.num_tokens for batch in islice(ours, num_batches))
            speeds["openemu3"].append(num_tokens / (time.process_time() - began))
            began = time.process_time()
            num_tokens = sum(islice(theirs, num_batches))
            speeds["datasets"].append(num_tokens / (time.process_time() - began))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio, headroom = medians["openemu3"] / medians["datasets"], medians["openemu3"] / TRAINING
    print(
        f"openemu3 {medians['openemu3']:,.0f} tokens/s per core, packed; datasets {medians['datasets']:,.0f} tokens/s per core, padded: "
        f"{ratio:.1f}x; training the 8B model reads {TRAINING:,.0f} tokens/s per GPU: one core feeds {headroom:,.0f}"
    )
    if arguments.json:
        results = {
            "tokens_per_core_second": medians,
            "ratio": ratio,
            "gpus_fed_by_a_core": headroom,
            "fill_rate": report.fill_rate,
            "texts_cut": report.num_cut,
            "texts_longer_than_a_row": report.num_long,
            "seconds_to_open": opened,
        }
        arguments.json.write_text(json.dumps({"results": [results]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
