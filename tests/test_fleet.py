"""Many worlds in processes equal single worlds, and the expert's own actions are stored."""

from dataclasses import replace

import fake_world
import numpy as np
import pytest

from worlds import fleet
from worlds.fleet import Fleet, Order, attempt, attempts


def front(images: dict) -> np.ndarray:
    return images["front"]


@pytest.mark.parametrize("workers", (1, 2))
def test_a_fleet_is_as_many_single_worlds(workers):
    """Three worlds in one process or two see, bit for bit, what three worlds by themselves do; a
    solved one stays as it is."""
    alone = [fake_world.make("walk", size=12) for _ in range(3)]
    seeds = [5, 60, 7]
    with Fleet("fake_world", "walk", 4, front, {"size": 12}, workers) as ships:
        ships.reset(seeds)
        for world, seed in zip(alone, seeds):
            world.reset(seed)
        for _ in range(9):
            seen = ships.observe()
            live = ~ships.success
            assert np.array_equal(seen["state"][live], np.stack([w.state() for w in alone])[live])
            assert np.array_equal(seen["image"], np.stack([w.render()["front"] for w in alone]))
            assert seen["instruction"] == ["walk to the light"] * 3
            actions = np.zeros((3, 1))
            actions[live] = ships.expert()
            assert np.array_equal(actions[live], np.stack([w.expert() for w in alone])[live])
            ships.advance(actions)
            for world, action, on in zip(alone, actions, live):
                if on:
                    world.step(action)
            assert ships.success.tolist() == [w.success for w in alone]
            if ships.success.all():
                break
        assert ships.success.all()
        assert (ships.fps, ships.max_steps, ships.action_dim) == (10, 30, 1)
        with pytest.raises(ValueError, match="5 seeds for 4 worlds"):
            ships.reset(range(5))


def test_what_fails_in_a_process_is_told():
    """An error there is a ValueError here that says what it was; so is a process that is gone."""
    with pytest.raises(ValueError, match="KeyError: 'swim'"):
        Fleet("fake_world", "swim", 2, front)
    with Fleet("fake_world", "walk", 1, front) as ships:
        ships.processes[0].kill()
        ships.processes[0].join()
        with pytest.raises(ValueError, match="ended without a word"):
            ships.reset([1])


def test_the_stored_action_is_the_experts_whatever_is_done():
    """With noise and shoves the executed actions move the point elsewhere; each row holds what the
    expert would do where it then is."""
    plain = attempt(order := Order("fake_world", "walk", seed=8, after=2))
    noisy = attempt(replace(order, noise=0.5, recovery=1.0, disturbed=1.0))
    assert plain.success and not plain.disturbed and noisy.disturbed
    assert len(plain.frames["front"]) == len(plain.actions) == len(plain.states)
    goal = 3 + (8 + len("walk")) % 10
    for recording in (plain, noisy):
        assert np.allclose(recording.actions[:, 0], np.clip(goal - recording.states[:, 0], -1, 1))
    assert np.allclose(np.diff(plain.states[:, 0]), plain.actions[:-1, 0])
    assert not np.allclose(np.diff(noisy.states[:, 0]), noisy.actions[:-1, 0])
    assert (
        np.abs(plain.states[:, 0] - goal) < 0.5
    ).sum() == 1  # success shows in one row, then `after` is over
    assert (
        attempt(replace(order, noise=0.5, disturbed=0.0)).actions.tolist() == plain.actions.tolist()
    )


def test_attempts_come_in_order_and_a_failure_holds_no_pictures():
    """The stumbling expert stands still in every second scene; what two processes make equals what
    one makes."""
    orders = [Order("fake_world", "stumble", seed=seed, noise=0.3) for seed in range(5)]
    found = list(attempts(orders, 2))
    assert [r.seed for r in found] == list(range(5)) and [r.success for r in found] == [
        seed % 2 == 1 for seed in range(5)
    ]
    assert found[0].frames == {} and found[0].actions is None
    assert all(
        np.array_equal(r.actions, attempt(order).actions)
        for r, order in zip(found, orders)
        if r.success
    )
    assert fleet.opened.cache_info().currsize == 1
