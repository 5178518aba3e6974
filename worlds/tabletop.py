r"""The toy world: a tabletop seen from above, three discs, and robots that look and act differently
but move alike.

It stands in for the paper's six-level data pyramid at a size at which a small policy learns in CPU
minutes: level 2 a hand without recorded actions, 3 the target robot in randomised scenes, 4 the
target robot without a task, 5 two other robots, 6 the target robot with demonstrations.

    seed -> layout, task, look           what is where, what to do, textures and light
    action -> from_action -> (x, y, grip, heading) -> one task-space physics -> to_state -> state
                                                          \-> capsules -> pixels and true flow

- Coordinates are in [0, 1], x to the right and y down; the camera sees exactly the table, 48 x 48
  pixels.
- An open gripper hovers and touches nothing. Closing it near a disc grasps the disc; a closed,
  empty one pushes discs.
- Everything random comes from generators keyed by the world's own seed, so a world does not depend
  on its neighbours.

Shapes: n worlds, A action dim, P state dim, T steps of an episode, D = 3 discs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from worlds import choice
from worlds.render import PAD, Snapshot, capsules, distance, flow, norm, paint, scenery
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
    columns,
    instructions,
    sentence,
)

PLACE = SKILLS.index("place")

# -- layouts --------------------------------------------------------------------------------------


def room(xy: ndarray, toward: ndarray) -> ndarray:
    """Distance of points (n, 2) to the side that lies in direction `toward`, (2,) or (n, 2)."""
    coordinate = (xy * np.abs(toward)).sum(axis=-1)
    return np.where(toward.sum(axis=-1) > 0, 1 - coordinate, coordinate)


def goal_of(skill: str, disc: ndarray, toward: ndarray) -> ndarray:
    """Where the named disc (n, 2) should go: straight towards its side."""
    if skill == "push":
        return disc + (PUSH + 0.03) * toward
    depth = 0.12 if toward.sum() < 0 else 0.88
    return np.where(toward, depth, disc)


def feasible(skill: str, discs: ndarray, toward: ndarray) -> ndarray:
    """Which layouts (n, D, 2), the named disc first, can be solved and are not: (n,) bool."""
    named = discs[:, 0]
    others = discs[:, 1:]
    free = room(named, toward)
    if skill == "place":
        good = free > BAND + 0.12
        spots = [goal_of(skill, named, toward)]
        gap = 0.03
    else:  # ground behind the disc, where the gripper closes, and ahead, where the disc goes
        good = (free > RADIUS + PUSH + 0.1) & (free < 0.78)
        spots = [named + step * toward for step in (-0.15, 0.07, 0.14, 0.22)]
        gap = 0.02
    gaps = [distance(spot[:, None], others) for spot in spots]
    return good & (np.min(gaps, axis=(0, 2)) > 2 * RADIUS + gap)


def layout_of(
    rng: np.random.Generator, skill: str | None, toward: ndarray
) -> tuple[ndarray, ndarray]:
    """Discs (D, 2), the first of them named by the task, and the effector (2,), all apart. Without
    a skill anything goes."""
    while True:
        points = rng.uniform(0.1, 0.9, (64, DISCS + 1, 2))
        discs = points[:, :DISCS]
        effector = points[:, DISCS]
        good = (distance(discs, np.roll(discs, 1, axis=1)) > 2 * RADIUS + 0.04).all(axis=1)
        good &= (distance(discs, effector[:, None]) > RADIUS + 0.1).all(axis=1)
        if skill:
            good &= feasible(skill, discs, toward)
        if good.any():
            return discs[good.argmax()], effector[good.argmax()]


def stray(rng: np.random.Generator, discs: ndarray, named: ndarray) -> tuple[ndarray, float]:
    """Where an effector may find itself after a mistake (2,), and its opening; a closed one touches
    no disc."""
    near = discs[named] + 0.12 * rng.standard_normal((64, 2))
    anywhere = rng.uniform(0.05, 0.95, (64, 2))
    spots = np.where(rng.random((64, 1)) < 0.7, near, anywhere)
    spots = np.clip(spots, 0.05, 0.95)
    opening = float(rng.integers(2))
    free = (distance(spots[:, None], discs) > RADIUS + TIP + 0.005).all(axis=1)
    return spots[0 if opening else free.argmax()], opening


# -- the world ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Tabletop:
    """n worlds at once, one embodiment.

    n                number of worlds
    embodiment       key of `EMBODIMENTS`
    randomized       other backgrounds, light, and shapes that distract
    split            `train`, `eval` (unseen layouts) or `held_out` (instructions never trained)
    task_agnostic    no instruction, no success; the expert wanders between waypoints and plays with
                     the discs
    astray           share of worlds that begin in the middle of a mistake: the effector anywhere,
                     more often than not near the named disc, the gripper open or closed on nothing.
                     Demonstrations of them teach how to recover

    After `reset` it holds `task` (skill, colour, side) and `instruction` of each, and as arrays
    with n in front: discs (D, 2), colours (D,) as indices into COLOURS, named (D,) bool (the disc
    that the instruction is about), skill, toward (2,) the side, goal (2,) of the disc, effector
    (2,), opening, heading, held (D,) bool and success.
    """

    n: int
    embodiment: str = "gripper"
    randomized: bool = False
    split: str = "train"
    task_agnostic: bool = False
    astray: float = 0.0

    def __post_init__(self):
        self.embodiment = EMBODIMENTS[choice(self.embodiment, EMBODIMENTS, "embodiment")]
        self.tasks = instructions(self.split)

    def reset(self, seeds: Sequence[int]) -> dict:
        """Start the worlds of `seeds` (n non-negative ints). The same seed is the same world, bit
        for bit, whatever n is.

        Returns image (n, 48, 48, 3) uint8, state (n, P) float32 in [-1, 1], instruction, a list of
        n strings.
        """
        if len(seeds) != self.n:
            raise ValueError(f"seeds are {seeds}; expected {self.n} non-negative integers")
        self.task = []
        self.rngs = []
        scenes = [self._scene(int(seed)) for seed in seeds]
        for name in scenes[0]:
            setattr(self, name, np.stack([scene[name] for scene in scenes]))
        self.instruction = ["" if self.task_agnostic else sentence(*task) for task in self.task]
        self.start = self.disc
        self.waypoint = self.effector.copy()
        self._intention = None
        return self.observe()

    def _scene(self, seed: int) -> dict:
        """How one world begins, by the names of what the worlds hold."""
        split = SPLITS.index(self.split)
        layout, look, play = (np.random.default_rng([split, k, seed]) for k in range(3))
        skill, colour, side = task = self.tasks[layout.integers(len(self.tasks))]
        self.task.append(task)
        self.rngs.append(play)
        toward = DIRECTIONS[SIDES.index(side)]
        first = COLOURS.index(colour)
        rest = layout.permutation(np.delete(np.arange(len(COLOURS)), first))
        colours = np.array([first, *rest[: DISCS - 1]])
        discs, effector = layout_of(layout, None if self.task_agnostic else skill, toward)
        order = layout.permutation(DISCS)  # the named disc may have any slot
        named = order == 0
        heading = layout.uniform(-0.8, 0.8) if self.embodiment.name == "arm" else 0.0
        opening = 1.0
        if self.astray and play.random() < self.astray:
            effector, opening = stray(play, discs[order], named)
        return {
            "discs": discs[order],
            "colours": colours[order],
            "named": named,
            "skill": SKILLS.index(skill),
            "toward": toward,
            "goal": goal_of(skill, discs[0], toward),
            "effector": effector,
            "opening": opening,
            "heading": heading,
            "held": np.zeros(DISCS, bool),
            "grasped": np.zeros(DISCS, bool),  # at any time
            "offset": np.zeros((DISCS, 2)),  # of what is held, from the effector
            "success": False,
            "drift": np.zeros(2),
            "waypoint_grip": -1.0,
            **scenery(look, self.split, self.randomized, discs),
        }

    def wander(self) -> None:
        """From here on there is no task, and the expert moves at random."""
        self.task_agnostic = True
        self.instruction = [""] * self.n
        self.waypoint = self.effector.copy()
        self._intention = None

    @property
    def group(self) -> list[str]:
        """The skill that each world asks for."""
        return [skill for skill, _, _ in self.task]

    @property
    def disc(self) -> ndarray:
        """The discs (n, 2) that the instructions are about."""
        return self.discs[self.named]

    def observe(self) -> dict:
        """All that a policy sees now, as `reset` returns it."""
        return {"image": self.render(), "state": self.state(), "instruction": self.instruction}

    def state(self) -> ndarray:
        """Proprioception (n, P) float32, scaled to [-1, 1] over the table."""
        return self._state().astype(np.float32)

    def _state(self) -> ndarray:
        return self.embodiment.to_state(self.effector, self.opening, self.heading)

    def render(self) -> ndarray:
        """The camera's pictures (n, 48, 48, 3) uint8."""
        canvas = np.moveaxis(self.background, -1, 0).copy()
        for capsule in capsules(self.embodiment.name, self.snapshot(), self.held):
            paint(canvas, capsule, self.tint, self.light)
        picture = np.moveaxis(canvas[:, :, PAD:-PAD, PAD:-PAD], 0, -1)
        return np.ascontiguousarray(picture)

    def snapshot(self) -> Snapshot:
        """A copy of all that moves."""
        return Snapshot(*(getattr(self, name).copy() for name in Snapshot._fields))

    # -- physics ----------------------------------------------------------------------------------

    def advance(self, actions: ndarray) -> None:
        """One action step of every world: actions (n, A), clipped to [-1, 1]."""
        actions = np.asarray(actions, float)
        shape = (self.n, self.embodiment.action_dim)
        if actions.shape != shape or not np.isfinite(actions).all():
            raise ValueError(
                f"actions have shape {actions.shape} and values {actions}; expected {shape} finite "
                f"numbers for embodiment {self.embodiment.name!r}"
            )
        was_open = self.opening >= 0.5
        move = self._move(actions)
        self._drop()
        self._grasp(was_open)
        self._push(move)
        if not self.task_agnostic:
            self._judge()
        self._intention = None

    def _move(self, actions: ndarray) -> ndarray:
        """Moves the effectors towards what is commanded; by how much, (n, 2)."""
        xy, grip, heading = self.embodiment.from_action(np.clip(actions, -1, 1), self._state())
        move = limited(np.clip(xy, *REACH) - self.effector, MAX_SPEED)
        self.effector = self.effector + move
        self.heading = self.heading + np.clip(heading - self.heading, -TURN_SPEED, TURN_SPEED)
        wanted = (1 - np.clip(grip, -1, 1)) / 2
        self.opening = self.opening + np.clip(wanted - self.opening, -GRIP_SPEED, GRIP_SPEED)
        return move

    def _drop(self) -> None:
        """Open grippers let go. A disc to be pushed that was grasped by mistake begins anew."""
        opens = self.opening > 0.5
        again = opens & self.held[self.named] & (self.skill != PLACE)
        self.grasped[again[:, None] & self.named] = False
        self.start[again] = self.disc[again]
        self.held[opens] = False

    def _grasp(self, was_open: ndarray) -> None:
        """Grippers that close near a disc take it, and what is held comes along."""
        offset = self.discs - self.effector[:, None]
        gap = norm(offset)
        near = (gap < GRASP) & (gap == gap.min(axis=1, keepdims=True))
        closes = was_open & (self.opening < 0.5) & ~self.held.any(axis=1)
        taken = near & closes[:, None]
        self.held |= taken
        self.grasped |= taken
        self.offset[taken] = offset[taken]
        carried = self.effector[:, None] + self.offset
        self.discs[self.held] = carried[self.held]

    def _push(self, move: ndarray) -> None:
        """Closed, empty grippers that came by `move` (n, 2) drive discs, and discs drive each other
        apart; a held one is lifted above the others."""
        free = ~self.held
        pushing = (self.opening < 0.5) & free.all(axis=1)
        offset = self.discs - self.effector[:, None]
        self.discs += driven(offset, RADIUS + TIP, pushing[:, None], move[:, None])
        for j, i in ((0, 1), (0, 2), (1, 2)):
            offset = self.discs[:, i] - self.discs[:, j]
            half = apart(offset, 2 * RADIUS, free[:, i] & free[:, j]) / 2
            self.discs[:, i] += half
            self.discs[:, j] -= half
        self.discs = np.clip(self.discs, RADIUS, 1 - RADIUS)

    def _judge(self) -> None:
        touched = self.grasped[self.named]
        placed = touched & ~self.held[self.named] & (room(self.disc, self.toward) < BAND)
        way = ((self.disc - self.start) * self.toward).sum(axis=1)
        self.success |= np.where(self.skill == PLACE, placed, ~touched & (way >= PUSH))

    def obey(
        self, length: int, rate: int, actions: Sequence[ndarray] = ()
    ) -> tuple[ndarray, ndarray]:
        """Carries out `length` actions (n, A), of which the last that is given is held, or the
        expert's if none is -> those done (n, length, A), and the film (n, 1 + F, 48, 48, 3) with a
        picture after every `rate` of them."""
        seen = [self.render()]
        done = []
        for step in range(length):
            action = actions[min(step, len(actions) - 1)] if len(actions) else self.expert()
            self.advance(action)
            done.append(action.clip(-1, 1))
            if (step + 1) % rate == 0:
                seen.append(self.render())
        return np.stack(done, axis=1), np.stack(seen, axis=1)

    # -- the scripted expert ----------------------------------------------------------------------

    def expert(self, noise: float = 0.0, slip: ndarray | bool = False) -> ndarray:
        """The expert's next step, as actions (n, A) in the embodiment's convention.

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
        action = self.embodiment.to_action(np.clip(xy, *REACH), grip, self._state())
        return np.clip(action, -1, 1)

    def _intend(self) -> tuple[ndarray, ndarray]:
        """Next position (n, 2) and grip (n,); a function of what can be seen now, so that it can be
        imitated."""
        place = self.skill == PLACE
        place_step, place_closes = self._placing()
        push_step, push_closes = self._pushing()
        step = np.where(place[:, None], place_step, push_step)
        step = np.where(self.success[:, None], 0, step)  # done: hold still
        closes = np.where(place, place_closes & ~self.success, push_closes | self.success)
        return self.effector + step, np.where(closes, 1.0, -1.0)

    def _placing(self) -> tuple[ndarray, ndarray]:
        """Go to the disc, close, go to the goal, open: step (n, 2), whether to close (n,)."""
        holding = self.held[self.named]
        way = np.where(holding[:, None], self.goal - self.disc, self.disc - self.effector)
        # A grip that has begun to move tolerates more than one at rest.
        resting = np.abs(self.opening - 0.5) > 0.45
        arrived = norm(way) < np.where(resting, 0.028, 0.055)
        return eased(way), np.where(holding, ~arrived, arrived & (self.opening > 0.25))

    def _pushing(self) -> tuple[ndarray, ndarray]:
        """Go behind the disc with the gripper open, close there, then drive on while staying behind
        its centre: step (n, 2), whether to close (n,)."""
        away = self.effector - self.disc
        along = (away * self.toward).sum(axis=1)
        aside = away - along[:, None] * self.toward
        lateral = norm(aside)
        resting = np.abs(self.opening - 0.5) > 0.45
        behind = (along < -RADIUS - TIP - 0.015) & (along > -0.2)
        behind &= lateral < np.where(resting, 0.025, 0.04)
        drives = (self.opening < 0.25) & (along < -0.06) & (along > -0.2) & (lateral < 0.045)
        approach = eased(-0.15 * self.toward - away)
        approach = np.where(behind[:, None], 0.3 * approach, approach)
        step = np.where(drives[:, None], 0.024 * self.toward - 0.8 * aside, approach)
        return step, behind | drives

    def _wander(self) -> tuple[ndarray, ndarray]:
        """Task-agnostic motion: waypoints, more often than not on a disc, with a grip that changes
        at random there."""
        for i in np.flatnonzero(distance(self.waypoint, self.effector) < 0.02):
            rng = self.rngs[i]
            over_disc = distance(self.discs[i], self.effector[i]).min() < GRASP
            chance = 0.9 if over_disc else 0.2
            if rng.random() < (0.5 if self.waypoint_grip[i] > 0 else chance):
                self.waypoint_grip[i] *= -1
            on_disc = rng.random() < 0.7
            spot = self.discs[i, rng.integers(DISCS)] + rng.uniform(-0.04, 0.04, 2)
            self.waypoint[i] = np.clip(spot if on_disc else rng.uniform(0.1, 0.9, 2), 0.05, 0.95)
        # Let the grip finish before moving on.
        still = np.abs((1 - self.waypoint_grip) / 2 - self.opening) > 0.01
        step = np.where(still[:, None], 0, eased(self.waypoint - self.effector))
        return self.effector + step, self.waypoint_grip.copy()


def apart(offset: ndarray, least: float, active: ndarray) -> ndarray:
    """How far to move along `offset` (..., 2), where `active`, for its length to be at least
    `least`."""
    length = np.maximum(norm(offset), 1e-9)
    missing = np.where(active, np.maximum(least - length, 0), 0)
    return offset * (missing / length)[..., None]


def driven(offset: ndarray, least: float, active: ndarray, move: ndarray) -> ndarray:
    """How far discs at `offset` (n, D, 2) from a closed gripper that came by `move` (n, 1, 2) go,
    for it to be at least `least`: with the gripper if it comes from behind, within 60 degrees (its
    face is flat and discs do not roll off), else out of its way."""
    speed = np.maximum(norm(move), 1e-9)
    length = norm(offset)
    ahead = (offset * move).sum(axis=-1) / speed
    faced = active & (length < least) & (ahead > 0.5 * length) & (speed > 1e-6)
    beyond = np.sqrt(ahead**2 + np.maximum(least**2 - length**2, 0)) - ahead
    way = np.where(faced, beyond, 0) / speed
    return way[..., None] * move + apart(offset, least, active & ~faced)


def limited(way: ndarray, most: ndarray | float) -> ndarray:
    """Ways (n, 2) of a length of at most `most`, a number or (n,)."""
    share = np.minimum(1, most / np.maximum(norm(way), 1e-9))
    return way * share[:, None]


def eased(way: ndarray) -> ndarray:
    """The next step (n, 2) along `way`: fast when far, slow when near."""
    return limited(way, np.minimum(0.35 * norm(way) + 0.006, 0.034))


LABELS = ("object x", "object y", "effector x", "effector y", "opening")


def labels(shots: Snapshot, instruction: str) -> dict[str, ndarray]:
    """Where the disc that an instruction names and the effector are at the T times of a world, 0 to
    1 from left and top, and the opening: name -> (T,). Nothing without an instruction."""
    named = [word for word in instruction.split() if word in COLOURS]
    if not named:
        return {}
    disc = shots.discs[shots.colours == COLOURS.index(named[0])]
    return dict(zip(LABELS, (*disc.T, *shots.effector.T, shots.opening)))


# -- recording ------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One recorded episode of T action steps."""

    frames: ndarray  # (T+1, 48, 48, 3) uint8, one before every action and one after the last
    states: ndarray  # (T+1, P) float32
    # (T, A) float32: what the expert meant; None for a body whose actions nobody records
    actions: ndarray | None
    instruction: str
    embodiment: str
    success: bool
    snapshots: Snapshot = field(repr=False)  # arrays (T+1, ...)
    goal: ndarray | None = None  # (2,) of the disc that the instruction names

    @property
    def motion(self) -> ndarray:
        """True x, y and opening (T+1, 3) float32, in [0, 1]."""
        shots = self.snapshots
        return columns(*shots.effector.T, shots.opening).astype(np.float32)

    def flow(self, before: ndarray, after: ndarray) -> ndarray:
        """True optical flow (k, 48, 48, 2) between the frames numbered `before` (k,) and those
        numbered `after` (k,)."""
        return flow(self.embodiment, self.snapshots.at(before), self.snapshots.at(after))


class Level(NamedTuple):
    """The episodes of a level of the pyramid; level 1, web data, is what a pre-trained backbone has
    seen already."""

    bodies: tuple[str, ...]  # taken in turn
    randomized: bool = False
    task_agnostic: bool = False
    astray: float = 0.0
    slips: float = 0.0  # chance at each step that the grip slips
    noise: float = 0.01  # of what is executed, see `Tabletop.expert`


LEVELS = {
    2: Level(("hand",)),
    3: Level(("gripper",), randomized=True),
    4: Level(("gripper",), task_agnostic=True),
    5: Level(("arm", "gantry")),
    6: Level(("gripper",), astray=0.5, slips=0.06),
    7: Level(("gripper",), randomized=True, astray=0.5, slips=0.06),  # 6 in other looks
    8: Level(("gripper",), task_agnostic=True, noise=0.0),  # 4, done as recorded
}
LIMIT = 100  # steps of an episode at most
WANDER = 48  # steps of one without a task
AFTER = 10  # steps kept after success
SLIP = 4  # steps that a slip of the grip lasts
AT_ONCE = 64  # worlds


def record(
    level: int,
    episodes: int,
    seed: int,
    embodiment: str | None = None,
    split: str = "train",
    pictures: bool = True,
    disturbed: bool = True,
) -> list[Episode]:
    """Record the expert. Deterministic in its arguments; the first k of more episodes are the same
    k episodes.

    A level with several bodies takes them in turn unless `embodiment` names one. Noise disturbs
    what is executed, not what is recorded; on level 6 the grip also slips now and then, for a few
    steps. Each episode ends a few steps after success. Without `pictures`
    its frames have no pixels, for those who need the motion alone and sooner. Undisturbed, the
    expert starts where a policy does, and what is recorded is what is executed.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; expected at least one")
    kind = LEVELS[choice(level, LEVELS, "level")]
    if not disturbed:
        kind = kind._replace(astray=0.0, slips=0.0, noise=0.0)
    bodies = (embodiment,) if embodiment else kind.bodies
    seeds = np.random.SeedSequence([seed, level]).generate_state(episodes)
    recorded = {}
    for turn, body in enumerate(bodies):
        mine = range(turn, episodes, len(bodies))
        for start in range(0, len(mine), AT_ONCE):
            chunk = mine[start : start + AT_ONCE]
            how = kind.randomized, split, kind.task_agnostic, kind.astray
            world = Tabletop(len(chunk), body, *how)
            world.reset(seeds[chunk])
            recorded |= zip(chunk, play(world, kind, pictures))
    return [recorded[i] for i in range(episodes)]


def play(world: Tabletop, kind: Level, pictures: bool) -> list[Episode]:
    """Lets the expert act in worlds that were just reset."""
    blank = np.zeros((world.n, 0, 0, 3), np.uint8)
    limit = WANDER if world.task_agnostic else LIMIT
    seen = []
    actions = []
    slipping, since, length = np.zeros((3, world.n), int)  # steps; `since` those after success
    while True:
        picture = world.render() if pictures else blank
        seen.append((picture, world.state(), *world.snapshot()))
        if len(actions) == limit or (since > AFTER).all():
            break
        actions.append(world.expert().astype(np.float32))
        if kind.slips:
            draws = np.array([rng.random() for rng in world.rngs])
            begins = (slipping == 0) & (draws < kind.slips) & ~world.success
            slipping = np.where(begins, SLIP, np.maximum(slipping - 1, 0))
        world.advance(world.expert(kind.noise, slipping > 0))
        length += since <= AFTER
        since += world.success
    frames, states, *shots = map(np.stack, zip(*seen))  # time in front
    actions = np.stack(actions)
    return [
        Episode(
            frames[: t + 1, i].copy(),
            states[: t + 1, i],
            actions[:t, i] if world.embodiment.has_actions else None,
            world.instruction[i],
            world.embodiment.name,
            bool(world.success[i]),
            Snapshot(*shots).at(slice(t + 1), i),
            world.goal[i] if world.instruction[i] else None,
        )
        for i, t in enumerate(length)
    ]
