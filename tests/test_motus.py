"""The network: sizes, masks, cached work, precision."""

from dataclasses import replace

import pytest
import torch

import motus
from backbones.wan import WanConfig
from flow import Losses
from motus import Inputs, Motus, MotusConfig, preset

TINY = MotusConfig(
    video=WanConfig(
        width=32, ffn=48, layers=2, heads=2, latent=4, text_dim=12, text_len=10, freq_dim=16
    ),
    frames=4,
    ratio=2,
    action_width=16,
    action_dim=3,
    state_dim=5,
    und_width=16,
    vlm_dim=8,
)


def model_of(config: MotusConfig = TINY, seed: int = 0) -> Motus:
    torch.manual_seed(seed)
    model = Motus(config).init_weights()
    for parameter in model.parameters():  # away from zero, so that every term counts
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs_of(
    config: MotusConfig = TINY, batch: int = 2, und: int = 5, text: int = 4, seed: int = 1
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.randn(batch, config.video.latent, config.latent_frames, 4, 4, generator=g),
        torch.randn(batch, text, config.video.text_dim, generator=g),
        torch.full((batch,), text),
        torch.randn(batch, und, config.vlm_dim, generator=g),
        torch.ones(batch, und, dtype=torch.bool),
        torch.randn(batch, config.state_dim, generator=g) if config.finetune else None,
        torch.randn(batch, config.chunk, config.action_dim, generator=g),
        torch.ones(batch, config.chunk, config.action_dim, dtype=torch.bool),
    )


def velocity(model: Motus, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.full((len(inputs),), 0.6)
    with torch.no_grad():
        return model(
            inputs.latents,
            inputs.actions,
            model.embed_times(t, 0.5 * t),
            model.conditioning(inputs),
        )


def test_full_size_has_the_published_parameter_counts():
    """5.00 B, 641.5 M and 253.5 M, to the last parameter, on the meta device."""
    with torch.device("meta"):
        model = Motus(preset("full"))

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert (count(model.video), count(model.action), count(model.und)) == (
        4_999_787_712,
        641_527_822,
        253_493_760,
    )
    assert (
        count(model) == 4_999_787_712 + 641_527_822 + 253_493_760
    )  # no parameter is counted twice


def test_layers_only_line_up_blocks_that_the_experts_own():
    """The state dict names every tensor once, by its expert."""
    names = list(model_of().state_dict())
    assert len(names) == len(set(names)) and {n.split(".")[0] for n in names} == {
        "video",
        "action",
        "und",
    }


def test_padded_understanding_tokens_change_nothing():
    """A batch padded on the right gives what each sample gives alone."""
    model, inputs = model_of(), inputs_of(batch=2)
    inputs.und_mask[1, 3:] = False
    both = velocity(model, inputs)
    alone = inputs.rows(torch.tensor([1]))
    alone = replace(alone, und=alone.und[:, :3], und_mask=alone.und_mask[:, :3])
    for a, b in zip(both, velocity(model, alone)):
        torch.testing.assert_close(a[1:], b, atol=1e-5, rtol=1e-5)


def test_padded_text_rows_collapse_into_one_key_exactly():
    """Padding the text to its official length with zeros, as the official code does, gives the same
    velocities."""
    model, inputs = model_of(), inputs_of()
    padded = torch.cat(
        [inputs.context, torch.zeros(2, TINY.video.text_len - 4, TINY.video.text_dim)], dim=1
    )
    official = model.video.text_embedding(padded)
    plain = motus.TextStates(official, torch.zeros(1, 1, 1, TINY.video.text_len))
    shared = model.conditioning(inputs)
    t = torch.full((2,), 0.6)
    with torch.no_grad():
        ours = model(inputs.latents, inputs.actions, model.embed_times(t, t), shared)
        theirs = model(
            inputs.latents,
            inputs.actions,
            model.embed_times(t, t),
            shared._replace(text=[plain] * 2),
        )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_padded_actions_are_no_keys_and_carry_no_loss():
    """Whatever stands in padded actions, the video velocity and the loss stay the same."""
    model, inputs = model_of(), inputs_of()
    inputs.action_mask[:, 5:] = False
    other = replace(inputs, actions=inputs.actions.clone())
    other.actions[:, 5:] += 100
    noise = dict(
        t_video=torch.full((2,), 0.7),
        t_action=torch.full((2,), 0.4),
        video_noise=torch.randn_like(inputs.latents),
        action_noise=torch.randn_like(inputs.actions),
    )
    a, b = model.loss(inputs, **noise), model.loss(other, **noise)
    torch.testing.assert_close(a.video, b.video)
    torch.testing.assert_close(a.action, b.action)
    assert not torch.allclose(
        a.action, model.loss(replace(inputs, action_mask=None), **noise).action
    )


def test_the_two_times_are_independent_and_per_sample():
    """Changing one sample's action time moves that sample only."""
    model, inputs = model_of(), inputs_of()
    shared = model.conditioning(inputs)
    with torch.no_grad():
        t = torch.tensor([0.5, 0.5])
        a = model(inputs.latents, inputs.actions, model.embed_times(t, t), shared)
        b = model(
            inputs.latents, inputs.actions, model.embed_times(t, torch.tensor([0.5, 0.9])), shared
        )
    for x, y in zip(a, b):
        torch.testing.assert_close(x[0], y[0])
        assert not torch.allclose(x[1], y[1], atol=1e-4)


def test_cached_text_keys_equal_those_made_in_the_layer():
    """Work that is done once per observation is the same work."""
    model, inputs = model_of(), inputs_of()
    t = torch.full((2,), 0.3)
    with torch.no_grad():
        a = model(
            inputs.latents, inputs.actions, model.embed_times(t, t), model.conditioning(inputs)
        )
        b = model(
            inputs.latents,
            inputs.actions,
            model.embed_times(t, t),
            model.conditioning(inputs, cache=True),
        )
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)


def test_what_is_given_carries_no_loss():
    """A sample whose video is given enters the mean of the action loss alone, and the other way
    round."""
    losses = Losses(
        torch.tensor([100.0, 2.0, 4.0]),
        torch.tensor([1.0, 100.0, 3.0]),
        torch.tensor([0.0, 0.5, 0.5]),
        torch.tensor([0.5, 0.0, 0.5]),
        torch.ones(3, dtype=torch.bool),
    )
    assert losses.total().item() == 3.0 + 2.0
    assert losses.total(weight=10).item() == 30.0 + 2.0
    assert losses.total(videos=4, acting=1).item() == 6 / 4 + 4 / 1


def test_without_actions_the_video_expert_runs_alone_and_equals_wan():
    """Stage 1 is Wan."""
    model, inputs = model_of(), inputs_of()
    alone = replace(inputs, actions=None, und=None, und_mask=None)
    t = torch.full((2,), 0.3)
    with torch.no_grad():
        ours, action = model(
            inputs.latents, None, model.embed_times(t, None), model.conditioning(alone)
        )
        wan = model.video(inputs.latents, t, inputs.context, inputs.context_len)
    assert action is None
    torch.testing.assert_close(ours, wan)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
def test_bf16_weights_keep_their_fp32_islands(attention, monkeypatch):
    """bf16 weights give an fp32 video velocity and a bf16 action velocity within bf16 rounding of
    the fp32 run."""
    monkeypatch.setenv("MOTUS_ATTENTION", attention)
    model, inputs = model_of(), inputs_of()
    exact = velocity(model, inputs)
    half = velocity(model.to(torch.bfloat16), inputs)
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.bfloat16
    for a, b in zip(exact, half):
        assert (a - b.float()).norm() / a.norm() < 0.02


def test_plain_attention_is_the_oracle_of_sdpa(monkeypatch):
    """Both implementations give the same network."""
    model, inputs = model_of(), inputs_of()
    inputs.und_mask[0, 2:] = False
    results = []
    for name in ("plain", "sdpa"):
        monkeypatch.setenv("MOTUS_ATTENTION", name)
        results.append(velocity(model, inputs))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    monkeypatch.setenv("MOTUS_ATTENTION", "flash9")
    with pytest.raises(ValueError, match="flash9.*plain, sdpa"):
        velocity(model, inputs)


def test_the_pretraining_form_has_neither_state_nor_registers():
    """Stages 1 and 2: the action sequence is the chunk alone."""
    config = replace(TINY, finetune=False, ratio=1)
    model = model_of(config)
    assert velocity(model, inputs_of(config))[1].shape == (2, 4, 3)
    assert not [n for n in model.state_dict() if "state_encoder" in n or "registers" in n]


@pytest.mark.parametrize(
    "change, words",
    [(dict(frames=6), "frames is 6"), (dict(action_width=15), "action_width is 15")],
)
def test_impossible_sizes_are_refused_by_name(change, words):
    """The error names the field and its value."""
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


def test_unknown_preset_is_refused_by_name():
    """The error lists what there is."""
    with pytest.raises(ValueError, match="'toi'.*toy, sim, small, full"):
        preset("toi")


def test_motion_weight_changes_the_loss_of_the_video_alone():
    """By the weight that flow gives to what moves; 0 is the official loss to the bit."""
    model = model_of()
    inputs = inputs_of()
    inputs.moves = torch.zeros(inputs.latents[:, 0].shape, dtype=torch.bool)
    inputs.moves[:, 1:, :2] = True  # half of the picture
    t = torch.tensor([0.4, 0.9])
    noise = [torch.randn_like(x) for x in (inputs.latents, inputs.actions)]
    with torch.no_grad():
        plain = model.loss(inputs, t, noise[0], t, noise[1])
        model.motion_weight = 20.0
        weighted = model.loss(inputs, t, noise[0], t, noise[1])
        model.motion_weight = 0.0
        again = model.loss(inputs, t, noise[0], t, noise[1])
    assert (weighted.video - plain.video).abs().min() > 1e-4
    assert torch.equal(weighted.action, plain.action)
    assert torch.equal(again.video, plain.video)
