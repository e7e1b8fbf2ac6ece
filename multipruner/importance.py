"""Nested orders of KV groups and MLP channels, most important first, behind one interface.

An importance is a function of a dense decoder layer's weights; every width is a prefix of the order it gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .architecture import ArchitectureSpec, BlockSpec, rows_per_part
from .errors import ConfigError, did_you_mean
from .plan import LayerRanking, Ranking
from .structure import LayerSize, Structure

RankLayer = Callable[[nn.Module, ArchitectureSpec, LayerSize, int], LayerRanking]


def part_weights(module: nn.Module, block: BlockSpec, full: LayerSize, head_dim: int) -> dict[str, Tensor]:
    """Weight rows of every part of a block: part -> [rows, hidden_size], views."""
    weights: dict[str, Tensor] = {}
    for projection in block.inputs:
        lengths = [rows_per_part(part, full, head_dim) for part in projection.parts]
        stacked = module.get_submodule(projection.path).weight
        assert isinstance(stacked, Tensor)
        weights.update(zip(projection.parts, stacked.detach().split(lengths), strict=True))
    return weights


def _descending(scores: Tensor) -> tuple[int, ...]:
    """Indices from the highest score to the lowest; ties keep their order, so the result is the same everywhere."""
    return tuple(torch.sort(scores, descending=True, stable=True).indices.tolist())


def rank_by_magnitude(layer: nn.Module, spec: ArchitectureSpec, full: LayerSize, head_dim: int) -> LayerRanking:
    """The paper's order (arXiv 2501.09949, section 3): L1 norms of the rows that feed a channel or a KV group.

    A channel's score is the sum over its gate and up rows; a KV group's is the mean L1 norm of its q, k and v
    rows. Norms are taken in float32.
    """
    mlp = part_weights(layer.get_submodule(spec.mlp.path), spec.mlp, full, head_dim)
    channels = sum((weight.float().abs().sum(dim=1) for weight in mlp.values()), torch.zeros(()))
    attention = part_weights(layer.get_submodule(spec.attention.path), spec.attention, full, head_dim)
    rows = {part: weight.float().abs().sum(dim=1) for part, weight in attention.items()}
    groups = torch.cat([norms.reshape(full.kv_heads, -1) for norms in rows.values()], dim=1).mean(dim=1)
    return LayerRanking(_descending(groups), _descending(channels))


def rank_as_is(layer: nn.Module, spec: ArchitectureSpec, full: LayerSize, head_dim: int) -> LayerRanking:
    """The dense model's own order (the paper's ablation "no reordering")."""
    return LayerRanking(tuple(range(full.kv_heads)), tuple(range(full.channels)))


IMPORTANCES: dict[str, RankLayer] = {"magnitude": rank_by_magnitude, "none": rank_as_is}


@torch.no_grad()
def rank(name: str, layers: nn.ModuleList, spec: ArchitectureSpec, dense: Structure, head_dim: int) -> Ranking:
    """Order every dense layer's KV groups and channels by the importance of this name.

    Raises:
        ConfigError: when there is no such importance.
    """
    if name not in IMPORTANCES:
        known = ", ".join(IMPORTANCES)
        raise ConfigError(f"no importance {name!r}{did_you_mean(name, IMPORTANCES)}; there are: {known}")
    measure = IMPORTANCES[name]
    return Ranking(tuple(measure(layer, spec, full, head_dim) for layer, full in zip(layers, dense, strict=True)))
