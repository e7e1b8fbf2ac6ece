"""Values of attention in other bases: turned where they are made, and turned back where they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from multipruner.core.axes import AXES, VALUES, Counts, Kept
from multipruner.core.blocks import BlockSpec
from multipruner.engine.cutting import permute


def turned_columns(tensor: Tensor, basis: Tensor) -> Tensor:
    """Return what lies along heads of values in other bases of these, [..., groups * queries * rows] of [..., groups *
    queries * width]; the basis of every group, its rows orthonormal, is [groups, rows, width].
    """
    groups, _, width = basis.shape
    heads = tensor.unflatten(-1, (groups, -1, width)).float()
    return torch.einsum("...gqw,grw->...gqr", heads, basis.to(tensor.device)).flatten(-3).to(tensor.dtype)


def turned_rows(tensor: Tensor, basis: Tensor) -> Tensor:
    """Return what gives values, in other bases of these: [groups * rows, ...] of [groups * width, ...]."""
    heads = tensor.unflatten(0, (len(basis), -1)).float()
    return torch.einsum("gw...,grw->gr...", heads, basis.to(tensor.device)).flatten(0, 1).to(tensor.dtype)


@torch.no_grad()
def turn(module: nn.Module, block: BlockSpec, basis: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Have the values of a block in other bases, [groups, width, width], in place; return what its parameters held."""
    there, (rows, columns) = dict(module.named_parameters()), block.valued or ("", "")
    turns = {f"{rows}.weight": turned_rows, f"{rows}.bias": turned_rows, f"{columns}.weight": turned_columns}
    before = [(there[name], there[name].data, by) for name, by in turns.items() if name in there]
    for parameter, data, by in before:
        parameter.data = by(data, basis)
    return [(parameter, data) for parameter, data, _ in before]


def arrange(
    module: nn.Module, block: BlockSpec, order: Kept, dense: Counts, basis: Tensor | None = None
) -> Callable[[], None]:
    """Put the units of every axis of a block in another order, and its values in other bases, in place.

    Args:
        module, block: the block and its row.
        order: of its units.
        dense: counts of the module.
        basis: of the KV groups by their dense numbers, [groups, width, width]; values stay in their own without one.

    Returns:
        What undoes it, to the very numbers.
    """
    permute(module, block, order, dense)
    groups = list(cast(Sequence[int], order[AXES[VALUES].within])) if basis is not None else []
    before = [] if basis is None else turn(module, block, basis[groups])

    def undo() -> None:
        for parameter, data in before:
            parameter.data = data
        permute(module, block, order, dense, back=True)

    return undo
