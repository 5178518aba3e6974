"""Videos to latent actions: an export that never writes a silent row, tokens to train on, and the
labels that they have."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from formats import lerobot
from formats.motions import read_tokens
from formats.recordings import Recordings
from latent_action import LatentActionConfig, LatentActionModel, fit
from motus import PRESETS
from scripts import latents
from scripts.pretrain import pretrain_dcae
from weights import hub
from weights.files import open_source

TOY = LatentActionConfig.of(PRESETS["toy"].latent)
DCAE = PRESETS["toy"].backbones / "dcae.safetensors"


def model_of(seed: int = 0) -> LatentActionModel:
    torch.manual_seed(seed)
    return LatentActionModel(TOY)


def main(*args) -> None:
    latents.main([str(arg) for arg in args])


# ---- Flow of clips ----


class Shifts:
    """A flow estimator that knows the answer: every pixel moves by the difference of the first
    pixels' red, in units of 1/10."""

    name = "shifts"

    def __call__(self, a, b):
        moved = 10 * (b[:, 0, 0, 0] - a[:, 0, 0, 0])
        flow = torch.stack([moved, torch.zeros_like(moved)], dim=1)
        return flow[:, :, None, None].expand(-1, -1, *a.shape[2:])


def film(n: int, blank: int | None = None) -> list[torch.Tensor]:
    frames = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) for _ in range(n)]
    for i, frame in enumerate(frames):
        frame[:, 0, 0] = i / 50
    if blank is not None:
        frames[blank] = torch.full((3, 32, 32), 0.5)
    return frames


def test_measured_rows_do_not_depend_on_chunks_and_mark_what_is_not_real():
    """Row i is the motion from frame i to i + 3, over any chunk size; the last two rows end early
    and are not valid."""
    for chunk in (4, 5, 8, 9, 100):
        parts = list(latents.measured_flows(iter(film(12)), Shifts(), 3, chunk))
        flow, valid = map(torch.cat, zip(*parts))
        assert flow.shape == (11, 32, 32, 2) and valid.tolist() == [True] * 9 + [False] * 2
        assert torch.allclose(
            flow[:, 5, 5, 0].cpu(), torch.tensor([0.6] * 9 + [0.4, 0.2]), atol=1e-5
        )
        assert max(len(part) for part, _ in parts) < chunk + 3


def test_rows_that_touch_a_blank_frame_are_not_valid():
    """A frame of one colour shows no motion: the rows that begin or end there say so."""
    ((_, valid),) = latents.measured_flows(film(8, blank=4), Shifts(), 2)
    assert valid.tolist() == [True, True, False, True, False, True, False]


def test_pictures_are_padded_to_a_square():
    """A wide picture fills the width, with as much black above as below."""
    picture = latents.square(np.full((50, 100, 3), 255, np.uint8), 256)
    assert picture.shape == (3, 256, 256) and picture[:, 64:192].min() == 1
    assert not picture[:, :63].any() and not picture[:, 193:].any()


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
        latents.estimator_of(name)
        assert capsys.readouterr().err.count(hub.LICENCE_NOTICE) == 1
    fetched = tmp_path / "checkpoints" / hub.THINGS
    assert loaded == [str(fetched), str(tmp_path / "mine.ckpt")]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="raft: no such weight file"):
        latents.estimator_of("raft")


# ---- Videos ----


def moving_square(n: int, side: int = 96) -> np.ndarray:
    """Frames (n, side, side, 3) of noise in which a square moves to the right."""
    rng = np.random.default_rng(0)
    still = rng.integers(60, 120, (side, side, 3), dtype=np.uint8)
    square = rng.integers(120, 255, (30, 30, 3), dtype=np.uint8)
    frames = np.repeat(still[None], n, axis=0)
    for i, frame in enumerate(frames):
        frame[30:60, 10 + 3 * i : 40 + 3 * i] = square
    return frames


def write_video(path, frames: np.ndarray) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_bad_videos_are_skipped_with_a_reason_each(tmp_path, capsys):
    """Of a good, a corrupt, a cut, a one-frame and a one-colour video those that cannot be opened
    are refused by name, or left out as a card says; the good one is encoded and the others are
    named in the summary. A second run keeps what is there, and a model with other weights is
    refused."""
    pytest.importorskip("cv2")
    frames = moving_square(8)
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "good.mp4", frames)
    write_video(videos / "single.mp4", frames[:1])
    write_video(videos / "grey.mp4", np.full_like(frames, 128))
    whole = (videos / "good.mp4").read_bytes()
    (videos / "corrupt.mp4").write_bytes(b"not a video" * 100)
    (videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    weights, out = tmp_path / "m.safetensors", tmp_path / "out"
    model_of().save(weights)
    with pytest.raises(ValueError, match="(?s)corrupt.mp4 .*cut.mp4 .*without.*NAME.mp4"):
        main("encode", "--weights", weights, "--data", videos, "--out", out)
    source = {"path": "videos", "mapping": {"without": ["broken"]}}
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"video_hz": 10 / 3, "sources": [source]}))
    args = ("encode", "--weights", weights, "--data", card, "--out")
    main(*args, out)
    summary = json.loads((out / "summary.json").read_text())
    told = capsys.readouterr()
    assert summary == json.loads(told.out) and "broken: corrupt.mp4, cut.mp4" in told.err
    assert summary["clips"] == 1 and summary["rows"] == 7 and summary["valid_rows"] == 5
    assert set(summary["skipped"]) == {"grey", "single"}
    assert "more than one colour" in summary["skipped"]["grey"]
    statistics = json.loads((out / "statistics.json").read_text())
    assert len(statistics["std"]) == 14 and statistics["made"]["interval"] == 3
    stamp = (out / "latent_action_dim14/good.safetensors").stat().st_mtime_ns
    main(*args, out)
    assert (out / "latent_action_dim14/good.safetensors").stat().st_mtime_ns == stamp
    model_of(1).save(weights)
    with pytest.raises(ValueError, match="model="):
        main(*args, out)
    (videos / "good.mp4").unlink()
    with pytest.raises(ValueError, match="no usable clip among 2"):
        main(*args, tmp_path / "other")


# ---- A source that knows its flow, and one that has a state ----


class Known(Recordings):
    """Four clips of six rows with true flow and true motions, as a world renders them."""

    name, fps, robot, widths = "known", 10.0, "robot", (0, 0)
    lengths = np.full(4, 6)
    without = frozenset()

    def __init__(self, flow: np.ndarray | None = None, motions: np.ndarray | None = None):
        moving = np.zeros((6, 48, 48, 2), np.float32)
        for i, row in enumerate(moving):
            row[10 : 20 + i, 10:20, 0] = 2.0 + i / 2
        self.flow = moving if flow is None else flow
        self.truth = np.linspace(-1, 1, 18).reshape(6, 3) if motions is None else motions

    def flows(self, episode, interval):
        yield self.flow, np.arange(6) + interval <= 6

    def motions(self, episode, interval):
        return self.truth


def use(monkeypatch, *sources: tuple[str, Recordings, int]) -> None:
    """Lets --data name these sources: name, reader, level."""
    opened = [
        SimpleNamespace(name=name, reader=reader, source=SimpleNamespace(level=level))
        for name, reader, level in sources
    ]
    pyramid = SimpleNamespace(opened=opened, video_hz=10 / 3, describe=str)
    monkeypatch.setattr(latents, "Pyramid", lambda *_: pyramid)


def test_tokens_of_several_sources_train_the_encoder(tmp_path, monkeypatch, capsys):
    """pretrain and tokens in turn; of two sources only that of the target robot has labels, and the
    tokens are those of the DC-AE that was trained."""
    use(monkeypatch, ("a", Known(), 4), ("b", Known(), 5))
    dcae, out = tmp_path / "dcae.safetensors", tmp_path / "tokens"
    data = ("--data", "card.json", "--flow", "true", "--labelled", 1)
    main("pretrain", *data, "--steps", 2, "--out", dcae)
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 32 and report["labelled"] == 16 and report["skipped"] == {}
    main("tokens", *data, "--dcae", dcae, "--out", out)
    names = sorted(path.name for path in (out / "tokens").iterdir())
    assert len(names) == 8 and names[0] == "a_episode_000000.safetensors"
    model = model_of()
    model.load_dcae(dcae)
    rows = read_tokens([out], model)
    assert rows[0].shape == (32, 288) and rows[2].any(dim=1).sum() == 16
    expected = model.flow_to_tokens(torch.from_numpy(Known().flow[:4]))
    assert torch.allclose(rows[0][:4].float(), expected, atol=1e-2)
    settings = SimpleNamespace(
        steps=2, batch=10, lr=1e-3, warmup=1, floor=0.1, weight_decay=0.0, seed=0
    )
    fit(model, rows, settings)
    with pytest.raises(ValueError, match="dcae="):
        read_tokens([out], model_of(1))
    with pytest.raises(ValueError, match="2 sources would lie in .*leave --out out"):
        model.save(tmp_path / "m.safetensors")
        main("encode", *data[:4], "--weights", tmp_path / "m.safetensors", "--out", tmp_path / "no")


def test_latents_of_a_source_that_knows_its_flow(tmp_path, monkeypatch):
    """A row per flow, valid where the interval ends within the episode; standardised by the
    statistics beside them they are what stage 2 reads."""
    use(monkeypatch, ("a", Known(), 6))
    model = model_of()
    model.save(tmp_path / "m.safetensors")
    args = ("--weights", tmp_path / "m.safetensors", "--data", "card.json", "--out", tmp_path)
    main("encode", *args, "--flow", "true")
    names = [path.name for path in sorted((tmp_path / "latent_action_dim14").iterdir())]
    assert names == [f"episode_{e:06d}.safetensors" for e in range(4)]
    with open_source(tmp_path / "latent_action_dim14" / names[0]) as source:
        assert set(source.names()) == {"latent_action", "logvar", "valid"}
        found = source.read("latent_action").clone()
        assert source.read("valid").tolist() == [True] * 4 + [False] * 2
    mu, _ = model.tokens_to_latent(model.flow_to_tokens(torch.from_numpy(Known().flow)))
    assert torch.allclose(found, mu, atol=1e-5)
    with pytest.raises(ValueError, match="flow="):
        main("encode", *args)
    with pytest.raises(ValueError, match="side=256 instead of 96"):
        main("encode", *args, "--flow", "true", "--side", 96)


def test_a_dcae_goes_on_from_another(tmp_path, monkeypatch):
    """`pretrain --init` begins at those weights: after one small step it is nearer to them than to
    a fresh DC-AE."""
    use(monkeypatch, ("a", Known(), 6))
    out = tmp_path / "dcae.safetensors"
    args = ("--data", "card.json", "--flow", "true", "--labelled", "--steps", 1, "--out", out)
    main("pretrain", "--init", DCAE, *args)
    begun, gone_on, fresh = model_of(), model_of(), model_of()
    begun.load_dcae(DCAE)
    gone_on.load_dcae(out)
    flow = torch.from_numpy(Known().flow)

    def distance(a: LatentActionModel, b: LatentActionModel) -> float:
        return (a.flow_to_tokens(flow) - b.flow_to_tokens(flow)).norm().item()

    assert distance(begun, gone_on) < 0.1 * distance(fresh, gone_on)


def test_flow_is_measured_at_the_side_that_is_named(monkeypatch):
    """Pictures reach the estimator as squares of `--side` pixels."""
    clip = latents.Clip(Known(), 0, Shifts(), TOY, 32)
    clip.reader.views = lambda *_: {"top": iter(np.zeros((5, 48, 64, 3), np.uint8))}
    ((flow, _),) = clip.flows()
    assert flow.shape == (4, 32, 32, 2)


def test_flow_that_is_not_finite_is_a_skip_and_flow_too_fast_is_counted(tmp_path, monkeypatch):
    """A clip whose estimator failed is named with its reason; of another the share beyond the
    colour range is in the summary."""
    good, bad = np.zeros((2, 6, 48, 48, 2), np.float32)
    good[:, 10:20, 10:20, 0], good[:, 20:30, 20:30, 1] = 5.0, 50.0
    bad[:] = np.nan
    use(monkeypatch, ("good", Known(good), 5), ("bad", Known(bad), 5))
    args = ("--data", "card.json", "--flow", "true", "--dcae", DCAE, "--out", tmp_path)
    main("tokens", *args)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["clips"] == 4 and summary["clipped"] == 0.5
    assert len(summary["skipped"]) == 4 and "not finite" in summary["skipped"]["bad_episode_000000"]


def test_labels_that_do_not_fit_are_a_skip(tmp_path, monkeypatch):
    """Labels of another length, or NaN in a dimension that is known, skip the clip; a dimension
    that is NaN throughout is one it lacks."""
    labels = np.ones((6, 3))
    lacks, holes = labels.copy(), labels.copy()
    lacks[:, 1], holes[1, 2] = np.nan, np.nan
    sources = {"short": labels[:3], "holes": holes, "lacks": lacks}
    use(monkeypatch, *((name, Known(motions=rows), 4) for name, rows in sources.items()))
    args = ("--data", "card.json", "--flow", "true", "--dcae", DCAE, "--out", tmp_path)
    main("tokens", *args, "--labelled", 1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name.split("_")[0] for name in summary["skipped"]} == {"short", "holes"}
    assert "(3, 3)" in summary["skipped"]["short_episode_000000"]
    assert "[1, 2]" in summary["skipped"]["holes_episode_000000"]
    model = model_of()
    model.load_dcae(DCAE)
    _, read, mask = read_tokens([tmp_path], model)
    assert read.isfinite().all() and mask.tolist() == 16 * [[True, False, True]]


def test_a_share_of_the_clips_keeps_its_labels(tmp_path, monkeypatch):
    """Every second of four, and those files are of no other share; a share above 1 is refused."""
    use(monkeypatch, ("a", Known(), 6))
    args = ("tokens", "--data", "card.json", "--flow", "true", "--dcae", DCAE)
    main(*args, "--labelled", 0.5, "--out", tmp_path / "half")
    files = sorted((tmp_path / "half/tokens").iterdir())
    masks = [open_source(path).read("mask") for path in files]
    assert [bool(mask.any()) for mask in masks] == [False, True, False, True]
    with pytest.raises(ValueError, match="labelled"):
        main(*args, "--labelled", 0.25, "--out", tmp_path / "half")
    with pytest.raises(ValueError, match="--labelled is 2; expected a number in .0,1."):
        main(*args, "--labelled", 2, "--out", tmp_path / "no")


def test_a_rendered_world_is_a_source_like_a_folder(tmp_path):
    """Tokens of the tabletop by its card: true flow and true motions, and what DIS measures."""
    line = {"path": "world:toy", "level": 6, "episodes": 2, "held_out": 0}
    (tmp_path / "card.json").write_text(json.dumps({"sources": [line]}))
    args = ("tokens", "--data", tmp_path / "card.json", "--dcae", DCAE, "--labelled", 1, "--flow")
    main(*args, "true", "--out", tmp_path / "true")
    model = model_of()
    model.load_dcae(DCAE)
    _, labels, mask = read_tokens([tmp_path / "true"], model)
    assert mask.all() and labels.abs().max() <= 1.001 and labels.abs().sum() > 0
    pytest.importorskip("cv2")
    main(*args, "dis", "--out", tmp_path / "dis")
    _, measured, _ = read_tokens([tmp_path / "dis"], model)
    assert len(labels) - len(measured) == 2  # of each episode's last frame only the world knows


def test_lerobot_labels_are_the_change_of_the_state_over_the_interval(tmp_path):
    """A label is state[i + interval] - state[i] by its root mean square; a state that never moves,
    or that the robot lacks, is masked; too wide a state is refused."""
    pytest.importorskip("av")
    states = np.stack([np.arange(8.0) ** 2, np.ones(8), np.arange(8.0)], axis=1)
    films = [np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)]
    episodes = (({"top": list(frames)}, states, states, "go") for frames in films)
    lerobot.write_v3(tmp_path / "set", episodes, fps=10)
    dataset = lerobot.LeRobotDataset(tmp_path / "set")
    config = SimpleNamespace(interval=3, action_dim=5)
    labels = latents.Labels(dataset, config)
    rows = labels(0)
    assert rows.shape == (7, 5) and np.isnan(rows[:, [1, 3, 4]]).all()
    assert np.allclose(rows[:5, 0] * labels.scale[0], [9, 15, 21, 27, 33])
    assert np.allclose(np.square(rows[:, [0, 2]]).mean(axis=0), 1)
    with pytest.raises(ValueError, match="3 dimensions.*expected 1 to 2"):
        latents.Labels(dataset, SimpleNamespace(interval=3, action_dim=2))


def test_a_lerobot_dataset_becomes_tokens_with_labels(tmp_path):
    """Flow is measured, labels are changes of the state; an episode of one colour is a skip."""
    pytest.importorskip("cv2"), pytest.importorskip("av")
    films = [moving_square(9), np.full((9, 96, 96, 3), 128, np.uint8)]
    states = np.random.default_rng(0).normal(size=(2, 9, 3))
    episodes = (({"top": list(f)}, s, -s, "go") for f, s in zip(films, states))
    lerobot.write_v3(tmp_path / "set", episodes, fps=15)
    args = ("--data", tmp_path / "set", "--dcae", DCAE, "--labelled", 1, "--out", tmp_path / "out")
    main("tokens", *args)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["clips"] == 1 and "more than one colour" in summary["skipped"]["episode_000001"]
    model = model_of()
    model.load_dcae(DCAE)
    _, labels, mask = read_tokens([tmp_path / "out"], model)
    scale = np.sqrt(np.square(np.concatenate([change(s) for s in states])).mean(axis=0))
    assert mask.all() and np.allclose(labels, (change(states[0]) / scale)[:6], atol=1e-5)


def change(states: np.ndarray) -> np.ndarray:
    """Changes of states (9, P) over three rows or up to the last."""
    return states[np.minimum(np.arange(8) + 3, 8)] - states[:-1]


def test_pretraining_lowers_the_picture_loss():
    """A few steps of DC-AE training on flow beat the untrained DC-AE, and leave it frozen and in
    eval mode."""
    flow = torch.zeros(16, 48, 48, 2)
    flow[:, 10:30, 10:30] = torch.randn(16, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 3
    model, before = model_of(), model_of()
    pretrain_dcae(model, flow, torch.zeros(16, 3), torch.zeros(16, 3).bool(), 20)

    def loss(m: LatentActionModel) -> float:
        return m.picture_loss(m.tokens_to_picture(m.flow_to_tokens(flow)), flow, 100.0)

    assert loss(model) < loss(before) and not model.dcae.training
    assert not any(p.requires_grad for p in model.dcae.parameters())
