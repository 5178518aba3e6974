"""LeRobot datasets: recordings are read back, by time; faults are named."""

import importlib.util
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")
from lerobot_files import SINGLE, as_v21  # noqa: E402

import data  # noqa: E402
from formats import lerobot, recordings  # noqa: E402
from formats.cards import Pyramid, open_recordings  # noqa: E402
from formats.lerobot import LeRobotDataset, write_v3  # noqa: E402
from formats.recordings import (  # noqa: E402
    ROBOTWIN_SCENE,
    T_SIZE,
    Choice,
    Storage,
    fit,
    fit_place,
    t_layout,
)

FPS, CAMERAS, LENGTHS = 10, ("high", "left", "right"), (11, 14, 12, 13)


def picture(camera: int, episode: int, row: int, size: tuple[int, int] = (16, 48)) -> np.ndarray:
    """A picture that says in 12 vertical bars, in any codec, which camera, episode, row it is."""
    number = camera << 10 | episode << 6 | row
    bars = np.array([number >> k & 1 for k in range(12)], np.uint8) * 200 + 20
    return np.repeat(np.broadcast_to(np.repeat(bars, size[1] // 12), size)[..., None], 3, axis=-1)


def number(seen: np.ndarray) -> tuple[int, int, int]:
    """Camera, episode, row of a picture."""
    bits = seen.mean((0, 2)).reshape(12, -1).mean(1) > 110
    value = sum(int(b) << k for k, b in enumerate(bits))
    return value >> 10, value >> 6 & 15, value & 63


def episodes(lengths=LENGTHS, cameras=CAMERAS, dims=(3, 2)):
    for e, length in enumerate(lengths):
        rng = np.random.default_rng(e)
        frames = {name: [picture(c, e, i) for i in range(length)] for c, name in enumerate(cameras)}
        yield (
            frames,
            rng.normal(size=(length, dims[0])),
            rng.normal(size=(length, dims[1])),
            f"task {e % 2}",
        )


def key(camera: str) -> str:
    return f"observation.images.{camera}"


def opened(root: Path, mapping=None) -> LeRobotDataset:
    return LeRobotDataset(root, mapping)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A sound dataset of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    for version in ("v3.0", "v2.1"):
        write_v3(folder / version, episodes(), FPS, SINGLE if version == "v2.1" else Storage())
    as_v21(folder / "v2.1")
    return {path.name: path for path in folder.iterdir()}


# -- what is written is read back -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v3.0", "v2.1"])
def test_what_is_written_is_read_back(whole, kind):
    """Actions, states and tasks are equal to the last bit, and every picture is the one of its row,
    in any order of access."""
    dataset, order = opened(whole[kind]), np.random.default_rng(0)
    assert (
        dataset.check() == [] and dataset.lengths.tolist() == list(LENGTHS) and dataset.fps == FPS
    )
    truth = list(episodes(cameras=tuple(k.rsplit(".", 1)[1] for k in dataset.cameras)))
    for e, row in order.permutation([(e, i) for e, n in enumerate(LENGTHS) for i in range(n)]):
        seen = dataset.window(e, row / FPS, [0], [0])
        assert (
            np.array_equal(seen.state, truth[e][1][row].astype(np.float32))
            and seen.instruction == truth[e][3]
        )
        assert np.array_equal(seen.actions[0], truth[e][2][row].astype(np.float32))
        for c, camera in enumerate(dataset.cameras):
            assert number(seen.frames[camera][0]) == (c, e, row)


@pytest.mark.parametrize(
    "options",
    [(("g", "2"),), (("g", "30"),), (("g", "12"), ("bf", "3")), (("g", "250"), ("bf", "2"))],
)
def test_pictures_are_exact_with_any_key_frames_and_with_b_frames(tmp_path, options):
    """One mp4 holds three episodes; forwards, backwards and in leaps, each time gives its own
    picture."""
    write_v3(tmp_path / "d", episodes((40, 30, 50), ("one",)), 29.97, Storage(options=options))
    dataset, rng = opened(tmp_path / "d"), np.random.default_rng(1)
    for e, n in enumerate((40, 30, 50)):
        for rows in (range(n), reversed(range(n)), rng.integers(n, size=20)):
            for i in rows:
                assert number(next(dataset.pictures(e, key("one"), [i]))) == (0, e, i)


def test_a_lossless_codec_returns_the_same_pictures(tmp_path):
    """libx264rgb at crf 0 is exact, noise included."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)
    write_v3(
        tmp_path / "d",
        [({"a": noise}, None, None, "look")],
        5,
        Storage(codec="libx264rgb", pix_fmt="rgb24", options=(("crf", "0"),)),
    )
    seen = opened(tmp_path / "d").window(0, 0, np.arange(5) / 5, [0])
    assert (
        np.array_equal(seen.frames[key("a")], noise) and seen.actions is None and seen.state is None
    )


def test_what_a_simulator_knew_is_a_column_that_no_window_holds(tmp_path):
    """Labels come back under their names and change nothing else; numbers that are not finite, or
    too few of them, are refused, and so are names that do not fit."""
    plain = list(episodes(cameras=("one",)))
    labels = [
        {"cup x": np.arange(len(states)) / 8, "cup y": np.zeros(len(states))}
        for _, states, _, _ in plain
    ]
    write_v3(tmp_path / "d", [(*episode, known) for episode, known in zip(plain, labels)], FPS)
    write_v3(tmp_path / "plain", plain, FPS)
    with_labels, without = opened(tmp_path / "d"), opened(tmp_path / "plain")
    for e, known in enumerate(labels):
        assert {k: v.tolist() for k, v in with_labels.labels(e).items()} == {
            k: v.tolist() for k, v in known.items()
        }
        assert without.labels(e) == {}
        a, b = (dataset.window(e, 0.2, (0, 0.1), (0, 0.1)) for dataset in (with_labels, without))
        assert (
            np.array_equal(a.state, b.state)
            and np.array_equal(a.actions, b.actions)
            and a.state.shape == (3,)
        )
    assert not with_labels.check()
    for wrong in ({"cup x": [np.nan] * len(plain[0][1])}, {"cup x": [0.0]}):
        with pytest.raises(
            ValueError, match="observation.environment_state: (is .* give finite|has 1 rows for 11)"
        ):
            write_v3(tmp_path / "wrong", [(*plain[0], wrong)], FPS)
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    info["features"][lerobot.LABELS]["names"] = ["cup x"]
    (tmp_path / "d/meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="has 1 names for 2 numbers"):
        opened(tmp_path / "d").labels(0)


def test_v3_files_roll_over_and_number_on(tmp_path, monkeypatch):
    """Three episodes in a file and one file in a folder: the fourth has others."""
    monkeypatch.setattr(lerobot, "FILES", 1)
    write_v3(tmp_path / "d", episodes(cameras=("one",)), FPS, Storage(together=3))
    names = {str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").rglob("*") if p.is_file()}
    assert {name for name in names if not name.startswith("meta")} == {
        f"{room}/chunk-00{chunk}/file-000.{ending}"
        for room, ending in (("data", "parquet"), (f"videos/{key('one')}", "mp4"))
        for chunk in range(2)
    }
    dataset = opened(tmp_path / "d")
    assert dataset.check() == []
    assert [number(next(dataset.pictures(e, key("one"), [3]))) for e in range(4)] == [
        (0, e, 3) for e in range(4)
    ]


def test_times_become_the_nearest_rows_and_the_rest_is_masked(whole):
    """At 10 rows per second from 0.5 s on: exact times, times between rows, times before the start
    and past the end."""
    seen = opened(whole["v3.0"]).window(
        1, 0.5, [0, 0.1, 0.34, -0.6, 0.8, 0.9], [0, 0.26, 0.8, 0.9, 5]
    )
    assert [number(f)[2] for f in seen.frames[key("left")]] == [5, 6, 8, 0, 13, 13]
    assert seen.video_mask.tolist() == [True, True, True, False, True, False]
    truth = list(episodes())[1][2].astype(np.float32)
    assert np.array_equal(
        seen.actions, truth[[5, 8, 13, 13, 13]]
    ) and seen.action_mask.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    "start, video, named",
    [
        (1.4, [0], "start_time"),
        (-0.1, [0], "start_time"),
        (float("nan"), [0], "start_time"),
        (0, [float("inf")], "video_times"),
    ],
)
def test_impossible_times_are_refused(whole, start, video, named):
    """Outside the episode, or not finite."""
    with pytest.raises(ValueError, match=rf"dataset .*, episode 1, {named}: .*; "):
        opened(whole["v3.0"]).window(1, start, video, [0])


def test_windows_decoded_by_threads_equal_windows_alone(whole):
    """Two threads change nothing; nor does a pickled copy, which opens its own files."""
    dataset, rng = opened(whole["v3.0"]), np.random.default_rng(2)
    requests = [
        (int(e), float(i) / FPS, [0, 0.2, 0.4], [0, 0.1])
        for e, i in zip(rng.integers(4, size=20), rng.integers(11, size=20))
    ]
    copy = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda request: dataset.window(*request), requests))
    for request, a in zip(requests, found, strict=True):
        b = copy.window(*request)
        assert all(
            np.array_equal(a.frames[k], b.frames[k]) for k in dataset.cameras
        ) and np.array_equal(a.actions, b.actions)


# -- choices, layouts, the hub --------------------------------------------------------------------


def test_open_files_survive_threads_that_take_and_put_at_every_moment():
    """In a process of its own, for it used to crash there: comparing keys, and the end of an item,
    let other threads in halfway."""
    code = """if True:
        import sys, threading
        from pathlib import Path
        from formats.recordings import OpenFiles
        sys.setswitchinterval(1e-6)
        opened, faults = OpenFiles(2), []
        class Video:
            def __del__(self):
                return [i for i in range(20)]
        def work(n):
            try:
                for i in range(40_000):
                    key = "video", Path(f"/a/{i * n % 3}")
                    opened.put(key, opened.take(key) or Video())
            except BaseException as error:
                faults.append(repr(error))
        threads = [threading.Thread(target=work, args=(7 + n,)) for n in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert not faults and len(opened.items) <= 2, (faults, opened.items)
        """
    root = Path(recordings.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_t_layout_has_the_official_sizes():
    """240 x 320 with halved wrists is 360 x 320, centred on 384 x 320 with 12 black rows; three 480
    x 640 cameras give the same."""

    def flat(value, *size):
        return np.full((*size, 3), value, np.uint8)

    for h, w in ((240, 320), (480, 640)):
        t = t_layout(flat(10, h, w), flat(20, h, w), flat(30, h, w))
        assert t.shape == (384, 320, 3) and not t[:12].any() and not t[372:].any()
        assert (
            (t[12:252] == 10).all()
            and (t[252:372, :160] == 20).all()
            and (t[252:372, 160:] == 30).all()
        )
    assert fit(flat(9, 100, 50), 64, 64)[32].any(-1).sum() == 32
    with pytest.raises(ValueError, match="left is float32"):
        t_layout(flat(1, 4, 4), flat(1, 4, 4).astype(np.float32), flat(1, 4, 4))


@pytest.mark.parametrize("head", ((240, 320), (96, 128), (100, 100)))
def test_a_place_in_the_head_picture_is_found_in_the_t(head):
    """A white spot of the head picture is where `fit_place` says, whatever the camera's shape."""
    picture, wrist = np.zeros((*head, 3), np.uint8), np.zeros((*head, 3), np.uint8)
    picture[20:28, 60:68] = 255
    spot = np.argwhere(t_layout(picture, wrist, wrist)[..., 0] > 128).mean(0) + 0.5
    whole = head[0] * 3 // 2, head[1]
    place = fit_place(np.array([[64 / head[1], 24 / head[0]]]), head, whole, T_SIZE)[0]
    assert np.abs(place * (320, 384) - spot[::-1]).max() < 1.5


def test_resizing_agrees_with_opencv():
    """To within one grey level for any sizes, and exactly when halving."""
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    for h, w in ((45, 60), (64, 64), (200, 130), (31, 77)):
        gap = np.abs(
            recordings.resize(image, h, w).astype(int)
            - cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
        )
        assert gap.max() <= (0 if h == 45 else 1)


def test_defaults_are_chosen_and_described(whole):
    """State, action and all cameras without being asked; the T-layout finds its three by name; a
    prefix stands before the task."""
    dataset = opened(whole["v2.1"])
    assert dataset.titles == {"state": "observation.state", "action": "action"}
    assert dataset.cameras == tuple(map(key, CAMERAS))
    said = dataset.describe()
    assert all(
        word in said
        for word in (
            "v2.1",
            "observation.state (3), chosen",
            "action (2), chosen",
            f"{key('left')} (16 x 48)",
        )
    )
    seen = opened(whole["v2.1"], {"t_layout": True, "prefix": ROBOTWIN_SCENE}).window(
        0, 0, [0, 0.1], [0]
    )
    assert (
        seen.frames["t"].shape == (2, 384, 320, 3) and seen.instruction == ROBOTWIN_SCENE + "task 0"
    )
    seen = opened(
        whole["v2.1"], Choice(cameras=(key("left"),), state="action", instruction="go")
    ).window(0, 0, [0], [0])
    assert (
        list(seen.frames) == [key("left")]
        and np.array_equal(seen.state, seen.actions[0])
        and seen.instruction == "go"
    )


@pytest.mark.parametrize(
    "mapping, named",
    [
        ({"stat": "x"}, "unknown key 'stat'.*'state'"),
        ({"state": "observation.pose"}, "observation.pose: .*choose from"),
        ({"action": key("left")}, "is chosen as action"),
        ({"cameras": ["action"]}, "is chosen as a camera"),
        ({"cameras": [key("left")] * 2}, "each once"),
        ({"cameras": [key("left")], "t_layout": True}, "head"),
        ({"cameras": [key("high"), key("right"), key("left")], "t_layout": True}, "in this order"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(whole, mapping, named):
    """Misspelt fields, columns that are not there or of the wrong kind, cameras twice, too few or
    left for right."""
    with pytest.raises(ValueError, match=named):
        opened(whole["v3.0"], mapping)


def test_hub_names_go_through_huggingface_hub(whole, monkeypatch):
    """USER/NAME@REVISION is asked of the hub, snapshots may link to their blobs, and a missing
    package is said plainly."""
    asked = []
    hub = types.SimpleNamespace(
        snapshot_download=lambda *a, **k: asked.append((a, k["revision"])) or str(whole["v3.0"])
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert len(open_recordings("user/pick-place@v1", Path()).lengths) == 4
    assert asked == [(("user/pick-place",), "v1")]
    with pytest.raises(ValueError, match="no hub name"):
        open_recordings("../../nowhere", Path())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'motus\[hub\]'"):
        open_recordings("user/name", Path())
    for module in (recordings, lerobot):
        monkeypatch.setattr(module, "av", None)
    for use in (lambda: opened(whole["v3.0"]), lambda: write_v3("x", [], 1)):
        with pytest.raises(ValueError, match=r"pip install 'motus\[data\]'"):
            use()


def test_an_av_that_is_too_old_is_as_good_as_none(monkeypatch):
    """The lerobot package installs one that has no rotations."""
    again = importlib.util.spec_from_file_location("again", recordings.__file__)
    for version, usable in (("17.0.1", True), ("15.1.0", False)):
        monkeypatch.setattr(av, "__version__", version)
        module = importlib.util.module_from_spec(again)
        monkeypatch.setitem(sys.modules, "again", module)
        again.loader.exec_module(module)
        assert (module.av is av) == usable


def test_a_hub_snapshot_may_link_to_its_blobs_and_nowhere_else(whole, tmp_path):
    """The cache keeps every file under blobs/ and links to it; the same link is refused anywhere
    else."""
    root, blobs = tmp_path / "datasets--u--n/snapshots/abc", tmp_path / "datasets--u--n/blobs"
    shutil.copytree(whole["v3.0"], root)
    blobs.mkdir()
    for i, path in enumerate([p for p in root.rglob("*") if p.is_file()]):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), path.parent))
    assert opened(root).check() == []
    shutil.copytree(root, tmp_path / "elsewhere/snap", symlinks=True)
    with pytest.raises(ValueError, match="link"):
        opened(tmp_path / "elsewhere/snap")


# -- writing refuses ------------------------------------------------------------------------------


GOOD = list(episodes((4,), ("one",)))[0]


@pytest.mark.parametrize(
    "bad, named",
    [
        ((GOOD[0], GOOD[1], GOOD[2], ""), "task"),
        ((GOOD[0], GOOD[1][:3], GOOD[2], "t"), "state: has 3 rows for 4 of"),
        (({}, None, None, "t"), "features"),
        ((GOOD[0], GOOD[1], GOOD[2] * np.nan, "t"), "action"),
        (({"one": GOOD[0]["one"][:3]}, *GOOD[1:]), "one: has 3 rows for 4 of"),
        (({"one": [p.astype(float) for p in GOOD[0]["one"]]}, *GOOD[1:]), "float64"),
        (({"two": GOOD[0]["one"]}, *GOOD[1:]), "features"),
        (({"one": [p[:8] for p in GOOD[0]["one"]]}, *GOOD[1:]), "one"),
        ((GOOD[0], GOOD[1], GOOD[2][:, :1], "t"), "features"),
    ],
)
def test_bad_episodes_are_not_written(tmp_path, bad, named):
    """The fault is named with its episode, and no half-written folder stays."""
    with pytest.raises(ValueError, match=rf"episode 1, .*{named}"):
        write_v3(tmp_path / "d", [GOOD, bad], FPS)
    assert not list(tmp_path.iterdir())
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="exists"):
        write_v3(tmp_path / "d", [GOOD], FPS)


# -- the lerobot package itself -------------------------------------------------------------------

# Run by a Python that has lerobot (0.4.4 for v3.0, 0.3.2 for v2.1). Videos are decoded by PyAV, so
# that torchcodec is not needed.
ORACLE = """
import sys
import av, numpy as np, torch
import lerobot.datasets.lerobot_dataset as oracle

def decode(path, timestamps, tolerance, *_):
    with av.open(str(path)) as file:
        decoded = file.decode(video=0)
        frames = {float(f.pts * f.time_base): f.to_ndarray(format="rgb24") for f in decoded}
    nearest = [min(frames, key=lambda t: abs(t - wanted)) for wanted in timestamps]
    assert all(abs(a - b) < tolerance for a, b in zip(nearest, timestamps))
    pictures = [torch.from_numpy(frames[t]) for t in nearest]
    return torch.stack([picture.permute(2, 0, 1).float() / 255 for picture in pictures])

oracle.decode_video_frames = decode
times = {"action": [i / 10 for i in range(5)]}
dataset = oracle.LeRobotDataset("some/name", root=sys.argv[1], delta_timestamps=times)
rows = [dataset[i] for i in range(len(dataset))]
np.savez(sys.argv[2], **{k: np.stack([np.asarray(row[k]) for row in rows]) for k in rows[0]})
"""


@pytest.mark.parametrize("kind", ["v3.0", "v2.1"])
def test_the_lerobot_package_reads_the_same(whole, tmp_path, kind):
    """What is written here opens there, and gives the same state, chunks, padding, task and pixels.
    LEROBOT_V30 and LEROBOT_V21 in the environment are paths of Pythons that import those lerobots.
    """
    python = os.environ.get("LEROBOT_" + kind[:4].upper().replace(".", ""))
    if not python:
        pytest.skip("no lerobot at hand")
    (tmp_path / "oracle.py").write_text(ORACLE)
    subprocess.run(
        [python, tmp_path / "oracle.py", whole[kind], tmp_path / "rows.npz"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    theirs, dataset = np.load(tmp_path / "rows.npz"), opened(whole[kind])
    for n, (e, i) in enumerate((e, i) for e, length in enumerate(LENGTHS) for i in range(length)):
        ours = dataset.window(e, i / FPS, [0], np.arange(5) / FPS)
        assert np.array_equal(ours.state, theirs["observation.state"][n]) and np.array_equal(
            ours.actions, theirs["action"][n]
        )
        assert (
            np.array_equal(~ours.action_mask, theirs["action_is_pad"][n])
            and ours.instruction == theirs["task"][n]
        )
        for camera in dataset.cameras:
            assert np.array_equal(
                ours.frames[camera][0], np.round(theirs[camera][n].transpose(1, 2, 0) * 255)
            )


# -- mutants: what is broken is named -------------------------------------------------------------


def edit_info(**changes):
    def mutate(root: Path) -> None:
        info = json.loads((root / "meta/info.json").read_text())
        for name, value in changes.items():
            info[name] = value(info) if callable(value) else value
        (root / "meta/info.json").write_text(json.dumps(info))

    return mutate


def feature(name: str, **changes):
    return edit_info(
        features=lambda info: info["features"] | {name: info["features"].get(name, {}) | changes}
    )


def data_file(root: Path, episode: int = 1) -> Path:
    """The parquet that holds an episode: its own in v2.1, the only one in v3.0."""
    return sorted((root / "data").rglob("*.parquet"))[
        episode if (root / "meta/episodes.jsonl").exists() else 0
    ]


def video_file(root: Path, camera: str = "left", episode: int = 1) -> Path:
    files = sorted(p for p in (root / "videos").rglob("*.mp4") if key(camera) in str(p))
    return files[min(episode, len(files) - 1)]


def edit_table(change, path=data_file):
    def mutate(root: Path) -> None:
        file = path(root)
        pq.write_table(change(pq.read_table(file)), file)

    return mutate


def column(name: str, change):
    """Replaces a column by change(list of its values)."""

    def replace(table):
        values = pa.array(change(table[name].to_pylist()))
        try:
            values = values.cast(table[name].type)
        except pa.ArrowException:
            pass  # another type is the fault that is wanted
        return table.set_column(table.schema.get_field_index(name), name, values)

    return replace


def at(name: str, row: int, value):
    """One cell of the data: `value`, or value(old)."""

    def change(cells):
        cells[row] = value(cells[row]) if callable(value) else value
        return cells

    return edit_table(column(name, change))


def episode_rows(root: Path) -> Path:
    return root / "meta/episodes/chunk-000/file-000.parquet"


def edit_lines(name: str, change):
    def mutate(root: Path) -> None:
        path = root / f"meta/{name}.jsonl"
        rows = change([json.loads(line) for line in path.read_text().splitlines()])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return mutate


def edit_bytes(path, change):
    def mutate(root: Path) -> None:
        file = path(root)
        file.write_bytes(change(bytearray(file.read_bytes())))

    return mutate


def claim_frames(raw: bytearray) -> bytearray:
    """The sample table of an mp4 says 10^9."""
    i = raw.index(b"stts")
    raw[i + 12 : i + 16] = struct.pack(">I", 10**9)
    return raw


def claim_samples(raw: bytearray) -> bytearray:
    for name, words in ((b"stts", {12: 10**9}), (b"stsz", {8: 100, 12: 10**9})):
        for offset, value in words.items():
            i = raw.index(name)
            raw[i + offset : i + offset + 4] = struct.pack(">I", value)
    return raw


def garble(raw: bytearray) -> bytearray:
    i = raw.index(b"mdat") + 900
    raw[i : i + 200] = b"\0" * 200
    return raw


def encode(fps: int, count: int, size=(16, 48)):
    def mutate(root: Path) -> None:
        video = recordings.VideoWriter(video_file(root), fps, size, Storage())
        for i in range(count):
            video.add(picture(1, 1, i, size), i == 0)
        video.close()

    return mutate


def swap(a, b):
    def mutate(root: Path) -> None:
        first, second = a(root), b(root)
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)

    return mutate


def link(path, inside: bool):
    def mutate(root: Path) -> None:
        file = path(root)
        target = root / "meta/kept" if inside else root.parent / "outside"
        file.rename(target)
        file.symlink_to(target)

    return mutate


def outside(root: Path) -> None:
    """A path that leads to a real file beside the dataset."""
    shutil.copy(data_file(root), root.parent / "outside.parquet")
    edit_info(data_path="../outside.parquet")(root)


def pipe(root: Path) -> None:
    data_file(root).unlink()
    os.mkfifo(data_file_name := root / "data/chunk-000/episode_000001.parquet")
    assert data_file_name.exists()


def many_rows(root: Path) -> None:
    """A few bytes on disk that unpack to millions of rows."""
    zeros = pa.array(np.zeros(2_000_000, np.int8))
    pq.write_table(
        pa.table({name: zeros for name in pq.read_schema(data_file(root)).names}), data_file(root)
    )


def twice(root: Path) -> None:
    shutil.rmtree(root)
    first, second = list(episodes((9, 12)))
    write_v3(root, [first, second, first], FPS, SINGLE)
    as_v21(root)


def ragged(table):
    cells = [[1.0], [1.0, 2.0, 3.0], *table["action"].to_pylist()[2:]]
    return table.set_column(1, "action", pa.array(cells, pa.list_(pa.float32())))


def as_image(feature: dict) -> dict:
    return feature | {"dtype": feature["dtype"].replace("video", "image")}


def remove(path):
    return lambda root: path(root).unlink()


def rows_of(e: int, **changes):
    """Changes fields of one row of episodes.jsonl."""
    return edit_lines(
        "episodes", lambda rows: [r | changes if r["episode_index"] == e else r for r in rows]
    )


def both(*mutations):
    def mutate(root: Path) -> None:
        for one in mutations:
            one(root)

    return mutate


def half(raw):
    return raw[: len(raw) // 2]


def nan_in(old):
    return [float("nan"), *old[1:]]


def shift(name: str, by: float):
    return edit_table(column(name, lambda v: [v[0], v[1] + by, *v[2:]]), episode_rows)


left_video = f"videos/{key('left')}"
MUTANTS = {
    # numbers
    "a NaN action": (
        "v3.0",
        at("action", 12, nan_in),
        "episode 1, action: row 1, dimension 0 is nan",
    ),
    "an infinite state": (
        "v2.1",
        at("observation.state", 2, lambda old: [*old[:2], float("-inf")]),
        "episode 1, observation.state: .*-inf",
    ),
    "an empty action": ("v3.0", at("action", 12, None), "episode 1, action"),
    "an empty number in an action": ("v2.1", at("action", 3, [None, 1.0]), "episode 1, action"),
    "another width in info": ("v3.0", feature("action", shape=[4]), "episode 0, action: has"),
    "a ragged action": ("v2.1", edit_table(ragged), "episode 1, action: has"),
    "actions in float64": (
        "v3.0",
        edit_table(
            lambda t: t.set_column(1, "action", t["action"].cast(pa.list_(pa.float64(), 2)))
        ),
        "action: has .* of type",
    ),
    "actions as text": (
        "v2.1",
        edit_table(column("action", lambda v: ["left"] * len(v))),
        "episode 1, action: has .* of type string",
    ),
    "actions as whole numbers": (
        "v2.1",
        edit_table(
            lambda t: t.set_column(
                1, "action", t["action"].cast(pa.list_(pa.int32(), 2), safe=False)
            )
        ),
        "int32",
    ),
    "no action column": (
        "v3.0",
        edit_table(lambda t: t.drop_columns(["action"])),
        "action: .* no such column",
    ),
    "no task column": (
        "v2.1",
        edit_table(lambda t: t.drop_columns(["task_index"])),
        "episode 1, task_index: .* no such column",
    ),
    "a dimension that never moves": (
        "v3.0",
        edit_table(column("action", lambda v: [[0.5, b] for _, b in v])),
        "action: dimension 0 is 0.5",
    ),
    "an episode twice": ("v2.1", twice, "episode 2, action: equals episode 0"),
    # rows
    "a row less": (
        "v2.1",
        edit_table(lambda t: t.slice(0, 13)),
        "episode 1, data: .*13 rows, expected 14",
    ),
    "a row more": (
        "v3.0",
        edit_table(lambda t: pa.concat_tables([t, t.slice(0, 1)])),
        "51 rows, expected 50",
    ),
    "a row left out": (
        "v2.1",
        edit_table(lambda t: t.take([*range(5), *range(6, 14)])),
        "episode 1, data: .*14",
    ),
    "one left out, one doubled": (
        "v2.1",
        edit_table(lambda t: t.take([*range(5), *range(6, 14), 13])),
        "episode 1, (frame_)?index: row 5",
    ),
    "time going backwards": (
        "v3.0",
        at("timestamp", 13, 0.05),
        "episode 1, timestamp: row 2 is 0.05",
    ),
    "time that is NaN": ("v2.1", at("timestamp", 3, float("nan")), "episode 1, timestamp"),
    "another fps in info (v2.1)": ("v2.1", edit_info(fps=20), "timestamp: .*20 fps"),
    "another fps in info (v3.0)": ("v3.0", edit_info(fps=9), "to_timestamp"),
    "rows in another order": (
        "v2.1",
        edit_table(lambda t: t.take([1, 0, *range(2, 14)])),
        "episode 1, (frame_index|index|timestamp)",
    ),
    "a gap in frame_index": (
        "v3.0",
        at("frame_index", 14, 9),
        "episode 1, frame_index: row 3 is 9",
    ),
    "a gap in index": ("v3.0", at("index", 14, 99), "episode 1, index: row 3 is 99"),
    "another episode's file": (
        "v2.1",
        lambda root: shutil.copy(data_file(root, 1), data_file(root, 2)),
        "episode 2, ",
    ),
    "a wrong episode_index": ("v3.0", at("episode_index", 12, 0), "episode 1, episode_index"),
    "an unknown task": ("v3.0", at("task_index", 12, 7), "episode 1, task_index: is 7"),
    # metadata
    "no tasks file (v3.0)": (
        "v3.0",
        remove(lambda r: r / "meta/tasks.parquet"),
        "tasks.parquet is missing",
    ),
    "no tasks file (v2.1)": (
        "v2.1",
        remove(lambda r: r / "meta/tasks.jsonl"),
        "tasks.jsonl is missing",
    ),
    "a task less": (
        "v2.1",
        edit_lines("tasks", lambda rows: rows[:1]),
        "episode 1, task_index: is 1",
    ),
    "a task twice": (
        "v2.1",
        edit_lines("tasks", lambda rows: [rows[0], rows[0] | {"task": "other"}]),
        "tasks.jsonl: task 0",
    ),
    "an empty task": (
        "v3.0",
        edit_table(column("task", lambda v: ["", v[1]]), lambda r: r / "meta/tasks.parquet"),
        r"instruction: is empty in episodes \[0, 2\], 2 in all",
    ),
    "tasks without text": (
        "v3.0",
        edit_table(lambda t: t.select(["task_index"]), lambda r: r / "meta/tasks.parquet"),
        "__index_level_0__: tasks.parquet has no such column",
    ),
    "an episode without tasks": ("v2.1", rows_of(1, tasks=[]), "episode 1, tasks"),
    "an episode index twice": ("v2.1", rows_of(2, episode_index=1), "episode_index: is 1"),
    "a gap in episode indices": (
        "v2.1",
        rows_of(3, episode_index=5),
        "episode 3, episode_index: is 5",
    ),
    "an episode row less": (
        "v2.1",
        edit_lines("episodes", lambda rows: rows[:-1]),
        "meta/episodes.*has 3 rows, info.json says 4",
    ),
    "an episode row more": (
        "v3.0",
        edit_table(lambda t: pa.concat_tables([t, t.slice(3, 1)]), episode_rows),
        "meta/episodes.*has 5 rows, info.json says 4",
    ),
    "an episode twice in v3.0": (
        "v3.0",
        edit_table(column("episode_index", lambda v: [0, 1, 1, 3]), episode_rows),
        "episode 2, episode_index",
    ),
    "a length that is text": (
        "v2.1",
        rows_of(1, length="14"),
        "episodes.jsonl: cannot be read: .*length.* to string in row 1",
    ),
    "a length of 31 digits": ("v2.1", rows_of(1, length=10**30), "meta/episodes"),
    "a length below zero": (
        "v3.0",
        edit_table(column("length", lambda v: [-v[0], *v[1:]]), episode_rows),
        "length: is -11",
    ),
    "deep json": (
        "v2.1",
        lambda root: (root / "meta/episodes.jsonl").write_text("[" * 100_000),
        "episodes.jsonl: cannot be read: .* in row 0",
    ),
    "10^9 frames in info": (
        "v3.0",
        edit_info(total_frames=10**9),
        "total_frames: is 1000000000, .* 50",
    ),
    "10^9 rows in an episode": (
        "v2.1",
        both(rows_of(1, length=10**9), edit_info(total_frames=10**9)),
        "episode 1, length",
    ),
    "10^9 episodes": ("v3.0", edit_info(total_episodes=10**9), "total_episodes: is 1000000000"),
    "rows that only metadata claims": (
        "v2.1",
        both(rows_of(1, length=15), edit_info(total_frames=51)),
        "episode 1, data: .*14 rows, expected 15",
    ),
    "millions of packed rows": ("v2.1", many_rows, "episode 1, data: .*2000000 rows, expected 14"),
    "dataset_from_index off by one": (
        "v3.0",
        shift("dataset_from_index", 1),
        "episode 1, dataset_from_index",
    ),
    "dataset_to_index off by one": (
        "v3.0",
        shift("dataset_to_index", -1),
        "episode 1, dataset_to_index",
    ),
    "another data file": ("v3.0", shift("data/file_index", 3), "missing|rows"),
    "to_timestamp too late": (
        "v3.0",
        shift(f"{left_video}/to_timestamp", 0.3),
        f"episode 1, {left_video}/to_timestamp",
    ),
    "an overlap of videos": (
        "v3.0",
        both(
            shift(f"{left_video}/from_timestamp", -0.5), shift(f"{left_video}/to_timestamp", -0.5)
        ),
        f"{left_video}/from_timestamp: is",
    ),
    "videos between two frames": (
        "v3.0",
        both(*(shift(f"{left_video}/{n}_timestamp", 0.04) for n in ("from", "to"))),
        f"episode 1, {key('left')}: .*none at",
    ),
    "a NaN in meta/episodes": (
        "v3.0",
        shift(f"{left_video}/from_timestamp", float("nan")),
        f"{left_video}/from_timestamp",
    ),
    "tasks that are no list": (
        "v3.0",
        edit_table(
            lambda t: t.drop_columns(["tasks"]).append_column("tasks", t["length"]), episode_rows
        ),
        "meta/episodes",
    ),
    # versions and info.json
    "an unknown version": (
        "v3.0",
        edit_info(codebase_version="v1.6"),
        "codebase_version: is 'v1.6'",
    ),
    "v2.1 in a v3.0 tree": (
        "v3.0",
        edit_info(codebase_version="v2.1"),
        "meta/tasks.parquet: belongs",
    ),
    "v3.0 in a v2.1 tree": (
        "v2.1",
        edit_info(codebase_version="v3.0"),
        "meta/tasks.jsonl: belongs",
    ),
    "files of both versions": (
        "v3.0",
        lambda root: (root / "meta/tasks.jsonl").write_text("{}"),
        "meta/tasks.jsonl: belongs",
    ),
    "no info.json": ("v3.0", remove(lambda r: r / "meta/info.json"), "info.json is missing"),
    "half an info.json": (
        "v2.1",
        edit_bytes(lambda r: r / "meta/info.json", half),
        "meta/info.json",
    ),
    "an empty info.json": (
        "v2.1",
        edit_bytes(lambda r: r / "meta/info.json", lambda raw: b""),
        "meta/info.json: .*not valid json",
    ),
    "info.json as a list": (
        "v2.1",
        edit_bytes(lambda r: r / "meta/info.json", lambda raw: b"[1]"),
        "meta/info.json",
    ),
    "fps of zero": ("v3.0", edit_info(fps=0), "fps: is 0"),
    "fps that is NaN": ("v3.0", edit_info(fps=float("nan")), "info.json: .*NaN"),
    "fps as text": ("v2.1", edit_info(fps="10"), "fps: is 10"),
    "a feature without a shape": ("v3.0", feature("action", shape=None), "action: feature is"),
    "a camera of 10^9 rows": (
        "v3.0",
        feature(key("left"), shape=[10**9, 48, 3]),
        f"{key('left')}: feature is",
    ),
    "pictures inside the parquet files": (
        "v3.0",
        edit_info(features=lambda info: {k: as_image(f) for k, f in info["features"].items()}),
        f"{key('high')}: has dtype image",
    ),
    # files
    "half a parquet (v3.0)": ("v3.0", edit_bytes(data_file, half), "data: .*no whole parquet"),
    "half a parquet (v2.1)": (
        "v2.1",
        edit_bytes(data_file, half),
        "episode 1, data: .*no whole parquet",
    ),
    "half of meta/episodes": (
        "v3.0",
        edit_bytes(episode_rows, half),
        "meta/episodes.*no whole parquet",
    ),
    "a garbled parquet": (
        "v2.1",
        edit_bytes(data_file, lambda raw: raw[:60] + bytes(b ^ 255 for b in raw[60:90]) + raw[90:]),
        "episode 1, data",
    ),
    "an empty parquet": ("v2.1", edit_bytes(data_file, lambda raw: b""), "episode 1, data"),
    "no data file": ("v2.1", remove(data_file), "episode 1, data_path: .*missing"),
    "a pipe for a parquet": ("v2.1", pipe, "episode 1, data_path: .*no file"),
    "a path that leaves the folder": ("v2.1", outside, "data_path: .*leaves"),
    "an absolute path": ("v3.0", edit_info(data_path="/etc/passwd"), "data_path: .*leaves"),
    "a video path that leaves": (
        "v3.0",
        edit_info(video_path="videos/../../{video_key}.mp4"),
        f"{key('high')}: .*leaves",
    ),
    "a camera named like a path": (
        "v2.1",
        feature("../../../x", dtype="video", shape=[16, 48, 3]),
        "x: .*leaves",
    ),
    "a path with a zero byte": ("v2.1", edit_info(data_path="data/\0"), "data_path: .*leaves"),
    "a path that formats for ever": (
        "v3.0",
        edit_info(data_path="{chunk_index:1000000000d}"),
        "data_path: .*write it as",
    ),
    "a path that reads attributes": (
        "v3.0",
        edit_info(video_path="{video_key.__class__}"),
        "write it as",
    ),
    "a link out of the folder": (
        "v2.1",
        link(data_file, inside=False),
        "episode 1, data_path: .*link",
    ),
    "a link inside the folder": (
        "v2.1",
        link(video_file, inside=True),
        f"episode 1, {key('left')}: .*link",
    ),
    "a linked folder": (
        "v3.0",
        link(lambda r: r / "videos", inside=False),
        f"{key('high')}: .*link",
    ),
    # videos
    "half an mp4 (v3.0)": ("v3.0", edit_bytes(video_file, half), f"{key('left')}: .*truncated"),
    "half an mp4 (v2.1)": (
        "v2.1",
        edit_bytes(video_file, half),
        f"episode 1, {key('left')}: .*truncated",
    ),
    "an mp4 without its end": (
        "v2.1",
        edit_bytes(video_file, lambda raw: raw[:-20]),
        f"episode 1, {key('left')}: .*truncated",
    ),
    "an mp4 of text": (
        "v2.1",
        edit_bytes(video_file, lambda raw: b"not a video"),
        f"episode 1, {key('left')}",
    ),
    "a garbled mp4": ("v3.0", edit_bytes(video_file, garble), f"{key('left')}"),
    "10^9 frames in the times of an mp4": (
        "v2.1",
        edit_bytes(video_file, claim_frames),
        f"episode 1, {key('left')}: .*claims 1000000000",
    ),
    "10^9 frames in all of an mp4": (
        "v3.0",
        edit_bytes(video_file, claim_samples),
        f"{key('left')}",
    ),
    "no mp4 (v3.0)": ("v3.0", remove(video_file), f"{key('left')}: .*missing"),
    "no mp4 (v2.1)": ("v2.1", remove(video_file), f"episode 1, {key('left')}: .*missing"),
    "no columns for a camera": (
        "v3.0",
        edit_table(lambda t: t.drop_columns([f"{left_video}/file_index"]), episode_rows),
        f"{left_video}/file_index",
    ),
    "no paths for videos": ("v3.0", edit_info(video_path=None), "video_path: is None"),
    "a camera that only info knows": (
        "v2.1",
        feature(key("rear"), dtype="video", shape=[16, 48, 3]),
        f"{key('rear')}: .*missing",
    ),
    "an mp4 at another fps": ("v2.1", encode(12, 14), f"episode 1, {key('left')}: .*other fps"),
    "an mp4 with a frame less": (
        "v2.1",
        encode(FPS, 13),
        f"episode 1, {key('left')}: .*13 frames, expected 14",
    ),
    "an mp4 with a frame more": (
        "v2.1",
        encode(FPS, 15),
        f"episode 1, {key('left')}: .*15 frames, expected 14",
    ),
    "an mp4 of another size": (
        "v2.1",
        encode(FPS, 14, (32, 48)),
        f"episode 1, {key('left')}: .*32 x 48",
    ),
    "a size that only info has": (
        "v3.0",
        feature(key("left"), shape=[48, 16, 3]),
        f"{key('left')}: .*16 x 48",
    ),
    "two cameras swapped": (
        "v2.1",
        swap(video_file, lambda r: video_file(r, "right")),
        "episode 1, .*each other's view",
    ),
    "two episodes' videos swapped": (
        "v2.1",
        swap(lambda r: video_file(r, "left", 0), lambda r: video_file(r, "left", 3)),
        f"{key('left')}: .*frames, expected",
    ),
}


# No single window shows these.
SEEN_BY_CHECK_ALONE = {
    "a dimension that never moves",
    "an episode twice",
    "two cameras swapped",
    "an empty task",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_dataset_is_refused_by_name(whole, tmp_path, mutant):
    """Each fault ends in a ValueError that names dataset, episode, field and remedy, within two
    seconds and 200 MB."""
    kind, mutate, named = MUTANTS[mutant]
    root = tmp_path / "mutant"
    shutil.copytree(whole[kind], root)
    mutate(root)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=rf"(?s)dataset \S*mutant, ?.*({named}).*; "):
        faults = opened(root).check()
        raise ValueError("\n".join(faults))
    if mutant not in SEEN_BY_CHECK_ALONE:
        with pytest.raises(ValueError, match=r"dataset \S*mutant, .*: .*; "):
            dataset = opened(root)
            for e, length in enumerate(dataset.lengths):
                dataset.window(e, 0, np.arange(length) / FPS, [0])
    assert (
        time.process_time() - start < 2
        and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    )


# -- what is not read is left alone ---------------------------------------------------------------


def typed(name: str, kind) -> object:
    """A column of another type, in the files and in info.json."""

    def change(table):
        at = table.column_names.index(name)
        return table.set_column(at, name, table[name].cast(kind))

    return lambda root: [edit_table(change, path)(root) for path in all_data(root)]


def all_data(root: Path) -> list:
    files = sorted((root / "data").rglob("*.parquet"))
    return [lambda _, file=file: file for file in files]


def without(name: str):
    """A column that is in no file and not in info.json."""

    def mutate(root: Path) -> None:
        for path in all_data(root):
            edit_table(lambda t: t.drop_columns([name]), path)(root)
        edit_info(features=lambda info: {k: f for k, f in info["features"].items() if k != name})(
            root
        )

    return mutate


def with_column(name: str, cell, dtype: str, shape: list):
    """One more column, the same cell in every row."""

    def mutate(root: Path) -> None:
        for path in all_data(root):
            edit_table(lambda t: t.append_column(name, [[cell] * len(t)]), path)(root)
        feature(name, dtype=dtype, shape=shape, names=None)(root)

    return mutate


def raw_lines(name: str, change):
    return edit_bytes(lambda r: r / f"meta/{name}.jsonl", lambda raw: change(bytes(raw)))


def spare_camera(root: Path, **changes) -> None:
    feature(key("rear"), **{"dtype": "video", "shape": [16, 48, 3]} | changes)(root)


LEFT, GO = {"cameras": [key("left")]}, {"instruction": "go"}
SOUND = {
    "a feature of width 0": ("v3.0", feature("observation.none", dtype="float32", shape=[0]), {}),
    "a state of width 0": (
        "v2.1",
        both(feature("observation.state", shape=[0]), with_column("x", 1.0, "float32", [1])),
        {},
    ),
    "points, sound and text": (
        "v2.1",
        both(
            feature("points", dtype="float32", shape=[65536, 3]),
            feature("sound", dtype="float32", shape=[48000]),
            feature("note", dtype="string", shape=[1]),
        ),
        {},
    ),
    "features of no known form": (
        "v3.0",
        both(
            feature("x", dtype=7, shape="wide"),
            edit_info(features=lambda i: i["features"] | {"y": 3}),
        ),
        {},
    ),
    "a NaN in a column of no use": ("v3.0", with_column("x", float("nan"), "float32", [1]), {}),
    "text in a column of no use": ("v2.1", with_column("x", "soft", "string", [1]), {}),
    "a truth in a column of no use": ("v3.0", with_column("next.done", True, "bool", [1]), {}),
    "seconds in float64 (v2.1)": ("v2.1", typed("timestamp", pa.float64()), {}),
    "seconds in float64 (v3.0)": (
        "v3.0",
        both(typed("timestamp", pa.float64()), feature("timestamp", dtype="float64")),
        {},
    ),
    "tasks in int32": ("v2.1", typed("task_index", pa.int32()), {}),
    "rows in uint16": ("v3.0", typed("frame_index", pa.uint16()), {}),
    "no frame_index": ("v2.1", without("frame_index"), {}),
    "no index": ("v3.0", without("index"), {}),
    "no episode_index": ("v2.1", without("episode_index"), {}),
    "no tasks, and one instruction given": (
        "v2.1",
        both(without("task_index"), remove(lambda r: r / "meta/tasks.jsonl"), rows_of(1, tasks=[])),
        GO,
    ),
    "unknown tasks, and one instruction given": ("v3.0", at("task_index", 12, 7), GO),
    "an empty task, and one instruction given": (
        "v3.0",
        edit_table(column("task", lambda v: ["", v[1]]), lambda r: r / "meta/tasks.parquet"),
        GO,
    ),
    "a task that nothing has": (
        "v2.1",
        edit_lines("tasks", lambda rows: [*rows, {"task_index": 9, "task": ""}]),
        {},
    ),
    "rows that count on after episodes were taken out": (
        "v2.1",
        edit_table(column("index", lambda v: [i + 100 for i in v]), lambda r: data_file(r, 2)),
        {},
    ),
    "empty lines (tasks)": ("v2.1", raw_lines("tasks", lambda raw: raw + b"\n \n"), {}),
    "empty lines (episodes)": (
        "v2.1",
        raw_lines("episodes", lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n")),
        {},
    ),
    "a camera of no use that is absent": ("v2.1", spare_camera, LEFT),
    "a camera of no use that v3.0 does not place": ("v3.0", spare_camera, LEFT),
    "a camera of no use of 10^9 rows": (
        "v3.0",
        lambda root: spare_camera(root, shape=[10**9, 48, 3]),
        LEFT,
    ),
    "a camera of no use of half an mp4": (
        "v2.1",
        edit_bytes(lambda r: video_file(r, "right"), half),
        LEFT,
    ),
    "pictures of no use in the parquet files": (
        "v2.1",
        lambda root: spare_camera(root, dtype="image"),
        {},
    ),
    "a depth map": (
        "v2.1",
        lambda root: spare_camera(root, info={"video.is_depth_map": True}),
        {},
    ),
    "files that are not LeRobot's": (
        "v3.0",
        lambda root: (root / "meta/modality.json").write_text("{"),
        {},
    ),
    "total_tasks that miscounts": ("v3.0", edit_info(total_tasks=99), {}),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_a_run_does_not_read_is_left_alone(whole, tmp_path, name):
    """The set opens, `check` finds nothing, and windows are those of the set as it was."""
    kind, mutate, mapping = SOUND[name]
    root = tmp_path / "übungs satz"
    shutil.copytree(whole[kind], root)
    mutate(root)
    ours, theirs = opened(root, mapping), opened(whole[kind], mapping)
    assert ours.check() == []
    for e, row in ((0, 0), (1, 13), (2, 5), (3, 12)):
        a, b = (reader.window(e, row / FPS, [0, 0.1], [0, 0.1]) for reader in (ours, theirs))
        assert np.array_equal(a.actions, b.actions) and a.instruction == b.instruction
        assert list(a.frames) == list(b.frames)
        assert all(np.array_equal(a.frames[camera], b.frames[camera]) for camera in a.frames)


def test_a_broken_line_is_named(whole, tmp_path):
    """File and row, from 0 on."""
    shutil.copytree(whole["v2.1"], tmp_path / "d")
    raw_lines("episodes", lambda raw: raw.replace(b'{"episode_index": 2', b'"episode_index": 2'))(
        tmp_path / "d"
    )
    with pytest.raises(
        ValueError, match=r"meta/episodes.jsonl: cannot be read: .* in row 2; fetch or"
    ):
        opened(tmp_path / "d")


# -- copies ---------------------------------------------------------------------------------------


def rich(root: Path) -> None:
    """Two tasks in an episode, an empty one, more columns, names of joints, a camera of depth,
    a file that is not LeRobot's."""
    edit_lines("tasks", lambda rows: [*rows, {"task_index": 2, "task": ""}])(root)
    rows_of(1, tasks=["task 1", "task 0", ""])(root)
    tasks = [1] * 5 + [0] * 5 + [2] * 4
    edit_table(column("task_index", lambda cells: tasks), data_file)(root)
    with_column("observation.force", 1.5, "float64", [1])(root)
    with_column("next.done", True, "bool", [1])(root)
    with_column("note", "soft", "string", [1])(root)
    with_column("grid", [[1, 2], [3, 4]], "int64", [2, 2])(root)
    feature("action", names=["x", "grip"])(root)
    spare_camera(root, info={"video.is_depth_map": True})
    (root / "meta/modality.json").write_text("{}")


@pytest.mark.parametrize("mapping", [{}, {"cameras": [key("right")]}, GO | LEFT])
def test_a_copy_keeps_everything_or_says_what_it_leaves(whole, tmp_path, mapping, capsys):
    """`data.py convert`: the task of each row, all cameras or those that are named, further columns
    of any type, names of joints, the type of fps."""
    shutil.copytree(whole["v2.1"], tmp_path / "set")
    rich(tmp_path / "set")
    card = {"sources": [{"path": "set", "mapping": mapping}]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    data.main(["convert", str(tmp_path / "card.json"), str(tmp_path / "out"), "--lossless"])
    said = capsys.readouterr().out
    assert "feature observation.images.rear" in said and "meta/modality.json" in said
    source = LeRobotDataset(tmp_path / "set").whole(mapping.get("cameras", ()))
    copy = LeRobotDataset(tmp_path / "out/set").whole()
    assert source.fps == copy.fps == FPS and type(copy.fps) is int
    chosen = mapping.get("cameras") or list(map(key, CAMERAS))
    assert sorted(copy.cameras) == sorted(chosen)
    assert all((key(name) in said) == (key(name) not in chosen) for name in CAMERAS)
    for name in ("observation.force", "next.done", "note", "grid", "action"):
        assert copy.features[name] == source.features[name]
    for e, length in enumerate(LENGTHS):
        kept = ["observation.force", "next.done", "note", "grid"]
        ours, theirs = (reader._table(e, kept) for reader in (copy, source))
        assert ours.to_pylist() == theirs.to_pylist()
        assert all(np.array_equal(a, b) for a, b in zip(copy.numbers(e), source.numbers(e)))
        for row in range(length):
            assert copy.texts(e, row) == source.texts(e, row)
        for camera in chosen:
            pairs = zip(*(reader.pictures(e, camera, range(length)) for reader in (copy, source)))
            assert all(np.array_equal(a, b) for a, b in pairs)
    assert copy.texts(1) == ["task 1", "task 0", ""]
    a, b = (Pyramid(path, (6,), 4, (48, 48)) for path in (tmp_path, tmp_path / "out"))
    for row in ((0, 0, 0), (0, 1, 12), (0, 3, 4)):
        ours, theirs = (vars(pyramid.window(row, "real")) for pyramid in (a, b))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_copy_of_later_positions_stays_one(whole, tmp_path):
    """A card whose actions are the state later in time means the same after `convert`."""
    mapping = {"action": "observation.state"}
    card = {"sources": [{"path": str(whole["v3.0"]), "mapping": mapping, "ahead": True}]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    data.main(["convert", str(tmp_path / "card.json"), str(tmp_path / "out"), "--lossless"])
    a, b = (Pyramid(path, (6,), 4, (48, 48)) for path in (tmp_path, tmp_path / "out"))
    ours, theirs = (pyramid.window((0, 1, 3), "real") for pyramid in (a, b))
    assert np.array_equal(ours.actions, theirs.actions) and b.opened[0].source.ahead
