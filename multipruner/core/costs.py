"""What a structure costs: parameters, bytes, FLOPs, milliseconds. Arithmetic; the coefficients are read off the model.

Whatever can be bounded is a row of :data:`COSTS`: recipes, flags, limits, reports, sweeps, figures and pages read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .errors import ConfigError, did_you_mean
from .latency_table import LatencyTable
from .structure import BlockKind, LayerSize, Structure


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Parameters of one decoder layer, linear in its size. Norms belong to the block they feed.

    ``matrix_*`` counts only what is multiplied per token (no norms, no biases), for FLOPs.
    """

    attention_fixed: int
    per_query_head: int
    per_kv_head: int
    mlp_fixed: int
    per_channel: int
    matrix_per_query_head: int
    matrix_per_kv_head: int
    matrix_per_channel: int

    def parameters(self, size: LayerSize) -> int:
        """Parameters of a layer of this size."""
        total = 0
        if size.has_attention:
            total += self.attention_fixed
            total += size.query_heads * self.per_query_head + size.kv_heads * self.per_kv_head
        if size.has_mlp:
            total += self.mlp_fixed + size.channels * self.per_channel
        return total

    def macs_per_token(self, size: LayerSize) -> int:
        """Multiply-accumulates of the projections for one token."""
        return (
            size.query_heads * self.matrix_per_query_head
            + size.kv_heads * self.matrix_per_kv_head
            + size.channels * self.matrix_per_channel
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """Structure -> numbers.

    Attributes:
        dense: the dense structure, what every ratio refers to.
        layer: the cost of one decoder layer (alike in all layers of the supported families).
        constant: parameters outside the decoder layers (embeddings counted once when tied).
        head_dim: width of one attention head.
        head_macs: multiply-accumulates of the output projection for one token.
        bytes_per_parameter: of the checkpoint's dtype.
    """

    dense: Structure
    layer: LayerCost
    constant: int
    head_dim: int
    head_macs: int
    bytes_per_parameter: int

    def backbone_parameters(self, structure: Structure) -> int:
        """Parameters of the decoder layers alone."""
        return sum(self.layer.parameters(size) for size in structure)

    def parameters(self, structure: Structure) -> int:
        """All parameters, tied embeddings counted once."""
        return self.constant + self.backbone_parameters(structure)

    def ratio(self, structure: Structure) -> float:
        """Removed parameters / all parameters of the dense model (the paper's pruning ratio)."""
        return 1.0 - self.parameters(structure) / self.parameters(self.dense)

    def backbone_ratio(self, structure: Structure) -> float:
        """Removed parameters / parameters of the dense decoder layers."""
        return 1.0 - self.backbone_parameters(structure) / self.backbone_parameters(self.dense)

    def weight_bytes(self, structure: Structure) -> int:
        """Size of the weights in the checkpoint's dtype."""
        return self.parameters(structure) * self.bytes_per_parameter

    def kv_bytes_per_token(self, structure: Structure) -> int:
        """KV-cache bytes that one token of context takes."""
        return sum(2 * size.kv_heads * self.head_dim for size in structure) * self.bytes_per_parameter

    def flops_per_token(self, structure: Structure, context: int = 0) -> int:
        """Floating-point operations for one token; a multiply-accumulate counts as two.

        Args:
            structure: of the model.
            context: tokens that attention scores are computed against; projections and output head always count.
        """
        macs = self.head_macs + sum(self.layer.macs_per_token(size) for size in structure)
        macs += sum(2 * context * size.query_heads * self.head_dim for size in structure)
        return 2 * macs


@dataclass(frozen=True, slots=True)
class Measures:
    """What the rows of :data:`COSTS` read.

    Attributes:
        costs: of the model.
        table: measured milliseconds of its blocks, where there are some.
        workload: of the table.
    """

    costs: Costs
    table: LatencyTable | None = None
    workload: str = ""

    @property
    def timed(self) -> LatencyTable:
        """The table.

        Raises:
            ConfigError: when there is none.
        """
        if self.table is None:
            raise ConfigError("latency needs --latency-table FILE (multipruner latency makes one)")
        return self.table

    def of_all(self, structure: Structure) -> dict[str, float]:
        """Every cost of a structure by its name; latency only where there is a table."""
        known = (cost for cost in COSTS.values() if self.table is not None or not cost.needs_table)
        return {cost.name: cost.of(self, structure) for cost in known}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A kind of budget: one row of :data:`COSTS`, and nothing else anywhere.

    Attributes:
        name: key in recipes, limits, sweeps, fronts and figures' data.
        word: what the command line calls it: ``params`` makes ``--max-params`` and ``--sweep params=``.
        label: what people call it.
        help: of the flag; ``metavar``: what the flag takes.
        unit: of a number: ``"count"``, ``"bytes"`` or ``"ms"``.
        typed: what an amount may be typed with, and what that multiplies.
        axis: what figures divide by, and what they call the quotient.
        of: (measures, structure) -> amount.
        block: (measures, kind, that block alone) -> amount of one residual block, where that is no difference of whole
            structures; ``rest``: what is left without any block then.
        reported: key among the costs of ``report.json``, understood in fronts too; empty: the name.
        needs_table: whether it is read from a latency table.
        everyday: whether the short help shows its flag.
    """

    name: str
    word: str
    label: str
    help: str
    metavar: str
    unit: str
    typed: Mapping[str, float] = field(hash=False)
    axis: tuple[float, str]
    of: Callable[[Measures, Structure], float]
    block: Callable[[Measures, BlockKind, LayerSize], float] | None = None
    rest: Callable[[Measures], float] | None = None
    reported: str = ""
    needs_table: bool = False
    everyday: bool = False

    @property
    def flag(self) -> str:
        """Such as ``--max-params``."""
        return f"--max-{self.word}"

    @property
    def key(self) -> str:
        """What ``report.json`` calls it."""
        return self.reported or self.name

    @property
    def axis_label(self) -> str:
        """Such as ``parameters (millions)``."""
        return f"{self.label} ({self.axis[1]})"

    def shown(self, value: float) -> str:
        """An amount with a unit that keeps the number short."""
        if self.unit == "bytes":
            return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
        if self.unit == "count":
            return _scaled(value, 1000, ("", "k", "M", "G", "T"))
        return f"{value:,.4g}\N{NO-BREAK SPACE}{self.unit}"

    def change(self, before: float, after: float) -> str:
        """Such as ``22.5 -> 19.0 KiB``, in the unit of figures."""
        divisor, unit = self.axis
        digits = 0 if before >= 100 * divisor else 1
        return f"{before / divisor:,.{digits}f} -> {after / divisor:,.{digits}f} {unit}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(value, base)) if value >= 1 else 0, len(units) - 1)
    return f"{value / base**power:,.{0 if power == 0 else 1}f}\N{NO-BREAK SPACE}{units[power]}".rstrip()


_BINARY = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_ROWS = (
    Cost(
        name="parameters", word="params", label="parameters", help="parameters", metavar="N", unit="count",
        typed={"": 1, "k": 1e3, "M": 1e6, "B": 1e9}, axis=(1e6, "millions"),
        of=lambda measures, structure: measures.costs.parameters(structure),
    ),
    Cost(
        name="weight_bytes", word="memory", label="weights", help="bytes of the weights", metavar="BYTES", unit="bytes",
        typed=_BINARY, axis=(2.0**20, "MiB"), everyday=True,
        of=lambda measures, structure: measures.costs.weight_bytes(structure),
    ),
    Cost(
        name="kv_bytes", word="kv-bytes", label="KV cache per token", help="bytes of the KV cache per token",
        metavar="BYTES", unit="bytes", typed=_BINARY, axis=(2.0**10, "KiB"), reported="kv_bytes_per_token",
        of=lambda measures, structure: measures.costs.kv_bytes_per_token(structure),
    ),
    Cost(
        name="flops", word="flops", label="operations per token", help="operations per token, without attention scores",
        metavar="N", unit="count", typed={"": 1, "M": 1e6, "G": 1e9}, axis=(1e6, "millions"),
        reported="flops_per_token", of=lambda measures, structure: measures.costs.flops_per_token(structure),
    ),
    Cost(
        name="latency", word="latency", label="latency", help="milliseconds of one forward pass; needs a latency table",
        metavar="MS", unit="ms", typed={"": 1, "ms": 1, "s": 1e3}, axis=(1.0, "ms"), needs_table=True,
        reported="latency_ms", everyday=True,
        of=lambda measures, structure: measures.timed.milliseconds(structure, measures.workload),
        # a removed block costs a little while its layer lives; the sum over blocks counts it always
        block=lambda measures, kind, size: measures.timed.block_milliseconds(kind, size, measures.workload),
        rest=lambda measures: measures.timed.constant(measures.workload),
    ),
)  # fmt: skip
COSTS: dict[str, Cost] = {row.name: row for row in _ROWS}
"""Every kind of budget by its name; a new kind is a row here."""


def cost_named(name: str) -> Cost:
    """The row of a name.

    Raises:
        ConfigError: naming those that there are.
    """
    if name not in COSTS:
        raise ConfigError(f"no budget {name!r}{did_you_mean(name, COSTS)}; there are {', '.join(COSTS)}")
    return COSTS[name]


def reported_as(key: str) -> Cost | None:
    """The row of a key of ``report.json``, or of a name; ``None`` where there is none (any more)."""
    return next((cost for cost in COSTS.values() if key in (cost.key, cost.name)), None)


def timed_first() -> list[Cost]:
    """The rows, what is read from a latency table before what is counted: the order in which figures choose one."""
    return sorted(COSTS.values(), key=lambda cost: not cost.needs_table)
