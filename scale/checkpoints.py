"""Checkpoints that all ranks write together, and how a run goes on from one.

    Saver         writes run/step_NNNNNN in parallel, in a thread, atomically
    RunState      all that a run is made of: its files, and the way back from them
    fill          tensors from a file, read by any number of ranks

A slice of an axis is a few runs of bytes of a safetensors file, so every rank writes its own runs
into the same files: nothing is gathered, and the result is what one process would have written,
byte for byte. It is at once the sharded checkpoint, the consolidated export, and readable by any
number of ranks. The folder must lie on a file system that all ranks share.

Torch's own distributed checkpoint (DCP) was measured against this (docs/scale.md): without pickle
it leaves a safetensors file per rank, or writes everything again to consolidate them; training
waits longer for either.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from motus import Motus
from scale import lora
from scale.ranks import Ranks
from weights.card import Card, steps_of
from weights.files import TensorSource, digest, open_source, refuse, safetensors_header
from weights.load import load_into, local_shard, read_shards

ROOMS = ("backbones", "formats", "kernels", "scale", "scripts", "weights", "worlds")

# -- writing --------------------------------------------------------------------------------------


class ShardCopy(NamedTuple):
    """A copy of what a rank holds of a tensor, the axis along which it is cut and where it begins
    there."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole tensor
    values: Tensor | None  # on the CPU; None where another rank writes it
    axis: int
    start: int

    @classmethod
    def of(cls, tensor: Tensor, rank: int, before: Tensor | None) -> "ShardCopy":
        """Into the memory of the copy `before`, if there was one. From a GPU it is pinned, and
        nobody waits until the values are there."""
        values, axis, start = local_shard(tensor)
        writes = rank == 0
        if isinstance(tensor, DTensor):  # the first of the replicas writes
            placed = zip(tensor.device_mesh.get_coordinate(), tensor.placements)
            writes = all(i == 0 for i, placement in placed if not placement.is_shard())
        copy = None
        if writes and values.numel():
            copy = before
            if copy is None:
                copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            copy.copy_(values.detach(), non_blocking=True)
        return cls(tensor.dtype, tuple(tensor.shape), copy, axis, start)

    def runs(self, begin: int) -> Iterator[tuple[int, Any]]:
        """(offset, bytes) of the tensor's runs in a file where the whole tensor begins at byte
        `begin`."""
        if self.values is None:
            return
        before = math.prod(self.shape[: self.axis])
        row = math.prod(self.shape[self.axis + 1 :]) * self.dtype.itemsize
        whole = self.shape[self.axis] if self.shape else 0
        for i, run in enumerate(self.values.reshape(before, -1).view(torch.uint8)):
            yield begin + (i * whole + self.start) * row, run.numpy()


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


Files = Mapping[str, Mapping[str, ShardCopy]]  # what a rank writes, by file and name of tensor


class Saver:
    """Writes checkpoints run/step_NNNNNN in a thread, from copies that are made meanwhile on a
    stream of their own; what changes the tensors afterwards first calls `settle`. All ranks write
    into a folder with a temporary name; when all have flushed what they wrote, rank 0 renames it. A
    failure on any rank leaves earlier checkpoints as they were."""

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.run = run
        self.ranks = ranks
        self.keep = keep
        self.stream = torch.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self.copies: dict[str, dict[str, ShardCopy]] = {}  # of the last one, whose memory is kept
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]
    ) -> None:
        """Begins to write step `step`: safetensors files by name, of tensors or functions that make
        one, and small text files. Waits for the one before."""
        self.wait()
        if self.stream is not None:
            self.stream.wait_stream(torch.accelerator.current_stream())
        with self.stream or nullcontext():
            for file, named in tensors.items():
                copies = self.copies.setdefault(file, {})
                for name, tensor in named.items():
                    before = copies[name].values if name in copies else None
                    tensor = tensor() if callable(tensor) else tensor
                    copies[name] = ShardCopy.of(tensor, self.ranks.rank, before)
        self.pending = self.thread.submit(self._write, f"step_{step:06d}", self.copies, texts)

    def settle(self, *_) -> None:
        """Lets what is launched on the device from now on wait for the copies; the host goes on."""
        if self.stream is not None:
            torch.accelerator.current_stream().wait_stream(self.stream)

    def wait(self) -> None:
        """Until the last one is complete. ValueError on every rank if any could not write."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        done = self.pending is not None and self.pending.done()
        return done and self.pending.exception() is not None

    def _write(self, name: str, files: Files, texts: Mapping[str, str]) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        temporary = self.run / f".{name}.tmp"
        headers = {
            file: safetensors_header({name: copy[:2] for name, copy in named.items()})
            for file, named in files.items()
        }

        def begin() -> None:
            """Files of full length, without values."""
            for left in self.run.glob(".step_*"):  # by a process that was killed
                shutil.rmtree(left)
            temporary.mkdir()
            for file, (raw, _, size) in headers.items():
                with (temporary / file).open("wb") as out:
                    out.write(raw)
                    out.truncate(size)
            for file, text in texts.items():
                (temporary / file).write_text(text)
                sync(temporary / file)

        def fill_in() -> None:
            for file, (_, begins, _) in headers.items():
                # Not to be read: NFS would read whole pages and write back those of others too.
                with os.fdopen(os.open(temporary / file, os.O_WRONLY), "wb") as out:
                    for name, copy in files[file].items():
                        for offset, run in copy.runs(begins[name]):
                            out.seek(offset)
                            out.write(run)
                    out.flush()
                    os.fsync(out.fileno())

        try:
            self._by_first(begin)
            self.ranks.together(fill_in, self.ranks.writing)
            self._by_first(lambda: self._publish(temporary, self.run / name))
        except (ValueError, OSError) as error:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise ValueError(
                f"checkpoint {self.run / name} could not be written: {error}; free space or name "
                "another --out. Earlier checkpoints are intact"
            ) from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self.wait()

    def _by_first(self, work: Callable[[], None]) -> None:
        """Rank 0 works, all know how it ended."""
        self.ranks.together(lambda: None if self.ranks.rank else work(), self.ranks.writing)

    def _retire(self, folder: Path) -> None:
        os.replace(folder, self.run / f".{folder.name}.old")

    def _publish(self, temporary: Path, final: Path) -> None:
        """The final name, then older checkpoints away: renamed first, so that there never is half a
        folder with a final name."""
        sync(temporary)
        if final.exists():  # the same step of the same run, saved before
            self._retire(final)
        os.replace(temporary, final)
        sync(self.run)
        for folder in steps_of(self.run)[: -self.keep] if self.keep else ():
            self._retire(folder)
        for folder in self.run.glob(".step_*.old"):
            shutil.rmtree(folder)


# -- reading --------------------------------------------------------------------------------------


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: TensorSource, spare: Collection[str] = ()) -> None:
    """Copies what this rank holds of every tensor from a file that must have exactly these, in
    these shapes and dtypes, and may have `spare` ones."""
    known = {*tensors, *spare}
    problems = [f"missing: {name}" for name in tensors if name not in source.tensors]
    problems += [f"unexpected: {name}" for name in source.names() if name not in known]
    for name in tensors.keys() & source.tensors.keys():
        found = source.dtype(name), source.shape(name)
        expected = tensors[name].dtype, tuple(tensors[name].shape)
        if found != expected:
            problems.append(f"{name} is {found} in the file, {expected} here")
    refuse(source.path, "does not fit this run", problems)
    for tensor, values in zip(tensors.values(), read_shards(source, list(tensors.items()))):
        local_shard(tensor)[0].copy_(values)


# -- a run ----------------------------------------------------------------------------------------


def claim(run: Path, resume: str | None, make: bool = True) -> None:
    """The run's folder: new for a new run, existing for a resumed one; `make` it, or only look."""
    exists = run.exists() and any(run.glob("[!.]*"))
    if exists and not resume:
        raise ValueError(
            f"run folder {run} exists; continue it with --resume, or name another with --out"
        )
    if resume and not exists:
        raise ValueError(f"--resume: run folder {run} does not exist; start it without --resume")
    if make:
        run.mkdir(parents=True, exist_ok=True)


@dataclass
class RunState:
    """All that a run is made of. Order and noise are functions of (seed, step), so there is no
    random state."""

    model: Motus
    ema: dict[str, Tensor]
    optimizers: Sequence[Optimizer]
    card: Card
    settings: dict
    about: dict[str, str]  # digests of "code" and "data"

    def moments(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Every trained parameter with what its optimizer keeps of it, which may be filled; in the
        order that numbers them in checkpoints."""
        found = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                found += [(p, optimizer.state[p]) for p in group["params"]]
        return found

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{number}.{key}": torch.as_tensor(value)
            for number, (_, state) in enumerate(self.moments())
            for key, value in state.items()
        }

    def save(self, saver: Saver, step: int) -> None:
        """Begins to write run/step_NNNNNN."""
        network, average, apart = lora.split(self.model, self.ema)
        tensors = {
            "model.safetensors": network,
            "ema.safetensors": average,
            "optimizer.safetensors": self.optimizer_tensors(),
        }
        tensors |= {lora.FILE: apart} if apart else {}
        texts = {
            "config.json": replace(self.card, step=step).as_json(),
            "settings.json": json.dumps(self.settings | self.about, indent=1),
        }
        saver.save(step, tensors, texts)

    def resume(self, folder: Path, free: Collection[str], anyway: bool = False) -> int:
        """Fills model, EMA and optimizers from a checkpoint of the same run, whatever number of
        ranks wrote it; returns the number of steps done. Other settings than the `free` ones or
        other data are refused; other code too, unless it is to go on `anyway`."""
        stored = Card.read(folder / "config.json")
        self.check(folder, stored, free, anyway)
        network, _, apart = lora.split(self.model, self.ema)
        with open_source(folder / "model.safetensors") as source:
            load_into(self.model, source, fresh=apart)
        with open_source(folder / "ema.safetensors") as source:
            kept = {name: x for name, x in self.ema.items() if name not in apart}
            fill(kept, source, network)
        if apart:
            with open_source(folder / lora.FILE) as source:
                fill(apart, source)
        with open_source(folder / "optimizer.safetensors") as source:
            moments = self.moments()
            for name in source.names():
                number, key = name.split(".")
                parameter, state = moments[int(number)]
                state[key] = torch.zeros_like(parameter)
                if not source.shape(name):
                    state[key] = torch.zeros((), device=parameter.device)
            fill(self.optimizer_tensors(), source)
        return stored.step

    def check(self, folder: Path, stored: Card, free: Collection[str], anyway: bool) -> None:
        """ValueError if a checkpoint is of another run."""
        before = json.loads((folder / "settings.json").read_text())
        ours = self.settings | self.about
        remedies = {"data": "resume with the same data"}
        remedies["code"] = (
            "check out the code it began with, or continue with --resume-anyway, perhaps not bit "
            "for bit"
        )
        if ours["horizon"] or ours["schedule"] == "constant":  # rates do not hang on the steps
            free = [*free, "steps"]
        rows = [(key, before.get(key, ours[key]), ours[key]) for key in ours if key not in free]
        for key in ("motus", "stage", "preset", "statistics", "latent_interval"):
            rows.append((key, getattr(stored, key), getattr(self.card, key)))
            remedies[key] = "resume with what it was started with, or start another run"
        for key, theirs, here in rows:
            if theirs != here and not (key == "code" and anyway):
                remedy = remedies.get(key, f"resume with --set {key}={theirs}")
                raise ValueError(
                    f"{folder} was trained with {key}={theirs}, this run has {key}={here}; {remedy}"
                )


@cache
def code_digest() -> str:
    """Sixteen hexadecimal digits that change with any source file of ours; what else lies in the
    folder, an environment or runs, is not read."""
    root = Path(__file__).parents[1]
    paths = sorted(path for room in ("", *ROOMS) for path in (root / room).glob("*.py"))
    return digest({}, *(str(path.relative_to(root)) + path.read_text() for path in paths))
