"""A structure as a row of small numbers: how many steps of the grid every axis of every residual block keeps.

A rung is an axis that moves. Where a block may leave, its first axis has a level 0, at which the block is gone; what
its other axes keep is of no account then. Blocks that are frozen have no rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.search.grid import Grid

Levels = list[int]


@dataclass(frozen=True, slots=True)
class Rung:
    """One axis of one block.

    Attributes:
        place: number of the block.
        axis: number of the axis in the block's size.
        counts: what each level keeps; 0 first on the first axis of a block that may leave.
    """

    place: int
    axis: int
    counts: tuple[int, ...]


class Ladder:
    """Translates between structures and levels.

    Attributes:
        rungs: what each number of a row of levels stands for: block by block, axis by axis.
        tops: the dense level of every rung.

    Raises:
        ConfigError: when the grid does not divide the dense counts.
    """

    def __init__(self, anatomy: Anatomy, grid: Grid) -> None:
        grid.check(anatomy)
        self.anatomy, self.dense = anatomy, anatomy.dense
        self.rungs: tuple[Rung, ...] = tuple(
            Rung(number, axis, counts)
            for number, place in enumerate(anatomy)
            for axis, kept in enumerate(grid.of(place))
            if len(counts := (0, *kept) if axis == 0 and grid.removes(place) else kept) > 1
        )
        self.tops: tuple[int, ...] = tuple(len(rung.counts) - 1 for rung in self.rungs)
        self._of_place = [
            [number for number, rung in enumerate(self.rungs) if rung.place == place] for place in range(len(anatomy))
        ]
        self._known: dict[tuple[int, ...], Size] = {}
        rungs = {kind: [self._of_place[place] for place in anatomy.of_kind(kind)] for kind in anatomy.kinds}
        removed = {kind: [own[0] for own in rows if own and self.removes(own[0])] for kind, rows in rungs.items()}
        self._heads, self._staying = removed, {kind: len(rows) - len(removed[kind]) for kind, rows in rungs.items()}

    def __len__(self) -> int:
        return len(self.tops)

    def kind(self, rung: int) -> str:
        """Return the kind of the block that a rung is of."""
        return self.anatomy[self.rungs[rung].place].kind

    def layer(self, rung: int) -> int:
        """Return the decoder layer that a rung is in."""
        return self.anatomy[self.rungs[rung].place].layer

    def alike(self, rung: int) -> list[int]:
        """Return the rungs of the same axis of all blocks of its kind, itself among them."""
        kind, axis = self.kind(rung), self.rungs[rung].axis
        return [other for other, row in enumerate(self.rungs) if row.axis == axis and self.kind(other) == kind]

    def structure(self, levels: Sequence[int]) -> Structure:
        """Return the structure that levels stand for."""
        return Structure(tuple(self._size(place, levels) for place in range(len(self.anatomy))))

    def _size(self, place: int, levels: Sequence[int]) -> Size:
        rungs = self._of_place[place]
        key = (place, *(levels[number] for number in rungs))
        if key not in self._known:
            size = list(self.anatomy[place].dense)
            for number in rungs:
                size[self.rungs[number].axis] = self.rungs[number].counts[levels[number]]
            self._known[key] = tuple(size) if size[0] else GONE
        return self._known[key]

    def levels(self, structure: Structure) -> Levels:
        """Return the levels of a structure; a count that is not on the grid goes to the nearest one (the lower of two).

        Of a block that is gone the other axes stand at their dense level.
        """
        found = []
        for rung in self.rungs:
            size = structure[rung.place]
            count = size[rung.axis] if size else 0 if rung.axis == 0 else rung.counts[-1]
            nearest = min(range(len(rung.counts)), key=lambda n, r=rung, c=count: (abs(r.counts[n] - c), n))
            found.append(nearest)
        return found

    def removes(self, rung: int) -> bool:
        """Tell whether level 0 of a rung is a block that is gone."""
        return not self.rungs[rung].counts[0]

    def can(self, levels: Levels, rung: int, change: int) -> bool:
        """Tell whether a level may change by so much: within 0 and dense, one block of each kind stays, and
        something comes of it.
        """
        after = levels[rung] + change
        if not 0 <= after <= self.tops[rung]:
            return False
        if not self.removes(rung):
            first = self._of_place[self.rungs[rung].place][0]
            return levels[first] > 0 or not self.removes(first)
        return after > 0 or levels[rung] == 0 or self.blocks(levels, self.kind(rung)) > 1

    def blocks(self, levels: Sequence[int], kind: str) -> int:
        """Tell how many blocks of a kind are there."""
        return self._staying[kind] + sum(levels[number] > 0 for number in self._heads[kind])

    def of_kind(self, kind: str) -> list[int]:
        """Return the rungs at whose level 0 a block of a kind is gone."""
        return self._heads[kind]
