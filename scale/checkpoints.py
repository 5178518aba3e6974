"""Checkpoints."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scale.ranks import Ranks
from weights.files import TensorSource, refuse, safetensors_header
from weights.load import held, parts

# -- checkpoints ----------------------------------------------------------------------------------


class Part(NamedTuple):
    """What a rank holds of a tensor: a copy of its values, the axis along which it is cut and where
    it begins there."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole tensor
    values: Tensor | None  # on the CPU; None where another rank writes it
    axis: int
    start: int

    @classmethod
    def of(cls, tensor: Tensor, rank: int) -> "Part":
        values, axis, start = held(tensor)
        if isinstance(tensor, DTensor):  # the first of the replicas writes
            ours = all(
                i == 0
                for i, placement in zip(tensor.device_mesh.get_coordinate(), tensor.placements)
                if not placement.is_shard()
            )
        else:
            ours = rank == 0
        copy = (
            values.detach().to("cpu", copy=True).contiguous() if ours and values.numel() else None
        )
        return cls(tensor.dtype, tuple(tensor.shape), copy, axis, start)

    def runs(self, begin: int) -> Iterator[tuple[int, Any]]:
        """(offset, bytes) of the tensor's runs in a file where the whole tensor begins at byte
        `begin`."""
        before, row = (
            math.prod(self.shape[: self.axis]),
            math.prod(self.shape[self.axis + 1 :]) * self.dtype.itemsize,
        )
        for i, run in enumerate(self.values.reshape(before, -1).view(torch.uint8)):
            yield (
                begin + (i * self.shape[self.axis] + self.start if self.shape else 0) * row,
                run.numpy(),
            )


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Saver:
    """Writes checkpoints run/step_NNNNNN in a thread, from copies made at once. All ranks write
    into a folder with a temporary name; when all have flushed what they wrote, rank 0 renames it. A
    failure on any rank leaves earlier checkpoints as they were."""

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.run, self.ranks, self.keep = run, ranks, keep
        self.thread, self.pending = ThreadPoolExecutor(1, "checkpoint"), None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
    ) -> None:
        """Begins to write step `step`: safetensors files by name, and small text files. Waits for
        the one before."""
        self.wait()
        parts = {
            file: {name: Part.of(tensor, self.ranks.rank) for name, tensor in named.items()}
            for file, named in tensors.items()
        }
        self.pending: Future | None = self.thread.submit(self._write, step, parts, texts)

    def wait(self) -> None:
        """Until the last checkpoint is complete. ValueError on every rank if any could not write."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        return (
            self.pending is not None
            and self.pending.done()
            and self.pending.exception() is not None
        )

    def _write(
        self, step: int, parts: Mapping[str, Mapping[str, Part]], texts: Mapping[str, str]
    ) -> None:
        final, temporary = self.run / f"step_{step:06d}", self.run / f".step_{step:06d}.tmp"
        headers = {
            file: safetensors_header({name: part[:2] for name, part in named.items()})
            for file, named in parts.items()
        }

        def begin() -> None:
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
                with (temporary / file).open("r+b") as out:
                    for name, part in parts[file].items():
                        for offset, run in (
                            part.runs(begins[name]) if part.values is not None else ()
                        ):
                            out.seek(offset)
                            out.write(run)
                    out.flush()
                    os.fsync(out.fileno())

        def finish() -> None:
            sync(temporary)
            if final.exists():  # the same step of the same run, saved before
                os.replace(final, self.run / f".{final.name}.old")
            os.replace(temporary, final)
            sync(self.run)
            for old in (
                sorted(self.run.glob("step_" + "[0-9]" * 6))[: -self.keep] if self.keep else ()
            ):
                os.replace(
                    old, self.run / f".{old.name}.old"
                )  # never half a folder with a final name
            for old in self.run.glob(".step_*.old"):
                shutil.rmtree(old)

        alone = lambda work: work if self.ranks.rank == 0 else lambda: None
        try:
            for work in (alone(begin), fill_in, alone(finish)):
                self.ranks.together(work, self.ranks.writing)
        except (ValueError, OSError) as error:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise ValueError(
                f"checkpoint {final} could not be written: {error}; free space or name another --run. "
                "Earlier checkpoints are intact"
            ) from error


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: TensorSource) -> None:
    """Copies what this rank holds of every tensor from a file that must have exactly these, in
    these shapes and dtypes."""
    problems = [f"missing: {name}" for name in tensors if name not in source.tensors]
    problems += [f"unexpected: {name}" for name in source.names() if name not in tensors]
    for name in tensors.keys() & source.tensors.keys():
        found, wanted = (
            (source.dtype(name), source.shape(name)),
            (tensors[name].dtype, tuple(tensors[name].shape)),
        )
        problems += [f"{name} is {found} in the file, {wanted} here"] * (found != wanted)
    refuse(source.path, "does not fit this run", problems)
    for tensor, values in zip(tensors.values(), parts(source, list(tensors.items()))):
        held(tensor)[0].copy_(values)


# -- checkpoints ----------------------------------------------------------------------------------
