"""Closed loop: a policy acts in many worlds at once, and what counts is whether they end up solved
(paper Sec. 5, Tab. 2).

    python -m scripts.evaluate --gif 2
    python -m scripts.evaluate --ckpt runs/stage3 --modes joint,vla --random
    python -m scripts.evaluate --ckpt runs/stage3 --set split=eval,held_out randomized=false,true
    python -m scripts.evaluate --like data/drawer --ckpt runs/drawer --expert

It acts in the world that its preset names, in the one that `scripts.record` recorded a dataset in
(`--like`), whose scenes are then forbidden, or in `--sim`. `--set` changes settings of the
simulator; rows are made of every combination of its values. A value that holds commas itself is
quoted: `--set 'cameras="corner4,gripperPOV"'`.

Every world is observed, a chunk of actions is predicted, its first `--execute` actions are carried
out, and so on until it is solved or `--max-steps` are over. A row of the table pools all seeds; its
interval is Wilson's, at 95 %, which stays inside 0..1 and honest for few episodes. The worlds of a
row depend on seed, task and settings alone, so the rows of two policies see the same worlds.
evaluation.json says too how many actions the solved worlds took.

Shapes: n worlds, H W pixels, S actions of a chunk, A action dimensions, F predicted video frames.
"""

import argparse
import inspect
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, repeat
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from tqdm import tqdm

from formats.pictures import film
from formats.recordings import fit
from formats.recordings import t_layout as as_t
from motus import PRESETS
from sample import ACTING, SHIPPED, Policy
from scripts.readme import evaluation_result
from weights.card import results_of
from weights.files import read_json, write_json
from weights.options import DEVICE, Parser, output_folder, run_command
from worlds import EVALUATED, choice, episode_seeds, names, simulator
from worlds.fleet import PROCESSES, Fleet


class RandomPolicy:
    """The floor: actions uniform in the robot's range. Its members are those that the loop needs of
    any policy."""

    def __init__(self, chunk: int, dim: int):
        self.size = (chunk, dim)
        self.generator = torch.Generator()

    def predict(self, images: ndarray, *_, **__) -> tuple[ndarray, None]:
        """As `Policy.predict` -> actions (n, S, A), and no imagined video; a policy that has one
        returns (n, 1 + F, H, W, 3) uint8."""
        draws = torch.rand(len(images), *self.size, generator=self.generator)
        return 2 * draws.numpy() - 1, None


class Expert(RandomPolicy):
    """The simulator's own scripted policy, asked anew before each action."""

    def __init__(self, worlds: Fleet):
        super().__init__(1, worlds.action_dim)
        self.worlds = worlds

    def predict(self, *_, **__) -> tuple[ndarray, None]:
        return self.worlds.expert()[:, None], None


# -- statistics -----------------------------------------------------------------------------------


def wilson(successes: int, trials: int) -> list[float]:
    """Wilson's interval for a rate: it does not leave 0..1 and does not shrink to a point at 0 or
    `trials` successes."""
    z = 1.96  # 95 %
    rate = successes / trials
    spread = z * z / trials
    middle = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    bounds = np.array([middle - half, middle + half]) / (1 + spread)
    return bounds.clip(0, 1).tolist()


def rated(successes: int, episodes: int) -> dict:
    return {
        "successes": successes,
        "episodes": episodes,
        "rate": successes / episodes,
        "interval": wilson(successes, episodes),
    }


def summary(success: ndarray, group: ndarray, steps: ndarray, groups: Sequence[str]) -> dict:
    """success (n,) bool, the group of each, steps (n,) -> rates with their intervals, over all and
    per group; a group without episodes has none."""
    chosen = {"all": success} | {name: success[group == name] for name in groups}
    rates = {name: rated(int(one.sum()), len(one)) for name, one in chosen.items() if len(one)}
    return rates | {"mean_steps": float(steps[success].mean()) if success.any() else None}


# -- the loop -------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """n finished worlds; `films` holds pictures (H, W, 3), if they were asked for: real ones, and
    with them what was imagined, if it was."""

    success: ndarray  # (n,) bool
    group: ndarray  # (n,) names: the task of each
    steps: ndarray  # (n,) actions until success, max_steps without
    instruction: list[str]
    films: list[list[list[ndarray]]]
    goals: Sequence[ndarray | None]  # (2,) in the picture, where the world knows one


def rollout(
    policy: Policy | RandomPolicy,
    worlds: Fleet,
    seeds: Sequence[int],
    max_steps: int = 100,
    execute: int | None = None,
    rate: int = 0,
) -> Rollouts:
    """Acts in all worlds of `seeds` at once; only unsolved ones ask the policy. `execute` actions
    of each chunk are carried out (None: all). With `rate`, the action steps per video frame, every
    world is filmed."""
    worlds.reset(seeds)
    n = worlds.n
    steps = np.zeros(n, int)
    done = 0
    films = [[] for _ in range(n)] if rate else []
    while done < max_steps and not worlds.success.all():
        seen = worlds.observe()
        asking = np.flatnonzero(~worlds.success)
        instructions = [seen["instruction"][i] for i in asking]
        actions, imagined = policy.predict(
            seen["image"][asking], seen["state"][asking], instructions, video=rate > 0
        )
        length = actions.shape[1] if execute is None else execute
        if not 1 <= length <= actions.shape[1] or not np.isfinite(actions).all():
            raise ValueError(
                f"execute is {execute}, expected 1 to {actions.shape[1]}, the actions of a chunk; "
                f"{np.isfinite(actions).mean():.0%} of the actions are finite, expected all"
            )
        length = min(length, max_steps - done)
        for k in range(length + 1):
            if rate and k % rate == 0:
                shown = [worlds.render()[asking]]
                if imagined is not None:
                    shown.append(imagined[:, k // rate])
                for i, *pictures in zip(asking, *shown):
                    films[i].append(pictures)
            if k == length:
                break
            action = np.zeros((n, actions.shape[2]))  # of a solved world it counts no more
            action[asking] = actions[:, k]
            steps += ~worlds.success
            worlds.advance(action)
            done += 1
    group = np.array(worlds.group)
    goals = getattr(worlds, "goal", [None] * n)
    return Rollouts(worlds.success.copy(), group, steps, worlds.instruction, films, goals)


def save_films(rollouts: Rollouts, folder: Path, name: str) -> None:
    """A GIF per world: what happened, beside what the policy imagined when it last looked; a new
    look shows as a pause."""
    for i, pictures in enumerate(rollouts.films):
        videos = dict(zip(("real", "imagined"), map(np.stack, zip(*pictures))))
        ending = "(solved)" if rollouts.success[i] else "(not solved)"
        caption = f"{rollouts.instruction[i]} {ending}"
        film(folder / f"{name}_{i}.gif", videos, caption, 150, rollouts.goals[i])


# -- the worlds -----------------------------------------------------------------------------------

CARD = "meta/sim.json"  # of a recording: simulator, settings, and task and seed of every episode


def keys_of(sim: str) -> list[str]:
    """Settings of a simulator: the arguments of its `make`, but the task."""
    return list(inspect.signature(simulator(sim).make).parameters)[1:]


def settings_of(sim: str, changes: Sequence[str]) -> dict[str, list]:
    """`key=value,value` of --set; values are read as json, or are text."""
    allowed = keys_of(sim)
    found = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in allowed:
            raise ValueError(
                f"--set has {change!r}; expected key=value, keys of {sim}: {', '.join(allowed)}"
            )
        try:
            found[key] = json.loads(f"[{text}]") or [""]
        except ValueError:
            found[key] = text.split(",")
    return found


def read_card(dataset: str | Path) -> dict:
    """The card that `record` left in a dataset."""
    path = Path(dataset) / CARD
    if not path.is_file():
        raise ValueError(f"{dataset} has no {CARD}; expected a dataset of `scripts.record`")
    return read_json(path)


def view(
    images: dict[str, ndarray],
    cameras: Sequence[str] = (),
    t_layout: bool = False,
    size: Sequence[int] = (),
) -> ndarray:
    """The one picture (H, W, 3) that a policy sees of a world's cameras, all of them unless named:
    side by side, or head, left and right as the official T; fitted to `size`, its height and width.
    A world without cameras shows one black pixel."""
    field = "camera (choose with --set)"
    shown = [images[choice(camera, images, field)] for camera in cameras or images]
    if t_layout and len(shown) != 3:
        raise ValueError(f"expected head, left and right for the T, found {len(shown)} cameras")
    if not shown:
        return np.zeros((1, 1, 3), np.uint8)
    picture = as_t(*shown) if t_layout else np.concatenate(shown, axis=1)
    return fit(picture, *size) if size else picture


def arena(args: argparse.Namespace, policy: Policy | None) -> Callable[[dict], ndarray]:
    """Puts into the arguments simulator, tasks and settings as they are where `args.like` or the
    policy's preset says them; the picture that a policy sees of a world's cameras."""
    like = {"sim": args.sim, "settings": {}, "tasks": (), "episodes": ()}
    if args.like:
        like = read_card(args.like)
    sim = like["sim"] or (policy and PRESETS[policy.card.preset].world)
    if not sim or args.sim not in (None, sim):
        raise ValueError(f"--sim is {args.sim}; expected {sim or 'a simulator, or --like'}")
    recorded = [episode["seed"] for episode in like["episodes"]]
    tried = [episode_seeds(seed, EVALUATED, args.episodes) for seed in args.seed]
    both = np.intersect1d(recorded, tried)
    if len(both):
        raise ValueError(
            f"{len(both)} of the scenes, such as {both[0]}, were recorded in {args.like}; "
            "choose another --seed"
        )
    known = simulator(sim).TASKS
    args.sim = sim
    args.tasks = names(args.tasks or ",".join(like["tasks"] or known), known, "--tasks")
    args.settings = like["settings"]
    if policy is None:
        return view
    robot = policy.statistics
    if "embodiment" in keys_of(sim):
        args.settings = {"embodiment": robot.embodiment} | args.settings
    return partial(view, cameras=robot.cameras, t_layout=robot.t_layout, size=robot.size)


def fleets(
    args: argparse.Namespace, look: Callable[[dict], ndarray], settings: dict
) -> Iterator[tuple[str, Fleet]]:
    """A fleet for each task; or all tasks at once, where a simulator can hold many worlds."""
    settings = args.settings | settings
    module = simulator(args.sim)
    if hasattr(module, "many"):
        yield "", module.many(args.tasks, args.episodes, **settings)
        return
    n = min(args.batch, args.episodes)
    for task in args.tasks:
        with Fleet(args.sim, task, n, look, settings, args.workers) as fleet:
            yield task, fleet


# -- the command ----------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.evaluate", description=__doc__)
    add = parser.option
    add("--ckpt", str, "run of stage 3, or one of its step_NNNNNN (default: the shipped policy)")
    add("--modes", "joint", "joint, vla, or both with a comma")
    add("--random", False, "add rows of a random policy")
    add("--expert", False, "add rows of the simulator's scripted expert")
    add("--robot", "", "which robot acts, where the checkpoint knows several")
    add("--sim", str, "a file of worlds/, or a module on PYTHONPATH (default: the preset's world)")
    add("--like", str, "dataset: simulator, tasks and settings of a recording")
    add("--tasks", str, "with commas (default: those of --like, or all)")
    add("--set", str, "KEY=VALUE: settings of the simulator", nargs="+", default=[])
    add("--episodes", 50, "worlds per row, task and seed")
    add("--seed", int, "of worlds and noise; a row pools them", nargs="+", default=[0])
    add("--steps", 10, "Euler steps")
    add("--execute", int, "actions before the next look (default: the whole chunk)")
    add("--max-steps", int, "actions per episode (default: the simulator's)")
    add("--gif", 0, "film so many worlds per row and task")
    add("--batch", 10, "worlds at once")
    add("--workers", os.cpu_count(), "processes")
    add(
        "--out",
        output_folder,
        "for evaluation.json and films (default: in the checkpoint, or runs)",
    )
    add(*DEVICE)
    return parser.parse_args(argv)


def play(
    name: str,
    policy: Policy | None,
    worlds: Fleet,
    seed: int,
    episodes: int,
    args: argparse.Namespace,
    filmed: bool = False,
) -> Iterator[Rollouts]:
    """Who has this name acts in the worlds of a seed, in as many at once as there is room for."""
    execute = args.execute
    if name == "expert":
        actor = Expert(worlds)
        execute = None
    elif name == "random":
        chunk = policy.model.config.chunk if policy else execute or 8
        actor = RandomPolicy(chunk, worlds.action_dim)
    else:
        actor = policy
        actor.mode = name
    rate = policy.statistics.rate if policy else 1
    actor.generator.manual_seed(seed)
    seeds = episode_seeds(seed, EVALUATED, episodes)
    steps = args.max_steps or worlds.max_steps
    for start in range(0, episodes, worlds.size):
        some = seeds[start : start + worlds.size]
        yield rollout(actor, worlds, some, steps, execute, rate if filmed else 0)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    out = args.out or output_folder(results_of(args.ckpt, "evaluation"))
    if not any((args.ckpt, args.random, args.expert, args.sim, args.like)):
        args.ckpt = SHIPPED
    modes = names(args.modes, ACTING, "--modes") if args.ckpt else []
    actors = modes + [name for name in ("random", "expert") if getattr(args, name)]
    if not actors:
        raise ValueError("nobody acts; give --ckpt, --expert or --random")
    policy = Policy.load(args.ckpt, modes[0], args.steps, robot=args.robot) if modes else None
    hz = policy and policy.statistics.action_hz
    look = arena(args, policy)
    varied = settings_of(args.sim, args.set)
    changes = [dict(zip(varied, values)) for values in product(*varied.values())]
    out.mkdir(parents=True, exist_ok=True)
    # Who acts under which settings -> seed, task, success and steps of each episode.
    found: dict[tuple, list[tuple]] = defaultdict(list)
    for number, change in enumerate(changes):
        for task, worlds in fleets(args, look, change):
            if hz and hz != worlds.fps:
                raise ValueError(
                    f"{args.ckpt} acts {hz:g} times a second, the simulator {worlds.fps:g} times; "
                    "change its rate with --set"
                )
            for name in actors:
                for seed in args.seed:
                    batches = play(name, policy, worlds, seed, args.episodes, args)
                    for done in tqdm(batches, f"{name} {task}", leave=False, unit="batch"):
                        found[name, number] += zip(
                            repeat(seed), done.group, done.success, done.steps
                        )
                if args.gif:  # apart, so that rates do not depend on it
                    count = min(args.gif, worlds.size)
                    films = next(play(name, policy, worlds, args.seed[0], count, args, filmed=True))
                    title = filter(None, (name, *map(str, change.values()), task))
                    save_films(films, out, "_".join(title))
    rows = []
    for name, (number, change) in product(actors, enumerate(changes)):
        seeds, group, success, steps = map(np.array, zip(*found[name, number]))
        row = {"policy": name, "settings": change} | summary(success, group, steps, args.tasks)
        row["successes_per_seed"] = {one: int(success[seeds == one].sum()) for one in args.seed}
        rows.append(row)
    card = vars(args) | {"rows": rows}
    write_json(out / "evaluation.json", card)
    print(evaluation_result(card))
    if args.steps == 1 and len(modes) == 2:
        print("At one Euler step joint and vla are the same computation: not two results, but one.")
    print(
        f"{len(args.seed)} seeds of {args.episodes} episodes, {args.steps} Euler steps, at most "
        f"{args.max_steps or worlds.max_steps} actions at {worlds.fps:g} per second; wrote {out}"
    )


if __name__ == "__main__":
    # Every process runs the imports of this file; so they are run once.
    PROCESSES.set_forkserver_preload(["scripts.evaluate"])
    run_command(main)
