"""On a GPU that is not there (ghost.py): nothing mixes devices, nothing is read before it has
arrived, and the host waits as often as a number here says. Commands run in processes of their own,
because the device must be there before torch is."""

import csv
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import small
import torch

import train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or torch.version.cuda is not None,
    reason="the ghost device needs a compiler, and a torch without CUDA",
)


@pytest.fixture(scope="module")
def on_ghost(tmp_path_factory):
    """What a case of ghost_cases.py says, run once."""

    @cache
    def run(case: str, name: str = "case") -> dict:
        folder = tmp_path_factory.mktemp(case) / name
        folder.mkdir()
        command = [sys.executable, str(ROOT / "tests" / "ghost_cases.py"), case, str(folder)]
        hidden = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
        seen = {k: v for k, v in os.environ.items() if k not in hidden}
        ran = subprocess.run(command, capture_output=True, text=True, env=seen)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return json.loads(ran.stdout.splitlines()[-1])

    return run


def waits(steps: list[dict[str, int]]) -> set[int]:
    return {sum(step.values()) for step in steps}


@pytest.mark.slow
def test_every_stage_trains_and_waits_once_a_step(on_ghost, tmp_path):
    """The finite check of loss and gradient norm; and the first stage ends where a CPU's does."""
    found = on_ghost("training")
    assert {stage: waits(run["waits"]) for stage, run in found.items()} == dict.fromkeys("123", {1})
    here = ["--stage", "1", "--data", small.write_card(tmp_path), "--out", str(tmp_path / "run")]
    train.main([*here, "--steps", "5", "--set", *small.SETTINGS, "log_every=5"])
    (row,) = csv.DictReader((tmp_path / "run" / "log.csv").open())
    assert found["1"]["loss"] == [pytest.approx(float(row["loss"]), rel=1e-5)]


@pytest.mark.slow
def test_settings_of_training_change_nothing_about_that(on_ghost):
    """Micro batches, bf16 of both kinds, checkpointing, Muon and AdamW, workers, windows that are
    decoded when they are needed, and resuming."""
    found = on_ghost("settings")
    several = {name: waits(run["waits"]) for name, run in found.items()}
    assert several.pop("decoded when needed") != {0}  # the backbones wait in front of each step
    assert set(map(tuple, several.values())) == {(1,)}
    assert all(torch.tensor(run["loss"]).isfinite().all() for run in found.values())


@pytest.mark.slow
def test_the_five_modes_are_those_of_a_cpu_and_no_euler_step_waits(on_ghost):
    """All modes, and actions first: two more steps cost the host no wait."""
    found = on_ghost("sampling")
    assert len(found["difference"]) == 6 and max(found["difference"].values()) < 1e-5
    assert set(found["waits in two more steps"].values()) == {0}
    assert found["waits of a look"] <= 21
    assert found["text states on"] == ["cpu"], "they would stay on the device for ever"
    assert found["layouts of the VAE"] == [True]


@pytest.mark.slow
def test_no_window_of_a_cache_is_read_before_it_has_arrived(on_ghost):
    """Seventy windows of each stage, more than one batch of the backbones, and training on them."""
    found = on_ghost("caches")
    assert found["garbage"] == dict.fromkeys("123", 0)
    assert waits(found["from a cache"]["waits"]) == {1}


@pytest.mark.slow
def test_sampling_evaluating_and_measuring_mix_no_devices(on_ghost):
    """sample, its --int8 too, evaluate, and both tables of bench --gpu."""
    assert on_ghost("commands") == {"rows": 13}


@pytest.mark.slow
def test_latent_actions_of_videos_mix_no_devices(on_ghost):
    """encode, tokens and pretrain, with true and with measured flow, with labels and without, and
    training on the tokens."""
    assert set(on_ghost("motions")["files of tokens"].values()) == {3}


@pytest.mark.slow
def test_backbones_are_pretrained(on_ghost):
    assert "vae.safetensors" in on_ghost("backbones")["files"]


@pytest.mark.slow
def test_a_day_on_a_gpu_has_a_row_for_every_number_and_stops_at_a_wrong_one(on_ghost):
    """Agreement, five modes, training, chunks and kernels; a step that holds more than the plan
    says is refused by name, and the table says how far it got."""
    found = on_ghost("day")
    whats = ("from the CPU's", "toy, idm", "toy, world_model", "loss, of the first", "MFU")
    assert all(what in found["whole"] for what in (*whats, "joint_attention", "CUDA graphs"))
    assert "memory, of the plan's" in found["wrong"]
    assert "memory" in found["stopped"].splitlines()[-1]


# Of three layers, whatever the preset has, for all are the same block; as many forward as backward.
GRAPHS = {
    "small_1_selective": 4,
    "small_2_full": 6,
    "small_3_full": 6,
    "small_3_selective": 6,
    "small_3_sampler": 1,
    "full_1_selective": 4,
    "full_2_selective": 6,
    "full_3_selective": 6,
    "full_3_sampler": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_compiled_layers_and_sampler_lower_to_a_gpu_in_a_fresh_process(on_ghost, name):
    """With checkpointing, as `--full` trains, at its widths too: no graph breaks, although nothing
    ran before; every kernel is compiled to machine code for sm_90, and the optimizer steps."""
    pytest.importorskip("triton")
    found = on_ghost("compiling", name)
    assert found["graphs"] == GRAPHS[name]
    assert found["kernels"] > 0 and found["calls of motus"] > 0


def test_tests_do_not_see_a_gpu(tmp_path):
    """On a machine that has one, the suite runs as on one that has none; only tests marked `gpu`
    see it, with -m gpu."""
    lines = ["import torch, pytest", "@pytest.mark.gpu", "def test_none():"]
    lines.append("    assert not torch.cuda.is_available()")
    (tmp_path / "test_it.py").write_text("\n".join(lines))
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    seen = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ghost", str(tmp_path)]
    results = []
    for marked in ([], ["-m", "gpu"]):
        ran = subprocess.run([*command, *marked], cwd=tmp_path, capture_output=True, env=seen)
        results.append(ran.returncode)
    assert results == [0, 1]
