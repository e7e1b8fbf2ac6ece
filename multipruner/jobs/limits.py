"""Budgets of a recipe as limits of the exact program: any number of them together."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import floor

from multipruner.config.amounts import amount_of
from multipruner.config.recipe import Recipe
from multipruner.core.axes import AXES, BLOCK_KINDS
from multipruner.core.costs import COSTS, Cost, Measures, cost_named
from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import LatencyTable
from multipruner.core.structure import GONE, Size
from multipruner.engine.prunable import Prunable
from multipruner.latency.bench import shapes_of
from multipruner.search import Limit

Timed = tuple[LatencyTable, str]
"""A latency table and the workload that counts."""


def limits_of(recipe: Recipe, prunable: Prunable, latency: Timed | None = None) -> tuple[Limit, ...]:
    """Return all bounds of a recipe; its latency table is read where it is not given.

    Raises:
        ConfigError: when one cannot be read or bounds nothing of the model, or the latency table is of another one.
    """
    measures = measures_of(recipe, prunable, latency)
    whole = replace(measures, costs=prunable.costs.original)  # what shares of the dense model are shares of
    limits = []
    if recipe.ratio is not None:
        most = floor((1 - recipe.ratio) * prunable.costs.original.parameters(prunable.dense))
        limits.append(_limit(COSTS["parameters"], measures, most))
    for name, text in recipe.budgets.items():
        cost = cost_named(name)
        dense = cost.of(whole, prunable.dense)
        if not dense:
            raise ConfigError(f"{cost.flag} {text}: the dense model has none of what that bounds; leave it out")
        limits.append(_limit(cost, measures, amount_of(name, text, dense)))
    return tuple(limits)


def measures_of(recipe: Recipe, prunable: Prunable, latency: Timed | None = None) -> Measures:
    """Return what costs are read from: the model, and the recipe's latency table where it has one.

    Args:
        recipe: names the table.
        prunable: the model.
        latency: the table and its workload; read where they are not given.

    Raises:
        ConfigError: when the latency table is of another model.
    """
    if recipe.latency_table is None:
        return Measures(prunable.costs)
    return Measures(prunable.costs, *(latency or latency_table_of(recipe, prunable)))


def _limit(cost: Cost, measures: Measures, most: float) -> Limit:
    """Bound a cost as a sum over blocks: what one costs is what the dense model with it costs more than without it.

    Where a row says itself what a block costs, that is taken. What blocks share, such as one norm for both of a layer,
    counts as the constant: only a model that loses whole layers costs less than is said here.
    """
    dense = measures.costs.dense

    @cache
    def without(block: int) -> float:
        return cost.of(measures, dense.replace(block, GONE))

    def of_block(block: int, size: Size) -> float:
        if cost.block is not None:
            return cost.block(measures, block, size)
        return cost.of(measures, dense.replace(block, size)) - without(block) if size else 0

    if cost.rest is not None:
        constant = cost.rest(measures)
    else:
        constant = cost.of(measures, dense) - sum(of_block(block, size) for block, size in enumerate(dense))

    return Limit.of_blocks(cost.name, of_block, constant, most)


def latency_table_of(recipe: Recipe, prunable: Prunable) -> Timed:
    """Return the recipe's table, of every hidden size that it knows, and the workload.

    Args:
        recipe: names both.
        prunable: the model; one with a narrower residual stream needs a table of its hidden size.

    Raises:
        ConfigError: when the table is of other shapes or has no such workload, or not the model's hidden size.
    """
    assert recipe.latency_table is not None
    table = LatencyTable.read(recipe.latency_table)
    table.check_shapes(shapes_of(prunable.original.model))
    if not table.workloads:
        raise ConfigError(f"{recipe.latency_table} has no workload: measure anew")
    workload = recipe.workload or table.workloads[0]
    for kind, entries in table.row(workload, prunable.costs.hidden).blocks.items():
        for number, axis in enumerate(BLOCK_KINDS[kind].always):
            counts = {size[number] for size in entries if size}
            free = axis.within and not axis.active and getattr(recipe, axis.setting) is not None
            if free and len(counts) == 1 < max(counts):
                raise ConfigError(
                    f"{recipe.latency_table} knows {AXES[axis.within].label} of all {max(counts)} {axis.label} only, "
                    f"as earlier versions measured them; measure anew, or give no {axis.step}"
                )
    return table, workload
