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
mean and is no key.

Order is a function of (seed, step) alone, so a resumed run draws the same batches, for any number
of workers and ranks.

Episodes come from the toy world or from a dataset card (docs/data.md), which lists LeRobot datasets
and official Motus folders with level, robot and weight. Robots of different width live in one
batch: numbers are padded with zeros and masked.

    python data.py inspect DATA [--card FILE]                 what it is, what of it is used, a picture, every fault; writes a card
    python data.py check DATA                                 every fault, by name
    python data.py convert DATA OUT --to lerobot              or lerobot-v2.1, robotwin, ac_one, latent_action
    python data.py record --out DIR                           the toy pyramid as LeRobot datasets, with its card
    python data.py cache --data DATA --stage 3 --out FILE     runs the frozen backbones once and stores what training reads, with the
                                                              digests of the weights that made it: a stale file is refused

DATA is a card, a folder with a card.json, a dataset folder, or USER/NAME on the hub.

Shapes: B batch, F frames, H W pixels, S actions, A action dimensions, P state dimensions.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import latent_action
from backbones.frozen import Backbones
from formats import official
from formats.cards import Pyramid, Source, open_recordings, shares, widened
from formats.lerobot import write_v3
from formats.recordings import Storage
from formats.statistics import Normaliser, Statistics, as_stored
from latent_action import LatentActionModel, same_config
from motus import PRESETS, STAGES, Inputs, MotusConfig, preset
from weights.card import Card
from weights.files import digest, open_source, read_metadata, save_safetensors
from worlds import motions, tabletop

# -- the toy pyramid ------------------------------------------------------------------------------

RATE = 3  # action steps per video frame in the toy world
TARGET = "gripper"  # the toy's target robot


def toy_episodes(
    levels: Sequence[int], count: int, seed: int, split: str = "train", disturbed: bool = True
) -> list[tabletop.Episode]:
    """`count` episodes of each level."""
    return [
        episode
        for level in levels
        for episode in tabletop.record(level, count, seed, split=split, disturbed=disturbed)
    ]


def statistics(episodes: Sequence[tabletop.Episode], rate: int = RATE) -> Statistics:
    """Statistics of the episodes of one robot."""
    bodies = sorted({e.embodiment for e in episodes})
    if len(bodies) != 1:
        raise ValueError(f"episodes are of {bodies}; statistics belong to one robot")
    return Statistics(
        bodies[0],
        rate,
        Normaliser.fit(np.concatenate([e.actions for e in episodes])),
        Normaliser.fit(np.concatenate([e.states for e in episodes])),
    )


# -- windows --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Windows of episodes, as recorded; numbers are normalised."""

    frames: Tensor  # (B, 1+F, H, W, 3) uint8, the observation first
    video_mask: Tensor  # (B, T) bool
    instruction: list[str]
    level: Tensor  # (B,)
    state: Tensor | None = None  # (B, P)
    actions: Tensor | None = None  # (B, S, A)
    action_mask: Tensor | None = None  # (B, S, A) bool


def windows_of(
    episodes: Sequence[tabletop.Episode], config: MotusConfig, rate: int = RATE
) -> list[tuple[int, int]]:
    """Every (episode, start) of which at least the first half of the video exists."""
    need = rate * config.frames // 2
    return [(i, s) for i, e in enumerate(episodes) for s in range(max(1, len(e.frames) - need))]


def collect(
    episodes: Sequence[tabletop.Episode],
    windows: Sequence[tuple[int, int]],
    config: MotusConfig,
    stats: Statistics | None = None,
    latents: Sequence[np.ndarray] | None = None,
    rate: int = RATE,
) -> Batch:
    """Cuts windows out of episodes. With `latents` (per episode, rows (T', 14)) the actions are
    latent ones; with `stats` they are the robot's own, normalised, with its state; with neither
    there are none."""
    video, real, states, actions, masks = [], [], [], [], []
    for i, start in windows:
        episode, last = episodes[i], len(episodes[i].frames) - 1
        at = start + rate * np.arange(config.frames + 1)
        video.append(episode.frames[np.minimum(at, last)])
        real.append(at[0::4] <= last)  # latent frame k ends at video frame 4k
        if stats is not None or latents is not None:
            rows = latents[i] if latents is not None else episode.actions
            step = rate if latents is not None else 1
            index = start + step * np.arange(config.chunk)
            actions.append(rows[np.minimum(index, len(rows) - 1)])
            masks.append(np.broadcast_to((index < len(rows))[:, None], actions[-1].shape))
        if stats is not None:
            states.append(episode.states[start])
    batch = Batch(
        torch.from_numpy(np.stack(video)),
        torch.from_numpy(np.stack(real)),
        [episodes[i].instruction for i, _ in windows],
        torch.tensor([episodes[i].level for i, _ in windows]),
    )
    if actions:
        batch.actions, batch.action_mask = (
            torch.from_numpy(np.stack(actions)).float(),
            torch.from_numpy(np.stack(masks)),
        )
    if stats is not None:
        batch.state = stats.state.apply(torch.from_numpy(np.stack(states)))
        batch.actions = stats.actions.apply(batch.actions)
    return batch


def batch_of(
    pyramid: Pyramid,
    rows: Tensor,
    actions: str,
    robots: Sequence[Statistics] = (),
    config: MotusConfig | None = None,
    windows: Iterable[tuple] | None = None,
) -> Batch:
    """The batch of these rows (B, 3), normalised by `robots`, as wide as `config`; `windows` are
    those of the rows, if there."""
    windows = list(windows or (pyramid.window(row, actions) for row in rows.tolist()))
    number, pictures, video_mask, chunks, masks, states, texts = zip(*windows)
    sources, known = (
        [pyramid.opened[i].source for i in number],
        {robot.embodiment: robot for robot in robots},
    )
    batch = Batch(
        torch.from_numpy(np.stack(pictures)),
        torch.from_numpy(np.stack(video_mask)[:, 0::4]),
        list(texts),
        torch.tensor([source.level for source in sources]),
    )
    if actions == "none":
        return batch
    shape = len(rows), config.chunk, config.action_dim
    batch.actions, batch.action_mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    batch.state = torch.zeros(len(rows), config.state_dim) if actions == "real" else None
    for b, (source, chunk, mask, state) in enumerate(zip(sources, chunks, masks, states)):
        if chunk is None:
            continue
        robot = known[source.embodiment] if actions == "real" else None
        chunk = torch.from_numpy(np.ascontiguousarray(chunk))
        batch.actions[b] = widened(robot.actions.apply(chunk) if robot else chunk, shape[2])
        batch.action_mask[b, :, : chunk.shape[1]] = torch.from_numpy(mask)[:, None]
        if robot and robot.state and state is not None:
            batch.state[b] = widened(robot.state.apply(torch.from_numpy(state)), config.state_dim)
    return batch


# -- encoded windows ------------------------------------------------------------------------------


POOL = "encoded windows"  # what a cache file says it is


def window_fields(config: MotusConfig) -> dict[str, int | bool]:
    """What of a model decides how its windows are cut and encoded."""
    sizes = {
        name: getattr(config, name)
        for name in ("frames", "ratio", "action_dim", "finetune", "vlm_dim")
    }
    return sizes | {
        name: getattr(config.video, name) for name in ("latent", "text_dim", "text_len")
    }


@torch.no_grad()
def encode(batch: Batch, backbones: Backbones, und: bool = True) -> Inputs:
    """A batch through the frozen backbones."""
    seen = backbones.conditions(batch.frames, batch.instruction, und)
    return Inputs(
        **seen,
        state=batch.state,
        actions=batch.actions,
        action_mask=batch.action_mask,
        video_mask=batch.video_mask,
    )


def backbones_of(
    name: str,
    config: MotusConfig,
    text: str | Path | None = None,
    motus: str | Path | None = None,
    parts: Sequence[str] = ("vae", "text", "vlm"),
) -> Backbones:
    """The frozen backbones that belong to a preset; with prepared states `text` instead of the text
    encoder, and the VLM of the official Motus file `motus`, if given. MOTUS_BACKBONES names another
    folder."""
    folder = os.environ.get("MOTUS_BACKBONES") or PRESETS[name].backbones
    if folder is None:
        raise ValueError(
            f"preset {name!r} has no backbones in the repository; name their folder in MOTUS_BACKBONES"
        )
    wanted = [part for part in parts if not (text and part == "text")]
    backbones = Backbones.load(folder, config.video.text_len, wanted, motus)
    return backbones.load_text(text, config.video.text_dim) if text else backbones


def stack(parts: Sequence[Inputs]) -> Inputs:
    """Joins batches along B; text and understanding are padded to the longest."""

    def join(values: Sequence[Tensor | None]) -> Tensor | None:
        if values[0] is None:
            return None
        if values[0].dim() == 1:
            return torch.cat(list(values))
        longest = max(v.shape[1] for v in values)
        return torch.cat([pad_rows(v, longest) for v in values])

    return Inputs(**{k: join([getattr(part, k) for part in parts]) for k in vars(parts[0])})


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """(B, L, ...) with zeros up to (B, rows, ...)."""
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, rows - x.shape[1]))


class Pool:
    """Windows that went through the frozen backbones once; batches are drawn from them by (seed,
    step)."""

    statistics: Statistics | tuple[Statistics, ...] | None = None  # of the robot or robots
    about: dict | None = None
    source: Tensor | None = (
        None  # (n,) of a card's sources, which then are mixed by about["weights"], not levels alike
    )

    def __init__(self, inputs: Inputs, level: Tensor):
        self.inputs, self.level = inputs, level

    def __len__(self) -> int:
        return len(self.inputs)

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        episodes: Sequence[tabletop.Episode],
        backbones: Backbones,
        config: MotusConfig,
        count: int,
        seed: int,
        stats: Statistics | None = None,
        latents: Sequence[np.ndarray] | None = None,
        und: bool = True,
        size: int = 64,
        progress: bool = True,
    ) -> "Pool":
        """Encodes `count` windows, drawn without replacement (all of them if there are fewer).
        Progress on stderr."""
        windows = windows_of(episodes, config)
        order = np.random.default_rng(seed).permutation(len(windows))[:count]
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        batches = (
            collect(episodes, [windows[i] for i in chunk], config, stats, latents)
            for chunk in chunks
        )
        return cls.of(
            tqdm(
                batches, desc="encode windows", total=len(chunks), disable=not progress, leave=False
            ),
            backbones,
            und,
        )

    @classmethod
    @torch.no_grad()
    def of(cls, batches: "Iterable[Batch]", backbones: Backbones, und: bool = True) -> "Pool":
        """Encodes windows batch by batch."""
        parts = [(encode(batch, backbones, und).to("cpu"), batch.level) for batch in batches]
        return cls(stack([inputs for inputs, _ in parts]), torch.cat([level for _, level in parts]))

    def save(
        self,
        path: str | Path,
        fingerprint: dict[str, str],
        config: MotusConfig,
        stats: Statistics | Sequence[Statistics] | None = None,
        **about,
    ) -> None:
        """Writes what the backbones computed with the digests of those that did
        (`Backbones.fingerprint`; more may be added, such as that of a latent-action encoder).
        `about` says where the windows come from."""
        tensors = {
            k: v
            for k, v in (vars(self.inputs) | {"level": self.level, "source": self.source}).items()
            if v is not None
        }
        parts = {name for name in fingerprint if name != "vlm" or self.inputs.und is not None}
        notes = {
            "fingerprint": {name: fingerprint[name] for name in sorted(parts)},
            "windows": window_fields(config),
            "statistics": as_stored([stats] if isinstance(stats, Statistics) else stats or []),
            "about": about,
        }
        save_safetensors(
            path, tensors, {"kind": POOL, **{k: json.dumps(v) for k, v in notes.items()}}
        )

    @classmethod
    def load(
        cls, path: str | Path, backbones: Backbones | dict[str, str], config: MotusConfig
    ) -> "Pool":
        """A pool that `save` wrote, mapped from disk; `pool.statistics` and `pool.about` as they
        were given. ValueError if a backbone has changed since (compared by `Backbones.fingerprint`,
        or a dictionary like it) or the windows are cut for another model."""
        with open_source(path) as source:
            tensors, known = (
                {name: source.read(name) for name in source.names()},
                {f.name for f in fields(Inputs)} | {"level", "source"},
            )
            if (
                source.metadata.get("kind") != POOL
                or not {"latents", "level"} <= tensors.keys() <= known
            ):
                raise ValueError(
                    f"{path} is no cache of windows (kind {source.metadata.get('kind')!r}); `python data.py cache` writes one"
                )
            made_by, windows, stats, about = (
                json.loads(source.metadata[k])
                for k in ("fingerprint", "windows", "statistics", "about")
            )
        ours = (
            backbones
            if isinstance(backbones, dict)
            else backbones.fingerprint(*(made_by.keys() & Backbones.PARTS.keys()))
        )
        stale = [
            f"{name} was {made_by[name]}, is {ours.get(name)}"
            for name in made_by
            if ours.get(name) != made_by[name]
        ]
        foreign = [
            f"{name} is {windows.get(name)}, this model has {now}"
            for name, now in window_fields(config).items()
            if windows.get(name) != now
        ]
        if stale or foreign:
            raise ValueError(
                f"{path} {'is stale' if stale else 'was cut for another model'}: {'; '.join(stale or foreign)}; "
                "write it again with `python data.py cache`"
            )
        source, pool = (
            tensors.pop("source", None),
            cls(level=tensors.pop("level"), inputs=Inputs(**tensors)),
        )
        robots = (
            tuple(map(Statistics.from_json, stats.get("robots", [stats]))) if stats else (None,)
        )
        pool.statistics, pool.about, pool.source = (
            robots[0] if len(robots) == 1 else robots,
            about,
            source,
        )
        return pool

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """The rows of batch `step`: sources by weight, windows uniform within a source. A function
        of its arguments alone."""
        rng = np.random.default_rng([seed, step])
        group = self.level if self.source is None else self.source
        groups = [torch.nonzero(group == name)[:, 0] for name in group.unique()]
        weights = (
            np.ones(len(groups))
            if self.source is None
            else np.array(self.about["weights"])[group.unique().numpy()]
        )
        share = shares(weights, size, rng)
        return torch.tensor([int(groups[g][rng.integers(len(groups[g]))]) for g in share])

    def mix(self, pyramid: Pyramid) -> None:
        """Takes the weights of a card for its sources, which are encoded already."""
        theirs, ours = self.about.get("sources"), sources_of(pyramid)
        if theirs != ours:
            raise ValueError(
                f"card {pyramid.name} mixes sources {ours}; the cache holds windows of {theirs or 'no card'}: a card with "
                "other weights of the same sources is due, or windows written again with `python data.py cache`"
            )
        self.about |= {"weights": pyramid.weights.tolist()}

    def batch(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Inputs:
        """The part of batch `step`, `size` windows in all, that belongs to `rank`."""
        return self.inputs.rows(
            self.rows(size, seed, step)[rank * size // world : (rank + 1) * size // world]
        )

    def digest(self) -> str:
        """Changes with the levels of the windows, how they are mixed, and what 16 of them hold."""
        some = self.inputs.rows(torch.arange(len(self))[:: -(-len(self) // 16)])
        return digest(
            {k: v for k, v in vars(some).items() if v is not None} | {"level": self.level},
            json.dumps((self.about or {}).get("weights")),
        )


class Stream:
    """Windows of a pyramid that go through the frozen backbones when they are needed. Threads
    decode `ahead` batches beyond the one that is asked for, and no more, so memory is bounded;
    `waited` says for how many seconds the last batch was not ready."""

    def __init__(
        self,
        pyramid: Pyramid,
        backbones: Backbones | None,
        config: MotusConfig,
        actions: str,
        robots: Sequence[Statistics] = (),
        ahead: int = 2,
        threads: int = 2,
    ):
        self.pyramid, self.backbones, self.config, self.actions, self.robots = (
            pyramid,
            backbones,
            config,
            actions,
            robots,
        )
        self.ahead, self.threads, self.waited, self.last, self.owner = (
            ahead,
            threads,
            0.0,
            None,
            None,
        )

    def __len__(self) -> int:
        return sum(int(o.counts[: o.trained].sum()) for o in self.pyramid.opened)

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """(B, 3): source, episode, first row."""
        return self.pyramid.draw(size, seed, step)

    def _ask(
        self, size: int, seed: int, step: int, rank: int, world: int
    ) -> tuple[Tensor, list[Future]]:
        rows = self.rows(size, seed, step)[rank * size // world : (rank + 1) * size // world]
        return rows, [
            self.decoders.submit(self.pyramid.window, row, self.actions) for row in rows.tolist()
        ]

    def decoded(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of batch `step` that belongs to `rank`, before the backbones; the next ones are
        begun. Steps may go by more than one, as in one of several loader processes, each of which
        has threads of its own."""
        if self.owner != os.getpid():
            self.owner, self.pending, self.decoders = (
                os.getpid(),
                {},
                ThreadPoolExecutor(self.threads),
            )
        stride, self.last = max(1, step - self.last) if self.last is not None else 1, step
        wanted = [(size, seed, step + i * stride, rank, world) for i in range(self.ahead + 1)]
        self.pending = {key: self.pending.get(key) or self._ask(*key) for key in wanted}
        rows, windows = self.pending.pop(wanted[0])
        begun = time.perf_counter()
        windows = [window.result() for window in windows]
        self.waited = time.perf_counter() - begun
        return batch_of(self.pyramid, rows, self.actions, self.robots, self.config, windows)

    def batch(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Inputs:
        """The part of batch `step`, `size` windows in all, that belongs to `rank`."""
        return encode(
            self.decoded(size, seed, step, rank, world), self.backbones, self.actions != "none"
        ).to("cpu")

    def digest(self) -> str:
        """Changes with the card, the lengths of the episodes and what is known of the robots."""
        lengths = {
            str(i): torch.from_numpy(np.asarray(o.reader.lengths))
            for i, o in enumerate(self.pyramid.opened)
        }
        return digest(
            lengths,
            json.dumps(self.pyramid.card, sort_keys=True),
            json.dumps(as_stored(self.robots)),
        )


def held_out(
    path: str | Path, card: Card, robot: Statistics | None, count: int, seed: int
) -> Batch:
    """Windows of held-out episodes as a checkpoint sees them: its rates, its picture, its
    normalisation; in stage 3 of one robot."""
    acts, levels = card.stage == "3", {"1": (2, 3, 5), "2": (2, 3, 4, 5)}.get(card.stage, (6,))
    pyramid = Pyramid(path, levels, card.preset, robot.embodiment if acts else "")
    config = MotusConfig.of(card.motus)
    pyramid.frames = config.frames
    if robot and robot.action_hz:
        pyramid.action_hz, pyramid.ratio, pyramid.size = robot.action_hz, robot.rate, robot.size
        pyramid.video_hz = robot.action_hz / robot.rate
    if not acts:
        return batch_of(pyramid, pyramid.held_out(count, seed), "none")
    widths = dict(
        action_dim=len(robot.actions.mean), state_dim=len(robot.state.mean) if robot.state else 1
    )
    return batch_of(
        pyramid, pyramid.held_out(count, seed), "real", [robot], replace(config, **widths)
    )


def pool_of(
    pyramid: Pyramid,
    robots: Sequence[Statistics],
    levels: Sequence[int],
    actions: str,
    config: MotusConfig,
    name: str,
    windows: int,
    seed: int,
) -> Pool | Stream:
    """The windows of a pyramid's `levels` for a network like `config`: `windows` of them encoded
    now, or, with 0, each batch when it is needed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = Stream(pyramid, backbones_of(name, config).to(device), config, actions, robots)
    if not windows:
        return stream
    size, known = 64, {}
    for step in range(-(-windows // size)):
        known |= dict.fromkeys(map(tuple, pyramid.draw(size, seed, step).tolist()))
    rows = torch.tensor(list(known)[:windows])
    parts = [torch.as_tensor(part) for part in rows.split(size)]
    with ThreadPoolExecutor(stream.threads) as decoders:
        batches = (
            batch_of(
                pyramid,
                part,
                actions,
                robots,
                config,
                decoders.map(lambda row: pyramid.window(row, actions), part.tolist()),
            )
            for part in parts
        )
        pool = Pool.of(
            tqdm(batches, desc="encode windows", total=len(parts), leave=False),
            stream.backbones,
            actions != "none",
        )
    pool.source = rows[:, 0].clone()
    sizes = {key: getattr(config, key) for key in ("ratio", "action_dim", "state_dim")}
    pool.statistics, pool.about = (
        robots,
        {
            "data": pyramid.name,
            "levels": list(levels),
            "sizes": sizes,
            "seed": seed,
            "weights": pyramid.weights.tolist(),
            "sources": sources_of(pyramid),
        },
    )
    return pool


def sources_of(pyramid: Pyramid) -> list[list]:
    """Which datasets these are, in their order, whatever their weights: folder, level and robot."""
    return [[Path(o.source.path).name, o.source.level, o.source.embodiment] for o in pyramid.opened]


# -- the commands ---------------------------------------------------------------------------------

TOY_FPS = 15  # at which the toy world is written: RATE steps per frame are the paper's 5 Hz


def record(
    out: str | Path,
    levels: Sequence[int],
    episodes: int,
    held_out: int,
    seed: int = 0,
    lossless: bool = False,
    robots: Sequence[str] = (TARGET,),
) -> Path:
    """Writes the toy pyramid as LeRobot v3.0 datasets, one per level and robot, `held_out` episodes
    of other layouts at the end of each; returns its card. In level 6 there are as many of each of
    `robots`. Of an episode's T + 1 frames the last, after which nothing is done, is left out."""
    if (
        unfit := [
            robot
            for robot in robots
            if not getattr(robots.EMBODIMENTS.get(robot), "has_actions", False)
        ]
        or not robots
    ):
        raise ValueError(
            f"robots are {list(robots)}, of which {unfit} cannot demonstrate; allowed: "
            f"{[name for name, body in robots.EMBODIMENTS.items() if body.has_actions]}"
        )
    out, sources = Path(out), []
    exact = dict(codec="libx264rgb", pix_fmt="rgb24", options=(("crf", "0"),)) if lossless else {}
    for level in levels:
        turns = robots if level == 6 else (None,)  # None: the level's own bodies, in turn
        wanted = {"train": episodes, "eval": held_out} if held_out else {"train": episodes}
        found = {
            split: [e for body in turns for e in tabletop.record(level, count, seed, body, split)]
            for split, count in wanted.items()
        }
        bodies = robots if level == 6 else tabletop.LEVELS[level]["bodies"]
        for body in bodies:
            chosen = {
                split: [e for e in part if e.embodiment == body] for split, part in found.items()
            }
            rows = (
                (
                    dict(front=e.frames[:-1]),
                    *(None if e.actions is None else x for x in (e.states[:-1], e.actions)),
                    e.instruction or "no task",
                )
                for part in chosen.values()
                for e in part
            )
            write_v3(out / f"level{level}_{body}", rows, TOY_FPS, Storage(robot=body, **exact))
            sources.append(
                Source(
                    f"level{level}_{body}",
                    level,
                    body,
                    1 / len(bodies),
                    CONTAINS[level],
                    held_out=len(chosen.get("eval", ())),
                    mapping={"instruction": ""} if level == 4 else {},
                )
            )
    card = {
        "about": "the toy pyramid",
        "video_hz": TOY_FPS / RATE,
        "action_hz": TOY_FPS,
        "sources": [
            {k: v for k, v in asdict(source).items() if v != getattr(Source("x"), k)}
            for source in sources
        ],
    }
    (out / "card.json").write_text(json.dumps(card, indent=1))
    return out / "card.json"


CONTAINS = {
    2: "a hand, no actions",
    3: "the target robot in randomised scenes",
    4: "the target robot without a task",
    5: "other robots",
    6: "demonstrations of the target robot",
}


def plot(pyramid: Pyramid, out: Path, seed: int = 0) -> None:
    """A row for each of a few windows: its frames, with the actions drawn over them against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    each = max(1, 8 // len(pyramid.opened))
    picked = [
        (i, e, int(o.counts[e] // 3))
        for i, o in enumerate(pyramid.opened)
        for e in np.unique(np.arange(each) * o.trained // each)
    ]
    height, width = pyramid.size
    figure, axes = plt.subplots(
        len(picked),
        1,
        figsize=(1.6 * (pyramid.frames + 1) * width / height, 1.9 * len(picked)),
        squeeze=False,
        constrained_layout=True,
    )
    for axis, row in zip(axes[:, 0], picked):
        i, frames, _, chunk, mask, _, text = pyramid.window(row, "real")
        axis.imshow(
            np.concatenate(list(frames), axis=1),
            extent=(-0.5, pyramid.frames + 0.5, 0, 1),
            aspect="auto",
        )
        o = pyramid.opened[i]
        axis.set(
            yticks=[],
            xticks=range(pyramid.frames + 1),
            xlabel=f"video frames at {pyramid.video_hz:g} Hz",
        )
        axis.set_title(
            f"{Path(o.source.path).name}, episode {row[1]}, row {row[2]}: {text[:90]}",
            fontsize=7,
            loc="left",
        )
        if chunk is not None and mask.any():
            over, at = axis.twinx(), (np.arange(len(chunk)) + o.source.ahead) / pyramid.ratio
            for d in range(chunk.shape[1]):
                over.plot(at[mask], chunk[mask, d], linewidth=1.2, label=f"a{d}")
            over.legend(fontsize=5, ncol=chunk.shape[1], loc="lower right", framealpha=0.5)
            over.tick_params(labelsize=6)
            over.set_xlim(-0.5, pyramid.frames + 0.5)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def inspect(
    path: str | Path,
    name: str = "toy",
    out: str | Path | None = None,
    card: str | Path | None = None,
) -> list[str]:
    """Prints what a dataset or card is and what of it is used, plots some windows, names every
    fault; `card` writes all choices down."""
    pyramid = Pyramid(path, name=name)
    print(pyramid.describe())
    if card:
        sources = [
            {**asdict(o.source), "path": str(o.reader.root), "mapping": asdict(o.reader.given)}
            for o in pyramid.opened
        ]
        Path(card).write_text(
            json.dumps(
                {
                    "video_hz": pyramid.video_hz,
                    "action_hz": pyramid.action_hz,
                    "size": list(pyramid.size),
                    "sources": sources,
                },
                indent=1,
            )
        )
        print(f"wrote {card}")
    faults = pyramid.check()
    if faults:
        print("\n".join(f"fault    {fault}" for fault in faults))
    else:
        plot(pyramid, picture := Path(out or "inspect.png"))
        print(f"no fault found; wrote {picture}")
    return faults


def cache(
    levels: Sequence[int],
    episodes: int,
    windows: int,
    out: str | Path,
    name: str = "toy",
    seed: int = 0,
    latent: str | Path | None = None,
) -> Pool:
    """Encodes windows of the toy pyramid and writes them to `out`. Level 6 alone has the robot's
    actions and state (stage 3), `latent` gives latent actions (stage 2), otherwise there are none,
    and no understanding (stage 1)."""
    real, recorded = tuple(levels) == (6,) and latent is None, toy_episodes(levels, episodes, seed)
    config = preset(name) if real else preset(name, "2")
    backbones, stats, rows = (
        backbones_of(name, config),
        statistics(recorded) if real else None,
        None,
    )
    made_by = backbones.fingerprint()
    if latent is not None:
        rows = motions.encode_episodes(latent_action.LatentActionModel.load(latent), recorded, RATE)
        made_by["latent"] = digest(open_source(latent).tensors)
    pool = Pool.encode(
        recorded, backbones, config, windows, seed, stats, rows, und=real or latent is not None
    )
    pool.save(
        out,
        made_by,
        config,
        stats,
        levels=list(levels),
        episodes=episodes,
        windows=windows,
        seed=seed,
    )
    return pool


def cache_data(
    path: str | Path,
    levels: Sequence[int],
    actions: str,
    windows: int,
    out: str | Path,
    name: str = "toy",
    seed: int = 0,
) -> Pool:
    """The same for a dataset card; `actions`: none, latent or real, as the stage that is to read it
    learns them."""
    config = preset(name) if actions == "real" else preset(name, "2")
    pyramid = Pyramid(path, levels, name)
    print(pyramid.describe(), file=sys.stderr)
    config, robots = pyramid.config(config), pyramid.robots(actions == "real")
    pool = pool_of(pyramid, robots, levels, actions, config, name, windows, seed)
    pool.save(out, backbones_of(name, config).fingerprint(), config, robots, **pool.about)
    return pool


def about_cache(path: str | Path) -> dict:
    """What a cache says about its windows."""
    return json.loads(read_metadata(path).get("about", "{}"))


def read_tokens(folders: list[Path], model: LatentActionModel) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, D) in half precision, labels (N, A), 0 where unknown, and mask (N, A) of what
    `write_tokens` wrote to several folders."""
    wanted, rows = {"dcae": model.dcae_fingerprint(), "interval": model.config.interval}, []
    for folder in folders:
        if not (files := sorted((folder / "tokens").glob("*.safetensors"))):
            raise ValueError(
                f"{folder}: no tokens there; python latent_action.py tokens writes them"
            )
        for path in files:
            made = json.loads(read_metadata(path).get("made", "{}"))
            same_config(path, {key: made.get(key) for key in wanted}, wanted)
            with open_source(path) as source:
                rows.append([source.read(key).clone() for key in ("tokens", "labels", "mask")])
    tokens, labels, mask = (torch.cat(column) for column in zip(*rows))
    return tokens, torch.where(mask, labels, 0.0), mask


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = {
        name: commands.add_parser(name, help=text)
        for name, text in (
            ("inspect", "what a dataset is, and every fault in it"),
            ("check", "every fault in a dataset"),
            ("convert", "a dataset in another form"),
            ("record", "the toy pyramid as LeRobot datasets"),
            ("cache", "encode windows once and store them"),
        )
    }
    for name in ("inspect", "check", "convert"):
        add[name].add_argument("data", help="card, dataset folder, or USER/NAME on the hub")
    add["inspect"].add_argument("--out", help="picture to write (default inspect.png)")
    add["inspect"].add_argument("--card", help="card to write, with every choice that was made")
    add["convert"].add_argument("out", help="folder to write")
    add["convert"].add_argument("--to", required=True, help=", ".join(official.FORMS))
    for name in ("convert", "record"):
        add[name].add_argument("--lossless", action="store_true", help="videos keep every value")
    add["record"].add_argument("--levels", default="2,3,4,5,6", help="of the pyramid, with commas")
    add["record"].add_argument(
        "--robots",
        default=TARGET,
        help="whose demonstrations level 6 has, with commas: gripper, arm, gantry",
    )
    add["record"].add_argument(
        "--held-out", type=int, default=8, help="episodes of other layouts, per level"
    )
    add["cache"].add_argument("--data", help="card or dataset; default the toy world")
    add["cache"].add_argument(
        "--stage", default="", help="that is to read it, with --data: 1, 2 or 3"
    )
    add["cache"].add_argument("--levels", default="6", help="of the toy pyramid, with commas")
    add["cache"].add_argument(
        "--latent", help="file of the latent-action encoder: latent_action.safetensors of a run"
    )
    for name in ("record", "cache"):
        add[name].add_argument("--out", required=True, help="file or folder to write")
        add[name].add_argument("--episodes", type=int, default=100, help="per level")
        add[name].add_argument("--seed", type=int, default=0, help="of episodes and windows")
    add["cache"].add_argument("--windows", type=int, default=2000, help="at most")
    for name in ("inspect", "cache"):
        add[name].add_argument("--preset", default="toy")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        inspect(args.data, args.preset, args.out, args.card)
    elif args.command == "check":
        if faults := Pyramid(args.data).check():
            raise ValueError(f"{len(faults)} faults\n" + "\n".join(faults))
        print("no fault found")
    elif args.command == "convert":
        official.convert(open_recordings(args.data), args.out, args.to, args.lossless)
        print(f"wrote {args.out}")
    elif args.command == "record":
        levels, robots = [int(n) for n in args.levels.split(",")], args.robots.split(",")
        print(
            f"wrote {record(args.out, levels, args.episodes, args.held_out, args.seed, args.lossless, robots)}"
        )
    else:
        if args.data:
            if args.stage not in ("1", "2", "3"):
                raise ValueError(f"--stage is {args.stage!r}; with --data it is one of 1, 2, 3")
            levels, actions = STAGES[args.stage].levels, STAGES[args.stage].actions
            pool = cache_data(
                args.data, levels, actions, args.windows, args.out, args.preset, args.seed
            )
        else:
            levels = [int(level) for level in args.levels.split(",")]
            pool = cache(
                levels, args.episodes, args.windows, args.out, args.preset, args.seed, args.latent
            )
        print(
            f"wrote {args.out}: {len(pool)} windows, {Path(args.out).stat().st_size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
