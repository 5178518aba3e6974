"""The Triton kernels against the plain functions, in the interpreter (on a GPU if there is one),
and what the compiler makes of them.

`python tests/test_kernels.py` compiles every shipped configuration ahead of time, without a GPU,
and writes docs/kernels.md.
"""

import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu
# The ahead-of-time compilation runs as a script.
sys.path.insert(0, str(Path(__file__).parent.parent))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

import test_golden  # noqa: E402
import test_motus  # noqa: E402

import attention as eager  # noqa: E402
import kernels  # noqa: E402
from kernels import rows as row_kernels  # noqa: E402
from motus import Motus  # noqa: E402
from scale.batches import draw_noise  # noqa: E402

# `kernels.attention` is the function; this is the file.
flash = importlib.import_module("kernels.attention")

DOCS = Path(__file__).parent.parent / "docs" / "kernels.md"

# Relative to the largest value. In fp32 the sums run in another order. In bf16 outputs and
# gradients are rounded (2^-9), and on a GPU also what goes into the second products.
TOLERANCE = (
    {torch.float32: 1e-5, torch.bfloat16: 1e-2}
    if DEVICE == "cpu"
    else {torch.float32: 1e-4, torch.bfloat16: 3e-2}
)


def close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.numel():
            assert torch.isfinite(a).all()
            assert (a.float() - b.float()).abs().max() <= TOLERANCE[dtype] * max(
                1.0, b.float().abs().max().item()
            )


def incoming(outputs: list[Tensor]) -> list[Tensor]:
    """Random gradients of outputs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for x in outputs]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, incoming(outputs), retain_graph=True))


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """What attention.py computes here is the plain version, on a GPU too."""
    monkeypatch.setenv("MOTUS_ATTENTION", "plain")


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """The interpreter cuts bf16 off, which is biased and twice as wrong; here it rounds to the
    nearest, as a GPU does."""
    from triton.runtime import interpreter

    cast = interpreter._convert_float

    def nearest(x: np.ndarray, source, target, mode) -> np.ndarray:
        if (source, target) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return cast(x, source, target, mode)
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # ties to even

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


# -- attention ------------------------------------------------------------------------------------


def segments(
    lengths: tuple[int, ...],
    heads: int,
    size: int,
    dtype: torch.dtype,
    batch: int = 1,
    seed: int = 0,
) -> list[list[Tensor]]:
    """q, k, v per segment, slices of one projection as experts make them: rows are 3*N*K apart."""
    torch.manual_seed(seed)
    qkv = [
        torch.randn(batch, length, 3, heads, size, device=DEVICE).to(dtype) for length in lengths
    ]
    return [[x[:, :, i].detach().requires_grad_() for x in qkv] for i in range(3)]


def plain_segments(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    bias: list[Tensor | None],
    scale: float | None = None,
) -> list[Tensor]:
    row = torch.cat(
        [
            key.new_zeros(key.shape[:2], dtype=torch.float32) if b is None else b
            for key, b in zip(k, bias)
        ],
        dim=1,
    )
    out = eager.plain_attention(
        torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1), row[:, None, None], scale
    )
    return list(out.split([x.shape[1] for x in q], dim=1))


def plain_gradients(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    bias: list[Tensor | None],
    scale: float | None,
) -> list[Tensor]:
    """Of q, k, v. Like any attention that saves its output, the kernels take delta = sum(o * do) of
    an o in bf16: that shifts the gradient of a query's logits by p times the rounding error of
    delta, as if the log-sum-exp had a gradient too. In fp32 nothing is rounded."""
    wide_q, wide_k, wide_v = ([x.float() for x in group] for group in (q, k, v))
    out = plain_segments(wide_q, wide_k, wide_v, bias, scale)
    row = torch.cat(
        [x.new_zeros(x.shape[:2]) if b is None else b for x, b in zip(wide_k, bias)], dim=1
    )[:, None, None]
    logits = torch.einsum("bqnk,bsnk->bnqs", torch.cat(wide_q, 1), torch.cat(wide_k, 1)) * (
        q[0].shape[3] ** -0.5 if scale is None else scale
    )
    rounded = [x.to(v[0].dtype) for x in out]
    do = [x.float() for x in incoming(rounded)]
    error = torch.cat(
        [(d * (r.float() - x)).sum(-1) for d, r, x in zip(do, rounded, out)], dim=1
    )  # (B, Lq, N)
    return list(
        torch.autograd.grad(
            [*out, (logits + row).logsumexp(-1)],
            [*q, *k, *v],
            [*do, -error.detach().transpose(1, 2)],
        )
    )


def random_case(rng: random.Random, seed: int) -> None:
    """One draw: video always has keys; the others may be empty, padded, wholly padded, or carry log
    counts."""
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])
    size, heads, batch = (
        rng.choice([16, 24, 32, 32, 48, 64, 80, 128]),
        rng.choice([1, 1, 2]),
        rng.choice([1, 1, 2]),
    )
    lengths = (
        rng.choice([1, 15, 16, 17, rng.randint(1, 36)]),
        rng.choice([0, 1, 5, 18]),
        rng.choice([0, 1, 7, 16, rng.randint(1, 20)]),
    )
    lengths = lengths[: rng.choice([1, 2, 3, 3, 3])]
    q, k, v = segments(lengths, heads, size, dtype, batch, seed)
    bias: list[Tensor | None] = [None]
    for length in lengths[1:]:
        kind = rng.choice(["none", "ragged", "all padded", "count"])
        visible = torch.arange(length)[None] < torch.tensor(
            [[rng.randint(0, length)] for _ in range(batch)]
        )
        row = {
            "none": None,
            "ragged": eager.key_bias(visible),
            "all padded": torch.full((batch, length), float("-inf")),
            "count": torch.randint(1, 500, (batch, length)).float().log(),
        }[kind]
        bias.append(None if row is None else row.to(DEVICE))
    scale = rng.choice([None, 0.3])
    found = flash.attend(q, k, v, bias, scale)
    close(found, plain_segments(q, k, v, bias, scale), dtype)
    close(gradients(found, [*q, *k, *v]), plain_gradients(q, k, v, bias, scale), dtype)


@pytest.mark.parametrize("group", range(4))
def test_attention_equals_the_plain_one_on_random_segments(group):
    """Forward and all nine gradients, over ragged tails, empty segments, wholly padded segments,
    length 1, log counts."""
    for i in range(6):
        random_case(random.Random(100 * group + i), i)


@pytest.mark.long
@pytest.mark.parametrize("group", range(10, 30))
def test_attention_equals_the_plain_one_on_two_hundred_more(group):
    """The same, for longer."""
    for i in range(10):
        random_case(random.Random(100 * group + i), i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_attention_equals_the_plain_one_behind_the_same_call(dtype):
    """`kernels.joint_attention` takes what `eager.joint_attention` takes; rotated queries and
    keys may be fp32."""
    q, k, v = segments((20, 5, 9), 2, 32, dtype, batch=2)
    bias = eager.key_bias(
        torch.arange(9, device=DEVICE)[None] < torch.tensor([[9], [0]], device=DEVICE)
    )
    qkv = [(q[0].float(), k[0].float(), v[0]), (q[1], k[1], v[1]), (q[2], k[2], v[2])]
    expected, found = (f.joint_attention(qkv, [None, None, bias]) for f in (eager, kernels))
    close(found, expected, dtype)
    close(gradients(found, [*q, *k, *v]), gradients(expected, [*q, *k, *v]), dtype)


def test_cross_attention_with_a_text_bias_equals_the_plain_one():
    """One query segment, other keys, padding collapsed into one key with log(count)."""
    (q,), _, _ = segments((19,), 2, 32, torch.float32, batch=2)
    _, (k,), (v,) = segments((7,), 2, 32, torch.float32, batch=2, seed=1)
    bias = eager.text_bias(torch.tensor([6, 3], device=DEVICE), 7, 40)[:, None, None]
    expected, found = eager.plain_attention(q, k, v, bias), kernels.attention(q, k, v, bias)
    close([found], [expected], torch.float32)
    close(gradients([found], [q, k, v]), gradients([expected], [q, k, v]), torch.float32)


def test_a_key_with_log_count_bias_stands_for_its_copies():
    """log(3) on one key is the same as the key three times."""
    q, k, v = segments((4,), 1, 16, torch.float32)
    _, (k3,), (v3,) = segments((1,), 1, 16, torch.float32, seed=3)
    count = torch.full((1, 1), 3.0, device=DEVICE).log()
    once = flash.attend(q, [*k, k3], [*v, v3], [None, count])
    thrice = flash.attend(
        q, [*k, k3.expand(1, 3, 1, 16)], [*v, v3.expand(1, 3, 1, 16)], [None, None]
    )
    close(once, thrice, torch.float32)


def test_a_query_that_sees_no_key_gets_zeros_and_gives_zero_gradients():
    """All keys of one sample are padded: no NaN forward or backward, and the other sample is not
    touched."""
    q, k, v = segments((18,), 1, 16, torch.float32, batch=2)
    bias = eager.key_bias(torch.tensor([[True], [False]], device=DEVICE).expand(2, 18))
    out = flash.attend(q, k, v, [bias])
    grads = gradients(out, [*q, *k, *v])
    assert out[0][1].abs().max() == 0 and all(g[1].abs().max() == 0 for g in grads)
    expected = plain_segments(*([x[0][:1]] for x in (q, k, v)), [None])
    close([out[0][:1]], expected, torch.float32)


def test_attention_is_deterministic_and_saves_the_log_sum_exp():
    """Two runs agree bit for bit; the log-sum-exp is that of the logits."""
    q, k, v = segments((17, 3, 6), 1, 32, torch.float32)
    *_, lse = flash.attention_op(q, k, v, [], "", 0.2)
    logits = torch.einsum("bqnk,bsnk->bnqs", torch.cat(q, 1), torch.cat(k, 1)) * 0.2
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-4)
    runs = [gradients(flash.attend(q, k, v, [None] * 3, 0.2), [*q, *k, *v]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.long
def test_offsets_reach_beyond_two_to_the_31():
    """A batch stride of more than 2^31 elements: the second sample is read where it is. (8.6 GB are
    reserved, hardly any is touched.)"""
    stride = 2**31 + 64
    room = torch.empty(2 * stride, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = (room.as_strided((2, 5, 1, 16), (stride, 16, 16, 1), 80 * i) for i in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(2, 5, 1, 16))
    close(
        flash.attend([q], [k], [v], [None]),
        plain_segments([q], [k], [v], [None]),
        torch.bfloat16,
    )


@pytest.mark.long
def test_a_layer_of_the_full_model():
    """24 heads of 128 over 360 video, 53 action and 130 understanding tokens, in the tiles of a
    GPU."""
    q, k, v = segments((360, 53, 130), 24, 128, torch.float32)
    bias = [None, None, eager.key_bias(torch.arange(130, device=DEVICE)[None] < 101)]
    inputs = [*q, *k, *v]
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            on_a_gpu = flash.TILES[torch.bfloat16]
            patch.setattr(flash, "tile", lambda kernel, dtype: on_a_gpu[kernel])
        found = flash.attend(q, k, v, bias)
        grads = gradients(found, inputs)
    expected = plain_segments(q, k, v, bias)
    close(found, expected, torch.float32)
    close(grads, gradients(expected, inputs), torch.float32)


ROW_CASES = [
    pytest.param(dtype, seed, marks=[pytest.mark.long] * (seed > 2))
    for dtype in (torch.float32, torch.bfloat16)
    for seed in range(20)
]


# -- row kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, seed", ROW_CASES)
def test_norm_and_rotation_equal_the_plain_ones(seed, dtype):
    """RMS norm over all heads, rotation of video only, from slices of one projection; gradients of
    inputs and of both weights."""
    rng = random.Random(seed)
    batch, length, heads, size = (
        rng.choice([1, 2]),
        rng.choice([1, 17, 33]),
        rng.choice([1, 3, 4]),
        rng.choice([4, 12, 24, 64]),
    )
    torch.manual_seed(seed)
    qkv = torch.randn(batch, length, 3 * heads * size, device=DEVICE).to(dtype).requires_grad_()
    norms = [eager.RMSNorm(heads * size).to(DEVICE, dtype) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    q, k, _ = qkv.chunk(3, dim=-1)
    angle = torch.randn(length, size // 2, device=DEVICE)
    rope = (angle.cos(), angle.sin()) if seed % 2 else None
    weights = [norm.weight for norm in norms]
    arguments = (q, k, *weights, norms[0].eps, size, rope)
    expected = [x.to(dtype) for x in eager.norm_rotate(*arguments)]
    found = list(kernels.norm_rotate(*arguments))
    inputs = [qkv, *weights]
    close(found, expected, dtype)
    close(gradients(found, inputs), gradients(expected, inputs), dtype)


@pytest.mark.parametrize("dtype, seed", ROW_CASES)
def test_modulation_and_gated_residual_equal_the_plain_ones(seed, dtype):
    """One modulation for all, per sample or per token, out of the six of a block; fp32 stream,
    projections in `dtype`."""
    rng = random.Random(seed)
    batch, length, width = rng.choice([1, 2]), rng.choice([1, 5, 35]), rng.choice([6, 64, 130])
    torch.manual_seed(seed)
    x = (
        torch.randn(length, batch, width, device=DEVICE).transpose(0, 1).requires_grad_()
    )  # the strides need not be the usual ones
    y = torch.randn(batch, length, width, device=DEVICE).to(dtype).requires_grad_()
    mods = torch.randn(
        rng.choice([1, batch]),
        length if length < 35 else 1,
        6,
        width,
        device=DEVICE,
        requires_grad=True,
    )
    shift, scale, gate = mods.unbind(dim=2)[:3]
    expected, found = (
        [f.norm_modulate(x, shift, scale, 1e-5, dtype), f.add_gated(x, y, gate)]
        for f in (eager, kernels)
    )
    close(found, expected, dtype)
    close(gradients(found, [x, y, mods]), gradients(expected, [x, y, mods]), dtype)


# -- with the rest of torch -----------------------------------------------------------------------


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def op_arguments() -> dict:
    q, k, v = ([leaf(1, length, 1, 16) for length in (5, 0, 3)] for _ in range(3))
    rows, weight, mod = leaf(1, 3, 8), leaf(8), leaf(1, 1, 8)
    return {
        "attention": (
            flash.attention_op,
            (q, k, v, [torch.zeros(1, 3, device=DEVICE)], "2", 0.25),
        ),
        "norm_rotate": (
            row_kernels.norm_rotate_op,
            (rows, rows, weight, weight, None, None, 1e-6, 4),
        ),
        "norm_modulate": (row_kernels.norm_modulate_op, (rows, mod, mod, 1e-6, torch.bfloat16)),
        "add_gated": (row_kernels.add_gated_op, (rows, leaf(1, 3, 8), mod)),
    }


SLOW = [
    pytest.param(name, marks=pytest.mark.long)
    for name in ("norm_rotate", "norm_modulate", "add_gated")
]


@pytest.mark.parametrize("name", ["attention", *SLOW])
def test_operations_pass_opcheck(name):
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch agree with what the
    operation does."""
    op, arguments = op_arguments()[name]
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def layer(x: Tensor, weight: Tensor, mod: Tensor) -> Tensor:
    h = kernels.norm_modulate(x, mod, mod, 1e-6, torch.float32)
    q, k = kernels.norm_rotate(h, h, weight, weight, 1e-6, 16)
    return kernels.add_gated(x, kernels.joint_attention([(q, k, q)], [None])[0], mod)


def test_a_layer_of_kernels_compiles_in_one_graph_and_checkpoints():
    """torch.compile(fullgraph=True) and activation checkpointing change no bit of the output or the
    gradients."""
    torch.manual_seed(0)
    inputs = [leaf(1, 6, 32), leaf(32), leaf(1, 1, 32)]
    expected = layer(*inputs)
    expected_grads = gradients([expected], inputs)
    for run in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(layer, *x, use_reentrant=False),
    ):
        found = run(*inputs)
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients([found], inputs), expected_grads))


def test_what_cannot_run_is_refused_with_a_remedy(monkeypatch):
    """Head sizes over 128; a CPU without the interpreter; and without Triton the file imports, and
    a kernel is refused when asked for."""
    x = torch.zeros(1, 2, 1, 130)
    with pytest.raises(ValueError, match="head size 130"):
        kernels.attention(x, x, x)
    monkeypatch.setattr(flash, "INTERPRET", False)
    with pytest.raises(ValueError, match="asked for on cpu.*TRITON_INTERPRET"):
        flash.check(torch.device("cpu"))
    code = (
        "import sys, torch; sys.modules['triton'] = None; import kernels; "
        "x = torch.zeros(1, 2, 1, 16); kernels.attention(x, x, x)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert "Triton is not installed: pip install" in run.stderr.splitlines()[-1]


# -- the whole model ------------------------------------------------------------------------------

ALL_KERNELS = {
    name + suffix
    for name in ("norm_rotate", "norm_modulate", "add_gated")
    for suffix in ("", "_backward")
} | {*flash.KERNELS}


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """Names of the kernels that were launched; heads may be as small as tests like them."""
    names = set()
    launch = flash.launch

    def note(kernel, *args, **options):
        names.add(kernel.fn.__name__.removesuffix("_kernel"))
        launch(kernel, *args, **options)

    for module in (flash, row_kernels):
        monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(eager, "HEAD_SIZES", range(1, 129))
    return names


def loss_and_gradients(model: Motus, **change) -> list[Tensor]:
    inputs = replace(test_motus.inputs_of(und=3), **change)
    model.zero_grad()
    losses = model.loss(inputs, **draw_noise(inputs, torch.Generator().manual_seed(5)))
    losses.total().backward()
    return [
        losses.video,
        *([] if losses.action is None else [losses.action]),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["padded", *(pytest.param(case, marks=pytest.mark.long) for case in ("video alone", "bf16"))],
)
def test_the_losses_and_gradients_of_a_whole_model_equal_the_plain_ones(
    case, launched, monkeypatch
):
    """Through joint attention, prologue, adaLN and gates of three experts, with padded actions and
    understanding; in stage 1; in bf16."""
    model = test_motus.model_of().to(DEVICE, torch.bfloat16 if case == "bf16" else torch.float32)
    change = (
        dict(actions=None, und=None, und_mask=None)
        if case == "video alone"
        else dict(
            action_mask=(torch.arange(8) < 5)[None, :, None].expand(2, 8, 3),
            und_mask=torch.tensor([[True] * 3, [False] * 3]),
        )
    )
    results = {}
    for name in ("plain", "triton"):
        monkeypatch.setenv("MOTUS_ATTENTION", name)
        results[name] = loss_and_gradients(model, **change)
        assert launched == (ALL_KERNELS if name == "triton" else set())
    if case == "bf16":  # rounded in other places; what counts is the whole
        for a, b in zip(results["triton"][:2], results["plain"]):
            assert (a - b).abs().max() <= 0.02 * b.abs().max()
    else:
        close(results["triton"], results["plain"], torch.float32)


@pytest.mark.parametrize(
    "mode",
    [
        "vla",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("joint", "world_model", "idm", "vgm")),
    ],
)
def test_every_mode_samples_the_same_with_the_kernels(mode, launched, monkeypatch):
    """Two Euler steps from the same noise; only forward kernels run."""
    model, inputs, results = test_motus.model_of(), test_motus.inputs_of(batch=1, und=3), []
    for name in ("plain", "triton"):
        monkeypatch.setenv("MOTUS_ATTENTION", name)
        prediction = model.sample(inputs, mode, 2, torch.Generator().manual_seed(3))
        results.append([x for x in prediction if x is not None])
    close(results[1], results[0], torch.float32)
    assert launched == {"norm_rotate", "norm_modulate", "add_gated", "forward"}


GOLDEN_MODELS = test_golden.cases(f"*{test_golden.MOTUS_SUFFIX}", test_golden.MOTUS_SUFFIX)


@pytest.mark.long
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_the_official_training_step_holds_with_the_kernels(name, launched, monkeypatch):
    """Velocities, losses and gradients of the official code come out of the kernels too."""
    monkeypatch.setenv("MOTUS_ATTENTION", "triton")
    test_golden.test_training_step_equals_the_official_one(name)
    assert launched == ALL_KERNELS


@pytest.mark.long
def test_the_official_joint_sample_holds_with_the_kernels(launched, monkeypatch):
    """The whole Euler loop."""
    monkeypatch.setenv("MOTUS_ATTENTION", "triton")
    test_golden.test_joint_sample_equals_the_official_one("motus_finetune")
    assert "forward" in launched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_kernels_take_what_they_are_compiled_for_and_sdpa_the_rest(dtype, monkeypatch):
    """Head sizes 32, 64 and 128 in the two dtypes of `TILES`; not the toy's 16, the wide head of
    the video VAE, or biases of pairs."""
    monkeypatch.setenv("MOTUS_ATTENTION", "triton")
    taken, keys = set(), torch.zeros(1, 1, 1, 3, dtype=dtype)

    def attend(q, k, v, bias, scale=None):
        taken.add(q[0].shape[3])
        return q

    monkeypatch.setattr(flash, "attend", attend)
    for size in (16, 32, 48, 64, 80, 128, 160):
        x = torch.randn(1, 3, 1, size).to(dtype)
        for bias in (keys, keys.expand(1, 1, 3, 3)):
            found, pairs = eager.attention(x, x, x, bias), bias.shape[2] == 3
            assert (
                not pairs
                and size in taken
                or torch.equal(found, eager.sdpa_attention(x, x, x, bias))
            )
        eager.joint_attention([(x, x, x)], [None])
    assert taken == (set(eager.HEAD_SIZES) if dtype in flash.TILES else set())
    assert set(eager.DTYPES) == set(flash.TILES)


def test_rows_that_the_kernels_do_not_take_go_to_torch(launched, monkeypatch):
    """Wider than 4096, or in half precision."""
    monkeypatch.setenv("MOTUS_ATTENTION", "triton")
    torch.manual_seed(0)
    for x in (torch.randn(1, 1, 4104), torch.randn(1, 1, 8).half()):
        assert (
            torch.allclose(eager.add_gated(x, x, x), x.float() + x.float() * x, atol=1e-6)
            and not launched
        )
    eager.add_gated(torch.randn(1, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8))
    assert launched == {"add_gated"}


# -- bytes moved ----------------------------------------------------------------------------------


class Traffic:
    """Runs an operation and counts what the interpreter's programs load and store: bytes at
    distinct addresses (each crosses the memory bus once, if what is read again comes from the L2
    cache), and how often each element was read. Nothing may be stored twice."""

    def __init__(self, operation, *arguments):
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        load, store = Builder.create_masked_load, Builder.create_masked_store
        self.reads, self.written, self.bytes = Counter(), set(), 0

        def count_load(builder, pointers, mask, *rest):
            out = load(builder, pointers, mask, *rest)
            addresses = pointers.data[mask.data].tolist()
            self.bytes += len(set(addresses) - self.reads.keys()) * out.data.itemsize
            self.reads.update(addresses)
            return out

        def count_store(builder, pointers, value, mask, *rest):
            addresses = set(pointers.data[mask.data].tolist())
            assert not self.written & addresses
            self.written |= addresses
            self.bytes += len(addresses) * value.data.itemsize
            return store(builder, pointers, value, mask, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Builder, "create_masked_load", count_load)
            patch.setattr(Builder, "create_masked_store", count_store)
            outputs = operation(*arguments)
        self.outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]

    def times_read(self, x: Tensor) -> int:
        return max(n for a, n in self.reads.items() if x.data_ptr() <= a < x.data_ptr() + x.nbytes)


def size_of(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the accesses of the interpreter")
def test_attention_moves_each_byte_once_and_reads_keys_once_per_query_tile():
    """Bytes of a forward and a backward pass against inputs + outputs; the other side's tensors are
    read again once per tile."""
    q, k, v = (
        [x.detach().contiguous() for x in group]
        for group in segments((20, 5, 9), 1, 32, torch.bfloat16)
    )
    bias = torch.zeros(1, 9)
    forward = Traffic(flash.attention_op, q, k, v, [bias], "2", 0.2)
    *o, lse = forward.outputs
    assert forward.bytes <= 1.1 * size_of(*q, *k, *v, bias, *o, lse)
    assert (
        forward.times_read(q[1]) == 1
        and forward.times_read(k[1]) == forward.times_read(v[1]) == 2 + 1 + 1
    )  # tiles of the queries
    do = [torch.randn_like(x) for x in o]
    backward = Traffic(flash.attention_backward_op, do, q, k, v, [bias], "2", o, lse, 0.2)
    assert backward.bytes <= 1.1 * size_of(
        *do, *q, *k, *v, bias, *o, lse, *backward.outputs, lse
    )  # delta is as large as lse


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the accesses of the interpreter")
def test_row_kernels_move_at_most_a_tenth_more_than_they_must():
    """Every row is read once; the excess is the parts of gradients that sum over rows, written and
    read again by torch's sum."""

    def bf16(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    stream, y, z, mod, scale = (
        torch.randn(1, 64, 64),
        bf16(1, 64, 64),
        bf16(1, 64, 64),
        torch.randn(1, 1, 64),
        torch.randn(1, 1, 64),
    )
    weights, rope, heads = (
        (bf16(64), bf16(64)),
        (torch.randn(64, 8), torch.randn(64, 8)),
        (bf16(1, 64, 4, 16), bf16(1, 64, 4, 16)),
    )
    for operation, rows, shared, options, parts in (
        (row_kernels.norm_rotate_op, (y, z), (*weights, *rope), (1e-6, 16), 0),
        (row_kernels.norm_rotate_backward_op, (*heads, y, z), (*weights, *rope), (1e-6,), 2),
        (row_kernels.norm_modulate_op, (stream,), (mod, scale), (1e-6, torch.bfloat16), 0),
        (row_kernels.norm_modulate_backward_op, (y, stream), (scale,), (1e-6,), 2),
        (row_kernels.add_gated_op, (stream, y), (scale,), (), 0),
        (row_kernels.add_gated_backward_op, (stream, y), (scale,), (), 1),
    ):
        run = Traffic(operation, *rows, *shared, *options)
        reread = parts * 64 // row_kernels.ROWS * 64 * 4  # by the sum over the parts
        assert run.bytes + reread <= 1.1 * size_of(*rows, *shared, *run.outputs), operation
        assert all(run.times_read(x) == 1 for x in rows), operation


# -- ahead of time --------------------------------------------------------------------------------

ARCHITECTURES = (80, 86, 89, 90, 100)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that one block may use
HEADS = 24
SHIPPED = [
    (dtype, size) for dtype in eager.DTYPES for size in (*eager.HEAD_SIZES, None)
]  # attention; None: the row kernels
WIDTHS = (3072, 1024)  # of rows: the full model's video and action experts


def launches(
    dtype: torch.dtype, size: int | None, lengths: tuple[int, ...] = (360, 53, 130)
) -> list[tuple]:
    """What would be launched on a GPU: (name, kernel, arguments, options) of the attention at a
    head size, or of the row kernels (None) at each of WIDTHS."""
    calls = []

    def note(kernel, grid, device, *args, **options):
        calls.append((kernel, args, options))

    with pytest.MonkeyPatch.context() as patch:
        for module in (flash, row_kernels):
            patch.setattr(module, "launch", note)
        if size:
            q, k, v = (
                [torch.empty(1, n, HEADS, size, dtype=dtype) for n in lengths] for _ in range(3)
            )
            bias = [torch.empty(1, n) for n in lengths[1:]]
            *o, lse = flash.attention_op(q, k, v, bias, "12", size**-0.5)
            flash.attention_backward_op(o, q, k, v, bias, "12", o, lse, size**-0.5)
        for width in () if size else WIDTHS:
            stream, y, weight = (
                torch.empty(1, 360, width),
                torch.empty(1, 360, width, dtype=dtype),
                torch.empty(width, dtype=dtype),
            )
            mod, table = torch.empty(1, 1, 6, width).unbind(2), torch.empty(360, 64)
            heads = row_kernels.norm_rotate_op(y, y, weight, weight, table, table, 1e-6, 128)
            row_kernels.norm_rotate_backward_op(*heads, y, y, weight, weight, table, table, 1e-6)
            kernels.norm_modulate(stream, mod[0], mod[1], 1e-6, dtype)
            row_kernels.norm_modulate_backward_op(y, stream, mod[1], 1e-6)
            kernels.add_gated(stream, y, mod[2])
            row_kernels.add_gated_backward_op(stream, y, mod[2])

    def name(kernel, options: dict) -> str:
        shape = f"K={options['K']}" if "OWN" in options else f"D={options['WIDTH']}"
        return f"{kernel.fn.__name__.removesuffix('_kernel')} {shape}"

    return [(name(kernel, options), kernel, args, options) for kernel, args, options in calls]


class NoDevice:
    """Stands where Triton asks its driver for the GPU to compile for."""

    def __init__(self, sm: int):
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", sm, 32)
        self.get_current_device = lambda: sm  # one cache of compiled kernels per architecture
        self.get_current_stream = lambda device: 0


def compiled(kernel, args: tuple, options: dict, sm: int):
    """Compiles one launch for `sm` as Triton's launcher would, short of running it; finds what is
    compiled already."""
    import triton

    triton.runtime.driver.set_active(NoDevice(sm))
    return kernel.warmup(*args, grid=(1,), **options)


def figures(kernel, args: tuple, options: dict, sm: int) -> dict:
    """Reads the figures out of the machine code."""
    import triton

    out = compiled(kernel, args, options, sm)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(out.asm["cubin"])
        usage, code = (
            subprocess.run(
                [tools / tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    warps, stages = options["num_warps"], options["num_stages"]
    rows = (
        f"{options['OWN']}x{options['OTHER']}" if "OWN" in options else str(options.get("ROWS", 1))
    )
    return {
        "tile": f"{rows} w{warps} s{stages}",
        "registers": int(registers),
        "stack": int(stack),
        "spills": count(r"\b(?:LDL|STL)\b"),
        "shared": out.metadata.shared,
        "tensor core": count(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"),
        "async copies": count(r"\bLDGSTS\b"),
        "16-byte loads": count(r"\bLDG\.E\.128\b"),
        "instructions": count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/"),
    }


def table(only: str = "") -> dict[str, dict]:
    """Figures of every shipped configuration whose name contains `only`."""
    rows = {}
    for sm in ARCHITECTURES:
        for dtype, size in SHIPPED:
            for name, kernel, args, options in launches(dtype, size):
                key = f"sm_{sm} {str(dtype)[6:]} {name}"
                if only in key:
                    rows[key] = figures(kernel, args, options, sm)
                    print(key, rows[key], file=sys.stderr, flush=True)
    return rows


def written(rows: dict[str, dict]) -> str:
    """docs/kernels.md."""
    import triton

    columns = ["kernel", *next(iter(rows.values()))]
    lines = [
        columns,
        ["---"] * len(columns),
        *([key, *map(str, row.values())] for key, row in rows.items()),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# What the compiler makes of the kernels

`python tests/test_kernels.py` writes this page: what `attention.py` hands to `kernels/`, compiled
ahead of time by Triton {triton.__version__}, without a GPU (2-core AMD EPYC virtual machine,
2026-11-23). `make test-long` compiles all of it again and compares every figure. These are counts,
not speeds.

A configuration is a kernel, its tiles, a dtype, and a head size K or a row of width D. The
attention takes head sizes 32, 64 (`small`) and 128 (`full`) in bf16 and fp32, here with a bias on
two of three key segments; other sizes (the toy's 16, the one wide head of the video VAE), other
dtypes and biases of pairs of tokens (the frozen encoders) go to SDPA. The row kernels take rows up
to 4096 wide, here the full model's 3072 and 1024 with rotation; wider ones go to torch. fp32
products are three TF32 ones, nearly as exact.

Tile: rows of a program's own tile x rows of the tiles it walks through (or rows per program),
warps, stages. Registers per thread, at most 255. Stack bytes and spills (local loads and stores)
must be 0. Shared memory in bytes; a block may use {limits()}. The rest counts machine instructions:
on tensor cores (of 16, 64 or 128 rows: HMMA, HGMMA, UTCHMMA), asynchronous copies from global to
shared memory, loads of 16 bytes, and all.

Against the plain version, `pytest tests/test_kernels.py -m long` runs 200 random shapes in Triton's
interpreter in 134 s of one thread, a layer of the full model in 128 s, the official training steps,
sample and five modes through the kernels in 127 s, and offsets beyond 2^31 in 6 s; 24 more shapes
are in every run of the tests.

{table}
"""


def limits() -> str:
    return ", ".join(f"{kib} KiB on sm_{sm}" for sm, kib in SHARED_LIMIT.items())


def committed() -> dict[str, dict]:
    """The table of docs/kernels.md."""
    table = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    columns, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {
        line[0]: {c: int(x) if x.isdigit() else x for c, x in zip(columns[1:], line[1:])}
        for line in lines
    }


def check_figures(rows: dict[str, dict]) -> None:
    for key, row in rows.items():
        assert row["spills"] == row["stack"] == 0, f"{key} spills: {row}"
        assert row["shared"] <= 1024 * SHARED_LIMIT[int(re.match(r"sm_(\d+)", key)[1])], (
            f"{key} needs too much shared memory: {row}"
        )
        if "K=" in key:
            assert row["tensor core"] > 0 and row["async copies"] > 0, f"{key}: {row}"
        else:
            assert row["16-byte loads"] > 0, f"{key} loads narrowly: {row}"


def compile_in_another_process(tmp_path: Path, *arguments: str) -> dict[str, dict]:
    """Interpreted kernels cannot be compiled, so a fresh process does."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    run = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def agrees(found: dict[str, dict]) -> None:
    import triton

    check_figures(found)
    if (
        triton.__version__ in DOCS.read_text()
    ):  # another version of the compiler may count differently, but must not spill
        rows = committed()
        assert {key: rows[key] for key in found} == found


def test_committed_figures_show_no_spill_and_fit_every_card():
    """On five architectures and in both dtypes: three attention kernels at each head size that is
    taken, six row kernels at two widths."""
    rows = committed()
    shapes = {f"{name} K={size}" for name in flash.KERNELS for size in eager.HEAD_SIZES} | {
        f"{name} D={width}" for name in ALL_KERNELS - {*flash.KERNELS} for width in WIDTHS
    }
    assert rows.keys() == {
        f"sm_{sm} {str(dtype)[6:]} {shape}"
        for sm in ARCHITECTURES
        for dtype in flash.TILES
        for shape in shapes
    }
    check_figures(rows)


@pytest.mark.long
def test_a_kernel_compiles_to_the_committed_figures(tmp_path):
    """The forward kernel of the full model for sm_90, as a sample of the table."""
    agrees(compile_in_another_process(tmp_path, "sm_90 bfloat16 forward K=128"))


@pytest.mark.long
def test_other_lengths_run_the_same_compiled_kernel(tmp_path):
    """An instruction of another length must not stop a robot for a compilation."""
    assert compile_in_another_process(tmp_path, "lengths") == 1


@pytest.mark.long
def test_all_kernels_compile_to_the_committed_figures(tmp_path):
    """The whole table again."""
    found = compile_in_another_process(tmp_path, "")
    assert found.keys() == committed().keys()
    agrees(found)


if __name__ == "__main__":
    if sys.argv[1:] == [
        "lengths"
    ]:  # a test asks how many kernels are compiled for three sets of lengths
        forward = [
            launches(torch.bfloat16, 16, lengths)[0]
            for lengths in ((360, 53, 130), (368, 1, 16), (1, 0, 7))
        ]
        print(
            len({compiled(kernel, args, options, 80).hash for _, kernel, args, options in forward})
        )
    elif len(sys.argv) > 1:  # or for the rows whose name contains the argument
        print(json.dumps(table(sys.argv[1])))
    else:
        DOCS.write_text(written(table()))
