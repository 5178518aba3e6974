"""Motions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from worlds.robots import GRIP_SPEED, MAX_SPEED
from worlds.tabletop import Episode

# -- the toy world: true flow and true labels -----------------------------------------------------

LABELLED = (4, 6)  # levels of the data pyramid whose actions training may look at


class Pairs(NamedTuple):
    """Motions over one interval. All labels are known, for measuring; `labelled` says which of them
    training may use."""

    flow: Tensor  # (N, H, W, 2) float32, pixels
    # (N, 3) float32 in [-1, 1]: motion in x, y, opening, by the most that the interval allows
    labels: Tensor
    labelled: Tensor  # (N,) bool
    level: Tensor  # (N,) int64
    index: Tensor  # (N, 2) int64: episode, and step at which the interval begins


def most(interval: int) -> np.ndarray:
    """The greatest change of x, y and opening over an interval, the unit of labels."""
    return np.array(
        [interval * MAX_SPEED, interval * MAX_SPEED, min(1.0, interval * GRIP_SPEED)], np.float32
    )


def true_labels(episode: Episode, interval: int) -> Tensor:
    """Labels (T, 3) of the rows of `true_flows`."""
    end = np.minimum(np.arange(len(episode.motion) - 1) + interval, len(episode.motion) - 1)
    return torch.from_numpy((episode.motion[end] - episode.motion[:-1]) / most(interval))


def toy_pairs(episodes: list[Episode], interval: int, every: int = 1) -> Pairs:
    """The intervals of the episodes that begin at each `every`-th step. Episodes shorter than the
    interval have none."""
    rows = []
    for number, episode in enumerate(episodes):
        if len(i := np.arange(0, len(episode.motion) - interval, every)):
            level = np.full(len(i), episode.level)
            rows.append(
                (
                    episode.flow(i, i + interval),
                    (episode.motion[i + interval] - episode.motion[i]) / most(interval),
                    np.isin(level, LABELLED),
                    level,
                    np.stack([np.full(len(i), number), i], axis=1),
                )
            )
    if not rows:
        raise ValueError(
            f"none of {len(episodes)} episodes has the {interval + 1} frames that an interval of {interval} needs"
        )
    return Pairs(*(torch.from_numpy(np.concatenate(column)) for column in zip(*rows)))


def true_flows(episode: Episode, interval: int) -> Iterator[tuple[Tensor, Tensor]]:
    i, last = np.arange(len(episode.frames) - 1), len(episode.frames) - 1
    yield (
        torch.from_numpy(episode.flow(i, np.minimum(i + interval, last))),
        torch.from_numpy(i + interval <= last),
    )
