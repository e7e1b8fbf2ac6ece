"""Allocation by tables: measure what shrinking one block costs, solve the exact program, measure again, solve again.

The sum of single losses is not the loss of the sum. So the loss of every solution is measured, the options around the
best structure so far are measured with everything else as it is there, and the program is solved again among them,
until nothing better is found. What counts is the measured loss. Which options of a block are measured, and what is
predicted for the others: :mod:`~multipruner.search.options`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from math import isfinite
from typing import Any

from multipruner.core.errors import NumericsError
from multipruner.core.objective import Objective
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.search.grid import Grid
from multipruner.search.limits import Limit
from multipruner.search.options import FIRST, Chain, beyond, chains, interpolated, levels, predicted, wanted
from multipruner.search.program import Solution, Table, solve

PARTS = (4, 8, 16, 32)
"""Of the blocks, one in so many may change: cautious steps beside the free one."""
FIRST_REACH = 0.25
"""Share of the levels that the first surroundings go up and down."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of an allocation.

    Attributes:
        anatomy: the dense model's blocks.
        grid: how finely they are cut.
        limits: the budgets.
        uniform: the same sizes in every layer that stays, and only whole layers leave.
        rounds: how often the surroundings of the best structure are measured, at most.
        refine_seconds: further rounds begin until so much time has passed after those.
        first: shares of its levels that a block keeps in the first tables.
        errors: gives the output errors of a block along a chain of sizes, which losses between measured ones follow;
            ``None``: straight lines.
        straight: blocks that have no such errors: straight lines between the losses of :data:`FIRST`.
    """

    anatomy: Anatomy
    grid: Grid
    limits: tuple[Limit, ...]
    uniform: bool = False
    rounds: int = 2
    refine_seconds: float = 0.0
    first: tuple[float, ...] = FIRST
    errors: Callable[[int, Chain], Sequence[float]] | None = field(default=None, compare=False)
    straight: frozenset[int] = frozenset()

    def errors_of(self, block: int, chain: Chain) -> Sequence[float] | None:
        """Return the output errors of a block along a chain, where losses follow them."""
        return None if self.errors is None or block in self.straight else self.errors(block, chain)

    def levels(self, block: int) -> tuple[Size, ...]:
        """Return what a block can keep, from nothing to everything."""
        return levels(self.anatomy[block], self.grid)

    def chains(self, block: int, structure: Structure) -> tuple[Chain, ...]:
        """Return the chains of a block's options that go through the one it has in a structure."""
        return chains(self.anatomy[block], self.grid, structure[block])

    def predicted(self, block: int, structure: Structure, tables: Sequence[Mapping[Size, float]]) -> dict[Size, float]:
        """Return loss increases of a block's options by those along its chains."""
        return predicted(tables, self.anatomy[block], self.grid, structure[block])


@dataclass(frozen=True, slots=True)
class Round:
    """One solution of the program.

    Attributes:
        number: 0 is the first.
        predicted, loss: by the tables, in the objective's unit; and measured.
        seconds, solver_seconds: the round took, measuring included; and of that, the program.
        gap: proven relative distance of the program's answer to its optimum.
        measured: losses that were measured in this round.
        accepted: whether it is the best so far.
    """

    number: int
    predicted: float
    loss: float
    seconds: float = field(compare=False)
    solver_seconds: float = field(compare=False)
    gap: float
    measured: int
    accepted: bool

    def to_json(self) -> dict[str, Any]:
        """Return a plain mapping (its number is called ``round``)."""
        record = asdict(self)
        return {"round": record.pop("number"), **record}


@dataclass(frozen=True, slots=True)
class Allocation:
    """What an allocation found: the best structure, its measured loss, the dense model's, and every round."""

    structure: Structure
    loss: float
    dense_loss: float
    rounds: tuple[Round, ...]


Progress = Callable[[str, int, int], None]
"""Called with (what is measured, losses measured, losses to measure)."""


def allocate(
    task: Task,
    objective: Objective,
    on_progress: Progress | None = None,
    *,
    sketch: Objective | None = None,
    estimate: Callable[[Task], Table] | None = None,
) -> Allocation:
    """Return the structure with the lowest measured loss that the rounds find within the budgets.

    Args:
        task: what is asked.
        objective: measures losses.
        on_progress: called after every loss.
        sketch: measures those of the first tables instead, such as the same loss on less text: these only have to
            lead near the place where rounds look closely.
        estimate: gives the first tables instead, without a loss, of all blocks that it can tell them of.

    Raises:
        InfeasibleError: when no structure keeps the budgets, before anything is measured.
        NumericsError: when the dense model, or every solution, has no finite loss.
    """
    check_feasible(task)
    meter = _Meter(objective, on_progress or (lambda *at: None))
    rough = meter if sketch is None else _Meter(sketch, meter.on_progress)

    def measured() -> int:
        return sum(each.count for each in {meter, rough})

    dense = task.anatomy.dense
    dense_loss = meter(dense)
    if not isfinite(dense_loss):
        raise NumericsError("the dense model's calibration loss is not finite; try --dtype float32 or bfloat16")
    best, best_loss, rounds, reach = dense, float("inf"), [], _reach(task)
    for number in _numbers(task):
        began, before = time.perf_counter(), measured()
        if number:
            table, base = _tables(task, meter, best, reach, number)
        else:
            table = {} if estimate is None else dict(estimate(task))
            told = set(table) or set(range(len(dense))) - task.straight
            if len(table) < len(dense):
                table |= _tables(task, rough, dense, None, number, table)[0]
            table, base = _settled(task, rough, table, told), dense_loss
        solutions = _solutions(task, table, best if number else None)
        losses = [meter(solution.structure) for solution in solutions]
        loss, solution = min(zip(losses, solutions, strict=True), key=lambda pair: pair[0])
        accepted = loss < best_loss
        seconds, asked = time.perf_counter() - began, measured() - before
        rounds.append(
            Round(number, base + solution.predicted, loss, seconds, solution.seconds, solution.gap, asked, accepted)
        )
        if accepted:
            best, best_loss = solution.structure, loss
        elif reach == 1:
            break
        reach = max(1, reach // 2) if number else reach
    if not isfinite(best_loss):
        raise NumericsError("no structure that was tried has a finite loss; try --dtype float32 or bfloat16")
    return Allocation(best, best_loss, dense_loss, tuple(rounds))


def _numbers(task: Task) -> Iterator[int]:
    """Yield numbers of the rounds: those asked for, then more while there is time."""
    yield from range(task.rounds + 1)
    began = time.perf_counter()
    for number in count(task.rounds + 1):
        if time.perf_counter() - began >= task.refine_seconds:
            return
        yield number


def _solutions(task: Task, table: Table, base: Structure | None) -> list[Solution]:
    """Return what the program gives, and what it gives when only some of the blocks may differ from the base.

    The more blocks change together, the less their single losses add up; so a table that promises too much for all
    blocks at once is still right about the few best changes, and solving again costs next to nothing.
    """
    free = solve(table, task.limits, task.anatomy, uniform=task.uniform)
    if base is None or task.uniform:
        return [free]

    def changed(block: int, size: Size) -> float:
        return float(size != base[block])

    found = {free.structure: free}
    for part in PARTS:
        few = Limit.of_blocks("changed blocks", changed, 0.0, float(max(2, len(table) // part)))
        solution = solve(table, (*task.limits, few), task.anatomy)
        found.setdefault(solution.structure, solution)
    found.pop(base, None)
    return list(found.values()) or [free]


def _reach(task: Task) -> int:
    """Tell how many levels up and down the first surroundings go."""
    dense = task.anatomy.dense
    longest = max(len(chain) for block in range(len(dense)) for chain in task.chains(block, dense))
    return max(1, int(longest * FIRST_REACH))


def check_feasible(task: Task) -> None:
    """Solve with no losses at all; raises when the budgets cannot be kept."""
    table = {block: dict.fromkeys(task.levels(block), 0.0) for block in range(len(task.anatomy))}
    solve(table, task.limits, task.anatomy, uniform=task.uniform)


class _Meter:
    """Measures losses and counts them."""

    def __init__(self, objective: Objective, on_progress: Progress) -> None:
        self.objective, self.on_progress, self.count = objective, on_progress, 0

    def __call__(self, structure: Structure) -> float:
        self.count += 1
        return self.objective(structure)


def _tables(
    task: Task, meter: _Meter, base: Structure, reach: int | None, number: int, known: Collection[int] = ()
) -> tuple[dict[int, dict[Size, float]], float]:
    """Return loss increases of every block's options with all other blocks as in ``base``, and the loss of the base.
    ``reach`` None measures a few levels over the whole range, a number the levels that far up and down: options further
    away are none. Between measured levels losses are interpolated, beside the chains predicted. Known ones stay.
    """
    meter.objective.commit(base)
    own = meter(base)
    wanted = {block: rows for block, rows in _asked(task, base, reach).items() if block not in known}
    total, done = sum(len(sizes) for asked in wanted.values() for _, sizes in asked), 0
    what = "first tables" if reach is None else f"round {number}"
    table: dict[int, dict[Size, float]] = {}
    for block, asked in wanted.items():
        tables = []
        for chain, sizes in asked:
            rows = {base[block]: 0.0}
            for size in sizes:
                rows[size] = meter(base.replace(block, size)) - own
                done += 1
                meter.on_progress(what, done, total)
            errors = task.errors_of(block, chain)
            tables.append(interpolated(rows, chain, errors))
            if errors is not None and reach is None:
                tables[-1] |= beyond(tables[-1], chain, errors)
        table[block] = task.predicted(block, base, tables)
    return table, own


def _settled(task: Task, meter: _Meter, estimated: Table, told: Collection[int]) -> Table:
    """Measure what the program would remove of the blocks ``told`` by errors, until it removes no other: one that is
    gone takes with it what no error of an output tells, such as the few huge activations that others lean on.
    """
    if task.errors is None:
        return estimated
    dense, table = task.anatomy.dense, {block: dict(rows) for block, rows in sorted(estimated.items())}
    meter.objective.commit(dense)
    own, asked = meter(dense), set[int]()
    while True:
        found = solve(table, task.limits, task.anatomy, uniform=task.uniform).structure
        new = [block for block, size in enumerate(found) if not size and block in told and block not in asked]
        if not new:
            return table
        for block in new:
            table[block][GONE] = meter(dense.replace(block, GONE)) - own
            asked.add(block)
            meter.on_progress("removed blocks", len(asked), len(asked))


def _asked(task: Task, base: Structure, reach: int | None) -> dict[int, list[tuple[Chain, list[Size]]]]:
    """Return for every block its chains, and of each the options to measure."""
    first = [FIRST if block in task.straight else task.first for block in range(len(base))]
    return {
        block: [(chain, wanted(chain, base[block], reach, shares)) for chain in task.chains(block, base)]
        for block, shares in enumerate(first)
    }


def options_of_round(task: Task, base: Structure, number: int, known: Collection[int]) -> dict[int, list[Size]]:
    """Return what a round (0: the first tables, but for blocks that are known) measures of every block around a
    structure, all before it made.
    """
    reach = max(1, _reach(task) >> (number - 1)) if number else None
    asked = {block: rows for block, rows in _asked(task, base, reach).items() if number or block not in known}
    return {block: [size for _, sizes in rows for size in sizes] for block, rows in asked.items()}
