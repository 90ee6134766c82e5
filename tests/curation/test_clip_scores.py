"""CLIP scores with tiny random models of the published architectures, through the same loading code; the oracle is transformers' CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from openemu3.curation.clip_scores import (
    AestheticPredictor,
    Clip,
    CrossModel,
    HumanPreference,
    MultiDimensionalPreference,
    build_aesthetic_head,
    prepare_pictures,
)
from openemu3.records import InputError

# Of the tiny model in conftest.py.
WIDTH, LAYERS, SIDE = 64, 2, 32


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, size, np.uint8)) for size in ((50, 40, 3), (33, 90, 3), (32, 32, 3))]


def test_pictures_are_prepared_as_transformers_does(pictures: list[Image.Image]) -> None:
    oracle = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = torch.stack([torch.as_tensor(np.asarray(oracle(p, return_tensors="np")["pixel_values"][0])) for p in pictures])
    torch.testing.assert_close(prepare_pictures(pictures, SIDE), expected, atol=1e-5, rtol=0)


def test_aesthetic_scores_are_the_head_on_normalised_features(clip_folder: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    head = build_aesthetic_head(WIDTH)
    save_file({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.safetensors")
    predictor = AestheticPredictor.load(clip_folder, tmp_path / "head.safetensors")
    oracle = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        features = oracle(
            pixel_values=prepare_pictures(pictures, SIDE), input_ids=torch.zeros(1, 3, dtype=torch.int64)
        ).image_embeds  # of length 1
        x = features
        for layer in (0, 2, 4, 6, 7):
            x = x @ head[layer].weight.T + head[layer].bias
    assert predictor.score(pictures) == pytest.approx(x[:, 0].tolist(), abs=1e-5)
    assert predictor.score([]) == []


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names -> open_clip's, written from open_clip's module tree."""
    out = {"logit_scale": state["logit_scale"]}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        for number in range(LAYERS):
            block, target = f"{tower}.encoder.layers.{number}.", f"{prefix}transformer.resblocks.{number}."
            for leaf in ("weight", "bias"):
                parts = [state[f"{block}self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
                out[f"{target}attn.in_proj_{leaf}"] = torch.cat(parts)
                out[f"{target}attn.out_proj.{leaf}"] = state[f"{block}self_attn.out_proj.{leaf}"]
                for ours, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    out[f"{target}{theirs}.{leaf}"] = state[f"{block}{ours}.{leaf}"]
    for leaf in ("weight", "bias"):
        out[f"visual.ln_pre.{leaf}"] = state[f"vision_model.pre_layrnorm.{leaf}"]
        out[f"visual.ln_post.{leaf}"] = state[f"vision_model.post_layernorm.{leaf}"]
        out[f"ln_final.{leaf}"] = state[f"text_model.final_layer_norm.{leaf}"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.proj"] = state["visual_projection.weight"].T
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    out["text_projection"] = state["text_projection.weight"].T
    return {name: value.clone().contiguous() for name, value in out.items()}


def test_hps_weights_with_open_clip_names_give_the_cosine_of_picture_and_prompt(
    clip_folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    save_file(to_open_clip(load_file(clip_folder / "model.safetensors")), tmp_path / "hps.safetensors")
    model = HumanPreference.load(clip_folder, tmp_path / "hps.safetensors")
    prompts = ["a cat", "two dogs on it", "x"]
    oracle = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        out = oracle(pixel_values=prepare_pictures(pictures, SIDE), **model.clip.tokenize(prompts))
    expected = torch.diagonal(out.image_embeds @ out.text_embeds.T).tolist()
    assert model.score(pictures, prompts) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == 3


def test_mps_follows_its_published_formula(clip_folder: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    torch.manual_seed(1)
    cross = CrossModel(WIDTH, num_layers=2, num_heads=1)
    for parameter in cross.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {f"cross_model.{name}": value for name, value in cross.state_dict().items()}
    state |= {f"model.{name}": value for name, value in load_file(clip_folder / "model.safetensors").items()}
    save_file(state, tmp_path / "mps.safetensors")
    model = MultiDimensionalPreference.load(clip_folder, tmp_path / "mps.safetensors")
    scores = model.score(pictures, ["a cat", "two dogs", "x"])
    assert scores == pytest.approx([model.score([p], [t])[0] for p, t in zip(pictures, ["a cat", "two dogs", "x"], strict=True)], abs=1e-4)
    assert len({round(score, 3) for score in scores}) == 3
    scale = model.clip.model.logit_scale.exp().item()
    assert all(abs(score) <= scale + 1e-4 for score in scores)  # a cosine, scaled


def test_cross_attention_leaves_masked_words_out() -> None:
    """Against attention written out: queries of each head on one head of keys and values, masked words with no weight."""
    torch.manual_seed(0)
    attention = CrossModel(WIDTH, num_layers=1, num_heads=2, head_width=8).layers[0][0].fn  # type: ignore[index]
    patches, words = torch.randn(1, 5, WIDTH), torch.randn(1, 4, WIDTH)
    mask = torch.tensor([0.0, float("-inf"), 0.0, 0.0]).expand(1, 5, 4)
    x = attention.norm(patches)
    queries, (keys, values) = attention.to_q(x).view(5, 2, 8), attention.to_kv(words)[0].split(8, -1)
    heads = []
    for head in range(2):
        weights = (queries[:, head] @ keys.T / 8**0.5 + mask[0]).softmax(-1)
        assert weights[:, 1].abs().max() == 0
        heads.append(weights @ values)
    hidden, gate = attention.ff[0](x).chunk(2, -1)
    expected = attention.to_out(torch.cat(heads, -1)) + attention.ff[2](torch.nn.functional.silu(gate) * hidden)
    torch.testing.assert_close(attention(patches, words, mask), expected)


def test_missing_and_wrong_files_say_what_to_fetch_and_where_to_put_it(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fetch openai/clip-vit-large-patch14"):
        Clip.load(tmp_path)
    with pytest.raises(InputError, match=r"head.safetensors' are missing; fetch sac\+logos\+ava1-l14-linearMSE.pth"):
        AestheticPredictor.load(clip_folder, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="HPS_v2.1_compressed.pt"):
        HumanPreference.load(clip_folder, tmp_path / "hps.safetensors")
    with pytest.raises(InputError, match="MPS_overall_checkpoint.pth"):
        MultiDimensionalPreference.load(clip_folder, tmp_path / "mps.safetensors")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InputError, match="no safetensors file"):
        AestheticPredictor.load(clip_folder, tmp_path / "pickle.pth")
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        AestheticPredictor.load(clip_folder, tmp_path / "other.safetensors")
