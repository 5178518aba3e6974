"""A world that renders its episodes, as a source of recordings: rows, held-out layouts, true
motions, and what its simulator knows."""

import pickle

import numpy as np
import pytest

import data
from formats import rendered
from formats.rendered import Rendered
from worlds import motions, robots, tabletop


@pytest.fixture(scope="module")
def reader() -> Rendered:
    return Rendered("world:toy", 6, "gripper", count=3, held_out=2, seed=5)


def test_episodes_are_those_of_the_world_without_their_last_frame(reader):
    """Numbers, pictures and words, row by row."""
    for e, episode in enumerate(tabletop.record(6, 3, 5)):
        steps = len(episode.actions)
        state, actions = reader.numbers(e)
        assert reader.lengths[e] == steps
        assert np.array_equal(state, episode.states[:steps])
        assert np.array_equal(actions, episode.actions)
        frames = np.stack(list(reader.views(e, range(steps))["top"]))
        assert np.array_equal(frames, episode.frames[:steps])
        assert reader.texts(e) == [episode.instruction] and reader.group(e) == episode.instruction


def test_held_out_episodes_come_last_and_are_of_other_layouts_and_not_disturbed(reader):
    """The split that no stage trains on; what is recorded there is what was done."""
    wanted = tabletop.record(6, 2, 5, split="eval", disturbed=False)
    assert len(reader.lengths) == 5
    for e, episode in enumerate(wanted, 3):
        assert np.array_equal(reader.numbers(e)[1], episode.actions)
        state, actions = reader.numbers(e)
        assert np.abs(state[1:, :2] - actions[:-1, :2]).max() < 1e-5  # positions, reached


def test_an_episode_knows_where_its_disc_should_go(reader):
    """In the end a disc that was placed is there; without a task there is no such place."""
    for e in range(5):
        episode = reader.episode(e)
        assert reader.goal(e) is episode.goal and ((0 < episode.goal) & (episode.goal < 1)).all()
        if episode.instruction.startswith("put") and episode.success:
            gaps = episode.snapshots.discs[-1] - episode.goal
            assert np.linalg.norm(gaps, axis=1).min() < 0.1
    assert Rendered("world:toy", 4, "gripper", 1, 0).goal(0) is None


def test_nothing_is_rendered_before_it_is_needed(monkeypatch):
    """Opening asks for one episode without pictures; then all come in two calls."""
    asked = []

    def record(level, count, *rest, **more):
        asked.append((count, more.get("pictures", True)))
        return tabletop.record(level, count, *rest, **more)

    monkeypatch.setattr(rendered.simulator("toy"), "record", record)
    source = Rendered("world:toy", 3, "", 4, 2, seed=68)  # that no other test has
    assert (source.robot, source.widths, source.cameras) == ("gripper", (3, 3), ("top",))
    assert asked == [(1, False)]
    assert len(source.lengths) == 6 and len(source.lengths[:4]) == 4
    assert asked == [(1, False), (4, True)]
    assert len(source.lengths[:]) == 6 and asked == [(1, False), (4, True), (2, True)]


def test_a_body_whose_actions_nobody_records_has_none():
    """Level 2 is video of a hand; its motions are known all the same, for measuring."""
    source = Rendered("world:toy", 2, "hand", 1, 0)
    assert source.widths == (0, 0) and source.numbers(0) == (None, None) and not source.titles
    assert source.motions(0, 3).shape == (source.lengths[0], 3)
    assert source.check() == []


def test_flow_and_labels_span_exactly_the_interval(reader):
    """A row that would end past the last frame ends there and is not valid; labels are changes over
    the greatest change possible."""
    episode, interval = reader.episode(0), 3
    ((flow, valid),) = reader.flows(0, interval)
    steps = len(episode.actions)
    assert flow.shape == (steps, 48, 48, 2)
    assert valid.tolist() == [True] * (steps - 2) + [False] * 2
    assert np.array_equal(flow[4:5], episode.flow([4], [7]))
    change = episode.motion[7] - episode.motion[4]
    unit = [3 * robots.MAX_SPEED, 3 * robots.MAX_SPEED, 1.0]
    np.testing.assert_allclose(reader.motions(0, interval)[4], change / unit, rtol=1e-6)
    assert np.abs(reader.motions(0, interval)).max() <= 1 + 1e-6
    assert motions.greatest_change(1)[2] == robots.GRIP_SPEED


def test_labels_point_at_the_disc_that_the_instruction_names(reader):
    """The pixel there has the colour that the sentence names, unless the robot covers it."""
    ink = {"red": (0, 1), "green": (1, 0), "blue": (2, 0), "yellow": (0, 2)}  # stronger, weaker
    hits = []
    for e in range(5):
        strong, weak = ink[reader.texts(e)[0].split()[2]]
        labels = reader.labels(e)
        assert list(labels)[:2] == ["object x", "object y"]
        frames = list(reader.views(e, range(reader.lengths[e]))["top"])
        for frame, x, y in zip(frames, labels["object x"], labels["object y"]):
            pixel = frame[int(y * 48), int(x * 48)]
            hits.append(int(pixel[strong]) > int(pixel[weak]))
    assert np.mean(hits) > 0.8


def test_a_world_without_a_task_names_nothing():
    """No instruction, so no labels."""
    source = Rendered("world:toy", 4, "gripper", 1, 0)
    assert source.texts(0) == ["no task"] and source.labels(0) == {}


def test_a_reader_goes_to_other_processes_with_its_episodes(reader):
    """Rendered once, not once per worker."""
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(again.numbers(4)[1], reader.numbers(4)[1]) and "trained" in vars(again)


def test_what_a_world_does_not_record_is_refused():
    with pytest.raises(ValueError, match="level is 9"):
        Rendered("world:toy/9", 6, "gripper", 1, 0)
    with pytest.raises(ValueError, match="embodiment is 'claw'"):
        Rendered("world:toy", 6, "claw", 1, 0)
    with pytest.raises(ValueError, match="'moon'"):
        Rendered("world:moon", 6, "", 1, 0)


def test_the_card_of_the_preset_has_all_levels_in_equal_shares():
    """A level's weight is shared by its bodies, and so are its episodes."""
    pyramid = data.open_pyramid(None, "latent", "toy", episodes=4)
    shares = {}
    for o in pyramid.opened:
        level = shares.setdefault(o.source.level, [0.0, 0])
        level[0] += o.source.weight
        level[1] += o.trained
    assert shares == {level: [1.0, 4] for level in range(2, 7)}
    bodies = {(o.source.level, o.source.embodiment) for o in pyramid.opened}
    assert bodies == {(k, b) for k in range(2, 7) for b in tabletop.LEVELS[k].bodies}
    assert (pyramid.video_hz, pyramid.action_hz, pyramid.ratio) == (5, 15, 3)


def test_another_kind_of_episodes_can_stand_at_the_level_that_acts():
    """The second card of the toy: level 6 in other looks, and random motion whose recorded actions
    are those that were done, weigh as much as the demonstrations."""
    pyramid = data.open_pyramid("worlds/toy_modes.json", "3", "toy", episodes=2)
    plain, looks, motion = pyramid.opened
    assert [o.reader.level for o in pyramid.opened] == [6, 7, 8]
    assert [o.name for o in pyramid.opened] == [f"level6_gripper{k}" for k in ("", "_7", "_8")]
    assert plain.source.weight == looks.source.weight + motion.source.weight
    assert plain.trained == looks.trained == motion.trained == 2
    assert looks.instructions and motion.instructions == {""}
    for source, disturbed in ((plain, True), (motion, False)):
        moved = [source.reader.numbers(e) for e in range(2)]
        wrong = [np.abs(state[1:, :2] - action[:-1, :2]).max() for state, action in moved]
        assert (max(wrong) > 0.01) == disturbed


def test_motions_are_those_of_valid_rows_with_labels_of_the_target_robot_alone():
    """Levels 4 and 6 may be looked at; held-out episodes are others."""
    pyramid = data.open_pyramid(None, "latent", "toy", episodes=2)
    seen = data.motions(pyramid, 3)
    rows = sum(int(valid.sum()) for o in pyramid.opened for e in range(o.trained)
               for _, valid in o.reader.flows(e, 3))  # fmt: skip
    assert len(seen.flow) == len(seen.labels) == rows and seen.labels.abs().max() <= 1 + 1e-6
    assert set(seen.level[seen.mask.all(dim=1)].tolist()) == {4, 6}
    assert not seen.mask[(seen.level != 4) & (seen.level != 6)].any()
    with pytest.raises(ValueError, match="no episode has true motions over 500 rows"):
        data.motions(pyramid, 500)
