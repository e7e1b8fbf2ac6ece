"""How finely widths are cut, and what one greedy step may remove in one layer: a residual block, a group of channels,
some KV groups, or some query heads of every KV group.

Widths that hardware likes are a hard constraint: a grid on which every width that can be reached is a multiple of N.
Matrix units work on tiles; a width that is no multiple of the tile pays for the next one that is. What counts is the
width of the matrices: channels of an MLP, and heads times their width of an attention block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from multipruner.core.axes import Dimension
from multipruner.core.errors import ConfigError
from multipruner.core.structure import BlockKind, LayerSize, Structure, queries_per_group


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


def widths(dense: int, step: int) -> tuple[int, ...]:
    """Every width that a block can have, 0 first: groups leave from the end, what stays is at least one group."""
    return (0, *sorted({dense, *range(dense, step - 1, -step)})) if dense else (0,)


def aligned(grid: Grid, dense: Structure, head_dim: int, align: int) -> Grid:
    """The finest grid, at least as coarse as the given one, whose cut widths are all multiples of ``align``.

    A block that is left as it is keeps its dense width. Where the KV heads of a layer cannot be halved, quartered and
    so on into multiples (three KV heads of 64 for an alignment of 128), no KV group leaves alone. Query heads leave
    inside the groups only by a step with which every width of the queries is a multiple; where there is none, not at
    all.

    Args:
        grid: as the recipe asks for.
        dense: the dense structure.
        head_dim: width of one attention head.
        align: what every MLP width, and every width of keys and queries, is a multiple of.

    Raises:
        ConfigError: when ``align`` is below one or the MLP width of a layer is no multiple of it.
    """
    if align < 1:
        raise ConfigError(f"align {align}: give a number of at least 1, such as 64")
    widths = sorted({size.channels for size in dense if size.channels})
    heads = sorted({size.kv_heads for size in dense if size.kv_heads})
    for width in widths:
        if width % align:
            powers = [2**power for power in range(width.bit_length()) if width % 2**power == 0]
            raise ConfigError(
                f"align {align} does not divide the {width} channels of a layer; these powers of two do: "
                f"{', '.join(map(str, powers))}"
            )
    group = _step(align, grid.channel_group, gcd(*widths)) if widths else grid.channel_group
    step = _step(align // gcd(align, head_dim), grid.kv_group_step, gcd(*heads)) if heads else grid.kv_group_step
    result = replace(grid, channel_group=group, kv_group_step=step, partial=False)
    return replace(result, query_head_step=_query_head_step(result, dense, head_dim, align))


def _query_head_step(grid: Grid, dense: Structure, head_dim: int, align: int) -> int | None:
    """The smallest step, not below the grid's, with which every cut width of the queries is a multiple."""
    most = max(2, *map(queries_per_group, dense))
    if grid.query_head_step is None or grid.query_head_step >= most:
        return grid.query_head_step  # what fits no group, the grid's own check refuses
    for step in range(grid.query_head_step, most):
        finer = replace(grid, query_head_step=step)
        # with fewer KV groups than the dense layer the keys are a multiple already, hence the queries too
        if all(n * full.kv_heads * head_dim % align == 0 for full in set(dense) for n in finer.queries(full)[:-1]):
            return step
    return None


def _step(multiple: int, least: int, whole: int) -> int:
    """The smallest divisor of ``whole`` that is a multiple of a number and not below another; else ``whole`` itself."""
    return next((step for step in range(multiple, whole + 1, multiple) if step >= least and whole % step == 0), whole)
