"""Milliseconds of a structure: look-up tables of measured blocks, and their arithmetic. No torch.

The idea of one table per machine and of summing its entries is MDP's (arXiv 2504.02168); ``measure.py`` fills it.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from . import earlier
from .errors import ConfigError, did_you_mean
from .identity import differences
from .structure import Anatomy, Size, Structure

FORMAT = "multipruner-latency"
VERSION = 2
USUAL = "transformers"
"""What ran the model, where an environment names nothing else as its ``runtime``."""
MOST = 2**31 - 1
"""Positions and sizes are 32-bit numbers in most of what runs models."""
Phase = Literal["prefill", "decode", "pictures"]
PHASES = {"prefill": "t", "decode": "t", "pictures": "p"}  # of tokens or pixels, in a workload's name
Shapes = Mapping[str, Any]
"""What a block's time depends on besides its own size: the family, the logits of the head, the dense count of every
axis and the constants of layouts, by their names. Tables serve all models that have the same, of any depth."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: one forward pass of the whole model.

    Attributes:
        phase: ``"prefill"`` of a prompt, ``"decode"`` of one token behind a filled KV cache, ``"pictures"`` classified.
        batch: sequences, or pictures.
        tokens: prefill: length of the prompt; decode: tokens in the cache; pictures: pixels of a side.

    Raises:
        ConfigError: for another phase, or numbers that no model is run with.
    """

    phase: Phase
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"a workload is of phase {', '.join(map(repr, PHASES))}, not {self.phase!r}")
        if min(self.batch, self.tokens) < 1:
            raise ConfigError(f"a workload needs a batch and a number of tokens or pixels of at least 1: {self}")
        if max(self.batch, self.tokens) > MOST:
            raise ConfigError(f"a workload has at most {MOST:,} sequences, tokens or pixels: {self}")

    @property
    def name(self) -> str:
        """Such as ``prefill-b1-t512``, ``decode-b1-t256`` or ``pictures-b8-p224``."""
        return f"{self.phase}-b{self.batch}-{PHASES[self.phase]}{self.tokens}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured time.

    Attributes:
        milliseconds: per forward pass.
        spread: interquartile range of the samples, relative to their median.
        samples: how many there were.
    """

    milliseconds: float
    spread: float
    samples: int


@dataclass(frozen=True)
class WorkloadTable:
    """The entries of one workload.

    Attributes:
        workload: what was timed.
        blocks: by the kind of a block, its entries by size; the empty size is a removed block.
        constant: the rest of a forward pass: embedding, final norm, head, calls.
        check: largest relative error of interpolation at the measured sizes where it was checked.
    """

    workload: Workload
    blocks: Mapping[str, Mapping[Size, Entry]]
    constant: Entry
    check: float = 0.0

    def milliseconds(self, kind: str) -> dict[Size, float]:
        """Return the times of one kind of block by size; none where the table has none."""
        return {size: entry.milliseconds for size, entry in self.blocks.get(kind, {}).items()}


def interpolate(points: Mapping[Size, float], size: Size) -> float:
    """Return piecewise linear between measured sizes, axis by axis; below the least of an axis, that one's value.

    A block that is gone is another thing than a small one (nothing is launched), so that is only looked up.

    Args:
        points: times; of the sizes that are not empty, all combinations of what was measured of every axis.
        size: any.

    Raises:
        ConfigError: when the size is beyond the largest measured one, or gone and not measured.
    """
    if size in points:
        return points[size]
    there = [point for point in points if point]
    if not size or not there or any(count > max(p[axis] for p in there) for axis, count in enumerate(size)):
        known = ", ".join(map(_shown, sorted(points))) or "none"
        raise ConfigError(f"size {_shown(size)} was not measured; measured: {known}")
    return _between({point: points[point] for point in there}, (), size)


def _shown(size: Size) -> str:
    return " x ".join(map(str, size)) or "gone"


def _between(points: Mapping[Size, float], before: Size, size: Size) -> float:
    """Interpolate along one axis, what comes before it being fixed, and in the same way along the others."""
    axis = len(before)
    if axis == len(size):
        return points[before]
    measured = sorted({point[axis] for point in points if point[:axis] == before})
    above = bisect_left(measured, size[axis])
    right = measured[min(above, len(measured) - 1)]
    if above == 0 or right == size[axis]:
        return _between(points, (*before, right), size)
    left = measured[above - 1]
    low, high = (_between(points, (*before, count), size) for count in (left, right))
    value = low + (high - low) * (size[axis] - left) / (right - left)
    return min(max(value, min(low, high)), max(low, high))  # rounding must not leave the interval


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of every block option of a model on one machine, for several workloads.

    Attributes:
        shapes: of the model.
        environment: machine and software that the times are of: device, threads, versions, dtype, attention.
        date: when it was measured, ISO 8601, UTC.
        rows: by the workload's name.
    """

    shapes: Shapes
    environment: Mapping[str, Any]
    date: str
    rows: Mapping[str, WorkloadTable]

    @property
    def runtime(self) -> str:
        """What ran the model."""
        return str(self.environment.get("runtime", USUAL))

    @property
    def workloads(self) -> tuple[str, ...]:
        """Names of the workloads, in the order of measurement."""
        return tuple(self.rows)

    def row(self, workload: str) -> WorkloadTable:
        """Return the entries of a workload.

        Raises:
            ConfigError: naming those that there are.
        """
        if workload not in self.rows:
            hint = did_you_mean(workload, self.rows)
            raise ConfigError(f"the table has no workload {workload!r}{hint}; it has {', '.join(self.rows) or 'none'}")
        return self.rows[workload]

    def block_milliseconds(self, kind: str, size: Size, workload: str) -> float:
        """Return milliseconds of one residual block (its norm and addition included) of some size.

        A removed block still costs the call of an empty module, as long as another block of its layer stays.

        Raises:
            ConfigError: for an unknown workload, or a size beyond the table.
        """
        return interpolate(self.row(workload).milliseconds(kind), size)

    def constant(self, workload: str) -> float:
        """Return milliseconds that no structure changes."""
        return self.row(workload).constant.milliseconds

    def milliseconds(self, structure: Structure, anatomy: Anatomy, workload: str) -> float:
        """Return predicted milliseconds of one forward pass: nothing for layers that are gone altogether.

        Raises:
            ConfigError: as :meth:`block_milliseconds` does.
        """
        living = set(anatomy.living_layers(structure))
        blocks = (
            self.block_milliseconds(place.kind, size, workload)
            for place, size in zip(anatomy, structure, strict=True)
            if place.layer in living
        )
        return self.constant(workload) + sum(blocks)

    def check_shapes(self, shapes: Shapes) -> None:
        """Refuse a model that the table was not measured for.

        Raises:
            ConfigError: naming what differs.
        """
        found = differences(self.shapes, shapes)
        if found:
            raise ConfigError(f"the latency table is of another model ({'; '.join(found)}); measure this one")

    def warning(self, environment: Mapping[str, Any]) -> str | None:
        """Return a line that says how another machine or software differs from the table's; ``None`` for the same."""
        found = differences(self.environment, environment)
        line = f"the latency table was measured elsewhere ({'; '.join(found)}): its milliseconds may not hold here"
        return line if found else None

    def to_json(self) -> str:
        """Return JSON text, the same bytes for the same table."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "shapes": dict(self.shapes),
            "environment": dict(self.environment),
            "date": self.date,
            "workloads": [_row_record(row) for row in self.rows.values()],
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Return the inverse of :meth:`to_json`; tables of version 1 are read too.

        Raises:
            ConfigError: when the text is no table, or one of a newer version.
        """
        try:
            record = json.loads(text)
            if record["format"] != FORMAT or record["version"] not in (1, VERSION):
                raise ConfigError(f"this is no latency table of version {VERSION}: measure anew")
            record = earlier.latency_table(record) if record["version"] == 1 else record
            rows = [_row(entry, _blocks(entry)) for entry in record["workloads"]]
            named = {row.workload.name: row for row in rows}
            return cls(dict(record["shapes"]), dict(record["environment"]), record["date"], named)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a latency table: {error!r}") from error

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Read a table's file.

        Raises:
            ConfigError: when it cannot be read, or is something else.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"cannot read the latency table {path}: {reason}") from error


def _row_record(row: WorkloadTable) -> dict[str, Any]:
    def listed(entries: Mapping[Size, Entry]) -> list[dict[str, Any]]:
        return [{"size": list(size), **asdict(entries[size])} for size in sorted(entries)]

    return {
        **asdict(row.workload),
        "constant": asdict(row.constant),
        "interpolation_error": row.check,
        "blocks": {kind: listed(entries) for kind, entries in row.blocks.items()},
    }


_Blocks = dict[str, dict[Size, Entry]]


def _blocks(record: Mapping[str, Any]) -> _Blocks:
    return {kind: {tuple(row["size"]): _entry(row) for row in rows} for kind, rows in record["blocks"].items()}


def _row(record: Mapping[str, Any], blocks: _Blocks) -> WorkloadTable:
    return WorkloadTable(
        workload=Workload(record["phase"], record["batch"], record["tokens"]),
        blocks=blocks,
        constant=_entry(record["constant"]),
        check=record["interpolation_error"],
    )


def _entry(row: Mapping[str, Any]) -> Entry:
    """Return a measurement as it is stored; one that is no time would make every budget hold, or none."""
    entry = Entry(row["milliseconds"], row["spread"], row["samples"])
    if not (isfinite(entry.milliseconds) and isfinite(entry.spread)):
        raise ValueError(f"{entry.milliseconds} milliseconds, spread {entry.spread}")
    return entry
