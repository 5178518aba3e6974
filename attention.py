"""Joint attention: the one place where the three experts of Motus meet (paper Sec. 3.1, "Tri-model
Joint Attention").

Each expert normalises, projects and feeds forward alone; in every layer their queries, keys and
values are lined up in one sequence

    [ video  Lv = T*h*w | action  La = state, actions, registers | understanding  Lu ]

and one bidirectional softmax attention of N heads of size K runs over it, scale 1/sqrt(K). Only
video tokens are rotated (3-D RoPE); action and understanding tokens carry no rotary position. The
result is split again and goes back to the three experts.

This file also holds the leaves that every network of the repository shares: norms, rotary
positions, attention, MLPs. What is written out here is what the reader reads and what the tests
believe; on a CUDA device `attention`, `joint_attention`, `norm_rotate`, `norm_modulate` and
`add_gated` hand over to the Triton kernels of the same names in `kernels.py` (`choose` says which
runs and why).

Departures from the official code
- Padded keys (right-padded instructions, actions past the end of an episode) get a bias of -inf;
  the official code attends to them. At batch size 1 nothing is padded and nothing changes.
- Zero-padded text rows are identical keys; they are collapsed into one key with bias log(count),
  which is exact (`text_bias`).

Shapes: B batch, L tokens (Lv video, La action, Lu understanding), D width, N heads, K head size, M
= N*K.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# -- which implementation -------------------------------------------------------------------------

IMPLEMENTATIONS = ("plain", "sdpa", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> int:
    """80 for CUDA compute capability 8.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(device: torch.device | str) -> tuple[str, str]:
    """What runs on `device`, one of IMPLEMENTATIONS, and why. The environment variable
    MOTUS_ATTENTION overrules."""
    asked, device = os.environ.get("MOTUS_ATTENTION"), torch.device(device)
    if asked is not None:
        if asked not in IMPLEMENTATIONS:
            raise ValueError(
                f"MOTUS_ATTENTION is {asked!r}; allowed: {', '.join(IMPLEMENTATIONS)}; unset it or choose one of them"
            )
        return asked, "MOTUS_ATTENTION asks for it"
    if device.type != "cuda":
        return "sdpa", f"the device is {device.type}, not cuda"
    if not HAS_TRITON:
        return "sdpa", "Triton is not installed"
    sm = capability(device)
    return (
        ("triton", f"sm_{sm} and Triton are there")
        if sm >= 80
        else ("sdpa", f"sm_{sm} has no bf16 tensor cores")
    )


# What the kernels are compiled and checked for ahead of time (docs/kernels.md); all else goes to
# torch.
HEAD_SIZES, WIDEST, DTYPES = (32, 64, 128), 4096, (torch.bfloat16, torch.float32)


def fused(x: Tensor) -> bool:
    """Whether the Triton kernels for rows take x (..., D)."""
    return choose(x.device)[0] == "triton" and x.shape[-1] <= WIDEST and x.dtype in DTYPES


def fused_heads(x: Tensor) -> bool:
    """Whether the Triton attention takes heads x (B, L, N, K)."""
    return choose(x.device)[0] == "triton" and x.shape[3] in HEAD_SIZES and x.dtype in DTYPES


# -- norms ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis in fp32, cast back to x's dtype, then times the weight: the
    order matters in bf16."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        wide = x.float()
        mean_square = (
            torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]
        )  # its backward is cheaper than F.rms_norm's
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32 and cast back to the dtype of its input, whatever the dtype of
    its weights."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        weight = self.weight.float() if self.weight is not None else None
        bias = self.bias.float() if self.bias is not None else None
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


# -- modulation by the timestep -------------------------------------------------------------------


def norm_modulate(
    x: Tensor, norm: LayerNorm, shift: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """adaLN: shift + (1 + scale) * LN(x), in fp32, cast to `dtype`, that of the map which reads it.
    x (B, L, D); shift, scale (B, 1 or L, D); the norm has no weights of its own."""
    assert norm.weight is None, "modulation takes the place of the weights of a norm"
    if fused(x):
        import kernels

        return kernels.norm_modulate(x, shift, scale, norm.eps, dtype)
    return torch.addcmul(shift, norm(x).float(), 1 + scale).to(dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The residual stream x plus what a sub-layer made of it, gated. x, y (B, L, D); gate (B, 1 or
    L, D). Returns fp32."""
    if fused(x):
        import kernels

        return kernels.add_gated(x, y, gate)
    return torch.addcmul(x.float(), y.float(), gate)


# -- linear maps ----------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear map that runs in the dtype of its weights: an fp32 residual stream meets bf16
    weights without autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LinearFP32(nn.Linear):
    """A linear map that runs in fp32 even where its weights are bf16 and autocast is on: time paths
    and the video head."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(
                x.float(), self.weight.float(), None if self.bias is None else self.bias.float()
            )


class Int8Linear(nn.Module):
    """A linear map with its weight stored in int8 and a scale per row, for memory: it multiplies in
    the dtype the weight had before."""

    def __init__(self, linear: Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.dtype, self.bias = weight.dtype, linear.bias
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = (
            F.linear(x.to(self.dtype), self.weight.to(self.dtype)) * self.scale
        )  # a scale per row may wait until after the sum
        return (y if self.bias is None else y + self.bias).to(self.dtype)


def quantise(module: nn.Module) -> None:
    """Replaces every `Linear` inside by an `Int8Linear`, one after the other, so that the memory
    needed only falls."""
    for name, child in module.named_children():
        setattr(module, name, Int8Linear(child)) if type(child) is Linear else quantise(child)


def mlp(
    *widths: int, act: type[nn.Module] = nn.SiLU, linear: type[nn.Linear] = Linear, **act_options
) -> nn.Sequential:
    """Linear, act, Linear, ..., Linear through `widths`; the linear maps sit at the even indices of
    the Sequential."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths, widths[1:]):
        layers += [linear(n_in, n_out), act(**act_options)]
    return nn.Sequential(*layers[:-1])


# -- rotary positions -----------------------------------------------------------------------------


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]). x (B, L, N, K); cos, sin (L, K/2), fp32. Returns fp32, as
    Wan does."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, L, N, K/2, 2)
    cos, sin = (
        cos[:, None, :, None],
        torch.stack([-sin, sin], dim=-1)[:, None],
    )  # (L, 1, K/2, 1 or 2), the same for all heads
    return torch.addcmul(pairs * cos, pairs.flip(-1), sin).flatten(-2)


def norm_rotate(
    q: Tensor,
    k: Tensor,
    norm_q: RMSNorm,
    norm_k: RMSNorm,
    size: int,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The way of projected queries and keys (B, L, N*size) to the joint attention: each normed over
    the full width, split into heads and, where rope gives cos and sin (L, size/2), rotated. Returns
    two (B, L, N, size)."""
    if fused(q):
        import kernels

        return kernels.norm_rotate(q, k, norm_q.weight, norm_k.weight, norm_q.eps, size, rope)
    q, k = (
        rearrange(norm(x), "b l (n k) -> b l n k", k=size) for norm, x in ((norm_q, q), (norm_k, k))
    )
    return (q, k) if rope is None else (rotate_interleaved(q, *rope), rotate_interleaved(k, *rope))


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + K/2]), in the dtype of x. x (..., L, N, K); cos, sin (..., L,
    K/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# -- attention ------------------------------------------------------------------------------------


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention written out: the lesson, and the oracle of the fast ones. q (B, Lq, N, K);
    k, v (B, Lk, N, K); bias broadcasts to (B, N, Lq, Lk). Logits and softmax in fp32. Returns (B,
    Lq, N, K) in v's dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqnk,bsnk->bnqs", q.to(v.dtype).float(), k.to(v.dtype).float()) * scale
    logits = logits if bias is None else logits + bias
    return torch.einsum("bnqs,bsnk->bqnk", logits.softmax(dim=-1), v.float()).to(v.dtype)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The same through torch's fused kernels."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    bias = None if bias is None else bias.to(v.dtype)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The attention that `choose` names. The kernels take heads of HEAD_SIZES and one bias per key;
    the rest of a Triton run (the one wide head of the video VAE, the toy's narrow ones, biases of
    pairs in the frozen encoders) goes to SDPA."""
    if fused_heads(v) and (bias is None or bias.shape[1:3] == (1, 1)):
        import kernels

        return kernels.attention(q, k, v, bias, scale)
    return (plain_attention if choose(q.device)[0] == "plain" else sdpa_attention)(
        q, k, v, bias, scale
    )


def key_bias(mask: Tensor) -> Tensor:
    """Additive bias of padded keys. mask (B, L) bool, True where the key is real -> (B, L) fp32, 0
    or -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))


def text_bias(lengths: Tensor, rows: int, text_len: int) -> Tensor:
    """Bias (B, rows) of text keys, where rows `lengths`..`text_len`-1 of the official zero-padded
    text are all the same key: the first of them stands for all text_len - length with bias
    log(count), the others get -inf. Exact, and far fewer keys."""
    index = torch.arange(rows, device=lengths.device)
    count = (text_len - lengths).clamp(min=0)[:, None].float()  # (B, 1) identical padded keys
    collapsed = torch.where(
        index == lengths[:, None], count.log(), torch.full_like(count, float("-inf"))
    )
    return torch.where(index < lengths[:, None], torch.zeros_like(count), collapsed)


def joint_attention(
    qkv: list[tuple[Tensor, Tensor, Tensor]], biases: list[Tensor | None]
) -> list[Tensor]:
    """One attention over the experts' segments. qkv: (q, k, v), each (B, L_i, N, K), per expert in
    the order video, action, understanding; biases: (B, L_i) fp32 or None per expert, what is added
    to the logits of a key. Returns (B, L_i, N*K) per expert."""
    if fused_heads(qkv[0][2]):
        import kernels

        return kernels.joint_attention(qkv, biases)
    q, k, v = (torch.cat([x.to(qkv[0][2].dtype) for x in parts], dim=1) for parts in zip(*qkv))
    bias = None
    if any(x is not None for x in biases):
        rows = [
            torch.zeros(part[1].shape[:2], device=k.device) if x is None else x
            for part, x in zip(qkv, biases)
        ]
        bias = torch.cat(rows, dim=1)[:, None, None]  # (B, 1, 1, Lv+La+Lu)
    out = rearrange(attention(q, k, v, bias), "b l n k -> b l (n k)")
    return list(out.split([part[0].shape[1] for part in qkv], dim=1))
