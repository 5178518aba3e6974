"""Training data of the latent-action encoder: true motions of sources that know their optical flow,
or tokens of videos."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats.cards import Pyramid
from weights.files import open_source, same_config

LABELLED = (4, 6)  # levels whose actions the latent-action encoder may look at: the target robot's


class Motions(NamedTuple):
    """Motions over one interval, of sources that know their optical flow."""

    flow: Tensor  # (N, H, W, 2) float32, pixels
    labels: Tensor  # (N, A) float32 in [-1, 1]; all are known, for measuring
    mask: Tensor  # (N, A) bool: which of them training may use
    level: Tensor  # (N,) of the pyramid


def motions(pyramid: Pyramid, interval: int, held_out: bool = False) -> Motions:
    """The motions over `interval` rows of all episodes that are trained on, or held out. ValueError
    where a source does not know its flow: it has to be measured, and is not left out in silence."""
    unknown = [o.name for o in pyramid.opened if o.reader.flows(0, interval) is None]
    if unknown:
        raise ValueError(
            f"card {pyramid.name}: {unknown} do not know their true motions; make tokens of all by "
            "`python -m scripts.latents tokens --labelled 0.1` and name them by --cache. Labels "
            f"come from levels {LABELLED[0]} and {LABELLED[1]}: videos alone have none"
        )
    found = []
    for o in pyramid.opened:
        first, last = (o.trained, len(o.reader.lengths)) if held_out else (0, o.trained)
        for e in range(first, last):
            flow, valid = map(np.concatenate, zip(*o.reader.flows(e, interval)))
            labels = torch.from_numpy(o.reader.motions(e, interval)[valid])
            mask = torch.full(labels.shape, o.source.level in LABELLED)
            level = torch.full((len(labels),), o.source.level)
            found.append(Motions(torch.from_numpy(flow[valid]), labels, mask, level))
    if not sum(len(part.level) for part in found):
        raise ValueError(f"card {pyramid.name}: no episode has true motions over {interval} rows")
    return Motions(*map(torch.cat, zip(*found)))


def read_tokens(folders: Sequence[Path], model) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, D) in half precision, labels (N, A), 0 where unknown, and mask (N, A) of what
    `python -m scripts.latents tokens` wrote to several folders for the DC-AE of `model`."""
    wanted = {"dcae": model.dcae_fingerprint(), "interval": model.config.interval}
    rows = []
    for path in sorted(
        path for folder in folders for path in folder.glob("tokens/**/*.safetensors")
    ):
        with open_source(path) as source:
            made = json.loads(source.metadata.get("made", "{}"))
            same_config(path, {key: made.get(key) for key in wanted}, wanted)
            rows.append([source.read(key).clone() for key in ("tokens", "labels", "mask")])
    if not rows:
        raise ValueError(f"{folders} hold no tokens; `python -m scripts.latents tokens` makes them")
    tokens, labels, mask = map(torch.cat, zip(*rows))
    return tokens, torch.where(mask, labels, 0.0), mask
