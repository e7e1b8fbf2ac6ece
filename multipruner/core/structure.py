"""How much of a model stays: plain values, no torch. Search, budgets and look-up tables see nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from . import earlier
from .axes import AXES, BLOCK_KINDS, STREAM, Axis
from .errors import ConfigError

Size = tuple[int, ...]
"""What a residual block keeps: counts along its kind's axes, of an axis within another one in every unit of that."""
GONE: Size = ()
"""The size of a block that is not there."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The sizes of all residual blocks, in the order in which they run; hashable, hence the key of every memo, cache
    and look-up table.

    Attributes:
        blocks: the size of every block.
        hidden: the width of the residual stream; ``None``: as wide as the model is.

    Raises:
        ConfigError: when a block that is there has none of something, or the stream has no width.
    """

    blocks: tuple[Size, ...]
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError(f"the residual stream keeps at least one dimension, not {self.hidden}")
        if any(size and min(size) < 1 for size in self.blocks):
            wrong = next(size for size in self.blocks if size and min(size) < 1)
            raise ConfigError(f"a block keeps at least one of everything, or is gone; not {wrong}")

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: int) -> Size:
        return self.blocks[place]

    def __iter__(self) -> Iterator[Size]:
        return iter(self.blocks)

    def replace(self, place: int, size: Size) -> Structure:
        """Return this structure with one block's size changed."""
        return Structure((*self.blocks[:place], size, *self.blocks[place + 1 :]), self.hidden)

    def fits_in(self, dense: Structure) -> bool:
        """Tell whether every size is at most the dense model's."""
        return len(self) == len(dense) and all(
            not size or (len(size) == len(full) and all(a <= b for a, b in zip(size, full, strict=True)))
            for size, full in zip(self, dense, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Encode as ``{"blocks": [[3, 3], [], ...]}``, with ``"hidden"`` where the residual stream is narrower."""
        stream = {} if self.hidden is None else {"hidden": self.hidden}
        return {"blocks": [list(size) for size in self.blocks], **stream}

    @classmethod
    def from_json(cls, value: Any) -> Structure:
        """Decode what :meth:`to_json`, or version 1, encoded.

        Raises:
            ConfigError: for sizes that no block can have.
            TypeError, ValueError: when it is neither.
        """
        record = value if isinstance(value, Mapping) else earlier.structure(value)
        hidden = record.get("hidden")
        blocks = tuple(tuple(map(_whole, size)) for size in record["blocks"])
        return cls(blocks, None if hidden is None else _whole(hidden))


def _whole(count: Any) -> int:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"a size holds whole numbers, not {count!r}")
    return count


def counts_of(kind: str, size: Size) -> dict[str, int]:
    """Tell how much of every axis that its size names a block has: nothing where it is gone."""
    axes = BLOCK_KINDS[kind].along(size)
    return dict(zip((axis.name for axis in axes), size or (0,) * len(axes), strict=True))


def total(kind: str, size: Size, axis: str) -> int:
    """Tell how many units of an axis a block has in all, in every unit of what it is within; 0 of one not named."""
    counts = counts_of(kind, size)
    chain = [axis] if axis in counts else []
    while chain and AXES[chain[-1]].within:
        chain.append(AXES[chain[-1]].within)
    return prod(counts[name] for name in chain) if chain else 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a residual block stands.

    Attributes:
        layer: number of its decoder layer in the dense model.
        kind: name of its kind.
        dense: its size in the dense model.
    """

    layer: int
    kind: str
    dense: Size

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that its sizes name."""
        return BLOCK_KINDS[self.kind].along(self.dense)

    @property
    def name(self) -> str:
        """What messages call it, such as ``the MLP block of layer 3``."""
        return f"the {BLOCK_KINDS[self.kind].label} block of layer {self.layer}"


@dataclass(frozen=True)
class Anatomy:
    """The residual blocks of a dense model, in the order in which they run.

    What follows from them is asked for in every step of a search, and computed once.

    Attributes:
        places: one of every block.
        constants: the numbers that no structure changes, by their names in layouts.
    """

    places: tuple[Place, ...]
    constants: Mapping[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def uniform(cls, layers: int, sizes: Mapping[str, Size], constants: Mapping[str, int] | None = None) -> Anatomy:
        """Build the anatomy of layers that are all alike, such as most dense models have.

        Args:
            layers: how many.
            sizes: of the blocks of each layer by their kinds, in the order in which they run.
            constants: see :class:`Anatomy`.
        """
        rows = [Place(layer, kind, size) for layer in range(layers) for kind, size in sizes.items() if size]
        return cls(tuple(rows), constants or {})

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Place:
        return self.places[place]

    def __iter__(self) -> Iterator[Place]:
        return iter(self.places)

    @cached_property
    def dense(self) -> Structure:
        """The structure of the dense model."""
        return Structure(tuple(place.dense for place in self.places))

    @cached_property
    def empty(self) -> Structure:
        """The structure without any block."""
        return Structure((GONE,) * len(self.places))

    @cached_property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return 1 + max((place.layer for place in self.places), default=-1)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its blocks, in the order in which they first run."""
        return tuple(dict.fromkeys(place.kind for place in self.places))

    @cached_property
    def _numbers(self) -> dict[int | str, tuple[int, ...]]:
        """The numbers of the blocks of every layer and of every kind."""
        found: dict[int | str, list[int]] = {}
        for number, place in enumerate(self.places):
            for key in (place.layer, place.kind):
                found.setdefault(key, []).append(number)
        return {key: tuple(numbers) for key, numbers in found.items()}

    def of_kind(self, kind: str) -> tuple[int, ...]:
        """Return the numbers of the blocks of a kind."""
        return self._numbers.get(kind, ())

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """Return the numbers of the blocks of a decoder layer."""
        return self._numbers.get(layer, ())

    def at(self, layer: int, kind: str) -> int:
        """Return the number of a layer's block of a kind.

        Raises:
            KeyError: when the layer has none.
        """
        found = [number for number in self.of_layer(layer) if self.places[number].kind == kind]
        if not found:
            raise KeyError(f"layer {layer} has no {kind} block")
        return found[0]

    def axes(self, kind: str) -> tuple[Axis, ...]:
        """Return the axes that the sizes of its blocks of a kind name."""
        return next((self.places[number].axes for number in self.of_kind(kind)), ())

    def least(self, axis: str) -> int:
        """Tell how many units of an axis a block that is there keeps at least: those that a token goes through."""
        return AXES[axis].least(self.constants)

    def check(self, structure: Structure) -> None:
        """Refuse blocks that keep fewer units than a token goes through.

        Raises:
            ConfigError: naming the first of them.
        """
        for place, size in zip(self.places, structure, strict=True):
            for axis, count in zip(place.axes if size else (), size, strict=True):
                if count < (least := self.least(axis.name)):
                    raise ConfigError(
                        f"{place.name} would keep {count} {axis.label}{axis.in_each}, and a token goes through "
                        f"{least} of them: keep at least {least}, or remove the block"
                    )

    def counts(self, place: int, size: Size | None = None) -> dict[str, int]:
        """Tell how much of every axis a block has, dense or of another size, and the constants."""
        here = self.places[place]
        return {**self.constants, **counts_of(here.kind, here.dense if size is None else size)}

    def count(self, structure: Structure, kind: str) -> int:
        """Tell how many blocks of a kind are left."""
        return sum(bool(structure[number]) for number in self.of_kind(kind))

    def total(self, structure: Structure, axis: str) -> int:
        """Tell how many units of an axis all blocks together have."""
        blocks = zip(self.places, structure, strict=True)
        return sum(total(p.kind, size, axis) for p, size in blocks if axis in BLOCK_KINDS[p.kind].names)

    def living_layers(self, structure: Structure) -> list[int]:
        """Return dense numbers of the decoder layers that keep at least one block, in order."""
        blocks = zip(self.places, structure, strict=True)
        return sorted({place.layer for place, size in blocks if size})

    def of_layers(self, layers: Sequence[int]) -> Anatomy:
        """Return the anatomy of some of the decoder layers alone, numbered anew in their order."""
        new = {old: number for number, old in enumerate(layers)}
        rows = [Place(new[place.layer], place.kind, place.dense) for place in self.places if place.layer in new]
        return Anatomy(tuple(rows), self.constants)


_BARS = " ▁▂▃▄▅▆▇█"


def bar(part: int, whole: int) -> str:
    """Return one character whose height is the share that stays; a dot for nothing."""
    return _BARS[max(1, round(8 * part / whole))] if part else "·"


def picture(structure: Structure, anatomy: Anatomy) -> str:
    """Draw the shape of a model: one character per block, its height what the block keeps, a dot for nothing."""
    ruler = "".join(str(number // 10 % 10) if number % 10 == 0 else " " for number in range(anatomy.layers)).rstrip()
    rows = {"layer": ruler} | {BLOCK_KINDS[kind].label: _row(structure, anatomy, kind) for kind in anatomy.kinds}
    wide = max(9, *map(len, rows))
    kept = [f"{'' if row else 'kept:':6}{text}" for row, text in enumerate(kept_in_words(structure, anatomy))]
    return "\n".join((*(f"{name:{wide}}  {row}".rstrip() for name, row in rows.items()), *kept))


def _row(structure: Structure, anatomy: Anatomy, kind: str) -> str:
    marks = [" "] * anatomy.layers
    for number in anatomy.of_kind(kind):
        place, axis = anatomy[number], BLOCK_KINDS[kind].finest.name
        marks[place.layer] = bar(total(kind, structure[number], axis), total(kind, place.dense, axis))
    return "".join(marks)


def kept_in_words(structure: Structure, anatomy: Anatomy) -> list[str]:
    """Return what stays of every kind, such as ``30 of 30 attention blocks (200 of 270 query heads)``."""
    found = []
    for kind in anatomy.kinds:
        blocks = f"{anatomy.count(structure, kind)} of {anatomy.count(anatomy.dense, kind)}"
        units = ", ".join(
            f"{anatomy.total(structure, axis.name):,} of {anatomy.total(anatomy.dense, axis.name):,} {axis.label}"
            for axis in anatomy.axes(kind)
            if axis.unsaid or axis is BLOCK_KINDS[kind].finest
        )
        text = f"{blocks} {BLOCK_KINDS[kind].label} blocks"
        found.append(text if BLOCK_KINDS[kind].whole else f"{text} ({units})")
    if structure.hidden is not None:
        axis = STREAM.axes[0]
        found.append(f"{structure.hidden:,} of {anatomy.constants[axis.name]:,} {axis.label}")
    return found
