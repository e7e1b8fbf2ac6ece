"""How figures look and how they are kept: SVG for the page (wide and narrow), PNG and CSV beside it.

Colours are Okabe and Ito's, which stay apart for colour-blind eyes. Ink, grid and paper become CSS variables in the
SVG, so that one drawing serves light and dark pages; so does the blue, which is too dark for a dark page.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from multipruner.core.axes import BLOCK_KINDS

BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
STAGE = {"blocks": BLUE, "mlp": VERMILLION, "heads": GREEN}
STAGE_NAMES = {"blocks": "blocks", "mlp": "MLP channels", "heads": "attention heads"}
KIND = dict(zip(BLOCK_KINDS, cycle((GREEN, VERMILLION, PURPLE, SKY, ORANGE)), strict=False))
INK, MUTED, GRID, PAPER, EMPTY = "#1b1f24", "#57606b", "#d9dee4", "#fffffe", "#e9edf1"
_VARIABLES = {BLUE: "--blue", INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", EMPTY: "--empty"}

WIDE, NARROW = 9.0, 3.75
"""Widths in inches (96 px each): a page on a desk, and one on a phone of 390 px."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # names come from files: a $ in one is a dollar
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "patch.linewidth": 0.0,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure in all its forms.

    Attributes:
        name: file name without ending.
        title, caption: for the page.
        alt: what the picture shows, for those who cannot see it.
        wide, narrow: SVG elements for the two widths.
        png: the wide form with its title, 150 dots per inch, on white.
        csv: the numbers drawn, with a header line.
    """

    name: str
    title: str
    caption: str
    alt: str
    wide: str
    narrow: str
    png: bytes
    csv: str


def drawing(
    paint: Callable[[float], Figure],
    *,
    name: str,
    title: str,
    caption: str,
    alt: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
) -> Drawing:
    """Paint a figure at both widths and keep its numbers.

    Args:
        paint: makes the figure for a width in inches.
        columns, rows: the numbers drawn.
        name, title, caption, alt: see :class:`Drawing`.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        wide, narrow = paint(WIDE), paint(NARROW)
        svgs = [_svg(figure, f"{name}-{form}", alt) for figure, form in ((wide, "wide"), (narrow, "narrow"))]
        png = _png(wide, printable(title, 90))
    return Drawing(name, title, caption, alt, svgs[0], svgs[1], png, table.getvalue())


def _png(figure: Figure, title: str) -> bytes:
    """Return the figure under a line with its title: a PNG stands alone, an SVG has the page's heading."""
    heading = Figure(figsize=(figure.get_figwidth(), 0.36))
    heading.text(0.01, 0.35, title, va="center", weight="bold", fontsize=11)
    pictures = []
    for part in (heading, figure):
        stream = io.BytesIO()
        part.savefig(stream, format="png", dpi=150, facecolor="white")
        pictures.append(Image.open(stream).convert("RGB"))
    above, below = pictures
    sheet = Image.new("RGB", (below.width, above.height + below.height), "white")
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    stream = io.BytesIO()
    sheet.save(stream, format="png", optimize=True)
    return stream.getvalue()


def _svg(figure: Figure, prefix: str, alt: str) -> str:
    """Return the figure as an element for an HTML page: no prologue, ids of its own, colours as variables."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    width = figure.get_figwidth() * 96
    # ids are unique within one figure only; a page has many
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    label = escape(alt, quote=True)
    return f'<svg viewBox="{box[1] if box else ""}" style="width:{width:.0f}px" role="img" aria-label="{label}">{body}'


def canvas(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of stacked axes; the layout keeps labels inside."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **options)
    return figure, list(axes[:, 0])


def printable(text: str, length: int = 40) -> str:
    """Return a name for a figure: one line, of a length that fits; names of runs often differ at their ends, so that
    both stay.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


def percent(value: float, position: object = None) -> str:
    """Tick label of a share."""
    return f"{100 * value:.3g}%"


def plain(value: float, position: object = None) -> str:
    """Tick label of a number on a logarithmic axis."""
    return f"{value:,.6g}"


def logarithmic(axis: Any, set_scale: Callable[[str], Any]) -> None:
    """Make an axis logarithmic, with ticks that are read without exponents."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())
