"""Filling modules and shards with the tensors of a file, and writing single networks.

Three promises. (1) Accounting: every tensor a module wants is loaded exactly once, every tensor of
a file is used or knowingly dropped; anything else is one ValueError that lists the first ten and
the count. The official loader swallows such errors and goes on with random values. (2) Memory: a
tensor goes from the mapped file to its place in the module, cast on the way, and its pages are
given back, so the peak above the module itself is one tensor. (3) Ranks: of a tensor that is
sharded over ranks each fetches its own part and no more.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from weights.files import (
    TensorSource,
    as_tuples,
    open_source,
    raw_bytes,
    refuse,
    save_safetensors,
)
from weights.layouts import alias_of

# -- loading --------------------------------------------------------------------------------------


def advise(tensor: Tensor, advice: str) -> None:
    """Tells the kernel how the pages under a tensor will be used: WILLNEED, DONTNEED (mapped files
    only: it forgets them), RANDOM (nothing around them is wanted) or HUGEPAGE."""
    if not tensor.is_contiguous() and tensor.stride(-1) == 1:  # a part along an inner axis
        for run in tensor:
            advise(run, advice)
        return
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
    code = getattr(mmap, f"MADV_{advice}", None)
    if end > start and code is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), code)


def same_bytes(source: TensorSource, *names: str) -> bool:
    """Whether two tensors of a file are there and the same bytes (NaN equals NaN)."""
    a, b = (source.tensors.get(name) for name in names)
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(raw_bytes(a), raw_bytes(b))


def plan_names(source: TensorSource, rename: Callable[[str], str | None]) -> dict[str, str]:
    """Our name -> name in the file. Second names are dropped; they must equal the tensor they
    repeat."""
    plan = {}
    problems = []
    for name in source.names():
        key = rename(name)
        original = alias_of(name)
        if key in plan:
            problems.append(f"{name} and {plan[key]} are both {key}")
        elif key is not None:
            plan[key] = name
        elif original and not same_bytes(source, name, original):
            problems.append(f"{name}: differs from {original}, or that is not in the file")
    refuse(source.path, "tensors that contradict each other", problems)
    return plan


def local_shard(tensor: Tensor) -> tuple[Tensor, int, int]:
    """The part that this process holds of a tensor that may be sharded over ranks (a DTensor, cut
    along one axis in equal parts of which the last may be short or empty): its values, the axis,
    and where they begin there."""
    if not hasattr(tensor, "device_mesh"):
        return tensor, 0, 0
    mesh = tensor.device_mesh
    for i, placement in enumerate(tensor.placements):
        if placement.is_shard():  # at most one: replicas are on the other axis of the mesh
            axis = placement.dim
            size = tensor.shape[axis]
            start = mesh.get_coordinate()[i] * -(-size // mesh.size(i))
            return tensor.to_local(), axis, min(start, size)
    return tensor.to_local(), 0, 0


def shard_of(tensor: Tensor, value: Tensor) -> Tensor:
    """The view of `value`, the whole of a tensor, that this process holds of `tensor`; nothing is
    read."""
    values, axis, start = local_shard(tensor)
    return value.narrow(axis, start, values.shape[axis]) if values.dim() else value


def copy_shard(tensor: Tensor, value: Tensor) -> None:
    """Copies the part of `value`, the whole, that this process holds into `tensor`."""
    local_shard(tensor)[0].copy_(shard_of(tensor, value))


def read_shards(source: TensorSource, wanted: Sequence[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """For each (name in the file, tensor it is for) the part that this process holds, one after
    another: fetched from disk while the one before is in use, its pages given back afterwards. Of a
    tensor that is sharded, nothing but the part is fetched; the kernel would read megabytes around
    it."""
    views = []
    for name, tensor in wanted:
        whole = source.read(name)
        views.append(shard_of(tensor, whole))
        if views[-1].numel() < whole.numel():
            advise(whole, "RANDOM")
    for i, view in enumerate(views):
        for coming in views[i : i + 2]:
            advise(coming, "WILLNEED")
        yield view
        if view.untyped_storage().data_ptr() in source.mapped:
            advise(view, "DONTNEED")


def misfits(
    wanted: Mapping[str, Tensor],
    source: TensorSource,
    plan: Mapping[str, str],
    fresh: tuple[str, ...],
) -> Iterator[str]:
    """Everything that keeps the planned tensors from filling the wanted ones: missing, unexpected,
    of another shape or kind, or never initialised."""
    for key, tensor in wanted.items():
        if key not in plan and not key.startswith(fresh):
            yield f"missing: {key} {tuple(tensor.shape)}"
        elif key not in plan and tensor.is_meta:
            yield f"not initialised: {key} starts fresh but is on meta"
    for key, name in plan.items():
        found = source.read(name)
        want = wanted.get(key)
        if want is None:
            yield f"unexpected: {name} {tuple(found.shape)}"
        elif want.shape != found.shape:
            shapes = f"{tuple(found.shape)} in the file, {tuple(want.shape)} in the module"
            yield f"shape: {key} is {shapes}"
        elif want.dtype != found.dtype and not (
            want.is_floating_point() and found.is_floating_point()
        ):
            yield f"dtype: {key} is {found.dtype} in the file, {want.dtype} in the module"


@torch.no_grad()
def load_into(
    module: nn.Module,
    source: TensorSource,
    rename: Callable[[str], str | None] = str,
    dtype: torch.dtype | None = None,
    ignore: Iterable[str] = (),
    fresh: Iterable[str] = (),
    device: str = "cpu",
) -> None:
    """Fills every parameter and saved buffer of `module` from `source`, one tensor at a time,
    replacing meta tensors by real ones. Of a tensor that is sharded over ranks, each fetches and
    reads its own part.

    rename  name in the file -> name in the module, or None: knowingly dropped
    dtype   replaces the module's floating dtypes; None keeps each as it is
    ignore  prefixes, in the module's names, of tensors in the file that are not to be loaded
    fresh   prefixes of module tensors that the file may lack; they keep their values (not on meta)
    device  where meta tensors come to life

    Raises one ValueError for all missing, unexpected and misfitting tensors, before any is loaded.
    """
    wanted = module.state_dict(keep_vars=True)
    plan = plan_names(source, rename)
    plan = {key: name for key, name in plan.items() if not key.startswith(tuple(ignore))}
    problems = list(misfits(wanted, source, plan, tuple(fresh)))
    for key, buffer in module.named_buffers():
        if buffer.is_meta and key not in wanted:
            reason = "is on meta and in no file; build it on a real device"
            problems.append(f"not initialised: buffer {key} {reason}")
    refuse(source.path, f"does not fit {type(module).__name__}", problems)

    pairs = [(name, wanted[key]) for key, name in plan.items()]
    for key, view in zip(plan, read_shards(source, pairs)):
        old = wanted[key]
        kind = dtype if dtype and old.is_floating_point() else old.dtype
        if not old.is_meta and old.dtype == kind:
            local_shard(old)[0].copy_(view)
            continue
        new = torch.empty(view.shape, dtype=kind, device=device if old.is_meta else old.device)
        if new.device.type == "cpu":
            advise(new, "HUGEPAGE")  # fresh memory in small pages costs more time than the file
        new.copy_(view)  # casts on the way: no second copy
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new)


def load_part(path: Path, module: type[nn.Module], config: type) -> nn.Module:
    """Builds a network from its own file: config from the metadata, weights with every key
    accounted for."""
    with open_source(path) as source:
        if "config" not in source.metadata:
            raise ValueError(
                f"{path} has no 'config' in its metadata; expected a file of `save_part`"
            )
        sizes = as_tuples(json.loads(source.metadata["config"]))
        with torch.device("meta"):
            network = module(config(**sizes))
        load_into(network, source)
    return network


def save_part(path: Path, network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Writes a network with its config, floating weights as `dtype` if given; atomic."""
    tensors = network.state_dict()
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value.to(dtype)  # of None: as it is
    save_safetensors(path, tensors, {"config": json.dumps(asdict(network.config))})
