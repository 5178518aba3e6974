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
from motus import Prediction
from sample import Policy, moving_region, ssim
from scripts.detector import Detector
from scripts.readme import truth_result
from weights.files import write_json
from weights.options import DEVICE, Parser, output_file, run_command
from worlds import EVALUATED, episode_seeds
from worlds.render import Snapshot, distance
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
    shot: Snapshot  # arrays (n, ...), at the end


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
    robot = policy.statistics
    given = ()
    if actions is not None:
        given = robot.actions.invert(actions).numpy().swapaxes(0, 1)
    done, frames = world.obey(policy.model.config.chunk, robot.rate, given)
    actions = robot.actions.apply(torch.tensor(done).float())
    return Windows(torch.tensor(frames), actions, world.snapshot())


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


class Truth:
    """n worlds, one set of actions in them and what came of it, `own`, and a policy to be asked.
    Figures are a name, a statistic, and its arrays with a row per window, or per disc."""

    def __init__(self, policy: Policy, world: Tabletop):
        self.policy = policy
        self.world = world
        self.detector = Detector.shipped()
        self.own = execute(world, policy)
        frames, actions, _ = self.own
        self.region = moving_region(frames[:, :1], frames[:, 1:])
        state = policy.statistics.state.apply(torch.tensor(world.state()))
        batch = data.Batch(frames, None, world.instruction, state, actions)
        self.inputs = data.encode(batch, policy.backbones)
        self.copy = policy.backbones.decode_video(self.inputs.latents).cpu()

    def ask(self, mode: str, **given: Tensor) -> Prediction:
        """The film (n, 1+F, H, W, 3) and actions (n, S, A) that a mode makes, where it makes any;
        it may be `given` something else than the truth."""
        policy = self.policy
        policy.generator.manual_seed(0)
        film, actions = policy.sample(replace(self.inputs, **given).to(policy.device), mode)
        if film is not None:
            film = policy.backbones.decode_video(film).cpu()
        return Prediction(film, actions if actions is None else actions.float().cpu())

    def seen(self, film: Tensor) -> tuple[ndarray, ndarray, ndarray]:
        """In the last frame: the gripper (n, 2), the discs (n, D, 2), and whether these are there
        (n, D)."""
        places, logits = (found.numpy() for found in self.detector(film[:, -1]))
        discs = np.arange(len(film))[:, None], 1 + self.world.colours
        return places[:, 0], places[discs], logits[discs] > 0

    def off(self, film: Tensor, truth: Windows) -> ndarray:
        """Pixels (n,) from the gripper in a film to where it is in truth."""
        return away(self.seen(film)[0], truth.shot.effector)

    def places(self, who: str, film: Tensor) -> Iterator[tuple]:
        truth = self.own.shot.discs
        moved = away(truth, self.world.discs) > MOVED
        _, discs, there = self.seen(film)
        yield f"{who}: gripper, px", np.median, self.off(film, self.own)
        yield f"{who}: moved disc, px", np.median, away(discs, truth)[moved]
        yield f"{who}: moved disc there", np.mean, there[moved]

    def obeys(self, film: Tensor) -> ndarray:
        """Whether a film moves the named disc and no other, where the expert does."""
        world = self.world
        _, discs, _ = self.seen(film)
        stages = (world.discs, discs, self.own.shot.discs)
        before, found, true = (away(x[world.named], world.goal) for x in stages)
        strays = (away(discs, world.discs) > 2 * MOVED) & ~world.named
        obeys = (before - found > (before - true) / 2) & ~strays.any(axis=1)
        return obeys[before - true > MOVED]

    def looks(self, film: Tensor) -> ndarray:
        """Means (4, n) of the squared error where things move and of all, of the gradient's energy
        where things move, and of whether they do."""
        film, truth = (x[:, 1:].double() / 255 for x in (film, self.own.frames))
        error = (film - truth).square().mean(dim=-1)
        energy = sum(way.square() for way in torch.gradient(film.mean(dim=-1), dim=(2, 3)))
        moving = self.region
        values = torch.stack([moving * error, error, moving * energy, moving])
        return values.mean(dim=(2, 3, 4)).numpy()

    def figures(self) -> Iterator[tuple]:
        """Those of every mode, at the policy's number of Euler steps."""
        own = self.own
        answers = {mode: self.ask(mode) for mode in MODES}
        films = {mode: film for mode, (film, _) in answers.items() if film is not None}
        films["VAE"] = self.copy
        yield from self.places("true films", own.frames)
        looks = {who: self.looks(film) for who, film in films.items()}
        for who, (moving, error, energy, region) in looks.items():
            yield from self.places(who, films[who])
            yield f"{who}: sharpness", ratio, energy, looks["VAE"][2]
            yield f"{who}: PSNR dB", decibels, np.ones(len(error)), error
            yield f"{who}: PSNR moving dB", decibels, region, moving
        yield "world_model: above vgm, dB", decibels, looks["vgm"][0], looks["world_model"][0]
        for mode, (_, actions) in answers.items():
            for i, name in enumerate(("x", "y", "opening") if actions is not None else ()):
                yield f"{mode}: {name}, R2", r2, actions[..., i], own.actions[..., i]
        pairs = zip(self.copy[:, None, 1:], own.frames[:, None, 1:])
        yield "VAE: SSIM", np.mean, np.array([ssim(*pair) for pair in pairs])
        if not self.world.task_agnostic:
            yield "vgm: obeys", np.mean, self.obeys(films["vgm"])

        other = execute(self.world, self.policy, own.actions.roll(1, dims=0))
        film = self.ask("world_model", actions=other.actions).video
        who = "world_model, other actions"
        yield f"{who}: gripper, px", np.median, self.off(film, other)
        astray, kept = (self.off(x, own) for x in (film, films["world_model"]))
        yield f"{who}: gripper, px from own", np.median, astray
        yield f"{who}: times as far from own", ratio, astray, kept

        film, actions = answers["joint"]
        replayed = execute(self.world, self.policy, actions)
        found = self.off(film, replayed)
        yield "joint, replayed: gripper, px from its film", np.median, found
        latents = self.policy.backbones.encode_video(film.to(self.policy.device))
        back = self.ask("idm", latents=latents).actions
        yield "joint, idm of its film: R2", r2, back, actions


def interval(statistic: Callable, *arrays: ndarray) -> list[float]:
    """The figure, and the ends of its interval."""
    count = len(arrays[0])
    rows = np.random.default_rng(0).integers(max(1, count), size=(RESAMPLES, count))
    values = [float(statistic(*(array[row] for array in arrays))) for row in rows]
    return [float(statistic(*arrays)), *np.quantile(values, (0.025, 0.975)).tolist()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.option
    add("--ckpt", "weights/toy/motus", "run or checkpoint of stage 3")
    add("--windows", 256, "of each kind")
    add("--steps", int, "Euler steps", nargs="+", default=[2])
    add("--seed", 0, "of layouts")
    add(*DEVICE)
    add("--out", output_file, "json file of the figures")
    args = parser.parse_args(argv)
    policy = Policy.load(args.ckpt, "idm")
    world = observed(args.windows, args.seed)
    robot = policy.statistics.embodiment
    if robot != world.embodiment.name:
        raise ValueError(
            f"{args.ckpt} acts as {robot}; expected the toy's {world.embodiment.name}: name a run "
            "of preset toy"
        )
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
