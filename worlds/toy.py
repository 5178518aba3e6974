"""The toy tabletop as a simulator: what `--sim` does, without a simulator to install.

python evaluate.py record --sim toy --tasks place,push --episodes 50 --out data/toy
"""

import numpy as np

from worlds import World, checked, choice, tabletop

TASKS = {"place": "put the ... disc at the ...", "push": "push the ... disc to the ..."}


class Toy(World):
    """One tabletop whose instructions are of one skill; colour and side come with the seed. `split`
    and `randomized` as in `Tabletop`."""

    fps, max_steps = 15, 100

    def __init__(
        self, task: str, split: str = "train", randomized: bool = False, embodiment: str = "gripper"
    ):
        self.world = tabletop.Tabletop(1, embodiment, randomized, split)
        self.world.tasks = [t for t in self.world.tasks if t[0] == choice(task, tuple(TASKS))]
        self.robot, self.action_dim = f"toy {embodiment}", self.world.embodiment.action_dim

    def reset(self, seed: int) -> dict:
        self.world.reset([seed])
        self.success, self.instruction = False, self.world.instruction[0]
        return self.observe()

    def step(self, action: np.ndarray) -> None:
        self.world.advance(checked(action, self)[None])
        self.success = bool(self.world.success[0])

    def state(self) -> np.ndarray:
        return self.world.state()[0]

    def render(self) -> dict[str, np.ndarray]:
        return {"top": self.world.render()[0]}

    def expert(self) -> np.ndarray:
        return self.world.expert()[0]


make = Toy
record = tabletop.record
