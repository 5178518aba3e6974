"""Robots."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IMAGE = 48
COLOURS = ("red", "green", "blue", "yellow")
SIDES = ("top", "bottom", "left", "right")
SKILLS = ("place", "push")
SPLITS = ("train", "eval", "held_out")
HELD_OUT = (
    ("place", "red", "left"),
    ("place", "blue", "bottom"),
    ("push", "green", "top"),
    ("push", "yellow", "right"),
)

DISCS, RADIUS, TIP = (
    3,
    0.075,
    0.03,
)  # discs per table; radius of a disc, of the closed gripper's tip
MAX_SPEED, GRIP_SPEED, TURN_SPEED = (
    0.045,
    0.5,
    0.25,
)  # per action step: effector, opening, heading (radians)
GRASP = RADIUS  # closing nearer than this to a disc's centre grasps it
BAND, PUSH = 0.22, 0.15  # success: depth of the band at a side; displacement of a push
REACH = (0.02, 0.98)  # where the effector may be
DIRECTIONS = np.array(
    [[0, -1], [0, 1], [-1, 0], [1, 0]], float
)  # unit vector towards each side, in the order of SIDES


# ---- Instructions ----


def instructions(split: str = "train") -> list[tuple[str, str, str]]:
    """The (skill, colour, side) combinations a split draws from; `eval` has those of `train` at
    layouts never trained on."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
    combinations = [
        (skill, colour, side) for skill in SKILLS for colour in COLOURS for side in SIDES
    ]
    return [c for c in combinations if (c in HELD_OUT) == (split == "held_out")]


def sentence(skill: str, colour: str, side: str) -> str:
    """The instruction as text."""
    return (
        f"put the {colour} disc at the {side}"
        if skill == "place"
        else f"push the {colour} disc to the {side}"
    )


# ---- Embodiments: one task space, four conventions ----


@dataclass(frozen=True)
class Embodiment:
    """A robot: its place in the pyramid and the maps between its own numbers and the task space
    they share.

    Task space: target position (n, 2) on the table, grip (n,) from -1 open to 1 closed, heading
    (n,) of the fingers in radians.
    """

    name: str
    level: int  # level of the data pyramid it appears at first
    action_dim: int
    state_dim: int
    actions: str  # what the action dimensions mean
    to_action: Callable  # target_xy, grip, state (n, P) -> action (n, A)
    from_action: Callable  # action (n, A), state (n, P) -> target_xy, grip, heading
    to_state: Callable  # xy, opening (n,), heading (n,) -> state (n, P)
    has_actions: bool = True  # whether users of its data get to see its actions


def _stack(*columns) -> np.ndarray:
    return np.stack(columns, axis=-1)


def _position_state(xy, opening, heading):
    return _stack(2 * xy[:, 0] - 1, 2 * xy[:, 1] - 1, 1 - 2 * opening)


def _position_to_action(xy, grip, state):
    return _stack(2 * xy[:, 0] - 1, 2 * xy[:, 1] - 1, grip)


def _position_from_action(action, state):
    return (action[:, :2] + 1) / 2, action[:, 2], np.zeros(len(action))


def _delta_to_action(xy, grip, state):
    now = (state[:, :2] + 1) / 2
    return np.clip(
        np.concatenate(
            [(xy - now) / MAX_SPEED, (grip - state[:, 2])[:, None] / (2 * GRIP_SPEED)], axis=1
        ),
        -1,
        1,
    )


def _delta_from_action(action, state):
    xy = (state[:, :2] + 1) / 2 + MAX_SPEED * action[:, :2]
    return xy, state[:, 2] + 2 * GRIP_SPEED * action[:, 2], np.zeros(len(action))


# The arm: shoulder behind the top edge, two equal links, elbow always on the same side. The ranges
# hold every table position.
SHOULDER, LINK = np.array([0.5, -0.15]), 0.65
JOINT_RANGE = np.array(
    [[-0.9, 1.7], [0.6, 2.95], [-4.8, -0.7]]
)  # shoulder, elbow, wrist; radians at -1 and at 1


def arm_joints(xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse kinematics: table positions (n, 2) -> shoulder and elbow angles (n,), radians."""
    x, y = (xy - SHOULDER).T
    elbow = np.arccos(np.clip((x * x + y * y) / (2 * LINK**2) - 1, -1, 1))
    return np.arctan2(y, x) - elbow / 2, elbow  # equal links: the triangle is isosceles


def arm_points(shoulder: np.ndarray, elbow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward kinematics: joint angles (n,) -> positions (n, 2) of the elbow and of the effector."""
    middle = SHOULDER + LINK * _stack(np.cos(shoulder), np.sin(shoulder))
    return middle, middle + LINK * _stack(np.cos(shoulder + elbow), np.sin(shoulder + elbow))


def _scale_joints(*angles):
    low, high = JOINT_RANGE.T
    return 2 * (_stack(*angles) - low) / (high - low) - 1


def _unscale_joints(scaled):
    low, high = JOINT_RANGE.T
    return (low + (scaled + 1) / 2 * (high - low)).T


def _arm_state(xy, opening, heading):
    shoulder, elbow = arm_joints(xy)
    a, b, wrist = _scale_joints(shoulder, elbow, heading - shoulder - elbow).T
    return _stack(a, b, 1 - 2 * opening, wrist)


def _arm_to_action(xy, grip, state):
    shoulder, elbow = arm_joints(np.clip(xy, *REACH))
    a, b, wrist = _scale_joints(
        shoulder, elbow, -shoulder - elbow
    ).T  # the wrist undoes both joints: heading 0
    return _stack(a, b, grip, wrist)


def _arm_from_action(action, state):
    shoulder, elbow, wrist = _unscale_joints(action[:, [0, 1, 3]])
    return arm_points(shoulder, elbow)[1], action[:, 2], shoulder + elbow + wrist


_POSITION = (_position_to_action, _position_from_action, _position_state)
EMBODIMENTS = {
    e.name: e
    for e in (
        Embodiment("gripper", 6, 3, 3, "absolute x, absolute y, gripper (-1 open, 1 closed)", *_POSITION),
        Embodiment("hand", 2, 3, 3, "internal only: a person is filmed, not recorded", *_POSITION, has_actions=False),
        Embodiment("arm", 5, 4, 4, "shoulder angle, elbow angle, gripper (-1 open, 1 closed), wrist angle",
                   _arm_to_action, _arm_from_action, _arm_state),
        Embodiment("gantry", 5, 3, 3, "dx, dy (1 is full speed), gripper velocity (1 closes, -1 opens)",
                   _delta_to_action, _delta_from_action, _position_state),
    )
}  # fmt: skip
