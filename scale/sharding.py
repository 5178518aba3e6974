"""A model over many ranks: activation checkpointing, compilation, FSDP2 and precision around an
unchanged network, and its first values.

    parallelize   the training loss of a model as one module, sharded if there are ranks
    initialise    fresh values and those of an earlier stage; a rank holds its part alone

Sharding. A layer of `Motus` (three blocks, gathered together because they meet in one attention) is
a group, what lies outside the layers is the root group. An expert that a stage does not train has
groups of its own whose forward is never called: it is never gathered. The frozen backbones are not
part of the network; their outputs come from a cache. Each parameter is split along its first axis
that the ranks divide (the q, k, v of a small expert are (3, N, D, K), where axis 0 would leave most
ranks empty), along axis 0 unevenly if there is none.

Precision "bf16" is autocast around fp32 weights rather than a cast of what FSDP gathers: time
paths, norms, modulation, residual streams and the video head stay exactly as in fp32, on one
process as on many. Gathers are fp32; on NVLink they hide behind the computation.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from backbones.published import open_weights
from backbones.wan import WanModel
from flow import Losses
from motus import EXPERTS, STAGES, ActionExpert, Inputs, Motus, MotusConfig, UndExpert
from scale.batches import draw_noise
from weights.card import Card
from weights.load import copy_shard, load_into

# -- shapes and shards ----------------------------------------------------------------------------

EXPENSIVE = ("aten.mm", "aten.addmm", "aten.convolution", "scaled_dot_product", "motus.attention")


def keep_expensive(context: object, op: object, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing keeps what matrix products and attentions give, and computes all else
    (norms, modulation, GELU) again."""
    if any(name in str(op) for name in EXPENSIVE):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# The network draws no random numbers, so no random state is kept for the second forward pass.
CHECKPOINTING = {
    "none": {},
    "full": dict(preserve_rng_state=False),
    "selective": dict(
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, keep_expensive),
    ),
}


class TrainingLoss(nn.Module):
    """The training loss as one call of one module, which is what is sharded. `Motus` keeps its
    layers in a plain list; here they are modules of the tree, so that each can be a group."""

    def __init__(self, model: Motus, precision: str):
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.layers = nn.ModuleList(model.layers)

    def forward(self, inputs: Inputs, noise: Mapping[str, Tensor]) -> Losses:
        # Without its cache, which would keep a copy in bf16 of every weight that was ever gathered.
        device = inputs.latents.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.model.loss(inputs, **noise)


def split_axis(parameter: Tensor, ranks: int) -> Shard:
    """The first axis that `ranks` divides, else axis 0."""
    return Shard(next((axis for axis, size in enumerate(parameter.shape) if size % ranks == 0), 0))


def parallelize(
    model: Motus,
    trained: tuple[str, ...],
    mesh: DeviceMesh | None = None,
    checkpointing: str = "none",
    compiled: bool = False,
    precision: str = "fp32",
    reshard: bool = True,
) -> TrainingLoss:
    """The model, unchanged, made ready for many ranks: call the result instead of `model.loss`.
    Works on the meta device; without a mesh nothing is sharded. Experts that are not `trained` are
    frozen and stay sharded. `reshard` frees a layer's weights between forward and backward pass and
    gathers them again."""
    for expert in EXPERTS:
        getattr(model, expert).requires_grad_(expert in trained)
    for layer in model.layers:
        if checkpointing != "none":
            options = CHECKPOINTING[checkpointing]
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **options)
        if compiled:
            layer.forward = torch.compile(layer.forward, fullgraph=True)
    loss = TrainingLoss(model, precision)
    if mesh is None:
        return loss
    shard = partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        shard_placement_fn=partial(split_axis, ranks=mesh["shard"].size()),
    )
    # Said of a layer that hands the understanding on as it came; nothing in the network works in
    # place on what a layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    idle = [expert for expert in EXPERTS if expert not in trained]
    for layer in model.layers:
        for expert in idle:
            shard(getattr(layer, expert))
        shard(layer, reshard_after_forward=reshard)
    for expert in idle:
        shard(getattr(model, expert))
    shard(loss, ignored_params={p for layer in model.layers for p in layer.parameters()})
    return loss


def full_tensor(x: Tensor) -> Tensor:
    """A tensor that may be sharded, or a norm over sharded gradients, as an ordinary tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# -- values ---------------------------------------------------------------------------------------


def initialise(model: Motus, init: str | Path | None, stage: str, seed: int = 0) -> None:
    """Fresh weights, and those of an earlier stage, ours or published: from stage 1 the video
    expert, from stage 2 all but what starts fresh. One tensor of the file at a time, and what
    starts fresh one layer at a time, each from a seed of its own; a rank keeps its part of each. So
    no rank ever holds more than a layer, and the values are the same for any number of ranks."""
    if init is None:
        draw_fresh(model, ("",), seed)
        return
    source, rename, card, absent = open_weights(init)
    fresh = starts_fresh(model.config, card, stage, init) + absent
    draw_fresh(model, fresh, seed)
    with source:
        load_into(model, source, rename, ignore=(*fresh, "vlm."), fresh=fresh)


def starts_fresh(config: MotusConfig, card: Card, stage: str, init: object) -> tuple[str, ...]:
    """Beginnings of the names that a stage does not take from weights with this card."""
    theirs = MotusConfig.of(card.motus, init)
    if theirs.video != config.video:
        raise ValueError(
            f"--init {init} has video expert {theirs.video}; this run has {config.video}. Use the "
            "same preset and sizes"
        )
    if card.stage == "1":
        return ("action.", "und.")
    if theirs.finetune == config.finetune:
        return ()
    if config.finetune:
        return STAGES[stage].fresh
    raise ValueError(
        f"--init {init} is of stage {card.stage}; stage {stage} starts from stage 1 or 2"
    )


def draw_fresh(model: Motus, fresh: tuple[str, ...], seed: int) -> None:
    """Values for all parameters whose names begin so."""
    one = replace(model.config, video=replace(model.config.video, layers=1))
    makers = (lambda: WanModel(one.video), lambda: ActionExpert(one), lambda: UndExpert(one))
    for i, make in enumerate(makers):
        expert = EXPERTS[i]
        for layer in range(model.config.video.layers):
            here = f"blocks.{layer}."
            wanted = {}
            for name, parameter in getattr(model, expert).named_parameters():
                outside = layer == 0 and not name.startswith("blocks.")  # drawn with layer 0
                if f"{expert}.{name}".startswith(fresh) and (outside or name.startswith(here)):
                    wanted[name.replace(here, "blocks.0.")] = parameter
            if wanted:
                state = np.random.SeedSequence([seed, i, layer]).generate_state(1)
                torch.manual_seed(int(state[0]))
                draw_layer(make, wanted)


@torch.no_grad()
def draw_layer(make: Callable[[], nn.Module], wanted: Mapping[str, Tensor]) -> None:
    """Copies what this rank holds of an expert of one layer, which lives no longer than this."""
    expert = make()
    expert.init_weights()
    for name, value in expert.named_parameters():
        if name in wanted:
            copy_shard(wanted[name], value)


# -- what a step costs ----------------------------------------------------------------------------


def count_tokens(config: MotusConfig, inputs: Inputs) -> int:
    """Tokens of a batch in the joint attention."""
    video = math.prod(inputs.latents.shape[2:]) // math.prod(config.video.patch)
    if inputs.actions is None:
        return len(inputs) * video
    ends = 1 + config.registers if config.finetune else 0
    return len(inputs) * (video + config.chunk + ends + inputs.und.shape[1])


@torch.no_grad()
def count_flops(config: MotusConfig, inputs: Inputs) -> float:
    """Floating-point operations of a training step on a batch: three times those of the forward
    pass, counted by torch on tensors without values. What checkpointing computes again does not
    count."""
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), counter:
        inputs = inputs.map(lambda x: torch.empty(x.shape, dtype=x.dtype))  # on the CPU, as weights
        Motus(config).loss(inputs, **draw_noise(inputs, torch.Generator()))
    return 3.0 * counter.get_total_flops()
