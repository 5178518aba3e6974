"""Qwen3-VL by hand: the frozen eyes and reader of the understanding expert (paper Sec. 3.1; weights
Qwen3-VL-2B-Instruct).

    image --prepare_image--> patches --VisionTower--> image tokens, one per 2 x 2 patches,
                                                      and DeepStack features
    text, grids --prompt_ids--> ids --embedding, image tokens put in their places-->
                                                      LanguageModel --> hidden states after the norm

Vision: patch embedding + learned 48 x 48 positions, interpolated to the grid of the image; blocks
with full attention inside each image and 2-D RoPE; the outputs of a few blocks (`taps`) pass
mergers of their own and are added to the image tokens after the first layers of the language model
(DeepStack). Language: causal grouped-query attention, q/k RMSNorm per head, SwiGLU, no biases, and
M-RoPE: a text token has one position, an image token a (time, row, column), and the rotary
frequencies take turns between the three.

Order of patches: 2 x 2 blocks in raster order, and inside a block in raster order, so that a merger
joins 4 consecutive rows. Precision: norms, vision RoPE and all angles in fp32; everything else in
the dtype of the weights. Tensor names are those of the published file without their leading
`model.`.

Departures from the library that official Motus runs (transformers 5.0.0rc0)
- Position embeddings are interpolated in fp32 and then rounded to the dtype of the weights, as
  newer releases do; it rounds every term.
- Images are resized by pillow; it resizes by torchvision, whose rounding differs. Frames that fit,
  as 384 x 320 does, are not resized.
- Still images only, no cache, no head: Motus needs the hidden states of a prompt and nothing else.

Departure from official Motus: one prompt serves training and acting, that of its deployment. Its
training shows the image before the text (attention is causal, so there the text sees the image and
here the image sees the text), opens the assistant's turn, and resamples frames twice, through
multiples of 28 pixels.

Shapes: B batch, L prompt tokens, n images, h w patch grid of an image, P patches of all images, D
width, N heads, K head size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from attention import LayerNorm, Linear, RMSNorm, attention, key_bias

# -- sizes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Qwen3VLConfig:
    """Sizes of the language model, of the vision tower and of the images; the defaults are
    Qwen3-VL-2B-Instruct."""

    vocab: int = 151936
    width: int = 2048
    ffn: int = 6144
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8  # each key/value head serves heads / kv_heads consecutive query heads
    head_dim: int = 128
    rope_theta: float = 5e6
    # rotary frequencies that follow time, row, column; the sum is head_dim / 2
    mrope: tuple[int, int, int] = (24, 20, 20)
    eps: float = 1e-6
    image_token: int = 151655  # id of <|image_pad|>, replaced by the image tokens

    vision_width: int = 1024
    vision_ffn: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    vision_theta: float = 1e4
    # vision blocks whose outputs are added after language layers 0, 1, 2
    taps: tuple[int, ...] = (5, 11, 17)
    side: int = 48  # the learned position table is side x side
    patch: int = 16  # pixels per patch side
    repeat: int = 2  # a patch spans two frames; a still image is shown twice
    merge: int = 2  # merge x merge patches become one image token
    min_pixels: int = 65_536  # area of a prepared image: 256 x 256 ..
    max_pixels: int = 16_777_216  # .. 4096 x 4096

    def __post_init__(self):
        if 2 * sum(self.mrope) != self.head_dim:
            raise ValueError(
                f"mrope {self.mrope} sums to {sum(self.mrope)}; expected head_dim / 2 = "
                f"{self.head_dim / 2}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.vision_width % (4 * self.vision_heads):
            raise ValueError(
                f"vision_width {self.vision_width} must be a multiple of 4 * vision_heads = "
                f"{4 * self.vision_heads}"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} must not exceed max_pixels {self.max_pixels}"
            )
        rising = [i for i in range(self.vision_layers) if i in self.taps]
        if list(self.taps) != rising or len(rising) > self.layers:
            raise ValueError(
                f"taps {self.taps} must rise, within 0..{self.vision_layers - 1}, and be no more "
                f"than layers {self.layers}"
            )


# -- images and prompts ---------------------------------------------------------------------------

# One user turn without a system message.
PROMPT = "<|im_start|>user\n{text}{images}<|im_end|>\n"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


def smart_resize(height: int, width: int, config: Qwen3VLConfig) -> tuple[int, int]:
    """Height and width rounded to multiples of patch * merge and scaled so that the area lies
    between min_pixels and max_pixels."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"image of {height} x {width} pixels; the ratio of its sides must not exceed 200: crop "
            "or pad it"
        )
    factor = config.patch * config.merge
    size = np.array([height, width])
    blocks = np.round(size / factor)
    area = blocks.prod() * factor**2
    if area > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        blocks = np.floor(size / shrink / factor).clip(min=1)
    elif area < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        blocks = np.ceil(size * grow / factor)
    height, width = (blocks * factor).astype(int).tolist()
    return height, width


def patchify(images: Tensor, config: Qwen3VLConfig) -> tuple[Tensor, Tensor]:
    """Prepared images (n, H, W, 3) uint8 -> patches (n*h*w, 3*repeat*patch*patch) fp32 in [-1, 1],
    grids (n, 3) = (1, h, w)."""
    patch = config.patch
    merge = config.merge
    count, height, width, _ = images.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(
            f"images of {height} x {width} pixels; both sides must be multiples of patch * merge = "
            f"{patch * merge}: prepare them"
        )
    patches = repeat(
        (images.float() / 255 - 0.5) / 0.5,
        "n (h a p) (w b q) c -> (n h w a b) (c t p q)",
        p=patch,
        q=patch,
        a=merge,
        b=merge,
        t=config.repeat,
    )
    grid = torch.tensor([1, height // patch, width // patch], device=images.device)
    return patches, grid.expand(count, 3)


def prepare_image(image: np.ndarray, config: Qwen3VLConfig) -> tuple[Tensor, Tensor]:
    """image (H, W, 3) uint8 -> its patches (h*w, 3*repeat*patch*patch) fp32 and its grid (1, 3);
    concatenate those of a batch. It is resampled to multiples of patch * merge, which leaves
    official 384 x 320 frames as they are. Official frames become uint8 by truncation, (255 *
    x).astype(uint8)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image is {image.dtype} {image.shape}; prepare_image takes uint8 (H, W, 3), 0..255"
        )
    height, width = smart_resize(*image.shape[:2], config)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return patchify(torch.from_numpy(np.array(picture))[None], config)


def prompt_ids(tokenizer: Tokenizer, text: str, grids: Iterable, merge: int = 2) -> list[int]:
    """Token ids of an instruction and its images; grids: (1, h, w) in patches per image, each
    taking h*w / merge^2 tokens."""
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}; use the tokenizer.json of Qwen3-VL or add "
            "special tokens"
        )
    images = ""
    for _, h, w in grids:
        pads = "<|image_pad|>" * (int(h) * int(w) // merge**2)
        images += f"<|vision_start|>{pads}<|vision_end|>"
    prompt = PROMPT.format(images=images, text=text)
    return tokenizer.encode(prompt, add_special_tokens=False).ids


def read_tokenizer(path: str | Path) -> Tokenizer:
    if not Path(path).is_file():
        raise ValueError(
            f"tokenizer file {path} does not exist; it is published beside the weights"
        )
    return Tokenizer.from_file(str(path))


def pad_prompts(prompts: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths -> ids (B, L), padded on the right with an id, 0 as official Motus
    does, and mask (B, L), True where real."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


# -- rotary positions -----------------------------------------------------------------------------


def frequencies(base: float, count: int, device: torch.device) -> Tensor:
    """base^(-i / count), i = 0 .. count - 1, fp32."""
    return base ** (-torch.arange(count, device=device).float() / count)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + K/2]), in the dtype of x. x (..., L, N, K); cos, sin (..., L,
    K/2)."""
    first, second = x.chunk(2, dim=-1)
    cos = cos.unsqueeze(-2)
    sin = sin.unsqueeze(-2)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(rotated, dim=-1)


# -- vision tower ---------------------------------------------------------------------------------


class VisionMLP(nn.Module):
    """Linear, GELU, Linear. The blocks use the tanh approximation of GELU, the mergers the exact
    one."""

    def __init__(self, width: int, hidden: int, out: int, approximate: str = "tanh"):
        super().__init__()
        self.linear_fc1 = Linear(width, hidden)
        self.linear_fc2 = Linear(hidden, out)
        self.act = nn.GELU(approximate)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class Merger(VisionMLP):
    """Joins merge x merge patches into one token. The last merger norms single patches, the
    DeepStack mergers norm joined ones."""

    def __init__(self, config: Qwen3VLConfig, norm_joined: bool):
        self.area = config.merge**2
        joined = self.area * config.vision_width
        super().__init__(joined, joined, config.width, approximate="none")
        self.normed = joined if norm_joined else config.vision_width
        self.norm = LayerNorm(self.normed, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # (n, h*w, Dv) -> (n, h*w / 4, D)
        x = rearrange(x, "n (l a) d -> n l (a d)", a=self.area)
        x = self.norm(x.unflatten(2, (-1, self.normed)))
        return super().forward(x.flatten(2))


class VisionAttention(nn.Module):
    """Full attention among the patches of an image, with 2-D RoPE in fp32."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.heads = config.vision_heads
        self.qkv = Linear(config.vision_width, 3 * config.vision_width)
        self.proj = Linear(config.vision_width, config.vision_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (n, h*w, Dv)
        heads = "b l (three n k) -> three b l n k"
        q, k, v = rearrange(self.qkv(x), heads, three=3, n=self.heads)
        q = rotate_half(q.float(), cos, sin)
        k = rotate_half(k.float(), cos, sin)
        attended = attention(q, k, v)
        return self.proj(rearrange(attended, "b l n k -> b l (n k)"))


class VisionBlock(nn.Module):
    """Attention and feed-forward on normed input."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        width = config.vision_width
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(width, config.vision_ffn, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patches to image tokens in the width of the language model."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        kernel = (config.repeat, config.patch, config.patch)
        proj = nn.Conv3d(3, config.vision_width, kernel, stride=kernel)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.pos_embed = nn.Embedding(config.side**2, config.vision_width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_layers))
        self.merger = Merger(config, norm_joined=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, norm_joined=True) for _ in config.taps
        )

    def positions(self, h: int, w: int) -> Tensor:
        """The learned position embeddings at an h x w grid: (h*w, Dv) fp32 in the order of the
        patches."""
        table = rearrange(self.pos_embed.weight.float(), "(s t) d -> 1 d s t", s=self.config.side)
        grid = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)
        block = "1 d (h a) (w b) -> (h w a b) d"
        return rearrange(grid, block, a=self.config.merge, b=self.config.merge)

    def rope(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (h*w, K/2): the first half of the frequencies follows the row of a patch, the
        second half its column."""
        c = self.config
        rows = torch.arange(h, device=device)
        columns = torch.arange(w, device=device)
        coordinates = torch.cartesian_prod(rows, columns).float()
        block = "(h a w b) two -> (h w a b) two 1"
        coordinates = rearrange(coordinates, block, a=c.merge, w=w // c.merge, b=c.merge)
        quarter = c.vision_width // c.vision_heads // 4
        angle = (coordinates * frequencies(c.vision_theta, quarter, device)).flatten(1)
        return angle.cos(), angle.sin()

    def encode(self, patches: Tensor, h: int, w: int) -> Tensor:
        """Images of one grid: patches (n, h*w, C) -> (1 + taps, n, h*w / 4, D), the image tokens
        and then the DeepStack features."""
        proj = self.patch_embed["proj"]  # a convolution that meets each patch once
        weight = proj.weight.flatten(1)
        x = F.linear(patches.to(weight.dtype), weight, proj.bias)
        x = x + self.positions(h, w).to(x.dtype)
        cos, sin = self.rope(h, w, x.device)
        mergers = dict(zip(self.config.taps, self.deepstack_merger_list))
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin)
            if i in mergers:
                features.append(mergers[i](x))
        return torch.stack([self.merger(x), *features])

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """pixels (P, C), grid (n, 3) -> (1 + taps, P/4, D). Neighbours of one grid, such as all
        images of a batch, are encoded together."""
        images = iter(pixels.split(grid.prod(dim=1).tolist()))
        encoded = []
        for (_, h, w), alike in groupby(grid.tolist()):
            patches = torch.stack([next(images) for _ in alike])
            encoded.append(self.encode(patches, h, w).flatten(1, 2))
        return torch.cat(encoded, dim=1)


# -- language model -------------------------------------------------------------------------------


class TextAttention(nn.Module):
    """Causal grouped-query attention, queries and keys normed per head."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        size = config.head_dim
        self.size = size
        self.groups = config.heads // config.kv_heads
        self.q_proj = Linear(config.width, config.heads * size, bias=False)
        self.k_proj = Linear(config.width, config.kv_heads * size, bias=False)
        self.v_proj = Linear(config.width, config.kv_heads * size, bias=False)
        self.o_proj = Linear(config.heads * size, config.width, bias=False)
        self.q_norm = RMSNorm(size, config.eps)
        self.k_norm = RMSNorm(size, config.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:  # x (B, L, D)
        q, k, v = (
            rearrange(project(x), "b l (n k) -> b l n k", k=self.size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate_half(self.q_norm(q), cos, sin)
        k = rotate_half(self.k_norm(k), cos, sin)
        k = repeat(k, "b l n k -> b l (n g) k", g=self.groups)
        v = repeat(v, "b l n k -> b l (n g) k", g=self.groups)
        attended = attention(q, k, v, bias)
        return self.o_proj(rearrange(attended, "b l n k -> b l (n k)"))


class SwiGLU(nn.Module):
    """Feed-forward with a SiLU gate."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    """Attention and feed-forward on normed input."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = TextAttention(config)
        self.mlp = SwiGLU(config.width, config.ffn)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Token ids and image tokens to hidden states."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (3, B, L) of time, row, column -> cos and sin (B, L, K/2) fp32. Frequency i
        follows time, row or column as i mod 3 is 0, 1 or 2, until the rows and columns have had
        their share of `mrope`; the lowest frequencies follow time."""
        _, rows, columns = self.config.mrope
        half = self.config.head_dim // 2
        axis = torch.zeros(half, dtype=torch.long, device=positions.device)
        axis[1 : 3 * rows : 3] = 1
        axis[2 : 3 * columns : 3] = 2
        ladder = frequencies(self.config.rope_theta, half, positions.device)
        angle = rearrange(positions[axis].float(), "k b l -> b l k") * ladder
        return angle.cos(), angle.sin()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        image: Tensor,
        features: Tensor,
    ) -> Tensor:
        """ids, mask, image (B, L), image True at image tokens; features (1 + taps, image tokens, D)
        -> hidden states (B, L, D)."""
        x = self.embed_tokens(ids)
        tokens, *deepstack = features.to(x.dtype)
        image = image[..., None]
        x = x.masked_scatter(image, tokens)
        cos, sin = (table.to(x.dtype) for table in self.rope(positions))
        causal = mask.new_ones(mask.shape[1], mask.shape[1]).tril()
        bias = key_bias(causal) + key_bias(mask)[:, None, None]  # (B, 1, L, L)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, bias)
            if i < len(deepstack):
                x = x + torch.zeros_like(x).masked_scatter(image, deepstack[i])
        return self.norm(x)


# -- the whole ------------------------------------------------------------------------------------


class Qwen3VL(nn.Module):
    """Prompt and images to hidden states."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.language_model = LanguageModel(config)

    def init_weights(self) -> None:
        """Fresh weights: embeddings of std 0.02, linear maps as torch draws them, norms at one."""
        for embedding in (self.visual.pos_embed, self.language_model.embed_tokens):
            nn.init.normal_(embedding.weight, std=0.02)

    def positions(self, image: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
        """M-RoPE positions (3, B, L) of time, row, column. Text counts up by one; an image that
        starts at p has p, p + row, p + column, and the count goes on at p + the longer side of its
        token grid. Padding is at 1."""
        rows, columns = grid[:, 1:].T // self.config.merge
        count = rows * columns  # (n,) tokens per image
        image_of = torch.arange(len(grid), device=grid.device).repeat_interleave(count)  # (P/4,)
        first = (count.cumsum(0) - count)[image_of]
        index = torch.arange(len(image_of), device=grid.device) - first  # inside its image
        # Text moves the count by one, an image by its longer side, at its last token.
        last = index == count[image_of] - 1
        step = torch.ones_like(mask, dtype=torch.long)
        step[image] = torch.where(last, torch.maximum(rows, columns)[image_of], 0)
        positions = (step.cumsum(dim=1) - step).repeat(3, 1, 1)
        positions[1][image] += index // columns[image_of]
        positions[2][image] += index % columns[image_of]
        return positions.masked_fill(~mask, 1)

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor, grid: Tensor) -> Tensor:
        """ids (B, L) long, mask (B, L) bool, True where real, padding on the right; pixels (P,
        3*repeat*patch*patch) and grid (n, 3) of all images in the order of their places in the
        batch -> hidden states after the final norm (B, L, D). Only the pixels need be on the
        device: what the host reads is better left to it."""
        image = ids == self.config.image_token
        tokens = int(image.sum())
        patches = int(grid.prod(dim=1).sum())
        if patches != len(pixels) or patches != tokens * self.config.merge**2:
            raise ValueError(
                f"ids hold {tokens} image tokens (id {self.config.image_token}), pixels "
                f"{len(pixels)} patches, grid counts {patches}; one token stands for "
                f"{self.config.merge**2} patches: build the prompt from the same grid"
            )
        if not bool(mask[:, 0].all()):
            raise ValueError("mask is False in column 0; prompts are padded on the right")
        positions = self.positions(image, mask, grid)
        features = self.visual(pixels, grid)
        seen = (x.to(pixels.device) for x in (ids, mask, positions, image))
        return self.language_model(*seen, features)
