"""The recipe's loss, and objectives that remember: what was measured once is never measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

from multipruner.core.errors import NumericsError
from multipruner.core.objective import Choice
from multipruner.core.structure import Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.search import Memo, Objective

from .setting import Setting


def objective_of(setting: Setting, sequences: int) -> CalibrationObjective:
    """The recipe's loss on the first sequences of the calibration text (inside :meth:`Prunable.in_order`)."""
    return CalibrationObjective(
        setting.prunable,
        setting.calibration.head(sequences).ids,
        ignore_id=setting.calibration.ignore_id,
        batch_size=setting.recipe.calibration.batch_size,
        loss=setting.recipe.objective,
    )


def loss_or_infinity(objective: CalibrationObjective, structure: Structure) -> float:
    """Infinity where the loss is not finite: such a candidate is the worst, and no reason to end the search."""
    try:
        return objective(structure)
    except NumericsError:
        return inf


class Remembered:
    """An objective whose losses are on disk: what was measured once is never measured again.

    Args:
        objective: measures.
        memo: remembers.
    """

    def __init__(self, objective: CalibrationObjective, memo: Memo) -> None:
        self.objective, self.memo, self._base = objective, memo, objective.base

    def __call__(self, structure: Structure) -> float:
        """The loss of one structure in nats; infinity where it is not finite."""
        key = structure.to_json()
        known = self.memo.get(key, 0)
        if known is None:
            if self.objective.base != self._base:
                self.objective.commit(self._base)
            known = (loss_or_infinity(self.objective, structure),)
            self.memo.add([(key, 0, known)])
        return known[0]

    def commit(self, structure: Structure) -> None:
        """The structure that the next ones differ little from; its states are computed when one is measured."""
        self._base = structure

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """The best and the second best of several structures."""
        losses = [self(structure) for structure in structures]
        first, *rest = sorted(range(len(losses)), key=lambda index: (losses[index], index))
        if losses[first] == inf:
            raise NumericsError("no candidate has a finite loss; try --dtype float32 or bfloat16")
        if not rest:
            return Choice(structures[first], losses[first])
        return Choice(structures[first], losses[first], structures[rest[0]], losses[rest[0]])


def remembered(setting: Setting, path: Path, sequences: int | None = None) -> Remembered:
    """The recipe's loss on the first sequences of the calibration text (``None``: on all), kept in a file."""
    count, part = len(setting.calibration.ids), {}
    if sequences is not None and sequences < count:
        count, part = sequences, {"sequences": sequences}
    space = hashlib.sha256(json.dumps(setting.identity | part, sort_keys=True).encode()).hexdigest()
    return Remembered(objective_of(setting, count), Memo(path, space))


def rough_of(setting: Setting, path: Path) -> Remembered | None:
    """What measures the first tables of the program, where that is less text than all of it."""
    few = setting.recipe.calibration.width_sequences
    return remembered(setting, path, few) if few < len(setting.calibration.ids) else None


class Remembering:
    """An objective whose losses are on disk; a greedy step's are written together.

    Args:
        objective: measures.
        memo: remembers, for this text and this model alone.
        on_loss: called after every loss that was measured.
    """

    def __init__(self, objective: Objective, memo: Memo, on_loss: Callable[[], None] | None = None) -> None:
        self.objective, self.memo, self.on_loss = objective, memo, on_loss
        self._base: Structure | None = None
        self._committed: Structure | None = None

    def __call__(self, structure: Structure) -> float:
        """The loss of one structure in nats.

        Raises:
            NumericsError: when it is not finite.
        """
        loss = self._losses([structure])[0]
        if loss == inf:
            raise NumericsError("the calibration loss is not finite; try --dtype float32 or bfloat16")
        return loss

    def commit(self, structure: Structure) -> None:
        """The structure that the next ones differ little from; its states are computed when one is measured."""
        self._base = structure

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """The best and the second best of several structures.

        Raises:
            NumericsError: when no candidate has a finite loss.
        """
        losses = self._losses(structures)
        if progress is not None:
            progress(len(structures), len(structures))
        first, *rest = sorted(range(len(losses)), key=lambda index: (losses[index], index))
        if losses[first] == inf:
            raise NumericsError("no candidate has a finite loss; try --dtype float32 or bfloat16")
        if not rest or losses[rest[0]] == inf:
            return Choice(structures[first], losses[first])
        return Choice(structures[first], losses[first], structures[rest[0]], losses[rest[0]])

    def _losses(self, structures: Sequence[Structure]) -> list[float]:
        rows = [structure.to_json() for structure in structures]
        known = [self.memo.get(row, 0) for row in rows]
        if None in known:
            self.memo.refresh()  # another process may have measured it
            known = [self.memo.get(row, 0) for row in rows]
        losses = [values[0] if values is not None else self._measure(s) for values, s in zip(known, structures,
                                                                                           strict=True)]  # fmt: skip
        new = [place for place, values in enumerate(known) if values is None]
        self.memo.add((rows[place], 0, (losses[place],)) for place in new)
        return losses

    def _measure(self, structure: Structure) -> float:
        if self._base is not None and self._base != self._committed:
            self.objective.commit(self._base)
            self._committed = self._base
        try:
            return self.objective(structure)
        except NumericsError:
            return inf
        finally:
            if self.on_loss is not None:
                self.on_loss()


class Watched:
    """An objective that is asked for one structure at a time, so that progress shows.

    Args:
        objective: remembers what it was asked before.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, structure: Structure) -> float:
        """The loss of one structure."""
        return self._objective(structure)

    def commit(self, structure: Structure) -> None:
        """The structure that the next ones differ little from."""
        self._objective.commit(structure)

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """The best and the second best of several structures."""
        for done, structure in enumerate(structures):
            self._objective(structure)
            if progress is not None:
                progress(done + 1, len(structures))
        return self._objective.argmin(structures)
