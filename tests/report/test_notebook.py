"""A finished run shows itself: one line as text, and HTML that stands alone, escapes everything and fits a phone."""

from __future__ import annotations

import base64
import copy
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from multipruner.jobs.finish import Run
from multipruner.report import notebook
from tests.support.browser import Browser, missing

HOSTILE = """"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"""
TAGS = {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "img", "pre"}
VOID = {"img"}


class Page(HTMLParser):
    """Collects tags, attributes and text; a tag that is closed out of turn is an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def shown(run: Run) -> str:
    return notebook.html(run)


def test_a_run_shows_itself(run: Run) -> None:
    assert repr(run) == notebook.line(run)
    assert run._repr_html_() == notebook.html(run)


def test_the_line_is_short_and_says_what_happened(run: Run) -> None:
    line = notebook.line(run)
    counted = sum(parameter.numel() for parameter in run.model.parameters())
    assert f"{counted:,} parameters" in line and str(run.folder) in line
    assert len(line) < 100 + len(str(run.folder)) and "\n" not in line


def test_the_html_says_what_the_report_says(run: Run, shown: str) -> None:
    page = Page(shown)
    (text, score), *_ = run.report["perplexity"].items()
    expected = [
        run.report["model"]["description"],
        f"{run.report['ratio']:.2%} of all parameters removed",
        f"perplexity, {text}",
        f"{score['dense']:,.2f}",
        f"{score['pruned']:,.2f}",
        "KV cache per token",
        f"multipruner.load({str(run.folder)!r})",
        "python -m multipruner push",
    ]
    assert [words for words in expected if words not in page.text] == []


def test_milliseconds_are_shown_where_they_were_measured(run: Run) -> None:
    row = {"predicted_ms": 7.0, "predicted_dense_ms": 10.0, "measured_ms": 7.5, "dense_ms": 10.0}
    timed = replace(run, report={**run.report, "latency": {"phases": {"prefill-b1-t512": row}}})
    assert re.search(r"prefill-b1-t512, measured\s*10\.0 ms\s*7\.5 ms\s*−25\.0%", Page(notebook.html(timed)).text)


def test_the_html_stands_alone(shown: str) -> None:
    page = Page(shown)
    assert {tag for tag, _ in page.tags} == TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= {"style", "src", "alt"}
    assert "http" not in shown and "url(" not in shown


def test_the_picture_shows_what_stays(run: Run, shown: str) -> None:
    (attributes,) = [attributes for tag, attributes in Page(shown).tags if tag == "img"]
    head, _, data = str(attributes["src"]).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    kept = run.plan.anatomy.count(run.plan.structure, "attention")
    assert f"{kept} of {run.plan.anatomy.layers} attention blocks" in str(attributes["alt"])


def test_everything_is_escaped(run: Run) -> None:
    report = copy.deepcopy(run.report)
    report["model"]["description"] = HOSTILE
    report["perplexity"] = {HOSTILE: next(iter(report["perplexity"].values()))}
    page = Page(notebook.html(replace(run, folder=Path(HOSTILE), report=report)))
    assert {tag for tag, _ in page.tags} == TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= {"style", "src", "alt"}
    assert page.text.count(HOSTILE) >= 2, "the words themselves are shown"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_it_looks_right_in_a_browser(shown: str, tmp_path: Path) -> None:
    cell = tmp_path / "cell.html"
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    cell.write_text(f'{head}<body style="margin:8px;font-family:sans-serif">{shown}', encoding="utf-8")
    with Browser() as browser:
        for width in (900, 390):
            browser.open(cell, width)
            assert browser.ask("return performance.getEntriesByType('resource').length") <= 1, "the data URI at most"
            assert browser.ask("return document.documentElement.scrollWidth") <= width, "nothing overflows"
            box = browser.ask(
                "const i = document.querySelector('img'); return [i.naturalWidth, i.getBoundingClientRect().right]"
            )
            assert box[0] > 1000 and box[1] <= width
            with Image.open(io.BytesIO(browser.screenshot())) as picture:
                assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50, "not blank"
