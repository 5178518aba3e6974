"""Memory, FLOPs, speed and hours of a training run, told before anyone rents a GPU.

    python train.py --full --plan --gpus 8 --memory 80        the paper's model on 8 cards of 80 GB
    python train.py --preset small --plan --gpus 1 --memory 24 --peak 165

    train.py ... --set checkpointing=plan                     what it finds for the card it meets

Between steps a rank holds its share of P parameters, T of them trained (FSDP2, W ranks that share
one copy, `shards`; `sharding.split_axis` says along which axis):

    weights      4 P / W     fp32; 2 P / W with --params bf16
    adapted      2 M         bf16, with adapters: matrices of the video expert, whole on every rank
    gradients    4 T / W     in the dtype of the weights
    optimizer    8 T / W     AdamW's two moments, in the dtype of the weights
    EMA          4 T / W     always fp32
    frozen       2 F         --frozen live: every rank has VLM, VAE and text encoder whole, in bf16

Within a step three more things come and go. Layer by layer the backward pass frees activations and
fills in gradients, at a constant rate, so the worst moment is at its beginning or at its end:

    gathered     what lies outside the layers, whole; the layer at work and the one gathered ahead,
                 in bf16 (with reshard=0 all layers, and where a batch takes several passes whole
                 fp32 gradients); the fp32 buffer in which the gradients of the layer before are
                 reduced (one GPU gathers nothing)
    activations  what the forward pass leaves behind for the backward pass. `none` keeps all of it;
                 `full` keeps what goes into a layer and computes the layer again; `selective` also
                 keeps what matrix products and attentions give, and computes only norms, modulation
                 and GELU again (`sharding.keep_expensive`)
    working      the layer whose backward pass runs: what was computed again, its gradients before
                 they are reduced, and those of its widest activation

Activations are counted in numbers that the linear maps of a layer put out, of all tokens: KEPT
bytes of each are kept, norms and attentions included. That the same bytes serve every preset and
stage, and that the sum is what a traced step of FSDP2 needs, are tests. FLOPs are torch's count.

A step of several nodes, each with a copy of the weights, takes as long as its arithmetic or as all
that a card sends, whichever is longer: matrices in bf16 are gathered for each pass, forwards and,
with reshard=1, backwards again, fp32 gradients are reduced, both within a node (NVLINK); after the
last pass a card sums its share of the gradients over the nodes (NETWORK).

The plan does not know memory that the CUDA context, NCCL and a fragmented allocator take (RESERVE
of the card is left to them); what compilation and the kernels save; an attention kernel that wants
its mask written out. --mfu is a claim, not a measurement.
"""

import argparse
import math
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from backbones.frozen import Backbones
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from backbones.umt5 import UMT5Config, UMT5Encoder
from backbones.wan_vae import WanVAE, WanVAEConfig
from motus import EXPERTS, PRESETS, STAGES, Inputs, Motus, preset
from scale import lora, sharding
from scale.batches import divide
from scale.ranks import Ranks
from weights.card import steps_of
from weights.options import Parser

GB = 1e9
BYTES = {"fp32": 4, "bf16": 2}
NVLINK, NETWORK = 350e9, 40e9  # bytes per second and card of collectives: H100, 400 Gb/s at 80 %
NODES = (1, 4, 8)
CARDS = (24, 32, 48, 80)  # GB
RANK = 16  # of adapters
HOURS = {"1": 8000, "2": 10000, "3": 400}  # GPU-hours of the paper's stages (Tab. 1, appendix)
RESERVE = 0.08  # share of a card's memory that no plan may touch
IN_FLIGHT = 2  # gathered layers that exist at once
TEXT = 128  # rows of text states
PROMPT = 80  # tokens of the VLM around the picture, the instruction among them
# Bytes kept for each number that a layer's linear maps put out, under each policy.
KEPT = {"none": 7.65, "full": 0.0, "selective": 2.36}
OUTSIDE = 3  # what is kept outside the layers, in multiples of what goes into one

# -- a network and its inputs, without values -----------------------------------------------------


@cache
def frozen_parts(name: str) -> dict[str, nn.Module]:
    """The backbones of a preset: from its own files, else the published ones without values."""
    folder = PRESETS[name].backbones
    if folder is not None and (folder / "vae.safetensors").is_file():
        own = Backbones.load(folder)
        return {"vlm": own.vlm, "vae": own.vae, "text": own.text}
    with torch.device("meta"):
        text = UMT5Encoder(UMT5Config())
        return {"vlm": Qwen3VL(Qwen3VLConfig()), "vae": WanVAE(WanVAEConfig()), "text": text}


@cache
def meta_model(name: str, stage: str, rank: int = 0) -> Motus:
    """The network as a stage trains it, with adapters of this rank."""
    with torch.device("meta"):
        model = Motus(preset(name, stage))
    sharding.parallelize(model, STAGES[stage].experts)
    if rank:
        lora.freeze(model, "bf16")
        lora.adapt(model, rank, seed=0)
    return model


def parameters(module: nn.Module, trained: bool = False) -> int:
    """All, or those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@cache
def example(name: str, stage: str) -> Inputs:
    """A sample of the shapes that a stage of a preset trains on."""
    config = preset(name, stage)
    height, width = PRESETS[name].size
    parts = frozen_parts(name)
    pixels = 2 ** len(parts["vae"].config.dim_mult)  # of a latent's side
    merged = parts["vlm"].config.patch * parts["vlm"].config.merge  # of a VLM token's side
    text = min(TEXT, config.video.text_len)
    grid = (config.latent_frames, height // pixels, width // pixels)
    inputs = Inputs(
        torch.zeros(1, config.video.latent, *grid),
        torch.zeros(1, text, config.video.text_dim),
        torch.tensor([text]),
    )
    if STAGES[stage].actions != "none":
        und = (height // merged) * (width // merged) + min(PROMPT, 2 * text)
        inputs.und = torch.zeros(1, und, config.vlm_dim)
        inputs.actions = torch.zeros(1, config.chunk, config.action_dim)
        inputs.state = torch.zeros(1, config.state_dim) if config.finetune else None
    return inputs


@cache
def sample_flops(name: str, stage: str) -> float:
    """FLOPs of a training step per sample, nothing computed again."""
    return sharding.count_flops(preset(name, stage), example(name, stage))


# -- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One stage of a preset on `gpus` cards of `memory` bytes. All sizes are bytes per rank."""

    name: str
    stage: str
    gpus: int
    memory: float
    params: str = "fp32"  # dtype of weights, gradients and moments; the computation is in bf16
    frozen: str = "cached"  # or "live": the backbones are on the card too
    batch: int = 256  # of these GPUs
    reshard: bool = True
    lora: int = 0  # rank of adapters of the video expert

    def __post_init__(self):
        if self.batch % self.gpus:
            allowed = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
            raise ValueError(
                f"--gpus is {self.gpus}; a batch of {self.batch} divides among "
                f"{', '.join(map(str, allowed))}: choose one of them, or another --batch"
            )

    @property
    def model(self) -> Motus:
        return meta_model(self.name, self.stage, self.lora)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Of a sample, per expert, and rows of text."""
        inputs = example(self.name, self.stage)
        found = sharding.tokens_of(self.model.config, inputs)
        return found | {"text": inputs.context.shape[1]}

    @cached_property
    def numbers(self) -> tuple[int, int, int]:
        """Of a sample: those that go into a layer, those that the linear maps of a layer put out,
        and those of its widest activation."""
        config = self.model.config
        width = config.video.width
        entering = self.tokens["video"] * width
        widest = self.tokens["video"] * config.video.ffn
        outputs = 7 * entering + widest + 2 * self.tokens["text"] * width
        for expert, narrow in (("action", config.action_width), ("und", config.und_width)):
            tokens = self.tokens.get(expert, 0)
            entering += tokens * narrow
            outputs += tokens * (3 * width + (2 + config.expert_ffn) * narrow)
        return entering, outputs, widest

    @property
    def usable(self) -> float:
        return (1 - RESERVE) * self.memory

    def share(self, tensors: Iterable[Tensor]) -> int:
        """Parameters that the fullest rank holds of these."""
        count = 0
        for p in tensors:
            size = p.shape[sharding.split_axis(p, self.gpus).dim]
            count += p.numel() // size * math.ceil(size / self.gpus)
        return count

    @cached_property
    def layer(self) -> int:
        """Trained parameters of a layer."""
        return parameters(self.model.layers[0], trained=True)

    @cached_property
    def resident(self) -> dict[str, float]:
        """Bytes a rank holds between steps (gradients too, where a batch takes several passes), and
        whole parameters that it gathers. Experts that a stage does not train are not gathered."""
        width = BYTES[self.params]
        model = self.model
        held = self.share(model.parameters())
        trained = self.share(p for p in model.parameters() if p.requires_grad)
        depth = len(model.layers)
        root = parameters(model, trained=True) - depth * self.layer
        sizes = {
            "weights": width * held + sum(matrix.nbytes for matrix in model.buffers()),
            "gradients": width * trained,
            "optimizer": 2 * width * trained,
            "ema": 4 * trained,
            "frozen": 2 * sum(map(parameters, frozen_parts(self.name).values())),
            "root": width * root,
            "layers": 2 * (IN_FLIGHT if self.reshard else depth) * self.layer,
            "reducing": 4 * self.layer,
        }
        absent = ["frozen"] if self.frozen == "cached" else []
        absent += ["root", "layers", "reducing"] if self.gpus == 1 else []
        return sizes | dict.fromkeys(absent, 0)

    @property
    def copies(self) -> int:
        """Bytes of a layer's fp32 weights in bf16, which autocast makes where nothing is gathered
        in bf16."""
        return 2 * self.layer if self.gpus == 1 and self.params == "fp32" else 0

    def saved(self, policy: str, layers: int, micro: int) -> float:
        """Bytes that the forward pass of `layers` leaves behind."""
        entering, outputs, _ = self.numbers
        copies = self.copies if policy == "none" else 0
        kept = layers * KEPT[policy] * outputs
        kept += 4 * entering * (OUTSIDE if policy == "none" else OUTSIDE + layers)
        return micro * kept + layers * copies

    def working(self, policy: str, micro: int) -> float:
        """Bytes of the layer whose backward pass runs: what is computed again, its gradients, and
        in both precisions those of its widest activation."""
        _, outputs, widest = self.numbers
        again = 0
        if policy != "none":
            again = (KEPT["none"] - KEPT[policy]) * micro * outputs + self.copies
        gradients = BYTES[self.params] if self.gpus == 1 else 2
        return again + gradients * self.layer + 6 * micro * widest

    def peak(self, policy: str, micro: int) -> float:
        """Bytes at the worst moment of a training step with `micro` samples per rank and pass."""
        sizes = dict(self.resident)
        gradients = sizes.pop("gradients")
        reducing = sizes.pop("reducing")
        depth = len(self.model.layers)
        several = micro * self.gpus < self.batch
        if several and not self.reshard:
            gradients += 4 * parameters(self.model, trained=True)
        moments = []
        for layers in (depth, depth - 1, 1):  # that the backward pass has yet to do
            moment = self.saved(policy, layers, micro)
            moment += gradients if several else gradients * (1 - layers / depth)
            moment += reducing if layers < depth else 0
            moments.append(moment)
        return sum(sizes.values()) + self.working(policy, micro) + max(moments)

    def micro(self, policy: str) -> int:
        """The largest micro-batch that fits and divides the rank's share of the batch, or 0."""
        share = self.batch // self.gpus
        even = (n for n in range(share, 0, -1) if share % n == 0)
        return next((n for n in even if self.peak(policy, n) <= self.usable), 0)

    def flops(self, policy: str) -> float:
        """Per sample; `full` runs the forward pass, a third of a step, again."""
        return sample_flops(self.name, self.stage) * (4 / 3 if policy == "full" else 1)

    @property
    def best(self) -> str:
        """The policy that computes least among those that fit; of equals the one with the larger
        micro-batch."""
        possible = [policy for policy in KEPT if self.micro(policy)]
        if not possible:
            raise ValueError(self.refusal())
        return min(possible, key=lambda policy: (self.flops(policy), -self.micro(policy)))

    @property
    def least(self) -> float:
        """Bytes that one sample needs."""
        return min(self.peak(policy, 1) for policy in KEPT)

    def refusal(self) -> str:
        """One line: what is missing and what would fit."""
        last = 0 if self.lora else self.batch  # adapted weights are not shared
        more = [n for n in range(self.gpus + 1, last + 1) if self.batch % n == 0]
        others = {f"--gpus {n}": replace(self, gpus=n) for n in more}
        ways = [way for way, plan in others.items() if plan.least <= plan.usable][:1]
        if replace(self, params="bf16").least <= self.usable:
            ways.append("--params bf16")
        if replace(self, gpus=1, lora=RANK).least <= self.usable:
            ways.append(f"--set lora={RANK}")
        ways.append(f"--memory {math.ceil(self.least / (1 - RESERVE) / GB)}")
        return (
            f"{self.name}, stage {self.stage}, needs {self.least / GB:.3g} GB on each of "
            f"{self.gpus} ranks for one sample; {self.memory / GB:.3g} GB less {RESERVE:.0%} are "
            f"{self.usable / GB:.3g}. It would fit with {' or '.join(ways)}"
        )

    def step(self, nodes: int, rate: float) -> dict[str, float]:
        """Seconds of a step of `nodes` nodes, each with a copy of the weights and its part of the
        batch, on cards of `rate` FLOP/s: of arithmetic, and of what a card sends."""
        share = self.batch // nodes // self.gpus
        part = replace(self, batch=share * self.gpus)
        passes = share // part.micro(part.best)
        numbers = parameters(self.model, trained=True)
        near = numbers * (1 - 1 / self.gpus) / NVLINK
        return {
            "arithmetic": share * self.flops(part.best) / rate,
            "gather": passes * 2 * (1 + self.reshard) * near,
            "reduce": passes * 4 * near,
            "network": 2 * (1 - 1 / nodes) * 4 * numbers / self.gpus / NETWORK,
        }


def settled(args: argparse.Namespace, settings, ranks: Ranks) -> tuple:
    """The settings of train.py as these ranks can run them, and the mesh over which weights are
    sharded: None if they are few, or if `shards` is 1. A model that is more than that must fit into
    the cards, or without any into the machine's memory; with checkpointing=plan it takes the policy
    and the micro-batch that the plan finds. ValueError, the plan's, if nothing fits; or if there is
    nothing that adapters could adapt."""
    micro = min(settings.micro, settings.batch // ranks.world)
    settings = replace(settings, micro=micro)
    divide(settings, ranks.world)
    if settings.lora and not (args.init or steps_of(args.out)):
        raise ValueError(
            f"--set lora={settings.lora} adapts trained weights; name them with --init"
        )
    if settings.lora and settings.shards > 1:
        raise ValueError(
            f"--set shards={settings.shards}: with lora every rank holds all; expected 1"
        )
    small = parameters(meta_model(args.preset, args.stage)) < sharding.WHOLE
    mesh = None if settings.lora or (small and not settings.shards) else ranks.mesh
    policy = "none"
    if not small:
        gpus = mesh["shard"].size() if mesh else 1
        if ranks.device.type == "cuda":
            memory = torch.cuda.get_device_properties(ranks.device).total_memory
        else:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.world
        cached = args.cache or args.data == "synthetic" or settings.windows
        sizes = gpus, memory, settings.params, "cached" if cached else "live"
        batch = settings.batch * gpus // ranks.world
        plan = Plan(args.preset, args.stage, *sizes, batch, settings.reshard, settings.lora)
        policy = plan.best
        micro = micro or plan.micro(policy)
    if settings.checkpointing == "plan":
        settings = replace(settings, checkpointing=policy, micro=micro)
    slow = settings.checkpointing == "selective" and not settings.compile
    if slow and ranks.device.type == "cuda" and not ranks.rank:
        print("checkpointing=selective without compile=1 keeps the GPU waiting", file=sys.stderr)
    return settings, mesh


# -- what `--plan` prints -------------------------------------------------------------------------


def table(*rows: Collection[str]) -> list[str]:
    """Lines with columns aligned, the first to the left."""
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        line = ["", name.ljust(first), *map(str.rjust, cells, widths)]
        lines.append("  ".join(line).rstrip())
    return lines


def headed(rows: Iterable[dict[str, str]]) -> list[str]:
    """A table whose head is the names of the cells."""
    first, *more = rows
    return table(first, first.values(), *(row.values() for row in more))


def policy_row(plan: Plan, policy: str, rate: float) -> dict[str, str]:
    """The needs of a checkpointing policy, of one sample where none fits; `rate` in FLOP/s of all
    cards."""
    micro = plan.micro(policy)
    depth = len(plan.model.layers)
    one = plan.saved(policy, depth, 3) - plan.saved(policy, depth, 2)
    return {
        "checkpointing": policy + (" *" if policy == plan.best else ""),
        "saved MB/sample": f"{one / 1e6:.4g}",
        "TFLOP/sample": f"{plan.flops(policy) / 1e12:.4g}",
        "used": f"{micro} x {plan.batch // plan.gpus // micro}" if micro else "none fits",
        "saved GB": f"{plan.saved(policy, depth, micro or 1) / GB:.4g}",
        "peak GB": f"{plan.peak(policy, micro or 1) / GB:.4g}",
        "samples/s": f"{rate / plan.flops(policy):.1f}",
    }


def stage_row(plan: Plan, stage: str, rate: float) -> dict[str, str]:
    """Speed of a stage, and how far the paper's GPU-hours go here."""
    other = replace(plan, stage=stage)
    samples = rate / other.flops(plan.best)
    steps = HOURS[stage] * 3600 * samples / plan.gpus / plan.batch
    return {
        "stage": stage,
        "trained": f"{parameters(other.model, trained=True) / 1e9:.3g}B",
        "TFLOP/sample": f"{other.flops(plan.best) / 1e12:.4g}",
        "samples/s": f"{samples:.1f}",
        "paper's GPU-hours": f"{HOURS[stage]:,}",
        f"steps of {plan.batch} they buy": f"{steps:,.0f}",
        "days here": f"{HOURS[stage] / plan.gpus / 24:.1f}",
    }


def card_row(plan: Plan, memory: int, rank: int) -> dict[str, str]:
    """One card: checkpointing and micro-batch, or the GB that are missing."""
    row = {"GB": str(memory), "lora": str(rank)}
    for params in BYTES:
        one = replace(plan, gpus=1, memory=memory * GB, params=params, lora=rank)
        lacks = (one.least - one.usable) / GB
        found = f"lacks {lacks:.3g} GB" if lacks > 0 else f"{one.best} {one.micro(one.best)}"
        row[f"params={params}"] = found
    return row


def nodes_row(plan: Plan, nodes: int, rate: float) -> dict[str, str]:
    """Speed of so many nodes, and what limits it."""
    seconds = plan.step(nodes, rate)
    work, *sent = seconds.values()
    most = max(("gather", "reduce", "network"), key=seconds.get)
    return {
        "nodes x GPUs": f"{nodes} x {plan.gpus}",
        "reshard": str(int(plan.reshard)),
        **{part: f"{1000 * time:.0f}" for part, time in seconds.items()},
        "samples/s": f"{plan.batch / max(work, sum(sent)):.0f}",
        "limited by": most if work < sum(sent) else "arithmetic",
    }


def report(plan: Plan, mfu: float, peak: float) -> str:
    """`peak` in TFLOP/s of one card; `mfu` the share of it that a step without recomputation
    reaches."""
    best = plan.best
    rate = plan.gpus * mfu * peak * 1e12
    uses = dict.fromkeys(EXPERTS, "not used") | dict.fromkeys(STAGES[plan.stage].experts, "trained")
    networks = {part: getattr(plan.model, part) for part in EXPERTS} | frozen_parts(plan.name)
    parts = [(k, f"{parameters(v):,}", uses.get(k, "frozen")) for k, v in networks.items()]
    even = [nodes for nodes in NODES if plan.batch % (nodes * plan.gpus) == 0]
    kept = replace(plan, reshard=False)
    ways = [plan, kept] if plan.gpus > 1 and kept.least <= plan.usable else [plan]
    lines = [
        f"{plan.name}, stage {plan.stage}: {plan.gpus} x {plan.memory / GB:g} GB, batch "
        f"{plan.batch}, weights {plan.params}, computation bf16, frozen backbones {plan.frozen}",
        f"tokens of a sample: {', '.join(f'{k} {n}' for k, n in plan.tokens.items())}",
        "",
        "parameters",
        *table(*parts),
        "",
        "GB per rank, the same under every policy",
        *table(*((part, f"{size / GB:.4g}") for part, size in plan.resident.items())),
        "",
        f"activations and speed at {mfu:.0%} of {peak:g} TFLOP/s; {plan.usable / GB:.1f} GB "
        "usable; used: micro-batch x passes; * chosen",
        *headed(policy_row(plan, policy, rate) for policy in KEPT),
        "",
        f"ms of a step of {plan.batch} on several nodes, at {NVLINK / GB:g} GB/s within and "
        f"{NETWORK / GB:g} between them, what is sent hidden behind the arithmetic or the reverse",
        *headed(nodes_row(way, nodes, rate / plan.gpus) for nodes in even for way in ways),
        "",
        f"one card, all of the video expert (lora 0) or adapters of rank {RANK}: what is chosen",
        *headed(card_row(plan, memory, rank) for memory in CARDS for rank in (0, RANK)),
        "",
        f"stages of the paper, checkpointing {best}",
        *headed(stage_row(plan, stage, rate) for stage in HOURS),
        "",
        f"train.py ... --set batch={plan.batch} micro={plan.micro(best)} checkpointing={best} "
        f"params={plan.params}",
    ]
    return "\n".join(lines)


def add_options(parser: Parser) -> None:
    """Those that --plan has beside --preset and --stage."""
    add = parser.option
    add("--plan", False, "say memory, FLOPs and hours, and train nothing")
    add("--gpus", 8, "of a plan: ranks that share one copy of the weights")
    add("--memory", 80.0, "of a plan: GB of one card")
    add("--batch", 256, "of a plan: global batch")
    add("--mfu", 0.4, "of a plan: share of the peak, nothing computed again")
    add("--peak", 989.0, "of a plan: dense bf16 TFLOP/s of one card (H100, H200: 989)")
    add("--params", "fp32", "of a plan: dtype of weights, gradients and moments", choices=BYTES)
    places = ("cached", "live")
    add("--frozen", "cached", "of a plan: backbones in a cache, or on a card", choices=places)


def main(args: argparse.Namespace) -> None:
    stage = args.stage or "3"  # which needs most
    if stage not in HOURS:
        raise ValueError(f"--stage is {stage!r}; a plan is of one of {', '.join(HOURS)}")
    memory = args.memory * GB
    plan = Plan(args.preset, stage, args.gpus, memory, args.params, args.frozen, args.batch)
    print(report(plan, args.mfu, args.peak))
