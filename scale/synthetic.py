"""Random windows of the right shapes: the first run on a machine needs no data, no backbones."""

import torch
from torch import Tensor

from data import Pool
from motus import STAGES, preset
from scale.plan import example

SYNTHETIC = "synthetic"  # as --data


class Synthetic(Pool):
    """A million windows of a preset, of no robot; each is a function of its number."""

    windows = [10**6]
    weights = [1.0]
    robots = ()
    made_by = {}

    def __init__(self, preset_name: str, stage: str):
        self.config = preset(preset_name, stage)
        self.interval = self.config.ratio if STAGES[stage].actions == "latent" else None
        self.shapes = example(preset_name, stage)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(row)
        window = self.shapes.map(lambda x: torch.randn(x.shape, generator=generator))
        window.context_len = self.shapes.context_len
        return {name: x for name, x in vars(window).items() if x is not None}
