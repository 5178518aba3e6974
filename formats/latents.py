"""Latent actions of a dataset's episodes, as files beside a card:
`python -m scripts.latents encode --data DATASET --out FOLDER` writes them."""

from pathlib import Path

import numpy as np
from numpy import ndarray

from formats.recordings import Recordings
from weights.files import open_source, read_json


def about_latents(folder: Path, more: str = "") -> dict:
    """How the latent actions in a folder were made, with their mean and std."""
    file = folder / "statistics.json"
    about = read_json(file) if file.is_file() else {}
    if not {"mean", "std", "made"} <= about.keys():
        raise ValueError(
            f"{folder} holds no latent actions (statistics.json with mean, std, made); make "
            "them with `python -m scripts.latents encode --weights RUN --data CARD`, or name "
            f'their folder with "latents" in the card{more}'
        )
    return about


def read_latents(
    folder: Path, about: dict, reader: Recordings, episode: int
) -> tuple[ndarray, ndarray]:
    """An episode's rows (T', 14), standardised, one for each frame, and which of them are known
    (T',). An episode that was skipped has none."""
    width = len(about["mean"])
    name = reader.clip(episode)
    summary = folder / "summary.json"
    if summary.is_file() and name in read_json(summary).get("skipped", {}):
        return np.zeros((1, width), np.float32), np.zeros(1, bool)
    path = folder / f"latent_action_dim{width}" / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing; encode the dataset's latent actions again")
    with open_source(path) as source:
        rows = source.read("latent_action").numpy() - np.float32(about["mean"])
        valid = source.read("valid").numpy().copy()
    if not 0 <= reader.lengths[episode] - len(rows) <= 1:
        raise ValueError(
            f"{path} has {len(rows)} rows, the episode {reader.lengths[episode]}; encode "
            "its latent actions again"
        )
    return rows / np.float32(about["std"]), valid
