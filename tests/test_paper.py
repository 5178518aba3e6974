"""The experiments of docs/latent_action at the least size, and the arithmetic of their claims."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import paper

ROOT = Path(__file__).parents[1]


def test_demonstrations_needed_are_read_from_the_curve():
    """Half-way in log n between 10 and 40 is 20; beyond the curve its ends count; a dip does not; a
    curve at half the counts saves 2."""
    counts, rates = np.array([10, 20, 40, 80]), np.array([0.2, 0.4, 0.6, 0.8])

    def needed(counts: np.ndarray, without: np.ndarray, wanted: float) -> float:
        return (paper.savings(counts, without, np.full(len(counts), wanted)) * counts)[0]

    assert np.isclose(needed(np.array([10, 40]), np.array([0.2, 0.6]), 0.4), 20)
    found = [needed(counts, rates, wanted) for wanted in (0.1, 0.2, 0.8, 0.9)]
    assert np.allclose(found, [10, 10, 80, 80])
    assert np.isclose(needed(counts, np.zeros(4), 0.1), 80)
    assert np.isclose(needed(counts, np.array([0.2, 0.5, 0.4, 0.8]), 0.5), 20)
    within = np.array([0.4, 0.6, 0.8, 0.9])
    # The last is a lower bound.
    assert np.allclose(paper.savings(counts, rates, within), [2, 2, 2, 1])


def test_intervals_come_from_other_seeds_and_worlds():
    """The interval of a saving of 2 holds it and leaves no room for none."""
    counts, rates = np.array([10, 20, 40, 80]), np.array([0.2, 0.4, 0.6, 0.8])
    within = np.array([0.4, 0.6, 0.8, 0.9])
    found = paper.interval(counts, rates[None].repeat(3, 0), within[None].repeat(3, 0), 200)
    assert found.shape == (4, 2) and (found[:2, 0] > 1.4).all()
    assert (found[:2, 0] < 2).all() and (found[:2, 1] > 2).all()


def test_a_tenth_of_the_rows_keeps_its_labels():
    """Evenly spread over those that have some."""
    mask = (np.arange(1000) % 2 == 0)[:, None].repeat(3, 1)
    tensors = [paper.torch.from_numpy(x) for x in (np.zeros((1000, 1)), np.zeros((1000, 3)), mask)]
    seen = paper.sparsely_labelled(paper.Motions(*tensors, paper.torch.zeros(1000)))
    assert seen.mask.any(dim=1).sum() == 100 and seen.mask[::10].all()


def test_the_page_shows_both_arms_and_what_is_saved(tmp_path):
    """Rates pooled over seeds with their interval, each seed's, and a bound where the arm without
    stage 2 never comes as far."""
    successes = {"longer": (5, 10), "stage2": (10, 20)}
    for run, counts in successes.items():
        for seed in range(2):
            for n, count in zip((10, 20), counts):
                home = tmp_path / f"run/seed{seed}/{run}_n{n}"
                home.mkdir(parents=True)
                rates = {"all": {"successes": count + seed, "episodes": 50}}
                (home / "evaluation.json").write_text(json.dumps({"rows": [rates]}))
    (tmp_path / "run/settings.txt").write_text("SEEDS='0 1'\n")
    paper.main(["downstream", "--run", str(tmp_path / "run"), "--out", str(tmp_path)])
    page = (tmp_path / "downstream.md").read_text()
    assert "| stage 1 |  11.0 [" in page and "11/100 ([10. 12.]) |  21.0 [" in page
    assert "| times as many | 2.00 [" in page and "| over 1.00 [" in page
    assert "of the runs with SEEDS='0 1'" in page and "downstream --run" in page
    stored = json.loads((tmp_path / "downstream.json").read_text())
    assert stored["demonstrations"] == [10, 20] and stored["reached"] == [True, False]
    assert stored["stages 1, 2"] == [[0.2, 0.4], [0.22, 0.42]]
    assert (tmp_path / "downstream.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="holds no seed.*run.sh` makes them"):
        paper.main(["downstream", "--run", str(tmp_path / "none"), "--out", str(tmp_path)])


def run(folder: Path, python: str, **sizes: object) -> subprocess.CompletedProcess:
    """docs/latent_action/run.sh with runs and pages in a folder."""
    places = {"RUN": folder / "run", "OUT": folder / "out", "PYTHON": python}
    names = {name: str(value) for name, value in (sizes | places).items()}
    script = ["bash", ROOT / "docs/latent_action/run.sh"]
    return subprocess.run(script, env=os.environ | names, capture_output=True, text=True)


def test_runs_of_other_settings_are_refused(tmp_path):
    """The folder notes its settings; with others nothing is run."""
    first = run(tmp_path, "echo", SEEDS=0)
    assert first.returncode == 0 and "train.py --stage latent" in first.stdout
    assert run(tmp_path, "echo", SEEDS=0).stdout == first.stdout
    other = run(tmp_path, "echo", SEEDS=0, STEPS3=7)
    assert other.returncode == 2 and not other.stdout
    assert "was made with SEEDS='0'" in other.stderr and "STEPS3='7'" in other.stderr


@pytest.mark.long
def test_the_downstream_experiment_runs_stops_and_goes_on(tmp_path):
    """Both arms through all stages at the least size; started again, nothing is trained again."""
    sizes = dict(SEEDS=0, COUNTS=2, STEPS1=2, STEPS2=2, STEPS3=2, VIDEOS=2, WINDOWS=8)
    sizes |= dict(WORLDS=2, ACTIONS=4, SET3="batch=2 warmup=1", LATENT="steps=2 episodes=4")
    first = run(tmp_path, sys.executable, **sizes)
    assert first.returncode == 0, first.stderr
    assert "trained parameters" in first.stdout
    stored = json.loads((tmp_path / "out/downstream.json").read_text())
    assert stored["demonstrations"] == [2] and np.shape(stored["stage 1"]) == (1, 1)
    assert "| stage 1 | " in (tmp_path / "out/downstream.md").read_text()
    again = run(tmp_path, sys.executable, **sizes)
    assert again.returncode == 0 and "trained parameters" not in again.stdout


@pytest.mark.long
def test_the_evidence_is_one_command(tmp_path):
    """Every variant, body and baseline has its row, with the command and the numbers in json."""
    sizes = ["--seeds", "1", "--episodes", "4", "--steps", "3"]
    paper.main(["evidence", "--out", str(tmp_path), *sizes])
    text = (tmp_path / "evidence.md").read_text()
    stored = json.loads((tmp_path / "evidence.json").read_text())
    assert set(paper.VARIANTS) < set(stored["runs"]) and len(stored["runs"]) == 6
    for row in stored["runs"]:
        assert all(f"| {row} | {body} |" in text for body in paper.BODIES)
    assert "`python -m scripts.paper evidence" in stored["about"]
