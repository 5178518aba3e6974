"""The batches of a rank: a function of (seed, step), for any number of ranks and workers.

`settings` have batch, micro, seed, steps, times, given and workers, as those of train.py.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import flow
from data import Pool, Stream
from motus import Inputs
from scale.ranks import Ranks


def divide(settings, world: int) -> None:
    """ValueError if a batch does not fall into equal parts."""
    share = settings.batch // world
    micro = settings.micro or share
    if settings.batch % world or share % micro:
        raise ValueError(
            f"batch={settings.batch} does not divide into equal parts for {world} ranks, "
            f"micro={micro} samples at a time; set batch to a multiple of "
            f"{world * (settings.micro or 1)}"
        )


def draw_noise(
    inputs: Inputs,
    generator: torch.Generator,
    times: str = "official",
    given: float = 0.0,
    size: int | None = None,
    first: int = 0,
) -> dict[str, Tensor]:
    """Training times and noise, the arguments of `Motus.loss`. They are drawn on the CPU for a
    whole batch of `size` (default: these inputs), of which `inputs` are the rows from `first` on;
    order: video time, action time, what is given, video noise, action noise. In a share `given` of
    the samples one modality is given (`flow.pin_modality`)."""
    size = len(inputs) if size is None else size
    t_video = flow.TIMES[times](size, generator)
    t_action = None if inputs.actions is None else flow.TIMES[times](size, generator)
    if given and t_action is not None:
        t_video, t_action = flow.pin_modality(t_video, t_action, given, generator)
    shape = inputs.latents.shape[1:]
    drawn = {"t_video": t_video, "video_noise": torch.randn(size, *shape, generator=generator)}
    if t_action is not None:
        shape = inputs.actions.shape[1:]
        drawn["t_action"] = t_action
        drawn["action_noise"] = torch.randn(size, *shape, generator=generator)
    ours = slice(first, first + len(inputs))
    device = inputs.latents.device
    return {name: value[ours].to(device) for name, value in drawn.items()}


class Batches(Dataset):
    """By number of a step: windows of a source for this rank, times and noise for them, and how
    many have which loss. Noise is drawn for the whole batch, so that it is the same for any number
    of ranks."""

    def __init__(self, source: Pool | Stream, settings, ranks: Ranks):
        self.source = source
        self.settings = settings
        self.rank = ranks.rank
        self.world = ranks.world

    def __getitem__(self, step: int) -> tuple[dict, dict[str, Tensor], tuple[float, float]]:
        settings = self.settings
        inputs = self.source.batch(settings.batch, settings.seed, step, self.rank, self.world)
        state = np.random.SeedSequence([settings.seed, step, 1]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        noise = draw_noise(
            inputs,
            generator,
            settings.times,
            settings.given,
            settings.batch,
            first=self.rank * len(inputs),
        )
        return vars(inputs), noise, counts(inputs, noise)


def counts(inputs: Inputs, noise: dict[str, Tensor]) -> tuple[float, float]:
    """Samples of a batch that have a video loss, and an action loss."""
    videos = (noise["t_video"] > 0).sum().item()
    if inputs.actions is None:
        return videos, 0
    acting = noise["t_action"] > 0
    if inputs.action_mask is not None:
        acting &= inputs.action_mask.flatten(1).any(dim=1)
    return videos, acting.sum().item()


def batches(
    source: Pool | Stream, settings, ranks: Ranks, start: int
) -> Iterator[tuple[Inputs, dict[str, Tensor], tuple[float, float]]]:
    """The batches from step `start` on, on the device of the rank, prepared ahead by `workers`
    processes (those of a stream by its own threads)."""
    loader = DataLoader(
        Batches(source, settings, ranks),
        batch_size=None,
        sampler=range(start, settings.steps),
        collate_fn=lambda x: x,
        num_workers=0 if isinstance(source, Stream) else settings.workers,
        pin_memory=ranks.device.type == "cuda",
    )
    for inputs, noise, have in loader:
        noise = {name: x.to(ranks.device, non_blocking=True) for name, x in noise.items()}
        yield Inputs(**inputs).to(ranks.device), noise, have
