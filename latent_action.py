"""Latent actions: what a video shows of an action, as 14 numbers that need no robot to have recorded them (paper Sec. 4.1).

    frames i, i + interval --FlowEstimator--> flow (H, W, 2) px --colour--> picture (3, H, W) in [-1, 1]
      --DC-AE, frozen--> 4 tokens of 512, whitened --MLP--> mu, logvar (14) --MLP--> 4 tokens --DC-AE--> picture --> flow

    loss = reconstruction + lambda_action * |action - mu|^2 where an action is known (10 %) + beta * KL      (lambda 1.0, beta 1e-6)

Reductions: reconstruction is a mean over batch and features, alignment over the known entries of the batch, KL a sum over dimensions and
a mean over the batch. The official release has none of this; where the paper is silent the choices are ours:
- Colour is the Middlebury wheel at a fixed radius, with an exact inverse and without its seam (55 steps close the circle, not 54). What is
  faster keeps its direction and is counted. Scaling each picture by its own maximum, as usual, would lose how fast things move.
- The first `action_dim` entries of mu are the prediction of the action, without a head between, so they have the units of the labels.
  Labels are differences over exactly the latent's interval: no position can be read off a flow.
- Tokens are whitened with saved statistics and reconstructed there, so training needs no pass through the DC-AE. `reconstruct="picture"`
  is the paper's form, dearer by the DC-AE's decoder; a fine-tuned DC-AE needs it, or its tokens would shrink to nothing.
- logvar starts at -6: with unit noise at the start the decoder learns to ignore the latent.
- `interval` is part of the configuration and of every file: official files do not say what theirs is.

Shapes: B batch, H W height and width, D token features (positions * channels), Z latent dimensions (14), A aligned dimensions.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from attention import mlp
from backbones.dcae import DCAE, DCAEConfig, canonical
from backbones.dcae import PRESETS as DCAES
from backbones.dpflow import DISFlow, FlowEstimator, load_dpflow
from backbones.weights import load_into, open_source, read_metadata, save_safetensors
from worlds.tabletop import GRIP_SPEED, MAX_SPEED, Episode, record

# -- configuration ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentActionConfig:
    """Everything that decides what a latent action means."""

    dcae: DCAEConfig
    image: int                                # side of the flow picture
    radius: float                             # motion of full colour, in pixels of that picture, over one interval
    hidden: tuple[int, ...]                   # widths of the encoder's MLP; the decoder mirrors them
    interval: int                             # source frames that one latent spans
    action_dim: int                           # A: entries of mu that are aligned with real actions
    latent_dim: int = 14
    lambda_action: float = 1.0
    beta: float = 1e-6
    reconstruct: str = "tokens"               # "tokens" or "picture"
    moving: float = 0.0                       # "picture": a pixel weighs 1 + moving * saturation, against all-white answers
    finetune_dcae: bool = False

    def __post_init__(self):
        if self.image % self.dcae.factor:
            raise ValueError(f"image is {self.image}; the DC-AE needs a multiple of {self.dcae.factor}")
        if self.interval < 1 or self.radius <= 0 or not 0 <= self.action_dim <= self.latent_dim:
            raise ValueError(f"interval is {self.interval}, radius {self.radius}, action_dim {self.action_dim}; allowed: interval >= 1, "
                             f"radius > 0, action_dim from 0 to latent_dim = {self.latent_dim}")
        if self.reconstruct not in ("tokens", "picture") or (self.finetune_dcae and self.reconstruct == "tokens"):
            raise ValueError(f"reconstruct is {self.reconstruct!r} with finetune_dcae={self.finetune_dcae}; allowed: 'picture', or "
                             "'tokens' with a frozen DC-AE")

    @property
    def grid(self) -> int:
        """Token positions along one side."""
        return self.image // self.dcae.factor


PRESETS = {
    "toy": LatentActionConfig(DCAEConfig((16, 32, 64, 64), (0, 1, 1, 1), (0, 1, 1, 1), latent_channels=64, conv_stages=3, head_dim=16),
                              image=32, radius=5.0, hidden=(256, 128), interval=3, action_dim=3),
    "small": LatentActionConfig(DCAEConfig((32, 64, 128, 128, 256, 256, 512), (1, 1, 2, 2, 2, 2, 2), (1, 1, 2, 2, 2, 2, 2), 128),
                                image=256, radius=32.0, hidden=(512, 256), interval=6, action_dim=14),
    "full": LatentActionConfig(DCAES["f128c512"], image=256, radius=32.0, hidden=(512, 256), interval=6, action_dim=14),
}

# -- flow: colour, size, camera ---------------------------------------------------------------------------------------------

# The wheel runs red, yellow, green, cyan, blue, magenta, red; on each stretch one channel rises or falls and the others rest at 0 or 1.
BOUNDS = torch.tensor([0.0, 15, 21, 25, 36, 49, 55])
CORNERS = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]])
STRETCH = torch.tensor([[0, 5, 0], [2, 0, 1], [3, 4, 0]])                                     # by the largest and the smallest channel


def flow_to_colour(flow: Tensor, radius: float) -> Tensor:
    """Flow (B, H, W, 2) px -> pictures (B, 3, H, W) in [-1, 1]: direction as hue, speed / radius, at most 1, as saturation; rest is white.
    Up to `radius`, `colour_to_flow` inverts it to 1e-5 of the radius, or to 1 % of it if the picture is rounded to 8 bits."""
    bounds, corners = BOUNDS.to(flow), CORNERS.to(flow)
    at = torch.atan2(flow[..., 1], flow[..., 0]).div(2 * math.pi).remainder(1) * 55
    stretch = torch.bucketize(at, bounds[1:-1], right=True)
    hue = torch.lerp(corners[stretch], corners[stretch + 1], ((at - bounds[stretch]) / bounds.diff()[stretch])[..., None])
    saturation = (flow.norm(dim=-1, keepdim=True) / radius).clamp(max=1)
    return rearrange(1 - 2 * saturation * (1 - hue), "b h w c -> b c h w")


def colour_to_flow(pictures: Tensor, radius: float) -> Tensor:
    """The inverse, for any pictures (B, 3, H, W), also imperfect ones: the spread of the channels is the speed, their order the hue."""
    (high, top), (low, bottom) = pictures.max(dim=1), pictures.min(dim=1)
    part = (pictures.sum(dim=1) - high - 2 * low) / (high - low).clamp(min=1e-6)
    stretch, bounds = STRETCH.to(pictures.device)[top, bottom], BOUNDS.to(pictures)
    part = torch.where(stretch % 2 == 0, part, 1 - part)                                     # even stretches rise, odd ones fall
    angle = (bounds[stretch] + part * bounds.diff()[stretch]) * (2 * math.pi / 55)
    return ((high - low).clamp(max=2) / 2 * radius)[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


def over_range(flow: Tensor, radius: float) -> float:
    """Share of the moving pixels (faster than radius / 100) that are too fast for the wheel and get clipped."""
    speed = flow.norm(dim=-1)
    return ((speed > radius).sum() / (speed > radius / 100).sum().clamp(min=1)).item()


def resize_flow(flow: Tensor, side: int) -> Tensor:
    """Flow (B, H, W, 2) -> (B, side, side, 2), in pixels of the new size. Resize flow, never its colours: those do not mix."""
    if flow.ndim != 4 or flow.shape[-1] != 2:
        raise ValueError(f"flow has shape {tuple(flow.shape)}; it must be (B, H, W, 2), in pixels")
    if bad := (~flow.isfinite()).sum().item():
        raise ValueError(f"flow holds {bad} values that are not finite; check the flow estimator and its input")
    if flow.shape[1:3] == (side, side):
        return flow.float()
    scale = flow.new_tensor([side / flow.shape[2], side / flow.shape[1]])
    resized = F.interpolate(rearrange(flow.float(), "b h w c -> b c h w"), (side, side), mode="bilinear", antialias=True)
    return rearrange(resized, "b c h w -> b h w c") * scale


def global_motion(flow: Tensor, scale: float = 0.5, rounds: int = 10) -> Tensor:
    """The camera's part of flow (B, H, W, 2), of the same shape: an affine field, fitted by reweighted least squares. What moves by itself,
    by more than about `scale` px, does not pull it as long as it covers less than half of the picture."""
    height, width = flow.shape[1:3]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    basis = rearrange(torch.stack([torch.ones_like(x), x, y]), "k h w -> (h w) k").to(flow)
    target = rearrange(flow, "b h w c -> b (h w) c")
    fit = target.median(dim=1, keepdim=True).values.expand_as(target)
    for _ in range(rounds):
        weight = (1 + (target - fit).square().sum(-1, keepdim=True) / scale**2) ** -2
        weighted = (basis * weight).mT                                                       # (B, 3, HW)
        fit = basis @ torch.linalg.solve(weighted @ basis, weighted @ target)
    return rearrange(fit, "b (h w) c -> b h w c", h=height)


# -- the model --------------------------------------------------------------------------------------------------------------


class LatentActionModel(nn.Module):
    """DC-AE tokens of a flow picture to 14 numbers and back. Its file holds all that is needed to use its latents."""

    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        features = config.grid**2 * config.dcae.latent_channels
        self.dcae = DCAE(config.dcae).requires_grad_(config.finetune_dcae).eval()
        self.encoder = mlp(features, *config.hidden, 2 * config.latent_dim)
        self.decoder = mlp(config.latent_dim, *reversed(config.hidden), features)
        nn.init.constant_(self.encoder[-1].bias[config.latent_dim:], -6.0)
        for name, size in (("token", features), ("latent", config.latent_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def train(self, mode: bool = True) -> "LatentActionModel":
        """The DC-AE stays in eval mode even when fine-tuned: its batch statistics must not drift."""
        super().train(mode)
        self.dcae.eval()
        return self

    def tokens(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2), in pixels of its own size -> token features (B, D), position by position, not whitened."""
        with torch.set_grad_enabled(self.config.finetune_dcae and torch.is_grad_enabled()):
            parts = (flow_to_colour(resize_flow(part, self.config.image), self.config.radius) for part in flow.split(64))
            return rearrange(torch.cat([self.dcae.encode(part) for part in parts]), "b c h w -> b (h w c)").float()

    @torch.no_grad()
    def fit_whitening(self, tokens: Tensor) -> None:
        """Before training: mean and std of token features (N, D); what hardly varies gets 1 % of the mean std."""
        std = tokens.std(dim=0)
        self.token_mean.copy_(tokens.mean(dim=0))
        self.token_std.copy_(std.clamp(min=0.01 * std.mean().item()))

    @torch.no_grad()
    def fit_latents(self, tokens: Tensor) -> None:
        """After training: mean and std of mu over token features (N, D). With them `standardise` gives stage 2 targets of unit scale."""
        mu, _ = self.encode(tokens)
        self.latent_mean.copy_(mu.mean(dim=0))
        self.latent_std.copy_(mu.std(dim=0).clamp(min=1e-4))

    def standardise(self, latents: Tensor) -> Tensor:
        return (latents - self.latent_mean) / self.latent_std

    def unstandardise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std + self.latent_mean

    def whiten(self, tokens: Tensor) -> Tensor:
        """Unit scale, within +-10: raw DC-AE tokens have heavy tails."""
        return ((tokens - self.token_mean) / self.token_std).clamp(-10, 10)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token features (B, D) -> mu, logvar, each (B, Z). The latent action is mu, not a sample."""
        mu, logvar = self.encoder(self.whiten(tokens)).chunk(2, dim=-1)
        return mu, logvar.clamp(-12, 4)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z), not standardised -> token features (B, D)."""
        return self.decoder(z) * self.token_std + self.token_mean

    def picture_of(self, tokens: Tensor) -> Tensor:
        """Token features (B, D) -> pictures (B, 3, H, W), about [-1, 1]."""
        return self.dcae.decode(rearrange(tokens, "b (h w c) -> b c h w", h=self.config.grid, w=self.config.grid))

    def flow_of(self, z: Tensor) -> Tensor:
        """Latents (B, Z), not standardised -> the motion they stand for, (B, H, W, 2) in pixels of the flow picture."""
        return colour_to_flow(self.picture_of(self.decode(z)), self.config.radius)

    def loss(self, x: Tensor, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """x: flow (B, H, W, 2) or its tokens (B, D); actions (B, A), normalised; mask (B, A) bool, False where unknown: a whole row of an
        unlabelled video, an entry that an embodiment lacks. Returns the scalars total, reconstruction, alignment, kl."""
        config = self.config
        if actions.shape != (len(x), config.action_dim) or mask.shape != actions.shape:
            raise ValueError(f"actions {tuple(actions.shape)} and mask {tuple(mask.shape)} must both be (B, action_dim) = "
                             f"{(len(x), config.action_dim)}")
        if len(bad := (mask & ~actions.isfinite()).nonzero()):
            raise ValueError(f"actions{bad[0].tolist()} is {actions[tuple(bad[0])]:g} although mask is True; mask out what is not known")
        if config.reconstruct == "picture" and x.ndim != 4:
            raise ValueError(f"x has shape {tuple(x.shape)}; reconstruct='picture' needs flow (B, H, W, 2)")
        tokens = self.tokens(x) if x.ndim == 4 else x
        mu, logvar = self.encode(tokens)
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator).to(mu)
        if config.reconstruct == "tokens":
            reconstruction = F.mse_loss(self.decoder(z), self.whiten(tokens))
        else:
            reconstruction = picture_loss(self.picture_of(self.decode(z)), resize_flow(x, config.image), config.radius, config.moving)
        alignment = torch.where(mask, actions - mu[:, :config.action_dim], 0.0).square().sum() / mask.sum().clamp(min=1)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        total = reconstruction + config.lambda_action * alignment + config.beta * kl
        return {"total": total, "reconstruction": reconstruction, "alignment": alignment, "kl": kl}

    def fingerprint(self) -> str:
        """Names the latent space: latents of models with different fingerprints must not be mixed."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for _, tensor in sorted(self.state_dict().items()):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path, meta: dict[str, str] | None = None) -> None:
        """One safetensors file with weights, statistics and configuration."""
        save_safetensors(path, self.state_dict(), {"latent_action": json.dumps(asdict(self.config)), **(meta or {})})

    @classmethod
    def load(cls, path: str | Path, config: LatentActionConfig | None = None) -> "LatentActionModel":
        """What `save` wrote, in eval mode. With `config`, ValueError unless the file was made with exactly that one."""
        with open_source(path) as source:
            if "latent_action" not in source.metadata:
                raise ValueError(f"{path}: holds no latent-action configuration; python train.py --stage latent writes such a file")
            found = json.loads(source.metadata["latent_action"])
            same_config(path, found, asdict(config) if config else found)
            try:
                dcae = {key: tuple(value) if isinstance(value, list) else value for key, value in found["dcae"].items()}
                model = cls(LatentActionConfig(**found | {"dcae": DCAEConfig(**dcae), "hidden": tuple(found["hidden"])}))
            except (TypeError, KeyError) as error:
                raise ValueError(f"{path}: its configuration is of another version ({error}); train it again") from error
            load_into(model, source)
        return model.eval()

    def picture_config(self) -> dict:
        """What the DC-AE's weights depend on."""
        return {key: asdict(self.config)[key] for key in ("dcae", "image", "radius")}

    def save_dcae(self, path: str | Path) -> None:
        """The DC-AE alone, in half precision."""
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in self.dcae.state_dict().items()}
        save_safetensors(path, state, {"dcae": json.dumps(self.picture_config())})

    def load_dcae(self, path: str | Path) -> None:
        """DC-AE weights: of `save_dcae`, made for the same pictures, or published ones."""
        with open_source(path) as source:
            if "dcae" in source.metadata:
                same_config(path, json.loads(source.metadata["dcae"]), self.picture_config())
            load_into(self.dcae, replace(source, tensors=canonical(source.tensors)))


def same_config(path: str | Path, found: dict, wanted: dict) -> None:
    """ValueError that lists the fields in which two configurations differ."""
    wanted = json.loads(json.dumps(wanted))                                                  # json makes lists of tuples
    if different := [f"{key}={found.get(key)} instead of {wanted.get(key)}" for key in wanted | found if found.get(key) != wanted.get(key)]:
        raise ValueError(f"{path}: made with {', '.join(different)}; use a file of the same configuration, or change the configuration")


# -- training ---------------------------------------------------------------------------------------------------------------


def picture_loss(pictures: Tensor, flow: Tensor, radius: float, moving: float) -> Tensor:
    """Mean squared error of pictures (B, 3, H, W) of flow (B, H, W, 2), a pixel weighing 1 + moving * saturation."""
    weight = 1 + moving * (flow.norm(dim=-1) / radius).clamp(max=1)[:, None]
    return (weight * (pictures - flow_to_colour(flow, radius)).square()).mean() / weight.mean()


def pretrain_dcae(model: LatentActionModel, flow: Tensor, steps: int = 5000, batch: int = 32, lr: float = 2e-3, moving: float = 100.0,
                  seed: int = 0) -> None:
    """Trains the DC-AE inside `model`, in place, on flow (N, H, W, 2). Small moving things are a few percent of a picture: without a
    large `moving` the answer stays white."""
    generator, dcae, config = torch.Generator().manual_seed(seed), model.dcae, model.config
    dcae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(dcae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="dc-ae"):
        target = resize_flow(flow[torch.randint(len(flow), (batch,), generator=generator)].to(model.token_mean.device), config.image)
        loss = picture_loss(dcae(flow_to_colour(target, config.radius)), target, config.radius, moving)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dcae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    dcae.requires_grad_(config.finetune_dcae).eval()


def other_bodies(flow: Tensor, generator: torch.Generator, shift: float = 0.2, thicker: int = 3) -> Tensor:
    """The same motions as made by other bodies elsewhere: flow (B, H, W, 2) shifted by up to `shift` of the picture, and what moves
    thickened by 0 to `thicker` px. Labels stay true. Aligned with one robot's flow alone, mu takes a larger body for a faster one."""
    turned, (_, height, width, _) = [], flow.shape
    reach = (torch.tensor([height, width]) * shift).int()
    for one, grow, way in zip(flow, torch.randint(thicker + 1, (len(flow),), generator=generator).tolist(),
                              torch.rand(len(flow), 2, generator=generator)):
        down, right = ((2 * way - 1) * reach).round().int().tolist()
        padded = F.pad(one, (0, 0, reach[1], reach[1], reach[0], reach[0]))
        one = padded[reach[0] - down:, reach[1] - right:][:height, :width]
        if grow:                                                                             # each pixel follows the fastest within reach
            speed = one.norm(dim=-1)[None]
            fastest = F.max_pool2d(speed, 2 * grow + 1, 1, grow, return_indices=True)[1][0]
            still = speed[0] < 0.1
            one = torch.where(still[..., None], one.reshape(-1, 2)[fastest], one)
        turned.append(one)
    return torch.stack(turned)


class MixedSampler:
    """Rows of a batch as a function of seed and step: `fraction` of them labelled, drawn with replacement. The number of labelled rows is
    within 1 of fraction * batch, equals it in expectation, and over any run of steps adds up to it within 1."""

    def __init__(self, labelled: Tensor, batch: int, fraction: float = 0.1, seed: int = 0):
        self.pools = [np.flatnonzero(pool) for pool in (labelled.numpy(), ~labelled.numpy())]
        self.batch, self.share, self.seed, self.start = batch, fraction * batch, seed, np.random.default_rng(seed).random()
        if (fraction > 0 and not len(self.pools[0])) or (fraction < 1 and not len(self.pools[1])):
            raise ValueError(f"fraction is {fraction}, but {len(self.pools[0])} rows are labelled and {len(self.pools[1])} are not; each "
                             "part that is drawn from needs rows")

    def __call__(self, step: int) -> Tensor:
        count = math.floor((step + 1) * self.share + self.start) - math.floor(step * self.share + self.start)
        rng = np.random.default_rng([self.seed, step])
        return torch.from_numpy(np.concatenate([rng.choice(p, n) for p, n in zip(self.pools, (count, self.batch - count)) if n]))


def probe(latents: Tensor, labels: Tensor, test_latents: Tensor, test_labels: Tensor, ridge: float = 1e-3) -> Tensor:
    """R^2 (A,) on test rows of the best linear map from latents (N, Z) to labels (N, A): how much of the true motion they hold."""
    design = lambda x: F.pad((x - latents.mean(dim=0)) / latents.std(dim=0).clamp(min=1e-6), (0, 1), value=1.0).double()
    x, y, target = design(latents), labels.double(), test_labels.double()
    weights = torch.linalg.solve(x.mT @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y)
    error = (design(test_latents) @ weights - target).square().sum(dim=0)
    return (1 - error / (target - target.mean(dim=0)).square().sum(dim=0).clamp(min=1e-12)).float()


# -- the toy world: true flow and true labels -------------------------------------------------------------------------------

LABELLED = (4, 6)                             # levels of the data pyramid whose actions training may look at


class Pairs(NamedTuple):
    """Motions over one interval. All labels are known, for measuring; `labelled` says which of them training may use."""

    flow: Tensor                              # (N, H, W, 2) float32, pixels
    labels: Tensor                            # (N, 3) float32 in [-1, 1]: motion in x, y, opening, by the most that the interval allows
    labelled: Tensor                          # (N,) bool
    level: Tensor                             # (N,) int64
    index: Tensor                             # (N, 2) int64: episode, and step at which the interval begins


def toy_pairs(episodes: list[Episode], interval: int, every: int = 1) -> Pairs:
    """The intervals of the episodes that begin at each `every`-th step. Episodes shorter than the interval have none."""
    most, rows = np.array([interval * MAX_SPEED, interval * MAX_SPEED, min(1.0, interval * GRIP_SPEED)], np.float32), []
    for number, episode in enumerate(episodes):
        if len(i := np.arange(0, len(episode.motion) - interval, every)):
            level = np.full(len(i), episode.level)
            rows.append((episode.flow(i, i + interval), (episode.motion[i + interval] - episode.motion[i]) / most, np.isin(level, LABELLED),
                         level, np.stack([np.full(len(i), number), i], axis=1)))
    if not rows:
        raise ValueError(f"none of {len(episodes)} episodes has the {interval + 1} frames that an interval of {interval} needs")
    return Pairs(*(torch.from_numpy(np.concatenate(column)) for column in zip(*rows)))


# -- motions of whole clips -------------------------------------------------------------------------------------------------

# A clip of T + 1 frames has T rows, as official files do. Row i is the motion from frame i to i + interval; the last rows, which have no
# such frame, end at the last one and are not valid. Nor are rows that touch a frame of one colour, whose motion nobody can see.
Flows = Iterator[tuple[Tensor, Tensor]]       # flow (n, H, W, 2) and valid (n,) bool, chunk after chunk


def true_flows(episode: Episode, interval: int) -> Flows:
    i, last = np.arange(len(episode.frames) - 1), len(episode.frames) - 1
    yield torch.from_numpy(episode.flow(i, np.minimum(i + interval, last))), torch.from_numpy(i + interval <= last)


def measured_flows(frames: Iterable[Tensor], estimator: FlowEstimator, interval: int, composed: bool = False, chunk: int = 32,
                   device: str | torch.device = "cpu") -> Flows:
    """Frames (3, H, W) in [0, 1], of which memory holds chunk + interval. `composed` follows the motion from neighbour to neighbour, for
    estimators that lose sight of fast things; otherwise the estimator, on `device`, sees frames i and i + interval."""
    window = []
    for frame in frames:
        window.append(frame)
        if len(window) == chunk + interval:
            yield _measure(torch.stack(window).to(device), chunk, estimator, interval, composed)
            window = window[chunk:]
    if len(window) > 1:
        yield _measure(torch.stack(window).to(device), len(window) - 1, estimator, interval, composed)


@torch.no_grad()
def _measure(frames: Tensor, count: int, estimator: FlowEstimator, interval: int, composed: bool) -> tuple[Tensor, Tensor]:
    begin, last = torch.arange(count, device=frames.device), len(frames) - 1
    end = (begin + interval).clamp(max=last)
    seen = frames.flatten(2).std(dim=-1).amax(dim=1) > 1 / 255
    valid = (begin + interval <= last) & seen[begin] & seen[end]
    if not composed:
        return rearrange(estimator(frames[begin], frames[end]), "b c h w -> b h w c"), valid
    steps = estimator(frames[:-1], frames[1:])                                               # (last, 2, H, W)
    height, width = steps.shape[-2:]
    here = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1).to(steps)
    total = steps.new_zeros(count, height, width, 2)
    for k in range(interval):                                                                # read each step where the pixel has gone
        at = 2 * (here + total) / steps.new_tensor([width - 1, height - 1]) - 1
        step = F.grid_sample(steps[(begin + k).clamp(max=last - 1)], at, padding_mode="border", align_corners=True)
        total = total + rearrange(step, "b c h w -> b h w c") * (begin + k < last)[:, None, None, None]
    return total, valid


@torch.no_grad()
def encode_flows(model: LatentActionModel, flows: Flows, compensate: bool = False) -> tuple[dict[str, Tensor], dict[str, float]]:
    """-> latent_action (T, 14), not standardised, logvar (T, 14), valid (T,); and figures: rows, valid rows, the share of moving pixels
    beyond the colour range, the camera's share of the motion. `compensate` takes the camera's motion off first."""
    rows, figures = [], []
    for flow, valid in flows:
        flow = resize_flow(flow.to(model.token_mean.device), model.config.image)
        camera = global_motion(flow)
        moved, own = camera.norm(dim=-1).sum().item(), (flow - camera).norm(dim=-1).sum().item()
        flow = flow - camera if compensate else flow
        figures.append((len(flow), valid.sum().item(), len(flow) * over_range(flow, model.config.radius), moved, own))
        rows.append((*model.encode(model.tokens(flow)), valid))
    count, usable, clipped, moved, own = np.sum(figures, axis=0) if figures else np.zeros(5)
    if not usable:
        raise ValueError(f"none of its {count:g} rows is usable: that takes {model.config.interval + 1} frames of more than one colour")
    tensors = dict(zip(("latent_action", "logvar", "valid"), (torch.cat(column).cpu() for column in zip(*rows))))
    share = moved / max(moved + own, 1e-9)
    return tensors, {"rows": int(count), "valid_rows": int(usable), "clipped": clipped / count, "camera_share": share}


def encode_episodes(model: LatentActionModel, episodes: list[Episode], interval: int, standardise: bool = True) -> list[np.ndarray]:
    """Latent actions (T, 14) float32 of each episode of T steps, from true flow; row i spans steps i to i + interval, or to the end."""
    if interval != model.config.interval:
        raise ValueError(f"interval is {interval}, but one latent of this model spans {model.config.interval}")
    latents = [encode_flows(model, true_flows(episode, interval))[0]["latent_action"] for episode in episodes]
    return [(model.standardise(z.to(model.latent_mean)) if standardise else z).cpu().numpy() for z in latents]


# -- export -----------------------------------------------------------------------------------------------------------------


def read_video(path: Path, side: int) -> Iterator[Tensor]:
    """Frames (3, side, side) in [0, 1] of a video, padded to a square. ValueError if it cannot be decoded to its end."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av (the extra motus[data])") from error
    count = 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                picture = rearrange(torch.from_numpy(frame.to_ndarray(format="rgb24")), "h w c -> 1 c h w").float() / 255
                height, width = (max(1, round(n * side / max(picture.shape[2:]))) for n in picture.shape[2:])
                picture = F.interpolate(picture, (height, width), mode="bilinear", antialias=True).clamp(0, 1)[0]
                top, left = (side - height) // 2, (side - width) // 2
                yield F.pad(picture, (left, side - width - left, top, side - height - top))
                count += 1
            promised = container.streams.video[0].frames
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot be decoded beyond frame {count} ({error})") from error
    if count < promised:
        raise ValueError(f"ends after {count} of {promised} frames")


def export(model: LatentActionModel, clips: dict[str, Callable[[], Flows]], out: Path, made: dict, compensate: bool = False,
           pt: bool = False) -> dict:
    """Writes OUT/latent_action_dim14/NAME.safetensors of each clip (`pt`: also NAME.pt, the official form), OUT/statistics.json, with which
    to standardise them, and OUT/summary.json, which is returned. What is there already is kept if it was made in the same way (`made` says
    how the flow was measured). A clip that cannot be used is skipped, with its reason in the summary; ValueError if none can."""
    skipped, figures, folder = {}, [], out / f"latent_action_dim{model.config.latent_dim}"
    made = {"model": model.fingerprint(), "interval": model.config.interval, "radius": model.config.radius, "image": model.config.image,
            "compensate": compensate, **made}
    for name, flows in tqdm(clips.items(), desc="latent actions", unit="clip"):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            try:
                tensors, measured = encode_flows(model, flows(), compensate)
            except ValueError as error:
                skipped[name] = str(error)
                continue
            save_safetensors(path, tensors, {"made": json.dumps(made), "figures": json.dumps(measured)})
        info = read_metadata(path)
        same_config(path, json.loads(info.get("made", "{}")), made)
        figures.append(json.loads(info["figures"]))
        if pt:
            with open_source(path) as source:
                torch.save({key: source.read(key).clone() for key in source.names()} | made, folder / f".{name}.tmp")
            (folder / f".{name}.tmp").replace(folder / f"{name}.pt")
    if not figures:
        raise ValueError(f"no usable clip among {len(clips)}: {'; '.join(f'{name}: {why}' for name, why in list(skipped.items())[:5])}")
    summary = {"clips": len(figures), "skipped": skipped, **{key: sum(f[key] for f in figures) for key in ("rows", "valid_rows")},
               **{key: sum(f[key] * f["rows"] for f in figures) / sum(f["rows"] for f in figures) for key in ("clipped", "camera_share")}}
    statistics = {"mean": model.latent_mean.tolist(), "std": model.latent_std.tolist(), "made": made}
    for name, content in (("statistics.json", statistics), ("summary.json", summary)):
        (out / name).write_text(json.dumps(content, indent=1))
    return summary


def clips_of(args: argparse.Namespace, interval: int, device: str) -> tuple[dict[str, Callable[[], Flows]], dict]:
    """What the command line names: clips by name, and how their flow is measured."""
    toy = args.data == "toy"
    if args.flow == "true" and not toy:
        raise ValueError("--flow true is known of the toy world only; for videos take dis or a DPFlow .ckpt")
    known = {"true": lambda: None, "dis": lambda: DISFlow(upscale=4 if toy else 1)}
    estimator = known.get(args.flow, lambda: load_dpflow(args.flow).to(device))()
    made = {"flow": estimator.name if estimator else "true", "composed": args.composed, "side": "as is" if toy else args.side}
    if toy:
        episodes = {f"{e.embodiment}_level{args.level}_seed{args.seed}_{i:05d}": e
                    for i, e in enumerate(record(args.level, args.episodes, args.seed, args.embodiment))}
        if estimator is None:
            return {name: lambda e=e: true_flows(e, interval) for name, e in episodes.items()}, made
        films = {name: lambda e=e: iter(rearrange(torch.from_numpy(e.frames), "t h w c -> t c h w").float() / 255)
                 for name, e in episodes.items()}
    elif not (films := {path.stem: lambda p=path: read_video(p, args.side) for path in sorted(Path(args.data).glob("*.mp4"))}):
        raise ValueError(f"--data {args.data}: no *.mp4 there; give a folder of them, or the word toy")
    how = dict(estimator=estimator, interval=interval, composed=args.composed, device=device)
    return {name: lambda film=film: measured_flows(film(), **how) for name, film in films.items()}, made


def main(argv: list[str] | None = None) -> None:
    """The command line; what the user got wrong ends in one line."""
    parser = argparse.ArgumentParser(prog="python latent_action.py", description="Latent actions of videos.")
    add = parser.add_subparsers(dest="command", required=True).add_parser("encode", help="videos to latent_action_dim14 files").add_argument
    add("--weights", required=True, type=Path, help="what python train.py --stage latent wrote")
    add("--data", required=True, help="folder of mp4 files, or the word toy")
    add("--out", required=True, type=Path, help="folder to write to; run again to go on where it stopped")
    add("--flow", default="dis", help="dis (default), true (toy only), or a DPFlow .ckpt, whose weights are for research only")
    add("--composed", action="store_true", help="follow the flow from frame to frame instead of measuring over the whole interval")
    add("--compensate", action="store_true", help="take the camera's motion off")
    add("--side", type=int, default=256, help="size at which videos are measured, padded to a square")
    add("--pt", action="store_true", help="also write NAME.pt, the official form")
    for name, kind, default in (("level", int, 6), ("embodiment", str, None), ("seed", int, 0), ("episodes", int, 16)):
        add(f"--{name}", type=kind, default=default, help=f"of the toy world (default {default})")
    args = parser.parse_args(argv)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = LatentActionModel.load(args.weights).to(device)
        clips, made = clips_of(args, model.config.interval, device)
        print(json.dumps(export(model, clips, args.out, made, args.compensate, args.pt), indent=1))
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
