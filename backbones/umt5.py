"""UMT5-XXL by hand: the text encoder of Wan2.2, whose states the video expert's cross attention
reads.

The encoder (Wan2.2 `wan/modules/t5.py`; T5 1.1 with a bias table in every layer) is, with no bias
vectors and no absolute positions,

    x += o(softmax(q k^T + bias[bucket(key - query)]) v)         on RMS(x)
    x += fc2(gelu_tanh(gate(x)) * fc1(x))                        on RMS(x)

and a last RMS norm; the logits are not divided by sqrt(K). Relative positions fall into buckets:
one each up to a quarter of them, then logarithmically wider ones up to `max_distance`; keys after
the query use the upper half of the table. Tensor names are those of
models_t5_umt5-xxl-enc-bf16.pth.

Departure from the official code: texts are padded to the longest of a batch, not to 512. Padded
keys are masked, so no real row changes.

Shapes: B batch, L tokens, D width, N heads, K head size.
"""

import html
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from attention import Linear, RMSNorm, attention
from backbones.qwen3vl import pad_prompts, read_tokenizer


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the text encoder; the defaults are UMT5-XXL."""

    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096  # heads x head size
    dim_ffn: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32  # relative positions, half of them for keys after the query
    max_distance: int = 128  # from here on all distances share the last bucket

    def __post_init__(self):
        if self.dim_attn % self.heads:
            raise ValueError(
                f"umt5 dim_attn {self.dim_attn} must be a multiple of heads {self.heads}"
            )


def relative_buckets(
    length: int, buckets: int, max_distance: int, device: torch.device | None = None
) -> Tensor:
    """Row of the bias table for every query and key: (L, L) int64, [query, key]."""
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]  # key - query
    distance = offset.abs()
    half = buckets // 2  # of the table, for keys on one side of the query
    exact = half // 2  # so many distances have a bucket of their own
    ratio = torch.log(distance.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (half - exact)).long()
    return half * (offset > 0) + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class UMT5Attention(nn.Module):
    """Self-attention whose logits are not scaled."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.heads = config.heads
        linear = partial(Linear, config.dim, config.dim_attn, bias=False)
        self.q = linear()
        self.k = linear()
        self.v = linear()
        self.o = Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # x (B, L, D), bias (B or 1, N, L, L)
        q, k, v = (
            rearrange(project(x), "b l (n k) -> b l n k", n=self.heads)
            for project in (self.q, self.k, self.v)
        )
        attended = attention(q, k, v, bias, scale=1.0)
        return self.o(rearrange(attended, "b l n k -> b l (n k)"))


class UMT5FFN(nn.Module):
    """Feed-forward with a gate of its own (GEGLU)."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.gate = nn.Sequential(
            Linear(config.dim, config.dim_ffn, bias=False),
            nn.GELU(approximate="tanh"),
        )
        self.fc1 = Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.fc2(self.fc1(x) * self.gate(x))


class UMT5Block(nn.Module):
    """Attention and feed-forward on normed input, with a bias table of its own."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.norm1 = RMSNorm(config.dim)
        self.norm2 = RMSNorm(config.dim)
        self.attn = UMT5Attention(config)
        self.ffn = UMT5FFN(config)
        table = nn.Embedding(config.buckets, config.heads)
        self.pos_embedding = nn.ModuleDict({"embedding": table})

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), buckets (L, L), mask (B, 1, 1, L) bool -> (B, L, D)."""
        bias = rearrange(self.pos_embedding["embedding"](buckets), "q k n -> 1 n q k")
        # The smallest number rather than -inf: a text of nothing but padding gives zeros in the
        # end, not NaN.
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """Token ids to text states. Runs in the dtype of its weights (published: bf16)."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(UMT5Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64, mask (B, L), nonzero where a token is real -> states (B, L, D), exactly
        zero where it is not."""
        c = self.config
        mask = mask.bool()
        buckets = relative_buckets(ids.shape[1], c.buckets, c.max_distance, ids.device)
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, mask[:, None, None])
        return self.norm(x).masked_fill(~mask[..., None], 0)


# -- text to ids ----------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Official cleaning: repaired Unicode (ftfy), HTML entities resolved twice, every run of
    whitespace one space."""
    if not re.fullmatch(r"[ -%'-~\t\r\n]*", text):  # ftfy changes no printable ASCII without "&"
        try:
            import ftfy
        except ImportError:
            raise ImportError(
                f"the text {text!r} has characters other than plain ASCII, which the official "
                "tokenizer cleans with ftfy; run `pip install ftfy`, or write the text in plain "
                "ASCII without '&'"
            ) from None
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


class T5Tokenizer:
    """Cleaned text to ids with `</s>` at the end, from a `tokenizer.json` (of google/umt5-xxl in
    the published weights)."""

    def __init__(self, path: str | Path, text_len: int = 512):
        self.text_len = text_len
        self.tokenizer = read_tokenizer(path)
        self.eos = self.tokenizer.token_to_id("</s>")
        self.pad = self.tokenizer.token_to_id("<pad>")
        if self.eos is None or self.pad is None:
            raise ValueError(
                f"tokenizer file {path} has no token '</s>' or '<pad>'; a T5 tokenizer.json holds "
                "both"
            )

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, L) int64 and mask (B, L) bool, L the longest of them and at most
        text_len; too long ones are cut."""
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(clean(text), add_special_tokens=False).ids
            rows.append([*ids[: self.text_len - 1], self.eos])
        return pad_prompts(rows, self.pad)
