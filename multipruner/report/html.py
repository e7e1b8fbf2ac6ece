"""HTML elements that escape what they are given: only what :func:`element` made itself goes in as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from multipruner.report.figures.drawing import Drawing


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """Return an element; children that are plain text are escaped, and so are attributes (``class_`` for ``class``)."""
    said = "".join(f' {key.rstrip("_")}="{escape(value, quote=True)}"' for key, value in attributes.items())
    inner = join(children)
    return Html(f"<{name}{said}>{inner}</{name}>" if name not in ("meta", "br") else f"<{name}{said}>")


def join(children: Iterable[str]) -> Html:
    """Put several pieces one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(child, quote=False) for child in children))


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[int] = (0,), class_: str = ""
) -> Html:
    """Return a table in a box that scrolls sideways where it is too wide; ``texts`` are the columns that hold words."""
    words = set(texts)

    def cells(name: str, row: Sequence[str]) -> Html:
        return element(
            "tr",
            *(
                element(name, cell, **({"class_": "text"} if n in words else {}), **_scope(name))
                for n, cell in enumerate(row)
            ),
        )

    head = element("thead", cells("th", headings))
    body = element("tbody", *(cells("td", row) for row in rows))
    return element("div", element("table", head, body, class_=class_), class_="scroll")


def _scope(name: str) -> dict[str, str]:
    return {"scope": "col"} if name == "th" else {}


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """List names and what they are."""
    return element("dl", *(element("div", element("dt", name), element("dd", text)) for name, text in rows))


def figure(drawing: Drawing, files: str) -> Html:
    """Return a drawing with its caption, and where its PNG and CSV lie."""
    title = element("h3", drawing.title)
    svgs = (
        element("div", Html(drawing.wide), class_="picture wide"),
        element("div", Html(drawing.narrow), class_="picture narrow"),
    )
    links = join(
        (
            element("a", "PNG", href=f"{files}/{drawing.name}.png"),
            " · ",
            element("a", "CSV", href=f"{files}/{drawing.name}.csv"),
        )
    )
    caption = element("figcaption", drawing.caption, " ", element("span", links, class_="files"))
    return element("figure", title, *svgs, caption)
