"""Row kernels: norms, rotation, gates."""

from __future__ import annotations  # the kernels' annotations name `tl`, which may be missing

import torch
from torch import Tensor

from kernels.attention import ceil_div, jit, launch, power_of_2

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None


# -- row kernels: norms, rotation, gates ----------------------------------------------------------

# A backward program walks through this many rows before it writes its part of a gradient that sums
# over rows; the parts are then a few per cent of the traffic.
ROWS = 32


def row_options(width: int) -> dict:
    block = power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": 8 if block > 2048 else 4, "num_stages": 1}


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """A (B, L, D) tensor whose B*L rows are evenly spaced, itself (also a slice of the last axis)
    or a copy, and their spacing. The stride of an axis of length 1 is arbitrary, so it is never the
    spacing of more than one row."""
    if x.stride(2) != 1 or (min(x.shape[:2]) > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(0 if x.shape[1] == 1 else 1)


def per_sample(mod: Tensor, x: Tensor) -> tuple[Tensor, int, int]:
    """Kernel argument for the modulation (B, 1 or L, D) of x (B, L, D): pointer, batch stride, row
    stride."""
    assert mod.shape in (x.shape, (x.shape[0], 1, x.shape[2])), (
        f"{tuple(mod.shape)} does not modulate {tuple(x.shape)}"
    )
    mod = mod if mod.stride(2) == 1 else mod.contiguous()
    return mod, mod.stride(0), mod.stride(1) if mod.shape[1] > 1 else 0


@jit
def load_row(x, row, stride, i, WIDTH: tl.constexpr):
    return tl.load(x + row.to(tl.int64) * stride + i, mask=i < WIDTH, other=0.0).to(tl.float32)


@jit
def store_row(x, row, i, value, WIDTH: tl.constexpr):
    tl.store(x + row.to(tl.int64) * WIDTH + i, value.to(x.dtype.element_ty), mask=i < WIDTH)


@jit
def load_mod(x, b, token, i, WIDTH: tl.constexpr):
    return tl.load(
        x[0] + b.to(tl.int64) * x[1] + token.to(tl.int64) * x[2] + i, mask=i < WIDTH, other=0.0
    ).to(tl.float32)


@jit
def as_stored(value, like):
    """Rounds to the dtype of `like`, as the plain version does between two steps."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@jit
def rotate(x, cos, sin, token, sign: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates the pairs (x[2i], x[2i+1]) of a row of heads by sign * angle; every head has the same
    K/2 angles."""
    pair = tl.arange(0, BLOCK // 2) % (K // 2)
    c = tl.load(cos + token * (K // 2) + pair)
    s = tl.load(sin + token * (K // 2) + pair) * sign
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,))


@jit
def norm_rotate_kernel(
    q, k, cos, sin, length, eps, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of q (program axis 1 is 0) or of k (1), each the tuple (x, its row stride, weight,
    y)."""
    x, stride, weight, y = q
    if tl.program_id(1) == 1:
        x, stride, weight, y = k
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value = load_row(x, row, stride, i, WIDTH)
    normed = as_stored(value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps), x)
    out = normed * tl.load(weight + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    if cos is not None:
        out = rotate(out, cos, sin, row % length, 1, K, BLOCK)
    store_row(y, row, i, out, WIDTH)


@jit
def norm_rotate_backward_kernel(
    q,
    k,
    cos,
    sin,
    rows,
    length,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of q or of k, each the tuple (x, its row stride, weight, dy, dx, parts of
    d_weight)."""
    x, stride, weight, dy, dx, parts = q
    if tl.program_id(1) == 1:
        x, stride, weight, dy, dx, parts = k
    i, first = tl.arange(0, BLOCK), tl.program_id(0) * ROWS
    w = tl.load(weight + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, tl.minimum(ROWS, rows - first)):
        row = first + j
        value, d_out = load_row(x, row, stride, i, WIDTH), load_row(dy, row, WIDTH, i, WIDTH)
        if cos is not None:
            d_out = rotate(d_out, cos, sin, row % length, -1, K, BLOCK)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        normed, d_normed = value * inverse, d_out * w
        d_weight += d_out * as_stored(normed, x)
        store_row(
            dx,
            row,
            i,
            inverse * (d_normed - normed * (tl.sum(d_normed * normed, 0) / WIDTH)),
            WIDTH,
        )
    store_row(parts, tl.program_id(0), i, d_weight, WIDTH)


@torch.library.custom_op("motus::norm_rotate", mutates_args=())
def norm_rotate_op(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    yq, yk = empty_rotated(q, k, weight_q, weight_k, cos, sin, eps, size, dtype)
    batch, length, width = q.shape
    launch(
        norm_rotate_kernel,
        (batch * length, 2),
        q.device,
        (*by_rows(q), weight_q, yq),
        (*by_rows(k), weight_k, yk),
        cos,
        sin,
        length,
        eps,
        K=size,
        **row_options(width),
    )
    return yq, yk


@norm_rotate_op.register_fake
def empty_rotated(q, k, weight_q, weight_k, cos, sin, eps, size, dtype):
    return tuple(x.new_empty((*x.shape[:2], x.shape[2] // size, size), dtype=dtype) for x in (q, k))


@torch.library.custom_op("motus::norm_rotate_backward", mutates_args=())
def norm_rotate_backward_op(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, width = q.shape
    dxq, dxk = (x.new_empty(x.shape) for x in (q, k))
    programs = ceil_div(batch * length, ROWS)
    pq, pk = (x.new_empty((programs, width), dtype=torch.float32) for x in (q, k))
    launch(
        norm_rotate_backward_kernel,
        (programs, 2),
        q.device,
        (*by_rows(q), weight_q, dq.contiguous(), dxq, pq),
        (*by_rows(k), weight_k, dk.contiguous(), dxk, pk),
        cos,
        sin,
        batch * length,
        length,
        eps,
        K=dq.shape[3],
        ROWS=ROWS,
        **row_options(width),
    )
    return dxq, dxk, pq.sum(0).to(weight_q.dtype), pk.sum(0).to(weight_k.dtype)


def save_norm_rotate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.eps = inputs[6]


def norm_rotate(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    size: int,
    rope: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The way of projected queries and keys (B, L, N*size) to the joint attention: RMS norm over
    the full width, rotation if `rope` gives cos and sin (L, size/2), split into heads. Returns two
    (B, L, N, size) in `dtype` (default: that of q)."""
    cos, sin = rope or (None, None)
    return norm_rotate_op(q, k, weight_q, weight_k, cos, sin, eps, size, dtype or q.dtype)


@jit
def norm_modulate_kernel(
    x, stride, shift, scale, y, length, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value = load_row(x, row, stride, i, WIDTH)
    centred = tl.where(i < WIDTH, value - tl.sum(value, 0) / WIDTH, 0.0)
    normed = as_stored(centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps), x)
    b, token = row // length, row % length
    store_row(
        y,
        row,
        i,
        normed * (1 + load_mod(scale, b, token, i, WIDTH)) + load_mod(shift, b, token, i, WIDTH),
        WIDTH,
    )


@jit
def norm_modulate_backward_kernel(
    dy,
    x,
    stride,
    scale,
    dx,
    d_shift,
    d_scale,
    length,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens (program axis 0) of one sample (axis 1); d_shift and d_scale are (B, programs,
    D)."""
    b, first, i = tl.program_id(1), tl.program_id(0) * ROWS, tl.arange(0, BLOCK)
    shift_part, scale_part = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    gain = 1 + load_mod(scale, b, first, i, WIDTH)  # ROWS is 1 where every token has its own
    for j in range(0, tl.minimum(ROWS, length - first)):
        row = b * length + first + j
        value, d_out = load_row(x, row, stride, i, WIDTH), load_row(dy, row, WIDTH, i, WIDTH)
        centred = tl.where(i < WIDTH, value - tl.sum(value, 0) / WIDTH, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        normed, d_normed = centred * inverse, d_out * gain
        shift_part += d_out
        scale_part += d_out * as_stored(normed, x)
        d_centred = (
            d_normed - tl.sum(d_normed, 0) / WIDTH - normed * (tl.sum(d_normed * normed, 0) / WIDTH)
        )
        store_row(dx, row, i, inverse * d_centred, WIDTH)
    part = b * tl.num_programs(0) + tl.program_id(0)
    store_row(d_shift, part, i, shift_part, WIDTH)
    store_row(d_scale, part, i, scale_part, WIDTH)


def mod_parts(x: Tensor, mod: Tensor) -> tuple[int, int, Tensor]:
    """Rows per program, programs per sample, and room (B, programs, D) for their parts of the
    gradient of `mod` (B, 1 or L, D)."""
    rows = ROWS if mod.shape[1] == 1 else 1
    programs = ceil_div(x.shape[1], rows)
    return rows, programs, x.new_empty((x.shape[0], programs, x.shape[2]), dtype=torch.float32)


def whole(parts: Tensor, mod: Tensor) -> Tensor:
    return (parts.sum(1, keepdim=True) if mod.shape[1] == 1 else parts).to(mod.dtype)


@torch.library.custom_op("motus::norm_modulate", mutates_args=())
def norm_modulate_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    launch(
        norm_modulate_kernel,
        (x.shape[0] * x.shape[1],),
        x.device,
        *by_rows(x),
        per_sample(shift, x),
        per_sample(scale, x),
        y,
        x.shape[1],
        eps,
        **row_options(x.shape[2]),
    )
    return y


@torch.library.custom_op("motus::norm_modulate_backward", mutates_args=())
def norm_modulate_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    rows, programs, d_shift = mod_parts(x, scale)
    d_scale = torch.empty_like(d_shift)
    launch(
        norm_modulate_backward_kernel,
        (programs, x.shape[0]),
        x.device,
        dy.contiguous(),
        *by_rows(x),
        per_sample(scale, x),
        dx,
        d_shift,
        d_scale,
        x.shape[1],
        eps,
        ROWS=rows,
        **row_options(x.shape[2]),
    )
    return dx, whole(d_shift, scale), whole(d_scale, scale)


def save_norm_modulate(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[2])
    ctx.eps = inputs[3]


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Layer norm of x (B, L, D), then shift and scale (B or 1, 1 or L, D; the same shape) -> (B, L,
    D) in `dtype`."""
    return norm_modulate_op(x, *(mod.expand(len(x), -1, -1) for mod in (shift, scale)), eps, dtype)


@jit
def add_gated_kernel(
    x, x_stride, y, y_stride, gate, out, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    gated = load_row(y, row, y_stride, i, WIDTH) * load_mod(
        gate, row // length, row % length, i, WIDTH
    )
    store_row(out, row, i, load_row(x, row, x_stride, i, WIDTH) + gated, WIDTH)


@jit
def add_gated_backward_kernel(
    d_out,
    y,
    stride,
    gate,
    dy,
    d_gate,
    length,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, first, i = tl.program_id(1), tl.program_id(0) * ROWS, tl.arange(0, BLOCK)
    part = tl.zeros((BLOCK,), tl.float32)
    g = load_mod(gate, b, first, i, WIDTH)
    for j in range(0, tl.minimum(ROWS, length - first)):
        row = b * length + first + j
        d = load_row(d_out, row, WIDTH, i, WIDTH)
        part += d * load_row(y, row, stride, i, WIDTH)
        store_row(dy, row, i, d * g, WIDTH)
    store_row(d_gate, b * tl.num_programs(0) + tl.program_id(0), i, part, WIDTH)


@torch.library.custom_op("motus::add_gated", mutates_args=())
def add_gated_op(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out = x.new_empty(x.shape, dtype=torch.float32)
    launch(
        add_gated_kernel,
        (x.shape[0] * x.shape[1],),
        x.device,
        *by_rows(x),
        *by_rows(y),
        per_sample(gate, x),
        out,
        x.shape[1],
        **row_options(x.shape[2]),
    )
    return out


@torch.library.custom_op("motus::add_gated_backward", mutates_args=())
def add_gated_backward_op(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dy = y.new_empty(y.shape)
    rows, programs, d_gate = mod_parts(y, gate)
    launch(
        add_gated_backward_kernel,
        (programs, y.shape[0]),
        y.device,
        d_out.contiguous(),
        *by_rows(y),
        per_sample(gate, y),
        dy,
        d_gate,
        y.shape[1],
        ROWS=rows,
        **row_options(y.shape[2]),
    )
    return dy, whole(d_gate, gate)


def save_add_gated(ctx, inputs, output):
    x, y, gate = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(y, gate)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x.float() + y.float() * gate in fp32: x the residual stream, y a sub-layer's output, both (B,
    L, D); gate (B or 1, 1 or L, D)."""
    return add_gated_op(x, y, gate.expand(len(x), -1, -1))


norm_rotate_backward_op.register_fake(
    lambda dq, dk, q, k, weight_q, weight_k, cos, sin, eps: tuple(
        x.new_empty(x.shape) for x in (q, k, weight_q, weight_k)
    )
)


norm_rotate_op.register_autograd(
    lambda ctx, dq, dk: (
        *norm_rotate_backward_op(dq, dk, *ctx.saved_tensors, ctx.eps),
        None,
        None,
        None,
        None,
        None,
    ),
    setup_context=save_norm_rotate,
)


norm_modulate_op.register_fake(
    lambda x, shift, scale, eps, dtype: x.new_empty(x.shape, dtype=dtype)
)


norm_modulate_backward_op.register_fake(
    lambda dy, x, scale, eps: tuple(t.new_empty(t.shape) for t in (x, scale, scale))
)


norm_modulate_op.register_autograd(
    lambda ctx, dy: (*norm_modulate_backward_op(dy, *ctx.saved_tensors, ctx.eps), None, None),
    setup_context=save_norm_modulate,
)


add_gated_op.register_fake(lambda x, y, gate: x.new_empty(x.shape, dtype=torch.float32))


add_gated_backward_op.register_fake(
    lambda d_out, y, gate: (y.new_empty(y.shape), gate.new_empty(gate.shape))
)


add_gated_op.register_autograd(
    lambda ctx, d_out: (d_out.to(ctx.dtype), *add_gated_backward_op(d_out, *ctx.saved_tensors)),
    setup_context=save_add_gated,
)
