"""The truth of the modes: a detector that reads true pictures, a simulator that answers what other
actions would have done, figures that a perfect policy passes and a deaf one does not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from formats.statistics import Normaliser, Statistics
from motus import Prediction
from scripts import detector, truth
from scripts.detector import Detector, examples
from scripts.truth import MOVED, Truth, away, execute, interval, observed, r2
from weights.load import load_part

UNITS = Normaliser(*[[0.0] * 3, [1.0] * 3] * 3)


class Oracle:
    """A policy that knows the simulator, with a VAE that loses the last three bits; if `deaf`, its
    world model does not read the actions, and in its videos nothing moves."""

    device, steps = "cpu", 2
    model = SimpleNamespace(config=SimpleNamespace(chunk=12))
    statistics = Statistics("gripper", 3, UNITS, UNITS)

    def __init__(self, deaf: bool = False):
        self.deaf = deaf
        self.generator = torch.Generator()
        self.backbones = self

    def conditions(self, frames, texts, *_):
        return {"latents": frames, "context": torch.zeros(len(texts)), "context_len": None}

    def decode_video(self, latents):
        return latents // 8 * 8

    encode_video = decode_video

    def sample(self, inputs, mode):
        done = execute(self.world, self, inputs.actions)
        film, actions, _ = execute(self.world, self)
        if mode == "world_model" and not self.deaf:
            film = done.frames
        if mode == "vgm" and self.deaf:
            film = film[:, :1].expand_as(film)
        acts = mode in ("joint", "vla", "idm")
        return Prediction(None if mode in ("vla", "idm") else film, actions if acts else None)


def asked(count: int, deaf: bool = False) -> Truth:
    policy = Oracle(deaf)
    policy.world = observed(count, 1)
    return Truth(policy, policy.world)


@pytest.fixture(scope="module")
def seen() -> Truth:
    return asked(64)


def test_the_detector_reads_true_pictures_to_half_a_pixel(seen):
    """Gripper and discs of layouts it was not trained on; a colour that no disc has is not
    there."""
    film = seen.own.frames
    gripper, discs, there = seen.seen(film)
    assert np.median(away(gripper, seen.own.shot.effector)) < 0.5
    assert np.median(away(discs, seen.own.shot.discs)) < 0.5 and there.mean() > 0.97
    _, logits = seen.detector(film[:, -1])
    absent = [set(range(4)) - set(colours) for colours in seen.world.colours.tolist()]
    absent = np.array([colours.pop() for colours in absent])
    assert (logits[np.arange(len(film)), 1 + absent] > 0).float().mean() < 0.05


def test_examples_say_what_the_simulator_knows():
    """Places in 0 to 1, in the order gripper, red, green, blue, yellow; three colours of four."""
    frames, places, there = examples(1)
    assert len(frames) == len(places) == len(there)
    assert there[:, 0].all() and (there[:, 1:].sum(dim=1) == 3).all()
    inside = places[there]
    assert inside.min() >= 0 and inside.max() <= 1 and not places[~there].any()


def test_the_detector_is_trained_and_written_by_its_command(tmp_path):
    detector.main(["--out", str(tmp_path / "d.safetensors"), "--episodes", "1", "--steps", "2"])
    written = load_part(tmp_path / "d.safetensors", Detector, detector.DetectorConfig)
    shapes = {name: x.shape for name, x in Detector.shipped().state_dict().items()}
    assert {name: x.shape for name, x in written.state_dict().items()} == shapes


def test_worlds_begin_in_the_middle_of_what_the_expert_does():
    """Some have not begun, some hold a disc, and the same seed gives the same worlds."""
    world, again = observed(64, 3), observed(64, 3)
    assert np.array_equal(world.render(), again.render())
    assert 0.05 < world.held.any(axis=1).mean() < 0.8
    assert not np.array_equal(world.render(), observed(64, 4).render())


def test_the_simulator_carries_out_any_actions_from_the_same_state(seen):
    """The expert's own actions give the expert's film again, but for how they are rounded; those
    of another episode another one, and neither touches the worlds."""
    before = seen.world.render()
    again = execute(seen.world, seen.policy, seen.own.actions)
    assert (again.frames != seen.own.frames).float().mean() < 1e-3
    assert away(again.shot.effector, seen.own.shot.effector).max() < 1e-3
    other = execute(seen.world, seen.policy, seen.own.actions.roll(1, 0))
    assert torch.equal(other.frames[:, 0], seen.own.frames[:, 0])
    assert np.median(away(other.shot.effector, seen.own.shot.effector)) > 3
    assert np.array_equal(seen.world.render(), before)


def test_a_world_that_wanders_has_no_task_and_moves():
    world = observed(16, 2)
    world.wander()
    done = execute(world, Oracle())
    assert world.instruction == [""] * 16 and not execute(world, Oracle()).actions.isnan().any()
    assert np.median(away(done.shot.effector, world.effector)) > 3
    assert torch.equal(done.frames, execute(world, Oracle()).frames)


def test_a_perfect_policy_passes_and_a_deaf_one_does_not(seen):
    """Every figure of the table, of a policy that answers with the simulator."""
    perfect, deaf = (
        {name: interval(*figure)[0] for name, *figure in one.figures()}
        for one in (seen, asked(64, deaf=True))
    )
    other = "world_model, other actions"
    for who in ("true films", "VAE", "joint", "vgm", "world_model", other, "joint, replayed"):
        name = "gripper, px from its film" if "replayed" in who else "gripper, px"
        assert perfect[f"{who}: {name}"] < 0.6
    for who in ("true films", "joint", "world_model"):
        assert perfect[f"{who}: moved disc, px"] < 0.6
        assert perfect[f"{who}: moved disc there"] > 0.97
    assert perfect[f"{other}: times as far from own"] > 3
    for name in ("x, R2", "y, R2", "opening, R2"):
        assert perfect[f"idm: {name}"] == pytest.approx(1)
    assert perfect["joint, idm of its film: R2"] == pytest.approx(1)
    assert perfect["vgm: obeys"] > 0.9
    assert perfect["VAE: SSIM"] > 0.9 and perfect["VAE: PSNR dB"] > 33
    assert perfect["world_model: sharpness"] == pytest.approx(1)
    assert perfect["world_model: above vgm, dB"] == pytest.approx(0)
    assert deaf[f"{other}: times as far from own"] == pytest.approx(1)
    assert deaf[f"{other}: gripper, px"] > 3
    assert deaf["vgm: obeys"] < 0.1 and deaf["world_model: above vgm, dB"] > 5


def test_a_film_obeys_only_if_the_named_disc_moves_towards_its_goal(seen):
    """True films do, a film in which nothing moves does not; asked are windows in which the expert
    moves the disc."""
    still = seen.own.frames[:, :1].expand_as(seen.own.frames)
    moved = away(seen.own.shot.discs, seen.world.discs)[seen.world.named] > MOVED
    obeys = seen.obeys(seen.own.frames)
    assert 10 < len(obeys) <= moved.sum()
    assert obeys.mean() > 0.9 and seen.obeys(still).mean() < 0.1


def test_a_blurred_film_is_not_sharp_and_loses_decibels(seen):
    """A film that is blurred has less gradient, and one with an error of a tenth 20 dB."""
    film = seen.own.frames
    blurred = torch.nn.functional.avg_pool3d(film.float(), (3, 3, 1), 1, (1, 1, 0)).byte()
    moving, error, energy, region = (x.sum() for x in seen.looks(blurred))
    assert energy < 0.8 * seen.looks(film)[2].sum() and 0 < region < len(film)
    dark = film.clamp(max=229) + 25.5
    _, error, _, _ = seen.looks(dark.clamp(max=255))
    _, clean, _, _ = seen.looks(film)
    assert not clean.any() and truth.decibels(np.ones(64), error) == pytest.approx(20, abs=1)


def test_intervals_hold_their_figure_and_shrink_with_more_rows():
    rng = np.random.default_rng(0)
    few, many = (interval(np.mean, rng.standard_normal(n)) for n in (30, 3000))
    for value, low, high in (few, many):
        assert low < value < high
    assert many[2] - many[1] < 0.3 * (few[2] - few[1])
    x = torch.tensor(rng.standard_normal((50, 12)))
    assert r2(x, x) == 1 and abs(r2(x.mean(dim=0).expand_as(x), x)) < 1e-9


def test_a_policy_of_another_robot_is_refused(monkeypatch):
    """One line that names the checkpoint, its robot and the one that is expected."""
    arm = SimpleNamespace(statistics=SimpleNamespace(embodiment="arm"))
    monkeypatch.setattr(truth.Policy, "load", lambda *_: arm)
    with pytest.raises(ValueError, match="runs/x acts as arm; expected the toy's gripper"):
        truth.main(["--ckpt", "runs/x", "--windows", "2"])


def test_the_command_measures_the_shipped_policy(tmp_path, capsys):
    """One table with a column per number of steps; the json file holds the same figures."""
    truth.main(["--windows", "16", "--steps", "1", "2", "--out", str(tmp_path / "t" / "t.json")])
    table = capsys.readouterr().out
    figures = json.loads((tmp_path / "t" / "t.json").read_text())["figures"]
    assert "| 1 steps | 2 steps |" in table
    for kind in ("expert", "random"):
        for name in ("world_model: gripper, px", "idm: opening, R2", "VAE: SSIM"):
            assert f"{kind}, {name}" in table and len(figures[f"{kind}, {name}"]) == 2
    assert "expert, vgm: obeys" in figures and "random, vgm: obeys" not in figures
    for values in figures.values():
        assert all(len(value) == 3 for value in values)
