"""Published files to one safetensors file, and our weights back to the official folder."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weights.files import config_beside, open_source, replace_file, save_safetensors
from weights.layouts import (
    KINDS,
    MOTUS_BACK,
    MOTUS_FIELDS,
    POSITIONS,
    WRAPPERS,
    canonical,
    identify,
    renaming,
    substitute,
)
from weights.load import plan_names


def convert(src: str | Path, dst: str | Path) -> None:
    """A published file or folder to one safetensors file of ours: our names, second names dropped,
    config.json kept as metadata."""
    with open_source(src) as source:
        kind, _ = identify(source.names())
        if kind not in KINDS:
            raise ValueError(f"{source.path}: the layout is not known, expected {', '.join(KINDS)}")
        if kind.startswith("dcae"):  # where a tensor of the file may be three of ours
            source.tensors = canonical(source.tensors)
        plan = plan_names(source, renaming(source.names()))
        metadata = source.metadata | {"format": "pt"}
        if POSITIONS in source.tensors:
            metadata["pos_embedding_rows"] = str(source.shape(POSITIONS)[1])
        if config := config_beside(source):
            metadata["official_config"] = json.dumps(config)
        save_safetensors(dst, {key: source.read(name) for key, name in plan.items()}, metadata)


def position_table(rows: int, width: int) -> Tensor:
    """The action expert's fixed sine and cosine table (1, rows, width), float32, computed in
    float64 as officially."""
    power = -torch.arange(0, width, 2, dtype=torch.float64) / width
    angle = torch.outer(torch.arange(rows, dtype=torch.float64), 10000.0**power)
    return torch.cat([angle.sin(), angle.cos()], 1)[None].float()


def export(
    src: str | Path, dst: str | Path, rows: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Our Motus weights to the official layout: DST/mp_rank_00_model_states.pt, second names
    sharing storage, plus config.json if known.

    SRC is a converted file, or the weights of a checkpoint of ours, whose config.json beside it
    gives the fields of MotusConfig. `rows` of the position table are chunk + 2 + registers for
    fine-tuning and chunk for pre-training; the default is what is known.
    """
    with open_source(src) as source:
        config = config_beside(source)
        own = config.get("motus") or json.loads(source.metadata.get("config", "{}"))
        motus = identify(source.names())[0].startswith("motus")
        rows = rows or int(source.metadata.get("pos_embedding_rows", 0))
        if motus and own and not rows:
            rows = own["frames"] * own["ratio"]
            if own["finetune"]:
                rows += 2 + own["registers"]
        if not motus or not rows:
            raise ValueError(
                f"{source.path}: expected Motus weights and the rows of the position table (found"
                f" {rows}); pass --rows CHUNK+6 for fine-tuned weights, --rows CHUNK for"
                " pre-trained ones"
            )
        plan = plan_names(source, renaming(source.names()))
        module = {}
        for key, name in plan.items():
            module[substitute(key, MOTUS_BACK)] = source.read(name).to(dtype)
        width = module["action_expert.blocks.0.modulation"].shape[-1]
        module[POSITIONS] = position_table(rows, width).to(dtype)
        embedding = "vlm_model.model.language_model.embed_tokens.weight"
        if embedding in module:
            module["vlm_model.lm_head.weight"] = module[embedding]
        for wrapper, parts in WRAPPERS.items():
            inner = [name for name in module if name.startswith(parts)]
            module |= {wrapper + name: module[name] for name in inner}
        weights = {"module": module}
        replace_file(Path(dst) / "mp_rank_00_model_states.pt", partial(torch.save, weights))
        if own:
            config = official_config(own)
        if config:
            text = json.dumps(config, indent=2)
            replace_file(Path(dst) / "config.json", lambda path: path.write_text(text))


def official_config(own: Mapping) -> dict:
    """The official config.json of a MotusConfig, given as a dictionary. The section `wan`, for
    readers of ours, holds what neither the official file nor a shape says of the video expert."""
    config = {"wan": {field: own["video"][field] for field in ("eps", "text_len")}}
    for field, place in MOTUS_FIELDS.items():
        section, key = place.split(".")
        config.setdefault(section, {})[key] = own[field]
    return config
