"""Reading and writing weights: the published files of Wan2.2, UMT5, Qwen3-VL and Motus, and our own
checkpoints.

    python -m backbones.weights inspect PATH         what a file is: kind, stage, parts, counts, dtypes
    python -m backbones.weights convert SRC DST      official folder or .pt to one safetensors file
    python -m backbones.weights export SRC DST       our weights to the official Motus layout
    python -m backbones.weights download NAME        from the hub, resumable; sizes and licences are printed first
    python -m backbones.weights tables [NAME]        the tensors that each published file must hold

Three promises. (1) Accounting: every tensor a module wants is loaded exactly once, every tensor of
a file is used or knowingly dropped; anything else is one ValueError that lists the first ten and
the count. The official loader swallows such errors and goes on with random values. (2) Memory: a
tensor goes from the mapped file to its place in the module, cast on the way, and its pages are
given back, so the peak above the module itself is one tensor. (3) Hostile files: what a file claims
is checked against its size before anything is allocated; pickles may name tensors and plain
containers only, and are read with `weights_only=True`.

Official Motus files list every tensor up to three times, because wrapper modules refer to the same
experts again; the copies are compared with the original and dropped. The fixed table
`pos_embedding` is dropped too: it is a function of its shape.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from weights.files import (
    CASTABLE,
    TensorSource,
    open_source,
    read_metadata,
    refuse,
    save_safetensors,
)
from weights.layouts import alias_of

# -- loading --------------------------------------------------------------------------------------


def _advise(tensor: Tensor, advice: str) -> None:
    """Tell the kernel how the pages under a tensor will be used: WILLNEED, DONTNEED (mapped files
    only: it forgets them), RANDOM (nothing around them is wanted) or HUGEPAGE."""
    if (
        not tensor.is_contiguous() and tensor.stride(-1) == 1
    ):  # a part along an inner axis is many runs
        for run in tensor:
            _advise(run, advice)
        return
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
    if end > start and hasattr(mmap, f"MADV_{advice}"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, f"MADV_{advice}")
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes (NaN equals NaN)."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def _plan(
    source: TensorSource, rename: Callable[[str], str | None]
) -> tuple[dict[str, str], list[str]]:
    """(our name -> name in the file, names knowingly dropped). Second names must equal the tensor
    they repeat."""
    plan, dropped, problems = {}, [], []
    for name in source.names():
        key, original = rename(name), alias_of(name)
        if key is None:
            dropped.append(name)
            if original and original not in source.tensors:
                problems.append(f"{name}: the tensor it repeats, {original}, is not in the file")
            elif original and not _same(source.read(name), source.read(original)):
                problems.append(f"{name}: differs from {original}, of which it should be a copy")
        elif key in plan:
            problems.append(f"{name} and {plan[key]} are both {key}")
        else:
            plan[key] = name
    refuse(source.path, "tensors that contradict each other", problems)
    return plan, dropped


@dataclass(frozen=True)
class Report:
    """What a load did; `fresh` and `dropped` are names, `ignored` names of the file that the caller
    asked not to load."""

    path: Path
    loaded: int
    nbytes: int
    seconds: float
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.path.name}: loaded {self.loaded} tensors, {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s; "
            f"{len(self.fresh)} start fresh, {len(self.dropped)} second names or tables dropped, {len(self.ignored)} left out"
        )


def held(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What this process holds of a tensor that may be sharded over ranks (a DTensor, cut along one
    axis in equal parts of which the last may be short or empty): its values, the axis, and where
    they begin there."""
    if not hasattr(tensor, "device_mesh"):
        return tensor, 0, 0
    mesh, cuts = (
        tensor.device_mesh,
        [
            (i, placement.dim)
            for i, placement in enumerate(tensor.placements)
            if placement.is_shard()
        ],
    )
    for i, axis in cuts:  # at most one: replicas are placed on the other axis of the mesh
        return (
            tensor.to_local(),
            axis,
            min(
                mesh.get_coordinate()[i] * -(-tensor.shape[axis] // mesh.size(i)),
                tensor.shape[axis],
            ),
        )
    return tensor.to_local(), 0, 0


def part(tensor: Tensor, value: Tensor) -> Tensor:
    """Of `value`, the whole of what `tensor` is to be, a view of what this process holds; nothing
    is read."""
    values, axis, start = held(tensor)
    return value.narrow(axis, start, values.shape[axis]) if values.dim() else value


def place(tensor: Tensor, value: Tensor) -> None:
    """Copy into `tensor` what this process holds of `value`, the whole of it."""
    held(tensor)[0].copy_(part(tensor, value))


def parts(source: TensorSource, wanted: Sequence[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """For each (name in the file, tensor it is for) what this process holds of it, one after
    another: fetched from disk while the one before is in use, its pages given back afterwards. Of a
    tensor that is sharded, nothing but the part is fetched; the kernel would read megabytes around
    it."""
    views, mapped = [], lambda tensor: tensor.untyped_storage().data_ptr() in source.mapped
    for name, tensor in wanted:
        views.append(part(tensor, source.read(name)))
        if views[-1].numel() < source.read(name).numel() and mapped(views[-1]):
            _advise(source.read(name), "RANDOM")
    with ThreadPoolExecutor(1) as ahead:
        fetch = lambda few: [
            ahead.submit(_advise, view, "WILLNEED") for view in few if mapped(view)
        ]
        coming = fetch(views[:1])
        for i, view in enumerate(views):
            wait(coming)
            coming = fetch(views[i + 1 : i + 2])
            yield view
            if mapped(view):
                _advise(view, "DONTNEED")


@torch.no_grad()
def load_into(
    module: nn.Module,
    source: TensorSource,
    rename: Callable[[str], str | None] = str,
    dtype: torch.dtype | None = None,
    ignore: Iterable[str] = (),
    fresh: Iterable[str] = (),
    device: str = "cpu",
) -> Report:
    """Fill every parameter and saved buffer of `module` from `source`, one tensor at a time,
    replacing meta tensors by real ones. Of a tensor that is sharded over ranks, each fetches and
    reads its own part; `nbytes` of the report counts that.

    rename  name in the file -> name in the module, or None: knowingly dropped
    dtype   replaces the module's floating dtypes; None keeps each as it is
    ignore  prefixes, in the module's names, of tensors in the file that are not to be loaded
    fresh   prefixes of module tensors that the file may lack; they keep their initial values and must not be on meta
    device  where meta tensors come to life Raises one ValueError for all missing, unexpected and
    misfitting tensors, before anything is loaded.
    """
    begun = time.perf_counter()
    ignore, fresh = tuple(ignore), tuple(fresh)
    wanted = module.state_dict(keep_vars=True)
    plan, dropped = _plan(source, rename)
    ignored = [plan.pop(key) for key in list(plan) if key.startswith(ignore)]
    kept = [key for key in wanted if key not in plan and key.startswith(fresh)]
    problems = [
        f"missing: {key} {tuple(wanted[key].shape)}"
        for key in wanted
        if key not in plan and key not in kept
    ]
    problems += [
        f"unexpected: {name} {source.shape(name)}"
        for key, name in plan.items()
        if key not in wanted
    ]
    for key, name in plan.items():
        want, found = wanted.get(key), source.read(name)
        if want is not None and want.shape != found.shape:
            problems.append(
                f"shape: {key} is {tuple(found.shape)} in the file, {tuple(want.shape)} in the module"
            )
        elif (
            want is not None
            and want.dtype != found.dtype
            and not {want.dtype, found.dtype} <= CASTABLE
        ):
            problems.append(
                f"dtype: {key} is {found.dtype} in the file, {want.dtype} in the module"
            )
    problems += [
        f"not initialised: {key} starts fresh but is on meta" for key in kept if wanted[key].is_meta
    ]
    problems += [
        f"not initialised: buffer {key} is on meta and in no file; build it on a real device"
        for key, buffer in module.named_buffers()
        if buffer.is_meta and key not in wanted
    ]
    refuse(source.path, f"does not fit {type(module).__name__}", problems)

    nbytes = 0
    for key, view in zip(plan, parts(source, [(name, wanted[key]) for key, name in plan.items()])):
        old, nbytes = wanted[key], nbytes + view.nbytes
        kind = dtype if dtype and old.dtype in CASTABLE else old.dtype
        new = old
        if old.is_meta or old.dtype != kind:
            new = torch.empty(view.shape, dtype=kind, device=device if old.is_meta else old.device)
            if new.device.type == "cpu":
                _advise(
                    new, "HUGEPAGE"
                )  # fresh memory costs more time than the file when it comes in small pages
        held(new)[0].copy_(view)  # casts on the way: no second copy
        if new is not old:
            owner, _, leaf = key.rpartition(".")
            new = (
                nn.Parameter(new, requires_grad=old.requires_grad)
                if isinstance(old, nn.Parameter)
                else new
            )
            setattr(module.get_submodule(owner), leaf, new)
    return Report(
        source.path,
        len(plan),
        nbytes,
        time.perf_counter() - begun,
        tuple(kept),
        tuple(dropped),
        tuple(ignored),
    )


def load_part(path: Path, module: type[nn.Module], config: type) -> nn.Module:
    """Builds a network from its own file: config from the metadata, weights with every key
    accounted for."""
    metadata = read_metadata(path)
    if "config" not in metadata:
        raise ValueError(
            f"{path} has no 'config' in its metadata; it must be written by motus.save_part"
        )
    with torch.device("meta"):
        part = module(
            config(
                **{
                    k: tuple(v) if isinstance(v, list) else v
                    for k, v in json.loads(metadata["config"]).items()
                }
            )
        )
    with open_source(path) as source:
        load_into(part, source)
    return part


def save_part(path: Path, part: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Writes a network with its config; atomic."""
    tensors = {
        k: v.to(dtype) if dtype and v.is_floating_point() else v
        for k, v in part.state_dict().items()
    }
    save_safetensors(path, tensors, {"config": json.dumps(asdict(part.config))})
