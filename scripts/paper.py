"""The experiments of docs/latent_action, on the tabletop: what 14 numbers hold, and how many
demonstrations they save.

    python -m scripts.paper evidence        evidence.md and evidence.json
    bash docs/latent_action/run.sh          downstream.md, .json and .png; start again to go on

evidence: labels are those of the target robot on a tenth of the rows; the hand, the arm and the
gantry are never labelled. Against the true motion of held-out episodes over one interval, R2 of the
best linear map to it from the 14 numbers, fitted on training rows of the same body, and from others
that they are to be compared with.

downstream: of the runs of run.sh, all of whose experts, data and worlds depend on (seed, n) alone.
The saving is the ratio of the demonstrations that both arms need for the same success: read from
the curve of success over log n, pooled over seeds, its interval from resampled seeds and worlds.
Where the arm without stage 2 does not reach it at all, the ratio is a lower bound.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor

import data
import train
from backbones.optical_flow import augmented
from formats.motions import Motions, motions
from latent_action import LatentActionConfig, LatentActionModel, fit, probe
from motus import PRESETS
from scripts.evaluate import rated
from scripts.readme import percent, table
from weights.files import read_json, write_json
from weights.options import DEVICE, Parser, output_folder, run_command

TOY = PRESETS["toy"]


def write_page(path: Path, title: str, *parts: str) -> None:
    """A page of paragraphs."""
    path.write_text("\n\n".join([f"# {title}", *parts]) + "\n")


# -- what 14 numbers hold -------------------------------------------------------------------------

BODIES = {"target robot": 6, "hand": 2, "arm and gantry": 5}  # and their level of the pyramid
VARIANTS = {  # of the 14 numbers, and what of the configuration they change
    "random DC-AE": {},
    "without alignment": {"lambda_action": 0.0},
    "without KL": {"beta": 0.0},
    "flow, aligned": {},
}
EVIDENCE = """R2 of the motion in x, y and opening on held-out episodes by the best linear map, mean
over seeds and range. Labels are those of the target robot alone."""


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
        old = seen.level == level
        new = held.level == level
        found[body] = probe(z[old], seen.labels[old], test[new], held.labels[new]).tolist()
    return found


def evidence(args: argparse.Namespace, about: str) -> None:
    """evidence.json and .md."""
    interval = LatentActionConfig.of(TOY.latent).interval
    pyramid = data.open_pyramid(None, "latent", "toy", args.episodes)
    seen = sparsely_labelled(motions(pyramid, interval))
    held = motions(pyramid, interval, held_out=True)
    runs = {variant: [] for variant in VARIANTS}
    for variant, seed in product(VARIANTS, range(args.seeds)):
        torch.manual_seed(seed)
        model = LatentActionModel(LatentActionConfig.of(TOY.latent, **VARIANTS[variant]))
        if variant != "random DC-AE":
            model.load_dcae(TOY.backbones / "dcae.safetensors")
        settings = train.settings_for("toy", "latent", [f"steps={args.steps}", f"seed={seed}"])
        fit(model, augmented(seen.flow, seen.labels, seen.mask), settings)
        tokens = [model.as_tokens(part.flow) for part in (seen, held)]
        z = [model.tokens_to_latent(x)[0] for x in tokens]
        runs[variant].append(probes(seen, held, *z))
    flow = [part.flow.flatten(1) for part in (seen, held)]
    _, _, axes = torch.pca_lowrank(flow[0][::5], 14)
    runs["PCA of the flow"] = [probes(seen, held, *(x @ axes for x in flow))]
    runs["all numbers of the DC-AE, the most to be had"] = [probes(seen, held, *tokens)]
    about += f"; {len(seen.flow):,} rows, {seen.mask.any(dim=1).sum():,} labelled"
    write_json(args.out / "evidence.json", {"about": about, "runs": runs})
    rows = []
    for name, body in product(runs, BODIES):
        values = np.array([run[body] for run in runs[name]])
        spans = zip(values.mean(axis=0), values.min(axis=0), values.max(axis=0))
        texts = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in spans]
        rows.append([name, body, *texts])
    head = ["numbers from", "body", "x", "y", "opening"]
    title = "What the toy's latent actions hold"
    write_page(args.out / "evidence.md", title, about, EVIDENCE, table(head, rows))


# -- how many demonstrations they save ------------------------------------------------------------

ARMS = {"stage 1": "longer", "stages 1, 2": "stage2"}  # and their runs in docs/latent_action/run.sh
DOWNSTREAM = """Success in closed loop, %, pooled over seeds, with Wilson's interval; in brackets
each seed's. The last line: how many times as many demonstrations the same success takes without
stage 2, of at most the last count.

![Success over demonstrations](downstream.png)"""


def savings(counts: ndarray, without: ndarray, within: ndarray) -> ndarray:
    """For each of `counts`, at which the arm `within` has these rates of success: how many times as
    many demonstrations the arm `without` needs for the same. Its curve is linear in log n and made
    to rise; beyond its ends the count there, which is then too many (a success that the fewest
    exceed) or too few (one that the most do not reach)."""
    rising, first = np.unique(np.maximum.accumulate(without), return_index=True)
    logs = np.log(counts)
    needed = np.interp(within, rising, logs[first], right=logs[-1])
    return np.exp(needed - logs)


def interval(counts: ndarray, without: ndarray, within: ndarray, worlds: int) -> ndarray:
    """95 % intervals (counts, 2) of `savings`, of success rates (seeds, counts): seeds drawn with
    replacement, worlds of each cell drawn anew."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        rows = rng.integers(len(without), size=len(without))
        drawn = [rng.binomial(worlds, rates[rows]).mean(axis=0) for rates in (without, within)]
        found.append(savings(counts, drawn[0] / worlds, drawn[1] / worlds))
    return np.percentile(found, [2.5, 97.5], axis=0).T


def downstream(args: argparse.Namespace, about: str) -> None:
    """downstream.json, .md and .png."""
    seeds = sorted(args.run.glob("seed*"))
    if not seeds:
        raise ValueError(f"{args.run} holds no seed*; `bash docs/latent_action/run.sh` makes them")
    counts = sorted(int(path.name.partition("_n")[2]) for path in seeds[0].glob("stage2_n*"))
    rates = []
    rows = []
    figure = Figure((4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for arm, run in ARMS.items():
        cells = []
        for seed, n in product(seeds, counts):
            played = read_json(seed / f"{run}_n{n}" / "evaluation.json")
            cells.append(played["rows"][0]["all"])
        won = np.array([cell["successes"] for cell in cells]).reshape(len(seeds), -1)
        worlds = cells[0]["episodes"]
        rates.append(won / worlds)
        wins = won.sum(axis=0).tolist()
        pooled = [rated(count, worlds * len(seeds)) for count in wins]
        each = (100 * rates[-1].T).round()
        texts = [f"{percent(rate)} ({one})" for rate, one in zip(pooled, each)]
        rows.append([arm, *texts])
        ends = np.array([rate["interval"] for rate in pooled])
        axis.plot(counts, 100 * rates[-1].mean(axis=0), marker="o", label=arm)
        axis.fill_between(counts, *100 * ends.T, alpha=0.2)
    axis.set(xscale="log", xlabel="demonstrations", ylabel="success, %")
    axis.legend()
    figure.savefig(args.out / "downstream.png", dpi=110)
    without, within = (rate.mean(axis=0) for rate in rates)
    found = {
        "saving": savings(counts, without, within),
        "interval": interval(counts, *rates, worlds),
        "reached": within <= without.max(),
    }
    texts = []
    for ratio, (low, high), reached in zip(*found.values()):
        texts.append(f"{'' if reached else 'over '}{ratio:.2f} [{low:.2f}, {high:.2f}]")
    rows.append(["times as many", *texts])
    about += f", of the runs with {(args.run / 'settings.txt').read_text().strip()}"
    found |= dict(zip(ARMS, rates))
    stored = {"about": about, "demonstrations": counts}
    stored |= {name: values.tolist() for name, values in found.items()}
    write_json(args.out / "downstream.json", stored)
    head = ["", *(f"n = {n}" for n in counts)]
    title = "Demonstrations that latent actions save"
    write_page(args.out / "downstream.md", title, about, DOWNSTREAM, table(head, rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    experiments = {"evidence": evidence, "downstream": downstream}
    add = parser.option
    add("experiment", str, choices=experiments)
    add("--out", output_folder, default="docs/latent_action")
    add("--run", Path, "runs of run.sh", default="runs/downstream")
    add("--seeds", 3, "of evidence")
    add("--steps", 1500, "of a VAE of evidence")
    add("--episodes", 100, "per level of evidence")
    add(*DEVICE)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    about = f"`python -m scripts.paper {words}`, torch {torch.__version__} on a CPU"
    experiments[args.experiment](args, about)


if __name__ == "__main__":
    run_command(main)
