"""Frozen."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor, nn

from backbones.published import load_text, load_vae, load_vlm, read_tokenizer
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig, pad_prompts, prepare_image, prompt_ids
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder, encode_text
from backbones.wan_vae import WanVAE, WanVAEConfig
from weights.files import digest, open_source, save_safetensors
from weights.load import load_part

# -- the frozen backbones -------------------------------------------------------------------------


class Backbones(nn.Module):
    """The three networks that others pre-trained, and their tokenizers: pixels and words in,
    latents and states out. Frozen.

    Each may be absent: the text encoder where states of all instructions were prepared
    (`save_text`, `load_text`), the VLM in stage 1, everything but the text encoder where only that
    is done."""

    PARTS = {
        "vae": (WanVAE, WanVAEConfig),
        "text": (UMT5Encoder, UMT5Config),
        "vlm": (Qwen3VL, Qwen3VLConfig),
    }

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
        self.text_cache: dict[str, Tensor] = {}
        self.digests: dict[str, str] = {}
        self.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        text_len: int = 512,
        parts: Sequence[str] = ("vae", "text", "vlm"),
        motus: str | Path | None = None,
    ) -> "Backbones":
        """The `parts` from one of two kinds of folder. Ours holds `vae.safetensors`,
        `text.safetensors`, `vlm.safetensors` (each with its config in the metadata) and the
        tokenizers `text.json`, `vlm.json`. The other holds the published folders `wan` and
        `qwen3vl`; of the latter only configs and tokenizer are read if the official Motus file
        `motus` is given, which has the VLM too."""
        wan, qwen = Path(folder) / "wan", Path(folder) / "qwen3vl"
        loaders = {
            "vae": lambda: load_vae(wan),
            "text": lambda: load_text(wan, text_len),
            "vlm": lambda: load_vlm(qwen, motus),
        }
        if (Path(folder) / "vae.safetensors").is_file():
            file = lambda name: Path(folder) / name
            own = lambda name: load_part(file(f"{name}.safetensors"), *cls.PARTS[name])
            loaders = {
                "vae": lambda: own("vae"),
                "text": lambda: (own("text"), T5Tokenizer(file("text.json"), text_len)),
                "vlm": lambda: (own("vlm"), read_tokenizer(file("vlm.json"))),
            }
        return cls(**{name: loaders[name]() for name in parts})

    def fingerprint(self, *names: str) -> dict[str, str]:
        """A digest of each part that is here (or of `names`), weights and tokenizer; of the text
        encoder too if it only prepared states. What the backbones computed is stale where it
        differs."""
        tokenizers = {
            "text": getattr(self.text_tokenizer, "tokenizer", None),
            "vlm": self.vlm_tokenizer,
        }
        for name in set(names or self.PARTS) - self.digests.keys():
            if (part := getattr(self, name)) is not None:
                words = tokenizers[name].to_str() if name in tokenizers else ""
                self.digests[name] = digest(
                    part.state_dict(), json.dumps(asdict(part.config)), words
                )
        return {name: self.digests[name] for name in names or self.PARTS if name in self.digests}

    def save_text(self, path: str | Path) -> None:
        """Writes the states (L, Dt) of all instructions encoded so far, each under its instruction."""
        save_safetensors(path, self.text_cache, {"made by text": self.fingerprint("text")["text"]})

    def load_text(self, path: str | Path, width: int) -> "Backbones":
        """Adds states that `save_text` wrote. ValueError if they have not `width`, or another text
        encoder made those that are here."""
        with open_source(path) as source:
            maker, found = (
                source.metadata.get("made by text"),
                {source.shape(name)[-1] for name in source.names()},
            )
            if maker is None or found - {width}:
                raise ValueError(
                    f"{path} holds no text states of width {width} (found {sorted(found)[:5]}); write them with "
                    "`python sample.py --encode-text`"
                )
            if (ours := self.fingerprint("text").get("text", maker)) != maker:
                raise ValueError(
                    f"{path} was made by text encoder {maker}, the one here is {ours}; encode the instructions again"
                )
            self.digests["text"] = maker
            self.text_cache |= {name: source.read(name).clone() for name in source.names()}
        return self

    def encode_video(self, frames: Tensor) -> Tensor:
        """frames (B, F, H, W, 3) uint8, F = 1 + 4n -> normalised latents (B, C, T, h, w) fp32;
        frame 0 alone makes latent frame 0."""
        return self.vae.encode(
            rearrange(frames, "b f h w c -> b c f h w").float() / 127.5 - 1
        ).contiguous()

    def decode_video(self, latents: Tensor) -> Tensor:
        """latents (B, C, T, h, w) -> frames (B, F, H, W, 3) uint8."""
        frames = (self.vae.decode(latents) + 1) * 127.5
        return rearrange(frames, "b c f h w -> b f h w c").round().clamp(0, 255).to(torch.uint8)

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Instructions -> states (B, Lt, Dt), zero after each text, and lengths (B,). An
        instruction is encoded once and remembered."""
        missing = sorted(set(texts) - set(self.text_cache))
        if missing and self.text is None:
            raise ValueError(
                f"{missing[0]!r} is among no prepared text states, and no text encoder is loaded; prepare it with "
                "`python sample.py --encode-text`"
            )
        for text in missing:
            context, lengths = encode_text(self.text, self.text_tokenizer, [text])
            self.text_cache[text] = context[0, : int(lengths[0])]
        device = next(self.parameters()).device
        states = [self.text_cache[text].to(device) for text in texts]
        lengths = torch.tensor([len(s) for s in states], device=device)
        return nn.utils.rnn.pad_sequence(states, batch_first=True), lengths

    def understand(
        self, images: Tensor, texts: Sequence[str], form: str = "deployment"
    ) -> tuple[Tensor, Tensor]:
        """images (B, H, W, 3) uint8 with their instructions -> VLM hidden states (B, Lu, Dv) and
        mask (B, Lu) bool. `form` is the prompt: the official code trains with one and deploys with
        another (`backbones/qwen3vl.py`); here one serves both unless asked otherwise."""
        config = self.vlm.config
        prepared = [prepare_image(image, config) for image in images.cpu().numpy()]
        pixels, grid = torch.cat([p for p, _ in prepared]), torch.cat([g for _, g in prepared])
        prompts = [
            prompt_ids(self.vlm_tokenizer, text, grid[i : i + 1], form, config.merge)
            for i, text in enumerate(texts)
        ]
        ids, mask = pad_prompts(prompts)
        device = self.vlm.language_model.norm.weight.device
        return self.vlm(*(x.to(device) for x in (ids, mask, pixels, grid))), mask.to(device)

    @torch.no_grad()
    def conditions(
        self, frames: Tensor, texts: Sequence[str], und: bool = True
    ) -> dict[str, Tensor | None]:
        """frames (B, F, H, W, 3) uint8, the observation first (F may be 1), and instructions ->
        what the network sees of them, by the names of `motus.Inputs`; without the VLM if not `und`.
        """
        context, lengths = self.encode_text(texts)
        states, mask = self.understand(frames[:, 0], texts) if und else (None, None)
        latents = self.encode_video(frames.to(context.device))
        return dict(
            latents=latents, context=context, context_len=lengths, und=states, und_mask=mask
        )
