"""What cannot be reached, refused before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from math import floor

from multipruner.config.recipe import Recipe
from multipruner.core.errors import InfeasibleError
from multipruner.core.structure import KINDS
from multipruner.engine.prunable import Prunable
from multipruner.repair.scoring import check_compensation
from multipruner.search import DIMENSIONS, Problem, reachable_ratio, too_small
from multipruner.search.allocation import check_feasible, with_block

from .setting import problem_of, task_of

_ALL = 0.999


def check_reachable(recipe: Recipe, prunable: Prunable) -> None:
    """Refuse what cannot be reached, before anything is measured.

    Raises:
        ConfigError: when the grid or the repair does not fit the model.
        InfeasibleError: naming the nearest budget that can be kept.
    """
    check_compensation(recipe.compensation, prunable)
    if recipe.strategy == "milp":
        task = task_of(recipe, prunable)
        task.grid.check(task.dense)
        check_feasible(task)
    else:
        _check_path(problem_of(recipe, prunable))


def span(recipe: Recipe, prunable: Prunable) -> tuple[float, float]:
    """The smallest and the largest ratio that a recipe's grid and strategy can reach on a model."""
    costs = prunable.costs
    if recipe.strategy != "milp":
        problem = problem_of(recipe, prunable)
        return max(0.0, too_small(problem).nearest or 0.0), reachable_ratio(replace(problem, ratio=_ALL))
    task = task_of(recipe, prunable)
    blocks, dense = task.blocks(), task.dense
    ratios = [costs.ratio(with_block(dense, block, size)) for block in blocks for size in task.levels(block)[:-1]]
    empty = dense
    for block in blocks:
        empty = with_block(empty, block, task.levels(block)[0])
    stays = 0.0  # of each kind one block stays, the narrowest that there is
    for kind in KINDS:
        one = [with_block(empty, block, task.levels(block)[1]) for block in blocks if block[1] == kind]
        stays += min((costs.ratio(empty) - costs.ratio(structure) for structure in one), default=0.0)
    return min(ratios, default=0.0), costs.ratio(empty) - stays


def _check_path(problem: Problem) -> None:
    problem.grid.check(problem.costs.dense)
    reachable = reachable_ratio(problem)
    if not reachable:
        raise too_small(problem)
    if reachable < problem.ratio:
        shares = ":".join(f"{problem.shares[dimension]:g}" for dimension in DIMENSIONS)
        raise InfeasibleError(
            f"a ratio of {problem.ratio:g} is out of reach with shares {shares} and channel groups of "
            f"{problem.grid.channel_group}: the maximum is about {floor(reachable * 1e3) / 1e3:g}; ask for less, or "
            "give 'blocks' a larger share",
            nearest=reachable,
        )
