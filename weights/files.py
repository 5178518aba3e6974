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
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.layouts import identify, renaming
from weights.options import Refusal, check_numbers

# Bytes of json or pickle; the largest honest one (a whole Motus file) is below 2 MiB.
MAX_HEADER = 16 << 20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

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
    size = path.stat().st_size
    if size > MAX_HEADER:
        raise ValueError(f"{path}: is {size} bytes long, expected a json of at most {MAX_HEADER}")
    return parse_json(path, path.read_bytes())


def check_dtypes(path: Path, kinds: Mapping[str, torch.dtype | str]) -> None:
    """Refuses dtypes, by themselves or by name, that are not among ours."""
    known = DTYPE_NAMES.values()
    odd = []
    for name, kind in kinds.items():
        if DTYPE_NAMES.get(kind, kind) not in known:
            odd.append(f"{name}: {kind}")
    hint = "quantised weights are published beside a bf16 or fp16 file: take that"
    refuse(path, f"expected dtypes {', '.join(known)}; {hint}", odd)


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
        table = parse_json(path, file.read(length))  # refuses a name that is there twice
    check_dtypes(path, {name: table[name]["dtype"] for name in tensors})
    return tensors, metadata


def file_in(folder: Path, name: str) -> Path:
    """A regular file of a folder that is no link. ValueError if it is missing, or leads out of it:
    links are followed nowhere but from a hub snapshot to its blobs."""
    path = folder / name
    real = Path(os.path.realpath(path)) if "\0" not in name else Path()
    allowed = [path]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parents[1] / "blobs" / real.name)
    if real not in allowed or not path.is_relative_to(folder):
        raise ValueError("is a link or leaves the folder; put the file itself into it")
    if not real.is_file():
        raise ValueError("is missing or no file")
    return real


def open_index(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Shards named by an index json, beside which they must lie."""
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or {type(home) for home in listed.values()} != {str}:
        raise ValueError(f"{path}: weight_map must map tensor names to shard files")
    folder = path.parent.resolve()
    shards = sorted(set(listed.values()))
    problems = []
    for shard in shards:
        try:
            file_in(folder, shard)
        except (OSError, ValueError) as error:
            problems.append(f"{shard!r} {error}")
    refuse(path, "expected shards beside the index", problems)
    tensors = {}
    places = set()
    for shard in shards:
        found, metadata = open_safetensors(folder / shard)
        tensors |= found
        places |= {(name, shard) for name in found}
    for name, shard in sorted(places ^ listed.items()):
        says = "lies in" if (name, shard) in places else "is not in"
        problems.append(f"{name}: {says} {shard}; the index puts it in {listed.get(name, 'none')}")
    refuse(path, "index and shards disagree", problems)
    return tensors, metadata


# Names that a weight file's pickle may hold. Torch allows more, among it ways to ask for memory
# that the file does not hold.
PICKLE_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter)|torch\.storage UntypedStorage"
    r"|torch (Size|device|bool|(b?float|u?int)\w+|\w+Storage)"
)


def zip_problems(archive: zipfile.ZipFile, size: int) -> list[str]:
    """Faults of a torch zip file of `size` bytes, before torch opens it."""
    infos = archive.infolist()
    problems = []
    for info in infos:
        packed = info.compress_type or info.file_size != info.compress_size
        if packed or info.header_offset + info.file_size > size:
            problems.append(f"{info.filename}: compressed or past the end of the file")
    if len(set(archive.namelist())) < len(infos):
        problems.append("two records have one name")
    pickles = [info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER:
        problems.append(
            f"{len(pickles)} data.pkl records; expected 1 of at most {MAX_HEADER} bytes"
        )
    if problems:
        return problems
    order = pickles[0].filename.replace("data.pkl", "byteorder")
    if order in archive.namelist() and archive.read(order) != b"little":
        return ["big-endian tensors; save it again on a little-endian machine"]
    for operation, name, _ in pickletools.genops(archive.read(pickles[0])):
        if operation.name == "GLOBAL" and not PICKLE_NAMES.fullmatch(name):
            problems.append(f"the pickle names {name}, neither a tensor nor a plain container")
    return problems


def read_torch(path: Path) -> tuple[object, set[int]]:
    """The content of a .pt or .pth file, its tensors mapped, and the sizes of its records in bytes.
    Nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            problems = zip_problems(archive, path.stat().st_size)
            sizes = {info.file_size for info in archive.infolist()}
        content = None
        if not problems:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # many kinds; all mean that the file is not what it claims to be
        raise ValueError(
            f"{path}: not a sound torch file: {str(error)[:300]}; a file in the old torch format"
            " must be saved again"
        ) from error
    refuse(path, "not a plain torch file", problems)
    return content, sizes


def open_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a .pt or .pth file, mapped; the state dict may lie under 'module', 'model' or
    'state_dict'."""
    content, sizes = read_torch(path)
    for key in ("module", "model", "state_dict"):
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    problems = []
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"{str(name)[:80]!r} is {type(value).__name__}"
            problems.append(f"{found}; expected a tensor with a name")
        elif value.layout != torch.strided or value.device.type != "cpu":
            problems.append(f"{name}: {value.layout} on {value.device} is not a plain tensor")
        elif value.nbytes > (size := value.untyped_storage().nbytes()):
            problems.append(f"{name}: claims {value.nbytes} bytes, its storage has {size}")
        elif size and size not in sizes:
            problems.append(f"{name}: its storage claims {size} bytes, no record has that size")
    refuse(path, "not a dictionary of tensors", problems)
    check_dtypes(path, {name: value.dtype for name, value in content.items()})
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
        """Lines that say what the file is: kind, stage, parts with parameter counts, dtypes, how
        many names are dropped, metadata."""
        kind, stage = identify(self.tensors)
        rename = renaming(self.tensors)
        kept = {rename(name): tensor for name, tensor in self.tensors.items()}
        kept.pop(None, None)
        dtypes = Counter(DTYPE_NAMES[tensor.dtype] for tensor in kept.values())
        sizes = Counter()
        for name, tensor in kept.items():
            sizes[name.split(".")[0]] += tensor.numel()
        lines = [
            f"{self.path}: {kind}" + (f", Motus stage {stage}" if stage else ""),
            f"  {len(kept)} tensors, {sizes.total():,} parameters, {dict(dtypes)}",
        ]
        if kind.startswith("motus"):
            lines += [f"  {part:8} {size:15,} parameters" for part, size in sizes.items()]
        if dropped := len(self.tensors) - len(kept):
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
    end = 0
    # Widest first keeps every tensor aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    header.pop("__metadata__", None)
    begins = {name: len(start) + entry["data_offsets"][0] for name, entry in header.items()}
    return start, begins, len(start) + end


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors, one at a time, as a safetensors file; atomic. ValueError for a dtype that the
    format has no name for here."""
    check_dtypes(Path(path), {name: tensor.dtype for name, tensor in tensors.items()})
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    start, begins, _ = safetensors_header(kinds, metadata)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(start)
            for name in begins:
                file.write(raw_bytes(tensors[name]).numpy())

    replace_file(Path(path), write)


def plain_json(value: object) -> str:
    """Json that every reader takes: what is not finite is null."""
    text = json.dumps(value, default=os.fspath)
    return json.dumps(json.loads(text, parse_constant=lambda word: None), indent=1)


def write_json(path: Path, value: object) -> None:
    replace_file(path, lambda temporary: temporary.write_text(plain_json(value)))


def digest(tensors: Mapping[str, Tensor], *about: str) -> str:
    """Sixteen hexadecimal digits that change with any name, dtype, shape or byte of the tensors, or
    with `about`."""
    state = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        value = tensors[name]
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(raw_bytes(value).numpy())
    return state.hexdigest()[:16]


def config_beside(source: TensorSource) -> dict:
    """The config.json of a weight file: kept in the metadata by `convert`, else in its folder,
    else, for folders of DeepSpeed, above it."""
    if "official_config" in source.metadata:
        return parse_json(source.path, source.metadata["official_config"].encode())
    folder = source.path.parent
    path = folder / "config.json"
    if folder.name == "pytorch_model" and not path.is_file():
        path = folder.parent / "config.json"
    return read_json(path) if path.is_file() else {}


def check_keys(stored: dict, kind: type, source: object) -> None:
    """Refuses keys that a dataclass does not have, naming the nearest one it has, and numbers out
    of their range."""
    names = [f.name for f in fields(kind)]
    for key in stored:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, 0.0)[0]
            raise Refusal(
                f"{source}: unknown key {key!r} for {kind.__name__}; did you mean {near!r}?"
                f" (allowed: {', '.join(names)})"
            )
    check_numbers(source, kind, stored)


TYPES = {
    str: "a text",
    str | None: "a text",
    dict: "{field: choice}",
    bool: "true or false",
    bool | None: "true or false",
    tuple: "a list",
}


def check_types(label: str, made: object) -> None:
    """Refuses values of a dataclass that are not of the types of their fields, as far as these are
    TYPES; numbers have ranges of their own."""
    for f in fields(made):
        value = getattr(made, f.name)
        if f.type in TYPES and not isinstance(value, f.type):
            raise ValueError(f"{label}: {f.name} is {value!r:.80}; expected {TYPES[f.type]}")


def as_tuples(stored: Mapping) -> dict:
    """Fields as a dataclass has them: json makes lists of tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}


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
