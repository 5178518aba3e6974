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
from motus import PRESETS
from sample import Policy, moving_region, ssim
from scripts.detector import Detector
from scripts.readme import truth_result
from weights.files import write_json
from weights.options import DEVICE, Parser, output_file, run_command
from worlds import EVALUATED, episode_seeds
from worlds.render import Snapshot, distance, norm
from worlds.robots import IMAGE
from worlds.tabletop import Tabletop

STARTS = 32  # steps that the expert has made at most when a window begins
MOVED = 1.5  # pixels by which a disc has moved
RESAMPLES = 300


# -- what the simulator says ----------------------------------------------------------------------


class Windows(NamedTuple):
    """Actions in n worlds, and what came of them."""

    frames: Tensor  # (n, 1+F, H, W, 3) uint8
    actions: ndarray  # (n, S, A) in robot units
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


def execute(world: Tabletop, policy: Policy, actions: ndarray | None = None) -> Windows:
    """Carries out `actions`, by default the expert's, in a copy of the worlds."""
    world = deepcopy(world)
    frames = [world.render()]
    done = []
    for step in range(policy.model.config.chunk):
        done.append(world.expert() if actions is None else actions[:, step])
        world.advance(done[-1])
        if (step + 1) % policy.statistics.rate == 0:
            frames.append(world.render())
    frames = torch.tensor(np.stack(frames, axis=1))
    return Windows(frames, np.stack(done, axis=1), world.snapshot())


# -- figures --------------------------------------------------------------------------------------


def r2(found: ndarray, truth: ndarray) -> float:
    return 1 - np.square(found - truth).sum() / np.square(truth - truth.mean(axis=0)).sum()


def ratio(above: ndarray, below: ndarray) -> float:
    return above.sum() / below.sum()


def decibels(above: ndarray, below: ndarray) -> float:
    return 10 * np.log10(ratio(above, below))


def of_medians(above: ndarray, below: ndarray) -> float:
    return np.median(above) / np.median(below)


def away(found: ndarray, truth: ndarray) -> ndarray:
    """Pixels between places (..., 2)."""
    return IMAGE * distance(found, truth)


def gradients(film: Tensor) -> Tensor:
    """Energy of the gradient (n, F, H, W)."""
    down, right = torch.gradient(film[:, 1:].double().mean(dim=-1), dim=(2, 3))
    return down.square() + right.square()


class Truth:
    """n worlds, one set of actions in them, `own`, what came of them, and a policy to be asked."""

    def __init__(self, policy: Policy, world: Tabletop):
        self.policy = policy
        self.world = world
        self.detector = Detector.shipped()
        self.own = execute(world, policy)
        frames, actions, _ = self.own
        self.region = moving_region(frames[:, :1], frames[:, 1:])
        state = policy.statistics.state.apply(torch.tensor(world.state()))
        batch = data.Batch(frames, None, world.instruction, state, self.normal(actions))
        self.inputs = data.encode(batch, policy.backbones).to(policy.device)
        self.copy = policy.backbones.decode_video(self.inputs.latents).cpu()

    def normal(self, actions: ndarray) -> Tensor:
        """As the network sees them."""
        return self.policy.statistics.actions.apply(torch.tensor(actions).float())

    def ask(self, mode: str, **given: Tensor) -> tuple[Tensor | None, ndarray | None]:
        """The film (n, 1+F, H, W, 3) uint8 and the actions (n, S, A) in robot units that a mode
        makes, where it makes any; `given` stands in for the truth."""
        policy = self.policy
        policy.generator.manual_seed(0)
        film, actions = policy.sample(replace(self.inputs, **given).to(policy.device), mode)
        if film is not None:
            film = policy.backbones.decode_video(film).cpu()
        if actions is not None:
            actions = policy.statistics.actions.invert(actions.float()).cpu().numpy()
        return film, actions

    def see(self, film: Tensor) -> tuple[ndarray, ndarray, ndarray]:
        """In the last frame: the gripper (n, 2), the discs (n, D, 2), and whether these are there
        (n, D)."""
        places, there = self.detector.see(film[:, -1])
        discs = np.arange(len(film))[:, None], 1 + self.world.colours
        return places[:, 0], places[discs], there[discs]

    def pooled(self, values: Tensor) -> ndarray:
        """Sum (n,) of values (n, F, H, W) in the moving region."""
        return (values * self.region).sum(dim=(1, 2, 3)).numpy()

    def errors(self, film: Tensor) -> Tensor:
        """Squared (n, F, H, W), in units of the whole range."""
        return ((film[:, 1:].double() - self.own.frames[:, 1:]) / 255).square().mean(dim=-1)

    def places(self, film: Tensor) -> Iterator[tuple]:
        """Name, statistic and arrays with a row per window, or per disc that moved."""
        truth = self.own.shot
        moved = away(truth.discs, self.world.discs) > MOVED
        gripper, discs, there = self.see(film)
        yield "gripper, px", np.median, away(gripper, truth.effector)
        yield "moved disc, px", np.median, away(discs, truth.discs)[moved]
        yield "moved disc there", np.mean, there[moved]

    def looks(self, film: Tensor) -> Iterator[tuple]:
        yield "sharpness", ratio, *(self.pooled(gradients(x)) for x in (film, self.copy))
        error = self.errors(film)
        yield "PSNR dB", decibels, np.ones(len(film)), error.mean(dim=(1, 2, 3)).numpy()
        yield "PSNR moving dB", decibels, self.pooled(torch.ones(())), self.pooled(error)

    def acts(self, actions: ndarray) -> Iterator[tuple]:
        for i, name in enumerate(("x", "y", "opening")):
            yield f"{name}, R2", r2, actions[..., i], self.own.actions[..., i]

    def obeys(self, film: Tensor) -> ndarray:
        """Whether a film moves the named disc and no other, where the expert does."""
        world = self.world
        _, discs, _ = self.see(film)
        way = world.goal - world.disc
        way *= IMAGE / norm(way)[:, None]
        found, true = (
            ((x - world.discs)[world.named] * way).sum(axis=1) for x in (discs, self.own.shot.discs)
        )
        strays = (away(discs, world.discs) > 2 * MOVED) & ~world.named
        return ((found > true / 2) & ~strays.any(axis=1))[true > MOVED]

    def figures(self) -> Iterator[tuple]:
        """Those of every mode, at the policy's number of Euler steps."""
        own = self.own
        answers = {mode: self.ask(mode) for mode in MODES}
        acts = {mode: actions for mode, (_, actions) in answers.items() if actions is not None}
        films = {"VAE": self.copy}
        films |= {mode: film for mode, (film, _) in answers.items() if film is not None}
        measures = (
            (self.places, {"true films": own.frames} | films),
            (self.looks, films),
            (self.acts, acts),
        )
        for of, found in measures:
            for mode, what in found.items():
                for name, *figure in of(what):
                    yield f"{mode}: {name}", *figure
        pairs = zip(self.copy[:, None, 1:], own.frames[:, None, 1:])
        yield "VAE: SSIM", np.mean, np.array([ssim(*pair) for pair in pairs])
        errors = (self.pooled(self.errors(films[mode])) for mode in ("vgm", "world_model"))
        yield "world_model: above vgm, dB", decibels, *errors
        if not self.world.task_agnostic:
            yield "vgm: obeys", np.mean, self.obeys(films["vgm"])

        other = execute(self.world, self.policy, np.roll(own.actions, 1, axis=0))
        film, _ = self.ask("world_model", actions=self.normal(other.actions))
        gripper, *_ = self.see(film)
        from_own = away(gripper, own.shot.effector)
        told = away(self.see(films["world_model"])[0], own.shot.effector)
        who = "world_model, other actions:"
        yield f"{who} gripper, px", np.median, away(gripper, other.shot.effector)
        yield f"{who} gripper, px from own", np.median, from_own
        yield f"{who} times as far from own", of_medians, from_own, told

        film, actions = answers["joint"]
        replayed = execute(self.world, self.policy, actions).shot.effector
        yield (
            "joint, replayed: gripper, px from its film",
            np.median,
            away(self.see(film)[0], replayed),
        )
        _, back = self.ask("idm", latents=self.policy.backbones.encode_video(film))
        yield "joint, idm of its film: R2", r2, back, actions


def interval(statistic: Callable, *arrays: ndarray) -> list[float]:
    """The figure, and the ends of its interval."""
    count = len(arrays[0])
    rows = np.random.default_rng(0).integers(max(1, count), size=(RESAMPLES, count))
    values = [statistic(*(array[row] for array in arrays)) for row in rows]
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
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, stored)
    print(truth_result(stored))


if __name__ == "__main__":
    run_command(main)
