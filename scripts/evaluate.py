"""Closed loop: a policy acts in many worlds at once, and what counts is whether they end up solved
(paper Sec. 5, Tab. 2).

    python evaluate.py --ckpt runs/stage3 --modes joint,vla                       unseen layouts, clean and randomised looks
    python evaluate.py --ckpt runs/stage3 --splits eval,held_out --random         unseen instructions too, and a random policy

In a simulator (worlds/__init__.py) the scripted experts are recorded, and a model trained on them
acts in scenes that were not:

    python evaluate.py record --sim metaworld --tasks drawer-open,drawer-close --episodes 50 --out data/drawer
    python evaluate.py --sim metaworld --like data/drawer --ckpt runs/drawer --expert

Every world is observed, a chunk of actions is predicted, its first `--execute` actions are carried
out, and so on until it is solved or `--max-steps` are over. A row of the table pools all seeds; its
interval is Wilson's, at 95 %, which stays inside 0..1 and honest for few episodes. The worlds of a
row depend on (seed, split, look) alone, so the rows of two policies see the same worlds.

Shapes: n worlds, H W pixels, S actions of a chunk, A action dimensions, F predicted video frames.
"""

import argparse
import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from formats.recordings import fit
from formats.recordings import t_layout as as_t
from sample import FAST, Policy, film
from weights.card import newest_step
from worlds import EVALUATED, episode_seeds, robots, simulator, tabletop
from worlds.fleet import PROCESSES, Fleet

LOOKS = ("clean", "randomized")


class RandomPolicy:
    """The floor: actions uniform in the robot's range. Its members are what the loop needs of any
    policy."""

    def __init__(self, chunk: int, dim: int):
        self.chunk, self.dim, self.mode, self.generator = chunk, dim, "random", torch.Generator()

    def predict(
        self,
        images: np.ndarray,
        states: np.ndarray,
        instructions: Sequence[str],
        video: bool = True,
    ) -> tuple[np.ndarray, None]:
        """-> actions (n, S, A), and no imagined video; a policy that has one returns (n, 1 + F, H,
        W, 3) uint8."""
        return 2 * torch.rand(
            len(images), self.chunk, self.dim, generator=self.generator
        ).numpy() - 1, None


# -- statistics -----------------------------------------------------------------------------------


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a rate: it does not leave 0..1 and does not shrink to a point at 0 or
    `trials` successes."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials; there is no rate")
    rate, spread = successes / trials, z * z / trials
    middle, half = (
        rate + spread / 2,
        z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)),
    )
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def summary(
    success: np.ndarray, skill: np.ndarray, steps: np.ndarray, skills: Sequence[str] = robots.SKILLS
) -> dict:
    """success (n,) bool, skill (n,) index into `skills`, steps (n,) -> rates with their intervals,
    over all and per skill."""
    parts = {
        "all": np.ones(len(success), bool),
        **{name: skill == i for i, name in enumerate(skills)},
    }
    counts = {
        name: (int(success[part].sum()), int(part.sum()))
        for name, part in parts.items()
        if part.any()
    }
    rates = {
        name: {"successes": k, "episodes": n, "rate": k / n, "interval": wilson(k, n)}
        for name, (k, n) in counts.items()
    }
    return {**rates, "mean_steps": float(steps[success].mean()) if success.any() else None}


# -- the loop -------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """n finished worlds; `films` holds pairs (real, imagined or None) of pictures (H, W, 3), if
    they were asked for."""

    success: np.ndarray  # (n,) bool
    skill: np.ndarray  # (n,) index into tabletop.SKILLS
    steps: np.ndarray  # (n,) actions until success, max_steps without
    instruction: list[str]
    films: list[list[tuple[np.ndarray, np.ndarray | None]]] = field(default_factory=list)


def rollout(
    policy: Policy | RandomPolicy,
    world: tabletop.Tabletop | Fleet,
    seeds: Sequence[int],
    max_steps: int = 100,
    execute: int | None = None,
    noise: float = 0.0,
    rate: int = 0,
) -> Rollouts:
    """Acts in all worlds of `seeds` at once; only unsolved ones ask the policy. `execute` actions
    of each chunk are carried out (None: all), disturbed by Gaussian noise of that std. With `rate`,
    the action steps per video frame, every world is filmed."""
    world.reset(seeds)
    rng, n, done = np.random.default_rng(list(seeds)), world.n, 0
    steps, films = np.full(n, max_steps), [[] for _ in range(n)]
    while done < max_steps and not world.success.all():
        obs, asking = world.observe(), np.flatnonzero(~world.success)
        instructions = [obs["instruction"][i] for i in asking]
        actions, imagined = policy.predict(
            obs["image"][asking], obs["state"][asking], instructions, video=rate > 0
        )
        length = actions.shape[1] if execute is None else execute
        if not 1 <= length <= actions.shape[1] or not np.isfinite(actions).all():
            raise ValueError(
                f"execute is {execute}, allowed 1 to {actions.shape[1]}, the actions of a chunk; "
                f"{np.isfinite(actions).mean():.0%} of the actions are finite, all must be"
            )
        length = min(length, max_steps - done)
        for k in range(length + 1):
            if rate and k % rate == 0:
                real = world.render()
                for row, i in enumerate(asking):
                    films[i].append(
                        (real[i], None if imagined is None else imagined[row, k // rate])
                    )
            if k < length:
                unsolved, now = (
                    ~world.success,
                    np.zeros((n, actions.shape[2])),
                )  # what a solved world does counts no more
                now[asking] = actions[:, k]
                world.advance(now + noise * rng.standard_normal(now.shape))
                done += 1
                steps[unsolved & world.success] = done
    return Rollouts(
        world.success.copy(),
        world.skill.copy(),
        steps,
        list(world.instruction),
        films if rate else [],
    )


def world_seeds(seed: int, episodes: int) -> list[int]:
    """Seeds of worlds: the first k of more are the same k."""
    return episode_seeds(seed, EVALUATED, episodes)


def save_films(rollouts: Rollouts, folder: Path, name: str) -> None:
    """A GIF per world: what happened, beside what the policy imagined when it last looked; a new
    look shows as a pause."""
    for i, pictures in enumerate(rollouts.films):
        real, imagined = zip(*pictures)
        columns = {"real": np.stack(real)} | (
            {"imagined": np.stack(imagined)} if imagined[0] is not None else {}
        )
        ending = "solved" if rollouts.success[i] else "not solved"
        scale = max(1, 192 // len(real[0]))
        film(
            folder / f"{name}_{i}.gif",
            columns,
            f"{rollouts.instruction[i]} ({ending})",
            scale,
            ms=150,
        )


def rate(row: dict, name: str) -> str:
    """A rate of `summary` as text."""
    if name not in row:
        return "-"
    low, high = row[name]["interval"]
    return f"{100 * row[name]['rate']:5.1f} [{100 * low:4.1f}, {100 * high:5.1f}] {row[name]['successes']}/{row[name]['episodes']}"


def columns(*lines: Sequence[str]) -> str:
    """Lines of cells as text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def table(rows: Sequence[dict]) -> str:
    """The rows as text: success in per cent with its interval, success per skill, mean steps of the
    solved worlds."""
    head = (
        "policy",
        "split",
        "look",
        "success %",
        *(f"{skill} %" for skill in robots.SKILLS),
        "steps",
    )
    return columns(
        head,
        *(
            (
                r["policy"],
                r["split"],
                r["look"],
                *(rate(r, name) for name in ("all", *robots.SKILLS)),
                "-" if r["mean_steps"] is None else f"{r['mean_steps']:.1f}",
            )
            for r in rows
        ),
    )


def names(text: str, allowed: Sequence[str], option: str) -> list[str]:
    """A list with commas, each one allowed."""
    for name in (chosen := text.split(",")):
        if name not in allowed:
            raise ValueError(f"{option} has {name!r}; allowed: {', '.join(allowed)}")
    return chosen


# in a recorded dataset: simulator, settings, and the task and seed of every episode
CARD = "meta/sim.json"


def settings_of(sim: str, changes: Sequence[str]) -> dict:
    """`key=value` of --set, numbers and true or false as json has them; the keys are the arguments
    of the simulator's `make`."""
    allowed, found = list(inspect.signature(simulator(sim).make).parameters)[1:], {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in allowed:
            raise ValueError(
                f"--set takes key=value, found {change!r}; keys of simulator {sim}: {', '.join(allowed)}"
            )
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def read_card(dataset: str | Path) -> dict:
    """The card that `record` left in a dataset."""
    path = Path(dataset) / CARD
    if not path.is_file():
        raise ValueError(
            f"{dataset} has no {CARD}; --like takes a dataset that `evaluate.py record` wrote"
        )
    card = json.loads(path.read_text())
    if absent := [
        key for key in ("sim", "settings", "tasks", "fps", "episodes") if key not in card
    ]:
        raise ValueError(f"{path} lacks {absent[0]!r}; record the dataset again")
    return card


class Expert:
    """The simulator's own scripted policy, asked anew before each action."""

    mode, generator = "expert", torch.Generator()

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def predict(
        self,
        images: np.ndarray,
        states: np.ndarray,
        instructions: Sequence[str],
        video: bool = True,
    ) -> tuple[np.ndarray, None]:
        return self.fleet.expert()[:, None], None


def view(
    images: dict[str, np.ndarray],
    cameras: Sequence[str] = (),
    t_layout: bool = False,
    size: Sequence[int] = (),
) -> np.ndarray:
    """The one picture (H, W, 3) that a policy sees of a world's cameras, all of them unless named:
    side by side, or head, left and right as the official T; fitted to `size`, its height and width.
    A world without cameras shows one black pixel."""
    if missing := [camera for camera in cameras if camera not in images]:
        raise ValueError(
            f"camera {missing[0]!r} is due; the simulator shows {', '.join(images) or 'none'}: choose with --cameras or --set"
        )
    shown = [images[camera] for camera in cameras or images]
    if t_layout and len(shown) != 3:
        raise ValueError(
            f"--t-layout takes head, left and right; found {len(shown)} cameras; name three with --cameras"
        )
    picture = (
        as_t(*shown)
        if t_layout
        else np.concatenate(shown, axis=1)
        if shown
        else np.zeros((1, 1, 3), np.uint8)
    )
    return fit(picture, *size) if size else picture


def look_of(args: argparse.Namespace, policy: Policy | None) -> Callable[[dict], np.ndarray]:
    """The view that a checkpoint was trained on, as far as it knows it, or the one that is asked
    for."""
    known = policy.statistics.as_json() if policy else {}
    return partial(
        view,
        cameras=args.cameras.split(",") if args.cameras else known.get("cameras", ()),
        t_layout=args.t_layout or known.get("t_layout", False),
        size=args.picture or known.get("size", ()),
    )


def simulate(args: argparse.Namespace) -> None:
    """Closed loop in a simulator: a row per policy, with a rate per task."""
    like = (
        read_card(args.like)
        if args.like
        else {"sim": args.sim, "settings": {}, "tasks": {}, "episodes": []}
    )
    if like["sim"] != args.sim:
        raise ValueError(f"{args.like} was recorded in {like['sim']}, --sim is {args.sim}")
    tasks = names(
        args.tasks or ",".join(like["tasks"]), tuple(simulator(args.sim).TASKS), "--tasks"
    )
    settings, scenes = (
        like["settings"] | settings_of(args.sim, args.set),
        {seed: world_seeds(seed, args.episodes) for seed in args.seed},
    )
    if known := {e["seed"] for e in like["episodes"]}.intersection(
        itertools.chain(*scenes.values())
    ):
        raise ValueError(
            f"{len(known)} of the scenes, such as {min(known)}, were recorded in {args.like}; choose another --seed"
        )
    modes = names(args.modes, ("joint", "vla"), "--modes") if args.ckpt else []
    policy = (
        Policy.load(
            args.ckpt, modes[0], args.steps, placement=FAST if args.fast else None, robot=args.robot
        )
        if args.ckpt
        else None
    )
    if not (policy or args.random or args.expert):
        raise ValueError("nobody acts; give --ckpt, --expert or --random")
    out = Path(
        args.out or (newest_step(args.ckpt) / "evaluation" if args.ckpt else "runs/evaluation")
    )
    out.mkdir(parents=True, exist_ok=True)

    def play(
        name: str, actor: Policy | RandomPolicy | Expert, fleet: Fleet, seed: int, gifs: int
    ) -> Iterator[Rollouts]:
        """All scenes of a seed, as many at once as the fleet holds; the first `gifs` are filmed."""
        actor.mode, steps, execute = (
            name,
            args.max_steps or fleet.max_steps,
            None if name == "expert" else args.execute,
        )
        actor.generator.manual_seed(seed)
        for start in range(0, args.episodes, fleet.size):
            films = gifs if start == 0 else 0
            done = rollout(
                actor,
                fleet,
                scenes[seed][start : start + fleet.size],
                steps,
                execute,
                args.noise,
                policy.rate if films else 0,
            )
            done.films = done.films[:films]
            save_films(done, out, f"{name}_{task}")
            yield done

    found: dict[
        str, list[tuple[int, int, bool, int]]
    ] = {}  # policy -> task, seed, success and steps of each episode
    for k, task in enumerate(tqdm(tasks, desc="tasks", unit="task")):
        with Fleet(
            args.sim,
            task,
            min(args.batch, args.episodes),
            look_of(args, policy),
            settings,
            args.workers,
        ) as fleet:
            if policy and (hz := policy.statistics.as_json().get("action_hz", 0)) not in (
                0,
                fleet.fps,
            ):
                raise ValueError(
                    f"{args.ckpt} acts {hz:g} times a second, the simulator {fleet.fps:g} times; change its rate with --set"
                )
            actors: dict[str, Policy | RandomPolicy | Expert] = dict.fromkeys(modes, policy)
            actors |= (
                {"random": RandomPolicy(args.execute or 8, fleet.action_dim)} if args.random else {}
            )
            actors |= {"expert": Expert(fleet)} if args.expert else {}
            for (name, actor), seed in itertools.product(actors.items(), args.seed):
                for done in play(
                    name,
                    actor,
                    fleet,
                    seed,
                    args.gif if actor is policy and seed == args.seed[0] else 0,
                ):
                    found.setdefault(name, []).extend(
                        (k, seed, *episode) for episode in zip(done.success, done.steps)
                    )
    rows = []
    for name, episodes in found.items():
        index, seeds, success, steps = (np.array(column) for column in zip(*episodes))
        per_seed = {seed: int(success[seeds == seed].sum()) for seed in args.seed}
        rows.append(
            {
                "policy": name,
                **summary(success, index, steps, tasks),
                "successes_per_seed": per_seed,
            }
        )
    (out / "evaluation.json").write_text(
        json.dumps({**vars(args), "tasks": tasks, "settings": settings, "rows": rows}, indent=1)
    )
    print(
        columns(
            ("task", *(f"{row['policy']} %" for row in rows)),
            *((name, *(rate(row, name) for row in rows)) for name in (*tasks, "all")),
        )
    )
    print(
        f"{len(args.seed)} seeds of {args.episodes} episodes per task, at most {args.max_steps or fleet.max_steps} actions at "
        f"{fleet.fps:g} per second; wrote {out}"
    )


# -- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt",
        help="run folder of stage 3, or one of its step_NNNNNN; a simulator may do without",
    )
    parser.add_argument(
        "--robot", default="", help="which robot acts, where the checkpoint knows several"
    )
    parser.add_argument("--modes", default="joint", help="joint, vla, or both with a comma")
    parser.add_argument(
        "--splits", default="eval", help=f"of {', '.join(robots.SPLITS)}, with commas"
    )
    parser.add_argument(
        "--looks", default="clean,randomized", help="clean, randomized, or both with a comma"
    )
    parser.add_argument("--episodes", type=int, default=50, help="worlds per row and seed")
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="one or more, of worlds and noise; a row pools them",
    )
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"actions first: {FAST.steps} steps, {FAST.joint} joint (docs/speed.md)",
    )
    parser.add_argument(
        "--execute",
        type=int,
        help="actions carried out before the next look (default: the whole chunk)",
    )
    parser.add_argument(
        "--max-steps", type=int, help="actions per episode (default: 100; a simulator has its own)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="std of Gaussian noise on the actions, in robot units",
    )
    parser.add_argument("--random", action="store_true", help="add rows of a random policy")
    parser.add_argument(
        "--gif",
        type=int,
        default=0,
        metavar="K",
        help="film K worlds per row, with the imagined video beside",
    )
    parser.add_argument(
        "--out",
        help="folder for evaluation.json and films (default: evaluation/ in the checkpoint)",
    )
    sims = parser.add_argument_group("in a simulator")
    sims.add_argument(
        "--sim", help="a file of worlds/, or a module on PYTHONPATH; without it, the toy's tabletop"
    )
    sims.add_argument(
        "--like",
        metavar="DATASET",
        help="tasks and settings of a recording, whose scenes are then forbidden",
    )
    sims.add_argument("--tasks", help="with commas (default: those of --like)")
    sims.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the simulator, such as size=96",
    )
    sims.add_argument(
        "--cameras", help="which make the picture, with commas, side by side (default: all)"
    )
    sims.add_argument(
        "--t-layout", action="store_true", help="head, left, right as the official T instead"
    )
    sims.add_argument(
        "--picture",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="size that the picture is fitted to",
    )
    sims.add_argument("--batch", type=int, default=10, help="worlds at once")
    sims.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    sims.add_argument("--expert", action="store_true", help="add rows of the scripted expert")
    args = parser.parse_args(argv)
    if (
        args.episodes < 1
        or (args.max_steps or 1) < 1
        or min(args.seed) < 0
        or min(args.batch, args.workers) < 1
    ):
        raise ValueError(
            f"--episodes {args.episodes}, --max-steps {args.max_steps}, --batch {args.batch}, --workers {args.workers} are at "
            f"least 1, --seed {args.seed} at least 0"
        )
    if args.sim:
        return simulate(args)
    args.max_steps = args.max_steps or 100
    modes, splits = (
        names(args.modes, ("joint", "vla"), "--modes"),
        names(args.splits, robots.SPLITS, "--splits"),
    )
    looks = names(args.looks, LOOKS, "--looks")
    if args.ckpt is None:
        raise ValueError("--ckpt is missing; name a run folder of stage 3")
    policy = Policy.load(
        args.ckpt, modes[0], args.steps, placement=FAST if args.fast else None, robot=args.robot
    )
    config, body = policy.model.config, policy.statistics.embodiment
    actors = dict.fromkeys(modes, policy)
    if args.random:
        actors["random"] = RandomPolicy(config.chunk, policy.own_width)
    (out := Path(args.out or newest_step(args.ckpt) / "evaluation")).mkdir(
        parents=True, exist_ok=True
    )

    def play(name: str, split: str, look: str, seed: int, count: int, rate: int = 0) -> Rollouts:
        actors[name].mode = name
        actors[name].generator.manual_seed(seed)
        world = tabletop.Tabletop(count, body, look == "randomized", split)
        return rollout(
            actors[name],
            world,
            world_seeds(seed, count),
            args.max_steps,
            args.execute,
            args.noise,
            rate,
        )

    rows = []
    for name, split, look in itertools.product(actors, splits, looks):
        played = [play(name, split, look, seed, args.episodes) for seed in args.seed]
        pooled = summary(
            *(
                np.concatenate([getattr(r, key) for r in played])
                for key in ("success", "skill", "steps")
            )
        )
        per_seed = {seed: int(r.success.sum()) for seed, r in zip(args.seed, played)}
        rows.append(
            {"policy": name, "split": split, "look": look, **pooled, "successes_per_seed": per_seed}
        )
        if args.gif:
            save_films(
                play(name, split, look, args.seed[0], args.gif, policy.rate),
                out,
                f"{name}_{split}_{look}",
            )
    (out / "evaluation.json").write_text(json.dumps({**vars(args), "rows": rows}, indent=1))
    print(table(rows))
    print(
        f"{len(args.seed)} seeds of {args.episodes} episodes, {policy.placement.steps} Euler steps, on {policy.device}; wrote {out}"
    )


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(
        ["evaluate"]
    )  # every process runs the imports of this file; so they are run once
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
