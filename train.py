"""Trains Motus: three stages, and the latent actions between the first and the second (paper Sec.
3.3, Tab. 1).

    python train.py --stage 1                                   video generation: the video expert alone
    python train.py --stage latent                              the 14-d latent-action VAE on optical flow
    python train.py --stage 2 --init runs/stage1 --latent runs/latent        all experts on latent actions
    python train.py --stage 3 --init runs/stage2                all experts on the target robot's actions and state

    stage    pyramid levels   trained                       losses            actions
    1        2, 3, 5          video                         video             none
    2        2, 3, 4, 5       video, action, understanding  video + action    14-d latent actions
    3        6                video, action, understanding  video + action    the robot's, with its state

From stage 2 to 3 the action encoder, decoder and registers start fresh; every block carries over.
VLM, VAE and text encoder are frozen throughout. `--stage backbones` pre-trains their small
instances, whose weights are in the repository: the toy's, and with `--data` a simulator's.

    torchrun --nproc-per-node 8 -- train.py --full --stage 3 --init motus-stage2 --cache FILE       eight GPUs; docs/scale.md for more

One process or many run the same code (`scale.py`): each rank takes its rows of the batch, its share
of the loss, its part of the weights.

A run is a folder: `log.csv`, `curve.png` and `step_NNNNNN/` with config, weights, EMA and
optimizer, safetensors and json only. A checkpoint is written under a temporary name and renamed, so
a folder with its final name is complete; SIGTERM leaves one and ends the run. Every random number
of step n comes from (seed, n), drawn for the whole batch whatever part of it a rank computes. So
there is no random state to store: a resumed run equals an uninterrupted one bit for bit, and one on
another number of ranks up to the order of sums.
"""

import argparse
import csv
import difflib
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import flow
import latent_action
from attention import choose
from backbones.published import open_weights
from backbones.wan import WanModel
from formats.cards import Pyramid
from formats.statistics import as_stored
from motus import (
    EXPERTS,
    PRESETS,
    STAGES,
    ActionExpert,
    Inputs,
    Losses,
    Motus,
    MotusConfig,
    Stage,
    UndExpert,
    draw_noise,
    preset,
)
from scale import plan, sharding
from scale.checkpoints import Saver, fill
from scale.ranks import Ranks, Watchdog, code_digest, launch
from weights.card import Card, newest_step
from weights.files import check_keys, digest, open_source
from weights.load import held, load_into, part, place
from worlds import motions, tabletop


@dataclass(frozen=True)
class Settings:
    """Everything about a run that is not the network; each field is a key of `--set`."""

    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    video_lr: float = 6e-3  # learning rate of the video expert; 0 means lr
    optimizer: str = "adamw"  # or "muon": Muon for the matrices of the blocks, AdamW for the rest
    muon_lr: float = 0.04
    warmup: int = 50  # steps of linear warm-up
    schedule: str = "cosine"  # or "linear", "constant": how lr falls
    horizon: int = 0  # steps until it has fallen; 0: all steps of the run
    floor: float = 0.1  # share of lr at which the schedule ends
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    # not norms, biases, modulation tables and registers; "all": those too, as official
    decay: str = "matrices"
    clip: float = 1.0  # gradient norm
    ema: float = 0.995
    video_weight: float = 1.0
    action_weight: float = 1.0
    times: str = "official"  # or "logit_normal": see flow.py
    given: float = 0.0  # share of samples in which one modality is given, as in world_model and idm
    seed: int = 0
    episodes: int = 100  # per pyramid level; of a card in all (stage backbones)
    windows: int = (
        2000  # encoded once, batches are drawn from them; 0, with --data: encoded when needed
    )
    save_every: int = 0  # steps between checkpoints; 0 saves the last only
    keep: int = 2  # newest checkpoints that are kept
    log_every: int = 10
    log_to: str = ""  # "tensorboard" or "wandb" beside the csv
    workers: int = 0  # processes that prepare batches ahead
    micro: int = 0  # samples per rank and pass, whose gradients add up to the batch; 0: all at once
    precision: str = "fp32"  # or "bf16": autocast
    params: str = (
        "fp32"  # or "bf16": weights and optimizer too, at half the memory; small updates are lost
    )
    checkpointing: str = "none"  # or "selective", "full": what the backward pass computes again
    compile: int = 0  # 1: each layer by torch.compile
    shards: int = 0  # ranks that share one copy of the weights; 0: those of a node
    reshard: int = 1  # 0: keep layers gathered between forward and backward pass
    peak: float = 0.0  # TFLOP/s of one device, for the model FLOP utilisation in the log
    timeout: float = 1800.0  # seconds without progress until the run ends
    minutes: float = 0.0  # save and end after so long; 0: never


# What may change when a run is resumed: it changes how the numbers are computed, not what they are.
FREE = (
    "save_every",
    "keep",
    "log_every",
    "log_to",
    "workers",
    "micro",
    "checkpointing",
    "compile",
    "shards",
    "reshard",
    "peak",
    "timeout",
    "minutes",
)
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "decay": ("matrices", "all"),
    "times": tuple(flow.TIMES),
    "log_to": ("", "tensorboard", "wandb"),
    "precision": ("fp32", "bf16"),
    "params": ("fp32", "bf16"),
    "checkpointing": tuple(sharding.CHECKPOINTING),
}


def settings_for(preset_name: str, stage: str, changes: list[str]) -> Settings:
    """The defaults with `key=value` changes. An unknown key is an error that names the nearest one."""
    settings = Settings(**PRESETS[preset_name].settings(stage))
    kinds = {f.name: f.type for f in fields(Settings)}
    for change in changes:
        key, eq, value = change.partition("=")
        if not eq:
            raise ValueError(f"--set takes key=value, found {change!r}")
        check_keys({key: value}, Settings, "--set")
        try:
            settings = replace(settings, **{key: kinds[key](value)})
        except ValueError:
            raise ValueError(f"--set {key} takes {kinds[key].__name__}, found {value!r}") from None
    for key, allowed in CHOICES.items():
        if getattr(settings, key) not in allowed:
            raise ValueError(
                f"--set {key} is {getattr(settings, key)!r}; allowed: {', '.join(filter(None, allowed))}"
            )
    return settings


# -- optimisation ---------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum of matrices, made orthogonal before it is added, so that a step moves all directions
    alike (github.com/KellerJordan/Muon). The same as torch.optim.Muon but for two things: matrices
    of equal shape go through the iteration together and in fp32, in a third of its time on a CPU;
    and matrices that are sharded over ranks are gathered for it."""

    MOMENTUM, ITERATIONS = 0.95, ((3.4445, -4.7750, 2.0315),) * 5  # of x, x x' x and x x' x x' x

    def __init__(self, groups: list[dict], lr: float, weight_decay: float):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    @classmethod
    def orthogonal(cls, x: Tensor) -> Tensor:
        """Matrices (n, rows, columns) with their singular values moved to between about 0.7 and
        1.2."""
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for a, b, c in cls.ITERATIONS:
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = (
                    self.state[p]
                    .setdefault("momentum", torch.zeros_like(p))
                    .lerp_(p.grad, 1 - self.MOMENTUM)
                )
                alike.setdefault(p.shape, []).append(
                    (p, sharding.whole(p.grad.lerp(momentum, self.MOMENTUM)).float())
                )
            for (rows, columns), pairs in alike.items():
                moves = torch.stack([move for _, move in pairs])
                moves = self.orthogonal(moves) if rows <= columns else self.orthogonal(moves.mT).mT
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for (p, _), move in zip(pairs, moves):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    held(p)[0].add_(part(p, move), alpha=-rate)


def make_optimizers(
    model: Motus, settings: Settings, experts: tuple[str, ...]
) -> list[torch.optim.Optimizer]:
    """AdamW over the trained experts: matrices decay, vectors and modulation tables only if asked
    for. With optimizer=muon the matrices of the blocks have an optimizer of their own."""
    groups, rotated = [], []
    for expert in experts:
        named = [(f"{expert}.{n}", p) for n, p in getattr(model, expert).named_parameters()]
        if settings.optimizer == "muon":
            rotated += [p for n, p in named if p.dim() == 2 and ".blocks." in n]
            named = [(n, p) for n, p in named if not (p.dim() == 2 and ".blocks." in n)]
        matrix = lambda n, p: (
            settings.decay == "all" or p.dim() > 1 and not n.endswith(("modulation", "registers"))
        )
        decays, rest = (
            [p for n, p in named if matrix(n, p)],
            [p for n, p in named if not matrix(n, p)],
        )
        lr = settings.video_lr if expert == "video" and settings.video_lr else settings.lr
        groups += [
            dict(params=decays, base=lr, weight_decay=settings.weight_decay),
            dict(params=rest, base=lr, weight_decay=0.0),
        ]
    optimizers = [
        torch.optim.AdamW(
            groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True
        )
    ]
    if rotated:
        optimizers.append(
            Muon(
                [dict(params=rotated, base=settings.muon_lr)],
                settings.muon_lr,
                settings.weight_decay,
            )
        )
    return optimizers


def set_lr(optimizers: Sequence[torch.optim.Optimizer], settings: Settings, step: int) -> None:
    """Linear warm-up, times a cosine or a line to `floor` at the horizon."""
    progress = min(1.0, step / (settings.horizon or settings.steps))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[settings.schedule]
    factor = min(1.0, (step + 1) / max(1, settings.warmup)) * (
        settings.floor + (1 - settings.floor) * left
    )
    for group in groups_of(optimizers):
        group["lr"] = group["base"] * factor


def groups_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


class EMA:
    """An exponential moving average of the weights, in fp32; samples are taken from it."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {k: v.detach().float().clone() for k, v in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # short memory at first
        torch._foreach_lerp_(
            list(self.weights.values()), [p.float() for p in model.parameters()], 1 - decay
        )


def states_of(
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Every trained parameter with what its optimizer keeps of it, which may be filled; in the
    order that numbers them in checkpoints."""
    return [
        (p, optimizer.state[p])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as named tensors."""
    return {
        f"{i}.{k}": torch.as_tensor(v)
        for i, (_, state) in enumerate(states_of(optimizers))
        for k, v in state.items()
    }


def save_checkpoint(
    saver: Saver,
    step: int,
    model: Motus,
    ema: EMA,
    optimizers: Sequence[torch.optim.Optimizer],
    card: Card,
    settings: Settings,
    about: dict[str, str],
) -> None:
    """Begins to write run/step_NNNNNN; `about` says which code and data made it."""
    saver.save(
        step,
        {
            "model.safetensors": model.state_dict(),
            "ema.safetensors": ema.weights,
            "optimizer.safetensors": optimizer_tensors(optimizers),
        },
        {
            "config.json": replace(card, step=step).as_json(),
            "settings.json": json.dumps(asdict(settings) | about, indent=1),
        },
    )


def resume(
    folder: Path,
    model: Motus,
    ema: EMA,
    optimizers: Sequence[torch.optim.Optimizer],
    card: Card,
    settings: Settings,
    about: dict[str, str],
    anyway: bool = False,
) -> int:
    """Fills model, EMA and optimizer from a checkpoint of the same run, whatever number of ranks
    wrote it; returns the number of steps done. Other settings or data are refused; other code too,
    unless it is to go on `anyway`."""
    stored = Card.read(folder / "config.json")
    for name in ("motus", "stage", "preset", "statistics", "latent_interval"):
        if getattr(stored, name) != getattr(card, name):
            raise ValueError(
                f"{folder} was trained with {name} {getattr(stored, name)}, this run has {getattr(card, name)}; "
                "resume with the settings it was started with, or start another run"
            )
    before = json.loads((folder / "settings.json").read_text())
    for key, value in asdict(settings).items():
        if key not in FREE and before.get(key, value) != value:
            raise ValueError(
                f"{folder} was trained with {key}={before[key]}, this run has {key}={value}; "
                f"resume with --set {key}={before[key]}"
            )
    if before.get("data", about["data"]) != about["data"]:
        raise ValueError(
            f"{folder} was trained on data {before['data']}, this run has {about['data']}; resume with the same data"
        )
    if before.get("code", about["code"]) != about["code"] and not anyway:
        raise ValueError(
            f"{folder} was written by code {before['code']}, this is {about['code']}; check out the code it began with, or "
            "continue with --resume-anyway, perhaps not bit for bit"
        )
    with open_source(folder / "model.safetensors") as source:
        load_into(model, source)
    with open_source(folder / "ema.safetensors") as source:
        fill(ema.weights, source)
    states = states_of(optimizers)
    with open_source(folder / "optimizer.safetensors") as source:
        for name in source.names():
            index, key = name.split(".")
            p, state = states[int(index)]
            state[key] = (
                torch.zeros_like(p) if source.shape(name) else torch.zeros((), device=p.device)
            )
        fill(optimizer_tensors(optimizers), source)
    return stored.step


def initialise(
    model: Motus, init: str | Path | None, stage: Stage, name: str, seed: int = 0
) -> None:
    """Fresh weights, and those of an earlier stage, ours or published: from stage 1 the video
    expert, from stage 2 all but what starts fresh. One tensor of the file at a time, and what
    starts fresh one layer at a time, each from a seed of its own; a rank keeps its part of each. So
    no rank ever holds more than a layer, and the values are the same for any number of ranks."""
    skip: tuple[str, ...] = ("video.", "action.", "und.")
    if init is not None:
        source, rename, card, absent = open_weights(init)
        if MotusConfig.of(card.motus, init).video != model.config.video:
            raise ValueError(
                f"--init {init} has video expert {card.motus['video']}; this run has {model.config.video}. "
                "Use the same preset and sizes"
            )
        if card.stage == "1":
            skip = ("action.", "und.")
        elif card.motus["finetune"] == model.config.finetune:
            skip = absent
        elif stage.finetune:
            skip = (*absent, *stage.fresh)
        else:
            raise ValueError(
                f"--init {init} is of stage {card.stage}; stage {name} starts from stage 1 or 2"
            )
    one = replace(
        model.config, video=replace(model.config.video, layers=1)
    )  # layer 0 also draws what lies outside
    makers = (lambda: WanModel(one.video), lambda: ActionExpert(one), lambda: UndExpert(one))
    for i, (expert, make) in enumerate(zip(EXPERTS, makers)):
        named = {
            n: p
            for n, p in getattr(model, expert).named_parameters()
            if f"{expert}.{n}".startswith(skip)
        }
        for layer in range(model.config.video.layers):
            here = f"blocks.{layer}."
            wanted = {
                n.replace(here, "blocks.0."): p
                for n, p in named.items()
                if n.startswith(here) or layer == 0 and not n.startswith("blocks.")
            }
            if wanted:
                torch.manual_seed(
                    int(np.random.SeedSequence([seed, i, layer]).generate_state(1)[0])
                )
                fresh = make()
                fresh.init_weights()
                with torch.no_grad():
                    for n, value in fresh.named_parameters():
                        if n in wanted:
                            place(wanted[n], value)
                del fresh, value  # before the next layer is made
    if init is not None:
        with source:
            load_into(model, source, rename, ignore=(*skip, "vlm."), fresh=skip)


# -- the log --------------------------------------------------------------------------------------

BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01))  # time bins: 0 is data, 1 is noise


class Log:
    """Means since the last row, over all ranks: loss per modality and per time bin, and how fast it
    goes. Rank 0 writes a csv; a resumed run continues it."""

    def __init__(self, path: Path, start: int, ranks: Ranks | None = None, to: str = ""):
        self.path, self.ranks, self.sums, self.counts, self.begun = (
            path,
            ranks or Ranks(),
            {},
            {},
            time.perf_counter(),
        )
        self.columns = [
            "step",
            "loss",
            "video",
            "action",
            *(f"{m}_t{i}" for m in ("video", "action") for i in range(len(BINS))),
            "grad_norm",
            "lr",
            "samples_per_s",
            "tokens_per_s",
            "mfu",
            "data_wait_s",
            "memory_gb",
        ]
        self.extra = None
        if self.ranks.rank:
            return
        if start and path.is_file():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        else:
            kept = []
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)
        try:
            if to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(path.parent / "tensorboard", purge_step=start)
                self.extra = lambda step, row: (
                    *(board.add_scalar(name, x, step) for name, x in row.items()),
                    board.flush(),
                )
            elif to == "wandb":
                import wandb

                wandb.init(
                    project="motus",
                    name=path.parent.name,
                    dir=path.parent,
                    id=path.parent.name,
                    resume="allow",
                )
                self.extra = lambda step, row: wandb.log(row, step=step)
        except ImportError as error:
            raise ValueError(
                f"--set log_to={to}: {error}; pip install {to}, or leave log_to out: log.csv is written always"
            ) from error

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.counts[name] = self.counts.get(name, 0.0) + weight

    def losses(self, losses: Losses) -> None:
        for name, values, t in (
            ("video", losses.video, losses.t_video),
            ("action", losses.action, losses.t_action),
        ):
            if values is None:
                continue
            values, t = values.detach().float()[t > 0], t[t > 0]  # what is given has no loss
            if len(values):
                self.add(name, values.mean().item())
            for i, (low, high) in enumerate(BINS):
                inside = (t >= low) & (t < high)
                if inside.any():
                    self.add(f"{name}_t{i}", values[inside].mean().item(), inside.sum().item())

    def row(self, step: int) -> dict[str, float]:
        """Ends a row. What was added as `samples`, `tokens` and `flops` (of one rank; `flops` in
        shares of its peak) becomes a speed."""
        seconds = time.perf_counter() - self.begun
        peak = (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        self.add("memory_gb", peak / 1e9)
        totals = self.ranks.sums(
            *(
                sums.get(name, 0.0)
                for sums in (self.sums, self.counts)
                for name in (*self.columns, *self.SPEEDS)
            )
        )
        names = (*self.columns, *self.SPEEDS)
        row = {
            name: value / count
            for name, value, count in zip(names, totals, totals[len(names) :])
            if count
        }
        speeds = {
            column: totals[names.index(name)] / seconds
            for name, column in self.SPEEDS.items()
            if name in row
        }
        row = {name: value for name, value in (row | speeds).items() if name in self.columns}
        if "mfu" in row:
            row["mfu"] /= self.ranks.world
        self.ranks.together(lambda: None if self.ranks.rank else self.write(step, row))
        self.sums, self.counts, self.begun = {}, {}, time.perf_counter()
        return row

    def write(self, step: int, row: dict[str, float]) -> None:
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(
                    {"step": step, **{k: f"{v:.9g}" for k, v in row.items()}}
                )
        except OSError as error:
            raise ValueError(
                f"{self.path} could not be written: {error}; free space and continue with --resume"
            ) from error
        if self.extra:
            self.extra(step, row)

    SPEEDS = {"samples": "samples_per_s", "tokens": "tokens_per_s", "flops": "mfu"}


def plot_curve(log: Path, out: Path, names: tuple[str, ...] = ("video", "action")) -> None:
    """The loss curves of a run as a picture: per modality, and per time bin where there are any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for axis, name in zip(axes, names):
        for column, label in [
            (name, "all times"),
            *((f"{name}_t{i}", f"t in [{a:g}, {min(b, 1):g}]") for i, (a, b) in enumerate(BINS)),
        ]:
            points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
            if points:
                axis.plot(*zip(*points), label=label, linewidth=2 if column == name else 0.8)
        axis.set(title=f"{name} loss", xlabel="step", yscale="log")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    plt.close(figure)


# -- data of a stage ------------------------------------------------------------------------------


def toy_pool(
    args: argparse.Namespace, stage: Stage, card: Card, settings: Settings
) -> tuple[data.Pool, Card]:
    """Records the levels of the stage and runs the frozen backbones over windows of them; notes the
    statistics on the card."""
    stats = latents = None
    episodes = data.toy_episodes(stage.levels, settings.episodes, settings.seed)
    if stage.actions == "real":
        stats = data.statistics(episodes)
        card = replace(card, statistics=stats.as_json())
    elif stage.actions == "latent":
        latents = motions.encode_episodes(
            latent_action.LatentActionModel.load(args.latent / LATENT_FILE), episodes, data.RATE
        )
        card = replace(card, latent_interval=data.RATE)
    pool = data.Pool.encode(
        episodes,
        data.backbones_of(args.preset, MotusConfig.of(card.motus)),
        MotusConfig.of(card.motus),
        settings.windows,
        settings.seed,
        stats,
        latents,
        und=stage.actions != "none",
    )
    return pool, card


def cached_pool(args: argparse.Namespace, stage: Stage, card: Card) -> tuple[data.Pool, Card]:
    """What `python data.py cache` kept, if it is of this stage and of today's backbones; mixed by
    the weights of --data, if given."""
    about = data.about_cache(args.cache)
    config = replace(MotusConfig.of(card.motus), **about.get("sizes", {}))
    made_by = data.backbones_of(args.preset, config).fingerprint()
    if stage.actions == "latent" and args.latent:
        made_by["latent"] = digest(open_source(args.latent / LATENT_FILE).tensors)
    pool = data.Pool.load(args.cache, made_by, config)
    if pool.about["levels"] != list(stage.levels):
        raise ValueError(
            f"--cache {args.cache} holds levels {pool.about['levels']}; this stage trains on {list(stage.levels)}"
        )
    if args.data:
        pool.mix(Pyramid(args.data, stage.levels, args.preset))
    robots = (
        pool.statistics
        if isinstance(pool.statistics, tuple)
        else tuple(filter(None, [pool.statistics]))
    )
    interval = (robots[0].rate if robots else data.RATE) if stage.actions == "latent" else None
    return pool, replace(
        card, motus=config.as_json(), statistics=as_stored(robots), latent_interval=interval
    )


def pool_for(
    args: argparse.Namespace, stage: Stage, card: Card, settings: Settings, ranks: Ranks
) -> tuple[data.Pool | data.Stream, Card]:
    """The windows of the stage: cached ones, those of --data with the network as wide as its
    robots, or of the toy world."""
    if stage.actions == "latent" and not (args.latent or args.data or args.cache):
        raise ValueError(
            "stage 2 learns latent actions; name their encoder with --latent runs/latent (python train.py --stage latent)"
        )
    if args.cache:
        return ranks.together(lambda: cached_pool(args, stage, card))
    if args.data is None:
        return ranks.together(lambda: toy_pool(args, stage, card, settings))
    acts = stage.actions == "real"
    pyramid = ranks.together(lambda: Pyramid(args.data, stage.levels, args.preset))
    if not ranks.rank:
        print(pyramid.describe(), file=sys.stderr)
    measured = (
        ranks.gather(ranks.together(lambda: pyramid.measure(ranks.rank, ranks.world)))
        if acts
        else None
    )
    robots, config = pyramid.robots(acts, measured), pyramid.config(MotusConfig.of(card.motus))
    pool = ranks.together(
        lambda: data.pool_of(
            pyramid,
            robots,
            stage.levels,
            stage.actions,
            config,
            args.preset,
            settings.windows,
            settings.seed,
        )
    )
    interval = robots[0].rate if stage.actions == "latent" else None
    return pool, replace(
        card, motus=config.as_json(), statistics=as_stored(robots), latent_interval=interval
    )


class Steps(Dataset):
    """What this rank computes in each step, by its number: windows of a source with `batch(size,
    seed, step, rank, world)`, times and noise for them, and how many have which loss. Noise is
    drawn for the whole batch, so that it is the same for any number of ranks."""

    def __init__(self, source: data.Pool, settings: Settings, ranks: Ranks):
        self.source, self.settings, self.place = source, settings, (ranks.rank, ranks.world)

    def __getitem__(
        self, step: int
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor], tuple[float, float]]:
        settings, (rank, world) = self.settings, self.place
        inputs = self.source.batch(settings.batch, settings.seed, step, rank, world)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([settings.seed, step, 1]).generate_state(1)[0])
        )
        noise = draw(
            inputs, generator, settings.times, settings.given, settings.batch, rank * len(inputs)
        )
        return vars(inputs), noise, counts(inputs, noise)


def counts(inputs: Inputs, noise: dict[str, Tensor]) -> tuple[float, float]:
    """Samples of a batch that have a video loss, and an action loss."""
    videos = (noise["t_video"] > 0).sum().item()
    if inputs.actions is None:
        return videos, 0
    has = (
        inputs.action_mask.flatten(1).any(dim=1)
        if inputs.action_mask is not None
        else torch.ones(len(inputs), dtype=torch.bool)
    )
    return videos, (has & (noise["t_action"] > 0)).sum().item()


def batches(
    source: data.Pool, settings: Settings, ranks: Ranks, start: int
) -> Iterator[tuple[Inputs, dict[str, Tensor], tuple[float, float]]]:
    """The batches of this rank from step `start` on, on its device, prepared ahead by `workers`
    processes (a stream by its own threads): nothing but the step number decides what is in them."""
    loader = DataLoader(
        Steps(source, settings, ranks),
        batch_size=None,
        sampler=range(start, settings.steps),
        collate_fn=lambda x: x,
        num_workers=0 if isinstance(source, data.Stream) else settings.workers,
        pin_memory=ranks.device.type == "cuda",
    )
    for inputs, noise, have in loader:
        yield (
            Inputs(**inputs).to(ranks.device),
            {name: x.to(ranks.device, non_blocking=True) for name, x in noise.items()},
            have,
        )


# -- the runs -------------------------------------------------------------------------------------

LATENT_FILE = "latent_action.safetensors"


def train_latent(args: argparse.Namespace) -> Path:
    """Trains the latent-action VAE: on the true optical flow of all levels of the toy world, or on
    what `python latent_action.py tokens` made of videos. Actions are looked at where they are
    labelled, in a tenth of each batch. A frozen DC-AE sees each flow once; `--set` also takes
    fields of LatentActionConfig, as in `--set reconstruct=picture finetune_dcae=True`. Returns the
    file of the encoder."""
    kinds = {
        f.name: f.type
        for f in fields(latent_action.LatentActionConfig)
        if f.type in (int, float, str, bool)
    }
    own = {
        key: value
        for key, eq, value in (change.partition("=") for change in args.set)
        if key in kinds
    }
    settings = settings_for(
        args.preset,
        "latent",
        [
            *(c for c in args.set if c.partition("=")[0] not in own),
            *([f"steps={args.steps}"] if args.steps else []),
        ],
    )
    cast = {
        key: value == "True" if kinds[key] is bool else kinds[key](value)
        for key, value in own.items()
    }
    torch.manual_seed(settings.seed)
    model = latent_action.LatentActionModel(
        latent_action.LatentActionConfig.of(PRESETS[args.preset].latent, **cast)
    )
    dcae = args.init or (PRESETS[args.preset].backbones or Path()) / "dcae.safetensors"
    if not Path(dcae).exists():
        raise ValueError(
            f"{dcae} does not exist: name DC-AE weights with --init, published ones or of python latent_action.py pretrain"
        )
    if not args.cache and args.preset != "toy":
        raise ValueError(
            f"preset {args.preset!r} trains on videos; make --cache FOLDER of them with python latent_action.py tokens"
        )
    model.load_dcae(dcae)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    run = claim(Path(args.run or "runs/latent"), resumed=False)
    if args.cache:
        x, labels, mask = data.read_tokens([args.cache], model)
    else:
        shots = lambda count, split: [
            episode
            for level in (2, 3, 4, 5, 6)
            for episode in tabletop.record(level, count, settings.seed, split=split, pictures=False)
        ]
        pairs = motions.toy_pairs(shots(settings.episodes, "train"), model.config.interval)
        x, labels, mask = motions.toy_rows(model, pairs, seed=settings.seed)
    names = ("total", "reconstruction", "alignment", "kl")
    with (run / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *names])

        def log(step: int, losses: dict[str, float]) -> None:
            if step % settings.log_every == 0:
                writer.writerow([step, *(f"{losses[name]:.6g}" for name in names)])

        latent_action.fit(
            model,
            x,
            labels,
            mask,
            settings.steps,
            settings.batch,
            settings.lr,
            settings.warmup,
            settings.floor,
            settings.weight_decay,
            seed=settings.seed,
            log=log,
        )
    model.save(run / LATENT_FILE)
    plot_curve(run / "log.csv", run / "curve.png", ("reconstruction", "alignment"))
    if not args.cache:
        held, figures = motions.toy_pairs(shots(20, "eval"), model.config.interval), {}
        with torch.no_grad():
            mu, test = (
                torch.cat(
                    [
                        model.encode(model.tokens(part.to(model.token_mean.device)))[0].cpu()
                        for part in flow.split(256)
                    ]
                )
                for flow in (pairs.flow, held.flow)
            )
        for level, name in ((6, "target robot"), (2, "hand, never labelled")):
            known, unseen = pairs.level == level, held.level == level
            figures[name] = latent_action.probe(
                mu[known], pairs.labels[known], test[unseen], held.labels[unseen]
            ).tolist()
            print(
                f"held-out episodes, {name}: linear probe R2 of the motion in x, y, opening "
                + " ".join(f"{v:.3f}" for v in figures[name])
            )
        (run / "figures.json").write_text(
            json.dumps({"probe R2 (x, y, opening)": figures}, indent=1)
        )
    print(f"wrote {run / LATENT_FILE}")
    return run / LATENT_FILE


def train(args: argparse.Namespace) -> Path:
    """Trains one stage of the network, as one of the ranks that were started; returns the last
    checkpoint."""
    stage = STAGES[args.stage]
    settings = settings_for(
        args.preset, args.stage, [*args.set, *([f"steps={args.steps}"] if args.steps else [])]
    )
    with launch(settings.shards, settings.timeout) as ranks:
        return run_stage(args, stage, settings, ranks)


def run_stage(args: argparse.Namespace, stage: Stage, settings: Settings, ranks: Ranks) -> Path:
    # -- the same on every rank, or refused by all of them
    ranks.same(
        code=code_digest(),
        stage=args.stage,
        preset=args.preset,
        run=str(args.run),
        **{name: str(value) for name, value in asdict(settings).items()},
    )
    ranks.together(lambda: divide(settings, ranks.world))
    run = Path(args.run or f"runs/stage{args.stage}")
    ranks.together(lambda: claim(run, bool(args.resume), make=not ranks.rank))
    card = Card(preset(args.preset, args.stage).as_json(), args.stage, args.preset)
    source, card = pool_for(args, stage, card, settings, ranks)
    if args.preset in ("toy", "sim"):  # the others are published and do not change
        parts = ("vae", "text") if stage.actions == "none" else ("vae", "text", "vlm")
        card = replace(
            card,
            backbones=ranks.together(
                lambda: data.backbones_of(
                    args.preset, MotusConfig.of(card.motus), parts=parts
                ).fingerprint()
            ),
        )
    about = {"code": code_digest(), "data": source.digest()}
    ranks.same(data=about["data"], card=digest({}, card.as_json()))

    # -- the network: shapes, then shards, then values
    with torch.device("meta"):
        model = Motus(MotusConfig.of(card.motus)).train()
    model.to(torch.bfloat16 if settings.params == "bf16" else torch.float32)
    compute = sharding.parallelize(
        model,
        stage.experts,
        ranks.mesh,
        settings.checkpointing,
        bool(settings.compile),
        settings.precision,
        bool(settings.reshard),
    )
    compute.to_empty(device=ranks.device)
    if not args.resume:
        ranks.together(lambda: initialise(model, args.init, stage, args.stage, settings.seed))
    optimizers = make_optimizers(model, settings, stage.experts)
    ema = EMA(model, settings.ema)
    start = (
        ranks.together(
            lambda: resume(
                newest_step(run),
                model,
                ema,
                optimizers,
                card,
                settings,
                about,
                args.resume == "anyway",
            )
        )
        if args.resume
        else 0
    )
    ranks.same(newest_checkpoint=str(start))
    log, saver = (
        ranks.together(lambda: Log(run / "log.csv", start, ranks, settings.log_to)),
        Saver(run, ranks, settings.keep),
    )
    trained = [p for group in groups_of(optimizers) for p in group["params"]]
    micro, begun, stopped = settings.micro or settings.batch // ranks.world, time.monotonic(), []
    done, work = start, None
    if not ranks.rank:
        print(
            f"stage {args.stage}: {sum(p.numel() for p in trained):,} trained parameters, {len(source)} windows of levels "
            f"{stage.levels}, {settings.steps} steps of {settings.batch} on {ranks.world} x {ranks.device.type}",
            flush=True,
        )
        print("attention: {}, because {}".format(*choose(ranks.device)), flush=True)

    previous = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    watchdog = Watchdog(ranks, settings.timeout)
    prepared = batches(source, settings, ranks, start)
    try:
        bar = tqdm(
            range(start, settings.steps),
            desc=f"stage {args.stage}",
            initial=start,
            total=settings.steps,
            mininterval=1,
            disable=ranks.rank > 0,
        )
        for step in bar:
            # ----------------------------------------------------------------- one step
            watchdog.beat(f"waiting for the data of step {step}")
            waited = time.perf_counter()
            inputs, noise, have = next(prepared)
            log.add("data_wait_s", time.perf_counter() - waited)
            watchdog.beat(f"computing step {step}")
            late = settings.minutes and time.monotonic() - begun > 60 * settings.minutes
            videos, acting, stop, failed = ranks.sums(*have, bool(stopped or late), saver.failed)
            set_lr(optimizers, settings, step)
            model.zero_grad(set_to_none=True)
            loss = 0.0
            for first in range(0, len(inputs), micro):
                part = slice(first, first + micro)
                losses = compute(inputs.rows(part), {name: x[part] for name, x in noise.items()})
                share = losses.total(settings.video_weight, settings.action_weight, videos, acting)
                (share * ranks.world).backward()  # FSDP divides by the number of ranks
                loss += share.item()
                log.losses(losses)
            norm = sharding.whole(nn.utils.clip_grad_norm_(trained, settings.clip)).item()
            (loss,) = ranks.sums(loss)
            if not math.isfinite(loss) or not math.isfinite(norm):
                rows = source.rows(settings.batch, settings.seed, step).tolist()
                raise ValueError(
                    f"step {step}: loss {loss}, gradient norm {norm}; windows {rows} of seed {settings.seed}. Nothing was "
                    f"updated; the last checkpoint is intact. Lower --set lr (now {settings.lr})"
                )
            for optimizer in optimizers:
                optimizer.step()
            ema.update(model, step)
            # --------------------------------------------------------------------------
            done = step + 1
            (
                log.add("loss", loss),
                log.add("grad_norm", norm),
                log.add("lr", groups_of(optimizers)[0]["lr"]),
            )
            tokens, flops = work = work or sharding.cost(model, inputs)
            log.add("samples", len(inputs)), log.add("tokens", tokens)
            if settings.peak:
                log.add("flops", flops / settings.peak / 1e12)
            stop = stop or done == settings.steps
            if done % settings.log_every == 0 or stop:
                row = log.row(done)
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("video", "action") if k in row})
            if stop or failed or (settings.save_every and done % settings.save_every == 0):
                watchdog.beat(f"writing the checkpoint of step {done}")
                save_checkpoint(saver, done, model, ema, optimizers, card, settings, about)
            if stop and done < settings.steps:
                break
        watchdog.beat("writing the last checkpoint")
    finally:
        watchdog.stop()
        prepared.close()
        signal.signal(signal.SIGTERM, previous)
        saver.wait()
    checkpoint = newest_step(run)
    if not ranks.rank:
        plot_curve(run / "log.csv", run / "curve.png")
        if done < settings.steps:
            print(f"ended after {done} of {settings.steps} steps, as asked; continue with --resume")
        print(f"wrote {checkpoint}, {run / 'log.csv'}, {run / 'curve.png'}")
    return checkpoint


def divide(settings: Settings, world: int) -> None:
    """Refuses a batch that does not fall into equal parts."""
    share = settings.batch // world
    if settings.batch % world or share % (settings.micro or share):
        raise ValueError(
            f"batch={settings.batch} does not divide into equal parts for {world} ranks, micro={settings.micro or share} "
            f"samples at a time; set batch to a multiple of {world * (settings.micro or 1)}"
        )


def claim(run: Path, resumed: bool, make: bool = True) -> Path:
    """The run's folder: new for a new run, existing for a resumed one; `make` it, or only look."""
    exists = run.exists() and any(run.glob("[!.]*"))
    if exists and not resumed:
        raise ValueError(
            f"run folder {run} exists; continue it with --resume, or name another with --run"
        )
    if resumed and not exists:
        raise ValueError(f"--resume: run folder {run} does not exist; start it without --resume")
    if make:
        run.mkdir(parents=True, exist_ok=True)
    return run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True, help="one of 1, latent, 2, 3, backbones")
    parser.add_argument("--preset", default="toy", help="row of the table in motus.py")
    parser.add_argument(
        "--full", dest="preset", action="store_const", const="full", help="short for --preset full"
    )
    parser.add_argument("--run", help="folder of this run (default runs/stageN)")
    parser.add_argument(
        "--init", help="run, checkpoint or published weights of an earlier stage to start from"
    )
    parser.add_argument(
        "--data",
        help="dataset card, dataset folder or hub name (docs/data.md); default the toy world",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="windows of `python data.py cache` (then --data may mix them by other weights), "
        "or tokens of `python latent_action.py tokens`",
    )
    parser.add_argument("--latent", type=Path, help="run of stage latent, read by stage 2")
    parser.add_argument(
        "--keep",
        default="",
        help="parts that stage backbones takes from the repository: text, vlm, vae, dcae",
    )
    parser.add_argument(
        "--resume",
        action="store_const",
        const="same",
        help="continue the run from its newest checkpoint",
    )
    parser.add_argument(
        "--resume-anyway",
        dest="resume",
        action="store_const",
        const="anyway",
        help="the same, although the code has changed since it was written",
    )
    parser.add_argument("--steps", type=int, help="short for --set steps=N")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help=f"change a setting: {', '.join(f.name for f in fields(Settings))}",
    )
    args = parser.parse_args(argv)
    known = [*STAGES, "backbones"]
    if args.stage not in known:
        near = difflib.get_close_matches(args.stage, known, 1, 0.0)[0]
        raise ValueError(
            f"--stage is {args.stage!r}; allowed: {', '.join(known)}; did you mean {near!r}?"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    if "--plan" in (sys.argv[1:] if argv is None else argv):
        plan.main(argv)
        return
    args = parse(argv)
    preset(args.preset)
    if args.stage in STAGES:
        train(args)
    elif args.stage == "latent":
        train_latent(args)
    else:
        raise ValueError("python -m scripts.pretrain")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user, the data or the disk got wrong
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
