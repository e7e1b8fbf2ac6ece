"""Cutting weights: physically smaller tensors, never masks.

Two users share the row arithmetic here. The objective asks for *views* of a block's weights (a candidate is a
prefix of the ranked weights, so nothing is copied); the checkpoint takes the *weights* that a plan leaves
(:mod:`multipruner.checkpoint.weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from multipruner.core.families import BlockSpec, Part, quantity, rows_per_part
from multipruner.core.plan import KeptLayer
from multipruner.core.structure import LayerSize, queries_per_group

Index = slice | Tensor
"""Rows of one part: a slice gives views, a tensor of indices gives copies."""
M = TypeVar("M", bound=nn.Module)


class Projection(NamedTuple):
    """A block's output projection.

    Attributes:
        weight: [hidden_size, columns].
        bias: [hidden_size], where the stock module has one.
    """

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Projection:
        """Weight and bias of a linear layer, as they are."""
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        return cls(weight, bias if isinstance(bias, Tensor) else None)

    def to(self, dtype: torch.dtype) -> Projection:
        """The same in another dtype."""
        return Projection(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def write(self, module: nn.Module) -> None:
        """Copy into a linear layer of the same shape; without a bias of its own, that of the layer stays."""
        target = Projection.of(module)
        target.weight.copy_(self.weight)
        if target.bias is not None and self.bias is not None:
            target.bias.copy_(self.bias)


def _head_rows(heads: Sequence[int], head_dim: int) -> Tensor:
    """Rows of a projection that belong to these heads."""
    starts = torch.tensor(heads, dtype=torch.long) * head_dim
    return (starts[:, None] + torch.arange(head_dim)).flatten()


def kept_rows(kept: KeptLayer, head_dim: int) -> dict[Part, Index]:
    """Rows of every part that one layer of a plan keeps."""
    query, key_value = _head_rows(kept.query_heads, head_dim), _head_rows(kept.kv_heads, head_dim)
    channels = torch.tensor(kept.channels, dtype=torch.long)
    return {"q": query, "k": key_value, "v": key_value, "gate": channels, "up": channels}


def leading_rows(size: LayerSize, full: LayerSize, head_dim: int) -> dict[Part, Index]:
    """What a size keeps of the rows of every part of a layer in ranked order: the leading ones, as slices.

    Only where several KV groups keep a part of their query heads, these are no slice: the leading heads of each of the
    leading groups, as indices.
    """
    rows: dict[Part, Index] = {
        part: slice(0, rows_per_part(part, size, head_dim)) for part in ("q", "k", "v", "gate", "up")
    }
    per_group, whole = queries_per_group(size), queries_per_group(full)
    if size.kv_heads > 1 and per_group != whole:
        heads = [group * whole + head for group in range(size.kv_heads) for head in range(per_group)]
        rows["q"] = _head_rows(heads, head_dim)
    return rows


def leading_columns(block: BlockSpec, size: LayerSize, full: LayerSize, head_dim: int) -> Tensor:
    """Which columns of a block's output projection, in ranked order, a size keeps; indices, ascending."""
    index = leading_rows(size, full, head_dim)[output_part(block)]
    return torch.arange(index.stop) if isinstance(index, slice) else index


def _fused(parts: Iterable[Part], rows: Mapping[Part, Index], full: LayerSize, head_dim: int) -> Index:
    """Rows of a projection in which several parts are stacked (one part alone keeps its slice)."""
    parts = tuple(parts)
    if len(parts) == 1:
        return rows[parts[0]]
    pieces, start = [], 0
    for part in parts:
        length, index = rows_per_part(part, full, head_dim), rows[part]
        pieces.append(start + (torch.arange(length)[index] if isinstance(index, slice) else index))
        start += length
    return torch.cat(pieces)


def output_part(block: BlockSpec) -> Part:
    """The part whose rows are the columns of the block's output projection."""
    return "q" if any("q" in projection.parts for projection in block.inputs) else "up"


def tensor_indices(
    block: BlockSpec, rows: Mapping[Part, Index], full: LayerSize, head_dim: int
) -> dict[str, tuple[int, Index]]:
    """Which dimension of which tensor of a block is cut: name within the block -> (dimension, index).

    Output biases are not listed: they stay whole as long as the block stays.
    """
    cuts: dict[str, tuple[int, Index]] = {}
    for projection in block.inputs:
        index = _fused(projection.parts, rows, full, head_dim)
        cuts[f"{projection.path}.weight"] = (0, index)
        cuts[f"{projection.path}.bias"] = (0, index)
    cuts[f"{block.output}.weight"] = (1, rows[output_part(block)])
    return cuts


def take(tensor: Tensor, dimension: int, index: Index) -> Tensor:
    """Slice (a view) or gather (a copy) along dimension 0 or 1."""
    if isinstance(index, slice):
        return tensor[index] if dimension == 0 else tensor[:, index]
    return tensor.index_select(dimension, index.to(tensor.device))


def shallow_copy(module: M) -> M:
    """The same module with its own tables of parameters, buffers and children; tensors are shared."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(module.__dict__[table])
    return copy


def slim_block(module: nn.Module, block: BlockSpec, size: LayerSize, full: LayerSize, head_dim: int) -> nn.Module:
    """A block of ``size`` whose weights are the leading rows of ``module``'s; the module itself is untouched."""
    slim, rows = shallow_copy(module), leading_rows(size, full, head_dim)
    for name, (dimension, index) in tensor_indices(block, rows, full, head_dim).items():
        path, _, parameter = name.rpartition(".")
        original = module.get_submodule(path)
        if getattr(original, parameter, None) is None:
            continue
        child = slim.get_submodule(path)
        if child is original:
            child = shallow_copy(original)
            _set_submodule(slim, path, child)
        value = take(getattr(original, parameter).detach(), dimension, index)
        child._parameters[parameter] = nn.Parameter(value, requires_grad=False)
        if parameter == "weight" and isinstance(child, nn.Linear):
            child.out_features, child.in_features = value.shape
    set_size_attributes(slim, block, size, head_dim)
    return slim


def with_output(module: nn.Module, block: BlockSpec, projection: Projection) -> nn.Module:
    """The same block with another output projection (its own bias, where that brings none); the module is untouched."""
    copy, output = shallow_copy(module), shallow_copy(module.get_submodule(block.output))
    output._parameters["weight"] = nn.Parameter(projection.weight, requires_grad=False)
    if projection.bias is not None:
        output._parameters["bias"] = nn.Parameter(projection.bias, requires_grad=False)
    _set_submodule(copy, block.output, output)
    return copy


def scaled_norm(module: nn.Module, gain: Tensor) -> nn.Module:
    """A norm whose output is multiplied by a gain [hidden_size], in its own dtype; the module is untouched.

    Every parameter is multiplied: in all families the output is linear in the norm's own parameters.
    """
    copy = shallow_copy(module)
    for name, parameter in module.named_parameters(recurse=False):
        value = (parameter.detach().float() * gain.to(parameter.device)).to(parameter.dtype)
        copy._parameters[name] = nn.Parameter(value, requires_grad=False)
    return copy


def _set_submodule(root: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = child


def set_size_attributes(module: nn.Module, block: BlockSpec, size: LayerSize, head_dim: int) -> None:
    """Update the plain attributes by which a block's forward knows its own size."""
    for name, what in block.attributes:
        if hasattr(module, name):
            setattr(module, name, quantity(what, size, head_dim))
