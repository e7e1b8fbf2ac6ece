"""How finely blocks are cut, and what one greedy step may remove in one block: all of it, or some units of an axis.

Widths that hardware likes are a hard constraint: a grid on which every width that can be reached is a multiple of N.
Matrix units work on tiles; a width that is no multiple of the tile pays for the next one that is. What counts is the
width of the matrices: channels of an MLP, and heads times their width of an attention block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any

from multipruner.core.axes import AXES, BLOCK_KINDS, Axis, Dimension
from multipruner.core.errors import ConfigError
from multipruner.core.structure import GONE, Anatomy, Place, Size, Structure


@dataclass(frozen=True)
class Grid:
    """How finely blocks are cut.

    Attributes:
        steps: axis -> units that leave together; an axis that is not named stays whole.
        partial: axes whose step need not divide the dense count: units leave from the end, what stays is uneven.
        least: axis -> units that stay at least, where a token goes through more than one.
        frozen: (kind, layer) of the blocks that stay whole; ``""`` for all kinds of a layer, until it is of a model.
        whole: whether blocks may leave altogether; where not, every one of them stays with some of its units.
    """

    steps: Mapping[str, int]
    partial: frozenset[str] = frozenset()
    least: Mapping[str, int] = field(default_factory=dict)
    frozen: frozenset[tuple[str, int]] = frozenset()
    whole: bool = True

    def of_model(self, anatomy: Anatomy) -> Grid:
        """Return the same for one model: of the axes that its blocks have, and with what of them stays at least.

        Raises:
            ConfigError: when a block that is to stay whole is none of the model's, all are to, or nothing of the model
                is of a dimension that may shrink.
        """
        names = {axis.name: axis for kind in anatomy.kinds for axis in anatomy.axes(kind)}
        steps = {name: step for name, step in self.steps.items() if name in names}
        least = {name: anatomy.least(name) for name, axis in names.items() if axis.active}
        frozen = _frozen(self.frozen, anatomy)
        if not (steps or self.whole):
            raise ConfigError(
                f"dimensions: nothing of this model is of them, so nothing can go; its kinds of block are "
                f"{', '.join(anatomy.kinds)}, and whole ones leave with blocks"
            )
        return replace(self, steps=steps, partial=self.partial & set(names), least=least, frozen=frozen)

    def freezes(self, place: Place) -> bool:
        """Tell whether a block stays whole."""
        return (place.kind, place.layer) in self.frozen

    def removes(self, place: Place) -> bool:
        """Tell whether a block may leave altogether."""
        return self.whole and not self.freezes(place)

    def fewest(self, axis: Axis) -> int:
        """Tell how many units of an axis with a step a block that is there keeps at least."""
        return max(1 if axis.within else self.steps[axis.name], self.least.get(axis.name, 1))

    def check(self, anatomy: Anatomy) -> None:
        """Refuse steps that do not divide the dense counts, or that fit no unit that an axis is within.

        Raises:
            ConfigError: naming the steps that would do.
        """
        for kind in anatomy.kinds:
            for number, axis in enumerate(anatomy.axes(kind)):
                free = (place for place in anatomy if place.kind == kind and not self.freezes(place))
                counts = sorted({place.dense[number] for place in free})
                if counts and axis.name in self.steps:
                    self._check_axis(axis, counts)

    def _check_axis(self, axis: Axis, counts: list[int]) -> None:
        step = self.steps[axis.name]
        if axis.within:
            most = max(counts)
            if not 1 <= step <= max(1, most - 1):
                raise ConfigError(
                    f"{axis.step} {step} does not fit the {most} {axis.label} of one of the {AXES[axis.within].label}, "
                    f"of which one stays; give {f'1 to {most - 1}' if most > 2 else 1}"
                )
            return
        for count in counts:
            if step > count or (count % step and axis.name not in self.partial):
                hint = f"; or allow it with --{axis.partial.replace('_', '-')}" if axis.partial and step < count else ""
                raise ConfigError(
                    f"{axis.step} {step} does not divide the {count} {axis.label} of a layer; "
                    f"these do: {', '.join(map(str, _divisors(count)))}{hint}"
                )

    def counts(self, axis: Axis, most: int) -> tuple[int, ...]:
        """Tell how many units of an axis a block that is there can have, ascending.

        Units leave from the end, a step at a time. What stays is at least one step, or one unit of an axis within
        another one, and no fewer than a token goes through; an axis without a step stays whole.

        Args:
            axis: of the block.
            most: how many the dense block has.
        """
        if axis.name not in self.steps:
            return (most,) if most else ()
        return tuple(sorted({most, *range(most, self.fewest(axis) - 1, -self.steps[axis.name])})) if most else ()

    def of(self, place: Place) -> tuple[tuple[int, ...], ...]:
        """Return for every axis of a block the counts that it can have, ascending."""
        if self.freezes(place):
            return tuple((most,) for most in place.dense)
        return tuple(self.counts(axis, most) for axis, most in zip(place.axes, place.dense, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return what tells this grid from another."""
        frozen = {"frozen": [list(block) for block in sorted(self.frozen)]} if self.frozen else {}
        whole = {} if self.whole else {"whole": False}
        return {**dict(sorted(self.steps.items())), "partial": sorted(self.partial), **frozen, **whole}


def _frozen(asked: frozenset[tuple[str, int]], anatomy: Anatomy) -> frozenset[tuple[str, int]]:
    """Return kind and layer of every block that is asked for, by kind and layer or by layer alone."""
    there = {(place.kind, place.layer) for place in anatomy}
    found: set[tuple[str, int]] = set()
    for kind, layer in sorted(asked):
        own = {block for block in there if block[1] == layer and (not kind or _label(kind) == _label(block[0]))}
        if not own:
            what = f"no {kind} block in layer {layer}" if 0 <= layer < anatomy.layers else f"no layer {layer}"
            raise ConfigError(
                f"freeze: the model has {what}; its layers are 0 to {anatomy.layers - 1}, its kinds of block "
                f"{', '.join(anatomy.kinds)}"
            )
        found |= own
    if found and found == there:
        raise ConfigError("freeze: all blocks of the model are to stay whole, so nothing can go; name fewer")
    return frozenset(found)


def _label(kind: str) -> str:
    return BLOCK_KINDS[kind].label


def _divisors(width: int) -> list[int]:
    return [step for step in range(1, width + 1) if width % step == 0]


Move = tuple[int, Size]
"""(number of a block, its size after a step)."""


def candidates(dimension: Dimension, structure: Structure, anatomy: Anatomy, grid: Grid) -> list[Move]:
    """List everything that one step of a dimension can do, the changes of one kind of block after another's.

    One block of each kind always stays, and no count falls below the least of its axis: what is removed whole is
    removed by the dimension "blocks".
    """
    if dimension == "blocks":
        return list(_whole_blocks(structure, anatomy, grid))
    return list(_units(dimension, structure, anatomy, grid))


def _whole_blocks(structure: Structure, anatomy: Anatomy, grid: Grid) -> Iterator[Move]:
    for kind in anatomy.kinds:
        if anatomy.count(structure, kind) > 1:
            for number in anatomy.of_kind(kind):
                if structure[number] and grid.removes(anatomy[number]):
                    yield number, GONE


def _units(dimension: Dimension, structure: Structure, anatomy: Anatomy, grid: Grid) -> Iterator[Move]:
    for number, (place, size) in enumerate(zip(anatomy, structure, strict=True)):
        for at, axis in enumerate(place.axes if size and not grid.freezes(place) else ()):
            step = grid.steps.get(axis.name)
            if axis.dimension != dimension or step is None:
                continue
            if size[at] - step >= grid.fewest(axis):
                yield number, (*size[:at], size[at] - step, *size[at + 1 :])


def aligned(grid: Grid, anatomy: Anatomy, align: int) -> Grid:
    """Return the finest grid, at least as coarse as the given one, whose cut widths are all multiples of ``align``.

    A block that is left as it is keeps its dense width. Where the KV heads of a layer cannot be halved, quartered and
    so on into multiples (three KV heads of 64 for an alignment of 128), no KV group leaves alone. Units within others
    leave only by a step with which every width of the output is a multiple; where there is none, not at all.

    Args:
        grid: as the recipe asks for.
        anatomy: the dense model's blocks.
        align: what every width of a matrix that is cut is a multiple of.

    Raises:
        ConfigError: when ``align`` is below one, or an axis whose units are as wide as one number is no multiple of it.
    """
    if align < 1:
        raise ConfigError(f"align {align}: give a number of at least 1, such as 64")
    steps = dict(grid.steps)
    free = {kind: [p for p in anatomy if p.kind == kind and not grid.freezes(p)] for kind in anatomy.kinds}
    for kind, places in free.items():
        for number, axis in enumerate(anatomy.axes(kind) if places else ()):
            counts = [place.dense[number] for place in places]
            if axis.within or axis.name not in steps:
                continue
            width = prod(anatomy.constants[name] for name in axis.width)
            if not axis.width:
                _check_alignment(align, sorted(set(counts)), axis)
            steps[axis.name] = _step(align // gcd(align, width), steps[axis.name], gcd(*counts))
    result = replace(grid, steps=steps, partial=frozenset())
    for kind, places in free.items():
        for number, axis in enumerate(anatomy.axes(kind) if places else ()):
            if axis.within and axis.name in steps:
                step = _inner_step(result, places, anatomy, number, align)
                steps = {name: value for name, value in steps.items() if name != axis.name}
                steps |= {} if step is None else {axis.name: step}
    return replace(result, steps=steps)


def _check_alignment(align: int, counts: list[int], axis: Axis) -> None:
    for count in counts:
        if count % align:
            powers = [2**power for power in range(count.bit_length()) if count % 2**power == 0]
            raise ConfigError(
                f"align {align} does not divide the {count} {axis.label} of a layer; these powers of two do: "
                f"{', '.join(map(str, powers))}"
            )


def _inner_step(grid: Grid, places: list[Place], anatomy: Anatomy, number: int, align: int) -> int | None:
    """Return the smallest step of an axis within another one, not below the grid's, with which every cut width is a
    multiple.
    """
    axes = places[0].axes
    axis, outer = axes[number], next(a for a in axes if a.name == axes[number].within)
    most, width = max(2, *(place.dense[number] for place in places)), prod(anatomy.constants[n] for n in axis.width)
    wanted = grid.steps[axis.name]
    if wanted >= most:
        return wanted  # what fits no unit, the grid's own check refuses
    for step in range(wanted, most):
        finer = replace(grid, steps={**grid.steps, axis.name: step})
        # with fewer of the outer units than the dense block, their own width is a multiple already
        if all(
            (count * place.dense[axes.index(outer)] * width if axis.width else count) % align == 0
            for place in set(places)
            for count in finer.counts(axis, place.dense[number])[:-1]
        ):
            return step
    return None


def _step(multiple: int, least: int, whole: int) -> int:
    """Return the smallest divisor of ``whole`` that is a multiple of a number and not below another; else ``whole``
    itself.
    """
    return next((step for step in range(multiple, whole + 1, multiple) if step >= least and whole % step == 0), whole)
