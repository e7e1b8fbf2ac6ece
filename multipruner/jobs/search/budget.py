"""What the candidates of a search may cost."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor

from multipruner.config.amounts import amount_of
from multipruner.config.recipe import Recipe
from multipruner.core.costs import cost_named
from multipruner.core.structure import Structure
from multipruner.engine.prunable import Prunable
from multipruner.jobs.limits import measures_of
from multipruner.jobs.setting import grid_of
from multipruner.search.ladder import Ladder
from multipruner.search.limits import Budget, Limit

from .options import SearchOptions

Cost = Callable[[Structure], float]


def cost_of(name: str, recipe: Recipe, prunable: Prunable) -> Cost:
    """Return a cost by its name; latency is in milliseconds, by the recipe's table and workload.

    Raises:
        ConfigError: for latency without a table, or with one of another model.
    """
    cost, measures = cost_named(name), measures_of(recipe, prunable)
    if cost.needs_table:
        _ = measures.timed
    return lambda structure: cost.of(measures, structure)


def budget_of(recipe: Recipe, prunable: Prunable, options: SearchOptions) -> Budget:
    """Return what structures may cost.

    With the loss alone, at least the ratio is removed, and at most the tolerance more. With costs beside it the ratio
    becomes a range, for the front to spread over. Other budgets of the recipe bound from above; where there are any,
    and the loss is the only objective, structures are grown until nothing fits any more.

    Raises:
        ConfigError: when a budget cannot be read.
    """
    costs = prunable.costs
    dense = costs.parameters(prunable.dense)
    others: list[Limit] = []
    for name, text in recipe.budgets.items():
        cost = cost_of(name, recipe, prunable)
        most = amount_of(name, text, cost(prunable.dense))
        if most < cost(prunable.dense):
            others.append(Limit(name, cost, most))
    bounds = list(others)
    if recipe.ratio is not None and options.several:
        low, high = options.range(recipe.ratio)
        bounds.append(Limit("parameters", costs.parameters, floor((1 - low) * dense), ceil((1 - high) * dense)))
    elif recipe.ratio is not None:
        most = floor((1 - recipe.ratio) * dense)
        tolerance = options.tolerance if options.tolerance is not None else one_step(recipe, prunable)
        bound = Limit("parameters", costs.parameters, most)
        bounds.append(bound if others else Limit("parameters", costs.parameters, most, most - ceil(tolerance * dense)))
    return Budget(tuple(bounds), fill=bool(others) and not options.several)


def one_step(recipe: Recipe, prunable: Prunable) -> float:
    """Return the share of all parameters that the largest single step of a width removes; where none may change, the
    largest block.
    """
    costs, ladder = prunable.costs, Ladder(prunable.anatomy, grid_of(recipe, prunable))
    largest, tops = 0, ladder.tops
    widths = [rung for rung, top in enumerate(tops) if top > 1 or not ladder.removes(rung)]
    for rung in widths or range(len(ladder)):
        levels = list(tops)
        levels[rung] -= 1
        largest = max(largest, costs.parameters(prunable.dense) - costs.parameters(ladder.structure(levels)))
    return largest / costs.parameters(prunable.dense)
