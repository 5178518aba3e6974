"""Normalisation: sums of blocks, quantiles, and what a checkpoint remembers of a robot."""

import numpy as np
import pytest
import torch

from formats import statistics
from formats.statistics import Normaliser, Statistics, as_stored, measured


def of(*blocks: np.ndarray, kind: str = "mean_std") -> Normaliser:
    """What is known of rows that were read in these blocks."""
    total, tensors = sum(map(len, blocks)), {}
    for number, rows in enumerate(blocks):
        tensors |= measured(rows, f"robot/actions/{number:06d}", total, number)
    return Normaliser.of(tensors, "robot/actions/", kind)


def test_blocks_add_up_to_the_whole():
    """Mean, std and range equal numpy's over all rows at once."""
    rows = np.random.default_rng(0).normal(3, 2, (1000, 4)) * [1, 10, 100, 1e-3]
    whole = of(*np.split(rows, [1, 20, 700]))
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.std, rows.std(0), rtol=1e-12)
    assert whole.min == tuple(rows.min(0)) and whole.max == tuple(rows.max(0))


def test_quantiles_are_exact_for_few_rows_and_near_for_many(monkeypatch):
    """Up to MOST rows numpy's own; beyond, of a sample whose rank is off by less than half a
    percent."""
    rows = np.random.default_rng(0).normal(size=(3000, 2))
    np.testing.assert_allclose(of(rows).q01, np.quantile(rows, 0.01, axis=0))
    monkeypatch.setattr(statistics, "MOST", 1500)
    found = of(*np.split(rows, 3))
    assert not np.allclose(found.q01, np.quantile(rows, 0.01, axis=0), rtol=1e-9)
    assert abs((rows < found.q01).mean() - 0.01) < 0.005
    assert abs((rows > found.q99).mean() - 0.01) < 0.005


def test_a_dimension_that_never_moves_keeps_its_scale():
    """No division by zero."""
    assert of(np.array([[1.0, 2.0], [1.0, 4.0]])).std == (1.0, 1.0)
    assert Normaliser.of({}, "robot/actions/") is None


@pytest.mark.parametrize(
    "kind, low, high",
    [("min_max", 0, 1), ("quantile", -1.2, 1.2), ("none", -40, 40), ("mean_std", -4, 4)],
)
def test_every_normalisation_inverts(kind, low, high):
    """Official min-max gives [0, 1], quantiles [-1, 1] but for the outermost; a still dimension
    stays finite."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform(-40, 40, (500, 2)), np.full((500, 1), 7.0)], axis=1)
    known = of(rows, kind=kind)
    seen = known.apply(torch.from_numpy(rows))
    assert seen[:, :2].min() >= low and seen[:, :2].max() <= high and seen.isfinite().all()
    torch.testing.assert_close(known.invert(seen), torch.from_numpy(rows))
    assert kind != "min_max" or (seen[:, :2].min(), seen[:, :2].max()) == (0, 1)


def test_normalised_rows_have_unit_scale_and_survive_json():
    """A checkpoint always knows its robot's units."""
    rows = np.random.default_rng(0).normal(2, 5, (400, 3))
    robot = Statistics("arm", 3, of(rows), action_hz=15.0, cameras=("top",), size=(48, 48))
    assert Statistics.from_json(robot.as_json()) == robot
    seen = robot.actions.apply(torch.from_numpy(rows))
    torch.testing.assert_close(seen.mean(0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(3).double())


def test_a_robot_among_several_is_named():
    """One needs no name; of two each is found by its own."""
    arm, hand = Statistics("arm", 3), Statistics("hand", 3)
    assert as_stored(()) is None and Statistics.from_json(as_stored([arm])) == arm
    assert Statistics.from_json(as_stored([arm, hand]), "hand") == hand
    with pytest.raises(ValueError, match="robot is ''; this checkpoint knows 'arm', 'hand'"):
        Statistics.from_json(as_stored([arm, hand]))
    with pytest.raises(ValueError, match="robot is 'leg'; this checkpoint knows 'arm'"):
        Statistics.from_json(as_stored([arm]), "leg")


def test_unknown_fields_and_kinds_are_refused():
    """One clear error each."""
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        Statistics.from_json({"embodiment": "x", "rate": 3, "colour": 1})
    with pytest.raises(ValueError, match="normalise is 'zscore'; expected one of mean_std"):
        Normaliser((0.0,), (1.0,), kind="zscore")
