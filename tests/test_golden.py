"""The official code is the oracle: its outputs at tiny sizes, in fp32, must come out of ours.

Cases are found by file name in the folder named by MOTUS_GOLDEN (default tests/golden; its
README.md describes the files), so anyone can check this implementation against fixtures of their
own. Every size is read from the case's own json; foreign names go through weights/layouts.py,
which accounts for every key.
"""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import flow
from backbones.umt5 import UMT5Config, UMT5Encoder
from backbones.wan import WanConfig
from backbones.wan_vae import WanVAE, WanVAEConfig
from motus import Inputs, Motus, MotusConfig
from weights.files import open_source
from weights.layouts import MOTUS_BACK, rename_from, substitute
from weights.load import load_into

FOLDER = Path(os.environ.get("MOTUS_GOLDEN", Path(__file__).parent / "golden"))
MOTUS_SUFFIX = ".mp_rank_00_model_states.pt"
TOLERANCE = 1e-4


def cases(pattern: str, suffix: str) -> list[str]:
    return sorted(path.name.removesuffix(suffix) for path in FOLDER.glob(pattern))


def close(ours: torch.Tensor, stored: torch.Tensor) -> None:
    assert ours.shape == stored.shape
    assert (ours.detach().float() - stored).abs().max() <= TOLERANCE


def motus_case(name: str) -> tuple[dict, Motus, dict[str, torch.Tensor], Inputs]:
    size = json.loads((FOLDER / f"{name}.json").read_text())
    config = MotusConfig(
        video=WanConfig(
            width=size["video_width"],
            ffn=size["video_ffn"],
            layers=size["layers"],
            heads=size["heads"],
            latent=size["latent"],
            text_dim=size["text_dim"],
            text_len=size["text_len"],
        ),
        frames=size["frames"],
        ratio=size["ratio"],
        action_width=size["action_width"],
        action_dim=size["action_dim"],
        state_dim=size["state_dim"],
        action_eps=size["action_eps"],
        und_width=size["und_width"],
        und_eps=size["und_eps"],
        vlm_dim=size["vlm_dim"],
        finetune=size["mode"] == "finetune",
    )
    with torch.device("meta"):
        model = Motus(config)
    with open_source(FOLDER / f"{name}{MOTUS_SUFFIX}") as source:
        load_into(model, source, rename_from("motus"))
    stored = load_file(FOLDER / f"{name}.safetensors")
    lengths = torch.full((size["batch"],), stored["in/text"].shape[1])
    inputs = Inputs(
        stored["in/latents"],
        stored["in/text"],
        lengths,
        stored["in/vlm_hidden"],
        state=stored.get("in/state"),
        actions=stored["in/actions"],
    )
    return size, model, stored, inputs


def test_there_are_cases():
    """A folder without fixtures must not pass silently."""
    assert (
        cases(f"*{MOTUS_SUFFIX}", MOTUS_SUFFIX)
        or cases("*wan_vae.pth", ".pth")
        or cases("*umt5.pth", ".pth")
    )


@pytest.mark.parametrize("name", cases(f"*{MOTUS_SUFFIX}", MOTUS_SUFFIX))
def test_training_step_equals_the_official_one(name):
    """Velocities of the video and of all action tokens, both losses and the stored gradients."""
    _, model, stored, inputs = motus_case(name)
    table = flow.official_table()
    t_video, t_action = table[stored["in/video_index"]], table[stored["in/action_index"]]
    video_noise, action_noise = stored["in/video_noise"], stored["in/action_noise"]
    noisy_video = flow.keep_observation(
        flow.mix(inputs.latents, video_noise, t_video), inputs.latents[:, :, :1]
    )
    noisy_action = flow.mix(inputs.actions, action_noise, t_action)
    shared = model.conditioning(inputs)
    with patch.object(model.action, "actions_of", lambda tokens: tokens):
        time = model.embed_times(t_video, t_action)
        video, action = model(noisy_video, noisy_action, time, shared)
    close(video, stored["out/train_video_velocity"])
    close(action, stored["out/train_action_velocity_all_tokens"])

    losses = model.loss(
        inputs,
        t_video=t_video,
        t_action=t_action,
        video_noise=video_noise,
        action_noise=action_noise,
    )
    close(losses.video.mean(), stored["out/train_video_loss"])
    close(losses.action.mean(), stored["out/train_action_loss"])
    losses.total().backward()
    ours = {substitute(key, MOTUS_BACK): parameter for key, parameter in model.named_parameters()}
    gradients = [key for key in stored if key.startswith("out/grad/")]
    assert gradients
    for key in gradients:
        close(ours[key.removeprefix("out/grad/")].grad, stored[key])


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in cases(f"*{MOTUS_SUFFIX}", MOTUS_SUFFIX)
        if json.loads((FOLDER / f"{n}.json").read_text())["mode"] == "finetune"
    ],
)
def test_joint_sample_equals_the_official_one(name):
    """The whole Euler loop from the stored noises, actions and video."""
    size, model, stored, inputs = motus_case(name)
    sample = model.sample(
        inputs,
        "joint",
        size["steps"],
        video_noise=stored["in/video_noise"],
        action_noise=stored["in/action_noise"],
    )
    close(sample.actions, stored["out/sample_actions"])
    close(sample.video, stored["out/sample_latents"])


@pytest.mark.parametrize("name", cases("*wan_vae.pth", ".pth"))
def test_video_vae_equals_the_official_one(name):
    """Latents of a nine-frame clip, and the clip decoded from them."""
    size, stored = (
        json.loads((FOLDER / f"{name}.json").read_text()),
        load_file(FOLDER / f"{name}.safetensors"),
    )
    vae = WanVAE(
        WanVAEConfig(
            dim=size["dim"],
            dec_dim=size["dec_dim"],
            z_dim=size["z_dim"],
            dim_mult=tuple(size["dim_mult"]),
            num_res_blocks=size["num_res_blocks"],
            temporal_downsample=tuple(size["temperal_downsample"]),
            mean=tuple(stored["mean"].tolist()),
            std=tuple(stored["std"].tolist()),
        )
    )
    with open_source(FOLDER / f"{name}.pth") as source:
        load_into(vae, source)
    with torch.no_grad():
        close(vae.encode(stored["video"]), stored["latents"])
        close(vae.decode(stored["latents"], clamp=False), stored["decoded"])


@pytest.mark.parametrize("name", cases("*umt5.pth", ".pth"))
def test_text_encoder_equals_the_official_one(name):
    """Hidden states of a padded batch, zero where masked."""
    size, stored = (
        json.loads((FOLDER / f"{name}.json").read_text()),
        load_file(FOLDER / f"{name}.safetensors"),
    )
    assert not size["shared_pos"], "the official encoder has one position table per layer"
    model = UMT5Encoder(
        UMT5Config(
            vocab=size["vocab"],
            dim=size["dim"],
            dim_attn=size["dim_attn"],
            dim_ffn=size["dim_ffn"],
            heads=size["num_heads"],
            layers=size["num_layers"],
            buckets=size["num_buckets"],
        )
    )
    with open_source(FOLDER / f"{name}.pth") as source:
        load_into(model, source)
    with torch.no_grad():
        close(model(stored["ids"], stored["mask"].bool()), stored["hidden"])
