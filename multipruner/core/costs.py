"""What a structure costs: parameters, bytes, FLOPs, milliseconds. Arithmetic; the coefficients are read off the model.

Whatever can be bounded is a row of :data:`COSTS`: recipes, flags, limits, reports, sweeps, figures and pages read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from .axes import STREAM
from .blocks import Amounts, BlockCost
from .errors import ConfigError, did_you_mean
from .latency_table import LatencyTable
from .structure import Anatomy, Size, Structure

__all__ = ["COSTS", "BlockCost", "Cost", "Costs", "Measures", "cost_named", "reported_as", "timed_first"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Structure -> numbers.

    Attributes:
        anatomy: the dense model's blocks.
        blocks: the cost of each of them.
        constant: parameters outside the decoder layers (embeddings counted once when tied).
        head_macs: multiply-accumulates of the output projection for one token.
        bytes_per_parameter: of the checkpoint's dtype.
        shared: parameters that several blocks of a layer share, such as one norm for both, and stay as long as one of
            these does: layer -> how many.
        stream: how many of ``constant`` there are for every dimension of the residual stream.
        whole: costs of the model with the whole residual stream, where this is one with a narrower stream."""

    anatomy: Anatomy
    blocks: tuple[BlockCost, ...]
    constant: int
    head_macs: int
    bytes_per_parameter: int
    shared: Mapping[int, int] = field(default_factory=dict, hash=False)
    stream: int = 0
    whole: Costs | None = None

    @property
    def dense(self) -> Structure:
        """The dense structure of this anatomy."""
        return self.anatomy.dense

    @property
    def original(self) -> Costs:
        """The costs of the dense model, which every ratio refers to: these, unless the residual stream is narrower."""
        return self.whole or self

    @property
    def hidden(self) -> int | None:
        """The width of the residual stream where it is narrower than the dense model's, as structures say it."""
        return None if self.whole is None else self.anatomy.constants[STREAM.axes[0].name]

    def narrowed(self, hidden: int) -> Costs:
        """Return the costs of the same model with a residual stream of another width, at which sizes are as before."""
        axis = STREAM.axes[0].name
        before = self.anatomy.constants[axis]
        return replace(
            self,
            anatomy=Anatomy(self.anatomy.places, {**self.anatomy.constants, axis: hidden}),
            blocks=tuple(block.narrowed(hidden) for block in self.blocks),
            constant=self.constant - self.stream * (before - hidden),
            head_macs=self.head_macs // before * hidden,
            whole=self.original,
        )

    def _of(self, structure: Structure) -> Costs:
        return self if structure.hidden is None else self.original.narrowed(structure.hidden)

    def _amounts(self, structure: Structure) -> Iterator[Amounts]:
        return (cost(size) for cost, size in zip(self._of(structure).blocks, structure.blocks, strict=True))

    def backbone_parameters(self, structure: Structure) -> int:
        """Return parameters of the decoder layers alone."""
        own = sum(amounts.parameters for amounts in self._amounts(structure))
        if not self.shared:
            return own
        there = {place.layer for place, size in zip(self.anatomy, structure, strict=True) if size}
        return own + sum(count for layer, count in self.shared.items() if layer in there)

    def parameters(self, structure: Structure) -> int:
        """Return all parameters, tied embeddings counted once."""
        return self._of(structure).constant + self.backbone_parameters(structure)

    def ratio(self, structure: Structure) -> float:
        """Return removed parameters / all parameters of the dense model (the paper's pruning ratio)."""
        return 1.0 - self.parameters(structure) / self.original.parameters(self.dense)

    def backbone_ratio(self, structure: Structure) -> float:
        """Return removed parameters / parameters of the dense decoder layers."""
        return 1.0 - self.backbone_parameters(structure) / self.original.backbone_parameters(self.dense)

    def weight_bytes(self, structure: Structure) -> int:
        """Return size of the weights in the checkpoint's dtype."""
        return self.parameters(structure) * self.bytes_per_parameter

    def kv_bytes_per_token(self, structure: Structure) -> int:
        """Return KV-cache bytes that one token of context takes."""
        return sum(amounts.cached for amounts in self._amounts(structure)) * self.bytes_per_parameter

    def flops_per_token(self, structure: Structure, context: int = 0) -> int:
        """Return floating-point operations for one token; a multiply-accumulate counts as two.

        Args:
            structure: of the model.
            context: tokens that attention scores are computed against; projections and output head always count."""
        macs = sum(amounts.products + context * amounts.scores for amounts in self._amounts(structure))
        return 2 * (self._of(structure).head_macs + macs)


@dataclass(frozen=True, slots=True)
class Measures:
    """What the rows of :data:`COSTS` read.

    Attributes:
        costs: of the model.
        table: measured milliseconds of its blocks, where there are some.
        workload: of the table."""

    costs: Costs
    table: LatencyTable | None = None
    workload: str = ""

    @property
    def timed(self) -> LatencyTable:
        """The table.

        Raises:
            ConfigError: when there is none."""
        if self.table is None:
            raise ConfigError("latency needs --latency-table FILE (multipruner latency makes one)")
        return self.table

    def milliseconds(self, structure: Structure) -> float:
        """Return predicted milliseconds of one forward pass, by the table, at the costs' own hidden size where the
        structure names none."""
        if structure.hidden is None and self.costs.hidden is not None:
            structure = replace(structure, hidden=self.costs.hidden)
        return self.timed.milliseconds(structure, self.costs.anatomy, self.workload)

    def block_milliseconds(self, place: int, size: Size) -> float:
        """Return milliseconds of one residual block of some size, by the table."""
        return self.timed.block_milliseconds(self.costs.anatomy[place].kind, size, self.workload, self.costs.hidden)

    def constant_milliseconds(self) -> float:
        """Return milliseconds that no block takes, by the table."""
        return self.timed.constant(self.workload, self.costs.hidden)

    def of_all(self, structure: Structure) -> dict[str, float]:
        """Return every cost of a structure by its name; latency only where there is a table."""
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
        block: (measures, number of the block, its size) -> amount of one residual block, where that is no difference of
            whole structures; ``rest``: what is left without any block then.
        reported: key among the costs of ``report.json``, understood in fronts too; empty: the name.
        needs_table: whether it is read from a latency table.
        everyday: whether the short help shows its flag."""

    name: str
    word: str
    label: str
    help: str
    metavar: str
    unit: str
    typed: Mapping[str, float] = field(hash=False)
    axis: tuple[float, str]
    of: Callable[[Measures, Structure], float]
    block: Callable[[Measures, int, Size], float] | None = None
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
        """Return an amount with a unit that keeps the number short."""
        if self.unit == "bytes":
            return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
        if self.unit == "count":
            return _scaled(value, 1000, ("", "k", "M", "G", "T"))
        return f"{value:,.4g}\N{NO-BREAK SPACE}{self.unit}"

    def change(self, before: float, after: float) -> str:
        """Return such as ``22.5 -> 19.0 KiB``, in the unit of figures."""
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
        of=lambda measures, structure: measures.milliseconds(structure),
        # a removed block costs a little while its layer lives; the sum over blocks counts it always
        block=lambda measures, place, size: measures.block_milliseconds(place, size),
        rest=lambda measures: measures.constant_milliseconds(),
    ),
)  # fmt: skip
COSTS: dict[str, Cost] = {row.name: row for row in _ROWS}
"""Every kind of budget by its name; a new kind is a row here."""


def cost_named(name: str) -> Cost:
    """Return the row of a name.

    Raises:
        ConfigError: naming those that there are."""
    if name not in COSTS:
        raise ConfigError(f"no budget {name!r}{did_you_mean(name, COSTS)}; there are {', '.join(COSTS)}")
    return COSTS[name]


def reported_as(key: str) -> Cost | None:
    """Return the row of a key of ``report.json``, or of a name; ``None`` where there is none (any more)."""
    return next((cost for cost in COSTS.values() if key in (cost.key, cost.name)), None)


def timed_first() -> list[Cost]:
    """Return the rows, what is read from a latency table before what is counted: the order in which figures choose
    one."""
    return sorted(COSTS.values(), key=lambda cost: not cost.needs_table)
