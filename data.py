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
    python data.py cache --stage 3 --out OUT     windows through the frozen backbones, for training:
                                                 a file, or a folder that many processes fill

Shapes: B batch, F frames, H W pixels, S actions, A action dimensions, P state dimensions.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones import eyes
from backbones.frozen import Backbones
from formats import windows
from formats.cards import EPISODES, Pyramid, Words
from formats.inspect import convert, inspect
from formats.motions import motions, read_tokens  # noqa: F401
from formats.statistics import Statistics, as_stored
from latent_action import LatentActionModel, encode_flows
from motus import PRESETS, STAGES, Inputs, MotusConfig, preset
from weights import options
from weights.files import digest

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
    if not path:
        raise ValueError(f"preset {preset_name!r} has no data of its own; name a card by --data")
    encode = latent and LatentEncoder(latent)
    words = Words.of(PRESETS[preset_name])
    return Pyramid(path, STAGES[stage].levels, *seen, episodes, seed, robot, encode, words)


def network_for(pyramid: Pyramid, preset_name: str, stage: str) -> MotusConfig:
    """The network of a preset for a stage; one that acts is as wide as the robots."""
    config = preset(preset_name, stage)
    if not config.finetune:
        return config
    state, action = pyramid.widths
    if not action:
        raise ValueError(f"card {pyramid.name}: no source has actions; name them in its mapping")
    return replace(config, ratio=pyramid.ratio, action_dim=action, state_dim=max(1, state))


def backbones_folder(preset_name: str) -> Path:
    """The folder of the frozen backbones of a preset; MOTUS_BACKBONES names another."""
    return Path(os.environ.get("MOTUS_BACKBONES") or PRESETS[preset_name].backbones or "weights")


def backbones_of(
    preset_name: str,
    config: MotusConfig,
    text: str | Path | None = None,
    motus: str | Path | None = None,
    parts: Sequence[str] = Backbones.PARTS,
) -> Backbones:
    """The frozen backbones of a preset; with prepared states `text` instead of the text encoder,
    and the VLM of the official Motus file `motus`."""
    parts = [part for part in parts if not (text and part == "text")]
    folder = backbones_folder(preset_name)
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
    prompts: list[Tensor] | None = None  # `Backbones.prompts` of the observations, if prepared
    goals: list | None = None  # of each where in its picture things should go, (2,), if known


def batch_of(
    pyramid: Pyramid, rows: Tensor, actions: str, robots: Sequence[Statistics], config: MotusConfig
) -> Batch:
    """Windows of rows (B, 3 or 4), normalised, with masks; `actions`: none, latent or real."""
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
            robot = known[pyramid.opened[rows[b, 0]].source.embodiment]
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
    seen = backbones.conditions(batch.frames, batch.instruction, und, batch.prompts)
    return Inputs(**seen, **numbers, video_mask=batch.video_mask)


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
    rows = pyramid.held_out(count, seed)
    batch = batch_of(pyramid, rows, actions, [robot], config)
    batch.goals = [pyramid.opened[i].reader.goal(episode) for i, episode, *_ in rows.tolist()]
    return batch


# -- windows that training draws ------------------------------------------------------------------


class Stream:
    """Windows that go through the frozen backbones when they are needed: `prepare` is for the
    processes of a DataLoader, `inputs` for the one that has the device."""

    def __init__(
        self,
        pyramid: Pyramid,
        preset_name: str,
        stage: str,
        measured: Sequence[dict[str, Tensor]] | None = None,
    ):
        """`measured`: what all ranks found of the robots, if this one is not to measure all."""
        self.pyramid, self.preset_name, self.stage = pyramid, preset_name, stage
        self.config = network_for(pyramid, preset_name, stage)
        self.robots = pyramid.robots(STAGES[stage].finetune, measured)
        self.actions = STAGES[stage].actions
        self.interval = pyramid.ratio if self.actions == "latent" else None
        self.made_by = makers(preset_name, self.config, stage, self.interval and pyramid.encode)
        self.backbones: Backbones | None = None

    def load(self, device: torch.device | str, precision: str = "fp32") -> "Stream":
        """With the backbones on a device, and the VAE in bf16 if that is the precision."""
        parts = parts_of(self.stage)
        self.backbones = backbones_of(self.preset_name, self.config, parts=parts).to(device)
        if precision == "bf16":
            self.backbones.vae.bfloat16()
        return self

    def __len__(self) -> int:
        return sum(source.windows for source in self.pyramid.opened)

    @property
    def latents(self) -> tuple[int, ...]:
        """C T h w of a window."""
        grid = [side // self.backbones.vae.stride[1] for side in self.pyramid.size]
        return self.config.video.latent, self.config.latent_frames, *grid

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """(B, 4): source, episode, first row, variant. A function of its arguments alone."""
        return self.pyramid.draw(size, seed, step)

    def prepare(self, rows: Tensor) -> dict:
        """The fields of the Batch of some rows."""
        batch = batch_of(self.pyramid, rows, self.actions, self.robots, self.config)
        if self.backbones and self.backbones.vlm:
            batch.prompts = self.backbones.prompts(batch.frames[:, 0], batch.instruction)
        return vars(batch)

    __getitem__ = prepare

    def inputs(self, prepared: dict, device: torch.device | str) -> Inputs:
        batch = Batch(**prepared)
        batch.frames = batch.frames.to(device, non_blocking=True)
        return encode(batch, self.backbones, self.actions != "none").to(device)

    def encoded(
        self, chunks: list[Tensor], device: torch.device | str, precision: str
    ) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """The batches of chunks of rows, on the CPU, and their instructions, for a cache; the
        processors of this rank decode."""
        if not chunks:
            return
        self.load(device, precision)
        cores = len(os.sched_getaffinity(0)) // options.environment("LOCAL_WORLD_SIZE", 1)
        loader = DataLoader(self, None, sampler=chunks, num_workers=min(cores, len(chunks) - 1))
        for prepared in tqdm(loader, "encode windows", leave=False):
            inputs = self.inputs(prepared, device)
            if precision == "bf16":
                inputs.latents = inputs.latents.bfloat16()
            found = {name: x.cpu() for name, x in vars(inputs).items() if x is not None}
            yield found, prepared["instruction"]

    def write(self, out: Path, rows: Tensor, device, precision: str, *place: int) -> None:
        """A cache of the windows of `rows`, or the part of the rank `place` of it."""
        counts = torch.bincount(rows[:, 0], minlength=len(self.pyramid.opened))
        about = {
            "windows": counts.tolist(),
            "sources": windows.named_sources(self.pyramid),
            "weights": self.pyramid.weights.tolist(),
            "interval": self.interval,
            "made_by": self.made_by,
            "precision": precision,
            "widths": {k: getattr(self.config, k) for k in ("ratio", "action_dim", "state_dim")},
            "robots": [robot.as_json() for robot in self.robots],
            "made_from": digest({"rows": rows}, self.digest()),
        }
        windows.write(out, rows, about, lambda x: self.encoded(x, device, precision), *place)

    def key(self, rows: Tensor, *about: str) -> str:
        """Changes with all that windows are made of: rows, card, statistics, files of the datasets
        by size and time, backbones, and `about`."""
        facts = [self.digest(), self.made_by, windows.files_of(self.pyramid), about]
        return digest({"rows": rows}, json.dumps(facts))

    def digest(self) -> str:
        """Changes with the card, the lengths of the episodes and what is known of the robots."""
        lengths = [o.reader.lengths[: o.trained].tolist() for o in self.pyramid.opened]
        return digest({}, json.dumps([self.pyramid.card, lengths, as_stored(self.robots)]))


class Pool(windows.Windows):
    """Windows that went through the frozen backbones once; batches are drawn from them."""

    def __init__(self, path: str | Path, preset_name: str, stage: str):
        super().__init__(path)
        self.config = replace(preset(preset_name, stage), **self.widths)
        self.kind = preset_name, self.config, stage

    def inputs(self, prepared: dict[str, Tensor], device: torch.device | str) -> Inputs:
        return Inputs(**prepared).to(device)

    def check(self, latent: str | Path | None = None) -> None:
        """ValueError if the makers of the windows have changed. Backbones whose files are not here
        are not needed, and not compared."""
        then = self.made_by
        now = dict.fromkeys(then) | {part: then.get(part) for part in Backbones.PARTS}
        now |= makers(*self.kind, LatentEncoder(latent) if latent else None)
        stale = [f"{k} was {then[k]}, is {now[k]}" for k in then if then[k] != now[k]]
        if stale:
            raise ValueError(
                f"{self.path} is stale: {'; '.join(stale)}; make it again with `python data.py "
                "cache`, or name its latent-action encoder by --latent"
            )


def parts_of(stage: str) -> tuple[str, ...]:
    """The backbones that a stage needs."""
    return ("vae", "text") if STAGES[stage].actions == "none" else Backbones.PARTS


PUBLISHED = {
    "vae": "wan/Wan2.2_VAE.pth wan/vae/*",
    "text": "wan/models_t5* wan/google/umt5-xxl/* wan/text_encoder/* wan/tokenizer/*",
    "vlm": "qwen3vl/*.safetensors qwen3vl/*.json",
}


def sampled(files: Sequence[Path]) -> str:
    """Changes with the names and sizes of files that are too large to read for that, and with any
    of 512 bytes of each."""
    found = {path.name: np.memmap(path, mode="r") for path in files if path.stat().st_size}
    some = {name: torch.tensor(x[:: 1 + len(x) // 512]) for name, x in found.items()}
    return digest(some, str(list(map(len, found.values()))))


def makers(preset_name: str, config: MotusConfig, stage: str, encode=None) -> dict:
    """Stage, sizes and digests of networks that decide what encoded windows are; of those whose
    files are here, where nothing is loaded for it but small networks of our own."""
    folder = backbones_folder(preset_name)
    text_len = config.video.text_len
    made = {"stage": stage, "frames": config.frames, "text_len": text_len}
    for part in parts_of(stage):
        published = sorted(path for name in PUBLISHED[part].split() for path in folder.glob(name))
        if (folder / f"{part}.safetensors").is_file():
            made |= Backbones.load(folder, text_len, (part,)).fingerprint()
        elif published:
            made[part] = sampled(published)
    return made | ({"latent": encode.fingerprint} if encode else {})


def cache(args: argparse.Namespace) -> None:
    """Encodes the windows of a stage; sizes are those of the preset's recipe."""
    rank = options.environment("RANK", 0)
    world = options.environment("WORLD_SIZE", 1)
    out = args.out
    if world > 1 and out.suffix == ".safetensors":
        raise ValueError(f"--out {out} is a file; for {world} processes name a folder")
    recipe = PRESETS[args.preset].settings(args.stage, args.long)
    sizes = args.episodes or recipe.get("episodes", EPISODES), args.seed
    kind = args.stage, args.preset
    pyramid = open_pyramid(args.data, *kind, *sizes, latent=args.latent)
    if not rank:
        print(pyramid.describe(), file=sys.stderr)
    stream = Stream(pyramid, args.preset, args.stage)
    count = args.windows or recipe.get("windows", WINDOWS)
    rows = windows.rows_to_encode(pyramid, count, args.seed)
    stream.write(out, rows, options.device_of_rank(), recipe.get("precision", "fp32"), rank, world)
    files = [out] if out.is_file() else list(out.glob("windows_*"))
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"rank {rank}: {len(rows)} windows in {out}, {len(files)} files now, {size:.1f} MB")


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
    add("--out", options.output, "file, or folder for many processes, to write", required=True)
    add(*options.DEVICE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "cache":
        return cache(args)
    pyramid = open_pyramid(args.data, "latent", args.preset)  # of all levels
    if args.command == "inspect":
        inspect(pyramid, args.out, args.card)
        print(eyes.note(pyramid, backbones_folder(args.preset), args.preset))
    elif args.command == "convert":
        convert(pyramid, args.out, args.lossless)
    elif faults := pyramid.check():
        raise ValueError(f"{len(faults)} faults\n" + "\n".join(faults))
    else:
        print(f"{pyramid.notes()}no fault found")


if __name__ == "__main__":
    options.run_command(main)
