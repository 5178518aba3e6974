"""A look at a card: what of it is used, windows as a picture, a card with every choice, a copy."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from formats import official
from formats.cards import Pyramid, Source


def inspect(pyramid: Pyramid, picture: str, card: str | None) -> None:
    """Prints what a card is and what of it is used, plots some windows, names every fault; `card`
    is a file in which to write every choice down."""
    print(pyramid.describe())
    if card:
        sources = []
        for o in pyramid.opened:
            mapping = asdict(o.reader.given)
            sources.append(replace(o.source, path=o.reader.name, mapping=mapping))
        write_card(Path(card), pyramid, sources)
    faults = pyramid.check()
    if faults:
        print("\n".join(f"fault    {fault}" for fault in faults))
        return
    plot(pyramid, picture)
    print(f"no fault found; wrote {picture}")


def plot(pyramid: Pyramid, out: str) -> None:
    """A row for each of a few windows: its frames, with the actions over them against time."""
    from matplotlib.figure import Figure

    rows = sorted(pyramid.draw(8, 0, 0).tolist())
    right = pyramid.frames + 0.5
    figure = Figure((2 * pyramid.frames + 2, 2 * len(rows)), layout="constrained")
    for axis, row in zip(figure.subplots(len(rows)), rows):
        o = pyramid.opened[row[0]]
        seen = pyramid.window(row, "real")
        axis.imshow(np.concatenate(seen.frames, axis=1), extent=(-0.5, right, 0, 1), aspect="auto")
        title = f"{o.name}, episode {row[1]}, row {row[2]}: {seen.instruction[:90]}"
        axis.set(yticks=[], xlabel=f"video frames at {pyramid.video_hz:g} Hz", title=title)
        if seen.actions is not None:
            times = (np.arange(len(seen.actions)) + o.source.ahead) / pyramid.ratio
            mask = seen.action_mask
            axis.twinx().plot(times[mask], seen.actions[mask], linewidth=1.2)
    figure.savefig(out)


def convert(pyramid: Pyramid, out: Path, lossless: bool) -> None:
    """Writes every source as the LeRobot v3.0 dataset `out`/NAME, with a card beside them."""
    sources = []
    for o in pyramid.opened:
        official.convert(o.reader, out / o.name, lossless)
        mapping = o.source.mapping
        texts = {key: mapping[key] for key in ("instruction", "prefix") if key in mapping}
        sources.append(replace(o.source, path=o.name, mapping=texts, ahead=False, latents=""))
    write_card(out / "card.json", pyramid, sources)


def write_card(path: Path, pyramid: Pyramid, sources: Sequence[Source]) -> None:
    card = {
        "video_hz": pyramid.video_hz,
        "action_hz": pyramid.action_hz,
        "size": list(pyramid.size),
        "sources": [asdict(source) for source in sources],
    }
    path.write_text(json.dumps(card, indent=1))
    print(f"wrote {path}")
