"""The scripts of docs/latent_action at a size of seconds, and the arithmetic of their claims."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "latent_action"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"latent_action_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demonstrations_needed_are_read_from_the_curve():
    """Half-way in log n between 10 and 40 is 20; beyond the curve its ends count; a curve at half
    the counts saves 2."""
    downstream, counts = script("downstream"), np.array([10, 20, 40, 80])
    rates = np.array([0.2, 0.4, 0.6, 0.8])
    assert math.isclose(downstream.needed(np.array([10, 40]), np.array([0.2, 0.6]), 0.4), 20)
    assert np.allclose(
        [downstream.needed(counts, rates, wanted) for wanted in (0.1, 0.2, 0.8, 0.9)],
        [10, 10, 80, 80],
    )
    assert downstream.needed(counts, np.zeros(4), 0.1) == 80
    assert math.isclose(
        downstream.needed(counts, np.array([0.2, 0.5, 0.4, 0.8]), 0.5), 20
    )  # a dip does not count
    within = np.array([0.4, 0.6, 0.8, 0.9])
    assert np.allclose(
        downstream.savings(counts, rates, within), [2, 2, 2, 1]
    )  # the last is a lower bound
    found = downstream.interval(
        counts, rates[None].repeat(3, 0), within[None].repeat(3, 0), 200, draws=200
    )
    assert (
        found.shape == (4, 2)
        and (found[:2, 0] > 1.4).all()
        and (found[:2, 0] < 2).all()
        and (found[:2, 1] > 2).all()
    )


@pytest.mark.long
def test_the_downstream_experiment_runs_stops_and_goes_on(tmp_path, capsys):
    """All cells of one seed at the smallest size; a second run trains nothing, and other settings
    are refused."""
    downstream = script("downstream")
    args = [
        "--run",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "out"),
        "--demonstrations",
        "2",
        "--seeds",
        "1",
        "--modes",
        "joint",
        "--steps1",
        "2",
        "--steps2",
        "2",
        "--steps3",
        "2",
        "--videos",
        "2",
        "--windows",
        "8",
        "--episodes",
        "2",
        "--max-steps",
        "8",
        "--set-latent",
        "steps=4",
        "episodes=3",
        "batch=20",
        "--set3",
        "lr=1e-3",
    ]
    downstream.main(args)
    stored = json.loads((tmp_path / "out" / "downstream.json").read_text())
    assert set(stored["cells"]) == {"stage 1/0/2", "stages 1, 2/0/2"}
    assert (
        "n = 2" in (tmp_path / "out" / "downstream.md").read_text()
        and (tmp_path / "out" / "downstream.png").exists()
    )
    capsys.readouterr()
    downstream.main(args)
    assert "trained parameters" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="steps3 2 instead of 3"):
        downstream.main([*args, "--steps3", "3"])


@pytest.mark.long
def test_the_evidence_is_one_command(tmp_path):
    """Every variant, body and baseline has its row, with the command and the numbers in json and a
    picture beside."""
    script("evidence").main(
        ["--out", str(tmp_path), "--seeds", "1", "--episodes", "4", "--steps", "3"]
    )
    text, stored = (
        (tmp_path / "evidence.md").read_text(),
        json.loads((tmp_path / "evidence.json").read_text()),
    )
    for row in (
        "flow, aligned",
        "without alignment",
        "without KL",
        "random DC-AE",
        "frame differences",
        "PCA of the flow",
        "of 14",
    ):
        assert f"| {row}" in text or row in text
    assert len(stored["runs"]) == 5 and (tmp_path / "latents.png").stat().st_size > 10_000
