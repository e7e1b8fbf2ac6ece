"""Progress on the screen: stage, step, ratio, loss, candidates left, time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from multipruner.search import Dimension
from multipruner.search import Progress as SearchProgress


class SearchDisplay:
    """Turns a search's reports into one moving line.

    Args:
        bar: the rich progress to draw in.
        expected: work expected per dimension (candidates times tokens), for the time that is left.
        target: the ratio asked for.
    """

    def __init__(self, bar: Progress, expected: Mapping[Dimension, float], target: float) -> None:
        self._bar, self._expected, self._target = bar, dict(expected), target
        self._total = sum(expected.values()) or 1.0
        self._task = bar.add_task("search", total=self._total, detail="")
        self._finished: dict[Dimension, float] = {}

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
        self._bar.update(
            self._task, completed=before + self._finished[report.stage], description=report.stage, detail=detail
        )

    def done(self) -> None:
        """Fill the bar."""
        self._bar.update(self._task, completed=self._total, detail="")


def detailed_bar(console: Console, width: int) -> Progress:
    """A live progress line with a description of some width, and a ``detail`` that its tasks say."""
    columns = (
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, speed_estimate_period=120)


@contextmanager
def search_display(console: Console, expected: Mapping[Dimension, float], target: float) -> Iterator[SearchDisplay]:
    """A live progress line on a console (silent when the console is)."""
    with detailed_bar(console, 6) as bar:
        display = SearchDisplay(bar, expected, target)
        yield display
        display.done()


@contextmanager
def counting_display(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A live progress line for a count: called with (what, done, in all)."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
        task, last = bar.add_task("", total=1), ""

        def tell(what: str, done: int, total: int) -> None:
            nonlocal last
            if what != last:
                bar.reset(task, total=total, description=what)
                last = what
            bar.update(task, completed=done, total=total)

        yield tell


def named(display: Callable[[str, int, int], None], what: str) -> Callable[[int, int], None]:
    """A display that counts several things, for one of them."""
    return lambda done, total: display(what, done, total)
