"""RoboTwin 2.0: two arms, fifty tasks, in SAPIEN (a clone of RoboTwin with its assets, and a GPU).
Written from its public interface, that of its script/eval_policy.py, and tried against a stand-in
of it only: the simulator itself has not been run with this file.

    python evaluate.py --sim robotwin --tasks click_bell --set root=/path/to/RoboTwin config=demo_randomized \\
        --cameras head_camera,left_camera,right_camera --t-layout --workers 1 --batch 1 --ckpt ...

    action     14 absolute joint positions: left arm 6, gripper, right arm 6, gripper
    state      14, the same
    pictures   head_camera, left_camera, right_camera: the order of the official T-layout

- As in the official evaluation a scene counts only if RoboTwin's own planner solves it; else the
  next seed is taken. The instruction is one that describes this very scene, by default of the kind
  `unseen`.
- Each action is executed to its end by RoboTwin's own trajectory planner, so the rate of 10 Hz is
  nominal.
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np

from worlds import World, checked, choice

TASKS = dict.fromkeys(
    """
    adjust_bottle beat_block_hammer blocks_ranking_rgb blocks_ranking_size click_alarmclock click_bell dump_bin_bigbin grab_roller
    handover_block handover_mic hanging_mug lift_pot move_can_pot move_pillbottle_pad move_playingcard_away move_stapler_pad open_laptop
    open_microwave pick_diverse_bottles pick_dual_bottles place_a2b_left place_a2b_right place_bread_basket place_bread_skillet
    place_burger_fries place_can_basket place_cans_plasticbox place_container_plate place_dual_shoes place_empty_cup place_fan
    place_mouse_pad place_object_basket place_object_scale place_object_stand place_phone_stand place_shoe press_stapler
    put_bottles_dustbin put_object_cabinet rotate_qrcode scan_object shake_bottle shake_bottle_horizontally stack_blocks_three
    stack_blocks_two stack_bowls_three stack_bowls_two stamp_seal turn_switch""".split(),
    "",
)
CAMERAS = ("head_camera", "left_camera", "right_camera")
TRIES = 100  # seeds in a row of which the planner must solve one


class RoboTwin(World):
    """`root` is RoboTwin's folder, which becomes the working folder; `config` a file of its
    task_config; `instructions` seen or unseen."""

    robot, action_dim, fps = "aloha-agilex", 14, 10

    def __init__(
        self,
        task: str,
        root: str = ".",
        config: str = "demo_randomized",
        instructions: str = "unseen",
    ):
        folder = Path(root).resolve()
        if not (folder / "envs" / f"{choice(task, tuple(TASKS))}.py").is_file():
            raise ValueError(
                f"{folder} has no envs/{task}.py; --set root=FOLDER takes a clone of RoboTwin 2.0"
            )
        os.chdir(folder)  # RoboTwin opens its files by relative paths
        sys.path[:0] = [str(folder), str(folder / "description" / "utils")]
        import yaml

        read = lambda name: yaml.safe_load(Path(name).read_text())
        self.task, self.kind = task, choice(instructions, ("seen", "unseen"), "instructions")
        self.settings = read(f"task_config/{config}.yml") | {
            "task_name": task,
            "task_config": config,
            "eval_mode": True,
            "render_freq": 0,
        }
        bodies, cameras = (
            read("task_config/_embodiment_config.yml"),
            read("task_config/_camera_config.yml"),
        )
        left, right, *apart = [*self.settings["embodiment"], *self.settings["embodiment"]][
            :2
        ] + self.settings["embodiment"][2:]
        for side, name in (("left", left), ("right", right)):
            self.settings[f"{side}_robot_file"] = bodies[name]["file_path"]
            self.settings[f"{side}_embodiment_config"] = read(
                Path(bodies[name]["file_path"]) / "config.yml"
            )
        head = cameras[self.settings["camera"]["head_camera_type"]]
        self.settings |= {
            "dual_arm_embodied": not apart,
            "head_camera_h": head["h"],
            "head_camera_w": head["w"],
        }
        self.settings |= {"embodiment_dis": apart[0]} if apart else {}
        self.max_steps = read("task_config/_eval_step_limit.yml")[task]
        self.env, self.open = getattr(importlib.import_module(f"envs.{task}"), task)(), False
        self.describe = importlib.import_module(
            "generate_episode_instructions"
        ).generate_episode_descriptions

    def _setup(self, seed: int) -> None:
        if self.open:
            self.env.close_env()
        self.env.setup_demo(now_ep_num=0, seed=seed, is_test=True, **self.settings)
        self.open = True

    def reset(self, seed: int) -> dict:
        unstable = importlib.import_module("envs.utils.create_actor").UnStableError
        for tried in range(seed, seed + TRIES):
            try:
                self._setup(tried)
                found = self.env.play_once()
            except unstable:
                self.open = True  # what was begun is closed before the next
                continue
            if self.env.plan_success and self.env.check_success():
                break
        else:
            raise ValueError(
                f"RoboTwin's planner solved none of the scenes {seed} to {tried} of {self.task}"
            )
        self._setup(tried)
        texts = self.describe(self.task, [found["info"]], 1)[0][self.kind]
        self.instruction, self.success = (
            texts[np.random.default_rng(seed).integers(len(texts))],
            False,
        )
        self.env.set_instruction(instruction=self.instruction)
        self.seen = self.env.get_obs()
        return self.observe()

    def step(self, action: np.ndarray) -> None:
        self.env.take_action(checked(action, self), action_type="qpos")
        self.seen, self.success = self.env.get_obs(), bool(self.env.eval_success)

    def state(self) -> np.ndarray:
        return np.asarray(self.seen["joint_action"]["vector"], np.float32)

    def render(self) -> dict[str, np.ndarray]:
        return {camera: self.seen["observation"][camera]["rgb"] for camera in CAMERAS}


make = RoboTwin
