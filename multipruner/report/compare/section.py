"""The part of a page that sets several runs side by side."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from multipruner.core.axes import BLOCK_KINDS
from multipruner.report.figures.runs import Curve, curves, perplexity_figure
from multipruner.report.figures.structure import structures_figure
from multipruner.report.html import Html, element, table
from multipruner.report.inputs import RunFiles
from multipruner.report.sections import Album, card, mark
from multipruner.report.words import amount, duration, number

from .figure import pareto_figure
from .standing import Entry, Ranking, kind_of, rankings

Anchor = Callable[[RunFiles], str]


def comparison_section(runs: Sequence[RunFiles], album: Album, anchor: Anchor) -> list[Html]:
    """Show several runs side by side: which no other beats, what each is, and what is left of it."""
    found, (ranked, alone) = curves(runs), rankings(runs)
    parts = []
    for index, ranking in enumerate(ranked, start=1):
        name = "runs-pareto" if index == 1 else f"runs-pareto-{index}"
        drawn = [album.show(pareto_figure(ranking, name))] if ranking.panels else []
        parts.append(card("", *drawn, _standings(ranking, anchor)))
    if alone or len(ranked) > 1:
        parts.append(card("Not compared", *_apart(ranked, alone)))
    parts.append(card("Runs", _runs_table(runs, found, anchor)))
    if found:
        parts.append(card("", album.show(perplexity_figure(found, "runs-perplexity"))))
    parts.append(card("", album.show(structures_figure(runs, "runs-structures"))))
    return parts


def _standings(ranking: Ranking, anchor: Anchor) -> Html:
    """Return the runs by rising loss, pruned before tuned, each with the savings at which no other beats it."""
    savings = [panel.saving for panel in ranking.panels if not panel.tasks]
    saved = {
        (panel.saving, point.entry.run.label): f"{point.saved:.1%}" if panel.shares else f"{point.saved:.2f}×"
        for panel in ranking.panels
        for point in panel.points
    }
    loss = f"{ranking.measure}, of the dense model's" if ranking.relative else ranking.measure
    tasks = (f"accuracy kept, mean of {len(ranking.tasks)}", "worst") if ranking.tasks else ()
    rows = []
    for entry in sorted(ranking.entries, key=lambda entry: entry.kind):
        kept = entry.retention
        shares = (f"{kept.mean:.1%}", f"{kept.worst:.1%} ({kept.worst_task})") if kept else ("–", "–")
        rows.append(
            [element("a", entry.run.label, href=f"#{anchor(entry.run)}"), entry.kind,
             f"{entry.loss:.3f}{'×' if ranking.relative else ''}", f"{entry.found.dense:,.4g}",
             f"{entry.found.pruned:,.4g}", *(saved.get((saving, entry.run.label), "–") for saving in savings),
             *(shares if tasks else ()), _stand(ranking, entry)]
        )  # fmt: skip
    headings = ("run", "model", loss, "dense", "this", *(f"{saving} saved" if "speed" not in saving else saving
                for saving in savings), *tasks, "no other run of its kind beats it")  # fmt: skip
    return table(headings, rows, texts=(0, 1, len(headings) - 1))


def _stand(ranking: Ranking, entry: Entry) -> str:
    """Return where a run is unbeaten, or by which run it is beaten everywhere."""
    points = [(panel, point) for panel in ranking.panels for point in panel.points if point.entry is entry]
    best = [("tasks, " if panel.tasks else "") + panel.saving for panel, point in points if point.beaten_by is None]
    if best:
        return "at " + "; ".join(best)
    return f"beaten by {points[0][1].beaten_by}" if points else "–"


def _apart(ranked: Sequence[Ranking], alone: Sequence[RunFiles]) -> list[Html]:
    """Tell which runs are not ranked with the others, and what would make them comparable."""
    said = (
        "A perplexity counts per token: it is compared where text, dense model and tokenizer are the same. Across "
        "tokenizers and dense models, bits per byte are, where every run has those of the same text."
    )
    parts = [element("p", said, class_="lead")]
    if len(ranked) > 1:
        groups = (", ".join(entry.run.label for entry in ranking.entries) for ranking in ranked)
        parts.append(element("p", f"Ranked apart from each other: {'; '.join(groups)}."))
    bare = [run for run in alone if not any(scores.perplexity for scores in run.report.scores)]
    for title, some, cure, flags in (
        ("With no other", [run for run in alone if run not in bare],
         "A suite on the same text gives them bits per byte", " --suite quick"),
        ("Never set beside the dense model since the folder was written", bare,
         "An evaluation on the text of the others adds a perplexity", ""),
    ):  # fmt: skip
        if some:
            folders = " ".join(shlex.quote(str(run.folder)) for run in some)
            parts.append(
                element("p", f"{title}: {', '.join(f'{run.label} ({kind_of(run)})' for run in some)}. {cure}:")
            )
            parts.append(element("pre", element("code", f"python -m multipruner eval {folders}{flags}")))
    return parts


def _runs_table(runs: Sequence[RunFiles], found: Sequence[Curve], anchor: Anchor) -> Html:
    shared = max(found, key=lambda curve: len({point.run for point in curve.points}), default=None)
    heading = f"perplexity, {shared.text}" if shared else "perplexity"
    values = {point.run: point.perplexity for point in shared.points} if shared else {}
    rows = []
    for run in runs:
        report, kept = run.report, run.structure
        averages = [scores.average for scores in report.scores if scores.average]
        rows.append(
            [element("a", run.label + mark(run), href=f"#{anchor(run)}"),
             f"{report.ratio:.2%}", f"{report.backbone_ratio:.2%}",
             amount("parameters", report.parameters.after),
             " + ".join(str(run.anatomy.count(kept, kind)) for kind in run.anatomy.kinds),
             f"{values[run.label]:,.4g}" if run.label in values else "–",
             number(averages[-1].pruned) if averages else "–",
             duration(report.seconds["search"]) if "search" in report.seconds else "–"]
        )  # fmt: skip
    blocks = " + ".join(BLOCK_KINDS[kind].label for kind in runs[0].anatomy.kinds) + " blocks"
    headings = ("run", "ratio", "decoder layers", "parameters", blocks, heading, "tasks", "search")
    return table(headings, rows)
