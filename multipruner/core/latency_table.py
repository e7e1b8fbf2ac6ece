"""Milliseconds of a structure: look-up tables of measured blocks, and their arithmetic. No torch.

The idea of one table per machine and of summing its entries is MDP's (arXiv 2504.02168), as is that of measuring every
block at several widths of the residual stream; :mod:`multipruner.latency.bench` fills it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import earlier
from .axes import BLOCK_KINDS, STREAM
from .errors import ConfigError, did_you_mean
from .identity import differences
from .latency.entries import Entry, Phase, Workload, WorkloadTable
from .latency.interpolation import interpolate
from .structure import Anatomy, Size, Structure

__all__ = ["Entry", "LatencyTable", "Phase", "Shapes", "Workload", "WorkloadTable", "interpolate"]

FORMAT = "multipruner-latency"
VERSION = 2
USUAL = "transformers"
"""What ran the model, where an environment names nothing else as its ``runtime``."""
HIDDEN = STREAM.axes[0].name
"""What shapes call the width of the residual stream."""
Shapes = Mapping[str, Any]
"""What a block's time depends on besides its own size: the family, the logits of the head, the dense count of every
axis and the constants of layouts, by their names. Tables serve all models that have the same, of any depth."""
Rows = Mapping[str, WorkloadTable]
"""By the workload's name."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of every block option of a model on one machine, for several workloads and perhaps several
    widths of the residual stream.

    Attributes:
        shapes: of the model.
        environment: machine and software that the times are of: device, threads, versions, dtype, attention.
        date: when it was measured, ISO 8601, UTC.
        rows: at the model's own hidden size.
        narrower: by hidden size, the same of narrower residual streams: blocks of every size, and the rest of a pass.
    """

    shapes: Shapes
    environment: Mapping[str, Any]
    date: str
    rows: Rows
    narrower: Mapping[int, Rows] = field(default_factory=dict)

    @property
    def runtime(self) -> str:
        """What ran the model."""
        return str(self.environment.get("runtime", USUAL))

    @property
    def workloads(self) -> tuple[str, ...]:
        """Names of the workloads, in the order of measurement."""
        return tuple(self.rows)

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Widths of the residual stream that were measured, the model's own first and ever narrower ones after it."""
        return (self.shapes[HIDDEN], *sorted(self.narrower, reverse=True))

    def row(self, workload: str, hidden: int | None = None) -> WorkloadTable:
        """Return the entries of a workload, at the model's own hidden size or another one.

        Raises:
            ConfigError: naming those that there are.
        """
        rows = self._rows(hidden)
        if workload not in rows:
            hint = did_you_mean(workload, rows)
            raise ConfigError(f"the table has no workload {workload!r}{hint}; it has {', '.join(rows) or 'none'}")
        return rows[workload]

    def _rows(self, hidden: int | None) -> Rows:
        if hidden is None or hidden == self.shapes.get(HIDDEN):
            return self.rows
        if hidden not in self.narrower:
            raise ConfigError(
                f"the latency table has no hidden size {hidden}; it has {', '.join(map(str, self.hidden_sizes))} "
                "(multipruner latency --hidden-sizes measures others)"
            )
        return self.narrower[hidden]

    def block_milliseconds(self, kind: str, size: Size, workload: str, hidden: int | None = None) -> float:
        """Return milliseconds of one residual block (its norm and addition included) of some size, at the model's own
        hidden size or another one.

        A removed block still costs the call of an empty module, as long as another block of its layer stays.

        Raises:
            ConfigError: for an unknown workload or hidden size, or a size beyond the table.
        """
        points = self.row(workload, hidden).milliseconds(kind)
        try:
            return interpolate(points, size)
        except ConfigError as error:
            at = "" if hidden is None or hidden == self.shapes.get(HIDDEN) else f", hidden size {hidden}"
            raise ConfigError(f"the latency table, {workload}{at}, {BLOCK_KINDS[kind].label}: {error}") from None

    def constant(self, workload: str, hidden: int | None = None) -> float:
        """Return milliseconds that no structure of a hidden size changes: embeddings, last norm, head, calls."""
        return self.row(workload, hidden).constant.milliseconds

    def milliseconds(self, structure: Structure, anatomy: Anatomy, workload: str) -> float:
        """Return predicted milliseconds of one forward pass, at the structure's hidden size: nothing for layers that
        are gone altogether.

        Raises:
            ConfigError: as :meth:`block_milliseconds` does.
        """
        living = set(anatomy.living_layers(structure))
        blocks = (
            self.block_milliseconds(place.kind, size, workload, structure.hidden)
            for place, size in zip(anatomy, structure, strict=True)
            if place.layer in living
        )
        return self.constant(workload, structure.hidden) + sum(blocks)

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
        """Return JSON text, the same bytes for the same table.

        Narrower residual streams stand behind the rest: whatever knows none reads the model's own as before.
        """
        narrower = sorted(self.narrower.items(), reverse=True)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "shapes": dict(self.shapes),
            "environment": dict(self.environment),
            "date": self.date,
            "workloads": _listed(self.rows),
            **({"narrower": [{HIDDEN: n, "workloads": _listed(rows)} for n, rows in narrower]} if narrower else {}),
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
            shapes, rows = dict(record["shapes"]), _named(record["workloads"])
            narrower = {each[HIDDEN]: _named(each["workloads"]) for each in record.get("narrower", ())}
            if len(narrower) < len(record.get("narrower", ())):
                raise ValueError("a hidden size stands there twice")
            for hidden, others in narrower.items():
                _check_narrower(hidden, others, shapes, rows)
            return cls(shapes, dict(record["environment"]), record["date"], rows, narrower)
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


def _listed(rows: Rows) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows.values()]


def _named(records: Any) -> dict[str, WorkloadTable]:
    rows = map(WorkloadTable.from_json, records)
    return {row.workload.name: row for row in rows}


def _check_narrower(hidden: Any, others: Rows, shapes: Shapes, rows: Rows) -> None:
    """Refuse a hidden size that no narrower stream of the model has, or of which other workloads were measured."""
    if not isinstance(hidden, int) or isinstance(hidden, bool) or not 1 <= hidden < shapes[HIDDEN]:
        raise ValueError(f"a residual stream of {hidden!r} is not narrower than the model's {shapes[HIDDEN]}")
    if set(others) != set(rows):
        raise ValueError(f"hidden size {hidden} has the workloads {', '.join(others)}, not {', '.join(rows)}")
