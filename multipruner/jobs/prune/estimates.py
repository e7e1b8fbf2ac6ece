"""First tables of the exact program that no loss was measured for, where the errors of a block's output can be told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from multipruner.importance.energies import sensitivities
from multipruner.jobs.setting import Setting
from multipruner.search import Task
from multipruner.search.program import Table

TOKENS = 4096
"""Of the text for moments, that sensitivities are taken from; twice as many gave the same structure."""


def estimate_of(setting: Setting, display: Callable[[str, int, int], None]) -> Callable[[Task], Table] | None:
    """Return what estimates the first tables (inside :meth:`Prunable.in_order`); ``None`` where they are measured.

    Args:
        setting: of the run; sensitivities are computed once for all its recipes.
        display: called with ("energies", sequences done, sequences in all) in the backward pass.
    """
    return partial(_estimated, setting, display) if setting.recipe.estimated else None


def _estimated(setting: Setting, display: Callable[[str, int, int], None], task: Task) -> Table:
    ids = setting.statistics_ids
    assert ids is not None
    if not setting.sensitivities:
        few = ids[: max(1, TOKENS // ids.shape[1])]
        seed, shown = setting.recipe.calibration.seed, partial(display, "energies")
        found = sensitivities(setting.prunable, few, seed=seed, progress=shown)
        setting.sensitivities.extend(found)
    dense, table = task.anatomy.dense, {}
    for block, factor in enumerate(setting.sensitivities):
        if block in task.straight:
            continue
        rows = []
        for chain in task.chains(block, dense):
            errors = task.errors_of(block, chain)
            assert errors is not None
            pairs = zip(chain, errors, strict=True)
            rows.append({size: 0.0 if size == dense[block] else factor * error for size, error in pairs})
        table[block] = task.predicted(block, dense, rows)
    return table
