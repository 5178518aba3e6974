"""What published files state beside their weights is used or refused; second names of one tensor
must agree; quantised weights are refused with what to take instead."""

import json

import pytest
import torch
from tables import expected
from test_pretrained import evidence

from backbones import published
from backbones.qwen3vl import smart_resize
from backbones.umt5 import UMT5Config, UMT5Encoder
from backbones.wan import WanConfig
from weights import __main__, files, layouts


def shapes_of(table: str, part: str = "") -> dict[str, tuple[int, ...]]:
    rename = layouts.rename_from(table)
    return {part + rename(name): shape for name, shape in expected(table).items()}


# -- pixels ---------------------------------------------------------------------------------------

SIZE = {"shortest_edge": 65536, "longest_edge": 16777216}


@pytest.mark.parametrize(
    "stated, wanted",
    [
        ({"size": SIZE | {"longest_edge": 262144}}, (65536, 262144)),
        ({"size": {"min_pixels": 3136, "max_pixels": 200000}}, (3136, 200000)),
        ({"min_pixels": 3136, "max_pixels": 200000}, (3136, 200000)),
        ({"size": SIZE, "max_pixels": 200000}, (65536, 200000)),
        ({"size": SIZE, "min_pixels": None, "max_pixels": None}, (65536, 16777216)),
    ],
)
def test_stated_pixels_are_those_of_prepared_images(stated, wanted):
    """min_pixels and max_pixels win over `size`, as in transformers; null says nothing."""
    found = evidence(shapes_of("qwen3vl"), published.flatten(stated))
    config = published.vlm_config(found)
    assert (config.min_pixels, config.max_pixels) == wanted
    height, width = smart_resize(960, 1280, config)
    assert wanted[0] <= height * width <= wanted[1]


def test_the_grid_of_a_large_image_is_that_of_transformers():
    """960 x 1280 under max_pixels 200000 is 24 x 32 patches of 16, without it 60 x 80."""
    for stated, grid in (({"max_pixels": 200000}, (24, 32)), ({}, (60, 80))):
        found = evidence(shapes_of("qwen3vl"), published.flatten({"size": SIZE} | stated))
        height, width = smart_resize(960, 1280, published.vlm_config(found))
        assert (height // 16, width // 16) == grid


def test_pixels_that_leave_no_image_are_refused():
    for stated, message in (
        ({"min_pixels": 300000, "max_pixels": 200000}, "min_pixels 300000 must not exceed"),
        ({"max_pixels": "many"}, "max_pixels is 'many'; expected a whole number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            published.vlm_config(evidence(shapes_of("qwen3vl"), stated))


# -- other settings -------------------------------------------------------------------------------

COMPUTED = {  # what the published configs say, and something that our networks do not compute
    "text_config.hidden_act": ("silu", "gelu"),
    "text_config.attention_bias": (False, True),
    "text_config.rope_scaling.rope_type": ("default", "yarn"),
    "text_config.rope_scaling.mrope_interleaved": (True, False),
    "vision_config.hidden_act": ("gelu_pytorch_tanh", "quick_gelu"),
    "image_mean": ([0.5, 0.5, 0.5], [0.48, 0.46, 0.41]),
    "do_normalize": (True, False),
    "quantization_config.quant_method": (None, "fp8"),
}


@pytest.mark.parametrize("key", COMPUTED)
def test_a_vlm_that_computes_something_else_is_refused(key):
    """By the name of the key, its value and the expected one."""
    published_value, other = COMPUTED[key]
    assert published.vlm_config(evidence(shapes_of("qwen3vl"), {key: published_value}))
    with pytest.raises(ValueError, match=f"{key} is {other!r}".replace("[", r"\[")):
        published.vlm_config(evidence(shapes_of("qwen3vl"), {key: other}))


def test_stated_numbers_without_a_tensor_are_used():
    """Rotary bases, epsilons, positions' reach."""
    stated = {"text_config.rope_theta": 1e4, "text_config.rms_norm_eps": 1e-5}
    config = published.vlm_config(evidence(shapes_of("qwen3vl"), stated))
    assert (config.rope_theta, config.eps) == (1e4, 1e-5)
    video = published.wan_config(evidence(shapes_of("wan", "video."), {"eps": 1e-5}))
    assert video == WanConfig(eps=1e-5)
    stated = {"relative_attention_max_distance": 64, "d_model": 4096}
    text = published.text_config(evidence(shapes_of("umt5"), stated))
    assert text == UMT5Config(max_distance=64)


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"d_model": 512}, "d_model is 512, the tensors have 4096"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ({"quantization_config.quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    ],
)
def test_a_text_encoder_that_computes_something_else_is_refused(stated, message):
    with pytest.raises(ValueError, match=message):
        published.text_config(evidence(shapes_of("umt5"), stated))


def test_a_video_expert_with_other_norms_is_refused():
    with pytest.raises(ValueError, match="qk_norm is 'layer_norm'"):
        published.wan_config(evidence(shapes_of("wan", "video."), {"qk_norm": "layer_norm"}))


def test_official_weights_of_another_picture_are_refused():
    """The preset shows a policy 384 x 320; nothing else would tell of other pictures."""
    stated = {
        "common.num_video_frames": 8,
        "common.video_action_freq_ratio": 2,
        "action_expert.norm_eps": 1e-5,
        "und_expert.norm_eps": 1e-5,
    }
    shapes = {
        layouts.rename_from("motus")(name): shape
        for name, shape in expected("motus-stage3").items()
    }
    fits = stated | {"common.video_height": 384, "common.video_width": 320}
    assert published.motus_fields(evidence(shapes, fits), "22")["frames"] == 8
    with pytest.raises(ValueError, match="common.video_height is 256"):
        published.motus_fields(evidence(shapes, fits | {"common.video_height": 256}), "22")


# -- names and dtypes -----------------------------------------------------------------------------


def test_two_names_of_one_embedding_must_agree(tmp_path):
    """transformers saves UMT5's embedding once or twice; a copy of zeros is not taken for it."""
    torch.manual_seed(0)
    sizes = dict(vocab=40, dim=16, dim_attn=16, dim_ffn=24, heads=2, layers=1, buckets=8)
    own = UMT5Encoder(UMT5Config(**sizes)).state_dict()
    rename = layouts.rename_from("umt5-transformers")
    names = [f"encoder.block.0.layer.0.SelfAttention.{part}.weight" for part in "qkvo"]
    names += ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    names += [f"encoder.block.0.layer.{i}.layer_norm.weight" for i in (0, 1)]
    dense = "encoder.block.0.layer.1.DenseReluDense"
    names += [f"{dense}.{part}.weight" for part in ("wi_0", "wi_1", "wo")]
    names += ["encoder.final_layer_norm.weight", "shared.weight"]
    theirs = {name: own[rename(name)].clone() for name in names}
    assert len(theirs) == len(own)
    copy = "encoder.embed_tokens.weight"
    for case, more in (("once", {}), ("twice", {copy: theirs["shared.weight"].clone()})):
        files.save_safetensors(tmp_path / f"{case}.safetensors", theirs | more)
        path = tmp_path / f"{case}.safetensors"
        loaded = published.network_of(UMT5Encoder, published.text_config, path)
        assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    zeros = {copy: torch.zeros_like(theirs["shared.weight"])}
    files.save_safetensors(tmp_path / "zeros.safetensors", theirs | zeros)
    with pytest.raises(ValueError, match=f"{copy}: differs from shared.weight"):
        published.network_of(UMT5Encoder, published.text_config, tmp_path / "zeros.safetensors")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_quantised_weights_are_refused_with_what_to_take_instead(tmp_path, dtype, shards):
    """Alone or behind an index; torch files too."""
    library = pytest.importorskip("safetensors.torch")
    tensors = {"shared.weight": torch.zeros(8, 8, dtype=getattr(torch, dtype))}
    scale = {"shared.scale_weight": torch.tensor([0.01])}
    folder = tmp_path / "model"
    folder.mkdir()
    if shards == 1:
        library.save_file(tensors | scale, folder / "model.safetensors")
    else:
        library.save_file(tensors, folder / "a.safetensors")
        library.save_file(scale, folder / "b.safetensors")
        homes = {"shared.weight": "a.safetensors", "shared.scale_weight": "b.safetensors"}
        text = json.dumps({"weight_map": homes})
        (folder / "model.safetensors.index.json").write_text(text)
    name = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint16": "U16"}[dtype]
    with pytest.raises(ValueError, match=rf"take that(.|\n)*shared.weight: {name}"):
        __main__.main(["inspect", str(folder)])
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"take that(.|\n)*shared.weight: torch.{dtype}"):
        __main__.main(["inspect", str(tmp_path / "model.pt")])


def test_whole_numbers_are_no_weights(tmp_path):
    """int8 is a dtype of files, but no network takes it for its floating parameters."""
    files.save_safetensors(
        tmp_path / "x.safetensors",
        {"token_embedding.weight": torch.zeros(4, 4, dtype=torch.int8)},
    )
    with pytest.raises(ValueError, match="no tensor blocks.0.attn.q.weight"):
        published.network_of(UMT5Encoder, published.text_config, tmp_path / "x.safetensors")
