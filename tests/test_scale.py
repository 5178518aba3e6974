"""Many ranks: the same numbers as one process, checkpoints that survive anything, misconfigured
launches. Two processes over gloo."""

import csv
import hashlib
import json
import multiprocessing.forkserver
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import savers
import small
import torch
import torch.distributed.run as torchrun
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import data
import motus
import train
from motus import EXPERTS, PRESETS, Inputs
from scale import batches, checkpoints, ranks, sharding
from weights.card import newest_step
from weights.convert import export
from weights.files import digest, open_source, save_safetensors
from weights.load import load_into, local_shard, shard_of

ROOT = Path(__file__).parents[1]
WIDTHS = dict(patch=(1, 2, 2), width=32, ffn=64, layers=2, heads=2, freq_dim=32)
TOY = PRESETS["toy"].motus
TINY = replace(TOY, video=replace(TOY.video, **WIDTHS), action_width=32, und_width=32)
TINY_LATENT = replace(TINY, finetune=False, ratio=1, action_dim=14)  # of stages 1 and 2
SMALL = PRESETS["small"].motus
SLOW = pytest.mark.slow


def perform(job: dict) -> str:
    """One command of a rank, with what it is to do wrong before; returns the error it ends in, or
    the digest of what comes next."""
    PRESETS["tiny"] = replace(PRESETS["toy"], motus=TINY, recipes={"quick": {}, "long": {}})
    rank, made, begin = os.environ["RANK"], [], batches.Batches.__init__
    os.environ.update(
        WORLD_SIZE=str(job["world"]),
        LOCAL_WORLD_SIZE=str(job["world"]),
        MASTER_PORT=str(job["port"]),
    )
    if int(rank) >= job["world"]:
        return "next"

    def remember(self, *args):
        begin(self, *args)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Batches, "__init__", remember)
        names = {
            "train": train,
            "data": data,
            "batches": batches,
            "sharding": sharding,
            "torch": torch,
            "time": time,
            "os": os,
            "signal": signal,
            "patch": patch,
        }
        for line in job.get("before", {}).get(rank, []):
            exec(line, names)
        try:
            train.main([*job["argv"], *job.get("also", {}).get(rank, [])])
        except ValueError as error:
            return str(error)
        if not made:  # it had reached its last step before
            return "next"
        inputs, noise, _ = made[-1][made[-1].settings.steps]
        return "next " + digest({k: v for k, v in (inputs | noise).items() if v is not None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    said = [perform(job) for job in jobs]
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(said))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin(folder: Path, jobs: list[dict], ranks: int = 2, **options) -> list[subprocess.Popen]:
    """Starts the processes of both ranks; each does all jobs in turn (a job of world 1 is rank 0's
    alone)."""
    for job in jobs:
        job["port"] = free_port()
    file = folder / f"jobs{len(list(folder.glob('jobs*')))}"
    file.write_text(json.dumps(jobs))
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen], limit: float = 1200) -> list[list[str]]:
    """Per rank, the error in which each job ended."""
    outs = [process.communicate(timeout=limit) for process in processes]
    for process, (_, err) in zip(processes, outs):
        assert process.returncode == 0, err[-3000:]
    file = processes[0].args[2]
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(len(processes))]


def together(folder: Path, jobs: list[dict], ranks: int = 2) -> list[list[str]]:
    return finish(begin(folder, jobs, ranks))


# -- the same numbers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


def cache(folder: Path, stage: str) -> list[str]:
    """The arguments that name 48 encoded windows of a stage, made when they are first asked for,
    and the encoder of the latent actions."""
    file, latent = folder / f"cache{stage}.safetensors", folder / "latent"
    encoder = ["--latent", str(latent)] if stage == "2" else []
    if not file.exists():
        card = ["--data", small.write_card(folder)]
        if stage == "2":
            argv = ["--stage", "latent", *card, "--out", str(latent), "--steps", "2"]
            train.main([*argv, "--set", "episodes=2", "batch=20"])
        sizes = ["--episodes", "2", "--windows", "48"]
        data.main(["cache", "--stage", stage, *card, *encoder, *sizes, "--out", str(file)])
    return ["--cache", str(file), *encoder]


def job(
    caches: Path, run: Path, stage: str, world: int, steps: int, *settings: str, **more
) -> dict:
    """A run of the tiny network on a global batch of 8."""
    argv = ["--stage", stage, "--preset", "tiny", *cache(caches, stage), "--out", str(run)]
    argv += ["--steps", str(steps), *more.pop("flags", [])]
    argv += ["--set", "batch=8", "log_every=1", *settings]
    return dict(world=world, argv=argv, **more)


def losses(run: Path, column: str = "loss") -> list[float]:
    return [float(row[column]) for row in csv.DictReader((run / "log.csv").open())]


def apart(a: Path, b: Path, column: str = "loss") -> float:
    """Largest relative difference between the losses of two runs, or another column of them."""
    one, other = losses(a, column), losses(b, column)
    assert len(one) == len(other)
    return max(abs(x - y) / abs(x) for x, y in zip(one, other))


# A network so small is whole on every rank unless `shards` asks for more.
VARIANTS = {
    "sharded": ["shards=2"],
    "accumulated, all computed again": ["shards=2", "micro=2", "checkpointing=full"],
    "accumulated, some computed again": ["shards=2", "micro=1", "checkpointing=selective"],
    "replicas": [],
    "replicas, accumulated": ["micro=2"],
    "kept gathered": ["shards=2", "reshard=0"],
    "kept gathered, accumulated": ["shards=2", "reshard=0", "micro=2"],
}


# What AdamW is given has at most norm 1, on each rank and in all; the norm in the log is that
# before.
CLIPPED = (
    "step = torch.optim.AdamW.step\n"
    "def check(adam):\n"
    "    grads = [p.grad for group in adam.param_groups for p in group['params']]\n"
    "    norms = [sharding.full_tensor(grad.norm()) for grad in grads if grad is not None]\n"
    "    assert torch.stack(norms).norm() < 1 + 1e-5, norms\n"
    "    step(adam)\n"
    "patch.setattr(torch.optim.AdamW, 'step', check)"
)


def compare(
    caches: Path, folder: Path, stages: str, steps: int, variants: dict, *common: str
) -> dict[str, float]:
    """Trains each stage on one process and, in each variant, on two, all with the `common`
    settings; how far the losses are apart. Gradients that need it are clipped, on all ranks
    together."""
    jobs = []
    for stage in stages:
        jobs.append(job(caches, folder / stage / "one", stage, 1, steps, *common))
        jobs += [
            job(caches, folder / stage / name, stage, 2, steps, *common, *settings)
            for name, settings in variants.items()
        ]
    for each in jobs:
        each["before"] = dict.fromkeys("01", [CLIPPED])
    assert all(end.startswith("next") for rank in together(folder, jobs) for end in rank)
    found = {
        f"stage {stage}, {name}": apart(folder / stage / "one", folder / stage / name)
        for stage in stages
        for name in variants
    }
    print(json.dumps(found, indent=1))
    if "3" in stages:
        assert (
            max(
                float(row["grad_norm"])
                for row in csv.DictReader((folder / "3" / "one" / "log.csv").open())
            )
            > 1
        )
    return found


@pytest.mark.slow
def test_two_ranks_train_like_one_process(caches, tmp_path):
    """The same global batch gives the same losses, divided between ranks and passes (stage 3, four
    steps)."""
    assert max(compare(caches, tmp_path, "3", 4, dict(list(VARIANTS.items())[:2])).values()) < 1e-6


@pytest.mark.slow
def test_two_ranks_train_like_one_process_with_muon(caches, tmp_path):
    """Each rank makes its share of the matrices orthogonal; sharded ones are refused."""
    assert max(compare(caches, tmp_path, "3", 4, {"muon": []}, "optimizer=muon").values()) < 1e-6


@pytest.mark.slow
def test_matrices_that_are_gathered_in_bf16_train_like_one_process_under_autocast(caches, tmp_path):
    """fp32 islands and fp32 masters are kept, so the first loss is the same but for the order of a
    sum. What is left is the rounding of each rank's gradients to bf16, as with replicas, which
    gather nothing: below 3e-3 of the norm and 1e-3 of the losses of eight steps at full rate."""
    variants = {"sharded": ["shards=2"], "replicas": [], "passes": ["shards=2", "micro=2"]}
    found = compare(caches, tmp_path, "3", 8, variants, "precision=bf16", "warmup=1")
    one = tmp_path / "3" / "one"
    norms = {name: apart(one, tmp_path / "3" / name, "grad_norm") for name in variants}
    first = {name: losses(tmp_path / "3" / name)[0] / losses(one)[0] - 1 for name in variants}
    print(json.dumps([norms, first], indent=1))
    assert max(found.values()) < 1e-3 and max(norms.values()) < 3e-3
    assert max(map(abs, first.values())) < 1e-6


@pytest.mark.long
def test_four_ranks_in_two_replicas_train_like_one_process(caches, tmp_path):
    """Two copies of the weights, each over two ranks, reduced within and between; gradients are
    summed over the copies after the last pass alone."""
    jobs = [job(caches, tmp_path / "one", "3", 1, 4)]
    for name, more in (("four", []), ("passes", ["micro=1"])):
        jobs.append(job(caches, tmp_path / name, "3", 4, 4, "shards=2", *more))
    assert all(end.startswith("next") for rank in together(tmp_path, jobs, 4) for end in rank)
    assert max(apart(tmp_path / "one", tmp_path / name) for name in ("four", "passes")) < 1e-6


@pytest.mark.long
def test_two_ranks_train_like_one_process_in_every_variant(caches, tmp_path):
    """Also with replicas, and however much is computed again."""
    assert max(compare(caches, tmp_path, "3", 4, VARIANTS).values()) < 1e-6


@pytest.mark.long
def test_two_ranks_train_like_one_process_for_fifty_steps_of_every_stage(caches, tmp_path):
    """Sums in another order: less than 1e-6 after 50 steps."""
    assert (
        max(compare(caches, tmp_path, "123", 50, dict(list(VARIANTS.items())[:3])).values()) < 1e-6
    )


# -- resume ---------------------------------------------------------------------------------------

STOP = (
    "update = train.EMA.update\n"
    "def stop(ema, model, step):\n    update(ema, model, step)\n"
    "    step == {last} and os.kill(os.getpid(), signal.SIGTERM)\n"
    "patch.setattr(train.EMA, 'update', stop)"
)


def stop_after(steps: int, rank: int) -> dict:
    """A SIGTERM to one rank during the last of `steps` steps."""
    return {str(rank): [STOP.format(last=steps - 1)]}


def file_digests(run: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in newest_step(run).glob("*.safetensors")
    }


def resumes(caches: Path, folder: Path, stages: str, steps: int) -> None:
    jobs = []
    for stage in stages:
        run = (folder / stage).joinpath
        for world in (1, 2):
            jobs += [
                job(caches, run(f"whole{world}"), stage, world, steps, "workers=2"),
                job(
                    caches,
                    run(f"parts{world}"),
                    stage,
                    world,
                    steps,
                    "workers=2",
                    before=stop_after(steps // 2, world - 1),
                ),
                job(
                    caches,
                    run(f"parts{world}"),
                    stage,
                    world,
                    steps,
                    "workers=2",
                    flags=["--resume"],
                ),
            ]
        for first, then in ((1, 2), (2, 1)):
            jobs += [
                job(
                    caches,
                    run(f"{first} to {then}"),
                    stage,
                    first,
                    steps,
                    before=stop_after(steps // 2, 0),
                ),
                job(caches, run(f"{first} to {then}"), stage, then, steps, flags=["--resume"]),
            ]
    ends = together(folder, jobs)
    assert all(end.startswith("next") for rank in ends for end in rank), ends
    assert all(
        len(set(rank[i : i + 3])) == 1
        for rank in ends
        for j in range(0, len(jobs), 10)
        for i in (j, j + 3)
    ), "another next batch"
    for stage in stages:
        run = (folder / stage).joinpath
        for world in (1, 2):
            assert losses(run(f"parts{world}")) == losses(run(f"whole{world}"))
            assert file_digests(run(f"parts{world}")) == file_digests(run(f"whole{world}"))
        for name in ("1 to 2", "2 to 1"):
            print(f"stage {stage}, {name}: {apart(run(name), run('whole1')):.1e}")
            assert apart(run(name), run("whole1")) < 1e-6


@pytest.mark.long
def test_a_run_stopped_by_sigterm_goes_on_as_if_nothing_had_happened(caches, tmp_path):
    """Bit for bit on as many ranks (weights, optimizer, EMA), within 1e-6 on another number of
    ranks; batches are prepared by workers."""
    resumes(caches, tmp_path, "3", 4)


@pytest.mark.long
def test_a_hundred_steps_are_fifty_and_fifty_in_every_stage(caches, tmp_path):
    """The same, at length."""
    resumes(caches, tmp_path, "123", 100)


# -- checkpoints that survive anything ------------------------------------------------------------


@pytest.fixture(scope="module")
def fork():
    """Runs a function of savers.py in `world` processes, as (rank, world, store, *args); returns
    the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["savers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()

    def start(world: int, store: Path, target, *args) -> list:
        processes = [
            context.Process(target=target, args=(rank, world, store, *args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        return processes

    return start


def told(fork, world: int, store: Path, work, *args) -> list[str]:
    """What `work` of savers.py said on each rank."""
    for process in fork(world, store, savers.tell, work, *args):
        process.join(600)
        assert process.exitcode == 0
    return [Path(f"{store}.{rank}").read_text() for rank in range(world)]


def check_newest(run: Path) -> int:
    """The newest checkpoint of a run is complete and of one step; returns it."""
    folder = newest_step(run)
    step = int(folder.name.removeprefix("step_"))
    assert json.loads((folder / "config.json").read_text()) == {"step": step}
    for file in ("model", "ema"):
        with open_source(folder / f"{file}.safetensors") as source:
            assert {name: source.shape(name) for name in source.names()} == {
                k: tuple(v.shape) for k, v in savers.state(0, None)["model.safetensors"].items()
            }
            assert all((source.read(name) == step).all() for name in source.names())
    return step


def kill_at_random(fork, tmp_path: Path, world: int, times: int) -> int:
    """Processes that save without pause are killed `times` times, one of them first; what lies
    there is checked, then they go on."""
    run, chance, reached = tmp_path / "run", random.Random(world), 0
    run.mkdir()
    for trial in range(times):
        processes = fork(world, tmp_path / f"store{trial}", savers.save_forever, run, reached + 1)
        until = time.monotonic() + 600
        while (
            not any(int(path.name[5:]) > reached for path in run.glob("step_*"))
            and time.monotonic() < until
        ):
            time.sleep(0.005)  # each time at least one is written
        time.sleep(chance.random() * 0.05)
        chance.shuffle(processes)
        for process in processes:
            process.kill()
            time.sleep(chance.random() * 0.005)
        for process in processes:
            process.join()
        before, reached = reached, check_newest(run)
        assert reached > before
    saver = checkpoints.Saver(run, ranks.Ranks(), keep=2)
    saver.save(reached + 1, savers.state(reached + 1, None), savers.config(reached + 1))
    saver.wait()
    assert sorted(path.name for path in run.iterdir()) == [
        f"step_{reached:06d}",
        f"step_{reached + 1:06d}",
    ], "something was left behind"
    return reached


@pytest.mark.parametrize(
    ("world", "times"),
    [(1, 3), (2, 1), pytest.param(1, 20, marks=SLOW), pytest.param(2, 20, marks=SLOW)],
)
def test_a_kill_at_any_moment_leaves_a_newest_checkpoint_that_is_whole(
    fork, tmp_path, world, times
):
    """SIGKILL at random moments while saving: what `newest_step` finds is complete and of one step,
    and saving goes on."""
    kill_at_random(fork, tmp_path, world, times)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_a_hundred_kills_leave_a_newest_checkpoint_that_is_whole(fork, tmp_path, world):
    """The same, a hundred times."""
    print(f"{world} ranks: 100 kills, {kill_at_random(fork, tmp_path, world, 100)} checkpoints")


def test_ranks_write_what_one_process_writes(fork, tmp_path):
    """Two ranks write byte for byte the files of one: even, uneven, empty and inner shards."""
    source, run = savers.save_numbered(tmp_path / "numbered.safetensors"), tmp_path / "run"
    run.mkdir()
    assert told(fork, 2, tmp_path / "store", savers.copy, source, run) == ["copied", "copied"]
    assert (run / "step_000001" / "model.safetensors").read_bytes() == source.read_bytes()


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    """What is changed afterwards is not in it; the memory of the copies serves again."""
    saver = checkpoints.Saver(tmp_path, ranks.Ranks(), keep=0)
    values, places = torch.zeros(1000, 1000), []
    for step in (1, 2):
        values.fill_(step)
        saver.save(step, {"model.safetensors": {"x": values}}, {})
        saver.settle()
        values.fill_(-1)
        places.append(saver.copies["model.safetensors"]["x"].values.data_ptr())
    saver.wait()
    assert len(set(places)) == 1
    for step in (1, 2):
        with open_source(tmp_path / f"step_{step:06d}" / "model.safetensors") as source:
            assert (source.read("x") == step).all()


def test_ranks_tell_each_other_tensors_and_texts_of_any_length(fork, tmp_path):
    """None, a few or many bytes, in the order of the ranks."""
    assert told(fork, 2, tmp_path / "store", savers.gather) == ["gathered", "gathered"]


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("trouble", "words"),
    [("full", "No space left on device"), ("read-only", "Read-only file system")],
)
def test_a_disk_that_takes_no_more_is_one_clear_error(fork, tmp_path, disk, world, trouble, words):
    """The same on every rank. The older checkpoint stays as it was and nothing is left of the new
    one."""
    run = disk / "run"
    run.mkdir()
    savers.save_once(ranks.Ranks(), run, 1, 512)
    before = {path: path.read_bytes() for path in (run / "step_000001").iterdir()}
    if trouble == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = told(
        fork,
        world,
        tmp_path / "store",
        savers.save_once,
        run,
        2,
        512 if trouble == "read-only" else 100_000,
    )
    assert len(set(said)) == 1 and re.search(
        f"step_000002 could not be written: .*{words}.*Earlier checkpoints are intact", said[0]
    )
    assert check_newest(run) == 1 and before == {path: path.read_bytes() for path in before}
    assert [path.name for path in run.iterdir()] == ["step_000001"]


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_training_on_every_rank(caches, tmp_path, disk):
    """The log of rank 0 or the next checkpoint finds no room: one error, the same on both ranks,
    and the run can be resumed."""
    fill_up = (
        "update = train.EMA.update\n"
        "def fill(ema, model, step):\n    update(ema, model, step)\n"
        f"    zeros = ['dd', 'if=/dev/zero', 'of={disk}/more', 'bs=4k']\n"
        "    step == 1 and subprocess.run(zeros, capture_output=True)\n"
        "patch.setattr(train.EMA, 'update', fill)"
    )
    run = disk / "run"
    tidy_up = (
        f"import pathlib\nfound = pathlib.Path({str(run)!r}).glob('*step_*')\n"
        "assert [path.name for path in found] == ['step_000001']\n"
        f"os.unlink('{disk}/more')"
    )
    said = together(
        tmp_path,
        [
            job(
                caches,
                run,
                "3",
                2,
                4,
                "save_every=1",
                before={"0": ["import subprocess\n" + fill_up]},
            ),
            job(
                caches, run, "3", 2, 4, "save_every=1", flags=["--resume"], before={"0": [tidy_up]}
            ),
        ],
    )
    assert said[0][0] == said[1][0] and re.search("No space left on device", said[0][0]), said
    assert all(end[1].startswith("next") for end in said) and newest_step(run).name == "step_000004"


# -- launches that cannot work --------------------------------------------------------------------


@pytest.mark.slow
def test_a_launch_that_cannot_work_is_refused_by_every_rank(caches, tmp_path):
    """One error that names what is wrong and where, the same on both ranks, before anything is
    trained."""
    run, good = tmp_path / "run", tmp_path / "good"
    start = partial(job, caches, run, "3", 2, 1)
    again = partial(job, caches, good, "3", 2, 1, flags=["--resume"])
    other_data = "patch.setattr(data.Pool, 'digest', lambda pool: 'other')"
    other_code = "patch.setattr(train, 'code_digest', lambda: 'other')"
    damage = f"import pathlib; pathlib.Path({str(good)!r}).joinpath('step_000001/ema.safetensors')"
    damage += ".unlink(missing_ok=True)"
    cases = [
        (
            start("batch=7"),
            "batch=7 does not divide into equal parts for 2 ranks.*set batch to a multiple of 2",
        ),
        (start("micro=3"), "batch=8 does not divide .* micro=3 samples at a time"),
        (start("shards=3"), "2 ranks cannot form groups of shards=3; expected one of 1, 2"),
        (start(also={"1": ["--steps", "2"]}), "ranks differ in steps: rank 0 has 1, rank 1 has 2"),
        (start(before={"1": [other_code]}), "ranks differ in code: .*, rank 1 has other"),
        (start(before={"1": [other_data]}), "ranks differ in data: .*rank 1 has other"),
        (
            start(also={"1": ["--cache", "none.safetensors"]}),
            "rank 1 of 2: none.safetensors: no such weight file",
        ),
        (start(flags=["--resume"]), "--resume: run folder .* does not exist"),
        (start("shards=2", "optimizer=muon"), "optimizer=muon takes whole matrices.*set shards=1"),
        (job(caches, good, "3", 2, 1), "next"),
        (
            again("lr=0.5"),
            "was trained with lr=0.001, this run has lr=0.5; resume with --set lr=0.001",
        ),
        (
            again(before=dict.fromkeys("01", [other_data])),
            "was trained with data=.* has data=other; resume with the same data",
        ),
        (
            again(before=dict.fromkeys("01", [other_code])),
            "was trained with code=.* has code=other; .*continue with --resume-anyway",
        ),
        (
            job(
                caches,
                good,
                "3",
                2,
                1,
                flags=["--resume-anyway"],
                before=dict.fromkeys("01", [other_code]),
            ),
            "next",
        ),
        (again(before=dict.fromkeys("01", [damage])), "ema.safetensors: no such weight file"),
    ]
    said = together(tmp_path, [case for case, _ in cases])
    for (_, words), *heard in zip(cases, *said):
        assert all(re.search(words, text, re.DOTALL) for text in heard), (words, heard)
        assert words == "next" or len(set(heard)) == 1
    assert not [path for path in run.glob("step_*")]


def test_more_ranks_than_gpus_are_refused_before_they_meet(monkeypatch):
    """By all of a machine at once: NCCL would wait for the one that has none."""
    for name, value in dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 ranks on this machine have 1 GPUs.*node 1"):
        with ranks.launch():
            pass


@pytest.mark.long
def test_a_rank_that_stalls_is_named_and_ends_the_run(caches, tmp_path):
    """Rank 1 sleeps in its data: both processes end, neither hangs; the first to end says who it
    was, the other may find itself alone."""
    sleep = (
        "get = batches.Batches.__getitem__\n"
        "def late(self, i):\n    time.sleep(600 if i == 2 else 0)\n    return get(self, i)\n"
        "patch.setattr(batches.Batches, '__getitem__', late)"
    )
    processes = begin(
        tmp_path, [job(caches, tmp_path / "run", "3", 2, 5, "timeout=40", before={"1": [sleep]})]
    )
    outs = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [3, 3]
    assert any("waiting for rank 1 (waiting for the data of step 2)" in err for _, err in outs)
    assert all("error: no progress" in err or "left alone" in err for _, err in outs)


@pytest.mark.slow
def test_ranks_wait_for_what_one_does_for_all_however_long_it_takes(caches, tmp_path):
    """Longer than for a step: rank 0 trains the latent actions, rank 1 waits."""
    late = (
        "work = train.train_latent\n"
        "def slow(*args):\n    time.sleep(20)\n    work(*args)\n"
        "patch.setattr(train, 'train_latent', slow)"
    )
    argv = ["--stage", "latent", "--preset", "tiny", "--data", small.write_card(tmp_path)]
    argv += ["--steps", "1", "--out", str(tmp_path / "run"), "--set", "timeout=1", "batch=20"]
    said = together(tmp_path, [dict(world=2, argv=argv, before={"0": [late]})])
    assert said == [["next"], ["next"]]


@pytest.mark.slow
def test_ranks_encode_the_windows_of_a_card_between_them(tmp_path):
    """Each its own shards, and none a second time: the losses are those of one process."""
    shards = "data.windows.SHARD = data.windows.CHUNK = 8"
    count = (
        "write = data.windows.save_safetensors\n"
        "def save(path, *rest):\n"
        "    write(path, *rest)\n    path.with_suffix('.by' + os.environ['RANK']).touch()\n"
        "patch.setattr(data.windows, 'save_safetensors', save)"
    )
    jobs = []
    for name, world in (("one", 1), ("two", 2)):
        argv = ["--stage", "3", "--preset", "tiny", "--data", small.write_card(tmp_path)]
        argv += ["--out", str(tmp_path / name / "run"), "--steps", "2", "--set", "batch=8"]
        argv += ["log_every=1", "episodes=2", "windows=30"]
        jobs.append(dict(world=world, argv=argv, before=dict.fromkeys("01", [shards, count])))
    assert all(end.startswith("next") for rank in together(tmp_path, jobs) for end in rank)
    assert apart(tmp_path / "one/run", tmp_path / "two/run") < 1e-6
    (kept,) = (tmp_path / "two/windows").iterdir()
    made = sorted(path.name for path in kept.glob("*.by*"))
    assert made == [f"windows_{n:06d}.by{n % 2}" for n in range(4)]


@pytest.mark.slow
def test_a_rank_that_never_came_is_missed(caches, tmp_path):
    """One of two: an error that says how to start, no hang."""
    said = together(tmp_path, [job(caches, tmp_path / "run", "3", 2, 1, "timeout=1")], ranks=1)
    assert re.search(
        "rank 0 of 2 met no others at 127.0.0.1:.*start all 2 ranks, with torchrun", said[0][0]
    )


def test_torchrun_passes_our_arguments_on():
    """None of our options is an abbreviation of one of its own, so no `--` is needed."""
    ours = ["--full", "--stage", "3", "--out", "x", "--init", "x", "--data", "x", "--cache", "x"]
    ours += ["--latent", "x", "--resume", "--resume-anyway", "--steps", "2", "--long", "--plan"]
    ours += ["--preset", "toy", "--set", "steps=2"]
    args = torchrun.parse_args(["--nproc-per-node", "8", "train.py", *ours])
    assert (args.training_script, args.training_script_args) == ("train.py", ours)


STUBS = {
    "srun": 'echo "srun $SRUN_CPUS_PER_TASK $*" >> log; mkdir -p "run/$(cat next)"; exit 143',
    "scontrol": '[ "$1" = show ] && echo node1 || echo "$*" >> log',
    "ip": "echo default via 10.0.0.1 dev eth7 proto dhcp",
}


def test_the_slurm_script_queues_itself_again_while_it_gets_further(tmp_path):
    """With stand-ins for Slurm, each run ended by a signal: begun, died before a checkpoint, gone
    on from there, no further, finished at a step of seven digits."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "activate").touch()
    slurm = dict(SLURM_CPUS_PER_TASK="96", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="x")
    env = os.environ | slurm | dict(SLURM_NNODES="2", ENVIRONMENT=".", STEPS="2000000", RUN="run")
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    said = []
    for found in ("log.csv", "step_000900", "step_1000000", "step_1000000", "step_2000000"):
        (tmp_path / "next").write_text(found)
        (tmp_path / "log").write_text("")
        command = ["bash", str(ROOT / "docs" / "slurm.sh")]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
        log = (tmp_path / "log").read_text()
        assert log.startswith("srun 96 ")
        said.append(("--resume" in log, "requeue 7" in log))
    assert said == [(False, False), (True, True), (True, True), (True, False), (True, False)]


def start_torchrun(*argv: str) -> subprocess.CompletedProcess:
    """Two processes of train.py under torchrun, as typed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [f"--master-port={free_port()}", "train.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.slow
def test_torchrun_trains_all_stages_like_one_process(tmp_path):
    """The same command, with and without it: from nothing to a policy; rank 0 alone trains the
    latent actions, and only once. What is missing for the full model is said instead of trained."""
    argv = ["--data", small.write_card(tmp_path), "--steps", "2", "--set", *small.SETTINGS]
    train.main([*argv[:4], "--out", str(tmp_path / "one"), *argv[4:]])
    ended = start_torchrun(*argv[:4], "--out", str(tmp_path / "two"), *argv[4:])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("linear probe of the motion") == 1
    for stage in "123":
        name = f"stage{stage}"
        assert apart(tmp_path / "one" / name, tmp_path / "two" / name) < 1e-6
    ended = start_torchrun("--full", "--out", str(tmp_path / "full"))
    assert ended.returncode and "missing, before anything is trained" in ended.stderr
    summary = ended.stderr[ended.stderr.index("Root Cause") :]
    assert "missing, before anything is trained" in summary  # and not only torchrun's own words


# -- what is computed -----------------------------------------------------------------------------


def example(config: motus.MotusConfig, size: int) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """A batch of stage 3 at the sizes of a configuration, with three camera rows of latents at full
    size."""
    video, acts, side = (
        config.video,
        (size, config.chunk, config.action_dim),
        (24, 20) if config.video.width == 3072 else (6, 6),
    )
    latents = torch.randn(size, video.latent, config.latent_frames, *side)
    inputs = Inputs(
        latents,
        torch.randn(size, 9, video.text_dim),
        torch.full((size,), 8),
        torch.randn(size, 20, config.vlm_dim),
        torch.ones(size, 20, dtype=torch.bool),
        torch.randn(size, config.state_dim),
        torch.randn(acts),
        torch.ones(acts, dtype=torch.bool),
    )
    return inputs, dict(
        t_video=torch.rand(size),
        t_action=torch.rand(size),
        video_noise=torch.randn_like(latents),
        action_noise=torch.randn(acts),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing",
    ["none", *(pytest.param(x, marks=pytest.mark.long) for x in ("selective", "full"))],
)
def test_a_compiled_layer_has_no_graph_break(checkpointing, monkeypatch):
    """`fullgraph` makes a break an error; the gradients are those of the plain layer, and few
    graphs serve all layers."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    inputs, noise = example(TINY, 2)
    gradients = []
    for compiled in (False, True):
        model = motus.Motus(TINY)
        sharding.initialise(model, None, "3")
        model.video.head.head.weight.data.normal_(
            std=0.1, generator=torch.Generator().manual_seed(0)
        )
        step = sharding.parallelize(
            model,
            EXPERTS,
            checkpointing=checkpointing if compiled else "none",
            compiled=compiled,
        )
        step(inputs, noise).total().backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() and 1 <= len(graphs) <= 3
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-4, atol=1e-6)


class Collectives(TorchDispatchMode):
    """Counts what a step sends: calls and bytes of the gathered or reduced whole, by kind."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, list[int]] = {"gather": [], "reduce": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = {
            "c10d._allgather_base_.default": "gather",
            "c10d._reduce_scatter_base_.default": "reduce",
        }.get(str(function))
        if kind:
            self.calls[kind].append(
                max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            )
        return function(*args, **(kwargs or {}))


@pytest.fixture
def one_of_eight():
    """A mesh of eight ranks, of which this process is the sixth and the only one."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield init_device_mesh("cpu", (8,), mesh_dim_names=("shard",))
    torch.distributed.destroy_process_group()


def bytes_read() -> int:
    """From the disk, by this process."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


@pytest.mark.parametrize("way", ["load_into", "fill"])
def test_a_rank_reads_its_part_of_a_file_and_no_more(one_of_eight, tmp_path, way):
    """Bytes that come from the disk once the file is open: those of one rank of eight are an
    eighth. Opening maps the header, around which the kernel reads ahead the same few megabytes
    of any file."""
    config = replace(SMALL, video=replace(SMALL.video, layers=1))
    whole, sharded = (motus.Motus(config) for _ in range(2))
    sharding.parallelize(sharded, EXPERTS, one_of_eight)
    save_safetensors(tmp_path / "model.safetensors", whole.state_dict())
    size, read = (tmp_path / "model.safetensors").stat().st_size, []
    for model in (whole, sharded):
        with (tmp_path / "model.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open_source(tmp_path / "model.safetensors") as source:
            before = bytes_read()
            load_into(model, source) if way == "load_into" else checkpoints.fill(
                model.state_dict(), source
            )
        read.append(bytes_read() - before)
    if read[0] < 0.8 * size:
        pytest.skip("this file system does not say what is read from it")
    print(
        f"{way}: {size / 1e6:.0f} MB, read whole {read[0] / 1e6:.1f} MB, by one rank of eight "
        f"{read[1] / 1e6:.1f} MB"
    )
    assert read[1] < 1.1 * size / 8
    assert all(
        torch.equal(local_shard(x)[0], shard_of(x, whole.state_dict()[name]))
        for name, x in sharded.state_dict().items()
    )


@pytest.mark.parametrize("stage", "123")
def test_a_rank_starts_from_its_part_of_published_files(one_of_eight, tmp_path, stage):
    """Stages 1 and 2 from Wan2.2 as original and as a `dit.` file, stage 3 from official Motus: a
    part of what one process starts from."""
    earlier = motus.Motus(TINY_LATENT).init_weights()
    video = earlier.video.state_dict()
    if stage == "3":
        save_safetensors(
            tmp_path / "ours.safetensors",
            earlier.state_dict(),
            {"config": json.dumps(asdict(earlier.config))},
        )
        export(tmp_path / "ours.safetensors", tmp_path / "published", dtype=torch.float32)
    else:
        stated = dict(
            num_heads=TINY.video.heads,
            text_len=TINY.video.text_len,
            eps=1e-6,
            freq_dim=TINY.video.freq_dim,
        )
        (tmp_path / "published").mkdir()
        (tmp_path / "published" / "config.json").write_text(json.dumps(stated))
        prefix = "dit." if stage == "2" else ""
        save_safetensors(
            tmp_path / "published" / "model.safetensors",
            {prefix + name: x for name, x in video.items()},
        )
    config = TINY if stage == "3" else earlier.config
    whole, sharded = motus.Motus(config), motus.Motus(config)
    sharding.parallelize(sharded, motus.STAGES[stage].experts, one_of_eight)
    for model in (whole, sharded):
        sharding.initialise(model, tmp_path / "published", stage)
    same = [
        name
        for name, x in whole.state_dict().items()
        if name in (old := earlier.state_dict()) and torch.equal(x, old[name])
    ]
    assert {f"video.{name}" for name in video} <= set(same)
    assert [name in same for name in ("action.blocks.0.qkv", "und.blocks.1.qkv")] == [
        stage == "3"
    ] * 2
    assert all(
        torch.equal(local_shard(x)[0], shard_of(x, whole.state_dict()[name]))
        for name, x in sharded.state_dict().items()
    )


class Meter(TorchDispatchMode):
    """The most bytes of storages that were alive at once, of those made while it is on."""

    def __init__(self, existing: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary({x.untyped_storage(): None for x in existing})

    def died(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self.died, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def test_no_rank_holds_more_than_a_layer_of_what_starts_fresh(one_of_eight):
    """The most bytes that are alive while all experts are drawn, beside the eighth that is kept."""
    config = SMALL
    with torch.device("meta"):
        model = motus.Motus(config)
    sharding.parallelize(model, EXPERTS, one_of_eight).to_empty(device="cpu")
    kept = [p.to_local() for p in model.parameters()]
    with Meter(kept) as meter:
        sharding.initialise(model, None, "3")
    block, total = (
        4 * sum(p.numel() for p in part.parameters()) for part in (model.video.blocks[0], model)
    )
    outside = 4 * sum(
        p.numel() for n, p in model.video.named_parameters() if not n.startswith("blocks.")
    )
    print(
        f"{total / 1e6:.0f} MB in all, {meter.peak / 1e6:.1f} MB at once; a layer and what lies "
        f"outside: {(block + outside) / 1e6:.1f}"
    )
    assert meter.peak < 1.2 * (block + outside) < 0.25 * total


def trace(config: motus.MotusConfig, world: int, experts: tuple[str, ...] = EXPERTS) -> dict:
    """One training step of one of `world` ranks, under fake tensors and a fake process group."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = motus.Motus(config)
            numbers = sum(p.numel() for p in model.parameters())
            named = [dict(layer.named_parameters()) for layer in model.layers]
            per_layer = [
                sum(p.numel() for name, p in layer.items() if p.dim() > 1 and "modul" not in name)
                for layer in named
            ]
            step = sharding.parallelize(model, experts, mesh, "full", precision="bf16")
            inputs, noise = example(config, 2)
            if experts == ("video",):
                inputs = Inputs(inputs.latents, inputs.context, inputs.context_len)
                noise = {name: noise[name] for name in ("t_video", "video_noise")}
            (optimizer,) = train.make_optimizers(model, train.Settings(), experts)
            ema = train.EMA(model, 0.99)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            with Collectives() as seen:
                losses = step(inputs, noise)
                forward = {kind: list(sent) for kind, sent in seen.calls.items()}
                losses.total().backward()
                sharding.full_tensor(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            optimizer.step()
            ema.update(model, 0)

            def held(tensors) -> int:
                return sum(x.to_local().nbytes for x in tensors if isinstance(x, DTensor))

            return dict(
                numbers=numbers,
                per_layer=per_layer,
                forward=forward,
                step=seen.calls,
                losses=losses,
                bytes=[
                    held(model.parameters()),
                    held(p.grad for p in trained if p.grad is not None),
                    held(x for s in optimizer.state.values() for x in s.values()),
                    held(ema.weights.values()),
                ],
            )
    finally:
        torch.distributed.destroy_process_group()


def check_trace(found: dict, world: int, layers: int) -> None:
    weights, gradients, moments, average = found["bytes"]
    print(
        {k: found[k] for k in ("numbers", "bytes")},
        {k: (len(v), sum(v)) for k, v in found["step"].items()},
    )
    assert (
        found["losses"].video.shape == found["losses"].action.shape == (2,)
        and found["losses"].video.dtype == torch.float32
    )
    even = 4 * found["numbers"] / world
    assert even <= weights < 1.001 * even + 4096 and average == weights
    assert gradients <= weights and moments == 2 * gradients  # what no loss reaches has no gradient
    # Forward: the root, in fp32, and the matrices of every layer, in bf16, are gathered once.
    # Backward: those of each layer but the last again, and one reduction per group, in fp32.
    assert len(found["forward"]["gather"]) == layers + 1 and not found["forward"]["reduce"]
    assert len(found["step"]["gather"]) == 2 * layers
    assert len(found["step"]["reduce"]) == layers + 1
    matrices = sum(found["per_layer"])
    once = 4 * (found["numbers"] - matrices) + 2 * matrices
    again = 2 * sum(found["per_layer"][:-1])
    assert sum(found["forward"]["gather"]) == pytest.approx(once, rel=1e-3)
    assert sum(found["step"]["gather"]) == pytest.approx(once + again, rel=1e-3)
    # The last layer's understanding has matrices that nothing reads, so no gradient of them.
    assert 0.97 < sum(found["step"]["reduce"]) / (4 * found["numbers"]) <= 1.001


def test_a_traced_step_sends_and_holds_what_is_planned():
    """Eight fake ranks: an eighth of everything at rest, each layer gathered twice and reduced
    once."""
    check_trace(
        trace(
            replace(SMALL, video=replace(SMALL.video, layers=2)),
            8,
        ),
        8,
        2,
    )


def test_experts_that_a_stage_does_not_train_are_never_gathered():
    """Stage 1 sends the video expert alone."""
    config = replace(
        SMALL,
        video=replace(SMALL.video, layers=2),
        finetune=False,
    )
    found = trace(config, 8, ("video",))
    with torch.device("meta"):
        named = dict(motus.Motus(config).video.named_parameters())
    video = sum(p.numel() for p in named.values())
    blocks = [p for name, p in named.items() if name.startswith("blocks.") and "modul" not in name]
    matrices = sum(p.numel() for p in blocks if p.dim() > 1)
    sent = 4 * (video - matrices) + 2 * matrices
    assert sum(found["forward"]["gather"]) == pytest.approx(sent, rel=1e-3)


@pytest.mark.long
def test_the_full_step_is_traced_on_eight_ranks():
    """The same for all 5,894,809,294 trained parameters of the full model."""
    check_trace(trace(PRESETS["full"].motus, 8), 8, 30)


def test_the_operations_of_a_step_are_counted(monkeypatch):
    """The count behind the utilisation in the log: tensors without values say what those with
    values say, forwards once and backwards twice."""
    model = motus.Motus(TINY)
    inputs, noise = example(TINY, 2)
    monkeypatch.setenv("MOTUS_ATTENTION", "plain")
    with FlopCounterMode(display=False) as counter:
        model.loss(inputs, **noise)
    assert sharding.count_tokens(TINY, inputs) == 2 * (2 * 9 + 17 + 20)
    monkeypatch.delenv("MOTUS_ATTENTION")
    assert sharding.count_flops(TINY, inputs) == 3 * counter.get_total_flops()
