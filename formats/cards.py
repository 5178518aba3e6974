"""Where episodes come from: dataset cards, what is known of each robot, and the mix of the pyramid
(paper Sec. 3.3).

A card is a json file that lists datasets with level, robot and weight (docs/data.md). A stage picks
its levels; LeRobot v2.1, v3.0 and official folders are read alike (`Recordings`); every choice that
a card leaves open is made and printed.

    rates        one video rate and one action rate for all; each wanted time takes the row nearest to it, whatever a dataset's fps
    mix          sources by weight, within one of its share in every batch; windows alike, or tasks alike, within a source
    order        a function of (seed, step): batches are resumable to the sample and the same for any number of workers and ranks
    statistics   read once, in blocks of episodes shared out over the ranks, summed in one order: the same for any number of ranks
    held out     the last episodes of each source are never drawn and never counted; `sample.py --data` shows them

Shapes: B batch, F frames, H W pixels, S actions, A action dimensions, P state dimensions, T rows of
an episode.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from formats.latents import LatentColumn, LatentFiles
from formats.lerobot import COLUMN, LeRobotDataset
from formats.official import OfficialFolder, is_official
from formats.recordings import Choice, Recordings, fit, fit_place
from formats.statistics import KINDS, Moments, Normaliser, Sample, Statistics
from motus import PRESETS, MotusConfig, preset
from weights.files import check_keys, read_json

# -- dataset cards --------------------------------------------------------------------------------

VIDEO_HZ = 5.0  # the paper's
BLOCK = 16  # episodes whose numbers are measured together


@dataclass(frozen=True)
class Source:
    """A line of a dataset card: one dataset and its part in the pyramid."""

    path: str  # folder, relative to the card, or USER/NAME[@REVISION] on the hub
    level: int = 6  # of the pyramid, 2 to 6
    embodiment: str = ""  # the robot; default what the dataset says
    weight: float = 1.0  # its share of a batch is its weight among those of the stage's levels
    contains: str = ""  # for people
    mapping: dict = field(
        default_factory=dict
    )  # fields of recordings.Choice: state, action, cameras, t_layout, prefix, ...
    normalise: str = "mean_std"  # or min_max, quantile, none
    ahead: bool | None = (
        # an action is the number one action period later (positions as targets); default: official
        None
    )
    draw: str = (
        ""  # "windows" alike, or "tasks" alike and then their episodes; default: official by tasks
    )
    held_out: int = -1  # episodes at the end that no training sees; default 5 %, rounded down
    latents: str = (
        ""  # folder of latent actions, relative to the card; default latents/NAME beside it
    )

    def __post_init__(self):
        number = lambda x: (
            isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        )
        wrong = [
            (name, value)
            for name, value, good in (
                (
                    "path",
                    self.path,
                    isinstance(self.path, str) and self.path and "\0" not in self.path,
                ),
                ("level", self.level, type(self.level) is int and 2 <= self.level <= 6),
                ("weight", self.weight, number(self.weight) and self.weight > 0),
                ("mapping", self.mapping, isinstance(self.mapping, dict)),
                ("normalise", self.normalise, self.normalise in KINDS),
                ("ahead", self.ahead, self.ahead in (None, True, False)),
                ("draw", self.draw, self.draw in ("", "windows", "tasks")),
                ("held_out", self.held_out, type(self.held_out) is int and self.held_out >= -1),
                *(
                    (name, value, isinstance(value, str))
                    for name, value in (
                        ("embodiment", self.embodiment),
                        ("contains", self.contains),
                        ("latents", self.latents),
                    )
                ),
            )
            if not good
        ]
        if wrong:
            ((name, value),) = wrong[:1]
            raise ValueError(
                f"source {str(self.path)[:80]!r}: {name} is {value!r:.80}; allowed: path of a dataset, level 2 to 6, weight "
                f"above 0, mapping {{field: choice}}, normalise one of {', '.join(KINDS)}, ahead true or false, draw windows "
                "or tasks, held_out a number of episodes, texts for the rest"
            )


class Opened:
    """A source with its reader, and which of its windows are trained on."""

    def __init__(self, source: Source, root: Path):
        folder = root / source.path
        if not folder.is_dir() and (
            source.path.startswith((".", "/")) or source.path.count("/") != 1
        ):
            raise ValueError(
                f"source {source.path}: no folder {folder}; correct the path, which is relative to the card"
            )
        self.reader = open_recordings(folder if folder.is_dir() else source.path, source.mapping)
        official, count = isinstance(self.reader, OfficialFolder), len(self.reader.lengths)
        held = source.held_out if source.held_out >= 0 else count // 20
        if held >= count:
            raise ValueError(
                f"source {source.path}: held_out is {held} of {count} episodes; leave at least one to train on"
            )
        self.source = replace(
            source,
            embodiment=source.embodiment or self.reader.robot,
            held_out=held,
            ahead=official if source.ahead is None else source.ahead,
            draw=source.draw or ("tasks" if official else "windows"),
        )
        self.trained, self.latents = count - held, None
        self.folder = (
            root / source.latents if source.latents else root / "latents" / Path(source.path).name
        )
        group = getattr(self.reader, "group", lambda e: self.reader.episodes[e].tasks[0])
        self.tasks = [group(e) for e in range(self.trained)] if self.source.draw == "tasks" else []

    def plan(self, span: float) -> None:
        """Counts the windows of each episode of which at least half of `span` seconds exist, and
        weighs the episodes."""
        self.counts = np.maximum(1, self.reader.lengths - int(span / 2 * self.reader.fps + 1e-6))
        chance = self.counts[: self.trained].astype(float)
        if self.tasks:  # every task alike, then its episodes
            _, task, size = np.unique(self.tasks, return_inverse=True, return_counts=True)
            chance = 1 / size[task]
        self.edges = np.cumsum(chance) / chance.sum()

    @property
    def hours(self) -> float:
        return float(self.reader.lengths[: self.trained].sum() / self.reader.fps / 3600)


def open_recordings(path: str | Path, mapping: dict | None = None) -> Recordings:
    """The reader that a dataset needs. Where no cameras are chosen: a ready concatenated view, else
    head and two wrists as the T-layout, else the first."""
    choice = Choice.of(mapping)
    if Path(path).is_dir() and not (Path(path) / "meta").exists() and is_official(Path(path)):
        return OfficialFolder(Path(path), choice)
    reader = LeRobotDataset.open(path, choice, quiet=True)
    if choice.cameras or choice.t_layout or len(reader.cameras) < 2:
        return reader
    try:
        return type(reader)(reader.root, replace(choice, t_layout=True))
    except ValueError:  # no three cameras with the names that it takes
        return type(reader)(reader.root, replace(choice, cameras=reader.cameras[:1]))


def tiled(frames: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Views (F, H, W, 3) of one or more cameras, side by side at the height of the first, fitted to
    `size`."""
    views = list(frames.values())
    views = [
        v
        if v.shape[1] == views[0].shape[1]
        else fit(v, views[0].shape[1], round(v.shape[2] * views[0].shape[1] / v.shape[1]))
        for v in views
    ]
    return fit(np.concatenate(views, axis=2), *size)


def placed(places: np.ndarray, frames: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Places (n, 2) in the first camera's picture, 0 to 1 from left and top, where `tiled` puts
    them."""
    (_, height, width, _), *rest = (view.shape for view in frames.values())
    whole = height, width + sum(round(w * height / h) for _, h, w, _ in rest)
    return fit_place(places, (height, width), whole, size)


def widened(x: np.ndarray | Tensor, width: int) -> Tensor:
    """(..., n) with zeros up to (..., width)."""
    return torch.nn.functional.pad(torch.as_tensor(x), (0, width - x.shape[-1]))


def shares(weights: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Which of several groups each of `size` places goes to, in random order: within one of its
    share by weight, in every batch. Equal weights take turns."""
    if np.ptp(weights) == 0:
        return rng.permutation(np.arange(size) % len(weights))
    edges = np.cumsum(weights) / weights.sum()
    return rng.permutation(
        np.searchsorted(edges[:-1], (np.arange(size) + rng.random()) / size, side="right")
    )


class Pyramid:
    """The sources of a dataset card that belong to some levels. `level` takes the place of a card's
    where DATA is a bare dataset."""

    FIELDS = ("sources", "video_hz", "action_hz", "size", "about")

    def __init__(
        self,
        path: str | Path,
        levels: Sequence[int] = (2, 3, 4, 5, 6),
        name: str = "toy",
        robot: str = "",
    ):
        path = Path(path)
        file = path / "card.json" if (path / "card.json").is_file() else path
        if file.is_file():
            self.root, self.name, card = file.resolve().parent, str(file), read_json(file)
        else:
            several = (
                sorted(str(info.parents[1]) for info in path.glob("*/meta/info.json"))
                if path.is_dir()
                else []
            )
            self.root, self.name = Path.cwd(), str(path)
            card = {
                "sources": [{"path": one, "level": max(levels)} for one in several or [str(path)]]
            }
        self.card, base = card, preset(name)
        try:
            sources = self._sources()
        except (TypeError, ValueError) as error:
            raise ValueError(f"card {self.name}: {error}") from error
        known = sorted({source.level for source in sources})
        sources = [source for source in sources if source.level in levels]
        if not sources:
            raise ValueError(
                f"card {self.name}: sources are of levels {known}; this stage takes {list(levels)}: add some, or a stage fits"
            )
        try:
            self.opened = [Opened(source, self.root) for source in sources]
        except ValueError as error:
            raise ValueError(f"card {self.name}: {error}") from error
        self.opened = [o for o in self.opened if robot in ("", o.source.embodiment)]
        if not self.opened:
            raise ValueError(
                f"card {self.name}: robot is {robot!r}; there are {sorted({s.embodiment for s in sources})}"
            )
        widths: dict[str, tuple[int, int]] = {}
        for o in self.opened:
            known_as = (
                widths.setdefault(o.source.embodiment, o.reader.widths)
                if o.reader.widths[1]
                else o.reader.widths
            )
            if known_as != o.reader.widths:
                raise ValueError(
                    f"card {self.name}: source {o.source.path} has {o.reader.widths} numbers of state and action, another "
                    f"of robot {o.source.embodiment!r} {known_as}; give them two names, or choose columns by mapping"
                )
        self.weights = np.array([o.source.weight for o in self.opened])
        self.size = tuple(card.get("size", PRESETS[name].size))
        self._rates(base)

    def _sources(self) -> list[Source]:
        if unknown := set(self.card) - set(self.FIELDS):
            raise ValueError(f"unknown fields {sorted(unknown)}; allowed: {', '.join(self.FIELDS)}")
        if (
            not isinstance(lines := self.card.get("sources"), list)
            or not lines
            or not all(isinstance(line, dict) for line in lines)
        ):
            raise ValueError('sources must be a list with at least one {"path": ..., "level": ...}')
        for i, line in enumerate(lines):
            if "path" not in line:
                raise ValueError(f"source {i} has no path; name its folder, relative to the card")
            check_keys(line, Source, f"source {line.get('path')}")
        for key in ("video_hz", "action_hz"):
            value = self.card.get(key, 1)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 < value <= 1000
            ):
                raise ValueError(f"{key} is {value!r:.50}; a rate above 0 and at most 1000 is due")
        size = self.card.get("size", [32, 32])
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(type(n) is int and 0 < n <= 4096 and n % 16 == 0 for n in size)
        ):
            raise ValueError(f"size is {size!r:.50}; [height, width] in multiples of 16 are due")
        sources = [Source(**line) for line in lines]
        seen = set()
        for source in sources:
            mark = source.path, json.dumps(source.mapping, sort_keys=True)
            if mark in seen:
                raise ValueError(
                    f"source {source.path} is there twice; give it a larger weight instead"
                )
            seen.add(mark)
        return sources

    def _rates(self, base: MotusConfig) -> None:
        """The card's, or: actions at the robot's own rate, video at the paper's 5 Hz or the rate
        next to it that divides that."""
        acting = [o for o in self.opened if o.reader.widths[1]] or self.opened
        top = [
            o.reader.fps for o in acting if o.source.level == max(o.source.level for o in acting)
        ]
        if len(set(top)) > 1 and "action_hz" not in self.card:
            raise ValueError(
                f'card {self.name}: sources of the highest level run at {sorted(set(top))} fps; choose one "action_hz"'
            )
        self.action_hz = float(self.card.get("action_hz", top[0]))
        self.video_hz = float(
            self.card.get("video_hz", self.action_hz / max(1, round(self.action_hz / VIDEO_HZ)))
        )
        ratio = self.action_hz / self.video_hz
        if abs(ratio - round(ratio)) > 1e-6:
            raise ValueError(
                f"card {self.name}: action_hz {self.action_hz:g} is {ratio:g} times video_hz {self.video_hz:g}; choose rates "
                "of which the first is a whole multiple of the second"
            )
        self.ratio, self.frames = round(ratio), base.frames
        for o in self.opened:
            o.plan(self.frames / self.video_hz)

    def config(self, config: MotusConfig) -> MotusConfig:
        """The sizes of a network that acts on this data; one that does not (stages 1 and 2) stays
        as it is."""
        if not config.finetune:
            return config
        state, action = (max(o.reader.widths[i] for o in self.opened) for i in (0, 1))
        if not action:
            raise ValueError(
                f"card {self.name}: no source has actions; this stage learns them: name the column in its mapping"
            )
        return replace(config, ratio=self.ratio, action_dim=action, state_dim=max(1, state))

    # Statistics: each rank reads its share of the episodes once.

    def measure(self, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """This rank's share of what `robots` adds up, under names [robot, state (0) or actions (1),
        block]: moments of blocks of episodes, and samples of rows, which have no block. Held-out
        episodes do not count."""
        found, samples, block = {}, {}, 0
        for i, o in enumerate(self.opened):
            for begin in range(0, o.trained, BLOCK) if o.reader.widths[1] else ():
                if (block := block + 1) % world != rank:
                    continue
                columns = zip(
                    *(o.reader.numbers(e) for e in range(begin, min(begin + BLOCK, o.trained)))
                )
                for which, parts in enumerate(columns):
                    if parts[0] is not None:
                        rows, key = np.concatenate(parts), (o.source.embodiment, which)
                        found[*key, block] = Moments.of(rows)
                        sample = Sample(
                            np.random.default_rng([i, begin]).random(len(rows)),
                            rows.astype(np.float32),
                        )
                        samples[key] = (
                            samples.get(key, Sample(sample.keys[:0], sample.rows[:0])) + sample
                        )
        found |= {(*key, None): sample for key, sample in samples.items()}
        return {json.dumps(key): part.packed() for key, part in found.items()}

    def robots(
        self, acting: bool, measured: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Statistics, ...]:
        """What a checkpoint is to know of each robot; if the stage acts, how its numbers are
        normalised, from what all ranks `measured`."""
        measured = [self.measure()] if acting and measured is None else measured or []
        parts = [(json.loads(key), part) for parts in measured for key, part in parts.items()]

        def normaliser(name: str, which: int, kind: str) -> Normaliser | None:
            blocks = {
                block: part
                for (*key, block), part in parts
                if key == [name, which] and block is not None
            }
            moments = [
                Moments.unpacked(blocks[block]) for block in sorted(blocks)
            ]  # in one order for any number of ranks
            samples = [Sample.unpacked(part) for key, part in parts if key == [name, which, None]]
            return (
                Normaliser.of(
                    reduce(Moments.__add__, moments), reduce(Sample.__add__, samples), kind
                )
                if moments
                else None
            )

        found = []
        for name in sorted(
            {o.source.embodiment for o in self.opened if not acting or o.reader.widths[1]}
        ):
            mine = [
                o
                for o in self.opened
                if o.source.embodiment == name and (not acting or o.reader.widths[1])
            ]
            if len(kinds := {o.source.normalise for o in mine}) > 1:
                raise ValueError(
                    f"card {self.name}: sources of {name} are normalised by {sorted(kinds)}; choose one"
                )
            reader, (kind,) = mine[0].reader, kinds
            views = tuple(camera.removeprefix("observation.images.") for camera in reader.cameras)
            found.append(
                Statistics(
                    name,
                    self.ratio,
                    normaliser(name, 1, kind),
                    normaliser(name, 0, kind),
                    self.action_hz,
                    views,
                    reader.given.t_layout,
                    self.size,
                )
            )
        return tuple(found)

    # Windows.

    def draw(self, size: int, seed: int, step: int) -> Tensor:
        """(B, 3): source, episode and first row of the windows of batch `step`, a function of its
        arguments alone."""
        rng, rows = np.random.default_rng([seed, step]), []
        for i in shares(self.weights, size, rng):
            o = self.opened[i]
            episode = min(int(np.searchsorted(o.edges, rng.random(), side="right")), o.trained - 1)
            rows.append((int(i), episode, int(rng.integers(o.counts[episode]))))
        return torch.tensor(rows)

    def held_out(self, count: int, seed: int) -> Tensor:
        """(B, 3): at most one whole window from each of `count` held-out episodes."""
        rng, span = np.random.default_rng(seed), self.frames / self.video_hz
        room = [
            (i, e, int(o.reader.lengths[e] - span * o.reader.fps))
            for i, o in enumerate(self.opened)
            for e in range(o.trained, len(o.reader.lengths))
        ]
        room = [row for row in room if row[2] > 0]
        if not room:
            raise ValueError(
                f'card {self.name}: no held-out episode is longer than {span:g} s; set "held_out" of a source to more'
            )
        return torch.tensor(
            [
                (room[n][0], room[n][1], int(rng.integers(room[n][2])))
                for n in rng.permutation(len(room))[:count]
            ]
        )

    def window(self, row: Sequence[int], actions: str) -> tuple:
        """Source number, picture (1+F, H, W, 3), mask of it, actions, mask of them, state,
        instruction; `actions`: none, latent or real."""
        i, episode, start = (int(n) for n in row)
        o, frames = self.opened[i], self.frames
        real = actions == "real" and o.reader.widths[1] > 0
        action_times = (
            (np.arange(frames * self.ratio) + o.source.ahead) / self.action_hz if real else ()
        )
        seen = o.reader.window(
            episode, start / o.reader.fps, np.arange(frames + 1) / self.video_hz, action_times
        )
        chunk, mask = (seen.actions, seen.action_mask) if real else (None, None)
        if actions == "latent":
            rows, known = self.latent_rows(i, episode)
            index = np.floor(start + np.arange(frames) / self.video_hz * o.reader.fps + 0.5).astype(
                int
            )
            chunk, mask = (
                rows[np.minimum(index, len(rows) - 1)],
                (index < len(rows)) & known[np.minimum(index, len(rows) - 1)],
            )
        return (
            i,
            tiled(seen.frames, self.size),
            seen.video_mask,
            chunk,
            mask,
            seen.state,
            seen.instruction,
        )

    def latent_rows(self, i: int, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """Latent actions of an episode, a row per frame, and which are known: of an official
        folder, of the dataset's own column, or those beside the card; where a card names a folder,
        that."""
        o = self.opened[i]
        rows = getattr(o.reader, "latents", lambda e: None)(episode)
        if rows is not None:
            return rows, np.ones(len(rows), bool)
        if o.latents is None:
            own = not o.source.latents and COLUMN in getattr(o.reader, "features", {})
            o.latents = LatentColumn(o.reader) if own else LatentFiles(o.folder, o.reader.fps)
        if abs(o.latents.seconds * self.video_hz - 1) > 1e-6:
            raise ValueError(
                f"{o.latents.name}: a latent action spans {o.latents.seconds:g} s, a video step "
                f"{1 / self.video_hz:g} s; encode them with an interval of as many frames, or choose another video_hz"
            )
        return o.latents(episode)

    def describe(self, full: bool = True) -> str:
        """What is used: per source and per level hours, episodes, rows, windows and share of a
        batch; and the rates."""
        total, lines = self.weights.sum(), [f"{self.name}: {len(self.opened)} sources"]
        row = "{:>5}  {:24} {:16} {:>8} {:>9} {:>10} {:>10} {:>7}".format
        lines.append(
            row("level", "source", "embodiment", "hours", "episodes", "rows", "windows", "share")
        )
        figures = [
            (
                o.source.level,
                Path(o.source.path).name[:24],
                o.source.embodiment[:16],
                o.hours,
                o.trained,
                int(o.reader.lengths[: o.trained].sum()),
                int(o.counts[: o.trained].sum()),
                w / total,
            )
            for o, w in zip(self.opened, self.weights)
        ]
        show = lambda level, name, robot, hours, *rest: row(
            level, name, robot, f"{hours:.3f}", *rest[:-1], f"{100 * rest[-1]:.1f} %"
        )
        lines += [show(*figure) for figure in figures]
        for level in sorted({figure[0] for figure in figures}) if len(figures) > 1 else ():
            mine = [figure[3:] for figure in figures if figure[0] == level]
            lines.append(show(level, "all", "", *map(sum, zip(*mine))))
        lines.append(
            f"video at {self.video_hz:g} Hz ({self.frames} frames after the observation), actions at {self.action_hz:g} Hz "
            f"({self.ratio} per frame), pictures {self.size[0]} x {self.size[1]}, "
            f"{sum(o.source.held_out for o in self.opened)} episodes held out"
        )
        for o in self.opened:
            at = np.concatenate(
                [
                    np.arange(self.frames) / self.video_hz,
                    np.arange(self.frames * self.ratio) / self.action_hz,
                ]
            )
            off = np.abs(at * o.reader.fps - np.round(at * o.reader.fps)).max() / o.reader.fps
            if off > 1e-4:
                lines.append(
                    f"{o.source.path}: rows at {o.reader.fps:g} fps are up to {1000 * off:.1f} ms beside the wanted times"
                )
        if full:
            for o in self.opened:
                source = o.source
                lines.append(o.reader.describe())
                lines.append(
                    f"  used     level {source.level}, weight {source.weight:g}, normalised by {source.normalise}, drawn by "
                    f"{source.draw}, {source.held_out} episodes held out{', actions are later positions' * source.ahead}"
                )
        return "\n".join(lines)

    def check(self) -> list[str]:
        """Every fault in every source, and episodes that are in two of them."""
        faults, seen = [fault for o in self.opened for fault in o.reader.check()], {}
        for o in self.opened if not faults else ():
            for e in range(len(o.reader.lengths)):
                rows = [part.tobytes() for part in o.reader.numbers(e) if part is not None]
                path, other = (
                    seen.setdefault(hashlib.sha256(b"".join(rows)).digest(), (o.source.path, e))
                    if rows
                    else ("", e)
                )
                if path not in ("", o.source.path):
                    faults.append(
                        f"card {self.name}, source {o.source.path}, episode {e}: equals episode {other} of {path} number for "
                        "number; drop one of the two"
                    )
        return faults
