"""Which sizes of a block are measured. No torch."""

from __future__ import annotations

from itertools import product

from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.structure import GONE, Anatomy, Size


def coarse_grid(full: int, step: int) -> list[int]:
    """Return counts to start from: multiples of the step from one step to the full count, which always belongs to
    them.
    """
    counts = [*range(step, full, step), full]
    count = min(len(counts), max(5, min(9, len(counts) // 4)))
    if count == 1:
        return counts
    return sorted({counts[round(i * (len(counts) - 1) / (count - 1))] for i in range(count)})


def middle(low: int, high: int, step: int) -> int | None:
    """Return the multiple of the step nearest to the middle between two counts; ``None`` when there is none between
    them.
    """
    count = round((low + high) / 2 / step) * step
    return next((c for c in (count, count - step, count + step) if low < c < high), None)


def first_options(kind: str, full: Size, step: int, anatomy: Anatomy) -> list[Size]:
    """Return the options of a block that are measured first: none, and all combinations of some counts of every
    axis.
    """
    counts = [
        [most] if not axis.setting else
        _spread(anatomy.least(axis.name), most) if axis.active else
        sorted({1, (most + 1) // 2, most}) if axis.within else
        [*range(1, most + 1)] if axis.width else coarse_grid(most, step)
        for axis, most in zip(BLOCK_KINDS[kind].along(full), full, strict=True)
    ]  # fmt: skip
    return [GONE, *product(*counts)]


def _spread(least: int, most: int, number: int = 9) -> list[int]:
    """Return so many counts from the least to the most, or all of them."""
    return sorted({least + (most - least) * part // (number - 1) for part in range(number)})
