"""The measuring itself: the official order of work gives our result, counts are right where a
reader can check them, claims hold."""

from functools import partial

import pytest
import torch
from test_motus import TINY
from test_sample import views, write_checkpoint
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import attention
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from motus import Motus, preset
from sample import Policy
from scale.fast import quantise
from scripts import bench


class Evaluation(nn.Module):
    """One evaluation of the network as a module whose arguments are tensors alone, for what exports
    modules; and `example` arguments."""

    def __init__(self, model: Motus, inputs):
        super().__init__()
        t = torch.full((len(inputs),), 0.5)
        grid = (model.config.latent_frames, *inputs.latents.shape[3:])
        noise = (
            torch.randn(len(inputs), model.config.video.latent, *grid),
            torch.randn(len(inputs), model.config.chunk, model.config.action_dim),
        )
        conditioning = model.conditioning(inputs, cache=True)
        leaves, self.structure = tree_flatten((*noise, model.embed_times(t, t), conditioning))
        self.model = model
        self.example = tuple(x for x in leaves if x is not None)
        self.given = [x is not None for x in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(tensors)
        leaves = [next(rest) if given else None for given in self.given]
        return self.model(*tree_unflatten(leaves, self.structure))


# -- both sides of a ratio ------------------------------------------------------------------------


def test_the_official_order_of_work_gives_our_sample():
    """Same weights, same noise, one result; the VLM looks once and then at every step, the video is
    decoded."""
    torch.manual_seed(0)
    calls = []
    inputs = bench.drawn(TINY, 2, (4, 4), 5, 7)
    chunk = bench.chunk_of(Motus(TINY).eval(), inputs)
    chunk = chunk._replace(
        look=lambda: calls.append("vlm") or inputs.und,
        decode=lambda video: calls.append("decode"),
    )
    found, expected = chunk.sample_officially(3), chunk.sample(3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, chunk.sample(1), atol=1e-3)
    assert calls == 4 * ["vlm"] + ["decode"]


def test_two_ways_that_differ_are_not_timed():
    """Beyond 1e-4 a ratio would compare different work."""
    assert bench.agree(torch.zeros(2), torch.full((2,), 5e-5)) == "5e-05"
    with pytest.raises(ValueError, match="differ by 0.0002"):
        bench.agree(torch.zeros(2), torch.full((2,), 2e-4))


def test_ratios_have_a_row_for_sampler_and_action_first():
    """At sizes of seconds: every row names both sides and ends with how far they differ."""
    torch.manual_seed(0)
    chunk = bench.chunk_of(Motus(TINY).eval(), bench.drawn(TINY, 1, (4, 4), 5, 7))
    rows = bench.sampler_ratios("tiny", chunk, 2, 1, False)
    assert [row[1] for row in rows] == ["official order of work", "our joint sample"]
    assert all(len(row) == 6 and row[4] > 0 for row in rows)


# -- counts ---------------------------------------------------------------------------------------


def test_flops_are_what_a_reader_can_count():
    """(2, 3) times (3, 4) is 2 * 2 * 3 * 4; an addition has none here."""
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    assert bench.flops_of(lambda: a @ b + 1) == 48


@pytest.mark.slow
def test_steps_cost_the_same_and_action_first_spares_the_other_experts():
    """Each further step adds as much as the one before; action-first costs as much as ours where
    all its steps are joint, and less where not."""
    two, three, four = (bench.chunk_flops(TINY, steps) for steps in (2, 3, 4))
    for name in ("official order of work", "ours, joint"):
        assert four[name] - three[name] == three[name] - two[name] > 0
    assert two["ours, action-first, 2 of 2 joint"] == two["ours, joint"]
    assert four["ours, action-first, 1 of 4 joint"] < four["ours, action-first, 2 of 4 joint"]
    assert four["ours, joint"] < four["official order of work"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "stage3", "3")


def test_an_action_costs_one_look_and_no_decoding(run, monkeypatch):
    """Calls counted by hooks: VLM 1, text encoder 1 and 0 when the instruction comes again, video
    decoder 0."""
    policy, calls = Policy.load(run, steps=3), {"vlm": 0, "text": 0, "decode": 0}

    def count(*_, name: str) -> None:
        calls[name] += 1

    for name in ("vlm", "text"):
        getattr(policy.backbones, name).register_forward_hook(partial(count, name=name))
    monkeypatch.setattr(policy.backbones.vae, "decode", partial(count, name="decode"))
    for repeated in (False, True):
        calls.update(vlm=0, text=0)
        policy.act(*views(1))
        assert calls == {"vlm": 1, "text": 0 if repeated else 1, "decode": 0}


# -- on a GPU, without one ------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_measuring_one_is_refused_in_one_sentence():
    """No traceback, no half-written table."""
    with pytest.raises(ValueError, match="--gpu measures on a CUDA device"):
        bench.main(["--gpu"])


@pytest.mark.parametrize("name", ["joint_attention", "norm_rotate", "norm_modulate", "add_gated"])
def test_each_kernel_is_measured_on_arguments_it_can_take(name, monkeypatch):
    """The case of a kernel runs as PyTorch and through the Triton interpreter, to one result: the
    arguments are those of its function, head size and all."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled, not interpreted: test_kernels.py runs them")
    monkeypatch.setattr(bench, "SIDE", (6, 6))
    monkeypatch.setattr(bench, "UND", 20)
    arguments = bench.kernel_cases(preset("sim"), "cpu")[name]
    results = []
    for how in ("triton", "sdpa"):
        with bench.implementation(how):
            out = getattr(attention, name)(*arguments)
        results.append([out] if isinstance(out, Tensor) else list(out))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=0.02, rtol=0.02)


def test_a_gpu_is_measured_case_by_case(monkeypatch):
    """Every row of both tables, each of its ways run once with the implementation that it names; on
    a CPU that stands in for the GPU."""
    runs, chosen = [], bench.implementation

    def implementation(name: str):
        runs.append(name)
        return chosen("sdpa")

    def once(work) -> float:
        work()
        return 1.0

    monkeypatch.setattr(bench, "milliseconds", once)
    monkeypatch.setattr(bench, "implementation", implementation)
    monkeypatch.setattr(torch, "compile", lambda work, **_: work)
    monkeypatch.setattr(bench, "SIDE", (6, 6))
    said = bench.gpu(preset("sim"), 2, "cpu")
    names = list(bench.kernel_cases(preset("sim"), "cpu"))
    assert runs[-12:] == 4 * ["triton", "sdpa", "plain"]
    assert [line.split(" | ")[0].strip("| ") for line in said.splitlines()] == [
        "a chunk of 2 steps, batch 1, bf16",
        "---",
        "official order of work, without VLM and decoder",
        "ours, joint",
        "ours, 1 joint step",
        "ours, joint",
        "",
        "kernel, bf16",
        "---",
        *names,
    ]


def test_milliseconds_are_those_of_a_call():
    """A call of two milliseconds takes about that long."""
    import time

    assert 2 <= bench.milliseconds(partial(time.sleep, 0.002)) < 50


# -- at full size, or with the compiler -----------------------------------------------------------


@pytest.mark.slow
def test_a_chunk_at_full_size_costs_what_is_claimed():
    """Without values, VLM and VAE included: at most 35.6 TFLOP joint, at most 8 with one step joint
    and the others action-first, and more than 53 in the official order of work, most of it before
    the video is decoded. Two and three steps tell what ten cost."""
    vlm, (encode, decode) = bench.vlm_flops(), bench.vae_flops()
    two, three = (bench.chunk_flops(preset("full"), steps) for steps in (2, 3))
    name = "ours, action-first, 1 of {} joint"
    alone = three[name.format(3)] - two[name.format(2)]
    first = two[name.format(2)] + 8 * alone + vlm + encode
    official, joint = (
        two[name] + 8 * (three[name] - two[name])
        for name in ("official order of work", "ours, joint")
    )
    assert joint + vlm + encode <= 35.6e12 and first <= 8e12
    official += 11 * vlm + encode
    assert official > 50e12 and official + decode >= 53e12


def test_int8_halves_what_the_full_model_weighs():
    """On the meta device: 16.0 GB in bf16 with the VLM, 11.1 GB with int8 maps in the video expert;
    a card of 24 GB has room."""
    with torch.device("meta"):
        model = Motus(preset("full")).to(torch.bfloat16)
        vlm = Qwen3VL(Qwen3VLConfig()).to(torch.bfloat16)

        def weight() -> int:
            return sum(x.nbytes for part in (model, vlm) for x in part.state_dict().values())

        assert round(weight() / 1e9, 1) == 16.0
        quantise(model)
        assert round(weight() / 1e9, 1) == 11.1


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
        inputs = bench.drawn(model.config, 1, bench.SIDE, bench.TEXT, bench.UND)
        step = Evaluation(model, inputs)
        program = torch.export.export(step, step.example, strict=False)
    assert len(list(program.graph.nodes)) > 3000 and program.graph_signature.user_outputs


@pytest.mark.slow
@torch.no_grad()
def test_a_packaged_step_runs_without_python_and_equals_eager(tmp_path):
    """AOTInductor compiles the toy's step ahead of time; the package, loaded again, gives the same
    velocities."""
    torch.manual_seed(0)
    model = Motus(preset("toy")).eval()
    step = Evaluation(model, bench.drawn(model.config, 1, (6, 6), 8, 21))
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(step, step.example, strict=False),
        package_path=str(tmp_path / "step.pt2"),
    )
    found, expected = torch._inductor.aoti_load_package(package)(*step.example), step(*step.example)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
