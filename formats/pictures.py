"""Pictures for people: films, sheets of windows, plots of a card. They carry their own dark ground,
and so read the same on any page."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from formats.cards import Pyramid

PLAIN = {"parse_math": False}  # a dollar in an instruction is a dollar
LIMIT = 300_000
RING = 4.5  # pixels of a video
# Enlargement and stride over frames of a film; the first that fits its limit stays. Colours are
# not saved on: each frame has as many as a GIF can.
SMALLER = ((4, 1), (3, 1), (2, 1), (1, 1), (1, 2), (1, 4))


def film(
    path: Path,
    columns: dict[str, ndarray],
    caption: str,
    ms: int = 400,
    goal: ndarray | None = None,
) -> None:
    """A GIF of at most LIMIT bytes: videos (F, H, W, 3) uint8, enlarged, side by side under their
    names, above a caption. A ring shows the place `goal` in each of them, 0 to 1 from left and
    top."""
    from PIL import Image, ImageDraw, ImageOps

    videos = np.concatenate(list(columns.values()), axis=2)
    for scale, stride in SMALLER:
        if scale > max(1, 192 // videos.shape[1]):
            continue
        pages = []
        for pictures in videos[::stride].repeat(scale, axis=1).repeat(scale, axis=2):
            page = ImageOps.expand(Image.fromarray(pictures), border=(0, 20))
            draw = ImageDraw.Draw(page)
            for i in range(len(columns) if goal is not None else 0):
                centre = (np.array(goal) + (i, 0)) * page.width / len(columns) + (0, 20)
                draw.circle(centre.tolist(), RING * scale, outline="white")
            draw.text((4, 3), " | ".join(columns), font_size=12)
            draw.text((4, page.height - 18), caption, font_size=12)
            # An octree (2) keeps the colours of small things, which a median cut gives to the
            # ground.
            pages.append(page.quantize(256, 2))
        first, *rest = pages
        first.save(path, save_all=True, append_images=rest, duration=ms * stride, loop=0)
        if path.stat().st_size <= LIMIT:
            return


def sheet(
    path: Path,
    title: str,
    captions: Sequence[str],
    pictures: dict[str, ndarray],
    *actions: ndarray,
    ranges: Sequence[tuple[float, float]] = (),
) -> None:
    """A PNG with a row per window: named pictures (B, H, W, 3) uint8; predicted and true actions
    (B, S, A), a plot per dimension, each of which shows at least its range if there are any."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    rows = len(captions)
    dimensions = actions[0].shape[2] if actions else 0
    columns = len(pictures) + dimensions
    with context(["dark_background", {"font.size": 7}]):
        width, height = 1.8 * columns + 0.5, 1.8 * rows + 0.4
        figure = Figure((width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
        # A constrained layout would take longer than all the rest.
        edges = 0.4 / width, 0.2 / height, 1 - 0.1 / width, 1 - 0.5 / height
        figure.subplots_adjust(*edges, wspace=0.2, hspace=0.1)
        figure.suptitle(title, fontsize=9)
        for row, caption in enumerate(captions):
            axes[row, 0].set_ylabel(textwrap.fill(caption, 24), **PLAIN)
            for axis, (name, images) in zip(axes[row], pictures.items()):
                axis.imshow(np.asarray(images[row]), interpolation="nearest")
                axis.set(xticks=[], yticks=[], title="" if row else name)
            for i, axis in enumerate(axes[row, len(pictures) :]):
                axis.plot(np.stack([values[row, :, i] for values in actions], axis=1))
                axis.plot(*ranges[i : i + 1], alpha=0)
                axis.set(title="" if row else f"action {i}: predicted, true")
                axis.locator_params(nbins=4)
                axis.tick_params(labelbottom=row == rows - 1)
        figure.savefig(path, dpi=110)


def plot(pyramid: Pyramid, out: str) -> None:
    """A row for each of a few windows: its frames, with the actions over them against time."""
    from matplotlib.figure import Figure

    rows = sorted(pyramid.draw(8, 0, 0).tolist())
    extent = (-0.5, pyramid.frames + 0.5, 0, 1)
    size = (2 * pyramid.frames + 2, 2 * len(rows))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(rows))
    for axis, row in zip(axes, rows):
        o = pyramid.opened[row[0]]
        seen = pyramid.window(row, "real")
        strip = np.concatenate(seen.frames, axis=1)
        axis.imshow(strip, extent=extent, aspect="auto")
        title = f"{o.name}, episode {row[1]}, row {row[2]}: {seen.instruction[:90]}"
        axis.set_title(title, **PLAIN)
        axis.set(yticks=[], xlabel=f"video frames at {pyramid.video_hz:g} Hz")
        if seen.actions is not None:
            times = (np.arange(len(seen.actions)) + o.source.ahead) / pyramid.ratio
            mask = seen.action_mask
            beside = axis.twinx()
            beside.plot(times[mask], seen.actions[mask], linewidth=1.2)
    figure.savefig(out)
