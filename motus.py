"""Motus, a unified latent action world model (arXiv 2512.13030), in one file: three experts and the
layer where they meet.

    observation, instruction --> VLM, frozen --> und tokens     512 wide --.
    video latents (frame 0 clean) --> patches --> video tokens 3072 wide --+--> one joint attention
    state, noisy actions, registers --> action tokens          1024 wide --'    per layer (Sec. 3.1)
                                                                           --> two velocities

    sequence   [ video T*h*w | state 1, actions S, registers 4 | understanding Lu ]
    full size      360               53 (S = 48)                    ~130         30 layers

Video and action tokens are modulated by their own timestep (adaLN: shift, scale, gate);
understanding tokens by none. The video expert also reads the text states of the T5 encoder by cross
attention. `flow.py` says how the two timesteps make five modes out of one network. With `finetune`
there are a state token and registers (stage 3); without, the actions are latent (stages 1, 2).

Precision (weights may be bf16): residual streams of video and action, time paths, modulation tables
and video head are fp32; the understanding stream has the dtype of its weights, attention that of v.

Departures from the official code: padded understanding tokens and actions are masked as keys (no
effect at batch size 1); what does not depend on the noise is computed once per sample; the last
layer's understanding output is not computed; the position table is a function, so any chunk length
loads. A fresh small expert starts with values of unit scale (official: sqrt(K) smaller), the
understanding expert with Xavier maps (official: torch's default, whose biases drown what the VLM
says): small networks then learn in half as many steps.

Shapes: B batch, T latent frames, Lv La Lu tokens, D width, N heads, K head size, S chunk, A action
dimensions, P state dimensions, C latent channels, Lt text rows, Dt text width, Dv VLM width.
"""

import json
import math
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, pad

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
    xavier,
)
from backbones.published import open_weights
from backbones.wan import (
    Modulation,
    TextKV,
    TextStates,
    WanBlock,
    WanConfig,
    WanModel,
    embed_time,
    modulations,
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
    ratio: int = 2  # actions per frame (official: 2 RoboTwin, 6 real robots, 1 latent actions)
    action_width: int = 1024
    action_dim: int = 14
    state_dim: int = 14
    action_eps: float = 1e-5
    und_width: int = 512
    und_eps: float = 1e-5
    expert_ffn: int = 4  # FFN of the small experts, times their width
    vlm_dim: int = 2048
    registers: int = 4
    finetune: bool = True  # state token and registers (stage 3), or neither (stages 1 and 2)

    def __post_init__(self):
        if self.frames % 4:
            raise ValueError(f"frames is {self.frames}; expected a multiple of 4, as the VAE packs")
        if self.action_width % 2:
            raise ValueError(f"action_width is {self.action_width}; expected an even number")

    @classmethod
    def of(cls, stored: dict, source: object = "config.json") -> "MotusConfig":
        """The configuration that a card stores; ValueError, naming `source`, for an unknown key."""
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
    """A batch: outputs of the frozen backbones, clean actions, state; masks (False is padding)."""

    latents: Tensor  # (B, C, T, h, w), frame 0 is the observation; T may be 1 without a video
    context: Tensor  # (B, Lt, Dt) text states, zero from row `context_len` on
    context_len: Tensor  # (B,) int64
    und: Tensor | None = None  # (B, Lu, Dv) hidden states of the VLM; None in stage 1
    und_mask: Tensor | None = None  # (B, Lu) bool
    state: Tensor | None = None  # (B, P)
    actions: Tensor | None = None  # (B, S, A)
    action_mask: Tensor | None = None  # (B, S, A) bool; dimensions that do not exist are False too
    video_mask: Tensor | None = None  # (B, T) bool, False past the end of the episode
    moves: Tensor | None = None  # (B, T, h, w) bool, where the video is not what was observed

    def __len__(self) -> int:
        return len(self.latents)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(**{k: None if v is None else function(v) for k, v in vars(self).items()})

    def to(self, device: torch.device | str) -> "Inputs":
        ahead = torch.device(device).type != "cpu"  # whoever gets a copy on the host reads it
        return self.map(lambda x: x.to(device, non_blocking=ahead))

    def rows(self, index: Tensor | slice) -> "Inputs":
        return self.map(lambda x: x[index])


class Streams(NamedTuple):
    """The tokens of the three experts; None where an expert does not run."""

    video: Tensor  # (B, Lv, Dv)
    action: Tensor | None  # (B, La, Da)
    und: Tensor | None  # (B, Lu, Du)


class Timesteps(NamedTuple):
    """Both times as the network sees them, fp32; a time that no expert runs at is None."""

    video_end: Tensor  # (B, 1, Dv) for the head
    video: Tensor  # (B, 1, 6, Dv) for the blocks
    action_end: Tensor | None  # (B, 1, Da) for the decoder
    action: Tensor | None  # (B, 1, 6, Da)


class Conditioning(NamedTuple):
    """All that does not depend on the noise, computed once per observation."""

    text: list[TextStates | TextKV]  # per layer
    und: Tensor | None  # (B, Lu, Du) understanding tokens
    state: Tensor | None  # (B, 1, Da) state token
    action_mask: Tensor | None  # (B, S, A)
    action_bias: Tensor | None  # (B, La) of the action tokens as keys
    und_bias: Tensor | None  # (B, Lu) of the understanding tokens as keys
    positions: Tensor  # (La, Da) of the action tokens
    rope: tuple[Tensor, Tensor]  # cos and sin (Lv, K/2) of the video tokens


# -- the two small experts ------------------------------------------------------------------------


class ExpertBlock(nn.Module):
    """One layer of a small expert: it owns projections into the video expert's heads, norms and an
    FFN, but no attention of its own. `modulated` blocks (action) are gated by their timestep and
    keep an fp32 stream; the others (understanding) are plain pre-norm."""

    def __init__(self, config: MotusConfig, width: int, eps: float, modulated: bool):
        super().__init__()
        heads, size = config.video.heads, config.video.head_dim
        self.qkv = nn.Parameter(torch.randn(3, heads, width, size) / math.sqrt(width))
        self.o = Linear(heads * size, width, bias=False)
        self.norm_q = RMSNorm(heads * size, eps)
        self.norm_k = RMSNorm(heads * size, eps)
        self.norm1 = LayerNorm(width, eps, elementwise_affine=False)
        self.norm2 = LayerNorm(width, eps, elementwise_affine=False)
        hidden = config.expert_ffn * width
        self.ffn = mlp(width, hidden, width, act=nn.GELU, approximate="tanh")
        if modulated:
            self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def norm(self, x: Tensor, norm: LayerNorm, mod: Modulation | None) -> Tensor:
        if mod is None:
            return norm(x)
        return norm_modulate(x, mod.shift, mod.scale, norm.eps, self.qkv.dtype)

    def pre_attention(self, x: Tensor, mod: Modulation | None = None) -> tuple[Tensor, ...]:
        """x (B, L, D) -> q, k, v, each (B, L, N, K)."""
        h = self.norm(x, self.norm1, mod).to(self.qkv.dtype)
        weight = self.qkv.transpose(2, 3).flatten(0, 2)  # (3*N*K, D)
        q, k, v = linear(h, weight).chunk(3, dim=-1)
        v = rearrange(v, "b l (n k) -> b l n k", n=self.qkv.shape[1])
        eps = self.norm_q.eps
        q, k = norm_rotate(q, k, self.norm_q.weight, self.norm_k.weight, eps, v.shape[-1])
        return q, k, v

    def post_attention(
        self, x: Tensor, attended: Tensor, mod: Modulation | None, ffn_mod: Modulation | None
    ) -> Tensor:
        """x (B, L, D) residual stream, attended (B, L, N*K) -> (B, L, D)."""
        if mod is None:
            x = x + self.o(attended)
            return x + self.ffn(self.norm2(x))
        x = add_gated(x, self.o(attended), mod.gate)
        return add_gated(x, self.ffn(self.norm(x, self.norm2, ffn_mod)), ffn_mod.gate)


def expert_blocks(config: MotusConfig, *args, **kwargs) -> nn.ModuleList:
    """As many blocks as the video expert has."""
    return nn.ModuleList(ExpertBlock(config, *args, **kwargs) for _ in range(config.video.layers))


class InputEncoder(nn.Module):
    """State and actions to tokens, by separate three-layer MLPs."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        width = config.action_width
        if config.finetune:
            self.state_encoder = mlp(config.state_dim, width, width, width)
        self.action_encoder = mlp(config.action_dim, width, width, width)


class ActionDecoder(nn.Module):
    """Tokens (B, La, D) and time embedding (B, 1, D) -> velocities (B, La, A)."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        width = config.action_width
        self.norm = LayerNorm(width, config.action_eps, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.action_head = nn.Sequential(Linear(width, config.action_dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        (mod,) = modulations(self.modulation, e.unsqueeze(2))
        return self.action_head(norm_modulate(x, mod.shift, mod.scale, self.norm.eps))


class ActionExpert(nn.Module):
    """Tokens [state, actions, registers] to the velocity of the actions. Every token gets the
    action timestep, the clean state too."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        self.config = config
        width = config.action_width
        self.input_encoder = InputEncoder(config)
        if config.finetune:
            self.registers = nn.Parameter(0.02 * torch.randn(1, config.registers, width))
        self.time_embedding = mlp(config.video.freq_dim, width, width, linear=LinearFP32)
        self.time_projection = nn.Sequential(nn.SiLU(), LinearFP32(width, 6 * width))
        self.blocks = expert_blocks(config, width, config.action_eps, modulated=True)
        self.decoder = ActionDecoder(config)

    def init_weights(self) -> None:
        """The official initialisation: Xavier maps, time embedding std 0.02, a zero head."""
        xavier(self)
        for module in self.time_embedding:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.decoder.action_head[0].weight)

    def embed(self, actions: Tensor, state: Tensor | None, positions: Tensor) -> Tensor:
        """actions (B, S, A), encoded state (B, 1, D) or None -> tokens (B, La, D), `positions`
        (La, D) added to all of them."""
        tokens = [self.input_encoder.action_encoder(actions)]
        if self.config.finetune:
            tokens = [state, *tokens, self.registers.expand(len(actions), -1, -1)]
        x = torch.cat(tokens, dim=1)
        return x + positions.to(x.dtype)

    def key_bias(self, action_mask: Tensor | None) -> Tensor | None:
        """(B, S, A) -> bias (B, La) of the tokens as keys: padded actions are none; state and
        registers always are."""
        if action_mask is None:
            return None
        ends = (1, self.config.registers) if self.config.finetune else (0, 0)
        return pad(key_bias(action_mask.any(dim=-1)), ends)

    def actions_of(self, x: Tensor) -> Tensor:
        """Cuts state and registers off (B, La, ...)."""
        return x[:, 1 : x.shape[1] - self.config.registers] if self.config.finetune else x


class UndExpert(nn.Module):
    """Carries what the frozen VLM understood into the joint attention."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        width = config.und_width
        self.vlm_adapter = mlp(config.vlm_dim, width, width, width)
        self.blocks = expert_blocks(config, width, config.und_eps, modulated=False)

    def init_weights(self) -> None:
        xavier(self)


# -- the layer where the three experts meet -------------------------------------------------------


class Layer(nn.Module):
    """Every expert normalises, projects, feeds forward alone; only in the attention they meet."""

    def __init__(self, video: WanBlock, action: ExpertBlock, und: ExpertBlock, last: bool):
        super().__init__()
        self.video = video
        self.action = action
        self.und = und
        self.last = last  # nothing reads what the understanding would find there

    def forward(
        self, x: Streams, time: Timesteps, text: TextStates | TextKV, shared: Conditioning
    ) -> Streams:
        # Each expert projects its own tokens into the common heads.
        video_mod, video_ffn_mod = modulations(self.video.modulation, time.video)
        qkv = [self.video.pre_attention(x.video, video_mod, shared.rope)]
        biases = [None]
        if x.action is not None:
            action_mod, action_ffn_mod = modulations(self.action.modulation, time.action)
            qkv.append(self.action.pre_attention(x.action, action_mod))
            biases.append(shared.action_bias)
        if x.und is not None:
            q, k, v = self.und.pre_attention(x.und)
            qkv.append((q[:, :0] if self.last else q, k, v))
            biases.append(shared.und_bias)

        # One attention over the tokens of all three.
        attended = joint_attention(qkv, biases)

        # Each expert goes on alone.
        video = self.video.post_attention(x.video, attended[0], video_mod, video_ffn_mod, text)
        action, und = x.action, x.und
        if action is not None:
            action = self.action.post_attention(action, attended[1], action_mod, action_ffn_mod)
        if und is not None and not self.last:
            und = self.und.post_attention(und, attended[-1], None, None)
        return Streams(video, action, und)


# -- the model ------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """The result of sampling; None for what the mode does not denoise."""

    video: Tensor | None  # (B, C, T, h, w) latents, frame 0 is the observation
    actions: Tensor | None  # (B, S, A), normalised


class Motus(nn.Module):
    """Video expert, action expert, understanding expert."""

    def __init__(self, config: MotusConfig):
        super().__init__()
        self.config = config
        self.motion_weight = 0.0  # of the loss
        self.video = WanModel(config.video)
        self.action = ActionExpert(config)
        self.und = UndExpert(config)
        # A plain list: the experts own the blocks (and name them); a layer only lines them up.
        trios = list(zip(self.video.blocks, self.action.blocks, self.und.blocks))
        self.layers = [Layer(*trio, last=trio is trios[-1]) for trio in trios]

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
    ) -> tuple["Motus", Card]:
        """The model at `path` and its card: a run or checkpoint of ours (EMA weights, or "model"),
        an official Motus folder or file, a converted one, a Wan2.2 folder (the other experts start
        fresh), or a name of `weights.hub.HUB`. The dtype is the file's unless given, and fp32 of a
        file in fp16, in which nothing is computed."""
        source, rename, card, fresh = open_weights(path, weights)
        config = MotusConfig.of(card.motus, path)
        with torch.device("meta"):
            model = cls(config)
        if fresh:
            model.action.load_state_dict(ActionExpert(config).state_dict(), assign=True)
            model.und.load_state_dict(UndExpert(config).state_dict(), assign=True)
            model.action.init_weights()
        with source:
            videos = [n for n in source.names() if (rename(n) or "").startswith("video.")]
            if dtype is None and videos:
                found = source.dtype(videos[0])
                dtype = torch.float32 if found == torch.float16 else found
            load_into(model, source, rename, dtype, ("vlm.",), fresh=fresh, device=device)
        if fresh:
            missing = ", ".join(prefix + "*" for prefix in fresh)
            print(f"{source.path.name}: holds no {missing}, which start fresh", file=sys.stderr)
        return model.to(device, dtype).eval(), card

    def conditioning(self, inputs: Inputs, cache: bool = False) -> Conditioning:
        """All that the steps of the sampler share; with `cache` the keys and values of the text in
        every layer too (training makes them inside the layers, where weights are gathered)."""
        config = self.config
        states = self.video.embed_text(inputs.context, inputs.context_len)
        text = [states] * len(self.layers)
        if cache:
            text = [block.text_kv(states) for block in self.video.blocks]
        und = None if inputs.und is None else self.und.vlm_adapter(inputs.und)
        masked = inputs.und_mask is not None and not (cache and inputs.und_mask.all())
        und_bias = key_bias(inputs.und_mask) if masked else None
        state = None
        if config.finetune and inputs.state is not None:
            state = self.action.input_encoder.state_encoder(inputs.state[:, None])
        rows = config.chunk if inputs.actions is None else inputs.actions.shape[1]
        rows += 1 + config.registers if config.finetune else 0
        device = inputs.latents.device
        sinusoid = time_sinusoid(torch.arange(rows, device=device), config.action_width)
        positions = sinusoid.roll(config.action_width // 2, dims=-1)  # sines first
        action_bias = self.action.key_bias(inputs.action_mask)
        sizes = (config.latent_frames, *inputs.latents.shape[3:])
        grid = [size // patch for size, patch in zip(sizes, config.video.patch)]
        rope = rope_3d(grid, config.video.head_dim, device)
        masks = (inputs.action_mask, action_bias, und_bias)
        return Conditioning(text, und, state, *masks, positions, rope)

    def embed_times(self, t_video: Tensor, t_action: Tensor | None) -> Timesteps:
        """Times (B,) in [0, 1] of each sample; or (steps, B) of a sampler, in place of (B, 1)."""
        action = (None, None) if t_action is None else embed_time(self.action, t_action)
        return Timesteps(*embed_time(self.video, t_video), *action)

    def forward(
        self, video: Tensor, action: Tensor | None, time: Timesteps, shared: Conditioning
    ) -> tuple[Tensor, Tensor | None]:
        """The network. video (B, C, T, h, w) with a clean frame 0, action (B, S, A) or None (video
        expert alone) -> the velocities noise - data: (B, C, T, h, w) fp32, and (B, S, A)."""
        tokens, grid = self.video.patchify(video)  # (B, Lv, Dv)
        action_tokens = None
        if action is not None:
            if shared.action_mask is not None:
                action = action * shared.action_mask  # dimensions that do not exist are zero
            action_tokens = self.action.embed(action, shared.state, shared.positions)
        x = Streams(tokens, action_tokens, shared.und)

        for layer, text in zip(self.layers, shared.text):
            x = layer(x, time, text, shared)

        v_video = self.video.unpatchify(self.video.head(x.video, time.video_end), grid)
        if action is None:
            return v_video, None
        return v_video, self.action.actions_of(self.action.decoder(x.action, time.action_end))

    def loss(
        self,
        inputs: Inputs,
        t_video: Tensor,
        video_noise: Tensor,
        t_action: Tensor | None = None,
        action_noise: Tensor | None = None,
    ) -> flow.Losses:
        """The training loss per sample at times (B,) and noise like the data. Without
        `inputs.actions` the video expert is trained alone (stage 1)."""
        latents, actions, mask = inputs.latents, inputs.actions, inputs.action_mask
        noisy_video = flow.mix(latents, video_noise, t_video)
        noisy_video = flow.keep_observation(noisy_video, latents[:, :, :1])
        noisy_action = None if actions is None else flow.mix(actions, action_noise, t_action)
        shared = self.conditioning(inputs)
        times = self.embed_times(t_video, t_action)
        v_video, v_action = self(noisy_video, noisy_action, times, shared)
        weight = flow.moving_weight(inputs.moves, self.motion_weight)
        video = flow.video_loss(v_video, video_noise - latents, inputs.video_mask, weight)
        if actions is None:
            return flow.Losses(video, None, t_video, None, None)
        action = flow.action_loss(v_action.float(), action_noise - actions, mask)
        every = torch.ones_like(t_action, dtype=torch.bool)
        has_action = every if mask is None else mask.flatten(1).any(dim=1)
        return flow.Losses(video, action, t_video, t_action, has_action)

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
    ) -> Prediction:
        """Runs one of the five modes. `inputs.latents` holds the observation in frame 0, and the
        future too in mode `idm`; `inputs.actions` is read in mode `world_model` only. Inputs with
        neither state nor understanding are of stage 1: the video expert runs alone. Noise is drawn
        from `generator` (CPU), video before action, unless given."""
        config, row = self.config, flow.mode_named(mode)
        if config.finetune and inputs.state is None:
            raise ValueError("inputs.state is None; this model has a state token: expected (B, P)")
        alone = inputs.und is None and inputs.state is None
        observation = inputs.latents[:, :, :1]
        frames = (config.latent_frames, *observation.shape[3:])
        like = observation.new_empty(len(inputs), config.video.latent, *frames)
        video = flow.start("video", row.video, inputs.latents, video_noise, like, generator)
        like = observation.new_empty(len(inputs), config.chunk, config.action_dim)
        action = flow.start("actions", row.action, inputs.actions, action_noise, like, generator)
        shared = self.conditioning(inputs, cache=True)

        def embed(t_video: Tensor, t_action: Tensor) -> list[Timesteps]:  # all steps at once
            time = self.embed_times(t_video, t_action)
            return [Timesteps(*(x[i, :, None] for x in time)) for i in range(steps)]

        def velocity(video: Tensor, action: Tensor, now: Timesteps):
            return self(video, None if alone else action, now, shared)

        video, action = flow.sample(velocity, video, action, observation, mode, steps, shift, embed)
        video = video if row.video == flow.DENOISE else None
        return Prediction(video, action if row.action == flow.DENOISE else None)


# -- the stages, written once ---------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of training (paper Sec. 3.3, Tab. 1)."""

    levels: tuple[int, ...]  # of the data pyramid
    experts: tuple[str, ...]  # which are trained
    actions: str  # "none", "labels", "latent" (14 numbers) or "real" (the robot's, with its state)
    fresh: tuple[str, ...]  # names that start fresh, whatever the stage starts from
    modes: tuple[str, ...]  # modes that its checkpoints have
    before: str | None  # the stage it starts from

    @property
    def finetune(self) -> bool:
        """Whether the network has a state token and registers."""
        return self.actions == "real"


EXPERTS = ("video", "action", "und")
# Real actions have another meaning than latent ones.
FRESH = ("action.input_encoder.", "action.decoder.", "action.registers")
STAGES = {
    "1": Stage((2, 3, 5), ("video",), "none", ("action.", "und."), ("vgm",), None),
    "latent": Stage((2, 3, 4, 5, 6), (), "labels", (), (), None),
    "2": Stage((2, 3, 4, 5), EXPERTS, "latent", ("action.", "und."), ("joint", "vgm"), "1"),
    "3": Stage((6,), EXPERTS, "real", FRESH, tuple(flow.MODES), "2"),
}

# -- the presets: rows of presets.toml ------------------------------------------------------------

HERE = Path(__file__).parent
ROWS = tomllib.loads((HERE / "presets.toml").read_text())


@dataclass(frozen=True)
class Preset:
    """A size of everything, as a row of presets.toml says."""

    motus: MotusConfig
    size: tuple[int, int]  # of the picture, H x W
    latent: dict  # fields of latent_action.LatentActionConfig, "dcae" those of DCAEConfig
    backbones: Path | None  # folder of the frozen networks
    data: Path | None  # the card that is trained on where none is named
    world: str | None  # where its policy acts: a module of worlds/
    recipes: dict[str, dict]  # "quick" and "long" -> stage -> settings of train.py

    @classmethod
    def of(cls, row: dict) -> "Preset":
        video = {"patch": (1, 2, 2)} | row.get("video", {})
        config = MotusConfig.of({"video": video} | row.get("motus", {}), "presets.toml")
        latent = row["latent"] | {"dcae": row.get("dcae", {})}
        backbones, data = (HERE / row[key] if key in row else None for key in ("backbones", "data"))
        recipes = {name: row.get(name, {}) for name in ("quick", "long")}
        size = tuple(row["size"])
        return cls(config, size, latent, backbones, data, row.get("world"), recipes)

    def settings(self, stage: str, long: bool = False) -> dict:
        """Settings of a stage that differ from the defaults of train.py."""
        found = {}
        for name in ("quick", "long") if long else ("quick",):
            for key in (stage,) if stage == "latent" else ("all", stage):
                found |= self.recipes[name].get(key, {})
        return found


PRESETS = {name: Preset.of(row) for name, row in ROWS.items()}


def preset(name: str, stage: str = "3", **changes) -> MotusConfig:
    """The network of a row for a stage, with changes; before stage 3 actions are latent."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
    form = {} if STAGES[stage].finetune else dict(finetune=False, ratio=1, action_dim=14)
    return replace(PRESETS[name].motus, **form | changes)
