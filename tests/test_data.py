"""Episodes to batches: two rates in one window, masks past the end, an order that depends on seed
and step alone. And the way of one's own data: record, inspect, check, convert, train, sample."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample
import train
from backbones.frozen import backbones_of
from formats.lerobot import DEFAULTS, write_v3
from motus import Inputs, preset
from scale import checkpoints
from scripts import evaluate, pretrain, record
from weights.card import Card, newest_step
from weights.files import save_safetensors
from worlds.fleet import Order

CONFIG = preset("toy")  # 4 frames, 3 actions per frame: 12 actions


@pytest.fixture(scope="module")
def episodes():
    return data.toy_episodes((6,), 3, seed=5)


def test_a_window_is_action_dense_and_video_sparse(episodes):
    """Frames at s, s+3, ..., s+12; actions s, s+1, ..., s+11; state at s."""
    episode, start = episodes[1], 4
    stats = data.statistics(episodes)
    batch = data.collect(episodes, [(1, start)], CONFIG, stats)
    assert torch.equal(batch.frames[0], torch.from_numpy(episode.frames[[4, 7, 10, 13, 16]]))
    actions = stats.actions.invert(batch.actions[0])
    torch.testing.assert_close(actions, torch.from_numpy(episode.actions[4:16]))
    torch.testing.assert_close(
        stats.state.invert(batch.state[0]), torch.from_numpy(episode.states[4])
    )
    assert batch.action_mask.all() and batch.video_mask.all()


def test_what_lies_past_the_end_is_repeated_and_masked(episodes):
    """Seven actions before the end: five are padding, and so is the latent frame that needs the
    missing video frames."""
    episode = episodes[0]
    start = len(episode.actions) - 7
    batch = data.collect(episodes, [(0, start)], CONFIG, data.statistics(episodes))
    assert batch.action_mask[0, :, 0].tolist() == [True] * 7 + [False] * 5
    assert batch.video_mask[0].tolist() == [True, False]
    assert torch.equal(batch.frames[0, -1], torch.from_numpy(episode.frames[-1]))


def test_latent_actions_are_taken_at_the_video_rate(episodes):
    """Row i of a latent file spans steps i to i + 3, so a chunk of four takes every third row."""
    config = preset("toy", finetune=False, ratio=1, action_dim=14)
    rows = [np.arange(len(e.actions), dtype=np.float32)[:, None].repeat(14, 1) for e in episodes]
    batch = data.collect(episodes, [(2, 5)], config, latents=rows)
    assert batch.actions[0, :, 0].tolist() == [5, 8, 11, 14] and batch.state is None


def test_video_without_actions_has_none(episodes):
    """Stage 1 sees pixels and words."""
    batch = data.collect(data.toy_episodes((2,), 2, seed=0), [(0, 0), (1, 0)], CONFIG)
    assert batch.actions is None and batch.state is None and batch.level.tolist() == [2, 2]


def test_normalisation_round_trips_and_survives_json(episodes):
    """A checkpoint always knows its robot's units."""
    stats = data.statistics(episodes)
    x = torch.randn(5, 3)
    torch.testing.assert_close(stats.actions.invert(stats.actions.apply(x)), x)
    assert data.Statistics.from_json(stats.as_json()) == stats
    rows = stats.actions.apply(torch.from_numpy(np.concatenate([e.actions for e in episodes])))
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(3), atol=1e-2, rtol=0)


def test_a_dimension_that_never_moves_keeps_its_scale():
    """No division by zero."""
    assert data.Normaliser.fit(np.array([[1.0, 2.0], [1.0, 4.0]])).std == (1.0, 1.0)


def test_statistics_refuse_bad_input(episodes):
    """NaN, two robots at once, unknown fields: one clear error each."""
    with pytest.raises(ValueError, match="1 are not finite"):
        data.Normaliser.fit(np.array([[np.nan, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="belong to one robot"):
        data.statistics([*episodes, *data.toy_episodes((5,), 2, seed=0)])
    with pytest.raises(ValueError, match="unknown fields.*colour"):
        data.Statistics.from_json({"embodiment": "x", "rate": 3, "colour": 1})


def test_batches_are_a_function_of_seed_and_step_and_mix_levels_in_equal_shares():
    """The same rows whatever was drawn before; each level gets its share."""
    level = torch.tensor([2] * 50 + [3] * 5 + [5] * 500)
    pool = data.Pool(
        Inputs(torch.zeros(555, 1, 1, 1, 1), torch.zeros(555, 1, 1), torch.ones(555)), level
    )
    rows = pool.rows(30, seed=1, step=7)
    assert torch.equal(rows, pool.rows(30, 1, 7))
    assert not torch.equal(rows, pool.rows(30, 1, 8)) and not torch.equal(rows, pool.rows(30, 2, 7))
    assert {int(v): int((level[rows] == v).sum()) for v in (2, 3, 5)} == {2: 10, 3: 10, 5: 10}


def test_grounding_targets_are_where_the_named_disc_is():
    """The target's pixel has the colour that the sentence names."""
    web = pretrain.ToyWeb(2, seed=0)
    pictures, texts, targets = web.grounded(3, size=64)
    ink = {
        "red": (0, 1),
        "green": (1, 0),
        "blue": (2, 0),
        "yellow": (0, 2),
    }  # strongest channel, a weaker one
    hits = 0
    for picture, text, target in zip(pictures, texts, targets):
        strong, weak = ink[text.split()[2]]
        x, y = (target[:2] * picture.shape[0]).long().clamp(0, picture.shape[0] - 1)
        hits += int(picture[y, x, strong]) > int(picture[y, x, weak])
    assert hits > 0.8 * len(texts)  # a robot may cover the disc


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Twenty episodes of the walking point, as `python evaluate.py record` writes them, the last of
    which is held out."""
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    out = tmp_path_factory.mktemp("line") / "set"
    record.record(Order("fake_world", settings=(("size", 32),), after=1), ["walk"], 20, out)
    return out


def web_of(path, folder, **card):
    """What backbones learn from a card with this dataset alone."""
    (folder / "card.json").write_text(
        json.dumps({"size": [32, 64], "sources": [{"path": str(path)} | card]})
    )
    return pretrain.CardWeb(data.Pyramid(folder, name="sim"), 9, 0), pretrain.CardWeb(
        data.Pyramid(folder, name="sim"), 9, 0, held_out=True
    )


@pytest.mark.parametrize(
    "cameras",
    (["observation.images.front"], ["observation.images.front", "observation.images.side"]),
)
def test_labels_of_a_simulator_point_at_the_named_thing(line, tmp_path, cameras):
    """The light is at the labelled place of the picture, be it framed in black or one of two;
    trained-on and held-out episodes differ."""
    web, held = web_of(line, tmp_path, mapping={"cameras": cameras})
    assert web.targets == ("object x", "object y", "walked") and (
        len(web.videos),
        len(held.videos),
    ) == (9, 1)
    assert web.sentences == ["walk to the light"] and web.clips(1, 3).shape == (3, 5, 32, 64, 3)
    pictures, texts, targets = web.grounded(3, 40)
    columns = pictures[:, 16, :, 0].float().argmax(dim=1)
    assert (
        texts == ["walk to the light"] * 40
        and (columns - targets[:, 0] * 64).abs().max() < 1
        and (targets[:, 1] == 0.5).all()
    )
    assert columns.unique().numel() > 3 and targets[:, 2].unique().numel() > 5


def test_labels_are_of_the_head_in_the_t_layout(tmp_path):
    """Head, left and right become one T; the label follows the spot in the head's picture into it."""
    pytest.importorskip("pyarrow"), pytest.importorskip("av")
    dark, spots = np.zeros((12, 48, 64, 3), np.uint8), [(30, 20), (10, 40)]  # x, y
    episodes = []
    for x, y in spots:
        head = dark.copy()
        head[:, y - 3 : y + 3, x - 3 : x + 3] = 255
        labels = {"object x": np.full(12, x / 64), "object y": np.full(12, y / 48)}
        numbers = np.random.default_rng(x).normal(size=(12, 2)).astype(np.float32)
        episodes.append(
            (
                {"head": head, "left_wrist": dark, "right_wrist": dark},
                numbers,
                numbers,
                "hand it over",
                labels,
            )
        )
    write_v3(tmp_path / "arms", episodes, 10)
    (tmp_path / "card.json").write_text(
        json.dumps(
            {"size": [96, 96], "sources": [{"path": "arms", "held_out": 0, "embodiment": "arms"}]}
        )
    )
    web = pretrain.CardWeb(data.Pyramid(tmp_path / "card.json", name="sim"), 9, 0)
    pictures, _, targets = web.grounded(0, 16)
    for picture, (x, y) in zip(pictures.numpy(), targets.numpy() * 96):
        assert np.abs(np.argwhere(picture[..., 0] > 128).mean(0) + 0.5 - (y, x)).max() < 1


def test_labels_reach_no_policy(line):
    """The column is neither state nor action nor in any window, and the widths of a network do not
    count it."""
    pyramid = data.Pyramid(line, name="sim")
    reader = pyramid.opened[0].reader
    assert (reader.state_key, reader.action_key, reader.widths) == (
        "observation.state",
        "action",
        (2, 1),
    ) and reader.labels(0)
    assert pyramid.window((0, 0, 0), "real")[5].shape == (2,) and set(reader.rows(0)) - {
        "observation.state",
        "action",
    } == set(DEFAULTS)
    assert (pyramid.config(preset("sim")).state_dim, pyramid.config(preset("sim")).action_dim) == (
        2,
        1,
    )


def test_backbones_need_labels_and_held_out_episodes(line, card, tmp_path):
    """A dataset of a real robot has no labels, one without held-out episodes no figures: both are
    told what to do."""
    with pytest.raises(ValueError, match=r"has the labels \[\].*record the dataset"):
        pretrain.CardWeb(data.Pyramid(card, (6,)), 2, 0)
    with pytest.raises(ValueError, match="no episode is held out"):
        web_of(line, tmp_path, held_out=0)


# -- one's own data -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """The toy pyramid on disk: `python data.py record`."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    out = tmp_path_factory.mktemp("recorded") / "toy"
    data.main(
        ["record", "--out", str(out), "--levels", "2,5,6", "--episodes", "4", "--held-out", "2"]
    )
    return out / "card.json"


def log(path) -> list[dict]:
    """The rows of a run's log, without what a machine makes of them."""
    rows = csv.DictReader((path / "log.csv").open())
    return [{k: v for k, v in row.items() if not k.endswith(("_s", "mfu", "_gb"))} for row in rows]


def test_a_run_from_a_card_knows_its_robot_and_is_sampled_in_its_units(card, tmp_path, capsys):
    """Stage 3 on windows encoded beforehand: the checkpoint holds rates, camera, picture size,
    robot and ranges; the five modes run on held-out episodes; actions come out in the robot's own
    range; the report was printed."""
    train.main(
        [
            "--stage",
            "3",
            "--data",
            str(card),
            "--run",
            str(tmp_path / "run"),
            "--steps",
            "2",
            "--set",
            "batch=4",
            "windows=8",
        ]
    )
    assert "video at 5 Hz" in capsys.readouterr().err
    known = Card.read(newest_step(tmp_path / "run") / "config.json").statistics
    assert [known[k] for k in ("embodiment", "rate", "action_hz", "cameras", "size")] == [
        "gripper",
        3,
        15,
        ["front"],
        [48, 48],
    ]
    ranges = known["actions"]
    assert (
        len(ranges["q01"]) == len(known["state"]["max"]) == 3
        and -1 <= ranges["min"][0] < ranges["max"][0] <= 1
    )
    sample.main(
        [
            "--ckpt",
            str(tmp_path / "run"),
            "--data",
            str(card),
            "--mode",
            "all",
            "--steps",
            "1",
            "--episodes",
            "2",
        ]
    )
    figures = json.loads((newest_step(tmp_path / "run") / "samples/figures.json").read_text())[
        "figures"
    ]
    assert set(figures) == {"joint", "vla", "world_model", "idm", "vgm"}
    policy = sample.Policy.load(tmp_path / "run", steps=1)
    actions = policy.act(
        np.zeros((1, 96, 96, 3), np.uint8),
        np.zeros((1, 3), np.float32),
        ["push the red disc to the left"],
    )
    robot = policy.statistics.actions
    normalised = robot.apply(torch.from_numpy(actions))
    assert (
        actions.shape == (1, 12, 3)
        and normalised.abs().max() < 20
        and not torch.allclose(normalised, torch.from_numpy(actions))
    )


def test_two_robots_train_together_and_each_acts_in_its_own_numbers(card, tmp_path):
    """Four-dimensional arm and three-dimensional gripper in one stage 3: the checkpoint knows both,
    and acts as the one that is named."""
    stored = json.loads(card.read_text())
    for source in stored["sources"]:
        source |= {
            "path": str(card.parent / source["path"]),
            "level": 6 if source["embodiment"] in ("arm", "gripper") else 5,
        }
    (tmp_path / "card.json").write_text(json.dumps(stored))
    train.main(
        [
            "--stage",
            "3",
            "--data",
            str(tmp_path),
            "--run",
            str(tmp_path / "run"),
            "--steps",
            "1",
            "--set",
            "batch=4",
            "windows=0",
        ]
    )
    with pytest.raises(ValueError, match="this checkpoint knows 'arm', 'gripper'"):
        sample.Policy.load(tmp_path / "run")
    for robot, width in (("arm", 4), ("gripper", 3)):
        policy = sample.Policy.load(tmp_path / "run", steps=1, robot=robot)
        actions = policy.act(
            np.zeros((1, 48, 48, 3), np.uint8),
            np.zeros((1, width), np.float32),
            ["push the red disc to the left"],
        )
        assert actions.shape == (1, 12, width) and policy.statistics.embodiment == robot
    sample.main(
        [
            "--ckpt",
            str(tmp_path / "run"),
            "--robot",
            "arm",
            "--data",
            str(tmp_path),
            "--mode",
            "idm",
            "--steps",
            "1",
            "--episodes",
            "1",
        ]
    )
    few = ["--episodes", "2", "--max-steps", "8", "--steps", "1", "--looks", "clean"]
    evaluate.main(
        [
            "--ckpt",
            str(tmp_path / "run"),
            "--robot",
            "arm",
            "--out",
            str(tmp_path / "out"),
            "--random",
            *few,
        ]
    )
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["joint", "random"]
    with pytest.raises(ValueError, match="this checkpoint knows 'arm', 'gripper'"):
        evaluate.main(["--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *few])


def test_windows_encoded_when_needed_resume_to_the_sample(card, tmp_path):
    """windows=0: four steps at once, and two and two more, write the same log; the wait for data is
    measured."""
    argv = ["--stage", "3", "--data", str(card), "--steps", "4"]
    settings = ["--set", "batch=4", "windows=0", "log_every=1", "save_every=2"]
    train.main([*argv, "--run", str(tmp_path / "whole"), *settings])
    stop = checkpoints.save_checkpoint

    def stop_after_two(run, step, *rest):
        stop(run, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    checkpoints.save_checkpoint = stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main([*argv, "--run", str(tmp_path / "part"), *settings])
    finally:
        checkpoints.save_checkpoint = stop
    train.main([*argv, "--run", str(tmp_path / "part"), "--resume", *settings])
    assert log(tmp_path / "whole") == log(tmp_path / "part") and len(log(tmp_path / "whole")) == 4
    assert all(
        float(row["data_wait_s"]) >= 0
        for row in csv.DictReader((tmp_path / "whole/log.csv").open())
    )


def test_a_cache_of_a_card_trains_as_the_card_does(card, tmp_path):
    """`data.py cache --data` and then `--cache` gives the same losses; a cache of another stage is
    refused."""
    file = tmp_path / "windows.safetensors"
    data.main(["cache", "--data", str(card), "--stage", "3", "--windows", "8", "--out", str(file)])
    for name, source in (("card", ["--data", str(card)]), ("cache", ["--cache", str(file)])):
        train.main(
            [
                "--stage",
                "3",
                *source,
                "--run",
                str(tmp_path / name),
                "--steps",
                "2",
                "--set",
                "batch=4",
                "windows=8",
                "log_every=1",
            ]
        )
    assert log(tmp_path / "card") == log(tmp_path / "cache")
    with pytest.raises(ValueError, match="stage is ''; with --data it is one of 1, 2, 3"):
        data.main(["cache", "--data", str(card), "--out", str(file)])
    with pytest.raises(ValueError, match="cut for another model|holds levels"):
        train.main(
            ["--stage", "1", "--cache", str(file), "--run", str(tmp_path / "wrong"), "--steps", "1"]
        )


def test_a_card_with_other_weights_mixes_cached_windows_anew(card, tmp_path):
    """`--cache FILE --data CARD` trains as the windows encoded under that card's weights would be
    mixed; a run does not go on with other weights, and a card of other sources is refused."""
    file, other, fewer = (
        tmp_path / "windows.safetensors",
        card.parent / "other.json",
        card.parent / "fewer.json",
    )
    data.main(["cache", "--data", str(card), "--stage", "1", "--windows", "64", "--out", str(file)])
    lines = json.loads(card.read_text())
    names = [Path(line["path"]).name for line in lines["sources"] if line.get("level") in (2, 3, 5)]
    for line in lines["sources"]:
        line["weight"] = 1000.0 if Path(line["path"]).name == names[0] else 0.001
    other.write_text(json.dumps(lines))
    fewer.write_text(json.dumps({**lines, "sources": lines["sources"][:1]}))
    config = preset("toy", **data.about_cache(file)["sizes"], finetune=False)
    pool = data.Pool.load(file, backbones_of("toy", config), config)
    before, digest = set(pool.source[pool.rows(32, 0, 0)].tolist()), pool.digest()
    pool.mix(data.Pyramid(other, (2, 3, 5)))
    assert (
        len(before) == len(names) > 1
        and set(pool.source[pool.rows(32, 0, 0)].tolist()) == {0}
        and pool.digest() != digest
    )
    with pytest.raises(ValueError, match="same sources"):
        pool.mix(data.Pyramid(fewer, (2, 3, 5)))
    argv = [
        "--stage",
        "1",
        "--cache",
        str(file),
        "--run",
        str(tmp_path / "run"),
        "--steps",
        "2",
        "--set",
        "batch=4",
    ]
    train.main([*argv, "--data", str(other)])
    with pytest.raises(ValueError, match="resume with the same data"):
        train.main([*argv, "--resume"])


def write_latents(folder, lengths, interval=3, skipped=()):
    """What `latent_action.py encode` leaves: row i is 100 e + i in all of its 14 columns, with mean
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


def test_stages_1_and_2_train_from_a_card(card, tmp_path):
    """Video of several robots; then on latent actions, once they are there. The checkpoint knows
    all robots."""
    shutil.copytree(card.parent, tmp_path / "toy")
    ours, settings = (
        tmp_path / "toy/card.json",
        ["--steps", "1", "--set", "batch=4", "windows=0", "log_every=1"],
    )
    train.main(["--stage", "1", "--data", str(ours), "--run", str(tmp_path / "s1"), *settings])
    stored = Card.read(newest_step(tmp_path / "s1") / "config.json")
    assert [r["embodiment"] for r in stored.statistics["robots"]] == ["arm", "gantry", "hand"]
    with pytest.raises(ValueError, match="holds no latent actions.*latent_action.py encode"):
        train.main(["--stage", "2", "--data", str(ours), "--run", str(tmp_path / "no"), *settings])
    for o in data.Pyramid(ours).opened:
        write_latents(o.folder, o.reader.lengths.tolist())
    train.main(
        [
            "--stage",
            "2",
            "--data",
            str(ours),
            "--init",
            str(tmp_path / "s1"),
            "--run",
            str(tmp_path / "s2"),
            *settings,
        ]
    )
    assert float(log(tmp_path / "s2")[0]["action"]) > 0
    sample.main(
        [
            "--ckpt",
            str(tmp_path / "s2"),
            "--data",
            str(ours),
            "--mode",
            "joint",
            "--steps",
            "1",
            "--episodes",
            "2",
        ]
    )


def test_latent_actions_of_a_dataset_are_standardised_and_masked(card, tmp_path):
    """Rows s, s + 3, ..., less the mean, by the std; unknown past the end and in skipped episodes;
    another interval is refused."""
    shutil.copytree(card.parent, tmp_path / "toy")
    pyramid, config = (
        data.Pyramid(tmp_path / "toy", (2,)),
        preset("toy", finetune=False, ratio=1, action_dim=14),
    )
    lengths = pyramid.opened[0].reader.lengths.tolist()
    write_latents(pyramid.opened[0].folder, lengths, skipped=(1,))
    batch = data.batch_of(
        pyramid,
        torch.tensor([(0, 2, 5), (0, 2, lengths[2] - 8), (0, 1, 0)]),
        "latent",
        config=config,
    )
    assert batch.actions[0, :, 3].tolist() == [(200 + i - 10) / 2 for i in (5, 8, 11, 14)]
    assert batch.action_mask[:, :, 0].tolist() == [
        [True] * 4,
        [True, True, False, False],
        [False] * 4,
    ]
    write_latents(pyramid.opened[0].folder, lengths, interval=6)
    with pytest.raises(ValueError, match="spans 0.4 s, a video step 0.2 s"):
        data.Pyramid(tmp_path / "toy", (2,)).window((0, 0, 0), "latent")


def test_inspect_says_what_is_used_and_writes_a_card_with_every_choice(card, tmp_path, capsys):
    """A bare dataset becomes a card that gives the same windows; the picture shows some of them."""
    folder = str(card.parent / "level6_gripper")
    data.main(
        [
            "inspect",
            folder,
            "--out",
            str(tmp_path / "look.png"),
            "--card",
            str(tmp_path / "card.json"),
        ]
    )
    text = capsys.readouterr().out
    assert (
        "LeRobot v3.0, robot gripper" in text
        and "no fault found" in text
        and (tmp_path / "look.png").stat().st_size > 10_000
    )
    a, b = data.Pyramid(folder), data.Pyramid(tmp_path / "card.json")
    assert (
        b.card["sources"][0]["mapping"]["action"] == "" or b.opened[0].reader.action_key == "action"
    )
    for x, y in zip(a.window((0, 1, 3), "real"), b.window((0, 1, 3), "real")):
        assert np.array_equal(x, y)


def test_check_names_every_fault_and_convert_copies(card, tmp_path, capsys):
    """A sound dataset passes, also after conversion to v2.1; two damaged files are two named
    faults."""
    data.main(
        [
            "convert",
            str(card.parent / "level6_gripper"),
            str(tmp_path / "v2"),
            "--to",
            "lerobot-v2.1",
        ]
    )
    data.main(["check", str(tmp_path / "v2")])
    assert "no fault found" in capsys.readouterr().out
    for name in (
        "data/chunk-000/episode_000001.parquet",
        "videos/chunk-000/observation.images.front/episode_000003.mp4",
    ):
        path = tmp_path / "v2" / name
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        ValueError,
        match=r"(?s)2 faults.*episode 1, data: .*parquet.*episode 3, observation.images.front",
    ):
        data.main(["check", str(tmp_path / "v2")])
    with pytest.raises(ValueError, match="--to is 'rlds'; allowed: lerobot"):
        data.main(["convert", str(tmp_path / "v2"), str(tmp_path / "x"), "--to", "rlds"])
