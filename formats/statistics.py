"""What is known of a robot's numbers, and how the network sees them.

Blocks of rows are measured by whoever reads them and added up in one order, so that the result is
the same for any number of ranks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from weights.files import as_tuples, check_keys

KINDS = ("mean_std", "min_max", "quantile", "none")
MOST = 1 << 16  # rows of a robot from which quantiles are taken; of more, about so many are drawn


def moments(rows: Tensor) -> Tensor:
    """Of rows (n, dim) fp64: count, mean, sum of squared deviations, minimum, maximum (5, dim)."""
    count = torch.full_like(rows[0], len(rows))
    mean = rows.mean(0)
    square = (rows - mean).square().sum(0)
    return torch.stack([count, mean, square, rows.amin(0), rows.amax(0)])


def pooled(blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Count, mean, standard deviation, minimum, maximum (dim,) of all blocks of `moments`."""
    count, mean, square, low, high = torch.stack(blocks, dim=1)  # (blocks, dim) each
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    std = ((square + count * (mean - centre).square()).sum(0) / total).sqrt()
    return total, centre, std, low.amin(0), high.amax(0)


def measured(rows: np.ndarray, name: str, total: int, seed: int) -> dict[str, Tensor]:
    """Of a block of rows (n, dim) its `moments` under moments/NAME, and rows for quantiles under
    rows/NAME: all of them, or a share if the robot has more than MOST in `total`."""
    rows = torch.from_numpy(rows).double()
    drawn = np.random.default_rng(seed).random(len(rows)) < MOST / total
    return {f"moments/{name}": moments(rows), f"rows/{name}": rows[drawn]}


@dataclass(frozen=True)
class Normaliser:
    """A robot's state or actions, per dimension: the network sees (x - offset) / scale. Stored with
    every checkpoint. `kind`: mean_std; min_max to [0, 1], as official Motus does for real robots;
    quantile, q01..q99 to [-1, 1]; none."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...] = ()
    max: tuple[float, ...] = ()
    q01: tuple[float, ...] = ()
    q99: tuple[float, ...] = ()
    kind: str = "mean_std"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"normalise is {self.kind!r}; expected one of {', '.join(KINDS)}")

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], name: str, kind: str = "mean_std"
    ) -> "Normaliser | None":
        """From what `measured` found under names that begin with `name`; None if there is nothing.
        A dimension that never moves keeps its scale (std 1)."""
        blocks, rows = (
            [tensors[key] for key in sorted(tensors) if key.startswith(f"{part}/{name}")]
            for part in ("moments", "rows")
        )
        if not blocks:
            return None
        _, centre, std, low, high = pooled(blocks)
        std = torch.where(std < 1e-6, 1.0, std)
        ends = torch.from_numpy(np.quantile(torch.cat(rows).numpy(), (0.01, 0.99), axis=0))
        return cls(*(tuple(x.tolist()) for x in (centre, std, low, high, *ends)), kind)

    @cached_property
    def line(self) -> tuple[list[float], list[float]]:
        """Offset and scale."""
        low, high, q01, q99 = map(np.array, (self.min, self.max, self.q01, self.q99))
        kinds = {
            "mean_std": (self.mean, self.std),
            "min_max": (low, high - low),
            "quantile": ((q99 + q01) / 2, (q99 - q01) / 2),
            "none": np.multiply.outer((0.0, 1.0), np.ones(len(self.mean))),
        }
        offset, spans = np.array(kinds[self.kind])
        return offset.tolist(), np.where(spans > 1e-6, spans, 1.0).tolist()

    @property
    def scale(self) -> list[float]:
        return self.line[1]

    def apply(self, x: Tensor) -> Tensor:
        offset, scale = map(x.new_tensor, self.line)
        return (x - offset) / scale

    def invert(self, x: Tensor) -> Tensor:
        offset, scale = map(x.new_tensor, self.line)
        return x * scale + offset


@dataclass(frozen=True)
class Statistics:
    """A robot as a checkpoint knows it: its name, its rates, what it sees, and how its actions and
    state are normalised."""

    embodiment: str
    rate: int  # action steps per video frame
    actions: Normaliser | None = None
    state: Normaliser | None = None
    action_hz: float = 0.0  # 0: not known (published files)
    cameras: tuple[str, ...] = ()  # of the robot, in the order in which they make the picture
    t_layout: bool = False  # three cameras, as one picture
    size: tuple[int, int] = ()  # of the picture that the model sees

    def as_json(self) -> dict:
        """As json gives it back: lists, no tuples, so that a stored one equals a new one."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, stored: dict, robot: str = "") -> "Statistics":
        """Of a checkpoint's robots the one named; a checkpoint of a single robot needs no name."""
        known = stored.get("robots", [stored])
        names = [one.get("embodiment") for one in known]
        if robot not in names and (robot or len(known) > 1):
            raise ValueError(
                f"robot is {robot!r}; this checkpoint knows {', '.join(map(repr, names))}: name "
                "one of them"
            )
        stored = known[names.index(robot) if robot else 0]
        check_keys(stored, cls, "statistics")
        values = as_tuples(stored)
        for column in ("actions", "state"):
            if values.get(column):
                values[column] = Normaliser(**as_tuples(values[column]))
        return cls(**values)


def as_stored(robots: Sequence[Statistics]) -> dict | None:
    """For a checkpoint's card: one robot as itself, several as a list, none as None."""
    stored = [robot.as_json() for robot in robots]
    if len(stored) < 2:
        return stored[0] if stored else None
    return {"robots": stored}
