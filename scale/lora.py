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
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attention import Linear
from motus import Motus

FILE = "lora.safetensors"
FACTORS = ("lora_a", "lora_b")


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
        del layer.weight
        layer.register_buffer("weight", weight.bfloat16() if precision == "bf16" else weight)


def adapt(model: Motus, rank: int, seed: int) -> None:
    """Adapters beside the frozen matrices, in the dtype of what is trained; the same on every
    rank."""
    generator = torch.Generator().manual_seed(seed)
    for layer in maps(model).values():
        drawn = torch.randn(rank, layer.in_features, generator=generator)
        layer.lora_a = nn.Parameter((drawn / math.sqrt(layer.in_features)).to(layer.bias))
        layer.lora_b = nn.Parameter(layer.bias.new_zeros(layer.out_features, rank))
        layer.forward = partial(adapted, layer)


def adapted(layer: Linear, x: Tensor) -> Tensor:
    """x (B, L, in) -> (B, L, out). The sum is one operation, and none of those whose result
    selective checkpointing keeps: it would keep each twice."""
    x = x.to(layer.weight.dtype)
    low = linear(x, layer.lora_a)  # (B, L, rank)
    up = layer.lora_b.mT.expand(len(x), -1, -1)  # (B, rank, out)
    return torch.baddbmm(Linear.forward(layer, x), low, up)


@torch.no_grad()
def merge(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + B A, added in fp32, in the dtype of the factors."""
    return torch.addmm(weight.float(), b.float(), a.float()).to(a.dtype)


def split(model: Motus, ema: Mapping[str, Tensor]) -> tuple[dict, dict, dict[str, Tensor]]:
    """The whole network and the whole average by name, what has to be computed as functions that
    do it, so that one tensor exists at a time; and the frozen matrices, the factors and their
    averages, of which there are none without adapters."""
    network = model.state_dict()
    average = {name: ema.get(name, partial(Tensor.float, x)) for name, x in network.items()}
    apart = {}
    for name in maps(model):
        weight, *factors = (f"{name}.{part}" for part in ("weight", *FACTORS))
        if factors[0] not in network:
            continue
        pair = [network.pop(key) for key in factors]
        mean = [average.pop(key) for key in factors]
        apart |= {weight: network[weight]} | dict(zip(factors, pair))
        apart |= {f"ema.{key}": value for key, value in zip(factors, mean)}
        average[weight] = partial(merge, network[weight], *mean)
        network[weight] = partial(merge, network[weight], *pair)
    return network, average, apart
