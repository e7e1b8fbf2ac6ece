"""Times of sizes that lie between measured ones. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from multipruner.core.errors import ConfigError
from multipruner.core.structure import Size


def interpolate(points: Mapping[Size, float], size: Size) -> float:
    """Return piecewise linear between measured sizes, axis by axis; below the least of an axis, that one's value.

    A block that is gone is another thing than a small one (nothing is launched), so that is only looked up.

    Args:
        points: times; of the sizes that are not empty, all combinations of what was measured of every axis.
        size: any.

    Raises:
        ConfigError: when the size is beyond the largest measured one, or gone and not measured.
    """
    if size in points:
        return points[size]
    there = [point for point in points if point]
    if not size or not there or any(count > max(p[axis] for p in there) for axis, count in enumerate(size)):
        known = ", ".join(map(_shown, sorted(points))) or "none"
        raise ConfigError(f"size {_shown(size)} was not measured; measured: {known}")
    return _between({point: points[point] for point in there}, (), size)


def _shown(size: Size) -> str:
    return " x ".join(map(str, size)) or "gone"


def _between(points: Mapping[Size, float], before: Size, size: Size) -> float:
    """Interpolate along one axis, what comes before it being fixed, and in the same way along the others."""
    axis = len(before)
    if axis == len(size):
        return points[before]
    measured = sorted({point[axis] for point in points if point[:axis] == before})
    above = bisect_left(measured, size[axis])
    right = measured[min(above, len(measured) - 1)]
    if above == 0 or right == size[axis]:
        return _between(points, (*before, right), size)
    left = measured[above - 1]
    low, high = (_between(points, (*before, count), size) for count in (left, right))
    value = low + (high - low) * (size[axis] - left) / (right - left)
    return min(max(value, min(low, high)), max(low, high))  # rounding must not leave the interval
