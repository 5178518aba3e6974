"""The joint attention and the leaves that every network shares, by numbers a reader can check, and
which implementation runs where."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import attention

HALF = torch.bfloat16


def heads(*lengths: int, size: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys and values (2, L, 3, size) of segments."""
    g = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(2, length, 3, size, generator=g) for _ in range(3)) for length in lengths
    ]


# -- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [attention.plain_attention, attention.sdpa_attention])
def test_attention_weighs_values_by_the_softmax_of_scaled_products(run):
    """One query of size 4 and two keys with logits 0 and log 3: weights 1/4 and 3/4."""
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    k = torch.zeros(1, 2, 1, 4)
    k[0, 1, 0, 0] = 2 * torch.tensor(3.0).log()  # the scale is 1 / sqrt(4)
    v = torch.tensor([[4.0] * 4, [8.0] * 4]).view(1, 2, 1, 4)
    torch.testing.assert_close(run(q, k, v), torch.full((1, 1, 1, 4), 7.0))
    bias = torch.tensor([3.0, 1.0]).log().view(1, 1, 1, 2)  # now both weigh the same
    torch.testing.assert_close(run(q, k, v, bias), torch.full((1, 1, 1, 4), 6.0))


def test_joint_attention_is_one_attention_over_all_segments():
    """Each segment gets its part of the attention over the joined sequence; a segment without
    queries is seen and gets nothing."""
    segments = heads(5, 3, 2)
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*segments))
    whole = attention.plain_attention(q, k, v).flatten(2)
    found = attention.joint_attention(segments, [None] * 3)
    assert [x.shape for x in found] == [(2, 5, 12), (2, 3, 12), (2, 2, 12)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole)
    silent = [*segments[:2], (segments[2][0][:, :0], *segments[2][1:])]
    found = attention.joint_attention(silent, [None] * 3)
    torch.testing.assert_close(torch.cat(found, dim=1), whole[:, :8])


def test_a_masked_key_is_seen_by_no_expert():
    """Whatever stands there, nothing changes; elsewhere everything does."""
    segments = heads(5, 3)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    biases = [None, attention.key_bias(mask)]
    assert biases[1].tolist() == [[0, 0, float("-inf")], [0, 0, 0]]
    q, k, v = segments[1]
    k, v = k.clone(), v.clone()
    k[:, 2] += 100
    v[:, 2] += 100
    before = attention.joint_attention(segments, biases)
    after = attention.joint_attention([segments[0], (q, k, v)], biases)
    for x, y in zip(before, after):
        torch.testing.assert_close(x[0], y[0])
        assert not torch.allclose(x[1], y[1], atol=1.0)


def test_one_padded_text_row_stands_for_all_of_them_exactly():
    """Texts of 3 and 6 rows among 40: attention to 7 rows with the bias is attention to all 40."""
    ((q, k, v),) = heads(40)
    lengths = torch.tensor([3, 6])
    padding = torch.arange(40)[None] >= lengths[:, None]
    k[padding], v[padding] = 0.7, -1.3  # all padded rows are the same key
    bias = attention.text_bias(lengths, 7, 40)[:, None, None]
    short = attention.plain_attention(q, k[:, :7], v[:, :7], bias)
    torch.testing.assert_close(short, attention.plain_attention(q, k, v))
    full = attention.text_bias(torch.tensor([4]), 4, 4)  # nothing is padded
    assert full.tolist() == [[0.0] * 4]


# -- norms, modulation, positions, linear maps ----------------------------------------------------


def test_rms_norm_casts_back_before_the_weight():
    """(3, 4) has rms sqrt(12.5); in bf16 the normed value is rounded, then multiplied."""
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0])
    normed = x / 12.5**0.5
    torch.testing.assert_close(attention.rms_norm(x, weight, 0.0), normed * weight)
    half = attention.rms_norm(x.to(HALF), weight.to(HALF), 0.0)
    assert torch.equal(half, normed.to(HALF) * weight.to(HALF))


def test_layer_norm_runs_in_fp32_whatever_its_weights():
    """bf16 in and out, weights of bf16, the statistics of fp32."""
    norm = attention.LayerNorm(8).to(HALF)
    x = torch.randn(3, 8).to(HALF)
    expected = nn.functional.layer_norm(x.float(), (8,)).to(HALF)
    assert torch.equal(norm(x), expected)


def test_modulation_shifts_and_scales_the_norm_and_gates_the_residual():
    """(-1, 1) is its own norm: shift 3 and scale 1 give (1, 5); a gate of 0.5 adds half."""
    x, one = torch.tensor([[[-1.0, 1.0]]]), torch.ones(1, 1, 2)
    found = attention.norm_modulate(x, 3 * one, one, 0.0)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 5.0]]]))
    assert attention.norm_modulate(x, one, one, 0.0, HALF).dtype == HALF
    half = torch.randn(1, 3, 8).to(HALF)
    shift, scale = torch.randn(2, 1, 1, 8)
    norm = attention.LayerNorm(8, 1e-6, elementwise_affine=False)  # in fp32, rounded, as official
    expected = torch.addcmul(shift, norm(half).float(), 1 + scale)
    assert torch.equal(attention.norm_modulate(half, shift, scale, 1e-6), expected)
    found = attention.add_gated(x.to(HALF), 4 * one.to(HALF), 0.5 * one)
    assert found.dtype == torch.float32 and found.tolist() == [[[1.0, 3.0]]]


def test_rotation_turns_neighbouring_pairs_by_their_angle():
    """A quarter turn takes (1, 0) to (0, 1); the products of rotated queries and keys depend on the
    difference of their positions alone."""
    turn = torch.tensor([[torch.pi / 2, 0.0]])
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
    found = attention.rotate_interleaved(x, turn.cos(), turn.sin())
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    angle = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1]))
    q, k = torch.randn(2, 1, 1, 1, 4).expand(2, 1, 6, 1, 4)
    q, k = (attention.rotate_interleaved(x, angle.cos(), angle.sin())[0, :, 0] for x in (q, k))
    torch.testing.assert_close((q @ k.T)[1:, 1:], (q @ k.T)[:-1, :-1])


def test_linear_maps_run_in_the_dtype_of_their_weights_or_in_fp32():
    """An fp32 stream meets bf16 weights; `LinearFP32` ignores autocast."""
    x = torch.randn(2, 4)
    assert attention.Linear(4, 4).to(HALF)(x).dtype == HALF
    wide = attention.LinearFP32(4, 4).to(HALF)
    with torch.autocast("cpu", dtype=HALF):
        found = wide(x)
    expected = nn.functional.linear(x, wide.weight.float(), wide.bias.float())
    assert torch.equal(found, expected)


def test_an_mlp_has_its_linear_maps_at_even_indices():
    """Names in the state dicts of published weights hang on it."""
    net = attention.mlp(2, 3, 4, 5, act=nn.GELU, approximate="tanh")
    assert [type(part) for part in net[::2]] == [attention.Linear] * 3
    assert [(part.in_features, part.out_features) for part in net[::2]] == [(2, 3), (3, 4), (4, 5)]
    attention.xavier(net)
    assert all(part.bias.abs().max() == 0 for part in net[::2])


# -- which implementation runs --------------------------------------------------------------------


def test_choice_says_why_and_the_environment_overrules_it(monkeypatch):
    """SDPA where there is no CUDA, whatever MOTUS_ATTENTION says if it is set, and a plain refusal
    of other names."""
    monkeypatch.delenv("MOTUS_ATTENTION", raising=False)
    assert attention.choose("cpu") == ("sdpa", "the device is cpu, not cuda")
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    for sm, chosen in ((90, "triton"), (75, "sdpa")):
        monkeypatch.setattr(attention, "capability", lambda device, sm=sm: sm)
        assert attention.choose("cuda")[0] == chosen and f"sm_{sm}" in attention.choose("cuda")[1]
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    assert attention.choose("cuda") == ("sdpa", "Triton is not installed")
    monkeypatch.setenv("MOTUS_ATTENTION", "plain")
    assert attention.choose("cuda")[0] == "plain"
    monkeypatch.setenv("MOTUS_ATTENTION", "fast")
    with pytest.raises(ValueError, match="'fast'; expected one of plain, sdpa, triton"):
        attention.choose("cpu")


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """Calls of kernels, which stand in for Triton's: (name, arguments, options)."""
    calls = []

    def kernel(name):
        return lambda *arguments, **options: calls.append((name, arguments, options))

    names = ("joint_attention", "attention", "norm_modulate", "add_gated", "norm_rotate")
    stub = SimpleNamespace(**{name: kernel(name) for name in names})
    monkeypatch.setitem(sys.modules, "kernels", stub)
    monkeypatch.setenv("MOTUS_ATTENTION", "triton")
    return calls


def test_five_functions_hand_over_to_the_kernels_of_their_names(asked):
    """With the arguments they were given."""
    ((q, k, v),) = heads(2, size=32)
    x, weight = torch.randn(1, 2, 32), torch.ones(32)
    attention.joint_attention([(q, k, v)], [None])
    attention.attention(q, k, v, scale=1.0)
    attention.norm_modulate(x, x, x, 1e-6, HALF)
    attention.add_gated(x, x, x)
    attention.norm_rotate(x, x, weight, weight, 1e-6, 16)
    names = ["joint_attention", "attention", "norm_modulate", "add_gated", "norm_rotate"]
    assert [name for name, _, _ in asked] == names
    assert asked[1][1][0] is q and asked[1][2] == {"scale": 1.0}
    assert asked[4][1][4:] == (1e-6, 16)


def test_what_the_kernels_do_not_take_goes_to_torch(asked):
    """Heads of other sizes, half precision, biases of pairs, rows wider than 4096."""
    for size, dtype in ((16, torch.float32), (160, torch.float32), (64, torch.float16)):
        q, k, v = (x.to(dtype) for x in heads(2, size=size)[0])
        found = attention.attention(q, k, v)
        assert torch.equal(found, attention.sdpa_attention(q, k, v))
        attention.joint_attention([(q, k, v)], [None])
    ((q, k, v),) = heads(2, size=64)
    attention.attention(q, k, v, torch.zeros(2, 1, 2, 2))
    x = torch.randn(1, 1, attention.WIDEST + 8)
    torch.testing.assert_close(attention.add_gated(x, x, x), x + x * x)
    assert not asked
