"""What a structure may cost: any costs, each with an upper and, where asked, a lower limit; costs that are sums over
residual blocks, as the exact program needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from multipruner.core.costs import Costs
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Size, Structure

SLACK = 1e-9
"""Share of a limit by which rounding may exceed it."""
Cost = Callable[[Structure], float]
CostOf = Callable[[int, Size], float]
"""(number of a residual block, its size) -> what it costs."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One cost and the interval it must stay in.

    Attributes:
        name: of the cost, for messages and for telling two runs apart.
        cost: structure -> number; should not fall when a structure grows.
        limit: the most that is allowed.
        least: the least that is allowed.
        block_cost: (number of a residual block, its size) -> number, where the cost is a sum over residual blocks and a
            constant, as the exact program needs it.
        constant: what of such a cost does not depend on the structure.
    """

    name: str
    cost: Cost
    limit: float
    least: float = -inf
    block_cost: CostOf | None = None
    constant: float = 0.0

    @classmethod
    def of_blocks(cls, name: str, block_cost: CostOf, constant: float, limit: float) -> Limit:
        """Return an upper limit of a cost that is a sum over residual blocks and a constant, the constant included."""

        def cost(structure: Structure) -> float:
            return constant + sum(block_cost(number, size) for number, size in enumerate(structure))

        return cls(name, cost, limit, block_cost=block_cost, constant=constant)

    def __str__(self) -> str:
        """Return what is asked, such as ``kv_bytes <= 1024``."""
        return self.said(self.limit)

    def said(self, limit: float) -> str:
        """Return the same with another upper limit."""
        return (
            f"{self.name} <= {limit:.6g}" if self.least == -inf else f"{self.least:.6g} <= {self.name} <= {limit:.6g}"
        )

    @property
    def slack(self) -> float:
        """What rounding may add to a cost."""
        return SLACK * max(1.0, abs(self.limit))

    def violation(self, structure: Structure) -> float:
        """Tell how far outside the interval, as a share of the limit: positive above, negative below, 0 inside."""
        amount, scale = self.cost(structure), abs(self.limit) or 1.0
        if amount > self.limit:
            return (amount - self.limit) / scale
        return min(0.0, (amount - self.least) / scale)

    def nearest(self, low: float, high: float) -> float | None:
        """Return the amount between two ends nearest to the interval where they all are outside; else ``None``."""
        if low > self.limit:
            return low
        return high if high < self.least else None

    def to_json(self) -> dict[str, Any]:
        """Name and limits (``null``: none below)."""
        return {"name": self.name, "limit": self.limit, "least": None if self.least == -inf else self.least}


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds that hold together; none at all leaves every structure allowed.

    Attributes:
        bounds: what must hold.
        fill: whether a structure should use the bounds up: nothing can grow by one group and still fit. Meant for
            a search with the loss as its only objective; with costs among the objectives, smaller is a merit.
    """

    bounds: tuple[Limit, ...] = ()
    fill: bool = False

    @classmethod
    def from_ratio(cls, costs: Costs, ratio: float, tolerance: float = 0.001) -> Budget:
        """Return the structures whose parameter ratio (removed / all parameters) lies within a tolerance of a target.

        Raises:
            ConfigError: when the ratio is not in [0, 1) or the tolerance is negative.
        """
        if not 0 <= ratio < 1 or tolerance < 0:
            raise ConfigError(f"ratio {ratio:g} with tolerance {tolerance:g}: give a ratio in [0, 1), a tolerance >= 0")
        dense = costs.parameters(costs.dense)
        limits = ((1 - ratio + tolerance) * dense, (1 - ratio - tolerance) * dense)
        return cls((Limit("parameters", costs.parameters, *limits),))

    def holds(self, structure: Structure) -> bool:
        """Tell whether every bound holds."""
        return not any(bound.violation(structure) for bound in self.bounds)

    def excess(self, structure: Structure) -> tuple[float, float]:
        """Return (too much, too little), each the sum over the bounds of what :meth:`Limit.violation` says."""
        violations = [bound.violation(structure) for bound in self.bounds]
        return sum(v for v in violations if v > 0), -sum(v for v in violations if v < 0)

    def to_json(self) -> dict[str, Any]:
        """Return what tells this budget from another."""
        return {"bounds": [bound.to_json() for bound in self.bounds], "fill": self.fill}
