"""Commands on a GPU that is not there (ghost.py). Each case runs some and prints, as its last line,
a JSON of what a test asserts.    python tests/ghost_cases.py NAME FOLDER"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import csv  # noqa: E402
from collections import Counter  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402

import ghost  # noqa: E402  before torch
import numpy as np  # noqa: E402
import small  # noqa: E402
import torch  # noqa: E402
from torch._subclasses import FakeTensor, FakeTensorMode  # noqa: E402

import data  # noqa: E402
import flow  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from motus import PRESETS, STAGES, Inputs, Motus, preset  # noqa: E402
from sample import Policy  # noqa: E402
from scale import sharding  # noqa: E402
from scale.fast import compile_sampler, quantise, sample_action_first  # noqa: E402
from scripts import bench, evaluate, latents, pretrain  # noqa: E402
from weights.files import open_source  # noqa: E402

DCAE = str(PRESETS["toy"].backbones / "dcae.safetensors")


@contextmanager
def events():
    """What happens inside, by line."""
    with ghost.GhostMode() as mode:
        yield mode


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((run / "log.csv").open())]


def trained(folder: Path, name: str, *arguments: str, settings: tuple = ()) -> dict:
    """Five steps of a stage: the host's waits in each step that no row is written in, and the
    losses."""
    run = folder / name
    waits, update = [], train.EMA.update

    def counted(self, model, step):
        update(self, model, step)
        waits.append(mode.waits())
        mode.events.clear()

    sizes = ["--set", *small.SETTINGS, "log_every=5", *settings]
    train.EMA.update = counted
    with events() as mode:
        try:
            train.main([*arguments, "--out", str(run), "--steps", "5", *sizes])
        finally:
            train.EMA.update = update
    return {"waits": [dict(step) for step in waits[1:]], "loss": losses(run)}


def training(folder: Path) -> dict:
    """Every stage, from the one before."""
    card = small.write_card(folder)
    data_of = ["--data", card]
    found = {"1": trained(folder, "s1", "--stage", "1", *data_of)}
    with events():
        latent = ["--stage", "latent", "--out", f"{folder}/latent", "--steps", "3", *data_of]
        train.main([*latent, "--set", "episodes=2"])
    two = ["--init", f"{folder}/s1", "--latent", f"{folder}/latent"]
    found["2"] = trained(folder, "s2", "--stage", "2", *two, *data_of)
    three = ["--stage", "3", "--init", f"{folder}/s2", *data_of]
    found["3"] = trained(folder, "s3", *three)
    return found


SETTINGS = {
    "bf16, micro, full": ("precision=bf16", "micro=2", "checkpointing=full"),
    "bf16 weights, selective": ("params=bf16", "checkpointing=selective", "given=0.5"),
    "adamw, workers": ("optimizer=adamw", "workers=1"),
    "decoded when needed": ("windows=0",),
}


def settings(folder: Path) -> dict:
    """Stage 3 with each group of settings; and what was saved goes on."""
    three = ["--stage", "3", "--data", small.write_card(folder)]
    found = {}
    for i, (name, changes) in enumerate(SETTINGS.items()):
        found[name] = trained(folder, f"run{i}", *three, settings=changes)
    with events():
        resumed = ["--out", f"{folder}/run0", "--steps", "5", "--resume", "--set"]
        train.main(
            [*three, *resumed, *small.SETTINGS, "log_every=5", *SETTINGS["bf16, micro, full"]]
        )
    return found


def caches(folder: Path) -> dict:
    """Windows that went through the backbones: how many hold what was not there yet."""
    card = small.write_card(folder)
    with events():
        train.main(
            ["--stage", "latent", "--data", card, "--out", f"{folder}/latent", "--steps", "2"]
            + ["--set", "episodes=2"]
        )
        for stage in "123":
            latent = ["--latent", f"{folder}/latent"] if stage == "2" else []
            out = ["--out", f"{folder}/{stage}.safetensors", "--episodes", "2", *latent]
            data.main(["cache", "--data", card, "--stage", stage, "--windows", "70", *out])
    garbage = {stage: not_finite(folder / f"{stage}.safetensors") for stage in "123"}
    again = ["--stage", "3", "--cache", f"{folder}/3.safetensors", "--data", card]
    return {"garbage": garbage, "from a cache": trained(folder, "run", *again)}


def not_finite(cache: Path) -> int:
    """Tensors of a cache, one file or many, that are not finite somewhere; at least one is read."""
    files = [cache] if cache.is_file() else list(cache.rglob("*.safetensors"))
    read = []
    for file in files:
        with open_source(file) as source:
            read += [source.read(name).clone() for name in source.names()]
    floating = [x for x in read if x.is_floating_point()]
    assert len(floating) >= 2
    return sum(not x.isfinite().all().item() for x in floating)


def sampling(folder: Path) -> dict:
    """Five modes, a few joint steps, int8 and bf16; differences to the CPU, and how often the host
    waits in two more steps."""
    from test_sample import write_checkpoint

    run = write_checkpoint(folder / "run", "3")
    rng = np.random.default_rng(0)
    seen = (
        torch.from_numpy(rng.integers(0, 255, (2, 48, 48, 3), dtype=np.uint8)),
        ["push the red disc to the left", "pick up the blue disc"],
        torch.from_numpy(rng.normal(size=(2, 3)).astype(np.float32)),
    )
    cpu = Policy.load(run, device="cpu")
    known = cpu.inputs(*seen)
    given = torch.randn(known.latents.shape[0], cpu.model.config.chunk, 3)
    future = torch.randn(2, 24, cpu.model.config.latent_frames, 6, 6)

    def complete(inputs: Inputs, mode: str) -> Inputs:
        inputs.actions = given.to(inputs.latents.device)
        if flow.MODES[mode].video == flow.GIVEN:
            inputs.latents = future.to(inputs.latents.device)
        return inputs

    def difference(ours, theirs) -> float:
        pairs = [(a, b) for a, b in zip(ours, theirs) if b is not None]
        return max((a.cpu() - b).abs().max().item() for a, b in pairs)

    found = {"difference": {}, "waits in two more steps": {}}
    ways = [(mode, Policy.sample) for mode in flow.MODES]

    def first(policy: Policy, inputs: Inputs, mode: str):
        generator = policy.generator
        return sample_action_first(policy.model, inputs, mode, policy.steps, generator=generator)

    ways.append(("vla", first))
    expected = []
    for mode, way in ways:
        cpu.generator.manual_seed(0)
        cpu.steps = 4
        expected.append(way(cpu, complete(cpu.inputs(*seen), mode), mode))
    with events() as events_of:
        policy = Policy.load(run, device="cuda")
        for (mode, way), truth in zip(ways, expected):
            counts = []
            for steps in (2, 4):
                policy.steps = steps
                policy.generator.manual_seed(0)
                inputs = complete(policy.inputs(*seen), mode)
                events_of.events.clear()
                made = way(policy, inputs, mode)
                counts.append(sum(events_of.waits().values()))
            name = f"{mode}, {way.__name__}"
            found["waits in two more steps"][name] = counts[1] - counts[0]
            found["difference"][name] = difference(made, truth)
        images, states = seen[0].numpy(), seen[2].numpy()
        events_of.events.clear()
        policy.act(images, states, seen[1])
        found["waits of a look"] = sum(events_of.waits().values())
        policy.predict(images, states, seen[1])
        policy.model.to(torch.bfloat16)
        policy.predict(images, states, seen[1])
        quantise(policy.model)
        policy.predict(images, states, seen[1])
        found["text states on"] = sorted(
            {str(x.device) for x in policy.backbones.text_cache.values()}
        )
        weights = [x for x in policy.backbones.vae.parameters() if x.dim() == 5]
        layouts = {x.is_contiguous(memory_format=torch.channels_last_3d) for x in weights}
        found["layouts of the VAE"] = sorted(layouts)
    return found


def commands(folder: Path) -> dict:
    """Those that sample, evaluate and measure."""
    from test_sample import write_checkpoint

    run = str(write_checkpoint(folder / "run", "3"))
    card = small.write_card(folder)
    few = ["--episodes", "2", "--steps", "2"]
    bench.SIDE, bench.TEXT, bench.UND = (6, 6), 5, 9
    bench.milliseconds = lambda work: 0.0 * len([work()])
    bench.compile_sampler = lambda model, **_: model
    torch.compile = lambda function, **_: function
    with events():
        sample.main(["--ckpt", run, "--data", card, "--mode", "all", *few])
        sample.main(["--ckpt", run, "--data", card, "--mode", "joint", "--int8", *few])
        evaluate.main(
            ["--ckpt", run, "--episodes", "1", "--max-steps", "4", "--steps", "1"]
            + ["--out", f"{folder}/closed"]
        )
        os.environ.pop("MOTUS_ATTENTION", None)
        said = bench.gpu(preset("sim"), 2)
    return {"rows": len(said.splitlines())}


def motions(folder: Path) -> dict:
    """Latent actions of videos, with true and with measured flow, with labels and without."""
    card = small.write_card(folder)
    one = folder / "one.json"
    source = small.LINES[-1] | {"path": "world:toy", "held_out": 1, "episodes": 2}
    one.write_text(json.dumps({"video_hz": 5, "action_hz": 15, "sources": [source]}))
    tokens = Counter()
    with events():
        latent = ["--stage", "latent", "--data", card, "--out", f"{folder}/latent", "--steps", "2"]
        train.main([*latent, "--set", "episodes=2"])
        weights = str(next((folder / "latent").glob("*.safetensors")))
        latents.estimator_of = lambda name: None if name == "true" else ghost_flow()
        for how in ("true", "things"):
            main = ["--data", str(one), "--flow", how, "--side", "48", "--out"]
            latents.main(["encode", *main, f"{folder}/e_{how}", "--weights", weights])
            for labelled in ([], ["--labelled", "0.5"]):
                name = f"{how}{len(labelled)}"
                options = [*main, f"{folder}/t_{name}", "--dcae", DCAE, *labelled]
                latents.main(["tokens", *options])
                tokens[name] = len(list((folder / f"t_{name}").glob("tokens/*")))
                options = [*main, f"{folder}/d_{name}.safetensors", "--steps", "2", *labelled]
                latents.main(["pretrain", *options])
        train.main(
            ["--stage", "latent", "--cache", f"{folder}/t_true2", "--out", f"{folder}/again"]
            + ["--steps", "2"]
        )
    return {"files of tokens": tokens}


def ghost_flow():
    """A small DPFlow on the device."""
    from backbones.dpflow import DPFlow, DPFlowConfig

    config = DPFlowConfig(stem=(8, 8), width=8, depth=1, iterations=2, levels=2)
    return DPFlow(config).to("cuda").eval()


def backbones(folder: Path) -> dict:
    """The backbones of a world, two steps each."""
    card = small.write_card(folder)
    sizes = ["--steps", "2", "--episodes", "2", "--out", f"{folder}/new"]
    with events():
        pretrain.main(["--preset", "toy", "--data", card, *sizes])
    return {"files": sorted(path.name for path in (folder / "new").iterdir())}


def compiled(work, preset_name: str, stage: str) -> dict:
    """What torch.compile made of `work(config)` on fake tensors of the device, in this process for
    the first time: a break in a graph is an error."""
    import lowering

    # What the host reads of tensors without values: times that run down, and that keys are masked.
    FakeTensor.tolist = lambda x: [-1 / len(x)] * len(x)
    FakeTensor.__bool__ = lambda x: False
    torch._C._set_only_lift_cpu_tensors(False)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.compile = partial(torch.compile, backend=lowering.backend)
    os.environ["MOTUS_ATTENTION"] = "triton"
    config = preset(preset_name, stage)
    with FakeTensorMode():
        work(replace(config, video=replace(config.video, layers=3)))
    return dict(lowering.made)


def built(config, dtype: torch.dtype = torch.float32) -> Motus:
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = Motus(config)
    torch.set_default_dtype(torch.float32)
    return model


def training_step(config, checkpointing: str, stage: str) -> None:
    """A step as `train.py --full` takes it, its optimizer's too."""
    model = built(config).train()
    step = sharding.parallelize(model, STAGES[stage].experts, None, checkpointing, True, "bf16")
    with torch.device("cuda"):
        inputs = bench.drawn(config, 2, (16, 16), 64, 130)
        grid = (config.latent_frames, 16, 16)
        inputs.latents = torch.randn(2, config.video.latent, *grid)
        inputs.actions = torch.randn(2, config.chunk, config.action_dim)
        inputs.action_mask = torch.ones_like(inputs.actions, dtype=torch.bool)
        inputs.state = inputs.state if config.finetune else None
        if stage == "1":
            inputs.und = inputs.state = inputs.actions = inputs.action_mask = None
        noise = {"t_video": torch.rand(2), "video_noise": torch.randn_like(inputs.latents)}
        if stage != "1":
            noise |= {"t_action": torch.rand(2), "action_noise": torch.randn_like(inputs.actions)}
    loss = step(inputs, noise).total(1.0, 1.0)
    loss.backward()
    optimizers = train.make_optimizers(
        model, train.settings_for("full", stage), STAGES[stage].experts
    )
    trained = [p for group in train.groups_of(optimizers) for p in group["params"]]
    sharding.reduced(loss, trained, 0.5)
    for optimizer in optimizers:
        optimizer.step()
    assert sum(p.grad is None for p in trained) <= 9 * (stage != "1"), "of the last layer alone"


def sampled(config) -> None:
    model = compile_sampler(built(config, torch.bfloat16).eval())
    with torch.device("cuda"):
        inputs = bench.drawn(config, 1, (16, 16), 20, 130)
    model.sample(inputs, "joint", 3)


def compiling(folder: Path) -> dict:
    """One of the graphs of `--full`, by the name of the folder: SIZE_STAGE_CHECKPOINTING."""
    size, stage, how = folder.name.split("_")
    work = sampled if how == "sampler" else partial(training_step, checkpointing=how, stage=stage)
    return compiled(work, size, stage)


def day(folder: Path) -> dict:
    """scripts.gpu_day at the size of the toy, uncompiled and without the kernels, whose values are
    not real here."""
    from scripts import gpu_day

    gpu_day.SIZES, gpu_day.STEPS, gpu_day.LAYERS = ("toy",), 2, 1
    gpu_day.tests = lambda: iter([("pytest -m gpu: exit status", 0, 0)])
    bench.SIDE, bench.TEXT, bench.UND = (6, 6), 5, 9
    bench.milliseconds = lambda work: 0.0 * len([work()])
    bench.compile_sampler = lambda model, **_: model
    chosen = bench.implementation
    bench.implementation = lambda name: chosen("sdpa")
    torch.compile = lambda function, **_: function
    file = folder / "gpu.md"
    with events():
        gpu_day.main(["--out", str(file)])
        found = {"whole": file.read_text()}
        torch.cuda.max_memory_allocated = lambda: 1 << 60
        gpu_day.agreement = gpu_day.chunks = lambda: iter(())
        try:
            gpu_day.main(["--out", str(file)])
        except ValueError as error:
            return found | {"stopped": file.read_text(), "wrong": str(error)}


CASES = (training, settings, caches, sampling, commands, motions, backbones, compiling, day)

if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update(TQDM_DISABLE="1", MOTUS_ATTENTION="sdpa")
    name, folder = sys.argv[1:]
    case = {case.__name__: case for case in CASES}[name]
    print(json.dumps(case(Path(folder))))
