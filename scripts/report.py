"""Puts what a run of all stages measured on one page: `report.md` and `report.html`, pictures and
one table.

    python -m scripts.report --run runs/demo

Reads what the other commands wrote into the run's folder (`make demo`): figures.json,
evaluation.json, log.csv and pictures. It measures nothing itself. What is missing is named, not
skipped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from markdown import markdown

from flow import MODES
from motus import STAGES
from scale.log import read_log
from scripts.readme import table
from weights.files import read_json
from weights.options import Parser, output_folder, run_command

FOLDERS = [stage if stage == "latent" else f"stage{stage}" for stage in STAGES]
LOSSES = ("video", "action", "reconstruction", "alignment")
BASELINES = ("model", "copy", "mean", "vae")
STYLE = """<!doctype html><meta charset=utf-8><title>Motus</title><style>
body { font: 15px sans-serif; max-width: 70em; margin: 2em auto; color-scheme: light dark }
td { padding: 2px 10px } img { margin: 4px }
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
    probes = read_json(known(run / "latent" / "figures.json"))["probe R2"]
    for name, values in probes.items():
        texts = ", ".join(show(value, 2) for value in values)
        yield f"latent actions, {name}: probe R2 of the motion", texts


def losses(run: Path) -> Iterator[tuple[str, str, str]]:
    """Of each stage the number of steps, and the losses over the last rows of its log."""
    for folder in FOLDERS:
        rows = read_log(known(run / folder / "log.csv"))
        cells = []
        for name in LOSSES:
            if values := [float(row[name]) for row in rows if row.get(name)]:
                cells.append(f"{fmean(values[-20:]):.4f} ({name})")
        yield folder, rows[-1]["step"], ", ".join(cells)


def pictures(run: Path, pattern: str, count: int) -> str:
    paths = [path.relative_to(run) for path in sorted(run.glob(pattern))[:count]]
    return "\n".join(f"![{path.stem}]({path})" for path in paths)


def page(run: Path) -> str:
    """The report in Markdown; pictures by relative path."""
    samples = sampled(run)
    figures = []
    for mode, rows in samples["figures"].items():
        for name, row in rows.items():
            cells = [show(row[key]) if key in row else "" for key in BASELINES]
            figures.append((mode, name, *cells))
    head = ("mode", "figure", "model", "copy last frame", "predict the mean", "VAE ceiling")
    blocks = [
        f"# Motus, {run.name}",
        table(("figure", "measured"), targets(run)),
        "## Training",
        table(("stage", "steps", "losses"), losses(run)),
        *(f"![losses of {folder}]({folder}/curve.png)" for folder in FOLDERS),
        f"## The five modes, {samples['episodes']} held-out windows, "
        f"{samples['steps']} Euler steps",
        table(head, figures),
    ]
    for mode in MODES:
        blocks += [f"### {mode}", f"![{mode}](samples/{mode}.png)"]
        blocks.append(pictures(run, f"samples/{mode}_*.gif", 2))
    blocks += ["## Closed loop", pictures(run, "evaluation/*.gif", 6)]
    return "\n\n".join(blocks) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m scripts.report", description=__doc__)
    run = "folder of a run of all stages"
    parser.add_argument("--run", required=True, type=output_folder, help=run)
    run = parser.parse_args(argv).run
    text = page(run)
    (run / "report.md").write_text(text)
    (run / "report.html").write_text(STYLE + markdown(text, extensions=["tables"]))
    for name, value in targets(run):
        print(f"{name:75} {value}")
    print(f"wrote {run / 'report.md'} and {run / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
