"""Folders of the official Motus code, read as that code reads them, and converted to LeRobot (paper
Sec. 4).

    robotwin        ROOT/{clean,randomized}/TASK/videos/N.mp4  qpos/N.pt  metas/N.txt
    ac_one          ROOT/**/TASK/videos/N.mp4  qpos/N.pt  instructions/N.txt or one for all
                    (aloha_agilex_2 is the same)
    latent_action   ROOT/**/videos/N.mp4  latent_action_dim14/N.pt  metas/N.txt

A folder with `videos` inside is a task; the folders beside `videos` say what its episodes have.
`qpos` (T, 14) are absolute joint positions: left arm and gripper, right arm and gripper. They are
the state and, later in time, the actions: action i of a window is the position one action period
after time i (`ahead` of a card), past the end the last one. A text file has a line per wording; a
window gets one of them. `videos` show three cameras in one picture. `umt5_wan`, prepared text
states, is not read: the text encoder runs here.

The official loader repeats the last pose past the end and learns it; here the same numbers are read
and masked.

Shapes: T rows of an episode, H W pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

from formats.lerobot import write_v3
from formats.recordings import Folder, Given, Numbers, Recordings, Storage, VideoReader
from weights.files import MAX_HEADER, read_torch

VIEW = "cam_concatenated"
PARTS = ("qpos", "latent_action_dim14")


def task_folders(root: Path) -> list[Path]:
    """Folders with `videos` and one of PARTS, in order of their paths."""
    found = {path.parent for part in PARTS for path in root.rglob(part)}
    return sorted(folder for folder in found if (folder / "videos").is_dir())


def is_official(root: Path) -> bool:
    """Whether task folders of the official forms lie in it."""
    return bool(task_folders(Path(root)))


class OfficialFolder(Folder):
    """The episodes of all task folders below a root, in order of their paths. `part` says which of
    PARTS they have. See `Recordings` for what a reader offers."""

    stated = False

    def __init__(self, root: Path, mapping: Given = None):
        super().__init__(root, mapping)
        self._only_texts("official folders have one view and one array")
        self.files = []  # task folder, name of an episode
        kinds = set()
        for folder in task_folders(self.root):
            inner = folder.relative_to(self.root)
            if any(name.endswith("_bak") for name in inner.parts):
                continue
            kinds |= {part for part in PARTS if (folder / part).is_dir()}
            names = sorted(video.stem for video in (folder / "videos").glob("*.mp4"))
            self.files += [(inner, name) for name in names]
        if len(kinds) != 1:
            found = sorted(kinds) or "no qpos beside videos"
            raise self._fault("folders", f"have {found}; give a root of one kind")
        if not self.files:
            raise self._fault("videos", "hold no mp4; each episode is videos/N.mp4 and qpos/N.pt")
        (self.part,) = kinds
        there = [e for e in range(len(self.files)) if e not in self.without]
        path = self._file(there[0], "videos")
        with self._reading("videos", path.name, there[0]):
            video = VideoReader(path)
            next(video.read([video.start * video.tick]))
        self.open_files.put(("video", path), video)
        # Rate and size, which all videos must have.
        self.fps = video.rate
        self.sizes = {VIEW: video.size}
        self.cameras = (VIEW,)
        self.robot = self.root.name
        acting = self.part == "qpos"
        self.lengths = np.ones(len(self.files), int)
        for e in there:
            length, width = self._rows(e).shape
            if e == there[0]:
                first = width
            if width != first:
                problem = f"has {width} columns, episode {there[0]} has {first}; keep one robot"
                raise self._fault(self.part, problem, e)
            self.lengths[e] = length + (not acting)  # one latent less than frames
        self.widths = (first * acting,) * 2
        self.titles = dict.fromkeys(("state", "action"), "qpos" if acting else "")

    def _file(self, episode: int, part: str) -> Path:
        folder, name = self.files[episode]
        suffix = "mp4" if part == "videos" else "pt"
        return self._path(str(folder / part / f"{name}.{suffix}"), episode, part)

    def _rows(self, episode: int) -> ndarray:
        """The tested (T, D) float32 of an episode's .pt: a tensor, or a dictionary with
        `latent_action`."""
        path = self._file(episode, self.part)
        with self._reading(self.part, path.name, episode):
            rows, _ = read_torch(path)
            if isinstance(rows, dict):
                rows = rows.get("latent_action")
            if not isinstance(rows, torch.Tensor):
                raise ValueError(f"holds {type(rows).__name__}, expected a tensor")
            if not rows.is_floating_point() or rows.dim() != 2 or not rows.numel():
                kind = f"{rows.dtype} {tuple(rows.shape)}"
                raise ValueError(f"holds {kind}, expected floats (rows, dimensions)")
            if rows.nbytes > path.stat().st_size:
                raise ValueError(f"claims {rows.nbytes} bytes, more than it has")
        return self._finite(self.part, rows.float().numpy().copy(), episode)

    def numbers(self, episode: int) -> Numbers:
        rows = self._rows(episode) if self.part == "qpos" else None
        return rows, rows

    def follow(self, video_hz: float) -> None:
        """Refuses latent actions that say how many rows they span, if that is no video step."""
        if self.part == "qpos":
            return
        content, _ = read_torch(self._file(self.episodes[0], self.part))
        rows = content.get("interval") if isinstance(content, dict) else None
        if rows and abs(rows * video_hz / self.fps - 1) > 1e-6:
            problem = f"spans {rows} rows of {self.fps:g} fps, a video step 1/{video_hz:g} s"
            raise self._fault(self.part, f"{problem}; choose video_hz {self.fps / rows:g}")

    def latents(self, episode: int) -> ndarray | None:
        """Latent actions (T - 1, 14): row i is the motion from frame i on. None where the folder
        has none."""
        return None if self.part == "qpos" else self._rows(episode)

    def group(self, episode: int) -> str:
        """The folder's name, whether clean or randomized."""
        return self.files[episode][0].name

    def recorded_texts(self, episode: int, row: int | None = None) -> list[str]:
        folder, name = self.files[episode]
        inner = folder / "metas"
        if not (self.root / inner).is_dir():
            inner = folder / "instructions"
            known = [path.stem for path in (self.root / inner).glob("*.txt")]
            if name not in known and folder.name in known:
                name = folder.name
            elif len(known) == 1:
                (name,) = known
        path = self._path(str(inner / f"{name}.txt"), episode, "instruction")
        with self._reading("instruction", path.name, episode):
            if path.stat().st_size > MAX_HEADER:
                raise ValueError(f"has {path.stat().st_size} bytes, expected at most {MAX_HEADER}")
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            if not any(lines):
                raise ValueError("is empty, expected a line per wording")
        return list(filter(None, lines))

    def pictures(self, episode: int, camera: str, rows: Sequence[int]) -> Iterator[ndarray]:
        """Pictures (H, W, 3) uint8 of these rows, which must rise."""
        return self._decode(episode, camera, rows, self._file(episode, "videos"))

    def stored(self, episode: int) -> tuple:
        """The state is qpos and the action the next position, at the end the last."""
        views, state, action, *rest = super().stored(episode)
        if action is not None:
            action = np.concatenate([action[1:], action[-1:]])
        return views, state, action, *rest

    def left_behind(self) -> list[str]:
        """Wordings after the first of each episode, and what else lies beside."""
        counts = [len(self.recorded_texts(e)) for e in range(len(self.files))]
        found = ["task folders, by which `draw` takes tasks alike"]
        if max(counts) > 1:
            found.append(f"{sum(counts) - len(counts)} wordings, all but the first of an episode")
        return found

    def describe(self) -> str:
        frames = int(self.lengths.sum())
        acting = f"qpos ({self.widths[0]}), absolute positions"
        height, width = self.sizes[VIEW]
        return (
            f"{self.name}: official Motus folder with {self.part}, {len(self.files)} episodes in "
            f"{len({folder for folder, _ in self.files})} task folders, {frames} rows at "
            f"{self.fps:g} fps ({frames / self.fps / 3600:.2f} h)\n"
            f"  state, actions  {acting if self.widths[0] else 'none, but latent actions'}\n"
            f"  cameras         {VIEW} ({height} x {width})"
        )


def convert(source: Recordings, root: str | Path, lossless: bool = False) -> list[str]:
    """Writes the episodes of `source` as a LeRobot dataset v3.0, and gives the names of what it
    leaves behind. The videos are encoded again (exactly if `lossless`)."""
    exact = dict(codec="libx264rgb", pix_fmt="rgb24", options=(("crf", "0"),)) if lossless else {}
    episodes = map(source.stored, range(len(source.lengths)))
    write_v3(root, episodes, source.fps, Storage(robot=source.robot, **exact))
    return source.left_behind()
