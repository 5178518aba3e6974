"""Low-rank adapters (LoRA, arXiv 2106.09685) of the video expert: for a card that does not hold its
gradients and moments.

    freeze   the expert stays as it is; the matrices of its blocks (q, k, v, o, FFN) lie in the
             dtype in which they are multiplied, without a copy in fp32
    adapt    y = W x + B A x with A (rank, in) random and B (out, rank) zero: a run begins as the
             network that it adapts, and trains A and B
    split    a checkpoint: W + B A under the names, shapes and dtypes of full training, so that who
             loads it need not know; and apart, what only resuming needs

Every rank holds all of it: only the factors and the small experts have gradients to send.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from attention import Linear
from motus import Motus

FILE = "lora.safetensors"


def maps(model: Motus) -> dict[str, Linear]:
    """The linear maps of the video expert's blocks, by name."""
    modules = model.video.blocks.named_modules(prefix="video.blocks")
    return {name: module for name, module in modules if type(module) is Linear}


def freeze(model: Motus, precision: str) -> None:
    """Before the network has values. Matrices become buffers: no optimizer and no average knows
    them."""
    model.video.requires_grad_(False)
    for layer in maps(model).values():
        weight = layer.weight.detach()
        if precision == "bf16":
            weight = weight.bfloat16()
        del layer.weight
        layer.register_buffer("weight", weight)


def adapt(model: Motus, rank: int, seed: int) -> None:
    """A and the transpose of B, side by side in one parameter (rank, in + out) of each map, in the
    dtype of what is trained; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for layer in maps(model).values():
        a = torch.randn(rank, layer.in_features, generator=generator)
        b = torch.zeros(rank, layer.out_features)
        factors = torch.cat([a / math.sqrt(layer.in_features), b], dim=1)
        layer.lora = nn.Parameter(factors.to(layer.bias))
        layer.forward = partial(adapted, layer)


def adapted(layer: Linear, x: Tensor) -> Tensor:
    """x (B, L, in) -> (B, L, out). The sum is one operation, and none of those whose result
    selective checkpointing keeps: it would keep each twice."""
    a, b = layer.lora.split([layer.in_features, layer.out_features], dim=1)
    x = x.to(layer.bias.dtype).to(layer.weight.dtype)  # rounds as a matrix that is trained would
    low = nn.functional.linear(x, a)  # (B, L, rank)
    return torch.baddbmm(Linear.forward(layer, x), low, b.expand(len(x), -1, -1))


@torch.no_grad()
def merge(weight: Tensor, factors: Tensor) -> Tensor:
    """W + B A, added in fp32, in the dtype of the factors."""
    a, b = factors.float().split(weight.shape[::-1], dim=1)
    return torch.addmm(weight.float(), b.mT, a).to(factors.dtype)


def split(model: Motus, ema: dict[str, Tensor]) -> tuple[dict, dict, dict]:
    """The whole network and the whole average by name, what has to be computed as functions that
    do it, so that one tensor exists at a time; and the frozen matrices, the factors and their
    averages, of which there are none without adapters."""
    network = model.state_dict()
    average = {name: ema.get(name, partial(Tensor.float, x)) for name, x in network.items()}
    apart = {}
    for name in maps(model):
        weight = f"{name}.weight"
        factors = f"{name}.lora"
        if factors in network:
            apart[weight] = network[weight]
            for prefix, tensors in (("", network), ("ema.", average)):
                apart[prefix + factors] = tensors.pop(factors)
                tensors[weight] = partial(merge, apart[weight], apart[prefix + factors])
    return network, average, apart
