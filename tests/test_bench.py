"""The measuring itself: the official order of work gives our result, counts are right where a
reader can check them, claims hold."""

from dataclasses import replace

import pytest
import torch
from test_motus import TINY, inputs_of, model_of
from test_sample import views, write_checkpoint
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import flow
from motus import Inputs, Motus, preset
from sample import Placement, Policy
from scripts import bench
from scripts.bench import Work


class Step(nn.Module):
    """One evaluation of the network as a module whose arguments are tensors alone, for what exports
    modules; and `example` arguments."""

    def __init__(self, model: Motus, inputs: Inputs):
        super().__init__()
        t = torch.full((len(inputs),), 0.5)
        leaves, self.structure = tree_flatten(
            (
                *bench.noise_for(model, inputs),
                model.clock(t, t),
                model.conditions(inputs, cache=True),
            )
        )
        self.model, self.example, self.given = (
            model,
            tuple(x for x in leaves if x is not None),
            [x is not None for x in leaves],
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(tensors)
        return self.model.evaluate(
            *tree_unflatten([next(rest) if given else None for given in self.given], self.structure)
        )[:2]


def test_the_official_order_of_work_gives_our_sample():
    """Same weights, same noise, one result; the VLM looks once and then at every step, the video is
    decoded."""
    model, inputs, calls = model_of(), inputs_of(), []
    inputs = replace(inputs, actions=None, action_mask=None)
    video, action = bench.noise_for(model, inputs)
    found = bench.official_sample(
        model,
        lambda: calls.append("vlm") or inputs.und,
        inputs,
        video,
        action,
        3,
        lambda video: calls.append("decode"),
    )
    expected = model.sample(inputs, "joint", 3, video_noise=video, action_noise=action).actions
    assert torch.allclose(found, expected, atol=1e-5) and calls == 4 * ["vlm"] + ["decode"]


def test_two_ways_that_differ_are_not_timed():
    """Beyond 1e-4 a ratio would compare different work."""
    assert bench.agree(torch.zeros(2), torch.full((2,), 5e-5)) == pytest.approx(5e-5)
    with pytest.raises(ValueError, match="differ by 0.0002"):
        bench.agree(torch.zeros(2), torch.full((2,), 2e-4))


def test_work_counts_what_a_reader_can_count():
    """(2, 3) times (3, 4): 2 * 2 * 3 * 4 FLOPs, 6 + 12 + 8 numbers of 4 bytes; a view is no kernel,
    an addition has no FLOPs here."""
    a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")
    with Work() as work:
        (a @ b).view(8)
    assert (work.flops, work.bytes, work.launches) == (48, 104, 1)
    with Work() as more:
        (a @ b) + 1
    total = work.and_then(3, more, work)
    assert (total.flops, total.launches, total.bytes) == (48, 4, 104 + 3 * 2 * 8 * 4)


def test_a_chunk_is_composed_of_its_steps_exactly():
    """Three steps counted outright equal three steps composed from one and two; likewise with one
    of them joint."""
    found, inputs = (
        bench.chunk_work(TINY, 3, torch.float32),
        bench.drawn(TINY, 1, bench.SIDE, bench.TEXT, bench.UND, device="meta"),
    )
    with torch.device("meta"):
        model = Motus(TINY).eval()
    video, action = bench.noise_for(model, inputs)
    for name, joint in (
        ("ours, joint", None),
        ("ours, action-first, 1 of 3 joint", 1),
        ("ours, action-first, 2 of 3 joint", 2),
    ):
        with Work() as work, bench.no_autocast:
            model.sample(inputs, "joint", 3, video_noise=video, action_noise=action, joint=joint)
        assert (found[name][0].flops, found[name][0].launches) == (
            work.flops,
            work.launches,
        ) and found[name][1] == 1
    assert found["official order of work"][1] == 4


def test_predictions_are_bound_by_launches_or_by_the_roof():
    """A thousand empty kernels take as long as their launches; one large product takes its FLOPs at
    the peak that products reach."""
    small, large = Work(bench.Counter({(0, 8): 1000})), Work(bench.Counter({(10**15, 8): 1}))
    assert bench.predicted(small, "H100")[:2] == pytest.approx(
        (1000 * bench.LAUNCH, 1000 * bench.SMALLEST)
    )
    assert bench.predicted(large, "H100") == pytest.approx(3 * (1e15 / (989e12 * 0.55),))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "stage3", "3")


def test_an_action_costs_one_look_and_no_decoding(run, monkeypatch):
    """Calls counted by hooks: VLM 1, text encoder 1 and 0 when the instruction comes again, video
    decoder 0."""
    policy, calls = Policy.load(run, steps=3), {"vlm": 0, "text": 0, "decode": 0}
    for name in ("vlm", "text"):
        getattr(policy.backbones, name).register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    monkeypatch.setattr(policy.backbones.vae, "decode", lambda *_: calls.update(decode=1))
    for repeated in (False, True):
        calls.update(vlm=0, text=0)
        policy.act(*views(1))
        assert calls == {"vlm": 1, "text": 0 if repeated else 1, "decode": 0}


def test_the_closed_loop_gives_a_row_per_placement(run):
    """Success with its interval, and milliseconds per look."""
    found = bench.closed_loop(
        str(run), 2, [0], [Placement(1), Placement(2, 1)], max_steps=8
    ).splitlines()
    assert (
        len(found) == 4
        and found[2].startswith("| 1 | all | 1 | ")
        and found[3].startswith("| 2 | 1 | 1 | ")
        and "/2" in found[3]
    )


def test_the_drift_of_int8_is_small_and_told_per_mode(run):
    """Eight bits per weight change velocities by about a per cent; every mode has a row for what it
    denoises."""
    rows = [
        line.strip("| ").split(" | ") for line in bench.int8_drift(str(run), 2).splitlines()[2:]
    ]
    assert [row[:2] for row in rows] == [
        [mode, name]
        for mode in flow.MODES
        for name in ("video", "action")
        if getattr(flow.MODES[mode], name) == flow.DENOISE
    ]
    assert all(0 < float(row[2]) < 3 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_measuring_one_is_refused_in_one_sentence():
    """No traceback, no half-written table."""
    with pytest.raises(ValueError, match="--gpu measures on a CUDA device"):
        bench.main(["--gpu"])


# -- at full size, or with the compiler -----------------------------------------------------------


@pytest.mark.slow
def test_a_chunk_at_full_size_costs_what_is_claimed():
    """On the meta device, VLM and VAE included: at most 35.6 TFLOP joint, at most 8 with one step
    joint and the others action-first, and more than 53 in the official order of work, most of it
    before the video is decoded."""
    vlm, (encode, decode), work = (
        bench.vlm_work().flops,
        bench.vae_work(),
        bench.chunk_work(preset("full")),
    )
    tera = {
        name: (trunk.flops + looks * vlm + encode.flops) / 1e12
        for name, (trunk, looks) in work.items()
    }
    assert tera["ours, joint"] <= 35.6 and tera["ours, action-first, 1 of 10 joint"] <= 8
    assert (
        tera["official order of work"] > 50
        and tera["official order of work"] + decode.flops / 1e12 >= 53
    )


def test_int8_halves_what_the_full_model_weighs():
    """On the meta device: 16.0 GB in bf16 with the VLM, 11.1 GB with int8 maps in the video expert;
    a card of 24 GB has room."""
    assert [round(bench.memory(int8) / 1e9, 1) for int8 in (False, True)] == [16.0, 11.1]


@pytest.mark.slow
def test_a_step_of_the_full_model_exports():
    """torch.export of all 30 layers in bf16 under fake tensors: one graph, every parameter that a
    step reads."""
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)  # `.to` cannot cast fake parameters
        try:
            model = Motus(preset("full")).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        step = Step(
            model, bench.drawn(model.config, 1, bench.SIDE, bench.TEXT, bench.UND, torch.bfloat16)
        )
        program = torch.export.export(step, step.example, strict=False)
    assert len(list(program.graph.nodes)) > 3000 and program.graph_signature.user_outputs


@pytest.mark.slow
@torch.no_grad()
def test_a_packaged_step_runs_without_python_and_equals_eager(tmp_path):
    """AOTInductor compiles the toy's step ahead of time; the package, loaded again, gives the same
    velocities."""
    torch.manual_seed(0)
    step = Step(model := Motus(preset("toy")).eval(), bench.drawn(model.config, 1, (6, 6), 8, 21))
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(step, step.example, strict=False),
        package_path=str(tmp_path / "step.pt2"),
    )
    found, expected = torch._inductor.aoti_load_package(package)(*step.example), step(*step.example)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
