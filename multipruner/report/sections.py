"""The parts of a page: one run's, and those that set runs side by side. Each is left out when it has no data."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from multipruner.core.structure import kept_in_words
from multipruner.eval.comparison import Comparison, Contrast
from multipruner.report.figures.comparison import Phase, costs_figure, latency_figure, phases, scores_figure
from multipruner.report.figures.drawing import STAGE, STAGE_NAMES, Drawing
from multipruner.report.figures.path import Removal, order_figure, removals, rounds_figure, trajectory_figure
from multipruner.report.figures.runs import front_figure
from multipruner.report.figures.structure import structure_figure

from .html import Html, element, facts, figure, join, table
from .inputs import Front, RunFiles
from .words import amount, contrast_cells, duration, finite, label_of, number, signed, task_named, tokens_of

_SWATCHES = {**STAGE, "blocks": "var(--blue)"}
SHOWN = 12
"""Rows of a long table that are not folded away."""


@dataclass
class Album:
    """Collects the drawings of a page while its parts are written.

    Attributes:
        files: the folder of PNGs and CSVs, relative to the page.
        drawings: all of them.
    """

    files: str
    drawings: list[Drawing] = field(default_factory=list)

    def show(self, drawing: Drawing) -> Html:
        """Return the drawing as an element; its files will lie beside the page."""
        self.drawings.append(drawing)
        return figure(drawing, self.files)


def card(title: str, *children: str) -> Html:
    """Return a part in a frame; a figure brings its own title."""
    heading = (element("h3", title),) if title else ()
    return element("section", *heading, *children, class_="card")


def run_section(run: RunFiles, album: Album, prefix: str) -> list[Html]:
    """Show everything about one run; ``prefix`` begins the names of its figures."""
    parts: list[Html] = [
        _tiles(run),
        card("Summary", _about(run), *_loading(run)),
        card("", album.show(structure_figure(run, f"{prefix}structure"))),
    ]
    if run.steps:
        path = removals(run)
        parts += [
            card("", album.show(trajectory_figure(run, f"{prefix}trajectory")), *_nested(run)),
            card("What each step removed", *_steps(path)),
            card("", album.show(order_figure(run, f"{prefix}order"))),
        ]
    if run.report.search.rounds:
        parts.append(card("", album.show(rounds_figure(run, f"{prefix}rounds"))))
    parts.append(card("", album.show(costs_figure(run, f"{prefix}costs")), _costs(run)))
    found = phases(run.report.latency)
    if found:
        parts.append(card("", album.show(latency_figure(run, f"{prefix}latency")), _latency(found)))
    if run.report.forecast:
        parts.append(card("Expected and actual", _foretold(run.report.forecast)))
    for name, perplexity in (("perplexity", True), ("tasks", False)):
        rows = _scores(run, perplexity=perplexity)
        if rows:
            drawn = album.show(scores_figure(rows, f"{prefix}{name}", perplexity=perplexity))
            headings = ("", "dense", _who(run), "difference", "n")
            digits = 2 if perplexity else 3
            shown = table(headings, ([label, *contrast_cells(contrast, digits)] for label, contrast in rows))
            parts.append(card("", drawn, shown))
    parts += [_suite(scores) for scores in run.report.scores if scores.suite]
    return parts


def _suite(found: Comparison) -> Html:
    """Return all that a suite measured, in one table, with what each group of rows tells before it."""
    rows = [[*row] for part in found.parts(2, 3) for row in part]
    lead = (
        "Dense and this model on the same examples; intervals are of the mean of the paired differences (95 %). A "
        "constant answer is one that never changes, whatever is asked."
    )
    return card(f"Suite “{found.suite}”", element("p", lead, class_="lead"), table(found.headings, rows))


def mark(run: RunFiles) -> str:
    """Return what is said beside a run's name where its model was trained after the cut."""
    return " (tuned)" if run.report.tuned else ""


def _who(run: RunFiles) -> str:
    """Return what a run's model is: pruned, or tuned as well."""
    return "tuned" if run.report.tuned else "pruned"


def _tiles(run: RunFiles) -> Html:
    report = run.report
    before, after = report.parameters.before, report.parameters.after
    tiles = [
        ("removed", f"{report.ratio:.1%}", f"of all parameters; {report.backbone_ratio:.1%} of the decoder layers"),
        ("parameters", amount("parameters", after), f"of {amount('parameters', before)}"),
    ]
    if "weight_bytes" in report.costs:
        pair = report.costs["weight_bytes"]
        tiles.append(("weights", amount("weight_bytes", pair.after), f"of {amount('weight_bytes', pair.before)}"))
    for text, contrast in _scores(run, perplexity=True)[-1:]:
        tiles.append(("perplexity", f"{contrast.pruned:,.4g}", f"dense {contrast.dense:,.4g} ({text})"))
    cards = (
        element(
            "div", element("span", name, class_="name"), element("b", value), element("span", detail), class_="tile"
        )
        for name, value, detail in tiles
    )
    return element("div", *cards, class_="tiles")


def _about(run: RunFiles) -> Html:
    report = run.report
    rows = [("model", report.model.description or report.model.name)]
    if report.model.revision:
        rows.append(("revision", report.model.revision))
    rows.append(("kept", ", ".join(kept_in_words(run.structure, run.anatomy))))
    text = report.calibration
    if text.name:
        digest = f", hash {text.hash[:12]}…" if text.hash else ""
        rows.append(("calibration", f"{text.name}{tokens_of(asdict(text))}{digest}"))
    if report.search.loss is not None:
        rows.append(
            ("calibration loss", f"{report.search.loss:.4f} nats per {'picture' if text.pictures else 'token'}")
        )
    if report.seconds:
        spent = ", ".join(f"{name} {duration(value)}" for name, value in report.seconds.items())
        rows.append(("time", f"{duration(sum(report.seconds.values()))} ({spent})"))
    if report.versions:
        rows.append(("made with", ", ".join(f"{name} {version}" for name, version in report.versions.items())))
    if report.platform:
        rows.append(("platform", report.platform))
    return facts(rows)


def _loading(run: RunFiles) -> list[Html]:
    folder, task = str(run.folder), task_named(run.plan.model_type)
    code = (
        f"from transformers import {task.auto_class}, {task.reader}\n\n"
        f"model = {task.auto_class}.from_pretrained({folder!r}, trust_remote_code=True)\n"
        f"{task.reader_name.rpartition(' ')[2]} = {task.reader}.from_pretrained({folder!r})"
    )
    parts = [element("h4", "How to load it", style="margin-top:1.2rem"), element("pre", element("code", code))]
    if run.report.command:
        parts += [element("h4", "How it was made"), element("pre", element("code", run.report.command))]
    on = "--tasks ppl,piqa,arc_easy" if task.reads_text else "--eval-text FOLDER_OF_PICTURES"
    again = f"python -m multipruner eval {shlex.quote(folder)} {on}"
    return [*parts, element("h4", "How to evaluate it"), element("pre", element("code", again))]


def _nested(run: RunFiles) -> list[Html]:
    reached = run.report.search.searched_to
    if reached is None or reached <= run.report.ratio + 0.01:
        return []
    return [
        element("p", f"The search went on to a ratio of {reached:.0%}; shown is the part that leads to this model.")
    ]


def _steps(path: Sequence[Removal]) -> list[Html]:
    headings = ("step", "stage", "layer", "removed", "loss", "change", "ratio", "best other")
    folded = len(path) > SHOWN + 4

    def rows(part: Sequence[Removal]) -> Html:
        return table(headings, map(_step_row, part), texts=(1, 3, 7), class_="steps")

    shown = [rows(path[:SHOWN] if folded else path)]
    if folded:
        more = f"The other {len(path) - SHOWN} steps"
        shown.append(element("details", element("summary", more), rows(path[SHOWN:])))
    note = "Loss in nats per token after the step; “change” is against the step before, where both were measured on "
    return [element("p", f"{note}the same text. “Best other” is the removal that came second.", class_="lead"), *shown]


def _step_row(removal: Removal) -> list[str]:
    step = removal.step
    colour = element("span", "", class_="stage", style=f"background:{_SWATCHES[step.stage]}")
    other = "–"
    if step.runner_up is not None and step.runner_up_loss is not None:
        kind, layer = step.runner_up
        other = f"{'MLP' if kind == 'mlp' else kind} {layer}: {step.runner_up_loss - step.loss:+.4f}"
    return [
        str(removal.number), join((colour, STAGE_NAMES[step.stage])), str(step.layer), removal.words,
        number(step.loss, 4), number(removal.increase, 4, "+"), f"{step.ratio:.2%}", other,
    ]  # fmt: skip


def _costs(run: RunFiles) -> Html:
    costs = {"parameters": run.report.parameters, **run.report.costs}
    rows = [
        (label_of(cost), amount(cost, pair.before), amount(cost, pair.after),
         signed(pair.after / pair.before - 1) if pair.before else "–")
        for cost, pair in costs.items()
    ]  # fmt: skip
    return table(("", "dense", "pruned", "change"), rows)


def _foretold(found: Mapping[str, Mapping[str, Any]]) -> Html:
    """Return seconds by stage and memory, as they were expected before the run, and as they came."""

    def row(name: str, expected: Any, actual: Any, shown: Callable[[float], str], layers: Any = None) -> list[str]:
        known = finite(expected) and finite(actual) and actual > 0
        cells = [shown(value) if finite(value) else "–" for value in (expected, actual)]
        return [
            name,
            *cells,
            signed(expected / actual - 1) if known else "–",
            f"{layers:,.0f}" if finite(layers) else "–",
        ]

    stages = {name: one for name, one in found.get("stages", {}).items() if isinstance(one, Mapping)}
    rows = [
        row(name, one.get("predicted_seconds"), one.get("seconds"), duration, one.get("token_layers"))
        for name, one in stages.items()
    ]
    memory = found.get("memory", {})
    most, peak = memory.get("predicted_bytes"), memory.get("peak_bytes")
    rows.append(row("memory", most, peak, lambda size: amount("weight_bytes", size)))
    if (allowed := memory.get("allowed_bytes")) is not None and finite(allowed):
        rows.append(["memory that was allowed", amount("weight_bytes", allowed), "–", "–", "–"])
    return table(("", "expected", "actual", "error", "token-layers"), rows)


def _latency(found: Sequence[Phase]) -> Html:
    rows = []
    for phase in found:
        known = phase.predicted is not None and phase.measured
        error = signed(phase.predicted / phase.measured - 1) if known else "–"  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        faster = f"{phase.dense / phase.measured:.2f}×" if phase.dense and phase.measured else "–"
        rows.append(
            [phase.name, *(number(v, 2) for v in (phase.dense, phase.predicted, phase.measured)), error, faster]
        )
    return table(("phase", "dense (ms)", "predicted (ms)", "measured (ms)", "error", "faster than dense"), rows)


def _scores(run: RunFiles, *, perplexity: bool) -> list[tuple[str, Contrast]]:
    """Return every number of every evaluation; a later evaluation of the same name is marked by its limit."""
    rows: dict[str, Contrast] = {}
    for index, scores in enumerate(run.report.scores):
        if perplexity:
            named = dict(scores.perplexity)
        else:
            named = {f"{task} {metric}": c for task, metrics in scores.tasks.items() for metric, c in metrics.items()}
        for name, contrast in named.items():
            if rows.get(name) != contrast:
                rows[name if name not in rows else f"{name} (evaluation {index + 1})"] = contrast
    return list(rows.items())


def front_section(front: Front, album: Album, name: str) -> Html:
    """Return a search's Pareto front."""
    return card("", album.show(front_figure(front, name)))
