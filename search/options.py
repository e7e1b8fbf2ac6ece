"""What a residual block can keep, and which losses of that are measured and which predicted.

An MLP block, and an attention block of whole KV groups, has one chain of widths. Where query heads may leave inside the
groups, an attention block keeps so many of each of so many KV groups: a plane of options, in which only two chains are
measured, both through the block as it is at present. Along one the number of KV groups changes, along the other the
number of query heads in every group. Losses between measured ones of a chain are interpolated. Off the chains

- an option's increase is predicted as the sum of the two chains'. Heads that go with their group are counted on both
  chains, so where the losses of heads add up the sum is an upper bound; where they do more than add up it is a guess;
- a block that is not there has no second chain; the gain of bringing back some query heads of so many groups is
  predicted as the share of those heads in the gain of bringing back the groups whole.

A prediction decides nothing by itself: the structure that it leads to is measured as a whole, and the chains of the
next round go through the option that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from multipruner.core.structure import BlockKind, LayerSize, queries_per_group
from multipruner.search.grid import Grid, widths

EMPTY = LayerSize(0, 0, 0)
Chain = tuple[LayerSize, ...]
"""Options of one block in which one number changes, the smallest first."""


def levels(full: LayerSize, kind: BlockKind, grid: Grid) -> Chain:
    """What a block can keep, from nothing to everything, as sizes of that block alone; the smaller ones first.

    A query head has as many parameters as a KV head (its rows of queries and its columns of the output; keys and
    values), so attention options are in the order of the heads of both kinds.
    """
    if kind == "mlp":
        return tuple(LayerSize(0, 0, channels) for channels in widths(full.channels, grid.channel_group))
    sizes = [
        LayerSize(queries * groups, groups, 0)
        for groups in widths(full.kv_heads, grid.kv_group_step)
        if groups
        for queries in grid.queries(full)
    ]
    return (EMPTY, *sorted(sizes, key=lambda size: (size.query_heads + size.kv_heads, size.kv_heads)))


def chains(full: LayerSize, kind: BlockKind, grid: Grid, current: LayerSize) -> tuple[Chain, ...]:
    """The chains of options through the present one: of the widths, or of KV groups and then of query heads in them.

    Args:
        full: the dense block alone.
        kind: of the block.
        grid: how finely widths are cut.
        current: an option of it.
    """
    queries = grid.queries(full)
    if kind == "mlp" or len(queries) < 2:
        return (levels(full, kind, grid),)
    here = queries_per_group(current) or queries[-1]
    groups = tuple(LayerSize(here * count, count, 0) for count in widths(full.kv_heads, grid.kv_group_step))
    if not current.has_attention:
        return (groups,)
    return groups, tuple(LayerSize(count * current.kv_heads, current.kv_heads, 0) for count in queries)


def interpolated(rows: Mapping[LayerSize, float], sizes: Sequence[LayerSize]) -> dict[LayerSize, float]:
    """Losses of all levels between measured ones, on straight lines over the level's number."""
    known = sorted((sizes.index(size), loss) for size, loss in rows.items())
    result = dict(rows)
    for (low, first), (high, last) in pairwise(known):
        for place in range(low + 1, high):
            share = (place - low) / (high - low)
            result[sizes[place]] = (1 - share) * first + share * last
    return result


def predicted(
    tables: Sequence[Mapping[LayerSize, float]], full: LayerSize, kind: BlockKind, grid: Grid
) -> dict[LayerSize, float]:
    """Loss increases of a block's options: those on its chains, and what follows for the options off them.

    Args:
        tables: increases along each of :func:`chains`, 0 at the block as it is.
        full: the dense block alone.
        kind: of the block.
        grid: how finely widths are cut.
    """
    result = {size: loss for table in tables for size, loss in table.items()}
    queries = grid.queries(full)
    if kind == "mlp" or len(queries) < 2:
        return result
    groups = {size: loss for size, loss in tables[0].items() if size.has_attention}
    for size, loss in groups.items():
        if len(tables) > 1:
            others = [(queries_per_group(other), more) for other, more in tables[1].items()]
            inside = {count: loss + more for count, more in others}
        else:
            inside = {count: loss * count / queries[-1] for count in queries}
        for count, value in inside.items():
            result.setdefault(LayerSize(count * size.kv_heads, size.kv_heads, 0), value)
    return result
