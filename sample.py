"""Runs a trained Motus: its five modes on held-out episodes, in figures, films and plots; and
`Policy`, for acting (paper Sec. 3.2).

    python sample.py --ckpt runs/stage3 --mode joint            or vla, world_model, idm, vgm; several with commas; all
    python sample.py --encode-text "pick up the cup" --text states.safetensors        prepares what acting then reads with --text

Stage 1 has only mode vgm, by the video expert alone. Stage 2 has joint and vgm: its actions are
latent, and episodes hold none to be given or compared with. Stage 3 has all five. Windows come from
a split that no stage trains on and lie inside their episodes.

    PSNR, SSIM     predicted against true future, PSNR of the pooled squared error; `moving`: only pixels that differ from the observation
                   in the true future, widened by DILATE. `copy` repeats the observation; `vae` is the truth through the VAE and back.
    action MSE     normalised and in robot units; `mean` always predicts the mean of the training data.

Shapes: B windows, F future frames, H W pixels, S actions, A action dimensions, P state dimensions,
n worlds.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import flow
from attention import choose
from backbones.published import holds_vlm
from formats.cards import widened
from formats.recordings import fit
from formats.statistics import Normaliser, Statistics
from motus import STAGES, Inputs, Motus, Prediction, preset
from weights.card import Card, newest_step

# -- a checkpoint, ready to run -------------------------------------------------------------------

ACTING = ("joint", "vla")  # modes that find actions from what is seen now


class Placement(NamedTuple):
    """How the sampler goes from noise to data: Euler steps, how many of them joint (None: all; see
    `Motus.sample`), and the shift of their times towards noise."""

    steps: int = 10
    joint: int | None = None
    shift: float = 1.0


FAST = Placement(
    steps=2, joint=1
)  # the cheapest that loses nothing in `python bench.py --fast`: docs/speed.md


class Policy:
    """A checkpoint with its frozen backbones on one device. In stage 3, modes joint and vla, it
    acts; otherwise it only samples. `text` is a file of prepared text states, which stand in for
    the text encoder; `motus` an official file, whose VLM is taken. `placement` says how modes that
    denoise actions are sampled; the others take its steps alone."""

    def __init__(
        self,
        model: Motus,
        card: Card,
        mode: str = "joint",
        steps: int = 10,
        seed: int = 0,
        device: str | None = None,
        text: str | Path | None = None,
        motus: str | Path | None = None,
        placement: Placement | None = None,
        robot: str = "",
    ):
        if card.stage not in STAGES or (card.stage == "3" and not card.statistics):
            raise ValueError(
                f"the checkpoint is of stage {card.stage!r} with statistics {card.statistics}; stages that can be sampled: "
                f"{', '.join(STAGES)}, 3 with statistics, which give its actions units: take one that train.py wrote"
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.card, self.mode, self.placement = (
            model.to(self.device).eval(),
            card,
            mode,
            placement or Placement(steps),
        )
        self.check_mode(mode)
        backbones = data.backbones_of(card.preset, model.config, text, motus)
        theirs = card.backbones or {}
        if other := [
            part
            for part, made in theirs.items()
            if backbones.fingerprint(part).get(part, made) != made
        ]:
            raise ValueError(
                "the checkpoint was trained with other frozen backbones than these "
                f"({', '.join(other)} differs); name the folder of its own in MOTUS_BACKBONES, or train again"
            )
        self.backbones = backbones.to(self.device)
        robots = (card.statistics or {}).get("robots", [card.statistics])
        named = robot if card.stage == "3" or robot else (robots[0] or {}).get("embodiment", "")
        self.statistics = Statistics.from_json(card.statistics, named) if card.statistics else None
        self.rate = self.statistics.rate if self.statistics else card.latent_interval or data.RATE
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def load(
        cls,
        ckpt: str | Path,
        mode: str = "joint",
        steps: int = 10,
        seed: int = 0,
        device: str | None = None,
        text: str | Path | None = None,
        placement: Placement | None = None,
        int8: bool = False,
        robot: str = "",
    ) -> "Policy":
        """A run or checkpoint of ours, with EMA weights, or published weights
        (`Motus.from_pretrained`). ValueError if it is neither. `robot`: which one acts, where the
        checkpoint knows several."""
        model, card = Motus.from_pretrained(ckpt, int8=int8)
        return cls(
            model,
            card,
            mode,
            steps,
            seed,
            device,
            text,
            ckpt if holds_vlm(ckpt) else None,
            placement,
            robot,
        )

    def check_mode(self, mode: str) -> None:
        flow.mode_named(mode)
        if mode not in (modes := STAGES[self.card.stage].modes):
            raise ValueError(
                f"mode {mode} needs actions that stage {self.card.stage} lacks; allowed: {', '.join(modes)}; or take stage 3"
            )

    def inputs(
        self,
        frames: Tensor,
        texts: Sequence[str],
        state: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> Inputs:
        """frames (B, 1 + F or 1, H, W, 3) uint8, normalised state and actions -> what the network
        sees. Dimensions that this robot lacks are zero and masked."""
        config, mask, und = self.model.config, None, self.card.stage != "1"
        if state is not None:
            state = widened(state, config.state_dim)
        if self.card.stage == "3" and (own := self.own_width) < config.action_dim:
            actions = None if actions is None else widened(actions, config.action_dim)
            mask = (torch.arange(config.action_dim) < own).expand(len(frames), config.chunk, -1)
        return self.backbones.inputs(
            frames, texts, und=und, state=state, actions=actions, action_mask=mask
        ).to(self.device)

    @property
    def own_width(self) -> int:
        """Dimensions of this robot's actions."""
        return len(self.statistics.actions.mean)

    @torch.no_grad()
    def sample(self, inputs: Inputs, mode: str) -> Prediction:
        """One mode; in stage 1 the video expert runs alone, as it was trained."""
        self.check_mode(mode)
        steps, joint, shift = self.placement
        if self.card.stage != "1":
            joint = joint if flow.MODES[mode].action == flow.DENOISE else None
            return self.model.sample(inputs, mode, steps, self.generator, shift, joint=joint)
        observation, conditions = (
            inputs.latents[:, :, :1],
            self.model.conditions(inputs, cache=True),
        )
        noise = gaussian(
            observation.expand(-1, -1, self.model.config.latent_frames, -1, -1), self.generator
        )
        return Prediction(
            flow.sample(
                lambda video, _, t, __: self.model.velocity(video, None, t, None, conditions),
                noise,
                noise,
                observation,
                mode,
                steps,
                shift,
            )[0],
            None,
        )

    def act(
        self, images: np.ndarray, states: np.ndarray, instructions: Sequence[str]
    ) -> np.ndarray:
        """images (n, H, W, 3) uint8, states (n, P), n instructions -> actions (n, S, A) float32 in
        robot units, not clipped."""
        return self.predict(images, states, instructions, video=False)[0]

    def predict(
        self,
        images: np.ndarray,
        states: np.ndarray,
        instructions: Sequence[str],
        video: bool = True,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As `act`; also, if asked and the mode imagines any, the video (n, 1 + F, H, W, 3) uint8,
        the observation first."""
        images, states = np.asarray(images), np.asarray(states, np.float32)
        robot = self.statistics
        n, expected = (
            len(images),
            (
                len(images),
                len(robot.state.mean) if robot and robot.state else self.model.config.state_dim,
            ),
        )
        if self.card.stage != "3" or self.mode not in ACTING:
            raise ValueError(
                f"mode {self.mode} at stage {self.card.stage} does not act; allowed: {', '.join(ACTING)} at stage 3"
            )
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or n == 0:
            raise ValueError(
                f"images are {images.dtype} of shape {images.shape}; expected uint8 of shape (n, H, W, 3), n at least 1"
            )
        if states.shape != expected or not np.isfinite(states).all() or len(instructions) != n:
            raise ValueError(
                f"{n} images need {n} instructions, found {len(instructions)}; finite states {expected}, found {states.shape}"
            )
        if robot.size:
            images = fit(images, *robot.size)
        state = robot.state.apply(torch.tensor(states)) if robot.state else torch.tensor(states)
        prediction = self.sample(
            self.inputs(torch.tensor(images[:, None]), instructions, state), self.mode
        )
        imagined = (
            self.backbones.decode_video(prediction.video).cpu().numpy()
            if video and prediction.video is not None
            else None
        )
        return robot.actions.invert(
            prediction.actions[..., : self.own_width].float()
        ).cpu().numpy(), imagined


# -- figures and pictures -------------------------------------------------------------------------

MOVES, DILATE = (
    16,
    2,
)  # a pixel moves if a channel changes by more than MOVES of 255; the region grows by DILATE


def moving_region(observation: Tensor, future: Tensor) -> Tensor:
    """observation (B, 1, H, W, 3) and true future (B, F, H, W, 3), uint8 -> (B, F, H, W) bool."""
    moves = ((future.int() - observation.int()).abs() > MOVES).any(dim=-1).float()
    return torch.nn.functional.max_pool2d(moves, 2 * DILATE + 1, stride=1, padding=DILATE) > 0


def psnr(video: Tensor, truth: Tensor, region: Tensor | None = None) -> float:
    """Decibels of the squared error pooled over (B, F, H, W, 3) uint8, or over the True pixels of
    `region` (B, F, H, W)."""
    error = (video.double() - truth.double()).square().mean(dim=-1)
    mse = (error if region is None else error[region]).mean().item()
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ssim(video: Tensor, truth: Tensor) -> float:
    """Structural similarity, -1 to 1: Gaussian window of 11 pixels (sigma 1.5), per channel, mean
    over all places where it fits."""
    x, y = (rearrange(v.float() / 255, "b f h w c -> (b f c) 1 h w") for v in (video, truth))
    line, c1, c2 = torch.exp(-(torch.arange(11) - 5).square() / (2 * 1.5**2)), 0.01**2, 0.03**2
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mx, my, xx, yy, xy = (
        torch.nn.functional.conv2d(v, window) for v in (x, y, x * x, y * y, x * y)
    )
    return (
        (
            (2 * mx * my + c1)
            * (2 * (xy - mx * my) + c2)
            / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
        )
        .mean()
        .item()
    )


def video_figures(
    predicted: Tensor, decoded: Tensor, frames: Tensor
) -> dict[str, dict[str, float]]:
    """predicted, decoded (the truth through the VAE) and true frames, each (B, 1 + F, H, W, 3)
    uint8, the observation first."""
    observation, truth = frames[:, :1], frames[:, 1:]
    region, videos = (
        moving_region(observation, truth),
        dict(model=predicted[:, 1:], copy=observation.expand_as(truth), vae=decoded[:, 1:]),
    )
    measures = {
        "PSNR (dB)": psnr,
        "PSNR moving (dB)": lambda video, truth: psnr(video, truth, region),
        "SSIM": ssim,
    }
    return {
        name: {k: measure(v, truth) for k, v in videos.items()}
        for name, measure in measures.items()
    }


def action_figures(
    predicted: Tensor, truth: Tensor, robot: Normaliser
) -> dict[str, dict[str, float]]:
    """predicted and true actions (B, S, A), normalised."""
    mean, scale = robot.apply(truth.new_tensor(robot.mean)), truth.new_tensor(robot.scale)
    errors = dict(model=predicted - truth, mean=mean - truth)
    return {
        name: {k: (v * unit).square().mean().item() for k, v in errors.items()}
        for name, unit in (("action MSE", torch.ones_like(scale)), ("action MSE (robot)", scale))
    }


# Pictures carry their own dark ground, and so read the same on any page.
GROUND, TEXT = "#15181e", "#e4e6ea"
STYLE = {
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "font.size": 7,
    "axes.prop_cycle": cycler(color=["#ffab4a", "#8fb8ff"]),
}


def film(
    path: Path,
    columns: dict[str, np.ndarray],
    caption: str,
    scale: int = 4,
    ms: int = 400,
    limit: int = 300_000,
) -> None:
    """A GIF of at most `limit` bytes: videos (F, H, W, 3) uint8, enlarged, side by side under their
    names, above a caption."""
    height, width = (scale * size for size in next(iter(columns.values())).shape[1:3])
    font, pages = ImageFont.load_default(12), []
    for images in zip(*columns.values()):
        page = Image.new("RGB", (len(columns) * (width + 4) - 4, height + 40), GROUND)
        (draw := ImageDraw.Draw(page)).text((4, height + 22), caption, TEXT, font)
        for i, (name, image) in enumerate(zip(columns, images)):
            page.paste(
                Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST),
                (i * (width + 4), 20),
            )
            draw.text((i * (width + 4) + 4, 3), name, TEXT, font)
        pages.append(page)
    for stride, colours in (
        (1, 256),
        (1, 64),
        (1, 32),
        (2, 32),
        (4, 16),
    ):  # the first that fits stays
        palette = Image.fromarray(np.concatenate(pages[::stride])).quantize(
            colours, Image.Quantize.MAXCOVERAGE
        )
        first, *rest = (
            page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages[::stride]
        )
        first.save(path, save_all=True, append_images=rest, duration=ms * stride, loop=0)
        if path.stat().st_size <= limit:
            break


def sheet(
    path: Path,
    title: str,
    captions: Sequence[str],
    pictures: dict[str, np.ndarray],
    *actions: np.ndarray,
) -> None:
    """A PNG with a row per window: named pictures (B, H, W, 3) uint8; predicted and true actions
    (B, S, A), a plot per dimension."""
    columns = len(pictures) + (actions[0].shape[2] if actions else 0)
    with rc_context(STYLE):
        figure = Figure(
            figsize=(1.8 * columns + 0.4, 1.8 * len(captions) + 0.4), layout="constrained"
        )
        axes = figure.subplots(len(captions), columns, squeeze=False)
        figure.suptitle(
            title + ("; actions in robot units: orange predicted, blue true" if actions else ""),
            fontsize=9,
        )
        for row, caption in enumerate(captions):
            axes[row, 0].set_ylabel(caption.replace(" at ", "\nat ").replace(" to ", "\nto "))
            for axis, (name, images) in zip(axes[row], pictures.items()):
                axis.imshow(images[row], interpolation="nearest")
                axis.set(xticks=[], yticks=[], title=name)
            for i, axis in enumerate(axes[row, len(pictures) :]):
                axis.plot(np.stack([values[row, :, i] for values in actions], axis=1))
                axis.set(title=f"action {i}")
        figure.savefig(path, dpi=110)


# -- the modes on held-out episodes ---------------------------------------------------------------


def held_out_windows(
    policy: Policy, count: int, seed: int, split: str = "eval", path: str | None = None
) -> data.Batch:
    """One window from each of `count` episodes: held-out ones of the dataset or card at `path`, at
    the rates and in the normalisation of the checkpoint; else of the toy world, in stage 3 the
    target robot's demonstrations, before that its randomised scenes. There the expert is not
    disturbed: a world model is asked what an action does, so the one recorded must be the one
    executed."""
    if path is not None:
        return data.held_out(path, policy.card, policy.statistics, count, seed)
    need, rng = policy.rate * policy.model.config.frames, np.random.default_rng(seed)
    episodes = [
        e
        for e in data.toy_episodes(
            [6 if policy.card.stage == "3" else 3], count, seed, split, False
        )
        if len(e.frames) > need
    ]
    if not episodes:
        raise ValueError(
            f"none of {count} episodes is longer than a window of {need} steps; ask for more"
        )
    windows = [(i, int(rng.integers(len(e.frames) - need))) for i, e in enumerate(episodes)]
    return data.collect(episodes, windows, policy.model.config, policy.statistics, rate=policy.rate)


def run_mode(
    policy: Policy, mode: str, batch: data.Batch, out: Path, shown: int = 4
) -> dict[str, dict[str, float]]:
    """Samples a mode on windows, writes pictures of the first `shown` to `out` and returns the
    figures of all."""
    inputs = policy.inputs(batch.frames, batch.instruction, batch.state, batch.actions)
    prediction = policy.sample(inputs, mode)
    true, captions, actions, figures = (
        batch.frames[:shown].numpy(),
        batch.instruction[:shown],
        (),
        {},
    )
    pictures = {"observation": true[:, 0], "true future": true[:, -1]}
    if prediction.video is not None:
        video, decoded = (
            policy.backbones.decode_video(x).cpu() for x in (prediction.video, inputs.latents)
        )
        figures |= video_figures(video, decoded, batch.frames)
        pictures["predicted future"] = video[:shown, -1].numpy()
        for i, caption in enumerate(captions):
            film(out / f"{mode}_{i}.gif", {"predicted": video[i].numpy(), "true": true[i]}, caption)
    if prediction.actions is not None and policy.card.stage == "3":
        predicted, robot = (
            prediction.actions[..., : policy.own_width].float().cpu(),
            policy.statistics.actions,
        )
        figures |= action_figures(predicted, batch.actions, robot)
        actions = [robot.invert(x[:shown]).numpy() for x in (predicted, batch.actions)]
    sheet(
        out / f"{mode}.png",
        f"{mode}: video {flow.MODES[mode].video}, action {flow.MODES[mode].action}",
        captions,
        pictures,
        *actions,
    )
    return figures


@torch.no_grad()
def encode_text(name: str, instructions: Sequence[str], path: Path | None) -> None:
    """Writes the text states of instructions to `path`, adding to those it holds, so that acting
    needs no text encoder."""
    if path is None:
        raise ValueError("--encode-text writes to the file --text; name one")
    backbones = data.backbones_of(name, config := preset(name), parts=("text",))
    if path.is_file():
        backbones.load_text(path, config.video.text_dim)
    backbones.encode_text(instructions)
    backbones.save_text(path)
    print(f"wrote {path}: states of {len(backbones.text_cache)} instructions")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", help="run folder, or one of its step_NNNNNN; or published weights"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="file of prepared text states, read instead of loading the text encoder",
    )
    parser.add_argument(
        "--encode-text",
        nargs="+",
        metavar="INSTRUCTION",
        help="prepare text states, write them to --text, and stop",
    )
    parser.add_argument(
        "--preset", default="full", help="whose text encoder prepares them: full or toy"
    )
    parser.add_argument(
        "--mode", default="joint", help=f"{', '.join(flow.MODES)}; several with commas; all"
    )
    parser.add_argument(
        "--data", help="sample held-out episodes of this card or dataset instead of the toy world"
    )
    parser.add_argument(
        "--robot", default="", help="which robot, where the checkpoint knows several"
    )
    parser.add_argument(
        "--split", default="eval", help="eval (new layouts) or held_out (new instructions)"
    )
    for name, default, text in (
        ("episodes", 32, "one window of each"),
        ("steps", 10, "Euler steps"),
        ("seed", 0, "of episodes and noise"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"actions first: {FAST.steps} steps, {FAST.joint} joint (docs/speed.md)",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="the video expert's linear maps in int8, for cards of 24 GB",
    )
    parser.add_argument(
        "--out", help="folder for pictures and figures.json (default: samples/ in the checkpoint)"
    )
    args = parser.parse_args(argv)
    if args.encode_text:
        return encode_text(args.preset, args.encode_text, args.text)
    if args.ckpt is None:
        raise ValueError("--ckpt is missing; name a run folder, or published weights")
    policy = Policy.load(
        args.ckpt,
        "vgm",
        args.steps,
        text=args.text,
        placement=FAST if args.fast else None,
        int8=args.int8,
        robot=args.robot,
    )
    print("attention: {}, because {}".format(*choose(policy.device)), flush=True)
    modes = STAGES[policy.card.stage].modes if args.mode == "all" else args.mode.split(",")
    [policy.check_mode(mode) for mode in modes]
    batch, figures = held_out_windows(policy, args.episodes, args.seed, args.split, args.data), {}
    (out := Path(args.out or newest_step(args.ckpt) / "samples")).mkdir(parents=True, exist_ok=True)
    for mode in modes:
        policy.generator.manual_seed(args.seed)
        figures[mode] = run_mode(policy, mode, batch, out)
        for name, row in figures[mode].items():
            print(
                f"{mode:12} {name:20}" + "".join(f" {k} {v:8.4f}  " for k, v in row.items()),
                flush=True,
            )
    (out / "figures.json").write_text(json.dumps({**vars(args), "figures": figures}, indent=1))
    where = args.data or f"split {args.split}"
    print(
        f"{len(batch.instruction)} windows of {where}, {policy.placement.steps} steps, seed {args.seed}, on {policy.device}; wrote {out}"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
