"""Draw the figure of "How it works": what can go, what removing costs, what was chosen.

python docs/figures/how_it_works.py     # writes how_it_works.svg beside this file

The drawing is kept in the repository, so that the pages can be read without building them; a test draws it again and
compares. The numbers are measurements of one run (how_it_works.json), not a sketch.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
DATA, PICTURE = HERE / "how_it_works.json", HERE / "how_it_works.svg"
INK, MUTED, EMPTY = "#1b1f24", "#57606b", "#e9edf1"
ATTENTION, MLP = "#009e73", "#d55e00"  # the colours of the report's figures (Okabe and Ito)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "how it works",
}  # fmt: skip


def drawn() -> str:
    """The figure of the data beside this file, as SVG text."""
    return draw(json.loads(DATA.read_text(encoding="utf-8")))


def draw(data: dict[str, Any]) -> str:
    """The figure as SVG text, the same for the same data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.6), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.25), width_ratios=(1, 1.15))
        _layer(figure.add_subplot(grid[0, :]))
        _tables(figure.add_subplot(grid[1, 0]), data)
        _chosen(figure.add_subplot(grid[1, 1]), data)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _layer(axes: Axes) -> None:
    """One decoder layer: the residual stream runs through, two blocks add to it."""
    axes.set_title("1. What can go, in every decoder layer")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 32)
    axes.axis("off")
    axes.add_patch(FancyArrowPatch((1, 4), (99, 4), arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.6))
    axes.text(1, 0.2, "residual stream: its width never changes; grey: gone", color=MUTED)
    for left, name, colour in ((9, "attention block", ATTENTION), (55, "MLP block", MLP)):
        axes.add_patch(
            FancyBboxPatch((left, 9), 34, 18, boxstyle="round,pad=0.6", fc="none", ec=colour, lw=1.2, ls=(0, (4, 2)))
        )
        axes.text(left, 29, f"{name} (may go whole)", color=colour, weight="bold")
        for begin, end, bend in (
            ((left - 4, 4), (left - 0.4, 18), "angle,angleA=90,angleB=0"),
            ((left + 34.4, 18), (left + 38, 4), "angle,angleA=0,angleB=90"),
        ):
            axes.add_patch(
                FancyArrowPatch(begin, end, arrowstyle="-|>", connectionstyle=bend, mutation_scale=9, color=MUTED)
            )
    for group in range(3):
        gone = group == 1
        for head in range(3):
            _cell(axes, 10 + 11 * group + 3.3 * head, 17, 2.8, 7, EMPTY if gone else ATTENTION)
        _cell(axes, 10 + 11 * group, 11.5, 9.4, 3.5, EMPTY if gone else ATTENTION)
    axes.text(26, 9.2, "KV groups: a KV head with its query heads", ha="center", color=MUTED, fontsize=8)
    for channel in range(16):
        _cell(axes, 56 + 2.05 * channel, 11.5, 1.6, 12.5, EMPTY if channel > 10 else MLP)
    axes.text(72, 9.2, "channels", ha="center", color=MUTED, fontsize=8)


def _cell(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, linewidth=0))


def _tables(axes: Axes, data: dict[str, Any]) -> None:
    """Loss of the whole model when only one MLP shrinks, and the widths that the program took."""
    axes.set_title("2. What it costs (measured)")
    for (layer, row), marker in zip(data["tables"].items(), "os^", strict=True):
        points = sorted((int(width), loss) for width, loss in row.items() if loss > 0)
        axes.plot(*zip(*points, strict=True), marker=marker, ms=4.5, lw=1.3, label=f"MLP of layer {layer}")
    axes.set_yscale("log")
    axes.set_xlabel(f"channels that stay, of {data['dense'][2]:,}")
    axes.set_ylabel("divergence from the dense model, nats")
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.set_xticks([0, 384, 768, 1152])
    axes.legend(fontsize=8)


def _chosen(axes: Axes, data: dict[str, Any]) -> None:
    """What every layer keeps: query heads upwards, channels downwards."""
    heads, _, channels = data["dense"]
    layers = range(len(data["structure"]))
    axes.set_title(f"3. What was chosen, at {data['ratio']:.0%}")
    for sign, colour, place, full in ((1, ATTENTION, 0, heads), (-1, MLP, 2, channels)):
        axes.bar(layers, [sign] * len(layers), color=EMPTY, width=0.82)
        axes.bar(layers, [sign * size[place] / full for size in data["structure"]], color=colour, width=0.82)
    axes.axhline(0, color="white", lw=1.5)
    axes.set_yticks([-0.5, 0.5], ["MLP\nchannels", "query\nheads"])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"decoder layer of {data['model']}")
    axes.spines["left"].set_visible(False)
    axes.set_xlim(-0.7, len(layers) - 0.3)


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
