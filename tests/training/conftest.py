"""A training in small: pictures and clips of 32 x 32, tokenizers of 4,000 weights, documents, and the real weights of LPIPS."""

from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from openemu3.data.samples import read_samples, write_samples
from openemu3.data.shards import write_documents
from openemu3.media import read_image
from openemu3.model.transformer import TransformerConfig
from openemu3.records import Sample
from openemu3.tokenization.encode import EncodeConfig, encode_samples
from openemu3.tokenization.sequence import Vocabulary
from openemu3.tokenization.text import train_text_tokenizer
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig
from openemu3.training.checkpoint import add_prefix, save_checkpoint
from openemu3.training.export import compute_fingerprint, export_tokenizers, load_tokenizers
from openemu3.training.stages import init_vision_tokenizer

SIDE, NUM_TEXT, NUM_CODES = 32, 300, 64
COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "black": "黑"}
SHAPES = {"disc": "圆", "square": "方", "cross": "叉"}


@pytest.fixture(autouse=True)
def lpips_cache(lpips_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found as a user's program finds it."""
    monkeypatch.setenv("OPENEMU3_CACHE", str(lpips_weights))


def draw_shape(shape: str, colour: str, left: int) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw, box = ImageDraw.Draw(picture), (left, 8, left + 16, 24)
    if shape == "disc":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.line(box, fill=colour, width=5)
        draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=5)
    return picture


def make_samples() -> list[Sample]:
    """Twelve stills and six clips of ten frames, in which the shape moves to the right; a quarter of each is held out."""
    samples = []
    for number, (shape, colour) in enumerate((shape, colour) for shape in SHAPES for colour in COLOURS):
        captions = {"en": f"a {colour} {shape}", "zh": f"{COLOURS[colour]}{SHAPES[shape]}"}
        split = "heldout" if number % 4 == 3 else "train"
        buffer = BytesIO()
        draw_shape(shape, colour, 8).save(buffer, "PNG")
        samples.append(Sample(f"still-{number}", "image", buffer.getvalue(), captions, {}, split))
    for number, still in enumerate(samples[::2]):
        shape, colour = still.captions["en"].split()[2], still.captions["en"].split()[1]
        frames = [draw_shape(shape, colour, step) for step in range(10)]
        buffer = BytesIO()
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=125, lossless=True)
        captions = {"en": f"{still.captions['en']} moves"}
        split = "heldout" if number % 4 == 3 else "train"
        samples.append(Sample(f"clip-{number}", "video", buffer.getvalue(), captions, {"fps": "8"}, split))
    return samples


@pytest.fixture(scope="session")
def vision_config() -> VisionTokenizerConfig:
    return VisionTokenizerConfig(NUM_CODES, channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_norm_groups=4)


@pytest.fixture(scope="session")
def transformer_config() -> TransformerConfig:
    """Two layers, with dropout."""
    return TransformerConfig(
        vocab_size=Vocabulary(NUM_TEXT, NUM_CODES).size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        max_positions=256,
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, vision_config: VisionTokenizerConfig) -> Path:
    """A folder with samples.parquet, text.tiktoken, tokenizers/ (of an untrained vision tokenizer) and documents.parquet."""
    folder = tmp_path_factory.mktemp("data")
    write_samples(folder / "samples.parquet", make_samples())
    captions = [text for sample in make_samples() for text in sample.captions.values()]
    (folder / "text.tiktoken").write_bytes(train_text_tokenizer(captions * 20, NUM_TEXT))
    tokenizer = VisionTokenizer(vision_config)
    init_vision_tokenizer(tokenizer, 0)
    stills = torch.stack([read_image(sample.media)[:, 0] for sample in make_samples() if sample.kind == "image"])
    with torch.no_grad():  # codes that lie among the latents, so that different pictures have different ones
        latents = tokenizer.encode_latents(stills.unsqueeze(2)).movedim(1, -1).flatten(0, -2)  # [192, 4]
        tokenizer.quantize.embedding.weight.copy_(latents[::3])
    save_checkpoint(folder / "run" / "checkpoints", 1, add_prefix("average", tokenizer.state_dict()), {})
    export_tokenizers(folder / "run", vision_config, folder / "text.tiktoken", folder / "tokenizers")
    vision, form = load_tokenizers(folder / "tokenizers")
    documents = encode_samples(read_samples(folder / "samples.parquet"), vision, form, EncodeConfig(clip_frames=8))
    write_documents(folder / "documents.parquet", documents, compute_fingerprint(folder / "tokenizers"))
    return folder
