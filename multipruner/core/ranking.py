"""Units of a model's axes by their numbers in the dense model: those that stay, and the order in which they would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from .axes import BLOCK_KINDS, Axis, Kept
from .errors import ConfigError
from .layout import count_of
from .structure import Anatomy, Place, Size, counts_of

Units = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Units of an axis; of one within another axis, those of each unit of that."""


@dataclass(frozen=True, slots=True)
class BlockUnits:
    """Units of every axis of one residual block, in the dense numbering: an order of all, or those that stay.

    Attributes:
        axes: in the order of the kind's; of an axis within another one, its units' numbers within the unit they are in.
            Empty where the block is gone.
    """

    axes: tuple[Units, ...] = ()

    @classmethod
    def whole(cls, place: Place) -> BlockUnits:
        """Return all units of a dense block in the dense order."""
        counts = counts_of(place.kind, place.dense)
        return cls(
            tuple(
                (tuple(range(counts[axis.name])),) * counts[axis.within] if axis.within else
                tuple(range(counts[axis.name]))
                for axis in place.axes
            )
        )  # fmt: skip

    def by_axis(self, kind: str) -> Kept:
        """Return axis -> its units, those of an axis within another one in the order of that one's units."""
        axes = BLOCK_KINDS[kind].along(self.axes)
        return dict(zip((axis.name for axis in axes), self.axes or ((),) * len(axes), strict=True))

    @property
    def size(self) -> Size:
        """How many there are; a ``ValueError`` when units keep different numbers of those within them."""
        return tuple(map(count_of, self.axes))


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order of the units of every axis of every block, most important first: any width is a prefix of it.

    Of an axis within another one there is an order for every unit of that one, by its number in the dense model.

    Attributes:
        blocks: the orders of every block.
        stream: the order of the residual stream's dimensions; empty: as they lie in the dense model.
    """

    blocks: tuple[BlockUnits, ...]
    stream: tuple[int, ...] = ()

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Ranking:
        """Return the dense model's own order (the paper's "no reordering")."""
        return cls(tuple(map(BlockUnits.whole, anatomy.places)))

    def all_of(self, place: int, kind: str) -> Kept:
        """Return everything that a block has, in its order."""
        return self._first(place, kind, None).by_axis(kind)

    def first(self, place: int, kind: str, size: Size) -> BlockUnits:
        """Return the most important units that a size has room for, in the dense order."""
        return _sorted(self._first(place, kind, size), BLOCK_KINDS[kind].along(size)) if size else BlockUnits()

    def _first(self, place: int, kind: str, size: Size | None) -> BlockUnits:
        orders, chosen = self.blocks[place].axes, dict[str, Units]()
        ends: Sequence[int | None] = size or (None,) * len(orders)
        for axis, order, end in zip(BLOCK_KINDS[kind].along(orders), orders, ends, strict=True):
            outer = chosen[axis.within] if axis.within else ()
            nested = cast(tuple[tuple[int, ...], ...], order)
            chosen[axis.name] = (
                tuple(nested[unit][:end] for unit in cast(tuple[int, ...], outer)) if axis.within else order[:end]
            )
        return BlockUnits(tuple(chosen.values()))


def _sorted(units: BlockUnits, axes: Sequence[Axis]) -> BlockUnits:
    """Return the same units in the dense order."""
    found: dict[str, Units] = {}
    for axis, chosen in zip(axes, units.axes, strict=True):
        if not axis.within:
            found[axis.name] = tuple(sorted(cast(tuple[int, ...], chosen)))
            continue
        outer = cast(tuple[int, ...], units.axes[[other.name for other in axes].index(axis.within)])
        inner = cast(tuple[tuple[int, ...], ...], chosen)
        rows = sorted(zip(outer, inner, strict=True), key=lambda row: row[0])
        found[axis.name] = tuple(tuple(sorted(row)) for _, row in rows)
    return BlockUnits(tuple(found.values()))


def check_units(name: str, axis: Axis, row: Any, limit: int) -> None:
    """Refuse what are no units of an axis; the error begins with the name of what has them."""
    if not isinstance(row, tuple) or not all(isinstance(index, int) for index in row):
        raise ConfigError(f"{name}: {axis.label} must be indices")
    if not row or any(a >= b for a, b in pairwise(row)) or not 0 <= row[0] <= row[-1] < limit:
        raise ConfigError(f"{name}: {axis.label} must be ascending indices below {limit}")
