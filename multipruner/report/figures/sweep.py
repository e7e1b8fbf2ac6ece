"""The figures of a sweep: loss against what was bounded, and what every point keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from multipruner.core.costs import Costs, cost_named, timed_first
from multipruner.core.plan import PruningPlan
from multipruner.report.inputs import Amount, Base, Report, RunFiles

from .drawing import BLUE, INK, NARROW, VERMILLION, Drawing, canvas, drawing, printable
from .structure import structures_figure

_SERIES = {"greedy": (VERMILLION, "s", "greedy path"), "program": (BLUE, "o", "exact program")}


def loss_figure(
    points: Sequence[tuple[str, Mapping[str, Any]]], budget: str, objective: str, workload: str | None
) -> Drawing:
    """Draw loss against the cost that was bounded, with the dense model; its CSV holds every number of a point.

    Args:
        points: (name, record of a point), the dense model's first.
        budget: what was bounded.
        objective: ``"kl"`` or ``"nll"``.
        workload: of the latency table, if there is one.
    """
    cost = "parameters" if budget == "ratio" else budget
    divisor, axis = cost_named(cost).axis[0], cost_named(cost).axis_label
    where = f", {workload}" if budget == "latency" and workload else ""
    dense = points[0][1]["costs"]
    named = [one.name for one in timed_first() if one.name in dense]
    return drawing(
        lambda width: _paint(points, width, cost, divisor, axis + where, objective),
        name="sweep",
        title=f"Calibration loss against {axis.partition(',')[0]}{where}",
        caption="Every point is the structure with the lowest measured loss that was found within its budget.",
        alt="; ".join(f"{name}: {row['costs'][cost]:.6g}, {row['loss']:.4g} nats" for name, row in points),
        columns=("point", "method", "value", "limit", "loss", "predicted_loss", "ratio", *named,
                 *(f"{name}_share" for name in named), "rounds", "plan"),
        rows=[(name, row["method"], row["value"], row["limit"], row["loss"], row["predicted_loss"], row["ratio"],
               *(row["costs"][c] for c in named), *(row["costs"][c] / dense[c] for c in named), len(row["rounds"]),
               row["plan"]) for name, row in points],
    )  # fmt: skip


def _paint(
    points: Sequence[tuple[str, Mapping[str, Any]]], width: float, cost: str, divisor: float, axis: str, objective: str
) -> Figure:
    figure, (axes,) = canvas(width, 4.2 if width > NARROW else 3.4)
    dense = points[0][1]
    at = (dense["costs"][cost] / divisor, dense["loss"])
    for strategy, (colour, marker, label) in _SERIES.items():
        rows = [row for _, row in points if row["method"] == strategy]
        if rows:
            places = [(row["costs"][cost] / divisor, row["loss"]) for row in rows]
            axes.plot(*zip(*sorted([*places, at]), strict=True), color=colour, linewidth=1.4, zorder=2)
            axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=6, label=label, zorder=3)
            _label(axes, rows, cost, divisor, colour, above=strategy == "greedy")
    axes.plot(*at, "D", color=INK, markersize=7, label="dense", zorder=4)
    axes.margins(x=0.1, y=0.16)
    axes.grid(visible=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel(axis if width > NARROW else axis.partition(",")[0])
    what = "divergence from the dense model" if objective == "kl" else "negative log-likelihood"
    axes.set_ylabel(f"{what}, nats per token" if width > NARROW else "nats per token")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _label(
    axes: Axes, rows: Sequence[Mapping[str, Any]], cost: str, divisor: float, colour: str, *, above: bool
) -> None:
    """Write the value at every point, on the side of the falling curve where the other one is not."""
    shift, sides = ((5, 4), ("left", "bottom")) if above else ((-6, -4), ("right", "top"))
    for row in rows:
        axes.annotate(
            printable(row["value"], 12), (row["costs"][cost] / divisor, row["loss"]), xytext=shift,
            textcoords="offset points", ha=sides[0], va=sides[1], color=colour, fontsize=8,
        )  # fmt: skip


def structures_of(plans: Mapping[str, PruningPlan], costs: Costs) -> Drawing:
    """Return one strip per point: the heads and channels that every layer keeps.

    Args:
        plans: by the point's name.
        costs: of the model.
    """
    runs = []
    for name, plan in plans.items():
        structure, dense = plan.structure, plan.dense
        report = Report(
            model=Base(plan.model),
            ratio=costs.ratio(structure),
            backbone_ratio=costs.backbone_ratio(structure),
            parameters=Amount(costs.parameters(dense), costs.parameters(structure)),
            structure=structure.to_json(),
        )
        runs.append(RunFiles(name, Path(name), report, plan, ()))
    return structures_figure(runs, "structures")
