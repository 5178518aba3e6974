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

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.layouts import MOTUS_PARTS, identify, renaming

# Bytes of json or pickle; the largest honest one (a whole Motus file) is below 2 MiB.
MAX_HEADER = 16 << 20
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
# Any of these may be loaded as any other.
CASTABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

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
    """A json object without doubled keys, NaN or infinities."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        counts = Counter(key for key, _ in pairs)
        if twice := [key for key in counts if counts[key] > 1]:
            raise ValueError(f"key {twice[0][:80]!r} appears twice")
        return dict(pairs)

    def no_constant(word: str) -> None:
        raise ValueError(f"{word} is not json")

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid json: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is {type(value).__name__}, expected a json object")
    return value


def read_json(path: Path) -> dict:
    """A json object. ValueError if it is something else, unsound or suspiciously large."""
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(
            f"{path}: is {path.stat().st_size} bytes long, expected a config or index of at most"
            f" {MAX_HEADER}"
        )
    return parse_json(path, path.read_bytes())


def check_dtypes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    wrong = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]
    problems = [f"{name}: is {tensors[name].dtype}, expected {', '.join(DTYPES)}" for name in wrong]
    refuse(path, "kinds of numbers that are not read or written here", problems)


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors mapped from the file by name, in file order, and its metadata. The library checks
    that the header is sound and that its tensors fill the file without gap or overlap."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file: {str(error)[:300]}; is the download complete?"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(path, file.read(length))  # refuses a name that is there twice
    check_dtypes(path, tensors)
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
    refuse(path, "shards that are no plain .safetensors names", strange)
    outside = [shard for shard in shards if (folder / shard).resolve().parent not in homes]
    refuse(path, "shards that lead out of the folder", outside)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    refuse(path, "missing shards", missing)
    problems = []
    tensors = {}
    for shard in shards:
        found, metadata = open_safetensors(folder / shard)
        wanted = {name for name, home in listed.items() if home == shard}
        for name in sorted(found.keys() ^ wanted):
            where = "lies" if name in found else "does not lie"
            says = listed.get(name, "nothing")
            problems.append(f"{name}: {where} in {shard}, the index says {says}")
        tensors |= found
    refuse(path, "index and shards disagree", problems)
    return tensors, metadata


# Names that a weight file's pickle may hold. Torch allows more, among it ways to ask for memory
# that the file does not hold.
PICKLE_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Size|device|bool|(b?float|u?int)\d+|\w+Storage)"
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
    """Faults in the records of a torch zip file of `size` bytes."""
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
    """The content of a .pt or .pth file, its tensors mapped, and how many records of each size it
    has. Nothing in it is run."""
    records = check_torch_zip(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True), records
    except Exception as error:  # torch raises many kinds; all mean that the file is not sound
        raise ValueError(f"{path}: torch refuses the file: {str(error)[:300]}") from error


def open_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a .pt or .pth file, mapped; the state dict may lie under 'module', 'model' or
    'state_dict'."""
    content, records = read_torch(path)
    if isinstance(content, dict):
        inner = [content[key] for key in ("module", "model", "state_dict") if key in content]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: is {type(content).__name__}, expected a dictionary of tensors")
    problems = []
    storages = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            problems.append(f"{str(name)[:80]!r}: is {kind}, expected a tensor with a name")
        elif value.layout != torch.strided or value.device.type != "cpu":
            problems.append(f"{name}: {value.layout} on {value.device} is not a plain tensor")
        else:
            storage = value.untyped_storage()
            if value.nbytes > storage.nbytes():
                claim = f"claims {value.nbytes} bytes, its storage has {storage.nbytes()}"
                problems.append(f"{name}: {claim}")
            elif storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    for size in Counter(storages.values()) - records:
        problems.append(f"a storage claims {size} bytes, no record has that size")
    refuse(path, "not a dictionary of tensors", problems)
    check_dtypes(path, content)
    return {name: value.detach() for name, value in content.items()}, {}


@dataclass
class TensorSource:
    """The tensors of a file, mapped from disk and not yet read. Treat what `read` gives as
    read-only."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    # Where the storages in the mapped file begin; other tensors are ordinary memory.
    mapped: frozenset[int]

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
        """Kind, stage, parts with parameter counts, dtypes, how many names are dropped."""
        kind, stage = identify(self.tensors)
        rename = renaming(self.tensors)
        kept = {rename(name): tensor for name, tensor in self.tensors.items()}
        kept.pop(None, None)
        dtypes = Counter(DTYPE_NAMES[tensor.dtype] for tensor in kept.values())
        counts = ", ".join(f"{name} x {count}" for name, count in dtypes.items())
        total = sum(tensor.numel() for tensor in kept.values())
        lines = [f"{self.path}: {kind}" + (f", Motus stage {stage}" if stage else "")]
        lines.append(f"  {len(kept)} tensors, {total:,} parameters, {counts}")
        for prefix, part in MOTUS_PARTS.items():
            sizes = [tensor.numel() for name, tensor in kept.items() if name.startswith(prefix)]
            if sizes:
                lines.append(f"  {part:22} {len(sizes):5} tensors {sum(sizes):15,} parameters")
        if len(kept) < len(self.tensors):
            dropped = len(self.tensors) - len(kept)
            lines.append(f"  {dropped} second names and fixed tables are not loaded")
        lines += [f"  {key}: {value[:200]}" for key, value in self.metadata.items()]
        return "\n".join(lines)

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
    """The weight file of a folder: of the first pattern that fits any there must be one."""
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if found:
            break
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:10]) or "none fits"
        raise ValueError(
            f"{folder}: has {len(found)} weight files, expected one: {names} (looked for"
            f" {', '.join(WEIGHT_FILES)})"
        )
    return found[0]


READERS = {".safetensors": open_safetensors, ".json": open_index}
READERS |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), open_torch)


def open_source(path: str | Path) -> TensorSource:
    """Opens a weight file (.safetensors, .safetensors.index.json, torch zip file) or the one of a
    folder. ValueError naming the file if it is not sound."""
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such weight file; `python -m weights download NAME` fetches the published"
            " ones"
        )
    if path.suffix not in READERS:
        raise ValueError(
            f"{path}: is a {path.suffix or 'nameless'} file, expected {', '.join(READERS)}"
        )
    tensors, metadata = READERS[path.suffix](path)
    mapped = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return TensorSource(path, tensors, metadata, mapped)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a weight file."""
    return open_source(path).metadata


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
    header = {"__metadata__": dict(metadata)} if metadata else {}
    begins = {}
    end = 0
    # Widest first keeps every tensor aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        begins[name] = end
        end += math.prod(shape) * dtype.itemsize
        offsets = [begins[name], end]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    begins = {name: len(start) + begin for name, begin in begins.items()}
    return start, begins, len(start) + end


def raw_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors, one at a time, as a safetensors file; atomic. ValueError for a dtype that the
    format has no name for here."""
    check_dtypes(Path(path), tensors)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    start, begins, _ = safetensors_header(kinds, metadata)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(start)
            for name in begins:
                file.write(raw_bytes(tensors[name]))

    replace_file(Path(path), write)


def digest(tensors: Mapping[str, Tensor], *about: str) -> str:
    """Sixteen hexadecimal digits that change with any name, dtype, shape or byte of the tensors, or
    with `about`."""
    state = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        value = tensors[name]
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(raw_bytes(value))
    return state.hexdigest()[:16]


def config_beside(source: TensorSource) -> dict:
    """The config.json of a weight file: kept in the metadata by `convert`, else in its folder,
    else, for folders of DeepSpeed, above it."""
    if "official_config" in source.metadata:
        return parse_json(source.path, source.metadata["official_config"].encode())
    folder = source.path.parent
    folders = [folder, folder.parent] if folder.name == "pytorch_model" else [folder]
    for folder in folders:
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json")
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


def same_config(path: str | Path, found: dict, wanted: dict) -> None:
    """ValueError that lists the fields in which two configurations differ."""
    wanted = json.loads(json.dumps(wanted))  # json makes lists of tuples
    different = [
        f"{key}={found.get(key)} instead of {wanted.get(key)}"
        for key in wanted | found
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise ValueError(
            f"{path}: made with {', '.join(different)}; "
            "use a file of the same configuration, or change the configuration"
        )


def run_command(main: Callable[[], object]) -> None:
    """Runs a command line; what the user, the data or the disk got wrong ends it in one line on
    stderr and status 2."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
