"""Latent actions: a video's motion as 14 numbers that need no robot to have recorded them (paper
Sec. 4.1).

    frames i, i + interval --estimator--> flow (H, W, 2) px --colour--> picture (3, H, W)
      --DC-AE, frozen--> 4 tokens of 512 --whiten, MLP--> mu, logvar (14)
      --MLP--> 4 tokens --DC-AE--> picture --> flow

    loss = reconstruction + lambda_action * |action - mu|^2 + beta * KL      (lambda 1.0, beta 1e-6)

The second term counts where an action is known, in 10 % of the rows. Reconstruction is a mean over
batch and features, alignment over the known entries of the batch, KL a sum over dimensions and a
mean over the batch. The official release has none of this; where the paper is silent we chose:
- Colour is the Middlebury wheel at a fixed radius, with an exact inverse and without its seam (55
  steps close the circle, not 54). What is faster keeps its direction and is counted; a picture's
  own maximum, the usual scale, would hide how fast things move. `code="planes"` shows x, y and
  speed as they are, for a small DC-AE that learns from nothing but flow.
- The first `action_dim` entries of mu are the prediction of the action, without a head between, in
  the units of the labels. Labels are differences over exactly the latent's interval: no position
  can be read off a flow. Every file says its interval; official ones do not.
- Tokens are whitened with saved statistics and reconstructed there, without a pass through the
  DC-AE. `reconstruct="picture"` is the paper's form, dearer by the DC-AE's decoder; a fine-tuned
  DC-AE needs it, or its tokens would shrink to nothing.
- logvar starts at -6: with unit noise at the start the decoder learns to ignore the latent.

Shapes: B batch, N or T rows, H W pixels, D token features, Z latent dimensions (14), A aligned.
"""

import json
import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from attention import mlp
from backbones.dcae import DCAE, DCAEConfig
from backbones.optical_flow import resize_flow
from weights.files import check_keys, digest, open_source, same_config, save_safetensors
from weights.layouts import canonical
from weights.load import load_into


@dataclass(frozen=True)
class LatentActionConfig:
    """Everything that decides what a latent action means."""

    dcae: DCAEConfig
    image: int  # side of the flow picture
    radius: float  # motion of full colour, in pixels of that picture, over one interval
    hidden: tuple[int, ...]  # widths of the encoder's MLP; the decoder mirrors them
    interval: int  # source frames that one latent spans
    action_dim: int  # A: entries of mu that are aligned with real actions
    code: str = "wheel"  # how a picture shows flow: "wheel" or "planes"
    latent_dim: int = 14
    lambda_action: float = 1.0
    beta: float = 1e-6
    reconstruct: str = "tokens"  # "tokens" or "picture"
    moving: float = 0.0  # "picture": a pixel weighs 1 + moving * saturation, against white answers
    finetune_dcae: bool = False

    def __post_init__(self):
        if self.image % self.dcae.factor:
            raise ValueError(
                f"image is {self.image}; expected a multiple of the DC-AE's {self.dcae.factor}"
            )
        if self.interval < 1 or self.radius <= 0 or not 0 <= self.action_dim <= self.latent_dim:
            raise ValueError(
                f"interval is {self.interval}, radius {self.radius}, action_dim {self.action_dim}; "
                f"expected at least 1, above 0, and 0 to latent_dim = {self.latent_dim}"
            )
        if self.code not in TO_PICTURE:
            raise ValueError(f"code is {self.code!r}; expected one of {', '.join(TO_PICTURE)}")
        allowed = ("picture",) if self.finetune_dcae else ("picture", "tokens")
        if self.reconstruct not in allowed:
            raise ValueError(
                f"reconstruct is {self.reconstruct!r} with finetune_dcae={self.finetune_dcae}; "
                "expected 'picture', or 'tokens' with a frozen DC-AE"
            )

    @classmethod
    def of(cls, row: dict, **changes) -> "LatentActionConfig":
        """From plain numbers, as a row of `motus.PRESETS` and a file have them."""
        dcae = {k: tuple(v) if isinstance(v, list) else v for k, v in row["dcae"].items()}
        tuples = {"dcae": DCAEConfig(**dcae), "hidden": tuple(row["hidden"])}
        return cls(**row | tuples | changes)


# -- flow and pictures of it ----------------------------------------------------------------------

# The wheel of 55 steps begins at red, to the right, and passes yellow, green, cyan, blue, magenta.
STEPS = torch.tensor([0.0, 15, 21, 25, 36, 49, 55])
HUES = torch.arange(7.0)


def interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear: `values` at the rising points `known`, in between for x between them."""
    i = torch.bucketize(x, known[1:-1], right=True)
    share = (x - known[i]) / (known[i + 1] - known[i])
    return torch.lerp(values[i], values[i + 1], share)


def flow_to_colour(flow: Tensor, radius: float) -> Tensor:
    """Flow (B, H, W, 2) px -> pictures (B, 3, H, W) in [-1, 1]: direction as hue, speed / radius,
    at most 1, as saturation; rest is white. Up to `radius`, `colour_to_flow` inverts it to 1e-5 of
    the radius, or to 1 % of it if the picture is rounded to 8 bits."""
    x, y = flow.unbind(dim=-1)
    steps = (torch.atan2(y, x) / (2 * math.pi)).remainder(1) * 55
    hue = interpolate(steps, STEPS.to(flow), HUES.to(flow))
    red = (hue - 3).abs() - 1
    green = 2 - (hue - 2).abs()
    blue = 2 - (hue - 4).abs()
    colour = torch.stack([red, green, blue], dim=1).clamp(0, 1)
    speed = flow.norm(dim=-1) / radius
    saturation = speed.clamp(max=1)[:, None]
    return 1 - 2 * saturation * (1 - colour)


def colour_to_flow(pictures: Tensor, radius: float) -> Tensor:
    """The inverse, for any pictures (B, 3, H, W), also imperfect ones: the spread of the channels
    is the speed, their order the hue."""
    high, top = pictures.max(dim=1, keepdim=True)
    spread = high - pictures.amin(dim=1, keepdim=True)
    beside = pictures.roll(-1, dims=1) - pictures.roll(-2, dims=1)
    away = beside.gather(1, top) / spread.clamp(min=1e-6)
    hue = (2 * top + away).remainder(6)
    steps = interpolate(hue, HUES.to(hue), STEPS.to(hue))
    angle = steps * (2 * math.pi / 55)
    direction = torch.cat([angle.cos(), angle.sin()], dim=1)
    speed = spread.clamp(max=2) / 2 * radius
    return rearrange(speed * direction, "b c h w -> b h w c")


def flow_to_planes(flow: Tensor, radius: float) -> Tensor:
    """The same as x, y and speed over the radius: opposite motions are opposite numbers, and an
    autoencoder that knows no pictures learns them far sooner than the wheel's hues."""
    speed = flow.norm(dim=-1, keepdim=True) / radius
    motion = flow / radius / speed.clamp(min=1)
    pace = 2 * speed.clamp(max=1) - 1
    return rearrange(torch.cat([motion, pace], dim=-1), "b h w c -> b c h w")


def planes_to_flow(pictures: Tensor, radius: float) -> Tensor:
    """The inverse, from the planes of x and y."""
    return rearrange(pictures[:, :2], "b c h w -> b h w c") * radius


TO_PICTURE = {"wheel": flow_to_colour, "planes": flow_to_planes}
TO_FLOW = {"wheel": colour_to_flow, "planes": planes_to_flow}

# -- the model ------------------------------------------------------------------------------------


class LatentActionModel(nn.Module):
    """DC-AE tokens of a flow picture to 14 numbers and back:

        flow (B, H, W, 2) --flow_to_tokens--> tokens (B, D) --tokens_to_latent--> mu, logvar (B, Z)
        flow              <--tokens_to_flow-- tokens        <--latent_to_tokens-- mu, or a sample

    Flow that comes in may have any size, and is in pixels of it; what comes out has that of a
    picture. The DC-AE stays in eval mode even when fine-tuned: its statistics must not drift."""

    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        self.grid = config.image // config.dcae.factor  # token positions along one side
        features = self.grid**2 * config.dcae.latent_channels
        self.dcae = DCAE(config.dcae).requires_grad_(config.finetune_dcae)
        self.encoder = mlp(features, *config.hidden, 2 * config.latent_dim)
        self.decoder = mlp(config.latent_dim, *reversed(config.hidden), features)
        nn.init.constant_(self.encoder[-1].bias[config.latent_dim :], -6.0)
        self.register_buffer("token_mean", torch.zeros(features))
        self.register_buffer("token_std", torch.ones(features))
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))
        self.eval()

    def flow_to_picture(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2) -> pictures (B, 3, image, image) in [-1, 1]."""
        resized = resize_flow(flow.to(self.token_mean), self.config.image)
        return TO_PICTURE[self.config.code](resized, self.config.radius)

    def flow_to_tokens(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2) -> token features (B, D), position by position, not whitened."""
        tokens = [self.dcae.encode(self.flow_to_picture(part)) for part in flow.split(64)]
        return rearrange(torch.cat(tokens), "b c h w -> b (h w c)").float()

    def tokens_to_picture(self, tokens: Tensor) -> Tensor:
        """Token features (B, D) -> pictures (B, 3, image, image), about [-1, 1]."""
        latent = rearrange(tokens, "b (h w c) -> b c h w", h=self.grid, w=self.grid)
        return self.dcae.decode(latent)

    def tokens_to_flow(self, tokens: Tensor) -> Tensor:
        """Token features (B, D) -> the motion that they stand for (B, image, image, 2)."""
        return TO_FLOW[self.config.code](self.tokens_to_picture(tokens), self.config.radius)

    def as_tokens(self, x: Tensor) -> Tensor:
        """Token features (B, D) of flow (B, H, W, 2), or of token features."""
        return self.flow_to_tokens(x) if x.ndim == 4 else x.to(self.token_mean)

    def whiten(self, tokens: Tensor) -> Tensor:
        """Unit scale, within +-10: raw DC-AE tokens have heavy tails."""
        return ((tokens - self.token_mean) / self.token_std).clamp(-10, 10)

    def tokens_to_latent(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, D) -> mu, logvar, each (B, Z). The latent action is mu, not a sample."""
        mu, logvar = self.encoder(self.whiten(tokens)).chunk(2, dim=-1)
        return mu, logvar.clamp(-12, 4)

    def latent_to_tokens(self, z: Tensor) -> Tensor:
        """Latents (B, Z), not standardised -> token features (B, D)."""
        return self.decoder(z) * self.token_std + self.token_mean

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents (B, Z) at unit scale, the targets of stage 2."""
        return (latents - self.latent_mean) / self.latent_std

    def loss(
        self,
        x: Tensor,
        actions: Tensor,
        mask: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """x: flow (B, H, W, 2) or its tokens (B, D); actions (B, A), normalised; mask (B, A) bool,
        False where unknown: a whole row of an unlabelled video, an entry that an embodiment lacks.
        Returns the scalars total, reconstruction, alignment, kl."""
        config = self.config
        expected = (len(x), config.action_dim)
        if actions.shape != expected or mask.shape != expected:
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, mask {tuple(mask.shape)}; "
                f"expected (B, action_dim) = {expected}"
            )
        if not actions[mask].isfinite().all():
            raise ValueError(
                "actions are not finite somewhere that mask is True; mask out what is not known"
            )
        tokens = self.as_tokens(x)
        mu, logvar = self.tokens_to_latent(tokens)
        noise = torch.randn(mu.shape, generator=generator).to(mu)
        z = mu + (logvar / 2).exp() * noise
        if config.reconstruct == "tokens":
            reconstruction = F.mse_loss(self.decoder(z), self.whiten(tokens))
        else:
            picture = self.tokens_to_picture(self.latent_to_tokens(z))
            reconstruction = self.picture_loss(picture, x, config.moving)
        # The first entries of mu are the action; where it is not known, nothing pulls.
        error = torch.where(mask, actions - mu[:, : config.action_dim], 0.0)
        alignment = error.square().sum() / mask.sum().clamp(min=1)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
        kl = divergence.sum(dim=1).mean()
        return {
            "total": reconstruction + config.lambda_action * alignment + config.beta * kl,
            "reconstruction": reconstruction,
            "alignment": alignment,
            "kl": kl,
        }

    def picture_loss(self, pictures: Tensor, flow: Tensor, moving: float) -> Tensor:
        """Mean squared error of pictures (B, 3, image, image) of flow (B, H, W, 2), a pixel
        weighing 1 + moving * speed / radius. All pictures count the same, however little of one
        moves: a gripper that opens moves a few pixels."""
        flow = resize_flow(flow, self.config.image)
        speed = (flow.norm(dim=-1) / self.config.radius).clamp(max=1)
        weight = 1 + moving * speed[:, None]
        error = weight * (pictures - self.flow_to_picture(flow)).square()
        share = error.mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))
        return share.mean()

    def picture_config(self) -> dict:
        """The fields that the DC-AE's weights depend on."""
        config = asdict(self.config)
        return {key: config[key] for key in ("dcae", "image", "radius", "code")}

    def fingerprint(self) -> str:
        """Names the latent space: latents of models with different ones must not be mixed."""
        return digest(self.state_dict(), json.dumps(asdict(self.config), sort_keys=True))

    def dcae_fingerprint(self) -> str:
        """Names the tokens: those of models with different ones must not be mixed."""
        return digest(self.dcae.state_dict(), json.dumps(self.picture_config(), sort_keys=True))

    def save(self, path: str | Path) -> None:
        """One safetensors file with weights, statistics and configuration: all that is needed."""
        about = {"latent_action": json.dumps(asdict(self.config))}
        save_safetensors(path, self.state_dict(), about)

    @classmethod
    def load(cls, path: str | Path) -> "LatentActionModel":
        """The model that `save` wrote."""
        with open_source(path) as source:
            if "latent_action" not in source.metadata:
                raise ValueError(
                    f"{path}: holds no latent-action configuration; "
                    "python train.py --stage latent writes such a file"
                )
            stored = json.loads(source.metadata["latent_action"])
            check_keys(stored, LatentActionConfig, path)
            model = cls(LatentActionConfig.of(stored))
            load_into(model, source)
        return model

    def save_dcae(self, path: str | Path) -> None:
        """The DC-AE alone, in half precision."""
        state = deepcopy(self.dcae).half().state_dict()
        save_safetensors(path, state, {"dcae": json.dumps(self.picture_config())})

    def load_dcae(self, path: str | Path) -> None:
        """DC-AE weights: of `save_dcae`, made for the same pictures, or published ones."""
        with open_source(path) as source:
            if "dcae" in source.metadata:
                same_config(path, json.loads(source.metadata["dcae"]), self.picture_config())
            load_into(self.dcae, replace(source, tensors=canonical(source.tensors)))


# -- training -------------------------------------------------------------------------------------


def mixed_rows(labelled: Tensor, batch: int, fraction: float, seed: int, step: int) -> Tensor:
    """Rows of a batch, by seed and step alone, drawn with replacement; `fraction` of them labelled
    (N,): within 1 in a batch, in expectation, and within 1 over any run of steps."""
    share = fraction * batch
    start = np.random.default_rng(seed).random()
    before = math.floor(step * share + start)
    known = math.floor((step + 1) * share + start) - before
    rng = np.random.default_rng([seed, step])
    yes = rng.choice(np.flatnonzero(labelled), known)
    no = rng.choice(np.flatnonzero(~labelled), batch - known)
    return torch.from_numpy(np.concatenate([yes, no]))


def fit(
    model: LatentActionModel,
    rows: tuple[Tensor, Tensor, Tensor],
    settings,
    fraction: float = 0.1,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Trains `model` in place and fits its statistics. `rows`: token features (N, D) or flow (N, H,
    W, 2), which a picture loss needs; labels (N, A), normalised; mask (N, A) bool. `fraction` of
    each batch has labels. `settings`: steps, batch, lr, warmup, floor (share of lr at the end),
    weight_decay, seed. `log` gets the losses after each step."""
    x, labels, mask = rows
    labelled = mask.any(dim=1)
    if labelled.all() or not labelled.any():
        raise ValueError(
            f"{labelled.sum()} rows are labelled and {(~labelled).sum()} are not; both are drawn "
            "from: label a part of the clips (python -m scripts.latents tokens --labelled 0.1)"
        )
    with torch.no_grad():
        if model.config.reconstruct == "tokens" and x.ndim == 4:
            x = model.flow_to_tokens(x)  # a frozen DC-AE sees each flow once
        model.token_std, model.token_mean = torch.std_mean(model.as_tokens(x), dim=0)
    model.token_std.clamp_(min=0.01 * model.token_std.mean())  # of what hardly varies
    generator = torch.Generator().manual_seed(settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def rate(step: int) -> float:  # a rise, then a cosine down to the floor
        rise = min(1.0, (step + 1) / max(1, settings.warmup))
        cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
        return rise * (settings.floor + (1 - settings.floor) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(settings.steps), desc="stage latent", mininterval=1):
        drawn = mixed_rows(labelled, settings.batch, fraction, settings.seed, step)
        batch = [part[drawn].to(model.token_mean.device) for part in (x, labels, mask)]
        losses = model.loss(*batch, generator)
        if not losses["total"].isfinite():
            raise ValueError(
                f"step {step}: latent-action loss is {losses['total'].item()}; "
                f"rows {drawn.tolist()}. Lower lr, now {settings.lr}"
            )
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        optimizer.step()
        schedule.step()
        if log:
            log(step + 1, {name: loss.item() for name, loss in losses.items()})
    with torch.no_grad():
        mu, _ = model.tokens_to_latent(model.as_tokens(x))
    model.latent_std, model.latent_mean = torch.std_mean(mu, dim=0)
    model.latent_std.clamp_(min=1e-4)


def probe(latents: Tensor, labels: Tensor, test_latents: Tensor, test_labels: Tensor) -> Tensor:
    """R^2 (A,) on test rows of the best linear map from latents (N, Z) to labels (N, A), by ridge
    regression: how much of the true motion they hold."""
    mean = latents.mean(dim=0)
    std = latents.std(dim=0).clamp(min=1e-6)
    x = F.pad((latents - mean) / std, (0, 1), value=1.0).double()
    test = F.pad((test_latents - mean) / std, (0, 1), value=1.0).double()
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.mT @ x + ridge, x.mT @ labels.double())
    error = (test @ weights - test_labels).square().mean(dim=0)
    variance = test_labels.double().var(dim=0, correction=0)
    return (1 - error / variance.clamp(min=1e-12)).float()


@torch.no_grad()
def encode_flows(
    model: LatentActionModel, flows: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict]:
    """tokens (T, D), latent_action (T, 14), not standardised, logvar (T, 14) and valid (T,) of a
    clip's `flows`: flow (n, H, W, 2) and valid (n,), chunk after chunk. Row i spans frames i to i +
    interval of T + 1; those that end early are not valid. And figures: rows, valid_rows, `clipped`,
    the share of moving pixels (faster than radius / 100) beyond the radius."""
    tokens = []
    valid = []
    moving = fast = 0
    for flow, known in flows:
        flow = resize_flow(flow.to(model.token_mean), model.config.image)
        tokens.append(model.flow_to_tokens(flow))
        valid.append(known.cpu())
        speed = flow.norm(dim=-1) / model.config.radius
        moving += (speed > 0.01).sum().item()
        fast += (speed > 1).sum().item()
    if not any(part.any() for part in valid):
        raise ValueError(
            f"none of its {sum(map(len, valid))} rows is usable: that takes "
            f"{model.config.interval + 1} frames of more than one colour"
        )
    tokens = torch.cat(tokens)
    valid = torch.cat(valid)
    mu, logvar = model.tokens_to_latent(tokens)
    tensors = {
        "tokens": tokens.cpu(),
        "latent_action": mu.cpu(),
        "logvar": logvar.cpu(),
        "valid": valid,
    }
    figures = {
        "rows": len(valid),
        "valid_rows": valid.sum().item(),
        "clipped": fast / max(moving, 1),
    }
    return tensors, figures
