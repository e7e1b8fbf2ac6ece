"""The orders of all layers by an importance of the table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from multipruner.config.choices import IMPORTANCES, loaded, row_of
from multipruner.core.errors import ConfigError
from multipruner.core.plan import Ranking
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable

from .layer_view import LayerView


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
        name: a key of :data:`multipruner.config.choices.IMPORTANCES`.
        prunable: the dense model.
        statistics: its moments, for importances that look at them.
        progress: called with (layers done, layers in all).
        within_groups: order the query heads of every KV group as well; they stay in the dense order otherwise.

    Raises:
        ConfigError: when there is no such importance, or it needs moments and gets none.
    """
    row = row_of(IMPORTANCES, name, "importance")
    if row.moments and statistics is None:
        raise ConfigError(f"importance {name!r} needs moments of calibration text")
    by = loaded(row.by)
    layers = []
    for number in range(len(prunable.dense)):
        layers.append(by(LayerView(prunable, number, statistics, within_groups)))
        if progress is not None:
            progress(number + 1, len(prunable.dense))
    return Ranking(tuple(layers))
