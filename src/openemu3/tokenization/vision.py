"""The vision tokenizer: pixels to codes and back, for stills, clips and videos of any length.

In: pixels, float [B, 3, H, W] or [B, 3, T, H, W] in [-1, 1]; H and W multiples of 8 (with the published multipliers).
Out: codes, int64 [B, h, w] or [B, t, h, w] with h = H/8, w = W/8, t = ceil(T/4), each in [0, codebook_size).

This is the published Emu3VisionVQ network (Emu3, section 2.2; SBER-MoVQGAN with temporal layers), parameter for parameter and
name for name. What surprises: a still is, by the published rule, a clip of four equal frames of which the first decoded frame
is kept. All of the 2-D network works frame by frame, so a still needs it once, not four times: the result is the same.

Shapes: B batch, T pixel frames, t latent frames, H W pixels, h w latent cells, C channels, Z latent channels (4).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openemu3.records import InputError

# What a causal convolution remembers between two chunks of a video: its last two input frames, by module.
TemporalState = dict[nn.Module, Tensor]

CAUSAL_PADDING = 2  # frames of zeros before the first one, whatever the kernel (published; facts 1.3)


@dataclass(frozen=True)
class VisionTokenizerConfig:
    """Sizes of the vision tokenizer. The defaults are the published 270,740,287-parameter network (paper, table 1)."""

    codebook_size: int = 32768
    embed_dim: int = 4  # channels of one codebook entry
    z_channels: int = 4  # channels that the temporal layers work on
    channels: int = 256
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    attention_levels: tuple[int, ...] = (3,)  # published as `attn_resolutions`, but it is the index of a level
    temporal_downsample_factor: int = 4
    num_norm_groups: int = 32
    num_temporal_res_blocks: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        factor = self.temporal_downsample_factor
        if factor < 1 or factor & (factor - 1):
            raise InputError(f"temporal_downsample_factor is {factor}; it must be a power of two")
        for multiplier in self.channel_multipliers:
            if (self.channels * multiplier) % self.num_norm_groups:
                raise InputError(
                    f"channels {self.channels} x multiplier {multiplier} must be a multiple of num_norm_groups {self.num_norm_groups}"
                )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def num_temporal_levels(self) -> int:
        return self.temporal_downsample_factor.bit_length() - 1


MINI_VISION_TOKENIZER = VisionTokenizerConfig(
    codebook_size=4096,
    channels=32,
    channel_multipliers=(1, 2, 4, 4),
    num_res_blocks=1,
    num_norm_groups=8,
)


class VisionTokenizer(nn.Module):
    """Encoder, codebook and decoder. Created in evaluation mode: its BatchNorm layers must use their running statistics."""

    def __init__(self, config: VisionTokenizerConfig = VisionTokenizerConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.embed_dim)
        self.quant_conv = CausalConv3d(config.z_channels, config.embed_dim, kernel=(3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels, kernel=(3, 1, 1))
        self.eval()

    # ---- pixels -> codes

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of stills [B, 3, H, W] in [-1, 1]."""
        self._check_pixels(pixels, 4)
        return self.quantize.nearest(self.encode_latents(pixels.unsqueeze(2)))[:, 0]

    @torch.no_grad()
    def encode_video(self, pixels: Tensor, *, independent_groups: bool = False, chunk_frames: int = 16) -> Tensor:
        """Codes int64 [B, ceil(T/4), h, w] of clips [B, 3, T, H, W] in [-1, 1].

        A last group of fewer than four frames is filled by repeating its last frame (the published code drops it in silence);
        `decode_video(codes, num_frames=T)` drops the filling again.
        independent_groups: encode every group of four frames with no memory of the ones before, as the authors' script does.
        chunk_frames bounds the memory; the codes do not depend on it.
        """
        self._check_pixels(pixels, 5)
        if independent_groups:
            groups = self._fill_last_group(pixels).unfold(2, self._group, self._group)  # [B, 3, t, H, W, 4]
            batch, num_groups = groups.shape[0], groups.shape[2]
            flat = groups.permute(0, 2, 1, 5, 3, 4).flatten(0, 1)  # [B*t, 3, 4, H, W]
            codes = torch.cat([self.quantize.nearest(self.encode_latents(part)) for part in flat.split(max(1, chunk_frames // 4))])
            return codes.view(batch, num_groups, *codes.shape[2:])
        return torch.cat(list(self.encode_stream(pixels.split(chunk_frames, dim=2))), dim=1)

    @torch.no_grad()
    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes [B, t_i, h, w] of a video that arrives in chunks [B, 3, T_i, H, W] of any lengths.

        The concatenated result equals that of the whole video at once, while no more than one chunk is in memory: the causal
        layers carry two frames of state each.
        """
        state: TemporalState = {}
        rest: Tensor | None = None
        for chunk in chunks:
            self._check_pixels(chunk, 5)
            frames = chunk if rest is None else torch.cat([rest, chunk], dim=2)
            whole = frames.shape[2] - frames.shape[2] % self._group
            rest = frames[:, :, whole:] if whole < frames.shape[2] else None
            if whole:
                yield self.quantize.nearest(self.encode_latents(frames[:, :, :whole], state))
        if rest is not None:
            yield self.quantize.nearest(self.encode_latents(self._fill_last_group(rest), state))
        elif not state:
            raise InputError("a video must have at least one frame; this one has none")

    # ---- codes -> pixels

    @torch.no_grad()
    def decode_image(self, codes: Tensor) -> Tensor:
        """Stills [B, 3, H, W], nominally in [-1, 1] (not clamped), of codes [B, h, w]."""
        self._check_codes(codes, 3)
        return self.decode_latents(self.quantize.lookup(codes.unsqueeze(1)), first_frame_only=True)[:, :, 0]

    @torch.no_grad()
    def decode_video(self, codes: Tensor, num_frames: int | None = None, *, chunk_latents: int = 4) -> Tensor:
        """Clips [B, 3, 4t, H, W] of codes [B, t, h, w]; with num_frames, what exceeds it is dropped from the end."""
        self._check_codes(codes, 4)
        pixels = torch.cat(list(self.decode_stream(codes.split(chunk_latents, dim=1))), dim=2)
        if num_frames is not None and not pixels.shape[2] - self._group < num_frames <= pixels.shape[2]:
            raise InputError(f"num_frames is {num_frames}; {codes.shape[1]} latent frames hold {pixels.shape[2] - 3} to {pixels.shape[2]}")
        return pixels[:, :, :num_frames]

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Clips [B, 3, 4 t_i, H, W] of codes that arrive in chunks [B, t_i, h, w]; equal to decoding them at once."""
        state: TemporalState = {}
        for codes in chunks:
            self._check_codes(codes, 4)
            yield self.decode_latents(self.quantize.lookup(codes), state)

    # ---- the two halves with gradients, as training uses them

    def encode_latents(self, pixels: Tensor, state: TemporalState | None = None) -> Tensor:
        """Continuous latents [B, Z, t, h, w] of pixels [B, 3, T, H, W]; T is 1 (a still) or a multiple of four."""
        return self.quant_conv(self.encoder(pixels, state), state)

    def decode_latents(self, quantized: Tensor, state: TemporalState | None = None, *, first_frame_only: bool = False) -> Tensor:
        """Pixels [B, 3, 4t, H, W] (or [B, 3, 1, H, W]) of codebook vectors [B, Z, t, h, w]."""
        return self.decoder(self.post_quant_conv(quantized, state), quantized, state, first_frame_only)

    # ---- details

    @property
    def _group(self) -> int:
        return self.config.temporal_downsample_factor

    def _fill_last_group(self, pixels: Tensor) -> Tensor:
        missing = -pixels.shape[2] % self._group
        return torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing else pixels

    def _check_pixels(self, pixels: Tensor, num_dims: int) -> None:
        layout = "[B, 3, H, W]" if num_dims == 4 else "[B, 3, T, H, W]"
        factor = self.config.spatial_factor
        if pixels.ndim != num_dims or pixels.shape[1] != 3:
            raise InputError(f"pixels have shape {list(pixels.shape)}; the vision tokenizer takes {layout}")
        height, width = pixels.shape[-2:]
        if height % factor or width % factor or not height or not width:
            raise InputError(f"pixels are {height} x {width}; both sides must be positive multiples of {factor}")

    def _check_codes(self, codes: Tensor, num_dims: int) -> None:
        layout = "[B, h, w]" if num_dims == 3 else "[B, t, h, w]"
        if codes.ndim != num_dims or codes.is_floating_point():
            raise InputError(f"codes have shape {list(codes.shape)} and type {codes.dtype}; the decoder takes integers {layout}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise InputError(f"codes span {int(codes.min())}..{int(codes.max())}; allowed is 0..{self.config.codebook_size - 1}")


def apply_channels_last(tokenizer: VisionTokenizer) -> None:
    """Lay the weights of the 2-D layers out with channels last: the same network, faster in bf16 and for decoding large pictures on a CPU.

    Layer by layer: asked of the whole network, torch refuses because of its 3-D convolutions.
    """
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out


class Codebook(nn.Module):
    """The table of code vectors, and the search for the nearest one (squared L2)."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    @torch.no_grad()
    def nearest(self, latents: Tensor, chunk: int = 256) -> Tensor:
        """Index int64 [B, t, h, w] of the code nearest to each latent [B, Z, t, h, w].

        In fp32 whatever the network's type, because codes are data. The full distance matrix of a 720 x 720 picture would
        take 1 GB; `chunk` latents at a time take 32 MB. The sum is written as the authors write it, so that ties fall alike.
        """
        flat = latents.float().movedim(1, -1).reshape(-1, latents.shape[1])
        codes = self.embedding.weight.float()
        code_norms, transposed = codes.square().sum(1), codes.t().contiguous()
        found = []
        for part in flat.split(chunk):
            distances = part.square().sum(1, keepdim=True) + code_norms
            found.append(distances.sub_(part @ transposed, alpha=2).argmin(1))
        return torch.cat(found).view(latents.shape[0], *latents.shape[2:])

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [B, Z, t, h, w] of codes [B, t, h, w]."""
        return self.embedding(codes).movedim(-1, 1)


class Encoder(nn.Module):
    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        groups = config.num_norm_groups
        self.factor = config.temporal_downsample_factor
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            previous = config.channels if level == 0 else widths[level - 1]
            blocks = [ResBlock(previous if i == 0 else width, width, groups) for i in range(config.num_res_blocks)]
            attends = level in config.attention_levels
            attentions = [AttentionBlock(width, groups) for _ in range(config.num_res_blocks if attends else 0)]
            self.down.append(EncoderStage(blocks, attentions, Downsample(width) if level < len(widths) - 1 else nn.Identity()))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
        self.time_conv = nn.ModuleList(TemporalDownsample(config.z_channels) for _ in range(config.num_temporal_levels))
        self.time_res_stack = nn.ModuleList(TemporalResBlock(config.z_channels) for _ in range(config.num_temporal_res_blocks))

    def forward(self, pixels: Tensor, state: TemporalState | None) -> Tensor:
        batch, _, num_frames = pixels.shape[:3]
        latents = self.encode_frames(pixels.transpose(1, 2).flatten(0, 1))  # [B*T, Z, h, w]
        x = latents.unflatten(0, (batch, num_frames)).transpose(1, 2)  # [B, Z, T, h, w]
        if num_frames == 1:
            x = x.expand(-1, -1, self.factor, -1, -1)  # a still is four equal frames
        for layer in self.time_conv:
            x = F.silu(layer(x, state))
        for layer in self.time_res_stack:
            x = layer(x, state)
        return x  # [B, Z, t, h, w]

    def encode_frames(self, frames: Tensor) -> Tensor:
        """The 2-D trunk: latents [N, Z, h, w] of frames [N, 3, H, W], each frame by itself."""
        x = self.conv_in(frames)
        for stage in self.down:
            x = stage(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        groups, z = config.num_norm_groups, config.z_channels
        self.time_res_stack = nn.ModuleList(TemporalResBlock(z) for _ in range(config.num_temporal_res_blocks))
        self.time_conv = nn.ModuleList(TemporalUpsample(z) for _ in range(config.num_temporal_levels))
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, config.embed_dim)
        self.up = nn.ModuleList()
        num_blocks = config.num_res_blocks + 1
        for level, width in enumerate(widths):
            previous = widths[min(level + 1, len(widths) - 1)]  # levels run from the last to the first
            blocks = [ResBlock(previous if i == 0 else width, width, groups, config.embed_dim) for i in range(num_blocks)]
            attends = level in config.attention_levels
            attentions = [AttentionBlock(width, groups, config.embed_dim) for _ in range(num_blocks if attends else 0)]
            self.up.append(DecoderStage(blocks, attentions, Upsample(width) if level > 0 else nn.Identity()))
        self.norm_out = SpatialNorm(widths[0], groups, config.embed_dim)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor, quantized: Tensor, state: TemporalState | None, first_frame_only: bool) -> Tensor:
        batch = latents.shape[0]
        # Published: latents and raw code vectors go through the same temporal layers, so the map that conditions the norms
        # is the time-upsampled code vector, not the code vector itself.
        x = torch.cat([latents, quantized.to(latents.dtype)])  # [2B, Z, t, h, w]
        for layer in self.time_res_stack:
            x = layer(x, state)
        for layer in self.time_conv:
            x = F.silu(layer(x, state))
        if first_frame_only:
            x = x[:, :, :1]
        num_frames = x.shape[2]
        latents, condition = x.transpose(1, 2).flatten(0, 1).chunk(2)  # [B*4t, Z, h, w] each
        frames = self.decode_frames(latents, condition)
        return frames.unflatten(0, (batch, num_frames)).transpose(1, 2)

    def decode_frames(self, latents: Tensor, condition: Tensor) -> Tensor:
        """The 2-D trunk: frames [N, 3, H, W] of latents [N, Z, h, w] and the norms' conditioning map of the same shape."""
        x = self.mid(self.conv_in(latents), condition)
        for stage in reversed(self.up):
            x = stage(x, condition)
        return self.conv_out(F.silu(self.norm_out(x, condition)))


class EncoderStage(nn.Module):
    """One level of the encoder: residual blocks, attention after each of them where the level has it, and half the size."""

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in itertools.zip_longest(self.block, self.attn):
            x = block(x)
            x = attention(x) if attention is not None else x
        return self.downsample(x)


class DecoderStage(nn.Module):
    """One level of the decoder: residual blocks, attention after each of them where the level has it, and double the size."""

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], upsample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        self.upsample = upsample

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block, attention in itertools.zip_longest(self.block, self.attn):
            x = block(x, condition)
            x = attention(x, condition) if attention is not None else x
        return self.upsample(x)


class Middle(nn.Module):
    """The level of the smallest maps: a residual block, attention, a residual block."""

    def __init__(self, channels: int, groups: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups, condition_channels)
        self.attn_1 = AttentionBlock(channels, groups, condition_channels)
        self.block_2 = ResBlock(channels, channels, groups, condition_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, condition), condition), condition)


class ResBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input (through a 1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = build_norm(in_channels, groups, condition_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = build_norm(out_channels, groups, condition_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(apply_norm(self.norm1, x, condition)))
        h = self.conv2(F.silu(apply_norm(self.norm2, h, condition)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """One head of full attention over the cells of one frame. The projections are published as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int, condition_channels: int | None = None) -> None:
        super().__init__()
        self.norm = build_norm(channels, groups, condition_channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        normed = apply_norm(self.norm, x, condition)
        cells = normed.flatten(2).transpose(1, 2)  # [N, h*w, C]
        q, k, v = (F.linear(cells, m.weight.flatten(1), m.bias).unsqueeze(1) for m in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # scale 1/sqrt(C)
        mixed = F.linear(mixed, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read from the codes (MoVQ, arXiv 2209.09002, eq. 3): GN(x) * y(zq) + b(zq)."""

    def __init__(self, channels: int, groups: int, condition_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # Published: enlarge the map to x's size (nearest), then the 1x1 convolutions. A 1x1 convolution commutes with nearest
        # enlarging, so they run on the small map, and the enlarging is a broadcast over the r x r pixels of a cell.
        height, width = condition.shape[2:]
        ratio_h, ratio_w = x.shape[2] // height, x.shape[3] // width
        scale = self.conv_y(condition)[:, :, :, None, :, None]  # [N, C, h, 1, w, 1]
        shift = self.conv_b(condition)[:, :, :, None, :, None]
        normed = self.norm_layer(x).unflatten(3, (width, ratio_w)).unflatten(2, (height, ratio_h))
        return torch.addcmul(shift, normed, scale).flatten(4, 5).flatten(2, 3)


def build_norm(channels: int, groups: int, condition_channels: int | None) -> nn.Module:
    if condition_channels is None:
        return nn.GroupNorm(groups, channels, eps=1e-6)
    return SpatialNorm(channels, groups, condition_channels)


def apply_norm(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    return norm(x) if condition is None else norm(x, condition)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom alone


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class CausalConv3d(nn.Module):
    """A 3-D convolution that sees no later frame: two frames before the first are zeros, or the last two of the chunk before."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3), stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, state: TemporalState | None = None) -> Tensor:
        past = None if state is None else state.get(self)
        if past is None:
            past = x.new_zeros(x.shape[0], x.shape[1], CAUSAL_PADDING, *x.shape[3:])
        x = torch.cat([past, x], dim=2)
        if state is not None:
            state[self] = x[:, :, -CAUSAL_PADDING:].clone()  # a copy: a view would keep the whole chunk alive
        return self.conv(x)


class TemporalDownsample(nn.Module):
    """Halves the frames: output i sees the inputs 2i-2 ... 2i+1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel=(4, 3, 3), stride=(2, 1, 1))

    def forward(self, x: Tensor, state: TemporalState | None) -> Tensor:
        return self.conv(x, state)


class TemporalUpsample(nn.Module):
    """Doubles the frames: each twice, then a causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor, state: TemporalState | None) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2), state)


class TemporalResBlock(nn.Module):
    """BatchNorm, SiLU, causal 3x3x3, BatchNorm, SiLU, causal 3x3x3, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels)

    def forward(self, x: Tensor, state: TemporalState | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), state)
        h = self.conv2(F.silu(self.norm2(h)), state)
        return x + h
