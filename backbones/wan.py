"""The video expert: the diffusion transformer (DiT) of Wan2.2-TI2V-5B by hand.

Latents (B, 48, T, h, w) are cut into patches (1, 2, 2), tokens in the order t, h, w (Wan2.2
`wan/modules/model.py`). A block is

    x += gate1 * SelfAttention(shift1 + (1 + scale1) * LN(x))      3-D RoPE on q and k,
                                                                   RMSNorm over their full width
    x += CrossAttention(LN_affine(x), text)                        no gate, no mask, no rotary
    x += gate2 * FFN(shift2 + (1 + scale2) * LN(x))                GELU(tanh)

with (shift, scale, gate) x 2 = block table + projected time. In Motus the self-attention is the
joint attention of `attention.py`, so the block is split where the experts meet: `pre_attention`
gives q, k, v and `post_attention` takes the attended values.

Conventions: the network is fed t in [0, 1000], 1000 is noise; its output is the velocity noise -
data. Precision: the residual stream, the time path, modulation and head are fp32; the other linear
maps run in the dtype of their weights. Tensor names are the original ones.

Departure from the official code: it pads texts to 512 rows and attends to all of them; here one
padded row stands for all (`text_bias`), which is exact.

Shapes: B batch, C latent channels, T latent frames, h w latent grid, L = T*(h/2)*(w/2) tokens, D
width, N heads, K head size, Lt text rows.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
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
    xavier,
)

# -- sizes, time and positions --------------------------------------------------------------------


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
    """The timestep's hold on a sub-layer: x -> gate * f(shift + (1 + scale) * LN(x)). Each (B, 1 or
    L, D), fp32."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulations(table: Tensor, time: Tensor) -> list[Modulation]:
    """A learned table (1, n, D) plus the time projection (B, 1 or L, n or 1, D), in fp32: for n = 6
    (shift, scale, gate) of the attention and of the FFN, for n = 2 (shift, scale) of a head."""
    rows = (table.float() + time.float()).unbind(dim=2)  # n of (B, 1 or L, D)
    if len(rows) == 2:
        return [Modulation(*rows)]
    return [Modulation(*rows[:3]), Modulation(*rows[3:])]


def frequencies(count: int, device: torch.device | str | None = None) -> Tensor:
    """10000^(-i / count) for i = 0 .. count - 1, in float64 as Wan computes all its angles."""
    return 10000.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)


def time_sinusoid(t: Tensor, dim: int) -> Tensor:
    """t in [0, 1000], any shape -> (..., dim) fp32, cosines first."""
    angle = t.double()[..., None] * frequencies(dim // 2, t.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def embed_time(expert: nn.Module, t: Tensor) -> tuple[Tensor, Tensor]:
    """The time path of an expert of width D, fp32: t (B,) or per token (B, L), in [0, 1] -> e (B, 1
    or L, D) for its head, e0 (B, 1 or L, 6, D) for its blocks."""
    t = t[:, None] if t.dim() == 1 else t
    e = expert.time_embedding(time_sinusoid(1000 * t, expert.time_embedding[0].in_features))
    return e, rearrange(expert.time_projection(e), "b l (six d) -> b l six d", six=6)


def rope_3d(
    grid: tuple[int, int, int], head_dim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (L, K/2) of the token grid (T, H, W). The K/2 pairs are split between the axes,
    each with its own ladder of frequencies: 22/21/21 pairs at K = 128. The tables are fp32."""
    half = head_dim // 2
    side = half // 3
    axes = [torch.arange(size, dtype=torch.float64, device=device) for size in grid]
    coordinates = torch.cartesian_prod(*axes)  # (L, 3): t, h, w of each token
    angles = []
    for axis, pairs in enumerate((half - 2 * side, side, side)):
        angles.append(torch.outer(coordinates[:, axis], frequencies(pairs, device)))
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


# -- blocks ---------------------------------------------------------------------------------------


class WanAttention(nn.Module):
    """Projections of one attention: q, k, v, o with biases, q and k normed over the full width
    before the split into heads."""

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.o = Linear(width, width)
        self.norm_q = RMSNorm(width, eps)
        self.norm_k = RMSNorm(width, eps)

    def split(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, N, K)
        return rearrange(x, "b l (n k) -> b l n k", n=self.heads)


class TextStates(NamedTuple):
    """Embedded text (B, Lt, D) and the bias (B, 1, 1, Lt) of its rows as keys."""

    states: Tensor
    bias: Tensor


class TextKV(NamedTuple):
    """Keys and values of one layer's cross attention, computed once per instruction. k, v (B, Lt,
    N, K); bias (B, 1, 1, Lt)."""

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
        h = norm_modulate(x, mod.shift, mod.scale, self.norm1.eps, self.modulation.dtype)
        v = attn.split(attn.v(h))
        q, k = norm_rotate(
            attn.q(h),
            attn.k(h),
            attn.norm_q.weight,
            attn.norm_k.weight,
            attn.norm_q.eps,
            v.shape[3],
            rope,
        )
        return q, k, v

    def text_kv(self, text: TextStates) -> TextKV:
        """Keys and values of the text for this layer."""
        cross = self.cross_attn
        k = cross.split(cross.norm_k(cross.k(text.states)))
        return TextKV(k, cross.split(cross.v(text.states)), text.bias)

    def post_attention(
        self,
        x: Tensor,
        attended: Tensor,
        mod: Modulation,
        ffn_mod: Modulation,
        text: TextStates | TextKV,
    ) -> Tensor:
        """x (B, L, D) residual stream, attended (B, L, N*K), text with or without its keys and
        values made -> (B, L, D) fp32."""
        x = add_gated(x, self.self_attn.o(attended), mod.gate)
        if isinstance(text, TextStates):
            text = self.text_kv(text)
        cross = self.cross_attn
        q = cross.split(cross.norm_q(cross.q(self.norm3(x))))
        read = attention(q, text.k, text.v, text.bias)
        x = x + cross.o(rearrange(read, "b l n k -> b l (n k)")).float()
        h = norm_modulate(x, ffn_mod.shift, ffn_mod.scale, self.norm2.eps, self.modulation.dtype)
        return add_gated(x, self.ffn(h), ffn_mod.gate)


class WanHead(nn.Module):
    """Tokens to the velocity of their patches, in fp32."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = LayerNorm(config.width, config.eps, elementwise_affine=False)
        self.head = LinearFP32(config.width, math.prod(config.patch) * config.latent)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # x (B, L, D), e (B, 1 or L, D)
        (mod,) = modulations(self.modulation, e.unsqueeze(2))
        return self.head(norm_modulate(x, mod.shift, mod.scale, self.norm.eps))


# -- the model ------------------------------------------------------------------------------------


class WanModel(nn.Module):
    """The video transformer. `forward` is Wan alone: video generation without other experts."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        width = config.width
        patch = config.patch
        self.patch_embedding = nn.Conv3d(config.latent, width, patch, stride=patch)
        self.text_embedding = mlp(config.text_dim, width, width, act=nn.GELU, approximate="tanh")
        self.time_embedding = mlp(config.freq_dim, width, width, linear=LinearFP32)
        self.time_projection = nn.Sequential(nn.SiLU(), LinearFP32(width, 6 * width))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.layers))
        self.head = WanHead(config)

    def init_weights(self) -> None:
        """The official initialisation: Xavier linear maps, std 0.02 for text and time embeddings, a
        zero head."""
        xavier(self)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def embed_text(self, context: Tensor, lengths: Tensor) -> TextStates:
        """Text states (B, Lt, text_dim), zero from row `lengths` (B,) on, into the video width. The
        padded row that stands for all is added where it may be missing."""
        if context.shape[1] < self.config.text_len:
            context = F.pad(context, (0, 0, 0, 1))
        bias = text_bias(lengths, context.shape[1], self.config.text_len)
        return TextStates(self.text_embedding(context), bias[:, None, None])

    def patchify(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """(B, C, T, h, w) -> tokens (B, L, D) in the order t, h, w, and their grid."""
        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        return rearrange(x, "b d t h w -> b (t h w) d"), tuple(x.shape[2:])

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, L, patch * C), channel fastest -> (B, C, T, h, w)."""
        t, h, w = grid
        pt, ph, pw = self.config.patch
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
        """latents (B, C, T, h, w), t (B,) or (B, L) in [0, 1], text (B, Lt, text_dim) with lengths
        (B,) -> velocity (B, C, T, h, w)."""
        x, grid = self.patchify(latents)
        e, e0 = embed_time(self, t)
        rope = rope_3d(grid, self.config.head_dim, x.device)
        text = self.embed_text(context, lengths)
        for block in self.blocks:
            mod, ffn_mod = modulations(block.modulation, e0)
            q, k, v = block.pre_attention(x, mod, rope)
            attended = rearrange(attention(q, k, v), "b l n k -> b l (n k)")
            x = block.post_attention(x, attended, mod, ffn_mod, text)
        return self.unpatchify(self.head(x, e), grid)
