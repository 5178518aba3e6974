"""The Fetch robot at a table (pip install gymnasium-robotics mujoco==3.3.0), as a user of motus
writes down a world of their own: docs/own_robot.md.

The task is FetchPickAndPlace with its goals on the table, at ten actions a second:

    action     4 in [-1, 1]: the gripper moves by 5 cm per unit; the fingers open at +1, close at -1
    state      4: the gripper's place in metres, half the opening of the fingers in metres
    picture    of one fixed camera opposite the robot, 192 x 192
    success    the block is within 5 cm of the red point, as the package says
"""

import numpy as np
from numpy import ndarray

from worlds import World, checked, choice
from worlds.eye import Eye

TASKS = {"pick-place": "put the black block on the red point"}
LOOK = dict(lookat=(1.33, 0.75, 0.42), distance=0.85, azimuth=180, elevation=-42)


class Fetch(World):
    robot, fps, max_steps, action_dim = "fetch", 10, 50, 4

    def __init__(self, task: str, size: int = 192):
        import mujoco
        from gymnasium_robotics.envs.fetch.pick_and_place import MujocoFetchPickAndPlaceEnv

        self.instruction = TASKS[choice(task, tuple(TASKS))]
        self.env = MujocoFetchPickAndPlaceEnv()
        self.env.target_in_the_air = False  # one camera cannot tell how high a point is
        self.env.n_substeps = 50  # of 2 ms
        aid = self.env.model.body("robot0:mocap").id  # cross-hairs that would show the hand's aim
        self.env.model.geom_rgba[self.env.model.geom_bodyid == aid, 3] = 0
        self.eye = Eye(self.env.model, size, size)
        self.camera = mujoco.MjvCamera()
        for name, value in LOOK.items():
            setattr(self.camera, name, value)

    def reset(self, seed: int) -> dict:
        self.env.reset(seed=seed)
        while np.linalg.norm(self.block - self.env.goal) < 0.1:  # it would be solved as it begins
            self.env.reset()
        self.success = False
        return self.observe()

    @property
    def hand(self) -> ndarray:
        return self.env.data.site("robot0:grip").xpos.copy()

    @property
    def block(self) -> ndarray:
        return self.env.data.site("object0").xpos.copy()

    def step(self, action: ndarray) -> None:
        self.env.step(np.clip(checked(action, self), -1, 1))
        self.success |= bool(self.env._is_success(self.block, self.env.goal))

    def state(self) -> ndarray:
        finger = self.env.data.joint("robot0:l_gripper_finger_joint").qpos
        return np.concatenate([self.hand, finger]).astype(np.float32)

    def render(self) -> dict[str, ndarray]:
        self.env._render_callback()  # puts the red point at the goal
        return {"front": self.eye.picture(self.env.data, self.camera)}

    def expert(self) -> ndarray:
        """Above the block, down, close, and over the table to the point. Nothing is remembered but
        what can be seen: whether the fingers are closed on the block."""
        away = self.block - self.hand
        beside = np.linalg.norm(away[:2])
        finger = self.state()[3]
        at_block = beside < 0.015 and abs(away[2]) < 0.015
        if at_block and finger < 0.027:  # held
            to_goal = self.env.goal - self.block
            lift = 0.04 if np.linalg.norm(to_goal[:2]) > 0.03 else 0.02
            move, grip = to_goal + [0, 0, lift], -1
        elif at_block:
            move, grip = away, -1
        else:
            above = np.clip(2 * (beside - 0.015), 0, 0.08)  # a funnel
            move, grip = away + [0, 0, above], 1
        return np.append(np.clip(move / 0.05 * 0.6, -0.7, 0.7), grip)


make = Fetch
