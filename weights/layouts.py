"""Names of tensors: from every published layout to the one that our modules use, and back.

Official Motus files list every tensor up to three times, because wrapper modules refer to the same
experts again; the copies are compared with the original and dropped. The fixed table
`pos_embedding` is dropped too: it is a function of its shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

Rules = tuple[tuple[str, str], ...]

# The official module tree: each part appears again under its wrappers.
WRAPPERS = {
    "video_module.": ("video_model.",),
    "und_module.": ("vlm_model.", "und_expert."),
    "action_module.": ("action_expert.", "video_model.", "vlm_model."),
}
TIED = (  # an output head and a token embedding that are second names of another tensor
    (r"lm_head\.weight$", "model.language_model.embed_tokens.weight"),
    (r"^encoder\.embed_tokens\.", "shared."),
)
POSITIONS = "action_expert.input_encoder.pos_embedding"

# -- rules, applied one after another: pattern -> replacement, where a dot is a dot ----------------


def rules_of(text: str) -> Rules:
    pairs = [line.split("->") for line in text.strip().splitlines()]
    return tuple((old.strip().replace(".", r"\."), new.strip()) for old, new in pairs)


MOTUS = rules_of(r"""
    ^video_model.wan_model. -> video.
    ^vlm_model.model. -> vlm.
    ^action_expert. -> action.
    ^und_expert. -> und.
    ^((action|und).blocks.\d+.)wan_\2_ -> \1
""")
MOTUS_BACK = rules_of(r"""
    ^(action|und).(blocks.\d+.)(?=qkv|o.|norm_) -> \1.\2wan_\1_
    ^(action|und). -> \1_expert.
    ^vlm. -> vlm_model.model.
    ^video. -> video_model.wan_model.
""")
WAN = rules_of("^dit. ->")  # in stage 1 files of Motus
# diffusers counts norms in order of use, Wan does not.
WAN_DIFFUSERS = rules_of(r"""
    ^condition_embedder.(text|time)_embedder.linear_1. -> \1_embedding.0.
    ^condition_embedder.(text|time)_embedder.linear_2. -> \1_embedding.2.
    ^condition_embedder.time_proj. -> time_projection.1.
    .attn1. -> .self_attn.
    .attn2. -> .cross_attn.
    _attn.to_([qkv]). -> _attn.\1.
    _attn.to_out.0. -> _attn.o.
    ^(blocks.\d+).norm2. -> \1.norm3.
    .ffn.net.0.proj. -> .ffn.0.
    .ffn.net.2. -> .ffn.2.
    ^proj_out. -> head.head.
    ^(blocks.\d+).scale_shift_table$ -> \1.modulation
    ^scale_shift_table$ -> head.modulation
""")
VAE_DIFFUSERS = rules_of(r"""
    (resnets.\d+).norm1. -> \1.residual.0.
    (resnets.\d+).conv1. -> \1.residual.2.
    (resnets.\d+).norm2. -> \1.residual.3.
    (resnets.\d+).conv2. -> \1.residual.6.
    .conv_shortcut. -> .shortcut.
    mid_block.resnets.0. -> middle.0.
    mid_block.attentions.0. -> middle.1.
    mid_block.resnets.1. -> middle.2.
    down_blocks.(\d+).resnets. -> downsamples.\1.downsamples.
    up_blocks.(\d+).resnets. -> upsamples.\1.upsamples.
    coder.conv_in. -> coder.conv1.
    coder.norm_out. -> coder.head.0.
    coder.conv_out. -> coder.head.2.
    ^quant_conv. -> conv1.
    ^post_quant_conv. -> conv2.
""")
UMT5 = rules_of(r"""
    ^encoder.block. -> blocks.
    ^encoder.final_layer_norm. -> norm.
    ^shared. -> token_embedding.
    .layer.(0.SelfAttention|1.DenseReluDense). -> .
    .layer.0.layer_norm. -> .norm1.
    .layer.1.layer_norm. -> .norm2.
    (\d).([qkvo]).weight$ -> \1.attn.\2.weight
    .relative_attention_bias. -> .pos_embedding.embedding.
    .wi_0. -> .ffn.gate.0.
    .wi_1. -> .ffn.fc1.
    .wo. -> .ffn.fc2.
""")
QWEN = rules_of("^model. ->")
# They leave names of the diffusers format, which are ours already, as they are. Away go wrappers of
# residual sums and of sequences, and that in which every convolution of the original sits.
DCAE = rules_of(r"""
    .(main|op_list)\b ->
    .(stages|project_in|project_out).(\S*.)?conv.(weight|bias)$ -> .\1.\2\3
    ^encoder.stages. -> encoder.down_blocks.
    ^decoder.stages. -> decoder.up_blocks.
    .project_in. -> .conv_in.
    ^decoder.project_out.0. -> decoder.norm_out.
    .project_out.[02]. -> .conv_out.
    .context_module.proj.norm. -> .attn.norm_out.
    .context_module.proj. -> .attn.to_out.
    .context_module. -> .attn.
    .local_module.point_conv.norm. -> .conv_out.norm.
    .local_module.(inverted|depth|point)_conv. -> .conv_out.conv_\1.
    .conv2.norm. -> .norm.
""")
DPFLOW = rules_of(r"""
    ^(state_dict.)?(model.)? ->
    ^fnet. -> encoder.
    ^update_block.encoder. -> update.motion.
    ^update_block. -> update.
    .gru_list.0. -> .gru.
    .conv_transition.proj. -> .transition.
    .downsample.0. -> .skip.
    stem.layer1. -> stem.blocks.
    stem.layer2.0. -> stem.blocks.2.
    stem.layer2.1. -> stem.blocks.3.
    .conv_cross.merge_fc_g. -> .merge.
    .fc1_g. -> .gate_in.
    .fc1_[xy]. -> .value_in.
    .dwconv_g.dwconv. -> .gate_mix.
    .dwconv_[xy].dwconv. -> .value_mix.
    .fc2. -> .out.
    ^(update.(?:flow_head|mask)).conv1. -> \1.0.
    ^(update.(?:flow_head|mask)).conv2. -> \1.2.
    ^update.motion.convc1. -> update.motion.seen.0.
    ^update.motion.convc2. -> update.motion.seen.2.
    ^update.motion.convf1. -> update.motion.known.0.
    ^update.motion.convf2. -> update.motion.known.2.
""")

# Where the official config.json of Motus has a field of MotusConfig.
MOTUS_FIELDS = {
    "frames": "common.num_video_frames",
    "ratio": "common.video_action_freq_ratio",
    "action_dim": "common.action_dim",
    "state_dim": "common.state_dim",
    "action_width": "action_expert.hidden_size",
    "action_eps": "action_expert.norm_eps",
    "expert_ffn": "action_expert.ffn_dim_multiplier",
    "und_width": "und_expert.hidden_size",
    "und_eps": "und_expert.norm_eps",
}
# Layouts: a tensor that only this layout has, and the rules from its names to ours.
KINDS = {
    "motus": ("action_expert.blocks.0.wan_action_qkv", MOTUS),
    "motus-own": ("action.blocks.0.qkv", ()),
    "wan": ("blocks.0.self_attn.norm_q.weight", WAN),
    "wan-diffusers": ("condition_embedder.time_proj.weight", WAN_DIFFUSERS),
    "wan-vae": ("encoder.downsamples.0.downsamples.0.residual.2.weight", ()),
    "wan-vae-diffusers": ("encoder.down_blocks.0.resnets.0.conv1.weight", VAE_DIFFUSERS),
    "umt5": ("token_embedding.weight", ()),
    "umt5-transformers": ("encoder.final_layer_norm.weight", UMT5),
    "qwen3vl": ("model.visual.patch_embed.proj.weight", QWEN),
    "qwen3vl-own": ("visual.patch_embed.proj.weight", ()),
    "dcae": ("encoder.project_in.conv.conv.weight", DCAE),
    "dcae-diffusers": ("encoder.conv_in.conv.weight", ()),
    "dpflow": ("fnet.stem.conv1.weight", DPFLOW),
}


def substitute(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def alias_of(name: str) -> str | None:
    """The tensor of which `name` is a second name: a wrapper's copy, a tied output head or a tied
    token embedding; else None."""
    original = substitute(name, TIED)
    for wrapper, parts in WRAPPERS.items():
        inner = original.removeprefix(wrapper)
        if inner.startswith(parts):
            original = inner
    return None if original == name else original


def rename_from(kind: str, blocks: int = 2) -> Callable[[str], str | None]:
    """The way from the names of a layout (a key of KINDS) to ours. It gives None for second names
    and for the fixed position table; a name that no rule knows stays, for the loader to refuse.
    `blocks`: residual blocks in a level of the VAE, among which diffusers does not count the
    level's resampler."""
    _, rules = KINDS.get(kind, ("", ()))
    if kind == "wan-vae-diffusers":
        down = (r"down_blocks\.(\d+)\.downsampler\.", rf"downsamples.\1.downsamples.{blocks}.")
        up = (r"up_blocks\.(\d+)\.upsampler\.", rf"upsamples.\1.upsamples.{blocks + 1}.")
        rules = (down, up, *rules)

    def rename(name: str) -> str | None:
        return None if alias_of(name) or name == POSITIONS else substitute(name, rules)

    return rename


def identify(names: Iterable[str]) -> tuple[str, int | None]:
    """(kind, stage) of a set of names: a key of KINDS or "unknown", and the stage 1, 2 or 3 if it
    is part of the Motus story."""
    names = {substitute(name, WAN) for name in names}
    kind = next((kind for kind, (telltale, _) in KINDS.items() if telltale in names), "unknown")
    if kind.startswith("motus"):
        return kind, 3 if names & {"action_expert.registers", "action.registers"} else 2
    return kind, 1 if kind in ("wan", "wan-diffusers") else None


def renaming(names: Iterable[str]) -> Callable[[str], str | None]:
    """The way from the names of a file to ours; names that no layout has stay as they are."""
    names = list(names)
    level = "encoder.down_blocks.0.resnets."
    blocks = {name.split(".")[4] for name in names if name.startswith(level)}
    return rename_from(identify(names)[0], len(blocks))


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published DC-AE, 434 in the original or 474 in the diffusers format -> the same
    under our names, in our shapes; the original's attn.qkv.weight is our to_q, to_k and to_v. All
    are views, so tensors mapped from a file stay unread. A tensor of another kind keeps its name,
    for the loader to complain about."""
    ours = {}
    for name, tensor in tensors.items():
        key = substitute(name, DCAE)
        found = {key: tensor}
        if key.endswith(".attn.qkv.weight") and tensor.ndim == 4:
            thirds = zip("qkv", tensor.chunk(3))
            found = {key.replace("qkv", f"to_{part}"): third for part, third in thirds}
        elif ".attn.to_" in key and tensor.ndim == 2:  # diffusers stores them without the 1 x 1
            found = {key: tensor[:, :, None, None]}
        if twice := ours.keys() & found.keys():
            raise ValueError(
                f"tensor {name!r}: {min(twice)} is there twice; expected one format, not both"
            )
        ours |= found
    return ours
