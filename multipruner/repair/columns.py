"""Closed-form repair: what stays of an output projection takes over what it can of what left (no gradients).

When the columns S of an output projection W stay, the columns that reproduce its output best on calibration text are

    W' = ((W G)[:, S] + r W[:, S]) (G[S, S] + r I)^-1,     G = mean of x x^T,

the minimiser of ``E |W x - W' x_S|^2 + r |W' - W_S|^2``: all columns kept give W itself, and a large ridge r gives
plain slicing. Where the projection has a bias b, columns and bias are fitted together: G is then the covariance of x,
and ``b' = b + W m - W' m_S`` with m the mean of x. The repair ``bias`` leaves the columns alone: ``W' = W_S`` in that
formula gives what left its mean (FLAP, arXiv 2312.11983). Nothing is added to the model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from multipruner.core.errors import NumericsError
from multipruner.engine.cutting import Projection

How = Literal["lstsq", "bias"]
RIDGE = 1e-2
"""Of the mean diagonal of G."""
_CANCELLATION = 1e-5
"""What float32 leaves uncertain of a covariance, relative to the mean second moment it is the small difference of."""


def centred(gram: Tensor, mean: Tensor) -> tuple[Tensor, float]:
    """Return the covariance of an input, float32 [n, n], and the smallest ridge that its rounding asks for: where means
    are far larger than deviations, the difference is no more exact than this.

    Args:
        gram: its second moments, [n, n].
        mean: its means, [n].
    """
    moments, centre = gram.float(), mean.float()
    return moments - torch.outer(centre, centre), _CANCELLATION * float(moments.diagonal().mean())


def ridge_of(moments: Tensor, ridge: float, least: float = 0.0) -> float:
    """Return what to add to the diagonal of second moments.

    An input that is always zero, as behind weights that somebody set to zero, says nothing about its columns: with 1
    all of them stay as they are.

    Args:
        moments: [n, n].
        ridge: relative to the mean of their diagonal.
        least: the smallest, not relative to anything.
    """
    mean = float(moments.diagonal().mean())
    return 1.0 if mean == 0 else max(ridge * mean, least)


def factor_of(moments: Tensor, ridge: float, *others: Tensor) -> Tensor:
    """Return the Cholesky factor of second moments plus a ridge, which is not relative to anything.

    Args:
        moments: float32 [n, n]; the ridge is added in place.
        ridge: to the diagonal.
        *others: what the factor is used with, which has to be finite too.

    Raises:
        NumericsError: when something is not finite, or the moments are singular in spite of the ridge.
    """
    moments.diagonal().add_(ridge)
    factor, status = torch.linalg.cholesky_ex(moments)
    if int(status) or not all(bool(torch.isfinite(each).all()) for each in others):
        raise NumericsError(
            "the moments of the calibration text cannot be inverted: raise --ridge, give more of that text, or check "
            "the weights for NaN"
        )
    return factor


def repaired_columns(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, *, least: float = 0.0) -> Tensor:
    """Return the columns that stay, refitted to the output of all of them.

    Args:
        weight: output projection, [hidden_size, n].
        gram: second moments of its input, [n, n].
        kept: indices of the columns that stay, [k].
        ridge: relative to the mean of the diagonal of ``gram``.
        least: the smallest ridge, not relative to anything.

    Returns:
        float32 [hidden_size, k].

    Raises:
        NumericsError: when the moments are not finite, or singular in spite of the ridge.
    """
    full, dense = gram.float(), weight.detach().float()
    r = ridge_of(full, ridge, least)
    # W_S + (what the lost columns say about the kept ones): exact for all columns kept, whatever the rounding
    lost = torch.ones(full.shape[0], dtype=torch.bool, device=full.device)
    lost[kept] = False
    if not bool(lost.any()):
        return dense[:, kept]
    target = dense[:, lost] @ full[lost][:, kept]
    factor = factor_of(full[kept][:, kept], r, target)
    return dense[:, kept] + torch.cholesky_solve(target.T, factor).T


def repaired(
    how: How, whole: Projection, gram: Tensor, mean: Tensor | None, kept: Tensor, ridge: float = RIDGE
) -> Projection:
    """Return an output projection without some of its columns, repaired.

    Args:
        how: ``"lstsq"`` refits the columns, and the bias where there is one; ``"bias"`` the bias alone.
        whole: the projection with all its columns.
        gram: second moments of its input, [n, n].
        mean: means of its input, [n]; without them a bias stays as it is.
        kept: indices of the columns that stay, [k].
        ridge: of ``"lstsq"``, see :func:`repaired_columns`.

    Returns:
        What was repaired in float32; the columns of the repair ``"bias"`` as they were.

    Raises:
        NumericsError: see :func:`repaired_columns`.
    """
    if whole.bias is None or mean is None:
        return Projection(
            whole.weight[:, kept] if how == "bias" else repaired_columns(whole.weight, gram, kept, ridge), whole.bias
        )
    centre = mean.float()
    if how == "bias":
        weight = whole.weight[:, kept]
    else:
        moments, noise = centred(gram, mean)
        weight = repaired_columns(whole.weight, moments, kept, ridge, least=noise)
    dense, lost = whole.weight.detach().float(), torch.ones(len(centre), dtype=torch.bool, device=centre.device)
    lost[kept] = False
    # b + W m - W' m_S, without the difference of what stayed the same
    missing = dense[:, lost] @ centre[lost] - (weight.float() - dense[:, kept]) @ centre[kept]
    return Projection(weight, whole.bias.detach().float() + missing)
