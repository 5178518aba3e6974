"""MetaWorld: a Sawyer arm at a table, fifty tasks, in MuJoCo with software rendering (pip install
'motus[sim]'; apt: libosmesa6).

    action     4 in [-1, 1]: the hand's target moves by 1 cm per unit and step of the simulator;
               the gripper closes at +1, opens at -1
    state      4: the hand's place in metres, the opening of the gripper in 0..1. All else that the
               simulator tells is privileged.
    pictures   of corner4, which shows the table, and gripperPOV, which the hand carries

Where this departs from MetaWorld as it comes:
- An action is held for `hold` steps of the simulator's 80 Hz. With the default 4 the experts still
  solve nearly all and an episode has 10 to 25 actions, which is what a small model can learn from;
  hold=1 is the benchmark's own rate.
- Pictures are cheap ones (eye.py), without shadows, reflections and multisampling.
- The corner cameras hang upside down: their pictures are turned by 180 degrees.
- Markers of goals and fingertips are drawn only in tasks whose goal is a point in space (MARKED).
  Elsewhere they tell the task: with them a picture shows whether the faucet is to be opened or
  closed.
- Opening and closing the faucet start from one distribution, the narrower of the two, so that for
  one seed both begin with the same pixels and only the instruction tells them apart.
- `reset(seed)` is exact. MetaWorld ignores the seed of its own `reset` and draws from fifty
  layouts; here every seed is a layout.
- After a reset the simulator moves its objects and forgets to compute where that puts them: until
  the first step, pictures and numbers show the objects of a former draw. Here they are computed
  first.
"""

import warnings

import numpy as np
from numpy import ndarray

from worlds import World, as_labels, checked, choice, names
from worlds.eye import Eye

INSTRUCTIONS = """
reach                 reach the red point
push                  push the puck to the green point
pick-place            pick up the puck and hold it at the point
drawer-open           open the drawer
drawer-close          close the drawer
window-open           open the window
window-close          close the window
faucet-open           open the faucet
faucet-close          close the faucet
door-open             open the door
door-close            close the door
door-lock             lock the door
door-unlock           unlock the door
button-press          press the button on the wall
button-press-topdown  press the button from above
coffee-button         press the button of the coffee machine
coffee-push           push the mug under the coffee machine
handle-press          press the handle down
handle-press-side     press the sideways handle down
handle-pull           pull the handle up
plate-slide           slide the plate into the goal
plate-slide-side      slide the plate sideways into the goal
plate-slide-back      slide the plate back out
dial-turn             turn the dial
hammer                hammer the nail in
sweep                 sweep the block off the table
soccer                push the ball into the goal
lever-pull            pull the lever up
"""
TASKS = dict(line.split(maxsplit=1) for line in INSTRUCTIONS.strip().splitlines())
MARKED = ("reach", "push", "pick-place")
ALIKE = {"faucet-close": "faucet-open"}  # starts where the other task starts
CAMERAS = ("corner4", "gripperPOV", "topview", "corner", "corner2", "corner3", "behindGripper")
MISSING = (
    "MetaWorld needs pip install 'motus[sim]', and apt-get install libosmesa6 (or "
    "libegl1, with MUJOCO_GL=egl)"
)


class MetaWorld(World):
    """One task. `size` of the square pictures in pixels, `cameras` with commas, `hold` steps of the
    simulator per action."""

    robot = "sawyer"
    action_dim = 4

    def __init__(
        self, task: str, size: int = 96, cameras: str = "corner4,gripperPOV", hold: int = 4
    ):
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as CLASSES
        from metaworld.policies import ENV_POLICY_MAP

        self.cameras = names(cameras, CAMERAS, "camera")
        if not 16 <= size <= 512 or hold not in (1, 2, 4, 5, 8):
            raise ValueError(
                f"size is {size}, hold is {hold}; expected 16 to 512, and 1, 2, 4, 5 or 8"
            )
        self.instruction = TASKS[choice(task, tuple(TASKS))]
        self.fps = 80 // hold
        self.max_steps = 240 // hold
        self.hold = hold
        # The class makes an environment whose layout is frozen; these lines make it draw one from
        # each seed instead.
        self.forward = mujoco.mj_forward
        self.env = CLASSES[f"{task}-v3-goal-observable"](seed=0)
        self.script = ENV_POLICY_MAP[f"{task}-v3"]
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.env.max_path_length = 1_000_000  # who acts decides when an episode ends
        if task in ALIKE:
            other = CLASSES[f"{ALIKE[task]}-v3-goal-observable"](seed=0)
            self.env._random_reset_space = other._random_reset_space
        turned = [name for name in CAMERAS if name.startswith("corner")]
        self.eye = Eye(self.env.model, size, size, turned) if self.cameras else None
        if self.eye and task not in MARKED:
            self.eye.option.sitegroup[:] = 0

    def reset(self, seed: int) -> dict:
        self.env.seed(seed)
        self.env.reset()
        self.forward(self.env.model, self.env.data)
        self.full = self.env._get_obs()
        self.success = False
        self.policy = self.script()
        return self.observe()

    def step(self, action: ndarray) -> None:
        action = np.clip(checked(action, self), -1, 1)
        for _ in range(self.hold):
            self.full, _, _, _, info = self.env.step(action)
            self.success |= info["success"] == 1

    def state(self) -> ndarray:
        return self.full[:4].astype(np.float32)

    def render(self) -> dict[str, ndarray]:
        return {camera: self.eye.picture(self.env.data, camera) for camera in self.cameras}

    def labels(self) -> dict[str, float]:
        points = {"object": self.full[4:7], "goal": self.full[36:39], "hand": self.full[:3]}
        seen = ()
        if self.cameras:
            seen = self.eye.places(self.env.data, self.cameras[0], points.values())
        return as_labels(points, self.full[3], seen)

    def expert(self) -> ndarray:
        with warnings.catch_warnings():  # that its commands exceed 1 is known
            warnings.simplefilter("ignore")
            return np.clip(self.policy.get_action(self.full), -1, 1)


make = MetaWorld
