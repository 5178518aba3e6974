"""Optical flow between two frames: the `FlowEstimator` interface, a default without weights (DIS),
and DPFlow by hand.

Motus (paper, latent actions) measures motion with DPFlow (Morimitsu et al., CVPR 2025). Its weights
are for research only, so nothing here depends on them: any callable from two batches of frames to a
flow field can stand in its place.

    frames a, b (B, 3, H, W) --pad--> encoder (both images together, same weights at every level)
        fine to coarse  1/4 -> 1/8 -> 1/16 -> 1/32    ConvGRU, then a stage whose blocks let the two
                                                      images see each other
        coarse to fine         1/8 <- 1/16 <- 1/32    the same again, upwards; beside it a stem on
                                                      the shrunken image
        merge of the three, per level                 -> 2 * width matching channels | width context
    decoder, coarse to fine, `iterations` times per level: look up correlations around the current
        flow, GRU, add a residual
    finest flow at 1/8 --convex upsampling--> (B, 2, H, W)

Because the levels share weights their number follows the image: 3 up to about 1 Kpx, one more for
each doubling (`pyramid_levels`). Flow moves pixels of frame a to frame b; channel 0 is x (right),
channel 1 is y (down), in pixels of the input.

Departures from the original
- The mixture-of-Laplace outputs of the flow head are computed but unused: only inference is built.
- Frames smaller than two strides are padded to two; the original divides by zero there.
- Large correlation volumes are made in slices.

Shapes: B batch, C channels, H W frame height and width, h w a level's; `pair` has 2B rows, first
all frames a, then all b.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from weights.files import open_source
from weights.layouts import rename_from
from weights.load import load_into

# -- the interface, and an estimator without weights ----------------------------------------------


class FlowEstimator(Protocol):
    """Anything that measures motion. `name` goes into the header of exported latent actions."""

    name: str

    def __call__(self, frames_a: Tensor, frames_b: Tensor) -> Tensor:
        """Two batches of RGB frames (B, 3, H, W), float in [0, 1] -> flow from a to b (B, 2, H, W),
        float, in pixels."""


def check_frames(frames_a: Tensor, frames_b: Tensor) -> None:
    """Refuses anything but two equal batches of RGB frames, float in [0, 1]."""
    if frames_a.ndim != 4 or frames_a.shape[1] != 3 or frames_a.shape != frames_b.shape:
        raise ValueError(
            f"flow: frames_a {tuple(frames_a.shape)} and frames_b {tuple(frames_b.shape)} must "
            "both be (B, 3, H, W)"
        )
    if not frames_a.is_floating_point() or not frames_b.is_floating_point():
        raise ValueError(
            f"flow: frames are {frames_a.dtype} and {frames_b.dtype}; give floats in [0, 1], for "
            "bytes frames.float() / 255"
        )


class DISFlow:
    """Dense inverse search (Kroeger et al., ECCV 2016) from OpenCV: no weights, some milliseconds a
    pair on a CPU. It needs texture: on plain surfaces the motion smears over the neighbourhood."""

    name = "dis-medium-x1"

    def __init__(self):
        try:
            import cv2
        except ImportError as error:
            raise ImportError(
                "DISFlow needs OpenCV: pip install opencv-python-headless (the extra motus[flow]), "
                "or pass another FlowEstimator"
            ) from error
        self.search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, frames_a: Tensor, frames_b: Tensor) -> Tensor:
        check_frames(frames_a, frames_b)
        size = frames_a.shape[-2:]
        if min(size) < 16:  # OpenCV would end the process
            raise ValueError(
                f"DISFlow: frames of {size[0]} x {size[1]}; expected 16 x 16 or more, enlarge them"
            )
        pairs = zip(self.grey(frames_a), self.grey(frames_b))
        flow = np.stack([self.search.calc(a, b, None) for a, b in pairs])  # (B, H, W, 2)
        flow = rearrange(torch.from_numpy(flow), "b h w two -> b two h w")
        return flow.to(frames_a.device)

    def grey(self, frames: Tensor) -> np.ndarray:
        """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W)."""
        weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
        luma = torch.einsum("bchw,c->bhw", frames.detach().float(), weights) * 255
        return luma.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


# -- DPFlow: sizes and norms ----------------------------------------------------------------------


@dataclass(frozen=True)
class DPFlowConfig:
    """The defaults are the published network, 10,021,508 parameters. Every width is a multiple of
    8, the groups of the norm."""

    stem: tuple[int, int] = (64, 96)  # channels at 1/2 and 1/4 of the image
    width: int = 128  # channels at every level below
    depth: int = 4  # blocks per stage
    radius: int = 4  # correlations are looked up in a window of (2 * radius + 1) squared
    iterations: int = 4  # refinements per level
    levels: int | None = None  # None: by the size of the frames
    volume_limit: int = 2**29  # correlations held at once, 2 GiB in fp32

    def __post_init__(self):
        if any(channels % 8 for channels in (*self.stem, self.width)):
            raise ValueError(
                f"DPFlowConfig: stem={self.stem}, width={self.width}; each must be a multiple of 8"
            )


def pyramid_levels(height: int, width: int) -> int:
    """Published rule: 3 levels for a diagonal up to 1100 pixels, one more for each doubling. The
    coarsest is at 1 / 2**(levels + 2)."""
    diagonal = math.hypot(height, width)
    return 3 + round(math.log2(max(1.0, diagonal / 1100)))


def group_norm(x: Tensor) -> Tensor:
    """The encoder's norm, over the whole map of each of 8 groups of channels. None of the norms has
    weights."""
    return F.group_norm(x, 8, eps=1e-6)


def channel_norm(x: Tensor) -> Tensor:
    """The decoder's norm, over the channels of each position."""
    rows = rearrange(x, "b c h w -> b h w c")
    normed = F.layer_norm(rows, rows.shape[-1:], eps=1e-6)
    return rearrange(normed, "b h w c -> b c h w")


# -- blocks ---------------------------------------------------------------------------------------


def conv(
    channels: int,
    out_channels: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution that leaves height and width alone, or halves them at stride 2."""
    return nn.Conv2d(channels, out_channels, size, stride, size // 2, groups=groups)


class GatedUnit(nn.Module):
    """GELU(gate path) * value path. Each path widens twofold and mixes 7 x 7 neighbours; gate and
    value may come from two tensors."""

    def __init__(self, width: int):
        super().__init__()
        wide = 2 * width
        self.gate_in = conv(width, wide, 1)
        self.value_in = conv(width, wide, 1)
        self.gate_mix = conv(wide, wide, 7, groups=wide)
        self.value_mix = conv(wide, wide, 7, groups=wide)
        self.out = conv(wide, width, 1)

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        gate = self.gate_mix(self.gate_in(gate))
        value = self.value_mix(self.value_in(value))
        return self.out(F.gelu(gate) * value)


class SelfBlock(nn.Module):
    """Cross-gated unit, form for one image (decoder)."""

    norm = staticmethod(channel_norm)

    def __init__(self, width: int):
        super().__init__()
        self.conv_self = GatedUnit(width)
        self.layer_scale = nn.Parameter(torch.full((width,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.layer_scale[:, None, None] * self.conv_self(normed, normed)


class CrossBlock(SelfBlock):
    """Cross-gated unit, form for two images (encoder): each is changed by its own features gated
    with both."""

    norm = staticmethod(group_norm)

    def __init__(self, width: int):
        super().__init__(width)
        self.merge = conv(2 * width, width, 1)
        self.conv_cross = GatedUnit(width)

    def forward(self, pair: Tensor) -> Tensor:
        normed = self.norm(pair)
        a, b = pair.chunk(2)
        own_a, own_b = self.conv_self(normed, normed).chunk(2)
        # The order matters: image a is updated first, and image b then sees the new a, without norm
        # and with its residual.
        a = a + self.cross(own_a, own_b)
        b = b + self.cross(own_b, a)
        return torch.cat([a, b])

    def cross(self, x: Tensor, other: Tensor) -> Tensor:
        gate = self.merge(torch.cat([x, other], dim=1))
        return self.layer_scale[:, None, None] * self.conv_cross(gate, other)


class Stage(nn.Module):
    """A convolution to the right width or stride, or none, blocks of one kind, their norm."""

    def __init__(self, block: type[SelfBlock], config: DPFlowConfig, transition: nn.Module):
        super().__init__()
        self.transition = transition
        self.blocks = nn.Sequential(*(block(config.width) for _ in range(config.depth)))
        self.norm = block.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.transition(x)))


class GRU(nn.Module):
    """Gated recurrent unit over maps; `make` builds the three transforms of (hidden | input), all
    to the width of the hidden state."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.convz = make()
        self.convr = make()
        self.convq = make()

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([hidden, x], dim=1)
        update = torch.sigmoid(self.convz(both))
        reset = torch.sigmoid(self.convr(both))
        candidate = self.convq(torch.cat([reset * hidden, x], dim=1))
        return (1 - update) * hidden + update * torch.tanh(candidate)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with norms; where the block strides, so does a 1 x 1 convolution on
    the skip."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv(channels, out_channels, 3, stride)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.skip = conv(channels, out_channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(group_norm(self.conv1(x)))
        out = F.relu(group_norm(self.conv2(out)))
        if self.skip is not None:
            x = group_norm(self.skip(x))
        return F.relu(out + x)


class Stem(nn.Module):
    """Image (., 3, H, W) -> features (., out_channels, H/4, W/4)."""

    def __init__(self, channels: tuple[int, int], out_channels: int):
        super().__init__()
        half, quarter = channels
        self.conv1 = conv(3, half, 7, stride=2)
        self.blocks = nn.Sequential(
            ResidualBlock(half, half),
            ResidualBlock(half, half),
            ResidualBlock(half, quarter, stride=2),
            ResidualBlock(quarter, quarter),
        )
        self.conv2 = conv(quarter, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(group_norm(self.conv1(x)))
        return self.conv2(self.blocks(x))


# -- encoder --------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Dual pyramid. pair (2B, 3, H, W) in [-1, 1] -> one map (2B, 3 * width, h, w) per level,
    coarse to fine, the finest at 1/8."""

    def __init__(self, config: DPFlowConfig):
        super().__init__()
        width = config.width
        self.stem = Stem(config.stem, 2 * width)
        self.lowres_stem = Stem(config.stem, width)
        self.forward_gru = GRU(lambda: conv(2 * width, width, 3))
        self.backward_gru = GRU(lambda: conv(2 * width, width, 3))
        self.down_gru = conv(width, width, 3, stride=2)
        self.up_gru = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        halve = conv(width, width, 3, stride=2)
        self.rec_stage = Stage(CrossBlock, config, halve)
        self.back_stage = Stage(CrossBlock, config, nn.Identity())
        self.out_merge_conv = conv(3 * width, width, 1)
        self.out_stages = Stage(CrossBlock, config, nn.Identity())
        self.out_1x1 = conv(width, 3 * width, 1)

    def forward(self, pair: Tensor, levels: int) -> list[Tensor]:
        x, hidden = self.stem(pair).chunk(2, dim=1)  # both (2B, width, H/4, W/4)
        hidden = torch.tanh(hidden)
        downward = []  # fine to coarse: 1/8, 1/16, ...
        for level in range(levels):
            if level > 0:
                hidden = torch.tanh(self.down_gru(hidden))
            hidden = self.forward_gru(hidden, x)
            x = self.rec_stage(hidden)
            downward.append(x)

        features = []
        hidden = torch.zeros_like(x)
        for level, x in zip(range(levels, 0, -1), reversed(downward)):
            if features:
                hidden = torch.tanh(self.up_gru(hidden))
            hidden = self.backward_gru(hidden, x)
            upward = self.back_stage(hidden)
            small = F.interpolate(
                pair, scale_factor=0.5**level, mode="bilinear", align_corners=True
            )
            merged = torch.cat([x, upward, self.lowres_stem(small)], dim=1)
            merged = self.out_merge_conv(F.relu(merged))
            features.append(self.out_1x1(self.out_stages(merged)))
        return features


# -- decoder --------------------------------------------------------------------------------------


class Correlation:
    """Scaled dot products of every position of `a` with a window of `b`, both (B, C, h, w). At most
    `volume_limit` products are held at once; where all of them fit, they are made once for all
    readings, else anew at each, slice by slice."""

    def __init__(self, a: Tensor, b: Tensor, config: DPFlowConfig):
        batch, channels, height, width = a.shape
        self.b = b
        self.rows = max(1, config.volume_limit // (batch * height * width))
        rows = rearrange(a, "b c h w -> b (h w) c") / math.sqrt(channels)
        self.slices = rows.split(self.rows, dim=1)
        self.kept = list(map(self.products, self.slices)) if len(self.slices) == 1 else None
        reach = torch.arange(-config.radius, config.radius + 1, device=a.device)
        self.window = torch.cartesian_prod(reach, reach)  # its first axis moves along x

    def products(self, a: Tensor) -> Tensor:
        """a (B, n, C) -> (B * n, 1, h, w), fp32."""
        return torch.einsum("bnc,bchw->bnhw", a, self.b).float().flatten(0, 1)[:, None]

    def __call__(self, target: Tensor) -> Tensor:
        """target (B, 2, h, w): where each position of `a` lands in `b` -> (B, (2 * radius + 1) **
        2, h, w). Bilinear, zero outside."""
        batch, _, height, width = target.shape
        points = rearrange(target, "b two h w -> b (h w) 1 1 two") + self.window
        points = 2 * points / (torch.tensor([width, height], device=target.device) - 1) - 1
        volumes = self.kept or map(self.products, self.slices)
        windows = []
        for volume, places in zip(volumes, points.split(self.rows, dim=1)):
            values = F.grid_sample(volume, places.flatten(0, 1), align_corners=True)
            windows.append(values.view(batch, -1, len(self.window)))
        return rearrange(torch.cat(windows, dim=1), "b (h w) c -> b c h w", h=height)


def two_convolutions(
    channels: int,
    hidden: int,
    out_channels: int,
    kernels: tuple[int, int],
) -> nn.Sequential:
    """A convolution, ReLU and a second convolution."""
    first, second = kernels
    return nn.Sequential(
        conv(channels, hidden, first),
        nn.ReLU(),
        conv(hidden, out_channels, second),
    )


class MotionEncoder(nn.Module):
    """Correlations (B, window, h, w) and flow (B, 2, h, w) -> motion features (B, width, h, w), the
    last two of them the flow itself."""

    def __init__(self, window: int, width: int):
        super().__init__()
        half = width // 2
        self.seen = two_convolutions(window, 2 * width, width + half, (1, 3))
        self.known = two_convolutions(2, width, half, (7, 3))
        self.conv = conv(2 * width, width - 2, 3)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        both = torch.cat([self.seen(correlation), self.known(flow)], dim=1)
        motion = self.conv(F.relu(both))
        return torch.cat([F.relu(motion), flow], dim=1)


class Update(nn.Module):
    """One refinement. The same weights serve every level and every iteration."""

    def __init__(self, config: DPFlowConfig):
        super().__init__()
        width = config.width
        self.motion = MotionEncoder((2 * config.radius + 1) ** 2, width)
        self.gru = GRU(lambda: Stage(SelfBlock, config, conv(3 * width, width, 1)))
        # Two channels of flow; four describe its uncertainty, for training.
        self.flow_head = two_convolutions(width, 2 * width, 6, (3, 3))
        self.mask = two_convolutions(width, 2 * width, 9 * 8 * 8, (3, 1))

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        correlation: Tensor,
        flow: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """-> new hidden state (B, width, h, w), residual of the flow (B, 2, h, w)."""
        dtype = hidden.dtype
        motion = self.motion(correlation.to(dtype), flow.to(dtype))
        hidden = self.gru(hidden, torch.cat([context, motion], dim=1))
        return hidden, self.flow_head(hidden)[:, :2]


def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """flow (B, 2, h, w), mask (B, 9 * 64, h, w) -> (B, 2, 8h, 8w): each new pixel is a convex
    mixture of its 3 x 3 coarse neighbours."""
    weights = rearrange(mask.float(), "b (nine fy fx) h w -> b 1 nine fy fx h w", nine=9, fy=8)
    patches = rearrange(
        F.unfold(flow, 3, padding=1),
        "b (two nine) (h w) -> b two nine 1 1 h w",
        nine=9,
        h=flow.shape[2],
    )
    mixed = (weights.softmax(dim=2) * patches).sum(dim=2)
    return rearrange(mixed, "b two fy fx h w -> b two (h fy) (w fx)")


# -- the whole ------------------------------------------------------------------------------------


class DPFlow(nn.Module):
    """DPFlow, a FlowEstimator. Run it under torch.no_grad(): the gradient is cut before each
    iteration, as in its training."""

    name = "dpflow"

    def __init__(self, config: DPFlowConfig = DPFlowConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.update = Update(config)

    def forward(self, frames_a: Tensor, frames_b: Tensor) -> Tensor:
        """Frames (B, 3, H, W), RGB float in [0, 1], any H and W -> flow from a to b (B, 2, H, W),
        fp32, in pixels."""
        check_frames(frames_a, frames_b)
        height, width = frames_a.shape[-2:]
        levels = self.config.levels or pyramid_levels(height, width)
        stride = 2 ** (levels + 2)
        # At least two positions at the coarsest level, because grid_sample divides by one less than
        # their number.
        padded = [max(2, math.ceil(side / stride)) * stride for side in (height, width)]
        top = (padded[0] - height) // 2
        left = (padded[1] - width) // 2
        sides = (left, padded[1] - width - left, top, padded[0] - height - top)
        pair = torch.cat([frames_a, frames_b]).to(self.encoder.out_1x1.weight.dtype)
        pair = F.pad(2 * pair - 1, sides, mode="replicate")

        flow = None
        for features in self.encoder(pair, levels):  # (2B, 3 * width, h, w), coarse to fine
            flow, hidden = self.refine(features, flow)
        flow = convex_upsample(8 * flow, self.update.mask(hidden))
        return flow[:, :, top : top + height, left : left + width]

    def refine(self, features: Tensor, flow: Tensor | None) -> tuple[Tensor, Tensor]:
        """One level: features of both frames, flow of the level above at half the size -> flow of
        this level, hidden state."""
        matching, extra = features.split([2 * self.config.width, self.config.width], dim=1)
        # Each frame gives half of the context and half of the first hidden state; only the flow is
        # carried from level to level.
        halves = "(frame b) (two c) h w -> two b (frame c) h w"
        context, hidden = rearrange(extra, halves, frame=2, two=2)
        context = F.relu(context)
        hidden = torch.tanh(hidden)
        correlation = Correlation(*matching.chunk(2), self.config)
        size = context.shape[2:]
        rows, columns = (torch.arange(side, device=features.device) for side in size)
        # (2, h, w), fp32 in a sum with flow: bf16 cannot count to a wide row's end.
        here = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        if flow is None:
            flow = torch.zeros(len(context), 2, *size, device=features.device)
        else:
            flow = F.interpolate(2 * flow, size, mode="bilinear", align_corners=True)
        for _ in range(self.config.iterations):
            flow = flow.detach()
            hidden, residual = self.update(hidden, context, correlation(here + flow), flow)
            flow = flow + residual
        return flow, hidden


def load_dpflow(path: str | Path, config: DPFlowConfig = DPFlowConfig()) -> DPFlow:
    """DPFlow with the weights of a published .ckpt, in eval mode. ValueError if any tensor is
    missing, unexpected or of another shape."""
    model = DPFlow(config)
    with open_source(path) as source:
        load_into(model, source, rename_from("dpflow"))
    return model.eval()
