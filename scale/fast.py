"""Speed from outside: what no one needs to understand or to run the model, and what wraps one.

- `compile_sampler`: each step of the sampler is one static graph, a CUDA graph if asked for.
- `sample_action_first`: a few joint steps, then the action expert alone. An approximation.
- `quantise`: the video expert in int8, for cards of 24 GB.

A wrapped model is a shallow copy: the same modules and weights behind another forward pass; the
model itself stays as it is. What each brings is measured in docs/speed.md.

Shapes: B batch, L tokens, N heads, K head size, S actions of a chunk, A action dimensions.
"""

from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flow
from attention import Linear, joint_attention
from backbones.wan import modulations
from motus import Conditioning, Inputs, Layer, Motus, Prediction, Timesteps

# -- static graphs --------------------------------------------------------------------------------

BUCKET = 32


def compile_sampler(model: Motus, **options) -> Motus:
    """A model whose `sample` runs each step as one static graph: torch.compile with `options`
    (on a GPU mode="reduce-overhead" makes it a CUDA graph). One graph serves all five modes;
    another batch size or bucket of lengths compiles again."""
    wrapped = copy(model)

    def conditioning(inputs: Inputs, cache: bool = False) -> Conditioning:
        return model.conditioning(padded(inputs), cache)

    wrapped.conditioning = conditioning
    wrapped.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **options)
    return wrapped


def padded(inputs: Inputs, bucket: int = BUCKET) -> Inputs:
    """Text and understanding padded to multiples of `bucket`, so that few lengths occur. Changes no
    result: what is added is masked, and of the text one padded row stands for all (it is
    `WanModel.embed_text` that adds it, hence one row less here)."""
    missing = -(inputs.context.shape[1] + 1) % bucket
    inputs = replace(inputs, context=F.pad(inputs.context, (0, 0, 0, missing)))
    und = inputs.und
    if und is None:
        return inputs
    mask = inputs.und_mask
    if mask is None:
        mask = torch.ones_like(und[..., 0], dtype=torch.bool)
    missing = -und.shape[1] % bucket
    return replace(inputs, und=F.pad(und, (0, 0, 0, missing)), und_mask=F.pad(mask, (0, missing)))


# -- actions first --------------------------------------------------------------------------------


def sample_action_first(
    model: Motus, inputs: Inputs, mode: str = "joint", steps: int = 2, joint: int = 1, **options
) -> Prediction:
    """`Motus.sample` (and its `options`) in which only the first `joint` of the `steps` run all
    experts. After them the actions go on alone, while the keys and values that video and
    understanding showed last are held: the video is not finished, so none is returned. With joint 0
    they come from one look of the video at its noise, without the actions, which training never
    shows. Runs uncompiled."""
    if flow.mode_named(mode).action != flow.DENOISE or not 0 <= joint <= steps:
        modes = [name for name, row in flow.MODES.items() if row.action == flow.DENOISE]
        raise ValueError(
            f"joint is {joint} in mode {mode} of {steps} steps; expected 0 to {steps}, in a mode "
            f"that denoises actions: {', '.join(modes)}"
        )
    wrapped = copy(model)
    wrapped.forward = ActionFirst(model, joint)
    video, actions = wrapped.sample(inputs, mode, steps, **options)
    return Prediction(video if joint == steps else None, actions)


class ActionFirst:
    """A forward pass that runs all experts in its first `joint` calls, and in later ones the action
    expert alone, whose tokens attend to the keys and values that the others showed last."""

    def __init__(self, model: Motus, joint: int):
        self.joint = joint
        self.calls = 0
        self.model = copy(model)
        self.model.__dict__.pop("forward", None)  # of `compile_sampler`
        self.model.layers = [
            Layer(holding(layer.video), layer.action, holding(layer.und), layer.last)
            for layer in model.layers
        ]

    def __call__(
        self, video: Tensor, action: Tensor, time: Timesteps, shared: Conditioning
    ) -> tuple[Tensor | None, Tensor]:
        self.calls += 1
        if self.calls <= self.joint:
            return self.model(video, action, time, shared)
        if self.calls == 1:
            self.model(video, None, time, shared)
        return None, self.act(action, time, shared)

    def act(self, action: Tensor, time: Timesteps, shared: Conditioning) -> Tensor:
        """The velocity (B, S, A) of the actions alone."""
        expert = self.model.action
        if shared.action_mask is not None:
            action = action * shared.action_mask
        x = expert.embed(action, shared.state, shared.positions)
        for layer in self.model.layers:
            mod, ffn_mod = modulations(layer.action.modulation, time.action)
            qkv = [layer.video.held, layer.action.pre_attention(x, mod)]
            biases = [None, shared.action_bias]
            if shared.und is not None:
                qkv.append(layer.und.held)
                biases.append(shared.und_bias)
            attended = joint_attention(qkv, biases)
            x = layer.action.post_attention(x, attended[1], mod, ffn_mod)
        return expert.actions_of(expert.decoder(x, time.action_end))


def holding(block: nn.Module) -> nn.Module:
    """A block of an expert that holds the keys and values it projected last, with no queries, as
    `held` (B, 0 and 2 x L, N, K)."""
    wrapped = copy(block)

    def pre_attention(*args) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = block.pre_attention(*args)
        wrapped.held = (v[:, :0], k, v)
        return q, k, v

    wrapped.pre_attention = pre_attention
    return wrapped


# -- int8 weights ---------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear map with its weight stored in int8 and a scale per row, for memory: it multiplies in
    the dtype the weight had before."""

    def __init__(self, linear: Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        smallest = torch.finfo(torch.float32).tiny
        scale = weight.abs().amax(dim=1).clamp(min=smallest) / 127
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self.dtype), self.weight.to(self.dtype))
        y = y * self.scale  # one scale per row may wait until after the sum
        return (y if self.bias is None else y + self.bias).to(self.dtype)


def quantise(model: Motus) -> Motus:
    """Stores the linear maps of the video expert's blocks in int8, in place and one after the
    other, so that the memory needed only falls."""
    for module in model.video.blocks.modules():
        for name, child in module.named_children():
            if type(child) is Linear:
                setattr(module, name, Int8Linear(child))
    return model
