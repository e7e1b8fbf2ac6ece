"""Runs against each other, and what a search found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from multipruner.core.costs import reported_as
from multipruner.report.inputs import Front, RunFiles

from .drawing import BLUE, GRID, MUTED, NARROW, SERIES, Drawing, canvas, drawing, logarithmic, percent, printable

_MARKERS = "osD^vP"


class Measured(NamedTuple):
    """One run's perplexity on one text."""

    run: str
    ratio: float
    perplexity: float
    stderr: float | None
    tuned: bool
    """Whether the model was trained after the cut."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Perplexities that may be compared: the same dense model and tokenizer, and the same number for the dense model on
    the same text.
    """

    model: str
    text: str
    dense: float
    points: tuple[Measured, ...]
    """By ratio."""

    def of(self, tuned: bool) -> Curve:
        """Return the points of tuned models alone, or those of models as they were pruned."""
        return replace(self, points=tuple(point for point in self.points if point.tuned == tuned))


def curves(runs: Sequence[RunFiles]) -> list[Curve]:
    """Return the perplexities of several runs in groups. A text of the same name with another dense perplexity is
    another text, and a perplexity counts per token of the run's own tokenizer.
    """
    names: dict[str, str] = {}
    groups: dict[tuple[str, str, str | None, float], list[Measured]] = {}
    for run in runs:
        model = run.report.model
        base = model.fingerprint or model.name
        tokenizer = vocabulary_of(run.folder)
        names[base] = model.name.rstrip("/").rpartition("/")[2]
        for scores in run.report.scores:
            for text, c in scores.perplexity.items():
                if math.isfinite(c.dense) and math.isfinite(c.pruned):
                    key = (text, base, tokenizer, float(f"{c.dense:.6g}"))
                    tuned = bool(run.report.tuned)
                    point = Measured(run.label, run.report.ratio, c.pruned, c.pruned_stderr, tuned)
                    points = groups.setdefault(key, [])
                    if point not in points:
                        points.append(point)
    return [
        Curve(names[base], text, dense, tuple(sorted(points, key=lambda each: each.ratio)))
        for (text, base, _, dense), points in groups.items()
    ]


def vocabulary_of(folder: Path) -> str | None:
    """Return a hash of the tokens that a folder's tokenizer knows; ``None`` where it has no ``tokenizer.json``."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        tokens = [content["model"], content.get("added_tokens")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()


def perplexity_figure(found: Sequence[Curve], name: str) -> Drawing:
    """Return perplexity against ratio, a line per text, of pruned models and of tuned ones."""

    one_model = len({curve.model for curve in found}) == 1
    lines = [(line, tuned) for curve in found for tuned in (False, True) if (line := curve.of(tuned)).points]

    def paint(width: float) -> Figure:
        figure, (axes,) = canvas(width, 3.8)
        named: set[str] = set()
        for index, (curve, tuned) in enumerate(lines):
            colour, marker = SERIES[index % len(SERIES)], _MARKERS[index % len(_MARKERS)]
            ratios = [0.0, *(point.ratio for point in curve.points)]
            values = [curve.dense, *(point.perplexity for point in curve.points)]
            errors = [0.0, *(p.stderr or 0 for p in curve.points)]
            label = printable(curve.text if one_model else f"{curve.text} · {curve.model}", 44)
            label += ", tuned" if tuned else ""
            style = {"markersize": 5, "linewidth": 1.0, "capsize": 2.5, "linestyle": "--" if tuned else ":"}
            axes.errorbar(ratios, values, yerr=errors, color=colour, marker=marker, label=label, **style)
            for run, ratio, value, *_ in curve.points:
                if run not in named:
                    above = len(named) % 2 == 0
                    named.add(run)
                    place = {"xytext": (7, 8 if above else -8), "va": "bottom" if above else "top", "ha": "left"}
                    said = printable(run, 16 if width <= NARROW else 30)
                    axes.annotate(said, (ratio, value), textcoords="offset points", fontsize=8, **place)
        logarithmic(axes.yaxis, axes.set_yscale)
        axes.xaxis.set_major_formatter(FuncFormatter(percent))
        axes.margins(x=0.12, y=0.16)
        axes.set_xlim(left=-0.01)
        axes.set_xlabel("removed, of all parameters")
        axes.set_ylabel("perplexity")
        axes.grid()
        figure.legend(loc="outside upper left", ncols=1)
        return figure

    return drawing(
        paint,
        name=name,
        title="Perplexity against ratio",
        caption="At 0% the dense model. Whiskers are one standard error; the axis is logarithmic. Only perplexities of "
        "the same text and the same dense model are joined, and tuned models with tuned ones.",
        alt="; ".join(
            f"{curve.text}: dense {curve.dense:.4g}, "
            + ", ".join(f"{run} at {ratio:.1%} {value:.4g}" for run, ratio, value, *_ in curve.points)
            for curve in found
        ),
        columns=("model", "text", "run", "ratio", "perplexity", "stderr", "tuned"),
        rows=[
            (curve.model, curve.text, *row[:-1], int(row[-1]))
            for curve in found
            for row in (("dense", 0.0, curve.dense, None, False), *curve.points)
        ],
    )


def best_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (loss, cost) that no other beats in both, by rising cost."""
    best: list[tuple[float, float]] = []
    for loss, cost in sorted(points, key=lambda point: (point[1], point[0])):
        if not best or loss < best[-1][0]:
            best.append((loss, cost))
    return best


def front_figure(front: Front, name: str) -> Drawing:
    """Return loss against a cost, the best points joined."""
    best = best_points(front.points)
    others = [point for point in front.points if point not in best]
    row = reported_as(front.cost)
    label, scale = (row.axis_label, row.axis[0]) if row else (front.cost, 1.0)

    def paint(width: float) -> Figure:
        figure, (axes,) = canvas(width, 3.4)
        x, y = [cost / scale for _, cost in best], [loss for loss, _ in best]
        if others:
            style: dict[str, Any] = {"color": MUTED, "markersize": 4, "alpha": 0.6, "label": "beaten by another"}
            axes.plot([cost / scale for _, cost in others], [loss for loss, _ in others], "o", **style)
        axes.step(x, y, where="post", color=BLUE, linewidth=1.2)
        axes.plot(x, y, "o", color=BLUE, markersize=5.5, label="Pareto front")
        axes.set_xlabel(label)
        axes.set_ylabel("loss (nats per token)")
        axes.grid(color=GRID)
        figure.legend(loc="outside upper left", ncols=2)
        return figure

    return drawing(
        paint,
        name=name,
        title=f"Pareto front of {front.label}",
        caption=f"Loss against {label}: below and to the left is better.",
        alt=f"{len(best)} of {len(front.points)} candidates are on the front, with losses from {best[-1][0]:.3f} to "
        f"{best[0][0]:.3f} nats per token.",
        columns=("loss_nats", front.cost, "on_front"),
        rows=[(loss, cost, int((loss, cost) in best)) for loss, cost in front.points],
    )
