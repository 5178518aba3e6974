"""True motions of the tabletop's episodes: optical flow and labels over an interval of steps, and
where things are.

An episode of T steps has T + 1 frames and T rows here. Row i spans steps i to i + interval; one
that would end past the last frame ends there, and is not valid.
"""

import numpy as np

from worlds.robots import COLOURS, GRIP_SPEED, MAX_SPEED
from worlds.tabletop import Episode


def greatest_change(interval: int) -> np.ndarray:
    """The most that x, y and opening can change over an interval: the unit of labels."""
    return np.float32([interval * MAX_SPEED, interval * MAX_SPEED, min(1, interval * GRIP_SPEED)])


def ends(episode: Episode, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """The frame (T,) at which each row ends, and which rows are valid (T,)."""
    end = np.arange(len(episode.motion) - 1) + interval
    last = len(episode.motion) - 1
    return np.minimum(end, last), end <= last


def flows(episode: Episode, interval: int) -> tuple[np.ndarray, np.ndarray]:
    """True optical flow (T, H, W, 2) in pixels, and which rows are valid (T,)."""
    end, valid = ends(episode, interval)
    return episode.flow(np.arange(len(end)), end), valid


def labels(episode: Episode, interval: int) -> np.ndarray:
    """Change (T, 3) of x, y and opening, in [-1, 1]: over the greatest change possible."""
    end, _ = ends(episode, interval)
    return (episode.motion[end] - episode.motion[:-1]) / greatest_change(interval)


def places(episode: Episode) -> dict[str, np.ndarray]:
    """Where the disc that the instruction names and the effector are in the picture, 0 to 1 from
    left and top, and the opening: name -> (T + 1,). Nothing for an episode without instruction."""
    named = [COLOURS.index(word) for word in episode.instruction.split() if word in COLOURS]
    if not named:
        return {}
    shots = episode.snapshots
    disc = shots.discs[:, np.flatnonzero(shots.colours[0] == named[0])[0]]
    return {
        "object x": disc[:, 0],
        "object y": disc[:, 1],
        "effector x": shots.effector[:, 0],
        "effector y": shots.effector[:, 1],
        "opening": shots.opening,
    }
