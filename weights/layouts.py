"""Names of tensors: from every published layout to the one that our modules use, and back.

Official Motus files list every tensor up to three times, because wrapper modules refer to the same
experts again; the copies are compared with the original and dropped. The fixed table
`pos_embedding` is dropped too: it is a function of its shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor

# -- names: from every published layout to the one our modules use --------------------------------

MOTUS_PARTS = {
    "video.": "video expert",
    "vlm.": "vision-language model",
    "action.": "action expert",
    "und.": "understanding expert",
}
# The official module tree, as wrapper and part: each part appears again under its wrappers.
WRAPPERS = (
    ("video_module.", "video_model."),
    ("und_module.", "vlm_model."),
    ("und_module.", "und_expert."),
    ("action_module.", "action_expert."),
    ("action_module.", "video_model."),
    ("action_module.", "vlm_model."),
)
POSITIONS = "action_expert.input_encoder.pos_embedding"
OWN_NAMES = (
    (r"^video_model\.wan_model\.", "video."),
    (r"^vlm_model\.model\.", "vlm."),
    (r"^action_expert\.", "action."),
    (r"^und_expert\.", "und."),
    (r"^((action|und)\.blocks\.\d+\.)wan_\2_", r"\1"),
)
OFFICIAL_NAMES = (
    (r"^(action|und)\.(blocks\.\d+\.)(?=qkv|o\.|norm_)", r"\1.\2wan_\1_"),
    (r"^(action|und)\.", r"\1_expert."),
    (r"^vlm\.", "vlm_model.model."),
    (r"^video\.", "video_model.wan_model."),
)

WAN_DIFFUSERS = (
    (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0\.", "_attn.o."),
    (
        r"^(blocks\.\d+)\.norm2\.",
        r"\1.norm3.",
    ),  # diffusers counts norms in order of use, Wan does not
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
)
VAE_DIFFUSERS = (
    (r"(resnets\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(resnets\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(resnets\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(resnets\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"mid_block\.resnets\.0\.", "middle.0."),
    (r"mid_block\.attentions\.0\.", "middle.1."),
    (r"mid_block\.resnets\.1\.", "middle.2."),
    (r"down_blocks\.(\d+)\.resnets\.", r"downsamples.\1.downsamples."),
    (r"up_blocks\.(\d+)\.resnets\.", r"upsamples.\1.upsamples."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.norm_out\.", "coder.head.0."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)
UMT5_TRANSFORMERS = {
    "shared": "token_embedding",
    "encoder.embed_tokens": "token_embedding",  # two names of one tensor
    "layer.0.layer_norm": "norm1",
    **{f"layer.0.SelfAttention.{part}": f"attn.{part}" for part in "qkvo"},
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "encoder.final_layer_norm": "norm",
}
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
    "vlm_dim": "und_expert.vlm.input_dim",
}


def substitute(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def wan_original(name: str) -> str:
    """Name in our video expert of a tensor in an original Wan file; stage 1 files of Motus may
    carry the prefix `dit.`."""
    return name.removeprefix("dit.")


def wan_from_diffusers(name: str) -> str:
    """Original name of a tensor of the diffusers video transformer. No tensor changes shape."""
    return substitute(name, WAN_DIFFUSERS)


def vae_from_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """Original name of a tensor of the diffusers VAE, which does not count a level's resampler
    among its residual blocks."""
    resamplers = (
        (r"down_blocks\.(\d+)\.downsampler\.", rf"downsamples.\1.downsamples.{num_res_blocks}."),
        (r"up_blocks\.(\d+)\.upsampler\.", rf"upsamples.\1.upsamples.{num_res_blocks + 1}."),
    )
    return substitute(name, resamplers + VAE_DIFFUSERS)


def umt5_from_transformers(name: str) -> str:
    """Wan's name of a tensor of the transformers `UMT5EncoderModel`."""
    match = re.fullmatch(r"(?:encoder\.block\.(\d+)\.)?(.+)\.weight", name)
    if not match or match[2] not in UMT5_TRANSFORMERS:
        raise ValueError(
            f"tensor {name!r} is not part of a transformers UMT5EncoderModel; expected"
            " shared.weight or encoder.*"
        )
    return (f"blocks.{match[1]}." if match[1] else "") + f"{UMT5_TRANSFORMERS[match[2]]}.weight"


def alias_of(name: str) -> str | None:
    """The tensor of which `name` is a second name: a wrapper's copy, a tied output head or a tied
    token embedding; else None."""
    if name == "encoder.embed_tokens.weight":
        return "shared.weight"
    if name.endswith("lm_head.weight"):
        return re.sub(
            r"^(?:\w+_module\.)?(.*)lm_head\.weight$",
            r"\1model.language_model.embed_tokens.weight",
            name,
        )
    return next(
        (
            name.removeprefix(wrapper)
            for wrapper, part in WRAPPERS
            if name.startswith(wrapper + part)
        ),
        None,
    )


def own_name(name: str) -> str | None:
    """Name in our modules of a tensor of an official Motus file: video. action. und. vlm.; None for
    second names and for the fixed position table."""
    if alias_of(name) or name == POSITIONS:
        return None
    return substitute(name, OWN_NAMES)


def official_name(name: str) -> str:
    """The way back: und.blocks.0.qkv -> und_expert.blocks.0.wan_und_qkv. Official names stay as
    they are."""
    return substitute(name, OFFICIAL_NAMES)


def qwen_own(name: str) -> str | None:
    """Name in our vision-language model; None for the output head, which is tied to the embedding
    and not used."""
    return None if alias_of(name) else name.removeprefix("model.")


DCAE_ORIGINAL = (
    (r"\.(main|op_list)\b", ""),  # wrappers of residual sums and of sequences
    (r"\.conv\.(weight|bias)$", r".\1"),  # every convolution sits in a wrapper
    (r"^encoder\.stages\.", "encoder.down_blocks."),
    (r"^decoder\.stages\.", "decoder.up_blocks."),
    (r"\.project_in\.", ".conv_in."),
    (r"^decoder\.project_out\.0\.", "decoder.norm_out."),
    (r"\.project_out\.[02]\.", ".conv_out."),
    (r"\.context_module\.proj\.norm\.", ".attn.norm_out."),
    (r"\.context_module\.proj\.", ".attn.to_out."),
    (r"\.context_module\.", ".attn."),
    (r"\.local_module\.point_conv\.norm\.", ".conv_out.norm."),
    (r"\.local_module\.(inverted|depth|point)_conv\.", r".conv_out.conv_\1."),
    (r"\.conv2\.norm\.", ".norm."),
)


def dcae_own(name: str) -> str:
    """Name of a tensor in a published file -> its name here. Those of the diffusers format are ours
    already.

    One kind of tensor has no single counterpart: the original's attn.qkv.weight is our to_q, to_k
    and to_v below each other.
    """
    if re.search(r"\.(stages|project_in|project_out)\.", name):
        return substitute(name, DCAE_ORIGINAL)
    return name


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a published DC-AE, 434 in the original or 474 in the diffusers format -> the same
    under our names, in our shapes. All are views, so tensors mapped from a file stay unread. A
    tensor of another kind keeps its name, for the loader to complain about."""
    ours = {}
    for name, tensor in tensors.items():
        key = dcae_own(name)
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


DPFLOW_ORIGINAL = (
    (r"^(state_dict\.)?(model\.)?", ""),
    (r"^fnet\.", "encoder."),
    (r"^update_block\.encoder\.", "update.motion."),
    (r"^update_block\.", "update."),
    (r"\.gru_list\.0\.", ".gru."),
    (r"\.conv_transition\.proj\.", ".transition."),
    (r"\.downsample\.0\.", ".skip."),
    (r"\.conv_cross\.merge_fc_g\.", ".merge."),
    (r"\.fc1_g\.", ".gate_in."),
    (r"\.fc1_[xy]\.", ".value_in."),
    (r"\.dwconv_g\.dwconv\.", ".gate_mix."),
    (r"\.dwconv_[xy]\.dwconv\.", ".value_mix."),
    (r"\.fc2\.", ".out."),
    (r"^(update\.(?:flow_head|mask))\.conv1\.", r"\1.0."),
    (r"^(update\.(?:flow_head|mask))\.conv2\.", r"\1.2."),
)


def dpflow_own(key: str) -> str:
    """Name of a tensor in a published .ckpt -> its name here. One to one: all 498 tensors have a
    place and every place a tensor."""
    return substitute(key, DPFLOW_ORIGINAL)


# Layouts: a tensor that only this layout has, and the way from its names to ours.
KINDS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "motus": ("action_expert.blocks.0.wan_action_qkv", own_name),
    "motus-own": ("action.blocks.0.qkv", str),
    "wan": ("blocks.0.self_attn.norm_q.weight", wan_original),
    "wan-diffusers": ("condition_embedder.time_proj.weight", wan_from_diffusers),
    "wan-vae": ("encoder.downsamples.0.downsamples.0.residual.2.weight", str),
    "wan-vae-diffusers": ("encoder.down_blocks.0.resnets.0.conv1.weight", vae_from_diffusers),
    "umt5": ("token_embedding.weight", str),
    "umt5-transformers": (
        "encoder.final_layer_norm.weight",
        lambda name: None if alias_of(name) else umt5_from_transformers(name),
    ),
    "qwen3vl": ("model.visual.patch_embed.proj.weight", qwen_own),
    "qwen3vl-own": ("visual.patch_embed.proj.weight", str),
    "dcae": ("encoder.project_in.conv.conv.weight", dcae_own),
    "dcae-diffusers": ("encoder.conv_in.conv.weight", dcae_own),
    "dpflow": ("fnet.stem.conv1.weight", dpflow_own),
}


def identify(names: Iterable[str]) -> tuple[str, int | None]:
    """(kind, stage) of a set of names: a key of KINDS or "unknown", and the stage 1, 2 or 3 if it
    is part of the Motus story."""
    names = {wan_original(name) for name in names}
    kind = next((kind for kind, (telltale, _) in KINDS.items() if telltale in names), "unknown")
    if kind.startswith("motus"):
        return kind, 3 if names & {"action_expert.registers", "action.registers"} else 2
    return kind, 1 if kind.startswith("wan") and "vae" not in kind else None


def renaming(names: Iterable[str]) -> Callable[[str], str | None]:
    """The way from the names of a file to ours; names that no layout has stay as they are."""
    names = list(names)
    kind, _ = identify(names)
    if kind == "wan-vae-diffusers":
        pattern = re.compile(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
        blocks = len({match[1] for match in map(pattern.match, names) if match})
        return partial(vae_from_diffusers, num_res_blocks=blocks)
    return KINDS[kind][1] if kind in KINDS else str
