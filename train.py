"""Trains Motus: three stages, and the latent actions between the first and the second (paper Sec.
3.3, Tab. 1; `motus.STAGES`).

    python train.py                         all stages in order, what is finished is left out
    python train.py --stage 1               video generation: the video expert alone
    python train.py --stage latent          the 14-d latent-action VAE, on optical flow
    python train.py --stage 2 --init runs/stage1 --latent runs/latent       all experts on those
    python train.py --stage 3 --init runs/stage2        all experts on a robot's actions and state
    torchrun --nproc-per-node 8 train.py --full         the same on eight GPUs: docs/scale.md

From stage 2 to 3 the action encoder, decoder and registers start fresh; every block carries over.
VLM, VAE and text encoder are frozen throughout. One process or many run the same code (`scale`).

A run is a folder: `log.csv`, `curve.png` and `step_NNNNNN/` with config, weights, EMA and
optimizer, safetensors and json only. A checkpoint is renamed when it is complete; SIGTERM leaves
one and ends the run. Every random number of a sample of step n comes from (seed, n, sample): a
resumed run equals an uninterrupted one bit for bit, on any number of ranks up to the order of sums.
"""

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import data
import flow
from attention import choose
from backbones import eyes
from backbones.frozen import Backbones
from backbones.optical_flow import augmented
from formats.motions import motions, read_tokens
from formats.statistics import as_stored
from latent_action import LatentActionConfig, LatentActionModel, fit, probe
from motus import PRESETS, STAGES, Inputs, Motus, MotusConfig, preset
from scale import lora, plan, sharding
from scale.batches import Source, batches, encode_once
from scale.checkpoints import RunState, Saver, claim, code_digest
from scale.log import Log, plot_curve
from scale.muon import Muon
from scale.needs import dcae_of, ready
from scale.ranks import Ranks, Watchdog, launch
from scale.synthetic import SYNTHETIC, Synthetic
from weights import options
from weights.card import Card, newest_step, steps_of
from weights.files import check_keys, digest, write_json

# -- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Everything about a run that is not the network; each field is a key of `--set`."""

    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    video_lr: float = 6e-3  # learning rate of the video expert; 0 means lr
    optimizer: Literal["adamw", "muon"] = "adamw"  # Muon is for the matrices of the blocks
    muon_lr: float = 0.04
    warmup: int = 50  # steps of linear warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # how lr falls
    horizon: int = 0  # steps until it has fallen; 0: all steps of the run
    floor: float = 0.1  # share of lr at which the schedule ends
    weight_decay: float = 0.01
    decay: Literal["matrices", "all"] = "matrices"  # "all": vectors and tables too, as official
    clip: float = 1.0  # gradient norm
    ema: float = 0.995
    lora: int = 0  # rank of the adapters that alone are trained of the video expert; 0: none
    times: Literal[tuple(flow.TIMES)] = "official"  # of the table of flow.py
    given: float = 0.0  # share of samples in which one modality is given, as in world_model and idm
    video_weight: float = 1.0  # of the video loss in the sum
    motion_weight: float = 0.0  # in the video loss, of what changes: `flow.moving_weight`
    seed: int = 0
    episodes: int = data.EPISODES  # per level that a world renders
    windows: int = data.WINDOWS  # encoded once, batches are drawn from them; 0: encoded when needed
    save_every: int = 0  # steps between checkpoints; 0 saves the last only
    keep: int = 2  # newest checkpoints that are kept
    log_every: int = 10
    log_to: Literal["", "tensorboard", "wandb"] = ""  # beside the csv
    workers: int = 0  # processes that prepare batches ahead
    micro: int = 0  # samples per rank and pass, whose gradients add up; 0: all, or the plan's
    precision: Literal["fp32", "bf16"] = "fp32"  # "bf16": autocast
    params: Literal["fp32", "bf16"] = "fp32"  # "bf16": half the memory; small updates are lost
    # What the backward pass computes again; "plan": the least for which the card has memory.
    checkpointing: Literal[("plan", *sharding.CHECKPOINTING)] = "none"
    compile: bool = False  # each layer by torch.compile
    shards: int = 0  # ranks that share one copy of the weights; 0: a node's, or 1 if small
    reshard: bool = True  # False: keep layers gathered between forward and backward pass
    peak: float = 0.0  # TFLOP/s of one device, for the model FLOP utilisation in the log
    timeout: float = 1800.0  # seconds without progress until the run ends
    minutes: float = 0.0  # save and end after so long; 0: never

    def __post_init__(self):
        options.check_numbers("--set", Settings, vars(self))
        for f in fields(self):
            allowed = get_args(f.type) or (True, False)
            found = getattr(self, f.name)
            if f.type not in (int, float) and found not in allowed:
                raise options.Refusal(
                    f"--set {f.name} is {found!r}; expected one of {', '.join(map(repr, allowed))}"
                )


# What may change when a run is resumed: it changes how the numbers are computed, not what they are.
FREE = """save_every keep log_every log_to workers micro checkpointing compile shards reshard peak
timeout minutes""".split()
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def changed(config, changes: Sequence[str]):
    """A dataclass with `key=value` changes. An unknown key is an error that names the nearest."""
    kinds = {f.name: f.type for f in fields(config)}
    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise options.Refusal(f"--set is {change!r}; expected key=value")
        kind = kinds.get(key)
        value = options.spelled(text, kind) if kind in (int, float) else text
        check_keys({key: value}, type(config), "--set")
        if kind is bool and text.lower() not in BOOLEANS:
            raise options.Refusal(f"--set {key} is {text!r}; expected true or false")
        values[key] = BOOLEANS[text.lower()] if kind is bool else value
    return replace(config, **values)


def settings_for(
    preset_name: str, stage: str, changes: Sequence[str] = (), long: bool = False
) -> Settings:
    """The recipe of a preset for a stage, quick or `long`, with changes."""
    return changed(Settings(**PRESETS[preset_name].settings(stage, long)), changes)


# -- optimisation ---------------------------------------------------------------------------------


def make_optimizers(
    model: Motus, settings: Settings, experts: Sequence[str]
) -> list[torch.optim.Optimizer]:
    """AdamW over the trained experts: matrices decay, vectors and modulation tables only if asked
    for. With optimizer=muon whole matrices of the blocks have an optimizer of their own."""
    groups = []
    rotated = []
    for expert in experts:
        lr = settings.video_lr if expert == "video" and settings.video_lr else settings.lr
        decays = dict(params=[], base=lr, weight_decay=settings.weight_decay)
        stays = dict(params=[], base=lr, weight_decay=0.0)
        for name, p in getattr(model, expert).named_parameters():
            if not p.requires_grad:
                continue
            whole = name.startswith("blocks.") and not name.endswith("lora")
            if settings.optimizer == "muon" and p.dim() == 2 and whole:
                rotated.append(p)
                continue
            matrix = p.dim() > 1 and not name.endswith(("modulation", "registers"))
            group = decays if matrix or settings.decay == "all" else stays
            group["params"].append(p)
        groups += [decays, stays]
    optimizers = [torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)]
    if rotated:
        groups = [dict(params=rotated, base=settings.muon_lr)]
        optimizers.append(Muon(groups, settings.muon_lr, settings.weight_decay))
    return optimizers


def groups_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_lr(optimizers: Sequence[torch.optim.Optimizer], settings: Settings, step: int) -> None:
    """Linear warm-up, times a cosine or a line to `floor` at the horizon."""
    progress = min(1.0, step / (settings.horizon or settings.steps))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[settings.schedule]
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    for group in groups_of(optimizers):
        group["lr"] = group["base"] * warm * (settings.floor + (1 - settings.floor) * left)


class EMA:
    """An exponential moving average, in fp32, of what is trained; samples are taken from it."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        trained = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
        self.weights = {k: p.detach().float().clone() for k, p in trained}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # short memory at first
        new = [p.float() for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(list(self.weights.values()), new, 1 - decay)


# -- data of a stage ------------------------------------------------------------------------------


def windows_for(args: argparse.Namespace, settings: Settings, ranks: Ranks) -> Source:
    """The windows of the stage: those of --cache, mixed by the weights of --data if that is given
    too, random ones, or those of the card, whose statistics the ranks share out."""
    kind = args.preset, args.stage
    if args.data == SYNTHETIC:
        return Synthetic(*kind)
    if args.cache:
        pool = ranks.together(lambda: data.Pool(args.cache, *kind))
        ranks.together(lambda: ranks.rank or pool.check(args.latent))
        if args.data:
            ranks.together(lambda: pool.mix(open_card(args, settings)))
        return pool
    pyramid = ranks.together(lambda: open_card(args, settings))
    if not ranks.rank:
        print(pyramid.describe(), file=sys.stderr)
        print(eyes.note(pyramid, data.backbones_folder(args.preset), args.preset), file=sys.stderr)
    measured = None
    if STAGES[args.stage].finetune:
        measured = ranks.gather(ranks.together(lambda: pyramid.measure(ranks.rank, ranks.world)))
    stream = ranks.together(lambda: data.Stream(pyramid, *kind, measured))
    if not settings.windows:
        return ranks.together(lambda: stream.load(ranks.device, settings.precision))
    return encode_once(stream, settings, ranks, args.out.parent / "windows")


def open_card(args: argparse.Namespace, settings: Settings):
    latent = args.latent if args.stage == "2" else None
    sizes = settings.episodes, settings.seed
    return data.open_pyramid(args.data, args.stage, args.preset, *sizes, latent=latent)


# -- the step -------------------------------------------------------------------------------------


@dataclass
class Training:
    """A network on its way: what a step reads and changes."""

    loss: sharding.TrainingLoss
    state: RunState
    ema: EMA
    source: Source
    settings: Settings
    ranks: Ranks
    log: Log

    @property
    def trained(self) -> list[Tensor]:
        return [p for group in groups_of(self.state.optimizers) for p in group["params"]]


def step(run: Training, number: int, inputs: Inputs, noise: dict, have: Sequence[float]) -> None:
    """One step on this rank's part of a batch, of which `have` samples, over all ranks, have a
    video loss and an action loss. ValueError, before it is saved, if the loss is not finite."""
    settings, optimizers = run.settings, run.state.optimizers
    set_lr(optimizers, settings, number)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = torch.zeros((), device=run.ranks.device)
    micro = settings.micro or len(inputs)
    for first in range(0, len(inputs), micro):
        part = slice(first, first + micro)
        run.loss.begin_pass(last=first + micro >= len(inputs))
        losses = run.loss(inputs.rows(part), {name: x[part] for name, x in noise.items()})
        share = losses.total(*have, settings.video_weight)
        (share * run.loss.divided).backward()
        loss += share.detach()
        run.log.losses(losses)
    loss, norm = sharding.reduced(loss, run.trained, settings.clip)
    for optimizer in optimizers:
        optimizer.step()
    run.ema.update(run.state.model, number)
    # The only place where the host waits for the device, which has all of the step by now.
    loss, norm = torch.stack([loss, norm.float()]).tolist()
    if not math.isfinite(loss + norm):
        windows = run.source.rows(settings.batch, settings.seed, number).tolist()
        raise ValueError(
            f"step {number}: loss {loss}, gradient norm {norm}; windows {windows} of this seed. "
            f"Nothing of it is saved, the last checkpoint is whole. Lower --set lr={settings.lr}"
        )
    run.log.add("loss", loss)
    run.log.add("grad_norm", norm)
    run.log.add("lr", groups_of(optimizers)[0]["lr"])


# -- one stage ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, settings: Settings, ranks: Ranks) -> None:
    """One stage of the network, as one of the ranks."""
    # The same on every rank, or refused by all of them.
    settings, mesh = ranks.together(lambda: plan.settled(args, settings, ranks))
    facts = dict(stage=args.stage, preset=args.preset, out=args.out, code=code_digest())
    ranks.same(**{name: str(value) for name, value in (asdict(settings) | facts).items()})
    ranks.together(lambda: claim(args.out, args.resume, make=not ranks.rank))
    source = windows_for(args, settings, ranks)
    frozen = fingerprint(args.preset, source)
    robots = as_stored(source.robots)
    network = source.config.as_json()
    card = Card(network, args.stage, args.preset, robots, source.interval, backbones=frozen)
    about = {"code": code_digest(), "data": source.digest()}
    ranks.same(data=about["data"], card=digest({}, card.as_json()))
    # The network: shapes, then shards, then values.
    experts = STAGES[args.stage].experts
    with torch.device("meta"):
        model = Motus(source.config).train()
    model.motion_weight = settings.motion_weight
    model.to(torch.bfloat16 if settings.params == "bf16" else torch.float32)
    how = settings.checkpointing, settings.compile, settings.precision, settings.reshard
    loss = sharding.parallelize(model, experts, mesh, *how)
    if settings.lora:
        lora.freeze(model, settings.precision)
    loss.to_empty(device=ranks.device)
    before = steps_of(args.out) if args.resume else []
    if not before:
        ranks.together(lambda: sharding.initialise(model, args.init, args.stage, settings.seed))
    if settings.lora:
        lora.adapt(model, settings.lora, settings.seed)
    ema = EMA(model, settings.ema)
    optimizers = make_optimizers(model, settings, experts)
    state = RunState(model, ema.weights, optimizers, card, asdict(settings), about)
    start = 0
    if before:
        anyway = args.resume == "anyway"
        start = ranks.together(lambda: state.resume(before[-1], FREE, anyway))
    ranks.same(newest_checkpoint=str(start))
    # The steps.
    path = args.out / "log.csv"
    log = ranks.together(lambda: Log(path, start, ranks, settings.log_to))
    run = Training(loss, state, ema, source, settings, ranks, log)
    if not ranks.rank:
        print(
            f"stage {args.stage}: {sum(p.numel() for p in run.trained):,} trained parameters, "
            f"{len(source)} windows, {settings.steps} steps of {settings.batch} on {ranks.world} x "
            f"{ranks.device.type}; attention: {', because '.join(choose(ranks.device))}",
            flush=True,
        )
    done = train_steps(run, Saver(args.out, ranks, settings.keep), start)
    if not ranks.rank:
        plot_curve(path)
        if done < settings.steps:
            print(f"ended after {done} of {settings.steps} steps, as asked; continue with --resume")
        print(f"wrote {newest_step(args.out)}, {path}, {path.with_name('curve.png')}")


def train_steps(run: Training, saver: Saver, start: int) -> int:
    """Steps from `start` to the last one, or until a rank is asked to stop; returns how many are
    done then."""
    settings, ranks, log = run.settings, run.ranks, run.log
    done = start
    deadline = time.monotonic() + 60 * (settings.minutes or math.inf)
    bar = tqdm(range(settings.steps), f"stage {run.state.card.stage}", disable=ranks.rank > 0)
    bar.update(start)
    flops = 0.0
    prepared = closing(batches(run.source, settings, ranks, start))
    run.state.optimizers[0].register_step_pre_hook(saver.settle)
    with Watchdog(ranks, settings.timeout) as watchdog, saver, prepared, bar:
        for number in range(start, settings.steps):
            watchdog.beat(f"waiting for the data of step {number}")
            waited = time.perf_counter()
            inputs, noise, have = next(prepared.thing)
            log.add("data_wait_s", time.perf_counter() - waited)
            watchdog.beat(f"computing step {number}")
            asked = watchdog.stopped or time.monotonic() > deadline
            *have, asked, failed = ranks.sums(*have, asked, saver.failed)
            step(run, number, inputs, noise, have)
            done = number + 1
            log.add("samples_per_s", len(inputs))
            log.add("tokens_per_s", sharding.count_tokens(run.source.config, inputs))
            if settings.peak:
                flops = flops or sharding.count_flops(run.source.config, inputs)
                log.add("mfu", flops / settings.peak / 1e12)
            last = asked or done == settings.steps
            if last or done % settings.log_every == 0:
                row = log.row(done)
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("video", "action") if k in row})
            if last or failed or (settings.save_every and done % settings.save_every == 0):
                watchdog.beat(f"writing the checkpoint of step {done}")
                run.state.save(saver, done)
            bar.update()
            if last:
                break
    return done


def fingerprint(preset_name: str, source: Source) -> dict[str, str] | None:
    """Digests of frozen backbones of our own making; published ones do not change."""
    if not (data.backbones_folder(preset_name) / "vae.safetensors").is_file():
        return None
    return {name: source.made_by[name] for name in Backbones.PARTS if name in source.made_by}


# -- latent actions -------------------------------------------------------------------------------

LATENT_FIELDS = {f.name for f in fields(LatentActionConfig) if f.type in (int, float, str, bool)}


def train_latent(args: argparse.Namespace, settings: Settings, rank: int) -> None:
    """The latent-action VAE, by rank 0: on the optical flow that the sources of the card know, or
    on what `python -m scripts.latents tokens` made of videos (--cache). Actions are looked at where
    they are labelled, in a tenth of each batch. A frozen DC-AE (--init) sees each flow once;
    `--set` also takes fields of LatentActionConfig, as in `reconstruct=picture`."""
    if rank:
        return
    torch.manual_seed(settings.seed)
    config = LatentActionConfig.of(PRESETS[args.preset].latent)
    config = changed(config, [text for text in args.set if text.partition("=")[0] in LATENT_FIELDS])
    model = LatentActionModel(config)
    model.load_dcae(dcae_of(args))
    model.to(options.device())
    claim(args.out, args.resume, make=False)  # what is refused leaves no folder
    if args.cache:
        rows = read_tokens([args.cache], model)
    else:
        pyramid = open_card(args, settings)
        seen = motions(pyramid, config.interval)
        rows = augmented(seen.flow, seen.labels, seen.mask, seed=settings.seed)
    curve = args.out / "log.csv"
    curve.unlink(missing_ok=True)  # of an earlier try

    def log(number: int, losses: dict[str, float]) -> None:
        if number % settings.log_every == 0 or number == settings.steps:
            args.out.mkdir(parents=True, exist_ok=True)
            with curve.open("a", newline="") as file:
                writer = csv.DictWriter(file, ("step", *losses))
                if not file.tell():
                    writer.writeheader()
                writer.writerow({"step": number} | losses)

    fit(model, rows, settings, log=log)
    plot_curve(curve, ("reconstruction", "alignment"))
    if not args.cache:
        figures = probes(model, seen, motions(pyramid, config.interval, held_out=True))
        write_json(args.out / "figures.json", figures)
    model.save(args.out / data.LATENT_FILE)
    print(f"wrote {args.out / data.LATENT_FILE}")


@torch.no_grad()
def probes(model: LatentActionModel, seen, held_out) -> dict[str, dict[str, list[float]]]:
    """How much of the true motion the latents hold, per level of the pyramid: R2 of each label by
    the best linear map, on held-out episodes."""
    mu, test = (
        model.tokens_to_latent(model.as_tokens(found.flow))[0].cpu() for found in (seen, held_out)
    )
    figures = {}
    for level in held_out.level.unique().tolist():
        known = seen.level == level
        new = held_out.level == level
        r2 = probe(mu[known], seen.labels[known], test[new], held_out.labels[new])
        figures[f"level {level}"] = r2.tolist()
    print("linear probe of the motion, R2 on held-out episodes:", json.dumps(figures))
    return {"probe R2": figures}


# -- all stages -----------------------------------------------------------------------------------


def folder_of(stage: str) -> str:
    return stage if stage == "latent" else f"stage{stage}"


def planned(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The stages to train, in order, as if each had its own command. Without --stage all of them,
    each from the one before: what is begun is resumed, what is finished left out."""
    if args.stage:
        args.out = args.out or Path("runs") / folder_of(args.stage)
        return [args]
    if args.cache or args.latent:
        raise ValueError("--cache and --latent belong to one stage; name it with --stage")
    root = args.out or Path("runs") / args.preset
    random = args.data == SYNTHETIC  # needs neither flow nor published weights
    jobs = []
    for stage, row in STAGES.items():
        if random and stage == "latent":
            continue
        job = argparse.Namespace(**vars(args))
        job.stage, job.out = stage, root / folder_of(stage)
        job.latent = root / folder_of("latent")
        if stage != "1":
            job.init = root / folder_of(row.before) if row.before else None
        elif not (args.init or random) and preset(args.preset).video == MotusConfig().video:
            job.init = data.backbones_folder(args.preset) / "wan"  # the video expert as published
        if (job.out / "tokens").is_dir():
            job.cache = job.out
        job.resume = (args.resume or "same") if any(job.out.glob("[!.]*")) else None
        finished = (job.out / data.LATENT_FILE).is_file()
        if any(job.out.glob("step_*")):
            card = Card.read(newest_step(job.out) / "config.json")
            finished = card.step >= settings_of(job).steps
        if finished:
            print(f"stage {stage} is finished: {job.out}")
        else:
            jobs.append(job)
    return jobs


def settings_of(args: argparse.Namespace) -> Settings:
    changes = [f"steps={args.steps}"] if args.steps else []
    own = LATENT_FIELDS if args.stage == "latent" else ()
    changes += [text for text in args.set if text.partition("=")[0] not in own]
    return settings_for(args.preset, args.stage, changes, args.long)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    add = parser.option
    add("--stage", str, "default all in order; finished ones are skipped", choices=list(STAGES))
    add("--preset", "toy", "row of presets.toml", choices=PRESETS)
    const = {"action": "store_const"}
    add("--full", False, "--preset full", dest="preset", const="full", **const)
    add("--out", options.output_folder, "folder of the run (default runs/stageN or runs/PRESET)")
    add("--init", Path, "run or weights to start from; of stage latent its DC-AE")
    add("--data", str, "dataset card, folder or hub name (docs/data.md); default the preset's")
    add("--cache", Path, "windows of data.py cache, tokens of scripts.latents tokens")
    add("--latent", Path, "run of stage latent, read by stage 2")
    add("--resume", False, "go on from the newest checkpoint", const="same", **const)
    const |= {"dest": "resume", "const": "anyway"}
    add("--resume-anyway", False, "the same, although the code has changed since", **const)
    add("--steps", int, "short for --set steps=N")
    add("--long", False, "the preset's long recipe")
    add(*options.DEVICE)
    add("--set", str, options.stated(Settings), nargs="*", default=[], metavar="KEY=VALUE")
    plan.add_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.plan:
        plan.main(args)
        return
    stages = [args.stage] if args.stage else STAGES
    settings = {n: settings_of(argparse.Namespace(**vars(args) | {"stage": n})) for n in stages}
    first = next(iter(settings.values()))
    with launch(first.shards, first.timeout) as ranks:
        for job in ranks.together(lambda: ready(planned(args), first.log_to)):
            if job.stage == "latent":
                work = partial(train_latent, job, settings["latent"], ranks.rank)
                ranks.together(work, ranks.patient)
            else:
                train(job, settings[job.stage], ranks)


if __name__ == "__main__":
    options.run_command(record(main))  # for the summary of torchrun
