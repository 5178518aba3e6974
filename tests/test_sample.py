"""Sampling a checkpoint: figures that are right on examples a reader can check, pictures that are
small, and errors that say what to do."""

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import data
import sample
from flow import MODES
from formats.pictures import film, sheet
from formats.statistics import Normaliser, Statistics
from motus import Inputs, Motus, preset
from sample import SHIPPED, Policy, action_figures, moving_region, psnr, ssim, video_figures
from weights.card import Card
from weights.files import save_safetensors

ROOT = Path(__file__).parents[1]


def write_checkpoint(folder: Path, stage: str, /, **changes) -> Path:
    """A checkpoint of a one-layer toy model with random weights, the heads included."""
    torch.manual_seed(0)
    config = preset("toy", stage)
    config = replace(config, video=replace(config.video, layers=1))
    robot = Normaliser((0.1, -0.2, 0.3), (0.5, 0.25, 2.0))
    statistics = Statistics("gripper", 3, robot, robot).as_json() if stage == "3" else None
    card = replace(
        Card(
            config.as_json(),
            stage,
            statistics=statistics,
            latent_interval=3 if stage == "2" else None,
            step=1,
        ),
        **changes,
    )
    folder = folder / "step_000001"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(card.as_json())
    save_safetensors(folder / "ema.safetensors", Motus(config).state_dict())
    return folder.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {
        stage: write_checkpoint(tmp_path_factory.mktemp("runs") / f"stage{stage}", stage)
        for stage in "123"
    }


@pytest.fixture(scope="module")
def policy(runs) -> Policy:
    return Policy.load(runs["3"], "joint", steps=2)


def views(n: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (n, 48, 48, 3), np.uint8),
        rng.uniform(-1, 1, (n, 3)),
        ["put the red disc at the top"] * n,
    )


# -- figures --------------------------------------------------------------------------------------


def test_psnr_of_an_error_of_one_grey_level_is_48_decibels():
    """10 log10(255^2) = 48.13 dB, everywhere or only where the region says; no error at all is
    infinite."""
    truth = torch.full((1, 2, 12, 12, 3), 100, dtype=torch.uint8)
    video, region = truth.clone(), torch.zeros(1, 2, 12, 12, dtype=torch.bool)
    video[:, :, :6] += 1
    region[:, :, :6] = True
    assert psnr(video, truth, region) == pytest.approx(20 * math.log10(255))
    assert psnr(video, truth) == pytest.approx(20 * math.log10(255) + 10 * math.log10(2))
    assert psnr(truth, truth) == psnr(video, truth, ~region) == math.inf


def test_ssim_is_one_for_equal_pictures_and_the_luminance_term_for_flat_ones():
    """Flat pictures have no contrast: SSIM is (2ab + c) / (a^2 + b^2 + c). Noise has no structure
    in common with other noise."""
    noise = torch.randint(
        0, 256, (1, 2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert ssim(noise, noise) == pytest.approx(1, abs=1e-5)
    a, b, c = 51 / 255, 102 / 255, 0.01**2
    flat = ssim(
        torch.full((1, 1, 12, 12, 3), 51, dtype=torch.uint8),
        torch.full((1, 1, 12, 12, 3), 102, dtype=torch.uint8),
    )
    assert flat == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-4)
    assert abs(ssim(noise, noise.flip(1))) < 0.1


def test_the_moving_region_is_what_changes_and_two_pixels_around():
    """One pixel that changes makes a square of five; a change below the threshold makes nothing."""
    before, after = (
        torch.full((1, 1, 20, 20, 3), 50, dtype=torch.uint8),
        torch.full((1, 2, 20, 20, 3), 50, dtype=torch.uint8),
    )
    after[0, 0, 8, 9, 1] = 90
    after[0, 1] += 10
    region = moving_region(before, after)
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[6:11, 7:12] = True
    assert torch.equal(region[0, 0], expected) and not region[0, 1].any()


def test_copying_the_observation_is_the_baseline_of_the_video():
    """A prediction that repeats the observation scores exactly as the baseline does, and the truth
    scores better than both."""
    frames = torch.zeros(1, 5, 24, 24, 3, dtype=torch.uint8)
    frames[0, torch.arange(5), 10, 4 + 2 * torch.arange(5)] = 255  # a point on its way
    figures = video_figures(frames[:, :1].expand_as(frames), frames, frames)
    for figure in figures.values():
        assert figure["model"] == figure["copy"] < figure["vae"]
    assert figures["PSNR moving (dB)"]["copy"] < figures["PSNR (dB)"]["copy"]


def test_predicting_the_mean_is_the_baseline_of_the_actions():
    """Zeros are the mean of normalised actions; robot units weigh each dimension by its std."""
    truth, robot = torch.tensor([[[1.0, 2.0]]]), Normaliser((5.0, 5.0), (1.0, 0.5))
    figures = action_figures(torch.tensor([[[1.0, 0.0]]]), truth, robot)
    assert figures == {
        "action MSE": {"model": 2.0, "mean": 2.5},
        "action MSE (robot)": {"model": 0.5, "mean": 1.0},
    }


# -- pictures -------------------------------------------------------------------------------------


def test_a_film_is_enlarged_and_stays_below_its_limit(tmp_path, monkeypatch):
    """Its pixels are enlarged four times; even of pure noise, a long film fits: less enlarged, then
    with fewer frames."""
    videos = np.random.default_rng(0).integers(0, 256, (2, 9, 48, 48, 3), np.uint8)
    monkeypatch.setattr("formats.pictures.LIMIT", 120_000)
    film(
        tmp_path / "a.gif",
        {"predicted": videos[0], "true": videos[1]},
        "put the red disc at the top",
    )
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (2 * 48, 48 + 40) and 1 < gif.n_frames <= 9
    assert (tmp_path / "a.gif").stat().st_size <= 120_000
    film(tmp_path / "b.gif", {"predicted": videos[0] // 255, "true": videos[1] // 255}, "black")
    with Image.open(tmp_path / "b.gif") as gif:
        assert gif.size == (2 * 192, 192 + 40)


@pytest.mark.parametrize("side", [48, 96, 256])
def test_a_film_of_real_pictures_keeps_their_colours(tmp_path, side):
    """Soft shades of all colours with a camera's noise, other ones in each frame: every frame is
    within 12 of 255 in the mean, at any size."""
    rng = np.random.default_rng(0)
    few = rng.integers(0, 256, (3, 6, 6, 3), np.uint8)
    soft = [
        np.array(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in few
    ]
    noisy = np.stack(soft) + rng.normal(0, 4, (3, side, side, 3))
    video = noisy.clip(0, 255).astype(np.uint8)
    film(tmp_path / "a.gif", {"true": video}, "go")
    with Image.open(tmp_path / "a.gif") as gif:
        scale = gif.width // side
        for number in range(gif.n_frames):
            gif.seek(number)
            page = np.array(gif.convert("RGB"))[20:-20][::scale, ::scale]
            nearest = min(np.abs(page.astype(int) - picture).mean() for picture in video)
            assert nearest < 12, (side, number)
        assert gif.n_frames == 3 or side == 256


def test_a_film_shows_where_the_disc_should_go(tmp_path):
    """A white ring in each video, about the same place; the place itself stays as it is."""
    black = np.zeros((2, 48, 48, 3), np.uint8)
    film(tmp_path / "a.gif", {"predicted": black, "true": black}, "", goal=np.array([0.75, 0.25]))
    with Image.open(tmp_path / "a.gif") as gif:
        page = np.asarray(gif.convert("L"))[20:212]
    for left in (0, 192):
        row = page[48, left : left + 192]
        assert np.flatnonzero(row > 200).tolist() == [144 - 18, 144 + 18]
    film(tmp_path / "b.gif", {"predicted": black}, "")
    with Image.open(tmp_path / "b.gif") as gif:
        assert not np.asarray(gif.convert("L"))[20:212].any()


def test_plots_of_actions_share_the_range_of_the_robot(tmp_path, monkeypatch):
    """A small error looks small; what leaves the range is shown too."""
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    actions = np.full((1, 4, 2), 0.5)
    actions[0, 0, 1] = 3
    picture = {"observation": np.zeros((1, 8, 8, 3), np.uint8)}
    for ranges in ([(-1, 1), (-1, 1)], ()):
        sheet(tmp_path / "a.png", "", [""], picture, actions, actions + 0.01, ranges=ranges)
    near, far, free = (*shown[0].axes[1:], shown[1].axes[1])
    assert near.get_ylim() == pytest.approx((-1.1, 1.1))
    assert far.get_ylim()[0] < -1 and far.get_ylim()[1] > 3
    assert free.get_ylim()[1] - free.get_ylim()[0] < 0.1


def test_a_sheet_has_a_dark_ground_of_its_own(tmp_path):
    """The corner is the ground colour and opaque, whatever page it lies on."""
    pictures, actions = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 4, 3))
    sheet(
        tmp_path / "a.png",
        "idm",
        ["push it to the top"] * 2,
        {"observation": pictures},
        actions,
        actions,
    )
    assert Image.open(tmp_path / "a.png").convert("RGBA").getpixel((2, 2)) == (0, 0, 0, 255)


# -- the policy -----------------------------------------------------------------------------------


def test_a_policy_acts_in_robot_units_and_repeats_itself_from_a_seed(policy):
    """Actions are the normalised ones times std plus mean; the same seed gives the same actions,
    the next call others."""
    images, states, texts = views()
    policy.generator.manual_seed(4)
    first, second = policy.act(images, states, texts), policy.act(images, states, texts)
    policy.generator.manual_seed(4)
    again, video = policy.predict(images, states, texts)
    assert first.shape == (2, 12, 3) and first.dtype == np.float32
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert video.shape == (2, 5, 48, 48, 3) and video.dtype == np.uint8
    policy.generator.manual_seed(4)
    robot = policy.statistics.state
    inputs = policy.inputs(
        torch.tensor(images), texts, robot.apply(torch.tensor(states, dtype=torch.float32))
    )
    normalised = policy.sample(inputs, "joint").actions
    assert np.allclose(
        first, normalised.cpu().numpy() * [0.5, 0.25, 2.0] + [0.1, -0.2, 0.3], atol=1e-5
    )


def test_a_policy_decodes_no_video_unless_asked(policy, monkeypatch):
    """Acting works without the decoder of the VAE; mode vla imagines no video even when asked."""
    monkeypatch.setattr(policy.backbones, "decode_video", lambda latents: pytest.fail("decoded"))
    policy.act(*views())
    monkeypatch.setattr(policy, "mode", "vla")
    assert policy.predict(*views(), video=True)[1] is None


IMAGES, STATES = np.zeros((2, 48, 48, 3), np.uint8), np.zeros((2, 3))


@pytest.mark.parametrize(
    "images, states, texts, found",
    [
        (IMAGES.astype(np.float32), STATES, ["a", "b"], "images are float32 (2, 48, 48, 3)"),
        (IMAGES[0], STATES[:1], ["a"], "images are uint8 (48, 48, 3)"),
        (IMAGES, np.zeros((2, 4)), ["a", "b"], "states (2, 4)"),
        (IMAGES, np.full((2, 3), np.nan), ["a", "b"], "states (2, 3)"),
        (IMAGES, STATES, ["a"], "1 instructions"),
        (IMAGES[:0], STATES[:0], [], "0 instructions"),
    ],
)
def test_a_policy_refuses_what_it_cannot_read(policy, images, states, texts, found):
    """One ValueError that names what was found and what is allowed."""
    with pytest.raises(ValueError) as error:
        policy.act(images, states, texts)
    expected = f"expected uint8 (n, H, W, 3), finite ({len(images)}, 3)"
    assert found in str(error.value) and expected in str(error.value)


# -- checkpoints and modes ------------------------------------------------------------------------


def test_stage_1_samples_video_without_the_action_and_understanding_experts(runs):
    """The video expert runs alone: with the other two experts broken, mode vgm still gives finite
    video."""
    policy = Policy.load(runs["1"], "vgm", steps=2)
    for expert in (policy.model.action, policy.model.und):
        for parameter in expert.parameters():
            torch.nn.init.constant_(parameter, math.nan)
    frames = torch.tensor(views()[0][:, None])
    inputs = Inputs(**policy.backbones.conditions(frames, views()[2], und=False))
    prediction = policy.sample(inputs, "vgm")
    assert inputs.und is None and prediction.actions is None
    assert prediction.video.shape == (2, 24, 2, 6, 6) and prediction.video.isfinite().all()
    assert torch.equal(prediction.video[:, :, :1], inputs.latents)


@pytest.mark.parametrize(
    "stage, mode, message",
    [
        ("3", "policy", "mode is 'policy'; expected one of joint, vla, world_model, idm, vgm"),
        ("1", "joint", "mode joint needs actions that stage 1 lacks; expected one of vgm"),
        ("2", "idm", "mode idm needs actions that stage 2 lacks; expected one of joint, vgm"),
    ],
)
def test_a_mode_that_a_checkpoint_lacks_is_refused(runs, stage, mode, message):
    """Unknown modes and modes of later stages: the error lists those there are."""
    with pytest.raises(ValueError, match=message):
        Policy.load(runs[stage], mode)


def test_what_is_no_checkpoint_is_refused(runs, tmp_path):
    """A missing folder, a foreign config.json, broken json, a stage nobody knows, a stage 3 without
    statistics."""
    with pytest.raises(ValueError, match="holds no checkpoint"):
        Policy.load(tmp_path / "nowhere")
    for text in ('{"stage": "3"}', "not json", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            Policy.load(tmp_path)
    with pytest.raises(ValueError, match="stage is '7'"):
        Policy.load(write_checkpoint(tmp_path / "a", "3", stage="7"))
    with pytest.raises(ValueError, match="its statistics are None"):
        Policy.load(write_checkpoint(tmp_path / "b", "3", statistics=None))
    with pytest.raises(ValueError, match="does not act; expected joint or vla at stage 3"):
        Policy.load(runs["2"], "joint").act(*views())


# -- the command ----------------------------------------------------------------------------------


def test_windows_lie_inside_held_out_episodes(policy):
    """Nothing is padded, and a seed repeats the windows."""
    batch, again = (
        data.held_out(None, "3", "toy", policy.model.config, policy.statistics, 4, seed=3)
        for _ in range(2)
    )
    assert len(batch.instruction) == 4
    assert batch.video_mask.all() and batch.action_mask.all()
    assert torch.equal(batch.frames, again.frames)


def test_acting_draws_nothing_and_needs_no_drawing_library(runs):
    """A robot's computer may lack matplotlib."""
    program = f"""
import sys
sys.modules["matplotlib"] = None
import numpy as np
from sample import Policy
policy = Policy.load({str(runs["3"])!r}, "vla", steps=1)
policy.act(np.zeros((1, 48, 48, 3), np.uint8), np.zeros((1, 3)), ["push it"])
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_policy_of_own_data_needs_them_to_be_sampled(tmp_path):
    """Held-out episodes of the preset's card are of another robot: the error names the option."""
    robot = Normaliser((0.0,) * 3, (1.0,) * 3)
    known = Statistics("my arm", 3, robot, robot).as_json()
    run = write_checkpoint(tmp_path / "run", "3", statistics=known)
    argv = ["--ckpt", str(run), "--mode", "vla", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="robot is 'my arm'.*; --data names the data"):
        sample.main(argv)


def test_an_unknown_mode_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="mode is 'fly'; expected one of joint, vla"):
        sample.main(["--ckpt", str(tmp_path), "--mode", "joint,fly"])


def test_pictures_of_any_size_are_fitted_to_those_that_were_trained_on(policy):
    """Twice the size, pixel by pixel, shows the policy the same as the size itself."""
    images, states, texts = views()
    images[:] = images[:, :1, :1]  # of one colour each
    found = []
    for seen in (images, images.repeat(2, axis=1).repeat(2, axis=2)):
        policy.generator.manual_seed(1)
        found.append(policy.act(seen, states, texts))
    assert np.allclose(*found, atol=1e-4)


def test_int8_halves_the_maps_of_the_video_expert(runs, tmp_path, capsys):
    """`--int8` samples with another video expert: figures differ, by little."""
    found = []
    for extra in ([], ["--int8"]):
        arguments = ["--ckpt", str(runs["3"]), "--mode", "vgm", "--episodes", "1", "--steps", "1"]
        sample.main([*arguments, "--out", str(tmp_path), *extra])
        figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
        found.append(figures["vgm"]["PSNR (dB)"]["model"])
    assert found[0] != found[1] == pytest.approx(found[0], abs=1)


def test_without_a_checkpoint_the_shipped_policy_shows_its_modes(tmp_path, monkeypatch, capsys):
    """All five of them; what is written goes to runs/, not beside its weights."""
    monkeypatch.chdir(tmp_path)
    before = set(SHIPPED.iterdir())
    sample.main(["--episodes", "1", "--steps", "1"])
    figures = json.loads((tmp_path / "runs" / "samples" / "figures.json").read_text())
    assert figures["figures"].keys() == MODES.keys() and Path(figures["ckpt"]) == SHIPPED
    assert set(SHIPPED.iterdir()) == before


def test_the_command_writes_figures_and_pictures_of_all_modes(runs, tmp_path, capsys):
    """Films where video is predicted, a sheet for every mode, figures as json and as text; a film
    is below 300 kB."""
    sample.main(
        [
            "--ckpt",
            str(runs["3"]),
            "--mode",
            "all",
            "--episodes",
            "1",
            "--steps",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    figures, text = (
        json.loads((tmp_path / "figures.json").read_text())["figures"],
        capsys.readouterr().out,
    )
    assert json.loads((tmp_path / "figures.json").read_text())["episodes"] == 1
    video, actions = {"PSNR (dB)", "PSNR moving (dB)", "SSIM"}, {"action MSE", "action MSE (robot)"}
    assert {mode: set(f) for mode, f in figures.items()} == {
        "joint": video | actions,
        "vla": actions,
        "world_model": video,
        "idm": actions,
        "vgm": video,
    }
    for mode in figures:
        assert (tmp_path / f"{mode}.png").is_file() and f"{mode} " in text
        assert len(list(tmp_path.glob(f"{mode}_?.gif"))) == (
            1 if mode in ("joint", "world_model", "vgm") else 0
        )
    assert max(path.stat().st_size for path in tmp_path.glob("*.gif")) < 300_000


@pytest.mark.parametrize("stage, modes", [("1", {"vgm"}), ("2", {"joint", "vgm"})])
def test_earlier_stages_are_sampled_in_the_modes_they_have(runs, tmp_path, stage, modes):
    """Stage 1 in vgm; stage 2 in joint and vgm, where its latent actions are not compared with
    anything."""
    sample.main(
        [
            "--ckpt",
            str(runs[stage]),
            "--mode",
            "all",
            "--episodes",
            "2",
            "--steps",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert set(figures) == modes and all(
        set(f) == {"PSNR (dB)", "PSNR moving (dB)", "SSIM"} for f in figures.values()
    )


def test_a_bad_command_ends_with_one_line_and_status_2(monkeypatch, capsys):
    """`error: ...` on stderr, no traceback."""
    monkeypatch.setattr(sys, "argv", ["sample", "--ckpt", "no/such/run"])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(sample.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert (
        ending.value.code == 2
        and message.startswith("error: no/such/run holds no checkpoint")
        and message.count("\n") == 1
    )
