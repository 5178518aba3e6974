"""Latent actions of videos, and what their encoder is trained on.

    python -m scripts.latents encode --weights FILE --data DATA --out FOLDER
        latent_action_dim14 files and their statistics, which a card names as "latents"
    python -m scripts.latents tokens --preset small --dcae FILE --data DATA --out FOLDER
        tokens of flow for python train.py --stage latent --cache FOLDER
    python -m scripts.latents pretrain --preset small --data DATA --out dcae.safetensors
        a DC-AE, for sizes that have no published one

DATA is a folder of mp4 files, a LeRobot or official folder, or a card; of a card with several
sources each gets a folder of its own. Of several cameras the first is taken, as a square of 256
pixels. Clips stream through flow, DC-AE and VAE, a chunk of frames at a time. Files that are there
already are kept if they were made in the same way, and refused if not. A clip that cannot be used
is skipped, counted and reported with its reason; no row of it is written.

Shapes: T rows of a clip, which has T + 1 frames; H W height and width, D token features, A aligned
dimensions.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from backbones.dpflow import DISFlow, FlowEstimator, load_dpflow
from backbones.optical_flow import resize_flow
from data import LABELLED
from formats.cards import Pyramid
from formats.recordings import Recordings
from latent_action import LatentActionConfig, LatentActionModel, encode_flows
from motus import PRESETS
from scripts.pretrain import pretrain_dcae
from weights.files import read_metadata, run_command, same_config, save_safetensors
from weights.hub import CHECKPOINTS, LICENCE_NOTICE, fetch

SIDE = 256  # pixels at which flow is measured
ROWS = 20_000  # of flow at most that a DC-AE is trained on; they are held in memory
Flows = Iterator[tuple[Tensor, Tensor]]  # flow (n, H, W, 2) and valid (n,), chunk after chunk

# -- flow of frames -------------------------------------------------------------------------------


def estimator_of(name: str, device: str) -> FlowEstimator | None:
    """dis, true (None), one of DPFlow's CHECKPOINTS, or a file with its weights."""
    if name == "true":
        return None
    if name == "dis":
        return DISFlow()
    if Path(name).suffix:
        print(LICENCE_NOTICE, file=sys.stderr)
        return load_dpflow(name).to(device)
    return load_dpflow(fetch(name, Path(torch.hub.get_dir()) / "checkpoints")).to(device)


def square(picture: np.ndarray, side: int = SIDE) -> Tensor:
    """A picture (H, W, 3) uint8 -> (3, side, side) in [0, 1], padded with black to a square."""
    pixels = rearrange(torch.from_numpy(picture), "h w c -> 1 c h w").float() / 255
    scale = side / max(pixels.shape[2:])
    height, width = (max(1, round(n * scale)) for n in pixels.shape[2:])
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(pixels.clamp(0, 1), (left, side - width - left, top, side - height - top))


def measured_flows(
    frames: Iterable[Tensor],
    estimator: FlowEstimator,
    interval: int,
    chunk: int = 32,
    device: str = "cpu",
) -> Flows:
    """Flow from frame i to i + interval of frames (3, H, W) in [0, 1], of which memory holds chunk +
    interval. The last rows end at the last frame and are not valid, nor are rows that touch a frame
    of one colour."""
    window: list[Tensor] = []
    for frame in frames:
        window.append(frame)
        if len(window) == chunk + interval:
            yield measure(torch.stack(window).to(device), chunk, estimator, interval)
            window = window[chunk:]
    if len(window) > 1:
        yield measure(torch.stack(window).to(device), len(window) - 1, estimator, interval)


@torch.no_grad()
def measure(
    frames: Tensor, count: int, estimator: FlowEstimator, interval: int
) -> tuple[Tensor, Tensor]:
    begin = torch.arange(count, device=frames.device)
    end = (begin + interval).clamp(max=len(frames) - 1)
    seen = frames.flatten(2).std(dim=-1).amax(dim=1) > 1 / 255
    valid = (begin + interval < len(frames)) & seen[begin] & seen[end]
    flow = estimator(frames[begin], frames[end])
    return rearrange(flow, "b c h w -> b h w c"), valid


# -- clips ----------------------------------------------------------------------------------------


class Videos(Recordings):
    """mp4 files as episodes of pictures alone, whose lengths are not known before they are decoded.
    ValueError for a file that cannot be decoded to its end."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.paths = sorted(folder.glob("*.mp4"))
        self.lengths = np.zeros(len(self.paths), int)
        self.widths = (0, 0)

    def views(self, episode: int, rows: Sequence[int]) -> dict[str, Iterator[np.ndarray]]:
        return {"video": self.frames(self.paths[episode])}

    def frames(self, path: Path) -> Iterator[np.ndarray]:
        import av

        count = 0
        try:
            with av.open(str(path)) as container:
                promised = container.streams.video[0].frames
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
                    count += 1
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"cannot be decoded beyond frame {count} ({error})") from error
        if count < promised:
            raise ValueError(f"ends after {count} of {promised} frames")


class StateChanges:
    """Labels of episodes: the change of the measured state over exactly the interval, by its root
    mean square over all episodes, not centred, so that no motion is 0. Dimensions that never change
    are NaN, and so are those that the state lacks."""

    def __init__(self, reader: Recordings, episodes: Iterable[int], config: LatentActionConfig):
        if not 0 < reader.widths[0] <= config.action_dim:
            raise ValueError(
                f"{reader.name}: its state has {reader.widths[0]} dimensions to take labels from; "
                f"expected 1 to {config.action_dim} (action_dim): leave --labelled out"
            )
        self.reader, self.config = reader, config
        total, count = np.zeros(config.action_dim), 0
        for episode in episodes:
            try:
                found = self.changes(episode)
            except ValueError:  # the episode is skipped, and reported, later
                continue
            total += np.square(found).sum(axis=0)
            count += len(found)
        self.scale = np.sqrt(total / max(count, 1))
        self.scale[self.scale < 1e-8] = np.nan

    def changes(self, episode: int) -> np.ndarray:
        state = self.reader.numbers(episode)[0].astype(np.float64)
        end = np.arange(len(state) - 1) + self.config.interval
        found = state[end.clip(max=len(state) - 1)] - state[:-1]
        return np.pad(found, ((0, 0), (0, self.config.action_dim - found.shape[1])))

    def __call__(self, episode: int) -> np.ndarray:
        return self.changes(episode) / self.scale


@dataclass
class Clip:
    """An episode; nothing of it is read before it is asked for. What is wrong with it is a
    ValueError then."""

    reader: Recordings
    episode: int
    estimator: FlowEstimator | None  # None: the source knows its flow
    interval: int
    device: str
    changes: Callable[[int], np.ndarray] | None = None  # labels of an episode, where known

    def flows(self) -> Flows:
        if self.estimator is None:
            return self.reader.flows(self.episode, self.interval)
        views = self.reader.views(self.episode, range(self.reader.lengths[self.episode]))
        frames = map(square, next(iter(views.values())))
        return measured_flows(frames, self.estimator, self.interval, device=self.device)

    def labels(self) -> Tensor | None:
        """(T, A), NaN in columns that the embodiment lacks."""
        return None if self.changes is None else torch.from_numpy(self.changes(self.episode))
