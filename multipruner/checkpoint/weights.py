"""The weights that a plan leaves of the dense model's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from multipruner.core.axes import Counts
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import Family
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import counts_of
from multipruner.engine.cutting import Cut, cuts, take

Own = Callable[[Tensor], Tensor]
"""Makes a tensor with memory of its own, of the same numbers."""


def pruned_weights(
    weights: Mapping[str, Tensor], plan: PruningPlan, spec: Family, constants: Counts, own: Own = torch.clone
) -> dict[str, Tensor]:
    """Return the state dictionary that a plan leaves of the dense one: plan + dense weights => the same bits, always.

    Args:
        weights: dense state dictionary, names as in the stock model.
        plan: what stays.
        spec: the family's row.
        constants: the numbers that the plan does not change, by their names in layouts.
        own: makes a tensor of its own of what is cut out of another one.

    Where the residual stream becomes narrower, embeddings that the model multiplies by the square root of its width
    take over what that loses; a tied head gives it back through the last norm.

    Returns:
        New, contiguous tensors for what was cut, the given ones for the rest; decoder layers are renumbered.

    Raises:
        ConfigError: when the weights do not have the shapes that the plan was made for.
        UnsupportedModelError: when the residual stream becomes narrower, and the row does not say how a tensor lies.
    """
    result: dict[str, Tensor] = {}
    for name, (old, cut) in what_stays({key: tuple(one.shape) for key, one in weights.items()}, plan, spec, constants):
        result[name] = own(take(weights[old], cut)) if cut else weights[old]
    return {**result, **_rescaled(result, weights, plan, spec)}


def what_stays(
    shapes: Mapping[str, tuple[int, ...]], plan: PruningPlan, spec: Family, constants: Counts
) -> Iterator[tuple[str, tuple[str, Cut]]]:
    """Yield what a plan leaves of every dense tensor, wherever the tensors are: the name that it has afterwards, the
    name in the dense model, and what stays of its sides.

    Args:
        shapes: of the dense tensors, by their names in the stock model.
        plan, spec, constants: see :func:`pruned_weights`.

    Raises:
        ConfigError, UnsupportedModelError: see :func:`pruned_weights`.
    """
    pattern = re.compile(rf"^({re.escape(spec.decoder)}\.{re.escape(spec.layers)})\.(\d+)\.(.+)$")
    renumbered = {old: new for new, old in enumerate(plan.layers)}
    found = _all_cuts(plan, spec, constants)
    gone = _removed_paths(plan, spec)
    for name, there in shapes.items():
        match = pattern.match(name)
        if match is None:
            yield name, (name, _outside(name, there, plan, spec))
            continue
        number, inner = int(match[2]), match[3]
        if number not in renumbered or inner.startswith(gone.get(number, ())):
            continue
        shape, cut = found.get((number, inner), (there, {}))
        if there != shape:
            raise ConfigError(f"{name} is {there}, the plan was made for a model where it is {shape}")
        yield f"{match[1]}.{renumbered[number]}.{inner}", (name, cut)


def _rescaled(
    kept: Mapping[str, Tensor], weights: Mapping[str, Tensor], plan: PruningPlan, spec: Family
) -> dict[str, Tensor]:
    """Return what changes so that embeddings, multiplied by the root of the narrower width, are what they were."""
    if plan.stream is None or not spec.embeddings_scaled:
        return {}
    factor = (plan.hidden / len(plan.stream)) ** 0.5
    embeddings, head = f"{spec.decoder}.{spec.embeddings}.weight", f"{spec.head}.weight"
    found = {embeddings: kept[embeddings] * factor}
    if head not in weights or weights[head].data_ptr() == weights[embeddings].data_ptr():
        norm = f"{spec.decoder}.{spec.final_norm}.weight"
        gain = (kept[norm].float() + spec.norm_offset) / factor - spec.norm_offset
        found |= {norm: gain.to(kept[norm].dtype), **({head: found[embeddings]} if head in kept else {})}
    return found


def _all_cuts(plan: PruningPlan, spec: Family, constants: Counts) -> dict[tuple[int, str], tuple[tuple[int, ...], Cut]]:
    """Return shape and cut of every tensor that depends on a block's size, by its layer and its name in that."""
    found: dict[tuple[int, str], tuple[tuple[int, ...], Cut]] = {}
    for number, place in enumerate(plan.anatomy):
        block, dense = spec.block(place.kind), {**constants, **counts_of(place.kind, place.dense)}
        cut = cuts(block, {**plan.kept(number), **plan.kept_of_stream}, dense)
        for tensor in block.tensors:
            found[place.layer, block.within(tensor.path)] = (tensor.shape(dense), cut.get(tensor.path, {}))
        if plan.stream is not None:
            norms = [f"{path}.{name}" for path in block.norms for name in ("weight", "bias")]
            found |= {(place.layer, norm): ((plan.hidden,), {0: torch.tensor(plan.stream)}) for norm in norms}
    return found


def _outside(name: str, shape: tuple[int, ...], plan: PruningPlan, spec: Family) -> Cut:
    """Return what stays of the sides of a tensor outside the decoder layers.

    Raises:
        UnsupportedModelError: when it is as wide as a residual stream that becomes narrower, and nothing says where.
    """
    if plan.stream is None:
        return {}
    side = spec.stream_side(name)
    if side is None and plan.hidden in shape and name != f"{spec.head}.bias":
        raise UnsupportedModelError(
            f"{spec.model_type}: {name} may lie along the residual stream: give no --hidden-size"
        )
    return {} if side is None else {side: torch.tensor(plan.stream)}


def _removed_paths(plan: PruningPlan, spec: Family) -> dict[int, tuple[str, ...]]:
    """Return layer -> the beginnings of the names of its tensors that belong to blocks, and norms with them, that
    are gone.
    """
    found: dict[int, tuple[str, ...]] = {}
    for place, kept in zip(plan.anatomy, plan.blocks, strict=True):
        if not kept.axes:
            block = spec.block(place.kind)
            paths = tuple(f"{path}." for path in (*block.modules, *spec.leaving(block)))
            found[place.layer] = (*found.get(place.layer, ()), *paths)
    return found
