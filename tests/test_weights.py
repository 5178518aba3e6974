"""Weights: accounting, memory, hostile files, round trips with the official layout, and the
published tables at full size."""

import importlib
import json
import os
import pickle
import resource
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from tables import expected
from torch import nn

from motus import MotusConfig
from weights import __main__, convert, files, layouts, load

GOLDEN = Path(__file__).parent / "golden"
own_name = layouts.rename_from("motus")
OFFICIAL = ["motus_finetune", "motus_pretrain"]


def official(name: str) -> Path:
    return GOLDEN / f"{name}.mp_rank_00_model_states.pt"


def module_of(
    shapes: dict[str, tuple[int, ...]], device: str = "meta", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A module tree with exactly these parameters."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))
    return root


def shapes_of(source: files.TensorSource, rename=str) -> dict[str, tuple[int, ...]]:
    return {rename(name): source.shape(name) for name in source.names() if rename(name)}


# -- accounting -----------------------------------------------------------------------------------


def test_every_tensor_reaches_its_place_and_none_stays_on_meta(tmp_path):
    """Loading a file into a meta module gives the file's values under the file's names, in the
    module's dtype."""
    tensors = {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(4),
        "b.c.weight": torch.randn(2),
    }
    files.save_safetensors(tmp_path / "x.safetensors", tensors, {"note": "kept"})
    module = module_of({name: tuple(t.shape) for name, t in tensors.items()}, dtype=torch.bfloat16)
    with files.open_source(tmp_path / "x.safetensors") as source:
        load.load_into(module, source)
    assert files.open_source(tmp_path / "x.safetensors").metadata == {"note": "kept"}
    for name, value in module.state_dict().items():
        assert torch.equal(value, tensors[name].bfloat16())


def test_a_real_module_is_filled_in_place_and_keeps_requires_grad(tmp_path):
    """Parameters that exist are written into, so that optimizers and views of them stay valid."""
    files.save_safetensors(
        tmp_path / "x.safetensors", {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    )
    module = nn.Linear(3, 2).requires_grad_(False)
    before = module.weight
    load.load_into(module, files.open_source(tmp_path / "x.safetensors"))
    assert module.weight is before and not module.weight.requires_grad and module.weight.sum() == 6


def test_all_misfits_are_named_in_one_error_and_nothing_is_loaded(tmp_path):
    """Missing, unexpected, wrong shape and wrong dtype are reported together; the list shows ten
    and the count."""
    files.save_safetensors(
        tmp_path / "x.safetensors",
        {
            "a": torch.ones(2),
            "b": torch.ones(3),
            "c": torch.ones(2, dtype=torch.int64),
            "stray": torch.ones(1),
        },
    )
    module = module_of({"a": (2,), "b": (2,), "c": (2,), "gone": (5,)}, device="cpu")
    with pytest.raises(ValueError) as error:
        load.load_into(module, files.open_source(tmp_path / "x.safetensors"))
    for part in (
        "x.safetensors",
        "(4 found)",
        "missing: gone (5,)",
        "unexpected: stray",
        "shape: b is (3,) in the file",
        "dtype: c is",
    ):
        assert part in str(error.value)
    assert module.a.sum() == 0
    many = module_of({f"m{i}": (1,) for i in range(30)} | {"a": (2,)})
    with pytest.raises(ValueError, match=r"and 23 more"):
        load.load_into(many, files.open_source(tmp_path / "x.safetensors"))


def test_two_names_in_a_file_for_one_place_are_refused(tmp_path):
    """A rename that sends two tensors to one parameter is an error, not a choice."""
    files.save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2), "dit.a": torch.ones(2)})
    with pytest.raises(ValueError, match="are both a"):
        load.load_into(
            module_of({"a": (2,)}),
            files.open_source(tmp_path / "x.safetensors"),
            layouts.rename_from("wan"),
        )


def test_fresh_tensors_keep_their_values_and_must_be_real(tmp_path):
    """`fresh` may be absent from the file, `ignore` may be in it; a fresh tensor on meta would be
    random data and is refused."""
    files.save_safetensors(
        tmp_path / "x.safetensors", {"body": torch.ones(2), "head.weight": torch.ones(9)}
    )
    source = files.open_source(tmp_path / "x.safetensors")
    module = module_of({"body": (2,), "head.weight": (3,)}, device="cpu")
    load.load_into(module, source, ignore=["head."], fresh=["head."])
    assert module.head.weight.sum() == 0 and module.body.sum() == 2
    with pytest.raises(ValueError, match="not initialised: head.weight"):
        load.load_into(
            module_of({"body": (2,), "head.weight": (3,)}),
            source,
            ignore=["head."],
            fresh=["head."],
        )


def test_an_unsaved_buffer_left_on_meta_is_refused(tmp_path):
    """Constant tables are in no file, so building them on meta would leave garbage."""
    files.save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    module = module_of({"a": (2,)})
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="buffer table is on meta"):
        load.load_into(module, files.open_source(tmp_path / "x.safetensors"))


def test_memory_that_is_not_mapped_is_never_given_back(tmp_path):
    """A source whose tensors were reworked in memory loads right and leaves that memory alone."""
    files.save_safetensors(tmp_path / "x.safetensors", {"a": torch.arange(4096.0)})
    source = files.open_source(tmp_path / "x.safetensors")
    source.tensors = {"a": source.read("a") + 1}
    module = module_of({"a": (4096,)})
    load.load_into(module, source)
    assert torch.equal(module.a, torch.arange(4096.0) + 1) and torch.equal(
        source.read("a"), module.a
    )


def test_shards_load_as_one_file(tmp_path):
    """An index with shards gives the union of the shards, in a folder or a hub cache with links."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for i in range(3):
        files.save_safetensors(blobs / f"hash{i}", {f"t{i}": torch.full((2,), float(i))})
        (folder / f"m-{i}.safetensors").symlink_to(blobs / f"hash{i}")
    (folder / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"t{i}": f"m-{i}.safetensors" for i in range(3)}})
    )
    source = files.open_source(folder)
    assert source.names() == ["t0", "t1", "t2"] and source.read("t2").tolist() == [2, 2]


# -- writing --------------------------------------------------------------------------------------


def test_our_files_are_read_by_the_safetensors_library_and_back(tmp_path):
    """Writer and reader agree with the reference library for every dtype, scalars and empty
    tensors."""
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(dtype) for dtype, name in files.DTYPE_NAMES.items()
    }
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    tensors |= {"strided": torch.rand(4, 6).T}
    files.save_safetensors(tmp_path / "ours.safetensors", tensors, {"a": "ü"})
    library.save_file(
        {name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs.safetensors"
    )
    theirs, ours = (
        library.load_file(tmp_path / "ours.safetensors"),
        files.open_source(tmp_path / "theirs.safetensors"),
    )
    for name, value in tensors.items():
        assert (
            torch.equal(theirs[name], value)
            and torch.equal(ours.read(name), value)
            and ours.dtype(name) == value.dtype
        )


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A write that fails half way raises, keeps the old file whole and leaves no temporary file."""
    path = tmp_path / "x.safetensors"
    files.save_safetensors(path, {"a": torch.ones(4)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(OSError):
            files.save_safetensors(path, {"a": torch.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.open_source(path).read("a").sum() == 4 and os.listdir(tmp_path) == [
        "x.safetensors"
    ]


# -- published names ------------------------------------------------------------------------------

TOTALS = {
    "wan": (825, 4_999_787_712),
    "wan-diffusers": (825, 4_999_787_712),
    "wan-vae": (196, 704_688_668),
    "wan-vae-diffusers": (196, 704_688_668),
    "umt5": (242, 5_680_910_336),
    "qwen3vl": (625, 2_127_532_032),
    "motus-stage2": (825 + 625 + 286 + 246 - 1, 8_020_222_670),
    "motus-stage3": (825 + 625 + 293 + 246 - 1, 8_022_341_326),
}


@pytest.mark.parametrize("table", TOTALS)
def test_tables_have_the_published_counts(table):
    """Each table of expected tensors adds up to the published number of tensors and parameters."""
    shapes = expected(table)
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())) == TOTALS[
        table
    ]


@pytest.mark.parametrize("table", ["wan", "wan-vae"])
def test_diffusers_names_map_one_to_one(table):
    """The diffusers file holds the tensors of the original under other names, shape for shape."""
    theirs = expected(f"{table}-diffusers")
    rename = layouts.rename_from(f"{table}-diffusers")
    assert {rename(name): shape for name, shape in theirs.items()} == expected(table) and len(
        theirs
    ) == len(expected(table))


@pytest.mark.parametrize(
    "table, kind",
    [("dcae_original", "dcae"), ("dcae_diffusers", "dcae-diffusers"), ("dpflow", "dpflow")],
)
def test_the_networks_under_the_latent_actions_are_recognised(table, kind):
    """DC-AE in both layouts and DPFlow by their telltale tensors; what they rename to is what those
    modules want."""
    names = list(expected(table))
    renamed = {layouts.renaming(names)(name) for name in names}
    assert (
        layouts.identify(names) == (kind, None)
        and len(renamed) == len(names)
        and None not in renamed
    )


def test_a_text_encoder_of_transformers_is_recognised_and_its_tied_name_dropped(tmp_path):
    """shared.weight and encoder.embed_tokens.weight are one tensor; converted, the file has Wan's
    names."""
    names = {
        f"encoder.block.0.layer.{place}.weight"
        for place in (
            "0.layer_norm",
            "0.SelfAttention.relative_attention_bias",
            *(f"0.SelfAttention.{part}" for part in "qkvo"),
            "1.layer_norm",
            "1.DenseReluDense.wi_0",
            "1.DenseReluDense.wi_1",
            "1.DenseReluDense.wo",
        )
    }
    tensors = {
        name: torch.randn(2)
        for name in names | {"encoder.final_layer_norm.weight", "shared.weight"}
    }
    files.save_safetensors(
        tmp_path / "a.safetensors",
        tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]},
    )
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    wanted = {
        name
        for name in expected("umt5")
        if not name.startswith(tuple(f"blocks.{i}." for i in range(1, 24)))
    }
    with files.open_source(tmp_path / "b.safetensors") as source:
        assert set(source.names()) == wanted and layouts.identify(wanted)[0] == "umt5"


def test_a_digest_changes_with_any_byte_name_and_dtype():
    """Equal tensors have equal digests, in any order; all else differs."""
    a, b = torch.arange(4.0), torch.ones(2, 3)
    assert files.digest({"a": a, "b": b}) == files.digest({"b": b.clone(), "a": a.clone()})
    others = [
        {"a": a + 1, "b": b},
        {"a": b, "b": a},
        {"a": a, "b": b.reshape(3, 2)},
        {"a": a.double(), "b": b},
        {"a": a},
        {"a": a, "b": b},
    ]
    assert len({files.digest({"a": a, "b": b}, "about"), *map(files.digest, others)}) == 7


def test_a_vae_with_other_numbers_of_blocks_is_renamed_by_its_own_count(tmp_path):
    """The resampler comes after a level's residual blocks, however many there are; convert counts
    them."""
    down, up = "encoder.down_blocks.0.", "decoder.up_blocks.0."
    own_down, own_up = "encoder.downsamples.0.downsamples.", "decoder.upsamples.0.upsamples."
    names = {
        f"{down}resnets.0.conv1.weight": f"{own_down}0.residual.2.weight",
        f"{down}downsampler.resample.1.bias": f"{own_down}1.resample.1.bias",
        f"{up}resnets.1.norm2.gamma": f"{own_up}1.residual.3.gamma",
        f"{up}upsampler.time_conv.bias": f"{own_up}2.time_conv.bias",
    }
    files.save_safetensors(tmp_path / "a.safetensors", {name: torch.ones(1) for name in names})
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert set(files.open_source(tmp_path / "b.safetensors").names()) == set(names.values())


def test_a_fused_projection_of_dcae_becomes_three_when_converted(tmp_path):
    """The one tensor of a published file that has three places here: qkv of the original DC-AE."""
    qkv = torch.arange(12.0).view(6, 2, 1, 1)
    name = next(name for name in expected("dcae_original") if name.endswith("qkv.conv.weight"))
    files.save_safetensors(
        tmp_path / "a.safetensors",
        {name: qkv, "encoder.project_in.conv.conv.weight": torch.ones(1)},
    )
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with files.open_source(tmp_path / "b.safetensors") as source:
        parts = [
            source.read(name) for part in "qkv" for name in source.names() if f".to_{part}." in name
        ]
        assert (
            torch.equal(torch.cat(parts), qkv)
            and len(source.names()) == 4
            and layouts.identify(source.names())[0] == "dcae-diffusers"
        )


def full_size(module: str, name: str, config: str) -> nn.Module:
    """Our network at published size on the meta device."""
    part = importlib.import_module(module)
    with torch.device("meta"):
        return getattr(part, name)(getattr(part, config)())


OURS = {
    "wan": ("backbones.wan", "WanModel", "WanConfig"),
    "wan-vae": ("backbones.wan_vae", "WanVAE", "WanVAEConfig"),
    "umt5": ("backbones.umt5", "UMT5Encoder", "UMT5Config"),
    "qwen3vl": ("backbones.qwen3vl", "Qwen3VL", "Qwen3VLConfig"),
}


@pytest.mark.parametrize("table", OURS)
def test_our_networks_want_exactly_the_published_tensors(table):
    """At full size, the names and shapes our module wants equal those of the published file."""
    rename = layouts.rename_from(table)
    wanted = {name: tuple(t.shape) for name, t in full_size(*OURS[table]).state_dict().items()}
    assert wanted == {rename(name): shape for name, shape in expected(table).items()}


def test_our_motus_wants_exactly_the_published_tensors():
    """Video, action and understanding experts at full size equal the stage 3 file without its
    frozen vision-language model."""
    wanted = {
        name: tuple(t.shape)
        for name, t in full_size("motus", "Motus", "MotusConfig").state_dict().items()
    }
    published = {own_name(name): shape for name, shape in expected("motus-stage3").items()}
    assert wanted == {
        name: shape for name, shape in published.items() if not name.startswith("vlm.")
    }


ORACLES = {
    "wan-diffusers": (
        "diffusers",
        "WanTransformer3DModel",
        dict(
            patch_size=(1, 2, 2),
            num_attention_heads=24,
            attention_head_dim=128,
            in_channels=48,
            out_channels=48,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=14336,
            num_layers=30,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
        ),
    ),
    "wan-vae-diffusers": (
        "diffusers",
        "AutoencoderKLWan",
        dict(
            base_dim=160,
            decoder_base_dim=256,
            z_dim=48,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("table", ORACLES)
def test_tables_equal_the_library_at_full_size(table):
    """The table of a diffusers file is what that library's class holds on the meta device."""
    package, name, arguments = ORACLES[table]
    with torch.device("meta"):
        model = getattr(pytest.importorskip(package), name)(**arguments)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected(table)


# -- official Motus files -------------------------------------------------------------------------


@pytest.mark.parametrize("name, stage", [(OFFICIAL[0], 3), (OFFICIAL[1], 2)])
def test_an_official_file_loads_completely_into_its_own_names(name, stage):
    """Every tensor of the official file is loaded once or knowingly dropped, and the stage is
    recognised."""
    source = files.open_source(official(name))
    assert layouts.identify(source.names()) == ("motus", stage)
    module = module_of(shapes_of(source, own_name))
    load.load_into(module, source, own_name)
    loaded = load.plan_names(source, own_name)
    dropped = set(source.names()) - set(loaded.values())
    assert len(loaded) + len(dropped) == len(source.names()) and layouts.POSITIONS in dropped
    assert all(layouts.alias_of(key) for key in dropped - {layouts.POSITIONS})
    assert torch.equal(
        module.und.blocks.get_submodule("1").qkv, source.read("und_expert.blocks.1.wan_und_qkv")
    )
    canonical = [key for key in source.names() if own_name(key)]
    assert [layouts.substitute(own_name(key), layouts.MOTUS_BACK) for key in canonical] == canonical


def test_stage_2_weights_start_stage_3():
    """Blocks carry over; encoders, decoder and registers start fresh though the stage 2 file holds
    some of them."""
    fresh = ("action.input_encoder.", "action.decoder.", "action.registers")
    stage3 = files.open_source(official("motus_finetune"))
    module = module_of(shapes_of(stage3, own_name), device="cpu")
    load.load_into(
        module,
        files.open_source(official("motus_pretrain")),
        own_name,
        ignore=fresh,
        fresh=fresh,
    )
    started = [value for key, value in module.state_dict().items() if key.startswith(fresh)]
    assert len(started) == 1 + 12 + 3 and all(value.sum() == 0 for value in started)
    assert (
        module.action.decoder.modulation.sum() == 0
        and module.action.blocks.get_submodule("1").qkv.abs().sum() > 0
    )
    with pytest.raises(ValueError, match="missing: action.registers"):
        load.load_into(module, files.open_source(official("motus_pretrain")), own_name)


def test_a_copy_that_differs_from_its_original_is_refused(tmp_path):
    """Second names are dropped only after they are found to be the same tensor."""
    module = dict(torch.load(official("motus_finetune"), weights_only=True)["module"])
    name = "und_module.und_expert.blocks.0.wan_und_qkv"
    for copy, refused in ((module[name].clone(), False), (module[name] + 1, True)):
        torch.save({"module": module | {name: copy}}, tmp_path / "x.pt")
        source = files.open_source(tmp_path / "x.pt")
        target = module_of(shapes_of(source, own_name))
        if refused:
            with pytest.raises(ValueError, match="und_module.*differs from und_expert"):
                load.load_into(target, source, own_name)
        else:
            load.load_into(target, source, own_name)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_to_ours_and_back_keeps_every_byte(tmp_path, name):
    """convert then export gives the official file again: same names, same bf16 bytes, copies
    sharing one storage."""
    saved = torch.load(official(name), weights_only=True)["module"]
    half = {t.data_ptr(): t.bfloat16() for t in saved.values()}
    before = {key: half[t.data_ptr()] for key, t in saved.items()}
    embedding = torch.randn(10, 4).bfloat16()
    vlm = {"model.language_model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    before |= {
        f"{wrapper}vlm_model.{key}": t
        for wrapper in ("", "und_module.", "action_module.")
        for key, t in vlm.items()
    }
    torch.save({"module": before, "dp_world_size": 8}, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text('{"common": {"action_dim": 14}}')
    __main__.main(["convert", str(tmp_path), str(tmp_path / "ours" / "motus.safetensors")])
    __main__.main(["export", str(tmp_path / "ours" / "motus.safetensors"), str(tmp_path / "back")])
    after = torch.load(tmp_path / "back" / "mp_rank_00_model_states.pt", weights_only=True)[
        "module"
    ]
    assert (
        after.keys() == before.keys()
        and json.loads((tmp_path / "back" / "config.json").read_text())["common"]["action_dim"]
        == 14
    )
    for key, value in before.items():
        assert value.dtype == after[key].dtype == torch.bfloat16 and torch.equal(
            value.view(torch.uint8), after[key].view(torch.uint8)
        ), key
    for key, value in after.items():
        assert (
            not layouts.alias_of(key) or value.data_ptr() == after[layouts.alias_of(key)].data_ptr()
        )
    assert (tmp_path / "back" / "mp_rank_00_model_states.pt").stat().st_size < 2 * (
        tmp_path / "mp_rank_00_model_states.pt"
    ).stat().st_size


def test_a_checkpoint_of_ours_exports_with_the_chunk_of_its_config(tmp_path):
    """Our own file notes its MotusConfig, which gives the rows of the position table; without it
    the command asks for them."""
    with files.open_source(official("motus_finetune")) as source:
        ours = {own_name(name): source.read(name) for name in source.names() if own_name(name)}
    config = MotusConfig(frames=8, ratio=2, registers=4).as_json()
    files.save_safetensors(tmp_path / "ours.safetensors", ours, {"config": json.dumps(config)})
    convert.export(tmp_path / "ours.safetensors", tmp_path / "official", dtype=torch.float32)
    with (
        files.open_source(tmp_path / "official") as back,
        files.open_source(official("motus_finetune")) as source,
    ):
        assert set(back.names()) == set(source.names()) and all(
            torch.equal(back.read(name), source.read(name)) for name in back.names()
        )
    files.save_safetensors(tmp_path / "bare.safetensors", ours)
    with pytest.raises(ValueError, match="--rows"):
        convert.export(tmp_path / "bare.safetensors", tmp_path / "other")


def test_bookkeeping_beside_the_weights_does_not_matter(tmp_path):
    """What a trainer saves beside the weights (sets, sizes, counters, devices) is read and left
    aside."""
    beside = {
        "names": {"a", "b"},
        "shapes": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "steps": 7,
    }
    torch.save(beside | {"module": {"a": torch.ones(2)}, "optimizer": None}, tmp_path / "x.pt")
    assert files.open_source(tmp_path / "x.pt").names() == ["a"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_position_table_is_a_function_of_its_shape(name):
    """The regenerated table equals the one in the official file, so dropping it loses nothing."""
    table = files.open_source(official(name)).read(layouts.POSITIONS)
    assert torch.equal(convert.position_table(*table.shape[1:]), table)


@pytest.mark.parametrize("name, kind", [("wan_vae.pth", "wan-vae"), ("umt5.pth", "umt5")])
def test_plain_torch_files_open_without_reading(name, kind):
    """VAE and text encoder files are recognised and give the tensors that torch gives."""
    source, truth = files.open_source(GOLDEN / name), torch.load(GOLDEN / name, weights_only=True)
    assert layouts.identify(source.names())[0] == kind and source.names() == list(truth)
    assert all(torch.equal(source.read(key), value) for key, value in truth.items())


def test_inspect_prints_what_a_reader_needs(capsys):
    """The command line names kind, stage, parts and counts."""
    __main__.main(["inspect", str(official("motus_finetune"))])
    out = capsys.readouterr().out
    assert "Motus stage 3" in out and "131 tensors, 150,814 parameters" in out


def test_download_says_what_it_fetches_before_it_needs_the_hub(capsys, monkeypatch):
    """Sizes and licences are printed first; a missing hub package is one plain sentence."""
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install"):
        __main__.main(["download", "wan"])
    assert "34.2 GB, licence Apache-2.0" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="invalid choice: 'nonsense' .choose from 'wan', 'qwen3vl'"
    ):
        __main__.main(["download", "nonsense"])


# -- hostile files --------------------------------------------------------------------------------


def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = {
    "empty file": b"",
    "shorter than a length": b"\x01\x02",
    "absurd header length": raw({}, length=2**64 - 1),
    "header longer than the file": raw({}, length=10**6),
    "header larger than any honest one": raw({}, length=files.MAX_HEADER + 1)
    + bytes(files.MAX_HEADER),
    "not json": raw(b"hello world"),
    "not utf-8": raw(b'{"\xff": 1}'),
    "nan in the header": raw(b'{"a": NaN}'),
    "json nested too deep": raw(b'{"a":' + b"[" * 100_000),
    "a list, not an object": raw([1, 2]),
    "duplicate json keys": raw(
        b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)
    ),
    "10**12 elements": raw({"a": entry(shape=(10**12,), offsets=(0, 8))}, bytes(8)),
    "10**12 elements with matching offsets": raw(
        {"a": entry(shape=(10**12,), offsets=(0, 4 * 10**12))}, bytes(8)
    ),
    "shape that overflows 64 bits": raw(
        {"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}, bytes(8)
    ),
    "number with a million digits": raw(
        b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % (b"9" * 10**6), bytes(8)
    ),
    "offsets past the end": raw({"a": entry(offsets=(8, 16))}, bytes(8)),
    "overlapping tensors": raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "a gap between tensors": raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "truncated data": raw({"a": entry(shape=(4,), offsets=(0, 16))}, bytes(8)),
    "bytes after the last tensor": raw({"a": entry()}, bytes(64)),
    "wrong dtype name": raw({"a": entry(dtype="F31")}, bytes(8)),
    "dtype that is not text": raw({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative shape": raw({"a": entry(shape=(-1, -2))}, bytes(8)),
    "boolean shape": raw({"a": entry(dtype="F64", shape=(True,))}, bytes(8)),
    "fractional shape": raw({"a": entry(shape=(2.0,))}, bytes(8)),
    "size mismatch": raw({"a": entry(shape=(3,))}, bytes(8)),
    "reversed offsets": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "entry without dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "entry that is a number": raw({"a": 7}),
    "a name of a megabyte": raw({"a" * 10**6: entry(dtype="F31")}),
    "metadata that is not text": raw({"__metadata__": {"a": 1}}),
}


class Runs:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def torch_file(path: Path, content, protocol: int = 2) -> None:
    torch.save(content, path, pickle_protocol=protocol)


def edit_zip(path: Path, change) -> None:
    """Rewrite a torch zip, each record through `change(name, bytes) -> (bytes, compression)`."""
    with zipfile.ZipFile(path) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in records:
            content, compression = change(name, content)
            new.writestr(name, content, compress_type=compression)


def larger_claim(name: str, content: bytes) -> tuple[bytes, int]:
    """Multiply the element count in the pickle: a BININT1 of 200 becomes a LONG1 of 200e9."""
    claim = pickle.LONG1 + b"\x05" + (200 * 10**9).to_bytes(5, "little")
    return (
        content.replace(b"K\xc8", claim) if name.endswith("data.pkl") else content
    ), zipfile.ZIP_STORED


def torch_cases(folder: Path) -> dict[str, Path]:
    cases = {}

    def case(name: str) -> Path:
        cases[name] = folder / f"{len(cases)}.pt"
        return cases[name]

    torch_file(case("pickle that runs a command"), {"a": torch.ones(2), "b": Runs()})
    torch_file(
        case("pickle that runs a command, protocol 4"),
        {"a": torch.ones(2), "b": Runs()},
        protocol=4,
    )
    torch_file(case("pickle that asks for memory"), {"a": bytearray(8)})
    torch_file(case("sparse tensor"), {"a": torch.ones(2, 2).to_sparse()})
    torch_file(case("tensor without storage"), {"a": torch.ones(2, device="meta")})
    torch_file(case("a whole module"), nn.Linear(2, 2))
    torch_file(case("module is not a dictionary"), {"module": [torch.ones(2)]})
    torch_file(case("module holds text"), {"module": {"a": "text"}})
    torch_file(case("names that are not text"), {1: torch.ones(2)})
    torch_file(case("no tensors at all"), {})
    torch_file(
        case("10**12 elements over two"), {"a": torch.ones(2).as_strided((10**6, 10**6), (0, 0))}
    )
    torch_file(path := case("storage larger than its record"), {"a": torch.ones(200)})
    edit_zip(path, larger_claim)
    torch_file(
        path := case("storage that reaches into the next record"),
        {"a": torch.ones(200), "b": torch.ones(300)},
    )
    edit_zip(
        path, lambda name, content: (content.replace(b"K\xc8", b"K\xfa"), zipfile.ZIP_STORED)
    )  # 200 becomes 250
    torch_file(path := case("zip bomb"), {"a": torch.ones(2)})
    edit_zip(
        path,
        lambda name, content: (
            content if name.endswith("pkl") else bytes(1 << 24),
            zipfile.ZIP_DEFLATED,
        ),
    )
    torch_file(path := case("pickle bomb"), {"a": torch.ones(2)})
    edit_zip(
        path,
        lambda name, content: (
            content + bytes(files.MAX_HEADER if name.endswith("pkl") else 0),
            zipfile.ZIP_STORED,
        ),
    )
    torch_file(path := case("shortened record"), {"a": torch.ones(200)})
    edit_zip(
        path,
        lambda name, content: (content[:8] if "/data/" in name else content, zipfile.ZIP_STORED),
    )
    torch_file(path := case("big-endian"), {"a": torch.ones(2)})
    edit_zip(
        path,
        lambda name, content: (
            b"big" if name.endswith("byteorder") else content,
            zipfile.ZIP_STORED,
        ),
    )
    torch_file(path := case("truncated"), {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    torch_file(path := case("record twice"), {"a": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    case("empty torch file").write_bytes(b"")
    case("old torch format").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(case("a zip without a pickle"), "w") as archive:
        archive.writestr("readme.txt", "hello")
    return cases


def index_cases(folder: Path) -> dict[str, Path]:
    cases = {}

    def case(name: str, weight_map, extra: bytes = b"") -> Path:
        home = folder / str(len(cases))
        home.mkdir()
        files.save_safetensors(home / "a.safetensors", {"x": torch.ones(2)})
        files.save_safetensors(home / "b.safetensors", {"y": torch.ones(2)})
        text = (
            weight_map
            if isinstance(weight_map, bytes)
            else json.dumps({"weight_map": weight_map}).encode()
        )
        (home / "m.safetensors.index.json").write_bytes(text)
        cases[name] = home / "m.safetensors.index.json"
        return home

    both = {"x": "a.safetensors", "y": "b.safetensors"}
    files.save_safetensors(folder / "outside.safetensors", {"x": torch.ones(2)})
    case("path traversal", {"x": "../outside.safetensors"})
    case("absolute path", {"x": str(folder / "outside.safetensors")})
    (case("link out of the folder", {"x": "link.safetensors"}) / "link.safetensors").symlink_to(
        folder / "outside.safetensors"
    )
    case("missing shard", both | {"z": "c.safetensors"})
    case("tensor missing from its shard", both | {"z": "b.safetensors"})
    case("tensor the index does not know", {"y": "b.safetensors"} | {"q": "a.safetensors"})
    files.save_safetensors(
        case("key in two shards", both) / "b.safetensors", {"x": torch.ones(2), "y": torch.ones(2)}
    )
    case("index key twice", b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}')
    case("no weight_map", b"{}")
    case("weight_map of numbers", {"x": 1})
    case("index is not json", b"\x00\x01")
    (case("broken shard", both) / "b.safetensors").write_bytes(b"oops")
    return cases


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    cases = {}
    for name, content in SAFETENSORS.items():
        cases[name] = folder / f"{len(cases)}.safetensors"
        cases[name].write_bytes(content)
    for kind in (torch_cases, index_cases):
        (folder / kind.__name__).mkdir()
        cases |= kind(folder / kind.__name__)
    (folder / "nothing").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    return cases | {
        "no such file": folder / "none.safetensors",
        "folder without weights": folder / "nothing",
        "a pipe": folder / "pipe.safetensors",
        "unknown suffix": Path(__file__),
    }


def test_hostile_files_are_refused_quickly_in_little_memory(hostile, tmp_path, monkeypatch):
    """Each hostile file ends in one ValueError that names the file, within a second, without large
    allocations; no code runs."""
    monkeypatch.chdir(tmp_path)
    assert len(hostile) >= 60
    for name, path in hostile.items():
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        tracemalloc.start()
        try:
            with pytest.raises(ValueError) as error:
                files.open_source(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        known = str(
            path.parent if path.name.endswith("index.json") else path
        )  # for a bad shard, the shard is named
        assert known in str(error.value) and len(str(error.value)) < 5000, name
        assert (
            peak < 4 * files.MAX_HEADER
            and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
        ), name
        assert time.process_time() - begun < 1, name
    assert os.listdir(tmp_path) == []


# -- memory and rate ------------------------------------------------------------------------------


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return next(
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field)
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_opening_reads_nothing_and_writing_into_a_tensor_leaves_the_file(tmp_path):
    """64 MB are mapped, and become memory when they are touched; the mapping is private, so what
    is written into it does not reach the disk."""
    files.save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1 << 24)})
    before = status("VmRSS")
    tensor = files.open_source(tmp_path / "x.safetensors").read("a")
    opened = status("VmRSS") - before
    assert tensor.sum() == 1 << 24
    assert opened < 8 << 20 and status("VmRSS") - before > 56 << 20
    tensor[:2] = 7
    assert files.open_source(tmp_path / "x.safetensors").read("a")[:3].tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)
def test_a_load_needs_one_tensor_above_the_module(tmp_path):
    """2.2 GB in four shards into a bf16 module: the peak above the module is at most 1.05 largest
    tensors + 100 MB. The rate is printed."""
    rows, index = 8192, {}
    for shard in range(4):
        tensors = {f"w{2 * shard + i}": torch.rand(1024, rows).repeat(8, 1) for i in range(2)}
        files.save_safetensors(tmp_path / f"m-{shard}.safetensors", tensors)
        index |= dict.fromkeys(tensors, f"m-{shard}.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shards, total = sorted(tmp_path.glob("*.safetensors")), 8 * rows * rows * 4
    assert total > 2 * 10**9
    del tensors

    def cold() -> None:
        for file in shards:
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    plain, loads, extra = [], [], []
    for _ in range(3):
        cold()
        begun = time.perf_counter()
        for file in shards:
            file.read_bytes()
        plain.append(total / (time.perf_counter() - begun) / 1e9)
        cold()
        module = module_of({name: (rows, rows) for name in index}, dtype=torch.bfloat16)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak that VmHWM reports
        before = status("VmRSS")
        with files.open_source(tmp_path) as source:
            begun = time.perf_counter()
            load.load_into(module, source)
            loads.append(total / (time.perf_counter() - begun) / 1e9)
        extra.append(status("VmHWM") - before - sum(p.nbytes for p in module.parameters()))
        del module
    share = max(loads) / max(plain)
    print(f"\nload {max(loads):.2f} GB/s, plain reading {max(plain):.2f} GB/s: {share:.0%}")
    largest = rows * rows * 4
    print(f"above the module {max(extra) / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert max(extra) < 1.05 * rows * rows * 4 + 100e6
