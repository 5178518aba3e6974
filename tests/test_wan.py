"""The video transformer against diffusers' WanTransformer3DModel, weights renamed by the loader's
own table."""

from dataclasses import replace

import pytest
import torch

from backbones.wan import WanConfig, WanModel
from weights.layouts import rename_from

CONFIGS = [
    WanConfig(width=48, ffn=80, layers=2, heads=2, latent=4, text_dim=20, text_len=12, freq_dim=32),
    WanConfig(width=96, ffn=72, layers=3, heads=3, latent=6, text_dim=16, text_len=7, freq_dim=64),
    WanConfig(
        width=128,
        ffn=160,
        layers=1,
        heads=1,
        latent=8,
        text_dim=24,
        text_len=9,
        freq_dim=16,
        eps=1e-5,
    ),
]
GRIDS = [(3, 4, 6), (1, 6, 2), (2, 10, 4)]


def pair(config: WanConfig, seed: int) -> tuple[WanModel, torch.nn.Module]:
    """Ours and the oracle with the same random weights, away from zero."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    oracle = diffusers.WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent,
        out_channels=config.latent,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
        rope_max_seq_len=32,
    ).eval()
    for parameter in oracle.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours = WanModel(config).eval()
    state = {
        rename_from("wan-diffusers")(name): tensor for name, tensor in oracle.state_dict().items()
    }
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    return ours, oracle


def example(
    config: WanConfig, grid: tuple[int, int, int], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, times in [0, 1], texts of unequal lengths, padded with zeros to text_len."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([config.text_len, config.text_len // 2])
    text = torch.randn(2, config.text_len, config.text_dim, generator=g)
    text[1, lengths[1] :] = 0
    return (
        torch.randn(2, config.latent, *grid, generator=g),
        torch.rand(2, generator=g),
        text,
        lengths,
    )


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", range(3))
@torch.no_grad()
def test_velocity_equals_diffusers_with_padded_texts(case):
    """Other head counts and odd grids; the oracle attends to every zero row, ours to one that
    stands for all of them."""
    config = CONFIGS[case]
    ours, oracle = pair(config, case)
    latents, t, text, lengths = example(config, GRIDS[case], case)
    expected = oracle(latents, 1000 * t, text, return_dict=False)[0]
    found = ours(latents, t, text[:, : int(lengths.max())], lengths)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_time_per_token_equals_diffusers():
    """Wan's own sampler labels the tokens of the observation with t = 0."""
    config, grid = CONFIGS[0], GRIDS[0]
    ours, oracle = pair(config, 5)
    latents, t, text, lengths = example(config, grid, 5)
    per_token = t[:, None].repeat(1, grid[0] * grid[1] * grid[2] // 4)
    per_token[:, : grid[1] * grid[2] // 4] = 0
    expected = oracle(latents, 1000 * per_token, text, return_dict=False)[0]
    assert (
        ours(latents, per_token, text, lengths) - expected
    ).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", range(3))
@torch.no_grad()
def test_bf16_stays_within_the_rounding_of_the_oracle(case):
    """Our bf16 run is as near to the fp32 oracle as the oracle's own bf16 run, or nearer."""
    config = CONFIGS[case]
    ours, oracle = pair(config, case)
    latents, t, text, lengths = example(config, GRIDS[case], case)
    exact = oracle(latents, 1000 * t, text, return_dict=False)[0]
    half = oracle.to(torch.bfloat16)(
        latents.bfloat16(), 1000 * t, text.bfloat16(), return_dict=False
    )[0]
    found = ours.to(torch.bfloat16)(latents, t, text, lengths)
    assert found.dtype == torch.float32
    assert error(found, exact) <= 1.2 * error(half, exact)


def test_impossible_head_counts_are_refused():
    """The error names both numbers."""
    with pytest.raises(ValueError, match="width 48 .* heads 5"):
        replace(CONFIGS[0], heads=5)
