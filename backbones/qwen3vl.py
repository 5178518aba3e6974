"""Qwen3-VL by hand: the frozen eyes and reader of the understanding expert (paper Sec. 3.1; weights
Qwen3-VL-2B-Instruct).

    image --prepare_image--> patches --VisionTower--> image tokens, one per 2 x 2 patches, and DeepStack features
    text, grids --prompt_ids--> ids --embedding, image tokens put in place--> LanguageModel --> hidden states after the final norm

Vision: patch embedding + learned 48 x 48 positions, interpolated to the grid of the image; blocks
with full attention inside each image and 2-D RoPE; the outputs of a few blocks (`taps`) pass
mergers of their own and are added to the image tokens after the first layers of the language model
(DeepStack). Language: causal grouped-query attention, q/k RMSNorm per head, SwiGLU, no biases, and
M-RoPE: a text token has one position, an image token a (time, row, column), and the rotary
frequencies take turns between the three.

Order of patches: 2 x 2 blocks in raster order, and inside a block in raster order, so that a merger
joins 4 consecutive rows. Precision: norms, vision RoPE and all angles in fp32; everything else in
the dtype of the weights.

Departures from the library that official Motus runs (transformers 5.0.0rc0)
- Position embeddings are interpolated in fp32 and then rounded to the dtype of the weights, as
  newer releases do; it rounds every term.
- Images are resized by pillow; it resizes by torchvision, whose rounding differs. Frames that fit,
  as 384 x 320 does, are not resized.
- Still images only, no cache, no head: Motus needs the hidden states of a prompt and nothing else.

Shapes: B batch, L prompt tokens, n images, h w patch grid of an image, P patches of all images, D
width, N heads, K head size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from attention import LayerNorm, Linear, RMSNorm, attention, key_bias


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
    mrope: tuple[int, int, int] = (
        24,
        20,
        20,
    )  # rotary frequencies that follow time, row, column; the sum is head_dim / 2
    eps: float = 1e-6
    image_token: int = 151655  # id of <|image_pad|>, replaced by the image tokens

    vision_width: int = 1024
    vision_ffn: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    vision_theta: float = 1e4
    taps: tuple[int, ...] = (
        5,
        11,
        17,
    )  # vision blocks whose outputs are added after language layers 0, 1, 2
    side: int = 48  # the learned position table is side x side
    patch: int = 16  # pixels per patch side
    repeat: int = 2  # a patch spans two frames; a still image is shown twice
    merge: int = 2  # merge x merge patches become one image token
    min_pixels: int = 65_536  # area of a prepared image: 256 x 256 ..
    max_pixels: int = 16_777_216  # .. 4096 x 4096

    def __post_init__(self):
        if 2 * sum(self.mrope) != self.head_dim:
            raise ValueError(
                f"mrope {self.mrope} sums to {sum(self.mrope)}; it must sum to head_dim / 2 = {self.head_dim / 2}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.vision_width % (4 * self.vision_heads):
            raise ValueError(
                f"vision_width {self.vision_width} must be a multiple of 4 * vision_heads = {4 * self.vision_heads}"
            )
        if (
            list(self.taps) != [i for i in range(self.vision_layers) if i in self.taps]
            or len(self.taps) > self.layers
        ):
            raise ValueError(
                f"taps {self.taps} must rise, within 0..{self.vision_layers - 1}, and be no more than layers {self.layers}"
            )


PRESETS = {"qwen3-vl-2b": Qwen3VLConfig()}

# -- images and prompts ---------------------------------------------------------------------------

# Official Motus trains with one form and is deployed with another. Attention is causal: in training
# the text sees the image, in deployment the image sees the text. Both prompts are one user turn
# without a system message.
PROMPTS = {
    "training": "<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n",
    "deployment": "<|im_start|>user\n{text}{images}<|im_end|>\n",
}
IMAGE = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


def check_form(form: str) -> None:
    if form not in PROMPTS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(PROMPTS)}")


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width rounded to multiples of `factor` and scaled so that the area lies between
    min_pixels and max_pixels."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"image of {height} x {width} pixels; the ratio of its sides must not exceed 200: crop or pad it"
        )
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def patchify(images: Tensor, config: Qwen3VLConfig) -> tuple[Tensor, Tensor]:
    """Prepared images (n, H, W, 3) uint8 -> patches (n*h*w, 3*repeat*patch*patch) fp32 in [-1, 1],
    grids (n, 3) = (1, h, w)."""
    p, m = config.patch, config.merge
    _, height, width, _ = images.shape
    if height % (p * m) or width % (p * m):
        raise ValueError(
            f"images of {height} x {width} pixels; both sides must be multiples of patch * merge = {p * m}: prepare them"
        )
    scaled = (images.float() / 255 - 0.5) / 0.5
    patches = repeat(
        scaled, "n (h a p) (w b q) c -> (n h w a b) (c t p q)", p=p, q=p, a=m, b=m, t=config.repeat
    )
    return patches, torch.tensor([[1, height // p, width // p]], device=images.device).expand(
        len(images), 3
    )


def prepare_image(
    image: np.ndarray, config: Qwen3VLConfig, form: str = "deployment"
) -> tuple[Tensor, Tensor]:
    """image (H, W, 3) uint8 -> its patches (h*w, 3*repeat*patch*patch) fp32 and its grid (1, 3);
    concatenate those of a batch.

    "deployment" resamples to multiples of patch * merge, which leaves official 384 x 320 frames as
    they are. "training" does what official training does by accident: a utility that assumes
    patches of 14 resamples to multiples of 28 first, the processor resamples it back. Official
    frames become uint8 by truncation, (255 * x).astype(uint8)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image is {image.dtype} {image.shape}; prepare_image takes uint8 (H, W, 3), 0..255"
        )
    check_form(form)
    picture = Image.fromarray(image)
    steps = [(28, 4 * 28**2, 16384 * 28**2)] if form == "training" else []
    for factor, least, most in (
        *steps,
        (config.patch * config.merge, config.min_pixels, config.max_pixels),
    ):
        height, width = smart_resize(picture.height, picture.width, factor, least, most)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return patchify(torch.from_numpy(np.array(picture))[None], config)


def prompt_ids(
    tokenizer: Tokenizer, text: str, grids: Iterable, form: str = "deployment", merge: int = 2
) -> list[int]:
    """Token ids of an instruction and its images; grids: (1, h, w) in patches per image, each
    taking h*w / merge^2 tokens."""
    check_form(form)
    missing = [
        token
        for token in (*IMAGE, "<|im_start|>", "<|im_end|>")
        if tokenizer.token_to_id(token) is None
    ]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}; use the tokenizer.json of Qwen3-VL or add special tokens"
        )
    start, pad, end = IMAGE
    images = "".join(
        start + pad * (int(t) * int(h) * int(w) // merge**2) + end for t, h, w in grids
    )
    return tokenizer.encode(
        PROMPTS[form].format(images=images, text=text), add_special_tokens=False
    ).ids


def pad_prompts(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths -> ids (B, L), padded on the right with id 0 as official Motus does,
    and mask (B, L), True where real."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


# -- vision tower ---------------------------------------------------------------------------------


class VisionMLP(nn.Module):
    """Linear, GELU, Linear. The blocks use the tanh approximation of GELU, the mergers the exact
    one."""

    def __init__(self, width: int, hidden: int, out: int, approximate: str = "tanh"):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = Linear(width, hidden), Linear(hidden, out)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate=self.approximate))


class Merger(VisionMLP):
    """Joins merge x merge patches into one token. The last merger norms single patches, the
    DeepStack mergers norm joined ones."""

    def __init__(self, config: Qwen3VLConfig, norm_joined: bool):
        joined = config.merge**2 * config.vision_width
        super().__init__(joined, joined, config.width, approximate="none")
        self.area, self.norm_joined = config.merge**2, norm_joined
        self.norm = LayerNorm(joined if norm_joined else config.vision_width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # (n, h*w, Dv) -> (n, h*w / 4, D)
        joined = rearrange(
            x if self.norm_joined else self.norm(x), "n (l a) d -> n l (a d)", a=self.area
        )
        return super().forward(self.norm(joined) if self.norm_joined else joined)


class VisionAttention(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.heads = config.vision_heads
        self.qkv = Linear(config.vision_width, 3 * config.vision_width)
        self.proj = Linear(config.vision_width, config.vision_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (n, h*w, Dv)
        q, k, v = rearrange(self.qkv(x), "b l (three n k) -> three b l n k", three=3, n=self.heads)
        out = attention(rotate_half(q.float(), cos, sin), rotate_half(k.float(), cos, sin), v)
        return self.proj(rearrange(out, "b l n k -> b l (n k)"))


class VisionBlock(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(config.vision_width, eps=1e-6) for _ in range(2))
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config.vision_width, config.vision_ffn, config.vision_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


def interpolation(size: int, side: int, device: torch.device) -> Tensor:
    """Matrix (size, side) that samples `side` values linearly at `size` points, the first and the
    last on the ends."""
    at = torch.arange(size, device=device).float() * (side - 1) / max(size - 1, 1)
    return (1 - (at[:, None] - torch.arange(side, device=device)).abs()).clamp(min=0)


class VisionTower(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        kernel = (config.repeat, config.patch, config.patch)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, config.vision_width, kernel, stride=kernel)}
        )
        self.pos_embed = nn.Embedding(config.side**2, config.vision_width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_layers))
        self.merger = Merger(config, norm_joined=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, norm_joined=True) for _ in config.taps
        )

    def positions(self, h: int, w: int) -> Tensor:
        """The learned position embeddings at an h x w grid: (h*w, Dv) fp32 in the order of the
        patches."""
        table = rearrange(self.pos_embed.weight.float(), "(s t) d -> s t d", s=self.config.side)
        rows, cols = (interpolation(size, self.config.side, table.device) for size in (h, w))
        grid = torch.einsum("wt,htd->hwd", cols, torch.einsum("hs,std->htd", rows, table))
        return rearrange(
            grid, "(h a) (w b) d -> (h w a b) d", a=self.config.merge, b=self.config.merge
        )

    def rope(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (h*w, K/2): the first half of the frequencies follows the row of a patch, the
        second half its column."""
        m, quarter = self.config.merge, self.config.vision_width // self.config.vision_heads // 4
        ladder = self.config.vision_theta ** (
            -torch.arange(quarter, device=device).float() / quarter
        )
        place = torch.cartesian_prod(
            torch.arange(h, device=device), torch.arange(w, device=device)
        ).float()
        place = rearrange(place, "(h a w b) two -> (h w a b) two 1", h=h // m, a=m, b=m)
        angle = rearrange(place * ladder, "l two k -> l (two k)")
        return angle.cos(), angle.sin()

    def encode(self, patches: Tensor, h: int, w: int) -> Tensor:
        """Images of one grid: patches (n, h*w, C) -> (1 + taps, n, h*w / 4, D), the image tokens
        and then the DeepStack features."""
        proj = self.patch_embed["proj"]
        x = F.linear(
            patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias
        )  # a convolution that meets each patch once
        x = x + self.positions(h, w).to(x.dtype)
        cos, sin = self.rope(h, w, x.device)
        mergers, features = dict(zip(self.config.taps, self.deepstack_merger_list)), []
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin)
            if i in mergers:
                features.append(mergers[i](x))
        return torch.stack([self.merger(x), *features])

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """pixels (P, C), grid (n, 3) -> (1 + taps, P/4, D). Images of equal grid are encoded
        together, in one batch."""
        shapes, kind = grid.unique(dim=0, return_inverse=True)
        kind = kind.repeat_interleave(grid.prod(dim=1))  # (P,) which of `shapes` a patch belongs to
        encoded = [
            self.encode(rearrange(pixels[kind == i], "(n l) c -> n l c", l=h * w), h, w).flatten(
                1, 2
            )
            for i, (_, h, w) in enumerate(shapes.tolist())
        ]
        place = (
            kind[:: self.config.merge**2].argsort(stable=True).argsort()
        )  # of each image token among the sorted ones
        return torch.cat(encoded, dim=1)[:, place]


# -- language model -------------------------------------------------------------------------------


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + K/2]), in the dtype of x. x (..., L, N, K); cos, sin (..., L, K/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TextAttention(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.head_dim, self.groups = config.head_dim, config.heads // config.kv_heads
        self.q_proj = Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj, self.v_proj = (
            Linear(config.width, config.kv_heads * config.head_dim, bias=False) for _ in range(2)
        )
        self.o_proj = Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.eps),
            RMSNorm(config.head_dim, config.eps),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:  # x (B, L, D)
        q, k, v = (
            rearrange(proj(x), "b l (n k) -> b l n k", k=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_half(self.q_norm(q), cos, sin), rotate_half(self.k_norm(k), cos, sin)
        k, v = (repeat(y, "b l n k -> b l (n g) k", g=self.groups) for y in (k, v))
        return self.o_proj(rearrange(attention(q, k, v, bias), "b l n k -> b l (n k)"))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(config.width, config.eps) for _ in range(2)
        )
        self.self_attn = TextAttention(config)
        self.mlp = SwiGLU(config.width, config.ffn)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
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
        half = self.config.head_dim // 2
        ladder = self.config.rope_theta ** (
            -torch.arange(half, device=positions.device).float() / half
        )
        axis = torch.zeros(half, dtype=torch.long, device=positions.device)
        for i in (1, 2):
            axis[i : 3 * self.config.mrope[i] : 3] = i
        angle = rearrange(positions[axis].float(), "k b l -> b l k") * ladder
        return angle.cos(), angle.sin()

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, image: Tensor, features: Tensor
    ) -> Tensor:
        """ids, mask, image (B, L), image True at image tokens; features (1 + taps, image tokens, D)
        -> hidden states (B, L, D)."""
        x = self.embed_tokens(ids)
        features = features.to(x.dtype)
        x = x.masked_scatter(image[..., None], features[0])
        cos, sin = (table.to(x.dtype) for table in self.rope(positions))
        causal = key_bias(
            torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        )
        bias = causal + key_bias(mask)[:, None, None]  # (B, 1, L, L)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, bias)
            if i + 1 < len(features):
                x = x + torch.zeros_like(x).masked_scatter(image[..., None], features[i + 1])
        return self.norm(x)


# -- the whole ------------------------------------------------------------------------------------


class Qwen3VL(nn.Module):
    """Prompt and images to hidden states. Tensor names are those of the published file without
    their leading `model.`."""

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
        rows, cols = grid[:, 1] // self.config.merge, grid[:, 2] // self.config.merge
        count = rows * cols  # (n,) tokens per image
        image_of = torch.arange(len(grid), device=grid.device).repeat_interleave(count)  # (P/4,)
        place = (
            torch.arange(len(image_of), device=grid.device) - (count.cumsum(0) - count)[image_of]
        )
        step = torch.ones_like(mask, dtype=torch.long)  # how far each token moves the count
        step[image] = torch.where(
            place == count[image_of] - 1, torch.maximum(rows, cols)[image_of], 0
        )
        positions = repeat(step.cumsum(dim=1) - step, "b l -> three b l", three=3).clone()
        positions[1][image] += place // cols[image_of]
        positions[2][image] += place % cols[image_of]
        return positions.masked_fill(~mask, 1)

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor, grid: Tensor) -> Tensor:
        """ids (B, L) long, mask (B, L) bool, True where real, padding on the right; pixels (P,
        3*repeat*patch*patch) and grid (n, 3) of all images in the order of their places in the
        batch -> hidden states after the final norm (B, L, D)."""
        image = ids == self.config.image_token
        places, patches = int(image.sum()), int(grid.prod(dim=1).sum())
        if patches != len(pixels) or patches != places * self.config.merge**2:
            raise ValueError(
                f"ids hold {places} image tokens (id {self.config.image_token}), pixels {len(pixels)} patches, grid counts "
                f"{patches}; one token stands for {self.config.merge**2} patches: build the prompt from the same grid"
            )
        if not bool(mask[:, 0].all()):
            raise ValueError("mask is False in column 0; prompts are padded on the right")
        return self.language_model(
            ids, mask, self.positions(image, mask, grid), image, self.visual(pixels, grid)
        )
