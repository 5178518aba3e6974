"""Reading and writing weights: the published files of Wan2.2, UMT5, Qwen3-VL and Motus, and our own checkpoints.

    python -m backbones.weights inspect PATH         what a file is: kind, stage, parts, counts, dtypes
    python -m backbones.weights convert SRC DST      official folder or .pt to one safetensors file
    python -m backbones.weights export SRC DST       our weights to the official Motus layout
    python -m backbones.weights download NAME        from the hub, resumable; sizes and licences are printed first
    python -m backbones.weights tables [NAME]        the tensors that each published file must hold

Three promises. (1) Accounting: every tensor a module wants is loaded exactly once, every tensor of a file is used or knowingly dropped;
anything else is one ValueError that lists the first ten and the count. The official loader swallows such errors and goes on with random
values. (2) Memory: a tensor goes from the mapped file to its place in the module, cast on the way, and its pages are given back, so the
peak above the module itself is one tensor. (3) Hostile files: what a file claims is checked against its size before anything is allocated;
pickles may name tensors and plain containers only, and are read with `weights_only=True`.

Official Motus files list every tensor up to three times, because wrapper modules refer to the same experts again; the copies are compared
with the original and dropped. The fixed table `pos_embedding` is dropped too: it is a function of its shape.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import math
import mmap
import os
import pickletools
import re
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

MAX_HEADER = (
    16 << 20
)  # bytes of json or pickle; the largest honest one (a whole Motus file) is below 2 MiB
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CASTABLE = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
}  # any of these may be loaded as any other

# -- names: from every published layout to the one our modules use ---------------------------------------------------------------

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
    "frames": ("common.num_video_frames",),
    "ratio": ("common.video_action_freq_ratio",),
    "action_dim": ("common.action_dim",),
    "state_dim": ("common.state_dim",),
    "action_width": ("action_expert.hidden_size",),
    "action_eps": ("action_expert.norm_eps",),
    "expert_ffn": ("action_expert.ffn_dim_multiplier",),
    "und_width": ("und_expert.hidden_size",),
    "und_eps": ("und_expert.norm_eps",),
    "vlm_dim": ("und_expert.vlm.input_dim",),
}


def _substitute(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def wan_original(name: str) -> str:
    """Name in our video expert of a tensor in an original Wan file; stage 1 files of Motus may carry the prefix `dit.`."""
    return name.removeprefix("dit.")


def wan_from_diffusers(name: str) -> str:
    """Original name of a tensor of the diffusers video transformer. No tensor changes shape."""
    return _substitute(name, WAN_DIFFUSERS)


def vae_from_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """Original name of a tensor of the diffusers VAE, which does not count a level's resampler among its residual blocks."""
    resamplers = (
        (r"down_blocks\.(\d+)\.downsampler\.", rf"downsamples.\1.downsamples.{num_res_blocks}."),
        (r"up_blocks\.(\d+)\.upsampler\.", rf"upsamples.\1.upsamples.{num_res_blocks + 1}."),
    )
    return _substitute(name, resamplers + VAE_DIFFUSERS)


def umt5_from_transformers(name: str) -> str:
    """Wan's name of a tensor of the transformers `UMT5EncoderModel`."""
    match = re.fullmatch(r"(?:encoder\.block\.(\d+)\.)?(.+)\.weight", name)
    if not match or match[2] not in UMT5_TRANSFORMERS:
        raise ValueError(
            f"tensor {name!r} is not part of a transformers UMT5EncoderModel; expected shared.weight or encoder.*"
        )
    return (f"blocks.{match[1]}." if match[1] else "") + f"{UMT5_TRANSFORMERS[match[2]]}.weight"


def alias_of(name: str) -> str | None:
    """The tensor of which `name` is a second name: a wrapper's copy, a tied output head or a tied token embedding; else None."""
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


def motus_canonical(name: str) -> str | None:
    """The one official name of a tensor in an official Motus file; None for second names and for the fixed position table."""
    return None if alias_of(name) or name == POSITIONS else name


def own_name(name: str) -> str | None:
    """Name in our modules of a tensor of an official Motus file: video. action. und. vlm.; None as for `motus_canonical`."""
    return motus_canonical(name) and _substitute(name, OWN_NAMES)


def official_name(name: str) -> str:
    """The way back: und.blocks.0.qkv -> und_expert.blocks.0.wan_und_qkv. Official names stay as they are."""
    return _substitute(name, OFFICIAL_NAMES)


def qwen_own(name: str) -> str | None:
    """Name in our vision-language model; None for the output head, which is tied to the embedding and not used."""
    return None if alias_of(name) else name.removeprefix("model.")


def _of(module: str) -> Callable[[str], str]:
    """The rename function of a file that imports this one."""
    return lambda name: importlib.import_module(f"backbones.{module}").rename(name)


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
    "dcae": ("encoder.project_in.conv.conv.weight", _of("dcae")),
    "dcae-diffusers": ("encoder.conv_in.conv.weight", _of("dcae")),
    "dpflow": ("fnet.stem.conv1.weight", _of("dpflow")),
}


def identify(names: Iterable[str]) -> tuple[str, int | None]:
    """(kind, stage) of a set of names: a key of KINDS or "unknown", and the stage 1, 2 or 3 if it is part of the Motus story."""
    names = {wan_original(name) for name in names}
    kind = next((kind for kind, (telltale, _) in KINDS.items() if telltale in names), "unknown")
    if kind.startswith("motus"):
        return kind, 3 if names & {"action_expert.registers", "action.registers"} else 2
    return kind, 1 if kind.startswith("wan") and "vae" not in kind else None


def renaming(names: Iterable[str]) -> Callable[[str], str | None]:
    """The way from the names of a file to ours; names that no layout has stay as they are."""
    kind = identify(names := list(names))[0]
    if kind == "wan-vae-diffusers":
        blocks = len(
            {
                name.split(".")[4]
                for name in names
                if name.startswith("encoder.down_blocks.0.resnets.")
            }
        )
        return lambda name: vae_from_diffusers(name, blocks)
    return KINDS[kind][1] if kind in KINDS else str


# -- the tables of expected tensors -----------------------------------------------------------------------------------------------


def _expand(pattern: str) -> list[str]:
    """Write out braces: `a.{0-2}.{q,k}` is a.0.q, a.0.k, a.1.q, ..."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if not group:
        return [pattern]
    first, _, last = group[1].partition("-")
    options = map(str, range(int(first), int(last) + 1)) if last else group[1].split(",")
    return [
        name
        for option in options
        for name in _expand(pattern[: group.start()] + option + pattern[group.end() :])
    ]


def expected(table: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the published file `table` holds (keys/TABLE.txt, where the source is stated)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in (Path(__file__).parent / "keys" / f"{table}.txt").read_text().splitlines():
        pattern, *rest = line.split()
        if pattern.startswith("@"):  # include another table under a prefix
            shapes |= {"".join(rest) + name: shape for name, shape in expected(pattern[1:]).items()}
        elif pattern != "#":
            shapes |= dict.fromkeys(_expand(pattern), tuple(map(int, rest)))
    return shapes


# -- reading -------------------------------------------------------------------------------------------------------------------------


def refuse(path: Path, what: str, problems: list[str]) -> None:
    """Raise one ValueError for all problems: the first ten and the count."""
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            "\n  ".join(
                [
                    f"{path}: {what} ({len(problems)} found)",
                    *(problem[:300] for problem in problems[:10]),
                    *more,
                ]
            )
        )


def _json(path: Path, raw: bytes) -> dict:
    def unique(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"key {twice[0][:80]!r} appears twice")
        return dict(pairs)

    def no_constant(word):
        raise ValueError(f"{word} is not json")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid json: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: json object wanted, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict:
    """A json object. ValueError if it is something else, unsound or suspiciously large."""
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, a config or index has at most {MAX_HEADER}"
        )
    return _json(path, path.read_bytes())


def _whole(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # bool is an int to Python, not to us


def _header(path: Path) -> tuple[list[tuple], dict[str, str], int]:
    """Checked header of a safetensors file: rows (begin, end, name, dtype, shape) in file order, metadata, where data start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path}: not a safetensors file: {size} bytes long, header length {length} "
                f"(allowed 2 to {MAX_HEADER}, and within the file); is the download complete?"
            )
        table = _json(path, file.read(length))
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    rows, problems = [], []
    for name, entry in table.items():
        dtype, shape, offsets = (
            (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
            if isinstance(entry, dict)
            else (None,) * 3
        )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            problems.append(f"{name}: dtype {dtype!r}, allowed {', '.join(DTYPES)}")
        elif not isinstance(shape, list) or len(shape) > 16 or not all(map(_whole, shape)):
            problems.append(
                f"{name}: shape {str(shape)[:80]} is not a list of at most 16 numbers >= 0"
            )
        elif not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
            problems.append(f"{name}: data_offsets {str(offsets)[:80]} are not two numbers >= 0")
        elif offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            problems.append(
                f"{name}: {dtype} {shape} does not fill the bytes {offsets[0]} to {offsets[1]}"
            )
        else:
            rows.append((*offsets, name, DTYPES[dtype], tuple(shape)))
    refuse(path, "bad entries in the safetensors header", problems)
    rows.sort()
    at = 0
    for begin, end, name, _, _ in rows:
        if begin != at:
            problems.append(
                f"{name}: starts at byte {begin}, the tensor before it ends at {at} ({'gap' if begin > at else 'overlap'})"
            )
        at = end
    if at != size - 8 - length:
        problems.append(
            f"tensors end at byte {at}, the data at {size - 8 - length}; is the download complete?"
        )
    refuse(path, "tensors and data do not match", problems)
    return rows, metadata, 8 + length


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    rows, metadata, start = _header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: torch.frombuffer(
            mapped, dtype=dtype, count=math.prod(shape), offset=start + begin
        ).view(shape)
        if end > begin
        else torch.empty(shape, dtype=dtype)
        for begin, end, name, dtype, shape in rows
    }, metadata


def _open_index(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Shards named by an index json. They must lie beside it; a link may only lead there or to the blobs of a hub cache."""
    listed = read_json(path).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(shard, str) for shard in listed.values())
    ):
        raise ValueError(f"{path}: weight_map must map tensor names to shard files")
    folder = path.parent.resolve()
    homes = (
        {folder, folder.parent.parent / "blobs"} if folder.parent.name == "snapshots" else {folder}
    )
    shards = sorted(set(listed.values()))
    problems = [
        f"{shard!r} is not a plain .safetensors name"
        for shard in shards
        if not re.fullmatch(r"[\w\-][\w\-.]*\.safetensors", shard)
    ]
    refuse(path, "shards outside the folder", problems)
    problems = [
        f"{shard} leads out of the folder"
        for shard in shards
        if (folder / shard).resolve().parent not in homes
    ]
    refuse(path, "shards outside the folder", problems)
    refuse(path, "missing shards", [shard for shard in shards if not (folder / shard).is_file()])
    tensors, metadata = {}, {}
    for shard in shards:
        found, metadata = _open_safetensors(folder / shard)
        named = {name for name, home in listed.items() if home == shard}
        problems += [
            f"{name}: lies in {shard}, the index says {listed.get(name, 'nothing')}"
            for name in sorted(found.keys() - named)
        ]
        problems += [
            f"{name}: is not in {shard}, where the index puts it"
            for name in sorted(named - found.keys())
        ]
        tensors |= found
    refuse(path, "index and shards disagree", problems)
    return tensors, metadata


# What a weight file's pickle may name. Torch allows more, among it ways to ask for memory that the file does not hold.
PICKLE_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device|bool|(b?float|u?int)\d+|\w+Storage)"
)


def _check_torch_zip(path: Path) -> Counter[int]:
    """Check a torch zip file before torch opens it; returns how many storage records there are of each size."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            pickled = [info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
            problems = [
                f"{info.filename}: compressed or past the end of the file"
                for info in infos
                if info.compress_type
                or info.file_size != info.compress_size
                or info.header_offset + info.file_size > size
            ]
            problems += [
                f"{name}: appears twice"
                for name, count in Counter(info.filename for info in infos).items()
                if count > 1
            ]
            if sum(info.file_size for info in infos) > size:
                problems.append("the records overlap: together they are larger than the file")
            if len(pickled) != 1 or pickled[0].file_size > MAX_HEADER:
                problems.append(
                    f"{len(pickled)} data.pkl records (1 needed, at most {MAX_HEADER} bytes)"
                )
            refuse(path, "not a plain torch file", problems)
            root = pickled[0].filename.removesuffix("data.pkl")
            if (
                root + "byteorder" in archive.namelist()
                and archive.read(root + "byteorder") != b"little"
            ):
                raise ValueError(
                    f"{path}: big-endian tensors; save it again on a little-endian machine"
                )
            problems = sorted(
                {
                    f"{op.name} {arg}"
                    for op, arg, _ in pickletools.genops(archive.read(pickled[0]))
                    if op.name
                    in (
                        "STACK_GLOBAL",
                        "INST",
                        "OBJ",
                        "EXT1",
                        "EXT2",
                        "EXT4",
                        "NEWOBJ",
                        "NEWOBJ_EX",
                    )
                    or op.name == "GLOBAL"
                    and not PICKLE_NAMES.fullmatch(arg)
                }
            )
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        OSError,
        KeyError,
        struct.error,
    ) as error:
        raise ValueError(
            f"{path}: not a whole torch zip file ({error}); a file in the old torch format must be saved again"
        ) from error
    refuse(path, "the pickle names things that are neither tensors nor plain containers", problems)
    return Counter(info.file_size for info in infos if info.filename.startswith(root + "data/"))


def read_torch(path: Path) -> tuple[object, Counter]:
    """What a .pt or .pth file holds, its tensors mapped, and how many records of each size it has. Nothing in it is run."""
    records = _check_torch_zip(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True), records
    except (
        Exception
    ) as error:  # torch raises many kinds; all mean that this file is not what it claims to be
        raise ValueError(f"{path}: torch refuses the file: {str(error)[:300]}") from error


def _open_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a .pt or .pth file, mapped; the state dict may lie under 'module', 'model' or 'state_dict'."""
    content, records = read_torch(path)
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("module", "model", "state_dict") if key in content), content
        )
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: no dictionary of tensors, found {type(content).__name__}")
    problems, storages = [], {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            problems.append(
                f"{str(name)[:80]!r}: is {type(value).__name__}, every entry must be a tensor with a name"
            )
        elif (
            value.dtype not in DTYPE_NAMES
            or value.layout != torch.strided
            or value.device.type != "cpu"
        ):
            problems.append(
                f"{name}: {value.dtype} {value.layout} on {value.device} is not a plain tensor"
            )
        elif value.nbytes > value.untyped_storage().nbytes():
            problems.append(
                f"{name}: claims {value.nbytes} bytes, its storage has {value.untyped_storage().nbytes()}"
            )
        else:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    storages.pop(0, None)  # empty tensors
    problems += [
        f"a storage claims {nbytes} bytes, no record has that size"
        for nbytes in Counter(storages.values()) - records
    ]
    refuse(path, "not a dictionary of tensors", problems)
    return {name: value.detach() for name, value in content.items()}, {}


@dataclass
class TensorSource:
    """The tensors of a file, mapped from disk and not yet read. Treat what `read` gives as read-only."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    mapped: frozenset[
        int
    ]  # where the storages in the mapped file begin; other tensors are ordinary memory

    def names(self) -> list[str]:
        """All names, in file order."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file: bytes are read when touched."""
        return self.tensors[name]

    def describe(self) -> str:
        """What the file is: kind, stage, parts with parameter counts, dtypes, names that are dropped."""
        kind, stage = identify(self.tensors)
        rename = renaming(self.tensors)
        kept = {
            rename(name): tensor
            for name, tensor in self.tensors.items()
            if rename(name) is not None
        }
        dtypes = Counter(DTYPE_NAMES[tensor.dtype] for tensor in kept.values())
        lines = [
            f"{self.path}: {kind}" + (f", Motus stage {stage}" if stage else ""),
            f"  {len(kept)} tensors, {sum(t.numel() for t in kept.values()):,} parameters, "
            + ", ".join(f"{name} x {count}" for name, count in dtypes.items()),
        ]
        for prefix, part in MOTUS_PARTS.items() if kind.startswith("motus") else ():
            sizes = [tensor.numel() for name, tensor in kept.items() if name.startswith(prefix)]
            lines.append(f"  {part:22} {len(sizes):5} tensors {sum(sizes):15,} parameters")
        if len(kept) < len(self.tensors):
            lines.append(
                f"  {len(self.tensors) - len(kept)} second names and fixed tables are not loaded"
            )
        return "\n".join(
            lines + [f"  {key}: {value[:200]}" for key, value in self.metadata.items()]
        )

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_) -> None:
        self.tensors = {}  # the file is unmapped when the last view of it is gone


WEIGHT_FILES = (
    "*.safetensors.index.json",
    "*.safetensors",
    "mp_rank_00_model_states.pt",
    "pytorch_model/mp_rank_00_model_states.pt",
    "*.pt*",
)


def _find(folder: Path) -> Path:
    """The weight file of a folder: the first pattern of WEIGHT_FILES that something fits must fit one file."""
    found = next((found for pattern in WEIGHT_FILES if (found := sorted(folder.glob(pattern)))), [])
    if len(found) != 1:
        raise ValueError(
            f"{folder}: {len(found)} weight files, name one: {', '.join(file.name for file in found[:10]) or 'none fits'} "
            f"(looked for {', '.join(WEIGHT_FILES)})"
        )
    return found[0]


def open_source(path: str | Path) -> TensorSource:
    """Open a weight file (.safetensors, .safetensors.index.json, torch zip file) or folder. ValueError naming the file if not sound."""
    path = _find(Path(path)) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such weight file; `python -m backbones.weights download NAME` fetches the published ones"
        )
    readers = {".safetensors": _open_safetensors, ".json": _open_index} | dict.fromkeys(
        (".pt", ".pth", ".bin", ".ckpt"), _open_torch
    )
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: unknown kind of weight file {path.suffix!r}, allowed {', '.join(readers)}"
        )
    tensors, metadata = readers[path.suffix](path)
    return TensorSource(
        path,
        tensors,
        metadata,
        frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors.values()),
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such weight file; name one that exists")
    return _header(Path(path))[1]


# -- loading -------------------------------------------------------------------------------------------------------------------------


def _advise(tensor: Tensor, advice: str) -> None:
    """Tell the kernel how the pages under a tensor will be used: WILLNEED, DONTNEED (mapped files only: it forgets them), RANDOM (nothing
    around them is wanted) or HUGEPAGE."""
    if (
        not tensor.is_contiguous() and tensor.stride(-1) == 1
    ):  # a part along an inner axis is many runs
        for run in tensor:
            _advise(run, advice)
        return
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
    if end > start and hasattr(mmap, f"MADV_{advice}"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, f"MADV_{advice}")
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes (NaN equals NaN)."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def _plan(
    source: TensorSource, rename: Callable[[str], str | None]
) -> tuple[dict[str, str], list[str]]:
    """(our name -> name in the file, names knowingly dropped). Second names must equal the tensor they repeat."""
    plan, dropped, problems = {}, [], []
    for name in source.names():
        key, original = rename(name), alias_of(name)
        if key is None:
            dropped.append(name)
            if original and original not in source.tensors:
                problems.append(f"{name}: the tensor it repeats, {original}, is not in the file")
            elif original and not _same(source.read(name), source.read(original)):
                problems.append(f"{name}: differs from {original}, of which it should be a copy")
        elif key in plan:
            problems.append(f"{name} and {plan[key]} are both {key}")
        else:
            plan[key] = name
    refuse(source.path, "tensors that contradict each other", problems)
    return plan, dropped


@dataclass(frozen=True)
class Report:
    """What a load did; `fresh` and `dropped` are names, `ignored` names of the file that the caller asked not to load."""

    path: Path
    loaded: int
    nbytes: int
    seconds: float
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.path.name}: loaded {self.loaded} tensors, {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s; "
            f"{len(self.fresh)} start fresh, {len(self.dropped)} second names or tables dropped, {len(self.ignored)} left out"
        )


def held(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What this process holds of a tensor that may be sharded over ranks (a DTensor, cut along one axis in equal parts of which the last
    may be short or empty): its values, the axis, and where they begin there."""
    if not hasattr(tensor, "device_mesh"):
        return tensor, 0, 0
    mesh, cuts = (
        tensor.device_mesh,
        [
            (i, placement.dim)
            for i, placement in enumerate(tensor.placements)
            if placement.is_shard()
        ],
    )
    for i, axis in cuts:  # at most one: replicas are placed on the other axis of the mesh
        return (
            tensor.to_local(),
            axis,
            min(
                mesh.get_coordinate()[i] * -(-tensor.shape[axis] // mesh.size(i)),
                tensor.shape[axis],
            ),
        )
    return tensor.to_local(), 0, 0


def part(tensor: Tensor, value: Tensor) -> Tensor:
    """Of `value`, the whole of what `tensor` is to be, a view of what this process holds; nothing is read."""
    values, axis, start = held(tensor)
    return value.narrow(axis, start, values.shape[axis]) if values.dim() else value


def place(tensor: Tensor, value: Tensor) -> None:
    """Copy into `tensor` what this process holds of `value`, the whole of it."""
    held(tensor)[0].copy_(part(tensor, value))


def parts(source: TensorSource, wanted: Sequence[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """For each (name in the file, tensor it is for) what this process holds of it, one after another: fetched from disk while the one
    before is in use, its pages given back afterwards. Of a tensor that is sharded, nothing but the part is fetched; the kernel would read
    megabytes around it."""
    views, mapped = [], lambda tensor: tensor.untyped_storage().data_ptr() in source.mapped
    for name, tensor in wanted:
        views.append(part(tensor, source.read(name)))
        if views[-1].numel() < source.read(name).numel() and mapped(views[-1]):
            _advise(source.read(name), "RANDOM")
    with ThreadPoolExecutor(1) as ahead:
        fetch = lambda few: [
            ahead.submit(_advise, view, "WILLNEED") for view in few if mapped(view)
        ]
        coming = fetch(views[:1])
        for i, view in enumerate(views):
            wait(coming)
            coming = fetch(views[i + 1 : i + 2])
            yield view
            if mapped(view):
                _advise(view, "DONTNEED")


@torch.no_grad()
def load_into(
    module: nn.Module,
    source: TensorSource,
    rename: Callable[[str], str | None] = str,
    dtype: torch.dtype | None = None,
    ignore: Iterable[str] = (),
    fresh: Iterable[str] = (),
    device: str = "cpu",
) -> Report:
    """Fill every parameter and saved buffer of `module` from `source`, one tensor at a time, replacing meta tensors by real ones. Of a
    tensor that is sharded over ranks, each fetches and reads its own part; `nbytes` of the report counts that.

    rename  name in the file -> name in the module, or None: knowingly dropped
    dtype   replaces the module's floating dtypes; None keeps each as it is
    ignore  prefixes, in the module's names, of tensors in the file that are not to be loaded
    fresh   prefixes of module tensors that the file may lack; they keep their initial values and must not be on meta
    device  where meta tensors come to life
    Raises one ValueError for all missing, unexpected and misfitting tensors, before anything is loaded.
    """
    begun = time.perf_counter()
    ignore, fresh = tuple(ignore), tuple(fresh)
    wanted = module.state_dict(keep_vars=True)
    plan, dropped = _plan(source, rename)
    ignored = [plan.pop(key) for key in list(plan) if key.startswith(ignore)]
    kept = [key for key in wanted if key not in plan and key.startswith(fresh)]
    problems = [
        f"missing: {key} {tuple(wanted[key].shape)}"
        for key in wanted
        if key not in plan and key not in kept
    ]
    problems += [
        f"unexpected: {name} {source.shape(name)}"
        for key, name in plan.items()
        if key not in wanted
    ]
    for key, name in plan.items():
        want, found = wanted.get(key), source.read(name)
        if want is not None and want.shape != found.shape:
            problems.append(
                f"shape: {key} is {tuple(found.shape)} in the file, {tuple(want.shape)} in the module"
            )
        elif (
            want is not None
            and want.dtype != found.dtype
            and not {want.dtype, found.dtype} <= CASTABLE
        ):
            problems.append(
                f"dtype: {key} is {found.dtype} in the file, {want.dtype} in the module"
            )
    problems += [
        f"not initialised: {key} starts fresh but is on meta" for key in kept if wanted[key].is_meta
    ]
    problems += [
        f"not initialised: buffer {key} is on meta and in no file; build it on a real device"
        for key, buffer in module.named_buffers()
        if buffer.is_meta and key not in wanted
    ]
    refuse(source.path, f"does not fit {type(module).__name__}", problems)

    nbytes = 0
    for key, view in zip(plan, parts(source, [(name, wanted[key]) for key, name in plan.items()])):
        old, nbytes = wanted[key], nbytes + view.nbytes
        kind = dtype if dtype and old.dtype in CASTABLE else old.dtype
        new = old
        if old.is_meta or old.dtype != kind:
            new = torch.empty(view.shape, dtype=kind, device=device if old.is_meta else old.device)
            if new.device.type == "cpu":
                _advise(
                    new, "HUGEPAGE"
                )  # fresh memory costs more time than the file when it comes in small pages
        held(new)[0].copy_(view)  # casts on the way: no second copy
        if new is not old:
            owner, _, leaf = key.rpartition(".")
            new = (
                nn.Parameter(new, requires_grad=old.requires_grad)
                if isinstance(old, nn.Parameter)
                else new
            )
            setattr(module.get_submodule(owner), leaf, new)
    return Report(
        source.path,
        len(plan),
        nbytes,
        time.perf_counter() - begun,
        tuple(kept),
        tuple(dropped),
        tuple(ignored),
    )


# -- writing -------------------------------------------------------------------------------------------------------------------------


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, flush it to disk, rename it. On any failure the old file stays and the new one goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file with tensors of these dtypes and shapes, the byte of the file at which each of them begins, in
    file order, and the size of the file."""
    order = sorted(
        tensors, key=lambda name: (-tensors[name][0].itemsize, name)
    )  # widest first keeps every tensor aligned
    header, begins, at = {"__metadata__": dict(metadata)} if metadata else {}, {}, 0
    for name in order:
        dtype, shape = tensors[name]
        begins[name], at = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begins[name], at],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return (
        struct.pack("<Q", len(raw)) + raw,
        {name: start + begin for name, begin in begins.items()},
        start + at,
    )


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, one at a time, as a safetensors file; atomic. ValueError for a dtype the format has no name for here."""
    path = Path(path)
    refuse(
        path,
        "cannot be saved",
        [
            f"{name}: {tensor.dtype}, allowed {', '.join(DTYPES)}"
            for name, tensor in tensors.items()
            if tensor.dtype not in DTYPE_NAMES
        ],
    )
    header, begins, _ = safetensors_header(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata
    )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header)
            for name in begins:
                file.write(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())

    _replace(path, write)


def digest(tensors: Mapping[str, Tensor], *about: str) -> str:
    """Sixteen hexadecimal digits that change with any name, dtype, shape or byte of the tensors, or with `about`."""
    state = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        value = tensors[name].detach()
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def config_beside(source: TensorSource) -> dict:
    """The config.json of a weight file: kept in the metadata by `convert`, else in its folder, else, for folders of DeepSpeed, above it."""
    if "official_config" in source.metadata:
        return _json(source.path, source.metadata["official_config"].encode())
    for folder in (
        source.path.parent,
        *[source.path.parent.parent] * (source.path.parent.name == "pytorch_model"),
    ):
        if (path := folder / "config.json").is_file():
            return read_json(path)
    return {}


def convert(src: str | Path, dst: str | Path) -> None:
    """A published file or folder to one safetensors file of ours: our names, second names dropped, config.json kept as metadata."""
    with open_source(src) as source:
        kind, stage = identify(source.names())
        if kind not in KINDS:
            raise ValueError(f"{source.path}: layout not known, allowed {', '.join(KINDS)}")
        if kind.startswith(
            "dcae"
        ):  # the one layout in which a tensor of the file may be three of ours
            source.tensors = importlib.import_module("backbones.dcae").canonical(source.tensors)
        plan, _ = _plan(source, str if kind.startswith("dcae") else renaming(source.names()))
        metadata = source.metadata | {
            "format": "pt",
            "kind": re.sub("-(diffusers|transformers|own)$", "", kind),
        }
        if stage:
            metadata["stage"] = str(stage)
        if POSITIONS in source.tensors:
            metadata["pos_embedding_rows"] = str(source.shape(POSITIONS)[1])
        if config := config_beside(source):
            metadata["official_config"] = json.dumps(config)
        save_safetensors(dst, {key: source.read(name) for key, name in plan.items()}, metadata)


def position_table(rows: int, width: int) -> Tensor:
    """The action expert's fixed sine and cosine table (1, rows, width), float32, computed in float64 as officially."""
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(width // 2, dtype=torch.float64) / (width // 2)
    )
    return torch.cat([angle.sin(), angle.cos()], 1)[None].float()


def export(
    src: str | Path, dst: str | Path, rows: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Our Motus weights to the official layout: DST/mp_rank_00_model_states.pt, second names sharing storage, plus config.json if known.

    SRC is a converted file, or the weights of a checkpoint of ours, whose config.json beside it gives the fields of MotusConfig.
    `rows` of the position table are chunk + 2 + registers for fine-tuning and chunk for pre-training; the default is what is known.
    """
    with open_source(src) as source:
        config = config_beside(source)
        own = config.get("motus") or json.loads(source.metadata.get("config", "{}"))
        chunk = own.get("frames", 0) * own.get("ratio", 0)
        rows = (
            rows
            or int(source.metadata.get("pos_embedding_rows", 0))
            or chunk + (2 + own["registers"] if own.get("finetune") else 0)
        )
        if not identify(source.names())[0].startswith("motus") or not rows:
            raise ValueError(
                f"{source.path}: needs Motus weights and the rows of the position table (found {rows}); pass --rows CHUNK+6 "
                "for fine-tuned weights, --rows CHUNK for pre-trained ones"
            )
        module = {
            official_name(key): source.read(name).to(dtype)
            for key, name in _plan(source, own_name)[0].items()
        }
        width = module["action_expert.blocks.0.modulation"].shape[-1]
        module[POSITIONS] = position_table(rows, width).to(dtype)
        if (
            embedding := module.get("vlm_model.model.language_model.embed_tokens.weight")
        ) is not None:
            module["vlm_model.lm_head.weight"] = embedding
        for wrapper, part in WRAPPERS:
            module |= {
                wrapper + name: tensor for name, tensor in module.items() if name.startswith(part)
            }
        _replace(
            Path(dst) / "mp_rank_00_model_states.pt",
            lambda temporary: torch.save({"module": module}, temporary),
        )
        if official := official_config(own) if own else config:
            _replace(
                Path(dst) / "config.json",
                lambda temporary: temporary.write_text(json.dumps(official, indent=2)),
            )


def official_config(own: Mapping) -> dict:
    """The official config.json of a MotusConfig, given as a dictionary. The section `wan`, for readers of ours, holds what neither the
    official file nor a shape says of the video expert."""
    config: dict = (
        {"wan": {field: own["video"][field] for field in ("eps", "text_len")}}
        if "video" in own
        else {}
    )
    for field, (dotted,) in MOTUS_FIELDS.items():
        *sections, key = dotted.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        if field in own:
            place[key] = own[field]
    return config


# -- the hub and the command line ------------------------------------------------------------------------------------------------


# Published folders: repository, revision, files, gigabytes, licence.
HUB = {
    "wan": (
        "Wan-AI/Wan2.2-TI2V-5B",
        "921dbaf3f1674a56f47e83fb80a34bac8a8f203e",
        ["*.safetensors", "*.json", "*.pth", "google/umt5-xxl/*"],
        34.2,
        "Apache-2.0",
    ),
    "qwen3vl": (
        "Qwen/Qwen3-VL-2B-Instruct",
        "89644892e4d85e24eaac8bacfd4f463576704203",
        ["*"],
        4.3,
        "Apache-2.0",
    ),
    "motus-stage1": ("motus-robotics/Motus_Wan2_2_5B_pretrain", "main", ["*"], 10, "Apache-2.0"),
    "motus-stage2": ("motus-robotics/Motus", "main", ["*"], 16, "Apache-2.0"),
    "motus-stage3": ("motus-robotics/Motus_robotwin2", "main", ["*"], 16, "Apache-2.0"),
    "dcae": ("mit-han-lab/dc-ae-f128c512-in-1.0", "main", ["*"], 4.5, "Apache-2.0"),
    "dpflow": ("hmorimitsu/ptlflow", "weights1", [], 0.04, "academic and research use only"),
}  # a release on GitHub, not on the hub
COMPLETE = ".complete"  # lies in a folder whose download has ended


def fetched(path: str | Path) -> Path:
    """A path as it is. A key of HUB, or the repository in its row, where no such path exists: the folder weights/KEY, downloaded once."""
    name = next((name for name, row in HUB.items() if str(path) in (name, row[0])), None)
    if name is None or Path(path).exists():
        return Path(path)
    folder = Path("weights") / name
    if not (folder / COMPLETE).is_file():
        download(name, folder)
    return folder


def download(name: str, folder: str | Path) -> None:
    """Fetch a published folder; a broken download goes on where it stopped. ValueError if the name or huggingface_hub is missing."""
    if name not in HUB:
        raise ValueError(f"download: {name!r} is not known, allowed {', '.join(HUB)}")
    repository, revision, files, gigabytes, licence = HUB[name]
    print(
        f"{name}: {repository} at {revision[:12]}, about {gigabytes:g} GB, licence {licence} (read its card), into {folder}"
    )
    if name == "dpflow":
        importlib.import_module("backbones.dpflow").fetch("things", folder)
    else:
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise ValueError(
                "download needs the package huggingface_hub: pip install 'motus[hub]'"
            ) from error
        snapshot_download(repository, revision=revision, allow_patterns=files, local_dir=folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / COMPLETE).write_text(revision)


def main(argv: list[str] | None = None) -> None:
    """The command line; a bad file ends it with one message."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones.weights",
        description="Inspect, convert, export and download weights.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tables = sorted(file.stem for file in (Path(__file__).parent / "keys").glob("*.txt"))
    for command, what, *arguments in (
        ("inspect", "what a file or folder is", "path"),
        ("convert", "official folder or file to one safetensors file", "src", "dst"),
        ("export", "our weights to the official Motus folder", "src", "dst"),
        ("download", f"published weights: {', '.join(HUB)}", "name"),
        ("tables", f"tensors a published file must hold: {', '.join(tables)}"),
    ):
        sub = commands.add_parser(command, help=what, description=what)
        for argument in arguments:
            sub.add_argument(argument)
        if command == "export":
            sub.add_argument(
                "--rows",
                type=int,
                help="rows of the position table: chunk + 6, or chunk for pre-trained weights",
            )
        if command == "download":
            sub.add_argument("--to", help="folder (default: weights/NAME)")
    sub.add_argument("name", nargs="?", choices=tables)
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            convert(args.src, args.dst)
        elif args.command == "export":
            export(args.src, args.dst, args.rows)
        elif args.command == "download":
            download(args.name, args.to or f"weights/{args.name}")
        elif args.command == "tables" and args.name:
            print(
                "\n".join(
                    f"{name} {' '.join(map(str, shape))}"
                    for name, shape in expected(args.name).items()
                )
            )
        elif args.command == "tables":
            for name in tables:
                print(
                    f"{name:20} {len(expected(name)):5} tensors {sum(map(math.prod, expected(name).values())):15,} parameters"
                )
        if args.command in ("inspect", "convert", "export"):
            print(open_source(args.path if args.command == "inspect" else args.dst).describe())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
