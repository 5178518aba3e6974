"""Episodes to batches: windows at two rates, normalisation, masks (paper Sec. 3.3 and 4.1).

    pyramid level   1 web              what the pre-trained backbones have already seen
                    2 human            video of hands, no actions
                    3 synthetic        the target robot in other scenes
                    4 task-agnostic    random motion with actions, no instruction
                    5 multi-robot      other robots, other action conventions
                    6 target robot     few demonstrations

A window starts at any row s of an episode and is action-dense, video-sparse:

    observation  frame s                              state at s
    video        frames  s + r, s + 2r, ..., s + F*r  r action steps per video frame
    actions      a_s, a_{s+1}, ..., a_{s+S-1}         S = F*ratio: ratio = r for real actions
                 z_s, z_{s+r}, ..., z_{s+(F-1)r}      ratio = 1 for latent: z_i spans i to i + r

What lies past the end of an episode repeats the last frame or action and is masked: it enters no
mean and is no key. Robots of different width live in one batch: numbers are padded with zeros and
masked. Order is a function of (seed, step) alone, for any number of workers and ranks.

    python data.py inspect CARD                  card (docs/data.md) or dataset: what of it is used,
                                                 a picture, every fault; `check` gives faults alone
    python data.py convert CARD OUT              its sources as LeRobot v3.0 datasets, with a card
    python data.py cache --stage 3 --out FILE    windows through the frozen backbones, for training

Shapes: B batch, F frames, H W pixels, S actions, A action dimensions, P state dimensions.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from backbones.frozen import Backbones
from formats.cards import EPISODES, Pyramid, shares
from formats.inspect import convert, inspect
from formats.motions import motions, read_tokens  # noqa: F401
from formats.statistics import Statistics, as_stored
from latent_action import LatentActionModel, encode_flows
from motus import PRESETS, STAGES, Inputs, MotusConfig, preset
from weights import options
from weights.files import digest, open_source, save_safetensors

WINDOWS = 2000  # encoded beforehand, where the preset does not say
LATENT_FILE = "latent_action.safetensors"  # of a run of stage latent


class LatentEncoder:
    """The encoder of a run of stage latent, or of a file, for sources that know their flow."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.model = LatentActionModel.load(path / LATENT_FILE if path.is_dir() else path)
        self.interval = self.model.config.interval  # rows that one latent action spans
        self.fingerprint = self.model.fingerprint()

    def __call__(self, flows: Iterable[tuple]) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of flow (n, H, W, 2) and valid (n,) -> standardised rows (T, 14), known (T,)."""
        found, _ = encode_flows(self.model, (map(torch.as_tensor, chunk) for chunk in flows))
        return self.model.standardise(found["latent_action"]).numpy(), found["valid"].numpy()


def open_pyramid(
    path: str | Path | None,
    stage: str,
    preset_name: str,
    episodes: int = 0,
    seed: int = 0,
    robot: str = "",
    latent: str | Path | None = None,
) -> Pyramid:
    """The sources of a stage's levels, by default of the preset's card. A world renders `episodes`
    per level where the card is silent; the encoder of run `latent` makes the actions of stage 2."""
    seen = preset(preset_name).frames, PRESETS[preset_name].size
    path = path or PRESETS[preset_name].data
    if path is None:
        raise ValueError(f"preset {preset_name!r} has no data of its own; name a card by --data")
    encode = LatentEncoder(latent) if latent else None
    return Pyramid(path, STAGES[stage].levels, *seen, episodes, seed, robot, encode)


def network_for(pyramid: Pyramid, preset_name: str, stage: str) -> MotusConfig:
    """The network of a preset for a stage; one that acts is as wide as the robots."""
    config = preset(preset_name, stage)
    if not config.finetune:
        return config
    state, action = pyramid.widths
    if not action:
        raise ValueError(f"card {pyramid.name}: no source has actions; name them in its mapping")
    return replace(config, ratio=pyramid.ratio, action_dim=action, state_dim=max(1, state))


def backbones_of(
    preset_name: str,
    config: MotusConfig,
    text: str | Path | None = None,
    motus: str | Path | None = None,
    parts: Sequence[str] = Backbones.PARTS,
) -> Backbones:
    """The frozen backbones of a preset; with prepared states `text` instead of the text encoder,
    and the VLM of the official Motus file `motus`. MOTUS_BACKBONES names another folder."""
    folder = os.environ.get("MOTUS_BACKBONES") or PRESETS[preset_name].backbones
    if folder is None:
        raise ValueError(f"preset {preset_name!r} has no backbones: MOTUS_BACKBONES names a folder")
    parts = [part for part in parts if not (text and part == "text")]
    backbones = Backbones.load(folder, config.video.text_len, parts, motus)
    return backbones.load_text(text, config.video.text_dim) if text else backbones


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
    pyramid: Pyramid, rows: Tensor, actions: str, robots: Sequence[Statistics], config: MotusConfig
) -> Batch:
    """Windows of rows (B, 3), normalised, with masks; `actions`: none, latent or real."""
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
        chunk = torch.from_numpy(window.actions)
        if actions == "real":
            robot = known[pyramid.opened[window.source].source.embodiment]
            chunk = robot.actions.apply(chunk)
            if robot.state:
                state = robot.state.apply(torch.from_numpy(window.state))
                batch.state[b, : len(state)] = state
        width = chunk.shape[1]
        batch.actions[b, :, :width] = chunk
        batch.action_mask[b, :, :width] = torch.from_numpy(window.action_mask)[:, None]
    return batch


@torch.no_grad()
def encode(batch: Batch, backbones: Backbones, und: bool = True) -> Inputs:
    """A batch through the frozen backbones, without the VLM if not `und`."""
    numbers = {name: getattr(batch, name) for name in ("state", "actions", "action_mask")}
    seen = backbones.conditions(batch.frames, batch.instruction, und)
    return Inputs(**seen, **numbers, video_mask=batch.video_mask)


def stack(parts: Sequence[Inputs]) -> Inputs:
    """Joins batches along B; text and understanding are padded to the longest."""

    def join(values: list[Tensor | None]) -> Tensor | None:
        if values[0] is None or values[0].dim() == 1:
            return None if values[0] is None else torch.cat(values)
        return pad_sequence([row for value in values for row in value], batch_first=True)

    return Inputs(**{name: join([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def held_out(
    path: str | Path | None,
    stage: str,
    preset_name: str,
    config: MotusConfig,
    robot: Statistics | None,
    count: int,
    seed: int,
) -> Batch:
    """Windows of held-out episodes as a checkpoint sees them; in stage 3 of one robot."""
    acts = STAGES[stage].finetune
    pyramid = open_pyramid(path, stage, preset_name, 1, seed, robot.embodiment if acts else "")
    pyramid.frames = config.frames
    if robot and robot.action_hz:
        pyramid.see_as(robot)
    actions = "real" if acts else "none"
    return batch_of(pyramid, pyramid.held_out(count, seed), actions, [robot], config)


# -- windows that training draws ------------------------------------------------------------------


def in_order(work: Callable, items: Iterable, threads: int = 2) -> Iterator:
    """work(item) for each item, in order, by threads that are no more items ahead than they are."""
    pending = []
    with ThreadPoolExecutor(threads) as executor:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) > threads:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()


class Stream:
    """Windows that go through the frozen backbones when needed; threads decode the next ones."""

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

    def encode(self, batch: Batch) -> Inputs:
        return encode(batch, self.backbones, self.actions != "none").to("cpu")

    def decoded(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of batch `step` that belongs to `rank`, before the backbones. The next steps are
        begun, unless a worker of a DataLoader asks: workers are ahead themselves."""
        mine = slice(rank * size // world, (rank + 1) * size // world)
        parts = (self.rows(size, seed, n)[mine] for n in itertools.count(step))
        if torch.utils.data.get_worker_info() is not None:
            return self.cut(next(parts))
        if self.next != (size, seed, step, rank, world):
            self.ahead = in_order(self.cut, parts)
        self.next = (size, seed, step + 1, rank, world)
        return next(self.ahead)

    def batch(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Inputs:
        """The part of batch `step`, `size` windows in all, that belongs to `rank`."""
        return self.encode(self.decoded(size, seed, step, rank, world))

    def digest(self) -> str:
        """Changes with the card, the lengths of the episodes and what is known of the robots."""
        lengths = [o.reader.lengths[: o.trained].tolist() for o in self.pyramid.opened]
        return digest({}, json.dumps([self.pyramid.card, lengths, as_stored(self.robots)]))


@dataclass
class Pool:
    """Windows that went through the frozen backbones once; batches are drawn from them."""

    inputs: Inputs
    source: Tensor  # (n,) number of each window's source
    config: MotusConfig
    robots: tuple[Statistics, ...]
    interval: int | None  # action steps that one latent action spans
    sources: list[list]  # name, level and robot of each, in their order
    weights: list[float]  # by which they are mixed
    made_by: dict  # `makers`

    ABOUT = "encoded windows"  # key of a file's metadata

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """The rows of batch `step`: sources by weight, windows uniform within a source."""
        rng = np.random.default_rng([seed, step])
        present = self.source.unique().tolist()
        groups = [torch.nonzero(self.source == number)[:, 0] for number in present]
        chosen = shares(np.array(self.weights)[present], size, rng)
        return torch.stack([groups[g][rng.integers(len(groups[g]))] for g in chosen])

    def batch(self, size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Inputs:
        mine = slice(rank * size // world, (rank + 1) * size // world)
        return self.inputs.rows(self.rows(size, seed, step)[mine])

    def tensors(self, inputs: Inputs) -> dict[str, Tensor]:
        named = {**vars(inputs), "source": self.source}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def digest(self) -> str:
        """Changes with the sources of the windows, how they are mixed, and what 16 of them hold."""
        some = self.inputs.rows(torch.arange(len(self))[:: -(-len(self) // 16)])
        return digest(self.tensors(some), json.dumps(self.weights))

    def mix(self, pyramid: Pyramid) -> None:
        """Takes the weights of a card for its sources, which are encoded already."""
        if self.sources != named_sources(pyramid):
            raise ValueError(
                f"card {pyramid.name} mixes {named_sources(pyramid)}, the cache holds windows of "
                f"{self.sources}; expected other weights of the same sources, or a new cache"
            )
        self.weights = pyramid.weights.tolist()

    def save(self, path: str | Path) -> None:
        about = {k: getattr(self, k) for k in ("interval", "sources", "weights", "made_by")}
        about["robots"] = [robot.as_json() for robot in self.robots]
        about["widths"] = {k: getattr(self.config, k) for k in ("ratio", "action_dim", "state_dim")}
        save_safetensors(path, self.tensors(self.inputs), {self.ABOUT: json.dumps(about)})

    @classmethod
    def load(
        cls, path: str | Path, preset_name: str, stage: str, latent: str | Path | None = None
    ) -> "Pool":
        """The pool that `save` wrote, mapped from disk. ValueError if its makers have changed."""
        with open_source(path) as source:
            if cls.ABOUT not in source.metadata:
                raise ValueError(f"{path} is no cache of windows: `python data.py cache` makes one")
            about = json.loads(source.metadata[cls.ABOUT])
            tensors = {name: source.read(name) for name in source.names()}
        config = replace(preset(preset_name, stage), **about.pop("widths"))
        backbones = stage_backbones(preset_name, config, stage)
        now = makers(config, stage, backbones, LatentEncoder(latent) if latent else None)
        then = about["made_by"]
        stale = [f"{k} was {then[k]}, is {now.get(k)}" for k in then if then[k] != now.get(k)]
        if stale:
            raise ValueError(
                f"{path} is stale: {'; '.join(stale)}; make it again with `python data.py cache`, "
                "or name its latent-action encoder by --latent"
            )
        robots = tuple(map(Statistics.from_json, about.pop("robots")))
        which = tensors.pop("source")
        return cls(Inputs(**tensors), which, config, robots, **about)


def named_sources(pyramid: Pyramid) -> list[list]:
    """Which datasets these are, in their order, whatever their weights."""
    return [[o.name, o.source.level, o.source.embodiment] for o in pyramid.opened]


def stage_backbones(preset_name: str, config: MotusConfig, stage: str) -> Backbones:
    """Those that a stage needs."""
    parts = ("vae", "text") if STAGES[stage].actions == "none" else Backbones.PARTS
    return backbones_of(preset_name, config, parts=parts)


def makers(config: MotusConfig, stage: str, backbones: Backbones, encode=None) -> dict:
    """Stage, sizes and digests of networks that decide what encoded windows are."""
    made = {"stage": stage, "frames": config.frames, "text_len": config.video.text_len}
    latent = {"latent": encode.fingerprint} if encode else {}
    return made | backbones.fingerprint() | latent


def windows_of(
    pyramid: Pyramid,
    robots: tuple[Statistics, ...],
    config: MotusConfig,
    stage: str,
    preset_name: str,
    count: int,
    seed: int,
) -> Pool | Stream:
    """The windows of a stage: at most `count`, encoded now; with 0 each when it is needed."""
    backbones = stage_backbones(preset_name, config, stage).to(options.device())
    stream = Stream(pyramid, backbones, config, stage, robots)
    if not count:
        return stream
    drawn = stream.rows(4 * count, seed, 0).tolist()  # some twice: each is taken once
    rows = torch.tensor(list(dict.fromkeys(map(tuple, drawn)))[:count])
    chunks = rows.split(64)
    bar = tqdm(in_order(stream.cut, chunks), "encode windows", len(chunks), leave=False)
    inputs = stack([stream.encode(batch) for batch in bar])
    made = makers(config, stage, backbones, stream.interval and pyramid.encode)
    mix = named_sources(pyramid), pyramid.weights.tolist()
    return Pool(inputs, rows[:, 0].clone(), config, robots, stream.interval, *mix, made)


def cache(args: argparse.Namespace) -> None:
    """Encodes the windows of a stage; sizes are those of the preset's recipe."""
    recipe = PRESETS[args.preset].settings(args.stage, args.long)
    windows = args.windows or recipe.get("windows", WINDOWS)
    sizes = args.episodes or recipe.get("episodes", EPISODES), args.seed
    kind = args.stage, args.preset
    pyramid = open_pyramid(args.data, *kind, *sizes, latent=args.latent)
    print(pyramid.describe(), file=sys.stderr)
    robots = pyramid.robots(STAGES[args.stage].finetune)
    config = network_for(pyramid, args.preset, args.stage)
    pool = windows_of(pyramid, robots, config, *kind, windows, args.seed)
    pool.save(args.out)
    print(f"wrote {args.out}: {len(pool)} windows, {Path(args.out).stat().st_size / 1e6:.1f} MB")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("inspect", "check", "convert", "cache"):
        add = commands.add_parser(name).option
        add("--preset", "toy", "row of presets.toml", choices=tuple(PRESETS))
        if name != "cache":
            add("data", str, "card, dataset folder, or USER/NAME on the hub")
        if name == "inspect":
            add("--out", options.output_file, "picture to write", default="inspect.png")
            add("--card", options.output_file, "card to write, with every choice")
        if name == "convert":
            add("out", options.output_folder, "folder to write")
            add("--lossless", False, "videos keep every value")
    add("--stage", str, "that is to read it", required=True, choices=("1", "2", "3"))
    add("--data", str, "card or dataset (default: the preset's)")
    add("--latent", str, "run of stage latent, whose latent actions stage 2 learns")
    add("--long", False, "sizes of the preset's long recipe")
    for name in ("episodes", "windows", "seed"):
        add(f"--{name}", 0, f"{name} (default: of the preset's recipe)")
    add("--out", options.output_file, "file to write", required=True)
    add(*options.DEVICE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "cache":
        cache(args)
        return
    pyramid = open_pyramid(args.data, "latent", args.preset)  # of all levels
    if args.command == "inspect":
        inspect(pyramid, args.out, args.card)
    elif args.command == "convert":
        convert(pyramid, args.out, args.lossless)
    elif faults := pyramid.check():
        raise ValueError(f"{len(faults)} faults\n" + "\n".join(faults))
    else:
        print("no fault found")


if __name__ == "__main__":
    options.run_command(main)
