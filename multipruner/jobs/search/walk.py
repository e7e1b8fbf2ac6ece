"""The sequential path of a schedule, with every loss of it on disk: paths share their beginnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from multipruner.core.errors import NumericsError
from multipruner.core.structure import Choice, Structure
from multipruner.jobs.setting import Setting
from multipruner.search import Dimension, Memo, Objective, Problem, Step, replay, sequential_path


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


def walk(setting: Setting, problem: Problem, blocks: Objective, widths: Objective) -> tuple[Structure, list[Step]]:
    """The structure that a sequential path leads to, and its steps.

    Args:
        setting: of the model (inside :meth:`~multipruner.engine.prunable.Prunable.in_order`).
        problem: order, shares, ratio, grid.
        blocks, widths: the losses that whole blocks, and channels and heads, are judged by.

    Raises:
        InfeasibleError: when these shares do not reach the ratio.
    """
    objectives: dict[Dimension, Objective] = {"blocks": blocks, "mlp": widths, "heads": widths}
    steps = sequential_path(problem, objectives)
    return replay(setting.prunable.dense, steps), steps
