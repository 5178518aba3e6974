"""The report repeats what other commands measured, and says what is missing."""

import json

import pytest

from scripts import report


@pytest.fixture
def run(tmp_path):
    """A run's folder with one figure of each kind."""
    for stage in report.FOLDERS:
        (tmp_path / stage).mkdir()
        names = ("reconstruction", "alignment") if stage == "latent" else ("video", "action")
        (tmp_path / stage / "log.csv").write_text(
            f"step,{','.join(names)}\n10,0.5,0.25\n20,0.3,0.15\n"
        )
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


def test_the_page_shows_every_stage_and_mode_as_markdown_and_html(run, capsys):
    """Both files hold the same table and pictures."""
    report.main(["--run", str(run)])
    markdown, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    for text in (
        "85.0 % [77, 90] of 100",
        "0.4000 (video)",
        "0.2000 (alignment)",
        "samples/idm.png",
        "stage3/curve.png",
    ):
        assert text in markdown and text in page
    assert "report.html" in capsys.readouterr().out


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
    "missing", ["samples/figures.json", "evaluation/evaluation.json", "stage2/log.csv"]
)
def test_what_is_missing_is_named(run, missing):
    """No silent gaps."""
    (run / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        report.main(["--run", str(run)])
