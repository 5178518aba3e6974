"""The closed loop: honest intervals, worlds that depend on seeds alone, and a loop that asks only where something is left to do."""

import json

import numpy as np
import pytest
import torch
from test_sample import write_checkpoint

import evaluate
from evaluate import RandomPolicy, rollout, save_films, summary, table, wilson, world_seeds
from worlds.tabletop import SKILLS, Tabletop


class Scripted:
    """The expert of the world as a policy: chunks of the expert's present action, and a record of how often it was asked."""

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
    """5 of 10 is 0.237 to 0.763; none of 10 reaches 0.278 and starts at 0; all of 10 mirrors it; 50 of 100 is narrower."""
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="no rate"):
        wilson(0, 0)


def test_a_summary_counts_over_all_and_per_skill():
    """Two of three places and none of one push; steps are of the solved worlds; a skill nobody was asked for has no rate."""
    found = summary(np.array([True, True, False, False]), np.array([0, 0, 0, 1]), np.array([10, 20, 100, 100]))
    assert [(found[name]["successes"], found[name]["episodes"]) for name in ("all", *SKILLS)] == [(2, 4), (2, 3), (0, 1)]
    assert found["mean_steps"] == 15.0
    alone = summary(np.array([False]), np.array([1]), np.array([100]))
    assert "place" not in alone and alone["mean_steps"] is None


def test_the_expert_solves_the_worlds_and_solved_worlds_ask_no_more():
    """Replanned at every step the expert solves nearly all; each round asks only for what is unsolved, and the loop ends early."""
    world = Tabletop(12, split="eval")
    policy = Scripted(world)
    done = rollout(policy, world, world_seeds(0, 12), execute=1)
    assert done.success.sum() >= 11 and policy.asked == sorted(policy.asked, reverse=True) and policy.asked[-1] < 12
    assert (done.steps[done.success] <= len(policy.asked)).all() and (done.steps[~done.success] == 100).all()


def test_a_chunk_is_carried_out_as_far_as_asked():
    """11 steps with 3 actions of each chunk are four rounds; the whole chunk of 4 makes three; outside 1..4 is an error."""
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
    """The same seeds give the same successes and steps, noise on the actions included; the first worlds of more are the same worlds."""
    def run(noise_seed_count: int) -> tuple:
        world, policy = Tabletop(noise_seed_count, split="eval"), RandomPolicy(chunk=6, dim=3)
        policy.generator.manual_seed(1)
        done = rollout(policy, world, world_seeds(5, noise_seed_count), max_steps=18, noise=0.1)
        return done.success.tolist(), done.steps.tolist(), done.instruction, world.discs.tolist()
    assert run(3) == run(3)
    assert world_seeds(5, 3) == world_seeds(5, 9)[:3] != world_seeds(6, 3)
    assert run(3)[2] == run(5)[2][:3]


def test_films_show_each_look_and_what_was_imagined(tmp_path):
    """Two chunks of 4 with a picture every 2 steps: 3 pictures each, the real one beside the imagined; without imagination, alone."""
    for video, columns in ((True, 2), (False, 1)):
        world = Tabletop(1, split="eval")
        done = rollout(Scripted(world, video=video), world, [3], max_steps=8, rate=2)
        assert len(done.films) == 1 and len(done.films[0]) == 6
        assert all(real.shape == (48, 48, 3) and (imagined is not None) == video for real, imagined in done.films[0])
        save_films(done, tmp_path, f"film{columns}")
        assert (tmp_path / f"film{columns}_0.gif").stat().st_size < 300_000
    assert rollout(Scripted(world), world, [3], max_steps=2).films == []


def test_the_table_shows_rates_with_their_intervals():
    """A row per policy, split and look; what was not measured is a dash."""
    row = summary(np.array([True, False]), np.array([0, 0]), np.array([30, 100]))
    text = table([{"policy": "joint", "split": "eval", "look": "clean", **row}])
    head, line = text.splitlines()
    assert head.split()[:3] == ["policy", "split", "look"] and "50.0 [ 9.5,  90.5] 1/2" in line and line.split()[-2:] == ["-", "30.0"]


def test_the_command_writes_one_table_and_its_json(tmp_path, capsys):
    """Both modes and a random policy, clean and randomised, two seeds pooled, films on request."""
    run = write_checkpoint(tmp_path / "run", "3")
    evaluate.main(["--ckpt", str(run), "--modes", "joint,vla", "--random", "--episodes", "2", "--seed", "0", "1", "--steps", "1",
                   "--max-steps", "13", "--gif", "1", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [(r["policy"], r["look"]) for r in rows] == [(p, look) for p in ("joint", "vla", "random") for look in ("clean", "randomized")]
    assert all(r["all"]["episodes"] == 4 and sum(r["successes_per_seed"].values()) == r["all"]["successes"] for r in rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6 + 1
    assert len(list((tmp_path / "out").glob("*.gif"))) == 6


@pytest.mark.parametrize("option, message", [
    (["--modes", "idm"], "--modes has 'idm'; allowed: joint, vla"),
    (["--splits", "eval,test"], "--splits has 'test'; allowed: train, eval, held_out"),
    (["--looks", "dark"], "--looks has 'dark'; allowed: clean, randomized"),
    (["--episodes", "0"], "--episodes 0"),
])
def test_options_outside_what_is_allowed_are_refused(option, message):
    """The error names the option, the value and what is allowed, before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        evaluate.main(["--ckpt", "no/such/run", *option])
