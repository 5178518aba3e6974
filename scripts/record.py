"""Records a simulator's scripted experts as a LeRobot v3.0 dataset, to train on and, by
`scripts.evaluate --like`, to be tried in.

python -m scripts.record --sim metaworld --tasks drawer-open --episodes 50 --out data/drawer
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from formats.lerobot import Storage, write_v3
from scripts.evaluate import CARD, rated, settings_of
from scripts.readme import percent, table
from weights.files import write_json
from weights.options import Parser, output_folder, run_command
from worlds import RECORDED, episode_seeds, names, simulator
from worlds.fleet import PROCESSES, Order, Recording, attempts


def successes(
    order: Order, episodes: int, workers: int, tried: dict[str, list[float]]
) -> Iterator[Recording]:
    """`episodes` successes of the expert for each task in `tried`, which gets the seconds of each
    try. After a failed try the next seed is taken, so which episodes are kept does not depend on
    the number of processes. The last twentieth of each task comes last of all: there dataset cards
    hold out."""
    solved = dict.fromkeys(tried, 0)
    for wanted in (episodes - episodes // 20, episodes):
        while min(solved.values()) < wanted:
            orders = []  # the next tries of each task, as many as successes are missing
            for task, count in solved.items():
                begin = len(tried[task])
                if count < wanted and begin > 3 * episodes + 10:
                    raise ValueError(
                        f"task {task}: the expert solved {count} of {begin}; lower the disturbance"
                    )
                seeds = episode_seeds(order.seed, RECORDED, begin + wanted - count)[begin:]
                orders += [replace(order, task=task, seed=seed) for seed in seeds]
            for recording in attempts(orders, workers):
                tried[recording.task].append(recording.seconds)
                if recording.success:
                    solved[recording.task] += 1
                    yield recording


def record(
    order: Order,
    tasks: Sequence[str],
    episodes: int,
    out: str | Path,
    workers: int = 1,
) -> dict:
    """Records `episodes` successes of the expert per task into the LeRobot v3.0 dataset `out`, and
    returns its card. `order` holds all but task and seed of the episodes; its seed is of all."""
    if Path(out).exists():
        raise ValueError(f"dataset {out} exists; remove it or write elsewhere")
    begun = time.monotonic()
    tried: dict[str, list[float]] = {task: [] for task in tasks}
    kept = []
    stream = successes(order, episodes, workers, tried)
    first = next(stream)

    def stored() -> Iterator[tuple]:
        recordings = chain([first], stream)
        total = len(tasks) * episodes
        for one in tqdm(recordings, total=total, desc="record", unit="episode"):
            rows = len(one.actions)
            kept.append(dict(task=one.task, seed=one.seed, disturbed=one.disturbed, rows=rows))
            yield one.frames, one.states, one.actions, one.instruction, one.labels

    write_v3(out, stored(), first.fps, Storage(robot=first.robot))
    found = {}
    for task, seconds in tried.items():
        rows = sum(episode["rows"] for episode in kept if episode["task"] == task)
        found[task] = {
            "tries": len(seconds),
            "successes": episodes,
            "mean_rows": rows / episodes,
            "cpu_seconds_per_try": sum(seconds) / len(seconds),
        }
    card = vars(order) | {
        "settings": dict(order.settings),
        "robot": first.robot,
        "fps": first.fps,
        "seconds": time.monotonic() - begun,
        "tasks": found,
        "episodes": kept,
    }
    del card["task"]
    write_json(Path(out) / CARD, card)
    return card


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.record", description=__doc__)
    add = parser.option
    add("--sim", str, "a file of worlds/, or a module on PYTHONPATH", required=True)
    add("--tasks", str, "with commas", required=True)
    add("--episodes", 50, "successes per task")
    add("--out", output_folder, "folder of the dataset, which must not exist", required=True)
    add("--seed", 0, "of the scenes and of what disturbs")
    add("--noise", 0.0, "std of noise on actions; the clean one is stored")
    add("--recovery", 0.0, "std of shoves, about one a second")
    add("--disturbed", 0.5, "share of episodes that are disturbed")
    add("--after", 4, "rows kept from success on")
    add("--workers", os.cpu_count(), "processes")
    add("--set", str, "KEY=VALUE: settings of the simulator", nargs="+", default=[])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    tasks = names(args.tasks, simulator(args.sim).TASKS, "--tasks")
    settings = settings_of(args.sim, args.set)
    # Several values are one here, as cameras=corner4,gripperPOV.
    joined = ((k, v[0] if len(v) == 1 else ",".join(map(str, v))) for k, v in settings.items())
    disturbance = args.seed, args.noise, args.recovery, args.disturbed, args.after
    order = Order(args.sim, "", tuple(joined), *disturbance)
    card = record(order, tasks, args.episodes, args.out, args.workers)
    lines = []
    for task, found in card["tasks"].items():
        tries, successes, rows, seconds = found.values()
        lines.append([task, percent(rated(successes, tries)), rows, seconds])
    print(table(["task", "expert %", "rows", "CPU s per try"], lines))
    size = sum(path.stat().st_size for path in args.out.rglob("*.*"))
    rows = sum(episode["rows"] for episode in card["episodes"])
    print(
        f"wrote {args.out}: {len(card['episodes'])} episodes, {rows} rows at {card['fps']:g} per "
        f"second, {size / 1e6:.1f} MB, {card['seconds']:.0f} s"
    )


if __name__ == "__main__":
    # Every process runs the imports of this file; so they are run once.
    PROCESSES.set_forkserver_preload(["scripts.record"])
    run_command(main)
