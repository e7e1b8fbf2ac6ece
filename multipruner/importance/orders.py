"""Nested orders of the units of a block, most important first.

An importance looks at one dense residual block, and where it wants at calibration statistics, and orders the units of
its axes; every size is a prefix of the orders it gives. To add one, write a function and a row in ``IMPORTANCES``
(:mod:`multipruner.config.choices`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from multipruner.core.plan import BlockUnits

from .block_view import BlockView
from .second_order import elimination_order


def _descending(scores: Tensor) -> tuple[int, ...]:
    """Return indices from the highest score to the lowest; ties keep their order, so the result is the same
    everywhere.
    """
    return tuple(torch.sort(scores, descending=True, stable=True).indices.tolist())


def by_magnitude(block: BlockView) -> BlockUnits:
    """Return the paper's order (arXiv 2501.09949, section 3): L1 norms of the rows that feed a unit, in the mean.

    A channel's rows are those of gate and up, a KV group's its q, k and v rows, a query head's its q rows, an expert's
    all of its gate and up. Norms are taken in float32.
    """
    return block.ordered(lambda axis: _descending(block.input_norms(axis).mean(dim=1)))


def by_activation(block: BlockView) -> BlockUnits:
    """Return what a column contributes to the block's output on its own: ``|w_j|^2 E[x_j^2]`` (after Wanda,
    2306.11695).

    Of an expert likewise what the block's output gets from it: the mean over all tokens of the squared norm.
    """
    if block.routes is not None:
        squares = block.routes.squares
        return block.ordered(lambda axis: _descending(squares))
    columns = block.output.square().sum(dim=0) * block.gram.diagonal()
    return block.ordered(lambda axis: _descending(block.by_unit(axis, columns)))


def by_second_order(block: BlockView) -> BlockUnits:
    """Order by backward elimination with exact repair (OBS; ZipLM, arXiv 2302.04089): see :mod:`.second_order`.

    Units within others stand in the order in which they leave when any unit of the block may. Experts stand by the mean
    over the tokens that are routed to them of their weight times the norm of what they return (REAP, arXiv 2510.13999).
    """
    if block.routes is not None:
        saliency = block.routes.mean
        return block.ordered(lambda axis: _descending(saliency))

    def order(axis: str) -> tuple[int, ...]:
        columns = block.side_by_side(axis)
        gram = block.gram[columns][:, columns]
        return elimination_order(block.output[:, columns], gram, groups=block.units(axis))

    return block.ordered(order)


def as_it_is(block: BlockView) -> BlockUnits:
    """Return the dense model's own order (the paper's ablation "no reordering")."""
    return BlockUnits.whole(block.place)
