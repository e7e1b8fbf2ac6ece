"""Pictures of a search: how the loss fell, and the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from multipruner.core.costs import COSTS
from multipruner.search.front import Front

from .drawing import BLUE, GRID, INK, MUTED, SERIES, VERMILLION, drawing

NAMES = {"nsga2": "evolution (NSGA-II)", "random": "random search"}


def _axis(name: str) -> tuple[str, float]:
    """Return what an axis is called, and what its numbers are divided by; what is no cost is a task's error."""
    if name == "loss":
        return "loss on the text that chose, nats", 1.0
    return (COSTS[name].axis_label, COSTS[name].axis[0]) if name in COSTS else (f"{name}: error", 1.0)


def convergence(histories: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Mapping[str, float]) -> bytes:
    """Return PNG: lowest and mean loss of the population against evaluations, one colour per algorithm.

    Args:
        histories: records by algorithm.
        seeds: losses of other structures on the same text, by name.
    """
    rows = {name: best_so_far(records) for name, records in histories.items()}

    def paint(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.45 * width), layout="constrained")
        axes = figure.subplots()
        for color, (name, line) in zip(SERIES, rows.items(), strict=False):
            counts = [count for count, _, _ in line]
            label = NAMES.get(name, name)
            axes.step(counts, [best for _, best, _ in line], where="post", color=color, lw=2, label=f"{label}: best")
            axes.plot(counts, [mean for _, _, mean in line], color=color, lw=1.2, ls=":", label=f"{label}: mean")
        for name, loss in seeds.items():
            axes.axhline(loss, color=MUTED, lw=1, ls="--")
            axes.annotate(name, (1, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          xytext=(0, 2), textcoords="offset points", color=INK, fontsize=8)  # fmt: skip
        drawn = [loss for line in rows.values() for row in line for loss in row[1:]]
        if min(drawn) > 0 and max(drawn) > 3 * min(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("evaluations (all fidelities)")
        axes.set_ylabel("loss of the population, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GRID)
        axes.legend()
        return figure

    table = [(name, *row) for name, line in rows.items() for row in line]
    return drawing(
        paint, name="convergence", title="Loss against evaluations", caption="", alt="",
        columns=("algorithm", "evaluations", "best", "mean"), rows=table,
    ).png  # fmt: skip


def front_picture(front: Front[Any], picked: int) -> bytes:
    """Return PNG: loss against every other objective, the picked point ringed.

    Args:
        front: the points.
        picked: place of the one that became the model.
    """
    first, *others = front.objectives
    loss_name, loss_unit = _axis(first)

    def paint(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.45 * width), layout="constrained")
        panels = figure.subplots(1, len(others), squeeze=False)[0]
        for axes, name in zip(panels, others, strict=True):
            label, unit = _axis(name)
            points = sorted((p.values[name] / unit, p.values[first] / loss_unit) for p in front.points)
            axes.plot(*zip(*points, strict=True), "o", color=BLUE, ms=5, label="front")
            chosen = front.points[picked].values
            axes.plot(chosen[name] / unit, chosen[first] / loss_unit, "o", mfc="none", mec=VERMILLION, mew=2, ms=12,
                      label="picked")  # fmt: skip
            axes.set_xlabel(label)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.grid(color=GRID)
        panels[0].set_ylabel(loss_name)
        panels[0].legend()
        return figure

    rows = [[p.values[name] for name in front.objectives] for p in front.points]
    return drawing(paint, name="front", title="The front", caption="", alt="", columns=front.objectives, rows=rows).png


def best_so_far(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """Return (evaluations, lowest loss seen so far, mean loss of the population) after every generation of one
    algorithm.
    """
    rows, best = [], float("inf")
    for record in records:
        if record["stage"] == "generation":
            best = min(best, record["min"][0])
            rows.append((sum(record["scored"]), best, record["mean"][0]))
    return rows
