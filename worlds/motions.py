"""True motions of the tabletop's episodes, over an interval of steps, and where things are.

An episode of T steps has T + 1 frames and T rows here. Row i spans steps i to i + interval; one
that would end past the last frame ends there, and is not valid.
"""

import numpy as np
from numpy import ndarray

from worlds import tabletop
from worlds.robots import GRIP_SPEED, MAX_SPEED
from worlds.tabletop import Episode


def greatest_change(interval: int) -> ndarray:
    """The most that x, y and opening can change over an interval: the unit of labels."""
    move = interval * MAX_SPEED
    grip = min(1, interval * GRIP_SPEED)
    return np.float32([move, move, grip])


def flows(episode: Episode, interval: int) -> tuple[ndarray, ndarray]:
    """True optical flow (T, H, W, 2) in pixels, and which rows are valid (T,)."""
    last = len(episode.motion) - 1
    begin = np.arange(last)
    end = begin + interval
    flow = episode.flow(begin, end.clip(max=last))
    return flow, end <= last


def labels(episode: Episode, interval: int) -> ndarray:
    """Change (T, 3) of x, y and opening, in [-1, 1]: over the greatest change possible."""
    before = episode.motion[:-1]
    end = np.arange(len(before)) + interval
    after = episode.motion[end.clip(max=len(before))]
    return (after - before) / greatest_change(interval)


def places(episode: Episode) -> dict[str, ndarray]:
    """Where things are in the pictures of an episode, as `tabletop.labels` names them: (T + 1,)."""
    return tabletop.labels(episode.snapshots, episode.instruction)
