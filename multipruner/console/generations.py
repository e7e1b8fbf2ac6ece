"""An evolutionary search on the screen: generation, evaluations, best and mean loss, time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

from rich.console import Console

from multipruner.search.settings import Settings

from .progress import Show, detailed, display


class GenerationDisplay:
    """Turns generations and losses into one moving line.

    Args:
        show: draws the line.
        settings: of the search, for how many evaluations to expect.
        name: what is running.
        share: how many processes compute while this one reports its own losses.
    """

    def __init__(self, show: Show, settings: Settings, name: str, share: int) -> None:
        self._show, self._settings, self._name, self._share = show, settings, name, share
        children = settings.offspring or settings.population
        self._per_generation, arriving = 0, children
        for _ in range(settings.home):
            self._per_generation += arriving
            arriving = ceil(settings.keep * arriving)
        self._per_generation += arriving
        self._done, self._detail = 0.0, "first population"
        self._total = self._expected(settings.generations + 1) + settings.finalists
        self._draw()

    def _expected(self, generations: int) -> int:
        """Return evaluations of the first so many generations."""
        return (self._settings.population if generations else 0) + max(0, generations - 1) * self._per_generation

    def tick(self) -> None:
        """Count one more loss that was measured in this process."""
        self._done += self._share
        self._draw()

    def generation(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Show that a generation is over."""
        record = history[-1]
        if record["stage"] != "generation":
            return
        number = record["generation"]
        self._done = self._expected(number + 1)
        best = record["front"][0][0]
        self._detail = (
            f"generation {number} of {self._settings.generations}  best {best:.4f}  mean {record['mean'][0]:.4f}  "
            f"{sum(record['scored'])} evaluations"
        )
        if len(record["objectives"]) > 1:
            self._detail += f"  front {len(record['front'])}"
        self._draw()

    def _draw(self) -> None:
        self._show(self._name, self._done, self._total, self._detail)


@contextmanager
def generation_display(
    console: Console, settings: Settings, name: str, share: int, *, every: float | None = None
) -> Iterator[GenerationDisplay]:
    """Show the progress of an evolutionary search on a console."""
    with display(console, *detailed(9), what=name, every=every) as show:
        yield GenerationDisplay(show, settings, name, share)
