"""Draw the picture of the README: from a dense model to a smaller one, and which package does what.

    python docs/figures/pipeline.py     # writes pipeline.svg beside this file

The drawing is kept in the repository; a test draws it again, and sees that the packages exist.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).with_name("pipeline.svg")
INK, MUTED, PLAIN, CHOICE, MODEL = "#1b1f24", "#57606b", "#e9edf1", "#cfeadf", "#fbe3d3"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 9, "text.color": INK, "svg.fonttype": "none", "svg.hashsalt": "pipeline",
}  # fmt: skip
WIDE, HIGH = 24, 13


@dataclass(frozen=True)
class Box:
    """One step: where it stands, what it is called, what it does, and the packages that do it."""

    left: float
    bottom: float
    title: str
    lines: tuple[str, ...]
    packages: tuple[str, ...]
    colour: str = PLAIN


BOXES = (
    Box(0, 30, "dense model, text", ("Hub, folder or GGUF;", "any text, or its own"), ("sources",), MODEL),
    Box(32, 30, "row of blocks", ("attention, MLP, attention, ...;", "order of the parts"), ("engine", "importance")),
    Box(64, 30, "tables of losses", ("every block at some sizes,", "the whole model's loss"), ("engine", "repair")),
    Box(96, 30, "exact program", ("one size for every block,", "all budgets at once"), ("search", "latency"), CHOICE),
    Box(96, 5, "cut", ("smaller matrices, no masks;", "a plan says what stays"), ("checkpoint",)),
    Box(64, 5, "repair", ("closed form, block by block;", "kept only where it helps"), ("repair",)),
    Box(32, 5, "smaller model", ("an ordinary folder that", "stock transformers loads"), ("checkpoint",), MODEL),
    Box(0, 5, "judge, show, share", ("perplexity, tasks, report,", "GGUF, ONNX, Hub"),
        ("eval", "report", "export", "publish")),
)  # fmt: skip


def drawn() -> str:
    """The figure as SVG text, always the same."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.7), facecolor="white")
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axes.set_xlim(-1, 121)
        axes.set_ylim(0, 51)
        axes.axis("off")
        for box in BOXES:
            _draw(axes, box)
        for before, after in pairwise(BOXES):
            _arrow(axes, *_ends(before, after))
        _arrow(axes, (106, 30 + HIGH), (78, 30 + HIGH), bend="arc3,rad=0.2")
        axes.text(92, 49.2, "measure again, around the solution", ha="center", va="center", color=MUTED, fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _draw(axes: Axes, box: Box) -> None:
    middle = box.left + WIDE / 2
    axes.add_patch(
        FancyBboxPatch((box.left, box.bottom), WIDE, HIGH, boxstyle="round,pad=0.4", fc=box.colour, ec=MUTED, lw=0.8)
    )
    axes.text(middle, box.bottom + 10.2, box.title, ha="center", va="center", weight="bold", fontsize=10)
    for number, line in enumerate(box.lines):
        axes.text(middle, box.bottom + 6.4 - 3.2 * number, line, ha="center", va="center", fontsize=8)
    axes.text(middle, box.bottom - 2.6, ", ".join(box.packages), ha="center", va="center", color=MUTED, fontsize=7.5)


def _ends(before: Box, after: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where an arrow from one box to its neighbour begins and ends."""
    if before.left == after.left:
        middle = before.left + WIDE - 3
        return (middle, before.bottom - 0.6), (middle, after.bottom + HIGH + 0.6)
    level, right = before.bottom + HIGH / 2, before.left < after.left
    begin, end = (before.left + WIDE + 0.6, after.left - 0.6) if right else (before.left - 0.6, after.left + WIDE + 0.6)
    return (begin, level), (end, level)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], bend: str = "arc3") -> None:
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=INK, lw=1.2, connectionstyle=bend)
    )


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
