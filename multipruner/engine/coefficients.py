"""The coefficients of :class:`~multipruner.core.costs.Costs`, read off a model."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from multipruner.core.blocks import BlockSpec, TensorSpec
from multipruner.core.costs import BlockCost, Costs
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import Family
from multipruner.core.structure import Anatomy, Place, Size, counts_of


def costs_of(model: Any, spec: Family, anatomy: Anatomy, stored: torch.dtype) -> Costs:
    """Read the coefficients off a model, its weights ``stored`` in a type.

    Raises:
        UnsupportedModelError: when a tensor has another shape than its row says.
    """
    parameters = dict(model.named_parameters())  # tied tensors appear once
    prefix = f"{spec.decoder}.{spec.layers}."
    outside = {name: tensor for name, tensor in parameters.items() if not name.startswith(prefix)}
    sides = {name: side for name in outside if (side := spec.stream_side(name)) is not None}
    layers = model.get_submodule(spec.decoder).get_submodule(spec.layers)
    alike: dict[tuple[str, Size, tuple[tuple[str, tuple[int, ...]], ...]], BlockCost] = {}
    blocks = []
    for place in anatomy:
        block = _Block(layers[place.layer], spec, place, {**anatomy.constants})
        blocks.append(alike.setdefault((place.kind, place.dense, block.shapes), block.cost))
    shared = {
        number: sum(t.numel() for norm in spec.shared_norms for t in layer.get_submodule(norm).parameters())
        for number, layer in enumerate(layers)
        if spec.shared_norms
    }
    return Costs(
        anatomy=anatomy,
        shared=shared,
        blocks=tuple(blocks),
        constant=sum(tensor.numel() for tensor in outside.values()),
        head_macs=model.get_submodule(spec.head).weight.numel(),
        bytes_per_parameter=stored.itemsize,
        stream=sum(outside[name].numel() // outside[name].shape[side] for name, side in sides.items()),
    )


class _Block:
    """A block of a model, its tensors compared with its row.

    Attributes:
        shapes: of all its parameters and of the norms that leave with it, by name.
        cost: of it.

    Raises:
        UnsupportedModelError: when a tensor has another shape than the row says.
    """

    def __init__(self, layer: nn.Module, spec: Family, place: Place, constants: dict[str, int]) -> None:
        block = spec.block(place.kind)
        counts = {**constants, **counts_of(block.kind, place.dense)}
        modules = {path: layer.get_submodule(path) for path in (*block.modules, *spec.leaving(block))}
        there = {
            f"{path}.{name}".removeprefix(block.within("")): tensor
            for path in block.modules
            for name, tensor in modules[path].named_parameters()
        }
        tensors = [tensor for tensor in block.tensors if tensor.path in there]
        for tensor in tensors:
            self._check(tensor, tuple(there[tensor.path].shape), counts, block, spec.model_type)
        self.shapes = tuple(
            (f"{path}.{name}", tuple(tensor.shape)) for path, module in modules.items() for name, tensor in
            module.named_parameters()
        )  # fmt: skip
        whole = sum(prod(shape) for _, shape in self.shapes)
        fixed = whole - sum(prod(tensor.shape(counts)) for tensor in tensors)
        layouts = tuple(tensor.weighed for tensor in tensors)
        listed = {tensor.path for tensor in tensors}
        others = sum(tensor.numel() for name, tensor in there.items() if name not in listed and tensor.ndim >= 2)
        gains = sum(1 for path in spec.leaving(block) for _ in layer.get_submodule(path).parameters())
        self.cost = BlockCost(block.kind, constants, fixed, layouts, block.cached, block.scores, others, gains)

    @staticmethod
    def _check(
        tensor: TensorSpec, shape: tuple[int, ...], counts: dict[str, int], block: BlockSpec, model_type: str
    ) -> None:
        if shape != tensor.shape(counts):
            layout = " x ".join(layout.text for layout in tensor.dims)
            raise UnsupportedModelError(
                f"{block.within(tensor.path)} is {shape}; the row of {model_type!r} in multipruner/core/families/ "
                f"says {layout}, which is {tensor.shape(counts)}"
            )


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
