"""Widths that hardware likes as a hard constraint: a grid on which every width that can be reached is a multiple of N.

Matrix units work on tiles; a width that is no multiple of the tile pays for the next one that is. What counts is the
width of the matrices: channels of an MLP, and heads times their width of an attention block.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from multipruner.core.errors import ConfigError
from multipruner.core.structure import Structure, queries_per_group
from multipruner.search.grid import Grid


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
