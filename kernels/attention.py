"""Triton attention: `joint_attention`, three experts in one attention with nothing concatenated,
and `attention`. Here also lies what all kernels share.

Attention is computed tile by tile with a running maximum and sum (Dao, arXiv 2307.08691). Every
expert keeps its own tensors: a program finds by its number which segment its tile of queries (or
keys) lies in, and walks through the three segments of the other side. Keys may carry an additive
bias: 0, -inf for padding, log(c) for a key that stands for c identical ones. A query that sees no
key gets zeros.

Everything is deterministic: no atomics. The backward pass is one kernel over query tiles (dq, and
delta = sum(o * do) on the way) and one over key tiles (dk, dv). Accumulators are fp32, offsets
int64. Tiles come from a table (`TILES`), never from a search: what is tested and compiled ahead of
time is what runs.

Each operation is a `torch.library.custom_op`, opaque to torch.compile and to checkpointing. Triton
is optional: without it the file imports, and a kernel that is asked for is refused.
TRITON_INTERPRET=1, set before Triton is imported, runs the kernels on a CPU, for tests.

Shapes: B batch, L tokens of a segment, N heads, K head size, KP the power of two that holds it. A
segment is passed to the kernels as the tuple (pointer, batch stride, row stride) of a (B, L, N, K)
tensor whose last two axes are contiguous; the lengths are q0 q1 q2, k0 k1 k2.
"""

from __future__ import annotations  # the kernels' annotations name `tl`, which may be missing

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ModuleNotFoundError:
    triton = None

# -- where and how a kernel runs ------------------------------------------------------------------

INTERPRET = constexpr(triton.knobs.runtime.interpret) if triton else False
LOG2_E = constexpr(1.4426950408889634) if triton else None
LN_2 = constexpr(0.6931471805599453) if triton else None

# Numbers of rows are no part of what is compiled: an instruction of another length must not stop a
# robot for a compilation. (Triton heeds this for plain arguments only, not inside tuples.)
LENGTHS = ("q0", "q1", "q2", "k0", "k1", "k2", "length", "rows")


def jit(function):
    """Makes a kernel of a function, where Triton is there."""
    return triton.jit(function, do_not_specialize=LENGTHS) if triton else function


class Tile(NamedTuple):
    """How a kernel is cut: rows of its own tile, rows of the tiles it walks through, warps, and
    stages of its pipeline."""

    OWN: int
    OTHER: int
    num_warps: int
    num_stages: int


# Chosen so that for every head size and on every card from the A100 on nothing spills and the
# shared memory suffices: docs/kernels.md has the figures. The interpreter gets small tiles, so that
# tests see many of them.
TILES = {
    torch.bfloat16: {
        "forward": Tile(64, 32, 4, 3),
        "dq": Tile(64, 32, 8, 2),
        "dkv": Tile(64, 32, 8, 2),
    },
    torch.float32: {
        "forward": Tile(32, 32, 8, 2),
        "dq": Tile(16, 32, 8, 2),
        "dkv": Tile(16, 32, 8, 2),
    },
}


def tile(kernel: str, dtype: torch.dtype) -> Tile:
    return Tile(16, 16, 4, 1) if INTERPRET else TILES[dtype][kernel]


def check(device: torch.device) -> None:
    """Refuses a device on which no kernel can run."""
    if triton is None:
        raise ValueError(
            "a Triton kernel was asked for, but Triton is not installed: pip install "
            "'motus[kernels]', or set MOTUS_ATTENTION to sdpa or plain"
        )
    if device.type != "cuda" and not INTERPRET:
        raise ValueError(
            f"a Triton kernel was asked for on {device.type}: use a CUDA device, set "
            "MOTUS_ATTENTION to sdpa or plain, or set TRITON_INTERPRET=1 before Triton is imported "
            "to run the kernels, slowly, on a CPU"
        )


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, step: int) -> int:
    return -(-n // step)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **options) -> None:
    """Every kernel starts here, on the device of its tensors. Nothing is launched for empty
    tensors."""
    check(device)
    if 0 not in grid:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            kernel[grid](*args, **options)


def rooms_like(*tensors: Tensor) -> list[Tensor]:
    """An uninitialised, contiguous tensor for each of `tensors`."""
    return [x.new_empty(x.shape) for x in tensors]


# -- kernels --------------------------------------------------------------------------------------


@jit
def find_tile(lengths, heads, ROWS: constexpr):
    """The tile of this program, among those of all segments -> which segment it is in, its first
    row there, the number of rows of the segments before, and (sample, head)."""
    pid = tl.program_id(0)
    first = tl.cdiv(lengths[0], ROWS)
    second = first + tl.cdiv(lengths[1], ROWS)
    which = (pid >= first).to(tl.int32) + (pid >= second).to(tl.int32)
    start = pid * ROWS
    before = 0
    if which == 1:
        start = (pid - first) * ROWS
        before = lengths[0]
    elif which == 2:
        start = (pid - second) * ROWS
        before = lengths[0] + lengths[1]
    head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    return which, start, before, head


@jit
def pick(which, triple):
    """triple[which] for an index known only when the kernel runs."""
    x = triple[0]
    if which == 1:
        x = triple[1]
    elif which == 2:
        x = triple[2]
    return x


@jit
def pointers(segment, length, head, start, ROWS: constexpr, K: constexpr, KP: constexpr):
    """Pointers to the rows from `start` on of one head and the mask of those that exist, each
    (ROWS, KP). The tile is found by 64 bits, the element in it by 32, which leaves more registers
    to the arithmetic."""
    row = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, KP)[None, :]
    corner = segment[0] + head[0] * segment[1] + tl.cast(start, tl.int64) * segment[2] + head[1] * K
    mask = row < length - start
    if KP > K:
        mask = mask & (d < K)
    return corner + (row * segment[2] + d), mask


@jit
def fetch(segment, length, head, start, ROWS: constexpr, K: constexpr, KP: constexpr):
    """(ROWS, KP) of one head, zero outside."""
    at, mask = pointers(segment, length, head, start, ROWS, K, KP)
    x = tl.load(at, mask=mask, other=0.0)
    if INTERPRET:  # the interpreter would compute on the bit patterns of bf16
        x = x.to(tl.float32)
    return x


@jit
def put(segment, length, head, start, x, ROWS: constexpr, K: constexpr, KP: constexpr):
    """Stores x (ROWS, KP) as the rows of one head that exist."""
    at, mask = pointers(segment, length, head, start, ROWS, K, KP)
    tl.store(at, x.to(segment[0].dtype.element_ty), mask=mask)


@jit
def bias_of(bias, length, head, rows):
    """Bias of keys in units of log 2, -inf for rows that do not exist. `bias` points to (B,
    length), or is None."""
    x = tl.where(rows < length, 0.0, float("-inf"))
    if bias is not None:
        x += tl.load(bias + head[0] * length + rows, mask=rows < length, other=0.0) * LOG2_E
    return x


@jit
def product(a, b):
    """a @ b, in fp32 as three products of TF32, which is nearly as exact."""
    return tl.dot(a, b, input_precision="tf32x3")


@jit
def forward_kernel(
    q,
    k,
    v,
    o,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    bias,
    lse,
    heads,
    scale,
    K: constexpr,
    KP: constexpr,
    OWN: constexpr,
    OTHER: constexpr,
):
    """The attended values of one tile of queries, and their log-sum-exp (B, N, sum of L)."""
    q_lengths = (q0, q1, q2)
    k_lengths = (k0, k1, k2)
    which, start, before, head = find_tile(q_lengths, heads, OWN)
    rows = start + tl.arange(0, OWN)
    length = pick(which, q_lengths)
    query = fetch(pick(which, q), length, head, start, OWN, K, KP)
    # Running maximum, sum and weighted values, logits in units of log 2.
    top = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    out = tl.zeros((OWN, KP), tl.float32)
    for s in tl.static_range(3):
        count = k_lengths[s]
        for j in range(0, count, OTHER):
            columns = j + tl.arange(0, OTHER)
            key = fetch(k[s], count, head, j, OTHER, K, KP)
            logits = product(query, tl.trans(key)) * (scale * LOG2_E)
            logits += bias_of(bias[s], count, head, columns)[None, :]
            new_top = tl.maximum(top, tl.max(logits, 1))
            # While all keys were padded: -inf - -inf would be NaN.
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(logits - finite[:, None])
            shrink = tl.exp2(top - finite)
            total = total * shrink + tl.sum(p, 1)
            value = fetch(v[s], count, head, j, OTHER, K, KP)
            out = out * shrink[:, None] + product(p.to(value.dtype), value)
            top = new_top
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    put(pick(which, o), length, head, start, out / total[:, None], OWN, K, KP)
    log_sum = tl.where(empty, 0.0, (top + tl.log2(total)) * LN_2)
    at = tl.program_id(1).to(tl.int64) * (q0 + q1 + q2) + before + rows
    tl.store(lse + at, log_sum, mask=rows < length)


@jit
def dq_kernel(
    q,
    k,
    v,
    o,
    do,
    dq,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    bias,
    lse,
    delta,
    heads,
    scale,
    K: constexpr,
    KP: constexpr,
    OWN: constexpr,
    OTHER: constexpr,
):
    """The gradient of one tile of queries, and delta = sum(o * do) of its rows."""
    q_lengths = (q0, q1, q2)
    k_lengths = (k0, k1, k2)
    which, start, before, head = find_tile(q_lengths, heads, OWN)
    rows = start + tl.arange(0, OWN)
    length = pick(which, q_lengths)
    query = fetch(pick(which, q), length, head, start, OWN, K, KP)
    d_out = fetch(pick(which, do), length, head, start, OWN, K, KP)
    out = fetch(pick(which, o), length, head, start, OWN, K, KP)
    diff = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    at = tl.program_id(1).to(tl.int64) * (q0 + q1 + q2) + before + rows
    tl.store(delta + at, diff, mask=rows < length)
    log_sum = tl.load(lse + at, mask=rows < length, other=0.0) * LOG2_E
    d_query = tl.zeros((OWN, KP), tl.float32)
    for s in tl.static_range(3):
        count = k_lengths[s]
        for j in range(0, count, OTHER):
            columns = j + tl.arange(0, OTHER)
            key = fetch(k[s], count, head, j, OTHER, K, KP)
            logits = product(query, tl.trans(key)) * (scale * LOG2_E)
            logits += bias_of(bias[s], count, head, columns)[None, :]
            p = tl.exp2(logits - log_sum[:, None])
            value = fetch(v[s], count, head, j, OTHER, K, KP)
            d_p = product(d_out, tl.trans(value))
            d_query += product((p * (d_p - diff[:, None])).to(key.dtype), key)
    put(pick(which, dq), length, head, start, d_query * scale, OWN, K, KP)


@jit
def dkv_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    bias,
    lse,
    delta,
    heads,
    scale,
    K: constexpr,
    KP: constexpr,
    OWN: constexpr,
    OTHER: constexpr,
):
    """The gradients of one tile of keys and of its values."""
    q_lengths = (q0, q1, q2)
    k_lengths = (k0, k1, k2)
    which, start, _, head = find_tile(k_lengths, heads, OWN)
    columns = start + tl.arange(0, OWN)
    length = pick(which, k_lengths)
    key = fetch(pick(which, k), length, head, start, OWN, K, KP)
    value = fetch(pick(which, v), length, head, start, OWN, K, KP)
    offset = bias_of(bias[0], length, head, columns)  # not `pick`: a bias may be None
    if which == 1:
        offset = bias_of(bias[1], length, head, columns)
    elif which == 2:
        offset = bias_of(bias[2], length, head, columns)
    d_key = tl.zeros((OWN, KP), tl.float32)
    d_value = tl.zeros((OWN, KP), tl.float32)
    at = tl.program_id(1).to(tl.int64) * (q0 + q1 + q2)
    for s in tl.static_range(3):
        count = q_lengths[s]
        for i in range(0, count, OTHER):
            rows = i + tl.arange(0, OTHER)
            exists = rows < count
            query = fetch(q[s], count, head, i, OTHER, K, KP)
            log_sum = tl.load(lse + at + rows, mask=exists, other=float("inf")) * LOG2_E
            logits = product(key, tl.trans(query)) * (scale * LOG2_E)
            # (keys, queries), 0 for queries that do not exist
            p = tl.exp2(logits + offset[:, None] - log_sum[None, :])
            d_out = fetch(do[s], count, head, i, OTHER, K, KP)
            d_value += product(p.to(d_out.dtype), d_out)
            diff = tl.load(delta + at + rows, mask=exists, other=0.0)
            d_p = product(value, tl.trans(d_out))
            d_key += product((p * (d_p - diff[None, :])).to(query.dtype), query)
        at += count
    put(pick(which, dk), length, head, start, d_key * scale, OWN, K, KP)
    put(pick(which, dv), length, head, start, d_value, OWN, K, KP)


KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}

# -- operations -----------------------------------------------------------------------------------


def segments(group: list[Tensor]) -> tuple:
    """One to three (B, L, N, K) tensors -> kernel argument: three segments, the missing ones repeat
    the first."""
    three = group + group[:1] * (3 - len(group))
    return tuple((x, x.stride(0), x.stride(1)) for x in three)


def lengths(group: list[Tensor]) -> tuple[int, ...]:
    """L of three segments, 0 for those that are missing."""
    return (*(x.shape[1] for x in group), 0, 0)[:3]


def by_heads(group: list[Tensor]) -> list[Tensor]:
    """Tensors whose rows (N, K) are contiguous: themselves, or copies (gradients may be expanded or
    transposed)."""
    rows = []
    for x in group:
        ready = x.stride(3) == 1 and x.stride(2) == x.shape[3]
        rows.append(x if ready else x.contiguous())
    return rows


def launch_attention(
    kernel: str,
    groups: list[list[Tensor]],
    bias: list[Tensor],
    biased: str,
    rows: tuple[Tensor, ...],
    scale: float,
) -> None:
    """Launches over the tiles of k for "dkv", of q otherwise. groups: the lists of segments, q and
    k first; biased: the digits of the key segments that `bias` belongs to, like "12"; rows: lse and
    delta."""
    q, k = groups[:2]
    batch, _, heads, size = q[0].shape
    cut = tile(kernel, q[0].dtype)
    tiles = sum(ceil_div(x.shape[1], cut.OWN) for x in (k if kernel == "dkv" else q))
    biases = dict(zip(biased, bias))
    launch(
        KERNELS[kernel],
        (tiles, batch * heads),
        q[0].device,
        *map(segments, groups),
        *lengths(q),
        *lengths(k),
        tuple(biases.get(s) for s in "012"),
        *rows,
        heads,
        scale,
        K=size,
        KP=max(16, power_of_2(size)),
        **cut._asdict(),
    )


@torch.library.custom_op("motus::attention", mutates_args=())
def attention_op(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], bias: list[Tensor], biased: str, scale: float
) -> list[Tensor]:
    """-> the attended values per query segment, each (B, L, N, K) contiguous, and the log-sum-exp
    (B, N, sum of L) in fp32."""
    *o, lse = empty_outputs(q, k, v, bias, biased, scale)
    groups = [*map(by_heads, (q, k, v)), o]
    launch_attention("forward", groups, bias, biased, (lse,), scale)
    return [*o, lse]


@attention_op.register_fake
def empty_outputs(q, k, v, bias, biased, scale):
    batch, _, heads, _ = q[0].shape
    rows = (batch, heads, sum(x.shape[1] for x in q))
    return [*rooms_like(*q), q[0].new_empty(rows, dtype=torch.float32)]


@torch.library.custom_op("motus::attention_backward", mutates_args=())
def attention_backward_op(
    do: list[Tensor],
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    bias: list[Tensor],
    biased: str,
    o: list[Tensor],
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    """-> dq, dk, dv of all segments, in one list."""
    do, q, k, v = map(by_heads, (do, q, k, v))
    dq, dk, dv = (rooms_like(*group) for group in (q, k, v))
    rows = (lse, torch.empty_like(lse))
    launch_attention("dq", [q, k, v, o, do, dq], bias, biased, rows, scale)
    launch_attention("dkv", [q, k, v, do, dk, dv], bias, biased, rows, scale)
    return [*dq, *dk, *dv]


attention_backward_op.register_fake(
    lambda do, q, k, v, bias, biased, o, lse, scale: rooms_like(*q, *k, *v)
)


def save_attention(ctx, inputs, output):
    q, k, v, bias, ctx.biased, ctx.scale = inputs
    ctx.sizes = [len(x) for x in (q, k, v, bias, q)]
    ctx.save_for_backward(*q, *k, *v, *bias, *output)


def attention_gradients(ctx, grads):
    saved = iter(ctx.saved_tensors)
    q, k, v, bias, o = (list(islice(saved, size)) for size in ctx.sizes)
    do = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, o)]
    found = attention_backward_op(do, q, k, v, bias, ctx.biased, o, next(saved), ctx.scale)
    dq, dk = found[: len(q)], found[len(q) : -len(v)]
    return dq, dk, found[-len(v) :], [None] * len(bias), None, None


attention_op.register_autograd(attention_gradients, setup_context=save_attention)


def attend(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    bias: list[Tensor | None],
    scale: float | None = None,
) -> list[Tensor]:
    """Softmax attention of one to three query segments over one to three key segments. q, k, v: (B,
    L, N, K) each; bias: (B, L) fp32 per key segment, or None. Computes in the dtype of the first v
    (bf16 or fp32). Returns (B, L, N, K) contiguous per query segment."""
    batch, _, heads, size = q[0].shape
    dtype = v[0].dtype
    if size > 128 or dtype not in TILES:
        raise ValueError(
            f"head size {size} and {dtype}: the Triton attention takes head sizes to 128 in "
            "float32 or bfloat16; set MOTUS_ATTENTION to sdpa"
        )
    for x in (*q, *k, *v):
        assert (x.shape[0], *x.shape[2:]) == (batch, heads, size), "B, N, K must be the same"
    for key, value, row in zip(k, v, bias, strict=True):
        assert key.shape == value.shape, "every key has a value"
        assert row is None or row.shape == key.shape[:2], "a bias has one number per key"
    q, k, v = ([x.to(dtype) for x in group] for group in (q, k, v))
    biased = "".join(str(s) for s, x in enumerate(bias) if x is not None)
    bias = [x.float().contiguous() for x in bias if x is not None]
    return attention_op(q, k, v, bias, biased, size**-0.5 if scale is None else scale)[:-1]


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`attention.attention` for a bias that is absent or (B, 1, 1, Lk), one number per key."""
    row = None if bias is None else bias[:, 0, 0].expand(k.shape[:2])
    return attend([q], [k], [v], [row], scale)[0]


def joint_attention(
    qkv: list[tuple[Tensor, Tensor, Tensor]], biases: list[Tensor | None]
) -> list[Tensor]:
    """`attention.joint_attention`: (q, k, v) and bias of the keys per expert -> (B, L, N*K) per
    expert. Nothing is concatenated."""
    q, k, v = (list(group) for group in zip(*qkv))
    return [x.flatten(2) for x in attend(q, k, v, biases)]
