"""What a search found: points none of which is better than another in everything, and how to choose one."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from multipruner.core.errors import ConfigError
from multipruner.storage.files import write_atomically

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Point(Generic[T]):
    """One candidate and its values by objective; all are minimised."""

    candidate: T
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Front(Generic[T]):
    """Non-dominated points, all scored at the same (the last) fidelity, lowest first objective first.

    Attributes:
        kind: what a candidate is called, such as ``"structure"``.
        points: at least one.
    """

    kind: str
    points: tuple[Point[T], ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the values, the first one being what "best" is about."""
        return tuple(self.points[0].values)

    def to_json(self, encode: Callable[[T], Any]) -> dict[str, Any]:
        """Return ``{"points": [{"structure": [...], "values": {"loss": ..., ...}}]}``."""
        return {"points": [{self.kind: encode(p.candidate), "values": dict(p.values)} for p in self.points]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], kind: str, decode: Callable[[Any], T]) -> Front[T]:
        """Return the inverse of :meth:`to_json`.

        Raises:
            ConfigError: when the mapping is no front of this kind.
        """
        try:
            points = tuple(Point(decode(row[kind]), dict(row["values"])) for row in record["points"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a front of {kind}s: {error!r}") from None
        if not points:
            raise ConfigError("a front without points")
        return cls(kind, points)

    def write(self, path: Path, encode: Callable[[T], Any]) -> None:
        """Write ``front.json``, whole or not at all."""
        write_atomically(path, json.dumps(self.to_json(encode), indent=1) + "\n")


def pick(front: Front[T], how: Literal["knee", "best"] | int) -> Point[T]:
    """Return one point: the lowest first objective, the knee, or the one at a place (from 0) in the list of points.

    Raises:
        ConfigError: for another word, or a place that does not exist.
    """
    if how == "best":
        return min(front.points, key=lambda point: tuple(point.values.values()))
    if how == "knee":
        return front.points[_knee([tuple(point.values.values()) for point in front.points])]
    if isinstance(how, int) and 0 <= how < len(front.points):
        return front.points[how]
    raise ConfigError(f"cannot pick {how!r}: give knee, best, or a number from 0 to {len(front.points) - 1}")


def _knee(values: Sequence[Sequence[float]]) -> int:
    """Tell where most of every objective is had at once.

    With every objective scaled to [0, 1] over the front, the point furthest below the plane through the unit points:
    the one with the smallest sum (after Das 1999, Structural Optimization 18, 107-115). A tie goes to the earlier
    point.
    """
    lows = [min(column) for column in zip(*values, strict=True)]
    spans = [max(column) - low or 1.0 for column, low in zip(zip(*values, strict=True), lows, strict=True)]
    sums = [sum((v - low) / span for v, low, span in zip(row, lows, spans, strict=True)) for row in values]
    return min(range(len(values)), key=lambda index: (round(sums[index], 12), index))
