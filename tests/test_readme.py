"""The README against the repository: what it counts, links, commands and prints must be so."""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import test_golden
import torch
from test_sample import write_checkpoint

import motus
import train

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import figure  # noqa: E402

README = (ROOT / "README.md").read_text()
HINT = "run python docs/figure.py"


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# -- figures and generated parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", figure.FIGURES)
def test_a_figure_is_what_the_script_draws(name):
    """The committed file is current, is well-formed, and covers its own ground."""
    drawn = (ROOT / name).read_text()
    assert drawn == figure.FIGURES[name](), HINT
    svg = ElementTree.fromstring(drawn)
    _, _, width, height = svg.get("viewBox").split()
    ground = svg.find("{http://www.w3.org/2000/svg}rect")
    assert (ground.get("width"), ground.get("height"), ground.get("fill")) == (
        width,
        height,
        figure.GROUND,
    )


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), parts)
    )


GROUNDS = [figure.GROUND, *figure.FILL.values()]


@pytest.mark.parametrize(
    "text, grounds",
    [
        (figure.TEXT, GROUNDS),
        (figure.MUTED, GROUNDS),
        *((colour, [figure.GROUND]) for colour in (figure.VIDEO, figure.ACTION, figure.UND)),
    ],
)
def test_words_in_the_figures_are_legible(text, grounds):
    """Contrast of 4.5 to 1, the usual limit for small text; the page behind, light or dark, does not enter."""
    for ground in grounds:
        assert (luminance(text) + 0.05) / (luminance(ground) + 0.05) >= 4.5


@pytest.mark.parametrize("name", figure.BLOCKS)
def test_a_generated_part_is_current(name):
    """Line counts, descriptions, tables and results are what the script makes of the files as they are."""
    stands = README[README.index(f"<!-- {name} -->") : README.index(f"<!-- /{name} -->")]
    assert stands == f"<!-- {name} -->\n{figure.BLOCKS[name](ROOT)}\n", HINT


def test_results_that_are_not_recorded_are_said_to_be_missing(tmp_path):
    """An empty folder gives no table and one command for every kind of result."""
    text = figure.results(tmp_path)
    assert text.count("not recorded yet") == len(figure.RESULTS) and "|" not in text


def test_results_show_the_figures_of_the_json_below_their_command(tmp_path):
    """Rates become per cent, baselines become columns, and options become the command."""
    rate = {"rate": 0.5, "interval": [0.25, 0.75], "episodes": 8, "successes": 4}
    rows = [
        {
            "policy": "vla",
            "split": "eval",
            "look": "clean",
            "all": rate,
            "push": rate,
            "mean_steps": None,
        }
    ]
    samples = {
        "ckpt": "runs/x",
        "mode": "idm",
        "figures": {"idm": {"action MSE": {"model": 0.125}}},
    }
    evaluation = {"ckpt": "runs/x", "seed": [0, 1], "random": True, "out": None, "rows": rows}
    probes = {"probe R2": {"target robot": [0.75, 0.5, 0.25]}}
    card = {"command": "python train.py --stage backbones", "vae_psnr_db": 31.25}
    simulated = {
        "sim": "metaworld",
        "tasks": ["push"],
        "ckpt": "runs/y",
        "settings": {"size": 96},
        "rows": [
            {"policy": "joint", "all": rate, "push": rate, "successes_per_seed": {"0": 3, "1": 1}}
        ],
    }
    downstream = {
        "about": "`python d.py`",
        "savings": {
            "joint": {
                "saving": [2.0, 1.0],
                "interval": [[1.5, 2], [0.5, 1]],
                "reached": [False, True],
            }
        },
        "cells": {
            f"{arm}/{seed}/{n}": {
                "joint": {"successes": n // 10 * arm.count("stage") + seed, "episodes": 100}
            }
            for arm in ("stage 1", "stages 1, 2")
            for seed in (0, 1)
            for n in (100, 200)
        },
    }
    files = {
        "docs/toy/samples/figures.json": samples,
        "docs/toy/evaluation.json": evaluation,
        "docs/toy/latent/figures.json": probes,
        "weights/toy/card.json": card,
        "docs/metaworld/one_step/evaluation.json": simulated,
        "docs/latent_action/downstream.json": downstream,
    }
    for path, stored in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(stored))
    text = figure.results(tmp_path)
    for part in (
        "python sample.py --ckpt runs/x --mode idm\n",
        "| `idm` | action MSE | 0.125 |",
        "| `vae_psnr_db` | 31.250 |",
        "python evaluate.py --sim metaworld --tasks push --ckpt runs/y\n",
        "| push | 50.0 [25.0, 75.0] of 8 |",
        "| seeds | 3, 1 |",
        "| stages 1, 2 | 10 (10, 11) | 20 (20, 21) |",
        "more than 2.0 [1.5, 2.0] | 1.0 [0.5, 1.0] |",
        "| target robot | 0.750 | 0.500 | 0.250 |",
        "python evaluate.py --ckpt runs/x --seed 0 1 --random\n",
        "| `vla` | eval | clean | 50.0 [25.0, 75.0] of 8 | 50.0 [25.0, 75.0] of 8 |  |",
    ):
        assert part in text
    assert "not recorded" not in text


def test_what_the_demo_is_said_to_print_follows_from_presets_and_settings():
    """Stage, parameters, levels, steps and batch of each line are those that train.py would print."""
    lines = re.findall(
        r"^stage (\d): ([\d,]+) trained parameters, (\d+) windows of levels (\(.*\)), (\d+) steps of (\d+) on 1 x cpu$",
        README,
        re.MULTILINE,
    )
    assert [line[0] for line in lines] == list(train.STAGES)
    for (name, parameters, *rest), stage in zip(lines, train.STAGES.values()):
        with torch.device("meta"):
            model = motus.Motus(
                motus.preset(
                    "toy",
                    **({} if stage.finetune else dict(finetune=False, ratio=1, action_dim=14)),
                )
            )
        settings = train.settings_for("toy", name, [])
        assert (
            parameters
            == f"{sum(p.numel() for e in stage.experts for p in getattr(model, e).parameters()):,}"
        )
        assert rest == [
            str(settings.windows),
            str(stage.levels),
            str(settings.steps),
            str(settings.batch),
        ]


# -- links ------------------------------------------------------------------------------------------------------------------


def test_every_link_to_a_line_points_at_the_symbol_it_names():
    """Line N of the file defines the last part of the symbol."""
    links = re.findall(r"\[([^\]]*)\]\(([^)#\s]+)#L(\d+)\)", README)
    assert len(links) > 30
    for text, path, line in links:
        name = text.strip("`").split(".")[-1]
        found = (ROOT / path).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*((class|def) {name}\b|[A-Z_, ]*\b{name}\b[^=]*=)", found), (
            f"{text} at {path}:{line} is {found!r}; {HINT}"
        )
    assert figure.refresh(README) == README, HINT


def test_a_link_to_a_symbol_that_is_gone_is_an_error():
    """The script names the symbol and the file."""
    with pytest.raises(ValueError, match="`Motus.fly`, which motus.py does not define"):
        figure.line_of(ROOT / "motus.py", "Motus.fly")
    source = (ROOT / "motus.py").read_text().splitlines()
    assert source[figure.line_of(ROOT / "motus.py", "Motus.velocity") - 1].startswith(
        "    def velocity("
    )


def test_every_local_link_and_picture_exists():
    """Files and headings; addresses of the web are not visited."""
    targets = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", README
    )
    headings = {
        "#" + heading.lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    local = [target for target in targets if not target.startswith("https://")]
    assert local and all(
        target in headings if target.startswith("#") else (ROOT / target.split("#")[0]).exists()
        for target in local
    )


# -- commands ---------------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """A command line that the program accepts."""


def commands() -> list[str]:
    shell = [line for block in blocks_of("bash") for line in block.splitlines() if line]
    return list(dict.fromkeys(shell + re.findall(r"`((?:python|make) [^`\n]+)`", README)))


def check_python(words: list[str], monkeypatch) -> None:
    """Sends the words through the program's own parser and no further."""
    known = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **named):
        raise Parsed(known(parser, *given, **named))

    name, *words = words[1:] if words[0] == "-m" else words
    program = name.removesuffix(".py").replace("/", ".")
    path = ROOT / (program.replace(".", "/") + ".py")
    assert path.is_file(), f"python {name} is no program of this repository"
    if program.startswith("docs."):  # no package: a module by its path
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    else:
        module = importlib.import_module(program)
    main = getattr(module, "main", None)
    if main is None or not inspect.signature(main).parameters:
        assert not [word for word in words if word.startswith("-")]
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as parsed:
        main(words)
    if program == "train" and "--plan" not in words:
        args = parsed.value.args[0]
        assert args.stage in (*train.STAGES, *train.OTHER_STAGES)
        train.settings_for(args.preset, args.stage, args.set)


@pytest.mark.parametrize("command", commands())
def test_a_command_names_a_program_and_options_that_exist(command, monkeypatch):
    """Python programs parse the line, make has the target, pip has the extra."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    makefile = (ROOT / "Makefile").read_text()
    if words[0] == "torchrun":  # its own options end at --
        words = ["python", *words[words.index("--") + 1 :]]
    if words[0] == "python":
        check_python(words[1:], monkeypatch)
    elif words[0] == "make":
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    else:
        extras = re.fullmatch(r"pip install -e \.\[([\w,]+)\]", " ".join(words))
        assert extras, (
            f"the README runs {command!r}; allowed: python, torchrun, make, pip install -e .[EXTRA]"
        )
        assert set(extras[1].split(",")) <= set(
            tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        )


def test_the_commands_of_the_simulator_script_exist(tmp_path, monkeypatch):
    """Every line that docs/metaworld/run.sh would run, where nothing is there yet, is one that the programs parse."""
    (script := tmp_path / "docs/metaworld/run.sh").parent.mkdir(parents=True)
    script.write_text((ROOT / "docs/metaworld/run.sh").read_text())
    printed = subprocess.run(
        ["bash", script],
        env=os.environ | {"PYTHON": "echo"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [shlex.split(line) for line in printed.splitlines()]
    assert {line[0] for line in lines} == {
        "evaluate.py",
        "data.py",
        "train.py",
        "latent_action.py",
    } and len(lines) > 20
    for words in lines:
        with monkeypatch.context() as patch:
            check_python(words, patch)


@pytest.mark.parametrize("target", ["demo", "toy", "smoke"])
def test_the_commands_that_make_runs_exist(target, monkeypatch):
    """The recipes, printed and not run, hold only options that the programs have."""
    assert shutil.which("make"), "the README's two commands need make"
    make = ["make", "-n", target, "RUN=runs/none", "VENV=.venv"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    programs = re.findall(
        r"^(?:TQDM_DISABLE=1 )?\.venv/bin/python (?!-m)(.*)$", printed, re.MULTILINE
    )
    assert len(programs) == 9
    for line in programs:
        check_python(shlex.split(line), monkeypatch)
        monkeypatch.undo()


# -- examples ---------------------------------------------------------------------------------------------------------------


def test_the_acting_example_runs(tmp_path, monkeypatch):
    """With any checkpoint at the place it names; shapes are those of its comment."""
    example = next(block for block in blocks_of("python") if "Policy" in block)
    write_checkpoint(tmp_path / "runs/demo/stage3", "3")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    for name, kind in (("actions", "robot units"), ("video", "uint8")):
        assert f"{tuple(names[name].shape)} {kind}" in example
    assert names["success"].shape == (4,)


def test_the_loading_example_runs_on_a_file_of_the_official_code(tmp_path, monkeypatch, capsys):
    """A tiny official file, with the sections of an official config.json, stands in for the published one; every tensor is loaded."""
    example = next(block for block in blocks_of("python") if "from_pretrained" in block)
    size, model, _, _ = test_golden.motus_case("motus_finetune")
    stated = {
        "common": {"num_video_frames": size["frames"], "video_action_freq_ratio": size["ratio"]},
        "action_expert": {"norm_eps": size["action_eps"]},
        "und_expert": {"norm_eps": size["und_eps"]},
        "wan": {"num_heads": size["heads"], "text_len": size["text_len"]},
    }
    (tmp_path / "weights/motus-stage3").mkdir(parents=True)
    (tmp_path / "weights/motus-stage3/config.json").write_text(json.dumps(stated))
    official = test_golden.FOLDER / f"motus_finetune{test_golden.MOTUS_SUFFIX}"
    shutil.copy(official, tmp_path / "weights/motus-stage3/mp_rank_00_model_states.pt")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert (
        capsys.readouterr().out == "3 16\n"
        and names["model"].state_dict().keys() == model.state_dict().keys()
    )
    for name, tensor in names["model"].state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(
            tensor, model.state_dict()[name].bfloat16()
        )
