"""What a training run needs, told before anyone rents a GPU: parameters, bytes per rank, FLOPs,
speed, hours.

    python train.py --full --plan --gpus 8 --memory 80          the paper's model on eight 80 GB cards
    python train.py --preset small --plan --gpus 1 --memory 24 --peak 165

Between steps a rank holds its share of P parameters, T of them trained (FSDP2, W ranks;
`scale.split_axis` says along which axis):

    weights      4 P / W     fp32; 2 P / W with --params bf16
    gradients    4 T / W     in the dtype of the weights
    optimizer    8 T / W     AdamW's two moments, in the dtype of the weights
    EMA          4 P / W     always fp32
    frozen       2 F         --frozen live: every rank has VLM, VAE and text encoder whole, in bf16; cached: nothing

Within a step three more things come and go. Layer by layer the backward pass frees activations and
fills in gradients, at a constant rate, so the worst moment is at its beginning or at its end:

    gathered     what lies outside the layers, whole; the layer at work and the one gathered ahead; the fp32 buffer in which the gradients
                 of the layer before are reduced (one GPU gathers nothing)
    activations  what the forward pass leaves behind for the backward pass. `none` keeps all of it; `full` keeps what goes into a layer and
                 computes the layer again; `selective` also keeps what matrix products and attentions give, and computes only norms,
                 modulation and GELU again, which costs next to no FLOPs (`scale.kept`)
    working      the layer whose backward pass runs: what was computed again, temporaries, its gradients before they are reduced

The first list is arithmetic. Activations, working memory and FLOPs are measured: the real training
step runs on fake tensors, which have shapes but no values, while every storage that is born or dies
is counted. Outside the layers nothing depends on the depth, all layers are alike, and so are all
samples: four steps, of 4 and 5 layers and 2 and 64 samples, give the figures of any depth and any
micro-batch.

What the plan does not know: memory that the CUDA context, NCCL and a fragmented allocator take
(RESERVE of the card is left to them); what compilation and the kernels save; an attention kernel
that wants its mask written out (torch's own, where the number of keys is no multiple of 8). --mfu
is a claim, not a measurement.

Shapes: B samples of a micro-batch, T h w latent grid, S chunk, A action dimensions, P state
dimensions, Lt text rows, Lu VLM tokens.
"""

import argparse
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)
from torch.utils.weak import WeakIdKeyDictionary

from attention import text_bias
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from backbones.umt5 import UMT5Config, UMT5Encoder
from backbones.wan import TextStates
from backbones.wan_vae import WanVAE, WanVAEConfig
from motus import PRESETS, Inputs, Motus, MotusConfig, preset
from scale import sharding
from weights.files import open_source

GB = 1e9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESERVE = 0.08  # share of a card's memory that no plan may touch
IN_FLIGHT = 2  # gathered layers that exist at once
POLICIES = tuple(sharding.CHECKPOINTING)
DEPTHS, BATCHES = (4, 5), (2, 64)  # what is measured; see Curve

# -- what is trained, on what ---------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage as the paper ran it (Tab. 1 and appendix)."""

    form: dict  # changes to the preset
    experts: tuple[str, ...]  # which are trained
    hours: float  # GPU-hours of the paper


ALL = ("video", "action", "und")
STAGES = {
    "1": Stage(dict(finetune=False, ratio=1, action_dim=14), ("video",), 8000),
    "2": Stage(dict(finetune=False, ratio=1, action_dim=14), ALL, 10000),
    "3": Stage(dict(finetune=True), ALL, 400),
}


@dataclass(frozen=True)
class Sample:
    """Sizes of one training sample that the network's configuration leaves open."""

    grid: tuple[int, int]  # h, w of the latents
    text: int = 128  # rows of text states; padding beyond the longest text of a batch is one row
    und: int = 200  # tokens of the VLM: 120 of the picture, the prompt around them, the instruction


SAMPLES = {"toy": Sample((6, 6), 16, 40), "small": Sample((16, 16)), "full": Sample((24, 20))}


def fake_inputs(
    config: MotusConfig, sample: Sample, batch: int, acting: bool
) -> tuple[Inputs, dict[str, Tensor]]:
    """A micro-batch and its noise, of the right shapes and dtypes; without actions and VLM if not
    `acting` (stage 1)."""
    latents = torch.empty(batch, config.video.latent, config.latent_frames, *sample.grid)
    context = torch.empty(batch, sample.text, config.video.text_dim, dtype=torch.bfloat16)
    inputs = Inputs(latents, context, torch.empty(batch, dtype=torch.int64))
    noise = dict(t_video=torch.empty(batch), video_noise=torch.empty_like(latents))
    if acting:
        actions = torch.empty(batch, config.chunk, config.action_dim)
        inputs = replace(
            inputs,
            actions=actions,
            action_mask=torch.empty_like(actions, dtype=torch.bool),
            und=torch.empty(batch, sample.und, config.vlm_dim, dtype=torch.bfloat16),
            und_mask=torch.empty(batch, sample.und, dtype=torch.bool),
            state=torch.empty(batch, config.state_dim) if config.finetune else None,
        )
        noise |= dict(t_action=torch.empty(batch), action_noise=torch.empty_like(actions))
    return inputs, noise


# -- what a step leaves in memory -----------------------------------------------------------------

aten = torch.ops.aten
ATTENTION_FLOPS = {  # on a CPU; torch has the formulas of the other operations
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}
FLOPS = flop_registry | {op: shape_wrapper(formula) for op, formula in ATTENTION_FLOPS.items()}


class Meter(TorchDispatchMode):
    """Counts bytes of the storages that are alive, the most there ever were, and FLOPs; of what is
    made while it is on."""

    def __init__(self, existing: Sequence[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in existing:
            self.sizes[tensor.untyped_storage()] = 0

    def _died(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, op: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "prim":  # questions about a tensor
            return out
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage()) not in self.sizes
            ):
                self.sizes[storage] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._died, storage.nbytes())
        self.peak = max(self.peak, self.now)
        if (formula := FLOPS.get(op.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Cost(NamedTuple):
    """Of a micro-batch on one device: bytes that the forward pass leaves behind, bytes at the worst
    moment of the step, FLOPs."""

    saved: float
    peak: float
    flops: float


@contextmanager
def fake_model(config: MotusConfig, params: str) -> Iterator[Motus]:
    """The network on fake tensors, which the body may compute with."""
    before = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(DTYPES[params])
            model = Motus(config)
        finally:
            torch.set_default_dtype(before)
        # The one place of the network that reads values: how many rows the text has. The
        # micro-batch has them all.
        model.video.embed_text = lambda context, lengths: TextStates(
            model.video.text_embedding(context),
            text_bias(lengths, context.shape[1], config.video.text_len)[:, None, None],
        )
        yield model


def drop_reduced(layers: Sequence[nn.Module]) -> None:
    """Lets the gradients of a layer go when its backward pass is over, as FSDP does once it has
    copied them out to reduce them."""
    for i, layer in enumerate(layers):

        def watch(
            layer: nn.Module,
            inputs: tuple,
            outputs: tuple,
            later: Sequence[nn.Module] = layers[i + 1 :],
        ) -> None:
            def over(gradient: Tensor) -> None:
                for each in later:
                    each.zero_grad(set_to_none=True)

            outputs[0].register_hook(over)

        layer.register_forward_hook(watch)


def measure(
    config: MotusConfig,
    stage: Stage,
    sample: Sample,
    batch: int,
    checkpointing: str,
    params: str = "fp32",
) -> Cost:
    """Runs one training step of `batch` samples on fake tensors, on one device. Weights and inputs
    are not counted; of gradients those that are not yet reduced."""
    with fake_model(config, params) as model:
        inputs, noise = fake_inputs(config, sample, batch, acting="action" in stage.experts)
        step = sharding.parallelize(
            model, stage.experts, checkpointing=checkpointing, precision="bf16"
        )
        drop_reduced(model.layers)
        existing = [
            x
            for x in (*model.parameters(), *vars(inputs).values(), *noise.values())
            if x is not None
        ]
        with Meter(existing) as meter:
            loss = step(inputs, noise).total()
            saved = meter.now
            loss.backward()
    return Cost(saved, meter.peak, meter.flops)


@dataclass(frozen=True)
class Curve:
    """The cost of any depth and micro-batch from four measured ones. Saved bytes and FLOPs are
    bilinear in both. The worst moment of a step can be another one at another size: its bytes are
    exact in the depth, and between 2 and 64 samples never too few."""

    corners: dict[tuple[int, int], Cost]  # by (layers, batch)

    def at(self, layers: float, batch: float) -> Cost:
        (l0, l1), (b0, b1) = DEPTHS, BATCHES
        x, y = (layers - l0) / (l1 - l0), (batch - b0) / (b1 - b0)
        shares = {
            (l0, b0): (1 - x) * (1 - y),
            (l0, b1): (1 - x) * y,
            (l1, b0): x * (1 - y),
            (l1, b1): x * y,
        }
        return Cost(
            *(
                sum(share * self.corners[corner][i] for corner, share in shares.items())
                for i in range(len(Cost._fields))
            )
        )


@cache
def curve(name: str, stage_name: str, checkpointing: str, params: str) -> Curve:
    """The curve of a preset's stage, measured once."""
    stage = STAGES[stage_name]
    config = preset(name, **stage.form)
    deep = {
        layers: replace(config, video=replace(config.video, layers=layers)) for layers in DEPTHS
    }
    return Curve(
        {
            (layers, batch): measure(
                deep[layers], stage, SAMPLES[name], batch, checkpointing, params
            )
            for layers in DEPTHS
            for batch in BATCHES
        }
    )


@cache
def sample_flops(name: str, stage_name: str, checkpointing: str) -> float:
    """FLOPs of one sample of a preset's stage, without the rest of the curve."""
    stage = STAGES[stage_name]
    config = preset(name, **stage.form)
    one, two = (
        measure(
            replace(config, video=replace(config.video, layers=layers)),
            stage,
            SAMPLES[name],
            1,
            checkpointing,
        ).flops
        for layers in (1, 2)
    )
    return one + (config.video.layers - 1) * (two - one)


@cache
def meta_model(name: str, stage_name: str) -> Motus:
    """The network of a preset's stage without values."""
    with torch.device("meta"):
        return Motus(preset(name, **STAGES[stage_name].form))


# -- the plan -------------------------------------------------------------------------------------


@cache
def frozen_parts(name: str) -> dict[str, int]:
    """Parameters of the backbones of a preset: of its own files, else of the published ones."""
    folder = PRESETS[name].backbones
    if folder and (folder / "vae.safetensors").is_file():
        sources = {
            part: open_source(folder / f"{part}.safetensors") for part in ("vlm", "vae", "text")
        }
        return {
            part: sum(math.prod(source.shape(key)) for key in source.names())
            for part, source in sources.items()
        }
    with torch.device("meta"):
        parts = {
            "vlm": Qwen3VL(Qwen3VLConfig()),
            "vae": WanVAE(WanVAEConfig()),
            "text": UMT5Encoder(UMT5Config()),
        }
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


@dataclass(frozen=True)
class Plan:
    """One stage of a preset on `gpus` cards of `memory` bytes. All sizes are bytes per rank."""

    name: str
    stage_name: str
    gpus: int
    memory: float
    params: str = (
        "fp32"  # dtype of weights, gradients and moments; the computation is bf16 either way
    )
    frozen: str = "cached"  # or "live": the backbones are on the card too
    batch: int = 256  # global

    def __post_init__(self):
        allowed = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
        if self.gpus not in allowed:
            raise ValueError(
                f"--gpus is {self.gpus}; a batch of {self.batch} divides among {', '.join(map(str, allowed))}: choose one of "
                "them, or another --batch"
            )
        if self.memory <= 0:
            raise ValueError(
                f"--memory is {self.memory / GB:g}; give the gigabytes of one card, such as 80"
            )

    @property
    def stage(self) -> Stage:
        return STAGES[self.stage_name]

    @property
    def model(self) -> Motus:
        return meta_model(self.name, self.stage_name)

    def curve(self, checkpointing: str) -> Curve:
        return curve(self.name, self.stage_name, checkpointing, self.params)

    # -- what stays

    def share(self, experts: Sequence[str]) -> int:
        """Parameters of `experts` that the fullest rank holds."""

        def held(p: Tensor) -> int:
            axis = sharding.split_axis(p, self.gpus).dim
            return p.numel() // p.shape[axis] * math.ceil(p.shape[axis] / self.gpus)

        return sum(held(p) for expert in experts for p in getattr(self.model, expert).parameters())

    @cached_property
    def resident(self) -> dict[str, float]:
        """What a rank holds between steps; gradients too, as long as a batch takes several passes."""
        width, every, trained = (
            DTYPES[self.params].itemsize,
            self.share(ALL),
            self.share(self.stage.experts),
        )
        frozen = sum(frozen_parts(self.name).values()) if self.frozen == "live" else 0
        return dict(
            weights=width * every,
            gradients=width * trained,
            optimizer=2 * width * trained,
            ema=4 * every,
            frozen=2 * frozen,
        )

    # -- what comes and goes

    @cached_property
    def gathered(self) -> dict[str, float]:
        """Whole parameters and the buffer that reduces a layer's gradients. Experts that a stage
        does not train are not gathered."""
        if self.gpus == 1:
            return dict(root=0, layers=0, reducing=0)
        size = lambda parts: sum(p.numel() for part in parts for p in part.parameters())
        layer = size(getattr(self.model.layers[0], expert) for expert in self.stage.experts)
        whole = size(getattr(self.model, expert) for expert in self.stage.experts)
        width = DTYPES[self.params].itemsize
        return dict(
            root=width * (whole - layer * len(self.model.layers)),
            layers=IN_FLIGHT * width * layer,
            reducing=4 * layer,
        )

    def peak(self, checkpointing: str, micro: int) -> float:
        """Bytes at the worst moment of a training step with `micro` samples per rank and pass."""
        depth, several = len(self.model.layers), micro * self.gpus < self.batch
        fixed = (
            sum(self.resident.values())
            - self.resident["gradients"]
            + self.gathered["root"]
            + self.gathered["layers"]
        )

        def during(layer: int) -> float:
            reduced = 1.0 if several else (depth - layer) / depth
            reducing = self.gathered["reducing"] if layer < depth else 0
            return (
                self.curve(checkpointing).at(layer, micro).peak
                + reducing
                + reduced * self.resident["gradients"]
            )

        return fixed + max(during(layer) for layer in (depth, depth - 1, 1))

    @property
    def usable(self) -> float:
        return (1 - RESERVE) * self.memory

    def largest(self, checkpointing: str) -> int:
        """The largest micro-batch that fits, 0 if none does; more than a rank's share of the batch
        is never needed."""
        sizes = range(1, self.batch // self.gpus + 1)
        return max(
            (micro for micro in sizes if self.peak(checkpointing, micro) <= self.usable), default=0
        )

    def micro(self, checkpointing: str) -> int:
        """The largest micro-batch that fits and divides the rank's share of the batch."""
        share = self.batch // self.gpus
        return max(
            (m for m in range(1, self.largest(checkpointing) + 1) if share % m == 0), default=0
        )

    # -- speed

    def flops(self, checkpointing: str) -> float:
        """Per sample, what is computed again included."""
        return self.curve(checkpointing).at(len(self.model.layers), BATCHES[0]).flops / BATCHES[0]

    @property
    def best(self) -> str:
        """The policy that computes least among those that fit; of equals the one with the larger
        micro-batch, then the simpler one."""
        fitting = [name for name in POLICIES if self.micro(name)]
        if not fitting:
            raise ValueError(self.refusal())
        least = min(self.flops(name) for name in fitting)
        return min(
            fitting, key=lambda name: (round(self.flops(name) / least, 2), -self.micro(name))
        )

    def refusal(self) -> str:
        """One line: what is missing and what would fit."""
        need = lambda plan: min(plan.peak(name, 1) for name in POLICIES)
        more = [
            replace(self, gpus=n)
            for n in range(self.gpus + 1, self.batch + 1)
            if self.batch % n == 0
        ]
        ways = [f"--gpus {plan.gpus}" for plan in more if need(plan) <= plan.usable][:1]
        ways += [f"--memory {math.ceil(need(self) / (1 - RESERVE) / GB)}"]
        ways += (
            ["--params bf16"]
            if self.params == "fp32" and need(replace(self, params="bf16")) <= self.usable
            else []
        )
        return (
            f"{self.name}, stage {self.stage_name}, needs {need(self) / GB:.3g} GB per rank on {self.gpus} GPUs for one sample; "
            f"{self.memory / GB:g} GB less {RESERVE:.0%} are {self.usable / GB:.3g}. It would fit with "
            + " or ".join(ways)
        )


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines with columns aligned, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        indent
        + "  ".join(
            cell.ljust(n) if i == 0 else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def report(plan: Plan, mfu: float, peak: float) -> str:
    """What `--plan` prints. `peak` in TFLOP/s of one card; `mfu` the share of it that a step
    without recomputation reaches."""
    best, sample, config = plan.best, SAMPLES[plan.name], plan.model.config
    gb = lambda size: f"{size / GB:.2f}" if size >= 1e7 else f"{size / GB:.2g}"
    tokens = dict(
        video=config.latent_frames * math.prod(sample.grid) // math.prod(config.video.patch),
        action=config.chunk + (1 + config.registers) * config.finetune,
        und=sample.und,
    )
    lines = [
        f"{plan.name}, stage {plan.stage_name}: {plan.gpus} x {plan.memory / GB:g} GB, batch {plan.batch}, weights {plan.params}, "
        f"computation bf16, frozen backbones {plan.frozen}",
        "tokens of a sample: "
        + ", ".join(f"{expert} {tokens[expert]}" for expert in plan.stage.experts)
        + f"; text {sample.text}",
    ]
    counts = {
        expert: sum(p.numel() for p in getattr(plan.model, expert).parameters()) for expert in ALL
    }
    rows = [
        (part, f"{n:,}", "trained" if part in plan.stage.experts else "not used")
        for part, n in counts.items()
    ]
    rows += [(part, f"{n:,}", "frozen") for part, n in frozen_parts(plan.name).items()]
    lines += ["", "parameters", *table(rows)]
    rows = [(part, gb(size)) for part, size in {**plan.resident, **plan.gathered}.items()]
    lines += ["", "GB per rank, the same under every policy", *table(rows)]

    rows = [
        (
            "checkpointing",
            "saved MB/sample",
            "TFLOP/sample",
            "largest micro-batch",
            "used",
            "saved GB",
            "peak GB",
            "samples/s",
        )
    ]
    for name in POLICIES:
        depth, micro, largest = len(plan.model.layers), plan.micro(name), plan.largest(name)
        one = plan.curve(name).at(depth, 3).saved - plan.curve(name).at(depth, 2).saved
        row = (
            name + " *" * (name == best),
            f"{one / 1e6:.4g}",
            f"{plan.flops(name) / 1e12:.4g}",
            f"{largest}" if largest else "none fits",
        )
        used = (
            (
                f"{micro} x {plan.batch // plan.gpus // micro}",
                gb(plan.curve(name).at(depth, micro).saved),
                gb(plan.peak(name, micro)),
                f"{plan.gpus * mfu * peak * 1e12 / plan.flops(name):.1f}",
            )
            if micro
            else ("", "", "", "")
        )
        rows.append(row + used)
    lines += [
        "",
        f"activations and speed at {mfu:.0%} of {peak:g} TFLOP/s; {plan.usable / GB:.1f} GB usable; used: micro-batch x passes; "
        "* chosen",
        *table(rows),
    ]

    rows = [
        (
            "stage",
            "trained",
            "TFLOP/sample",
            "samples/s",
            "paper's GPU-hours",
            f"steps of {plan.batch} they buy",
            "days here",
        )
    ]
    for name, stage in STAGES.items():
        other = meta_model(plan.name, name)
        flops = plan.flops(best) if name == plan.stage_name else sample_flops(plan.name, name, best)
        rate = mfu * peak * 1e12 / flops
        trained = sum(
            p.numel() for expert in stage.experts for p in getattr(other, expert).parameters()
        )
        rows.append(
            (
                name,
                f"{trained / 1e9:.3g}B",
                f"{flops / 1e12:.4g}",
                f"{plan.gpus * rate:.1f}",
                f"{stage.hours:,.0f}",
                f"{stage.hours * 3600 * rate / plan.batch:,.0f}",
                f"{stage.hours / plan.gpus / 24:.1f}",
            )
        )
    lines += ["", f"stages of the paper, checkpointing {best}", *table(rows)]
    lines += [
        "",
        f"train.py ... --set batch={plan.batch} micro={plan.micro(best)} checkpointing={best} params={plan.params}",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="train.py --plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", action="store_true", help="print this and train nothing")
    parser.add_argument("--preset", default="full", help="row of the table in motus.py")
    parser.add_argument(
        "--full", dest="preset", action="store_const", const="full", help="short for --preset full"
    )
    parser.add_argument(
        "--stage",
        default="3",
        choices=STAGES,
        help="whose memory is planned (default 3, which needs most)",
    )
    parser.add_argument(
        "--gpus", type=int, default=8, help="ranks that share one copy of the weights"
    )
    parser.add_argument("--memory", type=float, default=80, help="GB of one card")
    parser.add_argument("--batch", type=int, default=256, help="global batch")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the peak that a step without recomputation reaches",
    )
    parser.add_argument(
        "--peak",
        type=float,
        default=989,
        help="dense bf16 TFLOP/s of one card (H100 and H200 SXM: 989)",
    )
    parser.add_argument(
        "--params", default="fp32", choices=DTYPES, help="dtype of weights, gradients and moments"
    )
    parser.add_argument(
        "--frozen",
        default="cached",
        choices=("cached", "live"),
        help="backbones: outputs from a cache, or on every card",
    )
    args = parser.parse_args(argv)
    preset(args.preset)
    if not 0 < args.mfu <= 1 or args.peak <= 0:
        raise ValueError(
            f"--mfu is {args.mfu:g} and --peak {args.peak:g}; give a share in (0, 1] and TFLOP/s above 0"
        )
    print(
        report(
            Plan(
                args.preset,
                args.stage,
                args.gpus,
                args.memory * GB,
                args.params,
                args.frozen,
                args.batch,
            ),
            args.mfu,
            args.peak,
        )
    )
