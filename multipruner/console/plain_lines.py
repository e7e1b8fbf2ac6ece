"""Progress where no line can move, in a file or a pipe: a plain line from time to time, whoever is silent."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress

from rich.console import Console

EVERY = 30.0
"""Seconds between two lines."""
_REMEMBERED = 20
"""Lines back to which the speed is measured, for the time that is left."""


class PlainLines:
    """Prints the last known state of a stage every so often, from a thread of its own; a context manager.

    What is over before the first line is due prints nothing. A stage that printed lines ends with one that sums it up.

    Args:
        console: where the lines go.
        what: the stage that runs until :meth:`show` names another one.
        counts: whether the numbers count things that a reader knows, and each name is a stage of its own; otherwise
            they are shares of one stage whose parts have names.
        every: seconds between two lines; default: :data:`EVERY`.
    """

    def __init__(self, console: Console, what: str, *, counts: bool, every: float | None = None) -> None:
        self._console, self._counts, self._every = console, counts, EVERY if every is None else every
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
        self._last = time.monotonic()
        self._begin(what, self._last)

    def __enter__(self) -> PlainLines:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self._end()

    def show(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Take the state that the next line tells; a total of 0 announces a stage of which nothing is known yet."""
        now = time.monotonic()
        with self._lock:
            if self._counts and (what != self._what or done < self._done):
                self._end()
                self._begin(what, self._last if done else now)  # what has done something began before
            if not done:  # what was needed before the first of them says nothing about their speed
                self._seen.clear()
                self._seen.append((now, 0.0))
            self._part, self._done, self._total, self._detail, self._last = what, done, total, detail, now

    def _begin(self, what: str, when: float) -> None:
        self._what = self._part = what
        self._done, self._total, self._detail, self._told = 0.0, 0.0, "", False
        self._began, self._seen = when, deque([(when, 0.0)], maxlen=_REMEMBERED)

    def _end(self) -> None:
        if self._told:
            count = f"{self._done:.0f} in " if self._counts and self._done else ""
            self._say(f"{self._what}: {count}{spoken(self._last - self._began if count else self._taken())}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)  # no message: progress is an event

    def _beat(self) -> None:
        with suppress(Exception):  # what cannot be written ends the lines, not the run
            while not self._over.wait(self._every):
                with self._lock:
                    self._say(self._line())
                    self._told = True

    def _taken(self) -> float:
        return time.monotonic() - self._began

    def _line(self) -> str:
        """Return such as ``moments 24/60 (40 %), 35 s, about 52 s left``."""
        head, times = self._part, [spoken(self._taken())]
        if self._total:
            share = f"{100 * min(self._done / self._total, 1):.0f} %"
            head += f" {self._done:.0f}/{self._total:.0f} ({share})" if self._counts else f" {share}"
            now, (then, before) = time.monotonic(), self._seen[0]
            self._seen.append((now, self._done))
            if before < self._done < self._total:
                left = (now - then) * (self._total - self._done) / (self._done - before)
                times.append(f"about {spoken(left)} left")
        return ", ".join((head, *times, *([self._detail] if self._detail else [])))


def spoken(seconds: float) -> str:
    """Return a duration in a unit that suits it."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 10800 else f"{seconds / 3600:.1f} h"
