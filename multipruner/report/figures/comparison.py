"""Dense against pruned: costs, latency, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from multipruner.eval.comparison import Contrast
from multipruner.report.inputs import RunFiles
from multipruner.report.words import amount, label_of

from .drawing import (
    BLUE,
    EMPTY,
    INK,
    MUTED,
    NARROW,
    PAPER,
    VERMILLION,
    Drawing,
    canvas,
    drawing,
    logarithmic,
    percent,
    printable,
)


def costs_figure(run: RunFiles, name: str) -> Drawing:
    """Return what is left of every cost, as a share of the dense model's."""
    costs = {"parameters": run.report.parameters, **run.report.costs}
    shares = {cost: pair.after / pair.before for cost, pair in costs.items() if pair.before}
    labels = {cost: label_of(cost) for cost in shares}

    def paint(width: float) -> Figure:
        figure, (axes,) = canvas(width, 0.75 + 0.42 * len(shares))
        places = range(len(shares))
        axes.barh(places, [1] * len(shares), color=EMPTY, height=0.62)
        axes.barh(places, list(shares.values()), color=BLUE, height=0.62)
        for place, (cost, share) in enumerate(shares.items()):
            said = f"{share:.1%}" if width <= NARROW else f"{share:.1%}  ({amount(cost, costs[cost].after)})"
            axes.text(share - 0.012, place, said, color=PAPER, ha="right", va="center", weight="bold", fontsize=8.5)
        axes.set_yticks(places, [printable(labels[cost], 28) for cost in shares])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(percent))
        axes.set_xlabel("left, of the dense model's")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return figure

    return drawing(
        paint,
        name=name,
        title="Costs, of the dense model's",
        caption="Blue is what is left.",
        alt="Left of the dense model: " + ", ".join(f"{labels[cost]} {s:.1%}" for cost, s in shares.items()) + ".",
        columns=("cost", "before", "after", "share"),
        rows=[(cost, costs[cost].before, costs[cost].after, share) for cost, share in shares.items()],
    )


@dataclass(frozen=True, slots=True)
class Phase:
    """Milliseconds of one phase of generation; ``None`` where not known."""

    name: str
    predicted: float | None
    measured: float | None
    dense: float | None


def phases(latency: Mapping[str, Any] | None) -> list[Phase]:
    """Return the phases of a report's ``latency``: ``{phase: {"predicted_ms", "measured_ms", "dense_ms"}}``.

    The phases may also lie under ``"phases"``, and the ``_ms`` may be missing; whatever has neither a predicted nor a
    measured number is no phase.
    """
    latency = latency or {}
    nested = latency.get("phases")
    result = []
    for name, row in (nested if isinstance(nested, dict) else latency).items():
        if isinstance(row, dict):
            predicted, measured, dense = (_number(row, key) for key in ("predicted", "measured", "dense"))
            if predicted is not None or measured is not None:
                result.append(Phase(str(name), predicted, measured, dense))
    return result


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(f"{key}_ms", row.get(key))
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # pyright: ignore[reportArgumentType]


def latency_figure(run: RunFiles, name: str) -> Drawing:
    """Draw predicted beside measured milliseconds, per phase."""
    found = phases(run.report.latency)
    kinds = [("dense", MUTED), ("predicted", VERMILLION), ("measured", BLUE)]
    kinds = [(kind, colour) for kind, colour in kinds if any(getattr(phase, kind) is not None for phase in found)]

    def paint(width: float) -> Figure:
        figure, (axes,) = canvas(width, 0.9 + 0.8 * len(found))
        height = 0.8 / len(kinds)
        for index, (kind, colour) in enumerate(kinds):
            values = [getattr(phase, kind) or 0 for phase in found]
            places = [place + (index - (len(kinds) - 1) / 2) * height for place in range(len(found))]
            bars = axes.barh(places, values, height=height * 0.9, color=colour, label=kind)
            axes.bar_label(bars, [f"{value:.4g} ms" if value else "" for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(found)), [printable(phase.name, 24) for phase in found])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel("milliseconds")
        figure.legend(loc="outside upper left", ncols=3)
        return figure

    return drawing(
        paint,
        name=name,
        title="Latency, predicted against measured",
        caption="Predicted: the sum of the table's entries. Measured: the whole model.",
        alt="; ".join(
            f"{p.name}: " + ", ".join(f"{k} {getattr(p, k):.4g} ms" for k, _ in kinds if getattr(p, k) is not None)
            for p in found
        ),
        columns=("phase", "dense_ms", "predicted_ms", "measured_ms"),
        rows=[(phase.name, phase.dense, phase.predicted, phase.measured) for phase in found],
    )


def scores_figure(rows: Sequence[tuple[str, Contrast]], name: str, *, perplexity: bool) -> Drawing:
    """Draw dense and pruned side by side with one standard error to each side."""
    rows = [row for row in rows if math.isfinite(row[1].dense) and math.isfinite(row[1].pruned)]

    def paint(width: float) -> Figure:
        figure, (axes,) = canvas(width, 1.0 + 0.5 * len(rows))
        for offset, kind, colour, marker in ((-0.13, "dense", INK, "D"), (0.13, "pruned", BLUE, "o")):
            values = [getattr(contrast, kind) for _, contrast in rows]
            errors = [getattr(contrast, f"{kind}_stderr") or 0 for _, contrast in rows]
            places = [place + offset for place in range(len(rows))]
            style = {"color": colour, "markersize": 5, "capsize": 2.5, "linewidth": 1.4}
            axes.errorbar(values, places, xerr=errors, fmt=marker, label=kind, **style)
        axes.set_yticks(range(len(rows)), [printable(label, 20 if width <= NARROW else 44) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        if perplexity:
            logarithmic(axes.xaxis, axes.set_xscale)
        axes.set_xlabel("perplexity (less is better)" if perplexity else "score (more is better)")
        figure.legend(loc="outside upper left", ncols=2)
        return figure

    what = "Perplexity" if perplexity else "Tasks"
    return drawing(
        paint,
        name=name,
        title=f"{what}, dense against pruned",
        caption="Whiskers are one standard error to each side."
        + (" The axis is logarithmic." if perplexity else " Both models answered the same examples."),
        alt="; ".join(f"{label}: dense {c.dense:.4g}, pruned {c.pruned:.4g}" for label, c in rows),
        columns=("name", "dense", "dense_stderr", "pruned", "pruned_stderr", "difference", "difference_stderr", "n"),
        rows=[(label, c.dense, c.dense_stderr, c.pruned, c.pruned_stderr, c.difference, c.difference_stderr,
               c.examples) for label, c in rows],
    )  # fmt: skip
