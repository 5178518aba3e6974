"""Whether the five modes of the toy are true: what a policy imagines, against the simulator, which
can execute any actions.

    python -m scripts.truth --steps 1 2 4 10                   the shipped policy, in full
    python -m scripts.truth --ckpt runs/demo/stage3 --windows 96 --steps 2

From every observation, of layouts that no stage trains on, two films are shot: of the expert, and
of a random motion without a task. The world model is also asked what the actions of the window
before, of another episode, do here; the simulator executes them. Places in a film are read by
`scripts.detector`; what it says of true films and of the VAE's copies stands beside the rest.
Intervals are those of a bootstrap over windows, at 95 %. Pixels are of 48, and of the last frame.

    moved disc     where a disc is that the actions moved, in pixels, and whether it is there at all
    above vgm      squared error of the moving region, in decibels below that of mode vgm
    sharpness      energy of the gradient in the moving region, over that of the VAE's copy
    obeys          the named disc goes at least half as far towards its goal as in truth, no other
    times as far   from its own truth with other actions, over that with the true ones

Shapes: n windows, F frames after the observation, S actions, D discs.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import data
from flow import MODES
from motus import PRESETS, Prediction
from sample import Policy, moving_region, ssim
from scripts.detector import Detector
from scripts.readme import truth_result
from weights.files import write_json
from weights.options import DEVICE, Parser, output_file, run_command
from worlds import EVALUATED, episode_seeds
from worlds.render import distance
from worlds.robots import IMAGE
from worlds.tabletop import Tabletop

STARTS = 32  # steps that the expert has made at most when a window begins
MOVED = 1.5  # pixels by which a disc has moved
RESAMPLES = 300


# -- what the simulator says ----------------------------------------------------------------------


class Windows(NamedTuple):
    """Actions in n worlds, and what came of them."""

    frames: Tensor  # (n, 1+F, H, W, 3) uint8
    actions: Tensor  # (n, S, A) as the network sees them
    places: ndarray  # (n, 1+D, 2) of gripper and discs, at the end


def places(world: Tabletop) -> ndarray:
    """Of gripper and discs, (n, 1+D, 2)."""
    return np.concatenate([world.effector[:, None], world.discs], axis=1)


def observed(count: int, seed: int) -> Tabletop:
    """`count` worlds, each some steps into what the expert does."""
    world = Tabletop(count, split="eval")
    world.reset(episode_seeds(seed, EVALUATED, count))
    waits = np.arange(count)[:, None] % STARTS
    for step in range(STARTS):
        # The gripper's state, as an action, holds it still.
        world.advance(np.where(step < waits, world.state(), world.expert()))
    return world


def execute(world: Tabletop, policy: Policy, actions: Tensor | None = None) -> Windows:
    """Carries out `actions`, by default the expert's, in a copy of the worlds."""
    world = deepcopy(world)
    robot = policy.statistics.actions
    frames = [world.render()]
    done = []
    for step in range(policy.model.config.chunk):
        done.append(world.expert() if actions is None else robot.invert(actions[:, step]).numpy())
        world.advance(done[-1])
        frames.append(world.render())
    frames = np.stack(frames[:: policy.statistics.rate], axis=1)
    actions = robot.apply(torch.tensor(np.stack(done, axis=1)).float())
    return Windows(torch.tensor(frames), actions, places(world))


# -- figures --------------------------------------------------------------------------------------


def r2(found: Tensor, truth: Tensor) -> float:
    spread = truth - truth.mean(dim=0)
    return 1 - ratio((found - truth).square(), spread.square())


def ratio(above: ndarray | Tensor, below: ndarray | Tensor) -> float:
    return above.sum() / below.sum()


def decibels(above: ndarray, below: ndarray) -> float:
    return 10 * np.log10(ratio(above, below))


def away(found: ndarray, truth: ndarray) -> ndarray:
    """Pixels between places (..., 2)."""
    return IMAGE * distance(found, truth)


def gradients(film: Tensor) -> Tensor:
    """Energy of the gradient (n, F, H, W)."""
    grey = film[:, 1:].double().mean(dim=-1)
    return sum(way.square() for way in torch.gradient(grey, dim=(2, 3)))


class Truth:
    """n worlds, one set of actions in them and what came of it, `own`, and a policy to be asked.
    Figures are a name, a statistic, and its arrays with a row per window, or per disc."""

    def __init__(self, policy: Policy, world: Tabletop):
        self.policy = policy
        self.world = world
        self.own = execute(world, policy)
        frames, actions, _ = self.own
        self.region = moving_region(frames[:, :1], frames[:, 1:])
        state = policy.statistics.state.apply(torch.tensor(world.state()))
        batch = data.Batch(frames, None, world.instruction, state, actions)
        self.inputs = data.encode(batch, policy.backbones)
        self.copy = self.decoded(self.inputs.latents)

    def decoded(self, latents: Tensor) -> Tensor:
        return self.policy.backbones.decode_video(latents).cpu()

    def ask(self, mode: str, **given: Tensor) -> Prediction:
        """The answer of a mode, which may be `given` something else than the truth."""
        policy = self.policy
        policy.generator.manual_seed(0)
        return policy.sample(replace(self.inputs, **given).to(policy.device), mode)

    def seen(self, film: Tensor) -> list[ndarray]:
        """Places (n, 1+D, 2) of gripper and discs in the last frame, and which are there."""
        things = np.insert(1 + self.world.colours, 0, 0, axis=1)
        rows = np.arange(len(film))[:, None]
        return [array[rows, things] for array in Detector.shipped().see(film[:, -1])]

    def off(self, film: Tensor, truth: Windows) -> ndarray:
        """Pixels (n, 1+D) from where things are in a film to where they should be."""
        return away(self.seen(film)[0], truth.places)

    def pooled(self, values: Tensor) -> ndarray:
        """Sum (n,) of values (n, F, H, W) in the moving region."""
        return (values * self.region).sum(dim=(1, 2, 3)).numpy()

    def errors(self, film: Tensor) -> Tensor:
        """Squared (n, F, H, W), in units of the whole range."""
        return ((film[:, 1:].double() - self.own.frames[:, 1:]) / 255).square().mean(dim=-1)

    def of_places(self, who: str, film: Tensor) -> Iterator[tuple]:
        moved = away(self.own.places, places(self.world)) > MOVED
        moved[:, 0] = False  # the gripper
        _, there = self.seen(film)
        off = self.off(film, self.own)
        yield f"{who}: gripper, px", np.median, off[:, 0]
        yield f"{who}: moved disc, px", np.median, off[moved]
        yield f"{who}: moved disc there", np.mean, there[moved]

    def of_looks(self, who: str, film: Tensor) -> Iterator[tuple]:
        energy = (self.pooled(gradients(x)) for x in (film, self.copy))
        yield f"{who}: sharpness", ratio, *energy
        error = self.errors(film)
        yield f"{who}: PSNR dB", decibels, np.ones(len(film)), error.mean(dim=(1, 2, 3)).numpy()
        yield f"{who}: PSNR moving dB", decibels, self.pooled(torch.ones(())), self.pooled(error)

    def obeys(self, film: Tensor) -> ndarray:
        """Whether a film moves the named disc and no other, where the expert does."""
        world = self.world
        found, _ = self.seen(film)
        now = places(world)
        named = np.insert(world.named, 0, False, axis=1)
        left = (away(x[named], world.goal) for x in (now, found, self.own.places))
        before, after, true = left
        strays = away(found, now)[:, 1:] > 2 * MOVED
        obeys = (before - after > (before - true) / 2) & ~(strays & ~world.named).any(axis=1)
        return obeys[before - true > MOVED]

    def figures(self) -> Iterator[tuple]:
        """Those of every mode, at the policy's number of Euler steps."""
        own = self.own
        films = {"VAE": self.copy}
        answers = {mode: self.ask(mode) for mode in MODES}
        for mode, (latents, actions) in answers.items():
            if latents is not None:
                films[mode] = self.decoded(latents)
            if actions is not None:
                for i, name in enumerate(("x", "y", "opening")):
                    yield f"{mode}: {name}, R2", r2, actions[..., i].cpu(), own.actions[..., i]
        yield from self.of_places("true films", own.frames)
        for who, film in films.items():
            yield from self.of_places(who, film)
            yield from self.of_looks(who, film)
        errors = (self.pooled(self.errors(films[mode])) for mode in ("vgm", "world_model"))
        yield "world_model: above vgm, dB", decibels, *errors
        pairs = zip(self.copy[:, None, 1:], own.frames[:, None, 1:])
        yield "VAE: SSIM", np.mean, np.array([ssim(*pair) for pair in pairs])
        if not self.world.task_agnostic:
            yield "vgm: obeys", np.mean, self.obeys(films["vgm"])

        other = execute(self.world, self.policy, own.actions.roll(1, dims=0))
        film = self.decoded(self.ask("world_model", actions=other.actions).video)
        who = "world_model, other actions"
        yield f"{who}: gripper, px", np.median, self.off(film, other)[:, 0]
        astray, kept = (self.off(x, own)[:, 0] for x in (film, films["world_model"]))
        yield f"{who}: gripper, px from own", np.median, astray
        yield f"{who}: times as far from own", ratio, astray, kept

        latents, actions = answers["joint"]
        replayed = execute(self.world, self.policy, actions.cpu())
        away_from = self.off(films["joint"], replayed)[:, 0]
        yield "joint, replayed: gripper, px from its film", np.median, away_from
        back = self.ask("idm", latents=latents).actions
        yield "joint, idm of its film: R2", r2, back.cpu(), actions.cpu()


def interval(statistic: Callable, *arrays: ndarray) -> list[float]:
    """The figure, and the ends of its interval."""
    count = len(arrays[0])
    rows = np.random.default_rng(0).integers(max(1, count), size=(RESAMPLES, count))
    values = [float(statistic(*(array[row] for array in arrays))) for row in rows]
    return [float(statistic(*arrays)), *np.quantile(values, (0.025, 0.975)).tolist()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.option
    add("--ckpt", str(PRESETS["toy"].backbones / "motus"), "run or checkpoint of stage 3")
    add("--windows", 256, "of each kind")
    add("--steps", int, "Euler steps", nargs="+", default=[2])
    add("--seed", 0, "of layouts")
    add(*DEVICE)
    add("--out", output_file, "json file of the figures")
    args = parser.parse_args(argv)
    policy = Policy.load(args.ckpt, "idm")
    world = observed(args.windows, args.seed)
    found = {}
    for kind in ("expert", "random"):
        truth = Truth(policy, world)
        for policy.steps in args.steps:
            for name, *figure in truth.figures():
                found.setdefault(f"{kind}, {name}", []).append(interval(*figure))
        world.wander()
    stored = vars(args) | {"figures": found}
    if args.out:
        write_json(args.out, stored)
    print(truth_result(stored))


if __name__ == "__main__":
    run_command(main)
