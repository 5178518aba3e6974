r"""The toy world: a tabletop seen from above, three discs, and robots that look and act differently
but move alike.

It stands in for the paper's six-level data pyramid at a size at which a small policy learns in CPU
minutes: level 2 a hand without recorded actions, 3 the target robot in randomised scenes, 4 the
target robot without a task, 5 two other robots, 6 the target robot with demonstrations.

    seed -> layout, task, look           what is where, what to do, textures and light
    action -> from_action -> (x, y, grip, heading) -> one task-space physics -> to_state -> state
                                                                       \-> parts -> render (pixels) and flow (true motion)

- Coordinates are in [0, 1], x to the right and y down; the camera sees exactly the table, 48 x 48
  pixels.
- Every body is a list of parts, every part a capsule (a disc is a capsule of no length). The
  renderer paints the parts in order; the true optical flow asks the same parts where each pixel
  goes, so pixels and flow cannot disagree.
- An open gripper hovers and touches nothing. Closing it near a disc grasps the disc; a closed,
  empty one pushes discs.
- Everything random comes from generators keyed by the world's own seed, so a world does not depend
  on its neighbours.

Shapes: n worlds, A action dim, P state dim, T steps of an episode, K pixels of a part's window, D =
3 discs.
"""

from dataclasses import dataclass, field

import numpy as np

from worlds.render import (
    CANVAS,
    PAD,
    Snapshot,
    distance as _distance,
    paint as _paint,
    capsules as _parts,
    scenery as _scenery,
    flow,
)
from worlds.robots import (
    BAND,
    COLOURS,
    DIRECTIONS,
    DISCS,
    EMBODIMENTS,
    GRASP,
    GRIP_SPEED,
    MAX_SPEED,
    PUSH,
    RADIUS,
    REACH,
    SIDES,
    SKILLS,
    SPLITS,
    TIP,
    TURN_SPEED,
    instructions,
    sentence,
)

# ---- Layouts ----


def _room(xy: np.ndarray, toward: np.ndarray) -> np.ndarray:
    """Distance of points (n, 2) to the side that lies in direction `toward`, (2,) or (n, 2)."""
    coordinate = (xy * np.abs(toward)).sum(axis=-1)
    return np.where(toward.sum(axis=-1) > 0, 1 - coordinate, coordinate)


def _layout(
    rng: np.random.Generator, skill: str | None, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Discs (D, 2), the first of them named by the task, and the effector (2,): feasible, apart,
    and not yet solved."""
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
            # free ground behind the disc, where the gripper closes, and ahead, where the disc goes
            else:
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
        """Start the worlds of `seeds` (n non-negative ints). The same seed is the same world, bit
        for bit, whatever n is.

        Returns image (n, 48, 48, 3) uint8, state (n, P) float32 in [-1, 1], instruction, a list of
        n strings.
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
        self.tint, self.light = np.ones((n, 3), np.float32), np.zeros((n, CANVAS, CANVAS))
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
            picture, self.tint[i], self.light[i] = _scenery(
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
        """Where an effector may find itself after a mistake (2,), and its opening; a closed one
        touches no disc."""
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
        """One action step of every world: actions (n, A), clipped to [-1, 1] -> observation,
        success (n,) bool, latched."""
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
        """How far to move along `offset` (..., 2), where `active`, for its length to be at least
        `least`."""
        length = np.maximum(np.sqrt((offset**2).sum(axis=-1)), 1e-9)
        return offset * (np.where(active, np.maximum(least - length, 0), 0) / length)[..., None]

    @classmethod
    def _driven(cls, offset, least, active, move):
        """How far discs at `offset` (n, D, 2) from a closed gripper that came by `move` (n, 1, 2)
        go, for it to be at least `least`: with the gripper if it comes from behind, within 60
        degrees (its face is flat and discs do not roll off), else out of its way."""
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

        With noise (table units, 0.01 is plenty) the target drifts smoothly about the one that was
        meant; each call draws anew. Where `slip` (n,) the grip does the opposite. Execute such
        actions and record the clean ones: the data teach how to recover.
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
        """Next position (n, 2) and grip (n,); a function of what can be seen now, so that it can be
        imitated."""
        rows = np.arange(self.n)
        disc, toward = self.discs[rows, self.named], DIRECTIONS[self.side]
        # Place: go to the disc, close, go to the goal, open. A grip that has begun to move
        # tolerates more than one at rest.
        holding, resting = self.held == self.named, np.abs(self.opening - 0.5) > 0.45
        way = np.where(holding[:, None], self.goal - disc, disc - self.effector)
        arrived = np.sqrt((way**2).sum(axis=1)) < np.where(resting, 0.028, 0.055)
        place_step = self._ease(way)
        place_closes = np.where(holding, ~arrived, arrived & (self.opening > 0.25))
        # Push: go behind the disc with the gripper open, close there, then drive on while staying
        # behind the centre.
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
        """Task-agnostic motion: waypoints, more often than not on a disc, with a grip that changes
        at random there."""
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
        """Ground truth for pre-training a vision tower; colour, skill and side are indices into the
        module's tuples.

        discs (n, 4, 2) per colour, present (n, 4) bool, effector (n, 2), opening (n,), named,
        skill, side (n,) int, goal (n, 2). In a task-agnostic world the last four mean nothing.
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
            _paint(canvas, part, self.tint, self.light)
        return np.ascontiguousarray(np.moveaxis(canvas[:, :, PAD:-PAD, PAD:-PAD], 0, -1))

    def flow(self, before: Snapshot, after: Snapshot) -> np.ndarray:
        """True optical flow (n, 48, 48, 2) float32 in pixels from one snapshot to another; see
        `flow`."""
        return flow(self.embodiment.name, before, after)


class TabletopEnv:
    """One world behind the methods of a Gymnasium environment (which it does not import); reward 1
    once the task is done."""

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
        """True optical flow (k, 48, 48, 2) between the frames numbered `before` (k,) and those
        numbered `after` (k,)."""
        return flow(
            self.embodiment, self.snapshots[np.asarray(before)], self.snapshots[np.asarray(after)]
        )


# What each level of the pyramid records; level 1, web data, is what a pre-trained backbone has seen
# already.
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
    """Record the expert. Deterministic in its arguments; the first k of more episodes are the same
    k episodes.

    A level with several bodies takes them in turn unless `embodiment` names one. `noise` disturbs
    what is executed, not what is recorded (see `Tabletop.expert`); on level 6 the grip also slips
    now and then, for a few steps. Each episode ends a few steps after success. Without `pictures`
    its frames have no pixels, for those who need the motion alone and sooner. Undisturbed, the
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
