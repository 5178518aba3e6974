"""ALOHA TransferCube: two arms hand over a cube, in MuJoCo (pip install 'motus[sim]' and `pip
install --no-deps gym-aloha`).

The scene is gym-aloha's, of which only the model files are read; MuJoCo steps it here, 0.02 s per
step as there.

    action     14: absolute joint positions of the left arm (6, radians), its gripper (0 closed, 1
               open), and the same of the right arm
    state      14: where they are, in the same order
    pictures   head (above the table), left_wrist and right_wrist, 4 : 3, in the order of the
               official T-layout

- The 14 numbers and three cameras are those of the official Motus robot, so this is the small
  stand-in for it.
- An action is the end of a straight line in joint space that takes `hold` steps of the 50 Hz:
  hold=5 makes 10 Hz, 2.5 the 20 Hz of the MetaWorld robot, hold=1 is ALOHA's own.
- The expert lays waypoints for both hands around the cube and a meeting point, and finds the joint
  positions of each hand by damped least squares on the arm's Jacobian. It is planned at `reset` and
  played without looking: absolute positions bring a disturbed arm back.
- Success is gym-aloha's highest reward: the left hand's left finger touches the cube and the table
  does not.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy import ndarray

from worlds import World, as_labels, checked, choice, names
from worlds.eye import Eye

TASKS = {
    "transfer-cube": "pick up the red cube with the right arm and hand it over to the left arm"
}
CAMERAS = {"head": "top", "left_wrist": "left_wrist", "right_wrist": "right_wrist"}
MISSING = (
    "gym-aloha is not installed: pip install 'motus[sim]', pip install --no-deps gym-aloha, "
    "apt-get install libosmesa6"
)
# Metres of a finger's joint.
CLOSED = 0.01844
OPEN = 0.05800
START = [0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239]  # of each arm and its fingers
MEET = np.array([0, 0.5, 0.25])  # where the cube changes hands, metres
ARMS = {"left": 0, "right": 8}  # first of the 6 joints and 2 fingers in qpos and ctrl
TURNS = {"left": (90, 0, 0), "right": (0, -60, 0)}  # of a hand from its start, degrees about x y z


def tip(data: object, hand: int) -> ndarray:
    """The point between the fingertips of a hand."""
    return data.xpos[hand] + 0.14 * data.xmat[hand].reshape(3, 3)[:, 0]


class TransferCube(World):
    """`size` is the width of the pictures in pixels, `hold` the simulator's steps per action."""

    robot = "aloha"
    action_dim = 14
    instruction = TASKS["transfer-cube"]

    def __init__(
        self,
        task: str = "transfer-cube",
        size: int = 128,
        cameras: str = "head,left_wrist,right_wrist",
        hold: float = 5,
    ):
        choice(task, TASKS)
        package = find_spec("gym_aloha")
        if not package:
            raise ValueError(MISSING)
        import mujoco
        from scipy.spatial.transform import Rotation

        if not 16 <= size <= 640 or size % 4 or hold not in (1, 2, 2.5, 5, 10):
            raise ValueError(
                f"size is {size}, hold is {hold}; expected a multiple of 4 from 16 to 640, and 1, "
                "2, 2.5, 5 or 10"
            )
        self.mujoco = mujoco
        self.Rotation = Rotation
        self.hold = hold
        self.fps = round(50 / hold)
        self.max_steps = round(400 / hold)
        self.cameras = names(cameras, CAMERAS, "camera")
        folder = Path(package.submodule_search_locations[0])
        scene = folder / "assets" / "bimanual_viperx_transfer_cube.xml"
        self.model = mujoco.MjModel.from_xml_path(str(scene))
        self.data = mujoco.MjData(self.model)
        # Of one action: every 0.02 s, or 0.01.
        self.commands = int(hold if hold % 1 == 0 else 2 * hold)
        self.substeps = round(0.02 * hold / self.commands / self.model.opt.timestep)
        self.cube = self.model.geom("red_box").id
        self.table = self.model.geom("table").id
        self.finger = self.model.geom("vx300s_left/10_left_gripper_finger").id
        self.hands = {arm: self.model.body(f"vx300s_{arm}/gripper_link").id for arm in ARMS}
        self.eye = Eye(self.model, size * 3 // 4, size) if self.cameras else None

    def reset(self, seed: int) -> dict:
        self.mujoco.mj_resetData(self.model, self.data)
        # Of the cube, as gym-aloha draws it.
        place = np.random.default_rng(seed).uniform([0.0, 0.4], [0.2, 0.6])
        self.data.qpos[:23] = [*START, *START, *place, 0.05, 1, 0, 0, 0]
        self.data.ctrl[:] = self.data.qpos[:16]
        self.mujoco.mj_forward(self.model, self.data)
        self.last = self.state().astype(float)
        self.plan = None
        self.done = 0
        self.success = False
        return self.observe()

    def step(self, action: ndarray) -> None:
        action = checked(action, self)
        targets = np.linspace(self.last, action, self.commands + 1)[1:]
        for arms in targets.reshape(-1, 2, 7):
            opening = np.clip(arms[:, 6:], 0, 1)
            finger = CLOSED + (OPEN - CLOSED) * opening
            self.data.ctrl[:] = np.hstack([arms[:, :6], finger, -finger]).ravel()
            self.mujoco.mj_step(self.model, self.data, self.substeps)
            pairs = self.data.contact.geom
            touched = pairs[(pairs == self.cube).any(axis=1)]
            self.success |= self.finger in touched and self.table not in touched
        self.last = action
        self.done += 1

    def state(self) -> ndarray:
        arms = self.data.qpos[:16].reshape(2, 8)
        opening = (arms[:, 6:7] - CLOSED) / (OPEN - CLOSED)
        return np.float32(np.hstack([arms[:, :6], opening]).ravel())

    def render(self) -> dict[str, ndarray]:
        return {camera: self.eye.picture(self.data, CAMERAS[camera]) for camera in self.cameras}

    def labels(self) -> dict[str, float]:
        cube = self.data.geom_xpos[self.cube]
        hand = tip(self.data, self.hands["right"])
        points = {"object": cube, "goal": MEET, "hand": hand}
        seen = ()
        if self.cameras:
            seen = self.eye.places(self.data, CAMERAS[self.cameras[0]], points.values())
        return as_labels(points, self.state()[13], seen)

    def expert(self) -> ndarray:
        if self.plan is None:
            self.plan = self._plan()
        return self.plan[min(self.done, len(self.plan) - 1)]

    # The expert.

    def _plan(self) -> ndarray:
        """Joint positions (T, 14) at the ends of the actions, from waypoints: step of 50 Hz,
        opening of the gripper, place of the point between the fingertips. Until the first waypoint
        a hand turns to the rotation that it then keeps."""
        ghost = self.mujoco.MjData(self.model)
        ghost.qpos[:] = self.data.qpos
        self.mujoco.mj_kinematics(self.model, ghost)
        cube = [*self.data.qpos[16:18], 0.02]
        over = [*self.data.qpos[16:18], 0.1]
        near = MEET - [0.1, 0, 0.02]
        beside = MEET + [0.1, 0, 0]
        ways = {
            "left": ([100, 220, 260, 310, 360], [1, 1, 1, 0, 0], [near, near, MEET, MEET, near]),
            "right": (
                [90, 130, 170, 220, 310, 340, 380],
                [1, 1, 0, 0, 0, 1, 1],
                [over, cube, cube, MEET, MEET, MEET, beside],
            ),
        }
        now = self.hold * np.arange(1, self.max_steps + 1)
        plan = np.empty((self.max_steps, 2, 7))
        for i, (arm, hand) in enumerate(self.hands.items()):
            steps, *goals = np.column_stack(ways[arm]).T
            starts = [0, *tip(ghost, hand)]
            along = [np.interp(now, [0, *steps], [a, *b]) for a, b in zip(starts, goals)]
            angles = np.outer(np.clip(now / steps[0], 0, 1), TURNS[arm])
            turns = self.Rotation.from_rotvec(angles, degrees=True) * self._turned(ghost, hand)
            plan[:, i, 6] = along[0]
            for k, place in enumerate(zip(*along[1:])):
                plan[k, i, :6] = self._solve(ghost, arm, place, turns[k])
        return plan.reshape(-1, 14)

    def _turned(self, data: object, hand: int) -> object:
        return self.Rotation.from_matrix(data.xmat[hand].reshape(3, 3))

    def _solve(
        self,
        ghost: object,
        arm: str,
        place: ndarray,
        turn: object,
    ) -> ndarray:
        """Moves the six joints of an arm until the fingertips are at a place and the hand has the
        rotation `turn`, and returns them: damped least squares."""
        hand = self.hands[arm]
        joints = slice(ARMS[arm], ARMS[arm] + 6)
        low, high = self.model.actuator_ctrlrange[joints].T
        jacobian = np.zeros((6, self.model.nv))
        for _ in range(20):
            self.mujoco.mj_kinematics(self.model, ghost)
            self.mujoco.mj_comPos(self.model, ghost)
            at = tip(ghost, hand)
            spin = (turn * self._turned(ghost, hand).inv()).as_rotvec()
            miss = np.concatenate([place - at, spin])
            if np.abs(miss).max() < 1e-4:
                break
            self.mujoco.mj_jac(self.model, ghost, jacobian[:3], jacobian[3:], at, hand)
            own = jacobian[:, joints]
            step = own.T @ np.linalg.solve(own @ own.T + 1e-4 * np.eye(6), miss)
            ghost.qpos[joints] = np.clip(ghost.qpos[joints] + step, low, high)
        return ghost.qpos[joints].copy()


make = TransferCube
