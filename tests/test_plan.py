"""The plan: what it says of memory and FLOPs is what a traced training step needs, and what does
not fit is refused with a remedy."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import motus
import train
from scale import plan, sharding
from scale.plan import GB, POLICIES, SAMPLES, STAGES, Plan

# One policy by default; the others take as long again.
QUICK = [
    pytest.param(name, marks=[] if name == "selective" else pytest.mark.long)
    for name in ("none", "full", "selective")
]


class Alive(TorchDispatchMode):
    """The slow, obvious meter: after every operation, the sum over all storages that are alive, at
    the size they have now."""

    def __init__(self, existing):
        super().__init__()
        self.before, self.storages, self.peak = (
            {id(x.untyped_storage()) for x in existing},
            WeakIdKeyDictionary(),
            0,
        )

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace != "prim":
            for tensor in tree_leaves(out):
                if (
                    isinstance(tensor, torch.Tensor)
                    and id(tensor.untyped_storage()) not in self.before
                ):
                    self.storages[tensor.untyped_storage()] = True
            self.peak = max(
                self.peak, sum(storage.nbytes() for storage in list(self.storages.keys()))
            )
        return out


@pytest.fixture
def ranks():
    """A mesh of as many ranks as asked for, of which only this one exists: collectives have shapes
    and no effect."""

    def mesh(world: int):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        return init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))

    yield mesh
    dist.destroy_process_group()


def traced(name: str, mesh, micro: int, checkpointing: str) -> float:
    """Bytes of one rank at the worst moment of a training step under FSDP2, with what AdamW and the
    EMA hold."""
    stage = STAGES["3"]
    with plan.fake_model(motus.preset(name), "fp32") as model:
        inputs, noise = plan.fake_inputs(model.config, SAMPLES[name], micro, acting=True)
        step = sharding.parallelize(
            model, stage.experts, mesh, checkpointing=checkpointing, precision="bf16"
        )
        shards = [p.to_local() for p in step.parameters()]
        existing = [x for x in (*shards, *vars(inputs).values(), *noise.values()) if x is not None]
        with Alive(existing) as alive:
            step(inputs, noise).total().backward()
    return 4 * sum(shard.nbytes for shard in shards) + alive.peak


def deep(monkeypatch, name: str, layers: int) -> str:
    """A preset with another number of layers, under a name of its own."""
    config = motus.PRESETS[name]
    monkeypatch.setitem(
        motus.PRESETS,
        f"{name} {layers}",
        replace(config, video=replace(config.video, layers=layers)),
    )
    monkeypatch.setitem(SAMPLES, f"{name} {layers}", SAMPLES[name])
    return f"{name} {layers}"


def test_stages_are_those_that_train():
    """The plan's table of stages and that of train.py agree on what is trained and on the form of
    the network."""
    for key, stage in train.STAGES.items():
        assert (
            STAGES[key].experts == stage.experts and STAGES[key].form["finetune"] == stage.finetune
        )


@pytest.mark.parametrize("checkpointing", QUICK)
def test_four_small_steps_give_any_size(monkeypatch, checkpointing):
    """Saved bytes and FLOPs of 6 layers and 7 samples follow exactly from 4 and 5 layers, 2 and 64
    samples; the worst moment nearly."""
    config, stage = motus.preset(deep(monkeypatch, "toy", 6)), STAGES["3"]
    direct = plan.measure(config, stage, SAMPLES["toy"], 7, checkpointing)
    curve = plan.curve("toy", "3", checkpointing, "fp32").at(6, 7)
    assert curve.saved == pytest.approx(direct.saved, rel=1e-9) and curve.flops == pytest.approx(
        direct.flops, rel=1e-9
    )
    assert direct.peak <= curve.peak * (1 + 1e-9) and curve.peak <= 1.05 * direct.peak


def test_flops_are_those_of_torch():
    """The meter counts what torch's own FLOP counter counts."""
    config, stage = motus.preset("toy"), STAGES["3"]
    with plan.fake_model(config, "fp32") as model:
        inputs, noise = plan.fake_inputs(config, SAMPLES["toy"], 2, acting=True)
        with FlopCounterMode(display=False, custom_mapping=plan.ATTENTION_FLOPS) as counter:
            sharding.parallelize(model, stage.experts, precision="bf16")(
                inputs, noise
            ).total().backward()
    assert (
        counter.get_total_flops()
        == plan.measure(config, stage, SAMPLES["toy"], 2, "none").flops
        > 0
    )


@pytest.mark.parametrize("checkpointing", QUICK)
def test_a_small_step_on_two_ranks_needs_what_is_planned(ranks, checkpointing):
    """Within 5 % of the traced step of the toy under FSDP2, at its batch of 32."""
    planned, found = (
        Plan("toy", "3", 2, GB, batch=64).peak(checkpointing, 32),
        traced("toy", ranks(2), 32, checkpointing),
    )
    print(
        f"\ntoy, 2 ranks, {checkpointing}, micro-batch 32: traced {found / GB:.4f} GB, planned {planned / GB:.4f}, {planned / found:.3f}"
    )
    assert planned == pytest.approx(found, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize(("checkpointing", "micro"), [("none", 4), ("selective", 8), ("full", 8)])
def test_the_step_of_preset_small_needs_what_is_planned(ranks, checkpointing, micro):
    """Within 5 % of the traced step of all eighteen layers under FSDP2 on two ranks."""
    planned = Plan("small", "3", 2, 24 * GB, batch=2 * micro).peak(checkpointing, micro)
    found = traced("small", ranks(2), micro, checkpointing)
    print(
        f"\nsmall, 2 ranks, {checkpointing}, {micro}: traced {found / GB:.3f} GB, planned {planned / GB:.3f}, {planned / found:.3f}"
    )
    assert planned == pytest.approx(found, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize(("checkpointing", "micro"), [("none", 8), ("selective", 32), ("full", 32)])
def test_the_full_step_on_eight_ranks_needs_what_is_planned(
    monkeypatch, ranks, checkpointing, micro
):
    """Within 5 %: layers of full width are traced at two depths under FSDP2 on eight ranks, and
    continued to thirty."""
    mesh = ranks(8)
    four, five = (
        traced(deep(monkeypatch, "full", layers), mesh, micro, checkpointing) for layers in (4, 5)
    )
    planned, found = (
        Plan("full", "3", 8, 80 * GB, batch=8 * micro).peak(checkpointing, micro),
        five + 25 * (five - four),
    )
    print(
        f"\nfull, 8 ranks, {checkpointing}, {micro}: traced {found / GB:.2f} GB, planned {planned / GB:.2f}, {planned / found:.3f}"
    )
    assert planned == pytest.approx(found, rel=0.05)


def test_parameters_of_the_full_model_are_those_of_the_paper():
    """5.00B, 641.5M and 253.5M, and an eighth of them on each of eight ranks."""
    full = Plan("full", "3", 8, 80 * GB)
    assert [sum(p.numel() for p in getattr(full.model, e).parameters()) for e in plan.ALL] == [
        4_999_787_712,
        641_527_822,
        253_493_760,
    ]
    assert full.share(plan.ALL) == pytest.approx(5_894_809_294 / 8, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "huge"], "preset is 'huge'; allowed: toy, sim, small, full"),
        (["--gpus", "0"], "--gpus is 0; a batch of 256 divides among 1, 2, 4"),
        (["--gpus", "6"], "--gpus is 6; a batch of 256 divides among 1, 2, 4"),
        (["--memory", "0"], "--memory is 0"),
        (["--mfu", "40"], "--mfu is 40"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, said):
    """Each error names the option, what was found and what is allowed, before anything is measured."""
    with pytest.raises(ValueError, match=re.escape(said)):
        train.main(["--plan", *arguments])


@pytest.fixture(params=QUICK[-1:] + [pytest.param("all", marks=pytest.mark.long)])
def policies(request, monkeypatch):
    """All policies are measured in slow tests only; the plan reads the same with one of them."""
    names = POLICIES if request.param == "all" else (request.param,)
    monkeypatch.setattr(plan, "POLICIES", names)
    return names


def test_too_little_memory_is_refused_with_what_would_fit(policies):
    """One line; what it proposes does fit."""
    with pytest.raises(ValueError, match="toy, stage 3, needs") as error:
        train.main(["--plan", "--preset", "toy", "--gpus", "1", "--memory", "0.01"])
    assert "\n" not in str(error.value)
    memory = int(re.search(r"--memory (\d+)", str(error.value))[1])
    assert Plan("toy", "3", 1, memory * GB).best in policies


def test_the_report_says_all_that_it_promises(policies, capsys):
    """Parameters, bytes, policies with micro-batch and samples/s, stages with GPU-hours; weights
    are halved on twice the ranks."""
    train.main(["--plan", "--preset", "toy", "--gpus", "2", "--memory", "1"])
    said = capsys.readouterr().out
    video = sum(p.numel() for p in plan.meta_model("toy", "3").video.parameters())
    for words in (
        f"{video:,}  trained",
        "weights",
        "gradients",
        "optimizer",
        "ema",
        *policies,
        "samples/s",
        "paper's GPU-hours",
        "10,000",
    ):
        assert words in said
    one, two = Plan("toy", "3", 1, GB), Plan("toy", "3", 2, GB)
    assert math.isclose(one.share(plan.ALL) / 2, two.share(plan.ALL), rel_tol=0.01)
    if len(policies) > 1:
        assert one.flops("none") == one.flops("selective") < one.flops("full")
