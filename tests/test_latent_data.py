"""Videos to latent actions: an export that never writes a silent row, tokens to train on, and a
LeRobot column."""

import json

import numpy as np
import pytest
import torch

import latent_action
import train
from backbones import dpflow
from backbones.frozen import BACKBONES
from formats import cards, lerobot
from scripts import latents
from weights.files import open_source
from worlds.tabletop import record

TOY, DCAE = latent_action.PRESETS["toy"], BACKBONES["toy"] / "dcae.safetensors"


def model_of(seed: int = 0) -> latent_action.LatentActionModel:
    torch.manual_seed(seed)
    return latent_action.LatentActionModel(TOY).eval()


# ---- Flow of clips ----


class Shifts:
    """A flow estimator that knows the answer: every pixel moves by the difference of the first
    pixels' red, in units of 1/10."""

    name = "shifts"

    def __call__(self, a, b):
        moved = 10 * (b[:, 0, 0, 0] - a[:, 0, 0, 0])
        return torch.stack([moved, torch.zeros_like(moved)], dim=1)[:, :, None, None].expand(
            -1, -1, *a.shape[2:]
        )


def film(n: int, blank: int | None = None) -> list[torch.Tensor]:
    frames = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) for _ in range(n)]
    for i, frame in enumerate(frames):
        frame[:, 0, 0] = i / 50
    if blank is not None:
        frames[blank] = torch.full((3, 32, 32), 0.5)
    return frames


@pytest.mark.parametrize("composed", [False, True])
def test_measured_rows_do_not_depend_on_chunks_and_mark_what_is_not_real(composed):
    """Row i is the motion from frame i to i + 3, over any chunk size, direct or composed; the last
    two rows end early and are not valid."""
    results = []
    for chunk in (4, 5, 100):
        parts = list(latents.measured_flows(iter(film(12)), Shifts(), 3, composed, chunk))
        results.append((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))
    for flow, valid in results:
        assert flow.shape == (11, 32, 32, 2) and valid.tolist() == [True] * 9 + [False] * 2
        assert torch.allclose(flow[:, 5, 5, 0], torch.tensor([0.6] * 9 + [0.4, 0.2]), atol=1e-5)
        assert torch.allclose(flow, results[0][0], atol=1e-5)


def test_rows_that_touch_a_blank_frame_are_not_valid():
    """A frame of one colour shows no motion: the rows that begin or end there say so."""
    ((_, valid),) = latents.measured_flows(film(8, blank=4), Shifts(), 2)
    assert valid.tolist() == [True, True, False, True, False, True, False]


def encode(*args) -> None:
    latents.main(["encode", *map(str, args)])


def test_export_of_the_toy_writes_resumes_and_refuses_a_mixture(tmp_path, capsys):
    """Official folder and keys, statistics and summary; a second run keeps the files, and another
    way of measuring is refused."""
    model_of().save(tmp_path / "m.safetensors", {"step": "0"})
    args = (
        "--weights",
        tmp_path / "m.safetensors",
        "--data",
        "toy",
        "--episodes",
        2,
        "--out",
        tmp_path / "out",
        "--flow",
        "true",
    )
    encode(*args, "--pt")
    first, second = sorted((tmp_path / "out" / "latent_action_dim14").glob("*.safetensors"))
    official = torch.load(first.with_suffix(".pt"), weights_only=True)
    assert (
        official["latent_action"].shape == (len(official["valid"]), 14)
        and official["interval"] == 3
    )
    assert official["valid"].sum() == len(official["valid"]) - 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        summary["clips"] == 2
        and summary["skipped"] == {}
        and summary["rows"] == summary["valid_rows"] + 4
    )
    assert len(json.loads((tmp_path / "out" / "statistics.json").read_text())["std"]) == 14
    stamp = first.stat().st_mtime_ns
    second.unlink()
    encode(*args)
    assert first.stat().st_mtime_ns == stamp and second.exists()
    model_of(1).save(tmp_path / "m.safetensors")
    with pytest.raises(SystemExit, match="model="):
        encode(*args)


def write_video(path, frames: np.ndarray) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_bad_videos_are_skipped_with_a_reason_each(tmp_path):
    """Of a good, a corrupt, a cut, a one-frame and a one-colour video the good one is encoded and
    the others are named in the summary."""
    pytest.importorskip("cv2")
    frames = record(6, 1, 0)[0].frames[:8].repeat(2, axis=1).repeat(2, axis=2)
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "good.mp4", frames)
    write_video(videos / "single.mp4", frames[:1])
    write_video(videos / "grey.mp4", np.full_like(frames, 128))
    whole = (videos / "good.mp4").read_bytes()
    (videos / "corrupt.mp4").write_bytes(b"not a video" * 100)
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    model_of().save(tmp_path / "m.safetensors")
    args = (
        "--weights",
        tmp_path / "m.safetensors",
        "--data",
        videos,
        "--out",
        tmp_path / "out",
        "--side",
        64,
    )
    encode(*args)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        summary["clips"] == 1
        and summary["rows"] == 7
        and set(summary["skipped"]) == {"corrupt", "cut", "grey", "single"}
    )
    assert (
        "more than one colour" in summary["skipped"]["grey"]
        and "decoded" in summary["skipped"]["corrupt"]
    )
    (videos / "good.mp4").unlink()
    with pytest.raises(SystemExit, match="no usable clip among 4"):
        encode(*args[:-4], "--out", tmp_path / "other", "--side", 64)
    with pytest.raises(SystemExit, match="no \\*.mp4 there"):
        encode(*args[:2], "--data", tmp_path / "nothing", "--out", tmp_path / "out")


def clip(flow: torch.Tensor, labels: torch.Tensor | None = None) -> latents.Clip:
    return latents.Clip(
        lambda: iter([(flow, torch.arange(len(flow)) < len(flow) - 2)]), lambda: labels
    )


def test_flow_that_is_not_finite_is_a_skip_and_flow_too_fast_is_counted(tmp_path):
    """A clip whose estimator failed is named with its reason; of another the share beyond the
    colour range is in the summary."""
    good, bad = torch.zeros(5, 48, 48, 2), torch.full((5, 48, 48, 2), float("nan"))
    good[:, 10:20, 10:20, 0], good[:, 20:30, 20:30, 1] = 5.0, 50.0
    summary = latents.export(model_of(), {"good": clip(good), "bad": clip(bad)}, tmp_path, {})
    assert (
        summary["clips"] == 1
        and "not finite" in summary["skipped"]["bad"]
        and abs(summary["clipped"] - 0.5) < 1e-6
    )
    assert [p.name for p in sorted((tmp_path / "latent_action_dim14").iterdir())] == [
        "good.safetensors"
    ]


def test_labels_that_do_not_fit_are_a_skip(tmp_path):
    """Labels of another length, or NaN in a dimension that is known, skip the clip; a dimension
    that is NaN throughout is one it lacks."""
    flow, labels = torch.zeros(5, 48, 48, 2), torch.zeros(5, 3)
    flow[:, 5:9, 5:9] = 2.0
    lacks, holes = labels.clone(), labels.clone()
    lacks[:, 1], holes[1, 2] = float("nan"), float("nan")
    summary = latents.write_tokens(
        model_of(),
        {
            "short": clip(flow, labels[:3]),
            "holes": clip(flow, holes),
            "lacks": clip(flow, lacks),
            "none": clip(flow),
        },
        tmp_path,
        {},
    )
    assert set(summary["skipped"]) == {"short", "holes"} and "(3, 3)" in summary["skipped"]["short"]
    assert "row 1, dimension 2 is not finite" in summary["skipped"]["holes"]
    tokens, read, mask = latents.read_tokens([tmp_path], model_of())
    assert (
        tokens.shape == (6, 288)
        and read.isfinite().all()
        and mask.tolist() == 3 * [[True, False, True]] + 3 * [[False] * 3]
    )
    with pytest.raises(ValueError, match="dcae="):
        latents.read_tokens([tmp_path], model_of(1))


def test_tokens_of_videos_train_the_encoder(tmp_path, capsys):
    """pretrain, tokens and train.py --stage latent --cache in turn, on the toy as on videos: the
    encoder's file has the DC-AE it used."""
    toy = ("--data", "toy", "--flow", "true", "--labelled", "--level", "4,5", "--episodes", "1")
    latents.main(
        [
            "pretrain",
            *toy,
            "--steps",
            "2",
            "--rows",
            "60",
            "--out",
            str(tmp_path / "dcae.safetensors"),
        ]
    )
    latents.main(
        [
            "tokens",
            *toy,
            "--dcae",
            str(tmp_path / "dcae.safetensors"),
            "--out",
            str(tmp_path / "tokens"),
        ]
    )
    train.main(
        [
            "--stage",
            "latent",
            "--cache",
            str(tmp_path / "tokens"),
            "--init",
            str(tmp_path / "dcae.safetensors"),
            "--run",
            str(tmp_path / "run"),
            "--steps",
            "3",
            "--set",
            "batch=10",
            "beta=0.001",
        ]
    )
    model = latent_action.LatentActionModel.load(tmp_path / "run" / "latent_action.safetensors")
    used = latents.fresh_model("toy", tmp_path / "dcae.safetensors", "cpu")
    assert model.config.beta == 0.001 and model.dcae_fingerprint() == used.dcae_fingerprint()
    with pytest.raises(ValueError, match="latent_action.py tokens"):
        train.main(
            [
                "--stage",
                "latent",
                "--preset",
                "small",
                "--init",
                str(tmp_path / "dcae.safetensors"),
                "--run",
                str(tmp_path / "no"),
            ]
        )


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_lerobot_dataset_gets_a_column(tmp_path, version):
    """The copy is a faultless dataset whose rows hold the exported latents; the last row and a
    broken episode are marked not valid."""
    pytest.importorskip("cv2"), pytest.importorskip("av")
    pq = pytest.importorskip("pyarrow.parquet")
    films = [e.frames[:9].repeat(2, axis=1).repeat(2, axis=2) for e in record(6, 2, 0)]
    films[1][:] = 128
    states = np.random.default_rng(0).normal(size=(2, 9, 3))
    write = lerobot.write_v3 if version == "v3.0" else lerobot.write_v21
    write(
        tmp_path / "set",
        (({"top": list(film)}, state, -state, "go") for film, state in zip(films, states)),
        fps=10,
    )
    model_of().save(tmp_path / "m.safetensors")
    encode(
        "--weights",
        tmp_path / "m.safetensors",
        "--data",
        tmp_path / "set",
        "--side",
        96,
        "--out",
        tmp_path / "out",
        "--column",
        tmp_path / "new",
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["clips"] == 1 and "more than one colour" in summary["skipped"]["episode_000001"]
    made = json.loads((tmp_path / "out" / "statistics.json").read_text())["made"]
    assert made["interval"] == 3 and made["fps"] == 10
    new = lerobot.LeRobotDataset.open(tmp_path / "new", quiet=True)
    assert new.check() == [] and new.features["latent_action"]["shape"] == [14]
    with open_source(
        tmp_path / "out" / "latent_action_dim14" / "episode_000000.safetensors"
    ) as source:
        z = source.read("latent_action").numpy()
    tables = [
        pq.read_table(path) for path in sorted((tmp_path / "new" / "data").rglob("*.parquet"))
    ]
    rows = np.concatenate([np.array(table["latent_action"].to_pylist()) for table in tables])
    valid = [v for table in tables for v in table["latent_action_valid"].to_pylist()]
    assert np.array_equal(rows[:9], np.concatenate([z, z[-1:]])) and not rows[9:].any()
    assert valid == [True] * 6 + [False] * 12
    stage2 = cards.Pyramid(tmp_path / "new", (5,))  # reads the column, and standardises it
    stored = json.loads((tmp_path / "out" / "statistics.json").read_text())
    wanted = (np.concatenate([z, z[-1:]]) - np.float32(stored["mean"])) / np.float32(stored["std"])
    with pytest.raises(ValueError, match="spans 0.3 s, a video step 0.2 s"):
        stage2.latent_rows(0, 0)
    stage2.video_hz = 10 / 3
    for episode, (due, known) in enumerate(
        [(wanted, 6), ((wanted * 0 - np.float32(stored["mean"])) / np.float32(stored["std"]), 0)]
    ):
        rows, mask = stage2.latent_rows(0, episode)
        np.testing.assert_allclose(rows, due, atol=1e-6)
        assert mask.tolist() == [True] * known + [False] * (9 - known)
    with pytest.raises(SystemExit, match="exists"):
        encode(
            "--weights",
            tmp_path / "m.safetensors",
            "--data",
            tmp_path / "set",
            "--side",
            96,
            "--out",
            tmp_path / "out",
            "--column",
            tmp_path / "new",
        )


def test_a_share_of_the_clips_keeps_its_labels(tmp_path):
    """Every second of four, and those files are of no other share; where all are labelled, stage
    latent says what to do."""
    some = (
        "tokens",
        "--data",
        "toy",
        "--flow",
        "true",
        "--level",
        "6",
        "--episodes",
        "4",
        "--dcae",
        str(DCAE),
    )
    latents.main([*some, "--labelled", "0.5", "--out", str(tmp_path / "half")])
    masks = [
        open_source(path).read("mask") for path in sorted((tmp_path / "half/tokens").iterdir())
    ]
    assert [bool(mask.any()) for mask in masks] == [False, True, False, True]
    with pytest.raises(SystemExit, match="labelled"):
        latents.main([*some, "--labelled", "0.25", "--out", str(tmp_path / "half")])
    with pytest.raises(SystemExit, match="--labelled is 2; allowed: a share from 0 to 1"):
        latents.main([*some, "--labelled", "2", "--out", str(tmp_path / "no")])
    latents.main([*some, "--labelled", "--out", str(tmp_path / "all")])
    with pytest.raises(ValueError, match="0 are not.*tokens --labelled 0.1"):
        train.main(
            [
                "--stage",
                "latent",
                "--cache",
                str(tmp_path / "all"),
                "--run",
                str(tmp_path / "run"),
                "--steps",
                "1",
            ]
        )


def test_lerobot_labels_are_the_change_of_the_state_over_the_interval(tmp_path):
    """A label is state[i + interval] - state[i] by its root mean square; a slot of -1 or a state
    that never moves is masked."""
    pytest.importorskip("av")
    states = np.stack([np.arange(8.0) ** 2, np.ones(8), np.arange(8.0)], axis=1)
    films = [np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)]
    lerobot.write_v3(
        tmp_path / "set", (({"top": list(film)}, states, states, "go") for film in films), fps=10
    )
    dataset = lerobot.LeRobotDataset.open(tmp_path / "set", quiet=True)
    label, scale = latents.lerobot_labels(dataset, 3, [2, -1, 0, 1], 5)
    rows = label(0).numpy()
    assert rows.shape == (7, 5) and np.isnan(rows[:, [1, 3, 4]]).all()
    assert np.allclose(rows[:5, 2] * scale[2], [9, 15, 21, 27, 33]) and np.allclose(
        np.square(rows[:, [0, 2]]).mean(axis=0), 1
    )
    with pytest.raises(ValueError, match="--slots"):
        latents.lerobot_labels(dataset, 3, [7], 5)


def test_dpflow_by_name_fetches_its_weights_and_says_their_licence(tmp_path, monkeypatch, capsys):
    """`--flow things` asks for the named file, and the licence is printed wherever the weights come
    from."""
    loaded = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: None)
    monkeypatch.setattr(
        latents, "load_dpflow", lambda path: loaded.append(str(path)) or torch.nn.Identity()
    )
    for name in ("things", str(tmp_path / "mine.ckpt")):
        latents.estimator_of(name, 1, "cpu")
        assert capsys.readouterr().err.count(dpflow.LICENCE_NOTICE) == 1
    assert loaded == [
        str(tmp_path / "checkpoints" / dpflow.CHECKPOINTS["things"]),
        str(tmp_path / "mine.ckpt"),
    ]
    with pytest.raises(ValueError, match="choose one of chairs"):
        latents.estimator_of("raft", 1, "cpu")
