"""The batches of a rank: a function of (seed, step), for any number of ranks and workers.

`settings` have batch, micro, seed, steps, times, given and workers, as those of train.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import flow
from data import Pool, Stream
from formats.windows import rows_to_encode
from motus import Inputs
from scale.checkpoints import code_digest
from scale.ranks import Ranks

Source = Pool | Stream


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


def encode_once(stream: Stream, settings, ranks: Ranks, folder: Path) -> Pool:
    """The windows of `settings` encoded, each rank its share on its own device. They are kept in
    `folder` under a digest of all that they are made of, for any other run of the same data."""
    rows = rows_to_encode(stream.pyramid, settings.windows, settings.seed)
    about = settings.precision, code_digest()
    key = ranks.together(lambda: "" if ranks.rank else stream.key(rows, *about))
    kept = folder / ranks.texts(key)[0]
    if not ranks.rank:
        print(f"windows: {len(rows)}, encoded once and kept in {kept} for any run of this data")
    how = ranks.device, settings.precision, ranks.rank, ranks.world
    ranks.together(lambda: stream.write(kept, rows, *how), ranks.patient)
    return ranks.together(lambda: Pool(kept, stream.preset_name, stream.stage))


def draw_noise(
    inputs: Inputs, generator: torch.Generator, times: str = "official", given: float = 0.0
) -> dict[str, Tensor]:
    """Training times and noise for inputs, the arguments of `Motus.loss`. They are drawn on the
    CPU, in this order: video time, action time, what is given, video noise, action noise. In a
    share `given` of the samples one modality is given (`flow.pin_modality`)."""
    size = len(inputs)
    t_video = flow.TIMES[times](size, generator)
    t_action = None if inputs.actions is None else flow.TIMES[times](size, generator)
    if given and t_action is not None:
        t_video, t_action = flow.pin_modality(t_video, t_action, given, generator)
    drawn = {"t_video": t_video}
    drawn["video_noise"] = torch.randn(inputs.latents.shape, generator=generator)
    if t_action is not None:
        drawn["t_action"] = t_action
        drawn["action_noise"] = torch.randn(inputs.actions.shape, generator=generator)
    return {name: value.to(inputs.latents.device) for name, value in drawn.items()}


class Batches(Dataset):
    """By number of a step: what a source prepares for this rank, times and noise for it, and how
    many samples have which loss. The noise of a sample is a function of (seed, step, sample), so a
    rank draws its own alone, and it is the same for any number of ranks."""

    def __init__(self, source: Source, settings, ranks: Ranks):
        self.source = source
        self.settings = settings
        self.rank = ranks.rank
        self.world = ranks.world

    def __getitem__(self, step: int) -> tuple[dict, dict[str, Tensor], tuple[float, float]]:
        settings = self.settings
        share = settings.batch // self.world
        first = self.rank * share
        rows = self.source.rows(settings.batch, settings.seed, step)
        prepared = self.source.prepare(rows[first : first + share])
        one = Inputs(torch.empty(1, *self.source.latents), None, None)
        if prepared.get("actions") is not None:
            one.actions = prepared["actions"][:1]
        noise = []
        for sample in range(first, first + share):
            state = np.random.SeedSequence([settings.seed, step, sample]).generate_state(1)
            generator = torch.Generator().manual_seed(int(state[0]))
            noise.append(draw_noise(one, generator, settings.times, settings.given))
        noise = {name: torch.cat([drawn[name] for drawn in noise]) for name in noise[0]}
        return prepared, noise, counts(prepared, noise)


def counts(prepared: dict, noise: dict[str, Tensor]) -> tuple[float, float]:
    """Samples of a batch that have a video loss, and an action loss."""
    videos = (noise["t_video"] > 0).sum().item()
    if "t_action" not in noise:
        return videos, 0
    acting = noise["t_action"] > 0
    if prepared.get("action_mask") is not None:
        acting &= prepared["action_mask"].flatten(1).any(dim=1)
    return videos, acting.sum().item()


def batches(
    source: Source, settings, ranks: Ranks, start: int
) -> Iterator[tuple[Inputs, dict[str, Tensor], tuple[float, float]]]:
    """The batches from step `start` on, on the device of the rank, prepared ahead by `workers`
    processes."""
    loader = DataLoader(
        Batches(source, settings, ranks),
        batch_size=None,
        sampler=range(start, settings.steps),
        num_workers=settings.workers,
        pin_memory=ranks.device.type == "cuda",
    )
    for prepared, noise, have in loader:
        noise = {name: x.to(ranks.device, non_blocking=True) for name, x in noise.items()}
        yield source.inputs(prepared, ranks.device), noise, have
