"""Progress on the screen, a moving line on a terminal and plain ones elsewhere: stage, step, loss, time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from multipruner.search import Dimension
from multipruner.search import Progress as SearchProgress

from .events import EventLog, events_of
from .plain_lines import PlainLines


class Show(Protocol):
    """Shows a state: what runs, how much of it is done, of how much in all (0: not known), and what else to say."""

    def __call__(self, what: str, done: float, total: float, detail: str = "", /) -> None: ...


class SearchDisplay:
    """Turns a search's reports into one moving line.

    Args:
        show: draws the line.
        expected: work expected per dimension (candidates times tokens), for the time that is left.
        target: the ratio asked for.
    """

    def __init__(self, show: Show, expected: Mapping[Dimension, float], target: float) -> None:
        self._show, self._expected, self._target = show, dict(expected), target
        self._total = sum(expected.values()) or 1.0
        self._finished: dict[Dimension, float] = {}
        show("search", 0, self._total)

    def __call__(self, report: SearchProgress) -> None:
        """Draw one report."""
        span = max(report.stage_end - report.stage_start, 1e-9)
        within_step = report.candidate / report.candidates * 0.02
        share = min(max(report.ratio - report.stage_start, 0.0) / span + within_step, 1.0)
        self._finished[report.stage] = self._expected.get(report.stage, 0.0) * share
        before = 0.0
        for stage, amount in self._expected.items():
            if stage == report.stage:
                break
            before += amount
        perplexity = f"ppl {math.exp(report.loss):.3f}" if report.loss is not None and report.loss < 50 else "dense"
        detail = (
            f"step {report.step}  ratio {report.ratio:.2%} of {100 * self._target:g}%  {perplexity}  "
            f"{report.candidates - report.candidate:3d} candidates left"
        )
        self._show(report.stage, before + self._finished[report.stage], self._total, detail)

    def done(self) -> None:
        """Fill the bar."""
        self._show("search", self._total, self._total)


@contextmanager
def display(
    console: Console, *columns: ProgressColumn, what: str, counts: bool = False, every: float | None = None
) -> Iterator[Show]:
    """Show a live progress line on a terminal or in a notebook; elsewhere plain lines, also while nobody calls.

    Args:
        console: where to show it; a quiet one shows nothing.
        columns: of the moving line.
        what: runs until something else is shown.
        counts: whether each name is a stage of its own, with a count; otherwise all are parts of ``what``.
        every: seconds between two plain lines; default: half a minute.
    """
    moves = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
    with _held(console):
        if moves or console.quiet:
            with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
                yield _logged(_drawn(bar, what, counts), events_of(console))
        else:
            with PlainLines(console, what, counts=counts, every=every) as lines:
                yield _logged(lines.show, events_of(console))


def _logged(show: Show, log: EventLog | None) -> Show:
    """Return the same, and an event."""
    if log is None:
        return show

    def both(what: str, done: float, total: float, detail: str = "", /) -> None:
        show(what, done, total, detail)
        log.progress(what, done, total, detail)

    return both


@contextmanager
def _held(console: Console) -> Iterator[None]:
    """Keep writing to where the console writes now, also while others' output is kept from it (see eval/harness.py)."""
    own = console._file  # None follows whatever standard output is, and only so can be put back
    console.file = console.file
    try:
        yield
    finally:
        console._file = own


def _drawn(bar: Progress, what: str, counts: bool) -> Show:
    task, last = bar.add_task(what, total=1 if counts else None, detail=""), what

    def show(what: str, done: float, total: float, detail: str = "", /) -> None:
        nonlocal last
        if counts and what != last:
            bar.reset(task, total=1)
            last = what
        bar.update(task, completed=done, total=total or None, description=what, detail=detail)

    return show


def detailed(width: int) -> tuple[ProgressColumn, ...]:
    """Return the columns of a line with a description of some width, a percentage and a detail."""
    return (
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )


@contextmanager
def search_display(
    console: Console, expected: Mapping[Dimension, float], target: float, *, every: float | None = None
) -> Iterator[SearchDisplay]:
    """Show the progress of a greedy search on a console."""
    with display(console, *detailed(6), what="search", every=every) as show:
        found = SearchDisplay(show, expected, target)
        yield found
        found.done()


@contextmanager
def counting_display(console: Console, what: str, *, every: float | None = None) -> Iterator[Show]:
    """Show the progress of a count on a console: called with (what, done, in all); ``what`` runs before the first
    call.
    """
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with display(console, *columns, what=what, counts=True, every=every) as show:
        yield show


@contextmanager
def sharing_display(console: Console, what: str, *, every: float | None = None) -> Iterator[Show]:
    """Show the progress of something of which only a share is known: called with (what, share, 1)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with display(console, *columns, what=what, every=every) as show:
        show(what, 0, 1)
        yield show


@contextmanager
def bytes_display(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of bytes that are read or written; what is yielded is called with those that are done."""
    with sharing_display(console, what) as show:
        done = 0

        def tick(more: int) -> None:
            nonlocal done
            done += more
            show(what, min(done / max(total, 1), 1.0), 1)

        yield tick


@contextmanager
def waiting_display(console: Console, what: str, *, every: float | None = None) -> Iterator[None]:
    """Show a sign of life on a console while something runs of which only the time is known."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with display(console, *columns, what=what, every=every) as show:
        show(what, 0, 0)
        yield


@contextmanager
def judging_display(
    console: Console, who: str, *, every: float | None = None
) -> Iterator[Callable[[str, int, int], None]]:
    """Show a :func:`counting_display` of an evaluation, with the name of the model that is evaluated."""
    with counting_display(console, f"{who} evaluation", every=every) as tell:
        yield lambda what, done, total: tell(f"{who} {what}", done, total)


def named(display: Callable[[str, int, int], None], what: str) -> Callable[[int, int], None]:
    """Return a display that counts several things, for one of them, which begins."""
    display(what, 0, 0)
    return lambda done, total: display(what, done, total)
