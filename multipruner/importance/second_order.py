"""In which order columns of a linear layer can go when those that stay compensate (optimal brain surgeon).

With ``H = E[x x^T] + r I``, removing columns Q and refitting the others raises the squared output error by
``trace(W_Q (H^-1[Q, Q])^-1 W_Q^T)``: for one column ``|w_j|^2 / H^-1[j, j]``. Columns leave in the order of that
price, weights and inverse are updated as they go, and the reverse is a nested order, most important first. Where the
inputs are orthogonal and of one size it is the order of the column norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multipruner.core.errors import NumericsError

DAMPING = 1e-2
"""Of the mean diagonal of the second moments."""
ROUNDS = 96
"""Prices are looked at anew at most this often, a share of the groups leaving each time (exact when groups are few)."""


@torch.no_grad()
def elimination_order(weight: Tensor, gram: Tensor, *, groups: int, rounds: int = ROUNDS) -> tuple[int, ...]:
    """Return groups of neighbouring columns, the last to go first.

    Args:
        weight: output projection, [hidden_size, n].
        gram: second moments of its input, [n, n].
        groups: how many; each is ``n / groups`` columns.
        rounds: how often prices are looked at anew.

    Raises:
        NumericsError: when the second moments are not finite or cannot be inverted.
    """
    state = Elimination(weight.float(), inverse_of(gram.float()), weight.shape[1] // groups)
    at_once = max(1, -(-groups // rounds))
    leaving: list[Tensor] = []
    while state.there:
        # by their own numbers, so that ties fall the same way wherever the groups stand
        numbers, places = torch.sort(state.groups)
        out = numbers[torch.sort(state.prices()[places], stable=True).indices[:at_once]]
        leaving.append(out)
        state.remove(out)
    return tuple(torch.cat(leaving).flip(0).tolist())


def inverse_of(gram: Tensor) -> Tensor:
    """Return the inverse of damped second moments, [n, n].

    Raises:
        NumericsError: when they are not finite or cannot be inverted.
    """
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * float(gram.diagonal().mean()) or 1.0)
    factor, status = torch.linalg.cholesky_ex(damped)
    if int(status) or not bool(torch.isfinite(factor).all()):
        raise NumericsError("the moments of the calibration text are not finite or singular: check the weights for NaN")
    return torch.cholesky_inverse(factor)


def _columns(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


class Elimination:
    """Weights and inverse second moments of the columns that are still there, updated in place.

    They stand side by side at the beginning of what was allocated, in any order: where some leave, the last ones take
    their places, so that the work shrinks with what is there.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, size: int) -> None:
        """Take weights [hidden_size, n], the inverse [n, n], and how many columns a group has."""
        rows = weight.T.clone(memory_format=torch.contiguous_format)  # of its own: a view may be the model's own tensor
        self._rows, self._whole, self._size = rows, inverse, size
        self.groups = torch.arange(len(inverse) // size, device=inverse.device)
        """The numbers of the groups that are still there, in the order in which they stand."""

    @property
    def there(self) -> int:
        """How many groups are still there."""
        return len(self.groups)

    @property
    def weight(self) -> Tensor:
        """Of the columns that are there, [columns, hidden_size]."""
        return self._rows[: self.there * self._size]

    @property
    def inverse(self) -> Tensor:
        """Of the columns that are there, [columns, columns]."""
        return self._whole[: self.there * self._size, : self.there * self._size]

    def prices(self) -> Tensor:
        """Return what removing each group would cost, [groups]."""
        if self._size == 1:
            return self.weight.square().sum(dim=1) / self.inverse.diagonal()
        if self._rows.device.type != "cpu":
            return self._prices_together()
        prices = self.weight.new_empty(self.there)
        for place in range(self.there):
            own = slice(place * self._size, (place + 1) * self._size)
            solved = torch.linalg.solve(self.inverse[own, own], self.weight[own])
            prices[place] = (self.weight[own] * solved).sum()
        return prices

    def _prices_together(self) -> Tensor:
        """Return the same in one batch of equations, so that a device is asked once and not group by group."""
        parts = (self.there, self._size)
        own = self.inverse.unflatten(1, parts).unflatten(0, parts).diagonal(dim1=0, dim2=2).movedim(2, 0)
        weight = self.weight.unflatten(0, parts)
        return (weight * torch.linalg.solve(own, weight)).sum(dim=(1, 2))

    def remove(self, out: Tensor) -> None:
        """Take groups out that are there, by their numbers, each once: the others compensate."""
        stays = torch.isin(self.groups, out, invert=True)
        end = self.there - len(out)
        leaving = _columns((~stays).nonzero()[:, 0], self._size)
        rows, weight = self.inverse[leaving], self.weight[leaving]
        own = rows[:, leaving]
        holes, last = (~stays[:end]).nonzero()[:, 0], end + stays[end:].nonzero()[:, 0]
        to, of = _columns(holes, self._size), _columns(last, self._size)
        for moved in (self.weight, self.inverse, self.inverse.T, rows.T):
            moved[to] = moved[of]
        self.groups[holes] = self.groups[last]
        self.groups = self.groups[:end]
        rows = rows[:, : end * self._size]
        solved = torch.linalg.solve(own, rows)  # [columns that leave, columns that stay]
        self.weight.addmm_(solved.T, weight, alpha=-1)
        self.inverse.addmm_(rows.T, solved, alpha=-1)
