"""Training: the table of stages, resume, and what happens when something is wrong."""

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from backbones import frozen
from backbones.frozen import Backbones
from motus import Motus
from sample import Policy
from scale import checkpoints
from scripts import record
from weights import card
from weights.card import newest_step
from weights.files import save_safetensors
from worlds.fleet import Order

SMALL = ["--set", "episodes=2", "windows=16", "batch=4", "log_every=1"]


def run(*argv: str) -> None:
    train.main([*argv, *SMALL])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps of every stage, one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    run("--stage", "1", "--run", str(folder / "s1"), "--steps", "4")
    train.main(
        [
            "--stage",
            "latent",
            "--run",
            str(folder / "latent"),
            "--steps",
            "4",
            "--set",
            "episodes=3",
            "batch=20",
        ]
    )
    run(
        "--stage",
        "2",
        "--init",
        str(folder / "s1"),
        "--latent",
        str(folder / "latent"),
        "--run",
        str(folder / "s2"),
        "--steps",
        "4",
    )
    run("--stage", "3", "--init", str(folder / "s2"), "--run", str(folder / "s3"), "--steps", "4")
    return folder


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(newest_step(path) / "ema.safetensors")


def test_stage_1_trains_the_video_expert_alone(runs):
    """Action and understanding expert keep their first weights."""
    before = Motus(train.preset("toy", finetune=False, ratio=1, action_dim=14))
    train.initialise(before, None, train.STAGES["1"], "1", seed=0)
    before = before.state_dict()
    after = weights(runs / "s1")
    changed = {
        name.split(".")[0]
        for name in after
        if not torch.allclose(after[name], before[name].float(), atol=1e-7)
    }
    assert changed == {"video"}


def test_stage_3_carries_the_blocks_over_and_starts_encoders_fresh(runs, tmp_path):
    """After no step at all, blocks are those of stage 2; the action encoder has the robot's
    dimensions."""
    s2 = weights(runs / "s2")
    model = Motus(train.preset("toy"))
    train.initialise(model, runs / "s2", train.STAGES["3"], "3")
    ours = model.state_dict()
    for name in ("action.blocks.0.qkv", "video.head.head.weight", "und.vlm_adapter.0.weight"):
        assert torch.equal(ours[name], s2[name])
    assert [x["action.input_encoder.action_encoder.0.weight"].shape[1] for x in (ours, s2)] == [
        3,
        14,
    ]
    assert not ours["action.decoder.action_head.0.weight"].any()


def test_every_stage_leaves_a_log_a_curve_and_a_card(runs):
    """A run can be read without running anything."""
    for name, losses in (
        ("s1", ["video"]),
        ("s2", ["video", "action"]),
        ("s3", ["video", "action"]),
    ):
        rows = list(csv.DictReader((runs / name / "log.csv").open()))
        assert [int(r["step"]) for r in rows] == [1, 2, 3, 4] and all(
            float(r[x]) > 0 for r in rows for x in losses
        )
        assert (runs / name / "curve.png").stat().st_size > 1000
        assert (
            json.loads((newest_step(runs / name) / "config.json").read_text())["stage"] == name[1]
        )
    card = json.loads((newest_step(runs / "s3") / "config.json").read_text())
    assert (
        card["statistics"]["embodiment"] == "gripper"
        and len(card["statistics"]["actions"]["mean"]) == 3
    )


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs, tmp_path, monkeypatch):
    """Stop after 2 of 4 steps, go on: the same weights, the same EMA, the same optimizer, the same
    log."""
    whole = runs / "s3"
    part = tmp_path / "part"
    argv = ["--stage", "3", "--init", str(runs / "s2"), "--run", str(part), "--steps", "4"]
    save = checkpoints.save_checkpoint

    def stop_after_two(saver, step, *rest):
        save(saver, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train.main([*argv, *SMALL, "save_every=2"])
    monkeypatch.undo()
    assert newest_step(part).name == "step_000002"
    train.main([*argv, "--resume", *SMALL])
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(newest_step(x) / f"{name}.safetensors") for x in (whole, part))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    measured = ("samples_per_s", "tokens_per_s", "data_wait_s", "memory_gb")
    drop = lambda path: [
        {k: v for k, v in r.items() if k not in measured}
        for r in csv.DictReader((path / "log.csv").open())
    ]
    assert drop(whole) == drop(part)


def test_cached_windows_train_to_the_same_weights(runs, tmp_path):
    """Encoded beforehand or at the start: the same run. A cache of other levels is refused."""
    file = tmp_path / "windows.safetensors"
    data.main(["cache", "--levels", "6", "--episodes", "2", "--windows", "16", "--out", str(file)])
    run(
        "--stage",
        "3",
        "--init",
        str(runs / "s2"),
        "--cache",
        str(file),
        "--run",
        str(tmp_path / "cached"),
        "--steps",
        "4",
    )
    a, b = weights(runs / "s3"), weights(tmp_path / "cached")
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="cut for another model|holds levels"):
        run("--stage", "1", "--cache", str(file), "--run", str(tmp_path / "wrong"), "--steps", "1")


def test_resuming_with_other_settings_is_refused(runs):
    """The error names the setting and the remedy."""
    with pytest.raises(ValueError, match="batch=4, this run has batch=5.*--set batch=4"):
        train.main(
            [
                "--stage",
                "3",
                "--run",
                str(runs / "s3"),
                "--steps",
                "4",
                "--resume",
                *SMALL,
                "batch=5",
            ]
        )


def test_an_existing_run_is_never_overwritten(runs):
    """Refuse, and say how to go on."""
    with pytest.raises(ValueError, match="exists; continue it with --resume, or name another"):
        run("--stage", "1", "--run", str(runs / "s1"))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stage", "4"], "--stage is '4'; allowed: 1, 2, 3, latent, backbones"),
        (["--stage", "1", "--preset", "tox"], "preset is 'tox'; allowed: toy, sim, small, full"),
        (["--stage", "1", "--set", "stepz=3"], "unknown key 'stepz'.*did you mean 'steps'"),
        (["--stage", "1", "--set", "steps=many"], "--set steps takes int, found 'many'"),
        (["--stage", "1", "--set", "steps"], "--set takes key=value, found 'steps'"),
        (["--stage", "2", "--set", "episodes=2", "windows=4"], "name their encoder with --latent"),
        (
            ["--stage", "3", "--init", "no/such/run", "--set", "episodes=2", "windows=4"],
            "holds no checkpoint",
        ),
    ],
)
def test_bad_arguments_end_in_one_clear_error(argv, words, tmp_path):
    """Unknown stage, preset or key; missing files."""
    with pytest.raises(ValueError, match=words):
        train.main([*argv, "--run", str(tmp_path / "run")])


def test_a_checkpoint_of_another_shape_is_refused(runs, tmp_path):
    """The error says which sizes differ."""
    other = Motus(train.preset("toy"))
    object.__setattr__(other.config.video, "width", 96)
    config = train.replace(other.config, video=train.replace(other.config.video, width=48))
    with pytest.raises(ValueError, match="video expert .*Use the same preset"):
        train.initialise(Motus(config), runs / "s2", train.STAGES["3"], "3")


@pytest.mark.parametrize("damage", ["truncated", "corrupt header", "missing tensor"])
def test_a_damaged_weights_file_is_refused(runs, tmp_path, damage):
    """Truncated, corrupted or incomplete: one ValueError that names the file."""
    copy = shutil.copytree(newest_step(runs / "s3"), tmp_path / "step_000004")
    file = copy / "ema.safetensors"
    raw = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage == "corrupt header":
        file.write_bytes(raw[:20] + b"\xff" * 20 + raw[40:])
    else:
        tensors = load_file(file)
        tensors.pop("video.head.head.bias")
        save_safetensors(file, tensors)
    with pytest.raises(ValueError, match="ema.safetensors"):
        Motus.from_pretrained(copy)


def test_a_loss_that_is_not_finite_stops_before_the_update(runs, tmp_path, monkeypatch):
    """The error names the step and the windows; the weights stay as they were."""
    kept = {}
    total = train.Losses.total

    def poison(self, *args):
        value = total(self, *args)
        kept["calls"] = kept.get("calls", 0) + 1
        return value * float("nan") if kept["calls"] == 3 else value

    monkeypatch.setattr(train.Losses, "total", poison)
    with pytest.raises(ValueError, match=r"step 2: loss nan.*windows \[.*Nothing was updated"):
        train.main(
            ["--stage", "1", "--run", str(tmp_path / "nan"), "--steps", "6", *SMALL, "save_every=1"]
        )
    assert newest_step(tmp_path / "nan").name == "step_000002"
    assert all(v.isfinite().all() for v in weights(tmp_path / "nan").values())


def test_backbones_are_pretrained_by_one_command(tmp_path):
    """Two steps of each: the folder it writes is one that everything else can start from."""
    train.main(
        ["--stage", "backbones", "--run", str(tmp_path), "--steps", "2", "--set", "episodes=2"]
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "card.json",
        "dcae.safetensors",
        "text.json",
        "text.safetensors",
        "vae.safetensors",
        "vlm.json",
        "vlm.safetensors",
    }
    backbones = Backbones.load(tmp_path, train.TOY.video.text_len)
    frames = torch.zeros(1, 5, 48, 48, 3, dtype=torch.uint8)
    inputs = backbones.inputs(frames, ["push the red disc to the left"])
    assert inputs.latents.shape == (1, 24, 2, 6, 6) and inputs.und.shape[2] == train.TOY.vlm_dim
    assert (
        json.loads((tmp_path / "card.json").read_text())["command"]
        == "python train.py --stage backbones --steps 2"
    )


def test_backbones_that_are_kept_are_those_of_the_repository(tmp_path):
    """`--keep` copies parts and pre-trains the rest; it needs a folder of its own and knows the
    parts."""
    keep = ["--stage", "backbones", "--steps", "2", "--set", "episodes=2", "--keep"]
    train.main([*keep, "vae,vlm,dcae", "--run", str(tmp_path / "new")])
    same = {
        file.name: file.read_bytes() == (tmp_path / "new" / file.name).read_bytes()
        for file in frozen.BACKBONES["toy"].iterdir()
    }
    assert {name for name in same if not same[name]} - {"text.json"} == {
        "text.safetensors",
        "card.json",
    }  # the words of its episodes
    assert json.loads((tmp_path / "new/card.json").read_text())["kept"] == ["vae", "vlm", "dcae"]
    for bad in (["eyes", "--run", str(tmp_path / "x")], ["vae"]):
        with pytest.raises(
            ValueError, match="allowed: parts among text, vlm, vae, dcae, and a folder"
        ):
            train.main([*keep, *bad])


def test_backbones_of_a_simulator_are_pretrained_from_a_card(tmp_path, monkeypatch):
    """Two steps of each on what `evaluate.py record` wrote; stage 3 of that preset then trains on
    the same recording with those of the folder that MOTUS_BACKBONES names, and its checkpoint acts
    with no others."""
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    monkeypatch.setenv("MOTUS_BACKBONES", str(tmp_path / "weights"))
    record.record(
        Order("fake_world", settings=(("size", 32),), after=1), ["walk"], 20, tmp_path / "set"
    )
    sim = ["--preset", "sim", "--data", str(tmp_path / "set")]
    train.main(["--stage", "backbones", *sim, "--run", str(tmp_path / "weights"), "--steps", "2"])
    figures = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert (
        figures["command"]
        == f"python train.py --stage backbones --preset sim --data {tmp_path / 'set'} --steps 2"
    )
    assert {
        "vlm_named_object_found",
        "vlm_position_error_px",
        "vlm_error walked",
        "vae_psnr_moving_db",
    } < set(figures)
    train.main(
        [
            "--stage",
            "3",
            *sim,
            "--run",
            str(tmp_path / "run"),
            "--steps",
            "1",
            "--set",
            "windows=4",
            "batch=2",
        ]
    )
    assert card.Card.read(newest_step(tmp_path / "run") / "config.json").motus.action_dim == 1
    assert (
        Policy.load(tmp_path / "run").backbones.fingerprint()
        == Backbones.load(tmp_path / "weights").fingerprint()
    )
    monkeypatch.delenv("MOTUS_BACKBONES")
    with pytest.raises(ValueError, match="other frozen backbones than these .*MOTUS_BACKBONES"):
        Policy.load(tmp_path / "run")
    for arguments in (["--preset", "sim"], ["--preset", "small", "--data", "x"]):
        with pytest.raises(ValueError, match="backbones are made for presets toy, sim"):
            train.main(["--stage", "backbones", *arguments])


# -- settings of large runs, each alone -----------------------------------------------------------


def test_weight_decay_leaves_out_vectors_and_tables_unless_asked():
    """By default matrices alone; `decay=all` is the official behaviour. Every trained parameter is
    in one group."""
    model = Motus(train.preset("toy"))
    for decay, wanted in (("matrices", False), ("all", True)):
        (optimizer,) = train.make_optimizers(model, train.Settings(decay=decay), train.EXPERTS)
        groups = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert len(groups) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            vector = p.dim() == 1 or name.endswith(("modulation", "registers"))
            assert groups[id(p)] == (0.01 if not vector or wanted else 0.0), name


def test_muon_takes_the_steps_of_torchs_own():
    """Three steps on square, wide and tall matrices: what they add differs by the rounding of
    torch's bf16 iteration."""
    generator = torch.Generator().manual_seed(0)
    start = [
        torch.randn(shape, generator=generator) for shape in ((16, 16), (16, 16), (8, 24), (24, 8))
    ]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = (
        train.Muon([dict(params=ours)], lr=0.1, weight_decay=0.01),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, x in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - x).norm()


def test_the_video_expert_has_a_rate_of_its_own():
    """`video_lr`; 0 gives it that of the others."""
    model = Motus(train.preset("toy"))
    for video_lr, wanted in ((0.5, 0.5), (0.0, 0.1)):
        (optimizer,) = train.make_optimizers(
            model, train.Settings(lr=0.1, video_lr=video_lr), train.EXPERTS
        )
        bases = {id(p): group["base"] for group in optimizer.param_groups for p in group["params"]}
        assert {bases[id(p)] for p in model.video.parameters()} == {wanted} and {
            bases[id(p)] for p in model.und.parameters()
        } == {0.1}


@pytest.mark.parametrize(
    "schedule, half, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_the_rate_warms_up_and_falls_to_its_floor(schedule, half, end):
    """Hand-sized: warm-up of 4 steps, horizon of 100."""
    (optimizer,) = train.make_optimizers(Motus(train.preset("toy")), train.Settings(), ("video",))
    settings = train.Settings(steps=1000, warmup=4, horizon=100, schedule=schedule)
    rates = []
    for step in (0, 50, 100, 500):
        train.set_lr([optimizer], settings, step)
        rates.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["base"])
    assert rates[0] == pytest.approx(0.25, rel=0.01) and rates[1:] == pytest.approx(
        [half, end, end]
    )


@pytest.mark.parametrize("given", [0.0, 0.5])
def test_each_rank_draws_its_rows_of_the_noise_of_one_process(given):
    """Two ranks draw the halves of that, with a modality given or not."""
    pool = data.Pool(
        train.Inputs(
            torch.zeros(6, 24, 2, 6, 6),
            torch.zeros(6, 3, 48),
            torch.ones(6, dtype=torch.int64),
            actions=torch.zeros(6, 12, 3),
        ),
        torch.ones(6),
    )
    settings = train.Settings(batch=4, steps=3, given=given)
    steps = [
        train.Steps(pool, settings, train.scale.Ranks(*place)) for place in ((0, 1), (0, 2), (1, 2))
    ]
    (_, whole, have), (_, first, _), (_, second, _) = (part[2] for part in steps)
    assert have == ((whole["t_video"] > 0).sum(), (whole["t_action"] > 0).sum())
    assert all(torch.equal(torch.cat([first[name], second[name]]), whole[name]) for name in whole)
    assert (whole["t_video"] == 0).any() == bool(given)


def test_parts_of_a_batch_add_up_to_its_loss():
    """Also where they hold unequal numbers of samples with actions."""
    torch.manual_seed(0)
    has = torch.tensor([True, False, False, True, True, True])
    whole = train.Losses(torch.rand(6), torch.rand(6) * has, torch.rand(6), torch.rand(6), has)
    parts = [train.Losses(*(x[i : i + 2] for x in whole)) for i in (0, 2, 4)]
    assert sum(part.total(1.0, 2.0, videos=6, acting=4) for part in parts).item() == pytest.approx(
        whole.total(1.0, 2.0).item()
    )


def test_weights_may_be_bf16_and_the_average_is_not(runs, tmp_path):
    """`params=bf16` halves weights and moments; a resumed run goes on with them; the log has all
    its columns."""
    argv = ["--stage", "1", "--run", str(tmp_path / "bf16"), "--steps", "3"]
    settings = [
        *SMALL,
        "params=bf16",
        "precision=bf16",
        "micro=2",
        "peak=1",
        "checkpointing=selective",
    ]
    train.main([*argv, *settings, "minutes=1e-9"])
    assert newest_step(tmp_path / "bf16").name == "step_000001"
    train.main([*argv, "--resume", *settings])
    stored = {
        name: load_file(newest_step(tmp_path / "bf16") / f"{name}.safetensors")
        for name in ("model", "ema", "optimizer")
    }
    assert {x.dtype for x in stored["model"].values()} == {torch.bfloat16} and {
        x.dtype for x in stored["ema"].values()
    } == {torch.float32}
    assert all(
        x.dtype == torch.bfloat16 for name, x in stored["optimizer"].items() if "exp" in name
    )
    rows = list(csv.DictReader((tmp_path / "bf16" / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert all(
        float(row[name]) > 0
        for row in rows
        for name in (
            "loss",
            "video",
            "grad_norm",
            "samples_per_s",
            "tokens_per_s",
            "mfu",
            "data_wait_s",
            "memory_gb",
        )
    )


def test_a_tracker_beside_the_csv_gets_the_same_row(tmp_path, monkeypatch):
    """A stand-in for wandb."""
    said = []
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(init=lambda **_: None, log=lambda row, step: said.append((step, row))),
    )
    log = train.Log(tmp_path / "log.csv", 0, to="wandb")
    log.add("loss", 2.0)
    row = log.row(7)
    assert said == [(7, row)] and row["loss"] == 2.0
    assert next(csv.DictReader((tmp_path / "log.csv").open()))["loss"] == "2"


def test_tensorboard_gets_every_number_of_a_row(tmp_path):
    """The real one, where it is installed: what is read back is what the csv holds."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = train.Log(tmp_path / "log.csv", 0, to="tensorboard")
    log.add("loss", 2.0)
    log.row(7)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.0)]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    """With the command that installs it, before anything is trained."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="log_to=wandb: .*pip install wandb"):
        train.Log(tmp_path / "log.csv", 0, to="wandb")


def test_a_log_that_finds_no_room_says_which_file(tmp_path):
    """And how to go on."""
    log = train.Log(tmp_path / "log.csv", 0)
    log.path = Path("/dev/full")
    with pytest.raises(
        ValueError,
        match="/dev/full could not be written: .*No space left on device; free space and continue",
    ):
        log.row(1)
