"""LeRobot datasets v2.1 and v3.0, read and written with pyarrow and av alone.

    dataset = LeRobotDataset.open("folder")                                   # or a hub name; the choice of columns is printed
    window = dataset.window(episode, 1.5, video_times=[0, .2, .4], action_times=[0, .033, .067])

    v2.1  meta/{info.json, tasks.jsonl, episodes.jsonl}       one parquet, and one mp4 per camera, for each episode
    v3.0  meta/{info.json, tasks.parquet, episodes/**}        many episodes in each parquet and mp4; where is told per episode

The picture of row i of an episode is at from_timestamp + i / fps in the mp4 (from_timestamp is 0 in
v2.1).

Shapes: T rows of an episode, F frames of a window, H W pixels, S actions of a window, A action
dimensions, P state dimensions.
"""

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from formats.recordings import MAX_BYTES, MISSING, TOLERANCE, Choice, Film, Recordings, Storage, av

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = pq = None

# rows of an episode, episodes of a dataset: above any honest one, and still small in memory
MAX_ROWS = 1_000_000
PATHS = {
    "v3.0": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
    "v2.1": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
}
AXES = ["height", "width", "channels"]
USUAL = Storage()
LABELS = "observation.environment_state"
COLUMN, KNOWN = (
    "latent_action",
    "latent_action_valid",
)  # added by `python latent_action.py encode --column`
DEFAULTS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}

# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpisodeInfo:
    index: int
    length: int  # rows
    tasks: tuple[str, ...]
    fps: float


@dataclass(frozen=True)
class Episodes(Sequence):
    """EpisodeInfo of each episode, made when asked for."""

    lengths: np.ndarray
    tasks: "pa.Array"
    fps: float

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> EpisodeInfo:
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i}; this dataset has episodes 0 to {len(self) - 1}")
        return EpisodeInfo(int(i), int(self.lengths[i]), tuple(self.tasks[i].as_py()), self.fps)


class LeRobotDataset(Recordings):
    """One LeRobot dataset, opened. See the head of this file."""

    def __init__(self, root: Path, mapping: Choice | Mapping | None = None, open_files: int = 24):
        super().__init__(root, mapping, open_files)
        self._read_info()
        self.tasks = dict(self._tasks())
        self._read_episodes()
        self._choose()

    # Metadata: every claim is held against the others before a table is read.

    def _json(self, name: str, lines: bool = False, **kinds: type) -> Iterator[dict | list]:
        """A json file that has fields of these kinds; with `lines` only those fields, of each line."""
        path, number = self._path(name), 0
        with path.open("rb") as file:
            for number, raw in enumerate(
                iter(lambda: file.readline(MAX_BYTES) if lines else file.read(MAX_BYTES), b""), 1
            ):
                try:
                    row = json.loads(raw)
                    if wrong := [
                        k
                        for k, kind in kinds.items()
                        if not isinstance(row, dict) or not isinstance(row.get(k), kind)
                    ]:
                        raise ValueError(f"{wrong[0]} is missing or of another type")
                except (ValueError, RecursionError) as error:
                    raise self._fault(
                        None,
                        name,
                        f"line {number}: {error}" if lines else str(error),
                        "write or fetch it again",
                    ) from error
                yield [row[k] for k in kinds] if lines else row
        if not number:
            raise self._fault(None, name, "is empty", "write or fetch it again")

    def _parquet(
        self,
        path: Path,
        field: str,
        columns: Sequence[str],
        rows: int | None = None,
        episode: int | None = None,
    ):
        """Opens a parquet file that must have these columns and this many rows."""
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise self._fault(
                episode,
                field,
                f"{path.name} is no whole parquet file ({error})",
                "fetch or write it again",
            ) from error
        if missing := [k for k in columns if k not in file.schema_arrow.names]:
            raise self._fault(
                episode,
                missing[0],
                f"{path.name} has no such column",
                f"there are {file.schema_arrow.names}",
            )
        if rows is not None and file.metadata.num_rows != rows:
            raise self._fault(
                episode,
                field,
                f"{path.name} has {file.metadata.num_rows} rows where {rows} are due",
                "write it again",
            )
        # The first row of each group.
        file.edges = np.cumsum(
            [0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        )
        return file

    def _read_info(self) -> None:
        (self.info,) = self._json("meta/info.json", features=dict, data_path=str)
        self.version, self.fps, self.features = (
            self.info.get("codebase_version"),
            self.info.get("fps"),
            self.info["features"],
        )
        if self.version not in PATHS:
            raise self._fault(
                None,
                "codebase_version",
                f"is {self.version!r}",
                f"convert it to one of {list(PATHS)}",
            )
        for other in {
            "v3.0": ("tasks.jsonl", "episodes.jsonl"),
            "v2.1": ("tasks.parquet", "episodes"),
        }[self.version]:
            if (self.root / "meta" / other).exists():
                raise self._fault(
                    None,
                    f"meta/{other}",
                    f"belongs to another version than {self.version}",
                    "keep the files of one version",
                )
        for key, most in {
            "fps": 1000,
            "total_episodes": MAX_ROWS,
            "total_frames": 1000 * MAX_ROWS,
            "chunks_size": MAX_ROWS,
        }.items():
            value = self.info.get(key)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float) if key == "fps" else int)
                or not 0 < value <= most
            ):
                raise self._fault(
                    None,
                    key,
                    f"is {value!r:.50}",
                    f"a number above 0 and at most {most} is due, whole but for fps",
                )
        self.sizes, self.left_out = {}, []  # of the cameras; names of depth maps and the like
        for key, feature in self.features.items():
            shape, dtype = (
                (feature.get("shape"), feature.get("dtype"))
                if isinstance(feature, dict)
                else (None, None)
            )
            if (
                not isinstance(shape, list)
                or not all(type(n) is int and 0 < n <= 1 << 14 for n in shape)
                or not isinstance(dtype, str)
            ):
                raise self._fault(
                    None,
                    key,
                    f"feature is {feature!r:.80}",
                    f"dtype and shape are due, sizes from 1 to {1 << 14}",
                )
            if dtype in ("video", "image"):
                height_width = shape[:2] if shape[-1] == 3 else shape[1:]
                depth = (
                    len(shape) != 3
                    or 3 not in (shape[0], shape[2])
                    or (feature.get("info") or {}).get("video.is_depth_map")
                )
                self.left_out.append(key) if depth else self.sizes.update(
                    {key: tuple(height_width)}
                )
        self.videos = [k for k in self.sizes if self.features[k]["dtype"] == "video"]
        if self.videos and not isinstance(self.info.get("video_path"), str):
            raise self._fault(
                None,
                "video_path",
                f"is {self.info.get('video_path')!r}",
                "info.json must say where the videos lie",
            )

    def _tasks(self) -> Iterator[tuple[int, str]]:
        name = "meta/tasks.jsonl" if self.version == "v2.1" else "meta/tasks.parquet"
        if (path := self._path(name)).stat().st_size > MAX_BYTES:
            raise self._fault(
                None, name, f"has {path.stat().st_size} bytes", f"at most {MAX_BYTES} are allowed"
            )
        if self.version == "v2.1":
            rows = self._json(name, lines=True, task_index=int, task=str)
        else:
            file = self._parquet(path, name, ["task_index"], self.info.get("total_tasks"))
            # The text is a pandas index, so its column is called `task` or `__index_level_0__`.
            text = [
                f.name
                for f in file.schema_arrow
                if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
            ]
            table = file.read()
            rows = zip(
                table["task_index"].to_pylist(),
                table[text[0]].to_pylist() if text else [None] * len(table),
            )
        seen = set()
        for index, text in rows:
            if not isinstance(index, int) or not text or index in seen:
                raise self._fault(
                    None,
                    name,
                    f"task {index} is {text!r:.60}",
                    "each whole task_index must appear once, with a text",
                )
            seen.add(index)
            yield index, text

    def _read_episodes(self) -> None:
        """Length, place in the data files and place in the videos of each episode, as arrays over
        episodes."""
        count, chunks, v3 = (
            self.info["total_episodes"],
            self.info["chunks_size"],
            self.version == "v3.0",
        )
        video = lambda k: [
            f"videos/{k}/{name}"
            for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        ]
        places = ["episode_index", "length"]
        if v3:
            places += [
                "dataset_from_index",
                "dataset_to_index",
                "data/chunk_index",
                "data/file_index",
            ]
            places += [name for k in self.videos for name in video(k)]
            names = sorted(
                str(p.relative_to(self.root))
                for p in (self.root / "meta/episodes").rglob("*.parquet")
            )
            files = [self._parquet(self._path(name), name, [*places, "tasks"]) for name in names]
            found = sum(file.metadata.num_rows for file in files)
            read = lambda: pa.concat_tables(
                file.read([*places, "tasks"]).select([*places, "tasks"]) for file in files
            )
        else:
            rows = list(
                islice(
                    self._json(
                        "meta/episodes.jsonl", lines=True, episode_index=int, length=int, tasks=list
                    ),
                    count + 1,
                )
            )
            found, read = len(rows), lambda: pa.table(list(zip(*rows)), [*places, "tasks"])
        if found != count:
            raise self._fault(
                None,
                "total_episodes",
                f"is {count} in info.json where meta/episodes has {found}",
                "correct one of them",
            )
        try:
            table, column = read(), {}
            for name in places:
                column[name] = (
                    table[name].cast(pa.float64() if "timestamp" in name else pa.int64()).to_numpy()
                )
                if (
                    table[name].null_count
                    or not np.isfinite(column[name]).all()
                    or (column[name] < 0).any()
                ):
                    raise self._fault(
                        None,
                        name,
                        "has values that are null, negative or not finite",
                        "write meta/episodes again",
                    )
            tasks = pa.concat_arrays(table["tasks"].cast(pa.list_(pa.string())).chunks)
        except (pa.ArrowException, OSError, OverflowError) as error:
            raise self._fault(
                None,
                "meta/episodes",
                f"cannot be read ({error})",
                "numbers and lists of task texts are due",
            ) from error
        order = np.argsort(column["episode_index"], kind="stable")
        column, tasks, number = (
            {k: v[order] for k, v in column.items()},
            tasks.take(pa.array(order)),
            np.arange(count),
        )
        length = column["length"]

        def test(name: str, bad: np.ndarray, remedy: str) -> None:
            if bad.any():
                raise self._fault(
                    int(np.argmax(bad)), name, f"is {column[name][np.argmax(bad)]}", remedy
                )

        test(
            "episode_index",
            column["episode_index"] != number,
            "episodes must be 0, 1, 2, ...: one is missing or there twice",
        )
        test(
            "length",
            (length < 1) | (length > MAX_ROWS),
            f"an episode has 1 to {MAX_ROWS} rows: split or drop it",
        )
        if (
            empty := np.flatnonzero(
                tasks.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) == 0
            )
        ).size:
            raise self._fault(int(empty[0]), "tasks", "has none", "give each episode its tasks")
        if (total := int(length.sum())) != self.info["total_frames"]:
            raise self._fault(
                None,
                "total_frames",
                f"is {self.info['total_frames']} where the episodes have {total}",
                "correct info.json",
            )
        start = np.cumsum(length) - length
        chunk, file, self.video_at = (
            number // chunks,
            number,
            {k: (number // chunks, number, np.zeros(count)) for k in self.videos},
        )
        if v3:
            test(
                "dataset_from_index",
                column["dataset_from_index"] != start,
                "must be the sum of the lengths before",
            )
            test(
                "dataset_to_index",
                column["dataset_to_index"] != start + length,
                "must be dataset_from_index + length",
            )
            chunk, file = column["data/chunk_index"], column["data/file_index"]
            for key in self.videos:
                *self.video_at[key], end = at = [column[name] for name in video(key)]
                test(
                    video(key)[3],
                    np.abs(end - at[2] - length / self.fps) > 0.5 / self.fps,
                    "must be from_timestamp + length / fps",
                )
                by = np.lexsort(at[2::-1])
                same, clash = (
                    (np.diff(at[0][by]) == 0) & (np.diff(at[1][by]) == 0),
                    np.zeros(count, bool),
                )
                clash[by[1:]] = same & (at[2][by[1:]] < end[by[:-1]] - 0.5 / self.fps)
                test(
                    video(key)[2],
                    clash,
                    "lies inside another episode's video: write meta/episodes again",
                )
        # Within a data file rows run from its first episode; its number of rows is the sum over its
        # episodes.
        group = np.unique(np.stack([chunk, file]), axis=1, return_inverse=True)[1].ravel()
        first = np.full(group.max() + 1, total)
        np.minimum.at(first, group, start)
        self.data_at = (
            chunk,
            file,
            start - first[group],
            np.bincount(group, length).astype(int)[group],
        )
        self.start, self.lengths, self.episodes = start, length, Episodes(length, tasks, self.fps)

    def _choose(self) -> None:
        """Fills the gaps of the mapping; what it names must exist and be of the right kind."""
        given, cameras = self.given, self.given.cameras
        number = lambda f: f["dtype"].startswith(("float", "int")) and len(f["shape"]) == 1
        vectors = [k for k, f in self.features.items() if k not in DEFAULTS and number(f)]
        first = lambda *names: next((n for n in names if n in vectors), "")
        if not cameras and given.t_layout:
            word = lambda *words: [
                k for k in self.sizes if any(w in k.lower().rsplit(".", 1)[-1] for w in words)
            ]
            found = word("high", "head", "top", "front"), word("left"), word("right")
            if any(len(names) != 1 for names in found):
                raise self._fault(
                    None,
                    "cameras",
                    f"head, left, right could be {found}",
                    f"name three of {list(self.sizes)}",
                )
            cameras = tuple(names[0] for names in found)
        cameras = (
            cameras
            or tuple(k for k in self.sizes if k.endswith("cam_concatenated"))
            or tuple(self.sizes)
        )
        self.state_key, self.action_key = (
            given.state or first("observation.state", "state"),
            given.action or first("action", "actions"),
        )
        self.cameras, vectors = cameras, [*vectors, ""]
        for name, field, allowed in [
            (self.state_key, "state", vectors),
            (self.action_key, "action", vectors),
            *((name, "a camera", self.sizes) for name in cameras),
        ]:
            if name not in allowed:
                raise self._fault(
                    None,
                    name,
                    f"is chosen as {field} and is none here",
                    f"choose from {list(allowed)}",
                )
        crossed = given.t_layout and (
            len(cameras) != 3 or ("right" in cameras[1] and "left" in cameras[2])
        )
        if crossed or len(set(cameras)) != len(cameras):
            raise self._fault(
                None,
                "cameras",
                f"are {list(cameras)}",
                "each once, and for the T-layout head, left, right in this order",
            )
        self.titles, self.robot = (
            {"state": self.state_key, "action": self.action_key},
            str(self.info.get("robot_type") or self.root.name),
        )
        self.widths = tuple(self.features[k]["shape"][0] if k else 0 for k in self.titles.values())

    def _file(self, field: str, episode: int, chunk: int, file: int, key: str = "") -> Path:
        """The path that a template of info.json gives. Only plain fields are filled in."""
        values = {
            "episode_chunk": chunk,
            "chunk_index": chunk,
            "episode_index": episode,
            "file_index": file,
            "video_key": key,
        }
        name = re.sub(
            r"\{(\w+)(?::0(\d)d)?\}",
            lambda m: str(values.get(m[1], "{")).zfill(int(m[2] or 0)),
            self.info[field],
        )
        if "{" in name:
            raise self._fault(
                episode,
                field,
                f"is {self.info[field]!r:.100}",
                f"write it as {PATHS[self.version][field]}",
            )
        return self._path(name, episode, key or field)

    # Numbers.

    def _slice(
        self, episode: int, columns: Sequence[str], low: int, high: int, batch: int
    ) -> Iterator[tuple[int, "pa.RecordBatch"]]:
        """Rows low..high of an episode from its data file, in batches with the number of their
        first row; nothing else stays in memory."""
        chunk, file, offset, rows = (int(x[episode]) for x in self.data_at)
        path = self._file("data_path", episode, chunk, file)
        key = ("data", path, *columns)
        opened = self.shelf.take(key) or self._parquet(path, "data", columns, rows, episode)
        edges = opened.edges
        a, b = (
            np.searchsorted(edges, offset + low, "right") - 1,
            np.searchsorted(edges, offset + high, "left"),
        )
        at = int(edges[a]) - offset
        try:
            for part in opened.iter_batches(
                batch, row_groups=list(range(a, b)), columns=columns, use_threads=False
            ):
                begin, stop = max(low - at, 0), min(high - at, len(part))
                if begin < stop:
                    yield at + begin, part.slice(begin, stop - begin)
                at += len(part)
        except (pa.ArrowException, OSError) as error:
            raise self._fault(
                episode,
                "data",
                f"{path.name} breaks while it is read ({error})",
                "fetch or write it again",
            ) from error
        self.shelf.give(key, opened)

    def _load(self, episode: int, *more: str) -> tuple[dict[str, np.ndarray], list[ValueError]]:
        """Columns of an episode, each (T, width), and every fault in them."""
        length, start, rows, faults = (
            self.episodes[episode].length,
            int(self.start[episode]),
            {},
            [],
        )
        blame = lambda *words: faults.append(self._fault(episode, *words))
        kinds = {k: (t, 1) for k, t in DEFAULTS.items()}
        kinds |= {
            k: (self.features[k]["dtype"], self.features[k]["shape"][0])
            for k in (self.state_key, self.action_key, *more)
            if k
        }
        table = pa.Table.from_batches(
            [part for _, part in self._slice(episode, list(kinds), 0, length, 4096)]
        )
        for key, (dtype, width) in kinds.items():
            column, again = (
                table[key].combine_chunks(),
                "write the column again or correct info.json",
            )
            ragged = (
                pa.types.is_list(column.type)
                and (
                    column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) != width
                ).any()
            )
            values = (
                column.flatten()
                if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
                else column
            )
            if values.type != pa.type_for_alias(dtype):
                blame(key, f"is of type {column.type}, due {dtype}", again)
            elif column.null_count or values.null_count:
                blame(key, "has empty values", "fill or drop these rows")
            elif ragged or len(values) != length * width:
                blame(key, f"has {len(values)} values in {length} rows, due {width} in each", again)
            else:
                rows[key] = values.to_numpy(zero_copy_only=False).reshape(
                    length, width
                )  # booleans are bits in the file
                if len(bad := np.argwhere(~np.isfinite(rows[key]))):
                    blame(
                        key,
                        f"row {bad[0][0]}, dimension {bad[0][1]} is {rows[key][tuple(bad[0])]} (of {len(bad)})",
                        "repair or drop it",
                    )
        at = np.arange(length)[:, None]
        due = {
            "frame_index": at,
            "episode_index": np.full_like(at, episode),
            "index": start + at,
            "timestamp": at / self.fps,
        }
        for key in [k for k in due if k in rows]:
            slack = (
                TOLERANCE + 1e-7 * due[key] if key == "timestamp" else 0
            )  # float32 seconds are coarse late in an episode
            if (bad := np.flatnonzero(np.abs(rows[key] - due[key]) > slack)).size:
                blame(
                    key,
                    f"row {bad[0]} is {rows[key][bad[0], 0]}, due {due[key][bad[0], 0]:.10g}",
                    f"rows must follow one another at {self.fps} fps: it is another fps, a gap, or another order",
                )
        if "task_index" in rows and (
            unknown := set(rows["task_index"][:, 0].tolist()) - self.tasks.keys()
        ):
            blame(
                "task_index",
                f"is {min(unknown)}, which meta/tasks lacks",
                f"add the task, or choose from {sorted(self.tasks)[:20]}",
            )
        return rows, faults

    def rows(self, episode: int, *more: str) -> dict[str, np.ndarray]:
        """The tested columns of an episode: state (T, P) and action (T, A) under their own names,
        LeRobot's five (T, 1), and `more`."""
        if (rows := self.shelf.take(("rows", episode, *more))) is None:
            rows, faults = self._load(episode, *more)
            if faults:
                raise faults[0]
        self.shelf.give(("rows", episode, *more), rows)
        return rows

    def numbers(self, episode: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        rows = self.rows(episode)
        return tuple(rows[key] if key else None for key in self.titles.values())

    def columns(self, episode: int) -> tuple[dict[str, np.ndarray], list[ValueError]]:
        rows, faults = self._load(episode)
        return {role: rows[key] for role, key in self.titles.items() if key in rows}, faults

    def labels(self, episode: int) -> dict[str, np.ndarray]:
        """What only the simulator knew, as `worlds.World.labels` says: name -> (T,); empty if it
        was not recorded, or without names. It is there for frozen backbones to learn from; no
        window holds it, so no policy is given it."""
        names = self.features.get(LABELS, {}).get("names")
        if not isinstance(names, list):
            return {}
        rows = self.rows(episode, LABELS)[LABELS]
        if len(names) != rows.shape[1]:
            raise self._fault(
                None,
                LABELS,
                f"has {len(names)} names for {rows.shape[1]} numbers",
                "give each its name",
            )
        return dict(zip(names, rows.T))

    def texts(self, episode: int, row: int = 0) -> list[str]:
        return [self.tasks[int(self.rows(episode)["task_index"][row, 0])]]

    # Pictures.

    def views(self, episode: int, rows: Sequence[int]) -> dict[str, Iterator[np.ndarray]]:
        return {camera: self.pictures(episode, camera, rows) for camera in self.cameras}

    def pictures(self, episode: int, camera: str, index: Sequence[int]) -> Iterator[np.ndarray]:
        """Pictures (H, W, 3) uint8 of these rows, which must rise."""
        if camera not in self.videos:
            yield from self._stored(episode, camera, index)
            return
        chunk, file, origin = (x[episode].item() for x in self.video_at[camera])
        path, due = (
            self._file("video_path", episode, chunk, file, camera),
            round(origin * self.fps) + self.episodes[episode].length,
        )
        yield from self._film(
            path, self.sizes[camera], episode, camera, origin, index, due, self.version == "v2.1"
        )

    def _stored(self, episode: int, camera: str, index: Sequence[int]) -> Iterator[np.ndarray]:
        for first, part in self._slice(episode, [camera], int(index[0]), int(index[-1]) + 1, 16):
            column = part.column(0)
            for i in [i for i in index if first <= i < first + len(part)]:
                try:
                    cell = column[i - first].as_py()
                    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
                        raise ValueError(
                            f"is of type {column.type} or empty, bytes and path are due"
                        )
                    raw = cell["bytes"] or self._path(cell["path"], episode, camera).read_bytes()
                    with Image.open(io.BytesIO(raw)) as picture:
                        if picture.size[::-1] != self.sizes[camera] or picture.mode not in (
                            "RGB",
                            "RGBA",
                            "P",
                            "L",
                        ):
                            raise ValueError(
                                f"is {picture.mode} of {picture.height} x {picture.width}, {self.sizes[camera]} is due"
                            )
                        yield np.array(picture.convert("RGB"))
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    raise self._fault(
                        episode,
                        camera,
                        f"picture of row {i}: {error}",
                        "write it again or correct info.json",
                    ) from error

    def describe(self) -> str:
        """What the dataset is and what of it is used."""
        frames, how = (
            self.info["total_frames"],
            lambda field: "as told" if getattr(self.given, field) else "chosen automatically",
        )
        width = lambda key: f"{key} ({self.features[key]['shape'][0]})" if key else "none"
        return "\n".join(
            [
                f"{self.name}: LeRobot {self.version}, robot {self.info.get('robot_type')}, {len(self.episodes)} episodes, {frames} rows "
                f"at {self.fps} fps ({frames / self.fps / 3600:.2f} h), {len(self.tasks)} tasks",
                f"  state    {width(self.state_key)}, {how('state')}",
                f"  actions  {width(self.action_key)}, {how('action')}",
                f"  cameras  {', '.join('{} ({} x {})'.format(k, *self.sizes[k]) for k in self.cameras) or 'none'}, {how('cameras')}"
                + (", as one T-layout" if self.given.t_layout else "")
                + (f"; left out: {self.left_out}" if self.left_out else ""),
            ]
        )


# -- writing --------------------------------------------------------------------------------------


def measure(rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """LeRobot's statistics of rows (n, D)."""
    rows = rows.astype(np.float64)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([count]),
    }


def pool(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of the whole from those of its parts."""
    low, high, mean, std, n = (
        np.stack([part[k] for part in parts]) for k in ("min", "max", "mean", "std", "count")
    )
    whole = (n * mean).sum(0) / n.sum()
    spread = np.sqrt((n * (std**2 + (mean - whole) ** 2)).sum(0) / n.sum())
    return {"min": low.min(0), "max": high.max(0), "mean": whole, "std": spread, "count": n.sum(0)}


def as_lists(stats: dict[str, dict[str, np.ndarray]], features: dict) -> dict[str, dict[str, list]]:
    """For json; those of pictures have the shape (3, 1, 1)."""
    deep = lambda key, v: (
        v[:, None, None] if features[key]["dtype"] in ("video", "image") and len(v) == 3 else v
    )
    return {
        key: {k: deep(key, v).tolist() for k, v in found.items()} for key, found in stats.items()
    }


class Writer:
    """A dataset being written under ROOT.part, which gets its name when it is whole."""

    def __init__(self, version: str, root: str | Path, fps: float, storage: Storage):
        if av is None:
            raise ValueError(MISSING)
        self.version, self.final, self.fps, self.storage = version, Path(root), fps, storage
        self.root = self.final.with_name(self.final.name + ".part")
        for folder in (self.final, self.root):
            if folder.exists():
                raise ValueError(f"dataset {folder} exists; remove it or write elsewhere")
        self.features, self.episodes, self.stats, self.tasks, self.total = {}, [], [], {}, 0
        self.number, self.films, self.data = (
            Counter(),
            {},
            None,
        )  # number of the file in use, of data ("") and of each camera

    def _fault(self, field: str, found: str, remedy: str) -> ValueError:
        return ValueError(
            f"dataset {self.final}, episode {len(self.episodes)}, {field}: {found}; {remedy}"
        )

    def _place(self, field: str, key: str = "") -> Path:
        n, (chunk, file) = self.number[key], divmod(self.number[key], self.storage.chunks_size)
        path = self.root / PATHS[self.version][field].format(
            episode_chunk=chunk, chunk_index=chunk, episode_index=n, file_index=file, video_key=key
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _picture(self, key: str, i: int, picture: np.ndarray) -> dict | None:
        """Stores picture i of the episode: the cell of a PNG, or None if it went into an mp4."""
        if not self.storage.images:
            if key not in self.films:
                self.films[key] = Film(
                    self._place("video_path", key), self.fps, picture.shape[:2], self.storage
                )
            self.films[key].add(picture, first=i == 0)
            return None
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG", compress_level=1)
        return {"bytes": file.getvalue(), "path": f"frame-{i:06d}.png"}

    def add(
        self,
        frames: Mapping[str, Iterable[np.ndarray]],
        states: np.ndarray | None,
        actions: np.ndarray | None,
        task: str,
        labels: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """One episode; `labels`: name -> T numbers."""
        given, kinds, columns, stats, videos = (
            {"observation.state": states, "action": actions},
            {},
            {},
            {},
            {},
        )
        given |= {LABELS: np.stack(list(labels.values()), axis=1)} if labels else {}
        size, fps = self.storage.chunks_size, self.fps
        length = next((len(v) for v in given.values() if v is not None), None)
        if not isinstance(task, str) or not task:
            raise self._fault("task", f"is {task!r}", "give each episode its instruction")
        for key, v in given.items():
            if v is not None:
                v = np.asarray(v, np.float32)
                if v.ndim != 2 or not v.size or len(v) != length or not np.isfinite(v).all():
                    raise self._fault(
                        key,
                        f"is {v.shape} with {(~np.isfinite(v)).sum()} not finite",
                        f"give finite ({length}, dimensions)",
                    )
                names = (
                    list(labels)
                    if key == LABELS
                    else [f"{key.split('.')[-1]}_{i}" for i in range(v.shape[1])]
                )
                kinds[key] = {"dtype": "float32", "shape": [v.shape[1]], "names": names}
                columns[key] = (
                    pa.FixedSizeListArray.from_arrays(v.ravel(), v.shape[1])
                    if v.shape[1] > 1
                    else pa.array(v[:, 0])
                )
                stats[key] = measure(v, length)
        for key, source in frames.items():
            key, seen, cells = (
                key if key.startswith("observation.") else f"observation.images.{key}",
                [],
                [],
            )
            for i, picture in enumerate(map(np.asarray, source)):
                kind = {
                    "dtype": "image" if self.storage.images else "video",
                    "shape": list(picture.shape),
                    "names": AXES,
                }
                if (
                    picture.dtype != np.uint8
                    or picture.ndim != 3
                    or picture.shape[2] != 3
                    or kind != kinds.setdefault(key, kind)
                ):
                    raise self._fault(
                        key,
                        f"picture {i} is {picture.dtype} {picture.shape}",
                        "uint8 (H, W, 3) of one size is due",
                    )
                cells.append(self._picture(key, i, picture))
                if i % max(1, (length or 100) // 50) == 0 and len(seen) < 100:
                    seen.append(
                        picture[
                            :: max(1, len(picture) // 120), :: max(1, picture.shape[1] // 120)
                        ].reshape(-1, 3)
                        / 255
                    )
            length = len(cells) if length is None else length
            if len(cells) != length or not length:
                raise self._fault(
                    key,
                    f"has {len(cells)} pictures for {length} rows",
                    "one picture per row is due",
                )
            stats[key] = measure(np.concatenate(seen), len(seen))
            if self.storage.images:
                columns[key] = pa.array(
                    cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})
                )
            else:
                videos[key] = self.number[key], self.films[key].frames - length
        self.features = self.features or kinds
        if kinds != self.features or not kinds:
            raise self._fault(
                "features",
                f"are { {k: f['shape'] for k, f in kinds.items()} }",
                "cameras and widths of episode 0 are due",
            )
        e, at, start = len(self.episodes), np.arange(length), self.total
        index = {
            "timestamp": at / fps,
            "frame_index": at,
            "episode_index": np.full(length, e),
            "index": start + at,
            "task_index": np.full(length, self.tasks.setdefault(task, len(self.tasks))),
        }
        table = pa.table(columns | {k: pa.array(v.astype(DEFAULTS[k])) for k, v in index.items()})
        if self.data is None:
            self.data_path = self._place("data_path")
            self.data = pq.ParquetWriter(
                self.data_path,
                table.schema.with_metadata(self._hugging_face()),
                write_page_checksum=True,
            )
        self.data.write_table(table.replace_schema_metadata(self.data.schema.metadata))
        row = {
            "episode_index": e,
            "tasks": [task],
            "length": length,
            "data/chunk_index": self.number[""] // size,
            "data/file_index": self.number[""] % size,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, (n, first) in videos.items():
            self.codec = self.films[key].stream.codec_context.codec.canonical_name
            row |= {
                f"videos/{key}/chunk_index": n // size,
                f"videos/{key}/file_index": n % size,
                f"videos/{key}/from_timestamp": first / fps,
                f"videos/{key}/to_timestamp": (first + length) / fps,
            }
        self.episodes.append(row), self.stats.append(stats)
        self.total += length
        self._close(full=True)

    def _hugging_face(self) -> dict[str, str]:
        """Column types for the `datasets` package, which otherwise leaves pictures undecoded."""
        value = lambda dtype: {"dtype": dtype, "_type": "Value"}
        kinds = {k: value(t) for k, t in DEFAULTS.items()}
        for key, feature in self.features.items():
            width, kind = feature["shape"][0], value(feature["dtype"])
            if feature["dtype"] != "video":
                vector = (
                    {"feature": kind, "length": width, "_type": "Sequence"} if width > 1 else kind
                )
                kinds[key] = {"_type": "Image"} if feature["dtype"] == "image" else vector
        return {"huggingface": json.dumps({"info": {"features": kinds}})}

    def _close(self, full: bool = False) -> None:
        """Closes every open file, or those that are `full`; the next episode opens the next ones."""
        storage, single = self.storage, self.version == "v2.1"
        if self.data and not (
            full and not single and self.data_path.stat().st_size < storage.data_mb * 2**20
        ):
            self.data.close()
            self.data, self.number[""] = None, self.number[""] + 1
        for key in [
            k
            for k, film in self.films.items()
            if not (full and not single and film.bytes < storage.video_mb * 2**20)
        ]:
            self.films.pop(key).close()
            self.number[key] += 1

    def finish(self) -> None:
        """Metadata, and the final name."""
        self._close()
        if not self.episodes:
            raise ValueError(f"dataset {self.final}: no episodes; give at least one")
        videos, count, meta = (
            [k for k, f in self.features.items() if f["dtype"] == "video"],
            len(self.episodes),
            self.root / "meta",
        )
        info = {
            "codebase_version": self.version,
            "robot_type": self.storage.robot,
            "total_episodes": count,
            "total_frames": self.total,
            "total_tasks": len(self.tasks),
            "chunks_size": self.storage.chunks_size,
            "fps": self.fps,
            "splits": {"train": f"0:{count}"},
        }
        info |= PATHS[self.version] if videos else PATHS[self.version] | {"video_path": None}
        info["features"] = self.features | {
            k: {"dtype": t, "shape": [1], "names": None} for k, t in DEFAULTS.items()
        }
        for key in videos:
            height, width, _ = self.features[key]["shape"]
            info["features"][key]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.fps": self.fps,
                "video.channels": 3,
                "video.codec": self.codec,
                "video.pix_fmt": self.storage.pix_fmt,
                "video.is_depth_map": False,
                "has_audio": False,
            }
        stats = [as_lists(found, self.features) for found in self.stats]
        if self.version == "v2.1":
            meta.mkdir()
            info |= {
                "total_videos": count * len(videos),
                "total_chunks": -(-count // self.storage.chunks_size),
            }
            lines = {
                "tasks": [{"task_index": i, "task": task} for task, i in self.tasks.items()],
                "episodes": [
                    {k: row[k] for k in ("episode_index", "tasks", "length")}
                    for row in self.episodes
                ],
                "episodes_stats": [
                    {"episode_index": e, "stats": found} for e, found in enumerate(stats)
                ],
            }
            for name, rows in lines.items():
                (meta / f"{name}.jsonl").write_text(
                    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
                )
        else:
            (folder := meta / "episodes/chunk-000").mkdir(parents=True)
            info |= {
                "data_files_size_in_mb": self.storage.data_mb,
                "video_files_size_in_mb": self.storage.video_mb,
            }
            flat = [
                {f"stats/{key}/{k}": v for key, found in part.items() for k, v in found.items()}
                for part in stats
            ]
            pq.write_table(
                pa.Table.from_pylist([row | part for row, part in zip(self.episodes, flat)]),
                folder / "file-000.parquet",
            )
            whole = as_lists(
                {key: pool([part[key] for part in self.stats]) for key in self.features},
                self.features,
            )
            (meta / "stats.json").write_text(json.dumps(whole), "utf-8")
            # The lerobot package reads tasks with pandas, which learns from this that the text is
            # the index.
            kinds = [("task", "unicode", "object"), ("task_index", "int64", "int64")]
            pandas = {
                "index_columns": ["task"],
                "column_indexes": [],
                "pandas_version": "2.0.0",
                "columns": [
                    {
                        "name": k,
                        "field_name": k,
                        "pandas_type": p,
                        "numpy_type": n,
                        "metadata": None,
                    }
                    for k, p, n in kinds
                ],
            }
            table = pa.table(
                {
                    "task_index": pa.array(self.tasks.values(), pa.int64()),
                    "task": pa.array(self.tasks, pa.string()),
                }
            )
            pq.write_table(
                table.replace_schema_metadata({"pandas": json.dumps(pandas)}),
                meta / "tasks.parquet",
            )
        (meta / "info.json").write_text(json.dumps(info, indent=4), "utf-8")
        os.replace(self.root, self.final)


def _write(writer: Writer, episodes: Iterable[tuple]) -> None:
    try:
        for episode in episodes:
            writer.add(*episode)
        writer.finish()
    except BaseException:
        shutil.rmtree(writer.root, ignore_errors=True)
        raise


def write_v3(
    root: str | Path, episodes: Iterable[tuple], fps: float, storage: Storage = USUAL
) -> None:
    """Writes a v3.0 dataset. episodes: (frames, states (T, P) or None, actions (T, A) or None,
    task); frames is a dict camera -> T pictures (H, W, 3) uint8, any iterable; a fifth entry may be
    what only a simulator knows, a dict name -> T numbers. ValueError for what is wrong in them;
    nothing is left behind then."""
    _write(Writer("v3.0", root, fps, storage), episodes)


def write_v21(
    root: str | Path, episodes: Iterable[tuple], fps: float, storage: Storage = USUAL
) -> None:
    """The same in the layout of v2.1: one parquet, and one mp4 per camera, for each episode."""
    _write(Writer("v2.1", root, fps, storage), episodes)
