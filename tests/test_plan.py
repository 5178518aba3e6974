"""The plan: what it says of memory and FLOPs is what a traced training step needs, docs/plan.md
says what it says, and what does not fit is refused with a remedy."""

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.weak import WeakIdKeyDictionary

import motus
import train
from scale import lora, plan, sharding
from scale.batches import draw_noise
from scale.plan import GB, KEPT, Plan
from scale.ranks import Ranks

aten = torch.ops.aten
ATTENTION = {  # on a CPU; torch has the formulas of the other operations
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}
DOCS = Path(__file__).parents[1] / "docs" / "plan.md"
# One policy by default; the others take as long again.
QUICK = [pytest.param(name, marks=[] if name == "selective" else pytest.mark.long) for name in KEPT]


class Alive(TorchDispatchMode):
    """The slow, obvious meter: after every operation, the sum over all storages that are alive, at
    the size they have now."""

    def __init__(self, existing):
        super().__init__()
        self.before = {id(x.untyped_storage()) for x in existing}
        self.storages = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace != "prim":
            for tensor in tensors_of(out):
                if id(tensor.untyped_storage()) not in self.before:
                    self.storages[tensor.untyped_storage()] = True
            alive = sum(storage.nbytes() for storage in list(self.storages.keys()))
            self.peak = max(self.peak, alive)
        return out


class Products(TorchDispatchMode):
    """Adds up the bytes of all that selective checkpointing keeps."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if sharding.keep_expensive(None, op) is CheckpointPolicy.MUST_SAVE:
            self.bytes += sum(x.nbytes for x in tensors_of(out))
        return out


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def inputs_of(name: str, stage: str, batch: int) -> motus.Inputs:
    """A batch of the plan's sample, with masks, as training has it."""
    inputs = plan.example(name, stage).map(lambda x: x.expand(batch, *x.shape[1:]).contiguous())
    inputs.context = inputs.context.bfloat16()
    if inputs.und is not None:
        inputs.und = inputs.und.bfloat16()
        inputs.und_mask = torch.ones(inputs.und.shape[:2], dtype=torch.bool)
        inputs.action_mask = torch.ones(inputs.actions.shape, dtype=torch.bool)
    return inputs


def step_of(config, inputs, fake, experts=motus.EXPERTS, **options):
    """The training loss of a network without values, and its arguments."""
    model = motus.Motus(config)
    inputs = inputs.map(fake.from_tensor)
    noise = draw_noise(inputs, torch.Generator())
    step = sharding.parallelize(model, experts, precision="bf16", **options)
    return model, step, inputs, noise


def shallow(name: str, stage: str, layers: int) -> motus.MotusConfig:
    config = motus.preset(name, stage)
    return replace(config, video=replace(config.video, layers=layers))


# -- activations ----------------------------------------------------------------------------------


def left_behind(name: str, stage: str, layers: int, batch: int) -> tuple[int, int]:
    """Bytes that autograd saves in a forward pass, weights and inputs apart, and what of it
    selective checkpointing would keep."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    config, inputs = shallow(name, stage, layers), inputs_of(name, stage, batch)
    experts = motus.STAGES[stage].experts
    with FakeTensorMode() as fake, saved_tensors_hooks(pack, lambda x: x):
        model, step, inputs, noise = step_of(config, inputs, fake, experts)
        with Products() as products:
            graph = step(inputs, noise).total()
    for x in tensors_of([list(model.parameters()), vars(inputs), noise]):
        saved.pop(x.untyped_storage()._cdata, None)
    del graph
    return sum(saved.values()), products.bytes


@pytest.mark.parametrize(("name", "stage"), [("toy", "3"), ("small", "3"), ("full", "1")])
def test_a_layer_keeps_the_same_bytes_per_number_in_every_preset(name, stage):
    """KEPT, against two layers less one layer, of three samples less two: within 3 %."""
    found = {
        (layers, batch): left_behind(name, stage, layers, batch)
        for layers in (1, 2)
        for batch in (2, 3)
    }
    _, outputs, _ = Plan(name, stage, 1, GB).numbers
    for i, policy in enumerate(("none", "selective")):
        two = found[2, 3][i] - found[2, 2][i]
        one = found[1, 3][i] - found[1, 2][i]
        assert (two - one) / outputs == pytest.approx(KEPT[policy], rel=0.03)


@pytest.mark.parametrize("policy", KEPT)
def test_flops_of_a_step_are_those_that_torch_counts(policy):
    """Forward and backward pass under each policy, with what is computed again: within 5 %, for the
    backward pass computes no gradient of the data."""
    config, inputs = motus.preset("toy"), inputs_of("toy", "3", 1)
    with FakeTensorMode() as fake:
        _, step, inputs, noise = step_of(config, inputs, fake, checkpointing=policy)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            step(inputs, noise).total().backward()
    planned = Plan("toy", "3", 1, GB).flops(policy)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


# -- the worst moment of a step -------------------------------------------------------------------


@pytest.fixture
def ranks():
    """A mesh of as many ranks as asked for, of which only this one exists: collectives have shapes
    and no effect."""

    def mesh(world: int):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        return init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))

    yield mesh
    dist.destroy_process_group()


def traced(name: str, mesh, micro: int, checkpointing: str, layers: int | None = None) -> float:
    """Bytes of one rank at the worst moment of a training step under FSDP2, with what AdamW and the
    EMA hold."""
    config = motus.preset(name) if layers is None else shallow(name, "3", layers)
    inputs = inputs_of(name, "3", micro)
    options = {"mesh": mesh, "checkpointing": checkpointing}
    with FakeTensorMode() as fake:
        _, step, inputs, noise = step_of(config, inputs, fake, **options)
        shards = [p.to_local() for p in step.parameters()]
        with Alive([*shards, *tensors_of([vars(inputs), noise])]) as alive:
            step(inputs, noise).total().backward()
    return 4 * sum(shard.nbytes for shard in shards) + alive.peak


def compare(planned: float, found: float, what: str) -> None:
    print(
        f"\n{what}: traced {found / GB:.4g} GB, planned {planned / GB:.4g}, {planned / found:.3f}"
    )
    assert planned == pytest.approx(found, rel=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("policy", QUICK)
def test_a_small_step_on_two_ranks_needs_what_is_planned(ranks, policy):
    """Within 7 % of the traced step of the toy under FSDP2, at its batch of 32."""
    planned = Plan("toy", "3", 2, GB, batch=64).peak(policy, 32)
    compare(planned, traced("toy", ranks(2), 32, policy), f"toy, 2 ranks, {policy}, 32")


@pytest.mark.long
@pytest.mark.parametrize(("policy", "micro"), [("none", 4), ("selective", 8), ("full", 8)])
def test_the_step_of_preset_small_needs_what_is_planned(ranks, policy, micro):
    """Within 7 % of the traced step of all eighteen layers under FSDP2 on two ranks."""
    planned = Plan("small", "3", 2, 24 * GB, batch=2 * micro).peak(policy, micro)
    compare(planned, traced("small", ranks(2), micro, policy), f"small, 2 ranks, {policy}, {micro}")


@pytest.mark.long
@pytest.mark.parametrize(("policy", "micro"), [("none", 8), ("selective", 32), ("full", 32)])
def test_the_full_step_on_eight_ranks_needs_what_is_planned(ranks, policy, micro):
    """Within 7 %: layers of full width are traced at two depths under FSDP2 on eight ranks, and
    continued to thirty."""
    mesh = ranks(8)
    four, five = (traced("full", mesh, micro, policy, layers) for layers in (4, 5))
    planned = Plan("full", "3", 8, 80 * GB, batch=8 * micro).peak(policy, micro)
    compare(planned, five + 25 * (five - four), f"full, 8 ranks, {policy}, {micro}")


def adapted(name: str, micro: int, checkpointing: str, layers: int | None = None) -> float:
    """The same on one card with adapters of rank 16."""
    config = motus.preset(name) if layers is None else shallow(name, "3", layers)
    inputs = inputs_of(name, "3", micro)
    with FakeTensorMode() as fake:
        model, step, inputs, noise = step_of(config, inputs, fake, checkpointing=checkpointing)
        lora.freeze(model, "bf16")
        lora.adapt(model, 16, seed=0)
        weights = [*model.parameters(), *model.buffers()]
        trained = [p for p in model.parameters() if p.requires_grad]
        with Alive([*weights, *tensors_of([vars(inputs), noise])]) as alive:
            step(inputs, noise).total().backward()
    return sum(p.nbytes for p in weights) + 3 * sum(p.nbytes for p in trained) + alive.peak


@pytest.mark.slow
@pytest.mark.parametrize("policy", QUICK)
def test_a_small_step_with_adapters_needs_no_more_than_is_planned(policy):
    """What norms and modulation of a frozen expert need not keep is not taken off the plan."""
    planned = Plan("toy", "3", 1, GB, batch=32, lora=16).peak(policy, 32)
    found = adapted("toy", 32, policy)
    print(f"\ntoy, adapters, {policy}: traced {found / GB:.4g} GB, planned {planned / GB:.4g}")
    assert 0.97 < planned / found < 1.3


@pytest.mark.long
@pytest.mark.parametrize(("policy", "micro"), [("full", 2), ("selective", 8)])
def test_the_full_step_with_adapters_needs_what_is_planned(policy, micro):
    """Within 7 %: two depths, continued to thirty layers."""
    four, five = (adapted("full", micro, policy, layers) for layers in (4, 5))
    planned = Plan("full", "3", 1, 80 * GB, batch=micro, lora=16).peak(policy, micro)
    compare(planned, five + 25 * (five - four), f"full, adapters, {policy}, {micro}")


def test_parameters_of_the_full_model_are_those_of_the_paper():
    """5.00B, 641.5M and 253.5M, and an eighth of them on each of eight ranks."""
    full = Plan("full", "3", 8, 80 * GB)
    experts = [getattr(full.model, expert) for expert in motus.EXPERTS]
    counts = [plan.parameters(expert) for expert in experts]
    assert counts == [4_999_787_712, 641_527_822, 253_493_760]
    assert full.share(full.model.parameters()) == pytest.approx(5_894_809_294 / 8, rel=1e-4)


# -- what train.py takes of it --------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch):
    """Settings and mesh of stage 3 on ranks of which eight are a node, with cards, or with memory
    of the machine, that are said to be so many GB."""

    def ask(world: int, *changes: str, preset="full", device="cuda", memory=80.0):
        card = SimpleNamespace(total_memory=memory * GB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        pages = {"SC_PHYS_PAGES": memory * GB, "SC_PAGE_SIZE": 1}
        monkeypatch.setattr(plan.os, "sysconf", pages.__getitem__)
        mesh = {"shard": SimpleNamespace(size=lambda: min(world, 8))} if world > 1 else None
        args = argparse.Namespace(preset=preset, stage="3", cache="x", data=None)
        ranks = Ranks(0, world, torch.device(device), mesh)
        return plan.settled(args, train.settings_for(preset, "3", changes), ranks)

    return ask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "memory", "changes", "expected"),
    [
        (8, 80, [], ("selective", 32)),
        (64, 80, [], ("none", 4)),
        (8, 40, [], ("selective", 8)),
        (8, 80, ["checkpointing=full", "micro=64"], ("full", 32)),
        (64, 80, ["checkpointing=full", "micro=8"], ("full", 4)),
        (8, 80, ["micro=4"], ("selective", 4)),
    ],
)
def test_full_takes_what_the_plan_finds_for_its_cards(settled, world, memory, changes, expected):
    """Micro-batch and policy; what is asked for by name stays, but for a micro-batch of more than a
    rank's share. What is taken fits, and half as much again would not be found."""
    settings, mesh = settled(world, *changes, memory=memory)
    assert (settings.checkpointing, settings.micro) == expected and mesh is not None
    planned = Plan("full", "3", 8, memory * GB, batch=256 * 8 // world)
    if not changes:
        assert expected == (planned.best, planned.micro(planned.best))
        assert planned.peak(*expected) <= planned.usable


@pytest.mark.slow
def test_full_is_refused_by_the_sentence_of_the_plan_where_it_cannot_fit(settled):
    """On one card, whatever is asked for by name; and on a CPU, whose memory is the machine's."""
    wanted = "full, stage 3, needs .* GB on each of 1 ranks"
    for changes in ([], ["checkpointing=full", "micro=1"]):
        with pytest.raises(ValueError, match=wanted):
            settled(1, *changes)
    with pytest.raises(ValueError, match=wanted):
        settled(1, device="cpu")


def test_small_models_are_whole_on_every_rank_unless_shards_are_asked_for(settled, capsys):
    """The toy; on a CPU nothing is planned, and no policy is nothing computed again."""
    assert settled(2, preset="toy")[1] is None
    assert settled(2, "shards=2", preset="toy")[1] is not None
    settings, _ = settled(2, "checkpointing=plan", preset="toy", device="cpu")
    assert (settings.checkpointing, settings.micro) == ("none", 0)
    with pytest.raises(ValueError, match="batch=9 does not divide"):
        settled(2, "batch=9", preset="toy")
    assert capsys.readouterr().err == ""
    settled(2, "checkpointing=selective", preset="toy")
    assert "selective without compile=1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 4, 8])
@pytest.mark.parametrize("reshard", [True, False])
def test_a_step_of_several_nodes_sends_what_is_counted_tensor_by_tensor(nodes, reshard):
    """The formula against a slow one: every parameter of every layer, for every pass; in a ring of
    n cards each sends (n - 1) / n of the whole, and a sum is a reduction and a gather."""
    planned = Plan("full", "3", 8, 80 * GB, reshard=reshard)
    found = planned.step(nodes, 0.4 * 989e12)
    share = 256 // nodes // 8
    part = Plan("full", "3", 8, 80 * GB, batch=256 // nodes, reshard=reshard)
    gather = reduce = network = passes = 0
    while passes * part.micro(part.best) < share:
        passes += 1
        for p in planned.model.parameters():
            for _ in range(2 if reshard else 1):
                gather += 2 * p.numel() * 7 / 8 / 350e9
            reduce += 4 * p.numel() * 7 / 8 / 350e9
    for p in planned.model.parameters():
        ours = 4 * p.numel() / 8
        network += (ours * (nodes - 1) / nodes + ours * (nodes - 1) / nodes) / 40e9
    slow = {"gather": gather, "reduce": reduce, "network": network}
    slow["arithmetic"] = sum(planned.flops(part.best) / (0.4 * 989e12) for _ in range(share))
    assert found == pytest.approx(slow, rel=1e-9)


# -- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "--preset small --plan --gpus 1 --memory 24 --peak 165", marks=pytest.mark.slow
        ),
        pytest.param("--full --plan --gpus 8 --memory 80", marks=pytest.mark.slow),
        pytest.param("--full --plan --gpus 8 --memory 141", marks=pytest.mark.slow),
    ],
)
def test_the_page_says_what_the_plan_says(command, capsys):
    """Every figure of the tables in docs/plan.md, to the letter."""
    train.main(command.split())
    said = f"    python train.py {command}\n\n```\n{capsys.readouterr().out}```\n"
    assert said in DOCS.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["--gpus", "0"], "--gpus is 0; expected a whole number in"),
        (["--gpus", "6"], "--gpus is 6; a batch of 256 divides among 1, 2, 4"),
        (["--memory", "0"], "--memory is 0"),
        (["--mfu", "40"], "--mfu is 40"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, said):
    """Each error names the option, what was found and what is allowed."""
    with pytest.raises(ValueError, match=re.escape(said)):
        train.main(["--plan", *arguments])


def test_too_little_memory_is_refused_with_what_would_fit():
    """One line; what it proposes does fit."""
    with pytest.raises(ValueError, match="toy, stage 3, needs") as error:
        train.main(["--plan", "--preset", "toy", "--gpus", "1", "--memory", "0.01"])
    assert "\n" not in str(error.value)
    memory = int(re.search(r"--memory (\d+)", str(error.value))[1])
    assert Plan("toy", "3", 1, memory * GB).best in KEPT
    with pytest.raises(ValueError, match="--gpus 8 or --params bf16 or --memory 35"):
        train.main(["--plan", "--full", "--gpus", "4", "--memory", "26"])
    with pytest.raises(ValueError, match="fit with --gpus 4 or --set lora=16 or --memory"):
        train.main(["--plan", "--full", "--gpus", "1", "--memory", "40"])
    adapters = Plan("full", "3", 1, 24 * GB, lora=16)
    assert re.search(
        r"on each of 1 ranks .* fit with --params bf16 or --memory 3\d$", adapters.refusal()
    )


def test_the_report_says_all_that_it_promises(capsys):
    """Parameters, bytes, policies with micro-batch and samples/s, stages with GPU-hours; weights
    are halved on twice the ranks."""
    train.main(["--plan", "--preset", "toy", "--gpus", "2", "--memory", "1"])
    said = capsys.readouterr().out
    one, two = Plan("toy", "3", 1, GB), Plan("toy", "3", 2, GB)
    for words in (
        f"{plan.parameters(one.model.video):,}  trained",
        "weights",
        "gradients",
        "optimizer",
        "ema",
        *KEPT,
        "samples/s",
        "paper's GPU-hours",
        "10,000",
    ):
        assert words in said
    assert math.isclose(
        one.share(one.model.parameters()) / 2, two.share(two.model.parameters()), rel_tol=0.01
    )
    assert one.flops("none") == one.flops("selective") < one.flops("full")
