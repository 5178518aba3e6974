"""Folders of the official Motus code, read as that code reads them; written; and converted to
LeRobot and back (paper Sec. 4).

    robotwin        ROOT/{clean,randomized}/TASK/videos/N.mp4  qpos/N.pt  metas/N.txt
    ac_one          ROOT/**/TASK/videos/N.mp4  qpos/N.pt  instructions/N.txt or one for all          (aloha_agilex_2 is the same)
    latent_action   ROOT/**/videos/N.mp4  latent_action_dim14/N.pt  metas/N.txt

A folder with `videos` inside is a task; what lies beside `videos` says what its episodes have.
`qpos` (T, 14) are absolute joint positions: left arm and gripper, right arm and gripper. They are
the state and, later in time, the actions: action i of a window is the position one action period
after time i (`ahead` in data.py), past the end the last one. A text file has a line per wording; a
window gets one of them. `videos` show three cameras in one picture. `umt5_wan`, prepared text
states, is not read: the text encoder runs here.

The official loader repeats the last pose past the end and learns it; here the same numbers are read
and masked.

    convert(source, root, form)     any reader's episodes to `lerobot` (v3.0), `lerobot-v2.1`, `robotwin`, `ac_one` or `latent_action`

Shapes: T rows of an episode, H W pixels.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from formats.lerobot import write_v3, write_v21
from formats.recordings import (
    MAX_BYTES,
    ROBOTWIN_SCENE,
    Choice,
    Film,
    Recordings,
    Storage,
    av,
    t_layout,
)
from weights.files import read_json, read_torch

VIEW, PARTS = "cam_concatenated", ("qpos", "latent_action_dim14")
WORDINGS = (
    "meta/wordings.json"  # in a LeRobot dataset that was converted: every wording of each episode
)

# -- reading --------------------------------------------------------------------------------------


def is_official(root: Path) -> bool:
    """Whether task folders of the official forms lie in it."""
    return (
        next(
            (
                folder
                for part in PARTS
                for folder in Path(root).rglob(part)
                if (folder.parent / "videos").is_dir()
            ),
            None,
        )
        is not None
    )


class OfficialFolder(Recordings):
    """The episodes of all task folders below a root, in order of their paths. See `Recordings` for
    what a reader has."""

    def __init__(self, root: Path, mapping: Choice | Mapping | None = None, open_files: int = 24):
        super().__init__(root, mapping, open_files)
        if self.given.t_layout or self.given.cameras or self.given.state or self.given.action:
            raise self._fault(
                None,
                "mapping",
                f"is {self.given}",
                "official folders have one view and one array: only texts can be chosen",
            )
        leaves = sorted(
            {
                folder.parent
                for part in PARTS
                for folder in self.root.rglob(part)
                if (folder.parent / "videos").is_dir()
            }
        )
        leaves = [
            leaf
            for leaf in leaves
            if not any(part.endswith("_bak") for part in leaf.relative_to(self.root).parts)
        ]
        kinds = {part for leaf in leaves for part in PARTS if (leaf / part).is_dir()}
        if len(kinds) != 1:
            raise self._fault(
                None,
                "folders",
                f"have {sorted(kinds) or 'no qpos beside videos'}",
                "give a root of one kind",
            )
        (self.part,) = kinds
        self.files = [
            (leaf.relative_to(self.root), video.stem)
            for leaf in leaves
            for video in sorted((leaf / "videos").glob("*.mp4"))
        ]
        if not self.files:
            raise self._fault(
                None, "videos", "hold no mp4", "each episode is videos/N.mp4 and qpos/N.pt"
            )
        first = self._file(0, "videos")
        try:
            with av.open(str(first)) as container:
                stream = container.streams.video[0]
                self.fps, self.size = (
                    float(stream.average_rate),
                    (stream.codec_context.height, stream.codec_context.width),
                )
        except (av.error.FFmpegError, OSError, IndexError, TypeError) as error:
            raise self._fault(
                0, "videos", f"{first.name} cannot be opened ({error})", "fetch or write it again"
            ) from error
        self.cameras, self.left_out, self.robot = (VIEW,), [], self.root.name
        self.titles = (
            {"state": "qpos", "action": "qpos"}
            if self.part == "qpos"
            else {"state": "", "action": ""}
        )
        shapes = [self._rows(e).shape for e in range(len(self.files))]
        if wrong := [e for e, shape in enumerate(shapes) if shape[1] != shapes[0][1]]:
            raise self._fault(
                wrong[0],
                self.part,
                f"has {shapes[wrong[0]][1]} columns, episode 0 has {shapes[0][1]}",
                "keep one robot",
            )
        self.lengths = np.array([shape[0] + (self.part != "qpos") for shape in shapes])
        self.widths = (shapes[0][1], shapes[0][1]) if self.part == "qpos" else (0, 0)
        self.tasks = sorted({str(leaf) for leaf, _ in self.files})

    def _file(self, episode: int, part: str) -> Path:
        leaf, name = self.files[episode]
        return self._path(
            str(leaf / part / f"{name}{'.mp4' if part == 'videos' else '.pt'}"), episode, part
        )

    def _rows(self, episode: int) -> np.ndarray:
        """The tested (T, D) float32 of an episode's .pt: a tensor, or a dictionary with
        `latent_action`."""
        if (rows := self.shelf.take(("rows", episode))) is None:
            path = self._file(episode, self.part)
            again = "write a float tensor (rows, dimensions)"
            try:
                content, _ = read_torch(path)
            except ValueError as error:
                raise self._fault(episode, self.part, str(error), again) from error
            rows = content.get("latent_action") if isinstance(content, dict) else content
            if (
                not isinstance(rows, torch.Tensor)
                or not rows.is_floating_point()
                or rows.dim() != 2
                or not rows.numel()
            ):
                kind = (
                    f"{rows.dtype} {tuple(rows.shape)}"
                    if isinstance(rows, torch.Tensor)
                    else type(rows).__name__
                )
                raise self._fault(episode, self.part, f"{path.name} holds {kind}", again)
            if rows.nbytes > path.stat().st_size:
                raise self._fault(
                    episode,
                    self.part,
                    f"{path.name} claims {rows.nbytes} bytes and has {path.stat().st_size}",
                    again,
                )
            rows = rows.float().numpy().copy()
            if len(bad := np.argwhere(~np.isfinite(rows))):
                row, column = bad[0]
                raise self._fault(
                    episode,
                    self.part,
                    f"row {row}, dimension {column} is {rows[row, column]} (of {len(bad)})",
                    "repair it",
                )
        self.shelf.give(("rows", episode), rows)
        return rows

    def numbers(self, episode: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        rows = self._rows(episode) if self.part == "qpos" else None
        return rows, rows

    def latents(self, episode: int) -> np.ndarray | None:
        """Latent actions (T - 1, 14): row i is the motion from frame i on. None where the folder
        has none."""
        return None if self.part == "qpos" else self._rows(episode)

    def columns(self, episode: int) -> tuple[dict[str, np.ndarray], list[ValueError]]:
        self.texts(episode)
        rows = self._rows(episode)
        return {role: rows for role, title in self.titles.items() if title}, []

    def group(self, episode: int) -> str:
        """The episode's task: the folder's name, whether clean or randomized."""
        return self.files[episode][0].name

    def texts(self, episode: int, row: int = 0) -> list[str]:
        leaf, name = self.files[episode]
        if (self.root / leaf / "metas").is_dir():
            found = f"metas/{name}.txt"
        else:
            listed = sorted((self.root / leaf / "instructions").glob("*.txt"))
            known = {path.stem: path.name for path in listed}
            found = "instructions/" + (
                listed[0].name
                if len(listed) == 1
                else known.get(name) or known.get(leaf.name) or f"{name}.txt"
            )
        path = self._path(str(leaf / found), episode, "instruction")
        if path.stat().st_size > MAX_BYTES:
            raise self._fault(
                episode,
                "instruction",
                f"{path.name} has {path.stat().st_size} bytes",
                "write a line per wording",
            )
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise self._fault(
                episode,
                "instruction",
                f"{path.name} is no text ({error.reason})",
                "write it in UTF-8",
            ) from error
        if not lines:
            raise self._fault(
                episode, "instruction", f"{path.name} is empty", "write a line per wording"
            )
        return lines

    def views(self, episode: int, rows: Sequence[int]) -> dict[str, Iterator[np.ndarray]]:
        due = int(self.lengths[episode])
        return {
            VIEW: self._film(
                self._file(episode, "videos"),
                self.size,
                episode,
                "videos",
                0.0,
                rows,
                due,
                single=True,
            )
        }

    def describe(self) -> str:
        frames = int(self.lengths.sum())
        return "\n".join(
            [
                f"{self.name}: official Motus folder with {self.part}, {len(self.files)} episodes in {len(self.tasks)} task folders, "
                f"{frames} rows at {self.fps:g} fps ({frames / self.fps / 3600:.2f} h)",
                f"  state, actions  {f'qpos ({self.widths[0]}), absolute positions' if self.part == 'qpos' else 'none, but latent actions'}",
                f"  cameras         {VIEW} ({self.size[0]} x {self.size[1]})",
            ]
        )


# -- writing --------------------------------------------------------------------------------------

FORMS = ("lerobot", "lerobot-v2.1", "robotwin", "ac_one", "latent_action")


def convert(source: Recordings, root: str | Path, form: str, lossless: bool = False) -> None:
    """Writes the episodes of `source` anew. Videos are encoded again (`lossless`: exactly). From
    qpos to LeRobot the state is qpos and the action is the next position; on the way back only the
    state is written, so that both read the same. Three cameras become the T-layout. The words of
    RoboTwin's scene are put before instructions of the forms `robotwin` and `latent_action`."""
    if form not in FORMS:
        raise ValueError(f"--to is {form!r}; allowed: {', '.join(FORMS)}")
    root = Path(root)
    exact = dict(codec="libx264rgb", pix_fmt="rgb24", options=(("crf", "0"),)) if lossless else {}
    storage = Storage(robot=source.robot, **exact)
    if form.startswith("lerobot"):
        write = write_v3 if form == "lerobot" else write_v21
        write(root, _as_lerobot(source), source.fps, storage)
        wordings = {
            str(e): lines for e in range(len(source.lengths)) if len(lines := source.texts(e)) > 1
        }
        if wordings:
            (root / WORDINGS).write_text(json.dumps(wordings, ensure_ascii=False), "utf-8")
        return
    if root.exists():
        raise ValueError(f"folder {root} exists; remove it or write elsewhere")
    part = root.with_name(root.name + ".part")
    wordings = read_json(source._path(WORDINGS)) if (source.root / WORDINGS).exists() else {}
    try:
        for e in range(len(source.lengths)):
            _write_official(source, e, part, form, storage, wordings)
        part.rename(root)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _as_lerobot(source: Recordings) -> Iterator[tuple]:
    ahead = isinstance(source, OfficialFolder)
    for e, length in enumerate(source.lengths.tolist()):
        state, action = source.numbers(e)
        if ahead and action is not None:
            action = np.concatenate([action[1:], action[-1:]])
        yield source.views(e, range(length)), state, action, source.texts(e)[0]


def _write_official(
    source: Recordings,
    e: int,
    root: Path,
    form: str,
    storage: Storage,
    wordings: dict[str, list[str]],
) -> None:
    """One episode: in one task folder per first instruction, under the number of the episode."""
    length, (state, _) = int(source.lengths[e]), source.numbers(e)
    lines = wordings.get(str(e)) or source.texts(e)
    task = (
        source.group(e)
        if isinstance(source, OfficialFolder)
        else "_".join(lines[0].removeprefix(ROBOTWIN_SCENE).split())[:60]
    )
    leaf = (
        root
        / ("clean" if form == "robotwin" else ".")
        / "".join(c if c.isalnum() or c in "-_" else "" for c in task)
    )
    rows = (
        source.latents(e)
        if form == "latent_action" and isinstance(source, OfficialFolder)
        else state
    )
    if rows is None or (form == "latent_action") != (
        isinstance(source, OfficialFolder) and source.part != "qpos"
    ):
        raise source._fault(
            e,
            "state",
            f"is none that form {form} holds",
            "robotwin and ac_one need a state, latent_action latent actions",
        )
    texts = "metas" if form != "ac_one" else "instructions"
    for folder in ("videos", PARTS[form == "latent_action"], texts):
        (leaf / folder).mkdir(parents=True, exist_ok=True)
    if form != "ac_one":
        lines = [
            line if line.startswith(ROBOTWIN_SCENE) else ROBOTWIN_SCENE + line for line in lines
        ]
    (leaf / texts / f"{e}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    torch.save(
        torch.tensor(rows, dtype=torch.float32), leaf / PARTS[form == "latent_action"] / f"{e}.pt"
    )
    film, views = None, source.views(e, range(length))
    if len(views) not in (1, 3):
        raise source._fault(
            e,
            "cameras",
            f"are {list(views)}",
            "one view, or head, left and right, can be written: choose by mapping",
        )
    for i, pictures in enumerate(zip(*views.values())):
        picture = pictures[0] if len(pictures) == 1 else _mosaic(*pictures)
        film = film or Film(
            leaf / "videos" / f"{e}.mp4",
            Fraction(source.fps).limit_denominator(1001),
            picture.shape[:2],
            storage,
        )
        film.add(picture, first=i == 0)
    film.close()


def _mosaic(head: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The T-layout without padding: (H + H / 2, W, 3)."""
    height, width = head.shape[:2]
    return t_layout(head, left, right, height + height // 2, width)
