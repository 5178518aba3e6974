"""How many demonstrations latent actions save: success in closed loop after few demonstrations,
with stage 2 and without.

    python docs/latent_action/downstream.py --run runs/downstream        can be stopped and started again: what is finished stays

For each seed: stage 1; from it either more of stage 1 or stage 2 on latent actions, of equal steps;
from both stage 3 on the same n demonstrations; then the same unseen worlds in closed loop. All
experts, data and worlds depend on (seed, n) alone, so the arms differ in nothing but what happened
between stage 1 and stage 3.

    arm "stage 1"      stage 1 (T1 + T2 steps)              -> stage 3 (T3 steps, n demonstrations)
    arm "stages 1, 2"  stage 1 (T1) -> stage 2 (T2)         -> stage 3 (T3 steps, n demonstrations)
    arm "scratch"      (with --scratch)                        stage 3 (T3 steps, n demonstrations)

Blocks that carry over move at `--set3` rates; in stage 3 those of the video expert have their own,
`video_lr`. Writes downstream.json, downstream.md and downstream.png to --out after every cell. The
saving is the ratio of the demonstrations that both arms need for the same success: read from the
curve of success over log n, pooled over seeds, its interval from resampled seeds and worlds. Where
the arm without stage 2 does not reach it at all, the ratio is a lower bound.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import data
import motus
import train
from scripts import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from weights.card import newest_step

ARMS = {"stage 1": "stage1long", "stages 1, 2": "stage2", "scratch": None}


def done(run: Path, steps: int) -> bool:
    """Whether a run has come to its end; what is left of one that has not goes, so that it can
    begin anew."""
    if (run / f"step_{steps:06d}").is_dir():
        return True
    if run.exists():
        shutil.rmtree(run)
    return False


def stage(name: str, run: Path, steps: int, changes: Sequence[str], *more: str | Path) -> Path:
    """Trains one stage unless it is there."""
    if not done(run, steps):
        train.main(
            [
                "--stage",
                name,
                "--run",
                str(run),
                *map(str, more),
                "--set",
                f"steps={steps}",
                *changes,
            ]
        )
    return run


def cached(path: Path, **what) -> Path:
    """Encodes windows unless they are there; both arms read the same ones."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        data.cache(out=path, **what)
    return path


def pretrained(args: argparse.Namespace, seed: int) -> dict[str, Path | None]:
    """The checkpoints that stage 3 starts from, by arm."""
    folder, same = args.run / f"seed{seed}", [f"seed={seed}"]
    latent = folder / "latent"
    if not (latent / train.LATENT_FILE).exists():
        shutil.rmtree(latent, ignore_errors=True)
        train.main(["--stage", "latent", "--run", str(latent), "--set", *same, *args.set_latent])
    pool = dict(episodes=args.videos, windows=args.windows, seed=seed)
    video = cached(folder / "pool1.safetensors", levels=motus.STAGES["1"].levels, **pool)
    first = stage("1", folder / "stage1", args.steps1, [*same, *args.set1], "--cache", video)
    longer = stage(
        "1", folder / "stage1long", args.steps1 + args.steps2, [*same, *args.set1], "--cache", video
    )
    both = cached(
        folder / "pool2.safetensors",
        levels=motus.STAGES["2"].levels,
        latent=latent / train.LATENT_FILE,
        **pool,
    )
    second = stage(
        "2",
        folder / "stage2",
        args.steps2,
        [*same, *args.set2],
        "--cache",
        both,
        "--init",
        first,
        "--latent",
        latent,
    )
    return {"stage 1": longer, "stages 1, 2": second} | ({"scratch": None} if args.scratch else {})


def cell(args: argparse.Namespace, seed: int, n: int, arm: str, init: Path | None) -> dict:
    """Stage 3 on n demonstrations and its closed loop: {mode: {successes, episodes}}."""
    folder = args.run / f"seed{seed}" / f"{ARMS[arm] or 'scratch'}_n{n}"
    result = folder / "evaluation.json"
    if not result.exists():
        pool = cached(
            args.run / f"seed{seed}" / f"pool3_n{n}.safetensors",
            levels=(6,),
            episodes=n,
            windows=8000,
            seed=seed,
        )
        stage(
            "3",
            folder,
            args.steps3,
            [f"seed={seed}", *args.set3],
            "--cache",
            pool,
            *(("--init", init) if init else ()),
        )
        evaluate.main(
            [
                "--ckpt",
                str(folder),
                "--modes",
                args.modes,
                "--episodes",
                str(args.episodes),
                "--seed",
                str(1000 + seed),
                "--steps",
                "4",
                "--execute",
                "4",
                "--max-steps",
                str(args.max_steps),
                "--out",
                str(folder),
            ]
        )
        for left in newest_step(folder).glob(
            "*.safetensors"
        ):  # many cells, and none is trained further
            left.unlink()
    rows = json.loads(result.read_text())["rows"]
    return {
        row["policy"]: {key: row["all"][key] for key in ("successes", "episodes")} for row in rows
    }


# -- the figures ----------------------------------------------------------------------------------


def needed(counts: np.ndarray, rates: np.ndarray, wanted: float) -> float:
    """Demonstrations for a success of `wanted`: linear in log n, on the curve made to rise. Beyond
    its ends the count there, which is then too many (a success that the fewest exceed) or too few
    (one that the most do not reach)."""
    rising = np.maximum.accumulate(rates)
    k = int(np.searchsorted(rising, wanted, "left"))
    if k in (0, len(counts)):
        return float(counts[min(k, len(counts) - 1)])
    part = (wanted - rising[k - 1]) / (rising[k] - rising[k - 1])
    return float(np.exp(np.log(counts[k - 1]) + part * np.log(counts[k] / counts[k - 1])))


def savings(counts: np.ndarray, without: np.ndarray, within: np.ndarray) -> np.ndarray:
    """For each count at which the arm `within` was tried: how many times as many the arm `without`
    needs for the same success."""
    return np.array([needed(counts, without, rate) / n for n, rate in zip(counts, within)])


def interval(
    counts: np.ndarray, without: np.ndarray, within: np.ndarray, worlds: int, draws: int = 2000
) -> np.ndarray:
    """95 % intervals (counts, 2) of `savings`, of success rates (seeds, counts): seeds drawn with
    replacement, worlds of each cell drawn anew."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        rows = rng.integers(len(without), size=len(without))
        found.append(
            savings(
                counts,
                *(
                    rng.binomial(worlds, rates[rows]).mean(axis=0) / worlds
                    for rates in (without, within)
                ),
            )
        )
    return np.percentile(found, [2.5, 97.5], axis=0).T


def write(results: dict[str, dict], args: argparse.Namespace) -> None:
    """downstream.json, .md and .png from the cells there are; savings from the seeds that have all
    of theirs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes, counts = args.modes.split(","), np.array(args.demonstrations)
    arms = [arm for arm in ARMS if any(key.startswith(f"{arm}/") for key in results)]
    one = lambda arm, seed, n, mode: results.get(f"{arm}/{seed}/{n}", {}).get(mode)
    lines = [
        "# Demonstrations that latent actions save\n",
        f"{args.about}\n",
        "Success in closed loop in per cent, pooled over seeds, "
        "with Wilson's interval; in brackets each seed's.\n",
        "| mode | arm | " + " | ".join(f"n = {n}" for n in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    figure, axes = plt.subplots(
        1, len(modes), figsize=(4.6 * len(modes), 3.4), constrained_layout=True, squeeze=False
    )
    saved = {}
    for axis, mode in zip(axes[0], modes):
        for arm in arms:
            cells, drawn = [], []
            for n in counts:
                found = [c for seed in range(args.seeds) if (c := one(arm, seed, n, mode))]
                if not found:
                    cells.append("-")
                    continue
                k, m = (sum(c[key] for c in found) for key in ("successes", "episodes"))
                low, high = evaluate.wilson(k, m)
                drawn.append((n, 100 * k / m, 100 * low, 100 * high))
                each = ", ".join(f"{100 * c['successes'] / c['episodes']:.0f}" for c in found)
                cells.append(f"{100 * k / m:.0f} [{100 * low:.0f}, {100 * high:.0f}] ({each})")
            lines.append(f"| {mode} | {arm} | " + " | ".join(cells) + " |")
            x, y, low, high = np.array(drawn).T
            axis.plot(x, y, marker="o", label=arm), axis.fill_between(x, low, high, alpha=0.2)
        axis.set(
            xscale="log",
            xlabel="demonstrations",
            ylabel="success, %",
            title=mode,
            ylim=(0, 100),
            xticks=counts,
            xticklabels=counts,
        )
        axis.minorticks_off(), axis.legend(fontsize=8)
        whole = [
            s
            for s in range(args.seeds)
            if all(one(arm, s, n, mode) for arm in list(ARMS)[:2] for n in counts)
        ]
        if whole:
            rates = [
                np.array(
                    [
                        [one(arm, s, n, mode)["successes"] / args.episodes for n in counts]
                        for s in whole
                    ]
                )
                for arm in list(ARMS)[:2]
            ]
            middle = [r.mean(axis=0) for r in rates]
            saved[mode] = {
                "seeds": len(whole),
                "saving": savings(counts, *middle).tolist(),
                "interval": interval(counts, *rates, args.episodes).tolist(),
                "reached": (middle[1] <= middle[0].max()).tolist(),
            }
    for mode, found in saved.items():
        for n, ratio, (low, high), reached in zip(
            counts[:-1], found["saving"], found["interval"], found["reached"]
        ):
            lines.append(
                f"\nFor the success of {n} demonstrations after stage 2, {mode}, it takes {'' if reached else 'more than '}"
                f"**{ratio:.2f}** times as many without it, 95 % interval {low:.2f} to {high:.2f} over {found['seeds']} seeds; no "
                f"more than {counts[-1] / n:g} times were tried."
            )
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "downstream.png", dpi=110)
    plt.close(figure)
    stored = {"about": args.about, "savings": saved, "cells": results}
    (args.out / "downstream.json").write_text(json.dumps(stored, indent=1))
    (args.out / "downstream.md").write_text(
        "\n".join(lines) + "\n\n![Success over demonstrations](downstream.png)\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        default=Path("runs/downstream"),
        help="folder of all runs; start again to go on",
    )
    add("--out", type=Path, default=Path("docs/latent_action"))
    add("--demonstrations", type=int, nargs="+", default=[10, 20, 40, 80, 160])
    add("--seeds", type=int, default=3)
    add("--modes", default="joint,vla")
    add("--scratch", action="store_true", help="a third arm without any pre-training")
    add("--date", default="2026-11-23")
    for name, default, text in (
        ("steps1", 600, "of stage 1"),
        ("steps2", 1200, "of stage 2, or more of stage 1"),
        ("steps3", 1500, "of stage 3"),
        ("videos", 200, "episodes per level without actions"),
        ("windows", 4000, "of these, encoded once"),
        ("episodes", 200, "worlds per cell"),
        ("max-steps", 100, "actions per world"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    third = ["lr=1e-3", "video_lr=5e-4", "warmup=100", "ema=0.99"]
    for name, default in (("set-latent", []), ("set1", []), ("set2", []), ("set3", third)):
        text = f"settings of train.py (default {' '.join(default) or 'its own'})"
        add(f"--{name}", nargs="*", default=default, metavar="KEY=VALUE", help=text)
    args = parser.parse_args(argv)
    fixed = {
        key: value
        for key, value in vars(args).items()
        if key.startswith(("steps", "set"))
        or key in ("videos", "windows", "episodes", "max_steps", "modes")
    }
    args.run.mkdir(parents=True, exist_ok=True)
    if (settings := args.run / "settings.json").exists() and (
        found := json.loads(settings.read_text())
    ) != fixed:
        changed = [
            f"{key} {found.get(key)} instead of {fixed[key]}"
            for key in fixed
            if found.get(key) != fixed[key]
        ]
        raise SystemExit(
            f"error: {args.run} was begun with {', '.join(changed)}; go on with these, or name another --run"
        )
    settings.write_text(json.dumps(fixed, indent=1))
    words = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    told = [
        f"--{key.replace('_', '-')} {words(value)}"
        for key, value in vars(args).items()
        if key not in ("run", "out", "date", "scratch") and value not in (None, [])
    ]
    args.about = (
        f"`python docs/latent_action/downstream.py {' '.join(told)}{' --scratch' if args.scratch else ''}`, 2-core AMD EPYC "
        f"virtual machine, torch {train.torch.__version__.split('+')[0]} CPU, {args.date}."
    )
    results: dict[str, dict] = {}
    for seed in range(args.seeds):
        inits = pretrained(args, seed)
        for n in args.demonstrations:
            for arm, init in inits.items():
                results[f"{arm}/{seed}/{n}"] = cell(args, seed, n, arm, init)
                write(results, args)
                print(
                    f"seed {seed}, {n} demonstrations, {arm}: {results[f'{arm}/{seed}/{n}']}",
                    flush=True,
                )
    print(f"wrote {args.out / 'downstream.md'}")


if __name__ == "__main__":
    main()
