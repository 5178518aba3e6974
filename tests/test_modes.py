"""The five modes, by information flow through the real network and by truth on a problem whose
answers are known in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from einops import rearrange

import flow
from motus import Inputs, Motus, preset

MODES = tuple(flow.MODES)

# -- information flow -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Motus:
    """Two layers with random weights everywhere, the heads included, so that everything reaches
    everything."""
    torch.manual_seed(0)
    toy = preset("toy")
    return Motus(replace(toy, video=replace(toy.video, layers=2))).eval()


def given(model: Motus, seed: int = 1) -> Inputs:
    generator, config = torch.Generator().manual_seed(seed), model.config

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Inputs(
        latents=normal(2, config.video.latent, config.latent_frames, 4, 4),
        context=normal(2, 5, config.video.text_dim),
        context_len=torch.tensor([5, 5]),
        und=normal(2, 7, config.vlm_dim),
        state=normal(2, config.state_dim),
        actions=normal(2, config.chunk, config.action_dim),
    )


def noises(model: Motus, seed: int = 2) -> dict[str, torch.Tensor]:
    generator, inputs = torch.Generator().manual_seed(seed), given(model)
    return dict(
        video_noise=torch.randn(inputs.latents.shape, generator=generator),
        action_noise=torch.randn(inputs.actions.shape, generator=generator),
    )


def outcome(
    model: Motus, mode: str, inputs: Inputs, noise: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    return [x for x in model.sample(inputs, mode, 3, **noise) if x is not None]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_pinned_stays_bit_identical_through_the_loop(model, monkeypatch, mode):
    """Every evaluation sees the same noise at t = 1, or the same given data at t = 0, while what is
    denoised runs from 1 to 0."""
    calls, row, inputs, noise = [], flow.MODES[mode], given(model), noises(model)
    when, euler = [], flow.sample

    def recorded(velocity, *rest):
        *rest, embed = rest
        return euler(
            lambda *args: calls.append(args) or velocity(*args),
            *rest,
            embed=lambda *times: when.extend(zip(*times)) or embed(*times),
        )

    monkeypatch.setattr(flow, "sample", recorded)
    outcome(model, mode, inputs, noise)
    pinned_noise = (
        flow.keep_observation(noise["video_noise"], inputs.latents[:, :, :1]),
        noise["action_noise"],
    )
    assert len(calls) == len(when) == 3
    for what, modality, clean, noisy in (
        (row.video, 0, inputs.latents, pinned_noise[0]),
        (row.action, 1, inputs.actions, pinned_noise[1]),
    ):
        contents, times = [c[modality] for c in calls], [pair[modality] for pair in when]
        if what == flow.DENOISE:
            assert torch.allclose(
                torch.stack(times)[:, 0], torch.tensor([1, 2 / 3, 1 / 3])
            ) and torch.equal(contents[0], noisy)
            assert not torch.equal(contents[1], contents[0])
        else:
            assert all(torch.equal(x, noisy if what == flow.NOISE else clean) for x in contents)
            assert all((t == (1.0 if what == flow.NOISE else 0.0)).all() for t in times)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_returns_what_it_denoises_and_nothing_else(model, mode):
    """What is pinned is not in the prediction."""
    prediction, row = model.sample(given(model), mode, 1, **noises(model)), flow.MODES[mode]
    assert (prediction.video is not None) == (row.video == flow.DENOISE)
    assert (prediction.actions is not None) == (row.action == flow.DENOISE)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_given_moves_the_output_and_what_is_not_given_cannot(model, mode):
    """Another future moves the output exactly where the mode is given the video, another action
    where it is given the actions."""
    inputs, noise, row = given(model), noises(model), flow.MODES[mode]
    before = outcome(model, mode, inputs, noise)
    future = inputs.latents.clone()
    future[:, :, 1:] += 0.5
    assert same(before, outcome(model, mode, replace(inputs, latents=future), noise)) == (
        row.video != flow.GIVEN
    )
    assert same(
        before, outcome(model, mode, replace(inputs, actions=inputs.actions + 0.5), noise)
    ) == (row.action != flow.GIVEN)


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_of_a_pinned_modality_enters_and_that_of_a_given_one_does_not(model, mode):
    """Noise moves the output unless the modality is given; a modality at t = 1 enters through its
    noise alone."""
    inputs, noise, row = given(model), noises(model), flow.MODES[mode]
    before = outcome(model, mode, inputs, noise)
    for name, what in (("video_noise", row.video), ("action_noise", row.action)):
        assert same(before, outcome(model, mode, inputs, {**noise, name: noise[name] + 0.5})) == (
            what == flow.GIVEN
        )


@pytest.mark.parametrize("mode", MODES)
def test_observation_instruction_understanding_and_state_reach_every_mode(model, mode):
    """Each condition moves the output of each mode."""
    inputs, noise = given(model), noises(model)
    before = outcome(model, mode, inputs, noise)
    seen = inputs.latents.clone()
    seen[:, :, 0] += 0.5
    for change in (
        dict(latents=seen),
        dict(context=inputs.context + 0.5),
        dict(und=-inputs.und),
        dict(state=inputs.state + 0.5),
    ):
        assert not same(before, outcome(model, mode, replace(inputs, **change), noise)), list(
            change
        )


def test_a_mode_that_lacks_what_it_is_given_says_so(model):
    """World model without actions, IDM without a future: one ValueError each."""
    inputs = given(model)
    with pytest.raises(ValueError, match="given the actions"):
        model.sample(replace(inputs, actions=None), "world_model", 1)
    with pytest.raises(ValueError, match="given the video"):
        model.sample(replace(inputs, latents=inputs.latents[:, :, :1]), "idm", 1)


# -- truth ----------------------------------------------------------------------------------------
# (observation, future, actions) are jointly Gaussian, two numbers each. Given the observation,
# z = (future, actions) ~ N(m, S), and with x = D z + N e, D = diag(1 - t), N = diag(t), e standard
# normal, the exact velocity is linear in x:
#
#     E[e - z | x] = -m + (N - S D) K^-1 (x - D m),        K = Cov x = D S D + N N
#
# K is regular for all times: at t = 0 it holds a block of S, at t = 1 an identity.

PARTS = {"video": slice(0, 2), "action": slice(2, 4)}
OTHER = {"video": "action", "action": "video"}
KNOWN = torch.tensor([0.9, -0.7], dtype=torch.float64)  # what a mode is given


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An observation (2,), and mean (4,) and covariance (4, 4) of future and actions given it."""
    root = torch.randn(6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    joint, mean = (
        root @ root.T / 3 + 0.2 * torch.eye(6),
        torch.tensor([0.3, -0.2, 1.0, -0.5, 0.4, 2.0], dtype=torch.float64),
    )
    observation = torch.tensor([0.8, -1.1], dtype=torch.float64)
    gain = joint[2:, :2] @ torch.linalg.inv(joint[:2, :2])
    return (
        observation,
        mean[2:] + gain @ (observation - mean[:2]),
        joint[2:, 2:] - gain @ joint[:2, 2:],
    )


def exact_velocity(video, action, times):
    """The velocity a perfect network would predict; video (B, 2, 2, 1, 1) with the observation in
    frame 0, action (B, 2, 1)."""
    _, mean, covariance = problem()
    x = torch.cat([video[:, :, 1, 0, 0], action[:, :, 0]], dim=1)
    t_video, t_action = (t[0] for t in times)
    t = torch.stack([t_video, t_video, t_action, t_action]).double()
    D, N = torch.diag(1 - t), torch.diag(t)
    v = -mean + (x - D @ mean) @ torch.linalg.solve(
        D @ covariance @ D + N @ N, (N - covariance @ D).T
    )
    future = v[:, PARTS["video"]]
    v_video = torch.stack(
        [torch.full_like(future, math.nan), future], dim=2
    )  # nobody may use that of the observation
    return v_video[..., None, None], v[:, PARTS["action"], None]


def conditional(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of a part, given the observation and KNOWN for the other part."""
    _, mean, covariance = problem()
    x, y = PARTS[part], PARTS[OTHER[part]]
    gain = covariance[x, y] @ torch.linalg.inv(covariance[y, y])
    return mean[x] + gain @ (KNOWN - mean[y]), covariance[x, x] - gain @ covariance[y, x]


def marginal(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    _, mean, covariance = problem()
    return mean[PARTS[part]], covariance[PARTS[part], PARTS[part]]


TRUTH = {
    "joint": lambda: problem()[1:],
    "vla": lambda: marginal("action"),
    "world_model": lambda: conditional("video"),
    "idm": lambda: conditional("action"),
    "vgm": lambda: marginal("video"),
}


@pytest.mark.parametrize("mode", MODES)
def test_with_the_exact_velocity_each_mode_samples_its_conditional(mode):
    """Joint, p(v, a | o); VLA and VGM marginalise what stays noise; world model and IDM condition
    on what is given: 3 percent at 200 steps.

    The sampler is affine in the noise here, so eight points with mean 0 and covariance 1 give the
    mean and covariance of its output as infinitely many draws would."""
    points, row = (
        torch.cat([2 * torch.eye(4), -2 * torch.eye(4)]).double(),
        flow.MODES[mode]._asdict(),
    )
    row.pop("question")
    start = {
        name: KNOWN.expand(8, 2) if what == flow.GIVEN else points[:, PARTS[name]]
        for name, what in row.items()
    }
    observation = rearrange(problem()[0].expand(8, 2), "b c -> b c 1 1 1")
    video = torch.cat(
        [torch.full_like(observation, math.nan), rearrange(start["video"], "b c -> b c 1 1 1")],
        dim=2,
    )
    video, action = flow.sample(
        exact_velocity, video, start["action"][..., None], observation, mode, steps=200
    )
    samples = {"video": video[:, :, 1, 0, 0], "action": action[:, :, 0]}
    found = torch.cat([samples[name] for name, what in row.items() if what == flow.DENOISE], dim=1)
    mean, covariance = TRUTH[mode]()
    scale = covariance.diagonal().sqrt()
    assert ((found.mean(dim=0) - mean).abs() < 0.03 * scale).all()
    assert (
        (torch.cov(found.T, correction=0) - covariance).abs() < 0.03 * torch.outer(scale, scale)
    ).all()


@pytest.mark.parametrize("part", PARTS)
def test_conditioning_and_marginalising_have_different_truths(part):
    """The test above can tell the modes apart: their truths differ by far more than its
    tolerance."""
    (mean, covariance), (given_mean, given_covariance) = marginal(part), conditional(part)
    scale = covariance.diagonal().sqrt()
    assert ((given_mean - mean).abs() > 0.2 * scale).any()
    assert ((given_covariance - covariance).abs() > 0.2 * torch.outer(scale, scale)).any()
