"""Scores that CLIP models give pictures: LAION's aesthetic predictor, HPSv2.1 and MPS.

In: PIL pictures (RGB), and for HPS and MPS what they are meant to show. Out: one float for each; higher is better. Weights are read from
local paths in safetensors; an error says what to fetch and where to put it. The surprising thing: the three published files are pickles,
which this project does not load, so each is converted once, by recipes/convert_score_weights.py.

Shapes: B pictures, P patches and the class token, N text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from openemu3.records import InputError

# Per channel, of CLIP's training (the published preprocessing of every OpenAI and LAION model).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

AESTHETIC_CLIP = "openai/clip-vit-large-patch14 (config.json, model.safetensors)"
AESTHETIC_HEAD = "sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor"
HPS_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K (config.json, vocab.json, merges.txt, tokenizer_config.json)"
HPS_FILE = "HPS_v2.1_compressed.pt of xswu/HPSv2"
MPS_FILE = "MPS_overall_checkpoint.pth of Kwai-Kolors/MPS"
# What MPS is asked to look at; the published text for its overall score.
MPS_CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
    "attributes, position, number, location, word, things."
)
_MPS_LEAST_SIMILARITY = 0.3


class Clip:
    """A CLIP model of transformers, read from a local folder."""

    def __init__(self, model: Any, tokenizer: Any | None, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.to(device).eval(), tokenizer, device
        self.side = int(model.config.vision_config.image_size)

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu", weights: Path | str | None = None, what: str = AESTHETIC_CLIP) -> Clip:
        """The model in a folder as transformers saves it; with `weights`, those of that safetensors file in the folder's configuration.

        Raises InputError, which names what to fetch, for files that are missing or of another model.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"CLIP folder {str(folder)!r} has no config.json; fetch {what} from the Hugging Face Hub into it")
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        path = folder / "model.safetensors" if weights is None else Path(weights)
        state = read_safetensors(path, what)
        if "visual.conv1.weight" in state:
            state = rename_open_clip(state)
        model = CLIPModel(config)
        load_strictly(model, {k: v for k, v in state.items() if not k.endswith("position_ids")}, path)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if (folder / "vocab.json").is_file() else None
        return cls(model, tokenizer, torch.device(device))

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[B, D], each of length 1."""
        pixels = prepare_pictures(pictures, self.side).to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[B, D], each of length 1."""
        pooled = self.model.text_model(**self.tokenize(texts)).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise InputError("the CLIP folder has no vocab.json, which texts need; fetch the tokenizer's files into it, too")
        length = self.model.config.text_config.max_position_embeddings
        encoded = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {"input_ids": encoded["input_ids"].to(self.device)}


def prepare_pictures(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """RGB pictures of any sizes -> [B, 3, side, side]: bicubic to the shorter edge, cut to the middle, normalised as CLIP wants it."""
    arrays = []
    for picture in pictures:
        scale = side / min(picture.size)
        width, height = (max(side, int(edge * scale)) for edge in picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        arrays.append(np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255)
    batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # [B, 3, side, side]
    return (batch - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


class AestheticPredictor:
    """LAION's improved aesthetic predictor: a perceptron on CLIP ViT-L/14 features, trained on people's ratings from 1 to 10."""

    def __init__(self, clip: Clip, head: nn.Module) -> None:
        self.clip, self.head = clip, head.to(clip.device).eval()

    @classmethod
    def load(cls, clip_folder: Path | str, head_file: Path | str, device: str = "cpu") -> AestheticPredictor:
        """Raises InputError, which says what to fetch, where a file is missing or does not fit."""
        clip = Clip.load(clip_folder, device)
        head = build_aesthetic_head(clip.model.config.projection_dim)
        state = read_safetensors(Path(head_file), AESTHETIC_HEAD)
        load_strictly(head, {name.removeprefix("layers."): value for name, value in state.items()}, Path(head_file))
        return cls(clip, head)

    @torch.inference_mode()
    def score_embeddings(self, embeddings: Tensor) -> list[float]:
        """[B, D] of length 1 -> scores."""
        scores: list[float] = self.head(embeddings)[:, 0].float().cpu().tolist()
        return scores

    def score(self, pictures: Sequence[Image.Image]) -> list[float]:
        return self.score_embeddings(self.clip.embed_pictures(pictures)) if pictures else []


def build_aesthetic_head(width: int) -> nn.Sequential:
    """The published layers, dropout among them, so that the published names fit; there is no activation between them."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class HumanPreference:
    """HPSv2.1: a fine-tuned CLIP ViT-H/14; the score is the cosine between picture and prompt."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    @classmethod
    def load(cls, clip_folder: Path | str, weights: Path | str, device: str = "cpu") -> HumanPreference:
        if not Path(weights).is_file():
            raise InputError(_say_missing(Path(weights), HPS_FILE))
        return cls(Clip.load(clip_folder, device, weights, HPS_CLIP))

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One score for each picture and its prompt."""
        if not pictures:
            return []
        scores: list[float] = (self.clip.embed_pictures(pictures) * self.clip.embed_texts(prompts)).sum(-1).cpu().tolist()
        return scores


class MultiDimensionalPreference:
    """MPS, overall: patches of CLIP ViT-H/14 look at those words of the prompt that matter to the condition.

    Source: arXiv 2405.14705; names of layers as in its published code, so that its weights load.
    """

    def __init__(self, clip: Clip, cross: CrossModel) -> None:
        self.clip, self.cross = clip, cross.to(clip.device).eval()

    @classmethod
    def load(cls, clip_folder: Path | str, weights: Path | str, device: str = "cpu") -> MultiDimensionalPreference:
        path = Path(weights)
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        state = read_safetensors(path, MPS_FILE)
        if not (Path(clip_folder) / "config.json").is_file():
            raise InputError(f"CLIP folder {str(clip_folder)!r} has no config.json; fetch {HPS_CLIP} into it")
        config = CLIPConfig.from_pretrained(clip_folder, local_files_only=True)
        model = CLIPModel(config)
        of_clip = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.") and not n.endswith("position_ids")}
        load_strictly(model, of_clip, path)
        of_cross = {n.removeprefix("cross_model."): v for n, v in state.items() if n.startswith("cross_model.")}
        width = config.projection_dim
        if width is None:
            raise InputError(f"CLIP folder {str(clip_folder)!r} says no projection_dim in its config.json")
        cross = CrossModel(width, num_layers=1 + max((int(n.split(".")[1]) for n in of_cross), default=0), num_heads=max(1, width // 64))
        load_strictly(cross, of_cross, path)
        tokenizer = AutoTokenizer.from_pretrained(clip_folder, local_files_only=True)
        return cls(Clip(model, tokenizer, torch.device(device)), cross)

    @torch.inference_mode()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One score for each picture and its prompt."""
        scores = []
        clip, model = self.clip, self.clip.model
        condition = model.text_projection(model.text_model(**clip.tokenize([MPS_CONDITION])).last_hidden_state)  # [1, N, D]
        for picture, prompt in zip(pictures, prompts, strict=True):  # one by one: the mask is scaled by the largest of its batch
            text = model.text_model(**clip.tokenize([prompt]))
            words, whole = model.text_projection(text.last_hidden_state), model.text_projection(text.pooler_output)  # [1, N, D], [1, D]
            vision = model.vision_model(pixel_values=prepare_pictures([picture], clip.side).to(clip.device))
            patches = model.visual_projection(vision.last_hidden_state)  # [1, P, D]
            similarity = (condition @ words.transpose(1, 2)).amax(dim=1, keepdim=True)  # [1, 1, N]
            mask = torch.where(similarity / similarity.max() > _MPS_LEAST_SIMILARITY, 0.0, float("-inf"))
            looked = self.cross(patches, words, mask.expand(-1, patches.shape[1], -1))[:, 0]  # [1, D]
            cosine = (F.normalize(whole, dim=-1) * F.normalize(looked, dim=-1)).sum()
            scores.append(float(model.logit_scale.exp() * cosine))
        return scores


class CrossModel(nn.Module):
    """MPS's blocks: attention to the words, then attention among the patches beside a feed-forward, each added to its input."""

    def __init__(self, width: int, num_layers: int = 4, num_heads: int = 16, head_width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Residual(_CrossAttention(width, num_heads, head_width)),
                    _Residual(_ParallelBlock(width, num_heads, head_width)),
                ]
            )
            for _ in range(num_layers)
        )

    def forward(self, patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """patches [B, P, D], words [B, N, D], mask [B, P, N] of 0 and -inf -> [B, P, D]."""
        for pair in self.layers:
            attend, mix = pair.children()
            patches = mix(attend(patches, words, mask))
        return patches


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.fn(x, *rest)


class _Norm(nn.Module):
    """LayerNorm whose bias is a buffer of zeros, since the published weights have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)  # type: ignore[arg-type]


class _GatedUnit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class _CrossAttention(nn.Module):
    """Many heads of queries, one head of keys and values; a feed-forward beside it."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = _Norm(width)
        self.to_q = nn.Linear(width, num_heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(num_heads * head_width, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 8 * width, bias=False), _GatedUnit(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x)
        queries = self.to_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, P, head]
        keys, values = (part.unsqueeze(1) for part in self.to_kv(words).chunk(2, dim=-1))  # [B, 1, N, head]
        heads = F.scaled_dot_product_attention(
            queries, keys.expand(-1, self.num_heads, -1, -1), values.expand(-1, self.num_heads, -1, -1), mask.unsqueeze(1)
        )
        mixed: Tensor = self.to_out(heads.transpose(1, 2).flatten(2)) + self.ff(x)
        return mixed


class _ParallelBlock(nn.Module):
    """Attention with rotary positions, many heads of queries on one of keys and values, and a feed-forward from one projection."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.widths = (num_heads * head_width, head_width, head_width, 8 * width)
        self.norm = _Norm(width)
        self.rotary_emb = _Rotary(head_width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(num_heads * head_width, width, bias=False)
        self.ff_out = nn.Sequential(_GatedUnit(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        queries = self.rotary_emb(queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))  # [B, heads, P, head]
        keys = self.rotary_emb(keys.unsqueeze(1)).expand(-1, self.num_heads, -1, -1)
        heads = F.scaled_dot_product_attention(queries, keys, values.unsqueeze(1).expand(-1, self.num_heads, -1, -1))
        mixed: Tensor = self.attn_out(heads.transpose(1, 2).flatten(2)) + self.ff_out(hidden)
        return mixed


class _Rotary(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., P, head] turned by its position; halves are rotated against each other."""
        positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq)  # type: ignore[arg-type]  # [P, head / 2]
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------------------- loading


def read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises InputError, which says what to fetch, if it is not there or none of these."""
    if not path.is_file():
        raise InputError(_say_missing(path, what))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{str(path)!r} is no safetensors file ({error}); convert {what} with recipes/convert_score_weights.py") from error


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raises InputError for weights of another model."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"{str(path)!r} does not fit the model that it is for: {' '.join(str(error).split())[:300]}") from error


def _say_missing(path: Path, what: str) -> str:
    return (
        f"weights {str(path)!r} are missing; fetch {what}, and put it there as safetensors "
        "(a .pt or .pth file is converted by recipes/convert_score_weights.py)"
    )


def rename_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP state dict with open_clip's names -> with transformers': packed attention weights come apart, projections are transposed."""
    direct = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        if name in direct:
            renamed[direct[name]] = value
        elif owner in norms:
            renamed[f"{norms[owner]}.{leaf}"] = value
        elif name == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        elif name == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif ".resblocks." in name or name.startswith("transformer.resblocks."):
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            number, _, rest = name.split("resblocks.")[1].partition(".")
            block = f"{tower}.encoder.layers.{number}"
            if rest.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{block}.self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = third.contiguous()
            else:
                part, _, leaf = rest.rpartition(".")
                renamed[f"{block}.{parts[part]}.{leaf}"] = value
        elif name != "attn_mask":
            renamed[name] = value  # refused later, by name
    return renamed
