"""True motions of the tabletop's episodes, over an interval of steps, and where things are.

An episode of T steps has T + 1 frames and T rows here. Row i spans steps i to i + interval; one
that would end past the last frame ends there, and is not valid.
"""

import numpy as np
from numpy import ndarray

from worlds.robots import COLOURS, GRIP_SPEED, MAX_SPEED
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
    """Where the disc that the instruction names and the effector are in the picture, 0 to 1 from
    left and top, and the opening: name -> (T + 1,). Nothing for an episode without instruction."""
    words = episode.instruction.split()
    named = [word for word in words if word in COLOURS]
    if not named:
        return {}
    shots = episode.snapshots
    colours = shots.colours[0].tolist()
    number = colours.index(COLOURS.index(named[0]))
    columns = np.column_stack([shots.discs[:, number], shots.effector, shots.opening])
    names = ("object x", "object y", "effector x", "effector y", "opening")
    return dict(zip(names, columns.T))
