"""What cannot be reached, refused before anything is measured."""

from __future__ import annotations

from math import floor

from multipruner.config.recipe import Recipe
from multipruner.core.axes import AXES
from multipruner.core.errors import InfeasibleError
from multipruner.engine.prunable import Prunable
from multipruner.repair.scoring import check_repair
from multipruner.search import DIMENSIONS, Problem, reachable_ratio, too_small
from multipruner.search.allocation import check_feasible

from .setting import problem_of, task_of


def check_reachable(recipe: Recipe, prunable: Prunable) -> None:
    """Refuse what cannot be reached, before anything is measured.

    Raises:
        ConfigError: when the grid or the repair does not fit the model.
        InfeasibleError: naming the nearest budget that can be kept.
    """
    check_repair(recipe.repair, prunable)
    if recipe.greedy:
        _check_path(problem_of(recipe, prunable))
    else:
        task = task_of(recipe, prunable)
        task.grid.check(task.anatomy)
        check_feasible(task)


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
