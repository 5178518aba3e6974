"""The frozen networks in front of Motus: pixels and words in, what `motus.Inputs` holds out.

    frames       --> Wan2.2 video VAE --> latents                (and back)
    instruction  --> UMT5             --> text states            (context of the video expert)
    first frame, instruction --> Qwen3-VL --> hidden states      (the understanding expert)

Shapes: B batch, F frames, H W picture, C T h w latents, Lt text rows, Dt text width, Lu rows and
Dv width of the VLM.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor, nn

from backbones.published import load_text, load_vae, load_vlm, read_tokenizer
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig, pad_prompts, prepare_image, prompt_ids
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder
from backbones.wan_vae import WanVAE, WanVAEConfig
from weights.files import digest, open_source, save_safetensors
from weights.load import load_part

ENCODE = "`python sample.py --encode-text`"
MOVED = 25  # grey levels of 255: more than the noise of a camera or of a codec


def changed(first: Tensor, later: Tensor, levels: int) -> Tensor:
    """Which pixels of frames (B, F, H, W, 3) uint8 differ from those of (B, 1, H, W, 3) by more
    than so many of 255 levels in a channel: bool (B, F, H, W)."""
    return ((later.short() - first.short()).abs() > levels).any(dim=4)


def moving_places(frames: Tensor, latents: Tensor) -> Tensor | None:
    """Which places of latents (B, C, T, h, w) have a pixel that is not what it was in the first of
    their frames (B, F, H, W, 3) uint8: bool (B, T, h, w). None for an observation alone."""
    if frames.shape[1] == 1:
        return None
    pixels = changed(frames[:, :1], frames[:, 1:], MOVED).float()
    grid = latents.shape[2] - 1, *latents.shape[3:]
    moves = F.adaptive_max_pool3d(pixels, grid)
    return F.pad(moves, (0, 0, 0, 0, 1, 0)).bool()


class Backbones(nn.Module):
    """The three networks that others pre-trained, and their tokenizers. Each may be absent: the
    text encoder where states of all instructions were prepared (`save_text`, `load_text`), the VLM
    in stage 1, everything but the text encoder where only that is done."""

    PARTS = ("vae", "text", "vlm")

    def __init__(
        self,
        vae: WanVAE | None = None,
        text: tuple[UMT5Encoder, T5Tokenizer] | None = None,
        vlm: tuple[Qwen3VL, Tokenizer] | None = None,
    ):
        super().__init__()
        self.vae = vae
        self.text, self.text_tokenizer = text or (None, None)
        self.vlm, self.vlm_tokenizer = vlm or (None, None)
        self.text_cache: dict[str, Tensor] = {}  # instruction -> states (L, Dt)
        self.digests: dict[str, str] = {}  # of `fingerprint`
        self.requires_grad_(False).eval()

    def to(self, *args, **kwargs) -> "Backbones":
        """As of any module. On a GPU the VAE's weights lie in memory as its activations do, or
        every call would copy them."""
        super().to(*args, **kwargs)
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        for weight in self.vae.parameters() if self.vae else ():
            if weight.is_cuda and weight.dim() in layouts:
                weight.data = weight.data.contiguous(memory_format=layouts[weight.dim()])
        return self

    @classmethod
    def load(
        cls,
        folder: str | Path,
        text_len: int = 512,
        parts: Sequence[str] = PARTS,
        motus: str | Path | None = None,
    ) -> "Backbones":
        """The `parts` in a folder of ours: `vae.safetensors`, `text.safetensors`,
        `vlm.safetensors`, each with its config in the metadata, and the tokenizers `text.json`,
        `vlm.json`; else in the published folders `wan` and `qwen3vl`. The official Motus file
        `motus` has the VLM too; of `qwen3vl` only configs and tokenizer are read then."""
        folder = Path(folder)
        own = (folder / "vae.safetensors").is_file()
        vae = text = vlm = None
        if own and "vae" in parts:
            vae = load_part(folder / "vae.safetensors", WanVAE, WanVAEConfig)
        elif "vae" in parts:
            vae = load_vae(folder / "wan")
        if own and "text" in parts:
            encoder = load_part(folder / "text.safetensors", UMT5Encoder, UMT5Config)
            text = encoder, T5Tokenizer(folder / "text.json", text_len)
        elif "text" in parts:
            text = load_text(folder / "wan", text_len)
        if own and "vlm" in parts:
            network = load_part(folder / "vlm.safetensors", Qwen3VL, Qwen3VLConfig)
            vlm = network, read_tokenizer(folder / "vlm.json")
        elif "vlm" in parts:
            vlm = load_vlm(folder / "qwen3vl", motus)
        return cls(vae, text, vlm)

    # -- what a cache of their outputs must know --

    def fingerprint(self, *names: str) -> dict[str, str]:
        """A digest of each part that is here (or of `names`), weights and tokenizer; of the text
        encoder too if it only prepared states. What the backbones computed is stale where it
        differs."""
        names = names or self.PARTS
        words = {
            "text": self.text_tokenizer and self.text_tokenizer.tokenizer,
            "vlm": self.vlm_tokenizer,
        }
        for name in set(names) - self.digests.keys():
            part = getattr(self, name)
            if part is not None:
                tokenizer = words[name].to_str() if name in words else ""
                config = json.dumps(asdict(part.config))
                self.digests[name] = digest(part.state_dict(), config, tokenizer)
        return {name: self.digests[name] for name in names if name in self.digests}

    def save_text(self, path: str | Path) -> None:
        """Writes the states (L, Dt) of all instructions encoded so far, each under its
        instruction."""
        save_safetensors(path, self.text_cache, {"made by text": self.fingerprint("text")["text"]})

    def load_text(self, path: str | Path, width: int) -> "Backbones":
        """Adds states that `save_text` wrote. ValueError if they have not `width`, or another text
        encoder made those that are here."""
        with open_source(path) as source:
            maker = source.metadata.get("made by text")
            widths = {source.shape(name)[-1] for name in source.names()}
            if maker is None or widths - {width}:
                raise ValueError(
                    f"{path} holds no text states of width {width} (found {widths}); write "
                    f"them with {ENCODE}"
                )
            ours = self.fingerprint("text").get("text", maker)
            if ours != maker:
                raise ValueError(
                    f"{path} was made by text encoder {maker}, the one here is {ours}; encode the "
                    f"instructions again with {ENCODE}"
                )
            self.digests["text"] = maker
            self.text_cache |= {name: source.read(name).clone() for name in source.names()}
        return self

    # -- pixels and words in, latents and states out --

    def encode_video(self, frames: Tensor) -> Tensor:
        """frames (B, F, H, W, 3) uint8, F = 1 + 4n -> normalised latents (B, C, T, h, w) fp32;
        frame 0 alone makes latent frame 0."""
        pixels = rearrange(frames, "b f h w c -> b c f h w").float() / 127.5 - 1
        return self.vae.encode(pixels).contiguous()

    def decode_video(self, latents: Tensor) -> Tensor:
        """latents (B, C, T, h, w) -> frames (B, F, H, W, 3) uint8."""
        frames = (self.vae.decode(latents) + 1) * 127.5
        return rearrange(frames, "b c f h w -> b f h w c").round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Instructions -> states (B, Lt, Dt), zero after each text, and lengths (B,). An
        instruction is encoded once and remembered."""
        missing = sorted(set(texts) - set(self.text_cache))
        if missing and self.text is None:
            raise ValueError(
                f"{missing[0]!r} is among no prepared text states, and no text encoder is loaded; "
                f"prepare it with {ENCODE}"
            )
        device = next(self.parameters()).device
        for text in missing:
            ids, mask = self.text_tokenizer.encode([text])
            states = self.text(ids.to(device), mask.to(device))
            self.text_cache[text] = states[0].cpu()  # there may be many
        states = [self.text_cache[text] for text in texts]
        lengths = torch.tensor([len(rows) for rows in states], device=device)
        return nn.utils.rnn.pad_sequence(states, batch_first=True).to(device), lengths

    def prompts(self, images: Tensor, texts: Sequence[str]) -> list[Tensor]:
        """images (B, H, W, 3) uint8 with their instructions -> ids and mask (B, L), patches and
        grids, on the CPU. The prompt is the one that the official code deploys with."""
        config = self.vlm.config
        prepared = [prepare_image(image, config) for image in images.cpu().numpy()]
        patches, grids = zip(*prepared)
        prompts = [
            prompt_ids(self.vlm_tokenizer, text, grid, merge=config.merge)
            for text, grid in zip(texts, grids)
        ]
        return [*pad_prompts(prompts), torch.cat(patches), torch.cat(grids)]

    def understand(
        self, images: Tensor, texts: Sequence[str], prompts: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """images (B, H, W, 3) uint8 with their instructions, or what `prompts` made of them -> VLM
        hidden states (B, Lu, Dv) and mask (B, Lu) bool."""
        device = next(self.vlm.parameters()).device
        ids, mask, pixels, grid = prompts or self.prompts(images, texts)
        return self.vlm(ids, mask, pixels.to(device), grid), mask.to(device)

    @torch.no_grad()
    def conditions(
        self,
        frames: Tensor,
        texts: Sequence[str],
        und: bool = True,
        prompts: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor | None]:
        """frames (B, F, H, W, 3) uint8, the observation first (F may be 1), and instructions ->
        what the network sees of them, by the names of `motus.Inputs`; without the VLM if not
        `und`."""
        context, lengths = self.encode_text(texts)
        states, mask = self.understand(frames[:, 0], texts, prompts) if und else (None, None)
        frames = frames.to(context.device)
        latents = self.encode_video(frames)
        return {
            "latents": latents,
            "moves": moving_places(frames, latents),
            "context": context,
            "context_len": lengths,
            "und": states,
            "und_mask": mask,
        }
