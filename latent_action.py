"""Latent actions: a video's motion as 14 numbers that need no robot to have recorded them (paper
Sec. 4.1).

    frames i, i + interval --FlowEstimator--> flow (H, W, 2) px --colour--> picture (3, H, W) in [-1, 1]
      --DC-AE, frozen--> 4 tokens of 512 --whitened, MLP--> mu, logvar (14) --MLP--> 4 tokens --DC-AE--> picture --> flow

    loss = reconstruction + lambda_action * |action - mu|^2 where an action is known (10 %) + beta * KL      (lambda 1.0, beta 1e-6)

Reductions: reconstruction is a mean over batch and features, alignment over the known entries of
the batch, KL a sum over dimensions and a mean over the batch. The official release has none of
this; where the paper is silent the choices are ours:
- Colour is the Middlebury wheel at a fixed radius, with an exact inverse and without its seam (55
  steps close the circle, not 54). What is faster keeps its direction and is counted. Scaling each
  picture by its own maximum, as usual, would lose how fast things move. `code="planes"` shows x, y
  and speed as they are instead, for a small DC-AE that learns from nothing but flow.
- The first `action_dim` entries of mu are the prediction of the action, without a head between, so
  they have the units of the labels. Labels are differences over exactly the latent's interval: no
  position can be read off a flow.
- Tokens are whitened with saved statistics and reconstructed there, so training needs no pass
  through the DC-AE. `reconstruct="picture"` is the paper's form, dearer by the DC-AE's decoder; a
  fine-tuned DC-AE needs it, or its tokens would shrink to nothing.
- logvar starts at -6: with unit noise at the start the decoder learns to ignore the latent.
- `interval` is part of the configuration and of every file: official files do not say what theirs
  is. `python -m scripts.latents` turns videos into latent actions, and into what `fit` trains on.

Shapes: B batch, N rows, T rows of a clip, H W height and width, D token features (positions *
channels), Z latent dimensions (14), A aligned dimensions.
"""

import json
import math
from collections.abc import Callable, Iterable
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
from weights.files import digest, open_source, save_safetensors
from weights.layouts import canonical
from weights.load import load_into

# -- configuration --------------------------------------------------------------------------------


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
    # "picture": a pixel weighs 1 + moving * saturation, or an all-white answer is nearly right
    moving: float = 0.0
    finetune_dcae: bool = False

    def __post_init__(self):
        if self.image % self.dcae.factor:
            raise ValueError(
                f"image is {self.image}; expected a multiple of the DC-AE's {self.dcae.factor}"
            )
        if self.interval < 1 or self.radius <= 0 or not 0 <= self.action_dim <= self.latent_dim:
            raise ValueError(
                f"interval is {self.interval}, radius {self.radius}, action_dim {self.action_dim}; "
                "expected interval >= 1, radius > 0, "
                f"action_dim from 0 to latent_dim = {self.latent_dim}"
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
        fields = row | {"dcae": DCAEConfig(**dcae), "hidden": tuple(row["hidden"])}
        return cls(**fields | changes)

    @property
    def grid(self) -> int:
        """Token positions along one side."""
        return self.image // self.dcae.factor


# -- flow and pictures of it ----------------------------------------------------------------------

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
    place = torch.atan2(flow[..., 1], flow[..., 0]).div(2 * math.pi).remainder(1) * 55
    stretch = torch.bucketize(place, bounds[1:-1], right=True)
    along = (place - bounds[stretch]) / bounds.diff()[stretch]
    hue = torch.lerp(corners[stretch], corners[stretch + 1], along[..., None])
    saturation = (flow.norm(dim=-1, keepdim=True) / radius).clamp(max=1)
    return rearrange(1 - 2 * saturation * (1 - hue), "b h w c -> b c h w")


def colour_to_flow(pictures: Tensor, radius: float) -> Tensor:
    """The inverse, for any pictures (B, 3, H, W), also imperfect ones: the spread of the channels
    is the speed, their order the hue."""
    high, top = pictures.max(dim=1)
    low, bottom = pictures.min(dim=1)
    spread = high - low
    along = (pictures.sum(dim=1) - high - 2 * low) / spread.clamp(min=1e-6)
    stretch = STRETCH.to(pictures.device)[top, bottom]
    along = torch.where(stretch % 2 == 0, along, 1 - along)  # even stretches rise, odd ones fall
    bounds = BOUNDS.to(pictures)
    angle = (bounds[stretch] + along * bounds.diff()[stretch]) * (2 * math.pi / 55)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return (spread.clamp(max=2) / 2 * radius)[..., None] * direction


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


TO_PICTURE = {"wheel": flow_to_colour, "planes": flow_to_planes}
TO_FLOW = {"wheel": colour_to_flow, "planes": planes_to_flow}


def over_range(flow: Tensor, radius: float) -> float:
    """Share of the moving pixels (faster than radius / 100) that are too fast for the wheel and get
    clipped."""
    speed = flow.norm(dim=-1)
    return ((speed > radius).sum() / (speed > radius / 100).sum().clamp(min=1)).item()


def resize_flow(flow: Tensor, side: int) -> Tensor:
    """Flow (B, H, W, 2) -> (B, side, side, 2), in pixels of the new size. Resize flow, never its
    colours: those do not mix."""
    if flow.ndim != 4 or flow.shape[-1] != 2:
        raise ValueError(f"flow has shape {tuple(flow.shape)}; expected (B, H, W, 2), in pixels")
    if bad := (~flow.isfinite()).sum().item():
        raise ValueError(
            f"flow holds {bad} values that are not finite; check the flow estimator and its input"
        )
    flow = flow.float()
    if flow.shape[1:3] == (side, side):
        return flow
    scale = flow.new_tensor([side / flow.shape[2], side / flow.shape[1]])
    planes = rearrange(flow, "b h w c -> b c h w")
    resized = F.interpolate(planes, (side, side), mode="bilinear", antialias=True)
    return rearrange(resized, "b c h w -> b h w c") * scale


# -- the model ------------------------------------------------------------------------------------


class LatentActionModel(nn.Module):
    """DC-AE tokens of a flow picture to 14 numbers and back:

        flow (B, H, W, 2) --flow_to_tokens--> tokens (B, D) --tokens_to_latent--> mu, logvar (B, Z)
        flow              <--tokens_to_flow-- tokens        <--latent_to_tokens-- mu, or a sample

    Its file holds all that is needed to use its latents."""

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

    def flow_to_picture(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2), in pixels of its own size -> pictures (B, 3, image, image) in [-1, 1]."""
        resized = resize_flow(flow, self.config.image)
        return TO_PICTURE[self.config.code](resized, self.config.radius)

    def picture_to_flow(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, image, image) -> flow (B, image, image, 2) in pixels of the picture."""
        return TO_FLOW[self.config.code](pictures, self.config.radius)

    def flow_to_tokens(self, flow: Tensor) -> Tensor:
        """Flow (B, H, W, 2), in pixels of its own size, on any device -> token features (B, D),
        position by position, not whitened."""
        tokens = []
        with torch.set_grad_enabled(self.config.finetune_dcae and torch.is_grad_enabled()):
            for part in flow.split(64):
                picture = self.flow_to_picture(part.to(self.token_mean.device))
                tokens.append(rearrange(self.dcae.encode(picture), "b c h w -> b (h w c)").float())
            return torch.cat(tokens)

    def tokens_to_picture(self, tokens: Tensor) -> Tensor:
        """Token features (B, D) -> pictures (B, 3, image, image), about [-1, 1]."""
        return self.dcae.decode(
            rearrange(tokens, "b (h w c) -> b c h w", h=self.config.grid, w=self.config.grid)
        )

    def tokens_to_flow(self, tokens: Tensor) -> Tensor:
        """Token features (B, D) -> the motion they stand for, (B, image, image, 2) in pixels."""
        return self.picture_to_flow(self.tokens_to_picture(tokens))

    def whiten(self, tokens: Tensor) -> Tensor:
        """Unit scale, within +-10: raw DC-AE tokens have heavy tails."""
        return ((tokens - self.token_mean) / self.token_std).clamp(-10, 10)

    def tokens_to_latent(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token features (B, D) -> mu, logvar, each (B, Z). The latent action is mu, not a sample."""
        mu, logvar = self.encoder(self.whiten(tokens)).chunk(2, dim=-1)
        return mu, logvar.clamp(-12, 4)

    def latent_to_tokens(self, z: Tensor) -> Tensor:
        """Latents (B, Z), not standardised -> token features (B, D)."""
        return self.decoder(z) * self.token_std + self.token_mean

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents (B, Z) at unit scale, the targets of stage 2."""
        return (latents - self.latent_mean) / self.latent_std

    def as_tokens(self, x: Tensor) -> Tensor:
        """Token features (B, D) of flow (B, H, W, 2), or of token features; on the model's device."""
        return self.flow_to_tokens(x) if x.ndim == 4 else x.to(self.token_mean.device).float()

    @torch.no_grad()
    def fit_whitening(self, tokens: Tensor) -> None:
        """Before training: mean and std of token features (N, D); what hardly varies gets 1 % of
        the mean std."""
        std = tokens.std(dim=0)
        self.token_mean.copy_(tokens.mean(dim=0))
        self.token_std.copy_(std.clamp(min=0.01 * std.mean().item()))

    @torch.no_grad()
    def fit_latents(self, tokens: Tensor) -> None:
        """After training: mean and std of mu over token features (N, D), for `standardise`."""
        mu, _ = self.tokens_to_latent(tokens)
        self.latent_mean.copy_(mu.mean(dim=0))
        self.latent_std.copy_(mu.std(dim=0).clamp(min=1e-4))

    def loss(
        self, x: Tensor, actions: Tensor, mask: Tensor, generator: torch.Generator | None = None
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
        if len(bad := (mask & ~actions.isfinite()).nonzero()):
            raise ValueError(
                f"actions{bad[0].tolist()} is {actions[tuple(bad[0])]:g} although mask is True; "
                "mask out what is not known"
            )
        if config.reconstruct == "picture" and x.ndim != 4:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; reconstruct='picture' needs flow (B, H, W, 2)"
            )
        tokens = self.as_tokens(x)
        mu, logvar = self.tokens_to_latent(tokens)
        z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator).to(mu)
        if config.reconstruct == "tokens":
            reconstruction = F.mse_loss(self.decoder(z), self.whiten(tokens))
        else:
            picture = self.tokens_to_picture(self.latent_to_tokens(z))
            reconstruction = self.picture_loss(picture, x, config.moving)
        # The first entries of mu are the action: only known ones pull.
        away = torch.where(mask, actions - mu[:, : config.action_dim], 0.0)
        alignment = away.square().sum() / mask.sum().clamp(min=1)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        total = reconstruction + config.lambda_action * alignment + config.beta * kl
        return {"total": total, "reconstruction": reconstruction, "alignment": alignment, "kl": kl}

    def picture_loss(self, pictures: Tensor, flow: Tensor, moving: float) -> Tensor:
        """Mean squared error of pictures (B, 3, image, image) of flow (B, H, W, 2), a pixel
        weighing 1 + moving * speed / radius. All pictures count the same, however little of one
        moves: a gripper that opens moves a few pixels."""
        flow = resize_flow(flow, self.config.image)
        speed = (flow.norm(dim=-1) / self.config.radius).clamp(max=1)
        weight = 1 + moving * speed[:, None]
        error = weight * (pictures - self.flow_to_picture(flow)).square()
        return (error.mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))).mean()

    def picture_config(self) -> dict:
        """What the DC-AE's weights depend on."""
        return {key: asdict(self.config)[key] for key in ("dcae", "image", "radius", "code")}

    def fingerprint(self) -> str:
        """Names the latent space: latents of models with different fingerprints must not be mixed."""
        return digest(self.state_dict(), json.dumps(asdict(self.config), sort_keys=True))

    def dcae_fingerprint(self) -> str:
        """Names the tokens: those of models with different ones must not be mixed."""
        return digest(self.dcae.state_dict(), json.dumps(self.picture_config(), sort_keys=True))

    def save(self, path: str | Path) -> None:
        """One safetensors file with weights, statistics and configuration."""
        save_safetensors(
            path, self.state_dict(), {"latent_action": json.dumps(asdict(self.config))}
        )

    @classmethod
    def load(cls, path: str | Path) -> "LatentActionModel":
        """The model that `save` wrote, in eval mode."""
        with open_source(path) as source:
            if "latent_action" not in source.metadata:
                raise ValueError(
                    f"{path}: holds no latent-action configuration; "
                    "python train.py --stage latent writes such a file"
                )
            try:
                config = LatentActionConfig.of(json.loads(source.metadata["latent_action"]))
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: its configuration is of another version ({error}); train it again"
                ) from error
            model = cls(config)
            load_into(model, source)
        return model.eval()

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
    different = [
        f"{key}={found.get(key)} instead of {wanted.get(key)}"
        for key in wanted | found
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(
            f"{path}: made with {', '.join(different)}; "
            "use a file of the same configuration, or change the configuration"
        )


# -- training -------------------------------------------------------------------------------------


def mirrored(flow: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flow (B, H, W, 2) and labels (B, A), of which the first two are motion in x and y, as mirrors
    on two sides show them."""
    for axis, side in ((0, 2), (1, 1)):
        if torch.rand((), generator=generator) < 0.5:
            sign = torch.ones(max(2, labels.shape[1]))
            sign[axis] = -1.0
            flow = flow.flip(side) * sign[:2]
            labels = labels * sign[: labels.shape[1]]
    return flow, labels


def other_bodies(
    flow: Tensor, generator: torch.Generator, shift: float = 0.2, thicker: int = 3
) -> Tensor:
    """The same motions as made by other bodies elsewhere: flow (B, H, W, 2) shifted by up to
    `shift` of the picture, and what moves thickened by 0 to `thicker` px. Labels stay true. Aligned
    with one robot's flow alone, mu takes a larger body for a faster one."""
    height, width = flow.shape[1:3]
    reach = (torch.tensor([height, width]) * shift).int()
    below, beside = reach.tolist()
    grow = torch.randint(thicker + 1, (len(flow),), generator=generator).tolist()
    way = 2 * torch.rand(len(flow), 2, generator=generator) - 1
    offset = (way * reach).round().int().tolist()
    padded = F.pad(flow, (0, 0, beside, beside, below, below))
    turned = []
    for one, reached, (down, right) in zip(padded, grow, offset):
        one = one[below - down :, beside - right :][:height, :width]
        if reached:  # each still pixel follows the fastest within reach
            speed = one.norm(dim=-1)
            window = 2 * reached + 1
            _, fastest = F.max_pool2d(speed[None], window, 1, reached, return_indices=True)
            still = (speed < 0.1)[..., None]
            one = torch.where(still, one.reshape(-1, 2)[fastest[0]], one)
        turned.append(one)
    return torch.stack(turned)


def rarest_motions(labels: Tensor, mask: Tensor) -> Tensor:
    """Row numbers where the known label that is most often near zero is not: a gripper opens seldom
    and moves few pixels, so whoever draws rows draws these more often."""
    moves = mask & (labels.abs() > 0.1)
    share = moves.sum(dim=0) / mask.sum(dim=0).clamp(min=1)
    share = share.masked_fill(~moves.any(dim=0), 1.0)  # never moves, or never known
    return moves[:, share.argmin()].nonzero()[:, 0]


@torch.no_grad()
def augmented(
    model: LatentActionModel,
    flow: Tensor,
    labels: Tensor,
    mask: Tensor,
    copies: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for `fit`: tokens (or flow, if the model reconstructs pictures), labels and mask of flow
    (N, H, W, 2), labels (N, A) and mask (N, A). These come first, each once; labelled ones again
    `copies` times, mirrored and as other bodies would make them, and twice as often if what moves
    seldom does."""
    generator = torch.Generator().manual_seed(seed)
    labelled = mask.any(dim=1).nonzero()[:, 0]
    again = torch.cat([labelled, rarest_motions(labels, mask)]).repeat(copies)
    flows, made = [flow], [labels]
    for rows in again.split(64):
        motion, label = mirrored(flow[rows], labels[rows], generator)
        flows.append(other_bodies(motion, generator))
        made.append(label)
    if model.config.reconstruct == "tokens":
        flows = [model.flow_to_tokens(part).cpu() for part in flows]
    return torch.cat(flows), torch.cat(made), torch.cat([mask, mask[again]])


class MixedSampler:
    """Rows of a batch as a function of seed and step: `fraction` of them labelled, drawn with
    replacement. The number of labelled rows is within 1 of fraction * batch, equals it in
    expectation, and over any run of steps adds up to it within 1."""

    def __init__(self, labelled: Tensor, batch: int, fraction: float = 0.1, seed: int = 0):
        self.labelled = np.flatnonzero(labelled.numpy())
        self.others = np.flatnonzero(~labelled.numpy())
        self.batch, self.share, self.seed = batch, fraction * batch, seed
        self.start = np.random.default_rng(seed).random()
        if (fraction > 0 and not len(self.labelled)) or (fraction < 1 and not len(self.others)):
            raise ValueError(
                f"fraction is {fraction}, but {len(self.labelled)} rows are labelled and "
                f"{len(self.others)} are not; both are drawn from: give labels to a part of the "
                "clips (python -m scripts.latents tokens --labelled 0.1)"
            )

    def __call__(self, step: int) -> Tensor:
        before = math.floor(step * self.share + self.start)
        count = math.floor((step + 1) * self.share + self.start) - before
        rng = np.random.default_rng([self.seed, step])
        rows = [
            rng.choice(pool, number)
            for pool, number in ((self.labelled, count), (self.others, self.batch - count))
            if number
        ]
        return torch.from_numpy(np.concatenate(rows))


@dataclass(frozen=True)
class FitSettings:
    """How the VAE is trained; `train.Settings` has these fields too."""

    steps: int
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 50
    floor: float = 0.1  # of lr, at the end of the cosine
    weight_decay: float = 0.01
    seed: int = 0


def fit(
    model: LatentActionModel,
    rows: tuple[Tensor, Tensor, Tensor],
    settings: FitSettings,
    fraction: float = 0.1,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Trains `model` in place and fits its statistics. `rows`: token features (N, D), or flow (N,
    H, W, 2) if the picture is reconstructed; labels (N, A), normalised; mask (N, A) bool.
    `fraction` of each batch has labels. `log` gets the losses after each step."""
    x, labels, mask = rows
    device = model.token_mean.device
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        model.fit_whitening(model.as_tokens(x))
    sampler = MixedSampler(mask.any(dim=1), settings.batch, fraction, settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )

    def rate(step: int) -> float:  # a rise, then a cosine down to the floor
        rise = min(1.0, (step + 1) / max(1, settings.warmup))
        cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
        return rise * (settings.floor + (1 - settings.floor) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in tqdm(range(settings.steps), desc="stage latent", mininterval=1):
        drawn = sampler(step)
        batch = [part[drawn].to(device) for part in (x, labels, mask)]
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
    model.eval()
    with torch.no_grad():
        model.fit_latents(model.as_tokens(x))


def probe(
    latents: Tensor, labels: Tensor, test_latents: Tensor, test_labels: Tensor, ridge: float = 1e-3
) -> Tensor:
    """R^2 (A,) on test rows of the best linear map from latents (N, Z) to labels (N, A): how much
    of the true motion they hold."""
    mean, std = latents.mean(dim=0), latents.std(dim=0).clamp(min=1e-6)

    def design(x: Tensor) -> Tensor:
        return F.pad((x - mean) / std, (0, 1), value=1.0).double()

    x, target = design(latents), test_labels.double()
    damping = ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.mT @ x + damping, x.mT @ labels.double())
    error = (design(test_latents) @ weights - target).square().sum(dim=0)
    spread = (target - target.mean(dim=0)).square().sum(dim=0).clamp(min=1e-12)
    return (1 - error / spread).float()


# -- whole clips ----------------------------------------------------------------------------------

# A clip of T + 1 frames has T rows, as official files do. Row i is the motion from frame i to i +
# interval; the last rows, which have no such frame, end at the last one and are not valid. Nor are
# rows that touch a frame of one colour, whose motion nobody can see.
Flows = Iterable[tuple[Tensor, Tensor]]  # flow (n, H, W, 2) and valid (n,) bool, chunk after chunk


@torch.no_grad()
def flows_to_tokens(model: LatentActionModel, flows: Flows) -> tuple[Tensor, Tensor, dict]:
    """Token features (T, D), valid (T,), and figures of a clip: rows, valid_rows, and the share of
    the moving pixels beyond the colour range (clipped). ValueError if no row is usable."""
    tokens, valid, clipped = [], [], 0.0
    for flow, usable in flows:
        flow = resize_flow(flow.to(model.token_mean.device), model.config.image)
        clipped += len(flow) * over_range(flow, model.config.radius)
        tokens.append(model.flow_to_tokens(flow))
        valid.append(usable.cpu())
    rows, usable = sum(map(len, valid)), sum(part.sum().item() for part in valid)
    if not usable:
        raise ValueError(
            f"none of its {rows} rows is usable: "
            f"that takes {model.config.interval + 1} frames of more than one colour"
        )
    figures = {"rows": rows, "valid_rows": usable, "clipped": clipped / rows}
    return torch.cat(tokens), torch.cat(valid), figures


@torch.no_grad()
def encode_flows(model: LatentActionModel, flows: Flows) -> tuple[dict[str, Tensor], dict]:
    """-> latent_action (T, 14), not standardised, logvar (T, 14), valid (T,); and the figures of
    `flows_to_tokens`."""
    tokens, valid, figures = flows_to_tokens(model, flows)
    mu, logvar = model.tokens_to_latent(tokens)
    if not mu.isfinite().all():
        raise ValueError("its latents are not finite; check the weights of the encoder")
    return {"latent_action": mu.cpu(), "logvar": logvar.cpu(), "valid": valid}, figures
