"""Cutting weights: physically smaller tensors, never masks.

Two users share the arithmetic here. The objective asks for *views* of a block's weights (a candidate is a
prefix of the ranked weights, so nothing is copied); the checkpoint takes the *weights* that a plan leaves
(:mod:`multipruner.checkpoint.weights`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multipruner.core.axes import AXES, VALUES, Counts, Kept
from multipruner.core.blocks import CONFIG, BlockSpec
from multipruner.core.layout import Layout, kept_counts

from .values.partial import PartlyRead, Placed

Index = slice | Tensor
"""What stays of a dimension: a slice gives views, a tensor of indices gives copies."""
Cut = dict[int, Index]
"""Dimension of a tensor -> what stays of it; dimensions that stay whole are not named."""
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
    def of(cls, module: nn.Module, transposed: bool = False) -> Projection:
        """Take weight and bias of a linear layer, as they are.

        Args:
            module: the layer.
            transposed: whether its weight is [columns, hidden_size]; then this is a view of it.
        """
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        return cls(weight.T if transposed else weight, bias if isinstance(bias, Tensor) else None)

    def to(self, dtype: torch.dtype) -> Projection:
        """Return the same in another dtype."""
        return Projection(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def write(self, module: nn.Module, transposed: bool = False) -> None:
        """Copy into a linear layer of the same shape; without a bias of its own, that of the layer stays."""
        target = Projection.of(module, transposed)
        target.weight.copy_(self.weight)
        if target.bias is not None and self.bias is not None:
            target.bias.copy_(self.bias)


def cuts(block: BlockSpec, kept: Kept, dense: Counts) -> dict[str, Cut]:
    """Return what stays of the tensors of a block: name within the block -> cut. Tensors that stay whole are not
    listed.

    Args:
        block: the row's block.
        kept: what stays of its axes, and of the residual stream's where that is named.
        dense: counts of the whole block.
    """
    found: dict[str, Cut] = {}
    for tensor in block.tensors:
        touched = (side for side, layout in enumerate(tensor.dims) if any(name in kept for name in layout.names))
        sides = {side: tensor.dims[side].index(kept, dense) for side in touched}
        cut = {
            side: index if isinstance(index, slice) else torch.tensor(index, dtype=torch.long)
            for side, index in sides.items()
            if index != slice(0, tensor.dims[side].size(dense))
        }
        if cut:
            found[tensor.path] = cut
    return found


def kept_columns(layout: Layout, kept: Kept, dense: Counts) -> Tensor:
    """Tell which columns of an output projection of this layout stay, as indices, in the order of the units that
    stay.
    """
    index = layout.index(kept, dense)
    return torch.arange(index.stop) if isinstance(index, slice) else torch.tensor(index, dtype=torch.long)


def take(tensor: Tensor, cut: Cut) -> Tensor:
    """Slice (a view) or gather (a copy) along dimensions."""
    for side, index in cut.items():
        if isinstance(index, slice):
            tensor = tensor.narrow(side, 0, index.stop)
        else:
            tensor = tensor.index_select(side, index.to(tensor.device))
    return tensor


@torch.no_grad()
def permute(module: nn.Module, block: BlockSpec, order: Kept, dense: Counts, *, back: bool = False) -> None:
    """Put the units of every axis of a block in another order, in place; ``back``: as they were before that."""
    there = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, cut in cuts(block, order, dense).items():
        if name in there:
            moved = {side: torch.as_tensor(index) for side, index in cut.items()}
            there[name].data = take(there[name].data, {s: i.argsort() if back else i for s, i in moved.items()})


def shallow_copy(module: M) -> M:
    """Return the same module with its own tables of parameters, buffers and children; tensors are shared."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(module.__dict__[table])
    return copy


def slim_block(module: nn.Module, block: BlockSpec, kept: Kept, dense: Counts) -> nn.Module:
    """Return a block whose weights are parts of a module's, mostly the leading ones; the module itself is untouched.

    Args:
        module: the block.
        block: its row.
        kept: what the new block has of its axes.
        dense: counts of the module.
    """
    slim, there = shallow_copy(module), {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, cut in cuts(block, kept, dense).items():
        if name not in there:
            continue
        path, _, parameter = name.rpartition(".")
        original = module.get_submodule(path)
        child = slim.get_submodule(path)
        if child is original:
            child = shallow_copy(original)
            _set_submodule(slim, path, child)
        value = take(getattr(original, parameter).detach(), cut)
        if parameter in child._buffers:
            child._buffers[parameter] = value
            continue
        child._parameters[parameter] = nn.Parameter(value, requires_grad=False)
        if parameter == "weight":
            _tell_shape(child, value)
    set_size_attributes(slim, block, kept_counts(kept, dense))
    _tell_heads(slim, block, kept, dense)
    return slim


def _tell_heads(slim: nn.Module, block: BlockSpec, kept: Kept, dense: Counts) -> None:
    """Put projections in the place of a block's that make do with less of every head, where some of it has left."""
    counts = kept_counts(kept, dense)
    wide = {**counts, **{axis.name: dense[axis.name] for axis in AXES.values() if axis.unsaid and axis.name in dense}}
    for axis in (name for name in wide if counts[name] < wide[name]):
        for tensor in block.giving(axis):
            path, rows = tensor.path.rpartition(".")[0], kept_columns(tensor.dims[0], {axis: kept[axis]}, wide)
            given = cast(nn.Linear, slim.get_submodule(path))
            _set_submodule(slim, path, Placed.of(given, rows, tensor.dims[0].size(wide)))
        if axis == VALUES:
            read = cast(nn.Linear, slim.get_submodule(block.output))
            _set_submodule(slim, block.output, PartlyRead.of(read, counts[axis], wide[axis]))


def _tell_shape(module: nn.Module, weight: Tensor) -> None:
    """Update the numbers by which a linear layer knows its own shape."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape


def with_output(module: nn.Module, block: BlockSpec, projection: Projection) -> nn.Module:
    """Return the same block with another output projection (its own bias, where that brings none); the module is
    untouched.
    """
    copy, output = shallow_copy(module), shallow_copy(module.get_submodule(block.output))
    weight = projection.weight.T if block.transposed else projection.weight
    output._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if projection.bias is not None:
        output._parameters["bias"] = nn.Parameter(projection.bias, requires_grad=False)
    _set_submodule(copy, block.output, output)
    return copy


def scaled_norm(module: nn.Module, gain: Tensor, offset: float = 0.0) -> nn.Module:
    """Return a norm whose output is multiplied by a gain [hidden_size], in its own dtype; the module is untouched.

    Every parameter is changed: in all families the output is linear in the norm's own parameters and their offset.

    Args:
        module: the norm.
        gain: for every element of its output, or one for all.
        offset: what its weight is added to before it multiplies.
    """
    copy = shallow_copy(module)
    for name, parameter in module.named_parameters(recurse=False):
        base = offset if name == "weight" else 0.0
        value = ((base + parameter.detach().float()) * gain.to(parameter.device) - base).to(parameter.dtype)
        copy._parameters[name] = nn.Parameter(value, requires_grad=False)
    return copy


def gains_of(norm: nn.Module, offset: float = 0.0) -> Tensor | float:
    """Return the gain that a norm multiplies by, float32 [hidden_size]; 1 where it has none."""
    weight: Any = getattr(norm, "weight", None)
    return weight.detach().float() + offset if isinstance(weight, Tensor) else 1.0


def without_gain(norm: nn.Module, offset: float = 0.0) -> nn.Module:
    """Return a norm whose gain is 1 everywhere, in its own dtype; the module is untouched."""
    result = shallow_copy(norm)
    for name, parameter in norm.named_parameters(recurse=False):
        result._parameters[name] = nn.Parameter(torch.full_like(parameter, 1.0 - offset), requires_grad=False)
    return result


def _set_submodule(root: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = child


def set_size_attributes(module: nn.Module, block: BlockSpec, counts: Counts) -> None:
    """Update the plain attributes by which a block's forward knows its own size, on a configuration of its own."""
    if block.settings:
        module.config = copy.copy(cast(Any, module.config))
    for path, layout in block.attributes:
        owner, _, name = path.rpartition(".")
        known: Any = module.config if path.startswith(CONFIG) else module.get_submodule(owner)
        if hasattr(known, name):
            setattr(known, name, layout.size(counts))


@contextmanager
def replaced(root: nn.Module, path: str, child: nn.Module) -> Iterator[None]:
    """Swap one module in, and back on any exit."""
    parent, _, name = path.rpartition(".")
    table = root.get_submodule(parent)._modules
    original = table[name]
    table[name] = child
    try:
        yield
    finally:
        table[name] = original


def silenced(module: nn.Module, args: Any, output: Any) -> Any:
    """Return a forward hook that silences a block."""
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def silencing(block: BlockSpec) -> Callable[[nn.Module, Any, Any], Any]:
    """Return the forward hook that silences a block, which may be handed the residual stream as its second argument."""
    return _handing_on if block.handed else silenced


def _handing_on(module: nn.Module, args: Any, output: Any) -> Any:
    return (args[1], *output[1:]) if isinstance(output, tuple) else args[1]
