"""Official Motus folders: read as the official code reads them, converted to LeRobot, and refused
by name where broken."""

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
av = pytest.importorskip("av")
from formats.cards import Pyramid  # noqa: E402
from formats.lerobot import LeRobotDataset  # noqa: E402
from formats.official import OfficialFolder, convert, is_official  # noqa: E402
from formats.recordings import ROBOTWIN_SCENE, Storage, VideoWriter  # noqa: E402

EXACT = Storage(codec="libx264rgb", pix_fmt="rgb24", options=(("crf", "0"),))
LENGTHS = {
    "clean/lift_cup/7": 60,
    "clean/lift_cup/12": 20,
    "randomized/lift_cup/0": 55,
    "clean/open_door/a": 58,
}


def picture(shade: int, row: int) -> np.ndarray:
    """A mosaic of 48 x 32 that says its row: head above, wrists below."""
    page = np.full((48, 32, 3), shade, np.uint8)
    page[:32, : row % 32], page[32:, :16, 0], page[32:, 16:, 2] = row, 200, 100
    return page


def film(
    path: Path, count: int, shade: int = 50, fps: int = 30, size: tuple[int, int] = (48, 32)
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    video = VideoWriter(path, Fraction(fps), size, EXACT)
    for i in range(count):
        video.add(picture(shade, i)[: size[0], : size[1]], first=i == 0)
    video.close()


def qpos(length: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).normal(size=(length, 14)).astype(np.float32)
    ).cumsum(0)


def write(root: Path, form: str) -> Path:
    """A small dataset of an official form."""
    for n, (name, length) in enumerate(LENGTHS.items()):
        leaf, stem = (root / name).parent, Path(name).name
        film(leaf / "videos" / f"{stem}.mp4", length, 40 + 10 * n)
        part, rows = (
            ("latent_action_dim14", qpos(length - 1, n))
            if form == "latent_action"
            else ("qpos", qpos(length, n))
        )
        (leaf / part).mkdir(exist_ok=True)
        torch.save(
            {"latent_action": rows} if form == "latent_action" and n else rows,
            leaf / part / f"{stem}.pt",
        )
        texts = leaf / ("instructions" if form == "ac_one" else "metas")
        texts.mkdir(exist_ok=True)
        scene = "" if form == "ac_one" else ROBOTWIN_SCENE
        wordings = [
            f"{scene}{leaf.name} {stem} wording {k}" for k in range(1 if form == "ac_one" else 3)
        ]
        (texts / f"{stem}.txt").write_text("\n".join(wordings) + "\n")
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("official")
    return {form: write(folder / form, form) for form in ("robotwin", "ac_one", "latent_action")}


def pyramid_of(where: Path, **source) -> Pyramid:
    """RoboTwin's rates: actions at 10 Hz, video at 5 Hz, from 30 fps."""
    where.mkdir(exist_ok=True)
    card = {"video_hz": 5, "action_hz": 10, "sources": [source]}
    (where / "card.json").write_text(json.dumps(card))
    return Pyramid(where / "card.json", (source.get("level", 6),), 8, (48, 32))


# -- reading --------------------------------------------------------------------------------------


def test_robotwin_windows_are_those_of_the_official_code(whole, tmp_path):
    """Official indices, written out: action i is qpos[c + 3 (i + 1)], clamped to the last; frame j
    is at action (j + 1) 2 - 1; the state is qpos[c]; no normalisation. What they repeat past the
    end is masked here."""
    pyramid = pyramid_of(tmp_path, path=str(whole["robotwin"]), normalise="none")
    files = [(str(leaf), name) for leaf, name in pyramid.opened[0].reader.files]
    for name, c in (("7", 4), ("12", 5)):
        episode = files.index(("clean/lift_cup", name))
        path = whole["robotwin"] / "clean/lift_cup/qpos" / f"{name}.pt"
        truth = torch.load(path, weights_only=True)
        last = len(truth) - 1
        action_at = [c + (i + 1) * 3 for i in range(16)]
        video_at = [c, *(action_at[(j + 1) * 2 - 1] for j in range(8))]
        seen = pyramid.window((0, episode, c), "real")
        assert np.array_equal(seen.actions, truth[[min(i, last) for i in action_at]])
        assert np.array_equal(seen.state, truth[c])
        shade = int(seen.frames[0, 31, 31, 0])
        for frame, i in zip(seen.frames, video_at, strict=True):
            assert np.array_equal(frame, picture(shade, min(i, last)))
        assert seen.action_mask.tolist() == [i <= last for i in action_at]
        assert seen.video_mask.tolist() == [i <= last for i in video_at]
        assert seen.instruction.startswith(f"{ROBOTWIN_SCENE}lift_cup {name} wording")
    (robot,) = pyramid.robots(acting=True)
    assert torch.equal(robot.actions.apply(truth), truth)
    assert robot.rate == 2 and robot.action_hz == 10


def test_robotwin_tasks_are_drawn_alike_and_wordings_vary(whole):
    """Clean and randomized episodes of a task are one pool; windows of an episode meet each of its
    wordings."""
    pyramid = Pyramid(whole["robotwin"], (6,), 8, (48, 32))
    rows = pyramid.draw(600, 0, 0)
    doors = [e for e in range(4) if pyramid.opened[0].reader.group(e) == "open_door"]
    share = np.isin(rows[:, 1].numpy(), doors).mean() / max(1, len(doors))
    assert 0.4 < share < 0.6
    texts = {pyramid.opened[0].reader.window(0, s / 30, [], []).instruction[-1] for s in range(6)}
    assert texts == {"0", "1", "2"}


def test_real_robots_have_one_text_per_episode_or_task(whole, tmp_path):
    """N.txt, else the only text, else the task's."""
    reader = OfficialFolder(whole["ac_one"])
    assert reader.texts(reader.files.index((Path("clean/open_door"), "a"))) == [
        "open_door a wording 0"
    ]
    shutil.copytree(whole["ac_one"], tmp_path / "one")
    leaf = tmp_path / "one/clean/lift_cup/instructions"
    (leaf / "12.txt").unlink()
    assert (
        OfficialFolder(tmp_path / "one").texts(0)
        == OfficialFolder(tmp_path / "one").texts(1)
        == ["lift_cup 7 wording 0"]
    )
    (leaf / "lift_cup.txt").write_text("any of them")
    assert sorted(OfficialFolder(tmp_path / "one").texts(e)[0] for e in (0, 1)) == [
        "any of them",
        "lift_cup 7 wording 0",
    ]
    shutil.copytree(tmp_path / "one/clean/open_door", tmp_path / "one/old_bak")
    assert len(OfficialFolder(tmp_path / "one").lengths) == 4


def test_latent_actions_are_taken_at_the_video_rate(whole, tmp_path):
    """Official rows c + 6 i and frames c + 6 j; one row less than frames."""
    pyramid = pyramid_of(tmp_path, path=str(whole["latent_action"]), level=5)
    reader = pyramid.opened[0].reader
    e = reader.files.index((Path("clean/lift_cup"), "7"))
    seen = pyramid.window((0, e, 3), "latent")
    assert np.array_equal(seen.actions, reader.latents(e)[3 + 6 * np.arange(8)])
    assert seen.action_mask.all() and len(reader.latents(e)) == 59
    assert np.array_equal(seen.frames[2], picture(int(seen.frames[0, 31, 31, 0]), 15))
    assert reader.widths == (0, 0)


# -- converting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["robotwin", "ac_one"])
def test_converting_changes_nothing(whole, tmp_path, form):
    """Official to LeRobot: the same qpos and pictures of every episode, and its first wording; the
    action is the next position, at the end the last."""
    source = OfficialFolder(whole[form])
    convert(source, tmp_path / "there", lossless=True)
    copy = LeRobotDataset(tmp_path / "there")
    assert copy.check() == [] and copy.version == "v3.0" and copy.fps == source.fps
    assert is_official(whole[form]) and not is_official(tmp_path / "there")
    for e, length in enumerate(source.lengths.tolist()):
        qpos = source.numbers(e)[0]
        state, action = copy.numbers(e)
        assert np.array_equal(state, qpos)
        assert np.array_equal(action, np.concatenate([qpos[1:], qpos[-1:]]))
        assert copy.texts(e) == source.texts(e)[:1] == [copy.group(e)]
        (ours,) = source.views(e, range(length)).values()
        (theirs,) = copy.views(e, range(length)).values()
        assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_converted_dataset_gives_the_same_windows(whole, tmp_path):
    """With the state as actions and `ahead`, LeRobot's copy is drawn like its folder."""
    convert(OfficialFolder(whole["ac_one"]), tmp_path / "lero", lossless=True)
    official = pyramid_of(tmp_path / "a", path=str(whole["ac_one"]))
    mapping = {"action": "observation.state"}
    copy = pyramid_of(tmp_path / "b", path=str(tmp_path / "lero"), mapping=mapping, ahead=True)
    for e in range(4):
        a = vars(official.window((0, e, 2), "real"))
        b = vars(copy.window((0, e, 2), "real"))
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# -- mutants --------------------------------------------------------------------------------------

LEAF = "clean/lift_cup"


def save(content, part: str = "qpos"):
    return lambda root: torch.save(content, root / LEAF / part / "7.pt")


def raw(name: str, change):
    def edit(root: Path) -> None:
        path = root / LEAF / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def gone(name: str):
    def edit(root: Path) -> None:
        path = root / LEAF / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def linked(name: str):
    def edit(root: Path) -> None:
        path = root / LEAF / name
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))

    return edit


def bad_number(value: float):
    rows = qpos(60, 0)
    rows[3, 2] = value
    return save(rows)


def still(root: Path) -> None:
    for path in root.rglob("qpos/*.pt"):
        rows = torch.load(path, weights_only=True)
        rows[:, 5] = 0.5
        torch.save(rows, path)


def shaped(*strides):
    return save(torch.as_strided(torch.zeros(4), (10**8, 14), strides))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


MUTANTS = {
    "no qpos": ("robotwin", gone("qpos/7.pt"), "episode 1, qpos: .*missing"),
    "no video": (
        "robotwin",
        lambda root: [p.unlink() for p in root.rglob("*.mp4")],
        "videos: hold no mp4",
    ),
    "no text": ("robotwin", gone("metas/7.txt"), "episode 1, instruction: .*missing"),
    "no texts at all": ("robotwin", gone("metas"), "instruction: .*missing"),
    "an empty text": (
        "robotwin",
        raw("metas/7.txt", lambda _: b"\n \n"),
        "episode 1, instruction: 7.txt is empty",
    ),
    "a text that is none": (
        "ac_one",
        raw("instructions/7.txt", lambda _: b"\xff\xfe\x00"),
        "instruction: 7.txt 'utf-8' codec can't decode",
    ),
    "a NaN": ("robotwin", bad_number(float("nan")), "episode 1, qpos: row 3, dimension 2 is nan"),
    "an infinity": (
        "ac_one",
        bad_number(float("inf")),
        "episode 1, qpos: row 3, dimension 2 is inf",
    ),
    "a row less": (
        "robotwin",
        save(qpos(59, 0)),
        "episode 1, cam_concatenated: 7.mp4 has 60 frames, expected 59",
    ),
    "a row more": (
        "robotwin",
        save(qpos(61, 0)),
        "episode 1, cam_concatenated: 7.mp4 has 60 frames, expected 61",
    ),
    "another width": (
        "robotwin",
        save(qpos(60, 0)[:, :7]),
        "episode 1, qpos: has 7 columns, episode 0 has 14",
    ),
    "a vector": ("robotwin", save(qpos(60, 0)[:, 0]), "episode 1, qpos: 7.pt holds torch.float32"),
    "whole numbers": (
        "robotwin",
        save(torch.ones(60, 14, dtype=torch.int64)),
        "episode 1, qpos: 7.pt holds torch.int64",
    ),
    "no rows": ("robotwin", save(torch.zeros(0, 14)), "episode 1, qpos: 7.pt holds"),
    "a list": ("robotwin", save([1.0, 2.0]), "episode 1, qpos: 7.pt holds list"),
    "a dictionary without latents": (
        "latent_action",
        save({"z": qpos(59, 0)}, "latent_action_dim14"),
        "episode 1, latent.*holds NoneType",
    ),
    "10^9 numbers in 16 bytes": (
        "robotwin",
        shaped(0, 0),
        "episode 1, qpos: 7.pt claims 5600000000 bytes",
    ),
    "half a pt": ("robotwin", raw("qpos/7.pt", half), "episode 1, qpos: .*torch file"),
    "a pt of text": (
        "robotwin",
        raw("qpos/7.pt", lambda _: b"hello"),
        "episode 1, qpos: .*torch file",
    ),
    "a pt that runs code": ("robotwin", save(Path("/tmp")), "episode 1, qpos: .*torch file"),
    "an empty pt": ("ac_one", raw("qpos/7.pt", lambda _: b""), "episode 1, qpos"),
    "half an mp4": ("robotwin", raw("videos/7.mp4", half), "episode 1, cam_concatenated: 7.mp4"),
    "an mp4 of text": (
        "robotwin",
        raw("videos/7.mp4", lambda _: b"no film"),
        "episode 1, cam_concatenated",
    ),
    "a frame less": (
        "ac_one",
        lambda root: film(root / LEAF / "videos/7.mp4", 59),
        "cam_concatenated: 7.mp4 has 59 frames, expected 60",
    ),
    "another size": (
        "robotwin",
        lambda root: film(root / LEAF / "videos/7.mp4", 60, size=(32, 32)),
        "cam_concatenated: 7.mp4 is 32 x 32",
    ),
    "another fps": (
        "robotwin",
        lambda root: film(root / LEAF / "videos/7.mp4", 60, fps=25),
        "cam_concatenated: 7.mp4 .*other fps",
    ),
    "a link for a pt": ("robotwin", linked("qpos/7.pt"), "episode 1, qpos: .*link"),
    "a link for a video": ("robotwin", linked("videos/7.mp4"), "episode 1, videos: .*link"),
    "a link for a text": ("robotwin", linked("metas/7.txt"), "episode 1, instruction: .*link"),
    "a pipe for a pt": (
        "robotwin",
        lambda root: [gone("qpos/7.pt")(root), os.mkfifo(root / LEAF / "qpos/7.pt")],
        "no file",
    ),
    "latents one too many": (
        "latent_action",
        save(qpos(60, 0), "latent_action_dim14"),
        "cam_concatenated: 7.mp4 has 60 frames, expected 61",
    ),
    "two kinds of folder": (
        "robotwin",
        lambda root: (root / LEAF / "latent_action_dim14").mkdir(),
        "folders: have",
    ),
    "an episode twice": (
        "robotwin",
        lambda root: [
            shutil.copy(root / LEAF / f"{p}/7.{s}", root / LEAF / f"{p}/8.{s}")
            for p, s in (("qpos", "pt"), ("videos", "mp4"), ("metas", "txt"))
        ],
        "episode 2, qpos: equals episode 1",
    ),
    "a dimension that never moves": ("ac_one", still, "qpos: dimension 5 is 0.5 in every row"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_folder_is_refused_by_name(whole, tmp_path, mutant):
    """Each fault ends in a ValueError that names dataset, episode, field and remedy."""
    form, mutate, named = MUTANTS[mutant]
    shutil.copytree(whole[form], tmp_path / "mutant")
    mutate(tmp_path / "mutant")
    with pytest.raises(ValueError, match=rf"(?s)dataset \S*mutant,? .*({named}).*; "):
        faults = OfficialFolder(tmp_path / "mutant").check()
        raise ValueError("\n".join(faults))


def test_latents_that_say_their_span_must_span_a_video_step(whole, tmp_path):
    """Files that `scripts.latents encode --pt` wrote say over how many rows: another span than the
    card's is refused where official files, which are silent, are believed."""
    root = shutil.copytree(whole["latent_action"], tmp_path / "set")
    pyramid_of(tmp_path / "a", path=str(root), level=5)
    for file in root.rglob("*.pt"):
        rows = torch.load(file, weights_only=True)
        rows = rows["latent_action"] if isinstance(rows, dict) else rows
        torch.save({"latent_action": rows, "interval": 3}, file)
    with pytest.raises(
        ValueError, match="spans 3 rows of 30 fps, a video step 1/5 s; .*video_hz 10"
    ):
        pyramid_of(tmp_path / "b", path=str(root), level=5)
