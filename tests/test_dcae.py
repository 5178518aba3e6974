"""DC-AE against diffusers, its two published formats, and what makes four tokens of a picture."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tables import expected
from torch import nn

from backbones.dcae import DCAE, DCAEConfig, LinearAttention
from weights.files import open_source, save_safetensors
from weights.layouts import canonical, rename_from
from weights.load import load_into

dcae_own = rename_from("dcae")
FULL = DCAEConfig()
TINY = DCAEConfig((16, 32, 32, 64, 64), (1,) * 5, (1,) * 5, latent_channels=64, head_dim=16)
THIN = DCAEConfig(
    widths=(16, 16, 32, 32, 64, 128, 512),
    encoder_depths=(1,) * 7,
    decoder_depths=(1, 2, 1, 1, 1, 1, 1),
    latent_channels=512,
    head_dim=8,
)
SAME_NAMES = dataclasses.replace(
    FULL, widths=(8,) * 7, latent_channels=8, head_dim=8
)  # as deep as the published one


def diffusers_model(config: DCAEConfig) -> nn.Module:
    """AutoencoderDC of the same sizes, with norms away from their initial 1 and 0, in eval mode."""
    diffusers = pytest.importorskip("diffusers")
    stages, convs = len(config.widths) + 1, config.conv_stages + 1
    kinds = ("ResBlock",) * convs + ("EfficientViTBlock",) * (stages - convs)
    widths, plain = (config.widths[0], *config.widths), ((),) * stages
    model = diffusers.AutoencoderDC(
        latent_channels=config.latent_channels,
        attention_head_dim=config.head_dim,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, *config.encoder_depths),
        decoder_layers_per_block=(0, *config.decoder_depths),
        encoder_qkv_multiscales=plain,
        decoder_qkv_multiscales=plain,
        decoder_norm_types=["batch_norm"] * convs + ["rms_norm"] * (stages - convs),
        decoder_act_fns=["relu"] * convs + ["silu"] * (stages - convs),
    )
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point() and not value.is_meta:
            value.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def loaded(path: Path, config: DCAEConfig) -> DCAE:
    """A DC-AE of a published file."""
    model = DCAE(config)
    with open_source(path) as source:
        load_into(model, dataclasses.replace(source, tensors=canonical(source.tensors)))
    return model


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@torch.no_grad()
def differences(ours, theirs, size):
    """Largest differences of latent and picture, relative to the largest value."""
    pictures = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    latent = theirs.encode(pictures).latent
    picture = theirs.decode(latent).sample
    return ((ours.encode(pictures) - latent).abs().max() / latent.abs().max()).item(), (
        (ours.decode(latent) - picture).abs().max() / picture.abs().max()
    ).item()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("config, size", [(TINY, (64, 64)), (TINY, (96, 160)), (THIN, (256, 256))])
def test_latents_and_pictures_equal_diffusers(config, size, train):
    """Both directions agree to 1e-5 of the scale, in eval and train mode, at sizes where both forms
    of attention run."""
    theirs, ours = diffusers_model(config), DCAE(config)
    ours.load_state_dict(canonical(theirs.state_dict()))
    theirs.train(train), ours.train(train)
    positions = [
        size[0] * size[1] // 4**stage
        for stage in range(config.conv_stages + 1, len(config.widths) + 1)
    ]
    assert min(positions) <= config.head_dim < max(positions)
    assert max(differences(ours, theirs, size)) < 1e-5
    after = canonical(
        theirs.state_dict()
    )  # train mode has moved the batch statistics, and equally so
    assert all(
        torch.allclose(value, after[name], rtol=1e-4, atol=1e-6)
        for name, value in ours.named_buffers()
    )


def test_the_full_model_makes_four_tokens_of_512():
    """1,120,682,252 parameters; a 256 x 256 picture becomes 2 x 2 x 512 and comes back (shapes
    only, no memory)."""
    with torch.device("meta"):
        model = DCAE(FULL)
        latent = model.encode(torch.empty(1, 3, 256, 256))
        assert latent.shape == (1, 512, 2, 2) and model.decode(latent).shape == (1, 3, 256, 256)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_120_682_252


def test_the_tiny_model_makes_four_tokens_too():
    """64 x 64 becomes 2 x 2 tokens and comes back; sides that do not divide are refused."""
    model = DCAE(TINY).eval()
    with torch.no_grad():
        latent = model.encode(torch.zeros(1, 3, 64, 64))
        assert latent.shape == (1, 64, 2, 2) and model.decode(latent).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        model.encode(torch.zeros(1, 3, 64, 80))


def test_tables_list_exactly_what_each_format_holds():
    """The diffusers table is AutoencoderDC's state dict; diffusers' own converter turns the
    original table into it."""
    with torch.device("meta"):
        theirs, ours = diffusers_model(FULL), DCAE(FULL)
        files = {
            form: {name: torch.empty(shape) for name, shape in expected(f"dcae_{form}").items()}
            for form in ("original", "diffusers")
        }
    assert {form: len(tensors) for form, tensors in files.items()} == {
        "original": 434,
        "diffusers": 474,
    }
    assert expected("dcae_diffusers") == shapes_of(theirs)
    for tensors in files.values():
        assert {
            name: tuple(value.shape) for name, value in canonical(tensors).items()
        } == shapes_of(ours)
    convert = pytest.importorskip(
        "diffusers.loaders.single_file_utils"
    ).convert_autoencoder_dc_checkpoint_to_diffusers
    assert {
        name: tuple(value.shape) for name, value in convert(dict(files["original"])).items()
    } == expected("dcae_diffusers")


def test_both_formats_load_from_files_to_the_same_model(tmp_path):
    """434 original tensors and the 474 that diffusers makes of them fill every parameter with the
    same values."""
    convert = pytest.importorskip(
        "diffusers.loaders.single_file_utils"
    ).convert_autoencoder_dc_checkpoint_to_diffusers
    torch.manual_seed(0)
    model = DCAE(SAME_NAMES)
    ours, original = model.state_dict(), {}
    for name in expected("dcae_original"):
        key = dcae_own(name)
        qkv = (
            [ours[key.replace("qkv", f"to_{part}")] for part in "qkv"]
            if key.endswith("qkv.weight")
            else None
        )
        original[name] = torch.cat(qkv) if qkv else ours[key]
    for form, tensors in {"original": original, "diffusers": convert(dict(original))}.items():
        save_safetensors(
            tmp_path / f"{form}.safetensors",
            {name: value.contiguous() for name, value in tensors.items()},
        )
        found = loaded(tmp_path / f"{form}.safetensors", SAME_NAMES).state_dict()
        assert found.keys() == ours.keys()
        assert all(torch.equal(value, found[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "lost", ["encoder.down_blocks.3.0.attn.to_k.weight", "decoder.norm_out.bias"]
)
def test_a_file_that_lacks_a_tensor_is_refused(tmp_path, lost):
    """Nothing keeps random values silently, not even a third of a qkv."""
    tensors = {
        name: value.contiguous()
        for name, value in diffusers_model(TINY).state_dict().items()
        if name != lost
    }
    save_safetensors(tmp_path / "short.safetensors", tensors)
    with pytest.raises(ValueError, match=dcae_own(lost).replace(".", r"\.")):
        loaded(tmp_path / "short.safetensors", TINY)


def test_attention_equals_the_one_that_weighs_every_pair_of_positions():
    """Summing over positions before the query enters gives what the weights of all pairs give, each
    divided by their sum."""
    torch.manual_seed(0)
    attention = LinearAttention(channels=64, head_dim=32)
    x = torch.randn(2, 64, 6, 5)
    mixed = torch.cat([attention.to_q(x), attention.to_k(x), attention.to_v(x)], dim=1)
    q, k, v = mixed.reshape(2, 2, 3, 32, 30).unbind(dim=2)  # (B, N, K, L), two groups
    weights = q.relu().mT @ k.relu()  # (B, N, L queries, L keys)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    values = (v @ weights.mT).reshape(2, 64, 6, 5)
    expected_out = x + attention.norm_out(attention.to_out(values))
    assert torch.allclose(attention(x), expected_out, atol=1e-5)


def test_gradients_pass_through_a_frozen_decoder_and_leave_it_alone():
    """In eval mode the decoded picture teaches what is before the decoder, and the batch statistics
    stay."""
    model = DCAE(TINY).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_buffers()}
    latent = torch.randn(1, 64, 2, 2, requires_grad=True)
    model.decode(latent).square().mean().backward()
    assert latent.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_impossible_sizes_are_refused_by_name():
    """Each constraint of the shortcuts and of the heads is an error that names the field."""
    for change, message in (
        ({"latent_channels": 48}, "latent_channels=48"),
        ({"head_dim": 24}, "head_dim=24"),
        ({"encoder_depths": (1,) * 4}, "4 encoder_depths"),
        ({"widths": (16, 80, 32, 64, 64)}, "widths: 16 -> 80"),
    ):
        with pytest.raises(ValueError, match=message):
            DCAE(dataclasses.replace(TINY, **change))
