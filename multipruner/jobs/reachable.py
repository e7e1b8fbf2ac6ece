"""What cannot be reached, refused before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, floor

from multipruner.config.recipe import Recipe
from multipruner.core.axes import AXES, DIMENSIONS
from multipruner.core.errors import InfeasibleError
from multipruner.core.structure import Structure
from multipruner.engine.prunable import Prunable
from multipruner.repair.scoring import check_repair
from multipruner.search import Problem, reachable_ratio, too_small
from multipruner.search.allocation import check_feasible

from .setting import problem_of, task_of

_ALL = 0.999


def check_reachable(recipe: Recipe, prunable: Prunable) -> None:
    """Refuse what cannot be reached, before anything is measured.

    Raises:
        ConfigError: when the grid or the repair does not fit the model.
        InfeasibleError: naming the nearest budget that can be kept.
    """
    check_repair(recipe.repair, prunable)
    try:
        if recipe.greedy:
            _check_path(problem_of(recipe, prunable))
        else:
            task = task_of(recipe, prunable)
            task.grid.check(task.anatomy)
            check_feasible(task)
    except InfeasibleError as error:
        flags = [f"--freeze {recipe.freeze}"] if recipe.freeze is not None else []
        if recipe.dimensions != DIMENSIONS:
            flags.append(f"--dimensions {','.join(recipe.dimensions)}")
        if not flags:
            raise
        least, most = span(recipe, prunable)
        raise InfeasibleError(
            f"{error}; with {' '.join(flags)} ratios from {ceil(least * 1e4) / 1e4:g} to about "
            f"{floor(most * 1e3) / 1e3:g} are in reach",
            nearest=error.nearest,
        ) from None


def span(recipe: Recipe, prunable: Prunable) -> tuple[float, float]:
    """Return the smallest and the largest ratio that a recipe's grid and strategy can reach on a model."""
    costs = prunable.costs
    if recipe.greedy:
        problem = problem_of(recipe, prunable)
        return max(0.0, too_small(problem).nearest or 0.0), reachable_ratio(replace(problem, ratio=_ALL))
    task = task_of(recipe, prunable)
    anatomy = task.anatomy
    dense, empty = anatomy.dense, Structure(tuple(task.levels(number)[0] for number in range(len(anatomy))))
    ratios = [costs.ratio(dense.replace(n, size)) for n in range(len(anatomy)) for size in task.levels(n)[:-1]]
    stays = 0.0  # of each kind one block stays: where all may leave, the narrowest that there is
    for kind in anatomy.kinds:
        if not anatomy.count(empty, kind):
            one = [empty.replace(number, task.levels(number)[1]) for number in anatomy.of_kind(kind)]
            stays += min(costs.ratio(empty) - costs.ratio(structure) for structure in one)
    return min(ratios, default=0.0), costs.ratio(empty) - stays


def _check_path(problem: Problem) -> None:
    problem.grid.check(problem.anatomy)
    reachable = reachable_ratio(problem)
    if not reachable:
        raise too_small(problem)
    if reachable < problem.ratio:
        shares = ":".join(f"{problem.shares[dimension]:g}" for dimension in DIMENSIONS)
        steps = ", ".join(f"{AXES[name].step} {step}" for name, step in problem.grid.steps.items())
        raise InfeasibleError(
            f"a ratio of {problem.ratio:g} is out of reach with shares {shares} ({steps}): the maximum is "
            f"about {floor(reachable * 1e3) / 1e3:g}; ask for less, or give 'blocks' a larger share",
            nearest=reachable,
        )
