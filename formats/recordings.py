"""Episodes on disk, whatever their format: windows by time, checks of everything, pictures, mp4
read and written with `av` alone.

`lerobot.py` and `official.py` know formats; what they share is here. Row i of an episode is at i /
fps seconds. A wanted time takes the nearest row. What lies outside the episode repeats its first or
last row and is masked.

Three promises. (1) Alignment: every timestamp and every decoded frame's time is compared with i /
fps, within LeRobot's own 0.1 ms; nothing is taken by position alone. (2) Bounds: an episode's
numbers and a window's frames are all that is in memory; what a header claims is held against other
claims before anything is allocated. (3) Faults are ValueErrors that name dataset, episode, field
and remedy. `window` tests what it reads; `check` tests everything and lists every fault; `open(...,
verify=True)` raises if there is one.

Shapes: T rows of an episode, F frames of a window, H W pixels, S actions of a window, A action
dimensions, P state dimensions.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

try:
    import av
    import pyarrow
except ImportError:
    av = pyarrow = None

MAX_BYTES = 16 << 20  # of info.json, of a line of json, of all tasks
MISSING = "datasets need the packages pyarrow and av: pip install 'motus[data]'"
TOLERANCE = 1e-4  # seconds between a frame's time and i / fps, as in LeRobot
# The words that official RoboTwin data puts before every instruction;
# `Choice(prefix=ROBOTWIN_SCENE)`.
ROBOTWIN_SCENE = (
    "The whole scene is in a realistic, industrial art style with three views: a fixed rear camera, a movable left arm "
    "camera, and a movable right arm camera. The aloha robot is currently performing the following task: "
)

# -- pictures -------------------------------------------------------------------------------------


def resize(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (..., H, W, 3) -> (..., height, width, 3), bilinear without antialiasing as OpenCV does
    it, to within 1 of 255."""
    if pictures.shape[-3:-1] == (height, width):
        return pictures
    flat = (
        torch.from_numpy(np.ascontiguousarray(pictures))
        .reshape(-1, *pictures.shape[-3:])
        .permute(0, 3, 1, 2)
        .float()
    )
    flat = (F.interpolate(flat, (height, width), mode="bilinear") + 0.5).floor().to(torch.uint8)
    return flat.permute(0, 2, 3, 1).reshape(*pictures.shape[:-3], height, width, 3).numpy()


def fit(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (..., H, W, 3) -> (..., height, width, 3): scaled by one factor, sides truncated to
    whole pixels, centred on black."""
    h, w = pictures.shape[-3:-1]
    scale = min(height / h, width / w)
    small = resize(pictures, int(h * scale), int(w * scale))
    top, left = (height - small.shape[-3]) // 2, (width - small.shape[-2]) // 2
    out = np.zeros((*pictures.shape[:-3], height, width, 3), np.uint8)
    out[..., top : top + small.shape[-3], left : left + small.shape[-2], :] = small
    return out


def fit_place(
    places: np.ndarray, part: tuple[int, int], whole: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Places (n, 2) in the `part` (height, width) at the top left of a picture of size `whole`, 0
    to 1 from left and top, where `fit` puts them when the whole is fitted to `size`."""
    part, whole, size = (np.array(x[::-1]) for x in (part, whole, size))  # width, height
    scaled = whole * (size / whole).min()
    return (places * part / whole * scaled + (size - scaled) / 2) / size


def t_layout(
    head: np.ndarray, left: np.ndarray, right: np.ndarray, height: int = 384, width: int = 320
) -> np.ndarray:
    """The official three-camera picture: head on top, both wrists at half the head's size below,
    fitted to height x width. All uint8 (..., H, W, 3); 240 x 320 and 480 x 640 heads both give 360
    x 320 and 12 black rows above and below."""
    for name, picture in {"head": head, "left": left, "right": right}.items():
        if (
            picture.dtype != np.uint8
            or picture.ndim < 3
            or picture.shape[-1] != 3
            or picture.shape[:-3] != head.shape[:-3]
        ):
            raise ValueError(
                f"{name} is {picture.dtype} {picture.shape}; uint8 (..., H, W, 3) is due, all with the same first sizes"
            )
    h, w = head.shape[-3:-1]
    wrists = np.concatenate(
        [resize(left, h // 2, w // 2), resize(right, h // 2, w - w // 2)], axis=-2
    )
    return fit(np.concatenate([head, wrists], axis=-3), height, width)


def t_place(
    places: np.ndarray, head: tuple[int, int], height: int = 384, width: int = 320
) -> np.ndarray:
    """Places (n, 2) in a head picture of this height and width, 0 to 1 from left and top, where
    `t_layout` puts them."""
    return fit_place(places, head, (head[0] + head[0] // 2, head[1]), (height, width))


# -- files ----------------------------------------------------------------------------------------


class Video:
    """An open mp4. Frames are asked for by time, cheapest in rising order: it decodes on, or seeks
    if a key frame lies in between."""

    def __init__(self, path: Path, size: tuple[int, int]):
        self.container, self.size, self.frame = av.open(str(path)), size, None
        if not self.container.streams.video:
            raise ValueError("has no video stream")
        self.stream = self.container.streams.video[0]
        context, self.index = self.stream.codec_context, self.stream.index_entries
        if (context.height, context.width) != size:
            raise ValueError(
                f"is {context.height} x {context.width} where info.json says {size[0]} x {size[1]} (wrong or swapped camera?)"
            )
        if not len(self.index) or len(self.index) != self.stream.frames:
            raise ValueError(f"claims {self.stream.frames} frames and indexes {len(self.index)}")
        last = self.index[len(self.index) - 1]
        if last.pos + last.size > path.stat().st_size:
            raise ValueError(
                f"is truncated: its last frame ends at byte {last.pos + last.size} of {path.stat().st_size}"
            )
        context.thread_count, context.thread_type, context.options = (
            1,
            "NONE",
            {"err_detect": "explode"},
        )
        self.tick, self.reformatter = (
            float(self.stream.time_base),
            av.video.reformatter.VideoReformatter(),
        )
        self.slack = TOLERANCE / self.tick + 1

    def read(self, times: Iterable[float]) -> Iterator[np.ndarray]:
        """Pictures (H, W, 3) uint8 at these seconds."""
        for time in times:
            want = round(time / self.tick)
            at = self.index.search_timestamp(want, backward=True)
            key = self.index[at].timestamp if at >= 0 else -1
            if self.frame is None or want + self.slack < self.frame.pts or key > self.frame.pts:
                self.container.seek(want, stream=self.stream, backward=True)
                self.decoded, self.frame = self.container.decode(self.stream), None
            while self.frame is None or self.frame.pts + self.slack < want:
                self.frame = next(self.decoded, None)
                if self.frame is None or self.frame.is_corrupt or self.frame.pts is None:
                    raise ValueError(f"ends or breaks before {time:.4f} s")
            if self.frame.pts > want + self.slack:
                raise ValueError(
                    f"has a frame at {self.frame.pts * self.tick:.4f} s but none at {time:.4f} s (other fps than info.json?)"
                )
            if (self.frame.height, self.frame.width) != self.size:
                raise ValueError(f"changes size to {self.frame.height} x {self.frame.width}")
            yield self.reformatter.reformat(self.frame, format="rgb24").to_ndarray()

    def close(self) -> None:
        self.container.close()


class Shelf:
    """The last few open files and tables. `take` removes one, so that it has one user; `give` puts
    it back and closes the oldest. Keys hold the process id: a forked loader worker must not move
    its parent's file offsets. A plain dictionary, each of whose methods is whole to other threads;
    OrderedDict is not, when a key's comparison or the end of an old item lets another thread in."""

    def __init__(self, size: int):
        self.items, self.size = {}, size

    def take(self, key: tuple):
        return self.items.pop((os.getpid(), *key), None)

    def give(self, key: tuple, item) -> None:
        self.items[os.getpid(), *key] = item
        for key in list(self.items)[: max(0, len(self.items) - self.size)]:
            old = self.items.pop(key, None)  # None if another thread was faster
            if hasattr(old, "close") and key[0] == os.getpid():
                old.close()


@dataclass(frozen=True)
class Storage:
    """How a dataset is written. yuv420p, LeRobot's usual, halves the colours and costs small
    pictures 6 dB or more; yuv444p keeps them."""

    robot: str = "unknown"
    images: bool = False  # PNG inside the parquet files, exact, instead of mp4
    codec: str = "libx264"  # or libsvtav1; libx264rgb with rgb24 and crf 0 is exact
    pix_fmt: str = "yuv444p"
    options: tuple[tuple[str, str], ...] = (("crf", "18"), ("g", "10"), ("bf", "0"))
    data_mb: float = 100  # a file of v3.0 that has grown to this size is closed after its episode
    video_mb: float = 200
    chunks_size: int = 1000  # files in a folder


class Film:
    """An mp4 being written; pictures go in one after the other, and the first of each episode is a
    key frame."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int], storage: Storage):
        self.container, self.frames, self.bytes = (
            av.open(str(path), "w", options={"movflags": "faststart"}),
            0,
            0,
        )
        self.stream = self.container.add_stream(
            storage.codec, rate=Fraction(fps).limit_denominator(1001), options=dict(storage.options)
        )
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, storage.pix_fmt

    def _mux(self, frame: "av.VideoFrame | None") -> None:
        for packet in self.stream.encode(frame):
            self.bytes += packet.size
            self.container.mux(packet)

    def add(self, picture: np.ndarray, first: bool) -> None:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = self.frames, 1 / self.stream.codec_context.framerate
        frame.pict_type = av.video.frame.PictureType.I if first else av.video.frame.PictureType.NONE
        self.frames += 1
        self._mux(frame)

    def close(self) -> None:
        self._mux(None)
        self.container.close()


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which columns and cameras a model sees. What is left empty is chosen from the dataset and
    printed."""

    state: str = ""  # default observation.state, or none
    action: str = ""  # default action or actions, or none
    cameras: tuple[
        str, ...
    ] = ()  # default a ready concatenated view, else all; for the T-layout head, left, right
    t_layout: bool = False  # the three cameras as one 384 x 320 picture, named "t"
    prefix: str = ""  # put before every instruction
    instruction: str | None = None  # instead of the dataset's tasks; may be empty
    constant: bool = False  # a dimension that never moves is no fault

    @classmethod
    def of(cls, given: "Choice | Mapping | None") -> "Choice":
        if (
            unknown := set(given or ()) - {f.name for f in fields(cls)}
            if not isinstance(given, cls)
            else ()
        ):
            raise ValueError(
                f"mapping has unknown fields {sorted(unknown)}; allowed: {[f.name for f in fields(cls)]}"
            )
        choice = given if isinstance(given, cls) else cls(**(given or {}))
        kinds = {"cameras": (list, tuple), "instruction": (str, type(None))}
        for f in fields(cls):
            value = getattr(choice, f.name)
            wrong = not isinstance(value, kinds.get(f.name, type(f.default)))
            if wrong or (f.name == "cameras" and not all(isinstance(name, str) for name in value)):
                raise ValueError(
                    f"mapping: {f.name} is {value!r:.80}; texts are due, for cameras a list of them, elsewhere true or false"
                )
        return replace(choice, cameras=tuple(choice.cameras))


@dataclass
class Window:
    frames: dict[str, np.ndarray]  # camera -> (F, H, W, 3) uint8
    video_mask: np.ndarray  # (F,) bool, False where the episode has ended or not begun
    actions: np.ndarray | None  # (S, A) float32
    action_mask: np.ndarray  # (S,) bool
    state: np.ndarray | None  # (P,) float32, at the start time
    instruction: str


def fetch(name: str) -> Path:
    """A hub dataset USER/NAME[@REVISION] to the local cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) or ".." in name:
        raise ValueError(
            f"dataset {name}: no such folder, and no hub name; give a folder, or USER/NAME with @REVISION if wanted"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"dataset {name}: no such folder, and hub names need huggingface_hub: pip install 'motus[hub]'"
        ) from error
    repo, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=["meta/**", "data/**", "videos/**", "images/**"],
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {name}: no such folder, and the hub did not give it ({error}); check name and network"
        ) from error


class Recordings:
    """Episodes in a folder: what readers of every format share. A reader has `fps`, `lengths` (rows
    per episode), `cameras`, `widths` of state and actions (0 where there are none), `robot`, and

        numbers(episode)                 state (T, P) and actions (T, A), each or None; ValueError for the first fault in them
        columns(episode)                 those of "state" and "action" that can be read, and every fault; `titles`: names in the files
        texts(episode, row)              its instructions, of which each window gets one
        views(episode, rows)             pictures (H, W, 3) uint8 of these rows, which must rise: camera -> iterator
        labels(episode)                  what only a simulator knew of each row: name -> (T,); nothing in most formats
        describe()                       what it is and what of it is used
    """

    def labels(self, episode: int) -> dict[str, np.ndarray]:
        return {}

    def __init__(self, root: Path, mapping: "Choice | Mapping | None" = None, open_files: int = 24):
        if av is None:
            raise ValueError(MISSING)
        self.name, self.root, self.given, self.shelf = (
            str(root),
            Path(root).resolve(),
            Choice.of(mapping),
            Shelf(open_files),
        )

    @classmethod
    def open(
        cls,
        root: str | Path,
        mapping: "Choice | Mapping | None" = None,
        verify: bool = False,
        quiet: bool = False,
    ) -> "Recordings":
        """A folder, or USER/NAME[@REVISION] on the hub. `mapping`: a Choice or a dict of its
        fields. ValueError for what is no valid dataset, with `verify` for any fault in any episode.
        What was chosen is printed on stderr unless `quiet`."""
        dataset = cls(root if Path(root).is_dir() else fetch(str(root)), mapping)
        if not quiet:
            print(dataset.describe(), file=sys.stderr)
        if verify and (faults := dataset.check()):
            raise ValueError(f"{len(faults)} faults; the first ten are\n" + "\n".join(faults[:10]))
        return dataset

    def __reduce__(self):
        return type(self), (self.root, self.given, self.shelf.size)

    def _fault(self, episode: int | None, field: str, found: str, remedy: str) -> ValueError:
        return ValueError(
            f"dataset {self.name}{'' if episode is None else f', episode {episode}'}, {field}: {found}; {remedy}"
        )

    def _path(self, name: str, episode: int | None = None, field: str = "") -> Path:
        """A regular file inside the root. Links are followed nowhere but from a hub snapshot to its
        blobs."""
        path, blobs = (
            self.root / name,
            self.root.parents[1] / "blobs" if self.root.parent.name == "snapshots" else None,
        )
        real = path if "\0" in name else Path(os.path.realpath(path))
        if (
            "\0" in name
            or ".." in path.parts
            or not path.is_relative_to(self.root)
            or real not in (path, (blobs or path) / real.name)
        ):
            raise self._fault(
                episode,
                field or name,
                f"{name!r} is a link or leaves the folder",
                "put the file itself into the folder",
            )
        if not real.is_file():
            raise self._fault(
                episode,
                field or name,
                f"{name} is missing or no file",
                "fetch the whole dataset or correct its metadata",
            )
        return real

    def _film(
        self,
        path: Path,
        size: tuple[int, int],
        episode: int,
        camera: str,
        origin: float,
        rows: Sequence[int],
        due: int,
        single: bool,
    ) -> Iterator[np.ndarray]:
        """Pictures of rows that rise, from an mp4 in which the episode begins at `origin` seconds
        and ends with frame `due`; `single` says that nothing else is in it."""
        try:
            video = self.shelf.take(("video", path)) or Video(path, size)
            if len(video.index) < due or (single and len(video.index) > due):
                raise ValueError(f"has {len(video.index)} frames where {due} are due")
            yield from video.read(origin + i / self.fps for i in rows)
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise self._fault(
                episode,
                camera,
                f"{path.name} {error}",
                "fetch or encode it again, or correct its metadata",
            ) from error
        self.shelf.give(("video", path), video)

    def nearest(
        self,
        episode: int,
        start_time: float,
        times: Sequence[float],
        field: str,
        tolerance: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows nearest to seconds after `start_time`, clipped to the episode, and which of them lie
        in it."""
        at = (np.asarray(times, float) + start_time) * self.fps
        if not (np.abs(at) < 1e9).all():
            raise self._fault(episode, field, f"are {times}", "give finite seconds")
        index, length = np.floor(at + 0.5).astype(int), int(self.lengths[episode])
        if tolerance is not None and (np.abs(at - index) > tolerance * self.fps).any():
            raise self._fault(
                episode,
                field,
                f"{np.abs(at - index).max() / self.fps:.4f} s off",
                f"rows are at i / {self.fps} s",
            )
        return np.clip(index, 0, length - 1), (index >= 0) & (index < length)

    def window(
        self,
        episode: int,
        start_time: float,
        video_times: Sequence[float],
        action_times: Sequence[float],
        tolerance: float | None = None,
    ) -> "Window":
        """The window at `start_time` seconds of an episode; other times are seconds after it. Each
        takes the nearest row; with `tolerance` a row farther from its time than these seconds is a
        ValueError. Without actions or state in the dataset these are None."""
        if not 0 <= episode < len(self.lengths):
            raise self._fault(
                None, "episode", f"is {episode}", f"there are episodes 0 to {len(self.lengths) - 1}"
            )
        (start,), (inside,) = self.nearest(episode, 0, [start_time], "start_time", tolerance)
        if not inside:
            raise self._fault(
                episode,
                "start_time",
                f"is {start_time} s",
                f"the episode lasts from 0 to {(self.lengths[episode] - 1) / self.fps:.3f} s",
            )
        video, video_mask = self.nearest(episode, start_time, video_times, "video_times", tolerance)
        action, action_mask = self.nearest(
            episode, start_time, action_times, "action_times", tolerance
        )
        need, back = np.unique(video, return_inverse=True)
        state, actions = (
            None if rows is None else rows[at].astype(np.float32)
            for rows, at in zip(self.numbers(episode), (start, action))
        )
        frames = (
            {k: np.stack(list(view))[back] for k, view in self.views(episode, need).items()}
            if len(need)
            else {}
        )
        if self.given.t_layout and frames:
            frames = {"t": t_layout(*frames.values())}
        texts = (
            self.texts(episode, start)
            if self.given.instruction is None
            else [self.given.instruction]
        )
        return Window(
            frames,
            video_mask,
            actions,
            action_mask,
            state,
            self.given.prefix + texts[(7 * start + episode) % len(texts)],
        )

    def check(self, decode: bool = True) -> list[str]:
        """Reads every episode and decodes every frame (without `decode` the first and last) and
        names every fault."""
        faults, extremes, seen, views = (
            [],
            {},
            {},
            np.full((len(self.lengths), len(self.cameras), 48), np.nan, np.float32),
        )
        blame = lambda *words: faults.append(str(self._fault(*words)))
        for e, length in enumerate(self.lengths.tolist()):
            columns = {}
            try:
                columns, bad = self.columns(e)
                faults += map(str, bad)
            except ValueError as error:
                faults.append(str(error))
            for key, rows in columns.items():
                extremes.setdefault(key, []).append((rows.min(0), rows.max(0)))
            mark = hashlib.sha256(b"".join(rows.tobytes() for rows in columns.values())).digest()
            if (
                "action" in columns
                and np.ptp(columns["action"], axis=0).any()
                and seen.setdefault(mark, e) != e
            ):
                blame(
                    e,
                    self.titles["action"],
                    f"equals episode {seen[mark]} number for number",
                    "drop one of the two",
                )
            index = range(length) if decode else sorted({0, length - 1})
            for c, view in enumerate(self.views(e, index).values()):
                try:
                    for picture, i in zip(view, index):
                        views[e, c] = resize(picture, 4, 4).ravel() if i == 0 else views[e, c]
                except ValueError as error:
                    faults.append(str(error))
        for key, pairs in extremes.items() if not self.given.constant else ():
            low, high = np.min([p[0] for p in pairs], axis=0), np.max([p[1] for p in pairs], axis=0)
            for d in np.flatnonzero(low == high):
                blame(
                    None,
                    self.titles[key],
                    f"dimension {d} is {low[d]:.6g} in every row",
                    "allow it with constant=True or leave it out",
                )
        # Cameras a and b of an episode are swapped if each looks like what the other usually shows.
        known = views[np.isfinite(views).all(axis=(1, 2))]
        usual = np.median(known, axis=0) if len(known) > 2 else ()
        gap = lambda a, b: np.abs(views[:, a] - usual[b]).mean(-1)
        for a, b in combinations(range(len(usual)), 2):
            straight, crossed = gap(a, a) + gap(b, b), gap(a, b) + gap(b, a)
            for e in np.flatnonzero((crossed < straight / 2) & (straight > 8)):
                blame(
                    int(e),
                    self.cameras[a],
                    f"and {self.cameras[b]} show each other's view",
                    "swap their files in this episode",
                )
        return faults
