"""Published weights in the model: every layout and stage, the VLM inside, memory, and what is
refused."""

# ruff: noqa: F811

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tables import expected
from test_frozen import SENTENCES, frames, houses  # noqa: F401

import sample
from backbones import published
from backbones.frozen import Backbones
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from backbones.umt5 import UMT5Config
from backbones.wan import WanConfig, WanModel
from backbones.wan_vae import WanVAE, WanVAEConfig
from formats.statistics import Statistics
from motus import Inputs, Motus, MotusConfig, preset
from weights import convert, files, hub, layouts
from weights.card import Card

TINY = MotusConfig(
    video=WanConfig(
        width=32, ffn=48, layers=2, heads=2, latent=4, text_dim=12, text_len=10, freq_dim=16
    ),
    frames=4,
    ratio=2,
    action_width=16,
    action_dim=3,
    state_dim=5,
    und_width=12,
    vlm_dim=8,
)
FORMS = {"2": replace(TINY, finetune=False, ratio=1, action_dim=14, state_dim=14), "3": TINY}
GOLDEN = Path(__file__).parent / "golden"


def model_of(config: MotusConfig) -> Motus:
    torch.manual_seed(0)
    model = Motus(config)
    for parameter in model.parameters():  # away from zero, so that every term counts
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def checkpoint(folder: Path, stage: str) -> tuple[Motus, Path]:
    """A checkpoint of ours with random weights."""
    model = model_of(FORMS[stage])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(Card(FORMS[stage].as_json(), stage).as_json())
    files.save_safetensors(folder / "ema.safetensors", model.state_dict())
    return model, folder


@torch.no_grad()
def velocities(model: Motus) -> list[torch.Tensor]:
    config, g = model.config, torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    inputs = Inputs(
        normal(2, config.video.latent, config.latent_frames, 4, 4),
        normal(2, 4, config.video.text_dim),
        torch.tensor([4, 3]),
        normal(2, 5, config.vlm_dim),
        None,
        normal(2, config.state_dim) if config.finetune else None,
        normal(2, config.chunk, config.action_dim),
    )
    times = torch.tensor([0.6, 0.2]), torch.tensor([0.5, 0.9])
    time = model.embed_times(*times)
    return list(model(inputs.latents, inputs.actions, time, model.conditioning(inputs)))


def evidence(shapes: dict, stated: dict | None = None) -> published.Evidence:
    return published.Evidence(Path("x"), shapes, stated or {})


def same(a: Motus, b: Motus) -> bool:
    return a.config == b.config and all(
        torch.equal(x, y) for x, y in zip(velocities(a), velocities(b))
    )


def edit(folder: Path, change) -> Path:
    """Passes the config.json of a folder through `change`."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", FORMS)
def test_every_form_of_a_model_gives_the_same_velocities(tmp_path, stage):
    """Our checkpoint, its official export, that converted to one file, and that file in a folder
    are one model of one stage."""
    model, own = checkpoint(tmp_path / "run" / "step_000001", stage)
    convert.export(own / "ema.safetensors", tmp_path / "official", dtype=torch.float32)
    convert.convert(tmp_path / "official", tmp_path / "converted" / "motus.safetensors")
    deep = tmp_path / "deep"
    shutil.copytree(tmp_path / "official", deep / "pytorch_model")
    (deep / "pytorch_model" / "config.json").rename(deep / "config.json")
    for path in (
        own,
        own.parent,
        tmp_path / "official",
        tmp_path / "official" / "mp_rank_00_model_states.pt",
        deep,
        tmp_path / "converted",
        tmp_path / "converted" / "motus.safetensors",
    ):
        loaded, card = Motus.from_pretrained(path)
        assert same(loaded, model) and card.stage == stage, path


def test_a_model_keeps_the_dtype_of_its_file_unless_told(tmp_path):
    """An official bf16 file makes a bf16 model, so nobody holds it in fp32 by accident; one in
    fp16, in which nothing is computed, an fp32 model; `dtype` decides otherwise."""
    trained = checkpoint(tmp_path / "step_000001", "3")[1] / "ema.safetensors"
    for kept, told, made in (
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ):
        convert.export(trained, tmp_path / "official", dtype=kept)
        model, _ = Motus.from_pretrained(tmp_path / "official", dtype=told)
        assert {p.dtype for p in model.parameters()} == {made}


@pytest.mark.parametrize("name, stage", [("motus_finetune", "3"), ("motus_pretrain", "2")])
def test_files_of_the_official_code_load_with_the_config_that_its_trainer_writes(
    tmp_path, name, stage
):
    """Sizes come from shapes and from the five sections of the official config.json, with 1e-5 left
    as text by a yaml reader."""
    size = json.loads((GOLDEN / f"{name}.json").read_text())
    shutil.copy(
        GOLDEN / f"{name}.mp_rank_00_model_states.pt", tmp_path / "mp_rank_00_model_states.pt"
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "common": {
                    "action_dim": 14,
                    "state_dim": 14,
                    "num_video_frames": size["frames"],
                    "video_height": 384,
                    "video_width": 320,
                    "global_downsample_rate": 3,
                    "video_action_freq_ratio": size["ratio"],
                },
                "action_expert": {
                    "hidden_size": size["action_width"],
                    "ffn_dim_multiplier": 4,
                    "norm_eps": "1e-5",
                },
                "und_expert": {
                    "hidden_size": size["und_width"],
                    "ffn_dim_multiplier": 4,
                    "norm_eps": 1e-5,
                    "vlm": {"input_dim": size["vlm_dim"], "projector_type": "mlp3x_silu"},
                },
                "time_distribution": {"timestep_sample_method": "logit_normal"},
                "ema": {"enabled": False},
            }
        )
    )
    model, card = Motus.from_pretrained(tmp_path)
    video = WanConfig(
        width=size["video_width"], ffn=size["video_ffn"], layers=2, heads=2, latent=4, text_dim=20
    )
    wanted = MotusConfig(
        video=video,
        frames=8,
        ratio=size["ratio"],
        action_width=32,
        und_width=16,
        vlm_dim=24,
        finetune=stage == "3",
    )
    assert model.config == wanted
    assert (card.stage, card.preset) == (stage, "full")
    assert (card.statistics is not None) == (stage == "3")  # RoboTwin's rates: raw numbers
    with files.open_source(tmp_path) as source:
        assert torch.equal(model.und.blocks[1].qkv, source.read("und_expert.blocks.1.wan_und_qkv"))
    if stage == "3":
        statistics = Statistics.from_json(card.statistics)
        assert statistics.embodiment == "robotwin" and torch.equal(
            statistics.actions.apply(torch.ones(2, 14)), torch.ones(2, 14)
        )


def wan_folders(folder: Path, config: WanConfig) -> tuple[WanModel, dict[str, Path]]:
    """One random video expert as published: one file, shards, the diffusers layout, a .pt of Motus'
    stage 1, and converted."""
    torch.manual_seed(0)
    model = WanModel(config)
    model.init_weights()
    torch.nn.init.normal_(model.head.head.weight)
    tensors = model.state_dict()
    rename = layouts.rename_from("wan-diffusers")
    theirs = {rename(name): name for name in expected("wan-diffusers")}
    stated = {
        "_class_name": "WanModel",
        "dim": config.width,
        "eps": 1e-6,
        "ffn_dim": config.ffn,
        "freq_dim": config.freq_dim,
        "in_dim": 4,
        "model_type": "ti2v",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": 4,
        "text_len": config.text_len,
    }
    diffusers = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.layers,
        "ffn_dim": config.ffn,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
        "cross_attn_norm": True,
        "added_kv_proj_dim": None,
    }
    paths = {name: folder / name for name in ("file", "shards", "diffusers", "stage1")}
    for name, path in paths.items():
        path.mkdir()
        (path / "config.json").write_text(json.dumps(diffusers if name == "diffusers" else stated))
    files.save_safetensors(paths["file"] / "diffusion_pytorch_model.safetensors", tensors)
    torch.save(
        {"state_dict": {f"dit.{name}": tensor for name, tensor in tensors.items()}},
        paths["stage1"] / "model.pt",
    )
    for path, names in (
        (paths["shards"], {name: name for name in tensors}),
        (paths["diffusers"], theirs),
    ):
        index = {names[name]: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(index.values()):
            files.save_safetensors(
                path / shard, {names[n]: t for n, t in tensors.items() if index[names[n]] == shard}
            )
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    convert.convert(paths["diffusers"], folder / "converted.safetensors")
    return model, paths | {"converted": folder / "converted.safetensors"}


def test_a_video_expert_loads_from_every_layout_and_the_rest_starts_fresh_and_says_so(
    tmp_path, capsys
):
    """Original, sharded, diffusers, converted and `dit.` files give one video expert; the others
    are real, initialised, and named."""
    config = replace(TINY.video, text_len=512)
    wan, paths = wan_folders(tmp_path, config)
    g = torch.Generator().manual_seed(1)
    args = (
        torch.randn(1, 4, 2, 4, 4, generator=g),
        torch.tensor([0.4]),
        torch.randn(1, 3, 12, generator=g),
        torch.tensor([3]),
    )
    for path in paths.values():
        model, card = Motus.from_pretrained(path)
        with torch.no_grad():
            assert torch.equal(model.video(*args), wan(*args))
        assert card.stage == "1" and model.config.video == config and not model.config.finetune
        assert "start fresh" in (said := capsys.readouterr().err) and "action.*, und.*" in said
        assert (
            not any(p.is_meta for p in model.parameters())
            and model.action.decoder.action_head[0].weight.abs().sum() == 0
        )
        assert 0.5 < model.und.blocks[0].qkv.std() * (12 * 16) ** 0.5 < 2


def drop(folder: Path, prefix: str) -> Path:
    """Takes tensors out of an official file."""
    path = folder / "mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=True)["module"]
    torch.save(
        {"module": {name: tensor for name, tensor in module.items() if prefix not in name}}, path
    )
    return folder


def states(section: str, **changes):
    return lambda folder: edit(folder, lambda config: config[section].update(changes))


WRONG = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"4 found\)(.|\n)*num_video_frames is missing(.|\n)*und_expert.norm_eps is missing",
    ),
    "a missing field": (
        lambda f: edit(f, lambda c: c["action_expert"].pop("norm_eps")),
        "action_expert.norm_eps is missing; no tensor shows",
    ),
    "sizes of another model": (
        states("common", action_dim=7),
        "common.action_dim is 7, the tensors have 3",
    ),
    "another chunk": (
        states("common", num_video_frames=8),
        "8 x 2 actions(.|\n)*22 rows; the file's has 14",
    ),
    "text for a number": (
        states("common", num_video_frames="four"),
        "num_video_frames is 'four'; expected a whole",
    ),
    "half a frame": (
        states("common", num_video_frames=0.5),
        "num_video_frames is '0.5'; expected a whole",
    ),
    "a list for a number": (
        states("common", num_video_frames=[4]),
        r"num_video_frames is '\[4\]'; expected a whole",
    ),
    "a number too large": (states("und_expert", norm_eps=10**400), "expected a number above 0"),
    "broken json": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid json"),
    "no understanding expert": (
        lambda f: drop(f, "und_expert."),
        "no tensor und.blocks.0.qkv that shows und_width",
    ),
    "no video expert": (
        lambda f: drop(f, "wan_model."),
        "no tensor video.patch_embedding.weight that shows width",
    ),
    "no state encoder": (
        lambda f: drop(f, "state_encoder."),
        "state_encoder.0.weight that shows state_dim",
    ),
    "a block without its norm": (
        lambda f: drop(f, "blocks.1.wan_action_norm_q"),
        "missing: action.blocks.1.norm_q.weight",
    ),
    "no action expert": (lambda f: drop(f, "action_expert."), "holds unknown weights"),
}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    convert.export(
        checkpoint(folder / "step_000001", "3")[1] / "ema.safetensors",
        folder / "official",
        dtype=torch.float32,
    )
    return folder / "official"


@pytest.mark.parametrize("wrong", WRONG)
def test_whatever_is_wrong_with_published_weights_is_one_clear_error(official, tmp_path, wrong):
    """Missing fields, sizes that contradict the tensors, parts that are not there: one ValueError
    that names them."""
    break_it, message = WRONG[wrong]
    break_it(shutil.copytree(official, tmp_path / "copy"))
    with pytest.raises(ValueError, match=message):
        Motus.from_pretrained(tmp_path / "copy")


def test_a_video_expert_must_say_how_many_heads_it_has(tmp_path):
    """No tensor of Wan shows its heads; only the published sizes may go without a config. Text
    encoders make no model."""
    _, paths = wan_folders(tmp_path, TINY.video)
    for change, message in (
        (lambda c: c.pop("num_heads"), "num_heads or num_attention_heads is missing"),
        (lambda c: c.update(num_heads=0), "num_heads is '0'"),
        (lambda c: c.update(num_heads=3), "multiple of heads 3"),
    ):
        edit(shutil.copytree(paths["file"], copy := tmp_path / "copy"), change)
        with pytest.raises(ValueError, match=message):
            Motus.from_pretrained(copy)
        shutil.rmtree(copy)
    shapes = {f"video.{name}": shape for name, shape in expected("wan").items()}
    assert published.wan_config(evidence(shapes)) == WanConfig()
    with pytest.raises(ValueError, match="holds umt5 weights"):
        Motus.from_pretrained(GOLDEN / "umt5.pth")


def test_our_own_card_is_checked_by_itself(tmp_path):
    """Bad json, missing keys, unknown keys and values of the wrong kind: a ValueError that names
    the file."""
    good = json.loads(Card(TINY.as_json(), "3").as_json())
    path = tmp_path / "config.json"
    for change in (
        "{",
        "[1]",
        "{}",
        json.dumps({"motus": 3, "stage": "3"}),
        json.dumps({"motus": good["motus"]}),
        json.dumps(good | {"stage": "4"}),
        json.dumps(good | {"stages": "3"}),
        json.dumps(good | {"motus": good["motus"] | {"frames": "four"}}),
        json.dumps(good | {"motus": good["motus"] | {"video": 7}}),
    ):
        path.write_text(change)
        with pytest.raises(ValueError, match="config.json"):
            Card.read(path)
    files.save_safetensors(tmp_path / "ema.safetensors", {"a": torch.ones(1)})
    path.write_text(json.dumps(good | {"motus": good["motus"] | {"frame": 4}}))
    with pytest.raises(ValueError, match="unknown key 'frame'"):
        Motus.from_pretrained(tmp_path)


def test_a_hub_name_is_downloaded_once(official, tmp_path, monkeypatch):
    """A key of HUB or its repository leads to the folder weights/KEY; what lies there complete is
    not fetched again."""
    calls = []
    monkeypatch.chdir(tmp_path)

    def snapshot_download(*args, local_dir: Path, **_) -> None:
        calls.append(args)
        shutil.copytree(official, local_dir, dirs_exist_ok=True)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for name in ("motus-stage3", "motus-robotics/Motus_robotwin2", "motus-stage3"):
        assert Motus.from_pretrained(name)[1].stage == "3"
    assert calls == [("motus-robotics/Motus_robotwin2",)] and hub.fetched("elsewhere") == Path(
        "elsewhere"
    )
    with pytest.raises(ValueError, match="holds no checkpoint"):
        Motus.from_pretrained("motus-robotics/Unknown")


# -- the frozen backbones -------------------------------------------------------------------------


def test_the_vlm_inside_an_official_motus_file_is_taken(houses, tmp_path):
    """Then the Qwen3-VL folder needs configs and a tokenizer only; a policy of a folder without a
    VLM takes that of Qwen3-VL."""
    model, own = checkpoint(tmp_path / "step_000001", "3")
    vlm = Backbones.load(houses[0], 16, ("vlm",)).vlm
    tensors = model.state_dict() | {
        f"vlm.{name}": tensor for name, tensor in vlm.state_dict().items()
    }
    files.save_safetensors(
        tmp_path / "all.safetensors", tensors, {"config": json.dumps(TINY.as_json())}
    )
    convert.export(tmp_path / "all.safetensors", tmp_path / "official", dtype=torch.float32)
    convert.export(tmp_path / "all.safetensors", tmp_path / "half")
    assert same(Motus.from_pretrained(tmp_path / "official")[0], model)
    shutil.copytree(
        houses[1] / "qwen3vl", tmp_path / "qwen3vl", ignore=shutil.ignore_patterns("*.safetensors")
    )
    inside = Backbones.load(tmp_path, parts=("vlm",), motus=tmp_path / "official").vlm
    assert all(
        torch.equal(x, y) for x, y in zip(inside.state_dict().values(), vlm.state_dict().values())
    )
    assert (
        inside.config == vlm.config
        and published.holds_vlm(tmp_path / "official")
        and not published.holds_vlm(own)
    )
    half = Backbones.load(tmp_path, parts=("vlm",), motus=tmp_path / "half").vlm
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="0 weight files"):
        Backbones.load(tmp_path, parts=("vlm",))


def test_a_backbone_that_says_too_little_is_refused(houses, tmp_path):
    """Statistics of latents that are not Wan2.2's, taps and rotary sections of a VLM, files and
    tokenizers that are not there."""
    for name, message in (
        ("wan/config.json", "latents_mean is missing(.|\n)*latents_std is missing"),
        ("wan/Wan2.2_VAE.pth", "has none of Wan2.2_VAE"),
        ("qwen3vl/config.json", "mrope_section is missing"),
        ("qwen3vl/tokenizer.json", "tokenizer.json does not exist"),
        ("wan/google/umt5-xxl/tokenizer.json", "has none of google/umt5-xxl/tokenizer.json"),
    ):
        copy = shutil.copytree(houses[1], tmp_path / name.replace("/", "_"))
        (copy / name).unlink()
        with pytest.raises(ValueError, match=message):
            Backbones.load(copy, 16)


def test_the_published_configs_are_the_defaults_of_ours():
    """From the tables of the published files alone, without any config.json, come the sizes that
    this repository has as defaults."""
    assert published.text_config(evidence(expected("umt5"))) == UMT5Config()
    assert published.vae_config(evidence(expected("wan-vae"))) == WanVAEConfig()
    rename = layouts.rename_from("qwen3vl")
    names = {rename(name): shape for name, shape in expected("qwen3vl").items()}
    assert published.vlm_config(evidence(names)) == Qwen3VLConfig()
    stated = {
        "common.num_video_frames": 8,
        "common.video_action_freq_ratio": 2,
        "action_expert.norm_eps": 1e-5,
        "und_expert.norm_eps": 1e-5,
    }
    rename = layouts.rename_from("motus")
    names = {rename(name): shape for name, shape in expected("motus-stage3").items()}
    assert MotusConfig.of(published.motus_fields(evidence(names, stated), "22")) == preset("full")


def test_eight_billion_parameters_need_eighteen_gigabytes_to_act():
    """Text prepared beforehand: the three experts and the VLM in bf16, the VAE's encoder in fp32
    and its decoder in bf16. With all of the VAE in fp32 it would be 18.9 GB (17.6 GiB); without the
    decoder, which acting does not need, it is 16.6 GB."""
    with torch.device("meta"):
        model, vlm, vae = (
            Motus(preset("full")).bfloat16(),
            Qwen3VL(Qwen3VLConfig()).bfloat16(),
            WanVAE(WanVAEConfig()),
        )

    def size(part: torch.nn.Module) -> int:
        return sum(tensor.nbytes for tensor in part.state_dict().values())

    experts = size(model) + size(vlm)
    assert round((experts + size(vae)) / 1e9, 2) == 18.86
    vae.decoder.bfloat16(), vae.conv2.bfloat16()
    assert round((experts + size(vae)) / 1e9, 2) == 17.75 <= 18
    assert round((experts + size(vae.encoder) + size(vae.conv1)) / 1e9, 1) == 16.6


# -- acting ---------------------------------------------------------------------------------------


def test_an_official_model_acts_without_a_text_encoder(houses, tmp_path, monkeypatch):
    """Official folder, published backbones, prepared text: images, states and words in, actions in
    robot units out."""
    monkeypatch.setenv("MOTUS_BACKBONES", str(houses[1]))
    _, own = checkpoint(tmp_path / "step_000001", "3")
    convert.export(own / "ema.safetensors", tmp_path / "official")
    edit(tmp_path / "official", lambda c: c["common"].update(global_downsample_rate=3))
    encoder = Backbones.load(houses[1], 10, ("text",))
    encoder.encode_text(SENTENCES)
    encoder.save_text(tmp_path / "states.safetensors")
    policy = sample.Policy.load(
        tmp_path / "official", "vla", steps=2, device="cpu", text=tmp_path / "states.safetensors"
    )
    actions = policy.act(frames()[:, 0].numpy(), np.zeros((2, 5), np.float32), SENTENCES)
    assert (
        actions.shape == (2, 8, 3) and np.isfinite(actions).all() and policy.backbones.text is None
    )
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
