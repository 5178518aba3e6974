"""Where episodes come from: dataset cards, what is known of each robot, and the mix of the pyramid
(paper Sec. 3.3).

A card is a json file that lists datasets with level, robot and weight (docs/data.md). A stage picks
its levels; LeRobot v2.1, v3.0, official folders, plain videos and worlds that render are read alike
(`Recordings`); every choice that a card leaves open is made and printed.

    rates        one video rate and one action rate for all; each wanted time takes the nearest row
    mix          sources by weight, within one of its share in every batch; windows alike, or tasks
                 alike, within a source
    order        a function of (seed, step): batches are resumable to the sample and the same for
                 any number of workers and ranks
    statistics   read once, in blocks of episodes shared out over the ranks, summed in one order:
                 the same for any number of ranks
    held out     the last episodes of each source are never drawn and never counted; `sample.py`
                 shows them

Shapes: B batch, F frames, H W pixels, S actions, A action dimensions, P state dimensions, T rows of
an episode.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from formats.latents import about_latents, read_latents
from formats.lerobot import LeRobotDataset
from formats.official import OfficialFolder, is_official
from formats.recordings import Choice, Recordings, Window, fit, fit_place
from formats.rendered import PREFIX, Rendered
from formats.statistics import KINDS, Normaliser, Statistics, measured
from formats.texts import Words
from formats.videos import VideoFolder, video_files
from weights.files import check_keys, check_types, read_json
from weights.hub import snapshot

VIDEO_HZ = 5.0  # the paper's
BLOCK = 16  # episodes whose numbers are measured together
SIDES = range(16, 4097, 16)  # of a picture
COLUMNS = ("state", "actions")  # as `Recordings.numbers` gives them
EPISODES = 100  # that a world renders per level where nobody says how many

# -- a line of a card -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A line of a dataset card: one dataset and its part in the pyramid."""

    path: str  # folder, relative to the card, USER/NAME[@REVISION] on the hub, or world:NAME
    level: int = 0  # of the pyramid, 2 to 6; default 6, without actions 2
    embodiment: str = ""  # the robot; default what the dataset says
    weight: float = 1.0  # its share of a batch is its weight among those of the stage's levels
    contains: str = ""  # for people
    # fields of recordings.Choice: state, action, cameras, t_layout, prefix, ...
    mapping: dict = field(default_factory=dict)
    normalise: str = "mean_std"  # or min_max, quantile, none
    # an action is the number one action period later (positions as targets); default: official
    ahead: bool | None = None
    draw: str = ""  # "windows" or "tasks" alike; default: official by tasks
    # at most so many of a dataset; so many that a world renders, default the run's setting
    episodes: int = 0
    held_out: int = -1  # episodes at the end that no training sees; default 5 %, of three one
    latents: str = ""  # folder of latent actions; default latents/NAME beside the card
    # up to so many pixels of the network's picture two of three windows are moved; state and
    # actions are not, so it is for actions that are changes, not places
    shift: int = 0

    def __post_init__(self):
        label = f"source {self.path!r:.80}"
        check_types(label, self)
        for name, allowed in {"normalise": KINDS, "draw": ("windows", "tasks", "")}.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{label}: {name} is {value!r:.80}; expected {allowed}")
        if self.rendered and not self.level:
            object.__setattr__(self, "level", 6)

    @property
    def rendered(self) -> bool:
        return self.path.startswith(PREFIX)

    def held_of(self, count: int) -> int:
        """Episodes of `count` that are held out."""
        return max(count // 20, int(count > 2)) if self.held_out < 0 else self.held_out


@dataclass(frozen=True)
class CardKeys:
    """Fields of a dataset card."""

    sources: list
    video_hz: float = 0.0
    action_hz: float = 0.0
    size: list | None = None
    about: str = ""  # for people


# -- a source that is open ------------------------------------------------------------------------


class OpenSource:
    """A source with its reader. Episodes from `trained` on are held out."""

    def __init__(self, source: Source, root: Path, episodes: int, seed: int, level: int = 6):
        """`episodes`: how many a world renders, `level` one with actions is of, where the source
        does not say."""
        self.told = bool(source.embodiment)  # which robot it is
        self.trained = source.episodes or episodes
        held = source.held_of(self.trained)
        if source.rendered:
            kind = source.path, source.level, source.embodiment
            self.reader = Rendered(*kind, self.trained, held, seed, source.mapping)
        else:
            self.reader = open_recordings(source.path, root, source.mapping)
            count = len(self.reader.lengths)
            held = source.held_of(count)
            if held >= count:
                raise ValueError(
                    f"source {source.path}: held_out is {held} of {count} episodes; leave at least "
                    "one to train on"
                )
            self.trained = min(count - held, source.episodes or count)
        wrong = self.reader.without - {*range(len(self.reader.lengths))}
        if wrong or not {*range(self.trained)} - self.reader.without:
            raise ValueError(
                f'source {source.path}: "without" is {source.mapping["without"]}; expected numbers '
                f"from 0 to {len(self.reader.lengths) - 1} that leave one to train on"
            )
        self.named = self.told or self.reader.stated
        official = isinstance(self.reader, OfficialFolder)
        self.source = replace(
            source,
            level=source.level or (level if self.reader.widths[1] else 2),
            embodiment=source.embodiment or self.reader.robot,
            held_out=held,
            ahead=official if source.ahead is None else source.ahead,
            draw=source.draw or ("tasks" if official else "windows"),
        )
        self.name = Path(source.path).name
        if source.rendered:
            _, *kind = source.path.split("/")
            self.name = "_".join([f"level{source.level}", self.source.embodiment, *kind])
        self.folder = root / (source.latents or f"latents/{self.name}")
        self.encoded = {}  # episode -> latent actions and which are known
        self.variants = 3 if source.shift else 1  # of each window; the first is not moved

    def plan(self, span: float) -> None:
        """Counts the windows of each episode of which at least half of `span` seconds exist, and
        weighs the episodes."""
        half = int(span / 2 * self.reader.fps + 1e-6)
        there = np.isin(np.arange(self.trained), self.reader.episodes)
        lengths = self.reader.lengths[: self.trained] * there
        self.rows = int(lengths.sum())
        self.counts = chance = np.maximum(1, lengths - half) * there
        self.windows = int(self.counts.sum())
        if self.source.draw == "tasks":  # every task alike, then its episodes
            tasks = [self.reader.group(e) if there[e] else "" for e in range(self.trained)]
            _, task, size = np.unique(tasks, return_inverse=True, return_counts=True)
            chance = there / size[task]
        self.edges = np.cumsum(chance) / chance.sum()

    @cached_property
    def instructions(self) -> set[str]:
        """All that windows are given."""
        given = self.reader.given
        texts = [given.instruction] if self.reader.told else self.reader.wordings()
        return {given.prefix + text for text in texts}

    def latents(
        self, episode: int, video_hz: float, encode: Callable | None
    ) -> tuple[ndarray, ndarray]:
        """Latent actions of an episode, a row per frame, and which are known; kept in memory. Of an
        official folder its own, of a source that knows its flow by `encode`, else from files beside
        the card; where the card names a folder, from that."""
        if episode not in self.encoded:
            self.encoded[episode] = self._latents(episode, video_hz, encode)
        return self.encoded[episode]

    def _latents(
        self, episode: int, video_hz: float, encode: Callable | None
    ) -> tuple[ndarray, ndarray]:
        reader = self.reader
        rows = reader.latents(episode)
        if rows is not None:
            return rows, np.ones(len(rows), bool)
        more = ""
        if reader.flows(0, 1) is not None and not self.source.latents:
            more = "; or name the encoder of its flow by --latent RUN"
        live = more and encode
        if live:
            interval = encode.interval
        else:
            about = about_latents(self.folder, more)
            interval = about["made"]["interval"]
            if encode and about["made"].get("model") not in (None, encode.fingerprint):
                raise ValueError(
                    f"{self.folder}: made by another encoder than that of --latent, whose numbers "
                    "mean something else; encode them again with its weights"
                )
        seconds = interval / reader.fps
        if abs(seconds * video_hz - 1) > 1e-6:
            raise ValueError(
                f"{reader.name if live else self.folder}: a latent action spans {seconds:g} s, a "
                f"video step {1 / video_hz:g} s; encode them with an interval of as many frames, "
                "or choose another video_hz"
            )
        if live:
            return encode(reader.flows(episode, interval))
        return read_latents(self.folder, about, reader, episode)


def open_recordings(path: str, root: Path, mapping: Mapping | None = None) -> Recordings:
    """The reader of a folder, relative to `root`, or of a name on the hub. Where no cameras are
    chosen: a ready concatenated view, else head and two wrists as the T-layout, else the first."""
    choice = Choice.of(mapping)
    folder = root / path
    if not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", path):
            raise ValueError(
                f"source {path}: no folder {folder}, and no hub name; correct the path, which is "
                "relative to the card, or give USER/NAME, with @REVISION if wanted"
            )
        name, _, revision = path.partition("@")
        files = ["meta/**", "data/**", "videos/**"]
        folder = Path(snapshot(name, revision or None, files, repo_type="dataset"))
    if not (folder / "meta").exists():
        if is_official(folder):
            return OfficialFolder(folder, choice)
        if video_files(folder):
            return VideoFolder(folder, choice)
    reader = LeRobotDataset(folder, choice)
    if choice.cameras or choice.t_layout or len(reader.cameras) < 2:
        return reader
    try:
        return LeRobotDataset(folder, replace(choice, t_layout=True))
    except ValueError:  # no three cameras with the names that it takes
        return LeRobotDataset(folder, replace(choice, cameras=reader.cameras[:1]))


# -- pictures and shares --------------------------------------------------------------------------


def tiled(frames: dict[str, ndarray], size: tuple[int, int]) -> ndarray:
    """Views (F, H, W, 3) of one or more cameras, side by side at the height of the first, fitted to
    `size`."""
    views = list(frames.values())
    height = views[0].shape[1]
    views = [fit(v, height, round(v.shape[2] * height / v.shape[1])) for v in views]
    return fit(np.concatenate(views, axis=2), *size)


def shift_film(picture: ndarray, most: int, rng: np.random.Generator) -> ndarray:
    """A film (F, H, W, 3) moved by up to `most` pixels, all frames alike, its border repeated."""
    _, height, width, _ = picture.shape
    top, left = rng.integers(2 * most + 1, size=2)
    wide = np.pad(picture, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    return wide[:, top : top + height, left : left + width]


def placed(places: ndarray, frames: dict[str, ndarray], size: tuple[int, int]) -> ndarray:
    """Places (n, 2) in the first camera's picture, 0 to 1 from left and top, where `tiled` puts
    them."""
    (_, height, width, _), *rest = (view.shape for view in frames.values())
    whole = height, width + sum(round(w * height / h) for _, h, w, _ in rest)
    return fit_place(places, (height, width), whole, size)


def widened(x: ndarray | Tensor, width: int) -> Tensor:
    """(..., n) with zeros up to (..., width)."""
    return torch.nn.functional.pad(torch.as_tensor(x), (0, width - x.shape[-1]))


def shares(weights: ndarray, size: int, rng: np.random.Generator) -> ndarray:
    """Which of several groups each of `size` places goes to, in random order: within one of its
    share by weight, in every batch."""
    edges = np.cumsum(weights) / weights.sum()
    places = (np.arange(size) + rng.random()) / size
    return rng.permutation(np.searchsorted(edges[:-1], places, side="right"))


# -- the pyramid ----------------------------------------------------------------------------------


@dataclass
class Pyramid:
    """The sources of a dataset card that belong to some levels. A bare dataset, or a folder of
    several, is of the highest of them."""

    path: str | Path
    levels: Sequence[int]
    frames: int  # F
    size: tuple[int, int]  # H W of the picture, where the card does not say
    episodes: int = 0  # per level that a world renders, where a source does not say
    seed: int = 0  # of those
    robot: str = ""  # only sources of this one
    # flows to latent actions and which are known; `interval`: rows that one of them spans
    encode: Callable | None = None
    words: Sequence[Words] = ()  # tokenizers that instructions are tried on

    def __post_init__(self):
        self.name = str(self.path)
        root, self.card = self._read(Path(self.path))
        try:
            self.opened = self._open(root, sources_of(self.card))
            self._check_robots()
            self._check_texts()
            self._set_rates()
        except (TypeError, ValueError) as error:
            raise ValueError(f"card {self.name}: {error}") from error
        self.weights = np.array([o.source.weight for o in self.opened])
        self.size = tuple(map(int, self.card.get("size", self.size)))
        for o in self.opened:
            o.plan(self.span)

    def _read(self, path: Path) -> tuple[Path, dict]:
        """The folder that paths are relative to, and the card: of a file, or made up."""
        self.acting = 6  # level of a source with actions whose line says none
        file = path / "card.json" if (path / "card.json").is_file() else path
        if file.is_file():
            self.name = str(file)
            return file.resolve().parent, read_json(file)
        found = sorted(path.glob("*/meta/info.json")) if path.is_dir() else []
        paths = [str(info.parents[1]) for info in found] or [str(path)]
        self.acting = max(self.levels)
        return Path.cwd(), {"sources": [{"path": p} for p in paths]}

    def _open(self, root: Path, sources: list[Source]) -> list[OpenSource]:
        chosen = [source for source in sources if source.level in (0, *self.levels)]
        alike = Counter((source.path, source.level) for source in chosen)
        known = {source.level for source in sources}
        opened = []
        for source in chosen:
            share = math.ceil((self.episodes or EPISODES) / alike[source.path, source.level])
            opened.append(OpenSource(source, root, share, self.seed, self.acting))
            known.add(opened[-1].source.level)
        opened = [o for o in opened if o.source.level in self.levels]
        if not opened:
            raise ValueError(
                f"sources are of levels {sorted(known - {0})}; this stage takes "
                f"{list(self.levels)}: add some, or name a stage that fits (what has no actions is "
                "of level 2 where nobody says otherwise)"
            )
        # Files that name no robot do not say that two of them are of one.
        silent = [o for o in opened if not o.named]
        for o in silent if len(silent) > 1 else ():
            o.source = replace(o.source, embodiment=o.name)
        robots = sorted({o.source.embodiment for o in opened})
        if self.robot and self.robot not in robots:
            raise ValueError(f"robot is {self.robot!r}; expected one of {robots}")
        return [o for o in opened if self.robot in ("", o.source.embodiment)]

    def _check_robots(self) -> None:
        """The numbers of sources of one robot must have one meaning, as far as they say it."""
        first = {}
        for o in self.opened:
            if not o.reader.widths[1]:
                continue
            robot = o.source.embodiment
            other = first.setdefault(robot, o)
            if o.reader.widths != other.reader.widths:
                kinds = {x.reader.widths: x.source.path for x in (o, other)}
                raise ValueError(
                    f"sources of robot {robot!r} have {kinds} numbers of state and action; give "
                    "them two names by embodiment, or choose columns by mapping"
                )
            pairs = zip(other.reader.axes, o.reader.axes)
            other_names = [pair for pair in pairs if all(pair) and pair[0] != pair[1]]
            sure = o.named and other.named and not other_names
            if o is not other and not sure and not (o.told and other.told):
                raise ValueError(
                    f"sources {other.source.path} and {o.source.path} are of robot {robot!r} by "
                    f"their files, the names of whose numbers differ in {other_names}; give each "
                    "its embodiment in a card, the same if the numbers and their units are the same"
                )

    def _check_texts(self) -> None:
        for o in self.opened if self.words else ():
            for text in o.instructions:
                for sign in sum((words.signs(text) for words in self.words), []):
                    raise ValueError(
                        f"source {o.source.path}: instruction {text!r:.200} holds {sign}, a sign "
                        "and no word to the backbones; reword it, or give one by "
                        "mapping.instruction"
                    )

    def notes(self) -> str:
        """Lines that say what is lost of the instructions on their way to the network."""
        texts = dict.fromkeys(text for o in self.opened for text in sorted(o.instructions))
        notes = [note for words in self.words for note in words.notes(texts)]
        return "".join(f"warning  {note}\n" for note in notes)

    def _set_rates(self) -> None:
        """The card's, or: actions at the robot's own rate, video at the paper's 5 Hz or the rate
        next to it that divides that."""
        acting = [o for o in self.opened if o.reader.widths[1]]
        highest = max((o.source.level for o in acting), default=0)
        among = [o for o in acting if o.source.level == highest] or self.opened
        rates = sorted({o.reader.fps for o in among})
        if len(rates) > 1 and acting and "action_hz" not in self.card:
            raise ValueError(
                f'sources of the highest level run at {rates} fps; choose one "action_hz"'
            )
        self.action_hz = float(self.card.get("action_hz", rates[-1]))
        nearest = self.action_hz / max(1, round(self.action_hz / VIDEO_HZ))
        self.video_hz = float(self.card.get("video_hz", nearest))
        ratio = self.action_hz / self.video_hz
        if abs(ratio - round(ratio)) > 1e-6:
            raise ValueError(
                f"action_hz {self.action_hz:g} is {ratio:g} times video_hz {self.video_hz:g}; "
                "expected a whole multiple"
            )
        self.ratio = round(ratio)  # actions per video frame
        for o in self.opened:
            o.reader.follow(self.video_hz)

    @property
    def span(self) -> float:
        """Seconds of a window."""
        return self.frames / self.video_hz

    def see_as(self, robot: Statistics) -> None:
        """Takes the rates and the picture that a checkpoint knows."""
        self.action_hz = robot.action_hz
        self.video_hz = robot.action_hz / robot.rate
        self.ratio = robot.rate
        self.size = robot.size

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions of state and actions of the widest robot."""
        states, actions = zip(*(o.reader.widths for o in self.opened))
        return max(states), max(actions)

    # Statistics: each rank reads its share of the episodes once.

    def measure(self, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """This rank's share of what `robots` adds up, `measured` in blocks of episodes under names
        ROBOT/COLUMN/BLOCK, where COLUMN is state or actions. Held-out episodes do not count."""
        acting = [o for o in self.opened if o.reader.widths[1]]
        blocks = [(o, first) for o in acting for first in range(0, o.trained, BLOCK)]
        found: dict[str, Tensor] = {}
        for number, (o, first) in list(enumerate(blocks))[rank::world]:
            robot = o.source.embodiment
            total = sum(other.rows for other in acting if other.source.embodiment == robot)
            episodes = {*range(first, min(first + BLOCK, o.trained))} - o.reader.without
            for column, parts in zip(COLUMNS, zip(*map(o.reader.numbers, sorted(episodes)))):
                if parts[0] is not None:
                    name = f"{robot}/{column}/{number:06d}"
                    found |= measured(np.concatenate(parts), name, total, number)
        return found

    def robots(
        self, acting: bool, found: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Statistics, ...]:
        """Statistics of each robot, for a checkpoint; if the stage acts, with its normalisation,
        from what all ranks `found` by `measure`."""
        if found is None:
            found = [self.measure()] if acting else []
        tensors = {name: tensor for part in found for name, tensor in part.items()}
        chosen = [o for o in self.opened if not acting or o.reader.widths[1]]
        statistics = []
        for robot in sorted({o.source.embodiment for o in chosen}):
            mine = [o for o in chosen if o.source.embodiment == robot]
            kind, *others = kinds = sorted({o.source.normalise for o in mine})
            if others:
                raise ValueError(
                    f"card {self.name}: sources of {robot} are normalised by {kinds}; choose one"
                )
            state, actions = (Normaliser.of(tensors, f"{robot}/{c}/", kind) for c in COLUMNS)
            reader = mine[0].reader
            views = tuple(name.removeprefix("observation.images.") for name in reader.cameras)
            seen = self.action_hz, views, reader.given.t_layout, self.size
            statistics.append(Statistics(robot, self.ratio, actions, state, *seen))
        return tuple(statistics)

    # Windows.

    def draw(self, size: int, seed: int, step: int) -> Tensor:
        """(B, 4): source, episode, first row and variant of the windows of batch `step`, a function
        of its arguments alone."""
        rng = np.random.default_rng([seed, step])
        rows = []
        for i in shares(self.weights, size, rng):
            o = self.opened[i]
            episode = min(int(np.searchsorted(o.edges, rng.random(), side="right")), o.trained - 1)
            start = int(rng.integers(o.counts[episode]))
            rows.append((int(i), episode, start, int(rng.integers(o.variants))))
        return torch.tensor(rows)

    def held_out(self, count: int, seed: int) -> Tensor:
        """(B, 3): at most one whole window from each of `count` held-out episodes."""
        rng = np.random.default_rng(seed)
        rows = []
        for i, o in enumerate(self.opened):
            starts = o.reader.lengths[o.trained :] - math.ceil(self.span * o.reader.fps - 1e-6)
            for e in np.flatnonzero(starts > 0).tolist():
                if o.trained + e not in o.reader.without:
                    rows.append((i, o.trained + e, int(rng.integers(starts[e]))))
        if not rows:
            raise ValueError(
                f"card {self.name}: no held-out episode is longer than {self.span:g} s; set "
                '"held_out" of a source to more'
            )
        return torch.tensor(rows)[rng.permutation(len(rows))[:count]]

    def window(self, row: Sequence[int], actions: str) -> Window:
        """The window of a row (source, episode, first row, maybe variant), as the network is to see
        it but for normalisation: the frames (1+F, H, W, 3) as one picture, the observation first;
        `actions`: none, latent or real."""
        i, episode, start, *variant = row
        o = self.opened[i]
        reader = o.reader
        video_times = np.arange(self.frames + 1) / self.video_hz
        action_times = ()
        if actions == "real" and reader.widths[1]:
            action_times = (np.arange(self.frames * self.ratio) + o.source.ahead) / self.action_hz
        seen = reader.window(episode, start / reader.fps, video_times, action_times)
        chunk, mask = seen.actions, seen.action_mask
        if actions == "latent":
            rows, known = o.latents(episode, self.video_hz, self.encode)
            index = np.floor(start + video_times[:-1] * reader.fps + 0.5).astype(int)
            last = np.minimum(index, len(rows) - 1)
            chunk, mask = rows[last], known[last] & (index < len(rows))
        picture = tiled(seen.frames, self.size)
        if any(variant):
            picture = shift_film(picture, o.source.shift, np.random.default_rng([self.seed, *row]))
        return replace(seen, frames=picture, actions=chunk, action_mask=mask)

    # What is told of it.

    def describe(self) -> str:
        """The sources with hours, episodes, rows, windows and share of a batch; the rates; and what
        each reader says."""
        table = [("level", "source", "embodiment", "hours", "episodes", "rows", "windows", "share")]
        for o, share in zip(self.opened, self.weights / self.weights.sum()):
            names = o.source.level, o.name[:24], o.source.embodiment[:16]
            hours = o.rows / o.reader.fps / 3600
            episodes = np.count_nonzero(o.counts)
            table.append((*names, f"{hours:.3f}", episodes, o.rows, o.windows, f"{share:.1%}"))
        line = "{:>5}  {:24} {:16} {:>8} {:>9} {:>10} {:>10} {:>7}".format
        lines = [f"{self.name}: {len(self.opened)} sources", *(line(*cells) for cells in table)]
        lines.append(
            f"video at {self.video_hz:g} Hz ({self.frames} frames after the observation), actions "
            f"at {self.action_hz:g} Hz ({self.ratio} per frame), pictures {self.size[0]} x "
            f"{self.size[1]}, {sum(o.source.held_out for o in self.opened)} episodes held out"
        )
        for o in self.opened:
            rows = np.arange(self.frames * self.ratio) / self.action_hz * o.reader.fps
            off = 1000 * np.abs(rows - np.round(rows)).max() / o.reader.fps
            if o.reader.widths[1] and abs(o.reader.fps / self.action_hz - 1) > 1e-6:
                lines.append(
                    f"warning  {o.name}: actions recorded at {o.reader.fps:g} Hz are read at "
                    f"{self.action_hz:g} Hz: right for positions, but changes per "
                    f"step add up to {self.action_hz / o.reader.fps:.3g} of what was done; record "
                    "positions, or mix robots of one rate"
                )
            if off > 0.1:
                lines.append(
                    f"{o.name}: rows at {o.reader.fps:g} fps are up to {off:.1f} ms beside the "
                    "wanted times"
                )
            ahead = ", actions are later positions" if o.source.ahead else ""
            shift = o.source.shift
            moved = f", two of three windows moved by up to {shift} pixels" if shift else ""
            lines.append(o.reader.describe())
            lines.append(
                f"  used     level {o.source.level}, weight {o.source.weight:g}, normalised by "
                f"{o.source.normalise}, drawn by {o.source.draw}, {o.source.held_out} episodes "
                f"held out{ahead}{moved}"
            )
        return "\n".join([*lines, self.notes()]).rstrip()

    def check(self) -> list[str]:
        """Every fault in every source, and episodes that are there twice."""
        seen = {}
        return [fault for o in self.opened for fault in o.reader.check(seen)]


def sources_of(card: dict) -> list[Source]:
    """The lines of a card. ValueError for what is no card."""
    check_keys(card, CardKeys, "it")
    lines = card.get("sources")
    if not lines or not isinstance(lines, list) or {*map(type, lines)} != {dict}:
        raise ValueError('sources must be a list with at least one {"path": ..., "level": ...}')
    size = card.get("size", [32, 32])
    if not isinstance(size, list) or len(size) != 2 or not all(n in SIDES for n in size):
        raise ValueError(
            f"size is {size!r:.50}; expected [height, width] in multiples of 16 up to 4096"
        )
    sources = {}  # what makes it another one -> source
    for i, line in enumerate(lines):
        if "path" not in line:
            raise ValueError(f"source {i} has no path; name its folder, relative to the card")
        check_keys(line, Source, f"source {line['path']}")
        source = Source(**line)
        own = (source.level, source.embodiment) if source.rendered else ()
        mark = source.path, json.dumps(source.mapping, sort_keys=True), own
        if mark in sources:
            raise ValueError(
                f"source {source.path} is there twice; give it a larger weight instead"
            )
        sources[mark] = source
    return list(sources.values())
