"""The toy tabletop as a simulator: what `--sim` does, without a simulator to install.

python -m scripts.record --sim toy --tasks place,push --episodes 50 --out data/toy
"""

from numpy import ndarray

from worlds import World, checked, choice
from worlds.tabletop import Tabletop, labels, record

__all__ = ["TASKS", "make", "many", "record"]

TASKS = {"place": "put the ... disc at the ...", "push": "push the ... disc to the ..."}


class Tabletops(Tabletop):
    """Up to n tabletops at once, behind the methods of a `Fleet`; each seed draws one of the tasks.
    `split`, `randomized` and `embodiment` as in `Tabletop`; nobody has trained on split `eval`."""

    fps = 15
    max_steps = 100

    def __init__(self, tasks: list[str], n: int, split: str = "eval", **look):
        super().__init__(n, split=split, **look)
        self.size = n
        self.robot = self.embodiment.name
        self.action_dim = self.embodiment.action_dim
        self.tasks = [task for task in self.tasks if task[0] in tasks]

    def reset(self, seeds: list[int]) -> dict:
        self.n = len(seeds)
        return super().reset(seeds)

    def expert(self) -> ndarray:
        """The expert's actions (k, A) in the k worlds that are not solved."""
        return super().expert()[~self.success]


class Toy(World):
    """One tabletop whose instructions are of one skill; colour and side come with the seed."""

    fps = Tabletops.fps
    max_steps = Tabletops.max_steps

    def __init__(
        self, task: str, split: str = "train", randomized: bool = False, embodiment: str = "gripper"
    ):
        look = dict(randomized=randomized, embodiment=embodiment)
        self.world = Tabletops([choice(task, tuple(TASKS))], 1, split, **look)
        self.robot = self.world.robot
        self.action_dim = self.world.action_dim

    def reset(self, seed: int) -> dict:
        self.world.reset([seed])
        self.success = False
        self.instruction = self.world.instruction[0]
        return self.observe()

    def step(self, action: ndarray) -> None:
        self.world.advance(checked(action, self)[None])
        self.success = bool(self.world.success[0])

    def state(self) -> ndarray:
        return self.world.state()[0]

    def render(self) -> dict[str, ndarray]:
        return {"top": self.world.render()[0]}

    def labels(self) -> dict[str, float]:
        found = labels(self.world.snapshot(), self.instruction)
        return {name: float(value[0]) for name, value in found.items()}

    def expert(self) -> ndarray:
        return Tabletop.expert(self.world)[0]


make = Toy
many = Tabletops
