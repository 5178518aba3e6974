"""Puts what a run of all stages measured on one page: `report.md` and `report.html`, pictures and
one table.

    python report.py --run runs/demo

Reads what the other commands wrote into the run's folder (`make demo`): figures.json,
evaluation.json, log.csv and pictures. It measures nothing itself. What is missing is named, not
skipped.
"""

import argparse
import csv
import html
import json
import sys
from pathlib import Path

STAGES = {
    "stage1": "1 video generation",
    "latent": "latent actions",
    "stage2": "2 unified, latent actions",
    "stage3": "3 target robot",
}
MODES = ("joint", "vla", "world_model", "idm", "vgm")


def read(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; run the commands of `make demo` into {path.parent.parent} first"
        )
    return json.loads(path.read_text())


def last(log: Path, column: str, rows: int = 20) -> float | None:
    """Mean of the last rows of a log's column."""
    with log.open(newline="") as file:
        values = [float(row[column]) for row in csv.DictReader(file) if row.get(column)][-rows:]
    return sum(values) / len(values) if values else None


def success(row: dict) -> str:
    low, high = row["interval"]
    return f"{100 * row['rate']:.1f} % [{100 * low:.0f}, {100 * high:.0f}] of {row['episodes']}"


def targets(run: Path) -> list[tuple[str, str]]:
    """The figures that matter most, in a line each."""
    figures, rows = (
        read(run / "samples" / "figures.json")["figures"],
        read(run / "evaluation" / "evaluation.json")["rows"],
    )
    lines = [
        (
            f"closed-loop success, {row['policy']}, {row['split']}, {row['look']}",
            success(row["all"]),
        )
        for row in rows
    ]
    idm, world = figures["idm"]["action MSE"], figures["world_model"]["PSNR moving (dB)"]
    lines.append(
        (
            "IDM action MSE / predict-the-mean",
            f"{idm['model']:.3f} / {idm['mean']:.3f} = {idm['model'] / idm['mean']:.2f}",
        )
    )
    lines.append(
        (
            "world-model PSNR on the moving region, above copy-last-frame",
            f"{world['model']:.2f} - {world['copy']:.2f} = {world['model'] - world['copy']:+.2f} dB, VAE ceiling {world['vae']:.2f}",
        )
    )
    for name, values in read(run / "latent" / "figures.json")["probe R2 (x, y, opening)"].items():
        lines.append(
            (
                f"latent actions, {name}: probe R2 of x, y, opening",
                ", ".join(f"{v:.2f}" for v in values),
            )
        )
    return lines


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)
    )


def page(run: Path) -> str:
    """The report in Markdown; pictures by relative path."""
    figures = read(run / "samples" / "figures.json")
    losses = []
    for name, title in STAGES.items():
        log = run / name / "log.csv"
        if not log.is_file():
            raise ValueError(f"{log} is missing; train {name} into {run} first (`make demo`)")
        columns = ("reconstruction", "alignment") if name == "latent" else ("video", "action")
        with log.open(newline="") as file:
            steps = [row["step"] for row in csv.DictReader(file)][-1]
        losses.append(
            [
                title,
                steps,
                *("-" if (v := last(log, c)) is None else f"{v:.4f} ({c})" for c in columns),
            ]
        )
    lines = [
        f"# Motus, {run.name}",
        "",
        table(["figure", "measured"], [list(line) for line in targets(run)]),
        "",
        "## Training",
        "",
        table(["stage", "steps", "loss", "loss"], losses),
        "",
    ]
    lines += [f"![losses of {name}]({name}/curve.png)" for name in STAGES]
    lines += [
        "",
        f"## The five modes, {figures['episodes']} held-out windows, {figures['steps']} Euler steps",
        "",
    ]
    rows = [
        [
            mode,
            name,
            *(f"{row[k]:.4f}" if k in row else "" for k in ("model", "copy", "mean", "vae")),
        ]
        for mode, part in figures["figures"].items()
        for name, row in part.items()
    ]
    lines += [
        table(
            ["mode", "figure", "model", "copy last frame", "predict the mean", "VAE ceiling"], rows
        ),
        "",
    ]
    for mode in MODES:
        lines += [f"### {mode}", "", f"![{mode}](samples/{mode}.png)", ""]
        lines += [
            f"![{mode} film](samples/{p.name})"
            for p in sorted((run / "samples").glob(f"{mode}_*.gif"))[:2]
        ] + [""]
    lines += ["## Closed loop", ""] + [
        f"![rollout](evaluation/{p.name})" for p in sorted((run / "evaluation").glob("*.gif"))[:6]
    ]
    return "\n".join(lines) + "\n"


def as_html(markdown: str) -> str:
    """The same page as html: headings, tables and pictures are all the Markdown it has."""
    out, rows = [], []

    def flush() -> None:
        if rows:
            out.append(
                "<table>"
                + "".join(
                    "<tr>"
                    + "".join(f"<td>{html.escape(c.strip())}</td>" for c in r.strip("|").split("|"))
                    + "</tr>"
                    for i, r in enumerate(rows)
                    if i != 1
                )
                + "</table>"
            )
            rows.clear()

    for line in markdown.splitlines():
        if line.startswith("|"):
            rows.append(line)
            continue
        flush()
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            out.append(f"<h{level}>{html.escape(line[level + 1 :])}</h{level}>")
        elif line.startswith("!["):
            name, path = line[2:-1].split("](")
            out.append(f'<img alt="{html.escape(name)}" src="{html.escape(path)}">')
    flush()
    style = "body{font:15px sans-serif;max-width:70em;margin:2em auto;color-scheme:light dark}td{padding:2px 10px}img{margin:4px}"
    return (
        f"<!doctype html><meta charset=utf-8><title>Motus</title><style>{style}</style>\n"
        + "\n".join(out)
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        required=True,
        type=Path,
        help="folder of a run of all stages, as `make demo` writes it",
    )
    run = parser.parse_args(argv).run
    text = page(run)
    (run / "report.md").write_text(text)
    (run / "report.html").write_text(as_html(text))
    for name, value in targets(run):
        print(f"{name:75} {value}")
    print(f"wrote {run / 'report.md'} and {run / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
