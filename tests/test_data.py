"""Episodes to batches: two rates in one window, masks past the end, an order that depends on seed
and step alone; windows that are encoded when needed or beforehand. And the way of one's own data:
inspect, check, convert, train, sample."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
import sample
import train
from backbones import frozen
from formats import windows
from formats.cards import Pyramid
from formats.inspect import convert
from formats.lerobot import DEFAULTS, write_v3
from latent_action import LatentActionConfig, LatentActionModel
from motus import PRESETS, Inputs, preset
from scale import batches
from scale.ranks import Ranks
from scripts import evaluate, pretrain, record
from weights.card import Card, newest_step
from weights.files import open_source, save_safetensors
from worlds.fleet import Order

ROOT = Path(__file__).parents[1]
CONFIG = preset("toy")  # 4 frames, 3 actions per frame: 12 actions
LATENT = preset("toy", "2")  # 4 latent actions


@pytest.fixture(scope="module")
def pyramid() -> Pyramid:
    """Three demonstrations of the toy's robot."""
    return data.open_pyramid(None, "3", "toy", episodes=3, seed=5)


@pytest.fixture(scope="module")
def robots(pyramid) -> tuple[data.Statistics, ...]:
    return pyramid.robots(acting=True)


def batch_of(pyramid, robots, *rows) -> data.Batch:
    return data.batch_of(pyramid, torch.tensor(rows), "real", robots, CONFIG)


# -- windows --------------------------------------------------------------------------------------


def test_a_window_is_action_dense_and_video_sparse(pyramid, robots):
    """Frames at s, s+3, ..., s+12; actions s, s+1, ..., s+11; state at s."""
    episode, start = pyramid.opened[0].reader.episode(1), 4
    batch = batch_of(pyramid, robots, (0, 1, start))
    assert torch.equal(batch.frames[0], torch.from_numpy(episode.frames[[4, 7, 10, 13, 16]]))
    actions = robots[0].actions.invert(batch.actions[0])
    torch.testing.assert_close(actions, torch.from_numpy(episode.actions[4:16]))
    state = robots[0].state.invert(batch.state[0])
    torch.testing.assert_close(state, torch.from_numpy(episode.states[4]))
    assert batch.action_mask.all() and batch.video_mask.all()


def test_what_lies_past_the_end_is_repeated_and_masked(pyramid, robots):
    """Seven actions before the end: five are padding, and so is the latent frame that needs the
    missing video frames."""
    episode = pyramid.opened[0].reader.episode(0)
    batch = batch_of(pyramid, robots, (0, 0, len(episode.actions) - 7))
    assert batch.action_mask[0, :, 0].tolist() == [True] * 7 + [False] * 5
    assert batch.video_mask[0].tolist() == [True, False]
    assert torch.equal(batch.frames[0, -1], torch.from_numpy(episode.frames[-2]))
    assert torch.equal(batch.actions[0, 7:], batch.actions[0, 6].expand(5, -1))


def test_video_without_actions_has_none():
    """Stage 1 sees pixels and words."""
    pyramid = data.open_pyramid(None, "1", "toy", episodes=1)
    batch = data.batch_of(pyramid, torch.tensor([(0, 0, 0), (1, 0, 0)]), "none", (), CONFIG)
    assert batch.actions is batch.action_mask is batch.state is None and len(batch.frames) == 2


def test_a_network_is_as_wide_as_the_robots_it_acts_for(pyramid):
    """Before stage 3 its actions are 14 numbers of a video, whatever the robots."""
    config = data.network_for(pyramid, "toy", "3")
    assert (config.ratio, config.action_dim, config.state_dim) == (3, 3, 3)
    assert data.network_for(pyramid, "toy", "2") == LATENT


def test_a_preset_without_data_asks_for_some():
    with pytest.raises(ValueError, match="preset 'full' has no data of its own.*--data"):
        data.open_pyramid(None, "3", "full")


def test_held_out_windows_are_what_the_checkpoint_sees(robots):
    """Whole windows of other layouts, at its rates and in its numbers; before stage 3 without
    actions."""
    batch = data.held_out(None, "3", "toy", CONFIG, robots[0], 5, 0)
    assert batch.frames.shape == (5, 5, 48, 48, 3) and batch.action_mask.all()
    assert batch.actions.shape == (5, 12, 3) and len(set(batch.instruction)) > 1
    again = data.held_out(None, "3", "toy", CONFIG, robots[0], 5, 0)
    assert torch.equal(batch.frames, again.frames) and torch.equal(batch.actions, again.actions)
    assert data.held_out(None, "1", "toy", LATENT, None, 3, 0).actions is None


# -- latent actions -------------------------------------------------------------------------------


def latent_model(interval: int = 3, folder: Path | None = None) -> LatentActionModel:
    """An encoder that was not trained; of a run, if a folder is given."""
    torch.manual_seed(0)
    row = PRESETS["toy"].latent | {"interval": interval}
    model = LatentActionModel(LatentActionConfig.of(row)).eval()
    if folder:
        folder.mkdir()
        model.save(folder / data.LATENT_FILE)
    return model


def test_latent_actions_of_a_source_that_knows_its_flow_are_encoded_when_needed(tmp_path):
    """Row i of an episode spans steps i to i + 3, so a chunk of four takes every third; an episode
    is encoded once."""
    model = latent_model(3, tmp_path / "run")
    pyramid = data.open_pyramid(None, "2", "toy", 2, latent=tmp_path / "run")
    batch = data.batch_of(pyramid, torch.tensor([(0, 1, 5)]), "latent", (), LATENT)
    reader = pyramid.opened[0].reader
    ((flow, valid),) = reader.flows(1, 3)
    with torch.no_grad():
        latents, _ = model.tokens_to_latent(model.flow_to_tokens(torch.from_numpy(flow)))
    wanted = model.standardise(latents)[[5, 8, 11, 14]]
    torch.testing.assert_close(batch.actions[0], wanted, atol=1e-4, rtol=1e-4)
    assert batch.action_mask.all() and batch.state is None
    assert list(pyramid.opened[0].encoded) == [1]
    late = torch.tensor([(0, 1, int(reader.lengths[1]) - 8)])  # the last rows are not valid
    late = data.batch_of(pyramid, late, "latent", (), LATENT)
    assert late.action_mask[0, :, 0].tolist() == [True, True, False, False] and not valid[-1]


def test_stage_2_says_where_its_latent_actions_may_come_from(tmp_path):
    """Neither files nor an encoder: both are named. Another interval is refused."""
    with pytest.raises(ValueError, match="scripts.latents encode.*or name.*--latent RUN"):
        data.open_pyramid(None, "2", "toy", 1).window((0, 0, 0), "latent")
    latent_model(6, tmp_path / "run")
    with pytest.raises(ValueError, match="spans 0.4 s, a video step 0.2 s"):
        pyramid = data.open_pyramid(None, "2", "toy", 1, latent=tmp_path / "run")
        pyramid.window((0, 0, 0), "latent")


def write_latents(folder, lengths, interval=3, skipped=()):
    """What `scripts.latents encode` leaves: row i is 100 e + i in all of its 14 columns, with mean
    10 and std 2; the last are unknown."""
    for e, length in enumerate(lengths):
        rows = torch.arange(length - 1, dtype=torch.float32)[:, None].repeat(1, 14) + 100 * e
        (folder / "latent_action_dim14").mkdir(parents=True, exist_ok=True)
        if e not in skipped:
            save_safetensors(
                folder / f"latent_action_dim14/episode_{e:06d}.safetensors",
                {"latent_action": rows, "valid": torch.arange(length - 1) + interval < length},
            )
    about = {"mean": [10.0] * 14, "std": [2.0] * 14, "made": {"interval": interval}}
    (folder / "statistics.json").write_text(json.dumps(about))
    (folder / "summary.json").write_text(
        json.dumps({"skipped": {f"episode_{e:06d}": "dark" for e in skipped}})
    )


def test_latent_actions_of_a_dataset_are_standardised_and_masked(card, tmp_path):
    """Rows s, s + 3, ..., less the mean, by the std; unknown past the end and in skipped episodes;
    another interval is refused."""
    shutil.copytree(card.parent, tmp_path / "toy")
    pyramid = opened(tmp_path / "toy", (2,))
    lengths = pyramid.opened[0].reader.lengths[:].tolist()
    write_latents(pyramid.opened[0].folder, lengths, skipped=(1,))
    rows = torch.tensor([(0, 2, 5), (0, 2, lengths[2] - 8), (0, 1, 0)])
    batch = data.batch_of(pyramid, rows, "latent", (), LATENT)
    assert batch.actions[0, :, 3].tolist() == [(200 + i - 10) / 2 for i in (5, 8, 11, 14)]
    masks = [[True] * 4, [True, True, False, False], [False] * 4]
    assert batch.action_mask[:, :, 0].tolist() == masks
    write_latents(pyramid.opened[0].folder, lengths, interval=6)
    with pytest.raises(ValueError, match="spans 0.4 s, a video step 0.2 s"):
        opened(tmp_path / "toy", (2,)).window((0, 0, 0), "latent")


# -- windows encoded when needed ------------------------------------------------------------------


def equal(a: data.Batch, b: data.Batch, rows: slice = slice(None)) -> None:
    assert torch.equal(a.frames[rows], b.frames) and torch.equal(a.actions[rows], b.actions)
    assert torch.equal(a.action_mask[rows], b.action_mask) and torch.equal(a.state[rows], b.state)
    assert a.instruction[rows] == b.instruction


def stream_of(pyramid, stage: str = "3") -> data.Stream:
    return data.Stream(pyramid, "toy", stage)


def prepared(source, *rank: int, steps=range(6), **sets) -> list[tuple]:
    """Batches of four of a source as the loader of a rank gives them."""
    settings = train.Settings(batch=4, seed=5, **sets)
    work = batches.Batches(source, settings, Ranks(*rank))
    return list(DataLoader(work, None, sampler=steps, num_workers=settings.workers))


def test_a_stream_resumes_to_the_sample(pyramid):
    """Batches from step 3 on are those of the uninterrupted run, whole or in the halves of two
    ranks, one by one or every other, and in processes of a loader, which prepare the pictures for
    the VLM too; noise and counts are the same."""

    def run(steps, *rank: int, **sets) -> list[tuple[data.Batch, dict, tuple]]:
        stream = stream_of(pyramid).load("cpu")
        found = prepared(stream, *rank, steps=steps, **sets)
        return [(data.Batch(**batch), noise, have) for batch, noise, have in found]

    whole = run(range(6))
    for step, (batch, noise, have) in enumerate(run(range(3, 6), workers=2), 3):
        equal(whole[step][0], batch)
        assert all(map(torch.equal, whole[step][0].prompts, batch.prompts))
        assert same(whole[step][1], noise) and whole[step][2] == have
    halves = [run((0, 2, 4), rank, 2) for rank in (0, 1)]
    for step, *both in zip((0, 2, 4), *halves):
        batch, noise, have = whole[step]
        for rank, (part, *_) in enumerate(both):
            equal(batch, part, slice(2 * rank, 2 * rank + 2))
        ours = {name: torch.cat([part[1][name] for part in both]) for name in noise}
        assert same(noise, ours) and have == [sum(pair) for pair in zip(both[0][2], both[1][2])]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_process_that_has_the_device_prepares_nothing(pyramid, monkeypatch):
    """Pictures are decoded, and made ready for the VLM, in the processes of the loader; what they
    give is encoded as it would be without them."""
    stream = stream_of(pyramid).load("cpu")
    plain = [stream.inputs(batch, "cpu") for batch, *_ in prepared(stream, steps=range(2))]
    here = os.getpid()
    for place, name in ((Pyramid, "window"), (frozen, "prepare_image"), (frozen, "prompt_ids")):
        real = getattr(place, name)

        def elsewhere(*args, real=real, **more):
            assert os.getpid() != here, "done by the process that has the device"
            return real(*args, **more)

        monkeypatch.setattr(place, name, elsewhere)
    for inputs, (batch, *_) in zip(plain, prepared(stream, steps=range(2), workers=1)):
        assert same(present(inputs), present(stream.inputs(batch, "cpu")))
    with pytest.raises(AssertionError, match="the process that has the device"):
        prepared(stream, steps=range(1))


def present(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: x for name, x in vars(inputs).items() if x is not None}


def test_the_vae_encodes_in_bf16_where_that_is_the_precision(pyramid):
    """Latents stay fp32 and within two per cent; what made them is told by the weights as they
    were."""
    rows = pyramid.draw(4, 0, 0)
    full, half = (stream_of(pyramid).load("cpu", how) for how in ("fp32", "bf16"))
    a, b = (stream.inputs(stream.prepare(rows), "cpu") for stream in (full, half))
    assert half.backbones.vae.conv1.weight.dtype == torch.bfloat16
    assert a.latents.dtype == b.latents.dtype == torch.float32
    error = (a.latents - b.latents).norm() / a.latents.norm()
    assert 1e-4 < error < 0.02, error
    assert torch.equal(a.und, b.und) and full.made_by == half.made_by


# -- windows encoded beforehand -------------------------------------------------------------------


def pool_of(folder: Path, sources: list[int], weights: list[float]) -> data.Pool:
    """Windows that hold their number, in a file."""
    rows = torch.stack([torch.tensor(sources), torch.arange(len(sources))], dim=1)
    about = {"windows": torch.tensor(sources).bincount(minlength=len(weights)).tolist()}
    about |= {"sources": [], "weights": weights, "interval": None, "made_by": {}, "robots": []}

    def encode(chunks):
        for chunk in chunks:
            numbers = chunk[:, 1:].float()
            lengths = torch.ones(len(chunk), dtype=torch.int64)
            states = {"context": numbers[:, None], "context_len": lengths}
            yield states | {"latents": numbers}, ["do"] * len(chunk)

    windows.write(folder / "pool.safetensors", rows, about | {"widths": {}}, encode)
    return data.Pool(folder / "pool.safetensors", "toy", "3")


def test_batches_are_a_function_of_seed_and_step_and_mix_sources_by_weight(tmp_path):
    """The same rows whatever was drawn before; each source gets its share, however many windows it
    has; one without any gets none."""
    sources = torch.tensor([0] * 50 + [1] * 5 + [3] * 500)
    pool = pool_of(tmp_path, sources.tolist(), [1, 1, 5, 1])
    rows = pool.rows(30, seed=1, step=7)
    assert torch.equal(rows, pool.rows(30, 1, 7))
    assert not torch.equal(rows, pool.rows(30, 1, 8)) and not torch.equal(rows, pool.rows(30, 2, 7))
    assert sources[rows].bincount().tolist() == [10, 10, 0, 10]
    assert torch.equal(pool.prepare(rows)["latents"][:, 0], rows.float())
    digest, pool.weights = pool.digest(), [4, 1, 5, 1]
    assert pool.digest() != digest
    assert sources[pool.rows(60, 1, 7)].bincount().tolist() == [40, 10, 0, 10]


def encoded(pyramid, count: int, out: Path, stage: str = "3") -> data.Pool:
    """A cache of `count` windows, made by one process."""
    stream = stream_of(pyramid, stage)
    stream.write(out, windows.rows_to_encode(pyramid, count, 0), "cpu", "fp32")
    return data.Pool(out, "toy", stage)


@pytest.fixture(scope="module")
def pool(pyramid, tmp_path_factory) -> data.Pool:
    return encoded(pyramid, 9, tmp_path_factory.mktemp("pool") / "pool.safetensors")


def test_a_pool_holds_each_window_once_and_no_more_than_there_are(pyramid, pool, tmp_path):
    """Nine of many; of few windows all but for chance, and without a number all."""
    assert len(pool) == 9 and pool.interval is None and pool.config == CONFIG
    source = {"path": "world:toy", "episodes": 2}
    (tmp_path / "card.json").write_text(json.dumps({"sources": [source]}))
    few = opened(tmp_path)
    count = few.opened[0].windows
    some, every = (windows.rows_to_encode(few, wanted, 0) for wanted in (100, 0))
    assert 0.9 * count < len(some) <= count < 100 and len(every) == count
    rows = list(map(tuple, every.tolist()))
    assert rows == sorted(set(rows)) and set(map(tuple, some.tolist())) <= set(rows)
    assert len({tuple(row) for row in few.draw(5000, 0, 0).tolist()} | set(rows)) == count
    source["draw"] = "tasks"
    (tmp_path / "card.json").write_text(json.dumps({"sources": [source]}))
    with pytest.raises(ValueError, match="drawn by tasks: say how many .*--windows N"):
        windows.rows_to_encode(opened(tmp_path), 0, 0)


def test_windows_encoded_before_are_those_encoded_when_needed(pyramid, robots, pool):
    """All windows of a pool, by the rows they came from, to the bit; and so are the robots, the
    sources and how they are mixed."""
    stream = stream_of(pyramid).load("cpu")
    rows = windows.rows_to_encode(pyramid, 9, 0)
    live = present(stream.inputs(stream.prepare(rows), "cpu"))
    assert same(live, present(pool.inputs(pool.prepare(torch.arange(9)), "cpu")))
    assert (pool.robots, pool.weights) == (robots, [1.0])
    assert pool.sources == [["level6_gripper", 6, "gripper", 0]]  # moved by no pixel


def test_a_cache_in_shards_is_the_cache_in_a_file(card, tmp_path, monkeypatch):
    """By one process or three, with four windows in a shard: batches are the same to the bit, each
    shard has each instruction's states once."""
    monkeypatch.setattr(windows, "SHARD", 4)
    monkeypatch.setattr(windows, "CHUNK", 2)
    windows.opened.cache_clear()
    pyramid = opened(card, (2, 5))
    whole = encoded(pyramid, 26, tmp_path / "whole.safetensors", "1")
    for name, ranks in (("one", (0,)), ("three", (2, 0, 1))):
        for rank in ranks:
            stream, rows = stream_of(pyramid, "1"), windows.rows_to_encode(pyramid, 26, 0)
            stream.write(tmp_path / name, rows, "cpu", "fp32", rank, len(ranks))
        pool = data.Pool(tmp_path / name, "toy", "1")
        assert len(pool.files) == 7 and pool.digest() == whole.digest()
        for step in range(5):
            ours, theirs = (p.prepare(p.rows(16, 0, step)) for p in (pool, whole))
            assert same(ours, theirs)
    for file in pool.files:
        with open_source(file) as source:
            texts = source.read("text").unique()
            assert len(source.read("context")) == len(texts) <= len(source.read("latents")) <= 4


def test_a_cache_needs_the_memory_of_a_shard(pyramid, tmp_path, monkeypatch):
    """However many windows there are: never are more alive than those of a shard and a chunk, and
    no more than so many files are mapped."""
    monkeypatch.setattr(windows, "SHARD", 8)
    monkeypatch.setattr(windows, "CHUNK", 4)
    alive, most = {}, []
    real = data.Stream.inputs

    def counted(*args) -> Inputs:
        inputs = real(*args)
        alive[len(most)] = len(inputs)
        weakref.finalize(inputs.latents, alive.pop, len(most))
        most.append(sum(alive.values()))
        return inputs

    monkeypatch.setattr(data.Stream, "inputs", counted)
    pool = encoded(pyramid, 60, tmp_path / "shards")
    assert len(pool) == 60 and len(most) == 15 and max(most) <= 12
    info = windows.opened.cache_info()
    assert info.maxsize == windows.OPEN and info.maxsize < 1000


def test_a_cache_that_was_killed_goes_on_where_it_was(pyramid, tmp_path, monkeypatch):
    """Shards that are there are not made again, and the result is that of an uninterrupted one.
    Until then it is refused, and so is another cache in its folder."""
    monkeypatch.setattr(windows, "SHARD", 4)
    monkeypatch.setattr(windows, "CHUNK", 4)
    whole = encoded(pyramid, 14, tmp_path / "whole")
    save, part = windows.save_safetensors, tmp_path / "part"

    def killed(path, tensors, metadata):
        if path.name == "windows_000002.safetensors":
            raise KeyboardInterrupt
        save(path, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(windows, "save_safetensors", killed)
        with pytest.raises(KeyboardInterrupt):
            encoded(pyramid, 14, part)
    with pytest.raises(ValueError, match="has 2 of 4 shards; run the command .* again"):
        data.Pool(part, "toy", "3")
    with pytest.raises(
        ValueError, match='is of another cache: .*"windows": .14., .* now it is to be'
    ):
        encoded(pyramid, 13, part)
    made = []
    monkeypatch.setattr(windows, "save_safetensors", lambda *a: made.append(a[0].name) or save(*a))
    pool = encoded(pyramid, 14, part)
    assert made == ["windows_000002.safetensors", "windows_000003.safetensors"]
    assert [file.read_bytes() for file in pool.files] == [f.read_bytes() for f in whole.files]
    monkeypatch.setattr(data.Stream, "load", lambda *_: pytest.fail("nothing is left to encode"))
    encoded(pyramid, 14, part)


def test_latents_are_kept_in_bf16_where_that_is_the_precision(pyramid, tmp_path):
    """Half their bytes in the file, fp32 in a batch."""
    stream, rows = stream_of(pyramid), windows.rows_to_encode(pyramid, 4, 0)
    stream.write(tmp_path / "a.safetensors", rows, "cpu", "bf16")
    pool = data.Pool(tmp_path / "a.safetensors", "toy", "3")
    assert pool[0]["latents"].dtype == torch.bfloat16
    assert pool.prepare(torch.arange(4))["latents"].dtype == torch.float32


@pytest.mark.slow
def test_a_cache_of_a_killed_process_is_finished_by_torchrun(tmp_path):
    """The command as it is typed: one process, killed after its first shard, and two that go on,
    write the files that one writes at once. One file for two processes is refused."""
    source = {"path": "world:toy", "episodes": 24}
    (tmp_path / "card.json").write_text(json.dumps({"sources": [source]}))
    argv = ["cache", "--data", str(tmp_path), "--stage", "3", "--windows", "600", "--out"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]

    def start(*words: str) -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, **pipes)

    def with_torchrun(out: Path) -> tuple[int, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        process = start(*launch, port, "data.py", *argv, str(out))
        said, _ = process.communicate(timeout=500)
        return process.returncode, said

    killed = start("data.py", *argv, str(tmp_path / "two"))
    while not (tmp_path / "two/windows_000000.safetensors").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    first = (tmp_path / "two/windows_000000.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="has . of 3 shards"):
        data.Pool(tmp_path / "two", "toy", "3")
    code, said = with_torchrun(tmp_path / "two")
    assert code == 0, said[-3000:]
    data.main([*argv, str(tmp_path / "one")])
    one, two = (data.Pool(tmp_path / name, "toy", "3") for name in ("one", "two"))
    assert [file.read_bytes() for file in one.files] == [file.read_bytes() for file in two.files]
    assert two.files[0].stat().st_mtime_ns == first
    code, said = with_torchrun(tmp_path / "two.safetensors")
    assert code and "is a file; for 2 processes name a folder" in said


def test_a_stale_or_foreign_cache_is_refused_by_name(pool, tmp_path, monkeypatch):
    """Another VAE, another network, another stage, a latent-action encoder that is not there or is
    another one; a file that is no cache. Backbones whose files are not here are not needed."""
    with pytest.raises(ValueError, match="is stale: stage was 3, is 1"):
        data.Pool(pool.path, "toy", "1").check()
    with pytest.raises(ValueError, match="is no cache of windows"):
        data.Pool(PRESETS["toy"].backbones / "vae.safetensors", "toy", "3")
    folder = tmp_path / "backbones"
    shutil.copytree(PRESETS["toy"].backbones, folder)
    words = (folder / "vlm.json").read_text()
    (folder / "vlm.json").write_text(words.replace('"red"', '"crimson"'))
    monkeypatch.setenv("MOTUS_BACKBONES", str(folder))
    with pytest.raises(ValueError, match=r"is stale: vlm was \w+, is (?!.*(text|vae) was)"):
        pool.check()
    monkeypatch.setenv("MOTUS_BACKBONES", str(tmp_path / "none"))
    pool.check()
    monkeypatch.delenv("MOTUS_BACKBONES")
    latent_model(3, tmp_path / "run")
    known = pool.made_by
    pool.made_by = known | {"latent": data.LatentEncoder(tmp_path / "run").fingerprint}
    pool.check(tmp_path / "run")
    with pytest.raises(ValueError, match="is stale: latent was .*, is None.*--latent"):
        pool.check()
    pool.made_by = known | {"latent": "0123"}
    with pytest.raises(ValueError, match="is stale: latent was 0123, is"):
        pool.check(tmp_path / "run")
    pool.made_by = known


def test_published_backbones_are_told_apart_without_reading_them(tmp_path, monkeypatch):
    """By name, size and samples of their files, of which some kilobytes are read; a changed one is
    noticed, one of another part is not."""
    files = ("wan/Wan2.2_VAE.pth", "wan/models_t5_umt5-xxl-enc-bf16.pth", "qwen3vl/a.safetensors")
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).numpy()
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(values.tobytes())
    monkeypatch.setenv("MOTUS_BACKBONES", str(tmp_path))
    monkeypatch.setattr(data.Backbones, "load", lambda *_: pytest.fail("weights were loaded"))
    before = data.makers("full", preset("full"), "3")
    assert len({before[part] for part in ("vae", "text", "vlm")}) == 3
    (tmp_path / files[0]).write_bytes((values * 1.01).tobytes())
    after = data.makers("full", preset("full"), "3")
    assert before.pop("vae") != after.pop("vae") and before == after
    assert "vlm" not in data.makers("full", preset("full"), "1")


def test_the_cache_command_writes_what_each_stage_reads(tmp_path, capsys):
    """Stage 3 with actions and state, stage 2 with latent actions, stage 1 with neither, and
    without understanding."""
    latent_model(3, tmp_path / "run")
    few = ["--episodes", "1", "--windows", "3"]
    for stage, numbers in (("1", 0), ("2", 14), ("3", 3)):
        file, latent = tmp_path / f"{stage}.safetensors", tmp_path / "run" if stage == "2" else None
        argv = ["cache", "--stage", stage, *few, "--out", str(file)]
        data.main(argv + (["--latent", str(latent)] if latent else []))
        assert "3 windows" in capsys.readouterr().out
        pool = data.Pool(file, "toy", stage)
        pool.check(latent)
        assert pool.interval == (3 if stage == "2" else None)
        assert ("und" in pool[0]) == (stage != "1") and ("state" in pool[0]) == (stage == "3")
        assert pool[0]["actions"].shape[2] == numbers if numbers else "actions" not in pool[0]


def test_a_card_with_other_weights_mixes_cached_windows_anew(card, tmp_path):
    """Windows that are encoded already are drawn as those encoded under that card's weights would
    be; a card of other sources is refused."""
    pyramid = opened(card, (2, 5))
    pool = encoded(pyramid, 24, tmp_path / "pool.safetensors", "1")
    sources = torch.arange(3).repeat_interleave(torch.tensor(pool.windows))
    before, digest = set(sources[pool.rows(32, 0, 0)].tolist()), pool.digest()
    lines = json.loads(card.read_text())
    for i, line in enumerate(lines["sources"]):
        line["weight"] = 0.001 if i else 1000.0
        line["path"] = str(card.parent / line["path"])
    (tmp_path / "other.json").write_text(json.dumps(lines))
    pool.mix(opened(tmp_path / "other.json", (2, 5)))
    assert before == {0, 1, 2} and pool.digest() != digest
    assert set(sources[pool.rows(32, 0, 0)].tolist()) == {0}
    with pytest.raises(ValueError, match="same sources"):
        pool.mix(opened(card, (5,)))


# -- one's own data -------------------------------------------------------------------------------


def opened(path, levels=(6,), **more) -> Pyramid:
    return Pyramid(path, levels, CONFIG.frames, (48, 48), **more)


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    """A few episodes on disk, as `python data.py convert` writes them."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("recorded")
    lines = [
        {"level": 2, "embodiment": "hand"},
        {"level": 5, "embodiment": "arm"},
        {"level": 5, "embodiment": "gantry"},
        {"level": 6, "embodiment": "gripper"},
    ]
    sources = [{"path": "world:toy", "episodes": 3, "held_out": 2} | line for line in lines]
    (folder / "card.json").write_text(json.dumps({"action_hz": 15, "sources": sources}))
    data.main(["convert", str(folder), str(folder / "toy")])
    return folder / "toy/card.json"


def log(path) -> list[dict]:
    """The rows of a run's log, without what a machine makes of them."""
    rows = csv.DictReader((path / "log.csv").open())
    return [{k: v for k, v in row.items() if not k.endswith(("_s", "mfu", "_gb"))} for row in rows]


def trained(stage: str, out: Path, *argv: object, steps: int = 1, sets=("windows=0",)) -> Path:
    """The folder of a run of a few steps."""
    settings = ["--steps", str(steps), "--set", "batch=4", "log_every=1", *sets]
    train.main(["--stage", stage, "--out", str(out), *map(str, argv), *settings])
    return out


def test_a_run_from_a_card_knows_its_robot_and_is_sampled_in_its_units(card, tmp_path, capsys):
    """Stage 3 on windows encoded beforehand: the checkpoint holds rates, camera, picture size,
    robot and ranges; the five modes run on held-out episodes; actions come out in the robot's own
    range; the report was printed."""
    run = trained("3", tmp_path / "run", "--data", card, sets=("windows=8",))
    assert "video at 5 Hz" in capsys.readouterr().err
    known = Card.read(newest_step(run) / "config.json").statistics
    facts = [known[k] for k in ("embodiment", "rate", "action_hz", "cameras", "size")]
    assert facts == ["gripper", 3, 15, ["top"], [48, 48]]
    ranges = known["actions"]
    assert len(ranges["q01"]) == len(known["state"]["max"]) == 3
    assert -1 <= ranges["min"][0] < ranges["max"][0] <= 1
    few = ["--data", str(card), "--steps", "1", "--episodes", "2"]
    sample.main(["--ckpt", str(run), "--mode", "all", *few])
    figures = json.loads((newest_step(run) / "samples/figures.json").read_text())["figures"]
    assert set(figures) == {"joint", "vla", "world_model", "idm", "vgm"}
    policy = sample.Policy.load(run, steps=1)
    picture, state = np.zeros((1, 96, 96, 3), np.uint8), np.zeros((1, 3), np.float32)
    actions = policy.act(picture, state, ["push the red disc to the left"])
    normalised = policy.statistics.actions.apply(torch.from_numpy(actions))
    assert actions.shape == (1, 12, 3) and normalised.abs().max() < 20
    assert not torch.allclose(normalised, torch.from_numpy(actions))


def test_two_robots_train_together_and_each_acts_in_its_own_numbers(card, tmp_path):
    """Four-dimensional arm and three-dimensional gripper in one stage 3: the checkpoint knows both,
    and acts as the one that is named."""
    stored = json.loads(card.read_text())
    for source in stored["sources"]:
        source["path"] = str(card.parent / source["path"])
        source["level"] = 6 if source["embodiment"] in ("arm", "gripper") else 5
    (tmp_path / "card.json").write_text(json.dumps(stored))
    run = trained("3", tmp_path / "run", "--data", tmp_path)
    with pytest.raises(ValueError, match="this checkpoint knows 'arm', 'gripper'"):
        sample.Policy.load(run)
    picture = np.zeros((1, 48, 48, 3), np.uint8)
    for robot, width in (("arm", 4), ("gripper", 3)):
        policy = sample.Policy.load(run, steps=1, robot=robot)
        state = np.zeros((1, width), np.float32)
        actions = policy.act(picture, state, ["push the red disc to the left"])
        assert actions.shape == (1, 12, width) and policy.statistics.embodiment == robot
    arm = ["--ckpt", str(run), "--robot", "arm", "--steps", "1"]
    sample.main([*arm, "--data", str(tmp_path), "--mode", "idm", "--episodes", "1"])
    few = ["--episodes", "2", "--max-steps", "8", "--out", str(tmp_path / "out")]
    evaluate.main([*arm, "--random", *few])
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["rows"]
    assert {row["policy"] for row in rows} == {"joint", "random"}
    with pytest.raises(ValueError, match="this checkpoint knows 'arm', 'gripper'"):
        evaluate.main(["--ckpt", str(run), *few])


def test_windows_encoded_when_needed_resume_to_the_sample(card, tmp_path):
    """windows=0: four steps at once, and two and two more, write the same log; the wait for data is
    measured."""
    sets = ("windows=0", "save_every=2", "keep=9")
    whole = trained("3", tmp_path / "whole", "--data", card, steps=4, sets=sets)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "step_000004")
    trained("3", part, "--data", card, "--resume", steps=4, sets=sets)
    assert log(whole) == log(part) and len(log(whole)) == 4
    waits = csv.DictReader((whole / "log.csv").open())
    assert all(float(row["data_wait_s"]) >= 0 for row in waits)


def test_a_cache_of_a_card_trains_as_the_card_does(card, tmp_path):
    """`data.py cache --data` and then `--cache` gives the same losses; a cache of another stage is
    refused."""
    file = tmp_path / "windows.safetensors"
    argv = ["cache", "--data", str(card), "--stage", "3", "--windows", "8", "--out", str(file)]
    data.main(argv)
    logs = [
        log(trained("3", tmp_path / name[2:], name, source, steps=2, sets=("windows=8",)))
        for name, source in (("--data", card), ("--cache", file))
    ]
    assert logs[0] == logs[1]
    with pytest.raises(ValueError, match="stage was 3, is 1"):
        trained("1", tmp_path / "wrong", "--cache", file)


def test_stages_1_and_2_train_from_a_card(card, tmp_path):
    """Video of several robots; then on latent actions, once they are there. The checkpoint knows
    all robots."""
    shutil.copytree(card.parent, tmp_path / "toy")
    ours = tmp_path / "toy/card.json"
    first = trained("1", tmp_path / "s1", "--data", ours)
    stored = Card.read(newest_step(first) / "config.json")
    assert [r["embodiment"] for r in stored.statistics["robots"]] == ["arm", "gantry", "hand"]
    with pytest.raises(ValueError, match="holds no latent actions.*scripts.latents encode"):
        trained("2", tmp_path / "no", "--data", ours, "--init", first)
    for o in opened(ours, (2, 5)).opened:
        write_latents(o.folder, o.reader.lengths[:].tolist())
    second = trained("2", tmp_path / "s2", "--data", ours, "--init", first)
    assert float(log(second)[0]["action"]) > 0
    few = ["--steps", "1", "--episodes", "2"]
    sample.main(["--ckpt", str(second), "--data", str(ours), "--mode", "joint", *few])


def test_inspect_says_what_is_used_and_writes_a_card_with_every_choice(card, tmp_path, capsys):
    """A bare dataset becomes a card that gives the same windows; the picture shows some of them."""
    folder, file, out = card.parent / "level6_gripper", tmp_path / "card.json", tmp_path / "a.png"
    data.main(["inspect", str(folder), "--out", str(out), "--card", str(file)])
    text = capsys.readouterr().out
    assert "LeRobot v3.0, robot gripper" in text and "no fault found" in text
    assert out.stat().st_size > 10_000
    bare, written = opened(folder), opened(file)
    ours, theirs = (p.window((0, 1, 3), "real") for p in (bare, written))
    for name, value in vars(ours).items():
        assert np.array_equal(value, getattr(theirs, name)), name


def test_inspect_and_check_take_a_world_too(tmp_path, capsys):
    """A card of rendered episodes has no faults and keeps its lines."""
    source = {"path": "world:toy", "level": 5, "embodiment": "arm", "episodes": 1}
    (tmp_path / "card.json").write_text(json.dumps({"sources": [source]}))
    again = str(tmp_path / "again.json")
    data.main(["inspect", str(tmp_path), "--out", str(tmp_path / "a.png"), "--card", again])
    data.main(["check", again])
    assert capsys.readouterr().out.count("no fault found") == 2


def test_convert_copies_and_check_names_every_fault(card, tmp_path, capsys):
    """A sound dataset passes, also after conversion; two damaged files are two named faults."""
    data.main(["convert", str(card.parent / "level6_gripper"), str(tmp_path / "copy")])
    data.main(["check", str(tmp_path / "copy")])
    assert "no fault found" in capsys.readouterr().out
    for path in (tmp_path / "copy/level6_gripper").rglob("file-000.*"):
        if "meta" not in path.parts:
            path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"(?s)faults.*parquet.*observation.images.top"):
        data.main(["check", str(tmp_path / "copy")])


def test_an_official_copy_is_written_with_its_levels_and_texts(tmp_path):
    """The card of a copy keeps level, weight, robot and words; rates are those of the card."""
    source = {"path": "world:toy", "level": 4, "episodes": 1, "weight": 2.0}
    source["mapping"] = {"instruction": "play"}
    (tmp_path / "card.json").write_text(json.dumps({"video_hz": 3, "sources": [source]}))
    pytest.importorskip("av")
    convert(opened(tmp_path, (4,)), tmp_path / "copy", lossless=True)
    copy = opened(tmp_path / "copy", (4,))
    kept = copy.opened[0].source
    assert (kept.level, kept.weight, kept.embodiment) == (4, 2.0, "gripper")
    assert (copy.video_hz, copy.action_hz, copy.ratio) == (3, 15, 5)
    assert copy.window((0, 0, 0), "real").instruction == "play"


# -- what frozen backbones learn from -------------------------------------------------------------


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Twenty episodes of the walking point, as `python -m scripts.record` writes them, the last of
    which is held out."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    out = tmp_path_factory.mktemp("line") / "set"
    record.record(Order("fake_world", settings=(("size", 32),), after=1), ["walk"], 20, out)
    return out


def wide(path, **more) -> Pyramid:
    return Pyramid(path, (2, 3, 4, 5, 6), 4, (96, 96), **more)


def corpora_of(path, folder, **card) -> list[pretrain.Corpus]:
    """What backbones learn from a card with this dataset alone, and what they are tried on."""
    stored = {"size": [32, 64], "sources": [{"path": str(path)} | card]}
    (folder / "card.json").write_text(json.dumps(stored))
    return [pretrain.Corpus(wide(folder), 9, held_out) for held_out in (False, True)]


@pytest.mark.parametrize(
    "cameras",
    (["observation.images.front"], ["observation.images.front", "observation.images.side"]),
)
def test_labels_of_a_simulator_point_at_the_named_thing(line, tmp_path, cameras):
    """The light is at the labelled place of the picture, be it framed in black or one of two;
    trained-on and held-out episodes differ."""
    corpus, held = corpora_of(line, tmp_path, mapping={"cameras": cameras})
    assert corpus.targets == ("object x", "object y", "walked")
    assert (len(corpus.episodes), len(held.episodes)) == (9, 1)
    assert corpus.sentences == ["walk to the light"]
    assert corpus.clips(3).shape == (3, 3, 5, 32, 64)
    pictures, texts, targets = corpus.grounded(40)
    columns = pictures[:, 16, :, 0].float().argmax(dim=1)
    assert texts == ("walk to the light",) * 40 and (targets[:, 1] == 0.5).all()
    assert (columns - targets[:, 0] * 64).abs().max() < 1
    assert columns.unique().numel() > 3 and targets[:, 2].unique().numel() > 5


def test_labels_are_of_the_head_in_the_t_layout(tmp_path):
    """Head, left and right become one T; the label follows the head's spot into it."""
    pytest.importorskip("av")
    dark, spots = np.zeros((12, 48, 64, 3), np.uint8), [(30, 20), (10, 40)]  # x, y
    episodes = []
    for x, y in spots:
        head = dark.copy()
        head[:, y - 3 : y + 3, x - 3 : x + 3] = 255
        labels = {"object x": np.full(12, x / 64), "object y": np.full(12, y / 48)}
        numbers = np.random.default_rng(x).normal(size=(12, 2)).astype(np.float32)
        views = {"head": head, "left_wrist": dark, "right_wrist": dark}
        episodes.append((views, numbers, numbers, "hand it over", labels))
    write_v3(tmp_path / "arms", episodes, 10)
    sources = [{"path": "arms", "held_out": 0, "embodiment": "arms"}]
    (tmp_path / "card.json").write_text(json.dumps({"size": [96, 96], "sources": sources}))
    corpus = pretrain.Corpus(wide(tmp_path / "card.json"), 9)
    pictures, _, targets = corpus.grounded(16)
    for picture, (x, y) in zip(pictures.numpy(), targets.numpy() * 96):
        assert np.abs(np.argwhere(picture[..., 0] > 128).mean(0) + 0.5 - (y, x)).max() < 1


def test_labels_reach_no_policy(line):
    """The column is neither state nor action nor in any window, and the widths of a network do not
    count it."""
    pyramid = wide(line)
    reader = pyramid.opened[0].reader
    assert reader.titles == {"state": "observation.state", "action": "action"}
    assert reader.widths == (2, 1) and reader.labels(0)
    assert pyramid.window((0, 0, 0), "real").state.shape == (2,)
    assert set(reader.rows(0)) - {"observation.state", "action"} == set(DEFAULTS)
    config = data.network_for(pyramid, "sim", "3")
    assert (config.state_dim, config.action_dim) == (2, 1)


def test_backbones_need_held_out_episodes(line, tmp_path):
    """A dataset without held-out episodes gives no figures: it is told what to do."""
    with pytest.raises(ValueError, match="held"):
        corpora_of(line, tmp_path, held_out=0)
