"""The repairs at the end of a run: taken where they help on text they were not fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from multipruner.console.say import Say
from multipruner.core.structure import Structure
from multipruner.engine.prunable import Outputs
from multipruner.repair.final_norm import GainFit
from multipruner.repair.stream import accumulated

from .remembered import loss_or_infinity, objective_of
from .setting import Found, Setting


def refitted(
    setting: Setting, structure: Structure, progress: Callable[[int, int], None]
) -> tuple[Outputs, Tensor | None]:
    """Return all output projections refitted to what has added up, and the gain of the last norm to what is left of it,
    as the recipe says (inside :meth:`Prunable.in_order`).
    """
    assert setting.statistics_ids is not None
    recipe, ids = setting.recipe, setting.statistics_ids
    ridge = None if recipe.accumulate_ridge == "auto" else recipe.accumulate_ridge
    refit = recipe.final_norm == "refit" and setting.prunable.spec.task.reads_text  # one position is too little to fit
    fit = GainFit(setting.prunable, ids.numel(), recipe.calibration.seed) if refit else None
    outputs = accumulated(
        setting.prunable, structure, ids, share=recipe.accumulate, ridge=ridge, progress=progress, ends=fit and fit.see
    )
    return outputs, fit and fit.solve()


NOT_TAKEN = " (no better: not taken)"


def repair_all(setting: Setting, found: Found, say: Say, progress: Callable[[int, int], None]) -> Found:
    """Refit all output projections to what has added up, if that lowers the loss on text it was not fitted to; then the
    gain of the last norm, if that lowers it further."""
    prunable = setting.prunable
    with prunable.in_order(setting.ranking, setting.repair):
        outputs, gain = refitted(setting, found.structure, progress)
        objective = objective_of(setting, len(setting.calibration.ids))
        before = objective(found.structure)
        with prunable.with_outputs(outputs):
            after = loss_or_infinity(objective, found.structure)
        with prunable.with_outputs(outputs, gain):
            last = loss_or_infinity(objective, found.structure) if gain is not None else after
    say(f"repair of all blocks: {before:.4f} -> {after:.4f} nats" + ("" if after < before else NOT_TAKEN))
    if after >= before:
        return replace(found, loss=before)  # the search may have scored without the repair that is kept
    if gain is not None:
        say(f"gain of the last norm: {after:.4f} -> {last:.4f} nats" + ("" if last < after else NOT_TAKEN))
    gain, loss = (gain, last) if last < after else (None, after)
    return replace(found, loss=loss, outputs=outputs, gain=gain, loss_before_outputs=before)


def scored_with_repair(setting: Setting, found: Found) -> Found:
    """Return the loss of what a search without repairs found, with the repair that it gets at the end."""
    with setting.prunable.in_order(setting.ranking, setting.repair):
        loss = objective_of(setting, len(setting.calibration.ids))(found.structure)
    return replace(found, loss=loss, loss_before_outputs=found.loss)
