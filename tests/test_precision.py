"""What is computed in fp32 whatever the weights are and whatever autocast says, against fp64 at the
width of the full model, through every implementation: norms, modulation, gates, rotation, time
paths, the video head, logits and softmax. The rest may be rounded to bf16."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attention
from backbones.wan import WanHead, embed_time, frequencies, modulations, rope_3d
from kernels.attention import INTERPRET
from motus import ActionExpert, preset

FULL = preset("full")
WIDTH, SIZE, HEADS = FULL.video.width, FULL.video.head_dim, FULL.video.heads
HALF = torch.bfloat16
WAYS = [(name, cast) for name in attention.IMPLEMENTATIONS for cast in (False, True)]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}{'-autocast' if way[1] else ''}")
def way(request, monkeypatch):
    """An implementation, under autocast or not."""
    name, cast = request.param
    if name == "triton":
        pytest.importorskip("triton")
        if not INTERPRET:
            pytest.skip("all here is on the CPU; test_kernels.py runs kernels on a GPU")
    monkeypatch.setenv("MOTUS_ATTENTION", name)
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=cast):
        yield name


@contextmanager
def exactly():
    """For the fp64 side."""
    with torch.autocast("cpu", enabled=False):
        yield


def error(found: Tensor, true: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found.double() - true).abs().max() / true.abs().max()).item()


def normed(x: Tensor, eps: float) -> Tensor:
    return x.double() * torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + eps)


def wrong(found: Tensor, true: Tensor, dtype: torch.dtype) -> float:
    """In fp32 the largest error of the scale of a row; in bf16 the share of the numbers that are
    not what the true ones round to."""
    if dtype == HALF:
        return (found.to(HALF) != true.to(HALF)).double().mean().item()
    found = found.double()
    return ((found * true).sum(dim=-1) / true.square().sum(dim=-1) - 1).abs().max().item()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (HALF, 1e-3)])
def test_the_scale_of_a_row_that_is_normed_is_fp32(way, dtype, limit):
    """RMSNorm, as a module and before the rotation, and layer norm, of either dtype: with a mean
    square in bf16 the scale is off by 5e-3, and one number in four or more is another."""
    x = torch.randn(2, 5, WIDTH).to(dtype)
    weight = torch.ones(WIDTH)
    assert wrong(attention.RMSNorm(WIDTH, 1e-6)(x), normed(x, 1e-6), dtype) < limit
    for found in attention.norm_rotate(x, x, weight, weight, 1e-6, SIZE):
        cut = way == "triton" and dtype == HALF  # off bf16, by its interpreter; a GPU rounds
        assert cut or wrong(found.flatten(2), normed(x, 1e-6), dtype) < limit
    wide = x.double() - x.double().mean(dim=-1, keepdim=True)
    for norm in (attention.LayerNorm(WIDTH, 1e-6), attention.LayerNorm(WIDTH, 1e-6, False)):
        assert wrong(norm(x), normed(wide, 1e-6), dtype) < limit


def test_rotation_modulation_and_gates_are_fp32(way):
    """Of the leaves whose inputs are fp32 nothing is rounded to bf16."""
    grid = (1, 2, 3)
    x, y = torch.randn(2, 2, 6, WIDTH)
    shift, scale, gate = torch.randn(3, 2, 1, WIDTH)
    weight = torch.randn(WIDTH)
    rope = rope_3d(grid, SIZE)
    found, _ = attention.norm_rotate(x, x, weight, weight, 1e-6, SIZE, rope)
    heads = (normed(x, 1e-6) * weight.double()).unflatten(2, (HEADS, SIZE // 2, 2))
    phase = torch.polar(torch.ones(6, SIZE // 2).double(), angles(grid))[:, None]
    turned = torch.view_as_real(torch.view_as_complex(heads) * phase).flatten(3)
    assert error(found, turned) < 1e-5

    found = attention.norm_modulate(x, shift, scale, 1e-6)
    true = F.layer_norm(x.double(), (WIDTH,), eps=1e-6) * (1 + scale.double()) + shift.double()
    assert found.dtype == torch.float32 and error(found, true) < 1e-5
    found = attention.add_gated(x, y, gate)
    true = x.double() + y.double() * gate.double()
    assert found.dtype == torch.float32 and error(found, true) < 1e-6


def angles(grid: tuple[int, int, int]) -> Tensor:
    """In fp64, (L, K/2): 22, 21 and 21 pairs of a head turn with t, h and w."""
    places = torch.cartesian_prod(*(torch.arange(n).double() for n in grid))
    side = SIZE // 6
    pairs = (SIZE // 2 - 2 * side, side, side)
    turns = [torch.outer(places[:, i], frequencies(n)) for i, n in enumerate(pairs)]
    return torch.cat(turns, dim=1)


def in_fp64(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        linear = isinstance(layer, nn.Linear)
        x = F.linear(x, layer.weight.double(), layer.bias.double()) if linear else layer(x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_time_paths_modulation_tables_and_the_video_head_are_fp32(way, dtype):
    """Also with bf16 weights: these are read as they are and multiplied in fp32."""
    with torch.device("meta"):
        expert = ActionExpert(FULL)
        head = WanHead(FULL.video)
    expert.blocks = nn.ModuleList()
    expert, head = expert.to_empty(device="cpu"), head.to_empty(device="cpu")
    for p in [*expert.parameters(), *head.parameters()]:
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    expert, head = expert.to(dtype), head.to(dtype)
    t = torch.tensor([0.731, 0.02])
    e, e0 = embed_time(expert, t)
    turn = 1000 * t.double()[:, None, None] * frequencies(FULL.video.freq_dim // 2)
    with exactly():
        true = in_fp64(expert.time_embedding, torch.cat([turn.cos(), turn.sin()], dim=-1))
        true0 = in_fp64(expert.time_projection, true).unflatten(2, (6, -1))
    assert e.dtype == e0.dtype == torch.float32
    assert error(e, true) < 1e-5 and error(e0, true0) < 1e-5

    (mod,) = modulations(expert.decoder.modulation, e.unsqueeze(2))
    assert error(mod.scale, expert.decoder.modulation[:, 1].double() + true) < 1e-5

    x, now = torch.randn(2, 5, WIDTH), torch.randn(2, 1, WIDTH)
    found = head(x, now)
    shift, scale = (head.modulation.double() + now.double()).unsqueeze(2).unbind(dim=1)
    with exactly():
        wide = F.layer_norm(x.double(), (WIDTH,), eps=1e-6) * (1 + scale) + shift
        true = in_fp64([head.head], wide)
    assert found.dtype == torch.float32 and error(found, true) < 1e-5


def test_logits_and_softmax_are_fp32_and_padded_rows_count_exactly(way):
    """Values of bf16, as under autocast: only they and what comes out are rounded. The row that
    stands for 492 padded rows weighs as much as they do, although a bias of SDPA is bf16."""
    q, k, v = (4 * torch.randn(2, 20, HEADS, SIZE) for _ in range(3))
    q, k, v = q.to(HALF), k.to(HALF), v.to(HALF)
    bias = attention.text_bias(torch.tensor([19, 3]), 20, 512)[:, None, None]
    found = attention.attention(q, k, v, bias)
    with exactly():
        logits = torch.einsum("bqnk,bsnk->bnqs", q.double(), k.double()) * SIZE**-0.5
        weights = (logits + bias.double()).softmax(dim=-1)
        true = torch.einsum("bnqs,bsnk->bqnk", weights, v.double())
    assert found.dtype == HALF and error(found, true) < 2**-7  # a rounded logit: 2**-5
    for pad, length in zip(bias[:, 0, 0].to(HALF).double().exp(), (19, 3)):
        assert math.isclose(pad[length] / pad[0], 512 - length, rel_tol=2e-4)


def test_fp32_is_no_tf32():
    """On a GPU neither products nor convolutions in fp32 are rounded to ten bits: caches that a GPU
    makes are those that a CPU makes."""
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
