"""Reads the toy's pictures: where the gripper is, and where each colour's disc, if there is one.
Trained on true pictures, whose answers the world knows, and used on imagined ones by
`scripts.truth`, which says how well it reads. No policy sees it.

    python -m scripts.detector --out weights/detector.safetensors

A few convolutions give one map of scores per thing, on half the grid: the softmax of a map says
where the thing is, its log-sum-exp whether it is there at all.

Shapes: n pictures of 48 x 48 pixels, K = 5 things: the gripper, then the four colours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.pretrain import optimise
from weights.load import load_part, save_part
from weights.options import Parser, output_file, run_command
from worlds.render import Snapshot
from worlds.robots import COLOURS, IMAGE
from worlds.tabletop import record

FILE = Path(__file__).parents[1] / "weights" / "detector.safetensors"
LEVELS = (4, 6, 7)  # those of the gripper


@dataclass(frozen=True)
class DetectorConfig:
    # channels, stride and dilation of each
    layers: tuple = ((16, 1, 1), (32, 2, 1), (32, 1, 1), (32, 1, 2), (32, 1, 1))


class Detector(nn.Module):
    """Pictures (n, 48, 48, 3) -> places (n, K, 2), x and y from 0 to 1 from left and top, and
    logits (n, K) of whether the things are there."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.maps = nn.Sequential()
        width = 3
        for n_out, stride, far in config.layers:
            conv = nn.Conv2d(width, n_out, 3, stride, padding=far, dilation=far)
            self.maps.extend([conv, nn.GELU()])
            width = n_out
        self.maps.append(nn.Conv2d(width, 1 + len(COLOURS), 1))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.maps(pictures.movedim(-1, 1).float() / 127.5 - 1).flatten(2)
        line = (torch.arange(IMAGE // 2) + 0.5) / (IMAGE // 2)
        grid = torch.cartesian_prod(line, line).flip(1)  # x, y
        return scores.softmax(dim=2) @ grid, scores.logsumexp(dim=2)

    @classmethod
    def shipped(cls) -> "Detector":
        """Not to be trained."""
        return load_part(FILE, cls, DetectorConfig).float().requires_grad_(False)


def examples(episodes: int) -> list[Tensor]:
    """Pictures of each level that has the gripper, with places (n, K, 2) and which things are there
    (n, K)."""
    recorded = [episode for level in LEVELS for episode in record(level, episodes, 0)]
    frames = np.concatenate([episode.frames for episode in recorded])
    shot = Snapshot(*map(np.concatenate, zip(*(episode.snapshots for episode in recorded))))
    here = shot.colours[..., None] == np.arange(len(COLOURS))  # (n, D, colours)
    discs = np.einsum("ndk,ndx->nkx", here, shot.discs)
    places = np.concatenate([shot.effector[:, None], discs], axis=1)
    there = np.insert(here.any(axis=1), 0, True, axis=1)
    return list(map(torch.tensor, (frames, places, there)))


def train(episodes: int, steps: int) -> Detector:
    torch.manual_seed(0)
    detector = Detector(DetectorConfig())
    data = examples(episodes)

    def loss() -> dict[str, Tensor]:
        rows = torch.randint(len(data[0]), (32,))
        frames, places, there = (column[rows].float() for column in data)
        # Some blur and noise, so that what a VAE does to a picture does not mislead it.
        blurred = F.avg_pool3d(frames, (5, 5, 1), 1, (2, 2, 0), count_include_pad=False)
        some, more = torch.rand(2, len(frames), 1, 1, 1)
        noise = 6 * more * torch.randn(frames.shape)
        found, logits = detector(frames.lerp(blurred, some) + noise)
        away = F.smooth_l1_loss(IMAGE * found, IMAGE * places, reduction="none").sum(dim=2)
        return {
            "places": (away * there).sum() / there.sum(),
            "there": F.binary_cross_entropy_with_logits(logits, there),
        }

    optimise("detector", [detector], steps, 3e-3, loss)
    return detector


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.option
    add("--out", output_file, "file to write", required=True)
    add("--episodes", 100, "of each level")
    add("--steps", 1200, "of training, 32 pictures each")
    args = parser.parse_args(argv)
    save_part(args.out, train(args.episodes, args.steps), torch.float16)


if __name__ == "__main__":
    run_command(main)
