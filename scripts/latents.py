"""Latent actions of videos, and what their encoder is trained on.

    python -m scripts.latents encode --weights RUN --data DATA
        latent actions of everything in DATA, where train.py --stage 2 --data DATA finds them; of
        one source with --out FOLDER there, which a card names as "latents"
    python -m scripts.latents tokens --preset small --dcae FILE --data DATA --out FOLDER
        tokens of flow for python train.py --stage latent --cache FOLDER
    python -m scripts.latents pretrain --preset small --data DATA --out dcae.safetensors
        a DC-AE, for sizes that have no published one

DATA is a folder of mp4 files, a LeRobot or official folder, or a card. A latent action spans a step
of the card's video rate, whatever the rate of a source. Of several cameras the first is taken, as a
square of `--side` pixels. Clips stream through flow, DC-AE and VAE, a chunk of
frames at a time. Files that are there already are kept if they were made in the same way, else
refused. A clip that cannot be used is skipped, counted and reported with its reason; no row of it
is written.

Shapes: T rows of a clip, which has T + 1 frames; H W height and width, D token features, A aligned
dimensions.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy import ndarray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from backbones.dpflow import DISFlow, FlowEstimator, load_dpflow
from backbones.optical_flow import resize_flow
from data import LATENT_FILE
from formats.cards import OpenSource, Pyramid
from formats.motions import LABELLED
from formats.recordings import Recordings
from latent_action import LatentActionConfig, LatentActionModel, encode_flows
from motus import PRESETS
from scripts.pretrain import pretrain_dcae
from weights.files import (
    open_source,
    plain_json,
    same_config,
    save_safetensors,
    write_json,
)
from weights.hub import LICENCE_NOTICE, fetch
from weights.options import DEVICE, Parser, device, output_file, output_folder, run_command

ROWS = 20_000  # of flow at most that a DC-AE is trained on; they are held in memory
Flows = Iterator[tuple[Tensor, Tensor]]  # flow (n, H, W, 2) and valid (n,), chunk after chunk

# -- flow of frames -------------------------------------------------------------------------------


def estimator_of(name: str) -> FlowEstimator | None:
    """dis, true (None), things, which are DPFlow's weights, or a file with others of it."""
    if name == "true":
        return None
    if name == "dis":
        return DISFlow()
    if name == "things":
        name = fetch(Path(torch.hub.get_dir()) / "checkpoints")
    else:
        print(LICENCE_NOTICE, file=sys.stderr)
    return load_dpflow(name).to(device())


def square(picture: ndarray, side: int) -> Tensor:
    """A picture (H, W, 3) uint8 -> (3, side, side) in [0, 1], padded with black to a square."""
    padded = ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.BILINEAR)
    return rearrange(torch.from_numpy(np.array(padded)), "h w c -> c h w") / 255


@torch.no_grad()
def measured_flows(
    frames: Iterable[Tensor], estimator: FlowEstimator, interval: int, chunk: int = 32
) -> Flows:
    """Flow from frame i to i + interval of frames (3, H, W) in [0, 1], at most chunk + interval of
    them at a time. The last rows end at the last frame and are not valid, nor are rows that touch a
    frame of one colour."""
    frames = iter(frames)
    window = list(islice(frames, chunk + interval))
    while len(window) > 1:
        last = len(window) - 1
        seen = torch.stack(window).to(device())
        begin = torch.arange(chunk if last + 1 == chunk + interval else last)
        end = (begin + interval).clamp(max=last)
        plain = (seen.flatten(2).std(dim=-1).amax(dim=1) <= 1 / 255).cpu()
        flow = estimator(seen[begin], seen[end])
        valid = (begin + interval <= last) & ~plain[begin] & ~plain[end]
        yield rearrange(flow, "b c h w -> b h w c"), valid
        window = [*window[len(begin) :], *islice(frames, len(begin))]


# -- clips ----------------------------------------------------------------------------------------


class Labels:
    """Labels (T, A) of a source's episodes: its true motions where it knows them, else the change
    of the measured state over exactly the interval, by its root mean square over all episodes, not
    centred, so that no motion is 0. NaN in dimensions that never change or that the robot lacks."""

    def __init__(self, reader: Recordings, config: LatentActionConfig, measured: bool = True):
        """`measured`: flow is that of the recorded frames, whose last one begins no row."""
        self.reader, self.measured = reader, measured
        self.interval, self.width = config.interval, config.action_dim
        self.scale = np.ones(self.width)
        if reader.motions(0, self.interval) is not None:
            return
        if not 0 < reader.widths[0] <= self.width:
            raise ValueError(
                f"{reader.name}: its state has {reader.widths[0]} dimensions to take labels from; "
                f"expected 1 to {self.width} (action_dim): leave --labelled out"
            )
        squares = []
        for episode in range(len(reader.lengths)):
            with suppress(ValueError):  # the episode is skipped, and reported, later
                squares.append(np.square(self(episode)))
        scale = np.sqrt(np.concatenate(squares).mean(axis=0))
        self.scale = np.where(scale > 1e-8, scale, np.nan)

    def __call__(self, episode: int) -> ndarray:
        found = self.reader.motions(episode, self.interval)
        if found is None:
            state = self.reader.numbers(episode)[0].astype(np.float64)
            last = len(state) - 1
            found = state[(np.arange(last) + self.interval).clip(max=last)] - state[:-1]
        elif self.measured:
            found = found[:-1]
        return np.pad(found, ((0, 0), (0, self.width - found.shape[1]))) / self.scale


@dataclass
class Clip:
    """An episode; nothing of it is read before it is asked for. What is wrong with it is a
    ValueError then."""

    reader: Recordings
    episode: int
    estimator: FlowEstimator | None  # None: the source knows its flow
    config: LatentActionConfig
    side: int  # pixels at which flow is measured
    known: Labels | None = None

    def flows(self) -> Flows:
        if self.estimator is None:
            for chunk in self.reader.flows(self.episode, self.config.interval):
                yield tuple(map(torch.as_tensor, chunk))
            return
        views = self.reader.views(self.episode, range(self.reader.lengths[self.episode]))
        frames = (square(picture, self.side) for picture in next(iter(views.values())))
        yield from measured_flows(frames, self.estimator, self.config.interval)

    def labels(self, rows: int) -> Tensor:
        """(T, A), NaN where unknown."""
        shape = (rows, self.config.action_dim)
        if self.known is None:
            return torch.full(shape, math.nan)
        labels = torch.from_numpy(self.known(self.episode)).float()
        if labels.shape != shape:
            raise ValueError(f"its labels have shape {tuple(labels.shape)}; expected {shape}")
        return labels


Clips = dict[str, Clip]


def step_of(reader: Recordings, config: LatentActionConfig, video_hz: float) -> LatentActionConfig:
    """The configuration with the rows of this source that a latent action spans: a video step."""
    rows = reader.fps / video_hz
    if abs(rows - round(rows)) > 1e-6 * rows:
        raise ValueError(
            f"{reader.name}: a video step has {rows:g} of its rows at {reader.fps:g} fps; expected "
            f"a whole number: choose a video_hz that divides it, now {video_hz:g}"
        )
    return replace(config, interval=round(rows))


def clips_of(
    args: argparse.Namespace,
    opened: Sequence[OpenSource],
    video_hz: float,
    config: LatentActionConfig,
) -> tuple[Clips, dict]:
    """The episodes of sources, by name, and how their flow and labels are made. A share
    `--labelled` of them, evenly spread, have labels, if the source is of the target robot."""
    estimator = estimator_of(args.flow)
    made = {key: getattr(args, key) for key in ("flow", "side", "labelled")}
    made["interval"] = config.interval
    known = [o for o in opened if args.labelled and o.source.level in LABELLED]
    if args.labelled and not known:
        raise ValueError(
            f"{args.data}: no source is of the target robot, of level 4 or 6, from whose state or "
            "motions --labelled takes labels; add one: video alone names no action"
        )
    clips = {}
    for o in opened:
        reader = o.reader
        own = step_of(reader, config, video_hz)
        if args.command == "encode":
            made["interval"] = own.interval
        elif own.interval != config.interval:
            made[f"rows of {o.name}"] = own.interval
        if estimator is None and reader.flows(0, own.interval) is None:
            raise ValueError(f"{reader.name}: its flow is not known; expected --flow dis or DPFlow")
        labels = None
        if o in known:
            labels = Labels(reader, own, measured=estimator is not None)
            made[f"scale of {o.name}"] = np.nan_to_num(labels.scale).tolist()
        for e in reader.episodes:
            name = f"{o.name}_{reader.clip(e)}" if len(opened) > 1 else reader.clip(e)
            chosen = int((e + 1) * args.labelled) > int(e * args.labelled)
            clips[name] = Clip(reader, e, estimator, own, args.side, labels if chosen else None)
    return clips, made


# -- the commands ---------------------------------------------------------------------------------


Encoded = tuple[dict[str, Tensor], dict]  # tensors of a clip, and figures


def usable(clips: Clips, work: Callable, skipped: dict[str, str]) -> Iterator:
    """The results of `work(name, clip)` of each clip; the reason why a clip cannot be used goes
    into `skipped`. ValueError if none can."""
    for name, clip in tqdm(clips.items(), unit="clip"):
        try:
            yield work(name, clip)
        except ValueError as error:
            skipped[name] = str(error)
    if len(skipped) == len(clips):
        raise ValueError(f"no usable clip among {len(clips)}: {str(skipped)[:500]}")


def each_clip(clips: Clips, folder: Path, made: dict, work: Callable) -> dict:
    """Writes FOLDER/NAME.safetensors of each clip: tensors and figures, which `work(clip)` makes,
    and how they were `made`. What is there already is kept if it was made in the same way. A clip
    that cannot be used is skipped, with its reason in the summary, which is returned and written
    beside the folder; ValueError if none can."""

    def written(name: str, clip: Clip) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            tensors, found = work(clip)
            about = {"made": json.dumps(made), "figures": json.dumps(found)}
            save_safetensors(path, tensors, about)
        return path

    summary = {"clips": 0, "skipped": {}, "rows": 0, "valid_rows": 0, "clipped": 0}
    for path in usable(clips, written, summary["skipped"]):
        about = open_source(path).metadata
        same_config(path, json.loads(about["made"]), made)
        summary["clips"] += 1
        for key, figure in json.loads(about["figures"]).items():
            summary[key] += figure
    summary["clipped"] /= summary["clips"]
    write_json(folder.parent / "summary.json", summary)
    return summary


def latents_of(model: LatentActionModel, clip: Clip) -> Encoded:
    """latent_action (T, 14), not standardised, logvar (T, 14) and valid (T,); and figures."""
    tensors, figures = encode_flows(model, clip.flows())
    del tensors["tokens"]
    return tensors, figures


def encode(model: LatentActionModel, args: argparse.Namespace, pyramid: Pyramid) -> None:
    """The latents of each source, where training looks for them or, of one, in --out. Sources that
    have their own, or know their flow and get them while they are read, are left out of several."""
    chosen = []
    for o in pyramid.opened:
        first = o.reader.episodes[0]
        known = o.reader.latents(first) is not None, o.reader.flows(first, 1) is not None
        if any(known) and not args.out:
            how = "has its own" if known[0] else "knows its flow: train.py --latent RUN makes them"
            print(f"{o.name}: left out, it {how}", file=sys.stderr)
        else:
            chosen.append((o, args.out or output_folder(o.folder)))
    folders = [folder for _, folder in chosen]
    if len({*folders}) != len(chosen) or not chosen:
        raise ValueError(
            f"{args.data}: {len(chosen)} sources would lie in {sorted({*map(str, folders)})}; "
            'expected a folder for each: leave --out out, or give them "latents" in the card'
        )
    for o, out in chosen:
        clips, made = clips_of(args, [o], pyramid.video_hz, model.config)
        made["model"] = model.fingerprint()
        folder = out / f"latent_action_dim{model.config.latent_dim}"
        report = each_clip(clips, folder, made, partial(latents_of, model))
        scale = {"mean": model.latent_mean.tolist(), "std": model.latent_std.tolist()}
        write_json(out / "statistics.json", scale | {"made": made})
        print(f"latent actions of {o.name} lie in {out}", file=sys.stderr)
        print(plain_json(report))


def tokens_of(model: LatentActionModel, clip: Clip) -> Encoded:
    """tokens (n, D) in half precision, labels (n, A) and mask (n, A) of the valid rows, for
    `data.read_tokens`; and figures."""
    found, figures = encode_flows(model, clip.flows())
    valid = found["valid"]
    labels = clip.labels(len(valid))
    mask = ~labels.isnan().all(dim=0).expand_as(labels)
    bad = (mask & ~labels.isfinite())[valid].nonzero().tolist()
    if bad:
        raise ValueError(f"its labels are not finite at (row, dimension) {bad[0]}; repair them")
    tensors = {"tokens": found["tokens"].half(), "labels": labels, "mask": mask}
    return {name: tensor[valid] for name, tensor in tensors.items()}, figures


def pretrain(model: LatentActionModel, clips: Clips, steps: int) -> dict:
    """Trains the DC-AE on the flow of about ROWS rows, spread over the clips, and their labels."""

    def rows_of(name: str, clip: Clip) -> tuple[Tensor, Tensor]:
        flow, valid = map(torch.cat, zip(*clip.flows()))
        rows = valid.nonzero()[:: 1 + len(valid) * len(clips) // ROWS, 0]
        flow = resize_flow(flow[rows], model.config.image).half().cpu()
        return flow, clip.labels(len(valid))[rows.cpu()]

    skipped = {}
    flow, labels = map(torch.cat, zip(*usable(clips, rows_of, skipped)))
    mask = ~labels.isnan()
    losses = pretrain_dcae(model, flow, labels.nan_to_num(), mask, steps)
    labelled = mask.any(dim=1).sum().item()
    return {"rows": len(flow), "labelled": labelled, **losses, "skipped": skipped}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("encode", "tokens", "pretrain"):
        add = commands.add_parser(command).option
        add("--data", str, "folder of mp4 files, dataset or card", required=True)
        kind = output_file if command == "pretrain" else output_folder
        place = "file or folder; run again to go on"
        if command == "encode":
            place += " (default: of each source where train.py looks for it)"
        add("--out", kind, place, required=command != "encode")
        add(*DEVICE)
        add("--flow", "dis", "dis, true (of a world), things (DPFlow), or a .ckpt of it")
        add("--side", 256, "pixels of the square at which flow is measured")
        if command == "encode":
            add("--weights", Path, "run or file of python train.py --stage latent", required=True)
            continue
        add("--preset", "toy", choices=PRESETS)
        share = "share of the clips whose actions are known; alone: of all"
        add("--labelled", 0.0, share, nargs="?", const=1.0)
        if command == "tokens":
            add("--dcae", Path, "published, or of the command pretrain", required=True)
        else:
            add("--steps", 3000)
            add("--init", Path, "DC-AE weights to go on from", dest="dcae")
    parser.set_defaults(labelled=0.0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if args.command == "encode":
        weights = args.weights / LATENT_FILE if args.weights.is_dir() else args.weights
        model = LatentActionModel.load(weights)
    else:
        torch.manual_seed(0)
        model = LatentActionModel(LatentActionConfig.of(PRESETS[args.preset].latent))
        if args.dcae:
            model.load_dcae(args.dcae)
    model.to(device())
    pyramid = Pyramid(args.data, (2, 3, 4, 5, 6), 1, (args.side, args.side))
    print(pyramid.describe(), file=sys.stderr)
    if args.command == "encode":
        return encode(model, args, pyramid)
    clips, made = clips_of(args, pyramid.opened, pyramid.video_hz, model.config)
    if args.command == "tokens":
        made["dcae"] = model.dcae_fingerprint()
        report = each_clip(clips, args.out / "tokens", made, partial(tokens_of, model))
    else:
        report = pretrain(model, clips, args.steps)
        model.save_dcae(args.out)
    print(plain_json(report))


if __name__ == "__main__":
    run_command(main)
