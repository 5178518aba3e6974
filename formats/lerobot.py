"""LeRobot datasets with pyarrow and av alone: v2.1 and v3.0 are read, v3.0 is written.

    dataset = LeRobotDataset("folder")      # `describe` says which columns were chosen
    window = dataset.window(episode, 1.5, video_times=[0, 0.2, 0.4], action_times=[0, 0.033, 0.067])

    v2.1  meta/{info.json, tasks.jsonl, episodes.jsonl}
          one parquet, and one mp4 per camera, for each episode
    v3.0  meta/{info.json, tasks.parquet, episodes/**}
          many episodes in each parquet and mp4; meta/episodes says where each lies

The picture of row i of an episode is at from_timestamp + i / fps in the mp4 (from_timestamp is 0 in
v2.1). Only what is read is tested, and may be refused: state, actions and cameras that are chosen,
timestamps, and tasks unless the mapping gives an instruction. Pictures inside parquet files,
LeRobot's dtype image, are no camera: convert them to videos.

Shapes: E episodes, T rows of one, H W pixels, D dimensions of a vector.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from formats.recordings import (
    AGAIN,
    MISSING,
    TOLERANCE,
    Folder,
    Given,
    Numbers,
    Storage,
    VideoWriter,
    av,
    noting,
)
from formats.statistics import moments, pooled
from weights.files import plain_json, read_json
from weights.options import checked

try:
    import pyarrow as pa
    import pyarrow.json as pj
    import pyarrow.parquet as pq
except ImportError:
    pa = pj = pq = None

# Rows of an episode, episodes of a dataset: above any honest one, and still small in memory.
MAX_ROWS = 1_000_000
SIDES = range(1, (1 << 14) + 1)  # pixels, dimensions
MAX_META = 256 << 20  # bytes of metadata
FILES = 1000  # in a folder that is written
PATHS = {
    "v3.0": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
    "v2.1": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
    },
}
NUMBERS = {"fps": float} | dict.fromkeys(("total_episodes", "total_frames", "chunks_size"), int)
STORAGE = Storage()
UNSTATED = ("", "unknown", "none", "null")  # robot_type, in lower case, that names no robot
FOREIGN = {"v3.0": ("tasks.jsonl", "episodes.jsonl"), "v2.1": ("tasks.parquet", "episodes")}
# Where an episode lies in the videos of a camera: columns of meta/episodes, in seconds at the end.
VIDEO = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
LABELS = "observation.environment_state"
# Columns that every dataset has; the last three may be absent: they say again what is known.
WHOLE = {"dtype": "int64", "shape": [1], "names": None}
DEFAULTS = {"timestamp": WHOLE | {"dtype": "float32"}} | dict.fromkeys(
    ("task_index", "frame_index", "episode_index", "index"), WHOLE
)
KNOWN_META = r"info\.json|stats\.json|tasks\.\w+|episodes(_stats)?(\.\w+)?"
# The lerobot package reads tasks with pandas, which learns from this that the text is the index.
PANDAS = """{"index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0",
"columns": [{"name": "task", "field_name": "task", "metadata": null,
             "pandas_type": "unicode", "numpy_type": "object"},
            {"name": "task_index", "field_name": "task_index", "metadata": null,
             "pandas_type": "int64", "numpy_type": "int64"}]}"""
# What a path of info.json may hold; nothing else of a template is filled in.
TEMPLATE = (
    r"([^{}]|\{video_key\}|\{(episode_chunk|chunk_index|episode_index|file_index)(:0\dd)?\})+"
)

# -- reading --------------------------------------------------------------------------------------


def flattened(column: "pa.Array") -> tuple[ndarray, "pa.Array"]:
    """How many values each row of a column holds (T,), and all of them in order."""
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.value_lengths().fill_null(0)), column.flatten()
    return np.ones(len(column), int), column


def numeric(kind: "pa.DataType") -> str:
    """Which sort of number a type is, in any precision; empty for what is none."""
    if pa.types.is_floating(kind):
        return "float"
    return "int" if pa.types.is_integer(kind) else ""


def by_file(chunk: ndarray, file: ndarray, begin: ndarray) -> tuple[ndarray, ndarray]:
    """Of E episodes: the number of each one's file, and where the first in that file begins."""
    _, which = np.unique(np.stack([chunk, file]), axis=1, return_inverse=True)
    which = which.ravel()
    opens = np.full(len(begin), np.inf)
    np.minimum.at(opens, which, begin)
    return which, opens[which]


class LeRobotDataset(Folder):
    """One LeRobot dataset, opened. See the head of this file.

    data_at    arrays (E,): chunk, file, row of that file at which an episode begins, rows of it
    video_at   the same by camera: chunk, file, seconds at which an episode begins, and the first
               one in its file
    """

    def __init__(self, root: Path, mapping: Given = None):
        super().__init__(root, mapping)
        self._read_info()
        self._choose()
        self.tasks = {} if self.told else self._read_tasks()
        self._read_episodes()

    # Metadata: every claim is held against the others before a table is read.

    def _read_info(self) -> None:
        path = self._path("meta/info.json")
        with self._reading("meta/info.json", "cannot be read:"):
            self.info = read_json(path)
        self.version = self.info.get("codebase_version")
        if self.version not in PATHS:
            problem = f"is {self.version!r}; convert it to one of {list(PATHS)}"
            raise self._fault("codebase_version", problem)
        for other in FOREIGN[self.version]:
            if (self.root / "meta" / other).exists():
                problem = f"belongs to another version than {self.version}"
                raise self._fault(f"meta/{other}", f"{problem}; keep the files of one version")
        for key, kind in NUMBERS.items():
            checked(f"dataset {self.name}, {key}:", "Dataset", key, self.info.get(key), kind)
        self.fps = self.info["fps"]
        robot = str(self.info.get("robot_type") or "").strip()
        self.stated = robot.lower() not in UNSTATED
        self.robot = robot or self.root.name
        features = self.info.get("features")
        if not isinstance(features, dict):
            raise self._fault("meta/info.json", f"has no features; {AGAIN}")
        self.features = {key: about for key, about in features.items() if isinstance(about, dict)}

    def _sizes(self, key: str) -> list:
        """The shape of a feature that is read, sizes as they must be."""
        feature = self.features[key]
        sizes = feature.get("shape")
        if not isinstance(sizes, list) or not all(n in SIDES for n in sizes):
            expected = f"a shape, sizes from 1 to {SIDES[-1]}: correct info.json"
            raise self._fault(key, f"feature is {feature!r:.80}; expected {expected}")
        return sizes

    def _candidates(self) -> tuple[list[str], list[str]]:
        """Features that can be state or actions, and cameras; `left_out`: other pictures."""
        vectors = []
        cameras = []
        self.left_out = []
        for key, feature in self.features.items():
            kind = str(feature.get("dtype"))
            shape = feature.get("shape")
            sizes = shape if isinstance(shape, list) else []
            if kind in ("video", "image"):
                depth = (feature.get("info") or {}).get("video.is_depth_map")
                colour = len(sizes) == 3 and 3 in sizes[::2] and not depth
                (cameras if kind == "video" and colour else self.left_out).append(key)
            elif re.match("u?int|float", kind) and key not in DEFAULTS:
                if shape != [0] and len(sizes) < 2:
                    vectors.append(key)
        return vectors, cameras

    def _parquet(
        self,
        path: Path,
        field: str,
        columns: Sequence[str],
        rows: int | None = None,
        episode: int | None = None,
    ) -> "pq.ParquetFile":
        """Opens a parquet file that must have these columns and this many rows."""
        with self._reading(field, f"{path.name} is no whole parquet file:", episode):
            file = pq.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
        for name in columns:
            if name not in names:
                problem = f"{path.name} has no such column; there are {names}"
                raise self._fault(name, problem, episode)
        count = file.metadata.num_rows
        if rows not in (None, count):
            problem = f"{path.name} has {count} rows, expected {rows}; {AGAIN}"
            raise self._fault(field, problem, episode)
        return file

    def _metadata(self, names: list[str], kinds: dict, rows: int | None = None) -> "pa.Table":
        """Columns of these kinds of files with so many rows: json lines in v2.1, parquet in v3.0.
        Nothing of a parquet file is read before its number of rows is known to be right."""
        paths = [self._path(name) for name in names]
        field = os.path.commonprefix(names) or "meta/episodes"
        size = sum(path.stat().st_size for path in paths)
        if size > MAX_META:
            raise self._fault(field, f"has {size} bytes; at most {MAX_META} are allowed")
        schema = pa.schema(kinds)
        if self.version == "v2.1":
            how = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            with self._reading(field, "cannot be read:"):
                table = pj.read_json(paths[0], parse_options=how)
            found = len(table)
        else:
            files = [self._parquet(path, name, schema.names) for path, name in zip(paths, names)]
            found = sum(file.metadata.num_rows for file in files)
        if found > MAX_ROWS or rows not in (None, found):
            problem = f"has {found} rows, info.json says {rows}; correct one of them"
            raise self._fault(field, problem)
        if self.version == "v2.1":
            return table
        with self._reading(field, "cannot be read:"):
            tables = (file.read(schema.names).select(schema.names).cast(schema) for file in files)
            table = pa.concat_tables(tables)
            table.validate(full=True)
        return table

    def _read_tasks(self) -> dict[int, str]:
        name = "meta/tasks.jsonl"
        text = "task"
        if self.version == "v3.0":
            name = "meta/tasks.parquet"
            # The text is a pandas index, which may have no name.
            columns = self._parquet(self._path(name), name, ()).schema_arrow.names
            text = "task" if "task" in columns else "__index_level_0__"
        table = self._metadata([name], {"task_index": pa.int64(), text: pa.string()})
        tasks = {}
        for index, task in map(dict.values, table.to_pylist()):
            if index is None or tasks.setdefault(index, task or "") != (task or ""):
                raise self._fault(
                    name, f"task {index} is {task!r:.60}; expected each whole task_index once"
                )
        return tasks

    def _episode_columns(self) -> dict[str, ndarray]:
        """Columns of meta/episodes as v3.0 has them, as numbers (E,) in the order of episodes; of
        the tasks, if they are read, how many each has. They become `episode_tasks`."""
        files = ["meta/episodes.jsonl"]
        names = ["episode_index", "length"]
        places = ["data", *(f"videos/{key}" for key in self.cameras)]
        if self.version == "v3.0":
            paths = (self.root / "meta/episodes").rglob("*.parquet")
            files = sorted(str(path.relative_to(self.root)) for path in paths)
            names += ["dataset_from_index", "dataset_to_index"]
            names += [f"data/{name}" for name in VIDEO[:2]]
            names += [f"{place}/{name}" for place in places[1:] for name in VIDEO]
        kinds = {name: pa.float64() if "timestamp" in name else pa.int64() for name in names}
        if not self.told:
            kinds["tasks"] = pa.list_(pa.string())
        table = self._metadata(files, kinds, self.info["total_episodes"])
        table = table.sort_by("episode_index")
        columns = {name: table[name].to_numpy() for name in names}
        if not self.told:
            self.episode_tasks = table["tasks"].combine_chunks()
            columns["tasks"] = self.episode_tasks.value_lengths().fill_null(0).to_numpy()
        if self.version == "v2.1":  # which does not say it: each episode has its own files
            length = columns["length"]
            number = np.arange(len(table))
            own = (number // self.info["chunks_size"], number, 0.0 * number, length / self.fps)
            for place in places:
                columns |= {f"{place}/{name}": values for name, values in zip(VIDEO, own)}
            end = np.cumsum(length)
            columns |= {"dataset_from_index": end - length, "dataset_to_index": end}
        return columns

    def _read_episodes(self) -> None:
        """Length and places of each episode; what meta/episodes says twice must agree."""
        columns = self._episode_columns()
        number = np.arange(self.info["total_episodes"])
        length = columns["length"]
        end = np.cumsum(length)
        start = end - length
        # Column, which episodes are right, remedy.
        remedy = f"expected a number from 0 on: {AGAIN}"
        checks = [(name, (x >= 0) & (x < np.inf), remedy) for name, x in columns.items()]
        remedy = "episodes must be 0, 1, 2, ...: one is missing or there twice"
        checks.append(("episode_index", columns["episode_index"] == number, remedy))
        remedy = f"an episode has 1 to {MAX_ROWS} rows: split or drop it"
        checks.append(("length", (length >= 1) & (length <= MAX_ROWS), remedy))
        if not self.told:
            checks.append(("tasks", columns["tasks"] > 0, "give each episode at least one"))
        remedy = "must count the rows of all episodes before"
        for name, wanted in {"dataset_from_index": start, "dataset_to_index": end}.items():
            checks.append((name, columns[name] == wanted, remedy))
        self.video_at = {}
        for key in self.cameras:
            names = [f"videos/{key}/{name}" for name in VIDEO]
            chunk, file, begin, close = map(columns.get, names)
            right = np.abs(close - begin - length / self.fps) <= 0.5 / self.fps
            checks.append((names[3], right, "must be from_timestamp + length / fps"))
            which, opens = by_file(chunk, file, begin)
            order = np.lexsort((begin, which))
            before, after = order[:-1], order[1:]
            late = (which[before] < which[after]) | (begin[after] >= close[before] - 0.5 / self.fps)
            remedy = "lies inside another episode's video: write meta/episodes again"
            checks.append((names[2], ~np.isin(number, after[~late]), remedy))
            place = (np.nan_to_num(x).astype(int) for x in (chunk, file))
            self.video_at[key] = (*place, begin, opens)
        for name, good, remedy in checks:
            for episode in np.flatnonzero(~good).tolist():
                if episode not in self.without:
                    raise self._fault(name, f"is {columns[name][episode]}; {remedy}", episode)
        if length.sum() != self.info["total_frames"]:
            problem = f"is {self.info['total_frames']}, the episodes have {length.sum()}"
            raise self._fault("total_frames", f"{problem}; correct info.json")
        # Within a data file rows run from its first episode; it has the rows of all its episodes.
        chunk, file = columns["data/chunk_index"], columns["data/file_index"]
        which, opens = by_file(chunk, file, start)
        self.data_at = (chunk, file, start - opens, np.bincount(which, length)[which])
        self.lengths = length

    def _choose(self) -> None:
        """Fills the gaps of the mapping; what it names must exist and be of the right kind."""
        given = self.given
        vectors, cameras = self._candidates()

        def first(*names: str) -> str:
            return next((name for name in names if name in vectors), "")

        self.titles = {
            "state": given.state or first("observation.state", "state"),
            "action": given.action or first("action", "actions"),
        }
        ready = [key for key in cameras if key.endswith("cam_concatenated")]
        self.cameras = given.cameras or tuple(ready or cameras)
        if given.t_layout and not given.cameras:
            found = []  # head, left and right by name
            for words in ("high|head|top|front", "left", "right"):
                last = re.compile(rf"({words})[^.]*$", re.IGNORECASE)
                found.append(list(filter(last.search, cameras)))
            if any(len(names) != 1 for names in found):
                problem = f"head, left, right could be {found}; name three of {cameras}"
                raise self._fault("cameras", problem)
            self.cameras = tuple(name for (name,) in found)
        for name in self.cameras or self.left_out:
            if name in self.left_out and self.features[name]["dtype"] == "image":
                problem = "has dtype image, pictures inside parquet files"
                raise self._fault(name, f"{problem}; expected video: convert the dataset")
        chosen = [(name, f"as {role}", vectors) for role, name in self.titles.items() if name]
        chosen += [(name, "as a camera", cameras) for name in self.cameras]
        for name, role, allowed in chosen:
            if name not in allowed:
                raise self._fault(name, f"is chosen {role} and is none here; choose from {allowed}")
        wrong = len(set(self.cameras)) != len(self.cameras)
        if given.t_layout:
            _, *wrists = self.cameras
            wrong |= len(wrists) != 2 or ("right" in wrists[0] and "left" in wrists[1])
        if wrong:
            expected = "each once, and for the T-layout head, left, right in this order"
            raise self._fault("cameras", f"are {list(self.cameras)}; {expected}")
        self.axes = [self._axes(key) for key in self.titles.values()]
        self.widths = tuple(self._sizes(key)[0] if key else 0 for key in self.titles.values())
        self.sizes = {}  # camera -> height, width
        for key in self.cameras:
            shape = self._sizes(key)
            self.sizes[key] = tuple(shape[:2] if shape[2] == 3 else shape[1:])
        self.unused = [key for key in cameras + self.left_out if key not in self.cameras]

    def _axes(self, key: str) -> list[str] | None:
        """Names of a vector's numbers, where they say more than their place."""
        names = self.features[key].get("names") if key else None
        if isinstance(names, dict):
            names = next(iter(names.values()), None)
        told = isinstance(names, list) and not all(str(name).isdigit() for name in names)
        return names if told else None

    def _file(self, field: str, episode: int, chunk: int, file: int, key: str = "") -> Path:
        """The path that a template of info.json gives. Only plain fields are filled in."""
        template = str(self.info.get(field) or "")
        if not re.fullmatch(TEMPLATE, template):
            expected = PATHS[self.version][field]
            problem = f"is {self.info.get(field)!r:.100}; write it as {expected}"
            raise self._fault(field, problem, episode)
        name = template.format(
            episode_chunk=chunk,
            chunk_index=chunk,
            episode_index=episode,
            file_index=file,
            video_key=key,
        )
        return self._path(name, episode, key or field)

    # Numbers.

    def _table(self, episode: int, columns: Sequence[str], more: Sequence[str] = ()) -> "pa.Table":
        """An episode's columns from its data file, and those of `more` that it has; read are the
        row groups in which the episode lies."""
        chunk, file, offset, rows = (int(x[episode]) for x in self.data_at)
        path = self._file("data_path", episode, chunk, file)
        key = ("data", path, *columns)
        opened = self.open_files.take(key) or self._parquet(path, "data", columns, rows, episode)
        columns = [*columns, *filter(opened.schema_arrow.names.__contains__, more)]
        length = int(self.lengths[episode])
        groups = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        ends = np.cumsum(groups)
        first, last = np.searchsorted(ends, [offset, offset + length - 1], "right")
        with self._reading("data", f"{path.name} breaks while it is read:", episode):
            table = opened.read_row_groups(range(first, last + 1), columns, use_threads=False)
        self.open_files.put(key, opened)
        return table.slice(offset - ends[first] + groups[first], length)

    def _values(self, episode: int, key: str, column: "pa.Array") -> ndarray:
        """A column (T, D), all of it finite: of the dtype and width that info.json says, the five
        of every dataset in any precision."""
        feature = DEFAULTS.get(key) or self.features[key]
        dtype = feature["dtype"]
        width = feature["shape"][0]
        widths, values = flattened(column)
        empty = column.null_count + values.null_count
        kind = pa.type_for_alias(dtype)
        right = values.type == kind
        if key in DEFAULTS:
            right = numeric(values.type) == numeric(kind)
        if not right or empty or (widths != width).any():
            raise self._fault(
                key,
                f"has {len(values)} values of type {values.type} in {len(column)} rows, {empty} of "
                f"them empty, expected {width} of {dtype} in each; {AGAIN}",
                episode,
            )
        rows = values.to_numpy(zero_copy_only=False).reshape(-1, width).copy()
        return self._finite(key, rows, episode)

    def _load(self, episode: int, *more: str) -> dict[str, ndarray]:
        """Columns of an episode, each (T, D); an error names every fault in them."""
        time, task, *others = DEFAULTS
        keys = [time, *([] if self.told else [task]), *filter(None, self.titles.values()), *more]
        table = self._table(episode, list(dict.fromkeys(keys)), others)
        rows = {}
        faults = []
        for key in table.column_names:
            with noting(faults):
                rows[key] = self._values(episode, key, table[key].combine_chunks())
        at = np.arange(len(table))[:, None]
        expected = {
            "frame_index": at,
            "episode_index": np.full_like(at, episode),
            "index": rows.get("index", at)[:1] + at,  # episodes before may have been taken out
            "timestamp": at / self.fps,
        }
        for key, wanted in expected.items():
            # Seconds in float32 are coarse late in an episode.
            slack = TOLERANCE + 1e-7 * wanted if key == "timestamp" else 0
            found = rows.get(key, wanted)
            for row in np.flatnonzero(np.abs(found - wanted) > slack)[:1]:
                problem = f"row {row} is {found[row, 0]}, expected {wanted[row, 0]:.10g}"
                remedy = f"rows must follow at {self.fps} fps: other fps, a gap, or another order?"
                faults.append(str(self._fault(key, f"{problem}; {remedy}", episode)))
        for unknown in set(rows.get("task_index", at[:0]).flat) - self.tasks.keys():
            remedy = f"add the task, or choose from {sorted(self.tasks)[:20]}"
            problem = f"is {unknown}, which meta/tasks lacks; {remedy}"
            faults.append(str(self._fault("task_index", problem, episode)))
        if faults:
            raise ValueError("\n".join(faults))
        return rows

    def rows(self, episode: int, *more: str) -> dict[str, ndarray]:
        """The tested columns of an episode: state (T, P) and action (T, A) under their own names,
        those of LeRobot's five that are here (T, 1), and `more`."""
        key = ("rows", episode, *more)
        rows = self.open_files.take(key)
        if rows is None:
            rows = self._load(episode, *more)
        self.open_files.put(key, rows)
        return rows

    def numbers(self, episode: int) -> Numbers:
        rows = self.rows(episode)
        return rows.get(self.titles["state"]), rows.get(self.titles["action"])

    def labels(self, episode: int) -> dict[str, ndarray]:
        """Facts that only the simulator knew, as `worlds.World.labels` says: name -> (T,); empty if
        it was not recorded, or without names. It is there for frozen backbones to learn from; no
        window holds it, so no policy is given it."""
        names = self.features.get(LABELS, {}).get("names")
        if not isinstance(names, list):
            return {}
        rows = self.rows(episode, LABELS)[LABELS]
        if len(names) != rows.shape[1]:
            raise self._fault(
                LABELS, f"has {len(names)} names for {rows.shape[1]} numbers; give each its name"
            )
        return dict(zip(names, rows.T))

    def recorded_texts(self, episode: int, row: int | None = None) -> list[str]:
        indices = self.rows(episode)["task_index"].ravel()
        if row is not None:
            indices = indices[[row]]
        return list(dict.fromkeys(map(self.tasks.get, indices.tolist())))

    def group(self, episode: int) -> str:
        """Its first task; with one instruction for all there is one."""
        return self.given.instruction if self.told else self.episode_tasks[episode][0].as_py()

    def wordings(self) -> set[str]:
        return set(self.episode_tasks.take(pa.array(self.episodes)).flatten().to_pylist())

    # Copies.

    def whole(self, cameras: Sequence[str] = ()) -> "LeRobotDataset":
        cameras = tuple(cameras or self._candidates()[1])
        given = replace(self.given, cameras=cameras, t_layout=False, instruction=None)
        return type(self)(self.root, given)

    def stored(self, episode: int) -> tuple:
        """With all columns as they are, and the task of each row."""
        table = self._table(episode, (), [key for key in self.features if key not in DEFAULTS])
        columns = {k: (self.features[k], table[k].combine_chunks()) for k in table.column_names}
        tasks = [self.tasks[index] for index in self.rows(episode)["task_index"].flat]
        views = self.views(episode, range(self.lengths[episode]))
        return views, None, None, tasks, None, columns

    def left_behind(self) -> list[str]:
        there = {*self.cameras, *DEFAULTS, *self._table(0, (), list(self.features)).column_names}
        found = [f"feature {key}" for key in self.features if key not in there]
        for path in sorted([*self.root.glob("*"), *self.root.glob("meta/*")]):
            inner = str(path.relative_to(self.root))
            if not re.fullmatch(f"data|videos|meta(/({KNOWN_META}))?", inner):
                found.append(inner)
        splits = self.info.get("splits") or {}
        if len(splits) > 1:
            found.append(f"splits {splits}")
        return found

    # Pictures.

    def pictures(self, episode: int, camera: str, rows: Sequence[int]) -> Iterator[ndarray]:
        """Pictures (H, W, 3) uint8 of these rows, which must rise."""
        chunk, file, origin, opens = (x[episode].item() for x in self.video_at[camera])
        path = self._file("video_path", episode, chunk, file, camera)
        opens = None if self.version == "v2.1" else opens
        yield from self._decode(episode, camera, rows, path, origin, opens)

    def describe(self) -> str:
        how = {k: "as told" if v else "chosen automatically" for k, v in vars(self.given).items()}
        frames = self.info["total_frames"]
        state, action = (name or "none" for name in self.titles.values())
        sizes = (f"{key} ({height} x {width})" for key, (height, width) in self.sizes.items())
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        layout = ", as one T-layout" if self.given.t_layout else ""
        tasks = "one instruction" if self.told else f"{len(self.tasks)} tasks"
        return (
            f"{self.name}: LeRobot {self.version}, robot {self.info.get('robot_type')}, "
            f"{len(self.lengths)} episodes, {frames} rows at {self.fps} fps "
            f"({frames / self.fps / 3600:.2f} h), {tasks}\n"
            f"  state    {state} ({self.widths[0]}), {how['state']}\n"
            f"  actions  {action} ({self.widths[1]}), {how['action']}\n"
            f"  cameras  {', '.join(sizes) or 'none'}, {how['cameras']}{layout}{unused}"
        )


# -- writing --------------------------------------------------------------------------------------


STATS = ("count", "mean", "std", "min", "max")


def named(blocks: Sequence[Tensor], feature: dict) -> dict[str, list]:
    """Statistics of `moments` as LeRobot stores them: (D,), of pictures (3, 1, 1); of the count one
    number."""
    shape = (-1, 1, 1) if feature["dtype"] == "video" else (-1,)
    values = {name: x.reshape(shape).tolist() for name, x in zip(STATS, pooled(blocks))}
    return values | {"count": [int(np.ravel(values["count"])[0])]}


def statistics_of(column: "pa.Array") -> list[Tensor]:
    """`moments` of a column whose rows hold as many numbers each; of others none."""
    widths, values = flattened(column)
    if not numeric(values.type) or values.null_count or np.ptp(widths):
        return []
    rows = values.to_numpy(zero_copy_only=False).reshape(len(widths), -1)
    return [moments(torch.from_numpy(rows.astype(np.float64)))]


class Writer:
    """A v3.0 dataset being written under ROOT.part, which gets its name when it is whole."""

    def __init__(self, root: str | Path, fps: float, storage: Storage):
        if av is None:
            raise ValueError(MISSING)
        self.final = Path(root)
        self.fps = fps
        self.storage = storage
        self.root = self.final.with_name(self.final.name + ".part")
        for folder in (self.final, self.root):
            if folder.exists():
                raise ValueError(f"dataset {folder} exists; remove it or write elsewhere")
        self.features = {}
        self.episodes = []  # rows of meta/episodes
        self.stats = defaultdict(list)  # column or camera -> of each episode
        self.tasks = {}  # text -> number
        self.total = 0  # rows
        self.videos = {}
        self.data = None

    def _fault(self, field: str, problem: str) -> ValueError:
        number = len(self.episodes)
        return ValueError(f"dataset {self.final}, episode {number}, {field}: {problem}")

    def _place(self) -> tuple[int, int]:
        """Folder and number of the files in use."""
        return divmod(len(self.episodes) // self.storage.together, FILES)

    def _file(self, field: str, key: str = "") -> Path:
        chunk, file = self._place()
        name = PATHS["v3.0"][field].format(chunk_index=chunk, file_index=file, video_key=key)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(
        self,
        frames: Mapping[str, Iterable[ndarray]],
        states: ndarray | None,
        actions: ndarray | None,
        task: str | Sequence[str],
        labels: Mapping[str, Sequence[float]] | None = None,
        columns: Mapping[str, tuple] | None = None,
    ) -> None:
        """One episode; `task`: of all rows, or of each; `labels`: name -> T numbers; `columns`:
        name -> feature and pyarrow array (T,), as another dataset has them."""
        if not task or not isinstance(task, list | str):
            raise self._fault("task", f"is {task!r}; give each episode its instruction")
        vectors = {"observation.state": states, "action": actions}
        if labels:
            vectors[LABELS] = np.stack(list(labels.values()), axis=1)
        columns = dict(columns or {})
        for key, rows in vectors.items():
            if rows is not None:
                columns[key] = self._vector(key, np.asarray(rows, np.float32), labels)
        features = {key: feature for key, (feature, _) in columns.items()}
        values = {key: column for key, (_, column) in columns.items()}
        lengths = {key: len(column) for key, column in values.items()}
        for key, column in values.items():
            self.stats[key] += statistics_of(column)
        for name, pictures in frames.items():
            key = name if name.startswith("observation.") else f"observation.images.{name}"
            lengths[key], shape, found = self._write_video(key, pictures)
            self.stats[key].append(found)
            axes = ["height", "width", "channels"]
            features[key] = {"dtype": "video", "shape": shape, "names": axes}
        length = max(lengths.values(), default=0)
        for key, count in lengths.items():
            if count < length:
                problem = f"has {count} rows for {length} of others; expected as many"
                raise self._fault(key, problem)
        self.features = self.features or features
        if features != self.features or not features:
            found = {key: feature["shape"] for key, feature in features.items()}
            problem = f"are {found}; expected the cameras and widths of episode 0"
            raise self._fault("features", problem)
        tasks = [task] * length if isinstance(task, str) else task
        self._write_rows(values, [self.tasks.setdefault(t, len(self.tasks)) for t in tasks])
        self._write_episode(list(dict.fromkeys(tasks)), length)
        if len(self.episodes) % self.storage.together == 0:
            self._close()

    def _vector(self, key: str, rows: ndarray, labels: Mapping | None) -> tuple[dict, "pa.Array"]:
        """The feature and the column of rows (T, D) float32."""
        if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
            problem = f"is {rows.shape} with {(~np.isfinite(rows)).sum()} not finite"
            raise self._fault(key, f"{problem}; give finite (rows, dimensions)")
        width = rows.shape[1]
        values = pa.array(rows.ravel())
        if width > 1:
            values = pa.FixedSizeListArray.from_arrays(values, width)
        names = list(labels) if key == LABELS else list(map(str, range(width)))
        return {"dtype": "float32", "shape": [width], "names": names}, values

    def _write_video(self, key: str, pictures: Iterable[ndarray]) -> tuple[int, list[int], Tensor]:
        """Adds an episode to a camera's mp4: number of pictures, shape, statistics of a few."""
        some = []  # rows of colours (n, 3)
        count = 0
        shape = ()  # of the first picture
        for picture in map(np.asarray, pictures):
            shape = shape or picture.shape
            if picture.dtype != np.uint8 or picture.shape != (*shape[:2], 3):
                problem = f"picture {count} is {picture.dtype} {picture.shape}"
                raise self._fault(key, f"{problem}; expected uint8 (H, W, 3) of one size")
            if key not in self.videos:
                path = self._file("video_path", key)
                self.videos[key] = VideoWriter(path, self.fps, shape[:2], self.storage)
            self.videos[key].add(picture, first=count == 0)
            if count % 10 == 0:
                some.append(picture[::4, ::4].reshape(-1, 3))
            count += 1
        if not some:
            raise self._fault(key, "has no pictures; give one for each row")
        found = moments(torch.from_numpy(np.concatenate(some) / 255))
        found[[0, 2]] /= len(some[0])  # LeRobot counts pictures
        return count, list(shape), found

    def _write_rows(self, columns: dict[str, "pa.Array"], tasks: list[int]) -> None:
        """Adds an episode to the data file, which is opened if there is none."""
        at = np.arange(len(tasks))
        values = (at / self.fps, tasks, at, 0 * at + len(self.episodes), self.total + at)
        for (key, feature), numbers in zip(DEFAULTS.items(), values):
            columns[key] = np.asarray(numbers, feature["dtype"])
        table = pa.table(columns)
        if self.data is None:
            path = self._file("data_path")
            self.data = pq.ParquetWriter(path, table.schema, write_page_checksum=True)
        self.data.write_table(table)

    def _write_episode(self, tasks: list[str], length: int) -> None:
        """The episode's row of meta/episodes: places and tasks."""
        chunk, file = self._place()
        row = {
            "episode_index": len(self.episodes),
            "tasks": tasks,
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self.total,
            "dataset_to_index": self.total + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, video in self.videos.items():
            end = video.frames / self.fps
            place = (chunk, file, end - length / self.fps, end)
            row |= {f"videos/{key}/{name}": value for name, value in zip(VIDEO, place)}
        self.episodes.append(row)
        self.total += length

    def _close(self) -> None:
        """Closes the open files; the next episode opens others."""
        for file in filter(None, (self.data, *self.videos.values())):
            file.close()
        self.data = None
        self.videos = {}

    def finish(self) -> None:
        """Metadata, and the final name."""
        self._close()
        if not self.episodes:
            raise ValueError(f"dataset {self.final}: no episodes; give at least one")
        meta = self.root / "meta"
        folder = meta / "episodes/chunk-000"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), folder / "file-000.parquet")
        tasks = {"task_index": pa.array(self.tasks.values()), "task": pa.array(self.tasks)}
        tasks = pa.table(tasks, metadata={"pandas": PANDAS})
        pq.write_table(tasks, meta / "tasks.parquet")
        known = {key: blocks for key, blocks in self.stats.items() if blocks}
        whole = {key: named(blocks, self.features[key]) for key, blocks in known.items()}
        (meta / "stats.json").write_text(plain_json(whole), "utf-8")
        count = len(self.episodes)
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.storage.robot,
            "total_episodes": count,
            "total_frames": self.total,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES,
            "fps": self.fps,
            "splits": {"train": f"0:{count}"},
            **PATHS["v3.0"],
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "features": self.features | DEFAULTS,
        }
        if not (self.root / "videos").exists():  # no camera
            info["video_path"] = None
        (meta / "info.json").write_text(plain_json(info), "utf-8")
        os.replace(self.root, self.final)


def write_v3(
    root: str | Path, episodes: Iterable[tuple], fps: float, storage: Storage = STORAGE
) -> None:
    """Writes a v3.0 dataset. episodes: what `Writer.add` takes, at least (frames, states (T, P) or
    None, actions (T, A) or None, task); frames is a dict camera -> T pictures (H, W, 3) uint8, any
    iterable; labels are facts that only a simulator knows. ValueError for what is wrong in them;
    nothing is left behind then."""
    writer = Writer(root, fps, storage)
    try:
        for episode in episodes:
            writer.add(*episode)
        writer.finish()
    except BaseException:
        shutil.rmtree(writer.root, ignore_errors=True)
        raise
