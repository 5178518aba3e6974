"""Pre-trains backbones of toy size, so that a toy run starts where a user of the real model starts:
from frozen networks that already see.

The real backbones come from the web (Wan2.2, UMT5, Qwen3-VL); their toy instances are the same
classes, taught here by three objectives:

    video VAE    reconstruct clips: L1 + squared error, a little KL; then the mean and std of its latents are measured and stored
    text         predict masked words from the rest of the sentence
    VLM          ground: after reading instruction and picture, the hidden states say, through linear maps that are thrown away, which
                 image token holds the named object, where exactly it is, and where to take it

Nothing here knows the world: pictures, sentences and targets come in as functions of a seed.
`train.py --stage backbones` calls it.

Shapes: B batch, F frames, H W pixels, L tokens, D width, G grounding targets.
"""

import argparse
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import data
import latent_action
import motus
from attention import mlp
from backbones.optical_flow import mirrored
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig, pad_prompts, patchify, prompt_ids
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder
from backbones.wan_vae import WanVAE, WanVAEConfig
from data import RATE, toy_episodes
from formats.cards import Pyramid, placed, tiled
from formats.recordings import t_place
from latent_action import LatentActionModel
from motus import preset
from train import settings_for
from weights.load import load_part, save_part
from worlds import motions, robots

# -- training -------------------------------------------------------------------------------------


def pretrain_dcae(
    model: LatentActionModel,
    flow: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 3000,
    batch: int = 32,
    lr: float = 3e-3,
    moving: float = 100.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Trains the DC-AE inside `model`, in place, on flow (N, H, W, 2); returns the losses of each
    step. Small moving things are a few percent of a picture: without a large `moving` the answer
    stays white. With labels (N, A) and mask (N, A) bool, half of each batch is labelled and a head
    that is thrown away reads the labels from the tokens, so that these keep what a small part of
    the robot does. Half of that half are rows in which that part moves: those where the label that
    is most often near zero is not."""
    generator, dcae, config, device = (
        torch.Generator().manual_seed(seed),
        model.dcae,
        model.config,
        model.token_mean.device,
    )
    dcae.requires_grad_(True).train()
    features = len(model.token_mean)
    head = nn.Sequential(nn.LayerNorm(features), mlp(features, features, config.action_dim)).to(
        device
    )
    everything = torch.arange(len(flow))
    pools = [(everything, batch)]
    if labels is not None:
        all_known = mask.all(dim=1).nonzero()[:, 0]
        moves = labels[all_known].abs() > 0.1
        rare = all_known[moves[:, moves.float().mean(dim=0).argmin()]]
        pools = [
            (everything, batch - batch // 2),
            (all_known, batch // 2 - batch // 4),
            (rare, batch // 4),
        ]
    parameters = [*dcae.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses: dict[str, list[float]] = {"reconstruction": [], "labels": []}
    for _ in tqdm(range(steps), desc="dc-ae", mininterval=1):
        rows = torch.cat(
            [pool[torch.randint(len(pool), (count,), generator=generator)] for pool, count in pools]
        )
        target, wanted = (
            flow[rows],
            labels[rows] if labels is not None else torch.zeros(len(rows), config.action_dim),
        )
        target, wanted = (x.to(device) for x in mirrored(target, wanted, generator))
        tokens = dcae.encode(model.flow_to_picture(target))
        reconstruction = model.picture_loss(dcae.decode(tokens), target, moving)
        known = (
            mask[rows].to(device)
            if labels is not None
            else torch.zeros_like(wanted, dtype=torch.bool)
        )
        error = torch.where(known, head(rearrange(tokens, "b c h w -> b (h w c)")) - wanted, 0.0)
        read = error.square().sum() / known.sum().clamp(min=1)
        optimizer.zero_grad()
        (reconstruction + read).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses["reconstruction"].append(reconstruction.item()), losses["labels"].append(read.item())
    dcae.requires_grad_(config.finetune_dcae).eval()
    return losses


def word_tokenizer(path: Path, specials: list[str], sentences: list[str]) -> None:
    """Writes a `tokenizer.json` with one id per word; words never seen become <unk>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = sorted({word for sentence in sentences for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in specials if not token.isalpha()]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def optimise(parameters, steps: int, lr: float, loss: Callable[[int], Tensor], name: str) -> None:
    """AdamW with warm-up and cosine decay."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)
    scale = lambda step: (
        min(1, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    with tqdm(range(steps), desc=name, unit="step", mininterval=2) as bar:
        for step in bar:
            optimizer.zero_grad()
            value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}")


# -- video VAE ------------------------------------------------------------------------------------


def pretrain_vae(
    vae: WanVAE, clips: Callable[[int], Tensor], steps: int, lr: float = 3e-3, kl: float = 1e-5
) -> None:
    """Trains in place on clips(seed) -> (B, F, H, W, 3) uint8, and notes the latents' mean and std
    in its config."""

    def loss(step: int) -> Tensor:
        video = rearrange(clips(step), "b f h w c -> b c f h w").float() / 127.5 - 1
        mean, logvar = vae.posterior(video)
        logvar = logvar.clamp(-20, 10)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = vae.decode(z, clamp=False) - video
        weight = 1 + 6 * moving(video)
        return (weight * (error.abs() + 2 * error.square())).mean() + kl * 0.5 * (
            mean.square() + logvar.exp() - 1 - logvar
        ).sum(1).mean()

    optimise(vae.parameters(), steps, lr, loss, "vae")
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.posterior(
                    rearrange(clips(-1 - i), "b f h w c -> b c f h w").float() / 127.5 - 1
                )[0]
                for i in range(16)
            ]
        )
    channels = rearrange(latents, "b c t h w -> c (b t h w)")
    vae.config = replace(
        vae.config, mean=tuple(channels.mean(1).tolist()), std=tuple(channels.std(1).tolist())
    )


def moving(video: Tensor) -> Tensor:
    """1 where a clip (B, 3, F, H, W) in [-1, 1] changes from one frame to the next, in both of
    them: (B, 1, F, H, W). What moves is small and matters; without a weight on it a little VAE
    spends itself on the texture of the table."""
    change = (video.diff(dim=2).abs().amax(dim=1, keepdim=True) > 0.15).float()  # (B, 1, F-1, H, W)
    return torch.maximum(F.pad(change, (0, 0, 0, 0, 0, 1)), F.pad(change, (0, 0, 0, 0, 1, 0)))


@torch.no_grad()
def vae_psnr(vae: WanVAE, clips: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB of the reconstruction of clips (B, F, H, W, 3) uint8: of all
    pixels, and of those that move."""
    video = rearrange(clips, "b f h w c -> b c f h w").float() / 127.5 - 1
    error, weight = (
        ((vae.decode(vae.encode(video)) - video) / 2).square(),
        moving(video).expand_as(video),
    )
    return tuple(
        -10 * math.log10(value) for value in (error.mean(), (error * weight).sum() / weight.sum())
    )


# -- text -----------------------------------------------------------------------------------------


def pretrain_text(
    config: UMT5Config, tokenizer: T5Tokenizer, sentences: list[str], steps: int, lr: float = 3e-3
) -> UMT5Encoder:
    """Predicts masked words (three in ten, at least a chance of one) with a head tied to the
    embedding."""
    model = UMT5Encoder(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    generator = torch.Generator().manual_seed(0)
    all_ids, all_mask = tokenizer.encode(sentences)
    unknown = tokenizer.tokenizer.token_to_id("<unk>")

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(sentences), (64,), generator=generator)
        ids, mask = all_ids[rows], all_mask[rows]
        hidden = (torch.rand(ids.shape, generator=generator) < 0.3) & mask
        logits = model(ids.masked_fill(hidden, unknown), mask) @ model.token_embedding.weight.T
        return F.cross_entropy(logits[hidden], ids[hidden])

    optimise(model.parameters(), steps, lr, loss, "text")
    return model


# -- vision-language model ------------------------------------------------------------------------

POSITION = 2  # the first two targets are x and y of the named object, in [0, 1]


def pretrain_vlm(
    config: Qwen3VLConfig,
    tokenizer,
    samples: Callable[[int], tuple[Tensor, list[str], Tensor]],
    targets: int,
    steps: int,
    lr: float = 1.5e-3,
) -> tuple[Qwen3VL, nn.ModuleDict]:
    """samples(seed) -> pictures (B, H, W, 3) uint8, instructions, grounding targets (B, G). Returns
    the model and its probes.

    Three questions, all answered by hidden states through linear probes: which image token holds
    the named object (dense, so it is learnt at once), where exactly that token thinks it is, and
    what the last token of the prompt makes of it all."""
    vlm = Qwen3VL(config)
    vlm.init_weights()
    probes = nn.ModuleDict(
        {
            name: nn.Linear(config.width, n)
            for name, n in (("which", 1), ("where", POSITION), ("all", targets))
        }
    )

    def loss(step: int) -> Tensor:
        pictures, texts, target = samples(step)
        which, where, everything, cell = ground(vlm, probes, tokenizer, pictures, texts, target)
        return (
            F.cross_entropy(which, cell)
            + 8 * F.smooth_l1_loss(where, target[:, :POSITION], beta=0.02)
            + 8 * F.smooth_l1_loss(everything, target, beta=0.02)
        )

    optimise([*vlm.parameters(), *probes.parameters()], steps, lr, loss, "vlm")
    return vlm, probes


def ground(
    vlm: Qwen3VL,
    probes: nn.ModuleDict,
    tokenizer,
    pictures: Tensor,
    texts: list[str],
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (B, image tokens) of the named object's place, its position (B, 2) by the token that
    holds it, all targets (B, G) by the last token, and the index (B,) of the token that holds it.
    """
    config = vlm.config
    pixels, grid = patchify(pictures, config)
    ids, mask = pad_prompts(
        [
            prompt_ids(tokenizer, text, grid[i : i + 1], config.merge)
            for i, text in enumerate(texts)
        ]
    )
    hidden = vlm(ids, mask, pixels, grid)
    tokens = rearrange(hidden[ids == config.image_token], "(b n) d -> b n d", b=len(hidden))
    rows, cols = (grid[0, 1:] // config.merge).tolist()
    cell = (target[:, 1] * rows).long().clamp(0, rows - 1) * cols + (
        target[:, 0] * cols
    ).long().clamp(0, cols - 1)
    batch = torch.arange(len(hidden))
    return (
        probes["which"](tokens)[..., 0],
        probes["where"](tokens[batch, cell]),
        probes["all"](hidden[batch, mask.sum(dim=1) - 1]),
        cell,
    )


def write_card(folder: Path, **figures) -> None:
    """Notes how good the backbones came out, beside their weights."""
    (folder / "card.json").write_text(json.dumps(figures, indent=1) + "\n")


# -- what the toy backbones are pre-trained on ----------------------------------------------------


class Web(ABC):
    """Level 1 for backbones of small size: `videos` (T, H, W, 3) uint8 with their `rates`, the rows
    per video frame; `sentences`; and pictures with instructions and `targets`, numbers to be seen
    in them, of which the first two say where the `named` thing is, 0 to 1 from left and top."""

    named: str
    targets: tuple[str, ...]
    videos: list[np.ndarray]
    rates: list[int]
    sentences: list[str]

    def clips(self, seed: int, size: int = 16, frames: int = 5) -> Tensor:
        """(B, F, H, W, 3) uint8 at the video rate."""
        rng = np.random.default_rng([abs(seed), seed < 0])
        clips = []
        for i in rng.integers(len(self.videos), size=size):
            video, rate = self.videos[i], self.rates[i]
            start = rng.integers(max(1, len(video) - rate * (frames - 1)))
            clips.append(video[np.minimum(start + rate * np.arange(frames), len(video) - 1)])
        return torch.from_numpy(np.stack(clips))

    @abstractmethod
    def grounded(self, seed: int, size: int = 64) -> tuple[Tensor, list[str], Tensor]:
        """Pictures (B, H, W, 3) uint8, an instruction about each, and what is to be seen (B,
        targets)."""


class ToyWeb(Web):
    """The toy's, from all embodiments and both looks, with instructions about any disc that is
    there. Places are in [0, 1], directions -1, 0, 1."""

    named, targets = (
        "disc",
        ("disc x", "disc y", "effector x", "effector y", "opening", "right", "down", "push"),
    )

    def __init__(self, episodes: int, seed: int, held_out: bool = False):
        self.split = "eval" if held_out else "train"
        self.episodes = toy_episodes((2, 3, 4, 5, 6), episodes, seed, self.split)
        self.videos, self.rates = (
            [episode.frames for episode in self.episodes],
            [RATE] * len(self.episodes),
        )
        self.tasks = robots.instructions("train")
        self.sentences = [robots.sentence(*task) for task in self.tasks]

    def grounded(self, seed: int, size: int = 64) -> tuple[Tensor, list[str], Tensor]:
        rng = np.random.default_rng([abs(seed), seed < 0])
        pictures, texts, targets = [], [], []
        for i in rng.integers(len(self.episodes), size=size):
            episode = self.episodes[i]
            t = rng.integers(len(episode.frames))
            shot = episode.snapshots[t]
            present = {robots.COLOURS[c]: shot.discs[d] for d, c in enumerate(shot.colours)}
            skill, colour, side = (tasks := [task for task in self.tasks if task[1] in present])[
                rng.integers(len(tasks))
            ]
            direction = robots.DIRECTIONS[robots.SIDES.index(side)]
            pictures.append(episode.frames[t])
            texts.append(robots.sentence(skill, colour, side))
            targets.append(
                [*present[colour], *shot.effector, shot.opening, *direction, skill == "push"]
            )
        return (
            torch.from_numpy(np.stack(pictures)),
            texts,
            torch.tensor(np.array(targets), dtype=torch.float32),
        )


class CardWeb(Web):
    """A card's, where a simulator recorded what it knew (`worlds.World.labels`), in its own units:
    at most `most` episodes, all in memory, of those that are trained on or of those that are held
    out. Nothing else reads labels; a policy sees pictures and its own state."""

    named = "object"

    def __init__(self, pyramid: Pyramid, most: int, seed: int, held_out: bool = False):
        found = [
            (o, e)
            for o in pyramid.opened
            for e in (range(o.trained, len(o.reader.lengths)) if held_out else range(o.trained))
        ]
        if not found:
            raise ValueError(
                f'card {pyramid.name}: no episode is held out, and backbones are tried on some; set "held_out" of a source'
            )
        chosen = [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:most]]
        self.targets = tuple(chosen[0][0].reader.labels(chosen[0][1]))
        self.videos, self.rates, self.texts, self.labels = [], [], [], []
        for o, e in tqdm(chosen, desc="read episodes", leave=False):
            labels, fps = o.reader.labels(e), o.reader.fps
            if tuple(labels) != self.targets or self.targets[:2] != ("object x", "object y"):
                raise ValueError(
                    f"card {pyramid.name}: episode {e} of {o.source.path} has the labels {list(labels)} of its first camera; "
                    "due are the same in all episodes, object x and object y first: record the dataset with "
                    "`python evaluate.py record`"
                )
            seen, rows = (
                o.reader.window(e, 0, np.arange(o.reader.lengths[e]) / fps, ()),
                np.stack(list(labels.values()), axis=1),
            )
            for x in [i for i, name in enumerate(labels) if name.endswith(" x")]:  # and y after it
                if o.reader.given.t_layout:
                    rows[:, x : x + 2] = t_place(
                        rows[:, x : x + 2], o.reader.sizes[o.reader.cameras[0]]
                    )
                rows[:, x : x + 2] = placed(rows[:, x : x + 2], seen.frames, pyramid.size)
            (
                self.videos.append(tiled(seen.frames, pyramid.size)),
                self.rates.append(max(1, round(fps / pyramid.video_hz))),
            )
            self.texts.append(seen.instruction), self.labels.append(rows)
        self.sentences = sorted(set(self.texts))

    def grounded(self, seed: int, size: int = 64) -> tuple[Tensor, list[str], Tensor]:
        rng = np.random.default_rng([abs(seed), seed < 0])
        at = [
            (i, rng.integers(len(self.videos[i])))
            for i in rng.integers(len(self.videos), size=size)
        ]
        pictures, targets = (
            np.stack([part[i][t] for i, t in at]) for part in (self.videos, self.labels)
        )
        return (
            torch.from_numpy(pictures),
            [self.texts[i] for i, _ in at],
            torch.from_numpy(targets).float(),
        )


# Steps of each part, in whose place `--steps` is taken, and samples per step.
BACKBONE_STEPS = {
    "toy": dict(text=400, vlm=4000, vae=3000, dcae=2200),
    "sim": dict(text=400, vlm=1700, vae=1000),
}
BACKBONE_BATCH = {"toy": dict(vlm=64, vae=12), "sim": dict(vlm=32, vae=4)}


def train_backbones(args: argparse.Namespace) -> None:
    """Pre-trains video VAE, text encoder and VLM of a small preset and stores them with their
    figures: on all levels of the toy world, and a DC-AE with them, or on the episodes of a card
    whose simulator recorded labels (`data.CardWeb`). Parts of `--keep` are copied from those of the
    repository instead."""
    name, kept = args.preset, [part for part in args.keep.split(",") if part]
    if name not in BACKBONE_STEPS or (name != "toy" and not args.data):
        raise ValueError(
            f"--preset is {name!r}, --data {args.data!r}; backbones are made for presets {', '.join(BACKBONE_STEPS)}, from a "
            "card with labels (docs/metaworld) but for the toy"
        )
    if set(kept) - set(BACKBONE_STEPS[name]) or kept and not args.run:
        raise ValueError(
            f"--keep is {args.keep!r}, --run {args.run!r}; allowed: parts among {', '.join(BACKBONE_STEPS[name])}, and a "
            "folder to copy them to"
        )
    settings, config = settings_for(name, "backbones", args.set), preset(name)
    torch.manual_seed(settings.seed)
    folder, steps, batch = (
        Path(args.run or motus.PRESETS[name].backbones),
        (lambda part: args.steps or BACKBONE_STEPS[name][part]),
        BACKBONE_BATCH[name],
    )
    if args.data:
        pyramid = data.Pyramid(args.data, name=name)
        web, held = (
            CardWeb(pyramid, settings.episodes, settings.seed, held_out)
            for held_out in (False, True)
        )
    else:
        web = ToyWeb(settings.episodes, settings.seed)
        held = ToyWeb(max(1, settings.episodes // 6), settings.seed + 1, held_out=True)
    height, width = web.videos[0].shape[1:3]
    folder.mkdir(parents=True, exist_ok=True)
    for file in motus.PRESETS[name].backbones.iterdir():
        if file.stem in kept:
            shutil.copyfile(file, folder / file.name)
    figures = {"kept": kept} if kept else {}

    if "text" not in kept:
        word_tokenizer(folder / "text.json", ["</s>"], web.sentences)
        tokenizer = T5Tokenizer(folder / "text.json", config.video.text_len)
        text = UMT5Config(
            vocab=tokenizer.tokenizer.get_vocab_size(),
            dim=config.video.text_dim,
            dim_attn=48,
            dim_ffn=96,
            heads=4,
            layers=2,
            buckets=16,
            max_distance=32,
        )
        save_part(
            folder / "text.safetensors",
            pretrain_text(text, tokenizer, web.sentences, steps("text")),
            torch.float16,
        )

    if "vlm" not in kept:
        prompt = [
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|image_pad|>",
            "<|vision_end|>",
            "user",
            "assistant",
        ]
        word_tokenizer(folder / "vlm.json", prompt, web.sentences)
        tokenizer = Tokenizer.from_file(str(folder / "vlm.json"))
        vlm = Qwen3VLConfig(
            vocab=tokenizer.get_vocab_size(),
            image_token=tokenizer.token_to_id("<|image_pad|>"),
            width=config.vlm_dim,
            ffn=256,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=24,
            rope_theta=1e4,
            mrope=(4, 4, 4),
            vision_width=64,
            vision_ffn=192,
            vision_layers=3,
            vision_heads=4,
            vision_theta=1e2,
            taps=(0, 1),
            side=max(height, width) // 8,
            patch=8,
            merge=2,
            min_pixels=256,
            max_pixels=height * width,
        )
        model, probes = pretrain_vlm(
            vlm,
            tokenizer,
            lambda seed: web.grounded(seed, batch["vlm"]),
            len(web.targets),
            steps("vlm"),
        )
        save_part(folder / "vlm.safetensors", model, torch.float16)
        pictures, texts, target = held.grounded(-1, 512)
        with torch.no_grad():
            which, where, everything, cell = ground(
                model, probes, tokenizer, pictures, texts, target
            )
        figures[f"vlm_named_{web.named}_found"] = (which.argmax(1) == cell).float().mean().item()
        figures["vlm_position_error_px"] = (
            ((where - target[:, :2]) * torch.tensor([width, height])).norm(dim=1).mean().item()
        )
        if args.data:
            figures |= {
                f"vlm_error {what}": value
                for what, value in zip(web.targets, (everything - target).abs().mean(0).tolist())
            }

    if "vae" not in kept:
        z = config.video.latent
        vae = WanVAEConfig(
            dim=16,
            dec_dim=16,
            z_dim=z,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temporal_downsample=(True, True),
            mean=(0.0,) * z,
            std=(1.0,) * z,
        )
        # The toy's is the same network and has begun to see; to go on from it saves half the time.
        model = (
            load_part(motus.PRESETS["toy"].backbones / "vae.safetensors", WanVAE, WanVAEConfig)
            if args.data
            else WanVAE(vae)
        )
        pretrain_vae(model, lambda seed: web.clips(seed, batch["vae"]), steps("vae"))
        save_part(folder / "vae.safetensors", model)
        figures["vae_psnr_db"], figures["vae_psnr_moving_db"] = vae_psnr(model, held.clips(-1, 128))

    if not args.data and "dcae" not in kept:
        flow = latent_action.LatentActionModel(
            latent_action.LatentActionConfig.of(motus.PRESETS["toy"].latent)
        )
        pairs = motions.toy_pairs(
            web.episodes[:: max(1, len(web.episodes) // 500)], flow.config.interval
        )
        losses = pretrain_dcae(
            flow, pairs.flow, pairs.labels, pairs.labelled[:, None].expand(-1, 3), steps("dcae")
        )
        figures |= {
            f"dcae_{kind}_loss": float(np.mean(values[-100:])) for kind, values in losses.items()
        }
        flow.save_dcae(folder / "dcae.safetensors")
    command = (
        "python train.py --stage backbones"
        + (f" --preset {name} --data {args.data}" if args.data else "")
        + (f" --keep {args.keep}" if kept else "")
        + (f" --steps {args.steps}" if args.steps else "")
    )
    write_card(folder, command=command, **figures)
    print(json.dumps(figures, indent=1))
