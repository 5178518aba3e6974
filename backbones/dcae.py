"""DC-AE, the deep-compression autoencoder that turns a flow picture into four tokens (Chen et al.,
arXiv 2410.10733).

Motus (paper, latent actions) describes a flow picture by four 512-d tokens. Of the published DC-AEs
only f128c512 has 512 latent channels, and a 256 x 256 picture is the one that gives it 2 x 2
positions:

    picture (B, 3, 256, 256) in [-1, 1]
      conv_in   stage 1   2       3       4       5       6       7       conv_out
                128       64      32      16      8       4       2       2         pixels
                256       512     512     1024    1024    2048    2048    512       channels
                res x4    res x8  vit x2  vit x2  vit x2  vit x2  vit x2
      -> latent (B, 512, 2, 2) -> the same way back (res x5, res x10), without a clamp at the end.

It is a plain autoencoder: one picture has one latent, and the only variational part of Motus is the
14-d bottleneck behind it. Three conventions bite:
- Attention slices [q; k; v] into groups of 3 * head_dim consecutive channels, so the query of one
  group may be made of what published files call values. The weights only mean something with
  exactly this slicing.
- The decoder's residual stages normalise with batch statistics. The model stays in eval mode while
  one trains through it.
- Latents are not scaled here. The published factors (0.4883 for "in" files, 0.3620 for "mix") are
  constants, and whoever consumes latents whitens them per feature anyway.

Departures from the original
- Only the layouts with an empty stage 0 are built (all "in" and "mix" files), not the "sana" ones
  with a multi-scale attention branch.
- Attention is always summed in linear order; the original takes the quadratic one where positions
  are few. The two agree up to rounding.

Tensor names are those of diffusers (`weights.layouts.canonical` translates the original ones).
Published weights and code are Apache-2.0.

Shapes: B batch, C channels, H W height and width, L = H * W positions, N attention groups, K
head_dim.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn


@dataclass(frozen=True)
class DCAEConfig:
    """Sizes of encoder and decoder, those of the published f128c512 by default; stage s = 1, 2, ...
    works at 1 / 2**s of the picture."""

    # channels of stages 1, 2, ..., the same on the way down and up
    widths: tuple[int, ...] = (256, 512, 512, 1024, 1024, 2048, 2048)
    encoder_depths: tuple[int, ...] = (4, 8, 2, 2, 2, 2, 2)  # blocks per stage
    decoder_depths: tuple[int, ...] = (5, 10, 2, 2, 2, 2, 2)
    latent_channels: int = 512
    conv_stages: int = 2  # the first so many stages are convolutional, the rest attend
    head_dim: int = 32

    def __post_init__(self):
        if not len(self.widths) == len(self.encoder_depths) == len(self.decoder_depths):
            raise ValueError(
                f"DCAEConfig: {len(self.widths)} widths, {len(self.encoder_depths)} encoder_depths "
                f"and {len(self.decoder_depths)} decoder_depths; give one of each per stage"
            )
        if self.widths[-1] % self.latent_channels:
            raise ValueError(
                f"DCAEConfig: latent_channels={self.latent_channels} must divide the last width "
                f"{self.widths[-1]}: the shortcut around the latent averages whole groups of it"
            )
        for stage, width in enumerate(self.widths, start=1):
            if stage > self.conv_stages and width % self.head_dim:
                raise ValueError(
                    f"DCAEConfig: width {width} of stage {stage} must be a multiple of "
                    f"head_dim={self.head_dim}"
                )

    @property
    def factor(self) -> int:
        """Pixels of the picture per position of the latent, along one side."""
        return 2 ** len(self.widths)


class ChannelRMSNorm(nn.Module):
    """Each position divided by the root mean square of its channels, taken in fp32; then weight and
    bias. (B, C, H, W) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        normed = x * torch.rsqrt(mean_square + 1e-5)
        scaled = normed.to(x.dtype) * self.weight[:, None, None]
        return scaled + self.bias[:, None, None]


class ResBlock(nn.Module):
    """conv, activation, conv, norm, plus the input. The decoder's form has ReLU and batch norm, the
    encoder's SiLU and RMS norm."""

    def __init__(self, channels: int, decoder: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.ReLU() if decoder else nn.SiLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels) if decoder else ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.conv1(x))
        return x + self.norm(self.conv2(hidden))


class LinearAttention(nn.Module):
    """ReLU attention without softmax, plus the input. (B, C, H, W) -> same.

    With positive features the weights k.q need only be divided by their sum, so the sum over
    positions is taken before the query enters, at a cost linear in L.
    """

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        linear = partial(nn.Conv2d, channels, channels, 1, bias=False)
        self.to_q = linear()
        self.to_k = linear()
        self.to_v = linear()
        self.to_out = linear()
        self.norm_out = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        projected = [self.to_q(x), self.to_k(x), self.to_v(x)]
        mixed = torch.cat(projected, dim=1).float()
        groups = "b (n three k) h w -> three b n k (h w)"
        q, k, v = rearrange(mixed, groups, three=3, k=self.head_dim)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)  # (B, N, K + 1, L): the row of ones sums the weights
        summary = v @ F.relu(k).mT  # (B, N, K + 1, K)
        values, weight = (summary @ F.relu(q)).split([self.head_dim, 1], dim=2)
        out = (values / (weight + 1e-15)).to(x.dtype)
        out = rearrange(out, "b n k (h w) -> b (n k) h w", h=x.shape[2])
        return x + self.norm_out(self.to_out(out))


class GatedConv(nn.Module):
    """The feed-forward half: widen eightfold, mix 3 x 3 neighbours, gate one half by the other,
    plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_inverted = nn.Conv2d(channels, 8 * channels, 1)
        self.conv_depth = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.conv_point = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.conv_inverted(x))
        value, gate = self.conv_depth(hidden).chunk(2, dim=1)
        mixed = self.conv_point(value * F.silu(gate))
        return x + self.norm(mixed)


class ViTBlock(nn.Sequential):
    """EfficientViT block: attention over all positions, then the gated convolution."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.attn = LinearAttention(channels, head_dim)
        self.conv_out = GatedConv(channels)


def average_channels(x: Tensor, group: int) -> Tensor:
    """Mean over each `group` consecutive channels."""
    return reduce(x, "b (c group) h w -> b c h w", "mean", group=group)


class Down(nn.Module):
    """(B, C, H, W) -> (B, C', H/2, W/2): each 2 x 2 square moves into channels, beside it a
    shortcut that averages channels."""

    def __init__(self, channels: int, out_channels: int, shortcut: bool = True):
        super().__init__()
        if out_channels % 4 or (shortcut and 4 * channels % out_channels):
            raise ValueError(
                f"DCAEConfig.widths: {channels} -> {out_channels} cannot go down; the second must "
                "be a multiple of 4 and divide 4 times the first"
            )
        self.conv = nn.Conv2d(channels, out_channels // 4, 3, padding=1)
        self.group = 4 * channels // out_channels if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_unshuffle(self.conv(x), 2)
        if not self.group:
            return out
        shortcut = average_channels(F.pixel_unshuffle(x, 2), self.group)
        return out + shortcut


class Up(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W): the mirror image of Down, which has refused
    widths that do not fit; the shortcut repeats channels."""

    def __init__(self, channels: int, out_channels: int, shortcut: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * out_channels, 3, padding=1)
        self.group = 4 * out_channels // channels if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        out = F.pixel_shuffle(self.conv(x), 2)
        if not self.group:
            return out
        shortcut = F.pixel_shuffle(x.repeat_interleave(self.group, dim=1), 2)
        return out + shortcut


def stage_blocks(config: DCAEConfig, stage: int, depth: int, decoder: bool) -> list[nn.Module]:
    """`depth` blocks of the kind that stage `stage` (counted from 1) is made of."""
    width = config.widths[stage - 1]
    if stage <= config.conv_stages:
        return [ResBlock(width, decoder) for _ in range(depth)]
    return [ViTBlock(width, config.head_dim) for _ in range(depth)]


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> latent (B, latent_channels, H / factor, W / factor)."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = Down(3, widths[0], shortcut=False)
        # Stage 0, full resolution, has no blocks in any layout built here.
        self.down_blocks = nn.Sequential(nn.Sequential())
        for stage, depth in enumerate(config.encoder_depths, start=1):
            blocks = stage_blocks(config, stage, depth, decoder=False)
            if stage < len(widths):
                blocks.append(Down(widths[stage - 1], widths[stage]))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.group = widths[-1] // config.latent_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_blocks(self.conv_in(x))
        return self.conv_out(x) + average_channels(x, self.group)


class Decoder(nn.Module):
    """Latent (B, latent_channels, h, w) -> picture (B, 3, h * factor, w * factor), unclamped."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.group = widths[-1] // config.latent_channels
        # Indexed by stage, like the encoder's, and run from last to first.
        self.up_blocks = nn.ModuleList([nn.Sequential()])
        for stage, depth in enumerate(config.decoder_depths, start=1):
            blocks = []
            if stage < len(widths):
                blocks.append(Up(widths[stage], widths[stage - 1]))
            blocks += stage_blocks(config, stage, depth, decoder=True)
            self.up_blocks.append(nn.Sequential(*blocks))
        self.norm_out = ChannelRMSNorm(widths[0])
        self.conv_out = Up(widths[0], 3, shortcut=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z) + z.repeat_interleave(self.group, dim=1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(F.relu(self.norm_out(x)))


class DCAE(nn.Module):
    """The two halves; `encode` and `decode` are each other's approximate inverse."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], sides multiples of `config.factor` -> latents (B, C, H
        / factor, W / factor)."""
        factor = self.config.factor
        channels, height, width = pictures.shape[-3:]
        if pictures.ndim != 4 or channels != 3 or height % factor or width % factor:
            raise ValueError(
                f"DCAE.encode: pictures have shape {tuple(pictures.shape)}; expected (B, 3, H, W) "
                f"with H and W multiples of {factor}. Resize the flow field, scale its vectors, "
                "colour it afterwards"
            )
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, h * factor, w * factor), about [-1, 1] but not
        clamped."""
        return self.decoder(latents)
