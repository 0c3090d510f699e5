"""Reward curves and image grids in one style. Importing this is cheap: matplotlib and Pillow load on first use.

Colours are safe for colour-blind readers and differ in lightness too: plain training is slate, exploration orange; line
styles tell algorithms apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

PLAIN = ("#44617B", "#8FA9BF", "#1B2733", "#B4B9BE")
"""Colours of runs without exploration, in the order of their arms."""
EXPLORING = ("#E8710A", "#CC5C9C", "#00896B", "#C9A400")
"""Colours of runs with exploration, in the order of their arms."""
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)))
"""Line styles, in the order of the algorithms."""

MOST_LINES = 5
"""A label of more lines is cut off."""

INK, MUTED, FAINT = "#24292F", "#57606A", "#D9DEE3"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": "#8C959F",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # prompts may have dollar signs
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "diffexp",  # the same figure gives the same file
}


@dataclass(frozen=True, eq=False)
class Line:
    """One arm in a panel: ``mean`` over seeds at each of ``queries``, and how far the seeds ``spread`` about it."""

    label: str
    queries: ArrayLike
    mean: ArrayLike
    spread: ArrayLike
    algorithm: str = ""
    explores: bool = False


@dataclass(frozen=True, eq=False)
class Level:
    """A reward to mark with a thin line, and by label the queries after which arms reach it, as dots."""

    name: str
    reward: float
    reached: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Panel:
    """One set of axes."""

    title: str
    ylabel: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()


@dataclass(frozen=True, eq=False)
class Bar:
    """One bar: a mean, and its interval where there is one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    explores: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Bars side by side, which all rise from ``start``, the untouched model's reward."""

    title: str
    start: float
    bars: Sequence[Bar]


def curves(panels: Sequence[Panel], columns: int = 3) -> Figure:
    """Reward over queries, a panel each, under one legend: the mean of the seeds and a band of their spread."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    styles = _styles([line for panel in panels for line in panel.lines])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(4.3 * columns, 5.4), 3.3 * rows + 0.8))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=False):
            _draw(ax, panel, styles)
        for ax in axes[len(panels) :]:
            ax.remove()
        _legend(figure, styles)
    return figure


def bars(groups: Sequence[Group], ylabel: str) -> Figure:
    """What each arm gained over the untouched model, group by group; the axis shows the reward itself."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(2.3 * len(groups), 4.6), 3.6))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        ax, width, labels = figure.subplots(), 0.36, set()
        for place, group in enumerate(groups):
            for k, bar in enumerate(group.bars):
                x = place + (k - (len(group.bars) - 1) / 2) * width
                color = (EXPLORING if bar.explores else PLAIN)[0]
                label = bar.label if bar.label not in labels else None
                labels.add(bar.label)
                ax.bar(x, bar.value - group.start, 0.9 * width, bottom=group.start, color=color, label=label)
                if bar.low is not None and bar.high is not None:
                    ax.vlines(x, bar.low, bar.high, color=INK, linewidth=1.4)
            ax.hlines(group.start, place - width, place + width, color=INK, linewidth=1.4, linestyle=(0, (2, 1)))
        ax.set_xticks(range(len(groups)), [group.title for group in groups])
        ax.set_ylabel(ylabel)
        ax.set_title("dashed: the untouched model", fontsize=9, fontweight="normal", color=MUTED)
        ax.use_sticky_edges = False  # bars may start below the lowest tick
        ax.margins(y=0.06)
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def save(figure: Figure, *paths: Path) -> None:
    """Write a figure under each of the given names, in the format of its suffix (PNG at 200 dots an inch)."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        for path in paths:
            # A date in the file would make every redrawing a change.
            figure.savefig(path, dpi=200, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def image_grid(
    rows: Sequence[Sequence[Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 128,
) -> Image:
    """Images side by side: one row a label on the left, one column a label above; rows may be shorter than others.

    Small images are enlarged by a whole factor, nearest neighbour, to at least ``cell`` pixels, so that pixels stay
    pixels. Labels wrap to the room they have.

    Raises:
        ValueError: if there is no image, or a label too many or too few.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    width = max((len(row) for row in rows), default=0)
    if not width:
        raise ValueError("an image grid needs at least one image")
    if (row_labels and len(row_labels) != len(rows)) or (column_labels and len(column_labels) != width):
        raise ValueError(f"a grid of {len(rows)} x {width} has {len(row_labels)} and {len(column_labels)} labels")
    tiles = [[_enlarged(image, cell) for image in row] for row in rows]
    cell = max(max(tile.size) for row in tiles for tile in row)
    font, gap = _font(max(13, cell // 9)), max(4, cell // 24)
    heads = [_wrapped(label, font, cell) for label in column_labels]
    sides = [_wrapped(label, font, round(1.1 * cell)) for label in row_labels]
    left = gap + max((_extent(text, font)[0] + 2 * gap for text in sides), default=0)
    top = gap + max((_extent(text, font)[1] + 2 * gap for text in heads), default=0)
    canvas = images.new("RGB", (left + width * (cell + gap), top + len(tiles) * (cell + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, text in enumerate(heads):
        place = (left + column * (cell + gap) + cell / 2, top - gap)
        pen.multiline_text(place, text, fill=INK, font=font, anchor="md", align="center")
    for row, line in enumerate(tiles):
        y = top + row * (cell + gap)
        if sides:
            pen.multiline_text(
                (left - 2 * gap, y + cell / 2), sides[row], fill=INK, font=font, anchor="rm", align="right"
            )
        for column, tile in enumerate(line):
            inset = ((cell - tile.width) // 2, (cell - tile.height) // 2)
            canvas.paste(tile, (left + column * (cell + gap) + inset[0], y + inset[1]))
    return canvas


def captioned(pictures: Sequence[Image], captions: Sequence[str]) -> Image:
    """Pictures one below the other, each under its caption."""
    from PIL import Image as images
    from PIL import ImageDraw

    width, size = max(picture.width for picture in pictures), 16
    font = _font(size)
    heads = [_wrapped(caption, font, width - size) for caption in captions]
    heights = [_extent(text, font)[1] + size for text in heads]
    canvas = images.new("RGB", (width, sum(heights) + sum(picture.height for picture in pictures)), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    for picture, text, height in zip(pictures, heads, heights, strict=True):
        pen.multiline_text((size / 2, y + size / 2), text, fill=INK, font=font)
        canvas.paste(picture, (0, y + height))
        y += height + picture.height
    return canvas


def before_after(before: Sequence[Image], after: Sequence[Image], prompts: Sequence[str] = ()) -> Image:
    """Two rows, the same prompts and seeds above and below: what fine-tuning did."""
    return image_grid([before, after], ["before", "after"], prompts)


def _styles(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    algorithms = list(dict.fromkeys(line.algorithm for line in lines))
    styles: dict[str, dict[str, Any]] = {}
    used: dict[tuple[str, bool], int] = {}
    for line in lines:
        if line.label in styles:
            continue
        rank = used.get((line.algorithm, line.explores), 0)
        used[line.algorithm, line.explores] = rank + 1
        palette = EXPLORING if line.explores else PLAIN
        dashes = DASHES[algorithms.index(line.algorithm) % len(DASHES)]
        styles[line.label] = {"color": palette[rank % len(palette)], "linestyle": dashes}
    return styles


def _draw(ax: Axes, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    import numpy as np

    for line in panel.lines:
        style, mean, spread = styles[line.label], np.asarray(line.mean), np.asarray(line.spread)
        if np.any(spread > 0):
            ax.fill_between(line.queries, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
        single: dict[str, Any] = {"marker": "o", "markersize": 5} if len(mean) == 1 else {}
        ax.plot(line.queries, mean, linewidth=2.2, zorder=4 if line.explores else 3, **style, **single)
    for level in panel.levels:
        _mark(ax, level, styles)
    ax.set_title(panel.title)
    ax.set_xlabel("reward queries")
    ax.set_ylabel(panel.ylabel)
    ax.margins(x=0.02)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.locator_params(axis="x", nbins=5)
    ax.locator_params(axis="y", nbins=6)


def _mark(ax: Axes, level: Level, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.patheffects import withStroke

    ax.axhline(level.reward, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=2)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (3, 3)}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    ax.annotate(level.name, (0, level.reward), fontsize=8, color=MUTED, zorder=6, path_effects=halo, **place)
    for label, queries in level.reached.items():
        dot = {"s": 46, "edgecolor": "white", "linewidth": 1.4, "zorder": 5}
        ax.scatter([queries], [level.reward], color=styles[label]["color"], **dot)


def _legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2.6, label=label, **style) for label, style in styles.items()]
    # A letter is about a twelfth of an inch wide, the line before it and the gap behind it half an inch.
    width = max(2.1, 0.5 + max(len(label) for label in styles) / 12)
    columns = min(len(handles), max(1, int(figure.get_figwidth() // width)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, handlelength=2.6)


def _enlarged(image: Image, cell: int) -> Image:
    from PIL.Image import Resampling

    factor = max(1, math.ceil(cell / max(image.size)))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Resampling.NEAREST)


def _font(size: int) -> FreeTypeFont:
    import matplotlib as mpl
    from PIL import ImageFont

    # matplotlib ships a font with a wide range of letters; Pillow's own has none beyond ASCII.
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_shortened(word, font, width))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [_shortened(f"{lines[MOST_LINES - 1]} …", font, width)]
    return "\n".join(lines)


def _shortened(line: str, font: FreeTypeFont, width: int) -> str:
    kept = line[:width]  # no letter is narrower than a pixel
    if kept != line:
        line = f"{kept}…"
    while font.getlength(line) > width and kept:
        kept = kept.rstrip(" …")[:-1]
        line = f"{kept}…"
    return line


def _extent(text: str, font: FreeTypeFont) -> tuple[int, int]:
    from PIL import Image as images
    from PIL import ImageDraw

    box = ImageDraw.Draw(images.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return math.ceil(box[2]), math.ceil(box[3])
