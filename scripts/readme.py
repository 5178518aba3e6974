"""Fills in what README.md and docs say about files, sizes and results: run it after any change.

    python -m scripts.readme     rewrites the generated parts of README.md and two pages of docs/

Generated are the parts between `<!-- NAME -->` and `<!-- /NAME -->` (`BLOCKS`), and the line of
every link whose text is a symbol of the file it leads to. Numbers come from the code and from
committed json files, each beside the command that wrote it; what has not been recorded is said to
be missing. `tests/test_readme.py` fails while any of this is out of date.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from motus import PRESETS, STAGES
from scale.plan import meta_model, parameters
from train import settings_for
from weights.options import run_command

ROOT = Path(__file__).resolve().parent.parent
LESSON = ("attention", "flow", "motus", "latent_action", "data", "train", "sample")
ROOMS = ("weights", "backbones", "kernels", "formats", "worlds", "scale", "scripts")
PAGES = ("README.md", "docs/details.md", "docs/results.md")


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; floats with three digits."""

    def show(cell: object) -> str:
        if isinstance(cell, float):
            cell = f"{cell:.3g}" if cell < 1000 else f"{cell:,.0f}"
        return str(cell).replace("|", "\\|")

    lines = [" | ".join(map(show, line)) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


# -- what the files are ---------------------------------------------------------------------------


def description(path: Path) -> str:
    """The first sentence of a file's docstring, without the section of the paper."""
    doc = ast.get_docstring(ast.parse(path.read_text()))  # each file has one: tests/test_house.py
    first = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", first)[0]


def lesson() -> str:
    """The seven files in reading order, with their lines."""
    paths = [ROOT / f"{name}.py" for name in LESSON]
    rows = [
        (f"[{p.name}]({p.name})", len(p.read_text().splitlines()), description(p)) for p in paths
    ]
    return table(("file", "lines", "what it is"), rows)


def rooms() -> str:
    """The folders: what each is for, from its `__init__.py`, and its files."""
    rows = []
    for room in ROOMS:
        files = [p for p in sorted((ROOT / room).glob("*.py")) if not p.stem.startswith("__")]
        names = ", ".join(f"[{p.stem}]({room}/{p.name})" for p in files)
        rows.append((f"[{room}]({room})", description(ROOT / room / "__init__.py"), names))
    return table(("room", "one job", "files"), rows)


def demo() -> str:
    """The last lines that `make demo` prints, as they were recorded."""
    return f"```text\n{(ROOT / 'docs/toy/demo.txt').read_text()}```"


def stages() -> str:
    """The table of the stages, with the toy's steps."""
    about = {  # actions -> losses, and the actions in words
        "none": ("video", "none"),
        "labels": ("reconstruction + alignment + KL", "labels on a tenth of the rows"),
        "latent": ("video + action", "14 latent numbers"),
        "real": ("video + action", "the robot's own, and its state"),
    }
    rows = []
    for name, stage in STAGES.items():
        experts = ", ".join(stage.experts).replace("und", "understanding")
        levels = ", ".join(map(str, stage.levels))
        steps = [f"{settings_for('toy', name, [], long).steps:,}" for long in (False, True)]
        trained = experts or "latent-action VAE"
        rows.append((f"`{name}`", levels, trained, *about[stage.actions], *steps))
    head = ("stage", "levels", "trained", "losses", "actions", "toy steps", "long recipe")
    return table(head, rows)


def sizes() -> str:
    """Parameters of the presets in the form of stage 3, counted on the meta device."""
    rows = []
    for name, row in PRESETS.items():
        config = row.motus
        model = meta_model(name, "3")
        parts = (model.video, model.action, model.und, model)
        counts = [f"{parameters(part):,}" for part in parts]
        video = config.video
        heads = f"{video.layers} x {video.heads} x {video.head_dim}"
        folder = f"`{row.backbones.resolve().relative_to(ROOT)}`" if row.backbones else "none"
        chunk = f"{config.frames} + {config.chunk}"
        rows.append((f"`{name}`", *counts, heads, chunk, folder))
    head = ("preset", "video expert", "action expert", "understanding", "trained in stage 3")
    more = ("layers x heads x size", "frames + actions", "backbones in")
    return table((*head, *more), rows)


# -- results --------------------------------------------------------------------------------------


def shell(*commands: str) -> str:
    return "\n".join(["```bash", *commands, "```\n\n"])


def command(program: str, options: dict) -> str:
    """The command that a json file of results says it was written by."""
    words = ["python", program]
    for name, value in options.items():
        if value is not False and value not in (None, "", []):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shell(" ".join(words).replace(" True", ""))


def backbones_result(card: dict) -> str:
    """Figures of frozen backbones, below the commands that made them."""
    commands = [value for name, value in card.items() if name.endswith("command")]
    rows = [(f"`{k}`", f"{v:.3f}") for k, v in card.items() if not k.endswith("command")]
    return shell(*commands) + table(("figure", "value"), rows)


def latent_result(stored: dict) -> str:
    """How much of the true motion a linear map reads from the latents."""
    probes = next(iter(stored.values()))
    rows = [(who, *(f"{value:.3f}" for value in values)) for who, values in probes.items()]
    return shell("make toy") + table(("linear probe, R2", "x", "y", "opening"), rows)


def samples_result(stored: dict) -> str:
    """Model against its baselines, per mode and figure."""
    columns = ("model", "copy", "vae", "mean")
    rows = []
    for mode, figures in stored.pop("figures").items():
        for name, found in figures.items():
            cells = [f"{found[column]:.4g}" if column in found else "" for column in columns]
            rows.append((f"`{mode}`", name, *cells))
    return command("sample.py", stored) + table(("mode", "figure", *columns), rows)


def percent(rate: dict) -> str:
    """A rate of success in per cent, with its interval."""
    low, high = (100 * bound for bound in rate["interval"])
    share = f"{100 * rate['rate']:5.1f} [{low:4.1f}, {high:5.1f}]"
    return f"{share} {rate['successes']}/{rate['episodes']}"


def evaluation_result(stored: dict) -> str:
    """Success in closed loop: a line per policy and world, a column per task."""
    played = stored.pop("rows")
    settings = list(dict.fromkeys(key for row in played for key in row.get("settings", ())))
    groups = [name for name in ("all", *stored["tasks"]) if any(name in row for row in played)]
    rows = []
    for row in played:
        cells = [row.get("settings", {}).get(key, "") for key in settings]
        cells += [percent(row[group]).strip() if group in row else "" for group in groups]
        seeds = ", ".join(map(str, row["successes_per_seed"].values()))
        rows.append((f"`{row['policy']}`", *cells, seeds))
    stored |= {"tasks": ",".join(stored["tasks"]), "settings": None}
    head = ("policy", *settings, *(f"{group} %" for group in groups), "successes per seed")
    return command("-m scripts.evaluate", stored) + table(head, rows)


def truth_result(stored: dict) -> str:
    """Modes against the simulator: a column per number of Euler steps."""
    rows = []
    for name, values in stored.pop("figures").items():
        rows.append((name, *("{:.3g} [{:.3g}, {:.3g}]".format(*value) for value in values)))
    head = ("figure", *(f"{n} steps" for n in stored["steps"]))
    return command("-m scripts.truth", stored) + table(head, rows)


# Where results lie, their title, how they are shown, and the command that writes such a file.
RESULTS = (
    (
        "weights/toy/card.json",
        "The toy's frozen backbones",
        backbones_result,
        "python -m scripts.pretrain",
    ),
    (
        "docs/toy/latent/figures.json",
        "Latent actions of held-out episodes",
        latent_result,
        "make toy",
    ),
    ("docs/toy/samples*/figures.json", "Sampling held-out episodes", samples_result, "make toy"),
    (
        "docs/toy/truth.json",
        "Whether the modes are true",
        truth_result,
        "python -m scripts.truth --out docs/toy/truth.json",
    ),
    ("docs/toy/**/evaluation.json", "Acting in closed loop", evaluation_result, "make toy"),
    (
        "docs/metaworld/*_step*/evaluation.json",
        "MetaWorld in closed loop",
        evaluation_result,
        "bash docs/metaworld/run.sh",
    ),
)


def results(root: Path = ROOT) -> str:
    """All committed results; a kind of which there is none says so, and how to make it."""
    parts = []
    for pattern, title, show, make in RESULTS:
        missing = f"Not recorded yet; `{make}` writes `{pattern}`."
        found = []
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root)
            found.append(f"[{name}](../{name}):\n\n{show(json.loads(path.read_text()))}")
        parts += [f"## {title}\n\n{text}" for text in found or [missing]]
    return "\n\n".join(parts)


BLOCKS = {block.__name__: block for block in (demo, lesson, stages, sizes, rooms, results)}

# -- links to lines -------------------------------------------------------------------------------

LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)*)([\w/]+\.py)#L(\d+)\)")


def line_of(path: Path, symbol: str) -> int:
    """The line where `name` or `Class.name` is defined: a class, function or assignment."""
    body = r".*\n(?:(?:[ )].*)?\n)*?    "  # from a class's first line to one of its members
    names = [rf"(?:(?:class|def) {name}\b|{name}\b.* = )" for name in symbol.split(".")]
    text = path.read_text()
    found = re.search("^" + body.join(names), text, re.MULTILINE)
    if not found:
        raise ValueError(
            f"a link names `{symbol}`, which {path.name} does not define; name another"
        )
    return text.count("\n", 0, found.end()) + 1


def refresh(text: str) -> str:
    """A page with its generated parts and line numbers brought up to date."""
    for name in re.findall(r"<!-- (\w+) -->", text):
        begin = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        if name not in BLOCKS or text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{begin} and {end} are expected once each, of {', '.join(BLOCKS)}")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{BLOCKS[name]()}\n{end}{after}"
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}{m[3]}#L{line_of(ROOT / m[3], m[1])})", text)


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(refresh(page.read_text()))
    print(f"wrote the generated parts of {', '.join(PAGES)}")


if __name__ == "__main__":
    run_command(main)
