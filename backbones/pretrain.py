"""Pre-trains backbones of toy size, so that a toy run starts where a user of the real model starts: from frozen networks that already see.

The real backbones come from the web (Wan2.2, UMT5, Qwen3-VL); their toy instances are the same classes, taught here by three objectives:

    video VAE    reconstruct clips: L1 + squared error, a little KL; then the mean and std of its latents are measured and stored
    text         predict masked words from the rest of the sentence
    VLM          ground: after reading instruction and picture, the hidden states say, through linear maps that are thrown away, which
                 image token holds the named object, where exactly it is, and where to take it

Nothing here knows the world: pictures, sentences and targets come in as functions of a seed. `train.py --stage backbones` calls it.

Shapes: B batch, F frames, H W pixels, L tokens, D width, G grounding targets.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig, pad_prompts, patchify, prompt_ids
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder
from backbones.wan import WanVAE


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


# -- video VAE --------------------------------------------------------------------------------------------------------------


def pretrain_vae(
    vae: WanVAE, clips: Callable[[int], Tensor], steps: int, lr: float = 3e-3, kl: float = 1e-5
) -> None:
    """Trains in place on clips(seed) -> (B, F, H, W, 3) uint8, and notes the latents' mean and std in its config."""

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
    """1 where a clip (B, 3, F, H, W) in [-1, 1] changes from one frame to the next, in both of them: (B, 1, F, H, W). What moves is small
    and matters; without a weight on it a little VAE spends itself on the texture of the table."""
    change = (video.diff(dim=2).abs().amax(dim=1, keepdim=True) > 0.15).float()  # (B, 1, F-1, H, W)
    return torch.maximum(F.pad(change, (0, 0, 0, 0, 0, 1)), F.pad(change, (0, 0, 0, 0, 1, 0)))


@torch.no_grad()
def vae_psnr(vae: WanVAE, clips: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB of the reconstruction of clips (B, F, H, W, 3) uint8: of all pixels, and of those that move."""
    video = rearrange(clips, "b f h w c -> b c f h w").float() / 127.5 - 1
    error, weight = (
        ((vae.decode(vae.encode(video)) - video) / 2).square(),
        moving(video).expand_as(video),
    )
    return tuple(
        -10 * math.log10(value) for value in (error.mean(), (error * weight).sum() / weight.sum())
    )


# -- text -------------------------------------------------------------------------------------------------------------------


def pretrain_text(
    config: UMT5Config, tokenizer: T5Tokenizer, sentences: list[str], steps: int, lr: float = 3e-3
) -> UMT5Encoder:
    """Predicts masked words (three in ten, at least a chance of one) with a head tied to the embedding."""
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


# -- vision-language model --------------------------------------------------------------------------------------------------

POSITION = 2  # the first two targets are x and y of the named object, in [0, 1]


def pretrain_vlm(
    config: Qwen3VLConfig,
    tokenizer,
    samples: Callable[[int], tuple[Tensor, list[str], Tensor]],
    targets: int,
    steps: int,
    lr: float = 1.5e-3,
) -> tuple[Qwen3VL, nn.ModuleDict]:
    """samples(seed) -> pictures (B, H, W, 3) uint8, instructions, grounding targets (B, G). Returns the model and its probes.

    Three questions, all answered by hidden states through linear probes: which image token holds the named object (dense, so it is
    learnt at once), where exactly that token thinks it is, and what the last token of the prompt makes of it all."""
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
    """Logits (B, image tokens) of the named object's place, its position (B, 2) by the token that holds it, all targets (B, G) by the
    last token, and the index (B,) of the token that holds it."""
    config = vlm.config
    pixels, grid = patchify(pictures, config)
    ids, mask = pad_prompts(
        [
            prompt_ids(tokenizer, text, grid[i : i + 1], "deployment", config.merge)
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
