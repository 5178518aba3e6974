"""main  ."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from weights.convert import convert, export
from weights.files import open_source
from weights.hub import HUB, download
from weights.layouts import expected


def main(argv: list[str] | None = None) -> None:
    """The command line; a bad file ends it with one message."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones.weights",
        description="Inspect, convert, export and download weights.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tables = sorted(file.stem for file in (Path(__file__).parent / "keys").glob("*.txt"))
    for command, what, *arguments in (
        ("inspect", "what a file or folder is", "path"),
        ("convert", "official folder or file to one safetensors file", "src", "dst"),
        ("export", "our weights to the official Motus folder", "src", "dst"),
        ("download", f"published weights: {', '.join(HUB)}", "name"),
        ("tables", f"tensors a published file must hold: {', '.join(tables)}"),
    ):
        sub = commands.add_parser(command, help=what, description=what)
        for argument in arguments:
            sub.add_argument(argument)
        if command == "export":
            sub.add_argument(
                "--rows",
                type=int,
                help="rows of the position table: chunk + 6, or chunk for pre-trained weights",
            )
        if command == "download":
            sub.add_argument("--to", help="folder (default: weights/NAME)")
    sub.add_argument("name", nargs="?", choices=tables)
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            convert(args.src, args.dst)
        elif args.command == "export":
            export(args.src, args.dst, args.rows)
        elif args.command == "download":
            download(args.name, args.to or f"weights/{args.name}")
        elif args.command == "tables" and args.name:
            print(
                "\n".join(
                    f"{name} {' '.join(map(str, shape))}"
                    for name, shape in expected(args.name).items()
                )
            )
        elif args.command == "tables":
            for name in tables:
                print(
                    f"{name:20} {len(expected(name)):5} tensors {sum(map(math.prod, expected(name).values())):15,} parameters"
                )
        if args.command in ("inspect", "convert", "export"):
            print(open_source(args.path if args.command == "inspect" else args.dst).describe())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
