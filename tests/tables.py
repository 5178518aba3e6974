"""The tables of tensors that published files hold, weights/keys/*.txt."""

import re
from pathlib import Path

from weights import layouts


def expand_braces(pattern: str) -> list[str]:
    """Writes out braces: `a.{0-2}.{q,k}` is a.0.q, a.0.k, a.1.q, ..."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if not group:
        return [pattern]
    first, _, last = group[1].partition("-")
    options = map(str, range(int(first), int(last) + 1)) if last else group[1].split(",")
    return [
        name
        for option in options
        for name in expand_braces(pattern[: group.start()] + option + pattern[group.end() :])
    ]


def expected(table: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the published file `table` holds (weights/keys/TABLE.txt, where the
    source is stated)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in (Path(layouts.__file__).parent / "keys" / f"{table}.txt").read_text().splitlines():
        pattern, *rest = line.split()
        if pattern.startswith("@"):  # include another table under a prefix
            shapes |= {"".join(rest) + name: shape for name, shape in expected(pattern[1:]).items()}
        elif pattern != "#":
            shapes |= dict.fromkeys(expand_braces(pattern), tuple(map(int, rest)))
    return shapes
