"""A model over many ranks: activation checkpointing, compilation, FSDP2 and precision around an
unchanged network, and its first values.

    parallelize   the training loss of a model as one module, sharded if there is a mesh
    reduced       the loss over all ranks and the norm of their gradients, summed where each holds
                  the model whole, and clipped
    initialise    fresh values and those of an earlier stage; a rank holds its part alone

Replicas. A model of fewer than WHOLE parameters is whole on every rank: one message a step, no
hooks. Above that, or with `shards` above 1, it is sharded.

Sharding. The matrices of a layer of `Motus` (three blocks, gathered together because they meet in
one attention) are a group, the layer after it is gathered ahead, the last stays for the backward
pass. An expert that a stage does not train has groups of its own whose forward is never called: it
is never gathered. The frozen backbones are not part of the network; their outputs come from a
cache. Each parameter is split along its first axis that the ranks divide (the q, k, v of a small
expert are (3, N, D, K), where axis 0 would leave most ranks empty), along axis 0 unevenly if there
is none.

Precision "bf16" is autocast around fp32 weights. Matrices of layers are gathered in bf16, to which
autocast would cast them anyway. All that must stay fp32 (time paths, video head, and of the layers
norms, biases and modulation tables) is the root group, gathered once, in fp32: the numbers are
those of one process. Gradients are reduced in fp32.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
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

WHOLE = 50_000_000  # parameters from which a model is sharded; a replica of so many takes 1 GB


@cache
def expensive_names() -> set[str]:
    """Operators that a backward pass should not compute again: those of torch's own list, and the
    attentions that it lacks."""
    from torch._functorch.partitioners import get_default_op_list  # takes long to import

    listed = {op._qualified_op_name for op in get_default_op_list().compute_intensive_ops}
    attentions = ("flash_attention_for_cpu", "cudnn_attention")
    listed |= {f"aten::_scaled_dot_product_{name}" for name in attentions}
    return listed | {"motus::attention"}


def keep_expensive(context: object, op: object, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing keeps what matrix products and attentions give, and computes all else
    (norms, modulation, GELU) again."""
    if op._schema.name in expensive_names():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# The network draws no random numbers, so no random state is kept for the second forward pass.
CHECKPOINTING = {
    "none": {},
    "full": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, keep_expensive)},
}


class TrainingLoss(nn.Module):
    """The training loss as one call of one module, which is what is sharded. `Motus` keeps its
    layers in a plain list; here they are modules of the tree, so that each can be a group."""

    def __init__(self, model: Motus, precision: str, reshard: bool):
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.frees = reshard
        self.divided = 1  # FSDP divides gradients by so many ranks
        self.layers = nn.ModuleList(model.layers)

    def forward(self, inputs: Inputs, noise: Mapping[str, Tensor]) -> Losses:
        # Without its cache, which would keep a copy in bf16 of every weight that was ever gathered.
        device = inputs.latents.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.model.loss(inputs, **noise)

    def begin_pass(self, last: bool) -> None:
        """Before a pass: only after the last one of a step are gradients summed over replicas, and,
        where there is memory for whole gradients, over shards."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(last or self.frees)
            self.set_requires_all_reduce(last)


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
    frozen and stay sharded. `reshard` frees the weights of all layers but the last between forward
    and backward pass and gathers them again; without it they stay, and so do whole gradients."""
    for expert in EXPERTS:
        getattr(model, expert).requires_grad_(expert in trained)
    for layer in model.layers:
        if checkpointing != "none":
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            layer.forward = partial(again, layer.forward, **CHECKPOINTING[checkpointing])
        if compiled:
            layer.forward = torch.compile(layer.forward, fullgraph=True)
    loss = TrainingLoss(model, precision, reshard)
    if mesh is None:
        return loss
    fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    gathered = replace(fp32, param_dtype=torch.bfloat16 if loss.bf16 else None)
    splits = partial(split_axis, ranks=mesh["shard"].size())
    shard = partial(fully_shard, mesh=mesh, shard_placement_fn=splits)
    # Said of a layer that hands the understanding on as it came; nothing in the network works in
    # place on what a layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    idle = [expert for expert in EXPERTS if expert not in trained]
    matrices = set()
    for layer in model.layers:
        for expert in idle:
            shard(getattr(layer, expert))
        named = layer.named_parameters()
        islands = {p for name, p in named if p.dim() == 1 or name.endswith("modulation")}
        again = reshard and not layer.last
        shard(layer, reshard_after_forward=again, mp_policy=gathered, ignored_params=islands)
        matrices |= set(layer.parameters()) - islands
    for expert in idle:
        shard(getattr(model, expert))
    shard(loss, mp_policy=fp32, ignored_params=matrices)
    loss.divided = mesh.size()
    for group, following in pairwise([loss, *model.layers]):
        group.set_modules_to_forward_prefetch([following])
    return loss


def full_tensor(x: Tensor) -> Tensor:
    """A norm over gradients that may be sharded, as an ordinary tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """One row of numbers as views of the shapes of `tensors`, one after the other."""
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors)]


def reduced(loss: Tensor, parameters: Sequence[Tensor], most: float) -> tuple[Tensor, Tensor]:
    """The loss over all ranks and the norm of all gradients, which are then scaled to a norm of
    `most` at most. Those of whole parameters are summed in the message of the loss; those of
    sharded ones FSDP has reduced."""
    if not dist.is_initialized():
        return loss, nn.utils.clip_grad_norm_(parameters, most)
    whole = [p for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    sent = torch.cat([x.flatten() for x in (loss, *(p.grad for p in whole))])
    dist.all_reduce(sent)
    if not whole:
        return sent[0], full_tensor(nn.utils.clip_grad_norm_(parameters, most))
    grads = sent[1:]
    norm = grads.square().sum().sqrt()  # `norm` of so many numbers in fp32 is 1e-5 wrong
    grads *= (most / (norm + 1e-6)).clamp(max=1)
    for p, grad in zip(whole, views(grads, whole)):
        p.grad = grad.to(p.dtype)
    return sent[0], norm


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


@torch.no_grad()
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
                drawn = make()
                drawn.init_weights()
                for name in wanted:
                    copy_shard(wanted[name], drawn.get_parameter(name))
                del drawn  # before the next is made


# -- what a step costs ----------------------------------------------------------------------------


def tokens_of(config: MotusConfig, inputs: Inputs) -> dict[str, int]:
    """Tokens of a sample in the joint attention, by expert."""
    found = {"video": math.prod(inputs.latents.shape[2:]) // math.prod(config.video.patch)}
    if inputs.actions is not None:
        ends = 1 + config.registers if config.finetune else 0
        found |= {"action": config.chunk + ends, "und": inputs.und.shape[1]}
    return found


def count_tokens(config: MotusConfig, inputs: Inputs) -> int:
    """Tokens of a batch in the joint attention."""
    return len(inputs) * sum(tokens_of(config, inputs).values())


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
