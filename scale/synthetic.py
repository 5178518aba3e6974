"""Random windows of the right shapes: the first run on a machine needs no data, no backbones."""

import numpy as np
import torch
from torch import Tensor

from data import Pool
from formats.statistics import Normaliser, Statistics
from motus import STAGES, preset
from scale.plan import example

SYNTHETIC = "synthetic"  # as --data


class Synthetic(Pool):
    """A million windows of a preset, each a function of its number; their robot's numbers are as
    they are."""

    def __init__(self, preset_name: str, stage: str):
        self.config = preset(preset_name, stage)
        inputs = example(preset_name, stage)
        self.shapes = {name: x.shape[1:] for name, x in vars(inputs).items() if x is not None}
        self.shapes.pop("context_len")
        self.counts = np.array([10**6])
        self.weights = [1.0]
        self.interval = self.config.ratio if STAGES[stage].actions == "latent" else None
        self.made_by = {}
        self.robots = ()
        if self.config.finetune:
            numbers = []
            for size in (self.config.action_dim, self.config.state_dim):
                numbers.append(Normaliser((0.0,) * size, (1.0,) * size))
            self.robots = (Statistics(SYNTHETIC, self.config.ratio, *numbers),)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(row)
        return {
            name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()
        }
