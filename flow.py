"""Rectified flow with two timesteps (paper Sec. 3.2, the "UniDiffuser-style scheduler").

Video and action each have their own time t in [0, 1]: 1 is pure noise, 0 is data.

    x_t = (1 - t) * data + t * noise          the straight path; t is also the mixing weight sigma
    velocity = noise - data                   what the network predicts from x_t and both times
    loss = |v_video - (noise - data)|^2 + |v_action - (noise - data)|^2

Because the two times are drawn independently in training, one network answers five questions, which
differ only in what happens to the two times while sampling: a table (`MODES`), and one Euler loop
(`sample`) that reads a row of it.

Conventions that bite: the first latent frame is the observation; it is kept clean, labelled with
the same t as the others, carries no loss but counts in the mean (official), and is put back after
every Euler step. Training draws t from a table shifted by 5, sampling takes uniform steps (shift
1): both official.

Departures: the paper states logit-normal times; the released code draws uniformly from the shift-5
table, the default here (`official`), with `logit_normal` beside it. Times stay fp32 (there: bf16).

Shapes: B batch, C latent channels, T latent frames, h w latent grid, S chunk, A action dimensions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# -- the five modes -------------------------------------------------------------------------------

DENOISE, NOISE, GIVEN = "denoise", "noise", "given"


class Mode(NamedTuple):
    """A row: each modality is to `denoise` from t = 1 to 0, stay `noise` at t = 1 or be
    `given` at t = 0; and the question that is answered."""

    video: str
    action: str
    question: str


MODES = {
    "joint": Mode(DENOISE, DENOISE, "what will happen, and what shall I do?"),
    "vla": Mode(NOISE, DENOISE, "what shall I do?"),
    "world_model": Mode(DENOISE, GIVEN, "what will happen if I do this?"),
    "idm": Mode(GIVEN, DENOISE, "what was done between these frames?"),
    "vgm": Mode(DENOISE, NOISE, "what will happen?"),
}


def mode_named(name: str) -> Mode:
    if name not in MODES:
        raise ValueError(f"mode is {name!r}; expected one of {', '.join(MODES)}")
    return MODES[name]


# -- times ----------------------------------------------------------------------------------------

TRAIN_SHIFT = 5.0


def shifted(t: Tensor, shift: float) -> Tensor:
    """Moves times in [0, 1] towards noise: shift * t / (1 + (shift - 1) * t). Shift 1 changes
    nothing."""
    return shift * t / (1 + (shift - 1) * t)


def official_table() -> Tensor:
    """The 1000 training times of the official scheduler, from 1 down to 0.00498."""
    return shifted(1 - torch.arange(1000, dtype=torch.float64) / 1000, TRAIN_SHIFT).float()


def official_times(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n training times as the released code draws them: uniform over the shifted table."""
    return official_table()[torch.randint(1000, (n,), generator=generator)]


def logit_normal_times(n: int, generator: torch.Generator | None = None) -> Tensor:
    """n training times as the paper states them: the sigmoid of a standard normal variable."""
    return torch.sigmoid(torch.randn(n, generator=generator))


TIMES = {"official": official_times, "logit_normal": logit_normal_times}


def pin_modality(
    t_video: Tensor, t_action: Tensor, share: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """In `share` of the samples one modality, either with equal chance, is given: its time becomes
    0, as in modes `world_model` and `idm`. It then carries no loss (from clean data nobody can tell
    the noise). Official training has share 0 and meets times below 0.05 once in a hundred draws:
    enough for a long training, too rare for a short one to learn to read what it is given."""
    chance = torch.rand(len(t_video), generator=generator).to(t_video.device)
    video_given = chance < share / 2
    action_given = (chance >= share / 2) & (chance < share)
    return t_video.masked_fill(video_given, 0.0), t_action.masked_fill(action_given, 0.0)


def sampling_times(steps: int, shift: float = 1.0) -> Tensor:
    """steps + 1 times from 1 (noise) to 0 (data); uniform at shift 1, as official sampling."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; sampling takes at least 1 step")
    return shifted(torch.linspace(1, 0, steps + 1), shift)


def pinned_times(what: str, times: Tensor) -> Tensor:
    """The times of a modality while sampling: as they run, or where it is pinned."""
    if what == DENOISE:
        return times
    return torch.ones_like(times) if what == NOISE else torch.zeros_like(times)


# -- training -------------------------------------------------------------------------------------


def mix(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t (B,) on the straight path from data to noise."""
    t = t.view(-1, *[1] * (data.dim() - 1))  # (B, 1, ..., 1)
    return (1 - t) * data + t * noise


def keep_observation(latents: Tensor, observation: Tensor) -> Tensor:
    """Puts the clean observation (B, C, 1, h, w) back as frame 0 of latents (B, C, T, h, w)."""
    return torch.cat([observation.to(latents.dtype), latents[:, :, 1:]], dim=2)


def video_loss(
    velocity: Tensor, target: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Squared error per sample (B,), mean over (C, T, h, w). Frame 0 is the observation: its error
    is zero, yet it counts in the mean, as official. mask (B, T): False where a frame lies past the
    end of the episode; such frames leave the mean. weight (B, 1, T, h, w): of each place."""
    error = (velocity - target).square()
    if weight is not None:
        error = weight * error
    error = error.mean(dim=(1, 3, 4))  # (B, T)
    error = torch.cat([torch.zeros_like(error[:, :1]), error[:, 1:]], dim=1)
    return masked_mean(error, mask)


def moving_weight(moves: Tensor | None, more: float) -> Tensor | None:
    """Weight (B, 1, T, h, w) of each place of latents, whose mean over the frames after the
    observation is 1 in each sample: where `moves` (B, T, h, w) it is 1 + more times what it is
    where nothing does. What moves is small: unless it weighs more, a short training learns the
    table. None for 0, the official loss. ValueError if it is not known what moves."""
    if not more:
        return None
    if moves is None:
        raise ValueError("motion_weight needs windows that say what moves: encode them again")
    weight = 1 + more * moves[:, None].float()
    return weight / weight[:, :, 1:].mean(dim=(2, 3, 4), keepdim=True)


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


class Losses(NamedTuple):
    """Loss per sample, and the times it was measured at (for the loss per time bin)."""

    video: Tensor  # (B,)
    action: Tensor | None  # (B,), 0 for a sample without actions
    t_video: Tensor  # (B,)
    t_action: Tensor | None  # (B,)
    has_action: Tensor | None  # (B,) bool

    def total(self, videos: float | None = None, acting: float | None = None, weight=1.0) -> Tensor:
        """The sum of both means over the batch, `weight` times that of the video; a sample that
        lacks a modality, or is given it, is not in its mean. Of a part of a batch in which `videos`
        and `acting` samples have these losses, its share."""
        total = weight * mean_where(self.video, self.t_video > 0, videos)
        if self.action is None:
            return total
        return total + mean_where(self.action, self.has_action & (self.t_action > 0), acting)


def mean_where(loss: Tensor, counts: Tensor, number: float | None) -> Tensor:
    """Sum of `loss` (B,) where `counts` is True, over their number, or over the `number` given."""
    number = counts.sum().clamp(min=1) if number is None else max(number, 1)
    return (loss * counts).sum() / number


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


# -- sampling -------------------------------------------------------------------------------------

Velocity = Callable[..., tuple[Tensor | None, Tensor | None]]


def start(
    name: str,
    what: str,
    truth: Tensor | None,
    noise: Tensor | None,
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Where sampling begins: the truth if the modality is given, else noise, drawn where there is
    none; `like` has its shape and device. ValueError for a truth that is missing or misshapen."""
    if what != GIVEN:
        return gaussian(like, generator) if noise is None else noise
    found = None if truth is None else tuple(truth.shape)
    if found != tuple(like.shape):
        expected = f"expected {tuple(like.shape)}, found {found}"
        raise ValueError(f"this mode is given the {name} in its inputs: {expected}")
    return truth


def sample(
    velocity: Velocity,
    video: Tensor,
    action: Tensor,
    observation: Tensor,
    mode: str,
    steps: int = 10,
    shift: float = 1.0,
    embed: Callable = zip,
) -> tuple[Tensor, Tensor]:
    """Euler integration of both modalities from noise to data.

    velocity(video, action, (t_video (B,), t_action (B,))) -> (v_video, v_action). `video` (B, C, T,
    h, w) and `action` (B, S, A) hold noise, or clean data where the mode says `given`; only what is
    denoised changes, and the video not where v_video is None. `observation` (B, C, 1, h, w) is put
    in as frame 0, first and after every step. `embed` may make something else of the times of all
    steps, (steps, B) each. Returns (video, action)."""
    row = mode_named(mode)
    times = sampling_times(steps, shift)
    now = times[:-1, None].to(video.device).expand(-1, len(video))
    embedded = embed(pinned_times(row.video, now), pinned_times(row.action, now))
    video = keep_observation(video, observation)
    for dt, now in zip(times.double().diff().tolist(), embedded):  # dt < 0: time runs from 1 to 0
        v_video, v_action = velocity(video, action, now)
        if row.video == DENOISE and v_video is not None:
            video = keep_observation(video + dt * v_video, observation)
        if row.action == DENOISE:
            action = action + dt * v_action
    return video, action
