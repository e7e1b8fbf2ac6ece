"""What a search asks of a model. Defined here, where it is consumed; torch lives on the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from multipruner.core.structure import Choice, Structure


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
