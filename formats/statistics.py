"""Statistics."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

# -- normalisation --------------------------------------------------------------------------------

KINDS = ("mean_std", "min_max", "quantile", "none")


@dataclass(frozen=True)
class Moments:
    """Count, mean, squared deviation and range of rows; the moments of a whole are the sum of those
    of its parts."""

    count: int
    mean: np.ndarray
    square: np.ndarray  # sum of squared deviations from the mean
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        return cls(len(rows), mean, ((rows - mean) ** 2).sum(0), rows.min(0), rows.max(0))

    def packed(self) -> Tensor:
        """As a tensor (5, dim), fp64."""
        return torch.from_numpy(
            np.stack(
                [np.full_like(self.mean, self.count), self.mean, self.square, self.min, self.max]
            )
        )

    @classmethod
    def unpacked(cls, tensor: Tensor) -> "Moments":
        count, *rest = tensor.numpy()
        return cls(int(count[0]), *rest)

    def __add__(self, other: "Moments") -> "Moments":
        count, gap = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * other.count / count,
            self.square + other.square + gap**2 * self.count * other.count / count,
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
        )


@dataclass(frozen=True)
class Sample:
    """At most MOST rows, those with the smallest keys: the same whatever parts it was merged from.
    All rows if there are no more."""

    keys: np.ndarray  # (n,) uniform
    rows: np.ndarray  # (n, dim)
    MOST = 1 << 16

    def packed(self) -> Tensor:
        """As a tensor (n, 1 + dim), fp64, which holds fp32 rows exactly."""
        return torch.from_numpy(np.column_stack([self.keys, self.rows]))

    @classmethod
    def unpacked(cls, tensor: Tensor) -> "Sample":
        return cls(tensor[:, 0].numpy(), tensor[:, 1:].float().numpy())

    def __add__(self, other: "Sample") -> "Sample":
        keys, rows = (
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.rows, other.rows]),
        )
        kept = np.argsort(keys, kind="stable")[: self.MOST]
        return Sample(keys[kept], rows[kept])


@dataclass(frozen=True)
class Normaliser:
    """What is known of a robot's numbers, per dimension, and how the network sees them: (x -
    offset) / scale. Stored with every checkpoint. `kind`: mean_std; min_max to [0, 1], as official
    Motus does for real robots; quantile, q01..q99 to [-1, 1]; none."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...] = ()
    max: tuple[float, ...] = ()
    q01: tuple[float, ...] = ()
    q99: tuple[float, ...] = ()
    kind: str = "mean_std"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"normalise is {self.kind!r}; allowed: {', '.join(KINDS)}")

    @classmethod
    def of(cls, moments: Moments, sample: Sample, kind: str = "mean_std") -> "Normaliser":
        """A dimension that never moves keeps its scale (std 1)."""
        std = np.sqrt(moments.square / moments.count)
        found = (
            moments.mean,
            np.where(std < 1e-6, 1.0, std),
            moments.min,
            moments.max,
            *np.quantile(sample.rows, (0.01, 0.99), axis=0),
        )
        return cls(*(tuple(np.asarray(values, np.float64).tolist()) for values in found), kind)

    @classmethod
    def fit(cls, rows: np.ndarray) -> "Normaliser":
        """rows (n, dim)."""
        rows = np.asarray(rows, np.float64)
        if not len(rows) or not np.isfinite(rows).all():
            raise ValueError(
                f"cannot normalise {len(rows)} rows of which {int((~np.isfinite(rows)).any(1).sum())} are not finite"
            )
        return cls.of(Moments.of(rows), Sample(np.zeros(len(rows)), rows))

    @property
    def scale(self) -> tuple[float, ...]:
        spans = {
            "mean_std": self.std,
            "min_max": np.subtract(self.max, self.min),
            "quantile": np.subtract(self.q99, self.q01) / 2,
        }
        return tuple(
            float(s) if s > 1e-6 else 1.0 for s in spans.get(self.kind, np.ones(len(self.mean)))
        )

    @property
    def offset(self) -> tuple[float, ...]:
        middles = {
            "mean_std": self.mean,
            "min_max": self.min,
            "quantile": np.add(self.q99, self.q01) / 2,
        }
        return tuple(float(m) for m in middles.get(self.kind, np.zeros(len(self.mean))))

    def apply(self, x: Tensor) -> Tensor:
        return (x - x.new_tensor(self.offset)) / x.new_tensor(self.scale)

    def invert(self, x: Tensor) -> Tensor:
        return x * x.new_tensor(self.scale) + x.new_tensor(self.offset)


@dataclass(frozen=True)
class Statistics:
    """What a checkpoint knows about a robot: how its actions and state are normalised, the rates,
    what it sees, the embodiment."""

    embodiment: str
    rate: int  # action steps per video frame
    actions: Normaliser | None = None
    state: Normaliser | None = None
    action_hz: float = 0.0  # 0: not known (the toy world's steps, published files)
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
        if robot not in (names if robot or len(known) > 1 else [""]):
            raise ValueError(
                f"robot is {robot!r}; this checkpoint knows {', '.join(map(repr, names))}: name one of them"
            )
        stored = known[names.index(robot) if robot else 0]
        unknown = set(stored) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(
                f"statistics have unknown fields {sorted(unknown)}; allowed: {[f.name for f in fields(cls)]}"
            )
        tuples = lambda d: {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        return cls(
            **{
                k: Normaliser(**tuples(v)) if isinstance(v, dict) else v
                for k, v in tuples(stored).items()
            }
        )


def as_stored(robots: Sequence[Statistics]) -> dict | None:
    """For a checkpoint's card: one robot as itself, several as a list, none as None."""
    stored = [robot.as_json() for robot in robots]
    return stored[0] if len(stored) == 1 else {"robots": stored} if stored else None
