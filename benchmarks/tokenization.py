"""Pictures to token documents on a CPU: `emu3 tokenize` beside transformers' `Emu3VQVAE` on the same pictures and random weights.

    python benchmarks/tokenization.py            about five minutes on a quiet core
    python benchmarks/tokenization.py --quick    about a minute

The narrow network (64 channels) with the full codebook of 32,768, pictures of 256 x 256 and of 128 x 128 as PNG. Ours is the whole way
from the files' bytes to a shard on disk: decoding, batches of one size, codes, both orders of a caption, Parquet. Theirs is decoding
(by our reader) and codes, in batches of the same size; nothing is written. The two take turns, the first round is not timed, and
medians are printed. Before that their codes are compared.
The surprising thing: most of the difference is that transformers runs a still through the 2-D network as four equal frames. (And the
name: a script called tokenize.py would hide Python's own module of that name from every script beside it.)
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from openemu3.data.shards import DocumentStore, write_documents
from openemu3.media import read_image
from openemu3.model.layouts import to_transformers
from openemu3.tokenization.encode import EncodeConfig, Item, Refusal, encode_items
from openemu3.tokenization.sequence import Role, SequenceFormat, Vocabulary
from openemu3.tokenization.text import TextTokenizer, train_text_tokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

TARGET = 3.0
CHANNELS = 64
BATCH = 4  # pictures together, on both sides


def build_both() -> tuple[VisionTokenizer, Emu3VQVAE]:
    """Ours, and theirs over the same weights."""
    torch.manual_seed(0)
    config = VisionTokenizerConfig(channels=CHANNELS)
    tokenizer = VisionTokenizer(config).requires_grad_(False)
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight, std=0.05)
    with torch.device("meta"):
        theirs = Emu3VQVAE(Emu3VQVAEConfig(base_channels=CHANNELS, hidden_size=CHANNELS * config.channel_multipliers[-1]))
    state = to_transformers("vision_tokenizer", tokenizer.state_dict())
    theirs.load_state_dict({name.removeprefix("model.vqmodel."): tensor for name, tensor in state.items()}, strict=True, assign=True)
    return tokenizer, theirs.eval()


def draw_pictures(number: int, side: int) -> list[bytes]:
    """Smooth noise as PNG files."""
    pictures = []
    for index in range(number):
        small = np.random.default_rng(index).integers(0, 255, (side // 16, side // 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pictures


def build_format() -> SequenceFormat:
    words = [f"a picture of {noun} {number}" for noun in ("cats", "dogs", "birds", "fish") for number in range(50)]
    return SequenceFormat(TextTokenizer.from_bytes(train_text_tokenizer(words, 270)), Vocabulary(270, 32768))


def run_ours(pictures: list[bytes], side: int, tokenizer: VisionTokenizer, form: SequenceFormat, path: Path) -> None:
    items = [Item(str(index), "image", picture, {"en": f"a picture of cats {index}"}) for index, picture in enumerate(pictures)]
    config = EncodeConfig(batch_tokens=BATCH * (side // 8) ** 2)

    def refuse(refusal: Refusal) -> None:
        raise RuntimeError(refusal.reason)

    write_documents(path, encode_items(items, tokenizer, form, config, refuse), "benchmark")


def run_theirs(pictures: list[bytes], side: int, network: Emu3VQVAE) -> list[np.ndarray]:
    codes: list[np.ndarray] = []
    with torch.no_grad():
        for first in range(0, len(pictures), BATCH):
            pixels = torch.stack([read_image(picture)[:, 0] for picture in pictures[first : first + BATCH]])
            sizes = torch.tensor([[side, side]] * len(pixels))
            codes += [found.reshape(side // 8, side // 8).numpy() for found in network.encode(pixels, sizes).image_tokens]
    return codes


def measure(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller pictures alone, fewer of them, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    tokenizer, theirs = build_both()
    form = build_format()
    number, rounds = (8, 2) if arguments.quick else (16, 3)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.parquet"
        for side in (128,) if arguments.quick else (128, 256):
            pictures = draw_pictures(number, side)
            run_ours(pictures, side, tokenizer, form, path)
            equal = compare(path, form, run_theirs(pictures, side, theirs))
            seconds: dict[str, list[float]] = {"openemu3": [], "transformers": []}
            for _ in range(rounds):
                seconds["openemu3"].append(measure(lambda: run_ours(pictures, side, tokenizer, form, path)))  # noqa: B023
                seconds["transformers"].append(measure(lambda: run_theirs(pictures, side, theirs)))  # noqa: B023
            rates = {name: number / statistics.median(times) for name, times in seconds.items()}
            ratio = rates["openemu3"] / rates["transformers"]
            verdict = "met" if ratio >= TARGET else "missed"
            ours, other = rates["openemu3"], rates["transformers"]
            print(
                f"{side} x {side}: openemu3 {ours:.2f} images/s (files to a shard), transformers {other:.2f} images/s (files to codes): "
                f"{ratio:.2f}x (target {TARGET:g}x: {verdict}); codes equal {equal:.1%}; {torch.get_num_threads()} threads",
                flush=True,
            )
            results.append({"side": side, "images_per_second": rates, "ratio": ratio, "target": TARGET, "codes_equal": equal})
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": results}, indent=2) + "\n")


def compare(path: Path, form: SequenceFormat, codes: list[np.ndarray]) -> float:
    """Share of the codes in our drawings that are theirs."""
    store = DocumentStore([path], {"train"})
    drawings = [index for index in range(len(store)) if store.sources[store.source_of[index]] == "draw"]
    same = []
    for index, expected in zip(drawings, codes, strict=True):
        ids, roles = store.read(index)
        same.append(ids[roles == Role.VISION].astype(np.int64) - form.vocabulary.visual_offset == expected.reshape(-1))
    return float(np.concatenate(same).mean())


if __name__ == "__main__":
    main()
