"""An evolutionary search on the screen: generation, evaluations, best and mean loss, time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

from rich.console import Console
from rich.progress import Progress

from multipruner.search.settings import Settings

from .progress import detailed_bar


class GenerationDisplay:
    """Turns generations and losses into one moving line.

    Args:
        bar: the rich progress to draw in.
        settings: of the search, for how many evaluations to expect.
        name: what is running.
        share: how many processes compute while this one reports its own losses.
    """

    def __init__(self, bar: Progress, settings: Settings, name: str, share: int) -> None:
        self._bar, self._settings, self._name, self._share = bar, settings, name, share
        children = settings.offspring or settings.population
        self._per_generation, arriving = 0, children
        for _ in range(settings.home):
            self._per_generation += arriving
            arriving = ceil(settings.keep * arriving)
        self._per_generation += arriving
        self._done = 0.0
        total = self._expected(settings.generations + 1) + settings.finalists
        self._task = bar.add_task(name, total=total, detail="first population")

    def _expected(self, generations: int) -> int:
        """Evaluations of the first so many generations."""
        return (self._settings.population if generations else 0) + max(0, generations - 1) * self._per_generation

    def tick(self) -> None:
        """One more loss was measured in this process."""
        self._done += self._share
        self._bar.update(self._task, completed=self._done)

    def generation(self, history: Sequence[Mapping[str, Any]]) -> None:
        """A generation is over."""
        record = history[-1]
        if record["stage"] != "generation":
            return
        number = record["generation"]
        self._done = self._expected(number + 1)
        best = record["front"][0][0]
        detail = (
            f"generation {number} of {self._settings.generations}  best {best:.4f}  mean {record['mean'][0]:.4f}  "
            f"{sum(record['scored'])} evaluations"
        )
        if len(record["objectives"]) > 1:
            detail += f"  front {len(record['front'])}"
        self._bar.update(self._task, completed=self._done, detail=detail)


@contextmanager
def generation_display(console: Console, settings: Settings, name: str, share: int) -> Iterator[GenerationDisplay]:
    """A live progress line on a console (silent when the console is)."""
    with detailed_bar(console, 9) as bar:
        yield GenerationDisplay(bar, settings, name, share)
