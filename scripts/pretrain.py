"""Pre-trains frozen backbones of small size, so that a small run starts where a user of the real
model starts: from networks that already see.

    python -m scripts.pretrain --preset toy --out FOLDER
    python -m scripts.pretrain --preset sim --data CARD --out FOLDER

The real backbones come from the web (Wan2.2, UMT5, Qwen3-VL); their small instances are the same
classes, taught here on all levels of a card:

    vae     reconstruct clips: L1 + squared error, a little KL; then the mean and std of its latents
            are measured and stored
    text    predict masked words from the rest of the sentence
    vlm     ground: after reading instruction and picture, the hidden states say, through linear
            maps that are thrown away, which image token holds the named object, where exactly it
            is, and everything else that a simulator knew (`worlds.World.labels`)
    dcae    reconstruct optical flow, and keep what its labels say

MOTUS_BACKBONES=FOLDER then names them to every other command.

Shapes: B batch, F frames, H W pixels, L tokens, D width, G grounding targets, A labels of a motion.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

from attention import mlp
from backbones.frozen import Backbones
from backbones.optical_flow import mirrored, rarest_motions
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig, pad_prompts, patchify, prompt_ids
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder
from backbones.wan_vae import WanVAE
from data import open_pyramid
from formats.cards import Pyramid, placed, tiled
from formats.motions import motions
from formats.recordings import T_SIZE, Recordings, fit_place
from latent_action import LatentActionConfig, LatentActionModel
from motus import PRESETS, preset
from weights.files import run_command
from weights.load import save_part

# -- what they learn from -------------------------------------------------------------------------


class Episode(NamedTuple):
    """An episode in memory, with what its simulator knew."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    labels: np.ndarray  # (T, G)
    text: str
    rate: int  # rows per video frame


class Corpus:
    """Up to `count` episodes of a card whose simulator recorded labels: of those that are trained
    on, or of those that are held out. Nothing else reads labels; a policy sees pictures and its own
    state.

    `targets` names the labels: numbers to be seen in a picture, of which the first two say where
    the named object is, 0 to 1 from left and top."""

    def __init__(self, pyramid: Pyramid, count: int, seed: int, held_out: bool = False):
        found = []
        for o in pyramid.opened:
            episodes = range(o.trained, len(o.reader.lengths)) if held_out else range(o.trained)
            found += [(o.reader, e) for e in episodes if o.reader.labels(e)]
        if not found:
            raise ValueError(
                f"card {pyramid.name}: no {'held-out' if held_out else 'trained'} episode has "
                'labels; set "held_out" of a source, and record it with `python -m scripts.record`'
            )
        order = np.random.default_rng(seed).permutation(len(found))[:count].tolist()
        reader, episode = found[order[0]]
        self.targets = tuple(reader.labels(episode))
        self.episodes = [self.read(pyramid, *found[i]) for i in order]

    def read(self, pyramid: Pyramid, reader: Recordings, episode: int) -> Episode:
        labels = reader.labels(episode)
        if tuple(labels) != self.targets or self.targets[:2] != ("object x", "object y"):
            raise ValueError(
                f"card {pyramid.name}: episode {episode} of {reader.name} has the labels "
                f"{list(labels)} of its first camera; expected the same in all episodes, object x "
                "and object y first: record the dataset with `python -m scripts.record`"
            )
        seen = reader.window(episode, 0, np.arange(reader.lengths[episode]) / reader.fps, ())
        rows = np.stack(list(labels.values()), axis=1)
        for x in [i for i, name in enumerate(labels) if name.endswith(" x")]:  # and y after it
            places = rows[:, x : x + 2]
            if reader.given.t_layout:
                height, width = head = reader.sizes[reader.cameras[0]]
                places = fit_place(places, head, (height + height // 2, width), T_SIZE)
            rows[:, x : x + 2] = placed(places, seen.frames, pyramid.size)
        rate = max(1, round(reader.fps / pyramid.video_hz))
        return Episode(tiled(seen.frames, pyramid.size), rows, seen.instruction, rate)

    @property
    def sentences(self) -> list[str]:
        return sorted({episode.text for episode in self.episodes})

    def draw(self, seed: int, size: int) -> tuple[list[Episode], np.random.Generator]:
        rng = np.random.default_rng([abs(seed), seed < 0])
        return [self.episodes[i] for i in rng.integers(len(self.episodes), size=size)], rng

    def clips(self, seed: int, size: int, frames: int = 5) -> Tensor:
        """(B, F, H, W, 3) uint8 at the video rate."""
        episodes, rng = self.draw(seed, size)
        clips = []
        for episode in episodes:
            last = len(episode.frames) - 1
            start = rng.integers(max(1, last + 1 - episode.rate * (frames - 1)))
            rows = start + episode.rate * np.arange(frames)
            clips.append(episode.frames[np.minimum(rows, last)])
        return torch.from_numpy(np.stack(clips))

    def grounded(self, seed: int, size: int) -> tuple[Tensor, list[str], Tensor]:
        """Pictures (B, H, W, 3) uint8, the instruction about each, and targets (B, G)."""
        episodes, rng = self.draw(seed, size)
        times = [rng.integers(len(episode.frames)) for episode in episodes]
        pictures = np.stack([episode.frames[t] for episode, t in zip(episodes, times)])
        targets = np.stack([episode.labels[t] for episode, t in zip(episodes, times)])
        texts = [episode.text for episode in episodes]
        return torch.from_numpy(pictures), texts, torch.from_numpy(targets).float()


def word_tokenizer(path: Path, specials: list[str], sentences: list[str]) -> None:
    """Writes a `tokenizer.json` with one id per word; words never seen become <unk>."""
    words = sorted({word for sentence in sentences for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [AddedToken(token, normalized=False) for token in specials if not token.isalpha()]
    tokenizer.add_special_tokens(marks)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def optimise(
    parameters: Iterable[Tensor], steps: int, lr: float, loss: Callable[[int], Tensor], name: str
) -> None:
    """AdamW with warm-up and cosine decay; `loss` is a function of the step."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1, (step + 1) / 50) * (0.05 + 0.95 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(steps), name, unit="step", mininterval=2):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


# -- video VAE ------------------------------------------------------------------------------------


def pretrain_vae(
    vae: WanVAE, clips: Callable[[int], Tensor], steps: int, lr: float = 3e-3, kl: float = 1e-5
) -> None:
    """Trains in place on clips(seed) -> (B, F, H, W, 3) uint8, and notes the latents' mean and std
    in its config."""

    def loss(step: int) -> Tensor:
        video = as_video(clips(step))
        mean, logvar = vae.posterior(video)
        logvar = logvar.clamp(-20, 10)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = vae.decode(z, clamp=False) - video
        weight = 1 + 6 * moving(video)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        return (weight * (error.abs() + 2 * error.square())).mean() + kl * divergence

    optimise(vae.parameters(), steps, lr, loss, "vae")
    with torch.no_grad():
        latents = torch.cat([vae.posterior(as_video(clips(-1 - i)))[0] for i in range(16)])
    channels = rearrange(latents, "b c t h w -> c (b t h w)")
    mean, std = channels.mean(dim=1), channels.std(dim=1)
    vae.config = replace(vae.config, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def as_video(clips: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 -> (B, 3, F, H, W) in [-1, 1]."""
    return rearrange(clips, "b f h w c -> b c f h w").float() / 127.5 - 1


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
    video = as_video(clips)
    error = ((vae.decode(vae.encode(video)) - video) / 2).square()
    weight = moving(video).expand_as(video)
    means = error.mean(), (error * weight).sum() / weight.sum()
    return tuple(-10 * math.log10(value) for value in means)


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
PROMPT = """<|im_start|> <|im_end|> <|vision_start|> <|image_pad|> <|vision_end|> user
assistant""".split()


def pretrain_vlm(
    config: Qwen3VLConfig,
    tokenizer: Tokenizer,
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
    sizes = {"which": 1, "where": POSITION, "all": targets}
    probes = nn.ModuleDict({name: nn.Linear(config.width, n) for name, n in sizes.items()})

    def loss(step: int) -> Tensor:
        pictures, texts, target = samples(step)
        which, where, everything, cell = ground(vlm, probes, tokenizer, pictures, texts, target)
        position = F.smooth_l1_loss(where, target[:, :POSITION], beta=0.02)
        return (
            F.cross_entropy(which, cell)
            + 8 * position
            + 8 * F.smooth_l1_loss(everything, target, beta=0.02)
        )

    optimise([*vlm.parameters(), *probes.parameters()], steps, lr, loss, "vlm")
    return vlm, probes


def ground(
    vlm: Qwen3VL,
    probes: nn.ModuleDict,
    tokenizer: Tokenizer,
    pictures: Tensor,
    texts: list[str],
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (B, image tokens) of the named object's place, its position (B, 2) by the token that
    holds it, all targets (B, G) by the last token, and the index (B,) of the token that holds it.
    """
    config = vlm.config
    pixels, grid = patchify(pictures, config)
    prompts = [prompt_ids(tokenizer, text, grid[:1], merge=config.merge) for text in texts]
    ids, mask = pad_prompts(prompts)
    hidden = vlm(ids, mask, pixels, grid)
    tokens = rearrange(hidden[ids == config.image_token], "(b n) d -> b n d", b=len(hidden))
    rows, columns = (grid[0, 1:] // config.merge).tolist()
    row = (target[:, 1] * rows).long().clamp(0, rows - 1)
    cell = row * columns + (target[:, 0] * columns).long().clamp(0, columns - 1)
    batch = torch.arange(len(hidden))
    which = probes["which"](tokens)[..., 0]
    where = probes["where"](tokens[batch, cell])
    everything = probes["all"](hidden[batch, mask.sum(dim=1) - 1])
    return which, where, everything, cell


# -- DC-AE ----------------------------------------------------------------------------------------


def pretrain_dcae(
    model: LatentActionModel,
    flow: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    steps: int = 3000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Trains the DC-AE inside `model`, in place, on flow (N, H, W, 2); returns the losses of each
    step. With labels (N, A) and mask (N, A) bool, half of the rows are labelled and a head that is
    thrown away reads the labels from the tokens, so that these keep what a small part of the robot
    does; in half of that half moves the part that seldom does."""
    generator = torch.Generator().manual_seed(seed)
    device, features, width = (
        model.token_mean.device,
        len(model.token_mean),
        model.config.action_dim,
    )
    model.dcae.requires_grad_(True).train()
    head = nn.Sequential(nn.LayerNorm(features), mlp(features, features, width)).to(device)
    if labels is None:
        labels = torch.zeros(len(flow), width)
        mask = torch.zeros_like(labels, dtype=torch.bool)
    chance = torch.full((len(flow),), 2 / len(flow))
    for rows in (mask.all(dim=1).nonzero()[:, 0], rarest_motions(labels, mask)):
        chance[rows] += 1 / max(1, len(rows))
    losses: dict[str, list[float]] = {"reconstruction": [], "labels": []}

    def loss(step: int) -> Tensor:
        rows = torch.multinomial(chance, 32, replacement=True, generator=generator)
        moved, wanted = mirrored(flow[rows], labels[rows], generator)
        moved, wanted, given = moved.to(device), wanted.to(device), mask[rows].to(device)
        tokens = model.dcae.encode(model.flow_to_picture(moved))
        # Small moving things are a few percent of a picture: unless they weigh much, it stays white.
        reconstruction = model.picture_loss(model.dcae.decode(tokens), moved, moving=100.0)
        read = head(rearrange(tokens, "b c h w -> b (h w c)"))
        error = torch.where(given, read - wanted, 0.0).square().sum() / given.sum().clamp(min=1)
        losses["reconstruction"].append(reconstruction.item())
        losses["labels"].append(error.item())
        return reconstruction + error

    optimise([*model.dcae.parameters(), *head.parameters()], steps, 3e-3, loss, "dc-ae")
    model.dcae.requires_grad_(model.config.finetune_dcae).eval()
    return losses


# -- the command ----------------------------------------------------------------------------------

# Steps of each part, in whose place `--steps` is taken, and samples per step.
STEPS = {
    "toy": dict(text=400, vlm=4000, vae=3000, dcae=2200),
    "sim": dict(text=400, vlm=1700, vae=1000),
}
BATCH = {"toy": dict(vlm=64, vae=12), "sim": dict(vlm=32, vae=4)}


def shipped(name: str, part: str) -> nn.Module:
    """A part as it is in the repository."""
    backbones = Backbones.load(PRESETS[name].backbones, parts=[part])
    return getattr(backbones, part).requires_grad_(True)


class Maker:
    """Makes the parts of a folder, each at the sizes that it has in the repository; each method
    returns figures of held-out episodes."""

    def __init__(self, args: argparse.Namespace):
        self.out = args.out
        self.preset = args.preset
        self.steps = STEPS[args.preset]
        if args.steps:
            self.steps = dict.fromkeys(self.steps, args.steps)
        self.pyramid = open_pyramid(args.data, "latent", args.preset, args.episodes, args.seed)
        self.corpus = Corpus(self.pyramid, args.episodes, args.seed)
        self.held_out = Corpus(self.pyramid, args.episodes, args.seed, held_out=True)

    def text(self) -> dict[str, float]:
        sentences, file = self.corpus.sentences, self.out / "text.json"
        word_tokenizer(file, ["</s>"], sentences)
        tokenizer = T5Tokenizer(file, preset(self.preset).video.text_len)
        words = tokenizer.tokenizer.get_vocab_size()
        config = replace(shipped(self.preset, "text").config, vocab=words)
        model = pretrain_text(config, tokenizer, sentences, self.steps["text"])
        save_part(self.out / "text.safetensors", model, torch.float16)
        return {}

    def vlm(self) -> dict[str, float]:
        file, names = self.out / "vlm.json", self.corpus.targets
        word_tokenizer(file, PROMPT, self.corpus.sentences)
        tokenizer = Tokenizer.from_file(str(file))
        words, image = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|image_pad|>")
        config = replace(shipped(self.preset, "vlm").config, vocab=words, image_token=image)
        size = BATCH[self.preset]["vlm"]
        model, probes = pretrain_vlm(
            config,
            tokenizer,
            lambda seed: self.corpus.grounded(seed, size),
            len(names),
            self.steps["vlm"],
        )
        save_part(self.out / "vlm.safetensors", model, torch.float16)
        *samples, target = self.held_out.grounded(-1, 512)
        with torch.no_grad():
            which, where, everything, cell = ground(model, probes, tokenizer, *samples, target)
        height, width = self.pyramid.size
        away = (where - target[:, :POSITION]) * torch.tensor([width, height])
        errors = (everything - target).abs().mean(dim=0).tolist()
        figures = {
            "vlm_named_object_found": (which.argmax(dim=1) == cell).float().mean().item(),
            "vlm_position_error_px": away.norm(dim=1).mean().item(),
        }
        return figures | {f"vlm_error {name}": error for name, error in zip(names, errors)}

    def vae(self) -> dict[str, float]:
        """That of another preset goes on from the toy's, which is of the same size and has begun to
        see: half the time."""
        model = shipped("toy", "vae")
        if self.preset == "toy":
            zeros, ones = (0.0,) * model.config.z_dim, (1.0,) * model.config.z_dim
            model = WanVAE(replace(model.config, mean=zeros, std=ones))
        size = BATCH[self.preset]["vae"]
        pretrain_vae(model, lambda seed: self.corpus.clips(seed, size), self.steps["vae"])
        save_part(self.out / "vae.safetensors", model)
        every, moving_ones = vae_psnr(model, self.held_out.clips(-1, 128))
        return {"vae_psnr_db": every, "vae_psnr_moving_db": moving_ones}

    def dcae(self) -> dict[str, float]:
        model = LatentActionModel(LatentActionConfig.of(PRESETS[self.preset].latent))
        seen = motions(self.pyramid, model.config.interval)
        losses = pretrain_dcae(model, seen.flow, seen.labels, seen.mask, self.steps["dcae"])
        model.save_dcae(self.out / "dcae.safetensors")
        return {f"dcae_{kind}_loss": float(np.mean(x[-100:])) for kind, x in losses.items()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--preset", default="toy", choices=STEPS, help="whose sizes they have")
    add("--data", help="card with labels (docs/metaworld); default the preset's")
    add("--out", type=Path, required=True, help="folder to write")
    add("--keep", default="", help="parts to copy from the repository: text, vlm, vae, dcae")
    add("--steps", type=int, help="of each part")
    add("--episodes", type=int, default=500, help="at most, of a card; per level of a world")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    row, parts = PRESETS[args.preset], list(STEPS[args.preset])
    kept = [part for part in args.keep.split(",") if part]
    args.data = args.data or row.data
    if not args.data:
        raise ValueError(f"preset {args.preset!r} has no data of its own; name a card by --data")
    if args.out.resolve() == row.backbones.resolve():
        raise ValueError(f"--out {args.out} holds the repository's backbones; name another folder")
    if not set(kept) <= set(parts):
        raise ValueError(f"--keep is {args.keep!r}; expected parts among {', '.join(parts)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for file in row.backbones.iterdir():
        if file.stem in kept:
            shutil.copyfile(file, args.out / file.name)
    torch.manual_seed(args.seed)
    maker = Maker(args)
    figures = {"command": f"python -m scripts.pretrain {' '.join(argv or sys.argv[1:])}"}
    for part in parts:
        if part not in kept:
            figures |= getattr(maker, part)()
    (args.out / "card.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_command(main)
