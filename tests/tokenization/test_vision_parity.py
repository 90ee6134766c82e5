"""The vision tokenizer against transformers' Emu3VQVAE on random weights: equal codes, decoded pixels to 1e-5, stills and clips.

Known faults of the oracle that the tests go around: its 5-D encode crops time as if it were height (so it gets sizes too large to
crop anything), it drops frames that do not fill a group of four (so it gets whole groups), and it must be in evaluation mode.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from openemu3.model.layouts import to_published_name, to_published_shape
from openemu3.records import InputError
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig, apply_channels_last

KEYS = Path(__file__).parent / "data" / "vision_tokenizer_keys.txt"
# name -> (sizes of our network, width of the transformers attention layers)
NARROW = VisionTokenizerConfig(codebook_size=512, channels=32)
CONFIGS = {
    "narrow": NARROW,
    "one block, three levels, two attentions": VisionTokenizerConfig(
        codebook_size=256, channels=32, channel_multipliers=(1, 3, 3), num_res_blocks=1, num_temporal_res_blocks=1, attention_levels=(1, 2)
    ),
    "two frames a group": VisionTokenizerConfig(
        codebook_size=300, channels=32, channel_multipliers=(1, 1, 2), attention_levels=(2,), temporal_downsample_factor=2
    ),
}


def build_pair(config: VisionTokenizerConfig, seed: int = 0) -> tuple[VisionTokenizer, Emu3VQVAE]:
    """The two networks with the same random weights; every norm and running statistic is random too, or a port could skip it unseen."""
    oracle_config = Emu3VQVAEConfig(
        codebook_size=config.codebook_size,
        embed_dim=config.embed_dim,
        latent_channels=config.z_channels,
        temporal_downsample_factor=config.temporal_downsample_factor,
        base_channels=config.channels,
        channel_multiplier=list(config.channel_multipliers),
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=list(config.attention_levels),
        hidden_size=config.channels * config.channel_multipliers[-1],
    )
    with torch.device("meta"):
        oracle = Emu3VQVAE(oracle_config)
        ours = VisionTokenizer(config)
    oracle.to_empty(device="cpu").eval()
    randomise(oracle, seed)
    # Shared storage: at full width one copy is 1.08 GB.
    ours.load_state_dict(to_published(oracle.state_dict()), strict=True, assign=True)
    return ours, oracle


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for name, tensor in state.items():
        part, official = to_published_name(name)
        assert part == "vision_tokenizer"
        published[official] = tensor.view(to_published_shape(official, tensor.shape))
    return published


@torch.no_grad()
def randomise(oracle: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in oracle.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(1)
        elif "embedding" in name:
            tensor.uniform_(-2, 2, generator=generator)
        elif name.endswith("running_var") or ("norm" in name and name.endswith("weight") and tensor.dim() == 1):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(-0.1, 0.1, generator=generator)
        else:
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
    # Centre and spread the latents over the codebook, as training would; else all cells get one code and equality proves little.
    latents: list[Tensor] = []
    hook = oracle.quant_conv.register_forward_hook(lambda _, __, output: latents.append(output))
    oracle.encode(make_pixels(1, 8 * 3, 24, 24).view(1, 8, 3, 24, 24), torch.tensor([[24, 24]]))
    hook.remove()
    spread, mean = torch.std_mean(latents[0], dim=(0, 2, 3, 4))
    oracle.quant_conv.conv.weight.div_(spread.view(-1, 1, 1, 1, 1))
    oracle.quant_conv.conv.bias.sub_(mean).div_(spread)


def make_pixels(*shape: int, seed: int = 1) -> Tensor:
    """Blocks of 8 x 8 pixels of one random colour, and some noise: pure noise would give every cell about the same latent."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    blocks = torch.rand(*shape[:-2], -(-height // 8), -(-width // 8), generator=generator) * 2 - 1
    pixels = blocks.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1)[..., :height, :width]
    return (pixels + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)


def encode_by_oracle(oracle: Emu3VQVAE, pixels: Tensor) -> Tensor:
    """Codes [B, h, w] of [B, 3, H, W], or [B, t, h, w] of [B, 3, T, H, W]."""
    frames = pixels if pixels.ndim == 4 else pixels.transpose(1, 2)
    with torch.no_grad():
        return torch.stack(oracle.encode(frames, torch.tensor([[10**6, 10**6]] * len(frames))).image_tokens)


def decode_by_oracle(oracle: Emu3VQVAE, codes: Tensor) -> Tensor:
    with torch.no_grad():
        pixels = oracle.decode(codes)
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2)


def check_same(ours: VisionTokenizer, oracle: Emu3VQVAE, pixels: Tensor) -> None:
    still = pixels.ndim == 4
    codes = (ours.encode_image if still else ours.encode_video)(pixels)
    assert torch.equal(codes, encode_by_oracle(oracle, pixels))
    if codes.numel() > 12:
        assert codes.unique().numel() >= codes.numel() ** 0.5  # weights that give one code for everything would prove nothing
    decoded = (ours.decode_image if still else ours.decode_video)(codes)
    assert decoded.std() > 0.03
    # 1e-5 is meant for pixels in [-1, 1]; random weights may draw beyond.
    torch.testing.assert_close(decoded, decode_by_oracle(oracle, codes), rtol=0, atol=1e-5 * max(1.0, decoded.abs().max().item()))


@pytest.fixture(scope="module")
def narrow_pair() -> tuple[VisionTokenizer, Emu3VQVAE]:
    return build_pair(NARROW)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 8)])
def test_stills(name: str, size: tuple[int, int]) -> None:
    ours, oracle = build_pair(CONFIGS[name])
    check_same(ours, oracle, make_pixels(3, 3, *size))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_frames", [4, 12, 20])
def test_clips(name: str, num_frames: int) -> None:
    ours, oracle = build_pair(CONFIGS[name], seed=2)
    check_same(ours, oracle, make_pixels(2, 3, num_frames, 16, 24))


@pytest.mark.parametrize("name", CONFIGS)
def test_double_precision_leaves_no_difference(name: str) -> None:
    ours, oracle = build_pair(CONFIGS[name], seed=3)
    ours.double(), oracle.double()
    for pixels in (make_pixels(2, 3, 24, 32).double(), make_pixels(1, 3, 8, 16, 24).double()):
        still = pixels.ndim == 4
        codes = encode_by_oracle(oracle, pixels)
        decoded = (ours.decode_image if still else ours.decode_video)(codes)
        torch.testing.assert_close(decoded, decode_by_oracle(oracle, codes), rtol=0, atol=1e-12 * decoded.abs().max().item())


def test_channels_last_changes_the_layout_alone() -> None:
    ours, oracle = build_pair(NARROW, seed=5)
    apply_channels_last(ours)
    # Of one-pixel kernels torch cannot tell the two layouts apart; the others say which they have.
    assert ours.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not ours.encoder.conv_in.weight.is_contiguous()
    check_same(ours, oracle, make_pixels(2, 3, 24, 32))
    check_same(ours, oracle, make_pixels(1, 3, 8, 16, 24))


def test_full_width() -> None:
    ours, oracle = build_pair(VisionTokenizerConfig())
    check_same(ours, oracle, make_pixels(2, 3, 16, 24))
    check_same(ours, oracle, make_pixels(1, 3, 8, 16, 8))


def test_independent_groups_as_the_official_script(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE]) -> None:
    ours, oracle = narrow_pair
    pixels = make_pixels(2, 3, 12, 16, 24)
    groups = [encode_by_oracle(oracle, group)[:, 0] for group in pixels.split(4, dim=2)]
    codes = ours.encode_video(pixels, independent_groups=True)
    assert torch.equal(codes, torch.stack(groups, dim=1))
    assert torch.equal(codes, ours.encode_video(pixels, independent_groups=True, chunk_frames=4))
    assert not torch.equal(codes[:, 1:], ours.encode_video(pixels)[:, 1:])


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 7])
def test_frames_that_do_not_fill_a_group(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE], num_frames: int) -> None:
    ours, oracle = narrow_pair
    pixels = make_pixels(1, 3, num_frames, 16, 16)
    missing = -num_frames % 4
    filled = torch.cat([pixels, *[pixels[:, :, -1:]] * missing], dim=2)
    codes = ours.encode_video(pixels)
    assert torch.equal(codes, encode_by_oracle(oracle, filled))
    assert torch.equal(ours.encode_video(pixels, independent_groups=True)[:, :1], codes[:, :1])
    decoded = ours.decode_video(codes, num_frames=num_frames)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, decode_by_oracle(oracle, codes)[:, :, :num_frames], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="num_frames"):
        ours.decode_video(codes, num_frames=4 * codes.shape[1] + 1)


@pytest.mark.parametrize("chunks", [(1,) * 21, (4, 4, 13), (3, 5, 1, 12), (21,)])
def test_streams_equal_the_whole_clip(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE], chunks: tuple[int, ...]) -> None:
    ours, _ = narrow_pair
    pixels = make_pixels(1, 3, 21, 16, 16)
    with torch.no_grad():
        filled = torch.cat([pixels, *[pixels[:, :, -1:]] * 3], dim=2)
        whole_codes = ours.quantize.nearest(ours.encode_latents(filled))
        whole_pixels = ours.decode_latents(ours.quantize.lookup(whole_codes))
    codes = torch.cat(list(ours.encode_stream(pixels.split(list(chunks), dim=2))), dim=1)
    assert torch.equal(codes, whole_codes)
    for step in (1, 2, 6):
        decoded = torch.cat(list(ours.decode_stream(codes.split(step, dim=1))), dim=2)
        torch.testing.assert_close(decoded, whole_pixels, rtol=0, atol=1e-5)


def test_two_streams_do_not_share_state(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE]) -> None:
    ours, _ = narrow_pair
    first, second = make_pixels(1, 3, 8, 16, 16), make_pixels(1, 3, 8, 16, 16, seed=9)
    alternating = list(zip(ours.encode_stream(first.split(4, dim=2)), ours.encode_stream(second.split(4, dim=2)), strict=True))
    assert torch.equal(torch.cat([a for a, _ in alternating], dim=1), ours.encode_video(first))
    assert torch.equal(torch.cat([b for _, b in alternating], dim=1), ours.encode_video(second))


def test_causality(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE]) -> None:
    ours, _ = narrow_pair
    pixels = make_pixels(1, 3, 12, 16, 16)
    later = pixels.clone()
    later[:, :, 8:] = 0
    codes, changed = ours.encode_video(pixels), ours.encode_video(later)
    assert torch.equal(codes[:, :2], changed[:, :2]) and not torch.equal(codes[:, 2], changed[:, 2])
    decoded, redecoded = ours.decode_video(codes), ours.decode_video(changed)
    torch.testing.assert_close(decoded[:, :, :8], redecoded[:, :, :8], rtol=0, atol=1e-6)


def test_codes_do_not_depend_on_the_batch(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE]) -> None:
    ours, _ = narrow_pair
    pixels = make_pixels(4, 3, 24, 24)
    assert torch.equal(ours.encode_image(pixels), torch.cat([ours.encode_image(one) for one in pixels.split(1)]))


def test_nearest_code_by_brute_force(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE]) -> None:
    ours, _ = narrow_pair
    latents = torch.randn(2, 4, 3, 5, 7, generator=torch.Generator().manual_seed(4))
    vectors = latents.movedim(1, -1).reshape(-1, 4).double()
    expected = torch.cdist(vectors, ours.quantize.embedding.weight.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(ours.quantize.nearest(latents).flatten(), expected)
    assert torch.equal(ours.quantize.nearest(latents, chunk=11), ours.quantize.nearest(latents))


def test_published_size_and_names() -> None:
    with torch.device("meta"):
        tokenizer = VisionTokenizer()
    assert sum(p.numel() for p in tokenizer.parameters()) == 270_740_287
    listed = dict(line.split(" ", 1) for line in KEYS.read_text().splitlines())
    assert {name: str(tuple(tensor.shape)) for name, tensor in tokenizer.state_dict().items()} == listed
    assert len(listed) == 495


def test_created_in_evaluation_mode() -> None:
    assert not any(module.training for module in VisionTokenizer(NARROW).modules())


def test_bad_input_is_named(narrow_pair: tuple[VisionTokenizer, Emu3VQVAE]) -> None:
    ours, _ = narrow_pair
    for pixels in (make_pixels(1, 3, 20, 16), make_pixels(1, 3, 0, 16), make_pixels(1, 1, 16, 16), make_pixels(1, 3, 4, 16, 16)):
        with pytest.raises(InputError, match=r"multiples of 8|shape"):
            ours.encode_image(pixels)
    with pytest.raises(InputError, match="at least one frame"):
        ours.encode_video(make_pixels(1, 3, 0, 16, 16))
    for codes in (torch.full((1, 2, 2), 512), torch.full((1, 2, 2), -1), torch.zeros(1, 2, 2), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(InputError, match=r"0\.\.511|integers"):
            ours.decode_image(codes)


MEMORY_SCRIPT = r"""
import re, torch
from openemu3.tokenization.vision import VisionTokenizer, VisionTokenizerConfig

def peak():
    # Not getrusage: its ru_maxrss starts from what the process that started this one had.
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

def stream(num_frames, chunk):
    frames = (torch.zeros(1, 3, chunk, 32, 32) for _ in range(num_frames // chunk))
    return sum(part.shape[2] for part in tokenizer.decode_stream(tokenizer.encode_stream(frames)))

torch.set_num_threads(1)
tokenizer = VisionTokenizer(VisionTokenizerConfig(codebook_size=512, channels=32, channel_multipliers=(1, 1, 1, 1), num_res_blocks=1))
for num_frames, chunk in ((16, 8), (64, 8), (256, 8), (128, 128)):
    assert stream(num_frames, chunk) == num_frames
    print(peak())
"""


def test_memory_of_a_stream_does_not_grow_with_the_video() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    at_16, at_64, at_256, at_once = (float(line) for line in done.stdout.split())  # peak MiB so far
    assert at_64 - at_16 < 8 and at_256 - at_16 < 8
    assert at_once - at_256 > 25  # what half as many frames take in one chunk: the measurement does see growth
