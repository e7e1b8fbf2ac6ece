"""Budgets of a recipe as limits of the exact program: parameters, bytes, FLOPs, milliseconds, any number together."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import floor

from multipruner.config.recipe import Recipe
from multipruner.core.costs import Costs
from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import LatencyTable
from multipruner.core.structure import BlockKind, LayerSize, Structure
from multipruner.engine.prunable import Prunable
from multipruner.search import Limit
from multipruner.search.program import alone

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")
UNITS: dict[str, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "M": 1e6, "B": 1e9},
    "weight_bytes": {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "kv_bytes": {"": 1, "KiB": 2**10, "MiB": 2**20, "KB": 1e3, "MB": 1e6},
    "flops": {"": 1, "M": 1e6, "G": 1e9},
    "latency": {"": 1, "ms": 1, "s": 1e3},
}
"""What a unit multiplies, by cost; latency is in milliseconds."""


def amount_of(name: str, text: str, dense: float) -> float:
    """An upper bound as typed: ``0.7x`` of the dense model, or a number with a unit.

    Raises:
        ConfigError: for what is neither, or a share outside 0 to 1.
    """
    units = UNITS[name]
    match = _AMOUNT.fullmatch(text)
    if match and match[2] == "x":
        share = float(match[1])
        if not 0 < share <= 1:
            raise ConfigError(f"{name} {text}: a share of the dense model lies between 0 and 1")
        return share * dense
    if not match or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ConfigError(f"{name} {text!r}: give a share such as 0.7x, or a number ({known})")
    return float(match[1]) * units[match[2]]


def limits_of(recipe: Recipe, prunable: Prunable) -> tuple[Limit, ...]:
    """All bounds of a recipe.

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
            limits.append(_latency(recipe, prunable, text))
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

    return Limit(name, cost, constant, most)


def _latency(recipe: Recipe, prunable: Prunable, text: str) -> Limit:
    """Milliseconds of a workload. A removed block costs a little while its layer lives; the sum counts it always."""
    table, workload = latency_table_of(recipe, prunable)
    most = amount_of("latency", text, table.milliseconds(prunable.dense, workload))

    def cost(layer: int, kind: BlockKind, size: LayerSize) -> float:
        return table.block_milliseconds(kind, alone(size, kind), workload)

    return Limit("latency", cost, table.constant(workload), most)


def latency_table_of(recipe: Recipe, prunable: Prunable) -> tuple[LatencyTable, str]:
    """The recipe's table and workload.

    Raises:
        ConfigError: when the table is of other shapes or has no such workload.
    """
    from multipruner.latency.bench import shapes_of

    assert recipe.latency_table is not None
    table = LatencyTable.read(recipe.latency_table)
    table.check_shapes(shapes_of(prunable.model))
    if not table.workloads:
        raise ConfigError(f"{recipe.latency_table} has no workload: measure anew")
    workload = recipe.workload or table.workloads[0]
    table.row(workload)
    return table, workload
