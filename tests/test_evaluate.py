"""The closed loop: honest intervals, worlds that depend on seeds alone, and a loop that asks only
where something is left to do."""

import json

import numpy as np
import pytest
import torch
from test_sample import write_checkpoint

from formats.lerobot import LeRobotDataset
from formats.recordings import t_layout
from scripts import evaluate, record
from scripts.evaluate import (
    RandomPolicy,
    rollout,
    save_films,
    summary,
    table,
    view,
    wilson,
    world_seeds,
)
from scripts.record import read_card, settings_of
from worlds import EVALUATED, RECORDED, episode_seeds
from worlds.fleet import Fleet, Order, attempt
from worlds.robots import SKILLS
from worlds.tabletop import Tabletop


class Scripted:
    """The expert of the world as a policy: chunks of the expert's present action, and a record of
    how often it was asked."""

    mode, generator = "scripted", torch.Generator()

    def __init__(self, world: Tabletop, chunk: int = 4, video: bool = False):
        self.world, self.chunk, self.video, self.asked = world, chunk, video, []

    def predict(self, images, states, instructions, video=True):
        self.asked.append(len(images))
        assert len(images) == len(states) == len(instructions) == (~self.world.success).sum()
        actions = self.world.expert()[~self.world.success]
        imagined = np.repeat(images[:, None], 3, axis=1) if self.video and video else None
        return np.repeat(actions[:, None], self.chunk, axis=1), imagined


def test_wilson_intervals_have_their_textbook_values():
    """5 of 10 is 0.237 to 0.763; none of 10 reaches 0.278 and starts at 0; all of 10 mirrors it; 50
    of 100 is narrower."""
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="no rate"):
        wilson(0, 0)


def test_a_summary_counts_over_all_and_per_skill():
    """Two of three places and none of one push; steps are of the solved worlds; a skill nobody was
    asked for has no rate."""
    found = summary(
        np.array([True, True, False, False]), np.array([0, 0, 0, 1]), np.array([10, 20, 100, 100])
    )
    assert [(found[name]["successes"], found[name]["episodes"]) for name in ("all", *SKILLS)] == [
        (2, 4),
        (2, 3),
        (0, 1),
    ]
    assert found["mean_steps"] == 15.0
    alone = summary(np.array([False]), np.array([1]), np.array([100]))
    assert "place" not in alone and alone["mean_steps"] is None


def test_the_expert_solves_the_worlds_and_solved_worlds_ask_no_more():
    """Replanned at every step the expert solves nearly all; each round asks only for what is
    unsolved, and the loop ends early."""
    world = Tabletop(12, split="eval")
    policy = Scripted(world)
    done = rollout(policy, world, world_seeds(0, 12), execute=1)
    assert (
        done.success.sum() >= 11
        and policy.asked == sorted(policy.asked, reverse=True)
        and policy.asked[-1] < 12
    )
    assert (done.steps[done.success] <= len(policy.asked)).all() and (
        done.steps[~done.success] == 100
    ).all()


def test_a_chunk_is_carried_out_as_far_as_asked():
    """11 steps with 3 actions of each chunk are four rounds; the whole chunk of 4 makes three;
    outside 1..4 is an error."""
    world = Tabletop(2, split="eval")
    for execute, rounds in ((3, 4), (None, 3)):
        policy = Scripted(world)
        rollout(policy, world, [1, 2], max_steps=11, execute=execute)
        assert len(policy.asked) == rounds
    for execute in (0, 5):
        with pytest.raises(ValueError, match=f"execute is {execute}, allowed 1 to 4"):
            rollout(Scripted(world), world, [1, 2], execute=execute)


def test_actions_that_are_not_finite_are_refused():
    """A policy that returns NaN is an error, not a robot at an undefined place."""
    policy = RandomPolicy(chunk=2, dim=3)
    policy.predict = lambda *_, **__: (np.full((1, 2, 3), np.nan), None)
    with pytest.raises(ValueError, match="0% of the actions are finite"):
        rollout(policy, Tabletop(1), [0])


def test_a_rollout_depends_on_its_seeds_alone():
    """The same seeds give the same successes and steps, noise on the actions included; the first
    worlds of more are the same worlds."""

    def run(noise_seed_count: int) -> tuple:
        world, policy = Tabletop(noise_seed_count, split="eval"), RandomPolicy(chunk=6, dim=3)
        policy.generator.manual_seed(1)
        done = rollout(policy, world, world_seeds(5, noise_seed_count), max_steps=18, noise=0.1)
        return done.success.tolist(), done.steps.tolist(), done.instruction, world.discs.tolist()

    assert run(3) == run(3)
    assert world_seeds(5, 3) == world_seeds(5, 9)[:3] != world_seeds(6, 3)
    assert run(3)[2] == run(5)[2][:3]


def test_films_show_each_look_and_what_was_imagined(tmp_path):
    """Two chunks of 4 with a picture every 2 steps: 3 pictures each, the real one beside the
    imagined; without imagination, alone."""
    for video, columns in ((True, 2), (False, 1)):
        world = Tabletop(1, split="eval")
        done = rollout(Scripted(world, video=video), world, [3], max_steps=8, rate=2)
        assert len(done.films) == 1 and len(done.films[0]) == 6
        assert all(
            real.shape == (48, 48, 3) and (imagined is not None) == video
            for real, imagined in done.films[0]
        )
        save_films(done, tmp_path, f"film{columns}")
        assert (tmp_path / f"film{columns}_0.gif").stat().st_size < 300_000
    assert rollout(Scripted(world), world, [3], max_steps=2).films == []


def test_the_table_shows_rates_with_their_intervals():
    """A row per policy, split and look; what was not measured is a dash."""
    row = summary(np.array([True, False]), np.array([0, 0]), np.array([30, 100]))
    text = table([{"policy": "joint", "split": "eval", "look": "clean", **row}])
    head, line = text.splitlines()
    assert (
        head.split()[:3] == ["policy", "split", "look"]
        and "50.0 [ 9.5,  90.5] 1/2" in line
        and line.split()[-2:] == ["-", "30.0"]
    )


def test_the_command_writes_one_table_and_its_json(tmp_path, capsys):
    """Both modes and a random policy, clean and randomised, two seeds pooled, films on request."""
    run = write_checkpoint(tmp_path / "run", "3")
    evaluate.main(
        [
            "--ckpt",
            str(run),
            "--modes",
            "joint,vla",
            "--random",
            "--episodes",
            "2",
            "--seed",
            "0",
            "1",
            "--steps",
            "1",
            "--max-steps",
            "13",
            "--gif",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [(r["policy"], r["look"]) for r in rows] == [
        (p, look) for p in ("joint", "vla", "random") for look in ("clean", "randomized")
    ]
    assert all(
        r["all"]["episodes"] == 4 and sum(r["successes_per_seed"].values()) == r["all"]["successes"]
        for r in rows
    )
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6 + 1
    assert len(list((tmp_path / "out").glob("*.gif"))) == 6


@pytest.mark.parametrize(
    "option, message",
    [
        (["--modes", "idm"], "--modes has 'idm'; allowed: joint, vla"),
        (["--splits", "eval,test"], "--splits has 'test'; allowed: train, eval, held_out"),
        (["--looks", "dark"], "--looks has 'dark'; allowed: clean, randomized"),
        (["--episodes", "0"], "--episodes 0"),
    ],
)
def test_options_outside_what_is_allowed_are_refused(option, message):
    """The error names the option, the value and what is allowed, before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--ckpt", "no/such/run", *option])


# -- simulators -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Four episodes of each task of the walking point, half of them disturbed; its second expert
    fails in every second scene."""
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    out = tmp_path_factory.mktemp("recorded") / "line"
    evaluate.main(
        [
            "record",
            "--sim",
            "fake_world",
            "--tasks",
            "walk,stumble",
            "--episodes",
            "4",
            "--noise",
            "0.3",
            "--after",
            "2",
            "--workers",
            "2",
            "--set",
            "size=16",
            "--out",
            str(out),
        ]
    )
    return out


def test_what_is_recorded_is_a_dataset_of_the_experts_successes(recorded):
    """It opens as LeRobot v3.0 without a fault; rows are what the expert saw and would have done;
    scenes that it failed are left out."""
    card, dataset = (
        read_card(recorded),
        LeRobotDataset.open(recorded, {"constant": True}, verify=True, quiet=True),
    )
    assert (dataset.version, dataset.fps, len(dataset.episodes)) == ("v3.0", 10, 8) and isinstance(
        dataset.info["fps"], int
    )
    due = episode_seeds(0, RECORDED, 40)
    good = [seed for seed in due if seed % 2]
    assert [e["seed"] for e in card["episodes"] if e["task"] == "walk"] == due[:4]
    assert [e["seed"] for e in card["episodes"] if e["task"] == "stumble"] == good[:4]
    assert (
        card["tasks"]["walk"]["tries"] == 4
        and card["tasks"]["stumble"]["tries"] == due.index(good[3]) + 1 > 4
    )
    for i, kept in enumerate(card["episodes"]):
        again = attempt(
            Order("fake_world", kept["task"], (("size", 16),), kept["seed"], 0.3, after=2)
        )
        rows = dataset.rows(i)
        assert np.array_equal(rows["observation.state"], again.states) and np.array_equal(
            rows["action"][:, 0], again.actions[:, 0]
        )
        assert (
            dataset.episodes[i].tasks == (again.instruction,)
            and kept["disturbed"] == again.disturbed
        )
        labels = dataset.labels(i)
        assert list(labels) == ["object x", "object y", "walked"] and np.array_equal(
            labels["walked"], again.states[:, 0]
        )
        for camera, pictures in again.frames.items():
            stored = np.stack(
                list(dataset.pictures(i, f"observation.images.{camera}", range(len(pictures))))
            )
            assert np.abs(stored.astype(int) - np.stack(pictures)).mean() < 4
    assert 0 < sum(e["disturbed"] for e in card["episodes"]) < 8


def test_the_last_of_each_task_are_recorded_last(tmp_path):
    """So that what a card holds out has all tasks: of twenty episodes of two tasks the last two are
    one of each."""
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    card = record.record(
        Order("fake_world", settings=(("size", 16),), after=1),
        ["walk", "stumble"],
        20,
        tmp_path / "set",
    )
    tasks = [e["task"] for e in card["episodes"]]
    assert tasks == ["walk"] * 19 + ["stumble"] * 19 + ["walk", "stumble"]
    for task in ("walk", "stumble"):
        assert [e["seed"] for e in card["episodes"] if e["task"] == task] == [
            seed for seed in episode_seeds(0, RECORDED, 80) if task == "walk" or seed % 2
        ][:20]


class Reader:
    """A policy that has only what a policy has: it finds the light in the picture and its own place
    in the state."""

    mode, generator = "reader", torch.Generator()

    def predict(self, images, states, instructions, video=True):
        goal = images[:, 0, :16, 0].argmax(axis=1)
        steps = np.clip((goal - states[:, 0])[:, None] - np.arange(5), -1, 1)
        return steps[..., None], np.repeat(images[:, None], 3, axis=1) if video else None


@pytest.mark.parametrize("workers", (1, 2))
def test_a_policy_that_reads_pictures_acts_in_a_simulator(recorded, tmp_path, workers):
    """Recorded, then acted in: in unseen scenes of the recorded settings it walks to the light in
    chunks, and is filmed on the way."""
    card, seeds = read_card(recorded), world_seeds(0, 3)
    with Fleet(card["sim"], "stumble", 3, view, card["settings"], workers) as fleet:
        done = rollout(Reader(), fleet, seeds, fleet.max_steps, execute=3, rate=2)
    goals = np.array([3 + (seed + len("stumble")) % 10 for seed in seeds])
    assert (
        done.success.all()
        and done.steps.tolist() == goals.tolist()
        and done.instruction == ["walk to the light in the dark"] * 3
    )
    assert done.films[0][0][0].shape == (16, 32, 3)  # both cameras, side by side
    save_films(done, tmp_path, "line")
    assert len(list(tmp_path.glob("line_*.gif"))) == 3


def test_the_command_acts_in_a_simulator(recorded, tmp_path, capsys):
    """Expert and random policy on the tasks of a recording: a rate per task and over all, pooled
    over seeds; the expert's is its own."""
    evaluate.main(
        [
            "--sim",
            "fake_world",
            "--like",
            str(recorded),
            "--expert",
            "--random",
            "--episodes",
            "5",
            "--batch",
            "3",
            "--seed",
            "0",
            "1",
            "--workers",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    random, expert = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    stumbles = [sum(seed % 2 == 0 for seed in world_seeds(s, 5)) for s in (0, 1)]
    assert (
        expert["policy"] == "expert"
        and expert["walk"]["successes"] == 10
        and expert["stumble"]["successes"] == 10 - sum(stumbles)
    )
    assert expert["all"]["episodes"] == 20 and expert["successes_per_seed"] == {
        str(s): 10 - k for s, k in enumerate(stumbles)
    }
    assert random["policy"] == "random" and random["all"]["rate"] < 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "random", "%", "expert", "%"]
    assert [line.split()[0] for line in lines[1:4]] == ["walk", "stumble", "all"]


def test_a_checkpoint_acts_in_the_toy_as_a_simulator(tmp_path):
    """Both modes through processes, filmed with what was imagined."""
    run = write_checkpoint(tmp_path / "run", "3")
    evaluate.main(
        [
            "--sim",
            "toy",
            "--tasks",
            "place",
            "--set",
            "split=eval",
            "--ckpt",
            str(run),
            "--modes",
            "joint,vla",
            "--episodes",
            "2",
            "--steps",
            "1",
            "--max-steps",
            "13",
            "--gif",
            "1",
            "--workers",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [(r["policy"], r["place"]["episodes"]) for r in rows] == [("joint", 2), ("vla", 2)]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.gif")) == [
        "joint_place_0.gif",
        "vla_place_0.gif",
    ]


def test_recorded_scenes_are_refused(recorded, tmp_path):
    """A recording whose scenes are those to be acted in would make the success rate mean nothing."""
    copy = tmp_path / "copy" / "meta"
    copy.mkdir(parents=True)
    card = read_card(recorded)
    card["episodes"][0]["seed"] = episode_seeds(4, EVALUATED, 1)[0]
    (copy / "sim.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="1 of the scenes, such as .* were recorded in"):
        evaluate.main(
            [
                "--sim",
                "fake_world",
                "--like",
                str(copy.parent),
                "--expert",
                "--seed",
                "4",
                "--episodes",
                "2",
            ]
        )


def test_an_expert_that_hardly_succeeds_ends_the_recording(tmp_path, monkeypatch):
    """Rather than try for ever; and nothing is left behind."""
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    monkeypatch.setattr(
        evaluate,
        "attempts",
        lambda orders, workers: (
            evaluate.Recording(order.task, order.seed, False, False, 0.0, "point", 10)
            for order in orders
        ),
    )
    with pytest.raises(ValueError, match="the expert solved 0 of 14; lower the disturbance"):
        record.record(Order("fake_world"), ["walk"], 1, tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_the_picture_of_a_policy_is_made_of_cameras():
    """Side by side in the order asked for, or the official T, fitted to a size; what is not there
    is an error that says what is."""
    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 255, (24, 32, 3), np.uint8) for name in ("head", "left", "right")
    }
    assert np.array_equal(
        view(images, ("right", "head")), np.concatenate([images["right"], images["head"]], axis=1)
    )
    assert np.array_equal(view(images, t_layout=True), t_layout(*images.values()))
    assert view(images, ("head",), size=(12, 12)).shape == (12, 12, 3) and view({}).shape == (
        1,
        1,
        3,
    )
    with pytest.raises(
        ValueError, match="camera 'top' is due; the simulator shows head, left, right"
    ):
        view(images, ("top",))
    with pytest.raises(ValueError, match="found 2 cameras"):
        view(images, ("head", "left"), t_layout=True)


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["record", "--sim", "fake_world", "--tasks", "fly", "--out", "x"],
            "--tasks has 'fly'; allowed: walk, stumble",
        ),
        (
            [
                "record",
                "--sim",
                "fake_world",
                "--tasks",
                "walk",
                "--out",
                "x",
                "--set",
                "colour=red",
            ],
            "found 'colour=red'; keys of .* size",
        ),
        (
            ["record", "--sim", "fake_world", "--tasks", "walk", "--out", "x", "--episodes", "0"],
            "--episodes 0",
        ),
        (["--sim", "fake_world", "--expert"], "--tasks has ''; allowed: walk"),
        (["--sim", "fake_world", "--expert", "--like", "no/such/set"], "has no meta/sim.json"),
        (["--sim", "fake_world", "--tasks", "walk", "--batch", "0"], "--batch 0"),
        (
            ["--sim", "fake_world", "--tasks", "walk"],
            "nobody acts; give --ckpt, --expert or --random",
        ),
    ],
)
def test_wrong_options_of_a_simulator_are_refused(argv, message):
    """The error names the option, the value and what is allowed, before anything is started."""
    with pytest.raises(ValueError, match=message):
        evaluate.main(argv)


def test_settings_are_read_as_json_or_text():
    """Numbers are numbers, the rest is text."""
    assert settings_of("toy", ["split=eval", "randomized=true"]) == {
        "split": "eval",
        "randomized": True,
    }
    assert settings_of("fake_world", ["size=24"]) == {"size": 24}
