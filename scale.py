"""What turns the training of one process into that of a cluster: ranks, sharding, checkpoints that all ranks write together.

    launch        the ranks that torchrun started, and how they agree: what one refuses, all refuse by name, at once
    Watchdog      a rank that stalls ends all of them in a message that says which one it was and what it was doing
    parallelize   activation checkpointing, compilation, FSDP2 and precision around an unchanged model; without ranks, one process
    Saver, fill   checkpoints: written by all ranks in parallel, asynchronously and atomically; read by any number of ranks

Sharding. A layer of `Motus` (three blocks, gathered together because they meet in one attention) is a group, what lies outside the layers
is the root group. An expert that a stage does not train has groups of its own whose forward is never called: it is never gathered. The
frozen backbones are not part of the network; their outputs come from a cache. Each parameter is split along its first axis that the ranks
divide (the q, k, v of a small expert are (3, N, D, K), where axis 0 would leave most ranks empty), along axis 0 unevenly if there is none.

Precision "bf16" is autocast around fp32 weights rather than a cast of what FSDP gathers: time paths, norms, modulation, residual streams
and the video head stay exactly as in fp32, on one process as on many. Gathers are fp32; on NVLink they hide behind the computation.

Checkpoints. A slice of an axis is a few runs of bytes of a safetensors file, so every rank writes its own runs into the same files: nothing
is gathered, and the result is what one process would have written, byte for byte. It is at once the sharded checkpoint, the consolidated
export, and readable by any number of ranks. Torch's own distributed checkpoint (DCP) pickles its metadata, and its safetensors writer
writes everything a second time to consolidate. The folder must lie on a file system that all ranks share.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from backbones.weights import TensorSource, held, parts, refuse, safetensors_header
from motus import Inputs, Losses, Motus

T = TypeVar("T")

# -- ranks ------------------------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """The processes of this run and this one's place among them. All methods are called by every rank, in the same order."""

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
        """The named tensors of every rank, on the CPU. They travel as the bytes of a safetensors file: nothing is unpickled."""
        return [
            safetensors.torch.load(said)
            for said in self.exchange(safetensors.torch.save(dict(tensors)))
        ]

    def together(self, work: Callable[[], T], group: Any = None) -> T:
        """The result of `work`, which must not communicate. What it refuses on any rank is raised on every one, as one ValueError."""
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
    """The ranks that torchrun started; one without it. `shards` ranks share one copy of the weights, each such group holds a replica;
    0 means all ranks of a node, whose links are fast. A rank that does not answer for `timeout` seconds is an error."""
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
    """Ends this process when it does not `beat` for `timeout` seconds, naming the rank that is behind all others and what it was doing.
    Every rank tells the store of torchrun how far it is; a stopped process cannot, but its last word stays there."""

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
    """Sixteen hexadecimal digits that change with any source file of the repository's root, its backbones and formats."""
    root, state = Path(__file__).parent, hashlib.sha256()
    for path in sorted(
        [*root.glob("*.py"), *root.glob("backbones/*.py"), *root.glob("formats/*.py")]
    ):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


# -- sharding ---------------------------------------------------------------------------------------------------------------


def kept(context: Any, op: Any, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing keeps what matrix products and attentions give, and computes all else (norms, modulation, GELU) again."""
    name = str(op)
    expensive = any(
        word in name
        for word in (
            "aten.mm",
            "aten.addmm",
            "aten.convolution",
            "scaled_dot_product",
            "motus.attention",
        )
    )
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


# Nothing in the network draws random numbers, so no random state is kept for the second forward pass.
CHECKPOINTING = {
    "none": {},
    "full": dict(preserve_rng_state=False),
    "selective": dict(
        preserve_rng_state=False, context_fn=partial(create_selective_checkpoint_contexts, kept)
    ),
}


class Step(nn.Module):
    """The training loss as one call of one module: what is sharded. It also makes the layers, which `Motus` keeps in a plain list, modules
    of the tree."""

    def __init__(self, model: Motus, precision: str):
        super().__init__()
        self.model, self.bf16 = model, precision == "bf16"
        self.layers = nn.ModuleList(model.layers)

    def forward(self, inputs: Inputs, noise: Mapping[str, Tensor]) -> Losses:
        # Without its cache, which would keep a copy in bf16 of every weight that was ever gathered.
        with torch.autocast(
            inputs.latents.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False
        ):
            return self.model.loss(inputs, **noise)


def split_axis(parameter: Tensor, parts: int) -> Shard:
    """The first axis that `parts` divides, else axis 0."""
    return Shard(next((axis for axis, size in enumerate(parameter.shape) if size % parts == 0), 0))


def parallelize(
    model: Motus,
    trained: tuple[str, ...],
    mesh: DeviceMesh | None = None,
    checkpointing: str = "none",
    compiled: bool = False,
    precision: str = "fp32",
    reshard: bool = True,
) -> Step:
    """The model, unchanged, made ready for many ranks: call the result instead of `model.loss`. Works on the meta device; without a mesh
    nothing is sharded. Experts that are not `trained` are frozen and stay sharded. `reshard` frees a layer's weights between forward and
    backward pass and gathers them again."""
    for expert in ("video", "action", "und"):
        getattr(model, expert).requires_grad_(expert in trained)
    for layer in model.layers:
        if checkpointing != "none":
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, **CHECKPOINTING[checkpointing]
            )
        if compiled:
            layer.forward = torch.compile(layer.forward, fullgraph=True)
    step = Step(model, precision)
    if mesh is not None:
        shard = partial(
            fully_shard,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            shard_placement_fn=partial(split_axis, parts=mesh["shard"].size()),
        )
        # Said of a layer that hands the understanding on as it came; nothing in the network works in place on what a layer returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        idle = [expert for expert in ("video", "action", "und") if expert not in trained]
        for layer in model.layers:
            for expert in idle:
                shard(getattr(layer, expert))
            shard(layer, reshard_after_forward=reshard)
        for expert in idle:
            shard(getattr(model, expert))
        shard(step, ignored_params={p for layer in model.layers for p in layer.parameters()})
    return step


def cost(model: Motus, inputs: Inputs) -> tuple[int, float]:
    """Tokens of a batch, and the floating-point operations of a training step on it: two for each weight that a token meets on the way
    forwards, those of the attentions, and twice as many backwards. What checkpointing computes again does not count."""
    video, layers = model.config.video, model.config.video.layers
    lv = math.prod(inputs.latents.shape[2:]) // math.prod(video.patch)
    la = (
        0
        if inputs.actions is None
        else model.config.chunk + (1 + model.config.registers) * model.config.finetune
    )
    lu = 0 if inputs.und is None else inputs.und.shape[1]
    lt = inputs.context.shape[1] + (
        inputs.context.shape[1] < video.text_len
    )  # and a row that stands for the padded ones
    size = lambda *modules: sum(
        m.weight.numel()
        for top in modules
        for m in top.modules()
        if isinstance(m, nn.Linear | nn.Conv3d)
    )
    wan, action, und, block = model.video, model.action, model.und, model.layers[0]
    read = size(block.video.cross_attn.k, block.video.cross_attn.v)
    weights = lv * (layers * (size(block.video) - read) + size(wan.patch_embedding, wan.head))
    weights += lt * (layers * read + size(wan.text_embedding)) + size(
        wan.time_embedding, wan.time_projection
    )
    weights += la * (
        layers * (size(block.action) + block.action.qkv.numel()) + size(action.decoder)
    )
    weights += (
        0
        if inputs.actions is None
        else inputs.actions.shape[1] * size(action.input_encoder.action_encoder)
    )
    weights += (la > 0) * size(action.time_embedding, action.time_projection)
    unread = (
        size(block.und.o, block.und.ffn) + block.und.qkv.numel() // 3
    )  # the last layer's understanding
    weights += lu * (
        layers * (size(block.und) + block.und.qkv.numel()) - unread + size(und.vlm_adapter)
    )
    weights += size(action.input_encoder.state_encoder) if inputs.state is not None else 0
    attention = (
        2 * video.width * ((layers * (lv + la + lu) - lu) * (lv + la + lu) + layers * lv * lt)
    )
    return len(inputs) * (lv + la + lu), 6.0 * len(inputs) * (weights + attention)


def whole(norm: Tensor) -> Tensor:
    """A norm over sharded gradients as an ordinary tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# -- checkpoints ------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What a rank holds of a tensor: a copy of its values, the axis along which it is cut and where it begins there."""

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
        """(offset, bytes) of the tensor's runs in a file where the whole tensor begins at byte `begin`."""
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
    """Writes checkpoints run/step_NNNNNN in a thread, from copies made at once. All ranks write into a folder with a temporary name; when
    all have flushed what they wrote, rank 0 renames it. A failure on any rank leaves earlier checkpoints as they were."""

    def __init__(self, run: Path, ranks: Ranks, keep: int):
        self.run, self.ranks, self.keep = run, ranks, keep
        self.thread, self.pending = ThreadPoolExecutor(1, "checkpoint"), None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
    ) -> None:
        """Begins to write step `step`: safetensors files by name, and small text files. Waits for the one before."""
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
    """Copies what this rank holds of every tensor from a file that must have exactly these, in these shapes and dtypes."""
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
