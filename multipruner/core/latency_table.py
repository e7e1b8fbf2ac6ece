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
from typing import Any, Literal, TypeAlias

from .errors import ConfigError, did_you_mean
from .identity import differences
from .structure import BlockKind, LayerSize, Structure

FORMAT = "multipruner-latency"
VERSION = 1
MOST = 2**31 - 1
"""Positions and sizes are 32-bit numbers in most of what runs models."""
Phase = Literal["prefill", "decode"]
Width: TypeAlias = int
"""What a block's time depends on: the KV heads of an attention block, the channels of an MLP block; 0 means none."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: one forward pass of the whole model.

    Attributes:
        phase: ``"prefill"`` of a whole prompt, or ``"decode"`` of one token behind a filled KV cache.
        batch: sequences.
        tokens: prefill: length of the prompt; decode: tokens in the cache.

    Raises:
        ConfigError: for another phase, or numbers that no model is run with.
    """

    phase: Phase
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise ConfigError(f"a workload is of phase 'prefill' or 'decode', not {self.phase!r}")
        if min(self.batch, self.tokens) < 1:
            raise ConfigError(f"a workload needs a batch and a number of tokens of at least 1: {self}")
        if max(self.batch, self.tokens) > MOST:
            raise ConfigError(f"a workload has at most {MOST:,} sequences and tokens: {self}")

    @property
    def name(self) -> str:
        """Such as ``prefill-b1-t512`` or ``decode-b1-t256``."""
        return f"{self.phase}-b{self.batch}-t{self.tokens}"


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a block's time depends on besides its own size. Tables serve every model that has the same.

    The number of layers is no part of it; ``vocab_size`` matters for the constant rest.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    queries_per_kv: int
    kv_heads: int
    channels: int
    vocab_size: int


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
        attention: by KV heads (query heads in the dense proportion), with 0 for a removed block.
        mlp: by channels, with 0 for a removed block.
        constant: the rest of a forward pass: embedding, final norm, head, calls.
        check: largest relative error of interpolation at the measured widths where it was checked.
    """

    workload: Workload
    attention: Mapping[Width, Entry]
    mlp: Mapping[Width, Entry]
    constant: Entry
    check: float = 0.0

    def entries(self, kind: BlockKind) -> Mapping[Width, Entry]:
        """The entries of one kind of block."""
        return self.attention if kind == "attention" else self.mlp


def interpolate(points: Mapping[Width, float], width: Width) -> float:
    """Piecewise linear between measured widths; below the least that is not 0, that one's value.

    A block of no width is another thing than a narrow one (nothing is launched), so 0 is only looked up.

    Raises:
        ConfigError: when the width is negative, beyond the widest measured one, or 0 and not measured.
    """
    if width in points:
        return points[width]
    widths = sorted(w for w in points if w > 0)
    if width <= 0 or not widths or width > widths[-1]:
        raise ConfigError(f"width {width} was not measured; measured: {', '.join(map(str, sorted(points))) or 'none'}")
    above = bisect_left(widths, width)
    if above == 0:
        return points[widths[0]]
    left, right = widths[above - 1], widths[above]
    low, high = points[left], points[right]
    value = low + (high - low) * (width - left) / (right - left)
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
    def workloads(self) -> tuple[str, ...]:
        """Names of the workloads, in the order of measurement."""
        return tuple(self.rows)

    def row(self, workload: str) -> WorkloadTable:
        """The entries of a workload.

        Raises:
            ConfigError: naming those that there are.
        """
        if workload not in self.rows:
            hint = did_you_mean(workload, self.rows)
            raise ConfigError(f"the table has no workload {workload!r}{hint}; it has {', '.join(self.rows) or 'none'}")
        return self.rows[workload]

    def block_milliseconds(self, kind: BlockKind, size: LayerSize, workload: str) -> float:
        """Milliseconds of one residual block (its norm and addition included) of a layer of this size.

        A removed block still costs the call of an empty module, as long as the layer's other block stays.

        Raises:
            ConfigError: for an unknown workload, a size beyond the table, or query heads in another proportion.
        """
        points = {width: entry.milliseconds for width, entry in self.row(workload).entries(kind).items()}
        if kind == "attention" and size.query_heads != size.kv_heads * self.shapes.queries_per_kv:
            raise ConfigError(
                f"the table knows whole KV groups of {self.shapes.queries_per_kv} query heads, not "
                f"{size.query_heads} query heads on {size.kv_heads} KV heads"
            )
        return interpolate(points, size.kv_heads if kind == "attention" else size.channels)

    def constant(self, workload: str) -> float:
        """Milliseconds that no structure changes."""
        return self.row(workload).constant.milliseconds

    def layer_milliseconds(self, size: LayerSize, workload: str) -> float:
        """Milliseconds of one decoder layer, 0 where neither block stays; raises as :meth:`block_milliseconds`."""
        if not (size.has_attention or size.has_mlp):
            return 0.0
        return sum(self.block_milliseconds(kind, size, workload) for kind in ("attention", "mlp"))

    def milliseconds(self, structure: Structure, workload: str) -> float:
        """Predicted milliseconds of one forward pass of the model; raises as :meth:`block_milliseconds` does."""
        return self.constant(workload) + sum(self.layer_milliseconds(size, workload) for size in structure)

    def check_shapes(self, shapes: Shapes) -> None:
        """Refuse a model that the table was not measured for.

        Raises:
            ConfigError: naming what differs.
        """
        found = differences(asdict(self.shapes), asdict(shapes))
        if found:
            raise ConfigError(f"the latency table is of another model ({'; '.join(found)}); measure this one")

    def warning(self, environment: Mapping[str, Any]) -> str | None:
        """One line that says how another machine or software differs from the table's; ``None`` when they agree."""
        found = differences(self.environment, environment)
        if not found:
            return None
        return f"the latency table was measured elsewhere ({'; '.join(found)}): its milliseconds may not hold here"

    def to_json(self) -> str:
        """JSON text, the same bytes for the same table."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "shapes": asdict(self.shapes),
            "environment": dict(self.environment),
            "date": self.date,
            "workloads": [_row_record(row) for row in self.rows.values()],
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: when the text is no table, or one of another version.
        """
        try:
            record = json.loads(text)
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise ConfigError(f"this is no latency table of version {VERSION}: measure anew")
            rows = [_row(entry) for entry in record["workloads"]]
            named = {row.workload.name: row for row in rows}
            return cls(Shapes(**record["shapes"]), record["environment"], record["date"], named)
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
    def listed(entries: Mapping[Width, Entry]) -> list[dict[str, Any]]:
        return [{"width": width, **asdict(entries[width])} for width in sorted(entries)]

    return {
        **asdict(row.workload),
        "constant": asdict(row.constant),
        "interpolation_error": row.check,
        "attention": listed(row.attention),
        "mlp": listed(row.mlp),
    }


def _row(record: dict[str, Any]) -> WorkloadTable:
    def entries(rows: list[dict[str, Any]]) -> dict[Width, Entry]:
        return {row["width"]: _entry(row) for row in rows}

    return WorkloadTable(
        workload=Workload(record["phase"], record["batch"], record["tokens"]),
        attention=entries(record["attention"]),
        mlp=entries(record["mlp"]),
        constant=_entry(record["constant"]),
        check=record["interpolation_error"],
    )


def _entry(row: Mapping[str, Any]) -> Entry:
    """A measurement as it is stored; one that is no time would make every budget hold, or none."""
    entry = Entry(row["milliseconds"], row["spread"], row["samples"])
    if not (isfinite(entry.milliseconds) and isfinite(entry.spread)):
        raise ValueError(f"{entry.milliseconds} milliseconds, spread {entry.spread}")
    return entry
