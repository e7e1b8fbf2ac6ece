"""The importances by name, and the orders of all layers by one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from multipruner.core.errors import ConfigError, did_you_mean
from multipruner.core.plan import LayerRanking, Ranking
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable

from .layer_view import LayerView
from .orders import as_it_is, by_activation, by_magnitude, by_second_order

RankLayer = Callable[[LayerView], LayerRanking]
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
