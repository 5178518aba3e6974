"""Record."""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from formats.lerobot import Storage, write_v3
from scripts.evaluate import CARD, columns, names, rate, settings_of, wilson
from weights.files import run_command
from worlds import RECORDED, episode_seeds, simulator
from worlds.fleet import Order, Recording, attempts

# -- simulators -----------------------------------------------------------------------------------


def record(
    order: Order,
    tasks: Sequence[str],
    episodes: int,
    out: str | Path,
    seed: int = 0,
    workers: int = 1,
) -> dict:
    """Records `episodes` successes of the expert per task into the LeRobot v3.0 dataset `out`, and
    returns its card. A failed try counts and the next seed is taken, so which episodes are kept
    does not depend on the number of processes. The last twentieth of each task comes last of all:
    there dataset cards hold out."""
    tried: dict[str, list[Recording]] = {task: [] for task in tasks}
    kept, begun = [], time.monotonic()

    def successes() -> Iterator[Recording]:
        with tqdm(total=len(tasks) * episodes, desc="record", unit="episode") as bar:
            for wanted in (episodes - episodes // 20, episodes):
                while any(
                    (
                        due := {
                            task: wanted - sum(r.success for r in tries)
                            for task, tries in tried.items()
                        }
                    ).values()
                ):
                    for task, tries in tried.items():
                        if len(tries) > 3 * episodes + 10:
                            raise ValueError(
                                f"task {task}: the expert solved {wanted - due[task]} of {len(tries)}; lower the disturbance"
                            )
                    orders = [
                        replace(order, task=task, seed=s)
                        for task, tries in tried.items()
                        for s in episode_seeds(seed, RECORDED, len(tries) + due[task])[len(tries) :]
                    ]
                    for recording in attempts(orders, workers):
                        tried[recording.task].append(
                            replace(recording, frames={}, states=None, actions=None, labels={})
                        )
                        if recording.success:
                            kept.append(
                                {
                                    "task": recording.task,
                                    "seed": recording.seed,
                                    "disturbed": recording.disturbed,
                                    "rows": len(recording.actions),
                                }
                            )
                            yield recording
                        bar.update(recording.success)

    stream = successes()
    first = next(stream)
    write_v3(
        out,
        (
            (r.frames, r.states, r.actions, r.instruction, r.labels)
            for r in itertools.chain([first], stream)
        ),
        first.fps,
        Storage(robot=first.robot),
    )
    rows = {task: [e["rows"] for e in kept if e["task"] == task] for task in tasks}
    card = {
        "sim": order.sim,
        "settings": dict(order.settings),
        "robot": first.robot,
        "fps": first.fps,
        "seed": seed,
        "noise": order.noise,
        "recovery": order.recovery,
        "disturbed": order.disturbed,
        "seconds": time.monotonic() - begun,
        "tasks": {
            task: {
                "tries": len(tries),
                "successes": episodes,
                "mean_rows": sum(rows[task]) / episodes,
                "cpu_seconds_per_try": sum(r.seconds for r in tries) / len(tries),
            }
            for task, tries in tried.items()
        },
        "episodes": kept,
    }
    (Path(out) / CARD).write_text(json.dumps(card, indent=1))
    return card


def main(argv: Sequence[str] | None = None) -> None:
    """`evaluate.py record`."""
    parser = argparse.ArgumentParser(
        "python -m scripts.record",
        description="Records a simulator's scripted experts as a LeRobot v3.0 dataset.",
    )
    parser.add_argument("--sim", required=True, help="a file of worlds/, or a module on PYTHONPATH")
    parser.add_argument("--tasks", required=True, help="with commas")
    parser.add_argument("--episodes", type=int, default=50, help="successes per task")
    parser.add_argument("--out", required=True, help="folder of the dataset, which must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of what disturbs")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="std of noise on what is done, in robot units; what is meant is stored",
    )
    parser.add_argument(
        "--recovery",
        type=float,
        default=0.0,
        help="std of shoves, about one a second, from which the expert recovers",
    )
    parser.add_argument(
        "--disturbed",
        type=float,
        default=0.5,
        help="share of the episodes that are disturbed, if any are",
    )
    parser.add_argument("--after", type=int, default=4, help="rows kept from success on")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the simulator, such as size=96",
    )
    args = parser.parse_args(argv)
    tasks = names(args.tasks, tuple(simulator(args.sim).TASKS), "--tasks")
    if (
        min(args.episodes, args.workers, args.after) < 1
        or min(args.seed, args.noise, args.recovery) < 0
        or not 0 <= args.disturbed <= 1
    ):
        raise ValueError(
            f"--episodes {args.episodes}, --workers {args.workers}, --after {args.after} are at least 1, --seed {args.seed}, "
            f"--noise {args.noise}, --recovery {args.recovery} at least 0, --disturbed {args.disturbed} is in 0..1"
        )
    order = Order(
        args.sim,
        settings=tuple(settings_of(args.sim, args.set).items()),
        noise=args.noise,
        recovery=args.recovery,
        disturbed=args.disturbed,
        after=args.after,
    )
    card = record(order, tasks, args.episodes, args.out, args.seed, args.workers)
    print(
        columns(
            ("task", "expert %", "rows", "CPU s per try"),
            *(
                (
                    task,
                    rate(
                        {
                            task: {
                                **found,
                                "episodes": found["tries"],
                                "rate": found["successes"] / found["tries"],
                                "interval": wilson(found["successes"], found["tries"]),
                            }
                        },
                        task,
                    ),
                    f"{found['mean_rows']:.1f}",
                    f"{found['cpu_seconds_per_try']:.2f}",
                )
                for task, found in card["tasks"].items()
            ),
        )
    )
    size, rows = (
        sum(path.stat().st_size for path in Path(args.out).rglob("*.*")),
        sum(e["rows"] for e in card["episodes"]),
    )
    print(
        f"wrote {args.out}: {len(card['episodes'])} episodes, {rows} rows at {card['fps']:g} per second, {size / 1e6:.1f} MB, "
        f"{card['seconds']:.0f} s"
    )


if __name__ == "__main__":
    run_command(main)
