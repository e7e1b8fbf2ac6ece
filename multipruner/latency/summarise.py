"""From samples to the entries of a latency table. No torch."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from multipruner.core.latency_table import Entry
from multipruner.core.structure import Size

from .probe_journal import ProbeRecord


def relative_iqr(samples: Sequence[float]) -> float:
    """Return interquartile range of samples relative to their median; 0 for fewer than two."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


Option: TypeAlias = tuple[str, Size]
"""Kind of a block and its size."""


def summarise(records: Sequence[ProbeRecord], kinds: Sequence[str]) -> dict[str, dict[Size, Entry]]:
    """Return the entry of every option: the interquartile mean over its places of the median of a place.

    What the marks themselves take, by the passes without them, is taken off, and a machine that was slower or faster
    during a probe than during most is allowed for (:func:`slowness`).

    Args:
        records: of all probes.
        kinds: of every block of a probe, in the order in which they run.
    """
    mark = statistics.median(
        (statistics.median(r.marked) - statistics.median(r.plain)) / (len(r.sizes) + 1) for r in records
    )
    table: dict[str, dict[Size, list[list[float]]]] = {kind: defaultdict(list) for kind in dict.fromkeys(kinds)}
    for record, slow in zip(records, slowness(records, kinds), strict=True):
        for (kind, size), samples in _places(record, kinds):
            table[kind][size].append([sample / slow for sample in samples])
    return {
        kind: {size: _entry(found, max(mark, 0.0)) for size, found in sorted(places.items())}
        for kind, places in table.items()
    }


def slowness(records: Sequence[ProbeRecord], kinds: Sequence[str], rounds: int = 200) -> list[float]:
    """Tell by what factor the machine was slower during each probe than during most (their median is 1).

    Every probe shows options that others show as well; a log-linear model (time = option x probe) is fitted by
    alternating means. Probes that share no option with others are taken as they are.
    """
    cells: list[dict[Option, float]] = []
    for record in records:
        shown: dict[Option, list[float]] = defaultdict(list)
        for option, samples in _places(record, kinds):
            if option[1]:
                shown[option].append(statistics.median(samples))
        cells.append({option: math.log(interquartile_mean(middles)) for option, middles in shown.items()})
    slow = [0.0] * len(records)
    for _ in range(rounds):
        times: dict[Option, list[float]] = defaultdict(list)
        for cell, offset in zip(cells, slow, strict=True):
            for option, value in cell.items():
                times[option].append(value - offset)
        typical = {option: statistics.fmean(values) for option, values in times.items()}
        before, slow = slow, [_mean_over(cell, typical) for cell in cells]
        if max(map(abs, map(float.__sub__, slow, before)), default=0.0) < 1e-9:
            break
    factors = [math.exp(offset) for offset in slow]
    return [factor / statistics.median(factors) for factor in factors]


def _mean_over(cell: Mapping[Option, float], typical: Mapping[Option, float]) -> float:
    """Tell by how much the logarithms of a probe's times are beyond the typical ones."""
    return statistics.fmean(value - typical[option] for option, value in cell.items()) if cell else 0.0


def _places(record: ProbeRecord, kinds: Sequence[str]) -> Iterator[tuple[Option, list[float]]]:
    """Yield the option at every place of a probe, and its samples."""
    columns = zip(*record.blocks, strict=True)
    for kind, size, samples in zip(kinds, record.sizes, columns, strict=False):
        yield (kind, size), list(samples)


def _entry(places: Sequence[Sequence[float]], mark: float) -> Entry:
    middles = [statistics.median(place) for place in places]
    least = 1e-6  # milliseconds: an empty module may take less than the uncertainty of the marks
    value = max(interquartile_mean(middles) - mark, least)
    return Entry(value, relative_iqr(middles), sum(map(len, places)))


def interquartile_mean(values: Sequence[float]) -> float:
    """Return the mean without the lowest and the highest quarter: times are summed, so a mean; some are disturbed, so
    not all.

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("no values")
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def constant_rest(
    records: Sequence[ProbeRecord], entries: Mapping[str, Mapping[Size, Entry]], kinds: Sequence[str]
) -> Entry:
    """Return what unmarked passes take beyond the sum of their blocks' entries."""
    rests = []
    for record, slow in zip(records, slowness(records, kinds), strict=True):
        blocks = sum(entries[kind][size].milliseconds for (kind, size), _ in _places(record, kinds))
        rests.append(statistics.median(record.plain) / slow - blocks)
    whole = statistics.median(statistics.median(record.plain) for record in records)
    low, _, high = statistics.quantiles(rests, n=4, method="inclusive") if len(rests) > 1 else (0.0, 0.0, 0.0)
    spread = (high - low) / whole if whole > 0 else 0.0
    return Entry(max(statistics.median(rests), 0.0), spread, sum(len(record.plain) for record in records))
