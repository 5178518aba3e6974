"""Latent actions of a dataset's episodes, as files beside a card."""

from pathlib import Path

import numpy as np

from formats.recordings import Recordings
from weights.files import open_source, read_json


class LatentFiles:
    """Latent actions as `python -m scripts.latents encode --data DATASET --out FOLDER` writes them.
    An episode that was skipped there has none."""

    def __init__(self, folder: Path, reader: Recordings, more: str = ""):
        about, summary = (
            read_json(file) if file.is_file() else {}
            for file in (folder / "statistics.json", folder / "summary.json")
        )
        if not {"mean", "std", "made"} <= about.keys():
            raise ValueError(
                f"{folder} holds no latent actions (statistics.json with mean, std, made); make "
                "them with `python -m scripts.latents encode --weights RUN --data CARD`, or name "
                f'their folder with "latents" in the card{more}'
            )
        self.folder = folder
        self.reader = reader
        self.name = str(folder)
        self.skipped = summary.get("skipped", {})
        self.seconds = about["made"]["interval"] / reader.fps  # that one latent action spans
        self.encoder = about["made"].get("model")
        self.mean = np.float32(about["mean"])
        self.std = np.float32(about["std"])

    def __call__(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (T', 14), and which of them are known (T',)."""
        name = self.reader.clip(episode)
        if name in self.skipped:
            return np.zeros((1, len(self.mean)), np.float32), np.zeros(1, bool)
        path = self.folder / f"latent_action_dim{len(self.mean)}" / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing; encode the dataset's latent actions again")
        with open_source(path) as source:
            rows = (source.read("latent_action").numpy() - self.mean) / self.std
            valid = source.read("valid").numpy().copy()
        if not 0 <= self.reader.lengths[episode] - len(rows) <= 1:
            raise ValueError(
                f"{path} has {len(rows)} rows, the episode {self.reader.lengths[episode]}; encode "
                "its latent actions again"
            )
        return rows, valid
