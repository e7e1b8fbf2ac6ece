"""What a residual block can keep, and which losses of that are measured and which predicted.

A block with one axis that moves, such as an MLP or attention of whole KV groups, has one chain of sizes. Where several
axes move, as where query heads may leave inside the groups, its options are a grid, in which only chains are measured,
all through the block as it is at present: along each of them one axis changes. Losses between measured ones of a chain
are interpolated. Off the chains

- an option's increase is predicted as the sum of the chains'. Units that go with the one they are within are counted on
  both chains, so where the losses of units add up the sum is an upper bound; where they do more than add up it is a
  guess;
- a block that is not there has a chain of its first axis only; the gain of bringing back a share of the units of the
  others is predicted as that share of the gain of bringing them back whole.

A prediction decides nothing by itself: the structure that it leads to is measured as a whole, and the chains of the
next round go through the option that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from math import prod

from multipruner.core.structure import GONE, Place, Size
from multipruner.search.grid import Grid

FIRST = (0.0, 0.5, 0.75)
"""Shares of its levels that a block keeps in the first tables; between them losses are on straight lines."""
FIRST_ON_CURVES = (0.5,)
"""The same where losses follow the block's output errors."""
Chain = tuple[Size, ...]
"""Options of one block in which one count changes, the smallest first."""


def levels(place: Place, grid: Grid) -> Chain:
    """Return what a block can keep, the smaller ones first, from nothing on where it may leave altogether.

    Size is counted in units of all axes: a query head has as many parameters as a KV head (its rows of queries and its
    columns of the output; keys and values).
    """
    sizes = sorted(
        product(*grid.of(place)), key=lambda size: (sum(prod(size[: end + 1]) for end in range(len(size))), size)
    )
    return (*_gone(place, grid), *sizes)


def chains(place: Place, grid: Grid, current: Size) -> tuple[Chain, ...]:
    """Return the chains of options through the present one: of its first axis, from nothing on where the block may
    leave, and of the others that move.

    Args:
        place: the dense block.
        grid: how finely it is cut.
        current: an option of it.
    """
    counts = grid.of(place)
    here = current or place.dense
    found = [(*_gone(place, grid), *_along(0, counts, here))]
    if current:
        found += [_along(axis, counts, here) for axis in range(1, len(counts)) if len(counts[axis]) > 1]
    return tuple(found)


def _gone(place: Place, grid: Grid) -> Chain:
    return (GONE,) if grid.removes(place) else ()


def _along(axis: int, counts: Sequence[tuple[int, ...]], here: Size) -> Chain:
    return tuple((*here[:axis], count, *here[axis + 1 :]) for count in counts[axis])


def interpolated(
    rows: Mapping[Size, float], sizes: Sequence[Size], errors: Sequence[float] | None = None
) -> dict[Size, float]:
    """Return losses of all levels between measured ones.

    Args:
        rows: measured losses, by size.
        sizes: the levels of a chain.
        errors: the output error of the block at every level, which the loss follows; a block that is gone is another
            thing than a narrow one, so that levels between it and the first measured one follow what lies above.
            Without errors, and where nothing lies above, losses are on straight lines over the level's number.
    """
    known = sorted((sizes.index(size), loss) for size, loss in rows.items())
    result = dict(rows)
    for number, ((low, first), (high, last)) in enumerate(pairwise(known)):
        one, other, along = (low, first), (high, last), errors
        if not sizes[low] and errors and number + 2 < len(known):
            one, other = known[1:3]
        elif not sizes[low]:
            along = None
        for place in range(low + 1, high):
            result[sizes[place]] = _between(one, other, place, along)
    return result


def beyond(rows: Mapping[Size, float], sizes: Sequence[Size], errors: Sequence[float]) -> dict[Size, float]:
    """Return losses of the levels below the lowest one that is measured, as the errors of the block's output say: what
    is not there is commonly dearer.

    Args:
        rows: losses, by size, among them those of the two lowest that are known.
        sizes: the levels of a chain.
        errors: the output error of the block at every level.
    """
    known = [place for place, size in enumerate(sizes) if size in rows]
    if not known[0] or len(known) < 2:
        return {}
    pair = [(place, rows[sizes[place]]) for place in known[:2]]
    return {sizes[place]: _between(pair[0], pair[1], place, errors) for place in range(known[0])}


def _between(one: tuple[int, float], other: tuple[int, float], place: int, errors: Sequence[float] | None) -> float:
    """Return the loss of a level from those of two others."""
    (low, first), (high, last) = one, other
    if errors is not None and errors[low] > errors[high]:
        slope = (first - last) / (errors[low] - errors[high])
        if place < low:  # beyond what was measured nothing gets cheaper
            slope = max(slope, 0.0)
        return first + slope * (errors[place] - errors[low])
    share = (place - low) / (high - low)
    return (1 - share) * first + share * last


def predicted(tables: Sequence[Mapping[Size, float]], place: Place, grid: Grid, current: Size) -> dict[Size, float]:
    """Return loss increases of a block's options: those on its chains, and what follows for the options off them.

    Args:
        tables: increases along each of :func:`chains`, 0 at the block as it is.
        place: the dense block.
        grid: how finely it is cut.
        current: the block as it is.
    """
    result = {size: loss for table in tables for size, loss in table.items()}
    counts = grid.of(place)
    moving = [axis for axis in range(1, len(counts)) if len(counts[axis]) > 1]
    if not moving:
        return result
    first = {size[0]: loss for size, loss in tables[0].items() if size}
    pairs = zip(moving, tables[1:], strict=False)
    others = [{size[axis]: loss for size, loss in table.items()} for axis, table in pairs]
    for size in product(*counts):
        if size[0] not in first:
            continue
        base = first[size[0]]
        if not current:
            result.setdefault(size, base * prod(size[axis] / place.dense[axis] for axis in moving))
        elif all(size[axis] in other for axis, other in zip(moving, others, strict=True)):
            more = (other[size[axis]] for axis, other in zip(moving, others, strict=True))
            result.setdefault(size, base + sum(more))
    return result


def wanted(sizes: Sequence[Size], current: Size, reach: int | None, first: Sequence[float]) -> list[Size]:
    """Return the options of one chain to measure: the block as it is costs nothing.

    Args:
        sizes: the chain.
        current: what the block has.
        reach: levels up and down of the two that are measured; ``None``: those of the first tables.
        first: shares of the levels that first tables measure.
    """
    here = sizes.index(current)
    if reach is None:
        last = len(sizes) - 1
        places = {round(last * share) for share in first}
    else:
        places = {max(0, here - reach), min(len(sizes) - 1, here + reach)}
    return [sizes[place] for place in sorted(places - {here})]
