"""Recording: the experts' successes become a dataset, and which episodes are kept depends on seeds
alone."""

import numpy as np
import pytest

from formats.lerobot import LeRobotDataset
from scripts import record
from scripts.evaluate import read_card
from worlds import RECORDED, episode_seeds
from worlds.fleet import Order, Recording, attempt


@pytest.fixture(scope="module", name="recorded")
def recording(tmp_path_factory):
    """Four episodes of each task of the walking point, half of them disturbed; its second expert
    fails in every second scene."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    out = tmp_path_factory.mktemp("recorded") / "line"
    disturbed = ["--noise", "0.3", "--after", "2", "--workers", "2", "--set", "size=16"]
    main = ["--sim", "fake_world", "--tasks", "walk,stumble", "--episodes", "4", "--out", str(out)]
    record.main([*main, *disturbed])
    return out


def test_what_is_recorded_is_a_dataset_of_the_experts_successes(recorded):
    """It opens as LeRobot v3.0 without a fault; rows are what the expert saw and would have done;
    scenes that it failed are left out."""
    card = read_card(recorded)
    dataset = LeRobotDataset(recorded, {"constant": True})
    assert dataset.check() == []
    assert (dataset.version, dataset.fps, len(dataset.lengths)) == ("v3.0", 10, 8)
    assert isinstance(dataset.info["fps"], int)
    seeds = episode_seeds(0, RECORDED, 40)
    good = [seed for seed in seeds if seed % 2]
    assert [e["seed"] for e in card["episodes"] if e["task"] == "walk"] == seeds[:4]
    assert [e["seed"] for e in card["episodes"] if e["task"] == "stumble"] == good[:4]
    assert (
        card["tasks"]["walk"]["tries"] == 4
        and card["tasks"]["stumble"]["tries"] == seeds.index(good[3]) + 1 > 4
    )
    for i, kept in enumerate(card["episodes"]):
        again = attempt(
            Order("fake_world", kept["task"], (("size", 16),), kept["seed"], 0.3, after=2)
        )
        rows = dataset.rows(i)
        assert np.array_equal(rows["observation.state"], again.states) and np.array_equal(
            rows["action"][:, 0], again.actions[:, 0]
        )
        assert dataset.texts(i) == [again.instruction] and kept["disturbed"] == again.disturbed
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
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
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


def test_an_expert_that_hardly_succeeds_ends_the_recording(tmp_path, monkeypatch):
    """Rather than try for ever; and nothing is left behind."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")

    def failures(orders, workers):
        for order in orders:
            yield Recording(order.task, order.seed, False, False, 0.0, "point", 10)

    monkeypatch.setattr(record, "attempts", failures)
    with pytest.raises(ValueError, match="the expert solved 0 of 14; lower the disturbance"):
        record.record(Order("fake_world"), ["walk"], 1, tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--tasks", "fly"], "--tasks is 'fly'; expected one of walk, stumble"),
        (["--set", "colour=red"], "--set has 'colour=red'; expected key=value, .*: size"),
        (["--episodes", "0"], "--episodes is 0; expected a whole number in"),
        (["--noise", "-1"], "--noise is -1; expected a number in"),
        (["--disturbed", "2"], "--disturbed is 2; expected a number in .0,1"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    """The error names the option, the value and what is expected, before anything is started."""
    with pytest.raises(ValueError, match=message):
        record.main(["--sim", "fake_world", "--tasks", "walk", "--out", "x", *changes])
