"""Search problems without a model: a structure, its costs, and a loss that is easy to foretell."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from multipruner.core.costs import BlockCost, Costs
from multipruner.core.layout import Layout
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import Anatomy, Structure
from multipruner.search import DIMENSIONS, Dimension, Grid, Limit, Problem, Task, allocate
from multipruner.search.genome import StructureSpace
from multipruner.search.limits import Budget

from .layers import layers_of, uniform

ANATOMY = uniform(6, 8, 4, 64)
DENSE = ANATOMY.dense
_ATTENTION = BlockCost(
    "attention", {"head_dim": 16}, 10,
    ((Layout("kv_groups * queries"), Layout("100")), (Layout("kv_groups"), Layout("100"))),
    (Layout("kv_groups * 16"), Layout("kv_groups * 16")), (Layout("kv_groups * queries * 16"),) * 2,
)  # fmt: skip
_MLP = BlockCost("mlp", {}, 10, ((Layout("channels"), Layout("30")),))


def costs_of(anatomy: Anatomy, constant: int) -> Costs:
    """10 parameters per block, 100 per query head and per KV head, 30 per channel, and a constant."""
    return Costs(anatomy, (_ATTENTION, _MLP) * anatomy.layers, constant, constant, 2)


COSTS = costs_of(ANATOMY, 5000)


class Additive:
    """A loss that is a sum of what each removed part is worth: greedy decisions are easy to foretell."""

    def __init__(self, seed: int = 1) -> None:
        self.worth = [((n * 7919 + seed * 104729) % 101 + 1, (n * 6841 + seed * 1299709) % 97 + 1) for n in range(6)]
        self.committed: list[Structure] = []
        self.calls = 0

    def __call__(self, structure: Structure) -> float:
        loss = 0.0
        layers = zip(self.worth, layers_of(structure), layers_of(DENSE), strict=True)
        for (heads, channels), size, full in layers:
            loss += heads * (1 - size.query_heads / full.query_heads) ** 2
            loss += channels * (1 - size.channels / full.channels) ** 2
        return loss

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        self.calls += 1
        choice = best_two(structures, [self(structure) for structure in structures])
        if progress is not None:
            progress(len(structures), len(structures))
        return choice

    def commit(self, structure: Structure) -> None:
        self.committed.append(structure)


def problem(ratio: float = 0.3, stop: Literal["nearest", "reach"] = "nearest", **changes: object) -> Problem:
    shares: dict[Dimension, float] = {"blocks": 44, "mlp": 52, "heads": 4}
    base = Problem(COSTS, ratio, DIMENSIONS, shares, Grid({"channels": 8, "kv_groups": 1}), stop)
    return replace(base, **changes)  # type: ignore[arg-type]


def by_program(grid: Grid, ratio: float, uniform: bool) -> Structure:
    """What the exact program finds within a budget of parameters."""

    def of_block(block: int, size: tuple[int, ...]) -> float:
        return COSTS.parameters(DENSE.replace(block, size)) - COSTS.parameters(DENSE.replace(block, ()))

    rest = COSTS.parameters(DENSE) - sum(of_block(block, size) for block, size in enumerate(DENSE))
    limit = Limit.of_blocks("parameters", of_block, rest, (1 - ratio) * COSTS.parameters(DENSE))
    return allocate(Task(ANATOMY, grid, (limit,), uniform=uniform, rounds=1), Additive()).structure


def by_evolution(grid: Grid, ratio: float, seed: int, free: Grid, tolerance: float) -> Iterator[Structure]:
    """What every operator of an evolution makes, and what it takes over from a search on a grid that allows more."""
    budget, rng = Budget.from_ratio(COSTS, ratio, tolerance), random.Random(seed)
    space = StructureSpace(ANATOMY, grid, budget)
    first, second = space.random(rng), space.random(rng)
    yield from (first, second)
    yield from (space.mutate(parent, rng, 3) for parent in (first, second))
    yield from space.mate(first, second, rng)
    yield space.admit(StructureSpace(ANATOMY, free, budget).random(rng), rng)
