"""DPFlow against the original implementation, its published names, and the flow estimators'
interface."""

import importlib.util
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tables import expected

from backbones.dpflow import (
    Correlation,
    DISFlow,
    DPFlow,
    DPFlowConfig,
    convex_upsample,
    load_dpflow,
    pyramid_levels,
)
from weights.hub import LICENCE_NOTICE, fetch
from weights.layouts import rename_from

dpflow_own = rename_from("dpflow")
THIN = DPFlowConfig(stem=(16, 24), width=32, depth=1)


class OracleBase(torch.nn.Module):
    """The few lines of the original's base class that inference touches: shift, flip BGR to RGB,
    pad, crop."""

    def __init__(self, loss_fn=None, output_stride=None):
        super().__init__()
        self.output_stride = output_stride
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def preprocess_images(self, images, stride, bgr_add, bgr_mult, **_):
        images = ((images + bgr_add) * bgr_mult).flip(-3)
        extra_h, extra_w = -images.shape[-2] % stride, -images.shape[-1] % stride
        pad = (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
        return F.pad(images.flatten(0, 1), pad, mode="replicate").unflatten(0, images.shape[:2]), (
            pad,
            images.shape[-2:],
        )

    def postprocess_predictions(self, prediction, resizer, is_flow):
        pad, (height, width) = resizer
        return prediction[..., pad[2] : pad[2] + height, pad[0] : pad[0] + width]


@contextmanager
def stubbed_ptlflow():
    """ptlflow imports half of the video world; give its dpflow folder only what it uses, and take
    the stubs away afterwards."""
    root = importlib.util.find_spec("ptlflow")
    if root is None:
        pytest.skip("ptlflow is not installed (pip install --no-deps ptlflow)")
    root, before = Path(root.origin).parent, dict(sys.modules)

    def module(name, path=None, **contents):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(contents)
        if path is not None:
            sys.modules[name].__path__ = [str(path)]

    module("ptlflow", root)
    module("ptlflow.models", root / "models")
    module("ptlflow.utils", root / "utils")
    module("ptlflow.models.base_model", root / "models" / "base_model")
    module("ptlflow.models.base_model.base_model", BaseModel=OracleBase)
    module(
        "ptlflow.utils.registry",
        **{name: (lambda cls: cls) for name in ("register_model", "trainable", "ptlflow_trained")},
    )
    module("ptlflow.utils.utils", forward_interpolate_batch=None)
    module("loguru", logger=types.SimpleNamespace(info=lambda *_: None, warning=lambda *_: None))
    try:
        yield importlib.import_module("ptlflow.models.dpflow.dpflow").DPFlow
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("ptlflow", "loguru")]:
            del sys.modules[name]
        sys.modules.update(
            {
                name: old
                for name, old in before.items()
                if name.split(".")[0] in ("ptlflow", "loguru")
            }
        )


def make_oracle(oracle, **sizes):
    """An original model with layer_scale enlarged: its initial 0.01 would hide an error inside any
    block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = oracle(**sizes).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.data.uniform_(0.1, 0.6)
    return model


@pytest.fixture(scope="module")
def original():
    with stubbed_ptlflow() as oracle:
        return make_oracle(oracle)


@pytest.fixture(scope="module")
def thin():
    torch.manual_seed(0)
    return DPFlow(THIN).eval()


def frames(height, width, batch=1, seed=1):
    """Smooth random pictures in [0, 1]; white noise would leave nothing at the coarse levels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, batch, 3, height // 6 + 2, width // 6 + 2, generator=generator)
    return [F.interpolate(half, (height, width), mode="bicubic").clamp(0, 1) for half in coarse]


@torch.no_grad()
def difference(config, oracle, a, b):
    """Largest difference in pixels between our flow and the original's, with the original's
    weights."""
    ours = DPFlow(config).eval()
    ours.load_state_dict({dpflow_own(key): value for key, value in oracle.state_dict().items()})
    wanted = oracle({"images": torch.stack([a, b], dim=1).flip(-3)})["flows"][:, 0]
    flow = ours(a, b)
    assert flow.shape == wanted.shape
    assert wanted.abs().mean() > 0.2, "a comparison of resting pictures would prove little"
    return (flow - wanted).abs().max()


@pytest.mark.parametrize("size", [(64, 64), (70, 97), (96, 160)])
def test_flow_equals_the_original_at_any_size(original, size):
    """The published network gives the original's flow within 1e-4 pixels, padded sizes included."""
    assert difference(DPFlowConfig(), original, *frames(*size)) < 1e-4


def test_levels_and_iterations_are_options():
    """Four levels of two iterations, two rows of a batch, other widths: still the original."""
    sizes = dict(
        enc_hidden_chs=(16, 24, 32),
        enc_depth=1,
        enc_out_1x1_chs="96",
        dec_gru_depth=1,
        dec_net_chs=32,
        dec_inp_chs=32,
        dec_motion_chs=32,
        dec_flow_head_chs=64,
        dec_motenc_corr_hidden_chs=64,
        dec_motenc_corr_out_chs=48,
        dec_motenc_flow_hidden_chs=32,
        dec_motenc_flow_out_chs=16,
    )
    with stubbed_ptlflow() as oracle:
        model = make_oracle(oracle, pyramid_levels=4, iters_per_level=2, **sizes)
    assert (
        difference(replace(THIN, levels=4, iterations=2), model, *frames(130, 140, batch=2)) < 1e-4
    )


def test_pyramid_depth_follows_the_diagonal():
    """Three levels up to 1 Kpx, one more for each doubling; the same rule as the original's."""
    sizes = ((64, 64), (384, 320), (540, 960), (1080, 1920), (2160, 3840), (4320, 7680))
    assert [pyramid_levels(*size) for size in sizes] == [3, 3, 3, 4, 5, 6]
    with stubbed_ptlflow():
        rule = importlib.import_module("ptlflow.models.dpflow.utils").compute_pyramid_levels
        for side in range(50, 6000, 37):
            assert pyramid_levels(side, 2 * side) == rule(
                torch.empty(1, side, 2 * side, device="meta")
            )


@pytest.mark.parametrize("size", [(1, 1), (17, 23), (40, 200)])
def test_tiny_and_odd_frames_give_finite_flow(thin, size):
    """Frames of one coarse position, where the original divides by zero, are padded to two."""
    with torch.no_grad():
        flow = thin(*frames(*size))
    assert flow.shape == (1, 2, *size) and flow.isfinite().all()


def test_sliced_correlations_change_nothing(thin):
    """A volume made in slices, as for large frames, gives the same flow as one held whole."""
    sliced = DPFlow(replace(THIN, volume_limit=500)).eval()
    sliced.load_state_dict(thin.state_dict())
    a, b = frames(96, 64, batch=2)
    with torch.no_grad():
        assert torch.allclose(sliced(a, b), thin(a, b), atol=1e-4)


def test_products_that_fit_are_made_once_for_all_iterations(monkeypatch):
    """And anew at every reading where they do not."""
    made = []
    products = Correlation.products
    monkeypatch.setattr(Correlation, "products", lambda *x: made.append(1) or products(*x))
    a, b = torch.rand(2, 1, 4, 3, 5)
    for limit, calls in ((15 * 15, 1), (100, 3 * 3)):
        correlation = Correlation(a, b, replace(THIN, volume_limit=limit))
        for _ in range(3):
            correlation(torch.zeros(1, 2, 3, 5))
        assert len(made) == calls
        made.clear()


def test_rows_of_a_batch_do_not_mix(thin):
    """Both frames of all rows travel as one stack; each row still sees only its own partner."""
    a, b = frames(64, 64, batch=3)
    with torch.no_grad():
        assert torch.allclose(thin(a, b)[1:2], thin(a[1:2], b[1:2]), atol=1e-4)


def test_half_precision_keeps_the_flow_in_fp32(thin):
    """In bf16 coordinates beyond 256 would fall on even numbers; flow and look-up stay in fp32
    whatever the weights are."""
    half = DPFlow(THIN).eval()
    half.load_state_dict(thin.state_dict())
    a, b = frames(64, 96)
    with torch.no_grad():
        flow, exact = half.bfloat16()(a, b), thin(a, b)
    assert flow.dtype == torch.float32 and (flow - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_convex_upsampling_of_one_sided_weights_is_a_copy():
    """With all weight on the middle of the 3 x 3 neighbours, each coarse value fills its 8 x 8
    square."""
    flow = torch.randn(1, 2, 2, 3)
    mask = torch.full((1, 9, 64, 2, 3), -1e4)
    mask[:, 4] = 0
    assert torch.equal(
        convex_upsample(flow, mask.flatten(1, 2)),
        flow.repeat_interleave(8, 2).repeat_interleave(8, 3),
    )


def test_every_published_tensor_has_a_place():
    """The committed table is the original's state dict, and the names map one to one onto our
    10,021,508 parameters."""
    table = expected("dpflow")
    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in DPFlow().state_dict().items()}
        with stubbed_ptlflow() as oracle:
            assert table == {
                name: tuple(value.shape) for name, value in oracle().state_dict().items()
            }
    assert {dpflow_own(name): shape for name, shape in table.items()} == ours and len(table) == len(
        ours
    ) == 498
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 10_021_508


def publish(model, path, **extra):
    """Write a Lightning file as the published ones are: original names under 'state_dict', other
    things beside it."""
    with torch.device("meta"):
        names = {dpflow_own(name): name for name in expected("dpflow")}
    tensors = {names.get(name, name): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": tensors | extra, "hyper_parameters": {"lr": 1e-4}, "epoch": 3}, path)
    return path


def test_a_published_checkpoint_loads_whole_or_not_at_all(tmp_path, thin):
    """Loading a .ckpt restores every tensor; one tensor too many is an error that names it."""
    config = replace(THIN, depth=4)
    torch.manual_seed(1)
    model = DPFlow(config)
    loaded = load_dpflow(publish(model, tmp_path / "dpflow-things-00000000.ckpt"), config)
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )
    with pytest.raises(ValueError, match="fnet_extra"):
        load_dpflow(
            publish(model, tmp_path / "more.ckpt", **{"fnet_extra.weight": torch.zeros(1)}), config
        )


def test_fetching_weights_prints_their_licence(tmp_path, monkeypatch, capsys):
    """The notice appears before any byte of the research-only weights arrives, also when they lie
    there already."""
    asked = []
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path, hash_prefix: asked.append((url, hash_prefix)),
    )
    path = fetch(tmp_path / "weights")
    assert LICENCE_NOTICE in capsys.readouterr().err and "research" in LICENCE_NOTICE
    assert (
        asked[0][0].endswith("/weights1/dpflow-things-2012b5d6.ckpt") and asked[0][1] == "2012b5d6"
    )
    path.touch()
    assert fetch(tmp_path / "weights") == path and len(asked) == 1
    assert LICENCE_NOTICE in capsys.readouterr().err


def test_dis_measures_a_known_shift_in_pixels():
    """A texture moved 3 pixels right and 2 down gives (3, 2), in pixels of the frames."""
    pytest.importorskip("cv2")
    picture = F.interpolate(
        torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)),
        (160, 160),
        mode="bicubic",
    ).clamp(0, 1)
    flow = DISFlow()(picture[:, :, 40:104, 40:104], picture[:, :, 38:102, 37:101])
    assert flow.shape == (2, 2, 64, 64)
    error = (flow - torch.tensor([3.0, 2.0])[:, None, None])[:, :, 12:-12, 12:-12].norm(dim=1)
    assert error.mean() < 0.1


def test_dis_without_opencv_says_what_to_install(monkeypatch):
    """OpenCV is an extra; its absence is a sentence, at construction."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        DISFlow()


def test_frames_that_are_not_frames_are_refused(thin):
    """Bytes, single pictures, unequal batches and frames too small for DIS end in an error that
    says what to give."""
    good = torch.rand(1, 3, 32, 32)
    for a, b in ((good, good[:, :, :30]), (good[0], good[0]), (good[:, :1], good[:, :1])):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            thin(a, b)
    with pytest.raises(ValueError, match="/ 255"):
        thin(good.byte(), good.byte())
    with pytest.raises(ValueError, match="multiple of 8"):
        DPFlowConfig(width=100)
    pytest.importorskip("cv2")
    with pytest.raises(ValueError, match="16 x 16 or more"):
        DISFlow()(good[:, :, :8, :8], good[:, :, :8, :8])


@pytest.mark.parametrize(("height", "width"), [(8, 100), (12, 64), (64, 12), (16, 4), (15, 15)])
def test_frames_on_which_opencv_would_die_are_refused(height, width):
    """One short side is enough: DIS reads outside the picture and ends the process."""
    pytest.importorskip("cv2")
    frames = torch.rand(1, 3, height, width)
    with pytest.raises(ValueError, match=f"{height} x {width}; expected 16 x 16 or more"):
        DISFlow()(frames, frames.roll(1, 3))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 300), (300, 16), (33, 17)])
def test_the_smallest_frames_and_flat_ones_have_a_flow(height, width):
    """Finite, of the size of the frames."""
    pytest.importorskip("cv2")
    for frames in (torch.rand(1, 3, height, width), torch.full((1, 3, height, width), 0.5)):
        flow = DISFlow()(frames, frames.roll(1, 3))
        assert flow.shape == (1, 2, height, width) and flow.isfinite().all()
