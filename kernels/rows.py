"""Triton kernels for rows: norms, rotation, modulation and gates.

    norm_rotate      RMS norm of queries and keys, rotation, layout and cast in one pass
    norm_modulate    layer norm, shift, scale and cast in one pass
    add_gated        cast, gate and residual sum in one pass

A forward program takes one row. A backward program walks through `ROWS` of them and writes its
partial sum of a gradient that sums over rows; torch adds those up. Conventions are those of
kernels/attention.py.

Shapes: B batch, L tokens, N heads, K head size, D width, in kernels WIDTH, inside a BLOCK that is a
power of two.
"""

from __future__ import annotations  # the kernels' annotations name `tl`, which may be missing

import torch
from torch import Tensor

from kernels.attention import ceil_div, jit, launch, power_of_2, rooms_like

try:
    import triton.language as tl
    from triton.language import constexpr
except ModuleNotFoundError:
    tl = None

# The partial sums of a gradient are then a few per cent of the traffic.
ROWS = 32


# -- arguments of the kernels ---------------------------------------------------------------------


def row_options(width: int) -> dict:
    block = power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "num_warps": 8 if block > 2048 else 4, "num_stages": 1}


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """A (B, L, D) tensor whose B*L rows are evenly spaced, itself (also a slice of the last axis)
    or a copy, and their spacing. The stride of an axis of length 1 is arbitrary, so it is never the
    spacing of more than one row."""
    batch, length, _ = x.shape
    uneven = min(batch, length) > 1 and x.stride(0) != length * x.stride(1)
    if uneven or x.stride(2) != 1:
        x = x.contiguous()
    return x, x.stride(0 if length == 1 else 1)


def per_sample(mod: Tensor, x: Tensor) -> tuple[Tensor, int, int]:
    """Kernel argument for the modulation (B, 1 or L, D) of x (B, L, D): pointer, batch stride, row
    stride."""
    shapes = (x.shape, (x.shape[0], 1, x.shape[2]))
    assert mod.shape in shapes, f"{tuple(mod.shape)} does not modulate {tuple(x.shape)}"
    mod = mod if mod.stride(2) == 1 else mod.contiguous()
    return mod, mod.stride(0), mod.stride(1) if mod.shape[1] > 1 else 0


def partial_sums(x: Tensor, mod: Tensor) -> tuple[int, int, Tensor]:
    """Rows per program, programs per sample, and room (B, programs, D) for their partial sums of
    the gradient of `mod` (B, 1 or L, D)."""
    batch, length, width = x.shape
    rows = ROWS if mod.shape[1] == 1 else 1
    programs = ceil_div(length, rows)
    return rows, programs, x.new_empty((batch, programs, width), dtype=torch.float32)


def sum_up(partial: Tensor, mod: Tensor) -> Tensor:
    """The gradient of `mod` from its partial sums (B, programs, D)."""
    if mod.shape[1] == 1:
        partial = partial.sum(dim=1, keepdim=True)
    return partial.to(mod.dtype)


# -- pieces of the kernels ------------------------------------------------------------------------


@jit
def load(at, i, WIDTH: constexpr):
    return tl.load(at + i, mask=i < WIDTH, other=0.0).to(tl.float32)


@jit
def load_row(x, row, stride, i, WIDTH: constexpr):
    return load(x + row.to(tl.int64) * stride, i, WIDTH)


@jit
def load_mod(x, b, token, i, WIDTH: constexpr):
    return load(x[0] + b.to(tl.int64) * x[1] + token.to(tl.int64) * x[2], i, WIDTH)


@jit
def store_row(x, row, i, value, WIDTH: constexpr):
    tl.store(x + row.to(tl.int64) * WIDTH + i, value.to(x.dtype.element_ty), mask=i < WIDTH)


@jit
def as_stored(value, like):
    """Rounds to the dtype of `like`, as the plain version does between two steps."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@jit
def mean(x, WIDTH: constexpr):
    """Of a row that is zero behind its width."""
    return tl.sum(x, 0) / WIDTH


@jit
def centre(value, i, WIDTH: constexpr):
    """A row less its mean, zero behind its width."""
    return tl.where(i < WIDTH, value - mean(value, WIDTH), 0.0)


@jit
def rotate(x, cos, sin, token, sign: constexpr, K: constexpr, BLOCK: constexpr):
    """Rotates the pairs (x[2i], x[2i+1]) of a row of heads by sign * angle; every head has the same
    K/2 angles."""
    pair = tl.arange(0, BLOCK // 2) % (K // 2)
    c = tl.load(cos + token * (K // 2) + pair)
    s = tl.load(sin + token * (K // 2) + pair) * sign
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,))


# -- norm_rotate ----------------------------------------------------------------------------------


@jit
def norm_rotate_kernel(
    q, k, cos, sin, length, eps, K: constexpr, WIDTH: constexpr, BLOCK: constexpr
):
    """One row of q (program axis 1 is 0) or of k (1), each the tuple (x, its row stride, weight,
    y)."""
    x, stride, weight, y = q
    if tl.program_id(1) == 1:
        x, stride, weight, y = k
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    value = load_row(x, row, stride, i, WIDTH)
    normed = as_stored(value * tl.rsqrt(mean(value * value, WIDTH) + eps), x)
    out = normed * load(weight, i, WIDTH)
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
    K: constexpr,
    ROWS: constexpr,
    WIDTH: constexpr,
    BLOCK: constexpr,
):
    """ROWS rows of q or of k, each the tuple (x, its row stride, weight, dy, dx, partial sums of
    d_weight)."""
    x, stride, weight, dy, dx, partial = q
    if tl.program_id(1) == 1:
        x, stride, weight, dy, dx, partial = k
    i = tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS
    w = load(weight, i, WIDTH)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, tl.minimum(ROWS, rows - first)):
        row = first + j
        value = load_row(x, row, stride, i, WIDTH)
        d_out = load_row(dy, row, WIDTH, i, WIDTH)
        if cos is not None:
            d_out = rotate(d_out, cos, sin, row % length, -1, K, BLOCK)
        inverse = tl.rsqrt(mean(value * value, WIDTH) + eps)
        normed = value * inverse
        d_normed = d_out * w
        d_weight += d_out * as_stored(normed, x)
        d_value = inverse * (d_normed - normed * mean(d_normed * normed, WIDTH))
        store_row(dx, row, i, d_value, WIDTH)
    store_row(partial, tl.program_id(0), i, d_weight, WIDTH)


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
) -> tuple[Tensor, Tensor]:
    yq, yk = empty_rotated(q, k, weight_q, weight_k, cos, sin, eps, size)
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
def empty_rotated(q, k, weight_q, weight_k, cos, sin, eps, size):
    heads = (*q.shape[:2], q.shape[2] // size, size)
    return q.new_empty(heads), k.new_empty(heads)


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
    dxq, dxk = rooms_like(q, k)
    programs = ceil_div(batch * length, ROWS)
    pq, pk = q.new_empty((2, programs, width), dtype=torch.float32)
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


norm_rotate_backward_op.register_fake(
    lambda dq, dk, q, k, weight_q, weight_k, *_: tuple(rooms_like(q, k, weight_q, weight_k))
)


def save_norm_rotate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.eps = inputs[6]


norm_rotate_op.register_autograd(
    lambda ctx, dq, dk: (
        *norm_rotate_backward_op(dq, dk, *ctx.saved_tensors, ctx.eps),
        *(None, None, None, None),
    ),
    setup_context=save_norm_rotate,
)


def norm_rotate(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    size: int,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected queries and keys (B, L, N*size), RMS-normed over the full width, split into heads
    and, where rope gives cos and sin (L, size/2), rotated. Returns two (B, L, N, size) in the dtype
    of q."""
    cos, sin = rope or (None, None)
    return norm_rotate_op(q, k, weight_q, weight_k, cos, sin, eps, size)


# -- norm_modulate --------------------------------------------------------------------------------


@jit
def norm_modulate_kernel(
    x, stride, shift, scale, y, length, eps, WIDTH: constexpr, BLOCK: constexpr
):
    """One row."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    value = load_row(x, row, stride, i, WIDTH)
    centred = centre(value, i, WIDTH)
    normed = as_stored(centred * tl.rsqrt(mean(centred * centred, WIDTH) + eps), x)
    b = row // length
    token = row % length
    gain = 1 + load_mod(scale, b, token, i, WIDTH)
    store_row(y, row, i, normed * gain + load_mod(shift, b, token, i, WIDTH), WIDTH)


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
    ROWS: constexpr,
    WIDTH: constexpr,
    BLOCK: constexpr,
):
    """ROWS tokens (program axis 0) of one sample (axis 1); d_shift and d_scale are (B, programs,
    D)."""
    b = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    i = tl.arange(0, BLOCK)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    gain = 1 + load_mod(scale, b, first, i, WIDTH)  # ROWS is 1 where every token has its own
    for j in range(0, tl.minimum(ROWS, length - first)):
        row = b * length + first + j
        value = load_row(x, row, stride, i, WIDTH)
        d_out = load_row(dy, row, WIDTH, i, WIDTH)
        centred = centre(value, i, WIDTH)
        inverse = tl.rsqrt(mean(centred * centred, WIDTH) + eps)
        normed = centred * inverse
        d_normed = d_out * gain
        shift_sum += d_out
        scale_sum += d_out * as_stored(normed, x)
        d_centred = d_normed - mean(d_normed, WIDTH) - normed * mean(d_normed * normed, WIDTH)
        store_row(dx, row, i, inverse * d_centred, WIDTH)
    program = b * tl.num_programs(0) + tl.program_id(0)
    store_row(d_shift, program, i, shift_sum, WIDTH)
    store_row(d_scale, program, i, scale_sum, WIDTH)


@torch.library.custom_op("motus::norm_modulate", mutates_args=())
def norm_modulate_op(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    batch, length, width = x.shape
    y = x.new_empty(x.shape, dtype=dtype)
    launch(
        norm_modulate_kernel,
        (batch * length,),
        x.device,
        *by_rows(x),
        per_sample(shift, x),
        per_sample(scale, x),
        y,
        length,
        eps,
        **row_options(width),
    )
    return y


norm_modulate_op.register_fake(
    lambda x, shift, scale, eps, dtype: x.new_empty(x.shape, dtype=dtype)
)


@torch.library.custom_op("motus::norm_modulate_backward", mutates_args=())
def norm_modulate_backward_op(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x.shape
    (dx,) = rooms_like(x)
    rows, programs, d_shift = partial_sums(x, scale)
    d_scale = torch.empty_like(d_shift)
    launch(
        norm_modulate_backward_kernel,
        (programs, batch),
        x.device,
        dy.contiguous(),
        *by_rows(x),
        per_sample(scale, x),
        dx,
        d_shift,
        d_scale,
        length,
        eps,
        ROWS=rows,
        **row_options(width),
    )
    return dx, sum_up(d_shift, scale), sum_up(d_scale, scale)


norm_modulate_backward_op.register_fake(
    lambda dy, x, scale, eps: tuple(rooms_like(x, scale, scale))
)


def save_norm_modulate(ctx, inputs, output):
    x, _, scale, ctx.eps, _ = inputs
    ctx.save_for_backward(x, scale)


norm_modulate_op.register_autograd(
    lambda ctx, dy: (*norm_modulate_backward_op(dy, *ctx.saved_tensors, ctx.eps), None, None),
    setup_context=save_norm_modulate,
)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Layer norm of x (B, L, D), then shift and scale (B or 1, 1 or L, D; the same shape) -> (B, L,
    D) in `dtype`."""
    shift = shift.expand(len(x), -1, -1)
    scale = scale.expand(len(x), -1, -1)
    return norm_modulate_op(x, shift, scale, eps, dtype)


# -- add_gated ------------------------------------------------------------------------------------


@jit
def add_gated_kernel(
    x, x_stride, y, y_stride, gate, out, length, WIDTH: constexpr, BLOCK: constexpr
):
    """One row."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    gain = load_mod(gate, row // length, row % length, i, WIDTH)
    gated = load_row(y, row, y_stride, i, WIDTH) * gain
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
    ROWS: constexpr,
    WIDTH: constexpr,
    BLOCK: constexpr,
):
    """ROWS tokens (program axis 0) of one sample (axis 1); d_gate is (B, programs, D)."""
    b = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    i = tl.arange(0, BLOCK)
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    g = load_mod(gate, b, first, i, WIDTH)
    for j in range(0, tl.minimum(ROWS, length - first)):
        row = b * length + first + j
        d = load_row(d_out, row, WIDTH, i, WIDTH)
        gate_sum += d * load_row(y, row, stride, i, WIDTH)
        store_row(dy, row, i, d * g, WIDTH)
    store_row(d_gate, b * tl.num_programs(0) + tl.program_id(0), i, gate_sum, WIDTH)


@torch.library.custom_op("motus::add_gated", mutates_args=())
def add_gated_op(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    batch, length, width = x.shape
    out = x.new_empty(x.shape, dtype=torch.float32)
    launch(
        add_gated_kernel,
        (batch * length,),
        x.device,
        *by_rows(x),
        *by_rows(y),
        per_sample(gate, x),
        out,
        length,
        **row_options(width),
    )
    return out


add_gated_op.register_fake(lambda x, y, gate: x.new_empty(x.shape, dtype=torch.float32))


@torch.library.custom_op("motus::add_gated_backward", mutates_args=())
def add_gated_backward_op(d_out: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, width = y.shape
    (dy,) = rooms_like(y)
    rows, programs, d_gate = partial_sums(y, gate)
    launch(
        add_gated_backward_kernel,
        (programs, batch),
        y.device,
        d_out.contiguous(),
        *by_rows(y),
        per_sample(gate, y),
        dy,
        d_gate,
        length,
        ROWS=rows,
        **row_options(width),
    )
    return dy, sum_up(d_gate, gate)


add_gated_backward_op.register_fake(lambda d_out, y, gate: tuple(rooms_like(y, gate)))


add_gated_op.register_autograd(  # which casts the first gradient to the dtype of x
    lambda ctx, d_out: (d_out, *add_gated_backward_op(d_out, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x.float() + y.float() * gate in fp32: x the residual stream, y a sub-layer's output, both (B,
    L, D); gate (B or 1, 1 or L, D)."""
    return add_gated_op(x, y, gate.expand(len(x), -1, -1))
