"""The log of a run, over all ranks, and its curve as a picture."""

import csv
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flow import Losses
from scale.ranks import Ranks

BINS = 4  # equal parts of the time axis, from t = 0 (data) to t = 1 (noise)
MODALITIES = ("video", "action")
SPEEDS = ("samples_per_s", "tokens_per_s", "mfu")
COLUMNS = (
    "step",
    "loss",
    *MODALITIES,
    *(f"{name}_t{i}" for name in MODALITIES for i in range(BINS)),
    "grad_norm",
    "lr",
    *SPEEDS,
    "data_wait_s",
    "memory_gb",
)


def tracker(to: str, folder: Path, start: int) -> Callable[[dict[str, float], int], None] | None:
    """Where rows go beside the csv: "tensorboard", "wandb" or nowhere ("")."""
    if not to:
        return None
    try:
        if to == "wandb":
            import wandb

            wandb.init("motus", name=folder.name, dir=folder, id=folder.name, resume="allow")
            return wandb.log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--set log_to={to}: {error}; pip install {to}, or leave log_to out: log.csv is "
            "written always"
        ) from error
    board = SummaryWriter(folder / "tensorboard", purge_step=start)

    def show(row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            board.add_scalar(name, value, step)
        board.flush()

    return show


class Log:
    """Means since the last row, over all ranks: loss per modality and per time bin, and how fast it
    goes. Rank 0 writes a csv; a resumed run continues it."""

    def __init__(self, path: Path, start: int, ranks: Ranks | None = None, to: str = ""):
        self.path = path
        self.ranks = ranks or Ranks()
        self.begin_row()
        if self.ranks.rank:
            return
        rows = read_log(path) if start and path.is_file() else []
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= start)
        self.track = tracker(to, path.parent, start)

    def begin_row(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}  # totals and counts
        self.bins: dict[str, Tensor] = {}  # the same (2, BINS) per modality, on the device
        self.begun = time.perf_counter()

    def add(self, name: str, value: float, count: float = 1) -> None:
        total, before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = total + value, before + count

    def losses(self, losses: Losses) -> None:
        """Adds the losses of a pass per time bin, on their device, which nobody waits for. A
        modality that a sample lacks, or is given, does not count."""
        counts = {"video": losses.t_video > 0}
        if losses.action is not None:
            counts["action"] = losses.has_action & (losses.t_action > 0)
        for name, counted in counts.items():
            loss, t = getattr(losses, name).detach().float(), getattr(losses, f"t_{name}")
            rows = torch.stack([loss * counted, counted.float()])
            bins = self.bins.setdefault(name, rows.new_zeros(2, BINS))
            bins.index_add_(1, (t * BINS).long().clamp(max=BINS - 1), rows)

    def row(self, step: int) -> dict[str, float]:
        """Ends a row. What was added to `samples_per_s`, `tokens_per_s` and `mfu` (there in shares
        of the peak of one device) becomes a speed."""
        seconds = time.perf_counter() - self.begun
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        self.add("memory_gb", peak / 1e9)
        for name, bins in self.bins.items():
            for i, (total, count) in enumerate(bins.T.tolist()):
                self.add(name, total, count)
                self.add(f"{name}_t{i}", total, count)
        pairs = [x for name in COLUMNS for x in self.sums.get(name, (0.0, 0.0))]
        sums = self.ranks.sums(*pairs)
        row = {}
        for name, total, count in zip(COLUMNS, sums[::2], sums[1::2]):
            if count:
                row[name] = total / (seconds if name in SPEEDS else count)
        if "mfu" in row:
            row["mfu"] /= self.ranks.world
        self.ranks.together(lambda: None if self.ranks.rank else self.write(step, row))
        self.begin_row()
        return row

    def write(self, step: int, row: dict[str, float]) -> None:
        try:
            with self.path.open("a", newline="") as file:
                texts = {name: f"{value:.9g}" for name, value in row.items()}
                csv.DictWriter(file, COLUMNS).writerow({"step": step} | texts)
        except OSError as error:
            raise ValueError(
                f"{self.path} could not be written: {error}; free space and continue with --resume"
            ) from error
        if self.track:
            self.track(row, step)


def read_log(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_curve(log: Path, names: tuple[str, str] = MODALITIES) -> None:
    """The loss curves of a run as curve.png beside its log: per modality, and per time bin where
    there are any."""
    from matplotlib.figure import Figure

    rows = read_log(log)
    names = [name for name in names if any(row.get(name) for row in rows)]
    figure = Figure((4.5 * len(names), 3.2))
    axes = figure.subplots(1, len(names), squeeze=False)
    figure.subplots_adjust(0.14 / len(names), 0.15, 0.98, 0.91)
    for axis, name in zip(axes[0], names):
        labels = {name: "all times"}
        labels |= {
            f"{name}_t{i}": f"t from {i / BINS:g} to {(i + 1) / BINS:g}" for i in range(BINS)
        }
        for column, label in labels.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                axis.plot(*zip(*points), label=label, linewidth=2 if column == name else 0.8)
        axis.set(title=f"{name} loss", xlabel="step", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(log.with_name("curve.png"), dpi=110)
