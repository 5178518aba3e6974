"""Encoded windows on disk: one file, or the shards of a folder, which any number of processes fill.

    FILE.safetensors                    all windows of a small set
    FOLDER/windows_000000.safetensors   SHARD of them, then the next SHARD, ...

A file holds a batch, by the names of `motus.Inputs`; its metadata say what all windows are. Text
states are there once for each instruction of a file; `text` says which of them are a window's.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from formats.cards import Pyramid, shares
from formats.statistics import Statistics
from weights.files import digest, open_source, save_safetensors

SHARD = 256
CHUNK = 32  # windows that are encoded at a time; divides SHARD
OPEN = 256  # files that a process has mapped at a time
ABOUT = "encoded windows"  # key of a file's metadata

Batch = Mapping[str, Tensor]
# Chunks of rows -> of each the batch, on the CPU, and its instructions.
Encode = Callable[[list[Tensor]], Iterable[tuple[Batch, list[str]]]]


def stack(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Joins batches; text and understanding are as long as the longest that is no padding."""
    joined = {}
    for name in batches[0]:
        rows = [row for batch in batches for row in batch[name]]
        joined[name] = pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)
    longest = {"context": joined["context_len"].max()}
    if "und_mask" in joined:
        longest["und"] = longest["und_mask"] = joined["und_mask"].sum(1).max()
    return joined | {name: joined[name][:, :length] for name, length in longest.items()}


# -- writing --------------------------------------------------------------------------------------


def rows_to_encode(pyramid: Pyramid, count: int, seed: int) -> Tensor:
    """(n, 4) source, episode, first row, variant, in rising order: `count` different windows as
    they are drawn, fewer where there are not so many; with 0 all there are."""
    if count:
        drawn = pyramid.draw(4 * count, seed, 0).numpy()  # some twice: each is taken once
        _, index = np.unique(drawn, axis=0, return_index=True)
        return torch.from_numpy(np.unique(drawn[np.sort(index)[:count]], axis=0))
    found = []
    for i, o in enumerate(pyramid.opened):
        if o.source.draw == "tasks":
            raise ValueError(
                f"source {o.source.path} is drawn by tasks: say how many windows to encode by "
                '--windows N, or choose "draw": "windows"'
            )
        first = np.concatenate([np.arange(count) for count in o.counts])
        episode = np.repeat(np.arange(o.trained), o.counts)
        columns = np.broadcast_arrays(i, episode[:, None], first[:, None], range(o.variants))
        found.append(np.dstack(columns).reshape(-1, 4))
    return torch.from_numpy(np.concatenate(found))


def files_of(pyramid: Pyramid) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of the datasets and of their latent actions."""
    folders = [getattr(o.reader, "root", o.folder) for o in pyramid.opened]
    folders += [o.folder for o in pyramid.opened]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def write(
    out: Path, rows: Tensor, about: dict, encode: Encode, rank: int = 0, world: int = 1
) -> None:
    """Encodes the windows of `rows` into a file, or this rank's shards that are not yet in a
    folder; at most one shard and its batches are in memory. ValueError if another cache was begun
    there."""
    single = out.suffix == ".safetensors"
    about = about | {"shard": len(rows) if single else SHARD}
    metadata = {ABOUT: json.dumps(about)}
    parts = {}
    for number, part in list(enumerate(rows.split(about["shard"])))[rank::world]:
        path = out if single else out / f"windows_{number:06d}.safetensors"
        if single or not path.exists():
            parts[path] = part.split(CHUNK)
        elif open_source(path).metadata != metadata:
            raise ValueError(
                f"{path} is of another cache: {open_source(path).metadata.get(ABOUT)}, now it is "
                f"to be {metadata[ABOUT]}; name another folder, or delete this one"
            )
    encoded = iter(encode([chunk for chunks in parts.values() for chunk in chunks]))
    for path, chunks in parts.items():
        save(path, metadata, *zip(*itertools.islice(encoded, len(chunks))))


def save(
    path: Path, metadata: dict[str, str], batches: Sequence[Batch], words: Sequence[list[str]]
) -> None:
    """Writes a shard. What it is put together from is let go of before the next is encoded."""
    batch = stack(batches)
    texts = sum(words, [])
    states = list(dict.fromkeys(texts))
    batch["context"] = batch["context"][[texts.index(text) for text in states]]
    batch["text"] = torch.tensor([states.index(text) for text in texts])
    save_safetensors(path, batch, metadata)


# -- reading --------------------------------------------------------------------------------------


@lru_cache(OPEN)
def opened(path: Path, changed: int) -> dict[str, Tensor]:
    """The tensors of a file, mapped, as it is since the time `changed`."""
    return open_source(path).tensors


class Windows:
    """The windows that `write` wrote, mapped from disk when they are asked for, and batches of
    them. ValueError for what is no cache, or not yet a whole one.

    windows    how many there are of each source, in their order; `shard` of them lie in a file
    sources    name, level and robot of each; weights, by which they are mixed
    robots     their statistics
    interval   action steps that one latent action spans, or None
    widths     fields of the network's config
    made_by    digests of the networks that encoded them"""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files = sorted(self.path.glob("windows_*.safetensors")) or [self.path]
        about = json.loads(open_source(self.files[0]).metadata.get(ABOUT, "{}"))
        if not about:
            raise ValueError(f"{path} is no cache of windows: `python data.py cache` makes one")
        vars(self).update(about)
        self.robots = tuple(map(Statistics.from_json, self.robots))
        wanted = -(-len(self) // self.shard)
        if len(self.files) != wanted:
            raise ValueError(
                f"{path} has {len(self.files)} of {wanted} shards; run the command that began it "
                "again: it goes on where it was"
            )

    def __len__(self) -> int:
        return sum(self.windows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The window of a row, as a batch of one."""
        number, at = divmod(row, self.shard)
        file = self.files[number]
        tensors = opened(file, file.stat().st_mtime_ns)
        window = {name: x[at : at + 1] for name, x in tensors.items() if name != "context"}
        return window | {"context": tensors["context"][window.pop("text")]}

    @property
    def latents(self) -> torch.Size:
        """C T h w of a window."""
        return self[0]["latents"].shape[1:]

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """The windows of batch `step`: sources by weight, windows uniform within a source."""
        rng = np.random.default_rng([seed, step])
        counts = np.array(self.windows)
        first = counts.cumsum() - counts
        present = np.flatnonzero(counts)
        chosen = present[shares(np.array(self.weights)[present], size, rng)]
        return torch.tensor([first[i] + rng.integers(counts[i]) for i in chosen])

    def prepare(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields of the `motus.Inputs` of some rows; latents are fp32."""
        batch = stack([self[row] for row in rows.tolist()])
        return batch | {"latents": batch["latents"].float()}

    def digest(self) -> str:
        """Changes with the sources of the windows, how they are mixed, and what 16 of them hold."""
        some = self.prepare(torch.arange(len(self))[:: -(-len(self) // 16)])
        return digest(some, json.dumps([self.windows, self.weights]))

    def mix(self, pyramid: Pyramid) -> None:
        """Takes the weights of a card for its sources, which are encoded already."""
        if self.sources != named_sources(pyramid):
            raise ValueError(
                f"card {pyramid.name} mixes {named_sources(pyramid)}, the cache holds windows of "
                f"{self.sources}; expected other weights of the same sources, or a new cache"
            )
        self.weights = pyramid.weights.tolist()


def named_sources(pyramid: Pyramid) -> list[list]:
    """Which datasets these are, in their order, whatever their weights."""
    return [[o.name, o.source.level, o.source.embodiment, o.source.shift] for o in pyramid.opened]
