"""Measurements that take turns. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

Row = TypeVar("Row")


def parts_of(report: Callable[[float], None], count: int) -> list[Callable[[float], None]]:
    """Return what is told of the shares of equal parts, and reports that of the whole."""
    shares = [0.0] * count

    def told(number: int, share: float) -> None:
        shares[number] = share
        report(statistics.fmean(shares))

    return [partial(told, number) for number in range(count)]


def in_turn(jobs: Sequence[Generator[None, None, Row]]) -> list[Row]:
    """Run several measurements, one probe of each after the other, so that a drift of the machine hits all alike, and
    return what they return.
    """
    found: dict[int, Row] = {}
    while len(found) < len(jobs):
        for number, job in enumerate(jobs):
            if number not in found:
                try:
                    next(job)
                except StopIteration as end:
                    found[number] = end.value
    return [found[number] for number in range(len(jobs))]
