"""Losses of many structures that differ everywhere, on several texts, with shared prefixes computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from torch import Tensor

from multipruner.core.errors import NumericsError
from multipruner.core.structure import Structure
from multipruner.engine.objective import CalibrationObjective, Work
from multipruner.engine.processes import Team
from multipruner.jobs.setting import Setting

STATE_BYTES = 1 << 29
"""Memory for the hidden states of one text."""


class Losses:
    """The recipe's loss of structures on several texts (inside :meth:`~multipruner.engine.prunable.Prunable.in_order`).

    Structures are sorted by what their layers keep, first layer first, and each becomes the base of the next: all that
    it shares with the one before, from the first layer on, is not computed again.

    Args:
        setting: the model and the recipe.
        texts: token ids, [sequences, length] each; their places are the fidelities.
        on_loss: called after every loss.
    """

    def __init__(self, setting: Setting, texts: Sequence[Tensor], on_loss: Callable[[], None] | None = None) -> None:
        self._setting, self.texts = setting, tuple(texts)
        self._objectives: dict[int, CalibrationObjective] = {}
        self.on_loss = on_loss

    def objective(self, fidelity: int) -> CalibrationObjective:
        """Return the objective on one of the texts, made when it is first needed."""
        if fidelity not in self._objectives:
            recipe = self._setting.recipe
            self._objectives[fidelity] = CalibrationObjective(
                self._setting.prunable,
                self.texts[fidelity],
                ignore_id=self._setting.calibration.ignore_id,
                batch_size=recipe.calibration.batch_size,
                loss=recipe.objective,
                state_bytes=STATE_BYTES,
            )
        return self._objectives[fidelity]

    def __call__(self, structures: Sequence[Structure], fidelity: int) -> list[float]:
        """Return losses in nats, in the order of the structures; infinity where a loss is not finite."""
        losses = [inf] * len(structures)
        for place in by_prefix(structures):
            losses[place] = self.loss(structures[place], fidelity)
        return losses

    def loss(self, structure: Structure, fidelity: int) -> float:
        """Return the loss of one structure, which becomes the base of the next."""
        objective = self.objective(fidelity)
        try:
            objective.commit(structure)
            return objective(structure)
        except NumericsError:
            return inf
        finally:
            if self.on_loss is not None:
                self.on_loss()

    @property
    def work(self) -> Work:
        """What this process has computed."""
        total = Work.on(self._setting.prunable.anatomy)
        for objective in self._objectives.values():
            total.evaluations += objective.work.evaluations
            total.token_blocks += objective.work.token_blocks
            total.head_tokens += objective.work.head_tokens
        return total

    def answer(self, team: Team) -> Callable[[Any], list[tuple[int, float]]]:
        """Return a handler: places and losses of this process's share of structures, in stretches with common
        prefixes.
        """

        def losses(request: Any) -> list[tuple[int, float]]:
            structures = [Structure.from_json(rows) for rows in request["candidates"]]
            order = by_prefix(structures)
            mine = [order[place] for place in team.share(len(order))]
            return [(place, self.loss(structures[place], request["fidelity"])) for place in mine]

        return losses


def by_prefix(structures: Sequence[Structure]) -> list[int]:
    """Return the places of structures in an order in which neighbours share as many first layers as can be."""
    return sorted(range(len(structures)), key=lambda place: structures[place].blocks)
