"""Draws the figures of the README and fills in what it says about files, sizes and results: run it after any change.

    python docs/figure.py            writes docs/motus.svg, docs/pyramid.svg and the generated parts of README.md

Generated are the parts between `<!-- NAME -->` and `<!-- /NAME -->` (`BLOCKS`), and the line of every link whose text is a symbol of the
file it leads to. Numbers come from the code and from committed json files, each beside the command that wrote it; what has not been
recorded is said to be missing. `tests/test_readme.py` fails while any of this is out of date.

The figures are plain SVG text and carry their own dark ground, like the pictures of `sample.py`, so they read the same on any page.
"""

import ast
import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import torch

import latent_action
import motus
import train
from weights import __main__, hub
from worlds import motions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import flow  # noqa: E402
from motus import PRESETS, Motus
from worlds.tabletop import LEVELS

# -- drawing ----------------------------------------------------------------------------------------------------------------

GROUND, TEXT, MUTED = "#15181e", "#e4e6ea", "#a3abb8"
VIDEO, ACTION, UND = "#8fb8ff", "#ffab4a", "#8fd19e"
FILL = {VIDEO: "#1f2c42", ACTION: "#3a2c1b", UND: "#20342a", MUTED: "#23272f", TEXT: "#2a2440"}


class Drawing:
    """A list of SVG elements on a ground of its own."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
            'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = TEXT,
        size: int = 13,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str,
        *lines: str,
        dashed: bool = False,
    ) -> None:
        """A rounded box; its first line is bold, the others are small."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{FILL[colour]}" '
            f'stroke="{colour}" stroke-width="1.5"{dash}/>'
        )
        top = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
        for i, line in enumerate(lines):
            self.text(
                x + width / 2,
                top + 17 * i,
                line,
                TEXT if i == 0 else MUTED,
                13 if i == 0 else 12,
                bold=i == 0,
            )

    def arrow(self, x0: float, y0: float, x1: float, y1: float, colour: str = MUTED) -> None:
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = 7 * (x1 - x0) / length, 7 * (y1 - y0) / length
        head = f"M{x1:g} {y1:g}L{x1 - dx - dy / 2:g} {y1 - dy + dx / 2:g}L{x1 - dx + dy / 2:g} {y1 - dy - dx / 2:g}Z"
        self.parts.append(
            f'<path d="M{x0:g} {y0:g}L{x1 - dx:g} {y1 - dy:g}" stroke="{colour}" stroke-width="1.8"/>'
            f'<path d="{head}" fill="{colour}"/>'
        )

    def shape(self, points: Iterable[tuple[float, float]], colour: str) -> None:
        corners = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polygon points="{corners}" fill="{FILL[colour]}" stroke="{colour}" stroke-width="1.5"/>'
        )

    def dot(self, x: float, y: float, colour: str, full: bool = True) -> None:
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="7" fill="{colour if full else GROUND}" stroke="{colour}" stroke-width="2"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def draw_motus() -> str:
    """Three experts, one attention: the layer, what goes in and what comes out, with the sizes of preset full."""
    c = PRESETS["full"]
    d = Drawing(960, 446, "Motus: three experts meet in one joint attention per layer")
    d.parts.append(
        f'<rect x="212" y="18" width="532" height="412" rx="12" fill="none" stroke="{MUTED}" stroke-dasharray="3 5"/>'
    )
    d.text(
        478,
        41,
        f"one layer of {c.video.layers}: the attention is the only place where the experts meet",
        MUTED,
        12,
    )
    d.box(
        16,
        60,
        174,
        84,
        VIDEO,
        "noisy video latents",
        "of a frozen VAE; frame 0,",
        "what is seen, stays clean",
    )
    d.box(
        16,
        194,
        174,
        84,
        ACTION,
        "noisy actions",
        "after the clean state,",
        f"before {c.registers} registers",
    )
    d.box(
        16,
        328,
        174,
        84,
        MUTED,
        "frozen VLM",
        "reads what is seen",
        "and the instruction",
        dashed=True,
    )
    d.box(430, 60, 100, 352, TEXT)
    rows = (
        (VIDEO, 60, "Video expert", c.video.width, c.video.ffn, "text by cross attention", "video"),
        (
            ACTION,
            194,
            "Action expert",
            c.action_width,
            c.expert_ffn * c.action_width,
            "gated by its clock",
            "action",
        ),
        (
            UND,
            328,
            "Understanding expert",
            c.und_width,
            c.expert_ffn * c.und_width,
            "no clock",
            "understanding",
        ),
    )
    for colour, y, name, width, ffn, note, tokens in rows:
        d.arrow(190, y + 42, 222, y + 42, MUTED if colour == UND else colour)
        d.box(224, y, 178, 84, colour, name, f"{width:,} wide", "norm, then q, k, v")
        d.arrow(402, y + 42, 428, y + 42, colour)
        d.text(480, y + 46, tokens, TEXT, 12)
        d.arrow(530, y + 42, 556, y + 42, colour)
        d.box(558, y, 172, 84, colour, "own output and FFN", note, f"FFN {ffn:,} wide")
    d.text(480, 165, "joint", TEXT, 14, bold=True)
    d.text(480, 183, "attention", TEXT, 14, bold=True)
    d.text(480, 300, f"{c.video.heads} heads", MUTED, 12)
    d.text(480, 317, f"of {c.video.head_dim}", MUTED, 12)
    for colour, y, what, clock in (
        (VIDEO, 60, "video velocity", "t_video"),
        (ACTION, 194, "action velocity", "t_action"),
    ):
        d.arrow(730, y + 42, 764, y + 42, colour)
        d.box(766, y, 178, 84, colour, what, "noise - data", f"at time {clock}")
    d.text(855, 354, "t = 1 is noise, t = 0 is data", TEXT, 12)
    d.text(855, 374, "which clock runs, and which", MUTED, 12)
    d.text(855, 391, "stands still, is the mode", MUTED, 12)
    return str(d)


# What the levels are, bottom up (`data.py`); the bodies that the toy records come from its world.
PYRAMID = (
    "web data",
    "egocentric human video",
    "synthetic data",
    "task-agnostic motion",
    "other robots",
    "the target robot",
)


def draw_pyramid() -> str:
    """Six levels of data, and which of them each stage of training reads."""
    d = Drawing(960, 404, "The data pyramid and the stages that train on it")
    columns = {
        "1": ("stage 1", VIDEO),
        "latent": ("latent", UND),
        "2": ("stage 2", TEXT),
        "3": ("stage 3", ACTION),
    }
    levels = {
        "latent": tuple(LEVELS),
        **{name: stage.levels for name, stage in motus.STAGES.items()},
    }
    for i, (title, colour) in enumerate(columns.values()):
        d.text(664 + 80 * i, 40, title, colour, 13, bold=True)
    for number, words in enumerate(PYRAMID, 1):
        top = 56 + 52 * (6 - number)
        half = [52 + 28 * (6 - number + edge) for edge in (0, 0.86)]
        colour = MUTED if number == 1 else ACTION if number == 6 else VIDEO
        d.shape(
            [
                (240 - half[0], top),
                (240 + half[0], top),
                (240 + half[1], top + 45),
                (240 - half[1], top + 45),
            ],
            colour,
        )
        d.text(
            240, top + 28, str(number) if number == 6 else f"{number}: {words}", TEXT, 13, bold=True
        )
        if number == 6:
            d.text(326, top + 28, words, TEXT, 13, anchor="start", bold=True)
        bodies = LEVELS.get(number, {}).get("bodies", ("inside the backbones",))
        d.text(612, top + 28, ", ".join(bodies), MUTED, 12, anchor="end")
        for i, (name, (_, colour)) in enumerate(columns.items()):
            if number in levels[name]:
                d.dot(
                    664 + 80 * i, top + 23, colour, name != "latent" or number in motions.LABELLED
                )
    d.text(612, 40, "in the toy", MUTED, 12, anchor="end")
    d.text(944, 390, "hollow: flow without action labels", MUTED, 12, anchor="end")
    return str(d)


FIGURES = {"docs/motus.svg": draw_motus, "docs/pyramid.svg": draw_pyramid}

# -- the generated parts of the README --------------------------------------------------------------------------------------

READING_ORDER = (
    "attention",
    "flow",
    "motus",
    "latent_action",
    "data",
    "train",
    "sample",
    "evaluate",
    "report",
    "bench",
    "scale",
    "plan",
    "kernels",
    "pyramid",
    "latent_data",
)


def table(head: Iterable[str], rows: Iterable[Iterable[object]], right: Iterable[int] = ()) -> str:
    """A Markdown table; columns numbered in `right` are aligned to the right."""
    head = list(head)
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    return "\n".join(
        [
            line(head),
            line("---:" if i in right else "---" for i in range(len(head))),
            *map(line, rows),
        ]
    )


def sources(root: Path) -> list[Path]:
    """The source files in reading order: the method, then what else lies in the root, then the folders."""
    top = sorted(
        root.glob("*.py"),
        key=lambda p: (
            READING_ORDER.index(p.stem) if p.stem in READING_ORDER else len(READING_ORDER),
            p.stem,
        ),
    )
    folders = [
        p
        for folder in ("backbones", "formats", "worlds", "docs")
        for p in sorted((root / folder).glob("*.py"))
    ]
    return [*top, *(p for p in folders if p.stem != "__init__")]


def description(path: Path) -> str:
    """The first sentence of a file's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text()))
    if not doc:
        raise ValueError(f"{path} has no docstring; its first sentence goes into the README")
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(doc.split("\n\n")[0].split()))[0]


def files(root: Path) -> str:
    """Every source file with its lines and what it is."""
    rows = [
        (
            f"[{p.relative_to(root)}]({p.relative_to(root)})",
            len(p.read_text().splitlines()),
            description(p),
        )
        for p in sources(root)
    ]
    return table(("file", "lines", "what it is"), rows, right=(1,))


def modes(root: Path) -> str:
    """The table of `flow.py` as times, with the pictures that have been committed."""
    times, rows, films = {flow.DENOISE: "1 → 0", flow.NOISE: "1", flow.GIVEN: "0"}, [], []
    questions = {
        cells[0]: cells[-1]
        for line in flow.__doc__.splitlines()
        if len(cells := re.split(r"\s{2,}", line.strip())) == 4
    }
    for name, mode in flow.MODES.items():
        sheet = f"docs/toy/samples/{name}.png"
        missing = f"`{sheet}` is not recorded yet"
        picture = (
            f'<a href="{sheet}"><img src="{sheet}" width="360" alt="{name}"></a>'
            if (root / sheet).is_file()
            else missing
        )
        rows.append(
            (f"`{name}`", times[mode.video], times[mode.action], questions[name] + "?", picture)
        )
        films += [
            f'<img src="{film}" alt="{name}">'
            for film in [f"docs/toy/samples/{name}_0.gif"]
            if (root / film).is_file()
        ]
    shown = table(("mode", "`t_video`", "`t_action`", "question", "held-out episodes"), rows)
    return "\n\n".join([shown, " ".join(films)]) if films else shown


def stages(root: Path) -> str:
    """The table of `train.py`, with the toy's steps."""
    loss = {"none": "video", "latent": "video + action", "real": "video + action"}
    latents = latent_action.PRESETS["full"].latent_dim
    actions = {
        "none": "none",
        "latent": f"{latents} latent numbers",
        "real": "the robot's own, and its state",
    }
    names = {"video": "video", "action": "action", "und": "understanding"}
    steps = lambda stage: train.settings_for("toy", stage, []).steps
    rows = [
        (
            f"`--stage {name}`",
            ", ".join(map(str, stage.levels)),
            ", ".join(names[e] for e in stage.experts),
            loss[stage.actions],
            actions[stage.actions],
            f"{steps(name):,}",
        )
        for name, stage in motus.STAGES.items()
    ]
    latent = (
        "`--stage latent`",
        ", ".join(map(str, LEVELS)),
        "latent-action VAE",
        "reconstruction + alignment + KL",
        f"labels on levels {' and '.join(map(str, motions.LABELLED))}",
        f"{steps('latent'):,}",
    )
    return table(
        ("stage", "levels", "trained", "losses", "actions", "toy steps"),
        [rows[0], latent, *rows[1:]],
        right=(5,),
    )


def sizes(root: Path) -> str:
    """Parameters of the presets in the form of stage 3, counted on the meta device."""
    rows = []
    for name, c in PRESETS.items():
        with torch.device("meta"):
            model = Motus(c)
        count = lambda module: f"{sum(p.numel() for p in module.parameters()):,}"
        rows.append(
            (
                f"`{name}`",
                *map(count, (model.video, model.action, model.und, model)),
                f"{c.video.layers} x {c.video.heads} x {c.video.head_dim}",
                f"{c.frames} + {c.chunk}",
                f"`{Path(motus.PRESETS[name].backbones).resolve().relative_to(ROOT)}`"
                if motus.PRESETS[name].backbones
                else "none",
            )
        )
    head = (
        "preset",
        "video expert",
        "action expert",
        "understanding",
        "trained in stage 3",
        "layers x heads x size",
        "frames + actions",
        "backbones in",
    )
    return table(head, rows, right=(1, 2, 3, 4))


def published(root: Path) -> str:
    """What `python -m backbones.weights download` knows, with the sizes that it prints."""
    rows = [
        (f"`{name}`", repository, f"{gigabytes:g}", licence)
        for name, (repository, _, _, gigabytes, licence) in hub.HUB.items()
    ]
    return table(("name", "repository", "about GB", "licence"), rows, right=(2,))


def tables(root: Path) -> str:
    """What `python -m backbones.weights tables` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        __main__.main(["tables"])
    return f"```text\n{printed.getvalue()}```"


# -- results ----------------------------------------------------------------------------------------------------------------


def command(program: str, options: dict) -> str:
    """The command that a json file of results says it was written by."""
    words = [f"python {program}"]
    for name, value in options.items():
        if (
            value is None
            or value is False
            or value in ("", [])
            or (name in ("preset", "batch", "workers") and not options.get("sim"))
        ):
            continue  # left out, or said of simulators alone
        values = [] if value is True else value if isinstance(value, list) else [value]
        words.append(" ".join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return "```bash\n" + " ".join(words) + "\n```"


def backbones_result(card: dict) -> str:
    commands = [value for name, value in card.items() if name.endswith("command")]
    figures = [
        (f"`{name}`", f"{value:.3f}")
        for name, value in card.items()
        if not name.endswith("command")
    ]
    return (
        "```bash\n"
        + "\n".join(commands)
        + "\n```\n\n"
        + table(("figure", "value"), figures, right=(1,))
    )


def latent_result(stored: dict) -> str:
    """How much of the true motion a linear map reads from the latents."""
    rows = [
        (who, *(f"{value:.3f}" for value in values))
        for of_probe in stored.values()
        for who, values in of_probe.items()
    ]
    return "```bash\nmake toy\n```\n\n" + table(
        ("linear probe, R2", "x", "y", "opening"), rows, right=(1, 2, 3)
    )


def samples_result(stored: dict) -> str:
    """Model against its baselines, per mode and figure."""
    figures = stored.pop("figures")
    columns = list(
        dict.fromkeys(
            column for of_mode in figures.values() for row in of_mode.values() for column in row
        )
    )
    rows = [
        (f"`{mode}`", name, *(f"{row[c]:.4g}" if c in row else "" for c in columns))
        for mode, of_mode in figures.items()
        for name, row in of_mode.items()
    ]
    return (
        command("sample.py", stored)
        + "\n\n"
        + table(("mode", "figure", *columns), rows, right=range(2, 2 + len(columns)))
    )


def success(row: dict, group: str) -> str:
    """A rate in per cent with its interval."""
    if group not in row:
        return ""
    low, high = row[group]["interval"]
    return f"{100 * row[group]['rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {row[group]['episodes']}"


def simulator_result(stored: dict) -> str:
    """The same of a simulator, by task; what each seed's scenes gave is in the last line."""
    played, tasks = stored.pop("rows"), stored["tasks"]
    stored |= {"tasks": ",".join(tasks)} | dict.fromkeys(
        ("settings", "splits", "looks")
    )  # the last two are the toy's
    rows = [(task, *(success(row, task) for row in played)) for task in (*tasks, "all")]
    rows.append(
        ("seeds", *(", ".join(map(str, row["successes_per_seed"].values())) for row in played))
    )
    head = ("success %", *(f"`{row['policy']}`" for row in played))
    return command("evaluate.py", stored) + "\n\n" + table(head, rows)


def downstream_result(stored: dict) -> str:
    """Success with and without stage 2, of every seed, and the demonstrations that it saves."""
    cells, (mode, found) = stored["cells"], next(iter(stored["savings"].items()))
    arms, seeds, counts = (
        list(dict.fromkeys(key.split("/")[i] for key in cells)) for i in range(3)
    )
    rates = lambda arm, n: [
        100 * c["successes"] / c["episodes"]
        for s in seeds
        if (c := cells.get(f"{arm}/{s}/{n}", {}).get(mode))
    ]
    cell = lambda one: f"{sum(one) / len(one):.0f} ({', '.join(f'{rate:.0f}' for rate in one)})"
    rows = [(arm, *(cell(rates(arm, n)) for n in counts)) for arm in arms]
    rows.append(
        (
            "times as many without stage 2",
            *(
                f"{'' if reached else 'more than '}{ratio:.1f} [{low:.1f}, {high:.1f}]"
                for ratio, (low, high), reached in zip(
                    found["saving"], found["interval"], found["reached"]
                )
            ),
        )
    )
    head = (f"success %, {mode}, mean and seeds", *(f"{n} demonstrations" for n in counts))
    return (
        f"{stored['about']}\n\n{table(head, rows)}\n\nThe last line: demonstrations that the arm without stage 2 needs for the success "
        f"above it, of no more than {counts[-1]}."
    )


def evaluation_result(stored: dict) -> str:
    """Success in per cent with its interval at 95 %."""
    played = stored.pop("rows")
    groups = list(
        dict.fromkeys(
            name
            for row in played
            for name, value in row.items()
            if isinstance(value, dict) and "rate" in value
        )
    )

    rows = [
        (
            f"`{row['policy']}`",
            row["split"],
            row["look"],
            *(success(row, group) for group in groups),
            "" if row["mean_steps"] is None else f"{row['mean_steps']:.1f}",
        )
        for row in played
    ]
    head = ("policy", "split", "look", *(f"success %, {group}" for group in groups), "steps")
    return command("evaluate.py", stored) + "\n\n" + table(head, rows)


# Where results lie, what they say, how they are shown, and the command that writes such a file.
RESULTS: tuple[tuple[str, str, Callable[[dict], str], str], ...] = (
    (
        "weights/toy/card.json",
        "The toy's frozen backbones",
        backbones_result,
        "python train.py --stage backbones",
    ),
    (
        "docs/toy/latent/figures.json",
        "Latent actions of held-out episodes",
        latent_result,
        "make toy",
    ),
    (
        "docs/toy/samples*/figures.json",
        "Sampling held-out episodes",
        samples_result,
        "python sample.py --ckpt runs/toy/stage3 --mode all --out docs/toy/samples",
    ),
    (
        "docs/toy/**/evaluation.json",
        "Acting in closed loop",
        evaluation_result,
        "python evaluate.py --ckpt runs/toy/stage3 --modes joint,vla --random --out docs/toy/evaluation",
    ),
    (
        "docs/latent_action/downstream.json",
        "Demonstrations that latent actions save",
        downstream_result,
        "python docs/latent_action/downstream.py",
    ),
    (
        "docs/metaworld/*_step*/evaluation.json",
        "MetaWorld in closed loop",
        simulator_result,
        "bash docs/metaworld/run.sh",
    ),
)


def results(root: Path) -> str:
    """All committed results; a kind of which there is none says so, and how to make it."""
    parts = []
    for pattern, title, show, make in RESULTS:
        found = sorted(root.glob(pattern))
        parts += [
            f"**{title}** ([{p.relative_to(root)}]({p.relative_to(root)})):\n\n{show(json.loads(p.read_text()))}"
            for p in found
        ]
        if not found:
            parts.append(
                f"**{title}**: not recorded yet; there is no `{pattern}`, which `{make}` writes."
            )
    return "\n\n".join(parts)


BLOCKS = {
    "modes": modes,
    "files": files,
    "stages": stages,
    "sizes": sizes,
    "published": published,
    "tables": tables,
    "results": results,
}

# -- links to lines ---------------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)")


def line_of(path: Path, symbol: str) -> int:
    """The line where `name` or `Class.name` is defined in a file: a class, a function or an assignment."""
    node: ast.AST = ast.parse(path.read_text())
    for name in symbol.split("."):
        inside = [n for n in ast.iter_child_nodes(node) if name in defined_names(n)]
        if not inside:
            raise ValueError(
                f"README.md links to `{symbol}`, which {path.name} does not define; name another symbol"
            )
        node = inside[0]
    return node.lineno


def defined_names(node: ast.AST) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def refresh(text: str, root: Path = ROOT) -> str:
    """The README with its generated parts and line numbers brought up to date."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"README.md must hold {begin} and {end} once each, in this order")
        text = text[: text.index(begin)] + f"{begin}\n{make(root)}\n" + text[text.index(end) :]
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(root / m[2], m[1])})", text)


def main() -> None:
    for name, draw in FIGURES.items():
        (ROOT / name).write_text(draw())
    readme = ROOT / "README.md"
    readme.write_text(refresh(readme.read_text()))
    print(f"wrote {', '.join(FIGURES)} and the generated parts of README.md")


if __name__ == "__main__":
    main()
