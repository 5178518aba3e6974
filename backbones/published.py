"""Published files: the sizes of the networks in them, and those networks built and filled.

A size is seen in the shape of a tensor; what no shape shows (norm epsilons, rotary bases, the
length of a chunk) is stated by config.json. They must agree on width and depth, and what neither
says is an error that names the field, unless all sizes are the published ones: then the published
values hold. A network keeps the dtype of its file.

    open_weights(PATH)             Motus weights: a checkpoint of ours, official, converted, or Wan
    load_vae, load_text, load_vlm  the frozen backbones, from the folders of Wan2.2 and Qwen3-VL
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig, read_tokenizer
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder
from backbones.wan import WanConfig
from backbones.wan_vae import WanVAE, WanVAEConfig
from weights.card import Card, newest_step
from weights.files import WEIGHT_FILES, TensorSource, config_beside, open_source, read_json, refuse
from weights.hub import fetched
from weights.layouts import MOTUS_FIELDS, POSITIONS, identify, renaming
from weights.load import load_into

Rename = Callable[[str], str | None]

# Where a config.json has a field of ours, most official first. Dots lead into sections.
WAN_FIELDS = {
    "width": "dim",
    "layers": "num_layers",
    "heads": "num_heads num_attention_heads",
    "text_len": "text_len wan.text_len",
    "eps": "eps wan.eps",
}
VAE_FIELDS = {"mean": "latents_mean", "std": "latents_std"}
QWEN_FIELDS = {
    "vocab": "text_config.vocab_size",
    "width": "text_config.hidden_size",
    "layers": "text_config.num_hidden_layers",
    "eps": "text_config.rms_norm_eps",
    "rope_theta": "text_config.rope_theta text_config.rope_parameters.rope_theta",
    "mrope": "text_config.rope_scaling.mrope_section text_config.rope_parameters.mrope_section",
    "image_token": "image_token_id",
    "vision_width": "vision_config.hidden_size",
    "vision_layers": "vision_config.depth",
    "vision_heads": "vision_config.num_heads",
    "vision_theta": "vision_config.rope_parameters.rope_theta",
    "taps": "vision_config.deepstack_visual_indexes",
    "min_pixels": "min_pixels size.min_pixels size.shortest_edge",
    "max_pixels": "max_pixels size.max_pixels size.longest_edge",
}
TEXT_FIELDS = {
    "dim": "d_model",
    "dim_ffn": "d_ff",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
# Without a setting in our networks: what a config.json may say of it, if anything.
ALWAYS = """
attn_scales                              [[]]
common.video_height                      [384]
common.video_width                       [320]
cross_attn_norm                          [true]
dense_act_fn                             ["gelu_new"]
do_normalize                             [true]
do_rescale                               [true]
do_resize                                [true]
feed_forward_proj                        ["gated-gelu"]
image_mean                               [[0.5, 0.5, 0.5]]
image_std                                [[0.5, 0.5, 0.5]]
is_residual                              [true]
layer_norm_epsilon                       [1e-6]
qk_norm                                  [true, "rms_norm_across_heads"]
quantization_config.quant_method         []
scalable_attention                       [true]
text_config.attention_bias               [false]
text_config.hidden_act                   ["silu"]
text_config.rope_parameters.rope_type    ["default"]
text_config.rope_scaling.mrope_interleaved [true]
text_config.rope_scaling.rope_type       ["default"]
und_expert.vlm.projector_type            ["mlp3x_silu"]
vision_config.hidden_act                 ["gelu_pytorch_tanh"]
window_size                              [[-1, -1]]
"""
LISTS = ("mrope", "taps", "mean", "std")
OPTIONAL = (
    "eps",
    "text_len",
    "vision_theta",
    "state_dim",
    "max_distance",
)  # may be neither shown nor stated

# -- seen and stated ------------------------------------------------------------------------------


def flatten(config: Mapping, prefix: str = "", depth: int = 4) -> dict[str, object]:
    """A nested config with dotted keys; no config here is nested deeper than `depth`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and depth:
            flat |= flatten(value, f"{prefix}{key}.", depth - 1)
        else:
            flat[prefix + key] = value
    return flat


def value_of(field: str, value: object) -> int | float | tuple:
    """The value stated for a field, or the values for one of LISTS: sizes are whole, epsilons,
    bases and statistics need not be; members of lists may be zero or less."""
    several = field in LISTS
    fractional = field.endswith(("eps", "theta")) or field in ("mean", "std")
    items = value if isinstance(value, list) else [value]
    try:
        # by way of text, which yaml readers make of 1e-5, and in which true is no number
        numbers = [float(str(item)) for item in items]
    except ValueError:
        numbers = [math.nan]
    least = -math.inf if several else 0
    sound = all(least < x < math.inf and (fractional or x.is_integer()) for x in numbers)
    if not sound or isinstance(value, list) != several:
        kind = "number" if fractional else "whole number"
        expected = f"a list of {kind}s" if several else f"a {kind} above 0"
        raise ValueError(f"{str(value)[:60]!r}; expected {expected}")
    found = tuple(x if fractional else int(x) for x in numbers)
    return found if several else found[0]


@dataclass(frozen=True)
class Evidence:
    """A network as its file shows it: the shapes of tensors under our names, and the flattened
    config.json beside it."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    stated: Mapping[str, object]

    @classmethod
    def of(cls, source: TensorSource, rename: Rename, stated: Mapping | None = None) -> "Evidence":
        """`stated`: instead of the config.json beside the file."""
        shapes = {rename(name): source.shape(name) for name in source.names()}
        shapes.pop(None, None)
        if stated is None:
            stated = flatten(config_beside(source))
        return cls(source.path, shapes, stated)

    def count(self, prefix: str) -> int:
        """How many different parts of a name follow `prefix`."""
        inner = [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]
        return len({name.split(".")[0] for name in inner})

    def sizes(self, **places: str) -> dict[str, int]:
        """Sizes by field, each from a place: "tensor axis", or "prefix *" for the `count`. One
        ValueError for all tensors that are missing, empty or of too few axes."""
        found = {}
        problems = []
        for field, place in places.items():
            name, axis = place.split()
            shape = self.shapes.get(name, ())
            if axis == "*":
                found[field] = self.count(name)
            else:
                found[field] = shape[int(axis)] if int(axis) < len(shape) else 0
            if not found[field]:
                about = f"shows {field} on axis {axis} (found {shape or 'none'})"
                problems.append(f"no tensor {name} that {about}")
        refuse(self.path, "parts are missing", problems)
        return found

    def reconcile(
        self, found: Mapping, names: Mapping[str, str], published: object | None = None
    ) -> dict:
        """Fields of a config, from what the shapes show (`found`) and config.json states under
        `names`. One of them must give a field, unless it is OPTIONAL or all that is found is as in
        the `published` config."""
        agreed = dict(found)
        problems = []
        for line in ALWAYS.strip().splitlines():
            key, values = line.split(maxsplit=1)
            value = self.stated.get(key)
            if value is not None and value not in json.loads(values):
                problems.append(
                    f"{key} is {value!r}, which is not computed here; expected {values}"
                )
        known = published is not None and found.items() <= vars(published).items()
        for field, keys in names.items():
            stated = (key for key in keys.split() if self.stated.get(key) is not None)
            key = next(stated, None)
            if key is None:
                if not known and field not in (*found, *OPTIONAL):
                    keys = keys.replace(" ", " or ")
                    problems.append(f"{keys} is missing; no tensor shows it")
                continue
            try:
                agreed[field] = value_of(field, self.stated[key])
            except ValueError as error:
                problems.append(f"{key} is {error}")
                continue
            if agreed[field] != found.get(field, agreed[field]):
                problems.append(f"{key} is {agreed[field]}, the tensors have {found[field]}")
        refuse(self.path, "config.json and tensors do not describe a network", problems)
        return agreed


# -- the sizes of each network --------------------------------------------------------------------


def wan_config(evidence: Evidence, heads: int | None = None) -> WanConfig:
    """The video expert's. No tensor of its own shows how many heads it has; in a Motus file the
    action expert's do."""
    found = evidence.sizes(
        width="video.patch_embedding.weight 0",
        latent="video.patch_embedding.weight 1",
        ffn="video.blocks.0.ffn.0.weight 0",
        text_dim="video.text_embedding.0.weight 1",
        freq_dim="video.time_embedding.0.weight 1",
        layers="video.blocks. *",
    )
    found["patch"] = tuple(evidence.shapes["video.patch_embedding.weight"][2:])
    if heads:
        found["heads"] = heads
    return WanConfig(**evidence.reconcile(found, WAN_FIELDS, WanConfig()))


def vae_config(evidence: Evidence) -> WanVAEConfig:
    """The latents' mean and std are in no tensor: Wan2.2's hold for a VAE of its sizes, others must
    be stated."""
    found = evidence.sizes(
        dim="encoder.conv1.weight 0",
        dec_dim="decoder.head.0.gamma 0",
        z_dim="conv2.weight 0",
        levels="encoder.downsamples. *",
    )
    level = "encoder.downsamples.{}.downsamples."
    levels = range(found.pop("levels"))
    blocks = evidence.count(level.format(levels[-1]))  # the last level has nothing else
    places = {f"dim_{i}": level.format(i) + "0.residual.6.weight 0" for i in levels}
    widths = evidence.sizes(**places).values()
    found["dim_mult"] = tuple(width // found["dim"] for width in widths)
    found["num_res_blocks"] = blocks
    timed = [level.format(i) + f"{blocks}.time_conv.weight" for i in levels[:-1]]
    found["temporal_downsample"] = tuple(name in evidence.shapes for name in timed)
    return WanVAEConfig(**evidence.reconcile(found, VAE_FIELDS, WanVAEConfig()))


def text_config(evidence: Evidence) -> UMT5Config:
    found = evidence.sizes(
        vocab="token_embedding.weight 0",
        dim="token_embedding.weight 1",
        dim_attn="blocks.0.attn.q.weight 0",
        dim_ffn="blocks.0.ffn.fc1.weight 0",
        buckets="blocks.0.pos_embedding.embedding.weight 0",
        heads="blocks.0.pos_embedding.embedding.weight 1",
        layers="blocks. *",
    )
    return UMT5Config(**evidence.reconcile(found, TEXT_FIELDS))


def vlm_config(evidence: Evidence) -> Qwen3VLConfig:
    found = evidence.sizes(
        vocab="language_model.embed_tokens.weight 0",
        width="language_model.embed_tokens.weight 1",
        ffn="language_model.layers.0.mlp.gate_proj.weight 0",
        head_dim="language_model.layers.0.self_attn.q_norm.weight 0",
        heads="language_model.layers.0.self_attn.q_proj.weight 0",
        kv_heads="language_model.layers.0.self_attn.k_proj.weight 0",
        vision_width="visual.patch_embed.proj.weight 0",
        repeat="visual.patch_embed.proj.weight 2",
        patch="visual.patch_embed.proj.weight 3",
        vision_ffn="visual.blocks.0.mlp.linear_fc1.weight 0",
        side="visual.pos_embed.weight 0",
        merge="visual.merger.linear_fc1.weight 1",
        layers="language_model.layers. *",
        vision_layers="visual.blocks. *",
    )
    found["heads"] //= found["head_dim"]
    found["kv_heads"] //= found["head_dim"]
    found["side"] = math.isqrt(found["side"])
    found["merge"] = math.isqrt(found["merge"] // found["vision_width"])
    return Qwen3VLConfig(**evidence.reconcile(found, QWEN_FIELDS, Qwen3VLConfig()))


def motus_fields(evidence: Evidence, positions: str) -> dict:
    """The fields of MotusConfig. `positions`: the rows of the file's position table, or "" if not
    known; the stated chunk must have as many."""
    places = {
        "heads": "action.blocks.0.qkv 1",
        "action_width": "action.blocks.0.qkv 2",
        "expert_ffn": "action.blocks.0.ffn.0.weight 0",
        "action_dim": "action.input_encoder.action_encoder.0.weight 1",
        "und_width": "und.blocks.0.qkv 2",
        "vlm_dim": "und.vlm_adapter.0.weight 1",
    }
    finetune = "action.registers" in evidence.shapes
    if finetune:
        places["state_dim"] = "action.input_encoder.state_encoder.0.weight 1"
        places["registers"] = "action.registers 1"
    found = evidence.sizes(**places)
    video = wan_config(evidence, found.pop("heads"))
    found["expert_ffn"] //= found["action_width"]
    agreed = evidence.reconcile(found, MOTUS_FIELDS)
    rows = agreed["frames"] * agreed["ratio"] + (2 + found["registers"] if finetune else 0)
    if positions not in ("", str(rows)):
        raise ValueError(
            f"{evidence.path}: config.json makes chunks of {agreed['frames']} x {agreed['ratio']} "
            f"actions, whose position table has {rows} rows; the file's has {positions}: take the "
            "config.json that belongs to it"
        )
    return agreed | {"video": asdict(video), "finetune": finetune}


def robot_statistics(stated: Mapping, config: Mapping) -> dict | None:
    """Facts about the robot, as `formats.statistics.Statistics`. No official file has any;
    RoboTwin's model, known by its rates (every third step, two actions per frame), was trained on
    raw numbers. Others must be told: None."""
    rates = (config["ratio"], stated.get("common.global_downsample_rate"))
    if not config["finetune"] or rates != (2, 3):
        return None
    known = {"embodiment": "robotwin", "rate": config["ratio"]}
    for column, size in {"actions": config["action_dim"], "state": config["state_dim"]}.items():
        known[column] = {"mean": [0.0] * size, "std": [1.0] * size}
    return known


# -- files ----------------------------------------------------------------------------------------


def is_published(path: str | Path) -> bool:
    """Whether published weights are at `path`, rather than a run or checkpoint of ours (or
    nothing)."""
    path = Path(path)
    config = path / "config.json"
    if path.name.startswith("step_") or config.is_file() and "motus" in read_json(config):
        return False
    return path.is_file() or any(any(path.glob(pattern)) for pattern in WEIGHT_FILES)


def holds_vlm(path: str | Path) -> bool:
    """Whether `path` is published weights of Motus that hold the VLM too."""
    path = fetched(path)
    if not is_published(path):
        return False
    return any(name.startswith(("vlm_model.", "vlm.")) for name in open_source(path).names())


def open_weights(
    path: str | Path, weights: str = "ema"
) -> tuple[TensorSource, Rename, Card, tuple[str, ...]]:
    """The weights at `path`, the way from their names to ours (the VLM's begin with vlm.), their
    card, and the experts they lack (prefixes). `path` is anything that `Motus.from_pretrained`
    takes. Published weights get a card of preset `full`, with the sizes of the file."""
    path = fetched(path)
    if is_published(path):
        return open_published(open_source(path))
    folder = newest_step(path)
    card = Card.read(folder / "config.json")
    return open_source(folder / f"{weights}.safetensors"), str, card, ()


def open_published(source: TensorSource) -> tuple[TensorSource, Rename, Card, tuple[str, ...]]:
    """Official Motus weights (stages 2, 3) or a Wan2.2 video expert (stage 1), as published or
    converted. ValueError if it is neither."""
    kind, stage = identify(source.names())
    rename = renaming(source.names())
    if kind in ("motus", "motus-own"):
        evidence = Evidence.of(source, rename)
        rows = source.metadata.get("pos_embedding_rows", "")
        if POSITIONS in source.tensors:
            rows = str(source.shape(POSITIONS)[1])
        config = motus_fields(evidence, rows)
        statistics = robot_statistics(evidence.stated, config)
        return source, rename, Card(config, str(stage), "full", statistics), ()
    if stage != 1:
        raise ValueError(
            f"{source.path}: holds {kind} weights, expected motus, wan or wan-diffusers weights to "
            "build a model from"
        )

    def rename_video(name: str) -> str:
        return f"video.{rename(name)}"

    video = wan_config(Evidence.of(source, rename_video))
    card = Card({"video": asdict(video), "finetune": False, "ratio": 1}, "1", "full")
    return source, rename_video, card, ("action.", "und.")


def first_of(folder: str | Path, *names: str) -> Path:
    """The first of `names` that is in `folder`; the path itself if it is a file."""
    folder = Path(folder)
    if folder.is_file():
        return folder
    for path in (folder / name for name in names):
        if path.exists():
            return path
    raise ValueError(
        f"{folder}: has none of {', '.join(names)}; `python -m weights download NAME` fetches "
        "published folders"
    )


def network_of(
    module: type[nn.Module],
    config_of: Callable[[Evidence], object],
    path: Path,
    part: str = "",
    stated: Mapping | None = None,
) -> nn.Module:
    """A network with the weights of a file, or with those whose names in ours begin with `part`, in
    the dtype of the first of them. `stated`: as for `Evidence.of`."""
    source = open_source(path)
    own = renaming(source.names())

    def rename(name: str) -> str | None:
        key = own(name)
        return key.removeprefix(part) if key and key.startswith(part) else None

    with torch.device("meta"):
        network = module(config_of(Evidence.of(source, rename, stated)))
    kept = [name for name in source.names() if rename(name)]
    load_into(network, source, rename, source.dtype(kept[0]))
    return network.eval()


def load_vae(folder: str | Path) -> WanVAE:
    """From Wan2.2_VAE.pth, or the folder `vae` of a diffusers repository. The decoder, which only
    makes pictures for people, is kept in bf16; the encoder, whose latents the network was trained
    on, in the dtype of the file."""
    vae = network_of(WanVAE, vae_config, first_of(folder, "Wan2.2_VAE.pth", "vae"))
    vae.decoder.bfloat16()
    vae.conv2.bfloat16()
    return vae


def load_text(folder: str | Path, text_len: int = 512) -> tuple[UMT5Encoder, T5Tokenizer]:
    """From models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl, or the folders of a diffusers
    repository."""
    path = first_of(folder, "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")
    words = first_of(folder, "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
    return network_of(UMT5Encoder, text_config, path), T5Tokenizer(words, text_len)


def load_vlm(folder: str | Path, motus: str | Path | None = None) -> tuple[Qwen3VL, Tokenizer]:
    """From a Qwen3-VL folder, or with its configs and tokenizer and the `vlm.` part of the Motus
    file `motus`."""
    folder = Path(folder)
    stated = {}
    for name in ("preprocessor_config.json", "config.json"):
        if (folder / name).is_file():
            stated |= flatten(read_json(folder / name))
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    path = fetched(motus or folder)
    vlm = network_of(Qwen3VL, vlm_config, path, "vlm." if motus else "", stated)
    return vlm, tokenizer
