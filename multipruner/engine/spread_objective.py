"""The candidates of one greedy step spread over the processes of a job; one shared decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import Any

from multipruner.core.errors import NumericsError
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import Structure

from .objective import CalibrationObjective, Work
from .processes import Team


class SpreadObjective:
    """An objective whose candidates are scored by all processes of a team; decides as one process alone would.

    Every process makes one, with the same name, over an objective of its own on the same text. Rank 0 uses it; the
    others call :meth:`Team.serve`.

    Args:
        team: the processes.
        name: tells the objectives of a job apart.
        objective: scores candidates in this process.
    """

    def __init__(self, team: Team, name: str, objective: CalibrationObjective) -> None:
        self.team, self.name, self.objective = team, name, objective
        self._base: Structure | None = None
        self._committed: Structure | None = None
        self._progress: Callable[[int, int], None] | None = None
        team.handle(name, self._answer)

    def __call__(self, structure: Structure) -> float:
        """Return the loss of one structure in nats."""
        return self.argmin([structure]).loss

    @property
    def tokens(self) -> int:
        """Of the text."""
        return self.objective.tokens

    @property
    def work(self) -> Work:
        """What this process has computed."""
        return self.objective.work

    def commit(self, structure: Structure) -> None:
        """Remember the structure that the next candidates differ little from; others hear of it with the candidates."""
        self._base = structure

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """Return the best and the second best of several structures.

        Raises:
            NumericsError: when no candidate has a finite loss.
            DistributedError: when another process failed or has gone.
        """
        self._progress = progress
        base = self._base.to_json() if self._base is not None else None
        answers = self.team.ask(self.name, {"base": base, "structures": [s.to_json() for s in structures]})
        losses = [inf] * len(structures)
        for loss, place in (each for answer in answers for each in answer):
            losses[place] = loss
        return best_two(structures, losses)

    def _answer(self, request: Any) -> list[tuple[float, int]]:
        """Return loss and place of the best two of this process's candidates."""
        if request["base"] is not None:
            base = Structure.from_json(request["base"])
            if base != self._committed:
                self.objective.commit(base)
                self._committed = base
        # every size-th candidate: those that change early layers take longer, and stand together
        places = range(self.team.rank, len(request["structures"]), self.team.size)
        mine = [Structure.from_json(request["structures"][place]) for place in places]
        if not mine:
            return []
        found: list[tuple[float, int]] = []
        with suppress(NumericsError):  # nothing finite here; perhaps elsewhere
            choice = self.objective.argmin(mine, self._progress)
            found.append((choice.loss, places[mine.index(choice.best)]))
            if choice.runner_up is not None and choice.runner_up_loss < inf:
                found.append((choice.runner_up_loss, places[mine.index(choice.runner_up)]))
        return found
