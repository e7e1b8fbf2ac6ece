"""Budgets of a recipe as limits of the exact program: parameters, bytes, FLOPs, milliseconds, any number together."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

from multipruner.config.amounts import amount_of
from multipruner.config.recipe import Recipe
from multipruner.core.costs import Costs
from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import LatencyTable
from multipruner.core.structure import BlockKind, LayerSize, Structure
from multipruner.engine.prunable import Prunable
from multipruner.latency.bench import shapes_of
from multipruner.search import Limit
from multipruner.search.limits import alone

Timed = tuple[LatencyTable, str]
"""A latency table and the workload that counts."""


def limits_of(recipe: Recipe, prunable: Prunable, latency: Timed | None = None) -> tuple[Limit, ...]:
    """All bounds of a recipe; its latency table is read where it is not given.

    Raises:
        ConfigError: when one cannot be read, or the latency table is of another model.
    """
    costs, dense = prunable.costs, prunable.costs.dense
    limits = []
    if recipe.ratio is not None:
        most = floor((1 - recipe.ratio) * costs.parameters(dense))
        limits.append(_of_costs("parameters", costs.parameters, costs, most))
    counted: dict[str, Callable[[Structure], int]] = {
        "parameters": costs.parameters,
        "weight_bytes": costs.weight_bytes,
        "kv_bytes": costs.kv_bytes_per_token,
        "flops": costs.flops_per_token,
    }
    for name, text in recipe.budgets.items():
        if name == "latency":
            limits.append(_latency(latency or latency_table_of(recipe, prunable), prunable.dense, text))
        else:
            most = amount_of(name, text, counted[name](dense))
            limits.append(_of_costs(name, counted[name], costs, most))
    return tuple(limits)


def _of_costs(name: str, count: Callable[[Structure], int], costs: Costs, most: float) -> Limit:
    """Costs are sums over blocks: what one costs is what a model of that block alone costs more than an empty one."""
    layers = len(costs.dense)
    empty = Structure((LayerSize(0, 0, 0),) * layers)
    constant = count(empty)

    def cost(layer: int, kind: BlockKind, size: LayerSize) -> float:
        return count(empty.replace(layer, alone(size, kind))) - constant

    return Limit.of_blocks(name, cost, constant, most)


def _latency(timed: Timed, dense: Structure, text: str) -> Limit:
    """Milliseconds of a workload. A removed block costs a little while its layer lives; the sum counts it always."""
    table, workload = timed
    most = amount_of("latency", text, table.milliseconds(dense, workload))

    def cost(layer: int, kind: BlockKind, size: LayerSize) -> float:
        return table.block_milliseconds(kind, alone(size, kind), workload)

    return Limit.of_blocks("latency", cost, table.constant(workload), most)


def latency_table_of(recipe: Recipe, prunable: Prunable) -> Timed:
    """The recipe's table and workload.

    Raises:
        ConfigError: when the table is of other shapes or has no such workload.
    """
    assert recipe.latency_table is not None
    table = LatencyTable.read(recipe.latency_table)
    table.check_shapes(shapes_of(prunable.model))
    if not table.workloads:
        raise ConfigError(f"{recipe.latency_table} has no workload: measure anew")
    workload = recipe.workload or table.workloads[0]
    table.row(workload)
    return table, workload
