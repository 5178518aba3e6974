"""The options of every command: the range of each number, stated once; a parser that holds it; the
device; outputs that can be written; and the line in which a command ends that cannot go on.

A number outside its range, or one that is none (nan, 1e400, 1_000), is refused before anything is
loaded: `Parser` does it for options, `train.Settings` for `--set` and the recipes of presets.toml,
`weights.files.check_keys` for networks in presets and checkpoints.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

# Whose number it is (an option of a command, or a field of a dataclass), its range, its names.
RANGES = """
option              [0,4294967295]  seed
option              [1,1e6]         after batch episodes execute gpus max_steps
option              [1,1e6]         rounds rows seeds steps windows
option              [0,1e6]         gif noise recovery
option              [1,1024]        workers
option              [0,65535]       port
option              [32,4096]       side
option              [0,1]           disturbed labelled
option              (0,1]           mfu
option              (0,1e6]         memory peak
Settings            [0,4294967295]  seed
Settings            [1,1e9]         batch episodes log_every steps
Settings            [0,1e9]         horizon keep micro minutes save_every shards warmup windows
Settings            [0,1024]        lora workers
Settings            (0,10]          lr muon_lr
Settings            [0,10]          video_lr weight_decay
Settings            [0,1]           floor given
Settings            [0,1)           ema
Settings            (0,1e9]         clip timeout
Settings            [0,1e6]         motion_weight peak video_weight
LatentActionConfig  [1,1e5]         image interval latent_dim
LatentActionConfig  [0,1e5]         action_dim beta lambda_action moving
LatentActionConfig  (0,1e5]         radius
MotusConfig         [1,1e5]         action_dim action_width frames ratio state_dim
MotusConfig         [1,1e5]         expert_ffn und_width vlm_dim
MotusConfig         [0,1e5]         registers
MotusConfig         (0,1]           action_eps und_eps
WanConfig           [1,1e6]         ffn freq_dim heads latent layers text_dim text_len width
WanConfig           (0,1]           eps
DCAEConfig          [1,1e5]         head_dim latent_channels
DCAEConfig          [0,1e5]         conv_stages
Card                [0,1e9]         step
Source              [2,6]           level
Source              (0,1e9]         weight
Source              [0,1e9]         episodes
Source              [-1,1e9]        held_out
Source              [0,64]          shift
Dataset             [1,1e6]         chunks_size total_episodes
Dataset             [1,1e9]         total_frames
Dataset             (0,1000]        fps
CardKeys            (0,1000]        action_hz video_hz
Question            [0,4294967295]  seed
Question            [1,100]         steps
"""
INTERVALS = {
    (owner, name): interval
    for owner, interval, *names in map(str.split, RANGES.strip().splitlines())
    for name in names
}


class Refusal(ValueError):
    """An error that every rank of a run meets alike: the first one tells it for all."""


def spelled(text: str, kind: type) -> int | float | str:
    """The number that a text spells; the text if it spells none."""
    try:
        return text if "_" in text else kind(text)
    except ValueError:
        return text


def checked(label: str, owner: str, name: str, value: object, kind: type) -> int | float:
    """A number of this kind that is in its range."""
    interval = INTERVALS[owner, name]
    low, high = map(float, interval[1:-1].split(","))
    open_end = low if interval[0] == "(" else high if interval[-1] == ")" else None
    if type(value) not in (int, kind) or not low <= value <= high or value == open_end:
        sort = "a whole number" if kind is int else "a number"
        found = str(value).removesuffix(".0")
        raise Refusal(f"{label} is {found}; expected {sort} in {interval}")
    return value


def check_numbers(label: str, kind: type, stored: Mapping) -> None:
    """Refuses numbers of a dataclass that are out of range."""
    for f in fields(kind):
        if (kind.__name__, f.name) in INTERVALS and f.name in stored:
            checked(f"{label} {f.name}", kind.__name__, f.name, stored[f.name], f.type)


def stated(kind: type) -> str:
    """The settings of a dataclass, with their ranges."""
    names = (f.name + INTERVALS.get((kind.__name__, f.name), "") for f in fields(kind))
    return f"change a setting: {', '.join(names)}"


# -- the command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A command line that holds its numbers to their ranges and says what is wrong in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def option(self, name: str, value: object = str, help: str = "", **more: object) -> None:
        """An option by its default, or by its type where it has none; False makes a flag."""
        kind = {"default": value, "type": type(value)}
        if callable(value):
            kind = {"type": value}
        if value is False:
            kind = {"action": "store_true"}
        action = self.add_argument(name, help=help, **kind | more)
        action.help += " " + INTERVALS.get(("option", action.dest), "")

    def _get_value(self, action: argparse.Action, text: str) -> object:
        # argparse would call each error of a type "invalid value", and hide what is expected.
        if action.type in (int, float):
            found = spelled(text, action.type)
            return checked(action.option_strings[0], "option", action.dest, found, action.type)
        return action.type(text) if action.type else text

    def error(self, message: str) -> None:
        raise Refusal(f"{message} ({self.prog} --help)")


def environment(name: str, default: int) -> int:
    """A number that torchrun put into the environment."""
    return int(os.environ.get(name, default))


def device(asked: str = "") -> str:
    """The device to compute on, for good: as asked, else as MOTUS_DEVICE says, else cuda where
    there is one."""
    there = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    name = asked or os.environ.get("MOTUS_DEVICE") or there[0]
    if name not in there:
        raise Refusal(f"--device is {name}; torch sees {' and '.join(there)} here, expected that")
    if asked:
        os.environ["MOTUS_DEVICE"] = asked  # for what is called from here, and for workers
    return name


def device_of_rank() -> str:
    """The device to compute on, of this rank among those of its node."""
    return device().replace("cuda", f"cuda:{environment('LOCAL_RANK', 0)}")


DEVICE = "--device", device, "cpu or cuda (default: cuda where there is one)"


# -- outputs --------------------------------------------------------------------------------------


def output_file(path: str | Path, folder: bool = False) -> Path:
    """The path of a file to write, once what exists of it is known to take one; makes nothing."""
    near = whole = Path(path).absolute()
    while not near.exists():
        near = near.parent
    try:
        if folder or near != whole:
            tempfile.TemporaryFile(dir=near).close()
        else:
            near.open("r+b").close()
    except OSError as error:
        fault = f"{near}: {error.strerror}"
        raise Refusal(f"{path} cannot be written ({fault}); name another place") from error
    return Path(path)


output_folder = partial(output_file, folder=True)


def output(path: str | Path) -> Path:
    """The same of a file if its name has an ending, else of a folder."""
    return output_file(path, folder=not Path(path).suffix)


# -- the end of a command -------------------------------------------------------------------------

# What a command may meet, and what to do about it where the error does not say.
REMEDIES = {
    ImportError: "; pip install it, or motus with its extra: data, flow, hub, text, log or sim",
    MemoryError: "; take a smaller batch, fewer windows or --device cpu",
    torch.OutOfMemoryError: "; take a smaller batch, set micro, or --device cpu",
    ValueError: "",
    OSError: "",
    EOFError: "",
}


def run_command(main: Callable[[], object]) -> None:
    """Runs a command line; what the user, the data, the disk or the network got wrong ends it in
    one line on stderr and status 2, Ctrl-C with 130, a reader that has left with 141."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except tuple(REMEDIES) as error:
        if not isinstance(error, Refusal) or environment("RANK", 0) == 0:
            remedy = next(REMEDIES[kind] for kind in REMEDIES if isinstance(error, kind))
            print(f"error: {str(error) or repr(error)}{remedy}", file=sys.stderr)
        sys.exit(2)
