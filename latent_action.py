"""Latent actions: what a video shows of an action, as 14 numbers that need no robot to have
recorded them (paper Sec. 4.1).

    frames i, i + interval --FlowEstimator--> flow (H, W, 2) px --colour--> picture (3, H, W) in [-1, 1]
      --DC-AE, frozen--> 4 tokens of 512, whitened --MLP--> mu, logvar (14) --MLP--> 4 tokens --DC-AE--> picture --> flow

    loss = reconstruction + lambda_action * |action - mu|^2 where an action is known (10 %) + beta * KL      (lambda 1.0, beta 1e-6)

Reductions: reconstruction is a mean over batch and features, alignment over the known entries of
the batch, KL a sum over dimensions and a mean over the batch. The official release has none of
this; where the paper is silent the choices are ours:
- Colour is the Middlebury wheel at a fixed radius, with an exact inverse and without its seam (55
  steps close the circle, not 54). What is faster keeps its direction and is counted. Scaling each
  picture by its own maximum, as usual, would lose how fast things move. `code="planes"` shows x, y
  and speed as they are instead, for a DC-AE that learns from nothing but flow, as the toy's does.
- The first `action_dim` entries of mu are the prediction of the action, without a head between, so
  they have the units of the labels. Labels are differences over exactly the latent's interval: no
  position can be read off a flow.
- Tokens are whitened with saved statistics and reconstructed there, so training needs no pass
  through the DC-AE. `reconstruct="picture"` is the paper's form, dearer by the DC-AE's decoder; a
  fine-tuned DC-AE needs it, or its tokens would shrink to nothing.
- logvar starts at -6: with unit noise at the start the decoder learns to ignore the latent.
- `interval` is part of the configuration and of every file: official files do not say what theirs
  is. latent_data.py turns videos into latent actions, and into what this file trains on; its
  commands are started here.

Shapes: B batch, H W height and width, D token features (positions * channels), Z latent dimensions
(14), A aligned dimensions.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from attention import mlp
from backbones.dcae import DCAE, DCAEConfig
from weights.files import digest, open_source, save_safetensors
from weights.layouts import canonical
from weights.load import load_into
from worlds.motions import Pairs, true_flows
from worlds.tabletop import Episode

# -- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentActionConfig:
    """Everything that decides what a latent action means."""

    dcae: DCAEConfig
    image: int  # side of the flow picture
    radius: float  # motion of full colour, in pixels of that picture, over one interval
    code: str = field(
        default="wheel", kw_only=True
    )  # how a picture shows flow: "wheel" or "planes"
    hidden: tuple[int, ...]  # widths of the encoder's MLP; the decoder mirrors them
    interval: int  # source frames that one latent spans
    action_dim: int  # A: entries of mu that are aligned with real actions
    latent_dim: int = 14
    lambda_action: float = 1.0
    beta: float = 1e-6
    reconstruct: str = "tokens"  # "tokens" or "picture"
    moving: float = (
        0.0  # "picture": a pixel weighs 1 + moving * saturation, against all-white answers
    )
    finetune_dcae: bool = False

    def __post_init__(self):
        if self.image % self.dcae.factor:
            raise ValueError(
                f"image is {self.image}; the DC-AE needs a multiple of {self.dcae.factor}"
            )
        if self.interval < 1 or self.radius <= 0 or not 0 <= self.action_dim <= self.latent_dim:
            raise ValueError(
                f"interval is {self.interval}, radius {self.radius}, action_dim {self.action_dim}; allowed: interval >= 1, "
                f"radius > 0, action_dim from 0 to latent_dim = {self.latent_dim}"
            )
        if self.code not in ("wheel", "planes"):
            raise ValueError(f"code is {self.code!r}; allowed: 'wheel', 'planes'")
        if self.reconstruct not in ("tokens", "picture") or (
            self.finetune_dcae and self.reconstruct == "tokens"
        ):
            raise ValueError(
                f"reconstruct is {self.reconstruct!r} with finetune_dcae={self.finetune_dcae}; allowed: 'picture', or "
                "'tokens' with a frozen DC-AE"
            )

    @classmethod
    def of(cls, row: dict, **changes) -> "LatentActionConfig":
        """From plain numbers, as a row of `motus.PRESETS` and a file have them."""
        dcae = {k: tuple(v) if isinstance(v, list) else v for k, v in row["dcae"].items()}
        fields = row | {"dcae": DCAEConfig(**dcae), "hidden": tuple(row["hidden"])}
        return cls(**fields | changes)

    @property
    def grid(self) -> int:
        """Token positions along one side."""
        return self.image // self.dcae.factor


# -- flow: colour, size, camera -------------------------------------------------------------------

# The wheel runs red, yellow, green, cyan, blue, magenta, red; on each stretch one channel rises or
# falls and the others rest at 0 or 1.
BOUNDS = torch.tensor([0.0, 15, 21, 25, 36, 49, 55])
CORNERS = torch.tensor(
    [[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]]
)
STRETCH = torch.tensor([[0, 5, 0], [2, 0, 1], [3, 4, 0]])  # by the largest and the smallest channel


def flow_to_colour(flow: Tensor, radius: float) -> Tensor:
    """Flow (B, H, W, 2) px -> pictures (B, 3, H, W) in [-1, 1]: direction as hue, speed / radius,
    at most 1, as saturation; rest is white. Up to `radius`, `colour_to_flow` inverts it to 1e-5 of
    the radius, or to 1 % of it if the picture is rounded to 8 bits."""
    bounds, corners = BOUNDS.to(flow), CORNERS.to(flow)
    at = torch.atan2(flow[..., 1], flow[..., 0]).div(2 * math.pi).remainder(1) * 55
    stretch = torch.bucketize(at, bounds[1:-1], right=True)
    hue = torch.lerp(
        corners[stretch],
        corners[stretch + 1],
        ((at - bounds[stretch]) / bounds.diff()[stretch])[..., None],
    )
    saturation = (flow.norm(dim=-1, keepdim=True) / radius).clamp(max=1)
    return rearrange(1 - 2 * saturation * (1 - hue), "b h w c -> b c h w")


def colour_to_flow(pictures: Tensor, radius: float) -> Tensor:
    """The inverse, for any pictures (B, 3, H, W), also imperfect ones: the spread of the channels
    is the speed, their order the hue."""
    (high, top), (low, bottom) = pictures.max(dim=1), pictures.min(dim=1)
    part = (pictures.sum(dim=1) - high - 2 * low) / (high - low).clamp(min=1e-6)
    stretch, bounds = STRETCH.to(pictures.device)[top, bottom], BOUNDS.to(pictures)
    part = torch.where(stretch % 2 == 0, part, 1 - part)  # even stretches rise, odd ones fall
    angle = (bounds[stretch] + part * bounds.diff()[stretch]) * (2 * math.pi / 55)
    return ((high - low).clamp(max=2) / 2 * radius)[..., None] * torch.stack(
        [angle.cos(), angle.sin()], dim=-1
    )


def flow_to_planes(flow: Tensor, radius: float) -> Tensor:
    """Flow (B, H, W, 2) px -> pictures (B, 3, H, W) in [-1, 1]: x, y and speed as they are, over
    the radius. Opposite motions are opposite numbers, and an autoencoder that knows no pictures
    learns them far sooner than the wheel's hues."""
    speed = flow.norm(dim=-1, keepdim=True) / radius
    planes = torch.cat([flow / radius / speed.clamp(min=1), 2 * speed.clamp(max=1) - 1], dim=-1)
    return rearrange(planes, "b h w c -> b c h w")


def planes_to_flow(pictures: Tensor, radius: float) -> Tensor:
    """The inverse, from the planes of x and y."""
    return rearrange(pictures[:, :2], "b c h w -> b h w c") * radius


CODES = {"wheel": (flow_to_colour, colour_to_flow), "planes": (flow_to_planes, planes_to_flow)}


def over_range(flow: Tensor, radius: float) -> float:
    """Share of the moving pixels (faster than radius / 100) that are too fast for the wheel and get
    clipped."""
    speed = flow.norm(dim=-1)
    return ((speed > radius).sum() / (speed > radius / 100).sum().clamp(min=1)).item()


def resize_flow(flow: Tensor, side: int) -> Tensor:
    """Flow (B, H, W, 2) -> (B, side, side, 2), in pixels of the new size. Resize flow, never its
    colours: those do not mix."""
    if flow.ndim != 4 or flow.shape[-1] != 2:
        raise ValueError(f"flow has shape {tuple(flow.shape)}; it must be (B, H, W, 2), in pixels")
    if bad := (~flow.isfinite()).sum().item():
        raise ValueError(
            f"flow holds {bad} values that are not finite; check the flow estimator and its input"
        )
    if flow.shape[1:3] == (side, side):
        return flow.float()
    scale = flow.new_tensor([side / flow.shape[2], side / flow.shape[1]])
    resized = F.interpolate(
        rearrange(flow.float(), "b h w c -> b c h w"), (side, side), mode="bilinear", antialias=True
    )
    return rearrange(resized, "b c h w -> b h w c") * scale


def global_motion(flow: Tensor, scale: float = 0.5, rounds: int = 10) -> Tensor:
    """The camera's part of flow (B, H, W, 2), of the same shape: an affine field, fitted by
    reweighted least squares. What moves by itself, by more than about `scale` px, does not pull it
    as long as it covers less than half of the picture."""
    height, width = flow.shape[1:3]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    basis = rearrange(torch.stack([torch.ones_like(x), x, y]), "k h w -> (h w) k").to(flow)
    target = rearrange(flow, "b h w c -> b (h w) c")
    fit = target.median(dim=1, keepdim=True).values.expand_as(target)
    for _ in range(rounds):
        weight = (1 + (target - fit).square().sum(-1, keepdim=True) / scale**2) ** -2
        weighted = (basis * weight).mT  # (B, 3, HW)
        fit = basis @ torch.linalg.solve(weighted @ basis, weighted @ target)
    return rearrange(fit, "b (h w) c -> b h w c", h=height)


# -- the model ------------------------------------------------------------------------------------


class LatentActionModel(nn.Module):
    """DC-AE tokens of a flow picture to 14 numbers and back. Its file holds all that is needed to
    use its latents."""

    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        features = config.grid**2 * config.dcae.latent_channels
        self.dcae = DCAE(config.dcae).requires_grad_(config.finetune_dcae).eval()
        self.encoder = mlp(features, *config.hidden, 2 * config.latent_dim)
        self.decoder = mlp(config.latent_dim, *reversed(config.hidden), features)
        nn.init.constant_(self.encoder[-1].bias[config.latent_dim :], -6.0)
        for name, size in (("token", features), ("latent", config.latent_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def train(self, mode: bool = True) -> "LatentActionModel":
        """The DC-AE stays in eval mode even when fine-tuned: its batch statistics must not drift."""
        super().train(mode)
        self.dcae.eval()
        return self

    def picture(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2), in pixels of its own size -> pictures (B, 3, image, image) in [-1, 1]."""
        return CODES[self.config.code][0](resize_flow(flow, self.config.image), self.config.radius)

    def tokens(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2), in pixels of its own size -> token features (B, D), position by
        position, not whitened."""
        with torch.set_grad_enabled(self.config.finetune_dcae and torch.is_grad_enabled()):
            parts = (self.picture(part) for part in flow.split(64))
            return rearrange(
                torch.cat([self.dcae.encode(part) for part in parts]), "b c h w -> b (h w c)"
            ).float()

    @torch.no_grad()
    def fit_whitening(self, tokens: Tensor) -> None:
        """Before training: mean and std of token features (N, D); what hardly varies gets 1 % of
        the mean std."""
        std = tokens.std(dim=0)
        self.token_mean.copy_(tokens.mean(dim=0))
        self.token_std.copy_(std.clamp(min=0.01 * std.mean().item()))

    @torch.no_grad()
    def fit_latents(self, tokens: Tensor) -> None:
        """After training: mean and std of mu over token features (N, D). With them `standardise`
        gives stage 2 targets of unit scale."""
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
        return self.dcae.decode(
            rearrange(tokens, "b (h w c) -> b c h w", h=self.config.grid, w=self.config.grid)
        )

    def flow_of(self, z: Tensor) -> Tensor:
        """Latents (B, Z), not standardised -> the motion they stand for, (B, H, W, 2) in pixels of
        the flow picture."""
        return CODES[self.config.code][1](self.picture_of(self.decode(z)), self.config.radius)

    def loss(
        self, x: Tensor, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """x: flow (B, H, W, 2) or its tokens (B, D); actions (B, A), normalised; mask (B, A) bool,
        False where unknown: a whole row of an unlabelled video, an entry that an embodiment lacks.
        Returns the scalars total, reconstruction, alignment, kl."""
        config = self.config
        if actions.shape != (len(x), config.action_dim) or mask.shape != actions.shape:
            raise ValueError(
                f"actions {tuple(actions.shape)} and mask {tuple(mask.shape)} must both be (B, action_dim) = "
                f"{(len(x), config.action_dim)}"
            )
        if len(bad := (mask & ~actions.isfinite()).nonzero()):
            raise ValueError(
                f"actions{bad[0].tolist()} is {actions[tuple(bad[0])]:g} although mask is True; mask out what is not known"
            )
        if config.reconstruct == "picture" and x.ndim != 4:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; reconstruct='picture' needs flow (B, H, W, 2)"
            )
        tokens = self.tokens(x) if x.ndim == 4 else x
        mu, logvar = self.encode(tokens)
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator).to(mu)
        if config.reconstruct == "tokens":
            reconstruction = F.mse_loss(self.decoder(z), self.whiten(tokens))
        else:
            reconstruction = self.picture_loss(self.picture_of(self.decode(z)), x, config.moving)
        alignment = torch.where(
            mask, actions - mu[:, : config.action_dim], 0.0
        ).square().sum() / mask.sum().clamp(min=1)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        total = reconstruction + config.lambda_action * alignment + config.beta * kl
        return {"total": total, "reconstruction": reconstruction, "alignment": alignment, "kl": kl}

    def picture_loss(self, pictures: Tensor, flow: Tensor, moving: float) -> Tensor:
        """Mean squared error of pictures (B, 3, image, image) of flow (B, H, W, 2), a pixel
        weighing 1 + moving * speed / radius. All pictures count the same, however little of one
        moves: a gripper that opens moves a few pixels."""
        target = resize_flow(flow, self.config.image)
        weight = 1 + moving * (target.norm(dim=-1) / self.config.radius).clamp(max=1)[:, None]
        error = (
            weight * (pictures - CODES[self.config.code][0](target, self.config.radius)).square()
        ).mean(dim=(1, 2, 3))
        return (error / weight.mean(dim=(1, 2, 3))).mean()

    def fingerprint(self) -> str:
        """Names the latent space: latents of models with different fingerprints must not be mixed."""
        return digest(self.state_dict(), json.dumps(asdict(self.config), sort_keys=True))

    def dcae_fingerprint(self) -> str:
        """Names the tokens: those of models with different ones must not be mixed."""
        return digest(self.dcae.state_dict(), json.dumps(self.picture_config(), sort_keys=True))

    def save(self, path: str | Path, meta: dict[str, str] | None = None) -> None:
        """One safetensors file with weights, statistics and configuration."""
        save_safetensors(
            path,
            self.state_dict(),
            {"latent_action": json.dumps(asdict(self.config)), **(meta or {})},
        )

    @classmethod
    def load(
        cls, path: str | Path, config: LatentActionConfig | None = None
    ) -> "LatentActionModel":
        """What `save` wrote, in eval mode. With `config`, ValueError unless the file was made with
        exactly that one."""
        with open_source(path) as source:
            if "latent_action" not in source.metadata:
                raise ValueError(
                    f"{path}: holds no latent-action configuration; python train.py --stage latent writes such a file"
                )
            found = json.loads(source.metadata["latent_action"])
            same_config(path, found, asdict(config) if config else found)
            try:
                dcae = {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in found["dcae"].items()
                }
                model = cls(
                    LatentActionConfig(
                        **found | {"dcae": DCAEConfig(**dcae), "hidden": tuple(found["hidden"])}
                    )
                )
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: its configuration is of another version ({error}); train it again"
                ) from error
            load_into(model, source)
        return model.eval()

    def picture_config(self) -> dict:
        """What the DC-AE's weights depend on."""
        return {key: asdict(self.config)[key] for key in ("dcae", "image", "radius", "code")}

    def save_dcae(self, path: str | Path) -> None:
        """The DC-AE alone, in half precision."""
        state = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in self.dcae.state_dict().items()
        }
        save_safetensors(path, state, {"dcae": json.dumps(self.picture_config())})

    def load_dcae(self, path: str | Path) -> None:
        """DC-AE weights: of `save_dcae`, made for the same pictures, or published ones."""
        with open_source(path) as source:
            if "dcae" in source.metadata:
                same_config(path, json.loads(source.metadata["dcae"]), self.picture_config())
            load_into(self.dcae, replace(source, tensors=canonical(source.tensors)))


def same_config(path: str | Path, found: dict, wanted: dict) -> None:
    """ValueError that lists the fields in which two configurations differ."""
    wanted = json.loads(json.dumps(wanted))  # json makes lists of tuples
    if different := [
        f"{key}={found.get(key)} instead of {wanted.get(key)}"
        for key in wanted | found
        if found.get(key) != wanted.get(key)
    ]:
        raise ValueError(
            f"{path}: made with {', '.join(different)}; use a file of the same configuration, or change the configuration"
        )


def other_bodies(
    flow: Tensor, generator: torch.Generator, shift: float = 0.2, thicker: int = 3
) -> Tensor:
    """The same motions as made by other bodies elsewhere: flow (B, H, W, 2) shifted by up to
    `shift` of the picture, and what moves thickened by 0 to `thicker` px. Labels stay true. Aligned
    with one robot's flow alone, mu takes a larger body for a faster one."""
    turned, (_, height, width, _) = [], flow.shape
    reach = (torch.tensor([height, width]) * shift).int()
    for one, grow, way in zip(
        flow,
        torch.randint(thicker + 1, (len(flow),), generator=generator).tolist(),
        torch.rand(len(flow), 2, generator=generator),
    ):
        down, right = ((2 * way - 1) * reach).round().int().tolist()
        padded = F.pad(one, (0, 0, reach[1], reach[1], reach[0], reach[0]))
        one = padded[reach[0] - down :, reach[1] - right :][:height, :width]
        if grow:  # each pixel follows the fastest within reach
            speed = one.norm(dim=-1)[None]
            fastest = F.max_pool2d(speed, 2 * grow + 1, 1, grow, return_indices=True)[1][0]
            still = speed[0] < 0.1
            one = torch.where(still[..., None], one.reshape(-1, 2)[fastest], one)
        turned.append(one)
    return torch.stack(turned)


class MixedSampler:
    """Rows of a batch as a function of seed and step: `fraction` of them labelled, drawn with
    replacement. The number of labelled rows is within 1 of fraction * batch, equals it in
    expectation, and over any run of steps adds up to it within 1."""

    def __init__(self, labelled: Tensor, batch: int, fraction: float = 0.1, seed: int = 0):
        self.pools = [np.flatnonzero(pool) for pool in (labelled.numpy(), ~labelled.numpy())]
        self.batch, self.share, self.seed, self.start = (
            batch,
            fraction * batch,
            seed,
            np.random.default_rng(seed).random(),
        )
        if (fraction > 0 and not len(self.pools[0])) or (fraction < 1 and not len(self.pools[1])):
            raise ValueError(
                f"fraction is {fraction}, but {len(self.pools[0])} rows are labelled and {len(self.pools[1])} are not; both "
                "are drawn from: give labels to a part of the clips (latent_action.py tokens --labelled 0.1)"
            )

    def __call__(self, step: int) -> Tensor:
        count = math.floor((step + 1) * self.share + self.start) - math.floor(
            step * self.share + self.start
        )
        rng = np.random.default_rng([self.seed, step])
        return torch.from_numpy(
            np.concatenate(
                [rng.choice(p, n) for p, n in zip(self.pools, (count, self.batch - count)) if n]
            )
        )


def fit(
    model: LatentActionModel,
    x: Tensor,
    labels: Tensor,
    mask: Tensor,
    steps: int,
    batch: int = 128,
    lr: float = 2e-3,
    warmup: int = 50,
    floor: float = 0.1,
    weight_decay: float = 0.01,
    fraction: float = 0.1,
    seed: int = 0,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Trains `model` in place and fits its statistics. x: token features (N, D), or flow (N, H, W,
    2) if the picture is reconstructed; labels (N, A), normalised, with mask (N, A) bool; `fraction`
    of each batch has labels. `log` gets the losses after each step."""
    device, generator = model.token_mean.device, torch.Generator().manual_seed(seed)
    tokens = lambda: (
        torch.cat([model.tokens(part.to(device)) for part in x.split(256)])
        if x.ndim == 4
        else x.to(device)
    )
    with torch.no_grad():
        model.fit_whitening(tokens().float())
    sampler = MixedSampler(mask.any(dim=1), batch, fraction, seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        weight_decay=weight_decay,
        fused=True,
    )
    shape = lambda step: (
        min(1.0, (step + 1) / max(1, warmup))
        * (floor + (1 - floor) * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    model.train()
    for step in tqdm(range(steps), desc="stage latent", mininterval=1):
        rows = sampler(step)
        losses = model.loss(
            x[rows].to(device).float(), labels[rows].to(device), mask[rows].to(device), generator
        )
        if not losses["total"].isfinite():
            raise ValueError(
                f"step {step}: latent-action loss is {losses['total'].item()}; rows {rows.tolist()}. Lower lr, now {lr}"
            )
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        optimizer.step()
        schedule.step()
        if log:
            log(step + 1, {name: loss.item() for name, loss in losses.items()})
    model.eval()
    with torch.no_grad():
        model.fit_latents(tokens().float())


def probe(
    latents: Tensor, labels: Tensor, test_latents: Tensor, test_labels: Tensor, ridge: float = 1e-3
) -> Tensor:
    """R^2 (A,) on test rows of the best linear map from latents (N, Z) to labels (N, A): how much
    of the true motion they hold."""
    design = lambda x: F.pad(
        (x - latents.mean(dim=0)) / latents.std(dim=0).clamp(min=1e-6), (0, 1), value=1.0
    ).double()
    x, y, target = design(latents), labels.double(), test_labels.double()
    weights = torch.linalg.solve(
        x.mT @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y
    )
    error = (design(test_latents) @ weights - target).square().sum(dim=0)
    return (1 - error / (target - target.mean(dim=0)).square().sum(dim=0).clamp(min=1e-12)).float()


# -- motions of whole clips -----------------------------------------------------------------------

# A clip of T + 1 frames has T rows, as official files do. Row i is the motion from frame i to i +
# interval; the last rows, which have no such frame, end at the last one and are not valid. Nor are
# rows that touch a frame of one colour, whose motion nobody can see.
Flows = Iterator[tuple[Tensor, Tensor]]  # flow (n, H, W, 2) and valid (n,) bool, chunk after chunk


def prepared(
    model: LatentActionModel, flows: Flows, compensate: bool, figures: dict[str, float]
) -> Flows:
    """Flow at the size of the model's pictures, the camera's motion taken off if wanted. Fills
    `figures`: rows, valid rows, the share of moving pixels beyond the colour range, the camera's
    share of the motion. ValueError if no row is usable."""
    counts = []
    for flow, valid in flows:
        flow = resize_flow(flow.to(model.token_mean.device), model.config.image)
        camera = global_motion(flow)
        moved, own = camera.norm(dim=-1).sum().item(), (flow - camera).norm(dim=-1).sum().item()
        flow = flow - camera if compensate else flow
        counts.append(
            (
                len(flow),
                valid.sum().item(),
                len(flow) * over_range(flow, model.config.radius),
                moved,
                own,
            )
        )
        yield flow, valid
    count, usable, clipped, moved, own = np.sum(counts, axis=0) if counts else np.zeros(5)
    if not usable:
        raise ValueError(
            f"none of its {count:g} rows is usable: that takes {model.config.interval + 1} frames of more than one colour"
        )
    figures |= {
        "rows": int(count),
        "valid_rows": int(usable),
        "clipped": clipped / count,
        "camera_share": moved / max(moved + own, 1e-9),
    }


@torch.no_grad()
def encode_flows(
    model: LatentActionModel, flows: Flows, compensate: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """-> latent_action (T, 14), not standardised, logvar (T, 14), valid (T,); and the figures of
    `prepared`."""
    figures: dict[str, float] = {}
    rows = [
        (*model.encode(model.tokens(flow)), valid)
        for flow, valid in prepared(model, flows, compensate, figures)
    ]
    tensors = dict(
        zip(
            ("latent_action", "logvar", "valid"), (torch.cat(column).cpu() for column in zip(*rows))
        )
    )
    if not tensors["latent_action"].isfinite().all():
        raise ValueError("its latents are not finite; check the weights of the encoder")
    return tensors, figures


def mirrored(flow: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flow (B, H, W, 2) and labels (B, A) of toy motions, whose first two are x and y, as mirrors
    on two sides show them."""
    for axis, row in ((0, 2), (1, 1)):
        if torch.rand((), generator=generator) < 0.5:
            sign = torch.ones(2).index_fill(0, torch.tensor(axis), -1.0)
            flow, labels = (
                flow.flip(row) * sign,
                labels * F.pad(sign, (0, labels.shape[1] - 2), value=1.0),
            )
    return flow, labels


def toy_rows(
    model: LatentActionModel, pairs: Pairs, copies: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fit` trains on: tokens (or flow, if the model reconstructs pictures), labels and mask.
    The pairs come first, each once; labelled ones again `copies` times, mirrored and as other
    bodies would make them, and twice as often if the gripper moves."""
    generator, flow, labels, labelled = (
        torch.Generator().manual_seed(seed),
        [pairs.flow],
        [pairs.labels],
        pairs.labelled.nonzero()[:, 0],
    )
    again = torch.cat([labelled, labelled[pairs.labels[labelled, 2].abs() > 0.1]])
    for part in again.repeat(copies).split(64):
        motion, label = mirrored(pairs.flow[part], pairs.labels[part], generator)
        flow.append(other_bodies(motion, generator)), labels.append(label)
    device, known = (
        model.token_mean.device,
        torch.cat([pairs.labelled, torch.ones(copies * len(again), dtype=torch.bool)]),
    )
    encode = (
        (lambda x: x)
        if model.config.reconstruct == "picture"
        else (lambda x: model.tokens(x.to(device)).cpu())
    )
    with torch.no_grad():
        return (
            torch.cat([encode(part) for part in flow]),
            torch.cat(labels),
            known[:, None].expand(-1, model.config.action_dim),
        )


def encode_episodes(
    model: LatentActionModel, episodes: list[Episode], interval: int, standardise: bool = True
) -> list[np.ndarray]:
    """Latent actions (T, 14) float32 of each episode of T steps, from true flow; row i spans steps
    i to i + interval, or to the end."""
    if interval != model.config.interval:
        raise ValueError(
            f"interval is {interval}, but one latent of this model spans {model.config.interval}"
        )
    latents = [
        encode_flows(model, true_flows(episode, interval))[0]["latent_action"]
        for episode in episodes
    ]
    return [
        (model.standardise(z.to(model.latent_mean)) if standardise else z).cpu().numpy()
        for z in latents
    ]
