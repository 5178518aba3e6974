"""What turns the training of one process into that of a cluster: ranks, sharding, checkpoints that
all ranks write together.

    launch        the ranks that torchrun started, and how they agree: what one refuses, all refuse by name, at once
    Watchdog      a rank that stalls ends all of them in a message that says which one it was and what it was doing
    parallelize   activation checkpointing, compilation, FSDP2 and precision around an unchanged model; without ranks, one process
    Saver, fill   checkpoints: written by all ranks in parallel, asynchronously and atomically; read by any number of ranks

Sharding. A layer of `Motus` (three blocks, gathered together because they meet in one attention) is
a group, what lies outside the layers is the root group. An expert that a stage does not train has
groups of its own whose forward is never called: it is never gathered. The frozen backbones are not
part of the network; their outputs come from a cache. Each parameter is split along its first axis
that the ranks divide (the q, k, v of a small expert are (3, N, D, K), where axis 0 would leave most
ranks empty), along axis 0 unevenly if there is none.

Precision "bf16" is autocast around fp32 weights rather than a cast of what FSDP gathers: time
paths, norms, modulation, residual streams and the video head stay exactly as in fp32, on one
process as on many. Gathers are fp32; on NVLink they hide behind the computation.

Checkpoints. A slice of an axis is a few runs of bytes of a safetensors file, so every rank writes
its own runs into the same files: nothing is gathered, and the result is what one process would have
written, byte for byte. It is at once the sharded checkpoint, the consolidated export, and readable
by any number of ranks. Torch's own distributed checkpoint (DCP) pickles its metadata, and its
safetensors writer writes everything a second time to consolidate. The folder must lie on a file
system that all ranks share.
"""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from motus import Inputs, Losses, Motus

# -- sharding -------------------------------------------------------------------------------------


def kept(context: Any, op: Any, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing keeps what matrix products and attentions give, and computes all else
    (norms, modulation, GELU) again."""
    name = str(op)
    expensive = any(
        word in name
        for word in (
            "aten.mm",
            "aten.addmm",
            "aten.convolution",
            "scaled_dot_product",
            "motus.attention",
        )
    )
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


# Nothing in the network draws random numbers, so no random state is kept for the second forward
# pass.
CHECKPOINTING = {
    "none": {},
    "full": dict(preserve_rng_state=False),
    "selective": dict(
        preserve_rng_state=False, context_fn=partial(create_selective_checkpoint_contexts, kept)
    ),
}


class Step(nn.Module):
    """The training loss as one call of one module: what is sharded. It also makes the layers, which
    `Motus` keeps in a plain list, modules of the tree."""

    def __init__(self, model: Motus, precision: str):
        super().__init__()
        self.model, self.bf16 = model, precision == "bf16"
        self.layers = nn.ModuleList(model.layers)

    def forward(self, inputs: Inputs, noise: Mapping[str, Tensor]) -> Losses:
        # Without its cache, which would keep a copy in bf16 of every weight that was ever gathered.
        with torch.autocast(
            inputs.latents.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False
        ):
            return self.model.loss(inputs, **noise)


def split_axis(parameter: Tensor, parts: int) -> Shard:
    """The first axis that `parts` divides, else axis 0."""
    return Shard(next((axis for axis, size in enumerate(parameter.shape) if size % parts == 0), 0))


def parallelize(
    model: Motus,
    trained: tuple[str, ...],
    mesh: DeviceMesh | None = None,
    checkpointing: str = "none",
    compiled: bool = False,
    precision: str = "fp32",
    reshard: bool = True,
) -> Step:
    """The model, unchanged, made ready for many ranks: call the result instead of `model.loss`.
    Works on the meta device; without a mesh nothing is sharded. Experts that are not `trained` are
    frozen and stay sharded. `reshard` frees a layer's weights between forward and backward pass and
    gathers them again."""
    for expert in ("video", "action", "und"):
        getattr(model, expert).requires_grad_(expert in trained)
    for layer in model.layers:
        if checkpointing != "none":
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, **CHECKPOINTING[checkpointing]
            )
        if compiled:
            layer.forward = torch.compile(layer.forward, fullgraph=True)
    step = Step(model, precision)
    if mesh is not None:
        shard = partial(
            fully_shard,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            shard_placement_fn=partial(split_axis, parts=mesh["shard"].size()),
        )
        # Said of a layer that hands the understanding on as it came; nothing in the network works
        # in place on what a layer returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        idle = [expert for expert in ("video", "action", "und") if expert not in trained]
        for layer in model.layers:
            for expert in idle:
                shard(getattr(layer, expert))
            shard(layer, reshard_after_forward=reshard)
        for expert in idle:
            shard(getattr(model, expert))
        shard(step, ignored_params={p for layer in model.layers for p in layer.parameters()})
    return step


def cost(model: Motus, inputs: Inputs) -> tuple[int, float]:
    """Tokens of a batch, and the floating-point operations of a training step on it: two for each
    weight that a token meets on the way forwards, those of the attentions, and twice as many
    backwards. What checkpointing computes again does not count."""
    video, layers = model.config.video, model.config.video.layers
    lv = math.prod(inputs.latents.shape[2:]) // math.prod(video.patch)
    la = (
        0
        if inputs.actions is None
        else model.config.chunk + (1 + model.config.registers) * model.config.finetune
    )
    lu = 0 if inputs.und is None else inputs.und.shape[1]
    lt = inputs.context.shape[1] + (
        inputs.context.shape[1] < video.text_len
    )  # and a row that stands for the padded ones
    size = lambda *modules: sum(
        m.weight.numel()
        for top in modules
        for m in top.modules()
        if isinstance(m, nn.Linear | nn.Conv3d)
    )
    wan, action, und, block = model.video, model.action, model.und, model.layers[0]
    read = size(block.video.cross_attn.k, block.video.cross_attn.v)
    weights = lv * (layers * (size(block.video) - read) + size(wan.patch_embedding, wan.head))
    weights += lt * (layers * read + size(wan.text_embedding)) + size(
        wan.time_embedding, wan.time_projection
    )
    weights += la * (
        layers * (size(block.action) + block.action.qkv.numel()) + size(action.decoder)
    )
    weights += (
        0
        if inputs.actions is None
        else inputs.actions.shape[1] * size(action.input_encoder.action_encoder)
    )
    weights += (la > 0) * size(action.time_embedding, action.time_projection)
    unread = (
        size(block.und.o, block.und.ffn) + block.und.qkv.numel() // 3
    )  # the last layer's understanding
    weights += lu * (
        layers * (size(block.und) + block.und.qkv.numel()) - unread + size(und.vlm_adapter)
    )
    weights += size(action.input_encoder.state_encoder) if inputs.state is not None else 0
    attention = (
        2 * video.width * ((layers * (lv + la + lu) - lu) * (lv + la + lu) + layers * lv * lt)
    )
    return len(inputs) * (lv + la + lu), 6.0 * len(inputs) * (weights + attention)


def whole(norm: Tensor) -> Tensor:
    """A norm over sharded gradients as an ordinary tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
