"""Nested orders of KV groups and MLP channels, most important first, behind one interface.

An importance looks at one dense decoder layer, and where it wants at calibration statistics, and orders the layer's
parts; every width is a prefix of the order it gives. To add one, write a function and a row in ``IMPORTANCES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multipruner.core.errors import ConfigError, did_you_mean
from multipruner.core.families import BlockSpec, rows_per_part
from multipruner.core.plan import LayerRanking, Ranking
from multipruner.core.structure import BlockKind, LayerSize, queries_per_group
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable

from .second_order import elimination_order


@dataclass(frozen=True)
class LayerView:
    """One dense decoder layer, as importances see it."""

    prunable: Prunable
    number: int
    statistics: Statistics | None
    within_groups: bool = False
    """Whether query heads are to be ordered inside the KV groups as well."""

    @property
    def full(self) -> LayerSize:
        return self.prunable.dense[self.number]

    def parts(self, kind: BlockKind) -> dict[str, Tensor]:
        """Weight rows of every part of a block: part -> [rows, hidden_size], views."""
        block = self.prunable.spec.block(kind)
        module = self.prunable.layers[self.number].get_submodule(block.path)
        weights: dict[str, Tensor] = {}
        for projection in block.inputs:
            lengths = [rows_per_part(part, self.full, self.prunable.head_dim) for part in projection.parts]
            stacked = module.get_submodule(projection.path).weight
            assert isinstance(stacked, Tensor)
            weights.update(zip(projection.parts, stacked.detach().split(lengths), strict=True))
        return weights

    def output(self, kind: BlockKind) -> Tensor:
        """The output projection of a block, float32 [hidden_size, columns]."""
        block: BlockSpec = self.prunable.spec.block(kind)
        weight = self.prunable.layers[self.number].get_submodule(f"{block.path}.{block.output}").weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()

    def gram(self, kind: BlockKind) -> Tensor:
        """Second moments of the output projection's input, [columns, columns]."""
        assert self.statistics is not None
        return self.statistics.grams[self.number, kind]

    def by_group(self, columns: Tensor) -> Tensor:
        """Sum of the scores of a KV group's columns (its query heads side by side), [kv_heads]."""
        return columns.reshape(self.full.kv_heads, -1).sum(dim=1)

    def nested(self, order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """For every KV group its query heads, in the order in which all of the layer's stand; empty if not wanted."""
        if not self.within_groups:
            return ()
        per_group = queries_per_group(self.full)
        return tuple(tuple(head for head in order if head // per_group == group) for group in range(self.full.kv_heads))


RankLayer = Callable[[LayerView], LayerRanking]


def _descending(scores: Tensor) -> tuple[int, ...]:
    """Indices from the highest score to the lowest; ties keep their order, so the result is the same everywhere."""
    return tuple(torch.sort(scores, descending=True, stable=True).indices.tolist())


def by_magnitude(layer: LayerView) -> LayerRanking:
    """The paper's order (arXiv 2501.09949, section 3): L1 norms of the rows that feed a channel or a KV group.

    A channel's score is the sum over its gate and up rows; a KV group's is the mean L1 norm of its q, k and v
    rows, a query head's that of its q rows. Norms are taken in float32.
    """
    channels = sum((weight.float().abs().sum(dim=1) for weight in layer.parts("mlp").values()), torch.zeros(()))
    rows = {part: weight.float().abs().sum(dim=1) for part, weight in layer.parts("attention").items()}
    groups = torch.cat([norms.reshape(layer.full.kv_heads, -1) for norms in rows.values()], dim=1).mean(dim=1)
    heads = rows["q"].reshape(layer.full.query_heads, -1).mean(dim=1)
    return LayerRanking(_descending(groups), _descending(channels), layer.nested(_descending(heads)))


def by_activation(layer: LayerView) -> LayerRanking:
    """What a column contributes to the block's output on its own: ``|w_j|^2 E[x_j^2]`` (after Wanda, 2306.11695)."""

    def scores(kind: BlockKind) -> Tensor:
        return layer.output(kind).square().sum(dim=0) * layer.gram(kind).diagonal()

    columns = scores("attention")
    heads = columns.reshape(layer.full.query_heads, -1).sum(dim=1)
    return LayerRanking(
        _descending(layer.by_group(columns)), _descending(scores("mlp")), layer.nested(_descending(heads))
    )


def by_second_order(layer: LayerView) -> LayerRanking:
    """Backward elimination with exact compensation (OBS; ZipLM, arXiv 2302.04089): see :mod:`.elimination`.

    Query heads inside the KV groups stand in the order in which they leave when any head of the layer may.
    """

    def order(kind: BlockKind, groups: int) -> tuple[int, ...]:
        return elimination_order(layer.output(kind), layer.gram(kind), groups=groups)

    heads = order("attention", layer.full.query_heads) if layer.within_groups else ()
    groups, channels = order("attention", layer.full.kv_heads), order("mlp", layer.full.channels)
    return LayerRanking(groups, channels, layer.nested(heads))


def as_it_is(layer: LayerView) -> LayerRanking:
    """The dense model's own order (the paper's ablation "no reordering")."""
    return LayerRanking(tuple(range(layer.full.kv_heads)), tuple(range(layer.full.channels)))


ImportanceName = Literal["magnitude", "activation", "second-order", "none"]
IMPORTANCES: dict[str, RankLayer] = {
    "magnitude": by_magnitude,
    "activation": by_activation,
    "second-order": by_second_order,
    "none": as_it_is,
}
NEED_STATISTICS = ("activation", "second-order")


@torch.no_grad()
def rank(
    name: str,
    prunable: Prunable,
    statistics: Statistics | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    within_groups: bool = False,
) -> Ranking:
    """Order every dense layer's KV groups and channels by the importance of this name.

    Args:
        name: a key of :data:`IMPORTANCES`.
        prunable: the dense model.
        statistics: its second moments, for the importances in :data:`NEED_STATISTICS`.
        progress: called with (layers done, layers in all).
        within_groups: order the query heads of every KV group as well; they stay in the dense order otherwise.

    Raises:
        ConfigError: when there is no such importance, or it needs calibration statistics and gets none.
    """
    if name not in IMPORTANCES:
        known = ", ".join(IMPORTANCES)
        raise ConfigError(f"no importance {name!r}{did_you_mean(name, IMPORTANCES)}; there are: {known}")
    if name in NEED_STATISTICS and statistics is None:
        raise ConfigError(f"importance {name!r} needs calibration statistics")
    layers = []
    for number in range(len(prunable.dense)):
        layers.append(IMPORTANCES[name](LayerView(prunable, number, statistics, within_groups)))
        if progress is not None:
            progress(number + 1, len(prunable.dense))
    return Ranking(tuple(layers))
