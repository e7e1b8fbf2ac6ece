"""Time marks inside a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn

from .clock import Clock
from .timing import Runner


class Probe:
    """Time marks at the borders of a model's residual blocks, set while it runs its own forward pass.

    A block reaches from the call of its norm to the call of the next block's norm (of the next block itself where that
    runs beside it: the norms may all be called before both), so its residual addition and what
    the decoder does between layers count, and all blocks and the rest make up the whole pass.

    Args:
        norms: the norm of every block in the order of the forward pass, then the final norm.
        clock: of the model's device.
    """

    def __init__(self, norms: Sequence[nn.Module], clock: Clock) -> None:
        self._norms, self._clock, self._marks = norms, clock, []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have every forward pass leave its marks, within."""
        handles = [norm.register_forward_pre_hook(self._mark) for norm in self._norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, module: nn.Module, arguments: Any) -> None:
        self._marks.append(self._clock.now())

    def sample(self, runner: Runner) -> tuple[float, list[float]]:
        """Return milliseconds of one whole pass, and of each of its blocks."""
        runner.prepare()
        self._clock.wait()
        self._marks = [self._clock.now()]
        runner.forward()
        self._marks.append(self._clock.now())
        self._clock.wait()
        start, *borders, end = self._marks
        assert len(borders) == len(self._norms), "a norm was not called exactly once"
        pairs = pairwise(borders)
        return self._clock.milliseconds(start, end), [self._clock.milliseconds(a, b) for a, b in pairs]
