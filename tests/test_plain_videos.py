"""Folders of plain videos: any size, rate and rotation, captions of four kinds, files that are
broken; and the latent actions of all that a card names."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")
from test_latents import DCAE, TOY, moving_square  # noqa: E402

import data  # noqa: E402
from formats.cards import Pyramid  # noqa: E402
from formats.lerobot import write_v3  # noqa: E402
from formats.recordings import Storage, VideoWriter  # noqa: E402
from formats.videos import VideoFolder  # noqa: E402
from latent_action import LatentActionModel  # noqa: E402
from scripts import latents  # noqa: E402

CLIPS = {"a": (30, (64, 96)), "b": (10, (96, 64)), "sub/c": (60, (48, 48)), "sub/d": (30, (64, 96))}
SECONDS = 2


def shade(time: float) -> int:
    return 20 + round(100 * time)


def write_clip(path: Path, fps: float, size: tuple[int, int]) -> None:
    """A video whose pictures tell their time by how bright they are; a corner is black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = VideoWriter(path, fps, size, Storage())
    for i in range(SECONDS * fps):
        picture = np.full((*size, 3), shade(i / fps), np.uint8)
        picture[:16, :16] = 0
        writer.add(picture, i == 0)
    writer.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, (fps, size) in CLIPS.items():
        write_clip(tmp_path / f"clips/{name}.mp4", fps, size)
    return tmp_path / "clips"


def card_of(where: Path, *sources: dict, **more) -> Path:
    path = where / "card.json"
    path.write_text(json.dumps({"sources": list(sources)} | more))
    return path


def opened(path: Path, levels=(2, 3, 4, 5, 6)) -> Pyramid:
    return Pyramid(path, levels, 4, (48, 48))


def test_videos_of_any_size_and_rate_are_rows_at_the_cards_rate(folder, tmp_path):
    """Rows fall at the multiple of the video rate next to 30, the median; the picture of a
    window is the one shown at its time, whatever the file's own rate, fitted to the card's size."""
    pyramid = opened(folder)
    (o,) = pyramid.opened
    assert (o.source.level, o.reader.fps, pyramid.video_hz) == (2, 30, 5)
    assert o.reader.lengths.tolist() == 4 * [60] and o.reader.widths == (0, 0)
    assert [str(file) for file in o.reader.files] == [f"{name}.mp4" for name in CLIPS]
    for e, (fps, size) in enumerate(CLIPS.values()):
        seen = pyramid.window((0, e, 11), "none")
        assert seen.frames.shape == (5, 48, 48, 3) and seen.video_mask.all()
        for k, frame in enumerate(seen.frames):
            shown = np.floor((11 / 30 + k / 5) * fps + 1e-6) / fps
            assert abs(int(frame[24, 24, 0]) - shade(shown)) <= 4, (e, k)
        height, width = (48 * side // max(size) for side in size)
        lit = seen.frames[0, :, :, 0].max(axis=1) > 9, seen.frames[0, :, :, 0].max(axis=0) > 9
        assert [int(rows.sum()) for rows in lit] == [height, width]
    slow = opened(card_of(tmp_path, {"path": "clips"}, video_hz=8, action_hz=8))
    assert slow.opened[0].reader.fps == 32 and slow.opened[0].reader.lengths.tolist() == 4 * [64]


def test_only_stages_of_video_take_them(folder):
    """Stage 3 has nothing to learn of them, and says so."""
    with pytest.raises(ValueError, match=r"levels \[2\]; this stage takes \[6\].*no actions"):
        data.open_pyramid(folder, "3", "toy")
    with pytest.raises(ValueError, match="one view and no numbers: only texts can be chosen"):
        VideoFolder(folder, {"action": "action"})


TABLES = {
    "captions.csv": 'file_name,caption\na.mp4,"push, slowly"\nsub/c,lift\nb.mp4,turn\nb.mp4,spin\n',
    "about.jsonl": "\n".join(
        json.dumps({"video": name, "text": text})
        for name, text in {"a.mp4": "push, slowly", "sub/c.mp4": "lift"}.items()
    )
    + '\n\n{"video": "b", "text": "turn"}\n{"video": "b", "text": "spin"}\n',
    "captions.json": json.dumps({"a.mp4": "push, slowly", "sub/c": "lift", "b": "turn"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_captions_of_a_table(folder, capsys, name):
    """By path, with or without the ending; several rows of a video are its wordings. A video
    without a caption where others have one and a row of no video are said and are faults."""
    (folder / name).write_text(TABLES[name])
    reader = VideoFolder(folder)
    assert reader.captions[0] == ["push, slowly"] and reader.captions[2:] == [["lift"], [""]]
    assert reader.captions[1] == (["turn"] if "json" in name[-4:] else ["turn", "spin"])
    assert "captions 3 of 4; videos without: sub/d.mp4\n" in reader.describe() + "\n"
    (folder / "sub/d.txt").write_text("first wording\n\nsecond wording\n")
    reader = VideoFolder(folder)
    assert reader.captions[3] == ["first wording", "second wording"] and reader.check() == []
    (folder / "a.mp4").rename(folder / "new.mp4")
    reader = VideoFolder(folder)
    assert "3 of 4; videos without: new.mp4; rows of no video: a" in reader.describe()
    faults = reader.check()
    assert len(faults) == 2 and "is empty in episodes ['new.mp4']" in faults[0]
    assert f"{name} names a, which are no videos here; correct or drop the rows" in faults[1]
    with pytest.raises(ValueError, match="(?s)2 faults.*names a, which"):
        data.main(["check", str(folder)])


def test_a_folder_without_a_word_is_told_so(folder, tmp_path, capsys):
    """No fault: all videos are without a word, which `inspect` writes into its card; the card gives
    the same windows at level 2."""
    card, out = tmp_path / "card.json", tmp_path / "a.png"
    data.main(["inspect", str(folder), "--out", str(out), "--card", str(card)])
    text = capsys.readouterr().out
    assert "plain videos, 4 files" in text and "captions none" in text and "no fault found" in text
    assert "2 of 64 x 96" in text and "2 at 30, 1 at 10, 1 at 60 fps" in text
    (source,) = json.loads(card.read_text())["sources"]
    assert source["level"] == 2 and source["mapping"]["instruction"] == ""
    ours, theirs = (opened(path).window((0, 1, 3), "none") for path in (folder, card))
    assert np.array_equal(ours.frames, theirs.frames) and ours.instruction == ""


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("a.csv", "who,what\na,b\n", "row 1 is .*expected texts as one of video, .*one of caption"),
        ("a.json", '{"a.mp4": 3}', "row 1 is .*'caption': 3"),
        ("a.json", "[1]", "row 1 is 1; expected"),
        ("a.jsonl", "{", "a.jsonl: Expecting"),
    ],
)
def test_a_table_that_is_none_is_refused(folder, name, text, named):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"captions: .*{named}"):
        VideoFolder(folder)


def test_two_tables_are_refused(folder):
    for name in ("a.csv", "b.json"):
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=r"could be in \['a.csv', 'b.json'\]; keep one"):
        VideoFolder(folder)


def test_a_broken_video_is_named_and_left_out_as_asked(folder):
    """By default all that cannot be opened are refused by name with the remedy; a card leaves them
    out by name, or all of them. What breaks later is a fault of `check`."""
    (folder / "a.mp4").write_bytes(b"no video" * 99)
    whole = (folder / "b.mp4").read_bytes()
    (folder / "b.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r'(?s)a.mp4 .*b.mp4 .*without": \["NAME.mp4"\]'):
        VideoFolder(folder)
    with pytest.raises(ValueError, match="b.mp4"):
        VideoFolder(folder, {"without": ["a.mp4"]})
    for without in (["a.mp4", "b.mp4"], ["broken"]):
        reader = VideoFolder(folder, {"without": without})
        assert list(map(str, reader.files)) == ["sub/c.mp4", "sub/d.mp4"] and reader.check() == []
    assert "left out as broken: a.mp4, b.mp4" in reader.describe()
    with pytest.raises(ValueError, match="mapping.without: has z.mp4; expected files of the"):
        VideoFolder(folder, {"without": ["z.mp4", "broken"]})
    for name in ("sub/c.mp4", "sub/d.mp4"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match="sub/d.mp4"):
        VideoFolder(folder, {"without": ["broken"]})


def test_egodex_is_read_for_its_video_and_captions(tmp_path, monkeypatch):
    """The description that the hdf5 names, of two the one of its way; else the task's name. Without
    h5py the message says what to install."""
    about = {
        "0": {"llm_description": "fold it", "llm_description2": "unfold it"},
        "1": {"llm_description": b"fold it", "llm_description2": b"unfold it"},
        "2": {},
    }
    about["0"]["which_llm_description"], about["1"]["which_llm_description"] = "1", b"2"
    for name in about:
        write_clip(tmp_path / f"set/fold_towel/{name}.mp4", 30, (48, 48))
        (tmp_path / f"set/fold_towel/{name}.hdf5").write_bytes(b"hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        ValueError, match="0.hdf5 needs the package h5py; pip install 'motus.egodex.'"
    ):
        VideoFolder(tmp_path / "set")

    class File:
        def __init__(self, path):
            self.attrs = about[path.stem]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=File))
    reader = VideoFolder(tmp_path / "set")
    assert reader.captions == [["fold it"], ["unfold it"], ["fold towel"]]


def test_egodex_files_themselves_are_read(tmp_path):
    """The same through h5py."""
    h5py = pytest.importorskip("h5py")
    write_clip(tmp_path / "set/stack/0.mp4", 30, (48, 48))
    with h5py.File(tmp_path / "set/stack/0.hdf5", "w") as file:
        file.attrs["llm_description"], file.attrs["llm_description2"] = "stack", "unstack"
        file.attrs["which_llm_description"] = "2"
    assert VideoFolder(tmp_path / "set").captions == [["unstack"]]


# -- latent actions of all that a card names ------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> tuple[Path, Path]:
    """A card of videos at 30 and 10 fps, of a robot at 10 and of a world, and an encoder."""
    pytest.importorskip("cv2")
    for name, fps in (("one", 30), ("in/two", 10)):
        path = tmp_path / f"clips/{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = VideoWriter(path, fps, (96, 96), Storage())
        for i, frame in enumerate(moving_square(12)):
            writer.add(frame, i == 0)
        writer.close()
    rows = np.random.default_rng(0).normal(size=(12, 3))
    write_v3(tmp_path / "robot", [({"top": list(moving_square(12))}, rows, rows, "go")], 10)
    world = {"path": "world:toy", "level": 4, "embodiment": "gripper", "episodes": 1}
    sources = [{"path": "clips"}, {"path": "robot", "level": 5}, world]
    torch.manual_seed(0)
    model = LatentActionModel(TOY)
    model.load_dcae(DCAE)
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run/latent_action.safetensors")
    return card_of(tmp_path, *sources, video_hz=5, action_hz=15), tmp_path / "run"


def test_one_command_encodes_a_card_and_training_finds_it(mixed, capsys):
    """Each source lies where stage 2 looks, over one video step of 0.2 s: six rows of the videos,
    two of the robot; a world is left to --latent. Latents of another encoder, or of videos that
    have changed, are refused."""
    card, run = mixed
    latents.main(["encode", "--weights", str(run), "--data", str(card)])
    told = capsys.readouterr().err
    assert "level4_gripper: left out, it knows its flow: train.py --latent" in told
    root = card.parent / "latents"
    made = {n: json.loads((root / n / "statistics.json").read_text()) for n in ("clips", "robot")}
    assert {n: about["made"]["interval"] for n, about in made.items()} == {"clips": 6, "robot": 2}
    assert (root / "clips/latent_action_dim14/in/two.safetensors").is_file()
    pyramid = data.open_pyramid(card, "2", "toy", latent=run)
    for source, episode in ((0, 0), (0, 1), (1, 0), (2, 0)):
        seen = pyramid.window((source, episode, 0), "latent")
        assert seen.actions.shape == (4, 14) and seen.action_mask[0], (source, episode)
    (card.parent / "clips/in/two.mp4").write_bytes((card.parent / "clips/one.mp4").read_bytes())
    with pytest.raises(ValueError, match="two.safetensors has 35 rows, the episode 12; encode"):
        data.open_pyramid(card, "2", "toy", latent=run).window((0, 0, 0), "latent")
    other = LatentActionModel(TOY)
    other.save(run / "latent_action.safetensors")
    with pytest.raises(ValueError, match="clips: made by another encoder than that of --latent"):
        data.open_pyramid(card, "2", "toy", latent=run).window((0, 0, 0), "latent")


def test_folders_of_latents_are_told_apart(mixed, tmp_path):
    """Two sources of one name would overwrite each other's latents; one folder holds one source."""
    card, run = mixed
    (tmp_path / "other").mkdir()
    (tmp_path / "clips").rename(tmp_path / "other/robot")
    card_of(tmp_path, {"path": "other/robot"}, {"path": "robot"}, video_hz=5)
    for more in ([], ["--out", str(tmp_path / "out")]):
        with pytest.raises(ValueError, match='2 sources would lie in .*"latents" in the card'):
            latents.main(["encode", "--weights", str(run), "--data", str(card), *more])


def test_video_is_learned_from_beside_labels_and_not_alone(mixed, tmp_path):
    """Tokens of a card: videos without labels, the target robot with them. A card of videos alone
    is refused, and so is one whose flow nobody knows where stage latent reads it."""
    card, _ = mixed
    out = ["--dcae", str(DCAE), "--labelled", "1", "--out", str(tmp_path / "tokens")]
    latents.main(["tokens", "--data", str(card), *out])
    model = LatentActionModel(TOY)
    model.load_dcae(DCAE)
    _, _, mask = data.read_tokens([tmp_path / "tokens"], model)
    assert 0 < mask.any(dim=1).sum() < len(mask)
    with pytest.raises(ValueError, match="level 4 or 6, .*video alone names no action"):
        latents.main(["tokens", "--data", str(card.parent / "clips"), *out])
    with pytest.raises(ValueError, match="'clips', 'robot'. do not know .*latents tokens"):
        data.motions(opened(card), 3)
