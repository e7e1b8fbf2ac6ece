"""How far a path can go, asked without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from multipruner.core.axes import Dimension
from multipruner.core.errors import InfeasibleError
from multipruner.core.objective import Choice
from multipruner.core.structure import Structure
from multipruner.search.path import Problem, sequential_path
from multipruner.search.step import Step


class _Probe:
    """An objective without a model, for asking how far a path can go: takes the candidate at a place in the list.

    Attention blocks stand first among the candidates and MLP blocks last, so the places 0, 1/2 and 1 walk paths that
    remove mostly attention, some of both, or mostly MLPs.
    """

    def __init__(self, place: float) -> None:
        self._place = place

    def __call__(self, structure: Structure) -> float:
        return 0.0

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        return Choice(structures[round(self._place * (len(structures) - 1))], 0.0)

    def commit(self, structure: Structure) -> None:
        pass


PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _probes(problem: Problem) -> list[list[Step]]:
    """Return the paths that get to the problem's ratio."""
    paths = []
    for place in PLACES:
        with suppress(InfeasibleError):
            paths.append(sequential_path(problem, dict.fromkeys(problem.order, _Probe(place))))
    return paths


def reachable_ratio(problem: Problem) -> float:
    """Return the problem's ratio if these shares can reach it, else about the largest that they can.

    What can be reached depends on which blocks happen to leave; a ratio counts as reachable when any of a few paths
    that need no model gets there. The largest is found by halving the interval.
    """
    if _probes(problem):
        return problem.ratio
    low, high, reached = 0.0, problem.ratio, 0.0
    for _ in range(12):
        middle = (low + high) / 2
        paths = _probes(replace(problem, ratio=middle))
        if paths:
            low, reached = middle, max(reached, *(steps[-1].ratio for steps in paths))
        else:
            high = middle
    return reached


def expected_candidates(problem: Problem, shortlist: int | None = None) -> dict[Dimension, int]:
    """Return about how many candidates each dimension will measure, for telling the time that is left.

    Args:
        problem: what is asked.
        shortlist: see :class:`multipruner.search.path.Shortlisted`; default: every step measures all.
    """
    counts: dict[Dimension, int] = {dimension: 0 for dimension, _ in problem.stages()}
    for step in next(iter(_probes(problem)), ()):
        few = step.candidates if shortlist is None or not counts[step.stage] else shortlist + 1
        counts[step.stage] += min(few, step.candidates)
    return counts
