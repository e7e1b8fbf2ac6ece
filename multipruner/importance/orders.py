"""Nested orders of KV groups and MLP channels, most important first.

An importance looks at one dense decoder layer, and where it wants at moments of calibration text, and orders the
layer's parts; every width is a prefix of the order it gives. To add one, write a function and a row in ``IMPORTANCES``
(:mod:`multipruner.importance.table`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from multipruner.core.plan import LayerRanking
from multipruner.core.structure import BlockKind

from .layer_view import LayerView
from .second_order import elimination_order


def _descending(scores: Tensor) -> tuple[int, ...]:
    """Return indices from the highest score to the lowest; ties keep their order, so the result is the same
    everywhere.
    """
    return tuple(torch.sort(scores, descending=True, stable=True).indices.tolist())


def by_magnitude(layer: LayerView) -> LayerRanking:
    """Return the paper's order (arXiv 2501.09949, section 3): L1 norms of the rows that feed a channel or a KV group.

    A channel's score is the sum over its gate and up rows; a KV group's is the mean L1 norm of its q, k and v
    rows, a query head's that of its q rows. Norms are taken in float32.
    """
    channels = torch.cat(layer.input_norms("mlp", "channels"), dim=1).sum(dim=1)
    groups = torch.cat(layer.input_norms("attention", "kv_groups"), dim=1).mean(dim=1)
    heads = _magnitudes_of_heads(layer) if layer.orders_heads else ()
    return LayerRanking(_descending(groups), _descending(channels), layer.nested(heads))


def _magnitudes_of_heads(layer: LayerView) -> tuple[int, ...]:
    return _descending(torch.cat(layer.input_norms("attention", "queries"), dim=1).mean(dim=1))


def by_activation(layer: LayerView) -> LayerRanking:
    """Return what a column contributes to the block's output on its own: ``|w_j|^2 E[x_j^2]`` (after Wanda,
    2306.11695).
    """

    def scores(kind: BlockKind) -> Tensor:
        return layer.output(kind).square().sum(dim=0) * layer.gram(kind).diagonal()

    columns = scores("attention")
    heads = _descending(layer.by_unit("attention", "queries", columns)) if layer.orders_heads else ()
    groups = layer.by_unit("attention", "kv_groups", columns)
    return LayerRanking(_descending(groups), _descending(scores("mlp")), layer.nested(heads))


def by_second_order(layer: LayerView) -> LayerRanking:
    """Order by backward elimination with exact repair (OBS; ZipLM, arXiv 2302.04089): see :mod:`.second_order`.

    Query heads inside the KV groups stand in the order in which they leave when any head of the layer may.
    """

    def order(kind: BlockKind, groups: int) -> tuple[int, ...]:
        return elimination_order(layer.output(kind), layer.gram(kind), groups=groups)

    heads = order("attention", layer.full.query_heads) if layer.orders_heads else ()
    groups, channels = order("attention", layer.full.kv_heads), order("mlp", layer.full.channels)
    return LayerRanking(groups, channels, layer.nested(heads))


def as_it_is(layer: LayerView) -> LayerRanking:
    """Return the dense model's own order (the paper's ablation "no reordering")."""
    return LayerRanking(tuple(range(layer.full.kv_heads)), tuple(range(layer.full.channels)))
