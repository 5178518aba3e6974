"""Joint attention: the one place where the three experts of Motus meet (paper Sec. 3.1).

Each expert normalises, projects and feeds forward alone; in every layer their queries, keys and
values are lined up in one sequence

    [ video  Lv = T*h*w | action  La = state, actions, registers | understanding  Lu ]

and one bidirectional softmax attention of N heads of size K runs over it, scale 1/sqrt(K). Only
video tokens are rotated (3-D RoPE). The result is split again and goes back to the experts.

Below it stand the leaves that every network shares: norms, modulation, rotary positions, linear
maps. On a CUDA device five of these functions hand over to Triton kernels (end of the file).

Departures from the official code: padded keys (right-padded instructions, actions past the end of
an episode) get a bias of -inf, where it attends to them (no effect at batch size 1); zero-padded
text rows are identical keys and collapse into one with bias log(count), exactly (`text_bias`).

Shapes: B batch, L tokens (Lv video, La action, Lu understanding), D width, N heads, K head size.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Container

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# -- attention ------------------------------------------------------------------------------------


def joint_attention(
    qkv: list[tuple[Tensor, Tensor, Tensor]],
    biases: list[Tensor | None],
) -> list[Tensor]:
    """One attention over the experts' segments. qkv: (q, k, v), each (B, L_i, N, K), per expert in
    the order video, action, understanding; biases: (B, L_i) fp32 or None per expert, added to the
    logits of a key. Returns (B, L_i, N*K) per expert."""
    queries, keys, values = zip(*qkv)
    dtype = values[0].dtype
    q = torch.cat([q.to(dtype) for q in queries], dim=1)  # (B, Lv+La+Lu, N, K)
    k = torch.cat([k.to(dtype) for k in keys], dim=1)
    v = torch.cat([v.to(dtype) for v in values], dim=1)
    bias = None
    if any(row is not None for row in biases):
        zeros = [torch.zeros(k.shape[:2], device=k.device) for k in keys]
        rows = [zero if row is None else row for row, zero in zip(biases, zeros)]
        bias = torch.cat(rows, dim=1)[:, None, None]  # (B, 1, 1, Lv+La+Lu)
    out = rearrange(attention(q, k, v, bias), "b l n k -> b l (n k)")
    return list(out.split([q.shape[1] for q in queries], dim=1))


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention written out: the lesson, and the oracle of the fast ones. q (B, Lq, N, K);
    k, v (B, Lk, N, K); bias broadcasts to (B, N, Lq, Lk). Logits and softmax in fp32. Returns
    (B, Lq, N, K) in v's dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.to(v.dtype).float()
    k = k.to(v.dtype).float()
    with torch.autocast(v.device.type, enabled=False):
        logits = torch.einsum("bqnk,bsnk->bnqs", q, k) * scale
        if bias is not None:
            logits = logits + bias
        weights = logits.softmax(dim=-1)
        return torch.einsum("bnqs,bsnk->bqnk", weights, v.float()).to(v.dtype)


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same through torch's fused kernels."""
    q = q.to(v.dtype).transpose(1, 2)
    k = k.to(v.dtype).transpose(1, 2)
    bias = None if bias is None else bias.to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=bias, scale=scale)
    return out.transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention that `choose` names. What the kernels do not take (the one wide head of the
    video VAE, the toy's narrow ones, biases of pairs in the frozen encoders) goes to SDPA."""
    run = plain_attention if choose(q.device)[0] == "plain" else sdpa_attention
    return run(q, k, v, bias, scale)


def key_bias(mask: Tensor) -> Tensor:
    """Additive bias of padded keys. mask (B, L) bool, True where the key is real -> (B, L) fp32, 0
    or -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))


def text_bias(lengths: Tensor, rows: int, text_len: int) -> Tensor:
    """Bias (B, rows) of text keys. Rows `lengths`..`text_len`-1 of the official padded text are all
    the same key: the first stands for them with bias log(count), the others get -inf. Exact, and
    far fewer keys. What bf16 rounds off the log is taken off the other keys."""
    lengths = lengths[:, None]  # (B, 1)
    index = torch.arange(rows, device=lengths.device)
    log = (text_len - lengths).clamp(min=1).log()
    rounded = log.bfloat16().float()
    collapsed = torch.where(index == lengths, rounded, float("-inf"))
    return torch.where(index < lengths, rounded - log, collapsed)


# -- norms ----------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis in fp32, cast back to x's dtype, then times the weight: the
    order matters in bf16. Autocast lowers neither product nor sum; F.rms_norm is no faster."""
    wide = x.float()
    mean_square = (wide * wide).sum(dim=-1, keepdim=True) / x.shape[-1]
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight (D,)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32, cast back to the dtype of its input, whatever that of its weights."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        affine = [None if part is None else part.float() for part in (self.weight, self.bias)]
        return F.layer_norm(x.float(), self.normalized_shape, *affine, self.eps).to(x.dtype)


# -- modulation by the timestep -------------------------------------------------------------------


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """adaLN: shift + (1 + scale) * LN(x), in fp32, cast to `dtype`, that of the map which reads it.
    x (B, L, D); shift, scale (B, 1 or L, D); the norm has no weights of its own."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)  # rounded, as official
    return torch.addcmul(shift, normed.float(), 1 + scale).to(dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The residual stream x plus what a sub-layer made of it, gated. x, y (B, L, D); gate (B, 1 or
    L, D). Returns fp32."""
    return torch.addcmul(x.float(), y.float(), gate)


# -- rotary positions -----------------------------------------------------------------------------


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) by their angles: (a, b) -> (a cos - b sin, b cos + a sin).
    x (B, L, N, K); cos, sin (L, K/2), the same for all heads. Returns fp32, as Wan does."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, L, N, K/2, 2): a, b
    swapped = pairs.flip(-1)  # b, a
    signed = torch.stack([-sin, sin], dim=-1)[:, None]  # (L, 1, K/2, 2)
    return torch.addcmul(pairs * cos[:, None, :, None], swapped, signed).flatten(-2)


def norm_rotate(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    size: int,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected queries and keys (B, L, N*size) made ready for the attention: RMS-normed over the
    full width, split into heads and, where rope gives cos and sin (L, size/2), rotated. Returns two
    (B, L, N, size)."""
    q = rearrange(rms_norm(q, weight_q, eps), "b l (n k) -> b l n k", k=size)
    k = rearrange(rms_norm(k, weight_k, eps), "b l (n k) -> b l n k", k=size)
    if rope is None:
        return q, k
    return rotate_interleaved(q, *rope), rotate_interleaved(k, *rope)


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
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)


def mlp(
    *widths: int,
    act: type[nn.Module] = nn.SiLU,
    linear: type[nn.Linear] = Linear,
    **act_options,
) -> nn.Sequential:
    """Linear, act, Linear, ..., Linear through `widths`; the linear maps sit at the even indices of
    the Sequential."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths, widths[1:]):
        layers += [linear(n_in, n_out), act(**act_options)]
    return nn.Sequential(*layers[:-1])


def xavier(module: nn.Module) -> None:
    """Xavier weights and zero biases for every linear map inside."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# -- which implementation runs --------------------------------------------------------------------

IMPLEMENTATIONS = ("plain", "sdpa", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32: TF32 would cost the VAE three digits
# The kernels are compiled and checked for these (docs/kernels.md); all else is torch's.
HEAD_SIZES = (32, 64, 128)
WIDEST = 4096
DTYPES = (torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> int:
    """80 for CUDA compute capability 8.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(device: torch.device | str) -> tuple[str, str]:
    """The implementation that runs on `device`, one of IMPLEMENTATIONS, and why. The environment
    variable MOTUS_ATTENTION overrules."""
    device = torch.device(device)
    asked = os.environ.get("MOTUS_ATTENTION")
    if asked is not None:
        if asked not in IMPLEMENTATIONS:
            raise ValueError(
                f"MOTUS_ATTENTION is {asked!r}; expected one of {', '.join(IMPLEMENTATIONS)}; "
                "unset it or choose one of them"
            )
        return asked, "MOTUS_ATTENTION asks for it"
    if device.type != "cuda":
        return "sdpa", f"the device is {device.type}, not cuda"
    if not HAS_TRITON:
        return "sdpa", "Triton is not installed"
    sm = capability(device)
    if sm < 80:
        return "sdpa", f"sm_{sm} has no bf16 tensor cores"
    return "triton", f"sm_{sm} and Triton are there"


def takes(x: Tensor, sizes: Container[int]) -> bool:
    """Whether the kernels take x (..., K or D), of one of these sizes."""
    return x.shape[-1] in sizes and x.dtype in DTYPES and choose(x.device)[0] == "triton"


def takes_rows(x: Tensor, *rest, **options) -> bool:
    return takes(x, range(WIDEST + 1))


def takes_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale=None) -> bool:
    one_per_key = bias is None or bias.shape[1:3] == (1, 1)
    return one_per_key and takes(v, HEAD_SIZES)


def twin(plain: Callable, fits: Callable[..., bool]) -> Callable:
    """Runs the kernel of the same name and arguments where they fit it, else `plain`."""

    @functools.wraps(plain)
    def run(*arguments, **options):
        if not fits(*arguments, **options):
            return plain(*arguments, **options)
        import kernels

        return getattr(kernels, plain.__name__)(*arguments, **options)

    return run


joint_attention = twin(joint_attention, lambda qkv, biases: takes_heads(*qkv[0]))
attention = twin(attention, takes_heads)
norm_modulate = twin(norm_modulate, takes_rows)
add_gated = twin(add_gated, takes_rows)
norm_rotate = twin(norm_rotate, takes_rows)
