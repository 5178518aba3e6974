"""The README and docs against the repository: what they count, link and print must be so."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import test_golden
import torch
from test_sample import write_checkpoint

import flow
import motus
import train
from scripts import readme
from weights.hub import HUB

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in readme.PAGES}
README = PAGES["README.md"]
DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
HINT = "run python -m scripts.readme"


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# -- figures and generated parts ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docs/motus.svg", "docs/pyramid.svg"])
def test_a_figure_is_well_formed_and_covers_its_own_ground(name):
    """It carries a dark ground of its own, so it reads the same on any page."""
    svg = ElementTree.fromstring((ROOT / name).read_text())
    _, _, width, height = svg.get("viewBox").split()
    ground = svg.find("{http://www.w3.org/2000/svg}rect")
    assert (ground.get("width"), ground.get("height")) == (width, height)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("name", ["docs/motus.svg", "docs/pyramid.svg"])
def test_words_in_the_figures_are_legible(name):
    """Contrast of 4.5 to 1 with the ground, the usual limit for small text."""
    svg = ElementTree.fromstring((ROOT / name).read_text())
    ground = svg.find("{http://www.w3.org/2000/svg}rect").get("fill")
    colours = {text.get("fill") for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    for colour in colours - {None}:
        assert (luminance(colour) + 0.05) / (luminance(ground) + 0.05) >= 4.5, colour


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_generated_parts_are_current(page):
    """Line counts, descriptions, tables, results and links are what the files say now."""
    assert readme.refresh(PAGES[page]) == PAGES[page], HINT


def test_the_published_weights_are_those_that_download_knows():
    """A row of the README for each name, with repository, size and licence."""
    for name, (repository, _, gigabytes, licence) in HUB.items():
        assert f"| `{name}` | {repository} | {gigabytes:g} | {licence} |" in README


def test_the_modes_are_those_of_the_method():
    """A row of the README for each mode: its two times and the question that it answers."""
    times = {flow.DENOISE: "1 → 0", flow.NOISE: "1", flow.GIVEN: "0"}
    for name, mode in flow.MODES.items():
        row = f"| `{name}` | {times[mode.video]} | {times[mode.action]} | {mode.question} |"
        assert row in README and f"docs/toy/samples/{name}.png" in README


def test_a_page_with_a_broken_marker_is_refused():
    with pytest.raises(ValueError, match="expected once each"):
        readme.refresh("<!-- sizes -->")


def test_results_that_are_not_recorded_are_said_to_be_missing(tmp_path):
    """An empty folder gives no table and one command for every kind of result."""
    text = readme.results(tmp_path)
    assert text.count("Not recorded yet") == len(readme.RESULTS) and "|" not in text


def test_results_show_the_figures_of_the_json_below_their_command(tmp_path):
    """Rates become per cent, baselines become columns, and options become the command."""
    rate = {"rate": 0.5, "interval": [0.25, 0.75], "episodes": 8, "successes": 4}
    row = {
        "policy": "vla",
        "settings": {"split": "eval"},
        "all": rate,
        "push": rate,
        "successes_per_seed": {"0": 3, "1": 1},
    }
    evaluation = {"ckpt": "runs/y", "tasks": ["push"], "seed": [0, 1], "random": True, "out": None}
    figures = {"idm": {"action MSE": {"model": 0.125}}}
    files = {
        "docs/toy/samples/figures.json": {"ckpt": "runs/x", "mode": "idm", "figures": figures},
        "docs/toy/evaluation.json": evaluation | {"rows": [row]},
        "docs/toy/latent/figures.json": {"probe R2": {"target robot": [0.75, 0.5, 0.25]}},
        "docs/toy/truth.json": {
            "steps": [1, 2],
            "figures": {"idm: x, R2": [[0.5, 0.25, 0.75]] * 2},
        },
        "weights/toy/card.json": {"command": "python -m scripts.pretrain", "vae_psnr_db": 31.25},
    }
    for path, stored in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(stored))
    text = readme.results(tmp_path)
    for part in (
        "python sample.py --ckpt runs/x --mode idm\n",
        "| `idm` | action MSE | 0.125 |",
        "| `vae_psnr_db` | 31.250 |",
        "python -m scripts.evaluate --ckpt runs/y --tasks push --seed 0 1 --random\n",
        "| `vla` | eval | 50.0 [25.0,  75.0] 4/8 | 50.0 [25.0,  75.0] 4/8 | 3, 1 |",
        "| target robot | 0.750 | 0.500 | 0.250 |",
        "python -m scripts.truth --steps 1 2\n",
        "| idm: x, R2 | 0.5 [0.25, 0.75] | 0.5 [0.25, 0.75] |",
    ):
        assert part in text


def test_what_the_demo_is_said_to_print_follows_from_presets_and_settings():
    """Stage, parameters, levels, steps and batch of each line are those that train.py prints; the
    last is trained by as many ranks as the Makefile says."""
    pattern = (
        r"^stage (\d): ([\d,]+) trained parameters, (\d+) windows, (\d+) steps of (\d+) on "
        r"(\d) x cpu; attention: .*$"
    )
    makefile = (ROOT / "Makefile").read_text()
    lines = re.findall(pattern, README, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2", "3"]
    for name, parameters, *rest in lines:
        stage = motus.STAGES[name]
        with torch.device("meta"):
            model = motus.Motus(motus.preset("toy", name))
        settings = train.settings_for("toy", name, [])
        trained = [p for e in stage.experts for p in getattr(model, e).parameters()]
        assert parameters == f"{sum(p.numel() for p in trained):,}"
        ranks = re.search(rf"nproc-per-node (\d) train.py --stage {name} ", makefile)
        wanted = (settings.windows, settings.steps, settings.batch, ranks[1] if ranks else 1)
        assert rest == [str(value) for value in wanted]


# -- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/details.md"])
def test_every_link_to_a_line_points_at_the_symbol_it_names(page):
    """Line N of the file defines the last part of the symbol."""
    links = re.findall(r"\[([^\]]*)\]\((?:\.\./)*([^)#\s]+)#L(\d+)\)", PAGES[page])
    assert len(links) > 10
    for text, path, line in links:
        name = text.strip("`").split(".")[-1]
        found = (ROOT / path).read_text().splitlines()[int(line) - 1]
        defines = rf"\s*((class|def) {name}\b|[A-Z_, ]*\b{name}\b[^=]*=)"
        assert re.match(defines, found), f"{text} at {path}:{line} is {found!r}; {HINT}"


def test_a_link_to_a_symbol_that_is_gone_is_an_error():
    """The script names the symbol and the file."""
    with pytest.raises(ValueError, match="`Motus.fly`, which motus.py does not define"):
        readme.line_of(ROOT / "motus.py", "Motus.fly")
    source = (ROOT / "motus.py").read_text().splitlines()
    line = readme.line_of(ROOT / "motus.py", "Motus.forward")
    assert source[line - 1].startswith("    def forward(")


@pytest.mark.parametrize("page", ["README.md", *map(str, DOCS)])
def test_every_local_link_and_picture_exists(page):
    """Files and headings; addresses of the web are not visited."""
    text = (ROOT / page).read_text()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in targets:
        if target.startswith("http"):
            continue
        if target.startswith("#"):
            assert target in headings, target
        else:
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


# -- commands -------------------------------------------------------------------------------------


class Parsed(Exception):
    """A command line that a program was about to parse."""

    def __init__(self, parser: argparse.ArgumentParser, parsed: argparse.Namespace | None):
        super().__init__()
        self.parser = parser
        self.parsed = parsed


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """`python` or `torchrun` words -> the module that runs, and its own words."""
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[start:]]
    name, *rest = words[2:] if words[1] == "-m" else words[1:]
    module = name.removesuffix(".py").replace("/", ".")
    package = ROOT / module / "__main__.py"
    if package.is_file():
        module += ".__main__"
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.is_file(), f"python {name} is no program of this repository"
    return module, rest


def stopped_at_the_parser(module: str, words: list[str], monkeypatch, parse: bool) -> Parsed:
    """Runs a program up to its parser; with `parse` the words must be what it takes."""
    known = argparse.ArgumentParser.parse_args

    def parse_args(parser, *given, **named):
        raise Parsed(parser, known(parser, *given, **named) if parse else None)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed) as stopped:
            importlib.import_module(module).main(words)
    return stopped.value


def options_of(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """Every option that a parser takes; of its commands those of the one in `words`, or of all."""
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            named = [name for name in action.choices if name in words]
            for name in named or action.choices:
                found |= options_of(action.choices[name], words)
    return found


def check_python(words: list[str], monkeypatch) -> None:
    """Sends the words through the program's own parser and no further."""
    if words[:3] == ["python", "-m", "pytest"]:
        return
    module, rest = program_of(words)
    main = importlib.import_module(module).main
    if not main.__code__.co_argcount:
        assert not rest
        return
    stopped = stopped_at_the_parser(module, rest, monkeypatch, parse=True)
    if module == "train":
        args = stopped.parsed
        for stage in [args.stage] if args.stage else motus.STAGES:
            train.settings_for(args.preset, stage, args.set)


def shell_lines(text: str) -> list[str]:
    """Commands in ```bash blocks, continued lines joined, and in `backticks`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]
    return list(dict.fromkeys(lines + re.findall(r"`((?:python|make) [^`\n]+)`", text)))


@pytest.mark.parametrize("command", shell_lines(README))
def test_a_command_names_a_program_and_options_that_exist(command, monkeypatch):
    """Python programs parse the line, make has the target, pip has the extra."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    makefile = (ROOT / "Makefile").read_text()
    if words[0] in ("python", "torchrun"):
        check_python(words, monkeypatch)
    elif words[0] == "make":
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    else:
        extras = re.fullmatch(r"pip install -e \.\[([\w,]+)\]", " ".join(words))
        assert extras, f"the README runs {command!r}; allowed: python, torchrun, make, pip"
        stored = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras[1].split(",")) <= set(stored["optional-dependencies"])


def mentions(text: str) -> list[str]:
    """`python PROGRAM ...` wherever it stands in prose, up to what ends a command."""
    return re.findall(r"\bpython ((?:-m )?[\w./]+(?: [^`\"'\n;,)]*)?)", text)


def check_mention(mention: str, where: str, monkeypatch) -> None:
    """The program exists and has every option that is named; placeholders may stand for values."""
    words = ["python", *mention.split()]
    third = words[2] if words[1] == "-m" else words[1]
    if third.split(".")[0] in ("pytest", "timeit", "tests", "pip") or third.startswith("tests/"):
        return
    if not (words[1] == "-m" or third.endswith(".py")):
        return
    module, rest = program_of(words)
    main = importlib.import_module(module).main
    if not main.__code__.co_argcount:
        return
    parser = stopped_at_the_parser(module, [], monkeypatch, parse=False).parser
    named = {word.split("=")[0] for word in rest if re.fullmatch(r"--[a-z][\w-]*(=\S*)?", word)}
    unknown = named - options_of(parser, rest)
    assert not unknown, f"{where}: python {mention} has {sorted(unknown)}, which do not exist"


@pytest.mark.parametrize("page", list(map(str, DOCS)))
def test_commands_in_the_docs_exist(page, monkeypatch):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for mention in mentions(text):
        check_mention(mention, page, monkeypatch)


def test_commands_in_error_messages_and_docstrings_exist(monkeypatch):
    """A remedy that names a command names one that is there, with options that it has."""
    count = 0
    for folder in (ROOT, *(ROOT / room for room in readme.ROOMS)):
        for path in sorted(folder.glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for mention in mentions(node.value):
                        check_mention(mention, f"{path.name}:{node.lineno}", monkeypatch)
                        count += 1
    assert count > 30


@pytest.mark.parametrize("page", ["metaworld", "latent_action"])
def test_the_commands_of_the_scripts_exist(page, tmp_path, monkeypatch):
    """Every line that a run.sh of docs would run, where nothing is there yet, is parsed."""
    script = tmp_path / "docs" / page / "run.sh"
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "docs" / page / "run.sh").read_text())
    run = subprocess.run(
        ["bash", script],
        env=os.environ | {"PYTHON": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [shlex.split(line) for line in run.stdout.splitlines()]
    assert len(lines) > 20
    for words in lines:
        check_python(["python", *words], monkeypatch)


@pytest.mark.parametrize("target", ["demo", "toy", "smoke"])
def test_the_commands_that_make_runs_exist(target, monkeypatch):
    """The recipes, printed and not run, hold only options that the programs have."""
    assert shutil.which("make"), "the README's two commands need make"
    make = ["make", "-n", target, "RUN=runs/none", "VENV=.venv"]
    run = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    programs = re.findall(r"^(?:[A-Z_]+=\S+ )*\.venv/bin/python (.*)$", run.stdout, re.MULTILINE)
    lines = [line for line in programs if not line.startswith("-c")]
    assert len(lines) >= 8
    for line in lines:
        check_python(["python", *shlex.split(line)], monkeypatch)


# -- examples -------------------------------------------------------------------------------------


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
    """A tiny official file, with the sections of an official config.json, stands in for the
    published one; every tensor is loaded."""
    example = next(block for block in blocks_of("python") if "from_pretrained" in block)
    size, model, _, _ = test_golden.motus_case("motus_finetune")
    stated = {
        "common": {"num_video_frames": size["frames"], "video_action_freq_ratio": size["ratio"]},
        "action_expert": {"norm_eps": size["action_eps"]},
        "und_expert": {"norm_eps": size["und_eps"]},
        "wan": {"num_heads": size["heads"], "text_len": size["text_len"]},
    }
    folder = tmp_path / "weights/motus-stage3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stated))
    official = test_golden.FOLDER / f"motus_finetune{test_golden.MOTUS_SUFFIX}"
    shutil.copy(official, folder / "mp_rank_00_model_states.pt")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    loaded = names["model"].state_dict()
    assert capsys.readouterr().out == "3 16\n" and loaded.keys() == model.state_dict().keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())
