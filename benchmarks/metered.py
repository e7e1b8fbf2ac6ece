"""Losses on disk together with what each took to measure, so that a search can be billed as if it ran alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.search import Memo


@dataclass
class Bill:
    """What the search at hand has asked for: (seconds, token-layers) by namespace and structure."""

    rows: dict[tuple[str, Structure], tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, float]:
        seconds, layers = (sum(column) for column in zip(*self.rows.values(), strict=True))
        return {"measured": len(self.rows), "seconds": seconds, "token_layers": layers}


class Metered:
    """An objective that remembers losses, and what each took, on disk.

    Args:
        objective: measures.
        path: of the file.
        namespace: whatever the loss depends on.
        bill: written to; every search begins at the dense structure, and so does its bill.
    """

    def __init__(self, objective: CalibrationObjective, path: Path, namespace: str, bill: Bill) -> None:
        self._objective, self._base, self._bill, self._space = objective, objective.base, bill, namespace
        self._memo = Memo(path, namespace)

    def __call__(self, structure: Structure) -> float:
        """The loss of one structure."""
        known = self._memo.get(structure.to_json(), 0)
        if known is None:
            began, before = time.perf_counter(), self._objective.work.token_layers
            if self._objective.base != self._base:
                self._objective.commit(self._base)
            loss = self._objective(structure)
            known = (loss, time.perf_counter() - began, self._objective.work.token_layers - before)
            self._memo.add([(structure.to_json(), 0, known)])
        self._bill.rows[self._space, structure] = (known[1], known[2])
        return known[0]

    def commit(self, structure: Structure) -> None:
        """The structure that the next ones differ little from."""
        self._base = structure
        if structure == self._objective.prunable.dense:
            self._bill.rows.clear()

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """The best and the second best of several structures."""
        losses: list[float] = []
        for structure in structures:
            losses.append(self(structure))
            if progress is not None:
                progress(len(losses), len(structures))
        return best_two(structures, losses)
