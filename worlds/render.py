"""Pictures and true optical flow of the tabletop, of the same capsules: pixels and flow cannot
disagree.

Every body is a list of capsules, painted in order from the table up; the flow asks the same
capsules where each pixel goes. Lengths are in table units, from 0 to 1, unless pixels are said.

Shapes: n worlds, D discs, (k, k') pixels of the window about a capsule.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from worlds.robots import IMAGE, RADIUS, SHOULDER, SPLITS, arm_joints, arm_points, columns

PAD = 16  # the canvas is larger than the image on every side, so that few windows are cut
CANVAS = IMAGE + 2 * PAD
TILE = 256  # side of the speckles that capsules carry, four samples per pixel
TEXTURE = 160  # side of a table's texture, pixels


class Snapshot(NamedTuple):
    """All that moves in n worlds, or in one world at T + 1 times."""

    effector: ndarray  # (n, 2)
    opening: ndarray  # (n,) 0 closed, 1 open
    heading: ndarray  # (n,) radians
    discs: ndarray  # (n, D, 2)
    held: ndarray  # (n, D) bool, the grasped disc
    colours: ndarray  # (n, D) index into COLOURS

    def at(self, *index) -> "Snapshot":
        """Every array at this index."""
        return Snapshot(*(array[index] for array in self))


def norm(way: ndarray) -> ndarray:
    """Length of ways (..., 2)."""
    return np.linalg.norm(way, axis=-1)


def distance(a: ndarray, b: ndarray) -> ndarray:
    """Of points (..., 2)."""
    return norm(a - b)


# -- bodies ---------------------------------------------------------------------------------------

INK = np.array(
    [
        [226, 44, 40],
        [40, 172, 60],
        [42, 80, 226],
        [246, 214, 36],
    ]
)  # as COLOURS
WHITE = (248, 246, 250)
DARK = (40, 38, 52)
STEEL = (112, 112, 150)
ORANGE = (250, 140, 30)
CYAN = (30, 205, 215)
SKIN = (236, 178, 144)
SLEEVE = (146.32, 124.6, 123.84)
TABLE = np.array([158, 148, 136])
SHADE = np.array([0.018, 0.024])  # where shadows fall


class Capsule(NamedTuple):
    """All points nearer than `radius` to the line from `a` to `b`; `a is b` makes it a disc."""

    a: ndarray  # (n, 2)
    b: ndarray  # (n, 2)
    radius: float
    colour: ndarray | tuple = (0, 0, 0)  # (3,) or (n, 3), 0..255
    inner: float = 0.0  # radius of a hole
    contrast: float = 0.15  # strength of the speckles that are fixed to it
    grain: ndarray | int = 0  # where on the tile of speckles they start, or (n, 1, 1) of it
    soft: float = 1.0  # width of the edge, in pixels
    shadow: float = 0.0  # how much a shadow darkens; it is no body: no rim, no flow


def fingers(s: Snapshot, colour: ndarray, turn: float = 0.0) -> Iterator[Capsule]:
    """Two parallel fingers, left and right of the effector, whose gap is the opening."""
    heading = s.heading + turn
    cos = np.cos(heading)
    sin = np.sin(heading)
    gap = 0.022 + 0.068 * s.opening
    aside = gap[:, None] * columns(cos, sin)
    along = 0.036 * columns(-sin, cos)
    for middle in (s.effector - aside, s.effector + aside):
        yield Capsule(middle - along, middle + along, 0.019, colour, contrast=0.05)


def shadow(at: ndarray, soft: float = 4.0) -> Capsule:
    """Of a disc at this place."""
    under = at + SHADE
    return Capsule(under, under, RADIUS, soft=soft, shadow=0.35)


def gripper(s: Snapshot) -> Iterator[Capsule]:
    pair = list(fingers(s, DARK))
    yield shadow(s.effector + SHADE)
    bar = [(finger.a + finger.b) / 2 for finger in pair]
    yield Capsule(*bar, 0.014, STEEL, contrast=0.05)
    yield from pair
    yield Capsule(s.effector, s.effector, 0.052, WHITE, inner=0.026, contrast=0.05)


# Of the hand's fingers: knuckles from the palm, and tips, by the opening, from the effector.
KNUCKLES = ((0, -0.03), (0.035, -0.03), (-0.045, -0.01))
TIPS = ((1, -0.5), (1.35, 0.2), (-1, 0))


def hand(s: Snapshot) -> Iterator[Capsule]:
    palm = s.effector + [0.035, 0.125]
    yield shadow(palm)
    yield Capsule(palm + [0.01, 0.02], palm + [0.12, 0.6], 0.045, SLEEVE)
    gap = 0.02 + 0.07 * s.opening[:, None]
    for knuckle, tip in zip(KNUCKLES, TIPS):
        end = s.effector + gap * tip
        yield Capsule(palm + knuckle, end, 0.023, SKIN, contrast=0.08)
    yield Capsule(palm, palm, 0.062, SKIN, contrast=0.08)


def arm(s: Snapshot) -> Iterator[Capsule]:
    elbow, _ = arm_points(*arm_joints(s.effector))
    base = np.broadcast_to(SHOULDER, elbow.shape)
    fall = 2 * SHADE
    yield Capsule(elbow + fall, s.effector + fall, 0.03, soft=3.0, shadow=0.3)
    yield Capsule(base, elbow, 0.034, STEEL, contrast=0.3)
    yield Capsule(elbow, s.effector, 0.027, STEEL, contrast=0.3)
    yield from fingers(s, DARK)
    yield Capsule(s.effector, s.effector, 0.042, ORANGE)


def gantry(s: Snapshot) -> Iterator[Capsule]:
    beams = []
    for along in ([False, True], [True, False]):
        beams.append([np.where(along, end, s.effector) for end in (-0.1, 1.1)])
    for a, b in beams:
        yield Capsule(a + SHADE, b + SHADE, 0.018, soft=2.5, shadow=0.25)
    for a, b in beams:
        yield Capsule(a, b, 0.018, DARK, contrast=0.5)
    yield from fingers(s, WHITE, np.pi / 2)
    yield Capsule(s.effector, s.effector, 0.045, CYAN)


BODIES = {"gripper": gripper, "hand": hand, "arm": arm, "gantry": gantry}


def capsules(embodiment: str, s: Snapshot, held: ndarray) -> Iterator[Capsule]:
    """All of n worlds from the table up. A held disc lies above the others, so `held` (n, D)
    decides the order of the discs."""
    rows = np.arange(len(held))
    for slot in np.argsort(held, axis=1, kind="stable").T:
        at = s.discs[rows, slot]
        colour = s.colours[rows, slot]
        grain = 23 + 61 * colour[:, None, None]
        yield shadow(at, soft=2.5)
        yield Capsule(at, at, RADIUS, INK[colour], contrast=0.5, grain=grain)
    yield from BODIES[embodiment](s)


# -- pixels ---------------------------------------------------------------------------------------


def speckles(
    rng: np.random.Generator,
    side: int,
    channels: int,
    sigma: float,
) -> ndarray:
    """Noise (side, side, channels) of unit variance, periodically blurred by a Gaussian."""
    noise = rng.standard_normal((side, side, channels))
    squares = (np.pi * sigma * np.fft.fftfreq(side)) ** 2
    gain = np.exp(-2 * np.add.outer(squares, squares))
    sides = (0, 1)
    waves = np.fft.fft2(noise, axes=sides) * gain[..., None]
    smooth = np.fft.ifft2(waves, axes=sides).real
    return (smooth - smooth.mean(axis=sides)) / smooth.std()


@lru_cache
def tile() -> ndarray:
    """The speckles that capsules carry: (TILE * TILE,) float32 within [-1, 1], mostly soft blobs of
    about two pixels."""
    noise = speckles(np.random.default_rng(7), TILE, 1, 3.0)
    return np.tanh(1.2 * noise).astype(np.float32).ravel()


@lru_cache
def textures(split: str, randomized: bool) -> ndarray:
    """Tables (count, TEXTURE, TEXTURE, 3) float32 in 0..255: a smooth field of colour plus middle
    and fine noise."""
    rng = np.random.default_rng([11, SPLITS.index(split), randomized])
    made = []
    for _ in range(24 if randomized else 6):
        if randomized:
            base = rng.uniform(70, 190, 3)
        else:
            base = TABLE + rng.uniform(-8, 8, 3)
        grey = base.mean()
        base = grey + 0.6 * (base - grey)  # away from the saturated colours of the discs
        wide = speckles(rng, TEXTURE, 3, 24.0)
        middle = speckles(rng, TEXTURE, 1, 2.2)
        fine = speckles(rng, TEXTURE, 1, 0.7)
        field = base + (14 if randomized else 7) * wide
        made.append(field + rng.uniform(8, 13) * middle + 5 * fine)
    return np.clip(np.stack(made), 0, 255).astype(np.float32)


def plane(ways: ndarray) -> ndarray:
    """Ways (n, 2) as complex numbers (n, 1, 1): to turn them is to multiply."""
    return (ways @ [1, 1j])[:, None, None]


def cover(c: Capsule) -> tuple[ndarray, ndarray, ndarray]:
    """The pixels about a capsule, in windows of equal size for all worlds, cut to the canvas.

    Returns their indices (n, k, k') into n flattened canvases, the distance of their centres to the
    capsule's core, and their complex offset from `a`, all in pixels.
    """
    a, b = (np.float32(end * IMAGE) for end in (c.a, c.b))
    span = b - a
    thick = 2 * c.radius * IMAGE + c.soft
    sides = (np.abs(span).max(axis=0) + thick).astype(int) + 3
    middle = (a + b) / 2
    corner = np.floor(middle - sides / 2 + 0.5).astype(int)
    x, y = corner.T[:, :, None, None]
    width, height = sides
    last = IMAGE + PAD - 1
    x = np.clip(x + np.arange(width), -PAD, last)
    y = np.clip(y + np.arange(height)[:, None], -PAD, last)
    world = np.arange(len(a))[:, None, None]
    pixel = (world * CANVAS + y + PAD) * CANVAS + x + PAD
    centre = x + 0.5 + 1j * (y + 0.5)
    offset = centre - plane(a)
    square = (span**2).sum(axis=1)[:, None, None]
    along = (offset * plane(span).conj()).real / np.maximum(square, 1e-9)
    rest = offset - np.clip(along, 0, 1) * plane(span)
    return pixel, np.hypot(rest.real, rest.imag), offset


def axis(c: Capsule) -> ndarray | complex:
    """Unit vectors (n, 1, 1) along a capsule; a disc does not turn."""
    if c.a is c.b:
        return np.complex128(1)
    span = c.b - c.a
    return plane(span / norm(span)[:, None])


def coverage(c: Capsule, far: ndarray) -> ndarray:
    """How much of pixels at a distance from the core is covered, 0..1; edges are anti-aliased."""
    edge = (np.float32(c.radius * IMAGE) - far) / c.soft
    if c.inner:
        edge = np.minimum(edge, far - np.float32(c.inner * IMAGE))
    return np.clip(edge + 0.5, 0, 1)


def paint(
    canvas: ndarray,
    c: Capsule,
    tint: ndarray,
    light: ndarray,
) -> None:
    """Blend a capsule into canvases (3, n, CANVAS, CANVAS) uint8, in place, under the colour `tint`
    (n, 3) and the brightness `light` (n, CANVAS, CANVAS)."""
    pixel, far, offset = cover(c)
    alpha = coverage(c, far)
    # Colour by colour: numpy is several times slower with a last axis of three.
    planes = canvas.reshape(3, -1)
    if c.shadow:
        clear = 1 - np.float32(c.shadow) * alpha
        for plane in planes:
            plane[pixel] = plane.take(pixel) * clear
        return
    ahead = axis(c).astype(np.complex64)
    own = 4 * offset * ahead.conj() + (4 + 4j) * TILE
    row = own.imag.astype(np.int32) % TILE
    column = (own.real.astype(np.int32) + c.grain) % TILE
    shine = 1 + c.contrast * tile().take(row * TILE + column)
    shine[far > c.radius * IMAGE - 0.9] *= 0.62  # a dark rim
    shine *= light.take(pixel)
    ink = (tint * c.colour).astype(np.float32)
    for plane, colour in zip(planes, ink.T[:, :, None, None], strict=True):
        under = plane.take(pixel)
        over = np.minimum(shine * colour, 255)
        plane[pixel] = under + alpha * (over - under) + 0.5


CLUTTER = (
    (128, 128, 132),
    (140, 70, 150),
    (120, 84, 60),
    (205, 150, 180),
    (60, 60, 66),
)
Y, X = np.mgrid[-PAD : IMAGE + PAD, -PAD : IMAGE + PAD]  # the pixels of a canvas


def slanted(slope: ndarray, centre: float) -> ndarray:
    """Brightness (CANVAS, CANVAS) of a light that changes by `slope` (2,) across the table."""
    across = (X + centre) / IMAGE - 0.5
    down = (Y + centre) / IMAGE - 0.5
    return 1 + slope[0] * across + slope[1] * down


def clutter(
    rng: np.random.Generator,
    picture: ndarray,
    discs: ndarray,
) -> ndarray:
    """A picture with squares and triangles, one to three, that nothing touches."""
    for _ in range(rng.integers(1, 4)):
        spots = rng.uniform(0.08, 0.92, (16, 2))
        gaps = distance(spots[:, None], discs)
        spot = spots[gaps.min(axis=1).argmax()]
        discs = np.vstack([discs, spot])
        size = rng.uniform(3.0, 5.5)
        angle = rng.uniform(0, 2 * np.pi)
        sides = rng.integers(3, 5)
        dx = X + 0.5 - spot[0] * IMAGE
        dy = Y + 0.5 - spot[1] * IMAGE
        normals = angle + 2 * np.pi * np.arange(sides) / sides
        along = [dx * np.cos(t) + dy * np.sin(t) for t in normals]
        depth = np.max(along, axis=0)
        reach = size * (0.62 if sides == 3 else 0.9)
        shine = np.where(depth > reach - 1, 0.7, 1.0)  # a dark rim
        colour = shine[..., None] * CLUTTER[rng.integers(5)]
        alpha = np.clip(reach - depth + 0.5, 0, 1)
        picture = picture + alpha[..., None] * (colour - picture)
    return picture


def scenery(
    rng: np.random.Generator, split: str, randomized: bool, discs: ndarray
) -> dict[str, ndarray]:
    """One world's still `background` (CANVAS, CANVAS, 3) uint8, and the light on what stands on
    it: `tint` (3,) and brightness `light` (CANVAS, CANVAS)."""
    library = textures(split, randomized)
    table = library[rng.integers(len(library))]
    left, top = rng.integers(0, TEXTURE - CANVAS, 2)
    picture = table[top : top + CANVAS, left : left + CANVAS]
    tint = np.ones(3, np.float32)
    slope = np.zeros(2, np.float32)
    if randomized:
        picture = clutter(rng, picture, discs)
        tint = np.float32(rng.uniform(0.78, 1.15) * rng.uniform(0.92, 1.08, 3))
        slope = np.float32(rng.uniform(-0.35, 0.35, 2))
        picture = picture * tint * slanted(slope, 0.5)[..., None]
    background = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return {"background": background, "tint": tint, "light": slanted(slope, 0.0)}


def flow(embodiment: str, before: Snapshot, after: Snapshot) -> ndarray:
    """True optical flow (n, 48, 48, 2) float32, (dx, dy) in pixels, defined on the pixels of
    `before`.

    Each pixel goes with the topmost capsule that covers it, turning with it; the table and the
    shadows on it stay.
    """
    motions = np.zeros((len(before.effector), CANVAS, CANVAS), np.complex64)
    pixels = motions.reshape(-1)
    starts, ends = (capsules(embodiment, shot, before.held) for shot in (before, after))
    for old, new in zip(starts, ends, strict=True):
        if old.shadow:
            continue
        pixel, far, offset = cover(old)
        turn = axis(new) * axis(old).conj()
        shift = plane(IMAGE * (new.a - old.a))
        motion = shift + (turn * offset - offset)
        inside = coverage(old, far) >= 0.5
        pixels[pixel[inside]] = motion[inside]
    seen = motions[:, PAD:-PAD, PAD:-PAD]
    return columns(seen.real, seen.imag)
