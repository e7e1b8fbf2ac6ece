"""Which parts of a model stay: plain values, no torch.

A :class:`~multipruner.core.ranking.Ranking` turns a ``Structure`` into a ``PruningPlan``, which alone is enough to cut
the dense model again, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from . import earlier
from .axes import AXES, BLOCK_KINDS, LARGEST, STREAM, Kept, ranges_of, units_in
from .errors import ConfigError
from .ranking import BlockUnits, Ranking, Units, check_units
from .structure import Anatomy, Place, Structure, counts_of

__all__ = ["BlockUnits", "PruningPlan", "Ranking", "Units"]

PLAN_FORMAT = "multipruner-plan"
PLAN_VERSION = 4
_VERSIONS = {"plain": 2, "stream": 3}
"""Those of plans whose sizes name what every size does, with the residual stream alone or not: what reads no other
still reads these."""


@dataclass(frozen=True)
class PruningPlan:
    """Which units of which dense model stay; with the dense weights that is the pruned model.

    Attributes:
        model: what the dense model was loaded from (Hub id or source name).
        revision: its revision, or ``None``.
        fingerprint: SHA-256 of the dense weights, or ``None`` when unknown.
        model_type: ``config.model_type`` of the dense model.
        anatomy: the dense model's blocks; of constants only the width of the residual stream is part of a plan, and
            only where the stream becomes narrower.
        blocks: what stays of each of them, ascending.
        stream: the dimensions of the residual stream that stay, ascending; ``None``: all of them.
        bases: the axes whose units are not those of the dense weights, but of bases that a run worked out of its text:
            such a plan cuts the dense model with that run's moments alone.

    Raises:
        ConfigError: when indices are unsorted or out of range, or units keep unequal numbers of those within them.
    """

    model: str
    revision: str | None
    fingerprint: str | None
    model_type: str
    anatomy: Anatomy
    blocks: tuple[BlockUnits, ...]
    stream: tuple[int, ...] | None = None
    bases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.stream is not None:
            check_units(STREAM.label, STREAM.axes[0], self.stream, self.hidden)
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
        hidden = None if self.stream is None else len(self.stream)
        return Structure(tuple(kept.size for kept in self.blocks), hidden)

    @property
    def along(self) -> tuple[str, ...]:
        """The axes that its sizes name besides those that every size does."""
        axes = (axis for kind in self.anatomy.kinds for axis in self.anatomy.axes(kind))
        return tuple(axis.name for axis in axes if axis.unsaid)

    @property
    def hidden(self) -> int:
        """How many dimensions the dense model's residual stream has; 0 where the plan does not say."""
        return self.anatomy.constants.get(STREAM.axes[0].name, 0)

    @cached_property
    def layers(self) -> list[int]:
        """Dense numbers of the decoder layers that keep at least one block, in order."""
        return self.anatomy.living_layers(self.structure)

    def kept(self, place: int) -> Kept:
        """Return what a block keeps of its axes."""
        return self.blocks[place].by_axis(self.anatomy[place].kind)

    @property
    def kept_of_stream(self) -> Kept:
        """Return what the residual stream keeps of its axis; nothing is named where that is all."""
        return {} if self.stream is None else {STREAM.axes[0].name: self.stream}

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
        bases: tuple[str, ...] = (),
    ) -> PruningPlan:
        """Keep the most important units that a structure has room for.

        Args:
            structure: how much stays.
            ranking: the order of every dense block's units, and of the residual stream's dimensions.
            anatomy: the dense model's blocks, with the width of its residual stream where that becomes narrower.
            model, model_type, revision, fingerprint, bases: of the dense model, see :class:`PruningPlan`.

        Raises:
            ConfigError: when a block, or the residual stream, is larger than the dense one, or a block keeps fewer
                units than a token goes through.
        """
        if not structure.fits_in(anatomy.dense):
            raise ConfigError(f"the structure is larger than the dense model{_first_too_large(structure, anatomy)}")
        anatomy.check(structure)
        rows = enumerate(zip(anatomy, structure, strict=True))
        blocks = tuple(ranking.first(number, place.kind, size) for number, (place, size) in rows)
        axis, narrower = STREAM.axes[0].name, structure.hidden not in (None, anatomy.constants.get("hidden"))
        kept = sorted((ranking.stream or range(structure.hidden or 0))[: structure.hidden]) if narrower else None
        constants = {axis: anatomy.constants[axis]} if narrower else {}
        stream = None if kept is None else tuple(kept)
        return cls(model, revision, fingerprint, model_type, Anatomy(anatomy.places, constants), blocks, stream, bases)

    @property
    def turned(self) -> str:
        """The labels of the axes whose units are not those of the dense weights; empty where all are."""
        stream = {axis.name: axis for axis in STREAM.axes}
        return " and ".join({**AXES, **stream}[name].label for name in self.bases)

    @property
    def _version(self) -> int:
        if self.along or self.bases:
            return PLAN_VERSION
        return _VERSIONS["plain" if self.stream is None else "stream"]

    def to_json(self) -> str:
        """Return JSON text, the same bytes for the same plan."""
        record = {
            "format": PLAN_FORMAT,
            "version": self._version,
            "base_model": {"name": self.model, "revision": self.revision,
                           "fingerprint": self.fingerprint, "model_type": self.model_type},
            **({} if self.stream is None else {STREAM.name: _stream_record(self.hidden, self.stream)}),
            **({"bases": list(self.bases)} if self.bases else {}),
            "blocks": [_block_record(p, kept) for p, kept in zip(self.anatomy, self.blocks, strict=True)],
        }  # fmt: skip
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Return the inverse of :meth:`to_json`; plans of versions 1 and 2 are read too.

        Raises:
            ConfigError: when the text is no plan, or one of a newer format.
        """
        try:
            return cls._from_record(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"not a pruning plan: {error!r}") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> PruningPlan:
        if record.get("format") != PLAN_FORMAT or record.get("version") not in (1, *_VERSIONS.values(), PLAN_VERSION):
            raise ConfigError(
                f"plan format {record.get('format')!r} version {record.get('version')!r} is not "
                f"{PLAN_FORMAT!r} version {PLAN_VERSION}: a newer multipruner may read it"
            )
        base = record["base_model"]
        if not isinstance(base["name"], str) or not isinstance(base["model_type"], str):
            raise ValueError("the names of the base model and its type are no texts")
        places, blocks = zip(*_blocks(earlier.plan(record) if record["version"] == 1 else record), strict=True)
        about = base["name"], base["revision"], base["fingerprint"], base["model_type"]
        width, stream = _stream(record)
        return cls(*about, Anatomy(tuple(places), width), tuple(blocks), stream, tuple(record.get("bases", ())))


def _stream_record(dense: int, kept: tuple[int, ...]) -> dict[str, Any]:
    axis = STREAM.axes[0].name
    return {"dense": {axis: dense}, "kept": {axis: ranges_of(kept)}}


def _stream(record: Mapping[str, Any]) -> tuple[dict[str, int], tuple[int, ...] | None]:
    """Return the dense width of the residual stream by its axis, and what stays of it, where a plan says so."""
    if STREAM.name not in record:
        return {}, None
    row, axis = record[STREAM.name], STREAM.axes[0].name
    return {axis: _number(row["dense"][axis])}, _units(row["kept"][axis])


def _block_record(place: Place, kept: BlockUnits) -> dict[str, Any]:
    """Return a block of a plan's file: units as ranges, those within others one text for each of them."""
    names = [axis.name for axis in place.axes]
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
        kind = BLOCK_KINDS[row["kind"]]
        names = [axis.name for axis in kind.axes if not axis.unsaid or axis.name in row["dense"]]
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
            units = ", ".join(axis.label for axis in place.axes)
            return f": {place.name} would keep {size} of {place.dense} {units}"
    return f", which has {len(anatomy)} blocks: it has {len(structure)}"


def _check_block(place: Place, kept: BlockUnits) -> None:
    if not kept.axes:
        return
    axes = place.axes
    if len(kept.axes) != len(axes):
        raise ConfigError(f"{place.name}: {len(kept.axes)} axes instead of {', '.join(a.name for a in axes)}")
    by_name = dict(zip((axis.name for axis in axes), kept.axes, strict=True))
    for axis, units, limit in zip(axes, kept.axes, place.dense, strict=True):
        rows = units if axis.within else (units,)
        if axis.within and len(rows) != len(by_name[axis.within]):
            raise ConfigError(f"{place.name}: {axis.label} must be given for every unit that they are within")
        for row in cast(tuple[tuple[int, ...], ...], rows):
            check_units(place.name, axis, row, limit)
        if len({len(row) for row in cast(tuple[tuple[int, ...], ...], rows)}) != 1:
            raise ConfigError(f"{place.name}: every unit must keep the same number of {axis.label}")
