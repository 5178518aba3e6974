"""The experiments of docs/latent_action, on the tabletop: what 14 numbers hold, and how many
demonstrations they save.

    python -m scripts.paper evidence        evidence.md and evidence.json
    python -m scripts.paper downstream      downstream.md, .json and .png; start again to go on

evidence: labels are those of the target robot on a tenth of the rows; the hand, the arm and the
gantry are never labelled. Against the true motion of held-out episodes over one interval, R2 of
- probe: the best linear map from the 14 numbers to the motion, fitted on training rows of the same
  body (of the target robot: on the labelled ones): what the numbers hold;
- direct: the first numbers themselves: what alignment makes of them.

downstream: for each seed stage 1; from it either more of stage 1 or stage 2 on latent actions, of
equal steps; from both stage 3 on the same n demonstrations; then the same unseen worlds in closed
loop. All experts, data and worlds depend on (seed, n) alone. The saving is the ratio of the
demonstrations that both arms need for the same success: read from the curve of success over log n,
pooled over seeds, its interval from resampled seeds and worlds. Where the arm without stage 2 does
not reach it at all, the ratio is a lower bound.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import train
from backbones.optical_flow import augmented
from formats.motions import Motions, motions
from latent_action import LatentActionConfig, LatentActionModel, fit, probe
from motus import PRESETS
from scripts import evaluate
from weights.files import same_config, write_json
from weights.options import DEVICE, Parser, output_folder, run_command

TOY = PRESETS["toy"]

# -- what 14 numbers hold -------------------------------------------------------------------------

BODIES = {"target robot": 6, "hand": 2, "arm and gantry": 5}  # and their level of the pyramid
VARIANTS = {  # name -> changes of the configuration, features that the VAE compresses
    "flow, aligned": ({}, "tokens"),
    "without alignment": ({"lambda_action": 0.0}, "tokens"),
    "without KL": ({"beta": 0.0}, "tokens"),
    "random DC-AE": ({}, "random tokens"),
}


def model_of(seed: int, **changes) -> LatentActionModel:
    torch.manual_seed(seed)
    return LatentActionModel(LatentActionConfig.of(TOY.latent, **changes))


def sparsely_labelled(seen: Motions) -> Motions:
    """The same with labels on a tenth of all rows."""
    known = seen.mask.any(dim=1).nonzero()[:, 0]
    mask = torch.zeros_like(seen.mask)
    mask[known[:: max(1, 10 * len(known) // len(mask))]] = True
    return seen._replace(mask=mask)


def probes(seen: Motions, held: Motions, z: Tensor, test: Tensor) -> dict[str, list[float]]:
    """R2 per body of a linear map fitted on its training rows of z (N, Z)."""
    found = {}
    for body, level in BODIES.items():
        known = seen.mask.any(dim=1) if body == "target robot" else seen.level == level
        new = held.level == level
        r2 = probe(z[known], seen.labels[known], test[new], held.labels[new])
        found[body] = r2.tolist()
    return found


@torch.no_grad()
def measure(
    model: LatentActionModel, x: Tensor, test: Tensor, seen: Motions, held: Motions
) -> dict[str, dict[str, list[float]]]:
    """R2 per body of features x of the training rows and `test` of held-out ones."""
    mu, _ = model.tokens_to_latent(x)
    new, _ = model.tokens_to_latent(test)
    direct = {}
    for body, level in BODIES.items():
        labels = held.labels[held.level == level]
        first = new[held.level == level, : labels.shape[1]]
        error = (first - labels).square().mean(dim=0)
        direct[body] = (1 - error / labels.var(dim=0, correction=0)).tolist()
    return {"probe": probes(seen, held, mu, new), "direct": direct}


def evidence(args: argparse.Namespace, about: str) -> None:
    model = model_of(0)
    model.load_dcae(TOY.backbones / "dcae.safetensors")
    pyramid = data.open_pyramid(None, "latent", "toy", args.episodes)
    seen = sparsely_labelled(motions(pyramid, model.config.interval))
    held = motions(pyramid, model.config.interval, held_out=True)
    count = len(seen.flow)
    flow, labels, mask = augmented(seen.flow, seen.labels, seen.mask)
    features = {}
    for kind, network in (("tokens", model), ("random tokens", model_of(1))):
        rows = network.flow_to_tokens(flow), labels, mask
        features[kind] = rows, network.flow_to_tokens(held.flow)
    runs = {}
    for variant, (changes, kind) in VARIANTS.items():
        rows, test = features[kind]
        for seed in range(args.seeds):
            fitted = model_of(seed, **changes)
            changed = [f"steps={args.steps}", f"seed={seed}"]
            fit(fitted, rows, train.settings_for("toy", "latent", changed))
            runs[f"{variant}/{seed}"] = measure(fitted, rows[0][:count], test, seen, held)
    (x, *_), test = features["tokens"]
    flow = seen.flow.flatten(1)
    _, _, axes = torch.pca_lowrank(flow[:: max(1, count // 3000)], 14, niter=2)
    linear = {
        "PCA of the flow": probes(seen, held, flow @ axes, held.flow.flatten(1) @ axes),
        "all numbers of the DC-AE, the most to be had": probes(seen, held, x[:count], test),
    }
    labelled = seen.mask.any(dim=1).sum()
    about += f"; {count:,} rows, {labelled:,} labelled; {len(held.flow):,} held out"
    stored = {"about": about, "runs": runs, "linear": linear}
    write_json(args.out / "evidence.json", stored)
    (args.out / "evidence.md").write_text(evidence_page(stored))


def evidence_page(stored: dict) -> str:
    lines = [
        f"# What the toy's latent actions hold\n\n{stored['about']}\n",
        "R2 of the motion in x, y and opening on held-out episodes, mean over seeds and range,",
        "`probe` by the best linear map, `direct` by the first three numbers as they are. Labels",
        "are those of the target robot alone.\n",
        "| 14 numbers from | body | probe x | y | opening | direct x | y | opening |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        runs = [run for key, run in stored["runs"].items() if key.split("/")[0] == variant]
        for body in BODIES:
            cells = [variant, body]
            for kind in ("probe", "direct"):
                for values in zip(*(run[kind][body] for run in runs)):
                    span = f"({min(values):.2f} to {max(values):.2f})"
                    cells.append(f"{np.mean(values):.2f} {span}")
            lines.append(f"| {' | '.join(cells)} |")
    for name, found in stored["linear"].items():
        for body, values in found.items():
            cells = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {name} | {body} | {cells} | | | |")
    return "\n".join(lines) + "\n"


# -- how many demonstrations they save ------------------------------------------------------------

ARMS = ("stage 1", "stages 1, 2")
SET3 = ["lr=1e-3", "video_lr=1e-3", "muon_lr=0.02", "warmup=100", "ema=0.99"]
NUMBERS = {
    "seeds": 3,
    "steps": 1500,  # of a VAE
    "steps1": 500,
    "steps2": 1000,  # of stage 2, or more of stage 1
    "steps3": 1200,
    "videos": 200,  # episodes per level without actions
    "windows": 4000,  # of these, encoded once
    "episodes": 100,  # worlds per cell; per level of evidence
    "max-steps": 100,  # actions per world
}


def trained(run: Path, stage: str, settings: Sequence[str], *more: str | Path) -> Path:
    """A run of one stage, trained unless it is finished; one that was cut off begins anew."""
    steps = train.settings_for("toy", stage, settings).steps
    if not (run / f"step_{steps:06d}").is_dir() and not (run / data.LATENT_FILE).is_file():
        shutil.rmtree(run, ignore_errors=True)
        options = ["--stage", stage, "--out", run, *more, "--set", *settings]
        train.main([str(option) for option in options])
    return run


def cached(path: Path, stage: str, **options: object) -> Path:
    """Encoded windows, unless they are there; both arms read the same ones."""
    if not path.exists():
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        data.main(["cache", "--stage", stage, "--out", str(path), *words])
    return path


def pretrained(args: argparse.Namespace, seed: int) -> dict[str, Path]:
    """The runs that stage 3 starts from, by arm."""
    folder = args.run / f"seed{seed}"
    same = f"seed={seed}"
    latent = trained(folder / "latent", "latent", [same])
    pool = {"episodes": args.videos, "windows": args.windows, "seed": seed}
    video = "--cache", cached(folder / "pool1.safetensors", "1", **pool)
    both = "--cache", cached(folder / "pool2.safetensors", "2", latent=latent, **pool)
    first = trained(folder / "stage1", "1", [same, f"steps={args.steps1}"], *video)
    steps = f"steps={args.steps1 + args.steps2}"
    longer = trained(folder / "stage1long", "1", [same, steps], *video)
    more = "--init", first, "--latent", latent
    second = trained(folder / "stage2", "2", [same, f"steps={args.steps2}"], *both, *more)
    return dict(zip(ARMS, (longer, second)))


def cell(args: argparse.Namespace, seed: int, n: int, init: Path) -> dict[str, dict[str, int]]:
    """Stage 3 on n demonstrations and its closed loop: mode -> successes and episodes."""
    folder = args.run / f"seed{seed}"
    run = folder / f"{init.name}_n{n}"
    if not (run / "evaluation.json").exists():
        pool = cached(folder / f"pool3_n{n}.safetensors", "3", episodes=n, windows=8000, seed=seed)
        settings = [f"seed={seed}", f"steps={args.steps3}", *args.set3]
        trained(run, "3", settings, "--cache", pool, "--init", init)
        options = f"--modes {args.modes} --seed {1000 + seed} --steps 4 --execute 4".split()
        options += f"--episodes {args.episodes} --max-steps {args.max_steps}".split()
        evaluate.main(["--ckpt", str(run), "--out", str(run), *options])
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    return {
        row["policy"]: {key: row["all"][key] for key in ("successes", "episodes")} for row in rows
    }


def savings(counts: np.ndarray, without: np.ndarray, within: np.ndarray) -> np.ndarray:
    """For each of `counts`, at which the arm `within` has these rates of success: how many times as
    many demonstrations the arm `without` needs for the same. Its curve is linear in log n and made
    to rise; beyond its ends the count there, which is then too many (a success that the fewest
    exceed) or too few (one that the most do not reach)."""
    rising, first = np.unique(np.maximum.accumulate(without), return_index=True)
    logs = np.log(counts)
    needed = np.interp(within, rising, logs[first], right=logs[-1])
    return np.exp(needed - logs)


def interval(
    counts: np.ndarray, without: np.ndarray, within: np.ndarray, worlds: int, draws: int = 2000
) -> np.ndarray:
    """95 % intervals (counts, 2) of `savings`, of success rates (seeds, counts): seeds drawn with
    replacement, worlds of each cell drawn anew."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        rows = rng.integers(len(without), size=len(without))
        drawn = [rng.binomial(worlds, rates[rows]).mean(axis=0) for rates in (without, within)]
        found.append(savings(counts, drawn[0] / worlds, drawn[1] / worlds))
    return np.percentile(found, [2.5, 97.5], axis=0).T


def report(args: argparse.Namespace, about: str, cells: dict[str, dict]) -> None:
    """downstream.json, .md and .png."""
    from matplotlib.figure import Figure

    counts = np.array(args.demonstrations)
    modes = args.modes.split(",")
    total = args.episodes * args.seeds
    saved = {}
    lines = [
        f"# Demonstrations that latent actions save\n\n{about}\n",
        "Success in closed loop, %, pooled over seeds, with Wilson's interval; in brackets",
        "each seed's. The last line: how many times as many demonstrations the same success takes",
        f"without stage 2, of at most {counts[-1]}.\n",
        f"| | {' | '.join(f'n = {n}' for n in counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    figure = Figure((4.6 * len(modes), 3.4), layout="constrained")
    for axis, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes):
        rates = []
        for arm in ARMS:
            keys = [[f"{arm}/{seed}/{n}" for n in counts] for seed in range(args.seeds)]
            won = np.array([[cells[key][mode]["successes"] for key in row] for row in keys])
            rates.append(won / args.episodes)
            mean = 100 * rates[-1].mean(axis=0)
            ends = 100 * np.array([evaluate.wilson(k, total) for k in won.sum(axis=0)])
            rows = zip(mean, ends, 100 * rates[-1].T)
            texts = [f"{rate:.0f} {end.round()} ({each.round()})" for rate, end, each in rows]
            lines.append(f"| {mode}, {arm} | {' | '.join(texts)} |")
            axis.plot(counts, mean, marker="o", label=arm)
            axis.fill_between(counts, *ends.T, alpha=0.2)
        axis.set(xscale="log", xlabel="demonstrations", ylabel="success, %", title=mode)
        axis.legend()
        without, within = (rate.mean(axis=0) for rate in rates)
        found = saved[mode] = {
            "seeds": args.seeds,
            "saving": savings(counts, without, within).tolist(),
            "interval": interval(counts, *rates, args.episodes).tolist(),
            "reached": (within <= without.max()).tolist(),
        }
        texts = []
        for ratio, (low, high), reached in zip(*list(found.values())[1:]):
            texts.append(f"{'' if reached else 'over '}{ratio:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {mode}, times as many | {' | '.join(texts)} |")
    lines.append("\n![Success over demonstrations](downstream.png)\n")
    figure.savefig(args.out / "downstream.png", dpi=110)
    stored = {"about": about, "savings": saved, "cells": cells}
    write_json(args.out / "downstream.json", stored)
    (args.out / "downstream.md").write_text("\n".join(lines))


def downstream(args: argparse.Namespace, about: str) -> None:
    asked = {key: value for key, value in vars(args).items() if key not in ("run", "out")}
    settings = args.run / "settings.json"
    if settings.exists():
        same_config(settings, json.loads(settings.read_text()), asked)
    args.run.mkdir(parents=True, exist_ok=True)
    write_json(settings, asked)
    cells = {}
    for seed in range(args.seeds):
        inits = pretrained(args, seed)
        for n in args.demonstrations:
            for arm, init in inits.items():
                cells[f"{arm}/{seed}/{n}"] = cell(args, seed, n, init)
    report(args, about, cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.option
    add("experiment", str, choices=("evidence", "downstream"))
    add("--out", output_folder, default="docs/latent_action")
    add("--run", output_folder, default="runs/downstream")
    add("--modes", "joint")
    add("--demonstrations", int, nargs="+", default=[100, 200, 400])
    add("--set3", str, nargs="*", default=SET3, metavar="KEY=VALUE")
    add(*DEVICE)
    for name, default in NUMBERS.items():
        add(f"--{name}", default)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    about = f"`python -m scripts.paper {words}`, torch {torch.__version__} on a CPU"
    if args.experiment == "evidence":
        evidence(args, about)
    else:
        downstream(args, about)


if __name__ == "__main__":
    run_command(main)
