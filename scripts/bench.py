"""Speed, measured and counted: every figure of docs/speed.md comes from here.

    python bench.py                            ratios: sampler and training step against the plain order of work, in turns
    python bench.py --count                    a chunk at full size: FLOPs, launches, bytes, calls; predicted milliseconds
    python bench.py --fast runs/stage3         closed loop: action-first sampling against joint steps, steps and where they lie
    python bench.py --int8 runs/stage3         what int8 weights of the video expert change, per mode
    python bench.py data [--data DIR]          windows read from a LeRobot dataset, against the lerobot package's own reader
    python bench.py --gpu                      all of it on the first GPU: milliseconds per chunk, and each kernel beside its rivals

`--out FILE` writes the table down with command, machine and date.

    official   a literal transcription of the official order of work (models/motus.py, inference_step): at every Euler step the VLM again,
               keys and values of all padded text rows again in every layer, a row of modulation per token, the last layer to its end;
               and the video decoded at the end
    ours       the same weights and the same result

Ratios come from one run: both sides in turns, so that a machine that slows down slows both, and the
median of the pairs. On a CPU seconds are those of the process, which other programs on the machine
do not lengthen; with one thread they are wall-clock on a quiet machine.

Shapes: B batch, Lv La Lu tokens, D width, N heads, K head size, S actions of a chunk, A action
dimensions.
"""

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import data
import flow
import kernels
import train
from attention import RMSNorm, joint_attention, quantise, rotate_interleaved
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from backbones.wan import rope_3d
from backbones.wan_vae import WanVAE, WanVAEConfig
from motus import Inputs, Motus, MotusConfig, preset
from sample import Placement, Policy, held_out_windows
from scale.sharding import parallelize
from scripts import evaluate
from worlds import tabletop

# -- measuring ------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """Chooses the attention implementation for a while."""
    before = os.environ.get("MOTUS_ATTENTION")
    os.environ["MOTUS_ATTENTION"] = name
    try:
        yield
    finally:
        os.environ.pop("MOTUS_ATTENTION") if before is None else os.environ.update(
            MOTUS_ATTENTION=before
        )


def seconds(work: Callable[[], object]) -> float:
    """Of the process on a CPU, of the wall on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    begun = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begun


def in_turns(
    ours: Callable[[], object], other: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of each, and the median of other / ours pair by pair, after one warm-up of
    both."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    return (
        *(statistics.median(column) for column in zip(*pairs)),
        statistics.median(b / a for a, b in pairs),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; floats with three digits."""
    show = lambda x: (
        f"{x:.3g}"
        if isinstance(x, float) and x < 1000
        else f"{x:,.0f}"
        if isinstance(x, float)
        else str(x)
    )
    return "\n".join(
        "| " + " | ".join(map(show, row)) + " |" for row in (head, ["---"] * len(head), *rows)
    )


# -- closed loop ----------------------------------------------------------------------------------

PLACEMENTS = [
    *(Placement(10, joint) for joint in (None, 5, 2, 1, 0)),
    *(Placement(steps) for steps in (8, 6, 4, 3, 2, 1)),
    *(Placement(4, joint, shift) for joint in (None, 1) for shift in (0.5, 2.0, 4.0)),
    *(Placement(4, joint) for joint in (2, 1, 0)),
    *(Placement(2, joint) for joint in (1, 0)),
]


def closed_loop(
    ckpt: str,
    episodes: int,
    seeds: Sequence[int],
    placements: Sequence[Placement] = PLACEMENTS,
    execute: int = 4,
    max_steps: int = 100,
) -> str:
    """Success on unseen layouts with Wilson's interval at 95 %, and milliseconds per look of one
    world, of mode joint under each placement of its steps, in the same worlds."""
    policy = Policy.load(ckpt)
    rows = []
    for placement in placements:
        policy.placement, won, looks, begun = placement, 0, 0, time.process_time()
        for seed in seeds:
            policy.generator.manual_seed(seed)
            world = tabletop.Tabletop(episodes, policy.statistics.embodiment, False, "eval")
            played = evaluate.rollout(
                policy, world, evaluate.world_seeds(seed, episodes), max_steps, execute
            )
            won, looks = (
                won + int(played.success.sum()),
                looks + int((-(-played.steps // execute)).sum()),
            )
        low, high = evaluate.wilson(won, total := episodes * len(seeds))
        rate = f"{100 * won / total:.1f} [{100 * low:.1f}, {100 * high:.1f}] {won}/{total}"
        rows.append(
            [
                placement.steps,
                "all" if placement.joint is None else placement.joint,
                placement.shift,
                rate,
                1000 * (time.process_time() - begun) / looks,
            ]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
    return table(["steps", "joint steps", "shift", "success %", "ms per look"], rows)


# -- the official order of work -------------------------------------------------------------------


def official_rotate(x: Tensor, grid: Sequence[int]) -> Tensor:
    """x (B, L, N, K) rotated as complex numbers in float64, by a table made on the spot."""
    half = x.shape[3] // 2
    sizes = (half - 2 * (half // 3), half // 3, half // 3)
    ladders = [
        torch.polar(
            torch.ones(()).double(),
            torch.outer(torch.arange(n).double(), 10000.0 ** (-torch.arange(k).double() / k)),
        )
        for n, k in zip(grid, sizes)
    ]
    shapes = [[*(n if j == i else 1 for j, n in enumerate(grid)), -1] for i in range(3)]
    phase = torch.cat(
        [ladder.view(shape).expand(*grid, -1) for ladder, shape in zip(ladders, shapes)], dim=-1
    ).reshape(-1, 1, half)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (half, 2)))
    return torch.view_as_real(pairs * phase.to(x.device)).flatten(-2).float()


def official_layer(
    layer: nn.Module,
    xv: Tensor,
    xa: Tensor,
    xu: Tensor,
    ev: Tensor,
    ea: Tensor,
    grid: Sequence[int],
    context: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer; ev (B, Lv, 6, Dv) and ea (B, La, 6, Da) are modulation per token, context (B, 512,
    Dv) is the padded text."""
    v, a, u, lengths = layer.video, layer.action, layer.und, [x.shape[1] for x in (xv, xa, xu)]
    heads = lambda x: rearrange(x, "b l (n k) -> b l n k", n=v.self_attn.heads)
    mv = [x.squeeze(2) for x in (v.modulation.float().unsqueeze(0) + ev).chunk(6, dim=2)]
    ma = [x.squeeze(2) for x in (a.modulation.float().unsqueeze(0) + ea).chunk(6, dim=2)]

    h = v.norm1(xv).float() * (1 + mv[1]) + mv[0]
    own = v.self_attn
    qkv = [
        [
            official_rotate(heads(own.norm_q(own.q(h))), grid),
            official_rotate(heads(own.norm_k(own.k(h))), grid),
            heads(own.v(h)),
        ]
    ]
    for block, h in ((a, a.norm1(xa).float() * (1 + ma[1]) + ma[0]), (u, u.norm1(xu))):
        q, k, value = torch.einsum("bld,tndk->tblnk", h.to(block.qkv.dtype), block.qkv)
        qkv.append([heads(block.norm_q(q.flatten(2))), heads(block.norm_k(k.flatten(2))), value])
    dtype = qkv[0][2].dtype
    q, k, value = (
        torch.cat([x.to(dtype) for x in parts], dim=1).transpose(1, 2) for parts in zip(*qkv)
    )
    yv, ya, yu = rearrange(
        nn.functional.scaled_dot_product_attention(q, k, value), "b n l k -> b l (n k)"
    ).split(lengths, dim=1)

    xv = xv.float() + own.o(yv).float() * mv[2]
    cross = v.cross_attn
    q, k, value = (
        heads(cross.norm_q(cross.q(v.norm3(xv)))),
        heads(cross.norm_k(cross.k(context))),
        heads(cross.v(context)),
    )
    y = nn.functional.scaled_dot_product_attention(
        *(x.to(value.dtype).transpose(1, 2) for x in (q, k, value))
    )
    xv = xv + cross.o(rearrange(y, "b n l k -> b l (n k)")).float()
    xv = xv + v.ffn(v.norm2(xv).float() * (1 + mv[4]) + mv[3]).float() * mv[5]
    xa = xa.float() + a.o(ya).float() * ma[2]
    xa = xa + a.ffn(a.norm2(xa).float() * (1 + ma[4]) + ma[3]).float() * ma[5]
    xu = xu + u.o(yu)
    return xv, xa, xu + u.ffn(u.norm2(xu))


def official_velocity(
    model: Motus,
    video: Tensor,
    action: Tensor,
    t: Tensor,
    und: Tensor,
    context: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One evaluation; t (B,) is spread over the tokens of both experts before it is embedded. und
    (B, Lu, Dv), embedded context."""
    xv, grid = model.video.patchify(video)
    width = model.config.action_width
    tokens = torch.cat(
        [
            model.action.input_encoder.state_encoder(state[:, None]),
            model.action.input_encoder.action_encoder(action),
            model.action.registers.expand(len(action), -1, -1),
        ],
        dim=1,
    )
    ladder = 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    angle = torch.outer(torch.arange(tokens.shape[1]).double(), ladder)
    positions = torch.cat([angle.sin(), angle.cos()], dim=1)
    xa, xu = tokens + positions.to(tokens), model.und.vlm_adapter(und)
    ev, e0v = model.video.embed_time(t[:, None].expand(-1, xv.shape[1]))
    ea, e0a = (
        x.unflatten(0, (len(t), -1)).squeeze(2)
        for x in model.action.embed_time(t[:, None].expand(-1, xa.shape[1]).flatten())
    )
    for layer in model.layers:
        xv, xa, xu = official_layer(layer, xv, xa, xu, e0v, e0a, grid, context)
    head, decoder = model.video.head, model.action.decoder
    shift, scale = (
        x.squeeze(2)
        for x in (head.modulation.float().unsqueeze(0) + ev.unsqueeze(2)).chunk(2, dim=2)
    )
    v_video = head.head(head.norm(xv).float() * (1 + scale) + shift)
    shift, scale = (
        x.squeeze(2)
        for x in (decoder.modulation.float().unsqueeze(0) + ea.unsqueeze(2)).chunk(2, dim=2)
    )
    v_action = decoder.action_head(decoder.norm(xa).float() * (1 + scale) + shift)
    return model.video.unpatchify(v_video, grid), v_action[:, 1 : -model.config.registers]


@torch.no_grad()
def official_sample(
    model: Motus,
    look: Callable[[], Tensor],
    inputs: Inputs,
    video: Tensor,
    action: Tensor,
    steps: int,
    decode: Callable[[Tensor], object],
) -> Tensor:
    """A joint sample from the given noise. `look` runs the VLM, `decode` the video decoder."""
    observation = inputs.latents[:, :, :1]
    video = torch.cat([observation, video[:, :, 1:]], dim=2)
    rows = model.config.video.text_len - inputs.context.shape[1]
    look()  # its result is not used
    context = model.video.text_embedding(nn.functional.pad(inputs.context, (0, 0, 0, rows)))
    times = torch.linspace(1, 0, steps + 1).tolist()
    for t, t_next in zip(times, times[1:]):
        now = torch.full((len(video),), t, device=video.device)
        v_video, v_action = official_velocity(
            model, video, action, now, look(), context, inputs.state
        )
        video = torch.cat([observation, (video + (t_next - t) * v_video)[:, :, 1:]], dim=2)
        action = action + (t_next - t) * v_action
    decode(video)
    return action


# -- ratios on this machine -----------------------------------------------------------------------


def agree(ours: Tensor, other: Tensor) -> float:
    """The largest difference; ValueError beyond 1e-4, for then the two do not do the same work."""
    if (difference := (ours - other).abs().max().item()) > 1e-4:
        raise ValueError(
            f"the two ways differ by {difference:.2g}; they must agree within 1e-4 before they are timed"
        )
    return difference


def drawn(
    config: MotusConfig,
    batch: int,
    side: tuple[int, int],
    text: int,
    und: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Inputs:
    """Random inputs of a shape: latents of `side`, a text of that many rows, that many
    understanding tokens."""
    normal = lambda *shape: torch.randn(shape, dtype=dtype, device=device)
    return Inputs(
        normal(batch, config.video.latent, 1, *side).float(),
        normal(batch, text, config.video.text_dim),
        torch.full((batch,), text, device=device),
        normal(batch, und, config.vlm_dim),
        state=normal(batch, config.state_dim),
    )


def noise_for(model: Motus, inputs: Inputs) -> tuple[Tensor, Tensor]:
    config, latents = model.config, inputs.latents
    return (
        torch.randn(
            len(inputs),
            config.video.latent,
            config.latent_frames,
            *latents.shape[3:],
            device=latents.device,
        ),
        torch.randn(len(inputs), config.chunk, config.action_dim, device=latents.device),
    )


def sampler_ratio(
    name: str,
    model: Motus,
    observe: Callable[[], Inputs],
    vlm: Callable[[], Tensor],
    decode: Callable[[Tensor], object],
    steps: int,
    rounds: int,
    compiled: bool = False,
) -> list[list]:
    """Ours against official, and action-first against our joint sample, an observation's `observe`
    counted in; with `compiled`, ours as static graphs too."""
    for part in (
        model.video.head.head,
        model.action.decoder.action_head[0],
    ):  # fresh heads are zero
        nn.init.normal_(part.weight, std=0.1)
    video, action = noise_for(model, observe())

    def ours(joint: int | None = None) -> Tensor:
        return model.sample(
            observe(), "joint", steps, video_noise=video, action_noise=action, joint=joint
        ).actions

    def official() -> Tensor:
        return official_sample(model, vlm, observe(), video, action, steps, decode)

    difference = agree(ours(), official())
    rows = [
        [
            f"joint sample, {name}",
            "official order of work",
            *in_turns(ours, official, rounds),
            f"{difference:.1g}",
        ],
        [
            f"action-first (1 joint step), {name}",
            "our joint sample",
            *in_turns(lambda: ours(1), ours, rounds),
            "approximate",
        ],
    ]
    if compiled:
        model.compile_sampler()
        difference = agree(ours(), official())
        rows.append(
            [
                f"joint sample, {name}, compiled",
                "official order of work",
                *in_turns(ours, official, rounds),
                f"{difference:.1g}",
            ]
        )
    return rows


def sampler_ratios(steps: int, rounds: int, compiled: bool) -> list[list]:
    """At toy shapes with the toy's backbones, and at a stack of layers of preset `small`, which has
    none."""
    torch.manual_seed(0)
    config, small = preset("toy"), preset("small")
    backbones, episodes = data.backbones_of("toy", config), data.toy_episodes((6,), 1, seed=0)
    one = data.collect(episodes, [(0, 0)], config, data.statistics(episodes))
    stack = Motus(replace(small, video=replace(small.video, layers=3))).init_weights().eval()
    fixed = drawn(small, 1, (16, 16), TEXT, 130)
    return [
        *sampler_ratio(
            "toy",
            Motus(config).init_weights().eval(),
            lambda: backbones.inputs(one.frames[:, :1], one.instruction, state=one.state),
            lambda: backbones.understand(one.frames[:, 0], one.instruction)[0],
            backbones.decode_video,
            steps,
            rounds,
            compiled,
        ),
        *sampler_ratio(
            "3 layers of `small`",
            stack,
            lambda: fixed,
            lambda: fixed.und,
            lambda video: None,
            steps,
            rounds,
        ),
    ]


def training_ratios(batch: int, rounds: int, compiled: bool) -> list[list]:
    """A step of stage 3: forward, backward, clipping, AdamW (as in the first version) and EMA, with
    fused attention, and with `compiled` also with each layer by torch.compile, against attention
    written out."""
    settings, config = (
        train.settings_for("toy", "3", [f"batch={batch}", "optimizer=adamw"]),
        preset("toy"),
    )
    backbones, episodes = data.backbones_of("toy", config), data.toy_episodes((6,), 4, seed=0)
    chosen = data.collect(
        episodes, data.windows_of(episodes, config)[:batch], config, data.statistics(episodes)
    )
    inputs = backbones.inputs(
        chosen.frames,
        chosen.instruction,
        state=chosen.state,
        actions=chosen.actions,
        action_mask=chosen.action_mask,
    )

    def trainer(name: str, compiled: bool = False) -> Callable[[], float]:
        torch.manual_seed(0)
        model = Motus(config).init_weights().train()
        compute = parallelize(model, train.EXPERTS, compiled=compiled)
        optimizers, ema = (
            train.make_optimizers(model, settings, train.EXPERTS),
            train.EMA(model, settings.ema),
        )

        def step() -> float:
            with attention(name):
                loss = compute(inputs, draw_noise(inputs, torch.Generator().manual_seed(0))).total()
                model.zero_grad(set_to_none=True)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            for optimizer in optimizers:
                optimizer.step()
            ema.update(model, 0)
            return loss.item()

        return step

    rows = []
    for how in (False, True)[: 1 + compiled]:
        ours, plain = trainer("sdpa", how), trainer("plain")
        difference = agree(
            torch.tensor([ours() for _ in range(3)]), torch.tensor([plain() for _ in range(3)])
        )
        rows.append(
            [
                f"training step, toy, batch {batch}" + ", compiled" * how,
                "attention written out",
                *in_turns(ours, plain, rounds),
                f"{difference:.1g} (loss)",
            ]
        )
    return rows


# -- counting on the meta device ------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Every kernel that runs inside: its FLOPs, and the bytes it must read and write. Views cost
    nothing."""

    def __init__(self, kernels: Counter | None = None):
        super().__init__()
        self.kernels: Counter[tuple[int, int]] = attention or Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info is None or r.alias_info.is_write for r in func._schema.returns):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.kernels[
                flops,
                sum(
                    x.numel() * x.itemsize
                    for x in tree_leaves((args, kwargs, out))
                    if isinstance(x, Tensor)
                ),
            ] += 1
        return out

    def and_then(self, times: int, more: "Work", than: "Work") -> "Work":
        """This, and `times` what `more` does more `than` another."""
        step = more.kernels.copy()
        step.subtract(than.kernels)
        return Work(
            Counter({k: self.kernels[k] + times * step[k] for k in {**self.kernels, **step}})
        )

    @property
    def launches(self) -> int:
        return self.kernels.total()

    @property
    def flops(self) -> int:
        return sum(flops * n for (flops, _), n in self.kernels.items())

    @property
    def bytes(self) -> int:
        return sum(size * n for (_, size), n in self.kernels.items())


TEXT, UND, SIDE = (
    20,
    200,
    (24, 20),
)  # rows of a usual instruction, understanding tokens, latent grid of 384 x 320 pixels


# There is no autocast on the meta device, so nothing to switch off.
no_autocast = mock.patch.object(
    torch, "autocast", lambda *args, **options: contextlib.nullcontext()
)


@torch.no_grad()
def vlm_work(dtype: torch.dtype = torch.bfloat16) -> Work:
    """One look of Qwen3-VL-2B at a picture of 480 patches, by its parts: which token goes where
    depends on data and has no FLOPs."""
    with torch.device("meta"):
        vlm = Qwen3VL(Qwen3VLConfig()).to(dtype)
        with Work() as work:
            vlm.visual.encode(
                torch.empty(1, SIDE[0] * SIDE[1], vlm.visual.patch_embed["proj"].weight[0].numel()),
                *SIDE,
            )
            x, half = (
                torch.empty(1, UND, vlm.config.width, dtype=dtype),
                torch.empty(1, UND, vlm.config.head_dim // 2, dtype=dtype),
            )
            for layer in vlm.language_model.layers:
                x = layer(x, half, half, torch.empty(1, 1, UND, UND))
    return work


@torch.no_grad()
def vae_work() -> tuple[Work, Work]:
    """Of the video VAE in fp32: the observation encoded, and the whole clip decoded, as only the
    official code does."""
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig())
        with Work() as encode:
            vae.encode(torch.empty(1, 3, 1, 16 * SIDE[0], 16 * SIDE[1]))
        with Work() as decode:
            vae.decode(torch.empty(1, vae.config.z_dim, preset("full").latent_frames, *SIDE))
    return encode, decode


@no_autocast
@torch.no_grad()
def chunk_work(
    config: MotusConfig, steps: int = 10, dtype: torch.dtype = torch.bfloat16
) -> dict[str, tuple[Work, int]]:
    """Per way of sampling a joint chunk at batch 1: the work of the trunk, and how often the VLM
    looks. A step runs the same kernels wherever it comes, so one and two steps tell what `steps` of
    them cost."""
    with torch.device("meta"):
        model = Motus(config).to(dtype).eval()
    inputs, looks = drawn(config, 1, SIDE, TEXT, UND, dtype, "meta"), []
    video, action = noise_for(model, inputs)

    def ours(steps: int, joint: int | None = None) -> Work:
        with Work() as work:
            model.sample(
                inputs, "joint", steps, video_noise=video, action_noise=action, joint=joint
            )
        return work

    def official(steps: int) -> Work:
        looks.clear()
        with Work() as work:
            official_sample(
                model,
                lambda: looks.append(1) or inputs.und,
                inputs,
                video,
                action,
                steps,
                lambda video: None,
            )
        return work

    one, two, first = ours(1), ours(2), ours(2, joint=1)
    found = {
        "official order of work": (
            official(1).and_then(steps - 1, official(2), official(1)),
            len(looks) + steps - 1,
        ),
        "ours, joint": (one.and_then(steps - 1, two, one), 1),
    }
    for joint in (2, 1):
        found[f"ours, action-first, {joint} of {steps} joint"] = (
            one.and_then(joint - 1, two, one).and_then(steps - joint, first, one),
            1,
        )
    return found


# -- milliseconds ---------------------------------------------------------------------------------

# Dense bf16 FLOP/s, bytes/s, and the share of the former that matrix products of 360 rows reach:
# vendors' figures and a guess.
CARDS = {
    "A100": (312e12, 2.04e12, 0.60),
    "RTX 4090": (165e12, 1.01e12, 0.80),
    "H100": (989e12, 3.35e12, 0.55),
    "H200": (989e12, 4.8e12, 0.55),
    "B200": (2250e12, 8.0e12, 0.45),
}
BANDWIDTH, LAUNCH, SMALLEST = (
    0.85,
    7e-6,
    2.5e-6,
)  # share reached; seconds of the CPU per launch; of the GPU for an empty kernel


def predicted(work: Work, card: str) -> tuple[float, float, float]:
    """Seconds of `work` on a card: launched one by one, as one CUDA graph, and of its matrix
    products alone, below which fusion of all the rest cannot go."""
    peak, bandwidth, share = CARDS[card]

    def roof(flops: int, size: int) -> float:
        return max(flops / (peak * share), size / (bandwidth * BANDWIDTH))

    graph = sum(n * max(SMALLEST, roof(*kernel)) for kernel, n in work.kernels.items())
    return (
        max(graph, work.launches * LAUNCH),
        graph,
        sum(n * roof(*kernel) for kernel, n in work.kernels.items() if kernel[0]),
    )


def memory(int8: bool) -> float:
    """Bytes of the trunk's bf16 weights, and of the VLM's."""
    with torch.device("meta"):
        model, vlm = (
            Motus(preset("full")).to(torch.bfloat16),
            Qwen3VL(Qwen3VLConfig()).to(torch.bfloat16),
        )
        if int8:
            quantise(model.video.blocks)
    return sum(x.numel() * x.itemsize for part in (model, vlm) for x in part.state_dict().values())


def count(steps: int) -> str:
    """The tables of a chunk at full size."""
    vlm, (encode, decode), rows = vlm_work(), vae_work(), []
    work = chunk_work(preset("full"), steps)
    for name, (trunk, looks) in work.items():
        parts = [trunk] + looks * [vlm] + [encode] + [decode] * name.startswith("official")
        rows.append(
            [
                name,
                *(
                    sum(part.flops for part in group) / 1e12
                    for group in ([trunk], looks * [vlm], parts[1 + looks :], parts)
                ),
                f"{looks}, 0, {len(parts) - looks - 2}",
                f"{sum(part.launches for part in parts):,}",
                sum(part.bytes for part in parts) / 1e9,
            ]
        )
    sizes = [
        ["bf16", memory(False) / 1e9],
        ["int8 linear maps in the video expert", memory(True) / 1e9],
    ]
    times = [
        [
            card,
            name,
            *(1000 * (a + looks * b) for a, b in zip(predicted(trunk, card), predicted(vlm, card))),
        ]
        for card in CARDS
        for name, (trunk, looks) in work.items()
    ]
    return "\n\n".join(
        [
            table(
                [
                    f"a chunk of {steps} steps, full size, batch 1",
                    "TFLOP: trunk",
                    "VLM",
                    "VAE",
                    "all",
                    "looks of the VLM, T5, decoder",
                    "launches",
                    "GB moved",
                ],
                rows,
            ),
            table(["weights of trunk and VLM", "GB"], sizes),
            table(
                ["card", "way", "predicted ms, eager", "one CUDA graph", "matrix products alone"],
                times,
            ),
        ]
    )


# -- int8 -----------------------------------------------------------------------------------------


@torch.no_grad()
def int8_drift(ckpt: str, episodes: int, seed: int = 0) -> str:
    """Per mode, the error that int8 weights of the video expert cause, relative to the size of what
    they change: of the velocities of what the mode denoises, on ten points of the paths from noise
    to held-out data, and of the sample that ten steps end with."""
    policy, small = Policy.load(ckpt), Policy.load(ckpt, int8=True)
    batch, rows = held_out_windows(policy, episodes, seed), []
    inputs = policy.inputs(batch.frames, batch.instruction, batch.state, batch.actions)
    relative = lambda a, b: 100 * ((a - b).norm() / b.norm()).item()
    models, generator = (small.model, policy.model), torch.Generator().manual_seed(seed)
    noise = [gaussian(x, generator) for x in (inputs.latents, inputs.actions)]
    conditions = [model.conditions(inputs, cache=True) for model in models]
    for mode, row in flow.MODES.items():
        found = []
        for t in flow.sampling_times(10)[:-1].expand(len(inputs), -1).T:
            times = [flow.pinned_times(what, t) for what in row]
            video, action = (
                flow.mix(data, *rest)
                for data, *rest in zip((inputs.latents, inputs.actions), noise, times)
            )
            video = flow.keep_observation(video, inputs.latents[:, :, :1])
            found.append(
                [
                    model.velocity(video, action, *times, shared)
                    for model, shared in zip(models, conditions)
                ]
            )
        ends = [
            model.sample(inputs, mode, 10, video_noise=noise[0], action_noise=noise[1])
            for model in models
        ]
        for i, name in enumerate(("video", "action")):
            if row[i] == flow.DENOISE:
                ours, theirs = (torch.stack([pair[side][i] for pair in found]) for side in (0, 1))
                rows.append([mode, name, relative(ours, theirs), relative(ends[0][i], ends[1][i])])
    return table(["mode", "modality", "velocity, error in %", "sample, error in %"], rows)


# -- on a GPU -------------------------------------------------------------------------------------


def gpu_ms(work: Callable[[], object], rounds: int = 30) -> float:
    """Median milliseconds of the device, after a warm-up that also compiles."""
    for _ in range(3):
        work()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def gpu_kernels(dtype: torch.dtype = torch.bfloat16) -> str:
    """Each kernel at full size beside what torch offers: milliseconds, and the shares of peak
    arithmetic and bandwidth of the fastest card of that name in CARDS. The plain version also goes
    through torch.compile."""
    card = next(
        (card for card in CARDS if card.split()[-1] in torch.cuda.get_device_name()), "H100"
    )
    peak, bandwidth, _ = CARDS[card]
    new = lambda *shape: torch.randn(shape, dtype=dtype, device="cuda")
    heads, size, lengths = 24, 128, (360, 21, UND)
    qkv = [tuple(new(1, n, heads, size) for _ in range(3)) for n in lengths]
    biases = [None, None, torch.zeros(1, UND, device="cuda")]
    x, y, shift, scale = (
        new(1, 360, 3072).float(),
        new(1, 360, 3072),
        new(1, 1, 3072).float(),
        new(1, 1, 3072).float(),
    )
    q, k, rope = new(1, 360, 3072), new(1, 360, 3072), rope_3d((3, 12, 10), size, "cuda")
    norm = RMSNorm(3072).to("cuda", dtype)
    total, moved = sum(lengths), lambda *tensors: sum(t.numel() * t.itemsize for t in tensors)

    def written_out(name: str) -> Callable[[], object]:
        def work() -> object:
            with attention(name):
                return joint_attention(qkv, biases)

        return work

    heads_of = lambda z: rearrange(z, "b l (n k) -> b l n k", k=size)
    rotated = lambda: [rotate_interleaved(heads_of(norm(z)), *rope).to(dtype) for z in (q, k)]
    modulated = lambda: (nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift).to(dtype)
    gated = lambda: x + y.float() * scale
    cases = [
        (
            "joint attention",
            4 * total**2 * heads * size,
            4 * 2 * total * heads * size,
            lambda: kernels.joint_attention(qkv, biases),
            written_out("sdpa"),
            written_out("plain"),
        ),
        (
            "norm and rotate q, k",
            0,
            2 * moved(q, k),
            lambda: kernels.norm_rotate(q, k, norm.weight, norm.weight, norm.eps, size, rope),
            rotated,
            rotated,
        ),
        (
            "norm and modulate",
            0,
            moved(x, q),
            lambda: kernels.norm_modulate(x, shift, scale, 1e-6, dtype),
            modulated,
            modulated,
        ),
        (
            "gated residual",
            0,
            2 * moved(x) + moved(y),
            lambda: kernels.add_gated(x, y, scale),
            gated,
            gated,
        ),
    ]
    rows = []
    for name, flops, bytes_moved, ours, torch_s, plain in cases:
        times = [gpu_ms(ours), gpu_ms(torch_s), gpu_ms(torch.compile(plain))]
        rows.append(
            [
                name,
                *times,
                100 * flops / peak / times[0] * 1e3,
                100 * bytes_moved / bandwidth / times[0] * 1e3,
            ]
        )
    return table(
        [
            f"kernel, {dtype}",
            "ours, ms",
            "SDPA or eager, ms",
            "torch.compile of the plain version, ms",
            f"% of the peak of {card}",
            "% of its bandwidth",
        ],
        rows,
    )


@torch.no_grad()
def gpu(steps: int) -> str:
    """Milliseconds per chunk of the full-size trunk with random weights, and of its kernels.
    ValueError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(
            "--gpu measures on a CUDA device and torch sees none; run it where there is one, or predict with --count"
        )
    with torch.device("cuda"):
        model = Motus(preset("full")).to(torch.bfloat16).eval()
    inputs = drawn(model.config, 1, SIDE, TEXT, UND, torch.bfloat16, "cuda")
    video, action = noise_for(model, inputs)
    ours = lambda joint=None: (
        model.sample(
            inputs, "joint", steps, video_noise=video, action_noise=action, joint=joint
        ).actions
    )
    rows = [
        [
            "official order of work, without VLM and decoder",
            "eager",
            gpu_ms(
                lambda: official_sample(
                    model, lambda: inputs.und, inputs, video, action, steps, lambda video: None
                ),
                5,
            ),
        ]
    ]
    for how in ("eager", "compiled, CUDA graphs"):
        rows += [
            ["ours, joint", how, gpu_ms(ours, 10)],
            ["ours, 1 joint step", how, gpu_ms(lambda: ours(1), 10)],
        ]
        model.compile_sampler(mode="reduce-overhead")
    return "\n\n".join(
        [
            table([f"a chunk of {steps} steps, full size, batch 1, bf16", "how", "ms"], rows),
            gpu_kernels(),
        ]
    )


# -- the command ----------------------------------------------------------------------------------


def ratios(steps: int, rounds: int, batch: int, compiled: bool) -> str:
    rows = [
        [name, other, 1000 * a, 1000 * b, ratio, same]
        for name, other, a, b, ratio, same in sampler_ratios(steps, rounds, compiled)
        + training_ratios(batch, rounds, compiled)
    ]
    return table(
        ["what", "against", "ours, ms", "other, ms", "other / ours", "largest difference"], rows
    )


def data_speed(argv: list[str]) -> None:
    """Windows per second from the same files at the same random places, ours and lerobot's; skipped
    where lerobot cannot be imported."""
    parser = argparse.ArgumentParser(prog="bench.py data", description=data_speed.__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        help="LeRobot v3.0 folder (default: 20 toy episodes, recorded for this)",
    )
    for name, default, text in (
        ("samples", 64, "windows per round"),
        ("rounds", 7, "pairs that are timed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args = parser.parse_args(argv)
    try:
        import lerobot
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        print(
            f"skipped: the lerobot package cannot be imported here ({error}); this compares with it"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or data.record(Path(folder) / "toy", (6,), 20, 0).parent / "level6_gripper"
        pyramid = data.Pyramid(root)
        reader, frames = pyramid.opened[0].reader, 1 + pyramid.frames
        reader = type(reader)(
            reader.root, {"cameras": tuple(reader.sizes)}
        )  # all cameras as they are, as lerobot does
        video_times = (torch.arange(frames) / pyramid.video_hz).tolist()
        action_times = (torch.arange(pyramid.frames * pyramid.ratio) / pyramid.action_hz).tolist()
        wanted = dict.fromkeys(reader.cameras, video_times) | {"action": action_times}
        theirs = LeRobotDataset("local/files", root=root, delta_timestamps=wanted)
        rows = pyramid.draw(args.samples, 0, 0)[:, 1:].tolist()
        first = theirs[int(reader.start[rows[0][0]]) + rows[0][1]]
        ours = reader.window(rows[0][0], rows[0][1] / reader.fps, video_times, action_times)
        if not torch.equal(first["action"].reshape(-1), torch.from_numpy(ours.actions).reshape(-1)):
            raise ValueError("the two readers give different actions for the same window")
        seconds = in_turns(
            lambda: [reader.window(e, s / reader.fps, video_times, action_times) for e, s in rows],
            lambda: [theirs[int(reader.start[e]) + s] for e, s in rows],
            args.rounds,
        )
    a, b, ratio = seconds
    print(
        f"| ours, samples/s | lerobot {lerobot.__version__} with {theirs.video_backend}, samples/s | ours / lerobot |\n"
        f"| --- | --- | --- |\n| {args.samples / a:.0f} | {args.samples / b:.0f} | {ratio:.2f} |\n\n"
        f"{frames} frames of each of {len(reader.cameras)} cameras "
        f"{reader.sizes[reader.cameras[0]]}, {args.samples} random windows, {args.rounds} pairs in turns, medians"
    )


def main(argv: list[str] | None = None) -> None:
    if (argv or sys.argv[1:])[:1] == ["data"]:
        return data_speed((argv or sys.argv[1:])[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="count a chunk at full size and predict its milliseconds",
    )
    parser.add_argument(
        "--fast",
        metavar="CKPT",
        help="closed loop of a stage-3 run under different placements of the sampler's steps",
    )
    parser.add_argument(
        "--int8",
        metavar="CKPT",
        help="drift of a stage-3 run with int8 weights in the video expert",
    )
    parser.add_argument("--gpu", action="store_true", help="measure on the first GPU")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ratios: also the toy's graphs of torch.compile (minutes of C++ compiler)",
    )
    parser.add_argument("--rounds", type=int, default=7, help="pairs that are timed")
    parser.add_argument("--batch", type=int, default=32, help="samples of a training step")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps of the sampler")
    parser.add_argument(
        "--episodes", type=int, default=60, help="worlds per seed of --fast, windows of --int8"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of worlds and noise")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    if args.gpu:
        text = gpu(args.steps)
    elif args.count:
        text = count(args.steps)
    elif args.fast:
        text = closed_loop(args.fast, args.episodes, args.seed)
    elif args.int8:
        text = int8_drift(args.int8, args.episodes, args.seed[0])
    else:
        text = ratios(args.steps, args.rounds, args.batch, args.compile)
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    command = " ".join(["python bench.py", *(sys.argv[1:] if argv is None else argv)])
    text += f"\n\n`{command}`, {device}, {platform.machine()}, torch {torch.__version__}, {datetime.date.today()}"
    print(text)
    if args.out:
        args.out.write_text("# Speed\n\n" + text + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
