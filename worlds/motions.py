"""True motions of the tabletop's episodes: optical flow, and labels, over an interval of steps.

An episode of T steps has T + 1 frames and T rows here. Row i spans steps i to i + interval; one
that would end past the last frame ends there, and is not valid.
"""

import numpy as np

from worlds.robots import GRIP_SPEED, MAX_SPEED
from worlds.tabletop import Episode


def greatest_change(interval: int) -> np.ndarray:
    """The most that x, y and opening can change over an interval: the unit of labels."""
    move = interval * MAX_SPEED
    grip = min(1, interval * GRIP_SPEED)
    return np.float32([move, move, grip])


def flows(episode: Episode, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """True optical flow (T, H, W, 2) in pixels, and which rows are valid (T,)."""
    begin = np.arange(len(episode.motion) - 1)
    end = begin + interval
    last = len(begin)
    flow = episode.flow(begin, end.clip(max=last))
    return flow, end <= last


def labels(episode: Episode, interval: int) -> np.ndarray:
    """Change (T, 3) of x, y and opening, in [-1, 1]: over the greatest change possible."""
    steps = len(episode.motion) - 1
    end = (np.arange(steps) + interval).clip(max=steps)
    change = episode.motion[end] - episode.motion[:-1]
    return change / greatest_change(interval)
