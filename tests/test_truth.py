"""The truth of the modes: a detector that reads true pictures, a simulator that answers what other
actions would have done, figures that a perfect film passes and a wrong one does not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts import truth
from scripts.detector import Detector, examples
from scripts.truth import MOVED, execute, interval, observed, r2
from worlds.render import distance
from worlds.robots import IMAGE

POLICY = SimpleNamespace(rate=3, model=SimpleNamespace(config=SimpleNamespace(chunk=12)))


@pytest.fixture(scope="module")
def seen() -> truth.Truth:
    """Worlds with what is true of them, without a policy."""
    made = truth.Truth.__new__(truth.Truth)
    made.world = observed(64, 1)
    made.own = execute(made.world, POLICY)
    made.copy = made.own.frames
    made.region = truth.moving_region(made.own.frames[:, :1], made.own.frames[:, 1:])
    made.detector = Detector.shipped()
    return made


def test_the_detector_reads_true_pictures_to_half_a_pixel(seen):
    """Gripper, opening and discs of layouts it was not trained on; a colour that no disc has is
    not there."""
    film = seen.own.frames
    _, away = seen.gripper(film, seen.own)
    places, there = seen.discs(film)
    assert np.median(away) < 0.5
    assert np.median(IMAGE * distance(places, seen.own.shot.discs)) < 0.5 and there.mean() > 0.97
    found = seen.detector.see(film[:, -1])
    assert np.median(np.abs(found.opening - seen.own.shot.opening)) < 0.1
    absent = [set(range(4)) - set(colours) for colours in seen.world.colours.tolist()]
    absent = np.array([colours.pop() for colours in absent])
    assert found.there[np.arange(len(film)), 1 + absent].mean() < 0.05


def test_examples_say_what_the_simulator_knows():
    """Places in 0 to 1, in the order gripper, red, green, blue, yellow; three colours of four."""
    frames, places, there, opening = examples(2)
    assert len(frames) == len(places) == len(there) == len(opening)
    assert there[:, 0].all() and (there[:, 1:].sum(axis=1) == 3).all()
    inside = places[there]
    assert inside.min() >= 0 and inside.max() <= 1 and not places[~there].any()


def test_worlds_begin_in_the_middle_of_what_the_expert_does():
    """Some have not begun, some hold a disc, and the same seed gives the same worlds."""
    world, again = observed(64, 3), observed(64, 3)
    assert np.array_equal(world.render(), again.render())
    assert 0.05 < world.held.any(axis=1).mean() < 0.8
    assert not np.array_equal(world.render(), observed(64, 4).render())


def test_the_simulator_carries_out_any_actions_from_the_same_state(seen):
    """The expert's own actions give the expert's film again; those of another episode another one,
    and neither touches the worlds."""
    before = seen.world.render()
    again = execute(seen.world, POLICY, seen.own.actions)
    assert torch.equal(again.frames, seen.own.frames)
    other = execute(seen.world, POLICY, np.roll(seen.own.actions, 1, axis=0))
    assert torch.equal(other.frames[:, 0], seen.own.frames[:, 0])
    gap = IMAGE * distance(other.shot.effector, seen.own.shot.effector)
    assert np.median(gap) > 3 and np.array_equal(seen.world.render(), before)


def test_a_true_film_is_true_and_the_film_of_another_window_is_not(seen):
    right, wrong = {}, {}
    for film, found in ((seen.own.frames, right), (seen.own.frames.roll(1, 0), wrong)):
        for name, *figure in (*seen.places(film), next(seen.looks(film))):
            found[name] = interval(*figure)[0]
    assert right["gripper, px"] < 0.5 and right["moved disc, px"] < 0.6
    assert right["sharpness"] == 1 and right["moved disc there"] > 0.97
    assert wrong["gripper, px"] > 5 and wrong["moved disc, px"] > 5


def test_a_film_obeys_only_if_the_named_disc_moves_towards_its_goal(seen):
    """True films do, a film in which nothing moves does not; asked are windows in which the expert
    moves the disc."""
    still = seen.own.frames[:, :1].expand_as(seen.own.frames)
    moved = distance(seen.own.shot.discs, seen.world.discs)[seen.world.named] > MOVED
    asked = seen.obeys(seen.own.frames)
    assert 10 < len(asked) <= moved.sum()
    assert asked.mean() > 0.9 and seen.obeys(still).mean() < 0.1


def test_intervals_hold_their_figure_and_shrink_with_more_rows():
    rng = np.random.default_rng(0)
    few, many = (interval(np.mean, rng.standard_normal(n)) for n in (30, 3000))
    for value, low, high in (few, many):
        assert low < value < high
    assert many[2] - many[1] < 0.3 * (few[2] - few[1])
    x = rng.standard_normal((50, 12))
    assert r2(x, x) == 1 and abs(r2(np.full_like(x, x.mean(axis=0)), x)) < 1e-9


@pytest.mark.slow
def test_the_command_measures_the_shipped_policy(tmp_path, capsys):
    """One table with a column per number of steps; the json file holds the same figures."""
    truth.main(
        ["--windows", "16", "--steps", "1", "2", "--out", str(tmp_path / "t" / "truth.json")]
    )
    table = capsys.readouterr().out
    figures = json.loads((tmp_path / "t" / "truth.json").read_text())["figures"]
    assert "| 1 steps | 2 steps |" in table
    for kind in ("expert", "random"):
        for name in ("world_model: gripper, px", "idm: opening, R2", "VAE: SSIM"):
            assert f"{kind}, {name}" in table and len(figures[f"{kind}, {name}"]) == 2
    assert "expert, vgm: obeys" in figures and "random, vgm: obeys" not in figures
    for values in figures.values():
        assert all(len(value) == 3 for value in values)
