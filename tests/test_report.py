"""The report repeats what other commands measured, and says what is missing."""

import json

import pytest

from scripts import report


@pytest.fixture
def run(tmp_path):
    """A run's folder with one figure of each kind."""
    for stage in report.FOLDERS:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "curve.png").write_bytes(b"")
    (tmp_path / "latent" / "figures.json").write_text(
        json.dumps({"probe R2": {"target robot": [0.9, 0.8, 0.1]}})
    )
    (tmp_path / "samples").mkdir()
    figures = {
        "idm": {"action MSE": {"model": 0.2, "mean": 1.0}},
        "world_model": {"PSNR moving (dB)": {"model": 19.0, "copy": 15.5, "vae": 22.0}},
    }
    (tmp_path / "samples" / "figures.json").write_text(
        json.dumps({"episodes": 32, "steps": 10, "figures": figures})
    )
    (tmp_path / "samples" / "idm.png").write_bytes(b"")
    (tmp_path / "evaluation").mkdir()
    row = {
        "policy": "joint",
        "settings": {"split": "eval"},
        "all": {"rate": 0.85, "interval": [0.77, 0.9], "episodes": 100},
    }
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    return tmp_path


def test_the_table_holds_what_was_measured(run):
    """Success with its interval, IDM against the mean, world model against copying, the probe."""
    lines = dict(report.targets(run))
    assert lines["closed-loop success, joint, split=eval"] == "85.0 % [77, 90] of 100"
    assert lines["IDM action MSE / predict-the-mean"] == "0.200 / 1.000 = 0.20"
    assert "+3.50 dB" in lines["world-model PSNR on the moving region, above copy-last-frame"]
    assert lines["latent actions, target robot: probe R2 of the motion"] == "0.90, 0.80, 0.10"


def test_the_page_shows_films_then_cards_then_curves_then_figures(run, capsys):
    """Both files hold the same; a phone is told its width, and pictures and tables fit it."""
    for name in ("samples/idm_0.gif", "evaluation/joint_0.gif"):
        (run / name).write_bytes(b"")
    report.main(["--run", str(run)])
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    shown = (
        "samples/idm_0.gif",
        "evaluation/joint_0.gif",
        "idm: what was done between these frames?",
        "samples/idm.png",
        "world_model: what will happen if I do this?",
        "stage1/curve.png",
        "latent/curve.png",
        "stage3/curve.png",
        "85.0 % [77, 90] of 100",
    )
    for found in (text, page):
        places = [found.index(one) for one in shown]
        assert places == sorted(places)
    assert page.count("<section>") == page.count("</section>") == 2
    assert page.count("<table>") == 3 and "|" not in page.partition("</style>")[2]
    assert "width=device-width" in page and "max-width: 100%" in page
    assert "report.html" in capsys.readouterr().out


def test_a_card_holds_the_truth_of_its_mode_and_its_controls(run):
    """Where the modes were measured against the simulator: at the most Euler steps."""
    assert "against the simulator" not in report.page(run)
    names = (
        "expert, true films: gripper, px",
        "expert, VAE: gripper, px",
        "expert, joint: gripper, px",
        "expert, world_model: gripper, px",
        "random, world_model: gripper, px",
        "expert, vgm: gripper, px",
        "expert, world_model, other actions: gripper, px",
        "expert, vla: x, R2",
        "expert, idm: x, R2",
        "expert, VAE: SSIM",
    )
    figures = {name: [[9, 9, 9], [i, i - 0.5, i + 0.25]] for i, name in enumerate(names)}
    (run / "truth.json").write_text(json.dumps({"figures": figures, "steps": [1, 4]}))
    assert list(report.truths(run, "world_model")) == [
        ("gripper, px", "VAE", "1.00 [0.50, 1.25]", "-"),
        ("gripper, px", "true films", "0.00 [-0.50, 0.25]", "-"),
        ("gripper, px", "vgm", "5.00 [4.50, 5.25]", "-"),
        ("gripper, px", "world_model", "3.00 [2.50, 3.25]", "4.00 [3.50, 4.25]"),
        ("gripper, px", "world_model, other actions", "6.00 [5.50, 6.25]", "-"),
    ]
    assert [row[:2] for row in report.truths(run, "idm")] == [("x, R2", "idm"), ("x, R2", "vla")]
    assert report.page(run).count("against the simulator") == 2


def test_a_figure_that_is_null_is_a_dash(run):
    """A perfect prediction has no finite PSNR, and is stored as null."""
    path = run / "samples" / "figures.json"
    found = json.loads(path.read_text())
    found["figures"]["world_model"]["PSNR moving (dB)"]["copy"] = None
    path.write_text(json.dumps(found))
    line = dict(report.targets(run))["world-model PSNR on the moving region, above copy-last-frame"]
    assert line == "19.00 - - dB, VAE ceiling 22.00" and "| - |" in report.page(run)


def test_samples_of_some_modes_alone_are_refused(run):
    path = run / "samples" / "figures.json"
    path.write_text(json.dumps({"episodes": 1, "steps": 1, "figures": {"joint": {}}}))
    with pytest.raises(ValueError, match="lacks modes idm or world_model; run sample.py"):
        report.main(["--run", str(run)])


@pytest.mark.parametrize(
    "missing", ["samples/figures.json", "evaluation/evaluation.json", "stage2/curve.png"]
)
def test_what_is_missing_is_named(run, missing):
    """No silent gaps."""
    (run / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        report.main(["--run", str(run)])


def test_a_truth_that_has_no_value_is_shown_as_none(run):
    """Of so few windows that no disc moved, say: stored as null."""
    figures = {
        f"expert, {who}: gripper, px": [[None, None, None]] for who in ("world_model", "vgm")
    }
    (run / "truth.json").write_text(json.dumps({"figures": figures, "steps": [2]}))
    assert ("gripper, px", "vgm", "- [-, -]", "-") in list(report.truths(run, "vgm"))
    lines = dict(report.targets(run))
    assert lines["gripper in the film of world_model, expert motion: px of 48 off"] == "-"
