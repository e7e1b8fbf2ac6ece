"""Tables and figures of ``quality.py``, from its cells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from multipruner.report.figures.drawing import GRID, SERIES, drawing, logarithmic, percent
from multipruner.storage.files import write_atomically

Cell = Mapping[str, Any]
TEXTS = {"wikitext2": "WikiText-2", "alpaca": "held-out Alpaca"}
NEAR = 0.002
"""A ratio that is further from what was asked is marked."""
MANY = 5.0
"""Times dense from which the axis is logarithmic."""
NOTES = """\
Perplexities are means over the seeds ± their standard deviation (times dense); WikiText-2 in sequences of 2,048 tokens.
Tasks are of the first seed, in per cent ± standard error; the average's error takes the tasks for independent. What
was asked for is given where the share removed is more than 0.2 points off. Seconds leave out the evaluation."""


class Tables:
    """All rows so far, in ``table.md``.

    Args:
        path: of the file.
        dense: the cell of the dense model.
    """

    def __init__(self, path: Path, dense: Cell) -> None:
        self.path, self.dense = path, dense
        self.sections: dict[str, dict[str, list[Cell]]] = {}

    def add(self, section: str, label: str, key: str, cell: Cell) -> None:
        """Put a cell into its row, and what is there into the file; the row is printed."""
        group = self.sections.setdefault(section, {}).setdefault(f"{label}\n{key}", [])
        group.append(cell)
        write_atomically(self.path, self.text())
        print(row(label, self.dense, group), flush=True)

    def groups(self, section: str) -> list[tuple[str, list[Cell]]]:
        """(label, cells) of the rows of a section."""
        return [(name.partition("\n")[0], group) for name, group in self.sections.get(section, {}).items()]

    def rows(self) -> list[list[str | float | None]]:
        """All rows as :func:`results.record` takes them: the section, then the cells of the table as text."""
        return [
            [section, *(cell.strip() for cell in row(name, self.dense, group)[1:-1].split("|"))]
            for section in self.sections
            for name, group in [("dense", [self.dense]), *self.groups(section)]
        ]

    def cells(self) -> list[dict[str, Any]]:
        """All numbers behind these rows: a cell per seed, with its section and row, and without what was asked."""
        return [
            {"section": section, "row": name, **{key: value for key, value in cell.items() if key != "asked"}}
            for section in self.sections
            for name, group in [("dense", [self.dense]), *self.groups(section)]
            for cell in group
        ]

    def text(self) -> str:
        """Markdown: a table per section."""
        lines = []
        for section in self.sections:
            rows = [("dense", [self.dense]), *self.groups(section)]
            lines += [
                f"## {section}",
                "",
                *heading(self.dense),
                *(row(name, self.dense, group) for name, group in rows),
            ]
            lines.append("")
        return "\n".join([*lines, NOTES, ""])


def heading(dense: Cell) -> list[str]:
    """The first two lines of a table."""
    tasks = sorted(dense.get("tasks", {}))
    names = ["", "removed", "parameters", *TEXTS.values(), *tasks, *(["average"] if tasks else []), "seconds"]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def row(label: str, dense: Cell, group: Sequence[Cell]) -> str:
    """One line: means over the seeds and their standard deviation; tasks of the seed that has them."""
    tasks = sorted(dense.get("tasks", {}))
    done = [one for one in group if "impossible" not in one]
    if not done:
        blank = [""] * (len(TEXTS) + len(tasks) + bool(tasks) + 1)
        return "| " + " | ".join([label, f"{group[0]['target']:.0%} is out of reach", "", *blank]) + " |"
    scored = next((one["tasks"] for one in done if "tasks" in one), {})
    accuracies = [accuracy(scored[task]) if task in scored else None for task in tasks]
    cells = [label, removed(done), f"{statistics.mean(one['parameters'] for one in done) / 1e6:,.2f}M"]
    cells += [perplexity(text, dense, done) for text in TEXTS]
    cells += [shown(one) for one in accuracies] + ([shown(average(accuracies))] if tasks else [])
    seconds = [sum(one["seconds"].values()) - one["seconds"]["evaluation"] for one in done if "seconds" in one]
    cells.append(f"{statistics.mean(seconds):,.0f}" if seconds else "")
    return "| " + " | ".join(cells) + " |"


def removed(group: Sequence[Cell]) -> str:
    """The share of the parameters that went, and what was asked where that is something else."""
    ratio = statistics.mean(one["ratio"] for one in group)
    asked = group[0].get("target", ratio)
    return f"{ratio:.2%}" + (f" (asked: {asked:.1%})" if abs(ratio - asked) > NEAR else "")


def perplexity(text: str, dense: Cell, group: Sequence[Cell]) -> str:
    """Mean and spread over the seeds."""
    values = [one[text]["value"] for one in group]
    spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({statistics.mean(values) / dense[text]['value']:.2f}x)"


def accuracy(task: Cell) -> tuple[float, float] | None:
    """Normalised accuracy where the task has one, else accuracy, with its standard error."""
    best = task["metrics"].get("acc_norm") or task["metrics"].get("acc")
    return (best["value"], best["stderr"] or 0.0) if best else None


def average(accuracies: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Mean of all tasks, and its standard error when they are independent; none where a task is missing."""
    there = [one for one in accuracies if one is not None]
    if not there or len(there) < len(accuracies):
        return None
    return statistics.mean(value for value, _ in there), sqrt(sum(error**2 for _, error in there)) / len(there)


def shown(score: tuple[float, float] | None) -> str:
    """A score in per cent."""
    return f"{100 * score[0]:.1f} ±{100 * score[1]:.1f}" if score else ""


def times(text: str, dense: Cell, group: Sequence[Cell]) -> list[float]:
    """Perplexities over the dense model's."""
    return [one[text]["value"] / dense[text]["value"] for one in group]


def quality_figure(path: Path, dense: Cell, groups: Sequence[tuple[str, Sequence[Cell]]]) -> None:
    """Perplexity over dense against the ratio: a line per method through the means, its band from seed to seed."""
    methods: dict[str, list[list[Cell]]] = {}
    for name, group in groups:
        done = [one for one in group if "impossible" not in one]
        if done:
            methods.setdefault(name, []).append(done)

    def panel(axes: Axes, text: str) -> None:
        for (name, points), colour in zip(methods.items(), _colours(len(methods)), strict=True):
            ratios = [0.0, *(statistics.mean(one["ratio"] for one in group) for group in points)]
            values = [[1.0], *(times(text, dense, group) for group in points)]
            axes.plot(ratios, [statistics.mean(one) for one in values], "o-", color=colour, markersize=4, label=name)
            low, high = [min(one) for one in values], [max(one) for one in values]
            axes.fill_between(ratios, low, high, color=colour, alpha=0.2)
            if max(high) > MANY:
                logarithmic(axes.yaxis, axes.set_yscale)
        axes.xaxis.set_major_formatter(FuncFormatter(percent))
        axes.set_xlabel("parameters removed")

    if methods:
        _draw(path, "Perplexity against what is removed", panel)


def sizes_figure(path: Path, dense: Cell, groups: Sequence[tuple[str, Sequence[Cell]]]) -> None:
    """Perplexity over dense against the tokens that the moments are of."""
    cells = [one for _, group in groups for one in group if "impossible" not in one]
    cells.sort(key=lambda one: one["calibration"]["moments_tokens"])

    def panel(axes: Axes, text: str) -> None:
        tokens, values = [one["calibration"]["moments_tokens"] for one in cells], times(text, dense, cells)
        axes.plot(tokens, values, "o-", color=SERIES[0], markersize=4)
        for place in zip(tokens, values, strict=True):
            axes.annotate(f"{place[1]:.2f}x", place, xytext=(5, 4), textcoords="offset points", fontsize=7)
        logarithmic(axes.xaxis, axes.set_xscale)
        axes.set_xticks(tokens, [f"{one / 1024:g}k" for one in tokens])
        axes.margins(0.12)
        axes.set_xlabel("calibration tokens (moments), k = 1,024")

    if cells:
        _draw(path, "Perplexity against calibration tokens", panel)


def _colours(count: int) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(count)]


def _draw(path: Path, title: str, panel: Callable[[Axes, str], None]) -> None:
    """A panel per text, side by side; the numbers are in the tables."""

    def paint(width: float) -> Figure:
        sheet = Figure(figsize=(width, 0.42 * width), layout="constrained")
        for axes, (text, name) in zip(sheet.subplots(1, len(TEXTS)), TEXTS.items(), strict=True):
            panel(axes, text)
            axes.set_title(name)
            axes.set_ylabel("perplexity, times dense")
            axes.grid(axis="y", color=GRID)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        return sheet

    picture = drawing(paint, name=path.stem, title=title, caption="", alt="", columns=(), rows=())
    write_atomically(path, picture.png)
