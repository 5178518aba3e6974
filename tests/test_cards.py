"""Dataset cards: what a stage draws from, in which mix, in whose units; cards that are refused."""

import json
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from formats import cards

pytest.importorskip("pyarrow")
pytest.importorskip("av")
from formats.cards import Pyramid, shares
from formats.inspect import convert
from formats.lerobot import write_v3
from formats.recordings import Storage
from formats.statistics import Statistics, as_stored
from formats.windows import rows_to_encode
from motus import preset

CONFIG = preset("toy")
EXACT = Storage(codec="libx264rgb", pix_fmt="rgb24", options=(("crf", "0"),))
LINES = [
    {"level": 2, "embodiment": "hand", "episodes": 4, "held_out": 2},
    {"level": 5, "embodiment": "arm", "episodes": 2, "held_out": 1, "weight": 0.5},
    {"level": 5, "embodiment": "gantry", "episodes": 2, "held_out": 1, "weight": 0.5},
    {"level": 6, "embodiment": "gripper", "episodes": 4, "held_out": 2},
]


def opened(path, levels=(6,), **more) -> Pyramid:
    return Pyramid(path, levels, CONFIG.frames, (48, 48), seed=3, **more)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A card of a few episodes that the toy world renders."""
    file = tmp_path_factory.mktemp("rendered") / "card.json"
    sources = [{"path": "world:toy"} | line for line in LINES]
    file.write_text(json.dumps({"video_hz": 5, "action_hz": 15, "sources": sources}))
    return file


@pytest.fixture(scope="module")
def card(rendered, tmp_path_factory) -> Path:
    """The same on disk, pictures exact: `python data.py convert`."""
    out = tmp_path_factory.mktemp("toy") / "set"
    convert(opened(rendered, (2, 5, 6)), out, lossless=True)
    return out / "card.json"


def changed(card: Path, where: Path, **changes) -> Path:
    """A card of the same datasets with other fields; those of source i are given as `_i`."""
    stored = json.loads(card.read_text())
    for name, value in changes.items():
        if name.startswith("_"):
            stored["sources"][int(name[1:])] |= value
        else:
            stored[name] = value
    for source in stored["sources"]:
        if (card.parent / str(source.get("path"))).is_dir():
            source["path"] = str(card.parent / source["path"])
    (where / "card.json").write_text(json.dumps(stored))
    return where / "card.json"


# -- windows --------------------------------------------------------------------------------------


def test_windows_of_a_dataset_on_disk_are_those_of_the_world_that_rendered_it(rendered, card):
    """Pixels, words and masks to the last bit; numbers too, and so the statistics."""
    theirs, ours = opened(rendered, (2, 5, 6)), opened(card, (2, 5, 6))
    assert ours.robots(acting=True) == theirs.robots(acting=True)
    rows = [
        (i, e, s)
        for i, o in enumerate(theirs.opened)
        for e, length in enumerate(o.reader.lengths[:].tolist())
        for s in (0, 5, length - 14, length - 7)
    ]
    for row in rows:
        a, b = ours.window(row, "real"), theirs.window(row, "real")
        assert np.array_equal(a.frames, b.frames) and a.instruction == b.instruction
        assert np.array_equal(a.video_mask, b.video_mask)
        for name in ("actions", "state"):
            found, wanted = getattr(a, name), getattr(b, name)
            assert found is wanted is None or np.array_equal(found, wanted)


def test_a_robot_s_demonstrations_are_the_same_whatever_others_there_are(tmp_path):
    """Level 6 has as many of each robot; a hand, whose actions nobody has, has none."""
    sources = [{"path": "world:toy", "embodiment": robot} for robot in ("gripper", "arm", "hand")]
    (tmp_path / "card.json").write_text(json.dumps({"sources": sources}))
    (tmp_path / "one.json").write_text(json.dumps({"sources": sources[:1]}))
    several, one = opened(tmp_path, episodes=6), opened(tmp_path / "one.json", episodes=2)
    widths = [(o.source.embodiment, o.trained, o.reader.widths) for o in several.opened]
    assert widths == [("gripper", 2, (3, 3)), ("arm", 2, (4, 4)), ("hand", 2, (0, 0))]
    for episode in range(2):
        ours, theirs = (p.opened[0].reader.numbers(episode) for p in (several, one))
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_compressed_video_shows_the_same_but_for_the_codec(rendered, card, tmp_path):
    """Above 30 dB of the recorded pixels."""
    whole = opened(rendered)
    convert(whole, tmp_path, lossless=False)
    true, seen = (p.window((0, 0, 4), "real").frames for p in (whole, opened(tmp_path)))
    assert 10 * np.log10(255**2 / ((true.astype(float) - seen) ** 2).mean()) > 30


@pytest.mark.parametrize(
    "fps, hz, rows",
    [
        (20, (5, 10), ([0, 4, 8, 12, 16], [0, 2, 4, 6, 8, 10, 12, 14])),
        (12, (5, 5), ([0, 2, 5, 7, 10], [0, 2, 5, 7])),
    ],
)
def test_windows_take_the_rows_nearest_to_the_configured_rates(tmp_path, fps, hz, rows):
    """Whatever a dataset's own fps: 5 Hz video and 10 Hz actions from 20 fps, and from 12 fps rows
    at most half a row away."""
    numbers = np.arange(40, dtype=np.float32)[:, None] + [0, 0.5]
    write_v3(
        tmp_path / "set",
        [
            (
                dict(front=[np.full((48, 48, 3), 5 * i, np.uint8) for i in range(40)]),
                numbers,
                numbers,
                "go",
            )
        ],
        fps,
        EXACT,
    )
    (tmp_path / "card.json").write_text(
        json.dumps({"video_hz": hz[0], "action_hz": hz[1], "sources": [{"path": "set"}]})
    )
    pyramid = opened(tmp_path)
    seen = pyramid.window((0, 0, 3), "real")
    assert seen.frames[:, 0, 0, 0].tolist() == [5 * (3 + i) for i in rows[0]]
    assert seen.actions[:, 0].tolist() == [3 + i for i in rows[1]]
    assert seen.state.tolist() == [3, 3.5] and seen.action_mask.all()
    assert ("beside the wanted times" in pyramid.describe()) == (fps == 12)


def test_actions_may_be_later_positions(card, tmp_path):
    """With `ahead` action i is the number one action period after time i: what official Motus
    trains on, from the state column."""
    plain = opened(changed(card, tmp_path, _3={"mapping": {"action": "observation.state"}}))
    (tmp_path / "b").mkdir()
    later = {"mapping": {"action": "observation.state"}, "ahead": True}
    ahead = opened(changed(card, tmp_path / "b", _3=later))
    a, b = (p.window((0, 1, 2), "real") for p in (plain, ahead))
    assert np.array_equal(a.actions[1:], b.actions[:-1])
    assert np.array_equal(a.actions[0], a.state) and not np.array_equal(b.actions[0], b.state)


def test_robots_of_different_width_and_none_share_a_batch(card, tmp_path):
    """Numbers are padded with zeros and masked; a source without actions is masked altogether; each
    robot has its own units."""
    wide = changed(card, tmp_path, _0={"level": 6}, _1={"level": 6}, _2={"level": 6})
    pyramid = opened(wide)
    config, robots = data.network_for(pyramid, "toy", "3"), pyramid.robots(acting=True)
    assert (config.action_dim, config.state_dim, config.ratio) == (4, 4, 3)
    assert [(r.embodiment, len(r.actions.mean)) for r in robots] == [
        ("arm", 4),
        ("gantry", 3),
        ("gripper", 3),
    ]
    batch = data.batch_of(
        pyramid, torch.tensor([(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)]), "real", robots, config
    )
    real = batch.action_mask[:, 0]
    assert real.tolist() == [[False] * 4, [True] * 4, [True] * 3 + [False], [True] * 3 + [False]]
    assert (
        not batch.actions[~batch.action_mask].any()
        and not batch.state[2:, 3].any()
        and batch.state[1].any()
    )
    assert Statistics.from_json(as_stored(robots), "arm") == robots[0]
    with pytest.raises(
        ValueError, match="robot is ''; this checkpoint knows 'arm', 'gantry', 'gripper'"
    ):
        Statistics.from_json(as_stored(robots))


def three_cameras(root: Path, names=("cam_high", "cam_left_wrist", "cam_right_wrist")) -> Path:
    shades = dict(zip(names, (60, 120, 180)))
    rows = np.random.default_rng(0).normal(size=(12, 2))
    write_v3(
        root,
        [
            (
                {k: [np.full((32, 48, 3), v, np.uint8)] * 12 for k, v in shades.items()},
                rows,
                rows,
                "go",
            )
        ],
        5,
        EXACT,
    )
    return root


def test_three_cameras_become_the_t_layout_unless_others_are_chosen(tmp_path):
    """Head above two wrists at half its size, by the cameras' names; otherwise the first camera, or
    those chosen side by side."""

    def first_picture(path) -> np.ndarray:
        return opened(path).window((0, 0, 0), "none").frames[0, :, :, 0]

    picture = first_picture(three_cameras(tmp_path / "a"))
    assert [int(picture[16, 24]), int(picture[40, 8]), int(picture[40, 40])] == [60, 120, 180]
    other = three_cameras(tmp_path / "b", ("x", "y", "z"))
    assert first_picture(other)[24, 24] == 60
    assert opened(other).robots(False)[0].cameras == ("x",)
    views = ["observation.images.y", "observation.images.z"]
    sources = [{"path": "b", "mapping": {"cameras": views}}]
    (tmp_path / "card.json").write_text(json.dumps({"sources": sources}))
    picture = first_picture(tmp_path)[24]
    assert [int(picture[4]), int(picture[-4])] == [120, 180]


# -- the mix --------------------------------------------------------------------------------------


def test_a_stage_picks_its_levels_and_mixes_by_weight(card, tmp_path):
    """Within one of its share in every batch; the same for any number of ranks, which take turns
    with the rows; no held-out episode."""
    pyramid = opened(changed(card, tmp_path, _0={"weight": 3}), (2, 5))
    assert [o.source.embodiment for o in pyramid.opened] == ["hand", "arm", "gantry"]
    total = Counter()
    for step in range(40):
        rows = pyramid.draw(10, seed=1, step=step)
        count = Counter(rows[:, 0].tolist())
        assert all(abs(count[i] - share) <= 1 for i, share in enumerate((7.5, 1.25, 1.25)))
        total += count
        assert all(
            e < pyramid.opened[i].trained and s < pyramid.opened[i].counts[e]
            for i, e, s, _ in rows.tolist()
        )
    assert abs(total[0] - 300) < 15 and abs(total[1] - total[2]) < 20
    assert torch.equal(pyramid.draw(10, 1, 7), pyramid.draw(10, 1, 7)) and not torch.equal(
        pyramid.draw(10, 1, 7), pyramid.draw(10, 2, 7)
    )
    held = pyramid.held_out(9, seed=0)
    assert len(held) == 4 and all(e >= pyramid.opened[i].trained for i, e, _ in held.tolist())


def test_shares_are_exact_for_equal_weights_and_fair_for_others():
    """Three sources in a batch of nine: three each. A weight of a thousandth is drawn once in a
    thousand."""
    assert Counter(shares(np.ones(3), 9, np.random.default_rng(0)).tolist()) == {0: 3, 1: 3, 2: 3}
    drawn = Counter(
        i
        for seed in range(2000)
        for i in shares(np.array([999.0, 1.0]), 1, np.random.default_rng(seed)).tolist()
    )
    assert 0 < drawn[1] < 10


def test_two_of_three_windows_of_a_shifted_source_are_the_same_film_moved(rendered, tmp_path):
    """A few demonstrations show things at few places; a film that is moved as a whole shows them at
    others. Actions stay as recorded, as those of a robot that is told changes do."""
    plain = opened(rendered)
    moved = opened(changed(rendered, tmp_path, _3={"shift": 4}))
    rows = rows_to_encode(moved, 0, 0)
    assert torch.equal(rows, rows_to_encode(moved, 10_000, 0))  # all of them, drawn or not
    assert len(rows) == 3 * len(rows_to_encode(plain, 0, 0))
    assert set(rows[:, 3].tolist()) == {0, 1, 2}
    places = set()
    for row in rows[:60].tolist():
        as_is, seen = plain.window(row[:3], "real"), moved.window(row, "real")
        assert np.array_equal(as_is.actions, seen.actions)
        assert np.array_equal(as_is.state, seen.state)
        assert np.array_equal(seen.frames, moved.window(row, "real").frames)
        wide = np.pad(as_is.frames, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
        found = [
            (top - 4, left - 4)
            for top, left in product(range(9), repeat=2)
            if np.array_equal(wide[:, top : top + 48, left : left + 48], seen.frames)
        ]
        assert ((0, 0) in found) if row[3] == 0 else found
        places |= {*found}
    assert len(places) > 20  # of 81
    held_out = moved.held_out(2, 0).tolist()
    for row in held_out:
        assert np.array_equal(moved.window(row, "real").frames, plain.window(row, "real").frames)


def test_tasks_can_be_drawn_alike(tmp_path):
    """Two tasks of one and of nine episodes: half each, not one tenth."""
    rows = np.random.default_rng(0).normal(size=(10, 6, 2)).astype(np.float32)
    write_v3(
        tmp_path / "set",
        [({}, r, r, "rare" if e == 0 else "common") for e, r in enumerate(rows)],
        5,
    )
    (tmp_path / "card.json").write_text(
        json.dumps({"sources": [{"path": "set", "draw": "tasks", "held_out": 0}]})
    )
    drawn = opened(tmp_path).draw(400, 0, 0)
    assert 160 < int((drawn[:, 1] == 0).sum()) < 240


def test_the_report_says_what_is_used(card):
    """Hours, episodes, rows and share per source and level; rates; held-out episodes."""
    text = opened(card, (2, 5, 6)).describe()
    assert text.count("33.3%") == 2 and text.count("16.7%") == 2 and "0.00" in text
    assert "video at 5 Hz" in text and "actions at 15 Hz (3 per frame)" in text
    assert "6 episodes held out" in text
    assert "observation.state (4), chosen automatically" in text


# -- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_statistics_are_the_same_for_any_number_of_ranks(card, monkeypatch, world):
    """Bit for bit; each rank reads its share of the blocks."""
    monkeypatch.setattr(cards, "BLOCK", 1)
    pyramid = opened(card, (5, 6))
    alone = pyramid.robots(acting=True)
    parts = [pyramid.measure(rank, world) for rank in range(world)]
    assert pyramid.robots(True, parts) == alone
    assert [robot.embodiment for robot in alone] == ["arm", "gantry", "gripper"]
    assert all(parts) and sum(map(len, parts)) == len(set().union(*parts)) == 32
    assert "moments/gripper/actions/000004" in parts[4 % world]


def test_held_out_episodes_do_not_count(card):
    """The mean is that of the episodes that are trained on."""
    pyramid = opened(card)
    (robot,), o = pyramid.robots(acting=True), pyramid.opened[0]
    rows = np.concatenate([o.reader.numbers(e)[1] for e in range(o.trained)])
    np.testing.assert_allclose(robot.actions.mean, rows.mean(0), rtol=1e-5, atol=1e-6)


def test_a_share_of_a_dataset_can_be_taken(card, tmp_path):
    """`episodes` of a line: the first so many are drawn, the last ones stay held out."""
    pyramid = opened(changed(card, tmp_path, _3={"episodes": 1}))
    assert pyramid.opened[0].trained == 1 and not pyramid.draw(20, 0, 0)[:, 1].any()
    assert set(pyramid.held_out(9, 0)[:, 1].tolist()) <= {1, 2, 3, 4, 5}


# -- cards that are refused -----------------------------------------------------------------------


def drop(**names):
    def edit(stored: dict) -> None:
        for name in names:
            stored.pop(name)

    return edit


def top(**changes):
    return lambda stored: stored.update(changes)


def line(i: int = 3, **changes):
    return lambda stored: stored["sources"][i].update(changes)


def no_actions(stored: dict) -> None:
    stored["sources"] = [{"path": "level2_hand", "level": 6}]


MUTANTS = {
    "no sources": (drop(sources=1), "sources must be a list"),
    "sources as one object": (top(sources={"path": "level6_gripper"}), "sources must be a list"),
    "an empty list of sources": (top(sources=[]), "sources must be a list"),
    "a source that is a text": (top(sources=["level6_gripper"]), "sources must be a list"),
    "an unknown field of the card": (
        top(video_fps=5),
        "unknown key 'video_fps'.*did you mean 'video_hz'",
    ),
    "an unknown field of a source": (line(wieght=2), "unknown key 'wieght'.*did you mean 'weight'"),
    "a source without a path": (
        lambda stored: stored["sources"][3].pop("path"),
        "source 3 has no path",
    ),
    "a path that is a number": (line(path=7), "path is 7"),
    "a path with a zero byte": (line(path="level6\0"), "level6.*no folder"),
    "a path that is not there": (line(path="./level7_gripper"), "level7_gripper: no folder"),
    "an absolute path that is not there": (line(path="/nowhere/at/all"), "no folder /nowhere"),
    "a dataset's file for its folder": (line(path="level6_gripper/meta/info.json"), "no folder"),
    "a folder that is no dataset": (line(path="level6_gripper/data"), "info.json is missing"),
    "a level as text": (line(level="6"), "level is 6; expected a whole number in .2,6."),
    "the web's level": (line(level=1), "level is 1"),
    "a level of truth": (line(level=True), "level is True"),
    "a weight of zero": (line(weight=0), "weight is 0"),
    "a weight below zero": (line(weight=-1), "weight is -1"),
    "a weight that is NaN": (line(weight=float("nan")), "weight is nan|NaN"),
    "a weight as text": (line(weight="1"), "weight is 1; expected a number"),
    "an unknown normalisation": (line(normalise="zscore"), "normalise is 'zscore'"),
    "films moved by less than nothing": (line(shift=-1), "shift is -1; expected a whole number in"),
    "a mapping that is a list": (line(mapping=["action"]), "mapping is"),
    "an unknown field of a mapping": (
        line(mapping={"actions": "action"}),
        "unknown key 'actions'",
    ),
    "a mapping to no column": (line(mapping={"action": "motors"}), "motors"),
    "a mapping to no camera": (
        line(mapping={"cameras": ["observation.images.rear"]}),
        "observation.images.rear",
    ),
    "cameras that are a number": (line(mapping={"cameras": 3}), "cameras is 3"),
    "a prefix that is a number": (line(mapping={"prefix": 3}), "prefix is 3"),
    "a T-layout of one camera": (line(mapping={"t_layout": True}), "head, left, right"),
    "an ahead that is text": (line(ahead="yes"), "ahead is 'yes'"),
    "an unknown way to draw": (line(draw="episodes"), "draw is 'episodes'"),
    "all episodes held out": (line(held_out=6), "held_out is 6 of 6"),
    "half an episode held out": (line(held_out=0.5), "held_out is 0.5"),
    "fewer than no episodes": (line(episodes=-1), "episodes is -1"),
    "a world that is not there": (line(path="world:moon"), "simulator 'moon'"),
    "a level that a world lacks": (
        line(path="world:toy", embodiment="claw"),
        "embodiment is 'claw'",
    ),
    "a video rate of zero": (top(video_hz=0), "video_hz is 0"),
    "an action rate that is NaN": (top(action_hz=float("nan")), "action_hz is nan|NaN"),
    "rates that do not divide": (top(action_hz=12), "action_hz 12 is 2.4 times video_hz 5"),
    "a size of one number": (top(size=[48]), "size is"),
    "a size that the network cannot halve": (top(size=[50, 48]), "size is .50, 48"),
    "a size of 10^9": (top(size=[10**9, 16]), "size is"),
    "a source twice": (
        lambda stored: stored["sources"].append(stored["sources"][3]),
        "is there twice",
    ),
    "no source of the stage's levels": (
        line(level=2),
        r"sources are of levels \[2, 5\]; this stage takes \[6\]",
    ),
    "two widths of one robot": (line(1, level=6, embodiment="gripper"), r"\(4, 4\)|\(3, 3\)"),
    "two normalisations of one robot": (
        line(2, level=6, embodiment="gripper", normalise="none"),
        "normalised by",
    ),
    "a stage of actions without any": (no_actions, "no source has actions"),
    "different fps and no rate": (
        lambda stored: (stored.pop("action_hz"), stored["sources"].append({"path": "slow"})),
        "run at",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_card_is_refused_by_name(card, tmp_path, mutant):
    """One ValueError that names the card, what is found and what is allowed."""
    edit, named = MUTANTS[mutant]
    for folder in card.parent.iterdir():
        if folder.is_dir():
            (tmp_path / folder.name).symlink_to(folder)
    if mutant == "different fps and no rate":
        rows = np.random.default_rng(0).normal(size=(9, 3))
        write_v3(tmp_path / "slow", [({}, rows, rows, "go")], 7)
    stored = json.loads(card.read_text())
    edit(stored)
    (tmp_path / "card.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"(?s)card.*({named})"):
        pyramid = opened(tmp_path / "card.json")
        data.network_for(pyramid, "toy", "3")
        pyramid.robots(acting=True)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b"\xff\xfe", b'{"sources": [], "sources": []}', b"[" * 100_000]
)
def test_a_card_that_is_no_json_object_is_refused(tmp_path, raw):
    """Empty, cut, a list, no text, a field twice, deep."""
    (tmp_path / "card.json").write_bytes(raw)
    with pytest.raises(ValueError, match="card.json|sources"):
        opened(tmp_path)


def test_an_episode_in_two_sources_is_found(card, tmp_path):
    """It would be trained on more than its weight says, or on what is held out."""
    shutil.copytree(card.parent / "level6_gripper", tmp_path / "again")
    again = {"path": "again", "level": 6, "embodiment": "gripper"}
    pyramid = opened(changed(card, tmp_path, _1=again))
    faults = pyramid.check()
    assert len(faults) == 6 and all("again number for number" in fault for fault in faults)
    assert "episode 0, actions: equals" in faults[0].replace("action:", "actions:")


def test_several_datasets_in_a_folder_need_no_card(card, tmp_path):
    """Each is a source of equal weight."""
    for name in ("level5_gantry", "level6_gripper"):
        (tmp_path / name).symlink_to(card.parent / name)
    pyramid = opened(tmp_path)
    assert [o.source.embodiment for o in pyramid.opened] == [
        "gantry",
        "gripper",
    ] and pyramid.weights.tolist() == [1, 1]


# -- what used to pass in silence -----------------------------------------------------------------


def robot(path: Path, fps: float = 10, episodes: int = 3, cameras: tuple = ("a", "b"), **more):
    """A small dataset of one file an episode, and its line in a card."""
    rng = np.random.default_rng(len(path.name) + int(fps))
    made = []
    for e in range(episodes):
        rows = rng.normal(size=(16, 2)).cumsum(0)
        views = {
            c: np.full((16, 32, 32, 3), 60 * e + 9 * i, np.uint8) for i, c in enumerate(cameras)
        }
        made.append((views, rows, rows, "go"))
    write_v3(path, made, fps, Storage(together=1))
    return {"path": path.name, "embodiment": path.name} | more


def card_with(where: Path, *sources: dict, **more) -> Path:
    (where / "card.json").write_text(json.dumps({"sources": sources} | more))
    return where / "card.json"


def test_an_episode_without_a_camera_is_named_and_can_be_left_out(tmp_path):
    """A missing file, and a place that meta/episodes does not know: the fault names the episode;
    "without" leaves it out of draws, statistics, checks and what is held out, and the others keep
    their numbers."""
    import pyarrow.parquet as pq

    source = robot(tmp_path / "set", episodes=5, held_out=2)
    sound = opened(card_with(tmp_path, source))
    (tmp_path / "set/videos/observation.images.b/chunk-000/file-001.mp4").unlink()
    with pytest.raises(ValueError, match="episode 1, observation.images.b: .*file-001.mp4 is miss"):
        opened(
            card_with(tmp_path, source | {"mapping": {"cameras": ["observation.images.b"]}})
        ).window((0, 1, 0), "real")
    file = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    name = "videos/observation.images.a/chunk_index"
    holes = [None if e == 3 else v for e, v in enumerate(table[name].to_pylist())]
    pq.write_table(table.set_column(table.column_names.index(name), name, [holes]), file)
    with pytest.raises(
        ValueError, match="episode 3, videos/observation.images.a/chunk_index: is nan"
    ):
        opened(card_with(tmp_path, source))
    cameras = ["observation.images.a", "observation.images.b"]
    mapping = {"cameras": cameras, "without": [1, 3]}
    left = opened(card_with(tmp_path, source | {"mapping": mapping}))
    assert {row[1] for row in left.draw(64, 0, 0).tolist()} == {0, 2}
    assert set(left.held_out(9, 0)[:, 1].tolist()) == {4} and left.check() == []
    assert left.opened[0].rows == 32 and left.opened[0].windows == 2 * sound.opened[0].counts[0]
    rows = np.concatenate([left.opened[0].reader.numbers(e)[1] for e in (0, 2)])
    (known,) = left.robots(acting=True)
    np.testing.assert_allclose(known.actions.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    assert left.window((0, 2, 0), "real").actions.shape == (8, 2)
    for wrong in ([5], ["1"], [0, 1, 2]):
        mapping = {"cameras": cameras, "without": [3, *wrong]}
        with pytest.raises(ValueError, match='"without" is .*from 0 to 4 that leave one to train'):
            opened(card_with(tmp_path, source | {"mapping": mapping}))


def test_robots_of_two_rates_get_one_warning_in_either_direction(tmp_path):
    """Read faster or slower than recorded, changes per step add up to another motion: said for
    both, with the factor."""
    sources = robot(tmp_path / "slow", 10), robot(tmp_path / "fast", 20)
    for rate, name, recorded, factor in ((20, "slow", 10, "2"), (10, "fast", 20, "0.5")):
        told = opened(card_with(tmp_path, *sources, action_hz=rate)).describe()
        expected = f"{name}: actions recorded at {recorded} Hz are read at {rate} Hz"
        assert expected in told and f"add up to {factor} of what was done" in told
        assert told.count("actions recorded at") == 1


@pytest.mark.parametrize("count, held", [(2, 0), (3, 1), (8, 1), (39, 1), (40, 2), (100, 5)])
def test_few_episodes_hold_one_out(count, held):
    assert cards.Source("any").held_of(count) == held


def test_recordings_without_actions_are_of_level_2(tmp_path):
    """Where nobody says otherwise, in a card and without one; what acts is of the target robot."""
    pictures = np.zeros((16, 32, 32, 3), np.uint8)
    write_v3(tmp_path / "mute", [({"a": pictures}, None, None, "go")] * 3, 10)
    sources = robot(tmp_path / "acts"), {"path": "mute"}
    levels = [o.source.level for o in opened(card_with(tmp_path, *sources), (2, 6)).opened]
    assert levels == [6, 2]
    (o,) = opened(tmp_path / "mute", (2, 3, 5)).opened
    assert o.source.level == 2
    (o,) = opened(tmp_path / "acts", (2, 3, 5)).opened
    assert o.source.level == 5
    with pytest.raises(ValueError, match=r"levels \[2\]; this stage takes \[6\].*has no actions"):
        opened(tmp_path / "mute")


def test_a_card_that_inspect_writes_is_for_any_preset(tmp_path):
    """No picture size that the preset which looked at it happens to have; one that was chosen
    stays."""
    source = robot(tmp_path / "set")
    for size, kept in ((None, (96, 96)), ([64, 80], (64, 80))):
        path = card_with(tmp_path, source, **({"size": size} if size else {}))
        out = tmp_path / "again.json"
        data.main(["inspect", str(path), "--out", str(tmp_path / "a.png"), "--card", str(out)])
        assert data.open_pyramid(out, "3", "sim").size == kept
