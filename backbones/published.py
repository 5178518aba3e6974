"""Published files: the sizes of the networks in them, and those networks built and filled.

A size is seen in the shape of a tensor; what no shape shows (norm epsilons, rotary bases, the
length of a chunk) is stated by config.json. Both must agree where both speak, and what neither says
is an error that names the field, unless all sizes are the published ones: then the published values
hold. A network keeps the dtype of its file.

    open_weights(PATH)             Motus weights: a checkpoint of ours, official, converted, or Wan
    load_vae, load_text, load_vlm  the frozen backbones, from the folders of Wan2.2 and Qwen3-VL
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer
from torch import nn

from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from backbones.umt5 import T5Tokenizer, UMT5Config, UMT5Encoder
from backbones.wan import WanConfig
from backbones.wan_vae import WanVAE, WanVAEConfig
from weights import files, hub, layouts, load
from weights.card import Card, newest_step
from weights.files import TensorSource

T = TypeVar("T")
Rename = Callable[[str], str | None]
Shapes = Mapping[str, tuple[int, ...]]

# Where a config.json has a field of ours, most official first. Dots lead into sections.
WAN_FIELDS = {
    "width": ("dim",),
    "ffn": ("ffn_dim",),
    "layers": ("num_layers",),
    "heads": ("num_heads", "num_attention_heads"),
    "latent": ("in_dim", "in_channels"),
    "patch": ("patch_size",),
    "text_dim": ("text_dim",),
    "text_len": ("text_len",),
    "freq_dim": ("freq_dim",),
    "eps": ("eps",),
}
VAE_FIELDS = {"mean": ("latents_mean",), "std": ("latents_std",)}
QWEN_FIELDS = {
    "vocab": ("text_config.vocab_size",),
    "width": ("text_config.hidden_size",),
    "ffn": ("text_config.intermediate_size",),
    "layers": ("text_config.num_hidden_layers",),
    "heads": ("text_config.num_attention_heads",),
    "kv_heads": ("text_config.num_key_value_heads",),
    "head_dim": ("text_config.head_dim",),
    "eps": ("text_config.rms_norm_eps",),
    "rope_theta": ("text_config.rope_theta", "text_config.rope_parameters.rope_theta"),
    "mrope": (
        "text_config.rope_scaling.mrope_section",
        "text_config.rope_parameters.mrope_section",
    ),
    "image_token": ("image_token_id",),
    "vision_width": ("vision_config.hidden_size",),
    "vision_ffn": ("vision_config.intermediate_size",),
    "vision_layers": ("vision_config.depth",),
    "vision_heads": ("vision_config.num_heads",),
    "vision_theta": ("vision_config.rope_parameters.rope_theta",),
    "taps": ("vision_config.deepstack_visual_indexes",),
    "patch": ("vision_config.patch_size",),
    "repeat": ("vision_config.temporal_patch_size",),
    "merge": ("vision_config.spatial_merge_size",),
    "min_pixels": ("size.shortest_edge",),
    "max_pixels": ("size.longest_edge",),
}

LISTS = ("mrope", "taps", "mean", "std")

# -- seen and stated ------------------------------------------------------------------------------


def flatten(config: Mapping, prefix: str = "", depth: int = 4) -> dict[str, object]:
    """A nested config with dotted keys; no config here is nested deeper than `depth`."""
    flat = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and depth
        flat |= flatten(value, f"{prefix}{key}.", depth - 1) if inner else {f"{prefix}{key}": value}
    return flat


def number(value: object) -> float:
    """A finite number of a config. Text is read too, because yaml readers leave 1e-5 as text; NaN
    for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def value_of(field: str, value: object, several: bool) -> int | float | tuple:
    """What a config states for a field, or a list (`several`) of: sizes are whole, epsilons, bases
    and statistics need not be; of these only statistics and members of lists may be zero or less.
    """
    fractional = field.endswith(("eps", "theta")) or field in ("mean", "std")
    if several:
        items = [number(item) for item in value] if isinstance(value, list) else [math.nan]
        if not all(math.isfinite(x) and (fractional or x.is_integer()) for x in items):
            raise ValueError(
                f"{str(value)[:60]!r}; expected a list of {'' if fractional else 'whole '}numbers"
            )
        return tuple(x if fractional else int(x) for x in items)
    x = number(value)
    if not (0 < x < math.inf and (fractional or x.is_integer())):
        raise ValueError(
            f"{str(value)[:60]!r}; expected a {'' if fractional else 'whole '}number above 0"
        )
    return x if fractional else int(x)


def shown_sizes(
    path: Path, shapes: Shapes, places: Mapping[str, tuple[str, int]]
) -> dict[str, int]:
    """Sizes by field, from (tensor, axis). One ValueError for all tensors that are missing, empty
    or of too few axes."""
    problems = []
    for field, (name, axis) in places.items():
        shape = shapes.get(name, ())
        if len(shape) <= axis or not shape[axis]:
            found = shapes.get(name, "none")
            problems.append(f"no tensor {name} that shows {field} on axis {axis} (found {found})")
    files.refuse(path, "parts are missing", problems)
    return {field: shapes[name][axis] for field, (name, axis) in places.items()}


def count(shapes: Shapes, pattern: str) -> int:
    """How many different indices (the group of `pattern`) the names have."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def reconcile(
    path: Path,
    found: Mapping,
    stated: Mapping,
    names: Mapping[str, tuple[str, ...]],
    published: type | None = None,
    wanted: Iterable[str] = (),
) -> dict:
    """Fields of a config, from what the shapes show (`found`) and a config.json states, `names`
    saying where. `wanted` fields must be in one of them, unless all that is found equals the
    defaults of `published`."""
    agreed, problems = dict(found), []
    defaults = {f.name: f.default for f in fields(published)} if published else {}
    known = published is not None and all(
        defaults[field] == value for field, value in found.items()
    )
    for field, keys in names.items():
        key = next((key for key in keys if key in stated), None)
        if key is None:
            if field in wanted and field not in found and not known:
                problems.append(f"{' or '.join(keys)} is missing; no tensor shows it")
            continue
        try:
            agreed[field] = value_of(
                field, stated[key], field in LISTS or isinstance(found.get(field), tuple)
            )
        except ValueError as error:
            problems.append(f"{key} is {error}")
            continue
        if field in found and agreed[field] != found[field]:
            problems.append(f"{key} is {agreed[field]}, the tensors have {found[field]}")
    files.refuse(path, "config.json and tensors do not describe a network", problems)
    return agreed


def below(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The items whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def shapes_of(source: TensorSource, rename: Rename) -> dict[str, tuple[int, ...]]:
    """Shapes under our names."""
    return {key: source.shape(name) for name in source.names() if (key := rename(name)) is not None}


# -- the sizes of each network --------------------------------------------------------------------


def wan_config(path: Path, shapes: Shapes, stated: Mapping, heads: int | None = None) -> WanConfig:
    """The video expert's. No tensor of its own shows how many heads it has; in a Motus file the
    action expert's do."""
    found = shown_sizes(
        path,
        shapes,
        {
            "width": ("patch_embedding.weight", 0),
            "latent": ("patch_embedding.weight", 1),
            "ffn": ("blocks.0.ffn.0.weight", 0),
            "text_dim": ("text_embedding.0.weight", 1),
            "freq_dim": ("time_embedding.0.weight", 1),
        },
    )
    found |= {
        "layers": count(shapes, r"blocks\.(\d+)\."),
        "patch": tuple(shapes["patch_embedding.weight"][2:]),
    }
    found |= {"heads": heads} if heads else {}
    return WanConfig(**reconcile(path, found, stated, WAN_FIELDS, WanConfig, ("heads",)))


def vae_config(path: Path, shapes: Shapes, stated: Mapping) -> WanVAEConfig:
    """The latents' mean and std are in no tensor: those of Wan2.2 hold for its 48 channels, others
    must be stated."""
    found = shown_sizes(
        path,
        shapes,
        {
            "dim": ("encoder.conv1.weight", 0),
            "dec_dim": ("decoder.head.0.gamma", 0),
            "z_dim": ("conv2.weight", 0),
        },
    )
    levels = count(shapes, r"encoder\.downsamples\.(\d+)\.")
    blocks = count(shapes, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.residual\.")
    widths = shown_sizes(
        path,
        shapes,
        {
            str(i): (f"encoder.downsamples.{i}.downsamples.0.residual.6.weight", 0)
            for i in range(levels)
        },
    )
    found |= {
        "dim_mult": tuple(width // found["dim"] for width in widths.values()),
        "num_res_blocks": blocks,
        "temporal_downsample": tuple(
            f"encoder.downsamples.{i}.downsamples.{blocks}.time_conv.weight" in shapes
            for i in range(levels - 1)
        ),
    }
    return WanVAEConfig(
        **reconcile(
            path,
            found,
            stated,
            VAE_FIELDS,
            wanted=VAE_FIELDS if found["z_dim"] != WanVAEConfig.z_dim else (),
        )
    )


def text_config(path: Path, shapes: Shapes) -> UMT5Config:
    table = "blocks.0.pos_embedding.embedding.weight"
    return UMT5Config(
        layers=count(shapes, r"blocks\.(\d+)\."),
        **shown_sizes(
            path,
            shapes,
            {
                "vocab": ("token_embedding.weight", 0),
                "dim": ("token_embedding.weight", 1),
                "dim_attn": ("blocks.0.attn.q.weight", 0),
                "dim_ffn": ("blocks.0.ffn.fc1.weight", 0),
                "buckets": (table, 0),
                "heads": (table, 1),
            },
        ),
    )


def vlm_config(path: Path, shapes: Shapes, stated: Mapping) -> Qwen3VLConfig:
    text, patch, layer = (
        "language_model.",
        "visual.patch_embed.proj.weight",
        "language_model.layers.0.",
    )
    found = shown_sizes(
        path,
        shapes,
        {
            "vocab": (text + "embed_tokens.weight", 0),
            "width": (text + "embed_tokens.weight", 1),
            "ffn": (layer + "mlp.gate_proj.weight", 0),
            "head_dim": (layer + "self_attn.q_norm.weight", 0),
            "heads": (layer + "self_attn.q_proj.weight", 0),
            "kv_heads": (layer + "self_attn.k_proj.weight", 0),
            "vision_width": (patch, 0),
            "repeat": (patch, 2),
            "patch": (patch, 3),
            "vision_ffn": ("visual.blocks.0.mlp.linear_fc1.weight", 0),
            "side": ("visual.pos_embed.weight", 0),
            "merge": ("visual.merger.linear_fc1.weight", 1),
        },
    )
    found |= {
        "heads": found["heads"] // found["head_dim"],
        "kv_heads": found["kv_heads"] // found["head_dim"],
        "side": math.isqrt(found["side"]),
        "merge": math.isqrt(found["merge"] // found["vision_width"]),
        "layers": count(shapes, r"language_model\.layers\.(\d+)\."),
        "vision_layers": count(shapes, r"visual\.blocks\.(\d+)\."),
    }
    return Qwen3VLConfig(
        **reconcile(
            path,
            found,
            stated,
            QWEN_FIELDS,
            Qwen3VLConfig,
            (
                "rope_theta",
                "mrope",
                "image_token",
                "vision_heads",
                "taps",
                "min_pixels",
                "max_pixels",
            ),
        )
    )


def motus_fields(path: Path, shapes: Shapes, stated: Mapping, positions: tuple[int, ...]) -> dict:
    """The fields of MotusConfig. `positions`: the rows of the file's position table, if known; the
    stated chunk must have as many."""
    encoders = "action.input_encoder."
    finetune = "action.registers" in shapes
    places = {
        "heads": ("action.blocks.0.qkv", 1),
        "action_width": ("action.blocks.0.qkv", 2),
        "expert_ffn": ("action.blocks.0.ffn.0.weight", 0),
        "action_dim": (encoders + "action_encoder.0.weight", 1),
        "und_width": ("und.blocks.0.qkv", 2),
        "vlm_dim": ("und.vlm_adapter.0.weight", 1),
    }
    if finetune:
        places |= {
            "state_dim": (encoders + "state_encoder.0.weight", 1),
            "registers": ("action.registers", 1),
        }
    found = shown_sizes(path, shapes, places)
    wan = below(stated, "wan.")
    video = wan_config(path, below(shapes, "video."), wan, found.pop("heads"))
    found["expert_ffn"] //= found["action_width"]
    agreed = reconcile(
        path,
        found,
        stated,
        layouts.MOTUS_FIELDS,
        wanted=("frames", "ratio", "action_eps", "und_eps"),
    )
    rows = agreed["frames"] * agreed["ratio"] + (2 + found["registers"] if finetune else 0)
    if positions not in ((), (rows,)):
        raise ValueError(
            f"{path}: config.json makes chunks of {agreed['frames']} x {agreed['ratio']} actions,"
            f" whose position table has {rows} rows; the file's has {positions[0]}: take the"
            " config.json that belongs to it"
        )
    return agreed | {"video": asdict(video), "finetune": finetune}


def robot_statistics(stated: Mapping, config: Mapping) -> dict | None:
    """Facts about the robot, as `formats.statistics.Statistics`. No official file has any;
    RoboTwin's model, known by its rates (every third step, two actions per frame), was trained on
    raw numbers. Others must be told: None."""
    rates = (config["ratio"], stated.get("common.global_downsample_rate"))
    if not config["finetune"] or rates != (2, 3):
        return None

    def raw(size: int) -> dict:
        return {"mean": [0.0] * size, "std": [1.0] * size}

    about = {"embodiment": "robotwin", "rate": config["ratio"]}
    return about | {"actions": raw(config["action_dim"]), "state": raw(config["state_dim"])}


# -- files ----------------------------------------------------------------------------------------


@dataclass
class Published:
    """Weights of a model that others wrote."""

    source: TensorSource
    rename: (
        Rename  # from the names of the file to those of `motus.Motus`; the VLM's begin with vlm.
    )
    stage: str  # "1", "2" or "3"
    config: dict  # fields of MotusConfig
    statistics: dict | None = None
    fresh: tuple[str, ...] = ()  # experts that the file does not hold


def is_published(path: str | Path) -> bool:
    """Whether published weights are at `path`, rather than a run or checkpoint of ours (or
    nothing)."""
    path = Path(path)
    config = path / "config.json"
    if path.name.startswith("step_") or config.is_file() and "motus" in files.read_json(config):
        return False
    return path.is_file() or any(any(path.glob(pattern)) for pattern in files.WEIGHT_FILES)


def holds_vlm(path: str | Path) -> bool:
    """Whether `path` is published weights of Motus that hold the VLM too."""
    path = hub.fetched(path)
    if not is_published(path):
        return False
    names = files.open_source(path).names()
    rename = layouts.renaming(names)
    return any((rename(name) or "").startswith("vlm.") for name in names)


def open_motus(path: str | Path) -> Published:
    """Official Motus weights (stages 2, 3) or a Wan2.2 video expert (stage 1), as published or
    converted. ValueError if it is neither."""
    source = files.open_source(path)
    kind, stage = layouts.identify(source.names())
    rename = layouts.renaming(source.names())
    stated, shapes = flatten(files.config_beside(source)), shapes_of(source, rename)
    if kind in ("motus", "motus-own"):
        rows = re.findall(r"^\d+$", source.metadata.get("pos_embedding_rows", ""))
        positions = tuple(map(int, rows))
        if layouts.POSITIONS in source.tensors:
            positions = source.shape(layouts.POSITIONS)[1:2]
        config = motus_fields(source.path, shapes, stated, positions)
        return Published(source, rename, str(stage), config, robot_statistics(stated, config))
    if stage != 1:
        raise ValueError(
            f"{source.path}: holds {kind} weights; a model is built from motus, wan or "
            "wan-diffusers weights"
        )
    video = asdict(wan_config(source.path, shapes, stated))
    config = {"video": video, "finetune": False, "ratio": 1}
    fresh = ("action.", "und.")
    return Published(source, lambda name: f"video.{rename(name)}", "1", config, fresh=fresh)


def first_of(folder: str | Path, *names: str) -> Path:
    """The first of `names` that is in `folder`; the path itself if it is a file."""
    folder = Path(folder)
    if folder.is_file():
        return folder
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"{folder}: has none of {', '.join(names)}; `python -m weights download NAME` fetches "
        "published folders"
    )


def filled(
    module: type[nn.Module], config: object, source: TensorSource, rename: Rename
) -> nn.Module:
    """A network with the weights of a file, in the dtype of its first tensor."""
    with torch.device("meta"):
        network = module(config)
    kept = [name for name in source.names() if rename(name) is not None]
    load.load_into(network, source, rename, source.dtype(kept[0]))
    return network.eval()


def load_vae(folder: str | Path) -> WanVAE:
    """From Wan2.2_VAE.pth, or the folder `vae` of a diffusers repository. The decoder, which only
    makes pictures for people, is kept in bf16; the encoder, whose latents the network was trained
    on, in the dtype of the file."""
    source = files.open_source(first_of(folder, "Wan2.2_VAE.pth", "vae"))
    rename = layouts.renaming(source.names())
    stated = flatten(files.config_beside(source))
    config = vae_config(source.path, shapes_of(source, rename), stated)
    vae = filled(WanVAE, config, source, rename)
    vae.decoder.bfloat16()
    vae.conv2.bfloat16()
    return vae


def load_text(folder: str | Path, text_len: int = 512) -> tuple[UMT5Encoder, T5Tokenizer]:
    """From models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl, or the folders of a diffusers
    repository."""
    source = files.open_source(first_of(folder, "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"))
    words = first_of(folder, "google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
    rename = layouts.renaming(source.names())
    config = text_config(source.path, shapes_of(source, rename))
    return filled(UMT5Encoder, config, source, rename), T5Tokenizer(words, text_len)


def load_vlm(folder: str | Path, motus: str | Path | None = None) -> tuple[Qwen3VL, Tokenizer]:
    """From a Qwen3-VL folder, or with its configs and tokenizer and the `vlm.` part of the Motus
    file `motus`."""
    source = files.open_source(hub.fetched(motus or folder))
    folder = Path(folder)
    own = layouts.renaming(source.names())

    def part_of_motus(name: str) -> str | None:
        key = own(name) or ""
        return key.removeprefix("vlm.") if key.startswith("vlm.") else None

    rename = own if motus is None else part_of_motus
    stated = {}
    for name in ("preprocessor_config.json", "config.json"):
        if (folder / name).is_file():
            stated |= flatten(files.read_json(folder / name))
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = vlm_config(source.path, shapes_of(source, rename), stated)
    return filled(Qwen3VL, config, source, rename), tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ValueError(
            f"tokenizer file {path} does not exist; it is published beside the weights"
        )
    return Tokenizer.from_file(str(path))


def open_weights(
    path: str | Path, weights: str = "ema"
) -> tuple[TensorSource, Rename, Card, tuple[str, ...]]:
    """The weights at `path`, the way from their names to ours, their card, and the experts they
    lack (prefixes). `path` is anything that `Motus.from_pretrained` takes. Published weights get a
    card of preset `full`, with the sizes of the file."""
    path = hub.fetched(path)
    if is_published(path):
        found = open_motus(path)
        card = Card(found.config, found.stage, "full", found.statistics)
        return found.source, found.rename, card, found.fresh
    folder = newest_step(path)
    card = Card.read(folder / "config.json")
    return files.open_source(folder / f"{weights}.safetensors"), str, card, ()
