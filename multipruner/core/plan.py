"""Which parts of a model stay: plain values, no torch.

A ``Ranking`` turns a ``Structure`` into a ``PruningPlan``, which alone is enough to cut the dense model again, bit for
bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

from . import earlier
from .axes import BLOCK_KINDS, LARGEST, Axis, Kept, ranges_of, units_in
from .errors import ConfigError
from .layout import count_of
from .structure import Anatomy, Place, Size, Structure, counts_of

PLAN_FORMAT = "multipruner-plan"
PLAN_VERSION = 2
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
                for axis in BLOCK_KINDS[place.kind].axes
            )
        )  # fmt: skip

    def by_axis(self, kind: str) -> Kept:
        """Return axis -> its units, those of an axis within another one in the order of that one's units."""
        names = BLOCK_KINDS[kind].names
        return dict(zip(names, self.axes or ((),) * len(names), strict=True))

    @property
    def size(self) -> Size:
        """How many there are; a ``ValueError`` when units keep different numbers of those within them."""
        return tuple(map(count_of, self.axes))


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order of the units of every axis of every block, most important first: any width is a prefix of it.

    Of an axis within another one there is an order for every unit of that one, by its number in the dense model.
    """

    blocks: tuple[BlockUnits, ...]

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Ranking:
        """Return the dense model's own order (the paper's "no reordering")."""
        return cls(tuple(map(BlockUnits.whole, anatomy.places)))

    def all_of(self, place: int, kind: str) -> Kept:
        """Return everything that a block has, in its order."""
        return self._first(place, kind, None).by_axis(kind)

    def first(self, place: int, kind: str, size: Size) -> BlockUnits:
        """Return the most important units that a size has room for, in the dense order."""
        return _sorted(self._first(place, kind, size), BLOCK_KINDS[kind].axes) if size else BlockUnits()

    def _first(self, place: int, kind: str, size: Size | None) -> BlockUnits:
        orders, chosen = self.blocks[place].axes, dict[str, Units]()
        ends: Sequence[int | None] = size or (None,) * len(orders)
        for axis, order, end in zip(BLOCK_KINDS[kind].axes, orders, ends, strict=True):
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


@dataclass(frozen=True)
class PruningPlan:
    """Which units of which dense model stay; with the dense weights that is the pruned model.

    Attributes:
        model: what the dense model was loaded from (Hub id or source name).
        revision: its revision, or ``None``.
        fingerprint: SHA-256 of the dense weights, or ``None`` when unknown.
        model_type: ``config.model_type`` of the dense model.
        anatomy: the dense model's blocks; constants are not part of a plan.
        blocks: what stays of each of them, ascending.

    Raises:
        ConfigError: when indices are unsorted or out of range, or units keep unequal numbers of those within them.
    """

    model: str
    revision: str | None
    fingerprint: str | None
    model_type: str
    anatomy: Anatomy
    blocks: tuple[BlockUnits, ...]

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.anatomy):
            raise ConfigError(f"plan has {len(self.blocks)} blocks, the dense model {len(self.anatomy)}")
        for place, kept in zip(self.anatomy, self.blocks, strict=True):
            _check_block(place, kept)

    @property
    def dense(self) -> Structure:
        """The dense model's structure."""
        return self.anatomy.dense

    @cached_property
    def structure(self) -> Structure:
        """The sizes that this plan leads to."""
        return Structure(tuple(kept.size for kept in self.blocks))

    @cached_property
    def layers(self) -> list[int]:
        """Dense numbers of the decoder layers that keep at least one block, in order."""
        return self.anatomy.living_layers(self.structure)

    def kept(self, place: int) -> Kept:
        """Return what a block keeps of its axes."""
        return self.blocks[place].by_axis(self.anatomy[place].kind)

    @classmethod
    def from_structure(
        cls,
        structure: Structure,
        ranking: Ranking,
        anatomy: Anatomy,
        *,
        model: str,
        model_type: str,
        revision: str | None = None,
        fingerprint: str | None = None,
    ) -> PruningPlan:
        """Keep the most important units that a structure has room for.

        Args:
            structure: how much stays.
            ranking: the order of every dense block's units.
            anatomy: the dense model's blocks.
            model, model_type, revision, fingerprint: of the dense model, see :class:`PruningPlan`.

        Raises:
            ConfigError: when a block is larger than the dense one, or keeps fewer units than a token goes through.
        """
        if not structure.fits_in(anatomy.dense):
            raise ConfigError(f"the structure is larger than the dense model{_first_too_large(structure, anatomy)}")
        anatomy.check(structure)
        rows = enumerate(zip(anatomy, structure, strict=True))
        blocks = tuple(ranking.first(number, place.kind, size) for number, (place, size) in rows)
        return cls(model, revision, fingerprint, model_type, Anatomy(anatomy.places), blocks)

    def to_json(self) -> str:
        """Return JSON text, the same bytes for the same plan."""
        record = {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "base_model": {"name": self.model, "revision": self.revision,
                           "fingerprint": self.fingerprint, "model_type": self.model_type},
            "blocks": [_block_record(p, kept) for p, kept in zip(self.anatomy, self.blocks, strict=True)],
        }  # fmt: skip
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Return the inverse of :meth:`to_json`; plans of version 1 are read too.

        Raises:
            ConfigError: when the text is no plan, or one of a newer format.
        """
        try:
            return cls._from_record(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"not a pruning plan: {error!r}") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> PruningPlan:
        if record.get("format") != PLAN_FORMAT or record.get("version") not in (1, PLAN_VERSION):
            raise ConfigError(
                f"plan format {record.get('format')!r} version {record.get('version')!r} is not "
                f"{PLAN_FORMAT!r} version {PLAN_VERSION}: a newer multipruner may read it"
            )
        base = record["base_model"]
        if not isinstance(base["name"], str) or not isinstance(base["model_type"], str):
            raise ValueError("the names of the base model and its type are no texts")
        places, blocks = zip(*_blocks(earlier.plan(record) if record["version"] == 1 else record), strict=True)
        about = base["name"], base["revision"], base["fingerprint"], base["model_type"]
        return cls(*about, Anatomy(tuple(places)), tuple(blocks))


def _block_record(place: Place, kept: BlockUnits) -> dict[str, Any]:
    """Return a block of a plan's file: units as ranges, those within others one text for each of them."""
    names = BLOCK_KINDS[place.kind].names
    chosen = {
        name: list(map(ranges_of, cast(tuple[tuple[int, ...], ...], units)))
        if units and isinstance(units[0], tuple)
        else ranges_of(cast(tuple[int, ...], units))
        for name, units in zip(names, kept.axes, strict=False)
    }
    dense = counts_of(place.kind, place.dense)
    return {"layer": place.layer, "kind": place.kind, "dense": dense, "kept": chosen}


def _blocks(record: Mapping[str, Any]) -> Iterable[tuple[Place, BlockUnits]]:
    for row in record["blocks"]:
        if row["kind"] not in BLOCK_KINDS:
            raise ConfigError(f"the plan has a block of kind {row['kind']!r}: a newer multipruner may know it")
        names = BLOCK_KINDS[row["kind"]].names
        units: tuple[Units, ...] = tuple(_units(row["kept"][name]) for name in (names if row["kept"] else ()))
        place = Place(_number(row["layer"]), row["kind"], tuple(_number(row["dense"][name]) for name in names))
        yield place, BlockUnits(units)


def _units(value: Any) -> Any:
    """Return ranges or numbers, of an axis within another one a list of either."""
    if isinstance(value, str):
        return units_in(value)
    return tuple(unit if isinstance(unit, int) else _units(unit) for unit in value)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST:
        raise ValueError(f"{value!r} is no number of units or of a layer")
    return value


def _first_too_large(structure: Structure, anatomy: Anatomy) -> str:
    """Say where, such as ``: the MLP block of layer 3 would keep (50,) of (40,) MLP channels``; or both depths."""
    for place, size in zip(anatomy, structure, strict=False):
        if not Structure((size,)).fits_in(Structure((place.dense,))):
            units = ", ".join(axis.label for axis in BLOCK_KINDS[place.kind].axes)
            return f": {place.name} would keep {size} of {place.dense} {units}"
    return f", which has {len(anatomy)} blocks: it has {len(structure)}"


def _check_block(place: Place, kept: BlockUnits) -> None:
    if not kept.axes:
        return
    axes = BLOCK_KINDS[place.kind].axes
    if len(kept.axes) != len(axes):
        raise ConfigError(f"{place.name}: {len(kept.axes)} axes instead of {', '.join(a.name for a in axes)}")
    by_name = dict(zip(BLOCK_KINDS[place.kind].names, kept.axes, strict=True))
    for axis, units, limit in zip(axes, kept.axes, place.dense, strict=True):
        rows = units if axis.within else (units,)
        if axis.within and len(rows) != len(by_name[axis.within]):
            raise ConfigError(f"{place.name}: {axis.label} must be given for every unit that they are within")
        for row in cast(tuple[tuple[int, ...], ...], rows):
            if not isinstance(row, tuple) or not all(isinstance(index, int) for index in row):
                raise ConfigError(f"{place.name}: {axis.label} must be indices")
            if not row or any(a >= b for a, b in pairwise(row)) or not 0 <= row[0] <= row[-1] < limit:
                raise ConfigError(f"{place.name}: {axis.label} must be ascending indices below {limit}")
        if len({len(row) for row in cast(tuple[tuple[int, ...], ...], rows)}) != 1:
            raise ConfigError(f"{place.name}: every unit must keep the same number of {axis.label}")
