"""Episodes that a world renders instead of decoding them: a source of recordings like a folder.

A line of a card names the world as `world:NAME`, with the level of the data pyramid and the robot;
`world:NAME/K` stands at that level too, and has what the world records as its level K.
The world is asked for all episodes of a split at once, when the first of them is needed. Episodes
that are trained on come first: there what is executed is disturbed, and what the expert meant is
recorded. Held-out ones have layouts that training never sees and are not disturbed: a world model
is asked what an action does, so the one recorded must be the one executed.

Of an episode's T + 1 frames the last, after which nothing is done, is left out of its rows.

Shapes: T rows of an episode, H W pixels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy import ndarray

from formats.recordings import Flows, Numbers, Recordings, Views
from worlds import motions, simulator

PREFIX = "world:"  # of a source's path
CAMERA = "top"  # as the world names it


class Lengths:
    """Rows of each episode; only the split that is asked for is rendered."""

    def __init__(self, reader: "Rendered"):
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.count + self.reader.held_out

    def __getitem__(self, index: int | slice) -> int | ndarray:
        if isinstance(index, slice):
            return np.array([self[e] for e in range(len(self))[index]], int)
        return len(self.reader.episode(index).motion) - 1


class Rendered(Recordings):
    """`count` episodes to train on and `held_out` more of one level and robot ("": the level's
    own). ValueError for a level or robot that the world does not record."""

    def __init__(
        self,
        path: str,
        level: int,
        robot: str,
        count: int,
        held_out: int,
        seed: int = 0,
        mapping: Mapping | None = None,
    ):
        super().__init__(path, mapping)
        self.world, _, kind = path.removeprefix(PREFIX).partition("/")
        self.level = int(kind or level)
        self.robot = robot or None
        self.count = count
        self.held_out = held_out
        self.seed = seed
        self.fps = float(simulator(self.world).make.fps)
        self.cameras = (CAMERA,)
        self.lengths = Lengths(self)
        (first,) = self._record(1, pictures=False)
        self.robot = first.embodiment
        acts = first.actions is not None
        self.widths = (first.states.shape[1], first.actions.shape[1]) if acts else (0, 0)
        self.titles = {"state": "state", "action": "actions"} if acts else {}

    def _record(self, count: int, split: str = "train", **more) -> list:
        record = simulator(self.world).record
        return record(self.level, count, self.seed, self.robot, split, **more)

    @cached_property
    def trained(self) -> list:
        return self._record(self.count)

    @cached_property
    def untrained(self) -> list:
        return self._record(self.held_out, "eval", disturbed=False)

    def episode(self, number: int):
        """As the world recorded it (`worlds.tabletop.Episode`)."""
        if number < self.count:
            return self.trained[number]
        return self.untrained[number - self.count]

    def numbers(self, episode: int) -> Numbers:
        if not self.titles:
            return None, None
        return self.episode(episode).states[:-1], self.episode(episode).actions

    def recorded_texts(self, episode: int, row: int | None = None) -> list[str]:
        return [self.episode(episode).instruction or "no task"]

    def wordings(self) -> set[str]:
        return {episode.instruction for episode in self.trained if episode.instruction}

    def views(self, episode: int, rows: Sequence[int]) -> Views:
        return {CAMERA: iter(self.episode(episode).frames[np.asarray(rows)])}

    def goal(self, episode: int) -> ndarray | None:
        return self.episode(episode).goal

    def labels(self, episode: int) -> dict[str, ndarray]:
        found = motions.places(self.episode(episode))
        return {name: values[:-1] for name, values in found.items()}

    def flows(self, episode: int, interval: int) -> Flows:
        yield motions.flows(self.episode(episode), interval)

    def motions(self, episode: int, interval: int) -> ndarray:
        return motions.labels(self.episode(episode), interval)

    def left_behind(self) -> list[str]:
        labels = "labels, " if self.labels(0) else ""
        return [f"{labels}flow and motions that the simulator knows"]

    def describe(self) -> str:
        return (
            f"{self.name}: level {self.level} with {self.robot}, {self.count} episodes and "
            f"{self.held_out} of other layouts at {self.fps:g} fps, seed {self.seed}\n"
            f"  state ({self.widths[0]}), actions ({self.widths[1]}), camera {CAMERA}"
        )
