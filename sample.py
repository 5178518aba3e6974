"""Runs a trained Motus: its five modes on held-out episodes, in figures, films and plots; and
`Policy`, for acting (paper Sec. 3.2).

    python sample.py                                         the five modes of the shipped policy
    python sample.py --ckpt runs/stage3 --mode joint         several modes with commas, or all
    python sample.py --encode-text "pick up the cup" --text states.safetensors
                                                             what acting then reads by --text

Stage 1 has mode vgm alone, stage 2 joint and vgm (latent actions), stage 3 all five. Windows
come from episodes that no stage trains on and lie inside them.

    PSNR, SSIM     predicted against true future, PSNR of the pooled squared error; `moving`: only
                   pixels that differ from the observation in the true future, widened by DILATE.
                   `copy` repeats the observation; `vae` is the truth through the VAE and back.
    action MSE     normalised and in robot units; `mean` predicts the mean of the training data.

Shapes: B windows, F future frames, H W pixels, S actions, A and P action and state dimensions.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

import data
import flow
from backbones.frozen import Backbones, changed
from backbones.published import holds_vlm
from formats.cards import widened
from formats.pictures import film, sheet
from formats.recordings import fit
from formats.statistics import Normaliser, Statistics
from motus import PRESETS, STAGES, Inputs, Motus, Prediction, Stage, preset
from scale.fast import quantise
from weights import options
from weights.card import Card, results_of
from weights.files import write_json

# -- a checkpoint, ready to run -------------------------------------------------------------------

ACTING = ("joint", "vla")  # modes that find actions from what is seen now
SHIPPED = PRESETS["toy"].backbones / "motus"  # the policy that comes with the repository


@dataclass
class Policy:
    """A checkpoint with its frozen backbones on one device. In stage 3, modes joint and vla, it
    acts; otherwise it only samples."""

    model: Motus
    card: Card
    backbones: Backbones
    statistics: Statistics | None  # of the robot that acts
    mode: str
    steps: int
    generator: torch.Generator
    device: str

    @classmethod
    def load(
        cls,
        ckpt: str | Path,
        mode: str = "joint",
        steps: int = 10,
        seed: int = 0,
        device: str | None = None,
        text: str | Path | None = None,
        robot: str = "",
    ) -> "Policy":
        """A run or checkpoint of ours, with EMA weights, or published weights
        (`Motus.from_pretrained`); ValueError if it is neither. `text` is a file of prepared text
        states, which stand in for the text encoder; `robot` says which one acts, where the
        checkpoint knows several."""
        model, card = Motus.from_pretrained(ckpt)
        stage = STAGES[card.stage]
        if stage.finetune and not card.statistics:
            raise ValueError(
                f"{ckpt} is of stage {card.stage} and its statistics are {card.statistics}; "
                "expected those that give its actions units: take a checkpoint that train.py wrote"
            )
        official = ckpt if holds_vlm(ckpt) else None
        backbones = data.backbones_of(card.preset, model.config, text, official)
        for part, digest in (card.backbones or {}).items():
            if backbones.fingerprint(part).get(part, digest) != digest:
                raise ValueError(
                    f"the checkpoint was trained with other frozen backbones than these ({part} "
                    "differs); name the folder of its own in MOTUS_BACKBONES, or train again"
                )
        statistics = None
        if card.statistics:
            if not robot and not stage.finetune:  # only the rates are read: those of any robot
                robot = card.statistics.get("robots", [{}])[0].get("embodiment", "")
            statistics = Statistics.from_json(card.statistics, robot)
        device = device or options.device()
        generator = torch.Generator().manual_seed(seed)
        model.to(device).eval()
        backbones.to(device)
        policy = cls(model, card, backbones, statistics, mode, steps, generator, device)
        policy.check_mode(mode)
        return policy

    @property
    def stage(self) -> Stage:
        return STAGES[self.card.stage]

    @property
    def own_width(self) -> int:
        """Dimensions of this robot's actions."""
        return len(self.statistics.actions.mean)

    def check_mode(self, mode: str) -> None:
        flow.mode_named(mode)
        if mode not in self.stage.modes:
            raise ValueError(
                f"mode {mode} needs actions that stage {self.card.stage} lacks; expected one of "
                f"{', '.join(self.stage.modes)}; or take stage 3"
            )

    def inputs(self, images: Tensor, texts: Sequence[str], state: Tensor) -> Inputs:
        """images (n, H, W, 3) uint8 and normalised state (n, P) -> what the network sees.
        Dimensions that this robot lacks are zero and masked."""
        config = self.model.config
        seen = self.backbones.conditions(images[:, None], texts)
        inputs = Inputs(**seen, state=widened(state, config.state_dim))
        if self.own_width < config.action_dim:
            exists = torch.arange(config.action_dim) < self.own_width
            inputs.action_mask = exists.expand(len(images), config.chunk, -1)
        return inputs.to(self.device)

    def sample(self, inputs: Inputs, mode: str) -> Prediction:
        self.check_mode(mode)
        return self.model.sample(inputs, mode, self.steps, self.generator)

    def act(self, images: ndarray, states: ndarray, instructions: Sequence[str]) -> ndarray:
        """images (n, H, W, 3) uint8, states (n, P), n instructions -> actions (n, S, A) float32 in
        robot units, not clipped."""
        return self.predict(images, states, instructions, video=False)[0]

    def predict(
        self,
        images: ndarray,
        states: ndarray,
        instructions: Sequence[str],
        video: bool = True,
    ) -> tuple[ndarray, ndarray | None]:
        """As `act`; also, if asked and the mode imagines any, the video (n, 1 + F, H, W, 3) uint8,
        the observation first. ValueError for what it cannot read."""
        if not self.stage.finetune or self.mode not in ACTING:
            raise ValueError(
                f"mode {self.mode} at stage {self.card.stage} does not act; expected "
                f"{' or '.join(ACTING)} at stage 3"
            )
        images = np.asarray(images)
        states = np.asarray(states, np.float32)
        n = len(images)
        robot = self.statistics
        numbers = (n, len(robot.state.mean) if robot.state else self.model.config.state_dim)
        pictures = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        finite = states.shape == numbers and np.isfinite(states).all()
        if not (pictures and finite and len(instructions) == n > 0):
            raise ValueError(
                f"images are {images.dtype} {images.shape}, states {states.shape}, with "
                f"{len(instructions)} instructions; expected uint8 (n, H, W, 3), finite {numbers} "
                f"and {n}, n at least 1"
            )
        images = fit(images, *(robot.size or PRESETS[self.card.preset].size))
        state = torch.tensor(states)
        if robot.state:
            state = robot.state.apply(state)
        prediction = self.sample(self.inputs(torch.tensor(images), instructions, state), self.mode)
        own = prediction.actions[..., : self.own_width].float()
        actions = robot.actions.invert(own).cpu().numpy()
        if prediction.video is None or not video:
            return actions, None
        return actions, self.backbones.decode_video(prediction.video).cpu().numpy()


# -- figures --------------------------------------------------------------------------------------

MOVES = 16  # a pixel moves if a channel changes by more than this of 255;
DILATE = 2  # the moving region grows by this many pixels
SHOWN = 4  # windows of which there are pictures
Figures = dict[str, dict[str, float]]  # name, and whose it is


def moving_region(observation: Tensor, future: Tensor) -> Tensor:
    """observation (B, 1, H, W, 3) and true future (B, F, H, W, 3), uint8 -> (B, F, H, W) bool."""
    moves = changed(observation, future, MOVES).float()
    return max_pool2d(moves, 2 * DILATE + 1, stride=1, padding=DILATE) > 0


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
    line = torch.signal.windows.gaussian(11, std=1.5)
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mx, my, xx, yy, xy = (conv2d(v, window) for v in (x, y, x * x, y * y, x * y))
    luminance = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
    structure = (2 * (xy - mx * my) + 0.03**2) / (xx - mx**2 + yy - my**2 + 0.03**2)
    return (luminance * structure).mean().item()


def video_figures(predicted: Tensor, decoded: Tensor, frames: Tensor) -> Figures:
    """predicted, decoded (the truth through the VAE) and true frames, each (B, 1 + F, H, W, 3)
    uint8, the observation first."""
    observation = frames[:, :1]
    truth = frames[:, 1:]
    region = moving_region(observation, truth)
    videos = {
        "model": predicted[:, 1:],
        "copy": observation.expand_as(truth),
        "vae": decoded[:, 1:],
    }
    moving = partial(psnr, region=region)
    measures = {"PSNR (dB)": psnr, "PSNR moving (dB)": moving, "SSIM": ssim}
    return {
        name: {k: measure(video, truth) for k, video in videos.items()}
        for name, measure in measures.items()
    }


def action_figures(predicted: Tensor, truth: Tensor, robot: Normaliser) -> Figures:
    """predicted and true actions (B, S, A), normalised."""
    mean = robot.apply(truth.new_tensor(robot.mean))
    scale = truth.new_tensor(robot.scale)
    errors = {"model": predicted - truth, "mean": mean - truth}
    return {
        name: {k: (error * unit).square().mean().item() for k, error in errors.items()}
        for name, unit in {"action MSE": 1, "action MSE (robot)": scale}.items()
    }


# -- the modes on held-out episodes ---------------------------------------------------------------


def run_mode(policy: Policy, mode: str, batch: data.Batch, out: Path) -> Figures:
    """Samples a mode on windows, writes pictures of the first ones to `out` and returns the figures
    of all."""
    und = policy.stage.actions != "none"
    inputs = data.encode(batch, policy.backbones, und).to(policy.device)
    prediction = policy.sample(inputs, mode)
    true = batch.frames[:SHOWN]
    captions = batch.instruction[:SHOWN]
    pictures = {"observation": true[:, 0], "true future": true[:, -1]}
    actions = []
    figures = {}
    if prediction.video is not None:
        video = policy.backbones.decode_video(prediction.video).cpu()
        decoded = policy.backbones.decode_video(inputs.latents).cpu()
        figures |= video_figures(video, decoded, batch.frames)
        pictures["predicted future"] = video[:SHOWN, -1]
        for i, caption in enumerate(captions):
            columns = {"predicted": video[i], "true": true[i]}
            film(out / f"{mode}_{i}.gif", columns, caption, goal=batch.goals[i])
    if prediction.actions is not None and policy.stage.finetune:
        robot = policy.statistics.actions
        predicted = prediction.actions[..., : policy.own_width].float().cpu()
        truth = batch.actions[..., : policy.own_width]
        figures |= action_figures(predicted, truth, robot)
        actions = [robot.invert(x[:SHOWN]) for x in (predicted, truth)]
    row = flow.MODES[mode]
    title = f"{mode}: video {row.video}, action {row.action}"
    ranges = list(zip(robot.min, robot.max)) if actions else ()
    sheet(out / f"{mode}.png", title, captions, pictures, *actions, ranges=ranges)
    return figures


@torch.no_grad()
def encode_text(name: str, instructions: Sequence[str], path: Path | None) -> None:
    """Writes the text states of instructions to `path`, adding to those it holds, so that acting
    needs no text encoder."""
    if path is None:
        raise ValueError("--encode-text writes to the file --text; name one")
    options.output_file(path)
    config = preset(name)
    backbones = data.backbones_of(name, config, parts=("text",))
    if path.is_file():
        backbones.load_text(path, config.video.text_dim)
    backbones.encode_text(instructions)
    backbones.save_text(path)
    print(f"wrote {path}: states of {len(backbones.text_cache)} instructions")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    add = parser.option
    add("--ckpt", str, "run folder, its step_NNNNNN, or published weights (default: the shipped)")
    add("--mode", "all", f"{', '.join(flow.MODES)}; several with commas; all")
    add("--data", str, "card or dataset, for its held-out episodes (default: the preset's)")
    add("--robot", "", "which robot, where the checkpoint knows several")
    add("--episodes", 32, "one window of each")
    add("--steps", 10, "Euler steps")
    add("--seed", 0, "of episodes and noise")
    add("--int8", False, "the video expert's maps in int8, for 24 GB cards")
    add("--text", Path, "file of prepared text states, read for the text encoder")
    add("--encode-text", str, "write text states to --text; stop", nargs="+", metavar="INSTRUCTION")
    add("--preset", "full", "whose text encoder prepares them", choices=PRESETS)
    add("--out", options.output_folder, "for pictures and figures.json (default: by the weights)")
    add(*options.DEVICE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.encode_text:
        encode_text(args.preset, args.encode_text, args.text)
        return
    modes = [] if args.mode == "all" else args.mode.split(",")
    for mode in modes:
        flow.mode_named(mode)
    out = args.out or options.output_folder(results_of(args.ckpt, "samples"))
    args.ckpt = args.ckpt or SHIPPED
    policy = Policy.load(args.ckpt, "vgm", args.steps, text=args.text, robot=args.robot)
    card = policy.card
    if args.int8:
        quantise(policy.model)
    for mode in modes:
        policy.check_mode(mode)
    seen = (policy.model.config, policy.statistics, args.episodes, args.seed)
    try:
        batch = data.held_out(args.data, card.stage, card.preset, *seen)
    except ValueError as error:
        if args.data:
            raise
        raise ValueError(f"{error}; --data names the data that it was trained on") from error
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for mode in modes or policy.stage.modes:
        policy.generator.manual_seed(args.seed)
        figures[mode] = run_mode(policy, mode, batch, out)
        for name, row in figures[mode].items():
            values = "".join(f" {k} {v:8.4f}  " for k, v in row.items())
            print(f"{mode:12} {name:20}{values}", flush=True)
    count = len(batch.instruction)  # fewer than asked for where fewer episodes are held out
    write_json(out / "figures.json", vars(args) | {"episodes": count, "figures": figures})
    print(f"{count} windows, {args.steps} steps, on {policy.device}; wrote {out}")


if __name__ == "__main__":
    options.run_command(main)
