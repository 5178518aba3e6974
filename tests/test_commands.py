"""All commands: their numbers have ranges, they compute where they are told, and what the user, the
disk or the network got wrong ends them in one line."""

import argparse
import ast
import importlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types
import urllib.error
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from test_house import sources, tree
from test_sample import runs, write_checkpoint  # noqa: F401   runs is a fixture

import sample
import train
from backbones.dcae import DCAEConfig
from backbones.wan import WanConfig
from formats.cards import CardKeys, Source
from formats.pictures import sheet
from latent_action import LatentActionConfig
from motus import PRESETS, STAGES, MotusConfig
from scripts import evaluate, record
from scripts.play import Question
from train import Settings, changed
from weights import options
from weights.card import Card
from weights.files import check_keys, plain_json
from weights.options import INTERVALS, Parser, Refusal, run_command

ROOT = Path(__file__).parents[1]


def commands() -> dict[str, Path]:
    """Every file that ends in `run_command(main)`, by the name of its module."""
    found = {}
    for path in sources():
        calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
        if any(re.search(r"run_command\(.*\bmain\)+$", ast.unparse(call)) for call in calls):
            found[".".join(path.with_suffix("").parts)] = path
    return found


COMMANDS = commands()


class Seen(Exception):
    pass


def parser_of(name: str) -> Parser | None:
    """The parser that a command makes; None if it takes no options."""
    with pytest.MonkeyPatch.context() as patch:

        def show(self, *_) -> None:
            raise Seen(self)

        patch.setattr(argparse.ArgumentParser, "parse_args", show)
        main = importlib.import_module(name).main
        if not main.__code__.co_argcount:
            return None
        with pytest.raises(Seen) as seen:
            main([])
    return seen.value.args[0]


def walk(parser: Parser, words: tuple[str, ...] = ()):
    """(words that lead to it, action) of a parser and its sub-commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from walk(inner, (*words, word))
        else:
            yield words, action


ACTIONS = [
    (name, words, action)
    for name in COMMANDS
    if (parser := parser_of(name))
    for words, action in walk(parser)
]
NUMBERS = [row for row in ACTIONS if row[2].type in (int, float)]
CONFIGS = (
    Settings,
    LatentActionConfig,
    MotusConfig,
    WanConfig,
    DCAEConfig,
    Card,
    Source,
    CardKeys,
    Question,
)


def outside(interval: str) -> list[str]:
    """Texts that are no number in the interval."""
    low, high = map(float, interval[1:-1].split(","))
    wrong = [f"{math.floor(low) - 1}", f"{math.ceil(high) + 1}"]
    wrong += [f"{low:g}"] if interval[0] == "(" else []
    wrong += [f"{high:g}"] if interval[-1] == ")" else []
    return [*wrong, "nan", "inf", "-inf", "1e400", "1_0", "", "many", "0x1", "1,5"]


def shown(text: str, kind: type) -> str:
    """As the error tells a wrong number."""
    return "inf" if (text, kind) == ("1e400", float) else text


# -- ranges ---------------------------------------------------------------------------------------


def test_the_commands_are_found():
    expected = "data train sample weights.__main__ scripts.bench scripts.evaluate scripts.record"
    assert set(expected.split()) < COMMANDS.keys() and len(COMMANDS) >= 12
    assert len(NUMBERS) > 40


def test_every_number_of_every_command_has_a_range():
    """All parsers are walked, sub-commands too; a number whose range is not stated fails here, and
    so does a row of the table that nobody has."""
    options_named = {action.dest for _, _, action in NUMBERS}
    assert {name for owner, name in INTERVALS if owner == "option"} == options_named
    for config in CONFIGS:
        numbers = {f.name for f in fields(config) if f.type in (int, float)}
        stated = {name for owner, name in INTERVALS if owner == config.__name__}
        assert stated == numbers, config
    owners = {"option", "Dataset", *(c.__name__ for c in CONFIGS)}  # Dataset: an info.json
    assert {owner for owner, _ in INTERVALS} == owners


def test_every_command_line_is_read_by_the_parser_that_knows_the_ranges():
    """No command makes a parser of its own kind."""
    for path in sources():
        if path != Path("weights/options.py"):
            assert "argparse.ArgumentParser(" not in (ROOT / path).read_text(), path
    assert all(callable(action.type) or action.type is None for _, _, action in ACTIONS)


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: " ".join([row[0], *row[1], row[2].dest]))
def test_an_option_outside_its_range_is_refused_before_anything_is_done(row):
    """The line names the option, the value and the range."""
    name, words, action = row
    interval = INTERVALS["option", action.dest]
    main = importlib.import_module(name).main
    before = [*words, "evidence"] if name == "scripts.paper" else words
    for text in outside(interval):
        with pytest.raises(Refusal) as error:
            main([*before, f"{action.option_strings[0]}={text}"])
        assert str(error.value).startswith(
            f"{action.option_strings[0]} is {shown(text, action.type)}; expected a "
        )
        assert str(error.value).endswith(f"number in {interval}")


@pytest.mark.parametrize("field", [f for f in fields(Settings) if f.type in (int, float)])
def test_a_setting_outside_its_range_is_refused(field):
    """By --set, from presets.toml, and in Python."""
    name = field.name
    interval = INTERVALS["Settings", name]
    for text in outside(interval):
        words = f"--set {name} is {shown(text, field.type)}; expected a "
        with pytest.raises(Refusal, match=re.escape(words)):
            changed(Settings(), [f"{name}={text}"])
    for value in (-1, math.nan, math.inf, "1", True, None):
        with pytest.raises(Refusal, match=re.escape(interval)):
            Settings(**{name: value})


@pytest.mark.parametrize("text", "clip=0 clip=-1 clip=nan clip=inf micro=-1 ema=2 given=3".split())
def test_a_refused_setting_leaves_nothing_behind(text, tmp_path):
    """Not even the folder of the run."""
    argv = ["--stage", "3", "--out", str(tmp_path / "run"), "--set", text]
    with pytest.raises(Refusal, match=f"--set {text.replace('=', ' is ')}; expected"):
        train.main(argv)
    assert not list(tmp_path.iterdir())


def test_the_ends_of_a_range_belong_to_it_unless_they_are_round():
    assert changed(Settings(), ["floor=0", "given=1", "lr=10"]).lr == 10
    assert options.checked("x", "option", "labelled", 1.0, float) == 1.0
    assert changed(Settings(), ["steps=1", "weight_decay=.5", "lr=1e-3"]).weight_decay == 0.5
    for text in ("lr=0", "ema=1", "steps=1.5", "steps=1e3"):
        with pytest.raises(Refusal):
            changed(Settings(), [text])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_the_ranges(preset):
    """Its recipes, its networks and its latent actions."""
    for stage in STAGES:
        for long in (False, True):
            train.settings_for(preset, stage, (), long)
    row = PRESETS[preset]
    check_keys(vars(row.motus), MotusConfig, preset)
    check_keys(vars(row.motus.video), WanConfig, preset)
    check_keys(row.latent, LatentActionConfig, preset)
    check_keys(row.latent["dcae"], DCAEConfig, preset)


def test_a_network_of_impossible_numbers_is_refused_where_it_is_stored():
    """In a row of presets.toml, or in a checkpoint's card."""
    video = {"patch": (1, 2, 2)}
    for wrong in ({"frames": -4}, {"registers": -1}, {"ratio": 0}, {"und_eps": 0.0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"presets.toml {name} is .*; expected"):
            MotusConfig.of({"video": video} | wrong, "presets.toml")
    with pytest.raises(ValueError, match="config.json layers is 0; expected a whole number"):
        MotusConfig.of({"video": video | {"layers": 0}}, "config.json")
    with pytest.raises(ValueError, match="step is -1; expected a whole number"):
        check_keys({"step": -1}, Card, "config.json")


def test_help_states_the_ranges(capsys):
    for name, text in {"scripts.evaluate": "Euler steps [1,1e6]", "train": "ema[0,1)"}.items():
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        assert text in " ".join(capsys.readouterr().out.split())


# -- the device -----------------------------------------------------------------------------------

COMPUTE = "train sample data scripts.evaluate scripts.latents scripts.play scripts.truth"
PLAIN = (
    "scripts.bench scripts.detector scripts.gpu_day scripts.readme scripts.record scripts.report "
    "weights.__main__"
)


@pytest.mark.parametrize("name", [*COMPUTE.split(), "scripts.paper"])
def test_a_command_that_computes_is_told_where(name, monkeypatch):
    """Each has --device; a device that is not there is refused in one line."""
    monkeypatch.setenv("MOTUS_DEVICE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [(words, action) for other, words, action in ACTIONS if other == name]
    words = next(words for words, action in own if action.dest == "device")
    before = [*words, "evidence"] if name == "scripts.paper" else words
    main = importlib.import_module(name).main
    for wrong in ("cuda", "tpu"):
        with pytest.raises(Refusal, match=f"--device is {wrong}; torch sees cpu here"):
            main([*before, "--device", wrong])


def test_a_command_without_a_device_computes_on_none():
    """All parsers are walked: a new command has --device or a place among the plain."""
    have = {name for name, _, action in ACTIONS if action.dest == "device"}
    assert COMMANDS.keys() - have - {"scripts.pretrain"} == set(PLAIN.split())


def test_one_function_picks_the_device(monkeypatch):
    """The option, else MOTUS_DEVICE, else cuda where there is one; and no other place asks."""
    monkeypatch.setenv("MOTUS_DEVICE", "")
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert options.device() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert options.device("cpu") == options.device() == "cpu"
    assert os.environ["MOTUS_DEVICE"] == "cpu"
    for path in sources():
        assert '"cuda" if torch.cuda' not in (ROOT / path).read_text(), path


# -- outputs --------------------------------------------------------------------------------------

KINDS = (options.output_file, options.output_folder, options.output)
OUTPUTS = [row for row in ACTIONS if row[2].type in KINDS]


def test_every_output_is_tried_before_the_work():
    """Options that name what is written have a type that tries it."""
    names = {"out", "card", "dst", "to", "run", "record"}
    read = ("scripts.paper", (), "run")  # of runs that a script made
    written = [row for row in ACTIONS if row[2].dest in names]
    written = [row for row in written if (*row[:2], row[2].dest) != read]
    assert written == OUTPUTS and len(written) >= 15


@pytest.mark.parametrize("row", OUTPUTS, ids=lambda row: " ".join([row[0], *row[1], row[2].dest]))
def test_an_output_that_cannot_be_written_is_refused_in_one_line(row, tmp_path, capsys):
    """Below a file; a folder where a file is expected, and the other way round; a full or locked
    place. Nothing is made."""
    name, words, action = row
    (tmp_path / "file").touch()
    wrong = [tmp_path / "file" / "x"]
    wrong.append(tmp_path if action.type is options.output_file else tmp_path / "file")
    wrong += [Path("/proc/none/x"), tmp_path / "long" / ("x" * 300)][:1]
    for path in wrong:
        option = [f"{action.option_strings[0]}={path}"] if action.option_strings else [str(path)]
        if not action.option_strings:
            option = ["x"] * (action.dest == "dst") + (["x"] * (name == "data")) + option
        before = [*words, "evidence"] if name == "scripts.paper" else words
        with pytest.raises(Refusal, match=r"cannot be written \(.*\); name another place"):
            importlib.import_module(name).main([*before, *option])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_results_lie_beside_a_run_or_in_runs(tmp_path, monkeypatch):
    """A default place is tried as well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    argv = ["--sim", "toy", "--random", "--episodes", "1", "--max-steps", "1"]
    with pytest.raises(Refusal, match=r"runs/evaluation cannot be written \(.*Not a directory"):
        evaluate.main(argv)
    run = write_checkpoint(tmp_path / "own", "3")
    (run / "step_000001" / "samples").touch()
    with pytest.raises(Refusal, match="step_000001/samples cannot be written"):
        sample.main(["--ckpt", str(run)])


# -- how a command ends ---------------------------------------------------------------------------


def ended(capsys, name: str, argv: list[str]) -> tuple[int, str]:
    """Status and stderr of a command, run as `python -m` or `python FILE` runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / COMMANDS[name]), run_name="__main__")
    return ending.value.code, capsys.readouterr().err


ENDINGS = [
    (ValueError("too wide"), 2, "error: too wide\n"),
    (OSError(28, "No space left on device", "x.gif"), 2, "No space left on device: 'x.gif'\n"),
    (PermissionError(13, "Permission denied", "locked/x"), 2, "Permission denied: 'locked/x'\n"),
    (ImportError("No module named 'av'"), 2, "No module named 'av'; pip install it, or motus"),
    (MemoryError(), 2, "error: MemoryError(); take a smaller batch"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "memory; take a smaller batch, set micro"),
    (EOFError(), 2, "error: EOFError()\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "scripts.readme"])
def test_every_command_ends_in_one_line(name, capsys, monkeypatch):
    """Whatever of these is raised inside it."""
    for error, status, words in ENDINGS:

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", fail)
        code, said = ended(capsys, name, [])
        assert code == status and words in said and said.count("\n") == 1, said


def test_a_fault_of_our_own_keeps_its_traceback():
    """What nobody foresaw is not hidden."""

    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_command(main)


def test_a_reader_that_leaves_ends_a_command_silently():
    """`python -m weights ... | head`: no traceback, not even from the interpreter's own end."""
    program = "from weights.options import run_command\n"
    program += "run_command(lambda: [print('x' * 999) for _ in range(999)])"
    command = f'{sys.executable} -c "{program}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "x" * 999 + "\n" and done.stderr == ""


def test_one_rank_tells_what_all_refuse(capsys, monkeypatch):
    """Under torchrun the other ranks end as silently as quickly; what one alone met it tells."""
    for rank, error, tells in ((0, Refusal, True), (3, Refusal, False), (3, OSError, True)):
        monkeypatch.setenv("RANK", str(rank))

        def main(error=error):
            raise error("no")

        with pytest.raises(SystemExit) as ending:
            run_command(main)
        assert ending.value.code == 2 and bool(capsys.readouterr().err) == tells


# What each command reads from the network: its argv, with a folder in the place of OUT.
NETWORK = {
    "data inspect": ("data", ["inspect", "nobody/nothing", "--out", "OUT/a.png"]),
    "data check": ("data", ["check", "nobody/nothing"]),
    "data convert": ("data", ["convert", "nobody/nothing", "OUT/set"]),
    "data cache": (
        "data",
        ["cache", "--stage", "3", "--data", "nobody/nothing", "--out", "OUT/c.safetensors"],
    ),
    "train --data": ("train", ["--stage", "3", "--data", "nobody/nothing", "--out", "OUT/r"]),
    "train --init": ("train", ["--stage", "1", "--init", "motus-stage1", "--out", "OUT/r"]),
    "sample": ("sample", ["--ckpt", "motus-stage1"]),
    "evaluate": ("scripts.evaluate", ["--ckpt", "motus-stage3"]),
    "weights download": ("weights.__main__", ["download", "wan", "--to", "OUT/w"]),
    "weights download dpflow": ("weights.__main__", ["download", "dpflow", "--to", "OUT/d"]),
    "pretrain": ("scripts.pretrain", ["--data", "nobody/nothing", "--out", "OUT/p"]),
    "latents": (
        "scripts.latents",
        ["pretrain", "--data", "nobody/nothing", "--out", "OUT/d.safetensors"],
    ),
}


@pytest.mark.parametrize("case", NETWORK)
def test_without_a_network_a_command_says_what_it_wanted(case, tmp_path, capsys, monkeypatch):
    """Whatever the hub's library raises, with pages of text or none: one line that names what was
    wanted and says what to do."""
    name, argv = NETWORK[case]
    places = {"OUT": str(tmp_path), "CARD": small.write_card(tmp_path)}
    argv = [re.sub("OUT|CARD", lambda found: places[found[0]], word) for word in argv]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    class HubError(Exception):  # of no kind that Python knows
        pass

    errors = [HubError("cannot reach\n\nthe hub" + "\n" * 40), ConnectionError(), OSError("no")]
    if "dpflow" in case:
        errors = [urllib.error.URLError("no route"), RuntimeError("invalid hash value")]
    for error in errors:

        def fail(*_, error=error, **__):
            raise error

        library = types.SimpleNamespace(snapshot_download=fail)
        monkeypatch.setitem(sys.modules, "huggingface_hub", library)
        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        code, said = ended(capsys, name, argv)
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in said
        assert re.search("cannot be fetched .*check its name, your network", lines[0]), said


@pytest.mark.parametrize("module", ("scripts.evaluate", "scripts.record"))
def test_a_simulator_whose_graphics_fail_says_what_to_install(
    module, tmp_path, monkeypatch, capsys
):
    """MuJoCo without a graphics library ends in whatever its libraries stumble over: here in an
    AttributeError, in the processes that hold the worlds."""
    text = "TASKS = {'walk': 'walk'}\nMISSING = 'apt-get install libosmesa6'\n\n\n"
    text += "def make(task):\n    raise AttributeError(\"None has no attribute 'glGetError'\")\n"
    (tmp_path / "no_graphics.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--sim", "no_graphics", "--tasks", "walk", "--episodes", "1", "--workers", "1"]
    words += ["--random"] if module == "scripts.evaluate" else []
    code, said = ended(capsys, module, [*words, "--out", str(tmp_path / "out")])
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in said
    assert "glGetError'; apt-get install libosmesa6" in line


def test_a_dataset_that_exists_is_refused_before_an_episode_is_tried(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    monkeypatch.setattr(record, "attempts", lambda *_: pytest.fail("tried"))
    words = ["--sim", "toy", "--tasks", "push", "--out", str(tmp_path / "set")]
    with pytest.raises(ValueError, match="set exists; remove it or write elsewhere"):
        record.main(words)


MISSING = "cv2 ftfy huggingface_hub pyarrow av triton tensorboard wandb metaworld mujoco".split()


def test_without_the_extras_every_command_says_what_to_install(tmp_path):
    """The packages that pyproject.toml calls optional are not there: commands that need one end in
    one line that says what to install, and importing needs none."""
    run = write_checkpoint(tmp_path / "run", "3")
    cases = {
        "data inspect": ("data", ["inspect", str(tmp_path)]),
        "data inspect hub": ("data", ["inspect", "nobody/nothing"]),
        "train": ("train", ["--stage", "3", "--data", str(tmp_path), "--out", "r"]),
        "train log": ("train", ["--stage", "3", "--out", "q", *"--set log_to=wandb".split()]),
        "sample": ("sample", ["--ckpt", str(run), "--data", str(tmp_path)]),
        "sample hub": ("sample", ["--ckpt", "motus-stage1"]),
        "evaluate": ("scripts.evaluate", "--sim metaworld --tasks reach --random".split()),
        "record": ("scripts.record", "--sim toy --tasks push --episodes 1 --out set".split()),
        "latents": ("scripts.latents", ["pretrain", "--data", "films", "--out", "d.safetensors"]),
        "weights": ("weights.__main__", ["download", "wan"]),
        "pretrain": ("scripts.pretrain", ["--data", str(tmp_path), "--out", "p"]),
    }
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text('{"codebase_version": "v3.0"}')
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").touch()
    program = f"""
import importlib, json, sys, contextlib, io
for name in {MISSING!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
from weights.options import run_command
found = {{}}
for case, (name, argv) in {cases!r}.items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_command(lambda: importlib.import_module(name).main(argv))
            found[case] = [0, said.getvalue()]
        except SystemExit as end:
            found[case] = [end.code, said.getvalue()]
print(json.dumps(found))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=environment,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    for case, (code, said) in json.loads(done.stdout.splitlines()[-1]).items():
        _, _, told = said.partition("error: ")
        assert code == 2 and "Traceback" not in said, (case, code, said)
        assert "pip install" in told and told.count("\n") <= 2, (case, said)


@pytest.mark.slow
def test_ctrl_c_ends_a_recording_without_a_word_of_its_processes(tmp_path):
    """A real signal to the whole group, as a terminal sends it."""
    words = "-m scripts.record --sim slow_world --tasks walk --episodes 50 --workers 2 --out set"
    (tmp_path / "slow_world.py").write_text(
        "import time\nfrom fake_world import Line, TASKS\n\n\nclass make(Line):\n"
        "    def step(self, action):\n        time.sleep(0.2)\n        super().step(action)\n"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path)))
    process = subprocess.Popen(
        [sys.executable, *words.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while {path.name for path in tmp_path.iterdir()} <= {"slow_world.py", "__pycache__"}:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "error: interrupted"
    assert not (tmp_path / "set").exists()


# -- results --------------------------------------------------------------------------------------


def refuse(word: str):
    raise ValueError(word)


def test_what_is_not_finite_is_null_in_json():
    """At any depth; paths are texts; other numbers keep every digit."""
    text = plain_json({"a": [math.inf, {"b": math.nan}, -math.inf, 0.1 + 0.2], "p": Path("x")})
    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [None, {"b": None}, None, 0.1 + 0.2], "p": "x"}


def test_results_are_written_by_the_one_function_that_knows():
    """No file of results is json.dumps'ed elsewhere."""
    for path in sources():
        text = (ROOT / path).read_text()
        assert not re.search(r"write_text\(\s*json\.dumps\((?!info)", text), path


@pytest.mark.parametrize(
    "text", ["a $$ bill", "press $\\foo$ twice", "$5 or $10", "\\frac{", "a_b^c"]
)
def test_an_instruction_is_never_a_formula(text, tmp_path):
    """Dollars and backslashes are drawn as they are written."""
    sheet(tmp_path / "a.png", "joint", [text], {"observation": np.zeros((1, 8, 8, 3), np.uint8)})
    assert (tmp_path / "a.png").is_file()
