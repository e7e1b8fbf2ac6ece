"""The coefficients of :class:`~multipruner.core.costs.Costs`, read off a model."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from multipruner.core.axes import Counts
from multipruner.core.blocks import BlockSpec, TensorSpec
from multipruner.core.costs import Costs, LayerCost
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import Family, leading
from multipruner.core.structure import Structure


def costs_of(model: Any, spec: Family, dense: Structure, constants: Counts, stored: torch.dtype) -> Costs:
    """Read the coefficients off the first decoder layer and the rest of a model, its weights ``stored`` in a type.

    Raises:
        UnsupportedModelError: when a tensor has another shape than its row says.
    """
    parameters = dict(model.named_parameters())  # tied tensors appear once
    prefix = f"{spec.decoder}.{spec.layers}."
    constant = sum(t.numel() for name, t in parameters.items() if not name.startswith(prefix))
    layer = model.get_submodule(spec.decoder).get_submodule(spec.layers)[0]
    head = model.get_submodule(spec.head).weight
    return Costs(
        dense=dense,
        layer=_layer_cost(layer, spec, {**constants, **leading(dense[0])}),
        constant=constant,
        head_dim=constants["head_dim"],
        head_macs=head.numel(),
        bytes_per_parameter=stored.itemsize,
    )


def _layer_cost(layer: nn.Module, spec: Family, dense: Counts) -> LayerCost:
    """What one head or channel weighs, and what of a block stays as long as the block does."""
    attention, mlp = (_Block(layer, block, dense, spec.model_type) for block in (spec.attention, spec.mlp))
    bare = {"kv_groups": 0, "queries": 0, "channels": 0}
    group, query, channel = {**bare, "kv_groups": 1}, {**bare, "kv_groups": 1, "queries": 1}, {**bare, "channels": 1}
    return LayerCost(
        attention_fixed=attention.parameters(bare),
        per_query_head=attention.parameters(query) - attention.parameters(group),
        per_kv_head=attention.parameters(group) - attention.parameters(bare),
        mlp_fixed=mlp.parameters(bare),
        per_channel=mlp.parameters(channel) - mlp.parameters(bare),
        matrix_per_query_head=attention.products(query) - attention.products(group),
        matrix_per_kv_head=attention.products(group),
        matrix_per_channel=mlp.products(channel),
    )


class _Block:
    """A block of a model and what it weighs at any size.

    Raises:
        UnsupportedModelError: when a tensor has another shape than the row says.
    """

    def __init__(self, layer: nn.Module, block: BlockSpec, dense: Counts, model_type: str) -> None:
        there = dict(layer.get_submodule(block.path).named_parameters())
        self._dense, self._tensors = dense, [tensor for tensor in block.tensors if tensor.path in there]
        for tensor in self._tensors:
            shape = tuple(there[tensor.path].shape)
            if shape != tensor.shape(dense):
                layout = " x ".join(layout.text for layout in tensor.dims)
                raise UnsupportedModelError(
                    f"{block.path}.{tensor.path} is {shape}; the row of {model_type!r} in multipruner/core/families.py "
                    f"says {layout}, which is {tensor.shape(dense)}"
                )
        modules = (layer.get_submodule(path) for path in (block.path, *block.norms))
        whole = sum(tensor.numel() for module in modules for tensor in module.parameters())
        self._rest = whole - self._sum(self._tensors, dense)

    @staticmethod
    def _sum(tensors: list[TensorSpec], counts: Counts) -> int:
        return sum(prod(tensor.shape(counts)) for tensor in tensors)

    def parameters(self, counts: Counts) -> int:
        """Parameters, with the norms that go with it, where it has so much of its axes."""
        return self._rest + self._sum(self._tensors, {**self._dense, **counts})

    def products(self, counts: Counts) -> int:
        """Multiply-accumulates of its matrices for one token."""
        return self._sum([tensor for tensor in self._tensors if len(tensor.dims) == 2], {**self._dense, **counts})


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
