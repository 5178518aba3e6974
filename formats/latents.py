"""Latents."""

from pathlib import Path

import numpy as np

from formats.lerobot import COLUMN, KNOWN, LeRobotDataset
from weights.files import open_source, read_json


class LatentFiles:
    """Latent actions of a dataset's episodes, as `python latent_action.py encode --data DATASET
    --out FOLDER` writes them: a row for each frame of an episode, standardised here. An episode
    that was skipped there has none."""

    def __init__(self, folder: Path, fps: float):
        about, summary = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in ("statistics.json", "summary.json")
        )
        if not {"mean", "std", "made"} <= about.keys():
            raise ValueError(
                f"{folder} holds no latent actions (statistics.json with mean, std, made); make them with `python "
                'latent_action.py encode --data DATASET`, or name their folder with "latents" in the card'
            )
        self.folder, self.name, self.skipped = folder, str(folder), summary.get("skipped", {})
        self.seconds = about["made"]["interval"] / fps
        self.mean, self.std = (
            np.array(about["mean"], np.float32),
            np.array(about["std"], np.float32),
        )

    def __call__(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (T', 14), and which of them are known."""
        name = f"episode_{episode:06d}"
        if name in self.skipped:
            return np.zeros((1, len(self.mean)), np.float32), np.zeros(1, bool)
        path = self.folder / f"latent_action_dim{len(self.mean)}" / f"{name}.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing; encode the dataset's latent actions again")
        with open_source(path) as source:
            return (source.read("latent_action").numpy() - self.mean) / self.std, source.read(
                "valid"
            ).numpy()


class LatentColumn:
    """The same from columns of the dataset itself, as `python latent_action.py encode --data
    DATASET --out FOLDER --column NEW` adds them to the dataset NEW."""

    def __init__(self, reader: LeRobotDataset):
        self.reader, self.name, about = (
            reader,
            reader.name,
            reader.features[COLUMN].get("info") or {},
        )
        if not {"mean", "std", "seconds"} <= about.keys():
            raise ValueError(
                f"{reader.name}: column {COLUMN} lacks its info (mean, std, seconds) in info.json; write it again with "
                "`python latent_action.py encode --column`, or name a folder of latents in the card"
            )
        self.seconds, self.mean, self.std = (
            about["seconds"],
            *(np.array(about[key], np.float32) for key in ("mean", "std")),
        )

    def __call__(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.reader.rows(episode, COLUMN, KNOWN)
        return (rows[COLUMN] - self.mean) / self.std, rows[KNOWN][:, 0]
