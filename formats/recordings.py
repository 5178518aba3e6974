"""Episodes on disk, whatever their format: windows by time, checks of everything, pictures, mp4
read and written with `av` alone.

`lerobot.py`, `official.py` and `videos.py` know formats; what they share is here. Row i of an
episode is at i / fps seconds. A wanted time takes the nearest row. What lies outside the episode
repeats its first or last row and is masked.

Three promises. (1) Alignment: every timestamp and every decoded frame's time is compared with i /
fps, within LeRobot's own 0.1 ms; nothing is taken by position alone. (2) Bounds: an episode's
numbers (while they are read, their parquet row groups) and a window's frames are all that is in
memory; what a header claims is held against other claims before anything is allocated. (3) Faults
are ValueErrors that name dataset, episode, field and remedy. `window` tests what it reads; `check`
tests everything and lists every fault.

Shapes: T rows of an episode, F frames of a window, H W pixels, S actions of a window, A action
dimensions, P state dimensions.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray

from weights.files import as_tuples, check_keys, check_types, file_in

try:
    import av
    import pyarrow

    if int(av.__version__.split(".")[0]) < 17:  # the lerobot package wants an older one
        raise ImportError
except ImportError:
    av = pyarrow = None

MISSING = "datasets need the packages pyarrow and av, of version 17 on: pip install 'motus[data]'"
ALONE = 3  # rows of an episode that `check` also reads one by one
TOLERANCE = 1e-4  # seconds between a frame's time and i / fps, as in LeRobot
UNREADABLE = (OSError, ValueError, TypeError, OverflowError, RecursionError)
T_SIZE = (384, 320)  # pixels of the official three-camera picture
AGAIN = "fetch or write it again, or correct its metadata"
# Official RoboTwin data put these words before every instruction: `Choice(prefix=ROBOTWIN_SCENE)`.
ROBOTWIN_SCENE = (
    "The whole scene is in a realistic, industrial art style with three views: a fixed rear camera,"
    " a movable left arm camera, and a movable right arm camera. The aloha robot is currently "
    "performing the following task: "
)

# -- pictures -------------------------------------------------------------------------------------


def resize(pictures: ndarray, height: int, width: int) -> ndarray:
    """uint8 (..., H, W, 3) -> (..., height, width, 3), bilinear without antialiasing as OpenCV does
    it, to within 1 of 255."""
    *first, h, w, _ = pictures.shape
    if (h, w) == (height, width):
        return pictures
    flat = torch.from_numpy(np.ascontiguousarray(pictures)).reshape(-1, h, w, 3)
    flat = F.interpolate(flat.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear")
    flat = (flat + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    return flat.reshape(*first, height, width, 3).numpy()


def fit(pictures: ndarray, height: int, width: int) -> ndarray:
    """uint8 (..., H, W, 3) -> (..., height, width, 3): scaled by one factor, sides truncated to
    whole pixels, centred on black."""
    *first, h, w, _ = pictures.shape
    scale = min(height / h, width / w)
    h, w = int(h * scale), int(w * scale)
    top = (height - h) // 2
    left = (width - w) // 2
    out = np.zeros((*first, height, width, 3), np.uint8)
    out[..., top : top + h, left : left + w, :] = resize(pictures, h, w)
    return out


def fit_place(
    places: ndarray, part: tuple[int, int], whole: tuple[int, int], size: tuple[int, int]
) -> ndarray:
    """Places (n, 2) in the `part` (height, width) at the top left of a picture of size `whole`, 0
    to 1 from left and top, where `fit` puts them when the whole is fitted to `size`."""
    part, whole, size = (np.array(x[::-1]) for x in (part, whole, size))  # width, height
    scale = (size / whole).min()
    return (places * part * scale + (size - whole * scale) / 2) / size


def t_layout(head: ndarray, left: ndarray, right: ndarray) -> ndarray:
    """The official three-camera picture: head on top, both wrists at half the head's size below,
    fitted to 384 x 320. All uint8 (..., H, W, 3); 240 x 320 and 480 x 640 heads both give
    360 x 320 and 12 black rows above and below."""
    for name, picture in {"head": head, "left": left, "right": right}.items():
        alike = picture.shape[:-3] == head.shape[:-3] and picture.shape[-1:] == (3,)
        if picture.dtype != np.uint8 or not alike:
            raise ValueError(
                f"{name} is {picture.dtype} {picture.shape}; expected uint8 (..., H, W, 3), all "
                "with the same first sizes"
            )
    h, w = head.shape[-3:-1]
    wrists = [resize(left, h // 2, w // 2), resize(right, h // 2, w - w // 2)]
    whole = np.concatenate([head, np.concatenate(wrists, axis=-2)], axis=-3)
    return fit(whole, *T_SIZE)


# -- files ----------------------------------------------------------------------------------------


def turned(picture: ndarray, matrix: ndarray) -> ndarray:
    """A picture (H, W, 3) by quarters of a turn and mirrored, as a display matrix (2, 2) says."""
    if matrix[0, 1]:
        picture = picture.swapaxes(0, 1)
        matrix = matrix[::-1]
    if not np.array_equal(matrix != 0, np.eye(2)):
        raise ValueError(f"is turned by {matrix.tolist()}; expected quarters of a turn")
    across, down = np.sign(np.diag(matrix))
    return picture[::down, ::across]


class VideoReader:
    """An open mp4, of a dataset or alone. Its pictures are those of a player: turned as the file
    says, from the first that an edit list leaves. They are asked for by time, cheapest in rising
    order: it decodes on, or seeks if a key frame lies in between. Of a dataset there must be one at
    that time; `alone`, of any rate or none, it is the one shown then, with square pixels."""

    def __init__(self, path: Path, size: tuple[int, int] | None = None, alone: bool = False):
        self.size = size  # height and width of every picture; None: those of the first
        self.alone = alone
        self.before = self.frame = None  # the last two decoded
        self.container = av.open(str(path))
        self.stream = self.container.streams.best("video")
        if self.stream is None:
            raise ValueError("has no video stream")
        self.index = self.stream.index_entries
        count = len(self.index)
        if not count or count != self.stream.frames:
            raise ValueError(f"claims {self.stream.frames} frames and indexes {count}")
        end = self.index[count - 1].pos + self.index[count - 1].size
        if end > path.stat().st_size:
            raise ValueError(f"is truncated: it ends before byte {end}, the end of its last frame")
        first = self.index[0]
        self.count = count
        if first.is_discard:
            self.count -= sum(entry.is_discard for entry in self.index)
        self.stream.codec_context.thread_count = 1
        self.stream.codec_context.options = {"err_detect": "explode"}
        self.stored = (self.stream.height, self.stream.width)  # pixels, before it is turned
        self.rate = float(self.stream.average_rate or 1)
        self.tick = float(self.stream.time_base)  # seconds
        self.slack = TOLERANCE / self.tick + 1
        self.start = self.stream.start_time or 0  # ticks, of the first picture
        self.delay = self.start - first.timestamp  # the index has times of decoding
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.stretch = float(self.stream.sample_aspect_ratio or 1) if alone else 1

    def _key(self, wanted: float) -> int | None:
        """The last key frame, by its time in the index, that seems to be shown by `wanted`."""
        at = self.index.search_timestamp(int(wanted) - self.delay, backward=True)
        return self.index[at].timestamp if at >= 0 else None

    def _seek(self, wanted: int) -> None:
        """Decodes a key frame from which `wanted` is reached. In an open GOP pictures are shown
        before the key frame that they follow in the file; they need the one before it."""
        key = self._key(max(wanted, self.start))
        while key is not None:
            self.container.seek(key + self.delay, stream=self.stream, backward=True)
            self.decoded = self.container.decode(self.stream)
            self.before = None
            self.frame = next(self.decoded, None)
            if self.frame is None or self.frame.pts <= wanted + self.slack:
                break
            key = self._key(key + self.delay - 1)

    def _picture(self, frame: "av.VideoFrame") -> ndarray:
        """The picture (H, W, 3) uint8 of a frame."""
        picture = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        if self.stretch != 1:
            picture = resize(picture, len(picture), round(picture.shape[1] * self.stretch))
        matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is not None:
            picture = turned(picture, np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2])
        size = picture.shape[:2]
        self.size = self.size or size
        if size != tuple(self.size):
            raise ValueError(
                f"is {size[0]} x {size[1]} at {frame.time:.4f} s, expected {self.size[0]} x "
                f"{self.size[1]} (another camera, or turned by its metadata?)"
            )
        return np.ascontiguousarray(picture)

    def read(self, times: Iterable[float]) -> Iterator[ndarray]:
        """Pictures (H, W, 3) uint8 at these seconds."""
        for time in times:
            wanted = round(time / self.tick)
            shown = self._shown(wanted)
            reached = shown.pts if shown else -math.inf
            key = self._key(wanted)
            between = key is not None and key + self.delay > reached
            far = wanted - reached > 1.5 / self.rate / self.tick  # not the next picture
            if shown is None or (between and far):
                self._seek(wanted)
            while self.frame and self.frame.pts + self.slack < wanted:
                self.before = self.frame
                self.frame = next(self.decoded, None)
            shown = self._shown(wanted)
            late = shown is None or shown.pts + self.slack < wanted
            ended = self.frame is None and not (self.alone and shown and self._is_last(shown))
            if (late and ended) or (shown and shown.is_corrupt):
                raise ValueError(f"ends or breaks before {time:.4f} s")
            if late and not (self.alone and shown):
                raise ValueError(
                    f"has a frame at {self.frame.time:.4f} s but none at {time:.4f} s (other fps "
                    "than info.json?)"
                )
            yield self._picture(shown)

    def _shown(self, wanted: int) -> "av.VideoFrame | None":
        """The later of the last two frames that a player has reached by `wanted`."""
        for frame in (self.frame, self.before):
            if frame and frame.pts <= wanted + self.slack:
                return frame
        return None

    def _is_last(self, frame: "av.VideoFrame") -> bool:
        return frame.pts + self.slack >= self.index[len(self.index) - 1].timestamp


class OpenFiles:
    """The last few open files and tables. `take` removes one, so that it has one user; `put` puts
    it back and lets go of the oldest, which closes it. Keys hold the process id: a forked loader
    worker must not move its parent's file offsets. A plain dictionary, each of whose methods is
    whole to other threads; OrderedDict is not, when a key's comparison or the end of an old item
    lets another thread in."""

    def __init__(self, size: int = 24):
        self.items = {}
        self.size = size

    def take(self, key: tuple):
        return self.items.pop((os.getpid(), *key), None)

    def put(self, key: tuple, item) -> None:
        self.items[os.getpid(), *key] = item
        for old in list(self.items)[: -self.size]:
            self.items.pop(old, None)  # another thread may have been faster


@dataclass(frozen=True)
class Storage:
    """How a dataset is written. yuv420p, LeRobot's usual, halves the colours and costs small
    pictures 6 dB or more; yuv444p keeps them."""

    robot: str = "unknown"
    codec: str = "libx264"  # or libsvtav1; libx264rgb with rgb24 and crf 0 is exact
    pix_fmt: str = "yuv444p"
    options: tuple[tuple[str, str], ...] = (("crf", "18"), ("g", "10"), ("bf", "0"))
    together: int = 50  # episodes in a file


class VideoWriter:
    """An mp4 being written; pictures go in one after the other, and the first of each episode is a
    key frame."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int], storage: Storage):
        self.frames = 0
        self.container = av.open(str(path), "w", options={"movflags": "faststart"})
        rate = Fraction(fps).limit_denominator(1001)
        options = dict(storage.options)
        self.stream = self.container.add_stream(storage.codec, rate=rate, options=options)
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = storage.pix_fmt

    def add(self, picture: ndarray, first: bool) -> None:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = self.frames
        frame.time_base = 1 / self.stream.codec_context.framerate
        kinds = av.video.frame.PictureType
        frame.pict_type = kinds.I if first else kinds.NONE
        self.frames += 1
        self._mux(frame)

    def _mux(self, frame: "av.VideoFrame | None") -> None:
        self.container.mux(self.stream.encode(frame))

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
    # default a ready concatenated view, else all; for the T-layout head, left, right
    cameras: tuple = ()
    t_layout: bool = False  # the three cameras as one 384 x 320 picture, named "t"
    prefix: str = ""  # put before every instruction
    instruction: str | None = None  # instead of the dataset's tasks; may be empty
    constant: bool = False  # a dimension that never moves is no fault
    # episodes that are left out, by number; of plain videos names, or "broken" for all such
    without: tuple = ()

    def __post_init__(self):
        check_types("mapping", self)

    @classmethod
    def of(cls, given: "Given") -> "Choice":
        if isinstance(given, cls):
            return given
        check_keys(given or {}, cls, "mapping")
        return cls(**as_tuples(given or {}))


Given = Choice | Mapping | None  # a mapping, as a Choice or a dict of its fields
Numbers = tuple[ndarray | None, ndarray | None]  # of an episode: state (T, P), actions (T, A)
Views = dict[str, Iterator[ndarray]]  # camera -> pictures (H, W, 3) uint8
Flows = Iterator[tuple[ndarray, ndarray]]  # batches of flow (n, H, W, 2), which are valid (n,)


@dataclass
class Window:
    frames: dict[str, ndarray] | ndarray  # by camera, or one picture: (F, H, W, 3) uint8
    video_mask: ndarray  # (F,) bool, False where the episode has ended or not begun
    actions: ndarray | None  # (S, A) float32
    action_mask: ndarray  # (S,) bool
    state: ndarray | None  # (P,) float32, at the start time
    instruction: str


@contextmanager
def noting(faults: list[str]) -> Iterator[None]:
    """A ValueError within becomes one of the faults."""
    try:
        yield
    except ValueError as error:
        faults.append(str(error))


class Recordings:
    """Episodes: what all readers share. Each has

        name        of the source, for messages
        fps         rows per second
        lengths     (E,) rows T of each episode
        cameras     names of the views
        widths      numbers P of the state and A of an action, 0 where there are none
        titles      "state" and "action" -> their names in the files, empty where there are none
        robot       the embodiment
        stated      whether the files name it; else the name of a folder stands for it
        given       the Choice
        without     numbers of episodes that are left out; nothing of them is read

        numbers(episode)        state (T, P) and actions (T, A), or None; ValueError for a fault
        recorded_texts(episode, row)  its instructions; see `texts`
        views(episode, rows)    {camera: iterator of pictures (H, W, 3) uint8}; rows must rise
        describe()              the source, and what of it is used

        axes        names of the numbers of state and action, None where they have none

    Methods of knowledge that few sources have are here with an empty answer."""

    stated = True
    axes = (None, None)
    remedy = AGAIN  # of a file that cannot be read

    def __init__(self, name: str | Path, mapping: Given = None):
        self.name = str(name)
        self.given = Choice.of(mapping)
        self.without = frozenset(self.given.without)

    @property
    def episodes(self) -> list[int]:
        """Numbers of the episodes that are not left out."""
        return [e for e in range(len(self.lengths)) if e not in self.without]

    @property
    def told(self) -> bool:
        """Whether the mapping gives the instruction, so that no text is read."""
        return self.given.instruction is not None

    def texts(self, episode: int, row: int | None = None) -> list[str]:
        """The instructions at a row of an episode, of which each window gets one, or of all its
        rows."""
        return [self.given.instruction] if self.told else self.recorded_texts(episode, row)

    def wordings(self) -> set[str]:
        """All instructions of the source, where no mapping gives one."""
        return {text for e in self.episodes for text in self.recorded_texts(e)}

    def group(self, episode: int) -> str:
        """The episode's task, for drawing tasks alike."""
        return self.texts(episode)[0]

    def whole(self, cameras: Sequence[str] = ()) -> "Recordings":
        """A reader of all there is, for a copy, or of these cameras."""
        return self

    def stored(self, episode: int) -> tuple:
        """An episode as `lerobot.Writer.add` takes it."""
        views = self.views(episode, range(self.lengths[episode]))
        return views, *self.numbers(episode), self.recorded_texts(episode)[0]

    def left_behind(self) -> list[str]:
        """Names of what `stored` does not hold."""
        return []

    def goal(self, episode: int) -> ndarray | None:
        """Where in the picture the thing that the instruction names should go, (2,), 0 to 1 from
        left and top, if anybody knows."""
        return None

    def label(self, episode: int) -> object:
        """As messages name an episode."""
        return episode

    def clip(self, episode: int) -> str:
        """Names an episode for good: that of the file of its latent actions."""
        return f"episode_{episode:06d}"

    def follow(self, video_hz: float) -> None:
        """Told of the rate at which video is seen; a source without rows of its own takes some."""

    def labels(self, episode: int) -> dict[str, ndarray]:
        """Facts that only a simulator knew of each row: name -> (T,)."""
        return {}

    def latents(self, episode: int) -> ndarray | None:
        """Latent actions, standardised, one row for each frame that has one."""
        return None

    def flows(self, episode: int, interval: int) -> Flows | None:
        """True optical flow over `interval` rows, where the source knows it: batches of flow
        (n, H, W, 2) in pixels and which of them are valid (n,)."""
        return None

    def motions(self, episode: int, interval: int) -> ndarray | None:
        """True motions (T, k) over `interval` rows, where the source knows them."""
        return None

    def _fault(self, field: str, problem: str, episode: int | None = None) -> ValueError:
        """`problem`: "found; remedy"."""
        where = "" if episode is None else f", episode {self.label(episode)}"
        return ValueError(f"dataset {self.name}{where}, {field}: {problem}")

    @contextmanager
    def _reading(self, field: str, what: str, episode: int | None = None) -> Iterator[None]:
        """Errors of the libraries that read a file become faults of `what`."""
        try:
            yield
        except (*UNREADABLE, av.error.FFmpegError, pyarrow.ArrowException) as error:
            remedy = "" if "; " in str(error) else f"; {self.remedy}"
            raise self._fault(field, f"{what} {error}{remedy}", episode) from error

    def _finite(self, field: str, rows: ndarray, episode: int) -> ndarray:
        """Rows (T, D) as they are, if all are finite."""
        for row, column in np.argwhere(~np.isfinite(rows))[:1]:
            raise self._fault(
                field,
                f"row {row}, dimension {column} is {rows[row, column]}; repair or drop it",
                episode,
            )
        return rows

    # Windows.

    def _nearest(
        self, episode: int, start_time: float, times: Sequence[float], field: str
    ) -> tuple[ndarray, ndarray]:
        """Rows nearest to seconds after `start_time`, clipped to the episode, and which of them lie
        in it."""
        at = (np.asarray(times, float) + start_time) * self.fps
        if not (np.abs(at) < 1e9).all():
            raise self._fault(field, f"are {times}; give finite seconds", episode)
        rows = np.floor(at + 0.5).astype(int)
        last = int(self.lengths[episode]) - 1
        return rows.clip(0, last), (rows >= 0) & (rows <= last)

    def _frames(self, episode: int, rows: ndarray) -> dict[str, ndarray]:
        """Pictures (F, H, W, 3) of rows in any order, by camera; each is decoded once."""
        if not len(rows):
            return {}
        if not self.cameras:
            raise self._fault("cameras", "there are none; a window needs a video of each episode")
        needed, back = np.unique(rows, return_inverse=True)
        views = self.views(episode, needed)
        frames = {camera: np.stack(list(view))[back] for camera, view in views.items()}
        return {"t": t_layout(*frames.values())} if self.given.t_layout and frames else frames

    def window(
        self,
        episode: int,
        start_time: float,
        video_times: Sequence[float],
        action_times: Sequence[float],
    ) -> Window:
        """The window at `start_time` seconds of an episode; other times are seconds after it. Each
        takes the nearest row. Without actions or state in the source these are None."""
        (start,), (inside,) = self._nearest(episode, 0, [start_time], "start_time")
        if not inside:
            end = (self.lengths[episode] - 1) / self.fps
            problem = f"is {start_time} s; the episode lasts from 0 to {end:.3f} s"
            raise self._fault("start_time", problem, episode)
        video, video_mask = self._nearest(episode, start_time, video_times, "video_times")
        action, action_mask = self._nearest(episode, start_time, action_times, "action_times")
        states, actions = self.numbers(episode)
        texts = self.texts(episode, start)
        return Window(
            self._frames(episode, video),
            video_mask,
            None if actions is None else actions[action].astype(np.float32),
            action_mask,
            None if states is None else states[start].astype(np.float32),
            # The windows of an episode meet each wording.
            self.given.prefix + texts[(7 * start + episode) % len(texts)],
        )

    # Checks.

    def check(self, seen: dict | None = None) -> list[str]:
        """Reads every episode, decodes every frame, and names every fault. `seen`: digest of an
        episode's numbers -> source and number of the first that has them; sources may share it."""
        seen = {} if seen is None else seen
        faults = []
        ends = {}  # column -> lowest and highest numbers of each episode (2 E, D)
        empty = []  # episodes with a text that is
        looks = np.full((len(self.lengths), len(self.cameras), 48), np.nan, np.float32)
        for episode in self.episodes:
            with noting(faults):
                if "" in self.texts(episode) and not self.told:
                    empty.append(self.label(episode))
                for title, rows in zip(self.titles.values(), self.numbers(episode)):
                    if rows is not None:
                        ends.setdefault(title, []).extend([rows.min(0), rows.max(0)])
                self._find_again(episode, seen)
            for number, camera in enumerate(self.cameras):
                with noting(faults):
                    looks[episode, number] = resize(self._watch(episode, camera), 4, 4).ravel()
        for title, rows in ends.items():
            for d in np.flatnonzero(np.ptp(rows, axis=0) == 0) if not self.given.constant else ():
                problem = f"dimension {d} is {rows[0][d]:.6g} in every row; leave it out, or allow"
                remedy = f'{problem} it by "mapping": {{"constant": true}} in the card'
                faults.append(str(self._fault(title, remedy)))
        if empty:
            problem = f"is empty in episodes {empty[:10]}, {len(empty)} in all; write their tasks"
            remedy = f'{problem}, or give one by "mapping": {{"instruction": "..."}} in the card'
            faults.append(str(self._fault("instruction", remedy)))
        with noting(faults):
            self._frames(self.episodes[0], np.zeros(1, int))
        return faults + [str(fault) for fault in self._swapped_cameras(looks)]

    def _find_again(self, episode: int, seen: dict) -> None:
        """ValueError if an episode that moves has the numbers of one that was `seen`."""
        numbers = [rows for rows in self.numbers(episode) if rows is not None]
        if not numbers or not np.ptp(numbers[-1], axis=0).any():
            return
        mine = self.name, episode
        name, first = seen.setdefault(hashlib.sha256(b"".join(map(bytes, numbers))).digest(), mine)
        if (name, first) != mine:
            problem = f"equals episode {first} of {name} number for number; drop one of the two"
            raise self._fault(self.titles["action"], problem, episode)

    def _watch(self, episode: int, camera: str) -> ndarray:
        """The first picture of an episode. All are decoded in order; some of them alone too, and
        must be the same. ValueError for a fault."""
        length = self.lengths[episode]
        some = np.random.default_rng(episode).integers(length, size=ALONE).tolist()
        kept = {}
        for row, picture in enumerate(self.views(episode, range(length))[camera]):
            if row in (0, *some):
                kept[row] = picture
        for row in some:
            (alone,) = self.views(episode, [row])[camera]
            if not np.array_equal(alone, kept[row]):
                raise self._fault(
                    camera,
                    f"row {row} is another picture alone than in order; encode the video again",
                    episode,
                )
        return kept[0]

    def _swapped_cameras(self, looks: ndarray) -> Iterator[ValueError]:
        """Two cameras of an episode are swapped if each looks like what the other usually shows;
        `looks` (episodes, cameras, 48) are 4 x 4 pixels of their first pictures, NaN if unread."""
        known = looks[np.isfinite(looks).all(axis=(1, 2))]
        if len(known) < 3:
            return
        usual = np.median(known, axis=0)
        gaps = np.abs(looks[:, :, None] - usual).mean(-1)  # (episodes, shown by, usual of)
        for a, b in combinations(range(len(usual)), 2):
            straight = gaps[:, a, a] + gaps[:, b, b]
            crossed = gaps[:, a, b] + gaps[:, b, a]
            for episode in np.flatnonzero((crossed < straight / 2) & (straight > 8)):
                problem = f"and {self.cameras[b]} show each other's view; swap their files"
                yield self._fault(self.cameras[a], problem, episode)


# -- folders --------------------------------------------------------------------------------------


class Folder(Recordings):
    """Recordings in a folder. `sizes`: camera -> height and width of its pictures;
    `pictures(episode, camera, rows)`: one of its `views`."""

    def __init__(self, root: Path, mapping: Given = None):
        if av is None:
            raise ValueError(MISSING)
        super().__init__(root, mapping)
        self.root = Path(root).resolve()
        self.open_files = OpenFiles()

    def _only_texts(self, kind: str) -> None:
        """ValueError if the mapping chooses columns or cameras where there are none to choose."""
        given = self.given
        if given.t_layout or given.cameras or given.state or given.action:
            raise self._fault("mapping", f"is {given}; {kind}: only texts can be chosen")

    def __reduce__(self):
        return type(self), (self.root, self.given)

    def _path(self, name: str, episode: int | None = None, field: str = "") -> Path:
        """A regular file inside the root; see `file_in`."""
        with self._reading(field or name, name, episode):
            return file_in(self.root, name)

    def views(self, episode: int, rows: Sequence[int]) -> Views:
        return {camera: self.pictures(episode, camera, rows) for camera in self.cameras}

    def _decode(
        self,
        episode: int,
        camera: str,
        rows: Sequence[int],
        path: Path,
        origin: float = 0.0,
        opens: float | None = None,
    ) -> Iterator[ndarray]:
        """Pictures of rows that rise, from an mp4 in which the episode begins at `origin` seconds
        and the first one at `opens`; None: nothing else is in it. A file that begins later begins
        with its first picture."""
        key = ("video", path)
        length = int(self.lengths[episode])
        with self._reading(camera, path.name, episode):
            video = self.open_files.take(key) or VideoReader(path, self.sizes[camera])
            end = length + round((origin - (opens or 0)) * self.fps)
            if video.count < end or (opens is None and video.count > end):
                raise ValueError(f"has {video.count} frames, expected {end}")
            begin = video.start * video.tick
            if opens is None or opens < begin:
                origin += begin - (opens or 0)
            yield from video.read(origin + i / self.fps for i in rows)
        self.open_files.put(key, video)
