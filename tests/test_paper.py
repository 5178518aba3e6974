"""The experiments of docs/latent_action at the least size, and the arithmetic of their claims."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from scripts import paper


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
    found = paper.interval(counts, rates[None].repeat(3, 0), within[None].repeat(3, 0), 200, 200)
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
    args = SimpleNamespace(
        demonstrations=[10, 20], modes="joint", episodes=50, seeds=2, out=tmp_path
    )
    successes = {"stage 1": (5, 10), "stages 1, 2": (10, 20)}
    cells = {
        f"{arm}/{seed}/{n}": {"joint": {"successes": count + seed, "episodes": 50}}
        for arm, counts in successes.items()
        for seed in range(2)
        for n, count in zip(args.demonstrations, counts)
    }
    paper.report(args, "by hand", cells)
    page = (tmp_path / "downstream.md").read_text()
    assert "| joint, stage 1 | 11 [" in page and "([10. 12.]) | 21 [" in page
    assert "| joint, times as many | 2.00 [" in page and "| over 1.00 [" in page
    stored = json.loads((tmp_path / "downstream.json").read_text())
    assert stored["about"] == "by hand" and stored["cells"] == cells
    assert stored["savings"]["joint"]["reached"] == [True, False]
    assert (tmp_path / "downstream.png").stat().st_size > 5000


@pytest.mark.long
def test_the_downstream_experiment_runs_stops_and_goes_on(tmp_path, capsys):
    """All cells of one seed at the smallest size; a second run trains nothing, and other settings
    are refused."""
    sizes = {"demonstrations": 2, "seeds": 1, "videos": 2, "windows": 8, "episodes": 2}
    sizes |= {"max-steps": 8, "steps1": 2, "steps2": 2, "steps3": 2}
    args = ["downstream", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    args += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    args += ["--set3", "lr=1e-3"]
    paper.main(args)
    stored = json.loads((tmp_path / "out/downstream.json").read_text())
    assert set(stored["cells"]) == {"stage 1/0/2", "stages 1, 2/0/2"}
    assert "| joint, stage 1 | " in (tmp_path / "out/downstream.md").read_text()
    assert (tmp_path / "out/downstream.png").exists()
    capsys.readouterr()
    paper.main(args)
    assert "trained parameters" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps3=2 instead of 3"):
        paper.main([*args, "--steps3", "3"])


@pytest.mark.long
def test_the_evidence_is_one_command(tmp_path):
    """Every variant, body and baseline has its row, with the command and the numbers in json."""
    sizes = ["--seeds", "1", "--episodes", "4", "--steps", "3"]
    paper.main(["evidence", "--out", str(tmp_path), *sizes])
    text = (tmp_path / "evidence.md").read_text()
    stored = json.loads((tmp_path / "evidence.json").read_text())
    for row in (*paper.VARIANTS, *stored["linear"]):
        assert all(f"| {row} | {body} |" in text for body in paper.BODIES)
    assert len(stored["runs"]) == 4 and "`python -m scripts.paper evidence" in stored["about"]
