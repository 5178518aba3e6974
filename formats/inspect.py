"""A look at a card: what of it is used, windows as a picture, a card with every choice, a copy."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from formats import official
from formats.cards import Pyramid, Source
from formats.pictures import plot
from weights.files import write_json


def inspect(pyramid: Pyramid, picture: str, card: str | None) -> None:
    """Prints what a card is and what of it is used, plots some windows, names every fault; `card`
    is a file in which to write every choice down."""
    for path in filter(None, (picture, card)):
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path} cannot be written: its folder does not exist; make it first")
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


def convert(pyramid: Pyramid, out: Path, lossless: bool) -> None:
    """Writes every source as the LeRobot v3.0 dataset `out`/NAME, with a card beside them."""
    sources = []
    for o in pyramid.opened:
        reader = o.reader.whole(o.source.mapping.get("cameras", ()))
        left = official.convert(reader, out / o.name, lossless)
        if o.folder.is_dir():
            left.append(f"latent actions in {o.folder}")
        if left:
            print(f"{o.name}: left behind are {'; '.join(left)}")
        ahead = o.source.ahead and not isinstance(reader, official.OfficialFolder)
        sources.append(replace(o.source, path=o.name, ahead=ahead, latents=""))
    write_card(out / "card.json", pyramid, sources)


def write_card(path: Path, pyramid: Pyramid, sources: Sequence[Source]) -> None:
    card = {
        "video_hz": pyramid.video_hz,
        "action_hz": pyramid.action_hz,
        "sources": [asdict(source) for source in sources],
    }
    if "size" in pyramid.card:  # else each preset sees its own
        card["size"] = list(pyramid.size)
    write_json(path, card)
    print(f"wrote {path}")
