"""Pre-trains frozen backbones of small size, so that a small run starts where a user of the real
model starts: from networks that already see.

    python -m scripts.pretrain --preset toy --out FOLDER
    python -m scripts.pretrain --preset sim --data CARD --out FOLDER      docs/own_robot.md

The real backbones come from the web (Wan2.2, UMT5, Qwen3-VL); their small instances are the same
classes, taught here on all levels of a card:

    vae     reconstruct clips: L1 + squared error, a little KL; then the mean and std of its latents
            are measured and stored
    text    predict masked words from the rest of the sentence
    vlm     ground: after reading instruction and picture, the hidden states say, through linear
            maps that are thrown away, which image token holds the named object, where exactly it
            is, and everything else that a simulator knew (`worlds.World.labels`)

The DC-AE of latent actions is copied; `python -m scripts.latents pretrain` makes another.

Recordings of a real robot have no labels. Then all parts go on from those of the repository, whose
words are kept and added to, and the vlm tells what a recording itself knows: where the picture is
about to change, the robot's state now and later, its next actions, and, of several instructions,
whether the one that was read is the one that was carried out.

MOTUS_BACKBONES=FOLDER then names them to every other command.

Shapes: B batch, F frames, H W pixels, L tokens, D width, G grounding targets, A labels of a motion.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

from attention import mlp
from backbones.frozen import Backbones
from backbones.optical_flow import mirrored, rarest_motions
from backbones.qwen3vl import SPECIAL, Qwen3VL
from backbones.umt5 import T5Tokenizer, UMT5Encoder
from backbones.wan_vae import WanVAE
from data import open_pyramid
from formats.cards import OpenSource, Pyramid, placed, tiled
from formats.recordings import T_SIZE, Recordings, fit_place
from latent_action import LatentActionModel
from motus import PRESETS, preset
from sample import psnr
from weights.files import plain_json, write_json
from weights.load import save_part
from weights.options import DEVICE, Parser, device, output_folder, run_command

Figures = dict[str, float]
Terms = dict[str, Tensor]  # of a loss, which is their sum

# -- what they learn from -------------------------------------------------------------------------


class Episode(NamedTuple):
    """An episode in memory, with what its simulator knew."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    labels: np.ndarray  # (T, G)
    text: str
    rate: int  # rows per video frame


class Corpus:
    """Up to `count` episodes of a card: of those that are trained on, or of those that are held
    out; if a simulator recorded labels, of those that have some. Nothing else reads labels; a
    policy sees pictures and its own state.

    `targets` names the labels: numbers to be seen in a picture, of which the first two say where
    the named object is, 0 to 1 from left and top. Without a simulator they are made of what the
    recordings hold (`read_own`), NaN where unknown."""

    def __init__(self, pyramid: Pyramid, count: int, held_out: bool = False):
        self.labelled = any("object x" in o.reader.labels(0) for o in pyramid.opened)
        robots = () if self.labelled else pyramid.robots(acting=True)
        self.robots = {robot.embodiment: robot for robot in robots}
        found = []
        for o in pyramid.opened:
            episodes = range(o.trained, len(o.reader.lengths)) if held_out else range(o.trained)
            found += [(o, e) for e in episodes if not self.labelled or o.reader.labels(e)]
        if not found:
            raise ValueError(
                f"card {pyramid.name}: no {'held-out' if held_out else 'trained'} episode"
                f'{" has labels" * self.labelled}; set "held_out" of a source to more'
            )
        self.rng = np.random.default_rng(0)
        found = [found[i] for i in self.rng.permutation(len(found))[:count]]
        if self.labelled:
            self.targets = tuple(found[0][0].reader.labels(found[0][1]))
            self.episodes = [self.read(pyramid, o.reader, e) for o, e in found]
            self.sentences = sorted({episode.text for episode in self.episodes})
        else:
            self.episodes = [self.read_own(pyramid, o, e) for o, e in found]
            self.sentences = sorted(set().union(*(o.instructions for o in pyramid.opened)))

    def read_own(self, pyramid: Pyramid, source: OpenSource, episode: int) -> Episode:
        """An episode without labels, at the video rate, with what it tells by itself: the place
        that changes most within a second; the state now, one and two seconds later and at the end;
        the actions of a window; numbers in four standard deviations."""
        reader = source.reader
        end = reader.lengths[episode] - 1
        rows = np.arange(0, end + 1, reader.fps / pyramid.video_hz).round().astype(int)
        seen = reader.window(episode, 0, rows / reader.fps, ())
        frames = tiled(seen.frames, pyramid.size)
        second = np.arange(len(rows)) + max(1, round(pyramid.video_hz))
        labels = [changing(frames, frames[second.clip(max=len(rows) - 1)])]
        robot = self.robots.get(source.source.embodiment)
        later = np.array([0, reader.fps, 2 * reader.fps, end])
        chunk = np.arange(pyramid.frames * pyramid.ratio) * reader.fps / pyramid.action_hz
        kinds = ("state", later, end), ("actions", chunk, end + 1)
        for values, width, (kind, ahead, most) in zip(
            reader.numbers(episode), pyramid.widths, kinds
        ):
            known = np.full((end + 2, width), np.nan, np.float32)  # the last row is past the end
            if robot and values is not None:
                normaliser = getattr(robot, kind)
                known[:-1, : values.shape[1]] = normaliser.apply(torch.from_numpy(values)) / 4
            at = np.add.outer(rows, ahead).round().astype(int).clip(max=most)
            labels.append(known[at].reshape(len(rows), -1))
        _, *widths = (part.shape[1] for part in labels)
        self.targets = ("place x", "place y", *np.repeat(["state", "actions"], widths).tolist())
        return Episode(frames, np.concatenate(labels, axis=1), seen.instruction, 1)

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

    def draw(self, size: int) -> list[Episode]:
        return [self.episodes[i] for i in self.rng.integers(len(self.episodes), size=size)]

    def clips(self, size: int) -> Tensor:
        """Five frames at the video rate (B, 3, 5, H, W) in [-1, 1]."""
        clips = []
        for frames, _, _, rate in self.draw(size):
            rows = rate * np.arange(5)
            rows += self.rng.integers(max(1, len(frames) - rows[-1]))
            clips.append(frames[rows.clip(max=len(frames) - 1)])
        return rearrange(torch.tensor(np.stack(clips)), "b f h w c -> b c f h w") / 127.5 - 1

    def grounded(self, size: int) -> tuple[Tensor, list[str], Tensor]:
        """Pictures (B, H, W, 3) uint8, the instruction about each, and targets (B, G)."""
        found = []
        for frames, labels, text, _ in self.draw(size):
            t = self.rng.integers(len(frames))
            found.append((frames[t], text, labels[t]))
        pictures, texts, targets = zip(*found)
        return torch.tensor(np.stack(pictures)), texts, torch.tensor(np.stack(targets)).float()

    def misread(self, texts: Sequence[str]) -> tuple[list[str], Tensor]:
        """Instructions, every other of which is one that was not carried out, and which are right
        (B,)."""
        found = list(texts)
        for i in range(0, len(found), 2):
            found[i] = self.rng.choice([text for text in self.sentences if text != found[i]])
        return found, torch.arange(len(found)) % 2 == 1


def changing(now: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Where pictures (n, H, W, 3) change most, over a twelfth of their height: (n, 2), 0 to 1 from
    left and top, NaN where nothing does."""
    change = torch.from_numpy(now).float().sub(torch.from_numpy(then)).abs().mean(dim=-1)
    n, height, width = change.shape
    side = height // 24
    near = F.avg_pool2d(change[:, None], 2 * side + 1, 1, side)
    most, at = near.flatten(1).max(dim=1)
    places = torch.stack([(at % width + 0.5) / width, (at // width + 0.5) / height], dim=1)
    places[most < 8] = torch.nan  # of 255
    return places.numpy()


class Job(NamedTuple):
    """One part of the backbones that are to be made, and what it learns from."""

    preset: str
    shipped: Backbones  # those of the repository
    out: Path
    pyramid: Pyramid
    corpus: Corpus
    held_out: Corpus
    steps: int
    batch: int
    device: str

    def begin(self, fresh: nn.Module, old: nn.Module) -> nn.Module:
        """A fresh network, on the device; where there are no labels, with the weights of an old
        one, whose embedding may have fewer rows."""
        mine = fresh.state_dict()
        for name, value in {} if self.corpus.labelled else old.state_dict().items():
            mine[name][: len(value)] = value
        return fresh.to(self.device)


def word_tokenizer(
    path: Path, specials: Sequence[str], sentences: Iterable[str], known: Tokenizer | None = None
) -> Tokenizer:
    """Writes a `tokenizer.json` with one id per word, those of `known` first; words never seen
    become <unk>."""
    first = known.get_vocab() if known else {}
    words = sorted(set(" ".join(sentences).split()))
    new = (word for word in ["<pad>", "<unk>", *specials, *words] if word not in first)
    vocabulary = first | {word: i for i, word in enumerate(new, len(first))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(path))
    return tokenizer


def optimise(
    name: str,
    networks: Iterable[nn.Module],
    steps: int,
    lr: float,
    loss: Callable[[], Terms],
) -> Figures:
    """AdamW with warm-up and cosine decay on the terms of `loss`, each of whose means
    over the last hundred steps is returned."""
    parameters = [p for network in networks for p in network.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.03, cycle_momentum=False, final_div_factor=0.8
    )
    seen = []
    for _ in tqdm(range(steps), name, unit="step", mininterval=2):
        optimizer.zero_grad()
        terms = loss()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen.append([term.item() for term in terms.values()])
    means = np.mean(seen[-100:], axis=0).tolist()
    return {f"{name}_{key}_loss": mean for key, mean in zip(terms, means)}


# -- the networks ---------------------------------------------------------------------------------


def pretrain_text(job: Job) -> Figures:
    """Predicts masked words, three in ten, with a head tied to the embedding."""
    file = job.out / "text.json"
    sentences = job.corpus.sentences
    shipped = job.shipped
    known = None if job.corpus.labelled else shipped.text_tokenizer.tokenizer
    words = word_tokenizer(file, ["</s>"], sentences, known)
    model = UMT5Encoder(replace(shipped.text.config, vocab=words.get_vocab_size()))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    model = job.begin(model, shipped.text)
    all_ids, all_mask = T5Tokenizer(file, preset(job.preset).video.text_len).encode(sentences)

    def loss() -> Terms:
        rows = torch.randint(len(sentences), (job.batch,))
        ids = all_ids[rows]
        mask = all_mask[rows]
        hidden = (torch.rand(ids.shape) < 0.3) & mask
        ids, mask, hidden = (x.to(job.device) for x in (ids, mask, hidden))
        states = model(ids.masked_fill(hidden, words.token_to_id("<unk>")), mask)
        logits = states[hidden] @ model.token_embedding.weight.T
        return {"words": F.cross_entropy(logits, ids[hidden])}

    figures = optimise("text", [model], job.steps, 3e-3, loss)
    save_part(job.out / "text.safetensors", model.cpu(), torch.float16)
    return figures


class Answers(NamedTuple):
    """Of B pictures: the truth, and what the probes of `Grounding` say."""

    target: Tensor  # (B, G), NaN where unknown
    cell: Tensor  # (B,), the image token at the named object
    which: Tensor  # (B, image tokens), logits of that
    where: Tensor  # (B, 2), the place by that token
    everything: Tensor  # (B, G), by the last token
    right: Tensor  # (B,) bool, whether the instruction is that of the picture
    fits: Tensor  # (B,), logits of that


class Grounding(nn.Module):
    """Three questions to a VLM, all answered by hidden states through linear probes: which image
    token holds the named object (dense, so it is learnt at once), where exactly that token thinks
    it is, and what the last token of the prompt makes of it all. Without labels, of several
    instructions a fourth: whether the one that was read fits what was then done. What is unknown
    counts for nothing."""

    def __init__(self, job: Job, vlm: Qwen3VL, tokenizer: Tokenizer):
        super().__init__()
        config = vlm.config
        corpus = job.corpus
        self.reader = Backbones(vlm=(vlm, tokenizer))
        self.image = config.image_token
        self.size = torch.tensor(job.pyramid.size)  # height and width
        self.grid = self.size // (config.patch * config.merge)  # rows and columns of image tokens
        self.which = nn.Linear(config.width, 1)
        self.where = nn.Linear(config.width, 2)
        self.last = nn.Linear(config.width, len(corpus.targets))
        self.fits = None
        if not corpus.labelled and len(corpus.sentences) > 1:
            self.fits = mlp(config.width + len(corpus.targets), config.width, 1)
        self.to(job.device)

    def forward(self, corpus: Corpus, count: int) -> Answers:
        pictures, texts, target = corpus.grounded(count)
        right = torch.ones(count, dtype=torch.bool)
        if self.fits:
            texts, right = corpus.misread(texts)
        prompts = self.reader.prompts(pictures, texts)
        hidden, mask = self.reader.understand(pictures, texts, prompts)
        device = hidden.device
        tokens = hidden[(prompts[0] == self.image).to(device)].view(count, -1, hidden.shape[-1])
        batch = torch.arange(count, device=device)
        places = (target[:, [1, 0]].nan_to_num() * self.grid).long()
        row, column = places.clamp(0 * self.grid, self.grid - 1).unbind(dim=1)
        cell, target, right = (x.to(device) for x in (row * self.grid[1] + column, target, right))
        read = hidden[batch, mask.sum(dim=1) - 1]
        fits = read[:, 0]
        if self.fits:
            fits = self.fits(torch.cat([read, target.nan_to_num()], dim=1))[:, 0]
            target[~right] = torch.nan
        where = self.where(tokens[batch, cell])
        return Answers(
            target, cell, self.which(tokens)[..., 0], where, self.last(read), right, fits
        )

    def loss(self, corpus: Corpus, count: int) -> Terms:
        said = self(corpus, count)
        seen = ~said.target[:, 0].isnan()
        terms = {
            "which": (F.cross_entropy(said.which, said.cell, reduction="none") * seen).mean(),
            "where": probe_error(said.where, said.target[:, :2]),
            "all": probe_error(said.everything, said.target),
        }
        if self.fits:
            terms["fits"] = F.binary_cross_entropy_with_logits(said.fits, said.right.float())
        return terms

    @torch.no_grad()
    def figures(self, corpus: Corpus, count: int = 512) -> Figures:
        said = self(corpus, count)
        away = (said.where - said.target[:, :2]).cpu() * self.size.flip(0)
        found = (said.which.argmax(dim=1) == said.cell)[~said.target[:, 0].isnan()]
        figures = {
            "vlm_named_object_found": found.float().mean().item(),
            "vlm_position_error_px": away.norm(dim=1).nanmean().item(),
        }
        if self.fits:
            told = (said.fits > 0) == said.right
            figures["vlm_instruction_told"] = told.float().mean().item()
        errors = (said.everything - said.target).abs().nanmean(dim=0).tolist()
        for name in dict.fromkeys(corpus.targets):
            alike = [error for other, error in zip(corpus.targets, errors) if other == name]
            figures[f"vlm_error {name}"] = float(np.mean(alike))
        return figures


def probe_error(found: Tensor, target: Tensor) -> Tensor:
    known = target.where(~target.isnan(), found)
    return 8 * F.smooth_l1_loss(found, known, beta=0.02)


def pretrain_vlm(job: Job) -> Figures:
    """Answers the questions of `Grounding`, whose probes are thrown away."""
    sentences = [*job.corpus.sentences, "user"]
    known = None if job.corpus.labelled else job.shipped.vlm_tokenizer
    tokenizer = word_tokenizer(job.out / "vlm.json", SPECIAL, sentences, known)
    words = tokenizer.get_vocab_size()
    image = tokenizer.token_to_id("<|image_pad|>")
    vlm = Qwen3VL(replace(job.shipped.vlm.config, vocab=words, image_token=image))
    vlm.init_weights()
    grounding = Grounding(job, job.begin(vlm, job.shipped.vlm), tokenizer)
    loss = partial(grounding.loss, job.corpus, job.batch)
    figures = optimise("vlm", [grounding], job.steps, 1.5e-3, loss)
    figures |= grounding.figures(job.held_out)
    save_part(job.out / "vlm.safetensors", vlm.cpu(), torch.float16)
    return figures


def pretrain_vae(job: Job) -> Figures:
    """L1 and squared error, and a little KL. The toy's begins with nothing, another goes on from
    the one of the repository, and without labels on parts of pictures, which is twice as fast. The
    mean and std of the latents are noted in the config, and the peak signal-to-noise ratio in dB in
    the figures, that of all pixels and of those that move."""
    vae = job.shipped.vae
    z = preset(job.preset).video.latent
    # While it learns, latents are as they are.
    config = replace(vae.config, z_dim=z, mean=(0.0,) * z, std=(1.0,) * z)
    if job.preset == "toy":
        vae = WanVAE(config)
    vae.config = config
    vae.to(job.device)

    def loss() -> Terms:
        video = job.corpus.clips(job.batch).to(job.device)
        if not job.corpus.labelled:
            video = part_of(video)
        mean, logvar = vae.posterior(video)
        logvar = logvar.clamp(-20, 10)
        drawn = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = vae.decode(drawn, clamp=False) - video
        pixels = (1 + 6 * moving(video)) * (error.abs() + 2 * error.square())
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return {"pixels": pixels.mean(), "kl": 1e-5 * divergence.sum(dim=1).mean()}

    figures = optimise("vae", [vae], job.steps, 3e-3, loss)
    with torch.no_grad():
        latents, _ = vae.posterior(job.corpus.clips(128).to(job.device))
        std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
        vae.config = replace(vae.config, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
        video = job.held_out.clips(128).to(job.device)
        pair = [127.5 * x.movedim(1, -1) for x in (vae.decode(vae.encode(video)), video)]
    save_part(job.out / "vae.safetensors", vae.cpu())
    figures["vae_psnr_db"] = psnr(*pair)
    figures["vae_psnr_moving_db"] = psnr(*pair, moving(video)[:, 0] > 0)
    return figures


def part_of(video: Tensor) -> Tensor:
    """The same two thirds of the height and width of clips (B, 3, F, H, W), anywhere."""
    for dim in (3, 4):
        side = 16 * round(video.shape[dim] / 24)
        first = torch.randint(1 + video.shape[dim] - side, ()).item()
        video = video.narrow(dim, first, side)
    return video


def moving(video: Tensor) -> Tensor:
    """1 where a clip (B, 3, F, H, W) in [-1, 1] changes from one frame to the next, in both of
    them: (B, 1, F, H, W). What moves is small and matters; without a weight on it a little VAE
    spends itself on the texture of the table."""
    change = (video.diff(dim=2).abs().amax(dim=1, keepdim=True) > 0.15).float()  # (B, 1, F-1, H, W)
    return F.max_pool3d(F.pad(change, (0, 0, 0, 0, 1, 1)), (2, 1, 1), stride=1)


def pretrain_dcae(
    model: LatentActionModel, flow: Tensor, labels: Tensor, mask: Tensor, steps: int
) -> Figures:
    """Trains the DC-AE inside `model`, in place, on flow (N, H, W, 2), and a head that is thrown
    away and reads the labels (N, A), where mask (N, A) has them, from the tokens, so that these
    keep what a small part of the robot does. Half of the rows that are drawn are any, a quarter
    labelled ones, and a quarter those in which the part that seldom moves does."""
    generator = torch.Generator().manual_seed(0)
    device = model.token_mean.device
    features = len(model.token_mean)
    dcae = model.dcae.train()
    reader = mlp(features, features, model.config.action_dim)
    head = nn.Sequential(nn.LayerNorm(features), reader).to(device)
    known = mask.any(dim=1)
    rare = rarest_motions(labels, mask)
    often = torch.full((len(flow),), 2 / len(flow))
    often[known] += 1 / known.sum()
    often[rare] += 1 / max(1, len(rare))

    def loss() -> Terms:
        rows = often.multinomial(32, replacement=True, generator=generator)
        moved, wanted = mirrored(flow[rows], labels[rows], generator)
        moved = moved.to(device)
        given = mask[rows].to(device)
        tokens = dcae.encode(model.flow_to_picture(moved))
        read = head(rearrange(tokens, "b c h w -> b (h w c)"))
        error = torch.where(given, read - wanted.to(device), 0.0).square().sum()
        return {
            # Small moving things are a few percent of a picture: unless they weigh much, it stays
            # white.
            "reconstruction": model.picture_loss(dcae.decode(tokens), moved, moving=100.0),
            "labels": error / given.sum().clamp(min=1),
        }

    figures = optimise("dcae", [dcae, head], steps, 3e-3, loss)
    dcae.requires_grad_(model.config.finetune_dcae).eval()
    return figures


# -- the command ----------------------------------------------------------------------------------

MAKERS = {
    "text": pretrain_text,
    "vlm": pretrain_vlm,
    "vae": pretrain_vae,
}
RECIPES = {  # steps of each part, in whose place `--steps` is taken, and samples per step
    "toy": {"text": (400, 64), "vlm": (4000, 64), "vae": (3000, 12)},
    "sim": {"text": (400, 64), "vlm": (1700, 32), "vae": (1000, 4)},
}
# Where there are no labels, on from the preset's.
UNLABELLED = {"text": (200, 64), "vlm": (800, 32), "vae": (800, 4)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.option
    add("--preset", "toy", "whose sizes they have", choices=RECIPES)
    add("--data", str, "card; default the preset's")
    add("--out", output_folder, "folder to write", required=True)
    add("--keep", "", "parts to copy from the repository: text, vlm, vae")
    add("--steps", int, "of each part")
    add("--episodes", 500, "at most, of a card; per level of a world")
    add(*DEVICE)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.preset]
    ours = PRESETS[args.preset].backbones
    kept = set(filter(None, args.keep.split(",")))
    if args.out.resolve() == ours.resolve():
        raise ValueError(f"--out {args.out} holds the repository's backbones; name another folder")
    if not kept <= recipe.keys():
        raise ValueError(f"--keep is {args.keep!r}; expected parts among {', '.join(recipe)}")
    pyramid = open_pyramid(args.data, "latent", args.preset, args.episodes)
    corpora = [Corpus(pyramid, args.episodes, held_out) for held_out in (False, True)]
    if not corpora[0].labelled:
        recipe = UNLABELLED
    args.out.mkdir(parents=True, exist_ok=True)
    for file in ours.iterdir():
        if file.stem in kept | {"dcae"}:
            shutil.copyfile(file, args.out / file.name)
    shipped = Backbones.load(ours)
    figures = {"command": f"python -m scripts.pretrain {' '.join(argv or sys.argv[1:])}"}
    for part, (steps, batch) in recipe.items():
        if part not in kept:
            torch.manual_seed(0)  # each part is the same, whichever others are made
            for corpus in corpora:
                corpus.rng = np.random.default_rng(0)
            many = args.steps or steps
            job = Job(args.preset, shipped, args.out, pyramid, *corpora, many, batch, device())
            figures |= MAKERS[part](job)
    write_json(args.out / "card.json", figures)
    print(plain_json(figures))


if __name__ == "__main__":
    run_command(main)
