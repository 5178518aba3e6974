"""Dataset cards: what a stage draws from, in which mix, in whose units; and cards that are refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from formats import cards

pytest.importorskip("pyarrow")
pytest.importorskip("av")
from formats.cards import Pyramid, shares
from formats.lerobot import write_v3  # noqa: E402
from formats.recordings import Storage  # noqa: E402
from formats.statistics import Moments, Normaliser, Sample
from motus import preset

CONFIG = preset("toy")


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    """The toy pyramid on disk, pictures exact."""
    return data.record(
        tmp_path_factory.mktemp("toy") / "set",
        (2, 5, 6),
        episodes=4,
        held_out=2,
        seed=3,
        lossless=True,
    )


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


def test_windows_of_a_recorded_dataset_are_those_of_the_toy(card):
    """Pixels, words, masks to the last bit; numbers after both are back in the robot's units. The
    frame after the last action is not in a dataset, so windows that need it differ there and
    nowhere else."""
    episodes, pyramid = data.toy_episodes((6,), 4, seed=3), Pyramid(card, (6,))
    stats, robots = data.statistics(episodes), pyramid.robots(acting=True)
    starts = [
        (e, s)
        for e, episode in enumerate(episodes)
        for s in (0, 5, len(episode.actions) - 14, len(episode.actions) - 7)
    ]
    ours = data.batch_of(
        pyramid, torch.tensor([(0, e, s) for e, s in starts]), "real", robots, CONFIG
    )
    toy = data.collect(episodes, starts, CONFIG, stats)
    whole = torch.tensor([s + 12 < len(episodes[e].actions) for e, s in starts])
    assert torch.equal(ours.frames[whole], toy.frames[whole]) and torch.equal(
        ours.frames[:, :2], toy.frames[:, :2]
    )
    assert ours.instruction == toy.instruction and torch.equal(ours.level, toy.level)
    assert torch.equal(ours.action_mask, toy.action_mask) and torch.equal(
        ours.video_mask, toy.video_mask
    )
    assert whole.any() and not ours.action_mask.all() and not ours.video_mask.all()
    (robot,) = robots
    torch.testing.assert_close(
        robot.actions.invert(ours.actions), stats.actions.invert(toy.actions), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        robot.state.invert(ours.state), stats.state.invert(toy.state), atol=1e-6, rtol=0
    )


def test_level_6_is_recorded_for_each_robot_that_is_named(tmp_path):
    """As many demonstrations of each, the target robot's as if it were alone; a hand, whose actions
    nobody has, cannot demonstrate."""
    two = Pyramid(data.record(tmp_path / "two", (6,), 2, 1, 3, robots=("gripper", "arm")), (6,))
    one = Pyramid(data.record(tmp_path / "one", (6,), 2, 1, 3), (6,))
    assert [
        (o.source.embodiment, o.trained, len(o.reader.lengths), o.reader.widths) for o in two.opened
    ] == [("gripper", 2, 3, (3, 3)), ("arm", 2, 3, (4, 4))]
    for episode in range(3):
        for ours, theirs in zip(
            two.opened[0].reader.numbers(episode), one.opened[0].reader.numbers(episode)
        ):
            assert np.array_equal(ours, theirs)
    with pytest.raises(
        ValueError, match=r"robots are \['hand'\].*allowed: \['gripper', 'arm', 'gantry'\]"
    ):
        data.record(tmp_path / "no", (6,), 1, 0, robots=("hand",))
    with pytest.raises(ValueError, match="level is 7; the tabletop records levels"):
        data.record(tmp_path / "no", (7,), 1, 0)
    with pytest.raises(ValueError, match="episodes is 0; record at least one"):
        data.record(tmp_path / "no", (6,), 0, 1)


def test_compressed_video_shows_the_same_but_for_the_codec(tmp_path):
    """Above 30 dB of the recorded pixels."""
    episodes = data.toy_episodes((6,), 1, seed=3)
    pyramid = Pyramid(data.record(tmp_path / "set", (6,), 1, 0, 3), (6,))
    frames = pyramid.window((0, 0, 4), "real")[1].astype(float)
    assert 10 * np.log10(255**2 / ((frames - episodes[0].frames[4:17:3]) ** 2).mean()) > 30


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
        Storage(images=True),
    )
    (tmp_path / "card.json").write_text(
        json.dumps({"video_hz": hz[0], "action_hz": hz[1], "sources": [{"path": "set"}]})
    )
    pyramid = Pyramid(tmp_path)
    _, frames, _, actions, mask, state, _ = pyramid.window((0, 0, 3), "real")
    assert frames[:, 0, 0, 0].tolist() == [5 * (3 + i) for i in rows[0]] and actions[
        :, 0
    ].tolist() == [3 + i for i in rows[1]]
    assert state.tolist() == [3, 3.5] and mask.all()
    assert ("beside the wanted times" in pyramid.describe()) == (fps == 12)


def test_actions_may_be_later_positions(card, tmp_path):
    """With `ahead` action i is the number one action period after time i: what official Motus
    trains on, from the state column."""
    plain = Pyramid(changed(card, tmp_path, _3={"mapping": {"action": "observation.state"}}), (6,))
    (tmp_path / "b").mkdir()
    ahead = Pyramid(
        changed(
            card, tmp_path / "b", _3={"mapping": {"action": "observation.state"}, "ahead": True}
        ),
        (6,),
    )
    a, b = (p.window((0, 1, 2), "real") for p in (plain, ahead))
    assert (
        np.array_equal(a[3][1:], b[3][:-1])
        and np.array_equal(a[3][0], a[5])
        and not np.array_equal(b[3][0], b[5])
    )


def test_robots_of_different_width_and_none_share_a_batch(card, tmp_path):
    """Numbers are padded with zeros and masked; a source without actions is masked altogether; each
    robot has its own units."""
    wide = changed(card, tmp_path, _0={"level": 6}, _1={"level": 6}, _2={"level": 6})
    pyramid = Pyramid(wide, (6,))
    config, robots = pyramid.config(CONFIG), pyramid.robots(acting=True)
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
    assert data.Statistics.from_json(data.as_stored(robots), "arm") == robots[0]
    with pytest.raises(
        ValueError, match="robot is ''; this checkpoint knows 'arm', 'gantry', 'gripper'"
    ):
        data.Statistics.from_json(data.as_stored(robots))


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
        Storage(images=True),
    )
    return root


def test_three_cameras_become_the_t_layout_unless_others_are_chosen(tmp_path):
    """Head above two wrists at half its size, by the cameras' names; otherwise the first camera, or
    those chosen side by side."""
    picture = Pyramid(three_cameras(tmp_path / "a")).window((0, 0, 0), "none")[1][0, :, :, 0]
    assert [int(picture[16, 24]), int(picture[40, 8]), int(picture[40, 40])] == [60, 120, 180]
    other = Pyramid(three_cameras(tmp_path / "b", ("x", "y", "z")))
    assert other.window((0, 0, 0), "none")[1][0, 24, 24, 0] == 60 and other.robots(False)[
        0
    ].cameras == ("x",)
    (tmp_path / "card.json").write_text(
        json.dumps(
            {
                "sources": [
                    {
                        "path": "b",
                        "mapping": {"cameras": ["observation.images.y", "observation.images.z"]},
                    }
                ]
            }
        )
    )
    picture = Pyramid(tmp_path).window((0, 0, 0), "none")[1][0, 24, :, 0]
    assert [int(picture[4]), int(picture[-4])] == [120, 180]


# -- the mix --------------------------------------------------------------------------------------


def test_a_stage_picks_its_levels_and_mixes_by_weight(card, tmp_path):
    """Within one of its share in every batch; the same for any number of ranks, which take turns
    with the rows; no held-out episode."""
    pyramid = Pyramid(changed(card, tmp_path, _0={"weight": 3}), (2, 5))
    assert [o.source.embodiment for o in pyramid.opened] == ["hand", "arm", "gantry"]
    total = Counter()
    for step in range(40):
        rows = pyramid.draw(10, seed=1, step=step)
        count = Counter(rows[:, 0].tolist())
        assert abs(count[0] - 7.5) <= 1 and abs(count[1] - 1.25) <= 1 and abs(count[2] - 1.25) <= 1
        total += count
        assert all(
            e < pyramid.opened[i].trained and s < pyramid.opened[i].counts[e]
            for i, e, s in rows.tolist()
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
    drawn = Pyramid(tmp_path).draw(400, 0, 0)
    assert 160 < int((drawn[:, 1] == 0).sum()) < 240


def test_a_stream_resumes_to_the_sample_and_never_holds_more_than_it_may(card):
    """Batches from step 3 on are those of the uninterrupted run, for one thread and for three,
    whole or in the halves of two ranks, one by one or every other; what is decoded ahead is
    bounded."""
    pyramid = Pyramid(card, (6,))
    robots = pyramid.robots(acting=True)

    def run(steps, threads: int, *rank: int) -> list[data.Batch]:
        stream, found = (
            data.Stream(pyramid, None, CONFIG, "real", robots, ahead=2, threads=threads),
            [],
        )
        for step in steps:
            found.append(stream.decoded(4, 5, step, *rank))
            assert stream.waited >= 0 and len(stream.pending) == 2
        return found

    def equal(a: data.Batch, b: data.Batch, rows: slice = slice(None)) -> None:
        assert (
            torch.equal(a.frames[rows], b.frames)
            and torch.equal(a.actions[rows], b.actions)
            and a.instruction[rows] == b.instruction
        )
        assert torch.equal(a.action_mask[rows], b.action_mask) and torch.equal(
            a.state[rows], b.state
        )

    whole = run(range(6), 1)
    for step, batch in enumerate(run(range(3, 6), 3), 3):
        equal(whole[step], batch)
    for step, batch in zip((0, 2, 4), run((0, 2, 4), 2, 1, 2)):
        equal(whole[step], batch, slice(2, 4))


def test_only_the_next_batches_are_decoded_ahead(card):
    """Step by step each window is decoded once; a loader process that sees every other step looks
    that far ahead."""
    pyramid, asked = Pyramid(card, (6,)), []
    stream = data.Stream(pyramid, None, CONFIG, "none", ahead=2)
    real, rows = pyramid.window, lambda step: stream.rows(4, 5, step).tolist()
    pyramid.window = lambda row, actions: asked.append(row) or real(row, actions)
    for step in (0, 1, 2):
        stream.decoded(4, 5, step)
    stream.decoders.shutdown()
    assert sorted(asked) == sorted(row for step in range(5) for row in rows(step))
    other = data.Stream(pyramid, None, CONFIG, "none", ahead=2)
    for step in (1, 3):
        other.decoded(4, 5, step)
    assert sorted(key[2] for key in other.pending) == [5, 7]


def test_the_report_says_what_is_used(card):
    """Hours, episodes, rows and share per source and level; rates; held-out episodes."""
    text = Pyramid(card).describe()
    assert text.count("33.3 %") == 5 and text.count("16.7 %") == 2 and "0.00" in text
    assert (
        "video at 5 Hz" in text
        and "actions at 15 Hz (3 per frame)" in text
        and "6 episodes held out" in text
    )
    assert "observation.state (4), chosen automatically" in text


# -- statistics -----------------------------------------------------------------------------------


def test_moments_of_parts_add_up_to_those_of_the_whole():
    """Mean, std and range equal numpy's over all rows at once."""
    rows = np.random.default_rng(0).normal(3, 2, (1000, 4)) * [1, 10, 100, 0]
    whole = sum(
        (Moments.of(part) for part in np.split(rows, [1, 20, 700])[1:]), Moments.of(rows[:1])
    )
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(whole.square / whole.count), rows.std(0), rtol=1e-12)
    assert np.array_equal(whole.min, rows.min(0)) and np.array_equal(whole.max, rows.max(0))


def test_quantiles_are_exact_for_few_rows_and_near_for_many(monkeypatch):
    """Up to MOST rows numpy's own; beyond, a sample whose rank is off by less than half a percent;
    the order of merging does not matter."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 2))
    found = Normaliser.fit(rows)
    np.testing.assert_allclose(found.q01, np.quantile(rows, 0.01, axis=0))
    monkeypatch.setattr(Sample, "MOST", 1500)
    parts = [Sample(rng.random(1000), part) for part in np.split(rows, 3)]
    one, other = parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0])
    assert len(one.rows) == 1500 and np.array_equal(one.rows, other.rows)
    assert abs((rows < np.quantile(one.rows, 0.01, axis=0)).mean() - 0.01) < 0.005


@pytest.mark.parametrize(
    "kind, low, high",
    [("min_max", 0, 1), ("quantile", -1.2, 1.2), ("none", -40, 40), ("mean_std", -4, 4)],
)
def test_every_normalisation_inverts(kind, low, high):
    """Official min-max gives [0, 1], quantiles [-1, 1] but for the outermost; a still dimension
    stays finite."""
    rows = np.concatenate(
        [np.random.default_rng(0).uniform(-40, 40, (500, 2)), np.full((500, 1), 7.0)], axis=1
    )
    stats = Normaliser(**{**vars(Normaliser.fit(rows)), "kind": kind})
    seen = stats.apply(torch.from_numpy(rows))
    assert seen[:, :2].min() >= low and seen[:, :2].max() <= high and seen.isfinite().all()
    torch.testing.assert_close(stats.invert(seen), torch.from_numpy(rows))
    assert kind != "min_max" or (seen[:, :2].min(), seen[:, :2].max()) == (0, 1)


@pytest.mark.parametrize("world", [2, 3])
def test_statistics_are_the_same_for_any_number_of_ranks(card, monkeypatch, world):
    """Bit for bit; each rank reads its share of the blocks."""
    monkeypatch.setattr(cards, "BLOCK", 1)
    pyramid = Pyramid(card, (5, 6))
    alone, parts = (
        pyramid.robots(acting=True),
        [pyramid.measure(rank, world) for rank in range(world)],
    )
    assert pyramid.robots(True, parts) == alone and [robot.embodiment for robot in alone] == [
        "arm",
        "gantry",
        "gripper",
    ]
    blocks = [{key for key in part if json.loads(key)[2] is not None} for part in parts]
    assert all(blocks) and sum(map(len, blocks)) == len(set.union(*blocks)) == 16


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
    "an unknown field of the card": (top(video_fps=5), r"unknown fields \['video_fps'\]"),
    "an unknown field of a source": (line(wieght=2), "unknown key 'wieght'.*did you mean 'weight'"),
    "a source without a path": (
        lambda stored: stored["sources"][3].pop("path"),
        "source 3 has no path",
    ),
    "a path that is a number": (line(path=7), "path is 7"),
    "a path with a zero byte": (line(path="level6\0"), r"path is 'level6"),
    "a path that is not there": (line(path="./level7_gripper"), "level7_gripper: no folder"),
    "an absolute path that is not there": (line(path="/nowhere/at/all"), "no folder /nowhere"),
    "a dataset's file for its folder": (line(path="level6_gripper/meta/info.json"), "no folder"),
    "a folder that is no dataset": (line(path="level6_gripper/data"), "info.json is missing"),
    "a level as text": (line(level="6"), "level is '6'"),
    "the web's level": (line(level=1), "level is 1"),
    "a level of truth": (line(level=True), "level is True"),
    "a weight of zero": (line(weight=0), "weight is 0"),
    "a weight below zero": (line(weight=-1), "weight is -1"),
    "a weight that is NaN": (line(weight=float("nan")), "weight is nan|NaN"),
    "a weight as text": (line(weight="1"), "weight is '1'"),
    "an unknown normalisation": (line(normalise="zscore"), "normalise is 'zscore'"),
    "a mapping that is a list": (line(mapping=["action"]), "mapping is"),
    "an unknown field of a mapping": (
        line(mapping={"actions": "action"}),
        "unknown fields.*actions",
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
        pyramid = Pyramid(tmp_path / "card.json", (6,))
        pyramid.config(CONFIG), pyramid.robots(acting=True)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b"\xff\xfe", b'{"sources": [], "sources": []}', b"[" * 100_000]
)
def test_a_card_that_is_no_json_object_is_refused(tmp_path, raw):
    """Empty, cut, a list, no text, a field twice, deep."""
    (tmp_path / "card.json").write_bytes(raw)
    with pytest.raises(ValueError, match="card.json|sources"):
        Pyramid(tmp_path)


def test_an_episode_in_two_sources_is_found(card, tmp_path):
    """It would be trained on more than its weight says, or on what is held out."""
    shutil.copytree(card.parent / "level6_gripper", tmp_path / "again")
    pyramid = Pyramid(
        changed(card, tmp_path, _1={"path": "again", "level": 6, "embodiment": "gripper"}), (6,)
    )
    assert (
        "source again, episode 0: equals episode 0" in "\n".join(pyramid.check())
        or "equals episode 0 of again" in pyramid.check()[0]
    )


def test_several_datasets_in_a_folder_need_no_card(card, tmp_path):
    """Each is a source of equal weight."""
    for name in ("level5_gantry", "level6_gripper"):
        (tmp_path / name).symlink_to(card.parent / name)
    pyramid = Pyramid(tmp_path, (6,))
    assert [o.source.embodiment for o in pyramid.opened] == [
        "gantry",
        "gripper",
    ] and pyramid.weights.tolist() == [1, 1]
