"""Videos to latent actions, and to what their encoder is trained on; the commands of
latent_action.py.

    python latent_action.py encode   --weights ... --data ... --out ...          latent_action_dim14 files, statistics, a LeRobot column
    python latent_action.py tokens   --preset small --dcae ... --data ... --out ...     for python train.py --stage latent --cache OUT
    python latent_action.py pretrain --preset small --data ... --out dcae.safetensors   a DC-AE, for sizes that have no published one

    --data    the word toy, a folder of mp4 files, or a LeRobot dataset (whose state labels it)
    --flow    dis, true (of the toy world), or DPFlow by the name of its weights, which are for research only

Clips stream through flow, DC-AE and VAE, a chunk of frames at a time. What is written is kept by
the next run if it was made in the same way, and refused if not. A clip that cannot be used is
skipped, counted and reported with its reason; no row of it is written.

Shapes: T rows of a clip, which has T + 1 frames; H W height and width, D token features, A aligned
dimensions.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from backbones.dpflow import DISFlow, FlowEstimator, load_dpflow
from formats import lerobot
from formats.lerobot import COLUMN, KNOWN
from latent_action import (
    Flows,
    LatentActionConfig,
    LatentActionModel,
    encode_flows,
    prepared,
    resize_flow,
    same_config,
)
from motus import PRESETS
from scripts.pretrain import pretrain_dcae
from weights.files import open_source, read_metadata, save_safetensors
from weights.hub import CHECKPOINTS, LICENCE_NOTICE, fetch
from worlds.motions import LABELLED, true_flows, true_labels
from worlds.tabletop import record

Labels = Tensor  # (T, A), the rows of the flow, NaN in columns that the embodiment lacks

# -- flow and labels of clips ---------------------------------------------------------------------


def measured_flows(
    frames: Iterable[Tensor],
    estimator: FlowEstimator,
    interval: int,
    composed: bool = False,
    chunk: int = 32,
    device: str | torch.device = "cpu",
) -> Flows:
    """Frames (3, H, W) in [0, 1], of which memory holds chunk + interval. `composed` follows the
    motion from neighbour to neighbour, for estimators that lose sight of fast things; otherwise the
    estimator, on `device`, sees frames i and i + interval."""
    window = []
    for frame in frames:
        window.append(frame)
        if len(window) == chunk + interval:
            yield _measure(torch.stack(window).to(device), chunk, estimator, interval, composed)
            window = window[chunk:]
    if len(window) > 1:
        yield _measure(
            torch.stack(window).to(device), len(window) - 1, estimator, interval, composed
        )


@torch.no_grad()
def _measure(
    frames: Tensor, count: int, estimator: FlowEstimator, interval: int, composed: bool
) -> tuple[Tensor, Tensor]:
    begin, last = torch.arange(count, device=frames.device), len(frames) - 1
    end = (begin + interval).clamp(max=last)
    seen = frames.flatten(2).std(dim=-1).amax(dim=1) > 1 / 255
    valid = (begin + interval <= last) & seen[begin] & seen[end]
    if not composed:
        return rearrange(estimator(frames[begin], frames[end]), "b c h w -> b h w c"), valid
    steps = estimator(frames[:-1], frames[1:])  # (last, 2, H, W)
    height, width = steps.shape[-2:]
    here = torch.stack(
        torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1
    ).to(steps)
    total = steps.new_zeros(count, height, width, 2)
    for k in range(interval):  # read each step where the pixel has gone
        at = 2 * (here + total) / steps.new_tensor([width - 1, height - 1]) - 1
        step = F.grid_sample(
            steps[(begin + k).clamp(max=last - 1)], at, padding_mode="border", align_corners=True
        )
        total = (
            total + rearrange(step, "b c h w -> b h w c") * (begin + k < last)[:, None, None, None]
        )
    return total, valid


def square(picture: np.ndarray, side: int) -> Tensor:
    """A picture (H, W, 3) uint8 -> (3, side, side) in [0, 1], padded with black to a square."""
    pixels = rearrange(torch.from_numpy(picture), "h w c -> 1 c h w").float() / 255
    height, width = (max(1, round(n * side / max(pixels.shape[2:]))) for n in pixels.shape[2:])
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True).clamp(0, 1)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))


def read_video(path: Path, side: int) -> Iterator[Tensor]:
    """Frames (3, side, side) in [0, 1] of a video, padded to a square. ValueError if it cannot be
    decoded to its end."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "reading videos needs PyAV: pip install av (the extra motus[data])"
        ) from error
    count = 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield square(frame.to_ndarray(format="rgb24"), side)
                count += 1
            promised = container.streams.video[0].frames
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot be decoded beyond frame {count} ({error})") from error
    if count < promised:
        raise ValueError(f"ends after {count} of {promised} frames")


@torch.no_grad()
def encode_tokens(
    model: LatentActionModel, flows: Flows, labels: Labels | None, compensate: bool = False
) -> tuple[dict, dict]:
    """What training needs of a clip: tokens (n, D) in half precision, labels (n, A) and mask (n, A)
    of its valid rows; and the figures. `labels` (T, A) has the rows of the flow, NaN in columns
    that the embodiment lacks."""
    figures: dict[str, float] = {}
    rows = [
        (model.tokens(flow).half().cpu(), valid)
        for flow, valid in prepared(model, flows, compensate, figures)
    ]
    tokens, valid = (torch.cat(column) for column in zip(*rows))
    if labels is None:
        labels = torch.full((len(tokens), model.config.action_dim), math.nan)
    if labels.shape != (len(tokens), model.config.action_dim):
        raise ValueError(
            f"its labels have shape {tuple(labels.shape)}; its flow has {len(tokens)} rows, action_dim is "
            f"{model.config.action_dim}"
        )
    mask = ~labels.isnan().all(dim=0).expand_as(labels)
    if len(bad := (mask & ~labels.isfinite())[valid].nonzero()):
        raise ValueError(
            f"its label of row {bad[0, 0]}, dimension {bad[0, 1]} is not finite; repair it or drop the clip"
        )
    return {
        "tokens": tokens[valid],
        "labels": labels[valid].float().contiguous(),
        "mask": mask[valid].contiguous(),
    }, figures


class Clip(NamedTuple):
    """One video. Nothing of it is read before it is asked for; what is wrong with it is a
    ValueError then."""

    flows: Callable[[], Flows]
    labels: Callable[[], Labels | None] = lambda: None


def each_clip(
    clips: dict[str, Clip], folder: Path, made: dict, work: Callable[[Clip], tuple[dict, dict]]
) -> tuple[dict, list[Path]]:
    """Writes FOLDER/NAME.safetensors of each clip: the tensors that `work` makes of it, how they
    were `made`, and figures. What is there already is kept if it was made in the same way. A clip
    that cannot be used is skipped, with its reason in the summary; ValueError if none can. Returns
    the summary and the files."""
    skipped, figures, files = {}, [], []
    for name, clip in tqdm(clips.items(), desc=folder.name, unit="clip"):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            try:
                tensors, measured = work(clip)
            except ValueError as error:
                skipped[name] = str(error)
                continue
            save_safetensors(
                path, tensors, {"made": json.dumps(made), "figures": json.dumps(measured)}
            )
        info = read_metadata(path)
        same_config(path, json.loads(info.get("made", "{}")), made)
        figures.append(json.loads(info["figures"])), files.append(path)
    if not figures:
        raise ValueError(
            f"no usable clip among {len(clips)}: {'; '.join(f'{name}: {why}' for name, why in list(skipped.items())[:5])}"
        )
    rows = sum(f["rows"] for f in figures)
    return {
        "clips": len(figures),
        "skipped": skipped,
        **{key: sum(f[key] for f in figures) for key in ("rows", "valid_rows")},
        **{
            key: sum(f[key] * f["rows"] for f in figures) / rows
            for key in ("clipped", "camera_share")
        },
    }, files


def export(
    model: LatentActionModel,
    clips: dict[str, Clip],
    out: Path,
    made: dict,
    compensate: bool = False,
    pt: bool = False,
) -> dict:
    """Writes OUT/latent_action_dim14/NAME.safetensors of each clip (`pt`: also NAME.pt, the
    official form), OUT/statistics.json, with which to standardise them, and OUT/summary.json, which
    is returned. `made` says how the flow was measured; see `each_clip`."""
    made = {
        "model": model.fingerprint(),
        "interval": model.config.interval,
        "radius": model.config.radius,
        "image": model.config.image,
        "code": model.config.code,
        "compensate": compensate,
        **made,
    }
    folder = out / f"latent_action_dim{model.config.latent_dim}"
    summary, files = each_clip(
        clips, folder, made, lambda clip: encode_flows(model, clip.flows(), compensate)
    )
    parts = []
    for path in files:
        with open_source(path) as source:
            tensors = {key: source.read(key).clone() for key in source.names()}
        parts.append(
            lerobot.measure(
                tensors["latent_action"][tensors["valid"]].numpy(), int(tensors["valid"].sum())
            )
        )
        if pt:
            torch.save(tensors | made, folder / f".{path.stem}.tmp")
            (folder / f".{path.stem}.tmp").replace(path.with_suffix(".pt"))
    measured = {key: value.tolist() for key, value in lerobot.pool(parts).items()}
    statistics = {
        "mean": model.latent_mean.tolist(),
        "std": model.latent_std.tolist(),
        "of these clips": measured,
        "made": made,
    }
    for name, content in (("statistics.json", statistics), ("summary.json", summary)):
        (out / name).write_text(json.dumps(content, indent=1))
    return summary


def add_column(dataset: "lerobot.LeRobotDataset", folder: Path, out: Path) -> None:
    """Writes to `out` the LeRobot dataset with the columns latent_action (14,), as `export` wrote
    them to `folder`, not standardised, and latent_action_valid, False where there is none: in the
    last rows, which repeat the one before, and in episodes that were skipped, which have zeros. The
    column's `info` says how many seconds one spans, and with which mean and std to standardise
    them. Videos are linked where the file system can, else copied. ValueError if `out` exists; a
    failure leaves nothing behind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.exists() or COLUMN in dataset.features:
        raise ValueError(
            f"{out} exists, or {dataset.name} has a column {COLUMN}; write elsewhere, or take the dataset without it"
        )
    rows, valid, stats = {}, {}, {}
    for episode, info in enumerate(dataset.episodes):
        rows[episode], valid[episode] = (
            np.zeros((info.length, 0), np.float32),
            np.zeros(info.length, bool),
        )
        if (path := folder / f"episode_{episode:06d}.safetensors").exists():
            with open_source(path) as source:
                z, ok = source.read("latent_action").numpy(), source.read("valid").numpy()
            if len(z) != info.length - 1:
                raise ValueError(
                    f"{path}: has {len(z)} rows where {info.length - 1} are due; it is of another dataset than {dataset.name}"
                )
            rows[episode], valid[episode] = np.concatenate([z, z[-1:]]), np.append(ok, False)
    width = max(z.shape[1] for z in rows.values())
    rows = {e: z if z.shape[1] else np.zeros((len(z), width), np.float32) for e, z in rows.items()}
    stats = {
        e: {COLUMN: lerobot.measure(z, len(z)), KNOWN: lerobot.measure(valid[e][:, None], len(z))}
        for e, z in rows.items()
    }
    about = json.loads((folder.parent / "statistics.json").read_text())
    info = {
        "seconds": about["made"]["interval"] / dataset.fps,
        "mean": about["mean"],
        "std": about["std"],
    }
    features = {
        COLUMN: {
            "dtype": "float32",
            "shape": [width],
            "names": [f"z{i}" for i in range(width)],
            "info": info,
        },
        KNOWN: {"dtype": "bool", "shape": [1], "names": None},
    }
    part = out.with_name(out.name + ".part")
    try:
        for path in sorted(p for p in dataset.root.rglob("*") if p.is_file()):
            target = part / path.relative_to(dataset.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.relative_to(dataset.root).parts[0] == "data" and path.suffix == ".parquet":
                table = pq.read_table(path)
                at = list(zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist()))
                z = np.stack([rows[e][i] for e, i in at])
                table = table.append_column(
                    COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), width)
                )
                table = table.append_column(KNOWN, pa.array([bool(valid[e][i]) for e, i in at]))
                meta = {k: v for k, v in (table.schema.metadata or {}).items()}
                if b"huggingface" in meta:
                    kinds = json.loads(meta[b"huggingface"])
                    value = lambda dtype: {"dtype": dtype, "_type": "Value"}
                    kinds["info"]["features"] |= {
                        COLUMN: {"feature": value("float32"), "length": width, "_type": "Sequence"},
                        KNOWN: value("bool"),
                    }
                    meta[b"huggingface"] = json.dumps(kinds).encode()
                pq.write_table(
                    table.replace_schema_metadata(meta), target, write_page_checksum=True
                )
            elif path.relative_to(dataset.root).parts[0] == "meta":
                target.write_bytes(path.read_bytes())
            else:
                try:
                    target.hardlink_to(path)
                except OSError:
                    shutil.copyfile(path, target)
        info = json.loads((part / "meta/info.json").read_text())
        info["features"] |= features
        (part / "meta/info.json").write_text(json.dumps(info, indent=4))
        if (path := part / "meta/stats.json").exists():
            whole = {key: lerobot.pool([stats[e][key] for e in stats]) for key in features}
            path.write_text(
                json.dumps(json.loads(path.read_text()) | lerobot.as_lists(whole, features))
            )
        if (path := part / "meta/episodes_stats.jsonl").exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                line["stats"] |= lerobot.as_lists(stats[line["episode_index"]], features)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


# -- the command ----------------------------------------------------------------------------------


def estimator_of(name: str, upscale: int, device: str) -> FlowEstimator | None:
    """dis, true (None), one of DPFlow's CHECKPOINTS, or a file with its weights."""
    if name in ("true", "dis"):
        return DISFlow(upscale=upscale) if name == "dis" else None
    if not Path(name).suffix:
        return load_dpflow(fetch(name, Path(torch.hub.get_dir()) / "checkpoints")).to(device)
    print(LICENCE_NOTICE, file=sys.stderr)
    return load_dpflow(name).to(device)


def lerobot_labels(
    dataset: lerobot.LeRobotDataset, interval: int, slots: list[int], dims: int
) -> tuple[Callable[[int], Labels], list[float]]:
    """Labels of a dataset's episodes and their scale: the change of the measured state over exactly
    the interval, by its root mean square over all episodes, not centred, so that no motion is 0.
    `slots[k]` is the dimension of the state that mu[k] is aligned with, -1 for none."""
    if not dataset.state_key:
        raise ValueError(f"{dataset.name}: has no state to take labels from; leave --labelled out")
    width = dataset.features[dataset.state_key]["shape"][0]
    slots = slots or list(range(width))
    if len(slots) > dims or max(slots) >= width or min(slots) < -1:
        raise ValueError(
            f"--slots is {slots}; allowed: at most {dims} (action_dim) numbers from -1 to {width - 1}, the state's last"
        )

    def changes(episode: int) -> np.ndarray:
        state = dataset.rows(episode)[dataset.state_key].astype(np.float64)
        end = np.minimum(np.arange(len(state) - 1) + interval, len(state) - 1)
        found = np.full((len(end), dims), np.nan)
        for k, slot in enumerate(slots):
            if slot >= 0:
                found[:, k] = state[end, slot] - state[:-1, slot]
        return found

    total, count = np.zeros(dims), 0
    for episode in range(len(dataset.episodes)):
        try:
            found = changes(episode)
        except ValueError:  # the episode is skipped, and reported, later
            continue
        total, count = total + np.square(found).sum(axis=0), count + len(found)
    scale = np.sqrt(total / max(count, 1))
    scale[~(scale > 1e-8)] = np.nan  # never moves, or absent: masked
    return lambda episode: torch.from_numpy(changes(episode) / scale), scale.tolist()


def clips_of(
    args: argparse.Namespace, config: LatentActionConfig, device: str
) -> tuple[dict[str, Clip], dict]:
    """What the command line names: clips by name, and how their flow and labels are measured."""
    toy, interval, label = args.data == "toy", config.interval, lambda one: {}
    if not 0 <= args.labelled <= 1:
        raise ValueError(f"--labelled is {args.labelled:g}; allowed: a share from 0 to 1")
    if args.flow == "true" and not toy:
        raise ValueError(
            "--flow true is known of the toy world only; for videos take dis or DPFlow"
        )
    estimator = estimator_of(args.flow, 4 if toy else 1, device)
    made = {
        "flow": estimator.name if estimator else "true",
        "composed": args.composed,
        "side": "as is" if toy else args.side,
    }
    made |= {"labelled": args.labelled} if 0 < args.labelled < 1 else {}
    some = lambda names: [
        name
        for i, name in enumerate(names)
        if int((i + 1) * args.labelled) > int(i * args.labelled)
    ]  # evenly spread
    if toy:
        levels = [int(level) for level in str(args.level).split(",")]
        episodes = {
            f"{e.embodiment}_level{level}_seed{args.seed}_{i:05d}": e
            for level in levels
            for i, e in enumerate(
                record(
                    level, args.episodes, args.seed, args.embodiment, pictures=estimator is not None
                )
            )
        }
        known = some(name for name, e in episodes.items() if e.level in LABELLED)
        labels = {name: partial(true_labels, episodes[name], interval) for name in known}
        if estimator is None:
            return {
                name: Clip(partial(true_flows, e, interval), labels.get(name, lambda: None))
                for name, e in episodes.items()
            }, made
        films = {
            name: lambda e=e: iter(
                rearrange(torch.from_numpy(e.frames), "t h w c -> t c h w").float() / 255
            )
            for name, e in episodes.items()
        }
    elif (Path(args.data) / "meta" / "info.json").exists():
        dataset = lerobot.LeRobotDataset.open(args.data)
        camera, episodes, labels = (
            args.camera or dataset.cameras[0],
            range(len(dataset.episodes)),
            {},
        )
        if camera not in dataset.sizes:
            raise ValueError(f"--camera is {camera}; {args.data} has {list(dataset.sizes)}")
        if args.labelled:
            slots = [int(slot) for slot in args.slots.split(",")] if args.slots else []
            label, made["label_scale"] = lerobot_labels(dataset, interval, slots, config.action_dim)
            labels = {f"episode_{e:06d}": partial(label, e) for e in some(episodes)}
        films = {
            f"episode_{e:06d}": lambda e=e: (
                square(picture, args.side)
                for picture in dataset.pictures(e, camera, range(dataset.episodes[e].length))
            )
            for e in episodes
        }
        made |= {"fps": dataset.fps, "camera": camera}
    else:
        if not (
            films := {
                path.stem: lambda p=path: read_video(p, args.side)
                for path in sorted(Path(args.data).glob("*.mp4"))
            }
        ):
            raise ValueError(
                f"--data {args.data}: no *.mp4 there; give a folder of them, a LeRobot dataset, or the word toy"
            )
        if args.labelled:
            raise ValueError(
                f"--labelled: {args.data} is a folder of videos, without actions; give a LeRobot dataset"
            )
        labels = {}
    how = dict(estimator=estimator, interval=interval, composed=args.composed, device=device)
    measure = lambda film: measured_flows(film(), **how)
    return {
        name: Clip(partial(measure, film), labels.get(name, lambda: None))
        for name, film in films.items()
    }, made


def fresh_model(preset: str, dcae: Path | None, device: str) -> LatentActionModel:
    """A model of a preset, with DC-AE weights if a file is named."""
    if preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    torch.manual_seed(0)
    model = LatentActionModel(LatentActionConfig.of(PRESETS[preset].latent))
    if dcae:
        model.load_dcae(dcae)
    return model.to(device)


def write_tokens(
    model: LatentActionModel,
    clips: dict[str, Clip],
    out: Path,
    made: dict,
    compensate: bool = False,
) -> dict:
    """Writes OUT/tokens/NAME.safetensors of each clip, for `read_tokens`, and OUT/summary.json,
    which is returned."""
    made = {
        "dcae": model.dcae_fingerprint(),
        "interval": model.config.interval,
        "compensate": compensate,
        **made,
    }
    work = lambda clip: encode_tokens(model, clip.flows(), clip.labels(), compensate)
    summary, _ = each_clip(clips, out / "tokens", made, work)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def pretrain(args: argparse.Namespace, device: str) -> dict:
    """The DC-AE of a preset from flow, for presets that have no published one. Labels, where there
    are, help it: see `pretrain_dcae`."""
    model = fresh_model(args.preset, args.init, device)
    clips, _ = clips_of(args, model.config, device)
    every, flow, labels, skipped = math.ceil(sum(1 for _ in clips) / args.rows), [], [], {}
    for name, clip in tqdm(list(clips.items())[::every], desc="flow", unit="clip"):
        try:
            parts = list(clip.flows())
            motion, valid = (torch.cat(column) for column in zip(*parts))
            known = clip.labels()
        except ValueError as error:
            skipped[name] = str(error)
            continue
        keep = valid.nonzero()[:, 0]
        keep = keep[:: max(1, math.ceil(len(keep) * len(clips) / args.rows))]
        flow.append(resize_flow(motion[keep.to(motion.device)], model.config.image).half().cpu())
        labels.append(
            torch.full((len(keep), model.config.action_dim), math.nan)
            if known is None
            else known[keep].float()
        )
    if not flow:
        raise ValueError(f"no usable clip among {len(clips)}: {skipped}")
    flow, labels = torch.cat(flow), torch.cat(labels)
    mask = ~labels.isnan()
    losses = pretrain_dcae(
        model,
        flow,
        *((labels.nan_to_num(), mask) if mask.any() else ()),
        steps=args.steps,
        seed=args.seed,
    )
    model.save_dcae(args.out)
    last = {name: float(np.mean(values[-100:])) for name, values in losses.items()}
    return {
        "rows": len(flow),
        "labelled_rows": int(mask.any(dim=1).sum()),
        "steps": args.steps,
        **last,
        "skipped": skipped,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line; what the user got wrong ends in one line."""
    parser = argparse.ArgumentParser(
        prog="python latent_action.py", description="Latent actions of videos."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "encode": "videos to latent_action_dim14 files",
        "tokens": "videos to what train.py --stage latent --cache OUT trains on",
        "pretrain": "the DC-AE of a preset from the flow of videos",
    }
    for command, text in texts.items():
        add = commands.add_parser(command, help=text, description=text).add_argument
        if command == "encode":
            add(
                "--weights",
                required=True,
                type=Path,
                help="what python train.py --stage latent wrote",
            )
            add("--pt", action="store_true", help="also write NAME.pt, the official form")
            add(
                "--column",
                type=Path,
                metavar="FOLDER",
                help="write the LeRobot dataset of --data to FOLDER, with a column latent_action",
            )
        else:
            add("--preset", default="toy", help=", ".join(PRESETS))
            add(
                "--labelled",
                type=float,
                nargs="?",
                const=1.0,
                default=0.0,
                metavar="SHARE",
                help="take labels, of LeRobot data the "
                "change of the state, of this share of the clips (default: of all); stage latent wants rows without labels too",
            )
            add(
                "--slots",
                help="dimensions of the state that the first latents are aligned with, with commas, -1 for none (default: all)",
            )
        if command == "tokens":
            add(
                "--dcae",
                required=True,
                type=Path,
                help="DC-AE weights: published, or of python latent_action.py pretrain",
            )
        if command == "pretrain":
            add("--steps", type=int, default=3000)
            add("--init", type=Path, help="DC-AE weights to go on from")
            add("--rows", type=int, default=20000, help="flow fields at most, held in memory")
        else:
            add("--compensate", action="store_true", help="take the camera's motion off")
        add("--data", required=True, help="folder of mp4 files, LeRobot dataset, or the word toy")
        add(
            "--out",
            required=True,
            type=Path,
            help="file" if command == "pretrain" else "folder; run again to go on where it stopped",
        )
        add(
            "--flow",
            default="dis",
            help=f"dis, true (toy only), or DPFlow, for research only: {', '.join(CHECKPOINTS)} or a .ckpt",
        )
        add(
            "--composed",
            action="store_true",
            help="follow the flow from frame to frame instead of measuring over the whole interval",
        )
        add(
            "--side",
            type=int,
            default=256,
            help="size at which videos are measured, padded to a square",
        )
        add("--camera", help="of a LeRobot dataset (default: its first)")
        add("--level", default="6", help="of the toy world, with commas (default 6)")
        for name, kind, default in (
            ("embodiment", str, None),
            ("seed", int, 0),
            ("episodes", int, 16),
        ):
            add(
                f"--{name}",
                type=kind,
                default=default,
                help=f"of the toy world (default {default})",
            )
    args = parser.parse_args(argv)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.command == "pretrain":
            report = pretrain(args, device)
        elif args.command == "tokens":
            model = fresh_model(args.preset, args.dcae, device)
            clips, made = clips_of(args, model.config, device)
            report = write_tokens(model, clips, args.out, made, args.compensate)
        else:
            args.labelled, args.slots = 0.0, None
            model = LatentActionModel.load(args.weights).to(device)
            clips, made = clips_of(args, model.config, device)
            report = export(model, clips, args.out, made, args.compensate, args.pt)
            if args.column:
                folder = args.out / f"latent_action_dim{model.config.latent_dim}"
                add_column(lerobot.LeRobotDataset.open(args.data, quiet=True), folder, args.column)
        print(json.dumps(report, indent=1))
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
