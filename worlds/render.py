"""Render."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from worlds.robots import DISCS, IMAGE, RADIUS, SHOULDER, SPLITS, _stack, arm_joints, arm_points

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
    """A capsule from `a` to `b` (n, 2) of `radius`, all in table units; `a is b` makes it a disc,
    `inner` cuts a hole."""

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
    """All parts from the table up. A held disc lies above the others, so `held` decides the order
    of the discs."""
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
    """The speckles that parts carry: (tile, tile) float32 within [-1, 1], mostly soft blobs of
    about two pixels."""
    return (
        np.tanh(1.2 * _blur(np.random.default_rng(7).standard_normal((_TILE, _TILE)), 3.0))
        .astype(np.float32)
        .ravel()
    )


@lru_cache
def _backgrounds(split: str, randomized: bool) -> np.ndarray:
    """Table textures (count, 160, 160, 3) float32 in 0..255: a smooth field of colour plus middle
    and fine noise."""
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

    Returns x, y (n, k, k') integer image coordinates, the distance of pixel centres to the
    capsule's core, and their offset dx, dy from `a`, all in pixels.
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
    """How bright a slanting light is at pixels x, y; `slope` is relative change across the table
    along x and y."""
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
    """Blend a part into canvases (3, n, CANVAS, CANVAS) uint8, in place, under light `tint` (n, 3)
    and `slope` (n, 2)."""
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
    """One world's still background (CANVAS, CANVAS, 3) uint8 with its light (3,) and light gradient
    (2,) already in it."""
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
    """True optical flow (n, 48, 48, 2) float32, (dx, dy) in pixels, defined on the pixels of
    `before`.

    Each pixel goes with the topmost part that covers it, turning with it; the table and the shadows
    on it stay.
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
