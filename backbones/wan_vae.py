"""Wan vae."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from attention import attention

# -- the video VAE --------------------------------------------------------------------------------
#
#   encoder   2 x 2 patches -> conv -> levels of residual blocks, all but the last halving the picture -> attention -> mean, log variance
#   decoder   latents -> conv -> attention -> the same levels backwards -> conv -> 2 x 2 patches
#
# Convolutions over time are causal, and frame 0 is a latent frame by itself while each later one stands for `stride[0]` frames. So a clip
# can pass in one piece (fast, the default) or in chunks, frame 0 and then one latent frame's worth at a time, in the memory of one chunk.
# Both give the same numbers: `Past` carries from chunk to chunk what the layers must remember, and there is no other difference.
# Tensor names are those of Wan2.2_VAE.pth. Shapes as above, with F H W frames, height and width of the video.


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the video VAE and the statistics of its latents; the defaults are Wan2.2."""

    dim: int = 160  # encoder width at level 0
    dec_dim: int = 256  # decoder width at level 0
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (
        1,
        2,
        4,
        4,
    )  # width of each level; each but the last halves the picture
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    temporal_downsample: tuple[bool, ...] = (
        False,
        True,
        True,
    )  # per level but the last: does it halve time too
    mean: tuple[float, ...] = (
        -0.2289,
        -0.0052,
        -0.1323,
        -0.2339,
        -0.2799,
        0.0174,
        0.1838,
        0.1557,
        -0.1382,
        0.0542,
        0.2813,
        0.0891,
        0.1570,
        -0.0098,
        0.0375,
        -0.1825,
        -0.2246,
        -0.1207,
        -0.0698,
        0.5109,
        0.2665,
        -0.2108,
        -0.2158,
        0.2502,
        -0.2055,
        -0.0322,
        0.1109,
        0.1567,
        -0.0729,
        0.0899,
        -0.2799,
        -0.1230,
        -0.0313,
        -0.1649,
        0.0117,
        0.0723,
        -0.2839,
        -0.2083,
        -0.0520,
        0.3748,
        0.0152,
        0.1957,
        0.1433,
        -0.2944,
        0.3573,
        -0.0548,
        -0.1681,
        -0.0667,
    )
    std: tuple[float, ...] = (
        0.4765,
        1.0364,
        0.4514,
        1.1677,
        0.5313,
        0.4990,
        0.4818,
        0.5013,
        0.8158,
        1.0344,
        0.5894,
        1.0901,
        0.6885,
        0.6165,
        0.8454,
        0.4978,
        0.5759,
        0.3523,
        0.7135,
        0.6804,
        0.5833,
        1.4146,
        0.8986,
        0.5659,
        0.7069,
        0.5338,
        0.4889,
        0.4917,
        0.4069,
        0.4999,
        0.6866,
        0.4093,
        0.5709,
        0.6065,
        0.6415,
        0.4944,
        0.5726,
        1.2042,
        0.5458,
        1.6887,
        0.3971,
        1.0600,
        0.3943,
        0.5537,
        0.5444,
        0.4089,
        0.7468,
        0.7744,
    )

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"VAE temporal_downsample has {len(self.temporal_downsample)} entries for {len(self.dim_mult)} levels of "
                "dim_mult; give one for each level but the last"
            )
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(
                f"VAE mean and std have {len(self.mean)} and {len(self.std)} entries; give z_dim = {self.z_dim} of each"
            )


WAN_VAE_PRESETS = {"wan2.2": WanVAEConfig()}


class Past:
    """What the chunks of a clip leave behind for the next one: the last frames that each layer saw."""

    def __init__(self, keep: bool):
        self.keep, self.first, self.frames = keep, True, {}  # first: the chunk begins with frame 0

    def extend(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """x (B, C, T, H, W) behind the up to `count` frames that `layer` saw last."""
        if layer in self.frames:
            x = torch.cat([self.frames[layer], x], dim=2)
        if self.keep:
            self.frames[layer] = x[:, :, -count:].clone(memory_format=torch.channels_last_3d)
        return x


class Temporal:
    """Marks the layers that are called as layer(x, past)."""


class Chain(nn.Sequential, Temporal):
    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self:
            x = layer(x, past) if isinstance(layer, Temporal) else layer(x)
        return x


class CausalConv3d(nn.Conv3d, Temporal):
    """A 3-D convolution that sees no later frame; before frame 0 it sees zeros."""

    def forward(self, x: Tensor, past: Past) -> Tensor:  # (B, C, T, H, W) -> (B, C', T, H, W)
        seen = past.extend(self, x, self.kernel_size[0] - 1)
        taps = min(self.kernel_size[0], seen.shape[2])  # the others would only read zeros
        zeros = taps - 1 - (seen.shape[2] - x.shape[2])
        seen = F.pad(seen, (0, 0, 0, 0, zeros, 0)) if zeros else seen
        return F.conv3d(seen, self.weight[:, :, -taps:], self.bias, padding=(0, *self.padding[1:]))


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels. Unlike in `RMSNorm` nothing is added to |x|, it
    only has a floor (1e-12)."""

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        mean_square = (
            x.float().square().mean(dim=1, keepdim=True)
        )  # much faster on a CPU than a norm over axis 1
        return x * mean_square.clamp(min=1e-24 / x.shape[1]).rsqrt().to(x.dtype) * self.gamma


class ResidualBlock(nn.Module, Temporal):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.residual = Chain(
            ChannelNorm(n_in),
            nn.SiLU(),
            CausalConv3d(n_in, n_out, 3, padding=1),
            ChannelNorm(n_out),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(n_out, n_out, 3, padding=1),
        )
        self.shortcut = nn.Conv3d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.residual(x, past) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Attention of one head among the positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, H, W)
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(
            self.to_qkv(self.norm(frames)), "f (three c) h w -> three f (h w) 1 c", three=3
        )
        attended = rearrange(attention(q, k, v), "f (h w) 1 c -> f c h w", h=h)
        return x + rearrange(self.proj(attended), "(b t) c h w -> b c t h w", b=b)


class Resample(nn.Module, Temporal):
    def per_frame(self, x: Tensor) -> Tensor:
        return rearrange(
            self.resample(rearrange(x, "b c t h w -> (b t) c h w")),
            "(b t) c h w -> b c t h w",
            b=len(x),
        )


class Downsample(Resample):
    """Halves height and width, then time: frame 0 stays, and a convolution over (0, 1, 2), (2, 3,
    4), ... makes the others."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2)
        )  # pads right and bottom only
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(
        self, x: Tensor, past: Past
    ) -> Tensor:  # (B, C, 1+2n, H, W) -> (B, C, 1+n, H/2, W/2)
        x = self.per_frame(x)
        if self.time_conv is None:
            return x
        seen = past.extend(self, x, 1)
        halved = self.time_conv(seen) if seen.shape[2] > 1 else x[:, :, :0]
        return torch.cat([x[:, :, :1], halved], dim=2) if past.first else halved


class Upsample(Resample):
    """Doubles time, then height and width: frame 0 stays, and the convolution that makes two frames
    of each later one does not see it."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:  # (B, C, 1+n, H, W) -> (B, C, 1+2n, 2H, 2W)
        if self.time_conv is not None:
            frame_0, x = x[:, :, : int(past.first)], x[:, :, int(past.first) :]
            if x.shape[2]:
                x = rearrange(self.time_conv(x, past), "b (two c) t h w -> b c (t two) h w", two=2)
            x = torch.cat([frame_0, x], dim=2)
        return self.per_frame(x)


class DownLevel(nn.Module, Temporal):
    """Residual blocks and, unless `temporal` is None, a Downsample. The shortcut folds the same
    pixels into channels and averages groups of these down to n_out; where all of them are fewer
    than n_out it repeats them (no published size needs that)."""

    def __init__(self, n_in: int, n_out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.n_out, self.ft, self.fs = n_out, 1 + bool(temporal), 1 + (temporal is not None)
        self.downsamples = Chain(
            *(ResidualBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks)),
            *([] if temporal is None else [Downsample(n_out, temporal)]),
        )

    def forward(self, x: Tensor, past: Past) -> Tensor:
        shortcut = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ft, 0))
        shortcut = rearrange(
            shortcut,
            "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w",
            ft=self.ft,
            fh=self.fs,
            fw=self.fs,
        )
        shortcut = repeat(
            shortcut, "b c t h w -> b (c r) t h w", r=max(1, self.n_out // shortcut.shape[1])
        )
        return self.downsamples(x, past) + reduce(
            shortcut, "b (c g) t h w -> b c t h w", "mean", c=self.n_out
        )


class UpLevel(nn.Module, Temporal):
    """Residual blocks and, unless `temporal` is None, an Upsample and a shortcut that repeats
    channels and unfolds them into pixels."""

    def __init__(self, n_in: int, n_out: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.temporal, self.repeats = temporal, n_out * 4 * (1 + bool(temporal)) // n_in
        self.upsamples = Chain(
            *(ResidualBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks)),
            *([] if temporal is None else [Upsample(n_out, temporal)]),
        )

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = self.upsamples(x, past)
        if self.temporal is None:
            return y
        shortcut = repeat(x, "b c t h w -> b (c r) t h w", r=self.repeats)
        shortcut = rearrange(
            shortcut,
            "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)",
            ft=1 + self.temporal,
            fh=2,
            fw=2,
        )
        return y + (
            shortcut[:, :, int(self.temporal) :] if past.first else shortcut
        )  # frame 0 becomes one frame, not two


def middle(dim: int) -> Chain:
    return Chain(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def head(dim: int, n_out: int) -> Chain:
    return Chain(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, n_out, 3, padding=1))


def encoder(config: WanVAEConfig) -> Chain:
    widths = [config.dim * mult for mult in (1, *config.dim_mult)]
    levels = zip(widths, widths[1:], (*config.temporal_downsample, None))
    return Chain(
        OrderedDict(
            conv1=CausalConv3d(12, widths[0], 3, padding=1),
            downsamples=Chain(
                *(
                    DownLevel(n_in, n_out, config.num_res_blocks, temporal)
                    for n_in, n_out, temporal in levels
                )
            ),
            middle=middle(widths[-1]),
            head=head(widths[-1], 2 * config.z_dim),
        )
    )


def decoder(config: WanVAEConfig) -> Chain:
    widths = [config.dec_dim * mult for mult in (config.dim_mult[-1], *config.dim_mult[::-1])]
    levels = zip(widths, widths[1:], (*config.temporal_downsample[::-1], None))
    return Chain(
        OrderedDict(
            conv1=CausalConv3d(config.z_dim, widths[0], 3, padding=1),
            middle=middle(widths[0]),
            upsamples=Chain(
                *(
                    UpLevel(n_in, n_out, config.num_res_blocks + 1, temporal)
                    for n_in, n_out, temporal in levels
                )
            ),
            head=head(widths[-1], 12),
        )
    )


class WanVAE(nn.Module):
    """Video (B, 3, F, H, W) in [-1, 1] to latents (B, z, T, h, w) and back, F = 1 +
    stride[0]*(T-1), H = stride[1]*h, W = stride[1]*w. Computes in the dtype of its weights
    (published and recommended: fp32) and returns fp32."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.conv1, self.conv2 = (
            nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1),
            nn.Conv3d(config.z_dim, config.z_dim, 1),
        )

    @property
    def stride(self) -> tuple[int, int]:
        """Frames and pixels per latent position."""
        return 2 ** sum(self.config.temporal_downsample), 2 ** len(self.config.dim_mult)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents, (z, 1, 1, 1) on the device of x. They are in no weight file."""
        return tuple(
            torch.tensor(values, device=x.device).view(-1, 1, 1, 1)
            for values in (self.config.mean, self.config.std)
        )

    def through(self, network: Chain, x: Tensor, sizes: int | list[int]) -> Iterator[Tensor]:
        """The outputs of `network` for x (B, C, T, H, W) cut in time into chunks of `sizes`."""
        x = x.to(
            network.conv1.weight.dtype, memory_format=torch.channels_last_3d
        )  # small convolutions run faster so
        chunks = x.split(sizes, dim=2)
        past = Past(keep=len(chunks) > 1)
        for chunk in chunks:
            yield network(chunk, past)
            past.first = False

    def posterior(self, video: Tensor, chunked: bool = False) -> tuple[Tensor, Tensor]:
        """video (B, 3, F, H, W) in [-1, 1] -> mean and log variance (B, z, T, h, w), not
        normalised, differentiable."""
        (ft, fs), (frames, height, width) = self.stride, video.shape[2:]
        if video.shape[1] != 3 or (frames - 1) % ft or height % fs or width % fs:
            raise ValueError(
                f"video has shape {tuple(video.shape)}; the VAE needs (B, 3, 1 + {ft}n, {fs}h, {fs}w): cut or resize it"
            )
        sizes = [1] + [ft] * ((frames - 1) // ft) if chunked else frames
        # The column of a pixel in its 2 x 2 patch is the outer part of the channel index, the row
        # the inner one.
        patches = rearrange(video, "b c f (h row) (w col) -> b (c col row) f h w", row=2, col=2)
        features = torch.cat(list(self.through(self.encoder, patches, sizes)), dim=2)
        return self.conv1(features).float().chunk(2, dim=1)

    def encode(self, video: Tensor, chunked: bool = False) -> Tensor:
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, z, T, h, w), the posterior's mean
        normalised. Latent frame 0 depends on frame 0 alone. `chunked` bounds memory by `stride[0]`
        frames."""
        mean, std = self.statistics(video)
        return (self.posterior(video, chunked)[0] - mean) / std

    def decode_frames(self, latents: Tensor, clamp: bool = True, size: int = 1) -> Iterator[Tensor]:
        """Decodes `size` latent frames at a time: yields (B, 3, F', H, W), in the memory of one
        such chunk."""
        if latents.shape[1] != self.config.z_dim:
            raise ValueError(
                f"latents have {latents.shape[1]} channels; this VAE has z_dim = {self.config.z_dim}"
            )
        mean, std = self.statistics(latents)
        features = self.conv2((latents * std + mean).to(self.conv2.weight.dtype))
        for patches in self.through(self.decoder, features, size):
            video = rearrange(
                patches, "b (c col row) f h w -> b c f (h row) (w col)", row=2, col=2
            ).float()
            yield video.clamp(-1, 1) if clamp else video

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """latents (B, z, T, h, w), normalised -> video (B, 3, F, H, W), in [-1, 1] if `clamp`,
        differentiable."""
        return next(self.decode_frames(latents, clamp, size=latents.shape[2]))
