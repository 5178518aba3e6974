"""Episodes to batches: the data pyramid, windows at two rates, normalisation, masks (paper Sec. 3.3
and 4.1).

    pyramid level   1 web              what the pre-trained backbones have already seen
                    2 human            video of hands, no actions
                    3 synthetic        the target robot in other scenes
                    4 task-agnostic    random motion with actions, no instruction
                    5 multi-robot      other robots, other action conventions
                    6 target robot     few demonstrations

A window starts at any row s of an episode and is action-dense, video-sparse:

    observation  frame s                        state at s
    video        frames  s + r, s + 2r, ..., s + F*r            r action steps per video frame
    actions      a_s, a_{s+1}, ..., a_{s+S-1}                   S = F*ratio: ratio = r for real actions
                 z_s, z_{s+r}, ..., z_{s+(F-1)r}                ratio = 1 for latent actions; z_i spans steps i to i + r

What lies past the end of an episode repeats the last frame or action and is masked: it enters no
mean and is no key. Order is a function of (seed, step) alone, so a resumed run draws the same
batches, for any number of workers and ranks.

Episodes come from a dataset card (docs/data.md), which lists LeRobot datasets, official Motus
folders and worlds that render theirs, with level, robot and weight. Robots of different width live
in one batch: numbers are padded with zeros and masked.

    python data.py inspect DATA [--card FILE]        what it is, what of it is used, a picture, every fault; writes a card
    python data.py check DATA                        every fault, by name
    python data.py convert DATA OUT                  its sources as LeRobot v3.0 datasets, with a card
    python data.py cache --stage 3 --out FILE        runs the frozen backbones once and stores what training reads, with the
                                                     digests of the weights that made it: a stale file is refused

DATA is a card, a folder with a card.json, a dataset folder, or USER/NAME on the hub.

Shapes: B batch, F frames, H W pixels, S actions, A action dimensions, P state dimensions.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import count as count_from
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from tqdm import tqdm

from backbones.frozen import Backbones
from formats.cards import Pyramid, Source, shares, widened
from formats.official import convert as convert_recordings
from formats.statistics import Statistics, as_stored
from latent_action import LatentActionModel, encode_flows, same_config
from motus import PRESETS, STAGES, Inputs, MotusConfig, preset
from weights.files import digest, open_source, read_metadata, run_command, save_safetensors

EPISODES = 100  # that a world renders per level where neither preset nor card says
WINDOWS = 2000  # that are encoded beforehand where the preset does not say
LATENT_FILE = "latent_action.safetensors"  # of a run of stage latent

# -- opening --------------------------------------------------------------------------------------


class LatentEncoder:
    """The latent-action encoder of a run of stage latent, or of a file, for sources that know their
    optical flow."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / LATENT_FILE if path.is_dir() else path
        self.model = LatentActionModel.load(path)
        self.interval = self.model.config.interval  # rows that one latent action spans
        self.fingerprint = self.model.fingerprint()

    def __call__(self, flows: Iterable[tuple]) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of flow (n, H, W, 2) and valid (n,) -> standardised rows (T, 14), known (T,)."""
        flows = (tuple(torch.as_tensor(x) for x in chunk) for chunk in flows)
        found, _ = encode_flows(self.model, flows)
        rows = self.model.standardise(found["latent_action"])
        return rows.numpy(), found["valid"].numpy()


def open_pyramid(
    path: str | Path | None,
    stage: str,
    preset_name: str,
    episodes: int = 0,
    seed: int = 0,
    robot: str = "",
    latent: str | Path | None = None,
) -> Pyramid:
    """The sources of a stage's levels: of the card or dataset at `path`, or of the preset's own
    card. A world renders `episodes` of each level, where its line of the card says nothing else;
    `latent` is a run of stage latent, whose encoder makes the actions of stage 2."""
    row, size = PRESETS[preset_name], preset(preset_name)
    path = path or row.data
    if path is None:
        raise ValueError(
            f"preset {preset_name!r} has no data of its own; name a card or dataset by --data"
        )
    encode = LatentEncoder(latent) if latent else None
    levels = STAGES[stage].levels
    episodes = episodes or EPISODES
    return Pyramid(path, levels, size.frames, row.size, episodes, seed, robot, encode)


def network_for(pyramid: Pyramid, preset_name: str, stage: str) -> MotusConfig:
    """The network of a preset for a stage, as wide as the robots of the pyramid where it acts."""
    config = preset(preset_name, stage)
    if not config.finetune:
        return config
    state, action = pyramid.widths
    if not action:
        raise ValueError(
            f"card {pyramid.name}: no source has actions, and stage {stage} learns them; name the "
            "column in its mapping"
        )
    return replace(config, ratio=pyramid.ratio, action_dim=action, state_dim=max(1, state))


def backbones_of(
    preset_name: str,
    config: MotusConfig,
    text: str | Path | None = None,
    motus: str | Path | None = None,
    parts: Sequence[str] = Backbones.PARTS,
) -> Backbones:
    """The frozen backbones that belong to a preset; with prepared states `text` instead of the text
    encoder, and the VLM of the official Motus file `motus`, if given. MOTUS_BACKBONES names another
    folder."""
    folder = os.environ.get("MOTUS_BACKBONES") or PRESETS[preset_name].backbones
    if folder is None:
        raise ValueError(
            f"preset {preset_name!r} has no backbones in the repository; name their folder in "
            "MOTUS_BACKBONES"
        )
    parts = [part for part in parts if not (text and part == "text")]
    backbones = Backbones.load(folder, config.video.text_len, parts, motus)
    return backbones.load_text(text, config.video.text_dim) if text else backbones


# -- batches --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Windows of episodes, as recorded; numbers are normalised."""

    frames: Tensor  # (B, 1+F, H, W, 3) uint8, the observation first
    video_mask: Tensor  # (B, T) bool
    instruction: list[str]
    state: Tensor | None = None  # (B, P)
    actions: Tensor | None = None  # (B, S, A)
    action_mask: Tensor | None = None  # (B, S, A) bool


def batch_of(
    pyramid: Pyramid,
    rows: Tensor,
    actions: str,
    robots: Sequence[Statistics],
    config: MotusConfig,
) -> Batch:
    """The windows of these rows (B, 3), normalised by `robots`, as wide as `config`; `actions`:
    none, latent or real. Here alone it is decided what is masked."""
    windows = [pyramid.window(row, actions) for row in rows.tolist()]
    batch = Batch(
        torch.from_numpy(np.stack([window.frames for window in windows])),
        # Latent frame k ends at video frame 4k.
        torch.from_numpy(np.stack([window.video_mask[::4] for window in windows])),
        [window.instruction for window in windows],
    )
    if actions == "none":
        return batch
    batch.actions = torch.zeros(len(rows), config.chunk, config.action_dim)
    batch.action_mask = torch.zeros_like(batch.actions, dtype=torch.bool)
    if actions == "real":
        batch.state = torch.zeros(len(rows), config.state_dim)
    known = {robot.embodiment: robot for robot in robots}
    for b, window in enumerate(windows):
        if window.actions is None:  # a source without actions in a stage that acts
            continue
        chunk = torch.from_numpy(np.ascontiguousarray(window.actions))
        batch.action_mask[b, :, : chunk.shape[1]] = torch.from_numpy(window.action_mask)[:, None]
        if actions == "real":
            robot = known[pyramid.opened[window.source].source.embodiment]
            chunk = robot.actions.apply(chunk)
            if robot.state:
                state = robot.state.apply(torch.from_numpy(window.state))
                batch.state[b] = widened(state, config.state_dim)
        batch.actions[b] = widened(chunk, config.action_dim)
    return batch


@torch.no_grad()
def encode(batch: Batch, backbones: Backbones, und: bool = True) -> Inputs:
    """A batch through the frozen backbones, without the VLM if not `und`."""
    return Inputs(
        **backbones.conditions(batch.frames, batch.instruction, und),
        state=batch.state,
        actions=batch.actions,
        action_mask=batch.action_mask,
        video_mask=batch.video_mask,
    )


def held_out(
    path: str | Path | None,
    stage: str,
    preset_name: str,
    config: MotusConfig,
    robot: Statistics | None,
    count: int,
    seed: int,
) -> Batch:
    """Windows of held-out episodes as a checkpoint sees them: its rates, its picture, its
    normalisation; in stage 3 of one robot, before that without actions."""
    acts = STAGES[stage].actions == "real"
    name = robot.embodiment if acts else ""
    pyramid = open_pyramid(path, stage, preset_name, episodes=1, seed=seed, robot=name)
    pyramid.frames = config.frames
    if robot and robot.action_hz:
        pyramid.see_as(robot)
    rows = pyramid.held_out(count, seed)
    return batch_of(pyramid, rows, "real" if acts else "none", [robot], config)


def stack(parts: Sequence[Inputs]) -> Inputs:
    """Joins batches along B; text and understanding are padded to the longest."""

    def join(values: list[Tensor | None]) -> Tensor | None:
        if values[0] is None:
            return None
        if values[0].dim() == 1:
            return torch.cat(values)
        return pad_sequence([row for value in values for row in value], batch_first=True)

    return Inputs(**{name: join([vars(part)[name] for part in parts]) for name in vars(parts[0])})


# -- windows that training draws ------------------------------------------------------------------


def in_order(work: Callable, items: Iterable, threads: int = 2) -> Iterator:
    """work(item) for each item, in their order, done by threads that are at most `threads` items
    ahead: memory is bounded."""
    pending: deque = deque()
    with ThreadPoolExecutor(threads) as executor:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Stream:
    """Windows of a pyramid that go through the frozen backbones when they are needed; two threads
    decode the next batches."""

    def __init__(
        self,
        pyramid: Pyramid,
        backbones: Backbones | None,
        config: MotusConfig,
        stage: str,
        robots: tuple[Statistics, ...] = (),
    ):
        self.pyramid, self.backbones, self.robots = pyramid, backbones, robots
        self.config, self.actions = config, STAGES[stage].actions
        self.interval = pyramid.ratio if self.actions == "latent" else None
        self.next: tuple | None = None  # what `ahead` gives next
        self.ahead: Iterator[Batch] = iter(())

    def __len__(self) -> int:
        return sum(source.windows for source in self.pyramid.opened)

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """(B, 3): source, episode, first row. A function of its arguments alone."""
        return self.pyramid.draw(size, seed, step)

    def cut(self, rows: Tensor) -> Batch:
        return batch_of(self.pyramid, rows, self.actions, self.robots, self.config)

    def decoded(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of batch `step` that belongs to `rank`, before the backbones. The next steps are
        begun, unless a worker of a DataLoader asks: workers are ahead themselves."""

        def mine(step: int) -> Tensor:
            return share(self.rows(size, seed, step), rank, world)

        if get_worker_info() is not None:
            return self.cut(mine(step))
        if self.next != (size, seed, step, rank, world):
            self.ahead = in_order(self.cut, map(mine, count_from(step)))
        self.next = (size, seed, step + 1, rank, world)
        return next(self.ahead)

    def batch(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Inputs:
        """The part of batch `step`, `size` windows in all, that belongs to `rank`."""
        batch = self.decoded(size, seed, step, rank, world)
        return encode(batch, self.backbones, self.actions != "none").to("cpu")

    def digest(self) -> str:
        """Changes with the card, the lengths of the episodes and what is known of the robots."""
        opened = enumerate(self.pyramid.opened)
        lengths = {str(i): torch.from_numpy(np.asarray(o.reader.lengths)) for i, o in opened}
        card = json.dumps(self.pyramid.card, sort_keys=True)
        return digest(lengths, card, json.dumps(as_stored(self.robots)))


def share(rows: Tensor, rank: int, world: int) -> Tensor:
    """The rows of a batch that belong to a rank."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]


POOL = "encoded windows of a card"  # what a cache file says it is


@dataclass
class Pool:
    """Windows that went through the frozen backbones once; batches are drawn from them."""

    inputs: Inputs
    source: Tensor  # (n,) number of each window's source
    config: MotusConfig
    stage: str
    robots: tuple[Statistics, ...]
    sources: list[list]  # name, level and robot of each, in their order
    weights: list[float]  # by which they are mixed
    made_by: dict[str, str]  # digests of the networks that made `inputs`

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def interval(self) -> int | None:
        """Action steps that one latent action spans."""
        return self.robots[0].rate if STAGES[self.stage].actions == "latent" else None

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """The rows of batch `step`: sources by weight, windows uniform within a source. A function
        of its arguments alone."""
        rng = np.random.default_rng([seed, step])
        present = self.source.unique()
        groups = [torch.nonzero(self.source == number)[:, 0] for number in present]
        chosen = shares(np.array(self.weights)[present.numpy()], size, rng)
        return torch.stack([groups[g][rng.integers(len(groups[g]))] for g in chosen])

    def batch(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Inputs:
        """The part of batch `step`, `size` windows in all, that belongs to `rank`."""
        return self.inputs.rows(share(self.rows(size, seed, step), rank, world))

    def digest(self) -> str:
        """Changes with the sources of the windows, how they are mixed, and what 16 of them hold."""
        some = self.inputs.rows(torch.arange(len(self))[:: -(-len(self) // 16)])
        tensors = {k: v for k, v in vars(some).items() if v is not None}
        return digest(tensors | {"source": self.source}, json.dumps(self.weights))

    def mix(self, pyramid: Pyramid) -> None:
        """Takes the weights of a card for its sources, which are encoded already."""
        if self.sources != named_sources(pyramid):
            raise ValueError(
                f"card {pyramid.name} mixes sources {named_sources(pyramid)}; the cache holds "
                f"windows of {self.sources}: expected a card with other weights of the same "
                "sources, or windows written again with `python data.py cache`"
            )
        self.weights = pyramid.weights.tolist()

    def save(self, path: str | Path) -> None:
        """Writes what the backbones computed, with the digests of those that did."""
        tensors = vars(self.inputs) | {"source": self.source}
        sizes = {name: getattr(self.config, name) for name in ("ratio", "action_dim", "state_dim")}
        about = {
            "stage": self.stage,
            "made_by": self.made_by,
            "sizes": sizes,
            "windows": window_fields(self.config),
            "robots": [robot.as_json() for robot in self.robots],
            "sources": self.sources,
            "weights": self.weights,
        }
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_safetensors(path, present, {"kind": POOL, "about": json.dumps(about)})

    @classmethod
    def load(
        cls, path: str | Path, preset_name: str, stage: str, latent: str | Path | None = None
    ) -> "Pool":
        """A pool that `save` wrote, mapped from disk. ValueError if it is of another stage, a
        backbone or the latent-action encoder has changed since, or the windows are cut for another
        network."""
        with open_source(path) as source:
            tensors = {name: source.read(name) for name in source.names()}
            kind, about = (source.metadata.get(key) for key in ("kind", "about"))
        known = {f.name for f in fields(Inputs)} | {"source"}
        if kind != POOL or not {"latents", "source"} <= tensors.keys() <= known:
            raise ValueError(
                f"{path} is no cache of windows (kind {kind!r}); `python data.py cache` writes one"
            )
        about = json.loads(about)
        if about["stage"] != stage:
            raise ValueError(
                f"{path} holds windows of stage {about['stage']}; this is stage {stage}"
            )
        config = replace(preset(preset_name, stage), **about["sizes"])
        made_by = about["made_by"]
        parts = [part for part in Backbones.PARTS if part in made_by]
        ours = backbones_of(preset_name, config, parts=parts).fingerprint()
        if latent:
            ours["latent"] = LatentEncoder(latent).fingerprint
        wrong = [
            f"is stale: {name} was {then}, is {ours.get(name)}"
            for name, then in made_by.items()
            if ours.get(name) != then
        ]
        wrong += [
            f"was cut for another model: {name} is {about['windows'].get(name)}, this model has {now}"
            for name, now in window_fields(config).items()
            if about["windows"].get(name) != now
        ]
        if wrong:
            remedy = "write it again with `python data.py cache`"
            if "latent" in made_by and not latent:
                remedy = f"name the encoder with --latent, or {remedy}"
            raise ValueError(f"{path} {'; it '.join(wrong)}; {remedy}")
        robots = tuple(Statistics.from_json(robot) for robot in about["robots"])
        which = tensors.pop("source")
        mix = about["sources"], about["weights"]
        return cls(Inputs(**tensors), which, config, stage, robots, *mix, made_by)


def window_fields(config: MotusConfig) -> dict[str, int | bool]:
    """What of a network decides how its windows are cut and encoded."""
    own = ("frames", "ratio", "action_dim", "finetune", "vlm_dim")
    video = ("latent", "text_dim", "text_len")
    found = {name: getattr(config, name) for name in own}
    return found | {name: getattr(config.video, name) for name in video}


def named_sources(pyramid: Pyramid) -> list[list]:
    """Which datasets these are, in their order, whatever their weights."""
    return [[o.name, o.source.level, o.source.embodiment] for o in pyramid.opened]


def windows_of(
    pyramid: Pyramid,
    robots: tuple[Statistics, ...],
    config: MotusConfig,
    stage: str,
    preset_name: str,
    count: int,
    seed: int,
) -> Pool | Stream:
    """The windows of a pyramid for a stage: at most `count` of them encoded now, or, with 0, each
    batch when it is needed. Progress on stderr."""
    actions = STAGES[stage].actions
    parts = Backbones.PARTS if actions != "none" else ("vae", "text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbones = backbones_of(preset_name, config, parts=parts).to(device)
    stream = Stream(pyramid, backbones, config, stage, robots)
    if not count:
        return stream
    size = 64
    rows: dict[tuple, None] = {}  # those of the first batches, each once
    for step in range(4 * -(-count // size)):
        if len(rows) < count:
            rows |= dict.fromkeys(map(tuple, stream.rows(size, seed, step).tolist()))
    rows = torch.tensor(list(rows)[:count])
    chunks = rows.split(size)
    found = []
    for batch in tqdm(in_order(stream.cut, chunks), "encode windows", len(chunks), leave=False):
        found.append(encode(batch, backbones, actions != "none").to("cpu"))
    made_by = backbones.fingerprint()
    if pyramid.encode and actions == "latent":
        made_by["latent"] = pyramid.encode.fingerprint
    mix = named_sources(pyramid), pyramid.weights.tolist()
    return Pool(stack(found), rows[:, 0].clone(), config, stage, robots, *mix, made_by)


# -- motions, for the latent actions --------------------------------------------------------------

LABELLED = (4, 6)  # levels whose actions the latent-action encoder may look at: the target robot's


class Motions(NamedTuple):
    """Motions over one interval, of sources that know their optical flow."""

    flow: Tensor  # (N, H, W, 2) float32, pixels
    labels: Tensor  # (N, A) float32 in [-1, 1]; all are known, for measuring
    mask: Tensor  # (N, A) bool: which of them training may use
    level: Tensor  # (N,) of the pyramid


def motions(pyramid: Pyramid, interval: int, held_out: bool = False) -> Motions:
    """The motions over `interval` rows of all episodes that are trained on, or held out."""
    found = []
    for o in pyramid.opened:
        episodes = range(o.trained, len(o.reader.lengths)) if held_out else range(o.trained)
        for e in episodes if o.reader.flows(0, interval) is not None else ():
            flow, valid = (np.concatenate(part) for part in zip(*o.reader.flows(e, interval)))
            labels = torch.from_numpy(o.reader.motions(e, interval)[valid])
            mask = torch.full(labels.shape, o.source.level in LABELLED)
            level = torch.full((len(labels),), o.source.level)
            found.append(Motions(torch.from_numpy(flow[valid]), labels, mask, level))
    if not sum(len(part.level) for part in found):
        raise ValueError(
            f"card {pyramid.name}: no episode has true motions over {interval} rows; make tokens of "
            "its videos with `python -m scripts.latents tokens` and name them by --cache"
        )
    return Motions(*(torch.cat(part) for part in zip(*found)))


def read_tokens(folders: Sequence[Path], model: LatentActionModel) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, D) in half precision, labels (N, A), 0 where unknown, and mask (N, A) of what
    `python -m scripts.latents tokens` wrote to several folders."""
    wanted = {"dcae": model.dcae_fingerprint(), "interval": model.config.interval}
    rows = []
    for folder in folders:
        files = sorted((folder / "tokens").glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder}: no tokens there; python -m scripts.latents tokens writes them"
            )
        for path in files:
            made = json.loads(read_metadata(path).get("made", "{}"))
            same_config(path, {key: made.get(key) for key in wanted}, wanted)
            with open_source(path) as source:
                rows.append([source.read(key).clone() for key in ("tokens", "labels", "mask")])
    tokens, labels, mask = (torch.cat(column) for column in zip(*rows))
    return tokens, torch.where(mask, labels, 0.0), mask


# -- the commands ---------------------------------------------------------------------------------


def whole_pyramid(path: str | Path, preset_name: str, episodes: int = 0, seed: int = 0) -> Pyramid:
    """The sources of all levels."""
    row = PRESETS[preset_name]
    return Pyramid(path, (2, 3, 4, 5, 6), row.motus.frames, row.size, episodes, seed)


def plot(pyramid: Pyramid, out: Path) -> None:
    """A row for each of a few windows: its frames, with the actions drawn over them against time."""
    from matplotlib.figure import Figure

    each = max(1, 8 // len(pyramid.opened))
    picked: list[tuple[int, int, int]] = []
    for i, o in enumerate(pyramid.opened):
        for e in np.unique(np.arange(each) * o.trained // each):
            picked.append((i, int(e), int(o.counts[e] // 3)))
    height, width = pyramid.size
    shape = 1.6 * (pyramid.frames + 1) * width / height, 1.9 * len(picked)
    figure = Figure(figsize=shape, layout="constrained")
    axes = figure.subplots(len(picked), squeeze=False)
    right = pyramid.frames + 0.5
    for axis, row in zip(axes[:, 0], picked):
        o, seen = pyramid.opened[row[0]], pyramid.window(row, "real")
        axis.imshow(np.concatenate(seen.frames, axis=1), extent=(-0.5, right, 0, 1), aspect="auto")
        axis.set(yticks=[], xlabel=f"video frames at {pyramid.video_hz:g} Hz")
        title = f"{o.name}, episode {row[1]}, row {row[2]}: {seen.instruction[:90]}"
        axis.set_title(title, fontsize=7, loc="left")
        if seen.actions is None or not seen.action_mask.any():
            continue
        over = axis.twinx()
        times = (np.arange(len(seen.actions)) + o.source.ahead) / pyramid.ratio
        over.plot(times[seen.action_mask], seen.actions[seen.action_mask], linewidth=1.2)
        over.set_xlim(-0.5, right)
    figure.savefig(out, dpi=110)


def inspect(data: str, preset_name: str, out: str, card: str | None) -> list[str]:
    """Prints what a dataset or card is and what of it is used, plots some windows, names every
    fault; `card` writes all choices down."""
    pyramid = whole_pyramid(data, preset_name)
    print(pyramid.describe())
    if card:
        chosen = [(o.source, o.reader) for o in pyramid.opened]
        sources = [replace(s, path=r.name, mapping=asdict(r.given)) for s, r in chosen]
        write_card(Path(card), pyramid, sources)
        print(f"wrote {card}")
    faults = pyramid.check()
    if faults:
        print("\n".join(f"fault    {fault}" for fault in faults))
        return faults
    plot(pyramid, Path(out))
    print(f"no fault found; wrote {out}")
    return []


def write_card(path: Path, pyramid: Pyramid, sources: Sequence[Source]) -> None:
    """A card with these sources and the rates of a pyramid; what is as by default is left out."""
    lines = []
    for source in sources:
        default = asdict(Source(source.path))
        stored = asdict(source)
        lines.append(
            {key: stored[key] for key in stored if stored[key] != default[key] or key == "path"}
        )
    card = {
        "video_hz": pyramid.video_hz,
        "action_hz": pyramid.action_hz,
        "size": list(pyramid.size),
        "sources": lines,
    }
    path.write_text(json.dumps(card, indent=1))


def convert(data: str, out: Path, preset_name: str, episodes: int, lossless: bool) -> None:
    """Writes every source as the LeRobot v3.0 dataset `out`/NAME, with a card beside them."""
    pyramid = whole_pyramid(data, preset_name, episodes)
    sources = []
    for o in pyramid.opened:
        convert_recordings(o.reader, out / o.name, lossless)
        kept = {
            key: o.source.mapping[key]
            for key in ("instruction", "prefix")
            if key in o.source.mapping
        }
        sources.append(
            replace(o.source, path=o.name, mapping=kept, ahead=None, draw="", latents="")
        )
    write_card(out / "card.json", pyramid, sources)


def cache(args: argparse.Namespace) -> Pool:
    """Encodes the windows of a stage and writes them; sizes are those of the preset's recipe."""
    recipe = PRESETS[args.preset].settings(args.stage, args.long)
    windows = args.windows or recipe.get("windows", WINDOWS)
    episodes = args.episodes or recipe.get("episodes", EPISODES)
    pyramid = open_pyramid(
        args.data, args.stage, args.preset, episodes, args.seed, latent=args.latent
    )
    print(pyramid.describe(), file=sys.stderr)
    config = network_for(pyramid, args.preset, args.stage)
    robots = pyramid.robots(STAGES[args.stage].actions == "real")
    pool = windows_of(pyramid, robots, config, args.stage, args.preset, windows, args.seed)
    pool.save(args.out)
    return pool


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, text in (
        ("inspect", "what a dataset is, and every fault in it"),
        ("check", "every fault in a dataset"),
        ("convert", "its sources as LeRobot v3.0 datasets"),
        ("cache", "encode windows once and store them"),
    ):
        parsers[name] = commands.add_parser(name, help=text)
        parsers[name].add_argument("--preset", default="toy", help="row of presets.toml")
    for name in ("inspect", "check", "convert"):
        parsers[name].add_argument("data", help="card, dataset folder, or USER/NAME on the hub")
    add = parsers["inspect"].add_argument
    add("--out", default="inspect.png", help="picture to write")
    add("--card", help="card to write, with every choice that was made")
    add = parsers["convert"].add_argument
    add("out", type=Path, help="folder to write")
    add("--episodes", type=int, default=0, help="that a world renders per level")
    add("--lossless", action="store_true", help="videos keep every value")
    add = parsers["cache"].add_argument
    add("--stage", required=True, choices=("1", "2", "3"), help="that is to read it")
    add("--data", help="card or dataset (default: the preset's)")
    add("--latent", help="run of stage latent, or its file: whose latent actions stage 2 learns")
    add("--long", action="store_true", help="sizes of the preset's long recipe")
    add("--episodes", type=int, default=0, help="that a world renders per level")
    add("--windows", type=int, default=0, help="at most")
    add("--seed", type=int, default=0, help="of episodes and windows")
    add("--out", required=True, help="file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "inspect":
        inspect(args.data, args.preset, args.out, args.card)
    elif args.command == "check":
        faults = whole_pyramid(args.data, args.preset).check()
        if faults:
            raise ValueError(f"{len(faults)} faults\n" + "\n".join(faults))
        print("no fault found")
    elif args.command == "convert":
        convert(args.data, args.out, args.preset, args.episodes, args.lossless)
        print(f"wrote {args.out}")
    else:
        pool = cache(args)
        size = Path(args.out).stat().st_size / 1e6
        print(f"wrote {args.out}: {len(pool)} windows, {size:.1f} MB")


if __name__ == "__main__":
    run_command(main)
