"""Wan2.2-TI2V-5B by hand: the video expert (a diffusion transformer, DiT) and the video VAE.

The DiT (Wan2.2 `wan/modules/model.py`): latents (B, 48, T, h, w) are cut into patches (1, 2, 2), tokens in the order t, h, w. A block is

    x += gate1 * SelfAttention(shift1 + (1 + scale1) * LN(x))      3-D RoPE on q and k, q/k RMSNorm over the full width
    x += CrossAttention(LN_affine(x), text)                        no gate, no mask, no rotary
    x += gate2 * FFN(shift2 + (1 + scale2) * LN(x))                GELU(tanh)

with (shift, scale, gate) x 2 = block table + projected time. In Motus the self-attention is the joint attention of `attention.py`, so the
block is split where the experts meet: `pre_attention` gives q, k, v and `post_attention` takes the attended values.

Conventions: the network is fed t in [0, 1000], 1000 is noise; its output is the velocity noise - data. Precision: the residual stream, the
time path, modulation and head are fp32; the other linear maps run in the dtype of their weights. Tensor names are the original ones.

Shapes: B batch, C latent channels, T latent frames, h w latent grid, L = T*(h/2)*(w/2) tokens, D width, N heads, K head size, Lt text rows.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from attention import (
    LayerNorm,
    Linear,
    LinearFP32,
    RMSNorm,
    add_gated,
    attention,
    mlp,
    norm_modulate,
    norm_rotate,
    text_bias,
)

# -- the video expert -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the video transformer; the defaults are Wan2.2-TI2V-5B."""

    width: int = 3072
    ffn: int = 14336
    layers: int = 30
    heads: int = 24
    latent: int = 48  # channels of the VAE latent
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096  # width of the text encoder's states
    text_len: int = 512  # official padded length of the text
    freq_dim: int = 256  # width of the time sinusoid
    eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"video width {self.width} must be an even multiple of heads {self.heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Modulation(NamedTuple):
    """What the timestep does to a sub-layer: x -> gate * f(shift + (1 + scale) * LN(x)). Each (B, 1 or L, D), fp32."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulation(table: Tensor, time: Tensor) -> list[Tensor]:
    """Adds a learned table (1, n, D) to the time projection (B, 1 or L, n, D) in fp32 and returns its n parts (B, 1 or L, D)."""
    return list((table.float() + time.float()).unbind(dim=2))


def time_sinusoid(t: Tensor, dim: int) -> Tensor:
    """t in [0, 1000], any shape -> (..., dim) fp32, cosines first, computed in float64 as Wan does."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rope_3d(
    grid: tuple[int, int, int], head_dim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (L, K/2) of the token grid (T, H, W). The K/2 pairs are split between the axes, each with its own ladder
    10000^(-2j/axis_dim): 22/21/21 pairs at K = 128. Angles are computed in float64, the tables are fp32."""
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, (head_dim - 2 * side, side, side))):
        ladder = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.outer(torch.arange(size, dtype=torch.float64, device=device), ladder)
        shape = [1, 1, 1, len(ladder)]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, -1))
    angle = rearrange(torch.cat(angles, dim=-1), "t h w k -> (t h w) k")
    return angle.cos().float(), angle.sin().float()


class WanAttention(nn.Module):
    """Projections of one attention: q, k, v, o with biases, q and k normed over the full width before the split into heads."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def queries(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, N, K)
        return rearrange(self.norm_q(self.q(x)), "b l (n k) -> b l n k", n=self.heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, L, D) -> 2 x (B, L, N, K)
        return (
            rearrange(self.norm_k(self.k(x)), "b l (n k) -> b l n k", n=self.heads),
            rearrange(self.v(x), "b l (n k) -> b l n k", n=self.heads),
        )


class TextStates(NamedTuple):
    """Embedded text (B, Lt, D) and the bias (B, 1, 1, Lt) of its rows as keys."""

    states: Tensor
    bias: Tensor


class TextKV(NamedTuple):
    """Keys and values of one layer's cross attention, computed once per instruction. k, v (B, Lt, N, K); bias (B, 1, 1, Lt)."""

    k: Tensor
    v: Tensor
    bias: Tensor


class WanBlock(nn.Module):
    """One layer of the video expert, open where the joint attention happens."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width, eps = config.width, config.eps
        self.norm1 = LayerNorm(width, eps, elementwise_affine=False)
        self.self_attn = WanAttention(width, config.heads, eps)
        self.norm3 = LayerNorm(width, eps)  # the only one with weight and bias
        self.cross_attn = WanAttention(width, config.heads, eps)
        self.norm2 = LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = mlp(width, config.ffn, width, act=nn.GELU, approximate="tanh")
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def pre_attention(
        self, x: Tensor, mod: Modulation, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q, k (normed, rotated), v, each (B, L, N, K)."""
        attn = self.self_attn
        h = norm_modulate(x, self.norm1, mod.shift, mod.scale, self.modulation.dtype)
        v = rearrange(attn.v(h), "b l (n k) -> b l n k", n=attn.heads)
        return *norm_rotate(attn.q(h), attn.k(h), attn.norm_q, attn.norm_k, v.shape[-1], rope), v

    def text_kv(self, text: TextStates) -> TextKV:
        return TextKV(*self.cross_attn.keys_values(text.states), text.bias)

    def post_attention(
        self,
        x: Tensor,
        attended: Tensor,
        mod: Modulation,
        ffn_mod: Modulation,
        text: TextStates | TextKV,
    ) -> Tensor:
        """x (B, L, D) residual stream, attended (B, L, N*K), text with or without its keys and values made -> (B, L, D) fp32."""
        x = add_gated(x, self.self_attn.o(attended), mod.gate)
        text = text if isinstance(text, TextKV) else self.text_kv(text)
        y = attention(self.cross_attn.queries(self.norm3(x)), text.k, text.v, text.bias)
        x = x + self.cross_attn.o(rearrange(y, "b l n k -> b l (n k)")).float()
        h = norm_modulate(x, self.norm2, ffn_mod.shift, ffn_mod.scale, self.modulation.dtype)
        return add_gated(x, self.ffn(h), ffn_mod.gate)


class WanHead(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        pt, ph, pw = config.patch
        self.norm = LayerNorm(config.width, config.eps, elementwise_affine=False)
        self.head = LinearFP32(config.width, pt * ph * pw * config.latent)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # x (B, L, D), e (B, 1 or L, D)
        return self.head(norm_modulate(x, self.norm, *modulation(self.modulation, e.unsqueeze(2))))


class WanModel(nn.Module):
    """The video transformer. `forward` is Wan alone (video generation without the other experts)."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Conv3d(
            config.latent, width, kernel_size=config.patch, stride=config.patch
        )
        self.text_embedding = mlp(config.text_dim, width, width, act=nn.GELU, approximate="tanh")
        self.time_embedding = mlp(config.freq_dim, width, width, linear=LinearFP32)
        self.time_projection = nn.Sequential(nn.SiLU(), LinearFP32(width, 6 * width))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.layers))
        self.head = WanHead(config)

    def init_weights(self) -> None:
        """The official initialisation: Xavier linear maps, std 0.02 for text and time embeddings, a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) or per token (B, L), in [0, 1] -> e (B, 1 or L, D) for the head, e0 (B, 1 or L, 6, D) for the blocks, fp32."""
        t = t[:, None] if t.dim() == 1 else t
        e = self.time_embedding(time_sinusoid(1000 * t, self.config.freq_dim))
        return e, rearrange(self.time_projection(e), "b l (six d) -> b l six d", six=6)

    def embed_text(self, context: Tensor, lengths: Tensor) -> TextStates:
        """Text states (B, Lt, text_dim), zero from row `lengths` (B,) on, into the video width. The official code pads to text_len
        rows and attends to all of them; here one padded row stands for all of them, and is added where it may be missing."""
        if context.shape[1] < self.config.text_len:
            context = torch.cat(
                [context, context.new_zeros(len(context), 1, context.shape[2])], dim=1
            )
        bias = text_bias(lengths, context.shape[1], self.config.text_len)[
            :, None, None
        ]  # (B, 1, 1, Lt)
        return TextStates(self.text_embedding(context), bias)

    def patchify(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """(B, C, T, h, w) -> tokens (B, L, D) in the order t, h, w, and their grid."""
        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        return rearrange(x, "b d t h w -> b (t h w) d"), tuple(x.shape[2:])

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, L, patch * C), channel fastest -> (B, C, T, h, w)."""
        (t, h, w), (pt, ph, pw) = grid, self.config.patch
        return rearrange(
            x,
            "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            t=t,
            h=h,
            w=w,
            pt=pt,
            ph=ph,
            pw=pw,
        )

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
        """latents (B, C, T, h, w), t (B,) or (B, L) in [0, 1], text (B, Lt, text_dim) with lengths (B,) -> velocity (B, C, T, h, w)."""
        x, grid = self.patchify(latents)
        e, e0 = self.embed_time(t)
        rope = rope_3d(grid, self.config.head_dim, x.device)
        text = self.embed_text(context, lengths)
        for block in self.blocks:
            parts = modulation(block.modulation, e0)
            mod, ffn_mod = Modulation(*parts[:3]), Modulation(*parts[3:])
            q, k, v = block.pre_attention(x, mod, rope)
            attended = rearrange(attention(q, k, v), "b l n k -> b l (n k)")
            x = block.post_attention(x, attended, mod, ffn_mod, text)
        return self.unpatchify(self.head(x, e), grid)


# -- the video VAE ----------------------------------------------------------------------------------------------------------
#
#   encoder   2 x 2 patches -> conv -> levels of residual blocks, all but the last halving the picture -> attention -> mean, log variance
#   decoder   latents -> conv -> attention -> the same levels backwards -> conv -> 2 x 2 patches
#
# Convolutions over time are causal, and frame 0 is a latent frame by itself while each later one stands for `stride[0]` frames. So a clip
# can pass in one piece (fast, the default) or in chunks, frame 0 and then one latent frame's worth at a time, in the memory of one chunk.
# Both give the same numbers: `Past` carries from chunk to chunk what the layers must remember, and there is no other difference.
# Tensor names are those of Wan2.2_VAE.pth. Shapes as above, with F H W frames, height and width of the video.


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the video VAE and the statistics of its latents; the defaults are Wan2.2."""

    dim: int = 160  # encoder width at level 0
    dec_dim: int = 256  # decoder width at level 0
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (
        1,
        2,
        4,
        4,
    )  # width of each level; each but the last halves the picture
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (
        False,
        True,
        True,
    )  # per level but the last: does it halve time too
    mean: tuple[float, ...] = (
        -0.2289,
        -0.0052,
        -0.1323,
        -0.2339,
        -0.2799,
        0.0174,
        0.1838,
        0.1557,
        -0.1382,
        0.0542,
        0.2813,
        0.0891,
        0.1570,
        -0.0098,
        0.0375,
        -0.1825,
        -0.2246,
        -0.1207,
        -0.0698,
        0.5109,
        0.2665,
        -0.2108,
        -0.2158,
        0.2502,
        -0.2055,
        -0.0322,
        0.1109,
        0.1567,
        -0.0729,
        0.0899,
        -0.2799,
        -0.1230,
        -0.0313,
        -0.1649,
        0.0117,
        0.0723,
        -0.2839,
        -0.2083,
        -0.0520,
        0.3748,
        0.0152,
        0.1957,
        0.1433,
        -0.2944,
        0.3573,
        -0.0548,
        -0.1681,
        -0.0667,
    )
    std: tuple[float, ...] = (
        0.4765,
        1.0364,
        0.4514,
        1.1677,
        0.5313,
        0.4990,
        0.4818,
        0.5013,
        0.8158,
        1.0344,
        0.5894,
        1.0901,
        0.6885,
        0.6165,
        0.8454,
        0.4978,
        0.5759,
        0.3523,
        0.7135,
        0.6804,
        0.5833,
        1.4146,
        0.8986,
        0.5659,
        0.7069,
        0.5338,
        0.4889,
        0.4917,
        0.4069,
        0.4999,
        0.6866,
        0.4093,
        0.5709,
        0.6065,
        0.6415,
        0.4944,
        0.5726,
        1.2042,
        0.5458,
        1.6887,
        0.3971,
        1.0600,
        0.3943,
        0.5537,
        0.5444,
        0.4089,
        0.7468,
        0.7744,
    )

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"VAE temporal_downsample has {len(self.temporal_downsample)} entries for {len(self.dim_mult)} levels of "
                "dim_mult; give one for each level but the last"
            )
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(
                f"VAE mean and std have {len(self.mean)} and {len(self.std)} entries; give z_dim = {self.z_dim} of each"
            )


WAN_VAE_PRESETS = {"wan2.2": WanVAEConfig()}


class Past:
    """What the chunks of a clip leave behind for the next one: the last frames that each layer saw."""

    def __init__(self, keep: bool):
        self.keep, self.first, self.frames = keep, True, {}  # first: the chunk begins with frame 0

    def extend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """x (B, C, T, H, W) behind the up to `count` frames that `layer` saw last."""
        if layer in self.frames:
            x = torch.cat([self.frames[layer], x], dim=2)
        if self.keep:
            self.frames[layer] = x[:, :, -count:].clone(memory_format=torch.channels_last_3d)
        return x


class Temporal:
    """Marks the layers that are called as layer(x, past)."""


class Chain(nn.Sequential, Temporal):
    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self:
            x = layer(x, past) if isinstance(layer, Temporal) else layer(x)
        return x


class CausalConv3d(nn.Conv3d, Temporal):
    """A 3-D convolution that sees no later frame; before frame 0 it sees zeros."""

    def forward(self, x: Tensor, past: Past) -> Tensor:  # (B, C, T, H, W) -> (B, C', T, H, W)
        seen = past.extend(self, x, self.kernel_size[0] - 1)
        taps = min(self.kernel_size[0], seen.shape[2])  # the others would only read zeros
        zeros = taps - 1 - (seen.shape[2] - x.shape[2])
        seen = F.pad(seen, (0, 0, 0, 0, zeros, 0)) if zeros else seen
        return F.conv3d(seen, self.weight[:, :, -taps:], self.bias, padding=(0, *self.padding[1:]))


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels. Unlike in `RMSNorm` nothing is added to |x|, it only has a floor (1e-12)."""

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        mean_square = (
            x.float().square().mean(dim=1, keepdim=True)
        )  # much faster on a CPU than a norm over axis 1
        return x * mean_square.clamp(min=1e-24 / x.shape[1]).rsqrt().to(x.dtype) * self.gamma


class ResidualBlock(nn.Module, Temporal):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.residual = Chain(
            ChannelNorm(n_in),
            nn.SiLU(),
            CausalConv3d(n_in, n_out, 3, padding=1),
            ChannelNorm(n_out),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(n_out, n_out, 3, padding=1),
        )
        self.shortcut = nn.Conv3d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.residual(x, past) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Attention of one head among the positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, H, W)
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(
            self.to_qkv(self.norm(frames)), "f (three c) h w -> three f (h w) 1 c", three=3
        )
        attended = rearrange(attention(q, k, v), "f (h w) 1 c -> f c h w", h=h)
        return x + rearrange(self.proj(attended), "(b t) c h w -> b c t h w", b=b)


class Resample(nn.Module, Temporal):
    def per_frame(self, x: Tensor) -> Tensor:
        return rearrange(
            self.resample(rearrange(x, "b c t h w -> (b t) c h w")),
            "(b t) c h w -> b c t h w",
            b=len(x),
        )


class Downsample(Resample):
    """Halves height and width, then time: frame 0 stays, and a convolution over (0, 1, 2), (2, 3, 4), ... makes the others."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2)
        )  # pads right and bottom only
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(
        self, x: Tensor, past: Past
    ) -> Tensor:  # (B, C, 1+2n, H, W) -> (B, C, 1+n, H/2, W/2)
        x = self.per_frame(x)
        if self.time_conv is None:
            return x
        seen = past.extend(self, x, 1)
        halved = self.time_conv(seen) if seen.shape[2] > 1 else x[:, :, :0]
        return torch.cat([x[:, :, :1], halved], dim=2) if past.first else halved


class Upsample(Resample):
    """Doubles time, then height and width: frame 0 stays, and the convolution that makes two frames of each later one does not see it."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:  # (B, C, 1+n, H, W) -> (B, C, 1+2n, 2H, 2W)
        if self.time_conv is not None:
            frame_0, x = x[:, :, : int(past.first)], x[:, :, int(past.first) :]
            if x.shape[2]:
                x = rearrange(self.time_conv(x, past), "b (two c) t h w -> b c (t two) h w", two=2)
            x = torch.cat([frame_0, x], dim=2)
        return self.per_frame(x)


class DownLevel(nn.Module, Temporal):
    """Residual blocks and, unless `temporal` is None, a Downsample. The shortcut folds the same pixels into channels and averages groups
    of these down to n_out; where all of them are fewer than n_out it repeats them (no published size needs that)."""

    def __init__(self, n_in: int, n_out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.n_out, self.ft, self.fs = n_out, 1 + bool(temporal), 1 + (temporal is not None)
        self.downsamples = Chain(
            *(ResidualBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks)),
            *([] if temporal is None else [Downsample(n_out, temporal)]),
        )

    def forward(self, x: Tensor, past: Past) -> Tensor:
        shortcut = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ft, 0))
        shortcut = rearrange(
            shortcut,
            "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w",
            ft=self.ft,
            fh=self.fs,
            fw=self.fs,
        )
        shortcut = repeat(
            shortcut, "b c t h w -> b (c r) t h w", r=max(1, self.n_out // shortcut.shape[1])
        )
        return self.downsamples(x, past) + reduce(
            shortcut, "b (c g) t h w -> b c t h w", "mean", c=self.n_out
        )


class UpLevel(nn.Module, Temporal):
    """Residual blocks and, unless `temporal` is None, an Upsample and a shortcut that repeats channels and unfolds them into pixels."""

    def __init__(self, n_in: int, n_out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.temporal, self.repeats = temporal, n_out * 4 * (1 + bool(temporal)) // n_in
        self.upsamples = Chain(
            *(ResidualBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks)),
            *([] if temporal is None else [Upsample(n_out, temporal)]),
        )

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = self.upsamples(x, past)
        if self.temporal is None:
            return y
        shortcut = repeat(x, "b c t h w -> b (c r) t h w", r=self.repeats)
        shortcut = rearrange(
            shortcut,
            "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)",
            ft=1 + self.temporal,
            fh=2,
            fw=2,
        )
        return y + (
            shortcut[:, :, int(self.temporal) :] if past.first else shortcut
        )  # frame 0 becomes one frame, not two


def middle(dim: int) -> Chain:
    return Chain(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def head(dim: int, n_out: int) -> Chain:
    return Chain(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, n_out, 3, padding=1))


def encoder(config: WanVAEConfig) -> Chain:
    widths = [config.dim * mult for mult in (1, *config.dim_mult)]
    levels = zip(widths, widths[1:], (*config.temporal_downsample, None))
    return Chain(
        OrderedDict(
            conv1=CausalConv3d(12, widths[0], 3, padding=1),
            downsamples=Chain(
                *(
                    DownLevel(n_in, n_out, config.num_res_blocks, temporal)
                    for n_in, n_out, temporal in levels
                )
            ),
            middle=middle(widths[-1]),
            head=head(widths[-1], 2 * config.z_dim),
        )
    )


def decoder(config: WanVAEConfig) -> Chain:
    widths = [config.dec_dim * mult for mult in (config.dim_mult[-1], *config.dim_mult[::-1])]
    levels = zip(widths, widths[1:], (*config.temporal_downsample[::-1], None))
    return Chain(
        OrderedDict(
            conv1=CausalConv3d(config.z_dim, widths[0], 3, padding=1),
            middle=middle(widths[0]),
            upsamples=Chain(
                *(
                    UpLevel(n_in, n_out, config.num_res_blocks + 1, temporal)
                    for n_in, n_out, temporal in levels
                )
            ),
            head=head(widths[-1], 12),
        )
    )


class WanVAE(nn.Module):
    """Video (B, 3, F, H, W) in [-1, 1] to latents (B, z, T, h, w) and back, F = 1 + stride[0]*(T-1), H = stride[1]*h, W = stride[1]*w.
    Computes in the dtype of its weights (published and recommended: fp32) and returns fp32."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.conv1, self.conv2 = (
            nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1),
            nn.Conv3d(config.z_dim, config.z_dim, 1),
        )

    @property
    def stride(self) -> tuple[int, int]:
        """Frames and pixels per latent position."""
        return 2 ** sum(self.config.temporal_downsample), 2 ** len(self.config.dim_mult)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents, (z, 1, 1, 1) on the device of x. They are in no weight file."""
        return tuple(
            torch.tensor(values, device=x.device).view(-1, 1, 1, 1)
            for values in (self.config.mean, self.config.std)
        )

    def through(self, network: Chain, x: Tensor, sizes: int | list[int]) -> Iterator[Tensor]:
        """The outputs of `network` for x (B, C, T, H, W) cut in time into chunks of `sizes`."""
        x = x.to(
            network.conv1.weight.dtype, memory_format=torch.channels_last_3d
        )  # small convolutions run faster so
        chunks = x.split(sizes, dim=2)
        past = Past(keep=len(chunks) > 1)
        for chunk in chunks:
            yield network(chunk, past)
            past.first = False

    def posterior(self, video: Tensor, chunked: bool = False) -> tuple[Tensor, Tensor]:
        """video (B, 3, F, H, W) in [-1, 1] -> mean and log variance (B, z, T, h, w), not normalised, differentiable."""
        (ft, fs), (frames, height, width) = self.stride, video.shape[2:]
        if video.shape[1] != 3 or (frames - 1) % ft or height % fs or width % fs:
            raise ValueError(
                f"video has shape {tuple(video.shape)}; the VAE needs (B, 3, 1 + {ft}n, {fs}h, {fs}w): cut or resize it"
            )
        sizes = [1] + [ft] * ((frames - 1) // ft) if chunked else frames
        # The column of a pixel in its 2 x 2 patch is the outer part of the channel index, the row the inner one.
        patches = rearrange(video, "b c f (h row) (w col) -> b (c col row) f h w", row=2, col=2)
        features = torch.cat(list(self.through(self.encoder, patches, sizes)), dim=2)
        return self.conv1(features).float().chunk(2, dim=1)

    def encode(self, video: Tensor, chunked: bool = False) -> Tensor:
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, z, T, h, w), the posterior's mean normalised. Latent frame 0 depends on frame 0
        alone. `chunked` bounds memory by `stride[0]` frames."""
        mean, std = self.statistics(video)
        return (self.posterior(video, chunked)[0] - mean) / std

    def decode_frames(self, latents: Tensor, clamp: bool = True, size: int = 1) -> Iterator[Tensor]:
        """Decodes `size` latent frames at a time: yields (B, 3, F', H, W), in the memory of one such chunk."""
        if latents.shape[1] != self.config.z_dim:
            raise ValueError(
                f"latents have {latents.shape[1]} channels; this VAE has z_dim = {self.config.z_dim}"
            )
        mean, std = self.statistics(latents)
        features = self.conv2((latents * std + mean).to(self.conv2.weight.dtype))
        for patches in self.through(self.decoder, features, size):
            video = rearrange(
                patches, "b (c col row) f h w -> b c f (h row) (w col)", row=2, col=2
            ).float()
            yield video.clamp(-1, 1) if clamp else video

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """latents (B, z, T, h, w), normalised -> video (B, 3, F, H, W), in [-1, 1] if `clamp`, differentiable."""
        return next(self.decode_frames(latents, clamp, size=latents.shape[2]))
