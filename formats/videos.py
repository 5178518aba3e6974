"""Folders of plain videos, level 2 of the pyramid: people at work, no robot (paper Sec. 3.3).

    FOLDER/**/NAME.mp4             any size, rate and rotation
    FOLDER/captions.csv            or .jsonl, .json, of any name: file and caption of each video
    FOLDER/**/NAME.txt             beside a video: its caption, a line per wording
    FOLDER/TASK/N.mp4, N.hdf5      EgoDex: the caption that the hdf5 holds, else the task's name

Rows fall at the multiple of the card's video rate that is nearest to the median of the videos'; the
picture of a row is the one that a player shows at its time. An episode has the name of its
file, so that others may be added or taken away. Only the heads of the files are read before a
picture is asked for: what is broken inside a file is found by `check`, or when it is drawn.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy import ndarray

from formats.recordings import Folder, Given, Numbers, VideoReader, noting
from formats.texts import some

VIEW = "video"
BROKEN = "broken"  # of mapping.without: all that cannot be opened
TABLES = (".csv", ".jsonl", ".json")
COLUMNS = (  # of such a table: the file, its caption
    ("video", "file_name", "file", "path", "name"),
    ("caption", "text", "instruction", "description", "prompt"),
)


def video_files(root: Path) -> list[PurePosixPath]:
    """The mp4 files below a folder, relative to it, in order."""
    found = (path for path in root.rglob("*") if path.suffix.lower() == ".mp4")
    shown = (path.relative_to(root) for path in found if path.name[0] != ".")
    return sorted(map(PurePosixPath, shown))


def stem(name: str | PurePosixPath) -> str:
    """A video's path without its ending, if it has one."""
    path = PurePosixPath(name)
    return str(path.with_suffix("") if path.suffix.lower() == ".mp4" else path)


def table_rows(path: Path) -> list:
    """The rows of a table of captions; a json object has the captions by file."""
    text = path.read_text("utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    found = json.loads(text)
    if isinstance(found, dict):
        return [{"file": name, "caption": caption} for name, caption in found.items()]
    return found


def egodex_caption(path: Path) -> str:
    """The caption of an hdf5 file of EgoDex; of a task that goes both ways, that of its way."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError("needs the package h5py; pip install 'motus[egodex]'") from error
    with h5py.File(path) as file:
        about = {k: v.decode() if isinstance(v, bytes) else v for k, v in file.attrs.items()}
    way = "2" if str(about.get("which_llm_description")) == "2" else ""
    return str(about.get(f"llm_description{way}", ""))


class VideoFolder(Folder):
    """The videos below a root. See `Recordings` for what a reader offers.

    files      their paths, relative to the root
    captions   wordings of each, "" where it has none
    unmatched  names in the table of captions that are no video's
    broken     videos that cannot be opened and are left out, as the mapping says"""

    stated = False
    cameras = (VIEW,)
    widths = (0, 0)
    titles = {}
    remedy = (
        'write it again, or leave it out by "mapping": {"without": ["NAME.mp4"]} in the card, '
        f'["{BROKEN}"] for all that cannot be opened'
    )

    def __init__(self, root: Path, mapping: Given = None):
        super().__init__(root, mapping)
        self._only_texts("plain videos have one view and no numbers")
        without = self.without
        self.without = frozenset()  # of those that are here none
        names = video_files(self.root)
        if unknown := without - {BROKEN, *map(str, names)}:
            problem = f"has {some(unknown)}; expected files of the folder, or {BROKEN!r}"
            raise self._fault("mapping.without", problem)
        wanted = [name for name in names if str(name) not in without]
        heads = {}
        faults = []
        for name in wanted:
            with noting(faults), self._reading(VIEW, str(name)):
                video = self._video(name)
                heads[name] = video.count / video.rate, video.rate, video.stored
        if not heads or (faults and BROKEN not in without):
            raise ValueError("\n".join(faults) or f"{self.name}: all videos are left out; keep one")
        self.files = list(heads)
        self.broken = sorted({*wanted} - {*heads})
        seconds, self.rates, self.sizes = zip(*heads.values())
        self.seconds = np.array(seconds)
        self.rate = max(1, round(sorted(self.rates)[len(heads) // 2]))  # the median
        self.follow(self.rate)
        self.robot = self.root.name
        self.captions = [[""]] * len(heads)
        self.table = None
        self.unmatched = []
        if not self.told:
            self._read_captions(set(map(stem, names)))

    def __reduce__(self):
        return *super().__reduce__(), {"fps": self.fps, "lengths": self.lengths}

    def follow(self, video_hz: float) -> None:
        self.fps = float(video_hz * max(1, round(self.rate / video_hz)))
        self.lengths = np.maximum(1, (self.seconds * self.fps + 1e-6).astype(int))

    def label(self, episode: int) -> str:
        return str(self.files[episode])

    def clip(self, episode: int) -> str:
        return stem(self.files[episode])

    # Captions.

    def _read_captions(self, stems: set[str]) -> None:
        """From a table, from texts beside the videos, from EgoDex, whichever knows a video first.
        Where none does, all are without a word, as if the mapping said so."""
        tables = [path for path in sorted(self.root.iterdir()) if path.suffix in TABLES]
        tables = [path for path in tables if path.name != "card.json"]
        if len(tables) > 1:
            found = [path.name for path in tables]
            raise self._fault("captions", f"could be in {found}; keep one of them in this folder")
        known = {}
        for self.table in tables:
            known = self._read_table(self._path(self.table.name))
        self.unmatched = sorted(known.keys() - stems)
        for e, name in enumerate(self.files):
            texts = known.get(stem(name)) or self._beside(name)
            self.captions[e] = list(filter(None, map(str.strip, texts))) or [""]
        if not any(map(any, self.captions)):
            self.given = replace(self.given, instruction="")

    def _read_table(self, path: Path) -> dict[str, list[str]]:
        """The captions of a table by the stems of their files."""
        known = {}
        with self._reading("captions", f"{path.name}:"):
            for number, row in enumerate(table_rows(path), 1):
                pair = []
                for names in COLUMNS:
                    values = [row[n] for n in names if n in row] if isinstance(row, dict) else []
                    if not values or not isinstance(values[0], str):
                        expected = " and ".join(f"one of {', '.join(n)}" for n in COLUMNS)
                        raise ValueError(
                            f"row {number} is {row!r:.80}; expected texts as {expected}"
                        )
                    pair.append(values[0])
                file, caption = pair
                known.setdefault(stem(file), []).append(caption)
        return known

    def _beside(self, name: PurePosixPath) -> list[str]:
        """The captions of the files beside a video, of which there may be none."""
        for ending in (".txt", ".hdf5"):
            file = name.with_suffix(ending)
            if not (self.root / file).is_file():
                continue
            path = self._path(str(file))
            with self._reading("captions", str(file)):
                if ending == ".txt":
                    return path.read_text("utf-8-sig").splitlines()
                return [egodex_caption(path) or name.parent.name.replace("_", " ")]
        return []

    def recorded_texts(self, episode: int, row: int | None = None) -> list[str]:
        return self.captions[episode]

    # Pictures.

    def _video(self, name: PurePosixPath) -> VideoReader:
        return VideoReader(self._path(str(name)), alone=True)

    def numbers(self, episode: int) -> Numbers:
        return None, None

    def pictures(self, episode: int, camera: str, rows: Sequence[int]) -> Iterator[ndarray]:
        """Pictures (H, W, 3) uint8 of these rows, which must rise."""
        name = self.files[episode]
        with self._reading(camera, str(name)):
            video = self.open_files.take((name,)) or self._video(name)
            begin = video.start * video.tick
            yield from video.read(begin + i / self.fps for i in rows)
        self.open_files.put((name,), video)

    # What is told of it.

    def check(self, seen: dict | None = None) -> list[str]:
        faults = super().check(seen)
        if self.unmatched:
            problem = f"{self.table.name} names {some(self.unmatched)}, which are no videos here"
            faults.append(str(self._fault("captions", f"{problem}; correct or drop the rows")))
        return faults

    def describe(self) -> str:
        sizes = Counter(f"of {height} x {width}" for height, width in self.sizes)
        rates = Counter(f"at {rate:.4g}" for rate in self.rates)
        stored = [[f"{n} {kind}" for kind, n in found.most_common()] for found in (sizes, rates)]
        missing = []
        captions = self.given.instruction or "none"
        if not self.told:
            missing = [f for f, texts in zip(self.files, self.captions) if texts == [""]]
            captions = f"{len(self.files) - len(missing)} of {len(self.files)}"
        for what, names in (("videos without", missing), ("rows of no video", self.unmatched)):
            captions += f"; {what}: {some(names)}" if names else ""
        left = f"; left out as broken: {some(self.broken)}" if self.broken else ""
        return (
            f"{self.name}: plain videos, {len(self.files)} files "
            f"({self.seconds.sum() / 3600:.3f} h){left}\n"
            f"  stored   {'; '.join(map(some, stored))} fps, rows taken at {self.fps:g}\n"
            f"  captions {captions}"
        )
