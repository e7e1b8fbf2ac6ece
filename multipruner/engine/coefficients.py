"""The coefficients of :class:`~multipruner.core.costs.Costs`, read off a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multipruner.core.costs import Costs, LayerCost
from multipruner.core.families import ArchitectureSpec, BlockSpec, rows_per_part
from multipruner.core.structure import KINDS, BlockKind, LayerSize, Structure

from .cutting import output_part


def costs_of(model: Any, spec: ArchitectureSpec, dense: Structure, head_dim: int, stored: torch.dtype) -> Costs:
    """Read the coefficients off the first decoder layer and the rest of a model, its weights ``stored`` in a type."""
    parameters = dict(model.named_parameters())  # tied tensors appear once
    prefix = f"{spec.decoder}.{spec.layers}."
    constant = sum(t.numel() for name, t in parameters.items() if not name.startswith(prefix))
    layer = model.get_submodule(spec.decoder).get_submodule(spec.layers)[0]
    head = model.get_submodule(spec.head).weight
    return Costs(
        dense=dense,
        layer=_layer_cost(layer, spec, dense[0], head_dim),
        constant=constant,
        head_dim=head_dim,
        head_macs=head.numel(),
        bytes_per_parameter=stored.itemsize,
    )


def _layer_cost(layer: nn.Module, spec: ArchitectureSpec, full: LayerSize, head_dim: int) -> LayerCost:
    """What one head or channel weighs, and what of a block stays as long as the block does."""
    unit: dict[str, tuple[int, int]] = {}
    fixed: dict[BlockKind, int] = {}
    for kind in KINDS:
        block = spec.block(kind)
        module = layer.get_submodule(block.path)
        rows = {part: rows_per_part(part, full, head_dim) for p in block.inputs for part in p.parts}
        per_row = {part: _per_row(module, block, part) for part in rows}
        whole = _count(module) + _count(layer.get_submodule(block.norm))
        fixed[kind] = whole - sum(per_row[part][0] * count for part, count in rows.items())
        unit |= per_row
    per = {part: (both[0] * head_dim, both[1] * head_dim) if part in "qkv" else both for part, both in unit.items()}
    return LayerCost(
        attention_fixed=fixed["attention"],
        per_query_head=per["q"][0],
        per_kv_head=per["k"][0] + per["v"][0],
        mlp_fixed=fixed["mlp"],
        per_channel=per["gate"][0] + per["up"][0],
        matrix_per_query_head=per["q"][1],
        matrix_per_kv_head=per["k"][1] + per["v"][1],
        matrix_per_channel=per["gate"][1] + per["up"][1],
    )


def _per_row(module: nn.Module, block: BlockSpec, part: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates of one row of a part, with the output column it feeds."""
    projection = next(module.get_submodule(p.path) for p in block.inputs if part in p.parts)
    macs = weight_of(projection).shape[1]
    biases = int(getattr(projection, "bias", None) is not None)
    if part == output_part(block):
        macs += weight_of(module.get_submodule(block.output)).shape[0]
    return macs + biases, macs


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
