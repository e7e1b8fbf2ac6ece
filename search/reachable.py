"""How far a path can go, asked without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from multipruner.errors import InfeasibleError
from multipruner.search.moves import Dimension
from multipruner.search.objective import Objective
from multipruner.search.sequential import Problem, sequential_path
from multipruner.structure import Choice, Structure


class _FirstComes:
    """An objective without a model: the first candidate is the best. For asking how far a path can go."""

    def __call__(self, structure: Structure) -> float:
        return 0.0

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        return Choice(structures[0], 0.0)

    def commit(self, structure: Structure) -> None:
        pass


def reachable_ratio(problem: Problem) -> float:
    """About the largest ratio that these shares can reach (exact up to which blocks happen to leave).

    Found by walking paths that need no model, halving the interval.
    """
    objectives: dict[Dimension, Objective] = dict.fromkeys(problem.order, _FirstComes())

    def feasible(ratio: float) -> bool:
        try:
            sequential_path(replace(problem, ratio=ratio), objectives)
        except InfeasibleError:
            return False
        return True

    if feasible(problem.ratio):
        return problem.ratio
    low, high = 0.0, problem.ratio
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low


def expected_candidates(problem: Problem) -> dict[Dimension, int]:
    """About how many candidates each dimension will compare, for telling the time that is left."""
    steps = sequential_path(problem, dict.fromkeys(problem.order, _FirstComes()))
    counts: dict[Dimension, int] = {dimension: 0 for dimension, _ in problem.stages()}
    for step in steps:
        counts[step.stage] += step.candidates
    return counts
