"""Processes of tests/test_scale.py that write checkpoints: until they are killed, on a disk that is
full, in parts.

They are forked by a server that imports this file once and has no second thread; pytest, which has
computed with torch, must not fork."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scale import checkpoints, ranks
from weights.files import open_source, save_safetensors


def state(step: int, mesh: DeviceMesh | None, rows: int = 512) -> dict[str, dict[str, Tensor]]:
    """Files whose every number is `step`: sharded evenly, unevenly, along axis 1, not at all."""

    def tensor(*shape: int, axis: int = 0) -> Tensor:
        value = torch.full(shape, float(step))
        if mesh is None:
            return value
        size, rank = mesh.size(), mesh.get_local_rank()
        chunk = -(-shape[axis] // size)
        part = value.narrow(
            axis, min(rank * chunk, shape[axis]), max(0, min(chunk, shape[axis] - rank * chunk))
        )
        return DTensor.from_local(
            part.contiguous(),
            mesh,
            [Shard(axis)],
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )

    tensors = {
        "even": tensor(rows, 64),
        "uneven": tensor(7, 3),
        "short": tensor(1, 4),
        "across": tensor(3, 64, 5, axis=1),
        "whole": torch.tensor(float(step)),
    }
    return {"model.safetensors": tensors, "ema.safetensors": tensors}


def config(step: int) -> dict[str, str]:
    return {"config.json": json.dumps({"step": step})}


def meet(rank: int, world: int, store: Path) -> ranks.Ranks:
    if world == 1:
        return ranks.Ranks()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    return ranks.Ranks(
        rank, world, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    )


def save_forever(rank: int, world: int, store: Path, run: Path, first: int) -> None:
    """Writes checkpoints first, first + 1, ... until it is killed."""
    ranks = meet(rank, world, store)
    saver = checkpoints.Saver(run, ranks, keep=2)
    for step in range(first, first + 100_000):
        saver.save(step, state(step, ranks.mesh), config(step))


def tell(rank: int, world: int, store: Path, work: Callable[..., str], *args) -> None:
    """Leaves beside the store what `work` returns, or the error in which it ends."""
    ranks = meet(rank, world, store)
    try:
        said = work(ranks, *args)
    except ValueError as error:
        said = str(error)
    Path(f"{store}.{rank}").write_text(said)


def save_once(ranks: ranks.Ranks, run: Path, step: int, rows: int) -> str:
    saver = checkpoints.Saver(run, ranks, keep=2)
    saver.save(step, state(step, ranks.mesh, rows), config(step))
    saver.wait()
    return "saved"


def copy(ranks: ranks.Ranks, source: Path, run: Path) -> str:
    """Reads a file in parts and writes it in parts."""
    tensors = state(0, ranks.mesh)["model.safetensors"]
    with open_source(source) as file:
        checkpoints.fill(tensors, file)
    saver = checkpoints.Saver(run, ranks, keep=2)
    saver.save(1, {"model.safetensors": tensors}, {})
    saver.wait()
    return "copied"


def save_numbered(path: Path) -> Path:
    """A file with the tensors of `state`, every number of which differs."""
    tensors = state(0, None)["model.safetensors"]
    save_safetensors(
        path,
        {
            name: torch.arange(value.numel(), dtype=torch.float32).reshape(value.shape)
            for name, value in tensors.items()
        },
    )
    return path


def gather(ranks: ranks.Ranks) -> str:
    """What two ranks give each other: tensors of unequal size and number, one rank none at all; a
    text of any length."""
    found = ranks.gather(
        {
            str(i): torch.full((1000 * ranks.rank, 3), i, dtype=torch.float64)
            for i in range(2 * ranks.rank)
        }
    )
    for rank, tensors in enumerate(found):
        assert {
            name: (tuple(x.shape), set(x.flatten().tolist())) for name, x in tensors.items()
        } == {str(i): ((1000 * rank, 3), {float(i)}) for i in range(2 * rank)}
    assert ranks.texts("é" * 10_000 * ranks.rank) == [
        "é" * 10_000 * rank for rank in range(ranks.world)
    ]
    return "gathered"
