"""The exact program (MDP, arXiv 2504.02168, carried over to decoder language models): one option per residual block.

Every block of the model has a table of options: how much of it stays, the increase of the loss that was measured when
only this block shrinks, and what the option costs. The program picks one option per block, minimises the sum of the
increases and keeps every budget. With the residual width fixed it is a multiple-choice knapsack, solved to optimality
by HiGHS through :func:`scipy.optimize.milp`; every constraint is recomputed afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import inf, isfinite
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from multipruner.core.errors import ConfigError, InfeasibleError, MultiprunerError
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.search.limits import CostOf, Limit

Table = Mapping[int, Mapping[Size, float]]
"""For every block, by its number, its options and the loss increase of each."""
_ATTEMPTS = 10
"""Further ones of the solver, where its answer breaks a budget by rounding: each asks for four times as much less."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What the program found.

    Attributes:
        structure: the structure.
        predicted: the sum of its single loss increases.
        gap: proven relative distance to the optimum (0: optimal).
        seconds: the solver took.
    """

    structure: Structure
    predicted: float
    gap: float
    seconds: float


def solve(
    table: Table, limits: Sequence[Limit], anatomy: Anatomy, *, uniform: bool = False, time_limit: float = 60.0
) -> Solution:
    """Return the structure with the smallest sum of loss increases that keeps every limit.

    Args:
        table: for every block its options and their loss increases; an increase that is not finite takes its option
            out. A block that is not in it is gone.
        limits: the budgets.
        anatomy: the dense model's blocks.
        uniform: all layers that stay keep the same sizes, and only whole layers leave, so that an ordinary
            configuration of the family describes the result.
        time_limit: seconds for the solver.

    Raises:
        ConfigError: when a block has no option.
        InfeasibleError: when no structure keeps the limits; ``nearest`` is the smallest limit of the first bound
            that can be kept when all are widened by the same factor.
    """
    program = _Program(table, limits, anatomy)
    return _solve_uniform(program, time_limit) if uniform else program.solve(time_limit)


def _bounded(matrix: Any, lower: Any, upper: Any) -> LinearConstraint:
    """Bound by arrays, as scipy's annotations know single numbers only."""
    return LinearConstraint(matrix, lower, upper)


def _interval(lower: Any, upper: Any) -> Bounds:
    return Bounds(lower, upper)


def _block_costs(limits: Sequence[Limit]) -> list[CostOf]:
    """Return costs by block.

    Raises:
        ConfigError: when a cost is no sum over blocks, or has a lower limit, which the program does not know.
    """
    for limit in limits:
        if limit.block_cost is None or limit.least > -inf:
            raise ConfigError(f"the exact program takes upper limits of costs that are sums over blocks, not {limit}")
    return [limit.block_cost for limit in limits if limit.block_cost is not None]


class _Program:
    """The matrices: one binary variable per option."""

    def __init__(self, table: Table, limits: Sequence[Limit], anatomy: Anatomy) -> None:
        self.limits, self.anatomy = limits, anatomy
        self.options: list[tuple[int, Size]] = []
        self.losses: list[float] = []
        for block, rows in sorted(table.items()):
            usable = [(size, loss) for size, loss in rows.items() if isfinite(loss)]
            if not usable:
                raise ConfigError(f"{anatomy[block].name} has no option with a finite loss")
            for size, loss in usable:
                self.options.append((block, size))
                self.losses.append(loss)
        self.blocks = sorted({block for block, _ in self.options})
        self.costs = np.array([[cost(*option) for option in self.options] for cost in _block_costs(limits)])
        self.costs = self.costs.reshape(len(limits), len(self.options))

    def rows(self) -> tuple[csr_array, np.ndarray, np.ndarray]:
        """Return one option per block; at least one block of each kind stays (where there is an option that keeps
        one).
        """
        number = {block: index for index, block in enumerate(self.blocks)}
        one = np.zeros((len(self.blocks), len(self.options)))
        kinds = self.anatomy.kinds
        keeps = np.zeros((len(kinds), len(self.options)))
        for column, (block, size) in enumerate(self.options):
            one[number[block], column] = 1
            keeps[kinds.index(self.anatomy[block].kind), column] = bool(size)
        keeps = keeps[keeps.any(axis=1)]
        lower = np.ones(len(one) + len(keeps))
        upper = np.concatenate([np.ones(len(one)), np.full(len(keeps), inf)])
        return csr_array(np.vstack([one, keeps])), lower, upper

    def solve(self, time_limit: float, extra: tuple[csr_array, np.ndarray, np.ndarray] | None = None) -> Solution:
        rows: Any = self.rows()
        matrix, lower, upper = rows
        if extra is not None:
            matrix = vstack([matrix, extra[0]])
            lower, upper = np.concatenate([lower, extra[1]]), np.concatenate([upper, extra[2]])
        room = np.array([limit.limit - limit.constant for limit in self.limits])
        slack = np.array([limit.slack for limit in self.limits])
        began, less = time.perf_counter(), np.zeros(len(room))
        chosen, gap = self._answer(matrix, lower, upper, room, time_limit)
        for _ in range(_ATTEMPTS):
            over = self.costs[:, chosen].sum(axis=1) - room
            if not (over > slack).any():
                break
            # the solver is content with a millionth too much: ask for less, by as little as makes it look elsewhere
            less = np.where(over > slack, np.maximum(over, 4 * less), less)
            chosen, gap = self._answer(matrix, lower, upper, room - less, time_limit)
        return self._checked(chosen, gap, time.perf_counter() - began)

    def _answer(
        self, matrix: Any, lower: np.ndarray, upper: np.ndarray, room: np.ndarray, time_limit: float
    ) -> tuple[np.ndarray, float]:
        """Return what the solver says: the chosen options and the proven gap."""
        scale = np.maximum(np.abs(room), 1e-12)  # HiGHS likes numbers near one
        constraints = [_bounded(matrix, lower, upper)]
        if self.limits:
            constraints.append(_bounded(csr_array(self.costs / scale[:, None]), -inf, room / scale))
        result = milp(
            np.array(self.losses),
            integrality=np.ones(len(self.options)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": time_limit, "mip_rel_gap": 1e-6},
        )
        if result.x is None:
            if result.status == 2:
                raise self._infeasible(matrix, lower, upper)
            raise MultiprunerError(f"the integer program was not solved within {time_limit:g} s: {result.message}")
        return np.flatnonzero(np.round(result.x)), float(result.mip_gap or 0.0)

    def _checked(self, chosen: np.ndarray, gap: float, seconds: float) -> Solution:
        """Rebuild the structure and recompute every constraint: a solver's word is not enough."""
        parts = {self.options[index][0]: self.options[index][1] for index in chosen}
        if len(parts) != len(chosen) or set(parts) != set(self.blocks):
            raise MultiprunerError("the solver's answer does not name one option per block")
        structure = Structure(tuple(parts.get(block, GONE) for block in range(len(self.anatomy))))
        for limit in self.limits:
            if limit.cost(structure) > limit.limit + limit.slack:
                raise MultiprunerError(f"the solver's answer breaks the budget: {limit.cost(structure)}, not {limit}")
        return Solution(structure, float(sum(self.losses[index] for index in chosen)), gap, seconds)

    def _infeasible(self, matrix: Any, lower: np.ndarray, upper: np.ndarray) -> InfeasibleError:
        """Tell by how much all limits have to be widened together, and what that makes of each."""
        columns = len(self.options)
        widths = np.array([[abs(limit.limit)] for limit in self.limits])
        room = np.array([limit.limit - limit.constant for limit in self.limits])
        result = milp(
            np.concatenate([np.zeros(columns), [1.0]]),
            integrality=np.concatenate([np.ones(columns), [0.0]]),
            bounds=_interval(0, np.concatenate([np.ones(columns), [inf]])),
            constraints=[
                _bounded(csr_array(np.hstack([matrix.toarray(), np.zeros((matrix.shape[0], 1))])), lower, upper),
                _bounded(np.hstack([self.costs, -widths]), -inf, room),
            ],
        )
        if result.x is None:
            return InfeasibleError("no structure keeps one block of each kind under these options")
        factor = 1.0 + float(result.x[-1])
        nearest = ", ".join(limit.said(factor * limit.limit) for limit in self.limits)
        asked = ", ".join(map(str, self.limits))
        return InfeasibleError(
            f"no structure keeps {asked}; the nearest that can be kept: {nearest}",
            nearest=factor * self.limits[0].limit,
        )


def _solve_uniform(program: _Program, time_limit: float) -> Solution:
    """Return one program per combination of sizes, one of each kind: every layer is either of those or gone."""
    kinds = program.anatomy.kinds
    sizes = [
        sorted({size for block, size in program.options if size and program.anatomy[block].kind == kind})
        for kind in kinds
    ]
    began, best, error = time.perf_counter(), None, None
    for kept in product(*sizes):
        try:
            found = program.solve(time_limit, _whole_layers(program, dict(zip(kinds, kept, strict=True))))
        except InfeasibleError as failure:
            if error is None or (failure.nearest or inf) < (error.nearest or inf):
                error = failure
            continue
        if best is None or found.predicted < best.predicted:
            best = found
    if best is None:
        raise error or InfeasibleError("no uniform structure keeps the budget")
    return Solution(best.structure, best.predicted, best.gap, time.perf_counter() - began)


def _whole_layers(program: _Program, kept: Mapping[str, Size]) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Return no option but the kept size and nothing; the blocks of a layer stay or leave together."""
    anatomy, rows = program.anatomy, []
    forbidden = np.zeros(len(program.options))
    stays: dict[int, np.ndarray] = {block: np.zeros(len(program.options)) for block in program.blocks}
    for column, (block, size) in enumerate(program.options):
        if size == kept[anatomy[block].kind]:
            stays[block][column] = 1
        elif size:
            forbidden[column] = 1
    for layer in range(anatomy.layers):
        blocks = [block for block in anatomy.of_layer(layer) if block in stays]
        rows += [stays[first] - stays[other] for first, other in pairwise(blocks)]
    matrix = np.vstack([forbidden, *rows])
    return csr_array(matrix), np.zeros(len(matrix)), np.zeros(len(matrix))
