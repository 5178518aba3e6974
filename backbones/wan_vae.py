"""The video VAE of Wan2.2 by hand: clips to latents and back.

    encoder   2 x 2 patches -> conv -> levels of residual blocks, all but the last halving the
              picture -> attention -> mean, log variance
    decoder   latents -> conv -> attention -> the same levels backwards -> conv -> 2 x 2 patches

Convolutions over time are causal, and frame 0 is a latent frame by itself while each later one
stands for `stride[0]` frames: the latent of an observation does not depend on what follows it.
Latents are normalised by constants that stand in the configuration and in no weight file.

Departure from the official code: a clip passes in one piece; it passes in chunks of one latent
frame, which gives the same numbers. Tensor names are those of Wan2.2_VAE.pth.

Shapes: B batch, C channels, F H W frames, height and width of the video, T h w those of the latent;
inside the network T H W are those of the level.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from attention import attention

# Mean and standard deviation of each latent channel, as published.
MEAN = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799  0.0174  0.1838  0.1557 -0.1382  0.0542  0.2813  0.0891
     0.1570 -0.0098  0.0375 -0.1825 -0.2246 -0.1207 -0.0698  0.5109  0.2665 -0.2108 -0.2158  0.2502
    -0.2055 -0.0322  0.1109  0.1567 -0.0729  0.0899 -0.2799 -0.1230 -0.0313 -0.1649  0.0117  0.0723
    -0.2839 -0.2083 -0.0520  0.3748  0.0152  0.1957  0.1433 -0.2944  0.3573 -0.0548 -0.1681 -0.0667
"""
STD = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""


def numbers(table: str) -> tuple[float, ...]:
    return tuple(float(x) for x in table.split())


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the video VAE and the statistics of its latents; the defaults are Wan2.2."""

    dim: int = 160  # encoder width at level 0
    dec_dim: int = 256  # decoder width at level 0
    z_dim: int = 48
    # width of each level, in units of dim; each level but the last halves the picture
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    # per level but the last: whether it halves time too
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = numbers(MEAN)  # of each latent channel
    std: tuple[float, ...] = numbers(STD)

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"VAE temporal_downsample has {len(self.temporal_downsample)} entries for "
                f"{len(self.dim_mult)} levels of dim_mult; give one for each level but the last"
            )
        if not len(self.mean) == len(self.std) == self.z_dim:
            raise ValueError(
                f"VAE mean and std have {len(self.mean)} and {len(self.std)} entries; "
                f"give z_dim = {self.z_dim} of each"
            )


# -- layers ---------------------------------------------------------------------------------------


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that sees no later frame; before frame 0 it sees zeros."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C', T, H, W)
        taps = min(self.kernel_size[0], x.shape[2])  # the others would only read zeros
        x = F.pad(x, (0, 0, 0, 0, taps - 1, 0))
        return F.conv3d(x, self.weight[:, :, -taps:], self.bias, padding=(0, *self.padding[1:]))


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels. Unlike in `RMSNorm` nothing is added to |x|, it
    only has a floor (1e-12)."""

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
        # Much faster on a CPU than a norm over axis 1.
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        inverse = mean_square.clamp(min=1e-24 / x.shape[1]).rsqrt().to(x.dtype)
        return x * inverse * self.gamma


def convolved(dim: int, n_out: int) -> list[nn.Module]:
    """Norm, SiLU and a convolution."""
    return [ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, n_out, 3, padding=1)]


class ResidualBlock(nn.Module):
    """Two rounds of norm, SiLU and convolution beside a shortcut."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.residual = nn.Sequential(
            *convolved(n_in, n_out),
            ChannelNorm(n_out),
            nn.SiLU(),
            nn.Identity(),  # a dropout in the official code
            CausalConv3d(n_out, n_out, 3, padding=1),
        )
        self.shortcut = nn.Conv3d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C', T, H, W)
        return self.residual(x) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Attention of one head among the positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, H, W)
        batch, _, _, height, _ = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = self.to_qkv(self.norm(frames))
        q, k, v = rearrange(qkv, "f (three c) h w -> three f (h w) 1 c", three=3)
        attended = rearrange(attention(q, k, v), "f (h w) 1 c -> f c h w", h=height)
        return x + rearrange(self.proj(attended), "(b t) c h w -> b c t h w", b=batch)


# -- levels ---------------------------------------------------------------------------------------


class Resample(nn.Module):
    """A change of the grid: `resample` of every frame, `time_conv` (or None) between them."""

    def per_frame(self, x: Tensor) -> Tensor:
        frames = self.resample(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))


class Downsample(Resample):
    """Halves height and width, then time: frame 0 stays, and a convolution over (0, 1, 2), (2, 3,
    4), ... makes the others."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        right_and_bottom = nn.ZeroPad2d((0, 1, 0, 1))
        self.resample = nn.Sequential(right_and_bottom, nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, 1+2n, H, W) -> (B, C, 1+n, H/2, W/2)
        x = self.per_frame(x)
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(Resample):
    """Doubles time, then height and width: frame 0 stays, and the convolution that makes two frames
    of each later one does not see it."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        double = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
        self.resample = nn.Sequential(double, nn.Conv2d(dim, dim, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, 1+n, H, W) -> (B, C, 1+2n, 2H, 2W)
        if self.time_conv is not None and x.shape[2] > 1:
            later = self.time_conv(x[:, :, 1:])
            later = rearrange(later, "b (two c) t h w -> b c (t two) h w", two=2)
            x = torch.cat([x[:, :, :1], later], dim=2)
        return self.per_frame(x)


def residual_blocks(n_in: int, n_out: int, count: int) -> nn.Sequential:
    widths = (n_in, *[n_out] * count)
    return nn.Sequential(*map(ResidualBlock, widths, widths[1:]))


class DownLevel(nn.Module):
    """Residual blocks and, unless `temporal` is None, a Downsample. The shortcut folds the same
    pixels into channels and averages groups of these down to n_out."""

    def __init__(self, n_in: int, n_out: int, temporal: bool | None, blocks: int):
        super().__init__()
        self.n_out = n_out
        self.ft = 1 + bool(temporal)  # frames and pixels that become one
        self.fs = 1 + (temporal is not None)
        self.downsamples = residual_blocks(n_in, n_out, blocks)
        if temporal is not None:
            self.downsamples.append(Downsample(n_out, temporal))

    def forward(self, x: Tensor) -> Tensor:
        folded = rearrange(
            F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ft, 0)),
            "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w",
            ft=self.ft,
            fh=self.fs,
            fw=self.fs,
        )
        shortcut = reduce(folded, "b (c group) t h w -> b c t h w", "mean", c=self.n_out)
        return self.downsamples(x) + shortcut


class UpLevel(nn.Module):
    """Residual blocks and, unless `temporal` is None, an Upsample and a shortcut that repeats
    channels and unfolds them into pixels."""

    def __init__(self, n_in: int, n_out: int, temporal: bool | None, blocks: int):
        super().__init__()
        self.temporal = temporal
        self.repeats = n_out * 4 * (1 + bool(temporal)) // n_in
        self.upsamples = residual_blocks(n_in, n_out, blocks)
        if temporal is not None:
            self.upsamples.append(Upsample(n_out, temporal))

    def forward(self, x: Tensor) -> Tensor:
        y = self.upsamples(x)
        if self.temporal is None:
            return y
        shortcut = rearrange(
            repeat(x, "b c t h w -> b (c r) t h w", r=self.repeats),
            "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)",
            ft=1 + self.temporal,
            fh=2,
            fw=2,
        )
        first = int(self.temporal)  # frame 0 becomes one frame, not two
        return y + shortcut[:, :, first:]


# -- the VAE --------------------------------------------------------------------------------------


def middle(dim: int) -> nn.Sequential:
    """Attention between two residual blocks, at the coarsest grid."""
    return nn.Sequential(
        ResidualBlock(dim, dim),
        FrameAttention(dim),
        ResidualBlock(dim, dim),
    )


class Encoder(nn.Sequential):
    """Patches (B, 12, F, H/2, W/2) -> mean and log variance, not yet mixed, (B, 2z, T, h, w)."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        widths = [config.dim * mult for mult in (1, *config.dim_mult)]
        levels = zip(widths, widths[1:], (*config.temporal_downsample, None))
        blocks = config.num_res_blocks
        self.conv1 = CausalConv3d(12, widths[0], 3, padding=1)
        self.downsamples = nn.Sequential(*(DownLevel(*level, blocks) for level in levels))
        self.middle = middle(widths[-1])
        self.head = nn.Sequential(*convolved(widths[-1], 2 * config.z_dim))


class Decoder(nn.Sequential):
    """Latents (B, z, T, h, w) -> patches (B, 12, F, H/2, W/2)."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        multiples = config.dim_mult[::-1]
        widths = [config.dec_dim * mult for mult in (multiples[0], *multiples)]
        levels = zip(widths, widths[1:], (*config.temporal_downsample[::-1], None))
        blocks = config.num_res_blocks + 1
        self.conv1 = CausalConv3d(config.z_dim, widths[0], 3, padding=1)
        self.middle = middle(widths[0])
        self.upsamples = nn.Sequential(*(UpLevel(*level, blocks) for level in levels))
        self.head = nn.Sequential(*convolved(widths[-1], 12))


def to_fast_layout(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, C, T, H, W) with the channels innermost in memory, where small convolutions run
    faster."""
    return x.to(dtype, memory_format=torch.channels_last_3d)


class WanVAE(nn.Module):
    """Video (B, 3, F, H, W) in [-1, 1] to latents (B, z, T, h, w) and back, F = 1 +
    stride[0]*(T-1), H = stride[1]*h, W = stride[1]*w. Computes in the dtype of its weights
    (published and recommended: fp32) and returns fp32."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)

    @property
    def stride(self) -> tuple[int, int]:
        """Frames and pixels per latent position."""
        return 2 ** sum(self.config.temporal_downsample), 2 ** len(self.config.dim_mult)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents, (z, 1, 1, 1). They are in no weight file."""
        table = torch.tensor([self.config.mean, self.config.std], device=device)
        mean, std = table[..., None, None, None]
        return mean, std

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video (B, 3, F, H, W) in [-1, 1] -> mean and log variance (B, z, T, h, w), not
        normalised, differentiable."""
        ft, fs = self.stride
        channels, frames, height, width = video.shape[1:]
        if channels != 3 or (frames - 1) % ft or height % fs or width % fs:
            raise ValueError(
                f"video has shape {tuple(video.shape)}; expected (B, 3, 1 + {ft}n, {fs}h, {fs}w): "
                "cut or resize it"
            )
        # The column of a pixel in its 2 x 2 patch is the outer part of the channel index, the row
        # the inner one.
        patches = rearrange(video, "b c f (h row) (w col) -> b (c col row) f h w", row=2, col=2)
        patches = to_fast_layout(patches, self.encoder.conv1.weight.dtype)
        mean, log_variance = self.conv1(self.encoder(patches)).float().chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video: Tensor) -> Tensor:
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, z, T, h, w), the posterior's mean
        normalised. Latent frame 0 depends on frame 0 alone."""
        mean, std = self.statistics(video.device)
        return (self.posterior(video)[0] - mean) / std

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """latents (B, z, T, h, w), normalised -> video (B, 3, F, H, W), in [-1, 1] if `clamp`,
        differentiable."""
        if latents.shape[1] != self.config.z_dim:
            raise ValueError(
                f"latents have {latents.shape[1]} channels; this VAE has z_dim = "
                f"{self.config.z_dim}: encode the video with it"
            )
        mean, std = self.statistics(latents.device)
        dtype = self.conv2.weight.dtype
        features = self.conv2((latents * std + mean).to(dtype))
        patches = self.decoder(to_fast_layout(features, dtype))
        video = rearrange(patches, "b (c col row) f h w -> b c f (h row) (w col)", row=2, col=2)
        return video.float().clamp(-1, 1) if clamp else video.float()
