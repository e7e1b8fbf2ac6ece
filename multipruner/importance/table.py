"""The orders of all blocks by an importance of the table."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from multipruner.config.choices import IMPORTANCES, loaded, row_of
from multipruner.core.errors import ConfigError
from multipruner.core.plan import Ranking
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable

from .block_view import BlockView


@torch.no_grad()
def rank(
    name: str,
    prunable: Prunable,
    statistics: Statistics | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    within: Collection[str] = (),
) -> Ranking:
    """Order the units of every dense block by the importance of this name.

    Args:
        name: a key of :data:`multipruner.config.choices.IMPORTANCES`.
        prunable: the dense model.
        statistics: its second moments, for importances that look at them.
        progress: called with (blocks done, blocks in all).
        within: the axes within others whose units are ordered as well, such as the query heads of every KV group; they
            stay in the dense order otherwise.

    Raises:
        ConfigError: when there is no such importance, or it needs moments and gets none.
    """
    row = row_of(IMPORTANCES, name, "importance")
    if row.moments and statistics is None:
        raise ConfigError(f"importance {name!r} needs moments of calibration text")
    by = loaded(row.by)
    blocks = []
    for number in range(len(prunable.anatomy)):
        blocks.append(by(BlockView(prunable, number, statistics, within)))
        if progress is not None:
            progress(number + 1, len(prunable.anatomy))
    return Ranking(tuple(blocks))
