"""The video VAE against the official code (golden tensors) and diffusers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backbones.wan_vae import WanVAE, WanVAEConfig
from weights.layouts import rename_from

GOLDEN = Path(__file__).parent / "golden"


def small(
    dim: int, dec_dim: int, z: int, mult: tuple[int, ...], blocks: int, temporal: tuple[bool, ...]
) -> WanVAEConfig:
    mean, std = tuple(0.1 * i - 0.2 for i in range(z)), tuple(0.5 + 0.3 * i for i in range(z))
    return WanVAEConfig(dim, dec_dim, z, mult, blocks, temporal, mean, std)


TOY = small(8, 8, 4, (1, 2, 2), 1, (True, True))

# Two roundings of the same network are two random draws: their sizes agree to about a tenth, so
# bf16 is held to 1.2 of the oracle's.
ROUNDING = 1.2

# The published layout, three levels with odd latent sizes, and time halved at other levels; shapes
# are (B, F, H, W).
CONFIGS = [
    (small(8, 12, 4, (1, 2, 4, 4), 2, (False, True, True)), (1, 9, 32, 48)),
    (small(4, 6, 3, (1, 2, 2), 1, (True, True)), (2, 13, 24, 40)),
    (small(6, 8, 5, (1, 2, 2, 2), 1, (True, False, True)), (3, 5, 48, 16)),
]


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Redraws gains and biases away from one and zero, so that every term counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 or name.endswith("gamma"):
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


def oracle_of(config: WanVAEConfig) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=config.dim,
        decoder_base_dim=config.dec_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        attn_scales=[],
        temperal_downsample=list(config.temporal_downsample),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=list(config.mean),
        latents_std=list(config.std),
        scale_factor_temporal=4,
        scale_factor_spatial=2 ** len(config.dim_mult),
    )


def clip(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.float() - y.float()).abs().max() / y.float().abs().max()).item()


def rms(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x.float() - y.float()).square().mean().sqrt().item()


@torch.no_grad()
def test_vae_reproduces_the_official_code():
    """Latents and pictures of the official VAE come out of the official weights under their own
    names."""
    sizes = json.loads((GOLDEN / "wan_vae.json").read_text())
    golden = load_file(GOLDEN / "wan_vae.safetensors")
    model = WanVAE(
        WanVAEConfig(
            sizes["dim"],
            sizes["dec_dim"],
            sizes["z_dim"],
            tuple(sizes["dim_mult"]),
            sizes["num_res_blocks"],
            tuple(sizes["temperal_downsample"]),
            tuple(golden["mean"].tolist()),
            tuple(golden["std"].tolist()),
        )
    )
    model.load_state_dict(torch.load(GOLDEN / "wan_vae.pth", weights_only=True))
    assert error(model.encode(golden["video"]), golden["latents"]) < 1e-5
    assert error(model.decode(golden["latents"], clamp=False), golden["decoded"]) < 1e-5


@pytest.mark.parametrize("config, shape", CONFIGS)
@torch.no_grad()
def test_vae_equals_diffusers_in_fp32_and_rounds_no_worse_in_bf16(config, shape):
    """fp32 within 1e-5 of diffusers; in bf16 no further from its fp32 tensors than diffusers' own
    bf16 run."""
    oracle, ours = randomise(oracle_of(config)), WanVAE(config)
    ours.load_state_dict(
        {
            rename_from("wan-vae-diffusers", config.num_res_blocks)(name): weight
            for name, weight in oracle.state_dict().items()
        }
    )
    video = clip(*shape)
    posterior = oracle.encode(video).latent_dist
    mean, logvar = ours.posterior(video)
    assert error(mean, posterior.mean) < 1e-5 and error(logvar, posterior.logvar) < 1e-5
    statistics = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.mean, config.std))
    latents, latents_mean, latents_std = ours.encode(video), *statistics
    assert error(latents, (posterior.mean - latents_mean) / latents_std) < 1e-5
    pictures = oracle.decode(posterior.mean).sample
    assert (
        error(ours.decode(latents), pictures) < 1e-5 and (pictures.abs() < 1).float().mean() > 0.5
    )

    oracle, ours = oracle.bfloat16(), ours.bfloat16()
    rounded = oracle.encode(video.bfloat16()).latent_dist.mean
    assert rms(ours.posterior(video)[0], posterior.mean) < ROUNDING * rms(rounded, posterior.mean)
    assert rms(ours.decode(latents), pictures) < ROUNDING * rms(
        oracle.decode(posterior.mean.bfloat16()).sample, pictures
    )


@pytest.mark.parametrize("config", [CONFIGS[0][0], TOY])
@torch.no_grad()
def test_a_latent_frame_depends_on_no_later_picture(config):
    """Encoding frame 0 alone gives frame 0 of the nine-frame latents, and changing the last
    pictures changes only the last latent."""
    model, video = randomise(WanVAE(config)), clip(1, 9, 32, 32)
    latents = model.encode(video)
    assert error(model.encode(video[:, :, :1]), latents[:, :, :1]) < 1e-5
    video[:, :, 5:] = 0.3
    changed = (model.encode(video) - latents).abs().amax(dim=(0, 1, 3, 4))
    assert changed[:2].max() < 1e-5 and changed[2] > 1e-3


def test_training_path_is_differentiable_and_only_the_clamp_is_missing():
    """posterior -> decode(clamp=False) gives every parameter a gradient; decode alone clamps the
    same pictures to [-1, 1]."""
    torch.manual_seed(0)
    model, video = WanVAE(TOY), clip(1, 5, 16, 16)
    mean, logvar = model.posterior(video)
    latents = (mean + (logvar / 2).exp() * torch.randn_like(mean)) * 20
    pictures = model.decode(latents, clamp=False)
    (pictures.square().mean() + logvar.square().mean()).backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters()
    )
    assert pictures.abs().max() > 1 and torch.equal(model.decode(latents), pictures.clamp(-1, 1))


def test_full_size_has_the_published_parameters_names_and_statistics():
    """Wan2.2's VAE counts 704,688,668 parameters in 196 tensors, the translated diffusers names;
    strides 4 and 16; 48 means and stds."""
    config = WanVAEConfig()
    with torch.device("meta"):
        ours, oracle = WanVAE(config), oracle_of(config)
    shapes = {name: weight.shape for name, weight in ours.state_dict().items()}
    assert (sum(weight.numel() for weight in ours.parameters()), len(shapes), ours.stride) == (
        704_688_668,
        196,
        (4, 16),
    )
    assert {
        rename_from("wan-vae-diffusers")(name): weight.shape
        for name, weight in oracle.state_dict().items()
    } == shapes
    sums = [
        sum(config.mean),
        sum(x * x for x in config.mean),
        sum(config.std),
        sum(x * x for x in config.std),
    ]
    assert sums == pytest.approx([-0.5589, 1.782204, 32.5360, 25.829342], abs=1e-6)


def test_wrong_sizes_are_named():
    """Clips of other than 1 + 4n frames or of odd sizes, foreign latents and inconsistent
    configurations are refused by name."""
    model = WanVAE(TOY)
    for shape in ((1, 3, 4, 16, 16), (1, 3, 5, 16, 12), (1, 4, 5, 16, 16)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, 1 \+ 4n, 8h, 8w\)"):
            model.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="z_dim = 4"):
        model.decode(torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(ValueError, match="give one for each level but the last"):
        small(8, 8, 4, (1, 2), 1, (True, True))
    with pytest.raises(ValueError, match="give z_dim = 16 of each"):
        WanVAEConfig(z_dim=16)
