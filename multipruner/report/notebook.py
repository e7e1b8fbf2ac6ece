"""How a finished run shows itself where it is displayed: one line of text, or a table, a picture and commands as HTML.

The HTML stands alone. It has no script, no style sheet and no inline SVG, which notebooks that are not trusted, and
sites that show notebooks, take away: styles are attributes, and the picture is a PNG in a data URI.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from multipruner.core.plan import PruningPlan

from .summary import next_commands

_CELL = "text-align:{};padding:.15rem .9rem .15rem 0;white-space:nowrap"
_PICTURE = "display:block;width:660px;max-width:100%;height:auto;background:#fff;margin:.6rem 0"
_WORDS = "margin:.3rem 0;overflow-wrap:anywhere"
_COMMANDS = f"{_WORDS};white-space:pre-wrap"


class Finished(Protocol):
    """What is shown: a :class:`multipruner.Run`, or anything with its folder, plan and report."""

    @property
    def folder(self) -> Path: ...
    @property
    def plan(self) -> PruningPlan: ...
    @property
    def report(self) -> dict[str, Any]: ...


def line(run: Finished) -> str:
    """Return a run in one line, for ``repr``: its folder, parameters before and after, and the ratio."""
    parameters, ratio = run.report["parameters"], run.report["ratio"]
    before, after = parameters["before"], parameters["after"]
    return f"Run({str(run.folder)!r}: {before:,} -> {after:,} parameters, -{ratio:.2%})"


def html(run: Finished) -> str:
    """Return a run as an HTML fragment: what it costs and scores beside the dense model, what every layer keeps, what
    next.

    Every name that comes from outside (model, folder, tasks) is escaped.

    Raises:
        pydantic.ValidationError: when the run's report is not what ``report.json`` holds.
    """
    from multipruner.report.figures.structure import structure_figure

    from .html import Html, element
    from .inputs import Report, RunFiles

    report = TypeAdapter(Report).validate_python(json.loads(json.dumps(run.report, default=str)))
    files = RunFiles(run.folder.name, run.folder, report, run.plan, ())
    drawing = structure_figure(files, "structure")
    source = f"data:image/png;base64,{b64encode(drawing.png).decode()}"
    said = f"{report.ratio:.2%} of all parameters removed, {report.backbone_ratio:.2%} of the decoder layers"
    if report.search.loss is not None:
        said += f"; calibration loss {report.search.loss:.4f} nats per token"
    head = element("tr", *(_cell("th", text, number) for number, text in enumerate(("", "dense", "pruned", "change"))))
    rows = (
        element("tr", *(_cell("td", text, number) for number, text in enumerate(row)))
        for row in _rows(report, run.report.get("latency"))
    )
    table = element("table", element("thead", head), element("tbody", *rows), style="border-collapse:collapse")
    picture = Html(element("img", src=source, alt=drawing.alt, style=_PICTURE).removesuffix("</img>"))
    return element(
        "div",
        element("p", element("b", report.model.description or report.model.name), style=_WORDS),
        element("p", said, style=_WORDS),
        element("div", table, style="overflow-x:auto"),
        picture,
        element("pre", next_commands(run.folder), style=_COMMANDS),
    )


def _cell(name: str, text: str, column: int) -> str:
    from .html import element

    return element(name, text, style=_CELL.format("right" if column else "left"))


def _rows(report: Any, latency: Mapping[str, Any] | None) -> Iterator[tuple[str, ...]]:
    """Name, dense, pruned, change: costs first, then milliseconds, then scores."""
    from .words import amount, contrast_cells, label_of, signed

    for cost, pair in {"parameters": report.parameters, **report.costs}.items():
        change = signed(pair.after / pair.before - 1) if pair.before else "–"
        yield label_of(cost), amount(cost, pair.before), amount(cost, pair.after), change
    for phase, row in (latency or {}).get("phases", {}).items():
        if "measured_ms" not in row:  # of a program that did not run here
            continue
        dense, pruned = row["dense_ms"], row["measured_ms"]
        yield f"{phase}, measured", f"{dense:.1f} ms", f"{pruned:.1f} ms", signed(pruned / dense - 1)
    for scores in report.scores:
        for text, contrast in scores.perplexity.items():
            yield f"perplexity, {text}", *contrast_cells(contrast, 2)[:3]
        for task, metrics in scores.tasks.items():
            for metric, contrast in metrics.items():
                yield f"{task} {metric}", *contrast_cells(contrast, 3)[:3]
