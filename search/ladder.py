"""A structure as a row of small numbers: how many steps of the grid each residual block keeps.

Two places per layer, attention first; level 0 means that the block is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from multipruner.core.structure import LayerSize, Structure
from multipruner.search.grid import Grid, widths

Levels = list[int]


class Ladder:
    """Translates between structures and levels.

    Attributes:
        tops: the dense level of every place; shape (2 * layers,).

    Raises:
        ConfigError: when the grid does not divide the dense sizes.
    """

    def __init__(self, dense: Structure, grid: Grid) -> None:
        grid.check(dense)
        self.dense = dense
        self._widths = [
            rungs
            for size in dense
            for rungs in (widths(size.kv_heads, grid.kv_group_step), widths(size.channels, grid.channel_group))
        ]
        self.tops: tuple[int, ...] = tuple(len(widths) - 1 for widths in self._widths)
        self._sizes: dict[tuple[int, int, int], LayerSize] = {}

    def __len__(self) -> int:
        return len(self.tops)

    def structure(self, levels: Sequence[int]) -> Structure:
        """The structure that levels stand for."""
        return Structure(
            tuple(self._size(layer, levels[2 * layer], levels[2 * layer + 1]) for layer in range(len(self.dense)))
        )

    def _size(self, layer: int, attention: int, mlp: int) -> LayerSize:
        key = (layer, attention, mlp)
        if key not in self._sizes:
            full, kv_heads = self.dense[layer], self._widths[2 * layer][attention]
            queries = full.query_heads // full.kv_heads * kv_heads if kv_heads else 0
            self._sizes[key] = LayerSize(queries, kv_heads, self._widths[2 * layer + 1][mlp])
        return self._sizes[key]

    def levels(self, structure: Structure) -> Levels:
        """The levels of a structure; a width that is not on the grid goes to the nearest one (the lower of two)."""
        sizes = [width for size in structure for width in (size.kv_heads, size.channels)]
        return [
            min(range(len(rungs)), key=lambda level, rungs=rungs, width=width: (abs(rungs[level] - width), level))
            for rungs, width in zip(self._widths, sizes, strict=True)
        ]

    def can(self, levels: Levels, place: int, change: int) -> bool:
        """Whether a level may change by so much: within 0 and dense, and one block of each kind stays."""
        after = levels[place] + change
        if not 0 <= after <= self.tops[place]:
            return False
        return after > 0 or levels[place] == 0 or self.blocks(levels, place % 2) > 1

    @staticmethod
    def blocks(levels: Levels, kind: int) -> int:
        """How many blocks of a kind (0 attention, 1 MLP) are there."""
        return sum(level > 0 for level in levels[kind::2])
