"""The first hour with a GPU, in under ten minutes: what was proven without one, measured on one.

    python -m scripts.gpu_day --peak 989 --out gpu.md        peak of the card in bf16, TFLOP/s

    tests       the kernels against the plain functions, on the device (pytest -m gpu)
    agreement   the toy's policy on the device and on the CPU: backbones, VAE and a sample in fp32
    chunks      the five modes at both sizes in bf16: Triton against SDPA
    training    steps of train.py as the plan says for this card: loss, MFU, memory against the plan
    speed       a chunk of both sizes and each kernel, as `scripts.bench --gpu` measures them

It writes a row per number and stops at the first one outside its limits (docs/gpu_day.md).
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import train
from flow import MODES
from motus import PRESETS, Inputs, Motus, preset
from sample import Policy
from scale.log import read_log
from scale.plan import Plan
from scale.synthetic import SYNTHETIC, Synthetic
from scripts import bench
from weights.options import Parser, output_file, run_command

POLICY = PRESETS["toy"].backbones / "motus"
SIZES = ("small", "full")
STEPS = 10  # of a sample
LAYERS = 6  # of full width that are trained: with all, no card has room for the optimizer
Row = tuple[str, float, float]  # what, the number, the largest that is right


def difference(found: torch.Tensor, true: torch.Tensor) -> float:
    """The largest, relative to the largest value; NaN where there is one."""
    return ((found - true).abs().max() / true.abs().max()).item()


def tests() -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "not compile", "tests"]
    yield "pytest -m gpu: exit status", subprocess.run(command).returncode, 0


def agreement() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (1, *PRESETS["toy"].size, 3), np.uint8)
    seen = pictures, np.zeros((1, 3)), ["push the red disc to the left"]
    ours, cpu = (
        Policy.load(POLICY, steps=STEPS, device=device).act(*seen) for device in ("cuda", "cpu")
    )
    error = difference(torch.tensor(ours), torch.tensor(cpu))
    yield "actions of the toy: from the CPU's", error, 1e-3


def sampled(model: Motus, inputs: Inputs, mode: str, way: str) -> torch.Tensor:
    """All numbers that the mode denoises, in one row."""
    with bench.implementation(way):
        found = model.sample(inputs, mode, STEPS, generator=bench.seeded())
    return torch.cat([x.flatten() for x in found if x is not None])


@torch.no_grad()
def chunks() -> Iterator[Row]:
    for size in SIZES:
        with torch.device("cuda"):
            model = Motus(preset(size)).to(torch.bfloat16).eval()
        inputs = Inputs(**Synthetic(size, "3")[0]).to("cuda")

        for mode in MODES:
            ours, other = (sampled(model, inputs, mode, way) for way in ("triton", "sdpa"))
            yield f"{size}, {mode}: Triton from SDPA", difference(ours, other), 0.05


def training(peak: float) -> Iterator[Row]:
    for size in SIZES:
        config = preset(size)
        config = replace(config, video=replace(config.video, layers=LAYERS))
        name = f"{LAYERS} layers of {size}"
        PRESETS[name] = replace(PRESETS[size], motus=config)
        card = torch.cuda.get_device_properties(0).total_memory
        plan = Plan(name, "3", 1, card, batch=16)
        micro = plan.micro(plan.best)
        settings = ["batch=16", f"micro={micro}", f"checkpointing={plan.best}", "precision=bf16"]
        settings += ["compile=1", f"peak={peak}", "log_every=4", "horizon=100"]
        with tempfile.TemporaryDirectory() as folder:
            run = ["--preset", name, "--stage", "3", "--data", SYNTHETIC, "--out", folder + "/run"]
            train.main([*run, "--steps", "8", "--set", *settings])
            first, last = read_log(Path(folder) / "run" / "log.csv")
        yield f"{name}: loss, of the first", float(last["loss"]) / float(first["loss"]), 1
        yield f"{name}: samples/s", float(last["samples_per_s"]), np.inf
        yield f"{name}: MFU", float(last["mfu"]), 1
        held = 1e9 * float(last["memory_gb"]) / plan.peak(plan.best, micro)
        yield f"{name}, {plan.best}, micro={micro}: memory, of the plan's", held, 1.15


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.option("--peak", 989.0, "of the card in bf16, TFLOP/s")
    parser.option("--out", output_file, "table to write", default="gpu.md")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; run this where there is one")
    about = f"# A day on a GPU\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n"
    rows = []
    for what, found, most in chain(tests(), agreement(), chunks(), training(args.peak)):
        rows.append([what, found, most])
        print(f"{what} {found:.4g}", flush=True)
        about_rows = about + bench.table(["what", "found", "at most"], rows)
        args.out.write_text(about_rows + "\n")
        if not 0 <= found <= most:
            raise ValueError(f"{what} {found:.4g}; expected 0 to {most:g}: docs/gpu_day.md")
    speeds = [f"{size}\n\n{bench.gpu(preset(size), STEPS)}" for size in SIZES]
    args.out.write_text("\n\n".join([about_rows, *speeds]) + "\n")


if __name__ == "__main__":
    run_command(main)
