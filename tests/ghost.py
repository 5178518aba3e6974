"""A CUDA device that is not there: real values, computed on the CPU, by tensors that say they are
on cuda:0. What a GPU would refuse is refused, what it would make the host wait for is counted.

    python tests/ghost_cases.py NAME       runs commands on it and says what they did
    PYTHONPATH=tests pytest -p ghost       the suite as a machine with one GPU would see it, which
                                           hides it; with --device cuda in every test

    Ghost       a tensor that wraps one of the CPU and reports device cuda:0
    GhostMode   runs every operation on the wrapped tensors and records, by line of the program:

    item, size      a value read on the host, or an operation whose output has as many entries as
                    the data say: the host waits for all that was queued
    h2d, d2h        a copy that the host waits for
    h2d-pageable    asynchronous, but from memory that is not pinned: it is staged, the host waits
    h2d-async       the same from pinned memory: the only copy to the device that nobody waits for
    d2h-async       to the host, asynchronous: until the host next waits, the copy holds garbage

Operands on two devices, `.numpy()` of a device tensor and a generator of another device are
refused as torch refuses them. A Triton kernel gives what its registration says, filled with small
numbers: shapes and dtypes are exercised, values are not. Import it before torch, and use
GhostMode around what is to run; CUDA_VISIBLE_DEVICES= hides the device."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def build(path: Path) -> None:
    """Compiles ghost.cpp against the torch of this Python."""
    torch_home = Path(importlib.util.find_spec("torch").origin).parent
    include = [f"-I{torch_home}/include", f"-I{torch_home}/include/torch/csrc/api/include"]
    link = [f"-L{torch_home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_home}/lib"]
    how = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *include, HERE / "ghost.cpp"]
    part = path.with_suffix(f".{os.getpid()}")
    subprocess.run([*how, "-o", part, *link], check=True)
    part.rename(path)


def library() -> Path:
    """Where this source, built for this torch, lies."""
    source = (HERE / "ghost.cpp").read_bytes() + importlib.metadata.version("torch").encode()
    name = f"ghost_{os.getuid()}_{hashlib.sha256(source).hexdigest()[:16]}.so"
    return Path(tempfile.gettempdir()) / name


if not library().exists():
    build(library())
ctypes.CDLL(str(library()))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

DEVICE = torch.device("cuda", 0)
WAITS = ("item", "size", "h2d", "d2h", "h2d-pageable")
pinned: dict[int, torch.Tensor] = {}  # by storage; kept, so that no other storage gets its number


def is_pinned(x: torch.Tensor) -> bool:
    return type(x) is not Ghost and x.untyped_storage()._cdata in pinned


def pin(x: torch.Tensor, *_) -> torch.Tensor:
    if is_pinned(x):
        return x
    copy = torch.Tensor.clone(x)
    pinned[copy.untyped_storage()._cdata] = copy
    return copy


class Properties:
    """Of the card: an H100 with 80 GiB."""

    name, gcnArchName, major, minor = "ghost", "", 9, 0
    total_memory, multi_processor_count, warp_size = 80 << 30, 132, 32
    max_threads_per_multi_processor, regs_per_multiprocessor = 2048, 65536
    shared_memory_per_multiprocessor, shared_memory_per_block = 233472, 49152
    shared_memory_per_block_optin = 232448


class NoDevice:
    """torch.cuda.device, with one device to choose from."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def synchronize(*_) -> None:
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, GhostMode):
            mode.arrive()


def install() -> None:
    """Answers what of torch.cuda asks a driver."""

    def always(value):
        return lambda *args, **kwargs: value

    def visible() -> bool:
        return os.environ.get("CUDA_VISIBLE_DEVICES") != ""

    state = torch.zeros(16, dtype=torch.uint8)
    torch.cuda.is_available = torch.cuda.is_initialized = visible
    torch.cuda.device_count = lambda: int(visible())
    answers = dict(current_device=0)
    answers |= dict(get_device_capability=(9, 0), get_device_name="ghost", memory_allocated=1 << 20)
    answers |= dict(get_device_properties=Properties, max_memory_allocated=1 << 20, _lazy_init=None)
    answers |= dict(set_device=None, empty_cache=None, reset_peak_memory_stats=None)
    answers |= dict(is_bf16_supported=True, is_current_stream_capturing=False)
    answers |= dict(get_rng_state=state, set_rng_state=None)
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    torch.cuda.synchronize = synchronize
    torch.cuda.device = NoDevice
    for name in ("getDevice", "setDevice", "maybeExchangeDevice", "exchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", always(0))
    torch._C._cuda_getCurrentRawStream = always(0)
    torch._C._cuda_isCurrentStreamCapturing = always(False)
    torch.Tensor.pin_memory = pin
    torch.Tensor.is_pinned = is_pinned
    # torch.tensor(..., device=) is made on the CPU and copied, as it is.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


class Mismatch(RuntimeError):
    """What a GPU would refuse."""


class Ghost(torch.Tensor):
    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool = False):
        about = dict(strides=host.stride(), storage_offset=host.storage_offset())
        about |= dict(dtype=host.dtype, layout=host.layout, requires_grad=requires_grad)
        out = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=DEVICE, **about)
        out._host = host
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Call(func, args, kwargs or {}, None).run()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")

    __array__ = numpy

    def __repr__(self, *_, **__):
        return f"Ghost({tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, _):
        raise RuntimeError("a device tensor is being pickled: by a worker of a loader?")


# Operations whose output is as large as the data say, and those that check values on the host.
SIZE = """nonzero masked_select _unique2 unique_dim unique_consecutive unique_dim_consecutive
_unique bincount""".split()
CHECKS = ("_linalg_check_errors", "equal", "is_nonzero")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


def site() -> str:
    """The innermost line of the program."""
    frame = sys._getframe(3)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent != HERE and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch's own"


class GhostMode(TorchDispatchMode):
    """Everything inside runs as if cuda:0 were there. `events` counts (kind, operation, line)."""

    def __init__(self):
        super().__init__()
        self.events: Counter = Counter()
        self.pending: list = []  # copies to the host, and what they will hold

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Call(func, args, kwargs or {}, self).run()

    def arrive(self) -> None:
        """The host waits for the device: copies that were begun are complete."""
        with _disable_current_modes():
            for copy, value in self.pending:
                copy.copy_(value)
        self.pending.clear()

    def note(self, kind: str, what: str) -> None:
        if kind in WAITS:
            self.arrive()
        self.events[kind, what, site()] += 1

    def waits(self) -> Counter:
        """How often the host waited, by line."""
        found = Counter()
        for (kind, what, line), count in self.events.items():
            if kind in WAITS:
                found[f"{kind} {what} {line}"] += count
        return found


def host(x):
    return x._host if isinstance(x, Ghost) else x


def is_tensor(x) -> bool:
    return isinstance(x, torch.Tensor)


class Call:
    """An operation on its way through the ghost device."""

    def __init__(self, func, args, kwargs, mode):
        self.func, self.args, self.kwargs, self.mode = func, args, kwargs, mode
        self.name = func._schema.name.split("::")[-1]
        leaves = [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        self.ghosts = [x for x in leaves if isinstance(x, Ghost)]
        self.plain = [x for x in leaves if not isinstance(x, Ghost)]
        where = kwargs.get("device")
        self.where = None if where is None else torch.device(where)

    def note(self, kind: str, what: str) -> None:
        if self.mode is not None:
            self.mode.note(kind, what)

    def run(self):
        where, name = self.where, self.name
        if where is None and any(x.is_meta for x in self.plain) or where and where.type == "meta":
            return self.func(*self.args, **self.kwargs)
        if name == "lift_fresh":
            return self.args[0]
        if name == "_local_scalar_dense":
            if self.ghosts:
                self.note("item", "item")
            return self.func(*tree_map(host, self.args))
        self.check_generator()
        if name in ("_to_copy", "copy_"):
            return self.copy()
        if where is None and self.ghosts:
            self.check_devices()
            self.count_waits()
        return self.compute()

    def check_generator(self) -> None:
        generator = self.kwargs.get("generator")
        if generator is None:
            return
        target = (self.where or (DEVICE if self.ghosts else torch.device("cpu"))).type
        if generator.device.type != target:
            found = generator.device.type
            raise Mismatch(f"Expected a '{target}' device type for generator but found '{found}'")

    def copy(self):
        onto = self.name == "copy_"
        source = self.args[1 if onto else 0]
        target = self.args[0].device if onto else self.where or source.device
        ahead = self.kwargs.get("non_blocking") or (onto and len(self.args) > 2 and self.args[2])
        if source.device.type != target.type:
            if target.type == "cpu":
                kind = "d2h-async" if ahead else "d2h"
            elif ahead:
                kind = "h2d-async" if is_pinned(source) else "h2d-pageable"
            else:
                kind = "h2d"
            self.note(kind, self.name)
        if onto:
            self.func(host(self.args[0]), host(source), *self.args[2:], **self.kwargs)
            return self.args[0]
        options = {k: v for k, v in self.kwargs.items() if k not in ("device", "pin_memory")}
        out = self.func(host(self.arrived(source)), **options, device=torch.device("cpu"))
        out = out.clone() if out is host(source) else out
        if target.type == "cuda":
            return Ghost(out)
        if ahead and source.device.type == "cuda" and self.mode is not None and out.numel():
            garbage = float("nan") if out.is_floating_point() else 1 - 2 * (out.dtype.is_signed)
            self.mode.pending.append((out, out.clone()))
            out.fill_(garbage)
            pinned[out.untyped_storage()._cdata] = out  # torch pins it
        return out

    def arrived(self, source: torch.Tensor) -> torch.Tensor:
        """A copy to the host that goes back to the device stands behind itself in the stream."""
        for copy, value in self.mode.pending if self.mode is not None else ():
            same = copy.untyped_storage()._cdata == source.untyped_storage()._cdata
            if same and copy.shape == source.shape:
                return value
        return source

    def check_devices(self) -> None:
        """Operands on the host must have no axis; an index is copied, and waited for."""
        wide = [x for x in self.plain if x.dim() > 0 and x.numel() > 0]
        if self.name in INDEXED and isinstance(self.args[0], Ghost):
            indices = [x for x in tree_leaves(self.args[1]) if is_tensor(x)]
            for index in indices:
                if not isinstance(index, Ghost):
                    self.note("h2d", f"{self.name} with an index of the CPU")
            wide = [x for x in wide if not any(x is index for index in indices)]
        if wide:
            shapes = [tuple(x.shape) for x in wide]
            raise Mismatch(
                "Expected all tensors to be on the same device, but found cuda:0 and cpu: "
                f"{self.name} with {shapes} at {site()}"
            )

    def count_waits(self) -> None:
        unsized = self.name == "repeat_interleave" and self.kwargs.get("output_size") is None
        if self.name in SIZE or unsized:
            self.note("size", self.name)
        elif self.name in CHECKS:
            self.note("item", self.name)
        elif self.name in INDEXED:
            leaves = tree_leaves(self.args[1])
            masks = [x for x in leaves if is_tensor(x) and x.dtype == torch.bool]
            filled = self.name != "index" and len(self.args[1]) == 1 and self.args[2].numel() == 1
            if masks and not filled:
                self.note("size", f"{self.name} with a mask")

    def compute(self):
        args, kwargs = tree_map(host, self.args), tree_map(host, self.kwargs)
        device = self.where.type if self.where else "cuda" if self.ghosts else "cpu"
        if self.where is not None:
            kwargs["device"] = torch.device("cpu")
        if device != "cuda":
            return self.func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if self.func.namespace == "motus":
            out = kernel(self.func, args, kwargs)
        else:
            out = self.func(*args, **kwargs)
        given = {id(host(x)): x for x in self.ghosts} if self.func._schema.is_mutable else {}

        def wrap(x):
            if not is_tensor(x) or isinstance(x, Ghost):
                return x
            return given.get(id(x)) if id(x) in given else Ghost(x)

        return tree_map(wrap, out)


def kernel(func, args, kwargs):
    """What a Triton kernel gives by its registration, filled with small numbers."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def faked(x):
            return fake.from_tensor(x) if is_tensor(x) else x

        like = func(*tree_map(faked, args), **tree_map(faked, kwargs))

    def filled(x):
        if not is_tensor(x):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(1e-2)

    with _disable_current_modes():
        return tree_map(filled, like)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """As a plugin of pytest, around each test if it sees the device."""
    if not torch.cuda.is_available():
        return (yield)
    with GhostMode():
        return (yield)


def pytest_runtest_setup(item) -> None:
    if item.config.getoption("device") == "cuda" and item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU that is there")


install()
