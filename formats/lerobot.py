"""LeRobot datasets with pyarrow and av alone: v2.1 and v3.0 are read, v3.0 is written.

    dataset = LeRobotDataset.open("folder")      # or a hub name; the choice of columns is printed
    window = dataset.window(episode, 1.5, video_times=[0, 0.2, 0.4], action_times=[0, 0.033, 0.067])

    v2.1  meta/{info.json, tasks.jsonl, episodes.jsonl}
          one parquet, and one mp4 per camera, for each episode
    v3.0  meta/{info.json, tasks.parquet, episodes/**}
          many episodes in each parquet and mp4; meta/episodes says where each lies

The picture of row i of an episode is at from_timestamp + i / fps in the mp4 (from_timestamp is 0 in
v2.1). Pictures inside parquet files, LeRobot's dtype image, are refused: convert them to videos.

Shapes: E episodes, T rows of one, H W pixels, D dimensions of a vector.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from formats.recordings import (
    AGAIN,
    MISSING,
    TOLERANCE,
    Choice,
    Folder,
    Storage,
    VideoWriter,
    av,
)
from weights.files import read_json

try:
    import pyarrow as pa
    import pyarrow.json as pj
    import pyarrow.parquet as pq
except ImportError:
    pa = pj = pq = None

# Rows of an episode, episodes of a dataset: above any honest one, and still small in memory.
MAX_ROWS = 1_000_000
MAX_SIDE = 1 << 14  # pixels, dimensions
MAX_META = 256 << 20  # bytes of metadata
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
LIMITS = {
    "fps": 1000,
    "total_episodes": MAX_ROWS,
    "total_frames": 1000 * MAX_ROWS,
    "chunks_size": MAX_ROWS,
}
FOREIGN = {"v3.0": ("tasks.jsonl", "episodes.jsonl"), "v2.1": ("tasks.parquet", "episodes")}
# Where an episode lies in the videos of a camera: columns of meta/episodes, in seconds at the end.
VIDEO = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
LABELS = "observation.environment_state"
WHOLE = {"dtype": "int64", "shape": [1], "names": None}
DEFAULTS = {
    "timestamp": WHOLE | {"dtype": "float32"},
    "frame_index": WHOLE,
    "episode_index": WHOLE,
    "index": WHOLE,
    "task_index": WHOLE,
}
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


class LeRobotDataset(Folder):
    """One LeRobot dataset, opened. See the head of this file.

    data_at    arrays (E,): chunk, file, row of that file at which an episode begins, rows of it
    video_at   the same by camera: chunk, file, seconds at which an episode begins
    start      (E,) number of an episode's first row in the whole dataset
    """

    def __init__(self, root: Path, mapping: Choice | Mapping | None = None):
        super().__init__(root, mapping)
        self._read_info()
        self._read_features()
        self.tasks = self._read_tasks()
        self._read_episodes()
        self._choose()

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
        for key, limit in LIMITS.items():
            value = self.info.get(key)
            kinds = (int, float) if key == "fps" else (int,)
            if type(value) not in kinds or not 0 < value <= limit:
                expected = f"a number above 0 and at most {limit}, whole but for fps"
                raise self._fault(key, f"is {value!r:.50}; expected {expected}")
        self.fps = self.info["fps"]
        self.robot = str(self.info.get("robot_type") or self.root.name)

    def _read_features(self) -> None:
        self.features = self.info.get("features")
        if not isinstance(self.features, dict):
            raise self._fault("meta/info.json", f"has no features; {AGAIN}")
        self.sizes = {}  # camera -> height, width
        self.left_out = []  # depth maps and the like
        for key, feature in self.features.items():
            shape = feature.get("shape") if isinstance(feature, dict) else None
            sizes = shape if isinstance(shape, list) else [None]
            sound = all(type(n) is int and 0 < n <= MAX_SIDE for n in sizes)
            if not sound or not isinstance(feature.get("dtype"), str):
                expected = f"dtype and shape, sizes from 1 to {MAX_SIDE}"
                raise self._fault(key, f"feature is {feature!r:.80}; expected {expected}")
            if feature["dtype"] == "image":
                problem = "has dtype image, pictures inside parquet files"
                raise self._fault(key, f"{problem}; expected video: convert the dataset")
            if feature["dtype"] != "video":
                continue
            depth = (feature.get("info") or {}).get("video.is_depth_map")
            if depth or len(shape) != 3 or 3 not in (shape[0], shape[2]):
                self.left_out.append(key)
            else:
                self.sizes[key] = tuple(shape[:2] if shape[2] == 3 else shape[1:])

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

    def _metadata(self, names: list[str], rows: int | None, kinds: dict) -> "pa.Table":
        """Columns of these kinds of files with so many rows: json lines in v2.1, parquet in v3.0.
        Nothing of a parquet file is read before its number of rows is known to be right."""
        paths = [self._path(name) for name in names]
        field = os.path.commonprefix(names) or "meta/episodes"
        size = sum(path.stat().st_size for path in paths)
        if size > MAX_META:
            raise self._fault(field, f"has {size} bytes; at most {MAX_META} are allowed")
        schema = pa.schema(kinds)
        if self.version == "v2.1":
            parse = pj.ParseOptions(schema, unexpected_field_behavior="ignore")
            read = pj.ReadOptions(block_size=MAX_META)  # a line lies in one block
            with self._reading(field, "cannot be read:"):
                files = [pj.read_json(path, read, parse) for path in paths]
            found = sum(map(len, files))
        else:
            files = [self._parquet(path, name, schema.names) for path, name in zip(paths, names)]
            found = sum(file.metadata.num_rows for file in files)
        if rows not in (None, found):
            problem = f"has {found} rows, info.json says {rows}; correct one of them"
            raise self._fault(field, problem)
        with self._reading(field, "cannot be read:"):
            if self.version == "v3.0":
                files = [file.read(schema.names) for file in files]
            table = pa.concat_tables(file.select(schema.names).cast(schema) for file in files)
            table.validate(full=True)
        return table

    def _read_tasks(self) -> dict[int, str]:
        name = "meta/tasks.jsonl"
        text = "task"
        rows = None
        if self.version == "v3.0":
            name = "meta/tasks.parquet"
            rows = self.info.get("total_tasks")
            # The text is a pandas index, which may have no name.
            columns = self._parquet(self._path(name), name, ()).schema_arrow.names
            text = "task" if "task" in columns else "__index_level_0__"
        table = self._metadata([name], rows, {"task_index": pa.int64(), text: pa.string()})
        tasks = {}
        for index, task in zip(*(column.to_pylist() for column in table.columns)):
            if index is None or not task or index in tasks:
                expected = "each whole task_index once, with a text"
                raise self._fault(name, f"task {index} is {task!r:.60}; expected {expected}")
            tasks[index] = task
        return tasks

    def _episode_columns(self) -> dict[str, ndarray]:
        """Columns of meta/episodes as numbers (E,) in the order of episodes; of the tasks, which
        become `episode_tasks`, how many each has."""
        files = ["meta/episodes.jsonl"]
        names = ["episode_index", "length"]
        if self.version == "v3.0":
            paths = (self.root / "meta/episodes").rglob("*.parquet")
            files = sorted(str(path.relative_to(self.root)) for path in paths)
            names += ["dataset_from_index", "dataset_to_index"]
            names += ["data/chunk_index", "data/file_index"]
            names += [f"videos/{key}/{name}" for key in self.sizes for name in VIDEO]
        kinds = {name: pa.float64() if "timestamp" in name else pa.int64() for name in names}
        kinds["tasks"] = pa.list_(pa.string())
        table = self._metadata(files, self.info["total_episodes"], kinds)
        columns = {}
        for name in names:
            columns[name] = table[name].to_numpy()
            good = (columns[name] >= 0) & (columns[name] < np.inf)
            if table[name].null_count or not good.all():
                problem = "has values that are null, negative or not finite"
                raise self._fault(name, f"{problem}; {AGAIN}")
        order = np.argsort(columns["episode_index"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        self.episode_tasks = table["tasks"].combine_chunks().take(pa.array(order))
        return columns | {"tasks": np.asarray(self.episode_tasks.value_lengths().fill_null(0))}

    def _read_episodes(self) -> None:
        """Length and places of each episode; what meta/episodes says twice must agree."""
        columns = self._episode_columns()
        number = np.arange(self.info["total_episodes"])
        length = columns["length"]

        start = np.cumsum(length) - length
        remedy = "episodes must be 0, 1, 2, ...: one is missing or there twice"
        # Column, which episodes are right, remedy.
        checks = [("episode_index", columns["episode_index"] == number, remedy)]
        remedy = f"an episode has 1 to {MAX_ROWS} rows: split or drop it"
        checks.append(("length", (length >= 1) & (length <= MAX_ROWS), remedy))
        checks.append(("tasks", columns["tasks"] > 0, "give each episode at least one"))
        for name, wanted in (("from", start), ("to", start + length)):
            name = f"dataset_{name}_index"
            remedy = "must count the rows of all episodes before"
            checks.append((name, columns.get(name, wanted) == wanted, remedy))
        # In v2.1, which does not say it, each episode has its own files.
        own = (number // self.info["chunks_size"], number, 0.0 * number, length / self.fps)
        self.video_at = {}
        for key in self.sizes:
            names = [f"videos/{key}/{name}" for name in VIDEO]
            chunk, file, begin, end = (columns.get(*pair) for pair in zip(names, own))
            right = np.abs(end - begin - length / self.fps) <= 0.5 / self.fps
            checks.append((names[3], right, "must be from_timestamp + length / fps"))
            order = np.lexsort((begin, file, chunk))
            other_file = np.diff([chunk[order], file[order]]).any(axis=0)
            gap = begin[order[1:]] - end[order[:-1]]
            apart = np.ones(len(number), bool)
            apart[order[1:]] = other_file | (gap >= -0.5 / self.fps)
            remedy = "lies inside another episode's video: write meta/episodes again"
            checks.append((names[2], apart, remedy))
            _, which = np.unique([chunk, file], axis=1, return_inverse=True)
            opens = np.full(len(number), np.inf)
            np.minimum.at(opens, which, begin)
            self.video_at[key] = (chunk, file, begin, opens[which])
        for name, good, remedy in checks:
            for episode in np.flatnonzero(~good)[:1]:
                raise self._fault(name, f"is {columns[name][episode]}; {remedy}", episode)
        if length.sum() != self.info["total_frames"]:
            problem = f"is {self.info['total_frames']}, the episodes have {length.sum()}"
            raise self._fault("total_frames", f"{problem}; correct info.json")
        # Within a data file rows run from its first episode; it has the rows of all its episodes.
        chunk = columns.get("data/chunk_index", own[0])
        file = columns.get("data/file_index", own[1])
        _, first, which = np.unique(
            np.stack([chunk, file]), axis=1, return_index=True, return_inverse=True
        )
        which = which.ravel()
        rows = np.bincount(which, length).astype(int)
        self.data_at = (chunk, file, start - start[first[which]], rows[which])
        self.start = start
        self.lengths = length

    def _choose(self) -> None:
        """Fills the gaps of the mapping; what it names must exist and be of the right kind."""
        given = self.given
        vectors = [""]
        for key, feature in self.features.items():
            plain = feature["dtype"].startswith(("float", "int")) and len(feature["shape"]) == 1
            if plain and key not in DEFAULTS:
                vectors.append(key)

        def first(*names: str) -> str:
            return next((name for name in names if name in vectors), "")

        self.titles = {
            "state": given.state or first("observation.state", "state"),
            "action": given.action or first("action", "actions"),
        }
        ready = [key for key in self.sizes if key.endswith("cam_concatenated")]
        self.cameras = given.cameras or tuple(ready or self.sizes)
        if given.t_layout and not given.cameras:
            found = []  # head, left and right by name
            for words in ("high|head|top|front", "left", "right"):
                last = re.compile(rf"({words})[^.]*$", re.IGNORECASE)
                found.append(list(filter(last.search, self.sizes)))
            if any(len(names) != 1 for names in found):
                problem = f"head, left, right could be {found}; name three of {list(self.sizes)}"
                raise self._fault("cameras", problem)
            self.cameras = tuple(name for (name,) in found)
        chosen = [(name, f"as {role}", vectors) for role, name in self.titles.items()]
        chosen += [(name, "as a camera", list(self.sizes)) for name in self.cameras]
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
        names = self.titles.values()
        self.widths = tuple(self.features[key]["shape"][0] if key else 0 for key in names)

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

    def _table(self, episode: int, columns: Sequence[str]) -> "pa.Table":
        """An episode's columns from its data file; read are the row groups in which it lies."""
        chunk, file, offset, rows = (int(x[episode]) for x in self.data_at)
        path = self._file("data_path", episode, chunk, file)
        key = ("data", path, *columns)
        opened = self.open_files.take(key) or self._parquet(path, "data", columns, rows, episode)
        length = int(self.lengths[episode])
        groups = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        ends = np.cumsum(groups)
        first, last = np.searchsorted(ends, [offset, offset + length - 1], "right")
        with self._reading("data", f"{path.name} breaks while it is read:", episode):
            table = opened.read_row_groups(range(first, last + 1), columns, use_threads=False)
        self.open_files.put(key, opened)
        return table.slice(offset - ends[first] + groups[first], length)

    def _values(self, episode: int, key: str, column: "pa.Array") -> ndarray:
        """A column (T, D) of the dtype and width that info.json says, all of it finite."""
        feature = DEFAULTS.get(key) or self.features[key]
        width = feature["shape"][0]
        widths = np.ones(len(column))
        values = column
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            widths = np.asarray(column.value_lengths().fill_null(0))
            values = column.flatten()
        empty = column.null_count + values.null_count
        right = values.type == pa.type_for_alias(feature["dtype"]) and (widths == width).all()
        if not right or empty:
            raise self._fault(
                key,
                f"has {len(values)} values of type {column.type} in {len(column)} rows, {empty} of "
                f"them empty, expected {width} of {feature['dtype']} in each; {AGAIN}",
                episode,
            )
        rows = values.to_numpy(zero_copy_only=False).reshape(-1, width).copy()
        return self._finite(key, rows, episode)

    def _load(self, episode: int, *more: str) -> dict[str, ndarray]:
        """Columns of an episode, each (T, D); an error names every fault in them."""
        keys = dict.fromkeys([*DEFAULTS, *filter(None, self.titles.values()), *more])
        table = self._table(episode, list(keys))
        rows = {}
        faults = []
        for key in keys:
            try:
                rows[key] = self._values(episode, key, table[key].combine_chunks())
            except ValueError as error:
                faults.append(error)
        at = np.arange(len(table))[:, None]
        expected = {
            "frame_index": at,
            "episode_index": np.full_like(at, episode),
            "index": int(self.start[episode]) + at,
            "timestamp": at / self.fps,
        }
        for key, wanted in expected.items():
            # Seconds in float32 are coarse late in an episode.
            slack = TOLERANCE + 1e-7 * wanted if key == "timestamp" else 0
            found = rows.get(key, wanted)
            for row in np.flatnonzero(np.abs(found - wanted) > slack)[:1]:
                problem = f"row {row} is {found[row, 0]}, expected {wanted[row, 0]:.10g}"
                remedy = f"rows must follow at {self.fps} fps: other fps, a gap, or another order?"
                faults.append(self._fault(key, f"{problem}; {remedy}", episode))
        for unknown in set(rows.get("task_index", at[:0]).flat) - self.tasks.keys():
            remedy = f"add the task, or choose from {sorted(self.tasks)[:20]}"
            problem = f"is {unknown}, which meta/tasks lacks; {remedy}"
            faults.append(self._fault("task_index", problem, episode))
        if faults:
            raise ValueError("\n".join(map(str, faults)))
        return rows

    def rows(self, episode: int, *more: str) -> dict[str, ndarray]:
        """The tested columns of an episode: state (T, P) and action (T, A) under their own names,
        LeRobot's five (T, 1), and `more`."""
        key = ("rows", episode, *more)
        rows = self.open_files.take(key)
        if rows is None:
            rows = self._load(episode, *more)
        self.open_files.put(key, rows)
        return rows

    def numbers(self, episode: int) -> tuple[ndarray | None, ndarray | None]:
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
            problem = f"has {len(names)} names for {rows.shape[1]} numbers"
            raise self._fault(LABELS, f"{problem}; give each its name")
        return dict(zip(names, rows.T))

    def texts(self, episode: int, row: int = 0) -> list[str]:
        return [self.tasks[int(self.rows(episode)["task_index"][row, 0])]]

    def group(self, episode: int) -> str:
        return self.episode_tasks[episode][0].as_py()

    # Pictures.

    def views(self, episode: int, rows: Sequence[int]) -> dict[str, Iterator[ndarray]]:
        return {camera: self.pictures(episode, camera, rows) for camera in self.cameras}

    def pictures(self, episode: int, camera: str, rows: Sequence[int]) -> Iterator[ndarray]:
        """Pictures (H, W, 3) uint8 of these rows, which must rise."""
        chunk, file, origin, opens = (x[episode].item() for x in self.video_at[camera])
        path = self._file("video_path", episode, chunk, file, camera)
        opens = None if self.version == "v2.1" else opens
        yield from self._decode(episode, camera, rows, path, origin, opens)

    def describe(self) -> str:
        def how(field: str) -> str:
            return "as told" if getattr(self.given, field) else "chosen automatically"

        frames = self.info["total_frames"]
        state, action = (name or "none" for name in self.titles.values())
        sizes = (f"{key} ({' x '.join(map(str, self.sizes[key]))})" for key in self.cameras)
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        layout = ", as one T-layout" if self.given.t_layout else ""
        return (
            f"{self.name}: LeRobot {self.version}, robot {self.info.get('robot_type')}, "
            f"{len(self.lengths)} episodes, {frames} rows at {self.fps} fps "
            f"({frames / self.fps / 3600:.2f} h), {len(self.tasks)} tasks\n"
            f"  state    {state} ({self.widths[0]}), {how('state')}\n"
            f"  actions  {action} ({self.widths[1]}), {how('action')}\n"
            f"  cameras  {', '.join(sizes) or 'none'}, {how('cameras')}{layout}{left_out}"
        )


# -- writing --------------------------------------------------------------------------------------


STATS = ("min", "max", "mean", "std", "count")


def measure(rows: ndarray, count: int) -> ndarray:
    """LeRobot's statistics (5, D) of rows (T, D), which count as so many."""
    counts = np.full(rows.shape[1], count)
    return np.stack([rows.min(0), rows.max(0), rows.mean(0), rows.std(0), counts])


def pool(parts: Sequence[ndarray]) -> ndarray:
    """Statistics (5, D) of the whole from those of its parts."""
    low, high, mean, std, count = np.stack(parts, axis=1)
    whole = np.average(mean, axis=0, weights=count)
    square = np.average(std**2 + (mean - whole) ** 2, axis=0, weights=count)
    return np.stack([low.min(0), high.max(0), whole, np.sqrt(square), count.sum(0)])


def named(stats: ndarray, feature: dict) -> dict[str, list]:
    """Statistics as LeRobot stores them: (D,), of pictures (3, 1, 1); of the count one number."""
    shape = (5, -1, 1, 1) if feature["dtype"] == "video" else (5, -1)
    values = dict(zip(STATS, stats.reshape(shape).tolist()))
    return values | {"count": [int(stats[4, 0])]}


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
        self.stats = []  # of each episode, by column and camera
        self.tasks = {}  # text -> number
        self.total = 0  # rows
        self.number = Counter()  # of the file in use, of data ("") and of each camera
        self.videos = {}
        self.data = None

    def _fault(self, field: str, problem: str) -> ValueError:
        number = len(self.episodes)
        return ValueError(f"dataset {self.final}, episode {number}, {field}: {problem}")

    def _file(self, field: str, key: str = "") -> Path:
        chunk, file = divmod(self.number[key], self.storage.chunks_size)
        place = {"chunk_index": chunk, "file_index": file, "video_key": key}
        path = self.root / PATHS["v3.0"][field].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(
        self,
        frames: Mapping[str, Iterable[ndarray]],
        states: ndarray | None,
        actions: ndarray | None,
        task: str,
        labels: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """One episode; `labels`: name -> T numbers."""
        if not isinstance(task, str) or not task:
            raise self._fault("task", f"is {task!r}; give each episode its instruction")
        vectors = {"observation.state": states, "action": actions}
        if labels:
            vectors[LABELS] = np.stack(list(labels.values()), axis=1)
        vectors = {key: np.asarray(v, np.float32) for key, v in vectors.items() if v is not None}
        length = next(map(len, vectors.values()), None)
        features = {}
        stats = {}
        for key, v in vectors.items():
            if v.ndim != 2 or not v.size or len(v) != length or not np.isfinite(v).all():
                problem = f"is {v.shape} with {(~np.isfinite(v)).sum()} not finite"
                raise self._fault(key, f"{problem}; give finite ({length}, dimensions)")
            names = list(labels if key == LABELS else map(str, range(v.shape[1])))
            features[key] = {"dtype": "float32", "shape": [v.shape[1]], "names": names}
            stats[key] = measure(v.astype(np.float64), len(v))
        for name, pictures in frames.items():
            key = name if name.startswith("observation.") else f"observation.images.{name}"
            count, shape, sample = self._write_video(key, pictures)
            if not count or length not in (None, count):
                problem = f"has {count} pictures for {length} rows"
                raise self._fault(key, f"{problem}; expected one picture per row")
            length = count
            axes = ["height", "width", "channels"]
            features[key] = {"dtype": "video", "shape": shape, "names": axes}
            stats[key] = pool(sample)
        self.features = self.features or features
        if features != self.features or not features:
            found = {key: feature["shape"] for key, feature in features.items()}
            expected = "the cameras and widths of episode 0"
            raise self._fault("features", f"are {found}; expected {expected}")
        self._write_rows(vectors, length, self.tasks.setdefault(task, len(self.tasks)))
        self._write_episode(task, length, stats)
        self._close(self.storage.data_mb, self.storage.video_mb)

    def _write_video(
        self, key: str, pictures: Iterable[ndarray]
    ) -> tuple[int, list[int], list[ndarray]]:
        """Adds an episode to a camera's mp4: number of pictures, shape, statistics of a few."""
        stats = []
        shape = self.features.get(key, {}).get("shape")
        count = 0
        for picture in map(np.asarray, pictures):
            shape = shape or list(picture.shape)
            if picture.dtype != np.uint8 or list(picture.shape) != [*shape[:2], 3]:
                problem = f"picture {count} is {picture.dtype} {picture.shape}"
                raise self._fault(key, f"{problem}; expected uint8 (H, W, 3) of one size")
            if key not in self.videos:
                path = self._file("video_path", key)
                self.videos[key] = VideoWriter(path, self.fps, picture.shape[:2], self.storage)
            self.videos[key].add(picture, first=count == 0)
            if count % 10 == 0:
                stats.append(measure(picture[::4, ::4].reshape(-1, 3) / 255, 1))
            count += 1
        return count, shape, stats

    def _write_rows(self, vectors: dict[str, ndarray], length: int, task: int) -> None:
        """Adds an episode to the data file, which is opened if there is none."""
        columns = {}
        for key, v in vectors.items():
            columns[key] = pa.array(v.ravel())
            if v.shape[1] > 1:
                columns[key] = pa.FixedSizeListArray.from_arrays(columns[key], v.shape[1])
        at = np.arange(length)
        episode = np.full(length, len(self.episodes))
        values = (at / self.fps, at, episode, self.total + at, np.full(length, task))
        for (key, feature), numbers in zip(DEFAULTS.items(), values):
            columns[key] = numbers.astype(feature["dtype"])
        table = pa.table(columns)
        if self.data is None:
            self.data_path = self._file("data_path")
            self.data = pq.ParquetWriter(self.data_path, table.schema, write_page_checksum=True)
        self.data.write_table(table)

    def _write_episode(self, task: str, length: int, stats: dict[str, ndarray]) -> None:
        """The episode's row of meta/episodes: places, tasks and statistics."""
        size = self.storage.chunks_size
        row = {
            "episode_index": len(self.episodes),
            "tasks": [task],
            "length": length,
            "data/chunk_index": self.number[""] // size,
            "data/file_index": self.number[""] % size,
            "dataset_from_index": self.total,
            "dataset_to_index": self.total + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, video in self.videos.items():
            end = video.frames / self.fps
            place = (*divmod(self.number[key], size), end - length / self.fps, end)
            row |= {f"videos/{key}/{name}": value for name, value in zip(VIDEO, place)}
        for key, feature in self.features.items():
            found = named(stats[key], feature)
            row |= {f"stats/{key}/{name}": values for name, values in found.items()}
        self.stats.append(stats)
        self.episodes.append(row)
        self.total += length

    def _close(self, data_mb: float = 0, video_mb: float = 0) -> None:
        """Closes the open files that have grown to these sizes; the next episode opens others."""
        if self.data and self.data_path.stat().st_size >= data_mb * 2**20:
            self.data.close()
            self.data = None
            self.number[""] += 1
        for key, video in list(self.videos.items()):
            if video.bytes >= video_mb * 2**20:
                self.videos.pop(key).close()
                self.number[key] += 1

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
        whole = {}
        for key, feature in self.features.items():
            whole[key] = named(pool([one[key] for one in self.stats]), feature)
        (meta / "stats.json").write_text(json.dumps(whole), "utf-8")
        count = len(self.episodes)
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.storage.robot,
            "total_episodes": count,
            "total_frames": self.total,
            "total_tasks": len(self.tasks),
            "chunks_size": self.storage.chunks_size,
            "fps": self.fps,
            "splits": {"train": f"0:{count}"},
            **PATHS["v3.0"],
            "data_files_size_in_mb": self.storage.data_mb,
            "video_files_size_in_mb": self.storage.video_mb,
            "features": self.features | DEFAULTS,
        }
        if not self.number.keys() - {""}:  # no camera
            info["video_path"] = None
        (meta / "info.json").write_text(json.dumps(info, indent=4), "utf-8")
        os.replace(self.root, self.final)


def write_v3(
    root: str | Path, episodes: Iterable[tuple], fps: float, storage: Storage | None = None
) -> None:
    """Writes a v3.0 dataset. episodes: (frames, states (T, P) or None, actions (T, A) or None,
    task); frames is a dict camera -> T pictures (H, W, 3) uint8, any iterable; a fifth entry may be
    facts that only a simulator knows, a dict name -> T numbers. ValueError for what is wrong in
    them; nothing is left behind then."""
    writer = Writer(root, fps, storage or Storage())
    try:
        for episode in episodes:
            writer.add(*episode)
        writer.finish()
    except BaseException:
        shutil.rmtree(writer.root, ignore_errors=True)
        raise
