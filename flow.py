"""Rectified flow with two clocks (paper Sec. 3.2, the "UniDiffuser-style scheduler").

Video and action each have their own time t in [0, 1]: 1 is pure noise, 0 is data.

    x_t = (1 - t) * data + t * noise          the straight path; t is also the mixing weight sigma
    velocity = noise - data                   what the network predicts from x_t and both times
    loss = |v_video - (noise - data)|^2 + |v_action - (noise - data)|^2

Because the two times are drawn independently in training, one network answers five questions, which
differ only in what happens to the two times while sampling. They are a table (`MODES`), and one
Euler loop (`sample`) reads a row of it:

    mode          video           action          question
    joint         denoise         denoise         what will happen, and what shall I do
    vla           noise, t = 1    denoise         what shall I do
    world_model   denoise         given, t = 0    what will happen if I do this
    idm           given, t = 0    denoise         what was done between these frames
    vgm           denoise         noise, t = 1    what will happen

Conventions that bite: the first latent frame is the observation; it is kept clean, labelled with
the same t as the others, carries no loss but counts in the mean (official), and is put back after
every Euler step. Training draws t from a table shifted by 5, sampling takes uniform steps (shift
1): both official.

Departures from the paper: the paper states logit-normal times; the released code draws uniformly
from the shift-5 table, which is the default here (`official`), with `logit_normal` beside it.
Departure from the official code: times and sigmas stay in fp32 (there: bf16).

Shapes: B batch, C latent channels, T latent frames, h w latent grid, S actions of a chunk, A action
dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# -- the five modes -------------------------------------------------------------------------------

DENOISE, NOISE, GIVEN = "denoise", "noise", "given"


class Mode(NamedTuple):
    """What happens to each modality while sampling: `denoise` from t = 1 to 0, stay `noise` at t =
    1, or be `given` at t = 0."""

    video: str
    action: str


MODES = {
    "joint": Mode(DENOISE, DENOISE),
    "vla": Mode(NOISE, DENOISE),
    "world_model": Mode(DENOISE, GIVEN),
    "idm": Mode(GIVEN, DENOISE),
    "vgm": Mode(DENOISE, NOISE),
}


def mode_named(name: str) -> Mode:
    if name not in MODES:
        raise ValueError(f"mode is {name!r}; allowed: {', '.join(MODES)}")
    return MODES[name]


# -- times ----------------------------------------------------------------------------------------

TABLE_SIZE, TRAIN_SHIFT = 1000, 5.0


def shifted(t: Tensor, shift: float) -> Tensor:
    """Moves times in [0, 1] towards noise: shift * t / (1 + (shift - 1) * t). Shift 1 changes
    nothing."""
    return shift * t / (1 + (shift - 1) * t)


def official_table(shift: float = TRAIN_SHIFT) -> Tensor:
    """The 1000 training times of the official scheduler, from 1 down to 0.00498 at shift 5."""
    return shifted(1 - torch.arange(TABLE_SIZE, dtype=torch.float64) / TABLE_SIZE, shift).float()


def official_times(
    n: int, generator: torch.Generator | None = None, shift: float = TRAIN_SHIFT
) -> Tensor:
    """n training times as the released code draws them: uniform over the rows of the shifted table."""
    return official_table(shift)[torch.randint(TABLE_SIZE, (n,), generator=generator)]


def logit_normal_times(
    n: int, generator: torch.Generator | None = None, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """n training times as the paper states them: the sigmoid of a normal variable."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


TIMES = {"official": official_times, "logit_normal": logit_normal_times}


def pin_modality(
    t_video: Tensor, t_action: Tensor, share: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """In `share` of the samples one modality, either with equal chance, is given: its time becomes
    0, as in modes `world_model` and `idm`. It then carries no loss (from clean data nobody can tell
    the noise). Official training has share 0 and meets times below 0.05 once in a hundred draws:
    enough for a long training, too rare for a short one to learn to read what it is given."""
    chance = torch.rand(len(t_video), generator=generator).to(t_video.device)
    return t_video.masked_fill(chance < share / 2, 0.0), t_action.masked_fill(
        (chance >= share / 2) & (chance < share), 0.0
    )


def sampling_times(steps: int, shift: float = 1.0) -> Tensor:
    """steps + 1 times from 1 (noise) to 0 (data); uniform at shift 1, as official sampling."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; sampling takes at least 1 step")
    return shifted(torch.linspace(1, 0, steps + 1), shift)


def pinned_times(what: str, times: Tensor) -> Tensor:
    """The times of a modality while sampling: those of the clock, or where it is pinned."""
    return times if what == DENOISE else torch.full_like(times, {NOISE: 1.0, GIVEN: 0.0}[what])


# -- training -------------------------------------------------------------------------------------


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many axes as `like`."""
    return t.view(-1, *[1] * (like.dim() - 1))


def mix(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t (B,) on the straight path from data to noise."""
    t = expand(t, data)
    return (1 - t) * data + t * noise


def keep_observation(latents: Tensor, observation: Tensor) -> Tensor:
    """Puts the clean observation (B, C, 1, h, w) back as the first latent frame of (B, C, T, h, w)."""
    return torch.cat([observation.to(latents.dtype), latents[:, :, 1:]], dim=2)


def video_loss(velocity: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error per sample (B,), mean over (C, T, h, w). Frame 0 is the observation: its error
    is zero, yet it counts in the mean, as official. mask (B, T): False where a frame lies past the
    end of the episode; such frames leave the mean."""
    error = (velocity - target).square().mean(dim=(1, 3, 4))  # (B, T)
    error = torch.cat([torch.zeros_like(error[:, :1]), error[:, 1:]], dim=1)
    return masked_mean(error, mask)


def action_loss(velocity: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error per sample (B,), mean over the real entries of (S, A). mask (B, S, A): False
    for steps past the end of the episode and for dimensions that the embodiment lacks."""
    return masked_mean(
        (velocity - target).square().flatten(1), None if mask is None else mask.flatten(1)
    )


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over axis 1 of (B, n) where mask is True; 0 for a row without any."""
    if mask is None:
        return x.mean(dim=1)
    weight = mask.to(x.dtype)
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


# -- sampling -------------------------------------------------------------------------------------

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def sample(
    velocity: Velocity,
    video: Tensor,
    action: Tensor,
    observation: Tensor | None,
    mode: str,
    steps: int = 10,
    shift: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Euler integration of both modalities from noise to data.

    velocity(video, action, t_video (B,), t_action (B,)) -> (v_video, v_action). `video` (B, C, T,
    h, w) and `action` (B, S, A) hold noise, or clean data where the mode says `given`; only what is
    denoised ever changes, and the video not where v_video is None. `observation` (B, C, 1, h, w) is
    put in as the first latent frame before the first step and after every step (None: there is no
    observation). Returns (video, action).
    """
    row = mode_named(mode)
    if observation is not None:
        video = keep_observation(video, observation)
    times = sampling_times(steps, shift)
    t_video, t_action = (
        pinned_times(what, times).to(video.device)[:, None].expand(-1, len(video)) for what in row
    )
    for i, (t, t_next) in enumerate(zip(times.tolist(), times[1:].tolist())):
        v_video, v_action = velocity(video, action, t_video[i], t_action[i])
        if row.video == DENOISE and v_video is not None:
            video = video + (t_next - t) * v_video
            if observation is not None:
                video = keep_observation(video, observation)
        if row.action == DENOISE:
            action = action + (t_next - t) * v_action
    return video, action
