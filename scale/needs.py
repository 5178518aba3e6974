"""The needs of a stage before it can begin, each with the command that gets it."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from data import backbones_folder, open_pyramid
from motus import PRESETS, open_weights
from scale.synthetic import SYNTHETIC


def dcae_of(args: argparse.Namespace) -> Path:
    """The DC-AE of stage latent: that of --init, our own file or the published folder."""
    own = backbones_folder(args.preset) / "dcae.safetensors"
    return args.init or (own if own.exists() else own.with_suffix(""))


def missing(args: argparse.Namespace) -> list[str]:
    """The needs of a stage that are not there, each with the command that gets it."""
    if args.data == SYNTHETIC and args.stage != "latent":
        return []
    found = []
    if not (args.data or args.cache or PRESETS[args.preset].data):
        card = "python data.py inspect DATASET --card card.json, then --data card.json"
        found.append(f"a dataset card: {card}")
    folder = backbones_folder(args.preset)
    if args.stage == "latent":
        if not dcae_of(args).exists():
            get = "python -m weights download dcae"
            if PRESETS[args.preset].latent["dcae"]:  # not of the published size
                get = f"python -m scripts.latents pretrain --out {dcae_of(args)}.safetensors"
            found.append(f"DC-AE {dcae_of(args)}: {get}")
    elif not (folder / "vae.safetensors").is_file():
        for name in ("wan", "qwen3vl") if args.stage != "1" else ("wan",):
            if not (folder / name).is_dir():
                found.append(f"frozen backbones {folder / name}: python -m weights download {name}")
    return found


def ready(jobs: Sequence[argparse.Namespace], log_to: str) -> Sequence[argparse.Namespace]:
    """The stages to train as they are; ValueError with all that they lack."""
    needs = [need for job in jobs for need in missing(job)]
    if log_to and find_spec(log_to) is None:
        needs.append(f"{log_to} for --set log_to={log_to}: pip install {log_to}, or leave it out")
    if len(jobs) > 1:
        needs += [fault for job in jobs for fault in unfit(job)]
    if needs:
        unlike = dict.fromkeys(needs)
        raise ValueError("\n  ".join(["missing, before anything is trained:", *unlike]))
    first = jobs[0] if jobs else None
    if first and first.init and first.stage != "latent" and not first.resume:
        open_weights(first.init)
    return jobs


def unfit(args: argparse.Namespace) -> list[str]:
    """The faults of --data for a stage, without looking at more than an episode."""
    if args.data in (None, SYNTHETIC) or args.cache:
        return []
    try:
        pyramid = open_pyramid(args.data, args.stage, args.preset, episodes=1)
    except ValueError as error:
        return [str(error)]
    if args.stage != "latent" or all(o.reader.flows(0, 1) is not None for o in pyramid.opened):
        return []
    get = f"python -m scripts.latents tokens --preset {args.preset} --dcae {dcae_of(args)}"
    return [f"optical flow of the videos: {get} --labelled 0.1 --data {args.data} --out {args.out}"]
