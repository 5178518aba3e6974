"""Training: the table of stages, resume, and what happens when something is wrong."""

import csv
import itertools
import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import train
from flow import Losses
from motus import EXPERTS, PRESETS, Motus, preset
from scale import batches, muon, plan
from scale.checkpoints import RunState
from scale.log import Log
from scale.muon import Muon
from scale.ranks import Ranks
from scale.sharding import initialise
from scale.synthetic import Synthetic
from weights.card import Card, newest_step, steps_of
from weights.files import save_safetensors

SMALL = ["--set", *small.SETTINGS]
pytestmark = pytest.mark.xdist_group("train")  # one process makes its runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps of every stage, by one command."""
    folder = tmp_path_factory.mktemp("runs")
    card = small.write_card(folder)
    train.main(["--data", card, "--out", str(folder / "all"), "--steps", "4", *SMALL])
    return folder / "all"


@pytest.fixture
def stage3(runs, tmp_path):
    """The command of stage 3 alone, to another folder."""
    card, init = str(runs.parent / "card.json"), str(runs / "stage2")
    return ["--stage", "3", "--data", card, "--init", init, "--out", str(tmp_path / "run")]


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(newest_step(path) / "ema.safetensors")


def log_rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "log.csv").open()))


# -- stages ---------------------------------------------------------------------------------------


def test_stage_1_trains_the_video_expert_alone(runs):
    """Action and understanding expert keep their first weights."""
    before = Motus(preset("toy", "1"))
    initialise(before, None, "1", seed=0)
    before, after = before.state_dict(), weights(runs / "stage1")
    changed = {name for name in after if not torch.allclose(after[name], before[name], atol=1e-7)}
    assert {name.split(".")[0] for name in changed} == {"video"}


def test_stage_3_carries_the_blocks_over_and_starts_encoders_fresh(runs):
    """After no step at all, blocks are those of stage 2; the action encoder has the robot's
    dimensions."""
    stage2 = weights(runs / "stage2")
    model = Motus(preset("toy"))
    initialise(model, runs / "stage2", "3")
    ours = model.state_dict()
    for name in ("action.blocks.0.qkv", "video.head.head.weight", "und.vlm_adapter.0.weight"):
        assert torch.equal(ours[name], stage2[name])
    first = "action.input_encoder.action_encoder.0.weight"
    assert [x[first].shape[1] for x in (ours, stage2)] == [3, 14]
    assert not ours["action.decoder.action_head.0.weight"].any()


def test_every_stage_leaves_a_log_a_curve_and_a_card(runs):
    """A run can be read without running anything."""
    for stage, losses in (("1", ["video"]), ("2", ["video", "action"]), ("3", ["video", "action"])):
        run = runs / f"stage{stage}"
        rows = log_rows(run)
        assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
        assert all(float(row[name]) > 0 for row in rows for name in losses)
        with Image.open(run / "curve.png") as curve:  # a panel for each loss, and no other
            assert curve.size == (495 * len(losses), 352)
        assert Card.read(newest_step(run) / "config.json").stage == stage
    latent = runs / "latent"
    assert [int(row["step"]) for row in log_rows(latent)] == [1, 2, 3, 4]
    figures = json.loads((latent / "figures.json").read_text())["probe R2"]
    assert list(figures) == [f"level {n}" for n in (2, 3, 4, 5, 6)]
    assert all(len(values) == 3 for values in figures.values())
    card = Card.read(newest_step(runs / "stage3") / "config.json")
    assert card.statistics["embodiment"] == "gripper"
    assert len(card.statistics["actions"]["mean"]) == 3
    assert set(card.backbones) == {"vae", "text", "vlm"}
    assert Card.read(newest_step(runs / "stage2") / "config.json").latent_interval == 3


def test_stages_that_are_finished_are_skipped_and_begun_ones_resumed(runs, tmp_path, capsys):
    """The same command again trains nothing; with one folder gone it trains that stage alone, with
    a folder that holds no checkpoint yet as well."""
    copy = shutil.copytree(runs, tmp_path / "all")
    card = str(runs.parent / "card.json")
    argv = ["--data", card, "--out", str(copy), "--steps", "4", *SMALL]
    train.main(argv)
    said = capsys.readouterr().out
    assert [said.count(f"stage {n} is finished") for n in ("1", "latent", "2", "3")] == [1] * 4
    before = weights(copy / "stage3")
    shutil.rmtree(newest_step(copy / "stage3"))
    train.main(argv)
    said = capsys.readouterr().out
    assert said.count("is finished") == 3 and "stage 3: 6" in said
    after = weights(copy / "stage3")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_missing_is_one_error_before_anything_is_trained(tmp_path, monkeypatch):
    """Each with the command that gets it: for the full model all of it."""
    monkeypatch.setenv("MOTUS_BACKBONES", str(tmp_path))
    with pytest.raises(ValueError, match="^missing, before anything is trained") as error:
        train.main(["--full", "--out", str(tmp_path / "run")])
    for words in (
        "dataset card: python data.py inspect",
        f"{tmp_path}/wan: python -m weights download wan",
        f"{tmp_path}/qwen3vl: python -m weights download qwen3vl",
        f"{tmp_path}/dcae: python -m weights download dcae",
    ):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 5 and not (tmp_path / "run").exists()
    card = json.loads(Path(small.write_card(tmp_path)).read_text())
    card["sources"] = card["sources"][-1:]
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="sources are of levels .6.; this stage takes .2, 3, 5."):
        train.main(["--data", str(tmp_path / "card.json"), "--out", str(tmp_path / "run")])


def test_a_latent_run_that_is_refused_leaves_no_folder(tmp_path):
    """All rows labelled: refused after the data are read, and the same command again is refused for
    the same reason, not for a folder that is there. Without --stage an empty folder is no run."""
    source = {"path": "world:toy", "level": 4, "embodiment": "gripper", "episodes": 2}
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"video_hz": 5, "sources": [source]}))
    argv = ["--stage", "latent", "--data", str(card), "--out", str(tmp_path / "run")]
    for _ in range(2):
        with pytest.raises(ValueError, match="rows are labelled and 0 are not"):
            train.main([*argv, "--steps", "1"])
        assert not (tmp_path / "run").exists()
    (tmp_path / "all/stage1").mkdir(parents=True)
    args = train.parse(["--data", str(card), "--out", str(tmp_path / "all")])
    assert [job.resume for job in train.planned(args)] == [None] * 4


# -- resume ---------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runs, stage3, monkeypatch):
    """Stop after 2 of 4 steps, go on: the same weights, the same EMA, the same optimizer, the same
    log."""
    part, argv = Path(stage3[-1]), [*stage3, "--steps", "4"]
    save = RunState.save

    def stop_after_two(state, saver, step):
        save(state, saver, step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train.main([*argv, *SMALL, "save_every=2"])
    monkeypatch.undo()
    assert newest_step(part).name == "step_000002"
    train.main([*argv, "--resume", *SMALL])
    for name in ("model", "ema", "optimizer"):
        paths = [newest_step(run) / f"{name}.safetensors" for run in (runs / "stage3", part)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name
    measured = ("samples_per_s", "tokens_per_s", "data_wait_s", "memory_gb")
    whole, resumed = log_rows(runs / "stage3"), log_rows(part)
    for row in (*whole, *resumed):
        for name in measured:
            row.pop(name)
    assert whole == resumed


def test_a_run_that_died_before_its_first_checkpoint_is_started_by_resume(runs, stage3):
    """A folder with a log and no more: the same run as from the beginning."""
    run = Path(stage3[-1])
    run.mkdir()
    (run / "log.csv").write_text("step,loss\n1,7\n")
    train.main([*stage3, "--steps", "4", "--resume", *SMALL])
    ours, whole = weights(run), weights(runs / "stage3")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert [row["step"] for row in log_rows(run)] == ["1", "2", "3", "4"]


def test_steps_may_grow_where_the_rates_do_not_hang_on_them(stage3, tmp_path):
    """With a horizon, or a constant rate, two steps and two more are four; else it is refused."""
    whole = [*stage3[:-1], str(tmp_path / "whole")]
    train.main([*whole, "--steps", "4", *SMALL, "horizon=8"])
    train.main([*stage3, "--steps", "2", *SMALL, "horizon=8"])
    train.main([*stage3, "--steps", "4", "--resume", *SMALL, "horizon=8"])
    for name in ("model", "ema", "optimizer"):
        paths = [newest_step(run) / f"{name}.safetensors" for run in (whole[-1], stage3[-1])]
        assert paths[0].read_bytes() == paths[1].read_bytes(), name
    with pytest.raises(ValueError, match="was trained with horizon=8, this run has horizon=0"):
        train.main([*stage3, "--steps", "4", "--resume", *SMALL])
    bare = [*stage3[:-1], str(tmp_path / "bare")]
    train.main([*bare, "--steps", "2", *SMALL])
    with pytest.raises(ValueError, match="was trained with steps=2, this run has steps=4"):
        train.main([*bare, "--steps", "4", "--resume", *SMALL])


def test_steps_of_any_number_of_digits_are_found(tmp_path):
    """The newest by number, not by name; what is not a step is passed over."""
    for name in ("step_999000", "step_1000000", "step_000010", "step_x", ".step_2000000.tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in steps_of(tmp_path)][0] == "step_000010"
    assert newest_step(tmp_path).name == "step_1000000"


def test_resuming_with_other_settings_is_refused(runs, stage3):
    """The error names the setting and the remedy."""
    argv = [*stage3[:-1], str(runs / "stage3"), "--steps", "4", "--resume", *SMALL]
    with pytest.raises(ValueError, match="batch=4, this run has batch=5.*--set batch=4"):
        train.main([*argv, "batch=5"])


def test_cached_windows_train_to_the_same_weights(runs, stage3, tmp_path):
    """Encoded beforehand or at the start: the same run. A cache of another stage is refused."""
    file, card = str(tmp_path / "windows.safetensors"), str(runs.parent / "card.json")
    sizes = ["--episodes", "2", "--windows", "16"]
    data.main(["cache", "--stage", "3", "--data", card, *sizes, "--out", file])
    argv = ["--stage", "3", "--init", str(runs / "stage2"), "--cache", file]
    train.main([*argv, "--out", str(tmp_path / "run"), "--steps", "4", *SMALL])
    ours, cached = weights(runs / "stage3"), weights(tmp_path / "run")
    assert all(torch.equal(ours[name], cached[name]) for name in ours)
    with pytest.raises(ValueError, match="stage was 3, is 1"):
        train.main(["--stage", "1", "--cache", file, "--out", str(tmp_path / "wrong")])


def test_windows_are_encoded_once_for_all_runs_of_the_same_data(
    stage3, tmp_path, capsys, monkeypatch
):
    """Another run of the card finds them, in a folder that is named in a line, and loads no
    backbones; with another seed, another file of the dataset or other code they are made anew."""
    loads = []
    real = data.Stream.load
    monkeypatch.setattr(data.Stream, "load", lambda *a: loads.append(a) or real(*a))

    def run(*sets: str) -> str:
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        train.main([*stage3[:-1], str(out), "--steps", "1", *SMALL, *sets])
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("windows: ")]
        return re.fullmatch(r"windows: 16, encoded once and kept in (\S+) for .*", line)[1]

    first = run()
    assert Path(first).parent == tmp_path / "windows" and len(loads) == 1
    assert run("lr=0.5") == first and len(loads) == 1
    assert run("seed=1") != first and len(loads) == 2
    monkeypatch.setattr(batches, "code_digest", lambda: "other")
    assert run() != first and len(loads) == 3
    files = [("a", 1, 2)]
    monkeypatch.setattr(data.windows, "files_of", lambda pyramid: files)
    run()
    files = [("a", 1, 3)]
    run()
    assert len(loads) == 5 and len(list((tmp_path / "windows").iterdir())) == 5


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset_name", ["sim", "small", "full"])
def test_a_preset_without_data_asks_for_a_card_before_anything_is_loaded(preset_name, monkeypatch):
    """In one line."""
    monkeypatch.setattr(data, "backbones_of", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="a dataset card: python data.py inspect"):
        train.main(["--preset", preset_name, "--stage", "3", "--out", "no/such/run"])
    with pytest.raises(ValueError, match=f"{preset_name!r} has no data of its own.*--data"):
        data.main(["cache", "--preset", preset_name, "--stage", "3", "--out", "no/such/cache"])


def test_the_full_model_trains_on_all_windows_of_its_data():
    """None is encoded before; none of the toy's two thousand."""
    for name, stage in itertools.product(("small", "full"), "123"):
        settings = train.settings_for(name, stage)
        assert settings.windows == 0 and settings.workers >= 4 and settings.precision == "bf16"


def test_random_windows_train_every_stage_without_data_or_backbones(tmp_path, monkeypatch):
    """`--data synthetic`: one command, in the shapes of real ones, the same for any rank, without
    the latent actions that nothing reads."""
    monkeypatch.setattr(data, "backbones_of", lambda *_, **__: pytest.fail("loaded"))
    sets = ["--set", "batch=4", "log_every=1", "workers=1"]
    argv = ["--data", "synthetic", "--out", str(tmp_path), "--steps", "1", *sets]
    train.main(argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage1", "stage2", "stage3"]
    card = Card.read(newest_step(tmp_path / "stage3") / "config.json")
    assert card.statistics is None and not card.backbones


@pytest.mark.parametrize("name", ["toy", "sim", "small", "full"])
@pytest.mark.parametrize("stage", "123")
def test_random_windows_have_the_shapes_that_the_network_takes(name, stage):
    """Without its weights: the batch that the plan is made for."""
    source = Synthetic(name, stage)
    config = preset(name, stage)
    inputs = source.inputs(source.prepare(source.rows(2, 0, 0)), "cpu")
    side = 2 ** len(plan.frozen_parts(name)["vae"].config.dim_mult)
    grid = [pixels // side for pixels in PRESETS[name].size]
    assert inputs.latents.shape == (2, config.video.latent, config.latent_frames, *grid)
    assert (
        source.latents == inputs.latents.shape[1:]
        and inputs.context_len.tolist() == [inputs.context.shape[1]] * 2
    )
    assert (inputs.state is not None) == config.finetune and (inputs.und is None) == (stage == "1")
    if stage != "1":
        assert inputs.actions.shape == (2, config.chunk, config.action_dim)
        assert inputs.und_mask is None and inputs.und.shape[2] == config.vlm_dim
    again = Synthetic(name, stage).prepare(source.rows(2, 0, 0))
    assert all(torch.equal(again[k], x) for k, x in vars(inputs).items() if x is not None)


def test_an_existing_run_is_never_overwritten(stage3, tmp_path):
    """Refuse, and say how to go on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists; continue it with --resume, or name another"):
        train.main([*stage3, *SMALL])


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--stage", "1", "--preset", "tox"],
            "--preset: invalid choice: 'tox' .choose from 'toy', 'sim'",
        ),
        (["--stage", "1", "--set", "stepz=3"], "unknown key 'stepz'.*did you mean 'steps'"),
        (
            ["--stage", "1", "--set", "steps=many"],
            "--set steps is many; expected a whole number in .1,1e9.",
        ),
        (
            ["--stage", "1", "--set", "compile=maybe"],
            "--set compile is 'maybe'; expected true or false",
        ),
        (["--stage", "1", "--set", "steps"], "--set is 'steps'; expected key=value"),
        (["--stage", "1", "--set", "optimizer=sgd"], "optimizer is 'sgd'; expected one of 'adamw'"),
        (["--latent", "x"], "--cache and --latent belong to one stage; name it with --stage"),
        (["--stage", "3", "--init", "no/such/run"], "holds no checkpoint"),
    ],
)
def test_bad_arguments_end_in_one_clear_error(argv, words, tmp_path):
    """Unknown preset, key or value; missing files."""
    card = ["--data", small.write_card(tmp_path)]
    changes = [] if "--set" in argv else SMALL
    with pytest.raises(ValueError, match=words):
        train.main([*card, "--out", str(tmp_path / "run"), *argv, *changes])


def test_an_unknown_stage_is_refused_by_the_parser():
    with pytest.raises(ValueError, match="--stage: invalid choice: '4'"):
        train.main(["--stage", "4"])


def test_a_checkpoint_of_another_shape_is_refused(runs):
    """The error says which sizes differ."""
    config = preset("toy")
    wide = replace(config, video=replace(config.video, width=48))
    with pytest.raises(ValueError, match="video expert .*Use the same preset"):
        initialise(Motus(wide), runs / "stage2", "3")


@pytest.mark.parametrize("damage", ["truncated", "corrupt header", "missing tensor"])
def test_a_damaged_weights_file_is_refused(runs, tmp_path, damage):
    """Truncated, corrupted or incomplete: one ValueError that names the file."""
    copy = shutil.copytree(newest_step(runs / "stage3"), tmp_path / "step_000004")
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


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """The error names the step and the windows; the last checkpoint stays as it was."""
    total, calls = Losses.total, []

    def poison(self, *args):
        calls.append(args)
        return total(self, *args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(Losses, "total", poison)
    run = tmp_path / "nan"
    argv = ["--stage", "1", "--data", small.write_card(tmp_path), "--out", str(run)]
    with pytest.raises(ValueError, match=r"step 2: loss nan.*windows \[.*Nothing of it is saved"):
        train.main([*argv, "--steps", "6", *SMALL, "save_every=1"])
    assert newest_step(run).name == "step_000002"
    assert all(value.isfinite().all() for value in weights(run).values())


def test_a_step_waits_for_the_device_once(stage3, monkeypatch):
    """Whatever the number of passes: loss and norm are read together, after all that a step does
    was launched. Nothing else of a step, of whose rows none is logged, reads a value."""
    if torch.cuda.is_available():
        pytest.skip("test_device.py counts what a GPU waits for")
    reads, inside = [], []
    readers = ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero", "cpu", "numpy")
    for name in readers:
        read = getattr(torch.Tensor, name)

        def counted(*args, read=read, name=name):
            if inside:
                reads.append((name, len(updates)))
            return read(*args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    updates, update, step = [], train.EMA.update, train.step

    def one(*args):
        inside.append(True)
        step(*args)
        inside.clear()

    monkeypatch.setattr(train, "step", one)
    monkeypatch.setattr(train.EMA, "update", lambda *args: updates.append(update(*args)))
    train.main([*stage3, "--steps", "3", *SMALL, "micro=1", "log_every=100"])
    assert reads == [("tolist", 1), ("tolist", 2), ("tolist", 3)]


# -- settings of large runs, each alone -----------------------------------------------------------


def test_booleans_are_written_as_words_or_digits():
    """true, false, 1 and 0, whatever their case."""
    for text, value in (("true", True), ("1", True), ("False", False), ("0", False)):
        assert train.settings_for("toy", "1", [f"reshard={text}"]).reshard is value


def test_the_long_recipe_comes_on_top_of_the_quick_one():
    quick, long = (train.settings_for("toy", "3", long=long) for long in (False, True))
    assert (quick.steps, quick.optimizer, quick.given) == (2500, "muon", 0.2)
    assert (long.steps, long.optimizer, long.given) == (8500, "muon", 0.5)


def test_weight_decay_leaves_out_vectors_and_tables_unless_asked():
    """By default matrices alone; `decay=all` is the official behaviour. Every trained parameter is
    in one group."""
    model = Motus(preset("toy"))
    for decay in ("matrices", "all"):
        (optimizer,) = train.make_optimizers(model, train.Settings(decay=decay), EXPERTS)
        groups = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert len(groups) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            vector = p.dim() == 1 or name.endswith(("modulation", "registers"))
            assert groups[id(p)] == (0.0 if vector and decay == "matrices" else 0.01), name


def test_muon_takes_the_steps_of_torchs_own():
    """Three steps on square, wide and tall matrices: what they add differs by the rounding of
    torch's bf16 iteration."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 16), (16, 16), (8, 24), (24, 8))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = (
        Muon([dict(params=ours)], lr=0.1, weight_decay=0.01),
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


class Post:
    """`torch.distributed` between threads."""

    def __init__(self, world: int):
        self.get_world_size = lambda: world
        self.barrier = threading.Barrier(world)
        self.place = threading.local()
        self.is_initialized = lambda: True
        self.get_rank = lambda: self.place.rank

    def broadcast(self, sent: torch.Tensor, source: int) -> None:
        if self.get_rank() == source:
            self.letter = sent.clone()
        self.barrier.wait(20)
        sent.copy_(self.letter)
        self.barrier.wait(20)


@pytest.mark.parametrize("world", (2, 3, 7))
def test_ranks_share_the_matrices_of_muon(world, monkeypatch):
    """Also if they do not divide them, or are more than there are: all take the step of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 24), (16, 16), (16, 16), (24, 8), (16, 16))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]

    def stepped() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(x.clone()) for x in start]
        for p, grad in zip(params, grads):
            p.grad = grad.clone()
        Muon([dict(params=params)], lr=0.1, weight_decay=0.01).step()
        return [p.detach() for p in params]

    alone = stepped()
    monkeypatch.setattr(muon, "dist", Post(world))

    def as_rank(rank: int) -> list[torch.Tensor]:
        muon.dist.place.rank = rank
        return stepped()

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(as_rank, range(world)))
    for theirs in found:
        for ours, true, x in zip(theirs, alone, start):
            torch.testing.assert_close(ours, true, rtol=0, atol=1e-5)
            assert not torch.equal(ours, x)


def test_the_video_expert_has_a_rate_of_its_own():
    """`video_lr`; 0 gives it that of the others."""
    model = Motus(preset("toy"))
    for video_lr, wanted in ((0.5, 0.5), (0.0, 0.1)):
        settings = train.Settings(lr=0.1, video_lr=video_lr)
        (optimizer,) = train.make_optimizers(model, settings, EXPERTS)
        bases = {id(p): group["base"] for group in optimizer.param_groups for p in group["params"]}
        assert {bases[id(p)] for p in model.video.parameters()} == {wanted}
        assert {bases[id(p)] for p in model.und.parameters()} == {0.1}


@pytest.mark.parametrize(
    "schedule, half, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_the_rate_warms_up_and_falls_to_its_floor(schedule, half, end):
    """Hand-sized: warm-up of 4 steps, horizon of 100."""
    (optimizer,) = train.make_optimizers(Motus(preset("toy")), train.Settings(), ("video",))
    settings = train.Settings(steps=1000, warmup=4, horizon=100, schedule=schedule)
    group, rates = optimizer.param_groups[0], []
    for step in (0, 50, 100, 500):
        train.set_lr([optimizer], settings, step)
        rates.append(group["lr"] / group["base"])
    assert rates[0] == pytest.approx(0.25, rel=0.01)
    assert rates[1:] == pytest.approx([half, end, end])


@pytest.mark.parametrize("given", [0.0, 0.5])
def test_each_rank_draws_its_rows_of_the_noise_of_one_process(given):
    """Two ranks draw the halves of that, with a modality given or not. Each draws its own samples
    alone, and no two samples, steps or seeds have the same noise."""
    source = Synthetic("toy", "3")
    settings = train.Settings(batch=8, steps=3, given=given)
    steps = [
        batches.Batches(source, settings, Ranks(*place))[2] for place in ((0, 1), (0, 2), (1, 2))
    ]
    (_, whole, have), (_, first, _), (_, second, _) = steps
    assert have == ((whole["t_video"] > 0).sum(), (whole["t_action"] > 0).sum())
    assert all(torch.equal(torch.cat([first[name], second[name]]), whole[name]) for name in whole)
    assert (whole["t_video"] == 0).any() == bool(given)
    _, other, _ = batches.Batches(source, settings, Ranks())[1]
    _, seeded, _ = batches.Batches(source, replace(settings, seed=1), Ranks())[2]
    noises = torch.cat([x["video_noise"] for x in (whole, other, seeded)])
    assert len(noises.flatten(1)[:, 0].unique()) == 24
    assert noises.mean().abs() < 0.02 and abs(noises.std() - 1) < 0.02


def test_parts_of_a_batch_add_up_to_its_loss():
    """Also where they hold unequal numbers of samples with actions."""
    torch.manual_seed(0)
    has = torch.tensor([True, False, False, True, True, True])
    whole = Losses(torch.rand(6), torch.rand(6) * has, torch.rand(6), torch.rand(6), has)
    parts = [Losses(*(x[i : i + 2] for x in whole)) for i in (0, 2, 4)]
    summed = sum(part.total(videos=6, acting=4) for part in parts)
    assert summed.item() == pytest.approx(whole.total().item())


def test_weights_may_be_bf16_and_the_average_is_not(tmp_path):
    """`params=bf16` halves weights and moments; a run that `minutes` ended is resumed with them;
    the log has all its columns."""
    run = tmp_path / "bf16"
    argv = ["--stage", "1", "--data", small.write_card(tmp_path), "--out", str(run), "--steps", "3"]
    half = ["params=bf16", "precision=bf16", "micro=2", "peak=1", "checkpointing=selective"]
    settings = [*SMALL, "optimizer=adamw", *half]
    train.main([*argv, *settings, "minutes=1e-9"])
    assert newest_step(run).name == "step_000001"
    train.main([*argv, "--resume", *settings])
    names = ("model", "ema", "optimizer")
    stored = {name: load_file(newest_step(run) / f"{name}.safetensors") for name in names}
    assert {x.dtype for x in stored["model"].values()} == {torch.bfloat16}
    assert {x.dtype for x in stored["ema"].values()} == {torch.float32}
    moments = [x.dtype for name, x in stored["optimizer"].items() if "exp" in name]
    assert set(moments) == {torch.bfloat16}
    rows = log_rows(run)
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    columns = ("loss", "video", "grad_norm", "samples_per_s", "tokens_per_s", "mfu", "memory_gb")
    assert all(float(row[name]) > 0 for row in rows for name in (*columns, "data_wait_s"))


# -- the log --------------------------------------------------------------------------------------


def test_the_log_has_the_loss_per_modality_and_time_bin(tmp_path):
    """Hand-sized: what is given (t = 0) or has no actions does not count; passes add up."""
    has = torch.tensor([True, True, False, True])
    first = Losses(
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([5.0, 6.0, 0.0, 8.0]),
        torch.tensor([0.0, 0.3, 0.3, 1.0]),
        torch.tensor([0.9, 0.0, 0.9, 0.1]),
        has,
    )
    log = Log(tmp_path / "log.csv", 0)
    log.losses(first)
    log.losses(Losses(torch.tensor([7.0]), None, torch.tensor([0.2]), None, None))
    row = log.row(1)
    assert (row["video"], row["action"]) == (4.0, 6.5)
    bins = {name: row[name] for name in row if "_t" in name}
    expected = {"video_t0": 7.0, "video_t1": 2.5, "video_t3": 4.0}
    assert bins == expected | {"action_t0": 8.0, "action_t3": 5.0}


def test_nothing_in_the_log_waits_for_the_device_before_a_row(tmp_path, monkeypatch):
    """`losses` reads no value."""
    log = Log(tmp_path / "log.csv", 0)
    losses = Losses(torch.rand(4), torch.rand(4), torch.rand(4), torch.rand(4), torch.ones(4) > 0)
    for name in ("item", "tolist", "__bool__", "__float__", "nonzero", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read"))
    log.losses(losses)


def test_a_tracker_beside_the_csv_gets_the_same_row(tmp_path, monkeypatch):
    """A stand-in for wandb."""
    said = []
    wandb = SimpleNamespace(
        init=lambda *_, **__: None, log=lambda row, step: said.append((step, row))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = Log(tmp_path / "log.csv", 0, to="wandb")
    log.add("loss", 2.0)
    row = log.row(7)
    assert said == [(7, row)] and row["loss"] == 2.0
    assert log_rows(tmp_path)[0]["loss"] == "2"


def test_tensorboard_gets_every_number_of_a_row(tmp_path):
    """The real one, where it is installed: what is read back is what the csv holds."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(tmp_path / "log.csv", 0, to="tensorboard")
    log.add("loss", 2.0)
    log.row(7)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.0)]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    """With the command that installs it, before anything is trained."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="log_to=wandb: .*pip install wandb"):
        Log(tmp_path / "log.csv", 0, to="wandb")


def test_a_log_that_finds_no_room_says_which_file(tmp_path):
    """And how to go on."""
    log = Log(tmp_path / "log.csv", 0)
    log.path = Path("/dev/full")
    words = "/dev/full could not be written: .*No space left on device; free space and continue"
    with pytest.raises(ValueError, match=words):
        log.row(1)
