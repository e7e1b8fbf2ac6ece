"""The weights that a plan leaves of the dense model's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from multipruner.core.axes import Counts
from multipruner.core.errors import ConfigError
from multipruner.core.families import Family, leading, units
from multipruner.core.plan import KeptLayer, PruningPlan, surviving_layers
from multipruner.core.structure import KINDS, LayerSize
from multipruner.engine.cutting import Cut, cuts, take


def pruned_weights(
    weights: Mapping[str, Tensor], plan: PruningPlan, spec: Family, constants: Counts
) -> dict[str, Tensor]:
    """Return the state dictionary that a plan leaves of the dense one: plan + dense weights => the same bits, always.

    Args:
        weights: dense state dictionary, names as in the stock model.
        plan: what stays.
        spec: the family's row.
        constants: the numbers that the plan does not change, by their names in layouts.

    Returns:
        New, contiguous tensors for what was cut, the given ones for the rest; decoder layers are renumbered.

    Raises:
        ConfigError: when the weights do not have the shapes that the plan was made for.
    """
    pattern = re.compile(rf"^({re.escape(spec.decoder)}\.{re.escape(spec.layers)})\.(\d+)\.(.+)$")
    renumbered = {old: new for new, old in enumerate(surviving_layers(plan))}
    found = [_layer_cuts(kept, full, spec, constants) for kept, full in zip(plan.layers, plan.dense, strict=True)]
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = pattern.match(name)
        if match is None:
            result[name] = tensor
            continue
        number, inner = int(match[2]), match[3]
        if number not in renumbered or _belongs_to_removed(inner, plan.layers[number].size, spec):
            continue
        shape, cut = found[number].get(inner, (tuple(tensor.shape), {}))
        if tensor.shape != shape:
            raise ConfigError(f"{name} is {tuple(tensor.shape)}, the plan was made for a model where it is {shape}")
        result[f"{match[1]}.{renumbered[number]}.{inner}"] = take(tensor, cut).clone() if cut else tensor
    return result


def _layer_cuts(
    kept: KeptLayer, full: LayerSize, spec: Family, constants: Counts
) -> dict[str, tuple[tuple[int, ...], Cut]]:
    """Return shape and cut of every tensor of a layer that depends on its size, by its name in the layer."""
    chosen, dense = units(kept, full), {**constants, **leading(full)}
    found: dict[str, tuple[tuple[int, ...], Cut]] = {}
    for block in (spec.block(kind) for kind in KINDS):
        cut = cuts(block, chosen, dense)
        for tensor in block.tensors:
            found[f"{block.path}.{tensor.path}"] = (tensor.shape(dense), cut.get(tensor.path, {}))
    return found


def _belongs_to_removed(inner: str, size: LayerSize, spec: Family) -> bool:
    """Tell whether a tensor of a layer belongs to a block, or to a norm that goes with it, that is gone."""
    gone = (spec.block(kind) for kind in KINDS if not size.has(kind))
    return any(inner.startswith(f"{path}.") for block in gone for path in (block.path, *block.norms))
