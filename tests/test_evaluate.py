"""The closed loop: honest intervals, worlds that depend on seeds alone, and a loop that asks only
where something is left to do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_record import recording  # noqa: F401   a fixture
from test_sample import write_checkpoint

from formats.recordings import t_layout
from sample import SHIPPED
from scripts import evaluate
from scripts.evaluate import (
    RandomPolicy,
    read_card,
    rollout,
    save_films,
    settings_of,
    summary,
    view,
    wilson,
)
from scripts.readme import evaluation_result
from worlds import EVALUATED, episode_seeds
from worlds.fleet import Fleet
from worlds.toy import Tabletops, many

SKILLS = ["place", "push"]


def world_seeds(seed: int, episodes: int) -> list[int]:
    return episode_seeds(seed, EVALUATED, episodes)


def tables(n: int) -> Tabletops:
    """Tabletops of both skills, at layouts that nobody trains on."""
    return many(SKILLS, n)


class Scripted:
    """The expert of the world as a policy: chunks of the expert's present action, and a record of
    how often it was asked."""

    mode, generator = "scripted", torch.Generator()

    def __init__(self, world: Tabletops, chunk: int = 4, video: bool = False):
        self.world, self.chunk, self.video, self.asked = world, chunk, video, []

    def predict(self, images, states, instructions, video=True):
        self.asked.append(len(images))
        assert len(images) == len(states) == len(instructions) == (~self.world.success).sum()
        actions = self.world.expert()
        imagined = np.repeat(images[:, None], 3, axis=1) if self.video and video else None
        return np.repeat(actions[:, None], self.chunk, axis=1), imagined


def test_wilson_intervals_have_their_textbook_values():
    """5 of 10 is 0.237 to 0.763; none of 10 reaches 0.278 and starts at 0; all of 10 mirrors it; 50
    of 100 is narrower."""
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_a_summary_counts_over_all_and_per_skill():
    """Two of three places and none of one push; steps are of the solved worlds; a skill nobody was
    asked for has no rate."""
    success, skill = np.array([True, True, False, False]), np.array(["place"] * 3 + ["push"])
    found = summary(success, skill, np.array([10, 20, 100, 100]), SKILLS)
    assert [(found[name]["successes"], found[name]["episodes"]) for name in ("all", *SKILLS)] == [
        (2, 4),
        (2, 3),
        (0, 1),
    ]
    assert found["mean_steps"] == 15.0
    alone = summary(np.array([False]), np.array(["push"]), np.array([100]), SKILLS)
    assert "place" not in alone and alone["mean_steps"] is None


def test_the_expert_solves_the_worlds_and_solved_worlds_ask_no_more():
    """Replanned at every step the expert solves nearly all; each round asks only for what is
    unsolved, and the loop ends early."""
    world = tables(12)
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
    world = tables(2)
    for execute, rounds in ((3, 4), (None, 3)):
        policy = Scripted(world)
        rollout(policy, world, [1, 2], max_steps=11, execute=execute)
        assert len(policy.asked) == rounds
    for execute in (0, 5):
        with pytest.raises(ValueError, match=f"execute is {execute}, expected 1 to 4"):
            rollout(Scripted(world), world, [1, 2], execute=execute)


def test_actions_that_are_not_finite_are_refused():
    """A policy that returns NaN is an error, not a robot at an undefined place."""
    policy = RandomPolicy(chunk=2, dim=3)
    policy.predict = lambda *_, **__: (np.full((1, 2, 3), np.nan), None)
    with pytest.raises(ValueError, match="0% of the actions are finite"):
        rollout(policy, tables(1), [0])


def test_a_rollout_depends_on_its_seeds_alone():
    """The same seeds give the same successes and steps; the first worlds of more are the same
    worlds."""

    def run(count: int) -> tuple:
        world, policy = tables(count), RandomPolicy(chunk=6, dim=3)
        policy.generator.manual_seed(1)
        done = rollout(policy, world, world_seeds(5, count), max_steps=18)
        return done.success.tolist(), done.steps.tolist(), done.instruction, world.discs.tolist()

    assert run(3) == run(3)
    assert world_seeds(5, 3) == world_seeds(5, 9)[:3] != world_seeds(6, 3)
    assert run(3)[2] == run(5)[2][:3]


def test_films_show_each_look_and_what_was_imagined(tmp_path):
    """Two chunks of 4 with a picture every 2 steps: 3 pictures each, the real one beside the
    imagined; without imagination, alone."""
    for video, columns in ((True, 2), (False, 1)):
        world = tables(1)
        done = rollout(Scripted(world, video=video), world, [3], max_steps=8, rate=2)
        assert len(done.films) == 1 and len(done.films[0]) == 6
        assert all(
            [picture.shape for picture in pictures] == columns * [(48, 48, 3)]
            for pictures in done.films[0]
        )
        save_films(done, tmp_path, f"film{columns}")
        assert (tmp_path / f"film{columns}_0.gif").stat().st_size < 300_000
    assert rollout(Scripted(world), world, [3], max_steps=2).films == []


def test_the_table_shows_rates_with_their_intervals():
    """A column over all worlds and one for each task, with the settings that were varied; what was
    not measured has none."""
    success, skill = np.array([True, False]), np.array(["place", "place"])
    row = {"policy": "joint", "settings": {"split": "eval"}, "successes_per_seed": {0: 1}}
    row |= summary(success, skill, np.array([30, 100]), SKILLS)
    assert row["mean_steps"] == 30
    head, _, joint = evaluation_result({"rows": [row], "tasks": SKILLS}).splitlines()[-3:]
    assert head == "| policy | split | all % | place % | successes per seed |"
    rate = "50.0 [ 9.5,  90.5] 1/2"
    assert joint == f"| `joint` | eval | {rate} | {rate} | 1 |"


def test_the_command_writes_one_table_and_its_json(tmp_path, capsys):
    """The preset says where to act. Both modes and a random policy, two looks, two seeds pooled,
    films on request; at one Euler step both modes are one, and the table says so."""
    run = write_checkpoint(tmp_path / "run", "3")
    argv = ["--ckpt", str(run), "--modes", "joint,vla", "--random", "--episodes", "2"]
    argv += ["--seed", "0", "1", "--steps", "1", "--max-steps", "13", "--gif", "1"]
    evaluate.main([*argv, "--set", "randomized=false,true", "--out", str(tmp_path / "out")])
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = stored["rows"]
    assert stored["sim"] == "toy" and stored["tasks"] == SKILLS
    assert [(r["policy"], r["settings"]) for r in rows] == [
        (p, {"randomized": look}) for p in ("joint", "vla", "random") for look in (False, True)
    ]
    assert all(
        r["all"]["episodes"] == 4 and sum(r["successes_per_seed"].values()) == r["all"]["successes"]
        for r in rows
    )
    assert [r["all"] for r in rows[:2]] == [r["all"] for r in rows[2:4]]
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("| `")]
    assert len(table) == len(rows) and "joint and vla are the same" in lines[-2]
    names = {path.name for path in (tmp_path / "out").glob("*.gif")}
    assert len(names) == 6 and "joint_False_0.gif" in names


@pytest.mark.parametrize(
    "option, message",
    [
        (["--modes", "idm"], "--modes is 'idm'; expected one of joint, vla"),
        (["--episodes", "0"], "--episodes is 0; expected a whole number in"),
        (["--max-steps", "0"], "--max-steps is 0; expected a whole number in"),
        (["--seed", "-1"], "--seed is -1; expected a whole number in"),
    ],
)
def test_options_outside_what_is_allowed_are_refused(option, message):
    """The error names the option, the value and what is expected, before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--ckpt", "no/such/run", *option])


# -- simulators -----------------------------------------------------------------------------------


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
    """Expert and random policy in the simulator and on the tasks of a recording: a rate per task
    and over all, pooled over seeds; the expert's is its own."""
    argv = ["--like", str(recorded), "--expert", "--random", "--episodes", "5", "--batch", "3"]
    evaluate.main([*argv, "--seed", "0", "1", "--workers", "2", "--out", str(tmp_path)])
    random, expert = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    stumbles = [sum(seed % 2 == 0 for seed in world_seeds(s, 5)) for s in (0, 1)]
    assert expert["policy"] == "expert" and expert["walk"]["successes"] == 10
    assert expert["stumble"]["successes"] == 10 - sum(stumbles)
    assert expert["all"]["episodes"] == 20
    assert expert["successes_per_seed"] == {str(s): 10 - k for s, k in enumerate(stumbles)}
    assert random["policy"] == "random" and random["all"]["rate"] < 0.5
    lines = capsys.readouterr().out.splitlines()
    assert f"--like {recorded}" in lines[1] and "--tasks walk,stumble" in lines[1]
    assert "| policy | all % | walk % | stumble % | successes per seed |" in lines
    assert [line.split()[1] for line in lines if line.startswith("| `")] == ["`random`", "`expert`"]


def test_settings_are_varied_and_films_carry_their_names(tmp_path):
    """Rows of every combination; of each a film per task, without a checkpoint too."""
    argv = ["--sim", "fake_world", "--tasks", "walk", "--expert", "--episodes", "2", "--gif", "1"]
    evaluate.main(
        [*argv, "--set", "size=12,16", "hops=1", "--workers", "1", "--out", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == [{"size": n, "hops": 1} for n in (12, 16)]
    found = sorted(path.name for path in tmp_path.glob("*.gif"))
    assert found == [f"expert_{n}_1_walk_0.gif" for n in (12, 16)]


def test_a_checkpoint_acts_in_some_of_the_tasks(tmp_path):
    """Of the tasks that are asked for each seed draws one, and the robot is the checkpoint's."""
    run = write_checkpoint(tmp_path / "run", "3")
    argv = ["--ckpt", str(run), "--sim", "toy", "--tasks", "place", "--episodes", "2"]
    evaluate.main([*argv, "--steps", "1", "--max-steps", "5", "--out", str(tmp_path / "out")])
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (row,) = stored["rows"]
    assert row["place"] == row["all"] and "push" not in row and row["settings"] == {}
    assert stored["settings"] == {"embodiment": "gripper"}


def test_recorded_scenes_are_refused(recorded, tmp_path):
    """A success rate in the very scenes that were recorded would mean nothing."""
    copy = tmp_path / "copy" / "meta"
    copy.mkdir(parents=True)
    card = read_card(recorded)
    card["episodes"][0]["seed"] = episode_seeds(4, EVALUATED, 1)[0]
    (copy / "sim.json").write_text(json.dumps(card))
    argv = ["--like", str(copy.parent), "--expert", "--seed", "4", "--episodes", "2"]
    with pytest.raises(ValueError, match="1 of the scenes, such as .* were recorded in"):
        evaluate.main(argv)


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
        ValueError,
        match="camera \\(choose with --set\\) is 'top'; expected one of head, left, right",
    ):
        view(images, ("top",))
    with pytest.raises(ValueError, match="found 2 cameras"):
        view(images, ("head", "left"), t_layout=True)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sim", "fake_world", "--expert", "--tasks", "fly"], "--tasks is 'fly'; expected one"),
        (["--expert", "--like", "no/such/set"], "has no meta/sim.json"),
        (["--sim", "fake_world", "--tasks", "walk", "--batch", "0"], "--batch is 0"),
        (["--sim", "fake_world"], "nobody acts; give --ckpt, --expert or --random"),
        (["--expert"], "--sim is None; expected a simulator, or --like"),
        (["--sim", "toy", "--expert", "--set", "split=test"], "split is 'test'"),
        (["--sim", "toy", "--expert", "--set", "look=dark"], "--set has 'look=dark'; .* split, r"),
    ],
)
def test_wrong_options_of_a_simulator_are_refused(argv, message):
    """The error names the option, the value and what is allowed, before anything is started."""
    with pytest.raises(ValueError, match=message):
        evaluate.main(argv)


def test_without_a_checkpoint_the_shipped_policy_acts(tmp_path, monkeypatch, capsys):
    """In the world of its preset; what is written goes to runs/. Films have the ring of the goal,
    in every world its own."""
    monkeypatch.chdir(tmp_path)
    rings = []
    monkeypatch.setattr(evaluate, "film", lambda *arguments: rings.append(arguments[-1].tolist()))
    argv = "--episodes 2 --steps 1 --max-steps 12 --gif 2".split()
    evaluate.main(argv)
    stored = json.loads((tmp_path / "runs" / "evaluation" / "evaluation.json").read_text())
    assert stored["sim"] == "toy" and Path(stored["ckpt"]) == SHIPPED
    assert [row["policy"] for row in stored["rows"]] == ["joint"]
    assert len(rings) == 2 and rings[0] != rings[1]


def test_settings_are_read_as_json_or_text():
    """Numbers are numbers, the rest is text; several values make several rows; a quoted text may
    hold commas."""
    assert settings_of("toy", ["split=eval,held_out", "randomized=true,false"]) == {
        "split": ["eval", "held_out"],
        "randomized": [True, False],
    }
    assert settings_of("fake_world", ["size=24", "hops="]) == {"size": [24], "hops": [""]}
    assert settings_of("fake_world", ['size="a,b"']) == {"size": ["a,b"]}
