"""How far a narrowed block's output is from the dense one, for many widths at once and from the moments alone.

With the columns S of an output projection W kept, and the best W' for them, the squared error of the output is

    e(S) = min_W'  E |W x - W' x_S|^2 + r |W' - W_S|^2 + r |W_Q|^2,     Q the columns that left.

Kept columns that are nested, as along one axis of a block, need one factorisation for all of them: with the columns in
the order in which they stay longest and ``G + r I = L L^T``, the first k columns explain what the first k rows of
``L^T`` do, so ``e(k)`` is the squared norm of the columns of ``W L`` from the k-th on.

The error is a better guide from one width to the next than their distance: losses follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import RIDGE, How, centred, factor_of, ridge_of


def nested_errors(
    weight: Tensor,
    gram: Tensor,
    mean: Tensor | None,
    kept: Sequence[Tensor],
    how: How = "lstsq",
    ridge: float = RIDGE,
) -> list[float]:
    """Return the squared output error of every choice of columns, summed over the hidden size, in the mean over tokens.

    Args:
        weight: output projection, [hidden_size, n].
        gram: second moments of its input, [n, n].
        mean: means of its input where a bias takes them over, [n]; else ``None``.
        kept: indices of the columns that stay, on the CPU, each choice a part of the next.
        how: whether what stays is refitted (``"lstsq"``), or at most a bias (``"bias"``).
        ridge: relative to the mean of the diagonal of ``gram``.

    Raises:
        NumericsError: see :func:`~.columns.factor_of`.
    """
    seen = torch.zeros(len(gram), dtype=torch.bool)
    order: list[Tensor] = []
    for columns in (*kept, torch.arange(len(gram))):
        order.append(columns[~seen[columns]])
        seen[columns] = True
    by_stay = torch.cat(order).to(gram.device)
    moments, least = (gram.float(), 0.0) if mean is None else centred(gram, mean)
    moments, rows = moments[by_stay][:, by_stay], weight.detach().float()[:, by_stay]
    if how == "lstsq":
        factor = factor_of(moments, ridge_of(moments, ridge, least), rows)
        own = (rows @ factor).square().sum(dim=0)
    else:
        # what column j and those after it share: the error of Q is the sum over pairs in Q
        pairs = (rows.T @ rows) * moments
        own = pairs.diagonal() + 2 * pairs.triu(1).sum(dim=1)
    left = own.double().flip(0).cumsum(0).flip(0).tolist()
    return [left[len(columns)] if len(columns) < len(left) else 0.0 for columns in kept]
