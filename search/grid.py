"""What one greedy step may remove in one layer: a residual block, a group of channels, some KV groups, or some query
heads of every KV group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from multipruner.core.errors import ConfigError
from multipruner.core.structure import BlockKind, LayerSize, Structure, queries_per_group

Dimension = Literal["blocks", "mlp", "heads"]
DIMENSIONS: tuple[Dimension, ...] = ("blocks", "mlp", "heads")


@dataclass(frozen=True, slots=True)
class Grid:
    """How finely widths are cut.

    Attributes:
        channel_group: MLP channels that leave together.
        kv_group_step: KV groups (one KV head with its query heads) that leave together.
        query_head_step: query heads that leave together inside every KV group of a layer; ``None``: groups stay whole.
        partial: allow channel groups that do not divide the width: groups leave from the end, what stays is uneven.
    """

    channel_group: int
    kv_group_step: int = 1
    partial: bool = False
    query_head_step: int | None = None

    def check(self, dense: Structure) -> None:
        """Refuse steps that do not divide the dense sizes, or that fit no KV group.

        Raises:
            ConfigError: naming the sizes that would do.
        """
        for flag, step, name in (
            ("channel group", self.channel_group, "channels"),
            ("KV group step", self.kv_group_step, "kv_heads"),
        ):
            for width in sorted({getattr(size, name) for size in dense}):
                if name == "channels" and self.partial and step <= width:
                    continue
                if width % step:
                    raise ConfigError(
                        f"{flag} {step} does not divide the {width} {name.replace('_', ' ')} of a layer; "
                        f"these do: {', '.join(map(str, _divisors(width)))}"
                        + ("; or allow it with --partial-groups" if name == "channels" and step < width else "")
                    )
        most = max(map(queries_per_group, dense), default=0)
        if self.query_head_step is not None and not 1 <= self.query_head_step <= max(1, most - 1):
            raise ConfigError(
                f"query head step {self.query_head_step} does not fit the {most} query heads of a KV group, of which "
                f"one stays; give {f'1 to {most - 1}' if most > 2 else 1}"
            )

    def queries(self, full: LayerSize) -> tuple[int, ...]:
        """How many query heads each KV group of a layer can keep, ascending."""
        most = queries_per_group(full)
        return tuple(sorted(range(most, 0, -(self.query_head_step or most)))) if most else ()


def _divisors(width: int) -> list[int]:
    return [step for step in range(1, width + 1) if width % step == 0]


def candidates(dimension: Dimension, structure: Structure, grid: Grid) -> list[tuple[BlockKind, int, Structure]]:
    """Every structure that one step of a dimension can lead to, as (block kind, layer, structure).

    One attention and one MLP block always stay, and no width falls below one step: what is removed whole is
    removed by the dimension "blocks".
    """
    moves = {"blocks": _whole_blocks, "mlp": _channel_groups, "heads": _heads}[dimension](structure, grid)
    return [(kind, layer, structure.replace(layer, size)) for kind, layer, size in moves]


_Move = tuple[BlockKind, int, LayerSize]


def _whole_blocks(structure: Structure, grid: Grid) -> Iterator[_Move]:
    kinds: tuple[BlockKind, ...] = ("attention", "mlp")
    for kind in kinds:
        if structure.count(kind) > 1:
            for number, size in enumerate(structure):
                if size.has(kind):
                    yield kind, number, size.without(kind)


def _channel_groups(structure: Structure, grid: Grid) -> Iterator[_Move]:
    step = grid.channel_group
    for number, size in enumerate(structure):
        if size.channels >= 2 * step:
            yield "mlp", number, replace(size, channels=size.channels - step)


def _heads(structure: Structure, grid: Grid) -> Iterator[_Move]:
    """Whole KV groups, and where the grid allows it some query heads of every group."""
    step, fewer = grid.kv_group_step, grid.query_head_step
    for number, size in enumerate(structure):
        per_group = queries_per_group(size)
        if size.kv_heads >= 2 * step:
            kv_heads = size.kv_heads - step
            yield "attention", number, replace(size, query_heads=kv_heads * per_group, kv_heads=kv_heads)
        if fewer is not None and per_group > fewer:
            yield "attention", number, replace(size, query_heads=size.kv_heads * (per_group - fewer))
