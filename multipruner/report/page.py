"""The page: one file, nothing from elsewhere, and a policy that forbids the browser to fetch anything."""

from __future__ import annotations

import re
from collections.abc import Sequence

from multipruner.core import __version__
from multipruner.report.figures.drawing import Drawing

from .compare.section import comparison_section
from .html import Html, element, join
from .inputs import Front, RunFiles
from .sections import Album, front_section, run_section
from .style import CSS

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[RunFiles], fronts: Sequence[Front], files: str) -> tuple[str, list[Drawing]]:
    """Return the HTML of a report and the drawings in it.

    Args:
        runs, fronts: what to show; at least one of either.
        files: name of the folder of PNGs and CSVs beside the page.
    """
    album, several = Album(files), len(runs) > 1
    anchors = {run.label: f"run-{number}" for number, run in enumerate(runs, start=1)}
    links, parts = [], []
    if several:
        links.append(("comparison", "side by side"))
        parts.append(_part("comparison", "Side by side", comparison_section(runs, album, lambda r: anchors[r.label])))
    for index, front in enumerate(fronts, start=1):
        links.append((f"front-{index}", f"front of {front.label}"))
        part = front_section(front, album, "front" if len(fronts) == 1 else f"front-{index}")
        parts.append(_part(f"front-{index}", "Search", [part]))
    for run in runs:
        prefix = f"{anchors[run.label]}-{_slug(run.label)}-" if several else ""
        links.append((anchors[run.label], run.label))
        heading = run.label if several or fronts else ""
        parts.append(_part(anchors[run.label], heading, run_section(run, album, prefix), "run"))
    body = (_header(runs, fronts, links), element("main", *parts), _footer())
    return _document(_title(runs, fronts), body), album.drawings


def _part(anchor: str, title: str, children: Sequence[Html], class_: str = "part") -> Html:
    heading = (element("h2", title),) if title else ()
    return element("section", *heading, *children, id=anchor, class_=class_)


def _title(runs: Sequence[RunFiles], fronts: Sequence[Front]) -> str:
    if len(runs) == 1:
        return f"Pruning report: {runs[0].label}"
    return f"Pruning report: {len(runs)} runs" if runs else f"Search report: {fronts[0].label}"


def _header(runs: Sequence[RunFiles], fronts: Sequence[Front], links: Sequence[tuple[str, str]]) -> Html:
    models = list(dict.fromkeys(run.report.model.name for run in runs))
    lead = ", ".join(models)
    parts = [element("h1", _title(runs, fronts)), element("p", lead, class_="lead") if lead else Html("")]
    if len(links) > 1:
        parts.append(element("nav", *(element("a", text, href=f"#{anchor}") for anchor, text in links)))
    else:
        parts.append(element("div", "", style="height:1.2rem"))
    return element("header", *parts)


def _footer() -> Html:
    text = f"Made by multipruner {__version__} from what the runs wrote. "
    text += "Ratio: removed parameters / all parameters of the dense model."
    return element("footer", text)


def _document(title: str, body: Sequence[Html]) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", title),
        Html(f"<style>\n{CSS}\n</style>"),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{join(body)}\n</body>\n</html>\n'


def _slug(text: str) -> str:
    """Return a part of a file name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:40] or "run"
