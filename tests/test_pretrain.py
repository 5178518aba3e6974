"""Pre-training of small frozen backbones, at tiny size: the folder that the command writes is one
that everything else can start from."""

import json
from pathlib import Path

import pytest
import small
import torch

import train
from backbones.frozen import Backbones
from motus import PRESETS, preset
from sample import Policy
from scripts import pretrain, record
from weights.card import Card, newest_step

TOY = PRESETS["toy"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two steps of each part."""
    folder = tmp_path_factory.mktemp("backbones")
    card = small.write_card(folder)
    sizes = ["--steps", "2", "--episodes", "2"]
    pretrain.main(["--preset", "toy", "--data", card, *sizes, "--out", str(folder / "new")])
    return folder / "new"


def test_backbones_are_pretrained_by_one_command(made):
    """Every part and its tokenizer, at the sizes of the repository's, with figures."""
    names = {path.name for path in made.iterdir()}
    assert names == {path.name for path in TOY.backbones.glob("*.*")}
    backbones = Backbones.load(made, TOY.motus.video.text_len)
    frames = torch.zeros(1, 5, 48, 48, 3, dtype=torch.uint8)
    seen = backbones.conditions(frames, ["push the red disc to the left"])
    assert seen["latents"].shape == (1, 24, 2, 6, 6)
    assert seen["und"].shape[2] == preset("toy").vlm_dim
    figures = json.loads((made / "card.json").read_text())
    assert figures["command"].startswith("python -m scripts.pretrain --preset toy --data")
    assert {"vlm_named_object_found", "vlm_position_error_px", "vlm_error opening"} < set(figures)
    assert {"vae_psnr_moving_db", "dcae_reconstruction_loss", "dcae_labels_loss"} < set(figures)


def test_backbones_that_are_kept_are_those_of_the_repository(made, tmp_path):
    """`--keep` copies parts and pre-trains the rest."""
    sizes = ["--steps", "2", "--episodes", "2", "--data", str(made.parent / "card.json")]
    pretrain.main([*sizes, "--keep", "vae,vlm,dcae", "--out", str(tmp_path / "new")])
    for file in TOY.backbones.glob("*.*"):
        same = file.read_bytes() == (tmp_path / "new" / file.name).read_bytes()
        assert same == (file.stem in ("vae", "vlm", "dcae")), file.name
    with pytest.raises(ValueError, match="keep is 'eyes'; expected parts among text, vlm, vae"):
        pretrain.main([*sizes, "--keep", "eyes", "--out", str(tmp_path / "x")])


def test_backbones_of_the_repository_are_never_overwritten():
    with pytest.raises(ValueError, match="holds the repository's backbones; name another folder"):
        pretrain.main(["--out", str(TOY.backbones)])
    with pytest.raises(ValueError, match="'sim' has no data of its own; name a card by --data"):
        pretrain.main(["--preset", "sim", "--out", "x"])


def test_the_vae_weighs_what_moves():
    """Hand-sized: a pixel that changes between frames 1 and 2 of 3 counts in both."""
    video = torch.zeros(1, 3, 3, 2, 2)
    video[:, :, 2, 0, 0] = 1.0
    weight = pretrain.moving(video)
    assert weight.shape == (1, 1, 3, 2, 2)
    assert weight[0, 0, :, 0, 0].tolist() == [0, 1, 1] and weight.sum() == 2


@pytest.mark.slow
def test_backbones_of_a_simulator_are_pretrained_from_a_card(tmp_path, monkeypatch):
    """Two steps of each on what was recorded; stage 3 of that preset then trains on the same
    recording with those of the folder that MOTUS_BACKBONES names, and its checkpoint acts with no
    others."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    own, data = tmp_path / "weights", str(tmp_path / "set")
    argv = ["--sim", "fake_world", "--tasks", "walk", "--set", "size=32", "--episodes", "20"]
    record.main([*argv, "--out", data])
    sim = ["--preset", "sim", "--data", data]
    pretrain.main([*sim, "--out", str(own), "--steps", "2"])
    figures = json.loads((own / "card.json").read_text())
    assert {"vlm_named_object_found", "vlm_error walked", "vae_psnr_moving_db"} < set(figures)
    monkeypatch.setenv("MOTUS_BACKBONES", str(own))
    run = str(tmp_path / "run")
    argv = ["--stage", "3", *sim, "--out", run, "--steps", "1", "--set", "windows=4", "batch=2"]
    train.main(argv)
    assert Card.read(newest_step(run) / "config.json").motus["action_dim"] == 1
    ours = Backbones.load(own).fingerprint()
    assert Policy.load(run).backbones.fingerprint() == ours
    monkeypatch.delenv("MOTUS_BACKBONES")
    with pytest.raises(ValueError, match="other frozen backbones than these .*MOTUS_BACKBONES"):
        Policy.load(run)
