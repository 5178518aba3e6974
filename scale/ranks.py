"""Ranks."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")

# -- ranks ----------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """The processes of this run and this one's place among them. All methods are called by every
    rank, in the same order."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None  # ("shard",) or ("replicate", "shard"); None: one process
    control: Any = (
        None  # gloo groups of all ranks: for the step, and for the thread that writes checkpoints
    )
    writing: Any = None

    def exchange(self, said: bytes, group: Any = None) -> list[bytes]:
        """What every rank says, in their order: first how long it is, then the bytes."""
        if self.world == 1:
            return [said]
        heard = torch.empty(self.world, 1, dtype=torch.int64)
        dist.all_gather(list(heard), torch.tensor([len(said)]), group=group or self.control)
        lengths = heard.flatten().tolist()
        heard = torch.empty(self.world, max(1, *lengths), dtype=torch.uint8)
        padded = torch.frombuffer(bytearray(said.ljust(heard.shape[1], b"\0")), dtype=torch.uint8)
        dist.all_gather(list(heard), padded, group=group or self.control)
        return [row[:length].numpy().tobytes() for row, length in zip(heard, lengths)]

    def texts(self, text: str, group: Any = None) -> list[str]:
        return [said.decode() for said in self.exchange(text.encode(), group)]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The named tensors of every rank, on the CPU. They travel as the bytes of a safetensors
        file: nothing is unpickled."""
        return [
            safetensors.torch.load(said)
            for said in self.exchange(safetensors.torch.save(dict(tensors)))
        ]

    def together(self, work: Callable[[], T], group: Any = None) -> T:
        """The result of `work`, which must not communicate. What it refuses on any rank is raised
        on every one, as one ValueError."""
        result, problem = None, ""
        try:
            result = work()
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise
            problem = str(error) or repr(error)
        problems = {i: text for i, text in enumerate(self.texts(problem, group)) if text}
        if problems:
            first, text = next(iter(problems.items()))
            raise ValueError(
                text if len(problems) == self.world else f"rank {first} of {self.world}: {text}"
            )
        return result

    def same(self, **facts: str) -> None:
        """ValueError on every rank if any fact differs between ranks."""
        said = [json.loads(text) for text in self.texts(json.dumps(facts))]
        for name, ours in said[0].items():
            if other := next((i for i, theirs in enumerate(said) if theirs[name] != ours), None):
                raise ValueError(
                    f"ranks differ in {name}: rank 0 has {ours}, rank {other} has {said[other][name]}; start every rank with "
                    "the same command, from the same checkout and the same files"
                )

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()


@contextmanager
def launch(shards: int = 0, timeout: float = 1800) -> Iterator[Ranks]:
    """The ranks that torchrun started; one without it. `shards` ranks share one copy of the
    weights, each such group holds a replica; 0 means all ranks of a node, whose links are fast. A
    rank that does not answer for `timeout` seconds is an error."""
    number = lambda name, default: int(os.environ.get(name, default))
    rank, world, local = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if world == 1:
        yield Ranks(device=device)
        return
    patience = timedelta(seconds=1.2 * timeout + 10)  # the watchdog speaks first, and knows more
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience
        )
    except dist.DistError as error:
        raise ValueError(
            f"rank {rank} of {world} met no others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
            f"{str(error).splitlines()[0]}; start all {world} ranks, with torchrun"
        ) from error
    try:
        ranks = Ranks(
            rank,
            world,
            device,
            control=dist.new_group(backend="gloo"),
            writing=dist.new_group(backend="gloo"),
        )

        def check() -> None:
            if device.type == "cuda" and local >= torch.cuda.device_count():
                raise ValueError(
                    f"local rank {local} has no GPU of its own, there are {torch.cuda.device_count()}; "
                    f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
                )
            if world % size:
                raise ValueError(
                    f"{world} ranks cannot form groups of shards={size}; "
                    f"allowed: {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
                )

        size = shards or number("LOCAL_WORLD_SIZE", world)
        ranks.same(shards=str(size))
        ranks.together(check)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        shape, names = (
            ((world,), ("shard",))
            if size == world
            else ((world // size, size), ("replicate", "shard"))
        )
        ranks.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        yield ranks
    finally:
        dist.destroy_process_group()


class Watchdog:
    """Ends this process when it does not `beat` for `timeout` seconds, naming the rank that is
    behind all others and what it was doing. Every rank tells the store of torchrun how far it is; a
    stopped process cannot, but its last word stays there."""

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.timeout, self.count, self.doing, self.ended = (
            ranks,
            timeout,
            0,
            "starting",
            threading.Event(),
        )
        self.since = time.monotonic()
        if ranks.world > 1:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def beat(self, doing: str) -> None:
        self.count, self.doing, self.since = self.count + 1, doing, time.monotonic()

    def stop(self) -> None:
        self.ended.set()

    def _watch(self) -> None:
        try:
            self._compare()
        except dist.DistError:  # the store is gone, with the rank or the launcher that kept it
            if self.ended.wait(10):
                return
            print(
                f"error: rank {self.ranks.rank} ({self.doing}) is left alone, the others have ended; continue with --resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(3)

    def _compare(self) -> None:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout),
        )
        key = f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{{}}".format
        while not self.ended.wait(min(2.0, self.timeout / 4)):
            store.set(key(self.ranks.rank), json.dumps([self.count, self.doing]))
            if (waited := time.monotonic() - self.since) > self.timeout:
                far = {
                    i: json.loads(store.get(key(i))) if store.check([key(i)]) else [0, "starting"]
                    for i in range(self.ranks.world)
                }
                behind = [i for i in far if far[i][0] == min(count for count, _ in far.values())]
                names = ", ".join(f"rank {i} ({far[i][1]})" for i in behind[:8])
                print(
                    f"error: no progress for {waited:.0f} s (--set timeout={self.timeout:g}): waiting for {names}; "
                    "this run ends here, continue it with --resume",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(3)


def code_digest() -> str:
    """Sixteen hexadecimal digits that change with any source file of the repository's root, its
    backbones and formats."""
    root, state = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if {"tests", "docs", "runs", ".venv"} & set(path.relative_to(root).parts):
            continue
        state.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return state.hexdigest()[:16]
