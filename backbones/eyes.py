"""The frozen VAE on a user's pictures: how well it gives them back, before any training."""

import math
from pathlib import Path

import numpy as np
import torch

from backbones.frozen import Backbones
from weights.files import read_json
from weights.options import device

WORSE = 3.0  # dB below what it reaches on its own pictures: then it is to be taught
LEAST = 26.0  # dB, where no card says what it reaches, as of the published one: our choice
SIDE = 128  # of what the published one, which is large, is shown: the middle of two pictures


def note(pyramid, folder: Path, preset: str) -> str:
    """A line: the peak signal-to-noise ratio in dB at which the VAE of a folder gives back a few
    windows of a `formats.cards.Pyramid`, and when to teach it, or the tokenizers new words. What
    cannot be tried is said, and no error."""
    own = (folder / "vae.safetensors").is_file()
    rows = pyramid.draw(8 if own else 2, 0, 0)[:, :3].tolist()
    try:
        backbones = Backbones.load(folder, parts=("vae",)).to(device())
        frames = np.stack([pyramid.window(row, "none").frames for row in rows])
    except (OSError, ValueError) as error:
        return f"eyes     the VAE of {folder} is not tried on these pictures: {error}"
    frames = torch.from_numpy(frames)[:, :5]
    if not own:
        top, left = (max(0, side - SIDE) // 2 for side in pyramid.size)
        frames = frames[:, :1, top : top + SIDE, left : left + SIDE]
    with torch.no_grad():
        again = backbones.decode_video(backbones.encode_video(frames.to(device()))).cpu()
    error = (again.float() - frames.float()).square().mean().item()
    found = 10 * math.log10(255**2 / max(error, 1e-3))
    card = folder / "card.json"
    known = read_json(card).get("vae_psnr_db") if card.is_file() else None
    least = known - WORSE if known else LEAST
    line = f"eyes     the VAE of {folder} gives these pictures back at {found:.1f} dB, expected "
    line += f"{least:.1f} or more" + (f" ({known:.1f} on its own)" if known else "")
    if own and (found < least or "unknown words" in pyramid.notes()):
        line += (
            f": teach eyes and words by `python -m scripts.pretrain --preset {preset} --data "
            f"{pyramid.name} --out FOLDER`, and train with MOTUS_BACKBONES=FOLDER"
        )
    elif found < least:
        line += ": films will be as blurred as that"
    return line
