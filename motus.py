"""Motus, a unified latent action world model (arXiv 2512.13030), in one file: the three experts and
the layer where they meet.

    observation, instruction --> [ VLM, frozen ] --> und tokens      512 wide   ----.
    video latents (frame 0 clean) --> patches    --> video tokens   3072 wide   ----+--> one joint attention per layer (Sec. 3.1),
    state, noisy actions, registers              --> action tokens  1024 wide   ----'    everything else separate; 30 layers
                                                                                    --> velocity of the video, velocity of the actions

    sequence   [ video T*h*w | state 1, actions S, registers 4 | understanding Lu ]
    full size      360               53 (S = 48)                    ~130

Video and action tokens are modulated by their own timestep (adaLN: shift, scale, gate);
understanding tokens by none. The video expert also reads the text states of the T5 encoder by cross
attention. `flow.py` says how the two timesteps make five modes out of one network.

Forms: `finetune=True` has a state token and registers (stage 3); `finetune=False` has neither and
predicts latent actions (stages 1, 2).

Precision (weights may be bf16): the residual streams of video and action, the time paths,
modulation tables and the video head are fp32; the understanding stream stays in the dtype of its
weights; attention runs in the dtype of v.

Departures from the official code: padded understanding tokens and padded actions are masked as keys
(no effect at batch size 1); everything that does not depend on the noise is computed once per
observation; the last layer's understanding output, which nothing reads, is not computed; the
position table is a function, not a buffer, so any chunk length loads. A fresh small expert starts
with values of unit scale (the official one sqrt(K) smaller) and with Xavier maps in the
understanding expert too (official: torch's default, whose biases drown what the VLM says): at toy
size the action loss falls in half as many steps.

Shapes: B batch, T latent frames, Lv La Lu tokens, D width, N heads, K head size, S chunk, A action
dimensions, P state dimensions, C latent channels, Lt text rows, Dt text width, Dv VLM width.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import flow
from attention import (
    LayerNorm,
    Linear,
    LinearFP32,
    RMSNorm,
    add_gated,
    joint_attention,
    key_bias,
    mlp,
    norm_modulate,
    norm_rotate,
    quantise,
)
from backbones.published import open_weights
from backbones.wan import (
    Modulation,
    TextKV,
    TextStates,
    WanBlock,
    WanConfig,
    WanModel,
    modulation,
    rope_3d,
    time_sinusoid,
)
from weights.card import Card
from weights.files import check_keys
from weights.load import load_into

# -- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MotusConfig:
    """Every size of the model; the defaults are the published RoboTwin model."""

    video: WanConfig = field(default_factory=WanConfig)
    frames: int = 8  # predicted video frames of a chunk; latent frames T = 1 + frames / 4
    ratio: int = (
        2  # actions per video frame (official: 2 RoboTwin, 6 real robots, 1 latent actions)
    )
    action_width: int = 1024
    action_dim: int = 14
    state_dim: int = 14
    action_eps: float = 1e-5
    und_width: int = 512
    und_eps: float = 1e-5
    vlm_dim: int = 2048  # width of the VLM's hidden states
    expert_ffn: int = 4  # FFN width of the two small experts, in multiples of their width
    registers: int = 4
    finetune: bool = True  # state token and registers (stage 3), or neither (stages 1 and 2)

    def __post_init__(self):
        if self.frames % 4:
            raise ValueError(
                f"frames is {self.frames}; the video VAE packs 4 frames into one latent frame: use a multiple of 4"
            )
        if self.action_width % 2:
            raise ValueError(
                f"action_width is {self.action_width}; the position table needs an even width"
            )

    @classmethod
    def of(cls, stored: dict, source: object = "config.json") -> "MotusConfig":
        """The configuration that a card stores. ValueError, naming `source`, for a key that this
        version does not know."""
        check_keys(stored, cls, source)
        check_keys(stored["video"], WanConfig, source)
        video = WanConfig(**stored["video"] | {"patch": tuple(stored["video"]["patch"])})
        return cls(**stored | {"video": video})

    def as_json(self) -> dict:
        """As json gives it back, so that a stored one equals a new one."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def chunk(self) -> int:
        """S, actions per chunk."""
        return self.frames * self.ratio

    @property
    def latent_frames(self) -> int:
        """T, the observation included."""
        return 1 + self.frames // 4


# -- what goes in ---------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What the network sees of a batch: the outputs of the frozen backbones, clean actions and
    state, and masks."""

    latents: (
        Tensor  # (B, C, T, h, w), frame 0 is the observation; T may be 1 where no video is given
    )
    context: Tensor  # (B, Lt, Dt) text states, zero from row `context_len` on
    context_len: Tensor  # (B,) int64
    und: Tensor | None = (
        None  # (B, Lu, Dv) hidden states of the VLM; None runs without understanding (stage 1)
    )
    und_mask: Tensor | None = None  # (B, Lu) bool, False where padded
    state: Tensor | None = None  # (B, P)
    actions: Tensor | None = None  # (B, S, A); None where there are none
    action_mask: Tensor | None = (
        # (B, S, A) bool, False past the end of the episode and for dimensions that do not exist
        None
    )
    video_mask: Tensor | None = (
        None  # (B, T) bool, False for latent frames past the end of the episode
    )

    def __len__(self) -> int:
        return len(self.latents)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(**{k: None if v is None else function(v) for k, v in vars(self).items()})

    def to(self, device: torch.device | str) -> "Inputs":
        return self.map(lambda x: x.to(device, non_blocking=True))

    def rows(self, index: Tensor) -> "Inputs":
        return self.map(lambda x: x[index])

    def padded(self, bucket: int) -> "Inputs":
        """Text and understanding padded to multiples of `bucket`, so that few lengths occur.
        Changes no result: what is added is masked, and of the text one padded row stands for all
        (`WanModel.embed_text` adds it, hence the 1)."""

        def pad(x: Tensor, rows: int, value: float = 0) -> Tensor:
            return nn.functional.pad(
                x, (0, 0) * (x.dim() - 2) + (0, rows - x.shape[1]), value=value
            )

        context = pad(self.context, math.ceil((self.context.shape[1] + 1) / bucket) * bucket - 1)
        if self.und is None:
            return replace(self, context=context)
        rows = math.ceil(self.und.shape[1] / bucket) * bucket
        real = (
            torch.ones(self.und.shape[:2], dtype=torch.bool, device=self.und.device)
            if self.und_mask is None
            else self.und_mask
        )
        return replace(
            self, context=context, und=pad(self.und, rows), und_mask=pad(real, rows, value=False)
        )

    def unmasked(self) -> "Inputs":
        """Without a mask of understanding that masks nothing: attention is faster without a bias."""
        return (
            replace(self, und_mask=None)
            if self.und_mask is not None and self.und_mask.all()
            else self
        )

    @classmethod
    def stack(cls, parts: "Sequence[Inputs]") -> "Inputs":
        """Joins batches along B; text and understanding are padded to the longest."""

        def join(values: Sequence[Tensor | None]) -> Tensor | None:
            if values[0] is None:
                return None
            if values[0].dim() == 1 or len({v.shape[1] for v in values}) == 1:
                return torch.cat(list(values))
            longest = max(v.shape[1] for v in values)
            return torch.cat(
                [
                    nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (0, longest - v.shape[1]))
                    for v in values
                ]
            )

        return cls(**{k: join([getattr(part, k) for part in parts]) for k in vars(parts[0])})


QKV = tuple[Tensor, Tensor, Tensor]  # queries, keys, values, each (B, L, N, K)


class Conditions(NamedTuple):
    """What does not depend on the noise, computed once per observation."""

    text: list[TextStates | TextKV]  # per layer
    und: Tensor | None  # (B, Lu, D)
    und_qkv: QKV | None  # of the first layer, if cached
    und_bias: Tensor | None  # (B, Lu) of its tokens as keys
    state: Tensor | None  # (B, 1, D) state token
    action_mask: Tensor | None  # (B, S, A)
    action_bias: Tensor | None  # (B, La) of the action expert's tokens as keys
    positions: Tensor  # (La, D) of the action expert's tokens
    rope: tuple[Tensor, Tensor]  # cos and sin (Lv, K/2) of the video tokens


class Clock(NamedTuple):
    """What the two times mean to the network: e for the heads (B, 1, D), e0 for the blocks (B, 1,
    6, D), fp32."""

    video: tuple[Tensor, Tensor]
    action: tuple[Tensor, Tensor] | None


class Held(NamedTuple):
    """Keys and values of one layer that action-first sampling holds on to, each (B, L, N, K)."""

    video: tuple[Tensor, Tensor]
    und: tuple[Tensor, Tensor] | None


# -- the two small experts ------------------------------------------------------------------------


def position_table(rows: int, dim: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed positions (rows, dim): sines in the first half, cosines in the second, computed in
    float64, returned in fp32."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2))
    angle = torch.outer(torch.arange(rows, dtype=torch.float64, device=device), omega)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


class ExpertBlock(nn.Module):
    """One layer of a small expert: it owns projections into the video expert's heads, norms and an
    FFN, but no attention of its own. `modulated` blocks (action) are gated by their timestep and
    keep an fp32 stream; the others (understanding) are plain pre-norm."""

    def __init__(
        self, width: int, ffn: int, heads: int, head_dim: int, eps: float, modulated: bool
    ):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, heads, width, head_dim) / math.sqrt(width))
        self.o = Linear(heads * head_dim, width, bias=False)
        self.norm_q, self.norm_k = RMSNorm(heads * head_dim, eps), RMSNorm(heads * head_dim, eps)
        self.norm1 = LayerNorm(width, eps, elementwise_affine=False)
        self.norm2 = LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = mlp(width, ffn, width, act=nn.GELU, approximate="tanh")
        if modulated:
            self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def pre_attention(
        self, x: Tensor, mod: Modulation | None = None, queries: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> q, k, v, each (B, L, N, K); q is (B, 0, N, K) without `queries`, where
        nobody reads what they would find."""
        h = (
            self.norm1(x)
            if mod is None
            else norm_modulate(x, self.norm1, mod.shift, mod.scale, self.qkv.dtype)
        )
        weight = rearrange(self.qkv if queries else self.qkv[1:], "n_qkv n d k -> (n_qkv n k) d")
        *q, k, v = nn.functional.linear(h.to(weight.dtype), weight).chunk(
            3 if queries else 2, dim=-1
        )
        v = rearrange(v, "b l (n k) -> b l n k", n=self.qkv.shape[1])
        if not queries:
            return (
                v[:, :0],
                rearrange(self.norm_k(k), "b l (n k) -> b l n k", n=self.qkv.shape[1]),
                v,
            )
        return *norm_rotate(*q, k, self.norm_q, self.norm_k, v.shape[-1]), v

    def post_attention(
        self,
        x: Tensor,
        attended: Tensor,
        mod: Modulation | None = None,
        ffn_mod: Modulation | None = None,
    ) -> Tensor:
        """x (B, L, D) residual stream, attended (B, L, N*K) -> (B, L, D)."""
        if mod is None:
            x = x + self.o(attended)
            return x + self.ffn(self.norm2(x))
        x = add_gated(x, self.o(attended), mod.gate)
        h = norm_modulate(x, self.norm2, ffn_mod.shift, ffn_mod.scale, self.qkv.dtype)
        return add_gated(x, self.ffn(h), ffn_mod.gate)


def xavier(module: nn.Module) -> None:
    """Xavier weights and zero biases for every linear map inside."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class InputEncoder(nn.Module):
    """State and actions to tokens, by separate three-layer MLPs."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        width = config.action_width
        if config.finetune:
            self.state_encoder = mlp(config.state_dim, width, width, width)
        self.action_encoder = mlp(config.action_dim, width, width, width)


class ActionDecoder(nn.Module):
    def __init__(self, config: MotusConfig):
        super().__init__()
        self.norm = LayerNorm(config.action_width, config.action_eps, elementwise_affine=False)
        self.modulation = nn.Parameter(
            torch.randn(1, 2, config.action_width) / config.action_width**0.5
        )
        self.action_head = nn.Sequential(Linear(config.action_width, config.action_dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # x (B, La, D), e (B, 1, D) -> (B, La, A)
        return self.action_head(
            norm_modulate(x, self.norm, *modulation(self.modulation, e.unsqueeze(2)))
        )


class ActionExpert(nn.Module):
    """Tokens [state, actions, registers] to the velocity of the actions. Every token gets the
    action timestep, the clean state too."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        self.config = config
        video, width = config.video, config.action_width
        self.input_encoder = InputEncoder(config)
        if config.finetune:
            self.registers = nn.Parameter(0.02 * torch.randn(1, config.registers, width))
        self.time_embedding = mlp(video.freq_dim, width, width, linear=LinearFP32)
        self.time_projection = nn.Sequential(nn.SiLU(), LinearFP32(width, 6 * width))
        self.blocks = nn.ModuleList(
            ExpertBlock(
                width,
                config.expert_ffn * width,
                video.heads,
                video.head_dim,
                config.action_eps,
                modulated=True,
            )
            for _ in range(video.layers)
        )
        self.decoder = ActionDecoder(config)

    def init_weights(self) -> None:
        """The official initialisation: Xavier linear maps, time embedding std 0.02, a zero head."""
        xavier(self)
        for module in self.time_embedding:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.decoder.action_head[0].weight)

    def embed(self, actions: Tensor, state: Tensor | None, positions: Tensor) -> Tensor:
        """actions (B, S, A), encoded state (B, 1, D) or None -> tokens (B, La, D), `positions` (La,
        D) added to all of them."""
        tokens = [self.input_encoder.action_encoder(actions)]
        if self.config.finetune:
            tokens = [state, *tokens, self.registers.expand(len(actions), -1, -1)]
        x = torch.cat(tokens, dim=1)
        return x + positions.to(x.dtype)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) in [0, 1] -> e (B, 1, D) for the decoder, e0 (B, 1, 6, D) for the blocks, fp32."""
        e = self.time_embedding(time_sinusoid(1000 * t[:, None], self.config.video.freq_dim))
        return e, rearrange(self.time_projection(e), "b l (six d) -> b l six d", six=6)

    def key_bias(self, action_mask: Tensor | None) -> Tensor | None:
        """(B, S, A) -> bias (B, La) of the tokens as keys: padded actions are none; state and
        registers always are."""
        if action_mask is None:
            return None
        ends = (1, self.config.registers) if self.config.finetune else (0, 0)
        return nn.functional.pad(key_bias(action_mask.any(dim=-1)), ends)

    def actions_of(self, x: Tensor) -> Tensor:
        """Cuts state and registers off (B, La, ...)."""
        return x[:, 1 : x.shape[1] - self.config.registers] if self.config.finetune else x


class UndExpert(nn.Module):
    """Carries what the frozen VLM understood into the joint attention: an adapter and plain
    pre-norm blocks."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        video, width = config.video, config.und_width
        self.vlm_adapter = mlp(config.vlm_dim, width, width, width)
        self.blocks = nn.ModuleList(
            ExpertBlock(
                width,
                config.expert_ffn * width,
                video.heads,
                video.head_dim,
                config.und_eps,
                modulated=False,
            )
            for _ in range(video.layers)
        )

    def init_weights(self) -> None:
        xavier(self)


# -- the layer where the three experts meet -------------------------------------------------------


class Layer(nn.Module):
    """Every expert normalises, projects and feeds forward alone; the attention is the only place
    where they meet."""

    def __init__(self, video: WanBlock, action: ExpertBlock, und: ExpertBlock, last: bool):
        super().__init__()
        self.video, self.action, self.und, self.last = video, action, und, last

    def forward(
        self,
        xv: Tensor,
        xa: Tensor | None,
        xu: Tensor | None,
        time_video: Tensor,
        time_action: Tensor | None,
        rope: tuple[Tensor, Tensor],
        text: TextStates | TextKV,
        action_bias: Tensor | None,
        und_bias: Tensor | None,
        und_qkv: QKV | None = None,
        hold: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Held | None]:
        """xv (B, Lv, Dv), xa (B, La, Da) or None, xu (B, Lu, Du) or None -> the same three after
        one layer, and what `act` needs if it shall be held. `und_qkv`: what the understanding
        expert would project, if that is known."""
        mod_v = modulation(
            self.video.modulation, time_video
        )  # shift1 scale1 gate1 shift2 scale2 gate2
        qkv = [self.video.pre_attention(xv, Modulation(*mod_v[:3]), rope)]
        biases = [None]
        if xa is not None:
            mod_a = modulation(self.action.modulation, time_action)
            qkv.append(self.action.pre_attention(xa, Modulation(*mod_a[:3])))
            biases.append(action_bias)
        if xu is not None:
            qkv.append(
                und_qkv or self.und.pre_attention(xu, queries=not self.last)
            )  # nothing reads the last layer's xu
            biases.append(und_bias)

        attended = joint_attention(qkv, biases)

        xv = self.video.post_attention(
            xv, attended[0], Modulation(*mod_v[:3]), Modulation(*mod_v[3:]), text
        )
        if xa is not None:
            xa = self.action.post_attention(
                xa, attended[1], Modulation(*mod_a[:3]), Modulation(*mod_a[3:])
            )
        if xu is not None and not self.last:
            xu = self.und.post_attention(xu, attended[-1])
        return xv, xa, xu, Held(qkv[0][1:], None if xu is None else qkv[-1][1:]) if hold else None

    def act(
        self,
        xa: Tensor,
        time_action: Tensor,
        held: Held,
        action_bias: Tensor | None,
        und_bias: Tensor | None,
    ) -> Tensor:
        """The action expert alone: its tokens xa (B, La, Da) attend to themselves and to what is
        held of the others."""
        mod = modulation(self.action.modulation, time_action)
        silent = lambda k, v: (v[:, :0], k, v)  # keys and values without queries
        qkv = [
            silent(*held.video),
            self.action.pre_attention(xa, Modulation(*mod[:3])),
            *([silent(*held.und)] if held.und else []),
        ]
        attended = joint_attention(qkv, [None, action_bias, und_bias][: len(qkv)])
        return self.action.post_attention(
            xa, attended[1], Modulation(*mod[:3]), Modulation(*mod[3:])
        )


# -- the model ------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Loss per sample, and the times it was measured at (for the loss per time bin)."""

    video: Tensor  # (B,)
    action: Tensor | None  # (B,), 0 for a sample without actions
    t_video: Tensor  # (B,)
    t_action: Tensor | None  # (B,)
    has_action: Tensor | None  # (B,) bool

    def total(
        self,
        video_weight: float = 1.0,
        action_weight: float = 1.0,
        videos: float | None = None,
        acting: float | None = None,
    ) -> Tensor:
        """Mean over the batch; a modality that a sample lacks, or is given, does not enter its
        mean. For a part of a larger batch, where `videos` samples in all have a video loss and
        `acting` an action loss, its share of that mean."""
        mean = lambda loss, has, count: (
            (loss * has).sum() / (has.sum().clamp(min=1) if count is None else max(count, 1))
        )
        total = video_weight * mean(self.video, self.t_video > 0, videos)
        if self.action is not None:
            total = total + action_weight * mean(
                self.action, self.has_action & (self.t_action > 0), acting
            )
        return total


class Prediction(NamedTuple):
    video: Tensor | None  # (B, C, T, h, w) latents, frame 0 is the observation
    actions: Tensor | None  # (B, S, A), normalised


class Motus(nn.Module):
    """Video expert, action expert, understanding expert."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        self.config = config
        self.video = WanModel(config.video)
        self.action = ActionExpert(config)
        self.und = UndExpert(config)
        # A plain list: the experts own the blocks (and name them in the state dict); a layer only
        # lines them up.
        blocks = list(zip(self.video.blocks, self.action.blocks, self.und.blocks))
        self.layers = [Layer(*trio, last=i == len(blocks) - 1) for i, trio in enumerate(blocks)]
        self.compiled: tuple[Callable, Callable] | None = (
            None  # `evaluate` and `act`, by `compile_sampler`
        )

    def init_weights(self) -> "Motus":
        for expert in (self.video, self.action, self.und):
            expert.init_weights()
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        weights: str = "ema",
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        int8: bool = False,
    ) -> tuple["Motus", "Card"]:
        """The model at `path` and its card: a run of ours or one of its checkpoints (EMA weights,
        or "model"), an official Motus folder or file, a converted one, a Wan2.2 folder (its video
        expert; the others start fresh, and a line on stderr says so), or a name to download
        (`backbones.weights.HUB`). Weights keep the dtype of the file unless `dtype` is given.
        `int8` stores the video expert's linear maps in int8, which halves the memory of the bf16
        model, for sampling on small cards."""
        source, rename, card, fresh = open_weights(path, weights)
        config = MotusConfig.of(card.motus, path)
        with torch.device("meta"):
            model = cls(config)
        if fresh:
            model.action.load_state_dict(ActionExpert(config).state_dict(), assign=True)
            model.und.load_state_dict(UndExpert(config).state_dict(), assign=True)
            model.action.init_weights()
        with source:
            dtype = dtype or next(
                (
                    source.dtype(name)
                    for name in source.names()
                    if (rename(name) or "").startswith("video.")
                ),
                None,
            )
            report = load_into(
                model, source, rename, dtype, ignore=("vlm.",), fresh=fresh, device=device
            )
        if fresh:
            print(f"{report} ({', '.join(prefix + '*' for prefix in fresh)})", file=sys.stderr)
        model = model.to(device, dtype).eval()
        if int8:
            quantise(model.video.blocks)
        return model, card

    # -- one evaluation of the network --

    def conditions(self, inputs: Inputs, cache: bool = False) -> Conditions:
        """What all steps of the sampler share. `cache` also computes here what a layer would make
        of that alone: keys and values of the text in every layer, and all that the first layer
        projects from the understanding tokens."""
        config = self.config
        states = self.video.embed_text(inputs.context, inputs.context_len)
        text = (
            [block.text_kv(states) for block in self.video.blocks]
            if cache
            else [states] * len(self.layers)
        )
        und = None if inputs.und is None else self.und.vlm_adapter(inputs.und)
        first = self.layers[0]
        und_qkv = (
            first.und.pre_attention(und, queries=not first.last)
            if cache and und is not None
            else None
        )
        state = None
        if config.finetune and inputs.state is not None:
            state = self.action.input_encoder.state_encoder(inputs.state[:, None])
        chunk = config.chunk if inputs.actions is None else inputs.actions.shape[1]
        positions = position_table(
            chunk + (1 + config.registers) * config.finetune,
            config.action_width,
            inputs.latents.device,
        )
        grid = [
            n // p
            for n, p in zip((config.latent_frames, *inputs.latents.shape[3:]), config.video.patch)
        ]
        rope = rope_3d(grid, config.video.head_dim, inputs.latents.device)
        und_bias = None if inputs.und_mask is None else key_bias(inputs.und_mask)
        action_bias = self.action.key_bias(inputs.action_mask)
        return Conditions(
            text, und, und_qkv, und_bias, state, inputs.action_mask, action_bias, positions, rope
        )

    def clock(self, t_video: Tensor, t_action: Tensor | None) -> Clock:
        """Times (B,) in [0, 1] -> what they mean to the network."""
        return Clock(
            self.video.embed_time(t_video),
            None if t_action is None else self.action.embed_time(t_action),
        )

    def velocity(
        self,
        video: Tensor,
        action: Tensor | None,
        t_video: Tensor,
        t_action: Tensor | None,
        conditions: Conditions,
    ) -> tuple[Tensor, Tensor | None]:
        """The network. video (B, C, T, h, w) with a clean frame 0, action (B, S, A) or None (the
        video expert alone), times (B,) in [0, 1], independent per sample. Returns the velocities
        noise - data: (B, C, T, h, w) fp32, and (B, La, A) for all tokens of the action expert
        (`self.action.actions_of` cuts out the chunk)."""
        clock = self.clock(t_video, None if action is None else t_action)
        return self.evaluate(video, action, clock, conditions)[:2]

    def evaluate(
        self,
        video: Tensor,
        action: Tensor | None,
        clock: Clock,
        conditions: Conditions,
        hold: bool = False,
    ) -> tuple[Tensor, Tensor | None, list[Held | None]]:
        """`velocity` at times that are embedded already; the third result is what `act` needs, if
        it shall be held."""
        xv, grid = self.video.patchify(video)  # (B, Lv, Dv)
        (ev, time_video), (ea, time_action) = clock.video, clock.action or (None, None)
        xa = None if action is None else self.action_tokens(action, conditions)
        xu, und_qkv, held = conditions.und, conditions.und_qkv, []  # (B, Lu, Du)
        for layer, text in zip(self.layers, conditions.text):
            xv, xa, xu, kept = layer(
                xv,
                xa,
                xu,
                time_video,
                time_action,
                conditions.rope,
                text,
                conditions.action_bias,
                conditions.und_bias,
                und_qkv,
                hold,
            )
            und_qkv = None
            held.append(kept)
        return (
            self.video.unpatchify(self.video.head(xv, ev), grid),
            None if xa is None else self.action.decoder(xa, ea),
            held,
        )

    def act(self, action: Tensor, clock: Clock, conditions: Conditions, held: list[Held]) -> Tensor:
        """The velocity (B, La, A) of the actions alone, while what the other experts showed at an
        earlier evaluation is held."""
        (ea, time_action), xa = clock.action, self.action_tokens(action, conditions)
        for layer, kept in zip(self.layers, held):
            xa = layer.act(xa, time_action, kept, conditions.action_bias, conditions.und_bias)
        return self.action.decoder(xa, ea)

    def action_tokens(self, action: Tensor, conditions: Conditions) -> Tensor:
        """action (B, S, A) -> tokens (B, La, D)."""
        mask = conditions.action_mask
        action = action if mask is None else action * mask  # dimensions that do not exist are zero
        return self.action.embed(action, conditions.state, conditions.positions)

    # -- training --

    def loss(
        self,
        inputs: Inputs,
        t_video: Tensor,
        video_noise: Tensor,
        t_action: Tensor | None = None,
        action_noise: Tensor | None = None,
    ) -> Losses:
        """The training loss per sample at times (B,) and noise as `draw` makes them. Without
        `inputs.actions` the video expert is trained alone (stage 1)."""
        latents, actions = inputs.latents, inputs.actions
        noisy_video = flow.keep_observation(
            flow.mix(latents, video_noise, t_video), latents[:, :, :1]
        )
        noisy_action = None if actions is None else flow.mix(actions, action_noise, t_action)
        v_video, v_action = self.velocity(
            noisy_video, noisy_action, t_video, t_action, self.conditions(inputs)
        )
        video = flow.video_loss(v_video, video_noise - latents, inputs.video_mask)
        if actions is None:
            return Losses(video, None, t_video, None, None)
        v_action = self.action.actions_of(v_action).float()
        action = flow.action_loss(v_action, action_noise - actions, inputs.action_mask)
        mask = inputs.action_mask
        has_action = (
            torch.ones_like(t_action, dtype=torch.bool)
            if mask is None
            else mask.flatten(1).any(dim=1)
        )
        return Losses(video, action, t_video, t_action, has_action)

    # -- sampling --

    @torch.no_grad()
    def sample(
        self,
        inputs: Inputs,
        mode: str = "joint",
        steps: int = 10,
        generator: torch.Generator | None = None,
        shift: float = 1.0,
        video_noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        joint: int | None = None,
    ) -> Prediction:
        """Runs one of the five modes. `inputs.latents` holds the observation in frame 0, and the
        future too in mode `idm`; `inputs.actions` is read in mode `world_model` only. Returns what
        the mode denoises, None for the rest. Noise is drawn from `generator` (CPU), video before
        action, unless given.

        Action-first, an approximation: after `joint` steps the actions go on alone, while the keys
        and values that the video and the understanding showed last are held; the video is not
        finished, so none is returned. With joint = 0 those come from one look of the video at its
        noise, without the actions."""
        config, row = self.config, flow.mode_named(mode)
        if joint is not None and not (row.action == flow.DENOISE and 0 <= joint <= steps):
            raise ValueError(
                f"joint is {joint} in mode {mode} of {steps} steps; action-first sampling takes 0 to {steps} of them, in a "
                f"mode that denoises actions: {', '.join(m for m in flow.MODES if flow.MODES[m].action == flow.DENOISE)}"
            )
        observation = inputs.latents[:, :, :1]
        shape = (len(inputs), config.video.latent, config.latent_frames, *observation.shape[3:])
        video = inputs.latents if row.video == flow.GIVEN else video_noise
        if row.video == flow.GIVEN and tuple(video.shape) != shape:
            raise ValueError(
                f"mode {mode} is given the video, but latents are {tuple(video.shape)}; expected {shape}"
            )
        action = inputs.actions if row.action == flow.GIVEN else action_noise
        if row.action == flow.GIVEN and action is None:
            raise ValueError(
                f"mode {mode} is given the actions, but inputs.actions is None; set it to (B, {config.chunk}, A)"
            )
        if config.finetune and inputs.state is None:
            raise ValueError("inputs.state is None; this model has a state token: set it to (B, P)")
        if video is None:
            video = gaussian(observation.new_empty(shape), generator)
        if action is None:
            action = gaussian(
                observation.new_empty(len(inputs), config.chunk, config.action_dim), generator
            )
        evaluate, act = self.compiled or (self.evaluate, self.act)
        inputs = inputs.padded(self.BUCKET) if self.compiled else inputs.unmasked()
        if row.video != flow.GIVEN:
            video = flow.keep_observation(video, observation)
        conditions = self.conditions(inputs, cache=True)
        times = flow.sampling_times(steps, shift)[:-1].to(observation.device)
        table = self.clock(
            *(flow.times_of(what, times) for what in row)
        )  # (steps, 1, ...), the same for all samples
        clocks = [
            Clock(
                *(
                    tuple(x[i : i + 1].expand(len(inputs), *x.shape[1:]) for x in pair)
                    for pair in table
                )
            )
            for i in range(steps)
        ]
        held = evaluate(video, None, clocks[0], conditions, True)[2] if joint == 0 else None
        progress = enumerate(clocks, start=1)

        def velocity(video: Tensor, action: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor]:
            nonlocal held
            step, clock = next(progress)
            if joint is not None and step > joint:
                return None, self.action.actions_of(act(action, clock, conditions, held))
            v_video, v_action, held = evaluate(video, action, clock, conditions, joint is not None)
            if self.compiled:  # a CUDA graph reuses the memory of its outputs
                held = tree_map_only(Tensor, torch.clone, held)
            return v_video, self.action.actions_of(v_action)

        video, action = flow.sample(velocity, video, action, observation, mode, steps, shift)
        whole = row.video == flow.DENOISE and joint in (None, steps)
        return Prediction(video if whole else None, action if row.action == flow.DENOISE else None)

    # rows of text and understanding are padded to multiples of this where steps are compiled
    BUCKET = 32

    def compile_sampler(self, **options: object) -> "Motus":
        """From now on `sample` runs each step as one static graph: torch.compile with `options` (on
        a GPU mode="reduce-overhead" makes it a CUDA graph). One graph serves all five modes;
        another batch size or bucket of lengths compiles again."""
        self.compiled = tuple(
            torch.compile(part, fullgraph=True, dynamic=False, **options)
            for part in (self.evaluate, self.act)
        )
        return self


def draw(
    inputs: Inputs,
    generator: torch.Generator,
    times: str = "official",
    given: float = 0.0,
    size: int | None = None,
    first: int = 0,
) -> dict[str, Tensor]:
    """Training times and noise, the arguments of `Motus.loss`. They are drawn on the CPU for a
    whole batch of `size` (default: these inputs), of which `inputs` are the rows from `first` on;
    order: video time, action time, what is given, video noise, action noise. In a share `given` of
    the samples one modality is given (`flow.give`)."""
    size, acts = len(inputs) if size is None else size, inputs.actions is not None
    drawn = {
        f"t_{kind}": flow.TIMES[times](size, generator) for kind in ("video", "action")[: 1 + acts]
    }
    if acts and given:
        drawn = dict(zip(drawn, flow.give(*drawn.values(), given, generator)))
    for kind, like in (("video", inputs.latents), ("action", inputs.actions))[: 1 + acts]:
        drawn[f"{kind}_noise"] = torch.randn(size, *like.shape[1:], generator=generator)
    return {
        name: value[first : first + len(inputs)].to(inputs.latents.device)
        for name, value in drawn.items()
    }


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise in fp32, drawn on the CPU so that a seed means the same on every
    device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


# -- the stages, written once ---------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of training (paper Sec. 3.3, Tab. 1)."""

    levels: tuple[int, ...]  # of the data pyramid
    experts: tuple[str, ...]  # which are trained
    # what actions are: "none", "latent" (14 numbers of a video) or "real" (the robot's, with its
    # state)
    actions: str
    fresh: tuple[str, ...]  # names that start fresh, whatever the stage starts from
    modes: tuple[str, ...]  # modes that its checkpoints have
    before: str | None  # the stage it starts from

    @property
    def finetune(self) -> bool:
        """Whether the network has a state token and registers."""
        return self.actions == "real"


EXPERTS = ("video", "action", "und")
STAGES = {
    "1": Stage((2, 3, 5), ("video",), "none", ("action.", "und."), ("vgm",), None),
    "latent": Stage((2, 3, 4, 5, 6), (), "labels", (), (), None),
    "2": Stage((2, 3, 4, 5), EXPERTS, "latent", ("action.", "und."), ("joint", "vgm"), "1"),
    "3": Stage(
        (6,),
        EXPERTS,
        "real",
        ("action.input_encoder.", "action.decoder.", "action.registers"),
        tuple(flow.MODES),
        "2",
    ),
}

# -- the presets, written once: to add one is to add a row ----------------------------------------


@dataclass(frozen=True)
class Preset:
    """A size of everything: what differs between the toy, a simulator, one GPU and the published
    model."""

    motus: MotusConfig
    size: tuple[int, int]  # of the picture, H x W
    latent: dict  # fields of latent_action.LatentActionConfig
    backbones: Path | None = None  # folder of the frozen networks
    data: Path | None = None  # the card that is trained on where none is named
    world: str = ""  # where its policy acts: a module of worlds/
    quick: dict[str, dict] = field(
        default_factory=dict
    )  # stage -> settings of train.py that differ
    long: dict[str, dict] = field(
        default_factory=dict
    )  # the same for the long recipe, on top of quick


HERE = Path(__file__).parent
# Small networks take many small steps by Muon: what is learnt in a minute decides.
SMALL_STEPS = dict(batch=16, lr=2e-3, optimizer="muon")
LONG_STEPS = dict(batch=32, lr=1e-3, optimizer="adamw")
# The paper's batch, weight decay and rates; schedules of the official configs. The steps of stage 1
# are not published: in proportion to the GPU-hours of stage 2.
FULL = dict(
    batch=256,
    video_lr=0.0,
    clip=0.5,
    ema=0.9999,
    precision="bf16",
    checkpointing="full",
    compile=1,
    micro=8,
    workers=4,
    save_every=1000,
    keep=3,
    warmup=1000,
    floor=0.2,
)
# The toy sees its 48 x 48 pixels as they are, because its fingers are two pixels wide: nine tokens
# of 32, and flow in planes.
TOY_DCAE = dict(
    widths=(16, 32, 64, 64),
    encoder_depths=(0, 1, 1, 0),
    decoder_depths=(0, 0, 1, 0),
    latent_channels=32,
    conv_stages=4,
)

PRESETS = {
    "toy": Preset(
        MotusConfig(
            WanConfig(
                patch=(1, 1, 1),
                width=64,
                ffn=192,
                layers=4,
                heads=4,
                latent=24,
                text_dim=48,
                text_len=16,
                freq_dim=64,
            ),
            frames=4,
            ratio=3,
            action_width=64,
            action_dim=3,
            state_dim=3,
            und_width=48,
            vlm_dim=96,
        ),
        size=(48, 48),
        latent=dict(
            dcae=TOY_DCAE,
            image=48,
            radius=7.5,
            code="planes",
            hidden=(256, 128),
            interval=3,
            action_dim=3,
        ),
        backbones=HERE / "weights" / "toy",
        data=HERE / "worlds" / "toy.json",
        world="toy",
        quick={
            "1": dict(SMALL_STEPS, steps=500),
            "latent": dict(steps=1000, batch=128, lr=2e-3, episodes=40),
            "2": dict(SMALL_STEPS, steps=600, given=0.2),
            "3": dict(SMALL_STEPS, steps=2500, episodes=1000, windows=12000, given=0.2),
        },
        long={
            "1": dict(LONG_STEPS, steps=1000, episodes=200, windows=4000),
            "latent": dict(steps=3000),
            "2": dict(LONG_STEPS, steps=1500, episodes=200, windows=4000),
            "3": dict(LONG_STEPS, steps=8500, episodes=2000, windows=24000, ema=0.998),
        },
    ),
    "sim": Preset(
        MotusConfig(
            WanConfig(
                patch=(1, 2, 2),
                width=96,
                ffn=288,
                layers=4,
                heads=3,
                latent=24,
                text_dim=48,
                text_len=32,
                freq_dim=64,
            ),
            frames=4,
            ratio=4,
            action_width=96,
            action_dim=4,
            state_dim=4,
            und_width=64,
            vlm_dim=96,
        ),
        size=(96, 96),
        # 20 rows a second; the flow of pictures of 96, at half their size
        latent=dict(
            dcae=TOY_DCAE,
            image=48,
            radius=7.5,
            code="planes",
            hidden=(256, 128),
            interval=4,
            action_dim=4,
        ),
        backbones=HERE / "weights" / "sim",
        world="metaworld",
        quick={
            "1": dict(SMALL_STEPS, steps=1500, windows=5000),
            "latent": dict(steps=1500, batch=128, lr=2e-3),
            "2": dict(SMALL_STEPS, steps=1500, windows=5000, given=0.2),
            "3": dict(SMALL_STEPS, steps=6000, windows=20_000, given=0.2, ema=0.998),
        },
    ),
    "small": Preset(
        MotusConfig(
            WanConfig(width=768, ffn=3072, layers=18, heads=12, text_dim=4096),
            frames=8,
            ratio=2,
            action_width=384,
            und_width=256,
        ),
        size=(256, 256),
        latent=dict(
            dcae=dict(
                widths=(32, 64, 128, 128, 256, 256, 512),
                encoder_depths=(1, 1, 2, 2, 2, 2, 2),
                decoder_depths=(1, 1, 2, 2, 2, 2, 2),
                latent_channels=128,
            ),
            image=256,
            radius=32.0,
            hidden=(512, 256),
            interval=6,
            action_dim=14,
        ),
    ),
    "full": Preset(
        MotusConfig(),
        size=(384, 320),
        latent=dict(dcae={}, image=256, radius=32.0, hidden=(512, 256), interval=6, action_dim=14),
        backbones=Path("weights"),
        quick={
            "1": dict(FULL, steps=400_000, lr=8e-5),
            "2": dict(FULL, steps=500_000, lr=5e-5),
            "3": dict(
                FULL,
                steps=40_000,
                lr=5e-5,
                warmup=200,
                schedule="linear",
                horizon=5_000_000,
                floor=0.4,
            ),
        },
    ),
}


def preset(name: str, stage: str = "3", **changes) -> MotusConfig:
    """The network of a row for a stage, with changes: before stage 3 actions are 14 latent numbers,
    one per video frame."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
    form = {} if STAGES[stage].finetune else dict(finetune=False, ratio=1, action_dim=14)
    return replace(PRESETS[name].motus, **form | changes)
