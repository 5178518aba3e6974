"""Pre-training of small frozen backbones, at tiny size: the folder that the command writes is one
that everything else can start from."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch

import data
import train
from backbones import eyes
from backbones.frozen import Backbones
from data import open_pyramid
from formats.lerobot import write_v3
from motus import PRESETS, preset
from sample import Policy
from scripts import pretrain, record
from weights.card import Card, newest_step

TOY = PRESETS["toy"]
SIM = PRESETS["sim"]
pytestmark = pytest.mark.xdist_group("pretrain")  # one process makes its runs


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two steps of each part, of few samples."""
    folder = tmp_path_factory.mktemp("backbones")
    card = small.write_card(folder)
    sizes = ["--steps", "2", "--episodes", "2"]
    with pytest.MonkeyPatch.context() as patched:
        few = {part: (steps, 4) for part, (steps, _) in pretrain.RECIPES["toy"].items()}
        patched.setitem(pretrain.RECIPES, "toy", few)
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
    assert {"vae_psnr_db", "vae_psnr_moving_db"} < set(figures)


def test_backbones_that_are_kept_are_those_of_the_repository(made, tmp_path):
    """`--keep` copies parts and pre-trains the rest."""
    sizes = ["--steps", "2", "--episodes", "2", "--data", str(made.parent / "card.json")]
    pretrain.main([*sizes, "--keep", "vae,vlm", "--out", str(tmp_path / "new")])
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


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A robot's recordings without labels: a white square walks a pixel per row to the right, or
    down, as it was told; its place is the state, its move the action."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("own")
    episodes = []
    for e in range(20):
        move = np.float32([1, 0] if e % 2 else [0, 1])
        places = 4 + np.arange(20)[:, None] * move
        frames = np.zeros((20, 32, 32, 3), np.uint8)
        for frame, (x, y) in zip(frames, places.astype(int)):
            frame[y : y + 4, x : x + 4] = 255
        text = "slide the box " + ("right" if e % 2 else "down")
        episodes.append(({"front": frames}, places, np.tile(move, (20, 1)), text, {}))
    write_v3(folder / "set", episodes, 10)
    sources = [{"path": "set", "held_out": 2}]
    card = {"size": [32, 32], "sources": sources}
    (folder / "card.json").write_text(json.dumps(card))
    return folder / "card.json"


def test_recordings_without_labels_tell_what_they_hold(own):
    """Exact: the place that changes, the state now and later, the actions of a window; what lies
    past the end of an episode is unknown, and its last state is its last."""
    corpus = pretrain.Corpus(open_pyramid(own, "latent", "sim"), 9)
    assert not corpus.labelled and len(corpus.episodes) == 9
    assert corpus.sentences == ["slide the box down", "slide the box right"]
    # Two numbers of state at four times; four frames of two actions of two numbers.
    assert corpus.targets == ("place x", "place y", *["state"] * 8, *["actions"] * 16)
    robot = corpus.robots["unknown"]
    episode = next(one for one in corpus.episodes if one.text.endswith("right"))
    assert episode.frames.shape == (10, 32, 32, 3)  # 5 of 10 a second
    row = torch.from_numpy(episode.labels[3])  # row 6 of the recording
    assert row[1] * 32 == pytest.approx(6, abs=2) and 10 <= row[0] * 32 <= 24
    state = robot.state.invert(4 * row[2:10].view(4, 2))
    assert state[:, 0].tolist() == pytest.approx([10, 20, 23, 23], abs=1e-4)
    assert state[:, 1].tolist() == pytest.approx([4] * 4, abs=1e-4)
    actions = robot.actions.invert(4 * row[10:].view(8, 2))
    assert torch.allclose(actions, torch.tensor([1.0, 0.0]).expand(8, 2), atol=1e-4)
    late = torch.from_numpy(episode.labels[8])[10:].view(8, 2)  # from row 16 of 20
    assert late.isnan().any(dim=1).tolist() == [False] * 4 + [True] * 4
    assert np.isnan(episode.labels[9, :2]).all()  # nothing changes any more


def test_every_other_instruction_is_misread(own):
    corpus = pretrain.Corpus(open_pyramid(own, "latent", "sim"), 9)
    texts = ["slide the box down"] * 4
    found, right = corpus.misread(texts)
    assert right.tolist() == [False, True, False, True]
    assert found == ["slide the box right", "slide the box down"] * 2


def test_eyes_are_taught_without_labels(own, tmp_path):
    """Every part goes on from the repository's: known words keep id and meaning, new ones are
    added; a part is the same whichever others are made; the repository's folder is not touched."""
    before = {file: file.read_bytes() for file in SIM.backbones.glob("*.*")}
    sim = ["--preset", "sim", "--data", str(own), "--steps", "2"]
    pretrain.main([*sim, "--out", str(tmp_path / "eyes")])
    pretrain.main([*sim, "--out", str(tmp_path / "vae"), "--keep", "text,vlm"])
    assert before == {file: file.read_bytes() for file in SIM.backbones.glob("*.*")}
    files = [tmp_path / name / "vae.safetensors" for name in ("eyes", "vae")]
    assert files[0].read_bytes() == files[1].read_bytes() != before[SIM.backbones / files[0].name]
    figures = json.loads((tmp_path / "eyes/card.json").read_text())
    assert {"vlm_named_object_found", "vlm_instruction_told", "vlm_error actions"} < set(figures)
    old, new = (Backbones.load(folder) for folder in (SIM.backbones, tmp_path / "eyes"))
    words = old.vlm_tokenizer.get_vocab()
    added = {word: i for word, i in new.vlm_tokenizer.get_vocab().items() if word not in words}
    assert added == {"box": 27, "right": 28}
    assert words.items() < new.vlm_tokenizer.get_vocab().items()
    for name in ("language_model.embed_tokens.weight", "visual.patch_embed.proj.weight"):
        weight = old.vlm.state_dict()[name]
        moved = new.vlm.state_dict()[name][: len(weight)] - weight
        assert moved.abs().max() < 0.01 < weight.abs().max()
    text = [x.text.token_embedding.weight for x in (old, new)]
    assert (text[1][: len(text[0])] - text[0]).abs().max() < 0.02
    assert new.vae.config.mean != old.vae.config.mean


def test_a_command_says_what_the_frozen_vae_makes_of_the_pictures(own, tmp_path, capsys):
    """One line with the PSNR and the figure of the card; advice where the pictures or the words are
    strange to the backbones, none for what they know, and no error where there is no VAE."""
    data.main(["inspect", str(own), "--preset", "sim", "--out", str(tmp_path / "i.png")])
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("eyes")]
    assert re.search(r"back at \d+\.\d dB, expected 26\.4 or more \(29\.4 on its own\)", line)
    assert f"python -m scripts.pretrain --preset sim --data {own} --out FOLDER" in line
    toy = open_pyramid(None, "3", "toy", 4)
    line = eyes.note(toy, TOY.backbones, "toy")
    assert "dB" in line and "pretrain" not in line
    assert "not tried" in eyes.note(toy, tmp_path, "full")
    copy = tmp_path / "eyes"
    copy.mkdir()
    shutil.copyfile(SIM.backbones / "vae.safetensors", copy / "vae.safetensors")
    line = eyes.note(open_pyramid(own, "3", "sim"), copy, "sim")  # a VAE without a card
    assert "expected 26.0 or more: teach" in line


def test_training_says_it_too(own, tmp_path, capsys):
    argv = ["--stage", "3", "--preset", "sim", "--data", str(own), "--out", str(tmp_path / "run")]
    train.main([*argv, "--steps", "1", "--set", "windows=2", "batch=2"])
    assert f"--data {own} --out FOLDER" in capsys.readouterr().err


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
