"""Files."""

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
    """Raise one ValueError for all problems: the first ten and the count."""
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            "\n  ".join(
                [
                    f"{path}: {what} ({len(problems)} found)",
                    *(problem[:300] for problem in problems[:10]),
                    *more,
                ]
            )
        )


def _json(path: Path, raw: bytes) -> dict:
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
    return _json(path, path.read_bytes())


def _whole(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # bool is an int to Python, not to us


def _header(path: Path) -> tuple[list[tuple], dict[str, str], int]:
    """Checked header of a safetensors file: rows (begin, end, name, dtype, shape) in file order,
    metadata, where data start."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path}: not a safetensors file: {size} bytes long, header length {length} "
                f"(allowed 2 to {MAX_HEADER}, and within the file); is the download complete?"
            )
        table = _json(path, file.read(length))
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    rows, problems = [], []
    for name, entry in table.items():
        dtype, shape, offsets = (
            (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
            if isinstance(entry, dict)
            else (None,) * 3
        )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            problems.append(f"{name}: dtype {dtype!r}, allowed {', '.join(DTYPES)}")
        elif not isinstance(shape, list) or len(shape) > 16 or not all(map(_whole, shape)):
            problems.append(
                f"{name}: shape {str(shape)[:80]} is not a list of at most 16 numbers >= 0"
            )
        elif not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
            problems.append(f"{name}: data_offsets {str(offsets)[:80]} are not two numbers >= 0")
        elif offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            problems.append(
                f"{name}: {dtype} {shape} does not fill the bytes {offsets[0]} to {offsets[1]}"
            )
        else:
            rows.append((*offsets, name, DTYPES[dtype], tuple(shape)))
    refuse(path, "bad entries in the safetensors header", problems)
    rows.sort()
    at = 0
    for begin, end, name, _, _ in rows:
        if begin != at:
            problems.append(
                f"{name}: starts at byte {begin}, the tensor before it ends at {at} ({'gap' if begin > at else 'overlap'})"
            )
        at = end
    if at != size - 8 - length:
        problems.append(
            f"tensors end at byte {at}, the data at {size - 8 - length}; is the download complete?"
        )
    refuse(path, "tensors and data do not match", problems)
    return rows, metadata, 8 + length


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    rows, metadata, start = _header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: torch.frombuffer(
            mapped, dtype=dtype, count=math.prod(shape), offset=start + begin
        ).view(shape)
        if end > begin
        else torch.empty(shape, dtype=dtype)
        for begin, end, name, dtype, shape in rows
    }, metadata


def _open_index(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Shards named by an index json. They must lie beside it; a link may only lead there or to the
    blobs of a hub cache."""
    listed = read_json(path).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(shard, str) for shard in listed.values())
    ):
        raise ValueError(f"{path}: weight_map must map tensor names to shard files")
    folder = path.parent.resolve()
    homes = (
        {folder, folder.parent.parent / "blobs"} if folder.parent.name == "snapshots" else {folder}
    )
    shards = sorted(set(listed.values()))
    problems = [
        f"{shard!r} is not a plain .safetensors name"
        for shard in shards
        if not re.fullmatch(r"[\w\-][\w\-.]*\.safetensors", shard)
    ]
    refuse(path, "shards outside the folder", problems)
    problems = [
        f"{shard} leads out of the folder"
        for shard in shards
        if (folder / shard).resolve().parent not in homes
    ]
    refuse(path, "shards outside the folder", problems)
    refuse(path, "missing shards", [shard for shard in shards if not (folder / shard).is_file()])
    tensors, metadata = {}, {}
    for shard in shards:
        found, metadata = _open_safetensors(folder / shard)
        named = {name for name, home in listed.items() if home == shard}
        problems += [
            f"{name}: lies in {shard}, the index says {listed.get(name, 'nothing')}"
            for name in sorted(found.keys() - named)
        ]
        problems += [
            f"{name}: is not in {shard}, where the index puts it"
            for name in sorted(named - found.keys())
        ]
        tensors |= found
    refuse(path, "index and shards disagree", problems)
    return tensors, metadata


# What a weight file's pickle may name. Torch allows more, among it ways to ask for memory that the
# file does not hold.
PICKLE_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device|bool|(b?float|u?int)\d+|\w+Storage)"
)


def _check_torch_zip(path: Path) -> Counter[int]:
    """Check a torch zip file before torch opens it; returns how many storage records there are of
    each size."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            pickled = [info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
            problems = [
                f"{info.filename}: compressed or past the end of the file"
                for info in infos
                if info.compress_type
                or info.file_size != info.compress_size
                or info.header_offset + info.file_size > size
            ]
            problems += [
                f"{name}: appears twice"
                for name, count in Counter(info.filename for info in infos).items()
                if count > 1
            ]
            if sum(info.file_size for info in infos) > size:
                problems.append("the records overlap: together they are larger than the file")
            if len(pickled) != 1 or pickled[0].file_size > MAX_HEADER:
                problems.append(
                    f"{len(pickled)} data.pkl records (1 needed, at most {MAX_HEADER} bytes)"
                )
            refuse(path, "not a plain torch file", problems)
            root = pickled[0].filename.removesuffix("data.pkl")
            if (
                root + "byteorder" in archive.namelist()
                and archive.read(root + "byteorder") != b"little"
            ):
                raise ValueError(
                    f"{path}: big-endian tensors; save it again on a little-endian machine"
                )
            problems = sorted(
                {
                    f"{op.name} {arg}"
                    for op, arg, _ in pickletools.genops(archive.read(pickled[0]))
                    if op.name
                    in (
                        "STACK_GLOBAL",
                        "INST",
                        "OBJ",
                        "EXT1",
                        "EXT2",
                        "EXT4",
                        "NEWOBJ",
                        "NEWOBJ_EX",
                    )
                    or op.name == "GLOBAL"
                    and not PICKLE_NAMES.fullmatch(arg)
                }
            )
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        OSError,
        KeyError,
        struct.error,
    ) as error:
        raise ValueError(
            f"{path}: not a whole torch zip file ({error}); a file in the old torch format must be saved again"
        ) from error
    refuse(path, "the pickle names things that are neither tensors nor plain containers", problems)
    return Counter(info.file_size for info in infos if info.filename.startswith(root + "data/"))


def read_torch(path: Path) -> tuple[object, Counter]:
    """What a .pt or .pth file holds, its tensors mapped, and how many records of each size it has.
    Nothing in it is run."""
    records = _check_torch_zip(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True), records
    except (
        Exception
    ) as error:  # torch raises many kinds; all mean that this file is not what it claims to be
        raise ValueError(f"{path}: torch refuses the file: {str(error)[:300]}") from error


def _open_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a .pt or .pth file, mapped; the state dict may lie under 'module', 'model' or
    'state_dict'."""
    content, records = read_torch(path)
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("module", "model", "state_dict") if key in content), content
        )
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: no dictionary of tensors, found {type(content).__name__}")
    problems, storages = [], {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            problems.append(
                f"{str(name)[:80]!r}: is {type(value).__name__}, every entry must be a tensor with a name"
            )
        elif (
            value.dtype not in DTYPE_NAMES
            or value.layout != torch.strided
            or value.device.type != "cpu"
        ):
            problems.append(
                f"{name}: {value.dtype} {value.layout} on {value.device} is not a plain tensor"
            )
        elif value.nbytes > value.untyped_storage().nbytes():
            problems.append(
                f"{name}: claims {value.nbytes} bytes, its storage has {value.untyped_storage().nbytes()}"
            )
        else:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    storages.pop(0, None)  # empty tensors
    problems += [
        f"a storage claims {nbytes} bytes, no record has that size"
        for nbytes in Counter(storages.values()) - records
    ]
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


def _find(folder: Path) -> Path:
    """The weight file of a folder: the first pattern of WEIGHT_FILES that something fits must fit
    one file."""
    found = next((found for pattern in WEIGHT_FILES if (found := sorted(folder.glob(pattern)))), [])
    if len(found) != 1:
        raise ValueError(
            f"{folder}: {len(found)} weight files, name one: {', '.join(file.name for file in found[:10]) or 'none fits'} "
            f"(looked for {', '.join(WEIGHT_FILES)})"
        )
    return found[0]


def open_source(path: str | Path) -> TensorSource:
    """Open a weight file (.safetensors, .safetensors.index.json, torch zip file) or folder.
    ValueError naming the file if not sound."""
    path = _find(Path(path)) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such weight file; `python -m backbones.weights download NAME` fetches the published ones"
        )
    readers = {".safetensors": _open_safetensors, ".json": _open_index} | dict.fromkeys(
        (".pt", ".pth", ".bin", ".ckpt"), _open_torch
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
    return _header(Path(path))[1]


# -- writing --------------------------------------------------------------------------------------


def _replace(path: Path, write: Callable[[Path], None]) -> None:
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

    _replace(path, write)


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
        return _json(source.path, source.metadata["official_config"].encode())
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
                f"{source}: unknown key {key!r} for {kind.__name__}; did you mean {near!r}? (allowed: {', '.join(names)})"
            )


def run_command(main: Callable[[], object]) -> None:
    """Runs a command line; what the user, the data or the disk got wrong ends it in one line on
    stderr and status 2."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
