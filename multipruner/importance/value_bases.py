"""Bases in which the value dimensions of KV groups can leave: the most important first, the best that is linear.

A query head i of a KV group gives ``W_i o_i`` to the block's output, o_i what attention makes of the group's values.
All heads of the group lose the same dimensions of these. With S the mean of ``E[o_i o_i^T]`` over the g heads, keeping
r directions and refitting every ``W_i`` loses least where they are the first r right singular vectors V of
``[W_1; ...; W_g] S^(1/2)``, read as ``V^T S^(-1/2) o``. An orthogonal basis whose first r rows span the same, for every
r at once, is that of a QR decomposition of ``S^(-1/2) V``: the values are turned into it, and turned back by the output
projection, so that the model is what it was, and any number of dimensions is the beginning of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multipruner.core.axes import AXES, VALUES
from multipruner.engine.cutting import Projection
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable
from multipruner.engine.values.bases import turned_columns

_DAMPING = 1e-6
"""Of the mean second moment: directions that never occur come last, whatever the weights."""


@torch.no_grad()
def turn_values(prunable: Prunable, statistics: Statistics) -> None:
    """Have a model's values in their bases from now on, inside :meth:`.Prunable.in_order`, and its moments as well.

    Args:
        prunable: the dense model, not in order.
        statistics: its moments; changed in place.
    """
    for block in range(len(prunable.anatomy)):
        if prunable.block_spec(block).valued is None:
            continue
        counts, gram = prunable.counts(block), statistics.grams[block]
        weight = Projection.of(prunable.dense_output(block)).weight.detach().float()
        groups, width = counts[AXES[VALUES].within], counts[VALUES]
        queries = weight.shape[1] // groups // width
        heads = weight.unflatten(1, (groups, queries, width))
        squares = gram.float().unflatten(1, (groups * queries, width)).unflatten(0, (groups * queries, width))
        own = squares.diagonal(dim1=0, dim2=2).movedim(2, 0).unflatten(0, (groups, queries)).mean(dim=1)
        basis = torch.stack([basis_of(heads[:, group], own[group]) for group in range(groups)])
        prunable.bases[block] = basis
        statistics.grams[block] = turned_columns(turned_columns(gram, basis).T, basis)
        if block in statistics.means:
            statistics.means[block] = turned_columns(statistics.means[block], basis)


def basis_of(heads: Tensor, moments: Tensor) -> Tensor:
    """Return the basis of one KV group, its rows orthonormal, the most important first, float32 [width, width].

    Args:
        heads: the output projection of its query heads, [hidden_size, queries, width].
        moments: second moments of what attention makes of its values, the mean over the heads, [width, width].
    """
    weights = heads.double().flatten(0, 1)
    spread = moments.double()
    spread.diagonal().add_(_DAMPING * float(spread.diagonal().mean()) or 1.0)
    sizes, directions = torch.linalg.eigh(spread)
    root = (directions * sizes.sqrt()) @ directions.T
    inverse = (directions / sizes.sqrt()) @ directions.T
    _, vectors = torch.linalg.eigh(root @ (weights.T @ weights) @ root)
    orthogonal, upper = torch.linalg.qr(inverse @ vectors.flip(1))
    return (orthogonal * upper.diagonal().sign()).T.float().contiguous()
