"""Puts what a run of all stages measured on one page, `report.md` and `report.html`: films, a card
for each mode, curves and tables.

    python -m scripts.report --run runs/demo

Reads what the other commands wrote into the run's folder (`make demo`): figures.json,
evaluation.json, log.csv and pictures; and truth.json, if the modes were measured against the
simulator. It measures nothing itself. What else is missing is named, not skipped.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from markdown import markdown

from flow import MODES
from motus import STAGES
from scripts.readme import table
from weights.files import read_json
from weights.options import Parser, output_folder, run_command

FOLDERS = [stage if stage == "latent" else f"stage{stage}" for stage in STAGES]
BASELINES = ("model", "copy", "mean", "vae")
CEILINGS = ("true films", "VAE")  # as the truth names them: without a mistake of the network
BLIND = {"world_model": "vgm", "idm": "vla"}  # who says the same, not knowing what is given
STYLE = """<!doctype html><meta charset=utf-8><title>Motus</title>
<meta name=viewport content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark }
body { font: 15px/1.4 sans-serif; max-width: 66em; margin: 0 auto; padding: 1em }
section { border: 1px solid #8886; border-radius: 8px; padding: 0 1em 1em; margin: 1em 0 }
section h2 { margin: 0.6em 0 }
img { max-width: 100%; height: auto; border-radius: 4px }
figure { display: inline-block; width: 20em; max-width: 100%; margin: 0 0.7em 1em 0 }
figure img { width: 100% }
figcaption { font-size: 13px; opacity: 0.8 }
table { border-collapse: collapse; margin: 1em 0 }
tr { border-bottom: 1px solid #8884 }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; overflow-wrap: break-word }
@media (max-width: 600px) {
  th, td { font-size: 12px; padding-right: 6px }
  section { padding: 0 8px }
}
</style>
"""


def known(path: Path) -> Path:
    """The path of what a command left."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; run the commands of `make demo` first")
    return path


def sampled(run: Path) -> dict:
    """The figures of the modes."""
    found = read_json(known(run / "samples" / "figures.json"))
    if not {"idm", "world_model"} <= found["figures"].keys():
        raise ValueError(f"{run}/samples lacks modes idm or world_model; run sample.py --mode all")
    return found


def show(value: float | None, digits: int = 4) -> str:
    """A figure; null, as an infinite PSNR is stored, has none."""
    return "-" if value is None else f"{value:.{digits}f}"


def targets(run: Path) -> Iterator[tuple[str, str]]:
    """The figures that matter most, in a line each."""
    for row in read_json(known(run / "evaluation" / "evaluation.json"))["rows"]:
        low, high = (100 * bound for bound in row["all"]["interval"])
        settings = [f"{name}={value}" for name, value in row["settings"].items()]
        yield (
            ", ".join(["closed-loop success", row["policy"], *settings]),
            f"{100 * row['all']['rate']:.1f} % [{low:.0f}, {high:.0f}] of {row['all']['episodes']}",
        )
    figures = sampled(run)["figures"]
    idm = figures["idm"]["action MSE"]
    ratio = idm["model"] / idm["mean"]
    yield (
        "IDM action MSE / predict-the-mean",
        f"{idm['model']:.3f} / {idm['mean']:.3f} = {ratio:.2f}",
    )
    world = figures["world_model"]["PSNR moving (dB)"]
    model, copy, vae = (show(world[name], 2) for name in ("model", "copy", "vae"))
    gain = f" = {world['model'] - world['copy']:+.2f}" if "-" not in (model, copy) else ""
    yield (
        "world-model PSNR on the moving region, above copy-last-frame",
        f"{model} - {copy}{gain} dB, VAE ceiling {vae}",
    )
    for kind, who, figure, values in truth(run):
        if who in ("world_model", "vgm") and figure == "gripper, px":
            yield (
                f"gripper in the film of {who}, {kind} motion: px of 48 off",
                show(values[-1][0], 1),
            )
    probes = read_json(known(run / "latent" / "figures.json"))["probe R2"]
    for name, values in probes.items():
        texts = ", ".join(show(value, 2) for value in values)
        yield f"latent actions, {name}: probe R2 of the motion", texts


def films(run: Path, *patterns: str) -> str:
    """The first three of each pattern, under their names."""
    paths = [path for pattern in patterns for path in sorted(run.glob(pattern))[:3]]
    figure = "<figure><img src={0} alt={1}><figcaption>{2}: {1}</figcaption></figure>".format
    return "\n".join(figure(p.relative_to(run), p.stem, p.parent.name) for p in paths)


def truth(run: Path) -> Iterator[tuple[str, str, str, list]]:
    """The figures of `scripts.truth`, if there are any: kind of motion, who, figure, values with
    their intervals."""
    path = run / "truth.json"
    for name, values in (read_json(path)["figures"] if path.is_file() else {}).items():
        yield *re.match("(.*?), (.*): (.*)", name).groups(), values


def truths(run: Path, mode: str) -> Iterator[tuple[str, ...]]:
    """Figure by figure those of a mode and of its controls, at the most Euler steps, with
    intervals: on windows of the expert and of random motion."""
    rows = {}
    for kind, who, figure, values in truth(run):
        rows.setdefault((figure, who), {})[kind] = "{} [{}, {}]".format(
            *(show(x, 2) for x in values[-1])
        )
    own = {figure for figure, who in rows if who.split(",")[0] == mode}
    for (figure, who), cells in sorted(rows.items()):
        control = who in (*CEILINGS, BLIND.get(mode)) and figure in own
        if control or who.split(",")[0] == mode:
            yield figure, who, cells.get("expert", "-"), cells.get("random", "-")


def card(run: Path, mode: str, figures: dict[str, dict]) -> Iterator[str]:
    """A mode's question, its windows, and its figures beside those of its controls."""
    yield f'<section markdown="1">\n\n## {mode}: {MODES[mode].question}'
    yield f"[![{mode}](samples/{mode}.png)](samples/{mode}.png)"
    if true := list(truths(run, mode)):
        yield table(("against the simulator", "of", "the expert's windows", "random motion"), true)
    rows = []
    for name, row in figures.items():
        rows.append((name, *(show(row[key]) if key in row else "" for key in BASELINES)))
    yield table(("held-out windows", "model", "copy last frame", "mean action", "VAE"), rows)
    yield "</section>"


def page(run: Path) -> str:
    """The report in Markdown; pictures by relative path."""
    samples = sampled(run)
    curves = [known(run / folder / "curve.png").relative_to(run) for folder in FOLDERS]
    blocks = [
        f"# Motus, {run.name}",
        "True beside imagined; and in closed loop, with a pause where the policy looks again. The "
        "ring is where the named disc should go.",
        films(run, "samples/*_0.gif", "evaluation/joint*.gif"),
        f"The modes were asked about {samples['episodes']} held-out windows, in "
        f"{samples['steps']} Euler steps.",
    ]
    for mode, figures in samples["figures"].items():
        blocks += card(run, mode, figures)
    blocks += [
        "## Curves",
        *(f"![losses of {path.parent}]({path})" for path in curves),
        "## Figures",
        table(("figure", "measured"), targets(run)),
    ]
    return "\n\n".join(blocks) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m scripts.report", description=__doc__)
    parser.option("--run", output_folder, "folder of a run of all stages", required=True)
    run = parser.parse_args(argv).run
    text = page(run)
    (run / "report.md").write_text(text)
    (run / "report.html").write_text(STYLE + markdown(text, extensions=["tables", "md_in_html"]))
    for name, value in targets(run):
        print(f"{name:75} {value}")
    print(f"wrote {run / 'report.md'} and {run / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
