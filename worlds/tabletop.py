r"""The toy world: a tabletop seen from above, three discs, and robots that look and act differently but move alike.

It stands in for the paper's six-level data pyramid at a size at which a small policy learns in CPU minutes:
level 2 a hand without recorded actions, 3 the target robot in randomised scenes, 4 the target robot without a task, 5 two
other robots, 6 the target robot with demonstrations.

    seed -> layout, task, look           what is where, what to do, textures and light
    action -> from_action -> (x, y, grip, heading) -> one task-space physics -> to_state -> state
                                                                       \-> parts -> render (pixels) and flow (true motion)

- Coordinates are in [0, 1], x to the right and y down; the camera sees exactly the table, 48 x 48 pixels.
- Every body is a list of parts, every part a capsule (a disc is a capsule of no length). The renderer paints the parts in
  order; the true optical flow asks the same parts where each pixel goes, so pixels and flow cannot disagree.
- An open gripper hovers and touches nothing. Closing it near a disc grasps the disc; a closed, empty one pushes discs.
- Everything random comes from generators keyed by the world's own seed, so a world does not depend on its neighbours.

Shapes: n worlds, A action dim, P state dim, T steps of an episode, K pixels of a part's window, D = 3 discs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import NamedTuple

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
    """The (skill, colour, side) combinations a split draws from; `eval` has those of `train` at layouts never trained on."""
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
    """A robot: its place in the pyramid and the maps between its own numbers and the task space they share.

    Task space: target position (n, 2) on the table, grip (n,) from -1 open to 1 closed, heading (n,) of the fingers in radians.
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


# The arm: shoulder behind the top edge, two equal links, elbow always on the same side. The ranges hold every table position.
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


# ---- Bodies as parts ----


@dataclass(frozen=True)
class Snapshot:
    """All that moves in n worlds, or in one world at T + 1 times; slice it like an array."""

    effector: np.ndarray  # (n, 2)
    opening: np.ndarray  # (n,) 0 closed, 1 open
    heading: np.ndarray  # (n,) radians
    discs: np.ndarray  # (n, D, 2)
    held: np.ndarray  # (n,) index of the grasped disc, -1 for none
    colours: np.ndarray  # (n, D) index into COLOURS

    def __getitem__(self, index) -> "Snapshot":
        return Snapshot(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def stack(items: list["Snapshot"]) -> "Snapshot":
        """Snapshots at several times -> one whose arrays have time in front."""
        return Snapshot(*(np.stack([getattr(s, f.name) for s in items]) for f in fields(Snapshot)))


class Part(NamedTuple):
    """A capsule from `a` to `b` (n, 2) of `radius`, all in table units; `a is b` makes it a disc, `inner` cuts a hole."""

    a: np.ndarray
    b: np.ndarray
    radius: float
    colour: np.ndarray  # (3,) or (n, 3), 0..255
    inner: float = 0.0
    contrast: float = 0.15  # strength of the speckles that are fixed to the part
    grain: np.ndarray | int = 0  # where on the tile of speckles they start, or (n, 1, 1) of it
    opacity: float = 1.0
    soft: float = 1.0  # width of the edge, in pixels
    window: int = (
        0  # pixels of the square window that holds it; 0 for a part that may span the table
    )
    shadow: bool = False  # a shadow darkens but is no body: no rim, no flow


INK = np.array(
    [[226, 44, 40], [40, 172, 60], [42, 80, 226], [246, 214, 36]], np.float32
)  # in the order of COLOURS
WHITE, DARK, STEEL, ORANGE, CYAN, SKIN = np.array(
    [
        [248, 246, 250],
        [40, 38, 52],
        [112, 112, 150],
        [250, 140, 30],
        [30, 205, 215],
        [236, 178, 144],
    ],
    np.float32,
)
BLACK = np.zeros(3, np.float32)
SHADE = np.array([0.018, 0.024])  # where shadows fall


def _turn(vector, heading):
    """Vectors (2,) or (n, 2) turned by headings (n,) -> (n, 2)."""
    c, s = np.cos(heading), np.sin(heading)
    x, y = np.moveaxis(np.asarray(vector, float), -1, 0)
    return _stack(c * x - s * y, s * x + c * y)


def _distance(a, b):
    return np.sqrt(((a - b) ** 2).sum(axis=-1))


def _dot(at, radius, colour, **how):
    return Part(
        at, at, radius, colour, window=int(2 * radius * IMAGE + how.get("soft", 1.0)) + 3, **how
    )


def _fingers(s: Snapshot, colour, quarter_turn=0.0, radius=0.019, half=0.036):
    """Two parallel fingers, left and right of the effector, whose gap is the opening."""
    heading = s.heading + quarter_turn
    gap, along = 0.022 + 0.068 * s.opening, _turn([0.0, half], heading)
    for sign in (-1, 1):
        centre = s.effector + sign * gap[:, None] * _turn([1.0, 0.0], heading)
        yield Part(centre - along, centre + along, radius, colour, contrast=0.05, window=12)


def _gripper(s: Snapshot):
    ends = list(_fingers(s, DARK))
    bar_a, bar_b = ((f.a + f.b) / 2 for f in ends)
    yield _dot(s.effector + 2 * SHADE, 0.075, BLACK, opacity=0.35, soft=4.0, shadow=True)
    yield Part(bar_a, bar_b, 0.014, STEEL, contrast=0.05, window=18)
    yield from ends
    yield _dot(s.effector, 0.052, WHITE, inner=0.026, contrast=0.05)


def _hand(s: Snapshot):
    palm, gap = s.effector + [0.035, 0.125], 0.02 + 0.07 * s.opening[:, None]
    yield _dot(palm + SHADE, 0.075, BLACK, opacity=0.35, soft=4.0, shadow=True)
    yield Part(palm + [0.01, 0.02], palm + [0.12, 0.6], 0.045, SKIN * [0.62, 0.7, 0.86])
    for knuckle, tip in (
        ([0.0, -0.03], [1.0, -0.5]),
        ([0.035, -0.03], [1.35, 0.2]),
        ([-0.045, -0.01], [-1.0, 0.0]),
    ):
        yield Part(palm + knuckle, s.effector + gap * tip, 0.023, SKIN, contrast=0.08, window=22)
    yield _dot(palm, 0.062, SKIN, contrast=0.08)


def _arm(s: Snapshot):
    elbow, _ = arm_points(*arm_joints(s.effector))
    base = np.broadcast_to(SHOULDER, elbow.shape)
    yield Part(
        elbow + 2 * SHADE, s.effector + 2 * SHADE, 0.03, BLACK, opacity=0.3, soft=3.0, shadow=True
    )
    yield Part(base, elbow, 0.034, STEEL, contrast=0.3)
    yield Part(elbow, s.effector, 0.027, STEEL, contrast=0.3)
    yield from _fingers(s, DARK)
    yield _dot(s.effector, 0.042, ORANGE)


def _gantry(s: Snapshot):
    (x, y), edge = s.effector.T, np.full(len(s.effector), 0.1)
    for colour, shift, how in (
        (BLACK, SHADE, dict(opacity=0.25, soft=2.5, shadow=True)),
        (DARK, 0, dict(contrast=0.5)),
    ):
        yield Part(_stack(x, -edge) + shift, _stack(x, 1 + edge) + shift, 0.018, colour, **how)
        yield Part(_stack(-edge, y) + shift, _stack(1 + edge, y) + shift, 0.018, colour, **how)
    yield from _fingers(s, WHITE, quarter_turn=np.pi / 2)
    yield _dot(s.effector, 0.045, CYAN)


BODIES = {"gripper": _gripper, "hand": _hand, "arm": _arm, "gantry": _gantry}


def _parts(embodiment: str, s: Snapshot, held: np.ndarray):
    """All parts from the table up. A held disc lies above the others, so `held` decides the order of the discs."""
    rows = np.arange(len(held))
    order = np.argsort(np.arange(DISCS) == held[:, None], axis=1, kind="stable")  # (n, D)
    for slot in order.T:
        at, colour = s.discs[rows, slot], s.colours[rows, slot]
        yield _dot(at + SHADE, RADIUS, BLACK, opacity=0.35, soft=2.5, shadow=True)
        yield _dot(at, RADIUS, INK[colour], contrast=0.5, grain=23 + 61 * colour[:, None, None])
    yield from BODIES[embodiment](s)


# ---- Pixels ----

PAD = 16  # the canvas is larger than the image on every side, so that no window has to be cut
CANVAS = IMAGE + 2 * PAD
_TILE = 256  # a part's texture: a periodic tile with four samples per pixel


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Periodic Gaussian blur over the first two axes, scaled to unit variance."""
    frequency = [np.fft.fftfreq(size) for size in x.shape[:2]]
    gain = np.exp(
        -2 * (np.pi * sigma) ** 2 * (frequency[0][:, None] ** 2 + frequency[1][None] ** 2)
    )
    smooth = np.fft.ifft2(
        np.fft.fft2(x, axes=(0, 1)) * gain.reshape(gain.shape + (1,) * (x.ndim - 2)), axes=(0, 1)
    ).real
    return (smooth - smooth.mean(axis=(0, 1))) / smooth.std()


@lru_cache
def _tile() -> np.ndarray:
    """The speckles that parts carry: (tile, tile) float32 within [-1, 1], mostly soft blobs of about two pixels."""
    return (
        np.tanh(1.2 * _blur(np.random.default_rng(7).standard_normal((_TILE, _TILE)), 3.0))
        .astype(np.float32)
        .ravel()
    )


@lru_cache
def _backgrounds(split: str, randomized: bool) -> np.ndarray:
    """Table textures (count, 160, 160, 3) float32 in 0..255: a smooth field of colour plus middle and fine noise."""
    rng, textures = np.random.default_rng([11, SPLITS.index(split), randomized]), []
    for _ in range(24 if randomized else 6):
        base = (
            rng.uniform(70, 190, 3)
            if randomized
            else np.array([158, 148, 136]) + rng.uniform(-8, 8, 3)
        )
        base = base.mean() + 0.6 * (
            base - base.mean()
        )  # keep away from the saturated colours of the discs
        wide, middle, fine = (
            _blur(rng.standard_normal((160, 160, c)), s) for c, s in ((3, 24.0), (1, 2.2), (1, 0.7))
        )
        textures.append(
            base + (14 if randomized else 7) * wide + rng.uniform(8, 13) * middle + 5 * fine
        )
    return np.clip(np.stack(textures), 0, 255).astype(np.float32)


def _cover(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pixels about a part, in windows of equal size for all worlds.

    Returns x, y (n, k, k') integer image coordinates, the distance of pixel centres to the capsule's core, and their offset
    dx, dy from `a`, all in pixels.
    """
    a, b = (np.asarray(end * IMAGE, np.float32) for end in (part.a, part.b))
    if part.window:  # a square window around the middle
        corner = np.floor((a + b) / 2 - part.window / 2 + 0.5).astype(np.int32)
        steps = np.arange(part.window, dtype=np.int32)
        x, y = corner[:, 0, None, None] + steps, corner[:, 1, None, None] + steps[:, None]
    else:  # a band of pixels along the longer axis of a part that may span the table
        span = b - a
        flat = (np.abs(span[:, 0]) > np.abs(span[:, 1]))[:, None, None]
        major = np.arange(IMAGE, dtype=np.int32)[:, None]
        a_major, a_minor = np.where(flat[:, 0], a, a[:, ::-1]).T
        d_major, d_minor = np.where(flat[:, 0], span, span[:, ::-1]).T
        slope = (d_minor / d_major)[:, None, None]
        line = a_minor[:, None, None] + slope * (major + 0.5 - a_major[:, None, None])
        half = int(np.ceil(1.42 * (part.radius * IMAGE + part.soft / 2) + 0.5))
        minor = np.floor(line).astype(np.int32) + np.arange(-half, half + 1, dtype=np.int32)
        minor = np.clip(minor, -PAD, IMAGE + PAD - 1)
        major = np.broadcast_to(major, minor.shape)
        x, y = np.where(flat, major, minor), np.where(flat, minor, major)
    dx, dy = x + np.float32(0.5) - a[:, 0, None, None], y + np.float32(0.5) - a[:, 1, None, None]
    if part.a is part.b:
        return x, y, np.sqrt(dx * dx + dy * dy), dx, dy
    ux, uy = (b - a).T[:, :, None, None]
    along = np.clip((dx * ux + dy * uy) / (ux * ux + uy * uy), 0, 1)
    return x, y, np.sqrt((dx - along * ux) ** 2 + (dy - along * uy) ** 2), dx, dy


def _axis(part: Part) -> np.ndarray:
    """Unit vectors (n, 2) along a part; a disc does not turn."""
    span = part.b - part.a
    length = np.sqrt((span**2).sum(axis=1, keepdims=True))
    return np.where(length > 0, span / np.maximum(length, 1e-9), [1.0, 0.0])


def _pixel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Image coordinates (n, k, k') -> indices into n flattened canvases."""
    rows = np.arange(len(x))[:, None, None] * CANVAS + (y + PAD)
    return rows * CANVAS + (x + PAD)


def _gradient(slope, x, y) -> np.ndarray:
    """How bright a slanting light is at pixels x, y; `slope` is relative change across the table along x and y."""
    return (
        1
        + slope[0] * (x / np.float32(IMAGE) - np.float32(0.5))
        + slope[1] * (y / np.float32(IMAGE) - np.float32(0.5))
    )


def _alpha(part: Part, distance: np.ndarray) -> np.ndarray:
    """Coverage in 0..1 with an anti-aliased edge."""
    soft = np.float32(part.soft)
    alpha = np.clip((np.float32(part.radius * IMAGE) - distance) / soft + np.float32(0.5), 0, 1)
    return (
        np.minimum(
            alpha, np.clip(distance - np.float32(part.inner * IMAGE) + np.float32(0.5), 0, 1)
        )
        if part.inner
        else alpha
    )


def _paint(canvas: np.ndarray, part: Part, tint: np.ndarray, slope: np.ndarray) -> None:
    """Blend a part into canvases (3, n, CANVAS, CANVAS) uint8, in place, under light `tint` (n, 3) and `slope` (n, 2)."""
    x, y, distance, dx, dy = _cover(part)
    pixel = _pixel(x, y)
    alpha = _alpha(part, distance)
    planes = canvas.reshape(
        3, -1
    )  # colour by colour: numpy is several times slower with a last axis of three
    if part.shadow:
        clear = 1 - np.float32(part.opacity) * alpha
        for plane in planes:
            plane[pixel] = plane.take(pixel) * clear
        return
    ux, uy = _axis(part).astype(np.float32).T[:, :, None, None]
    u, v = (
        (4 * d + np.float32(4 * _TILE)).astype(np.int32)
        for d in (dx * ux + dy * uy, dy * ux - dx * uy)
    )
    light = 1 + np.float32(part.contrast) * _tile().take(
        (v % _TILE) * _TILE + (u + part.grain) % _TILE
    )
    light *= np.where(
        distance > part.radius * IMAGE - 0.9, np.float32(0.62), np.float32(1)
    )  # a dark rim
    light *= _gradient(slope[:, :, None, None].swapaxes(0, 1), x, y)
    ink = (tint * part.colour).astype(np.float32)
    for plane, colour in zip(planes, ink.T[:, :, None, None], strict=True):
        under = plane.take(pixel)
        plane[pixel] = under + alpha * (np.minimum(light * colour, 255) - under) + np.float32(0.5)


def _scenery(rng: np.random.Generator, split: str, randomized: bool, discs: np.ndarray):
    """One world's still background (CANVAS, CANVAS, 3) uint8 with its light (3,) and light gradient (2,) already in it."""
    library = _backgrounds(split, randomized)
    texture, left, top = rng.integers(len(library)), *rng.integers(0, library.shape[1] - CANVAS, 2)
    picture = library[texture, top : top + CANVAS, left : left + CANVAS]
    tint, slope = np.ones(3, np.float32), np.zeros(2, np.float32)
    if randomized:
        picture = picture.copy()
        y, x = np.mgrid[-PAD : IMAGE + PAD, -PAD : IMAGE + PAD] + 0.5
        taken = discs
        for _ in range(
            rng.integers(1, 4)
        ):  # distractors: squares and triangles that nothing touches
            spots = rng.uniform(0.08, 0.92, (16, 2))
            spot = spots[_distance(spots[:, None], taken).min(axis=1).argmax()]
            taken = np.vstack([taken, spot])
            cx, cy = spot * IMAGE
            size, angle, sides = (
                rng.uniform(3.0, 5.5),
                rng.uniform(0, 2 * np.pi),
                rng.integers(3, 5),
            )
            normals = angle + 2 * np.pi * np.arange(sides) / sides
            depth = np.max([(x - cx) * np.cos(t) + (y - cy) * np.sin(t) for t in normals], axis=0)
            reach = size * (0.62 if sides == 3 else 0.9)
            colour = np.array(
                [[128, 128, 132], [140, 70, 150], [120, 84, 60], [205, 150, 180], [60, 60, 66]]
            )[rng.integers(5)]
            cover = np.clip(reach - depth + 0.5, 0, 1)[..., None]
            picture = picture + cover * (
                colour * np.where(depth > reach - 1, 0.7, 1.0)[..., None] - picture
            )
        tint = (rng.uniform(0.78, 1.15) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
        slope = rng.uniform(-0.35, 0.35, 2).astype(np.float32)
        picture = picture * tint * _gradient(slope, x, y)[..., None]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), tint, slope


def flow(embodiment: str, before: Snapshot, after: Snapshot) -> np.ndarray:
    """True optical flow (n, 48, 48, 2) float32, (dx, dy) in pixels, defined on the pixels of `before`.

    Each pixel goes with the topmost part that covers it, turning with it; the table and the shadows on it stay.
    """
    n = len(before.effector)
    motions = np.zeros((n * CANVAS * CANVAS, 2), np.float32)
    pairs = zip(
        _parts(embodiment, before, before.held), _parts(embodiment, after, before.held), strict=True
    )
    for old, new in pairs:
        if old.shadow:
            continue
        x, y, distance, dx, dy = _cover(old)
        (ox, oy), (nx, ny) = _axis(old).T[:, :, None, None], _axis(new).T[:, :, None, None]
        c, s = ox * nx + oy * ny, ox * ny - oy * nx  # rotation from the old axis to the new
        shift = IMAGE * (new.a - old.a)[:, None, None]
        motion = shift + _stack(c * dx - s * dy - dx, s * dx + c * dy - dy)
        inside = _alpha(old, distance) >= 0.5
        motions[_pixel(x, y)[inside]] = motion[inside]
    return motions.reshape(n, CANVAS, CANVAS, 2)[:, PAD:-PAD, PAD:-PAD].copy()


# ---- Layouts ----


def _room(xy: np.ndarray, toward: np.ndarray) -> np.ndarray:
    """Distance of points (n, 2) to the side that lies in direction `toward`, (2,) or (n, 2)."""
    coordinate = (xy * np.abs(toward)).sum(axis=-1)
    return np.where(toward.sum(axis=-1) > 0, 1 - coordinate, coordinate)


def _layout(
    rng: np.random.Generator, skill: str | None, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Discs (D, 2), the first of them named by the task, and the effector (2,): feasible, apart, and not yet solved."""
    toward = DIRECTIONS[side]
    while True:
        points = rng.uniform(0.1, 0.9, (64, DISCS + 1, 2))
        discs, effector = points[:, :DISCS], points[:, DISCS]
        good = (_distance(discs, np.roll(discs, 1, axis=1)) > 2 * RADIUS + 0.04).all(axis=1)
        good &= (_distance(discs, effector[:, None]) > RADIUS + 0.1).all(axis=1)
        if skill:
            named, others = discs[:, 0], discs[:, 1:]
            room = _room(named, toward)
            if skill == "place":
                good &= room > BAND + 0.12
                good &= (
                    _distance(_goal(skill, named, side)[:, None], others) > 2 * RADIUS + 0.03
                ).all(axis=1)
            else:  # free ground behind the disc, where the gripper closes, and ahead, where the disc goes
                good &= (room > RADIUS + PUSH + 0.1) & (room < 0.78)
                for step in (-0.15, 0.07, 0.14, 0.22):
                    good &= (
                        _distance((named + step * toward)[:, None], others) > 2 * RADIUS + 0.02
                    ).all(axis=1)
        if good.any():
            return discs[good.argmax()], effector[good.argmax()]


def _goal(skill: str, disc: np.ndarray, side: int) -> np.ndarray:
    """Where the named disc (n, 2) should go: straight towards its side."""
    toward = DIRECTIONS[side]
    if skill == "push":
        return disc + (PUSH + 0.03) * toward
    depth = 0.12 if toward.sum() < 0 else 0.88
    return np.where(toward != 0, depth, disc)


# ---- The world ----


class Tabletop:
    """n worlds at once, one embodiment.

    Args:
        n: number of worlds.
        embodiment: key of `EMBODIMENTS`.
        randomized: other backgrounds, light, and shapes that distract.
        split: `train`, `eval` (unseen layouts) or `held_out` (instructions never trained).
        task_agnostic: no instruction, no success; the expert wanders between waypoints and plays with the discs.
        astray: share of worlds that begin in the middle of a mistake: the effector anywhere, more often than not near the named disc,
            the gripper open or closed on nothing. Demonstrations of them teach how to recover.
    """

    def __init__(
        self,
        n: int,
        embodiment: str = "gripper",
        randomized: bool = False,
        split: str = "train",
        task_agnostic: bool = False,
        astray: float = 0.0,
    ):
        if embodiment not in EMBODIMENTS:
            raise ValueError(
                f"embodiment is {embodiment!r}; it must be one of {tuple(EMBODIMENTS)}"
            )
        if n < 1:
            raise ValueError(f"n is {n}; a tabletop needs at least one world")
        self.n, self.embodiment, self.tasks = n, EMBODIMENTS[embodiment], instructions(split)
        self.randomized, self.split, self.task_agnostic, self.astray = (
            randomized,
            split,
            task_agnostic,
            astray,
        )

    def reset(self, seeds) -> dict:
        """Start the worlds of `seeds` (n non-negative ints). The same seed is the same world, bit for bit, whatever n is.

        Returns image (n, 48, 48, 3) uint8, state (n, P) float32 in [-1, 1], instruction, a list of n strings.
        """
        seeds = [int(s) for s in seeds]
        if len(seeds) != self.n or min(seeds) < 0:
            raise ValueError(
                f"seeds are {seeds}; reset needs {self.n} non-negative integers, one per world"
            )
        n = self.n
        self.discs, self.effector = np.zeros((n, DISCS, 2)), np.zeros((n, 2))
        self.colours, self.named = np.zeros((n, DISCS), int), np.zeros(n, int)
        self.skill, self.side, self.goal = np.zeros(n, int), np.zeros(n, int), np.zeros((n, 2))
        self.opening, self.heading, self.held = np.ones(n), np.zeros(n), np.full(n, -1)
        self.background = np.zeros((3, n, CANVAS, CANVAS), np.uint8)
        self.tint, self.slope = np.ones((n, 3), np.float32), np.zeros((n, 2), np.float32)
        self.instruction, self.rngs = [], []
        for i, seed in enumerate(seeds):
            layout, look, play = (
                np.random.default_rng([SPLITS.index(self.split), stream, seed])
                for stream in range(3)
            )
            skill, colour, side = self.tasks[layout.integers(len(self.tasks))]
            first = COLOURS.index(colour)
            rest = layout.permutation([c for c in range(len(COLOURS)) if c != first])[: DISCS - 1]
            discs, self.effector[i] = _layout(
                layout, None if self.task_agnostic else skill, SIDES.index(side)
            )
            order = layout.permutation(DISCS)  # the named disc may have any slot
            self.discs[i], self.colours[i] = discs[order], np.array([first, *rest])[order]
            self.named[i] = order.argmin()
            self.skill[i], self.side[i] = SKILLS.index(skill), SIDES.index(side)
            self.goal[i] = _goal(skill, discs[:1], SIDES.index(side))[0]
            if self.embodiment.name == "arm":
                self.heading[i] = layout.uniform(-0.8, 0.8)
            picture, self.tint[i], self.slope[i] = _scenery(
                look, self.split, self.randomized, discs
            )
            self.background[:, i] = np.moveaxis(picture, -1, 0)
            self.instruction.append("" if self.task_agnostic else sentence(skill, colour, side))
            self.rngs.append(play)
            if self.astray and play.random() < self.astray:
                self.effector[i], self.opening[i] = self._stray(play, self.discs[i], self.named[i])
        self.offset = np.zeros((n, 2))  # from the effector to the disc it holds
        self.start = self.discs[np.arange(n), self.named].copy()
        self.grasped, self.success = np.zeros((n, DISCS), bool), np.zeros(n, bool)
        self.waypoint, self.waypoint_grip, self.drift = (
            self.effector.copy(),
            np.full(n, -1.0),
            np.zeros((n, 2)),
        )
        self._intention = None
        return self.observe()

    @staticmethod
    def _stray(rng: np.random.Generator, discs: np.ndarray, named: int) -> tuple[np.ndarray, float]:
        """Where an effector may find itself after a mistake (2,), and its opening; a closed one touches no disc."""
        near, anywhere = (
            discs[named] + 0.12 * rng.standard_normal((64, 2)),
            rng.uniform(0.05, 0.95, (64, 2)),
        )
        spots, opening = (
            np.clip(np.where(rng.random((64, 1)) < 0.7, near, anywhere), 0.05, 0.95),
            float(rng.integers(2)),
        )
        free = (_distance(spots[:, None], discs) > RADIUS + TIP + 0.005).all(axis=1)
        return spots[0 if opening else free.argmax()], opening

    def observe(self) -> dict:
        """What a policy sees now, as `reset` returns it."""
        return {
            "image": self.render(),
            "state": self.state(),
            "instruction": list(self.instruction),
        }

    def state(self) -> np.ndarray:
        """Proprioception (n, P) float32, scaled to [-1, 1] over the table."""
        return self._state().astype(np.float32)

    def _state(self):
        return self.embodiment.to_state(self.effector, self.opening, self.heading)

    def step(self, actions) -> tuple[dict, np.ndarray]:
        """One action step of every world: actions (n, A), clipped to [-1, 1] -> observation, success (n,) bool, latched."""
        actions = self._check(actions)
        self.advance(actions)
        return self.observe(), self.success.copy()

    def _check(self, actions) -> np.ndarray:
        actions, shape = np.asarray(actions, float), (self.n, self.embodiment.action_dim)
        if actions.shape != shape:
            raise ValueError(
                f"actions have shape {actions.shape}; {self.n} worlds of embodiment {self.embodiment.name!r} need {shape}"
            )
        if not np.isfinite(actions).all():
            i, j = np.argwhere(~np.isfinite(actions))[0]
            raise ValueError(
                f"actions[{i}, {j}] is {actions[i, j]}; actions must be finite numbers, in [-1, 1]"
            )
        return actions

    def advance(self, actions: np.ndarray) -> None:
        """`step` without a picture."""
        rows = np.arange(self.n)
        xy, grip, heading = self.embodiment.from_action(np.clip(actions, -1, 1), self._state())
        way = np.clip(xy, *REACH) - self.effector
        length = np.sqrt((way**2).sum(axis=1, keepdims=True))
        move = way * np.minimum(1, MAX_SPEED / np.maximum(length, 1e-9))
        self.effector = self.effector + move
        self.heading = self.heading + np.clip(heading - self.heading, -TURN_SPEED, TURN_SPEED)
        was_open = self.opening >= 0.5
        wanted = (1 - np.clip(grip, -1, 1)) / 2
        self.opening = self.opening + np.clip(wanted - self.opening, -GRIP_SPEED, GRIP_SPEED)

        dropped = (
            (self.opening > 0.5) & (self.held == self.named) & (self.skill == SKILLS.index("push"))
        )
        self.grasped[rows[dropped], self.named[dropped]] = (
            False  # a disc to be pushed that was grasped by mistake and let go: begin anew
        )
        self.start[dropped] = self.discs[rows, self.named][dropped]
        self.held = np.where(self.opening > 0.5, -1, self.held)
        gap = _distance(self.discs, self.effector[:, None])
        nearest = gap.argmin(axis=1)
        grasps = was_open & (self.opening < 0.5) & (self.held < 0) & (gap[rows, nearest] < GRASP)
        self.held = np.where(grasps, nearest, self.held)
        self.offset = np.where(
            grasps[:, None], self.discs[rows, nearest] - self.effector, self.offset
        )
        self.grasped[rows[grasps], nearest[grasps]] = True

        holding = rows[self.held >= 0]
        self.discs[holding, self.held[holding]] = self.effector[holding] + self.offset[holding]
        free = np.arange(DISCS) != self.held[:, None]
        pushing = ((self.opening < 0.5) & (self.held < 0))[:, None]
        self.discs += self._driven(
            self.discs - self.effector[:, None], RADIUS + TIP, pushing, move[:, None]
        )
        for i in range(
            DISCS
        ):  # discs that touch move apart, each by half; a held one is lifted above the others
            for j in range(i):
                half = (
                    self._apart(
                        self.discs[:, i] - self.discs[:, j], 2 * RADIUS, free[:, i] & free[:, j]
                    )
                    / 2
                )
                self.discs[:, i] += half
                self.discs[:, j] -= half
        self.discs = np.clip(self.discs, RADIUS, 1 - RADIUS)

        if not self.task_agnostic:
            disc, toward = self.discs[rows, self.named], DIRECTIONS[self.side]
            touched, released = self.grasped[rows, self.named], self.held != self.named
            placed = touched & released & (_room(disc, toward) < BAND)
            pushed = ~touched & (((disc - self.start) * toward).sum(axis=1) >= PUSH)
            self.success |= np.where(self.skill == SKILLS.index("place"), placed, pushed)
        self._intention = None

    @staticmethod
    def _apart(offset, least, active):
        """How far to move along `offset` (..., 2), where `active`, for its length to be at least `least`."""
        length = np.maximum(np.sqrt((offset**2).sum(axis=-1)), 1e-9)
        return offset * (np.where(active, np.maximum(least - length, 0), 0) / length)[..., None]

    @classmethod
    def _driven(cls, offset, least, active, move):
        """How far discs at `offset` (n, D, 2) from a closed gripper that came by `move` (n, 1, 2) go, for it to be at least `least`: with
        the gripper if it comes from behind, within 60 degrees (its face is flat and discs do not roll off), else out of its way."""
        speed = np.sqrt((move**2).sum(axis=-1))
        ahead = (offset * move).sum(axis=-1) / np.maximum(speed, 1e-9)
        length = np.sqrt((offset**2).sum(axis=-1))
        faced = active & (length < least) & (ahead > 0.5 * length) & (speed > 1e-6)
        way = np.where(
            faced, np.sqrt(ahead**2 + np.maximum(least**2 - length**2, 0)) - ahead, 0
        ) / np.maximum(speed, 1e-9)
        return way[..., None] * move + cls._apart(offset, least, active & ~faced)

    # ---- The scripted expert ----

    def expert(self, noise: float = 0.0, slip: np.ndarray | bool = False) -> np.ndarray:
        """What the expert does now, as actions (n, A) in the embodiment's convention.

        With noise (table units, 0.01 is plenty) the target drifts smoothly about the one that was meant; each call draws
        anew. Where `slip` (n,) the grip does the opposite. Execute such actions and record the clean ones: the data teach how to recover.
        """
        if self._intention is None:
            self._intention = self._wander() if self.task_agnostic else self._intend()
        xy, grip = self._intention
        if noise:
            draws = np.stack([rng.standard_normal(2) for rng in self.rngs])
            self.drift = 0.8 * self.drift + 0.6 * noise * draws
            xy = xy + self.drift * ~self.success[:, None]
        grip = np.where(slip, -grip, grip)
        return np.clip(self.embodiment.to_action(np.clip(xy, *REACH), grip, self._state()), -1, 1)

    @staticmethod
    def _ease(way, top=0.034):
        """The next step (n, 2) along `way`: fast when far, slow when near."""
        length = np.maximum(np.sqrt((way**2).sum(axis=1, keepdims=True)), 1e-9)
        return way * np.minimum(1, np.minimum(0.35 * length + 0.006, top) / length)

    def _intend(self) -> tuple[np.ndarray, np.ndarray]:
        """Next position (n, 2) and grip (n,); a function of what can be seen now, so that it can be imitated."""
        rows = np.arange(self.n)
        disc, toward = self.discs[rows, self.named], DIRECTIONS[self.side]
        # Place: go to the disc, close, go to the goal, open. A grip that has begun to move tolerates more than one at rest.
        holding, resting = self.held == self.named, np.abs(self.opening - 0.5) > 0.45
        way = np.where(holding[:, None], self.goal - disc, disc - self.effector)
        arrived = np.sqrt((way**2).sum(axis=1)) < np.where(resting, 0.028, 0.055)
        place_step = self._ease(way)
        place_closes = np.where(holding, ~arrived, arrived & (self.opening > 0.25))
        # Push: go behind the disc with the gripper open, close there, then drive on while staying behind the centre.
        away = self.effector - disc
        along = (away * toward).sum(axis=1)
        aside = away - along[:, None] * toward
        lateral, closed = np.sqrt((aside**2).sum(axis=1)), self.opening < 0.25
        behind = (
            (along < -RADIUS - TIP - 0.015)
            & (along > -0.2)
            & (lateral < np.where(resting, 0.025, 0.04))
        )
        drives = closed & (along < -0.06) & (along > -0.2) & (lateral < 0.045)
        push_step = np.where(
            drives[:, None], 0.024 * toward - 0.8 * aside, self._ease(-0.15 * toward - away)
        )
        push_step = np.where((behind & ~drives)[:, None], 0.3 * push_step, push_step)
        push_closes = behind | drives

        place = self.skill == SKILLS.index("place")
        step = np.where(place[:, None], place_step, push_step)
        closes = np.where(self.success, ~place, np.where(place, place_closes, push_closes))
        step = np.where(self.success[:, None], 0, step)  # done: hold still
        return self.effector + step, np.where(closes, 1.0, -1.0)

    def _wander(self) -> tuple[np.ndarray, np.ndarray]:
        """Task-agnostic motion: waypoints, more often than not on a disc, with a grip that changes at random there."""
        near = _distance(self.waypoint, self.effector) < 0.02
        for i in np.flatnonzero(near):
            rng = self.rngs[i]
            over_disc = _distance(self.discs[i], self.effector[i]).min() < GRASP
            if rng.random() < (0.5 if self.waypoint_grip[i] > 0 else 0.9 if over_disc else 0.2):
                self.waypoint_grip[i] = -self.waypoint_grip[i]
            on_disc = rng.random() < 0.7
            spot = self.discs[i, rng.integers(DISCS)] + rng.uniform(-0.04, 0.04, 2)
            self.waypoint[i] = np.clip(spot if on_disc else rng.uniform(0.1, 0.9, 2), 0.05, 0.95)
        still = (
            np.abs((1 - self.waypoint_grip) / 2 - self.opening) > 0.01
        )  # let the grip finish before moving on
        step = np.where(still[:, None], 0, self._ease(self.waypoint - self.effector))
        return self.effector + step, self.waypoint_grip.copy()

    # ---- What others may look at ----

    def snapshot(self) -> Snapshot:
        """A copy of all that moves."""
        parts = (self.effector, self.opening, self.heading, self.discs, self.held, self.colours)
        return Snapshot(*(p.copy() for p in parts))

    def positions(self) -> dict[str, np.ndarray]:
        """Ground truth for pre-training a vision tower; colour, skill and side are indices into the module's tuples.

        discs (n, 4, 2) per colour, present (n, 4) bool, effector (n, 2), opening (n,), named, skill, side (n,) int, goal (n, 2).
        In a task-agnostic world the last four mean nothing.
        """
        discs, present, rows = (
            np.zeros((self.n, len(COLOURS), 2)),
            np.zeros((self.n, len(COLOURS)), bool),
            np.arange(self.n),
        )
        discs[rows[:, None], self.colours], present[rows[:, None], self.colours] = self.discs, True
        return {"discs": discs.astype(np.float32), "present": present, "effector": self.effector.astype(np.float32),
                "opening": self.opening.astype(np.float32), "named": self.colours[rows, self.named], "skill": self.skill.copy(),
                "side": self.side.copy(), "goal": self.goal.astype(np.float32)}  # fmt: skip

    def render(self) -> np.ndarray:
        """The camera's pictures (n, 48, 48, 3) uint8."""
        canvas = self.background.copy()
        for part in _parts(self.embodiment.name, self.snapshot(), self.held):
            _paint(canvas, part, self.tint, self.slope)
        return np.ascontiguousarray(np.moveaxis(canvas[:, :, PAD:-PAD, PAD:-PAD], 0, -1))

    def flow(self, before: Snapshot, after: Snapshot) -> np.ndarray:
        """True optical flow (n, 48, 48, 2) float32 in pixels from one snapshot to another; see `flow`."""
        return flow(self.embodiment.name, before, after)


class TabletopEnv:
    """One world behind the methods of a Gymnasium environment (which it does not import); reward 1 once the task is done."""

    def __init__(
        self,
        embodiment: str = "gripper",
        randomized: bool = False,
        split: str = "train",
        max_steps: int = 100,
    ):
        self.world, self.max_steps, self.steps = (
            Tabletop(1, embodiment, randomized, split),
            max_steps,
            0,
        )
        self._seeds = np.random.default_rng()

    @staticmethod
    def _first(obs: dict) -> dict:
        return {key: value[0] for key, value in obs.items()}

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        """-> observation: image (48, 48, 3) uint8, state (P,) float32, instruction str; info."""
        self.steps = 0
        seed = int(self._seeds.integers(2**31)) if seed is None else seed
        return self._first(self.world.reset([seed])), {"seed": seed}

    def step(self, action) -> tuple[dict, float, bool, bool, dict]:
        """action (A,) -> observation, reward, terminated, truncated, info."""
        obs, success = self.world.step(np.asarray(action, float)[None])
        self.steps += 1
        done = bool(success[0])
        return (
            self._first(obs),
            float(done),
            done,
            not done and self.steps >= self.max_steps,
            {"success": done},
        )

    def render(self) -> np.ndarray:
        """The picture (48, 48, 3) uint8."""
        return self.world.render()[0]


# ---- Recording ----


@dataclass
class Episode:
    """One recorded episode of T action steps."""

    frames: np.ndarray  # (T+1, 48, 48, 3) uint8, one before every action and one after the last
    states: np.ndarray  # (T+1, P) float32
    actions: (
        np.ndarray | None
    )  # (T, A) float32: what the expert meant; None for a body whose actions nobody records
    instruction: str
    embodiment: str
    level: int
    success: bool
    snapshots: Snapshot = field(repr=False)  # arrays (T+1, ...)
    motion: np.ndarray = field(repr=False)  # (T+1, 3) float32: true x, y, opening in [0, 1]

    def flow(self, before, after) -> np.ndarray:
        """True optical flow (k, 48, 48, 2) between the frames numbered `before` (k,) and those numbered `after` (k,)."""
        return flow(
            self.embodiment, self.snapshots[np.asarray(before)], self.snapshots[np.asarray(after)]
        )


# What each level of the pyramid records; level 1, web data, is what a pre-trained backbone has seen already.
LEVELS = {
    2: dict(bodies=("hand",)),
    3: dict(bodies=("gripper",), randomized=True),
    4: dict(bodies=("gripper",), task_agnostic=True),
    5: dict(bodies=("arm", "gantry")),
    6: dict(bodies=("gripper",), astray=0.5, slips=0.06),
}
_LIMIT, _WANDER, _AFTER, _AT_ONCE = (
    100,
    48,
    10,
    64,
)  # steps at most, steps without a task, steps kept after success, worlds at once
_SLIP = 4  # steps that a slip of the grip lasts


def record(
    level: int,
    episodes: int,
    seed: int,
    embodiment: str | None = None,
    split: str = "train",
    noise: float = 0.01,
    pictures: bool = True,
    disturbed: bool = True,
) -> list[Episode]:
    """Record the expert. Deterministic in its arguments; the first k of more episodes are the same k episodes.

    A level with several bodies takes them in turn unless `embodiment` names one. `noise` disturbs what is executed, not what
    is recorded (see `Tabletop.expert`); on level 6 the grip also slips now and then, for a few steps. Each episode ends a few steps
    after success. Without `pictures` its frames have no pixels, for those who need the motion alone and sooner. Undisturbed, the
    expert starts where a policy does, and what is recorded is what is executed.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level}; the tabletop records levels {tuple(LEVELS)}")
    if embodiment is not None and embodiment not in EMBODIMENTS:
        raise ValueError(
            f"embodiment is {embodiment!r}; it must be one of {tuple(EMBODIMENTS)}, or None for level {level}'s own"
        )
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; record at least one")
    kind = dict(LEVELS[level])
    bodies = kind.pop("bodies")
    if not disturbed:
        noise, kind = (
            0.0,
            {name: value for name, value in kind.items() if name not in ("astray", "slips")},
        )
    bodies = bodies if embodiment is None else (embodiment,)
    seeds = np.random.SeedSequence([seed, level]).generate_state(episodes)
    recorded: list[Episode | None] = [None] * episodes
    for turn, body in enumerate(bodies):
        mine = np.arange(turn, episodes, len(bodies))
        for chunk in (mine[i : i + _AT_ONCE] for i in range(0, len(mine), _AT_ONCE)):
            for i, episode in zip(
                chunk, _record(level, seeds[chunk], body, split, noise, pictures, kind), strict=True
            ):
                recorded[i] = episode
    return recorded


def _record(
    level: int, seeds: np.ndarray, body: str, split: str, noise: float, pictures: bool, kind: dict
) -> list[Episode]:
    slips, slipping = kind.get("slips", 0.0), np.zeros(len(seeds), int)
    world = Tabletop(
        len(seeds),
        body,
        split=split,
        **{name: value for name, value in kind.items() if name != "slips"},
    )
    look = world.render if pictures else lambda: np.zeros((world.n, 0, 0, 3), np.uint8)
    world.reset(seeds)
    frames, states, snapshots, actions, since = (
        [look()],
        [world.state()],
        [world.snapshot()],
        [],
        np.zeros(len(seeds), int),
    )
    length = np.zeros(len(seeds), int)
    for _ in range(_WANDER if world.task_agnostic else _LIMIT):
        actions.append(world.expert().astype(np.float32))
        if slips:
            draws = np.array([rng.random() for rng in world.rngs])
            slipping = np.where(
                (slipping == 0) & (draws < slips) & ~world.success,
                _SLIP,
                np.maximum(slipping - 1, 0),
            )
        world.advance(world.expert(noise, slipping > 0))
        frames.append(look()), states.append(world.state()), snapshots.append(world.snapshot())
        length += since <= _AFTER
        since += world.success
        if (since > _AFTER).all():
            break
    frames, states, actions, shots = (
        np.stack(frames),
        np.stack(states),
        np.stack(actions),
        Snapshot.stack(snapshots),
    )
    kept = []
    for i, t in enumerate(length):
        shot = shots[: t + 1, i]
        motion = np.concatenate([shot.effector, shot.opening[:, None]], axis=1).astype(np.float32)
        acts = actions[:t, i].copy() if world.embodiment.has_actions else None
        kept.append(Episode(frames[: t + 1, i].copy(), states[: t + 1, i].copy(), acts, world.instruction[i], body, level,
                            bool(world.success[i]), shot, motion))  # fmt: skip
    return kept
