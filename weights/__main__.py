"""The commands of the weights room.

python -m weights inspect PATH         what a file is: kind, stage, parts, counts, dtypes
python -m weights convert SRC DST      official folder or .pt to one safetensors file
python -m weights export SRC DST       our weights to the official Motus folder
python -m weights download NAME        from the hub, resumable; size and licence come first
"""

from collections.abc import Sequence

from weights.convert import convert, export
from weights.files import open_source
from weights.hub import HUB, download
from weights.options import Parser, output_file, output_folder, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("inspect").add_argument("path")
    for name in ("convert", "export"):
        command = commands.add_parser(name)
        command.add_argument("src")
        command.add_argument("dst", type=output_file if name == "convert" else output_folder)
    rows = "rows of the position table: chunk + 6, or chunk for pre-trained weights"
    command.add_argument("--rows", type=int, help=rows)
    command = commands.add_parser("download")
    command.add_argument("name", choices=HUB)
    command.add_argument("--to", type=output_folder, help="folder (default: weights/NAME)")
    args = parser.parse_args(argv)
    if args.command == "download":
        download(args.name, args.to or output_folder(f"weights/{args.name}"))
        return
    if args.command == "convert":
        convert(args.src, args.dst)
    if args.command == "export":
        export(args.src, args.dst, args.rows)
    written = args.path if args.command == "inspect" else args.dst
    print(open_source(written).describe())


if __name__ == "__main__":
    run_command(main)
