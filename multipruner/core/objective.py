"""What a search asks of a model, and what it is answered; torch lives on the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .structure import Structure


class Objective(Protocol):
    """Loss of any structure on calibration text (lower is better)."""

    def __call__(self, structure: Structure) -> float:
        """The loss of one structure (mean NLL per token in nats, or KL to the dense model)."""
        ...

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """The best and the second best of several structures; the first wins a tie."""
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
    """

    best: Structure
    loss: float
    runner_up: Structure | None = None
    runner_up_loss: float = float("inf")
