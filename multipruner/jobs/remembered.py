"""The recipe's loss, and an objective that remembers: what was measured once is never measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from multipruner.core.errors import NumericsError
from multipruner.core.identity import digest
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.search import Memo

from .setting import Setting


def objective_of(setting: Setting, rows: int) -> CalibrationObjective:
    """Return the recipe's loss on the first rows of the calibration text, or pictures (inside
    :meth:`Prunable.in_order`).
    """
    return CalibrationObjective(
        setting.prunable,
        setting.calibration.head(rows).ids,
        ignore_id=setting.calibration.ignore_id,
        batch_size=setting.recipe.calibration.batch_size * setting.calibration.each,
        loss=setting.recipe.objective,
    )


def loss_or_infinity(objective: CalibrationObjective, structure: Structure) -> float:
    """Return the loss; infinity where it is not finite: such a candidate is the worst, no reason to end the search."""
    try:
        return objective(structure)
    except NumericsError:
        return inf


class RememberedObjective:
    """An objective whose losses are on disk: what was measured once, by whichever process, is never measured again.

    Args:
        objective: measures.
        memo: remembers, for this text and this model alone.
        on_loss: called after every loss that was measured.
    """

    def __init__(self, objective: CalibrationObjective, memo: Memo, on_loss: Callable[[], None] | None = None) -> None:
        self.objective, self.memo, self.on_loss = objective, memo, on_loss
        self._base = objective.base

    def __call__(self, structure: Structure) -> float:
        """Return the loss of one structure in nats; infinity where it is not finite."""
        return self._losses([structure])[0]

    def commit(self, structure: Structure) -> None:
        """Remember the structure that the next ones differ little from; its states are computed when one is
        measured.
        """
        self._base = structure

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """Return the best and the second best of several structures; none is given up, as the others may be asked for
        later.

        Raises:
            NumericsError: when no candidate has a finite loss.
        """
        return best_two(structures, self._losses(structures, progress))

    def _losses(
        self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None
    ) -> list[float]:
        """Return the losses of all structures; those that are new are written together, also when something stops
        us.
        """
        rows = [structure.to_json() for structure in structures]
        if any(self.memo.get(row, 0) is None for row in rows):
            self.memo.refresh()  # another process may have measured it
        losses: list[float] = []
        new: list[tuple[Any, int, tuple[float]]] = []
        try:
            for row, structure in zip(rows, structures, strict=True):
                known = self.memo.get(row, 0)
                if known is None:
                    known = (self._measured(structure),)
                    new.append((row, 0, known))
                losses.append(known[0])
                if progress is not None:
                    progress(len(losses), len(rows))
        finally:
            if new:
                self.memo.add(new)
        return losses

    def _measured(self, structure: Structure) -> float:
        if self.objective.base != self._base:
            self.objective.commit(self._base)
        loss = loss_or_infinity(self.objective, structure)
        if self.on_loss is not None:
            self.on_loss()
        return loss


def remembered(setting: Setting, path: Path, sequences: int | None = None) -> RememberedObjective:
    """Return the recipe's loss on the first sequences of the calibration text (``None``: on all), kept in a file."""
    count, part = len(setting.calibration.ids), {}
    if sequences is not None and (rows := sequences * setting.calibration.each) < count:
        count, part = rows, {"sequences": sequences}
    return RememberedObjective(objective_of(setting, count), Memo(path, digest(setting.identity | part)))


def rough_of(setting: Setting, path: Path) -> RememberedObjective | None:
    """Return what measures the first tables of the program, where that is less text than all of it."""
    few = setting.recipe.calibration.width_sequences
    return remembered(setting, path, few) if few * setting.calibration.each < len(setting.calibration.ids) else None
