"""Encoded windows on disk: one file, or the shards of a folder, which any number of processes fill.

    FILE.safetensors                    all windows of a small set
    FOLDER/windows_000000.safetensors   SHARD of them, then the next SHARD, ...

The metadata of each file say what all windows are. Of a tensor, the rows of window i lie from
NAME_at[i] to NAME_at[i + 1]. Text states are there once for each instruction of a file; `text`
says which of them are a window's.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from formats.cards import Pyramid, shares
from formats.statistics import Statistics
from weights.files import digest, open_source, read_metadata, save_safetensors

SHARD = 256
CHUNK = 32  # windows that are encoded at a time; divides SHARD
ABOUT = "encoded windows"  # key of a file's metadata

Window = Mapping[str, Tensor]
# Chunks of rows -> the windows and instructions of each, in order.
Encode = Callable[[list[Tensor]], Iterable[tuple[list[Window], list[str]]]]

# -- one window and many --------------------------------------------------------------------------


def apart(batch: Mapping[str, Tensor | None]) -> list[Window]:
    """The windows of a batch (the fields of `motus.Inputs`), each without padding, on the CPU."""
    held = {name: x.cpu() for name, x in batch.items() if x is not None}
    lengths = {"context": held.pop("context_len")}
    if "und" in held:
        lengths["und"] = held.pop("und_mask").sum(1)
    windows = [dict(zip(held, rows)) for rows in zip(*held.values())]
    for name, rows in lengths.items():
        for window, length in zip(windows, rows.tolist()):
            window[name] = window[name][:length]
    return windows


def joined(windows: Sequence[Window]) -> dict[str, Tensor]:
    """The batch of windows that `apart` gave, padded to the longest; latents are fp32."""
    columns = {name: [window[name] for window in windows] for name in windows[0]}
    batch = {name: pad_sequence(rows, batch_first=True) for name, rows in columns.items()}
    batch["latents"] = batch["latents"].float()
    batch["context_len"] = torch.tensor([*map(len, columns["context"])])
    if "und" in batch:
        lengths = torch.tensor([*map(len, columns["und"])])
        batch["und_mask"] = torch.arange(batch["und"].shape[1]) < lengths[:, None]
    return batch


# -- writing --------------------------------------------------------------------------------------


def rows_to_encode(pyramid: Pyramid, count: int, seed: int) -> Tensor:
    """(n, 3) source, episode, first row, in rising order: `count` different windows as they are
    drawn, fewer where there are not so many; with 0 all there are."""
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
        found.append(np.stack([np.full_like(first, i), episode, first], axis=1))
    return torch.from_numpy(np.concatenate(found))


def files_of(pyramid: Pyramid) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of the datasets and of their latent actions."""
    folders = [getattr(o.reader, "root", o.folder) for o in pyramid.opened]
    folders += [o.folder for o in pyramid.opened]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def pack(windows: Sequence[Window], texts: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a file, from its windows and the instruction of each."""
    columns = {name: [window[name] for window in windows] for name in windows[0]}
    states = dict(zip(texts, columns["context"]))
    columns["context"] = list(states.values())
    place = {text: i for i, text in enumerate(states)}
    packed = {"text": torch.tensor([place[text] for text in texts])}
    for name, rows in columns.items():
        packed[name] = torch.cat(rows)
        packed[f"{name}_at"] = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return packed


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"windows_{number:06d}.safetensors"


def missing(path: Path, about: dict) -> bool:
    """Whether a shard has yet to be written. ValueError if other windows were begun in its
    folder."""
    if not path.exists():
        return True
    found = json.loads(read_metadata(path).get(ABOUT, "{}"))
    for key, wanted in about.items():
        if found.get(key) != wanted:
            raise ValueError(
                f"{path} was made with {key} {str(found.get(key))[:200]}, now it is "
                f"{str(wanted)[:200]}; name another folder, or delete this one"
            )
    return False


def write(
    out: Path, rows: Tensor, about: dict, encode: Encode, rank: int = 0, world: int = 1
) -> None:
    """Encodes the windows of `rows` into a file, or this rank's shards that are not yet in a
    folder; at most a shard of them is in memory."""
    single = out.suffix == ".safetensors"
    about = about | {"shard": len(rows) if single else SHARD}
    parts = {shard_file(out, n): part for n, part in enumerate(rows.split(about["shard"]))}
    todo = [path for path in list(parts)[rank::world] if missing(path, about)]
    if single:
        todo, parts = [out], {out: rows}
    encoded = iter(encode([chunk for path in todo for chunk in parts[path].split(CHUNK)]))
    for path in todo:
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
            left.unlink()
        windows, texts = [], []
        for _ in parts[path].split(CHUNK):
            more, words = next(encoded)
            windows += more
            texts += words
        save_safetensors(path, pack(windows, texts), {ABOUT: json.dumps(about)})


# -- reading --------------------------------------------------------------------------------------


class Windows:
    """The windows that `write` wrote, mapped from disk when they are asked for, and batches of
    them. ValueError for what is no cache, or not yet a whole one."""

    OPEN = 256  # files that are mapped at a time

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = sorted(self.path.glob("windows_*.safetensors")) or [self.path]
        about = json.loads(read_metadata(files[0]).get(ABOUT, "{}"))
        if not about:
            raise ValueError(f"{path} is no cache of windows: `python data.py cache` makes one")
        self.counts = np.array(about["windows"])  # of each source, in their order
        self.shard = about["shard"]  # windows in a file
        self.sources = about["sources"]  # name, level and robot of each
        self.weights = about["weights"]  # by which they are mixed
        self.interval = about["interval"]  # action steps that one latent action spans, or None
        self.widths = about["widths"]  # fields of the network's config
        self.made_by = about["made_by"]
        self.robots = tuple(map(Statistics.from_json, about["robots"]))
        self.files = files
        self.opened: dict[int, dict[str, Tensor]] = {}
        wanted = -(-len(self) // self.shard)
        if len(files) != wanted:
            raise ValueError(
                f"{path} has {len(files)} of {wanted} shards; run the command that began it "
                "again: it goes on where it was"
            )

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, row: int) -> Window:
        """The tensors of a window by name, as views of its file."""
        number, at = divmod(row, self.shard)
        if number not in self.opened:
            if len(self.opened) == self.OPEN:
                self.opened.pop(next(iter(self.opened)))
            self.opened[number] = open_source(self.files[number]).tensors
        tensors = self.opened[number]
        window = {}
        for name in tensors:
            if f"{name}_at" in tensors:
                index = int(tensors["text"][at]) if name == "context" else at
                first, end = tensors[f"{name}_at"][index : index + 2].tolist()
                window[name] = tensors[name][first:end]
        return window

    @property
    def latents(self) -> tuple[int, ...]:
        """C T h w of a window."""
        return tuple(self[0]["latents"].shape)

    def rows(self, size: int, seed: int, step: int) -> Tensor:
        """The windows of batch `step`: sources by weight, windows uniform within a source."""
        rng = np.random.default_rng([seed, step])
        first = self.counts.cumsum() - self.counts
        present = np.flatnonzero(self.counts)
        chosen = present[shares(np.array(self.weights)[present], size, rng)]
        return torch.tensor([first[i] + rng.integers(self.counts[i]) for i in chosen])

    def prepare(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields of the `motus.Inputs` of some rows."""
        return joined([self[row] for row in rows.tolist()])

    def digest(self) -> str:
        """Changes with the sources of the windows, how they are mixed, and what 16 of them hold."""
        some = self.prepare(torch.arange(len(self))[:: -(-len(self) // 16)])
        return digest(some, json.dumps([self.counts.tolist(), self.weights]))

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
    return [[o.name, o.source.level, o.source.embodiment] for o in pyramid.opened]
