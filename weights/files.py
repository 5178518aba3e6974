"""Reading and writing weight files safely: safetensors, shards of them, and torch zip files.

What a file claims is checked against its size before anything is allocated; pickles may name
tensors and plain containers only, and are read with `weights_only=True`. Files are written under a
temporary name, flushed and renamed. Reading maps the file: bytes are read when touched.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import mmap
import os
import pickletools
import re
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weights.layouts import MOTUS_PARTS, identify, renaming

MAX_HEADER = (
    16 << 20
)  # bytes of json or pickle; the largest honest one (a whole Motus file) is below 2 MiB
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CASTABLE = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
}  # any of these may be loaded as any other


# -- reading --------------------------------------------------------------------------------------


def refuse(path: Path, what: str, problems: list[str]) -> None:
    """Raises one ValueError for all problems: the first ten and the count."""
    if not problems:
        return
    lines = [f"{path}: {what} ({len(problems)} found)"]
    lines += [problem[:300] for problem in problems[:10]]
    if len(problems) > 10:
        lines.append(f"... and {len(problems) - 10} more")
    raise ValueError("\n  ".join(lines))


def parse_json(path: Path, raw: bytes) -> dict:
    def unique(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"key {twice[0][:80]!r} appears twice")
        return dict(pairs)

    def no_constant(word):
        raise ValueError(f"{word} is not json")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid json: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: json object wanted, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict:
    """A json object. ValueError if it is something else, unsound or suspiciously large."""
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, a config or index has at most {MAX_HEADER}"
        )
    return parse_json(path, path.read_bytes())


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # bool is an int to Python, not to us


class Entry(NamedTuple):
    """A tensor of a safetensors file: its bytes, from where data start, and how to read them."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def checked_entry(name: str, entry: object) -> Entry:
    """A line of a safetensors header. ValueError for what is wrong with it."""
    found = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r}, allowed {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(is_count, shape)):
        raise ValueError(
            f"{name}: shape {str(shape)[:80]} is not a list of at most 16 numbers >= 0"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"{name}: data_offsets {str(offsets)[:80]} are not two numbers >= 0")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name}: {dtype} {shape} does not fill the bytes {begin} to {end}")
    return Entry(begin, end, name, DTYPES[dtype], tuple(shape))


def read_header(path: Path) -> tuple[list[Entry], dict[str, str], int]:
    """Checked header of a safetensors file: entries in file order, metadata, where data start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path}: not a safetensors file: {size} bytes long, header length {length} "
                f"(allowed 2 to {MAX_HEADER}, and within the file); is the download complete?"
            )
        table = parse_json(path, file.read(length))
    metadata = table.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    entries, problems = [], []
    for name, line in table.items():
        try:
            entries.append(checked_entry(name, line))
        except ValueError as error:
            problems.append(str(error))
    refuse(path, "bad entries in the safetensors header", problems)
    entries.sort(key=lambda entry: entry[:3])
    at = 0
    for entry in entries:
        if entry.begin != at:
            kind = "gap" if entry.begin > at else "overlap"
            problems.append(
                f"{entry.name}: starts at byte {entry.begin}, the tensor before it ends at {at}"
                f" ({kind})"
            )
        at = entry.end
    if at != size - 8 - length:
        problems.append(
            f"tensors end at byte {at}, the data at {size - 8 - length}; is the download complete?"
        )
    refuse(path, "tensors and data do not match", problems)
    return entries, metadata, 8 + length


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors mapped from the file by name, and its metadata."""
    entries, metadata, start = read_header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for entry in entries:
        count = math.prod(entry.shape)
        if count:
            at = start + entry.begin
            flat = torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=at)
            tensors[entry.name] = flat.view(entry.shape)
        else:
            tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
    return tensors, metadata


def open_index(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Shards named by an index json. They must lie beside it; a link may only lead there or to the
    blobs of a hub cache."""
    listed = read_json(path).get("weight_map")
    named = isinstance(listed, dict) and all(isinstance(home, str) for home in listed.values())
    if not named or not listed:
        raise ValueError(f"{path}: weight_map must map tensor names to shard files")
    folder = path.parent.resolve()
    homes = {folder}
    if folder.parent.name == "snapshots":
        homes.add(folder.parent.parent / "blobs")
    shards = sorted(set(listed.values()))
    plain = re.compile(r"[\w\-][\w\-.]*\.safetensors")
    strange = [shard for shard in shards if not plain.fullmatch(shard)]
    problems = [f"{shard!r} is not a plain .safetensors name" for shard in strange]
    refuse(path, "shards outside the folder", problems)
    outside = [shard for shard in shards if (folder / shard).resolve().parent not in homes]
    problems = [f"{shard} leads out of the folder" for shard in outside]
    refuse(path, "shards outside the folder", problems)
    refuse(path, "missing shards", [shard for shard in shards if not (folder / shard).is_file()])
    tensors, metadata = {}, {}
    for shard in shards:
        found, metadata = open_safetensors(folder / shard)
        wanted = {name for name, home in listed.items() if home == shard}
        for name in sorted(found.keys() - wanted):
            says = listed.get(name, "nothing")
            problems.append(f"{name}: lies in {shard}, the index says {says}")
        for name in sorted(wanted - found.keys()):
            problems.append(f"{name}: is not in {shard}, where the index puts it")
        tensors |= found
    refuse(path, "index and shards disagree", problems)
    return tensors, metadata


# Names that a weight file's pickle may hold. Torch allows more, among it ways to ask for memory
# that the file does not hold.
PICKLE_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)|torch"
    r" (Size|device|bool|(b?float|u?int)\d+|\w+Storage)"
)


# Opcodes that build objects without naming them in one piece.
PICKLE_BUILDERS = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX")
BROKEN_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    OSError,
    KeyError,
    struct.error,
)


def zip_problems(infos: list[zipfile.ZipInfo], size: int) -> list[str]:
    """What is wrong with the records of a torch zip file of `size` bytes."""
    problems = []
    for info in infos:
        packed = info.compress_type or info.file_size != info.compress_size
        if packed or info.header_offset + info.file_size > size:
            problems.append(f"{info.filename}: compressed or past the end of the file")
    counts = Counter(info.filename for info in infos)
    problems += [f"{name}: appears twice" for name, count in counts.items() if count > 1]
    if sum(info.file_size for info in infos) > size:
        problems.append("the records overlap: together they are larger than the file")
    pickled = [info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(pickled) != 1 or pickled[0].file_size > MAX_HEADER:
        problems.append(f"{len(pickled)} data.pkl records (1 needed, at most {MAX_HEADER} bytes)")
    return problems


def check_torch_zip(path: Path) -> Counter[int]:
    """Checks a torch zip file before torch opens it; returns how many storage records there are of
    each size."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            refuse(path, "not a plain torch file", zip_problems(infos, path.stat().st_size))
            names = archive.namelist()
            root = next(n for n in names if re.fullmatch(r"[^/]+/data\.pkl", n))
            root = root.removesuffix("data.pkl")
            order = root + "byteorder"
            if order in names and archive.read(order) != b"little":
                raise ValueError(
                    f"{path}: big-endian tensors; save it again on a little-endian machine"
                )
            operations = list(pickletools.genops(archive.read(root + "data.pkl")))
    except BROKEN_ZIP as error:
        raise ValueError(
            f"{path}: not a whole torch zip file ({error}); a file in the old torch format must be "
            "saved again"
        ) from error
    problems = set()
    for operation, argument, _ in operations:
        foreign = operation.name == "GLOBAL" and not PICKLE_NAMES.fullmatch(argument)
        if foreign or operation.name in PICKLE_BUILDERS:
            problems.add(f"{operation.name} {argument}")
    what = "the pickle names things that are neither tensors nor plain containers"
    refuse(path, what, sorted(problems))
    return Counter(info.file_size for info in infos if info.filename.startswith(root + "data/"))


def read_torch(path: Path) -> tuple[object, Counter]:
    """What a .pt or .pth file holds, its tensors mapped, and how many records of each size it has.
    Nothing in it is run."""
    records = check_torch_zip(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True), records
    except (
        Exception
    ) as error:  # torch raises many kinds; all mean that this file is not what it claims to be
        raise ValueError(f"{path}: torch refuses the file: {str(error)[:300]}") from error


def open_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a .pt or .pth file, mapped; the state dict may lie under 'module', 'model' or
    'state_dict'."""
    content, records = read_torch(path)
    if isinstance(content, dict):
        inner = [content[key] for key in ("module", "model", "state_dict") if key in content]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: no dictionary of tensors, found {type(content).__name__}")
    problems, storages = [], {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            problems.append(
                f"{str(name)[:80]!r}: is {kind}, every entry must be a tensor with a name"
            )
            continue
        plain = value.layout == torch.strided and value.device.type == "cpu"
        size = value.untyped_storage().nbytes() if plain else 0
        if value.dtype not in DTYPE_NAMES or not plain:
            about = f"{value.dtype} {value.layout} on {value.device}"
            problems.append(f"{name}: {about} is not a plain tensor")
        elif value.nbytes > size:
            problems.append(f"{name}: claims {value.nbytes} bytes, its storage has {size}")
        elif size:
            storages[value.untyped_storage().data_ptr()] = size
    for size in Counter(storages.values()) - records:
        problems.append(f"a storage claims {size} bytes, no record has that size")
    refuse(path, "not a dictionary of tensors", problems)
    return {name: value.detach() for name, value in content.items()}, {}


@dataclass
class TensorSource:
    """The tensors of a file, mapped from disk and not yet read. Treat what `read` gives as
    read-only."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    mapped: frozenset[
        int
    ]  # where the storages in the mapped file begin; other tensors are ordinary memory

    def names(self) -> list[str]:
        """All names, in file order."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file: bytes are read when touched."""
        return self.tensors[name]

    def describe(self) -> str:
        """What the file is: kind, stage, parts with parameter counts, dtypes, names that are
        dropped."""
        kind, stage = identify(self.tensors)
        rename = renaming(self.tensors)
        kept = {
            rename(name): tensor
            for name, tensor in self.tensors.items()
            if rename(name) is not None
        }
        dtypes = Counter(DTYPE_NAMES[tensor.dtype] for tensor in kept.values())
        lines = [
            f"{self.path}: {kind}" + (f", Motus stage {stage}" if stage else ""),
            f"  {len(kept)} tensors, {sum(t.numel() for t in kept.values()):,} parameters, "
            + ", ".join(f"{name} x {count}" for name, count in dtypes.items()),
        ]
        for prefix, part in MOTUS_PARTS.items() if kind.startswith("motus") else ():
            sizes = [tensor.numel() for name, tensor in kept.items() if name.startswith(prefix)]
            lines.append(f"  {part:22} {len(sizes):5} tensors {sum(sizes):15,} parameters")
        if len(kept) < len(self.tensors):
            lines.append(
                f"  {len(self.tensors) - len(kept)} second names and fixed tables are not loaded"
            )
        return "\n".join(
            lines + [f"  {key}: {value[:200]}" for key, value in self.metadata.items()]
        )

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_) -> None:
        self.tensors = {}  # the file is unmapped when the last view of it is gone


WEIGHT_FILES = (
    "*.safetensors.index.json",
    "*.safetensors",
    "mp_rank_00_model_states.pt",
    "pytorch_model/mp_rank_00_model_states.pt",
    "*.pt*",
)


def find_weights(folder: Path) -> Path:
    """The weight file of a folder: the first pattern of WEIGHT_FILES that something fits must fit
    one file."""
    found = next((found for pattern in WEIGHT_FILES if (found := sorted(folder.glob(pattern)))), [])
    if len(found) != 1:
        raise ValueError(
            f"{folder}: {len(found)} weight files, name one:"
            f" {', '.join(file.name for file in found[:10]) or 'none fits'} (looked for"
            f" {', '.join(WEIGHT_FILES)})"
        )
    return found[0]


def open_source(path: str | Path) -> TensorSource:
    """Open a weight file (.safetensors, .safetensors.index.json, torch zip file) or folder.
    ValueError naming the file if not sound."""
    path = find_weights(Path(path)) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such weight file; `python -m weights download NAME` fetches the published"
            " ones"
        )
    readers = {".safetensors": open_safetensors, ".json": open_index} | dict.fromkeys(
        (".pt", ".pth", ".bin", ".ckpt"), open_torch
    )
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: unknown kind of weight file {path.suffix!r}, allowed {', '.join(readers)}"
        )
    tensors, metadata = readers[path.suffix](path)
    return TensorSource(
        path,
        tensors,
        metadata,
        frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors.values()),
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such weight file; name one that exists")
    return read_header(Path(path))[1]


# -- writing --------------------------------------------------------------------------------------


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, flush it to disk, rename it. On any failure the old file
    stays and the new one goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file with tensors of these dtypes and shapes, the byte of the
    file at which each of them begins, in file order, and the size of the file."""
    order = sorted(
        tensors, key=lambda name: (-tensors[name][0].itemsize, name)
    )  # widest first keeps every tensor aligned
    header, begins, at = {"__metadata__": dict(metadata)} if metadata else {}, {}, 0
    for name in order:
        dtype, shape = tensors[name]
        begins[name], at = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begins[name], at],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return (
        struct.pack("<Q", len(raw)) + raw,
        {name: start + begin for name, begin in begins.items()},
        start + at,
    )


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, one at a time, as a safetensors file; atomic. ValueError for a dtype the
    format has no name for here."""
    path = Path(path)
    refuse(
        path,
        "cannot be saved",
        [
            f"{name}: {tensor.dtype}, allowed {', '.join(DTYPES)}"
            for name, tensor in tensors.items()
            if tensor.dtype not in DTYPE_NAMES
        ],
    )
    header, begins, _ = safetensors_header(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata
    )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header)
            for name in begins:
                file.write(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())

    replace_file(path, write)


def digest(tensors: Mapping[str, Tensor], *about: str) -> str:
    """Sixteen hexadecimal digits that change with any name, dtype, shape or byte of the tensors, or
    with `about`."""
    state = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        value = tensors[name].detach()
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def config_beside(source: TensorSource) -> dict:
    """The config.json of a weight file: kept in the metadata by `convert`, else in its folder,
    else, for folders of DeepSpeed, above it."""
    if "official_config" in source.metadata:
        return parse_json(source.path, source.metadata["official_config"].encode())
    for folder in (
        source.path.parent,
        *[source.path.parent.parent] * (source.path.parent.name == "pytorch_model"),
    ):
        if (path := folder / "config.json").is_file():
            return read_json(path)
    return {}


def check_keys(stored: dict, kind: type, source: object) -> None:
    """Refuses keys that a dataclass does not have, naming the nearest one it has."""
    names = [f.name for f in fields(kind)]
    for key in stored:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, 0.0)[0]
            raise ValueError(
                f"{source}: unknown key {key!r} for {kind.__name__}; did you mean {near!r}?"
                f" (allowed: {', '.join(names)})"
            )


def run_command(main: Callable[[], object]) -> None:
    """Runs a command line; what the user, the data or the disk got wrong ends it in one line on
    stderr and status 2."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
