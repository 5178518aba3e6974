"""Speed, measured and counted: the figures of docs/speed.md come from here.

    python -m scripts.bench                     ratios of the sampler, in turns
    python -m scripts.bench --count             FLOPs and calls of a chunk at full size
    python -m scripts.bench --gpu               milliseconds per chunk, each kernel beside torch's

Below the table stand command, machine and date.

    official   the official order of work (models/motus.py, inference_step): at every Euler step
               the VLM again, keys and values of all padded text rows again in every layer, a row of
               modulation per token, rotation as complex numbers in float64, the last layer to its
               end; and the video decoded at the end
    ours       the same weights and the same result

Ratios come from one run: both sides in turns, so that a machine that slows down slows both, and the
median of the pairs. On a CPU seconds are those of the process, which other programs on the machine
do not lengthen; with one thread they are wall-clock on a quiet machine.

Shapes: B batch, Lv La Lu tokens, D width, N heads, K head size, S actions of a chunk, A action
dimensions.
"""

import datetime
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import attention
import flow
from backbones import wan
from motus import PRESETS, Inputs, Layer, Motus, MotusConfig, preset
from sample import Policy
from scale.fast import compile_sampler, sample_action_first
from scale.plan import frozen_parts
from scripts.readme import table
from weights.options import Parser, run_command

# A usual instruction's rows, understanding tokens, and the latent grid of 384 x 320 pixels.
TEXT = 20
UND = 200
SIDE = (24, 20)

Work = Callable[[], object]

# -- measuring ------------------------------------------------------------------------------------


def implementation(name: str) -> mock._patch_dict:
    """Chooses the attention implementation for a while."""
    return mock.patch.dict(os.environ, MOTUS_ATTENTION=name)


def seconds(work: Work) -> float:
    """Of the process: ratios are those of a CPU."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def in_turns(ours: Work, other: Work, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of each, and the median of other / ours pair by pair, after one warm-up
    of both."""
    ours()
    other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    first, second = (1000 * statistics.median(column) for column in zip(*pairs))
    return first, second, statistics.median(b / a for a, b in pairs)


def agree(ours: Tensor, other: Tensor) -> str:
    """The largest difference; ValueError beyond 1e-4, for then the two do not do the same work."""
    difference = (ours - other).abs().max().item()
    if difference > 1e-4:
        raise ValueError(
            f"the two ways differ by {difference:.2g}; they must agree within 1e-4 before they are "
            "timed"
        )
    return f"{difference:.1g}"


# -- the official order of work -------------------------------------------------------------------


def phases(size: int, device: torch.device) -> Sequence[Tensor]:
    """Rotary phases of heads of `size` by place on each axis, as complex numbers in float64, which
    the official model keeps."""
    half, side = size // 2, size // 6
    pairs = (half - 2 * side, side, side)
    places = torch.arange(1024, dtype=torch.float64, device=device)
    angles = torch.outer(places, torch.cat([wan.frequencies(n, device) for n in pairs]))
    return torch.polar(torch.ones_like(angles), angles).split(pairs, dim=1)


def official_rotate(x: Tensor, axes: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    """x (B, L, N, K) rotated as complex numbers, one sample after the other."""
    rotated = []
    for sample in x:
        spread = []
        for i, (phase, size) in enumerate(zip(axes, grid)):
            shape = [-1 if axis == i else 1 for axis in range(3)]
            spread.append(phase[:size].view(*shape, phase.shape[1]).expand(*grid, -1))
        phase = torch.cat(spread, dim=-1).flatten(0, 2)[:, None]
        pairs = torch.view_as_complex(sample.double().unflatten(-1, (-1, 2)))
        rotated.append(torch.view_as_real(pairs * phase).flatten(2))
    return torch.stack(rotated).float()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Chunk(NamedTuple):
    """A chunk of actions to be found, from the noise of a seed: a model, and what it sees."""

    model: Motus
    observe: Callable[[], Inputs]  # runs video encoder, text encoder and VLM
    look: Callable[[], Tensor]  # runs the VLM alone
    decode: Callable[[Tensor], object]

    def sample(self, steps: int, way: Callable = Motus.sample) -> Tensor:
        return way(self.model, self.observe(), "joint", steps, generator=seeded()).actions

    @torch.no_grad()
    def sample_officially(self, steps: int) -> Tensor:
        """In the official order, through layers that all go to their end; text that is given
        without its keys and values is projected in every layer."""
        model = copy(self.model)
        model.layers = [Layer(x.video, x.action, x.und, last=False) for x in model.layers]
        config = model.config
        inputs = self.observe()
        observation = inputs.latents[:, :, :1]
        grid = (config.latent_frames, *observation.shape[3:])
        generator = seeded()
        like = observation.new_empty(len(inputs), config.video.latent, *grid)
        video = flow.keep_observation(flow.gaussian(like, generator), observation)
        like = observation.new_empty(len(inputs), config.chunk, config.action_dim)
        action = flow.gaussian(like, generator)
        self.look()  # its result is not used

        rows = config.video.text_len - inputs.context.shape[1]
        inputs = replace(inputs, context=pad(inputs.context, (0, 0, 0, rows)))
        shared = model.conditioning(inputs)
        text = shared.text[0]._replace(bias=None)
        grid = [n // p for n, p in zip(video.shape[2:], config.video.patch)]
        rope = (phases(config.video.head_dim, video.device), grid)
        shared = shared._replace(text=[text] * len(model.layers), rope=rope, und_bias=None)
        tokens = math.prod(grid), len(shared.positions)

        rotation = mock.patch.object(attention, "rotate_interleaved", official_rotate)
        with implementation("sdpa"), rotation:
            for i in range(steps):
                t = torch.full((len(video), 1), 1 - i / steps, device=video.device)
                und = model.und.vlm_adapter(self.look())
                state = model.action.input_encoder.state_encoder(inputs.state[:, None])
                shared = shared._replace(und=und, state=state)
                time = model.embed_times(*(t.expand(-1, n) for n in tokens))
                v_video, v_action = model(video, action, time, shared)
                video = torch.cat([observation, (video - v_video / steps)[:, :, 1:]], dim=2)
                action = action - v_action / steps
        self.decode(video)
        return action


def chunk_of(model: Motus, inputs: Inputs) -> Chunk:
    """Of what was seen already: no frozen network runs."""
    return Chunk(model, lambda: inputs, lambda: inputs.und, lambda video: None)


def drawn(config: MotusConfig, batch: int, side: tuple[int, int], text: int, und: int) -> Inputs:
    """Random inputs: latents of `side`, that many rows of text and understanding tokens."""
    return Inputs(
        torch.randn(batch, config.video.latent, 1, *side),
        torch.randn(batch, text, config.video.text_dim),
        torch.full((batch,), text),
        torch.randn(batch, und, config.vlm_dim),
        state=torch.randn(batch, config.state_dim),
    )


# -- ratios on this machine -----------------------------------------------------------------------


def sampler_ratios(name: str, chunk: Chunk, steps: int, rounds: int, compiled: bool) -> list[list]:
    """Ours against official, action-first against our joint sample, and ours as static graphs."""
    ours = partial(chunk.sample, steps)
    first = partial(chunk.sample, steps, sample_action_first)
    official = partial(chunk.sample_officially, steps)
    pairs = [("joint sample", "official order of work", ours, official)]
    pairs.append(("action-first (1 joint step)", "our joint sample", first, ours))
    if compiled:
        graphs = chunk._replace(model=compile_sampler(chunk.model))
        graphs = partial(graphs.sample, steps)
        pairs.append(("joint sample, compiled", "official order of work", graphs, official))
    rows = []
    for what, against, work, other in pairs:
        same = "approximate" if work is first else agree(work(), other())
        rows.append([f"{what}, {name}", against, *in_turns(work, other, rounds), same])
    return rows


def toy_chunk() -> Chunk:
    """The whole way from picture to actions with the toy's policy and backbones."""
    policy = Policy.load(PRESETS["toy"].backbones / "motus", device="cpu")
    backbones = policy.backbones
    images = torch.randint(0, 256, (1, *PRESETS["toy"].size, 3), dtype=torch.uint8)
    words = ["push the red disc to the left"]
    state = torch.zeros(1, policy.model.config.state_dim)
    observe = partial(policy.inputs, images, words, state)
    look = partial(backbones.understand, images, words)
    return Chunk(policy.model, observe, lambda: look()[0], backbones.decode_video)


def small_chunk() -> Chunk:
    """A stack of layers of preset `small`, which has no backbones."""
    config = preset("small")
    model = Motus(replace(config, video=replace(config.video, layers=3))).eval()
    return chunk_of(model, drawn(config, 1, (16, 16), TEXT, 130))


def ratios(steps: int, rounds: int, compiled: bool) -> str:
    torch.manual_seed(0)
    head = ["what", "against", "ours, ms", "other, ms", "other / ours", "largest difference"]
    rows = [
        *sampler_ratios("toy", toy_chunk(), steps, rounds, compiled),
        *sampler_ratios("3 layers of `small`", small_chunk(), steps, rounds, False),
    ]
    return table(head, rows)


# -- counting without values ----------------------------------------------------------------------


@torch.no_grad()
def flops_of(work: Work) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def chunk_flops(config: MotusConfig, steps: int) -> dict[str, int]:
    """Of the trunk, per way of sampling a joint chunk at batch 1."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Motus(config).eval()
        chunk = chunk_of(model, drawn(config, 1, SIDE, TEXT, UND))
    found = {
        "official order of work": flops_of(partial(chunk.sample_officially, steps)),
        "ours, joint": flops_of(partial(chunk.sample, steps)),
    }
    for joint in (2, 1):
        first = partial(sample_action_first, joint=joint)
        name = f"ours, action-first, {joint} of {steps} joint"
        found[name] = flops_of(partial(chunk.sample, steps, first))
    return found


def vlm_flops() -> int:
    """One look of Qwen3-VL-2B at a picture of 480 patches, by its parts: which token goes where
    depends on data and has no FLOPs."""
    vlm = frozen_parts("full")["vlm"]
    new = partial(torch.empty, device="meta")
    pixels = new(1, SIDE[0] * SIDE[1], vlm.visual.patch_embed["proj"].weight[0].numel())
    x, half = new(1, UND, vlm.config.width), new(1, UND, vlm.config.head_dim // 2)

    def look() -> None:
        with torch.device("meta"):
            vlm.visual.encode(pixels, *SIDE)
            for layer in vlm.language_model.layers:
                layer(x, half, half, new(1, 1, UND, UND))

    return flops_of(look)


def vae_flops() -> tuple[int, int]:
    """Of the video VAE: the observation encoded, and the whole clip decoded, as only the official
    code does."""
    vae = frozen_parts("full")["vae"]
    frame = torch.empty(1, 3, 1, 16 * SIDE[0], 16 * SIDE[1], device="meta")
    grid = (preset("full").latent_frames, *SIDE)
    clip = torch.empty(1, vae.config.z_dim, *grid, device="meta")
    return flops_of(partial(vae.encode, frame)), flops_of(partial(vae.decode, clip))


def count(steps: int) -> str:
    """The tables of a chunk at full size."""
    vlm = vlm_flops()
    encode, decode = vae_flops()
    rows = []
    for name, trunk in chunk_flops(preset("full"), steps).items():
        official = name.startswith("official")
        looks = steps + 1 if official else 1
        vae = encode + decode if official else encode
        tera = [x / 1e12 for x in (trunk, looks * vlm, vae, trunk + looks * vlm + vae)]
        rows.append([name, *tera, f"{looks}, 0, {1 if official else 0}"])
    calls = "looks of the VLM, T5, decoder"
    title = f"a chunk of {steps} steps, full size, batch 1"
    return table([title, "TFLOP: trunk", "VLM", "VAE", "all", calls], rows)


# -- on a GPU -------------------------------------------------------------------------------------


def milliseconds(work: Work) -> float:
    """Median of a call on the device, after a warm-up that also compiles."""
    work()
    return 1000 * Timer("work()", globals={"work": work}).blocked_autorange().median


def kernel_cases(config: MotusConfig, device: str) -> dict[str, tuple]:
    """Functions of attention.py that have a Triton twin, with arguments of the network's shapes in
    bf16."""
    width = config.video.width
    size = config.video.head_dim
    grid = [config.latent_frames, *(n // p for n, p in zip(SIDE, config.video.patch[1:]))]
    video = math.prod(grid)
    new = partial(torch.randn, device=device, dtype=torch.bfloat16)
    lengths = (video, config.chunk + 1 + config.registers, UND)
    qkv = [tuple(new(1, n, config.video.heads, size) for _ in range(3)) for n in lengths]
    biases = [None, None, torch.zeros(1, UND, device=device)]
    q, k, x = (new(1, video, width) for _ in range(3))
    shift, scale = (new(1, 1, width).float() for _ in range(2))
    weight = new(width)
    return {
        "joint_attention": (qkv, biases),
        "norm_rotate": (q, k, weight, weight, 1e-6, size, wan.rope_3d(grid, size, device)),
        "norm_modulate": (x.float(), shift, scale, 1e-6, torch.bfloat16),
        "add_gated": (x.float(), q, scale),
    }


def kernel_times(config: MotusConfig, device: str) -> Iterator[list]:
    """Name and milliseconds of each kernel, of torch's own, and compiled from the plain version."""
    for name, arguments in kernel_cases(config, device).items():
        function = getattr(attention, name)
        row = [name]
        for how in ("triton", "sdpa", "plain"):
            run = torch.compile(function) if how == "plain" else function
            with implementation(how):
                row.append(milliseconds(partial(run, *arguments)))
        yield row


@torch.no_grad()
def gpu(config: MotusConfig, steps: int, device: str = "cuda") -> str:
    """Milliseconds per chunk of the trunk with random weights, and of each kernel. ValueError
    without a CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--gpu measures on a CUDA device and torch sees none; run it where there is one, or "
            "count with --count"
        )
    with torch.device(device):
        model = Motus(config).to(torch.bfloat16).eval()
        chunk = chunk_of(model, drawn(config, 1, SIDE, TEXT, UND))
    graphs = chunk._replace(model=compile_sampler(model, mode="reduce-overhead"))
    official = "official order of work, without VLM and decoder"
    ways = {
        (official, "eager"): partial(chunk.sample_officially, steps),
        ("ours, joint", "eager"): partial(chunk.sample, steps),
        ("ours, 1 joint step", "eager"): partial(chunk.sample, steps, sample_action_first),
        ("ours, joint", "compiled, CUDA graphs"): partial(graphs.sample, steps),
    }
    rows = [[*way, milliseconds(work)] for way, work in ways.items()]
    head = [f"a chunk of {steps} steps, batch 1, bf16", "how", "ms"]
    kernels = ["kernel, bf16", "ours, ms", "SDPA or eager, ms", "torch.compile of the plain, ms"]
    return table(head, rows) + "\n\n" + table(kernels, kernel_times(config, device))


# -- the command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.option
    add("--count", False, "count the FLOPs of a chunk at full size")
    add("--gpu", False, "measure on the first GPU")
    add("--compile", False, "ratios: also of compiled graphs (minutes)")
    add("--rounds", 7, "pairs that are timed")
    add("--steps", 10, "Euler steps of the sampler")
    args = parser.parse_args(argv)
    if args.gpu:
        text = gpu(preset("full"), args.steps)
    elif args.count:
        text = count(args.steps)
    else:
        text = ratios(args.steps, args.rounds, args.compile)
    device = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    command = " ".join(["python -m scripts.bench", *(sys.argv[1:] if argv is None else argv)])
    day = datetime.date.today()
    text += f"\n\n`{command}`, {device}, torch {torch.__version__}, {day}"
    print(text)


if __name__ == "__main__":
    run_command(main)
