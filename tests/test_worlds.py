"""Simulators: worlds that depend on seed and actions alone, and experts that solve them."""

import importlib.util

import fake_world
import numpy as np
import pytest

from worlds import (
    EVALUATED,
    RECORDED,
    World,
    aloha,
    episode_seeds,
    libero,
    metaworld,
    simulator,
    toy,
)
from worlds.fleet import Order, attempt, made


def play(world: World, seed: int, actions: np.ndarray) -> tuple:
    """Everything that is to be seen of an episode."""
    seen = [world.reset(seed)]
    for action in actions:
        world.step(action)
        seen.append(world.observe())
    return seen, world.success, world.instruction


def conforms(world: World, other: World, actions: np.ndarray) -> None:
    """What `World` promises, of two worlds of the same task."""
    assert (
        world.action_dim == actions.shape[1]
        and world.fps > 0
        and world.max_steps > 0
        and world.robot
    )
    (seen, success, instruction), again = play(world, 7, actions), play(other, 7, actions)
    play(world, 8, actions)  # what was before leaves nothing behind
    for found in (again, play(world, 7, actions)):
        assert found[1:] == (success, instruction) and isinstance(instruction, str) and instruction
        for one, two in zip(seen, found[0]):
            assert (
                np.array_equal(one["state"], two["state"])
                and one["images"].keys() == two["images"].keys()
            )
            assert all(np.array_equal(one["images"][k], two["images"][k]) for k in one["images"])
    for look in seen:
        assert (
            look["state"].dtype == np.float32
            and look["state"].ndim == 1
            and np.isfinite(look["state"]).all()
        )
        assert all(
            p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 and p.flags["C_CONTIGUOUS"]
            for p in look["images"].values()
        )
    first = next(iter(seen[0]["images"]))
    assert any(
        not np.array_equal(world.reset(seed)["images"][first], seen[0]["images"][first])
        for seed in (8, 9, 10)
    )
    assert world.success is False or not world.success
    for wrong in (np.zeros(world.action_dim + 1), np.full(world.action_dim, np.nan)):
        with pytest.raises(ValueError, match=f"expected {world.action_dim} finite numbers"):
            world.step(wrong)


def solved(world: World, seeds: range) -> int:
    """In how many scenes the expert succeeds."""
    count = 0
    for seed in seeds:
        world.reset(seed)
        for _ in range(world.max_steps):
            world.step(world.expert())
        count += world.success
    return count


# -- the interface --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", toy.TASKS)
def test_the_toy_keeps_the_promises_of_a_world(task):
    """Same seed and actions, same pictures, states and success; the expert solves it; its
    instruction is of the task."""
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 3))
    conforms(toy.make(task), toy.make(task), actions)
    world = toy.make(task)
    assert solved(world, range(4)) >= 3
    assert world.instruction.startswith({"place": "put", "push": "push"}[task])
    labels = world.labels()
    assert list(labels)[:2] == ["object x", "object y"]
    assert labels["effector x"] == pytest.approx((world.state()[0] + 1) / 2)


def test_many_tabletops_are_as_many_single_ones():
    """The same seeds are the same worlds, one by one and all at once; each seed draws its task, of
    those that are asked for; the expert answers for what is not solved."""
    seeds = [4, 5, 6]
    many = toy.many(["push"], 8)
    many.reset(seeds)
    assert many.size == 8 and many.n == 3 and many.group == ["push"] * 3
    alone = [toy.make("push", split="eval") for _ in seeds]
    seen = [world.reset(seed) for world, seed in zip(alone, seeds)]
    for _ in range(40):
        assert np.array_equal(many.observe()["image"], [one["images"]["top"] for one in seen])
        live = ~many.success
        actions = np.zeros((3, many.action_dim))
        actions[live] = many.expert()
        expected = np.stack([world.expert() for world in alone])
        assert np.array_equal(actions[live], expected[live])
        actions[~live] = expected[~live]
        many.advance(actions)
        for world, action in zip(alone, actions):
            world.step(action)
        seen = [world.observe() for world in alone]
        assert many.success.tolist() == [world.success for world in alone]
    assert many.success.any()
    both = toy.many(["place", "push"], 20)
    both.reset(range(20))
    assert set(both.group) == {"place", "push"}


def test_a_file_of_thirty_lines_is_a_simulator():
    """The walking point keeps the promises too, and is found by its module's name."""
    assert simulator("fake_world") is fake_world and simulator("toy") is toy
    conforms(fake_world.make("walk"), fake_world.make("walk"), np.ones((3, 1)))
    assert solved(fake_world.make("walk"), range(5)) == 5


def test_what_is_no_simulator_is_refused():
    """An unknown module, one without tasks, a world without a method or without an expert."""
    with pytest.raises(ValueError, match="'nowhere' is not found"):
        simulator("nowhere")
    with pytest.raises(ValueError, match="json is no simulator; expected TASKS and make"):
        simulator("json")
    with pytest.raises(TypeError, match="render"):
        type("Half", (World,), {name: lambda self: None for name in ("reset", "step", "state")})()
    with pytest.raises(ValueError, match="no scripted expert"):
        World.expert(toy.make("push"))
    with pytest.raises(ValueError, match="task is 'fly'; expected one of place, push"):
        toy.make("fly")


def test_scenes_to_record_are_not_scenes_to_be_tried_on():
    """Of each stream the first k of more seeds are the same k; the streams share none."""
    assert episode_seeds(3, RECORDED, 5) == episode_seeds(3, RECORDED, 500)[:5]
    assert not set(episode_seeds(0, RECORDED, 500)) & set(episode_seeds(0, EVALUATED, 500))


# -- the simulators -------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is not None, reason="MetaWorld is installed")
def test_without_metaworld_one_line_says_what_to_install():
    """No traceback of an import, but the name of the extra."""
    with pytest.raises(ValueError, match=r"pip install 'motus\[sim\]'"):
        made("metaworld", "reach", {})


@pytest.fixture(scope="module")
def meta():
    pytest.importorskip("mujoco"), pytest.importorskip("metaworld")
    return metaworld.make


@pytest.mark.parametrize("task", ("drawer-open", "reach"))
def test_metaworld_keeps_the_promises_of_a_world(meta, task):
    """Exact seeds, in any order, the first picture included; the expert at a quarter of the rate
    solves it; the state is the hand's."""
    worlds = [meta(task, size=32, cameras="corner4") for _ in range(2)]
    conforms(*worlds, np.random.default_rng(0).uniform(-1, 1, (2, 4)))
    blind = meta(task, cameras="")
    assert (
        solved(blind, range(3)) == 3
        and blind.fps == 20
        and blind.reset(0)["images"] == {}
        and blind.state().shape == (4,)
    )


def test_only_the_instruction_tells_opening_from_closing(meta):
    """Both faucet tasks start, for one seed, with the same pixels and the same state, where the
    object now is and not where it was."""
    ways = [meta(f"faucet-{way}", size=64) for way in ("open", "close")]
    for seed in (1, 2):
        a, b = (world.reset(seed) for world in ways)
        assert all(
            np.array_equal(a["images"][k], b["images"][k]) for k in a["images"]
        ) and np.array_equal(a["state"], b["state"])
        assert np.allclose(
            ways[0].env.data.body("faucetBase").xpos, ways[0].env.model.body("faucetBase").pos
        )
    assert ways[0].instruction != ways[1].instruction


def test_labels_say_where_the_pixels_of_a_thing_are(meta):
    """The red button is red where the label says that the named object is, in the upright picture
    of the first camera; a policy's observation has no labels, and the two ways of one faucet have
    different goals."""
    world = meta("button-press-topdown", size=96, cameras="corner4")
    for seed in (1, 2, 3):
        picture, labels = world.reset(seed)["images"]["corner4"].astype(int), world.labels()
        x, y = (int(96 * labels[f"object {axis}"]) for axis in "xy")
        patch = picture[y - 7 : y + 1, x - 4 : x + 5].reshape(
            -1, 3
        )  # the label is at the button's foot
        assert ((patch[:, 0] > 100) & (patch[:, 1:].max(1) < 80)).any() and set(
            world.observe()
        ) == {"images", "state"}
        assert labels["opening"] == pytest.approx(world.state()[3]) and labels[
            "hand z m"
        ] == pytest.approx(world.state()[2])
    ways = [meta(f"faucet-{way}", cameras="corner4") for way in ("open", "close")]
    (here, there) = [(way.reset(1), way.labels())[1] for way in ways]
    assert (
        here["object x"] == pytest.approx(there["object x"], abs=0.03)
        and abs(here["goal x"] - there["goal x"]) > 0.1
    )
    blind = meta("reach", cameras="")
    assert blind.reset(0)["images"] == {} and set(blind.labels()) & {"object x", "goal x"} == set()


def test_a_world_that_goes_leaves_the_others_their_pictures(meta):
    """A renderer that is thrown away while another lives takes none of its textures along; nor do
    two tasks recorded in one process."""
    settings = (("size", 32), ("cameras", "corner4"))
    alone = attempt(Order("metaworld", "faucet-open", settings, 3)).frames["corner4"]
    world = meta("faucet-open", size=32, cameras="corner4")
    first = world.reset(3)["images"]["corner4"]
    meta("faucet-close", size=32, cameras="corner4").reset(4)
    assert np.array_equal(first, alone[0]) and np.array_equal(world.render()["corner4"], first)
    attempt(Order("metaworld", "faucet-close", settings, 3))
    assert all(
        map(
            np.array_equal,
            attempt(Order("metaworld", "faucet-open", settings, 3)).frames["corner4"],
            alone,
        )
    )


def test_metaworld_takes_no_other_settings(meta):
    """Sizes, rates and cameras that it has not got are refused by name."""
    for settings, message in (
        ({"size": 8}, "size is 8"),
        ({"hold": 3}, "hold is 3"),
        ({"cameras": "moon"}, "camera is 'moon'"),
    ):
        with pytest.raises(ValueError, match=message):
            meta("reach", **settings)


def test_two_arms_hand_the_cube_over_and_gym_aloha_agrees():
    """The planned expert succeeds; the same actions in gym-aloha's own environment move the arms
    alike and earn its highest reward."""
    pytest.importorskip("gym_aloha"), pytest.importorskip("mujoco")
    conforms(
        *(aloha.make(size=32, cameras="head") for _ in range(2)),
        np.tile(aloha.START[:7], (2, 2)) + 0.05,
    )
    assert solved(aloha.make(cameras=""), range(3)) == 3
    theirs, sim = pytest.importorskip("gym_aloha.env"), pytest.importorskip("gym_aloha.tasks.sim")
    world = aloha.make(cameras="", hold=1)
    world.reset(3)
    env = theirs.AlohaEnv("transfer_cube", "pixels_agent_pos")._env
    sim.BOX_POSE[0] = world.data.qpos[16:23].copy()
    env.physics.render = lambda **_: None
    env.reset()
    for k in range(world.max_steps):
        action = world.expert()
        world.step(action)
        found = env.step(action)
        assert (
            k > 100 or np.abs(found.observation["qpos"] - world.state()).max() < 1e-4
        )  # later, contacts magnify the last digits
        if world.success:
            break
    assert world.success and found.reward == 4


def test_two_arms_run_at_the_rate_of_the_other_robot_and_their_labels_lie_on_the_cube():
    """hold=2.5 is 20 Hz, the rate of MetaWorld: half an action per command, as long an episode, and
    the expert succeeds; the label of the cube is on its red pixels of a picture wider than high, in
    both corners of the table."""
    pytest.importorskip("gym_aloha"), pytest.importorskip("mujoco")
    world = aloha.make(cameras="", hold=2.5)
    assert (world.fps, world.max_steps, world.commands) == (20, 160, 5) and solved(
        world, range(2)
    ) == 2
    seconds = []
    for hold in (2.5, 5):
        world = aloha.make(cameras="", hold=hold)
        world.reset(0)
        begun = world.data.time
        world.step(world.expert())
        seconds.append(world.data.time - begun)
    assert seconds == pytest.approx([0.05, 0.1]) and "object x" not in world.labels()
    world = aloha.make(size=128, cameras="head")
    for seed in range(4):
        picture, labels = world.reset(seed)["images"]["head"].astype(int), world.labels()
        red = np.argwhere((picture[..., 0] > 150) & (picture[..., 1:].max(-1) < 100)).mean(0) + 0.5
        assert np.abs(red / (96, 128) - (labels["object y"], labels["object x"])).max() < 0.02
        assert labels["opening"] == pytest.approx(world.state()[13])
    with pytest.raises(ValueError, match="hold is 3"):
        aloha.make(hold=3)


@pytest.mark.slow
def test_libero_keeps_the_promises_of_a_world():
    """Where LIBERO is installed, an initial state is the same scene again."""
    pytest.importorskip("libero.libero")
    world = libero.make("libero_goal/0", size=64)
    conforms(world, world, np.random.default_rng(0).uniform(-1, 1, (2, 7)))
    assert world.instruction and world.state().shape == (8,)
