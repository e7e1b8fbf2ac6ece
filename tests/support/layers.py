"""Structures written layer by layer: (query heads, KV heads, channels), which reads better than rows of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from multipruner.core.earlier import sizes_of_layer
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Anatomy, Place, Structure


class Layer(NamedTuple):
    """What one decoder layer keeps; zeros where a block is gone."""

    query_heads: int
    kv_heads: int
    channels: int


def anatomy_of(*layers: Sequence[int], head_dim: int = 16, hidden: int = 64) -> Anatomy:
    """A dense model of these layers; every block must be there."""
    rows = [zip(("attention", "mlp"), sizes_of_layer(layer), strict=True) for layer in layers]
    places = [Place(number, kind, size) for number, row in enumerate(rows) for kind, size in row if size]
    return Anatomy(tuple(places), {"head_dim": head_dim, "hidden": hidden})


def uniform(layers: int, query_heads: int, kv_heads: int, channels: int, head_dim: int = 16) -> Anatomy:
    """A dense model of layers that are all alike."""
    return anatomy_of(*[(query_heads, kv_heads, channels)] * layers, head_dim=head_dim)


def structure_of(*layers: Sequence[int]) -> Structure:
    """A structure of these layers, both blocks of each."""
    return Structure.from_json(list(map(list, layers)))


def cut_dimensions(anatomy: Anatomy, structure: Structure) -> set[str]:
    """The dimensions of what a structure takes away."""
    rows = list(zip(anatomy, structure, strict=True))
    axes = [pair for place, size in rows if size for pair in zip(place.axes, size, place.dense, strict=True)]
    return {axis.dimension for axis, count, most in axes if count != most} | {"blocks" for _, size in rows if not size}


def layers_of(structure: Structure) -> list[Layer]:
    """The layers of a structure of attention and MLP blocks in turn."""
    pairs = zip(structure.blocks[::2], structure.blocks[1::2], strict=True)
    return [
        Layer(attention[0] * attention[1] if attention else 0, attention[0] if attention else 0, mlp[0] if mlp else 0)
        for attention, mlp in pairs
    ]


def changed(structure: Structure, layer: int, size: Sequence[int]) -> Structure:
    """A structure with another layer in the place of one."""
    rows = layers_of(structure)
    return structure_of(*rows[:layer], size, *rows[layer + 1 :])


def halved(anatomy: Anatomy, *kinds: str) -> Structure:
    """Half the units of the first axis of every block, or of every block of some kinds."""
    sizes = ((place, place.dense) for place in anatomy)
    return Structure(
        tuple((size[0] // 2, *size[1:]) if not kinds or place.kind in kinds else size for place, size in sizes)
    )


def plan_of_version_1(plan: PruningPlan) -> dict[str, Any]:
    """The plan as version 1 wrote it."""
    layers = []
    for layer in range(plan.anatomy.layers):
        attention, mlp = (plan.anatomy.at(layer, kind) for kind in ("attention", "mlp"))
        groups, inside = plan.blocks[attention].axes or ((), ())
        per = plan.anatomy[attention].dense[1]
        heads: Any = [group * per + head for group, row in zip(groups, inside, strict=True) for head in row]  # pyright: ignore
        row = {"query_heads": heads, "kv_heads": groups, "channels": (plan.blocks[mlp].axes or ((),))[0]}
        layers.append({key: ",".join(map(str, units)) for key, units in row.items()})
    base = {"name": plan.model, "revision": None, "fingerprint": None, "model_type": plan.model_type}
    dense = [list(layer) for layer in layers_of(plan.dense)]
    return {"format": "multipruner-plan", "version": 1, "base_model": base, "dense": dense, "layers": layers}
