"""The weights that a plan leaves of the dense model's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from multipruner.core.errors import ConfigError
from multipruner.core.families import ArchitectureSpec
from multipruner.core.plan import KeptLayer, PruningPlan, surviving_layers
from multipruner.core.structure import BlockKind, LayerSize
from multipruner.engine.cutting import Index, kept_rows, take, tensor_indices


def pruned_weights(
    weights: Mapping[str, Tensor], plan: PruningPlan, spec: ArchitectureSpec, head_dim: int
) -> dict[str, Tensor]:
    """The state dictionary that a plan leaves of the dense one: plan + dense weights => the same bits, always.

    Args:
        weights: dense state dictionary, names as in the stock model.
        plan: what stays.
        spec: the family's row.
        head_dim: width of one attention head.

    Returns:
        New, contiguous tensors for what was cut, the given ones for the rest; decoder layers are renumbered.

    Raises:
        ConfigError: when the weights do not have the shapes that the plan was made for.
    """
    pattern = re.compile(rf"^({re.escape(spec.decoder)}\.{re.escape(spec.layers)})\.(\d+)\.(.+)$")
    renumbered = {old: new for new, old in enumerate(surviving_layers(plan))}
    cuts = [_layer_cuts(kept, full, spec, head_dim) for kept, full in zip(plan.layers, plan.dense, strict=True)]
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = pattern.match(name)
        if match is None:
            result[name] = tensor
            continue
        number, inner = int(match[2]), match[3]
        if number not in renumbered or _belongs_to_removed(inner, plan.layers[number].size, spec):
            continue
        cut = cuts[number].get(inner)
        try:
            result[f"{match[1]}.{renumbered[number]}.{inner}"] = tensor if cut is None else take(tensor, *cut)
        except IndexError as error:
            raise ConfigError(f"{name} {tuple(tensor.shape)} is smaller than the plan expects: {error}") from None
    return result


def _layer_cuts(
    kept: KeptLayer, full: LayerSize, spec: ArchitectureSpec, head_dim: int
) -> dict[str, tuple[int, Index]]:
    rows = kept_rows(kept, head_dim)
    changed: list[BlockKind] = [k for k in ("attention", "mlp") if not kept.size.same_block(full, k)]
    return {
        f"{spec.block(kind).path}.{name}": cut
        for kind in changed
        for name, cut in tensor_indices(spec.block(kind), rows, full, head_dim).items()
    }


def _belongs_to_removed(inner: str, size: LayerSize, spec: ArchitectureSpec) -> bool:
    """Whether a tensor of a layer belongs to a block, or to the norm before it, that is gone."""
    for kind, there in (("attention", size.has_attention), ("mlp", size.has_mlp)):
        block = spec.block(kind)
        if not there and inner.startswith((f"{block.path}.", f"{block.norm}.")):
            return True
    return False
