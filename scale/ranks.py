"""The processes of a run: how they start, how they agree, and what ends a run that stalls.

    launch      the ranks that torchrun started, or one process, which talks to nobody
    Ranks       what one refuses, all refuse by name, at once; facts that must be the same; sums
    Watchdog    a rank that stalls ends all of them, saying which one it was and what it did

Ranks talk over gloo on the CPU, as bytes: nothing is unpickled, and no GPU waits for it.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from weights.options import Refusal, device_of_rank, environment

T = TypeVar("T")


@dataclass
class Ranks:
    """The processes of this run and this one's place among them. All methods are called by every
    rank, in the same order."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None  # ("shard",) or ("replicate", "shard"); None: all hold all
    control: dist.ProcessGroup | None = None  # gloo, for the step
    writing: dist.ProcessGroup | None = None  # gloo, for the thread that writes checkpoints
    patient: dist.ProcessGroup | None = None  # gloo, for work that takes one of them hours

    def exchange(self, said: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
        """The bytes of every rank, in their order: first how many there are, then they."""
        if self.world == 1:
            return [said]
        group = group or self.control
        heard = torch.empty(self.world, 1, dtype=torch.int64)
        dist.all_gather(list(heard), torch.tensor([len(said)]), group=group)
        lengths = heard.flatten().tolist()
        longest = max(1, *lengths)
        padded = torch.frombuffer(bytearray(said.ljust(longest, b"\0")), dtype=torch.uint8)
        heard = torch.empty(self.world, longest, dtype=torch.uint8)
        dist.all_gather(list(heard), padded, group=group)
        return [row[:length].numpy().tobytes() for row, length in zip(heard, lengths)]

    def texts(self, text: str, group: dist.ProcessGroup | None = None) -> list[str]:
        return [said.decode() for said in self.exchange(text.encode(), group)]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The named tensors of every rank, on the CPU, as the bytes of a safetensors file."""
        sent = safetensors.torch.save(dict(tensors))
        return [safetensors.torch.load(said) for said in self.exchange(sent)]

    def together(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """The result of `work`, which must not communicate. An error of the user, the data or the
        disk on any rank is raised on every one, as one ValueError."""
        result = None
        problem = ""
        try:
            result = work()
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise
            problem = str(error) or repr(error)
        problems = {i: text for i, text in enumerate(self.texts(problem, group)) if text}
        if problems:
            first, text = next(iter(problems.items()))
            alone = len(problems) < self.world
            raise Refusal(f"rank {first} of {self.world}: {text}" if alone else text)
        return result

    def same(self, **facts: str) -> None:
        """ValueError on every rank if any fact differs between ranks."""
        first, *others = [json.loads(text) for text in self.texts(json.dumps(facts))]
        for rank, theirs in enumerate(others, 1):
            for name, ours in first.items():
                if theirs[name] != ours:
                    raise Refusal(
                        f"ranks differ in {name}: rank 0 has {ours}, rank {rank} has "
                        f"{theirs[name]}; start every rank with the same command, from the same "
                        "checkout and the same files"
                    )

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()


# -- starting -------------------------------------------------------------------------------------


@contextmanager
def launch(shards: int = 0, timeout: float = 1800) -> Iterator[Ranks]:
    """The ranks that torchrun started; one without it. `shards` ranks share one copy of the
    weights, each such group holds a replica; 0 means all ranks of a node, whose links are fast. A
    rank that does not answer for `timeout` seconds is an error."""
    rank = environment("RANK", 0)
    world = environment("WORLD_SIZE", 1)
    device = torch.device(device_of_rank())
    cuda = device.type == "cuda"
    if world == 1:
        yield Ranks(device=device)
        return
    if cuda:
        check_gpus()
    patience = timedelta(seconds=1.2 * timeout + 10)  # the watchdog speaks first, and knows more
    try:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=patience, device_id=device if cuda else None)
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"rank {rank} of {world} met no others at {address}: {str(error).splitlines()[0]}; "
            f"start all {world} ranks, with torchrun"
        ) from error
    try:
        waits = (None, None, timedelta(days=30))  # of control, writing and patient
        groups = [dist.new_group(backend="gloo", timeout=wait) for wait in waits]
        ranks = Ranks(rank, world, device, None, *groups)
        shards = shards or environment("LOCAL_WORLD_SIZE", world)
        ranks.same(shards=str(shards))
        if world % shards:
            allowed = [str(n) for n in range(1, world + 1) if world % n == 0]
            raise Refusal(
                f"{world} ranks cannot form groups of shards={shards}; expected one of "
                f"{', '.join(allowed)}"
            )
        if cuda:
            torch.cuda.set_device(device)
        mesh = {"replicate": world // shards} if shards < world else {}
        mesh["shard"] = shards
        if shards > 1:
            shape = tuple(mesh.values())
            ranks.mesh = init_device_mesh(device.type, shape, mesh_dim_names=tuple(mesh))
        yield ranks
    finally:
        dist.destroy_process_group()


def check_gpus() -> None:
    """ValueError, on all ranks of a node, if not each has a GPU of its own."""
    gpus = torch.cuda.device_count()
    local = environment("LOCAL_WORLD_SIZE", 1)
    if local > gpus:
        raise ValueError(
            f"{local} ranks on this machine have {gpus} GPUs; start torchrun with "
            f"--nproc-per-node {gpus}"
        )


# -- ending ---------------------------------------------------------------------------------------


class Watchdog:
    """Around the steps of a run. `stopped` is True after a SIGTERM. A process that does not `beat`
    for `timeout` seconds ends, naming the rank that is behind all others and what it was doing:
    every rank tells the store of torchrun how far it is; a stopped process cannot, but its last
    word stays there."""

    beats = itertools.count(1)  # over all stages of a process, so that ranks can be compared

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks = ranks
        self.timeout = timeout
        self.stopped = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.beat("starting")

    def __enter__(self) -> "Watchdog":
        self.previous = signal.signal(signal.SIGTERM, self._stop)
        if self.ranks.world > 1:
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread.ident:
            self.thread.join(10)  # its store must be closed before the process ends
        signal.signal(signal.SIGTERM, self.previous)

    def _stop(self, *_) -> None:
        self.stopped = True

    def beat(self, doing: str) -> None:
        self.count = next(self.beats)
        self.doing = doing
        self.since = time.monotonic()

    def _watch(self) -> None:
        try:
            self._compare()
        except dist.DistError:  # the store is gone, with the rank or the launcher that kept it
            if not self.ended.wait(10):
                self._end(
                    f"rank {self.ranks.rank} ({self.doing}) is left alone, the others have ended; "
                    "continue with --resume"
                )

    def _compare(self) -> None:
        address = os.environ["MASTER_ADDR"]
        port = environment("MASTER_PORT", 0)
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        key = f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{{}}".format
        while not self.ended.wait(min(2.0, self.timeout / 4)):
            store.set(key(self.ranks.rank), json.dumps([self.count, self.doing]))
            waited = time.monotonic() - self.since
            if waited <= self.timeout:
                continue
            said = {i: (0, "starting") for i in range(self.ranks.world)}
            said |= {i: json.loads(store.get(key(i))) for i in said if store.check([key(i)])}
            least = min(count for count, _ in said.values())
            behind = [f"rank {i} ({doing})" for i, (count, doing) in said.items() if count == least]
            self._end(
                f"no progress for {waited:.0f} s (--set timeout={self.timeout:g}): waiting for "
                f"{', '.join(behind[:8])}; this run ends here, continue it with --resume"
            )

    def _end(self, why: str) -> None:
        print(f"error: {why}", file=sys.stderr, flush=True)
        os._exit(3)
