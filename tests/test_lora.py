"""Adapters: they begin as the network they adapt, train nothing else of the video expert, and what
they leave behind is a checkpoint like any other."""

import copy
import json
from pathlib import Path

import pytest
import test_scale
import torch
from safetensors.torch import load_file

import train
from motus import EXPERTS, Motus
from scale import lora, sharding
from scale.plan import GB, Plan
from weights.card import newest_step
from weights.convert import export

TINY = test_scale.TINY
WIDTH = TINY.video.width
FILES = ("model", "ema", "optimizer", "lora")
pytestmark = pytest.mark.xdist_group("lora")  # one process makes its runs


@pytest.fixture
def network():
    """A network in which every tensor counts, and a batch."""
    torch.manual_seed(0)
    model = Motus(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model, *test_scale.example(TINY, 2)


def adapted(model: Motus, precision: str = "fp32", rank: int = 4, **options):
    """The training loss of the network with adapters."""
    loss = sharding.parallelize(model, EXPERTS, precision=precision, **options)
    lora.freeze(model, precision)
    lora.adapt(model, rank, seed=0)
    return loss


# -- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_is_that_of_the_base_to_the_bit(network, precision):
    """B is zero, and a matrix in bf16 is what autocast would make of it."""
    model, inputs, noise = network
    plain = sharding.parallelize(copy.deepcopy(model), EXPERTS, precision=precision)
    ours = adapted(model, precision)
    for theirs, here in zip(plain(inputs, noise)[:2], ours(inputs, noise)[:2]):
        assert torch.equal(theirs, here) and theirs.std() > 0


def test_the_merged_network_is_the_adapted_one(network):
    """Loaded by who knows nothing of adapters: the same losses, and other ones than the base."""
    model, inputs, noise = network
    base = model.loss(inputs, **noise)
    loss = adapted(model)
    for name, p in model.named_parameters():
        if name.endswith("lora"):
            torch.nn.init.normal_(p, std=0.2)
    ema = {name: 2 * p.detach() for name, p in model.named_parameters() if p.requires_grad}
    network, average, apart = lora.split(model, ema)
    merged, mean = Motus(TINY), Motus(TINY)
    for other, tensors in ((merged, network), (mean, average)):
        made = {name: x() if callable(x) else x for name, x in tensors.items()}
        other.load_state_dict(made)
    for ours, theirs, before in zip(loss(inputs, noise)[:2], merged.loss(inputs, **noise), base):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, before, rtol=1e-3, atol=1e-3)
    # By hand: factors (rank, in + out) twice as large have a product four times as large.
    name = "video.blocks.1.ffn.0"
    a, b = apart[f"{name}.lora"][:, :WIDTH], apart[f"{name}.lora"][:, WIDTH:]
    weight = merged.get_parameter(f"{name}.weight")
    torch.testing.assert_close(weight, apart[f"{name}.weight"] + b.T @ a)
    torch.testing.assert_close(
        mean.get_parameter(f"{name}.weight"), apart[f"{name}.weight"] + 4 * b.T @ a
    )
    assert torch.equal(mean.get_parameter("video.head.head.bias"), model.video.head.head.bias)


def test_factors_and_the_small_experts_train_and_nothing_else(network):
    """Every other number of the video expert stays; the optimizer holds two moments of what
    trains."""
    model, inputs, noise = network
    loss = adapted(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizers = train.make_optimizers(model, train.Settings(lr=0.01, video_lr=0.02), EXPERTS)
    for _ in range(2):
        loss(inputs, noise).total().backward()
        for optimizer in optimizers:
            optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    factors = {f"{name}.lora" for name in lora.maps(model)}
    assert len(factors) == 2 * 10
    assert {name for name in changed if name.startswith("video.")} == factors
    assert {name.split(".")[0] for name in changed} == set(EXPERTS)
    trained = [p for p in model.parameters() if p.requires_grad]
    small = sum(p.numel() for expert in (model.action, model.und) for p in expert.parameters())
    factors = 2 * 4 * (8 * 2 * WIDTH + 2 * (WIDTH + TINY.video.ffn))  # layers, rank, in + out
    numbers = small + factors
    assert sum(p.numel() for p in trained) == numbers
    state = [x for optimizer in optimizers for s in optimizer.state.values() for x in s.values()]
    reached = sum(p.numel() for p in trained if p.grad is not None)
    assert sum(x.numel() for x in state if x.dim()) == 2 * reached > 1.6 * numbers
    rates = {id(p): g["base"] for g in optimizers[0].param_groups for p in g["params"]}
    assert {rates[id(p)] for p in model.video.parameters() if p.requires_grad} == {0.02}


def test_muon_leaves_the_factors_to_adamw(network):
    model, _, _ = network
    adapted(model)
    adamw, muon = train.make_optimizers(model, train.Settings(optimizer="muon"), EXPERTS)
    factors = {id(p) for name, p in model.named_parameters() if name.endswith("lora")}
    assert factors <= {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not factors & {id(p) for group in muon.param_groups for p in group["params"]}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["selective", "full", "compile"])
def test_adapters_are_computed_again_and_compiled_like_all_else(network, way, monkeypatch):
    """The same gradients; no graph break."""
    model, inputs, noise = network
    other = copy.deepcopy(model)
    options = {"compiled": True} if way == "compile" else {"checkpointing": way}
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: eager(f, backend="eager", **how))
    losses = adapted(model), adapted(other, **options)
    for loss in losses:
        loss(inputs, noise).total().backward()
    for p, q in zip(model.parameters(), other.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Stage 3 from two steps of stage 2: all of the video expert, adapters, and adapters in two
    runs, the second of which goes on."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *argv: str, stage: str = "3") -> None:
        head = ["--stage", stage, "--data", "synthetic", "--out", str(folder / name)]
        train.main([*head, *argv])

    quick = ["batch=4", "log_every=1", "windows=8", "horizon=4"]
    run("stage2", "--set", *quick, "steps=2", stage="2")
    init = ["--init", str(folder / "stage2")]
    run("plain", *init, "--set", *quick, "steps=1")
    run("whole", *init, "--set", *quick, "steps=4", "lora=4")
    run("parts", *init, "--set", *quick, "steps=2", "lora=4")
    run("parts", "--resume", "--set", *quick, "steps=4", "lora=4")
    return folder


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(newest_step(run) / f"{file}.safetensors")


def test_a_run_that_was_resumed_is_one_that_was_not(runs):
    """Every file, byte for byte, without --init the second time."""
    for file in FILES:
        whole, parts = (newest_step(runs / name) for name in ("whole", "parts"))
        name = f"{file}.safetensors"
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_checkpoint_has_the_keys_shapes_and_dtypes_of_full_training(runs, tmp_path):
    """Ours, both files, and the official folder that is made of it; what was not to train is that
    of stage 2, and the matrices are W + B A."""
    for file in ("model", "ema"):
        plain, ours = (tensors(runs / name, file) for name in ("plain", "whole"))
        shapes = [{k: (x.shape, x.dtype) for k, x in t.items()} for t in (plain, ours)]
        assert shapes[0] == shapes[1]
        model, card = Motus.from_pretrained(runs / "whole", weights=file)
        assert model.state_dict().keys() == ours.keys() and card.step == 4
    before, apart = tensors(runs / "stage2", "ema"), tensors(runs / "whole", "lora")
    ours = tensors(runs / "whole", "model")
    moved = 0
    for name, x in ours.items():
        factors = apart.get(name.replace(".weight", ".lora"))
        if factors is not None:
            assert torch.equal(apart[name], before[name])
            a, b = factors[:, : x.shape[1]], factors[:, x.shape[1] :]
            torch.testing.assert_close(x, before[name] + b.T @ a)
            moved += not torch.equal(x, before[name])
        elif name.startswith("video."):
            assert torch.equal(x, before[name]), name
    assert moved == 10 * 4
    official = []
    for name in ("plain", "whole"):
        export(newest_step(runs / name) / "ema.safetensors", tmp_path / name)
        file = tmp_path / name / "mp_rank_00_model_states.pt"
        module = torch.load(file, weights_only=True)["module"]
        official.append({k: (x.shape, x.dtype) for k, x in module.items()})
    assert official[0] == official[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--set", "lora=4"], "lora=4 adapts trained weights; name them with --init"),
        (["--init", "INIT", "--set", "lora=4", "shards=2"], "with lora every rank holds all"),
        (["--init", "INIT", "--set", "lora=-1"], "lora is -1; expected a whole number in"),
        (["--resume", "--set", "lora=8"], "trained with lora=4, this run has lora=8"),
    ],
)
def test_what_cannot_be_adapted_is_refused(runs, tmp_path, argv, said):
    """In one line, by name."""
    argv = [str(runs / "stage2") if word == "INIT" else word for word in argv]
    out = runs / "parts" if "--resume" in argv else tmp_path / "run"
    extra = ["batch=4", "windows=8", "horizon=4", "steps=4"]
    with pytest.raises(ValueError, match=said) as error:
        train.main(["--stage", "3", "--data", "synthetic", "--out", str(out), *argv, *extra])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_ranks_adapt_like_one_process(tmp_path):
    """Replicas over gloo: losses as far apart as sums in another order are, one checkpoint."""
    jobs = [test_scale.job(tmp_path, tmp_path / "stage1", "1", 1, 2)]
    init = ["--init", str(tmp_path / "stage1")]
    for name, world in (("one", 1), ("two", 2)):
        jobs.append(test_scale.job(tmp_path, tmp_path / name, "1", world, 4, "lora=4", flags=init))
    ends = test_scale.together(tmp_path, jobs)
    assert all(end.startswith("next") for rank in ends for end in rank), json.dumps(ends)
    assert test_scale.apart(tmp_path / "one", tmp_path / "two") < 1e-6
    one, two = (tensors(tmp_path / name, "model") for name in ("one", "two"))
    for name, x in one.items():
        torch.testing.assert_close(x, two[name], rtol=1e-4, atol=1e-5)


# -- what it needs --------------------------------------------------------------------------------


def test_adapters_of_the_full_model_are_as_large_as_counted_by_hand():
    """Rank 16: 30 blocks of eight maps 3072 to 3072 and two of the FFN; matrices in bf16; no
    gradient, moment or average of what is not trained."""
    plan = Plan("full", "3", 1, 80 * GB, lora=16)
    factors = 30 * 16 * (8 * 2 * 3072 + 2 * (3072 + 14336))
    matrices = 30 * (8 * 3072**2 + 2 * 3072 * 14336)
    trained = 641_527_822 + 253_493_760 + factors
    rest = 4_999_787_712 - matrices
    sizes = plan.resident
    assert sizes["gradients"] == 4 * trained and sizes["optimizer"] == 8 * trained
    assert sizes["ema"] == 4 * trained and sizes["weights"] == 2 * matrices + 4 * (trained + rest)
