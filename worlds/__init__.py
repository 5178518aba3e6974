"""Worlds to act in, and the few methods that scripts.evaluate asks of one: `World`, one scene with
one robot.

A simulator is a module with TASKS, the instruction of each task, and `make(task, **settings) ->
World`. Those of the repository are files of this folder; yours may lie anywhere that Python finds
it, for example my_robot.py:

    from worlds import World

    TASKS = {"lift": "lift the cup"}

    class Cup(World):
        robot, fps, max_steps, action_dim = "my arm", 20, 100, 7
        instruction = TASKS["lift"]

        def __init__(self, task, size=96): ...
        def reset(self, seed): ...; self.success = False; return self.observe()
        def step(self, action): ...; self.success |= bool(...)
        def state(self): return np.float32([...])
        def render(self): return {"front": picture}
        def expert(self): return action                 # only to record demonstrations

    make = Cup

    python -m scripts.evaluate --sim my_robot --ckpt runs/lift     # PYTHONPATH=. in its folder

A simulator that holds many worlds at once may offer `many(tasks, n, **settings)` too, with the
members of fleet.Fleet (toy.py); each seed then draws one of the tasks.

Shapes: H W pixels, A action dimensions, P state dimensions.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType

import numpy as np
from numpy import ndarray

# Streams of seeds: no scene that is recorded is one that a policy is tried on.
RECORDED = 0
EVALUATED = 1


class World(ABC):
    """One scene with one robot. A world depends on the seed of its last `reset` and on the actions
    since, on nothing else."""

    robot: str  # name of the embodiment
    fps: float  # actions per second
    max_steps: int  # actions after which an episode has failed
    action_dim: int
    instruction: str  # what to do, as text
    success: bool = False  # whether it has been done at any time since `reset`

    @abstractmethod
    def reset(self, seed: int) -> dict:
        """Starts the scene of a seed (0 to 2**32 - 1) and returns `observe()`."""

    @abstractmethod
    def step(self, action: ndarray) -> None:
        """One action (A,) in robot units, clipped to what the robot can do. ValueError for another
        shape or what is not finite."""

    @abstractmethod
    def state(self) -> ndarray:
        """The robot's own sense of itself: (P,) float32, nothing that a real one would not know."""

    @abstractmethod
    def render(self) -> dict[str, ndarray]:
        """Camera -> picture (H, W, 3) uint8, upright. An episode's pictures are all alike in size
        and switches."""

    def observe(self) -> dict:
        """All that a policy sees now: `images` as rendered, and `state`."""
        return {"images": self.render(), "state": self.state()}

    def labels(self) -> dict[str, float]:
        """Knowledge of the simulator that no robot has, for recordings: first "object x" and
        "object y", the place of the thing that the instruction names in the first camera's picture
        (0 to 1 from left and top), then what else is worth seeing. The frozen backbones learn to
        tell it from picture and instruction (`scripts.pretrain`); a policy is never given it."""
        return {}

    def expert(self) -> ndarray:
        """The scripted expert's action (A,) for the present state, within what the robot can do."""
        raise ValueError(
            f"{type(self).__name__} has no scripted expert; bring demonstrations as a LeRobot "
            "dataset"
        )


def checked(action: ndarray, world: World) -> ndarray:
    """The action as (A,) float64."""
    action = np.asarray(action, float)
    if action.shape != (world.action_dim,) or not np.isfinite(action).all():
        raise ValueError(
            f"action is {action}; expected {world.action_dim} finite numbers for {world.robot}"
        )
    return action


def as_labels(
    points: Mapping[str, ndarray], opening: float, places: Iterable[ndarray] = ()
) -> dict[str, float]:
    """`World.labels` of named points in metres, with their places (n, 2) in the first camera's
    picture where there is one."""
    found = {}
    for name, place in zip(points, places):
        found |= {f"{name} {axis}": value for axis, value in zip("xy", place)}
    found["opening"] = opening
    for name, point in points.items():
        found |= {f"{name} {axis} m": value for axis, value in zip("xyz", point)}
    return found


def choice(value: object, allowed: Collection, field: str = "task") -> object:
    """The value, if it is one of these."""
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; expected one of {', '.join(map(str, allowed))}")
    return value


def names(text: str, allowed: Collection, field: str) -> list[str]:
    """A list with commas, each one allowed."""
    return [choice(name, allowed, field) for name in text.split(",") if name]


def simulator(name: str) -> ModuleType:
    """A file of this folder, or any other module that Python finds."""
    own = f"worlds.{name}"
    try:
        found = importlib.import_module(
            own if "." not in name and importlib.util.find_spec(own) else name
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"simulator {name!r} is not found ({error}); name a file of worlds/, or a module on "
            "PYTHONPATH"
        ) from error
    if not (hasattr(found, "TASKS") and hasattr(found, "make")):
        raise ValueError(
            f"module {found.__name__} is no simulator; expected TASKS and make(task, **settings), "
            "as worlds/__init__.py says"
        )
    return found


def episode_seeds(seed: int, stream: int, count: int) -> list[int]:
    """Seeds of episodes: the first k of more are the same k."""
    return np.random.SeedSequence([seed, stream]).generate_state(count).tolist()
