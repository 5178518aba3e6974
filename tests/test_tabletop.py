"""The toy world: worlds that depend on their seed alone, experts that succeed, pixels and flow that
agree."""

import time

import numpy as np
import pytest

from worlds.render import Snapshot, flow
from worlds.robots import (
    COLOURS,
    EMBODIMENTS,
    HELD_OUT,
    IMAGE,
    SIDES,
    SKILLS,
    arm_joints,
    arm_points,
    instructions,
    sentence,
)
from worlds.tabletop import Tabletop, labels, record

BODIES = tuple(EMBODIMENTS)


def rollout(world: Tabletop, seeds, steps: int = 100, noise: float = 0.01) -> np.ndarray:
    """Success of the expert, without pictures."""
    world.reset(seeds)
    for _ in range(steps):
        world.advance(world.expert(noise))
    return world.success


def scene(skill: str, side: str, body: str = "gripper") -> Tabletop:
    """A world whose only instruction is one skill towards one side, with whichever colour its seed
    draws."""
    world = Tabletop(1, body)
    world.tasks = [(skill, colour, side) for colour in COLOURS]
    world.reset([5])
    return world


def warp(image: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Backward warp: bilinear samples of image (h, w, 3) at each pixel plus motion (h, w, 2)."""
    y, x = np.mgrid[:IMAGE, :IMAGE]
    x, y = (np.clip(at, 0, IMAGE - 1.001) for at in (x + motion[..., 0], y + motion[..., 1]))
    j, i = x.astype(int), y.astype(int)
    a, b, image = (x - j)[..., None], (y - i)[..., None], image.astype(float)
    return (image[i, j] * (1 - a) + image[i, j + 1] * a) * (1 - b) + (
        image[i + 1, j] * (1 - a) + image[i + 1, j + 1] * a
    ) * b


@pytest.mark.parametrize("body", BODIES)
def test_a_world_depends_on_its_seed_alone(body):
    """One seed gives the same pictures, states and noise, bit for bit, among any neighbours."""
    alone, together = Tabletop(1, body, randomized=True), Tabletop(5, body, randomized=True)
    one, many = alone.reset([7]), together.reset([3, 1, 7, 9, 2])
    for _ in range(12):
        assert np.array_equal(one["image"][0], many["image"][2])
        assert np.array_equal(one["state"][0], many["state"][2])
        for world in (alone, together):
            world.advance(world.expert(0.01))
        one, many = alone.observe(), together.observe()
    assert one["instruction"][0] == many["instruction"][2]


def test_recording_is_deterministic_and_a_longer_recording_begins_with_a_shorter_one():
    """Episodes depend on (level, index, seed); other seeds and other levels give other layouts."""
    short, long, other = record(5, 2, seed=1), record(5, 4, seed=1), record(5, 2, seed=2)
    for a, b in zip(short, long):
        assert (
            np.array_equal(a.frames, b.frames)
            and np.array_equal(a.actions, b.actions)
            and a.instruction == b.instruction
        )
    assert not np.array_equal(short[0].frames[0], other[0].frames[0])
    assert [e.embodiment for e in long] == ["arm", "gantry"] * 2


@pytest.mark.parametrize("body", BODIES)
def test_the_expert_succeeds_with_and_without_noise(body):
    """At least 99 % of layouts, within 100 steps, in every embodiment."""
    world = Tabletop(128, body)
    for noise in (0.0, 0.01):
        success = rollout(world, range(128), noise=noise)
        assert success.mean() >= 0.99, (
            f"{body}, noise {noise}: failed seeds {np.flatnonzero(~success)}"
        )


@pytest.mark.parametrize(
    "kind", [dict(split="eval"), dict(split="held_out"), dict(randomized=True)]
)
def test_the_expert_succeeds_on_every_split(kind):
    """Unseen layouts and combinations and randomised scenes are as feasible as training ones."""
    assert rollout(Tabletop(64, **kind), range(64)).mean() >= 0.98


def test_a_random_policy_solves_nothing():
    """Success is not to be had by chance."""
    rng, world = np.random.default_rng(0), Tabletop(128)
    world.reset(range(128))
    for actions in rng.uniform(-1, 1, (10, 128, 3)).repeat(
        6, axis=0
    ):  # each held for six steps, so that it goes somewhere
        world.advance(actions)
    assert world.success.mean() < 0.06


def test_held_out_combinations_are_never_trained_on():
    """32 combinations; train and eval share 28 of them, held_out has the others, and each word is
    still heard in training."""
    train, held = instructions("train"), instructions("held_out")
    assert (
        len(train) == 28
        and set(held) == set(HELD_OUT)
        and not set(train) & set(held)
        and instructions("eval") == train
    )
    assert (
        {c for _, c, _ in train} == set(COLOURS)
        and {s for _, _, s in train} == set(SIDES)
        and {k for k, _, _ in train} == set(SKILLS)
    )
    for split in ("train", "eval", "held_out"):
        heard = set(Tabletop(96, split=split).reset(range(96))["instruction"])
        assert heard <= {sentence(*c) for c in instructions(split)}


def test_splits_have_different_layouts_at_the_same_seed():
    """Streams of random numbers are keyed by the split too."""
    train, held = Tabletop(8), Tabletop(8, split="eval")
    train.reset(range(8))
    held.reset(range(8))
    assert not np.isclose(train.discs, held.discs).any()


def test_no_layout_starts_solved_or_overlapping():
    """Discs are apart, and the disc to be placed is well outside its band."""
    world = Tabletop(256)
    world.reset(range(256))
    gaps = np.linalg.norm(world.discs - np.roll(world.discs, 1, axis=1), axis=-1)
    assert gaps.min() > 0.15
    world.advance(np.concatenate([2 * world.effector - 1, -np.ones((256, 1))], axis=1))
    assert not world.success.any()


@pytest.mark.parametrize("body", BODIES)
def test_action_conventions_invert(body):
    """from_action(to_action(target)) is the target within reach of one step, and states lie in [-1,
    1]."""
    rng, e = np.random.default_rng(0), EMBODIMENTS[body]
    xy = rng.uniform(0.02, 0.98, (200, 2))
    target = np.clip(xy + rng.uniform(-0.03, 0.03, xy.shape), 0.02, 0.98)
    grip, opening = rng.choice([-1.0, 1.0], 200), np.full(200, 0.5)
    state = e.to_state(xy, opening, rng.uniform(-0.8, 0.8, 200))
    action = e.to_action(target, grip, state)
    back, back_grip, heading = e.from_action(action, state)
    assert state.shape == action.shape == (200, e.action_dim)
    assert np.abs(state).max() <= 1 and np.abs(action).max() <= 1
    np.testing.assert_allclose(back, target, atol=1e-9)
    np.testing.assert_allclose([back_grip, heading], [grip, 0 * grip], atol=1e-9)


def test_arm_kinematics_invert_over_the_table():
    """The hand of the arm is where its angles put it."""
    xy = np.random.default_rng(0).uniform(0.02, 0.98, (500, 2))
    np.testing.assert_allclose(arm_points(*arm_joints(xy))[1], xy, atol=1e-9)


def test_all_embodiments_move_alike():
    """One seed, no noise: the same discs end in the same places whatever the robot."""
    ends = []
    for body in BODIES:
        world = Tabletop(4, body)
        rollout(world, range(4), steps=60, noise=0.0)
        ends.append(world.discs)
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-6)


def test_closing_near_a_disc_grasps_it_and_opening_releases_it():
    """The disc keeps its place in the gripper while held, and stays where it is let go."""
    world = scene("place", "top")
    world.effector = world.discs[:, 0] + [0.04, 0.0]
    here = 2 * world.effector - 1
    for _ in range(2):
        world.advance(np.concatenate([here, [[1.0]]], axis=1))
    assert world.held[0].tolist() == [True, False, False]
    before = world.discs[0, 0].copy()
    world.advance(np.concatenate([2 * (world.effector + [0.03, 0.0]) - 1, [[1.0]]], axis=1))
    np.testing.assert_allclose(world.discs[0, 0] - before, [0.03, 0.0], atol=1e-9)
    for _ in range(2):
        world.advance(np.concatenate([2 * world.effector - 1, [[-1.0]]], axis=1))
    assert not world.held.any()


def test_an_open_gripper_touches_nothing_and_a_closed_one_pushes():
    """Passing over a disc moves it only with the gripper closed before it arrives."""
    for grip, moves in ((-1.0, False), (1.0, True)):
        world = scene("push", "right")
        world.discs[0] = [[0.5, 0.5], [0.1, 0.1], [0.9, 0.1]]
        world.effector, world.opening = np.array([[0.3, 0.5]]), np.array([(1 - grip) / 2])
        for _ in range(6):
            world.advance(np.array([[0.0, 0.0, grip]]))
        assert (world.discs[0, 0, 0] > 0.55) == moves


def test_a_push_does_not_count_when_the_disc_was_grasped():
    """Carrying the disc in the right direction is not pushing it; pushing it into the band is not
    placing it."""
    for grasped in (False, True):
        world = scene("push", "right")
        world.grasped[world.named] = grasped
        world.discs[world.named, 0] = world.start[0, 0] + 0.2
        world.advance(world.expert())
        assert world.success[0] != grasped
    world = scene("place", "right")
    world.discs[world.named, 0] = 0.9
    world.advance(world.expert())
    assert not world.success[0]


@pytest.mark.parametrize("body", BODIES)
def test_true_flow_carries_the_next_frame_back_to_this_one(body):
    """On moving pixels, warping frame t+3 by the true flow explains frame t far better than no
    warp."""
    episode = record(2, 3, seed=4, embodiment=body, disturbed=False)[0]
    t = np.arange(2, len(episode.frames) - 9, 3)
    motion = episode.flow(t, t + 3)
    plain, warped = [], []
    for k, start in enumerate(t):
        moving = np.abs(motion[k]).sum(-1) > 1.0
        now, later = episode.frames[start].astype(float), episode.frames[start + 3]
        plain.append(np.abs(later - now)[moving].sum())
        warped.append(np.abs(warp(later, motion[k]) - now)[moving].sum())
    assert sum(plain) > 0 and sum(warped) < 0.4 * sum(plain), (
        f"{body}: {sum(warped) / sum(plain):.2f} of the error is left"
    )


def test_flow_is_zero_where_nothing_moves_and_equals_the_motion_of_a_pushed_disc():
    """Numbers to check by hand: the disc's pixels move by its displacement times IMAGE, the table
    does not move."""
    world = scene("place", "top")
    before = world.snapshot()
    assert not flow("gripper", before, before).any()
    disc = world.discs[0, 0].copy()
    world.discs[0, 0] += [0.03, -0.02]
    motion = flow("gripper", before, world.snapshot())[0]
    column, row = (disc * IMAGE).astype(int)
    np.testing.assert_allclose(motion[row, column], [0.03 * IMAGE, -0.02 * IMAGE], atol=1e-4)
    covered = np.abs(motion).sum(-1) > 0
    assert abs(covered.sum() - np.pi * (0.075 * IMAGE) ** 2) < 8


def test_open_and_closed_grippers_differ_in_pixels():
    """A policy can see whether the gripper is closed."""
    for body in BODIES:
        world = Tabletop(1, body)
        world.reset([0])
        picture = world.render().astype(int)
        world.opening[:] = 0
        assert (np.abs(world.render() - picture).max(-1) > 40).sum() >= 10, body


@pytest.mark.parametrize(
    "actions, words",
    [
        (np.zeros((2, 4)), r"shape \(2, 4\).*\(2, 3\)"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), r"nan.*expected \(2, 3\) finite"),
        (np.array([[0, 0, np.inf], [0, 0, 0]]), r"inf.*expected \(2, 3\) finite"),
    ],
)
def test_bad_actions_are_named(actions, words):
    """Wrong shapes and values that are no numbers are refused with the value in the message."""
    world = Tabletop(2)
    world.reset([0, 1])
    with pytest.raises(ValueError, match=f"(?s){words}"):
        world.advance(actions)


def test_bad_arguments_are_named():
    """Unknown names list the known ones."""
    for call, words in (
        (lambda: Tabletop(1, "foot"), "'foot'.*gripper"),
        (lambda: Tabletop(1, split="test"), "'test'.*held_out"),
        (lambda: Tabletop(2).reset([1]), "2 non-negative"),
        (lambda: record(1, 1, 0), "level is 1"),
        (lambda: record(6, 0, 0), "episodes is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_episodes_have_one_frame_more_than_actions_and_the_levels_differ_as_the_pyramid_says():
    """Level 2 hides its actions, 4 has no instruction, 6 succeeds and ends a few still steps after
    success."""
    for level in (2, 3, 4, 5, 6):
        for e in record(level, 2, seed=0):
            t = len(e.frames) - 1
            assert e.frames.shape == (t + 1, IMAGE, IMAGE, 3) and e.frames.dtype == np.uint8
            assert len(e.states) == len(e.motion) == len(
                e.snapshots.effector
            ) == t + 1 and isinstance(e.snapshots, Snapshot)
            assert (e.actions is None) == (level == 2) and (e.instruction == "") == (level == 4)
            if e.actions is not None:
                assert (
                    e.actions.shape == (t, EMBODIMENTS[e.embodiment].action_dim)
                    and np.abs(e.actions).max() <= 1
                )
            assert e.success == (level != 4)
            if e.success:
                assert np.abs(np.diff(e.motion[-4:, :2], axis=0)).max() < 1e-6


def test_the_wanderer_grasps_and_pushes():
    """Task-agnostic play is not empty: most episodes move a disc, some by grasping."""
    world = Tabletop(64, task_agnostic=True)
    world.reset(range(64))
    start, held = world.discs.copy(), np.zeros(64, bool)
    for _ in range(48):
        world.advance(world.expert(0.01))
        held |= world.held.any(axis=1)
    moved = np.abs(world.discs - start).max(axis=(1, 2)) > 0.05
    assert moved.mean() > 0.6 and held.mean() > 0.3 and not world.success.any()


def test_the_expert_recovers_from_every_mistake_that_a_demonstration_begins_with():
    """Half of the astray worlds begin with the gripper closed on nothing and touching nothing; the
    expert solves them all the same."""
    world = Tabletop(64, astray=1.0)
    world.reset(range(64))
    gaps = np.linalg.norm(world.discs - world.effector[:, None], axis=-1).min(axis=1)
    closed = world.opening == 0
    assert 0.3 < closed.mean() < 0.7 and (gaps[closed] > 0.105).all() and not world.held.any()
    discs = world.discs.copy()
    for _ in range(100):
        world.advance(world.expert())
    assert world.success.all() and not np.array_equal(discs, world.discs)
    plain = Tabletop(64)
    plain.reset(range(64))
    assert np.array_equal(discs, plain.discs)  # the layout is that of the same seed


def test_labels_name_the_disc_of_the_instruction():
    """The ground truth for pre-training agrees with the text and with the pixels, in a world and in
    a recording."""
    strongest = {"red": 0, "green": 1, "blue": 2, "yellow": 0}
    world = Tabletop(16)
    seen, shot = world.reset(range(16)), world.snapshot()
    for i, text in enumerate(seen["instruction"]):
        skill, colour, side = world.task[i]
        assert text == sentence(skill, colour, side)
        truth = {name: value[0] for name, value in labels(shot.at([i]), text).items()}
        assert truth["opening"] == 1
        column, row = int(truth["object x"] * IMAGE), int(truth["object y"] * IMAGE)
        pixel = seen["image"][i, row, column].astype(int)
        assert pixel[strongest[colour]] == pixel.max()
    episode = record(6, 1, 0)[0]
    found = labels(episode.snapshots, episode.instruction)
    assert labels(episode.snapshots, "") == {}
    assert list(found)[:2] == ["object x", "object y"]
    assert all(value.shape == (len(episode.frames),) for value in found.values())
    assert np.allclose(found["effector x"], episode.motion[:, 0])


@pytest.mark.parametrize("body", BODIES)
def test_rendering_speed_is_printed(body):
    """Frames per second of processor time, on one core; shown with `pytest -s`, not asserted."""
    world = Tabletop(64, body)
    world.reset(range(64))
    start = time.process_time()
    frames = [world.render() for _ in range(4)]
    print(f"\n{body}: {4 * 64 / (time.process_time() - start):.0f} frames/s")
    assert frames[0].shape == (64, IMAGE, IMAGE, 3)


def test_an_opening_gripper_moves_its_fingers_apart():
    """The true flow gives each finger its own displacement: the left one goes left by 0.068 of the
    table, the right one right."""
    world = Tabletop(1)
    world.reset([3])
    before = world.snapshot()
    before.effector[:], before.discs[:], before.opening[:] = (
        [[0.3, 0.5]],
        [[[0.8, 0.2], [0.8, 0.5], [0.8, 0.8]]],
        0.5,
    )
    after = before.at(np.arange(1))
    after.opening[:] = 1.0
    motion = flow("gripper", before, after)[0]
    gap, row, column = (0.022 + 0.068 / 2) * IMAGE, int(0.5 * IMAGE), 0.3 * IMAGE
    left, right = motion[row - 2, int(column - gap)], motion[row - 2, int(column + gap)]
    assert np.allclose(left, [-0.034 * IMAGE, 0], atol=1e-4) and np.allclose(
        right, [0.034 * IMAGE, 0], atol=1e-4
    )


def test_recording_without_pictures_is_the_same_motion():
    """Snapshots, states and actions are those of the recording with pictures; the frames have their
    number and no pixels."""
    seen, blind = (record(5, 2, 0, pictures=pictures) for pictures in (True, False))
    for a, b in zip(seen, blind):
        assert (
            np.array_equal(a.motion, b.motion)
            and np.array_equal(a.states, b.states)
            and np.array_equal(a.actions, b.actions)
        )
        assert b.frames.shape == (len(a.frames), 0, 0, 3) and np.array_equal(
            a.flow([2], [5]), b.flow([2], [5])
        )
