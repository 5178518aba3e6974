"""Many worlds of one simulator in parallel processes: to act in, all at once (`Fleet`), and to
record the expert in, one after the other.

A simulator's pictures come from the processor, and its graphics context survives no fork: every
process opens its own. What happens in a world depends on its seed and on the actions alone, so
results are the same for any number of processes.

Shapes: n worlds, H W pixels, A action dimensions, P state dimensions, T actions of an episode.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from multiprocessing.connection import Connection

import numpy as np
from numpy import ndarray

from worlds import World, simulator

# A server that has opened no context and no threads forks the processes.
PROCESSES = multiprocessing.get_context("forkserver")
LOST = "ended without a word (killed, or out of memory?)"
SHOVES = 1.0  # per second, on average
SHOVE = 0.2  # seconds that each lasts


Settings = tuple[tuple[str, object], ...]


def made(sim: str, task: str, settings: dict | Settings) -> World:
    """A new world; ValueError that says what it needs if its libraries fail, which without a
    graphics library they do in any way."""
    module = simulator(sim)
    try:
        return module.make(task, **dict(settings))
    except ValueError:
        raise
    except Exception as error:
        needs = getattr(module, "MISSING", "is all that it needs installed?")
        raise ValueError(f"simulator {sim}: {type(error).__name__}: {error}; {needs}") from error


# The world that this process used last, so that a graphics context serves many episodes.
opened = lru_cache(maxsize=1)(made)

# -- acting ---------------------------------------------------------------------------------------


def serve(pipe: Connection, sim: str, task: str, settings: dict | Settings, count: int) -> None:
    """Holds `count` worlds. An order is the name of a method and, for each world, its arguments or
    None; the answer is what it gave, success and instruction of each. The first error ends the
    process and is told to the other side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side ends this one
    try:
        worlds = [made(sim, task, settings) for _ in range(count)]
        one = worlds[0]
        pipe.send((None, (one.fps, one.max_steps, one.action_dim)))
        while True:
            name, arguments = pipe.recv()
            answers = []
            for world, given in zip(worlds, arguments):
                result = None if given is None else getattr(world, name)(*given)
                answers.append((result, world.success, getattr(world, "instruction", "")))
            pipe.send((None, answers))
    except EOFError:  # the other side is gone
        return
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", None))


class Fleet(AbstractContextManager):
    """Up to n worlds of one task behind the methods that acting in many worlds needs
    (`evaluate.rollout`). `view` makes the one picture that a policy sees, (H, W, 3), of a camera's
    pictures. A solved world is neither moved nor looked at."""

    def __init__(
        self,
        sim: str,
        task: str,
        n: int,
        view: Callable[[dict], ndarray],
        settings: dict | Settings = (),
        workers: int = 1,
    ):
        self.size = n
        self.task = task
        self.view = view
        self.shares = np.array_split(np.arange(n), min(n, workers))
        self.pipes = []
        self.processes = []
        for share in self.shares:
            ours, theirs = PROCESSES.Pipe()
            arguments = (theirs, sim, task, settings, len(share))
            process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            self.fps, self.max_steps, self.action_dim = self._answer(pipe)

    def _answer(self, pipe: Connection) -> object:
        try:
            error, answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            error = f"a process with worlds {LOST}; try a smaller --batch"
        if error:
            self.__exit__()
            raise ValueError(error)
        return answer

    def call(self, name: str, arguments: Sequence[tuple | None]) -> list:
        """Calls a method of every world that has arguments; the result of each."""
        arguments = [*arguments, *[None] * (self.size - len(arguments))]
        for pipe, share in zip(self.pipes, self.shares):
            with suppress(BrokenPipeError):  # `_answer` tells what has happened
                pipe.send((name, [arguments[i] for i in share]))
        answers = [row for pipe in self.pipes for row in self._answer(pipe)]
        given, success, self.instruction = map(list, zip(*answers[: self.n]))
        self.success = np.array(success)
        return given

    def call_unsolved(self, name: str, arguments: Iterable[tuple] = repeat(())) -> list:
        """The results of a method; None where a world is solved."""
        return self.call(name, [None if done else a for done, a in zip(self.success, arguments)])

    def reset(self, seeds: Sequence[int]) -> None:
        """One world for each seed, at most `size`."""
        if len(seeds) > self.size:
            raise ValueError(f"{len(seeds)} seeds for {self.size} worlds")
        self.n = len(seeds)
        self.group = [self.task] * self.n
        self.seen = self.call("reset", [(seed,) for seed in seeds])

    def observe(self) -> dict:
        """image (n, H, W, 3) uint8, state (n, P), instruction; of a solved world what was last
        seen."""
        self.seen = [new or old for new, old in zip(self.call_unsolved("observe"), self.seen)]
        return {
            "image": np.stack([self.view(seen["images"]) for seen in self.seen]),
            "state": np.stack([seen["state"] for seen in self.seen]),
            "instruction": self.instruction,
        }

    def render(self) -> ndarray:
        """Pictures as a policy would see them, (n, H, W, 3) uint8, of all worlds."""
        return np.stack([self.view(images) for images in self.call("render", [()] * self.n)])

    def advance(self, actions: ndarray) -> None:
        """actions (n, A), one for each world that is not solved."""
        self.call_unsolved("step", zip(actions))

    def expert(self) -> ndarray:
        """The expert's actions (k, A) in the k worlds that are not solved."""
        return np.stack([action for action in self.call_unsolved("expert") if action is not None])

    def __exit__(self, *_) -> None:
        for pipe in self.pipes:
            pipe.close()  # ends the loop of `serve`
        for process in self.processes:
            process.join(5)
            process.terminate()  # if it is still alive


# -- recording ------------------------------------------------------------------------------------


@dataclass
class Recording:
    """One try of the expert. Row i is what was seen before action i; the action is the expert's
    own, also where another was executed."""

    task: str
    seed: int
    disturbed: bool
    success: bool
    seconds: float  # of processor time
    robot: str
    fps: float
    instruction: str = ""
    # Empty without success: camera -> T pictures (H, W, 3), and name -> T numbers, `World.labels`.
    frames: dict[str, list[ndarray]] = field(default_factory=dict)
    labels: dict[str, list[float]] = field(default_factory=dict)
    states: ndarray | None = None  # (T, P)
    actions: ndarray | None = None  # (T, A)


@dataclass(frozen=True)
class Order:
    """An episode to record: a share `disturbed` of the episodes is executed with `noise`, the std
    of what is added to every action, and `recovery`, the std of shoves that last a moment, both in
    robot units. Rows end `after` actions after success."""

    sim: str
    task: str = ""
    settings: Settings = ()
    seed: int = 0
    noise: float = 0.0
    recovery: float = 0.0
    disturbed: float = 0.5
    after: int = 4


def attempt(order: Order) -> Recording:
    """Plays the expert once. The disturbed teach how to recover, for what is stored is what the
    expert would have done."""
    begun = time.process_time()
    world = opened(order.sim, order.task, order.settings)
    rng = np.random.default_rng([order.seed, 2])
    disturbed = (order.noise > 0 or order.recovery > 0) and rng.random() < order.disturbed
    seen = world.reset(order.seed)
    rows = []
    left = order.after
    pushed = 0
    while len(rows) < world.max_steps and left > 0:
        action = world.expert()
        rows.append((seen["images"], seen["state"], action, world.labels()))
        if disturbed:
            if pushed == 0 and rng.random() < SHOVES / world.fps:
                shove = order.recovery * rng.standard_normal(action.shape)
                pushed = max(1, round(SHOVE * world.fps))
            action = action + order.noise * rng.standard_normal(action.shape)
            if pushed > 0:
                action += shove
                pushed -= 1
        world.step(action)
        left -= world.success
        seen = world.observe()
    seconds = time.process_time() - begun
    result = Recording(
        order.task,
        order.seed,
        disturbed,
        world.success,
        seconds,
        world.robot,
        world.fps,
        world.instruction,
    )
    if world.success:
        images, states, actions, labels = zip(*rows)
        result.frames = columns(images)
        result.labels = columns(labels)
        result.states = np.stack(states)
        result.actions = np.stack(actions).astype(np.float32)
    return result


def columns(rows: Sequence[dict]) -> dict[str, list]:
    """Rows by name -> lists by name."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def attempts(orders: Iterable[Order], workers: int) -> Iterator[Recording]:
    """Their recordings in order, made by so many processes."""
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, PROCESSES, signal.signal, ignore) as pool:
        try:
            yield from pool.map(attempt, orders)
        except BrokenProcessPool as error:
            raise ValueError(f"a process that records {LOST}; try fewer --workers") from error
