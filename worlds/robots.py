"""The toy's language and its robots: the instructions, the sizes and speeds of all that moves, and
four embodiments that share one task space but neither actions nor states.

    gripper   absolute x, y and gripper (-1 open, 1 closed), over the table in [-1, 1]
    hand      a gripper within; a person is filmed, not recorded, and its actions are never shown
    arm       shoulder and elbow angle, gripper, wrist angle, over JOINT_RANGE in [-1, 1]
    gantry    dx, dy (1 is full speed) and velocity of the gripper (1 closes, -1 opens)

Shapes: n worlds, A action dim, P state dim.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy import ndarray

from worlds import choice

IMAGE = 48  # pixels of a picture's side
COLOURS = ("red", "green", "blue", "yellow")
SIDES = ("top", "bottom", "left", "right")
DIRECTIONS = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]], float)  # towards each of SIDES
SKILLS = ("place", "push")
SPLITS = ("train", "eval", "held_out")
HELD_OUT = (
    ("place", "red", "left"),
    ("place", "blue", "bottom"),
    ("push", "green", "top"),
    ("push", "yellow", "right"),
)

DISCS = 3  # on a table
RADIUS = 0.075  # of a disc
TIP = 0.03  # radius of the closed gripper's tip
MAX_SPEED = 0.045  # of the effector, per action step
GRIP_SPEED = 0.5  # of the opening
TURN_SPEED = 0.25  # of the heading, radians
GRASP = RADIUS  # closing nearer than this to a disc's centre grasps it
BAND = 0.22  # placed: in a band of this depth at a side
PUSH = 0.15  # pushed: displaced by this much
REACH = (0.02, 0.98)  # where the effector may be


def instructions(split: str = "train") -> Sequence[tuple[str, str, str]]:
    """The (skill, colour, side) combinations a split draws from; `eval` has those of `train` at
    layouts never trained on."""
    if choice(split, SPLITS, "split") == "held_out":
        return HELD_OUT
    return [task for task in product(SKILLS, COLOURS, SIDES) if task not in HELD_OUT]


def sentence(skill: str, colour: str, side: str) -> str:
    """The instruction as text."""
    if skill == "place":
        return f"put the {colour} disc at the {side}"
    return f"push the {colour} disc to the {side}"


# -- embodiments: one task space, four conventions ------------------------------------------------


def columns(*values) -> ndarray:
    return np.stack(values, axis=-1)


class Gripper:
    """A robot: the maps between its own numbers and the task space that all share.

    Task space: target position (n, 2) on the table, grip (n,) from -1 open to 1 closed, heading
    (n,) of the fingers in radians.
    """

    name = "gripper"
    action_dim = 3
    has_actions = True  # whether users of its data get to see its actions

    def numbers(self, xy, grip, heading) -> ndarray:
        """Its own numbers for a pose: states (n, P), and actions (n, A) where they are absolute."""
        return columns(*(2 * xy - 1).T, grip)

    def to_state(self, xy, opening, heading) -> ndarray:
        return self.numbers(xy, 1 - 2 * opening, heading)

    def to_action(self, xy, grip, state) -> ndarray:
        return self.numbers(xy, grip, 0)

    def from_action(self, action, state) -> tuple[ndarray, ndarray, ndarray]:
        """Target position, grip and heading of actions (n, A) in states (n, P)."""
        return (action[:, :2] + 1) / 2, action[:, 2], np.zeros(len(action))


class Hand(Gripper):
    name = "hand"
    has_actions = False


class Gantry(Gripper):
    name = "gantry"

    def to_action(self, xy, grip, state):
        now = (state[:, :2] + 1) / 2
        move = (xy - now) / MAX_SPEED
        velocity = (grip - state[:, 2]) / (2 * GRIP_SPEED)
        return np.column_stack([move, velocity]).clip(-1, 1)

    def from_action(self, action, state):
        xy = (state[:, :2] + 1) / 2 + MAX_SPEED * action[:, :2]
        grip = state[:, 2] + 2 * GRIP_SPEED * action[:, 2]
        return xy, grip, np.zeros(len(action))


# The arm: shoulder behind the top edge, two equal links, elbow always on the same side.
SHOULDER = np.array([0.5, -0.15])
LINK = 0.65
# Shoulder, elbow, wrist: radians at -1 and at 1. They hold every table position.
JOINT_RANGE = np.array([[-0.9, 1.7], [0.6, 2.95], [-4.8, -0.7]])


def arm_joints(xy: ndarray) -> tuple[ndarray, ndarray]:
    """Inverse kinematics: table positions (n, 2) -> shoulder and elbow angles (n,), radians."""
    x, y = (xy - SHOULDER).T
    elbow = np.arccos(np.clip((x * x + y * y) / (2 * LINK**2) - 1, -1, 1))
    return np.arctan2(y, x) - elbow / 2, elbow  # equal links: the triangle is isosceles


def arm_points(shoulder: ndarray, elbow: ndarray) -> tuple[ndarray, ndarray]:
    """Forward kinematics: joint angles (n,) -> positions (n, 2) of elbow and effector."""
    middle = SHOULDER + LINK * columns(np.cos(shoulder), np.sin(shoulder))
    return middle, middle + LINK * columns(np.cos(shoulder + elbow), np.sin(shoulder + elbow))


class Arm(Gripper):
    name = "arm"
    action_dim = 4

    def numbers(self, xy, grip, heading):
        low, high = JOINT_RANGE.T
        shoulder, elbow = arm_joints(xy)
        angles = columns(shoulder, elbow, heading - shoulder - elbow)
        a, b, wrist = (2 * (angles - low) / (high - low) - 1).T
        return columns(a, b, grip, wrist)

    def from_action(self, action, state):
        low, high = JOINT_RANGE.T
        part = (action[:, [0, 1, 3]] + 1) / 2
        shoulder, elbow, wrist = (low + part * (high - low)).T
        return arm_points(shoulder, elbow)[1], action[:, 2], shoulder + elbow + wrist


EMBODIMENTS = {robot.name: robot for robot in (Gripper(), Hand(), Arm(), Gantry())}
