"""What a search asks of a model, and what it is answered; torch lives on the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Protocol

from .errors import NumericsError
from .structure import Structure


class Objective(Protocol):
    """Loss of any structure on calibration text (lower is better).

    The best of several structures are asked for by name, not for all their losses: whoever measures may give up a
    candidate that is worse than two others, whose loss is then known to nobody and must not be remembered.
    """

    def __call__(self, structure: Structure) -> float:
        """Return the loss of one structure (mean NLL per token in nats, or KL to the dense model)."""
        ...

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """Return the best and the second best of several structures; the first wins a tie."""
        ...

    def commit(self, structure: Structure) -> None:
        """Announce the structure that the next candidates will be compared with (it may be kept warm)."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What an objective answers when asked for the best of several structures.

    Attributes:
        best: the structure with the lowest loss (the first of them, where several tie).
        loss: its loss.
        runner_up: the second best, or ``None`` when there was only one candidate.
        runner_up_loss: its loss (infinity when there is none).
        measured: what every candidate that was measured adds to the loss, as (block, nats), where not all were.
    """

    best: Structure
    loss: float
    runner_up: Structure | None = None
    runner_up_loss: float = inf
    measured: tuple[tuple[int, float], ...] = ()


def best_two(structures: Sequence[Structure], losses: Sequence[float]) -> Choice:
    """Return the structures with the lowest two losses; the first wins a tie, and what is not finite is never chosen.

    Raises:
        NumericsError: when no loss is finite.
    """
    ranked = sorted((loss, place) for place, loss in enumerate(losses) if isfinite(loss))
    if not ranked:
        what = "the calibration loss is not finite" if len(losses) == 1 else "no candidate has a finite loss"
        raise NumericsError(
            f"{what}: the model overflows in its dtype, or its weights hold NaN; try --dtype float32 or bfloat16"
        )
    (loss, best), *rest = ranked
    if not rest:
        return Choice(structures[best], loss)
    return Choice(structures[best], loss, structures[rest[0][1]], rest[0][0])
