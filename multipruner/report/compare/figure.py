"""Loss and accuracy against what is saved: the runs that no other beats are joined and named, the others are pale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from multipruner.report.figures.drawing import (
    BLUE,
    GRID,
    MUTED,
    NARROW,
    VERMILLION,
    Drawing,
    canvas,
    drawing,
    logarithmic,
    percent,
    plain,
    printable,
)

from .standing import Panel, Point, Ranking

_KINDS = {"pruned": (BLUE, "o", "-", "pruned only"), "tuned": (VERMILLION, "D", "--", "tuned after the cut")}
_WIDE = 5.0
"""Above this quotient of the largest and the smallest loss, the axis is logarithmic."""
_EDGE = 0.15
"""Share of the axis at either end where a name in the middle of its place could leave the picture."""


def pareto_figure(ranking: Ranking, name: str) -> Drawing:
    """Draw a panel per saving, and one for the tasks; pruned and tuned models have fronts of their own.

    Savings that are the same for every run, as parameters and weights of one type are, share a panel.
    """
    panels = _joined(ranking.panels)

    def paint(width: float) -> Figure:
        figure, axes = canvas(width, 0.5 + 2.9 * len(panels), len(panels))
        for each, panel in zip(axes, panels, strict=True):
            _paint(each, panel, ranking, narrow=width <= NARROW)
        handles = {text: line for each in axes for line, text in zip(*each.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=1 if width <= NARROW else 3)
        return figure

    better = "Further right and lower is better" + (
        "; of the tasks, further right and higher." if any(panel.tasks for panel in ranking.panels) else "."
    )
    return drawing(
        paint,
        name=name,
        title=f"What every run saves and loses: {ranking.measure}",
        caption=f"{better} Joined and named: no other run of its kind is at least as good in both and better in one. "
        "Pruned and tuned models are ranked apart.",
        alt="; ".join(_said(panel) for panel in panels),
        columns=("quality", "saving", "run", "kind", "saved", "value", "unbeaten", "beaten_by"),
        rows=[
            ("accuracy kept" if panel.tasks else ranking.measure, panel.saving, point.entry.run.label,
             point.entry.kind, point.saved, point.value, int(point.beaten_by is None), point.beaten_by)
            for panel in ranking.panels
            for point in panel.points
        ],
    )  # fmt: skip


def _joined(panels: Sequence[Panel]) -> list[Panel]:
    """Return the panels that look different, each with the names of all savings that look so."""
    there: dict[tuple[Any, ...], Panel] = {}
    for panel in panels:
        places = {point.entry.run.label: (round(point.saved, 3), point.value) for point in panel.points}
        look = (panel.shares, panel.tasks, *sorted(places.items()))
        known = there.get(look)
        there[look] = panel if known is None else replace(known, saving=f"{known.saving}, {panel.saving}")
    return list(there.values())


def _said(panel: Panel) -> str:
    best = ", ".join(point.entry.run.label for point in panel.points if point.beaten_by is None)
    return f"{'tasks' if panel.tasks else 'loss'} against {panel.saving}: no other beats {best}"


def _paint(axes: Axes, panel: Panel, ranking: Ranking, *, narrow: bool) -> None:
    for kind, (colour, marker, line, label) in _KINDS.items():
        points = [point for point in panel.points if point.entry.kind == kind]
        beaten = [point for point in points if point.beaten_by is not None]
        front = sorted((p for p in points if p.beaten_by is None), key=lambda p: (p.saved, p.value))
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6}
        if beaten:
            axes.plot(*_places(beaten), **style, linestyle="", alpha=0.3, label=f"{label}, beaten")
        if front:
            axes.plot(*_places(front), **style, linestyle=line, linewidth=1.2, label=label)
            saved = [point.saved for point in panel.points]
            _name(axes, front, (min(saved), max(saved)), colour, 16 if narrow else 30,
                  above=(kind == "tuned") is panel.tasks)  # fmt: skip
    if not panel.tasks and ranking.relative:
        axes.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=":")
    axes.margins(x=0.16, y=0.2)
    axes.grid(color=GRID)
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
    axes.xaxis.set_major_formatter(FuncFormatter(percent if panel.shares else lambda value, _: f"{value:.3g}×"))
    axes.set_xlabel(f"{panel.saving} saved" if panel.shares else panel.saving)
    axes.yaxis.set_major_formatter(FuncFormatter(percent if panel.tasks else plain))
    values = [point.value for point in panel.points]
    if not panel.tasks and max(values) > _WIDE * min(values):
        logarithmic(axes.yaxis, axes.set_yscale)
    axes.set_ylabel(_quality(panel, ranking, narrow=narrow))


def _quality(panel: Panel, ranking: Ranking, *, narrow: bool) -> str:
    if panel.tasks:
        return "accuracy kept" if narrow else "accuracy kept, mean of tasks"
    if ranking.relative:
        return "perplexity / dense" if narrow else "perplexity / the dense model's"
    return ranking.measure


def _places(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.saved for point in points], [point.value for point in points]


def _name(axes: Axes, points: list[Point], ends: tuple[float, float], colour: str, length: int, *, above: bool) -> None:
    """Write the names on the side where the other kind's front is not, and inwards at the ends of the axis; equal
    places share one.
    """
    low, high = ends
    there: dict[tuple[float, float], list[str]] = {}
    for point in points:
        there.setdefault((point.saved, point.value), []).append(point.entry.run.label)
    for place, labels in there.items():
        share = (place[0] - low) / (high - low) if high > low else 0.5
        side = "left" if share < _EDGE else "right" if share > 1 - _EDGE else "center"
        axes.annotate(
            printable(" = ".join(labels), length), place, xytext=(0, 8 if above else -8), ha=side,
            va="bottom" if above else "top", textcoords="offset points", color=colour, fontsize=8,
        )  # fmt: skip
