"""Speed as ratios: two ways of doing the same work, in turns, in one run, on whatever machine this is.

    python bench.py                            sampler and training step of the toy, with its frozen backbones
    python bench.py --out docs/bench.md        the same, written down with command, machine and date

    sampler    ours: VLM, text states, cross-attention keys and values once per observation
               official order: VLM and text path again at every Euler step (models/motus.py, inference_step); the same result
    train      one step of stage 3, fused attention against attention written out

Each pair runs in turns, so that a machine that slows down slows both; the ratio is the median of the pairs.
"""

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import data
import flow
from motus import Motus, backbones_of, preset


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """Chooses the attention implementation for a while."""
    before = os.environ.get("MOTUS_ATTENTION")
    os.environ["MOTUS_ATTENTION"] = name
    try:
        yield
    finally:
        os.environ.pop("MOTUS_ATTENTION") if before is None else os.environ.update(MOTUS_ATTENTION=before)


def in_turns(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median of other / ours pair by pair, after one warm-up of both."""
    def seconds(work: Callable[[], object]) -> float:
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    return (*(statistics.median(column) for column in zip(*pairs)), statistics.median(b / a for a, b in pairs))


def official_order(model: Motus, look: Callable[[], object], steps: int, noise: tuple[torch.Tensor, torch.Tensor]) -> flow.Velocity:
    """The joint sample as the official loop computes it: everything anew at every step."""
    video, action = noise
    times = flow.sampling_times(steps).tolist()
    observation = look().latents[:, :, :1]
    video = flow.keep_observation(video, observation)
    for t, t_next in zip(times, times[1:]):
        now = torch.full((len(video),), t)
        v_video, v_action = model.velocity(video, action, now, now, model.conditions(look()))
        video = flow.keep_observation(video + (t_next - t) * v_video, observation)
        action = action + (t_next - t) * model.action.actions_of(v_action)
    return action


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs that are timed")
    parser.add_argument("--batch", type=int, default=16, help="samples of a training step")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps of the sampler")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    config = preset("toy")
    backbones, model = backbones_of("toy", config), Motus(config).init_weights()
    episodes = data.toy_episodes((6,), 4, seed=0)
    stats = data.statistics(episodes)
    batch = data.collect(episodes, data.windows_of(episodes, config)[: args.batch], config, stats)
    one = data.collect(episodes, [(0, 0)], config, stats)
    inputs = backbones.inputs(batch.frames, batch.instruction, state=batch.state, actions=batch.actions, action_mask=batch.action_mask)

    def look():
        backbones.text_cache.clear()
        return backbones.inputs(one.frames[:, :1], one.instruction, state=one.state)

    shape = (1, config.video.latent, config.latent_frames, *inputs.latents.shape[3:])
    noise = torch.randn(shape), torch.randn(1, config.chunk, config.action_dim)

    @torch.no_grad()
    def ours():
        return model.sample(look(), "joint", args.steps, video_noise=noise[0], action_noise=noise[1]).actions

    @torch.no_grad()
    def literal():
        return official_order(model, look, args.steps, noise)

    difference = (ours() - literal()).abs().max().item()
    if difference > 1e-4:
        raise ValueError(f"the two samplers differ by {difference:.2g}; they must agree within 1e-4 before they are timed")

    def step(name: str) -> Callable[[], None]:
        def work() -> None:
            with attention(name):
                model.zero_grad()
                model.loss(inputs).total().backward()
        return work

    rows = [("one joint sample", "official order of work", *in_turns(ours, literal, args.rounds)),
            (f"training step, batch {args.batch}", "attention written out", *in_turns(step("sdpa"), step("plain"), args.rounds))]
    lines = ["| what | against | ours, ms | other, ms | other / ours |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {what} | {other} | {1000 * a:.1f} | {1000 * b:.1f} | {ratio:.2f} |" for what, other, a, b, ratio in rows]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    command = " ".join(["python bench.py", *(sys.argv[1:] if argv is None else argv)])
    where = f"`{command}`, {device}, {platform.machine()}, torch {torch.__version__}"
    lines += ["", f"{where}, {datetime.date.today()}; preset toy, fp32, {args.rounds} pairs in turns, medians; samplers agree within "
              f"{difference:.1g}"]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("# Speed\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
