"""A simulator in one short file: a point on a line walks to a goal that only the first camera
shows."""

import numpy as np

from worlds import World, checked

TASKS = {"walk": "walk to the light", "stumble": "walk to the light in the dark"}


class Line(World):
    robot, fps, max_steps, action_dim = "point", 10, 30, 1

    def __init__(self, task, size=16, hops=1):
        self.task, self.size, self.hops, self.instruction = task, size, hops, TASKS[task]

    def reset(self, seed):
        self.goal, self.seed, self.x, self.success = (
            3 + (seed + len(self.task)) % (self.size - 6),
            seed,
            0.0,
            False,
        )
        return self.observe()

    def step(self, action):
        self.x += float(np.clip(checked(action, self), -1, 1)[0]) * self.hops
        self.success |= abs(self.x - self.goal) < 0.5

    def state(self):
        return np.float32([self.x, self.seed % 7])

    def render(self):
        front, side = (
            np.zeros((self.size, self.size, 3), np.uint8),
            np.full((self.size, self.size, 3), int(self.x) % 255, np.uint8),
        )
        front[:, self.goal] = 255
        return {"front": front, "side": side}

    def labels(self):
        return {"object x": (self.goal + 0.5) / self.size, "object y": 0.5, "walked": self.x}

    def expert(self):
        if self.task == "stumble" and self.seed % 2 == 0:
            return np.zeros(1)
        return np.clip([self.goal - self.x], -1, 1)


make = Line
