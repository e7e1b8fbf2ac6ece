"""In which order columns of a linear layer can go when those that stay compensate (optimal brain surgeon).

With ``H = E[x x^T] + r I``, removing columns Q and refitting the others raises the squared output error by
``trace(W_Q (H^-1[Q, Q])^-1 W_Q^T)``: for one column ``|w_j|^2 / H^-1[j, j]``. Columns leave in the order of that
price, weights and inverse are updated as they go, and the reverse is a nested order, most important first. Where the
inputs are orthogonal and of one size it is the order of the column norms.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from multipruner.core.errors import NumericsError

DAMPING = 1e-2
"""Of the mean diagonal of the second moments."""
ROUNDS = 96
"""Prices are looked at anew at most this often, a share of the groups leaving each time (exact when groups are few)."""


@torch.no_grad()
def elimination_order(weight: Tensor, gram: Tensor, *, groups: int, rounds: int = ROUNDS) -> tuple[int, ...]:
    """Groups of neighbouring columns, the last to go first.

    Args:
        weight: output projection, [hidden_size, n].
        gram: second moments of its input, [n, n].
        groups: how many; each is ``n / groups`` columns.
        rounds: how often prices are looked at anew.

    Raises:
        NumericsError: when the second moments are not finite or cannot be inverted.
    """
    size, columns = weight.shape[1] // groups, weight.shape[1]
    # sum over the rows of W is all that prices need: work with the moments of the rows instead of W itself
    state = Elimination(weight.float(), _inverse(gram.float()))
    at_once = max(1, -(-groups // rounds))
    leaving: list[int] = []
    alive = torch.arange(groups, device=weight.device)
    while len(alive):
        prices = state.prices(alive, size)
        chosen = torch.sort(prices, stable=True).indices[:at_once]
        out = alive[chosen]
        leaving += out.tolist()
        keep = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        keep[chosen] = False
        alive = alive[keep]
        if len(alive):
            state.remove(_columns(out, size), columns)
    return tuple(reversed(leaving))


def _inverse(gram: Tensor) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * float(gram.diagonal().mean()) or 1.0)
    factor, status = torch.linalg.cholesky_ex(damped)
    if int(status) or not bool(torch.isfinite(factor).all()):
        raise NumericsError("the calibration statistics are not finite or singular: check the weights for NaN")
    # rows are taken of it and its updates lie by rows: by columns, as the library gives it, they take thrice as long
    return torch.cholesky_inverse(factor).contiguous()


def _columns(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


class Elimination:
    """Weights and inverse second moments of the columns that are still there, updated in place."""

    def __init__(self, weight: Tensor, inverse: Tensor) -> None:
        self.weight, self.inverse = weight.clone(), inverse

    def prices(self, groups: Tensor, size: int) -> Tensor:
        """What removing each group would cost, [groups]."""
        if size == 1:
            return self.weight[:, groups].square().sum(dim=0) / self.inverse.diagonal()[groups]
        prices = torch.full((len(groups),), inf, device=groups.device)
        for index, group in enumerate(groups.tolist()):
            own = slice(group * size, (group + 1) * size)
            solved = torch.linalg.solve(self.inverse[own, own], self.weight[:, own].T)
            prices[index] = (self.weight[:, own].T * solved).sum()
        return prices

    def remove(self, out: Tensor, columns: int) -> None:
        """Take columns out: the others compensate."""
        rows = self.inverse[out]
        solved = torch.linalg.solve(rows[:, out], rows)  # [out, columns]
        self.weight -= self.weight[:, out] @ solved
        self.inverse -= rows.T @ solved
        # what left is worth nothing any more; a unit diagonal keeps later solutions finite
        self.weight[:, out] = 0
        self.inverse[out] = 0
        self.inverse[:, out] = 0
        self.inverse[out, out] = 1
